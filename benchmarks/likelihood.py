"""Likelihoods beside other packages and methods: error against time, in one run.

    python -m benchmarks.likelihood [--json FILE]

First passage: Brownian motion with drift between two bounds that starts off the middle, the density of both choices at
100 times, against the series in closed form (Feller 1968, XIV.6); beside PyDDM's solvers on grids (its closed form for
this case is not used), where it is installed. The error is that of the density, as a part of its peak.

Sampled paths: 500 transitions of a double well, 0.2 apart, half a relaxation time in a well, beside the likelihoods of
Euler's step and of simulated bridges (Durham and Gallant 2002). The error is that of the log-likelihood, against a
tolerance of 1e-7.

CPU time of one thread, medians of warm calls; BENCHMARK_CLOCK=wall on an idle machine. "kolmo, search" finds the
resolution that the tolerance needs; "kolmo" is a call at the resolution that was found, as fits make them, and
"with gradient" adds the exact one. A ratio says how many times as long the other takes as the fastest setting of
"kolmo" that errs no more; the others have no gradient and no estimate of their error.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("NUMBA_NUM_THREADS", "1")

import argparse
import importlib.util
import json
import math
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

import kolmo
from benchmarks.timing import Record, measure, shown
from kolmo import likelihood

DRIFT, START, TIMES = 1.0, 0.3, np.linspace(0.05, 3.0, 100)
GAP, COUNT, NOISE = 0.2, 500, 0.6


# --- first passages ---------------------------------------------------------------------------------------------------


def exact() -> np.ndarray:
    """Density of both choices, lower first, shape (2, n), from images."""
    k = np.arange(-50, 51)
    rows = []
    for along, d in ((-DRIFT, 1.0 + START), (DRIFT, 1.0 - START)):
        away = d + 4.0 * k
        series = (away * np.exp(-(away**2) / (2.0 * TIMES[:, None]))).sum(1) / np.sqrt(2.0 * np.pi * TIMES**3)
        rows.append(series * np.exp(along * d - 0.5 * DRIFT**2 * TIMES))
    return np.stack(rows)


def passage_with_kolmo() -> Iterator[Record]:
    v = torch.tensor(DRIFT, dtype=torch.float64, requires_grad=True)
    model = likelihood.FirstPassage(lambda t, x, c: v, lower=-1.0, upper=1.0, start=START)
    trials, truth = likelihood.Trials(np.tile(TIMES, 2), np.repeat([0, 1], len(TIMES))), exact()

    def error(found: likelihood.Likelihood) -> float:
        return _part(np.exp(found.terms().detach().numpy()).reshape(2, -1), truth)

    yield from timed("passage", lambda tol: model.likelihood(trials, tol=tol), v, error)


def timed(
    problem: str,
    make: Callable[[float], likelihood.Likelihood],
    parameter: torch.Tensor,
    error: Callable[[likelihood.Likelihood], float],
) -> Iterator[Record]:
    """The search for a resolution, a call at it, and one with gradient, for some tolerances."""
    for tol in (1.0, 1e-1, 1e-2, 1e-3, 1e-4):
        found = make(tol)
        _, whole, first = measure(found.renew, repeats=3)
        off, setting = error(found), f"tol {tol:g}"
        yield Record(problem, "kolmo, search", setting, off, whole, first)
        with torch.no_grad():
            _, whole, first = measure(found)
        yield Record(problem, "kolmo", setting, off, whole, first)
        _, whole, first = measure(lambda found=found: torch.autograd.grad(found(), parameter))
        yield Record(problem, "kolmo, with gradient", setting, off, whole, first)


def _part(rho: np.ndarray, truth: np.ndarray) -> float:
    return float(np.abs(rho - truth).max() / truth.max())


def passage_with_pyddm() -> Iterator[Record]:
    import pyddm

    truth = exact()
    for kind in ("solve_numerical_c", "solve_numerical_implicit", "solve_numerical_cn"):
        for dx in (0.02, 0.01, 0.005, 0.0025):
            # times as fine as places: its densities are histograms over steps in time
            model = pyddm.gddm(
                drift=DRIFT, noise=1.0, bound=1.0, starting_position=START, nondecision=0.0, mixture_coef=0.0,
                T_dur=4.0, dx=dx, dt=dx / 2,
            )  # fmt: skip
            solved, whole, first = measure(lambda kind=kind, model=model: getattr(model, kind)(), repeats=3)
            rho = np.stack([np.interp(TIMES, model.t_domain(), solved.pdf(name)) for name in ("error", "correct")])
            yield Record("passage", f"PyDDM {kind[6:]}", f"dx {dx:g}", _part(rho, truth), whole, first)


# --- sampled paths ----------------------------------------------------------------------------------------------------


@lru_cache
def path() -> tuple[np.ndarray, np.ndarray]:
    rng, x = np.random.default_rng(0), [1.0]
    fine = 200
    for _ in range(COUNT):
        y = x[-1]
        for z in rng.standard_normal(fine):
            y += (y - y**3) * GAP / fine + NOISE * math.sqrt(GAP / fine) * z
        x.append(y)
    return GAP * np.arange(COUNT + 1), np.array(x)


def of_paths(tol: float, kappa: Any = 1.0) -> likelihood.PathLikelihood:
    sde = kolmo.SDE(lambda t, x: kappa * (x - x**3), NOISE, dim=1, arrays="torch")
    return likelihood.paths(sde, *path(), tol=tol)


def paths_with_kolmo(truth: float) -> Iterator[Record]:
    kappa = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    yield from timed(
        "paths", lambda tol: of_paths(tol, kappa), kappa, lambda found: abs(float(found().detach()) - truth)
    )


def paths_with_euler(truth: float) -> Iterator[Record]:
    """Euler's step; and M steps of which those between are simulated K times, by the bridge of Durham and Gallant."""
    x = path()[1]

    def logs(y: np.ndarray, mean: np.ndarray, variance: Any) -> np.ndarray:
        return np.asarray(-0.5 * (y - mean) ** 2 / variance - 0.5 * np.log(2.0 * np.pi * variance))

    def euler(M: int, K: int) -> float:
        rng, h, S = np.random.default_rng(1), GAP / M, NOISE**2
        at, weight = np.repeat(x[:-1, None], K, 1), np.zeros((COUNT, K))
        for m in range(M - 1):
            left = M - m
            mean, variance = at + (x[1:, None] - at) / left, S * h * (left - 1) / left
            new = mean + np.sqrt(variance) * rng.standard_normal((COUNT, K))
            weight += logs(new, at + (at - at**3) * h, S * h) - logs(new, mean, variance)
            at = new
        weight += logs(x[1:, None], at + (at - at**3) * h, S * h)
        top = weight.max(1)
        return float((top + np.log(np.exp(weight - top[:, None]).mean(1))).sum())

    for M, K in ((1, 1), (4, 32), (8, 64), (16, 256), (32, 1024)):
        value, whole, first = measure(lambda M=M, K=K: euler(M, K), repeats=3)
        name = "Euler" if M == 1 else "simulated bridges"
        yield Record("paths", name, f"{M} steps, {K} samples", abs(value - truth), whole, first)


# --- all --------------------------------------------------------------------------------------------------------------


def ratios(records: list[Record]) -> list[tuple[Record, Record | None]]:
    """Every record of another with the fastest of kolmo's that errs no more."""
    found = []
    for other in records:
        if other.solver.startswith("kolmo"):
            continue
        mine = [r for r in records if r.solver == "kolmo" and r.problem == other.problem and r.error <= other.error]
        found.append((other, min(mine, key=lambda r: r.whole) if mine else None))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="write the records here")
    arguments = parser.parse_args()
    truth = float(of_paths(1e-7)())
    sources: list[Callable[[], Iterator[Record]]] = [passage_with_kolmo]
    if importlib.util.find_spec("pyddm") is not None:
        sources.append(passage_with_pyddm)
    else:
        print("PyDDM is not installed: pip install --constraint constraints.txt pyddm")
    sources += [lambda: paths_with_kolmo(truth), lambda: paths_with_euler(truth)]
    records = []
    for source in sources:
        for r in source():
            print(
                f"{r.problem:8} {r.solver:30} {r.setting:22} error {r.error:.1e}  {shown(r.whole):>8}  {r.note}",
                flush=True,
            )
            records.append(r)
    print("\nratio of times at the same error or less")
    for other, mine in ratios(records):
        told = f"{other.whole / mine.whole:.1f} times ({mine.setting})" if mine is not None else "no setting of kolmo"
        print(f"{other.problem:8} {other.solver:30} {other.setting:22} {told}")
    if arguments.json:
        arguments.json.write_text(json.dumps([r.as_dict() for r in records], indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
