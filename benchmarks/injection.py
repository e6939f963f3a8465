"""What noise in a ResNet-20 costs a training step, and what its curvature over many images takes in memory.

    python -m benchmarks.injection [--repeats 15] [--images 2000] [--network resnet20|transformer]

The network: nine blocks of 16, 32 and 64 channels with batch normalisation on images of 32 × 32, or six layers of a
transformer of width 192 on 64 tokens; single precision, one thread. A step is a forward and a backward pass of 64
images (16 sequences), in CPU seconds of the thread. Steps with and without stochastic depth, by samples or by whole
batches, are taken in groups noisy, bare, bare, noisy, so that whatever slows the machine down slows both; the ratio is
the median over the groups, with the interval of its order statistics that has it with probability 95 %. Curvature: the
largest eigenvalue, two products with the Hessian, batches of 50; memory is the most that a process of its own held,
with torch and the images in it.
"""

import argparse
import copy
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional

from kolmo import bridge, landscape


class Block(nn.Module):
    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(outside), nn.BatchNorm2d(outside)
        same = stride == 1 and inside == outside
        self.shortcut = nn.Identity() if same else nn.Conv2d(inside, outside, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(out + self.shortcut(x))


def resnet20() -> nn.Module:
    shapes = [(16, 16, 1)] * 3 + [(16, 32, 2)] + [(32, 32, 1)] * 2 + [(32, 64, 2)] + [(64, 64, 1)] * 2
    stem = [nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    blocks = [Block(*shape) for shape in shapes]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(192, 3, 768, 0.0, batch_first=True, norm_first=True, activation="gelu")
    return nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)


def task(network: str) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    """A network and its loss on data of its size."""
    if network == "transformer":
        tokens = torch.randn(16, 64, 192)
        return transformer(), lambda model: model(tokens).square().mean()
    x, y = torch.randn(64, 3, 32, 32), torch.randint(10, (64,))
    return resnet20(), lambda model: functional.cross_entropy(model(x), y)


class Ratio(NamedTuple):
    """A median and the interval that has it with probability 95 %."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f} to {self.high:.3f})"


def step_ratio(law: bridge.NoiseLaw, repeats: int, network: str = "resnet20") -> Ratio:
    """Time of a noisy training step over that of a bare one."""
    bare, loss = task(network)
    noisy = copy.deepcopy(bare)
    bridge.inject(noisy, law, batchnorm="train")

    def step(model: nn.Module) -> float:
        start = time.thread_time()
        model.train().zero_grad()
        loss(model).backward()
        return time.thread_time() - start

    for model in (bare, noisy):
        step(model)
    found = []
    for _ in range(repeats):
        outer, inner = step(noisy), [step(bare), step(bare)]
        found.append((outer + step(noisy)) / sum(inner))
    found.sort()
    tail = int(stats.binom.ppf(0.025, repeats, 0.5))  # so many are below the interval, and above it
    return Ratio(statistics.median(found), found[max(tail - 1, 0)], found[min(repeats - tail, repeats - 1)])


def curvature(images: int) -> None:
    """The largest eigenvalue over so many images, in batches."""
    model, x, y = resnet20().eval(), torch.randn(images, 3, 32, 32), torch.randint(10, (images,))
    loss = landscape.BatchLoss(
        lambda f, batch: functional.cross_entropy(f(batch[0]), batch[1]),
        list(zip(x.split(50), y.split(50), strict=True)),
    )
    landscape.curvature(loss, model, top=1, max_products=2, probes=0, density_probes=0)


def peak_memory(images: int) -> float:
    """The most that a process of its own held, all of it, in GB."""
    subprocess.run([sys.executable, "-m", "benchmarks.injection", "--only-curvature", str(images)], check=True)
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20


def report(repeats: int, images: int, network: str = "resnet20") -> None:
    """Measure and print."""
    laws = {
        "stochastic depth .9": (bridge.StochasticDepth(0.9), "goal <= 1.03"),
        "whole batches, .9": (bridge.StochasticDepth(0.9, per="batch"), "goal < 1"),
        "whole batches, .5": (bridge.StochasticDepth(0.5, per="batch"), "goal < 1"),
    }
    for name, (law, goal) in laws.items():
        ratio = step_ratio(law, repeats, network)
        print(f"training step, {name:<20} {ratio} of the bare one   ({goal})", flush=True)
    if images:
        print(f"curvature over {images} images          {peak_memory(images):.2f} GB in all   (goal <= 2)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--images", type=int, default=2000, help="for the curvature; 0: without")
    parser.add_argument("--network", choices=("resnet20", "transformer"), default="resnet20", help="for the steps")
    parser.add_argument("--only-curvature", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.only_curvature:
        curvature(options.only_curvature)
    else:
        report(options.repeats, options.images, options.network)


if __name__ == "__main__":
    main()
