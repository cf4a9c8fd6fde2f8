"""README: every command and snippet, as it stands there."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, WIDE, build_network, invoke, load_script
from test_images import messy

from micronet import (
    Machine, cifar_files, find_parent, fold_network, layer_costs, load_network, load_stages, new_console, plan_launch,
    read_metadata, total_cost,
)  # fmt: skip

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    line.split("  #")[0].strip()
    for kind, block in BLOCKS
    if kind == "bash" and "#SBATCH" not in block
    for line in block.splitlines()
]
DEMO = "pip install uv && uv run micronet.py chain --stages demo.toml"


def arguments(command: str) -> list[str]:
    """Return what a command runs; without uv here, what `uv run` would run."""
    words = shlex.split(command.removeprefix("pip install uv && "))
    assert words[:2] == ["uv", "run"]
    if shutil.which("uv"):
        return words
    module = {"pytest": "pytest", "accelerate": "accelerate.commands.accelerate_cli"}.get(words[2])
    return [sys.executable, *(["-m", module, *words[3:]] if module else words[2:])]


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of the repository, in a folder of their own, after README's first command."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("micronet.py", "stages.toml", "demo.toml", "accelerate_config.yaml"):
        shutil.copy(ROOT / name, folder)
    start = time.monotonic()
    result = run(DEMO, folder)
    print(f"{DEMO}: {time.monotonic() - start:.0f} s")
    assert result.returncode == 0, result.stdout + result.stderr
    (folder / "demo.out").write_text(result.stdout)
    return folder


ENVIRONMENT = WIDE | {"VIRTUAL_ENV": sys.prefix}  # for uv


def run(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    options = dict(cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=600, stdin=subprocess.DEVNULL)
    return subprocess.run(arguments(command), **options)


def test_the_list_of_commands_is_complete() -> None:
    tested = {DEMO, "pip install uv && uv run pytest", *LONG, *SHORT, LAUNCH, *OWN}
    assert set(COMMANDS) == tested and max(map(len, README.splitlines())) <= 120


LAUNCH = "uv run accelerate launch --config_file accelerate_config.yaml micronet.py run-stage b3"
LONG = ["uv run micronet.py chain", "uv run micronet.py chain ex"]
SHORT = [
    "uv run micronet.py chain --dry-run",
    "uv run micronet.py evaluate ckpt/student",
    "uv run micronet.py score ckpt/student",
    "uv run micronet.py score --board",
    "uv run micronet.py show",
    "uv run micronet.py export ckpt/student student.safetensors",
]
OWN = {  # and what each of them prints; its first runs in a few seconds what takes hours
    "uv run micronet.py chain --stages own.toml": r"small +ex +big ",
    "uv run micronet.py evaluate ckpt/small --classes": r"dog +6 ",
    "uv run micronet.py score ckpt/small": r"MACs +[\d,]+",
    "uv run micronet.py export ckpt/small shipped/small.onnx --card": r"predictions as before +\d of 8 validation images",
    "uv run micronet.py predict shipped/small.onnx photo.jpg": r"photo.jpg +(cat|dog) \d",
}


def test_the_demo_teaches_its_student(clone: Path) -> None:
    output = (clone / "demo.out").read_text()
    rows = [line.split() for line in output.splitlines() if line.startswith((" teacher ", " student "))]
    assert [row[0] for row in rows] == ["teacher", "student"]
    best = read_metadata(clone / "ckpt" / "student" / "best.safetensors").best.top1
    assert best > 40 and float(rows[1][3]) == pytest.approx(best, abs=0.01)  # chance is 10


@pytest.mark.parametrize("command", SHORT)
def test_a_command(command: str, clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One as it stands; the others without what that one has shown, that `uv run micronet.py` starts it."""
    if "evaluate" in command:
        result = run(command, clone)
        code = result.returncode
    else:
        monkeypatch.chdir(clone)
        result = invoke(*shlex.split(command.removeprefix("uv run micronet.py ")))
        code = result.exit_code
    assert code == 0 and re.search(r"\bex\b|student", result.stdout), result.stderr


@pytest.mark.parametrize("command", LONG)
def test_a_long_command_is_understood(command: str, clone: Path) -> None:
    assert invoke(*arguments(command + " --dry-run")[-len(command.split()) + 2 :]).exit_code == 0


def test_a_stage_is_launched(clone: Path, cifar100: Path) -> None:
    """The whole of b3 takes days here: see that it begins, on two processes without a GPU, and stop it."""
    (clone / "data").symlink_to(cifar100)
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True)
    running = subprocess.Popen(arguments(LAUNCH), cwd=clone, env=ENVIRONMENT, start_new_session=True, **pipes)
    lines = [running.stdout.readline() for _ in range(3)]
    os.killpg(running.pid, signal.SIGTERM)
    _, errors = running.communicate(timeout=60)
    assert lines[0].startswith("stage b3: efficientnet_b3, 11,027,240 parameters"), errors
    assert lines[1] == "teacher: none: the true labels\n" and "2 processes, bf16, not compiled" in lines[2]


def test_own_images_from_a_folder_to_a_prediction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("own.toml", "accelerate_config.yaml"):
        shutil.copy(ROOT / name, tmp_path)
    messy(tmp_path / "data" / "own", {"train": 18, "val": 4, "test": 6})
    shutil.copy(tmp_path / "data" / "own" / "test" / "cat" / "0.JPG", tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    assert load_stages(Path("own.toml"))["small"].side == 96
    less = ["--set=epochs=1", "--set=width=0.1", "--set=depth=0.1", '--set=lr={schedule="cosine",peak=0.01}']
    for command, shown in OWN.items():
        result = invoke(*shlex.split(command)[3:], *(less if " chain " in command else []))
        assert result.exit_code == 0 and re.search(shown, result.stdout), result.output
    assert (tmp_path / "shipped" / "labels.txt").read_text() == "cat\ndog\n"


PUBLISHED = sorted(path for path in ROOT.glob("ckpt/published/**/*.safetensors") if path.stem != "best")


def images_are_here(checkpoint: Path) -> bool:
    return all(path.exists() for path in cifar_files(read_metadata(checkpoint).stage.dataset, ROOT / "data")[1])


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: "-".join(path.parts[-3:]))
def test_the_table_of_published_networks(path: Path) -> None:
    """Its figures are what `score` and, where the images are at hand, `evaluate` print; so are the model card's."""
    name = path.relative_to(ROOT)
    (row,) = (line.split(" | ") for line in README.splitlines() if f"({name})" in line)
    (cost,) = json.loads(invoke("score", path, "--rules", "official", "--json").stdout)
    assert row[1:4] == [f"{cost['params']:,}", f"{cost['flops']:,}", f"{path.stat().st_size:,}"]
    card = (path.parent / "README.md").read_text()
    assert f"| parameters | {cost['params']:,} |" in card
    assert f"of {path.name} | {row[4]} % of 10,000 test images of epoch " in card and ", the last |" in card
    if images_are_here(path):
        (result,) = json.loads(invoke("evaluate", path, "--data", ROOT / "data", "--json").stdout)
        assert result["top1"] == pytest.approx(float(row[4]), abs=0.02) and result["images"] == 10_000


def test_networks_are_published() -> None:
    assert len(PUBLISHED) == README.count("](ckpt/published/") >= 3


def test_the_published_teacher_is_the_network_of_its_row_and_can_teach(tmp_path: Path) -> None:
    (path,) = re.findall(r'`teacher = "(.*?)"`', README)
    about, row = read_metadata(ROOT / path), next(line for line in README.splitlines() if line.startswith("| [b0]("))
    assert row.split(" | ")[4] == f"{about.tested.top1:.2f}" and about.epoch == about.last.epoch
    (start,) = re.findall(r'`start = "(.*?)"`', README)
    pruned = load_stages(ROOT / "pruned.toml")["s80"]
    assert pruned.start == start and read_metadata(find_parent(pruned, "start", tmp_path)).stage.name == "plain"
    stages = (ROOT / "night.toml").read_text().replace("[stage.half]", f'[stage.half]\nteacher = "{ROOT / path}"')
    (tmp_path / "stages.toml").write_text(stages)
    half = load_stages(tmp_path / "stages.toml")["half"]
    assert find_parent(half, "teacher", tmp_path) == ROOT / path / "best.safetensors"


def test_the_published_teacher_for_cifar_100_is_as_readme_says() -> None:
    path = ROOT / "ckpt" / "published" / "small100" / "b0"
    about = read_metadata(path)
    folded = total_cost(layer_costs(fold_network(load_network(path)), "official").values())
    sentence = r"`ckpt/published/small100/b0`, ([\d,]+) parameters, ([\d,]+) MACs,\s+([\d.]+) %"
    (said,) = re.findall(sentence, README)
    assert said == (f"{folded.params:,}", f"{folded.flops:,}", f"{about.tested.top1:.2f}")
    assert about.stage == load_stages(ROOT / "small100.toml")["b0"] and about.epoch == about.last.epoch
    if images_are_here(path / "best.safetensors"):
        (result,) = json.loads(invoke("evaluate", path, "--data", ROOT / "data", "--json").stdout)
        assert result["top1"] == pytest.approx(float(said[2]), abs=0.02) and result["images"] == 10_000


@pytest.mark.parametrize("name", ["b3", "b0", "ex", "exx"])
def test_the_table_of_costs(name: str) -> None:
    network = build_network(f"efficientnet_{name}")
    ours = total_cost(layer_costs(network, "seed").values())
    exported = total_cost(layer_costs(fold_network(network), "official").values())
    (row,) = (line.split(" | ") for line in README.splitlines() if line.startswith((f"| {name} |", f"| {name}, ")))
    assert row[1:5] == [f"{ours.params:,}", f"{ours.ops:,.0f}", f"{ours.score:.4f}", f"{exported.score:.4f}"]


def test_the_stage_example(clone: Path, tmp_path: Path) -> None:
    texts = [block for kind, block in BLOCKS if kind == "toml"]
    path = tmp_path / "stages.toml"
    path.write_text((ROOT / "stages.toml").read_text() + "".join(texts))
    stage, pruned = (load_stages(path)[name] for name in ("tiny", "tiny_pruned"))
    assert (stage.teacher, stage.lr.peak, stage.width, stage.weight_decay) == ("b0", 0.2, 0.5, 1e-4)
    assert (pruned.start, pruned.sparsity, pruned.multipliers) == ("tiny", 0.8, stage.multipliers)


def test_the_picture_of_pruning_is_drawn_from_its_table() -> None:
    """Of five networks at 16 and 8 bits; s80's row is the published network's."""
    pruning, results = load_script("pruning"), (ROOT / "RESULTS.md").read_text()
    found = pruning.points(results)
    assert len(found) == 10 and ("s80", 16, 52_312, 86.61) in found
    assert (ROOT / "benchmarks" / "pruning.svg").read_text() == pruning.drawn(results)
    assert "| s80 | 12 | 80 % | 16,996 | 2.5 M | 86.62 | 86.61 |" in results


def test_the_example_of_several_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its launch is one that can be had where the GPUs are; its script is one that bash can read."""
    (cluster,) = [block for kind, block in BLOCKS if kind == "yaml"]
    (script,) = [block for kind, block in BLOCKS if kind == "bash" and "#SBATCH" in block]
    (tmp_path / "cluster.yaml").write_text(cluster)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    launch = plan_launch(tmp_path / "cluster.yaml", new_console(quiet=True), Machine(1, "10.0.0.1"))
    assert "--main_process_ip 10.0.0.1 --machine_rank 1" in " ".join(launch.command)
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    options = re.findall(r"--config-file|--main-process-ip", script)
    assert len(options) == 2 and all(option in invoke("chain", "--help").stdout for option in options)


def test_the_python_example(clone: Path) -> None:
    (snippet,) = (block for kind, block in BLOCKS if kind == "python")
    result = subprocess.run([sys.executable, "-c", snippet], cwd=clone, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert len(eval(result.stdout)) == 8 and set(eval(result.stdout)) <= set(CLASSES)


CLASSES = "disc ring square frame plus saltire diamond rows columns triangle".split()
