"""The whole program in processes of its own: launched, in two processes, killed, stopped and resumed."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from conftest import ROOT, TINY, WIDE, invoke, refused
from test_training import same_training

import micronet
from micronet import read_metadata


def of_epochs(last: int) -> str:
    """Return a stages file whose stages have so many epochs."""
    return TINY.replace("epochs = 3", f"epochs = {last}").replace("[[2, 0.02], [3,", f"[[4, 0.02], [{last},")


CHAIN = of_epochs(6)
STORY = of_epochs(12).replace("[stage.first]", "[stage.first]\nepochs = 1")  # with room for a stop on a busy machine
STORY = STORY.replace("[defaults]", '[defaults]\nviews = ["jitter"]')

TWO_PROCESSES = """
compute_environment: LOCAL_MACHINE
distributed_type: MULTI_CPU
mixed_precision: "no"
use_cpu: true
num_machines: 1
num_processes: 2
main_process_port: 0
"""


class Chain:
    """A chain in a folder, which can be started, watched, killed and started again."""

    def __init__(self, folder: Path, stages: Path, config_file: Path = ROOT / "accelerate_config.yaml") -> None:
        self.ckpt = folder / "ckpt"
        self.command = [sys.executable, str(ROOT / "micronet.py"), "chain", "--stages", str(stages)]
        self.command += ["--ckpt", str(self.ckpt), "--config-file", str(config_file)]

    def start(self) -> subprocess.Popen[str]:
        pipes = dict(stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        heard = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731  also under nohup
        return subprocess.Popen(self.command, text=True, start_new_session=True, env=WIDE, preexec_fn=heard, **pipes)

    def run(self, capfd: pytest.CaptureFixture[str], disturb: Callable[[], object] = lambda: None) -> tuple[int, str]:
        """Run it from this process, which has torch already; return exit code and what the stages and it printed.

        `disturb` runs beside it.
        """
        capfd.readouterr()
        beside = threading.Thread(target=disturb)
        beside.start()
        result = invoke(*self.command[2:])
        beside.join()
        return result.exit_code, "".join(capfd.readouterr()) + result.output

    def wait_for_epoch(self, stage: str, epoch: int) -> None:
        log, deadline = self.ckpt / stage / "log.jsonl", time.monotonic() + 120
        while not log.exists() or len(log.read_text().splitlines()) < epoch:
            assert time.monotonic() < deadline, f"{stage} did not reach epoch {epoch}"
            time.sleep(0.02)

    def processes(self) -> list[int]:
        """Return everything that has this chain's folder in its command line."""
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and str(self.ckpt) in (entry / "cmdline").read_text(errors="replace"):
                    found.append(int(entry.name))
            except OSError:  # it has ended
                pass
        return found

    def wait_for_end(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while self.processes():
            assert time.monotonic() < deadline, f"{self.processes()} did not end"
            time.sleep(0.05)

    def epochs(self, stage: str) -> int:
        return len((self.ckpt / stage / "log.jsonl").read_text().splitlines())


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both stages of STORY in one process, which nobody disturbed."""
    folder = tmp_path_factory.mktemp("straight")
    (folder / "stages.toml").write_text(STORY)
    for stage in ("first", "second"):
        assert invoke("run-stage", stage, "--stages", folder / "stages.toml", "--ckpt", folder).exit_code == 0
    return folder


def test_a_chain_that_is_stopped_and_killed_ends_as_if_it_had_not_been(
    straight: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    chain = Chain(tmp_path, straight / "stages.toml")
    shutil.copytree(straight / "first", chain.ckpt / "first")

    def stop() -> None:
        chain.wait_for_epoch("second", 1)
        for _ in range(2):  # as `uv run` hands on a Ctrl-C
            os.kill(os.getpid(), signal.SIGINT)

    code, output = chain.run(capfd, stop)
    chain.wait_for_end(0)
    kept = chain.epochs("second")
    assert code == 130 and "Traceback" not in output
    assert output.endswith(f"stage second keeps {kept} of 12 epochs; the same command goes on from there\n")
    assert 1 <= kept < 12 and read_metadata(chain.ckpt / "second" / "last.safetensors").last.epoch == kept

    running = chain.start()  # and kill the chain alone, without which its stage stops
    chain.wait_for_epoch("second", kept + 1)
    family = {process: os.getpgid(process) for process in chain.processes()}
    running.kill()
    assert [*family.values()].count(running.pid) == 1 and family[running.pid] == running.pid  # a Ctrl-C is for it alone
    output, _ = running.communicate(timeout=30)
    chain.wait_for_end(10)
    assert f"goes on after epoch {kept} of 12" in output and kept < chain.epochs("second") < 12

    code, output = chain.run(capfd)
    assert code == 0, output
    assert "stage second: efficientnet_ex" in output and "stage first: " not in output
    rows = [line.split() for line in output.splitlines() if line.startswith((" first", " second"))]
    assert [row[:3] for row in rows] == [["first", "b0", "-"], ["second", "ex", "first"]]
    for stage in ("first", "second"):
        for file in ("best.safetensors", "last.safetensors"):
            assert same_training(straight / stage / file, chain.ckpt / stage / file)

    code, output = chain.run(capfd)  # nothing left to do
    assert code == 0 and "asks for" not in output and " second " in output


def test_two_processes_survive_the_loss_of_one_and_a_stop(
    straight: Path, write: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Every epoch until the stop has the very figures of a run that nobody disturbed."""
    config_file = write(TWO_PROCESSES, "two.yaml")
    chain, other = (Chain(tmp_path / name, straight / "stages.toml", config_file) for name in ("one", "other"))
    for each in (chain, other):
        shutil.copytree(straight / "first", each.ckpt / "first")

    def lose_one() -> None:
        chain.wait_for_epoch("second", 1)
        os.kill(max(chain.processes()), signal.SIGKILL)  # the youngest is a worker

    code, output = chain.run(capfd, lose_one)
    chain.wait_for_end(0)
    kept = chain.epochs("second")
    assert code == 1 and "2 processes" in output and "stage first: " not in output
    assert "error: stage second failed: " in output
    assert output.endswith(f"; stage second keeps {kept} of 12 epochs; the same command goes on from there\n")

    def stop() -> None:
        chain.wait_for_epoch("second", kept + 2)
        os.kill(os.getpid(), signal.SIGINT)

    code, output = chain.run(capfd, stop)
    chain.wait_for_end(0)
    later = chain.epochs("second")
    assert code == 130 and "Traceback" not in output and f"goes on after epoch {kept} of 12" in output
    assert output.endswith(f"stage second keeps {later} of 12 epochs; the same command goes on from there\n")

    code, output = other.run(capfd)
    assert code == 0, output
    lasts = [folder / "second" / "last.safetensors" for folder in (chain.ckpt, other.ckpt, straight)]
    disturbed, two, one = map(read_metadata, lasts)
    assert two.facts.processes == 2 and len(two.history) == 12 and kept + 2 <= later
    assert [record[:-2] for record in disturbed.history] == [record[:-2] for record in two.history[:later]]
    # The same images and rates as one process, and nearly the same loss: batch norm sees half the batch.
    for ours, theirs in zip(two.history, one.history):
        assert ours.lr == theirs.lr and ours.train_loss == pytest.approx(theirs.train_loss, rel=0.05)


def test_no_process_outlives_the_launcher_that_started_it(
    write: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    chain = Chain(tmp_path, write(of_epochs(900)))

    def kill_the_launcher() -> None:
        chain.wait_for_epoch("first", 1)
        launcher = min(chain.processes())
        assert "accelerate" in Path(f"/proc/{launcher}/cmdline").read_text()
        os.kill(launcher, signal.SIGKILL)

    code, output = chain.run(capfd, kill_the_launcher)
    chain.wait_for_end(15)
    kept = chain.epochs("first")
    assert read_metadata(chain.ckpt / "first" / "last.safetensors").last.epoch == kept < 900
    assert code == 1 and f"stage first keeps {kept} of 900 epochs" in output


@pytest.mark.long
@pytest.mark.parametrize("moment", [0.5, 2, 4, 6, None])  # seconds after the start, or once an epoch is kept
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_chain_stops_when_told_to(
    signum: int, processes: int, moment: float | None, write: Callable[..., Path], tmp_path: Path
) -> None:
    """As a terminal does it: the signal goes to the whole group. Within seconds all processes are gone."""
    chain = Chain(tmp_path, write(of_epochs(60)), *([write(TWO_PROCESSES, "two.yaml")] if processes == 2 else []))
    running = chain.start()
    if moment:
        time.sleep(moment)
    else:
        chain.wait_for_epoch("first", 1)
    os.killpg(running.pid, signum)
    begun = time.monotonic()
    output, _ = running.communicate(timeout=60)
    seconds = time.monotonic() - begun
    chain.wait_for_end(0)
    assert running.returncode == 128 + signum, output
    assert "Traceback" not in output and seconds < 20
    print(f"{processes} processes, {moment}: {seconds:.1f} s")
    if not moment:
        kept = chain.epochs("first")
        assert output.endswith(f"stage first keeps {kept} of 60 epochs; the same command goes on from there\n")
        assert f"{kept}/60" in output and "stopped" in output  # the table


def test_a_stop_between_two_stages_starts_no_other(
    write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, launched = micronet.launch_stage, []

    def launch(launch: object, stage: micronet.Stage, *rest: object) -> None:
        if launched:
            monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("started"))
            real(launch, stage, *rest)
        launched.append(stage.name)
        os.kill(os.getpid(), signal.SIGTERM)  # as the first stage ends

    monkeypatch.setattr(micronet, "launch_stage", launch)
    result = invoke("chain", "--stages", write(CHAIN), "--ckpt", tmp_path)
    assert result.exit_code == 143 and launched == ["first"]
    assert result.stderr == "stage second keeps 0 of 6 epochs; the same command goes on from there\n"


def test_figures_go_to_a_tracker(write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, logged = Accelerator.log, {}

    def log(self: Accelerator, values: dict[str, float], step: int) -> None:
        logged[step] = values
        real(self, values, step)

    monkeypatch.setattr(Accelerator, "log", log)
    options = ["--stages", write(), "--ckpt", tmp_path, "--log-with", "tensorboard"]
    assert invoke("run-stage", "first", *options).exit_code == 0
    (file,) = (tmp_path / "first").glob("events.out.tfevents.*")
    assert b"images_per_second" in file.read_bytes() and len(logged) == 3
    history = read_metadata(tmp_path / "first" / "last.safetensors").history
    assert logged == {record.epoch: record._asdict() for record in history}


def test_a_failed_stage_ends_the_chain_with_its_error(
    write: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = write(CHAIN.replace('dataset = "synthetic"', 'dataset = "cifar100"').replace("lr =", "scale = 5\nlr ="))
    (tmp_path / "cifar-100-python").mkdir()
    (tmp_path / "cifar-100-python" / "train").write_text("not CIFAR-100")
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # no download
    monkeypatch.setenv("no_proxy", "")
    chain = Chain(tmp_path, stages)
    chain.command += ["--data", str(tmp_path)]
    code, output = chain.run(capfd)
    assert code == 3 and "Traceback" not in output and output.count("error: ") == 1
    assert "\ndownloading CIFAR100, 170 MB, from https://" in output
    assert f"error: stage first failed: {tmp_path / 'cifar-100-python'}: no CIFAR100 here" in output
    assert "(train is damaged, test is missing, meta is missing), and the download failed" in output
    assert output.endswith("or name --data\n")  # the same command would not go on


def test_a_missing_launch_configuration_is_one_line(write: Callable[..., Path], tmp_path: Path) -> None:
    result = invoke("chain", "--stages", write(), "--ckpt", tmp_path, "--config-file", path := tmp_path / "none.yaml")
    assert refused(result, f"error: {path}: No such file")


CPU_ENVIRONMENT = {"OMP_NUM_THREADS", "GOMP_SPINCOUNT", "GLIBC_TUNABLES"}
ON_THE_CPU = "--cpu --num_processes 1 --mixed_precision no --dynamo_backend no"


@pytest.mark.parametrize(("use_cpu", "gpus", "cores", "added", "threads", "said"), [
    (False, 0, 64, ON_THE_CPU, "64", "none: training on the CPU in fp32, with the same batch size"),
    (False, 0, 1, ON_THE_CPU, "1", "none: training on the CPU in fp32, with the same batch size"),
    (False, 1, 64, "--num_processes 1", None, "1: training on 1, with the same batch size"),
    (False, 2, 64, "", None, None), (False, 3, 64, "", None, None),
    (True, 0, 64, "--multi_gpu", "32", None), (True, 3, 1, "--multi_gpu", "1", None),
])  # fmt: skip
def test_a_launch_is_as_near_to_its_configuration_as_the_machine_allows(
    use_cpu: bool, gpus: int, cores: int, added: str, threads: str | None, said: str | None,
    write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Two processes, of which each has its share of the cores that this one may use, unless the user says otherwise."""
    path = write(TWO_PROCESSES, "two.yaml") if use_cpu else ROOT / "accelerate_config.yaml"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(micronet, "usable_cores", lambda: cores)
    console = micronet.Screen(file=io.StringIO(), width=300)
    for name in CPU_ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    launch = micronet.plan_launch(path, console)
    start = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(path)]
    assert launch.command == start + added.split() and launch.environment.get("OMP_NUM_THREADS") == threads
    assert launch.environment.get("ACCELERATE_USE_CPU") == ("1" if use_cpu else None)
    assert console.file.getvalue() == (f"{path} asks for 2 GPUs, this machine has {said}\n" if said else "")
    assert launch.environment.keys() & CPU_ENVIRONMENT == (CPU_ENVIRONMENT if threads else set())
    for name in CPU_ENVIRONMENT:
        monkeypatch.setenv(name, "3")
        assert micronet.plan_launch(path, console).environment[name] == "3"


@pytest.mark.parametrize(("environment", "options", "message"), [
    ({"ACCELERATE_MIXED_PRECISION": "fp16"}, [], "mixed_precision fp16 needs a GPU"),
    ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "3"}, [], "batch_size = 20: expected a multiple of 3 (1 processes x 3"),
    ({}, ["--log-with", "wandb"], "--log-with wandb: its package is missing: pip install wandb"),
    ({}, ["--log-with", "abacus"], '--log-with "abacus": expected one of aim, tensorboard, wandb, '),
])  # fmt: skip
def test_what_cannot_be_honoured_is_refused(
    environment: dict[str, str], options: list[str], message: str, write: Callable[..., Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert refused(invoke("run-stage", "first", "--stages", write(), "--ckpt", tmp_path, *options), message)
    assert not (tmp_path / "first" / "last.safetensors").exists()


def test_a_stages_file_that_changes_under_way_ends_the_chain(
    write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the stage that it changes, and not after."""
    path, launched = write(CHAIN), []

    def launch_and_change(launch: object, stage: micronet.Stage, *rest: object) -> None:
        launched.append(stage.name)
        path.write_text(CHAIN.replace('teacher = "first"', ""))

    monkeypatch.setattr(micronet, "launch_stage", launch_and_change)
    result = invoke("chain", "--stages", path, "--ckpt", tmp_path)
    assert result.exit_code == 2 and launched == ["first"]
    assert result.stderr == f"error: {path}: stage second has changed since this chain began: start it again\n"


def test_a_dry_run_shows_the_order_and_starts_nothing(tmp_path: Path) -> None:
    result = invoke("chain", "exx", "--stages", ROOT / "stages.toml", "--ckpt", tmp_path / "ckpt", "--dry-run")
    names = [line.split()[0] for line in result.output.splitlines() if "train" in line]
    assert result.exit_code == 0 and names == ["b3", "b3_refined", "b0", "exx"]
    assert not (tmp_path / "ckpt").exists()


@pytest.mark.parametrize("command", ["", *"run-stage chain show bench evaluate predict score export import".split()])
def test_help_has_an_example(command: str) -> None:
    result = invoke(*command.split(), "--help")
    assert result.output == invoke(*command.split(), "-h").output
    assert result.exit_code == 0 and "micronet.py" in result.output.split("Usage:")[1].split("\n", 1)[1]


def test_version() -> None:
    from importlib.metadata import version

    assert invoke("--version").output == f"micronet {version('micronet')}\n"


@pytest.mark.long  # a minute, for a script that only a GPU's user needs
def test_a_slot_of_time_ends_in_time_and_leaves_what_goes_on(write: Callable[..., Path], tmp_path: Path) -> None:
    stages = write(of_epochs(900))
    environment = WIDE | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    kept, seconds = 0, 18
    for n in (1, 2):
        ckpt, out = tmp_path / str(n) / "ckpt", tmp_path / f"out{n}"
        while not (ckpt / "first" / "log.jsonl").exists() or n == 2 and not out.exists():
            command = [ROOT / "benchmarks" / "slot.sh", stages, ckpt, out, str(seconds), "first"]
            result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
            assert result.returncode == 124, result.stdout + result.stderr
            seconds *= 2  # a busy machine does not come to an epoch in that time
        assert (f"goes on after epoch {kept} of 900" in result.stdout) == (n == 2)
        kept = json.loads((out / "show.json").read_text())[0]["epoch"]
        assert kept > 0 and f"stage first keeps {kept} of 900 epochs" in result.stdout
        assert read_metadata(out / "first.safetensors").exported.file == "best.safetensors"
        (tmp_path / "2").mkdir(exist_ok=True)
        parts = b"".join(part.read_bytes() for part in sorted(out.glob("state.part*")))
        subprocess.run(["tar", "x", "-C", tmp_path / "2"], input=parts, check=True)


def test_keys_set_on_the_command_line_are_checked_remembered_and_passed_on(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["--stages", trained / "stages.toml", "--ckpt", tmp_path / "ckpt"]
    sets = ["--set", "momentum=0.5", "--set", "lr = [[3, 0.01]]", "--seed", "7"]
    assert invoke("run-stage", "first", *given, *sets).exit_code == 0
    stage = read_metadata(tmp_path / "ckpt" / "first" / "last.safetensors").stage
    assert (stage.momentum, stage.lr, stage.seed, stage.epochs) == (0.5, ((3, 0.01),), 7, 3)
    assert refused(invoke("chain", *given, "--dry-run"), "momentum was 0.5 and is 0.9")
    assert "nothing" in invoke("chain", "first", *given, *sets, "--dry-run").stdout
    launched = []
    monkeypatch.setattr(micronet, "plan_launch", lambda *_: None)
    monkeypatch.setattr(micronet, "launch_stage", lambda launch, stage, options, *_: launched.append((stage, options)))
    assert invoke("chain", *given, *sets).exit_code == 0
    ((stage, options),) = launched  # the first is done
    assert (stage.name, stage.momentum, stage.seed) == ("second", 0.5, 7)
    assert {"--set=momentum=0.5", "--set=lr = [[3, 0.01]]", "--seed=7"} <= set(options) and "--restart" not in options


@pytest.mark.parametrize(("pair", "message"), [
    ("epochs=0", "--set: epochs = 0: expected a whole number from 1"), ("epoch=1", '--set: "epoch": unknown key'),
    ("network=ex", "--set \"network=ex\": expected KEY=VALUE as in a stages file, such as epochs=9 or 'network=\"ex\"'"),
    ("epochs", "not valid TOML"), ("x=" + "[" * 9999, "not valid TOML"), ("lr.peak=1", '--set: lr = {"peak": 1}: expected'),
])  # fmt: skip
@pytest.mark.parametrize("command", ["chain", "run-stage first"])
def test_a_mistaken_key_on_the_command_line_is_one_line(command: str, pair: str, message: str, trained: Path) -> None:
    assert refused(invoke(*command.split(), "--stages", trained / "stages.toml", "--set", pair), message)


def test_a_networks_name_needs_no_family() -> None:
    short, full = (json.loads(invoke("score", name, "--json").stdout) for name in ("ex", "efficientnet_ex"))
    assert short == full and short[0]["name"] == "efficientnet_ex"


def test_a_stages_folder_stands_for_its_best_network(trained: Path, tmp_path: Path, write: Callable[..., Path]) -> None:
    folder, data = trained / "ckpt" / "first", ["--data", tmp_path]
    for command in ("evaluate", "score"):
        shown = [json.loads(invoke(command, path, "--json").stdout) for path in (folder, folder / "best.safetensors")]
        for each in (result for results in shown for result in results):
            each.pop("checkpoint", None), each.pop("name", None)
        assert shown[0] == shown[1]
    assert invoke("export", folder, out := tmp_path / "x.safetensors", *data).exit_code == 0
    assert read_metadata(out).exported.file == "best.safetensors" and read_metadata(folder).stage.name == "first"
    stages = write(TINY.replace('teacher = "first"', f'teacher = "{folder}"'))
    assert invoke("run-stage", "second", "--stages", stages, "--ckpt", tmp_path / "ckpt").exit_code == 0
    taught = read_metadata(tmp_path / "ckpt" / "second").teacher
    assert taught.identity == ("first", read_metadata(folder).tensors)


def test_a_chain_trains_named_stages_anew(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(trained / "ckpt", tmp_path / "ckpt")
    chain = Chain(tmp_path, trained / "stages.toml")
    chain.command += ["second", "--restart", "--set", "momentum=0.8"]  # which it has not been trained with
    assert invoke(*chain.command[2:], "--dry-run").exit_code == 2  # its teacher neither, and that is not named
    chain.command[-2:] = []
    lines = [line.split() for line in invoke(*chain.command[2:], "--dry-run").stdout.splitlines()]
    assert ["first", "b0", "-", "nothing", "3/3"] in lines and ["second", "ex", "first", "train", "0/3"] in lines
    before = (tmp_path / "ckpt" / "first" / "last.safetensors").stat()
    monkeypatch.setattr(micronet, "plan_launch", lambda *_: None)
    run = lambda _, stage, options, *rest: invoke("run-stage", stage.name, *options)  # noqa: E731
    monkeypatch.setattr(micronet, "launch_stage", run)
    code, output = chain.run(capfd)
    assert code == 0 and f"{tmp_path / 'ckpt' / 'second'} is now {tmp_path / 'ckpt' / 'second.old1'}" in output
    assert (tmp_path / "ckpt" / "first" / "last.safetensors").stat() == before
    old, new = (read_metadata(tmp_path / "ckpt" / name) for name in ("second.old1", "second"))
    assert old.tensors == new.tensors and old.header != new.header  # another run, the same bits


def test_a_restart_that_is_stopped_goes_on_without_it(trained: Path, tmp_path: Path) -> None:
    """Once what was kept is out of the way, and not before."""
    shutil.copytree(trained / "ckpt", tmp_path / "ckpt")
    given = ["first", "second", "--stages", trained / "stages.toml", "--ckpt", tmp_path / "ckpt", "--restart"]
    for config, aside in (("none.yaml", False), (ROOT / "accelerate_config.yaml", True)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(subprocess, "Popen", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM) or 1 / 0)
            if not aside:
                assert invoke("chain", *given, "--config-file", config).exit_code == 2
            else:
                with pytest.raises(ZeroDivisionError):  # the first signal is but noted
                    invoke("chain", *given, "--config-file", config)
        assert [(tmp_path / "ckpt" / f"{name}.old1").exists() for name in ("first", "second")] == [aside, aside]
    stage = micronet.load_stages(trained / "stages.toml")["first"]
    with micronet.StopRequest() as stop:
        stop.anew = True
        assert "the same command without --restart goes on from there" in str(stop.stopped(stage, 1))
