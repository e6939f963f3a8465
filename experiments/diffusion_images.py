"""When is a convolutional residual network a diffusion? Readings of stochastic depth in networks trained on images.

The question of `diffusion_map` for states of many dimensions: small ResNets with branches of size 1, 1/√L and 1/L (L
is the number of blocks in a stage) are trained without noise; then blocks are dropped, and `bridge.diagnose` compares
what that does to the loss of held-out images with Gaussian steps of the same mean and covariance, with their first
order, and with the sum of what the noise of each block does alone (jumps).
"""

import dataclasses
import itertools
from typing import Any, Literal

import numpy as np
import torch
from kolmo.experiments._crew import Crew
from kolmo.experiments._rows import Rows
from matplotlib.figure import Figure
from torch import nn
from torch.nn import functional

from kolmo import bridge, experiments, images
from kolmo.experiments import _laws as laws
from kolmo.experiments import _resnets as nets
from kolmo.landscape.plots import COLOURS
from kolmo.report import Figure as Shown
from kolmo.report import Section, Table
from kolmo.runs import Run

SCALINGS = {"1": 0.0, "1/√L": 0.5, "1/L": 1.0}
"""Powers of 1/L that the branches are multiplied by."""
READINGS = {"diffusion": "diffusion", "total_jumps": "jumps", "total_viscosity": "first order, diffusion"}


@dataclasses.dataclass(frozen=True)
class Config:
    data: str = "data/fashion-mnist"  # folder with the official files
    dataset: Literal["fashion-mnist", "mnist", "cifar10"] = "fashion-mnist"
    seeds: int = 3
    seed: int = 0
    blocks: tuple[int, ...] = (2, 4)  # in each of two stages
    keeps: tuple[float, ...] = (0.99, 0.9, 0.5)
    train_images: int = 500
    images: int = 100  # held out, that the effect of the noise is measured at
    epochs: int = 30
    batch: int = 25
    rate: float = 0.01
    width: int = 16
    stages: int = 2
    stride: int = 2  # of the stem
    draws: int = 128
    workers: int = 1
    rows: str | None = None  # file of finished units: those in it are not done again, others are added


def run(config: Config, run: Run, progress: bool) -> dict[str, Any]:
    file = Rows(config.rows, dataclasses.asdict(config), free=("blocks",))
    units = {_key(*cell): (measured, (config, *cell)) for cell in cells(config)}
    with Crew(run, config.workers, units=len(units), progress=progress, rows=file) as crew:
        found = crew.do(units)
    return results(config, {cell: found[_key(*cell)] for cell in cells(config)})


def cells(config: Config) -> list[tuple[str, int, int]]:
    """Scaling, blocks and seed of every network."""
    seeds = range(config.seed, config.seed + config.seeds)
    return [(scaling, blocks, seed) for seed in seeds for blocks in config.blocks for scaling in SCALINGS]


def _key(scaling: str, blocks: int, seed: int) -> str:
    return f"{list(SCALINGS).index(scaling)}-{blocks}-{seed}"


def measured(config: Config, scaling: str, blocks: int, seed: int) -> dict[str, Any]:
    """Readings of one network at every keep probability."""
    x, y, test_x, test_y = nets.standardised(images.load(config.dataset, config.data))
    own = torch.as_tensor(np.random.default_rng(seed).permutation(len(x))[: config.train_images])
    torch.manual_seed(seed)
    model = nets.ResNet(
        laws.of_stage("none"),
        channels=x.shape[1],
        width=config.width,
        blocks=blocks,
        stages=config.stages,
        stride=config.stride,
        horizon=blocks ** (1 - SCALINGS[scaling]),  # h = blocks^−power
    )
    recipe = nets.Recipe(config.epochs, config.batch, config.rate, weight_decay=0.0)
    nets.train(model, x[own], y[own], recipe, seed)
    held_x, held_y = test_x[: config.images], test_y[: config.images]

    def loss(f: nn.Module) -> torch.Tensor:
        return functional.cross_entropy(f(held_x), held_y)

    found: dict[str, Any] = {}
    for keep in config.keeps:
        law = bridge.StochasticDepth(keep)
        one = bridge.diagnose(model.eval(), loss, held_x[:2], law, draws=config.draws, rtol=0.02, seed=seed)
        found[f"{keep:g}"] = {
            "effect": one.measured.value,
            "error": one.measured.standard_error,
            **{name: [getattr(one, name).value, getattr(one, name).standard_error] for name in READINGS},
        }
    ratios = [site.ratio for site in one.rows]
    with torch.no_grad():
        wrong = float((model(test_x[:2000]).argmax(-1) != test_y[:2000]).double().mean())
    return {"loss": one.noise_free, "test_error": wrong, "ratio": float(np.median(ratios)), "keeps": found}


def results(config: Config, found: dict[tuple[str, int, int], dict[str, Any]]) -> dict[str, Any]:
    """Relative errors of the readings over the seeds, with what sampling leaves open of each."""
    answer: dict[str, Any] = {}
    for scaling, blocks in itertools.product(SCALINGS, config.blocks):
        ones = [one for (s, b, _), one in found.items() if (s, b) == (scaling, blocks)]
        answer.setdefault(scaling, {})[str(blocks)] = {
            **{name: [one[name] for one in ones] for name in ("loss", "test_error", "ratio")},
            "keeps": {f"{keep:g}": _errors([one["keeps"][f"{keep:g}"] for one in ones]) for keep in config.keeps},
        }
    return answer


def _errors(ones: list[dict[str, Any]]) -> dict[str, Any]:
    """Errors relative to the measured effect of every network, and their standard errors."""
    cell: dict[str, Any] = {"effect": [one["effect"] for one in ones]}
    for name in READINGS:
        parts = [one[name][0] / one["effect"] for one in ones]
        cell[name] = [abs(part - 1) for part in parts]
        cell[f"{name}_sampling"] = [
            float(np.hypot(one[name][1], part * one["error"]) / abs(one["effect"]))
            for one, part in zip(ones, parts, strict=True)
        ]
    return cell


def report(run: Run) -> list[Section]:
    config, numbers = experiments.configure(Config, run.config), run.results
    run.save_figure("images", draw(config, numbers))
    rows = [
        [
            scaling,
            2 * int(blocks) if config.stages == 2 else f"{config.stages} × {blocks}",
            float(np.median(one["ratio"])),
            float(keep),
            float(np.median(np.divide(cell["effect"], one["loss"]))),
            *(_percent(cell, name) for name in READINGS),
        ]
        for scaling, by in numbers.items()
        for blocks, one in by.items()
        for keep, cell in one["keeps"].items()
    ]
    head = ["branches", "layers", "‖F‖/‖x‖", "keep", "effect / loss", *READINGS.values()]
    caption = (
        f"Errors in per cent of the measured effect, ± one standard error of the sampling; medians over {config.seeds} "
        f"seeds; loss of {config.images} held-out images."
    )
    shown = Shown(run.figure("images"), "errors of the readings against keep probability", "Medians; dots: seeds.")
    return [Section("Readings of the noise", [shown, Table(head, rows, caption)])]


def _percent(cell: dict[str, Any], name: str) -> str:
    return f"{100 * np.median(cell[name]):.2g} ± {100 * np.median(cell[f'{name}_sampling']):.1g}"


def draw(config: Config, numbers: dict[str, Any]) -> Figure:
    """Errors of diffusion and jumps against the keep probability, a panel for each scaling."""
    figure = Figure(figsize=(10.0, 3.7), layout="constrained")
    panels = figure.subplots(1, len(SCALINGS), sharey=True)
    for ax, (scaling, by) in zip(panels, numbers.items(), strict=True):
        for style, (blocks, one) in zip(("o-", "s--", "^:"), by.items(), strict=False):
            for colour, name in zip(COLOURS, ("diffusion", "total_jumps"), strict=False):
                medians = [100 * np.median(cell[name]) for cell in one["keeps"].values()]
                places = range(len(config.keeps))
                label = f"{READINGS[name]}, {config.stages} × {blocks} blocks"
                ax.plot(places, medians, style, color=colour, ms=5, lw=1.3, label=label)
                for k, cell in enumerate(one["keeps"].values()):
                    ax.plot([k] * len(cell[name]), [100 * e for e in cell[name]], ".", color=colour, alpha=0.5, ms=4)
        ax.axhline(10.0, color="0.5", lw=0.8, ls="--")
        ax.set_xticks(range(len(config.keeps)), [f"{keep:g}" for keep in config.keeps])
        ax.set(title=f"branches of size {scaling}", xlabel="keep probability", yscale="log")
        ax.grid(alpha=0.3)
    panels[0].set_ylabel("error, % of the effect")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    return figure
