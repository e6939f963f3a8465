"""Random problems, each with its answer: what ``solve`` estimates against what it gets wrong.

A problem is made from a :class:`Spec`, whose ``repr`` is the code that makes it again. Four kinds:

- "free": random coefficients, faces and data; the answer is a much finer solve by another scheme and stepper.
- "manufactured": everything at once, the answer known because the source was made for it.
- the name of a function in ``kolmo.catalog``, with random parameters: closed forms.
- a name in ``validation.rough_problems``: data that jump, bend, are narrow, or degenerate at a face; closed forms.

Each can be asked in changed coordinates, rough ones in other units too. As a script it draws many and prints how
estimate and true error compare:

    python -m validation.random_problems --count 200 --first 0 [--rough]
"""

import argparse
import math
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

import kolmo
from kolmo import SDE, Absorbing, Box, Grid, KolmogorovProblem, Robin, catalog
from kolmo.errors import KolmoError, NotConvergedError
from kolmo.grid.grading import Pieces
from kolmo.problem.faces import Open
from kolmo.schemes.base import SCHEMES
from kolmo.schemes.generator import Generator
from kolmo.steppers.base import STEPPERS
from kolmo.testing import Table, manufactured
from validation.rough_problems import CHARTED, MAKERS, SLANTED, rough_problem

Array = np.ndarray
PERIODIC = ("periodic", "periodic")
WORDS = ("open", "reflecting", "absorbing", "robin", "natural")
DATA = ("smooth", "kinked", "jump", "growing")
CATALOG = (
    "ornstein_uhlenbeck", "layered_ornstein_uhlenbeck", "running_cost", "harmonic_killing", "geometric_brownian_motion",
    "down_and_out_call", "margrabe", "vasicek_bond", "cir_bond", "heat", "linear_sde", "langevin", "rotation",
    "reflected_brownian_motion", "elastic_brownian_motion", "survival", "exit_right", "mean_exit_time", "committor",
    "mean_exit_time_rectangle", "circle", "wright_fisher", "double_well", "reflected_ornstein_uhlenbeck",
)  # fmt: skip
# Seconds that planning may take, by dimension: not every problem converges within them, and then it must say so.
SECONDS = {1: 10.0, 2: 15.0, 3: 25.0}
# Seconds that a march of the reference may take: an answer that would take longer is not judged.
REFERENCE_SECONDS = 30.0
# Absolute tolerance, in units of the values.
ATOL = 1e-9
# Rounding, relative to the largest value: below it an estimate is neither honest nor dishonest.
ROUNDING = 1e-12


@dataclass(frozen=True)
class Spec:
    """What a random problem is made from.

    Attributes
    ----------
    kind : str
        "free", "manufactured", or a name in the catalog or among the rough problems (faces, data, clock, loads, mixed
        and noise are then unused).
    seed : int
        Seed of all numbers.
    faces : tuple of (str, str)
        Low and high face per axis; an open face of a free problem lies at infinity.
    data : str
        "smooth", "kinked", "jump" or "growing".
    clock : bool
        Whether coefficients depend on time.
    loads : bool
        Whether there are killing, source and face values.
    mixed : float
        Correlation of the noise between axes.
    noise : float
        Size of the noise; 0 for none.
    chart : int
        0: the coordinates it was made in; otherwise the seed of a change of coordinates.
    units : int
        Of rough problems: 0 for the units it was made in; otherwise the seed of other ones.
    """

    kind: str
    seed: int
    faces: tuple[tuple[str, str], ...] = (("open", "open"),)
    data: str = "smooth"
    clock: bool = False
    loads: bool = False
    mixed: float = 0.0
    noise: float = 1.0
    chart: int = 0
    units: int = 0

    @property
    def dim(self) -> int:
        """Dimension of a free or manufactured problem."""
        return len(self.faces)


@dataclass(frozen=True)
class Question:
    """A problem, where its answer matters, the answer where it is known, and the unit of its values."""

    problem: KolmogorovProblem
    points: Array
    answer: Array | None
    unit: float = 1.0


def draw(seed: int) -> Spec:
    """Draw a spec; dimension 3 and the noise-free problem are rare."""
    rng = np.random.default_rng([20, seed])
    kind = rng.choice(["free", "manufactured", "catalog"], p=[0.5, 0.2, 0.3])
    chart = int(rng.integers(1, 10**6)) if rng.random() < 0.4 else 0
    if kind == "catalog":
        return Spec(str(rng.choice(CATALOG)), seed, chart=chart)
    d = int(rng.choice([1, 2, 3], p=[0.55, 0.4, 0.05]))
    faces = tuple(
        PERIODIC if rng.random() < 0.15 else (str(rng.choice(WORDS)), str(rng.choice(WORDS))) for _ in range(d)
    )
    clock, loads = bool(rng.random() < 0.5), bool(rng.random() < 0.5)
    mixed = float(rng.choice([0.0, 0.5, 0.8])) if d > 1 else 0.0
    if kind == "manufactured":
        return Spec("manufactured", seed, faces, clock=clock, mixed=min(mixed, 0.5), chart=chart)
    data = str(rng.choice(DATA))
    noise = float(rng.choice([1.0, 0.5, 0.2, 0.05], p=[0.4, 0.3, 0.2, 0.1]))
    return Spec("free", seed, faces, data, clock, loads, mixed, noise, chart)


def draw_rough(seed: int) -> Spec:
    """Draw the spec of a rough problem; a third in other units, a third in other coordinates."""
    rng = np.random.default_rng([21, seed])
    kind, how = str(rng.choice(list(MAKERS))), rng.random()
    other = int(rng.integers(1, 10**6))
    if how < 1 / 3:
        return Spec(kind, seed, units=other)
    return Spec(kind, seed, chart=other if how > 2 / 3 and kind in CHARTED else 0)


def question(spec: Spec) -> Question:
    """Make the problem of a spec."""
    if spec.kind == "free":
        made = _Free(spec)
        asked = Question(made.problem(), made.points(), None)
    elif spec.kind == "manufactured":
        horizon = float(np.random.default_rng(spec.seed).uniform(0.1, 0.6))
        case = manufactured(spec.faces, horizon=horizon, autonomous=not spec.clock, mixed=spec.mixed)
        asked = Question(case.problem, case.points, case.values)
    elif spec.kind in MAKERS:
        rough = rough_problem(spec.kind, spec.seed, spec.units)
        asked = Question(rough.problem, rough.points, rough.answer, rough.unit)
    else:
        case = _catalogued(spec.kind, np.random.default_rng(spec.seed))
        asked = Question(case.problem, case.points, case.values)
    return transformed(asked, spec.chart) if spec.chart else asked


# ---------------------------------------------------------------------------------------------------- closed forms
def _catalogued(name: str, rng: np.random.Generator) -> catalog.Case:
    """A problem of the catalog with random parameters."""
    u = rng.uniform
    gaussian = str(rng.choice(["gauss", "square", "cubic", "cos", "indicator"]))
    parameters: dict[str, Callable[[], dict[str, Any]]] = {
        "ornstein_uhlenbeck": lambda: {
            "terminal": gaussian, "kappa": u(-0.5, 3.0), "mu": u(-1, 1), "sigma": u(0.2, 1.2), "horizon": u(0.2, 2.0)},
        "layered_ornstein_uhlenbeck": lambda: {
            "terminal": gaussian, "kappa": u(-1, 2, 3).tolist(), "mu": u(-1, 1, 3).tolist(),
            "sigma": u(0.2, 1, 3).tolist(), "horizon": u(0.3, 1.5)},
        "running_cost": lambda: {"kappa": u(0.2, 2), "sigma": u(0.3, 1.2), "horizon": u(0.3, 2)},
        "harmonic_killing": lambda: {"omega": u(0.5, 3), "sigma": u(0.5, 1.5), "horizon": u(0.3, 1.5)},
        "geometric_brownian_motion": lambda: {
            "payoff": str(rng.choice(["call", "put", "digital"])), "strike": 10 ** u(-1, 3), "rate": u(0, 0.1),
            "sigma": u(0.1, 0.5), "dividend": u(0, 0.05), "horizon": u(0.1, 2)},
        "down_and_out_call": lambda: {
            "barrier": u(80, 95), "rate": u(0, 0.1), "sigma": u(0.15, 0.4), "horizon": u(0.2, 1)},
        "margrabe": lambda: {
            "sigma": (u(0.15, 0.4), u(0.15, 0.4)), "correlation": u(-0.7, 0.7), "rate": u(0, 0.1),
            "horizon": u(0.3, 1.5)},
        "vasicek_bond": lambda: {"kappa": u(0.3, 2), "theta": u(0, 0.1), "sigma": u(0.02, 0.2), "horizon": u(0.5, 3)},
        "cir_bond": lambda: {"kappa": u(0.2, 2), "theta": u(0.02, 0.1), "sigma": u(0.1, 0.5), "horizon": u(0.5, 3)},
        "heat": lambda: {"correlation": u(-0.95, 0.95), "sigma": (u(0.4, 1.2), u(0.4, 1.2)), "horizon": u(0.2, 1)},
        "linear_sde": lambda: {
            "dim": 2, "terminal": str(rng.choice(["gauss", "quadratic"])), "horizon": u(0.3, 1)},
        "langevin": lambda: {"friction": u(0, 2), "sigma": u(0.4, 1.2), "horizon": u(0.3, 1.2)},
        "rotation": lambda: {"speed": u(0.5, 2.5), "horizon": u(0.3, 1)},
        "elastic_brownian_motion": lambda: {"kappa": u(0.2, 3), "sigma": u(0.5, 1.5), "horizon": u(0.2, 1)},
        "survival": lambda: {"mu": u(-1, 1), "sigma": u(0.4, 1.2), "length": u(0.8, 2), "horizon": u(0.1, 0.8)},
        "exit_right": lambda: {"mu": u(-1, 1), "sigma": u(0.4, 1.2), "length": u(0.8, 2), "horizon": u(0.2, 1)},
        "mean_exit_time": lambda: {"kappa": u(0.2, 2), "sigma": u(0.5, 1.5)},
        "committor": lambda: {"sigma": u(0.3, 1)},
        "mean_exit_time_rectangle": lambda: {"sigma": (u(0.5, 1.5), u(0.5, 1.5)), "sides": (u(0.5, 2), u(0.5, 2))},
        "circle": lambda: {
            "concentration": u(0.3, 4), "speed": u(-2, 2), "sigma": u(0.3, 1.2), "horizon": u(0.3, 1.5)},
        "wright_fisher": lambda: {
            "mutation": u(0.1, 1), "target": u(0.2, 0.8), "noise": u(0.5, 1.5), "horizon": u(0.3, 1)},
        "double_well": lambda: {"sigma": u(0.4, 1), "horizon": u(0.5, 5)},
        "reflected_ornstein_uhlenbeck": lambda: {"mu": u(0.2, 1.5), "sigma": u(0.4, 1), "horizon": u(0.3, 1.5)},
    }  # fmt: skip
    return catalog.CASES[name](**parameters.get(name, dict)())


# ---------------------------------------------------------------------------------------------------- free problems
class _Free:
    """Random waves for coefficients; every axis bounded, half bounded or unbounded as its faces say."""

    def __init__(self, spec: Spec) -> None:
        self.spec, self.d = spec, spec.dim
        self.rng = rng = np.random.default_rng([7, spec.seed])
        opened = np.array([[w == "open" for w in pair] for pair in spec.faces])
        self.start, self.length = rng.uniform(-1, 0.5, self.d), rng.uniform(0.8, 2.0, self.d)
        self.low = np.where(opened[:, 0], -np.inf, self.start)
        self.high = np.where(opened[:, 1], np.inf, self.start + self.length)
        self.root = [[bool(rng.random() < 0.6) for _ in range(2)] for _ in range(self.d)]
        self.waves = rng.uniform(-1, 1, (6, self.d, 3))
        self.pull, self.centre = rng.uniform(0, 1.2, self.d), self.start + 0.5 * self.length
        self.size = spec.noise * rng.uniform(0.5, 1.2, self.d)
        self.normal = rng.normal(size=self.d)
        self.normal /= np.abs(self.normal).max()
        self.phase, self.power = float(rng.uniform(0, 6)), int(rng.integers(0, 3))
        self.kappa, self.horizon = float(rng.uniform(0.2, 2)), float(rng.uniform(0.2, 1.0))
        self.threshold = float(self._form(self._core(rng, 1))[0])
        self.pair = bool(rng.random() < 0.25)

    def _core(self, rng: np.random.Generator, count: int) -> Array:
        """Points that matter: inside bounded axes, near the bounded end of half-bounded ones."""
        return np.asarray(self.start + self.length * rng.uniform(0.1, 0.9, (count, self.d)))

    def _angle(self, x: Array, j: int) -> Array:
        z = (x[..., j] - self.start[j]) / self.length[j]
        return np.asarray(2 * math.pi * z if self.spec.faces[j] == PERIODIC else 1.8 * z)

    def _wave(self, which: int, t: float, x: Array, amplitude: float = 1.0) -> Array:
        """One smooth bounded function of time and place, at most the amplitude in size."""
        parts = [np.sin(self._angle(x, j) + 3.0 * self.waves[which, j, 1]) for j in range(self.d)]
        total = sum(self.waves[which, j, 0] * part for j, part in enumerate(parts)) / self.d
        total = total + 0.5 * self.waves[which, 0, 2] * parts[0] * parts[-1]
        return np.asarray(amplitude / 1.5 * total * (1.0 + (0.5 * math.sin(3.0 * t + which) if self.spec.clock else 0)))

    def _form(self, x: Array) -> Array:
        """A linear form of the place (of the sine of the angle where an axis is periodic)."""
        parts = [
            np.sin(self._angle(x, j)) if self.spec.faces[j] == PERIODIC else x[..., j] - self.centre[j]
            for j in range(self.d)
        ]
        return np.asarray(sum(n * part for n, part in zip(self.normal, parts, strict=True)))

    def _fades(self, x: Array, i: int) -> tuple[Array, Array, Array]:
        """What the noise, its mixed part, and the rough drift are multiplied with: natural ends are degenerate."""
        noise, mixed, inside = 1.0 + 0.0 * x[..., i], 1.0 + 0.0 * x[..., i], 1.0 + 0.0 * x[..., i]
        for side, word in enumerate(self.spec.faces[i]):
            if word == "natural":
                end = self.start[i] if side == 0 else self.start[i] + self.length[i]
                f = 2.0 * (x[..., i] - end) * (1 - 2 * side) / self.length[i]
                square_root = self.root[i][side]
                noise = noise * (np.sqrt(np.maximum(f, 0.0)) if square_root else f)
                mixed = mixed * (f / np.sqrt(1.0 + f) if square_root else f)
                inside = inside * f / (1.0 + f)
        return noise, mixed, inside

    def drift(self, t: float, x: Array) -> Array:
        parts = []
        for i, pair in enumerate(self.spec.faces):
            b = self._wave(i, t, x) * self._fades(x, i)[2]
            if "natural" in pair or "open" in pair:
                b = b - self.pull[i] * (x[..., i] - self.centre[i])
            parts.append(b)
        return np.stack(parts, -1)

    def covariance(self, t: float, x: Array) -> Array:
        size = [self.size[i] * (1.0 + self._wave(3, t, x, 0.5)) for i in range(self.d)]
        fades = [self._fades(x, i) for i in range(self.d)]
        rows = [
            [
                size[i] ** 2 * fades[i][0] ** 2
                if i == j
                else self.spec.mixed * size[i] * size[j] * fades[i][1] * fades[j][1]
                for j in range(self.d)
            ]
            for i in range(self.d)
        ]
        return np.stack([np.stack(row, -1) for row in rows], -2)

    def terminal(self, x: Array) -> Array:
        s = self._form(x)
        moments = any("natural" in pair and "open" in pair for pair in self.spec.faces)
        growing = s**2 if moments else (np.exp(0.7 * s), s**2 + s, s**3)[self.power]
        smooth = np.cos(1.5 * s + self.phase) + 0.5 * np.exp(-(s**2))
        chosen = {
            "smooth": smooth,
            "kinked": np.abs(s - self.threshold),
            "jump": (s > self.threshold) * 1.0,
            "growing": growing,
        }[self.spec.data]
        return np.stack([chosen, smooth], -1) if self.pair else np.asarray(chosen)

    def _columns(self, value: Array) -> Array:
        return np.stack([value, 0.5 * value], -1) if self.pair else value

    def _face(self, word: str) -> Any:
        if word == "robin":
            value = (lambda t, x: self._columns(0.3 + self._wave(5, t, x))) if self.spec.loads else 0.0
            return Robin(self.kappa, value)
        if word == "absorbing" and self.spec.loads:
            return Absorbing(lambda t, x: self._columns(self._wave(4, t, x, 0.6)))
        return word

    def problem(self) -> KolmogorovProblem:
        sde = SDE(self.drift, covariance=self.covariance if self.spec.noise else None, dim=self.d)
        box = Box(self.low, self.high, boundary=[tuple(self._face(w) for w in pair) for pair in self.spec.faces])
        killing = (lambda t, x: 0.3 + self._wave(4, t, x, 0.6)) if self.spec.loads else None
        source = (lambda t, x: self._columns(self._wave(5, t, x) + 0.2)) if self.spec.loads else None
        return KolmogorovProblem(sde, self.terminal, self.horizon, box, killing=killing, source=source)

    def points(self) -> Array:
        return self._core(np.random.default_rng([8, self.spec.seed]), 4)


# ---------------------------------------------------------------------------------------------- change of coordinates
class _Chart:
    """x = χ(y) on one axis, smooth and increasing, with bounded ends kept as ends."""

    def __init__(self, low: float, high: float, centre: float, scale: float, rng: np.random.Generator) -> None:
        self.unit = float(10 ** rng.uniform(-1, 1))
        self.shift = float(rng.uniform(-3, 3))
        self.bend = float(rng.uniform(-0.6, 0.6))
        self.low, self.high, self.centre, self.scale = low, high, centre, scale

    def _inner(self, v: Array) -> tuple[Array, Array, Array]:
        """x(v), x'(v) and x''(v) for the place v in old units."""
        if np.isfinite(self.low) and np.isfinite(self.high):
            L, z = self.high - self.low, 2 * math.pi * (v - self.low) / (self.high - self.low)
            w = 2 * math.pi / L
            return v + self.bend * np.sin(z) / w, 1 + self.bend * np.cos(z), -self.bend * w * np.sin(z)
        if np.isfinite(self.low) or np.isfinite(self.high):
            end, sign = (self.low, 1.0) if np.isfinite(self.low) else (self.high, -1.0)
            s = sign * (v - end) / self.scale
            bend, root = 0.5 * abs(self.bend), np.sqrt(1 + s**2)
            rise = self.scale * (s + bend * (root - 1))
            return end + sign * rise, 1 + bend * s / root, sign * bend / root**3 / self.scale
        s = (v - self.centre) / self.scale
        th = np.tanh(s)
        return (
            v + self.bend * self.scale * th,
            1 + self.bend * (1 - th**2),
            -2 * self.bend * th * (1 - th**2) / self.scale,
        )

    def __call__(self, y: Array) -> tuple[Array, Array, Array]:
        """χ(y), χ'(y), χ''(y)."""
        x, first, second = self._inner((y - self.shift) / self.unit)
        return x, first / self.unit, second / self.unit**2

    def inverse(self, x: float) -> float:
        """The y with χ(y) = x."""
        if not np.isfinite(x):
            return x
        v = np.array(x)
        for _ in range(60):
            value, slope, _ = self._inner(v)
            v = v - np.clip((value - x) / slope, -self.scale, self.scale)
        return float(v * self.unit + self.shift)


def transformed(asked: Question, seed: int) -> Question:
    r"""The same question in coordinates y, x = χ(y) axis by axis: by Itô, b̃ = b/χ' − ½ Σ χ''/χ'³ and Σ̃ = Σ/(χ'χ')."""
    problem, rng = asked.problem, np.random.default_rng(seed)
    d, box = problem.dim, problem.box
    scale = np.maximum(np.ptp(asked.points, axis=0), 0.1 * np.maximum(np.abs(asked.points).max(0), 1e-3))
    centre = asked.points.mean(0)
    charts = [_Chart(box.lower[i], box.upper[i], centre[i], scale[i], rng) for i in range(d)]

    # rounding must not carry a point out of a face that is real; a cut may be moved outwards
    cut = np.array([[isinstance(f, Open) for f in pair] for pair in box.faces])
    walls = np.where(cut[:, 0], -np.inf, box.lower), np.where(cut[:, 1], np.inf, box.upper)

    def jets(y: Array) -> tuple[Array, Array, Array]:
        parts = [chart(y[..., i]) for i, chart in enumerate(charts)]
        x = np.stack([p[0] for p in parts], -1)
        return np.clip(x, *walls), *(np.stack([p[k] for p in parts], -1) for k in (1, 2))

    def drift(t: float, y: Array) -> Array:
        x, first, second = jets(y)
        S = np.einsum("...ii->...i", problem.sde.covariance(t, x))
        return np.asarray(problem.sde.drift(t, x) / first - 0.5 * S * second / first**3)

    def covariance(t: float, y: Array) -> Array:
        x, first, _ = jets(y)
        return np.asarray(problem.sde.covariance(t, x) / (first[..., :, None] * first[..., None, :]))

    def pulled(function: Any) -> Any:
        return (lambda t, y: function(t, jets(y)[0])) if callable(function) else function

    def face(old: Any, axis: int) -> Any:
        if isinstance(old, Absorbing):
            return Absorbing(pulled(old.value))
        if isinstance(old, Robin):
            # ½ n·Σ̃∇u = ½ n·Σ∇u / χ' along the normal

            def divided(value: Any) -> Any:
                def rate(t: float, y: Array) -> Array:
                    x, first, _ = jets(y)
                    v = np.asarray(value(t, x) if callable(value) else value)
                    slope = first[..., axis]
                    return np.asarray(v / (slope[..., None] if v.ndim > slope.ndim else slope))

                return rate

            return Robin(divided(old.kappa), divided(old.value))
        return old

    lower = [chart.inverse(a) for chart, a in zip(charts, box.lower, strict=True)]
    upper = [chart.inverse(a) for chart, a in zip(charts, box.upper, strict=True)]
    boundary = [tuple(face(f, i) for f in pair) for i, pair in enumerate(box.faces)]
    sde = SDE(
        drift,
        covariance=None if problem.sde.noiseless else covariance,
        dim=d,
        breakpoints=problem.sde.breakpoints,
        autonomous=problem.sde.autonomous,
    )
    terminal = None if problem.terminal is None else lambda y: problem.final(jets(y)[0])
    points = np.array([[chart.inverse(a) for chart, a in zip(charts, p, strict=True)] for p in asked.points])
    other = KolmogorovProblem(
        sde,
        terminal,
        problem.horizon,
        Box(lower, upper, boundary=boundary),
        killing=pulled(problem.killing),
        source=pulled(problem.source),
    )
    inside = np.clip(points, lower, upper)  # rounding may have carried a point out of a face
    assert np.allclose(inside, points, rtol=1e-9, atol=1e-9 * (1.0 + np.abs(points).max())), "a point outside the box"
    return Question(other, inside, asked.answer, asked.unit)


# ------------------------------------------------------------------------------------------------------- the trial
@dataclass(frozen=True)
class Trial:
    """What came of one problem.

    Attributes
    ----------
    spec : Spec
        The problem.
    rtol : float
        Tolerance asked for.
    status : str
        "converged", "tolerance_not_met", or "error: ..." where there was no answer.
    estimate, error, doubt : float
        Of the column with the worst ratio: the estimate, the largest difference from the answer over the points, and
        what the answer itself is uncertain by.
    scale : float
        Largest absolute value of that column.
    seconds : float
        Time of ``plan``.
    """

    spec: Spec
    rtol: float
    status: str
    estimate: float
    error: float
    doubt: float
    scale: float
    seconds: float

    @property
    def known(self) -> float:
        """The part of the error that is certain."""
        return max(self.error - self.doubt, 0.0) if np.isfinite(self.error) and np.isfinite(self.doubt) else 0.0

    @property
    def dishonest(self) -> bool:
        """Whether the true error certainly exceeds ten times the estimate of an answer called converged."""
        return self.status == "converged" and self.known > 10.0 * self.estimate + ROUNDING * self.scale

    @property
    def told(self) -> bool:
        """Whether the answer to compare with is good enough to judge the estimate by."""
        return self.status == "converged" and self.doubt < 0.5 * max(self.estimate, self.error)

    def __str__(self) -> str:
        return (
            f"rtol {self.rtol:g}: {self.status}, estimate {self.estimate:.1e}, error {self.error:.1e}"
            f" ± {self.doubt:.1e}, scale {self.scale:.1e}, {self.seconds:.1f} s: {self.spec!r}"
        )


def tolerance(spec: Spec) -> float:
    """The relative tolerance at which a spec is asked."""
    rng = np.random.default_rng([9, spec.seed])
    if spec.kind in SLANTED:
        return float(rng.choice([1e-2, 1e-3]))
    flat = spec.dim == 1 and not spec.kind.startswith(("margrabe", "heat", "linear", "langevin", "rotation"))
    return float(rng.choice([1e-2, 1e-3, 1e-4, 1e-6] if flat else [1e-2, 1e-3, 1e-4]))


def trial(spec: Spec, rtol: float | None = None, seconds: float | None = None) -> Trial:
    """Solve a random problem by tolerance and compare the estimate with the true error."""
    rtol = tolerance(spec) if rtol is None else rtol
    asked = question(spec)
    problem, begun = asked.problem, time.perf_counter()
    nothing = (math.nan, math.nan, math.nan, math.nan)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            values, estimate, recipe = _by_tolerance(asked, rtol, SECONDS[problem.dim] if seconds is None else seconds)
    except (KolmoError, ArithmeticError, ValueError, IndexError) as told:
        return Trial(spec, rtol, f"error: {type(told).__name__}: {told}", *nothing, time.perf_counter() - begun)
    spent = time.perf_counter() - begun
    bound = ATOL * asked.unit + rtol * np.abs(values).max(0)
    status = "converged" if bool((estimate <= 1.0001 * bound).all()) else "tolerance_not_met"
    if asked.answer is not None:
        answer, doubt = asked.answer.reshape(values.shape), np.zeros(values.shape[1])
    elif status == "converged":
        answer, doubt = reference(asked, recipe)
    else:
        answer, doubt = np.full_like(values, np.nan), np.full(values.shape[1], np.inf)
    error = np.abs(values - answer).max(0)
    doubt = np.broadcast_to(doubt, error.shape)
    certain = np.where(np.isfinite(error) & np.isfinite(doubt), error - doubt, -np.inf)
    told = np.isfinite(estimate)
    j = int(np.argmax(np.where(told, certain, -np.inf) / (np.where(told, estimate, 1.0) + 1e-300)))
    scale = float(np.abs(values[:, j]).max())
    return Trial(spec, rtol, status, float(estimate[j]), float(error[j]), float(doubt[j]), scale, spent)


def _by_tolerance(asked: Question, rtol: float, seconds: float) -> tuple[Array, Array, kolmo.Discretization]:
    """Answer at the points (P, k), its estimate (k,) and the recipe: what ``solve(..., rtol=)`` does, in less time."""
    atol = ATOL * asked.unit
    recipe = kolmo.plan(asked.problem, at=asked.points, rtol=rtol, atol=atol, max_seconds=seconds)
    sol = kolmo.solve(asked.problem, discretization=recipe)
    values = np.asarray(sol(asked.points)).reshape(len(asked.points), -1)
    return values, np.sum([np.asarray(part) for part in recipe.estimate.values()], axis=0), recipe


def reference(asked: Question, recipe: kolmo.Discretization) -> tuple[Array, Array]:
    """Answer on finer nodes of a wider box by the scheme of order 4 and another stepper; and its uncertainty."""
    factors = {1: (2.5, 3.6), 2: (1.4, 1.9), 3: (1.15, 1.4)}[asked.problem.dim]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            coarse, fine = (_finer(asked, recipe, factor) for factor in factors)
        except (NotConvergedError, TimeoutError):
            nothing = np.full((len(asked.points), 1), np.nan)
            return nothing, np.array([np.inf])
    return fine, np.nan_to_num(np.abs(fine - coarse).max(0), nan=np.inf)


def _finer(asked: Question, recipe: kolmo.Discretization, factor: float) -> Array:
    problem = asked.problem
    layout = []
    low, high = list(recipe.grid.box[0]), list(recipe.grid.box[1])
    for i, (axis, pair) in enumerate(zip(recipe.grid.axes, problem.box.faces, strict=True)):
        width, more = high[i] - low[i], 0
        for side, face in enumerate(pair):
            if isinstance(face, Open):
                more += 1
                if side == 0:
                    low[i] -= 0.15 * width
                else:
                    high[i] += 0.15 * width
        grading = axis.grading.base if isinstance(axis.grading, Pieces) else axis.grading
        grading = replace(grading, lower=low[i], upper=high[i])
        layout.append((max(round(factor * axis.n * (1 + 0.15 * more)), 41), grading))
    box = problem.box.replace(low, high)
    grid = Grid.of(box, [n for n, _ in layout], [g for _, g in layout])
    if problem.stationary:
        sol = kolmo.solve(problem, grid=grid, scheme="central4")
    else:
        stepper, steps = _other_stepper(problem, grid, recipe, factor)
        end = time.perf_counter() + REFERENCE_SECONDS
        sol = kolmo.solve(
            problem,
            grid=grid,
            steps=steps,
            scheme="central4",
            stepper=stepper,
            callback=lambda *_: time.perf_counter() > end,
        )
        if sol.status == "interrupted":
            raise TimeoutError
    return np.asarray(sol(asked.points)).reshape(len(asked.points), -1)


def _other_stepper(
    problem: KolmogorovProblem, grid: Grid, recipe: kolmo.Discretization, factor: float
) -> tuple[str, int]:
    """A stepper that the recipe does not use, with enough steps."""
    if problem.dim == 1:
        return "radau3", max(100, round(4 * factor * recipe.steps))
    generator = Generator(problem, grid, SCHEMES["central4"])
    explicit = math.ceil((problem.horizon or 0.0) / STEPPERS["rk4"].largest_step(*generator.stiffness())) + 1
    if recipe.stepper == "rk4" or explicit > (2000 if not generator.autonomous else 20000):
        return ("mcs3" if recipe.stepper == "rk4" else "mcs"), max(60, round(2 * factor * min(recipe.steps, 60)))
    return "rk4", explicit


# --------------------------------------------------------------------------------------------------- as a script
def distribution(trials: Sequence[Trial]) -> Table:
    """Quantiles of estimate / true error over the problems where the true error is known well enough."""
    rows: list[tuple[Any, ...]] = []
    groups: dict[str, Callable[[Trial], bool]] = {
        "all": lambda r: True,
        "free": lambda r: r.spec.kind == "free",
        "free, smooth or growing": lambda r: r.spec.kind == "free" and r.spec.data in ("smooth", "growing"),
        "free, kinked or jumping": lambda r: r.spec.kind == "free" and r.spec.data in ("kinked", "jump"),
        "manufactured": lambda r: r.spec.kind == "manufactured",
        "closed forms": lambda r: r.spec.kind not in ("free", "manufactured", *MAKERS),
        "rough: breaks in space": lambda r: r.spec.kind.startswith(("jumping", "stationary")),
        "rough: slanted breaks": lambda r: r.spec.kind in SLANTED,
        "rough: narrow": lambda r: r.spec.kind.startswith("narrow"),
        "rough: windows in time": lambda r: r.spec.kind.endswith(("window", "pulse")) and "narrow" not in r.spec.kind,
        "rough: repelled, degenerate, one way": lambda r: r.spec.kind in ("repelled", "degenerate", "one_way"),
        "other units": lambda r: r.spec.units > 0,
        "changed coordinates": lambda r: r.spec.chart > 0,
    }
    for name, belongs in groups.items():
        mine = [r for r in trials if belongs(r)]
        ratios = [
            r.estimate / max(r.error, ROUNDING * r.scale, 1e-300)
            for r in mine
            if r.told and r.error > ROUNDING * r.scale
        ]
        quantiles = np.quantile(ratios, [0, 0.05, 0.5, 0.95]) if ratios else [math.nan] * 4
        converged = sum(r.status == "converged" for r in mine)
        if mine:
            rows.append((name, len(mine), converged, len(ratios), *(float(q) for q in quantiles)))
    columns = ("problems", "drawn", "converged", "judged", "least", "5 %", "median", "95 %")
    return Table("estimate / true error", columns, tuple(rows))


def main() -> int:
    """Draw, solve, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--first", type=int, default=0, help="seed of the first problem")
    parser.add_argument("--rtol", type=float, default=None)
    parser.add_argument("--rough", action="store_true", help="jumps, bends, windows, narrow features, faces, units")
    parser.add_argument("--verbose", action="store_true", help="print every problem")
    options = parser.parse_args()
    trials = []
    for seed in range(options.first, options.first + options.count):
        result = trial((draw_rough if options.rough else draw)(seed), options.rtol)
        trials.append(result)
        if options.verbose or result.dishonest or result.status.startswith("error"):
            mark = "DISHONEST " if result.dishonest else ""
            sys.stdout.write(f"{mark}{result}\n")
            sys.stdout.flush()
    sys.stdout.write(f"{distribution(trials)}\n")
    return int(any(r.dishonest or r.status.startswith("error") for r in trials))


if __name__ == "__main__":
    sys.exit(main())
