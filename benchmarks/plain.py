"""The yardstick: train a student the plain way, as tutorials write it, and print how fast that is.

    python benchmarks/plain.py --network efficientnet_ex --teacher efficientnet_b0 --data data

torchvision's CIFAR100 with PIL transforms in a DataLoader with workers, the three views as three concatenated data
sets, padding layers, x * sigmoid(x), fp32, contiguous tensors, the teacher run in the loop, `loss.item()` every step.
It shares nothing with micronet.py but the table of networks, and computes the same: tests/test_speed.py compares them.
Prints one JSON object; without CIFAR-100 in --data it trains on random images.
"""

import argparse
import json
import math
import resource
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset
from torchvision import transforms
from torchvision.datasets import CIFAR100, FakeData

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from micronet import BLOCKS, EMBEDDING, HEAD, MEAN, NETWORKS, STD, STEM, initialize, scaled_channels


class Swish(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


def padded(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """A "same" convolution: a padding layer, then the convolution, then batch norm."""
    first, last = (kernel - stride) // 2, (kernel - stride + 1) // 2
    return nn.Sequential(
        nn.ZeroPad2d((first, last, first, last)),
        nn.Conv2d(inputs, outputs, kernel, stride, groups=groups, bias=False),
        nn.BatchNorm2d(outputs, momentum=0.01),
    )


class Gate(nn.Module):
    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, squeezed, 1)
        self.swish = Swish()
        self.expand = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean((2, 3), keepdim=True)
        return x * torch.sigmoid(self.expand(self.swish(self.reduce(mean))))


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, expansion: int, kernel: int, stride: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        layers = [padded(inputs, hidden, 1), Swish()] if expansion > 1 else []
        layers += [padded(hidden, hidden, kernel, stride, hidden), Swish(), Gate(hidden, max(1, inputs // 4))]
        layers += [nn.Conv2d(hidden, outputs, 1), nn.BatchNorm2d(outputs, momentum=0.01)]
        self.layers = nn.Sequential(*layers)
        self.skip = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) + x if self.skip else self.layers(x)


class Cosine(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.kernel = nn.Parameter(F.normalize(torch.rand(EMBEDDING, classes) * 2 - 1, dim=0))

    def forward(self, x: Tensor) -> Tensor:
        return (F.normalize(x) @ F.normalize(self.kernel, dim=0)).clamp(-1, 1)


class PlainNetwork(nn.Module):
    """The same network as micronet's; its state has the same tensors in the same order, under other names."""

    def __init__(self, classes: int, width: float, depth: float) -> None:
        super().__init__()
        channels = scaled_channels(STEM, width)
        layers = [padded(3, channels, 3), Swish()]
        for expansion, base, repeats, above, kernel in BLOCKS:
            for repeat in range(math.ceil(repeats * depth)):
                outputs = scaled_channels(base, width)
                layers.append(Block(channels, outputs, expansion, kernel, 2 if repeat == 0 and 32 > above else 1))
                channels = outputs
        head = scaled_channels(HEAD, width)
        self.features = nn.Sequential(*layers, padded(channels, head, 1), Swish())
        self.embedding = nn.Linear(head, EMBEDDING)
        self.cosine = Cosine(classes)
        self.apply(initialize)

    def forward(self, x: Tensor) -> Tensor:
        return self.cosine(self.embedding(self.features(x).mean((2, 3))))


def three_views(data: Path) -> Dataset:
    """CIFAR-100, or as many random images, once under each view."""
    end = [transforms.RandomHorizontalFlip(), transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    views = [
        [transforms.ColorJitter(0.2, 0.2)],
        [transforms.ColorJitter(0.4, 0.4), transforms.RandomResizedCrop(32, (0.3, 1.0), (0.8, 1.2))],
        [transforms.RandomResizedCrop(32)],
    ]
    chains = [transforms.Compose([*view, *end]) for view in views]
    if (data / CIFAR100.base_folder).is_dir():
        return ConcatDataset([CIFAR100(data, train=True, transform=chain) for chain in chains])
    return ConcatDataset([FakeData(50_000, (3, 32, 32), 100, transform=chain) for chain in chains])


def train(student: nn.Module, teacher: nn.Module | None, batches: object, lr: float, scale: float) -> list[float]:
    """Train on all batches and return the losses."""
    optimizer = torch.optim.SGD(student.parameters(), lr, momentum=0.9, weight_decay=1e-4)
    device = next(student.parameters()).device
    losses = []
    student.train()
    for images, labels in batches:
        images, labels = images.to(device), labels.to(device)
        optimizer.zero_grad()
        cosines = student(images)
        if teacher is None:
            loss = F.cross_entropy(scale * cosines, labels)
        else:
            with torch.no_grad():
                target = torch.softmax(scale * teacher(images), dim=1)
            loss = -(target * F.log_softmax(scale * cosines, dim=1)).sum(1).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


class Timed:
    """The first `steps` batches of a loader; notes the time when each is asked for."""

    def __init__(self, loader: DataLoader, steps: int, device: torch.device) -> None:
        self.loader, self.steps, self.device = loader, steps, device
        self.times: list[float] = []

    def __iter__(self) -> object:
        for step, batch in enumerate(self.loader):
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            self.times.append(time.perf_counter())
            if step == self.steps:
                return
            yield batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--network", default="efficientnet_ex", choices=NETWORKS)
    parser.add_argument("--teacher", choices=NETWORKS)
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--warm-up", type=int, default=2, help="steps that are not counted")
    parser.add_argument("--steps", type=int, default=5, help="steps that are counted")
    options = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    student = PlainNetwork(100, *NETWORKS[options.network]).to(device)
    teacher = PlainNetwork(100, *NETWORKS[options.teacher]).to(device).eval() if options.teacher else None
    data = three_views(options.data)
    loader = DataLoader(data, options.batch_size, shuffle=True, num_workers=options.workers, drop_last=True)
    timed = Timed(loader, options.warm_up + options.steps, device)
    train(student, teacher, timed, 0.07, 5.0)

    times = timed.times[options.warm_up :]
    seconds = statistics.median(b - a for a, b in zip(times, times[1:]))
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**20
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    result = {"network": options.network, "teacher": options.teacher, "batch_size": options.batch_size}
    print(json.dumps(result | {"images_per_second": options.batch_size / seconds, "peak_memory_mb": peak}))


if __name__ == "__main__":
    main()
