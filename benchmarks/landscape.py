"""Landscapes of a 17 k-parameter convolutional ResNet: time of a surface, evaluations saved, Hessian-vector products.

    python -m benchmarks.landscape --data data/fashion-mnist --parts trace eigenpairs adaptive placement --json FILE
    python -m benchmarks.landscape --data data/fashion-mnist --parts time --json FILE

Every figure is checked: the surface against a loop over the points written by hand, the adaptive one against the full
grid, the eigenpairs by their residuals, the trace against a dense Hessian. All parts but the last count, on a machine
however busy; "placement" counts over many small networks how often a stated error holds. The last part needs an idle
machine, and there the loop by hand and `landscape.surface` take turns row by row, so that what slows the machine down
meets both. PyHessian runs beside where it is installed. What each part finds is added
to the file when it ends.
"""

import argparse
import copy
import functools
import importlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from kolmo.experiments._digits import Digits, split
from torch import nn
from torch.nn import functional
from tqdm import tqdm

from kolmo import images, landscape
from kolmo.experiments import _laws as laws
from kolmo.experiments import _resnets as nets

POINTS, IMAGES, TOP, RESIDUAL, STARTS = 51, 1000, 5, 1e-2, 3
MOST = 300  # products of PyHessian for one eigenpair
TRACES, TRACE_IMAGES, PROBES = 100, 50, 20
TOLERANCES, NETWORKS = (1e-2, 5e-3, 2e-3), 14
Loss = Callable[[nn.Module], dict[str, torch.Tensor]]
Data = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def trained(data: Data, width: int, used: int, epochs: int, checkpoint: Path | None = None) -> nn.Module:
    """A ResNet of two stages trained on the first images, in evaluation mode."""
    torch.manual_seed(0)
    model = nets.ResNet(laws.of_stage("none"), width=width)
    with tqdm(total=epochs, desc=f"training, width {width}", unit="epoch") as bar:
        recipe = nets.Recipe(epochs)
        nets.train(
            model, data[0][:used], data[1][:used], recipe, 0, checkpoint=checkpoint, after_epoch=lambda _: bar.update()
        )
    return model.eval()


class Subject:
    """The network of 17 k parameters and its test images, channels last: the fastest of the layouts tried."""

    def __init__(self, data: Data, epochs: int, checkpoint: Path | None) -> None:
        model = trained(data, 9, 20_000, epochs, checkpoint)
        self.model = model.to(memory_format=torch.channels_last)
        self.x, self.y = data[2][:IMAGES].contiguous(memory_format=torch.channels_last), data[3][:IMAGES]
        self.plane = landscape.random_plane(self.model, seed=0)

    def loss(self, f: nn.Module) -> dict[str, torch.Tensor]:
        scores = f(self.x)
        accuracy = (scores.argmax(-1) == self.y).float().mean()
        return {"loss": functional.cross_entropy(scores, self.y), "accuracy": accuracy}


# ------------------------------------------------------------------------------------------------------------- trace


def trace(data: Data) -> dict[str, Any]:
    """How often the trace lies within two of its standard errors of that of the dense Hessian, on a smaller network."""
    model = trained(data, 2, 2000, 5)
    x, y = data[2][:TRACE_IMAGES], data[3][:TRACE_IMAGES]

    def loss(f: nn.Module) -> torch.Tensor:
        return functional.cross_entropy(f(x), y)

    parameters = list(model.parameters())
    slopes = torch.cat([g.flatten() for g in torch.autograd.grad(loss(model), parameters, create_graph=True)])
    exact = 0.0
    for k, slope in enumerate(tqdm(slopes, desc="dense Hessian", unit="row")):
        row = torch.cat([g.flatten() for g in torch.autograd.grad(slope, parameters, retain_graph=True)])
        exact += float(row[k])
    found = [
        landscape.curvature(loss, model, top=3, seed=seed, probes=PROBES, density_probes=0, rtol=0.1)
        for seed in tqdm(range(TRACES), desc="trace", unit="seed")
    ]
    errors = np.array([(one.trace - exact) / one.trace_standard_error for one in found])
    return {
        "parameters": len(slopes),
        "exact": exact,
        "seeds": TRACES,
        "inside": int((np.abs(errors) <= 2).sum()),
        "mean_standard_error": statistics.mean(one.trace_standard_error for one in found),
        "mean_of_errors": float(errors.mean()),
        "products": statistics.mean(one.products for one in found),
    }


def show_trace(found: dict[str, Any]) -> None:
    print(f"trace of the {found['parameters']} x {found['parameters']} Hessian: {found['exact']:.2f}")
    print(f"  within two standard errors ({found['mean_standard_error']:.2f} each) in {found['inside']} of")
    print(f"  {found['seeds']} seeds, with {found['products']:.1f} products")


# -------------------------------------------------------------------------------------------------------- eigenpairs


def eigenpairs(subject: Subject) -> dict[str, Any]:
    """Products for the leading eigenpairs, all to ‖Hv − λv‖ ≤ RESIDUAL |λ|, from several random starts."""

    def measured(rtol: float, seed: int) -> landscape.Curvature:
        return landscape.curvature(
            subject.loss, subject.model, top=TOP, rtol=rtol, seed=seed, probes=0, density_probes=0, progress=True
        )

    exact = measured(1e-5, 0).eigenvalues
    # Tolerances are relative to the largest eigenvalue: the smallest one decides.
    ours = [measured(RESIDUAL * exact[-1] / exact[0], seed) for seed in range(STARTS)]
    found: dict[str, Any] = {
        "parameters": ours[0].parameters,
        "eigenvalues": exact.tolist(),
        "products": [one.products for one in ours],
        "largest_residual": max(float((one.residuals / one.eigenvalues).max()) for one in ours),
        "largest_error": max(float(np.abs(one.eigenvalues / exact - 1).max()) for one in ours),
    }
    try:
        library = importlib.import_module("pyhessian.hessian")
    except ImportError:
        return found
    peers = [of_pyhessian(library, subject, seed) for seed in range(STARTS)]
    products = [sum(watched.products) for _, watched in peers]
    found["pyhessian"] = {
        "products": products,
        "by_pair": [watched.products for _, watched in peers],
        "residuals": [watched.residuals for _, watched in peers],
        "largest_error": max(float(np.abs(np.array(values) / exact - 1).max()) for values, _ in peers),
    }
    return found | {"ratio": statistics.mean(found["products"]) / statistics.mean(products)}


def of_pyhessian(library: Any, subject: Subject, seed: int) -> tuple[list[float], "Watched"]:
    """Eigenvalues by PyHessian, and what they took: each power iteration ends as soon as its residual allows."""
    torch.manual_seed(seed)
    data = (subject.x, subject.y)
    peer = library.hessian(copy.deepcopy(subject.model), functional.cross_entropy, data=data, cuda=False)
    with tqdm(desc=f"PyHessian, start {seed}", unit="product") as bar:
        watched = Watched(library.hessian_vector_product, bar)
        with mock.patch.object(library, "hessian_vector_product", watched):
            values, _ = peer.eigenvalues(maxIter=MOST, tol=watched, top_n=TOP)
    return values, watched


class Watched:
    """PyHessian's product, counted for each eigenpair, and at once the tolerance that it is given.

    Its own test compares successive eigenvalues. A tolerance that looks at the residual of the last product in its
    place spends nothing beyond what is asked of both. Along the vectors found before nothing of it is counted: what
    deflation leaves there no further iteration would remove.
    """

    def __init__(self, product: Callable[..., Any], bar: Any) -> None:
        self._product, self._bar = product, bar
        self._image, self._vectors = torch.zeros(0), list[torch.Tensor]()
        self.products, self.residuals = [0], [np.inf]

    def __call__(self, slopes: Any, parameters: Any, v: Any) -> Any:
        if self.residuals[-1] <= RESIDUAL or self.products[-1] == MOST:  # the library went on to the next pair
            self._vectors.append(self._image / self._image.norm())
            self.products.append(0)
            self.residuals.append(np.inf)
        product = self._product(slopes, parameters, v)
        flat, self._image = (torch.cat([part.flatten() for part in parts]) for parts in (v, product))
        value = float(flat @ self._image / (flat @ flat))
        rest = self._image - value * flat
        for vector in self._vectors:
            rest = rest - vector * (vector @ rest)
        self.products[-1] += 1
        self.residuals[-1] = float(rest.norm() / flat.norm()) / abs(value)
        self._bar.update()
        self._bar.set_postfix(pair=len(self.products), residual=self.residuals[-1])
        return product

    def __gt__(self, _: float) -> bool:
        return self.residuals[-1] <= RESIDUAL


def show_eigenpairs(found: dict[str, Any]) -> None:
    values = np.round(found["eigenvalues"], 3)
    print(f"top {TOP} of {found['parameters']} parameters, {values}: {found['products']} products")
    print(f"  residual / eigenvalue at most {found['largest_residual']:.1e}, error {found['largest_error']:.1e}")
    if "pyhessian" in found:
        peer = found["pyhessian"]
        worst = max(map(max, peer["residuals"]))
        missed = f", not reached by all within {MOST} for a pair" if worst > RESIDUAL else ""
        print(f"  PyHessian to {RESIDUAL:g}{missed}: {peer['products']} products; ratio {found['ratio']:.2f}")
        print(f"  its residual is at most {worst:.1e}, its error {peer['largest_error']:.1e}")


# ---------------------------------------------------------------------------------------------------------- surfaces


def adaptive(subject: Subject, points: int) -> list[dict[str, Any]]:
    """Evaluations of surfaces by tolerance, and their true errors against the full grid."""
    loss = Remembered(subject.loss)
    full = landscape.surface(loss, subject.model, subject.plane, points=points, progress=True)
    scale = np.abs(full.mean).max()
    found = []
    for rtol in TOLERANCES:
        quick = landscape.surface(loss, subject.model, subject.plane, points=points, rtol=rtol)
        count = int(quick.evaluated.sum())
        found.append(
            {
                "points": points,
                "rtol": rtol,
                "evaluations": count,
                "times_fewer": full.mean.size / count,
                "error": float(np.abs(quick.mean - full.mean).max() / scale),
                "stated": quick.interpolation_error["loss"] / scale,
            }
        )
    return found


class Remembered:
    """A loss that does not compute anew what it has computed before, bit for bit at the same weights."""

    def __init__(self, loss: Loss) -> None:
        self._loss = loss
        self._known: dict[bytes, dict[str, torch.Tensor]] = {}

    def __call__(self, model: nn.Module) -> dict[str, torch.Tensor]:
        key = torch.cat([p.flatten() for p in model.parameters()]).numpy().tobytes()
        if key not in self._known:
            self._known[key] = self._loss(model)
        return self._known[key]


def show_adaptive(found: list[dict[str, Any]]) -> None:
    print(f"surface {found[0]['points']} x {found[0]['points']} by tolerance")
    for one in found:
        print(
            f"  rtol={one['rtol']:g}: {one['evaluations']} evaluations ({one['times_fewer']:.1f} times fewer), "
            f"error {one['error']:.1e}, stated {one['stated']:.1e}"
        )


def small(seed: int, activation: type[nn.Module], digits: Digits) -> nn.Module:
    """A network with one hidden layer and dropout, trained for sixty steps on some handwritten digits."""
    torch.manual_seed(seed)
    layers = nn.Linear(64, 16), activation(), nn.Dropout(0.2), nn.Linear(16, 10)
    model = nn.Sequential(*layers).double()
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(60):
        optimizer.zero_grad()
        functional.cross_entropy(model(digits.x), digits.y).backward()
        optimizer.step()
    return model


def placement(points: int) -> list[dict[str, Any]]:
    """How often the error stated by tolerance, and the tolerance, hold the true error, over many small networks."""
    training = split(0, 450)[0]
    digits = Digits(training.x[:120].double(), training.y[:120])
    rows = []
    for seed, activation in tqdm([(s, a) for s in range(NETWORKS) for a in (nn.ReLU, nn.Tanh)], unit="network"):
        model = small(seed, activation, digits)
        plane = landscape.random_plane(model, seed=seed)
        for noisy, draws in ((False, 1), (True, 3)):

            def measured(rtol: float | None, model=model, plane=plane, noisy=noisy, draws=draws) -> landscape.Surface:
                def loss(f: nn.Module) -> torch.Tensor:
                    return functional.cross_entropy(f(digits.x), digits.y)

                return landscape.surface(loss, model, plane, points=points, draws=draws, noisy=noisy, rtol=rtol)

            full = measured(None).mean
            for rtol in TOLERANCES:
                quick = measured(rtol)
                error = float(np.abs(quick.mean - full).max())
                stated = quick.interpolation_error["loss"]
                share = error / stated if stated else 0.0
                rows.append((rtol, share, error / (rtol * np.abs(full).max()), full.size / quick.evaluated.sum()))
    table = np.array(rows)
    found = []
    for rtol in TOLERANCES:
        _, of_stated, of_tolerance, fewer = table[table[:, 0] == rtol].T
        found.append(
            {
                "points": points,
                "rtol": rtol,
                "surfaces": len(fewer),
                "above_stated": int((of_stated > 1).sum()),
                "largest_of_stated": float(of_stated.max()),
                "above_tolerance": int((of_tolerance > 1).sum()),
                "largest_of_tolerance": float(of_tolerance.max()),
                "times_fewer": float(np.median(fewer)),
            }
        )
    return found


def show_placement(found: list[dict[str, Any]]) -> None:
    for one in found:
        print(
            f"rtol={one['rtol']:g}, {one['surfaces']} surfaces, {one['times_fewer']:.1f} times fewer evaluations: true "
            f"error above the stated one in {one['above_stated']} (at most {one['largest_of_stated']:.2f} of it), "
            f"above the tolerance in {one['above_tolerance']} (at most {one['largest_of_tolerance']:.2f} of it)"
        )


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
    for a in tqdm(axis, desc="time", unit="row"):
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


def timed(subject: Subject, points: int) -> dict[str, Any]:
    """Seconds of a full grid and of the loop by hand, in turns."""
    model, plane = subject.model, subject.plane
    turns = Turns(subject.loss, by_hand(copy.deepcopy(model), plane, subject.loss, points), points)
    start = seconds()
    full = landscape.surface(turns, model, plane, points=points)
    wall, cpu = seconds() - start - turns.seconds
    return {
        "points": points,
        "wall": wall,
        "cpu": cpu,
        "by_hand": dict(zip(("wall", "cpu"), turns.seconds, strict=True)),
        "ratio": {"wall": wall / turns.seconds[0], "cpu": cpu / turns.seconds[1]},
        "largest_difference": float(np.abs(full.mean - np.array(turns.rows)).max()),
    }


def show_timed(found: dict[str, Any]) -> None:
    hand, ratio, points = found["by_hand"], found["ratio"], found["points"]
    print(f"surface {points} x {points}: {found['wall']:.0f} s wall, {found['cpu']:.0f} s CPU")
    print(f"  by hand, in turns: {hand['wall']:.0f} s wall, {hand['cpu']:.0f} s CPU")
    print(f"  ratio {ratio['wall']:.3f} wall, {ratio['cpu']:.3f} CPU; difference {found['largest_difference']:.1e}")


SHOW: dict[str, Callable[[Any], None]] = {
    "trace": show_trace,
    "eigenpairs": show_eigenpairs,
    "adaptive": show_adaptive,
    "placement": show_placement,
    "time": show_timed,
}


def add(path: Path, name: str, found: Any) -> None:
    """Add what a part found to the file."""
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps(known | {name: found}, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", required=True, help="folder with the official files of Fashion-MNIST")
    parser.add_argument("--parts", nargs="+", choices=SHOW, default=list(SHOW))
    parser.add_argument("--points", type=int, default=POINTS)
    parser.add_argument("--epochs", type=int, default=3, help="epochs of 20,000 images")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--checkpoint", type=Path, help="file that keeps the trained network, for the next run")
    parser.add_argument("--json", type=Path, help="file that what was measured is added to")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    data = nets.standardised(images.load("fashion-mnist", given.data))
    subject = functools.cache(lambda: Subject(data, given.epochs, given.checkpoint))
    work: dict[str, Callable[[], Any]] = {
        "trace": lambda: trace(data),
        "eigenpairs": lambda: eigenpairs(subject()),
        "adaptive": lambda: adaptive(subject(), given.points),
        "placement": lambda: placement(given.points),
        "time": lambda: timed(subject(), given.points),
    }
    for name in given.parts:
        print(f"{name}, {given.threads} threads", file=sys.stderr)
        found = work[name]()
        SHOW[name](found)
        if given.json:
            add(given.json, name, found)


if __name__ == "__main__":
    main()
