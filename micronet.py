#!/usr/bin/env python3
"""Train the smallest image classifiers that hold their accuracy: a chain of EfficientNets, each taught by the last.

    b3 -> b3 refined -> b0 -> ex and exx                     (CIFAR-100, 32 x 32, or images of your own, to 256 x 256)

A stage trains one network. From the second stage on a frozen teacher labels the very crop that the student sees
(label refinery [1, 2]), and the best network of a stage is the teacher of the next. The smallest two, ex and exx,
have 2,793,064 and 2,418,650 parameters and score 0.0748 and 0.0668 by the authors' count, 0.0740 and 0.0661 by the
challenge's and 0.0723 and 0.0644 as `export` writes them (`score` computes all of these); the authors report 80.12 %
and 80.14 % top-1 for them [1]. What this program has measured itself stands in README.md.

    micronet.py chain                           train all stages, teachers first, skipping what is finished
    accelerate launch --config_file accelerate_config.yaml micronet.py run-stage b3         train one stage
    micronet.py show                            where a chain stands, with curves
    micronet.py evaluate ckpt/ex                accuracy of its best network, with --classes of every class
    micronet.py score                           parameters, operations and MicroNet score of every network
    micronet.py export ckpt/ex ex.onnx          the network as it ships, folded
    micronet.py predict ex.onnx photo.jpg       the likeliest classes of an image

The method, some 1,000 lines, is in the rooms Stages (what is configured), Data (images and their augmented views),
Networks, Losses and, in Training, `train_stage` and `prune`. The program around it: Cost (what a network costs), Files
(a checkpoint in and out), Keeping (what a stage keeps, and going on from it), Export (as it ships, and the authors'
files in), ONNX (such a file, written and read again), Processes (of a run, on one machine or several), Speed, Views
(what a run looks like), Tables, Launching (stops, and a chain's stages in processes of their own) and Commands.

References
[1] Yang et al., MicroNet-CIFAR100: EfficientNet-ex(x) with Angleloss and Label Refinery, 2019 (the method)
[2] Bagherinezhad et al., Label Refinery, arXiv 1805.02641
[3] Wang et al., Additive Margin Softmax for Face Verification, arXiv 1801.05599
[4] Tan and Le, EfficientNet, arXiv 1905.11946
[5] Hu et al., Squeeze-and-Excitation Networks, arXiv 1709.01507
[6] Huang et al., Deep Networks with Stochastic Depth, arXiv 1603.09382
[7] Smith and Topin, Super-Convergence (one-cycle schedule), arXiv 1708.07120
[8] Loshchilov and Hutter, SGDR (cosine schedule), arXiv 1608.03983
[9] The MicroNet Challenge, NeurIPS 2019: score relative to WideResNet-28-10
[10] Zhu and Gupta, To Prune, or Not to Prune, arXiv 1710.01878 (the cubic schedule)
[11] Lee et al., Layer-Adaptive Sparsity for the Magnitude-Based Pruning, arXiv 2010.07611

Dimensions in shape comments: N batch, C channels, H height, W width, K classes, D embedding.
"""

from __future__ import annotations

import signal
import sys

if __name__ == "__main__":  # before anything that takes time: a signal ends the program, and not with a traceback
    for _signum in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(_signum) != signal.SIG_IGN:  # nohup ... &
            signal.signal(_signum, lambda signum, frame: sys.exit(128 + signum))

import copy
import ctypes
import errno
import fcntl
import functools
import gc
import glob
import hashlib
import importlib.machinery
import importlib.util
import io
import itertools
import json
import logging
import math
import operator
import os
import platform
import re
import resource
import select
import shutil
import socket
import statistics
import struct
import subprocess
import tempfile
import threading
import time
import timeit
import tomllib
import unicodedata
import warnings
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, redirect_stderr, suppress
from dataclasses import dataclass, field, fields, is_dataclass, replace
from datetime import timedelta
from pathlib import Path
from types import ModuleType, SimpleNamespace, UnionType
from typing import (
    TYPE_CHECKING, Annotated, Any, BinaryIO, Literal, NamedTuple, TextIO, get_args, get_origin, get_type_hints,
)  # fmt: skip

import rich.box
import typer
from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.segment import Segment, SegmentLines
from rich.table import Column, Table
from rich.text import Text

if __name__ == "__main__" and not TYPE_CHECKING:
    # The program's own copy of this file only parses, checks and prints, which must not wait seconds for torch:
    # its Networks room stays a shell, and commands that compute run in the module `micronet` (see `command`).
    shell = ("Module", "Sequential", "Conv2d", "Linear", "AdaptiveAvgPool2d")
    nn = SimpleNamespace(**dict.fromkeys(shell, object))
    Function = object
else:
    import torch
    import torch.nn.functional as F
    from torch import Tensor, nn
    from torch.autograd import Function

if TYPE_CHECKING:
    from accelerate import Accelerator

__version__ = "0.1.0"


class Failure(Exception):
    """A failure that the user can mend: one line on the screen and an exit code, never a traceback."""

    exit_code = 1

    def __init__(self, message: str, exit_code: int | None = None) -> None:
        super().__init__(message)
        self.exit_code = exit_code or self.exit_code


class Misconfigured(Failure):  # what was asked for makes no sense: stages.toml, command line or launch configuration
    exit_code = 2


class Refused(Failure):  # a file (checkpoint, data, teacher) is not what it should be
    exit_code = 3


class NotFinite(Failure):  # training has come to nan or infinity
    exit_code = 4


class Unwritable(Failure):  # the disk is full or read-only, or permission is missing
    exit_code = 5


class Locked(Failure):  # another process trains the stage
    exit_code = 75


class Stopped(Failure):  # by a signal or by the end of the process that started this one
    exit_code = 128 + signal.SIGTERM


def in_words(error: Exception) -> str:
    """Say what an error says, a system call's with the file first."""
    return f"{error.filename or 'i/o'}: {error.strerror or error}" if isinstance(error, OSError) else str(error)


# ------------------------------------------------------------------------------------------------------------ Stages
# What is configured. Numbers live in stages.toml, their meaning lives here.


class Accepts(NamedTuple):
    """What a key of stages.toml accepts: a parser, to the value that is kept or None, and the words for an error."""

    parse: Callable[[Any], Any]
    words: Callable[[], str]


def whole(least: int, most: int = 10**9) -> Accepts:
    """Accept whole numbers from `least` to `most` (`true` is none)."""
    words = f"of {least} or more" if most == 10**9 else f"from {least} to {most:,}"
    return Accepts(lambda v: v if type(v) is int and least <= v <= most else None, lambda: f"a whole number {words}")


def is_number(value: Any) -> bool:
    """Tell whether `value` is a finite number, and not a huge integer that no float holds."""
    return type(value) is int and abs(value) < 2**53 or type(value) is float and math.isfinite(value)


def number(test: Callable[[float], bool], words: str) -> Accepts:
    """Accept finite numbers that pass `test`."""
    return Accepts(lambda v: float(v) if is_number(v) and test(v) else None, lambda: f"a number {words}")


def one_of(names: Callable[[], Collection[str]]) -> Accepts:
    """Accept one of `names`, which are looked up when needed (they are defined further down)."""
    return Accepts(lambda v: v if isinstance(v, str) and v in names() else None, lambda: f"one of {', '.join(names())}")


def some_of(names: Callable[[], Collection[str]]) -> Accepts:
    """Accept a list of one or more different `names`."""

    def parse(value: Any) -> tuple[str, ...] | None:
        sound = isinstance(value, list | tuple) and all(isinstance(v, str) and v in names() for v in value)
        return tuple(value) if sound and 0 < len(set(value)) == len(value) else None

    return Accepts(parse, lambda: f"a list of one or more of {', '.join(names())}")


class Schedule(NamedTuple):
    """A rate that rises linearly to `peak` over `warmup_epochs` and then falls to 0 at the end of the stage."""

    schedule: str
    peak: float
    warmup_epochs: float = 0.0


SCHEDULES = ("cosine", "one-cycle")


def parse_lr(value: Any) -> Schedule | tuple[tuple[int, float], ...] | None:
    """Return a list of [last epoch, rate] in rising order, or the table of a `Schedule`, as it is kept."""

    def is_rate(value: Any) -> bool:
        return is_number(value) and 0 < value <= 100

    match value:
        case {"schedule": schedule, "peak": peak, **rest} if schedule in SCHEDULES and is_rate(peak):
            warmup = rest.pop("warmup_epochs", 0)
            sound = not rest and is_number(warmup) and warmup >= 0
            return Schedule(schedule, float(peak), float(warmup)) if sound else None
        case [_, *_] if all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in value):
            sound = all(whole(1).parse(last) and is_rate(rate) for last, rate in value)
            rising = sound and all(a[0] < b[0] for a, b in itertools.pairwise(value))
            return tuple((last, float(rate)) for last, rate in value) if rising else None


LR_WORDS = (
    "[[last epoch, rate], ...] with rising epochs and rates above 0, or "
    '{ schedule = "cosine" or "one-cycle", peak = rate above 0, warmup_epochs = 0 or more }'
)


def key(accepts: Accepts, **default: Any) -> Any:
    """Declare a key of a stage: what it accepts and, unless every stage must give it, its default."""
    return field(metadata={"accepts": accepts}, kw_only=True, **default)


ROLES = ("teacher", "start")  # of a network that another one needs
A_NETWORK = Accepts(lambda v: v if isinstance(v, str) and v else None, lambda: "a name or a path")


@dataclass(frozen=True)
class Stage:
    """One training run. Each field but `name` is a key of stages.toml; the defaults are the method's recipe [1]."""

    name: str
    """What stands after `stage.` in stages.toml: letters, digits, - and _."""

    network: str = key(Accepts(lambda v: find_network(v), lambda: f"one of {', '.join(NETWORKS)}"))
    """The architecture, one of `NETWORKS`, whose efficientnet_ may be left out."""

    width: float | None = key(number(lambda v: 0 < v <= 10, "above 0, at most 10"), default=None)
    """Multiplier of all channel counts [4]; None is the network's own."""

    depth: float | None = key(number(lambda v: 0 < v <= 10, "above 0, at most 10"), default=None)
    """Multiplier of all block repeats [4]; None is the network's own."""

    teacher: str | None = key(A_NETWORK, default=None)
    """The stage whose best network labels the crops, or the path of a checkpoint; None trains on the true labels."""

    start: str | None = key(A_NETWORK, default=None)
    """The stage, or the path of a checkpoint, whose best network's weights come first; None draws them."""

    sparsity: float = key(number(lambda v: 0 <= v < 1, "from 0 to below 1"), default=0.0)
    """Share of the weights of convolutions and linear layers, but the first, that are zero in the end (see `prune`).

    Above 0 the classifier is one linear layer from the beginning, as folded afterwards it would not be sparse. Its
    outputs stand for the cosines, also where `margin` is subtracted, but no length keeps them in [-1, 1].
    """

    prune_epochs: int = key(whole(1), default=1)
    """Over how many epochs that share rises: in epoch e it is sparsity x (1 - (1 - e / prune_epochs)^3) [10]."""

    dataset: str = key(
        Accepts(lambda v: parse_dataset(v), lambda: f"one of {', '.join(DATASETS)}, or {FOLDER}NAME"),
        default="cifar100",
    )
    """Where the images come from: one of `DATASETS`, or folder:NAME, images of your own (see `scan_folder`)."""

    folder: Dataset | None = field(default=None, kw_only=True)
    """What a folder of images holds, which is no key: a checkpoint remembers it where the folder is not."""

    side: int = key(
        Accepts(lambda v: v if type(v) is int and v in SIDES else None, lambda: "a multiple of 32 up to 256"),
        default=32,
    )
    """Pixels that a folder's images have in height and width when they are read; those of `DATASETS` have 32."""

    train_images: int | None = key(whole(1), default=None)
    """Train on the first so many images; None is all."""

    test_images: int | None = key(whole(1), default=None)
    """Test on the first so many images, validation images where there are some; None is all."""

    views: tuple[str, ...] = key(some_of(lambda: VIEWS), default=("jitter", "jitter-crop", "crop"))
    """An epoch is the training set once under each of these `VIEWS`, shuffled together."""

    batch_size: int = key(whole(1), default=128)
    """Images per optimiser step, over all processes."""

    epochs: int = key(whole(1, 10_000), default=70)
    """How often all views of the training set are seen."""

    lr: Schedule | tuple[tuple[int, float], ...] = key(
        Accepts(parse_lr, lambda: LR_WORDS), default=((25, 0.07), (50, 0.007), (65, 0.0007), (70, 0.00007))
    )
    """Learning rate: [last epoch, rate] pairs, or a `Schedule`."""

    momentum: float = key(number(lambda v: 0 <= v < 1, "from 0 to below 1"), default=0.9)
    """Momentum of SGD (no Nesterov, no dampening)."""

    weight_decay: float = key(number(lambda v: 0 <= v <= 1, "from 0 to 1"), default=1e-4)
    """L2 penalty on every parameter, per step and unit of rate."""

    scale: float = key(number(lambda v: 0 < v <= 1000, "above 0, at most 1000"), default=5.0)
    """What the cosines are multiplied by before softmax, in student and teacher; s of [3]."""

    margin: float = key(number(lambda v: 0 <= v <= 2, "from 0 to 2"), default=0.0)
    """What is subtracted from the true class's cosine, without a teacher; m of [3]."""

    stochastic_depth: float = key(number(lambda v: 0 <= v < 1, "from 0 to below 1"), default=0.0)
    """Probability that a block with a skip is left out, per image, in training [6]."""

    seed: int = key(whole(0), default=0)
    """Seed of every random stream of the stage."""

    @property
    def multipliers(self) -> tuple[float, float]:  # of channels and of repeats
        width, depth = NETWORKS[self.network]
        return self.width or width, self.depth or depth

    @property
    def parents(self) -> dict[str, str]:
        """The networks that must be there before it begins, by what they are to it."""
        return {role: name for role in ROLES if (name := getattr(self, role))}

    @property
    def data(self) -> Dataset:
        return self.folder or DATASETS[self.dataset]

    @property
    def classes(self) -> int:
        return self.data.classes

    @property
    def train_size(self) -> int:
        return self.train_images or self.data.train

    @property
    def tested_on(self) -> Part:
        """What every epoch is tested on, and the best one chosen."""
        return "validation" if self.data.validation else "test"

    @property
    def test_size(self) -> int:
        """How many images that is."""
        everything = self.data.validation or self.data.test
        return min(self.test_images or everything, everything)

    @property
    def is_scored(self) -> bool:
        """Tell whether a MicroNet score means something: the challenge had CIFAR-100."""
        return self.dataset == "cifar100"

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.train_size * len(self.views) / self.batch_size)


KEYS = {f.name: f.metadata["accepts"] for f in fields(Stage) if f.metadata}


def load_stages(path: Path, data: Path = Path("data"), over: dict[str, Any] | None = None) -> dict[str, Stage]:
    """Read and check the stages of a TOML file, by name and in the file's order, with values `over` all of them.

    Folders of images are looked for in `data`. Raises Misconfigured with one line that names file, stage, key, what
    stands there and what is accepted.
    """
    try:
        with open_regular(path) as file:
            document = parse_toml(f"{path}", file.read(2**16 + 1))
    except OSError as error:
        raise Misconfigured(f"{path}: {error.strerror or error}") from None
    defaults, tables = document.pop("defaults", {}), document.pop("stage", {})
    for unknown in document:
        raise Misconfigured(f"{path}: {shown(unknown)}: unknown; accepted: [defaults] and [stage.NAME]")
    if not isinstance(tables, dict) or not tables:
        raise Misconfigured(f"{path}: no stage; expected a table [stage.NAME] for each")
    defaults = checked_table(f"{path}: [defaults]", defaults)
    scan = functools.cache(lambda name: scan_folder(data / name))
    stages = {}
    for name, table in tables.items():
        where = f"{path}: stage {name}"
        stages[name] = stage_from(where, name, defaults | checked_table(where, table) | (over or {}), scan)
    for stage in stages.values():
        check_parents(path, stage, stages)
    return stages


def parse_toml(where: str, content: bytes) -> dict[str, Any]:
    """Return what TOML says; raises Misconfigured."""
    try:
        text = content.decode("utf-8-sig")  # editors on Windows begin with a mark
        if len(content) > 2**16 or any(line.count(".") > 64 for line in text.splitlines()):
            raise ValueError("more than 64 KiB, or a line with more than 64 dots")  # which take the parser minutes
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise Misconfigured(f"{where}: not valid TOML: {' '.join(str(error).split())}") from None


def settings(pairs: list[str] | None, seed: int | None = None) -> dict[str, Any]:
    """Return the keys of all stages that the command line sets, by KEY=VALUE or --seed; raises Misconfigured."""
    table: dict[str, Any] = {}
    for pair in pairs or ():
        where = f"--set {shown(pair)}: expected KEY=VALUE as in a stages file, such as epochs=9 or 'network=\"ex\"'"
        table |= parse_toml(where, os.fsencode(pair))
    return checked_table("--set", table if seed is None else table | {"seed": seed})


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading; raises OSError for a pipe or a device, which might never end."""
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "not a file")
    return open(path, "rb")


def checked_table(where: str, table: Any) -> dict[str, Any]:
    """Check every key of a table and convert its values; raises Misconfigured."""
    if not isinstance(table, dict):
        raise Misconfigured(f"{where}: {shown(table)}: expected a table")
    parsed = {}
    for name, value in table.items():
        if name not in KEYS:
            raise Misconfigured(f"{where}: {shown(name)}: unknown key; accepted: {', '.join(KEYS)}")
        parsed[name] = KEYS[name].parse(value)
        if parsed[name] is None:
            raise unacceptable(where, name, value, KEYS[name].words())
    return parsed


NAME = r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}"  # of a stage


def stage_from(where: str, name: str, values: dict[str, Any], scan: Callable[[str], Dataset]) -> Stage:
    """Build a stage of checked values, and check what only the whole can tell; `scan` knows folders by name."""
    if not re.fullmatch(NAME, name):
        raise Misconfigured(f"{where}: a stage's name is made of up to 64 letters, digits, - and _")
    if "network" not in values:
        raise Misconfigured(f"{where}: network is missing; accepted: {', '.join(NETWORKS)}")
    stage = Stage(name, **values)
    if stage.dataset.startswith(FOLDER):
        try:
            stage = replace(stage, folder=scan(stage.dataset.removeprefix(FOLDER)))
        except Misconfigured as error:
            raise Misconfigured(f"{where}: dataset = {shown(stage.dataset)}: {error}") from None
    data, has, epochs = stage.data, f"what {stage.dataset} has", f"epochs = {stage.epochs}"
    most, scheduled = max(data.validation, data.test), isinstance(stage.lr, Schedule)
    for name, wrong, accepted in (
        ("side", not stage.folder and stage.side != SIDE, f"{SIDE}, which the images of {stage.dataset} have"),
        ("train_images", (stage.train_images or 0) > data.train, f"at most {data.train}, {has}"),
        ("test_images", (stage.test_images or 0) > most, f"at most {most}, {has}"),
        ("batch_size", stage.batch_size > stage.train_size, f"at most the {stage.train_size} training images"),
        ("prune_epochs", stage.prune_epochs > 1 and not stage.sparsity, "a sparsity above 0 with it"),
        ("prune_epochs", stage.prune_epochs > stage.epochs, f"at most {epochs}"),
        ("lr.warmup_epochs", scheduled and stage.lr.warmup_epochs >= stage.epochs, f"less than {epochs}"),
        ("lr", not scheduled and stage.lr[-1][0] < stage.epochs, f"rates up to the last epoch, {stage.epochs}"),
    ):
        if wrong:
            raise unacceptable(where, name, operator.attrgetter(name)(stage), accepted)
    return stage


def check_parents(path: Path, stage: Stage, stages: dict[str, Stage]) -> None:
    """Raise Misconfigured unless the stage's parents exist, do not come after it and fit it."""
    where = f"{path}: stage {stage.name}"
    for role, name in stage.parents.items():
        if is_path(name):  # `find_parent` looks at it when the stage is to train
            continue
        if name not in stages:
            others = ", ".join(other for other in stages if other != stage.name) or "there is none"
            raise unacceptable(where, role, name, f"another stage ({others}) or the path of a checkpoint")
        if cycle := way(stages, name, stage.name):
            raise unacceptable(where, role, name, f"no cycle, but it goes {' -> '.join([stage.name, *cycle])}")
        if different := differing(stage, stages[name], role):
            what, own, its = different
            more = " or more" if what == "sparsity" else ""
            raise unacceptable(where, what, own, f"that of its {role} {name}, {shown(its)}{more}")


def way(stages: dict[str, Stage], name: str, goal: str) -> tuple[str, ...]:
    """Return the names from one stage to another, each a parent of the one before it; empty if there is no such way."""
    ways, todo = {name: (name,)}, [name]
    for each in todo:  # which grows
        for parent in stages[each].parents.values():
            if parent in stages and parent not in ways:
                ways[parent] = (*ways[each], parent)
                todo.append(parent)
    return ways.get(goal, ())


def differing(stage: Stage, parent: Stage, role: str) -> tuple[str, Any, Any] | None:
    """Return what a stage and its parent must not differ in but do: what is seen, what the answer or a weight means."""
    keys = {"dataset": lambda s: s.folder or s.dataset, "side": lambda s: s.side, "scale": lambda s: s.scale}
    if stage.folder and parent.folder:
        keys["dataset"] = lambda s: s.folder.class_names
    if role == "start":
        keys |= {
            "network": lambda s: s.network,
            "width": lambda s: s.multipliers[0],
            "depth": lambda s: s.multipliers[1],
            "sparsity": lambda s: min(s.sparsity, parent.sparsity),  # a weight that is zero stays so
        }
    pairs = ((name, value(stage), value(parent)) for name, value in keys.items())
    return next((pair for pair in pairs if pair[1] != pair[2]), None)


def unacceptable(where: str, name: str, value: Any, accepted: str) -> Misconfigured:
    """Say what stands at a key and what is accepted there."""
    return Misconfigured(f"{where}: {name} = {shown(value)}: expected {accepted}")


def shown(value: Any) -> str:
    """Return a value as one short line of TOML (near enough)."""
    if isinstance(value, Dataset):
        return str(value)
    text = json.dumps(value, default=str, ensure_ascii=True)
    return text if len(text) <= 80 else text[:77] + "..."


def is_path(teacher: str) -> bool:
    """Tell a checkpoint's path from a stage's name."""
    return "/" in teacher or teacher.endswith(".safetensors")


def find_stage(stages: dict[str, Stage], name: str) -> Stage:
    """Return the stage of that name; raises Misconfigured."""
    if name not in stages:
        raise Misconfigured(f"{shown(name)}: no such stage; there are {', '.join(stages)} (or name --stages)")
    return stages[name]


def with_parents(
    stages: dict[str, Stage], names: Collection[str], parents: Callable[[Stage], dict[str, str]] = lambda s: s.parents
) -> list[Stage]:
    """Return the named stages and all that they need, each after its parents; raises Misconfigured."""
    order: dict[str, Stage] = {}
    begun: set[str] = set()  # a folder may hold a cycle

    def add(stage: Stage) -> None:
        if stage.name not in begun:
            begun.add(stage.name)
            for parent in parents(stage).values():
                if parent in stages:
                    add(stages[parent])
            order[stage.name] = stage

    for name in names:
        add(find_stage(stages, name))
    return list(order.values())


def learning_rate(stage: Stage, step: int) -> float:
    """Return the rate of optimiser step `step`, counted from 0 over the whole stage.

    Pairs: the rate of the first pair whose epoch is not over. Schedules, with w = warm-up steps and T = all steps:
        step < w:    peak * (step + 1) / w
        cosine:      peak * (1 + cos(pi * d)) / 2    with d = (step - w) / (T - w)              [8]
        one-cycle:   peak * (1 - d)                                                             [7]
    """
    if not isinstance(stage.lr, Schedule):
        return next(rate for last, rate in stage.lr if step < last * stage.steps_per_epoch)
    peak, warmup = stage.lr.peak, stage.lr.warmup_epochs * stage.steps_per_epoch
    if step < warmup:
        return peak * min(1.0, (step + 1) / warmup)
    done = (step - warmup) / (stage.epochs * stage.steps_per_epoch - warmup)
    return peak * (1 + math.cos(math.pi * done)) / 2 if stage.lr.schedule == "cosine" else peak * (1 - done)


def stream_seed(*what: Any) -> int:
    """Return the seed of the random stream that `what` names, as a 63-bit integer.

    Streams that differ in any part are independent, and none needs saving: a resumed run names it again.
    """
    return int.from_bytes(hashlib.sha256(repr(what).encode()).digest()[:8]) >> 1


# -------------------------------------------------------------------------------------------------------------- Data
# What is fed in: uint8 images that live on the training device, and the augmented views as batched tensor operations.

SIDE, SIDES = 32, range(32, 257, 32)  # pixels in height and width: of `DATASETS`, and what a folder may have

MEAN, STD = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))  # RGB in [0, 1]: CIFAR-10's, for all data as in [1]
LUMA = (0.2989, 0.587, 0.114)  # grey from RGB, ITU-R 601-2 as in torchvision


Part = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class Dataset:
    """How many images and classes there are. Without validation images every epoch is tested on the test images."""

    train: int
    test: int = field(compare=False)  # a stage goes on where images are added that none of its epochs is tested on
    classes: int
    validation: int = 0
    class_names: tuple[str, ...] = ()  # of a folder

    def __str__(self) -> str:
        names = ", ".join(self.class_names[:5]) + ", ..." * (self.classes > 5)
        parts = f"{self.train:,} to train on, {self.validation:,} for validation, {self.test:,} to test on"
        return f"{parts}, {self.classes:,} classes: {names}"


DATASETS = {
    "cifar100": Dataset(50_000, 10_000, 100),
    "cifar10": Dataset(50_000, 10_000, 10),
    "synthetic": Dataset(50_000, 10_000, 10),
}
FOLDER = "folder:"  # before the name of a folder of images
FOLDERS = {"train": ("train",), "validation": ("val", "validation"), "test": ("test",)}  # of its parts
LITTER = ("Thumbs.db", "desktop.ini")  # as is what begins with a dot: no image, whatever it is


def parse_dataset(value: Any) -> str | None:
    """Return the name of a data set, or of a folder of images, which is not a path."""
    sound = isinstance(value, str) and (value in DATASETS or re.fullmatch(FOLDER + r"[^./\\\0][^/\\\0]*", value))
    return value if sound else None


class Images(NamedTuple):
    """A data set in memory."""

    pixels: Tensor  # (N, 3, H, W) uint8, RGB
    labels: Tensor  # (N,) int64
    class_names: list[str]

    def to(self, device: torch.device) -> Images:
        if device.type == "cuda":
            check_memory(self.pixels.shape, torch.cuda.mem_get_info(device)[0])
        return Images(self.pixels.to(device), self.labels.to(device), self.class_names)

    def part(self, index: int, of: int) -> Images:
        return Images(self.pixels[index::of], self.labels[index::of], self.class_names)


def tested_at_once(
    pixels: Tensor,  # (N, 3, H, W)
) -> int:
    """Return how many images are tested at a time: 250, fewer where the first map is larger than that of 32 x 32."""
    return min(250, 1000 * SIDE**2 // pixels.shape[2:].numel())  # above SIDE the stem has a stride


Watch = Callable[[Collection[Any], str], Iterable[Any]]  # goes through something and shows how far it has come


def unwatched(items: Collection[Any], what: str) -> Iterable[Any]:
    return items


def load_images(stage: Stage, data: Path, part: Part, watch: Watch = unwatched) -> Images:
    """Return a part of a stage's images, on the CPU, from `data`; CIFAR is downloaded to there.

    Raises Refused where CIFAR can be neither found there, with its MD5 sums, nor downloaded, or a folder's images
    cannot be read; Misconfigured where that is none.
    """
    n = stage.train_size if part == "train" else stage.test_size
    if stage.dataset == "synthetic":
        return synthetic_images(n, part == "train")
    if stage.folder:
        return folder_images(stage, data / stage.dataset.removeprefix(FOLDER), part, watch)
    from torchvision.datasets.utils import check_integrity  # 1.5 s, which a synthetic stage need not wait for

    cifar, files = cifar_files(stage.dataset, data)
    try:
        try:
            dataset = cifar(data, train=part == "train")
        except RuntimeError:  # not there, or its MD5 does not match
            download(cifar, data)
            dataset = cifar(data, train=part == "train")
    except (RuntimeError, OSError) as error:
        bad = [path for path, md5 in files.items() if not check_integrity(path, md5)]
        wrong = ", ".join(f"{path.name} is {'damaged' if path.exists() else 'missing'}" for path in bad)
        raise Refused(
            f"{data / cifar.base_folder}: no {cifar.__name__} here that matches its MD5 sums ({wrong}), and the "
            f"download failed ({' '.join(str(error).split())}): put the official files there, or name --data"
        ) from None
    pixels = torch.from_numpy(dataset.data[:n]).permute(0, 3, 1, 2).contiguous()
    return Images(pixels, torch.tensor(dataset.targets[:n]), dataset.classes)


def cifar_files(name: str, data: Path) -> tuple[type, dict[Path, str]]:
    """Return torchvision's class of a data set and its files with their MD5 sums."""
    from torchvision import datasets

    cifar = getattr(datasets, name.upper())
    files = [*cifar.train_list, *cifar.test_list, (cifar.meta["filename"], cifar.meta["md5"])]
    return cifar, {data / cifar.base_folder / file: md5 for file, md5 in files}


def download(dataset: type, data: Path) -> None:
    """Have torchvision download a data set, unless another process has just done so; raises RuntimeError or OSError."""
    data.mkdir(parents=True, exist_ok=True)
    with open(data / ".download.lock", "w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)  # as long as another one downloads
        with suppress(RuntimeError):
            dataset(data)
            return
        print(f"downloading {dataset.__name__}, 170 MB, from {dataset.url} to {data}", file=sys.stderr, flush=True)
        bar = nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO())  # else some lines a second
        patience = socket.getdefaulttimeout()
        socket.setdefaulttimeout(30)  # seconds without a byte
        try:
            with bar:
                dataset(data, download=True)
        finally:
            socket.setdefaulttimeout(patience)
        print(f"{dataset.__name__} is in {data}", file=sys.stderr, flush=True)


def image_files(folder: Path, part: Part) -> dict[str, list[Path]]:
    """Return all files in the class folders of a part, but for litter, by class and sorted by that."""

    def fail(error: OSError) -> None:
        raise error

    files: dict[str, list[Path]] = {}
    for top in (folder / name for name in FOLDERS[part]):
        for path in sorted(top.iterdir()) if top.is_dir() else ():
            if (path.is_dir() or path.is_symlink()) and path.name[0] != ".":  # a broken link is an error
                found = files.setdefault(unicodedata.normalize("NFC", path.name), [])
                for at, folders, names in os.walk(path, onerror=fail):
                    folders[:] = [name for name in folders if name[0] != "."]
                    names += [name for name in folders if os.path.islink(os.path.join(at, name))]  # no image: said so
                    found += [Path(at, name) for name in names if name[0] != "." and name not in LITTER]
    return dict(sorted(files.items()))


def folder_files(folder: Path) -> dict[Part, dict[str, list[Path]]]:
    """Return the images in `folder`/train/CLASS/** and `folder`/test/CLASS/**, and in val or validation beside them.

    By part and class. Raises Misconfigured unless all parts have the same two or more classes.
    """
    parts = {part: image_files(folder, part) for part in FOLDERS}
    if not parts["validation"]:
        del parts["validation"]
    names = sorted(set().union(*parts.values()))
    if not folder.is_dir():
        raise Misconfigured(f"{folder}: no such folder: expected images in train/CLASS/ and test/CLASS/ there")
    for name in names:
        if not name.isprintable():
            raise Misconfigured(f"{folder}: class {shown(name)}: expected a name that can be printed")
        for part, files in parts.items():
            if not files.get(name):
                raise Misconfigured(f"{folder}: class {name} has no images in {part}/: expected some in every part")
    if len(names) < 2:
        raise Misconfigured(
            f"{folder}: {count(len(names), 'class')} in train/CLASS/ and test/CLASS/: expected two or more"
        )
    return parts


def scan_folder(folder: Path) -> Dataset:
    """Count the images of a folder; raises as `folder_files` does."""
    parts = folder_files(folder)
    sizes = {part: sum(map(len, files.values())) for part, files in parts.items()}
    return Dataset(classes=len(parts["train"]), class_names=tuple(parts["train"]), **sizes)


def folder_images(stage: Stage, folder: Path, part: Part, watch: Watch) -> Images:
    """Return a part of a folder's images in an order that mixes classes and is the same on every file system."""
    parts = folder_files(folder)
    classes = parts.get(part, parts["test"])
    if tuple(classes) != stage.folder.class_names:
        names, wanted = ", ".join(classes), ", ".join(stage.folder.class_names)
        raise Refused(f"{folder}: its classes are {names}: expected those of the stage, {wanted}; name --data")

    def place(file: tuple[Path, int]) -> tuple[int, Path]:
        return stream_seed(unicodedata.normalize("NFC", "/".join(file[0].relative_to(folder).parts[1:]))), file[0]

    labelled = enumerate(classes.values())
    files = sorted(((path, label) for label, paths in labelled for path in paths), key=place)
    files = files[: stage.train_images if part == "train" else stage.test_images]
    pixels = read_images([path for path, _ in files], stage.side, watch)
    return Images(pixels, torch.tensor([label for _, label in files]), list(classes))


def read_images(paths: list[Path], side: int, watch: Watch = unwatched) -> Tensor:  # (N, 3, side, side) uint8, RGB
    """Decode images in threads, each as `read_image` does; raises Refused where some cannot be read or do not fit."""
    from concurrent.futures import ThreadPoolExecutor

    shape = torch.Size((len(paths), 3, side, side))
    check_memory(shape, 1024 * int(re.search(r"MemAvailable: *(\d+)", Path("/proc/meminfo").read_text())[1]))
    pixels, wrong = torch.empty(shape, dtype=torch.uint8), []
    with warnings.catch_warnings(action="ignore"), ThreadPoolExecutor(usable_cores()) as pool:  # of odd metadata, size
        try:
            read = pool.map(functools.partial(read_image, side=side), paths)
            for row, path, image in zip(pixels, watch(paths, "reading images"), read):
                if isinstance(image, Tensor):
                    row.copy_(image)
                else:
                    wrong.append(f"{path}: {image}")
        finally:
            pool.shutdown(cancel_futures=True)  # else a signal would wait for all of them
    if wrong:
        raise Refused(f"{len(wrong):,} of {count(len(paths), 'image')} cannot be read: {'; '.join(wrong[:3])}")
    return pixels


def read_image(path: Path, side: int) -> Tensor | str:  # (3, side, side) uint8, RGB
    """Return the middle square of an image, resized with antialiasing, or why it cannot be had.

    It is turned as its EXIF data say; what is transparent is laid over white; a colour profile is not looked at.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with open_regular(path) as file, Image.open(file) as image:
            if image.mode.startswith(("I", "F")) or any(";16" in str(tile.args) for tile in image.tile):
                return "more than 8 bits a channel"
            image.draft(image.mode, (2 * side, 2 * side))  # a large JPEG is decoded at a fraction of its size
            image = ImageOps.exif_transpose(image)
            if "A" in image.getbands() or "transparency" in image.info:
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
            square = ImageOps.fit(image.convert("RGB"), (side, side), Image.Resampling.BICUBIC)
            return torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8).view(side, side, 3).permute(2, 0, 1)
    except UnidentifiedImageError:
        return "no image, or of a kind that is not known here"
    except Exception as error:  # every decoder has its own
        return " ".join(f"{getattr(error, 'strerror', None) or error}".split()) or type(error).__name__


def check_memory(shape: torch.Size, free: int) -> None:
    """Raise Refused unless so many images fit into `free` bytes."""
    if shape.numel() > free:
        n, _, *sides = shape
        words = f"{count(n, 'image')} of {' x '.join(map(str, sides))} pixels take {shape.numel() / 2**20:,.0f} MiB"
        raise Refused(f"{words}, {free / 2**20:,.0f} MiB of memory are free: lower side or take fewer")


# Shapes by u and v, the coordinates from a shape's centre in units of its half size, each its own mirror image.
SHAPES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "disc": lambda u, v: u**2 + v**2 < 0.9,
    "ring": lambda u, v: (u**2 + v**2 < 1) & (u**2 + v**2 > 0.4),
    "square": lambda u, v: torch.maximum(u.abs(), v.abs()) < 0.85,
    "frame": lambda u, v: (torch.maximum(u.abs(), v.abs()) < 0.9) & (torch.maximum(u.abs(), v.abs()) > 0.55),
    "plus": lambda u, v: (torch.minimum(u.abs(), v.abs()) < 0.25) & (torch.maximum(u.abs(), v.abs()) < 1),
    "saltire": lambda u, v: (u.abs() - v.abs()).abs().lt(0.3) & (torch.maximum(u.abs(), v.abs()) < 1),
    "diamond": lambda u, v: u.abs() + v.abs() < 1,
    "rows": lambda u, v: (torch.maximum(u.abs(), v.abs()) < 1) & (torch.cos(2.5 * math.pi * v) > 0),
    "columns": lambda u, v: (torch.maximum(u.abs(), v.abs()) < 1) & (torch.cos(2.5 * math.pi * u) > 0),
    "triangle": lambda u, v: (v.abs() < 0.85) & (u.abs() < (v + 0.85) / 1.7),
}


def synthetic_images(n: int, train: bool) -> Images:
    """Draw `n` images of ten shapes: any place, size and colours, on a noisy ground. Always the same ones.

    Image i does not depend on n. Every shape is its own mirror image, so that a flip keeps the label.
    """
    chunk = 1000
    pixels, labels = [], []
    for start in range(0, n, chunk):
        generator = torch.Generator().manual_seed(stream_seed("synthetic", train, start))
        uniform = functools.partial(torch.rand, generator=generator)
        label = torch.arange(chunk) % len(SHAPES)
        half = 5 + 8 * uniform(chunk, 1, 1)  # half the shape's size, in pixels
        x0, y0 = (half + (SIDE - 1 - 2 * half) * uniform(chunk, 1, 1) for _ in "xy")
        v = (torch.arange(SIDE)[:, None] - y0) / half  # (N, H, 1)
        u = (torch.arange(SIDE)[None, :] - x0) / half  # (N, 1, W)
        u, v = u.expand(chunk, SIDE, SIDE), v.expand(chunk, SIDE, SIDE)
        inside = torch.empty(chunk, SIDE, SIDE, dtype=torch.bool)
        for k, shape in enumerate(SHAPES.values()):
            inside[label == k] = shape(u[label == k], v[label == k])
        ground, contrast = uniform(chunk, 3, 1, 1), uniform(chunk, 3, 1, 1) - 0.5
        figure = ground + contrast + 0.25 * contrast.sign()  # at least 0.25 away from the ground in every channel
        image = torch.where(inside[:, None], figure, ground) + 0.4 * (uniform(chunk, 3, SIDE, SIDE) - 0.5)
        pixels.append((image.clamp(0, 1) * 255).round().to(torch.uint8))
        labels.append(label)
    return Images(torch.cat(pixels)[:n], torch.cat(labels)[:n], list(SHAPES))


def random_images(stage: Stage, n: int) -> Images:
    """Return `n` images and labels that mean nothing, of the stage's kind."""
    drawn = functools.partial(torch.randint, generator=torch.Generator().manual_seed(0))
    return Images(drawn(256, (n, 3, stage.side, stage.side), dtype=torch.uint8), drawn(stage.classes, (n,)), [])


def images_at_hand(about: Metadata, data: Path, watch: Watch) -> tuple[Images, str]:
    """Return the images that a network's epochs were tested on, else others or random ones, and which they are."""
    stage = about.stage
    if stage.folder:
        here = (data / stage.dataset.removeprefix(FOLDER)).is_dir()
    else:
        here = stage.dataset == "synthetic" or all(path.exists() for path in cifar_files(stage.dataset, data)[1])
    if here:
        images = load_images(stage, data, stage.tested_on, watch)
        same = about.images is None or about.images.get(stage.tested_on) == images_digest(images)
        return images, f"{stage.tested_on} images" if same else "other images"
    return random_images(stage, 1000), "random images"


class View(NamedTuple):
    """The distributions that a view draws its random parameters from, as in torchvision's operators of that name."""

    jitter: float  # ColorJitter(brightness, contrast)
    area: tuple[float, float]  # RandomResizedCrop(scale), of the image's area
    aspect: tuple[float, float]  # RandomResizedCrop(ratio), width / height


VIEWS = {  # every view flips half of its images
    "jitter": View(0.2, (1.0, 1.0), (1.0, 1.0)),
    "jitter-crop": View(0.4, (0.3, 1.0), (0.8, 1.2)),
    "crop": View(0.0, (0.08, 1.0), (3 / 4, 4 / 3)),
}


class Augmentation(NamedTuple):
    """Which image is seen, and how: all tensors have the same shape, one element a sample."""

    image: Tensor  # index into the training set
    brightness: Tensor  # factor, 1 for none
    contrast: Tensor  # factor, 1 for none
    top: Tensor  # of the crop, in pixels, as are the next three
    left: Tensor
    height: Tensor
    width: Tensor
    flip: Tensor  # bool: mirror left and right

    def each(self, change: Callable[[Tensor], Tensor]) -> Augmentation:
        return Augmentation(*map(change, self))


def plan_epoch(stage: Stage, epoch: int) -> Augmentation:
    """Draw all samples of an epoch at once, on the CPU: tensors of shape (steps, batch_size).

    The plan is a function of seed, stage and epoch, so every process knows the whole of it, takes its share, and one
    process or two see the same batches. The last batch is filled up from the start of the order, as in torch's
    DistributedSampler, so that all batches have one shape.
    """
    generator = torch.Generator().manual_seed(stream_seed(stage.seed, stage.name, epoch))
    size, samples = stage.train_size, stage.steps_per_epoch * stage.batch_size
    order = torch.randperm(size * len(stage.views), generator=generator)
    order = torch.cat([order, order[: samples - len(order)]])
    view = order // size
    uniform = functools.partial(torch.rand, generator=generator)

    views = [VIEWS[name] for name in stage.views]
    jitter = torch.tensor([v.jitter for v in views])[view]
    brightness, contrast = (1 + jitter * (2 * uniform(samples) - 1) for _ in range(2))
    area = torch.tensor([v.area for v in views])[view]
    log_aspect = torch.tensor([v.aspect for v in views]).log()[view]
    box = random_boxes(area, log_aspect, uniform, stage.side)
    flip = uniform(samples) < 0.5
    plan = Augmentation(order % size, brightness, contrast, *box, flip)
    return plan.each(lambda t: t.view(stage.steps_per_epoch, stage.batch_size))


def random_boxes(
    area: Tensor,  # (N, 2) least and greatest share of the image
    log_aspect: Tensor,  # (N, 2) least and greatest log(width / height)
    uniform: Callable[..., Tensor],
    side: int,  # of the images
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # top, left, height, width: each (N,), whole pixels
    """Draw crops as torchvision's RandomResizedCrop does: the first of ten tries that fits, else the whole image."""
    n, tries = len(area), 10
    tried_area = side**2 * torch.lerp(area[:, :1], area[:, 1:], uniform(n, tries))
    tried_aspect = torch.lerp(log_aspect[:, :1], log_aspect[:, 1:], uniform(n, tries)).exp()
    width, height = (tried_area * tried_aspect).sqrt().round(), (tried_area / tried_aspect).sqrt().round()
    fits = (width > 0) & (width <= side) & (height > 0) & (height <= side)
    first = fits.int().argmax(1, keepdim=True)  # 0 where none fits
    width, height = (torch.where(fits, length, side).gather(1, first).squeeze(1) for length in (width, height))
    top, left = ((uniform(n) * (side - length + 1)).floor() for length in (height, width))
    return top, left, height, width


def augment(
    pixels: Tensor,  # (N, 3, H, W) uint8
    how: Augmentation,  # of (N,)
) -> Tensor:  # (N, 3, H, W) float32, normalised, channels_last
    """Augment each image with parameters of its own: brightness, contrast, crop and bilinear resize, flip."""
    brightness, contrast = (factor.view(-1, 1, 1, 1) for factor in (how.brightness, how.contrast))
    images = (pixels.float() / 255 * brightness).clamp(0, 1)  # blended with black
    grey = (images * per_channel(LUMA, images.device)).sum(1, keepdim=True).mean((2, 3), keepdim=True)
    # differs from torchvision's ColorJitter: contrast always after brightness, never before. The two commute but for
    # values that saturate in between.
    images = (contrast * images + (1 - contrast) * grey).clamp(0, 1)
    height, width = images.shape[2:]
    rows = resampling_weights(how.top, how.height, height)
    columns = resampling_weights(how.left, how.width, width)
    columns = torch.where(how.flip.view(-1, 1, 1), columns.flip(1), columns)
    return normalize(rows[:, None] @ images @ columns[:, None].mT)  # rows and columns are resampled apart


def resampling_weights(
    start: Tensor,  # (N,) first pixel of the crop
    length: Tensor,  # (N,) pixels of the crop
    side: int,  # of the image
) -> Tensor:  # (N, side out, side in)
    """Return what each output pixel takes of each input pixel when the crop is stretched to the whole."""
    grid = torch.arange(side, device=start.device, dtype=torch.float32)
    start, length = start[:, None], length[:, None]
    source = ((grid + 0.5) * (length / side) - 0.5).clamp(min=0)  # (N, side out), from the crop's first pixel centre
    source = start + torch.minimum(source, length - 1)
    return (1 - (source[..., None] - grid).abs()).clamp(min=0)


def normalize(images: Tensor) -> Tensor:
    """Shift and scale RGB values in [0, 1] (N, 3, H, W) to mean 0 and variance 1, over CIFAR-10; channels_last."""
    mean, std = per_channel(MEAN, images.device), per_channel(STD, images.device)
    return ((images - mean) / std).contiguous(memory_format=torch.channels_last)


@functools.cache
def per_channel(values: tuple[float, float, float], device: torch.device) -> Tensor:  # (3, 1, 1)
    """Return a value a channel on a device, copied there once: every copy from the host makes it wait."""
    return torch.tensor(values, device=device).view(3, 1, 1)


# ---------------------------------------------------------------------------------------------------------- Networks
# EfficientNet [4] with a cosine classifier [1, 3], at 32 x 32 with fewer strides.


FAMILY = "efficientnet_"
NETWORKS = {  # multipliers of channels and of repeats
    "efficientnet_b0": (1.0, 1.0),
    "efficientnet_b3": (1.2, 1.4),
    "efficientnet_ex": (0.8, 0.8),
    "efficientnet_exx": (0.8, 0.7),
}
ALWAYS, NEVER = 0, max(SIDES)
BLOCKS = [  # expansion, channels, repeats, side of the images above which the first one has a stride of 2, kernel
    (1, 16, 1, NEVER, 3),
    (6, 24, 2, 64, 3),
    (6, 40, 2, ALWAYS, 5),
    (6, 80, 3, 128, 3),
    (6, 112, 3, NEVER, 5),
    (6, 192, 4, ALWAYS, 5),
    (6, 320, 1, NEVER, 3),
]  # [4, table 1], whose strides, the stem's first, come back as images grow: the last map has 8 x 8 values or less
STEM, HEAD, EMBEDDING = 32, 1280, 200  # channels, channels, dimensions


def find_network(name: Any) -> str | None:
    """Return the whole name of one of `NETWORKS`, by itself or without its family's."""
    return next((full for full in NETWORKS if name in (full, short(full))), None)


def short(network: str) -> str:
    """Return a network's name without its family's."""
    return network.removeprefix(FAMILY)


def scaled_channels(channels: int, width: float) -> int:
    """Scale a channel count to a multiple of 8, at most 10 % down [4]."""
    scaled = max(8, int(channels * width + 4) // 8 * 8)
    return scaled if scaled >= 0.9 * channels * width else scaled + 8


class Conv2dSame(nn.Conv2d):
    """A "same" convolution without bias; a stride of 2 pads as TensorFlow does, the smaller half first."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W) to (N, C', H / stride, W / stride)
        weight, stride, padding = self.weight, self.stride[0], self.padding
        if x.device.type == "cpu" and not torch.compiler.is_exporting():
            trained = torch.is_grad_enabled() and weight.requires_grad and not torch.is_autocast_enabled("cpu")
            if trained and self.kernel_size[1] == 5 and self.groups == self.out_channels and self.bias is None:
                return WideDepthwise.apply(x, weight, stride)
            weight = centred(weight, stride)
        elif stride > 1:
            x, padding = F.pad(x, same_padding(self.kernel_size[0], stride) * 2), 0
        return F.conv2d(x, weight, self.bias, stride, padding, groups=self.groups)


def same_padding(kernel: int, stride: int) -> tuple[int, int]:  # before the first and after the last value
    return (kernel - stride) // 2, (kernel - stride + 1) // 2


def centred(weight: Tensor, stride: int) -> Tensor:
    """Begin a kernel with zeros such that its padding is the same on all sides: no padded copy of the maps is made."""
    return F.pad(weight, (1, 0, 1, 0)) if stride > 1 else weight


class WideDepthwise(Function):
    """A depthwise "same" convolution with 5 x 5 weights, on a CPU.

    oneDNN is slow at the gradient of such weights and fast at that of 5 x 3: this one is put together of two. The maps
    are padded once for both: two zeros before a row are the ones after the row above it, and a shifted copy is a view.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride = stride
        return F.conv2d(x, centred(weight, stride), None, stride, 2, groups=len(weight))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        (n, channels, height, width), stride = x.shape, ctx.stride
        first, last = same_padding(5, stride)
        grad = grad.contiguous(memory_format=torch.channels_last)
        shape = n, height + first + last, width + 2, channels
        values = x.new_zeros(math.prod(shape) + 3 * channels)  # as far as the last view is shifted
        rows = values[: math.prod(shape)].view(shape).permute(0, 3, 1, 2)
        rows[:, :, first : first + height, 2:] = x

        def gradients(x: Tensor, weight: Tensor, padding: int, mask: list[bool]) -> tuple[Tensor, ...]:
            how = [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], len(weight)  # not dilated, not transposed
            return torch.ops.aten.convolution_backward(grad, x, weight, None, *how, mask)

        def columns(start: int) -> Tensor:  # the gradient of three columns of the weight
            # at a stride of 2 a view may end with the next row's first value: no window reads it
            seen = *rows.shape[:3], width + 2 - width % stride
            part = values.as_strided(seen, rows.stride(), (2 - first + start) * channels)
            return gradients(part, weight[..., start : start + 3], 0, [False, True, False])[1]

        own = torch.cat([columns(0), columns(2)[..., 1:]], 3)
        return gradients(x, centred(weight, stride), 2, [True, False, False])[0], own, None


class GlobalAverage(nn.AdaptiveAvgPool2d):
    """The mean of each channel. In training its gradient stays one value a channel until it meets another: a pass less.

    In evaluation it is one operator, which exports as one.
    """

    def __init__(self) -> None:
        super().__init__(1)

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W) to (N, C, 1, 1)
        return x.sum((2, 3), keepdim=True) / x.shape[2:].numel() if self.training else x.mean((2, 3), keepdim=True)


def batch_norm(channels: int) -> nn.Module:
    return nn.BatchNorm2d(channels, eps=1e-5, momentum=0.01)


class SqueezeExcitation(nn.Sequential):
    """Scale each channel by a gate that all channels' means decide [5]; `inplace`, as torch's activations, if asked."""

    inplace = False

    def __init__(self, channels: int, squeezed: int) -> None:
        squeeze, excite = nn.Conv2d(channels, squeezed, 1), nn.Conv2d(squeezed, channels, 1)
        super().__init__(GlobalAverage(), squeeze, nn.SiLU(), excite, nn.Sigmoid())

    def gates(self, x: Tensor) -> Tensor:  # (N, C, H, W) to (N, C, 1, 1)
        return super().forward(x)

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W) to the same
        return x.mul_(self.gates(x)) if self.inplace else x * self.gates(x)


def project_gated(x: Tensor, gates: Tensor, layer: nn.Conv2d) -> Tensor:  # (N, C, H, W) to (N, C', H, W)
    """Return a 1 x 1 convolution of x * gates, with the gates in its weights: a product of matrices for each image.

    In float32 on a CPU forward and backward pass take 0.5 to 1.1 of the time of gated maps and their convolution where
    8 C' <= H W, and no gated maps are kept; with more weights they take 0.8 to 1.5 of it. Hooks are not called.
    """
    n, channels, *size = x.shape
    weights = gates.view(n, channels, 1) * layer.weight.flatten(1).T  # (N, C, C')
    maps = x.permute(0, 2, 3, 1).reshape(n, math.prod(size), channels)
    return torch.baddbmm(layer.bias.expand(n, 1, -1), maps, weights).mT.unflatten(2, size)


class MBConv(nn.Module):
    """The inverted residual block of EfficientNet: expansion, depthwise, gate, projection, skip [4].

    Stochastic depth [6] leaves the block out with probability `drop`, for each image, where there is a skip.
    """

    def __init__(self, inputs: int, outputs: int, expansion: int, kernel: int, stride: int, drop: float) -> None:
        super().__init__()
        hidden = inputs * expansion
        layers: list[nn.Module] = []
        if expansion != 1:
            layers += [Conv2dSame(inputs, hidden, 1), batch_norm(hidden), nn.SiLU()]
        layers += [Conv2dSame(hidden, hidden, kernel, stride, hidden), batch_norm(hidden), nn.SiLU()]
        layers += [SqueezeExcitation(hidden, max(1, inputs // 4))]
        # differs from [4]: the projection has a bias [1]. Batch norm cancels it, but it is stored and counted.
        layers += [nn.Conv2d(hidden, outputs, 1), batch_norm(outputs)]
        self.has_skip = stride == 1 and inputs == outputs
        if self.has_skip and drop > 0:
            from torchvision.ops import StochasticDepth  # 1.5 s, which networks without it need not wait for

            layers += [StochasticDepth(drop, "row")]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W) to (N, C', H / stride, W / stride)
        y = self.train_forward(x) if self.training and x.device.type == "cpu" else self.layers(x)
        return x + y if self.has_skip else y

    def train_forward(self, x: Tensor) -> Tensor:
        """Run `layers`, with the gates in the projection's weights where that is faster, see `project_gated`."""
        layers = iter(self.layers)
        for layer in layers:
            if isinstance(layer, SqueezeExcitation):
                project = next(layers)
                few = 8 * project.out_channels <= x.shape[2:].numel()
                x = project_gated(x, layer.gates(x), project) if few else project(layer(x))
            else:
                x = layer(x)
        return x


class Cosine(nn.Module):
    """The cosine of the angle between an embedding and each class's direction [3].

    cosines = x / |x| @ kernel / |kernel| (by column), in float32 whatever the precision around it.
    """

    def __init__(self, dimensions: int, classes: int) -> None:
        super().__init__()
        self.kernel = nn.Parameter(F.normalize(torch.rand(dimensions, classes) * 2 - 1, dim=0))  # (D, K)

    def forward(self, x: Tensor) -> Tensor:  # (N, D) to (N, K) in [-1, 1]
        with torch.autocast(x.device.type, enabled=False):  # bfloat16 would round a cosine to 8 bits
            return (F.normalize(x.float()) @ F.normalize(self.kernel.float(), dim=0)).clamp(-1, 1)


class Classifier(nn.Linear):
    """Embedding and `Cosine` folded into one layer, in float32 as that is: (N, C) to (N, K)."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.weight.float(), self.bias.float())


class EfficientNet(nn.Sequential):
    """Normalised images (N, 3, side, side) to cosines (N, K), or what stands for them if the classifier is folded."""

    def __init__(self, stage: Stage, stochastic_depth: float) -> None:
        super().__init__()
        (width, depth), side = stage.multipliers, stage.side
        self.side, stride = side, 1 + (side > SIDE)
        channels, head, last = scaled_channels(STEM, width), scaled_channels(HEAD, width), side // stride
        self.stem = nn.Sequential(Conv2dSame(3, channels, 3, stride), batch_norm(channels), nn.SiLU())
        self.blocks = nn.Sequential()
        for expansion, base, repeats, above, kernel in BLOCKS:
            outputs, stride = scaled_channels(base, width), 1 + (side > above)
            for repeat in range(math.ceil(repeats * depth)):
                self.blocks.append(MBConv(channels, outputs, expansion, kernel, stride, stochastic_depth))
                channels, last, stride = outputs, last // stride, 1
        self.head = nn.Sequential(Conv2dSame(channels, head, 1), batch_norm(head), nn.SiLU())
        self.pool, self.flatten = nn.AvgPool2d(last), nn.Flatten()
        self.embedding, self.cosine = nn.Linear(head, EMBEDDING), Cosine(EMBEDDING, stage.classes)
        self.apply(initialize)


def initialize(module: nn.Module) -> None:
    """Set a module's initial weights as the method does [1]; batch norm and `Cosine` have theirs already."""
    if isinstance(module, nn.Conv2d):
        kernel, outputs = math.prod(module.kernel_size), module.out_channels
        nn.init.normal_(module.weight, std=math.sqrt(2 / (kernel * outputs)))
    elif isinstance(module, nn.Linear):
        bound = 1 / math.sqrt(module.out_features)
        nn.init.uniform_(module.weight, -bound, bound)
    if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


def build_network(stage: Stage, stochastic_depth: float = 0.0) -> EfficientNet:
    """Build the network that a stage trains, with fresh weights, channels_last, in training mode."""
    network = EfficientNet(stage, stochastic_depth).to(memory_format=torch.channels_last)
    return fold_classifier(network) if stage.sparsity else network


def fold_batch_norms(network: nn.Module) -> nn.Module:
    """Put every batch norm that follows a convolution into it: the same function in evaluation mode. Changes `network`.

    w' = w * scale / sqrt(variance + eps),  b' = (b - mean) * scale / sqrt(variance + eps) + shift
    """
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    for parent in [module for module in network.eval().modules() if isinstance(module, nn.Sequential)]:
        for (first, convolution), (second, norm) in itertools.pairwise(parent.named_children()):
            if isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(parent, first, fuse_conv_bn_eval(convolution, norm))
                setattr(parent, second, nn.Identity())
    return network


def fold_network(network: EfficientNet) -> EfficientNet:
    """Fold batch norms, and embedding, L2 norm and cosine kernel into one linear layer. Changes `network`.

    (W x + b) / |W x + b| @ K, with K's columns normalised, has its largest value where K^T W x + K^T b has: a positive
    factor moves no maximum. What the folded network returns are not cosines, but the same predictions.
    """
    return fold_classifier(fold_batch_norms(network))


def fold_classifier(network: EfficientNet, length: float = 1.0) -> EfficientNet:
    """Fold embedding, L2 norm and cosine kernel into one linear layer, if they are not. Changes `network`.

    What it returns are cosines where the embedding has that `length`.
    """
    if isinstance(network.cosine, Cosine):
        weight, kernel = network.embedding.weight, F.normalize(network.cosine.kernel, dim=0) / length
        linear = Classifier(weight.shape[1], kernel.shape[1], dtype=weight.dtype)
        linear.weight.data, linear.bias.data = kernel.T @ weight, kernel.T @ network.embedding.bias
        network.embedding, network.cosine = linear, nn.Identity()
    return network


# ------------------------------------------------------------------------------------------------------------ Losses


def margin_loss(
    cosines: Tensor,  # (N, K) in [-1, 1]
    labels: Tensor,  # (N,) int64
    scale: float,
    margin: float,
) -> Tensor:  # ()
    """Return the additive-margin softmax loss, the mean over the batch [3, eq. 5].

    -log( e^(s (cos_y - m)) / (e^(s (cos_y - m)) + sum over j != y of e^(s cos_j)) )
    """
    penalty = margin * F.one_hot(labels, cosines.shape[1])
    return F.cross_entropy(scale * (cosines - penalty), labels)


def refined_loss(
    cosines: Tensor,  # (N, K) of the student
    teacher_cosines: Tensor,  # (N, K) of the teacher, for the same crops
    scale: float,
) -> Tensor:  # ()
    """Return the cross-entropy of the student against the teacher's refined labels, the mean over the batch [2].

    - sum over j of softmax(s cos_teacher)_j * log softmax(s cos_student)_j
    """
    return F.cross_entropy(scale * cosines, (scale * teacher_cosines).softmax(1))


# -------------------------------------------------------------------------------------------------------------- Cost
# What a network costs, measured by walking it layer by layer as it runs: as the method's authors counted [1], and by
# the rules of the challenge [9].

BASELINE_PARAMS, BASELINE_OPS = 36.5e6, 10.49e9  # WideResNet-28-10 [9]


class Entry(NamedTuple):
    """A row of the challenge's board, CIFAR-100."""

    name: str
    score: float
    top1: float  # percent
    how: str


BOARD = [  # [9]
    Entry("RIAIR", 0.0044, 80.39, "DenseNet-BC-100, 75 % pruned, 4-bit weights and activations, distilled"),
    Entry("KAIST", 0.0054, 80.07, "0.46 M MobileNetV3-like network, 60 % pruned, 16-bit, CutMix"),
    Entry("OSI", 0.0058, 80.04, "searched EfficientNet, 64 % pruned, early exit"),
    Entry("MSUNet v3", 0.0108, 80.13, "MixNet-like, ternary"),
    Entry("authors' exx [1]", 0.1114, 80.14, "their own count at 32 bits; 0.0668 at 16; not verified"),
    Entry("authors' ex [1]", 0.1254, 80.12, "their own count at 32 bits; 0.0748 at 16; not verified"),
]


def micronet_score(stored_bytes: float, ops: float) -> float:
    """Return the score [9] of what stores some bytes and takes some operations of 32 bits an image."""
    return stored_bytes / 4 / BASELINE_PARAMS + ops / BASELINE_OPS


class Cost(NamedTuple):
    """What a network or a layer costs for one image."""

    params: int  # values that are stored
    flops: int  # multiply-accumulates; by the seed's rules as the authors print them
    mults: int
    adds: int
    mask_bits: int = 0  # where the values of sparse tensors stand: a bit for each position

    @property
    def ops(self) -> float:
        """Operations when a multiplication of 16-bit values counts half."""
        return 0.5 * self.mults + self.adds

    @property
    def ops_32bit(self) -> int:
        return self.mults + self.adds

    @property
    def bytes(self) -> float:
        """What the score takes a network of 16-bit values to need."""
        return 2 * self.params + self.mask_bits / 8

    @property
    def score(self) -> float:
        """MicroNet score at 16 bits, which are free to all who quantise nothing further [9].

        (params / 2 + mask_bits / 32) / 36.5 M + (mults / 2 + adds) / 10.49 G
        """
        return micronet_score(self.bytes, self.ops)

    @property
    def score_32bit(self) -> float:
        return micronet_score(4 * self.params + self.mask_bits / 8, self.ops_32bit)


class EightBitCost(NamedTuple):
    """What a network or a layer with weights and activations of 8 bits costs for one image."""

    params: int  # weights and biases
    flops: int
    mults: int
    adds: int
    mask_bits: int
    bytes: float  # all that is stored
    ops: float  # of 32 bits; one of 8 bits is a quarter of it
    ops_narrow: float  # with sums as wide as they have to be, in place of 32 bits

    @property
    def score(self) -> float:
        return micronet_score(self.bytes, self.ops)

    @property
    def score_narrow(self) -> float:
        return micronet_score(self.bytes, self.ops_narrow)


class Operation(NamedTuple):
    """A module or a function that a network runs on one image."""

    layer: str
    what: nn.Module | Callable[..., Tensor]
    inputs: int  # elements of its first input
    outputs: int  # elements
    folded: bool  # a convolution with the batch norm that alone follows it, or that batch norm
    again: bool  # a module that has run before: its parameters are counted already


def operations(network: nn.Module) -> list[Operation]:
    """Walk a network, in evaluation mode, as it runs on an image; raises TypeError at a parameter outside modules."""
    from torch.fx import GraphModule, Tracer
    from torch.fx.passes.shape_prop import ShapeProp

    tracer = Tracer()
    tracer.is_leaf_module = lambda module, name: not list(module.children())
    graph = tracer.trace(network.eval())
    side = getattr(network, "side", SIDE)
    image = next(network.parameters()).new_zeros(1, 3, side, side)
    with torch.no_grad():
        ShapeProp(GraphModule(network, graph)).propagate(image)
    found: list[Operation] = []
    for node in graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        if node.op == "get_attr":
            raise TypeError(f"no rule to count {node.target} outside a module")
        what = network.get_submodule(node.target) if node.op == "call_module" else node.target
        sizes = [n.meta["tensor_meta"].shape.numel() for n in (node.args[0], node)]
        layer = node.target if node.op == "call_module" else node.name
        again = any(operation.what is what for operation in found)
        found.append(Operation(layer, what, *sizes, is_folded(network, node), again))
    return found


def is_folded(network: nn.Module, node: Any) -> bool:
    """Tell whether a node of a graph is a convolution whose only reader is a batch norm, or such a batch norm."""

    def is_a(node: Any, kind: type) -> bool:
        return node.op == "call_module" and isinstance(network.get_submodule(node.target), kind)

    norm = node if is_a(node, nn.BatchNorm2d) else next(iter(node.users))
    convolution = norm.args[0]
    return is_a(norm, nn.BatchNorm2d) and is_a(convolution, nn.Conv2d) and len(convolution.users) == 1


def count_by_seed(operation: Operation) -> Cost:
    """Count by the authors' rules [1]: modules alone, batch norm and all. Raises TypeError where there is no rule."""
    what, x, n = operation.what, operation.inputs, operation.outputs  # elements in and out
    params = 0 if operation.again or not isinstance(what, nn.Module) else sum(p.numel() for p in what.parameters())
    match what:
        case nn.Conv2d():
            k, bias = what.weight[0].numel(), int(what.bias is not None)
            return Cost(params, n * (k + bias), n * k, n * (k - 1 + bias))
        case nn.BatchNorm2d():
            return Cost(params, 2 * n, 2 * n, 2 * n)
        case nn.AvgPool2d():
            return Cost(params, x, 0, x)
        case nn.AdaptiveAvgPool2d():
            return Cost(params, 0, 0, x)
        case nn.Linear():
            return Cost(params, n * x, n * x, n * (x - 1))
        case Cosine():  # L2 normalisation, then the kernel
            return Cost(params, 0, x * x + n * x, x * x + n * (x - 1))
        case operator.add | operator.mul:  # the skip and the gate, which the authors leave out
            return Cost(params, 0, 0, 0)
    return count_alike(operation)


def count_officially(operation: Operation) -> Cost:
    """Count by the challenge's rules [9]. Raises TypeError where there is no rule.

    A weight that is stored with a mask is multiplied and added only where it is not zero. Batch norm is folded into
    the convolution before it. What runs again is not stored again.
    """
    what, x, n, folded = operation.what, operation.inputs, operation.outputs, operation.folded
    if operation.again:
        return count_officially(operation._replace(again=False))._replace(params=0, mask_bits=0)
    match what:
        case nn.Conv2d() | nn.Linear():
            values, mask_bits = stored(what.weight)
            outputs, bias = len(what.weight), folded or what.bias is not None
            macs = values * n // outputs  # every value meets n / outputs places
            return Cost(values + outputs * bias, macs, macs, macs if bias else max(0, macs - n), mask_bits)
        case nn.BatchNorm2d():  # elsewhere it is a scale and a shift
            return Cost(0, 0, 0, 0) if folded else Cost(2 * what.num_features, 0, n, n)
        case nn.ReLU():
            return Cost(0, 0, n, 0)
        case nn.AdaptiveAvgPool2d():
            return Cost(0, 0, n, x - n)
        case nn.AvgPool2d() if what.kernel_size == what.stride:
            return Cost(0, 0, n, x - n)
        case Cosine():  # L2 normalisation, then the kernel, whose columns are normalised beforehand
            macs, mask_bits = stored(what.kernel)
            return Cost(macs, macs, 2 * x + 1 + macs, x - 1 + max(0, macs - n), mask_bits)
        case operator.add:
            return Cost(0, 0, 0, n)
        case operator.mul:
            return Cost(0, 0, n, 0)
    return count_alike(operation)


def count_eight_bits(operation: Operation) -> EightBitCost:
    """Count as `count_officially` does, at 8 bits: weights (int8), and all that an operation takes and returns.

    A value is bits / 32 of a word, an operation as much as the wider of its inputs. Biases (int32), a channel's scale
    and sums have 32 bits, or sums as many as hold the largest there can be. Each result is scaled once more, at 32
    bits, and has a scale and a zero point of its own; the image's count as little as its normalisation does.
    """
    what, n, cost = operation.what, operation.outputs, count_officially(operation)
    stored_bits, wide, narrow = 0, 8, 8
    match what:
        case nn.Conv2d() | nn.Linear():
            channels = len(what.weight)
            weights, biases = what.weight.long().flatten(1).abs().sum(1), what.bias.long().abs()
            wide, narrow = 32, 1 + int((255 * weights + biases).max()).bit_length()  # with a sign
            stored_bits = 0 if operation.again else 8 * (cost.params - channels) + 2 * 32 * channels + cost.mask_bits
        case nn.AdaptiveAvgPool2d() | nn.AvgPool2d():
            wide, narrow = 32, (255 * operation.inputs // n).bit_length()
    scaled = n if cost.mults + cost.adds else 0
    stored_bits += (32 + 8) * bool(scaled)
    ops = [cost.mults / 4 + scaled + cost.adds * bits / 32 for bits in (wide, narrow)]
    return EightBitCost(*cost, stored_bits / 8, *ops)


def count_alike(operation: Operation) -> Cost:
    """Count what costs the same by both rules, or nothing. Raises TypeError where there is no rule."""
    what, n = operation.what, operation.outputs
    name = getattr(what, "__name__", type(what).__name__)
    match what:
        case nn.SiLU():
            return Cost(0, 0, 3 * n, n)
        case nn.Sigmoid():
            return Cost(0, 0, 2 * n, n)
    if name == "StochasticDepth" or isinstance(what, nn.Flatten | nn.Identity | nn.Dropout):
        return Cost(0, 0, 0, 0)
    raise TypeError(f"no rule to count {name}")


def stored(weight: Tensor) -> tuple[int, int]:  # values, bits of the mask
    """Return what storing a weight takes at 16 bits or less, dense or as nonzero values and a mask, if that is less."""
    values, size, bits = int(weight.count_nonzero()), weight.numel(), min(16, 8 * weight.dtype.itemsize)
    return (values, size) if bits * values + size < bits * size else (size, 0)


RULES = {"seed": count_by_seed, "official": count_officially}


def layer_costs(network: nn.Module, rules: str) -> dict[str, Cost]:
    """Count every layer of a network, in evaluation mode, by some `RULES`; raises TypeError where there is no rule."""
    return by_layer(operations(network), RULES[rules])


def by_layer(found: list[Operation], count: Callable[[Operation], Any]) -> dict[str, Any]:
    """Count operations, and add up what a layer costs that runs more than once."""
    costs: dict[str, list[Any]] = {}
    for operation in found:
        costs.setdefault(operation.layer, []).append(count(operation))
    return {layer: total_cost(each) for layer, each in costs.items()}


def total_cost(costs: Collection[Any]) -> Any:
    return type(next(iter(costs)))(*map(sum, zip(*costs)))


# ------------------------------------------------------------------------------------------------------------- Files
# A checkpoint in and out: safetensors whose one metadata key is sorted JSON, an object with the fields of `Metadata`.

FORMAT = 5
MOMENTUM = "momentum."  # before a parameter's name: its momentum
HEADER = re.compile(rb'(?<=\\"header\\": \\")[0-9a-f]{64}(?=\\")')  # in the bytes of a file's header: its own digest


class Record(NamedTuple):
    """An epoch that is trained and tested, on validation images where there are some: a line of log.jsonl."""

    epoch: int  # from 1
    lr: float  # of the last step
    train_loss: float
    train_top1: float  # percent, as are the other accuracies
    test_loss: float
    test_top1: float
    test_top5: float
    seconds: float
    images_per_second: float  # of training alone


class Tested(NamedTuple):
    """How the network of an epoch does on the images that epochs are tested on."""

    epoch: int
    top1: float | None  # percent; None where it has not been measured
    top5: float | None


class Parent(NamedTuple):
    """A network that a stage learned from. The digest and its stage's name say which it was, wherever it is kept."""

    name: str  # as the stage calls it: a stage or a path
    stage: str  # that trained it
    tensors: str  # their SHA-256
    tested: Tested

    @property
    def identity(self) -> tuple[str, str]:
        return self.stage, self.tensors


class Facts(NamedTuple):
    """What a run's result and speed depend on, but its stage."""

    device: str
    processes: int
    accumulation: int  # forward passes a step
    threads: int
    instructions: str  # of the processor, as far as torch uses them
    precision: str
    compile: str | None  # the back end
    versions: dict[str, str]
    commit: str | None  # of this file


class Origin(NamedTuple):
    """The file that an exported or imported network comes from."""

    file: str  # its name
    sha256: str  # of the file, or of the tensors of a checkpoint
    top1: float | None = None  # of the exported network, percent
    scale: float | None = None  # of its outputs before softmax, for the checkpoint's probabilities on average
    bits: int = 16  # of its weights


class Input(NamedTuple):
    """What an exported network expects: the middle square of an image, (value / 255 - mean) / std."""

    side: int  # pixels in height and width
    order: str  # RGB
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class Metadata:
    """What explains a checkpoint. A state, which a stage can go on from, has `best_network`; no other file has."""

    stage: Stage
    class_names: tuple[str, ...]
    epoch: int  # whose network this is
    best: Tested
    last: Tested
    history: tuple[Record, ...] = ()  # of a training run
    teacher: Parent | None = None
    start: Parent | None = None
    cost: Cost | None = None  # by the seed's rules
    facts: Facts | None = None
    images: dict[str, str] | None = None  # SHA-256 of what it was trained on and what its epochs were tested on
    scaler: dict[str, Any] | None = None  # the loss scale of fp16
    best_network: str | None = None  # SHA-256 of the best epoch's tensors
    exported: Origin | None = None
    input: Input | None = None  # of an exported network
    imported: Origin | None = None
    micronet: str = __version__
    format: int = FORMAT
    tensors: str = "0" * 64  # SHA-256 of the file's tensors
    header: str = "0" * 64  # SHA-256 of the file's header, this one taken as zeros

    @property
    def tested(self) -> Tested:
        """How the network in the file does, as far as that has been measured."""
        if self.history:
            return tested_at(self.history[self.epoch - 1])
        return Tested(self.epoch, self.exported and self.exported.top1, None)

    @property
    def parents(self) -> dict[str, Parent]:
        return {role: parent for role in ROLES if (parent := getattr(self, role))}

    def check(self) -> None:
        """Raise ValueError where entries contradict each other."""
        tested, n = list(map(tested_at, self.history)), len(self.history)
        accuracies = [r.train_top1 for r in self.history] + [a for t in (*tested, self.best, self.last) for a in t[1:]]
        sound = {
            "history": [t.epoch for t in tested] == list(range(1, n + 1)) and n <= self.stage.epochs,
            "top-1 or top-5": all(0 <= a <= 100 for a in accuracies if a is not None),
            "epoch": 1 <= self.epoch <= (n or self.stage.epochs),
            "last": not n or self.last == tested[-1],
            "best": 1 <= self.best.epoch <= self.last.epoch
            and (not n or self.best in tested and self.best.epoch >= min(n, self.stage.prune_epochs)),
            "class_names": (len(self.class_names) == self.stage.classes or not self.class_names and not n)
            and (not self.stage.folder or self.stage.folder.class_names == self.class_names),
            "parents": bool(self.imported) or self.parents.keys() == self.stage.parents.keys(),
            "origin": (n > 0) != (self.exported is not None or self.imported is not None),
            "exported": self.exported is None or self.exported.bits in (8, 16),
            "cost": (self.cost and self.facts and self.images) is not None or not n,
            "best_network": self.best_network is None or n > 0,
            "input": (self.input and self.input.side) == (self.exported and self.stage.side),
        }
        if wrong := [name for name in sound if not sound[name]]:
            raise ValueError(f"metadata.{wrong[0]} contradicts the rest")


def tested_at(record: Record) -> Tested:
    return Tested(record.epoch, record.test_top1, record.test_top5)


def plain(value: Any) -> Any:
    """Return a value as JSON holds it: what has named fields becomes an object."""
    if is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, tuple | list):
        return plain(value._asdict()) if hasattr(value, "_asdict") else [plain(item) for item in value]
    return {name: plain(item) for name, item in value.items()} if isinstance(value, dict) else value


type_hints = functools.cache(get_type_hints)


def typed(kind: Any, value: Any, name: str) -> Any:
    """Return what `plain` has made of a value of some annotated `kind`; raises ValueError where it is none of that."""
    inner = get_args(kind)
    if get_origin(kind) is UnionType:  # with None
        return None if value is None else typed(inner[0], value, name)
    if get_origin(kind) is tuple and isinstance(value, list):
        return tuple(typed(inner[0], item, f"{name}[{i}]") for i, item in enumerate(value))
    if get_origin(kind) is dict and isinstance(value, dict):
        return {key: typed(inner[1], item, f"{name}.{key}") for key, item in value.items()}
    if kind is Any or kind in (int, str) and type(value) is kind or kind is float and is_number(value):
        return value
    if kind is Stage and isinstance(value, dict) and isinstance(value.get("name"), str):
        table = {key: item for key, item in value.items() if key not in ("name", "folder") and item is not None}
        folder = typed(Dataset | None, value.get("folder"), f"{name}.folder")
        sound = not folder or folder.classes == len(set(folder.class_names)) > 1 <= min(folder.train, folder.test)
        if not sound or (folder is None) == str(table.get("dataset")).startswith(FOLDER):
            raise ValueError(f"{name}.folder = {shown(value.get('folder'))}")
        return stage_from("stage", value["name"], checked_table("stage", table), lambda name: folder)
    if isinstance(kind, type) and isinstance(value, dict) and value.keys() == kind.__annotations__.keys():
        kinds = type_hints(kind)
        return kind(**{field: typed(kinds[field], item, f"{name}.{field}") for field, item in value.items()})
    raise ValueError(f"{name} = {shown(value)}")


def read_metadata(path: Path | str) -> Metadata:
    """Return what explains a checkpoint, without reading its tensors: a millisecond, and no torch.

    Raises Refused where the file is missing, is no checkpoint of this program, or a bit of its header has changed.
    """
    return parse_header(Path(path), *read_beginning(checkpoint_file(path), MOST_HEADER))


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], Metadata]:
    """Return tensors (on the CPU) and metadata of a checkpoint; raises Refused if a single bit has changed."""
    return parse_checkpoint(path, read_beginning(checkpoint_file(path), MOST)[0])


def checkpoint_file(path: Path | str) -> Path:
    """Return the file of a checkpoint, for which its stage's folder may stand."""
    return best_path(Path(path)) if Path(path).is_dir() else Path(path)


MOST_HEADER, MOST = 2**22, 2**31  # bytes: a header has 300 an epoch, and no network comes near the other


def read_beginning(path: Path, most: int) -> tuple[bytes, int]:
    """Return at `most` so many bytes of a file and its size; raises Refused where there is none.

    Raises OSError where it cannot be read, which says nothing of what is in it: no reason to take an older one.
    """
    try:
        with open_regular(path) as file:
            return file.read(most), os.fstat(file.fileno()).st_size
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EINVAL):
            raise Refused(f"{path}: {error.strerror}") from None
        raise OSError(error.errno, error.strerror, str(path)) from None


def parse_header(path: Path, content: bytes, size: int) -> Metadata:
    """Return what explains a file of so many bytes, from its beginning; raises Refused."""
    try:
        length = 8 + struct.unpack("<Q", content[:8])[0]
        header = json.loads(content[8:length] if length <= MOST_HEADER else b"", object_pairs_hook=once)
        about = json.loads(header.pop("__metadata__")["micronet"], object_pairs_hook=once)
        if length + max(tensor["data_offsets"][1] for tensor in header.values()) != size or size > MOST:
            raise ValueError
    except (struct.error, ValueError, KeyError, IndexError, AttributeError, TypeError, RecursionError):
        raise Refused(f"{path}: not a checkpoint of micronet, or cut short") from None
    return parse_metadata(path, about, header_digest(content[:length]))


def parse_metadata(path: Path, about: Any, signature: str | None = None) -> Metadata:
    """Return the metadata that `plain` has made this of, with a header of that digest if any; raises Refused."""
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise Refused(f"{path}: expected a checkpoint of format {FORMAT}")
    if signature and about.get("header") != signature:
        raise Refused(f"{path}: damaged: its SHA-256 does not match its header")
    try:
        metadata = typed(Metadata, about, "metadata")
        metadata.check()
    except (ValueError, Misconfigured) as error:
        raise Refused(f"{path}: {error}: expected what a training run, export or import writes") from None
    return metadata


def parse_checkpoint(path: Path, content: bytes) -> tuple[dict[str, Tensor], Metadata]:
    """Return tensors and metadata of a whole file; raises Refused."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    metadata = parse_header(path, content, len(content))
    try:
        tensors = load(content)
    except (SafetensorError, ValueError, KeyError) as error:
        raise Refused(f"{path}: damaged: {error}") from None
    if digest(tensors) != metadata.tensors:
        raise Refused(f"{path}: damaged: its SHA-256 does not match its tensors")
    return tensors, metadata


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a dict of a JSON object's pairs; raises ValueError at a name that stands there twice."""
    if len(table := dict(pairs)) != len(pairs):
        raise ValueError("a name stands twice")
    return table


def header_digest(header: bytes) -> str:
    """Return the SHA-256, in hex, of a file's header, names, types and places of its tensors included."""
    return hashlib.sha256(HEADER.sub(b"0" * 64, header)).hexdigest()


def digest(tensors: dict[str, Tensor]) -> str:
    """Return the SHA-256, in hex, of every tensor's name, type, shape and bytes."""
    sha = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return sha.hexdigest()


def to_bytes(tensors: dict[str, Tensor], metadata: Metadata) -> tuple[bytes, Metadata]:
    """Return a checkpoint's file and its metadata with both digests."""
    from safetensors.torch import save

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    about = plain(replace(metadata, tensors=digest(tensors), header="0" * 64))
    # one key: with two, safetensors writes them in random order and no two files are alike
    content = save(tensors, {"micronet": json.dumps(about, sort_keys=True, allow_nan=False)})
    length = 8 + struct.unpack("<Q", content[:8])[0]
    signature = header_digest(content[:length])
    signed = HEADER.sub(signature.encode(), content[:length]) + content[length:]
    return signed, replace(metadata, tensors=about["tensors"], header=signature)


def save_checkpoint(
    path: Path, tensors: dict[str, Tensor], metadata: Metadata, previous: Path | None = None
) -> Metadata:
    """Write a checkpoint as `replace_file` does, so that it is never half of one, also after a power cut."""
    content, signed = to_bytes(tensors, metadata)
    replace_file(path, content, previous)
    return signed


def replace_file(path: Path, content: bytes, previous: Path | None = None) -> None:
    """Put `content` at `path` and on the disk, or raise OSError, which names `path`, and leave the old file as it was.

    The old file is kept at `previous`, if that is given; for a moment it is there alone.
    """
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.part"):  # of a writer that was killed
        if not Path("/proc", leftover.suffixes[-2][1:]).exists():
            leftover.unlink(missing_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if previous and path.exists():
            os.replace(path, previous)  # from here to the next line there is only the previous one, which is found
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> bool:
    """Put the names in a folder on the disk, which a power cut may otherwise undo; tell whether that can be done."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
        return False
    finally:
        os.close(descriptor)
    return True


def check_output(target: Path, older: str | None = None) -> None:
    """Raise Misconfigured where a command may not write: into a stage's folder, or over a file that is not its own.

    Its own is one that holds `older`, a regular expression. An empty file, a pipe or a device loses nothing.
    """
    folder = target.resolve().parent
    if any(path.exists() for path in (*last_paths(folder), folder.with_name(f".{folder.name}.lock"))):
        raise Misconfigured(f"{target}: {folder} keeps a stage: expected a name elsewhere")
    if target.is_file() and (content := target.read_bytes()) and not (older and re.search(older.encode(), content)):
        raise Misconfigured(f"{target}: holds what this command has not written: expected another name or folder")


def write_output(target: Path, content: bytes) -> None:
    """Write what a command puts out; a link stays, and a pipe or a device is written to."""
    if target.exists() and not target.is_file():
        try:
            target.write_bytes(content)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(target)) from None
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        replace_file(target.resolve(), content)


def load_network(path: Path | str) -> EfficientNet:
    """Return the network of a checkpoint in evaluation mode, on the CPU and in float32.

    Called with normalised images (N, 3, side, side) it returns cosines (N, K); an exported one returns cosines times a
    positive factor of the image's own, a pruned one what stands for them (see `Stage.sparsity`). Raises Refused.
    """
    return network_from(Path(path), *load_checkpoint(Path(path)))


def network_from(path: Path, tensors: dict[str, Tensor], metadata: Metadata) -> EfficientNet:
    """Build the network that the metadata describe and fill it with the tensors."""
    network = build_network(metadata.stage)
    if metadata.exported:
        tensors = unpack(path, tensors, fold_network(network).state_dict())
    fill_network(path, network, tensors)
    return network.eval()


MASK = ".mask"  # after a weight's name: a bit for each of its positions, 1 where its value is stored


def pack(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Keep every weight as `stored` counts it: dense, or as its nonzero values and a mask of bits, highest first."""
    packed = dict(tensors)
    for name, tensor in tensors.items():
        if tensor.ndim > 1 and stored(tensor)[1]:
            flat = tensor.flatten()
            bits = F.pad(flat != 0, (0, -len(flat) % 8)).view(-1, 8)
            packed[name] = flat[flat != 0]
            packed[name + MASK] = (bits << torch.arange(7, -1, -1)).sum(1, dtype=torch.uint8)
    return packed


def unpack(path: Path, tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """Undo `pack`, to tensors of the shapes that are expected; raises Refused where mask and values do not match."""
    dense = dict(tensors)  # masks of what is not expected stay in it, and are not expected
    for name in dense.keys() & expected.keys():
        if (mask := dense.pop(name + MASK, None)) is not None:
            size, values = expected[name].numel(), dense[name]
            sound = mask.dtype == torch.uint8 and mask.shape == (math.ceil(size / 8),)
            sound = sound and values.ndim == 1 < expected[name].ndim
            bits = (mask[:, None] >> torch.arange(7, -1, -1) & 1).bool().flatten() if sound else mask
            if not sound or int(bits.sum()) != int(bits[:size].sum()) or int(bits.sum()) != len(values):
                raise Refused(f"{path}: {name} does not match its mask")
            flat = torch.zeros(size, dtype=values.dtype).masked_scatter(bits[:size], values)
            dense[name] = flat.view(expected[name].shape)
    return dense


def without_momentum(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(MOMENTUM)}


def fill_network(path: Path, network: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Load a checkpoint's weights; raises Refused at the first name or shape that differs and at nan or infinity."""
    weights = without_momentum(tensors)
    expected = network.state_dict()
    for name in sorted(weights.keys() ^ expected.keys()):
        raise Refused(f"{path}: {name} is {'missing' if name in expected else 'not in this network'}")
    for name, tensor in expected.items():
        if weights[name].is_floating_point() != tensor.is_floating_point():
            raise Refused(f"{path}: {name} has type {weights[name].dtype} where {tensor.dtype} is expected")
        if weights[name].shape != tensor.shape:
            shapes = f"{tuple(weights[name].shape)[:8]} where {tuple(tensor.shape)} is expected"
            raise Refused(f"{path}: {name} has shape {shapes}")
        if not weights[name].to(tensor.dtype).isfinite().all():
            raise Refused(f"{path}: {name} is not finite")
    network.load_state_dict(weights)


# ----------------------------------------------------------------------------------------------------------- Keeping
# What a stage keeps, and going on from it. last.safetensors is the truth, network, momentum and history; the epoch
# before it is kept as previous.safetensors; best.safetensors and log.jsonl follow from it (see `settle`).


@dataclass(frozen=True)
class Kept:
    """A stage and what it has come to, read once a command."""

    stage: Stage
    metadata: Metadata | None = None  # of its state; None where it has finished no epoch
    state: str = "waiting"  # or running, done, failed, stopped
    failure: str | None = None  # why its last run failed
    refused: tuple[str, ...] = ()  # why its newest file is not the one that it goes on from

    @property
    def history(self) -> tuple[Record, ...]:
        return self.metadata.history if self.metadata else ()

    @property
    def is_finished(self) -> bool:
        return len(self.history) >= self.stage.epochs

    @property
    def images_left(self) -> int:
        return max(0, self.stage.epochs - len(self.history)) * self.stage.steps_per_epoch * self.stage.batch_size

    @property
    def seconds(self) -> float:
        return sum(record.seconds for record in self.history)


def last_paths(folder: Path) -> tuple[Path, Path]:
    """Return where the state of a stage's last epoch is kept in its folder, and that of the epoch before it."""
    return folder / "last.safetensors", folder / "previous.safetensors"


def best_path(folder: Path) -> Path:
    """Return where the network of a stage's best epoch is kept in its folder."""
    return folder / "best.safetensors"


def parent_path(name: str, ckpt: Path) -> Path:
    """Return where the checkpoint of a stage's parent is kept."""
    return checkpoint_file(name) if is_path(name) else best_path(ckpt / name)


class State(NamedTuple):
    """What a stage can go on from."""

    path: Path
    tensors: dict[str, Tensor]  # network and momentum; none where only the metadata were read
    metadata: Metadata
    refused: tuple[str, ...] = ()  # which file comes before it and why it is not that, in words


def find_state(folder: Path, whole: bool = False) -> State | None:
    """Return the newest state in a folder that can be read, with its tensors if `whole`; None if none was ever there.

    Raises Refused if all are damaged: a stage must not start from zero because its file is damaged.
    """
    refused: list[str] = []
    for path in last_paths(folder):
        try:
            if path.exists():
                tensors, metadata = load_checkpoint(path) if whole else ({}, read_metadata(path))
                if metadata.best_network is None:
                    raise Refused(f"{path}: holds a network alone: expected a state, which a stage goes on from")
                return State(path, tensors, metadata, tuple(f"{reason}: going on from {path}" for reason in refused))
        except Refused as error:
            refused.append(str(error))
    if refused:
        raise Refused(f"{'; '.join(refused)}; nothing is left to go on from: restore one, or --restart the stage")
    return None


def kept_state(stage: Stage, ckpt: Path, whole: bool = False) -> State | None:
    """Return the state of a stage, or None where it has kept nothing.

    Raises Misconfigured if the stage has changed, Refused where no state explains what its folder holds.
    """
    folder = ckpt / stage.name
    if state := find_state(folder, whole):
        check_unchanged(stage, ckpt, state)
    elif os.path.lexists(folder) and not folder.is_dir():
        raise Refused(f"{folder}: not a folder: move it elsewhere")
    elif found := sorted(path.name for path in folder.glob("*.safetensors")):
        raise Refused(
            f"{folder}: holds {', '.join(found)} and no state that explains it: move it elsewhere, or have "
            f"run-stage {stage.name} --restart move it aside"
        )
    return state


def read_kept(stage: Stage, ckpt: Path, strict: bool = True) -> Kept:
    """Return what a stage has come to, which is not for who holds its lock (see `locked`).

    Raises as `kept_state` does if `strict`; else nothing is known of it then: what is looked at stops no run.
    """
    state = None
    with nullcontext() if strict else suppress(Failure, OSError):
        state = kept_state(stage, ckpt)
    return kept_as(stage, state, ckpt)


def kept_as(stage: Stage, state: State | None, ckpt: Path) -> Kept:
    """Tell whether a stage that has kept a state is running, done, failed, stopped or waiting."""
    kept = Kept(stage, state.metadata, refused=state.refused) if state else Kept(stage)
    if is_locked(stage.name, ckpt):
        return replace(kept, state="running")
    if kept.is_finished or not (failure := failures(ckpt).get(stage.name)):
        return replace(kept, state="done" if kept.is_finished else "stopped" if kept.history else "waiting")
    return replace(kept, state="failed", failure=failure)


def kept_chain(stages: dict[str, Stage], names: Collection[str], ckpt: Path, anew: bool) -> list[Kept]:
    """Return the named stages and the parents that those still to train need, each after its parents.

    Named ones are to train `anew`, whatever they have kept.
    """
    chain: dict[str, Kept] = {}

    def parents(stage: Stage) -> dict[str, str]:
        chain[stage.name] = Kept(stage) if anew and stage.name in names else read_kept(stage, ckpt)
        return needed(chain[stage.name])

    return [chain[stage.name] for stage in with_parents(stages, names, parents)]


def still_to_train(chain: list[Kept], ckpt: Path) -> dict[str, Stage]:
    """Return the stages of a chain that are not done, by name; raises Failure where a parent that they need is lost."""
    left = {kept.stage.name: kept.stage for kept in chain if not is_settled(kept, ckpt)}
    for kept in chain:
        for role, parent in needed(kept).items():
            if parent not in left:
                find_parent(kept.stage, role, ckpt)
    return left


def needed(kept: Kept) -> dict[str, str]:
    """Return the parents that a stage still needs: its teacher to its end, its start until it has kept an epoch."""
    if kept.is_finished:
        return {}
    return {role: name for role, name in kept.stage.parents.items() if not (role == "start" and kept.history)}


def kept_stages(ckpt: Path) -> tuple[list[Kept], list[str]]:
    """Return the stages that have kept something in a folder, parents first, and why files there cannot be read."""
    found: dict[str, Kept] = {}
    damaged: list[str] = []
    for folder in sorted(ckpt.iterdir()) if ckpt.is_dir() else []:
        try:
            if re.fullmatch(NAME, folder.name) and (state := find_state(folder)):
                stage = replace(state.metadata.stage, name=folder.name)
                found[folder.name] = kept_as(stage, state, ckpt)
                damaged += state.refused
        except (Refused, OSError) as error:
            damaged.append(str(error))
    order = with_parents({name: kept.stage for name, kept in found.items()}, list(found))
    return [found[stage.name] for stage in order], damaged


def check_unchanged(stage: Stage, ckpt: Path, state: State) -> None:
    """Raise Misconfigured where a state comes from another definition of the stage."""
    metadata, kept = state.metadata, state.metadata.stage

    def may_differ(name: str) -> bool:
        if name in stage.parents and name in metadata.parents:  # by another name, or in another place
            with suppress(Refused):
                about = read_metadata(parent_path(stage.parents[name], ckpt))
                return (about.stage.name, about.tensors) == metadata.parents[name].identity
        return is_extension(name, kept, stage, len(metadata.history))

    changes = [
        f"{f.name} was {shown(getattr(kept, f.name))} and is {shown(getattr(stage, f.name))}"
        for f in fields(Stage)
        if getattr(kept, f.name) != getattr(stage, f.name) and not may_differ(f.name)
    ]
    if changes:
        raise Misconfigured(
            f"stage {stage.name}: {state.path} comes from another definition: {'; '.join(changes)}; "
            f"undo the change, train it anew (chain {stage.name} --restart), or name another --ckpt"
        )


def is_extension(name: str, kept: Stage, stage: Stage, done: int) -> bool:
    """Tell whether a changed field concerns only epochs that are still to come, more of them or their rates."""
    if name == "epochs":
        return stage.epochs > kept.epochs and not isinstance(stage.lr, Schedule)
    if name != "lr" or isinstance(stage.lr, Schedule) or isinstance(kept.lr, Schedule):
        return False
    steps = [epoch * stage.steps_per_epoch for epoch in range(done)]
    return all(learning_rate(kept, step) == learning_rate(stage, step) for step in steps)


def find_parent(stage: Stage, role: str, ckpt: Path) -> Path:
    """Return where a stage's teacher or start is kept; raises Failure if it is not ready."""
    name = stage.parents[role]
    path, named = parent_path(name, ckpt), not is_path(name)
    state = find_state(path.parent)
    if not path.exists() and not (named and state):
        way_out = "train it first, or use `chain`" if named else f"expected a checkpoint, seen from {Path.cwd()}"
        raise Misconfigured(f"stage {stage.name}: its {role} {path} is not there: {way_out}")
    if path.resolve().parent == (ckpt / stage.name).resolve():
        raise Refused(f"{path}: stage {stage.name} keeps it itself: expected a {role} that is another one's network")
    if named and state is None:
        raise Refused(f"{path}: no state explains it: train {name}, or name this file as the {role}")
    about = check_best(path, state.metadata)[1] if named else read_metadata(path)
    if about.exported:
        raise Misconfigured(f"stage {stage.name}: its {role} {path} is exported, with no cosines: name its checkpoint")
    if state and about.stage.name == state.metadata.stage.name and not Kept(about.stage, state.metadata).is_finished:
        raise Misconfigured(f"stage {stage.name}: its {role} {name} is not finished: `chain` does that first")
    if different := differing(stage, about.stage, role):
        what, own, found = different
        less = " or less" if what == "sparsity" else ""
        raise Refused(f"{path}: {what} = {shown(found)}: expected {shown(own)}{less}, as stage {stage.name} has it")
    return path


def check_best(path: Path, state: Metadata, whole: bool = False) -> tuple[dict[str, Tensor], Metadata]:
    """Return a best.safetensors, its tensors if `whole`; raises Refused unless a state calls its network the best."""
    stage, epoch = state.stage.name, state.best.epoch
    try:
        tensors, about = load_checkpoint(path) if whole else ({}, read_metadata(path))
        if about.tensors != state.best_network:
            raise Refused(f"{path}: another network, of stage {about.stage.name}")
    except Refused as error:
        raise Refused(
            f"{error}: expected the network of epoch {epoch}, the best of stage {stage}: restore it, or train the "
            f"stage anew with run-stage {stage} --restart"
        ) from None
    return tensors, about


def is_settled(kept: Kept, ckpt: Path) -> bool:
    """Tell whether a stage is finished, with its best network at hand or nothing that could make it so."""
    if not kept.is_finished:
        return False
    with suppress(Refused):  # cut off between last.safetensors and best.safetensors, say
        check_best(best_path(ckpt / kept.stage.name), kept.metadata)
        return True
    return kept.metadata.best.epoch != kept.metadata.last.epoch


def settle(folder: Path, state: State, thorough: bool) -> None:
    """Make best.safetensors and log.jsonl what a state says, after every save and before a run goes on.

    `thorough` reads the whole of the best network. Raises Refused where it is lost: neither there nor the state's own.
    """
    path, about = best_path(folder), state.metadata
    explained = replace(about, epoch=about.best.epoch, best_network=None, scaler=None)
    try:
        tensors, kept = check_best(path, about, whole=thorough)
        if thorough and len(about.history) == about.stage.epochs and kept.history != about.history:
            save_checkpoint(path, tensors, explained)  # with all that there will be to know
    except Refused:
        if about.best.epoch != about.last.epoch:
            raise
        save_checkpoint(path, without_momentum(state.tensors), explained)
    log, lines = folder / "log.jsonl", "".join(json.dumps(record._asdict()) + "\n" for record in about.history)
    if not log.is_file() or log.read_text(errors="replace") != lines:
        replace_file(log, lines.encode())


def fallen_back(folder: Path, state: State) -> State:
    """Return a previous state as a run goes on from it; the damaged file that came after it is moved aside.

    That file's epoch may have overtaken the best one of this state, whose network then is gone. Trained again, it
    will do so again, or nearly; until then the state's own network is the best there is.
    """
    last, previous = last_paths(folder)
    if state.path == previous and last.exists():
        os.replace(last, folder / "damaged.safetensors")  # it must never take the place of a good one
    about = state.metadata
    if state.path == previous:
        with suppress(Refused):  # what is lost otherwise is for `settle` to say
            found = read_metadata(best_path(folder))
            overtook = found.stage.name == about.stage.name and found.epoch >= about.last.epoch
            if overtook and found.tensors != about.best_network:
                about = replace(about, best=about.last, best_network=digest(without_momentum(state.tensors)))
    return state._replace(metadata=about)


FAILED = "failed: "


@contextmanager
def locked(stage: Stage, ckpt: Path) -> Iterator[Callable[[Metadata | None], None]]:
    """Hold a stage's folder for this process alone and sweep up what a killed one left there; raises Locked.

    A POSIX lock ends with the process, however that ends, and no child inherits it. It also ends when the process
    closes the file anywhere: `read_kept`, which reads it, is for before and after. Its file names the process and,
    if that failed, why. What is yielded raises unless the stage is still this process's alone, as far as that can be
    seen (not all file systems share locks between machines): it is called with the state that was written last.
    """
    ckpt.mkdir(parents=True, exist_ok=True)
    path, owner = ckpt / f".{stage.name}.lock", f"{os.getpid()} on {platform.node()}"  # which --restart does not move
    with open(os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o666), "a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise Unwritable(f"{path}: no locks here ({error.strerror}): name another --ckpt") from None
            file.seek(0)
            raise Locked(f"stage {stage.name}: process {file.read().strip() or '?'} trains it in {ckpt}") from None
        try:
            rewrite(file, owner)
        except OSError as error:
            error.filename = str(path)  # which a full disk does not say
            raise
        for leftover in (ckpt / stage.name).glob(".*.part"):
            leftover.unlink()

        def check_held(written: Metadata | None) -> None:
            if not path.exists() or not os.path.samestat(os.stat(path), os.fstat(file.fileno())):
                raise Refused(f"{ckpt}: removed or replaced while stage {stage.name} trained: nothing more is kept")
            holder = os.pread(file.fileno(), 4096, 0).decode(errors="replace")
            last = last_paths(ckpt / stage.name)[0]
            try:
                found = read_metadata(last).header if last.exists() else None
            except Refused as error:
                found = str(error)
            if holder != owner:
                raise Locked(f"stage {stage.name}: process {holder} trains it, too: nothing more is kept")
            if found != (written and written.header):
                raise Locked(f"stage {stage.name}: {last} is not what was written there: nothing more is kept")

        try:
            yield check_held
        except (Stopped, Misconfigured, Locked):  # which say nothing of the stage
            raise
        except Exception as error:
            with suppress(OSError):  # on a full disk, say
                rewrite(file, f"{FAILED}{in_words(error)}"[:500])
            raise


def rewrite(file: TextIO, text: str) -> None:
    """Put `text` in place of all that a file opened for appending holds.

    Past its buffer, which would be written again when the file is closed, with an error that does not name it.
    """
    file.truncate(0)
    os.write(file.fileno(), text.encode(errors="replace"))


def failures(ckpt: Path) -> dict[str, str]:
    """Return why stages failed, by name, for those whose last run did and whose file can be read."""
    texts = {}
    for path in sorted(ckpt.glob(".*.lock")):
        with suppress(OSError), open_regular(path) as file:
            texts[path.name[1:-5]] = file.read(4096).decode(errors="replace")
    return {name: text.removeprefix(FAILED) for name, text in texts.items() if text.startswith(FAILED)}


def is_locked(stage: str, ckpt: Path) -> bool:
    """Tell whether a process trains a stage, without taking the lock even for a moment."""
    with suppress(OSError), open_regular(ckpt / f".{stage}.lock") as file:
        asked = struct.pack("hhqqi4x", fcntl.F_RDLCK, os.SEEK_SET, 0, 0, 0)  # struct flock of 64-bit Linux
        return struct.unpack("hhqqi4x", fcntl.fcntl(file, fcntl.F_GETLK, asked))[0] != fcntl.F_UNLCK
    return False


def check_room(folder: Path, network: nn.Module, anew: bool) -> list[str]:
    """Raise Unwritable unless a stage's files can be written and fit on the disk; return what the user must know.

    What it keeps already will be replaced, unless it starts `anew`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise Unwritable(f"{folder}: this process may not write here")
    size = sum(t.numel() * t.itemsize for t in network.state_dict().values())
    files = () if anew else (*last_paths(folder), best_path(folder))
    kept = sum(path.stat().st_size for path in files if path.exists())
    disk = shutil.disk_usage(folder.parent if anew else folder)  # which may be a link, and is moved aside then
    needed = 8 * size - kept  # the state three times while one is replaced, best twice
    if disk.free < needed and disk.total > 0:  # a file system that says 0 does not know
        raise Unwritable(f"{folder}: {disk.free / 2**20:,.0f} MiB free, {needed / 2**20:,.0f} MiB are needed")
    lost = f"WARNING: {folder}: this file system cannot put names on the disk: a power cut may take the last epoch back"
    return [] if sync_folder(folder.parent) else [lost]


def set_aside(folder: Path) -> Path | None:
    """Rename a stage's folder so that the stage starts anew; return its new place, or None if there was nothing."""
    with suppress(OSError):
        folder.rmdir()  # an empty one
    if not folder.exists():
        return None
    places = (folder.with_name(f"{folder.name}.old{n}") for n in itertools.count(1))
    return folder.rename(next(place for place in places if not place.exists()))


# ------------------------------------------------------------------------------------------------------------ Export
# What a network that is kept costs, how it ships, and how one of the authors' comes in.


def score_network(name: str, counts: list[str], layers: bool) -> list[dict[str, Any]]:
    """Return what a network of `NETWORKS` or of a file costs by some `RULES`, and a file's accuracy; raises Failure."""
    about = None
    if full := find_network(name):
        name, found = full, operations(build_network(Stage(full, network=full)))
    elif name.endswith(".onnx"):
        content, _, about = read_onnx(Path(name))
        found = onnx_operations(Path(name), content, about.exported.bits, about.stage)
    elif is_path(name):
        tensors, about = load_checkpoint(Path(name))
        found = operations(network_from(Path(name), tensors, about))
    else:
        raise Misconfigured(f"{shown(name)}: expected a network ({', '.join(NETWORKS)}) or the path of a checkpoint")
    kinds = {o.layer: getattr(o.what, "__name__", type(o.what).__name__) for o in found}
    scored, top1 = about is None or about.stage.is_scored, about and about.tested.top1
    eight = about and about.exported and about.exported.bits == 8
    counting: dict[str, Callable[[Operation], Any]] = {"official": count_eight_bits} if eight else RULES
    if not counting.keys() & {*counts}:
        raise Misconfigured(f"{name}: the authors have no count for 8 bits: expected --rules official")
    results = []
    for rules in (rules for rules in counts if rules in counting):
        costs = by_layer(found, counting[rules])
        results.append({"name": name, "rules": rules, **figures(total_cost(costs.values()), scored), "top1": top1})
        if layers:
            each = [{"layer": layer, "kind": kinds[layer], **figures(c, scored)} for layer, c in costs.items()]
            results[-1]["layers"] = each
    return results


def figures(cost: Cost | EightBitCost, scored: bool) -> dict[str, float | None]:
    """Return what a cost is made of and comes to, without scores where they mean nothing."""
    names = ("bytes", "ops", "score", "ops_32bit", "score_32bit", "ops_narrow", "score_narrow")
    means = {name: getattr(cost, name, None) if scored or not name.startswith("score") else None for name in names}
    return cost._asdict() | means


class Shipped(nn.Module):
    """A folded network that keeps its weights at 16 bits and computes with 32: (N, 3, side, side) to (N, K)."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network.half()
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        state = {name: tensor.float() for name, tensor in self.network.state_dict(keep_vars=True).items()}
        return torch.func.functional_call(self.network, state, (images,))


EXPORTS = (".safetensors", ".onnx", ".pt2")


def export_checkpoint(path: Path, out: Path, data: Path, watch: Watch, card: bool, bits: int) -> dict[str, Any]:
    """Fold a checkpoint's network, write it to `out` and compare what the file computes with the checkpoint.

    On the images that its epochs were tested on where they are at hand, on random images where not; weights of 8 `bits`
    are scaled on training images. A `card` is written beside it, with a list of classes. Nothing is written unless the
    export does what it should; raises Failure.
    """
    path = checkpoint_file(path)
    check_export(out, path, bits)
    tensors, about = load_checkpoint(path)
    labels = "".join(f"{name}\n" for name in about.class_names)
    if card:
        check_output(out.with_name("labels.txt"), older=rf"\A{re.escape(labels)}\Z")
        check_output(out.with_name("README.md"))
    network = network_from(path, tensors, about)
    folded = fold_network(copy.deepcopy(network).double()).float()
    stage, exact, model = about.stage, b"", None
    if bits == 8:
        exact = to_onnx(folded).SerializeToString()
        model, computed, cost = eight_bits(out, exact, stage, data, watch)
    else:
        computed = copy.deepcopy(folded).half().float()
        cost = total_cost(layer_costs(computed, "official").values())
    images, on = images_at_hand(about, data, watch)
    before, ours, predicted = (outputs(path, n, images.pixels, watch) for n in (network, folded, computed))
    labelled = None if on == "random images" else images.labels
    # folded, cosines come times the length of the embedding, which differs from image to image
    own = about.exported.scale if about.exported else stage.scale
    scale = own * (before.norm() / ours.norm()).item() if own and on != "random images" else None
    top1 = None if on == "other images" else top1_of(predicted, labelled)
    origin = Origin(path.name, about.tensors, top1, scale, bits)
    explained = replace(about, history=(), cost=None, scaler=None, best_network=None, exported=origin)
    explained = replace(explained, input=Input(stage.side, "RGB", MEAN, STD))
    content, computes = export_network(out, folded, explained, model)
    after = outputs(out, computes, images.pixels, watch)
    result = {
        "file": str(out),
        "bits": bits,
        "bytes": len(content),
        "counted_bytes": cost.bytes,
        "images": len(before),
        "on": on,
        **compared(before, ours, after, labelled, (own, scale)),
        "score": cost.score if stage.is_scored else None,
        "milliseconds": latencies([exact, content], images.pixels[:1]) if model else None,
    }
    write_output(out, content)
    if card and labels:
        write_output(out.with_name("labels.txt"), labels.encode())
    if card:
        write_output(out.with_name("README.md"), model_card(out, about, scale, cost, result).encode())
    return result


def eight_bits(
    out: Path, exact: bytes, stage: Stage, data: Path, watch: Watch
) -> tuple[Any, Callable[[Tensor], Tensor], EightBitCost]:
    """Quantise an ONNX file of a stage's network to 8 bits; return the model, what it computes and what it costs."""
    few = replace(stage, train_images=min(CALIBRATED_ON, stage.train_size))
    model = quantized(exact, load_images(few, data, "train", watch).pixels, watch)
    content = model.SerializeToString()
    costs = by_layer(onnx_operations(out, content, 8, stage), count_eight_bits)
    return model, functools.partial(run_onnx, open_onnx(out, content)), total_cost(costs.values())


def top1_of(
    cosines: Tensor,  # (N, K)
    labels: Tensor | None,  # (N,)
) -> float | None:
    """Return the top-1 accuracy in percent, None without labels."""
    return None if labels is None else 100 * int((cosines.argmax(1) == labels).sum()) / len(cosines)


def compared(
    before: Tensor,  # (N, K) outputs of a checkpoint
    folded: Tensor,  # (N, K) and of its network folded
    after: Tensor,  # (N, K) and of what was exported
    labels: Tensor | None,  # (N,)
    scales: tuple[float | None, float | None],  # of outputs before softmax: a checkpoint's and an export's
) -> dict[str, Any]:
    """Return what an export has changed."""
    own, scale = scales
    off = (((own or 0) * before).softmax(1) - ((scale or 0) * after).softmax(1)).abs().amax(1)  # most, for each image
    return {
        "agree": int((after.argmax(1) == before.argmax(1)).sum()),
        "difference": (after - folded).abs().max().item(),
        "largest": folded.abs().max().item(),
        "top1_before": top1_of(before, labels),
        "top1": top1_of(after, labels),
        "probabilities_off": {"mean": off.mean().item(), "most": off.max().item()} if scale else None,
    }


LOADING = {
    ".safetensors": "from micronet import load_network\n\noutputs = load_network({!r})(images)",
    ".pt2": "import torch\n\noutputs = torch.export.load({!r}).module()(images)",
    ".onnx": "import onnxruntime\n\noutputs = onnxruntime.InferenceSession({!r}).run(None, {{'images': images}})[0]",
}


def model_card(
    out: Path, about: Metadata, scale: float | None, cost: Cost | EightBitCost, result: dict[str, Any]
) -> str:
    """Return the model card of an export, in the format of the Hugging Face hub (YAML, of which JSON is a part)."""
    stage, top1, on = about.stage, result["top1"], f"{result['images']:,} {result['on']}"
    metric = {"type": "accuracy", "name": f"top-1, percent of {on}", "value": top1}
    tested = {"task": {"type": "image-classification"}, "dataset": {"name": stage.dataset, "type": stage.dataset}}
    index = json.dumps([{"name": stage.name, "results": [tested | {"metrics": [metric]}]}])
    words = {"teacher": "taught by", "start": "begun with the weights of"}
    parents = [f", {words[r]} {p.stage} ({percent(p.tested.top1)})" for r, p in about.parents.items()]
    pruned = f", pruned: {pruning(stage)}" if stage.sparsity else ""
    source = f"trained by micronet on {stage.train_size:,} images of {stage.dataset}{''.join(parents)}{pruned}"
    chosen = ""
    if about.images and result["on"].startswith(stage.tested_on):
        is_last = about.epoch == about.last.epoch
        chosen = f" of epoch {about.epoch}, the last" if is_last else ", on which its epoch was chosen"
    score = f"| MicroNet score | {result['score']:.4f} |\n" if result["score"] is not None else ""
    counting = {16: "a multiplication of 16 bits counting half", 8: "one of 8 bits counting a quarter"}[result["bits"]]
    order = ", in the order of labels.txt" if about.class_names else ""
    softmax = f" Softmax of {scale:.4g} x the outputs gives rough probabilities." if scale else ""
    return f"""---
library_name: micronet
pipeline_tag: image-classification
tags: [efficientnet]
{"" if top1 is None else f"model-index: {index}"}
---
# {stage.name}

{stage.network} for {stage.classes} classes, {f"as published in {about.imported.file}" if about.imported else source}.

| | |
|---|---|
| top-1 of {out.name} | {"not measured" if top1 is None else f"{percent(top1)} of {on}{chosen}"} |
| parameters | {cost.params:,} |
| multiply-accumulates | {cost.flops:,} |
| operations, {counting} | {cost.ops:,.0f} |
| bits of a weight | {result["bits"]} |
| bytes | {result["bytes"]:,} |
{score}
**Input** (N, 3, {stage.side}, {stage.side}) float32: the middle square of an image, turned as its EXIF data say and
resized with antialiasing; RGB; (value / 255 - mean) / std with mean {list(MEAN)} and std {list(STD)}.

**Output** (N, {stage.classes}): the largest is the class{order}.{softmax}

```python
{LOADING[out.suffix].format(out.name)}
```
"""


def predict_images(path: Path, paths: list[Path], watch: Watch) -> list[dict[str, Any]]:
    """Return the three likeliest classes on images and their probabilities, None where an export has no scale."""
    network, about = open_network(path)
    pixels = read_images(paths, about.stage.side, watch)
    scale = about.exported.scale if about.exported else about.stage.scale
    names = about.class_names or [str(k) for k in range(about.stage.classes)]
    results = []
    for each, found in zip(paths, outputs(path, network, pixels)):
        likeliest = found.topk(min(3, len(names))).indices.tolist()
        probabilities = (found * scale).softmax(0).tolist() if scale else dict.fromkeys(likeliest)
        classes = [{"class": names[k], "probability": probabilities[k]} for k in likeliest]
        results.append({"image": str(each), "classes": classes})
    return results


def open_network(path: Path) -> tuple[Callable[[Tensor], Tensor], Metadata]:
    """Return what a checkpoint or an export computes and what explains it; raises Failure."""
    if path.suffix == ".pt2":
        raise Misconfigured(f"{path}: loading a .pt2 runs what is in it: expected a checkpoint, .safetensors or .onnx")
    if path.suffix != ".onnx":
        tensors, about = load_checkpoint(path)
        return network_from(path, tensors, about), about
    _, session, about = read_onnx(path)
    return functools.partial(run_onnx, session), about


def outputs(
    path: Path,
    network: Callable[[Tensor], Tensor],
    pixels: Tensor,  # (N, 3, H, W) uint8
    watch: Watch = unwatched,
) -> Tensor:  # (N, K)
    """Return what a network in evaluation mode makes of images; raises Refused where that is not finite."""
    batches = watch(pixels.split(tested_at_once(pixels)), f"testing {path}")
    with torch.no_grad():
        found = torch.cat([network(normalize(batch.float() / 255)) for batch in batches]).float()
    if not found.isfinite().all():
        raise Refused(f"{path}: its outputs are not finite: expected finite ones (16 bits hold 65,504 at most)")
    return found


def check_export(target: Path, source: Path, bits: int) -> None:
    """Raise Misconfigured where an export would not do: another ending, a missing package, over another file."""
    if target.suffix not in EXPORTS:
        raise Misconfigured(f"{target}: expected a name that ends in {', '.join(EXPORTS)}")
    if bits not in (8, 16) or bits == 8 and target.suffix != ".onnx":
        raise Misconfigured(f"--bits {bits}: expected 16, or 8 for a name that ends in .onnx")
    if source.suffix in EXPORTS[1:]:
        raise Misconfigured(f"{source}: expected a checkpoint or .safetensors, what {source.suffix} was exported from")
    if target.resolve() == source.resolve():
        raise Misconfigured(f"{target}: is what is to be exported: expected another name")
    check_output(target, older=r'\\?"exported\\?": {')
    if target.suffix == ".onnx":
        check_packages(target, "onnxscript", "onnxruntime")  # torch.onnx needs the first, the comparison the second


def check_packages(path: Path, *packages: str) -> None:
    """Raise Misconfigured where a package is missing that an ONNX file needs."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise Misconfigured(f"{path}: the package {package} is missing: uv sync --extra onnx")


def export_network(
    path: Path, network: nn.Module, metadata: Metadata, model: Any = None
) -> tuple[bytes, Callable[[Tensor], Tensor]]:
    """Return a file of a folded network with 16-bit weights, or of an ONNX model, and what it, read again, computes."""
    if path.suffix == ".safetensors":
        content = to_bytes(pack(network.half().state_dict()), metadata)[0]
        return content, network_from(path, *parse_checkpoint(path, content))
    explained = json.dumps(plain(metadata), sort_keys=True)
    if path.suffix == ".onnx":
        model = model or to_onnx(network.half().float())
        pack_onnx(model, metadata.exported.bits)
        shorten(model)
        model.metadata_props.add(key="micronet", value=explained)
        content = model.SerializeToString()
        return content, functools.partial(run_onnx, open_onnx(path, content))
    example, batch = example_of(network)
    program, buffer = torch.export.export(Shipped(network), example, dynamic_shapes=batch), io.BytesIO()
    with warnings.catch_warnings(action="ignore"):  # of tensors that are views
        torch.export.save(program, buffer, extra_files={"micronet": explained})
    return buffer.getvalue(), torch.export.load(io.BytesIO(buffer.getvalue())).module()


def example_of(network: EfficientNet) -> tuple[tuple[Tensor], tuple[dict[int, Any]]]:
    """Return arguments of a network and which of their dimensions vary, to export it by."""
    return (torch.zeros(2, 3, network.side, network.side),), ({0: torch.export.Dim("N", min=1)},)


def read_published(path: Path, network: EfficientNet) -> dict[str, Tensor]:
    """Fill `network` from a checkpoint (.pytar) as the method's authors published theirs and return its state.

    torch.load runs nothing that is in the file, but computes and allocates what that asks for: in a process of its
    own, which has a minute and some memory. Raises Refused.
    """
    from safetensors.torch import load

    try:
        with open_regular(path) as file:
            loader = [sys.executable, "-Pc", LOADER]
            content = subprocess.check_output(loader, stdin=file, stderr=subprocess.DEVNULL, timeout=PATIENCE)
    except subprocess.SubprocessError:  # it has failed, or run out of time
        raise Refused(f"{path}: expected a dict of dense tensors of floats that torch.save has written") from None
    except OSError as error:
        raise Refused(f"{path}: {error.strerror or error}") from None
    # torch 0.4.0 did not count batches
    state = {name: torch.tensor(0) for name in network.state_dict() if name.endswith("num_batches_tracked")}
    ours = published_names(network)
    for name, tensor in load(content).items():
        module, _, last = name.removeprefix("module.").rpartition(".")
        state[f"{ours[module]}.{last}" if module in ours else shown(name)] = tensor
    fill_network(path, network, state)
    return network.state_dict()


PATIENCE = 60  # seconds
LOADER = """
import io, resource, sys, torch
from safetensors.torch import save

resource.setrlimit(resource.RLIMIT_DATA, (2**33, 2**33))
state = torch.load(io.BytesIO(sys.stdin.buffer.read(2**27)), "cpu", weights_only=True)  # b3 in float64 has 89 MB
for name, tensor in state.items():
    assert isinstance(name, str) and type(tensor) is torch.Tensor and tensor.layout == torch.strided and tensor.is_cpu
    assert tensor.dtype in (torch.half, torch.bfloat16, torch.float, torch.double, torch.long)
    assert tensor.numel() < 2**27
    state[name] = tensor.clone(memory_format=torch.contiguous_format)
sys.stdout.buffer.write(save(state))
"""


def published_names(network: EfficientNet) -> dict[str, str]:
    """Return the names of the modules that have a state, by those that the authors call them."""
    theirs = ["features.0.1", "features.0.2"]  # padding 0, convolution 1, batch norm 2
    for i, block in enumerate(network.blocks, 1):
        units = sum(isinstance(layer, nn.SiLU) for layer in block.layers)  # an expansion, where there is one; depthwise
        inner = [f"{unit}.{k}" for unit in range(units) for k in (1, 2)]
        inner += [f"{units}.se.1", f"{units}.se.3", f"{units + 1}", f"{units + 2}"]
        theirs += [f"features.{i}.conv.{name}" for name in inner]
    theirs += [f"features.{len(network.blocks) + 1}.{k}" for k in (1, 2)] + ["classifier.0", "classifier.2"]
    return dict(zip(theirs, dict.fromkeys(name.rpartition(".")[0] for name in network.state_dict()), strict=True))


def import_network(path: Path, name: str) -> tuple[dict[str, Tensor], Metadata]:
    """Return a published network as a checkpoint of ours holds it; raises Refused."""
    stage = Stage(path.stem if re.fullmatch(NAME, path.stem) else "imported", network=name)
    tensors = read_published(path, build_network(stage))
    unknown = Tested(stage.epochs, None, None)
    with open(path, "rb") as file:
        origin = Origin(path.name, hashlib.file_digest(file, "sha256").hexdigest())
    return tensors, Metadata(stage, (), stage.epochs, unknown, unknown, imported=origin)


# -------------------------------------------------------------------------------------------------------------- ONNX
# A network as an ONNX file that is as small as its values, quantised or not, and such a file read again.


def to_onnx(network: EfficientNet) -> Any:
    """Return an ONNX model of a network, `images` (N, 3, side, side) to `logits` (N, K); all its layers have a bias."""
    from onnx import numpy_helper

    example, batch = example_of(network)
    names = {"input_names": ["images"], "output_names": ["logits"], "dynamic_shapes": batch}
    model = torch.onnx.export(network, example, dynamo=True, verbose=False, **names).model_proto
    sizes = {each.name: each.dims[0] for each in model.graph.initializer if each.dims}
    for node in model.graph.node:
        if node.op_type in ("Conv", "Gemm") and len(node.input) < 3:  # zeros, which the exporter leaves out
            node.input.append(f"{node.input[1]}.bias")
            zeros = torch.zeros(sizes[node.input[1]]).numpy()
            model.graph.initializer.append(numpy_helper.from_array(zeros, node.input[2]))
    return model


CALIBRATED_ON, CALIBRATED_BY = 1000, 10  # images at most; over so many a range is taken, and these are averaged
LEAST_RANGE = 0.01  # of weights or activations: else a channel of zeros has steps of 1, too coarse for its bias


def quantized(
    model: bytes,
    pixels: Tensor,  # (N, 3, H, W) uint8
    watch: Watch = unwatched,
) -> Any:
    """Return an ONNX model with weights and activations of 8 bits, scaled by what they are on some images.

    By onnxruntime's static quantisation: weights by channel, activations by the least and the greatest value in ten
    images, averaged over all tens, as the farthest value of all would make all steps coarse.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_static

    batches = watch(pixels.split(CALIBRATED_BY), "calibrating")
    images = ({"images": normalize(batch.float() / 255).contiguous().numpy()} for batch in batches)
    reader = SimpleNamespace(get_next=functools.partial(next, images, None))
    ranges = {"CalibMovingAverage": True, "MinimumRealRange": LEAST_RANGE}
    how = {"per_channel": True, "activation_type": QuantType.QUInt8, "extra_options": ranges}
    with tempfile.TemporaryDirectory() as folder:
        source, target = f"{folder}/float.onnx", f"{folder}/int8.onnx"
        Path(source).write_bytes(model)
        logging.disable()  # what it says of pre-processing, which the exporter has done
        try:
            quantize_static(source, target, reader, **how)
        finally:
            logging.disable(logging.NOTSET)
        return onnx.load(target)


def latencies(files: list[bytes], pixels: Tensor) -> list[float]:
    """Return how long onnxruntime takes for an image (1, 3, H, W) by each file, in ms: medians of runs in turns."""
    image = normalize(pixels.float() / 255)
    runs = [functools.partial(run_onnx, open_onnx(Path("image"), content), image) for content in files]
    times = [[1000 * timeit.timeit(run, number=1) for run in runs] for _ in range(110)]
    return [statistics.median(each[10:]) for each in zip(*times)]


def pack_onnx(model: Any, bits: int) -> None:
    """Keep an ONNX model's weights at some bits, one after the other; sparse ones as `pack` does, behind one mask.

    Runtimes unpack them when they load the model. At 8 bits those that are not sparse stay as other tools expect them.
    """
    from onnx import TensorProto, helper, numpy_helper, parser

    graph, kind = model.graph, TensorProto.FLOAT if bits == 16 else TensorProto.INT8
    held = {each.name: each for each in graph.initializer if each.data_type == kind}
    weights = {name: onnx_tensor(each).half() if bits == 16 else onnx_tensor(each) for name, each in held.items()}
    sparse = {name: weight for name, weight in weights.items() if weight.ndim > 1 and stored(weight)[1]}
    rest = {name: weight for name, weight in weights.items() if name not in sparse and bits == 16}
    tensors, nodes = {}, []
    if sparse:
        joined = torch.cat([weight.flatten() for weight in sparse.values()])  # sparse, too, as each of them is
        packed = pack({"values": joined[None]})  # which packs what has more dimensions than one
        values = F.pad(packed["values"], (0, 1))  # what positions after the last value look up, and do not take
        tensors |= {"values": values, "mask": packed["values" + MASK]}
        nodes.append(helper.make_node("Unpack", [*tensors], ["unpacked"], domain="micronet"))
        nodes.append(helper.make_node("Cast", ["unpacked"], ["sparse"], to=kind))
        opset = next(each.version for each in model.opset_import if not each.domain)
        model.functions.append(parser.parse_function(UNPACK.replace("OPSET", f"{opset}")))
        model.opset_import.append(helper.make_opsetid("micronet", 1))
    if rest:
        tensors["rest.16"] = torch.cat([weight.flatten() for weight in rest.values()])
        nodes.append(helper.make_node("Cast", ["rest.16"], ["rest"], to=kind))
    for joined, part in {"sparse": sparse, "rest": rest}.items():
        sizes = {name + ".flat" if weight.ndim > 1 else name: weight.numel() for name, weight in part.items()}
        if joined == "sparse" and (past := -sum(sizes.values()) % 8):
            sizes["past"] = past  # a mask ends with a byte
        if sizes:
            tensors[joined + ".sizes"] = torch.tensor([*sizes.values()])
            nodes.append(helper.make_node("Split", [joined, joined + ".sizes"], [*sizes]))
    for name, weight in (sparse | rest).items():
        graph.initializer.remove(held[name])
        if weight.ndim > 1:
            tensors[shape := f"{[*weight.shape]}"] = torch.tensor(weight.shape)
            nodes.append(helper.make_node("Reshape", [name + ".flat", shape], [name]))
    graph.initializer.extend(numpy_helper.from_array(tensor.numpy(), name) for name, tensor in tensors.items())
    for node in reversed(nodes):
        graph.node.insert(0, node)


UNPACK = """<domain: "micronet", opset_import: ["": OPSET]>
Unpack (values, mask) => (dense) {
    bits = Constant <value = uint8[8] {128, 64, 32, 16, 8, 4, 2, 1}> ()
    column = Constant <value = int64[2] {-1, 1}> ()
    flat = Constant <value = int64[1] {-1}> ()
    axis = Constant <value = int64 {0}> ()
    nil = Constant <value = float {0}> ()
    bytes = Reshape (mask, column)
    set = BitwiseAnd (bytes, bits)
    truth = Cast <to = 9> (set)
    found = Reshape (truth, flat)
    ones = Cast <to = 6> (found)
    rank = CumSum <exclusive = 1> (ones, axis)
    wide = Cast <to = 1> (values)
    spread = Gather (wide, rank)
    dense = Where (found, spread, nil)
}"""


def shorten(model: Any) -> None:
    """Take what no runtime needs out of an ONNX model: long names, shapes between nodes, defaults.

    And of what is quantised zero points of zero, and the scales of biases, which are computed: inputs' times weights'.
    """
    from onnx import helper

    graph, version = model.graph, next(each.version for each in model.opset_import if not each.domain)
    held = {each.name: each for each in graph.initializer}
    made = {name: node for node in graph.node for name in node.output}
    wanted = {node.input[1] for node in graph.node if node.op_type == "Gemm"}  # or onnxruntime would not fuse it
    scales = []
    for node in graph.node:
        drop_defaults(node, version)
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and node.output[0] not in wanted:
            if not onnx_tensor(held[node.input[2]]).any():
                del node.input[2]  # one that quantises is then of uint8, as all of them are
        if node.op_type in ("Conv", "Gemm") and made[node.input[2]].op_type == "DequantizeLinear":
            inputs, weight, bias = (made[name].input for name in node.input)
            scales.append(helper.make_node("Mul", [inputs[1], weight[1]], [bias[1]]))
            graph.initializer.remove(held.pop(bias[1]))
    for node in reversed(scales):
        graph.node.insert(0, node)
    del graph.value_info[:], graph.metadata_props[:], model.metadata_props[:]
    used = {name for node in graph.node for name in node.input}
    for name in held.keys() - used:
        graph.initializer.remove(held[name])
    names = {kept: kept for kept in ("", "images", "logits")}
    for each in graph.initializer:
        each.name = names.setdefault(each.name, f"{len(names):x}")
    for node in graph.node:
        for ends in (node.input, node.output):
            ends[:] = [names.setdefault(name, f"{len(names):x}") for name in ends]


def drop_defaults(node: Any, version: int) -> None:
    """Take out of a node of an ONNX graph what it is called, and attributes that say what goes without saying."""
    from onnx import defs

    node.ClearField("metadata_props")
    node.ClearField("name")
    defaults = {} if node.domain else defs.get_schema(node.op_type, version, "").attributes
    neutral = {"strides": {1}, "dilations": {1}, "pads": {0}}  # which no schema knows, as their length varies
    for each in list(node.attribute):
        default = each.name in defaults and each == defaults[each.name].default_value
        inferred = node.op_type == "Conv" and each.name == "kernel_shape"
        if default or inferred or neutral.get(each.name) == {*each.ints}:
            node.attribute.remove(each)


def onnx_tensor(tensor: Any) -> Tensor:
    """Return what an initializer of an ONNX graph holds."""
    from onnx import numpy_helper

    return torch.from_numpy(numpy_helper.to_array(tensor).copy())


def read_onnx(path: Path) -> tuple[bytes, Any, Metadata]:
    """Return an ONNX file of this program's, onnxruntime's session of it and what explains it; raises Failure."""
    check_packages(path, "onnxruntime")
    content = read_beginning(path, MOST)[0]
    session = open_onnx(path, content)
    try:
        explained = session.get_modelmeta().custom_metadata_map.get("micronet", "")
        about = parse_metadata(path, json.loads(explained, object_pairs_hook=once))
    except ValueError:
        raise Refused(f"{path}: not exported by micronet") from None
    shapes = [each.shape[1:] for each in (*session.get_inputs(), *session.get_outputs())]
    if shapes != [[3, about.stage.side, about.stage.side], [about.stage.classes]]:
        raise Refused(f"{path}: its metadata are of another network")
    return content, session, about


def onnx_operations(path: Path, content: bytes, bits: int, stage: Stage) -> list[Operation]:
    """Return the operations of a network that was exported to ONNX, with the file's weights; raises Failure.

    The runtime unpacks those: they become outputs, of which one run returns the values.
    """
    check_packages(path, "onnx", "onnxruntime")
    import onnx

    model, found = onnx.load_model_from_string(content), operations(fold_network(build_network(stage)))
    layers = [each.what for each in found if isinstance(each.what, nn.Conv2d | nn.Linear)]
    made = {name: node for node in model.graph.node for name in node.output}
    names = [name for node in model.graph.node if node.op_type in ("Conv", "Gemm") for name in node.input[1:]]
    scaled = [name in made and made[name].op_type == "DequantizeLinear" for name in names]
    if bits == 8 and all(scaled):  # before they are
        names = [made[name].input[0] for name in names]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    image = {"images": torch.zeros(1, 3, stage.side, stage.side).numpy()}
    tensors = [torch.from_numpy(array) for array in open_onnx(path, model.SerializeToString()).run(names, image)]
    empty = [tensor for layer in layers for tensor in (layer.weight, layer.bias)]
    if [tensor.shape for tensor in tensors] != [tensor.shape for tensor in empty] or {*scaled} != {bits == 8}:
        raise Refused(f"{path}: its metadata are of another network")
    for layer, weight, bias in zip(layers, tensors[::2], tensors[1::2]):
        layer.weight, layer.bias = (nn.Parameter(each, requires_grad=False) for each in (weight, bias))
    return found


def open_onnx(path: Path, content: bytes) -> Any:
    """Return onnxruntime's session of an ONNX file; raises Refused."""
    import onnxruntime

    try:
        return onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    except Exception as error:  # of which onnxruntime has many
        raise Refused(f"{path}: {' '.join(str(error).split())[:200]}") from None


def run_onnx(session: Any, images: Tensor) -> Tensor:
    return torch.from_numpy(session.run(None, {"images": images.contiguous().numpy()})[0])


# --------------------------------------------------------------------------------------------------------- Processes
# What the processes of a run are, on one machine or several, and what they tell each other.


def open_accelerator(timeout: float = 600, tracker: str | None = None, logging_dir: Path | None = None) -> Accelerator:
    """Return the accelerator that the launch asked for; raises Misconfigured where it cannot be had.

    Without a GPU the processes that a launch configuration asks for train on the CPU. A process that waits for
    another one longer than `timeout` seconds fails. A tracker that writes files writes them in `logging_dir`.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
    from accelerate.tracking import LoggerType, get_available_trackers

    trackers = [kind.value for kind in LoggerType if kind != LoggerType.ALL]
    if tracker and tracker not in trackers:
        raise Misconfigured(f"--log-with {shown(tracker)}: expected one of {', '.join(trackers)}")
    if tracker and LoggerType(tracker) not in get_available_trackers():
        raise Misconfigured(f"--log-with {tracker}: its package is missing: pip install {tracker}")
    launched, local = (int(os.environ.get(name, 1)) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    gpus = torch.cuda.device_count()
    if 0 < gpus < local and os.environ.get("ACCELERATE_USE_CPU", "false").lower() not in ("1", "true"):
        raise Misconfigured(f"launched as {local} processes on {gpus} GPU: launch at most one a GPU, or use `chain`")
    handlers = [
        DistributedDataParallelKwargs(gradient_as_bucket_view=True),
        InitProcessGroupKwargs(timeout=timedelta(seconds=timeout)),
    ]
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(), kwargs_handlers=handlers, log_with=tracker, project_dir=logging_dir
    )
    if accelerator.num_processes != launched:
        raise Misconfigured(f"launched as {launched} processes, but accelerate sees {accelerator.num_processes}")
    if accelerator.distributed_type.value not in ("NO", "MULTI_GPU", "MULTI_CPU"):
        raise Misconfigured(
            f"distributed_type {accelerator.distributed_type.value}: expected NO, MULTI_GPU or MULTI_CPU"
        )
    if accelerator.mixed_precision not in ("no", "bf16", "fp16"):
        raise Misconfigured(f"mixed_precision {accelerator.mixed_precision}: expected no, bf16 or fp16")
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise Misconfigured("mixed_precision fp16 needs a GPU: expected no or bf16 on a CPU")
    return accelerator


def together(act: Callable[[], Any]) -> Any:
    """Return what `act` returns in this process; raises the first Failure or OSError of any in all, so none waits."""
    result, failure = None, None
    try:
        result = act()
    except (Failure, OSError) as error:
        failure = Unwritable(in_words(error)) if isinstance(error, OSError) else error
    found = from_all(failure)
    for machine, first in found:
        if first and len({machine for machine, _ in found}) > 1:
            first.args = (f"{machine}: {first}",)
        if first:
            raise first
    return result


def in_main(accelerator: Accelerator, act: Callable[[], Any]) -> Any:
    """Return, in every process, what `act` returns in the main one, which alone reads and writes checkpoints."""
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([together(act if accelerator.is_main_process else lambda: None)])[0]


def check_alike(facts: dict[str, Any]) -> None:
    """Raise Misconfigured in all processes where one, of another machine perhaps, starts from other facts, by name."""
    (main, expected), *others = from_all(facts)
    for machine, found in others:
        for name in facts:
            if found[name] != expected[name]:
                raise Misconfigured(f"{machine}: another {name} than on {main}, which keeps the checkpoints")


def from_all(value: Any) -> list[tuple[str, Any]]:
    """Return what all processes call this with, the main one's first, each after its machine, as messages name it."""
    from accelerate.utils import gather_object

    return gather_object([(f"machine {os.environ.get('GROUP_RANK', 0)} ({platform.node()})", value)])


def is_launched() -> bool:
    """Tell whether `accelerate launch` or torchrun started this process: any variable of theirs may be the user's."""
    with suppress(OSError):
        command = Path("/proc", str(os.getppid()), "cmdline").read_text(errors="replace").split("\0")
        names, modules = ("accelerate", "accelerate-launch", "torchrun"), ("accelerate.commands.", "torch.distributed.")
        return any(Path(word).name in names or word.startswith(modules) for word in command)
    return False


# ---------------------------------------------------------------------------------------------------------- Training
# One visible loop. It yields events and knows nothing of who looks at them.


@dataclass
class Run:
    """All that a stage trains with, on the training device."""

    accelerator: Accelerator
    train: Images
    test: Images
    student: EfficientNet  # the bare network, as evaluated and saved
    optimizer: torch.optim.Optimizer
    model: nn.Module  # the student as accelerate prepared it: autocast, DDP, compiled
    cost: Cost
    facts: Facts
    images: dict[str, str] = field(default_factory=dict)  # SHA-256 of `train` and `test`
    teacher: nn.Module | None = None
    parents: dict[str, Parent] = field(default_factory=dict)
    history: list[Record] = field(default_factory=list)
    best: Record | None = None  # of the history, the first of equals; the last while the stage prunes
    best_network: str = ""  # SHA-256 of its tensors, once it is kept
    written: Metadata | None = None  # of last.safetensors, as this run found or wrote it
    notes: list[str] = field(default_factory=list)  # what the user must know before it goes on


class Started(NamedTuple):
    """A stage begins, or goes on."""

    stage: Stage
    facts: Facts
    cost: Cost
    parents: dict[str, Parent]
    history: list[Record]  # of the epochs that are done
    notes: list[str]


class Stepped(NamedTuple):
    """An optimiser step is under way on the device."""

    epoch: int
    step: int  # of the epoch, from 1
    lr: float
    totals: Tensor  # (2,) sums over this process's images of the epoch so far: loss, top-1 hits
    images: int  # this process's images of the epoch so far


class EpochDone(NamedTuple):
    """An epoch is trained and evaluated."""

    record: Record
    best: Record  # so far


Event = Started | Stepped | EpochDone


def train_stage(stage: Stage, run: Run) -> Iterator[Event]:
    """Train a stage from where `run.history` ends; yields events, each EpochDone after the run is up to date.

    Raises NotFinite before an epoch that came to nan or infinity is done.
    """
    accelerator, device = run.accelerator, run.accelerator.device
    processes, process = accelerator.num_processes, accelerator.process_index
    parts = accelerator.gradient_accumulation_steps
    share = stage.batch_size // (parts * processes)  # images per process and forward pass
    yield Started(stage, run.facts, run.cost, run.parents, list(run.history), run.notes)

    for epoch in range(len(run.history) + 1, stage.epochs + 1):
        start = time.monotonic()
        torch.manual_seed(stream_seed(stage.seed, stage.name, epoch, process))  # stochastic depth
        plan = plan_epoch(stage, epoch).each(lambda t: t.view(-1, parts, processes, share)[:, :, process].to(device))
        totals, bad = torch.zeros(2, device=device), torch.zeros((), dtype=torch.int64, device=device)
        if renewed := epoch <= stage.prune_epochs:  # which is 1 where nothing is pruned
            reset_statistics(run.student)
        pruned, masks = prune(run.student, sparsity_at(stage, epoch))
        run.model.train()
        for step in range(stage.steps_per_epoch):
            lr = learning_rate(stage, (epoch - 1) * stage.steps_per_epoch + step)
            for group in run.optimizer.param_groups:
                group["lr"] = lr
            for part in range(parts):
                how = plan.each(lambda t: t[step, part])
                images, labels = augment(run.train.pixels[how.image], how), run.train.labels[how.image]
                with accelerator.accumulate(run.model):
                    cosines = run.model(images)
                    if run.teacher is None:
                        loss = margin_loss(cosines, labels, stage.scale, stage.margin)
                    else:
                        with torch.no_grad(), accelerator.autocast():
                            teacher_cosines = run.teacher(images)
                        loss = refined_loss(cosines, teacher_cosines, stage.scale)
                    accelerator.backward(loss)
                    run.optimizer.step()
                    run.optimizer.zero_grad()
                hits = (cosines.detach().argmax(1) == labels).sum()
                totals += torch.stack([loss.detach() * len(labels), hits])
                bad = torch.where((bad == 0) & ~loss.detach().isfinite(), step + 1, bad)
            if pruned:
                with torch.no_grad():
                    torch._foreach_mul_(pruned, masks)  # whatever the gradient says
            if step % 100 == 99:
                check_steps(stage, epoch, bad)
            yield Stepped(epoch, step + 1, lr, totals, (step + 1) * parts * share)

        check_steps(stage, epoch, bad)
        average_statistics(run.student, accelerator)
        if renewed:
            debias_statistics(run.student)
        loss, hits = accelerator.reduce(totals, "sum").tolist()  # sync
        seconds, seen = time.monotonic() - start, stage.steps_per_epoch * stage.batch_size
        with accelerator.autocast():
            totals = evaluate(run.student, run.test.part(process, processes), stage.scale)
        top1, top5, test_loss = accuracy(accelerator.reduce(totals, "sum"), stage.test_size)
        state = run.student.state_dict().values()
        if not math.isfinite(loss + test_loss) or not all(tensor.isfinite().all() for tensor in state):
            bad.fill_(stage.steps_per_epoch)
        check_steps(stage, epoch, bad)
        record = Record(
            epoch=epoch,
            lr=lr,
            train_loss=loss / seen,
            train_top1=100 * hits / seen,
            test_loss=test_loss,
            test_top1=top1,
            test_top5=top5,
            seconds=time.monotonic() - start,
            images_per_second=seen / seconds,
        )
        run.history.append(record)
        if renewed or record.test_top1 > run.best.test_top1:  # no denser network is the best
            run.best = record
        yield EpochDone(record, run.best)


def check_steps(stage: Stage, epoch: int, bad: Tensor) -> None:
    """Raise NotFinite if `bad` holds the number of a step that came to nan or infinity, 0 being none."""
    if step := int(bad):  # sync
        where = f"epoch {epoch}, step {step} of {stage.steps_per_epoch}"
        raise NotFinite(
            f"stage {stage.name}: nan or infinity in {where}: what is kept ends with epoch {epoch - 1}; try a lower lr"
        )


def average_statistics(network: nn.Module, accelerator: Accelerator) -> None:
    """Give all processes the mean of their batch-norm statistics."""
    for buffer in network.buffers():
        if buffer.is_floating_point():
            buffer.copy_(accelerator.reduce(buffer, "mean"))


def sparsity_at(stage: Stage, epoch: int) -> float:
    """Return the share of a stage's weights that is zero in an epoch [10]."""
    return stage.sparsity * (1 - (1 - min(1, epoch / stage.prune_epochs)) ** 3)


def prune(network: nn.Module, sparsity: float) -> tuple[list[Tensor], list[Tensor]]:
    """Set the least important of a network's weights to zero; return what may be pruned and masks of what is not.

    Of convolutions and linear layers but the first, ranked over all layers by LAMP, each value's square over the sum
    of those in its layer that are not smaller, among equals that come later [11]: in float64 on the CPU, so that all
    processes and a resumed run prune the same ones. A zero stays one, so that no mask need be kept. Returns empty
    lists at 0.
    """
    if not sparsity:
        return [], []
    weights = [m.weight for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)][1:]
    ranks = []
    for weight in weights:
        squares, order = weight.detach().cpu().double().flatten().square().sort(stable=True)
        ranks.append(torch.empty_like(squares))
        ranks[-1][order] = squares / squares.flip(0).cumsum(0).flip(0).clamp(min=torch.finfo(torch.double).tiny)
    every = torch.cat(ranks)
    kept = every > 0
    kept[every.argsort(stable=True)[: round(sparsity * len(every))]] = False
    each = zip(weights, kept.split([weight.numel() for weight in weights]))
    masks = [torch.empty_like(weight).copy_(mask.view(weight.shape)) for weight, mask in each]  # laid out alike
    with torch.no_grad():
        torch._foreach_mul_(weights, masks)
    return weights, masks


def reset_statistics(network: nn.Module) -> None:
    """Begin batch norm's running statistics anew: those of a network that has just been changed are another's."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()


def debias_statistics(network: nn.Module) -> None:
    """Take what batch norm's running statistics began with, mean 0 and variance 1, out of them.

    After t batches they still hold (1 - momentum)^t of it: nothing in a long epoch, but enough to spoil every test of
    a short one. Called once after `reset_statistics` or the beginning, it leaves them a weighted mean of what was
    seen, and later batches keep them one.
    """
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            left = (1 - module.momentum) ** module.num_batches_tracked
            module.running_mean.div_(1 - left)
            module.running_var.sub_(left).div_(1 - left)


def evaluate(network: nn.Module, images: Images, scale: float) -> Tensor:  # (3,) sums: top-1 hits, top-5 hits, loss
    """Test a network on images as they are, without crop or flip; the network is left in evaluation mode."""
    network.eval()
    n = tested_at_once(images.pixels)
    with torch.no_grad():
        batches = zip(images.pixels.split(n), images.labels.split(n))
        return sum(tally(network(normalize(pixels.float() / 255)), labels, scale) for pixels, labels in batches)


def tally(cosines: Tensor, labels: Tensor, scale: float) -> Tensor:  # (3,) as `evaluate`
    """Count how often the true class is the likeliest, and one of the five that are, and sum the cross-entropy up."""
    hits = cosines.topk(min(5, cosines.shape[1])).indices == labels[:, None]  # (N, 5)
    return torch.stack([hits[:, 0].sum(), hits.sum(), F.cross_entropy(scale * cosines, labels, reduction="sum")])


def accuracy(totals: Tensor, images: int) -> tuple[float, float, float]:
    """Turn the sums of `evaluate` over so many images into top-1 and top-5 in percent and the mean loss."""
    top1, top5, loss = totals.tolist()  # sync
    return 100 * top1 / images, 100 * top5 / images, loss / images


def evaluate_checkpoint(path: Path, data: Path, precision: Precision, watch: Watch, classes: bool) -> dict[str, Any]:
    """Return how a checkpoint does, on every class if `classes`, on a GPU if there is one; raises Refused."""
    tensors, about = load_checkpoint(path)
    stage, network = about.stage, network_from(path, tensors, about)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images = load_images(stage, data, "test", watch).to(device)
    low = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    with torch.autocast(device.type, low, enabled=low is not None):
        cosines = outputs(path, network.to(device), images.pixels, watch)
    top1, top5, loss = accuracy(tally(cosines, images.labels, stage.scale), len(images.labels))
    found = {"checkpoint": str(path), "network": stage.network, "dataset": stage.dataset, "images": len(images.labels)}
    found |= {"precision": precision, "top1": top1, "top5": top5}
    found["loss"] = None if about.exported else loss  # an export's outputs are no cosines: a loss has no meaning
    return found | ({"classes": class_results(cosines.argmax(1), images)} if classes else {})


def class_results(
    predicted: Tensor,  # (N,)
    images: Images,
) -> list[dict[str, Any]]:
    """Return the accuracy on every class that has images and what it is most often taken for, the worst first."""
    k = len(images.class_names)
    matrix = torch.bincount(images.labels * k + predicted, minlength=k * k).view(k, k).tolist()
    results = []
    for i, row in enumerate(matrix):
        if total := sum(row):
            times, j = max((n, -j) for j, n in enumerate(row) if j != i)
            wrong = {"taken_for": images.class_names[-j] if times else None, "times": times}
            results.append({"class": images.class_names[i], "images": total, "top1": 100 * row[i] / total, **wrong})
    return sorted(results, key=operator.itemgetter("top1"))


def open_run(
    stage: Stage, data: Path, ckpt: Path, accelerator: Accelerator, state: State | None, watch: Watch = unwatched
) -> Run:
    """Put data, student, teacher and optimiser on the device, as a state left them or as the stage begins."""
    shares = accelerator.gradient_accumulation_steps * accelerator.num_processes
    if stage.batch_size % shares:
        words = f"{accelerator.num_processes} processes x {accelerator.gradient_accumulation_steps} accumulation steps"
        raise Misconfigured(
            f"stage {stage.name}: batch_size = {stage.batch_size}: expected a multiple of {shares} ({words})"
        )
    found = in_main(accelerator, lambda: [load_parent(stage, role, ckpt, state) for role in ROLES])
    (teacher, _), (start, _) = found
    # one process downloads, see `download`
    parts = ("train", stage.tested_on)
    train, test = together(lambda: [load_images(stage, data, part, watch) for part in parts])
    images = {"train": images_digest(train), stage.tested_on: images_digest(test)}
    check_alike({f"content of {stage.dataset}": images})
    if (len(train.labels), len(test.labels)) != (stage.train_size, stage.test_size) or (
        state and state.metadata.images != images
    ):
        raise Refused(
            f"stage {stage.name}: the images of {stage.dataset} have changed since it began, or Pillow reads them "
            f"differently: restore them, or train it anew (chain {stage.name} --restart)"
        )
    run = new_run(stage, accelerator, train, test, start)
    run.images = images
    run.teacher = place_teacher(teacher, accelerator) if teacher else None
    run.parents = {role: parent for role, (_, parent) in zip(ROLES, found) if parent}
    if state:
        restore(run, state)
        in_main(accelerator, lambda: go_on(run, ckpt / stage.name, state))
    return run


def images_digest(images: Images) -> str:
    """Return the SHA-256, in hex, of pixels, labels and class names."""
    tensors = {"pixels": images.pixels, "labels": images.labels}
    return hashlib.sha256(f"{digest(tensors)} {images.class_names}".encode()).hexdigest()


def go_on(run: Run, folder: Path, state: State) -> None:
    """Make a stage's folder what the state says that a run goes on from; raises Refused where that cannot be done."""
    found = fallen_back(folder, state)
    settle(folder, found, thorough=True)
    about, last = found.metadata, last_paths(folder)[0]
    run.best, run.best_network = about.history[about.best.epoch - 1], about.best_network
    run.written = about if state.path == last else None
    run.notes = [f"WARNING: {reason}" for reason in state.refused]
    if about.best != state.metadata.best:
        lost, best = state.metadata.best.epoch, about.best.epoch
        run.notes.append(
            f"WARNING: the network of epoch {lost}, the best, is gone with it: epoch {best} counts as the best so far"
        )
    run.notes += environment_changes(about, run.facts)


def environment_changes(kept: Metadata, facts: Facts) -> list[str]:
    """Say what has changed since a stage was last at work; the result will not have the bits that it would have had."""
    was, now = (each._asdict() | {"torch": each.versions.get("torch")} for each in (kept.facts, facts))
    changed = [name for name in was if name not in ("versions", "commit") and was[name] != now[name]]
    return [f"changed since epoch {kept.epoch}: {name} was {was[name]} and is {now[name]}" for name in changed]


def new_run(
    stage: Stage, accelerator: Accelerator, train: Images, test: Images, start: EfficientNet | None = None
) -> Run:
    """Return a run that begins, with fresh weights or those of another network, and no teacher yet."""
    device = accelerator.device
    torch.manual_seed(stream_seed(stage.seed, stage.name, "weights"))
    student = build_network(stage, stage.stochastic_depth)
    if start:
        if stage.sparsity:
            fold_classifier(start, embedding_length(start, train.pixels[:500]))
        student.load_state_dict(start.state_dict())
    cost = total_cost(layer_costs(student, "seed").values())
    student.to(device)
    optimizer = torch.optim.SGD(
        student.parameters(), learning_rate(stage, 0), momentum=stage.momentum, weight_decay=stage.weight_decay
    )
    model, prepared = accelerator.prepare(student, optimizer)
    wrapper = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    if isinstance(wrapper, nn.parallel.DistributedDataParallel):
        wrapper.broadcast_buffers = False  # each process keeps its statistics; see average_statistics
    train, test = train.to(device), test.to(device)
    return Run(accelerator, train, test, student, prepared, model, cost, run_facts(accelerator))


def embedding_length(network: EfficientNet, pixels: Tensor) -> float:
    """Return the mean length of a network's embeddings of images, 1 where its classifier is folded."""
    if not isinstance(network.cosine, Cosine):
        return 1.0
    return outputs(Path("start"), nn.Sequential(*list(network.eval())[:-1]), pixels).norm(dim=1).mean().item()


def restore(run: Run, state: State) -> None:
    """Bring a run to where a state stands: weights, momentum, history and the loss scale of fp16; raises Refused."""
    fill_network(state.path, run.student, state.tensors)
    for name, parameter in run.student.named_parameters():
        if MOMENTUM + name in state.tensors:  # laid out like the weight, which is channels_last
            momentum = torch.empty_like(parameter).copy_(state.tensors[MOMENTUM + name])
            run.optimizer.state[parameter]["momentum_buffer"] = momentum
    if run.accelerator.scaler and state.metadata.scaler:
        run.accelerator.scaler.load_state_dict(state.metadata.scaler)
    run.history = list(state.metadata.history)
    run.best = run.history[state.metadata.best.epoch - 1]


def save_epoch(folder: Path, stage: Stage, run: Run) -> None:
    """Keep the epoch that a run has just finished: last.safetensors, and after it what follows from it.

    A run that is cut off in between finds the best network in last.safetensors, or where it was.
    """
    folder.mkdir(parents=True, exist_ok=True)
    network = {name: tensor.detach().cpu() for name, tensor in run.student.state_dict().items()}
    if run.best is run.history[-1]:
        run.best_network = digest(network)
    state = run.optimizer.state
    momentum = {MOMENTUM + n: state[p]["momentum_buffer"] for n, p in run.student.named_parameters() if p in state}
    last, previous = last_paths(folder)
    run.written = save_checkpoint(last, network | momentum, explain(stage, run), previous)
    settle(folder, State(last, network, run.written), thorough=len(run.history) == stage.epochs)


def explain(stage: Stage, run: Run) -> Metadata:
    """Return the metadata of the state that a run has come to."""
    return Metadata(
        stage=stage,
        class_names=tuple(run.train.class_names),
        epoch=run.history[-1].epoch,
        best=tested_at(run.best),
        last=tested_at(run.history[-1]),
        history=tuple(run.history),
        **run.parents,
        cost=run.cost,
        facts=run.facts,
        images=run.images,
        scaler=run.accelerator.scaler.state_dict() if run.accelerator.scaler else None,
        best_network=run.best_network,
    )


def load_parent(stage: Stage, role: str, ckpt: Path, state: State | None) -> tuple[EfficientNet | None, Parent | None]:
    """Return the network of a stage's teacher or start and what the stage records of it; raises Failure if not ready.

    Raises Refused, too, where it is not the one that the stage began with. A stage that goes on needs no start.
    """
    began = state.metadata.parents.get(role) if state else None
    if role not in stage.parents or (began and role == "start"):
        return None, began
    path = find_parent(stage, role, ckpt)
    tensors, about = load_checkpoint(path)
    parent = Parent(stage.parents[role], about.stage.name, about.tensors, about.tested)
    if began and began.identity != parent.identity:
        raise Refused(
            f"{path}: the {role} has changed since stage {stage.name} began: expected {began.tensors[:12]}... of "
            f"stage {began.stage}, found {parent.tensors[:12]}... of {parent.stage}; use the old one or --restart"
        )
    return network_from(path, tensors, about), parent


def place_teacher(teacher: nn.Module, accelerator: Accelerator) -> nn.Module:
    """Freeze a teacher on the training device, compiled as the student is; accelerate itself must not prepare it.

    Its batch norms are folded: a seventh less time on a CPU, and the labels differ by rounding alone. Its activations
    and gates work in place, since no gradient needs what they read: 2 to 20 % less again, and the same bits.
    """
    teacher = fold_batch_norms(teacher).requires_grad_(False).to(accelerator.device)
    for module in teacher.modules():
        if isinstance(module, nn.SiLU | SqueezeExcitation):
            module.inplace = True
    plugin = accelerator.state.dynamo_plugin
    return teacher if plugin.backend.value == "NO" else torch.compile(teacher, **plugin.to_kwargs())


def run_facts(accelerator: Accelerator) -> Facts:
    """Return what a run's result and speed depend on."""
    from importlib.metadata import version

    device, compiled = accelerator.device, accelerator.state.dynamo_plugin.backend.value.lower()
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return Facts(
        device=gpu or f"{device.type.upper()} ({platform.machine()})",
        processes=accelerator.num_processes,
        accumulation=accelerator.gradient_accumulation_steps,
        threads=torch.get_num_threads(),
        instructions=torch.backends.cpu.get_cpu_capability(),
        precision={"no": "fp32"}.get(accelerator.mixed_precision, accelerator.mixed_precision),
        compile=None if compiled == "no" else compiled,
        versions={
            "python": platform.python_version(),
            "torch": torch.__version__,
            **{package: version(package) for package in ("torchvision", "accelerate", "pillow")},
        },
        commit=git_commit(),
    )


def git_commit() -> str | None:
    """Return the commit that this file stands at, with a + if it has changed since, or None where git tracks it not."""
    here = Path(__file__).resolve()
    git = functools.partial(subprocess.run, cwd=here.parent, capture_output=True, check=True)
    try:
        git(["git", "ls-files", "--error-unmatch", here.name])
        return git(["git", "describe", "--always", "--dirty=+", "--abbrev=12"]).stdout.decode().strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or none that tracks it
        return None


# ------------------------------------------------------------------------------------------------------------- Speed
# How fast the training loop is, and where its time goes.


class Clock:
    """Marks between the parts of a step, on the device's own time line: setting one waits for nothing."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.marks: list[tuple[str, Any]] = []

    def mark(self, part: str) -> None:
        """Note that `part` ends here."""
        if self.device.type == "cuda":
            self.marks.append((part, torch.cuda.Event(enable_timing=True)))
            self.marks[-1][1].record()
        else:
            self.marks.append((part, time.perf_counter()))

    def seconds(self) -> list[tuple[str, float]]:
        """Return every part but the first with its time since the mark before it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            return [(part, a.elapsed_time(b) / 1000) for (_, a), (part, b) in zip(self.marks, self.marks[1:])]
        return [(part, b - a) for (_, a), (part, b) in zip(self.marks, self.marks[1:])]


def train_timed(stage: Stage, run: Run, steps: int) -> list[dict[str, float]]:
    """Train some steps and return the seconds of each step after the first, by part and in all (`step`).

    It is the training loop itself that is timed: hooks of its modules and of its optimiser set the marks.
    """
    clock = Clock(run.accelerator.device)
    hooks = [
        run.model.register_forward_pre_hook(lambda *_: clock.mark("views")),
        run.model.register_forward_hook(lambda *_: clock.mark("forward")),
        run.optimizer.optimizer.register_step_pre_hook(lambda *_: clock.mark("backward")),
        run.optimizer.optimizer.register_step_post_hook(lambda *_: clock.mark("optimizer")),
    ]
    if run.teacher:
        hooks += [run.teacher.register_forward_hook(lambda *_: clock.mark("teacher"))]
    stepped = (event for event in train_stage(stage, run) if isinstance(event, Stepped))
    for _ in itertools.islice(stepped, steps):
        clock.mark("rest")
    for hook in hooks:
        hook.remove()
    timed: list[dict[str, float]] = [{}]
    for part, seconds in clock.seconds():
        timed[-1][part] = timed[-1].get(part, 0.0) + seconds  # gradient accumulation repeats parts
        if part == "rest":
            timed.append({})
    return [step | {"step": sum(step.values())} for step in timed[1:-1]]


PARTS = ("views", "teacher", "forward", "backward", "optimizer")  # of a step; backward includes the loss


WARM_UP = 3  # steps that are not timed


def bare_run(stage: Stage, stages: dict[str, Stage], data: Path | None, steps: int) -> tuple[Stage, Run]:
    """Return a stage of so many steps at least and its run, with a teacher that knows nothing; raises Failure.

    On random images where no `data` are named, and on no more than are needed.
    """
    needed = max(stage.batch_size, math.ceil(stage.batch_size * (WARM_UP + steps) / len(stage.views)))
    stage = replace(stage, train_images=min(needed, stage.data.train))
    images = load_images(stage, data, "train") if data else random_images(stage, stage.train_size)
    run = new_run(stage, open_accelerator(), images, images)
    if stage.teacher:
        teacher = stages.get(stage.teacher) or read_metadata(Path(stage.teacher)).stage
        run.teacher = place_teacher(build_network(teacher), run.accelerator)
    return stage, run


def measure_speed(stage: Stage, run: Run, steps: int) -> dict[str, Any]:
    """Return how fast a run trains, as medians over `steps` steps."""
    train_timed(stage, run, WARM_UP)
    timed = train_timed(stage, run, 1 + steps)
    median = {part: statistics.median(step[part] for step in timed) for part in timed[0]}
    names = ("device", "processes", "threads", "precision", "compile")
    return {
        "stage": stage.name,
        "network": stage.network,
        "teacher": stage.teacher,
        **{name: getattr(run.facts, name) for name in names},
        "batch_size": stage.batch_size,
        "images_per_second": stage.batch_size / median["step"],
        "seconds": {part: median.get(part, 0.0) for part in PARTS},
        "peak_memory_mb": peak_memory_mb(run.accelerator.device),
    }


def peak_memory_mb(device: torch.device) -> float:
    """Return the most memory, in MiB, that this process has had on a GPU, or at all where it computes on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


# ------------------------------------------------------------------------------------------------------------- Views
# What a run looks like. A view is a context manager that is called with every event; delete `Dashboard` and its line
# in `choose_view` and everything else still works.


class Plain(AbstractContextManager):
    """A line an epoch, nothing redrawn: for logs, pipes and terminals that cannot."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def __exit__(self, *error: object) -> None:
        pass

    def __call__(self, event: Event) -> None:
        match event:
            case Started():
                self.stage = event.stage
                for line in introduction(event):
                    say(self.console, line)
            case EpochDone():
                say(self.console, epoch_line(self.stage, event))
                if event.record.epoch == self.stage.epochs:
                    say(self.console, conclusion(self.stage, event))


# Colours that can be read on a light and on a dark ground; none says what a sign, a word or a shape does not say.
SIGNS = {  # of a stage's state
    "done": ("✓", "green4"),
    "running": ("►", "bold deep_sky_blue3"),
    "waiting": ("·", "dim"),
    "failed": ("✗", "bold red3"),
    "stopped": ("■", "dark_orange3"),
}
FAINT = "dim"
TESTED, TRAINED, TAUGHT = "bold deep_sky_blue3", FAINT, "magenta3"  # of what a curve shows


class PacedLive(Live):
    """A part of the screen that is redrawn when it is due: four times a second at most, and in 0.5 % of the time."""

    def __init__(self, console: Console, picture: Callable[[], RenderableType]) -> None:
        options = {"auto_refresh": False, "redirect_stderr": False, "vertical_overflow": "crop"}
        self.due, self.size = 0.0, console.size
        super().__init__(console=console, get_renderable=picture, **options)

    def refresh(self) -> None:
        if self.size != self.console.size:  # the terminal has broken the lines of the old picture
            self.console.clear()
            self.size = self.console.size
        super().refresh()

    def redraw(self, since: float) -> None:
        """Redraw, with all that has been done for it `since`."""
        self.refresh()
        now = time.monotonic()
        self.due = now + max(0.25, 200 * (now - since))


class Dashboard(Plain):
    """The chain, the stage at work and its curve in one frame, which at the end stays, or makes room for the next."""

    def __init__(self, console: Console, kept: Collection[Kept], stays: bool = True) -> None:
        super().__init__(console)
        self.kept, self.stays = {each.stage.name: each for each in kept}, stays
        self.bars: RenderableType | None = None
        self.left: float | None = None  # seconds until all stages are done, at the pace of this one

    def __enter__(self) -> Dashboard:
        self.live = PacedLive(self.console, self.picture)
        self.live.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: object) -> None:
        if self.bars:
            ended = "done" if error is None else "stopped" if isinstance(error, Stopped) else "failed"
            self.set(state=ended)
            self.bars, self.left = Text(""), None  # which are of what is still to come
        self.live.stop()

    def set(self, **changes: Any) -> None:
        """Note what the stage at work has come to."""
        name = self.stage.name
        self.kept[name] = replace(self.kept.get(name, Kept(self.stage)), **changes)

    def __call__(self, event: Event) -> None:
        now = time.monotonic()
        match event:
            case Started():
                self.stage, self.teacher = event.stage, event.parents.get("teacher")
                self.said = [*event.notes, in_brief(event)]
                for note in event.notes:  # which the next stage's screen does not show
                    say(self.console, note)
                self.begun = self.stepped = now
                self.between = 0.0  # seconds of testing and saving
                self.steps = len(event.history) * event.stage.steps_per_epoch  # that earlier runs have made
                self.rates, self.timed = deque(maxlen=26), (now, 0)  # images/s, and the end of the last one's time
                self.training, self.counted = trail(event.history), (0, 0, 0.0)  # epoch, images, hits
                self.set(state="running", **({} if event.history else {"metadata": None}))  # --restart begins anew
                self.bars = Text("the first step is under way")
                self.live.refresh()
            case Stepped():
                self.stepped = now
                if now >= self.live.due:
                    self.bars = self.progress(event, now)
                    self.live.redraw(since=now)
            case EpochDone():
                self.between, self.stepped = self.between + now - self.stepped, now
                last, history = event.record, (*self.kept[self.stage.name].history, event.record)
                self.set(metadata=Metadata(self.stage, (), last.epoch, tested_at(event.best), tested_at(last), history))
                if not self.training or self.training[-1][0] < last.epoch - 1:  # faster than the screen
                    self.training += trail([last])
                if last.epoch == self.stage.epochs:
                    self.live.transient = not self.stays
                    say(self.console, conclusion(self.stage, event))

    def progress(self, event: Stepped, now: float) -> Table:
        """Return bars for step and epoch, and how busy the hardware is."""
        loss, hits = event.totals.tolist()  # sync, four times a second at most
        self.note_training(event, hits)
        stage, steps = self.stage, self.stage.steps_per_epoch
        done = (event.epoch - 1) * steps + event.step
        images = (done - self.steps) * stage.batch_size
        rate = images / (now - self.begun)  # evaluations included
        since, before = self.timed
        if now - since >= 5:
            self.rates.append((images - before) / (now - since))
            self.timed = now, images
        left = (stage.epochs * steps - done) * stage.batch_size
        later = sum(other.images_left for name, other in self.kept.items() if name != stage.name)
        self.left = (left + later) / rate
        width = max(6, min(26, self.console.width - 52))
        bars = Table.grid(*(Column(no_wrap=True) for _ in range(4)), padding=(0, 1))
        bar = functools.partial(ProgressBar, width=width)
        trained = f"loss {loss / event.images:.3f}, top-1 {percent(100 * hits / event.images)}"
        bars.add_row("step", bar(steps, event.step), f"{event.step:,}/{steps:,}", trained)
        rest = f"lr {event.lr:.3g}, {duration(left / rate)} left"
        bars.add_row("epoch", bar(stage.epochs, event.epoch - 1), f"{event.epoch:,}/{stage.epochs:,}", rest)
        share, memory = 100 * self.between / (now - self.begun), peak_memory_mb(event.totals.device)
        rates = Text(spark(list(self.rates)[-width:]), "deep_sky_blue3")
        speed = f"{self.rates[-1] if self.rates else rate:,.0f} images/s"
        bars.add_row("speed", rates, speed, f"{share:.0f} % tests, saves; {memory:,.0f} MiB")
        return bars

    def note_training(self, event: Stepped, hits: float) -> None:
        """Add to the training curve what has been trained since its last point, twenty times an epoch."""
        epoch, images, before = self.counted if self.counted[0] == event.epoch else (event.epoch, 0, 0.0)
        spacing = max(1 / 20, self.stage.epochs / 2000)  # epochs
        whole = self.stage.steps_per_epoch * event.images / event.step  # images of this process
        if event.images - images >= spacing * whole:
            middle = (event.images + images) / 2 / whole
            self.training.append((event.epoch - 1 + middle, 100 * (hits - before) / (event.images - images)))
            self.counted = event.epoch, event.images, hits

    def picture(self) -> RenderableType:
        """Return what stands on the screen, no taller than that."""
        if self.bars is None:
            return Text("")
        kept, width = list(self.kept.values()), self.console.width - 5
        room = self.console.height - 6  # two lines are the frame's, three the bars', one stays free
        here = list(self.kept).index(self.stage.name)
        lines = laid_out(kept, here, self.said, width, room - 8)  # a curve's
        plot = curve(self.stage, kept[here].history, self.training, self.teacher, width, min(room - len(lines), 20))
        return framed([SegmentLines(lines, new_lines=True), self.bars, *plot], kept, self.left, width)


def choose_view(console: Console, kept: Collection[Kept], stays: bool = True) -> Plain:
    """Return the dashboard where somebody can watch it, a line an epoch everywhere else."""
    return Dashboard(console, kept, stays) if is_watched(console) else Plain(console)


def is_watched(console: Console) -> bool:
    """Tell whether somebody can see what is redrawn."""
    return console.is_interactive and not console.quiet and console.file.isatty()  # FORCE_COLOR makes no terminal


def framed(parts: list[RenderableType], kept: list[Kept], left: float | None, width: int) -> Panel:
    """Put a frame around a picture of stages that says how many are done, and how many seconds are left.

    It leaves the terminal's last column to the ^C that is echoed there, which would scroll by a line.
    """
    title = f"micronet: {sum(each.state == 'done' for each in kept)} of {count(len(kept), 'stage')} done"
    timed = f"{title}, {duration(left or 0)} left"
    heading = Text(timed if left and len(timed) < width else title, "not dim bold")
    return Panel(Group(*parts), title=heading, title_align="left", border_style="dim", width=width + 4)


def spark(values: list[float]) -> str:
    """Draw each value as a bar from 0 to the largest."""
    return "".join("▁▂▃▄▅▆▇█"[int(7 * value / max(values) + 0.5)] for value in values)


def trail(history: Collection[Record]) -> list[tuple[float, float]]:
    """Return the training curve as far as it is kept: the middle of an epoch, and top-1 in percent."""
    return [(record.epoch - 0.5, record.train_top1) for record in history]


def ticks(low: float, high: float, most: int) -> list[float]:
    """Return three to `most` + 1 evenly spaced round numbers, from `low` or below to `high` or above."""
    steps = (digit * 10.0**power for power in range(-1, 6) for digit in (1, 2, 5))
    step = next(s for s in steps if math.ceil(high / s) - math.floor(low / s) <= most)
    first, last = math.floor(low / step), math.ceil(high / step)
    while last - first < 2:
        first, last = (first - 1, last) if last * step >= 100 else (first, last + 1)
    return [round(n * step, 1) for n in range(first, last + 1)]


class Canvas:
    """Lines of braille characters, two by four dots each; a character has the style of its last dot."""

    DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))  # bits of U+2800, by column and row

    def __init__(self, columns: int, rows: int) -> None:
        self.cells = [[(0, FAINT)] * columns for _ in range(rows)]

    def dot(self, x: int, y: int, style: str) -> None:
        bits, _ = self.cells[y // 4][x // 2]
        self.cells[y // 4][x // 2] = bits | self.DOTS[x % 2][y % 4], style

    def join(self, places: list[tuple[int, int]], style: str, apart: int = 1) -> None:
        """Draw lines from each place to the next, with dots in every column or in those that lie `apart`."""
        for (x0, y0), (x1, y1) in itertools.pairwise(places[:1] + places):
            n = max(abs(x1 - x0), abs(y1 - y0), 1)
            for i in range(n + 1):
                self.dot(round(x0 + (x1 - x0) * i / n) // apart * apart, round(y0 + (y1 - y0) * i / n), style)

    def line(self, y: int, head: str) -> Text:
        """Return a line with what stands before it."""
        runs = itertools.groupby(self.cells[y], key=operator.itemgetter(1))
        drawn = (("".join(chr(0x2800 + bits) for bits, _ in run), style) for style, run in runs)
        return Text.assemble((head, FAINT), *drawn, no_wrap=True)


def curve(
    stage: Stage,
    history: Collection[Record],
    training: list[tuple[float, float]],  # epochs since the start, top-1 in percent
    teacher: Parent | None,
    width: int,
    height: int,
) -> list[Text]:
    """Draw tested top-1 by epoch, and training's dotted, as `height` lines of `width` characters, or none below six.

    Both axes reach as far as there is something to see.
    """
    if height < 6:
        return []
    tested = [(record.epoch, record.test_top1) for record in history]
    level = teacher.tested.top1 if teacher else None
    rows, columns = height - 3, max(2, width - 8)
    values = [top1 for _, top1 in (*tested, *training)] + ([] if level is None else [level])
    marks = ticks(min(values, default=0), max(values, default=100), max(2, rows // 2))
    end = 1
    while end < max((epoch for epoch, _ in (*tested, *training)), default=0):
        end = math.ceil(1.5 * end)
    end = min(end, stage.epochs)

    def across(epoch: float) -> int:
        return round(epoch / end * (2 * columns - 1))

    def down(top1: float) -> int:
        return round((marks[-1] - top1) / (marks[-1] - marks[0]) * (4 * rows - 1))

    canvas = Canvas(columns, rows)
    drops = [] if isinstance(stage.lr, Schedule) else [last for last, _ in stage.lr if last < end]
    for epoch, y in itertools.product(drops, range(0, 4 * rows, 2)):
        canvas.dot(across(epoch), y, FAINT)
    for x in range(0, 2 * columns, 4) if level is not None else ():
        canvas.join([(x, down(level)), (x + 1, down(level))], TAUGHT)
    columnwise = itertools.groupby(training, key=lambda point: across(point[0]) // 2)
    means = [(2 * x, down(statistics.fmean(top1 for _, top1 in points))) for x, points in columnwise]
    canvas.join(means, TRAINED, apart=2)
    places = [(across(epoch), down(top1)) for epoch, top1 in tested]
    canvas.join(places, TESTED)
    for (x, y), i, j in itertools.product(places if columns >= 4 * end else (), (0, 1), (0, 1)):
        canvas.dot(x ^ i, y ^ j, TESTED)  # where there is room, an epoch is a point of four dots

    beside = {down(mark) // 4: f"{mark:g}" for mark in marks}
    below = {across(mark) // 2: f"{mark:g}" for mark in ticks(0, end, max(3, columns // 12)) if mark <= end}
    return [*framed_by_axes(canvas, beside, below), legend(stage.tested_on, level, bool(drops), width)]


def framed_by_axes(canvas: Canvas, beside: dict[int, str], below: dict[int, str]) -> list[Text]:
    """Return a canvas with an axis beside and one below it, whose labels are given by row and by column."""
    rows, columns = len(canvas.cells), len(canvas.cells[0])
    lines = [canvas.line(y, f"{beside.get(y, ''):>5} {'┤' if y in beside else '│'}") for y in range(rows)]
    axis = "".join("┴" if x in below else "─" for x in range(columns))
    labels = list("epoch".ljust(columns + 8))
    for x, label in below.items():
        place = min(7 + x - len(label) // 2, len(labels) - len(label))
        labels[place : place + len(label)] = label
    return lines + [Text(line, FAINT, no_wrap=True) for line in (f"{'':6}└{axis}", "".join(labels))]


def legend(on: Part, level: float | None, drops: bool, width: int) -> Text:
    """Say what a curve's lines are, as far as there is room."""
    line = Text(" " * 7, no_wrap=True)
    for sample, style, words, is_there in (
        ("⠒⠒", TESTED, f" {on} top-1, %", True),
        ("⠂⠂", TRAINED, " training", True),
        ("⠒ ⠒", TAUGHT, f" teacher {level or 0:.2f}", level is not None),
        ("⠅", FAINT, " the rate drops", drops),
    ):
        if is_there and len(line) + len(sample + words) <= width:
            line.append(sample, style).append(words + "  ")
    return line


def as_svg(picture: RenderableType, title: str) -> str:
    """Return what a terminal of 100 columns shows of a picture, as SVG."""
    paper = Screen(record=True, width=100, file=io.StringIO(), force_terminal=True, legacy_windows=False)
    paper.print(picture)
    return paper.export_svg(title=title)


def stages_picture(kept: list[Kept], troubles: list[str], width: int, room: int | None = None) -> RenderableType:
    """Draw a curve for each stage that is kept and, last, where it is seen, their table with troubles, a line each.

    In `room` lines, if that is given, in a frame, with the youngest curve alone, below the table.
    """
    if room is None:
        said = [Text(printable(line)) for line in troubles]
        plots = [line for each in kept for line in (*stage_picture(each, width, 12), Text(""))]
        return Group(*plots, kept_table(kept), *said)
    here = max((i for i, each in enumerate(kept) if each.state == "running"), default=len(kept) - 1)
    width -= 5
    lines = laid_out(kept, here, troubles, width, room - 12)
    plots = stage_picture(kept[here], width, min(20, room - len(lines) - 4)) if kept else []
    left = sum(seconds_left(each.stage, each.history) for each in kept if each.state == "running")
    return framed([SegmentLines(lines, new_lines=True), *plots], kept, left, width)


def laid_out(kept: list[Kept], here: int, said: list[str], width: int, room: int) -> list[list[Segment]]:
    """Return the table of the stages around `kept[here]`, as many as there is room for, and what is said of them."""
    heads = 2 + min(2, len(said))  # lines of headings, and of what is said at least
    most = max(1, min(len(kept), room - heads))
    first = max(0, min(here - most // 2, len(kept) - most))
    parts = Group(kept_table(kept, width, slice(first, first + most)), *(Text(printable(line)) for line in said))
    return Screen(file=io.StringIO(), width=width).render_lines(parts, pad=False)[: max(heads + most, room)]


def kept_table(kept: list[Kept], width: int | None = None, rows: slice = slice(None)) -> RenderableType:
    """Show how far stages have come; in a `width`, if that is given, a line each, whose long names are cut."""
    if not kept:
        return Text("no stage has finished an epoch here, or none can be read")
    paper = Screen(file=io.StringIO(), width=1000)
    for columns in (PROGRESS, NARROW):
        table = stages_table(kept, columns, rows=rows)
        table.show_edge = False
        if width is None or (excess := paper.measure(table).maximum - width) <= 0:
            return table
    names = table.columns[:2]
    room = sum(max(map(len, (column.header, *column.cells))) for column in names) - excess
    for column in names:
        column.no_wrap, column.overflow, column.max_width = True, "ellipsis", max(3, room // 2)
    return table


def stage_picture(kept: Kept, width: int, tall: int) -> list[RenderableType]:
    """Draw the curve of a stage that is kept, below its pace, in so many lines and one; nothing where that are few."""
    head = Text(f"{kept.stage.name}: {pace(kept.stage, kept.history)}", no_wrap=True)
    plot = curve(kept.stage, kept.history, trail(kept.history), kept.metadata.teacher, width, tall)
    return [head, *plot] if plot else []


def failure_lines(ckpt: Path, kept: list[Kept], damaged: list[str]) -> list[str]:
    """Say why stages failed, those that have kept nothing included, but for what `damaged` says already."""
    states = {each.stage.name: each.state for each in kept}
    failed = {name: reason for name, reason in failures(ckpt).items() if states.get(name, "failed") == "failed"}
    begun = sorted({path.name[1:-5] for path in ckpt.glob(".*.lock")} - states.keys())
    lines = [f"{name} is running, in its first epoch" for name in begun if is_locked(name, ckpt)]
    return lines + [f"{name} failed: {reason}" for name, reason in failed.items() if reason not in damaged]


def follow_stages(ckpt: Path, console: Console) -> None:
    """Redraw what is kept until a signal, which is how it is meant to end."""
    if not is_watched(console):
        raise Misconfigured("--follow: standard output is no terminal: expected one, or show without --follow")

    def picture() -> RenderableType:
        kept, damaged = kept_stages(ckpt)
        troubles = damaged + failure_lines(ckpt, kept, damaged)
        return stages_picture(kept, troubles, console.width, console.height)

    with StopRequest() as stop, PacedLive(console, picture) as live:
        while not stop.made():
            if (now := time.monotonic()) >= live.due:
                live.redraw(since=now)
            time.sleep(0.05)


def check_said(lost: bool) -> None:
    """Raise Unwritable where what was printed did not get to the disk, unless that may be `lost`."""
    sys.stdout.flush()
    error = getattr(getattr(getattr(sys.stdout, "buffer", None), "raw", None), "error", None)
    if error and error.errno != errno.EPIPE and not lost:
        raise Unwritable(f"standard output: {error.strerror}")


class Screen(Console):
    """A console that takes text as it is, and draws with ASCII where the terminal has no more."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        segments = super().render(renderable, options)
        if not (options or self.options).ascii_only:
            return segments
        return (segment._replace(text=segment.text.translate(ASCII)) for segment in segments)

    def render_str(self, text: str, **options: Any) -> Text:
        # names and paths may hold what looks like markup, and characters that a terminal would obey
        return super().render_str(printable(text), **options | {"markup": False, "emoji": False})


def in_ascii(bits: int) -> str:
    """Return - for a level pair of dots, * where the right column has any, . for dots on the left alone."""
    return "-" if bits in (0x09, 0x12, 0x24, 0xC0) else "*" if bits & 0xB8 else "." if bits else " "


ASCII = str.maketrans("✓►·✗■┤│└─┴…▁▂▃▄▅▆▇█", "+>.x!+|+-+~_..--==#")
ASCII |= {0x2800 + bits: in_ascii(bits) for bits in range(256)}


class Outlet(io.FileIO):
    """Standard output or error that takes what nobody reads, or what does not fit on the disk, too."""

    error: OSError | None = None  # the first

    def write(self, data: bytes) -> int | None:
        try:
            return super().write(data)
        except OSError as error:
            self.error = self.error or error
            return len(data)


def open_outlets() -> None:
    """Make standard output and error streams that cannot fail, whoever writes on them; a closed one goes nowhere."""
    for fd, name in enumerate(("stdin", "stdout", "stderr")):
        stream, ours = getattr(sys, name), getattr(sys, f"__{name}__")
        if ours is None:  # closed: else the next file that is opened, a checkpoint, say, would be what is written to
            os.dup2(os.open(os.devnull, os.O_RDWR), fd)
            os.set_inheritable(fd, True)
        if fd > 0 and stream is ours:  # not in a notebook, say
            options = {"encoding": getattr(stream, "encoding", None), "line_buffering": True}
            outlet = io.BufferedWriter(Outlet(fd, "w", closefd=False))
            # a letter that the terminal's encoding lacks must not end a run either
            setattr(sys, name, io.TextIOWrapper(outlet, errors="replace", **options))


def new_console(**options: Any) -> Console:
    """Return a console; where nobody can widen the window (a pipe, a file) it is wide enough for every table."""
    console = Screen(**options)
    return console if console.is_terminal or "COLUMNS" in os.environ else Screen(width=160, **options)


def progress(items: Collection[Any], what: str) -> Iterable[Any]:
    """Go through something and show how far that has come, where there is a terminal, or nothing."""
    from rich.markup import escape
    from rich.progress import track

    console = Screen(stderr=not sys.stdout.isatty())
    if not (console.is_terminal and console.is_interactive):
        return items
    return track(items, description=escape(printable(what)), console=console, transient=True)


def say(console: Console, line: str) -> None:
    """Print a line as it is: not wrapped, no colours for numbers."""
    console.print(line.replace("\n", "?"), highlight=False, soft_wrap=True)


def printable(text: str) -> str:
    """Return text without control characters but the line feed."""
    return re.sub(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", "?", text)


def introduction(event: Started) -> list[str]:
    """Say what a stage trains and what it runs on."""
    stage = event.stage
    parents = {
        role: f"{parent.name}, {percent(parent.tested.top1)} top-1, epoch {parent.tested.epoch} of stage {parent.stage}"
        for role, parent in event.parents.items()
    }
    lines = [
        f"stage {stage.name}: {stage.network}, {event.cost.params:,} parameters, {worth(event)}, "
        f"{count(stage.epochs, 'epoch')} of {count(stage.steps_per_epoch, 'step')} of {stage.batch_size} images, "
        f"seed {stage.seed}",
        f"teacher: {parents.get('teacher', 'none: the true labels')}",
        *([f"starts from: {parents['start']}"] if "start" in parents else []),
        *([f"pruned: {pruning(stage)}"] if stage.sparsity else []),
        f"runs on: {runs_on(event.facts)}",
    ]
    lines[1:1] = [f"images: {stage.folder}"] if stage.folder else []
    done = len(event.history)
    return lines + event.notes + [f"goes on after epoch {done} of {stage.epochs}"] * (done > 0)


def in_brief(event: Started) -> str:
    """Say in a line what a stage trains and what it runs on, but for what its table, bars and curve say."""
    pruned = f"; pruned: {pruning(event.stage)}" if event.stage.sparsity else ""
    return f"{event.cost.params:,} parameters, {worth(event)}, seed {event.stage.seed}; {runs_on(event.facts)}{pruned}"


def pruning(stage: Stage) -> str:
    return f"{100 * stage.sparsity:g} % of the weights, over {count(stage.prune_epochs, 'epoch')}"


def runs_on(facts: Facts) -> str:
    launched = "" if is_launched() else "; started without accelerate launch: no config file is read"
    compiled = f"compiled by {facts.compile}" if facts.compile else "not compiled"
    return f"{facts.device}, {count(facts.processes, 'process')}, {facts.precision}, {compiled}{launched}"


def worth(event: Started) -> str:
    return f"score {event.cost.score:.6f}" if event.stage.is_scored else f"{event.cost.flops / 1e6:,.1f} M MACs"


def epoch_line(stage: Stage, event: EpochDone) -> str:
    """Sum an epoch up."""
    r = event.record
    return (
        f"{stage.name}  epoch {r.epoch}/{stage.epochs}  lr {r.lr:.3g}  "
        f"train loss {r.train_loss:.3f} top-1 {r.train_top1:.2f} %  "
        f"{stage.tested_on} loss {r.test_loss:.3f} top-1 {r.test_top1:.2f} % top-5 {r.test_top5:.2f} %  "
        f"best {event.best.test_top1:.2f} %  {r.images_per_second:,.0f} images/s  {duration(r.seconds)}"
    )


def conclusion(stage: Stage, event: EpochDone) -> str:
    best, last = event.best, event.record
    return (
        f"stage {stage.name} is finished: top-1 {best.test_top1:.2f} % (best, epoch {best.epoch}), "
        f"{last.test_top1:.2f} % (last, epoch {last.epoch})"
    )


def pace(stage: Stage, history: Collection[Record]) -> str:
    """Say how fast a stage has come to where its history ends, and when it will be done."""
    left = seconds_left(stage, history)
    line = f"{history[-1].images_per_second:,.0f} images/s, {duration(epoch_seconds(history))} an epoch"
    return f"{line}, {duration(left)} left" if left > 0 else line


def epoch_seconds(history: Collection[Record]) -> float:
    return statistics.median(record.seconds for record in history[-5:])


def seconds_left(stage: Stage, history: Collection[Record]) -> float:
    return (stage.epochs - len(history)) * epoch_seconds(history)


def percent(accuracy: float | None) -> str:
    return "unknown" if accuracy is None else f"{accuracy:.2f} %"


def count(n: int, thing: str) -> str:
    """Write a number of things, in the plural unless it is one."""
    plural = f"{thing}{'es' if thing.endswith('s') else 's'}"
    return f"{n:,} {thing if n == 1 else plural}"


def duration(seconds: float) -> str:
    """Write a time as 7.5 s, 3:05 min, 2:05 h or 47 days."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds >= 100 * 3600:
        return f"{seconds / 86400:,.0f} days"
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes}:{seconds:02} min" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02} h"


# ------------------------------------------------------------------------------------------------------------ Tables
# Pure functions from numbers to tables.


class Pages(Table):
    """A table that goes on in another one, with the same names, where there is no room for all columns of numbers."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        names = list(itertools.takewhile(lambda column: column.justify == "left", self.columns))
        rest, page, wide = self.columns[len(names) :], copy.copy(self), options.update_width(10**4)
        widths = [(column.no_wrap, self._measure_column(console, wide, column)) for column in self.columns]
        # rich takes a column that does not wrap to need no more than its longest word
        least = [1 + (width.maximum if whole else width.minimum) for whole, width in widths]
        n = len(rest)
        while n > 1 and sum(least[: len(names) + n]) + (1 if self.show_edge else -1) > options.max_width:
            n -= 1
        page.columns, page.caption = names + rest[:n], None if rest[n:] else self.caption
        yield from Table.__rich_console__(page, console, options)
        if rest[n:]:
            page.title, page.caption, page.columns = None, self.caption, names + rest[n:]
            yield page


def new_table(title: str, names: str, numbers: str | list[str]) -> Table:
    """Return an empty table with columns of names, left, and of numbers, right; headings in a string end at commas."""
    table = Pages(title=title, title_justify="left", box=rich.box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in names.split(", "):
        table.add_column(heading, overflow="fold")
    for heading in numbers.split(", ") if isinstance(numbers, str) else numbers:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def best_figure(kept: Kept, name: str) -> str:
    """Write an accuracy of a stage's best epoch."""
    return f"{getattr(kept.metadata.best, name):.2f}" if kept.metadata else "-"


# By heading, from a stage and all that stand beside it.
CELLS: dict[str, Callable[[Kept, dict[str, Kept]], str | Text]] = {
    "stage": lambda kept, _: kept.stage.name,
    "network": lambda kept, _: (
        short(kept.stage.network) + f", {100 * kept.stage.sparsity:g} % zero" * (kept.stage.sparsity > 0)
    ),
    "teacher": lambda kept, _: kept.stage.teacher or "-",
    "taught by": lambda kept, others: taught_by(kept, others),
    "state": lambda kept, _: Text(f"{SIGNS[kept.state][0]} {kept.state}", SIGNS[kept.state][1]),
    "to do": lambda kept, _: "nothing" if kept.is_finished else "go on" if kept.history else "train",
    "epoch": lambda kept, _: f"{len(kept.history)}/{kept.stage.epochs}",
    "best": lambda kept, _: Text(best_figure(kept, "top1"), "bold"),
    "gain": lambda kept, _: gain(kept),
    "last": lambda kept, _: Text(f"{kept.history[-1].test_top1:.2f}" if kept.history else "-", "not bold dim"),
    "top-5\nbest": lambda kept, _: best_figure(kept, "top5"),
    "params\n(M)": lambda kept, _: f"{kept.metadata.cost.params / 1e6:.3f}",
    "ops\n(M)": lambda kept, _: f"{kept.metadata.cost.ops / 1e6:,.0f}",
    "score": lambda kept, _: f"{kept.metadata.cost.score:.4f}" if kept.stage.is_scored else "-",
    "time": lambda kept, _: duration(kept.seconds) if kept.history else "-",
}
PROGRESS = ("stage, network, taught by, state", "epoch, best, last, time")
NARROW = ("stage, teacher, state", "epoch, best, last")  # where there is no room for those
PLAN = ("stage, network, teacher, to do", "epoch")
# of stages that are finished
RESULTS = (
    "stage, network, teacher",
    "top-1\nbest, top-1\ngain, top-1\nlast, top-5\nbest, params\n(M), ops\n(M), score, time",
)


def stages_table(kept: list[Kept], columns: tuple[str, str], title: str = "", rows: slice = slice(None)) -> Table:
    """Show some of the stages of a chain in columns of `CELLS`, names and numbers; the one that runs stands out."""
    table = new_table(title, *columns)
    table.padding = 0  # it is to fit 80 columns
    beside = {each.stage.name: each for each in kept}
    for each in kept[rows]:
        cells = (CELLS[heading.removeprefix("top-1\n")](each, beside) for heading in ", ".join(columns).split(", "))
        table.add_row(*cells, style="bold" if each.state == "running" else "")
    return table


def outcome_table(kept: list[Kept]) -> Table:
    """Show the results of a chain, or how far it has come where it is not finished."""
    if any(each.state != "done" for each in kept):
        return stages_table(kept, PROGRESS)
    names, numbers = RESULTS
    if not any(each.stage.is_scored for each in kept):
        numbers = numbers.replace("score, ", "")
    on = " and ".join(sorted({each.stage.tested_on for each in kept}))
    return stages_table(
        kept, (names, numbers), f"{on.capitalize()} accuracy in percent, by which the best epoch is chosen"
    )


def gain(kept: Kept) -> Text:
    """Write by how much a stage's best epoch is better than its teacher."""
    teacher = kept.metadata.teacher
    if teacher is None or teacher.tested.top1 is None:
        return Text("-")
    better = kept.metadata.best.top1 - teacher.tested.top1
    return Text(f"{better:+.2f}", SIGNS["done" if better > 0 else "stopped"][1])


def taught_by(kept: Kept, others: dict[str, Kept]) -> str:
    """Name a stage's teacher with the accuracy that it taught with, or that it would, where that is known."""
    name = kept.stage.teacher or "-"
    if kept.metadata and (taught := kept.metadata.teacher):
        return name if taught.tested.top1 is None else f"{name} {taught.tested.top1:.2f}"
    teacher = others.get(name)
    return f"{name} {best_figure(teacher, 'top1')}" if teacher and teacher.history else name


RULES_SHOWN = {
    "official": "the challenge's rules: batch norm folded, gate and skips counted",
    "seed": "the authors' rules",
}


def score_tables(scores: list[dict[str, Any]]) -> Group:
    """Show what networks cost, a table for each count, or an empty line, and a column for each network."""
    rows = {
        "parameters": ("params", ",.0f"),
        "MACs": ("flops", ",.0f"),
        "multiplications": ("mults", ",.0f"),
        "additions": ("adds", ",.0f"),
        "operations": ("ops", ",.0f"),
        "score": ("score", ".6f"),
        "operations 32-bit": ("ops_32bit", ",.0f"),
        "score 32-bit": ("score_32bit", ".6f"),
        "operations, narrow sums": ("ops_narrow", ",.0f"),
        "score, narrow sums": ("score_narrow", ".6f"),
        "top-1 in percent": ("top1", ".2f"),
    }
    tables: list[RenderableType] = []
    for rules, words in RULES_SHOWN.items():
        title = f"Cost of one image by {words}; an operation of 32 bits is one, a multiplication of 16 half"
        counted = [s for s in scores if s["rules"] == rules]
        table = new_table(title, "", [short(s["name"]) for s in counted])
        for label, (name, form) in rows.items():
            if any(s[name] is not None for s in counted):
                table.add_row(label, *("-" if s[name] is None else format(s[name], form) for s in counted))
        tables.append(table if counted else "")
    return Group(*tables)


def layers_table(score: dict[str, Any]) -> Table:
    """Show what every layer of a network costs, and its share of the score, or of the operations without one."""
    title = f"Layers of {score['name']} by {RULES_SHOWN[score['rules']]}"
    whole, form = ("ops", ",.0f") if score["score"] is None else ("score", ".6f")
    headings = f"share, , {whole.replace('ops', 'operations')}, parameters, MACs, multiplications, additions"
    table, most = new_table(title, "layer, kind", headings), max(layer[whole] for layer in score["layers"])
    for layer in score["layers"]:
        figures = (f"{layer[name]:,}" for name in ("params", "flops", "mults", "adds"))
        share = f"{100 * layer[whole] / score[whole]:.1f} %"
        bar = ProgressBar(most, layer[whole], width=10)
        table.add_row(layer["layer"], layer["kind"], share, bar, format(layer[whole], form), *figures)
    return table


def board_table(scores: list[dict[str, Any]]) -> Table:
    """Set official 16-bit scores among the entries of the challenge."""
    table = new_table("The MicroNet Challenge, 80 % top-1 or more: lower is better", "entry", "score, top-1")
    table.add_column("how", overflow="fold")
    ours = [Entry(s["name"], s["score"], s["top1"], "counted here") for s in scores if s["rules"] == "official"]
    for entry in sorted([*BOARD, *ours], key=lambda entry: entry.score):
        top1 = "-" if entry.top1 is None else f"{entry.top1:.2f}"
        sign, style = SIGNS["running"] if entry in ours else (" ", "")
        table.add_row(f"{sign} {entry.name}", f"{entry.score:.4f}", top1, entry.how, style=style)
    return table


def export_table(results: list[dict[str, Any]]) -> Table:
    """Show what was exported and how it was checked."""
    table = new_table("Exported, read again and compared with the checkpoint", "", "")
    table.show_header = False
    for r in results:
        table.add_row("file", r["file"])
        table.add_row("bytes", f"{r['bytes']:,}")
        table.add_row("bytes of its values", f"{r['counted_bytes']:,.0f}")
        table.add_row("predictions as before", f"{r['agree']:,} of {r['images']:,} {r['on']}")
        table.add_row("largest difference of an output", f"{r['difference']:.2g}")
        table.add_row("largest output", f"{r['largest']:.2g}")
        table.add_row("top-1 before, as exported", f"{percent(r['top1_before'])}, {percent(r['top1'])}")
        if off := r["probabilities_off"]:
            table.add_row("probabilities off by, mean and most", f"{off['mean']:.3f}, {off['most']:.3f}")
        if r["score"] is not None:
            table.add_row("official score", f"{r['score']:.6f}")
        if r["milliseconds"]:
            table.add_row("ms an image, at 32 and 8 bits", ", ".join(f"{ms:.2f}" for ms in r["milliseconds"]))
    return table


def speed_table(results: list[dict[str, Any]]) -> Table:
    """Show how fast stages train and where the time goes, a column each."""
    table = new_table("Training speed: medians over steps", "", [result["stage"] for result in results])
    rows: dict[str, Callable[[dict[str, Any]], str]] = {
        "network": lambda r: short(r["network"]),
        "teacher": lambda r: r["teacher"] or "-",
        "device": lambda r: r["device"],
        "precision, compiled": lambda r: f"{r['precision']}, {r['compile'] or 'no'}",
        "processes x threads": lambda r: f"{r['processes']} x {r['threads']}",
        "batch size": lambda r: f"{r['batch_size']:,}",
        "images/s": lambda r: f"{r['images_per_second']:,.1f}",
        **{f"{part}, ms": lambda r, part=part: f"{1000 * r['seconds'][part]:,.1f}" for part in PARTS},
        "peak memory, MiB": lambda r: f"{r['peak_memory_mb']:,.0f}",
        "images left": lambda r: f"{r['images_left']:,}",
        "time left": lambda r: duration(r["seconds_left"]),
    }
    for label, cell in rows.items():
        table.add_row(label, *map(cell, results))
    table.caption = (
        f"the rest of these stages, one after the other: {duration(sum(r['seconds_left'] for r in results))}"
    )
    return table


def accuracy_table(results: list[dict[str, Any]]) -> Table:
    """Show how checkpoints do on their test images."""
    table = new_table("Test accuracy in percent", "checkpoint, network", "images, top-1, top-5, loss, precision")
    for r in results:
        loss = "-" if r["loss"] is None else f"{r['loss']:.4f}"
        numbers = (f"{r['images']:,}", f"{r['top1']:.2f}", f"{r['top5']:.2f}", loss, r["precision"])
        table.add_row(r["checkpoint"], r["network"], *numbers)
    return table


def classes_table(result: dict[str, Any]) -> Table:
    """Show how a checkpoint does on each class."""
    table = new_table(f"Classes of {result['checkpoint']}, the worst first", "class", "images, top-1")
    table.add_column("most often taken for", overflow="fold")
    for r in result["classes"]:
        wrong = f"{r['taken_for']} ({count(r['times'], 'time')})" if r["times"] else "-"
        table.add_row(r["class"], f"{r['images']:,}", f"{r['top1']:.2f}", wrong)
    return table


def predictions_table(results: list[dict[str, Any]]) -> Table:
    """Show the likeliest classes on images."""
    table = new_table("The likeliest classes, with probabilities in percent", "image, first, second, third", [])
    for r in results:
        cells = (
            c["class"] if c["probability"] is None else f"{c['class']} {100 * c['probability']:.1f}"
            for c in r["classes"]
        )
        table.add_row(r["image"], *cells)
    return table


def stages_as_json(kept: list[Kept]) -> list[dict[str, Any]]:
    """Return what stages have come to, with every epoch's figures."""
    return [
        {name: getattr(each.stage, name) for name in ("network", "teacher", "start", "sparsity")}
        | {"stage": each.stage.name, "state": each.state}
        | {"failure": each.failure, "epoch": len(each.history), "epochs": each.stage.epochs, "seconds": each.seconds}
        | {name: plain(getattr(each.metadata, name)) for name in ("best", "last", "history")}
        for each in kept
    ]


# --------------------------------------------------------------------------------------------------------- Launching
# Stopping, keeping a stage while it trains, and launching a chain's stages in processes of their own, of one machine or
# of several.


class StopRequest:
    """SIGINT, SIGTERM and SIGHUP as something that a loop can ask for, and the death of the launcher of this process.

    The first signal asks the loop to stop after its step and calls `then`, which may raise. Another one, a second or
    more later (`uv run` sends each Ctrl-C twice), ends the process at once.
    """

    def __init__(self) -> None:
        self.then: Callable[[], None] = lambda: None
        self.signum: int | None = None
        self.launcher: int | None = None
        self.anew = False  # --restart has moved aside what was kept: with it the same command would not go on

    def __enter__(self) -> StopRequest:
        self.launcher = os.getppid() if is_launched() else None
        heard = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup
            heard.append(signal.SIGHUP)
        self.handlers = {signum: signal.signal(signum, self.note) for signum in heard}
        return self

    def __exit__(self, *error: object) -> None:
        for signum, handler in self.handlers.items():
            signal.signal(signum, handler)

    def note(self, signum: int, frame: object) -> None:
        if self.signum is None:
            self.signum, self.noted = signum, time.monotonic()
            self.then()
        elif time.monotonic() - self.noted > 1:
            raise SystemExit(128 + signum)

    def made(self) -> bool:
        """Tell whether a stop is asked for; costs a system call."""
        return self.signum is not None or self.launcher not in (None, os.getppid())

    def stopped(self, stage: Stage, done: int) -> Stopped:
        """Return what to raise where a stop is asked for after so many epochs of a stage."""
        return Stopped(resumption(stage, done, self.anew), self.signum and 128 + self.signum)


def watch_lifeline() -> None:
    """Ask this process to stop when something comes on standard input, and end it when the other end is closed.

    `chain` holds that end: it asks by a byte, and cannot die without closing it. A process that does not stop by
    itself within five seconds then, because it waits for another one, say, loses nothing that is kept.
    """
    lifeline = select.poll()
    lifeline.register(0, select.POLLIN)
    lifeline.poll()
    signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)  # which ends its waiting for the network, too
    lifeline.modify(0, 0)  # to wait for the end alone
    lifeline.poll()
    time.sleep(5)
    os._exit(Stopped.exit_code)


def keep_freed_memory() -> None:
    """Have glibc keep what tensors free for the next ones, where there is no GPU.

    glibc would give every large tensor back to the kernel and fault the next one in: a third of a training step, more
    than half of `evaluate`. The price is memory, in `evaluate` 1.7 instead of 1.2 GB. Where the user has set a MALLOC_
    variable, or the C library has no such settings, nothing changes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt and not torch.cuda.is_available() and not any(name.startswith("MALLOC_") for name in os.environ):
        mallopt(-4, 0)  # M_MMAP_MAX: nothing by mmap
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: nothing is given back
        mallopt(-2, 2**28)  # M_TOP_PAD: 256 MiB more at a time than is asked for


def train_and_keep(stage: Stage, data: Path, ckpt: Path, accelerator: Accelerator, view: Plain, restart: bool) -> None:
    """Train a stage from where it stands, keep every epoch and show it, until it ends or is stopped."""
    folder, main, stop = ckpt / stage.name, functools.partial(in_main, accelerator), StopRequest()
    own_file = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    check_alike({f"stage {stage.name}": stage, "micronet.py": own_file, "torch": torch.__version__})
    held: list[Callable[[Metadata | None], None]] = []  # in the main process, what tells whether the lock is
    history: Collection[Record] = ()
    with ExitStack() as stack, training_failures(stage, stop, lambda: len(history)):
        main(lambda: held.append(stack.enter_context(locked(stage, ckpt))))
        state = main(lambda: None if restart else kept_state(stage, ckpt, whole=True))
        history = state.metadata.history if state else ()
        if len(history) >= stage.epochs:
            main(lambda: settle(folder, state, thorough=True))
            say(view.console, f"stage {stage.name} is finished: {best_path(folder)} (--restart trains it anew)")
            return
        with stop, view:
            stop.then = functools.partial(give_up, stage, state, stop)
            run = open_run(stage, data, ckpt, accelerator, state, progress if held else unwatched)
            history = run.history
            run.notes += main(lambda: check_room(folder, run.student, anew=restart))
            if restart and (aside := main(lambda: set_aside(folder))):
                run.notes.append(f"{folder} is now {aside}")
            stop.anew = restart
            together(lambda: open_trackers(stage, accelerator))

            def keep() -> None:
                held[0](run.written)  # raises unless the stage is still this process's
                save_epoch(folder, stage, run)

            for event in stoppable(stage, run, stop):
                if isinstance(event, EpochDone):
                    main(keep)
                    accelerator.log(event.record._asdict(), step=event.record.epoch)
                view(event)
    accelerator.end_training()


def open_trackers(stage: Stage, accelerator: Accelerator) -> None:
    """Begin to send figures where --log-with says; raises Misconfigured where that cannot be done."""
    try:
        accelerator.init_trackers(stage.name)
    except Exception as error:  # of a package that this program knows nothing of: no key, no server, ...
        raise Misconfigured(f"--log-with: {type(error).__name__}: {error}") from None


@contextmanager
def training_failures(stage: Stage, stop: StopRequest, done: Callable[[], int]) -> Iterator[None]:
    """Say in one line that memory does not suffice, on a GPU or a CPU, or that another process is gone.

    Of the latter collective operations fail. Raises Failure or Stopped.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is the latter, as is what the CPU's says
        if isinstance(error, MemoryError) or re.search("out of memory|allocate memory|bad_alloc", f"{error!r}"):
            words = f"out of memory with batch_size = {stage.batch_size}: lower it, or use more processes"
            raise Failure(f"stage {stage.name}: {words}") from None
        time.sleep(1)  # until the signal that has stopped the other process a step earlier is here, too
        if stop.made():
            raise stop.stopped(stage, done()) from None
        if not isinstance(error, torch.distributed.DistError) and "gloo" not in str(error):
            raise
        raise Failure(f"{GONE}; {resumption(stage, done(), stop.anew)}") from None


GONE = "another process is gone"


def give_up(stage: Stage, state: State | None, stop: StopRequest) -> None:
    """Stop a stage at once, before its first step, where nothing is at stake: raises Stopped."""
    raise stop.stopped(stage, len(state.metadata.history) if state else 0)


def stoppable(stage: Stage, run: Run, stop: StopRequest) -> Iterator[Event]:
    """Train a stage until a stop is asked for; then raise Stopped, between two steps."""
    for event in train_stage(stage, run):
        yield event
        if isinstance(event, Stepped):
            stop.then = lambda: None
        if stop.made() and len(run.history) < stage.epochs:  # a finished stage has nothing to stop
            raise stop.stopped(stage, len(run.history))


def resumption(stage: Stage, done: int, anew: bool) -> str:
    same = "the same command without --restart" if anew else "the same command"
    return f"stage {stage.name} keeps {done} of {count(stage.epochs, 'epoch')}; {same} goes on from there"


class Machine(NamedTuple):
    """Which of several machines this is, and how the others are met."""

    rank: int = 0  # the checkpoints are kept on machine 0
    address: str | None = None  # of machine 0
    timeout: float = 600  # seconds to wait for the others


def rank_here(given: int | None, machines: int) -> int:
    """Return which of so many machines this is: as given, else what Slurm calls the node, else 0."""
    node = os.environ.get("SLURM_NODEID", "") if machines > 1 and given is None else ""
    return int(node) if node.isdigit() else given or 0


class Launch(NamedTuple):
    """How a chain starts its stages."""

    command: list[str]  # up to the script
    environment: dict[str, str]


DECIDED = re.compile(  # by the launch: what another one has left in the environment is not for this one
    "RANK|WORLD_SIZE|(LOCAL|GROUP|ROLE|MASTER|TORCHELASTIC|FSDP|MEGATRON_LM|PARALLELISM_CONFIG)_.*|"
    "ACCELERATE_(?!GRADIENT_ACCUMULATION_STEPS|LOG_LEVEL).*"
)
TRUTH = Accepts(lambda v: v if type(v) is bool else None, lambda: "true or false")
NONE = Accepts(lambda v: None if v else True, lambda: "none: only plain data parallelism is supported")
LAUNCH_KEYS: dict[str, Accepts] = {  # of a launch configuration: what can be honoured
    "compute_environment": one_of(lambda: ["LOCAL_MACHINE"]),
    "distributed_type": one_of(lambda: ["NO", "MULTI_GPU", "MULTI_CPU"]),
    "num_machines": whole(1, 1024),
    "machine_rank": whole(0, 0),
    "num_processes": whole(1, 1024),
    "main_process_port": whole(0, 65535),
    "mixed_precision": one_of(lambda: ["no", "bf16", "fp16"]),
    "gpu_ids": Accepts(lambda v: re.fullmatch(r"all|\d+(,\d+)*", str(v)), lambda: "all, or numbers in quotes"),
    "dynamo_backend": one_of(lambda: dynamo_backends()),
    "dynamo_mode": one_of(lambda: ["default", "reduce-overhead", "max-autotune"]),
    **dict.fromkeys(["use_cpu", "debug", "enable_cpu_affinity", "same_network"], TRUTH),
    **dict.fromkeys(["dynamo_use_fullgraph", "dynamo_use_dynamic", "dynamo_use_regional_compilation"], TRUTH),
    **dict.fromkeys([f"{name}_config" for name in ("deepspeed", "fsdp", "megatron_lm", "parallelism", "fp8")], NONE),
}


def dynamo_backends() -> list[str]:
    """Return what accelerate can compile with, in both spellings that it takes."""
    from accelerate.utils import DynamoBackend

    return [name for backend in DynamoBackend for name in (backend.value, backend.value.lower())]


@contextmanager
def reading_launch(config_file: Path) -> Iterator[None]:
    """Raise Misconfigured for whatever reading a launch configuration fails of."""
    import yaml

    try:
        yield
    except OSError as error:
        raise Misconfigured(
            f"{config_file}: {error.strerror or error}; expected accelerate's configuration (--config-file)"
        ) from None
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError, yaml.YAMLError) as error:
        raise Misconfigured(f"{config_file}: not a launch configuration of accelerate: {error}") from None


def launch_table(config_file: Path) -> dict[str, Any]:
    """Return what stands in a launch configuration, checked as far as we know it; raises Misconfigured."""
    import yaml

    with reading_launch(config_file):
        with open_regular(config_file) as file:
            table = yaml.safe_load(file.read(2**16))
        if not isinstance(table, dict):
            raise ValueError("not a table of keys")
        if table.get("distributed_type") is False:  # what YAML takes NO for
            table["distributed_type"] = "NO"
        if table.get("main_process_port", 0) is None:
            del table["main_process_port"]
        dynamo = table.pop("dynamo_config", None) or {}
        if not isinstance(dynamo, dict):
            raise unacceptable(f"{config_file}", "dynamo_config", dynamo, "a table")
        for name, value in (table | dynamo).items():
            if (accepts := LAUNCH_KEYS.get(name)) and accepts.parse(value) is None:
                raise unacceptable(f"{config_file}", name, value, accepts.words())
        return table


def count_machines(config_file: Path) -> int:
    """Return how many machines a launch configuration is for; 1 where it cannot be read, which the launch will say."""
    with suppress(Misconfigured):
        return launch_table(config_file).get("num_machines", 1)
    return 1


def read_launch(config_file: Path) -> Any:
    """Return accelerate's view of a launch configuration; raises Misconfigured unless all of it can be honoured."""
    from accelerate.commands.config.config_args import load_config_from_file

    with reading_launch(config_file):
        launch_table(config_file)
        config = load_config_from_file(str(config_file))
        if config.num_processes < 1:
            raise ValueError("num_processes is missing")
        return config


def usable_cores(own: Path = Path("/proc/self/cgroup"), groups: Path = Path("/sys/fs/cgroup")) -> int:
    """Return how many cores this process may use, by its affinity and by the quota of its control groups."""
    cores = len(os.sched_getaffinity(0))
    with suppress(OSError, ValueError, TypeError):  # no control groups, or none with a quota ("max")
        group = groups / re.search(r"^0::/(.*)$", own.read_text(), re.MULTILINE)[1]
        for folder in (group, *group.parents):
            if (limit := folder / "cpu.max").is_file() and (quota := limit.read_text().split())[0] != "max":
                cores = min(cores, math.ceil(int(quota[0]) / int(quota[1])))
    return max(1, cores)


def passed_on() -> dict[str, str]:
    """Return what of this process's environment is for those that it launches; raises Misconfigured."""
    environment = {name: value for name, value in os.environ.items() if not DECIDED.fullmatch(name)}
    environment["PYTHONSAFEPATH"] = "1"  # what lies in the current folder is not imported in place of a package
    if threads := environment.pop("OMP_NUM_THREADS", ""):
        if not re.fullmatch(r" *[1-9]\d{0,3} *(, *[1-9]\d{0,3} *)*", threads):
            raise Misconfigured(f"OMP_NUM_THREADS = {shown(threads)}: expected a whole number of 1 or more, or none")
        environment["OMP_NUM_THREADS"] = threads.split(",")[0].strip()  # of a list, that of the outermost level
    return environment


def plan_launch(config_file: Path, console: Console, machine: Machine = Machine()) -> Launch:
    """Return the `accelerate launch` that trains on what is here, as near to the configuration as that allows.

    Says so in one line where there are fewer GPUs than it asks for; one of several machines has to have them all.
    Raises Misconfigured.
    """
    import torch

    config = read_launch(config_file)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config_file)]
    environment, machines = passed_on(), config.num_machines
    processes, gpus = config.num_processes // machines, torch.cuda.device_count()
    wanted = f"{config_file} asks for {count(processes, 'GPU')}, this machine has"
    if machine.rank >= machines:
        raise Misconfigured(f"--machine-rank {machine.rank}: {config_file} has num_machines = {machines}")
    if machines > 1:
        if config.num_processes % machines or not config.main_process_port:
            needed = f"a main_process_port, and num_processes a multiple of {machines}"
            raise Misconfigured(f"{config_file}: num_machines = {machines}: expected {needed}")
        if not (address := machine.address or config.main_process_ip):
            raise Misconfigured("--main-process-ip: is missing: expected the address of machine 0")
        if not config.use_cpu and gpus < processes:
            raise Misconfigured(f"{wanted} {gpus}")
        command += ["--main_process_ip", address, "--machine_rank", str(machine.rank)]
        command += ["--rdzv_conf", f"timeout={math.ceil(machine.timeout)}"]
    if config.use_cpu and config.num_processes > 1:  # accelerate's launcher alone would start a single process
        command += ["--multi_gpu"]
        environment["ACCELERATE_USE_CPU"] = "1"
    elif not config.use_cpu and gpus == 0:
        say(console, f"{wanted} none: training on the CPU in fp32, with the same batch size")
        command += ["--cpu", "--num_processes", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        processes = 1
    elif not config.use_cpu and gpus < processes:
        say(console, f"{wanted} {gpus}: training on {gpus}, with the same batch size")
        command += ["--num_processes", str(gpus)]
    if config.use_cpu or gpus == 0:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // processes)))
        # threads that wait would hold their cores: beside another program a step would take many times as long
        environment.setdefault("GOMP_SPINCOUNT", "1000")
        # glibc (2.35 or later) asks for huge pages, where the kernel gives them to those who ask: some 5 % less time
        environment.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
    return Launch(command, environment)


def all_aside(stages: list[Stage], ckpt: Path, console: Console) -> None:
    """Move what stages have kept aside, and say where to; raises Locked."""
    with ExitStack() as stack:
        for stage in stages:  # before one of them moves
            stack.enter_context(locked(stage, ckpt))
        for stage in stages:
            if aside := set_aside(ckpt / stage.name):
                say(console, f"{ckpt / stage.name} is now {aside}")


def launch_stage(launch: Launch, stage: Stage, options: list[str], ckpt: Path, stop: StopRequest) -> None:
    """Train a stage in processes of its own; raises Stopped where that is asked for, Failure unless it ends finished.

    The stage draws on the terminal itself. What the line of a failure leaves out is kept in its error.log.
    """
    if stop.made():
        raise stop.stopped(stage, len(read_kept(stage, ckpt).history))
    said, trouble, returncode = launched(launch, stage.name, options, stop)
    kept = read_kept(stage, ckpt)
    if stop.signum is not None and not kept.is_finished:
        raise stop.stopped(stage, len(kept.history))
    if kept.is_finished and not said and not NEVER_MET.search(trouble):
        return print(trouble, end="", file=sys.stderr)
    code, reason = explain_failure(said, trouble, returncode)
    ours = (code, reason) in said
    if not ours:
        reason += write_error_log(ckpt / stage.name / "error.log", trouble)
    failed = " failed" * (code != Locked.exit_code)  # as another process trains it
    failure = f"stage {stage.name}{failed}: {reason.removeprefix(f'stage {stage.name}: ')}"
    met_again = [kind.exit_code for kind in (Failure, Misconfigured, Refused, NotFinite, Locked)]
    if not ours or code not in met_again:
        failure += f"; {resumption(stage, len(kept.history), stop.anew)}"
    raise Failure(failure, code)


def join_chain(launch: Launch, options: list[str], ckpt: Path, stop: StopRequest) -> None:
    """Train, on a machine other than the first, what that one trains, until it says that this was the last stage.

    Raises Stopped where that is asked for here, Failure where a stage does not end finished.
    """
    while True:
        said, trouble, returncode = launched(launch, WITH_MAIN, options, stop)
        if (0, LAST) in said:
            return
        if stop.signum is not None:
            raise Stopped("this machine is stopped: the others end, too", 128 + stop.signum)
        if returncode:
            code, reason = explain_failure(said, trouble, returncode)
            raise Failure(reason if said else reason + write_error_log(ckpt / "error.log", trouble), code)


WITH_MAIN = "-"  # in place of a stage's name: the one that the main process trains
LAST = "that was the last stage"


def launched(
    launch: Launch, name: str, options: list[str], stop: StopRequest
) -> tuple[list[tuple[int, str]], str, int]:
    """Run a stage in processes of its own, to their end; return what they wrote of a failure and the exit code.

    That is exit codes and lines of this program, and what others wrote, from the first sign of trouble on: kept back,
    so that it can be told in a line. What else they write on standard error passes through here; that pipe ends when
    the last process of the stage is gone.
    """
    command = [*launch.command, os.path.abspath(__file__), "run-stage", name, *options, "--lifeline"]
    pipes = {"stdin": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "errors": "replace"}
    # a session of its own, as Ctrl-C is for this process alone: the launcher would die of it with a traceback
    child = subprocess.Popen(command, env=launch.environment, start_new_session=True, **pipes)

    def ask() -> None:
        with suppress(OSError):  # it has just ended
            os.write(child.stdin.fileno(), b"\n")

    stop.then = ask
    if stop.made():  # since it was asked above
        ask()
    said, trouble = [], ""
    with pausing(child.pid):
        for line in child.stderr:
            if error := re.match(r"error (\d+): (.*)", line):
                said.append((int(error[1]), error[2]))
            elif trouble or TROUBLE.match(line):
                trouble += line
            elif stop.signum is None:
                sys.stderr.write(line)
        return said, trouble, child.wait()


def write_error_log(log: Path, trouble: str) -> str:
    """Keep what others wrote in a file; return what to say of it, nothing where there is nothing to keep."""
    if trouble:
        with suppress(OSError):  # on a full disk, say
            log.parent.mkdir(parents=True, exist_ok=True)
            log.write_text(trouble, errors="replace")
            return f" (all of it in {log})"
    return ""


TROUBLE = re.compile(r"(\[rank\d+\]: ?)?(Traceback \(most|\[?[WE]\d{4} \d\d:\d\d)|Fatal Python error|terminate called")


NEVER_MET = re.compile(r"next_rendezvous(?s:.*)^torch\.distributed\.\w+: (.*)", re.MULTILINE)


def explain_failure(said: list[tuple[int, str]], trouble: str, returncode: int) -> tuple[int, str]:
    """Return an exit code and in one line why a launched stage has failed, from what its processes wrote.

    A process that another one's death stops says so, too: that counts for least.
    """
    own = [each for each in said if each[0] != Stopped.exit_code and not each[1].startswith(GONE)]
    if own:
        return own[0]
    if returncode == -signal.SIGKILL or re.search(r"SIGKILL|exitcode *: -9\b", trouble):
        return Failure.exit_code, "a process was killed (SIGKILL), perhaps for want of memory"
    if found := NEVER_MET.search(trouble):
        return Failure.exit_code, f"not all machines came ({found[1]})"
    others = r"Traceback|subprocess\.Called|torch\.distributed\."  # which say nothing of the cause
    raised = re.findall(rf"^(\[rank\d+\]: ?)?(?!{others})((?:\w+\.)*[A-Z]\w*(?:: .*)?)$", trouble, re.MULTILINE)
    if raised:
        return Failure.exit_code, [error for rank, error in raised if rank == raised[0][0]][-1]
    if any(code == Stopped.exit_code for code, _ in said):
        return Stopped.exit_code, "stopped by a signal"
    if said:
        return said[0]
    signals = re.findall(r"SIG[A-Z]+", trouble)
    return Failure.exit_code, f"ended by {signals[0]}" if signals else f"ended without a word, exit code {returncode}"


@contextmanager
def pausing(launcher: int) -> Iterator[None]:
    """Have Ctrl-Z, and what goes on afterwards, reach all processes of a stage, which are not in this one's session."""

    def pause(signum: int, frame: object) -> None:
        import psutil  # which accelerate needs

        family: list[psutil.Process] = []
        with suppress(psutil.NoSuchProcess):  # it has ended meanwhile
            family = [first := psutil.Process(launcher), *first.children(recursive=True)]
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.suspend()
        if sys.stdout.isatty():
            sys.stdout.write("\x1b[?25h\n")  # the shell needs the cursor that a stage's screen hides
            sys.stdout.flush()
        os.kill(os.getpid(), signal.SIGSTOP)
        for process in family:  # from here on after SIGCONT
            with suppress(psutil.NoSuchProcess):
                process.resume()

    before = signal.signal(signal.SIGTSTP, pause)
    try:
        yield
    finally:
        signal.signal(signal.SIGTSTP, before)


def launch_bench(launch: Launch, stage: Stage, options: list[str]) -> dict[str, Any]:
    """Measure a stage in processes of its own; raises Failure with its error."""
    command = [*launch.command, os.path.abspath(__file__), "bench-stage", stage.name, *options]
    result = subprocess.run(command, env=launch.environment, capture_output=True, text=True, errors="replace")
    if result.returncode:
        errors = [line.removeprefix("error: ") for line in result.stderr.splitlines() if line.startswith("error: ")]
        reason = explain_failure([], result.stderr, result.returncode)[1]
        raise Failure(errors[0] if errors else f"stage {stage.name}: {reason}")
    return json.loads(next(line for line in reversed(result.stdout.splitlines()) if line.startswith("{")))


# ---------------------------------------------------------------------------------------------------------- Commands
# Parse, call, render.

app = typer.Typer(
    help="Train a chain of small image classifiers, each taught by the last, and count what they cost.",
    epilog="Start here: micronet.py chain --stages demo.toml (offline, a minute on a CPU). Exit codes: 0 done, "
    "1 failed, 2 command or stages make no sense, 3 a file refused, 4 nan or infinity, 5 input or output, "
    "75 another process trains the stage, 129, 130 or 143 stopped by SIGHUP, SIGINT or SIGTERM.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,  # half the time of --help
)
StagesFile = Annotated[Path, typer.Option(help="TOML file with the stages.")]
DataFolder = Annotated[Path, typer.Option(help="Folder with the images; CIFAR is downloaded to there if missing.")]
CkptFolder = Annotated[Path, typer.Option(help="Folder that keeps every stage's checkpoints, teachers' too.")]
Checkpoint = Annotated[Path, typer.Argument(help="A stage's folder such as ckpt/ex, for its best network, or a file.")]
ConfigFile = Annotated[Path, typer.Option(help="Launch configuration of accelerate.")]
Rules = Literal["seed", "official", "both"]
Timeout = Annotated[float, typer.Option(min=1, max=10**6, help="Seconds that a process waits for another one.")]
MachineRank = Annotated[
    int | None, typer.Option(min=0, help="Of several machines, which this is; not given: what SLURM_NODEID says, or 0.")
]
Address = Annotated[str | None, typer.Option(help="Where the machine of rank 0 is reached.")]
Precision = Literal["fp32", "bf16", "fp16"]
LogWith = Annotated[str | None, typer.Option(help="Send each epoch's figures to tensorboard, wandb, ..., too.")]
Seed = Annotated[int | None, typer.Option(min=0, max=10**9, help="Seed, over what the stages file says.")]
Changes = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="A key of all stages, over what the stages file says; repeatable."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def command(name: str, computes: bool, hidden: bool = False) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a function a command, whose Failures become one line and an exit code.

    A command that computes needs torch, so the program's own copy of this file (see the imports) only checks the
    stages, which is quick, and leaves the rest to the module `micronet`.
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def run(**options: Any) -> None:
            try:
                if __name__ != "__main__" or not computes:
                    if computes:
                        keep_freed_memory()
                        if not os.environ.get("OMP_NUM_THREADS"):
                            torch.set_num_threads(min(torch.get_num_threads(), usable_cores()))
                    function(**options)
                    return check_said(lost=name in ("run-stage", "chain"))
                alone = os.environ.get("GROUP_WORLD_SIZE", "1") == "1"  # else all machines must know what is wrong
                if "stages" in options and alone:
                    over = settings(options.get("changes"), options.get("seed"))
                    load_stages(options["stages"], options["data"] or Path("data"), over)
                for path in options.get("checkpoints") or [options.get("checkpoint")]:
                    if path and path.suffix not in EXPORTS[1:]:
                        read_metadata(path)  # which does not wait for torch to say that there is none
                if options.get("lifeline"):
                    threading.Thread(target=watch_lifeline, daemon=True).start()
            except (Failure, OSError) as error:
                if isinstance(error, OSError):
                    error = Unwritable(in_words(error))
                prefix = "" if isinstance(error, Stopped) else "error: "
                if options.get("lifeline"):  # for `launch_stage`
                    prefix = f"error {error.exit_code}: "
                say(Screen(stderr=True), prefix + " ".join(str(error).split()))
                raise typer.Exit(error.exit_code) from None
            gc.disable()  # looking for garbage takes a tenth of the time that torch takes to import
            module = load_own_file()
            gc.enable()
            getattr(module, function.__name__)(**options)

        return app.command(name, hidden=hidden)(run)

    return register


def load_own_file() -> ModuleType:
    """Import this very file as `micronet`, whatever it is called and whatever else is called that."""
    loader = importlib.machinery.SourceFileLoader("micronet", os.path.abspath(__file__))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("micronet", loader))
    sys.modules["micronet"] = module
    loader.exec_module(module)
    return module


@app.callback(invoke_without_command=True)
def main(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    open_outlets()
    if version:
        typer.echo(f"micronet {__version__}")
        raise typer.Exit()


@command("run-stage", computes=True)
def run_stage(
    name: Annotated[str, typer.Argument(help="A stage of the stages file.")],
    stages: StagesFile = Path("stages.toml"),
    data: DataFolder = Path("data"),
    ckpt: CkptFolder = Path("ckpt"),
    seed: Seed = None,
    changes: Changes = None,
    restart: Annotated[bool, typer.Option("--restart", help="Move what the stage has kept aside; start anew.")] = False,
    timeout: Timeout = 600,
    log_with: LogWith = None,
    lifeline: Annotated[bool, typer.Option("--lifeline", hidden=True, help="Stop when standard input ends.")] = False,
    among: Annotated[list[str] | None, typer.Option(hidden=True, help="Stages to show; the chain's.")] = None,
    last: Annotated[
        bool, typer.Option("--last", hidden=True, help="Tell the other machines that no more come.")
    ] = False,
) -> None:
    """Train one stage. A finished one is left alone, an interrupted one goes on after its last finished epoch.

    Example: accelerate launch --config_file accelerate_config.yaml micronet.py run-stage b3
    """
    accelerator = open_accelerator(timeout, log_with, ckpt)
    every = together(lambda: load_stages(stages, data, settings(changes, seed)))
    trained, no_more = in_main(accelerator, lambda: (name, last))
    stage = together(lambda: find_stage(every, trained if name == WITH_MAIN else name))
    console = new_console(quiet=not accelerator.is_main_process)
    others = [find_stage(every, other) for other in among] if among else with_parents(every, [stage.name])
    kept = [read_kept(other, ckpt, strict=False) for other in others if accelerator.is_main_process]
    view = choose_view(console, kept, stays=among is None)
    train_and_keep(stage, data, ckpt, accelerator, view, restart)
    if no_more and name == WITH_MAIN and accelerator.is_local_main_process:
        print(f"error 0: {LAST}", file=sys.stderr)  # for `join_chain`


@command("chain", computes=False)
def chain(
    names: Annotated[list[str] | None, typer.Argument(help="Stages, to which teachers are added; none: all.")] = None,
    stages: StagesFile = Path("stages.toml"),
    data: DataFolder = Path("data"),
    ckpt: CkptFolder = Path("ckpt"),
    config_file: ConfigFile = Path("accelerate_config.yaml"),
    seed: Seed = None,
    changes: Changes = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Train the named stages anew; old ones move aside.")
    ] = False,
    timeout: Timeout = 600,
    log_with: LogWith = None,
    machine_rank: MachineRank = None,
    main_process_ip: Address = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be done.")] = False,
) -> None:
    """Train stages, teachers first. Finished ones are skipped, interrupted ones go on.

    Example: micronet.py chain ex exx
    """
    console, machines = new_console(), count_machines(config_file)
    machine = Machine(rank_here(machine_rank, machines), main_process_ip, timeout)
    given = {"stages": stages, "data": data, "ckpt": ckpt, "timeout": timeout, "seed": seed, "log-with": log_with}
    options = [f"--{option}={value}" for option, value in given.items() if value not in (None, "")]
    options += [f"--set={change}" for change in changes or ()]
    if machine.rank and not dry_run:
        with StopRequest() as stop:
            launch = plan_launch(config_file, console, machine)
            say(console, f"machine {machine.rank}: what is trained shows, and is kept, on machine 0")
            return join_chain(launch, options, ckpt, stop)
    over = settings(changes, seed)
    every = load_stages(stages, data, over)
    named = names or list(every)
    todo = kept_chain(every, named, ckpt, anew=restart)
    left = still_to_train(todo, ckpt)
    for reason in (reason for each in todo for reason in each.refused):
        say(console, f"WARNING: {reason}")
    if dry_run:
        console.print(stages_table(todo, PLAN, "What the chain would do, in this order"))
        return
    options += [f"--among={each.stage.name}" for each in todo]
    if not left and machines > 1:
        left = {each.stage.name: each.stage for each in todo[-1:]}  # others wait, to be told so by this one
    with StopRequest() as stop:
        launch = plan_launch(config_file, console, machine) if left else None
        if restart:
            all_aside([every[name] for name in named], ckpt, console)
        stop.anew = restart
        try:
            for name, stage in left.items():
                if load_stages(stages, data, over).get(name) != stage:
                    raise Misconfigured(f"{stages}: stage {name} has changed since this chain began: start it again")
                say(console, f"stage {name} is being started")
                launch_stage(launch, stage, options + ["--last"] * (name == [*left][-1]), ckpt, stop)
        finally:
            console.show_cursor()  # which a stage that was killed has left hidden
            console.print(outcome_table([read_kept(each.stage, ckpt, strict=False) for each in todo]))


@command("show", computes=False)
def show(
    ckpt: Annotated[Path, typer.Option(help="Folder whose stages to show.")] = Path("ckpt"),
    follow: Annotated[bool, typer.Option("--follow", help="Keep it up to date until Ctrl-C.")] = False,
    svg: Annotated[Path | None, typer.Option(help="Write the picture to this file, too.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show the table and curves of what is kept. Also while a chain trains in another terminal.

    Example: micronet.py show --svg chain.svg
    """
    if not ckpt.is_dir():
        raise Misconfigured(f"{ckpt}: no such folder; expected one that keeps the checkpoints of stages")
    if follow and (svg or as_json):
        raise Misconfigured("--follow: keeps drawing: expected without --svg and --json")
    console = new_console()
    if follow:
        return follow_stages(ckpt, console)
    if svg:
        check_output(svg, older="micronet(&#160;| )show")
    kept, damaged = kept_stages(ckpt)
    failed = failure_lines(ckpt, kept, damaged)
    if as_json:
        typer.echo(json.dumps(stages_as_json(kept), indent=2))
    else:
        console.print(stages_picture(kept, failed, min(console.width, 120)))
    if svg:
        write_output(svg, as_svg(stages_picture(kept, failed, 100), "micronet show").encode())
    if damaged:
        raise Refused("; ".join(damaged))


@command("bench", computes=False)
def bench(
    names: Annotated[list[str] | None, typer.Argument(help="Stages; none: all.")] = None,
    stages: StagesFile = Path("stages.toml"),
    data: Annotated[Path | None, typer.Option(help="Folder with the images; none: random ones.")] = None,
    ckpt: Annotated[Path, typer.Option(help="Folder that says which epochs are left.")] = Path("ckpt"),
    config_file: ConfigFile = Path("accelerate_config.yaml"),
    steps: Annotated[int, typer.Option(min=1, help="Steps to time, after three that are not.")] = 10,
    as_json: AsJson = False,
    profile: Annotated[bool, typer.Option("--profile", help="Show the operations that take longest, too.")] = False,
) -> None:
    """Measure how fast stages train on this machine. They are launched as `chain` does; what is left is estimated.

    Example: micronet.py bench b3 ex --steps 20
    """
    every = load_stages(stages, data or Path("data"))
    todo = [find_stage(every, name) for name in names or every]
    left = {stage: read_kept(stage, ckpt).images_left for stage in todo}
    launch = plan_launch(config_file, Screen(stderr=True))
    options = ["--stages", str(stages), "--steps", str(steps), *(["--profile"] if profile else [])]
    options += ["--data", str(data)] if data else []
    results = [launch_bench(launch, stage, options) for stage in todo]
    for stage, result in zip(todo, results):
        result |= {"images_left": left[stage], "seconds_left": left[stage] / result["images_per_second"]}
    render(results, speed_table, as_json)
    for result in results if profile and not as_json else []:
        typer.echo(f"stage {result['stage']}\n{result['profile']}")


@command("bench-stage", computes=True, hidden=True)
def bench_stage(
    name: str,
    stages: StagesFile,
    steps: Annotated[int, typer.Option()],
    data: Path | None = None,
    profile: Annotated[bool, typer.Option("--profile")] = False,
) -> None:
    """Measure one stage in this process and print JSON; `bench` launches it."""
    every = load_stages(stages, data or Path("data"))
    stage, run = bare_run(find_stage(every, name), every, data, steps)
    result = measure_speed(stage, run, steps)
    if profile:
        with torch.profiler.profile() as profiled:
            train_timed(stage, run, 3)
        by = "self_cuda_time_total" if run.accelerator.device.type == "cuda" else "self_cpu_time_total"
        result["profile"] = profiled.key_averages().table(sort_by=by, row_limit=20, max_name_column_width=40)
    if run.accelerator.is_main_process:
        typer.echo(json.dumps(result))
    run.accelerator.end_training()


@command("evaluate", computes=True)
def evaluate_checkpoints(
    checkpoints: Annotated[list[Path], typer.Argument(help="Stages' folders such as ckpt/ex, or files.")],
    data: DataFolder = Path("data"),
    precision: Annotated[Precision, typer.Option(help="Of the network's arithmetic.")] = "fp32",
    classes: Annotated[bool, typer.Option("--classes", help="Show every class, and what it is taken for.")] = False,
    as_json: AsJson = False,
) -> None:
    """Test checkpoints on the test images of their stages.

    Example: micronet.py evaluate ckpt/ex ckpt/exx/best.safetensors
    """
    results = [evaluate_checkpoint(path, data, precision, progress, classes) for path in checkpoints]
    render(results, accuracy_table, as_json)
    for result in results if classes and not as_json else []:
        new_console().print(classes_table(result))


@command("predict", computes=True)
def predict(
    checkpoint: Checkpoint, images: Annotated[list[Path], typer.Argument(help="Image files.")], as_json: AsJson = False
) -> None:
    """Name the three likeliest classes on images. By a checkpoint or an export of one (.safetensors, .onnx).

    Example: micronet.py predict ckpt/ex photo.jpg
    """
    render(predict_images(checkpoint, images, progress), predictions_table, as_json)


@command("score", computes=True)
def score_networks(
    names: Annotated[list[str] | None, typer.Argument(help="Networks, ckpt/ex or files; none: all networks.")] = None,
    rules: Annotated[Rules, typer.Option(help="The authors' count, the challenge's, or both.")] = "both",
    layers: Annotated[bool, typer.Option("--layers", help="Show every layer.")] = False,
    board: Annotated[bool, typer.Option("--board", help="Show the challenge's entries, too.")] = False,
    as_json: AsJson = False,
) -> None:
    """Count parameters and operations and, for CIFAR-100, MicroNet score. Of networks by name, of checkpoints, and of
    exports but .pt2.

    Example: micronet.py score ex ckpt/exx --rules official --board
    """
    if board and rules == "seed":
        raise Misconfigured("--board: the challenge's entries are scored by its own rules: expected --rules official")
    if board and as_json:
        raise Misconfigured("--board: is a table: expected without --json")
    counts = list(RULES) if rules == "both" else [rules]
    scores = [score for name in names or NETWORKS for score in score_network(name, counts, layers)]
    for s in scores if board else ():
        if s["score"] is None:
            raise Misconfigured(f"--board: {s['name']} was not trained on CIFAR-100, as all of the board were")
    render(scores, score_tables, as_json)
    for s in scores if layers and not as_json else []:
        new_console().print(layers_table(s))
    if board:
        new_console().print(board_table(scores))


@command("export", computes=True)
def export(
    checkpoint: Checkpoint,
    out: Annotated[Path, typer.Argument(help="File to write: .safetensors, .onnx or .pt2.")],
    data: Annotated[
        Path, typer.Option(help="Folder with the images to compare on, or random ones; 8 bits need training images.")
    ] = Path("data"),
    card: Annotated[bool, typer.Option("--card", help="Write README.md and labels.txt beside it, too.")] = False,
    bits: Annotated[
        int,
        typer.Option(help="Of its weights: 16; or 8 in an .onnx, and of its activations, scaled on training images."),
    ] = 16,
    as_json: AsJson = False,
) -> None:
    """Write a network as it ships, and check what was written. Batch norm and classifier are folded, weights have 16
    bits, or 8.

    Example: micronet.py export ckpt/ex shipped/ex.onnx --card
    """
    render([export_checkpoint(checkpoint, out, data, progress, card, bits)], export_table, as_json)


@command("import", computes=True)
def import_published(
    file: Annotated[Path, typer.Argument(help="A checkpoint that the method's authors published (.pytar).")],
    network: Annotated[str, typer.Option(help="What it is a checkpoint of, such as ex.")],
    out: Annotated[Path, typer.Option(help="Checkpoint to write (.safetensors).")],
) -> None:
    """Take a checkpoint that the method's authors published. Nothing in the file is executed.

    Example: micronet.py import ex.pytar --network ex --out ckpt/published/ex.safetensors
    """
    if not (name := find_network(network)):
        raise Misconfigured(f"--network = {shown(network)}: expected one of {', '.join(NETWORKS)}")
    if out.suffix != ".safetensors":
        raise Misconfigured(f"--out = {out}: expected a name that ends in .safetensors")
    check_output(out)
    with Screen(stderr=True).status(Text(printable(f"reading {file}"))):
        tensors, metadata = import_network(file, name)
    write_output(out, to_bytes(tensors, metadata)[0])
    say(new_console(), f"{out}: {count(len(tensors), 'tensor')} of {name}; try evaluate {out}")


def render(results: list[dict[str, Any]], table: Callable[..., RenderableType], as_json: bool) -> None:
    """Print results as JSON or as a table."""
    if as_json:
        typer.echo(json.dumps(results, indent=2, allow_nan=False))
    else:
        new_console().print(table(results))


if __name__ == "__main__":
    app(prog_name="micronet.py")
