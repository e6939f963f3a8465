"""Breaks and pulses in time: what the functions of a problem do at points where the process goes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np

from kolmo.arrays import as_numpy
from kolmo.problem import KolmogorovProblem
from kolmo.problem.instants import depends_on_time
from kolmo.refine.breaks import CANDIDATES, MOST_BREAKS, SAME, apart, located, merged
from kolmo.refine.features import least_spacing
from kolmo.refine.samples import Datum, Room, candidates, offset

Series = Callable[[float], np.ndarray]
"""Time → values (m,)."""

# Instants at which what may depend on time is sampled, and so many times more where that does not look smooth.
INSTANTS, CLOSER = 256, 4
# An interval around a jump in time, of this part of the whole, is divided to the last digit.
BESIDE = 1e-9
# Part of the horizon below which a step counts as short: the first level takes eight.
FIRST_PULSE = 12.0


@dataclass(frozen=True)
class Pulse:
    """A stretch of time in which steps of a length are needed (first level)."""

    start: float
    end: float
    step: float


@dataclass(frozen=True)
class Course:
    """What happens in time: breakpoints that were not told, pulses, names of the functions that change between them."""

    breakpoints: tuple[float, ...] = ()
    pulses: tuple[Pulse, ...] = ()
    changing: frozenset[str] = frozenset()


def over_time(problem: KolmogorovProblem, room: Room, data: Sequence[Datum], rtol: float, crowded: list[str]) -> Course:
    """Times at which something jumps or bends, and stretches in which it changes fast."""
    timed = [d for d in data if d.timed and not (problem.sde.autonomous and d.name in ("drift", "covariance"))]
    calm = frozenset(d.name for d in timed if d.calm)
    series: list[tuple[str, Series]] = [
        (d.name, partial(_flat_values, d.values, room.probes)) for d in timed if not d.calm
    ]
    series += _face_series(problem, room.probes)
    if not series:
        return Course(changing=calm)
    assert problem.horizon is not None
    ends = [0.0, *problem.sde.breakpoints, problem.horizon]
    count = max(INSTANTS // (len(ends) - 1), 16)
    breaks: list[float] = []
    pulses: list[Pulse] = []
    changing = set(calm)
    for a, b in pairwise(ends):
        wanted = np.full(CLOSER * count, np.inf)
        for name, f in series:
            seen = _Seen.of(f, a, b, count, rtol)
            found = seen.breaks
            if len(found) > MOST_BREAKS:
                crowded.append(name)
                found = []
            breaks += found
            if seen.changes(found):
                changing.add(name)
            wanted = np.minimum(wanted, np.repeat(seen.wanted(found, rtol), len(wanted) // len(seen.s)))
        pulses += _pulses(a, b, wanted, problem.horizon)
    together = merged([t / problem.horizon for t in breaks])
    exact = sorted(set(breaks))
    breakpoints = tuple(float(next(t for t in exact if abs(t / problem.horizon - q) <= SAME)) for q in together)
    return Course(breakpoints, tuple(pulses), frozenset(changing))


@dataclass(frozen=True)
class _Seen:
    """A function of time at parts s of an interval [a, b]: values (len(s), m), and where it jumps or bends."""

    a: float
    b: float
    s: np.ndarray
    values: np.ndarray
    breaks: list[float]

    @classmethod
    def of(cls, f: Series, a: float, b: float, count: int, rtol: float) -> "_Seen":
        """Sampled at ``count`` instants, and more closely where they do not look smooth."""
        seen = cls(a, b, offset(count), _at(f, a, b, offset(count)), [])
        if not np.ptp(seen.values, axis=0).any():
            return seen
        if not candidates(_lines(seen.values))[0].any() and not np.isfinite(seen.wanted([], rtol)).any():
            return seen
        s = offset(CLOSER * count)
        values = _at(f, a, b, s)
        return cls(a, b, s, values, _breaks(f, a, b, s, values))

    def changes(self, breaks: Sequence[float]) -> bool:
        """Whether it changes between breaks."""
        piece = np.searchsorted(np.asarray(breaks), self.a + self.s * (self.b - self.a), side="right")
        return any(np.ptp(self.values[piece == k], axis=0).any() for k in np.unique(piece))

    def wanted(self, breaks: Sequence[float], rtol: float) -> np.ndarray:
        """Length of the steps that it needs at each sample."""
        n, size = len(self.s), float(np.abs(self.values).mean(0).max())
        if size == 0.0:
            return np.full(n, np.inf)
        within = [(t - self.a) / (self.b - self.a) for t in breaks]

        def effect(which: slice, sixth: np.ndarray, stride: int) -> np.ndarray:
            return np.asarray(sixth / size * stride / n)

        none = np.zeros((n, 1), dtype=bool)
        return (
            least_spacing(_lines(self.values), self.s, within, none, np.ones(1), effect, rtol) / n * (self.b - self.a)
        )


def _at(f: Series, a: float, b: float, s: np.ndarray) -> np.ndarray:
    """Values of a function of time at parts of an interval, shape (len(s), m)."""
    seen = np.stack([f(float(a + q * (b - a))) for q in s])
    return np.where(np.isfinite(seen), seen, 0.0)


def _lines(values: np.ndarray) -> np.ndarray:
    """Values (n, m) of m functions of time as one line of samples each, (m, n, 1)."""
    return np.ascontiguousarray(values.T)[..., None]


def _flat_values(f: Callable[[float, np.ndarray], Any], x: np.ndarray, t: float) -> np.ndarray:
    """A function of (t, x) at fixed points, as one vector."""
    return np.array(as_numpy(f(t, x)), dtype=float).reshape(-1)


def _face_series(problem: KolmogorovProblem, probes: np.ndarray) -> list[tuple[str, Series]]:
    """Data of faces as functions of time."""
    series: list[tuple[str, Series]] = []
    if problem.stationary:
        return []
    for axis, side, face in problem.box.each():
        wall = problem.box.onto(axis, side, probes)
        for value in (getattr(face, name) for name in reversed(face.data)):
            on_face = partial(problem.on_face, value)
            if depends_on_time(value, on_face, wall):
                series.append(("boundary value", partial(_flat_values, on_face, wall)))
    return series


def _breaks(f: Series, a: float, b: float, s: np.ndarray, seen: np.ndarray) -> list[float]:
    """Times in [a, b] at which a function of time jumps or bends."""
    candidate, strength = candidates(_lines(seen))
    chosen = apart(np.flatnonzero(candidate[:, 0]), strength[:, 0])

    def values(q: np.ndarray) -> np.ndarray:
        return _at(f, a, b, q.reshape(-1)).reshape(*q.shape, -1)

    found = []
    for i in chosen[:CANDIDATES]:
        ends = float(s[max(i - 2, 0)]), float(s[min(i + 2, len(s) - 1)])
        found += [_first_after(f, a + float(q[0]) * (b - a), b - a) for q in located(values, *ends, 1)]
    return sorted(t for t in found if a < t < b)


def _first_after(f: Callable[[float], np.ndarray], t: float, length: float) -> float:
    """The first instant at which what jumps near t has its later value (of a kink: t)."""
    low, high = t - BESIDE * length, t + BESIDE * length
    before, after = (np.nan_to_num(np.array(f(end), dtype=float)) for end in (low, high))
    middle = 0.5 * (low + high)
    while low < middle < high:
        now = np.nan_to_num(np.array(f(middle), dtype=float))
        if np.abs(now - before).max() < np.abs(now - after).max():
            low = middle
        else:
            high = middle
        middle = 0.5 * (low + high)
    jump, change = np.abs(after - before).max(), np.abs(np.nan_to_num(np.array(f(high))) - after).max()
    return high if jump > 2.0 * change else t


def _pulses(a: float, b: float, wanted: np.ndarray, horizon: float) -> list[Pulse]:
    """Stretches of an interval in which steps have to be short."""
    fine = wanted < horizon / FIRST_PULSE
    edges = np.flatnonzero(np.diff(np.concatenate([[0], fine.astype(int), [0]])))
    s, cell = offset(len(wanted)), (b - a) / len(wanted)
    found = []
    for first, last in zip(edges[::2], edges[1::2] - 1, strict=True):
        start, end = a + s[first] * (b - a) - cell, a + s[last] * (b - a) + cell
        found.append(Pulse(max(start, a), min(end, b), float(wanted[first : last + 1].min())))
    return found
