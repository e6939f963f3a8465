"""PDE loss and network loss of one noisy classifier over the same plane in weight space, with their difference.

The network's loss is sampled with common random numbers and the PDE as control variate; the PDE loss is u(0, ·) of the
modified SDE, solved at every point of the plane to a tolerance.
"""

import dataclasses
from typing import Any

import numpy as np
from kolmo.experiments._crew import Crew
from matplotlib.figure import Figure

from kolmo import landscape
from kolmo.experiments import _landscapes as lab
from kolmo.landscape import Surface
from kolmo.report import Figure as Shown
from kolmo.report import Measured, Section, Table
from kolmo.runs import Run


@dataclasses.dataclass(frozen=True)
class Config:
    seed: int = 0
    plane: int | None = None  # seed of the random plane; None: that of the network
    law: str = "gaussian-0.3"
    span: float = 0.5
    points: int = 17
    images: int = 200  # training digits that the loss is over
    draws: int = 4  # each of so many paths for every digit
    paths: int = 16
    rtol: float = 1e-3  # of the PDE
    epochs: int = 120
    depth: int = 16
    workers: int = 2


def run(config: Config, run: Run, progress: bool) -> dict[str, Any]:
    with Crew(run, config.workers, units=2 + config.points, progress=progress) as crew:
        trained = crew.do({"train": (lab.train, (lab.plan(config), config.law, config.seed))})["train"]
        rows = crew.do({f"row-{i}": (row, (config, i, trained["state"])) for i in range(config.points)})
    over = joined([Surface.from_record(one) for one in rows.values()], config.span)
    network, pde, gap = (over.select(name) for name in ("network", "pde", "difference"))
    figure = Figure(figsize=(13.0, 3.8), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.8, 1.0))
    landscape.plots.panels({"network": network, "PDE": pde}, left, label="expected loss")
    landscape.plots.panels({"network − PDE": gap}, right)
    run.save_figure("planes", figure)
    figure = Figure(figsize=(9.6, 4.0), layout="constrained")
    axes = figure.subplots(1, 2)
    landscape.plots.cut({"network": network, "PDE": pde}, ax=axes[0])
    axes[0].set_ylabel("expected loss")
    landscape.plots.cut(gap, ax=axes[1])
    axes[1].set_ylabel("network − PDE")
    run.save_figure("cuts", figure)
    centre = over.centre
    return {
        "accuracy": trained["accuracy"],
        "network": float(network.mean[centre]),
        "network_standard_error": float(network.standard_error[centre]),
        "pde": float(pde.mean[centre]),
        "difference": float(gap.mean[centre]),
        "difference_standard_error": float(gap.standard_error[centre]),
        "largest_difference": float(np.abs(gap.mean).max()),
        "largest_standard_error": float(gap.standard_error.max()),
        "range": [float(pde.mean.min()), float(pde.mean.max())],
    }


def row(config: Config, i: int, state: dict[str, np.ndarray]) -> dict[str, Any]:
    """One row of the plane: a line through it."""
    model = lab.restored(lab.plan(config), config.law, state)
    plane = landscape.random_plane(model, seed=lab.plane_seed(config, config.seed))
    alpha = np.linspace(-config.span, config.span, config.points)[i]
    line = dataclasses.replace(plane, origin=plane.weights(alpha, 0.0), directions=plane.directions[1:])
    x, y = lab.data(lab.plan(config), config.seed, config.images)
    loss = landscape.FlowLoss(x, y, paths=config.paths, rtol=config.rtol, atol=config.rtol)
    return landscape.surface(
        loss, model, line, span=config.span, points=config.points, draws=config.draws, seed=config.seed
    ).record()


def joined(rows: list[Surface], span: float) -> Surface:
    """Rows of a plane as one surface."""
    axis = np.linspace(-span, span, len(rows))
    return dataclasses.replace(
        rows[0],
        axes=(axis, rows[0].axes[0]),
        values={name: np.stack([one.values[name] for one in rows]) for name in rows[0].values},
        evaluated=np.stack([one.evaluated for one in rows]),
        random=any(one.random for one in rows),
    )


def report(run: Run) -> list[Section]:
    results, config = run.results, run.config
    error = results["network_standard_error"]
    return [
        Section(
            "At the trained weights",
            [
                Table(
                    ["network", "PDE", "difference", "largest difference on the plane", "largest standard error"],
                    [
                        [
                            Measured(results["network"], error),
                            results["pde"],
                            Measured(results["difference"], results["difference_standard_error"]),
                            results["largest_difference"],
                            results["largest_standard_error"],
                        ]
                    ],
                    f"Expected training loss of {config['images']} digits, {config['law']}, depth {config['depth']}. ± "
                    "standard error over the draws. What is left: weak error of order 1, tolerance of the PDE.",
                )
            ],
        ),
        Section(
            "Over the plane",
            [
                Shown(run.figure("planes"), "network, PDE and difference", "Network loss, PDE loss, and difference."),
                Shown(run.figure("cuts"), "cuts", "Along the first direction; bands: two standard errors."),
            ],
        ),
    ]
