"""Certificates against known errors: random problems of every kind, solved well, or badly on purpose.

A trial draws a problem with a known answer, solves it (by tolerance; on a grid that is too coarse; with a coefficient
that is off; with a window in time forgotten), and compares what ``certify`` says with the true error.

    python -m validation.certificates --count 200
"""

import argparse
import math
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.integrate import quad
from scipy.special import ive
from scipy.stats import norm

import kolmo
from kolmo import SDE, Absorbing, Box, Grid, KolmogorovProblem
from kolmo.errors import InputError
from kolmo.grid import Axis
from kolmo.testing import Table
from validation.random_problems import CATALOG, PERIODIC, WORDS, Question, Spec, question

Array = np.ndarray
SPOILS = ("solved", "coarse grid", "shifted coefficient", "forgotten window")
# Tolerance of the problems without a closed form.
RTOL = 1e-3
# An error below this part of the largest value is rounding.
ROUNDING = 1e-11


# ------------------------------------------------------------------------------------------------- jumps and windows
def occupation(rng: np.random.Generator) -> Question:
    """Expected time above a level: the source jumps in space."""
    s, T, c, at = rng.uniform(0.4, 1.5), rng.uniform(0.3, 2), 0.4 * rng.normal(), rng.normal() * 0.5

    def above(q: float) -> float:
        return 2 * q * norm.cdf((at - c) / (s * q)) if q > 0 else 0.0

    value = quad(above, 0, math.sqrt(T), epsabs=1e-13, limit=300)[0]
    problem = KolmogorovProblem(
        SDE(0.0, s, dim=1), lambda x: 0 * x[..., 0], T, source=lambda t, x: (x[..., 0] > c) * 1.0
    )
    return Question(problem, np.array([[at]]), np.array([value]))


def killed_above(rng: np.random.Generator) -> Question:
    """Killed at a rate θ above the level where the paths start (Kac 1949)."""
    theta, T, c, s = rng.uniform(0.3, 4), rng.uniform(0.3, 2), rng.normal(), rng.uniform(0.4, 1.5)
    problem = KolmogorovProblem(
        SDE(0.0, s, dim=1), lambda x: 1 + 0 * x[..., 0], T, killing=lambda t, x: theta * (x[..., 0] > c)
    )
    return Question(problem, np.array([[c]]), np.array([ive(0, theta * T / 2)]))


def window_in_time(rng: np.random.Generator) -> Question:
    """A drift, or a killing rate, that is on for a short time."""
    d, start, long = int(rng.integers(1, 3)), rng.uniform(0.1, 0.8), rng.uniform(0.02, 0.1)
    k, s, size, at = rng.normal(size=d), rng.uniform(0.3, 1), rng.uniform(-4, 4), rng.normal(size=d) * 0.5
    drift = size if rng.random() < 0.5 else 0.0
    rate = abs(size) if not drift else 0.0

    def on(t: float) -> float:
        return 1.0 if start < t < start + long else 0.0

    problem = KolmogorovProblem(
        SDE(lambda t, x: drift * on(t) + 0.0 * x, s, dim=d),
        lambda x: np.cos(x @ k),
        1.0,
        killing=(lambda t, x: rate * on(t) + 0.0 * x[..., 0]) if rate else None,
    )
    value = math.exp(-0.5 * (s**2) * float(k @ k) - rate * long) * math.cos(float((at + drift * long) @ k))
    return Question(problem, at[None], np.array([value]))


def narrow_window(rng: np.random.Generator) -> Question:
    """P(a < X_T < a + w), and P(X_T > a), in two columns."""
    s, T = rng.uniform(0.4, 1.5), rng.uniform(0.3, 2)
    spread = s * math.sqrt(T)
    w, a, at = spread * 10 ** rng.uniform(-1.5, 0), 0.5 * spread * rng.normal(), 0.3 * rng.normal()

    def terminal(x: Array) -> Array:
        y = x[..., 0]
        return np.stack([((y > a) & (y < a + w)) * 1.0, (y > a) * 1.0], -1)

    above = norm.sf((np.array([a, a + w]) - at) / spread)
    return Question(
        KolmogorovProblem(SDE(0.0, s, dim=1), terminal, T),
        np.array([[at]]),
        np.array([[above[0] - above[1], above[0]]]),
    )


def stationary_occupation(rng: np.random.Generator) -> Question:
    """Time above a level before leaving an interval, by Green's function."""
    L = rng.uniform(0.5, 2)
    c, at = rng.uniform(-0.8, 0.8) * L, rng.uniform(-0.8, 0.8) * L

    def green(y: float) -> float:
        return (L - max(at, y)) * (min(at, y) + L) / L

    value = quad(green, c, L, points=[at] if at > c else None, epsabs=1e-13)[0]
    problem = KolmogorovProblem(
        SDE(0.0, 1.0, dim=1), None, None, Box(-L, L, Absorbing(0.0)), source=lambda t, x: (x[..., 0] > c) * 1.0
    )
    return Question(problem, np.array([[at]]), np.array([value]))


ROUGH = (occupation, killed_above, window_in_time, narrow_window, stationary_occupation)


def drawn(rng: np.random.Generator, largest: int = 3) -> tuple[str, Question]:
    """A problem with a known answer: manufactured, a closed form, or one with jumps; drawn anew if too large."""
    while True:
        kind, asked = _drawn(rng)
        if asked.problem.dim <= largest:
            return kind, asked


def _drawn(rng: np.random.Generator) -> tuple[str, Question]:
    kind = rng.choice(["manufactured", "closed form", "rough"], p=[0.35, 0.35, 0.3])
    seed = int(rng.integers(2**31))
    if kind == "manufactured":
        d = int(rng.choice([1, 2, 3], p=[0.5, 0.4, 0.1]))
        faces = tuple(
            PERIODIC if rng.random() < 0.2 else (str(rng.choice(WORDS)), str(rng.choice(WORDS))) for _ in range(d)
        )
        spec = Spec("manufactured", seed, faces, clock=bool(rng.random() < 0.5), mixed=0.4 * bool(rng.random() < 0.5))
        return f"manufactured {faces}", question(spec)
    if kind == "closed form":
        name = str(rng.choice(CATALOG))
        return name, question(Spec(name, seed))
    make = ROUGH[int(rng.integers(len(ROUGH)))]
    return make.__name__, make(rng)


# ------------------------------------------------------------------------------------------------- solved, and spoilt
def solved(problem: KolmogorovProblem, at: Array, kept: bool) -> kolmo.Solution:
    """By tolerance; with many times kept or none."""
    T = problem.horizon
    save = None if T is None or not kept else sorted({*np.linspace(0.0, T, 31), *problem.sde.breakpoints})
    return kolmo.solve(problem, at=at, rtol=1e-3, atol=1e-6, save=save)


def coarse(problem: KolmogorovProblem, at: Array, kept: bool) -> kolmo.Solution:
    """On a third of the nodes and steps."""
    recipe = solved(problem, at, kept=False).discretization
    grid = Grid([Axis(max(9, -(-a.n // 3)), a.grading, a.periodic) for a in recipe.grid.axes])
    steps = None if problem.stationary else max(4, recipe.steps // 3)
    try:
        return kolmo.solve(problem, grid=grid, steps=steps)
    except InputError:  # explicit steps need more
        return kolmo.solve(problem, grid=grid, steps=20 * recipe.steps)


def shifted(problem: KolmogorovProblem, rng: np.random.Generator) -> KolmogorovProblem:
    """The problem with a coefficient a little off."""
    push, noise, kill = np.eye(3)[rng.integers(3)] * np.array([0.3, 0.2, 0.2])
    sde = problem.sde
    return KolmogorovProblem(
        SDE(
            lambda t, x: (1.0 + push) * sde.drift(t, x),
            covariance=lambda t, x: (1.0 + noise) * sde.covariance(t, x),
            dim=problem.dim,
            breakpoints=sde.breakpoints,
        ),
        problem.terminal,
        problem.horizon,
        problem.box,
        killing=lambda t, x: problem.rate(t, x) + kill,
        source=problem.source,
    )


def forgetful(problem: KolmogorovProblem, rng: np.random.Generator) -> KolmogorovProblem:
    """The problem with drift, killing and source absent for a while."""
    if problem.horizon is None:
        return shifted(problem, rng)
    start, long = rng.uniform(0.1, 0.7) * problem.horizon, rng.uniform(0.05, 0.2) * problem.horizon
    marks = sorted({*problem.sde.breakpoints, start, start + long})
    sde = problem.sde

    def on(t: float) -> float:
        return 0.0 if start < t < start + long else 1.0

    def absent(f: Callable[..., Any]) -> Callable[..., Any]:
        return lambda t, x: on(t) * f(t, x)

    return KolmogorovProblem(
        SDE(absent(sde.drift), covariance=sde.covariance, dim=problem.dim, breakpoints=marks),
        problem.terminal,
        problem.horizon,
        problem.box,
        killing=None if problem.killing is None else absent(problem.rate),
        source=None if problem.source is None else absent(problem.running),
    )


@dataclass(frozen=True)
class Trial:
    """A certificate beside the true error, at a point and over the columns.

    Attributes
    ----------
    seed : int
        Seed of the draw.
    kind, spoil : str
        Which problem, and how it was solved.
    truth, error, uncertainty : ndarray, shape (k,)
        True error, the certificate's, and its standard error and bias together.
    scale : float
        Largest value.
    seconds : float
        CPU time of the certificate.
    """

    seed: int
    kind: str
    spoil: str
    truth: Array
    error: Array
    uncertainty: Array
    scale: float
    seconds: float

    @property
    def away(self) -> float:
        """Distance of the certificate from the true error in units of its own uncertainty."""
        off = np.maximum(np.abs(self.error - self.truth) - ROUNDING * self.scale, 0.0)
        return float(np.max(off / np.maximum(self.uncertainty, 1e-300)))

    def __str__(self) -> str:
        found = " ".join(
            f"{t:+.2e}: {e:+.2e} ± {u:.1e}" for t, e, u in zip(self.truth, self.error, self.uncertainty, strict=True)
        )
        return f"{self.seed} {self.spoil}, {self.kind}: {found} ({self.away:.1f}, {self.seconds:.2f} s)"


def trial(seed: int, paths: int = 2000, steps: int = 100, largest: int = 3) -> Trial:
    """Draw a problem, solve it well or badly, and certify."""
    rng = np.random.default_rng([33, seed])
    kind, asked = drawn(rng, largest)
    spoil = SPOILS[seed % len(SPOILS)]
    which = int(rng.integers(len(asked.points)))
    at, problem, kept = asked.points[which : which + 1], asked.problem, bool(rng.random() < 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if spoil == "coarse grid":
            solution = coarse(problem, at, kept)
        else:
            wrong = {"shifted coefficient": shifted, "forgotten window": forgetful}.get(spoil, lambda p, _: p)
            solution = solved(wrong(problem, rng), at, kept)
        begun = time.process_time()
        found = kolmo.certify(problem, solution, at, paths=paths, steps=steps, rng=seed)
        spent = time.process_time() - begun
    answer = np.asarray(asked.answer).reshape(len(asked.points), -1)[which]
    value = np.asarray(solution(at)).reshape(-1)
    flat = [np.asarray(a).reshape(-1) for a in (found.error, found.uncertainty)]
    return Trial(seed, kind, spoil, answer - value, flat[0], flat[1], float(np.abs(answer).max()), spent)


def summary(trials: list[Trial]) -> Table:
    """How often the certificate was within one, two and three of its uncertainties, by how the problem was solved."""
    rows: list[tuple[Any, ...]] = []
    for name in ("all", *SPOILS):
        mine = [t for t in trials if name in ("all", t.spoil)]
        away = np.array([t.away for t in mine])
        part = [float(np.median(t.uncertainty / np.maximum(np.abs(t.truth), 1e-300))) for t in mine]
        seconds = np.median([t.seconds for t in mine])
        rows.append((name, len(mine), *(int((away <= m).sum()) for m in (1, 2, 3)), float(np.median(part)), seconds))
    columns = ("solutions", "drawn", "within 1", "within 2", "within 3", "uncertainty / true error", "CPU s")
    return Table("Certificates against true errors", columns, tuple(rows))


# ------------------------------------------------------------------------------------------------- no closed form
def limit_cycle() -> Question:
    """Stuart and Landau's oscillator with noise: the mean of the first coordinate after two thirds of a turn."""

    def drift(t: float, x: Array) -> Array:
        radius = (x**2).sum(-1)[..., None]
        return x - radius * x + 3.0 * np.stack([-x[..., 1], x[..., 0]], -1)

    return Question(
        KolmogorovProblem(SDE(drift, 0.4, dim=2), lambda x: x[..., 0], 1.4), np.array([[1.0, 0.0], [0.2, 0.3]]), None
    )


def van_der_pol() -> Question:
    """Van der Pol's oscillator, noise in the velocity alone: a smooth indicator of positive positions."""

    def drift(t: float, x: Array) -> Array:
        return np.stack([x[..., 1], (1.0 - x[..., 0] ** 2) * x[..., 1] - x[..., 0]], -1)

    noise = np.array([[0.0], [0.6]])
    problem = KolmogorovProblem(SDE(drift, noise, dim=2), lambda x: 0.5 + 0.5 * np.tanh(4.0 * x[..., 0]), 1.0)
    return Question(problem, np.array([[0.5, 0.5], [-1.0, 1.0]]), None)


def two_wells() -> Question:
    """Mean time until a particle in the plane, with two wells, leaves a box."""

    def drift(t: float, x: Array) -> Array:
        y, z = x[..., 0], x[..., 1]
        return np.stack([y - y**3 + 0.5 * z, -z - 0.3 * y], -1)

    box = Box([-2.0, -1.5], [2.0, 1.5], "absorbing")
    problem = KolmogorovProblem(SDE(drift, 0.9, dim=2), None, None, box, source=1.0)
    return Question(problem, np.array([[0.0, 0.0], [-1.0, 0.5]]), None)


def layered_network() -> Question:
    """A residual network of three noisy layers in three dimensions, between reflecting walls."""
    rng = np.random.default_rng(5)
    W, c = rng.normal(size=(3, 3, 3)), rng.normal(size=(3, 3)) * 0.3

    def drift(t: float, x: Array) -> Array:
        k = min(int(3.0 * t), 2)
        return np.tanh(x @ W[k].T + c[k])

    sde = SDE(drift, 0.5, dim=3, breakpoints=[1 / 3, 2 / 3])
    problem = KolmogorovProblem(sde, lambda x: np.cos(x.sum(-1)), 1.0, Box([-2.0] * 3, [2.0] * 3, "reflecting"))
    return Question(problem, np.array([[0.2, -0.3, 0.1]]), None)


def stopped_pair() -> Question:
    """Two correlated assets of which one knocks out: a steep payoff on the other, discounted at the first."""

    def noise(t: float, x: Array) -> Array:
        first, second = 0.3 * x[..., 0], 0.2 * x[..., 1]
        mixed = 0.5 * first * second
        return np.stack([np.stack([first**2, mixed], -1), np.stack([mixed, second**2], -1)], -2)

    box = Box([0.8, 0.0], [np.inf, np.inf], [("absorbing", "open"), ("natural", "open")])
    problem = KolmogorovProblem(
        SDE(lambda t, x: 0.05 * x, covariance=noise, dim=2),
        lambda x: 0.5 + 0.5 * np.tanh(10.0 * (x[..., 1] - 1.0)),
        1.0,
        box,
        killing=lambda t, x: 0.05 * x[..., 0],
    )
    return Question(problem, np.array([[1.0, 1.0]]), None)


UNKNOWN = (limit_cycle, van_der_pol, two_wells, layered_network, stopped_pair)


def certified() -> Table:
    """Problems without a closed form: value, estimate and certified error."""
    rows = []
    for make in UNKNOWN:
        asked = make()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            recipe = kolmo.plan(asked.problem, at=asked.points, rtol=RTOL, atol=1e-9, max_seconds=20.0)
            solution = kolmo.solve(asked.problem, discretization=recipe)
        steps = 16 if asked.problem.stationary else 200
        found = kolmo.certify(asked.problem, solution, asked.points, paths=4000, steps=steps, rng=0)
        value, estimate = np.asarray(solution(asked.points)), sum(part[0] for part in recipe.estimate.values())
        met = "yes" if estimate <= RTOL * np.abs(value).max() else "no"
        for i, at in enumerate(asked.points):
            name, place = make.__name__.replace("_", " "), ", ".join(f"{a:g}" for a in at)
            numbers = (float(value[i]), estimate, met, float(found.error[i]), float(found.uncertainty[i]))
            rows.append((name, place, *numbers, round(found.seconds, 1)))
    columns = ("problem", "from", "value", "estimate", "met", "error found", "uncertainty", "seconds")
    return Table("Certified without a closed form", columns, tuple(rows))


def main() -> int:
    """Draw, solve, certify, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--first", type=int, default=0, help="seed of the first draw")
    parser.add_argument("--largest", type=int, default=3, help="dimensions at most")
    parser.add_argument("--verbose", action="store_true", help="print every trial")
    options = parser.parse_args()
    trials = []
    for seed in range(options.first, options.first + options.count):
        trials.append(trial(seed, largest=options.largest))
        if options.verbose or trials[-1].away > 3.0:
            sys.stdout.write(f"{trials[-1]}\n")
            sys.stdout.flush()
    sys.stdout.write(f"{summary(trials)}\n")
    return int(sum(t.away > 3.0 for t in trials) > 0.025 * len(trials))


if __name__ == "__main__":
    sys.exit(main())
