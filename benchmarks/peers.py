"""Compare micronet with timm: in turns, on this machine's CPU in fp32, in one run.

    pip install timm==1.0.31
    git clone --depth 1 --branch v1.0.31 https://github.com/huggingface/pytorch-image-models
    python benchmarks/peers.py --timm pytorch-image-models

Every round trains some steps of a stage with timm's own train.py, unchanged, and then with `micronet.py bench`. Both
train our student under our teacher (random weights) on the same data, batch size, optimiser and number of threads, and
the loss is the same but for a constant: timm's distillation at temperature 1, with no weight on the true labels.
Printed are the rates, by the median step of a round, and the peak memory, as median and range over the rounds.

What is not the same: timm augments with PIL in loader processes, which may find cores of their own. Its jitter changes
the saturation, too; its random resized crop takes the whole image here. It computes the true labels' loss, whatever
its weight, and reads the loss every step. It does not fold its teacher's batch norms, and leaves malloc as it is.
"""

import argparse
import importlib.util
import json
import os
import resource
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil
import torch
from run import ROOT, spread
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

sys.path.insert(0, str(ROOT))
from micronet import MEAN, STD, VIEWS, WARM_UP, Failure, Stage, build_network, find_stage, load_stages, usable_cores


class Logits(nn.Module):
    """One of our networks as timm takes it: normalised images (N, 3, side, side) to scaled cosines (N, K)."""

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.network, self.scale = build_network(stage, stage.stochastic_depth), stage.scale
        self.num_classes, self.in_chans = stage.classes, 3
        self.pretrained_cfg = {"input_size": (3, stage.side, stage.side), "mean": MEAN, "std": STD, "crop_pct": 1.0}

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.network(x)


class Measured(Exception):
    """Enough steps are done."""


class Meter:
    """Hooks that note when each step ends and what the teacher does, and end the run after enough steps."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.times: list[float] = []
        self.parameters = self.taught = 0  # values that the optimiser trains, images that the teacher has labelled
        self.loaders: list[float] = []  # MiB that each loader process shares with no other, at the end

    def teach(self, teacher: nn.Module, _: object, logits: Tensor) -> None:
        if not (teacher.training or logits.requires_grad):
            self.taught += len(logits)

    def step(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        self.times.append(time.perf_counter())
        if len(self.times) > WARM_UP + self.steps:
            self.parameters = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
            self.loaders = [loader.memory_full_info().uss / 2**20 for loader in psutil.Process().children()]
            raise Measured


def arguments(stage: Stage, data: Path, workers: int, output: str) -> list[str]:
    """Return the arguments of timm's train.py that train a stage as near to our way as they go."""
    view = VIEWS[stage.views[0]]
    loss = "--kd-model-name micronet_teacher --kd-temperature 1 --task-loss-weight 0 --smoothing 0"
    images = f"--dataset torch/{stage.dataset} --batch-size {stage.batch_size} --workers {workers}"
    views = f"--color-jitter {view.jitter} --scale {view.area[0]} {view.area[1]} --train-interpolation bilinear"
    aspect = f"--ratio {view.aspect[0]} {view.aspect[1]} --channels-last --device cpu --lr 0.1"
    sgd = f"--opt momentum --momentum {stage.momentum} --weight-decay {stage.weight_decay}"  # without Nesterov
    every = "--opt-kwargs filter_bias_and_bn=False"  # weight decay on every parameter
    words = " ".join(["--model micronet_student", loss, images, views, aspect, sgd, every]).split()
    return [*words, "--data-dir", str(data), "--val-split", "", "--output", output]


def measure_timm(script: Path, stage: Stage, teacher: Stage, data: Path, workers: int, steps: int) -> dict:
    """Run timm's train.py in this process for some steps; exits where it did not train what it was to train."""
    from timm.models import register_model

    meter = Meter(steps)

    def micronet_student(**_: object) -> nn.Module:
        return Logits(stage)

    def micronet_teacher(**_: object) -> nn.Module:
        network = Logits(teacher)
        network.register_forward_hook(meter.teach)
        return network

    register_model(micronet_student)
    register_model(micronet_teacher)
    register_optimizer_step_post_hook(meter.step)
    with tempfile.TemporaryDirectory() as output, suppress(Measured):
        sys.argv = [str(script), *arguments(stage, data, workers, output)]
        runpy.run_path(str(script), run_name="__main__")
    expected = sum(p.numel() for p in build_network(stage).parameters())
    if meter.parameters != expected:
        sys.exit(f"timm trains {meter.parameters:,} parameters, expected {expected:,}")
    if meter.taught != len(meter.times) * stage.batch_size:
        sys.exit(f"the teacher labelled {meter.taught:,} images in {len(meter.times)} steps of {stage.batch_size}")
    times = meter.times[WARM_UP:]
    return {
        "images_per_second": stage.batch_size / statistics.median(b - a for a, b in zip(times, times[1:])),
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10,
        "loaders_mb": sum(meter.loaders),
        "runs_on": f"{torch.get_num_threads()} thread(s) and {len(meter.loaders)} loaders",
        "parameters": meter.parameters,
    }


def measure(*command: object) -> dict:
    """Run a benchmark in a process of its own, on the CPU, and return what it prints as JSON."""
    environment = {"OMP_NUM_THREADS": str(usable_cores()), **os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = (sys.executable, *map(str, command))
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"{' '.join(command)} failed: {(result.stderr.splitlines() or ['it says nothing'])[-1]}")
    measured = json.loads(result.stdout)
    return measured[0] if isinstance(measured, list) else measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--timm", type=Path, required=True, help="clone of timm's repository")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=50, help="steps that are timed, a round")
    parser.add_argument("--stages", type=Path, default=ROOT / "laptop.toml")
    parser.add_argument("--stage", default="ex", help="one with a teacher and one view, on CIFAR")
    parser.add_argument("--data", type=Path, default=ROOT / "data", help="folder with CIFAR")
    parser.add_argument("--workers", type=int, default=2, help="timm's loader processes; its own default is 4")
    parser.add_argument("--only-timm", action="store_true", help=argparse.SUPPRESS)  # half a round, in this process
    options = parser.parse_args()

    script, stages_file, data = options.timm / "train.py", options.stages, options.data
    if importlib.util.find_spec("timm") is None:
        sys.exit("timm is missing: pip install timm==1.0.31")
    if not script.is_file() or "--kd-model-name" not in script.read_text():
        sys.exit(f"{script} is missing or too old to distil: clone timm's repository at the version installed")
    try:
        stages = load_stages(stages_file, data)
        stage = find_stage(stages, options.stage)
    except Failure as failure:
        sys.exit(str(failure))
    plain = len(stage.views) == 1 and stage.dataset.startswith("cifar") and not (stage.start or stage.sparsity)
    if stage.teacher not in stages or not plain:
        sys.exit(
            f"stage {stage.name}: expected a teacher of {stages_file}, one view and CIFAR, no start and no sparsity"
        )
    if options.only_timm:
        teacher = stages[stage.teacher]
        print(json.dumps(measure_timm(script, stage, teacher, data, options.workers, options.steps)))
        return

    ours = [ROOT / "micronet.py", "bench", stage.name, "--stages", stages_file, "--data", data, "--json"]
    ours += ["--steps", options.steps, "--config-file", ROOT / "accelerate_config.yaml"]
    rounds = []
    for number in range(1, options.rounds + 1):
        pair = measure(__file__, *sys.argv[1:], "--only-timm"), measure(*ours)
        rounds.append(pair)
        rates = [f"{result['images_per_second']:,.1f}" for result in pair]
        print(f"round {number}: timm {rates[0]} images/s, micronet {rates[1]} images/s", flush=True)

    theirs, last = rounds[-1]
    print(f"{last['device']}, {last['precision']}, batch {last['batch_size']}, {theirs['parameters']:,} parameters")
    print(f"timm on {theirs['runs_on']}, micronet on {last['threads']} thread(s)")
    for name, digits in (("images_per_second", 1), ("peak_memory_mb", 0)):
        for label, results in zip(("timm", "micronet"), zip(*rounds)):
            print(f"{label} {name}: {spread([result[name] for result in results], digits)}")
        print(f"ratio of {name}: {spread([ours[name] / timm[name] for timm, ours in rounds])}")
    print(f"loaders_mb of timm, beside that: {spread([timm['loaders_mb'] for timm, _ in rounds], 0)}")


if __name__ == "__main__":
    main()
