"""Does the effect of a noise law survive depth? One flow in ever more layers, each law switched on at fixed weights.

A classifier is trained without noise. Its vector field is then run in L layers of step 1/L for growing L, and each law
is switched on: dropout and stochastic depth with a fixed keep probability, whose noise fades like 1/L, and centred
Bernoulli and Gaussian noise of size √h, which do not. Measured, paired with the mean network: the change of the loss,
and the change of its largest curvature.
"""

import dataclasses
from typing import Any

import numpy as np
from kolmo.experiments._crew import Crew
from matplotlib.figure import Figure
from scipy.stats import sem

from kolmo import landscape
from kolmo.experiments import _landscapes as lab
from kolmo.report import Figure as Shown
from kolmo.report import Measured, Section, Table
from kolmo.runs import Run

MEASURES = {"loss": "change of the loss", "eigenvalue": "change of the largest eigenvalue"}


@dataclasses.dataclass(frozen=True)
class Config:
    seeds: int = 5
    seed: int = 0
    laws: tuple[str, ...] = ("dropout-0.5", "stochastic-depth-0.5", "bernoulli-0.8", "gaussian-0.3")
    depths: tuple[int, ...] = (8, 16, 32, 64)
    draws: int = 16
    images: int = 400  # training digits that the loss is over
    epochs: int = 120
    depth: int = 16  # while training
    workers: int = 2


def run(config: Config, run: Run, progress: bool) -> dict[str, Any]:
    seeds = lab.paired_seeds(config)
    lab.known(config.laws)
    with Crew(run, config.workers, units=len(seeds) * (1 + len(config.laws)), progress=progress) as crew:
        trained = crew.do({f"train-{s}": (lab.train, (lab.plan(config), "none", s)) for s in seeds})
        found = crew.do(
            {
                f"depths-{s}-{n}": (deepened, (config, n, s, trained[f"train-{s}"]["state"]))
                for s in seeds
                for n in config.laws
            }
        )
    results = {
        name: {key: over_seeds([found[f"depths-{s}-{name}"][key] for s in seeds]) for key in MEASURES}
        for name in config.laws
    }
    run.save_figure("depth", _draw(config.depths, results))
    return {"depths": config.depths, "laws": results, "seeds": len(seeds)}


def deepened(config: Config, name: str, seed: int, state: dict[str, np.ndarray]) -> dict[str, Any]:
    """Noisy minus mean network, for every depth of the same flow."""
    loss = lab.losses(*lab.data(lab.plan(config), seed, config.images))
    changes: dict[str, list[float]] = {key: [] for key in MEASURES}
    few = {"top": 1, "probes": 0, "density_probes": 0, "rtol": 1e-2, "seed": seed}
    for depth in config.depths:
        model = lab.restored(lab.plan(config), name, state, depth)
        noisy = landscape.curvature(loss, model, noisy=True, draws=config.draws, **few)
        mean = landscape.curvature(loss, model, noisy=False, **few)
        changes["loss"].append(noisy.loss - mean.loss)
        changes["eigenvalue"].append(float(noisy.eigenvalues[0] - mean.eigenvalues[0]))
    return changes


def over_seeds(changes: list[list[float]]) -> dict[str, Any]:
    table = np.array(changes)
    return {"mean": table.mean(0), "standard_error": sem(table)}


def _draw(depths: tuple[int, ...], results: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(10.0, 4.0), layout="constrained")
    for ax, (key, label) in zip(figure.subplots(1, 2), MEASURES.items(), strict=True):
        laws = {name: (one[key]["mean"], one[key]["standard_error"]) for name, one in results.items()}
        lab.against_depth(ax, depths, laws, "depth $L$", label)
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def report(run: Run) -> list[Section]:
    results = run.results
    tables = [
        Table(
            ["law", *(f"L = {L}" for L in results["depths"])],
            [
                [
                    name,
                    *(Measured(m, e or 0.0) for m, e in zip(one[key]["mean"], one[key]["standard_error"], strict=True)),
                ]
                for name, one in results["laws"].items()
            ],
            f"{label[0].upper()}{label[1:]}, noisy minus mean network; mean ± standard error over the "
            f"{results['seeds']} seeds.",
        )
        for key, label in MEASURES.items()
    ]
    return [Section("Effect against depth", [Shown(run.figure("depth"), "effect against depth"), *tables])]
