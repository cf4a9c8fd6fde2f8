"""The whole program in processes of its own: launched, in two processes, killed, stopped and resumed."""

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, TINY, WIDE, invoke, reset_accelerate
from test_training import same_training

import micronet
from micronet import read_metadata

CHAIN = """
[defaults]
dataset = "synthetic"
train_images = 40
test_images = 50
batch_size = 20
epochs = 6
lr = [[4, 0.02], [6, 0.002]]
width = 0.1
depth = 0.1

[stage.first]
network = "efficientnet_b0"
stochastic_depth = 0.2

[stage.second]
network = "efficientnet_ex"
teacher = "first"
"""

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

    def run(self, capfd: pytest.CaptureFixture[str]) -> tuple[int, str]:
        """Run it to its end from this process, which has torch already; return exit code and what was printed."""
        capfd.readouterr()
        result = invoke(*self.command[2:])
        return result.exit_code, result.output + "".join(capfd.readouterr())

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
                if entry.name.isdigit() and str(self.ckpt) in (entry / "cmdline").read_text():
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


# As CHAIN, with room for a stop on a busy machine.
STORY = CHAIN.replace("epochs = 6", "epochs = 12").replace("[6, 0.002]", "[12, 0.002]")


def test_a_chain_that_is_stopped_and_killed_ends_as_if_it_had_not_been(
    write: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    stages = write(STORY)
    chain = Chain(tmp_path, stages)

    assert invoke("run-stage", "first", "--stages", stages, "--ckpt", chain.ckpt).exit_code == 0
    finished = (chain.ckpt / "first" / "last.safetensors").read_bytes()

    running = chain.start()  # and stop it as Ctrl-C does
    chain.wait_for_epoch("second", 1)
    os.killpg(running.pid, signal.SIGINT)
    os.killpg(running.pid, signal.SIGINT)  # uv run sends it twice
    output, _ = running.communicate(timeout=30)
    chain.wait_for_end(0)
    kept = chain.epochs("second")
    assert running.returncode == 130
    assert output.endswith(f"stage second keeps {kept} of 12 epochs; the same command goes on from there\n")
    assert "Traceback" not in output and "asks for 2 GPUs, this machine has none" in output
    assert 1 <= kept < 12 and read_metadata(chain.ckpt / "second" / "last.safetensors").last.epoch == kept

    running = chain.start()  # and kill the chain alone, without which its stage stops
    chain.wait_for_epoch("second", kept + 1)
    running.kill()
    output, _ = running.communicate(timeout=30)
    chain.wait_for_end(10)
    assert f"goes on after epoch {kept} of 12" in output and kept < chain.epochs("second") < 12

    code, output = chain.run(capfd)
    assert code == 0, output
    assert "stage second: efficientnet_ex" in output and "stage first: " not in output
    assert (chain.ckpt / "first" / "last.safetensors").read_bytes() == finished
    rows = [line.split() for line in output.splitlines() if line.startswith((" first", " second"))]
    assert [row[:3] for row in rows] == [["first", "b0", "-"], ["second", "ex", "first"]]

    straight = tmp_path / "straight"
    shutil.copytree(chain.ckpt / "first", straight / "first")
    assert invoke("run-stage", "second", "--stages", stages, "--ckpt", straight).exit_code == 0
    for file in ("best.safetensors", "last.safetensors"):
        assert same_training(straight / "second" / file, chain.ckpt / "second" / file)

    code, output = chain.run(capfd)  # nothing left to do
    assert code == 0 and "asks for" not in output and " second " in output


def test_two_processes_survive_the_loss_of_one_and_a_stop(
    write: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Two runs, each disturbed at another epoch, end with the same bits (of an undisturbed one: the same, -m long)."""
    stages, config_file = write(STORY), write(TWO_PROCESSES, "two.yaml")
    killed, stopped = (Chain(tmp_path / name, stages, config_file) for name in ("killed", "stopped"))
    for stage in ("first", "second"):  # the teacher for all, and a single process to compare with
        assert invoke("run-stage", stage, "--stages", stages, "--ckpt", tmp_path / "single").exit_code == 0
        reset_accelerate()
    for chain in (killed, stopped):
        shutil.copytree(tmp_path / "single" / "first", chain.ckpt / "first")

    running = killed.start()
    killed.wait_for_epoch("second", 1)
    os.kill(max(killed.processes()), signal.SIGKILL)  # the youngest is a worker
    output, _ = running.communicate(timeout=60)
    killed.wait_for_end(0)
    kept = killed.epochs("second")
    assert running.returncode == 1 and "2 processes" in output and "stage first: " not in output
    assert "error: stage second failed: " in output
    assert output.endswith(f"; stage second keeps {kept} of 12 epochs; the same command goes on from there\n")

    running = stopped.start()
    stopped.wait_for_epoch("second", 5)
    os.killpg(running.pid, signal.SIGINT)
    output, _ = running.communicate(timeout=30)
    stopped.wait_for_end(0)
    later = stopped.epochs("second")
    assert running.returncode == 130 and "Traceback" not in output and later > kept
    assert output.endswith(f"stage second keeps {later} of 12 epochs; the same command goes on from there\n")

    for chain, done in ((killed, kept), (stopped, later)):
        code, output = chain.run(capfd)
        assert code == 0 and f"goes on after epoch {done} of 12" in output, output
    one, two, other = (
        folder / "second" / "last.safetensors" for folder in (tmp_path / "single", killed.ckpt, stopped.ckpt)
    )
    assert same_training(two, other)
    about = read_metadata(two)
    assert about.facts.processes == 2 and len(about.history) == 12
    # The same images and rates as one process, and nearly the same loss: batch norm sees half the batch.
    for ours, theirs in zip(about.history, read_metadata(one).history):
        assert ours.lr == theirs.lr and ours.train_loss == pytest.approx(theirs.train_loss, rel=0.05)


@pytest.mark.long
def test_two_processes_end_as_if_none_had_been_lost(write: Callable[..., Path], tmp_path: Path) -> None:
    stages, config_file = write(CHAIN), write(TWO_PROCESSES, "two.yaml")
    killed, straight = (Chain(tmp_path / name, stages, config_file) for name in ("killed", "straight"))
    running = killed.start()
    killed.wait_for_epoch("second", 2)
    os.kill(max(killed.processes()), signal.SIGKILL)
    assert running.wait(60) == 1
    for chain in (killed, straight):
        output, _ = chain.start().communicate(timeout=120)
        assert read_metadata(chain.ckpt / "second" / "last.safetensors").last.epoch == 6, output
    for stage in ("first", "second"):
        assert same_training(*(chain.ckpt / stage / "last.safetensors" for chain in (killed, straight)))


# When to stop: seconds after the start, or a stage and how many of its epochs are kept.
MOMENTS = [0.5, 2, 4, 6, ("first", 1), ("first", 6), ("second", 1)]


@pytest.mark.long
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_chain_stops_when_told_to(
    signum: int, processes: int, moment: object, write: Callable[..., Path], tmp_path: Path
) -> None:
    """As a terminal does it: the signal goes to the whole group. Within seconds all processes are gone."""
    stages = write(CHAIN.replace("epochs = 6", "epochs = 60").replace("[6, 0.002]", "[60, 0.002]"))
    if moment == ("first", 6):  # between two stages
        stages = write(CHAIN)
    chain = Chain(tmp_path, stages, *([write(TWO_PROCESSES, "two.yaml")] if processes == 2 else []))
    if isinstance(moment, tuple) and moment[0] == "second":
        one = ["run-stage", "first", "--stages", write(CHAIN, "one.toml"), "--ckpt", chain.ckpt]
        assert invoke(*one).exit_code == 0
        chain.command[chain.command.index(str(stages))] = str(
            write(CHAIN.replace("[stage.second]", "[stage.second]\nepochs = 60\nlr = [[60, 0.02]]"))
        )
    running = chain.start()
    if isinstance(moment, tuple):
        chain.wait_for_epoch(*moment)
    else:
        time.sleep(moment)
    os.killpg(running.pid, signum)
    begun = time.monotonic()
    output, _ = running.communicate(timeout=60)
    seconds = time.monotonic() - begun
    chain.wait_for_end(0)
    assert running.returncode == 128 + signum or moment == 0.5 and running.returncode == -signum, output
    assert "Traceback" not in output and seconds < 20
    print(f"{processes} processes, {moment}: {seconds:.1f} s")
    if isinstance(moment, tuple) and moment != ("first", 6):
        stage, _ = moment
        kept = chain.epochs(stage)
        assert output.endswith(f"stage {stage} keeps {kept} of 60 epochs; the same command goes on from there\n")
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


@pytest.mark.parametrize("victim", [pytest.param("chain", marks=pytest.mark.long), "launcher"])
def test_no_process_outlives_who_started_it(victim: str, write: Callable[..., Path], tmp_path: Path) -> None:
    stages = write(CHAIN.replace("epochs = 6", "epochs = 900").replace("[6, 0.002]", "[900, 0.002]"))
    chain = Chain(tmp_path, stages, write(TWO_PROCESSES, "two.yaml"))
    running = chain.start()
    chain.wait_for_epoch("first", 1)
    launcher = running.pid
    if victim == "launcher":
        launcher = int(Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()[0])
        assert "accelerate" in Path(f"/proc/{launcher}/cmdline").read_text()
    os.kill(launcher, signal.SIGKILL)
    output, _ = running.communicate(timeout=30)
    chain.wait_for_end(15)
    kept = chain.epochs("first")
    assert read_metadata(chain.ckpt / "first" / "last.safetensors").last.epoch == kept < 900
    assert victim == "chain" or f"stage first keeps {kept} of 900 epochs" in output


def test_figures_go_to_a_tracker(write: Callable[..., Path], tmp_path: Path) -> None:
    from tensorboardX.proto.event_pb2 import Event

    options = ["--stages", write(TINY), "--ckpt", tmp_path, "--log-with", "tensorboard"]
    assert invoke("run-stage", "first", *options).exit_code == 0
    (file,) = (tmp_path / "first").glob("events.out.tfevents.*")
    content, logged = file.read_bytes(), {}
    while content:  # records: length, its checksum, an event, its checksum
        (length,) = struct.unpack("<Q", content[:8])
        event = Event.FromString(content[12 : 12 + length])
        logged |= {(event.step, value.tag): value.simple_value for value in event.summary.value}
        content = content[16 + length :]
    history = read_metadata(tmp_path / "first" / "last.safetensors").history
    assert len(history) == 3
    for record in history:
        for name, value in record._asdict().items():
            assert logged[record.epoch, name] == pytest.approx(value)


@pytest.mark.parametrize(("tracker", "message"), [
    ("wandb", "--log-with wandb: its package is missing: pip install wandb"),
    ("abacus", '--log-with "abacus": expected one of aim, tensorboard, wandb, '),
])  # fmt: skip
def test_a_tracker_that_is_not_there(tracker: str, message: str, write: Callable[..., Path], tmp_path: Path) -> None:
    result = invoke("run-stage", "first", "--stages", write(TINY), "--ckpt", tmp_path, "--log-with", tracker)
    assert (result.exit_code, result.output.count("\n")) == (2, 1) and result.stderr.startswith(f"error: {message}")
    assert not (tmp_path / "first").exists()


def test_a_failed_stage_ends_the_chain_with_its_error(
    write: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = write(CHAIN.replace('dataset = "synthetic"', 'dataset = "cifar100"').replace("lr =", "scale = 5\nlr ="))
    (tmp_path / "cifar-100-python").mkdir()
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")
    chain = Chain(tmp_path, stages)
    chain.command += ["--data", str(tmp_path)]
    code, output = chain.run(capfd)
    assert code == 3 and "Traceback" not in output and output.count("error: ") == 1
    assert f"error: stage first failed: {tmp_path / 'cifar-100-python'}: no CIFAR-100 here" in output
    assert output.endswith("or name --data\n")  # the same command would not go on


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no such file"),
        ("distributed_type: [", "not a launch configuration"),
        ("- 1", "not a launch configuration"),
        ("distributed_type: 'NO'\nspeed: 3", "unknown keys"),
        ("distributed_type: MULTI_GPU\nnum_processes: 4\nnum_machines: 2", "num_machines = 2: expected 1"),
    ],
)
def test_a_bad_launch_configuration_is_one_line(
    text: str | None, message: str, write: Callable[..., Path], tmp_path: Path
) -> None:
    path = write(text, "config.yaml") if text else tmp_path / "missing.yaml"
    result = invoke("chain", "--stages", write(), "--ckpt", tmp_path, "--config-file", path)
    assert (result.exit_code, result.output.count("\n")) == (2, 1)
    assert result.stderr.startswith(f"error: {path}: ") and message in result.stderr


def test_a_process_has_the_cores_that_the_chain_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")
    for cores, threads in ((64, "64"), (1, "1")):
        monkeypatch.setattr(os, "sched_getaffinity", lambda process, cores=cores: set(range(cores)))
        launch = micronet.plan_launch(ROOT / "accelerate_config.yaml", micronet.new_console(quiet=True))
        assert launch.environment["OMP_NUM_THREADS"] == threads


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, "mixed_precision fp16 needs a GPU"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "3"}, "batch_size = 20: expected a multiple of 3 (1 processes x 3"),
    ],
)
def test_what_cannot_be_honoured_is_refused(
    environment: dict[str, str],
    message: str,
    write: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    result = invoke("run-stage", "first", "--stages", write(), "--ckpt", tmp_path)
    assert result.exit_code == 2 and message in result.stderr and result.output.count("\n") == 1


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


@pytest.mark.parametrize("command", [[], ["run-stage"], ["chain"], ["evaluate"], ["score"]])
def test_help_has_an_example(command: list[str]) -> None:
    result = invoke(*command, "--help")
    assert result.exit_code == 0 and "micronet.py" in result.output.split("Usage:")[1].split("\n", 1)[1]


def test_version() -> None:
    from importlib.metadata import version

    assert invoke("--version").output == f"micronet {version('micronet')}\n"


def test_real_images(cifar100: Path, write: Callable[..., Path], tmp_path: Path) -> None:
    """A stage and its pupil on 1,000 real images: well above the 5 % that chance has in its first five guesses."""
    text = """
    [defaults]
    train_images = 1000
    test_images = 500
    views = ["jitter"]
    batch_size = 20
    epochs = 4
    width = 0.25
    depth = 0.25
    scale = 12
    lr = { schedule = "cosine", peak = 0.005, warmup_epochs = 0.5 }
    [stage.plain]
    network = "efficientnet_b0"
    [stage.refined]
    network = "efficientnet_ex"
    teacher = "plain"
    """
    for stage in ("plain", "refined"):
        result = invoke("run-stage", stage, "--stages", write(text), "--data", cifar100, "--ckpt", tmp_path)
        assert result.exit_code == 0
        assert read_metadata(tmp_path / stage / "best.safetensors").last.top5 > 9
    paths = [tmp_path / stage / "best.safetensors" for stage in ("plain", "refined")]
    results = json.loads(invoke("evaluate", *paths, "--data", cifar100, "--json").stdout)
    assert [r["top1"] for r in results] == [read_metadata(path).best.top1 for path in paths]


@pytest.mark.long  # a minute, for a script that only a GPU's user needs
def test_a_slot_of_time_ends_in_time_and_leaves_what_goes_on(write: Callable[..., Path], tmp_path: Path) -> None:
    stages = write(CHAIN.replace("epochs = 6", "epochs = 900").replace("[6, 0.002]", "[900, 0.002]"))
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
