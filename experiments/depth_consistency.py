"""Depth-consistency of dropout: what noise does to the loss of one flow cut into 8 to 256 layers.

Dropout and stochastic depth with a fixed keep probability make increments of variance O(h²) in each layer: what they
add to the loss fades like 1/L. Centred Bernoulli noise has variance O(h), and its effect tends to a limit, that of a
diffusion. Every number is exact to a tolerance (recursion over the layers, no sampling) and stands beside its
prediction ½ Σ C:∇²u along the noise-free path. Error bars are over random vector fields.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from kolmo.experiments._crew import Crew
from matplotlib import figure

from kolmo import bridge
from kolmo.bridge.laws import NoiseLaw
from kolmo.report import Figure, Measured, Section, Table
from kolmo.runs import Run

COLORS = ("#0072b2", "#d55e00", "#009e73")


@dataclasses.dataclass(frozen=True)
class Config:
    seeds: int = 5
    seed: int = 0
    depths: tuple[int, ...] = (8, 16, 32, 64, 128, 256)
    keep: float = 0.5
    c: float = 0.4  # strength of the centred Bernoulli noise
    width: int = 12
    rtol: float = 3e-3  # of the effect
    workers: int = 2


def laws(config: Config) -> dict[str, NoiseLaw]:
    return {
        f"dropout, keep {config.keep:g}": bridge.BranchDropout(config.keep),
        f"stochastic depth, keep {config.keep:g}": bridge.StochasticDepth(config.keep),
        f"centred Bernoulli, c = {config.c:g}": bridge.CentredBernoulli(config.c),
    }


def run(config: Config, run: Run, progress: bool) -> dict[str, Any]:
    seeds, names = range(config.seed, config.seed + config.seeds), list(laws(config))
    keys = {(i, seed): f"law{i}-seed{seed}" for i in range(len(names)) for seed in seeds}
    with Crew(run, config.workers, units=len(keys), progress=progress) as crew:
        done = crew.do({key: (effects, (config, names[i], seed)) for (i, seed), key in keys.items()})
    results = {name: _over_seeds(config, [done[keys[i, seed]] for seed in seeds]) for i, name in enumerate(names)}
    run.save_figure("depth", _draw(config, results))
    return results


def effects(config: Config, name: str, seed: int) -> dict[str, Any]:
    """Noisy loss − noise-free loss, its prediction and the viscosity, averaged over states, for every depth."""
    branch = bridge.MLPBranch.create(2, config.width, scale=1.5, rng=seed, dtype=torch.float64)
    x = torch.randn(8, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found: dict[str, list[float]] = {"effect": [], "error": [], "predicted": [], "viscosity": []}
    for depth in config.depths:
        net = bridge.NoisyResNet([branch] * depth, laws(config)[name])
        parts = bridge.regularisation(net, loss, x)
        size = float(parts.diffusion.sum(0).abs().max())
        exact = bridge.expected_loss(net, loss, x, method="recursion", rtol=0.0, atol=config.rtol * size)
        found["effect"].append(_rms(exact.mean - parts.noise_free))
        found["error"].append(_rms(exact.error_estimate))
        found["predicted"].append(_rms(parts.diffusion.sum(0)))
        found["viscosity"].append(float(parts.viscosity.mean()))
    return {key: np.array(values) for key, values in found.items()}


def loss(z: torch.Tensor) -> torch.Tensor:
    """Logistic loss."""
    return torch.nn.functional.softplus(z[..., 0] - 2 * z[..., 1])


def _rms(values: Any) -> float:
    return float(values.square().mean().sqrt())


def _over_seeds(config: Config, found: list[dict[str, np.ndarray]]) -> dict[str, Any]:
    """Mean and standard error over the fields; the slope in log-log of each field's effect over the deeper half."""
    n, half = len(found), len(config.depths) // 2
    stacked = {key: np.stack([one[key] for one in found]) for key in found[0]}
    depths = np.log(config.depths[half - 1 :])
    slopes = np.array([np.polyfit(depths, np.log(e[half - 1 :]), 1)[0] for e in stacked["effect"]])

    def error(values: np.ndarray) -> np.ndarray:
        return values.std(0, ddof=1) / np.sqrt(n) if n > 1 else np.zeros(values.shape[1:])

    return {
        **{key: values.mean(0) for key, values in stacked.items()},
        **{f"{key}_error": error(values) for key, values in stacked.items() if key != "error"},
        "remainder": float(np.abs(stacked["effect"] / stacked["predicted"] - 1)[:, -1].max()),
        "slope": float(slopes.mean()),
        "slope_error": float(error(slopes[:, None])[0]),
    }


def _draw(config: Config, results: dict[str, Any]) -> figure.Figure:
    fig = figure.Figure(figsize=(9, 3.6), layout="constrained")
    left, right = fig.subplots(1, 2, sharex=True)
    for color, size, (name, r) in zip(COLORS, (9, 5, 5), results.items(), strict=True):
        style = {"color": color, "mfc": "none", "ms": size, "capsize": 3}
        left.errorbar(config.depths, r["effect"], r["effect_error"], fmt="o", label=name, **style)
        left.plot(config.depths, r["predicted"], color=color, lw=1)
        right.errorbar(config.depths, r["viscosity"], r["viscosity_error"], fmt="o-", lw=1, **style)
    left.set(ylabel="|noisy loss − noise-free loss| (rms)")
    right.set(ylabel="viscosity tr C / (2dh)")
    for ax in (left, right):
        ax.set(xscale="log", yscale="log", xlabel="depth $L$")
        ax.set_xticks(config.depths, [str(depth) for depth in config.depths])
        ax.minorticks_off()
    left.legend(frameon=False, fontsize=8)
    return fig


def conclusions(run: Run) -> list[str]:
    return [
        f"{name}: the effect of the noise goes with the depth like L^({found['slope']:.2f}"
        + (f" ± {found['slope_error']:.2f})" if found["slope_error"] > 0 else ")")
        + f"; at the largest depth the leading terms are off by {found['remainder']:.1%} at most."
        for name, found in run.results.items()
    ]


def report(run: Run) -> Sequence[Section]:
    header = ["noise law", "effect, shallowest", "effect, deepest", "slope over depth", "worst |effect/predicted − 1|"]
    rows = [
        [
            name,
            Measured(r["effect"][0], r["effect_error"][0]),
            Measured(r["effect"][-1], r["effect_error"][-1]),
            Measured(r["slope"], r["slope_error"]),
            r["remainder"],
        ]
        for name, r in run.results.items()
    ]
    return [
        Section(
            "What the noise adds to the loss",
            [
                Table(
                    header,
                    rows,
                    "Root mean square over states of noisy − noise-free loss; mean over random fields ± standard "
                    "error. Slope −1: the effect vanishes with depth; 0: it stays. Last column: deepest network.",
                ),
                Figure(
                    run.figure("depth"),
                    "Effect of the noise on the loss, and viscosity, against depth for three laws",
                    "Points: exact; lines at the left: ½ Σ C:∇²u along the noise-free path.",
                ),
            ],
        )
    ]
