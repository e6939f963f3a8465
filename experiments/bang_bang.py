"""Bang-bang exit: leave an interval as late or as soon as possible with bounded drift, against the closed form.

dX = a dt + σ dW on (−1, 1) with |a| ≤ A has the least and the greatest mean exit time under a = ±A sign(x), which
switches in the middle; both have a closed form. The Hamilton–Jacobi–Bellman equation is solved to several tolerances,
and its policies are rolled out in simulated paths. A smooth feedback a = −A tanh((x − c)/w), which starts off the
middle, is fitted to exit late through the adjoint of the backward equation, and approaches the jump.
"""

import dataclasses
from typing import Any

import matplotlib.figure
import numpy as np
import torch

import kolmo
from kolmo import control
from kolmo.report import Figure, Measured, Section, Table, agrees, held
from kolmo.runs import Run

BLUE, ORANGE, GREEN, GREY = "#0072b2", "#d55e00", "#009e73", "#555555"
COLORS = {"max": BLUE, "min": ORANGE}


@dataclasses.dataclass(frozen=True)
class Config:
    seed: int = 0
    sigma: float = 1.0
    bound: float = 1.0  # A
    points: tuple[float, ...] = (-0.8, 0.0, 0.5)
    rtols: tuple[float, ...] = (1e-3, 1e-4, 1e-5)
    width: float = 0.05  # least w of the fitted feedback
    maxiter: int = 60
    paths: int = 6_000
    steps: int = 256  # of the paths per crossing time of the interval


def run(config: Config, run: Run, progress: bool) -> dict[str, Any]:
    at = np.array(config.points)
    solved = {
        sense: {rtol: control.solve_hjb(exit_time(config, sense), at=at[:, None], rtol=rtol) for rtol in config.rtols}
        for sense in COLORS
    }
    best = {sense: by_rtol[config.rtols[-1]] for sense, by_rtol in solved.items()}
    rolled = {sense: run.unit(f"paths-{sense}", lambda o=opt: _roll(config, o)) for sense, opt in best.items()}
    fit = run.unit("fit", lambda: _fit(config, progress))
    run.save_figure("exit_times", _draw(config, best, rolled, fit))
    optimum = mean_exit_time(config, "max", at)
    return {
        "points": list(config.points),
        "exact": {sense: mean_exit_time(config, sense, at) for sense in COLORS},
        "by_tolerance": {
            sense: {
                f"{rtol:g}": {
                    "error": float(np.abs(opt(at[:, None]) - mean_exit_time(config, sense, at)).max()),
                    "error_estimate": float(np.max(opt.error_estimate)),
                    "cells": opt.stats["cells"],
                    "status": opt.status,
                }
                for rtol, opt in by_rtol.items()
            }
            for sense, by_rtol in solved.items()
        },
        "switch": {sense: _switch(opt) for sense, opt in best.items()},
        "roll_outs": rolled,
        "fitted": {
            "switch": fit["switch"],
            "width": fit["width"],
            "value": fit["value"],
            "below_optimum": float(np.sum(optimum) - np.sum(fit["value"])) / len(at),
            "below_optimum_relative": float(1.0 - np.sum(fit["value"]) / np.sum(optimum)),
            "status": fit["status"],
        },
    }


def conclusions(run: Run) -> list[str]:
    found = run.results
    rows = [row for by_rtol in found["by_tolerance"].values() for row in by_rtol.values()]
    told = [held("The value", [row["error"] for row in rows], [row["error_estimate"] for row in rows], "its estimate")]
    for sense, rolled in found["roll_outs"].items():
        means, errors, biases = (np.array(rolled[key]) for key in ("mean", "standard_error", "bias_estimate"))
        off = np.array(means) - np.array(found["exact"][sense])
        worst = int(np.argmax(np.abs(off) / (2 * errors + np.abs(biases))))
        what = f"Paths that leave as {'late' if sense == 'max' else 'soon'} as possible and the closed form"
        told.append(agrees(what, off[worst], 2 * errors[worst] + abs(biases[worst])))
    fit = found["fitted"]
    return [*told, f"A smooth feedback comes within {fit['below_optimum_relative']:.2%} of the latest exit."]


def report(run: Run) -> list[Section]:
    found = run.results
    tolerances = [
        [sense, rtol, row["cells"], row["error"], row["error_estimate"]]
        for sense, by_rtol in found["by_tolerance"].items()
        for rtol, row in by_rtol.items()
    ]
    paths = [
        [sense, x, exact, Measured(mean, error), bias]
        for sense, rolled in found["roll_outs"].items()
        for x, exact, mean, error, bias in zip(
            found["points"], found["exact"][sense], *(rolled[k] for k in ROLLED), strict=True
        )
    ]
    fit = found["fitted"]
    return [
        Section(
            "Bang-bang exit",
            [
                Table(["sense", "rtol", "cells", "error", "estimate"], tolerances, "Largest error over the points."),
                Table(
                    ["sense", "start", "closed form", "paths", "bias estimate"],
                    paths,
                    f"Mean exit time; the policies switch at {found['switch']['max']:.1e} and "
                    f"{found['switch']['min']:.1e}.",
                ),
                f"The fitted feedback switches at {fit['switch']:.1e} with width {fit['width']:.3f} and stays "
                f"{100 * fit['below_optimum_relative']:.3f} % below the optimum.",
                Figure(run.figure("exit_times"), "Mean exit times with closed form, and the policies."),
            ],
        )
    ]


ROLLED = ("mean", "standard_error", "bias_estimate")


def exit_time(config: Config, sense: str) -> control.ControlProblem:
    """The control problem."""
    return control.ControlProblem(
        lambda t, x, a: a,
        config.sigma,
        controls=control.Interval(-config.bound, config.bound),
        terminal=None,
        horizon=None,
        box=kolmo.Box(-1.0, 1.0, "absorbing"),
        running_cost=1.0,
        sense=sense,
    )


def mean_exit_time(config: Config, sense: str, x: np.ndarray) -> np.ndarray:
    """Mean exit time under a = ±A sign(x), in closed form."""
    A, variance, x = config.bound * (1.0 if sense == "max" else -1.0), config.sigma**2, np.abs(x)
    return (x - 1.0) / A + variance / (2.0 * A**2) * (np.exp(2.0 * A / variance) - np.exp(2.0 * A * x / variance))


def _switch(solution: control.ControlSolution) -> float:
    """Where the policy changes sign, between two nodes."""
    x, a = solution.grid.nodes[0], solution.policies[0, :, 0]
    k = int(np.flatnonzero(np.sign(a[:-1]) != np.sign(a[1:]))[0])
    return float(0.5 * (x[k] + x[k + 1]))


def _roll(config: Config, solution: control.ControlSolution) -> dict[str, Any]:
    est = kolmo.monte_carlo(
        solution.closed_loop(),
        np.array(config.points)[:, None],
        paths=config.paths,
        steps=config.steps,
        rng=config.seed,
    )
    return {key: getattr(est, key) for key in ROLLED}


def _fit(config: Config, progress: bool) -> dict[str, Any]:
    """Fit switch and width of a smooth feedback that is to exit late."""
    switch = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    width = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)

    def act(t: float, x: torch.Tensor) -> torch.Tensor:
        return -config.bound * torch.tanh((x - switch) / width)

    problem = exit_time(config, "max").closed_loop(act)
    at = torch.tensor(config.points, dtype=torch.float64)[:, None]
    fit = control.minimize(
        lambda: -control.value(problem, at, rtol=1e-5).sum(),
        [switch, width],
        bounds=[(-0.9, 0.9), (config.width, 2.0)],
        maxiter=config.maxiter,
        progress=progress,
    )
    value = control.value(problem, at, rtol=1e-7).detach().numpy()
    return {"switch": switch.item(), "width": width.item(), "value": value, "status": fit.status}


def _draw(
    config: Config, best: dict[str, Any], rolled: dict[str, Any], fit: dict[str, Any]
) -> matplotlib.figure.Figure:
    figure = matplotlib.figure.Figure(figsize=(9.0, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    x = np.linspace(-1.0, 1.0, 401)
    words = {"max": "latest", "min": "soonest"}
    for sense, color in COLORS.items():
        left.plot(x, mean_exit_time(config, sense, x), color=color, lw=2.5, alpha=0.5, label=f"{words[sense]}, exact")
        left.plot(x[::20], best[sense](x[::20]), "o", color=color, mfc="none", ms=4)
        mean, error, bias = (np.asarray(rolled[sense][key]) for key in ROLLED)
        left.errorbar(config.points, mean, 4 * error + bias, fmt="none", color=GREY, capsize=4, lw=1.2)
        right.plot(x, best[sense].policy(0.0, x)[:, 0], color=color, lw=2, label=f"{words[sense]}")
    left.plot([], [], "o", color=GREY, mfc="none", ms=4, label="Bellman equation")
    left.errorbar([], [], [], fmt="none", color=GREY, capsize=4, label="paths ± (4 s.e. + bias)")
    feedback = -config.bound * np.tanh((x - fit["switch"]) / fit["width"])
    right.plot(x, feedback, color=GREEN, lw=1.5, ls="--", label="latest, fitted")
    left.plot(x, (1.0 - x**2) / config.sigma**2, color=GREY, lw=1, ls=":", label="no control")
    ends = [-1.0, -0.5, 0.0, 0.5, 1.0]
    left.set(xlabel="$x$", ylabel="mean exit time", xticks=ends)
    left.set_ylim(0.0, 1.5 * mean_exit_time(config, "max", np.zeros(1))[0])
    left.legend(frameon=False, fontsize="small", ncols=2, loc="upper center")
    right.set(xlabel="$x$", ylabel="control $a(x)$", xticks=ends)
    right.legend(frameon=False, loc="center right", fontsize="small")
    return figure
