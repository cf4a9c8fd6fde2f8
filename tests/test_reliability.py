"""Nothing that was reported saved is lost, and no file is trusted: real processes, real signals, hostile input."""

import ctypes
import json
import os
import platform
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ONE_EPOCH, ROOT, TINY, WIDE, invoke, program, reset_accelerate
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from test_program import CHAIN, TWO_PROCESSES, Chain
from test_training import same_training

import micronet
from micronet import load_checkpoint, load_stages, read_metadata, save_checkpoint

# As CHAIN, but the best epoch of the first stage changes again and again.
CHANGING = CHAIN.replace("[4, 0.02]", "[4, 0.2]")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two stages of six epochs that nobody disturbed, and their stages file.

    Its seed is one with which the fourth epoch of the first stage overtakes an earlier one, so that a save that
    overtakes stands right after `half`. Which that is depends on the processor: rounding decides.
    """
    for seed in range(1, 50):
        folder = tmp_path_factory.mktemp("undisturbed")
        (folder / "stages.toml").write_text(CHANGING.replace("epochs = 6", f"epochs = 6\nseed = {seed}"))
        assert train(folder).exit_code == 0
        reset_accelerate()
        history = read_metadata(folder / "first" / "last.safetensors").history
        best = [max(history[:n], key=lambda record: record.test_top1).epoch for n in range(1, 7)]
        if len(set(best)) > 2 and best[2] < 4 == best[3]:
            break
    else:
        pytest.fail("no seed of 49 whose fourth epoch overtakes an earlier one")
    assert train(folder, "second").exit_code == 0
    reset_accelerate()
    return folder


@pytest.fixture(scope="module")
def every_epoch(undisturbed: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The first stage as it is kept after each of its epochs."""
    folder, real, copies = tmp_path_factory.mktemp("epochs"), micronet.save_epoch, {}
    shutil.copy(undisturbed / "stages.toml", folder)

    def save_and_copy(kept: Path, stage: micronet.Stage, run: micronet.Run) -> None:
        real(kept, stage, run)
        epoch = len(run.history)
        copies[epoch] = shutil.copytree(folder, tmp_path_factory.mktemp(f"after{epoch}"), dirs_exist_ok=True)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(micronet, "save_epoch", save_and_copy)
        assert train(folder).exit_code == 0
    reset_accelerate()
    return copies


@pytest.fixture
def stopped_at(every_epoch: dict[int, Path], tmp_path: Path) -> Callable[[int], Path]:
    """Copy the first stage as it is kept after an epoch."""
    return lambda epoch: shutil.copytree(every_epoch[epoch], tmp_path, dirs_exist_ok=True)


@pytest.fixture
def half(stopped_at: Callable[[int], Path]) -> Path:
    """The first stage, stopped after three of six epochs."""
    return stopped_at(3)


def train(folder: Path, stage: str = "first") -> object:
    return invoke("run-stage", stage, "--stages", folder / "stages.toml", "--ckpt", folder)


def same_as(folder: Path, undisturbed: Path, stage: str = "first") -> bool:
    return all(
        same_training(folder / stage / file, undisturbed / stage / file)
        for file in ("best.safetensors", "last.safetensors")
    )


# --------------------------------------------------------------------------------------------------------------- kills


def kill_until_done(command: list[object], log: Path, kills: int, most: float, seed: int) -> int:
    """Kill a command at random moments, start it again each time and let it end; return how often it was killed."""
    moments, killed, reported = random.Random(seed), 0, 0
    while True:
        running = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=WIDE)
        try:
            running.wait(moments.uniform(0, most) if killed < kills else 300)
        except subprocess.TimeoutExpired:
            running.kill()
            killed += 1
        output = running.stdout.read().decode()
        assert running.wait() in (0, -signal.SIGKILL), output
        reported = max(
            [reported]
            + [int(line.split("epoch ")[1].split("/")[0]) for line in output.splitlines() if "  epoch " in line]
        )
        kept = read_metadata(state).last.epoch if (state := newest(log)) else 0
        assert kept >= reported, f"epoch {reported} was reported, {kept} are kept"
        if running.returncode == 0:
            return killed


THREE = (
    CHANGING
    + """
[stage.third]
network = "efficientnet_exx"
teacher = "second"
"""
)


@pytest.mark.parametrize("kills", [pytest.param(40, marks=pytest.mark.long)])
def test_a_killed_chain_ends_with_the_same_bits(kills: int, write: Callable[..., Path], tmp_path: Path) -> None:
    """Three stages, killed anywhere, between them too: the chain alone, its launcher, its trainer or all of them."""
    names, stages, killed, rounds = ("first", "second", "third"), write(THREE), 0, 0
    undisturbed, moments = tmp_path / "undisturbed", random.Random(0)
    for name in names:
        assert invoke("run-stage", name, "--stages", stages, "--ckpt", undisturbed).exit_code == 0
        reset_accelerate()
    while killed < kills:
        chain, finished = Chain(tmp_path / str(rounds), stages), {}
        while True:
            running = chain.start()
            try:
                running.wait(moments.uniform(0, 25) if killed < kills else 300)
            except subprocess.TimeoutExpired:
                family = sorted(chain.processes()) or [running.pid]
                for process in moments.choice([family, family[:1], family[1:2] or family, family[-1:]]):
                    with suppress(ProcessLookupError):
                        os.kill(process, signal.SIGKILL)
                killed += 1
            output = running.communicate(timeout=60)[0]
            chain.wait_for_end(30)
            assert not any(f"stage {name}: efficientnet" in output for name in finished), "a finished stage ran again"
            states = {name: chain.ckpt / name / "last.safetensors" for name in names}
            for name, state in states.items():
                if state.exists() and read_metadata(state).last.epoch == 6:
                    assert finished.setdefault(name, state.read_bytes()) == state.read_bytes()
                for line in output.splitlines():
                    if line.startswith(f"{name}  epoch "):
                        assert chain.epochs(name) >= int(line.split()[2].split("/")[0])
            if running.returncode == 0:
                break
        assert all(same_as(chain.ckpt, undisturbed, name) for name in names)
        assert not list(chain.ckpt.glob("*/.*.part"))
        rounds += 1
    print(f"{killed} kills in {rounds} chains")


def newest(log: Path) -> Path | None:
    states = [log.with_name(name) for name in ("last.safetensors", "previous.safetensors")]
    return next((state for state in states if state.exists()), None)


@pytest.mark.parametrize("kills", [2, pytest.param(200, marks=pytest.mark.long)])
def test_a_killed_stage_ends_with_the_same_bits(kills: int, undisturbed: Path, tmp_path: Path) -> None:
    """Rounds of a whole stage, killed at random moments until so many kills are spent."""
    killed, rounds = 0, 0
    while killed < kills:
        folder = tmp_path / str(rounds)
        command = [sys.executable, ROOT / "micronet.py", "run-stage", "first", "--ckpt", folder]
        command += ["--stages", undisturbed / "stages.toml"]
        left = min(kills - killed, 10)
        killed += kill_until_done(command, folder / "first" / "log.jsonl", left, 8, seed=rounds)
        rounds += 1
        assert same_as(folder, undisturbed)
        assert not list((folder / "first").glob(".*.part"))
        names = {path.name for path in (folder / "first").iterdir()}
        assert names == {"best.safetensors", "last.safetensors", "previous.safetensors", "log.jsonl"}
    print(f"{killed} kills in {rounds} rounds")


# ------------------------------------------------------------------------------------------------------ damaged states


def flip(path: Path, at: float = 0.5) -> None:
    content = bytearray(path.read_bytes())
    content[int(at * len(content))] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("at", [0, 0.001, 0.5, 0.999])
def test_a_damaged_state_falls_back_to_the_one_before_it(at: float, half: Path, undisturbed: Path) -> None:
    flip(half / "first" / "last.safetensors", at)
    result = train(half)
    assert result.exit_code == 0 and same_as(half, undisturbed)
    (warning,) = (line for line in result.output.splitlines() if "WARNING" in line)
    assert "last.safetensors: " in warning and warning.endswith(
        f"going on from {half / 'first' / 'previous.safetensors'}"
    )
    assert "goes on after epoch 2 of 6" in result.output


@pytest.mark.parametrize("lost", ["best", "folder"])
def test_what_somebody_removes_is_missed_at_the_next_epoch(
    lost: str, half: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A best network that went away under the run, and the whole folder, which another run may have begun in."""
    real, evaluated = micronet.evaluate, []

    def evaluate(*arguments: object) -> torch.Tensor:
        evaluated.append(1)
        if lost == "best":
            (half / "first" / "best.safetensors").unlink(missing_ok=True)
            return 0 * real(*arguments)  # no epoch that would heal it
        shutil.rmtree(half, ignore_errors=True)
        return real(*arguments)

    monkeypatch.setattr(micronet, "evaluate", evaluate)
    result = train(half)
    words = (
        "restore it, or train the stage anew with run-stage first --restart" if lost == "best" else "nothing more is"
    )
    assert result.exit_code == 3 and words in result.stderr and len(evaluated) == 1


@pytest.mark.parametrize("wrong", ["exported", "best", "another stage's"])
def test_another_checkpoint_is_no_state(wrong: str, half: Path, undisturbed: Path) -> None:
    """In place of last.safetensors: an export and a network alone. The state before it is taken."""
    last, best = half / "first" / "last.safetensors", half / "first" / "best.safetensors"
    if wrong == "exported":
        assert invoke("export", best, half / "out.safetensors").exit_code == 0
        shutil.copy(half / "out.safetensors", last)
    else:
        shutil.copy(best, last)
    result = train(half)
    assert result.exit_code == 0 and "WARNING" in result.output and "goes on after epoch 2 of 6" in result.output
    assert same_as(half, undisturbed) and (half / "first" / "damaged.safetensors").exists()


@pytest.mark.parametrize("name", ["best", "copy"])
def test_a_checkpoint_that_no_state_explains_is_not_trained_over(name: str, half: Path) -> None:
    """Somebody copied a network home from another machine."""
    folder, options = half / "first", ["--stages", half / "stages.toml", "--ckpt", half]
    network = (folder / "best.safetensors").read_bytes()
    for path in folder.iterdir():
        path.unlink()
    (folder / f"{name}.safetensors").write_bytes(network)
    for command in (["run-stage", "first"], ["chain"], ["chain", "--dry-run"]):
        result = invoke(*command, *options)
        assert (result.exit_code, result.output.count("\n")) == (3, 1), result.output
        assert result.stderr.startswith(f"error: {folder}: holds {name}.safetensors and no state that explains it")
    assert invoke("run-stage", "first", *options, "--restart").exit_code == 0
    assert (half / "first.old1" / f"{name}.safetensors").read_bytes() == network


@pytest.mark.parametrize("damage", ["flip", "another stage's", "gone"])
@pytest.mark.parametrize("overtaken", [True, False])
def test_a_wrong_best_network_is_rebuilt_or_the_way_out_is_named(
    damage: str, overtaken: bool, undisturbed: Path, stopped_at: Callable[[int], Path]
) -> None:
    """At the start, not after the last epoch. In epoch 4 the best is the last, in epoch 3 an earlier one."""
    folder = stopped_at(3 if overtaken else 4)
    best = folder / "first" / "best.safetensors"
    if damage == "flip":
        flip(best)
    elif damage == "gone":
        best.unlink()
    else:
        shutil.copy(undisturbed / "second" / "best.safetensors", best)
    result = train(folder)
    if overtaken:
        assert (result.exit_code, result.output.count("\n")) == (3, 1), result.output
        assert (
            str(best) in result.stderr
            and "restore it, or train the stage anew with run-stage first --restart" in result.stderr
        )
    else:
        assert result.exit_code == 0 and same_as(folder, undisturbed)


def test_another_stages_network_is_no_teacher(undisturbed: Path, tmp_path: Path) -> None:
    shutil.copytree(undisturbed, tmp_path, dirs_exist_ok=True)
    shutil.copy(tmp_path / "second" / "best.safetensors", tmp_path / "first")
    shutil.rmtree(tmp_path / "second")
    for command in (["run-stage", "second"], ["chain"]):
        result = invoke(*command, "--stages", tmp_path / "stages.toml", "--ckpt", tmp_path)
        assert (result.exit_code, result.output.count("\n")) == (
            3,
            1,
        ) and "another network, of stage second" in result.stderr


def test_a_short_log_is_written_anew(undisturbed: Path, tmp_path: Path) -> None:
    shutil.copytree(undisturbed, tmp_path, dirs_exist_ok=True)
    log = tmp_path / "first" / "log.jsonl"
    lines = log.read_text()
    log.write_text(lines[: len(lines) // 2])
    assert train(tmp_path).exit_code == 0 and log.read_text() == lines


def test_a_finished_stage_without_its_network_is_said_at_once(undisturbed: Path, tmp_path: Path) -> None:
    """Where it is asked for or to teach; it is not missed where all its pupils are finished."""
    shutil.copytree(undisturbed, tmp_path, dirs_exist_ok=True)
    (tmp_path / "first" / "best.safetensors").unlink()
    options = ["--stages", tmp_path / "stages.toml", "--ckpt", tmp_path]
    assert invoke("chain", *options).exit_code == 0
    shutil.rmtree(tmp_path / "second")
    for command in (["run-stage", "first"], ["run-stage", "second"], ["chain"]):
        result = invoke(*command, *options)
        assert (result.exit_code, result.output.count("\n")) == (3, 1) and "run-stage first --restart" in result.stderr


def test_a_finished_stage_needs_no_teacher(undisturbed: Path, tmp_path: Path) -> None:
    shutil.copytree(undisturbed, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "first")
    result = invoke("chain", "second", "--stages", tmp_path / "stages.toml", "--ckpt", tmp_path, "--dry-run")
    assert (
        result.exit_code == 0
        and "nothing" in result.stdout
        and " first " not in result.stdout.replace("ex      first", "")
    )


def test_two_damaged_states_are_refused(half: Path) -> None:
    for name in ("last", "previous"):
        flip(half / "first" / f"{name}.safetensors")
    result = train(half)
    assert (result.exit_code, result.output.count("\n")) == (3, 1)
    assert (
        "last.safetensors" in result.stderr and "previous.safetensors" in result.stderr and "--restart" in result.stderr
    )
    assert invoke("run-stage", "first", "--stages", half / "stages.toml", "--ckpt", half, "--restart").exit_code == 0
    assert (half / "first.old1" / "last.safetensors").exists()


def test_leftover_temporary_files_are_swept(half: Path) -> None:
    leftover = half / "first" / ".last.safetensors.4711.part"
    leftover.write_bytes(b"x" * 1000)
    assert train(half).exit_code == 0 and not leftover.exists()


# ------------------------------------------------------------------------------------------------------ disk and locks


def test_a_full_disk(half: Path, undisturbed: Path) -> None:
    """No file may grow beyond 40 kB: the run ends with the old state intact, and goes on once there is room."""
    before = read_metadata(half / "first" / "last.safetensors").last.epoch
    options = ["--stages", half / "stages.toml", "--ckpt", half]
    most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, most[1]))
    try:
        result = invoke("run-stage", "first", *options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, most)
    assert (result.exit_code, result.stderr.count("\n")) == (5, 1), result.stderr
    assert "File too large" in result.stderr
    assert read_metadata(half / "first" / "last.safetensors").last.epoch == before
    assert train(half).exit_code == 0 and same_as(half, undisturbed)


def test_a_disk_that_is_full_at_the_start_names_the_file(half: Path) -> None:
    most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, most[1]))
    try:
        result = train(half)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, most)
    assert (result.exit_code, result.stderr) == (5, f"error: {half / '.first.lock'}: File too large\n")


def test_too_little_room_is_found_before_training(half: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 100_000))
    result = train(half)
    assert (result.exit_code, result.output.count("epoch 4/6")) == (5, 0)
    assert result.stderr.startswith(f"error: {half / 'first'}: 0 MiB free, ")


def test_a_folder_that_cannot_be_written(write: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = invoke("run-stage", "first", "--stages", write(), "--ckpt", tmp_path / "file" / "ckpt")
    assert (result.exit_code, result.output.count("\n")) == (5, 1) and "Not a directory" in result.stderr


def test_a_folder_that_may_not_be_written_is_found_before_training(half: Path, undisturbed: Path) -> None:
    """The stage's folder without write bits, and root without the right to ignore that."""
    folder = half / "first"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    folder.chmod(0o555)
    no_override = lambda: ctypes.CDLL(None).prctl(24, 1)  # noqa: E731  PR_CAPBSET_DROP, CAP_DAC_OVERRIDE
    options = ["--stages", half / "stages.toml", "--ckpt", half]
    result = program("run-stage", "first", *options, preexec_fn=no_override)
    folder.chmod(0o755)
    assert (result.returncode, result.stderr) == (5, f"error: {folder}: this process may not write here\n")
    assert "epoch 4/6" not in result.stdout
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert train(half).exit_code == 0 and same_as(half, undisturbed)


def test_one_stage_has_one_trainer(half: Path, undisturbed: Path) -> None:
    options = ["run-stage", "first", "--stages", half / "stages.toml", "--ckpt", half]
    command = [sys.executable, ROOT / "micronet.py", *options]
    trainer = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True, env=WIDE)
    for line in trainer.stdout:
        if "goes on after" in line:
            break
    os.kill(trainer.pid, signal.SIGSTOP)
    other = train(half)
    os.kill(trainer.pid, signal.SIGKILL)
    trainer.wait()
    assert (other.exit_code, other.stdout) == (75, "")
    assert other.stderr.startswith(f"error: stage first: process {trainer.pid} on ") and other.stderr.count("\n") == 1
    assert train(half).exit_code == 0 and same_as(half, undisturbed)  # the dead one holds nothing


# ------------------------------------------------------------------------------------------------- hostile checkpoints


def crafted(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def twice(content: bytes, entry: bytes) -> bytes:
    """Put an entry that stands in the header, which would win, before all others as well."""
    (length,) = struct.unpack("<Q", content[:8])
    return crafted(content[8:9] + entry + content[9 : 8 + length], content[8 + length :])


def hostile(sound: Path) -> dict[str, bytes]:
    tensors, metadata = load_checkpoint(sound)
    explained = json.dumps({"micronet": json.dumps(micronet.plain(metadata))})
    about = b'"__metadata__":' + explained.encode()
    one = b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    content = sound.read_bytes()
    return {
        "empty": b"",
        "one byte": b"\x01",
        "a length alone": struct.pack("<Q", 2**63),
        "a huge header": crafted(b" " * (2**22 + 1)),
        "no metadata": save(tensors),
        "other metadata": save(tensors, {"format": "pt"}),
        "no JSON": crafted(b"{" * 1000),
        "deep JSON": crafted(b"[" * 100_000),
        "a list": crafted(b"[]"),
        "a name twice": twice(content, b'"cosine.kernel":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'),
        "metadata twice": crafted(b"{" + about + b"," + about + b"," + one + b"}", b"abcd"),
        "a huge shape": crafted(
            b"{" + about + b',"a":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4]}}', b"abcd"
        ),
        "a negative offset": crafted(
            b"{" + about + b',"a":{"dtype":"F32","shape":[1],"data_offsets":[-4,4]}}', b"abcd"
        ),
        "an unknown type": crafted(b"{" + about + b',"a":{"dtype":"Q8","shape":[1],"data_offsets":[0,4]}}', b"abcd"),
        "no tensor": crafted(b"{" + about + b"}"),
        "cut": content[:-1],
        "longer": content + b"x",
    }


@pytest.mark.parametrize("kind", [
    "empty", "one byte", "a length alone", "a huge header", "no metadata", "other metadata", "no JSON", "deep JSON",
    "a list", "a name twice", "metadata twice", "a huge shape", "a negative offset", "an unknown type", "no tensor",
    "cut", "longer",
])  # fmt: skip
def test_a_hostile_checkpoint_is_refused_at_once(kind: str, undisturbed: Path, tmp_path: Path) -> None:
    path = tmp_path / "evil.safetensors"
    path.write_bytes(hostile(undisturbed / "first" / "best.safetensors")[kind])
    start = time.process_time()
    result = invoke("evaluate", path)
    assert (result.exit_code, result.output.count("\n")) == (3, 1), result.output
    assert result.stderr.startswith(f"error: {path}: ") and time.process_time() - start < 1


@pytest.mark.parametrize("change", ["missing", "extra", "shape", "type"])
def test_other_tensors_than_the_networks_are_refused(change: str, undisturbed: Path, tmp_path: Path) -> None:
    tensors, metadata = load_checkpoint(undisturbed / "first" / "best.safetensors")
    name = "cosine.kernel"
    match change:
        case "missing":
            del tensors[name]
        case "extra":
            tensors["evil\x1b[31m"] = torch.zeros(1)
        case "shape":
            tensors[name] = tensors[name][:, :-1]
        case "type":
            tensors[name] = tensors[name].int()
    save_checkpoint(path := tmp_path / "other.safetensors", tensors, metadata)
    result = invoke("evaluate", path)
    assert (result.exit_code, result.output.count("\n")) == (3, 1) and "\x1b" not in result.output


def test_random_damage_never_loads(undisturbed: Path, tmp_path: Path) -> None:
    content = (undisturbed / "first" / "last.safetensors").read_bytes()
    path, dice = tmp_path / "damaged.safetensors", random.Random(0)
    header = struct.unpack("<Q", content[:8])[0]
    for n in range(150):
        damaged = bytearray(content)
        damaged[dice.randrange(8 + header if n % 2 else len(content))] ^= 1 << dice.randrange(8)
        path.write_bytes(damaged if n % 5 else content[: dice.randrange(len(content))])
        with pytest.raises(micronet.Refused):
            load_checkpoint(path)


def test_no_pickle_is_written_or_read(write: Callable[..., Path], tmp_path: Path) -> None:
    """Training, resuming, testing and exporting in a process that ends at the first pickle."""
    code = """
import pickle, sys
import torch, micronet
def forbidden(*_, **__):
    raise SystemExit("a pickle")
for module in (pickle, torch):
    for name in ("load", "loads", "dump", "dumps", "save"):
        if hasattr(module, name):
            setattr(module, name, forbidden)
for words in sys.stdin.read().splitlines():
    micronet.app(words.split(), standalone_mode=False)
    from accelerate.state import AcceleratorState, GradientState
    AcceleratorState._reset_state(True); GradientState._reset_state()
"""
    stages = write(ONE_EPOCH)
    three = [f"run-stage first --stages {stages} --ckpt {tmp_path}", f"run-stage second --stages {stages} --ckpt {tmp_path}",
             f"evaluate {tmp_path}/second/best.safetensors", f"export {tmp_path}/second/best.safetensors {tmp_path}/x.safetensors"]  # fmt: skip
    result = subprocess.run(
        [sys.executable, "-c", code], input="\n".join(three), cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert (tmp_path / "x.safetensors").exists() and "Test accuracy" in result.stdout


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    for name in ("pipe.safetensors", "pipe.toml"):
        os.mkfifo(tmp_path / name)
    assert invoke("evaluate", tmp_path / "pipe.safetensors").exit_code == 3
    assert invoke("chain", "--stages", tmp_path / "pipe.toml").exit_code == 2


# ------------------------------------------------------------------------------------------------------------ teachers


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("scale", "a network of 10 classes at scale 7.0: stage second expects 10 classes at scale 5.0"),
        ("classes", "metadata.class_names contradicts the rest"),
        ("nan", "cosine.kernel is not finite"),
        ("network", "is missing"),
    ],
)
def test_a_wrong_teacher_is_refused(change: str, message: str, undisturbed: Path, tmp_path: Path) -> None:
    tensors, about = load_checkpoint(undisturbed / "first" / "best.safetensors")
    stage = {"scale": {"scale": 7.0}, "classes": {"dataset": "cifar100"}, "network": {"depth": 1.0}}.get(change, {})
    if change == "nan":
        tensors["cosine.kernel"][3, 3] = float("nan")
    path = tmp_path / "teacher.safetensors"
    save_checkpoint(path, tensors, replace(about, stage=replace(about.stage, **stage)))
    text = (undisturbed / "stages.toml").read_text()
    (tmp_path / "stages.toml").write_text(text.replace('teacher = "first"', f'teacher = "{path}"'))
    result = train(tmp_path, "second")
    assert (result.exit_code, result.output.count("\n")) == (3, 1), result.output
    assert message in result.stderr and not (tmp_path / "second").exists()


def test_a_stage_does_not_teach_itself(half: Path) -> None:
    own = half / "first" / "best.safetensors"
    stages = (half / "stages.toml").read_text().replace("stochastic_depth", f'teacher = "{own}"\nstochastic_depth')
    (half / "stages.toml").write_text(stages)
    result = invoke("run-stage", "first", "--stages", half / "stages.toml", "--ckpt", half, "--restart")
    assert (result.exit_code, result.output.count("\n")) == (3, 1) and "stage first keeps it itself" in result.stderr
    assert own.exists()


# ---------------------------------------------------------------------------------------- environment, nan and processes


def test_a_changed_environment_is_announced(half: Path) -> None:
    was = dict(device="TPU", processes=3, threads=7, precision="bf16", compile="inductor")
    for name in ("last", "previous"):
        path = half / "first" / f"{name}.safetensors"
        tensors, about = load_checkpoint(path)
        save_checkpoint(path, tensors, replace(about, facts=about.facts._replace(versions={"torch": "2.11.0"}, **was)))
    result = train(half)
    assert result.exit_code == 0
    now = dict(device=f"CPU ({platform.machine()})", processes=1, threads=1, precision="fp32", compile=None)
    for name, value in was.items():
        assert f"changed since epoch 3: {name} was {value} and is {now[name]}\n" in result.output
    assert f"changed since epoch 3: torch was 2.11.0 and is {torch.__version__}\n" in result.output


@pytest.mark.parametrize("where", ["weight", "buffer", "loss", "gradient"])
def test_nan_ends_the_run_and_spares_what_is_kept(where: str, half: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (half / "first" / "last.safetensors").read_bytes()
    real, step = micronet.margin_loss, 0

    def margin_loss(cosines: torch.Tensor, *rest: object) -> torch.Tensor:
        nonlocal step
        step += 1
        loss = real(cosines, *rest)
        if where == "gradient" and step == 7:  # the first step of epoch 5
            cosines.register_hook(lambda gradient: gradient * float("nan"))
        return loss * float("inf") if where == "loss" and step == 8 else loss  # the second step of epoch 5

    def evaluate(network: torch.nn.Module, *rest: object) -> torch.Tensor:
        totals = measured(network, *rest)
        if where in ("weight", "buffer"):
            name = {"weight": "stem.0.weight", "buffer": "stem.1.running_var"}[where]
            network.state_dict()[name][0] = float("nan")
        return totals

    measured = micronet.evaluate
    monkeypatch.setattr(micronet, "margin_loss", margin_loss)
    monkeypatch.setattr(micronet, "evaluate", evaluate)
    result = train(half)
    epoch = 4 if where in ("weight", "buffer") else 5
    assert result.exit_code == 4 and f"stage first: nan or infinity in epoch {epoch}, step " in result.stderr
    assert epoch == 5 or (half / "first" / "last.safetensors").read_bytes() == before
    assert read_metadata(half / "first" / "last.safetensors").last.epoch == epoch - 1
    if epoch == 5:  # a gradient shows in the next step's loss
        assert "epoch 5, step 2 of 6" in result.stderr


@pytest.mark.long  # half a minute of it is torch waiting for the stopped one
def test_a_stopped_process_ends_the_other(write: Callable[..., Path], tmp_path: Path) -> None:
    chain = Chain(
        tmp_path,
        write(CHAIN.replace("epochs = 6", "epochs = 40").replace("[6, 0.002]", "[40, 0.002]")),
        write(TWO_PROCESSES, "two.yaml"),
    )
    chain.command += ["--timeout", "5"]
    running = chain.start()
    chain.wait_for_epoch("first", 1)
    os.kill(max(chain.processes()), signal.SIGSTOP)
    output, _ = running.communicate(timeout=90)
    chain.wait_for_end(5)
    kept = chain.epochs("first")
    assert running.returncode == 1 and "error: stage first failed: " in output
    assert read_metadata(chain.ckpt / "first" / "last.safetensors").last.epoch == kept < 40


# --------------------------------------------------------------------------------------------------------------- input


def test_damaged_images_are_named(
    cifar100: Path, write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # no download
    monkeypatch.setenv("no_proxy", "")
    stages = write(TINY.replace('"synthetic"', '"cifar100"'))
    folder = tmp_path / "cifar-100-python"
    real = cifar100 / "cifar-100-python"

    def complaint() -> str:
        result = invoke("run-stage", "first", "--stages", stages, "--data", tmp_path, "--ckpt", tmp_path / "ckpt")
        assert (result.exit_code, result.output.count("\n")) == (3, 1), result.output
        return result.stderr

    shutil.copytree(real, folder)
    flip(folder / "train")
    assert "(train is damaged)" in complaint()
    shutil.copy(real / "train", folder)
    (folder / "test").write_bytes((real / "test").read_bytes()[:-1])
    assert "(test is damaged)" in complaint()
    shutil.copy(real / "train", folder / "test")
    shutil.copy(real / "test", folder / "train")
    assert "(train is damaged, test is damaged)" in complaint()
    shutil.rmtree(folder)
    assert "(train is missing, test is missing, meta is missing), and the download failed" in complaint()


@given(st.one_of(st.binary(max_size=300), st.text(max_size=300).map(lambda text: text.encode())))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_are_stages_or_one_line(tmp_path: Path, content: bytes) -> None:
    check_stages(tmp_path / "any.toml", content)


VALUES = st.recursive(
    st.one_of(st.booleans(), st.integers(), st.floats(), st.text("ab.[]\x1b'é", max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.sampled_from("ab"), inner, max_size=2)),
    max_leaves=6,
)


def toml(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {toml(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    return json.dumps(value).replace("NaN", "nan").replace("Infinity", "inf")


@given(st.dictionaries(st.sampled_from(list(micronet.KEYS)), VALUES, min_size=1, max_size=3))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_values_are_a_stage_or_one_line(tmp_path: Path, table: dict[str, object]) -> None:
    lines = [f"{key} = {toml(value)}" for key, value in ({"network": "efficientnet_ex"} | table).items()]
    check_stages(tmp_path / "any.toml", ("[stage.a]\n" + "\n".join(lines)).encode())


@pytest.mark.parametrize(
    "text",
    [
        "a = " + "[" * 60_000,
        ".".join("a" * 50_000) + " = 1",
        "stage." + "a." * 30_000 + "b = 1",
        "x = 1\n" * 100_000,
        "[stage.a]\nepochs = " + "9" * 5000,
        "[stage.a]\nnetwork = 'efficientnet_ex'\nepochs = true",
        "[stage.a]\nnetwork = 'efficientnet_ex'\nmomentum = 1e400",
        "[stage.a]\nnetwork = 'efficientnet_ex'\nscale = nan",
        "[stage.'../x']\nnetwork = 'efficientnet_ex'",
        "[stage.'']\nnetwork = 'efficientnet_ex'",
    ],
    ids=range(10),
)
def test_crafted_stages_are_one_line(text: str, tmp_path: Path) -> None:
    check_stages(tmp_path / "crafted.toml", text.encode(), accepted=False)


@pytest.mark.parametrize(("teacher", "code"), [("/etc/passwd", 3), ("/dev/zero", 3), ("no/such.safetensors", 2)])
def test_a_teacher_that_is_none_is_one_line(
    teacher: str, code: int, write: Callable[..., Path], tmp_path: Path
) -> None:
    path = write(f"[stage.a]\nnetwork = 'efficientnet_ex'\nteacher = '{teacher}'")
    for command in ("run-stage a", "chain --dry-run"):
        result = invoke(*command.split(), "--stages", path, "--ckpt", tmp_path)
        assert (result.exit_code, result.output.count("\n"), teacher in result.stderr) == (code, 1, True), result.output


def check_stages(path: Path, content: bytes, accepted: bool = True) -> None:
    path.write_bytes(content)
    start = time.process_time()
    result = invoke("chain", "--stages", path, "--ckpt", path.parent / "ckpt", "--dry-run")
    assert time.process_time() - start < 1
    if result.exit_code == 0:
        assert accepted and load_stages(path)
    else:
        assert (result.exit_code, result.output.count("\n")) == (2, 1), result.output
        assert result.stderr.startswith(f"error: {path}: ") and "\x1b" not in result.output


# -------------------------------------------------------------------------------------------------------------- output


def test_a_reader_that_goes_away_does_not_end_a_run(write: Callable[..., Path], tmp_path: Path) -> None:
    command = f"{sys.executable} {ROOT / 'micronet.py'} run-stage first --stages {write()} --ckpt {tmp_path} | head -1"
    result = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True, env=WIDE)
    assert (result.returncode, result.stderr) == (0, "") and result.stdout.count("\n") == 1
    assert read_metadata(tmp_path / "first" / "last.safetensors").last.epoch == 3


@pytest.mark.long
def test_a_full_log_does_not_end_a_run(write: Callable[..., Path], tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, ROOT / "micronet.py", "run-stage", "first", "--stages", write(), "--ckpt", tmp_path]
        subprocess.run(list(map(str, command)), stdout=full, stderr=subprocess.PIPE, env=WIDE)
    assert read_metadata(tmp_path / "first" / "last.safetensors").last.epoch == 3
