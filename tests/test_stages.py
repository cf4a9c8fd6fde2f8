"""stages.toml: the published recipe, the rate at every step, and every mistake in one line."""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROOT, WIDE, invoke, program, refused

from micronet import (
    Schedule, Stage, build_network, layer_costs, learning_rate, load_stages, total_cost, with_parents,
)  # fmt: skip


def test_stages_toml_is_the_published_recipe() -> None:
    stages = load_stages(ROOT / "stages.toml")
    common = dict(
        dataset="cifar100", views=("jitter", "jitter-crop", "crop"), batch_size=128, epochs=70,
        lr=((25, 0.07), (50, 0.007), (65, 0.0007), (70, 0.00007)), momentum=0.9, weight_decay=1e-4,
        scale=5.0, margin=0.0,
    )  # fmt: skip
    b3, b0, ex, exx = (f"efficientnet_{name}" for name in ("b3", "b0", "ex", "exx"))
    assert list(stages.values()) == [
        Stage("b3", network=b3, stochastic_depth=0.2, **common),
        Stage("b3_refined", network=b3, teacher="b3", stochastic_depth=0.2, **common),
        Stage("b0", network=b0, teacher="b3_refined", stochastic_depth=0.2, **common),
        Stage("ex", network=ex, teacher="b0", **common),
        Stage("exx", network=exx, teacher="b0", **common),
    ]
    assert stages["ex"].steps_per_epoch == 1172  # 150,000 images
    rates = [learning_rate(stages["b3"], epoch * 1172) for epoch in range(70)]
    assert rates == [0.07] * 25 + [0.007] * 25 + [0.0007] * 15 + [0.00007] * 5
    assert learning_rate(stages["b3"], 25 * 1172 - 1) == 0.07


SHIPPED = [path for folder in (ROOT, ROOT / "benchmarks") for path in sorted(folder.glob("*.toml"))]


@pytest.mark.parametrize("path", [p for p in SHIPPED if p.name != "pyproject.toml"], ids=lambda path: path.stem)
def test_every_file_of_stages_here_makes_sense(path: Path, tmp_path: Path) -> None:
    for part, name in itertools.product(("train", "test"), ("this", "that")):
        (folder := tmp_path / "own" / part / name).mkdir(parents=True)
        for n in range(16):
            (folder / f"{n}.png").touch()
    stages = load_stages(path, tmp_path)
    assert with_parents(stages, list(stages))


def test_small100_has_a_fifth_of_the_operations_of_exx() -> None:
    own, exx = load_stages(ROOT / "small100.toml")["ex"], Stage("exx", network="efficientnet_exx")
    own, exx = (total_cost(layer_costs(build_network(stage), "official").values()).ops for stage in (own, exx))
    assert 0.19 * exx < own < 0.2 * exx


@pytest.mark.parametrize("schedule", ["cosine", "one-cycle"])
def test_schedules_against_their_formula(schedule: str) -> None:
    """Over ten epochs of ten steps; a warm-up may be a fraction of an epoch."""
    stage = Stage("s", network="b0", dataset="synthetic", train_images=100, views=("jitter",), batch_size=10)
    stage = replace(stage, epochs=10, lr=Schedule(schedule, 0.2, 2))
    rates = [learning_rate(stage, step) for step in range(100)]
    assert rates[:20] == pytest.approx([0.01 * (step + 1) for step in range(20)])
    for step in range(20, 100):
        d = (step - 20) / 80
        expected = 0.1 * (1 + math.cos(math.pi * d)) if schedule == "cosine" else 0.2 * (1 - d)
        assert rates[step] == pytest.approx(expected)
    assert rates[19] == rates[20] == 0.2 and 0 < rates[-1] < 0.003
    stage = replace(stage, lr=Schedule(schedule, 1.0, 0.15))
    assert [learning_rate(stage, step) for step in (0, 1)] == pytest.approx([1 / 1.5, 1.0])


def test_teachers_come_first() -> None:
    stages = load_stages(ROOT / "stages.toml")
    for names, order in {
        ("exx", "b0"): ["b3", "b3_refined", "b0", "exx"],
        ("b0", "b3"): ["b3", "b3_refined", "b0"],
        tuple(stages): ["b3", "b3_refined", "b0", "ex", "exx"],
    }.items():
        assert [stage.name for stage in with_parents(stages, names)] == order


GOOD = '[stage.a]\nnetwork = "efficientnet_b0"\n'
CHILD, NO_CYCLE = '[stage.b]\nnetwork = "ex"\n', "expected no cycle, but it goes"
MISTAKES = {  # what stands in the file: what the line must name
    "": "no stage",
    "this is not toml": "not valid TOML",
    "[stage.a]\nnetwork = 1\n[stage.a]": "not valid TOML",
    "[stages.a]": '"stages": unknown; accepted: [defaults] and [stage.NAME]',
    "[stage]": "no stage",
    "stage = 3": "no stage",
    "[stage]\na = 3": "stage a: 3: expected a table",
    "defaults = 3\n" + GOOD: "[defaults]: 3: expected a table",
    "[stage.a]\nepochs = 1": "stage a: network is missing; accepted: efficientnet_b0, ",
    '[stage."../x"]\nnetwork = "efficientnet_b0"': "stage ../x: a stage's name is made of",
    '[stage.a]\nnetwork = "resnet"': 'stage a: network = "resnet": expected one of efficientnet_b0, efficientnet_b3',
    GOOD + "epoch = 3": 'stage a: "epoch": unknown key; accepted: network, width',
    "[defaults]\nepoch = 3\n" + GOOD: '[defaults]: "epoch": unknown key',
    GOOD + "epochs = 0": "stage a: epochs = 0: expected a whole number from 1 to 10,000",
    GOOD + "epochs = 71": "stage a: lr = [[25, 0.07], [50, 0.007], [65, 0.0007], [70, 7e-05]]: expected rates up to",
    GOOD + "lr = [[70, nan]]": "stage a: lr = [[70, NaN]]: expected",
    GOOD + 'lr = { schedule = "step", peak = 1 }': "stage a: lr = ",
    GOOD + 'lr = { schedule = "cosine" }': "stage a: lr = ",
    GOOD + 'lr = { schedule = "cosine", peak = 1, warmup_epochs = 70 }': "lr.warmup_epochs = 70.0: expected less than",
    GOOD + "scale = inf": "stage a: scale = Infinity: expected a number above 0",
    GOOD + f"scale = {10**400}": "stage a: scale = 1000",
    GOOD + "views = []": "stage a: views = []: expected a list of one or more of jitter, jitter-crop, crop",
    GOOD + 'dataset = "imagenet"': 'stage a: dataset = "imagenet": expected one of cifar100, cifar10, synthetic, or folder:NAME',
    GOOD + "side = 48": "side = 48: expected a multiple of 32 up to 256",
    GOOD + "side = 288": "side = 288: expected a multiple",
    GOOD + 'side = 64\ndataset = "cifar10"': "side = 64: expected 32, which the images of cifar10",
    GOOD + "train_images = 50001": "stage a: train_images = 50001: expected at most 50000",
    GOOD + "test_images = 10001": "stage a: test_images = 10001: expected at most 10000",
    GOOD + "train_images = 100": "stage a: batch_size = 128: expected at most the 100 training images",
    GOOD + "batch_size = 50001": "stage a: batch_size = 50001: expected at most the 50000 training images",
    GOOD + 'teacher = "b"': 'stage a: teacher = "b": expected another stage (there is none) or the path of a checkpoint',
    GOOD + 'start = "c"\n' + CHILD: 'stage a: start = "c": expected another stage (b) or the path of a checkpoint',
    GOOD + 'teacher = "a"': f'stage a: teacher = "a": {NO_CYCLE} a -> a',
    GOOD + 'start = "a"': f'stage a: start = "a": {NO_CYCLE} a -> a',
    GOOD + 'teacher = "b"\n' + CHILD + 'start = "c"\n' + CHILD.replace(".b", ".c") + 'teacher = "a"': "a -> b -> c -> a",
    '[stage.c]\nnetwork = "ex"\nteacher = "a"\n' + GOOD + 'teacher = "b"\n' + CHILD + 'teacher = "a"': "a -> b -> a",
    GOOD + CHILD + 'teacher = "a"\nscale = 6': "stage b: scale = 6.0: expected that of its teacher a, 5.0",
    GOOD + CHILD + 'teacher = "a"\ndataset = "cifar10"': 'dataset = "cifar10": expected that of its teacher a, "cifar100"',
    GOOD + CHILD + 'start = "a"': 'network = "efficientnet_ex": expected that of its start a, "efficientnet_b0"',
    GOOD + GOOD.replace(".a", ".b") + 'start = "a"\nwidth = 0.5': "width = 0.5: expected that of its start a, 1.0",
    GOOD + GOOD.replace(".a", ".b") + 'start = "a"\ndepth = 0.5': "depth = 0.5: expected that of its start a, 1.0",
    GOOD + "sparsity = 0.5\nprune_epochs = 71": "prune_epochs = 71: expected at most epochs = 70",
    GOOD + "prune_epochs = 2": "prune_epochs = 2: expected a sparsity above 0 with it",
}  # fmt: skip
UNACCEPTABLE = """epochs = true | epochs = "70" | epochs = 1.5 | lr = -0.1 | lr = [[70, -0.1]] | lr = [[70, 0.1], [70, 0.01]]
momentum = 1 | weight_decay = -0.1 | scale = 0 | margin = -1 | stochastic_depth = 1 | width = 0 | depth = 0 | seed = -1
views = ["crop", "crop"] | views = "crop" | side = 32.0 | sparsity = 1"""
for line in UNACCEPTABLE.replace("\n", " | ").split(" | "):
    MISTAKES[GOOD + line] = f"stage a: {line.strip()}: expected "
for name in ("", "../x", "a/b", ".", "..", ".git", "a\\b"):
    MISTAKES[GOOD + f"dataset = 'folder:{name}'"] = "expected one of cifar100, cifar10, synthetic, or folder:NAME\n"


@pytest.mark.parametrize("text", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(text: str, write: Callable[..., Path]) -> None:
    assert refused(invoke("run-stage", "a", "--stages", path := write(text)), f"error: {path}: ", MISTAKES[text])


def test_a_file_that_is_not_there_or_no_text(tmp_path: Path) -> None:
    (binary := tmp_path / "binary.toml").write_bytes(bytes(range(256)))
    for path, message in ((tmp_path / "missing.toml", "No such"), (tmp_path, "not a file"), (binary, "not valid TOML")):
        assert refused(invoke("chain", "--stages", path), f"error: {path}: {message}")


@pytest.mark.parametrize("command", ["run-stage", "chain", "bench"])
def test_an_unknown_stage_is_named(command: str, write: Callable[..., Path]) -> None:
    words = 'error: "third": no such stage; there are first, second (or name --stages)\n'
    assert refused(invoke(command, "third", "--stages", write()), words)


def test_a_mistake_does_not_wait_for_torch(write: Callable[..., Path]) -> None:
    """The program itself checks stages and checkpoints before it imports torch."""
    path = write(GOOD + "epochs = 0")
    for words, code, message in (
        (["run-stage", "a", "--stages", path], 2, f"{path}: stage a: epochs = 0"),
        (["evaluate", "none", "nor this"], 3, "none: No such file"),
        (["export", "none", "out.onnx"], 3, "none: No such file"),
    ):
        result = program(*words, env=WIDE | {"PYTHONPROFILEIMPORTTIME": "1"})
        imported = [line.split()[-1] for line in result.stderr.splitlines() if line.startswith("import time")]
        assert (result.returncode, result.stdout) == (code, "") and "rich" in imported and "torch" not in imported
        (error,) = (line for line in result.stderr.splitlines() if not line.startswith("import time"))
        assert error.startswith(f"error: {message}")
