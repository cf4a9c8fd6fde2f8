"""Training: the method's promises, and how a run is stopped."""

import math
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator, DistributedType
from conftest import TINY, build_network, invoke, reset_accelerate
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision.ops import StochasticDepth

import micronet
from micronet import EpochDone, Misconfigured, Schedule, Stage, Started, Stepped, load_checkpoint, train_stage

STAGE = Stage(
    "s", network="efficientnet_b0", width=0.1, depth=0.1, dataset="synthetic", train_images=60, test_images=50,
    batch_size=20, epochs=3, lr=((3, 0.02),),
)  # fmt: skip


def begin(stage: Stage, ckpt: Path) -> micronet.Run:
    reset_accelerate()
    state = micronet.kept_state(stage, ckpt, whole=True)
    return micronet.open_run(stage, Path("data"), ckpt, micronet.open_accelerator(), state)


def same_training(a: Path, b: Path) -> bool:
    (left, about_left), (right, about_right) = load_checkpoint(a), load_checkpoint(b)
    histories = [[record[:-2] for record in about.history] for about in (about_left, about_right)]  # without the clock
    same = left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
    return same and histories[0] == histories[1]


def test_the_events_of_a_stage(tmp_path: Path) -> None:
    """At each the rate is that of the step, in every group, and no mode of torch has leaked out of the generator."""
    stage, events = replace(STAGE, epochs=2, lr=Schedule("cosine", 0.02, 1)), []
    run = begin(stage, tmp_path)
    run.optimizer.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    for event in train_stage(stage, run):
        events.append(event)
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        assert not torch.is_autocast_enabled("cpu")
        if isinstance(event, Stepped):
            lr = micronet.learning_rate(stage, 9 * (event.epoch - 1) + event.step - 1)
            assert [event.lr, *(group["lr"] for group in run.optimizer.param_groups)] == [lr] * 3
    assert [type(event) for event in events] == [Started, *([Stepped] * 9 + [EpochDone]) * 2]
    steps = [event for event in events if isinstance(event, Stepped)]
    assert [(e.epoch, e.step, e.images) for e in steps[:10]] == [(1, s, 20 * s) for s in range(1, 10)] + [(2, 1, 20)]
    records = [event.record for event in events if isinstance(event, EpochDone)]
    assert [record.epoch for record in records] == [1, 2]
    assert all(math.isfinite(value) for record in records for value in record)


def test_it_learns(tmp_path: Path) -> None:
    stage = replace(STAGE, views=("jitter",), train_images=40, test_images=20, epochs=20, lr=((20, 0.01),), scale=16.0)
    run = begin(stage, tmp_path)
    list(train_stage(stage, run))
    assert run.history[-1].train_top1 > 50 and run.history[-1].train_loss < 0.5 * run.history[0].train_loss


@pytest.fixture
def chain(trained: Path, tmp_path: Path) -> dict[str, Stage]:
    """Stages whose first has been trained, in `tmp_path`."""
    shutil.copytree(trained / "ckpt" / "first", tmp_path / "first")
    return micronet.load_stages(trained / "stages.toml")


def test_the_teacher_is_frozen_and_sees_the_very_same_images(chain: dict[str, Stage], tmp_path: Path) -> None:
    run = begin(chain["second"], tmp_path)
    before = {name: tensor.clone() for name, tensor in run.teacher.state_dict().items()}
    seen: dict[nn.Module, list[torch.Tensor]] = {run.teacher: [], run.student: []}
    modes = set()

    def look(module: nn.Module, inputs: tuple[torch.Tensor]) -> None:
        if module is run.teacher or module.training:
            seen[module].append(inputs[0].detach().clone())
        modes.add((module is run.teacher, torch.is_grad_enabled(), run.teacher.training))

    for module in seen:
        module.register_forward_pre_hook(look)
    list(train_stage(chain["second"], run))
    after = run.teacher.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert len(seen[run.teacher]) == 18 and all(map(torch.equal, *seen.values()))
    assert modes == {(True, False, False), (False, True, False), (False, False, False)}
    assert not any(p.requires_grad or p.grad is not None for p in run.teacher.parameters())


def test_the_teachers_labels_decide_not_the_true_ones(chain: dict[str, Stage], tmp_path: Path) -> None:
    stage, weights = replace(chain["second"], epochs=1), []
    for shift in (0, 1):
        run = begin(stage, tmp_path)
        run.train.labels.add_(shift).remainder_(10)
        list(train_stage(stage, run))
        weights.append(run.student.embedding.weight.clone())
    assert torch.equal(*weights)


def test_a_step_against_plain_sgd(tmp_path: Path) -> None:
    """Two steps of the loop and of SGD written out by hand, from the same weights and batches."""
    stage = replace(STAGE, batch_size=60, views=("jitter", "crop"), epochs=1, lr=((1, 0.1),), weight_decay=0.1)
    run = begin(stage, tmp_path)
    twin = build_network("efficientnet_b0", 10, 0.1, 0.1)
    twin.load_state_dict(run.student.state_dict())
    plan = micronet.plan_epoch(stage, 1)
    momentum = {p: torch.zeros_like(p) for p in twin.parameters()}
    for step in range(2):
        how = plan.each(lambda t: t[step])
        cosines = twin(micronet.augment(run.train.pixels[how.image], how))
        loss = nn.functional.cross_entropy(5.0 * cosines, run.train.labels[how.image])
        for p, gradient in zip(momentum, torch.autograd.grad(loss, list(momentum))):
            momentum[p] = 0.9 * momentum[p] + gradient + 0.1 * p.detach()
            p.data -= 0.1 * momentum[p]
    list(train_stage(stage, run))
    for (name, ours), theirs in zip(run.student.named_parameters(), twin.parameters()):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4, msg=name)


def one_of_two(run: micronet.Run, process: int, monkeypatch: pytest.MonkeyPatch) -> micronet.Run:
    """Let a run take itself for one of two processes, whose means are 3 and whose sums are twice its own."""
    monkeypatch.setattr(Accelerator, "num_processes", 2)
    monkeypatch.setattr(Accelerator, "process_index", process)
    reduced = {"mean": lambda tensor: torch.full_like(tensor, 3), "sum": lambda tensor: 2 * tensor}
    monkeypatch.setattr(Accelerator, "reduce", lambda _, tensor, how: reduced[how](tensor))
    return run


def test_what_a_seed_and_what_a_process_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another seed other weights, images and blocks that are left out, another process other ones but for weights."""
    drawn = []
    for seed, process in ((0, 0), (0, 0), (1, 0), (0, 1)):
        stage = replace(STAGE, stochastic_depth=0.5, depth=0.5, seed=seed)
        run = one_of_two(begin(stage, tmp_path), process, monkeypatch)
        images, left_out = [], []
        run.student.register_forward_pre_hook(lambda _, inputs, images=images: images.append(inputs[0]))
        for module in run.student.modules():
            if isinstance(module, StochasticDepth):
                module.register_forward_hook(lambda *a, left_out=left_out: left_out.append(~a[2].flatten(1).any(1)))
        weights = run.student.embedding.weight.detach().clone()
        next(event for event in train_stage(stage, run) if isinstance(event, Stepped))
        drawn.append((weights, *images, torch.stack(left_out)))
        monkeypatch.undo()
    first, *others = drawn
    same = [list(map(torch.equal, first, other)) for other in others]
    assert same == [[True] * 3, [False] * 3, [True, False, False]]


def test_processes_are_tested_with_the_mean_of_their_statistics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of which the first epoch, and no other, takes out what they began with."""
    stage, seen, evaluate = replace(STAGE, epochs=2), [], micronet.evaluate

    def look(network: nn.Module, *rest: object) -> torch.Tensor:
        seen.append([float(buffer.max()) for buffer in network.stem[1].buffers()])
        return evaluate(network, *rest)

    monkeypatch.setattr(micronet, "evaluate", look)
    list(train_stage(stage, one_of_two(begin(stage, tmp_path), 0, monkeypatch)))
    left = 0.99**9  # of mean 0 and variance 1, after nine steps
    assert seen == [pytest.approx([3 / (1 - left), (3 - left) / (1 - left), 9], rel=1e-4), [3, 3, 18]]


def test_each_process_keeps_its_statistics_until_then(monkeypatch: pytest.MonkeyPatch) -> None:
    """DDP, as it is or compiled, would copy the first one's to all before each step."""
    ddp = nn.parallel.DistributedDataParallel
    for wrap in (lambda wrapper: wrapper, lambda wrapper: SimpleNamespace(_orig_mod=wrapper)):
        wrapper = ddp.__new__(ddp)  # as long as it is not called, it needs no other process
        wrapper.broadcast_buffers = True
        monkeypatch.setattr(Accelerator, "prepare", lambda *a, model=wrap(wrapper): (model, a[2]))
        micronet.new_run(STAGE, micronet.open_accelerator(), *[micronet.random_images(STAGE, 20)] * 2)
        assert not wrapper.broadcast_buffers


@pytest.mark.parametrize(("seen", "message"), [
    ({}, None),
    ({"mixed_precision": "bf16", "distributed_type": DistributedType.MULTI_CPU}, None),
    ({"mixed_precision": "fp8"}, "mixed_precision fp8: expected no, bf16 or fp16"),
    ({"distributed_type": DistributedType.FSDP}, "distributed_type FSDP: expected NO, MULTI_GPU or MULTI_CPU"),
    ({"num_processes": 1}, "launched as 2 processes, but accelerate sees 1"),
    ({"gpus": 1}, "launched as 2 processes on 1 GPU: launch at most one a GPU"),
])  # fmt: skip
def test_what_accelerate_was_asked_for_is_had_or_refused(
    seen: dict[str, object], message: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    had = {"num_processes": 2, "distributed_type": DistributedType.NO, "mixed_precision": "no", "gpus": 0} | seen
    monkeypatch.setattr("accelerate.Accelerator", lambda **_: SimpleNamespace(device=torch.device("cpu"), **had))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: had["gpus"])
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "2")
    with pytest.raises(Misconfigured, match=message) if message else nullcontext():
        micronet.open_accelerator()


def test_accumulation_keeps_the_global_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice half a batch: the same images and rates, as many optimiser steps, nearly the same weights."""
    stage, results = replace(STAGE, epochs=1, lr=((1, 0.001),)), []
    for parts in ("1", "2"):
        monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", parts)
        run, counted = begin(stage, tmp_path), []
        run.optimizer.optimizer.register_step_post_hook(lambda *_: counted.append(1))
        list(train_stage(stage, run))
        results.append((len(counted), run.student.embedding.weight.detach().clone(), run.history[0].train_loss))
    (steps, weights, loss), (steps2, weights2, loss2) = results
    assert steps == steps2 == 9 and loss == pytest.approx(loss2, rel=0.02)
    start = begin(stage, tmp_path).student.embedding.weight
    assert (weights - weights2).norm() < 0.5 * (weights - start).norm()


def test_a_teacher_that_changed_under_way_is_refused(trained: Path, write: Callable[..., Path], tmp_path: Path) -> None:
    """The same weights of another time are the same teacher."""
    shutil.copytree(trained / "ckpt", tmp_path, dirs_exist_ok=True)
    longer = write(TINY + "epochs = 4\nlr = [[2, 0.02], [4, 0.002]]")
    tensors, about = load_checkpoint(tmp_path / "first" / "best.safetensors")
    about = replace(about, history=tuple(record._replace(seconds=9.0) for record in about.history))
    for shift, words in ((1, "the teacher has changed since stage second began"), (0, "stage second is finished")):
        changed = tensors | {"embedding.bias": tensors["embedding.bias"] + shift}
        best = micronet.save_checkpoint(tmp_path / "first" / "best.safetensors", changed, about)
        for path in micronet.last_paths(tmp_path / "first"):
            kept, state = load_checkpoint(path)
            micronet.save_checkpoint(path, kept, replace(state, best_network=best.tensors))
        result = invoke("run-stage", "second", "--stages", longer, "--ckpt", tmp_path)
        assert result.exit_code == 3 * shift and words in result.output, result.output


def place(network: nn.Module, device: torch.device) -> None:
    """Do what `to` does, which cannot do it with fake tensors."""
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(parameter.detach().to(device)))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))


class OnDevice(TorchDispatchMode):
    """Fails at an operation that a tensor on the CPU takes part in."""

    def __torch_dispatch__(self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        result = func(*args, **(kwargs or {}))
        devices = {t.device.type for t in tree_leaves((args, kwargs, result)) if isinstance(t, torch.Tensor)}
        assert "cpu" not in devices, f"{func} on {devices}"
        return result


@pytest.mark.parametrize("kind", ["true labels", "refined", "pruned"])
def test_a_step_stays_on_its_device_and_asks_for_no_value(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as that can be seen without a GPU: with fake tensors, which have a device and a shape alone.

    Not on `cuda`, whose backward pass wants a driver. autocast, which knows no such device, is left out.
    """
    mode, device = FakeTensorMode(allow_non_fake_inputs=True), torch.device("lazy", 0)
    given = {"refined": {"teacher": "t"}, "pruned": {"sparsity": 0.5}}.get(kind, {})
    stage = Stage("s", network="efficientnet_ex", dataset="synthetic", train_images=64, test_images=32, **given)
    stage = replace(stage, views=tuple(micronet.VIEWS), batch_size=32, epochs=1)
    plan = micronet.plan_epoch(stage, 1)  # drawn on the CPU, brought over once
    parts = [micronet.synthetic_images(64, train) for train in (True, False)]
    student = build_network("efficientnet_ex", width=0.2, depth=0.2, stochastic_depth=0.5)
    teacher = micronet.fold_batch_norms(build_network("efficientnet_b0", width=0.2).eval())
    monkeypatch.setattr(micronet, "plan_epoch", lambda stage, epoch: plan)
    monkeypatch.setattr(torch, "autocast", lambda *args, **options: nullcontext())
    try:
        with mode:
            train, test = (part.to(device) for part in parts)
            for network in (student, teacher):
                place(network, device)
            accelerator = SimpleNamespace(
                device=device, num_processes=1, process_index=0, gradient_accumulation_steps=1,
                accumulate=lambda model: nullcontext(), autocast=nullcontext, backward=lambda loss: loss.backward(),
            )  # fmt: skip
            optimizer = torch.optim.SGD(student.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
            run = micronet.Run(accelerator, train, test, student, optimizer, student, None, None)
            run.teacher = teacher.requires_grad_(False) if kind == "refined" else None
            events = train_stage(stage, run)
            assert isinstance(next(events), Started) and isinstance(next(events), Stepped)
            with OnDevice():
                for step in range(2, stage.steps_per_epoch + 1):
                    event = next(events)
                    assert event.step == step and event.totals.device == device
                assert micronet.evaluate(student, run.test, 30.0).device == device
            with pytest.raises(AssertionError, match="_to_copy.*cpu"), OnDevice():
                event.totals.to("cpu")
            with pytest.raises(DataDependentOutputException):
                event.totals[0].item()
    finally:
        micronet.per_channel.cache_clear()


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_second_signal_ends_a_run_at_once(signum: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless it is the first one again: `uv run` sends each Ctrl-C twice, within a second."""
    now, asked, own = 100.0, [], lambda *_: None
    before = signal.signal(signum, own)
    monkeypatch.setattr(time, "monotonic", lambda: now)
    try:
        with micronet.StopRequest() as stop:
            stop.then = lambda: asked.append(now)
            assert not stop.made()
            for now in (100.0, 100.5, 101.0):
                signal.raise_signal(signum)
            assert stop.made() and asked == [100.0] and stop.stopped(STAGE, 2).exit_code == 128 + signum
            now = 101.1
            with pytest.raises(SystemExit) as ended:
                signal.raise_signal(signum)
        assert ended.value.code == 128 + signum and signal.getsignal(signum) == own
        signal.signal(signum, signal.SIG_IGN)
        with micronet.StopRequest() as stop:  # under nohup, which is about SIGHUP alone
            signal.raise_signal(signum)
            assert stop.made() == (signum != signal.SIGHUP)
    finally:
        signal.signal(signum, before)


@pytest.mark.parametrize(("at", "kept"), [(Stepped, 1), (EpochDone, None)])
def test_a_stop_in_the_last_epoch_comes_too_late_once_that_is_done(at: type, kept: int | None, tmp_path: Path) -> None:
    stage, events = replace(STAGE, epochs=2, views=("crop",)), []
    run = begin(stage, tmp_path)
    with micronet.StopRequest() as stop, pytest.raises(micronet.Stopped, match="1 of 2") if kept else nullcontext():
        for event in micronet.stoppable(stage, run, stop):
            events.append(type(event))
            if len(run.history) == (kept or 2) and isinstance(event, at):
                stop.note(signal.SIGTERM, None)
    assert len(run.history) == (kept or 2) == events.count(EpochDone)
