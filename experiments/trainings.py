"""Three trainings of one noisy classifier: by sampled noise, through the PDE, and with the explicit regulariser.

Flow classifiers with additive noise, on two moons, two spirals and handwritten digits, are trained by

- sampled noise: the cross-entropy of one noisy pass for each example, ordinary stochastic training;
- the PDE: the expected cross-entropy as u(0, x) of the backward Kolmogorov equation of weak order 2, gradients through
  its adjoint, on a grid that is refined as the loss needs it; training ends early where no grid at hand resolves it;
- the regulariser: the cross-entropy of the mean network plus ½ Σ C:∇²u along its path.

Same model, initial weights, data and (largest) number of full-batch Adam steps, or at equal cost: then the two cheaper
trainings take as many more steps as they are cheaper. Each training's learning rate is chosen from the same list on a
seed of its own. Expected losses of held-out data are sampled for all alike. Error bars are over seeds.
"""

import copy
import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from kolmo.experiments._crew import Crew
from kolmo.experiments._pairs import Gap, paired
from kolmo.experiments._rows import Rows
from matplotlib import figure
from sklearn.datasets import make_moons
from torch import Tensor, nn

import kolmo
from kolmo import bridge
from kolmo.experiments import _digits as digits
from kolmo.report import Figure, Measured, Section, Table
from kolmo.runs import Run

TRAININGS = ("sampled", "PDE", "regularised")
FIELDS = {
    "loss": "expected loss",
    "train_loss": "same, training data",
    "accuracy": "accuracy",
    "noisy_accuracy": "accuracy of noisy passes",
    "milliseconds": "CPU ms a step",
    "nodes": "nodes per axis at the end",
    "steps": "steps taken",
    "seconds": "CPU s",
}
# CPU of a step of each training relative to a sampled one, rounded from the measured times in docs/networks.md; what
# the trainings of a run took in all is in its results.
COSTS = {"sampled": 1, "PDE": 80, "regularised": 10}
ORDER = 2  # weak order of the modified equation: at order 1, training drives eight layers away from it
BOX = kolmo.Box([-6.0, -6.0], [6.0, 6.0], "reflecting")  # data have unit variance; walls keep the equation well posed


@dataclasses.dataclass(frozen=True)
class Config:
    seeds: int = 5
    seed: int = 0
    data: tuple[str, ...] = ("moons", "spirals", "digits")
    noise: float = 0.3  # s of the additive noise
    depth: int = 8
    width: int = 16
    steps: int = 150
    rates: tuple[float, ...] = (0.01, 0.03, 0.1)
    nodes: tuple[int, ...] = (33, 49, 73, 97)  # of the PDE's grids per axis, one time step for four; the last judges
    resolved: float = 0.02  # relative change of the loss on the next grid that asks for that grid
    check: int = 10  # training steps between two such comparisons
    train: int = 400
    test: int = 600
    draws: int = 32  # of the gradient, for its variance
    paths: int = 200
    equal_cost: bool = False  # `steps` are the PDE's; the others take more of them, at about its CPU time
    workers: int = 2
    rows: str | None = None  # file of finished units: those in it are not done again, others are added


@dataclasses.dataclass(frozen=True)
class Data:
    """Training and held-out examples."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor


def run(config: Config, run: Run, progress: bool) -> dict[str, Any]:
    seeds = range(config.seed, config.seed + config.seeds)
    pairs = [(data, training) for data in config.data for training in TRAININGS]
    units = len(pairs) * (len(config.rates) + len(seeds)) + len(config.data) * len(seeds)
    file = Rows(config.rows, dataclasses.asdict(config), free=("rates",), keep=_kept)
    with Crew(run, config.workers, units=units, progress=progress, rows=file) as crew:
        rates = tuned(config, crew, pairs)
        tasks = {
            f"{data}-{training}-{seed}": (trained, (config, data, training, seed, rates[data, training]))
            for data, training in pairs
            for seed in seeds
        }
        found = crew.do(tasks)
        gradients = crew.do(
            {f"gradients-{data}-{s}": (gradient, (config, data, s)) for data in config.data for s in seeds}
        )
    results = {
        data: {
            **{
                training: {"rate": rates[data, training]}
                | {key: _over([found[f"{data}-{training}-{s}"][key] for s in seeds]) for key in FIELDS}
                for training in TRAININGS
            },
            "gradients": {
                key: _over([gradients[f"gradients-{data}-{s}"][key] for s in seeds])
                for key in ("noise", *TRAININGS[1:])
            },
            "differences": {
                training: {
                    key: paired(
                        *([found[f"{data}-{t}-{s}"][key] for s in seeds] for t in (training, "sampled"))
                    )._asdict()
                    for key in ("loss", "accuracy")
                }
                for training in TRAININGS[1:]
            },
        }
        for data in config.data
    }
    first = {(data, training): found[f"{data}-{training}-{config.seed}"] for data, training in pairs}
    if all("history" in one for one in first.values()):  # rows of another machine have none
        run.save_figure("regions", _draw_regions(config, first))
        run.save_figure("training", _draw_training(config, first))
    return results


def _kept(unit: dict[str, Any]) -> dict[str, Any]:
    """A unit without its arrays."""
    return {key: value for key, value in unit.items() if key not in ("history", "regions", "points", "labels")}


def steps_of(config: Config, training: str) -> int:
    """Adam steps of a training."""
    return config.steps * COSTS["PDE"] // COSTS[training] if config.equal_cost else config.steps


def tuned(config: Config, crew: Crew, pairs: list[tuple[str, str]]) -> dict[tuple[str, str], float]:
    """Learning rate of each training, by the expected loss on training data of a seed that is not used otherwise."""
    seed = config.seed + config.seeds
    tasks = {
        f"tune-{data}-{training}-{rate:g}": (trained, (config, data, training, seed, rate))
        for data, training in pairs
        for rate in config.rates
    }
    found = crew.do(tasks)
    return {
        (data, training): min(config.rates, key=lambda rate: found[f"tune-{data}-{training}-{rate:g}"]["train_loss"])
        for data, training in pairs
    }


def examples(config: Config, name: str, seed: int) -> Data:
    """Examples of a data set; those in the plane have unit variance."""
    if name == "digits":
        train, test = digits.split(seed, config.test)
        return Data(train.x[: config.train], train.y[: config.train], test.x, test.y)
    n = config.train + config.test
    if name == "moons":
        x, y = make_moons(n, noise=0.15, random_state=seed)
    else:
        x, y = _spirals(n, np.random.default_rng(seed))
    points = torch.as_tensor((x - x.mean(0)) / x.std(0), dtype=torch.float32)
    labels = torch.as_tensor(y).long()
    return Data(points[: config.train], labels[: config.train], points[config.train :], labels[config.train :])


def _spirals(n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Two interleaved arms of three quarters of a turn each."""
    y = rng.integers(0, 2, n)
    t = np.sqrt(rng.uniform(0.02, 1.0, n))
    angle = 1.5 * np.pi * t + np.pi * y
    return np.stack([t * np.cos(angle), t * np.sin(angle)], -1) + 0.04 * rng.standard_normal((n, 2)), y


def classifier(config: Config, name: str, seed: int) -> bridge.FlowClassifier:
    """Untrained classifier; all layers share one branch."""
    law = bridge.Additive(config.noise)
    if name == "digits":
        return digits.classifier(law, config.depth, seed, encoder_width=64, width=config.width)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        head = nn.Linear(2, 2)
    branch = bridge.MLPBranch.create(2, config.width, scale=1.5, rng=seed)
    return bridge.FlowClassifier(nn.Identity(), bridge.NoisyResNet([branch] * config.depth, law), head)


def trained(config: Config, name: str, training: str, seed: int, rate: float) -> dict[str, Any]:
    """Train once; measure."""
    data, model = examples(config, name, seed), classifier(config, name, seed)
    objective = Objective(config, model, data, training, seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps_of(config, training))
    begin, history = time.process_time(), []
    for _ in range(steps_of(config, training)):
        loss = objective()
        if not objective.resolved:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        history.append(loss.item())
    objective.check()
    seconds = time.process_time() - begin
    return {
        "history": np.array(history),
        "milliseconds": 1e3 * seconds / max(len(history), 1),
        "seconds": seconds,
        "nodes": objective.nodes,
        "steps": len(history),
        "regions": regions(model) if name != "digits" else np.zeros(0),
        "points": data.test_x.numpy() if name != "digits" else np.zeros(0),
        "labels": data.test_y.numpy(),
        **measured(config, model, data, seed),
    }


class Objective:
    """Loss of one training over all training examples; of the sampled one, each call draws anew.

    An optimiser finds what a grid does not resolve, and has losses below zero from it. So the PDE's loss is compared
    with that on the next grid every few steps, and goes there if they differ. The last grid only judges: where the one
    before it differs from it, training ends with the parameters of the last comparison that was passed.
    """

    def __init__(self, config: Config, model: bridge.FlowClassifier, data: Data, training: str, seed: int) -> None:
        self._config, self._model, self._data, self._training = config, model, data, training
        self._generator = torch.Generator().manual_seed(seed)
        self._calls = self._level = 0
        self._recipes = [self._recipe(n) for n in config.nodes] if training == "PDE" else []
        self._good = copy.deepcopy(model.state_dict())
        self.resolved = True

    @property
    def nodes(self) -> int:
        """Nodes per axis of the PDE's grid now; 0: no grid."""
        return self._config.nodes[self._level] if self._recipes else 0

    def __call__(self) -> Tensor:
        x, y = self._data.x, self._data.y
        if self._training == "sampled":
            return self._model.sampled_loss(x, y, rng=self._generator)
        if self._training == "regularised":
            return self._model.regularised_loss(x, y)
        if self._calls % self._config.check == 0:
            self.check()
        self._calls += 1
        return self._pde_loss(self._level)

    def _recipe(self, nodes: int) -> kolmo.Discretization:
        """One recipe for all of a training, with point values of the terminal loss."""
        problem = self._model.problem(order=ORDER, box=BOX)
        recipe = kolmo.solve(problem, grid=(nodes, nodes), steps=nodes // 4, stepper="mcs").discretization
        return dataclasses.replace(recipe, terminal=None)

    def _pde_loss(self, level: int) -> Tensor:
        return self._model.pde_loss(
            self._data.x, self._data.y, order=ORDER, box=BOX, discretization=self._recipes[level]
        )

    @torch.no_grad()
    def check(self) -> None:
        """Go to the next grid as long as it changes the loss; past the last, go back to the last good parameters."""
        if not self._recipes:
            return
        now = self._pde_loss(self._level)
        for level in range(self._level, len(self._recipes) - 1):
            finer = self._pde_loss(level + 1)
            if abs(now - finer) <= self._config.resolved * finer:
                self._level, self._good = level, copy.deepcopy(self._model.state_dict())
                return
            now = finer
        self._level, self.resolved = len(self._recipes) - 2, False
        self._model.load_state_dict(self._good)


@torch.no_grad()
def measured(config: Config, model: bridge.FlowClassifier, data: Data, seed: int) -> dict[str, float]:
    """Sampled expected losses, and accuracies of the mean network and of noisy passes."""
    model.eval()
    x, y = data.test_x, data.test_y
    rows = torch.arange(len(y))

    def losses_and_hits(z: Tensor) -> Tensor:
        losses = model.class_losses(z)
        return torch.cat([losses, nn.functional.one_hot(losses.argmin(-1), losses.shape[-1])], -1)

    noisy = bridge.expected_loss(model.net, losses_and_hits, model.encoder(x), paths=config.paths, rng=seed).mean
    train = model.expected_loss(data.x, data.y, paths=config.paths, rng=seed).mean
    return {
        "loss": float(noisy[rows, y].mean()),
        "train_loss": float(train.mean()),
        "accuracy": float((model(x).argmax(-1) == y).double().mean()),
        "noisy_accuracy": float(noisy[rows, noisy.shape[1] // 2 + y].mean()),
    }


PLANE = np.linspace(-2.5, 2.5, 81)


@torch.no_grad()
def regions(model: bridge.FlowClassifier) -> np.ndarray:
    """Probability of class 1 by the mean network over a square."""
    points = torch.as_tensor(np.stack(np.meshgrid(PLANE, PLANE, indexing="ij"), -1), dtype=torch.float32)
    return model.eval()(points.reshape(-1, 2)).softmax(-1)[:, 1].reshape(len(PLANE), -1).numpy()


def gradient(config: Config, name: str, seed: int) -> dict[str, float]:
    """Gradients at the initial weights: noise of one sampled gradient, and distance of the other two from the mean.

    Relative to the norm of the mean of the sampled ones; the distances include the noise of that mean, noise/√draws.
    """
    data, model = examples(config, name, seed), classifier(config, name, seed)

    def flat(training: str, step: int) -> Tensor:
        loss = Objective(config, model, data, training, seed + 1000 * step)()
        return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(model.parameters()))])

    samples = torch.stack([flat("sampled", step) for step in range(config.draws)])
    mean = samples.mean(0)
    size = float(mean.norm())
    return {
        "noise": float(samples.var(0).sum().sqrt()) / size,
        **{training: float((flat(training, 0) - mean).norm()) / size for training in TRAININGS[1:]},
    }


def _over(values: list[float]) -> dict[str, float]:
    """Mean and standard error."""
    error = np.std(values, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else 0.0
    return {"mean": float(np.mean(values)), "error": float(error)}


def _draw_regions(config: Config, found: dict[tuple[str, str], dict[str, Any]]) -> figure.Figure:
    planar = [data for data in config.data if data != "digits"]
    fig = figure.Figure(figsize=(8.5, 2.9 * max(len(planar), 1)), layout="constrained")
    axes = fig.subplots(max(len(planar), 1), len(TRAININGS), sharex=True, sharey=True, squeeze=False)
    for row, data in zip(axes, planar, strict=False):
        for ax, training in zip(row, TRAININGS, strict=True):
            one = found[data, training]
            ax.contourf(PLANE, PLANE, one["regions"].T, levels=np.linspace(0, 1, 11), cmap="RdBu", alpha=0.8)
            ax.contour(PLANE, PLANE, one["regions"].T, levels=[0.5], colors="black", linewidths=1)
            for label, color in ((0, "#b2182b"), (1, "#2166ac")):
                ax.plot(*one["points"][one["labels"] == label].T, ".", ms=2, color=color)
            ax.set(title=f"{data}, {training}: {one['accuracy']:.3f}", aspect="equal")
    return fig


def _draw_training(config: Config, found: dict[tuple[str, str], dict[str, Any]]) -> figure.Figure:
    fig = figure.Figure(figsize=(3.2 * len(config.data), 3.1), layout="constrained")
    for ax, data in zip(fig.subplots(1, len(config.data), squeeze=False)[0], config.data, strict=True):
        for training, color in zip(TRAININGS, ("#999999", "#0072b2", "#d55e00"), strict=True):
            ax.plot(found[data, training]["history"], color=color, lw=1, label=training)
        ax.set(
            title=data,
            xlabel="step",
            ylabel="training objective",
            yscale="log",
            xscale="log" if config.equal_cost else "linear",
        )
    fig.legend(*ax.get_legend_handles_labels(), loc="outside upper center", ncols=len(TRAININGS), frameon=False)
    return fig


def report(run: Run) -> Sequence[Section]:
    def number(found: dict[str, float]) -> Measured:
        return Measured(found["mean"], found["error"])

    rows = [
        [data, training, r[training]["rate"], *(number(r[training][key]) for key in FIELDS)]
        for data, r in run.results.items()
        for training in TRAININGS
    ]
    gradients = [[data, *(number(v) for v in r["gradients"].values())] for data, r in run.results.items()]
    differences = [
        [data, training, *(str(Gap(**r["differences"][training][key])) for key in ("loss", "accuracy"))]
        for data, r in run.results.items()
        for training in TRAININGS[1:]
    ]
    drawn = [
        Figure(run.figure("regions"), "Decision regions of the three trainings", "Mean network, first seed."),
        Figure(run.figure("training"), "Training objectives over the steps", "First seed."),
    ]
    return [
        Section(
            "Trainings",
            [
                Table(
                    ["data", "training", "rate", *FIELDS.values()],
                    rows,
                    "Held-out data unless said; mean over seeds ± standard error. The learning rate was chosen on "
                    "training data of another seed.",
                ),
                Table(
                    ["data", "training", "expected loss − sampled", "accuracy − sampled"],
                    differences,
                    "Held-out data; paired differences ± half of the 95 % interval over the seeds (Student).",
                ),
                *(drawn if run.figure("training").exists() else []),
            ],
        ),
        Section(
            "Gradients at the initial weights",
            [
                Table(
                    ["data", "noise of one sampled gradient", "PDE − mean", "regularised − mean"],
                    gradients,
                    "In units of the norm of the mean of the sampled gradients, whose own noise the distances include. "
                    "The PDE's gradient and the regulariser's have no noise; the equation is of weak order 2, the "
                    "regulariser of first order in the covariance.",
                )
            ],
        ),
    ]
