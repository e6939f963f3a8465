"""Noise laws on real images: small residual networks on Fashion-MNIST, MNIST or CIFAR-10, paired over seeds.

Every law trains the same network from the same weights on the same batches for the same number of epochs (shake-shake
alone has weights of its own: pairs of branches of half the width); what is reported is the last epoch, never the best.
Weight decay is a baseline of its own: "none" has it, "no-decay" has not. The official files are read from the folder
``data``; nothing is downloaded.

To train data-parallel, on N processes of a machine::

    torchrun --nproc-per-node N -m kolmo.experiments.images RUN data=... device=cuda
    kolmo experiment images --resume RUN

The first command makes the run folder RUN and trains all networks; the second measures them. Each process takes a part
of every batch (``parts``, N unless said); one process alone, with ``--set parts=N``, ends with the same weights.
"""

import dataclasses
import functools
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from kolmo.experiments._crew import Crew, steadily
from matplotlib.figure import Figure
from scipy.stats import sem
from torch.nn import functional

from kolmo import experiments, images, landscape
from kolmo.errors import InputError, KolmoError
from kolmo.experiments import _landscapes as lab
from kolmo.experiments import _laws as laws
from kolmo.experiments import _resnets as nets
from kolmo.landscape import Curvature, Surface
from kolmo.report import Figure as Shown
from kolmo.report import Measured, Section, Table
from kolmo.runs import Run

NO_DECAY = "no-decay"
Job = tuple[str, int, int]
"""Law, blocks in each stage, seed."""
_TEST_ERROR = "test error − {}, %"
QUANTITIES = ("doubling radius", "largest eigenvalue", "trace", "random sharpness")


@dataclasses.dataclass(frozen=True)
class Config:
    data: str = "data/fashion-mnist"  # folder with the official files
    dataset: Literal["fashion-mnist", "mnist", "cifar10"] = "fashion-mnist"
    seeds: int = 5
    seed: int = 0
    laws: tuple[str, ...] = (
        "none",
        "no-decay",
        "gaussian-0.3",
        "dropout-0.8",
        "stochastic-depth-0.8",
        "shake-shake",
        "bernoulli-0.5",
        "bernoulli-1.0",
    )
    train_images: int | None = None  # None: all
    epochs: int = 9
    batch: int = 128
    parts: int = 1  # of a batch, each with noise of its own; the processes of torchrun take one each
    rate: float = 0.1
    weight_decay: float = 5e-4
    width: int = 16
    blocks: int = 2  # in each stage
    stages: int = 2
    stride: int = 2  # of the stem
    horizon: float = 2.0  # time of a stage: the same flow at every depth
    depths: tuple[int, ...] = ()  # blocks of the depth sweep; none by default
    augment: bool = False  # shifts and, for CIFAR-10, reflections
    reflect: bool = False  # with augment: reflections of other images too
    device: str = "cpu"
    mixed: bool = False  # bfloat16
    measured_images: int = 500  # training images that landscapes are over
    points: int = 21
    plane: int | None = None  # seed of the random plane; None: that of the network
    draws: int = 4  # noisy passes, where noise is on
    workers: int = 2  # processes, on one device; the numbers do not depend on it


def run(config: Config, run: Run, progress: bool) -> dict[str, Any]:
    check(config)
    tasks = {_key(job): (network, (config, str(run.folder), job)) for job in jobs(config)}
    with Crew(run, config.workers, units=len(tasks), progress=progress) as crew:
        done = crew.do(tasks)
    for job in jobs(config):
        _checkpoint(run.folder, job).unlink(missing_ok=True)
    return _results(config, {job: done[_key(job)] for job in jobs(config)})


def check(config: Config) -> None:
    """Say what is wrong with options or files before anything is trained."""
    kind, _, index = config.device.partition(":")
    devices = torch.cuda.device_count() if kind == "cuda" else 1
    if kind not in ("cpu", "cuda") or not (index or "0").isdecimal() or int(index or 0) >= devices:
        raise InputError("device", repr(config.device), "cpu, or a cuda device that is here", "device=cpu")
    count = len(images.load(config.dataset, config.data).train_x)
    used = count if config.train_images is None else config.train_images
    for name, value, most in (
        ("train_images", used, count),
        ("batch", config.batch, used),
        ("measured_images", config.measured_images, count),
        ("epochs", config.epochs, None),
    ):
        if value < 1 or (most is not None and value > most):
            raise InputError(name, value, "at least 1" + ("" if most is None else f", and at most {most}"))
    for law in config.laws:
        built(config, law, config.blocks)


def jobs(config: Config) -> list[Job]:
    """Law, blocks and seed of every network; seed by seed, so that an unfinished run has whole pairs."""
    return [
        (law, blocks, seed)
        for seed in range(config.seed, config.seed + config.seeds)
        for blocks in dict.fromkeys((config.blocks, *config.depths))
        for law in config.laws
    ]


def _key(job: Job) -> str:
    return "-".join(map(str, job))


def _checkpoint(folder: Path, job: Job) -> Path:
    return folder / "checkpoints" / f"{_key(job)}.npz"


@functools.lru_cache(maxsize=1)
def _data(dataset: str, folder: str) -> tuple[torch.Tensor, ...]:
    """Standardised images; a process reads them once."""
    return nets.standardised(images.load(dataset, folder))


def built(config: Config, law: str, blocks: int) -> nets.ResNet:
    """Untrained network with a law."""
    return nets.ResNet(
        laws.of_stage("none" if law == NO_DECAY else law),
        channels=3 if config.dataset == "cifar10" else 1,
        width=config.width,
        blocks=blocks,
        stages=config.stages,
        stride=config.stride,
        horizon=config.horizon,
    )


def network(config: Config, folder: str, job: Job) -> dict[str, Any]:
    """Train and measure one network."""
    seed = job[2]
    x, y, test_x, test_y = _data(config.dataset, config.data)
    started = time.perf_counter()
    model, history = _trained(config, Path(folder), job, x, y)
    seconds = time.perf_counter() - started
    p = nets.probabilities(model, test_x, config.device)
    seen = x[: min(config.train_images or len(x), 10_000)]
    own = nets.probabilities(model, seen, config.device)
    with torch.backends.cudnn.flags(
        enabled=True, deterministic=True, allow_tf32=False
    ):  # differences of losses need all digits
        measured = _measure(config, model, x[: config.measured_images], y[: config.measured_images], seed)
    return {
        "state": nets.weights(model),
        "history": history,
        "test": nets.scores(p, test_y),
        "train": nets.scores(own, y[: len(own)]),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "seconds": seconds,
        **measured,
    }


def _trained(
    config: Config, folder: Path, job: Job, x: torch.Tensor, y: torch.Tensor
) -> tuple[nets.ResNet, list[float]]:
    """A trained network and its losses; goes on from its checkpoint if there is one."""
    law, blocks, seed = job
    count = config.train_images or len(x)
    torch.manual_seed(seed)
    model = built(config, law, blocks)
    recipe = nets.Recipe(
        config.epochs,
        config.batch,
        config.rate,
        weight_decay=0.0 if law == NO_DECAY else config.weight_decay,
        device=config.device,
        mixed=config.mixed,
        augment=config.augment,
        reflect=config.reflect,
        parts=config.parts,
    )
    return model, nets.train(model, x[:count], y[:count], recipe, seed, checkpoint=_checkpoint(folder, job))


def _measure(config: Config, model: nets.ResNet, x: torch.Tensor, y: torch.Tensor, seed: int) -> dict[str, Any]:
    """Landscape and curvature of the mean network, and the change that its own noise makes to the loss."""
    loss = _loss(x.to(config.device), y.to(config.device))
    plane = landscape.random_plane(model, seed=lab.plane_seed(config, seed))
    over = landscape.surface(loss, model, plane, points=config.points, rtol=1e-2, noisy=False)
    curv = landscape.curvature(
        loss, model, rtol=1e-2, probes=10, density_probes=2, density_steps=12, noisy=False, name="loss"
    )
    sharp = landscape.sharpness(loss, model, pairs=8, noisy=False)
    here = landscape.random_plane(model, seed=seed, directions=1)
    noisy, mean = (
        landscape.surface(loss, model, here, span=1e-3, points=3, draws=draws, noisy=on)
        for draws, on in ((config.draws, True), (1, False))
    )
    return {
        "surface": over.record(),
        "curvature": {**curv.record(), "eigenvectors": []},
        "summary": lab.plain(landscape.summary(over, curv, sharp)),
        "noise_effect": float(noisy.difference(mean).mean[1]),
    }


def _loss(x: torch.Tensor, y: torch.Tensor) -> Callable[[Any], dict[str, torch.Tensor]]:
    def loss(model: Any) -> dict[str, torch.Tensor]:
        scores = model(x)
        return {"loss": functional.cross_entropy(scores, y), "accuracy": (scores.argmax(-1) == y).float().mean()}

    return loss


# ----------------------------------------------------------------------------------------------------------- results


def _results(config: Config, found: dict[Job, dict[str, Any]]) -> dict[str, Any]:
    """Numbers of every law over the seeds, at the depth of the study and at those of the sweep."""
    seeds = range(config.seed, config.seed + config.seeds)
    table, sweep = {}, {}
    for law in config.laws:
        ones = [found[law, config.blocks, seed] for seed in seeds]
        table[law] = {
            **{f"test_{key}": [one["test"][key] for one in ones] for key in ("error", "loss", "calibration_error")},
            "train_error": [one["train"]["error"] for one in ones],
            **{
                name: [one["summary"][name]["value"] for one in ones]
                for name in ones[0]["summary"]
                if all(name in one["summary"] for one in ones)
            },
            "seconds": [one["seconds"] for one in ones],
            "parameters": ones[0]["parameters"],
        }
        sweep[law] = {
            str(blocks): {
                "test_error": [found[law, blocks, seed]["test"]["error"] for seed in seeds],
                "noise_effect": [found[law, blocks, seed]["noise_effect"] for seed in seeds],
                "trace": [found[law, blocks, seed]["summary"]["trace"]["value"] for seed in seeds],
            }
            for blocks in dict.fromkeys((config.blocks, *config.depths))
        }
    return {"laws": table, "depth": sweep}


def _base(laws: dict[str, Any]) -> str:
    """The law that the others are compared with."""
    return "none" if "none" in laws else next(iter(laws))


def _differences(laws: dict[str, Any], key: str, factor: float = 1.0) -> dict[str, np.ndarray]:
    """Paired differences to no noise, seed by seed, for every other law."""
    base = _base(laws)
    with np.errstate(invalid="ignore"):  # a radius beyond the window is infinite in both
        gaps = {law: factor * (_array(one[key]) - _array(laws[base][key])) for law, one in laws.items()}
    return {law: gap for law, gap in gaps.items() if law != base}


def _array(values: Any) -> np.ndarray:
    """Numbers of a list in which None stands for infinity."""
    return np.array([math.inf if value is None else value for value in values], dtype=float)


def _spread(values: Any) -> Any:
    """Mean ± standard deviation over the seeds."""
    values = _array(values)
    if len(values) < 2 or not np.isfinite(values).all():
        return float(values.mean())
    return Measured(float(values.mean()), float(values.std(ddof=1)))


def _paired(gap: np.ndarray) -> Any:
    """Mean ± standard error of paired differences; None where one of them is no number."""
    if not np.isfinite(gap).all():
        return None
    return float(gap.mean()) if len(gap) < 2 else Measured(float(gap.mean()), _error(gap))


def _error(gap: np.ndarray) -> float:
    return float(sem(gap)) if len(gap) > 1 else 0.0


# ----------------------------------------------------------------------------------------------------------- figures


def _figures(config: Config, found: dict[Job, dict[str, Any]], results: dict[str, Any]) -> dict[str, Figure]:
    first = {law: found[law, config.blocks, config.seed] for law in config.laws}
    spectra = Figure(figsize=(6.8, 4.4), layout="constrained")
    curvatures = {law: Curvature.from_record(one["curvature"]) for law, one in list(first.items())[:6]}
    landscape.plots.spectrum(curvatures, ax=spectra.subplots())
    drawn = {
        "errors": _errors(results["laws"]),
        "curvature": _curvatures(results["laws"]),
        "planes": lab.side_by_side({law: Surface.from_record(one["surface"]) for law, one in first.items()}, columns=4),
        "spectra": spectra,
        "history": _history({law: one["history"] for law, one in first.items()}),
    }
    return drawn | ({"depth": _deepening(results["depth"])} if _deepens(config) else {})


def _deepens(config: Config) -> bool:
    """Whether there are effects to be shown against depth: of laws beside the one that they are compared with."""
    return bool(config.depths) and len(config.laws) > 1


def _errors(laws: dict[str, Any]) -> Figure:
    """Test error of every law, and its paired difference to no noise."""
    figure = Figure(figsize=(9.6, 0.8 + 0.42 * len(laws)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    _dots(left, {law: 100 * _array(one["test_error"]) for law, one in laws.items()}, lambda v: np.std(v, ddof=1))
    left.set_xlabel("test error in %, mean ± deviation")
    _dots(right, _differences(laws, "test_error", 100.0), _error)
    right.axvline(0.0, color="0.6", lw=0.8, zorder=0)
    right.set_xlabel(f"difference to {_base(laws)}, paired, mean ± standard error")
    return figure


def _curvatures(laws: dict[str, Any]) -> Figure:
    """Curvature and flatness of the mean networks of every law."""
    figure = Figure(figsize=(12.0, 0.9 + 0.42 * len(laws)), layout="constrained")
    for ax, name in zip(figure.subplots(1, len(QUANTITIES), sharey=True), QUANTITIES, strict=True):
        values = {law: _array(one[name]) for law, one in laws.items() if name in one}
        _dots(ax, values, lambda v: np.std(v, ddof=1))
        ax.set_xlabel(name)
        ax.locator_params(axis="x", nbins=4)
        ax.ticklabel_format(axis="x", scilimits=(-2, 4))
    return figure


def _dots(ax: Any, values: dict[str, np.ndarray], error: Callable[[np.ndarray], float]) -> None:
    """One row for each law: the seeds as dots, their mean with its error as a bar."""
    for law, seeds in values.items():
        ax.plot(seeds, [law] * len(seeds), "o", color="0.6", ms=4)
        if len(seeds) > 1 and np.isfinite(seeds).all():
            ax.errorbar(seeds.mean(), law, xerr=error(seeds), fmt="D", color=landscape.plots.COLOURS[0], capsize=4)
    if not ax.yaxis_inverted():
        ax.invert_yaxis()
    ax.grid(alpha=0.3)


def _history(losses: dict[str, list[float]]) -> Figure:
    figure = Figure(figsize=(6.0, 4.0), layout="constrained")
    ax = figure.subplots()
    for law, loss in losses.items():
        ax.plot(range(1, len(loss) + 1), loss, label=law)
    ax.set(xlabel="epoch", ylabel="training loss, noise on", yscale="log")
    ax.legend(frameon=False, fontsize=8)
    return figure


def _deepening(sweep: dict[str, Any]) -> Figure:
    """What is left of the effect of every law as the network gets deeper."""
    depths = [int(blocks) for blocks in next(iter(sweep.values()))]
    shown = {
        label: rows for label, rows in _effects(sweep).items() if not label.startswith("test error")
    }  # as its bars
    figure = Figure(figsize=(8.2, 4.0), layout="constrained")
    panels = figure.subplots(1, len(shown))
    for ax, (label, rows) in zip(panels, shown.items(), strict=True):
        effects = {law: ([gap.mean() for gap in gaps], [_error(gap) for gap in gaps]) for law, gaps in rows.items()}
        lab.against_depth(ax, depths, effects, "blocks in each stage", label)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def _effects(sweep: dict[str, Any]) -> dict[str, dict[str, list[np.ndarray]]]:
    """Effects of every law at every depth, one number for each seed: by kind, law and depth."""
    depths, base = list(next(iter(sweep.values()))), _base(sweep)
    by_depth = {b: {law: one[b] for law, one in sweep.items()} for b in depths}
    noisy = [law for law in sweep if law != base]

    def against(key: str, factor: float) -> dict[str, list[np.ndarray]]:
        return {law: [_differences(by_depth[b], key, factor)[law] for b in depths] for law in noisy}

    return {
        "loss with the noise on − mean network": {
            law: [_array(by_depth[b][law]["noise_effect"]) for b in depths] for law in noisy
        },
        _TEST_ERROR.format(base): against("test_error", 100.0),
        f"trace of the Hessian − {base}": against("trace", 1.0),
    }


# ------------------------------------------------------------------------------------------------------------ report


def report(run: Run) -> list[Section]:
    """Tables and figures from the units of the run."""
    config = experiments.configure(Config, run.config)
    found = {job: run.load_unit(_key(job)) for job in jobs(config)}
    results = _results(config, found)
    for name, figure in _figures(config, found, results).items():
        run.save_figure(name, figure)
    sections = [_of_errors(config, run, results["laws"]), _of_landscapes(config, run, results["laws"])]
    return [*sections, _of_depth(run, results["depth"])] if _deepens(config) else sections


def _of_errors(config: Config, run: Run, laws: dict[str, Any]) -> Section:
    base, gaps = _base(laws), _differences(laws, "test_error", 100.0)
    rows = [
        [
            law,
            _spread(100 * np.array(one["test_error"])),
            _paired(gaps[law]) if law in gaps else None,
            _spread(100 * np.subtract(one["test_error"], one["train_error"])),
            _spread(100 * np.array(one["test_calibration_error"])),
            _spread(one["test_loss"]),
            one["parameters"],
            float(np.mean(one["seconds"])),
        ]
        for law, one in laws.items()
    ]
    made = f"{config.dataset}, {config.epochs} epochs, {config.seeds} seeds, last epoch, mean network"
    head = ["law", "test error %", f"− {base}", "test − train", "calibration %", "test loss", "parameters", "s"]
    caption = (
        f"{made}. Mean ± standard deviation over seeds; difference to {base}: paired, ± standard error. Training error "
        "on up to 10,000 training images. Calibration: expected error over 15 bins."
    )
    return Section(
        "Test error",
        [
            Table(head, rows, caption),
            Shown(run.figure("errors"), "test errors and paired differences", "Grey: the seeds."),
            Shown(run.figure("history"), "training loss", "Training loss of the first seed."),
        ],
    )


def _of_landscapes(config: Config, run: Run, laws: dict[str, Any]) -> Section:
    base = _base(laws)
    names = [name for name in QUANTITIES if name in laws[base]]
    gaps = {name: _differences(laws, name) for name in names}
    return Section(
        "Landscape",
        [
            Table(
                ["law", *names],
                [[law, *(_spread(one[name]) for name in names)] for law, one in laws.items()],
                f"Mean networks, loss of {config.measured_images} training images; mean ± deviation over seeds.",
            ),
            Table(
                ["law", *names],
                [[law, *(_paired(gaps[name][law]) for name in names)] for law in laws if law != base],
                f"Paired differences to {base}; mean ± standard error over seeds.",
            ),
            Shown(run.figure("curvature"), "curvature of every law", "Seeds in grey; mean ± deviation."),
            Shown(run.figure("planes"), "surfaces", "Random filter-normalised planes of the first seed."),
            Shown(run.figure("spectra"), "spectra", "Hessian spectra of the first seed (six laws at most)."),
        ],
    )


def _of_depth(run: Run, sweep: dict[str, Any]) -> Section:
    header = ["law", *(f"{blocks} blocks" for blocks in next(iter(sweep.values())))]
    errors = [[law, *(_spread(100 * np.array(one["test_error"])) for one in by.values())] for law, by in sweep.items()]
    tables = [Table(header, errors, "Test error in %, mean ± deviation over seeds.")]
    for label, rows in _effects(sweep).items():
        shown = [[law, *map(_paired, gaps)] for law, gaps in rows.items()]
        tables.append(Table(header, shown, f"{label[0].upper()}{label[1:]}: mean ± standard error over seeds."))
    caption = "What is left of the effect of each law; bars are standard errors over seeds."
    return Section("Depth", [Shown(run.figure("depth"), "effects against depth", caption), *tables])


def train_parallel(folder: Path, assignments: list[str]) -> None:
    """Train all networks of a run on the processes that torchrun started; rank 0 makes or resumes the run."""
    values = dict(assignment.split("=", 1) for assignment in assignments)
    check(experiments.configure(Config, values))  # in every process, before they wait for each other
    with nets.processes(values.get("device", Config.device)) as (rank, world):
        held = _held(folder, values, world) if rank == 0 else None
        if world > 1:
            torch.distributed.barrier()
        run = held or Run.open(folder)
        config = experiments.configure(Config, run.config)
        x, y, _, _ = _data(config.dataset, config.data)
        for job in jobs(config):
            if not run.finished(_key(job)):
                steadily(_trained, config, folder, job, x, y)


def _held(folder: Path, values: dict[str, str], world: int) -> Run:
    """A new run, or the one that is there if it was started with the same options; others cannot write to it."""
    config = experiments.configure(Config, {"parts": str(world), **values})
    if not folder.exists():
        return Run.create("images", dataclasses.asdict(config), out=folder, seeds=experiments.seeds(config))
    run = Run.resume(folder)
    if experiments.configure(Config, run.config) != config:
        raise InputError("options", "others than the run was started with", f"those in {folder / 'config.json'}")
    return run


if __name__ == "__main__":
    try:
        train_parallel(Path(sys.argv[1]), sys.argv[2:])
    except KolmoError as error:
        sys.exit(f"images: {error}")
