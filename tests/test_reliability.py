"""Nothing that was reported saved is lost, and no file is trusted: real processes, real signals, hostile input."""

import functools
import json
import os
import pickle
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

import conftest
import pytest
import torch
from conftest import ROOT, invoke, program
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from test_keeping import flip
from test_program import CHAIN, TWO_PROCESSES, Chain
from test_training import same_training
from typer.testing import Result

import micronet
from micronet import load_checkpoint, load_stages, read_metadata, save_checkpoint

# As CHAIN, but the best epoch of the first stage changes again and again.
CHANGING = CHAIN.replace("[4, 0.02]", "[4, 0.2]")
SHORT = CHANGING.replace("[defaults]", '[defaults]\nviews = ["crop"]')  # two steps an epoch
TOP1 = [20.0, 30.0, 10.0, 40.0, 30.0, 20.0]  # that its epochs are said to come to: the fourth one overtakes
EVALUATE = micronet.evaluate
refused = functools.partial(conftest.refused, code=3, shown=True)


def evaluate(network: torch.nn.Module, *rest: object) -> torch.Tensor:
    """Test a network, but take from TOP1 how many of 50 images it knows, by the epoch that its batches come to."""
    totals = EVALUATE(network, *rest)
    totals[0] = TOP1[int(network.stem[1].num_batches_tracked) // 2 - 1] / 2
    return totals


@pytest.fixture(scope="module")
def every_epoch(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """A folder as it is after each epoch of two stages that nobody disturbed: 1 to 6, and 7 to 12 of the second one."""
    folder, real, copies = tmp_path_factory.mktemp("epochs"), micronet.save_epoch, {}
    (folder / "stages.toml").write_text(SHORT)

    def save_and_copy(*arguments: object) -> None:
        real(*arguments)
        epoch = len(copies) + 1
        copies[epoch] = shutil.copytree(folder, tmp_path_factory.mktemp(f"after{epoch}"), dirs_exist_ok=True)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(micronet, "save_epoch", save_and_copy)
        patch.setattr(micronet, "evaluate", evaluate)
        for stage in ("first", "second"):
            assert train(folder, stage).exit_code == 0
    return copies


@pytest.fixture
def undisturbed(every_epoch: dict[int, Path]) -> Path:
    return every_epoch[12]


@pytest.fixture
def stopped_at(every_epoch: dict[int, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Path]:
    monkeypatch.setattr(micronet, "evaluate", evaluate)
    return lambda epoch: shutil.copytree(every_epoch[epoch], tmp_path, dirs_exist_ok=True)


@pytest.fixture
def half(stopped_at: Callable[[int], Path]) -> Path:
    """The first stage, stopped after three of six epochs."""
    return stopped_at(3)


def train(folder: Path, *words: str) -> Result:
    """Run run-stage, of the first stage if no other one is named, or another command."""
    command = words if "chain" in words else ("run-stage", *(words or ["first"]))
    return invoke(*command, "--stages", folder / "stages.toml", "--ckpt", folder)


def same_as(folder: Path, undisturbed: Path, stage: str = "first") -> bool:
    files = ("best.safetensors", "last.safetensors")
    return all(same_training(folder / stage / file, undisturbed / stage / file) for file in files)


def test_a_killed_stage_ends_with_the_same_bits(trained: Path, tmp_path: Path) -> None:
    command = ["run-stage", "first", "--stages", trained / "stages.toml", "--ckpt", tmp_path]
    running = subprocess.Popen([sys.executable, *map(str, [ROOT / "micronet.py", *command])], stdout=subprocess.PIPE)
    for line in running.stdout:
        if b"epoch 1/3" in line:
            running.kill()
    late = running.wait() == 0  # on a busy machine
    result = invoke(*command)
    assert result.exit_code == 0 and (late or "goes on after epoch " in result.output)
    assert same_as(tmp_path, trained / "ckpt") and not list((tmp_path / "first").glob(".*"))


THREE = f'{CHANGING}[stage.third]\nnetwork = "efficientnet_exx"\nteacher = "second"\n'


@pytest.mark.long
@pytest.mark.parametrize(("names", "kills", "most"), [(["first"], 200, 8), (["first", "second", "third"], 40, 25)])
def test_whatever_is_killed_ends_with_the_same_bits(
    names: list[str], kills: int, most: int, write: Callable[..., Path], tmp_path: Path
) -> None:
    """A stage, and three of them, between them too: the chain alone, its launcher, its trainer or all of them."""
    stages, killed, rounds = write(THREE), 0, 0
    undisturbed, moments = tmp_path / "undisturbed", random.Random(0)
    for name in names:
        assert invoke("run-stage", name, "--stages", stages, "--ckpt", undisturbed).exit_code == 0
    while killed < kills:
        chain, finished, left = Chain(tmp_path / str(rounds), stages), {}, min(kills, killed + 10)
        if len(names) == 1:
            chain.command[2:] = ["run-stage", "first", *chain.command[3:-2]]
        while True:
            running = chain.start()
            try:
                running.wait(moments.uniform(0, most) if killed < left else 300)
            except subprocess.TimeoutExpired:
                family = sorted(chain.processes()) or [running.pid]
                for process in moments.choice([family, family[:1], family[1:2] or family, family[-1:]]):
                    with suppress(ProcessLookupError):
                        os.kill(process, signal.SIGKILL)
                killed += 1
            output = running.communicate(timeout=60)[0]
            chain.wait_for_end(30)
            assert not any(f"stage {name}: efficientnet" in output for name in finished), "a finished stage ran again"
            for name in names:
                state = chain.ckpt / name / "last.safetensors"
                if state.exists() and read_metadata(state).last.epoch == 6:
                    assert finished.setdefault(name, state.read_bytes()) == state.read_bytes()
                for line in output.splitlines():
                    if line.startswith(f"{name}  epoch "):
                        assert chain.epochs(name) >= int(line.split()[2].split("/")[0]), "reported, and not kept"
            if running.returncode == 0:
                break
        assert all(same_as(chain.ckpt, undisturbed, name) for name in names)
        left_over = {path.name for path in chain.ckpt.glob("*/*")} - {"error.log"}  # of what was killed
        assert left_over == {path.name for path in undisturbed.glob("first/*")}
        rounds += 1
    print(f"{killed} kills in {rounds} rounds")


# ------------------------------------------------------------------------------------------------------ damaged states


@pytest.mark.parametrize("wrong", ["header", "tensors", "exported", "best"])
def test_a_state_that_is_none_falls_back_to_the_one_before_it(wrong: str, half: Path, undisturbed: Path) -> None:
    last, best = half / "first" / "last.safetensors", half / "first" / "best.safetensors"
    if wrong in ("header", "tensors"):
        flip(last, {"header": 0.001, "tensors": 0.999}[wrong])
    elif wrong == "best":
        shutil.copy(best, last)
    else:
        assert invoke("export", best, half / "out.safetensors").exit_code == 0
        shutil.copy(half / "out.safetensors", last)
    result = train(half)
    assert result.exit_code == 0 and same_as(half, undisturbed)
    (warning,) = (line for line in result.output.splitlines() if "WARNING" in line)
    assert f"{last}: " in warning and warning.endswith(f"going on from {half}/first/previous.safetensors")
    assert "goes on after epoch 2 of 6" in result.output and (half / "first" / "damaged.safetensors").exists()


@pytest.mark.parametrize("trouble", ["all damaged", "no state"])
def test_a_stage_is_not_trained_over_what_it_cannot_go_on_from(trouble: str, half: Path) -> None:
    """Both states are damaged, or somebody copied a network home from another machine. A restart moves it aside."""
    folder, last = half / "first", half / "first" / "last.safetensors"
    if trouble == "no state":
        best = folder.joinpath("best.safetensors").read_bytes()
        shutil.rmtree(folder)
        folder.mkdir()
        folder.joinpath("copy.safetensors").write_bytes(best)
        words = [f"error: {folder}: holds copy.safetensors and no state that explains it"]
    else:
        for path in micronet.last_paths(folder):
            flip(path, 0.001)
        words = [str(last), "previous.safetensors"]
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for command in (["first"], ["chain"], ["chain", "--dry-run"]):
        assert refused(train(half, *command), *words, "--restart")
    assert f"{folder} is now {folder}.old1" in train(half, "first", "--restart").output and last.exists()
    assert {path.name: path.read_bytes() for path in (half / "first.old1").iterdir()} == before
    shutil.rmtree(folder)  # there is nothing to move
    assert " is now " not in train(half, "first", "--restart").output and not (half / "first.old2").exists()
    shutil.rmtree(folder)
    folder.symlink_to("nowhere")
    assert refused(train(half, "chain", "--dry-run"), f"{folder}: not a folder", code=3)


@pytest.mark.parametrize("damage", ["flip", "another stage's", "gone"])
@pytest.mark.parametrize("overtaken", [True, False])
def test_a_wrong_best_network_is_rebuilt_or_the_way_out_is_named(
    damage: str, overtaken: bool, undisturbed: Path, stopped_at: Callable[[int], Path]
) -> None:
    """At the start, by a tensor too, not after the last epoch. In epoch 4 the best is the last, in 3 an earlier one."""
    folder = stopped_at(3 if overtaken else 4)
    best = folder / "first" / "best.safetensors"
    if damage == "flip":
        flip(best, 0.999)
    elif damage == "gone":
        best.unlink()
    else:
        shutil.copy(undisturbed / "second" / "best.safetensors", best)
    result = train(folder)
    if overtaken:
        assert refused(result, str(best), "restore it, or train the stage anew with run-stage first --restart")
        assert not result.stdout
    else:
        assert result.exit_code == 0 and same_as(folder, undisturbed)


@pytest.mark.parametrize("lost", ["gone", "another network, of stage second"])
def test_a_finished_stage_without_its_network_is_said_at_once(lost: str, stopped_at: Callable[[int], Path]) -> None:
    """Where it is asked for or to teach; not even its folder is missed where all its pupils are finished."""
    finished = stopped_at(12)
    best = finished / "first" / "best.safetensors"
    best.unlink() if lost == "gone" else shutil.copy(finished / "second" / "best.safetensors", best)
    kept = shutil.copytree(finished / "first", finished / "kept")
    assert train(finished, "chain").exit_code == 0
    shutil.rmtree(finished / "first")
    assert train(finished, "chain", "second").exit_code == 0
    shutil.rmtree(finished / "second")
    kept.rename(finished / "first")
    for command in (["first"], ["second"], ["chain"]):
        words = [] if lost == "gone" else [lost]
        assert refused(train(finished, *command), *words, "run-stage first --restart")


def test_what_a_run_has_left_is_tidied(stopped_at: Callable[[int], Path]) -> None:
    """Of a finished stage, too, which is left alone else: a short log, and a file that nobody writes any more."""
    folder = stopped_at(12)
    log, leftover = folder / "first" / "log.jsonl", folder / "first" / ".last.safetensors.4711.part"
    before = {path: path.read_bytes() for path in log.parent.iterdir()}
    log.write_bytes(before[log][:99])
    leftover.write_bytes(b"x")
    assert "stage first is finished: " in train(folder).output
    assert {path: path.read_bytes() for path in log.parent.iterdir()} == before


def test_a_restart_that_cannot_begin_moves_nothing(half: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 0, (path != half) << 40))
    assert refused(train(half, "first", "--restart"), f"error: {half}/first: 0 MiB free, ", code=5)
    assert (half / "first" / "last.safetensors").exists() and not (half / "first.old1").exists()


def test_a_full_disk(half: Path, undisturbed: Path) -> None:
    """No file may grow, or beyond 40 kB: the run ends with the old state intact, and goes on once there is room."""
    limit, last = resource.getrlimit(resource.RLIMIT_FSIZE), half / "first" / "last.safetensors"
    for most, file in ((0, half / ".first.lock"), (40_000, last)):
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, limit[1]))
        try:
            result = train(half)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        assert refused(result, f"error: {file}: File too large", code=5) and read_metadata(last).last.epoch == 3
    assert f"first failed: {last}: File too large" in invoke("show", "--ckpt", half).output.replace("\n", "")
    assert train(half).exit_code == 0 and same_as(half, undisturbed)
    assert "failed" not in invoke("show", "--ckpt", half).output


def test_one_stage_has_one_trainer(half: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it trains, `show` says so, which does not take its lock, and others are refused, and move nothing aside."""
    others, where = [], ["--stages", half / "stages.toml"]
    (half / "second").mkdir()
    (half / "second" / "note").touch()

    def interrupted(*arguments: object) -> torch.Tensor:
        if not others:
            for command in (["show", "--json"], ["run-stage", "first"], ["chain", "second", "first", "--restart"]):
                command += where if command[0] != "show" else []
                others.append(program(*command, "--ckpt", half))
        return evaluate(*arguments)

    monkeypatch.setattr(micronet, "evaluate", interrupted)
    assert train(half).exit_code == 0 and same_as(half, undisturbed)
    shown, *refusals = others
    assert json.loads(shown.stdout)[0]["state"] == "running" and not micronet.is_locked("first", half)
    words = f"error: stage first: process {os.getpid()} on {platform.node()} trains it in {half}\n"
    assert [(other.returncode, other.stderr) for other in refusals] == [(75, words)] * 2 and not refusals[0].stdout
    assert (half / "second" / "note").exists()


# ------------------------------------------------------------------------------------------------- hostile checkpoints


def crafted(header: bytes, data: bytes = b"") -> bytes:
    """Return a file with that header, signed if it has its digest, which anybody can."""
    content = struct.pack("<Q", len(header)) + header
    return micronet.HEADER.sub(micronet.header_digest(content).encode(), content) + data


def hostile(sound: Path) -> dict[str, bytes]:
    tensors, metadata = load_checkpoint(sound)
    about = b'"__metadata__":' + json.dumps({"micronet": json.dumps(micronet.plain(metadata))}).encode()
    tensor = lambda a, *more: crafted(b"{" + b",".join([about, *more, b'"a":{"dtype":' + a]) + b"}}", b"abcd")  # noqa: E731
    one, content = b'"F32","shape":[1],"data_offsets":[0,4]', sound.read_bytes()
    end = 8 + struct.unpack("<Q", content[:8])[0]
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
        "a name twice": crafted(b'{"cosine.kernel":{"dtype":' + one + b"}," + content[9:end], content[end:]),
        "metadata twice": tensor(one, about),
        "a huge shape": tensor(b'"F32","shape":[1000000000000],"data_offsets":[0,4]'),
        "a negative offset": tensor(b'"F32","shape":[1],"data_offsets":[-4,4]'),
        "an unknown type": tensor(b'"Q8","shape":[1],"data_offsets":[0,4]'),
        "no tensor": crafted(b"{" + about + b"}"),
        "cut": content[:-1],
        "longer": content + b"x",
    }


def test_a_hostile_checkpoint_is_refused_at_once(undisturbed: Path, tmp_path: Path) -> None:
    files = hostile(undisturbed / "first" / "best.safetensors")
    for kind in (*files, "missing", "a folder", "a pipe"):
        path = tmp_path / f"{kind}.safetensors"
        if kind == "a folder":
            path.mkdir()
        elif kind == "a pipe":
            os.mkfifo(path)
        elif kind != "missing":
            path.write_bytes(files[kind])
        start = time.process_time()
        named = path / "best.safetensors" if kind == "a folder" else path
        assert refused(invoke("evaluate", path), f"error: {named}: ") and time.process_time() - start < 1, kind
        if kind in ("cut", "longer"):  # which its header alone tells
            with pytest.raises(micronet.Refused):
                read_metadata(path)


def test_other_tensors_than_the_networks_are_refused(undisturbed: Path, tmp_path: Path) -> None:
    tensors, metadata = load_checkpoint(undisturbed / "first" / "best.safetensors")
    kernel, path = tensors["cosine.kernel"], tmp_path / "other.safetensors"
    for changes, message in (
        ({"cosine.kernel": None}, "cosine.kernel is missing"),
        ({"evil\x1b[31m": kernel + 1}, "evil?[31m is not in this network"),
        ({"cosine.kernel": kernel[:, :-1]}, "cosine.kernel has shape (200, 9) where (200, 10) is expected"),
        ({"cosine.kernel": kernel.long()}, "cosine.kernel has type torch.int64 where torch.float32 is expected"),
        ({"cosine.kernel": kernel / 0}, "cosine.kernel is not finite"),
    ):
        changed = {name: tensor for name, tensor in (tensors | changes).items() if tensor is not None}
        save_checkpoint(path, changed, metadata)
        assert refused(invoke("evaluate", path), f"error: {path}: {message}")


def test_no_pickle_is_written_or_read(half: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (pickle, torch):
        for name in {"load", "loads", "dump", "dumps", "save"} & vars(module).keys():
            monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("a pickle"))
    best = half / "first" / "best.safetensors"
    assert train(half).exit_code == 0 and invoke("evaluate", best).exit_code == 0
    assert invoke("export", best, half / "out.safetensors").exit_code == 0


def test_a_wrong_teacher_is_refused(undisturbed: Path, tmp_path: Path) -> None:
    tensors, about = load_checkpoint(undisturbed / "first" / "best.safetensors")
    path = tmp_path / "teacher.safetensors"
    stages = SHORT.replace('teacher = "first"', f'teacher = "{path}"')
    for depth, line, message in (
        (0.1, "scale = 7", "scale = 5.0: expected 7.0, as stage second has it"),
        (0.1, 'dataset = "cifar100"', 'dataset = "synthetic": expected "cifar100"'),
        (1.0, "", " is missing"),
    ):
        save_checkpoint(path, tensors, replace(about, stage=replace(about.stage, depth=depth)))
        (tmp_path / "stages.toml").write_text(stages + line)
        assert refused(train(tmp_path, "second"), f"error: {path}: ", message) and not (tmp_path / "second").exists()


def test_a_teacher_that_is_not_finished_explained_or_there_is_named(half: Path) -> None:
    assert refused(train(half, "second"), "its teacher first is not finished: `chain` does that first", code=2)
    best = half / "first" / "best.safetensors"
    for path in micronet.last_paths(best.parent):
        path.unlink()
    assert refused(train(half, "second"), f"{best}: no state explains it: train first, or name")
    best.unlink()
    assert refused(train(half, "second"), f"its teacher {best} is not there: train it first", code=2)


def test_a_stage_does_not_teach_itself(half: Path) -> None:
    own = half / "first" / "best.safetensors"
    (half / "stages.toml").write_text(SHORT.replace("stochastic_depth", f'teacher = "{own}"\nstochastic_depth'))
    assert refused(train(half, "first", "--restart"), "stage first keeps it itself") and own.exists()


def test_a_changed_environment_is_announced(half: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(micronet, "sync_folder", lambda folder: False)
    was = dict(device="TPU", processes=3, accumulation=5, threads=7, instructions="VSX", precision="bf16")
    was["compile"] = "inductor"
    path = half / "first" / "last.safetensors"
    tensors, about = load_checkpoint(path)
    save_checkpoint(path, tensors, replace(about, facts=about.facts._replace(versions={"torch": "2.11.0"}, **was)))
    result = train(half)
    assert result.exit_code == 0 and result.output.count("this file system cannot put names on the disk") == 1
    now = dict(device=f"CPU ({platform.machine()})", processes=1, accumulation=1, threads=1, precision="fp32")
    now |= {"instructions": torch.backends.cpu.get_cpu_capability(), "compile": None}
    for name, value in was.items():
        assert f"changed since epoch 3: {name} was {value} and is {now[name]}\n" in result.output
    assert f"changed since epoch 3: torch was 2.11.0 and is {torch.__version__}\n" in result.output


@pytest.mark.parametrize("where", ["stem.0.weight", "stem.1.running_var", "loss", "gradient"])
def test_nan_ends_the_run_and_spares_what_is_kept(where: str, half: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    last, real, step = half / "first" / "last.safetensors", micronet.margin_loss, 0
    before = last.read_bytes()

    def margin_loss(cosines: torch.Tensor, *rest: object) -> torch.Tensor:
        nonlocal step
        step += 1
        loss = real(cosines, *rest)
        if where == "gradient" and step == 3:  # the first step of epoch 5
            cosines.register_hook(lambda gradient: gradient * float("nan"))
        return loss * float("inf") if where == "loss" and step == 3 else loss

    def evaluate_and_spoil(network: torch.nn.Module, *rest: object) -> torch.Tensor:
        totals = evaluate(network, *rest)
        if "." in where:
            network.state_dict()[where][0] = float("nan")
        return totals

    monkeypatch.setattr(micronet, "margin_loss", margin_loss)
    monkeypatch.setattr(micronet, "evaluate", evaluate_and_spoil)
    result = train(half)
    epoch, step = {"loss": (5, 1), "gradient": (5, 2)}.get(where, (4, 2))  # a gradient shows in the next step's loss
    words = f"error: stage first: nan or infinity in epoch {epoch}, step {step} of 2: "
    assert refused(result, words, code=4) and read_metadata(last).last.epoch == epoch - 1
    assert epoch == 5 or last.read_bytes() == before


@pytest.mark.long  # half a minute of it is torch waiting for the stopped one
def test_a_stopped_process_ends_the_other(write: Callable[..., Path], tmp_path: Path) -> None:
    stages = write(CHAIN.replace("epochs = 6", "epochs = 40").replace("[6, 0.002]", "[40, 0.002]"))
    chain = Chain(tmp_path, stages, write(TWO_PROCESSES, "two.yaml"))
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


def check_stages(path: Path, content: bytes, accepted: bool = True) -> None:
    path.write_bytes(content)
    start = time.process_time()
    result = train(path.parent, "chain", "--dry-run")
    assert time.process_time() - start < 1
    if not accepted or result.exit_code:
        assert refused(result, f"error: {path}: ", code=2) and "\x1b" not in result.output
    else:
        assert load_stages(path)


ATOMS = r"""true -1 0 9223372036854775807 1e400 nan -inf 0.5 '' [] "[a.\u001bé" 1979-05-27""".split()
VALUES = st.recursive(
    st.sampled_from(ATOMS),
    lambda inner: (
        st.lists(inner, max_size=3).map(lambda words: f"[{', '.join(words)}]")
        | st.tuples(st.sampled_from(["a", "schedule", "peak"]), inner).map(lambda pair: "{ %s = %s }" % pair)
    ),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from(list(micronet.KEYS)), VALUES, min_size=1, max_size=3))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_values_are_a_stage_or_one_line(tmp_path: Path, table: dict[str, str]) -> None:
    lines = [f"{key} = {value}" for key, value in ({"network": '"efficientnet_ex"'} | table).items()]
    check_stages(tmp_path / "stages.toml", "\n".join(["[stage.a]", *lines]).encode())


def test_crafted_stages_are_one_line(tmp_path: Path) -> None:
    deep, wide, other = "a = " + "[" * 60_000, ".".join("a" * 50_000) + " = 1", "stage." + "a." * 30_000 + "b = 1"
    for text in (deep, wide, other, "x = 1\n" * 100_000, "[stage.a]\nepochs = " + "9" * 5000, "[stage.'']"):
        check_stages(tmp_path / "stages.toml", text.encode(), accepted=False)
    (tmp_path / "stages.toml").unlink()
    os.mkfifo(tmp_path / "stages.toml")
    assert refused(train(tmp_path, "chain"), "stages.toml", code=2)
