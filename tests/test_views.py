"""The screen: what is drawn from events and from what is kept, and how fast it comes up."""

import io
import itertools
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from conftest import ROOT, WIDE, drawn, invoke, refused
from hypothesis import example, given
from hypothesis import strategies as st
from pytest import MonkeyPatch
from rich.console import Console
from rich.text import Text
from test_program import CHAIN
from test_tables import B0, COST, EXX, FACTS, KEPT, TEACHER, record

import micronet
from micronet import EpochDone, Event, Kept, Started, Stepped, curve

BEGUN = Started(EXX, FACTS, COST, {"teacher": TEACHER}, list(KEPT[1].history), ["WARNING: a note"])
STEP = Stepped(5, 3, 0.07, torch.tensor([576.0, 96.0]), 384)
EPOCHS = [EpochDone(record(3, 62.0), record(3, 62.0)), EpochDone(record(4, 60.0), record(3, 62.0))]
LAST = EpochDone(record(70, 60.0), record(3, 62.0))


def terminal(width: int = 80, height: int = 24, encoding: str = "utf-8", **options: object) -> Console:
    """Return a console on a terminal of that size."""
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True)
    file.isatty = lambda: True
    return micronet.new_console(file=file, width=width, height=height, force_terminal=True, **options)


def written_on(console: Console) -> str:
    return console.file.buffer.getvalue().decode(console.file.encoding)


def see(patch: MonkeyPatch, view: micronet.Plain, *seen: tuple[float, Event]) -> None:
    """Let a view see events, each at a second."""
    for now, event in seen:
        patch.setattr(time, "monotonic", lambda: now)
        view(event)


def picture(width: int, height: int, kept: list[Kept] = KEPT, begun: Started = BEGUN) -> list[str]:
    """Return a dashboard 64 seconds after a stage began or went on, as a terminal of that size would get it."""
    with MonkeyPatch.context() as patch, micronet.choose_view(terminal(width, height), kept) as view:
        patch.setattr(micronet, "peak_memory_mb", lambda device: 1234.4)
        see(patch, view, (1000, begun), *((1016, epoch) for epoch in EPOCHS), (1064, STEP))
        return drawn(view.picture(), width)


@pytest.mark.parametrize("size", [(160, 50), (80, 24), (60, 20), (80, 12), (40, 10)])
@pytest.mark.parametrize("others", [0, 12])
def test_the_dashboard_fits(size: tuple[int, int], others: int) -> None:
    lines = picture(*size, kept=KEPT + [Kept(replace(B0, name=f"s{i}")) for i in range(others)])
    assert max(map(len, lines)) <= size[0]
    if size[0] >= 60:
        assert len(lines) < size[1] and "► running" in "".join(lines) and lines[-1][0] + lines[-1][-1] == "╰╯"
        assert not any("…" in line or "..." in line for line in lines) and len(lines) <= 16 + 20 + others
        assert ("teacher 81.25" in "".join(lines)) == (size[1] > 12)


def test_the_dashboard_shows_every_figure_in_its_place() -> None:
    """13 steps of 128 images have taken 64 seconds; 327 are left, and 9 of 256 images in the stage after this one."""
    lines = [" ".join(line.strip("│").split()) for line in picture(80, 24)]
    assert lines[:13] == [
        f"╭─ micronet: 1 of 3 stages done, 28:18 min left {'─' * 30}╮",
        "stage network taught by state epoch best last time",
        "─" * 74,
        "b0 b0 - ✓ done 3/3 81.25 80.50 1:06 min",
        "a-long-name exx b0 81.25 ► running 4/70 62.00 60.00 1:30 min",
        "later b3 a-long-name 62.00 · waiting 0/3 - - -",
        "WARNING: a note",
        "2,418,650 parameters, score 0.066818, seed 7; CPU (x86_64), 2 processes,",
        "bf16, compiled by inductor; started without accelerate launch: no config",
        "file is read",
        f"step {'━' * 15}╸ 3/5 loss 1.500, top-1 25.00 %",
        "epoch ━ 5/70 lr 0.07, 26:50 min left",
        "speed █ 26 images/s 25 % tests, saves; 1,234 MiB",
    ]
    assert lines[-2] == "⠒⠒ test top-1, % ⠂⠂ training ⠒ ⠒ teacher 81.25"


def test_the_speed_is_that_of_the_last_seconds(monkeypatch: MonkeyPatch) -> None:
    """384 images in the first 8 seconds, half as fast in the next 16, and none in a pause."""

    def step(n: int) -> Stepped:
        return STEP._replace(epoch=3, step=n, images=128 * n)

    with micronet.Dashboard(console := terminal(), KEPT) as view:
        see(monkeypatch, view, (0, BEGUN), (8, step(3)), (9, step(3)), (24, step(6)))
        (line,) = [line for line in drawn(view.picture(), 80) if "speed" in line]
    assert " 24 images/s " in line and "speed █▅ " in line
    with micronet.Dashboard(console, KEPT) as view:
        see(monkeypatch, view, (0, BEGUN), *((6 * n, step(n)) for n in range(1, 60)))
        for console.width, bars in ((60, 8), (120, 26)):
            see(monkeypatch, view, (6 * (60 + console.width), step(60 + console.width)))
            (line,) = [line for line in drawn(view.picture(), console.width) if "speed" in line]
            assert line.count("█") + line.count("▇") == bars


def test_a_terminal_of_another_size_is_cleared() -> None:
    """It has broken the lines of the old picture, so that the cursor is not where that began."""
    with micronet.Dashboard(console := terminal(), KEPT) as view:
        view(BEGUN)
        assert "\x1b[2J" not in written_on(console)
        console.width = 70
        view.live.redraw(since=0)
        view.live.redraw(since=0)
        assert written_on(console).count("\x1b[2J") == 1 and len(drawn(view.picture(), 70)[0]) == 69
        console.width = 60  # and the last picture, too
    assert written_on(console).count("\x1b[2J") == 2


def test_the_time_between_epochs_is_that_since_the_last_step(monkeypatch: MonkeyPatch) -> None:
    steps = [STEP._replace(epoch=epoch) for epoch in (3, 4)]
    with micronet.Dashboard(terminal(), KEPT) as view:
        see(monkeypatch, view, (0, BEGUN), (15, steps[0]), (20, EPOCHS[0]), (25, steps[1]))
        assert " 20 % tests, saves; " in "".join(drawn(view.picture(), 80))


def test_redrawing_takes_little_of_the_time() -> None:
    """Four times a second at most, and less often where drawing takes more than 0.5 % of that."""
    for cost, rate in ((0.001, 4), (0.01, 0.5)):
        with MonkeyPatch.context() as patch, micronet.Dashboard(terminal(), KEPT) as view:
            now, drawn = [0.0], []

            def refresh() -> None:
                drawn.append(now[0])
                now[0] += cost

            patch.setattr(time, "monotonic", lambda: now[0])
            patch.setattr(view.live, "refresh", refresh)
            view(BEGUN)
            for _ in range(2000):
                now[0] += 0.01
                view(STEP)
            assert 0.9 * rate * 20 <= len(drawn) <= rate * 20 + 2 and cost * len(drawn) <= 0.0051 * now[0] + 2 * cost


def test_a_restarted_stage_begins_anew() -> None:
    """What it had kept is moved aside, and counts no longer."""
    lines = [" ".join(line.split()) for line in picture(80, 24, begun=BEGUN._replace(history=[]))]
    assert lines[4] == "│ a-long-name exx b0 81.25 ► running 2/70 62.00 60.00 47.0 s │"


def test_a_chain_shows_the_cursor_that_a_killed_stage_has_hidden(tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    console = micronet.Screen(file=io.StringIO(), width=80, force_terminal=True)
    monkeypatch.setattr(micronet, "new_console", lambda: console)
    monkeypatch.setattr(micronet, "launch_stage", Mock(side_effect=micronet.Failure("killed")))
    result = invoke("chain", "--stages", ROOT / "demo.toml", "--ckpt", tmp_path)
    assert result.exit_code == 1 and "killed" in result.stderr and "\x1b[?25h" in console.file.getvalue()


@pytest.mark.parametrize("stays", [True, False])
def test_the_screen_of_a_chains_stage_makes_room_for_the_next(stays: bool) -> None:
    with micronet.Dashboard(console := terminal(), KEPT, stays) as view:
        for event in (BEGUN, *EPOCHS, STEP, LAST):
            view(event)
    end = written_on(console).split("✓ done")[-1]
    assert ("\x1b[2K" in end) == (not stays) and "stage a-long-name is finished" in written_on(console)


def test_following_redraws_no_more_often(tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    asked, drawn = iter(range(50)), []
    monkeypatch.setattr(micronet.StopRequest, "made", lambda self: next(asked) == 49)
    monkeypatch.setattr(micronet.PacedLive, "refresh", lambda self: drawn.append(self))
    now = [100.0]
    monkeypatch.setattr(time, "sleep", lambda seconds: now.append(now.pop() + seconds))
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    micronet.follow_stages(tmp_path, terminal())
    assert 8 <= len(drawn) <= 12  # four times a second for two and a half, and the first and the last are rich's own


def test_a_process_of_two_shows_what_its_own_images_come_to() -> None:
    with micronet.Dashboard(terminal(), KEPT) as view:
        view(BEGUN)
        view.live.due = 0.0
        view(STEP._replace(epoch=3, totals=STEP.totals / 2, images=192))
        (line,) = [line for line in drawn(view.picture(), 80) if "loss" in line]
        assert "loss 1.500, top-1 25.00 %" in line and view.training[-1] == (2.3, 25)


def test_long_names_are_cut_and_no_line_of_a_stage_is_lost() -> None:
    names = [f"an-eighteen-letter{i}" for i in range(8)]
    stages = [replace(EXX, name=name, teacher=before) for name, before in zip(names, [None, *names])]
    chain = [replace(KEPT[0], stage=stage, state="done") for stage in stages]
    for size in ((80, 24), (60, 20), (40, 16)):
        lines = picture(*size, kept=chain, begun=BEGUN._replace(stage=stages[5], history=[]))
        (row,) = [line for line in lines if "► running" in line]
        assert max(map(len, lines)) < size[0] and row.split()[-3:-1] == ["62.00", "60.00"] and row.startswith("│ an")
        assert (" left ─" in lines[0]) == (size[0] > 40)


def test_only_the_main_process_draws() -> None:
    for quiet, kind in ((True, micronet.Plain), (False, micronet.Dashboard)):
        assert type(micronet.choose_view(terminal(quiet=quiet), KEPT)) is kind


def visible(written: str) -> str:
    """Return what was written without what moves the cursor or sets colours."""
    return re.sub(r"\x1b\[[?\d;]*[a-zA-Z]", "", written)


def given_back(written: str) -> bool:
    """Tell whether a terminal is as it was: the cursor shows and colours are off."""
    hidden, shown = written.rfind("\x1b[?25l"), written.rfind("\x1b[?25h")
    return 0 <= hidden < shown and written.rfind("\x1b[0m") >= max(written.rfind("\x1b[1m"), written.rfind("\x1b[3"))


@pytest.mark.parametrize(
    ("error", "state"), [(None, "done"), (micronet.Stopped("told to"), "stopped"), (OSError("disk full"), "failed")]
)
def test_the_last_screen_says_how_it_ended_in_any_encoding(error: Exception | None, state: str) -> None:
    console = terminal(encoding="ascii")
    with suppress(micronet.Stopped, OSError), micronet.choose_view(console, KEPT) as view:
        for event in (BEGUN, *EPOCHS, STEP, *[LAST] * (error is None)):
            view(event)
        if error:
            raise error
    written, sign = written_on(console), {"done": "[+]", "stopped": "!", "failed": "x"}[state]
    row = rf"{sign} {state}[| ]+{4 if error else 5}/70[| ]"
    assert given_back(written) and re.search(row, visible(written).split("running")[-1])
    assert ("stage a-long-name is finished: top-1 " in written) == (error is None)
    assert "WARNING: a note\n" in written.splitlines(keepends=True)[0]  # above the frame, for good
    last = visible(written).split("micronet: ")[-1]
    assert last[1:].startswith(" of 3 stages done -") and "step" not in last and " left" not in last


def test_a_terminal_is_given_back_after_sigterm(write: Callable[..., Path], tmp_path: Path) -> None:
    stages = write(CHAIN.replace("epochs = 6", "epochs = 900").replace("[6, 0.002]", "[900, 0.002]"))
    command = [sys.executable, ROOT / "micronet.py", "run-stage", "first", "--stages", stages, "--ckpt", tmp_path]
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    environment = {k: v for k, v in os.environ.items() if k != "COLUMNS"} | {"TERM": "xterm-256color"}
    pipes = dict(stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
    running = subprocess.Popen(list(map(str, command)), env=environment, **pipes)
    os.close(theirs)
    written, signalled = "", False
    with suppress(OSError):  # EIO: nobody has the terminal any more
        while chunk := os.read(ours, 65536):
            written += chunk.decode(errors="replace")
            if "images/s" in written and not signalled:
                os.kill(running.pid, signal.SIGTERM)
                signalled = True
    os.close(ours)
    assert running.wait() == 143 and given_back(written) and "Traceback" not in written
    log = tmp_path / "first" / "log.jsonl"
    kept = len(log.read_text().splitlines()) if log.exists() else 0
    told = f"stage first keeps {kept} of 900 epochs; the same command goes on from there"
    assert visible(written).rstrip().splitlines()[-1] == told
    assert micronet.failures(tmp_path) == {} and " ■ stopped " in visible(written.split("running")[-1])


THREE = replace(EXX, epochs=3, lr=((2, 0.1), (3, 0.01)))


def dots(lines: list[Text]) -> list[str]:
    """Return the dots of a curve's braille characters, which nothing else but the legend has, line by line."""
    rows = [[ord(char) - 0x2800 for char in str(line)[7:]] for line in lines if "⠀" in str(line)]
    pairs = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
    drawn = ("".join(" #"[bits & bit > 0] for bits in row for bit in pair) for row in rows for pair in pairs)
    return [line.rstrip() for line in drawn]


def styles(line: Text) -> list[str]:
    return [next(str(span.style) for span in line.spans if span.start <= i < span.end) for i in range(len(line))]


def test_a_known_history_gives_known_cells() -> None:
    """Test top-1 is joined from epoch to epoch, the teacher is a dashed level, the rate drops after an epoch."""
    lines = curve(THREE, [record(1, 0.0), record(2, 50.0), record(3, 100.0)], [], TEACHER, 16, 6)
    assert dots(lines) == [
        "          #    #",
        "              #",
        "##  ##  ### ##",
        "            #",
        "          # #",
        "           #",
        "          #",
        "         #",
        "        # #",
        "       #",
        "      #   #",
        "     #",
    ]
    assert [str(line)[:7] for line in lines] == ["  100 ┤", "   50 ┤", "    0 ┤", "      └", "epoch  ", "       "]
    assert str(lines[3])[7:] == "┴─┴──┴─┴" and str(lines[4]).split() == ["epoch", "0", "1", "2", "3"]
    taught, trained, tested = micronet.TAUGHT, micronet.TRAINED, micronet.TESTED
    assert styles(lines[0])[7:] == [taught, trained, taught, trained, taught, trained, tested, tested]
    alone = curve(THREE, [record(1, 50.0)], [], None, 16, 6)  # an epoch is a point, where there is room
    assert dots(alone) == [""] * 10 + ["              ##"] * 2


def test_training_is_dotted_and_averaged_over_a_character() -> None:
    lines = curve(THREE, [], [(0.1, 10.0), (0.11, 30.0), (0.9, 40.0)], None, 16, 6)
    assert dots(lines) == [
        "            # #",
        "            #",
        "        # #",
        "        #",
        "    # #",
        "    #",
        "  #",
        *[""] * 5,
    ]
    assert [str(line)[:7].strip() for line in lines[:3]] == ["40 ┤", "20 ┤", "0 ┤"]


def test_the_legend_names_the_images() -> None:
    folder = micronet.Dataset(10, 5, 2, validation=5, class_names=("cat", "dog"))
    stage = replace(B0, dataset="folder:pets", folder=folder)
    assert "validation top-1, %" in str(curve(stage, [record(1, 50.0)], [], None, 60, 6)[-1])


def test_axes_end_where_there_is_nothing_more_to_see() -> None:
    """Round labels, three or more; an epoch or two fill the width, whatever is still to come."""
    for epochs, end in ((1, 1), (2, 2), (3, 3), (4, 5), (6, 8), (9, 11), (11, 11)):
        history = [record(n + 1, 41.0 + n) for n in range(epochs)]
        below = str(curve(replace(B0, epochs=11), history, [], None, 80, 12)[-2]).split()
        assert below[:2] == ["epoch", "0"] and len(below) > 3
        assert float(below[-1]) <= end < float(below[-1]) + 2


@given(st.floats(0, 1e4), st.floats(0, 1e4), st.integers(2, 12))
@example(99.96, 100.0, 2)
def test_ticks_are_round_and_enclose_what_is_shown(a: float, b: float, most: int) -> None:
    low, high = sorted((a, b))
    marks = micronet.ticks(low, high, most)
    steps = {round(y - x, 6) for x, y in itertools.pairwise(marks)}
    assert high > 100 or marks[-1] <= 100  # percent
    assert 3 <= len(marks) <= most + 1 and marks[0] <= low and high <= marks[-1] + 1e-9 and len(steps) == 1
    assert f"{steps.pop():.0e}"[0] in "125" and all(abs(mark - float(f"{mark:g}")) < 1e-6 for mark in marks)


@pytest.mark.parametrize(("width", "epochs"), [(1, 2), (7, 2), (8, 2), (9, 2), (40, 0), (40, 1), (40, 2), (40, 500)])
def test_a_curve_of_any_size_fits(width: int, epochs: int) -> None:
    history = [record(n + 1, 99.99 * n / max(1, epochs)) for n in range(epochs)]
    stage = replace(B0, epochs=max(1, epochs), lr=((1, 0.1), (max(2, epochs), 0.01)))
    lines = curve(stage, history, micronet.trail(history), TEACHER, width, 10)
    assert len(lines) == 10 and (width < 40 or max(len(line) for line in lines) <= 40)
    assert curve(stage, history, [], TEACHER, width, 5) == []


@pytest.fixture
def view(monkeypatch: MonkeyPatch) -> Iterator[micronet.Dashboard]:
    """A dashboard that no step has drawn again."""
    with micronet.Dashboard(terminal(), KEPT) as view:
        monkeypatch.setattr(view.live, "redraw", lambda since: None)
        yield view


def test_training_is_noted_twice_an_epoch_where_there_are_a_thousand(view: micronet.Dashboard) -> None:
    view(BEGUN._replace(stage=replace(EXX, train_images=12_800, epochs=1000)))
    for step in range(1, 301):
        view(Stepped(3, step, 0.1, torch.tensor([1.0, 64.0 * step]), 128 * step))
    before = [(0.5, KEPT[1].history[0].train_top1), (1.5, KEPT[1].history[1].train_top1)]
    assert view.training == [*before, (2.25, 50), (2.75, 50)]


def test_twenty_points_an_epoch_of_training(view: micronet.Dashboard) -> None:
    """Each of what has been trained since the one before it; an epoch that ends between two redraws is one."""
    view(BEGUN._replace(stage=replace(EXX, train_images=12_800), history=[]))  # 300 steps an epoch
    for epoch in (1, 2):
        hits = 0.0
        for step in range(1, 301):
            hits += 32 * epoch if step <= 150 else 64
            view(Stepped(epoch, step, 0.1, torch.tensor([1.0, hits]), 128 * step))
        view(EpochDone(record(epoch, 50.0), record(1, 50.0)))
    view(EpochDone(record(3, 50.0), record(1, 50.0)))
    assert view.training[:20] == [pytest.approx(((n + 0.5) / 20, 25 if n < 10 else 50)) for n in range(20)]
    assert view.training[20:40] == [pytest.approx((1 + (n + 0.5) / 20, 50)) for n in range(20)]
    assert view.training[40:] == [(2.5, record(3, 50.0).train_top1)]


def test_ascii_has_a_sign_for_everything() -> None:
    console = terminal(80, 40, "ascii", color_system=None)
    bars = [Text(micronet.spark(values)) for values in ([0, 7], [3, 5, 8])]
    console.print(micronet.stages_picture(KEPT[:2], ["trouble"], 80, 40), *bars)
    written = written_on(console)
    assert "?" not in written and "+ done" in written and "! stopped" in written
    assert "|- - - - - " in written and " *-------" in written and " ........" in written
    assert " -- test top-1, %  .. training  - - teacher 81.25" in written


@pytest.mark.parametrize("variable", ["FORCE_COLOR", "TTY_COMPATIBLE", "NO_COLOR"])
def test_a_pipe_gets_a_line_an_epoch(variable: str, monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "1")
    console = Console(file=io.StringIO(), width=100)
    with micronet.choose_view(console, KEPT) as view:
        for event in (BEGUN, *EPOCHS, STEP, LAST):
            view(event)
    assert console.file.getvalue().splitlines() == [
        "stage a-long-name: efficientnet_exx, 2,418,650 parameters, score 0.066818, "
        "70 epochs of 5 steps of 128 images, seed 7",
        "teacher: b0, 81.25 % top-1, epoch 2 of stage first",
        "runs on: CPU (x86_64), 2 processes, bf16, compiled by inductor; started without accelerate launch: "
        "no config file is read",
        "WARNING: a note",
        "goes on after epoch 2 of 70",
        "a-long-name  epoch 3/70  lr 0.213  train loss 3.375 top-1 15.50 %  "
        "test loss 1.375 top-1 62.00 % top-5 81.00 %  best 62.00 %  1,003 images/s  23.0 s",
        "a-long-name  epoch 4/70  lr 0.16  train loss 3.500 top-1 15.00 %  "
        "test loss 1.500 top-1 60.00 % top-5 80.00 %  best 62.00 %  1,004 images/s  24.0 s",
        "a-long-name  epoch 70/70  lr 0.00914  train loss 11.750 top-1 15.00 %  "
        "test loss 9.750 top-1 60.00 % top-5 80.00 %  best 62.00 %  1,070 images/s  1:30 min",
        "stage a-long-name is finished: top-1 62.00 % (best, epoch 3), 60.00 % (last, epoch 70)",
    ]


def test_an_introduction_says_what_there_is_none_of(monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setattr(micronet, "is_launched", lambda: True)
    begun = Started(B0, FACTS._replace(processes=1, compile=None), COST, {}, [], [])
    lines = micronet.introduction(begun)
    assert lines[1:] == ["teacher: none: the true labels", "runs on: CPU (x86_64), 1 process, bf16, not compiled"]


def test_the_picture_of_what_is_kept() -> None:
    """A curve for each stage, below its pace, and the table last; in a frame the youngest curve, and last."""
    lines = drawn(micronet.stages_picture(KEPT[:2], ["b0 failed: no room"], 80), 80)
    heads = [i for i, line in enumerate(lines) if "images/s" in line]
    assert [lines[i] for i in heads] == [
        "b0: 1,003 images/s, 22.0 s an epoch", "a-long-name: 1,002 images/s, 21.5 s an epoch, 24:22 min left",
    ]  # fmt: skip
    assert ["teacher 81.25" in lines[i + 12] for i in heads] == [False, True]
    assert lines[-2].split()[:2] == ["a-long-name", "exx"] and lines[-1] == "b0 failed: no room"
    for width, height in ((160, 50), (80, 24), (60, 20), (60, 12)):
        lines = drawn(micronet.stages_picture(KEPT[:2], ["b0 failed: no room"], width, height), width)
        assert lines[0].startswith("╭─ micronet: 1 of 2 stages done ─") and len(lines) < height
        going = [KEPT[0], replace(KEPT[1], state="running")]
        title = drawn(micronet.stages_picture(going, [], width, height), width)[0]
        assert title.startswith("╭─ micronet: 1 of 2 stages done, 24:22 min left ─")
        text = "".join(lines)
        escaped = "".join(drawn(micronet.stages_picture(KEPT[:2], ["\x1b[2J"], width, height), width))
        assert "\x1b" not in escaped and "?[2J" in escaped
        assert "│ b0 failed: no room" in text and ("│ a-long-name: 1,002 images/s, " in text) == (height > 12)
        assert "b0: 1,003" not in text
        many = [replace(KEPT[0], stage=replace(B0, name=f"s{i}")) for i in range(29)]
        many[3] = replace(many[3], state="running")
        text = "".join(drawn(micronet.stages_picture(many, ["no room"], width, height), width))
        assert "► running" in text and "│ no room" in text and ("│ s3: 1,003" in text) == (height > 12)
        pictures = ([replace(KEPT[0], state="running"), KEPT[1]], []), (KEPT[:2], 99 * ["no room"])
        running, crowded = (drawn(micronet.stages_picture(*each, width, height), width) for each in pictures)
        assert ("│ b0: 1,003 images/s" in "".join(running)) == (height > 12) and len(crowded) < height


def test_a_failure_is_said_once_and_not_of_a_finished_stage(tmp_path: Path) -> None:
    states = [each.metadata and micronet.State(tmp_path, {}, each.metadata) for each in KEPT]
    known = [(each.stage, state, tmp_path) for each, state in zip(KEPT, states)]
    assert [micronet.kept_as(*each).state for each in known] == ["done", "stopped", "waiting"]
    for name in ("b0", "a-long-name", "later", "lost"):
        (tmp_path / f".{name}.lock").write_text(f"failed: no room for {name}")
    failed = [micronet.kept_as(*each) for each in known]
    assert [(each.state, each.failure) for each in failed] == [
        ("done", None), ("failed", "no room for a-long-name"), ("failed", "no room for later"),
    ]  # fmt: skip
    lines = micronet.failure_lines(tmp_path, failed, ["no room for later"])
    assert lines == ["a-long-name failed: no room for a-long-name", "lost failed: no room for lost"]


def test_show(trained: Path, tmp_path: Path) -> None:
    ckpt = trained / "ckpt"
    result = invoke("show", "--ckpt", ckpt, "--svg", tmp_path / "chain.svg")
    rows = [line.split() for line in result.output.splitlines() if " done " in line]
    assert [row[0] for row in rows] == ["first", "second"] and result.output.count("⠒⠒ test top-1, %") == 2
    svg = (tmp_path / "chain.svg").read_text()
    assert svg.startswith("<svg") and "second" in svg and svg.count("training") == 2
    results = json.loads(invoke("show", "--ckpt", ckpt, "--json").stdout)
    assert results == micronet.stages_as_json(micronet.kept_stages(ckpt)[0]) and len(results) == 2
    assert results[1]["best"] == micronet.read_metadata(ckpt / "second" / "best.safetensors").best._asdict()


def test_teachers_that_go_round_are_shown() -> None:
    """A stage that was taught by a later one, before stages.toml was turned round."""
    turned = {B0.name: replace(B0, teacher=EXX.name), EXX.name: EXX}
    assert {stage.name for stage in micronet.with_parents(turned, list(turned))} == set(turned)


@pytest.mark.parametrize("damage", ["last", "both", "all", "folder", "lock"])
def test_a_damaged_stage_hides_no_other(damage: str, trained: Path, tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    ckpt, real = shutil.copytree(trained / "ckpt", tmp_path / "ckpt"), micronet.find_state
    last, lock = ckpt / "first" / "last.safetensors", ckpt / ".first.lock"
    if damage == "folder":  # whose permissions do not hold root back
        denied = Mock(side_effect=PermissionError(13, "Permission denied", str(last)))
        monkeypatch.setattr(micronet, "find_state", lambda folder: (denied if folder == last.parent else real)(folder))
    if damage == "lock":
        lock.unlink()
        os.mkfifo(lock)
    files = {"last": "first/last.*", "both": "first/*.safetensors", "all": "*/*.safetensors"}
    for path in ckpt.glob(files.get(damage, "none")):
        path.write_bytes(b"damaged")
    for options in ([], ["--json"]):
        result = invoke("show", "--ckpt", ckpt, *options)
        shown = re.findall(r'^(first|second) |"stage": "(?=first|second)(\w+)"', result.stdout, re.M)
        named = {"lock": ["first", "second"], "last": ["first", "second"], "all": []}.get(damage, ["second"])
        assert ["".join(names) for names in shown] == named
        if damage == "lock":
            assert result.exit_code == 0
        else:
            assert (result.exit_code, result.stderr.count("\n")) == (3, 1) and str(last) in result.stderr
            assert (str(ckpt / "second" / "previous.safetensors") in result.stderr) == (damage == "all")
    if damage == "all":  # followed, each in a line
        lines = drawn(micronet.stages_picture(*micronet.kept_stages(ckpt), 80, 24), 80)
        assert len(lines) < 24 and "none can be read" in lines[1]


@pytest.mark.parametrize(("arguments", "message"), [
    (["--ckpt", "missing"], "missing: no such folder"), (["--follow", "--ckpt", "."], "--follow: standard output"),
    (["--follow", "--json", "--ckpt", "."], "--follow: keeps drawing"),
])  # fmt: skip
def test_show_refuses_in_one_line(arguments: list[str], message: str, monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # which makes no terminal to follow on
    assert refused(invoke("show", *arguments), message)


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["show", "--ckpt", "KEPT"], ["run-stage", "--help"]])
def test_what_computes_nothing_comes_up_at_once(arguments: list[str], trained: Path) -> None:
    """Nothing that takes its time to import is imported."""
    words = [str(trained / "ckpt") if word == "KEPT" else word for word in arguments]
    command = [sys.executable, "-X", "importtime", ROOT / "micronet.py", *words]
    lines = subprocess.run(command, check=True, capture_output=True, text=True, env=WIDE).stderr.splitlines()
    imported = {line.split("|")[-1].strip().split(".")[0] for line in lines if line.startswith("import time")}
    assert {"rich", "typer"} <= imported and not imported & {"torch", "numpy", "accelerate", "safetensors", "yaml"}
