"""Linear-quadratic control: the Bellman equation and a fitted gain against Riccati's equation.

dX = (αX + a) dt + σ dW with cost E[∫ qX² + ra² dt + hX_T²] has the value p(t)x² + s(t) and the feedback a = −p(t)x/r,
p and s from Riccati's ordinary differential equation: the exact answer for three things. The Hamilton–Jacobi–Bellman
equation solved to a loose and a sharp tolerance; a linear feedback a = −g_k x, one gain per interval of time, fitted
through the adjoint of the backward equation; and the optimal policy rolled out in simulated paths.
"""

import dataclasses
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.integrate import solve_ivp

import kolmo
from kolmo import control
from kolmo.report import Figure as Drawn
from kolmo.report import Measured, Section, Table, agrees, held
from kolmo.runs import Run

BLUE, ORANGE, GREEN = "#0072b2", "#d55e00", "#009e73"


@dataclasses.dataclass(frozen=True)
class Config:
    seed: int = 0
    alpha: float = 0.5
    sigma: float = 0.6
    state_cost: float = 1.0  # q
    effort: float = 0.5  # r
    terminal: float = 2.0  # h
    horizon: float = 1.0
    start: float = 1.0
    rtols: tuple[float, ...] = (1e-3, 1e-6)
    intervals: int = 8  # pieces in time of the fitted gain
    paths: int = 20_000
    steps: int = 128


def run(config: Config, run: Run, progress: bool) -> dict[str, Any]:
    times = np.linspace(0.0, config.horizon, 201)
    p, s = _riccati(config, times)
    exact = p[0] * config.start**2 + s[0]
    problem = _problem(config)
    solved = {rtol: control.solve_hjb(problem, at=[config.start], rtol=rtol, atol=1e-12) for rtol in config.rtols}
    table = {
        f"{rtol:g}": {
            "error": abs(float(np.ravel(opt([config.start]))[0]) - exact),
            "error_estimate": float(np.ravel(opt.error_estimate)[0]),
            "policy_error": abs(
                float(np.ravel(opt.policy(0.0, [config.start]))[0]) + p[0] / config.effort * config.start
            ),
            "status": opt.status,
        }
        for rtol, opt in solved.items()
    }
    best = solved[config.rtols[-1]]
    gains = run.unit("gains", lambda: _fit(config, progress))
    est = kolmo.monte_carlo(best.closed_loop(), [config.start], paths=config.paths, steps=config.steps, rng=config.seed)
    run.save_figure("gains", _draw_gains(config, times, p / config.effort, gains["gains"], best))
    return {
        "exact": exact,
        "by_tolerance": table,
        "fitted_gains": {"value": gains["value"], "above_optimum": gains["value"] - exact, "status": gains["status"]},
        "roll_out": {
            "mean": float(np.ravel(est.mean)[0]),
            "standard_error": float(np.ravel(est.standard_error)[0]),
            "bias_estimate": float(np.ravel(est.bias_estimate)[0]),
        },
    }


def report(run: Run) -> list[Section]:
    found = run.results
    rows = [
        [rtol, row["error"], row["error_estimate"], row["policy_error"]] for rtol, row in found["by_tolerance"].items()
    ]
    paths = found["roll_out"]
    others = [
        ["Riccati's equation", found["exact"], None],
        ["fitted gains", found["fitted_gains"]["value"], None],
        ["paths under the policy", Measured(paths["mean"], paths["standard_error"]), paths["bias_estimate"]],
    ]
    text = "A linear system with noise and quadratic costs is steered by the Bellman equation, and by fitted gains."
    return [
        Section("What was done", [f"{text} Riccati's equation has the exact answer."]),
        Section(
            "The optimum",
            [
                Table(["rtol", "error", "estimate", "error of the policy"], rows, "At the start, against Riccati."),
                Table(["route", "cost", "bias estimate"], others, "± one standard error."),
                Drawn(run.figure("gains"), "Feedback gains over time", "Gains that steer: exact, found and fitted."),
            ],
        ),
    ]


def conclusions(run: Run) -> list[str]:
    found = run.results
    rows, paths = found["by_tolerance"].values(), found["roll_out"]
    return [
        held("The value", [row["error"] for row in rows], [row["error_estimate"] for row in rows], "its estimate"),
        f"Gains that are constant on pieces of time cost {found['fitted_gains']['above_optimum']:.1e} more than the "
        f"optimum, {found['exact']:.5f} by Riccati's equation.",
        agrees(
            "Paths under the policy and Riccati's equation",
            paths["mean"] - found["exact"],
            2 * paths["standard_error"] + abs(paths["bias_estimate"]),
        ),
    ]


def _problem(config: Config) -> control.ControlProblem:
    return control.ControlProblem(
        lambda t, x, a: config.alpha * x + a,
        config.sigma,
        controls=control.Unbounded(1),
        terminal=lambda x: config.terminal * x[..., 0] ** 2,
        horizon=config.horizon,
        box=kolmo.Box(-6.0, 6.0),
        running_cost=lambda t, x, a: config.state_cost * x[..., 0] ** 2 + config.effort * a[..., 0] ** 2,
    )


def _riccati(config: Config, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """p and s at the times, integrated backwards from T."""

    def right(_: float, y: np.ndarray) -> list[float]:
        return [config.state_cost + 2.0 * config.alpha * y[0] - y[0] ** 2 / config.effort, config.sigma**2 * y[0]]

    back = config.horizon - times[::-1]
    found = solve_ivp(right, (0.0, config.horizon), [config.terminal, 0.0], t_eval=back, rtol=1e-12, atol=1e-13)
    return found.y[0, ::-1], found.y[1, ::-1]


def _fit(config: Config, progress: bool) -> dict[str, Any]:
    """Fit one feedback gain per interval of time."""
    gains = torch.zeros(config.intervals, dtype=torch.float64, requires_grad=True)

    def act(t: float, x: torch.Tensor) -> torch.Tensor:
        return -gains[min(int(t / config.horizon * config.intervals), config.intervals - 1)] * x

    ends = np.linspace(0.0, config.horizon, config.intervals + 1)[1:-1]
    sde = kolmo.SDE(
        lambda t, x: config.alpha * x + act(t, x), config.sigma, dim=1, breakpoints=ends.tolist(), arrays="torch"
    )
    problem = kolmo.KolmogorovProblem(
        sde,
        lambda x: config.terminal * x[..., 0] ** 2,
        config.horizon,
        source=lambda t, x: config.state_cost * x[..., 0] ** 2 + config.effort * act(t, x)[..., 0] ** 2,
    )
    fit = control.minimize(lambda: control.value(problem, [config.start], rtol=1e-6).sum(), gains, progress=progress)
    return {"gains": gains.detach().numpy(), "value": float(fit.fun), "status": fit.status}


def _draw_gains(config: Config, times: np.ndarray, exact: np.ndarray, fitted: np.ndarray, best: Any) -> Figure:
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    ax = figure.subplots()
    ax.plot(times, exact, color=BLUE, lw=2.5, label="Riccati")
    some = np.linspace(0.0, config.horizon, 17)[:-1]
    found = [-float(np.ravel(best.policy(t, [config.start]))[0]) / config.start for t in some]
    ax.plot(some, found, "o", color=ORANGE, mfc="none", label="Bellman equation")
    ax.stairs(
        fitted, np.linspace(0.0, config.horizon, len(fitted) + 1), baseline=None, color=GREEN, lw=1.5, label="fitted"
    )
    ax.set(xlabel="$t$", ylabel="feedback gain $-a/x$")
    ax.legend(frameon=False)
    return figure
