"""American put: optimal stopping by the Bellman equation with an obstacle, against binomial trees.

dS = rS dt + σS dW; the holder may stop at any time and get (K − S)⁺. The value is compared with binomial trees whose
last step is the Black–Scholes formula, Richardson-extrapolated (Broadie & Detemple 1996). Where value and payoff meet
it is best to stop; that rule is rolled out on exact paths of S. Seen only at instants it stops too rarely, which costs
an amount of order one in the step; it is estimated from the same paths seen half as often.
"""

import dataclasses
from typing import Any

import matplotlib.figure
import numpy as np
from scipy.special import ndtr

import kolmo
from kolmo import control
from kolmo.report import Figure, Measured, Section, Table, held
from kolmo.runs import Run

BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#555555"


@dataclasses.dataclass(frozen=True)
class Config:
    seed: int = 0
    rate: float = 0.05
    volatility: float = 0.2
    strike: float = 100.0
    maturity: float = 1.0
    spots: tuple[float, ...] = (90.0, 100.0, 110.0)
    rtols: tuple[float, ...] = (1e-3, 1e-4, 1e-5)
    tree: int = 4_000  # steps of the coarser tree
    paths: int = 40_000
    steps: int = 400


def run(config: Config, run: Run, progress: bool) -> dict[str, Any]:
    spots = np.array(config.spots)
    solved = {rtol: control.solve_hjb(put(config), at=spots[:, None], rtol=rtol) for rtol in config.rtols}
    best = solved[config.rtols[-1]]
    trees = run.unit("trees", lambda: np.stack([_tree(config, s, n) for s in spots for n in (1, 2)]).reshape(-1, 2))
    exact, uncertainty = 2.0 * trees[:, 1] - trees[:, 0], np.abs(trees[:, 1] - trees[:, 0])
    boundary = exercise_boundary(config, best)
    rolled = run.unit("paths", lambda: _roll(config, best.times, boundary))
    run.save_figure("put", _draw(config, best, boundary, exact, rolled))
    return {
        "spots": list(config.spots),
        "tree": exact,
        "tree_uncertainty": uncertainty,
        "european": european(config, spots, config.maturity),
        "by_tolerance": {
            f"{rtol:g}": {
                "value": opt(spots[:, None]),
                "error": np.abs(opt(spots[:, None]) - exact),
                "error_estimate": float(np.max(opt.error_estimate)),
                "cells": opt.stats["cells"],
                "status": opt.status,
            }
            for rtol, opt in solved.items()
        },
        "boundary_now": float(boundary[0]),
        "roll_out": rolled,
    }


def conclusions(run: Run) -> list[str]:
    found = run.results
    rows = found["by_tolerance"].values()
    early = min(tree - european for tree, european in zip(found["tree"], found["european"], strict=True))
    errors, estimates = [max(row["error"]) for row in rows], [row["error_estimate"] for row in rows]
    return [
        held("The value", errors, estimates, "its estimate"),
        f"The trees that it is compared with are known to {max(found['tree_uncertainty']):.1e}.",
        f"The right to exercise early is worth {early:.3g} or more at these prices; today it is used below "
        f"{found['boundary_now']:.2f}.",
    ]


def report(run: Run) -> list[Section]:
    found = run.results
    rolled, best = found["roll_out"], list(found["by_tolerance"].values())[-1]
    rows = [list(row) for row in zip(found["spots"], found["european"], found["tree"], best["value"],
            best["error"], [Measured(*pair) for pair in zip(rolled["mean"], rolled["standard_error"], strict=True)],
            rolled["bias_estimate"], strict=True)]  # fmt: skip
    columns = ["spot", "European", "trees", "Bellman equation", "difference", "paths", "bias estimate"]
    tolerances = [
        [rtol, row["cells"], max(row["error"]), row["error_estimate"]] for rtol, row in found["by_tolerance"].items()
    ]
    return [
        Section(
            "American put",
            [
                Table(columns, rows, f"The trees change by {max(found['tree_uncertainty']):.0e} when doubled."),
                Table(["rtol", "cells", "error", "estimate"], tolerances, "Largest error over the spots."),
                Figure(run.figure("put"), "Value with payoff, and the exercise boundary."),
            ],
        )
    ]


def put(config: Config) -> control.ControlProblem:
    """The stopping problem; nothing is controlled but the end."""
    return control.ControlProblem(
        lambda t, x, a: config.rate * x,
        lambda t, x, a: config.volatility * x,
        controls=control.Finite([0.0]),
        terminal=lambda x: (config.strike - x[..., 0]).clamp(min=0.0),
        horizon=config.maturity,
        box=kolmo.Box(0.0, 4.0 * config.strike, [("natural", "open")]),
        killing=config.rate,
        obstacle=lambda t, x: (config.strike - x[..., 0]).clamp(min=0.0),
        sense="max",
    )


def european(config: Config, spot: np.ndarray, time: float) -> np.ndarray:
    """Black–Scholes value of the European put."""
    spread = config.volatility * np.sqrt(time)
    d = (np.log(spot / config.strike) + config.rate * time) / spread
    discounted = config.strike * np.exp(-config.rate * time)
    return discounted * ndtr(0.5 * spread - d) - spot * ndtr(-d - 0.5 * spread)


def _tree(config: Config, spot: float, times: int) -> float:
    """Binomial tree whose last step is the Black–Scholes value."""
    n = config.tree * times
    dt = config.maturity / n
    up = np.exp(config.volatility * np.sqrt(dt))
    chance = (np.exp(config.rate * dt) - 1.0 / up) / (up - 1.0 / up)
    weights = np.exp(-config.rate * dt) * np.array([chance, 1.0 - chance])
    prices = spot * up ** (n - 1.0 - 2.0 * np.arange(n))
    value = np.maximum(config.strike - prices, european(config, prices, dt))
    for _ in range(n - 1):
        prices = prices[:-1] / up
        value = np.maximum(config.strike - prices, weights[0] * value[:-1] + weights[1] * value[1:])
    return float(value[0])


def exercise_boundary(config: Config, solution: control.ControlSolution) -> np.ndarray:
    """Largest price at which to stop, at the times of the solution."""
    x, ends = solution.grid.nodes[0], []
    for values in solution.values[:-1]:
        excess = values - (config.strike - x)
        k = int(np.argmax(excess > 1e-9 * config.strike))
        # smooth fit: the excess grows like the square of the distance from the boundary
        near, beyond = np.sqrt(np.maximum(excess[k : k + 2], 0.0))
        ends.append(np.clip(x[k] - near * (x[k + 1] - x[k]) / (beyond - near), x[k - 1], x[k]))
    return np.array([*ends, config.strike])


def _roll(config: Config, times: np.ndarray, boundary: np.ndarray) -> dict[str, Any]:
    """Stop on exact paths of S, seen at all instants and at every second one."""
    rng = np.random.default_rng(config.seed)
    instants = np.linspace(0.0, config.maturity, config.steps + 1)
    # near maturity the boundary rises like the root of the time that is left
    left = np.sqrt(config.maturity - times)
    stop = np.interp(-np.sqrt(config.maturity - instants), -left, boundary)
    dt = config.maturity / config.steps
    gains: list[np.ndarray] = []
    for spot in config.spots:
        logs, paid = np.full(config.paths, np.log(spot)), np.full((2, config.paths), np.nan)
        for k in range(1, config.steps + 1):
            noise = config.volatility * np.sqrt(dt) * rng.standard_normal(config.paths)
            logs += (config.rate - 0.5 * config.volatility**2) * dt + noise
            price = np.exp(logs)
            gain = np.exp(-config.rate * instants[k]) * np.maximum(config.strike - price, 0.0)
            stops = price <= stop[k] if k < config.steps else np.full(config.paths, True)
            for seen in (0, 1) if k % 2 == 0 else (0,):
                paid[seen] = np.where(stops & np.isnan(paid[seen]), gain, paid[seen])
        gains.append(paid)
    fine, difference = np.stack(gains)[:, 0], np.stack(gains)[:, 0] - np.stack(gains)[:, 1]
    root = np.sqrt(config.paths)
    return {
        "mean": fine.mean(1),
        "standard_error": fine.std(1, ddof=1) / root,
        # as in kolmo.monte_carlo, of weak order 1
        "bias_estimate": 2.0 * (np.abs(difference.mean(1)) + difference.std(1, ddof=1) / root),
    }


def _draw(
    config: Config, best: control.ControlSolution, boundary: np.ndarray, exact: np.ndarray, rolled: dict[str, Any]
) -> matplotlib.figure.Figure:
    figure = matplotlib.figure.Figure(figsize=(9.0, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    x = np.linspace(0.65, 1.35, 281) * config.strike
    left.plot(x, np.maximum(config.strike - x, 0.0), color=GREY, lw=1, label="payoff")
    left.plot(x, european(config, x, config.maturity), color=GREY, lw=1, ls="--", label="European")
    left.plot(x, best(x), color=BLUE, lw=2, label="Bellman equation")
    left.plot(config.spots, exact, "x", color=ORANGE, ms=8, mew=2, label="trees")
    bars = 4 * np.asarray(rolled["standard_error"]) + np.asarray(rolled["bias_estimate"])
    left.errorbar(config.spots, rolled["mean"], bars, fmt="none", color="k", capsize=4, label="paths ± (4 s.e. + bias)")
    left.axvline(boundary[0], color=BLUE, lw=0.8, ls=":")
    left.set(xlabel="price $S$", ylabel="value", ylim=(-1.0, None))
    left.legend(frameon=False, fontsize="small")
    right.plot(best.times, boundary, color=BLUE, lw=2)
    right.fill_between(best.times, boundary, 0.75 * config.strike, color=BLUE, alpha=0.15, lw=0)
    right.axhline(config.strike, color=GREY, lw=0.8, ls=":")
    right.text(0.4 * config.maturity, 0.78 * config.strike, "stop")
    right.text(0.4 * config.maturity, 0.94 * config.strike, "wait")
    right.set(xlabel="$t$", ylabel="price $S$", ylim=(0.75 * config.strike, 1.02 * config.strike))
    right.set(xlim=(0.0, config.maturity))
    return figure
