"""Several machines, as two launches that share nothing, or as two network namespaces with a cable between them."""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import ROOT, invoke, refused
from test_program import TWO_PROCESSES, Chain, of_epochs
from test_training import same_training

import micronet

CLUSTER = TWO_PROCESSES.replace("machines: 1", "machines: {machines}").replace("port: 0", "port: {port}")
CLUSTER += "main_process_ip: {address}\n"
STORY = of_epochs(5).replace("[stage.first]", "[stage.first]\nepochs = 1")


class Machine(Chain):
    """A machine's own clone, stages and checkpoints, and the chain that runs on it."""

    def __init__(self, folder: Path, rank: int, port: int, address: str = "127.0.0.1", timeout: int = 60) -> None:
        folder.mkdir(exist_ok=True)
        shutil.copy(ROOT / "micronet.py", folder)
        self.stages, config = folder / "stages.toml", folder / "cluster.yaml"
        self.stages.write_text(STORY)
        config.write_text(CLUSTER.format(machines=2, address=address, port=port))
        super().__init__(folder, self.stages, config)
        self.command[1] = str(folder / "micronet.py")
        self.command += ["--machine-rank", str(rank), "--timeout", str(timeout)]

    def kill_a_worker(self) -> None:
        os.kill(max(self.processes()), signal.SIGKILL)  # the youngest


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture
def machines(tmp_path: Path) -> list[Machine]:
    port = free_port()
    return [Machine(tmp_path / name, rank, port) for rank, name in enumerate(("main", "second"))]


def started(machines: list[Machine]) -> list[subprocess.Popen[str]]:
    return [machine.start() for machine in machines]


def ended(running: list[subprocess.Popen[str]]) -> tuple[list[int], list[str]]:
    """Wait for chains; return their exit codes and what they printed."""
    outputs = [each.communicate(timeout=300)[0] for each in running]
    return [each.returncode for each in running], outputs


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoints of the chain as two processes of one machine train it."""
    machine = Machine(tmp_path_factory.mktemp("one") / "machine", 0, 0)
    (machine.ckpt.parent / "cluster.yaml").write_text(TWO_PROCESSES)
    code, output = ended([machine.start()])
    assert code == [0], output
    return machine.ckpt


def same_chain(ckpt: Path, other: Path) -> bool:
    files = [f"{stage}/{file}.safetensors" for stage in ("first", "second") for file in ("best", "last")]
    return all(same_training(ckpt / file, other / file) for file in files)


def test_machines_that_share_nothing_lose_one_and_go_on(machines: list[Machine], undisturbed: Path) -> None:
    """The second has an older copy of a stage, which changes nothing, and keeps nothing of its own."""
    main, second = machines
    assert invoke("run-stage", "first", "--stages", second.stages, "--ckpt", second.ckpt, "--seed", 1).exit_code == 0
    stale = {path: path.read_bytes() for path in second.ckpt.rglob("*") if path.is_file()}

    running = started(machines)
    main.wait_for_epoch("second", 1)
    second.kill_a_worker()
    codes, (said, told) = ended(running)
    kept = main.epochs("second")
    assert codes == [1, 1] and "Traceback" not in said + told
    assert f"another process is gone; stage second keeps {kept} of 5 epochs; the same command goes on" in said
    log = second.ckpt / "error.log"
    assert told.endswith(f"error: a process was killed (SIGKILL), perhaps for want of memory (all of it in {log})\n")
    log.unlink()

    codes, (said, told) = ended(started(machines))
    assert codes == [0, 0], said + told
    assert f"goes on after epoch {kept} of 5" in said and "2 processes" in said and "epoch" not in told
    assert "what is trained shows, and is kept, on machine 0" in told
    assert same_chain(main.ckpt, undisturbed)
    assert stale == {path: path.read_bytes() for path in second.ckpt.rglob("*") if path.is_file()}

    codes, (said, told) = ended(started(machines))  # nothing left to do, which the second learns of the first
    assert codes == [0, 0] and "stage second is finished: " in said
    main.command[-1] = "1"
    codes, (said,) = ended([main.start()])  # alone it can tell nobody
    assert codes == [1] and "not all machines came" in said and "Traceback" not in said


@pytest.mark.parametrize(("change", "code", "told"), [
    (lambda second: second.stages.write_text(STORY.replace("0.02", "0.03")), 2,
     "another stage first than on machine 0"),
    (lambda second: second.stages.write_text("["), 2, "stages.toml"),
    pytest.param(lambda second: (second.ckpt.parent / "micronet.py").open("a").write("#"), 2,
                 "another micronet.py than on machine 0", marks=pytest.mark.long),
])  # fmt: skip
def test_a_machine_that_is_not_like_the_first_ends_all(
    change: Callable[[Machine], object], code: int, told: str, machines: list[Machine]
) -> None:
    """At once, with the same error and exit code."""
    change(machines[1])
    codes, outputs = ended(started(machines))
    assert codes == [code, code], outputs
    for output in outputs:
        assert f"machine 1 ({os.uname().nodename}): " in output and told in output and "Traceback" not in output
    assert not list(machines[1].ckpt.rglob("*.safetensors")) and not list(machines[0].ckpt.rglob("*.safetensors"))


@pytest.mark.parametrize(("lines", "machine", "told"), [
    ("num_processes: 3", {}, "expected a main_process_port, and num_processes a multiple of 2"),
    ("main_process_port: 0", {}, "expected a main_process_port, and num_processes a multiple of 2"),
    ("main_process_ip: null", {}, "--main-process-ip: is missing"),
    ("", {"rank": 2}, "--machine-rank 2: .*cluster.yaml has num_machines = 2"),
    ("num_machines: 1", {"rank": 1}, "--machine-rank 1: .*cluster.yaml has num_machines = 1"),
    ("use_cpu: false\ndistributed_type: MULTI_GPU", {}, "cluster.yaml asks for 1 GPU, this machine has 0"),
])  # fmt: skip
def test_a_launch_on_several_machines_adapts_to_nothing(
    lines: str, machine: dict[str, int], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    config = CLUSTER.format(machines=2, address="10.0.0.1", port=29500)
    for line in lines.splitlines():
        key = line.partition(":")[0]
        config = "\n".join(line if each.startswith(f"{key}:") else each for each in config.splitlines())
    (tmp_path / "cluster.yaml").write_text(config)
    with pytest.raises(micronet.Misconfigured, match=told):
        micronet.plan_launch(tmp_path / "cluster.yaml", micronet.new_console(quiet=True), micronet.Machine(**machine))


def test_the_launch_of_one_of_several_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the processes run here, on all cores that are; what the command line says goes before the file."""
    monkeypatch.setattr(micronet, "usable_cores", lambda: 6)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    path = tmp_path / "cluster.yaml"
    path.write_text(CLUSTER.format(machines=2, address="10.0.0.1", port=29500))
    launch = micronet.plan_launch(path, micronet.new_console(quiet=True), micronet.Machine(1, "10.0.0.2", 7.5))
    wanted = "--main_process_ip 10.0.0.2 --machine_rank 1 --rdzv_conf timeout=8 --multi_gpu"
    assert launch.command[-7:] == wanted.split() and launch.environment["OMP_NUM_THREADS"] == "6"


@pytest.mark.parametrize(("config", "environment", "rank"), [
    (2, {"SLURM_NODEID": "1"}, 1), (1, {"SLURM_NODEID": "1"}, None), (2, {}, None),
])  # fmt: skip
def test_slurm_tells_which_of_several_machines_this_is(
    config: int, environment: dict[str, str], rank: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there are several; a chain on one machine is not told by it."""
    joined: list[tuple[object, ...]] = []
    monkeypatch.setattr(micronet, "plan_launch", lambda config, console, machine: machine)
    monkeypatch.setattr(micronet, "join_chain", lambda *args: joined.append(args))
    monkeypatch.setattr(micronet, "launch_stage", lambda *args: None)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "cluster.yaml").write_text(CLUSTER.format(machines=config, address="10.0.0.1", port=29500))
    (tmp_path / "stages.toml").write_text(STORY)
    where = ("--stages", tmp_path / "stages.toml", "--ckpt", tmp_path / "ckpt")
    assert invoke("chain", *where, "--config-file", tmp_path / "cluster.yaml").exit_code == 0
    assert [args[0].rank for args in joined] == ([] if rank is None else [rank])


def test_other_images_on_another_machine_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a stage that has none to compare with yet."""

    def with_another(values: list[tuple[str, object]]) -> list[tuple[str, object]]:
        _, found = values[0]
        if isinstance(found, dict) and any(name.startswith("content of ") for name in found):
            return [*values, ("machine 1 (other)", {name: {"train": "0"} for name in found})]
        return values

    monkeypatch.setattr("accelerate.utils.gather_object", with_another)
    (tmp_path / "stages.toml").write_text(STORY)
    result = invoke("run-stage", "first", "--stages", tmp_path / "stages.toml", "--ckpt", tmp_path)
    assert refused(result, "machine 1 (other): another content of synthetic than on machine 0")


def test_what_fails_on_one_machine_is_raised_with_its_name_on_all(monkeypatch: pytest.MonkeyPatch) -> None:
    failure = micronet.Refused("data/cifar: missing")
    monkeypatch.setattr("accelerate.utils.gather_object", lambda values: [*values, ("machine 1 (b)", failure)])
    with pytest.raises(micronet.Refused, match=r"machine 1 \(b\): data/cifar: missing"):
        micronet.together(lambda: None)
    monkeypatch.setattr("accelerate.utils.gather_object", lambda values: values)
    with pytest.raises(micronet.Unwritable, match=r"^x: No space"):  # of one machine alone, which needs no name
        micronet.together(lambda: (_ for _ in ()).throw(OSError(28, "No space left on device", "x")))


@pytest.mark.long
@pytest.mark.parametrize("rank", [0, 1])
def test_a_machine_that_never_comes_ends_the_other_in_time(rank: int, machines: list[Machine]) -> None:
    machines[rank].command[-1] = "5"
    codes, (output,) = ended([machines[rank].start()])
    assert codes == [1] and "not all machines came" in output and "Traceback" not in output


@pytest.mark.long
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("how", ["kill a worker", "kill all", "SIGINT", "SIGTERM"])
def test_the_loss_or_stop_of_a_machine_ends_the_other_in_seconds(
    how: str, rank: int, machines: list[Machine], undisturbed: Path
) -> None:
    """Both go on afterwards, and end with the bits of a chain that nobody disturbed."""
    running = started(machines)
    machines[0].wait_for_epoch("second", 2)
    begun = time.monotonic()
    if how == "kill a worker":
        machines[rank].kill_a_worker()
    elif how == "kill all":
        for process in machines[rank].processes():
            os.kill(process, signal.SIGKILL)
    else:
        os.kill(running[rank].pid, signal.Signals[how])
    codes, outputs = ended(running)
    seconds, kept = time.monotonic() - begun, machines[0].epochs("second")
    lost, other = (codes[rank], outputs[rank]), (codes[1 - rank], outputs[1 - rank])
    assert other[0] == 1 and f"another process is gone; stage second keeps {kept} of 5 epochs" in other[1], other
    assert lost[0] == {"SIGINT": 130, "SIGTERM": 143, "kill all": -9}.get(how, 1), lost
    assert seconds < 60 and "Traceback" not in other[1]
    print(f"{how} on machine {rank}: {seconds:.1f} s")
    codes, outputs = ended(started(machines))
    assert codes == [0, 0] and same_chain(machines[0].ckpt, undisturbed), outputs


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


@pytest.fixture
def cable() -> Iterator[list[str]]:
    """Two network namespaces with a cable between them, by name."""
    names = [f"micronet-{os.getpid()}-{n}" for n in range(2)]
    try:
        for name in names:
            ip("netns", "add", name)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs root and iproute2")
    try:
        ip("link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1])
        for n, name in enumerate(names):
            ip("-n", name, "addr", "add", f"10.77.0.{n + 1}/24", "dev", "cable")
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", "cable", "up")
        yield names
    finally:
        for name in names:
            ip("netns", "delete", name)


@pytest.mark.long
@pytest.mark.parametrize("comes_back", [False, True])
def test_a_cable_that_is_cut(comes_back: bool, cable: list[str], tmp_path: Path, undisturbed: Path) -> None:
    """Both end within --timeout, unless it is mended in time; then nobody has noticed."""
    machines = [Machine(tmp_path / name, rank, 29500, "10.77.0.1", 20) for rank, name in enumerate(cable)]
    for machine, name in zip(machines, cable):
        machine.command = ["ip", "netns", "exec", name, "env", "GLOO_SOCKET_IFNAME=cable", *machine.command]
    running = started(machines)
    machines[0].wait_for_epoch("second", 2)
    ip("-n", cable[0], "link", "set", "cable", "down")
    begun = time.monotonic()
    if comes_back:
        time.sleep(5)
        ip("-n", cable[0], "link", "set", "cable", "up")
    codes, outputs = ended(running)
    print(f"{comes_back}: {time.monotonic() - begun:.1f} s", codes, [output[-400:] for output in outputs])
    if comes_back:
        assert codes == [0, 0], outputs
    else:
        kept = machines[0].epochs("second")
        assert codes == [1, 1] and all(f"stage second keeps {kept} of 5 epochs" in each for each in outputs), outputs
        ip("-n", cable[0], "link", "set", "cable", "up")
        assert ended(started(machines))[0] == [0, 0]
    assert same_chain(machines[0].ckpt, undisturbed)
