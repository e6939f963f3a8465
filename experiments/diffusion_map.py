"""When is a noisy residual network a diffusion? Readings of its noise over depth, branch size and keep probability.

Flows in the plane, every layer with weights of its own, are trained on two moons without noise, at several depths and
with branches of size 1, 1/√L and 1/L. Then layers, or coordinates of layers, are dropped. What that does to the loss of
every input is sampled, with its first and second order and the effects of single layers as control variates, and
compared with four readings:

- the diffusion: Gaussian steps of the same mean and covariance, what a backward equation of second order describes;
- jumps: a Poisson number of the law's own steps in each layer, one in the mean, what its equation with jumps describes;
- first order in the covariance, ½ Σ C:∇²v;
- first order in the layers: the sum of what the noise of each layer alone does, exactly.

Beside the first two stands what theory says of their errors: the third and fourth cumulants that a Gaussian step has
not, and the fourth that a Poisson number has too much, times derivatives of the loss of the remaining layers.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from kolmo.experiments._crew import Crew
from matplotlib.figure import Figure
from sklearn.datasets import make_moons
from torch import Tensor, nn
from torch.nn import functional

from kolmo import bridge, experiments
from kolmo.landscape.plots import COLOURS
from kolmo.report import Figure as Shown
from kolmo.report import Measured, Section, Table
from kolmo.runs import Run

SCALINGS = {"1": 0.0, "1/√L": 0.5, "1/L": 1.0}
"""Powers of 1/L that the branches are multiplied by."""
LAWS = {"stochastic-depth": bridge.StochasticDepth, "dropout": bridge.BranchDropout}
READINGS = ("diffusion", "jumps", "first order, diffusion", "first order, layers")
_BLOCK = 50_000  # states that are moved together
_FARTHEST = 1e2  # of the errors that theory predicts in the figure: beyond, its leading terms are no prediction
_HOLDS = 0.1  # relative error up to which a reading is said to hold, as in bridge.diagnose


@dataclasses.dataclass(frozen=True)
class Config:
    seeds: int = 3
    seed: int = 0
    law: Literal["stochastic-depth", "dropout"] = "stochastic-depth"
    depths: tuple[int, ...] = (4, 8, 16, 32)
    keeps: tuple[float, ...] = (0.99, 0.9, 0.7, 0.5)
    width: int = 16
    scale: float = 1.0  # of the initial weights
    steps: int = 200
    rate: float = 0.01
    decay: float = 0.3  # of the weights
    noise: float = 0.2  # of the moons
    train: int = 400
    inputs: int = 50  # held out, that the effect of the noise is measured at
    paths: int = 1000  # for each input
    workers: int = 2


def run(config: Config, run: Run, progress: bool) -> dict[str, Any]:
    units = {_key(*cell): (measured, (config, *cell)) for cell in cells(config)}
    with Crew(run, config.workers, units=len(units), progress=progress) as crew:
        found = crew.do(units)
    return results(config, {cell: found[_key(*cell)] for cell in cells(config)})


def cells(config: Config) -> Iterator[tuple[str, int, int]]:
    """Scaling, depth and seed of every network."""
    yield from (
        (scaling, depth, seed)
        for seed in range(config.seed, config.seed + config.seeds)
        for scaling in SCALINGS
        for depth in config.depths
    )


def _key(scaling: str, depth: int, seed: int) -> str:
    return f"{list(SCALINGS).index(scaling)}-{depth}-{seed}"


@dataclasses.dataclass(frozen=True)
class Trained:
    """Layers of h times a branch, and the loss of each held-out input as a function of its last state."""

    net: bridge.NoisyResNet
    loss: Callable[[Tensor, Tensor], Tensor]
    x: Tensor
    y: Tensor
    accuracy: float


def trained(config: Config, scaling: str, depth: int, seed: int) -> Trained:
    """A flow with a linear head, trained without noise."""
    points, labels = make_moons(config.train + config.inputs, noise=config.noise, random_state=seed)
    x = torch.as_tensor((points - points.mean(0)) / points.std(0))
    y = torch.as_tensor(labels).long()
    rng = torch.Generator().manual_seed(seed)
    branches = [
        bridge.MLPBranch.create(2, config.width, scale=config.scale, rng=rng, dtype=torch.float64) for _ in range(depth)
    ]
    horizon = depth ** (1 - SCALINGS[scaling])  # h = depth^−power
    net = bridge.NoisyResNet(branches, bridge.Additive(0.0), horizon=horizon)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        head = nn.Linear(2, 2).double()
    optimizer = torch.optim.AdamW([*net.parameters(), *head.parameters()], config.rate, weight_decay=config.decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.steps)
    for _ in range(config.steps):
        optimizer.zero_grad()
        functional.cross_entropy(head(net.path(x[: config.train])), y[: config.train]).backward()
        optimizer.step()
        schedule.step()
    for parameter in (*net.parameters(), *head.parameters()):
        parameter.requires_grad_(False)
    held_x, held_y = x[config.train :], y[config.train :]
    accuracy = float((head(net.path(held_x)).argmax(-1) == held_y).double().mean())

    def loss(state: Tensor, label: Tensor) -> Tensor:
        return functional.cross_entropy(head(state), label, reduction="none")

    return Trained(net, loss, held_x, held_y, accuracy)


def measured(config: Config, scaling: str, depth: int, seed: int) -> dict[str, Any]:
    """Readings of one network at every keep probability; errors relative to the root mean square of the effect."""
    network = trained(config, scaling, depth, seed)
    layers, law = Layers(network), LAWS[config.law]
    found = {}
    terms = cumulants(layers, law(0.5))  # for noise as large as the increment; its nth power goes with the nth of them
    for keep in config.keeps:
        size = math.sqrt((1 - keep) / keep)
        scaled = Terms(*(size**n * term for n, term in zip((2, 3, 4, 4), terms, strict=True)))
        found[f"{keep:g}"] = readings(config, layers, law(keep), scaled, seed)
    return {
        "accuracy": network.accuracy,
        "loss": float(layers.noise_free.mean()),
        "ratio": layers.ratio,
        "keeps": found,
    }


class Layers:
    """The noise-free path of a network, and the loss of what remains behind every layer, with its gradient."""

    def __init__(self, network: Trained) -> None:
        self.net, self.x, self.y = network.net, network.x, network.y
        self._loss, self.path = network.loss, [network.x]
        for k in range(self.depth):
            self.path.append(self.path[-1] + self.increment(k, self.path[-1]))
        self.noise_free = self.rest(self.depth, self.path[-1], self.y)
        sizes = [self.increment(k, z).norm(dim=-1) / z.norm(dim=-1) for k, z in enumerate(self.path[:-1])]
        self.ratio = float(torch.stack(sizes).median())

    @property
    def depth(self) -> int:
        return self.net.depth

    def increment(self, k: int, x: Tensor) -> Tensor:
        """Mean increment of a layer: h times its branch."""
        return self.net.h * self.net.branches[k](x)

    def rest(self, k: int, x: Tensor, y: Tensor) -> Tensor:
        """Loss of the noise-free layers from k on, for every state."""
        for j in range(k, self.depth):
            x = x + self.increment(j, x)
        return self._loss(x, y)

    def behind(self, states: Tensor) -> Tensor:
        """Loss of the noise-free layers behind each layer, for states ``(L, n, 2)`` after it; ``(L, n)``."""
        z = states[:1]
        for k in range(1, self.depth):
            z = torch.cat([z + self.increment(k, z), states[k : k + 1]])
        return self._loss(z.flatten(0, 1), self.y.repeat(self.depth)).reshape(len(z), -1)

    def along(self, directions: Tensor, order: int) -> list[Tensor]:
        """Derivatives 1 … `order` of the loss behind each layer along its directions ``(L, n, 2)``; ``(L, n)``."""
        after = torch.stack(self.path[1:])
        one, found = torch.ones(directions.shape[:-1], dtype=after.dtype), []

        def f(t: Tensor) -> Tensor:
            return self.behind(after + t[..., None] * directions)

        for _ in range(order):
            f = _derivative(f, one)
            found.append(f(torch.zeros_like(one)))
        return found


def _derivative(f: Callable[[Tensor], Tensor], one: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda t: torch.func.jvp(f, (t,), (one,))[1]


class Terms(NamedTuple):
    """Derivatives of the loss along the columns of the noise, summed over layers and columns, for every input."""

    second: Tensor
    third: Tensor
    fourth: Tensor
    squared: Tensor  # Σ C⊗C:∇⁴v


def readings(config: Config, layers: Layers, law: bridge.NoiseLaw, terms: Terms, seed: int) -> dict[str, Any]:
    """Effect of a law, errors of its readings, and what theory says of them."""
    third, fourth = law.variable.skewness, law.variable.excess_kurtosis  # of ζ, beyond a Gaussian's
    draws = {"law": own(law), "diffusion": gaussian, "jumps": poisson(law)}
    sampled = {
        name: effect(layers, law, draw, config.paths, torch.Generator().manual_seed(seed))
        for name, draw in draws.items()
    }
    read = {
        "diffusion": sampled["diffusion"][0],
        "jumps": sampled["jumps"][0],
        "first order, diffusion": terms.second / 2,
        "first order, layers": Singles(layers, law).mean.sum(0),
    }
    exact, error = sampled["law"]
    size = float((exact.square().mean() - error.square().mean()).clamp_min(0).sqrt())
    noise = {
        name: math.sqrt(float(sum(sampled[n][1].square().mean() for n in {"law", name} & set(sampled))))
        for name in read
    }
    return {
        "effect": float(exact.mean()),
        "size": size,
        "error": {name: _beyond(value - exact, noise[name]) / size for name, value in read.items()},
        "noise": {name: noise[name] / size for name in read},
        "theory": {
            "diffusion": _rms(third * terms.third / 6 + fourth * terms.fourth / 24) / size,
            "jumps": _rms(terms.squared / 8) / size,
        },
    }


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())


def _beyond(gap: Tensor, noise: float) -> float:
    """Root mean square of a difference without what its sampling noise adds."""
    return math.sqrt(max(_rms(gap) ** 2 - noise**2, 0.0))


def cumulants(layers: Layers, law: bridge.NoiseLaw) -> Terms:
    """The terms of a law."""
    m = torch.stack([layers.increment(k, z) for k, z in enumerate(layers.path[:-1])])
    columns = law.factor(m, layers.net.h).unbind(-1)
    own = [layers.along(column, 4) for column in columns]
    second, third, fourth = (sum(values[n].sum(0) for values in own) for n in (1, 2, 3))
    squared = fourth
    for (a, of_a), (b, of_b) in itertools.combinations(zip(columns, own, strict=True), 2):
        both = layers.along(a + b, 4)[3] + layers.along(a - b, 4)[3]
        squared = squared + ((both - 2 * of_a[3] - 2 * of_b[3]) / 6).sum(0)  # twice ∂ₐ²∂ᵦ²v
    return Terms(second, third, fourth, squared)


Step = tuple[Tensor, Tensor]
"""Which paths take a step ``(paths, n, 1)``, and its ζ ``(paths, n, columns)``."""
Draw = Callable[[tuple[int, ...], torch.Generator], list[Step]]
"""Shape, generator -> steps of a layer."""


def own(law: bridge.NoiseLaw) -> Draw:
    """The law's own variable."""
    like = torch.zeros(0, dtype=torch.float64)
    return lambda shape, rng: [(torch.ones((*shape[:-1], 1), dtype=torch.bool), law.draw(shape, like, rng))]


def gaussian(shape: tuple[int, ...], rng: torch.Generator) -> list[Step]:
    """A Gaussian step."""
    step = torch.randn(shape, generator=rng, dtype=torch.float64)
    return [(torch.ones((*shape[:-1], 1), dtype=torch.bool), step)]


def poisson(law: bridge.NoiseLaw) -> Draw:
    """A Poisson number of the law's own steps, one in the mean; of all coordinates together, as a jump is."""
    draw = own(law)

    def drawn(shape: tuple[int, ...], rng: torch.Generator) -> list[Step]:
        counts = torch.poisson(torch.ones((*shape[:-1], 1), dtype=torch.float64), generator=rng)
        return [(counts >= n, draw(shape, rng)[0][1]) for n in range(1, int(counts.max()) + 1)]

    return drawn


def effect(layers: Layers, law: bridge.NoiseLaw, draw: Draw, paths: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Expected loss minus noise-free loss of every input, with standard errors.

    Along each path multiples of three sums of mean zero are subtracted: g·ζ and ½ ζᵀHζ − ½ tr H, the first and second
    order of the noise, and what each of its steps does alone, exactly, which tells most where steps are rare. The
    multiples are those of least variance for each input.
    """
    n, noise, singles = len(layers.x), Noise(layers, law), Singles(layers, law)
    slope, curve = noise.slope(), noise.curve()
    values, controls = [], []
    for some in _blocks(paths, max(1, _BLOCK // n)):
        steps = [draw((some, n, noise.columns), rng) for _ in range(layers.depth)]
        zeta = torch.stack([sum(taken * step for taken, step in of_layer) for of_layer in steps], 2)
        flat = zeta.flatten(2)
        values.append(noise.loss(zeta) - layers.noise_free)
        second = (torch.einsum("pni,nij->pnj", flat, curve) * flat).sum(-1)
        alone = torch.zeros_like(second) if draw is gaussian else singles.of(steps) - singles.mean.sum(0)
        controls.append(
            torch.stack([(flat * slope).sum(-1), 0.5 * (second - curve.diagonal(0, 1, 2).sum(-1)), alone], -1)
        )
    return _regressed(torch.cat(values), torch.cat(controls))


class Singles:
    """What every outcome of the noise of one layer does alone: a table ``(L, n, outcomes)`` of exact differences."""

    def __init__(self, layers: Layers, law: bridge.NoiseLaw) -> None:
        m = torch.stack([layers.increment(k, z) for k, z in enumerate(layers.path[:-1])])
        columns = law.noise_shape(m, 1)[-1]
        values, chances = (torch.as_tensor(v) for v in law.variable.nodes(2))  # off, on
        after, table, weights = torch.stack(layers.path[1:]), [], []
        for outcome in itertools.product((0, 1), repeat=columns):  # the first column is the highest bit
            zeta = values[list(outcome)].expand(*m.shape[:-1], -1)
            moved = after + law.fluctuation(m, zeta, layers.net.h)
            table.append(layers.behind(moved) - layers.noise_free)
            weights.append(chances[list(outcome)].prod())
        self._table = torch.stack(table, -1)
        self._bits = 2 ** torch.arange(columns - 1, -1, -1)
        self.mean = self._table @ torch.stack(weights)

    def of(self, steps: list[list[Step]]) -> Tensor:
        """Sum over the steps of every path."""
        total = torch.zeros(steps[0][0][1].shape[:-1], dtype=self._table.dtype)
        for table, of_layer in zip(self._table, steps, strict=True):
            for taken, zeta in of_layer:
                outcome = ((zeta > 0) * self._bits).sum(-1)
                total += taken[..., 0] * table.expand(*outcome.shape, -1).gather(-1, outcome[..., None])[..., 0]
        return total


def _blocks(total: int, most: int) -> list[int]:
    return [min(most, total - start) for start in range(0, total, most)]


def _regressed(values: Tensor, controls: Tensor) -> tuple[Tensor, Tensor]:
    """Means over paths and their standard errors, by regression on controls of mean zero."""
    paths = len(values)
    centred, own = controls - controls.mean(0), values - values.mean(0)
    gram = torch.einsum("pni,pnj->nij", centred, centred)
    # Without a drop in any path there is nothing to regress on.
    inverse = torch.linalg.pinv(gram, rtol=1e-9, hermitian=True)
    beta = torch.einsum("nij,pnj,pn->ni", inverse, centred, own)
    left = values - torch.einsum("pni,ni->pn", controls, beta)
    return left.mean(0), left.std(0) / math.sqrt(paths)


class Noise:
    """Loss of a network as a function of the variables of all layers ``(..., n, L, columns)``."""

    def __init__(self, layers: Layers, law: bridge.NoiseLaw) -> None:
        self._layers, self._law = layers, law
        self.columns = law.noise_shape(layers.x, 1)[-1]

    def loss(self, zeta: Tensor) -> Tensor:
        """Loss of every path, ``(..., n)``."""
        x = self._layers.x.expand(*zeta.shape[:-2], -1)
        for k in range(self._layers.depth):
            m = self._layers.increment(k, x)
            x = x + m + self._law.fluctuation(m, zeta[..., k, :], self._layers.net.h)
        y = self._layers.y.expand(zeta.shape[:-2])
        return self._layers.rest(self._layers.depth, x.flatten(0, -2), y.flatten()).reshape(y.shape)

    def slope(self) -> Tensor:
        """Gradient at zero for every input, ``(n, L · columns)``."""
        return torch.func.grad(lambda z: self.loss(z).sum())(self._zero()).flatten(1)

    def curve(self) -> Tensor:
        """Hessian at zero for every input."""
        zero = self._zero()

        def gradient(z: Tensor) -> Tensor:
            return torch.func.grad(lambda w: self.loss(w).sum())(z)

        def column(unit: Tensor) -> Tensor:
            return torch.func.jvp(gradient, (zero,), (unit.reshape(zero.shape[1:]).expand_as(zero),))[1].flatten(1)

        return torch.func.vmap(column)(torch.eye(zero[0].numel(), dtype=zero.dtype)).movedim(0, 1)

    def _zero(self) -> Tensor:
        return torch.zeros((len(self._layers.x), self._layers.depth, self.columns), dtype=self._layers.x.dtype)


# ----------------------------------------------------------------------------------------------------------- results


def results(config: Config, found: dict[tuple[str, int, int], dict[str, Any]]) -> dict[str, Any]:
    """Means over the seeds, by scaling, depth and keep probability."""
    return {
        scaling: {
            str(depth): {
                "accuracy": [one["accuracy"] for one in ones],
                "ratio": [one["ratio"] for one in ones],
                "loss": [one["loss"] for one in ones],
                "keeps": {f"{keep:g}": _over([one["keeps"][f"{keep:g}"] for one in ones]) for keep in config.keeps},
            }
            for depth in config.depths
            for ones in [[found[scaling, depth, s] for s in range(config.seed, config.seed + config.seeds)]]
        }
        for scaling in SCALINGS
    }


def _over(ones: list[dict[str, Any]]) -> dict[str, Any]:
    """Values of every seed."""
    return {
        key: {name: [one[key][name] for one in ones] for name in ones[0][key]}
        if isinstance(ones[0][key], dict)
        else [one[key] for one in ones]
        for key in ones[0]
    }


def typical(values: list[float]) -> float:
    """Median over the seeds."""
    return float(np.median(values))


def report(run: Run) -> list[Section]:
    config, numbers = experiments.configure(Config, run.config), run.results
    run.save_figure("map", draw_map(config, numbers))
    run.save_figure("theory", draw_theory(config, numbers))
    head = [
        "branches",
        "depth",
        "‖F‖/‖x‖",
        "accuracy",
        "keep",
        "effect / loss",
        *READINGS,
        "theory: diffusion",
        "jumps",
    ]
    rows = [
        [
            scaling,
            int(depth),
            typical(cell["ratio"]),
            _mean(cell["accuracy"]),
            float(keep),
            typical([e / loss for e, loss in zip(one["size"], cell["loss"], strict=True)]),
            *(typical(one["error"][name]) for name in READINGS),
            *(typical(one["theory"][name]) for name in ("diffusion", "jumps")),
        ]
        for scaling, by_depth in numbers.items()
        for depth, cell in by_depth.items()
        for keep, one in cell["keeps"].items()
    ]
    caption = (
        f"{config.law}, {config.seeds} seeds; medians. Errors: root mean square over {config.inputs} inputs of reading "
        "minus measured effect, relative to that of the effect, without what sampling noise adds. Theory: leading "
        "terms of the errors of the first two readings."
    )
    return [
        Section(
            "Where which reading holds",
            [
                Shown(run.figure("map"), "relative errors of four readings", "Medians over seeds; bold: at most 10 %."),
                Shown(run.figure("theory"), "errors of diffusion and jumps, measured and predicted", _THEORY),
                Table(head, rows, caption),
            ],
        )
    ]


_THEORY = (
    "Every network and keep probability is a dot; on the dashed line the leading terms of theory are exact. "
    "Predictions beyond the right edge stand at it; errors that sampling noise hides are left out."
)


def _mean(values: list[float]) -> Measured | float:
    return Measured(float(np.mean(values)), float(np.std(values, ddof=1))) if len(values) > 1 else values[0]


def draw_map(config: Config, numbers: dict[str, Any]) -> Figure:
    """A table of colours for every reading and scaling: depth across, keep probability up."""
    figure = Figure(figsize=(2.1 * len(READINGS) + 1.0, 2.0 * len(SCALINGS) + 0.4), layout="constrained")
    panels = figure.subplots(len(SCALINGS), len(READINGS), sharex=True, sharey=True, squeeze=False)
    keeps = [f"{keep:g}" for keep in sorted(config.keeps)]
    for ax, name in zip(panels[0], READINGS, strict=True):
        ax.set_title(name, fontsize=10)
    for row, scaling in zip(panels, SCALINGS, strict=True):
        for ax, name in zip(row, READINGS, strict=True):
            errors = np.array(
                [
                    [typical(numbers[scaling][str(depth)]["keeps"][keep]["error"][name]) for depth in config.depths]
                    for keep in keeps
                ]
            )
            shown = np.log10(np.clip(errors, 1e-3, 1.0))
            image = ax.imshow(shown, origin="lower", cmap="viridis_r", vmin=-2.5, vmax=0, aspect="auto")
            for (i, j), error in np.ndenumerate(errors):
                weight = "bold" if error <= _HOLDS else "normal"
                colour = "white" if shown[i, j] > -1.0 else "black"
                ax.text(j, i, _percent(error), ha="center", va="center", color=colour, fontsize=8, weight=weight)
            ax.set_xticks(range(len(config.depths)), [str(depth) for depth in config.depths])
            ax.set_yticks(range(len(keeps)), keeps)
        row[0].set_ylabel(f"branches {scaling}\nkeep", fontsize=9)
    figure.supxlabel("layers", fontsize=10)
    bar = figure.colorbar(image, ax=panels, shrink=0.7, label="relative error of the effect of the noise")
    bar.set_ticks([-2.5, -2, -1.5, -1, -0.5, 0], labels=["0.3 %", "1 %", "3 %", "10 %", "30 %", "100 %"])
    return figure


def _percent(error: float) -> str:
    return f"{100 * error:.0f}" if error >= 0.0995 else f"{100 * error:.1f}" if error >= 1e-3 else "<.1"


def draw_theory(config: Config, numbers: dict[str, Any]) -> Figure:
    """Measured against predicted error, every network and keep probability a dot."""
    figure = Figure(figsize=(9.0, 4.4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True, sharex=True)
    for ax, name in zip(panels, ("diffusion", "jumps"), strict=True):
        for colour, (scaling, by_depth) in zip(COLOURS, numbers.items(), strict=False):
            pairs = [
                (min(theory, _FARTHEST), error)
                for cell in by_depth.values()
                for one in cell["keeps"].values()
                for theory, error, noise in zip(
                    one["theory"][name], one["error"][name], one["noise"][name], strict=True
                )
                if error > noise  # others are not told apart from zero
            ]
            if pairs:
                ax.plot(*zip(*pairs, strict=True), "o", ms=4, alpha=0.7, color=colour, label=scaling)
        ax.plot([1e-4, 1e4], [1e-4, 1e4], "--", color="0.5", lw=1)
        ax.axhspan(1e-4, _HOLDS, color="0.93", zorder=0)
        ax.set(title=name, xlabel="relative error, leading terms of theory", xscale="log", yscale="log")
        ax.set(xlim=(1e-3, 1.3 * _FARTHEST), ylim=(1e-3, 1e1))
        ax.grid(alpha=0.3)
    panels[0].set_ylabel("relative error, measured")
    panels[1].legend(title="branches", frameon=False)
    return figure
