"""Jumps and kinks along an axis, seen as second differences that stand out and looked at ever more closely."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from kolmo.problem import KolmogorovProblem
from kolmo.refine.samples import ROUNDING, Datum, Field, Room, Values, rows
from kolmo.schemes.terminal.kinks import vertex

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
# Lines with a break at one place, of all lines, from which on the break is taken to run along the other axes, and lines
# on which it is located.
ALONG, LOCATED = 0.08, 8


def told_along(problem: KolmogorovProblem, axis: int, room: Room, slanted: set[str]) -> list[float]:
    """ξ of the breaks that the user told, along an axis; functions that may break where they run otherwise."""
    grading = room.gradings[axis]
    found = [float(grading.inverse(np.float64(b))) for b in problem.breaks if not callable(b)]
    for function in (b for b in problem.breaks if callable(b)):
        datum = Datum("breaks", rows(partial(_at_any_time, function)), 0.0, False)
        field_ = Field(datum, room, [0.0])
        lines = field_.lines(axis)[0]
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


def _at_any_time(f: Callable[[np.ndarray], Any], t: float, x: np.ndarray) -> Any:
    """A function of x alone."""
    return f(x)


def breaks_along(f: Field, axis: int, slanted: set[str], crowded: list[str]) -> list[float]:
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
    chosen = apart(places, strength.max(1))
    found: list[float] = []
    for i in chosen[:CANDIDATES]:
        window = slice(max(i - 2, 0), i + 3)
        which = np.flatnonzero(candidate[window].any(0))
        some = which[:: max(1, len(which) // LOCATED)][:LOCATED]
        ends = float(f.s[max(i - 2, 0)]), float(f.s[min(i + 2, n - 1)])
        for real in located(f.on_lines(axis, some), *ends, len(some)):
            if (total == 1 or len(real) >= 2) and np.ptp(real) < SAME:
                found.append(float(np.median(real)))
            else:
                slanted.add(f.datum.name)
    if len(found) > MOST_BREAKS:
        crowded.append(f.datum.name)
        return []
    return found


def apart(places: np.ndarray, strength: np.ndarray) -> list[int]:
    """One candidate of each cluster, the strongest first."""
    chosen: list[int] = []
    for i in places[np.argsort(-strength[places])]:
        if all(abs(i - j) > 2 for j in chosen):
            chosen.append(int(i))
    return chosen


def _some_real(f: Field, axis: int, candidate: np.ndarray, strength: np.ndarray) -> bool:
    """Whether some of the strongest candidates, looked at more closely, are breaks: waves have candidates too."""
    where = np.argwhere(candidate)
    strongest = where[np.argsort(-strength[candidate], kind="stable")][:LOCATED]
    ends = np.clip(strongest[:, 0, None] + np.array([-2, 2]), 0, len(candidate) - 1)
    return any(
        np.isfinite(_locate(f.on_lines(axis, np.array([line])), f.s[low], f.s[high], 1)).any()
        for line, (low, high) in zip(strongest[:, 1], ends, strict=True)
    )


def located(values: Values, low: float, high: float, count: int, depth: int = 2) -> list[np.ndarray]:
    """ξ of the breaks in [low, high], of the functions that have one there; beside one that all share may be more."""
    places = _locate(values, low, high, count)
    places = places[np.isfinite(places)]
    if not len(places):
        return []
    found, margin = [places], BESIDE_BREAK * (high - low)
    if depth and np.ptp(places) < SAME:
        for a, b in ((low, places.min() - margin), (places.max() + margin, high)):
            if b - a > margin:
                found += located(values, float(a), float(b), count, depth - 1)
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
            place = np.where(kind == 2, vertex(s, v, peak, 2), place)
            if not (kind == 1).any():
                break
        first = np.abs(np.diff(v, axis=1)).max(-1)
        if look > LOOKS_AT_A_KINK:  # close in on the largest step
            step = first.argmax(1)
            a, b = s[rows, step], s[rows, step + 1]
        else:
            a, b = s[rows, peak], s[rows, peak + 2]
    return np.asarray(np.where(kind == 1, 0.5 * (a + b), place))


def _zero(values: Values, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """A zero in each of some intervals, by bisection."""
    start = values(a[:, None])[:, 0, 0]
    for _ in range(BISECTIONS):
        middle = 0.5 * (a + b)
        same = values(middle[:, None])[:, 0, 0] * start > 0.0
        a, b = np.where(same, middle, a), np.where(same, b, middle)
    return np.asarray(0.5 * (a + b))


def merged(found: Sequence[float]) -> list[float]:
    """Increasing places, those that agree taken once."""
    result: list[float] = []
    for s in sorted(found):
        if not result or s - result[-1] > SAME:
            result.append(s)
    return result
