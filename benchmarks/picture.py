"""Draw the dashboard as it stands some steps after a stage goes on from what it has kept: for README.

    python benchmarks/picture.py ex --stages benchmarks/curve.toml --ckpt ckpt/curve --steps 400 --svg benchmarks/chain.svg

The stage trains for these steps in this process, and nothing of them is kept.
"""

import io
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import micronet


def main(
    name: str,
    stages: Annotated[Path, typer.Option()],
    ckpt: Annotated[Path, typer.Option()],
    svg: Annotated[Path, typer.Option()],
    data: Annotated[Path, typer.Option()] = Path("data"),
    steps: Annotated[int, typer.Option(min=1)] = 400,
) -> None:
    every = micronet.load_stages(stages)
    kept = [micronet.read_kept(stage, ckpt) for stage in every.values()]
    console = Console(file=io.StringIO(), force_terminal=True, width=100, height=34)
    view = micronet.Dashboard(console, kept)
    state = micronet.kept_state(every[name], ckpt, whole=True)
    run = micronet.open_run(every[name], data, ckpt, micronet.open_accelerator(), state)
    with view:
        for event in micronet.train_stage(every[name], run):
            view(event)
            steps -= isinstance(event, micronet.Stepped)
            if steps == 0:
                svg.write_text(micronet.as_svg(view.picture(), "micronet chain"))
                return


if __name__ == "__main__":
    typer.run(main)
