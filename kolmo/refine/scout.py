r"""Look at the data before solving: breaks and narrow features in space, breaks and pulses in time.

A grid does not see what it was not made for, and levels that do not see a thing agree. So every function of the problem
is sampled first, off any grid, where the process goes, and the samples are judged by differences:

- a **break** (jump or kink) is a second difference that stands out among its neighbours and, looked at more and more
  closely, shrinks like a jump (not at all) or a kink (like the spacing), not like a smooth function (its square);
- the **spacing** that a place needs is the largest at which the sixth difference, the error of the scheme, still weighs
  something in the answer: its size times the part of the process' room that it takes up, relative to the data's mean.
  Where that is much less than elsewhere, there is a **feature**.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np

from kolmo.arrays import as_numpy
from kolmo.box import Absorbing, Robin
from kolmo.grading import Grading
from kolmo.instants import fractions, reads_time
from kolmo.problem import KolmogorovProblem

Values = Callable[[np.ndarray], np.ndarray]
"""Positions (...) on [0, 1] → values (..., m) of m functions of one variable."""
Series = Callable[[float], np.ndarray]
"""Time → values (m,)."""

# Samples along an axis by dimension. In the core an axis of the first grid has some 16 spreads of the process, so that
# they lie 1/1000, 1/60 and 1/8 of a spread apart; a bump is seen over 7 times its standard deviation.
SAMPLES = {1: 16384, 2: 512, 3: 64}
# So many times more along an axis where terminal data, source and face values were zero at all of them.
DENSER = {1: 32, 2: 4, 3: 2}
# Instants at which what may depend on time is sampled, so many times more where it does, and points at which it is.
INSTANTS, CLOSER, POINTS = 256, 4, 24
# Samples lie by this part of a cell off its beginning: the square of the golden ratio's inverse, hardly met by nodes.
OFF = 0.3819660112501051
# Instants at which space is sampled where something depends on time.
LOOKS = 5
# A second difference is a candidate for a break where it is so many times those two and three samples away: that of a
# jump or kink ends at once, on either side, that of a smooth slope goes on.
STANDS_OUT = 8.0
# Second differences below this part of the largest value are rounding, and that of functions in single precision: of
# networks, whose sums cancel, up to 2e-5 was seen.
ROUNDING, SINGLE = 1e-6, 1e-4
# Candidates looked at more closely (the strongest), and breaks that a function may have to be treated one by one.
CANDIDATES, MOST_BREAKS = 48, 16
# Each closer look divides the interval by eight: a jump keeps its second difference, a kink an eighth of it, a smooth
# function a 64th. The thresholds are the geometric means.
PARTS, JUMP, KINK = 16, 0.35, 0.045
LOOKS_AT_A_KINK, LOOKS_AT_A_JUMP = 4, 15
# Halvings that find a zero to rounding.
BISECTIONS = 52
# Beside a break others are looked for from this part of the interval on.
BESIDE_BREAK = 1e-3
# Breaks of several functions this close, as a part of the axis, are one.
SAME = 1e-9
# An interval around a jump in time, of this part of the whole, is divided to the last digit.
BESIDE = 1e-9
# The sixth difference, of the largest factor 1, and the part of the tolerance from which on it weighs something.
SIXTH = tuple(b / 64.0 for b in (1.0, -6.0, 15.0, -20.0, 15.0, -6.0, 1.0))
# What weighs something is followed to spacings at which it has this part of its largest effect left: the first level
# has to see it, the next ones are there to resolve it.
WEIGHS, SEEN = 0.1, 0.03
# Tolerance below which sixth differences are those of rounding.
LEAST_RTOL = 1e-9
# A feature is narrower than this part of the axis: a tenth of a spread, about.
NARROW = 128
# A place is a feature where it needs so many times the nodes that are there; spacings grow by this part of the distance
# from a feature. An axis that is rough all along is left to finer levels but for a factor.
FINER, GROWS, MOST_FEATURES, LEAST_USUAL = 1.6, 0.3, 24, 1e-3
# Lines with a break at one place, of all lines, from which on the break is taken to run along the other axes, and lines
# on which it is located.
ALONG, LOCATED = 0.08, 8


@dataclass(frozen=True)
class Feature:
    """Where an axis needs nodes: around the centre, within the half-width, at this spacing (first grid)."""

    centre: float
    width: float
    spacing: float


@dataclass(frozen=True)
class Pulse:
    """A stretch of time in which steps of a length are needed (first level)."""

    start: float
    end: float
    step: float


@dataclass(frozen=True)
class AxisSight:
    """What was seen along an axis.

    Attributes
    ----------
    breaks : tuple of float
        Places where coefficients jump or bend, along all of the other axes.
    marks : tuple of float
        Places where φ does.
    features : tuple of Feature
        Places that need a finer grid.
    """

    breaks: tuple[float, ...] = ()
    marks: tuple[float, ...] = ()
    features: tuple[Feature, ...] = ()


@dataclass(frozen=True)
class Sight:
    """What the data are like.

    Attributes
    ----------
    axes : tuple of AxisSight
        Per axis.
    breakpoints : tuple of float
        Times at which something jumps or bends, which were not told.
    pulses : tuple of Pulse
        Stretches of time that need short steps.
    slanted : tuple of str
        Functions that break across lines which are not parallel to the axes.
    crowded : tuple of str
        Functions with more breaks than are treated one by one.
    silent : bool
        Whether terminal data, source and face values are zero wherever they were seen.
    size : float
        Mean size of the terminal data and the source where the process goes.
    bounds : tuple of ndarray, or None
        Least and largest value per column that the answer can have, where the equation bounds it (g = 0, c ≥ 0).
    exploded : float
        Part of the paths that run away to infinity before the horizon.
    """

    axes: tuple[AxisSight, ...]
    breakpoints: tuple[float, ...] = ()
    pulses: tuple[Pulse, ...] = ()
    slanted: tuple[str, ...] = ()
    crowded: tuple[str, ...] = ()
    silent: bool = False
    size: float = 0.0
    bounds: tuple[np.ndarray, np.ndarray] | None = None
    exploded: float = 0.0

    @property
    def unresolved(self) -> tuple[str, ...]:
        """Coefficients and sources that break between the nodes of any grid."""
        names = dict.fromkeys((*self.slanted, *self.crowded))
        return tuple(name for name in names if name in ("drift", "covariance", "killing", "source"))


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


@dataclass(frozen=True)
class _Datum:
    """One function of the problem.

    ``weight``: its effect on the answer for each unit of value; ``values``: (t, x) → (points, m).
    """

    name: str
    values: Callable[[float, np.ndarray], np.ndarray]
    weight: float
    timed: bool
    adds: bool = field(default=False)
    """Whether it is added to the answer (φ, g), whose size is not known, or acts on it."""


def scout(problem: KolmogorovProblem, room: Room, rtol: float, atol: float = 0.0) -> Sight:
    """Sample the functions of a problem where the process goes; see the module."""
    data = _data(problem, room)
    times = _look_times(problem, data)
    for denser in (1, DENSER[problem.dim]):  # where there is nothing, look again
        fields = [_Field(d, room, times if d.timed else times[:1], denser) for d in data]
        size = _size(problem, fields, room)
        silent = size == 0.0 and not _faces_speak(problem)
        if not silent:
            break
    rtol = max(rtol + (atol / size if size > 0.0 else 0.0), LEAST_RTOL)
    slanted: set[str] = set()
    crowded: list[str] = []
    breakpoints, pulses = _over_time(problem, room, data, rtol, crowded)
    axes = [_along(problem, axis, room, fields, size, rtol, slanted, crowded) for axis in range(problem.dim)]
    return Sight(
        tuple(axes),
        breakpoints,
        pulses,
        tuple(sorted(slanted)),
        tuple(dict.fromkeys(crowded)),
        silent,
        size,
        _bounds(problem, room, fields),
    )


def _data(problem: KolmogorovProblem, room: Room) -> list[_Datum]:
    """The functions that are no constants, with what a unit of each does to the answer."""
    sde = problem.sde
    length = float(room.spread.min())

    def flat(f: Callable[[float, np.ndarray], Any]) -> Callable[[float, np.ndarray], np.ndarray]:
        return lambda t, x: _rows(f(t, x), x)

    given = sde.given
    data = [
        (given["drift"], "drift", sde.drift, room.time / length, False),
        (given["covariance"], "covariance", sde.covariance, room.time / length**2, False),
        (problem.killing, "killing", problem.rate, room.time, False),
        (problem.source, "source", problem.running, room.time, True),
    ]
    found = [
        _Datum(name, flat(f), weight, not problem.stationary and reads_time(value), adds)
        for value, name, f, weight, adds in data
        if callable(value)
    ]
    if problem.terminal is not None:
        found.append(_Datum("terminal", flat(lambda t, x: problem.final(x)), 1.0, False, True))
    return found


def _look_times(problem: KolmogorovProblem, data: Sequence[_Datum]) -> list[float]:
    """Instants at which space is looked at."""
    T = problem.horizon or 0.0
    if problem.stationary or not any(d.timed for d in data):
        return [0.5 * T]
    return [float(f * T) for f in fractions(LOOKS, seed=1)[::-1]]


class _Field:
    """Samples of one function on a lattice over the room, off any grid; columns of several instants side by side."""

    def __init__(self, datum: _Datum, room: Room, times: Sequence[float], denser: int = 1) -> None:
        self.datum, self.room, self.times = datum, room, times
        self._candidates: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        d = len(room.gradings)
        n = denser * SAMPLES[d]
        self.s = _offset(n)
        self.x = [np.asarray(g(self.s)) for g in room.gradings]
        mesh = np.stack(np.meshgrid(*self.x, indexing="ij"), -1).reshape(-1, d)
        self.samples = np.concatenate([datum.values(t, mesh) for t in times], 1).reshape(*[n] * d, -1)
        self.samples = np.where(np.isfinite(self.samples), self.samples, 0.0)
        flat = self.samples.reshape(-1, self.samples.shape[-1])
        self.low, self.high = flat.min(0), flat.max(0)
        varies = self.high > self.low
        self.flat = not varies.any()
        self.samples = self.samples[..., varies] if varies.any() else self.samples[..., :1]

    def lines(self, axis: int) -> np.ndarray:
        """Samples with the axis first, shape (n, lines, m)."""
        moved = np.moveaxis(self.samples, axis, 0)
        return moved.reshape(moved.shape[0], -1, moved.shape[-1])

    def candidates(self, axis: int) -> tuple[np.ndarray, np.ndarray]:
        """Where second differences along an axis stand out, and how large they are, shape (n, lines)."""
        if axis not in self._candidates:
            self._candidates[axis] = _candidates(self.lines(axis))
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
            return np.where(np.isfinite(result), result, 0.0).reshape(*s.shape, -1)

        return values


def _size(problem: KolmogorovProblem, fields: Sequence["_Field"], room: Room) -> float:
    """Mean size of what the data add to the answer; 0 where they are zero."""
    steady = 0.0 if callable(problem.source) or problem.source is None else problem.source
    total = room.time * float(np.max(np.abs(as_numpy(steady))))
    for f in fields:
        if f.datum.adds:
            weights = _lattice_density(f, room)
            total += f.datum.weight * float(
                (np.abs(f.samples) * weights[..., None]).sum(axis=tuple(range(weights.ndim))).max() / weights.sum()
            )
    return total


def _lattice_density(f: "_Field", room: Room) -> np.ndarray:
    """Likelihood of the samples' places, times the volume that each stands for."""
    result = np.ones(())
    for axis, (x, grading) in enumerate(zip(f.x, room.gradings, strict=True)):
        result = np.multiply.outer(result, room.density(axis, x) * np.asarray(grading.slope(f.s)))
    return result


def _bounds(problem: KolmogorovProblem, room: Room, fields: Sequence["_Field"]) -> tuple[np.ndarray, np.ndarray] | None:
    """Least and largest value that the maximum principle allows, as far as the data were seen."""
    seen = {f.datum.name: f for f in fields}
    faces = [(i, side, face) for i, pair in enumerate(problem.box.faces) for side, face in enumerate(pair)]
    if problem.source is not None or any(isinstance(face, Robin) for _, _, face in faces):
        return None
    killing = problem.killing
    least = float(seen["killing"].low.min()) if "killing" in seen else float(np.min(as_numpy(killing or 0.0)))
    if least < 0.0:
        return None
    ends = [(seen["terminal"].low, seen["terminal"].high)] if "terminal" in seen else []
    for axis, side, face in faces:
        if isinstance(face, Absorbing):
            wall = _probes(room)
            wall[:, axis] = (problem.box.lower, problem.box.upper)[side][axis]
            times = [0.0] if problem.stationary else [f * (problem.horizon or 0.0) for f in fractions(LOOKS, seed=3)]
            values = np.stack([as_numpy(problem.on_face(face.value, t, wall)) for t in times])
            values = values.reshape(-1, *values.shape[2:])
            ends.append((values.min(0), values.max(0)))
    if killing is not None:
        ends.append((np.zeros(()), np.zeros(())))
    if not ends:
        return None
    low, high = (np.broadcast_arrays(*[np.atleast_1d(end[side]) for end in ends]) for side in (0, 1))
    return np.min(low, axis=0), np.max(high, axis=0)


def _faces_speak(problem: KolmogorovProblem) -> bool:
    """Whether some face has data."""
    faces = [face for pair in problem.box.faces for face in pair if isinstance(face, (Absorbing, Robin))]
    return any(callable(face.value) or bool(np.any(as_numpy(face.value) != 0)) for face in faces)


def _along(
    problem: KolmogorovProblem,
    axis: int,
    room: Room,
    fields: Sequence["_Field"],
    size: float,
    rtol: float,
    slanted: set[str],
    crowded: list[str],
) -> AxisSight:
    """Breaks and features of one axis."""
    breaks: dict[str, list[float]] = {}
    wanted = np.full(len(fields[0].s) if fields else 1, np.inf)
    for f in fields:
        places = _breaks_along(f, axis, slanted, crowded)
        if places and problem.box.periodic[axis] and f.datum.name != "terminal":
            # the seam of a circle is no end at which the map of the axis might have a kink
            crowded.append(f.datum.name)
        breaks[f.datum.name] = places
        wanted = np.minimum(wanted, _spacing(f, axis, room, places, size, rtol))
    grading = room.gradings[axis]
    told = _told(problem, axis, room, slanted)
    if problem.box.periodic[axis]:
        breaks = {name: found for name, found in breaks.items() if name == "terminal"}
        told = []
    coefficients = _merged([*told, *(s for name, found in breaks.items() if name != "terminal" for s in found)])
    marks = _merged(breaks.get("terminal", []))
    marks = [next((b for b in coefficients if abs(b - m) < SAME), m) for m in marks]
    features = _features(fields[0].x[axis] if fields else np.zeros(0), wanted, grading, room.nodes)
    at_breaks, at_marks = (tuple(float(grading(np.float64(s))) for s in found) for found in (coefficients, marks))
    return AxisSight(at_breaks, at_marks, features)


def _told(problem: KolmogorovProblem, axis: int, room: Room, slanted: set[str]) -> list[float]:
    """ξ of the breaks that the user told, along an axis; functions that may break where they run otherwise."""
    grading = room.gradings[axis]
    found = [float(grading.inverse(np.float64(b))) for b in problem.breaks if not callable(b)]
    for function in (b for b in problem.breaks if callable(b)):
        datum = _Datum("breaks", lambda t, x, f=function: _rows(f(x), x), 0.0, False)  # type: ignore[misc]
        field_ = _Field(datum, room, [0.0])
        lines = field_.lines(axis)[..., 0]
        change = (lines[:-1] * lines[1:] <= 0.0) & (lines[:-1] != lines[1:])
        which = np.flatnonzero(change.any(0))
        if not len(which):
            continue
        some = which[:: max(1, len(which) // LOCATED)][:LOCATED]
        first = change[:, some].argmax(0)
        places = _zero(field_.on_lines(axis, some), field_.s[first], field_.s[first + 1])
        if len(which) == lines.shape[1] and np.ptp(places) < SAME:
            found.append(float(np.median(places)))
        else:
            given = {"killing": problem.killing, "source": problem.source, **problem.sde.given}
            slanted.update(name for name, value in given.items() if callable(value))
    return [s for s in found if 0.0 < s < 1.0]


def _rows(values: Any, x: np.ndarray) -> np.ndarray:
    """Values of a function at points as (points, m)."""
    return np.array(as_numpy(values), dtype=float).reshape(len(x), -1)


def _zero(values: Values, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """A zero in each of some intervals, by bisection."""
    start = values(a[:, None])[:, 0, 0]
    for _ in range(BISECTIONS):
        middle = 0.5 * (a + b)
        same = values(middle[:, None])[:, 0, 0] * start > 0.0
        a, b = np.where(same, middle, a), np.where(same, b, middle)
    return np.asarray(0.5 * (a + b))


def _merged(found: Sequence[float]) -> list[float]:
    """Increasing places, those that agree taken once."""
    result: list[float] = []
    for s in sorted(found):
        if not result or s - result[-1] > SAME:
            result.append(s)
    return result


def _breaks_along(f: "_Field", axis: int, slanted: set[str], crowded: list[str]) -> list[float]:
    """ξ of the breaks of a function along an axis that run along the others."""
    if f.flat:
        return []
    candidate, strength = f.candidates(axis)
    count = candidate.sum(1)  # lines with a candidate at a place
    if not count.any():
        return []
    n, total = candidate.shape
    near = count + np.roll(count, 1) + np.roll(count, -1)
    places = np.flatnonzero(count)
    if total > 1:
        places = np.flatnonzero((near >= max(2.0, ALONG * total)) & (count > 0))
        if not len(places):
            if _some_real(f, axis, candidate, strength):
                slanted.add(f.datum.name)
            return []
    # one candidate of each cluster, the strongest first
    order = places[np.argsort(-strength[places].max(1))]
    chosen: list[int] = []
    for i in order:
        if all(abs(i - j) > 2 for j in chosen):
            chosen.append(int(i))
    found: list[float] = []
    for i in chosen[:CANDIDATES]:
        window = slice(max(i - 2, 0), i + 3)
        which = np.flatnonzero(candidate[window].any(0))
        some = which[:: max(1, len(which) // LOCATED)][:LOCATED]
        ends = float(f.s[max(i - 2, 0)]), float(f.s[min(i + 2, n - 1)])
        for real in _located(f.on_lines(axis, some), *ends, len(some)):
            if (total == 1 or len(real) >= 2) and np.ptp(real) < SAME:
                found.append(float(np.median(real)))
            else:
                slanted.add(f.datum.name)
    if len(found) > MOST_BREAKS:
        crowded.append(f.datum.name)
        return []
    return found


def _some_real(f: "_Field", axis: int, candidate: np.ndarray, strength: np.ndarray) -> bool:
    """Whether some of the strongest candidates, looked at more closely, are breaks: waves have candidates too."""
    where = np.argwhere(candidate)
    strongest = where[np.argsort(-strength[candidate], kind="stable")][:LOCATED]
    ends = np.clip(strongest[:, 0, None] + np.array([-2, 2]), 0, len(candidate) - 1)
    return any(
        np.isfinite(_locate(f.on_lines(axis, np.array([line])), f.s[low], f.s[high], 1)).any()
        for line, (low, high) in zip(strongest[:, 1], ends, strict=True)
    )


def _candidates(lines: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where second differences stand out, and how large they are, shape (n, lines)."""
    n = len(lines)
    scale = np.abs(lines).max(axis=(0, 1)) + 1e-300
    second = np.zeros(lines.shape[:2])
    second[1:-1] = (np.abs(np.diff(lines, 2, axis=0)) / scale).max(-1)
    below, above = np.zeros_like(second), np.zeros_like(second)
    below[3:] = np.minimum(second[1:-2], second[:-3])
    above[:-3] = np.minimum(second[2:-1], second[3:])
    rounding = SINGLE if np.array_equal(lines, lines.astype(np.float32)) else ROUNDING
    found = (second > STANDS_OUT * below) & (second > STANDS_OUT * above) & (second > rounding)
    found[:3] = found[n - 3 :] = False
    return found, second


def _located(values: Values, low: float, high: float, count: int, depth: int = 2) -> list[np.ndarray]:
    """ξ of the breaks in [low, high], of the functions that have one there; beside one that all share may be more."""
    places = _locate(values, low, high, count)
    places = places[np.isfinite(places)]
    if not len(places):
        return []
    found, margin = [places], BESIDE_BREAK * (high - low)
    if depth and np.ptp(places) < SAME:
        for a, b in ((low, places.min() - margin), (places.max() + margin, high)):
            if b - a > margin:
                found += _located(values, float(a), float(b), count, depth - 1)
    return found


def _locate(values: Values, low: float, high: float, count: int) -> np.ndarray:
    """ξ of the break of each of some functions in [low, high], NaN where there is none."""
    a, b = np.full(count, low), np.full(count, high)
    rows, unit = np.arange(count), np.linspace(0.0, 1.0, PARTS + 1)
    sizes: list[np.ndarray] = []
    largest = np.zeros(count)
    place = np.full(count, np.nan)
    kind = np.zeros(count, dtype=int)  # 1 jump, 2 kink
    for look in range(LOOKS_AT_A_JUMP):
        s = a[:, None] + (b - a)[:, None] * unit
        v = values(s)
        second = np.abs(np.diff(v, 2, axis=1)).max(-1)
        peak = second.argmax(1)
        sizes.append(second[rows, peak])
        largest = np.abs(v).max(axis=(1, 2)) if look == 0 else largest
        if look == LOOKS_AT_A_KINK:
            with np.errstate(divide="ignore", invalid="ignore"):
                shrink = np.where(sizes[0] > 0, (sizes[-1] / sizes[0]) ** (1.0 / LOOKS_AT_A_KINK), 0.0)
            kind = np.where(shrink > JUMP, 1, np.where(shrink > KINK, 2, 0))
            kind = np.where(sizes[0] > ROUNDING * largest, kind, 0)
            place = np.where(kind == 2, _vertex(s, v, peak), place)
            if not (kind == 1).any():
                break
        first = np.abs(np.diff(v, axis=1)).max(-1)
        if look > LOOKS_AT_A_KINK:  # close in on the largest step
            step = first.argmax(1)
            a, b = s[rows, step], s[rows, step + 1]
        else:
            a, b = s[rows, peak], s[rows, peak + 2]
    return np.asarray(np.where(kind == 1, 0.5 * (a + b), place))


def _vertex(s: np.ndarray, v: np.ndarray, peak: np.ndarray) -> np.ndarray:
    """Where the lines through the samples on either side of the sharpest bend meet."""
    rows = np.arange(len(s))
    middle = np.clip(peak + 1, 3, s.shape[1] - 4)
    column = np.abs(np.diff(v, 2, axis=1)).max(1).argmax(1)
    h = s[:, 1] - s[:, 0]
    g = [v[rows, middle + m, column] for m in (-3, -2, 2, 3)]
    left, right = (g[1] - g[0]) / h, (g[3] - g[2]) / h
    with np.errstate(divide="ignore", invalid="ignore"):
        offset = ((g[2] - 2.0 * right * h) - (g[1] + 2.0 * left * h)) / (left - right)
    near = np.isfinite(offset) & (np.abs(offset) <= 3.0 * h)
    return np.asarray(s[rows, middle] + np.where(near, offset, 0.0))


def _spacing(f: "_Field", axis: int, room: Room, places: Sequence[float], size: float, rtol: float) -> np.ndarray:
    """Spacing in x that a function needs along an axis, at the samples; infinite where any will do."""
    lines = f.lines(axis)
    n, grading = len(lines), room.gradings[axis]
    if f.flat or (f.datum.adds and size == 0.0):
        return np.full(n, np.inf)
    weights = np.ones(1)
    for j, (x, g) in enumerate(zip(f.x, room.gradings, strict=True)):
        if j != axis:
            other = room.density(j, x) * np.asarray(g.slope(f.s))
            weights = np.multiply.outer(weights, other / other.sum()).reshape(-1)
    cell = np.asarray(grading.slope(f.s)) / n
    likely = f.datum.weight / (size if f.datum.adds else 1.0) * room.density(axis, f.x[axis])
    part = np.minimum(cell / room.spread[axis], 1.0)

    def effect(which: slice, sixth: np.ndarray, stride: int) -> np.ndarray:
        mean = (np.abs(sixth) * weights[:, None]).sum(1).max(-1)
        return np.asarray(likely[which] * mean * np.minimum(stride * part[which], 1.0))

    # along one line a break that was no break is a smooth feature; across many, slanted ones are left to the cells
    broken = f.candidates(axis)[0] if lines.shape[1] > 1 else np.zeros(lines.shape[:2], dtype=bool)
    return _least_spacing(lines, f.s, places, broken, effect, rtol) * cell


def _least_spacing(
    lines: np.ndarray,
    s: np.ndarray,
    places: Sequence[float],
    candidates: np.ndarray,
    effect: Callable[[slice, np.ndarray, int], np.ndarray],
    rtol: float,
) -> np.ndarray:
    """Per sample the smallest spacing, in samples, at which the sixth difference weighs something; infinite if none.

    That is more than a part of the tolerance, and of the largest effect that it has at a wider spacing. Differences
    across breaks, of all lines or of one (``candidates``), do not count.
    """
    n = len(s)
    wanted, largest = np.full(n, np.inf), np.zeros(n)
    first = max(n // NARROW, 1)
    if not (effect(slice(3 * first, n - 3 * first), _sixth(lines, first, 1), first) > WEIGHS * rtol).any():
        return wanted  # seen at every sample, nothing is narrower than that
    broken = np.zeros((n + 1, lines.shape[1]), dtype=np.int32)
    broken[:n] = candidates
    np.add.at(broken, np.searchsorted(s, np.asarray(places)), 1)
    crossed = np.cumsum(broken, axis=0)[:n]
    stride = n // 16
    while stride >= 1:
        every, offset = max(stride // 4, 1), 3 * stride
        if n > 2 * offset:
            sixth = _sixth(lines, stride, every)
            inside = slice(offset, n - offset, every)
            whole = crossed[2 * offset :: every] == crossed[: n - 2 * offset : every]
            size = np.repeat(effect(inside, sixth * whole[..., None], stride), every)[: n - 2 * offset]
            middle = slice(offset, n - offset)
            largest[middle] = np.maximum(largest[middle], size)
            needs = (size > WEIGHS * rtol) & (size > SEEN * largest[middle])
            wanted[middle] = np.where(needs, stride, wanted[middle])
        stride //= 2
    return wanted


def _sixth(lines: np.ndarray, stride: int, every: int) -> np.ndarray:
    """Sixth differences at a stride, of every so many samples."""
    n, total = len(lines), np.zeros(())
    for m, binomial in enumerate(SIXTH):
        total = total + binomial * lines[m * stride : n - (6 - m) * stride : every]
    return np.asarray(total)


def _features(x: np.ndarray, wanted: np.ndarray, grading: Grading, nodes: int) -> tuple[Feature, ...]:
    """Stretches of an axis that need nodes much closer than the first grid has them, the finest first."""
    if not np.isfinite(wanted).any():
        return ()
    n = len(x)
    base = np.asarray(grading.slope((np.arange(n) + 0.5) / n)) / (nodes - 1)
    # where all of an axis needs closer nodes, finer levels bring them: it is the difference that counts
    usual = float(np.clip(np.median(np.minimum(wanted / base, 1.0)), LEAST_USUAL, 1.0))
    # spacings may not change faster than that along the axis: the zeros of a difference are no places without need
    wanted = np.minimum(wanted / usual, base.max())
    rising = GROWS * x + np.minimum.accumulate(wanted - GROWS * x)
    falling = -GROWS * x + np.minimum.accumulate((wanted + GROWS * x)[::-1])[::-1]
    wanted = np.minimum(rising, falling)
    density = 1.0 / base
    found: list[Feature] = []
    while len(found) < MOST_FEATURES:
        need = 1.0 / (wanted * density)
        worst = int(need.argmax())
        if need[worst] < FINER:
            break
        spacing = float(wanted[worst])
        fine = wanted < 1.5 * spacing
        first = worst - int(np.argmin(np.concatenate([[False], fine[:worst]])[::-1]))
        last = worst + int(np.argmin(np.concatenate([fine[worst:], [False]]))) - 1
        feature = Feature(0.5 * float(x[first] + x[last]), max(0.5 * float(x[last] - x[first]), spacing), spacing)
        found.append(feature)
        density = density + (1.0 / spacing - density[worst]) / np.hypot(1.0, (x - feature.centre) / feature.width)
    return tuple(found)


def _over_time(
    problem: KolmogorovProblem, room: Room, data: Sequence[_Datum], rtol: float, crowded: list[str]
) -> tuple[tuple[float, ...], tuple[Pulse, ...]]:
    """Times at which something jumps or bends, and stretches in which it changes fast."""
    timed = [d for d in data if d.timed and not (problem.sde.autonomous and d.name in ("drift", "covariance"))]
    probes = _probes(room)
    series: list[tuple[str, Series]] = [(d.name, partial(_flat_values, d.values, probes)) for d in timed]
    series += _face_series(problem, probes)
    if not series:
        return (), ()
    assert problem.horizon is not None
    breaks: list[float] = []
    ends = [0.0, *problem.sde.breakpoints, problem.horizon]
    count = max(INSTANTS // (len(ends) - 1), 16)
    pulses: list[Pulse] = []
    for a, b in pairwise(ends):
        few, many = (_offset(k) for k in (count, CLOSER * count))
        wanted, mine = np.full(len(many), np.inf), []
        for name, f in series:
            if not np.ptp(_seen_at(f, a, b, few), axis=0).any():
                continue
            seen = _seen_at(f, a, b, many)
            found = _breaks_in_time(f, a, b, many, seen)
            if len(found) > MOST_BREAKS:
                crowded.append(name)
                found = []
            mine += found
            within = [(t - a) / (b - a) for t in found]
            wanted = np.minimum(wanted, _steps_wanted(many, seen, within, rtol) * (b - a))
        breaks += mine
        pulses += _pulses(a, b, many, wanted, problem.horizon)
    together = _merged([t / problem.horizon for t in breaks])
    exact = sorted(set(breaks))
    return tuple(float(next(t for t in exact if abs(t / problem.horizon - q) <= SAME)) for q in together), tuple(pulses)


def _offset(count: int) -> np.ndarray:
    """Places on [0, 1] an irrational part of a cell off the nodes of any grid."""
    return (np.arange(count) + OFF) / count


def _seen_at(f: Callable[[float], np.ndarray], a: float, b: float, s: np.ndarray) -> np.ndarray:
    """Values of a function of time at parts of an interval, shape (len(s), m)."""
    seen = np.stack([f(float(a + q * (b - a))) for q in s])
    return np.where(np.isfinite(seen), seen, 0.0)


def _probes(room: Room) -> np.ndarray:
    """Points where the process goes, shape (POINTS, d)."""
    d = len(room.gradings)
    unit = np.random.default_rng(2).random((POINTS, d))
    low, high = room.low - room.spread, room.high + room.spread
    ends = np.array([[g.lower, g.upper] for g in room.gradings])
    return np.asarray(np.clip(low + (high - low) * unit, ends[:, 0], ends[:, 1]))


def _flat_values(f: Callable[[float, np.ndarray], Any], x: np.ndarray, t: float) -> np.ndarray:
    """A function of (t, x) at fixed points, as one vector."""
    return np.array(as_numpy(f(t, x)), dtype=float).reshape(-1)


def _face_series(problem: KolmogorovProblem, probes: np.ndarray) -> list[tuple[str, Series]]:
    """Data of faces as functions of time."""
    series: list[tuple[str, Series]] = []
    if problem.stationary:
        return []
    for axis, pair in enumerate(problem.box.faces):
        for side, face in enumerate(pair):
            wall = probes.copy()
            wall[:, axis] = (problem.box.lower, problem.box.upper)[side][axis]
            for value in (getattr(face, name, None) for name in ("value", "kappa")):
                if reads_time(value):
                    series.append(("boundary value", partial(_flat_values, partial(problem.on_face, value), wall)))
    return series


def _breaks_in_time(
    f: Callable[[float], np.ndarray], a: float, b: float, s: np.ndarray, seen: np.ndarray
) -> list[float]:
    """Fractions of [a, b] at which a function of time jumps or bends."""
    candidate, strength = _candidates(seen[:, None, :])
    places = np.flatnonzero(candidate[:, 0])
    order = places[np.argsort(-strength[places, 0])]
    chosen: list[int] = []
    for i in order:
        if all(abs(i - j) > 2 for j in chosen):
            chosen.append(int(i))

    def values(q: np.ndarray) -> np.ndarray:
        flat = [np.array(f(float(a + p * (b - a))), dtype=float) for p in q.reshape(-1)]
        result = np.stack(flat)
        return np.where(np.isfinite(result), result, 0.0).reshape(*q.shape, -1)

    found = []
    for i in chosen[:CANDIDATES]:
        ends = float(s[max(i - 2, 0)]), float(s[min(i + 2, len(s) - 1)])
        found += [_first_after(f, a + float(q[0]) * (b - a), b - a) for q in _located(values, *ends, 1)]
    return [t for t in found if a < t < b]


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


def _steps_wanted(s: np.ndarray, seen: np.ndarray, breaks: Sequence[float], rtol: float) -> np.ndarray:
    """Length of steps, as a part of the interval, that a function of time needs at each sample."""
    n, size = len(s), float(np.abs(seen).mean(0).max())

    def effect(which: slice, sixth: np.ndarray, stride: int) -> np.ndarray:
        return np.asarray(np.abs(sixth[:, 0]).max(-1) / size * stride / n)

    none = np.zeros((n, 1), dtype=bool)
    return _least_spacing(seen[:, None], s, breaks, none, effect, rtol) / n if size > 0 else np.full(n, np.inf)


def _pulses(a: float, b: float, s: np.ndarray, wanted: np.ndarray, horizon: float) -> list[Pulse]:
    """Stretches of an interval in which steps have to be short, nested ones by themselves."""
    found = []
    step = wanted
    limit = horizon / FIRST_PULSE
    fine = step < limit
    edges = np.flatnonzero(np.diff(np.concatenate([[0], fine.astype(int), [0]])))
    cell = (b - a) / len(s)
    for first, last in zip(edges[::2], edges[1::2] - 1, strict=True):
        shortest = float(step[first : last + 1].min())
        start, end = a + s[first] * (b - a) - cell, a + s[last] * (b - a) + cell
        found.append(Pulse(max(start, a), min(end, b), shortest))
    return found


# Part of the horizon below which a step counts as short: the first level takes eight.
FIRST_PULSE = 12.0
