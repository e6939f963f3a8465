"""Classifiers of handwritten digits for the landscape experiments, their losses, and tables of summaries."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from torch import Tensor
from torch.nn import functional

from kolmo import bridge, landscape
from kolmo.errors import InputError
from kolmo.experiments import _digits as digits
from kolmo.experiments import _laws as laws
from kolmo.landscape import Quantity, Summary
from kolmo.report import Measured, Table


@dataclass(frozen=True)
class Classifier:
    """How a classifier is built and trained; see `kolmo.experiments._digits`."""

    depth: int = 16
    epochs: int = 120
    held_out: int = 450
    encoder_width: int = 64
    width: int = 32
    batch: int = 256
    rate: float = 0.01
    kinetic: float = 0.02


def plan(config: Any) -> Classifier:
    """The classifier of an experiment's options."""
    return Classifier(depth=config.depth, epochs=config.epochs)


def built(plan: Classifier, name: str, seed: int) -> bridge.FlowClassifier:
    """Untrained classifier with a noise law."""
    return digits.classifier(laws.of_flow(name), plan.depth, seed, encoder_width=plan.encoder_width, width=plan.width)


def train(plan: Classifier, name: str, seed: int) -> dict[str, Any]:
    """Train a classifier with some noise; return weights, their trajectory from the start, and held-out scores."""
    model = built(plan, name, seed)
    training, held_out = digits.split(seed, plan.held_out)
    checkpoints = [arrays(model)]
    pieces = 8
    history = digits.train(
        model,
        training,
        seed,
        epochs=plan.epochs,
        batch=plan.batch,
        rate=plan.rate,
        kinetic=plan.kinetic,
        after_epoch=lambda epoch: (
            checkpoints.append(arrays(model)) if (epoch + 1) % max(plan.epochs // pieces, 1) == 0 else None
        ),
    )
    model.eval()
    with torch.no_grad():
        scores = model(held_out.x)
        accuracy = float((scores.argmax(-1) == held_out.y).double().mean())
        loss = float(functional.cross_entropy(scores, held_out.y))
    return {
        "state": arrays(model),
        "checkpoints": checkpoints,
        "history": history,
        "accuracy": accuracy,
        "held_out_loss": loss,
    }


def arrays(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """Weights as arrays."""
    return {name: value.detach().numpy().copy() for name, value in model.state_dict().items()}


def restored(
    plan: Classifier, name: str, state: dict[str, np.ndarray], depth: int | None = None
) -> bridge.FlowClassifier:
    """Classifier of these weights under some noise, in double precision; at another depth: the same flow."""
    model = built(plan, name, 0)
    model.load_state_dict({key: torch.as_tensor(value) for key, value in state.items()})
    if depth is not None:
        branch, noise = model.net.branches[0], model.net.law(0)
        model = bridge.FlowClassifier(model.encoder, digits.flow(branch, noise, depth), model.head)
    return model.double().eval()


def known(names: Sequence[str]) -> list[str]:
    """The names, if all are laws of a flow; said before anything is trained."""
    for name in names:
        laws.of_flow(name)
    return list(names)


def data(plan: Classifier, seed: int, count: int | None = None) -> tuple[Tensor, Tensor]:
    """Training digits, the first `count` of them, in double precision."""
    training, _ = digits.split(seed, plan.held_out)
    return training.x[:count].double(), training.y[:count]


def losses(x: Tensor, y: Tensor) -> Callable[[Any], dict[str, Tensor]]:
    """Loss and accuracy of a classifier, noisy in training mode."""

    def measured(model: Any) -> dict[str, Tensor]:
        scores = model(x)
        return {
            "loss": functional.cross_entropy(scores, y),
            "accuracy": (scores.argmax(-1) == y).double().mean(),
        }

    return measured


def summarised(model: Any, x: Tensor, y: Tensor, *, noisy: bool, draws: int, seed: int, points: int) -> dict[str, Any]:
    """Summary of plane, curvature and published sharpness of one network, as plain numbers."""
    loss = losses(x, y)
    options = {"draws": draws, "seed": seed, "noisy": noisy}
    plane = landscape.random_plane(model, seed=seed)
    over = landscape.surface(loss, model, plane, points=points, **options)
    curv = landscape.curvature(loss, model, rtol=1e-2, probes=12, density_probes=3, density_steps=20, **options)
    sharp = landscape.sharpness(loss, model, pairs=8, **options)
    return plain(landscape.summary(over, curv, sharp))


def plain(summary: Summary) -> dict[str, Any]:
    """A summary as a dictionary of numbers, to be stored: files know no NaN, and None stands for infinity."""
    return {
        name: {"value": q.value, "standard_error": q.standard_error, "definition": q.definition}
        for name, q in summary.quantities.items()
        if not math.isnan(q.value)
    }


def summary(stored: dict[str, Any]) -> Summary:
    """Inverse of `plain`."""
    return Summary({name: Quantity(**one) for name, one in stored.items()})


def compared(first: Sequence[dict[str, Any]], second: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean of both over the seeds and their paired difference, quantity by quantity."""
    a, b = [summary(one) for one in first], [summary(one) for one in second]
    found = {}
    for name, pair in landscape.paired(a, b).items():
        one, other = (np.array([s[name].value for s in side]) for side in (a, b))
        found[name] = {
            "first": float(one.mean()),
            "second": float(other.mean()),
            "difference": pair.difference,
            "standard_error": pair.standard_error,
            "p_value": pair.p_value,
            "pairs": pair.pairs,
        }
    return found


def comparison_table(found: dict[str, Any], names: tuple[str, str], caption: str) -> Table:
    """Table of `compared`."""
    rows = [
        [name, one["first"], one["second"], Measured(one["difference"], one["standard_error"]), one["p_value"]]
        for name, one in found.items()
        if one["difference"] is not None and one["standard_error"] is not None
    ]
    return Table(["quantity", *names, "paired difference", "p"], rows, caption)


def side_by_side(surfaces: dict[str, landscape.Surface], columns: int = 3, **options: Any) -> Figure:
    """Figure of `landscape.plots.panels`: surfaces on one scale."""
    across = min(columns, len(surfaces))
    figure = Figure(figsize=(0.9 + 3.6 * across, 3.5 * -(-len(surfaces) // across)), layout="constrained")
    landscape.plots.panels(surfaces, figure, columns=columns, **options)
    return figure


def against_depth(ax: Any, depths: Sequence[int], laws: dict[str, tuple[Any, Any]], xlabel: str, ylabel: str) -> None:
    """Means with error bars of every law against depth; where they span a decade, a power of it is a straight line."""
    for k, (law, (means, errors)) in enumerate(laws.items()):
        beside = [depth * 1.04 ** (k - (len(laws) - 1) / 2) for depth in depths]  # so that bars can be told apart
        colour = landscape.plots.COLOURS[k % len(landscape.plots.COLOURS)]
        ax.errorbar(beside, means, errors, color=colour, marker="o", capsize=3, label=law)
    ax.set(xlabel=xlabel, ylabel=ylabel, xscale="log")
    ax.set_xticks(depths, [str(depth) for depth in depths])
    lowest = min(np.min(np.subtract(means, errors)) for means, errors in laws.values())
    if 0 < 10 * lowest < max(np.max(means) for means, _ in laws.values()):
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    else:
        ax.axhline(0.0, color="0.6", lw=0.8)
    ax.minorticks_off()
    ax.grid(alpha=0.3)


def plane_seed(config: Any, seed: int) -> int:
    """Seed of the random plane of a network: the option ``plane``, so that sweeps may go over planes, or its own."""
    return seed if config.plane is None else int(config.plane)


def paired_seeds(config: Any) -> range:
    """Seeds of an experiment that compares over them: with one there would be no standard error."""
    if config.seeds < 2:
        raise InputError("seeds", config.seeds, "at least two, to have a standard error", "seeds=5")
    return range(config.seed, config.seed + config.seeds)
