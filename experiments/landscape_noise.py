"""One trained network under growing noise: its loss surface in weight space and in feature space.

A classifier of handwritten digits is trained without noise. Then, at those weights, Gaussian noise of growing strength
is switched on, and measured are: the averaged loss over a filter-normalised plane with common random numbers, over the
plane of the training trajectory and that of the leading eigenvectors of the Hessian, the curvature of the averaged
loss, and u(0, ·) over the plane of features.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from kolmo.experiments._crew import Crew
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from kolmo import landscape
from kolmo.errors import InputError, MissingExtraError
from kolmo.experiments import _landscapes as lab
from kolmo.experiments import _laws as laws
from kolmo.landscape import Curvature, FeatureLandscape, Surface, plots
from kolmo.report import Figure as Shown
from kolmo.report import Measured, Relief, Section, Table
from kolmo.runs import Run


@dataclasses.dataclass(frozen=True)
class Config:
    seed: int = 0
    plane: int | None = None  # seed of the random plane; None: that of the network
    noise: tuple[float, ...] = (0.1, 0.3, 0.6)  # s of the additive Gaussian noise; none is always there too
    draws: int = 8  # noisy passes at every point
    images: int = 400  # training digits that the loss is over
    points: int = 31
    rtol: float | None = None  # interpolation error of the surfaces; None: every point, as differences need it
    frames: int = 9  # of the animations, over time and over the noise
    digit: int = 8  # class of the feature landscape
    epochs: int = 120
    depth: int = 16
    workers: int = 2


def run(config: Config, run: Run, progress: bool) -> dict[str, Any]:
    names = levels(config)
    if not config.noise or min(config.noise) <= 0:
        raise InputError("noise", config.noise, "positive strengths, the weakest first", "noise=0.1,0.3")
    with Crew(run, config.workers, units=3 + len(names), progress=progress) as crew:
        trained = crew.do({"train": (lab.train, (lab.plan(config), "none", config.seed))})["train"]
        units = {f"level-{name}": (level, (config, name, trained)) for name in names}
        found = crew.do({"features": (features, (config, trained)), "growing": (growing, (config, trained)), **units})
    measured = {name: found[f"level-{name}"] for name in names}
    seen, grown = (FeatureLandscape.from_record(found[name]) for name in ("features", "growing"))
    draw(config, run, measured, seen, grown)
    return {
        "accuracy": trained["accuracy"],
        "out_of_plane": measured["none"]["out_of_plane"],
        "difference_standard_error": float(_gap(measured).standard_error.max()),
        "levels": {name: one["numbers"] for name, one in measured.items()},
        "feature_slope": {
            name: {"loss": float(slope[..., :10].max()), "probability": float(slope[..., 10:].max())}
            for name, slope in zip(seen.levels, seen.slope, strict=True)
        },
    }


def levels(config: Config) -> list[str]:
    return ["none", *(f"gaussian-{s:g}" for s in config.noise)]


def level(config: Config, name: str, trained: dict[str, Any]) -> dict[str, Any]:
    """Surfaces over three planes and curvature, with noise of one level switched on."""
    model = lab.restored(lab.plan(config), name, trained["state"])
    loss = lab.losses(*lab.data(lab.plan(config), config.seed, config.images))
    options = {"draws": config.draws if name != "none" else 1, "seed": config.seed, "noisy": True}
    planes = {
        "random": landscape.random_plane(model, seed=lab.plane_seed(config, config.seed)),
        "path": landscape.pca_plane(model, trained["checkpoints"]),
        "hessian": landscape.hessian_plane(loss, model, **options),
    }
    surfaces = {
        key: landscape.surface(loss, model, one, points=config.points, rtol=config.rtol, **options)
        for key, one in planes.items()
    }
    curv = landscape.curvature(loss, model, rtol=1e-2, probes=12, density_probes=3, density_steps=24, **options)
    over = surfaces["random"]
    return {
        **{key: one.record() for key, one in surfaces.items()},
        "curvature": curv.record(),
        "out_of_plane": float(planes["path"].distance.max()),
        "numbers": {
            "loss": float(over.mean[over.centre]),
            "loss_standard_error": float(over.standard_error[over.centre]),
            "summary": lab.plain(landscape.summary(over, curv)),
        },
    }


def features(config: Config, trained: dict[str, Any]) -> dict[str, Any]:
    """Expected class losses and probabilities over the plane of features, through time, for every noise level."""
    times = [k / config.frames for k in range(config.frames)]
    return _over_features(config, trained, levels(config)[1:], times)


def growing(config: Config, trained: dict[str, Any]) -> dict[str, Any]:
    """The same at t = 0, in small steps from the weakest noise to the strongest."""
    strengths = np.geomspace(min(config.noise), max(config.noise), config.frames)
    return _over_features(config, trained, [f"gaussian-{s:.3g}" for s in strengths], [0.0])


def _over_features(config: Config, trained: dict[str, Any], names: list[str], times: Sequence[float]) -> dict[str, Any]:
    model = lab.restored(lab.plan(config), "none", trained["state"])
    return landscape.feature_landscape(
        model,
        {name: laws.of_flow(name) for name in names},
        data=lab.data(lab.plan(config), config.seed, 60),
        window=[(-2.0, 2.0)] * 2,
        points=61,
        times=[model.net.horizon * t for t in times],
        rtol=3e-3,
        seed=config.seed,
    ).record()


def _gap(measured: dict[str, Any]) -> Surface:
    """Paired difference of the strongest noise to none."""
    first, last = (Surface.from_record(measured[name]["random"]) for name in (next(iter(measured)), list(measured)[-1]))
    return last.difference(first)


# ----------------------------------------------------------------------------------------------------------- figures


def draw(config: Config, run: Run, measured: dict[str, Any], seen: FeatureLandscape, grown: FeatureLandscape) -> None:
    surfaces, paths, eigen = (
        {name: Surface.from_record(one[key]) for name, one in measured.items()} for key in ("random", "path", "hessian")
    )
    curvatures = {name: Curvature.from_record(one["curvature"]) for name, one in measured.items()}
    last = list(surfaces)[-1]
    extremes = ("none", last)
    run.save_figure("planes", lab.side_by_side(surfaces, columns=2))
    run.save_figure("reliefs", lab.side_by_side({name: surfaces[name] for name in extremes}, kind="surface"))
    run.save_figure("trajectory", lab.side_by_side({name: paths[name] for name in extremes}))
    run.save_figure("eigenvectors", lab.side_by_side({name: eigen[name] for name in extremes}))
    accurate = {name: surfaces[name].select("accuracy") for name in extremes}
    run.save_figure("accuracy", lab.side_by_side(accurate, log=False))
    run.save_figure("difference", lab.side_by_side({f"{last} − none": _gap(measured)}, log=False))
    run.save_figure("cuts", alone(plots.cut, surfaces))
    run.save_figure("spectra", alone(plots.spectrum, curvatures))
    run.save_figure("features", feature_panels(seen, config.digit))
    plots.animate(grown, run.folder / "figures" / "noise.gif", over="noise", column=config.digit, kind="probability")
    plots.animate(seen, run.folder / "figures" / "time.gif", over="time", column=config.digit)
    try:
        landscape.write_html(surfaces, run.folder / "figures" / "planes.html", title="Loss under growing noise")
        landscape.write_html(
            seen, run.folder / "figures" / "features.html", title="u(t, x)", column=config.digit, log=False
        )
    except MissingExtraError as error:
        run.log(f"no interactive figures: {error}")


def alone(plot: Any, content: Any) -> Figure:
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    plot(content, ax=figure.subplots())
    return figure


def feature_panels(seen: FeatureLandscape, digit: int) -> Figure:
    """Loss, probability, slope and Laplacian of one class for every noise level, each kind on one scale."""
    kinds = {"loss": "u", "probability": "p", "slope": "|∇u|", "laplacian": "Δu"}
    figure = Figure(figsize=(2.6 * len(seen.levels) + 0.8, 2.5 * len(kinds)), layout="constrained")
    grid = figure.subplots(len(kinds), len(seen.levels), squeeze=False, sharex=True, sharey=True)
    for i, (kind, symbol) in enumerate(kinds.items()):
        field = getattr(seen, kind)[:, 0, ..., digit] if i < 2 else getattr(seen, kind)[..., digit]
        low, high = float(field.min()), float(field.max())
        options = {"kind": kind, "limits": (low, high), "extend": "neither", "paths": 30 if kind == "loss" else 0}
        for k, ax in enumerate(grid[i]):
            seen.plot(ax=ax, column=digit, level=k, **options)
            ax.label_outer()
            ax.set_title(seen.levels[k] if i == 0 else "")
        ticks = [value for value in MaxNLocator(6).tick_values(low, high) if low <= value <= high]
        figure.colorbar(grid[i, 0].collections[0], ax=grid[i], label=f"{symbol}, class {digit}", ticks=ticks)
    paths = grid[0, 0].get_legend_handles_labels()
    figure.legend(*paths, loc="outside lower center", ncols=10, title="label of the path", frameon=False)
    return figure


def report(run: Run) -> list[Section]:
    results = run.results
    surfaces = {name: Surface.from_record(run.load_unit(f"level-{name}")["random"]) for name in results["levels"]}
    turning = Relief(
        next(iter(surfaces.values())).axes,
        {name: one.mean for name, one in surfaces.items()},
        "Averaged loss over a random plane through the weights, under growing noise",
        "Drag to turn it; the slider goes from no noise to the strongest. Height and colours have one scale.",
    )
    figures = sorted((run.folder / "figures").iterdir())
    moving = ", ".join(f"`figures/{path.name}`" for path in figures if path.suffix in (".html", ".gif"))
    rows = [
        [
            name,
            _measured({"value": one["loss"], "standard_error": one["loss_standard_error"]}),
            *(_measured(one["summary"].get(key)) for key in _SHOWN),
        ]
        for name, one in results["levels"].items()
    ]
    caption = (
        "At fixed weights. ± standard error over the noise draws (and the probes, for trace and negative fraction); "
        "none where nothing is random. One network: differences between trainings are another matter."
    )

    def shown(name: str, text: str) -> Shown:
        return Shown(run.figure(name), text, text)

    return [
        Section(
            "What was done",
            [
                f"A classifier trained without noise (held-out accuracy {results['accuracy']:.3f}) is read with "
                f"Gaussian noise of growing strength in its layers, at fixed weights. More that moves: {moving}.",
                Table(["noise", "loss", *_SHOWN], rows, caption),
            ],
        ),
        Section(
            "Weight space",
            [
                turning,
                shown("planes", "Averaged loss over a random filter-normalised plane, logarithmic levels."),
                shown("reliefs", "The same, without noise and with the strongest."),
                shown("accuracy", "Accuracy on the same plane, without noise and with the strongest."),
                shown(
                    "difference",
                    "Paired difference: strongest noise minus none, the same plane; standard error over the draws at "
                    f"most {results['difference_standard_error']:.2g}.",
                ),
                shown("cuts", "Along the first direction; bands are two standard errors over the draws."),
                shown(
                    "trajectory",
                    "Plane of the two leading principal components of the training trajectory; the checkpoints are up "
                    f"to {results['out_of_plane']:.2g} away from it.",
                ),
                shown("eigenvectors", "Plane of the two leading eigenvectors of the Hessian, of unit length."),
                shown("spectra", "Spectral density of the Hessian of the averaged loss; ticks: leading eigenvalues."),
            ],
        ),
        Section(
            "Feature space",
            [
                shown("features", "Expected loss with noisy trajectories, expected probability, |∇u| and Δu at t = 0."),
                Table(
                    ["noise", "largest slope of a loss", "largest slope of a probability"],
                    [[name, one["loss"], one["probability"]] for name, one in results["feature_slope"].items()],
                    "Over the window, all classes.",
                ),
            ],
        ),
    ]


_SHOWN = ("doubling radius", "largest eigenvalue", "trace", "negative fraction", "mean slope", "short-wave share")


def _measured(quantity: dict[str, Any] | None) -> Any:
    if quantity is None or quantity["value"] is None:
        return None
    error = quantity["standard_error"]
    return Measured(quantity["value"], error) if error else quantity["value"]
