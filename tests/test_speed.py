"""Speed: what is measured adds up, and the fast trainer computes what the plain one does."""

import ctypes
import io
import json
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
from conftest import ONE_EPOCH, ROOT, WIDE, invoke, load_script, reset_accelerate
from test_training import same_training
from torch import nn

import micronet
from micronet import Stage, Stepped, augment, build_network, load_stages, plan_epoch, random_images


def copied(plain: ModuleType, network: nn.Module, width: float, depth: float) -> nn.Module:
    """Return the plain network with the weights of one of ours."""
    copy = plain.PlainNetwork(100, width, depth)
    ours = network.state_dict()
    assert [tuple(t.shape) for t in ours.values()] == [tuple(t.shape) for t in copy.state_dict().values()]
    copy.load_state_dict({name: tensor.contiguous() for name, tensor in zip(copy.state_dict(), ours.values())})
    return copy


@pytest.mark.parametrize("name", list(micronet.NETWORKS))
def test_the_fast_network_is_the_plain_one(name: str, plain: ModuleType) -> None:
    torch.manual_seed(0)
    network = build_network(name)
    copy = copied(plain, network, *micronet.NETWORKS[name])
    x = torch.randn(2, 3, 32, 32)
    for mode in (True, False):
        ours, theirs = network.train(mode)(x), copy.train(mode)(x)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)


@pytest.mark.parametrize("taught", [False, True])
def test_fifty_steps_follow_the_plain_trainer(taught: bool, plain: ModuleType) -> None:
    """The same weights and batches: the losses of the loop of train_stage and of the plain one agree to 1e-3."""
    images, rate = 8, 0.02
    stage = Stage(
        "small", network="efficientnet_ex", width=0.1, depth=0.1, train_images=134, batch_size=images, epochs=1
    )
    stage = replace(stage, lr=((1, rate),))
    accelerator = micronet.open_accelerator()
    run = micronet.new_run(stage, accelerator, random_images(stage, 134), random_images(stage, 20))
    teacher = build_network("efficientnet_b0", 100, 0.1, 0.1).eval().requires_grad_(False) if taught else None
    run.teacher = teacher
    copy = copied(plain, run.student, 0.1, 0.1)
    old = copied(plain, teacher, 0.1, 0.1).eval() if taught else None

    plan = plan_epoch(stage, 1)
    batches = [(augment(run.train.pixels[how.image], how), run.train.labels[how.image])
               for how in (plan.at(step) for step in range(50))]  # fmt: skip
    expected = plain.train(copy, old, batches, rate, stage.scale)
    totals = []
    for event in micronet.train_stage(stage, run):
        if isinstance(event, Stepped):
            totals.append(float(event.totals[0]) / images)
            if event.step == 50:
                break
    losses = [b - a for a, b in zip([0.0, *totals], totals)]
    assert len(losses) == 50 and losses == pytest.approx(expected, abs=1e-3)


HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="not glibc")
@pytest.mark.skipif(HUGE_PAGES.exists() and "[always]" in HUGE_PAGES.read_text(), reason="huge pages hide the faults")
def test_a_command_that_computes_keeps_freed_memory() -> None:
    """Without that, every one of these tensors would be faulted in anew: 16,384 pages each."""
    assert invoke("evaluate", "missing.safetensors").exit_code == 3
    faults = []
    for _ in range(10):
        torch.ones(2**24)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
    assert faults[9] - faults[4] < 2000, faults  # the first ones find the room


STAGES = """
[defaults]
width = 0.1
depth = 0.1
batch_size = 20
epochs = 3
lr = [[3, 0.02]]
[stage.first]
network = "efficientnet_b0"
[stage.second]
network = "efficientnet_ex"
teacher = "first"
"""


def test_bench_measures_every_part_without_data(write: Callable[..., Path], tmp_path: Path) -> None:
    """As JSON, and what a table shows of it."""
    path = write(STAGES)
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
    assert "convolution_backward" in first["profile"] and second["images_left"] == 3 * 150_000
    assert second["seconds_left"] == pytest.approx(second["images_left"] / second["images_per_second"])
    assert first["seconds"]["teacher"] == 0 < second["seconds"]["teacher"]
    console = micronet.Screen(file=io.StringIO(), width=120)
    console.print(micronet.speed_table([second]))
    lines = {
        line.split("  ")[0].strip(): line.split()[-1] for line in console.file.getvalue().splitlines() if line.strip()
    }
    assert lines["network"] == "ex" and lines["teacher"] == "first" and "time left" in lines
    assert lines["images/s"] == f"{second['images_per_second']:,.1f}"


def test_bench_names_a_stage_that_is_not_there(write: Callable[..., Path], tmp_path: Path) -> None:
    result = invoke("bench", "third", "--stages", write(STAGES), "--ckpt", tmp_path)
    assert result.exit_code == 2 and 'error: "third": no such stage; there are first, second' in result.output


def test_the_parts_of_a_step_are_those_of_the_training_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slow one part down by a known time: that part, and no other, takes so much longer."""
    stage = Stage("small", network="efficientnet_ex", width=0.1, depth=0.1, train_images=40, batch_size=20, epochs=1)
    run = micronet.new_run(stage, micronet.open_accelerator(), *[random_images(stage, 40)] * 2)
    run.teacher = build_network("efficientnet_b0", 100, 0.1, 0.1).eval().requires_grad_(False)
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
    for step in micronet.train_timed(stage, run, 5):
        assert step == expected | {"step": 15.75}


def test_more_steps_than_an_epoch_has_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage("small", network="efficientnet_ex", width=0.1, depth=0.1, train_images=40, batch_size=40, epochs=9)
    stage = replace(stage, views=("crop",), lr=((9, 0.1),))
    run = micronet.new_run(stage, micronet.open_accelerator(), *[random_images(stage, 40)] * 2)
    assert len(micronet.train_timed(stage, run, 4)) == 3 and len(run.history) == 3


def test_compilation_as_configured_changes_nothing_but_the_speed(
    write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Student and teacher, compiled by torch's own front end with a back end that needs no C++ compiler."""
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda m, compile=torch.compile, **k: compiled.append(k) or compile(m, **k))
    for folder, stage, backend in (
        ("plain", "first", "NO"), ("plain", "second", "NO"), ("compiled", "second", "EAGER"),
    ):  # fmt: skip
        monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", backend)
        if backend == "EAGER":
            shutil.copytree(tmp_path / "plain" / "first", tmp_path / "compiled" / "first")
        result = invoke("run-stage", stage, "--stages", write(ONE_EPOCH), "--ckpt", tmp_path / folder)
        assert result.exit_code == 0 and ("compiled by eager" in result.output) == (backend == "EAGER")
        reset_accelerate()
    assert [k["backend"] for k in compiled] == ["eager"] * 2  # student and teacher
    assert same_training(*(tmp_path / folder / "second" / "last.safetensors" for folder in ("plain", "compiled")))


def test_traffic_counts_elements_and_multiplications() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4096, 10))
    image, hidden = 3 * 32 * 32, 4 * 32 * 32
    moved = (image + hidden) + 2 * hidden + 2 * hidden + (hidden + 10)
    assert load_script("limit").traffic(network) == (moved, hidden * 27 + 4096 * 10)


def test_what_bounds_a_stage_is_a_share(write: Callable[..., Path]) -> None:
    stages = load_stages(write(STAGES))
    judged = load_script("limit").judge(*micronet.bare_run(stages["second"], stages, None, 2), 2)
    assert 0 <= judged["idle"] < 1 and 0 < judged["limit"] and judged["stage"] == "second"


def test_the_plain_trainer_prints_its_speed(tmp_path: Path) -> None:
    options = ["--data", tmp_path, "--batch-size", 4, "--steps", 2, "--warm-up", 1, "--workers", 1]
    command = [sys.executable, ROOT / "benchmarks" / "plain.py", "--teacher", "efficientnet_b0", *options]
    result = subprocess.run([str(word) for word in command], capture_output=True, text=True, env=WIDE)
    speed = json.loads(result.stdout)
    assert speed["images_per_second"] > 0 and speed["peak_memory_mb"] > 100 and speed["batch_size"] == 4


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["first", "second"])
def test_a_step_never_waits_for_the_gpu(name: str, write: Callable[..., Path]) -> None:
    stage = replace(load_stages(write(STAGES))[name], train_images=100)
    run = micronet.new_run(stage, micronet.open_accelerator(), *[random_images(stage, 100)] * 2)
    if stage.teacher:
        run.teacher = build_network("efficientnet_b0", 100, 0.1, 0.1).eval().requires_grad_(False).cuda()
    try:
        for event in micronet.train_stage(stage, run):
            if isinstance(event, Stepped) and event.step == 2:  # the first step fills caches
                torch.cuda.set_sync_debug_mode("error")
            if isinstance(event, Stepped) and event.step == 10:
                break
    finally:
        torch.cuda.set_sync_debug_mode("default")
