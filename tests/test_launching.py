"""What lies between a chain and the processes that it starts: signals, environment, folder, streams, failures."""

import contextlib
import io
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import typer
from conftest import ONE_EPOCH, ROOT, TINY, WIDE, invoke, program, refused
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import micronet

SILENT = "stage first keeps 0 of 3 epochs; the same command goes on from there"


def test_a_signal_while_the_program_starts_ends_it_in_silence(tmp_path: Path) -> None:
    (tmp_path / "rich").mkdir()
    (tmp_path / "rich" / "__init__.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731  also under nohup
    result = program("--help", env=WIDE | {"PYTHONPATH": str(tmp_path)}, preexec_fn=heard)
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "")


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_before_the_first_step_ends_the_stage_at_once(
    signum: int, write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(micronet, "load_images", lambda *_: (os.kill(os.getpid(), signum), time.sleep(60)))
    start = time.monotonic()
    result = invoke("run-stage", "first", "--stages", write(TINY), "--ckpt", tmp_path / "ckpt")
    assert (result.exit_code, result.stderr.strip()) == (128 + signum, SILENT)
    assert time.monotonic() - start < 50


def test_a_signal_after_the_first_step_waits_for_the_epoch_that_is_tested(
    write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate = micronet.evaluate
    monkeypatch.setattr(micronet, "evaluate", lambda *each: (os.kill(os.getpid(), signal.SIGTERM), evaluate(*each))[1])
    result = invoke("run-stage", "first", "--stages", write(TINY), "--ckpt", tmp_path / "ckpt")
    assert (result.exit_code, result.stderr.strip()) == (143, SILENT.replace("keeps 0", "keeps 1"))


@pytest.mark.parametrize("ending", ["asked", "closed"])
def test_a_stage_that_waits_for_a_server_stops_with_its_chain(
    ending: str, write: Callable[..., Path], tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        proxy = f"http://127.0.0.1:{silent.getsockname()[1]}"
        command = [sys.executable, str(ROOT / "micronet.py"), "run-stage", "first", "--lifeline", "--ckpt=ckpt"]
        command += [f"--stages={write(TINY.replace('synthetic', 'cifar100'))}", "--data=nowhere"]
        pipes = {"stdin": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        stage = subprocess.Popen(command, env=WIDE | {"https_proxy": proxy}, cwd=tmp_path, **pipes)
        try:
            assert stage.stderr.readline().startswith("downloading CIFAR100, 170 MB, from https://")
            if ending == "asked":
                stage.stdin.write("\n")
                stage.stdin.flush()
            else:
                stage.stdin.close()
            assert stage.stderr.read().splitlines()[-1] == f"error 143: {SILENT}"
            assert stage.wait(timeout=60) == 143
        finally:
            stage.kill()


def test_a_process_that_does_not_stop_ends_when_its_chain_is_gone() -> None:
    code = f"""import signal, sys, threading, time; sys.path.insert(0, {str(ROOT)!r}); import micronet
signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as one that waits for another process
threading.Thread(target=micronet.watch_lifeline, daemon=True).start()
time.sleep(600)"""
    stage = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE)
    stage.stdin.close()
    try:
        assert stage.wait(timeout=120) == 143
    finally:
        stage.kill()


def test_the_environment_of_another_launch_is_not_this_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    foreign = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "GROUP_RANK", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "ROLE_NAME"}
    foreign |= {"ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_FSDP"}
    for name in (*foreign, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"):
        monkeypatch.setenv(name, "2")
    monkeypatch.setattr(micronet, "usable_cores", lambda: 3)
    for threads, expected in (("", "3"), ("4,2", "4"), (" 5 ", "5")):
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
        launch = micronet.plan_launch(ROOT / "accelerate_config.yaml", micronet.new_console(quiet=True))
        assert launch.environment["OMP_NUM_THREADS"] == expected
    kept = {name for name, value in launch.environment.items() if value == "2"}
    assert "ACCELERATE_GRADIENT_ACCUMULATION_STEPS" in kept and not kept & foreign
    for threads in ("two", "0", "-1", "1.5"):
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
        with pytest.raises(micronet.Misconfigured, match=f'OMP_NUM_THREADS = "{threads}": expected'):
            micronet.plan_launch(ROOT / "accelerate_config.yaml", micronet.new_console(quiet=True))


def test_only_a_launcher_makes_a_stage_a_launched_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert not micronet.is_launched()
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[-1]])"
    child = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import micronet; print(micronet.is_launched())"
    for name, launched in (("accelerate", "True"), ("accelerated", "False")):
        (tmp_path / name).write_text(code)
        command = [sys.executable, tmp_path / name, "launch", child]
        assert subprocess.run(command, capture_output=True, text=True).stdout.strip() == launched


@pytest.mark.parametrize(("quota", "cores"), [("max 100000", 8), ("50000 100000", 1), ("250000 100000", 3)])
def test_cores_by_affinity_and_quota(quota: str, cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "cgroup").write_text("0::/a/b\n")
    (tmp_path / "a" / "cpu.max").write_text(quota)  # of the group above
    (tmp_path / "a" / "b" / "cpu.max").write_text("max 100000")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert micronet.usable_cores(tmp_path / "cgroup", tmp_path) == cores


def test_a_chain_nobody_reads_in_a_folder_of_traps(tmp_path: Path) -> None:
    """Standard error closed, standard output full, a library that talks, foreign modules, another launch's variables."""
    for name in ("yaml", "accelerate", "micronet", "tqdm"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('a trap')\n")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "program").write_bytes((ROOT / "micronet.py").read_bytes())  # renamed, and elsewhere
    (tmp_path / "one.toml").write_text("\ufeff" + ONE_EPOCH)  # with a byte order mark
    where = os.fsdecode(b"ckpt-\xff")
    command = [sys.executable, "-P", "other/program", "chain", "first", "--stages", "one.toml", "--ckpt", where]
    command += ["--config-file", str(ROOT / "accelerate_config.yaml")]
    shell = ["sh", "-c", 'exec "$@" >/dev/full 2>&-', "sh", *command]
    result = subprocess.run(shell, cwd=tmp_path, env=WIDE | {"OMP_DISPLAY_ENV": "true", "RANK": "3", "WORLD_SIZE": "4"})
    assert result.returncode == 0
    kept = {path.name for path in (tmp_path / where / "first").iterdir()}
    assert kept == {"best.safetensors", "last.safetensors", "log.jsonl"}
    assert micronet.read_metadata(tmp_path / where / "first" / "last.safetensors").facts.threads == 1
    with open("/dev/full", "w") as full:
        command = [sys.executable, str(ROOT / "micronet.py"), "show", "--ckpt", str(tmp_path / where)]
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (result.returncode, result.stderr) == (5, "error: standard output: No space left on device\n")


FULL, GONE = "No space left on device", "Broken pipe"  # a log on a full disk, a reader that went away


@pytest.mark.parametrize(("command", "lost", "code"), [("bench", FULL, 5), ("bench", GONE, 0), ("chain", FULL, 0)])
def test_what_only_tells_of_a_run_may_be_lost_and_a_result_may_not(
    command: str, lost: str, code: int, write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    speed = {"images_per_second": 1.0, "stage": "first"}
    monkeypatch.setattr(micronet, "plan_launch", lambda *_: None)
    monkeypatch.setattr(micronet, "launch_bench", lambda *_: dict(speed))
    monkeypatch.setattr(micronet, "launch_stage", lambda *_: None)
    folders = {"stages": write(TINY), "ckpt": tmp_path / "ckpt"}
    own = {"as_json": True, "steps": 1} if command == "bench" else {}
    reader, writer = os.pipe()
    os.close(reader)
    with micronet.Outlet(writer if lost == GONE else os.open("/dev/full", os.O_WRONLY), "w") as outlet:
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BufferedWriter(outlet), write_through=True))
        with contextlib.nullcontext() if code == 0 else pytest.raises(typer.Exit) as ended:
            getattr(micronet, command)(names=["first"], **folders, **own)
        monkeypatch.undo()
        assert outlet.error.strerror == lost
    assert code == 0 or ended.value.exit_code == code


LAUNCHERS = """Traceback (most recent call last):
  File "launch.py", line 999, in simple_launcher
    raise subprocess.CalledProcessError(returncode=process.returncode, cmd=cmd)
subprocess.CalledProcessError: Command '['python', 'micronet.py']' {}.
"""
RAISED = """{0}Traceback (most recent call last):
{0}  File "micronet.py", line 1, in <module>
{0}    raise ValueError
{0}{1}
"""
NEVER_CAME = """E1129 10:00:00 x
Traceback (most recent call last):
  rdzv_handler.next_rendezvous()
torch.distributed.DistStoreError: Timed out. 1/2 clients joined.
"""  # as torch 2.15 ends on the first machine and on another
KILLED = "a process was killed (SIGKILL), perhaps for want of memory"


@pytest.mark.parametrize(("said", "trouble", "code", "reason"), [
    ([(4, "nan"), (143, "stopped")], RAISED.format("", "ValueError: x"), 4, "nan"),
    ([(143, "stopped")], LAUNCHERS.format("died with <Signals.SIGKILL: 9>"), 1, KILLED),
    ([(143, "stopped")], "E1125 12:00:00.1 failed (exitcode: -9) local_rank: 1\n", 1, KILLED),
    ([(143, "stopped")], LAUNCHERS.format("returned non-zero exit status 143"), 143, "stopped by a signal"),
    ([], LAUNCHERS.format("died with <Signals.SIGSEGV: 11>"), 1, "ended by SIGSEGV"),
    ([], RAISED.format("", "KeyError: 'a'") + LAUNCHERS.format("returned non-zero exit status 1"), 1, "KeyError: 'a'"),
    ([(143, "stopped")], RAISED.format("[rank1]: ", "ValueError: x") + RAISED.format("[rank0]: ", "RuntimeError: gone"),
     1, "ValueError: x"),
    ([], NEVER_CAME, 1, "not all machines came (Timed out. 1/2 clients joined.)"),
    ([], "", 1, "ended without a word, exit code 7"),
])  # fmt: skip
def test_what_went_wrong_is_told_as_what_it_was(
    said: list[tuple[int, str]], trouble: str, code: int, reason: str
) -> None:
    assert micronet.explain_failure(said, trouble, 7) == (code, reason)


def launch(code: str, tmp_path: Path) -> str:
    """Launch a stage whose process runs some code instead, and return what is said of its failure."""
    stage = micronet.Stage("first", network="efficientnet_b0", epochs=3)
    command = micronet.Launch([sys.executable, "-c", code], dict(os.environ))
    with micronet.StopRequest() as stop, pytest.raises(micronet.Failure) as failure:
        micronet.launch_stage(command, stage, [], tmp_path / "ckpt", stop)
    return str(failure.value)


def test_a_traceback_is_kept_and_told_in_a_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    told = launch("import sys; print('a library', file=sys.stderr); [][1]", tmp_path)
    log = tmp_path / "ckpt" / "first" / "error.log"
    assert told.startswith(f"stage first failed: IndexError: list index out of range (all of it in {log}); stage first")
    assert log.read_text().startswith("Traceback (most recent call last):\n")
    assert capfd.readouterr().err == "a library\n"
    failing = "import sys; print('error {}', file=sys.stderr); sys.exit(1)"
    told = launch(failing.format("4: stage first: nan in epoch 1"), tmp_path)
    assert told == "stage first failed: nan in epoch 1"  # which the same command would meet again
    told = launch(failing.format("75: stage first: process 7 trains it"), tmp_path)
    assert told == "stage first: process 7 trains it"  # and it has not failed


@pytest.mark.parametrize(("error", "told"), [
    (RuntimeError("CUDA out of memory. Tried to allocate"), "out of memory with batch_size = 128"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory with batch_size = 128"),
    (MemoryError(), "out of memory with batch_size = 128"),
    (type("Numpys", (MemoryError,), {})("Unable to allocate 9 EiB"), "out of memory with batch_size = 128"),
])  # fmt: skip
def test_want_of_memory_names_the_batch_size(error: Exception, told: str) -> None:
    training = micronet.Stage("first", network="efficientnet_b0"), micronet.StopRequest(), lambda: 0
    with pytest.raises(micronet.Failure, match=told), micronet.training_failures(*training):
        raise error
    with pytest.raises(RuntimeError, match="another"), micronet.training_failures(*training):
        raise RuntimeError("another")


CONFIG = "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_GPU\nmixed_precision: bf16\nnum_processes: 2\n"


@pytest.mark.parametrize(("line", "told"), [
    *((f"num_processes: {value}", "num_processes = ") for value in ("0", "-1", "1.5", '"two"', "null", "[1]", "true")),
    ("mixed_precision: fp8", "expected one of no, bf16, fp16"),
    ("mixed_precision: no", "mixed_precision = false: expected one of no"),
    *((f"distributed_type: {kind}", "expected one of NO") for kind in ("DEEPSPEED", "FSDP", "MEGATRON_LM", "XLA")),
    ("fsdp_config: {fsdp_version: 2}", "fsdp_config = "),
    ("dynamo_config: {dynamo_backend: nothing}", "dynamo_backend = "),
    ("dynamo_config: [1]", "dynamo_config = "),
    ("main_process_port: 70000", "main_process_port = 70000: expected a whole number from 0 to 65,535"),
    ("num_machines: 0", "num_machines = 0: expected a whole number from 1 to 1,024"),
    ("gpu_ids: [0]", "gpu_ids = "),
    ("unknown: 1", "unknown"),
    ("x: " + "[" * 5000, "not a launch configuration"),
    ("x: !!python/object:os.system {}", "not a launch configuration"),
])  # fmt: skip
def test_a_launch_configuration_that_cannot_be_honoured_is_refused(line: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(CONFIG + line)
    with pytest.raises(micronet.Misconfigured) as refused:
        micronet.read_launch(tmp_path / "config.yaml")
    assert told in str(refused.value)
    assert str(tmp_path / "config.yaml") in str(refused.value)


def test_what_can_be_honoured_is(tmp_path: Path) -> None:
    lines = "main_process_port: null\ngpu_ids: all\ndynamo_config: {dynamo_backend: inductor, dynamo_mode: default}\n"
    (tmp_path / "config.yaml").write_text("\ufeff" + CONFIG + lines)
    assert micronet.read_launch(tmp_path / "config.yaml").num_processes == 2
    (tmp_path / "config.yaml").write_text("distributed_type: NO\nnum_processes: 1\n")  # which YAML takes for false
    assert micronet.read_launch(tmp_path / "config.yaml").num_processes == 1


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=3),
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=100)
@given(st.dictionaries(st.sampled_from([*micronet.LAUNCH_KEYS, "dynamo_config", "x"]), values) | values | st.binary())
def test_any_yaml_is_a_launch_or_one_line(tmp_path: Path, content: object) -> None:
    import yaml

    path = tmp_path / "config.yaml"
    path.write_bytes(content if isinstance(content, bytes) else yaml.safe_dump(content).encode())
    try:
        assert micronet.read_launch(path).num_processes >= 1
    except micronet.Misconfigured as error:
        assert str(error).startswith(str(path))


def test_one_of_two_downloads(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The second process waits for the first, and then finds what that one has put there."""

    class Dataset:
        url = "https://somewhere"

        def __init__(self, data: Path, download: bool = False) -> None:
            if not (data / "there").exists() and not download:
                raise RuntimeError
            assert socket.getdefaulttimeout() == (30 if download else None)
            print("a bar", file=sys.stderr)

    micronet.download(Dataset, tmp_path / "data")
    begun, ended = capfd.readouterr().err.splitlines()
    assert begun == f"downloading Dataset, 170 MB, from https://somewhere to {tmp_path / 'data'}"
    assert ended == f"Dataset is in {tmp_path / 'data'}"
    code = f"import fcntl, pathlib, time\nlock = open({str(tmp_path / 'data' / '.download.lock')!r}, 'w')\n"
    code += "fcntl.lockf(lock, fcntl.LOCK_EX)\nprint(flush=True)\ntime.sleep(0.5)\n"
    code += f"pathlib.Path({str(tmp_path / 'data' / 'there')!r}).touch()\n"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as first:
        first.stdout.readline()
        micronet.download(Dataset, tmp_path / "data")
    assert "downloading" not in capfd.readouterr().err


def test_ctrl_z_pauses_a_stage_and_fg_goes_on(tmp_path: Path) -> None:
    code = f"""import subprocess, sys; sys.path.insert(0, {str(ROOT)!r}); import micronet
child = subprocess.Popen(["sh", "-c", "sleep 600 & wait"], start_new_session=True)
with micronet.pausing(child.pid):
    print(child.pid, flush=True)
    child.wait()
"""

    def states() -> list[str]:
        pids = [chain.pid, launcher, *(child.pid for child in psutil.Process(launcher).children(recursive=True))]
        return [Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()[0] for pid in pids]

    def become(expected: list[str]) -> bool:
        return any(states() == expected or time.sleep(0.1) for _ in range(300))

    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as chain:
        launcher = int(chain.stdout.readline())
        try:
            assert become(["S", "S", "S"])
            chain.send_signal(signal.SIGTSTP)
            assert become(["T", "T", "T"])
            chain.send_signal(signal.SIGCONT)
            assert become(["S", "S", "S"])
        finally:
            os.killpg(launcher, signal.SIGKILL)
            chain.kill()  # which may be paused


def test_a_stage_in_its_first_epoch_is_shown(tmp_path: Path) -> None:
    holder = f"import fcntl, time; lock = open({str(tmp_path / '.first.lock')!r}, 'w'); "
    holder += "fcntl.lockf(lock, fcntl.LOCK_EX); print(flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", holder], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        (tmp_path / ".second.lock").touch()
        shown = invoke("show", "--ckpt", tmp_path).output
        process.kill()
    assert "first is running, in its first epoch" in shown
    assert "second" not in shown


def test_a_tracker_that_cannot_begin_is_one_line(
    write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate import Accelerator

    def init_trackers(*_: object) -> None:
        raise KeyError("no key")

    monkeypatch.setattr(Accelerator, "init_trackers", init_trackers)
    result = invoke("run-stage", "first", "--stages", write(ONE_EPOCH), "--ckpt", tmp_path / "ckpt")
    assert refused(result, "error: --log-with: KeyError: 'no key'\n")
