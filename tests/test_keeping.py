"""What a stage keeps: every call of a save may fail or be the last, and one process alone writes."""

import builtins
import errno
import fcntl
import itertools
import json
import os
import random
import shutil
import struct
import subprocess
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from conftest import invoke
from pytest import MonkeyPatch
from test_training import STAGE as SHORT_STAGE

import micronet
from micronet import Locked, Record, Refused, digest, find_state, go_on, read_metadata, save_epoch

STAGE = replace(SHORT_STAGE, network="efficientnet_ex", train_images=40, epochs=7, lr=((7, 0.02),))


@pytest.fixture(scope="module")
def run() -> micronet.Run:
    images = micronet.random_images(STAGE, 40)._replace(class_names=list("abcdefghij"))
    return micronet.new_run(STAGE, micronet.open_accelerator(), images, images)


def flip(path: Path, at: float = 0.5) -> None:
    content = bytearray(path.read_bytes())
    content[int(at * len(content))] ^= 1
    path.write_bytes(content)


def add_epoch(run: micronet.Run, top1: float) -> None:
    """Let a run go on by an epoch of some accuracy, with weights that no other epoch has."""
    epoch = len(run.history) + 1
    for name, tensor in run.student.state_dict().items():
        tensor.fill_(epoch if name.endswith("tracked") else top1 + epoch / 10)
    run.history.append(Record(epoch, 0.1, 1.0, 10.0, 1.0, top1, 99.0, 1.0, 10.0))
    if run.best is None or top1 > run.best.test_top1:
        run.best = run.history[-1]


def start(run: micronet.Run, folder: Path) -> micronet.State | None:
    """Let a run begin as a new process would, from what a folder keeps."""
    run.history, run.best, run.best_network, run.written = [], None, "", None
    if state := find_state(folder, whole=True):
        micronet.restore(run, state)
        go_on(run, folder, state)
    return state


def check_folder(run: micronet.Run, folder: Path, most: int, least: int) -> None:
    """See that a new process finds the last epoch or the one before it, and its best network."""
    state = start(run, folder)
    done = len(run.history)
    assert least <= done <= most and (done == 0 or float(state.tensors["stem.1.num_batches_tracked"]) == done)
    if done:
        best, about = micronet.load_checkpoint(folder / "best.safetensors")
        assert digest(best) == run.best_network and about.tested.top1 == run.best.test_top1
        assert float(best["stem.1.num_batches_tracked"]) == run.best.epoch
        lines = (folder / "log.jsonl").read_text().splitlines()
        assert [json.loads(line)["epoch"] for line in lines] == list(range(1, done + 1))
    add_epoch(run, 7.0)
    save_epoch(folder, STAGE, run)
    assert read_metadata(folder / "last.safetensors").last.epoch == done + 1


class Killed(BaseException):
    """The process is gone: from here on it changes nothing any more."""


def broken(patch: MonkeyPatch, moment: int, kind: str) -> list[str]:
    """Let the system call of that number fail, or be where the process is killed; return the calls as they come."""
    calls: list[str] = []

    def wrap(name: str, real: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object, **options: object) -> object:
            if name == "open" and "b" not in str(arguments[1:]):
                return real(*arguments, **options)
            calls.append(name)
            if len(calls) == moment or kind == "kill" and len(calls) > moment:
                named = "a .part" if name == "fsync" else str(arguments[0])
                raise Killed if kind == "kill" else OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), named)
            return real(*arguments, **options)

        return call

    patch.setattr(micronet, "open", wrap("open", builtins.open), raising=False)
    for name in ("fsync", "replace", "unlink"):
        patch.setattr(os, name, wrap(name, getattr(os, name)))
    return calls


# Test accuracies of the epochs before the save, that of its own, and whether last.safetensors has a flipped bit.
SAMPLE = [  # the best is the first, overtakes, was the last, was lost with the damaged file, was not and overtakes
    ([], 5.0, False),
    ([30.0, 20.0, 10.0], 40.0, False),
    ([10.0, 20.0, 30.0], 5.0, False),
    ([20.0, 10.0, 30.0], 5.0, True),
    ([30.0, 20.0, 10.0], 40.0, True),
]
BEFORE = [[], [10.0], [30.0, 20.0, 10.0], [10.0, 20.0, 30.0], [20.0, 10.0, 30.0]]
SAVES = [(b, top1, damaged) for b in BEFORE for top1 in (5.0, 40.0) for damaged in (False, True)[: max(1, len(b))]]


PARAMS = [pytest.param(save, marks=[] if save in SAMPLE else pytest.mark.long) for save in SAVES]


@pytest.mark.parametrize("save", PARAMS, ids=str)
def test_a_save_may_end_at_any_call(save: tuple[list[float], float, bool], run: micronet.Run, tmp_path: Path) -> None:
    """By an error or by a kill, from every state that a folder can be in: no good file is lost."""
    (before, top1, damaged), kept = save, tmp_path / "kept" / "s"
    start(run, kept)
    for accuracy in before:
        add_epoch(run, accuracy)
        save_epoch(kept, STAGE, run)
    kept.mkdir(parents=True, exist_ok=True)
    if damaged:
        flip(kept / "last.safetensors")
    done = len(before) - damaged
    for kind in ("kill", "error"):
        for moment in itertools.count(1):
            folder = shutil.copytree(kept, tmp_path / f"{kind}{moment}" / "s")
            with MonkeyPatch.context() as patch:
                calls = broken(patch, moment, kind)
                try:
                    start(run, folder)
                    assert len(run.history) == done
                    add_epoch(run, top1)
                    save_epoch(folder, STAGE, run)
                except Killed:
                    pass
                except OSError as error:  # an unlink that fails is no failure
                    assert Path(error.filename).parent == folder and ".part" not in error.filename
            check_folder(run, folder, done + 1, done)
            if len(calls) < moment:
                break
        assert moment > 10


def test_the_loss_scale_is_kept(run: micronet.Run, tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    """What fp16 has found out, which a GPU alone would: a stage goes on with it."""
    start(run, tmp_path)
    scalers = [torch.amp.GradScaler("cpu", init_scale=scale) for scale in (64.0, 1024.0)]
    monkeypatch.setattr(run.accelerator, "scaler", scalers[0])
    add_epoch(run, 10.0)
    save_epoch(tmp_path, STAGE, run)
    monkeypatch.setattr(run.accelerator, "scaler", scalers[1])
    start(run, tmp_path)
    assert scalers[1].get_scale() == 64


COMMANDS = "show, show --json, chain --dry-run, evaluate LAST, score LAST, export LAST OUT, run-stage second"


@pytest.mark.parametrize("command", COMMANDS.split(", "))
def test_a_changed_header_is_refused_by_every_command(command: str, trained: Path, tmp_path: Path) -> None:
    """By another figure in its place, so that the digest alone tells."""
    ckpt = shutil.copytree(trained / "ckpt", tmp_path / "ckpt")
    path = ckpt / "first" / ("best.safetensors" if "second" in command else "last.safetensors")
    shutil.rmtree(ckpt / "second")
    path.write_bytes(path.read_bytes().replace(b'\\"seed\\": 0', b'\\"seed\\": 1'))
    words = [{"LAST": path, "OUT": tmp_path / "out.safetensors"}.get(word, word) for word in command.split()]
    words += ["--ckpt", ckpt] if words[0] in ("show", "chain", "run-stage") else []
    words += ["--stages", trained / "stages.toml"] if words[0] in ("chain", "run-stage") else []
    result = invoke(*words)
    said = result.stderr if words[0] != "chain" else result.stdout  # which takes the state before it
    assert result.exit_code == (0 if words[0] == "chain" else 3), result.output
    assert f"{path}: damaged: its SHA-256 does not match its header" in said


@pytest.mark.parametrize("flips", [300, pytest.param(30_000, marks=pytest.mark.long)])
def test_any_flipped_bit_is_refused(flips: int, trained: Path, tmp_path: Path) -> None:
    sound = (trained / "ckpt" / "first" / "last.safetensors").read_bytes()
    path, dice, header = tmp_path / "damaged.safetensors", random.Random(0), 8 + struct.unpack("<Q", sound[:8])[0]
    for n in range(flips):
        content = bytearray(sound)
        content[place := dice.randrange(header if n % 2 else len(sound))] ^= 1 << dice.randrange(8)
        path.write_bytes(content)
        with pytest.raises(Refused):
            read_metadata(path) if place < header else micronet.load_checkpoint(path)


def records(*epochs: int, **changes: object) -> list[dict[str, object]]:
    one = Record(1, 0.1, 1.0, 10.0, 1.0, 50.0, 99.0, 1.0, 10.0)
    return [one._replace(epoch=epoch, **changes)._asdict() for epoch in epochs]


EXPORTED = {"file": "x", "sha256": "0", "top1": None, "scale": None, "bits": 16}
TAUGHT = {"name": "x", "stage": "x", "tensors": "0", "tested": {"epoch": 1, "top1": None, "top5": None}}
FOLDER = {"train": 40, "test": 50, "classes": 10, "validation": 0, "class_names": list("abcdefghix")}
OWN = micronet.plain(STAGE) | {"dataset": "folder:x"}
WRONG = [  # a change of the JSON, and what is said
    ({"epoch": -1}, "metadata.epoch"),
    ({"epoch": True}, "metadata.epoch = true"),
    ({"best": {"epoch": 2, "top1": 50.0, "top5": 99.0}}, "metadata.best"),  # after the last
    ({"best": {"epoch": 1, "top1": 51.0, "top5": 99.0}}, "metadata.best"),  # of no epoch
    ({"last": {"epoch": 1, "top1": 50.0, "top5": 98.0}}, "metadata.last"),
    ({"history": []}, "metadata."),
    ({"history": records(2)}, "metadata.history"),  # a gap
    ({"history": records(*range(1, 9))}, "metadata.history"),  # more than its epochs
    ({"history": records(1, train_top1=101.0)}, "metadata.top-1"),
    ({"history": records(1, test_loss=float("nan"))}, "metadata.history[0].test_loss = NaN"),
    ({"history": records(1, test_top1="50")}, 'metadata.history[0].test_top1 = "50"'),
    ({"facts": {"device": "CPU"}}, "metadata.facts"),
    ({"class_names": ["a"]}, "metadata.class_names"),
    ({"stage": {"name": "s", "network": "resnet"}}, "network"),
    ({"stage": OWN}, "metadata.stage.folder = null"),
    ({"stage": OWN | {"folder": FOLDER | {"class_names": ["a", "b", "a"]}}}, "metadata.stage.folder = {"),
    ({"stage": OWN | {"folder": FOLDER | {"test": 0}}}, "metadata.stage.folder = {"),
    ({"stage": OWN | {"folder": FOLDER}}, "metadata.class_names"),  # others
    ({"stage": OWN | {"folder": FOLDER, "dataset": "synthetic"}}, "metadata.stage.folder = {"),
    ({"images": None}, "metadata.cost"),
    ({"input": {"side": 32, "order": "RGB", "mean": [0.5], "std": [0.5]}}, "metadata.input"),  # of no export
    ({"teacher": TAUGHT}, "metadata.parents"),
    ({"history": [], "cost": None, "exported": EXPORTED}, "metadata.best_network"),  # a state without a history
    ({"imported": {"file": "x", "sha256": "0"}}, "metadata."),  # two origins
    ({"note": 1}, "metadata"),
]


def test_metadata_that_make_no_sense_are_refused(run: micronet.Run, tmp_path: Path) -> None:
    start(run, tmp_path / "s")
    add_epoch(run, 50.0)
    real, dumps, (path, _) = micronet.plain, json.dumps, micronet.last_paths(tmp_path / "s")
    path.parent.mkdir()
    for change, message in WRONG:
        with MonkeyPatch.context() as patch:
            patch.setattr(json, "dumps", lambda *a, **k: dumps(*a, **k | {"allow_nan": True}))
            patch.setattr(micronet, "plain", lambda v: real(v) | change if hasattr(v, "best_network") else real(v))
            micronet.save_checkpoint(path, run.student.state_dict(), micronet.explain(STAGE, run))
        result = invoke("show", "--ckpt", tmp_path)
        found = result.exit_code, result.stderr.count("\n"), message in result.stderr
        assert found == (3, 1, True), (message, result.output)


def test_a_second_writer_that_no_lock_keeps_out_is_seen_before_a_save(run: micronet.Run, tmp_path: Path) -> None:
    """As on a network file system that does not share locks."""
    folder, last = tmp_path / "s", tmp_path / "s" / "last.safetensors"
    for words, intrude in (
        ("4711 on other trains it, too", lambda: (tmp_path / ".s.lock").write_text("4711 on other")),
        ("not what was written", lambda: micronet.save_checkpoint(last, {}, replace(run.written, scaler={"x": 1}))),
        ("is not what was written there", lambda: flip(last, 0.001)),
        ("is not what was written there", lambda: folder.rename(tmp_path / "s.old1")),
        ("removed or replaced while stage s trained", lambda: shutil.rmtree(tmp_path)),
    ):
        shutil.rmtree(folder, ignore_errors=True)
        start(run, folder)
        with micronet.locked(STAGE, tmp_path) as check_held:
            for accuracy in (10.0, 20.0):
                add_epoch(run, accuracy)
                check_held(run.written)
                save_epoch(folder, STAGE, run)
            check_held(run.written)
            intrude()
            with pytest.raises((Locked, Refused), match=words):
                check_held(run.written)


def test_a_best_network_that_is_gone_is_missed_at_the_next_save(run: micronet.Run, tmp_path: Path) -> None:
    start(run, tmp_path)
    for accuracy in (20.0, 10.0):
        add_epoch(run, accuracy)
        save_epoch(tmp_path, STAGE, run)
    (tmp_path / "best.safetensors").unlink()
    add_epoch(run, 10.0)
    with pytest.raises(Refused, match="restore it, or train the stage anew with run-stage s --restart"):
        save_epoch(tmp_path, STAGE, run)


def test_a_lock_that_cannot_be_had_is_named(write: Callable[..., Path], tmp_path: Path) -> None:
    """It is not followed through a link, and not every file system has one."""
    lock, target = tmp_path / ".first.lock", tmp_path / "precious"
    target.write_text("x")
    lock.symlink_to(target)
    no_locks = Mock(side_effect=OSError(errno.ENOLCK, "No locks available"))
    for words in ("Too many levels of symbolic links", "no locks here (No locks available): name another --ckpt"):
        with MonkeyPatch.context() as patch:
            if "no locks" in words:
                lock.unlink()
                patch.setattr(fcntl, "lockf", no_locks)
            result = invoke("run-stage", "first", "--stages", write(), "--ckpt", tmp_path)
        assert (result.exit_code, result.output) == (5, f"error: {lock}: {words}\n") and target.read_text() == "x"


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.EIO])
def test_a_folder_that_cannot_be_synced(code: int, tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    """A note for a file system that never can, an error where the disk fails."""
    real, room, write = os.fsync, micronet.check_room, micronet.replace_file

    def fsync(descriptor: int) -> None:
        if Path(f"/proc/self/fd/{descriptor}").resolve().is_dir():
            raise OSError(code, os.strerror(code))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    if code == errno.EIO:
        for call, arguments in ((room, (tmp_path, torch.nn.ReLU(), True)), (write, (tmp_path / "file", b"x"))):
            with pytest.raises(OSError, match="Input/output error"):
                call(*arguments)
    else:
        write(tmp_path / "file", b"x")
        assert "cannot put names on the disk" in room(tmp_path, torch.nn.ReLU(), True)[0]


def test_what_is_kept_counts_as_room(trained: Path, tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    """A stage of 0.25 MiB needs eight times that to begin, and only what is still to be written to go on."""
    folder = shutil.copytree(trained / "ckpt" / "first", tmp_path / "first")
    network = micronet.load_network(folder / "best.safetensors")
    size = sum(tensor.nbytes for tensor in network.state_dict().values())
    kept = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    for free, anew, enough in [
        (8 * size - kept, False, True),
        (8 * size - kept - 1, False, False),
        (8 * size, True, True),
        (8 * size - 1, True, False),
        (0, True, True),  # of none in all, which is not known
    ]:
        usage = shutil._ntuple_diskusage(10**9 if free else 0, 0, free)
        monkeypatch.setattr(shutil, "disk_usage", lambda _, usage=usage: usage)
        with nullcontext() if enough else pytest.raises(micronet.Unwritable, match="MiB free"):
            assert micronet.check_room(folder, network, anew) == []
    # root, who may write anywhere, as somebody else
    monkeypatch.setattr(os, "access", lambda path, mode: path != folder or not mode & os.W_OK)
    with pytest.raises(micronet.Unwritable, match="this process may not write here"):
        micronet.check_room(folder, network, True)


def test_a_commit_is_of_a_repository_that_tracks_this_file(tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    """Installed somewhere below another project, the module has no commit."""
    copy = Path(shutil.copy(micronet.__file__, tmp_path))
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@x"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "another project"], check=True)
    monkeypatch.setattr(micronet, "__file__", str(copy))
    assert micronet.git_commit() is None
    subprocess.run([*git, "add", "micronet.py"], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "ours"], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout
    assert head.startswith(commit := micronet.git_commit()) and len(commit) == 12
    copy.write_text("")
    assert micronet.git_commit() == f"{commit}+"
