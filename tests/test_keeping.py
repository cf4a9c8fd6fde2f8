"""What a stage keeps: every call of a save may fail or be the last, and one process alone writes."""

import builtins
import errno
import fcntl
import json
import os
import random
import shutil
import struct
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import TINY, invoke, reset_accelerate

import micronet
from micronet import Locked, Record, Stage, digest, find_state, go_on, read_metadata, save_epoch

STAGE = Stage(
    "s", network="efficientnet_ex", width=0.1, depth=0.1, dataset="synthetic", train_images=40, test_images=50,
    batch_size=20, epochs=7, lr=((7, 0.02),),
)  # fmt: skip


@pytest.fixture(scope="module")
def run() -> micronet.Run:
    reset_accelerate()
    images = micronet.random_images(STAGE, 40)._replace(class_names=list("abcdefghij"))
    return micronet.new_run(STAGE, micronet.open_accelerator(), images, images)


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


def broken(patch: pytest.MonkeyPatch, moment: int, kind: str) -> list[str]:
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


# Test accuracies of the epochs that are kept before. "damaged": last.safetensors has a flipped bit.
BEFORE = [[], [10.0], [30.0, 20.0, 10.0], [10.0, 20.0, 30.0], [20.0, 10.0, 30.0]]


@pytest.mark.parametrize("damaged", [False, True])
@pytest.mark.parametrize("before", BEFORE, ids=str)
@pytest.mark.parametrize("top1", [5.0, 40.0])
def test_a_save_may_end_at_any_call(
    top1: float, before: list[float], damaged: bool, run: micronet.Run, tmp_path: Path
) -> None:
    """By an error or by a kill, from every state that a folder can be in: no good file is lost."""
    if damaged and len(before) < 2:
        pytest.skip("nothing to fall back to")
    kept = tmp_path / "kept" / "s"
    start(run, kept)
    for accuracy in before:
        add_epoch(run, accuracy)
        save_epoch(kept, STAGE, run)
    kept.mkdir(parents=True, exist_ok=True)
    if damaged:
        flip(kept / "last.safetensors")
    done = len(before) - damaged
    for kind in ("kill", "error"):
        moment, ended = 0, False
        while not ended:
            moment += 1
            folder = tmp_path / f"{kind}{moment}" / "s"
            shutil.copytree(kept, folder)
            with pytest.MonkeyPatch.context() as patch:
                calls = broken(patch, moment, kind)
                try:
                    start(run, folder)
                    assert len(run.history) == done
                    add_epoch(run, top1)
                    save_epoch(folder, STAGE, run)
                    ended = True
                except Killed:
                    pass
                except OSError as error:  # an unlink that fails is no failure
                    assert Path(error.filename).parent == folder and ".part" not in error.filename
                ended = len(calls) < moment
            check_folder(run, folder, done + 1, done)
        assert moment > 10


def flip(path: Path, at: float = 0.5) -> None:
    content = bytearray(path.read_bytes())
    content[int(at * len(content))] ^= 1
    path.write_bytes(content)


# ---------------------------------------------------------------------------------------------------- changed headers


COMMANDS = [
    "show",
    "show --json",
    "chain --dry-run",
    "evaluate LAST",
    "score LAST",
    "export LAST OUT",
    "run-stage second",
]


@pytest.mark.parametrize("flips", [6, pytest.param(600, marks=pytest.mark.long)])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_flipped_bit_of_a_header_is_refused_or_without_effect(
    command: str, flips: int, trained: Path, tmp_path: Path
) -> None:
    ckpt = shutil.copytree(trained / "ckpt", tmp_path / "ckpt")
    path = ckpt / "first" / ("best.safetensors" if "second" in command else "last.safetensors")
    shutil.rmtree(ckpt / "second")
    sound, dice = path.read_bytes(), random.Random(command)
    words = [{"LAST": path, "OUT": tmp_path / "out.safetensors"}.get(word, word) for word in command.split()]
    words += ["--ckpt", ckpt] if words[0] in ("show", "chain", "run-stage") else []
    words += ["--stages", trained / "stages.toml"] if words[0] in ("chain", "run-stage") else []
    for _ in range(flips):
        content = bytearray(sound)
        content[dice.randrange(8 + struct.unpack("<Q", sound[:8])[0])] ^= 1 << dice.randrange(8)
        path.write_bytes(content)
        result = invoke(*words)
        reset_accelerate()
        said = result.stderr if words[0] != "chain" else result.stdout
        assert result.exit_code == (0 if words[0] == "chain" else 3) and str(path) in said, (result.output, content)


# ---------------------------------------------------------------------------------------------------------- metadata

ONE = Record(1, 0.1, 1.0, 10.0, 1.0, 50.0, 99.0, 1.0, 10.0)
UNTESTED = {"epoch": 1, "top1": None, "top5": None}
WRONG = {  # a change of the JSON: what is said
    "epoch = -1": ({"epoch": -1}, "metadata.epoch"),
    "epoch true": ({"epoch": True}, "metadata.epoch = true"),
    "best after last": ({"best": {"epoch": 2, "top1": 50.0, "top5": 99.0}}, "metadata.best"),
    "best of no epoch": ({"best": {"epoch": 1, "top1": 51.0, "top5": 99.0}}, "metadata.best"),
    "last is another": ({"last": {"epoch": 1, "top1": 50.0, "top5": 98.0}}, "metadata.last"),
    "no history": ({"history": []}, "metadata."),
    "a gap": ({"history": [ONE._replace(epoch=2)._asdict()]}, "metadata.history"),
    "more than its epochs": ({"history": [ONE._replace(epoch=n)._asdict() for n in range(1, 9)]}, "metadata.history"),
    "above 100": ({"history": [ONE._replace(train_top1=101.0)._asdict()]}, "metadata.top-1"),
    "nan": ({"history": [ONE._replace(test_loss=float("nan"))._asdict()]}, "metadata.history[0].test_loss = NaN"),
    "text": ({"history": [ONE._replace(test_top1="50")._asdict()]}, 'metadata.history[0].test_top1 = "50"'),
    "missing": ({"facts": {"device": "CPU"}}, "metadata.facts"),
    "classes": ({"class_names": ["a"]}, "metadata.class_names"),
    "stage": ({"stage": {"name": "s", "network": "resnet"}}, "network"),
    "teacher": ({"teacher": {"name": "x", "stage": "x", "tensors": "0", "tested": UNTESTED}}, "metadata.teacher"),
    "a state without a history": (
        {"history": [], "cost": None, "exported": {"file": "x", "sha256": "0", "top1": None}},
        "metadata.best_network",
    ),
    "two origins": ({"imported": {"file": "x", "sha256": "0"}}, "metadata."),
    "unknown": ({"note": 1}, "metadata"),
}


@pytest.mark.parametrize("case", WRONG)
def test_metadata_that_make_no_sense_are_refused_by_every_command(
    case: str, run: micronet.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (change, message), real = WRONG[case], micronet.plain
    start(run, tmp_path / "ckpt" / "s")
    add_epoch(run, 50.0)
    monkeypatch.setattr(micronet, "plain", lambda v: real(v) | change if isinstance(v, micronet.Metadata) else real(v))
    monkeypatch.setattr(json, "dumps", lambda *a, dumps=json.dumps, **k: dumps(*a, **k | {"allow_nan": True}))
    path = tmp_path / "ckpt" / "s" / "last.safetensors"
    path.parent.mkdir(parents=True)
    micronet.save_checkpoint(path, run.student.state_dict(), micronet.explain(STAGE, run))
    monkeypatch.undo()
    for words in (
        ["evaluate", path],
        ["score", path],
        ["export", path, tmp_path / "x.onnx"],
        ["show", "--ckpt", path.parent.parent],
    ):
        result = invoke(*words)
        assert (result.exit_code, result.stderr.count("\n")) == (3, 1) and message in result.stderr, result.output


# ------------------------------------------------------------------------------------------------------- two writers


def test_a_second_writer_that_no_lock_keeps_out_is_seen_before_a_save(run: micronet.Run, tmp_path: Path) -> None:
    """As on a network file system that does not share locks."""
    folder, lock, last = tmp_path / "s", tmp_path / ".s.lock", tmp_path / "s" / "last.safetensors"
    for intrusion in ("lock", "epoch", "damage", "moved", "none"):
        shutil.rmtree(folder, ignore_errors=True)
        start(run, folder)
        with micronet.locked(STAGE, tmp_path) as check_held:
            for accuracy in (10.0, 20.0):
                add_epoch(run, accuracy)
                check_held(run.written)
                save_epoch(folder, STAGE, run)
            mine, before = run.written, {path.name: path.read_bytes() for path in folder.iterdir()}
            if intrusion == "lock":
                subprocess.run(["sh", "-c", f"echo 4711 on other > {lock}"], check=True)
            if intrusion == "epoch":
                micronet.save_checkpoint(last, run.student.state_dict(), replace(mine, scaler={"other": 1}))
            if intrusion == "damage":
                flip(last, 0.001)
            if intrusion == "moved":
                folder.rename(tmp_path / f"s.old{intrusion}")
            if intrusion == "none":
                check_held(mine)
                continue
            with pytest.raises(
                Locked, match="4711 on other" if intrusion == "lock" else "is not what was written there"
            ):
                check_held(mine)
            assert intrusion != "lock" or before == {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_lock_is_not_followed_through_a_link(tmp_path: Path) -> None:
    (target := tmp_path / "precious").write_text("x")
    (tmp_path / ".first.lock").symlink_to(target)
    (tmp_path / "stages.toml").write_text(TINY)
    result = invoke("run-stage", "first", "--stages", tmp_path / "stages.toml", "--ckpt", tmp_path)
    assert (result.exit_code, result.output.count("\n"), target.read_text()) == (5, 1, "x")
    assert result.stderr.startswith(f"error: {tmp_path / '.first.lock'}: ")


def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lockf(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", lockf)
    (tmp_path / "stages.toml").write_text(TINY)
    result = invoke("run-stage", "first", "--stages", tmp_path / "stages.toml", "--ckpt", tmp_path)
    message = f"error: {tmp_path / '.first.lock'}: no locks here (No locks available): name another --ckpt\n"
    assert (result.exit_code, result.output) == (5, message)


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.EIO])
def test_a_folder_that_cannot_be_synced(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line for a file system that never can, an error where the disk fails."""
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if Path(f"/proc/self/fd/{descriptor}").resolve().is_dir():
            raise OSError(code, os.strerror(code))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    (tmp_path / "stages.toml").write_text(TINY)
    result = invoke("run-stage", "first", "--stages", tmp_path / "stages.toml", "--ckpt", tmp_path)
    if code == errno.EIO:
        assert result.exit_code == 5 and "Input/output error" in result.stderr
    else:
        assert result.exit_code == 0 and result.output.count("cannot put names on the disk") == 1


# ------------------------------------------------------------------------------------------------------ room, restart


def test_what_is_kept_counts_as_room(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage of 0.25 MiB needs eight times that to begin, and only what is still to be written to go on."""
    folder = shutil.copytree(trained / "ckpt" / "first", tmp_path / "first")
    network = micronet.load_network(folder / "best.safetensors")
    size = sum(tensor.nbytes for tensor in network.state_dict().values())
    kept = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    for free, total, anew, enough in [
        (8 * size - kept, 10**9, False, True),
        (8 * size - kept - 1, 10**9, False, False),
        (8 * size - 1, 10**9, True, False),
        (8 * size, 10**9, True, True),
        (0, 0, True, True),  # which does not know
    ]:
        monkeypatch.setattr(shutil, "disk_usage", lambda _, u=(total, 0, free): shutil._ntuple_diskusage(*u))
        if enough:
            assert micronet.check_room(folder, network, anew) == []
        else:
            with pytest.raises(micronet.Unwritable, match="MiB free"):
                micronet.check_room(folder, network, anew)


@pytest.mark.parametrize("trouble", ["teacher", "room", "data"])
def test_a_restart_that_cannot_begin_moves_nothing(
    trouble: str, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ckpt = shutil.copytree(trained / "ckpt", tmp_path / "ckpt")
    text = (trained / "stages.toml").read_text()
    (tmp_path / "stages.toml").write_text(text.replace('"synthetic"', '"cifar100"') if trouble == "data" else text)
    if trouble == "teacher":
        shutil.rmtree(ckpt / "first")
    if trouble == "room":
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 0, 1))
    for name in ("https_proxy", "http_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # no download
    stage = "first" if trouble == "data" else "second"
    options = ["--stages", tmp_path / "stages.toml", "--ckpt", ckpt, "--data", tmp_path]
    result = invoke("run-stage", stage, *options, "--restart")
    assert result.exit_code == {"teacher": 2, "room": 5, "data": 3}[trouble], result.output
    assert (ckpt / stage / "last.safetensors").exists() and not (ckpt / f"{stage}.old1").exists()


def test_a_commit_is_that_of_a_repository_which_tracks_this_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
