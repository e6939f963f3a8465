"""Uncertain volatility: the best and the worst value of a butterfly when only a range of the volatility is known.

dS = rS dt + aS dW with σ₁ ≤ a ≤ σ₂ chosen by nature: the Black–Scholes–Barenblatt equation (Avellaneda, Levy & Paras
1995), a control problem with the control in the noise. a is σ₂ where the value is convex (best case) and σ₁ where it is
concave. Both are compared with the trinomial lattice of those authors, extrapolated to infinitely many steps, and
with bounds from each option of the butterfly on its own; the policies are rolled out in simulated paths.
"""

import dataclasses
from typing import Any

import matplotlib.figure
import numpy as np
import torch
from scipy.special import ndtr

import kolmo
from kolmo import control
from kolmo.report import Figure, Measured, Section, Table, held
from kolmo.runs import Run

BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#555555"
COLORS, WORDS = {"max": BLUE, "min": ORANGE}, {"max": "best", "min": "worst"}
ROLLED = ("mean", "standard_error", "bias_estimate")


@dataclasses.dataclass(frozen=True)
class Config:
    seed: int = 0
    rate: float = 0.1
    volatility: tuple[float, ...] = (0.15, 0.25)  # σ₁, σ₂
    strikes: tuple[float, ...] = (90.0, 100.0, 110.0)
    maturity: float = 0.25
    spots: tuple[float, ...] = (90.0, 100.0, 110.0)
    rtols: tuple[float, ...] = (1e-3, 1e-4)
    lattice: tuple[int, ...] = (2_000, 4_000)  # steps of the coarsest and the finest lattice
    lattices: int = 16
    paths: int = 20_000
    steps: int = 128


def run(config: Config, run: Run, progress: bool) -> dict[str, Any]:
    spots = np.array(config.spots)
    solved = {
        sense: {
            rtol: control.solve_hjb(butterfly(config, sense), at=spots[:, None], rtol=rtol) for rtol in config.rtols
        }
        for sense in COLORS
    }
    best = {sense: by_rtol[config.rtols[-1]] for sense, by_rtol in solved.items()}
    lattices = {sense: run.unit(f"lattice-{sense}", lambda s=sense: _lattices(config, s)) for sense in COLORS}
    exact = {sense: np.asarray(found["value"]) for sense, found in lattices.items()}
    rolled = {sense: run.unit(f"paths-{sense}", lambda o=opt: _roll(config, o)) for sense, opt in best.items()}
    run.save_figure("butterfly", _draw(config, best, exact, rolled))
    return {
        "spots": list(config.spots),
        "lattice": lattices,
        "bound": {sense: bound(config, sense, spots) for sense in COLORS},
        "constant": {f"{s:g}": constant(config, (s, s, s), spots) for s in config.volatility},
        "by_tolerance": {
            sense: {
                f"{rtol:g}": {
                    "value": opt(spots[:, None]),
                    "error": np.abs(opt(spots[:, None]) - exact[sense]),
                    "error_estimate": float(np.max(opt.error_estimate)),
                    "cells": opt.stats["cells"],
                    "status": opt.status,
                }
                for rtol, opt in by_rtol.items()
            }
            for sense, by_rtol in solved.items()
        },
        "roll_outs": rolled,
    }


def conclusions(run: Run) -> list[str]:
    told = []
    for sense, by_rtol in run.results["by_tolerance"].items():
        rows = by_rtol.values()
        errors, estimates = [max(row["error"]) for row in rows], [row["error_estimate"] for row in rows]
        told.append(held(f"The {sense} value", errors, estimates, "its estimate"))
    return told


def report(run: Run) -> list[Section]:
    found = run.results
    rows, tolerances = [], []

    def measured(values: list[float], errors: list[float]) -> list[Measured]:
        return [Measured(*pair) for pair in zip(values, errors, strict=True)]

    for sense, word in WORDS.items():
        solved, rolled = found["by_tolerance"][sense], found["roll_outs"][sense]
        best, lattice = list(solved.values())[-1], measured(*found["lattice"][sense].values())
        columns = [found["spots"], found["bound"][sense], lattice, best["value"], best["error"]]
        paths = measured(rolled["mean"], rolled["standard_error"])
        rows += [[word, *row] for row in zip(*columns, paths, rolled["bias_estimate"], strict=True)]
        tolerances += [[word, r, v["cells"], max(v["error"]), v["error_estimate"]] for r, v in solved.items()]
    heads = ["case", "spot", "bound", "lattice", "Bellman equation", "difference", "paths", "bias estimate"]
    return [
        Section(
            "Butterfly with uncertain volatility",
            [
                Table(heads, rows, "Lattices and paths with standard errors."),
                Table(["case", "rtol", "cells", "error", "estimate"], tolerances, "Largest error over the spots."),
                Figure(run.figure("butterfly"), "Best and worst value with those of constant volatility; policies."),
            ],
        )
    ]


def butterfly(config: Config, sense: str) -> control.ControlProblem:
    """The control problem: best ("max") or worst ("min") case."""

    def payoff(x: torch.Tensor) -> torch.Tensor:
        low, middle, high = ((x[..., 0] - strike).clamp(min=0.0) for strike in config.strikes)
        return low - 2.0 * middle + high

    return control.ControlProblem(
        lambda t, x, a: config.rate * x,
        lambda t, x, a: a * x,
        controls=control.Interval(*config.volatility),
        terminal=payoff,
        horizon=config.maturity,
        box=kolmo.Box(0.0, 3.0 * config.strikes[1], [("natural", "open")]),
        killing=config.rate,
        sense=sense,
    )


def constant(config: Config, volatilities: tuple[float, float, float], spot: np.ndarray) -> np.ndarray:
    """Black–Scholes value of the butterfly, each of its three calls with a volatility of its own."""
    total = np.zeros(len(spot))
    for weight, strike, volatility in zip((1.0, -2.0, 1.0), config.strikes, volatilities, strict=True):
        spread = volatility * np.sqrt(config.maturity)
        d = (np.log(spot / strike) + config.rate * config.maturity) / spread
        discounted = strike * np.exp(-config.rate * config.maturity)
        total += weight * (spot * ndtr(d + 0.5 * spread) - discounted * ndtr(d - 0.5 * spread))
    return total


def bound(config: Config, sense: str, spot: np.ndarray) -> np.ndarray:
    """What the calls are worth at most (at least) together when each has the volatility that suits it."""
    low, high = config.volatility if sense == "max" else config.volatility[::-1]
    return constant(config, (high, low, high), spot)


def _lattices(config: Config, sense: str) -> dict[str, list[float]]:
    """Values of infinitely many steps n, by a straight line in 1/n, with their standard errors."""
    counts = np.linspace(*config.lattice, config.lattices).astype(int)
    values = np.array([[_lattice(config, sense, s, n) for s in config.spots] for n in counts])
    line, covariance = zip(*(np.polyfit(1.0 / counts, v, 1, cov=True) for v in values.T), strict=True)
    return {"value": [c[1] for c in line], "standard_error": [np.sqrt(c[1, 1]) for c in covariance]}


def _lattice(config: Config, sense: str, spot: float, n: int) -> float:
    """Trinomial lattice in which nature takes the better (worse) of the two volatilities at every node."""
    low, high = config.volatility
    dt = config.maturity / n
    jump, pick = high * np.sqrt(dt), np.maximum if sense == "max" else np.minimum
    # the discounted price is a martingale on the lattice whatever the share that moves
    chances = 1.0 / (1.0 + np.exp([jump, -jump]))
    # means over cells: where the strikes fall between the nodes would make the error jump from n to n
    edges = np.log(spot) + config.rate * config.maturity + jump * (np.arange(-n, n + 2) - 0.5)
    one, two, three = (_area(edges, strike) for strike in config.strikes)
    value = (one - 2.0 * two + three) / jump
    share = (low / high) ** 2
    for _ in range(n):
        moved = chances[0] * value[2:] + chances[1] * value[:-2]
        value = pick(moved, (1.0 - share) * value[1:-1] + share * moved)
    return float(np.exp(-config.rate * config.maturity) * value[0])


def _area(edges: np.ndarray, strike: float) -> np.ndarray:
    """Integrals of a call over cells of the logarithm of the price."""
    upper = np.maximum(edges, np.log(strike))
    return np.diff(np.exp(upper) - strike * upper)


def _roll(config: Config, solution: control.ControlSolution) -> dict[str, Any]:
    est = kolmo.monte_carlo(
        solution.closed_loop(), np.array(config.spots)[:, None], paths=config.paths, steps=config.steps, rng=config.seed
    )
    return {key: getattr(est, key) for key in ROLLED}


def _draw(
    config: Config, best: dict[str, Any], exact: dict[str, np.ndarray], rolled: dict[str, Any]
) -> matplotlib.figure.Figure:
    figure = matplotlib.figure.Figure(figsize=(11.0, 3.6), layout="constrained")
    axes = figure.subplots(1, 3, width_ratios=[1.3, 1.0, 1.0])
    x = np.linspace(0.7, 1.3, 241) * config.strikes[1]
    for volatility, style in zip(config.volatility, (":", "--"), strict=True):
        label = f"volatility {volatility:g}"
        axes[0].plot(x, constant(config, (volatility,) * 3, x), color=GREY, lw=1, ls=style, label=label)
    for sense, color in COLORS.items():
        axes[0].plot(x, best[sense](x), color=color, lw=2, label=f"{WORDS[sense]} case")
        bars = 4 * np.asarray(rolled[sense]["standard_error"]) + np.asarray(rolled[sense]["bias_estimate"])
        label = "paths ± (4 s.e. + bias)" if sense == "min" else None
        axes[0].errorbar(config.spots, rolled[sense]["mean"], bars, fmt="none", color="k", capsize=3, label=label)
        axes[0].plot(config.spots, exact[sense], "x", color="k", ms=6, label="lattice" if sense == "min" else None)
    axes[0].set(xlabel="price $S$", ylabel="value", ylim=(-0.2, 9.0))
    axes[0].legend(frameon=False, fontsize="small", loc="upper left")
    times = np.linspace(0.0, 0.99 * config.maturity, 100)
    for ax, sense in zip(axes[1:], COLORS, strict=True):
        policy = np.stack([best[sense].policy(t, x)[:, 0] for t in times])
        mesh = ax.pcolormesh(times, x, policy.T, cmap="cividis", shading="nearest", rasterized=True)
        ax.set(xlabel="$t$", ylabel="price $S$", title=f"{WORDS[sense]} case: volatility")
    figure.colorbar(mesh, ax=axes[1:], label="$a(t, S)$")
    return figure
