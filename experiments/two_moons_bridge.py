"""Schrödinger bridge: steer one of two moons into the other with least effort, against the exact kernel.

Brownian motion σW is to carry the density of the upper moon at time 0 into that of the lower one at time 1. The bridge
found by `control.schroedinger_bridge` is compared with plain Fortet–Sinkhorn iterations on a fine grid of a square, and
rolled out: the effort of simulated paths against the cost, and the law at their end against the lower moon, by its
moments. The same at small noise, where the kernel underflows, has no such reference: its paths are the check.
"""

import dataclasses
import math
from typing import Any

import matplotlib.figure
import numpy as np
import torch

import kolmo
from kolmo import control
from kolmo.report import Figure, Measured, Section, Table, agrees, held
from kolmo.runs import Run

BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#555555"
HALF = 3.0  # the reference lives on (−3, 3)²
MOMENTS = ("$E X$", "$E Y$", "$E X^2$", "$E XY$", "$E Y^2$")


@dataclasses.dataclass(frozen=True)
class Config:
    seed: int = 0
    sigma: float = 0.6
    width: float = 0.25  # deviation of a moon about its arc
    small: float = 0.1  # the same once more, at this noise
    rtols: tuple[float, ...] = (1e-3, 1e-5)
    nodes: int = 121  # per axis, of the exact kernel
    paths: int = 3_000
    steps: int = 64


def run(config: Config, run: Run, progress: bool) -> dict[str, Any]:
    exact, coarser = (run.unit(f"kernel-{n}", lambda n=n: _exact(config, n)) for n in (config.nodes, config.nodes // 2))
    solved = {rtol: solve(config, rtol) for rtol in config.rtols}
    best = solved[config.rtols[-1]]
    rolled = run.unit("paths", lambda: _roll(config, best))
    run.save_figure("flow", _draw(config, best, rolled))
    still = dataclasses.replace(config, sigma=config.small)
    steered = solve(still, config.rtols[0])
    small = run.unit("small-paths", lambda: _roll(still, steered))
    run.save_figure("small", _draw(still, steered, small))
    return {
        "exact": exact["cost"],
        "exact_uncertainty": abs(exact["cost"] - coarser["cost"]),
        "by_tolerance": {
            f"{rtol:g}": {
                "cost": bridge.cost,
                "error": abs(bridge.cost - exact["cost"]),
                "error_estimate": bridge.error_estimate,
                "nodes": bridge.size,
                "iterations": bridge.iterations,
                "misfit": bridge.misfit,
                "status": bridge.status,
            }
            for rtol, bridge in solved.items()
        },
        "middle_total_variation": _distance(best, np.asarray(exact["middle"])),
        "roll_out": {key: rolled[key] for key in ("mean", "standard_error", "bias_estimate")},
        "end": rolled["end"],
        "small": {
            "cost": steered.cost,
            "errors": steered.errors._asdict(),
            "status": steered.status,
            "roll_out": {key: small[key] for key in ("mean", "standard_error", "bias_estimate")},
            "end": small["end"],
        },
    }


def conclusions(run: Run) -> list[str]:
    found = run.results
    rows = found["by_tolerance"].values()
    told = [held("The cost", [row["error"] for row in rows], [row["error_estimate"] for row in rows], "its estimate")]
    for name, cost, paths in (
        ("that of the kernel", found["exact"], found["roll_out"]),
        ("the cost with little noise", found["small"]["cost"], found["small"]["roll_out"]),
    ):
        uncertainty = 2 * paths["standard_error"] + abs(paths["bias_estimate"])
        told.append(agrees(f"The effort of paths and {name}", paths["mean"] - cost, uncertainty))
    return told


def report(run: Run) -> list[Section]:
    found, end = run.results, run.results["end"]
    rows = [[r, v["nodes"], v["cost"], v["error"], v["error_estimate"], v["misfit"]]
            for r, v in found["by_tolerance"].items()]  # fmt: skip
    moments = [
        [name, exact, Measured(mean, error), bias]
        for name, exact, mean, error, bias in zip(
            MOMENTS, end["exact"], end["mean"], end["standard_error"], end["bias_estimate"], strict=True
        )
    ]
    paths = found["roll_out"]
    return [
        Section(
            "Schrödinger bridge between two moons",
            [
                Table(
                    ["rtol", "nodes", "cost", "error", "estimate", "misfit of the marginals"],
                    rows,
                    f"Exact kernel: cost {found['exact']:.6f}, known to {found['exact_uncertainty']:.0e}.",
                ),
                Table(
                    ["", "exact", "paths", "bias estimate"],
                    [["effort", found["exact"], Measured(paths["mean"], paths["standard_error"]),
                      paths["bias_estimate"]], *moments],
                    "Effort of the paths, and moments at their end.",
                ),
                Figure(run.figure("flow"), "Density of the bridge at five times, with its drift and some paths."),
                Figure(run.figure("small"), "The same at small noise: nearly transport of least squares."),
            ],
        )
    ]  # fmt: skip


def moon(config: Config, upper: bool, x: torch.Tensor) -> torch.Tensor:
    """Density of a moon: Gaussian bumps along half a circle."""
    angle = torch.linspace(0.0, math.pi, 41, dtype=torch.float64)
    sign = 1.0 if upper else -1.0
    arc = torch.stack([torch.cos(angle) - 0.5 * sign, sign * (torch.sin(angle) - 0.25)], -1)
    squares = ((x[..., None, :] - arc) ** 2).sum(-1)
    return torch.exp(-squares / (2.0 * config.width**2)).mean(-1) / (2.0 * math.pi * config.width**2)


def solve(config: Config, rtol: float) -> control.SchroedingerBridge:
    """The bridge by kolmo."""
    motion = kolmo.SDE(0.0, diffusion=config.sigma, dim=2)
    ends = (lambda x: moon(config, True, x)), (lambda x: moon(config, False, x))
    return control.schroedinger_bridge(motion, *ends, 1.0, rtol=rtol)


def _exact(config: Config, n: int) -> dict[str, Any]:
    """Cost, and density half way (with its nodes), by Sinkhorn's iteration with the Gaussian kernel."""
    x = np.linspace(-HALF, HALF, n)
    h = x[1] - x[0]
    points = torch.as_tensor(np.stack(np.meshgrid(x, x, indexing="ij"), -1))
    starts, ends = (moon(config, upper, points).numpy() for upper in (True, False))
    starts, ends = starts / starts.sum(), ends / ends.sum()

    def heat(field: np.ndarray, time: float) -> np.ndarray:
        variance = config.sigma**2 * time
        kernel = h / math.sqrt(2.0 * math.pi * variance) * np.exp(-((x[:, None] - x) ** 2) / (2.0 * variance))
        return kernel @ field @ kernel

    psi = np.ones((n, n))
    for _ in range(500):
        share = starts / heat(psi, 1.0)
        arrived = heat(share, 1.0)
        if 0.5 * np.abs(arrived * psi - ends).sum() < 1e-13:
            break
        psi = ends / arrived
    cost = (ends * np.log(psi)).sum() - (starts * np.log(heat(psi, 1.0))).sum()
    return {"cost": float(cost), "middle": heat(share, 0.5) * heat(psi, 0.5) / h**2}


def _distance(bridge: control.SchroedingerBridge, exact: np.ndarray) -> float:
    """Total variation, half way, between the bridge and a density on a uniform grid of the square."""
    even = kolmo.Grid.of(kolmo.Box([-HALF] * 2, [HALF] * 2), list(exact.shape))
    found = bridge.density(0.5, even.points)
    return float(0.5 * (np.abs(found - exact.reshape(-1)) * even.volumes).sum())


def _moments(x: torch.Tensor) -> torch.Tensor:
    one, two = x[..., 0], x[..., 1]
    return torch.stack([one, two, one**2, one * two, two**2], -1)


def _roll(config: Config, bridge: control.SchroedingerBridge) -> dict[str, Any]:
    """Effort and end points of Euler paths from the upper moon, with steps of two lengths by the same noise."""
    generator = torch.Generator().manual_seed(config.seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    angle = math.pi * torch.randint(0, 41, (config.paths,), generator=generator) / 40.0
    arc = torch.stack([torch.cos(angle) - 0.5, torch.sin(angle) - 0.25], -1)
    fine = coarse = arc + config.width * normal(config.paths, 2)
    efforts = [torch.zeros(config.paths, dtype=torch.float64) for _ in range(2)]
    dt, kept = 1.0 / config.steps, [fine[:60]]
    for k in range(0, config.steps, 2):
        noise = config.sigma * math.sqrt(dt) * normal(2, config.paths, 2)
        for j in (0, 1):
            a = bridge.sde.drift((k + j) * dt, fine)
            efforts[0] = efforts[0] + 0.5 * dt * (a / config.sigma).square().sum(-1)
            fine = fine + dt * a + noise[j]
            kept.append(fine[:60])
        a = bridge.sde.drift(k * dt, coarse)
        efforts[1] = efforts[1] + dt * (a / config.sigma).square().sum(-1)
        coarse = coarse + 2.0 * dt * a + noise.sum(0)
    both = [torch.cat([e[:, None], _moments(x)], -1) for e, x in zip(efforts, (fine, coarse), strict=True)]
    change, root = both[0] - both[1], math.sqrt(config.paths)
    # as in kolmo.monte_carlo, of weak order 1
    bias = 2.0 * (change.mean(0).abs() + change.std(0) / root)
    angles = torch.linspace(0.0, math.pi, 41, dtype=torch.float64)
    lower = torch.stack([torch.cos(angles) + 0.5, 0.25 - torch.sin(angles)], -1)
    spread = config.width**2 * torch.tensor([0.0, 0.0, 1.0, 0.0, 1.0])
    mean, error = both[0].mean(0), both[0].std(0) / root
    return {
        "mean": mean[0].item(),
        "standard_error": error[0].item(),
        "bias_estimate": bias[0].item(),
        "end": {
            "exact": (_moments(lower).mean(0) + spread).tolist(),
            "mean": mean[1:].tolist(),
            "standard_error": error[1:].tolist(),
            "bias_estimate": bias[1:].tolist(),
        },
        "some": torch.stack(kept).numpy(),
    }


def _draw(config: Config, bridge: control.SchroedingerBridge, rolled: dict[str, Any]) -> matplotlib.figure.Figure:
    figure = matplotlib.figure.Figure(figsize=(11.0, 2.8), layout="constrained")
    axes = figure.subplots(1, 5, sharex=True, sharey=True)
    some, x = np.asarray(rolled["some"]), bridge.grid.nodes
    arrows = np.stack(np.meshgrid(*[np.linspace(-1.8, 1.8, 10)] * 2, indexing="ij"), -1)
    for ax, t in zip(axes, (0.0, 0.25, 0.5, 0.75, 1.0), strict=True):
        ax.contourf(*x, bridge.density(t).T, levels=np.linspace(0.02, 0.6, 12), cmap="cividis_r", extend="max")
        k = round(t * config.steps)
        ax.plot(*np.moveaxis(some[max(0, k - config.steps // 4) : k + 1, :8], -1, 0), color=ORANGE, lw=0.5, alpha=0.8)
        ax.plot(*some[k].T, ".", color=ORANGE, ms=2)
        if t < 1.0:
            drift = bridge.sde.drift(t, arrows)
            ax.quiver(*np.moveaxis(arrows, -1, 0), *np.moveaxis(drift, -1, 0), color=GREY, width=0.006, scale=60)
        ax.set(aspect="equal", xlim=(-2.2, 2.2), ylim=(-1.9, 1.9), title=f"$t = {t:g}$", xlabel="$x$")
    axes[0].set_ylabel("$y$")
    return figure
