"""Does noise generalise better where networks overfit? Laws and strengths, each with a learning rate of its own.

A small residual network is trained to a training error near zero on a few hundred images: with nothing, with weight
decay, with noise of four laws, and with the explicit regulariser ½ Σ C:∇² of the Gaussian law in place of its noise,
each at five strengths. "none" has no weight decay, and the others none beside their own. Every seed has training
images, initial weights and batches of its own, the same for all laws; networks are compared at the last epoch.

The plan of the analysis, which was written before any result was there:

- The learning rate of every law and strength is that of the least error on held-out images (least loss among equals)
  of as many networks for each rate, of the full length, of a seed that is not used otherwise.
- The first comparison: test error of each law at its middle strength minus none, seed by seed; means, intervals of
  Student's t over the seeds, paired t-tests, corrected for the number of laws (Holm). Then test loss and calibration
  error in the same way. The middle strengths were fixed beforehand.
- The second: the same of the strength of every law that held-out images choose, from the networks that chose the
  rates, and its test error where "none" had the same training loss on its way.
- All strengths, corrected for their number, show the shape of the dependence.

The order is fixed, so that there is a balanced table after any time: middle strengths with five seeds, with ten,
then the strengths beside them, then the others. `kolmo report` shows what is there so far. The run folder keeps the
weights of every network; a file `rows` keeps the numbers, and a sweep elsewhere goes on from it.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from kolmo.experiments._crew import Crew
from kolmo.experiments._overfitting import NONE, SCORES, draw_chosen, draw_paths, draw_strengths, gap_of, kind
from kolmo.experiments._pairs import Gap, holm, paired
from kolmo.experiments._rows import Rows

from kolmo import bridge, experiments, images
from kolmo.errors import InputError
from kolmo.experiments import _laws as laws
from kolmo.experiments import _resnets as nets
from kolmo.report import Figure as Shown
from kolmo.report import Section, Table
from kolmo.runs import Run

EARLY_REPORT = True
STRENGTHS = {
    "weight-decay": ("0.0006", "0.002", "0.006", "0.02", "0.06"),
    "dropout": ("0.95", "0.9", "0.8", "0.6", "0.4"),
    "stochastic-depth": ("0.9", "0.8", "0.6", "0.4", "0.2"),
    "gaussian": ("0.1", "0.2", "0.3", "0.5", "0.8"),
    "bernoulli": ("0.1", "0.25", "0.5", "0.75", "1.0"),
    "regulariser": ("0.1", "0.2", "0.3", "0.5", "0.8"),
}
"""From weak to strong. The regulariser's are those of the Gaussian noise that it stands for."""
# Parts of the training after which a network is looked at: closer where its loss falls fast.
_LOOKS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.45, 0.6, 0.8, 1.0)
_FIRST_SEEDS = 5
_MIDDLE_SEEDS = 10  # of the middle strengths, before any other strength is tried
# Added to the seeds of the networks that choose rates and strengths: others than all that are reported.
_CHOOSING = 10_000


@dataclasses.dataclass(frozen=True)
class Config:
    data: str = "data/fashion-mnist"  # folder with the official files
    dataset: Literal["fashion-mnist", "mnist", "cifar10"] = "fashion-mnist"
    train_images: int = 500
    seeds: int = 10
    seed: int = 0
    laws: tuple[str, ...] = (NONE, *(f"{kind}-{s}" for kind, strengths in STRENGTHS.items() for s in strengths))
    rates: tuple[float, ...] = (0.01, 0.03, 0.1)
    choosing_seeds: int = 1  # networks that rates and strengths are chosen by, for each of them
    held_out: int = 5000  # images that choose
    test_images: int | None = None  # None: all
    path_images: int = 500  # of them that are looked at on the way
    epochs: int = 60
    batch: int = 25
    width: int = 16
    blocks: int = 2  # in each stage
    stages: int = 2
    stride: int = 2  # of the stem
    horizon: float = 2.0  # time of a stage
    workers: int = 1
    rows: str | None = None  # file of finished networks: those in it are not trained again, others are added


def run(config: Config, run: Run, progress: bool) -> dict[str, Any]:
    check(config)
    total = len(config.laws) * (config.seeds + len(config.rates) * config.choosing_seeds)
    with Crew(run, config.workers, units=total, progress=progress, rows=rows(config)) as crew:
        for names, seeds in waves(config):
            for name in names:
                crew.do({_tuning(*one): (chosen_by, (config, *one)) for one in trials(config, [name])})
            best = {name: rate(config, run, name) for name in names}
            for seed in seeds:
                crew.do({_key(name, seed): (network, (config, name, seed, best[name])) for name in names})
    return results(config, run)


def rows(config: Config) -> Rows:
    """The file of finished networks."""
    free = ("laws", "rates", "choosing_seeds")
    return Rows(config.rows, dataclasses.asdict(config), free, kept)


def kept(unit: dict[str, Any]) -> dict[str, Any]:
    """A network without its weights and the losses of its epochs; of the way only what is told of it."""
    row = {key: value for key, value in unit.items() if key not in ("state", "history", "path")}
    if "path" in unit:
        parts = {"train": ("error", "loss"), "test": ("error", "loss")}
        row["path"] = [
            {
                "epoch": look["epoch"],
                **{data: {score: look[data][score] for score in ones} for data, ones in parts.items()},
            }
            for look in unit["path"]
        ]
    return row


def check(config: Config) -> None:
    """Say what is wrong with options or files before anything is trained."""
    count = len(images.load(config.dataset, config.data).train_x)
    for name, value, most in (
        ("train_images", config.train_images, count - config.held_out),
        ("held_out", config.held_out, count - 1),
        ("batch", config.batch, config.train_images),
        ("epochs", config.epochs, None),
        ("choosing_seeds", config.choosing_seeds, None),
    ):
        if value < 1 or (most is not None and value > most):
            raise InputError(name, value, "at least 1" + ("" if most is None else f", and at most {most}"))
    if NONE not in config.laws:
        raise InputError("laws", config.laws, f"{NONE!r} among them, which the others are compared with")
    for law in config.laws:
        built(config, law)


def waves(config: Config) -> Iterator[tuple[list[str], list[int]]]:
    """Laws and seeds that are trained together, the most telling first.

    First the middle strength of every law with all of the first ten seeds, then the strengths beside it, then those
    beside these; the regulariser, which takes four times as long, after the noise of the same strengths.
    """
    seeds = list(range(config.seed, config.seed + config.seeds))
    for distance, names in sorted(rings(config.laws).items()):
        noisy = [law for law in names if kind(law) != "regulariser"]
        yield noisy, seeds[:_FIRST_SEEDS]
        if distance == 0:
            yield noisy, seeds[_FIRST_SEEDS:_MIDDLE_SEEDS]
        yield [law for law in names if kind(law) == "regulariser"], seeds[:_FIRST_SEEDS]
    for distance, names in sorted(rings(config.laws).items()):
        noisy = [law for law in names if kind(law) != "regulariser"]
        yield noisy, seeds[_MIDDLE_SEEDS if distance == 0 else _FIRST_SEEDS :]
        yield [law for law in names if kind(law) == "regulariser"], seeds[_FIRST_SEEDS:]


def rings(names: Sequence[str]) -> dict[int, list[str]]:
    """Laws by the distance of their strength from the middle one of their kind."""
    kinds: dict[str, list[str]] = {}
    for law in names:
        kinds.setdefault(kind(law), []).append(law)
    found: dict[int, list[str]] = {}
    for law in names:
        ones = kinds[kind(law)]
        found.setdefault(abs(ones.index(law) - (len(ones) - 1) // 2), []).append(law)
    return found


def trials(config: Config, names: Sequence[str]) -> list[tuple[str, float, int]]:
    """Law, rate and seed of the networks that choose."""
    seeds = range(config.choosing_seeds)
    return [(name, one, _CHOOSING + config.seed + k) for k in seeds for name in names for one in config.rates]


def _key(law: str, seed: int) -> str:
    return f"{law}-{seed}"


def _tuning(law: str, one: float, seed: int) -> str:
    return f"tune-{law}-{one:g}-{seed}"


@functools.lru_cache(maxsize=1)
def standardised(dataset: str, folder: str) -> tuple[torch.Tensor, ...]:
    """Standardised images; a process reads them once."""
    return nets.standardised(images.load(dataset, folder))


@dataclasses.dataclass(frozen=True)
class Split:
    """Images of one seed; `held_out` are among the official training images too, `test` is the same for all seeds."""

    train: tuple[torch.Tensor, torch.Tensor]
    held_out: tuple[torch.Tensor, torch.Tensor]
    test: tuple[torch.Tensor, torch.Tensor]


def split(config: Config, seed: int) -> Split:
    """Draw the images of a seed."""
    x, y, test_x, test_y = standardised(config.dataset, config.data)
    order = torch.as_tensor(np.random.default_rng(seed).permutation(len(x)))
    own, other = order[: config.train_images], order[config.train_images :][: config.held_out]
    last = config.test_images
    return Split((x[own], y[own]), (x[other], y[other]), (test_x[:last], test_y[:last]))


def built(config: Config, law: str) -> nets.ResNet:
    """Untrained network with a law; weight decay and the regulariser are no noise."""
    quiet = kind(law) in ("weight-decay", "regulariser")
    if quiet:
        _strength(law)
    return nets.ResNet(
        laws.of_stage(NONE if quiet else law),
        channels=3 if config.dataset == "cifar10" else 1,
        width=config.width,
        blocks=config.blocks,
        stages=config.stages,
        stride=config.stride,
        horizon=config.horizon,
    )


def _strength(law: str) -> float:
    text = law.rpartition("-")[2]
    try:
        return float(text)
    except ValueError:
        raise InputError("laws", repr(law), f"a number at its end, not {text!r}", f"{kind(law)}-0.1") from None


Objective = Callable[[torch.nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]


def objective(config: Config, law: str, model: nets.ResNet, x: torch.Tensor) -> Objective:
    """What is minimised: the loss, with the explicit regulariser where the law is that."""
    if kind(law) != "regulariser":
        return nets.cross_entropy
    # The sites of all stages are one list, in which a step has the h of a stage.
    horizon = config.horizon * config.stages
    term = bridge.Regulariser(model.eval(), bridge.Additive(_strength(law)), inputs=x[:2], horizon=horizon)

    def regularised(f: torch.nn.Module, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        f.eval()  # the same function without noise, whose only additions are those of the branches
        return nets.cross_entropy(f, inputs, labels) + term(lambda g: nets.cross_entropy(g, inputs, labels))

    return regularised


def trained(
    config: Config, law: str, seed: int, learning_rate: float, looked: Callable[[nets.ResNet], Any] | None = None
) -> tuple[nets.ResNet, list[float], list[Any]]:
    """A trained network, its losses of the epochs, and what is seen of it on the way."""
    x, y = split(config, seed).train
    torch.manual_seed(seed)
    model = built(config, law)
    decay = _strength(law) if kind(law) == "weight-decay" else 0.0
    recipe = nets.Recipe(config.epochs, config.batch, learning_rate, weight_decay=decay)
    looks = {max(1, round(part * config.epochs)) for part in _LOOKS}
    seen: list[Any] = []

    def after(epoch: int) -> None:
        if looked is not None and epoch + 1 in looks:
            seen.append({"epoch": epoch + 1, **looked(model)})
            model.train()

    history = nets.train(model, x, y, recipe, seed, objective=objective(config, law, model, x), after_epoch=after)
    return model, history, seen


def chosen_by(config: Config, law: str, learning_rate: float, seed: int) -> dict[str, Any]:
    """Scores of one of the networks that choose, on held-out images."""
    started = time.process_time()
    model, history, _ = trained(config, law, seed, learning_rate)
    return {
        "held_out": scored(model, split(config, seed).held_out),
        "history": history,
        "seconds": time.process_time() - started,
    }


def network(config: Config, law: str, seed: int, learning_rate: float) -> dict[str, Any]:
    """Train and measure one network."""
    data, started = split(config, seed), time.process_time()
    some = data.test[0][: config.path_images], data.test[1][: config.path_images]

    def looked(model: nets.ResNet) -> dict[str, Any]:
        return {"train": scored(model, data.train), "test": scored(model, some)}

    model, history, seen = trained(config, law, seed, learning_rate, looked)
    return {
        "state": nets.weights(model),
        "rate": learning_rate,
        "history": history,
        "path": seen,
        "train": seen[-1]["train"],
        "test": scored(model, data.test),
        "seconds": time.process_time() - started,
    }


def scored(model: nets.ResNet, data: tuple[torch.Tensor, torch.Tensor]) -> dict[str, float]:
    """Scores of the mean network; weights that are not finite have those of a guess."""
    p = nets.probabilities(model, data[0], "cpu")
    return nets.scores(torch.where(p.isfinite(), p, torch.full_like(p, 1 / nets.CLASSES)), data[1])


def rate(config: Config, run: Run, law: str) -> float:
    """Rate of a law: least error on held-out images, least loss among equals."""
    return min(config.rates, key=lambda one: _held_out(config, run, law, one))


def _held_out(config: Config, run: Run, law: str, one: float) -> tuple[float, float]:
    """Mean error and loss of a law at a rate."""
    found = [run.load_unit(_tuning(*trial))["held_out"] for trial in trials(config, [law]) if trial[1] == one]
    error, loss = (float(np.mean([each[key] for each in found])) for key in ("error", "loss"))
    return error, loss


# ----------------------------------------------------------------------------------------------------------- results


Found = dict[str, dict[int, dict[str, Any]]]


def found_so_far(config: Config, run: Run) -> Found:
    """Networks that are there, by law and seed."""
    seeds = range(config.seed, config.seed + config.seeds)
    return {
        law: {seed: run.load_unit(_key(law, seed)) for seed in seeds if run.finished(_key(law, seed))}
        for law in config.laws
    }


def chosen(config: Config, run: Run) -> dict[str, str]:
    """The strength of every law that does best on held-out images, by law; of those that were tried so far."""
    tried: dict[str, list[str]] = {}
    for law in config.laws:
        if law != NONE and all(run.finished(_tuning(*one)) for one in trials(config, [law])):
            tried.setdefault(kind(law), []).append(law)

    def least(law: str) -> tuple[float, float]:
        return _held_out(config, run, law, rate(config, run, law))

    return {name: min(ones, key=least) for name, ones in tried.items()}


def column(networks: dict[int, dict[str, Any]], data: str, score: str, seeds: Sequence[int]) -> np.ndarray:
    """A score of the last epoch over seeds."""
    return np.array([networks[seed][data][score] for seed in seeds])


def gap(found: Found, law: str, score: str) -> Gap:
    """Paired differences to none of a test score."""
    seeds = _common(found, law)
    return paired(*(column(found[name], "test", score, seeds) for name in (law, NONE)))


def _common(found: Found, law: str) -> list[int]:
    return [seed for seed in found[law] if seed in found[NONE]]


def at_equal_loss(found: Found, law: str) -> Gap:
    """Test error of a law minus that of none where, on its way, none had the training loss that the law ends with.

    Both on the test images that are looked at on the way.
    """
    seeds, gaps = _common(found, law), []
    for seed in seeds:
        last = found[law][seed]["path"][-1]
        gaps.append(last["test"]["error"] - error_at(found[NONE][seed]["path"], last["train"]["loss"]))
    return paired(gaps)


def error_at(path: list[dict[str, Any]], loss: float) -> float:
    """Test error at a training loss on the way, linear in its logarithm; beyond the ends that of the end."""
    losses = np.log([max(look["train"]["loss"], 1e-12) for look in path])
    least = np.minimum.accumulate(losses)
    first = np.flatnonzero(np.concatenate([[True], least[1:] < least[:-1]]))  # looks at which it was never lower before
    errors = np.array([look["test"]["error"] for look in path])[first]
    return float(np.interp(-np.log(max(loss, 1e-12)), -losses[first], errors))


def results(config: Config, run: Run) -> dict[str, Any]:
    """All numbers of the networks that are there."""
    found = found_so_far(config, run)
    noisy = [law for law in config.laws if law != NONE and len(_common(found, law)) > 1]
    gaps = {score: {law: gap(found, law, score) for law in noisy} for score in SCORES}
    corrected = {score: holm({law: one.p for law, one in by.items()}) for score, by in gaps.items()}
    first = {name: law for name, law in chosen(config, run).items() if law in noisy}
    return {
        "laws": {
            law: {
                "rate": next(iter(ones.values()))["rate"],
                "seeds": list(ones),
                **{f"test_{score}": column(ones, "test", score, list(ones)).tolist() for score in SCORES},
                **{f"train_{score}": column(ones, "train", score, list(ones)).tolist() for score in ("error", "loss")},
                "seconds": [one["seconds"] for one in ones.values()],
            }
            for law, ones in found.items()
            if ones
        },
        "differences": {
            law: {score: {**gaps[score][law]._asdict(), "holm": corrected[score][law]} for score in SCORES}
            for law in noisy
        },
        "chosen": {
            name: {
                "law": law,
                "holm": {score: holm({n: gaps[score][one].p for n, one in first.items()})[name] for score in SCORES},
                "at_equal_loss": at_equal_loss(found, law)._asdict(),
            }
            for name, law in first.items()
        },
    }


# ------------------------------------------------------------------------------------------------------------ report


def report(run: Run) -> list[Section]:
    """Tables and figures of what is there, of a run that is under way too."""
    config = experiments.configure(Config, run.config)
    numbers, found = results(config, run), found_so_far(config, run)
    if not numbers["differences"]:
        return [Section("So far", [Table(["units"], [[len(run.units)]], "Too few networks to compare yet.")])]
    for name, figure in {
        "strengths": draw_strengths(numbers),
        "chosen": draw_chosen(numbers),
        "paths": draw_paths(found, [NONE, *(one["law"] for one in numbers["chosen"].values())]),
    }.items():
        run.save_figure(name, figure)
    return [_of_chosen(config, run, numbers), _of_strengths(run, numbers)]


def _of_chosen(config: Config, run: Run, numbers: dict[str, Any]) -> Section:
    rows = [
        [
            one["law"],
            *(str(gap_of(numbers, one["law"], score)) for score in SCORES),
            *(one["holm"][score] for score in ("error", "loss")),
            _percent(Gap(**one["at_equal_loss"])),
        ]
        for one in numbers["chosen"].values()
    ]
    head = [f"{label} − {NONE}" for label, _ in SCORES.values()]
    caption = (
        f"{config.train_images} {config.dataset} images, {config.epochs} epochs. Strength and rate of each law were "
        "chosen on held-out images with other networks. Paired differences, mean ± half of the 95 % interval over the "
        "seeds (Student); p values are of paired t-tests, corrected for the laws of this table (Holm). Last column: "
        f"difference of test error (%) to {NONE} where it had, on its way, the same training loss."
    )
    return Section(
        "The chosen strengths",
        [
            Table(["law", *head, "p, error", "p, loss", "at equal training loss"], rows, caption),
            Shown(run.figure("chosen"), "differences to no noise", "Bars: 95 % intervals; grey: zero."),
            Shown(
                run.figure("paths"),
                "test error against training loss along the trainings",
                "Means over the seeds, from the second to the last epoch; dots: the last.",
            ),
        ],
    )


def _of_strengths(run: Run, numbers: dict[str, Any]) -> Section:
    rows = []
    for law, one in numbers["laws"].items():
        gaps = [None, None]
        if law in numbers["differences"]:
            gaps = [str(gap_of(numbers, law, "error")), numbers["differences"][law]["error"]["holm"]]
        means = [100 * np.mean(one["test_error"]), 100 * np.mean(one["train_error"])]
        scores = [np.mean(one[key]) for key in ("train_loss", "test_loss")]
        ece = 100 * np.mean(one["test_calibration_error"])
        rows.append([law, one["rate"], len(one["seeds"]), *means, *gaps, *scores, ece, np.mean(one["seconds"])])
    head = ["law", "rate", "seeds", "test error %", "training error %", f"error − {NONE}", "p"]
    caption = "Means over the seeds; p corrected for all rows (Holm). Seconds: of one core, with what is measured."
    return Section(
        "All strengths",
        [
            Shown(run.figure("strengths"), "differences against strength", "Means and 95 % intervals; dots: seeds."),
            Table([*head, "training loss", "test loss", "ECE %", "CPU s"], rows, caption),
        ],
    )


def _percent(one: Gap) -> str:
    return str(one._replace(mean=100 * one.mean, half=100 * one.half))
