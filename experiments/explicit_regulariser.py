"""Is injected noise an explicit regulariser? What Gaussian noise adds to a loss against its two expansions.

Over many initialisations of a small residual network for images, the loss that Gaussian noise in the branches adds is
measured with pairs ±ζ, and compared with ½ Σ C:∇²v, its first order in the covariance, and with R(θ), the part of that
which is left when the network is taken as linear and only the loss is bent (Gauss–Newton; never negative): the explicit
regulariser of Camuto et al. (2020), who compare it so over 250 initialisations. Both are taken from steps of the noise
a hundredth of the least that is measured, over the same draws.
"""

import dataclasses
from typing import Any, Literal

import numpy as np
import torch
from kolmo.experiments._crew import Crew
from kolmo.experiments._pairs import rank_correlation
from kolmo.experiments._rows import Rows
from matplotlib.figure import Figure
from torch.nn import functional

from kolmo import bridge, experiments, images
from kolmo.experiments import _laws as laws
from kolmo.experiments import _resnets as nets
from kolmo.landscape.plots import COLOURS
from kolmo.report import Figure as Shown
from kolmo.report import Section, Table
from kolmo.runs import Run

TERMS = {"whole": "½ Σ C:∇²v", "gauss_newton": "R(θ), Gauss–Newton"}
_SMALL = 0.01  # of the least strength: the step of the expansions
_TOGETHER = 10  # initialisations in one unit of work


@dataclasses.dataclass(frozen=True)
class Config:
    data: str = "data/fashion-mnist"  # folder with the official files
    dataset: Literal["fashion-mnist", "mnist", "cifar10"] = "fashion-mnist"
    networks: int = 250
    seed: int = 0
    strengths: tuple[float, ...] = (0.03, 0.1, 0.3)
    images: int = 100
    draws: int = 4  # pairs
    width: int = 16
    blocks: int = 2  # in each stage
    stages: int = 2
    stride: int = 2  # of the stem
    workers: int = 2
    rows: str | None = None  # file of finished units: those in it are not done again, others are added


def run(config: Config, run: Run, progress: bool) -> dict[str, Any]:
    units = {_key(a, b): (several, (config, a, b)) for a, b in parts(config)}
    file = Rows(config.rows, dataclasses.asdict(config), free=("networks",))
    with Crew(run, config.workers, units=len(units), progress=progress, rows=file) as crew:
        found = [one for unit in crew.do(units).values() for one in unit]
    return results(config, found)


def parts(config: Config) -> list[tuple[int, int]]:
    """Seeds from which and up to which a unit of work goes."""
    end = config.seed + config.networks
    return [(start, min(start + _TOGETHER, end)) for start in range(config.seed, end, _TOGETHER)]


def _key(start: int, end: int) -> str:
    return f"from-{start}-to-{end}"


def several(config: Config, start: int, end: int) -> list[dict[str, Any]]:
    """Numbers of some initialisations."""
    x, y, _, _ = nets.standardised(images.load(config.dataset, config.data))
    return [one(config, x[: config.images], y[: config.images], seed) for seed in range(start, end)]


@torch.no_grad()
def one(config: Config, x: torch.Tensor, y: torch.Tensor, seed: int) -> dict[str, Any]:
    """Effect of the noise of every strength on one network, and its expansions for strength 1."""
    small = _SMALL * min(config.strengths)
    pairs = {s: Pair(config, s, seed) for s in (small, *config.strengths)}
    plain = pairs[small].plain(x)
    base, p = functional.cross_entropy(plain, y), plain.softmax(-1)
    effects: dict[float, list[float]] = {s: [] for s in pairs}
    bent = []
    for draw in range(config.draws):
        for s, pair in pairs.items():
            plus, minus = pair.scores(x, seed * 1000 + draw)
            both = functional.cross_entropy(plus, y) + functional.cross_entropy(minus, y)
            effects[s].append(float(both / 2 - base))
            if s == small:
                d = (plus - minus) / (2 * s)
                bent.append(float(0.5 * ((p * d**2).sum(-1) - (p * d).sum(-1) ** 2).mean()))
    return {
        "loss": float(base),
        "effect": {f"{s:g}": float(np.mean(effects[s])) for s in config.strengths},
        "error": {f"{s:g}": float(np.std(effects[s], ddof=1) / np.sqrt(config.draws)) for s in config.strengths},
        "whole": float(np.mean(effects[small])) / small**2,
        "gauss_newton": float(np.mean(bent)),
    }


class Pair:
    """A network with Gaussian noise of a strength and one with its mirror image, of the same weights."""

    def __init__(self, config: Config, strength: float, seed: int) -> None:
        self._both = []
        for sign in (1.0, -1.0):
            torch.manual_seed(seed)
            model = nets.ResNet(
                laws.of_stage(f"gaussian-{strength}") if sign > 0 else _mirrored(strength),
                channels=3 if config.dataset == "cifar10" else 1,
                width=config.width,
                blocks=config.blocks,
                stages=config.stages,
                stride=config.stride,
            )
            self._both.append(model.double())

    def plain(self, x: torch.Tensor) -> torch.Tensor:
        """Scores without noise."""
        return self._both[0].eval()(x.double())

    def scores(self, x: torch.Tensor, draw: int) -> list[torch.Tensor]:
        """Scores with the noise of a draw, and with its negative."""
        found = []
        for model in self._both:
            torch.manual_seed(draw)
            found.append(model.train()(x.double()))
        return found


def _mirrored(strength: float) -> Any:
    return lambda depth: bridge.Additive(-strength)


def results(config: Config, found: list[dict[str, Any]]) -> dict[str, Any]:
    """Correlations and sizes of the terms against the measured effect, strength by strength."""
    seeds = list(range(len(found)))
    answer: dict[str, Any] = {}
    for s in config.strengths:
        effect = np.array([each["effect"][f"{s:g}"] for each in found])
        answer[f"{s:g}"] = {
            "effect": float(effect.mean()),
            "deviation": float(effect.std(ddof=1)),
            "negative": float((effect < 0).mean()),
            "noise": float(np.sqrt(np.mean([each["error"][f"{s:g}"] ** 2 for each in found]))),
            **{
                name: {
                    "mean": float(np.mean([s**2 * each[name] for each in found])),
                    "correlation": rank_correlation([each[name] for each in found], effect.tolist(), seeds)._asdict(),
                }
                for name in TERMS
            },
        }
    return answer


def report(run: Run) -> list[Section]:
    config, numbers = experiments.configure(Config, run.config), run.results
    found = [each for part in parts(config) for each in run.load_unit(_key(*part))]
    run.save_figure("scatter", draw(config, found))
    rows = [
        [
            float(s),
            one["effect"],
            one["deviation"],
            one["noise"],
            100 * one["negative"],
            *(value for name in TERMS for value in (one[name]["mean"], _correlation(one[name]["correlation"]))),
        ]
        for s, one in numbers.items()
    ]
    head = ["s", "effect", "deviation", "sampling error", "negative %"]
    head += [text for label in TERMS.values() for text in (f"{label}: mean", "rank correlation")]
    caption = (
        f"{config.networks} initialisations, loss of {config.images} images, {config.draws} pairs of draws. Deviation "
        "over the initialisations; correlations with the measured effect, 95 % bootstrap intervals."
    )
    return [
        Section(
            "Noise and its explicit regularisers",
            [
                Shown(run.figure("scatter"), "measured effect against both terms", "A dot for each initialisation."),
                Table(head, rows, caption),
            ],
        )
    ]


def _correlation(one: dict[str, float]) -> str:
    return f"{one['value']:.2f} ({one['low']:.2f} to {one['high']:.2f})"


def draw(config: Config, found: list[dict[str, Any]]) -> Figure:
    """Measured effect against the terms, a panel for each strength."""
    figure = Figure(figsize=(3.3 * len(config.strengths) + 0.6, 3.7), layout="constrained")
    panels = figure.subplots(1, len(config.strengths), squeeze=False)[0]
    for ax, s in zip(panels, config.strengths, strict=True):
        effect = [each["effect"][f"{s:g}"] for each in found]
        for colour, (name, label) in zip(COLOURS, TERMS.items(), strict=False):
            terms = [s**2 * each[name] for each in found]
            ax.plot(terms, effect, ".", ms=4, alpha=0.6, color=colour, label=label)
        low, high = ax.get_xlim()
        ax.axline((0.0, 0.0), slope=1.0, color="0.5", lw=1, ls="--")
        ax.set_xlim(low, high)
        ax.axhline(0.0, color="0.7", lw=0.8)
        ax.set(title=f"s = {s:g}", xlabel="term")
        ax.ticklabel_format(scilimits=(-2, 3))
        ax.grid(alpha=0.3)
    panels[0].set_ylabel("added by the noise, measured")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    return figure
