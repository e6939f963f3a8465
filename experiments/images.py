"""Noise laws on real images: small residual networks on Fashion-MNIST, MNIST or CIFAR-10, paired over seeds.

Every law trains the same network from the same weights on the same batches for the same number of epochs; what is
reported is the last epoch, never the best. Weight decay is a baseline of its own: "none" has it, "no decay" has not.
The official files are read from the folder ``data``; nothing is downloaded.

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
from torch.nn import functional
from tqdm import tqdm

from kolmo import experiments, images, landscape
from kolmo.errors import InputError, KolmoError
from kolmo.experiments import _landscapes as lab
from kolmo.experiments import _resnets as nets
from kolmo.landscape import Curvature, Surface
from kolmo.report import Figure as Shown
from kolmo.report import Measured, Section, Table
from kolmo.runs import Run

NO_DECAY = "no-decay"
Job = tuple[str, int, int]
"""Law, blocks in each stage, seed."""
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
    augment: bool = False
    device: str = "cpu"
    mixed: bool = False  # bfloat16
    measured_images: int = 500  # training images that landscapes are over
    points: int = 21
    draws: int = 4  # noisy passes, where noise is on
    workers: int = 2  # processes on a CPU; the numbers do not depend on it


def run(config: Config, run: Run, progress: bool) -> dict[str, Any]:
    if config.device.startswith("cuda") and not torch.cuda.is_available():
        raise InputError("device", repr(config.device), "a device that is here", "device=cpu")
    images.load(config.dataset, config.data)  # what is wrong with the files is said before anything starts
    tasks = {_key(job): (network, (config, str(run.folder), job)) for job in jobs(config)}
    if config.device == "cpu":
        with Crew(run, config.workers, units=len(tasks), progress=progress) as crew:
            done = crew.do(tasks)
    else:  # one process, whose kernels are the device's own
        bar = tqdm(tasks.items(), disable=not progress, unit="network")
        done = {key: run.unit(key, lambda task=task: task[0](*task[1])) for key, task in bar}
    found = {job: done[_key(job)] for job in jobs(config)}
    for job in jobs(config):
        _checkpoint(run.folder, job).unlink(missing_ok=True)
    for name, figure in _figures(config, found).items():
        run.save_figure(name, figure)
    return _results(config, found)


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
    name, _, strength = law.rpartition("-")
    chosen = ("none", 0.0) if law in ("none", NO_DECAY) else ("shake-shake", 0.0) if law == "shake-shake" else None
    if chosen is None:
        chosen = name, float(strength)
    return nets.ResNet(
        nets.law(*chosen),
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
        parts=config.parts,
    )
    return model, nets.train(model, x[:count], y[:count], recipe, seed, checkpoint=_checkpoint(folder, job))


def _measure(config: Config, model: nets.ResNet, x: torch.Tensor, y: torch.Tensor, seed: int) -> dict[str, Any]:
    """Landscape and curvature of the mean network, and the change that its own noise makes to the loss."""
    loss = _loss(x.to(config.device), y.to(config.device))
    plane = landscape.random_plane(model, seed=seed)
    over = landscape.surface(loss, model, plane, points=config.points, rtol=1e-2, noisy=False)
    curv = landscape.curvature(
        loss, model, rtol=1e-2, probes=10, density_probes=2, density_steps=12, noisy=False, name="loss"
    )
    sharp = landscape.sharpness(loss, model, perturbations=8, noisy=False)
    here = landscape.random_plane(model, seed=seed, directions=1)
    noisy = landscape.surface(loss, model, here, span=1e-3, points=3, draws=config.draws, noisy=True)
    return {
        "surface": over.record(),
        "curvature": {**curv.record(), "eigenvectors": []},
        "summary": lab.plain(landscape.summary(over, curv, sharp)),
        "noise_effect": float(noisy.mean[1] - over.mean[over.centre]),
        "noise_effect_error": float(noisy.standard_error[1]),
    }


def _loss(x: torch.Tensor, y: torch.Tensor) -> Callable[[Any], dict[str, torch.Tensor]]:
    def loss(model: Any) -> dict[str, torch.Tensor]:
        scores = model(x)
        return {"loss": functional.cross_entropy(scores, y), "accuracy": (scores.argmax(-1) == y).float().mean()}

    return loss


# ----------------------------------------------------------------------------------------------------------- results


def _results(config: Config, found: dict[Any, dict[str, Any]]) -> dict[str, Any]:
    seeds = range(config.seed, config.seed + config.seeds)
    table = {}
    for law in config.laws:
        ones = [found[law, config.blocks, seed] for seed in seeds]
        table[law] = {
            **{f"test_{key}": [one["test"][key] for one in ones] for key in ("error", "loss", "calibration_error")},
            "train_error": [one["train"]["error"] for one in ones],
            **{name: [one["summary"][name]["value"] for one in ones] for name in ones[0]["summary"]},
            "seconds": [one["seconds"] for one in ones],
            "parameters": ones[0]["parameters"],
        }
    sweep = {
        law: {
            blocks: {
                "test_error": [found[law, blocks, seed]["test"]["error"] for seed in seeds],
                "noise_effect": [found[law, blocks, seed]["noise_effect"] for seed in seeds],
            }
            for blocks in dict.fromkeys((config.blocks, *config.depths))
        }
        for law in config.laws
    }
    return {"laws": table, "depth": sweep}


def _figures(config: Config, found: dict[Any, dict[str, Any]]) -> dict[str, Figure]:
    first = {law: found[law, config.blocks, config.seed] for law in config.laws}
    surfaces = {law: Surface.from_record(one["surface"]) for law, one in first.items()}
    levels = np.geomspace(
        min(s.mean.min() for s in surfaces.values()), max(s.mean.max() for s in surfaces.values()), 21
    )
    columns = min(4, len(surfaces))
    rows = math.ceil(len(surfaces) / columns)
    planes = Figure(figsize=(4.0 * columns, 3.5 * rows), layout="constrained")
    grid = planes.subplots(rows, columns, squeeze=False).ravel()
    for ax, (law, one) in zip(grid, surfaces.items(), strict=False):
        one.plot(ax=ax, levels=levels, log=True)
        ax.set_title(law)
    for ax in grid[len(surfaces) :]:
        ax.set_axis_off()
    spectra = Figure(figsize=(6.8, 4.4), layout="constrained")
    curvatures = {law: Curvature.from_record(one["curvature"]) for law, one in list(first.items())[:6]}
    landscape.plots.spectrum(curvatures, ax=spectra.subplots())
    history = Figure(figsize=(6.0, 4.0), layout="constrained")
    ax = history.subplots()
    for law, one in first.items():
        ax.plot(range(1, len(one["history"]) + 1), one["history"], label=law)
    ax.set(xlabel="epoch", ylabel="training loss, noise on", yscale="log")
    ax.legend(frameon=False, fontsize=8)
    return {"planes": planes, "spectra": spectra, "history": history}


def report(run: Run) -> list[Section]:
    results, config = run.results, run.config
    laws = results["laws"]
    base = laws.get("none", next(iter(laws.values())))
    rows, measures = [], []
    for law, one in laws.items():
        error, plain = 100 * np.array(one["test_error"]), 100 * np.array(base["test_error"])
        rows.append(
            [
                law,
                _spread(error),
                None if one is base else _paired(error - plain),
                _spread(100 * np.subtract(one["test_error"], one["train_error"])),
                _spread(100 * np.array(one["test_calibration_error"])),
                _spread(one["test_loss"]),
                one["parameters"],
                float(np.mean(one["seconds"])),
            ]
        )
        measures.append([law, *(_spread(one[key]) if key in one else None for key in QUANTITIES)])
    made = f"{config['dataset']}, {config['epochs']} epochs, {config['seeds']} seeds, last epoch, mean network"
    head = ["law", "test error %", "− none", "test − train", "calibration %", "test loss", "parameters", "s"]
    sections = [
        Section(
            "Test error",
            [
                Table(
                    head,
                    rows,
                    f"{made}. Mean ± standard deviation over seeds; difference to none: paired, ± standard error. "
                    "Training error on up to 10,000 training images. Calibration: expected error over 15 bins.",
                ),
                Shown(run.figure("history"), "training loss", "Training loss of the first seed."),
            ],
        ),
        Section(
            "Landscape",
            [
                Table(
                    ["law", *QUANTITIES],
                    measures,
                    f"Mean networks, loss of {config['measured_images']} training images; mean ± deviation over seeds.",
                ),
                Shown(run.figure("planes"), "surfaces", "Random filter-normalised planes of the first seed."),
                Shown(run.figure("spectra"), "spectra", "Hessian spectra of the first seed (six laws at most)."),
            ],
        ),
    ]
    if config["depths"]:
        sections.append(Section("Depth", _depth(results["depth"])))
    return sections


def _depth(sweep: dict[str, Any]) -> list[Table]:
    depths = list(next(iter(sweep.values())))
    header = ["law", *(f"{blocks} blocks" for blocks in depths)]

    def rows(key: str, factor: float) -> list[list[Any]]:
        return [[law, *(_spread(factor * np.array(by[b][key])) for b in depths)] for law, by in sweep.items()]

    return [
        Table(header, rows("test_error", 100.0), "Test error in %, mean ± deviation over seeds."),
        Table(header, rows("noise_effect", 1.0), "Training loss with the noise on minus that of the mean network."),
    ]


def _spread(values: Any) -> Any:
    values = np.array([math.inf if value is None else value for value in values], dtype=float)
    if len(values) < 2 or not np.isfinite(values).all():
        return float(values.mean())
    return Measured(float(values.mean()), float(values.std(ddof=1)))


def _paired(gap: np.ndarray) -> Any:
    if len(gap) < 2:
        return float(gap.mean())
    return Measured(float(gap.mean()), float(gap.std(ddof=1) / np.sqrt(len(gap))))


def train_parallel(folder: Path, assignments: list[str]) -> None:
    """Train all networks of a run on the processes that torchrun started; rank 0 makes or resumes the run."""
    values = dict(assignment.split("=", 1) for assignment in assignments)
    with nets.processes(values.get("device", Config.device)) as (rank, world):
        held = _held(folder, values, world) if rank == 0 else None
        if world > 1:
            torch.distributed.barrier()
        run = held or Run.open(folder)
        config = experiments.configure(Config, run.config)
        x, y, _, _ = _data(config.dataset, config.data)
        for job in jobs(config):
            if not run.finished(_key(job)):
                arguments = config, folder, job, x, y
                steadily(_trained, *arguments) if config.device == "cpu" else _trained(*arguments)


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
