"""Weak orders: networks of every noise law against their modified equations as the depth grows.

One vector field, h = 1/L, is given every noise law, and the expected loss of the network (by recursion over its layers,
without sampling) is compared with the backward Kolmogorov equation of its modified SDE of order 1, 2 and 3. Where
theory says that an order cannot be reached the equation is built all the same: skewed noise of size √h stops at ½,
noise with an excess kurtosis at 1, skewed natural noise at 2. Read as jumps, skewed noise of size √h reaches 1.
"""

import dataclasses
import math
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from kolmo.experiments._crew import Crew
from matplotlib import figure
from matplotlib.ticker import LogLocator

from kolmo import bridge
from kolmo.bridge.laws import NoiseLaw
from kolmo.errors import KolmoWarning
from kolmo.report import Figure, Measured, Section, Table
from kolmo.runs import Run

COLORS = {1: "#0072b2", 2: "#d55e00", 3: "#009e73"}


@dataclasses.dataclass(frozen=True)
class Config:
    seed: int = 3
    dims: tuple[int, ...] = (1, 2)
    depths: tuple[int, ...] = (4, 8, 16, 32)
    width: int = 6
    max_seconds: float = 600.0  # of each solution of an equation: a busy machine is no reason to give up
    workers: int = 2


class Case(NamedTuple):
    """A noise law, the orders to ask for, and whether it is read as jumps."""

    law: NoiseLaw
    orders: tuple[int, ...]
    jumps: bool = False


def laws() -> dict[str, Case]:
    """Cases by name."""
    natural, diffusive = (1, 2, 3), (1, 2)
    cases: dict[str, tuple[Any, ...]] = {
        "additive Gaussian, natural": (bridge.Additive(0.8, scaling="natural"), natural),
        "multiplicative uniform, natural": (bridge.Multiplicative(0.8, "uniform", scaling="natural"), natural),
        "stochastic depth ½": (bridge.StochasticDepth(0.5), natural),
        "stochastic depth 0.8": (bridge.StochasticDepth(0.8), natural),
        "dropout ½": (bridge.BranchDropout(0.5), natural),
        "hidden dropout ½": (bridge.HiddenDropout(0.5), natural),
        "shake-shake": (bridge.ShakeShake(), natural),
        "additive Gaussian": (bridge.Additive(0.6), diffusive),
        "additive three-point": (bridge.Additive(0.6, "three-point"), diffusive),
        "additive uniform": (bridge.Additive(1.2, "uniform"), diffusive),
        "additive ±1": (bridge.Additive(1.2, "rademacher"), diffusive),
        "centred Bernoulli ½": (bridge.CentredBernoulli(0.6), (1,)),
        "centred Bernoulli 0.9": (bridge.CentredBernoulli(1.0, 0.9), (1,)),
        "centred Bernoulli 0.9, jumps": (bridge.CentredBernoulli(1.0, 0.9), (1,), True),
        "stochastic depth 0.8, jumps": (bridge.StochasticDepth(0.8), (1, 2), True),
        "dropout ½, jumps": (bridge.BranchDropout(0.5), (2,), True),
    }
    return {name: Case(*case) for name, case in cases.items()}


def run(config: Config, run: Run, progress: bool) -> dict[str, Any]:
    asked = [(name, d, order) for d in config.dims for name, case in laws().items() for order in case.orders]
    with Crew(run, config.workers, units=len(asked), progress=progress) as crew:
        done = crew.do({_key(*case): (compare, (config, *case)) for case in asked})
    found = {case: done[_key(*case)] for case in asked}
    for d in config.dims:
        run.save_figure(f"orders-{d}d", _draw(config, d, {(n, o): r for (n, dim, o), r in found.items() if dim == d}))
    return {
        "rows": [
            {"law": name, "dim": d, "asked": order, "predicted": predicted(name, order)}
            | {"observed": r["order"], "uncertainty": r["order_uncertainty"]}
            for (name, d, order), r in found.items()
        ]
    }


def predicted(name: str, order: int) -> float:
    """Order that theory allows."""
    case = laws()[name]
    return min(order, case.law.weak_order(case.jumps).order)


def compare(config: Config, name: str, d: int, order: int) -> dict[str, Any]:
    """Weak errors of one law against its equation of one order."""
    law, _, jumps = laws()[name]
    branches = [
        bridge.MLPBranch.create(d, config.width, scale=1.5, rng=config.seed + i, dtype=torch.float64) for i in (0, 1)
    ]
    layer: Any = tuple(branches) if isinstance(law, bridge.ShakeShake) else branches[0]

    def make(depth: int) -> bridge.NoisyResNet:
        return bridge.NoisyResNet([layer] * depth, law)

    x = torch.linspace(-1, 1, 5, dtype=torch.float64)[:, None] * torch.tensor([1.0, -0.6, 0.4], dtype=torch.float64)[:d]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KolmoWarning)  # orders out of reach are asked for on purpose
        reading = {"order": order, "strict": False, "jumps": jumps, "max_seconds": config.max_seconds}
        table = bridge.weak_error(make, config.depths, lambda z: torch.cos(1.5 * z.sum(-1) + 0.5), x, **reading)
    return {
        "difference": table.difference,
        "uncertainty": table.uncertainty,
        "order": table.order,
        "order_uncertainty": table.order_uncertainty,
    }


def _key(name: str, d: int, order: int) -> str:
    plain = name.replace("½", "0.5").replace("±1", "signs").replace(",", "").replace(" ", "-")
    return f"{plain}-{d}d-order{order}"


def _draw(config: Config, d: int, found: dict[tuple[str, int], dict[str, Any]]) -> figure.Figure:
    names = list(dict.fromkeys(name for name, _ in found))
    columns = 4
    fig = figure.Figure(figsize=(11, 2.5 * math.ceil(len(names) / columns)), layout="constrained")
    axes = fig.subplots(math.ceil(len(names) / columns), columns, sharex=True, squeeze=False).ravel()
    depths = np.array(config.depths)
    for ax, name in zip(axes, names, strict=False):
        for order in (o for n, o in found if n == name):
            r = found[name, order]
            ax.errorbar(depths, r["difference"], r["uncertainty"], fmt="o", ms=4, color=COLORS[order], capsize=2)
            slope = predicted(name, order)
            ax.plot(
                depths,
                r["difference"][-1] * (depths / depths[-1]) ** -slope,
                color=COLORS[order],
                lw=1,
                label=f"asked {order}, slope {slope:g}",
            )
        ax.set(xscale="log", yscale="log", title=name)
        ax.title.set_fontsize(9)
        ax.set_xticks(depths, [str(depth) for depth in depths])
        ax.minorticks_off()
        if np.ptp(np.log10(ax.get_ylim())) < 2:  # less may hold no power of ten at all
            ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0e}".replace("e-0", "e-"))
        ax.tick_params(labelbottom=True)
        ax.legend(frameon=False, fontsize=7, loc="lower left")
    for ax in axes[len(names) :]:
        ax.set_axis_off()
    fig.supxlabel("depth $L$")
    fig.supylabel("|network − PDE|")
    return fig


def conclusions(run: Run) -> list[str]:
    rows = [row for row in run.results["rows"] if np.isfinite(row["observed"])]
    short = [row for row in rows if row["observed"] < row["predicted"] - 2 * row["uncertainty"] - 0.1]
    told = [
        f"{row['law']} in {row['dim']} dimensions, asked for order {row['asked']}: {row['observed']:.2f} ± "
        f"{row['uncertainty']:.2f} is seen where theory allows {row['predicted']:g}."
        for row in short
    ]
    return [f"In {len(rows) - len(short)} of {len(rows)} cases the order is that of theory, or better.", *told]


def report(run: Run) -> Sequence[Section]:
    rows = run.results["rows"]
    header = ["noise law", "d", "order asked", "order predicted", "order observed"]
    body = [[r["law"], r["dim"], r["asked"], r["predicted"], _measured(r["observed"], r["uncertainty"])] for r in rows]
    dims = sorted({r["dim"] for r in rows})
    text = (
        "Slope between the deepest pair of depths whose difference is ten times its uncertainty; ± from the estimates."
    )
    return [
        Section("Observed orders", [Table(header, body, text)]),
        Section(
            "Differences",
            [
                Figure(
                    run.figure(f"orders-{d}d"),
                    f"Difference of network and PDE against depth, for every law, d = {d}",
                    "Points: largest difference over five states; lines: the slope that theory predicts.",
                )
                for d in dims
            ],
        ),
    ]


def _measured(value: float | None, error: float | None) -> Measured | None:
    return None if value is None or error is None or math.isnan(value) else Measured(value, error)
