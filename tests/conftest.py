"""Shared fixtures. The thread count is pinned before torch starts: it decides bits, and two cores are shared."""

import os
import signal

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored, and the program lets it be
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TERM"] = "xterm-256color"
for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):  # what rich heeds
    os.environ.pop(name, None)

import importlib.util
import io
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from rich.console import RenderableType
from typer.testing import CliRunner, Result

import micronet

ROOT = Path(micronet.__file__).parent

TINY = """
[defaults]
dataset = "synthetic"
train_images = 40
test_images = 50
batch_size = 20
epochs = 3
lr = [[2, 0.02], [3, 0.002]]
width = 0.1
depth = 0.1

[stage.first]
network = "efficientnet_b0"
stochastic_depth = 0.2

[stage.second]
network = "efficientnet_ex"
teacher = "first"
"""


ONE_EPOCH = TINY.replace("epochs = 3", "epochs = 1").replace("[[2, 0.02], [3, 0.002]]", "[[1, 0.02]]")

# Files that take a minute or more: started first, each by a worker of its own.
SLOW = ("test_readme", "test_program", "test_reliability")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem not in SLOW)
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """Let every test open an accelerator of its own, whatever its fixtures have opened, and leave none to others'."""
    reset_accelerate()
    yield
    reset_accelerate()


def reset_accelerate() -> None:
    """Forget the accelerator of this process, so that it can open another."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(scope="session")
def cifar100() -> Path:
    data = ROOT / "data"
    if not (data / "cifar-100-python" / "train").exists():
        pytest.skip("no CIFAR-100 in data/")
    return data


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two trained stages, in a folder that nobody may change: stages.toml, and ckpt."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "stages.toml").write_text(TINY)
    for name in ("first", "second"):
        result = invoke("run-stage", name, "--stages", folder / "stages.toml", "--ckpt", folder / "ckpt")
        assert result.exit_code == 0, result.output
    return folder


@pytest.fixture(scope="session")
def plain() -> ModuleType:
    """benchmarks/plain.py as a module."""
    return load_script("plain")


def load_script(name: str) -> ModuleType:
    """Return a script of benchmarks/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write a stages file and return its path."""

    def write(text: str = TINY, name: str = "stages.toml") -> Path:
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


# The readline module sets COLUMNS=80 where os.environ does not look, but a child process does.
WIDE = os.environ | {"COLUMNS": "200"}


def build_network(
    name: str,
    classes: int = 100,
    width: float | None = None,
    depth: float | None = None,
    stochastic_depth: float = 0.0,
    side: int = 32,
) -> micronet.EfficientNet:
    """Build a network with fresh weights."""
    dataset = {100: "cifar100", 10: "cifar10"}[classes]
    stage = micronet.Stage("built", network=name, width=width, depth=depth, side=side, dataset=dataset)
    return micronet.build_network(stage, stochastic_depth)


def invoke(*arguments: object) -> Result:
    """Run a command in this process, which forgets the accelerator of what it has run before."""
    reset_accelerate()
    return CliRunner().invoke(micronet.app, [str(a) for a in arguments], catch_exceptions=False, env={"COLUMNS": "200"})


def refused(result: Result, *words: str, code: int = 2, shown: bool = False) -> bool:
    """See that a command has ended with a line and a code, and `shown` nothing else; tell whether the line says so."""
    assert (result.exit_code, result.stderr.count("\n")) == (code, 1), result.output
    return (shown or not result.stdout) and all(word in result.stderr for word in words)


def program(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    """Run the program in a process of its own, without a terminal."""
    command = [sys.executable, str(ROOT / "micronet.py"), *map(str, arguments)]
    options = {"env": WIDE, "stdin": subprocess.DEVNULL, "timeout": 300} | options
    return subprocess.run(command, capture_output=True, text=True, **options)


def drawn(picture: RenderableType, width: int = 120) -> list[str]:
    """Return the lines of a picture as a console of that width shows them."""
    console = micronet.Screen(file=io.StringIO(), width=width)
    console.print(picture)
    return console.file.getvalue().splitlines()
