"""What tables show: every figure is another number here and is looked for in its own row and column."""

import copy
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import rich.box
from conftest import drawn, invoke
from rich.table import Table

import micronet
from micronet import Cost, Facts, Kept, Metadata, Parent, Record, Stage


def record(epoch: int, top1: float) -> Record:
    """Return an epoch whose figures no other epoch has."""
    n = epoch / 8
    return Record(epoch, 0.64 / epoch, 3 + n, top1 / 4, 1 + n, top1, 50 + top1 / 2, 20.0 + epoch, 1000.0 + epoch)


def kept(stage: Stage, top1: list[float], best: int, cost: Cost, teacher: Parent | None, state: str) -> Kept:
    """Return a stage whose epochs have come to these accuracies."""
    history = tuple(record(n + 1, value) for n, value in enumerate(top1))
    tested = [micronet.tested_at(history[epoch - 1]) for epoch in (best, len(history))]
    return Kept(stage, Metadata(stage, (), len(history), *tested, history, teacher, None, cost, FACTS), state)


FACTS = Facts("CPU (x86_64)", 2, 1, 3, "AVX2", "bf16", "inductor", {"torch": "2"}, "0a1b2c")
TEACHER = Parent("b0", "first", "f" * 64, micronet.Tested(2, 81.25, 95.5))
B0 = Stage("b0", network="efficientnet_b0", epochs=3)
EXX = Stage("a-long-name", network="efficientnet_exx", teacher="b0", train_images=200, seed=7)
LATER = replace(B0, name="later", network="efficientnet_b3", teacher=EXX.name, train_images=256, batch_size=256)
COST = Cost(2_418_650, 232_355_234, 240_023_000, 233_350_000)
KEPT = [
    kept(B0, [78.0, 81.25, 80.5], 2, Cost(4_200_000, 450_000_000, 300_000_000, 310_000_000), None, "done"),
    kept(EXX, [44.0, 42.0], 1, COST, TEACHER, "stopped"),
    Kept(LATER),
]


def cells(table: Table) -> list[list[str]]:
    """Return what each line of a drawn table, headings first, has in each column."""
    table = copy.copy(table)
    table.box = rich.box.MARKDOWN  # whose bars tell columns apart
    lines = [line for line in drawn(table, 200) if "|" in line and not set(line) <= {"|", "-"}]
    return [[cell.strip() for cell in line[1:-1].split("|")] for line in lines]


def grid(text: str) -> list[list[str]]:
    """Read what `cells` is to return; || ends a line, too."""
    return [[cell.strip() for cell in line.split("|")] for line in text.strip().replace("||", "\n").splitlines()]


SCORE = {
    "name": "ckpt/exx", "rules": "official", "params": 1_234_567, "flops": 2_345_678, "mults": 3_456_789,
    "adds": 4_567_890, "ops": 5_678_901.0, "score": 0.067891, "ops_32bit": 7_890_123, "score_32bit": 0.089012,
    "ops_narrow": None, "score_narrow": None, "top1": 79.46, "layers": [
        {"layer": "stem", "kind": "Conv2d", "params": 11_111, "flops": 22_222, "mults": 33_333, "adds": 44_444,
         "score": 0.0169},
        {"layer": "head", "kind": "Linear", "params": 66, "flops": 77, "mults": 88, "adds": 99, "score": 0.05},
    ],
}  # fmt: skip
OTHER = SCORE | {"name": "efficientnet_b0", "params": 4_285_556, "score": 0.2, "top1": None}
BY_SEED = SCORE | {"name": "efficientnet_exx", "rules": "seed", "params": 2_418_650}
EIGHT = SCORE | {"name": "8.onnx", "ops_32bit": None, "score_32bit": None, "ops_narrow": 67.8, "score_narrow": 0.011}
OFFICIAL, SEED = micronet.score_tables([BY_SEED, SCORE, OTHER, EIGHT]).renderables

ACCURACY = {"checkpoint": "a", "network": "efficientnet_ex", "dataset": "cifar100", "images": 10_000, "top1": 79.46,
            "top5": 95.12, "loss": 0.8765, "precision": "bf16"}  # fmt: skip
EXPORT = {"file": "ex.onnx", "bytes": 5_432_109, "counted_bytes": 5_304_584.0, "images": 9_999, "on": "test images",
          "agree": 9_876, "difference": 0.0123, "largest": 4.56, "top1_before": 80.12, "top1": 79.34,
          "score": 0.072284, "probabilities_off": {"mean": 0.0123, "most": 0.4567}, "milliseconds": [1.23, 4.56]}  # fmt: skip
SPEED = {"stage": "exx", "network": "efficientnet_ex", "teacher": "b0", "device": "a GPU", "precision": "bf16",
         "processes": 2, "threads": 3, "compile": None, "batch_size": 128, "images_per_second": 1234.56,
         "seconds": {"views": 0.001, "teacher": 0.0022, "forward": 0.0033, "backward": 0.0044, "optimizer": 0.0055},
         "peak_memory_mb": 789.1, "images_left": 45_678, "seconds_left": 37.0}  # fmt: skip

TABLES = {  # by the beginning of its title
    "Kept, in three lines": (micronet.stages_table(KEPT, micronet.PROGRESS, "Kept, in three lines"), """
        stage       | network | taught by         | state   | epoch | best  | last  | time
        b0          | b0      | -                 | ✓ done    | 3/3   | 81.25 | 80.50 | 1:06 min
        a-long-name | exx     | b0 81.25          | ■ stopped | 2/70  | 44.00 | 42.00 | 43.0 s
        later       | b3      | a-long-name 44.00 | · waiting | 0/3   | -     | -     | -"""),
    "Few columns": (micronet.stages_table(KEPT, micronet.NARROW, "Few columns"), """
        stage       | teacher     | state     | epoch | best  | last
        b0          | -           | ✓ done    | 3/3   | 81.25 | 80.50
        a-long-name | b0          | ■ stopped | 2/70  | 44.00 | 42.00
        later       | a-long-name | · waiting | 0/3   | -     | -"""),
    "One alone": (micronet.stages_table(KEPT, micronet.PROGRESS, "One alone", slice(1, 2)), """
        stage       | network | taught by         | state   | epoch | best  | last  | time
        a-long-name | exx     | b0 81.25          | ■ stopped | 2/70  | 44.00 | 42.00 | 43.0 s"""),
    "To do": (micronet.stages_table(KEPT, micronet.PLAN, "To do"), """
        stage       | network | teacher           | to do   | epoch
        b0          | b0      | -                 | nothing | 3/3
        a-long-name | exx     | b0                | go on   | 2/70
        later       | b3      | a-long-name       | train   | 0/3"""),
    "Results": (micronet.stages_table(KEPT[:2], micronet.RESULTS, "Results"), """
                    |         |         | top-1 | top-1  | top-1 | top-5 | params | ops |        |
        stage       | network | teacher | best  | gain   | last  | best  | (M)    | (M) | score  | time
        b0          | b0      | -       | 81.25 | -      | 80.50 | 90.62 | 4.200  | 460 | 0.1014 | 1:06 min
        a-long-name | exx     | b0      | 44.00 | -37.25 | 42.00 | 72.00 | 2.419  | 353 | 0.0668 | 43.0 s"""),
    "Cost of one image by the challenge's rules: ": (OFFICIAL, """
                                | ckpt/exx  | b0        | 8.onnx
        parameters              | 1,234,567 | 4,285,556 | 1,234,567
        MACs                    | 2,345,678 | 2,345,678 | 2,345,678
        multiplications         | 3,456,789 | 3,456,789 | 3,456,789
        additions               | 4,567,890 | 4,567,890 | 4,567,890
        operations              | 5,678,901 | 5,678,901 | 5,678,901
        score                   | 0.067891  | 0.200000  | 0.067891
        operations 32-bit       | 7,890,123 | 7,890,123 | -
        score 32-bit            | 0.089012  | 0.089012  | -
        operations, narrow sums | -         | -         | 68
        score, narrow sums      | -         | -         | 0.011000
        top-1 in percent        | 79.46     | -         | 79.46"""),
    "Cost of one image by the authors' rules; ": (SEED, """
                          | exx
        parameters        | 2,418,650 || MACs              | 2,345,678 || multiplications | 3,456,789
        additions         | 4,567,890 || operations        | 5,678,901 || score           | 0.067891
        operations 32-bit | 7,890,123 || score 32-bit      | 0.089012  || top-1 in percent | 79.46"""),
    "Layers of ckpt/exx by the challenge's rules: ": (micronet.layers_table(SCORE), """
        layer | kind   | share  |            | score    | parameters | MACs   | multiplications | additions
        stem  | Conv2d | 24.9 % | ━━━        | 0.016900 | 11,111     | 22,222 | 33,333          | 44,444
        head  | Linear | 73.6 % | ━━━━━━━━━━ | 0.050000 | 66         | 77     | 88              | 99"""),
    "Test accuracy in percent": (micronet.accuracy_table([ACCURACY, ACCURACY | {"checkpoint": "b", "loss": None}]), """
        checkpoint | network         | images | top-1 | top-5 | loss   | precision
        a          | efficientnet_ex | 10,000 | 79.46 | 95.12 | 0.8765 | bf16
        b          | efficientnet_ex | 10,000 | 79.46 | 95.12 | -      | bf16"""),
    "Exported, read again": (micronet.export_table([EXPORT]), """
        file                        | ex.onnx                    || bytes                           | 5,432,109
        bytes of its values         | 5,304,584                  || predictions as before | 9,876 of 9,999 test images
        largest difference of an output | 0.012                  || largest output                  | 4.6
        top-1 before, as exported   | 80.12 %, 79.34 %
        probabilities off by, mean and most | 0.012, 0.457         || official score                | 0.072284
        ms an image, at 32 and 8 bits | 1.23, 4.56"""),
    "Training speed": (micronet.speed_table([SPEED]), """
                         | exx    || network             | ex       || teacher             | b0
        device           | a GPU  || precision, compiled | bf16, no || processes x threads | 2 x 3
        batch size       | 128    || images/s            | 1,234.6  || views, ms           | 1.0
        teacher, ms      | 2.2    || forward, ms         | 3.3      || backward, ms        | 4.4
        optimizer, ms    | 5.5    || peak memory, MiB    | 789      || images left         | 45,678
        time left        | 37.0 s"""),
}  # fmt: skip


@pytest.mark.parametrize("title", TABLES)
def test_every_figure_of_a_table_is_in_its_place(title: str) -> None:
    table, text = TABLES[title]
    assert cells(table) == grid(text) and table.title.startswith(title)


def test_a_chain_that_is_not_finished_shows_how_far_it_has_come() -> None:
    finished, unfinished = micronet.outcome_table(KEPT[:1]), micronet.outcome_table(KEPT)
    assert cells(finished) == cells(micronet.stages_table(KEPT[:1], micronet.RESULTS))
    assert cells(unfinished) == cells(micronet.stages_table(KEPT, micronet.PROGRESS))


def test_speeds_stand_beside_each_other_and_what_is_left_adds_up() -> None:
    table = micronet.speed_table([SPEED, SPEED | {"stage": "b3", "device": "a CPU", "seconds_left": 3623.0}])
    head, *rows = cells(table)
    assert head[1:] == ["exx", "b3"] and rows[2] == ["device", "a GPU", "a CPU"]
    assert table.caption.endswith(": 1:01 h")


def test_a_figure_of_several_words_stays_in_one_piece() -> None:
    table = micronet.speed_table([SPEED | {"stage": f"s{i}", "device": "NVIDIA GeForce RTX 4090"} for i in range(7)])
    lines = drawn(table, 80)
    labels, caption = (sum(words in line for line in lines) for words in ("precision, compiled", "one after the other"))
    assert "\n".join(lines).count("NVIDIA GeForce RTX 4090") == 7 and labels > 1 == caption


def test_a_stage_is_shown_with_the_accuracy_that_it_was_taught_with() -> None:
    """Its teacher may have been trained anew since."""
    anew = kept(B0, [10.0], 1, COST, None, "stopped")
    _, _, *rows = cells(micronet.stages_table([anew, *KEPT[1:], Kept(replace(EXX, name="next"))], micronet.PROGRESS))
    assert [row[2] for row in rows] == ["b0 81.25", "a-long-name 44.00", "b0 10.00"]
    unknown = replace(KEPT[1].metadata, teacher=TEACHER._replace(tested=micronet.Tested(70, None, None)))
    _, row = cells(micronet.stages_table([replace(KEPT[1], metadata=unknown)], micronet.PROGRESS))
    assert row[2] == "b0"
    (_, _, row) = cells(micronet.stages_table([replace(KEPT[1], metadata=unknown)], micronet.RESULTS))
    assert row[4] == "-"


def test_the_board() -> None:
    """Ours stand where their official scores belong."""
    head, *rows = cells(micronet.board_table([SCORE | {"rules": "seed", "score": 0.001}, SCORE, OTHER]))
    assert head == ["entry", "score", "top-1", "how"] and len(rows) == 8 and rows[0][:3] == ["RIAIR", "0.0044", "80.39"]
    assert rows[4] == ["► ckpt/exx", "0.0679", "79.46", "counted here"]
    assert rows[7] == ["► efficientnet_b0", "0.2000", "-", "counted here"]
    assert "".join(row[0] for row in rows).count("►") == 2


@pytest.mark.parametrize("title", TABLES)
@pytest.mark.parametrize("width", [45, 60])
def test_a_narrow_screen_shows_every_figure_whole(title: str, width: int) -> None:
    wide, narrow = drawn(TABLES[title][0], 200), drawn(TABLES[title][0], width)
    figures = [sorted(set(re.findall(r"[\d.,]+", " ".join(lines)))) for lines in (wide, narrow)]
    assert figures[0] == figures[1] and max(map(len, narrow)) <= width and "…" not in "".join(narrow)


def test_a_narrow_screen_repeats_the_names_in_further_tables() -> None:
    lines = [line.split() for line in drawn(TABLES["Results"][0], 60) if line.startswith(" b0 ")]
    names = ["b0", "b0", "-"]
    assert lines == [[*names, "81.25", "-", "80.50", "90.62"], [*names, "4.200", "460", "0.1014", "1:06", "min"]]


def test_stages_as_json() -> None:
    first, second = micronet.stages_as_json([KEPT[0], replace(KEPT[1], failure="full")])
    assert (first["stage"], first["teacher"], first["failure"]) == ("b0", None, None)
    assert second == {
        "stage": "a-long-name", "network": "efficientnet_exx", "teacher": "b0", "start": None, "sparsity": 0.0, "state": "stopped", "failure": "full",
        "epoch": 2, "epochs": 70, "seconds": 43.0, "best": {"epoch": 1, "top1": 44.0, "top5": 72.0},
        "last": {"epoch": 2, "top1": 42.0, "top5": 71.0}, "history": [r._asdict() for r in KEPT[1].history],
    }  # fmt: skip


def test_export_compares_what_it_has_written(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network whose classes lie so near each other that 16 bits change predictions, and all were right before."""
    path, out = tmp_path / "near.safetensors", tmp_path / "out.safetensors"
    tensors, about = micronet.load_checkpoint(trained / "ckpt" / "first" / "best.safetensors")
    tensors["cosine.kernel"] = tensors["cosine.kernel"][:, :1] + 1e-4 * tensors["cosine.kernel"]
    micronet.save_checkpoint(path, tensors, about)
    images, on = micronet.images_at_hand(about, tmp_path, micronet.unwatched)
    pixels = micronet.normalize(images.pixels.float() / 255)
    images = images._replace(labels=micronet.load_network(path)(pixels).argmax(1))
    monkeypatch.setattr(micronet, "images_at_hand", lambda *_: (images, on))
    (result,) = json.loads(invoke("export", path, out, "--json").stdout)
    folded, shipped = micronet.fold_network(micronet.load_network(path))(pixels), micronet.load_network(out)(pixels)
    agree = int((shipped.argmax(1) == images.labels).sum())
    assert 0 < agree < 50 and (result["agree"], result["images"]) == (agree, 50)
    assert (result["top1_before"], result["top1"]) == (100, 2 * agree)
    assert result["difference"] == pytest.approx((shipped - folded).abs().max().item(), rel=0.01)
    assert result["largest"] == pytest.approx(folded.abs().max().item())
