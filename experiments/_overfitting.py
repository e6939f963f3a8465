"""Figures of the sweep over laws and strengths in `generalisation`, and the names that it is told with."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from kolmo.experiments._pairs import Gap
from matplotlib.figure import Figure

from kolmo import landscape

NONE = "none"
SCORES = {"error": ("test error, %", 100.0), "loss": ("test loss", 1.0), "calibration_error": ("ECE, %", 100.0)}
SCORES["brier"] = ("Brier score", 1.0)


def kind(law: str) -> str:
    """Name of a law without its strength."""
    return law.rpartition("-")[0] or law


def gap_of(numbers: dict[str, Any], law: str, score: str) -> Gap:
    one = numbers["differences"][law][score]
    factor = SCORES[score][1]
    return Gap(factor * one["mean"], factor * one["half"], one["p"], one["pairs"])


def _seedwise(numbers: dict[str, Any], law: str, score: str) -> np.ndarray:
    """Paired differences of the seeds."""
    by_seed = [
        dict(zip(numbers["laws"][name]["seeds"], numbers["laws"][name][f"test_{score}"], strict=True))
        for name in (law, NONE)
    ]
    return SCORES[score][1] * np.array(
        [by_seed[0][seed] - by_seed[1][seed] for seed in by_seed[0] if seed in by_seed[1]]
    )


def draw_strengths(numbers: dict[str, Any]) -> Figure:
    """Differences to none against strength, law by law: where noise helps, this is a U."""
    kinds: dict[str, list[str]] = {}
    for law in numbers["differences"]:
        kinds.setdefault(kind(law), []).append(law)
    scores = ("error", "loss", "calibration_error")
    figure = Figure(figsize=(1.2 + 1.9 * len(kinds), 6.4), layout="constrained")
    panels = figure.subplots(len(scores), len(kinds), sharey="row", squeeze=False)
    for row, score in zip(panels, scores, strict=True):
        for ax, (name, ones) in zip(row, kinds.items(), strict=True):
            gaps = [gap_of(numbers, law, score) for law in ones]
            ax.axhline(0.0, color="0.5", lw=0.8)
            for k, law in enumerate(ones):
                seeds = _seedwise(numbers, law, score)
                ax.plot([k] * len(seeds), seeds, ".", color="0.7", ms=4)
            halves = [one.half for one in gaps]
            ax.errorbar(range(len(ones)), [one.mean for one in gaps], halves, fmt="o-", capsize=3, ms=4)
            ax.set_xticks(range(len(ones)), [law.rpartition("-")[2] for law in ones], fontsize=8)
            ax.set_xlim(-0.5, len(ones) - 0.5)
            ax.grid(alpha=0.3)
            if score == scores[0]:
                ax.set_title(name, fontsize=10)
        _clip(row, [gap_of(numbers, law, score) for law in numbers["differences"]])
        row[0].set_ylabel(f"{SCORES[score][0]} − {NONE}")
    figure.supxlabel("strength, weak to strong")
    return figure


def _clip(row: Sequence[Any], gaps: Sequence[Gap]) -> None:
    """Keep a strength that ruins the network from squeezing all others: the axis shows up to twice what helps most."""
    low = min(min(one.mean - min(one.half, abs(one.mean)) for one in gaps), 0.0)
    size = max(-low, float(np.median([abs(one.mean) for one in gaps])), 1e-6)
    row[0].set_ylim(-1.6 * size, 2.4 * size)


def draw_chosen(numbers: dict[str, Any]) -> Figure:
    """Differences of the strengths that held-out images chose, with intervals."""
    names = {one["law"]: one for one in numbers["chosen"].values()}
    figure = Figure(figsize=(11.0, 1.2 + 0.42 * len(names)), layout="constrained")
    for ax, score in zip(figure.subplots(1, len(SCORES), sharey=True), SCORES, strict=True):
        ax.axvline(0.0, color="0.5", lw=0.8)
        for k, law in enumerate(names):
            one = gap_of(numbers, law, score)
            seeds = _seedwise(numbers, law, score)
            ax.plot(seeds, [k] * len(seeds), ".", color="0.7", ms=4)
            ax.errorbar(one.mean, k, xerr=one.half, fmt="D", color=landscape.plots.COLOURS[0], capsize=4, ms=5)
        ax.set_yticks(range(len(names)), list(names))
        ax.set_xlabel(f"{SCORES[score][0]} − {NONE}")
        ax.grid(alpha=0.3)
    ax.invert_yaxis()
    return figure


def draw_paths(found: dict[str, dict[int, dict[str, Any]]], names: Sequence[str]) -> Figure:
    """Test error and test loss against training loss, from look to look."""
    figure = Figure(figsize=(9.6, 4.2), layout="constrained")
    panels = figure.subplots(1, 2)
    for k, law in enumerate(names):
        looks = range(min(len(one["path"]) for one in found[law].values()))
        means = {
            (data, score): [np.mean([one["path"][look][data][score] for one in found[law].values()]) for look in looks]
            for data, score in (("train", "loss"), ("test", "error"), ("test", "loss"))
        }
        for ax, score, factor in zip(panels, ("error", "loss"), (100.0, 1.0), strict=True):
            y = factor * np.array(means["test", score])
            colour = "black" if law == NONE else landscape.plots.COLOURS[(k - 1) % len(landscape.plots.COLOURS)]
            ax.plot(means["train", "loss"], y, "-", color=colour, lw=1.4, label=law)
            ax.plot(means["train", "loss"][-1], y[-1], "o", color=colour, ms=6)
    for ax, score in zip(panels, ("error", "loss"), strict=True):
        ax.set(xlabel="training loss (mean network)", ylabel=SCORES[score][0], xscale="log")
        ax.invert_xaxis()
        ax.grid(alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure
