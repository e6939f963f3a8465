"""Landscapes of a 17 k-parameter convolutional ResNet: time of a surface, evaluations saved, Hessian-vector products.

    python -m benchmarks.landscape --data data/fashion-mnist --json FILE

Every figure is checked: the surface against a loop over the points written by hand, the adaptive one against the full
grid, the eigenpairs by their residuals, the trace against a dense Hessian. The loop by hand and `landscape.surface`
take turns row by row, so that what slows the machine down meets both. PyHessian runs beside where it is installed.
"""

import argparse
import copy
import importlib
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from kolmo import images, landscape
from kolmo.experiments import _resnets as nets

POINTS, IMAGES, TOP, RESIDUAL, STARTS, TRACES = 51, 1000, 5, 1e-2, 5, 100
Loss = Callable[[nn.Module], dict[str, torch.Tensor]]


def network(data: str, epochs: int) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A trained network of 17 k parameters, and test images, channels last: the fastest of the layouts tried."""
    x, y, test_x, test_y = nets.standardised(images.load("fashion-mnist", data))
    torch.manual_seed(0)
    model = nets.ResNet(nets.law("none", 0.0), width=9)
    nets.train(model, x[:20_000], y[:20_000], nets.Recipe(epochs), seed=0)
    model = model.eval().to(memory_format=torch.channels_last)
    return model, test_x[:IMAGES].contiguous(memory_format=torch.channels_last), test_y[:IMAGES]


def seconds() -> np.ndarray:
    """Wall and CPU clock."""
    return np.array([time.perf_counter(), time.process_time()])


@torch.no_grad()
def by_hand(model: nn.Module, plane: landscape.Plane, loss: Loss, points: int) -> Iterator[np.ndarray]:
    """Rows of the surface, by the loop over points that one would write."""
    names = [name for name, _ in model.named_parameters()]
    weights, origin = list(model.parameters()), [plane.origin[name] for name in names]
    one, other = ([direction[name] for name in names] for direction in plane.directions)
    axis = np.linspace(-1.0, 1.0, points)
    for a in axis:
        row = np.empty(points)
        for j, b in enumerate(axis):
            for p, start, d, e in zip(weights, origin, one, other, strict=True):
                p.copy_(start + float(a) * d + float(b) * e)
            row[j] = float(loss(model)["loss"])
        yield row


class Turns:
    """A loss that, whenever it was asked for a row of points, lets the loop by hand do one too, on its own clock."""

    def __init__(self, loss: Loss, rows: Iterator[np.ndarray], points: int) -> None:
        self._loss, self._rows, self._points, self._calls = loss, rows, points, 0
        self.rows: list[np.ndarray] = []
        self.seconds = np.zeros(2)

    def __call__(self, model: nn.Module) -> dict[str, torch.Tensor]:
        found = self._loss(model)
        self._calls += 1
        if self._calls % self._points == 0 and len(self.rows) < self._points:
            start = seconds()
            self.rows.append(next(self._rows))
            self.seconds += seconds() - start
        return found


def surfaces(model: nn.Module, x: torch.Tensor, y: torch.Tensor, points: int) -> dict[str, Any]:
    """Full grid and loop by hand in turns, then adaptive placement."""

    def loss(f: nn.Module) -> dict[str, torch.Tensor]:
        scores = f(x)
        return {"loss": functional.cross_entropy(scores, y), "accuracy": (scores.argmax(-1) == y).float().mean()}

    plane = landscape.random_plane(model, seed=0)
    turns = Turns(loss, by_hand(copy.deepcopy(model), plane, loss, points), points)
    start = seconds()
    full = landscape.surface(turns, model, plane, points=points)
    wall, cpu = seconds() - start - turns.seconds
    found = {
        "points": points,
        "wall": wall,
        "cpu": cpu,
        "by_hand": dict(zip(("wall", "cpu"), turns.seconds, strict=True)),
        "ratio": {"wall": wall / turns.seconds[0], "cpu": cpu / turns.seconds[1]},
        "largest_difference": float(np.abs(full.mean - np.array(turns.rows)).max()),
    }
    found["adaptive"] = [adaptive(loss, model, plane, full, rtol) for rtol in (1e-2, 5e-3, 2e-3)]
    return found


def adaptive(
    loss: Loss, model: nn.Module, plane: landscape.Plane, full: landscape.Surface, rtol: float
) -> dict[str, Any]:
    """Evaluations of a surface by tolerance, and its true error."""
    points = len(full.axes[0])
    quick = landscape.surface(loss, model, plane, points=points, rtol=rtol)
    scale, count = np.abs(full.mean).max(), int(quick.evaluated.sum())
    return {
        "rtol": rtol,
        "evaluations": count,
        "times_fewer": full.mean.size / count,
        "error": float(np.abs(quick.mean - full.mean).max() / scale),
        "stated": quick.interpolation_error["loss"] / scale,
    }


def eigenpairs(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> dict[str, Any]:
    """Products for the leading eigenpairs, all to ‖Hv − λv‖ ≤ RESIDUAL |λ|, from several random starts."""

    def measured(rtol: float, seed: int) -> landscape.Curvature:
        return landscape.curvature(
            lambda f: functional.cross_entropy(f(x), y),
            model,
            top=TOP,
            rtol=rtol,
            seed=seed,
            probes=0,
            density_probes=0,
        )

    exact = measured(1e-5, 0).eigenvalues
    # Tolerances are relative to the largest eigenvalue: the smallest one decides.
    ours = [measured(RESIDUAL * exact[-1] / exact[0], seed) for seed in range(STARTS)]
    found: dict[str, Any] = {
        "eigenvalues": exact.tolist(),
        "products": [one.products for one in ours],
        "largest_residual": max(float((one.residuals / one.eigenvalues).max()) for one in ours),
    }
    try:
        peer = [of_pyhessian(model, x, y, seed) for seed in range(STARTS)]
    except ImportError:
        return found
    error = max(float(np.abs(np.array(values) / exact - 1).max()) for values, _ in peer)
    products = [count for _, count in peer]
    ratio = statistics.mean(found["products"]) / statistics.mean(products)
    return found | {"pyhessian": {"products": products, "largest_error": error}, "ratio": ratio}


def of_pyhessian(model: nn.Module, x: torch.Tensor, y: torch.Tensor, seed: int) -> tuple[list[float], int]:
    """Eigenvalues and products of PyHessian, each power iteration stopped as soon as the residual allows.

    Its own test compares successive eigenvalues. In its place a tolerance is passed that looks at the residual of the
    last product, so that nothing is spent beyond what is asked of both. Along the eigenvectors found before nothing is
    counted: what deflation leaves there no further iteration would remove.
    """
    library = importlib.import_module("pyhessian.hessian")
    original, residual, products = library.hessian_vector_product, np.inf, 0
    image, vectors = torch.zeros(0), []

    def watched(slopes: Any, parameters: Any, v: Any) -> Any:
        nonlocal image, residual, products
        product = original(slopes, parameters, v)
        flat, image = (torch.cat([part.flatten() for part in parts]) for parts in (v, product))
        value = float(flat @ image / (flat @ flat))
        rest = image - value * flat
        for vector in vectors:
            rest = rest - vector * (vector @ rest)
        residual = float(rest.norm() / flat.norm()) / abs(value)
        products += 1
        return product

    class SmallResidual:
        def __gt__(self, _: float) -> bool:
            if residual <= RESIDUAL:
                vectors.append(image / image.norm())
            return residual <= RESIDUAL

    torch.manual_seed(seed)
    peer = library.hessian(copy.deepcopy(model), functional.cross_entropy, data=(x, y), cuda=False)
    with mock.patch.object(library, "hessian_vector_product", watched):
        values, _ = peer.eigenvalues(maxIter=1000, tol=SmallResidual(), top_n=TOP)
    return values, products


def trace() -> dict[str, Any]:
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
    found = [landscape.curvature(loss, model, top=3, seed=s, density_probes=0, rtol=0.1) for s in range(TRACES)]
    inside = sum(abs(one.trace - exact) <= 2 * one.trace_standard_error for one in found)
    error = statistics.mean(one.trace_standard_error for one in found)
    return {"exact": exact, "seeds": TRACES, "inside": inside, "mean_standard_error": error}


def show(found: dict[str, Any]) -> None:
    pairs, over, dense = found["eigenpairs"], found["surface"], found["trace"]
    print(f"{found['parameters']} parameters, {IMAGES} images, {found['threads']} threads")
    print(f"trace {dense['exact']:.2f}: within two standard errors in {dense['inside']} of {dense['seeds']} seeds")
    print(f"top {TOP}, {np.round(pairs['eigenvalues'], 3)}: {pairs['products']} products")
    print(f"  largest residual / eigenvalue {pairs['largest_residual']:.1e}")
    if "pyhessian" in pairs:
        peer = pairs["pyhessian"]
        print(f"  PyHessian, stopped at {RESIDUAL:g}: {peer['products']} products; ratio {pairs['ratio']:.2f}")
        print(f"  its eigenvalues differ by at most {peer['largest_error']:.1e}")
    hand, ratio, points = over["by_hand"], over["ratio"], over["points"]
    print(f"surface {points} x {points}: {over['wall']:.0f} s wall, {over['cpu']:.0f} s CPU")
    print(f"  by hand, in turns: {hand['wall']:.0f} s wall, {hand['cpu']:.0f} s CPU")
    print(f"  ratio {ratio['wall']:.3f} wall, {ratio['cpu']:.3f} CPU; difference {over['largest_difference']:.1e}")
    for one in over["adaptive"]:
        print(
            f"  rtol={one['rtol']:g}: {one['evaluations']} evaluations ({one['times_fewer']:.1f} times fewer), "
            f"error {one['error']:.1e}, stated {one['stated']:.1e}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", required=True, help="folder with the official files of Fashion-MNIST")
    parser.add_argument("--points", type=int, default=POINTS)
    parser.add_argument("--epochs", type=int, default=3, help="epochs of 20,000 images")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="file for what was measured")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    model, x, y = network(given.data, given.epochs)
    found = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "threads": given.threads,
        "trace": trace(),
        "eigenpairs": eigenpairs(model, x, y),
        "surface": surfaces(model, x, y, given.points),
    }
    show(found)
    if given.json:
        given.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
