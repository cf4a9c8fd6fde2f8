"""The screen: what is drawn from events and from what is kept, and how fast it comes up."""

import io
import json
import os
import pty
import re
import resource
import shutil
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, WIDE, invoke, reset_accelerate
from rich.console import Console
from test_program import CHAIN

import micronet
from micronet import Cost, EpochDone, Finished, Stage, Started, Stepped, curve


def record(epoch: int, top1: float) -> dict[str, float]:
    return {"epoch": epoch, "lr": 0.1, "train_loss": 1.5, "train_top1": 50.0, "test_loss": 1.2, "test_top1": top1,
            "test_top5": 90.0, "seconds": 10.0, "images_per_second": 100.0}  # fmt: skip


STAGE = Stage("a-long-name", network="efficientnet_ex", teacher="b0", dataset="synthetic", train_images=200, epochs=70)
TEACHER = Stage("b0", network="efficientnet_b0", dataset="synthetic", epochs=70)
FACTS = {"device": "CPU (x86_64)", "processes": 1, "precision": "fp32", "compile": None}
KEPT = {TEACHER: {"best": {"top1": 81.25}, "last": {"epoch": 70}, "history": [record(70, 81.25)]}, STAGE: None}


def picture(width: int, height: int, kept: dict = KEPT, encoding: str = "utf-8", **options: object) -> str:
    """Return the last frame of a dashboard after some events, as a terminal of that size would get it."""
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    file.isatty = lambda: True
    console = Console(file=file, width=width, height=height, force_terminal=True, **options)
    teacher = {"name": "b0", "top1": 81.25, "file": "ckpt/b0/best.safetensors"}
    with micronet.choose_view(console, kept, dict.fromkeys((stage.name for stage in kept), "waiting")) as view:
        assert isinstance(view, micronet.Dashboard)
        view(Started(STAGE, FACTS, Cost(1, 1, 1, 1), teacher, [], []))
        for epoch in (1, 2, 3):
            view(EpochDone(record(epoch, 20.0 * epoch), record(epoch, 20.0 * epoch)))
        view.drawn = -1.0
        view(Stepped(4, 3, 0.07, torch.tensor([384.0, 192.0]), 384))
        paper = Console(file=file, width=width, height=height, color_system=None, **options)
        with paper.capture() as captured:
            paper.print(view.picture())
    return captured.get()


@pytest.mark.parametrize("size", [(80, 24), (160, 50), (80, 12), (40, 10)])
@pytest.mark.parametrize("others", [0, 12])
def test_the_dashboard_fits(size: tuple[int, int], others: int) -> None:
    more = {Stage(f"s{i}", network="efficientnet_ex", dataset="synthetic"): None for i in range(others)}
    lines = picture(*size, kept=KEPT | more).splitlines()
    if size[0] >= 80:
        assert len(lines) < size[1] and "a-long-name" in "".join(lines)
        assert max(map(len, lines)) <= size[0]
        assert not any("…" in line or "..." in line for line in lines)


def test_the_dashboard_says_what_the_events_say() -> None:
    text = picture(80, 24)
    for words in ("running", "loss 1.000", "train top-1 50.00 %", "lr 0.07", "test top-1 60.00 %", "3/", "4/70",
                  "images/s", "MiB", "left", "teacher 81.25", "b0 81.25", "3/70", "60.00", "the rate drops"):  # fmt: skip
        assert words in text, words


def test_an_ascii_terminal_gets_ascii() -> None:
    assert picture(80, 24, encoding="ascii", no_color=True).isascii()


def test_the_time_left_weighs_every_stage_by_its_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """100 images/s for ex taught by b0: what b3 without a teacher takes follows from what their convolutions put out."""
    teacher = replace(TEACHER, name="b0")
    other = Stage("b3", network="efficientnet_b3", dataset="synthetic", train_images=100, epochs=10, views=("crop",))
    ex, b0, b3 = 3_014_968, 3_611_772, 7_384_688  # elements
    assert micronet.step_work(STAGE, [teacher, STAGE]) == 3 * ex + b0
    assert micronet.step_work(other, [other]) == 3 * b3
    stage = replace(STAGE, train_images=1000, batch_size=10, epochs=1, views=("crop",), lr=((1, 0.1),))
    view = micronet.Dashboard(
        Console(file=io.StringIO(), width=160), {teacher: KEPT[TEACHER], stage: None, other: None}, {}
    )
    begun = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: begun)
    view.draw = lambda: None
    view(Started(stage, FACTS, Cost(1, 1, 1, 1), {"name": "b0", "top1": 81.25, "file": "b0"}, [], []))
    monkeypatch.setattr(time, "monotonic", lambda: begun + 1)
    line = str(view.progress(Stepped(1, 10, 0.1, torch.zeros(2), 100))[1])
    seconds = 900 / 100 + other.batch_size * 10 / 100 * 3 * b3 / (3 * ex + b0)
    assert line.startswith(" 100 images/s, ") and f" 9.0 s left; all stages {seconds:.1f} s" in line


def test_a_teacher_that_is_moved_away_ends_no_run(tmp_path: Path) -> None:
    pupil = replace(STAGE, teacher=str(tmp_path / "gone.safetensors"))
    assert micronet.step_work(pupil, [pupil]) == micronet.step_work(replace(STAGE, teacher=None), [])


def test_only_the_main_process_draws() -> None:
    file = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    file.isatty = lambda: True
    for quiet, kind in ((True, micronet.Plain), (False, micronet.Dashboard)):
        console = micronet.new_console(quiet=quiet, file=file, force_terminal=True)
        assert type(micronet.choose_view(console, KEPT, {})) is kind


def on_a_terminal(
    command: list[object], signum: int | None, most: int = resource.RLIM_INFINITY, **environment: str
) -> tuple[int, str]:
    """Run a command on a terminal of 80 x 24, send a signal once bars are drawn; return exit code and what it wrote.

    No file that it writes may grow beyond `most` bytes.
    """
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    environment = {k: v for k, v in os.environ.items() if k != "COLUMNS"} | {"TERM": "xterm-256color"} | environment
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))  # noqa: E731
    pipes = dict(stdin=theirs, stdout=theirs, stderr=theirs, preexec_fn=limit, start_new_session=True)
    running = subprocess.Popen(list(map(str, command)), env=environment, **pipes)
    os.close(theirs)
    written = b""
    try:
        while chunk := os.read(ours, 65536):
            written += chunk
            if signum and b"images/s" in written:
                os.kill(running.pid, signum)
                signum = None
    except OSError:  # EIO: nobody has the terminal any more
        pass
    os.close(ours)
    return running.wait(), written.decode()


def last_line(written: str) -> str:
    """Return the last line, without what moves the cursor or sets colours."""
    return re.sub(r"\x1b\[[?\d;]*[a-zA-Z]", "", written).rstrip().splitlines()[-1]


def stage_command(write: Callable[..., Path], ckpt: Path, epochs: int) -> list[object]:
    stages = write(CHAIN.replace("epochs = 6", f"epochs = {epochs}").replace("[6, 0.002]", f"[{epochs}, 0.002]"))
    return [sys.executable, ROOT / "micronet.py", "run-stage", "first", "--stages", stages, "--ckpt", ckpt]


def given_back(written: str) -> bool:
    """Tell whether a terminal is as it was: the cursor shows and colours are off."""
    hidden, shown = written.rfind("\x1b[?25l"), written.rfind("\x1b[?25h")
    return 0 <= hidden < shown and written.rfind("\x1b[0m") >= max(written.rfind("\x1b[1m"), written.rfind("\x1b[3"))


def test_a_terminal_is_given_back_at_the_end(write: Callable[..., Path], tmp_path: Path) -> None:
    code, written = on_a_terminal(stage_command(write, tmp_path, 5), None, PYTHONIOENCODING="ascii", NO_COLOR="1")
    assert code == 0 and given_back(written) and written.isascii() and "images/s" in written
    assert "stage first is finished: top-1 " in written and "5/5" in written.split("running")[-1]


def test_a_terminal_is_given_back_after_sigterm(write: Callable[..., Path], tmp_path: Path) -> None:
    code, written = on_a_terminal(stage_command(write, tmp_path, 900), signal.SIGTERM)
    assert code == 143 and given_back(written) and "Traceback" not in written
    log = tmp_path / "first" / "log.jsonl"
    kept = len(log.read_text().splitlines()) if log.exists() else 0
    assert last_line(written) == f"stage first keeps {kept} of 900 epochs; the same command goes on from there"
    assert micronet.failures(tmp_path) == {} and " stopped " in written.split("running")[-1]


def test_a_terminal_is_given_back_after_an_error(write: Callable[..., Path], tmp_path: Path) -> None:
    """No file may grow beyond 60 kB, so that the first epoch cannot be kept: the screen and `show` say failed."""
    code, written = on_a_terminal(stage_command(write, tmp_path, 900), None, most=60_000)
    assert code == 5 and given_back(written)
    assert last_line(written) == f"error: {tmp_path / 'first' / 'best.safetensors'}: File too large"
    assert " failed " in written.split("running")[-1] and "Traceback" not in written
    assert "File too large" in micronet.failures(tmp_path)["first"]
    assert "first failed: " in invoke("show", "--ckpt", tmp_path).output


def test_a_curve_has_each_epoch_in_its_place() -> None:
    lines = curve([record(1, 0.0), record(6, 50.0), record(11, 100.0)], 11, None, [6], 48, 8, ascii_only=True)
    assert len(lines) == 8 and max(map(len, lines)) <= 48
    plot = [line[7:].ljust(40) for line in lines[:6]]
    assert plot[0][39] == "*" and plot[5][0] == "*" and plot[2][20] == "*"  # half way along, and up
    assert sum(line.count("*") for line in plot) == 3
    assert all(line[18] == ":" for line in plot)  # between epochs 5 and 6
    assert lines[0].startswith("  100 |") and lines[5].startswith("    0 |")


@pytest.mark.parametrize("width", [1, 7, 8, 9])
def test_no_terminal_is_too_narrow_for_a_curve(width: int) -> None:
    assert len(curve([record(1, 0.0), record(2, 50.0)], 3, 70.0, [2], width, 8)) == 8


@pytest.mark.parametrize("epochs", [0, 1, 2, 500])
def test_a_curve_of_any_length_fits(epochs: int) -> None:
    history = [record(n + 1, 99.99 * n / max(1, epochs)) for n in range(epochs)]
    lines = curve(history, max(1, epochs), 50.0, [], 40, 10)
    assert len(lines) == 10 and max(map(len, lines)) <= 40 and "teacher 50.00" in "".join(lines)


@pytest.mark.parametrize("variable", ["FORCE_COLOR", "TTY_COMPATIBLE", "NO_COLOR"])
def test_a_pipe_gets_a_line_an_epoch(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    monkeypatch.setenv(variable, "1")
    console = Console(file=file, width=100)
    with micronet.choose_view(console, KEPT, {}) as view:
        view(Started(STAGE, FACTS, Cost(1, 1, 1, 1), None, [], []))
        for epoch in (1, 2):
            view(Stepped(epoch, 1, 0.07, torch.zeros(2), 128))
            view(EpochDone(record(epoch, 20.0), record(1, 20.0)))
        view(Finished(record(1, 20.0), record(2, 20.0)))
    lines = file.getvalue().splitlines()
    assert [line.split("  ")[1] for line in lines[3:5]] == ["epoch 1/70", "epoch 2/70"] and len(lines) == 6
    assert "\x1b[2K" not in file.getvalue() and "\x1b[?25l" not in file.getvalue()


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished teacher and its pupil."""
    folder = tmp_path_factory.mktemp("show")
    (folder / "stages.toml").write_text(TINY)
    for stage in ("first", "second"):
        options = ["--stages", folder / "stages.toml", "--ckpt", folder / "ckpt"]
        assert invoke("run-stage", stage, *options).exit_code == 0
        reset_accelerate()
    return folder / "ckpt"


def test_show(kept: Path, tmp_path: Path) -> None:
    result = invoke("show", "--ckpt", kept, "--svg", tmp_path / "chain.svg")
    rows = [line.split() for line in result.output.splitlines() if " done " in line]
    assert [row[0] for row in rows] == ["first", "second"] and result.output.count("●") == 6
    svg = (tmp_path / "chain.svg").read_text()
    assert svg.startswith("<svg") and "second" in svg and "●" in svg
    results = json.loads(invoke("show", "--ckpt", kept, "--json").stdout)
    assert [(r["stage"], r["state"], r["epoch"], len(r["history"])) for r in results] == [
        ("first", "done", 3, 3), ("second", "done", 3, 3),
    ]  # fmt: skip
    assert results[1]["best"] == micronet.read_metadata(kept / "second" / "best.safetensors")["best"]


def test_show_takes_a_folder_whose_teachers_go_round(kept: Path, tmp_path: Path) -> None:
    """A stage that was taught by a later one, before stages.toml was turned round."""
    shutil.copytree(kept, tmp_path / "ckpt")
    for file in ("last", "previous"):
        path = tmp_path / "ckpt" / "first" / f"{file}.safetensors"
        tensors, metadata = micronet.load_checkpoint(path)
        metadata["stage"]["teacher"] = "second"
        micronet.save_checkpoint(path, tensors, metadata)
    states = json.loads(invoke("show", "--ckpt", tmp_path / "ckpt", "--json").stdout)
    assert {result["stage"] for result in states} == {"first", "second"}


@pytest.mark.parametrize("damage", ["last", "both", "folder", "lock"])
def test_a_damaged_stage_hides_no_other(
    damage: str, kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(kept, ckpt := tmp_path / "ckpt")
    first = ckpt / "first"
    for file in {"last": ["last"], "both": ["last", "previous"]}.get(damage, []):
        (first / f"{file}.safetensors").write_bytes(b"damaged")
    if damage == "folder":  # whose permissions do not hold root back

        def read_state(path: Path, real: object = micronet.read_state) -> dict[str, object]:
            if path.parent == first:
                raise PermissionError(13, "Permission denied", str(path))
            return real(path)

        monkeypatch.setattr(micronet, "read_state", read_state)
    if damage == "lock":
        (ckpt / ".first.lock").unlink(missing_ok=True)
        os.mkfifo(ckpt / ".first.lock")
    for options, words in (([], "second "), (["--json"], '"stage": "second"')):
        result = invoke("show", "--ckpt", ckpt, *options)
        assert result.exit_code == (0 if damage == "lock" else 3) and words in result.stdout, result.output
        if damage != "lock":
            assert f"{first / 'last.safetensors'}" in result.stderr and result.stderr.count("\n") == 1
    assert damage != "last" or "first " in result.stdout or '"stage": "first"' in result.stdout


def test_all_that_is_damaged_is_named(kept: Path, tmp_path: Path) -> None:
    shutil.copytree(kept, ckpt := tmp_path / "ckpt")
    for path in ckpt.glob("*/*.safetensors"):
        path.write_bytes(b"damaged")
    result = invoke("show", "--ckpt", ckpt)
    assert result.exit_code == 3 and "no stage can be read here" in result.stdout
    assert all(f"{ckpt / name / 'previous.safetensors'}: " in result.stderr for name in ("first", "second"))
    kept_now, damaged = micronet.kept_stages(ckpt)
    console = micronet.Screen(file=io.StringIO(), width=80, height=24)
    console.print(micronet.stages_picture(ckpt, kept_now, damaged, 80, 16, False, 24))
    assert console.file.getvalue().count("\n") == 3


def test_a_refused_command_says_nothing_of_the_stage(kept: Path, tmp_path: Path) -> None:
    shutil.copytree(kept, tmp_path / "ckpt")
    (tmp_path / "stages.toml").write_text(TINY.replace("width = 0.1", "width = 0.2"))
    result = invoke("run-stage", "first", "--stages", tmp_path / "stages.toml", "--ckpt", tmp_path / "ckpt")
    assert result.exit_code == 2 and micronet.failures(tmp_path / "ckpt") == {}
    (tmp_path / "ckpt" / ".first.lock").write_text("failed: long ago")  # and finished since
    assert "failed" not in invoke("show", "--ckpt", tmp_path / "ckpt").output
    first, _ = json.loads(invoke("show", "--ckpt", tmp_path / "ckpt", "--json").stdout)
    assert (first["state"], first["failure"]) == ("done", None)


def test_show_tells_who_is_running(kept: Path) -> None:
    """The lock of another process shows; looking at it does not take it."""
    stage = next(iter(micronet.kept_stages(kept)[0]))
    code = (
        "import sys, micronet, pathlib\nstage = next(iter(micronet.kept_stages(p := pathlib.Path(sys.argv[1]))[0]))\n"
    )
    code += "with micronet.locked(stage, p): print('held', flush=True); sys.stdin.read()"
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    holder = subprocess.Popen([sys.executable, "-c", code, kept], **pipes)
    assert holder.stdout.readline() == "held\n"
    states = [r["state"] for r in json.loads(invoke("show", "--ckpt", kept, "--json").stdout)]
    holder.communicate()
    assert states == ["running", "done"] and not micronet.is_locked(stage.name, kept)


@pytest.mark.parametrize(("arguments", "message"), [
    (["--ckpt", "missing"], "missing: no such folder"), (["--follow", "--ckpt", "."], "--follow: standard output"),
    (["--follow", "--json", "--ckpt", "."], "--follow: keeps drawing"),
])  # fmt: skip
def test_show_refuses_in_one_line(arguments: list[str], message: str) -> None:
    result = invoke("show", *arguments)
    assert (result.exit_code, result.output.count("\n")) == (2, 1) and message in result.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["show", "--ckpt", "KEPT"], ["run-stage", "--help"]])
def test_what_computes_nothing_comes_up_at_once(arguments: list[str], kept: Path) -> None:
    """Torch stays out: with it, the CPU time is 30 times that of importing rich and typer (best of three, in turns)."""
    words = [str(kept) if word == "KEPT" else word for word in arguments]
    times: dict[str, float] = {}
    for _ in range(3):
        for name, command in (("bare", ["-c", "import rich, typer"]), ("ours", [str(ROOT / "micronet.py"), *words])):
            begun = os.times()
            subprocess.run([sys.executable, *command], check=True, capture_output=True, env=WIDE)
            ended = os.times()
            taken = ended.children_user + ended.children_system - begun.children_user - begun.children_system
            times[name] = min(times.get(name, 99), taken)
    assert times["ours"] < 8 * times["bare"], times
    listed = subprocess.run([sys.executable, "-X", "importtime", str(ROOT / "micronet.py"), *words],
                            capture_output=True, text=True, env=WIDE).stderr  # fmt: skip
    assert " torch" not in listed and "rich" in listed
