"""Training: the method's promises, and the same bits after an interruption."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import invoke, reset_accelerate
from torch import nn

import micronet
from micronet import (
    EpochDone,
    Failure,
    Finished,
    Stage,
    Started,
    Stepped,
    load_checkpoint,
    load_stages,
    open_accelerator,
    open_run,
    train_stage,
)

STAGE = Stage(
    "s", network="efficientnet_b0", width=0.1, depth=0.1, dataset="synthetic", train_images=60, test_images=50,
    batch_size=20, epochs=3, lr=((3, 0.02),),
)  # fmt: skip


def begin(stage: Stage, ckpt: Path) -> micronet.Run:
    return open_run(stage, Path("data"), ckpt, open_accelerator())


def same_training(a: Path, b: Path) -> bool:
    (left, about_left), (right, about_right) = load_checkpoint(a), load_checkpoint(b)
    clock = {"seconds", "images_per_second"}
    histories = [
        [{k: v for k, v in record.items() if k not in clock} for record in about["history"]]
        for about in (about_left, about_right)
    ]
    same = left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
    return same and histories[0] == histories[1]


def test_the_events_of_a_stage(tmp_path: Path) -> None:
    events = list(train_stage(STAGE, begin(STAGE, tmp_path)))
    assert [type(event) for event in events] == [Started, *([Stepped] * 9 + [EpochDone]) * 3, Finished]
    steps = [event for event in events if isinstance(event, Stepped)]
    assert [(e.epoch, e.step, e.images) for e in steps[:10]] == [(1, s, 20 * s) for s in range(1, 10)] + [(2, 1, 20)]
    records = [event.record for event in events if isinstance(event, EpochDone)]
    assert [record["epoch"] for record in records] == [1, 2, 3]
    assert all(math.isfinite(value) for record in records for value in record.values())


def test_it_learns(tmp_path: Path) -> None:
    stage = replace(STAGE, views=("jitter",), train_images=40, epochs=24, lr=((24, 0.01),), scale=16.0)
    run = begin(stage, tmp_path)
    list(train_stage(stage, run))
    assert run.history[-1]["train_top1"] > 60 and run.history[-1]["train_loss"] < 0.5 * run.history[0]["train_loss"]


def test_no_grad_or_autocast_leaks_out_of_the_generator(tmp_path: Path) -> None:
    for _ in train_stage(replace(STAGE, epochs=1, lr=((1, 0.02),)), begin(STAGE, tmp_path)):
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        assert not torch.is_autocast_enabled("cpu")


@pytest.fixture
def chain(write: Callable[..., Path], tmp_path: Path) -> dict[str, Stage]:
    """Stages whose first has been trained, in `tmp_path`."""
    path = write()
    assert invoke("run-stage", "first", "--stages", path, "--ckpt", tmp_path).exit_code == 0
    return load_stages(path)


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
        reset_accelerate()
    assert torch.equal(*weights)


def test_a_step_against_plain_sgd(tmp_path: Path) -> None:
    """Two steps of the loop and of SGD written out by hand, from the same weights and batches."""
    stage = replace(STAGE, batch_size=60, train_images=60, views=("jitter", "crop"), epochs=1, lr=((1, 0.1),))
    run = begin(stage, tmp_path)
    twin = micronet.build_network("efficientnet_b0", 10, 0.1, 0.1)
    twin.load_state_dict(run.student.state_dict())
    plan = micronet.plan_epoch(stage, 1)
    momentum = {p: torch.zeros_like(p) for p in twin.parameters()}
    for step in range(2):
        how = plan.at(step)
        cosines = twin(micronet.augment(run.train.pixels[how.image], how))
        loss = nn.functional.cross_entropy(5.0 * cosines, run.train.labels[how.image])
        for p, gradient in zip(momentum, torch.autograd.grad(loss, list(momentum))):
            momentum[p] = 0.9 * momentum[p] + gradient + 1e-4 * p.detach()
            p.data -= 0.1 * momentum[p]
    list(train_stage(stage, run))
    for (name, ours), theirs in zip(run.student.named_parameters(), twin.parameters()):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4, msg=name)


def test_short_stages_are_tested_with_the_statistics_they_saw(tmp_path: Path) -> None:
    """After t batches the running statistics are the mean of what was seen, weighted by momentum (1 - momentum)^age."""
    stage = replace(STAGE, epochs=1, lr=((1, 1e-6),))
    run = begin(stage, tmp_path)
    norm, means, variances = run.student.stem[1], [], []

    def look(module: nn.Module, inputs: tuple[torch.Tensor]) -> None:
        if module.training:
            means.append(inputs[0].detach().double().mean((0, 2, 3)))
            variances.append(inputs[0].detach().double().var((0, 2, 3)))

    norm.register_forward_pre_hook(look)
    list(train_stage(stage, run))
    weights = torch.tensor([0.01 * 0.99**age for age in reversed(range(9))], dtype=torch.float64)
    for seen, running in ((means, norm.running_mean), (variances, norm.running_var)):
        expected = (weights[:, None] * torch.stack(seen)).sum(0) / weights.sum()
        torch.testing.assert_close(running.double(), expected, rtol=1e-4, atol=1e-6)


def test_a_stage_that_is_interrupted_twice_ends_with_the_same_bits(chain: dict[str, Stage], tmp_path: Path) -> None:
    for stage in chain.values():
        for ckpt, pieces in ((tmp_path / "straight", [3]), (tmp_path / "pieces", [1, 2, 3])):
            (ckpt / "first").mkdir(parents=True, exist_ok=True)
            if stage.name == "second":
                (ckpt / "first" / "best.safetensors").write_bytes(
                    (tmp_path / "first" / "best.safetensors").read_bytes()
                )
            for until in pieces:
                run = begin(stage, ckpt)
                for event in train_stage(stage, run):
                    if isinstance(event, EpochDone):
                        micronet.save_epoch(ckpt / stage.name, stage, run)
                        if event.record["epoch"] == until:
                            break
        for file in ("last.safetensors", "best.safetensors"):
            assert same_training(tmp_path / "straight" / stage.name / file, tmp_path / "pieces" / stage.name / file)


def test_seeds_differ_and_repeat(tmp_path: Path) -> None:
    losses = []
    for seed in (0, 0, 1):
        stage = replace(STAGE, epochs=1, lr=((1, 0.02),), seed=seed)
        run = begin(stage, tmp_path)
        list(train_stage(stage, run))
        losses.append(run.history[0]["train_loss"])
    assert losses[0] == losses[1] != losses[2]


def test_accumulation_keeps_the_global_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice half a batch: the same images and rates, as many optimiser steps, nearly the same weights."""
    stage = replace(STAGE, epochs=1, lr=((1, 0.001),))
    results = []
    for parts in ("1", "2"):
        monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", parts)
        run = begin(stage, tmp_path)
        counted: list[int] = []
        run.optimizer.optimizer.register_step_post_hook(lambda *_: counted.append(1))
        list(train_stage(stage, run))
        results.append((len(counted), run.student.embedding.weight.detach().clone(), run.history[0]["train_loss"]))
        reset_accelerate()
    (steps, weights, loss), (steps2, weights2, loss2) = results
    assert steps == steps2 == 9
    assert loss == pytest.approx(loss2, rel=0.02)
    start = begin(stage, tmp_path).student.embedding.weight
    assert (weights - weights2).norm() < 0.5 * (weights - start).norm()


def test_a_loss_that_is_not_finite_ends_the_stage(tmp_path: Path, write: Callable[..., Path]) -> None:
    run = begin(STAGE, tmp_path)
    with torch.no_grad():
        run.student.embedding.bias[0] = math.nan
    with pytest.raises(Failure, match="stage s: nan or infinity in epoch 1, step 1 of 9"):
        list(train_stage(STAGE, run))
    assert not (tmp_path / "s").exists()


def test_an_unfinished_or_missing_teacher_is_named(
    chain: dict[str, Stage], tmp_path: Path, write: Callable[..., Path]
) -> None:
    elsewhere = tmp_path / "elsewhere"
    result = invoke("run-stage", "second", "--stages", write(), "--ckpt", elsewhere)
    assert result.exit_code == 2
    assert f"its teacher first has no {elsewhere / 'first' / 'best.safetensors'}" in result.stderr
    run = begin(chain["first"], elsewhere)
    events = train_stage(chain["first"], run)
    next(event for event in events if isinstance(event, EpochDone))
    micronet.save_epoch(elsewhere / "first", chain["first"], run)
    reset_accelerate()
    result = invoke("run-stage", "second", "--stages", write(), "--ckpt", elsewhere)
    assert result.exit_code == 2 and "its teacher first is not finished" in result.stderr


def test_a_teacher_that_changed_under_way_is_refused(
    chain: dict[str, Stage], tmp_path: Path, write: Callable[..., Path]
) -> None:
    run = begin(chain["second"], tmp_path)
    next(event for event in train_stage(chain["second"], run) if isinstance(event, EpochDone))
    micronet.save_epoch(tmp_path / "second", chain["second"], run)
    teacher = tmp_path / "first" / "best.safetensors"
    tensors, about = load_checkpoint(teacher)
    micronet.save_checkpoint(teacher, tensors, about | {"note": "another"})
    reset_accelerate()
    result = invoke("run-stage", "second", "--stages", write(), "--ckpt", tmp_path)
    assert result.exit_code == 3 and "the teacher has changed since stage second began" in result.stderr


def test_a_finished_stage_is_left_alone_and_restart_moves_it_aside(
    chain: dict[str, Stage], tmp_path: Path, write: Callable[..., Path]
) -> None:
    path, last = write(), tmp_path / "first" / "last.safetensors"
    before = last.read_bytes()
    result = invoke("run-stage", "first", "--stages", path, "--ckpt", tmp_path)
    assert result.exit_code == 0 and "stage first is finished" in result.output and last.read_bytes() == before
    reset_accelerate()
    result = invoke("run-stage", "first", "--stages", path, "--ckpt", tmp_path, "--restart")
    assert result.exit_code == 0 and f"{tmp_path / 'first'} is now {tmp_path / 'first.old1'}" in result.output
    assert (tmp_path / "first.old1" / "last.safetensors").read_bytes() == before
    assert same_training(last, tmp_path / "first.old1" / "last.safetensors")
