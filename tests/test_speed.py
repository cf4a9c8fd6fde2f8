"""Speed: what is measured adds up, and the fast trainer computes what the plain one does."""

import copy
import ctypes
import itertools
import json
import platform
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import ROOT, build_network, invoke, load_script
from test_training import same_training
from torch import nn

import micronet
from micronet import Stage, Stepped, augment, load_stages, plan_epoch, random_images


def copied(plain: ModuleType, network: nn.Module, width: float, depth: float) -> nn.Module:
    """Return the plain network with the weights of one of ours."""
    copy = plain.PlainNetwork(100, width, depth)
    ours = network.state_dict()
    assert [tuple(t.shape) for t in ours.values()] == [tuple(t.shape) for t in copy.state_dict().values()]
    copy.load_state_dict({name: tensor.contiguous() for name, tensor in zip(copy.state_dict(), ours.values())})
    return copy


SMALL = Stage("small", network="efficientnet_ex", width=0.1, depth=0.1, train_images=40, batch_size=20, epochs=1)


def run_of(stage: Stage, taught: bool = False) -> micronet.Run:
    """Return a run on random images."""
    run = micronet.new_run(stage, micronet.open_accelerator(), *[random_images(stage, stage.train_size)] * 2)
    if taught:
        run.teacher = build_network("efficientnet_b0", 100, 0.1, 0.1).eval().requires_grad_(False)
    return run


@pytest.mark.parametrize("taught", [False, True])
def test_twenty_steps_follow_the_plain_trainer(taught: bool, plain: ModuleType) -> None:
    """The same weights and batches: the losses of the loop of train_stage and of the plain one agree to 1e-4."""
    images, steps, rate = 8, 20, 0.02
    stage = replace(SMALL, train_images=54, batch_size=images, lr=((1, rate),))
    run = run_of(stage, taught)
    copy = copied(plain, run.student, 0.1, 0.1)
    old = copied(plain, run.teacher, 0.1, 0.1).eval() if taught else None
    plans = [plan_epoch(stage, 1).each(lambda t: t[step]) for step in range(steps)]
    batches = [(augment(run.train.pixels[how.image], how), run.train.labels[how.image]) for how in plans]
    expected = plain.train(copy, old, batches, rate, stage.scale)
    stepped = (event for event in micronet.train_stage(stage, run) if isinstance(event, Stepped))
    totals = [float(event.totals[0]) / images for event in itertools.islice(stepped, steps)]
    losses = [b - a for a, b in itertools.pairwise([0.0, *totals])]
    assert len(losses) == steps and losses == pytest.approx(expected, abs=1e-4)


def test_a_teacher_works_in_place_and_answers_with_the_same_bits() -> None:
    """As the network that it is made of, its batch norms folded; the images stay as they are."""
    network = build_network("efficientnet_b0", 100, 0.2, 0.2)
    folded = micronet.fold_batch_norms(copy.deepcopy(network))
    teacher = micronet.place_teacher(network, micronet.open_accelerator())
    maps = torch.randn(4, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    before = maps.clone()
    with torch.no_grad():
        assert torch.equal(teacher(maps), folded(maps)) and torch.equal(maps, before)
        for layer, ours in zip(teacher.modules(), folded.modules()):
            if isinstance(layer, nn.SiLU):
                assert layer(maps) is maps
            if isinstance(layer, micronet.SqueezeExcitation):
                inside = torch.randn(2, layer[1].in_channels, 4, 4)
                expected = ours(inside.clone())
                assert layer(inside) is inside and torch.equal(inside, expected)


HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
HUGE_PAGE_MODE = HUGE_PAGES.read_text() if HUGE_PAGES.exists() else ""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc" or platform.libc_ver()[1] < "2.35", reason="no such glibc")
@pytest.mark.skipif("[madvise]" not in HUGE_PAGE_MODE, reason="the kernel gives huge pages to all or to none")
def test_a_launched_stage_asks_for_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """As /proc has it: "hg" among the flags of the memory that a tensor lies in, beside what keeps freed memory."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    launch = micronet.plan_launch(ROOT / "accelerate_config.yaml", micronet.new_console(quiet=True))
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import micronet, torch; micronet.keep_freed_memory()\n"
    program += "maps = torch.ones(2**24); print(maps.data_ptr(), open('/proc/self/smaps').read(), sep='\\n')"
    asked = []
    for environment in (launch.environment, launch.environment | {"GLIBC_TUNABLES": ""}):
        command = [sys.executable, "-c", program]
        said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
        pointer, *lines = said.splitlines()
        inside = False
        for line in lines:
            if span := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
                inside = int(span[1], 16) <= int(pointer) < int(span[2], 16)
            elif inside and line.startswith("VmFlags:"):
                asked.append("hg" in line.split())
    assert asked == [True, False]


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="not glibc")
@pytest.mark.skipif("[always]" in HUGE_PAGE_MODE, reason="huge pages hide the faults")
def test_a_command_that_computes_keeps_freed_memory() -> None:
    """Without that, every one of these tensors would be faulted in anew: 16,384 pages each."""
    assert invoke("evaluate", "missing.safetensors").exit_code == 3
    faults = []
    for _ in range(20):
        torch.ones(2**24)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
    assert faults[-1] - faults[-4] < 2000, faults  # the first ones find the room, many in a heap with many holes


def test_bench_measures_every_part_without_data(write: Callable[..., Path], tmp_path: Path) -> None:
    path = write()
    result = invoke("bench", "second", "--stages", path, "--ckpt", tmp_path, "--steps", 5, "--json")
    assert result.exit_code == 0, result.output
    (second,) = json.loads(result.stdout)
    first = json.loads(invoke("bench-stage", "first", "--stages", path, "--steps", 5, "--profile").stdout)
    assert (first["stage"], second["stage"]) == ("first", "second")
    for speed in (first, second):
        step = speed["batch_size"] / speed["images_per_second"]
        assert step > 0 and set(speed["seconds"]) == set(micronet.PARTS) and min(speed["seconds"].values()) >= 0
        assert speed["precision"] == "fp32" and speed["compile"] is None and speed["device"].startswith("CPU")
        assert 100 < speed["peak_memory_mb"] < 4000
    assert "convolution_backward" in first["profile"] and second["images_left"] == 3 * 120
    assert second["seconds_left"] == pytest.approx(second["images_left"] / second["images_per_second"])
    assert first["seconds"]["teacher"] == 0 < second["seconds"]["teacher"]


def test_the_parts_of_a_step_are_those_of_the_training_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slow one part down by a known time: that part, and no other, takes so much longer."""
    run = run_of(SMALL, taught=True)
    now = 0.0  # a clock that stands but where a part takes its time

    def takes(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr(time, "perf_counter", lambda: now)
    run.teacher.register_forward_pre_hook(lambda *_: takes(0.25))
    run.model.register_forward_pre_hook(lambda *_: takes(0.5))
    run.student.head.register_forward_hook(lambda *_: takes(2.0))
    run.student.stem[0].weight.register_hook(lambda _: takes(4.0))
    run.optimizer.optimizer.register_step_post_hook(lambda *_: takes(8.0))
    monkeypatch.setattr(micronet, "augment", lambda *a, augment=augment: takes(1.0) or augment(*a))
    expected = {"views": 1.5, "teacher": 0.25, "forward": 2.0, "backward": 4.0, "optimizer": 8.0, "rest": 0.0}
    for step in micronet.train_timed(SMALL, run, 5):
        assert step == expected | {"step": 15.75}


def test_more_steps_than_an_epoch_has_are_timed() -> None:
    stage = replace(SMALL, batch_size=40, views=("crop",), epochs=9, lr=((9, 0.1),))
    run = run_of(stage)
    assert len(micronet.train_timed(stage, run, 4)) == 3 and len(run.history) == 3


def test_compilation_as_configured_changes_nothing_but_the_speed(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the last epoch of a stage, by torch's own front end with a back end that needs no C++ compiler."""
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda m, compile=torch.compile, **k: compiled.append(k) or compile(m, **k))
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    ckpt = shutil.copytree(trained / "ckpt", tmp_path / "ckpt")
    (ckpt / "second" / "last.safetensors").unlink()  # previous.safetensors is of the epoch before
    result = invoke("run-stage", "second", "--stages", trained / "stages.toml", "--ckpt", ckpt)
    assert result.exit_code == 0 and "compiled by eager" in result.output and "epoch 2 of 3" in result.output
    assert [k["backend"] for k in compiled] == ["eager"] * 2  # student and teacher
    assert same_training(*(folder / "second" / "last.safetensors" for folder in (trained / "ckpt", ckpt)))


def test_traffic_counts_elements_and_multiplications() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4096, 10))
    image, hidden = 3 * 32 * 32, 4 * 32 * 32
    moved = (image + hidden) + 2 * hidden + 2 * hidden + (hidden + 10)
    assert load_script("limit").traffic(network) == (moved, hidden * 27 + 4096 * 10)


def test_what_bounds_a_stage_is_a_share(write: Callable[..., Path]) -> None:
    stages = load_stages(write())
    judged = load_script("limit").judge(*micronet.bare_run(stages["second"], stages, None, 2), 2)
    assert 0 <= judged["idle"] < 1 and 0 < judged["limit"] and judged["stage"] == "second"


def test_the_plain_trainer_prints_its_speed(
    plain: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = f"--data {tmp_path} --batch-size 2 --steps 2 --warm-up 1 --workers 1 --teacher efficientnet_exx"
    monkeypatch.setattr(sys, "argv", ["plain.py", *options.split()])
    plain.main()
    speed = json.loads(capsys.readouterr().out)
    assert speed["images_per_second"] > 0 and speed["peak_memory_mb"] > 100 and speed["batch_size"] == 2


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["first", "second"])
def test_a_step_never_waits_for_the_gpu(name: str, write: Callable[..., Path]) -> None:
    stage = replace(load_stages(write())[name], train_images=100)
    run = run_of(stage, taught=stage.teacher is not None)
    if stage.teacher:
        run.teacher.cuda()
    try:
        for event in micronet.train_stage(stage, run):
            if isinstance(event, Stepped) and event.step == 2:  # the first step fills caches
                torch.cuda.set_sync_debug_mode("error")
            if isinstance(event, Stepped) and event.step == 10:
                break
    finally:
        torch.cuda.set_sync_debug_mode("default")
