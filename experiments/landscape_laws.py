"""The noise laws side by side: surface, curvature and scores of networks trained with each, against none.

For every seed all networks start from the same weights and see the same data. The surfaces are those of the mean
networks over filter-normalised planes.
"""

import dataclasses
from typing import Any

import numpy as np
from kolmo.experiments._crew import Crew
from matplotlib.figure import Figure
from scipy.stats import sem

from kolmo import landscape
from kolmo.experiments import _landscapes as lab
from kolmo.landscape import Curvature, Surface
from kolmo.report import Figure as Shown
from kolmo.report import Measured, Section, Table
from kolmo.runs import Run

QUANTITIES = ("doubling radius", "largest eigenvalue", "trace", "random sharpness", "adaptive SAM sharpness")


@dataclasses.dataclass(frozen=True)
class Config:
    seeds: int = 5
    seed: int = 0
    plane: int | None = None  # seed of the random plane; None: that of the network
    laws: tuple[str, ...] = ("gaussian-0.3", "dropout-0.7", "stochastic-depth-0.5", "bernoulli-0.8")
    images: int = 400  # training digits that the loss is over
    points: int = 31
    epochs: int = 120
    depth: int = 16
    workers: int = 2


def run(config: Config, run: Run, progress: bool) -> dict[str, Any]:
    seeds, names = lab.paired_seeds(config), lab.known(["none", *config.laws])
    with Crew(run, config.workers, units=2 * len(seeds) * len(names) + len(names), progress=progress) as crew:
        trained = crew.do({f"train-{s}-{n}": (lab.train, (lab.plan(config), n, s)) for s in seeds for n in names})
        states = {key: one["state"] for key, one in trained.items()}
        first = {f"shown-{n}": (shown, (config, n, states[f"train-{config.seed}-{n}"])) for n in names}
        units: dict[str, Any] = {
            f"measure-{s}-{n}": (measure, (config, s, states[f"train-{s}-{n}"])) for s in seeds for n in names
        }
        found = crew.do({**first, **units})
    seen = {n: found[f"shown-{n}"] for n in names}
    run.save_figure("planes", lab.side_by_side({n: Surface.from_record(one["surface"]) for n, one in seen.items()}))
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    landscape.plots.spectrum(
        {n: Curvature.from_record(one["curvature"]) for n, one in seen.items()}, ax=figure.subplots()
    )
    run.save_figure("spectra", figure)
    summaries = {n: [found[f"measure-{s}-{n}"] for s in seeds] for n in names}
    return {
        "scores": {n: [trained[f"train-{s}-{n}"]["accuracy"] for s in seeds] for n in names},
        "compared": {n: lab.compared(summaries[n], summaries["none"]) for n in config.laws},
    }


def shown(config: Config, name: str, state: dict[str, np.ndarray]) -> dict[str, Any]:
    """Surface and curvature of the first seed, for the figures."""
    model = lab.restored(lab.plan(config), "none", state)
    loss = lab.losses(*lab.data(lab.plan(config), config.seed, config.images))
    plane = landscape.random_plane(model, seed=lab.plane_seed(config, config.seed))
    over = landscape.surface(loss, model, plane, points=config.points, rtol=1e-2)
    curv = landscape.curvature(loss, model, rtol=1e-2, density_steps=30)
    return {"surface": over.record(), "curvature": curv.record()}


def measure(config: Config, seed: int, state: dict[str, np.ndarray]) -> dict[str, Any]:
    """Summary of one mean network."""
    model = lab.restored(lab.plan(config), "none", state)
    x, y = lab.data(lab.plan(config), seed, config.images)
    return lab.summarised(model, x, y, noisy=False, draws=1, seed=seed, points=config.points)


def report(run: Run) -> list[Section]:
    results = run.results
    plain = np.array(results["scores"]["none"])
    rows = []
    for name, compared in results["compared"].items():
        gap = np.array(results["scores"][name]) - plain
        rows.append([name, _measured(gap), *(_difference(compared.get(key)) for key in QUANTITIES)])
    one = next(iter(results["compared"].values()))
    base = ["none (its own values)", Measured(plain.mean(), plain.std(ddof=1))]
    base += [one[key]["second"] if key in one else None for key in QUANTITIES]
    return [
        Section(
            "Against no noise",
            [
                Table(
                    ["trained with", "held-out accuracy", *QUANTITIES],
                    [base, *rows],
                    f"Paired differences to training without noise ± standard error over {len(plain)} seeds; mean "
                    "networks, training loss. First row: mean (± deviation over the seeds for accuracy).",
                )
            ],
        ),
        Section(
            "First seed",
            [
                Shown(run.figure("planes"), "loss over random planes", "Random planes, the same levels."),
                Shown(run.figure("spectra"), "spectral densities", "Hessian spectra of the mean networks."),
            ],
        ),
    ]


def _measured(gap: np.ndarray) -> Measured:
    return Measured(float(gap.mean()), float(sem(gap)))


def _difference(one: dict[str, Any] | None) -> Any:
    if one is None or one["difference"] is None or one["standard_error"] is None:
        return None
    return Measured(one["difference"], one["standard_error"])
