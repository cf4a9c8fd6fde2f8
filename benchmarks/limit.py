"""Tell what bounds a stage's training on this device: how much of a step it is idle, and how near it is to its limit.

    python benchmarks/limit.py ex --stages stages.toml --steps 10

`idle` is the share of a step in which the device computes nothing (on a CPU: its cores, on average). `limit` is the
share of a step that its bytes or operations need at the device's own rates, whichever is more: the traffic of the
student's forward pass, twice that for backward, and the teacher's. On random images; prints one JSON object.
"""

import json
import sys
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import micronet
from micronet import SIDE, Clock, Run, Stage, train_timed


def judge(stage: Stage, run: Run, steps: int) -> dict[str, float]:
    """Measure a run's speed, its idle share and its limit."""
    device, facts = run.accelerator.device, run.facts
    used, begun = time.process_time(), time.perf_counter()
    speed = micronet.measure_speed(stage, run, steps)
    step = stage.batch_size / speed["images_per_second"]
    idle = 1 - (time.process_time() - used) / (time.perf_counter() - begun) / facts.threads
    if device.type == "cuda":
        idle = 1 - device_seconds(stage, run, steps) / (steps * step)
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(facts.precision, torch.float32)
    bandwidth, rate = device_rates(device, kind)
    moved, macs = (3 * n for n in traffic(run.student))
    if run.teacher:
        moved, macs = (n + m for n, m in zip((moved, macs), traffic(run.teacher)))
    images = stage.batch_size / facts.processes
    least = images * max(moved * kind.itemsize / bandwidth, 2 * macs / rate)
    return speed | {"idle": max(0.0, idle), "limit": least / step}


def device_seconds(stage: Stage, run: Run, steps: int) -> float:
    """Return for how long the kernels of some steps keep a GPU busy."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        train_timed(stage, run, steps)
    return sum(event.self_device_time_total for event in profile.key_averages()) / 1e6


def device_rates(device: torch.device, kind: torch.dtype) -> tuple[float, float]:  # bytes/s, operations/s
    """Measure how fast a device copies memory (bytes read and written) and multiplies matrices; the best of five."""
    side = 8192 if device.type == "cuda" else 2048
    matrix, source = torch.ones(side, side, device=device, dtype=kind), torch.ones(2**26, device=device)
    target, clock = torch.empty_like(source), Clock(device)
    for _ in range(6):  # the first warms up
        clock.mark("begin")
        target.copy_(source)
        clock.mark("copy")
        matrix @ matrix
        clock.mark("multiply")
    best = {part: min(s for p, s in clock.seconds()[2:] if p == part) for part in ("copy", "multiply")}
    return 2 * source.nbytes / best["copy"], 2 * side**3 / best["multiply"]


def traffic(network: nn.Module) -> tuple[int, int]:
    """Return how many elements a forward pass moves for one image, and its multiply-accumulates.

    Every leaf module reads its input and writes its output once; weights are shared by a batch and not counted.
    """
    moved = macs = 0

    def count(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        nonlocal moved, macs
        moved += inputs[0].numel() + output.numel()
        if isinstance(module, nn.Conv2d | nn.Linear):
            macs += output.numel() * module.weight[0].numel()

    hooks = [module.register_forward_hook(count) for module in network.modules() if not list(module.children())]
    weight = next(network.parameters())
    with torch.no_grad():
        network.eval()(torch.zeros(1, 3, SIDE, SIDE, device=weight.device, dtype=weight.dtype))
    for hook in hooks:
        hook.remove()
    return moved, macs


def main(
    name: str,
    stages: Annotated[Path, typer.Option()] = Path("stages.toml"),
    steps: Annotated[int, typer.Option(min=1)] = 10,
) -> None:
    every = micronet.load_stages(stages)
    micronet.keep_freed_memory()  # as `bench` does
    stage, run = micronet.bare_run(micronet.find_stage(every, name), every, None, steps)
    judged = judge(stage, run, steps)
    if run.accelerator.is_main_process:
        print(json.dumps(judged))


if __name__ == "__main__":
    typer.run(main)
