"""Do intervals hold what they promise? Data are simulated again and again, and fitted: 95 % intervals should cover.

Two models whose likelihoods have no closed form, or a laborious one: a decision model with bounds that collapse
(choices and times), and a pair of coupled Ornstein–Uhlenbeck processes seen at irregular times through noise. Every
data set is a unit of work; of intervals that cover with probability 0.95, 90 to 99 of a hundred hold the value that the
data were made with.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import matplotlib.figure
import numpy as np
import torch

import kolmo
from kolmo import likelihood
from kolmo.errors import NotConvergedError
from kolmo.report import Figure, Section, Table
from kolmo.runs import Run

BLUE, ORANGE = "#0072b2", "#d55e00"
# Steps in which decisions are simulated; crossings between them by the Brownian bridge.
FINE = 5e-4
LONGEST = 20.0
# Variances of the pair when it is first seen.
FIRST_LAW = (0.5, 0.3)
# Between which factors of the truth a fit may go.
ROOM = 3.0
# A delay beyond the fastest response is hopeless: fits end at this part of it.
FASTEST = 0.95


@dataclasses.dataclass(frozen=True)
class Config:
    seed: int = 0
    models: tuple[str, ...] = ("pair",)  # of: pair, collapsing, race
    datasets: int = 100
    observations: int = 120  # of the pair, on average 0.4 apart
    trials: int = 300  # of the decision models
    tol: float = 1e-2  # of the log-likelihood


@dataclasses.dataclass(frozen=True)
class Model:
    """A model: its parameters, all positive, how data are drawn, and their likelihood given the parameters' logarithms.

    Where a parameter is positive its logarithm is fitted: intervals are symmetric in it sooner.
    """

    title: str
    names: tuple[str, ...]
    truth: tuple[float, ...]
    draw: Callable[[Config, np.random.Generator], Any]
    likelihood: Callable[[Config, Any, torch.Tensor], likelihood.Likelihood]


def run(config: Config, run: Run, progress: bool) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for k, name in enumerate(config.models):
        model, units = MODELS[name], []
        for i in range(config.datasets):
            units.append(run.unit(f"{name}-{i:03d}", lambda i=i, k=k, model=model: _one(config, model, k, i)))
            if progress and (i + 1) % 10 == 0:
                run.log(f"{name}: {i + 1} of {config.datasets}")
        run.save_figure(name, _drawn(model, units))
        found[name] = _answer(model, units)
    return found


def report(run: Run) -> list[Section]:
    sections = []
    for name, found in run.results.items():
        rows = [
            [n, *(v[key] for key in ("truth", "median", "error", "covered"))] for n, v in found["parameters"].items()
        ]
        caption = (
            f"Of {found['datasets']} data sets, {found['failed']} without an interval; {found['seconds']:.1f} s each."
        )
        table = Table(
            ["parameter", "truth", "median of estimates", "median standard error (relative)", "covered"], rows, caption
        )
        alt = "Intervals of all data sets, those that miss the truth in another colour."
        sections.append(Section(MODELS[name].title, [table, Figure(run.folder / "figures" / f"{name}.png", alt)]))
    return sections


def _one(config: Config, model: Model, which: int, i: int) -> dict[str, Any]:
    """One data set: drawn, fitted, and its intervals."""
    rng = np.random.default_rng([config.seed, which, i])
    data, truth = model.draw(config, rng), np.log(model.truth)
    begin = time.perf_counter()
    theta = torch.tensor(truth + rng.uniform(-0.4, 0.4, len(truth)), requires_grad=True)
    low, high = truth - np.log(ROOM), truth + np.log(ROOM)
    if isinstance(data, likelihood.Trials):  # the delay is the last of the parameters
        high[-1] = np.log(FASTEST * data.times.min())
    theta.data.clamp_(max=torch.as_tensor(high))
    fit = likelihood.fit(model.likelihood(config, data, theta), theta, bounds=[(low, high)])
    try:
        errors = fit.uncertainty().standard_errors
    except NotConvergedError:
        errors = np.full(len(truth), np.nan)
    return {"estimates": fit.x, "errors": errors, "seconds": time.perf_counter() - begin}


def _answer(model: Model, units: list[dict[str, Any]]) -> dict[str, Any]:
    x, errors = (np.array([u[key] for u in units]) for key in ("estimates", "errors"))
    known = np.isfinite(errors).all(1)
    covered = (np.abs(x - np.log(model.truth)) <= 1.96 * errors).sum(0)
    columns = zip(model.names, model.truth, np.exp(np.median(x, 0)), np.nanmedian(errors, 0), covered, strict=True)
    return {
        "parameters": {
            name: {"truth": truth, "median": float(m), "error": float(e), "covered": int(c)}
            for name, truth, m, e, c in columns
        },
        "datasets": len(units),
        "failed": int((~known).sum()),
        "seconds": float(np.median([u["seconds"] for u in units])),
    }


def _drawn(model: Model, units: list[dict[str, Any]]) -> matplotlib.figure.Figure:
    x, errors = (np.array([u[key] for u in units]) for key in ("estimates", "errors"))
    figure = matplotlib.figure.Figure(figsize=(2.2 * len(model.names), 4.2), layout="constrained")
    axes = figure.subplots(1, len(model.names), sharey=True, squeeze=False)[0]
    for k, (ax, name, truth) in enumerate(zip(axes, model.names, model.truth, strict=True)):
        order = np.argsort(x[:, k])
        miss = np.abs(x[:, k] - np.log(truth)) > 1.96 * errors[:, k]
        for row, i in enumerate(order):
            ends = np.exp(x[i, k] + np.array([-1.96, 1.96]) * errors[i, k])
            ax.plot(ends, [row, row], color=ORANGE if miss[i] else BLUE, lw=1.0)
        ax.axvline(truth, color="k", lw=0.8)
        ax.set(xscale="log", xlabel=name, yticks=[])
        ax.xaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_minor_formatter("")
        low, high = ax.get_xlim()
        ax.set_xticks([t for t in (truth / 2, truth / 1.4, truth, 1.4 * truth, 2 * truth) if low < t < high])
    axes[0].set_ylabel("data sets, by their estimate")
    return figure


# --- a pair of Ornstein–Uhlenbeck processes ---------------------------------------------------------------------------


def _pair(config: Config, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Times and noisy observations of the pair, by its exact transitions."""
    from scipy.linalg import expm, solve_continuous_lyapunov

    k1, k2, c, s, e = PAIR.truth
    A = np.array([[-k1, c], [0.0, -k2]])
    stationary = solve_continuous_lyapunov(A, -s * s * np.eye(2))
    gaps = rng.exponential(0.4, config.observations - 1) + 0.01
    x = [rng.multivariate_normal(np.zeros(2), np.diag(FIRST_LAW))]
    for h in gaps:
        M = expm(A * h)
        x.append(M @ x[-1] + rng.multivariate_normal(np.zeros(2), stationary - M @ stationary @ M.T))
    return np.append(0.0, np.cumsum(gaps)), np.array(x) + e * rng.standard_normal((len(x), 2))


def _pair_likelihood(config: Config, data: Any, theta: torch.Tensor) -> likelihood.Likelihood:
    def drift(t: float, x: torch.Tensor) -> torch.Tensor:
        k1, k2, c = torch.exp(theta[:3])
        return torch.stack([-k1 * x[..., 0] + c * x[..., 1], -k2 * x[..., 1]], -1)

    def noise(t: float, x: torch.Tensor) -> torch.Tensor:
        return torch.exp(theta[3]).expand(*x.shape)

    sde = kolmo.SDE(drift, noise, dim=2, arrays="torch")
    first = (np.zeros(2), np.diag(FIRST_LAW))
    return likelihood.noisy_paths(sde, *data, lambda: torch.exp(theta[4]), initial=first, tol=config.tol)


PAIR = Model(
    "An Ornstein–Uhlenbeck pair, at irregular times and through noise",
    ("rate 1", "rate 2", "coupling", "noise", "error"),
    (1.0, 0.6, 0.8, 0.6, 0.15),
    _pair,
    _pair_likelihood,
)

# --- decisions --------------------------------------------------------------------------------------------------------


def _crossed(before: np.ndarray, after: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Whether a bound was met in a step, by the distances before and after (exact for bounds that are straight)."""
    met = np.exp(-2.0 * np.maximum(before, 0.0) * np.maximum(after, 0.0) / FINE)
    return np.asarray((after <= 0.0) | (rng.uniform(size=before.shape) < met))


def _collapsing(config: Config, rng: np.random.Generator) -> likelihood.Trials:
    """Choices and times of a decision whose bounds fall exponentially, by small steps with bridges."""
    speed, height, life, delay = COLLAPSING.truth
    n = config.trials
    strength = rng.choice([0.0, 0.5, 1.0], n)
    x, t, choice = np.zeros(n), np.zeros(n), np.full(n, -1)
    k = 0
    while (going := choice < 0).any() and k * FINE < LONGEST:
        y = x + speed * strength * FINE + np.sqrt(FINE) * rng.standard_normal(n)
        old, new = (height * np.exp(-(k + m) * FINE / life) for m in (0, 1))
        high, low = _crossed(old - x, new - y, rng), _crossed(old + x, new + y, rng)
        # both in one step: only where the bounds have all but met
        choice = np.where(going & high & ~(low & (y < 0)), 1, np.where(going & low, 0, choice))
        t += FINE * (going - 0.5 * (going & (choice >= 0)))
        x, k = y, k + 1
    return likelihood.Trials(t + delay, choice, {"strength": strength})


def _collapsing_likelihood(config: Config, data: Any, theta: torch.Tensor) -> likelihood.Likelihood:
    def bound(t: Any) -> torch.Tensor:
        return torch.exp(theta[1] - torch.as_tensor(t, dtype=torch.float64) / torch.exp(theta[2]))

    model = likelihood.FirstPassage(
        lambda t, x, c: torch.exp(theta[0]) * c["strength"] + 0.0 * x,
        lower=lambda t, c: -bound(t),
        upper=lambda t, c: bound(t),
        delay=lambda c: torch.exp(theta[3]),
    )
    return model.likelihood(data, tol=config.tol)


COLLAPSING = Model(
    "A decision with bounds that collapse",
    ("speed", "bound", "life of the bound", "delay"),
    (1.5, 1.2, 1.5, 0.3),
    _collapsing,
    _collapsing_likelihood,
)

# --- accumulators that race -------------------------------------------------------------------------------------------

# Known, not fitted: from choices and times it is hardly found (Miletić, Turner, Forstmann and van Maanen 2017).
INHIBITION = 1.0


def _race(config: Config, rng: np.random.Generator) -> likelihood.Trials:
    """Choices and times of two accumulators that inhibit each other, by small steps with bridges."""
    first, second, height, delay = RACE.truth
    n = config.trials
    x, t, choice = np.zeros((n, 2)), np.zeros(n), np.full(n, -1)
    for _ in range(round(LONGEST / FINE)):
        going = choice < 0
        if not going.any():
            break
        drift = np.array([first, second]) - INHIBITION * x[:, ::-1]
        y = np.abs(x + drift * FINE + np.sqrt(FINE) * rng.standard_normal((n, 2)))
        out = _crossed(height - x, height - y, rng)
        # both in one step: that which is farther
        choice = np.where(going & out.any(1), np.where(out.all(1), y.argmax(1), out.argmax(1)), choice)
        t += FINE * (going - 0.5 * (going & (choice >= 0)))
        x = y
    return likelihood.Trials(t + delay, choice)


def _race_likelihood(config: Config, data: Any, theta: torch.Tensor) -> likelihood.Likelihood:
    race = likelihood.Race(
        lambda t, x, c: torch.exp(theta[:2]) - INHIBITION * x.flip(-1),
        upper=[lambda c: torch.exp(theta[2])] * 2,
        lower=0.0,
        delay=lambda c: torch.exp(theta[3]),
    )
    return race.likelihood(data, tol=config.tol)


RACE = Model(
    "Two accumulators that inhibit each other",
    ("speed 1", "speed 2", "bound", "delay"),
    (1.2, 2.0, 1.2, 0.3),
    _race,
    _race_likelihood,
)


MODELS = {"pair": PAIR, "collapsing": COLLAPSING, "race": RACE}
