"""Which layers should stochastic depth drop, if the mean number is given? Uniform, linear, or by what each layer does.

Flows in the plane with layers of their own and branches of size 1/√L are trained on few, noisy points of two moons,
with whole layers dropped. Keep probabilities have the same mean in all schedules (Hayou and Ayed, 2021, ask which
survival rates are best at such a budget):

- uniform: the same in every layer;
- linear: falling from layer to layer from one on (Huang et al., 2016);
- budgeted: drop probabilities of `bridge.schedule`, with which the drop of each layer alone does the same to the loss
  of a network that was trained without noise from the same weights, times a factor that gives them the mean.

All schedules of a seed have the same points, initial weights and random numbers. The plan, written before any result
was there: test loss and test error of the mean network at the last step; linear and budgeted minus uniform, paired over
the seeds, Student's intervals, p values corrected for all depths, budgets and both schedules (Holm), for each score. No
learning rate is tuned: one for all, since schedules of one budget differ in little but where the noise is.
"""

import dataclasses
import math
from typing import Any

import numpy as np
import torch
from kolmo.experiments._crew import Crew
from kolmo.experiments._pairs import Gap, holm, paired
from kolmo.experiments._rows import Rows
from matplotlib.figure import Figure
from sklearn.datasets import make_moons
from torch import Tensor, nn
from torch.nn import functional

from kolmo import bridge, experiments
from kolmo.landscape.plots import COLOURS
from kolmo.report import Figure as Shown
from kolmo.report import Section, Table
from kolmo.runs import Run

SCHEDULES = ("uniform", "linear", "budgeted")
NONE = "none"
SCORES = {"loss": ("test loss", 1.0), "error": ("test error, %", 100.0)}
_TOGETHER = 10  # seeds that are trained as one batch of networks
_MOST = 0.9  # drop probability of a layer, as in bridge.schedule
_SHARE = 0.05  # of the loss: what the noise of `bridge.schedule` may add, small enough for effects in proportion


@dataclasses.dataclass(frozen=True)
class Config:
    seeds: int = 20
    seed: int = 0
    depths: tuple[int, ...] = (8, 24)
    budgets: tuple[float, ...] = (0.8, 0.6)  # mean keep probability
    train: int = 60
    test: int = 2000
    noise: float = 0.3  # of the moons
    width: int = 16
    steps: int = 400
    rate: float = 0.01
    workers: int = 1
    rows: str | None = None  # file of finished units: those in it are not done again, others are added


def run(config: Config, run: Run, progress: bool) -> dict[str, Any]:
    file = Rows(config.rows, dataclasses.asdict(config), free=("depths",))
    units = {key: (trained, (config, *which)) for key, which in parts(config).items()}
    with Crew(run, config.workers, units=len(units), progress=progress, rows=file) as crew:
        return results(config, crew.do(units))


def parts(config: Config) -> dict[str, tuple[int, int, int]]:
    """Depth, first seed and end of every unit."""
    end = config.seed + config.seeds
    starts = range(config.seed, end, _TOGETHER)
    return {
        f"{d}-{a}-{min(a + _TOGETHER, end)}": (d, a, min(a + _TOGETHER, end)) for a in starts for d in config.depths
    }


class Flows(nn.Module):
    """Many flows of one depth with linear heads, as one batch: ``(networks, points, 2)`` to scores of two classes."""

    def __init__(self, seeds: list[int], depth: int, width: int) -> None:
        super().__init__()
        self.h = 1 / math.sqrt(depth)
        branches, heads = [], []
        for seed in seeds:
            rng = torch.Generator().manual_seed(seed)
            branches.append([bridge.MLPBranch.create(2, width, rng=rng) for _ in range(depth)])
            heads.append(torch.randn(2, 2, generator=rng) / math.sqrt(2))
        for name in ("W1", "b1", "W2", "b2"):
            stacked = torch.stack([torch.stack([getattr(one, name).detach() for one in flow]) for flow in branches])
            setattr(self, name, nn.Parameter(stacked))
        self.head = nn.Parameter(torch.stack(heads))

    def forward(self, x: Tensor, scales: Tensor | None = None) -> Tensor:
        """Scores; `scales` ``(networks, points, L)`` multiply the branches."""
        for k in range(self.W1.shape[1]):
            units = torch.tanh(torch.baddbmm(self.b1[:, k, None], x, self.W1[:, k].mT))
            branch = torch.baddbmm(self.b2[:, k, None], units, self.W2[:, k].mT)
            x = x + self.h * (branch if scales is None else scales[..., k, None] * branch)
        return x @ self.head.mT

    def alone(self, network: int) -> nn.Module:
        """One of the networks."""
        blocks = [
            Block(self.h, bridge.MLPBranch(*(getattr(self, name)[network, k].detach() for name in _WEIGHTS)))
            for k in range(self.W1.shape[1])
        ]
        head = nn.Linear(2, 2, bias=False)
        head.weight.data.copy_(self.head[network])
        return nn.Sequential(*blocks, head)


_WEIGHTS = ("W1", "b1", "W2", "b2")


class Block(nn.Module):
    """x + h f(x)."""

    def __init__(self, h: float, branch: nn.Module) -> None:
        super().__init__()
        self.h, self.branch = h, branch

    def forward(self, x: Tensor) -> Tensor:
        return x + self.h * self.branch(x)


def data(config: Config, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and test points of a seed, in units of the moons."""
    points, labels = make_moons(config.train + config.test, noise=config.noise, random_state=seed)
    x, y = torch.as_tensor(points, dtype=torch.float32), torch.as_tensor(labels).long()
    return x[: config.train], y[: config.train], x[config.train :], y[config.train :]


def losses(scores: Tensor, y: Tensor) -> Tensor:
    """Mean cross-entropy of each network."""
    return functional.cross_entropy(scores.flatten(0, 1), y.flatten(), reduction="none").reshape(y.shape).mean(1)


def fitted(config: Config, seeds: list[int], depth: int, keep: Tensor | None) -> Flows:
    """Networks of some seeds, one after the other for every row of `keep` ``(kinds, seeds, L)``; without: no noise."""
    kinds = 1 if keep is None else len(keep)
    flows = Flows(seeds * kinds, depth, config.width)
    parts_ = [data(config, seed) for seed in seeds]
    x, y = (torch.stack([one[k] for one in parts_]).repeat(kinds, *[1] * (2 - k)) for k in (0, 1))
    rng = torch.Generator().manual_seed(1_000_003 * depth + seeds[0])
    optimizer = torch.optim.Adam(flows.parameters(), config.rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.steps)
    for _ in range(config.steps):
        scales = None
        if keep is not None:
            u = torch.rand(1, len(seeds), config.train, depth, generator=rng)
            p = keep[:, :, None, :]
            scales = ((u < p) / p).flatten(0, 1)
        optimizer.zero_grad()
        losses(flows(x, scales), y).sum().backward()
        optimizer.step()
        schedule.step()
    return flows


def keep_probabilities(name: str, budget: float, depth: int, shares: Tensor) -> Tensor:
    """Schedules ``(seeds, L)`` of a mean; `shares` are drop probabilities of equal effect."""
    if name == "uniform":
        return torch.full_like(shares, budget)
    if name == "linear":
        last = 1 - (1 - budget) * 2 * depth / (depth + 1)
        return torch.tensor(bridge.linear_decay(last, depth)).expand_as(shares)
    return 1 - spread(shares, (1 - budget) * depth)


def spread(shares: Tensor, total: float) -> Tensor:
    """Drop probabilities in proportion to the shares, none above the largest, with a sum."""
    low, high = torch.zeros(len(shares), 1), torch.full((len(shares), 1), 1e6)
    for _ in range(100):
        middle = (low + high) / 2
        less = (shares * middle).clamp(max=_MOST).sum(1, keepdim=True) < total
        low, high = torch.where(less, middle, low), torch.where(less, high, middle)
    return (shares * high).clamp(max=_MOST)


def equal_shares(flows: Flows, x: Tensor, y: Tensor) -> Tensor:
    """Drop probabilities with which every layer of a network without noise does the same to its training loss."""
    found = []
    for k in range(len(x)):
        model, inputs, labels = flows.alone(k).eval(), x[k], y[k]

        def loss(f: nn.Module, inputs: Tensor = inputs, labels: Tensor = labels) -> Tensor:
            return functional.cross_entropy(f(inputs), labels)

        budget = _SHARE * float(loss(model).detach())
        found.append([1 - law.keep for law in bridge.schedule(model, loss, inputs, _LAW, budget).laws])
    return torch.tensor(found)


_LAW = bridge.StochasticDepth(0.9)


def trained(config: Config, depth: int, start: int, end: int) -> dict[str, Any]:
    """Scores of all schedules and budgets of some seeds, and of the networks without noise."""
    seeds = list(range(start, end))
    plain = fitted(config, seeds, depth, None)
    parts_ = [data(config, seed) for seed in seeds]
    x, y, test_x, test_y = (torch.stack(list(each)) for each in zip(*parts_, strict=True))
    shares = equal_shares(plain, x, y)
    names = [(name, budget) for budget in config.budgets for name in SCHEDULES]
    keep = torch.stack([keep_probabilities(name, budget, depth, shares) for name, budget in names])
    noisy = fitted(config, seeds, depth, keep)

    def scored(flows: Flows) -> list[dict[str, Any]]:
        kinds = len(flows.head) // len(seeds)
        with torch.no_grad():
            scores, train = flows(test_x.repeat(kinds, 1, 1)), flows(x.repeat(kinds, 1, 1))
            wrong = (scores.argmax(-1) != test_y.repeat(kinds, 1)).double().mean(1)
            columns = {"error": wrong, "loss": losses(scores, test_y.repeat(kinds, 1))}
            columns["train_loss"] = losses(train, y.repeat(kinds, 1))
        return [{key: v.reshape(kinds, -1)[k].tolist() for key, v in columns.items()} for k in range(kinds)]

    return {
        NONE: scored(plain)[0],
        **{
            f"{name}-{budget:g}": {**one, "keep": keep[k].mean(0).tolist()}
            for k, ((name, budget), one) in enumerate(zip(names, scored(noisy), strict=True))
        },
    }


def results(config: Config, found: dict[str, Any]) -> dict[str, Any]:
    """Scores over seeds, and paired differences to uniform schedules and to no noise."""
    answer: dict[str, Any] = {}
    for depth in config.depths:
        units = [found[key] for key, which in parts(config).items() if which[0] == depth]
        answer[str(depth)] = {
            name: {score: np.concatenate([unit[name][score] for unit in units]) for score in (*SCORES, "train_loss")}
            | ({} if name == NONE else {"keep": np.mean([unit[name]["keep"] for unit in units], 0)})
            for name in units[0]
        }
    gaps: dict[str, dict[tuple[str, str], Gap]] = {score: {} for score in SCORES}
    for score, budget, depth in ((s, b, str(d)) for s in SCORES for b in config.budgets for d in config.depths):
        uniform = answer[depth][f"uniform-{budget:g}"]
        for name in SCHEDULES[1:]:
            one = answer[depth][f"{name}-{budget:g}"]
            gaps[score][depth, f"{name}-{budget:g}"] = paired(one[score], uniform[score])
        gap = paired(uniform[score], answer[depth][NONE][score])
        uniform.setdefault("to_none", {})[score] = gap._asdict()
    for score, ones in gaps.items():
        corrected = holm({key: gap.p for key, gap in ones.items()})
        for (depth, name), gap in ones.items():
            row = {**gap._asdict(), "holm": corrected[depth, name]}
            answer[depth][name].setdefault("to_uniform", {})[score] = row
    return answer


def report(run: Run) -> list[Section]:
    config, numbers = experiments.configure(Config, run.config), run.results
    run.save_figure("schedules", draw(config, numbers))
    rows = []
    for depth, ones in numbers.items():
        for name, one in ones.items():
            row = [depth, name, *(factor * np.mean(one[score]) for score, (_, factor) in SCORES.items())]
            for key in ("to_uniform", "to_none"):
                row += [str(_scaled(one[key][s], SCORES[s][1])) if key in one else None for s in SCORES]
            row += [one["to_uniform"][s]["holm"] if "to_uniform" in one else None for s in SCORES]
            rows.append([*row, np.mean(one["train_loss"])])
    head = ["layers", "schedule and mean keep", *(label for label, _ in SCORES.values())]
    head += [f"{label} − {other}" for other in ("uniform", "none") for label, _ in SCORES.values()]
    head += ["p, loss", "p, error", "training loss"]
    caption = (
        f"Mean networks, {config.seeds} seeds, {config.train} training points. Paired differences ± half of the 95 % "
        "interval (Student); p of linear and budgeted against uniform, corrected for all of them (Holm)."
    )
    return [
        Section(
            "Schedules of one budget",
            [
                Shown(
                    run.figure("schedules"), "differences to uniform, and keep probabilities", "Bars: 95 % intervals."
                ),
                Table(head, rows, caption),
            ],
        )
    ]


def _scaled(one: dict[str, Any], factor: float) -> Gap:
    return Gap(factor * one["mean"], factor * one["half"], one["p"], one["pairs"])


def draw(config: Config, numbers: dict[str, Any]) -> Figure:
    """Differences of both scores to uniform schedules, and the mean keep probabilities of the layers."""
    figure = Figure(figsize=(3.2 * (2 + len(config.depths)), 3.6), layout="constrained")
    panels = figure.subplots(1, 2 + len(config.depths))
    cells = [(str(depth), budget) for depth in config.depths for budget in config.budgets]
    for ax, (score, (label, factor)) in zip(panels[:2], SCORES.items(), strict=True):
        ax.axvline(0.0, color="0.5", lw=0.8)
        for row, (depth, budget) in enumerate(cells):
            for shift, colour, name in zip((-0.12, 0.12), COLOURS[1:], SCHEDULES[1:], strict=False):
                gap = _scaled(numbers[depth][f"{name}-{budget:g}"]["to_uniform"][score], factor)
                shown = name if row == 0 else None
                ax.errorbar(gap.mean, row + shift, xerr=gap.half, fmt="o", ms=5, capsize=3, color=colour, label=shown)
        ax.set_yticks(range(len(cells)), [f"{depth} layers, {budget:g}" for depth, budget in cells])
        ax.set_xlabel(f"{label} − uniform")
        ax.invert_yaxis()
        ax.grid(alpha=0.3)
    panels[1].set_yticklabels([])
    for ax, depth in zip(panels[2:], config.depths, strict=True):
        for style, budget in zip(("-", "--", ":"), config.budgets, strict=False):
            for colour, name in zip(COLOURS, SCHEDULES, strict=False):
                keep = numbers[str(depth)][f"{name}-{budget:g}"]["keep"]
                ax.plot(range(1, depth + 1), keep, style, color=colour, lw=1.4)
        ax.set(title=f"{depth} layers", xlabel="layer", ylim=(0, 1.03))
        ax.grid(alpha=0.3)
    panels[2].set_ylabel("keep probability, mean")
    handles = [
        panels[2].plot([], [], color=colour, label=name)[0] for colour, name in zip(COLOURS, SCHEDULES, strict=False)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    return figure
