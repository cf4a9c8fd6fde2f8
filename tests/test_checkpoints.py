"""Checkpoints: what they hold, and that they explain themselves."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from conftest import TINY, invoke
from safetensors import safe_open
from safetensors.torch import load_file

import micronet
from micronet import Misconfigured, Schedule, kept_state, load_checkpoint, load_network, load_stages, read_metadata


def test_the_metadata_explain_the_file(trained: Path) -> None:
    best = trained / "ckpt" / "second" / "best.safetensors"
    with safe_open(best, "pt") as file:
        (text,) = file.metadata().values()  # one key
    about = json.loads(text)
    assert text == json.dumps(about, sort_keys=True)
    log = [json.loads(line) for line in (best.parent / "log.jsonl").read_text().splitlines()]
    fields = "epoch lr train_loss train_top1 test_loss test_top1 test_top5 seconds images_per_second".split()
    assert about["history"] == log and [list(record) for record in log] == [fields] * 3
    assert [(record["epoch"], record["lr"]) for record in log] == [(1, 0.02), (2, 0.02), (3, 0.002)]
    assert all(record["test_top1"] % 2 == 0 <= record["test_top1"] <= record["test_top5"] <= 100 for record in log)
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


def test_last_holds_all_that_resuming_needs_and_a_network(trained: Path) -> None:
    last = load_file(trained / "ckpt" / "first" / "last.safetensors")
    network = load_network(str(trained / "ckpt" / "first" / "last.safetensors"))
    weights = network.state_dict()
    assert last.keys() == weights.keys() | {"momentum." + name for name, _ in network.named_parameters()}
    assert not network.training and all(torch.equal(last[name], tensor) for name, tensor in weights.items())
    cosines = network(torch.randn(2, 3, 32, 32))
    assert cosines.shape == (2, 10) and cosines.abs().max() <= 1


def test_mode_by_umask_and_nothing_left_over(trained: Path) -> None:
    os.umask(umask := os.umask(0))
    modes = {path.name: path.stat().st_mode & 0o777 for path in (trained / "ckpt" / "first").iterdir()}
    names = ("best.safetensors", "last.safetensors", "log.jsonl", "previous.safetensors")
    assert modes == dict.fromkeys(names, 0o666 & ~umask)


def test_the_same_content_is_the_same_file(trained: Path, tmp_path: Path) -> None:
    tensors, about = load_checkpoint(trained / "ckpt" / "first" / "best.safetensors")
    micronet.save_checkpoint(tmp_path / "a", dict(reversed(tensors.items())), about)
    assert (tmp_path / "a").read_bytes() == (trained / "ckpt" / "first" / "best.safetensors").read_bytes()


def test_saved_means_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """File, then its name, then the folder that holds the name: in this order, and the old file is kept aside."""
    path, previous, calls = tmp_path / "last", tmp_path / "previous", []
    micronet.replace_file(path, b"old")
    fsync, rename = os.fsync, os.replace
    place = lambda descriptor: Path(f"/proc/self/fd/{descriptor}").resolve()  # noqa: E731
    monkeypatch.setattr(os, "fsync", lambda file: calls.append(("fsync", place(file))) or fsync(file))
    monkeypatch.setattr(os, "replace", lambda *names: calls.append(("replace", *names)) or rename(*names))
    micronet.replace_file(path, b"new", previous)
    (_, temporary), *rest = calls
    assert rest == [("replace", path, previous), ("replace", temporary, path), ("fsync", tmp_path)]
    assert (path.read_bytes(), previous.read_bytes(), len(list(tmp_path.iterdir()))) == (b"new", b"old", 2)

    # on a full disk the old file stays, and nothing else
    monkeypatch.setattr(os, "fsync", Mock(side_effect=OSError(errno.ENOSPC, "no space left")))
    with pytest.raises(OSError, match="no space"):
        micronet.replace_file(path, b"newer", previous)
    assert (path.read_bytes(), previous.read_bytes(), len(list(tmp_path.iterdir()))) == (b"new", b"old", 2)


def test_what_may_change_in_a_stage_that_has_begun(trained: Path, write: Callable[..., Path], tmp_path: Path) -> None:
    """More epochs at rates that are listed; a schedule ends at 0 with its last, and they would have had other rates."""
    stage, ckpt = load_stages(trained / "stages.toml")["first"], trained / "ckpt"
    with pytest.raises(Misconfigured, match="scale was 5.0 and is 6.0; seed was 0 and is 1"):
        kept_state(replace(stage, seed=1, scale=6.0), ckpt)
    for change in (dict(epochs=2), dict(epochs=4, lr=((4, 0.02),)), dict(batch_size=10)):
        with pytest.raises(Misconfigured, match="comes from another definition"):
            kept_state(replace(stage, **change), ckpt)
    longer = replace(stage, epochs=5, lr=((2, 0.02), (4, 0.002), (5, 0.0002)))
    assert kept_state(longer, ckpt).metadata.last.epoch == 3 and not micronet.read_kept(longer, ckpt).is_finished
    for schedule in ("cosine", "one-cycle"):
        kept = replace(stage, lr=Schedule(schedule, 0.02))
        assert not micronet.is_extension("epochs", kept, replace(kept, epochs=4), 1)
    shutil.copytree(ckpt, tmp_path, dirs_exist_ok=True)
    result = invoke("run-stage", "first", "--stages", write(TINY.replace("0.1", "0.2")), "--ckpt", tmp_path)
    assert result.exit_code == 2 and micronet.failures(tmp_path) == {}  # which says nothing of the stage


def test_evaluate_finds_what_training_found(trained: Path) -> None:
    """In fp32; at lower precision nearly that. So does `score` where it knows."""
    paths = [trained / "ckpt" / name / "best.safetensors" for name in ("first", "second")]
    results = json.loads(invoke("evaluate", *paths, "--json").stdout)
    for path, result in zip(paths, results):
        about = read_metadata(path)
        assert result["top1"] == about.best.top1 and result["top5"] == about.best.top5
        assert result["loss"] == pytest.approx(about.history[about.epoch - 1].test_loss)
        assert (result["checkpoint"], result["images"]) == (str(path), 50)
        (scored,) = json.loads(invoke("score", path, "--rules", "seed", "--json").stdout)
        assert (scored["top1"], scored["params"]) == (about.best.top1, about.cost.params)
    for precision in ("bf16", "fp16"):
        (low,) = json.loads(invoke("evaluate", paths[0], "--precision", precision, "--json").stdout)
        assert low["loss"] != results[0]["loss"] == pytest.approx(low["loss"], rel=0.02)
    table = invoke("evaluate", *paths).stdout
    assert all(f"{r['top1']:.2f}" in table and r["checkpoint"] in table for r in results)


def test_a_name_is_shown_as_it_is(trained: Path, tmp_path: Path) -> None:
    """What looks like markup stays, and what a terminal would obey does not reach it."""
    strange = tmp_path / "[/red]" / "[red]:smile:\x1b[31m.safetensors"
    strange.parent.mkdir(parents=True)
    strange.write_bytes((trained / "ckpt" / "first" / "best.safetensors").read_bytes())
    out = strange.with_name("[bold].safetensors")
    for name, *words in (("[red]:smile:?[31m", "evaluate"), ("[red]:smile:?[31m", "score"), ("[bold]", "export", out)):
        result = invoke(words[0], strange, *words[1:])
        assert result.exit_code == 0 and f"[/red]/{name}.safetensors" in "".join(result.output.split())
        assert "\x1b" not in result.output
    (tmp_path / "stages.toml").write_text(TINY.replace('teacher = "first"', f"teacher = {json.dumps(str(strange))}"))
    options = ["--stages", tmp_path / "stages.toml", "--ckpt", tmp_path / "ckpt"]
    chain = ["chain", *options, "second", "--dry-run"]
    for command in (["run-stage", "second", *options], chain, ["show", *options[2:]]):
        result = invoke(*command)
        assert result.exit_code == 0 and "[red]:smile:?[31m" in result.output and "\x1b" not in result.output
