"""Samples of the functions of a problem, off any grid, where the process goes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import pairwise
from typing import Any

import numpy as np

from kolmo.arrays import as_numpy, is_module
from kolmo.grid.grading import Grading
from kolmo.kernels import differences
from kolmo.problem import KolmogorovProblem
from kolmo.problem.instants import depends_on_time, reads_time
from kolmo.refine.bounds import Proof, proof

Values = Callable[[np.ndarray], np.ndarray]
"""Positions (...) on [0, 1] → values (..., m) of m functions of one variable."""

# Samples along an axis by dimension. In the core an axis of the first grid has some 16 spreads of the process, so that
# they lie 1/1000, 1/60 and 1/8 of a spread apart; a bump is seen over 7 times its standard deviation.
SAMPLES = {1: 16384, 2: 512, 3: 64}
# The same for a function that is known to be smooth: for its size alone.
FEW_SAMPLES = {1: 512, 2: 48, 3: 16}
# Rates, of the sixth derivative and lower ones, up to which a function is smooth: in space, for each spread of the
# process, it is then resolved by the first grid about as well as what has no features (a tenth of a spread, as in
# ``features``); in time, for the horizon, by the first steps.
SMOOTH, CALM = 4.0, 2.0
# Samples lie by this part of a cell off its beginning: the square of the golden ratio's inverse, hardly met by nodes.
OFF = 0.3819660112501051
# Points at which functions of time are followed, and spreads from the middle up to which half of them lie: what is on
# for a while may be on nowhere nearer.
POINTS, FAR = 256, 4.0
# A second difference is a candidate for a break where it is so many times those two and three samples away: that of a
# jump or kink ends at once, on either side, that of a smooth slope goes on.
STANDS_OUT = 8.0
# Second differences below this part of the largest value are rounding, and that of functions in single precision: of
# networks, whose sums cancel, up to 2e-5 was seen.
ROUNDING, SINGLE = 1e-6, 1e-4


@dataclass(frozen=True)
class Room:
    """Where the process goes, along each axis: hull of its middle, spread around it (one standard deviation).

    Attributes
    ----------
    gradings : tuple of Grading
        Maps of the axes, coarse where the process hardly goes.
    nodes : int
        Nodes of the first grid along an axis.
    low, high, spread : ndarray, shape (d,)
        Hull and spread.
    time : float
        Horizon, or the time in which noise crosses the box.
    """

    gradings: tuple[Grading, ...]
    nodes: int
    low: np.ndarray
    high: np.ndarray
    spread: np.ndarray
    time: float

    def density(self, axis: int, x: np.ndarray) -> np.ndarray:
        """How likely the process comes to x, about."""
        away = np.maximum(np.maximum(self.low[axis] - x, x - self.high[axis]), 0.0) / self.spread[axis]
        return np.asarray(np.exp(-0.5 * away**2))

    @cached_property
    def probes(self) -> np.ndarray:
        """Points where the process goes, shape (POINTS, d): half of them within a spread of its middle."""
        d = len(self.gradings)
        # Roberts (2018): powers of the root of g^(d+1) = g + 1
        g = float(np.real(np.roots([1.0, *[0.0] * (d - 1), -1.0, -1.0])).max())
        unit = (0.5 + np.outer(np.arange(1, POINTS + 1), g ** -np.arange(1.0, d + 1))) % 1.0
        spreads = np.where(np.arange(POINTS) % 2 == 0, 1.0, FAR)[:, None] * self.spread
        low, high = self.low - spreads, self.high + spreads
        ends = np.array([[grading.lower, grading.upper] for grading in self.gradings])
        return np.asarray(np.clip(low + (high - low) * unit, ends[:, 0], ends[:, 1]))


@dataclass(frozen=True)
class Datum:
    """One function of the problem.

    Attributes
    ----------
    name : str
        As in the problem.
    values : callable
        (t, x) → (points, m).
    weight : float
        Its effect on the answer for each unit of value.
    timed : bool
        Whether it may depend on time.
    adds : bool
        Whether it is added to the answer (φ, g), whose size is not known, or acts on it.
    proof : Proof or None
        What is known of it without sampling.
    """

    name: str
    values: Callable[[float, np.ndarray], np.ndarray]
    weight: float
    timed: bool
    adds: bool = False
    proof: Proof | None = None

    @property
    def smooth(self) -> bool:
        """Whether it is known to have no breaks, and nothing narrow, in space."""
        return self.proof is not None and self.proof.in_space <= SMOOTH

    @property
    def calm(self) -> bool:
        """Whether it is known to have none in time."""
        return self.proof is not None and self.proof.in_time <= CALM


def functions(problem: KolmogorovProblem, room: Room) -> list[Datum]:
    """The functions that are no constants, with what a unit of each does to the answer."""
    sde = problem.sde
    length = float(room.spread.min())
    upper = np.triu_indices(problem.dim)

    def covariance(t: float, x: np.ndarray) -> Any:
        return as_numpy(sde.covariance(t, x))[:, *upper]

    data: list[tuple[Any, str, Callable[[float, np.ndarray], Any], float, bool]] = [
        (sde.given["drift"], "drift", sde.drift, room.time / length, False),
        (sde.given["covariance"], "covariance", covariance, room.time / length**2, False),
        (problem.killing, "killing", problem.rate, room.time, False),
        (problem.source, "source", problem.running, room.time, True),
    ]
    for part, name, weight in ((0, "rate of a jump", room.time), (1, "displacement of a jump", room.time / length)):
        given = [kind[part] for kind in sde.kinds if callable(kind[part])]
        if given:
            timed = next((f for f in given if reads_time(f)), given[0])
            data.append((timed, name, partial(_jumps, sde, part), weight, False))
    for event in (event for event in problem.events if event.pays):
        paid = partial(_payment, problem, event)
        data.append((paid, "payment", paid, 1.0, True))
    if problem.terminal is not None:
        data.append((problem.terminal, "terminal", lambda t, x: problem.final(x), 1.0, True))
    return [_datum(problem, room, *datum) for datum in data if callable(datum[0])]


def _datum(
    problem: KolmogorovProblem,
    room: Room,
    given: Any,
    name: str,
    f: Callable[[float, np.ndarray], Any],
    weight: float,
    adds: bool,
) -> Datum:
    """One function, as it was given and as (t, x) → values, with what it proves of itself."""
    known = None if "jump" in name or name == "payment" else _known(problem, room, given, name)
    timed = name not in ("terminal", "payment") and not problem.stationary
    if timed:
        timed = known.in_time > 0.0 if known is not None else depends_on_time(given, f, room.probes)
    return Datum(name, rows(f), weight, timed, adds, known)


def _known(problem: KolmogorovProblem, room: Room, given: Any, name: str) -> Proof | None:
    """What a function proves of itself, where it works on NumPy's arrays."""
    if is_module(given) or problem.arrays == "torch":
        return None
    f = (lambda t, x: given(x)) if name == "terminal" else given
    low, high = (np.array([getattr(g, end) for g in room.gradings]) for end in ("lower", "upper"))
    known = proof(f, low, high, room.spread, problem.horizon)
    if known is not None and name == "covariance" and problem.sde.rooted:
        return replace(known, in_time=2.0 * known.in_time, in_space=2.0 * known.in_space)  # of a product
    return known


def _payment(problem: KolmogorovProblem, event: Any, t: float, x: np.ndarray) -> Any:
    """What an event pays."""
    return problem.happens(event, x)[1]


def _jumps(sde: Any, part: int, t: float, x: np.ndarray) -> Any:
    """Rates (0) or displacements (1) of all kinds of jumps."""
    return sde.jumps(t, x)[part]


def rows(f: Callable[[float, np.ndarray], Any]) -> Callable[[float, np.ndarray], np.ndarray]:
    """A function of (t, x) whose values at points are (points, m), copied, zero where they are not finite."""

    def values(t: float, x: np.ndarray) -> np.ndarray:
        result = np.array(as_numpy(f(t, x)), dtype=float).reshape(len(x), -1)
        finite = np.isfinite(result)
        return result if finite.all() else np.where(finite, result, 0.0)

    return values


def offset(count: int) -> np.ndarray:
    """Places on [0, 1] an irrational part of a cell off the nodes of any grid."""
    return (np.arange(count) + OFF) / count


class Field:
    """Samples of one function on a lattice over the room, off any grid; columns of several instants side by side."""

    def __init__(self, datum: Datum, room: Room, times: Sequence[float], denser: int = 1) -> None:
        self.datum, self.room, self.times = datum, room, times
        d = len(room.gradings)
        n = FEW_SAMPLES[d] if datum.smooth else denser * SAMPLES[d]
        self.s = offset(n)
        self.x = [np.asarray(g(self.s)) for g in room.gradings]
        self._lines: dict[int, np.ndarray] = {}
        self._candidates: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        mesh = np.stack(np.meshgrid(*self.x, indexing="ij"), -1).reshape(-1, d)
        looks = [datum.values(t, mesh) for t in times]
        samples = looks[0] if len(looks) == 1 else np.concatenate(looks, 1)
        self.same = [np.array_equal(one, other) for one, other in pairwise(looks)]
        self.low, self.high = ends(samples)
        varies = self.high > self.low
        self.flat = not varies.any()
        kept = samples if varies.all() else samples[:, varies] if varies.any() else samples[:, :1]
        self.samples = kept.reshape(*[n] * d, -1)

    def lines(self, axis: int) -> np.ndarray:
        """Samples of each function with the axis first, shape (m, n, lines)."""
        if axis not in self._lines:
            moved = np.moveaxis(self.samples, (-1, axis), (0, 1))
            self._lines[axis] = np.ascontiguousarray(moved.reshape(*moved.shape[:2], -1))
        return self._lines[axis]

    def candidates(self, axis: int) -> tuple[np.ndarray, np.ndarray]:
        """Where second differences along an axis stand out, and how large they are, shape (n, lines)."""
        if axis not in self._candidates:
            self._candidates[axis] = candidates(self.lines(axis))
        return self._candidates[axis]

    def on_lines(self, axis: int, which: np.ndarray) -> Values:
        """The function along some lines of the lattice, as a function of ξ (lines, p) → (lines, p, m)."""
        d = len(self.room.gradings)
        rest = [self.x[j] for j in range(d) if j != axis]
        places = np.unravel_index(which, [len(x) for x in rest]) if rest else ()
        others = [x[p] for x, p in zip(rest, places, strict=True)]

        def values(s: np.ndarray) -> np.ndarray:
            x = np.asarray(self.room.gradings[axis](s))
            parts = [np.broadcast_to(o[:, None], x.shape) for o in others]
            points = np.stack([*parts[:axis], x, *parts[axis:]], -1).reshape(-1, d)
            result = np.concatenate([self.datum.values(t, points) for t in self.times], 1)
            return result.reshape(*s.shape, -1)

        return values


def candidates(lines: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where second differences of samples (m, n, lines) stand out, and how large they are, shape (n, lines)."""
    scale = np.maximum(lines.max((1, 2)), -lines.min((1, 2))) + 1e-300
    size, found = np.zeros(lines.shape[1:]), np.zeros(lines.shape[1:], dtype=bool)
    differences.second(lines, scale, size)
    differences.stand_out(size, STANDS_OUT, SINGLE if _single(lines) else ROUNDING, found)
    return found, size


def ends(samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Least and largest sample of each function, samples (count, m)."""
    low, high = np.empty(samples.shape[1]), np.empty(samples.shape[1])
    differences.ends(samples, low, high)
    return low, high


def _single(values: np.ndarray) -> bool:
    """Whether values are those of single precision."""
    some = values.reshape(-1)[:64]
    return np.array_equal(some, some.astype(np.float32)) and np.array_equal(values, values.astype(np.float32))
