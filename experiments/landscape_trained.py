"""Trained with noise against trained without: flatness, roughness, barriers and accuracy, paired over seeds.

For every seed two classifiers start from the same weights and see the same data: one is trained with the noise, one
without. Both are then measured in the same way, as mean networks and with the noise on, and compared seed by seed.
"""

import dataclasses
from typing import Any

import numpy as np
from kolmo.experiments._crew import Crew
from matplotlib.figure import Figure
from scipy.stats import sem

from kolmo import landscape
from kolmo.experiments import _landscapes as lab
from kolmo.landscape import Surface
from kolmo.report import Figure as Shown
from kolmo.report import Measured, Section, Table
from kolmo.runs import Run


@dataclasses.dataclass(frozen=True)
class Config:
    seeds: int = 5
    seed: int = 0
    law: str = "gaussian-0.3"
    draws: int = 4  # noisy passes, where noise is on
    images: int = 400  # training digits that the loss is over
    points: int = 31
    epochs: int = 120
    depth: int = 16
    workers: int = 2


def run(config: Config, run: Run, progress: bool) -> dict[str, Any]:
    seeds = lab.paired_seeds(config)
    names = lab.known(["none", config.law])
    with Crew(run, config.workers, units=len(seeds) * 7, progress=progress) as crew:
        trained = crew.do({f"train-{s}-{n}": (lab.train, (lab.plan(config), n, s)) for s in seeds for n in names})
        units: dict[str, Any] = {
            f"measure-{s}-{n}-{mode}": (measure, (config, n, s, trained[f"train-{s}-{n}"]["state"], mode))
            for s in seeds
            for n in names
            for mode in ("mean", "noisy")
        }
        pairs = {s: [trained[f"train-{s}-{n}"]["state"] for n in names] for s in seeds}
        found = crew.do({**units, **{f"line-{s}": (between, (config, s, *pairs[s])) for s in seeds}})
    lines = {s: Surface.from_record(found[f"line-{s}"]) for s in seeds}
    run.save_figure("lines", _draw(lines))
    summaries = {
        (n, mode): [found[f"measure-{s}-{n}-{mode}"] for s in seeds] for n in names for mode in ("mean", "noisy")
    }
    return {
        "law": config.law,
        "compared": {
            **{mode: lab.compared(summaries[config.law, mode], summaries["none", mode]) for mode in ("mean", "noisy")},
            "switched_on": lab.compared(summaries["none", "noisy"], summaries["none", "mean"]),
        },
        "scores": {
            key: {n: [trained[f"train-{s}-{n}"][key] for s in seeds] for n in names}
            for key in ("accuracy", "held_out_loss")
        },
        "barrier": [landscape.summary(one)["barrier"].value for one in lines.values()],
    }


def measure(config: Config, name: str, seed: int, state: dict[str, np.ndarray], mode: str) -> dict[str, Any]:
    """Summary of one network: as the mean network, or with the noise of the experiment on."""
    model = lab.restored(lab.plan(config), config.law, state)
    x, y = lab.data(lab.plan(config), seed, config.images)
    noisy = mode == "noisy"
    draws = config.draws if noisy else 1
    return lab.summarised(model, x, y, noisy=noisy, draws=draws, seed=seed, points=config.points)


def between(config: Config, seed: int, plain: dict[str, Any], noisy: dict[str, Any]) -> dict[str, Any]:
    """Loss of the mean network on the line between the two networks of one seed."""
    first, second = (lab.restored(lab.plan(config), "none", state) for state in (plain, noisy))
    loss = lab.losses(*lab.data(lab.plan(config), seed, config.images))
    return landscape.surface(loss, first, landscape.line(first, second), points=61, noisy=False).record()


def _draw(lines: dict[int, Surface]) -> Figure:
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    ax = figure.subplots()
    barriers = {seed: landscape.summary(one)["barrier"].value for seed, one in lines.items()}
    landscape.plots.cut({f"seed {seed}: barrier {barriers[seed]:.2f}": one for seed, one in lines.items()}, ax=ax)
    ax.set(xlabel="α (0: trained without noise, 1: with)")
    return figure


def report(run: Run) -> list[Section]:
    results = run.results
    law, scores = results["law"], results["scores"]
    rows = []
    for key, by_law in scores.items():
        gap = np.subtract(by_law[law], by_law["none"])
        difference = Measured(gap.mean(), float(sem(gap)))
        rows.append([key.replace("_", " "), *(_mean(by_law[n]) for n in (law, "none")), difference])
    names = (f"with {law}", "without")
    barrier = np.array(results["barrier"])
    caption = (
        "Means over the seeds and paired difference ± standard error. p: sign-flip test over the seeds; many rows are "
        "tested, so a single small p means little."
    )
    return [
        Section(
            "Scores on held-out digits",
            [Table(["score", *names, "paired difference"], rows, "Mean networks; mean ± deviation over the seeds.")],
        ),
        Section("Mean networks", [lab.comparison_table(results["compared"]["mean"], names, caption)]),
        Section("With the noise on", [lab.comparison_table(results["compared"]["noisy"], names, caption)]),
        Section(
            "The noise switched on at fixed weights",
            [
                lab.comparison_table(
                    results["compared"]["switched_on"],
                    ("with the noise on", "mean network"),
                    f"Networks that were trained without noise. {caption}",
                )
            ],
        ),
        Section(
            "Between them",
            [
                Shown(
                    run.figure("lines"),
                    "loss along the line between the networks of a seed",
                    f"Loss of the mean network on the line from one to the other; barrier {_mean(barrier)} over the "
                    "seeds. Both start from the same weights.",
                )
            ],
        ),
    ]


def _mean(values: Any) -> Measured:
    return Measured(float(np.mean(values)), float(np.std(values, ddof=1)))
