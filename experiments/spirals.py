"""Two spirals: a noisy flow of the plane that separates two classes, trained through its equation and by its paths.

dX = f(t, X) dt + σ dW with f a small network, constant on pieces of time; the first coordinate at time 1 is the score,
and E[cross-entropy + ½λ∫|f|²dt] is to be least. For both labels this is one backward Kolmogorov equation with two
columns, with the adjoint's gradient. The other route backpropagates through sampled Euler paths. Both start from the
same weights and are judged alike, by paths with fine steps on held-out data. What no flow can beat is the optimum of a
controller that sees the label, by the logarithmic transform.
"""

import dataclasses
import time
from typing import Any

import matplotlib.figure
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

import kolmo
from kolmo import control
from kolmo.report import Figure, Measured, Section, Table, compared
from kolmo.runs import Run

BLUE, ORANGE = "#0072b2", "#d55e00"
BOX = kolmo.Box([-3.5, -3.5], [3.5, 3.5])
ROUTES = ("equation", "paths")


@dataclasses.dataclass(frozen=True)
class Config:
    seed: int = 0
    turns: float = 0.9
    sigma: float = 0.35
    effort: float = 0.02  # λ
    scale: float = 4.0  # of the score
    pieces: int = 4
    width: int = 16
    train: int = 400
    test: int = 1_000
    iterations: int = 150
    nodes: int = 49  # per axis
    steps: int = 16  # of the equation and, while training, of the paths
    draws: int = 2  # paths for each example, while training
    judged: int = 40  # paths for each held-out example
    judged_steps: int = 64


class Flow(nn.Module):
    """Drift f(t, x) = W₂ tanh(W₁x + b₁), weights constant on pieces of time."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(config.seed)

        def normal(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=rng, dtype=torch.float64))

        n, width = config.pieces, config.width
        self.W1, self.b1, self.W2 = normal(n, width, 2), normal(n, width), normal(n, 2, width)
        self.scale, self.effort = config.scale, config.effort

    def drift(self, t: float, x: Tensor) -> Tensor:
        """F at points (..., 2)."""
        k = min(int(t * len(self.W1)), len(self.W1) - 1)
        return torch.tanh(x @ self.W1[k].T + self.b1[k]) @ self.W2[k].T / self.W1.shape[1] ** 0.5

    def losses(self, x: Tensor) -> Tensor:
        """Cross-entropy of both labels at end points, shape (..., 2)."""
        score = self.scale * x[..., 0]
        return -logsigmoid(torch.stack([-score, score], -1))

    def price(self, t: float, x: Tensor) -> Tensor:
        """½λ|f|²."""
        return 0.5 * self.effort * self.drift(t, x).square().sum(-1)

    def problem(self, config: Config) -> kolmo.KolmogorovProblem:
        """Expected cross-entropy of both labels."""
        ends = np.linspace(0.0, 1.0, config.pieces + 1)[1:-1].tolist()
        sde = kolmo.SDE(self.drift, config.sigma, dim=2, breakpoints=ends, autonomous=True, arrays="torch")
        return kolmo.KolmogorovProblem(sde, self.losses, 1.0, BOX, source=self.price)

    def paths(self, config: Config, x: Tensor, steps: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """End points of Euler paths, and what their drift costs."""
        dt, paid = 1.0 / steps, torch.zeros(x.shape[:-1], dtype=torch.float64)
        for k in range(steps):
            noise = torch.randn(x.shape, generator=rng, dtype=torch.float64)
            paid = paid + dt * self.price((k + 0.5) * dt, x)
            x = x + dt * self.drift((k + 0.5) * dt, x) + config.sigma * dt**0.5 * noise
        return x, paid


def run(config: Config, run: Run, progress: bool) -> dict[str, Any]:
    trained = {route: run.unit(route, lambda r=route: _train(config, r, progress)) for route in ROUTES}
    flows = {route: _restored(config, found["weights"]) for route, found in trained.items()}
    judged = {route: run.unit(f"judge-{route}", lambda f=flow: _judge(config, f)) for route, flow in flows.items()}
    run.save_figure("spirals", _draw(config, flows, trained))
    keys = ("loss", "seconds", "gradients", "status")
    return {route: {key: trained[route][key] for key in keys} | judged[route] for route in ROUTES} | {
        "equation_above_paths": judged["equation"]["expected"] - judged["paths"]["expected"],
        "bound": _bound(config, flows["equation"]),
    }


def conclusions(run: Run) -> list[str]:
    found = run.results
    told = []
    one, other = (found[route] for route in ("paths", "equation"))
    for key, of, what in (
        ("expected", "standard_error", "The expected cost"),
        ("accuracy", "accuracy_error", "Accuracy"),
    ):
        error = float(np.hypot(one[of], other[of]))  # on the same examples: not smaller than that of the difference
        told.append(compared(what, one[key], other[key], error, ("trained by paths", "trained by the equation")))
    spent = {route: found[route]["seconds"] for route in ("equation", "paths")}
    return [*told, f"The equation took {spent['equation']:.3g} s of CPU, paths {spent['paths']:.3g} s."]


def report(run: Run) -> list[Section]:
    rows = [
        [
            route,
            Measured(found["expected"], found["standard_error"]),
            found["bias_estimate"],
            Measured(found["accuracy"], found["accuracy_error"]),
            Measured(found["noisy_accuracy"], found["noisy_accuracy_error"]),
            found["gradients"],
            found["seconds"],
        ]
        for route, found in ((route, run.results[route]) for route in ROUTES)
    ]
    heads = ["trained through", "expected cost", "bias", "accuracy", "accuracy of a path", "gradients", "CPU seconds"]
    return [
        Section(
            "Two spirals",
            [
                Table(
                    heads,
                    rows,
                    f"Held-out data ± standard error over the examples. A controller that sees the label: "
                    f"{run.results['bound']:.4f}.",
                ),
                Figure(run.figure("spirals"), "Decision regions of both flows, and how the first moves the examples."),
            ],
        )
    ]


def examples(config: Config, n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Points (n, 2) on two interleaved arms, and their labels."""
    rng = np.random.default_rng(seed)
    y, t = rng.integers(0, 2, n), np.sqrt(rng.uniform(0.02, 1.0, n))
    angle = 2.0 * np.pi * config.turns * t + np.pi * y
    x = 2.0 * t[:, None] * np.stack([np.cos(angle), np.sin(angle)], -1) + 0.04 * rng.standard_normal((n, 2))
    return torch.as_tensor(x), torch.as_tensor(y)


def _train(config: Config, route: str, progress: bool) -> dict[str, Any]:
    flow, (x, y) = Flow(config), examples(config, config.train, config.seed)
    labels = nn.functional.one_hot(y, 2).double() / len(y)
    problem, rng = flow.problem(config), torch.Generator().manual_seed(config.seed)
    recipe = kolmo.solve(problem, grid=(config.nodes,) * 2, steps=config.steps, stepper="mcs").discretization

    def loss() -> Tensor:
        if route == "equation":
            return control.expected_value(problem, x, labels, discretization=recipe)
        ends, paid = flow.paths(config, x.expand(config.draws, -1, -1), config.steps, rng)
        return (flow.losses(ends).mean(0) * labels).sum() + paid.mean()

    begin = time.process_time()
    fit = control.minimize(loss, flow, method="adam", maxiter=config.iterations, progress=progress)
    return {
        "weights": {name: p.detach().numpy() for name, p in flow.named_parameters()},
        "loss": loss().item(),
        "history": fit.history["objective"],
        "seconds": time.process_time() - begin,
        "gradients": fit.nfev,
        "status": fit.status,
    }


def _restored(config: Config, weights: dict[str, np.ndarray]) -> Flow:
    flow = Flow(config)
    flow.load_state_dict({name: torch.as_tensor(np.array(w)) for name, w in weights.items()})
    return flow


def _judge(config: Config, flow: Flow) -> dict[str, float]:
    """Expected loss and accuracies on held-out examples, by paths with fine steps."""
    x, y = examples(config, config.test, config.seed + 1)
    found = []
    with torch.no_grad():
        for steps in (config.judged_steps, config.judged_steps // 2):
            rng = torch.Generator().manual_seed(config.seed)
            ends, paid = flow.paths(config, x.expand(config.judged, -1, -1), steps, rng)
            found.append((flow.losses(ends), paid.mean(0)))
    (losses, paid), (coarse, less) = found
    mean, rows = losses.mean(0), torch.arange(len(y))
    loss = mean[rows, y] + paid
    change = loss - coarse.mean(0)[rows, y] - less
    right, noisy = (mean.argmin(-1) == y).double(), (losses.argmin(-1) == y).double().mean(0)
    root = len(y) ** 0.5
    return {
        "expected": loss.mean().item(),
        "standard_error": loss.std().item() / root,
        "cross_entropy": mean[rows, y].mean().item(),
        "bias_estimate": 2.0 * (abs(change.mean().item()) + change.std().item() / root),
        "accuracy": right.mean().item(),
        "accuracy_error": right.std().item() / root,
        "noisy_accuracy": noisy.mean().item(),
        "noisy_accuracy_error": noisy.std().item() / root,
    }


def _bound(config: Config, flow: Flow) -> float:
    """Mean optimal cost of a controller that sees the label: V = −λσ² log E exp(−φ(x + σW₁)/(λσ²))."""
    x, y = examples(config, config.test, config.seed + 1)
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    moved = x[:, None, :1] + config.sigma * torch.as_tensor(nodes)[:, None]
    temperature = config.effort * config.sigma**2
    losses = flow.losses(moved)[torch.arange(len(y)), :, y]
    logs = torch.as_tensor(np.log(weights / weights.sum())) - losses / temperature
    return float(-temperature * torch.logsumexp(logs, -1).mean())


def _draw(config: Config, flows: dict[str, Flow], trained: dict[str, Any]) -> matplotlib.figure.Figure:
    figure = matplotlib.figure.Figure(figsize=(11.0, 3.6), layout="constrained")
    axes = figure.subplots(1, 3)
    x, y = examples(config, config.test, config.seed + 1)
    colors = np.array([BLUE, ORANGE])[y.numpy()]
    square = np.stack(np.meshgrid(*[np.linspace(-2.6, 2.6, 105)] * 2, indexing="ij"), -1)
    for ax, (route, flow) in zip(axes, flows.items(), strict=False):
        with torch.no_grad():
            solution = kolmo.solve(flow.problem(config), grid=(81, 81), steps=24, stepper="mcs")
            u = np.asarray(solution(square))
        chance = 1.0 / (1.0 + np.exp(u[..., 0] - u[..., 1]))
        ax.contourf(*np.moveaxis(square, -1, 0), chance, levels=np.linspace(0.0, 1.0, 11), cmap="RdBu", alpha=0.6)
        ax.contour(*np.moveaxis(square, -1, 0), chance, levels=[0.5], colors="k", linewidths=0.8)
        ax.scatter(*x[:400].T, c=colors[:400], s=4)
        ax.set(aspect="equal", xlabel="$x$", ylabel="$y$", title=f"trained through the {route}")
    with torch.no_grad():
        path = [x[:200]]
        for k in range(64):  # the flow without its noise
            path.append(path[-1] + flows["equation"].drift((k + 0.5) / 64, path[-1]) / 64)
    lines = torch.stack(path).numpy()
    for label, color in enumerate((BLUE, ORANGE)):
        own = y[:200].numpy() == label
        axes[2].plot(*np.moveaxis(lines[:, own], -1, 0), color=color, lw=0.4, alpha=0.6)
        axes[2].plot(*lines[-1, own].T, "o", color=color, ms=3)
    axes[2].set(aspect="equal", xlabel="$x$", ylabel="$y$", title="flow of the first, without noise")
    return figure
