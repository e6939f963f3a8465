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


def drawn(rng: np.random.Generator, largest: int) -> tuple[str, Question]:
    """A problem with a known answer: manufactured (of a dimension at most), a closed form, or one with jumps."""
    kind = rng.choice(["manufactured", "closed form", "rough"], p=[0.35, 0.35, 0.3])
    seed = int(rng.integers(2**31))
    if kind == "manufactured":
        d = min(int(rng.choice([1, 2, 3], p=[0.5, 0.4, 0.1])), largest)
        faces = tuple(
            PERIODIC if rng.random() < 0.2 else (str(rng.choice(WORDS)), str(rng.choice(WORDS))) for _ in range(d)
        )
        spec = Spec("manufactured", seed, faces, clock=bool(rng.random() < 0.5), mixed=0.4 * bool(rng.random() < 0.5))
        return f"manufactured {faces}", question(spec)
    if kind == "closed form":
        name = str(rng.choice([*CATALOG, "linear_sde"]))
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


def main() -> int:
    """Draw, solve, certify, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--first", type=int, default=0, help="seed of the first draw")
    parser.add_argument("--verbose", action="store_true", help="print every trial")
    options = parser.parse_args()
    trials = []
    for seed in range(options.first, options.first + options.count):
        trials.append(trial(seed))
        if options.verbose or trials[-1].away > 3.0:
            sys.stdout.write(f"{trials[-1]}\n")
            sys.stdout.flush()
    sys.stdout.write(f"{summary(trials)}\n")
    return int(sum(t.away > 3.0 for t in trials) > 0.025 * len(trials))


if __name__ == "__main__":
    sys.exit(main())
