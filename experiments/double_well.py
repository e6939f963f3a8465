"""Steering over a barrier: a fitted feedback beside the dynamic-programming optimum.

A particle starts in the left well of dX = (X − X³ + σa) dt + σ dW and is to end in the right one: the cost is
E[∫ ½a² dt + w (X_T − 1)²]. The optimum is found twice, by the Hamilton–Jacobi–Bellman equation and, since the problem
is linearly solvable, by one linear equation. A feedback of Gaussian bumps in x, constant on pieces of time, is
fitted to the same cost through the adjoint of the backward equation. Every policy is then rolled out in paths.
"""

import dataclasses
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

import kolmo
from kolmo import control
from kolmo.report import agrees, compared
from kolmo.runs import Run

BLUE, ORANGE, GREEN, GREY = "#0072b2", "#d55e00", "#009e73", "#555555"


@dataclasses.dataclass(frozen=True)
class Config:
    seed: int = 0
    start: float = -1.0
    sigma: float = 0.7
    weight: float = 5.0  # of the terminal cost
    horizon: float = 1.5
    intervals: int = 6  # pieces in time of the fitted feedback
    bumps: int = 9  # bumps in x of the fitted feedback
    maxiter: int = 150
    rtol: float = 1e-4
    paths: int = 20_000
    steps: int = 150


def run(config: Config, run: Run, progress: bool) -> dict[str, Any]:
    problem = steering(config)
    optimum = control.solve_hjb(problem, at=[config.start], rtol=config.rtol)
    linear = control.hopf_cole(problem, at=[config.start], rtol=config.rtol)
    fit = run.unit("fit", lambda: _fit(config, progress))
    weights = torch.as_tensor(fit["weights"])
    policies = {
        "no control": problem.constant([0.0]),
        "fitted feedback": lambda t, x: feedback(config, weights, t, x),
        "dynamic programming": optimum.policy,
        "logarithmic transform": linear.policy,
    }
    rolled = {
        name: run.unit(f"paths-{n}", lambda p=p: _roll(config, problem, p))
        for n, (name, p) in enumerate(policies.items())
    }
    values = {
        "dynamic programming": _number(optimum, config.start),
        "logarithmic transform": _number(linear, config.start),
        "fitted feedback": (fit["value"], config.rtol * abs(fit["value"])),
    }
    run.save_figure("policies", _draw_policies(config, policies))
    run.save_figure("costs", _draw_costs(rolled, values))
    best = values["dynamic programming"][0]
    return {
        "values": {name: {"value": v, "error_estimate": e} for name, (v, e) in values.items()},
        "roll_outs": rolled,
        "fitted_above_optimum": fit["value"] - best,
        "fitted_above_optimum_relative": (fit["value"] - best) / best,
        "routes_differ_by": abs(best - values["logarithmic transform"][0]),
        "fit": {"status": fit["status"], "iterations": fit["iterations"]},
    }


def steering(config: Config) -> control.ControlProblem:
    """The control problem."""
    return control.ControlProblem(
        lambda t, x, a: x - x**3 + config.sigma * a,
        config.sigma,
        controls=control.Unbounded(1),
        terminal=lambda x: config.weight * (x[..., 0] - 1.0) ** 2,
        horizon=config.horizon,
        box=kolmo.Box(-3.0, 3.0),
        running_cost=lambda t, x, a: 0.5 * a[..., 0] ** 2,
    )


def feedback(config: Config, weights: torch.Tensor, t: float, x: torch.Tensor) -> torch.Tensor:
    """The fitted feedback: bumps in x, weights (intervals, bumps) constant on pieces of time."""
    k = min(int(t / config.horizon * config.intervals), config.intervals - 1)
    centres = torch.linspace(-2.0, 2.0, config.bumps, dtype=torch.float64)
    width = 4.0 / (config.bumps - 1)
    shapes = torch.exp(-0.5 * ((x - centres) / width) ** 2)
    return (weights[k] * shapes).sum(-1, keepdim=True)


def conclusions(run: Run) -> list[str]:
    found = run.results
    values = found["values"]
    best, linear = values["dynamic programming"], values["logarithmic transform"]
    free, steered = (found["roll_outs"][name] for name in ("no control", "dynamic programming"))
    error = float(np.hypot(free["standard_error"], steered["standard_error"]))
    both = best["error_estimate"] + linear["error_estimate"]
    return [
        compared("The cost of paths", free["mean"], steered["mean"], error, ("without control", "with the best one")),
        agrees("Dynamic programming and the logarithmic transform", best["value"] - linear["value"], both),
        f"The fitted feedback costs {found['fitted_above_optimum_relative']:.2%} more than the optimum.",
    ]


def _fit(config: Config, progress: bool) -> dict[str, Any]:
    """Minimise the expected cost of the feedback over its weights."""
    weights = torch.zeros(config.intervals, config.bumps, dtype=torch.float64, requires_grad=True)
    ends = np.linspace(0.0, config.horizon, config.intervals + 1)[1:-1]

    def act(t: float, x: torch.Tensor) -> torch.Tensor:
        return feedback(config, weights, t, x)

    sde = kolmo.SDE(
        lambda t, x: x - x**3 + config.sigma * act(t, x),
        config.sigma,
        dim=1,
        breakpoints=ends.tolist(),
        autonomous=True,
        arrays="torch",
    )
    problem = kolmo.KolmogorovProblem(
        sde,
        lambda x: config.weight * (x[..., 0] - 1.0) ** 2,
        config.horizon,
        kolmo.Box(-3.0, 3.0),
        source=lambda t, x: 0.5 * act(t, x)[..., 0] ** 2,
    )
    fit = control.minimize(
        lambda: control.value(problem, [config.start], rtol=config.rtol).sum(),
        weights,
        maxiter=config.maxiter,
        progress=progress,
    )
    return {
        "weights": weights.detach().numpy(),
        "value": float(fit.fun),
        "status": fit.status,
        "iterations": int(fit.nit),
        "history": fit.history["objective"],
    }


def _roll(config: Config, problem: control.ControlProblem, policy: Any) -> dict[str, float]:
    """Cost of a policy by simulated paths."""
    est = kolmo.monte_carlo(
        problem.closed_loop(policy), [config.start], paths=config.paths, steps=config.steps, rng=config.seed
    )
    return {
        "mean": float(np.ravel(est.mean)[0]),
        "standard_error": float(np.ravel(est.standard_error)[0]),
        "bias_estimate": float(np.ravel(est.bias_estimate)[0]),
    }


def _number(solution: Any, start: float) -> tuple[float, float]:
    """Value at the start and its error estimate."""
    return float(np.ravel(solution([start]))[0]), float(np.ravel(solution.error_estimate)[0])


def _draw_policies(config: Config, policies: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(9.0, 3.6), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    x = torch.linspace(-2.0, 2.0, 201, dtype=torch.float64)[:, None]
    styles = {
        "dynamic programming": {"color": BLUE, "lw": 2.5},
        "logarithmic transform": {"color": ORANGE, "lw": 1.5, "ls": "--"},
        "fitted feedback": {"color": GREEN, "lw": 1.5},
    }
    for ax, t in zip(axes, (0.0, 0.75 * config.horizon), strict=True):
        for name, style in styles.items():
            ax.plot(x[:, 0], torch.as_tensor(policies[name](t, x)).reshape(-1).detach(), label=name, **style)
        ax.axvline(config.start, color=GREY, lw=0.8, ls=":")
        ax.set(xlabel="$x$", title=f"$t = {t:.3g}$")
    axes[0].set_ylabel("control $a(t, x)$")
    axes[1].legend(frameon=False)
    return figure


def _draw_costs(rolled: dict[str, Any], values: dict[str, tuple[float, float]]) -> Figure:
    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    ax = figure.subplots()
    names = [name for name in rolled if name in values]
    for n, name in enumerate(names):
        bar = 4.0 * rolled[name]["standard_error"] + abs(rolled[name]["bias_estimate"])
        ax.errorbar(rolled[name]["mean"], n, xerr=bar, fmt="o", color=BLUE, capsize=4, label=None if n else "paths")
        ax.plot(values[name][0], n, "|", ms=18, mew=2, color=ORANGE, label=None if n else "equation")
    free = rolled["no control"]
    ax.set_yticks(range(len(names)), names)
    ax.set(xlabel="expected cost", ylim=(-0.6, len(names) - 0.4))
    ax.set_title(f"without control: {free['mean']:.2f} ± {free['standard_error']:.2f}", fontsize="medium")
    figure.legend(*ax.get_legend_handles_labels(), frameon=False, loc="outside right upper")
    return figure
