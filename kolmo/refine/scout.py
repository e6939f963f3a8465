r"""Look at the data before solving: breaks and narrow features in space, breaks and pulses in time.

A grid does not see what it was not made for, and levels that do not see a thing agree. So every function of the problem
is sampled first, off any grid, where the process goes, and the samples are judged by differences.

What proves to be smooth, by bounds on its derivatives (see :mod:`kolmo.refine.bounds`), has nothing to be looked for:
it is sampled for its size alone. In all others,

- a **break** (jump or kink) is a second difference that stands out among its neighbours and, looked at more and more
  closely, shrinks like a jump (not at all) or a kink (like the spacing), not like a smooth function (its square);
- the **spacing** that a place needs is the largest at which the sixth difference, the error of the scheme, still weighs
  something in the answer: its size times the part of the process' room that it takes up, relative to the data's mean.
  Where that is much less than elsewhere, there is a **feature**.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from kolmo.arrays import as_numpy
from kolmo.problem import KolmogorovProblem
from kolmo.problem.faces import Absorbing, Robin
from kolmo.problem.instants import fractions
from kolmo.refine.breaks import SAME, breaks_along, merged, told_along
from kolmo.refine.features import Feature, features, spacing
from kolmo.refine.pulses import Course, Pulse, over_time
from kolmo.refine.samples import Datum, Field, Room, functions

# So many times more samples along an axis where terminal data, source and face values were zero at all of them.
DENSER = {1: 32, 2: 4, 3: 2}
# Instants at which space is sampled where something depends on time, and where that was not seen to.
LOOKS, STEADY_LOOKS = 5, 2
# Tolerance below which sixth differences are those of rounding.
LEAST_RTOL = 1e-9


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
    steady : bool
        Whether nothing changes in time but at breakpoints, told or seen.
    smooth : tuple of str
        Functions that prove to be smooth.
    proved : bool
        Whether all functions do: else there may be more than was looked for.
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
    steady: bool = True
    smooth: tuple[str, ...] = ()
    proved: bool = True
    exploded: float = 0.0

    @property
    def unbroken(self) -> bool:
        """Whether nothing breaks in space."""
        return not (self.slanted or self.crowded or any(axis.breaks or axis.marks for axis in self.axes))

    @property
    def unresolved(self) -> tuple[str, ...]:
        """Coefficients and sources that break between the nodes of any grid."""
        names = dict.fromkeys((*self.slanted, *self.crowded))
        return tuple(name for name in names if name in ("drift", "covariance", "killing", "source"))


def scout(problem: KolmogorovProblem, room: Room, rtol: float, atol: float = 0.0) -> Sight:
    """Sample the functions of a problem where the process goes; see the module."""
    data = functions(problem, room)
    slanted: set[str] = set()
    crowded: list[str] = []
    course = over_time(problem, room, data, _relative(rtol, atol, _size_nearby(problem, room, data)), crowded)
    for denser in (1, DENSER[problem.dim]):  # where there is nothing, look again
        fields = [Field(d, room, _look_times(problem, d, course), denser) for d in data]
        size = _size(problem, fields, room)
        silent = size == 0.0 and not _faces_speak(problem)
        if not silent:
            break
    rtol = _relative(rtol, atol, size)
    axes = [_along(problem, axis, room, fields, size, rtol, slanted, crowded) for axis in range(problem.dim)]
    return Sight(
        axes=tuple(axes),
        breakpoints=course.breakpoints,
        pulses=course.pulses,
        slanted=tuple(sorted(slanted)),
        crowded=tuple(dict.fromkeys(crowded)),
        silent=silent,
        size=size,
        bounds=_bounds(problem, room, fields),
        steady=not course.changing and all(_alike(problem, course, f) for f in fields),
        smooth=tuple(d.name for d in data if d.smooth),
        proved=all(d.smooth for d in data),
    )


def _relative(rtol: float, atol: float, size: float) -> float:
    """Tolerance relative to an answer of that size."""
    return max(rtol + (atol / size if size > 0.0 else 0.0), LEAST_RTOL)


def _size_nearby(problem: KolmogorovProblem, room: Room, data: Sequence[Datum]) -> float:
    """Size of what the data add to the answer, within a spread of where the process goes, before space is looked at."""
    near, middle = room.probes[::2], 0.5 * (problem.horizon or 0.0)
    added = (d.weight * float(np.abs(d.values(middle, near)).mean(0).max()) for d in data if d.adds)
    return _steady_source(problem, room) + sum(added)


def _steady_source(problem: KolmogorovProblem, room: Room) -> float:
    """What a source that is a number adds."""
    steady = 0.0 if callable(problem.source) or problem.source is None else problem.source
    return room.time * float(np.max(np.abs(as_numpy(steady))))


def _ends(problem: KolmogorovProblem, course: Course) -> list[float]:
    """Ends of the pieces of time between breakpoints, told or seen."""
    return sorted({0.0, *problem.sde.breakpoints, *course.breakpoints, problem.horizon or 0.0})


def _look_times(problem: KolmogorovProblem, datum: Datum, course: Course) -> list[float]:
    """Instants at which a function is looked at in space: in the longest of the pieces between breakpoints first."""
    ends = _ends(problem, course)
    if not datum.timed:
        return [0.5 * ends[-1]]
    pieces = sorted(pairwise(ends), key=lambda piece: piece[0] - piece[1])[:LOOKS]
    looks = LOOKS if datum.name in course.changing or len(pieces) > 1 else STEADY_LOOKS
    times: list[float] = []
    for k, (a, b) in enumerate(pieces):
        mine = len(range(k, looks, len(pieces)))
        times += [float(a + f * (b - a)) for f in fractions(mine + 1, seed=1)[1:]]
    return sorted(times, reverse=True)


def _alike(problem: KolmogorovProblem, course: Course, seen: Field) -> bool:
    """Whether looks at a function in one piece of time saw the same."""
    piece = np.searchsorted(_ends(problem, course), seen.times).tolist()
    return all(same for same, (p, q) in zip(seen.same, pairwise(piece), strict=True) if p == q)


def _size(problem: KolmogorovProblem, fields: Sequence[Field], room: Room) -> float:
    """Mean size of what the data add to the answer; 0 where they are zero."""
    total = _steady_source(problem, room)
    for f in fields:
        if f.datum.adds:
            weights = _lattice_density(f, room)
            total += f.datum.weight * float(
                (np.abs(f.samples) * weights[..., None]).sum(axis=tuple(range(weights.ndim))).max() / weights.sum()
            )
    return total


def _lattice_density(f: Field, room: Room) -> np.ndarray:
    """Likelihood of the samples' places, times the volume that each stands for."""
    result = np.ones(())
    for axis, (x, grading) in enumerate(zip(f.x, room.gradings, strict=True)):
        result = np.multiply.outer(result, room.density(axis, x) * np.asarray(grading.slope(f.s)))
    return result


def _bounds(problem: KolmogorovProblem, room: Room, fields: Sequence[Field]) -> tuple[np.ndarray, np.ndarray] | None:
    """Least and largest value that the maximum principle allows, as far as the data are known or were seen."""
    seen = {f.datum.name: f.datum.proof if f.datum.smooth and f.datum.proof else f for f in fields}
    pays = any(event.pays for event in problem.events)
    if problem.source is not None or pays or problem.box.has("elastic"):
        return None
    killing = problem.killing
    least = float(seen["killing"].low.min()) if "killing" in seen else float(np.min(as_numpy(killing or 0.0)))
    if least < 0.0:
        return None
    ends = [(seen["terminal"].low, seen["terminal"].high)] if "terminal" in seen else []
    for axis, side, face in problem.box.each():
        if isinstance(face, Absorbing):
            wall = problem.box.onto(axis, side, room.probes)
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
    values = [face.value for _, _, face in problem.box.each() if isinstance(face, Absorbing | Robin)]
    return any(callable(value) or bool(np.any(as_numpy(value) != 0)) for value in values)


def _along(
    problem: KolmogorovProblem,
    axis: int,
    room: Room,
    fields: Sequence[Field],
    size: float,
    rtol: float,
    slanted: set[str],
    crowded: list[str],
) -> AxisSight:
    """Breaks and features of one axis."""
    breaks: dict[str, list[float]] = {}
    fields = [f for f in fields if not f.datum.smooth]
    wanted = np.full(len(fields[0].s) if fields else 1, np.inf)
    for f in fields:
        places = breaks_along(f, axis, slanted, crowded)
        if places and problem.box.periodic[axis] and f.datum.name != "terminal":
            # the seam of a circle is no end at which the map of the axis might have a kink
            crowded.append(f.datum.name)
        breaks[f.datum.name] = places
        wanted = np.minimum(wanted, spacing(f, axis, room, places, size, rtol))
    grading = room.gradings[axis]
    told = told_along(problem, axis, room, slanted)
    if problem.box.periodic[axis]:
        breaks = {name: found for name, found in breaks.items() if name == "terminal"}
        told = []
    coefficients = merged([*told, *(s for name, found in breaks.items() if name != "terminal" for s in found)])
    marks = merged(breaks.get("terminal", []))
    marks = [next((b for b in coefficients if abs(b - m) < SAME), m) for m in marks]
    narrow = features(fields[0].x[axis] if fields else np.zeros(0), wanted, grading, room.nodes)
    at_breaks, at_marks = (tuple(float(grading(np.float64(s))) for s in found) for found in (coefficients, marks))
    return AxisSight(at_breaks, at_marks, narrow)
