"""Landscapes of a 17 k-parameter convolutional ResNet: time of a surface, evaluations saved, Hessian-vector products.

    python -m benchmarks.landscape --data data/fashion-mnist

Every figure is checked: the surface against a plain loop over the points, the adaptive one against the full grid, the
eigenpairs by their residuals, the trace against a dense Hessian. PyHessian is measured beside it where it is installed;
so is, always, its method: power iteration with deflation.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from kolmo import images, landscape
from kolmo.experiments import _resnets as nets

POINTS, IMAGES, TOP, RESIDUAL = 51, 1000, 5, 1e-2


def network(data: str, epochs: int) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A trained network of 17 k parameters, and test images."""
    x, y, test_x, test_y = nets.standardised(images.load("fashion-mnist", data))
    torch.manual_seed(0)
    model = nets.ResNet(nets.law("none", 0.0), width=9)
    nets.train(model, x[:20_000], y[:20_000], nets.Recipe(epochs), seed=0)
    return model.eval(), test_x[:IMAGES], test_y[:IMAGES]


def timed(work: Callable[[], Any]) -> tuple[Any, float, float]:
    """Result, wall seconds and CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    found = work()
    return found, time.perf_counter() - wall, time.process_time() - cpu


@torch.no_grad()
def by_hand(model: nn.Module, plane: landscape.Plane, loss: Callable[[nn.Module], Any], points: int) -> np.ndarray:
    """The plain loop over points that one would write."""
    origin = [p.clone() for p in model.parameters()]
    d = [[direction[name] for name, _ in model.named_parameters()] for direction in plane.directions]
    axis = np.linspace(-1.0, 1.0, points)
    values = np.empty((points, points))
    for i, a in enumerate(axis):
        for j, b in enumerate(axis):
            for p, start, one, other in zip(model.parameters(), origin, *d, strict=True):
                p.copy_(start + float(a) * one + float(b) * other)
            values[i, j] = float(loss(model)["loss"])
    for p, start in zip(model.parameters(), origin, strict=True):
        p.copy_(start)
    return values


def surfaces(model: nn.Module, x: torch.Tensor, y: torch.Tensor, points: int) -> None:
    """Full grid, plain loop, adaptive placement."""

    def loss(f: nn.Module) -> dict[str, torch.Tensor]:
        scores = f(x)
        return {"loss": functional.cross_entropy(scores, y), "accuracy": (scores.argmax(-1) == y).float().mean()}

    plane = landscape.random_plane(model, seed=0)
    full, wall, cpu = timed(lambda: landscape.surface(loss, model, plane, points=points))
    hand, hand_wall, hand_cpu = timed(lambda: by_hand(model, plane, loss, points))
    print(f"surface {points} x {points}, {IMAGES} images: {wall:.0f} s wall, {cpu:.0f} s CPU")
    print(
        f"plain loop: {hand_wall:.0f} s wall, {hand_cpu:.0f} s CPU; "
        f"largest difference {np.abs(full.mean - hand).max():.1e}"
    )
    for rtol in (1e-2, 5e-3, 2e-3):
        quick, _, quick_cpu = timed(lambda rtol=rtol: landscape.surface(loss, model, plane, points=points, rtol=rtol))
        scale = np.abs(full.mean).max()
        error = np.abs(quick.mean - full.mean).max() / scale
        stated = quick.interpolation_error["loss"] / scale
        count = int(quick.evaluated.sum())
        print(
            f"rtol={rtol:g}: {count} evaluations ({points**2 / count:.1f} times fewer), {quick_cpu:.0f} s CPU, "
            f"error {error:.1e}, stated {stated:.1e}"
        )


def eigenpairs(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> None:
    """Products for the leading eigenpairs, to the same residual."""

    def loss(f: nn.Module) -> torch.Tensor:
        return functional.cross_entropy(f(x), y)

    options: dict[str, Any] = {"probes": 0, "density_probes": 0, "top": TOP, "rtol": RESIDUAL / 4}
    found, wall, _ = timed(lambda: landscape.curvature(loss, model, **options))
    print(f"top {TOP}: {found.products} products, {wall:.1f} s; eigenvalues {np.round(found.eigenvalues, 3)}")
    print(f"residuals / eigenvalues: {np.array2string(found.residuals / found.eigenvalues, precision=1)}")
    parameters = list(model.parameters())
    slopes = torch.autograd.grad(loss(model), parameters, create_graph=True)

    def product(v: torch.Tensor) -> torch.Tensor:
        parts = torch.split(v, [p.numel() for p in parameters])
        shaped = [part.reshape(p.shape) for part, p in zip(parts, parameters, strict=True)]
        done = torch.autograd.grad(slopes, parameters, shaped, retain_graph=True)
        return torch.cat([part.flatten() for part in done])

    print(f"power iteration with deflation: {power(product, sum(p.numel() for p in parameters))} products")
    try:
        from pyhessian import hessian
    except ImportError:
        return
    peer = hessian(model, functional.cross_entropy, data=(x, y), cuda=False)
    values, _ = peer.eigenvalues(maxIter=1000, tol=1e-3, top_n=TOP)
    print(f"PyHessian: eigenvalues {np.round(values, 3)}")


def power(product: Callable[[torch.Tensor], torch.Tensor], size: int) -> int:
    """Products that power iteration with deflation takes to the residual."""
    generator = torch.Generator().manual_seed(0)
    vectors: list[torch.Tensor] = []
    products = 0
    for _ in range(TOP):
        v = torch.randn(size, generator=generator)
        for _ in range(1000):
            for other in vectors:
                v = v - other * (other @ v)
            v = v / v.norm()
            w = product(v)
            products += 1
            value = float(v @ w)
            if float((w - value * v).norm()) <= RESIDUAL * abs(value):
                break
            v = w
        vectors.append(v)
    return products


def trace() -> None:
    """How often the trace lies within two of its standard errors of that of the dense Hessian."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 10), nn.Tanh(), nn.Linear(10, 4)).double()
    x, y = torch.randn(60, 5, dtype=torch.float64), torch.randint(0, 4, (60,))

    def loss(f: nn.Module) -> torch.Tensor:
        return functional.cross_entropy(2 * f(x), y)

    parameters = list(model.parameters())
    slopes = torch.cat([g.flatten() for g in torch.autograd.grad(loss(model), parameters, create_graph=True)])
    exact = 0.0
    for k, slope in enumerate(slopes):
        row = torch.cat([g.flatten() for g in torch.autograd.grad(slope, parameters, retain_graph=True)])
        exact += float(row[k])
    found = [landscape.curvature(loss, model, top=3, seed=s, density_probes=0, rtol=0.1) for s in range(100)]
    inside = sum(abs(one.trace - exact) <= 2 * one.trace_standard_error for one in found)
    print(f"trace {exact:.2f}: within two standard errors in {inside} of 100 seeds")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", required=True, help="folder with the official files of Fashion-MNIST")
    parser.add_argument("--points", type=int, default=POINTS)
    parser.add_argument("--epochs", type=int, default=3, help="epochs of 20,000 images")
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    model, x, y = network(given.data, given.epochs)
    print(f"{sum(p.numel() for p in model.parameters())} parameters, {given.threads} threads")
    trace()
    eigenpairs(model, x, y)
    surfaces(model, x, y, given.points)


if __name__ == "__main__":
    main()
