"""Drift and noise fitted together: a path by maximum likelihood, and a two-dimensional flow to observed expectations.

An Ornstein–Uhlenbeck process dX = κ(m − X) dt + σ dW, observed at equal intervals, is an autoregression: its likelihood
has its maximum in closed form, and that is the exact answer for κ, m and σ fitted through the transition densities of
the Fokker–Planck equation. A noisy limit cycle in the plane (the normal form of a Hopf bifurcation, with correlated
noise) is fitted to expectations of five functions at one time from a few starts; they were computed to a sharp
tolerance on a grid of their own, so that the parameters which made them are the exact answer.
"""

import dataclasses
from typing import Any

import matplotlib.figure
import numpy as np
import torch

import kolmo
from kolmo import control
from kolmo.report import Figure, Section, Table
from kolmo.runs import Run

BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "0.6"
FLOW = ("growth", "turning", "cubic", "noise along x", "noise along y", "correlation")


@dataclasses.dataclass(frozen=True)
class Config:
    seed: int = 0
    path: tuple[float, ...] = (1.5, 0.4, 0.7)  # κ, m, σ that make the path
    observations: int = 300
    interval: float = 0.3
    nodes: int = 121
    flow: tuple[float, ...] = (1.0, 2.0, 1.0, 0.5, 0.35, 0.4)  # see FLOW
    horizon: float = 0.6
    nodes_flow: int = 41
    steps_flow: int = 12
    rtol: float = 1e-5  # of what is observed
    maxiter: int = 60


def run(config: Config, run: Run, progress: bool) -> dict[str, Any]:
    path = run.unit("path", lambda: _fit_path(config, progress))
    flow = run.unit("flow", lambda: _fit_flow(config, progress))
    run.save_figure("path", _draw_path(config, path))
    run.save_figure("flow", _draw_flow(config, flow))
    return {"path": _answer(("κ", "m", "σ"), path), "flow": _answer(FLOW, flow)}


def conclusions(run: Run) -> list[str]:
    what = {"path": "The maximum in closed form", "flow": "The true drift of the limit cycle"}
    return [
        f"{what[part]} was found to {found['distance']:.1e} in {found['gradients']} values with gradients "
        f"({found['status']})."
        for part, found in run.results.items()
    ]


def report(run: Run) -> list[Section]:
    def table(part: str, exact: str) -> Table:
        found = run.results[part]
        rows = [[name, *values] for name, values in found["parameters"].items()]
        caption = f"{found['gradients']} values with gradients; largest distance {found['distance']:.1e}."
        return Table(["parameter", "start", exact, "fitted"], rows, caption)

    def figure(name: str, alt: str) -> Figure:
        return Figure(run.folder / "figures" / f"{name}.png", alt)

    return [
        Section(
            "A path by maximum likelihood",
            [
                "An Ornstein–Uhlenbeck process, fitted through its transition densities.",
                table("path", "maximum in closed form"),
                figure("path", "The observed path; the fitted transition lies on the one in closed form."),
            ],
        ),
        Section(
            "A limit cycle from expectations",
            [
                "The noisy Hopf normal form, fitted to expectations of x, y, x², xy and y² from four starts.",
                table("flow", "true"),
                figure("flow", "True and fitted drift on top of each other; the misfit falls over the iterations."),
            ],
        ),
    ]


def _answer(names: tuple[str, ...], found: dict[str, Any]) -> dict[str, Any]:
    rows = zip(found["start"], found["exact"], found["fitted"], strict=True)
    return {
        "parameters": {name: [float(v) for v in row] for name, row in zip(names, rows, strict=True)},
        "distance": float(np.abs(np.array(found["fitted"]) - np.array(found["exact"])).max()),
        "gradients": int(found["gradients"]),
        "status": str(found["status"]),
    }


def _observe(config: Config) -> np.ndarray:
    """A path of the Ornstein–Uhlenbeck process, drawn from its exact transitions."""
    kappa, mean, sigma = config.path
    rng, slope = np.random.default_rng(config.seed), np.exp(-kappa * config.interval)
    spread = sigma * np.sqrt((1.0 - slope**2) / (2.0 * kappa))
    x = [mean]
    for noise in rng.standard_normal(config.observations):
        x.append(mean + slope * (x[-1] - mean) + spread * noise)
    return np.array(x)


def _closed_form(x: np.ndarray, dt: float) -> list[float]:
    """κ, m and σ of largest likelihood: least squares of each observation on the one before."""
    slope, shift = np.polyfit(x[:-1], x[1:], 1)
    kappa, variance = -np.log(slope) / dt, np.mean((x[1:] - slope * x[:-1] - shift) ** 2)
    return [float(kappa), float(shift / (1.0 - slope)), float(np.sqrt(2.0 * kappa * variance / (1.0 - slope**2)))]


def _fit_path(config: Config, progress: bool) -> dict[str, Any]:
    x = _observe(config)
    start = [0.5, 0.0, 1.0]
    theta = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    sde = kolmo.SDE(
        lambda t, x: theta[0] * (theta[1] - x), lambda t, x: theta[2] + 0.0 * x[..., 0], dim=1, arrays="torch"
    )
    room = np.ptp(x)
    box = kolmo.Box(x.min() - room, x.max() + room)
    problem = kolmo.KolmogorovProblem(sde, lambda x: x[..., 0], config.interval, box)
    recipe = kolmo.solve(problem, grid=config.nodes, steps=10).discretization

    def misfit() -> torch.Tensor:
        return -control.transition_density(problem, x[:-1], x[1:], discretization=recipe).log().mean()

    fit = control.minimize(
        misfit, theta, bounds=[(np.array([0.05, -5.0, 0.2]), None)], maxiter=config.maxiter, progress=progress
    )
    return {
        "observed": x,
        "start": start,
        "exact": _closed_form(x, config.interval),
        "fitted": theta.detach().numpy().copy(),
        "gradients": fit.nfev,
        "status": fit.status,
        "objective": fit.history["objective"],
    }


def _starts() -> torch.Tensor:
    """Four starts, inside and outside the limit cycle."""
    return torch.tensor([[0.3, 0.0], [0.0, -0.8], [-1.4, 0.5], [0.9, 1.2]], dtype=torch.float64)


def _flow(theta: torch.Tensor, horizon: float, box: kolmo.Box | None = None) -> kolmo.KolmogorovProblem:
    """Expectations of x, y, x², xy and y² under the noisy normal form."""

    def drift(t: float, z: torch.Tensor) -> torch.Tensor:
        x, y = z[..., 0], z[..., 1]
        pull = theta[0] - theta[2] * (x**2 + y**2)
        return torch.stack([pull * x - theta[1] * y, theta[1] * x + pull * y], -1)

    def covariance(t: float, z: torch.Tensor) -> torch.Tensor:
        shared = theta[5] * theta[3] * theta[4]
        rows = torch.stack([theta[3] ** 2, shared, shared, theta[4] ** 2]).reshape(2, 2)
        return rows.expand(*z.shape[:-1], 2, 2)

    def observed(z: torch.Tensor) -> torch.Tensor:
        x, y = z[..., 0], z[..., 1]
        return torch.stack([x, y, x**2, x * y, y**2], -1)

    sde = kolmo.SDE(drift, covariance=covariance, dim=2, arrays="torch")
    return kolmo.KolmogorovProblem(sde, observed, horizon, box)


def _fit_flow(config: Config, progress: bool) -> dict[str, Any]:
    truth = torch.tensor(config.flow, dtype=torch.float64)
    wanted = kolmo.solve(_flow(truth, config.horizon), at=_starts(), rtol=config.rtol)(_starts())
    start = [0.2, 1.0, 0.5, 0.8, 0.8, 0.0]
    theta = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    problem = _flow(theta, config.horizon, kolmo.Box([-2.2, -2.2], [2.2, 2.2]))
    recipe = kolmo.solve(
        problem, grid=config.nodes_flow, steps=config.steps_flow, scheme="central6", stepper="mcs3"
    ).discretization

    def misfit() -> torch.Tensor:
        return (control.value(problem, _starts(), discretization=recipe) - wanted).square().sum()

    low, high = np.array([-3.0, -6.0, 0.05, 0.1, 0.1, -0.9]), np.array([3.0, 6.0, 3.0, 1.5, 1.5, 0.9])
    fit = control.minimize(misfit, theta, bounds=[(low, high)], maxiter=config.maxiter, progress=progress)
    return {
        "start": start,
        "exact": config.flow,
        "fitted": theta.detach().numpy().copy(),
        "gradients": fit.nfev,
        "status": fit.status,
        "objective": fit.history["objective"],
    }


def _draw_path(config: Config, found: dict[str, Any]) -> matplotlib.figure.Figure:
    x = np.asarray(found["observed"])
    figure = matplotlib.figure.Figure(figsize=(8.0, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.6, 1.0])
    left.plot(config.interval * np.arange(len(x)), x, color=GREY, lw=0.8)
    left.set(xlabel="$t$", ylabel="$X_t$", title="observed path")
    z = np.linspace(x.min(), x.max(), 9)
    right.plot(x[:-1], x[1:], ".", color=GREY, ms=3)
    for values, style, label in ((found["exact"], {"color": BLUE, "lw": 3.5}, "closed form"),
                                 (found["fitted"], {"color": ORANGE, "lw": 1.5, "ls": "--"}, "fitted")):  # fmt: skip
        kappa, mean, sigma = values
        slope = np.exp(-kappa * config.interval)
        middle, spread = mean + slope * (z - mean), sigma * np.sqrt((1.0 - slope**2) / (2.0 * kappa))
        right.plot(z, middle, label=label, **style)
        right.plot(z, middle + 2.0 * spread, alpha=0.5, **style)
        right.plot(z, middle - 2.0 * spread, alpha=0.5, **style)
    right.set(xlabel="$X_t$", ylabel=rf"$X_{{t+{config.interval:g}}}$", title="mean ± 2 deviations")
    right.legend(frameon=False)
    return figure


def _draw_flow(config: Config, found: dict[str, Any]) -> matplotlib.figure.Figure:
    figure = matplotlib.figure.Figure(figsize=(8.0, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    grid = np.linspace(-1.8, 1.8, 19)
    z = torch.as_tensor(np.stack(np.meshgrid(grid, grid, indexing="ij"), -1))
    for values, color, width in ((found["exact"], BLUE, 0.008), (found["fitted"], ORANGE, 0.003)):
        b = _flow(torch.as_tensor(np.asarray(values)), 1.0).sde.drift(0.0, z).numpy()
        left.quiver(*np.moveaxis(z.numpy(), -1, 0), *np.moveaxis(b, -1, 0), color=color, width=width, scale=90)
    left.plot(*_starts().numpy().T, "o", color="k", ms=4)
    left.set(xlabel="$x$", ylabel="$y$", aspect="equal", title="drift: true (wide) and fitted; starts")
    right.semilogy(np.asarray(found["objective"]), color=ORANGE)
    right.set(xlabel="iteration", ylabel="misfit of the expectations")
    return figure
