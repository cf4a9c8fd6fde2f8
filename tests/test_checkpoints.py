"""Checkpoints: what they hold, that they explain themselves, and that nothing damaged is taken for whole."""

import errno
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import TINY, invoke
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import micronet
from micronet import (
    Misconfigured,
    Refused,
    load_checkpoint,
    kept_state,
    load_network,
    load_stages,
    read_kept,
    read_metadata,
)


def test_the_metadata_explain_the_file(trained: Path) -> None:
    best = trained / "ckpt" / "second" / "best.safetensors"
    with safe_open(best, "pt") as file:
        (text,) = file.metadata().values()  # one key
    about = json.loads(text)
    assert text == json.dumps(about, sort_keys=True)
    log = [json.loads(line) for line in (best.parent / "log.jsonl").read_text().splitlines()]
    assert about["history"] == log and len(log) == 3
    top = max(log, key=lambda record: record["test_top1"])
    assert about["epoch"] == about["best"]["epoch"] == top["epoch"]
    assert about["best"] == {"epoch": top["epoch"], "top1": top["test_top1"], "top5": top["test_top5"]}
    assert about["last"] == {"epoch": 3, "top1": log[-1]["test_top1"], "top5": log[-1]["test_top5"]}
    teacher = trained / "ckpt" / "first" / "best.safetensors"
    assert about["teacher"]["tensors"] == read_metadata(teacher).tensors and about["teacher"]["stage"] == "first"
    assert about["teacher"]["tested"]["top1"] == read_metadata(teacher).best.top1
    assert about["stage"]["network"] == "efficientnet_ex" and about["stage"]["seed"] == 0
    assert about["class_names"][0] == "disc" and about["facts"]["versions"]["torch"] == torch.__version__
    assert about["cost"]["params"] == sum(p.numel() for p in load_network(best).parameters())
    assert [about["facts"][name] for name in ("precision", "processes", "threads")] == ["fp32", 1, 1]


def test_the_log_has_a_line_an_epoch(trained: Path) -> None:
    fields = "epoch lr train_loss train_top1 test_loss test_top1 test_top5 seconds images_per_second".split()
    log = [json.loads(line) for line in (trained / "ckpt" / "first" / "log.jsonl").read_text().splitlines()]
    assert [list(record) for record in log] == [fields] * 3
    assert [(record["epoch"], record["lr"]) for record in log] == [(1, 0.02), (2, 0.02), (3, 0.002)]
    assert all(0 <= record["test_top1"] <= record["test_top5"] <= 100 for record in log)
    assert all(record["test_top1"] % 2 == 0 for record in log)  # of 50 images, in percent


def test_last_holds_all_that_resuming_needs(trained: Path) -> None:
    last = load_file(trained / "ckpt" / "first" / "last.safetensors")
    network = load_network(trained / "ckpt" / "first" / "last.safetensors")
    weights = network.state_dict()
    assert last.keys() == weights.keys() | {"momentum." + name for name, _ in network.named_parameters()}
    assert all(torch.equal(last[name], tensor) for name, tensor in weights.items())


def test_a_network_loads_and_answers(trained: Path) -> None:
    network = load_network(str(trained / "ckpt" / "second" / "best.safetensors"))
    assert not network.training
    cosines = network(torch.randn(2, 3, 32, 32))
    assert cosines.shape == (2, 10) and cosines.abs().max() <= 1


def test_mode_by_umask_and_nothing_left_over(trained: Path) -> None:
    umask = os.umask(0)
    os.umask(umask)
    files = sorted((trained / "ckpt" / "first").iterdir())
    assert [path.name for path in files] == [
        "best.safetensors",
        "last.safetensors",
        "log.jsonl",
        "previous.safetensors",
    ]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o666 & ~umask}


def test_the_same_content_is_the_same_file(trained: Path, tmp_path: Path) -> None:
    tensors, about = load_checkpoint(trained / "ckpt" / "first" / "best.safetensors")
    for name in "ab":
        micronet.save_checkpoint(tmp_path / name, dict(reversed(tensors.items())), about)
    original = (trained / "ckpt" / "first" / "best.safetensors").read_bytes()
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() == original


def test_saved_means_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """File, then its name, then the folder that holds the name: in this order, and the old file is kept aside."""
    path, previous, calls = tmp_path / "last", tmp_path / "previous", []
    micronet.replace_file(path, b"old")
    fsync, rename = os.fsync, os.replace

    def noted_fsync(descriptor: int) -> None:
        calls.append(("fsync", Path(f"/proc/self/fd/{descriptor}").resolve()))
        fsync(descriptor)

    def noted_replace(source: Path, target: Path) -> None:
        calls.append(("replace", source, target))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    micronet.replace_file(path, b"new", previous)
    (_, temporary), *rest = calls
    assert rest == [("replace", path, previous), ("replace", temporary, path), ("fsync", tmp_path)]
    assert (path.read_bytes(), previous.read_bytes(), len(list(tmp_path.iterdir()))) == (b"new", b"old", 2)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    micronet.replace_file(path, b"old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        micronet.replace_file(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_what_is_no_checkpoint_of_ours_is_refused(tmp_path: Path) -> None:
    foreign = tmp_path / "foreign.safetensors"
    save_file({"weight": torch.zeros(3)}, foreign)
    for path in (foreign, tmp_path / "missing.safetensors", tmp_path):
        with pytest.raises(Refused, match=str(path)):
            load_network(path)


def test_a_changed_stage_is_refused_with_its_changes(trained: Path) -> None:
    stage = load_stages(trained / "stages.toml")["first"]
    ckpt = trained / "ckpt"
    assert kept_state(stage, ckpt).metadata.last.epoch == 3
    with pytest.raises(Misconfigured, match="scale was 5.0 and is 6.0; seed was 0 and is 1"):
        kept_state(replace(stage, seed=1, scale=6.0), ckpt)
    for change in (dict(epochs=2), dict(epochs=4, lr=((4, 0.02),)), dict(batch_size=10)):
        with pytest.raises(Misconfigured, match="comes from another definition"):
            kept_state(replace(stage, **change), ckpt)


def test_more_epochs_may_be_added(trained: Path) -> None:
    stage = load_stages(trained / "stages.toml")["first"]
    longer = replace(stage, epochs=5, lr=((2, 0.02), (4, 0.002), (5, 0.0002)))
    assert not read_kept(longer, trained / "ckpt").is_finished


def test_a_teacher_by_path(trained: Path, write: Callable[..., Path], tmp_path: Path) -> None:
    teacher = trained / "ckpt" / "first" / "best.safetensors"
    text = (trained / "stages.toml").read_text().replace('teacher = "first"', f'teacher = "{teacher}"')
    result = invoke("run-stage", "second", "--stages", write(text), "--ckpt", tmp_path)
    assert result.exit_code == 0 and str(teacher) in result.output
    for line, message in {
        "scale = 6": "expects 10 classes at scale 6",
        'dataset = "cifar100"': "expects 100 classes",
    }.items():
        result = invoke("run-stage", "second", "--stages", write(text + line), "--ckpt", tmp_path / "new")
        assert (result.exit_code, message in result.output) == (3, True)


def test_evaluate_finds_what_training_found(trained: Path) -> None:
    paths = [trained / "ckpt" / name / "best.safetensors" for name in ("first", "second")]
    results = json.loads(invoke("evaluate", *paths, "--json").stdout)
    for path, result in zip(paths, results):
        about = read_metadata(path)
        assert result["top1"] == about.best.top1 and result["top5"] == about.best.top5
        assert result["loss"] == pytest.approx(about.history[about.epoch - 1].test_loss)
        assert (result["checkpoint"], result["images"]) == (str(path), 50)
    table = invoke("evaluate", *paths).stdout
    assert all(f"{r['top1']:.2f}" in table and r["checkpoint"] in table for r in results)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_evaluate_at_lower_precision(trained: Path, precision: str) -> None:
    path = trained / "ckpt" / "first" / "best.safetensors"
    (low,) = json.loads(invoke("evaluate", path, "--precision", precision, "--json").stdout)
    (full,) = json.loads(invoke("evaluate", path, "--json").stdout)
    assert low["loss"] != full["loss"] and low["loss"] == pytest.approx(full["loss"], rel=0.02)


def test_score_of_a_checkpoint_adds_its_accuracy(trained: Path) -> None:
    path = trained / "ckpt" / "second" / "last.safetensors"
    (result,) = json.loads(invoke("score", path, "--rules", "seed", "--json").stdout)
    assert result["top1"] == read_metadata(path).last.top1
    assert result["params"] == read_metadata(path).cost.params


def test_a_name_is_shown_as_it_is(trained: Path, tmp_path: Path) -> None:
    """What looks like markup stays, and what a terminal would obey does not reach it."""
    strange = tmp_path / "[/red]" / "[red]:smile:\x1b[31m.safetensors"
    strange.parent.mkdir(parents=True)
    strange.write_bytes((trained / "ckpt" / "first" / "best.safetensors").read_bytes())
    words = {"evaluate": [strange], "score": [strange], "export": [strange, strange.with_name("[bold].safetensors")]}
    for command, arguments in words.items():
        result = invoke(command, *arguments)
        shown = "".join(result.output.split())
        name = "[bold]" if command == "export" else "[red]:smile:?[31m"
        assert result.exit_code == 0 and f"[/red]/{name}.safetensors" in shown and "\x1b" not in result.output
    (tmp_path / "stages.toml").write_text(TINY.replace('teacher = "first"', f"teacher = {json.dumps(str(strange))}"))
    options = ["--stages", tmp_path / "stages.toml", "--ckpt", tmp_path / "ckpt"]
    for command in (
        ["run-stage", "second", *options],
        ["chain", *options, "second", "--dry-run"],
        ["show", *options[2:]],
    ):
        result = invoke(*command)
        assert result.exit_code == 0 and "[red]:smile:?[31m" in result.output and "\x1b" not in result.output
