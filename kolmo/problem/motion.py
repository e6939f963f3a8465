"""Faces that move: their places as functions of time, and the coordinates in which they stand still.

A face is read as a piecewise polynomial: sums of Chebyshev polynomials through its values at a few instants, on pieces
that end where it jumps or bends. Place and speed are linear in these values, so that they carry the gradients of
parametrised faces, and the speed needs no derivative from anybody.
"""

import math
import sys
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.polynomial import chebyshev

from kolmo.arrays import Array, as_like, as_numpy, detached, is_tensor, namespace
from kolmo.errors import InputError

__all__ = ["Curve", "Motion", "moved_nodes", "place", "traced"]

# Values on a piece, where it is straight and otherwise.
STRAIGHT, BENT = 2, 16
# Part of its size by which a face may differ from its polynomials: in double precision, where it is a little rough, and
# where it was computed in single precision.
TOLERANCES = (1e-13, 1e-10, 1e-6)
# Pieces and breaks at most before a coarser tolerance is tried.
MOST_PIECES, MOST_BREAKS = 3000, 100
# Length of a piece, as a part of the horizon, that is not divided further, and below which pieces between longer ones
# tell of a break: beside a kink they get shorter until rounding hides it.
SHORTEST, ROUGH = 1e-12, 1e-7
# Part of a piece at which it is divided: no plain fraction, so that no jump falls on the end of a piece unseen.
PART = 0.5**0.5 - 0.2
# Part of its size by which a face has to jump at a break, not to bend there.
JUMP = 1e-7
# Instants whose places are kept at hand.
KEPT = 64
_DEGREES = np.arange(BENT)

Place = float | Callable[[float], Any] | Any


def place(face: Place, t: float) -> Any:
    """Where a face is at a time: a float, or a tensor without axes where it carries gradients.

    Raises
    ------
    InputError
        For what is no finite number.

    Examples
    --------
    >>> place(lambda t: 1.0 - 0.5 * t, 1.0)
    0.5
    """
    if not callable(face):
        return face.reshape(()).double() if is_tensor(face) else float(face)  # type: ignore[union-attr]
    try:
        value = face(t)
        number = value.reshape(()).double() if is_tensor(value) else float(np.asarray(value, dtype=float).reshape(()))
    except InputError:
        raise
    except Exception as error:
        given = f"{type(error).__name__}: {error}"
        raise InputError("lower, upper", given, "a function of t (a float) that gives one number") from error
    plain = float(detached(number))
    if not math.isfinite(plain):
        raise InputError(
            "lower, upper", f"{plain} at t = {t:g}", "faces that move to finite places",
            "where bounds have met, keep them there: max(..., 0.0) under a root",
        )  # fmt: skip
    return number


@lru_cache(maxsize=4)
def _rules(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Chebyshev's nodes in (−1, 1), and the matrix from values there to coefficients."""
    nodes = chebyshev.chebpts1(count)
    return nodes, np.linalg.inv(chebyshev.chebvander(nodes, count - 1))


@dataclass(frozen=True, eq=False)
class Curve:
    """The place of one face over time.

    Attributes
    ----------
    edges : tuple of float
        Ends of the pieces.
    sums : tuple of (array, array)
        On each, the coefficients of Chebyshev's polynomials in the place and in the speed; of a face that stands still
        its place alone.
    breaks : tuple of float
        Times at which the face jumps or bends.
    """

    edges: tuple[float, ...]
    sums: tuple[tuple[Array, Array], ...]
    breaks: tuple[float, ...] = ()

    def __call__(self, t: float, *, before: bool = False) -> Any:
        """Place at a time; ``before``: the limit from before, where it jumps."""
        return self.course(t, before=before)[0]

    def speed(self, t: float, *, before: bool = False) -> Any:
        """Derivative of the place; to the right where it bends, unless ``before``."""
        return self.course(t, before=before)[1]

    def course(self, t: float, *, before: bool = False) -> tuple[Any, Any]:
        """Place and speed."""
        if self.still:
            return self.sums[0][0][0], 0.0
        which = int(np.searchsorted(self.edges, t, side="left" if before else "right")) - 1
        which = min(max(which, 0), len(self.sums) - 1)
        a, b, (place, speed) = self.edges[which], self.edges[which + 1], self.sums[which]
        s = (2.0 * t - a - b) / (b - a)
        if len(place) == STRAIGHT:
            return place[0] + place[1] * s, speed[0]
        # Chebyshev's polynomials; beyond the piece, by rounding alone, they are those of its end
        row = as_like(np.cos(_DEGREES * math.acos(min(max(s, -1.0), 1.0))), place)
        return row @ place, row[:-1] @ speed

    @property
    def still(self) -> bool:
        """Whether it does not move."""
        return not self.edges

    def record(self) -> dict[str, Any]:
        """Tree of numbers and arrays that holds everything, for saving."""
        sums = [[as_numpy(part) for part in pair] for pair in self.sums]
        return {"edges": list(self.edges), "sums": sums, "breaks": list(self.breaks)}

    @classmethod
    def from_record(cls, tree: dict[str, Any]) -> "Curve":
        """Rebuild a curve from its record, whose parts fit together."""
        edges, sums = tuple(tree["edges"]), tuple((place, speed) for place, speed in tree["sums"])
        ok = len(sums) == max(len(edges) - 1, 1) and all(a < b for a, b in pairwise(edges))
        counts = (STRAIGHT, BENT) if edges else (1,)
        ok = ok and all(len(place) in counts and len(speed) == max(len(place) - 1, 1) for place, speed in sums)
        if not ok:
            raise ValueError("motion: got pieces of a face that do not fit together")
        return cls(edges, sums, tuple(tree["breaks"]))

    def detached(self) -> "Curve":
        """The same in NumPy, without gradients."""
        return Curve(self.edges, tuple((as_numpy(p), as_numpy(q)) for p, q in self.sums), self.breaks)


def traced(face: Place, horizon: float) -> Curve:
    """The course of a face up to the horizon.

    Examples
    --------
    >>> bent = traced(lambda t: max(1.0 - t, 0.4), 1.0)
    >>> [round(t, 9) for t in bent.breaks], float(bent.speed(0.5)), round(float(bent(0.25)), 12)
    ([0.6], -1.0, 0.75)
    """
    if not callable(face):
        still = _stacked([place(face, 0.0)])
        return Curve((), ((still, 0.0 * still),))
    known: dict[float, float] = {}

    def at(t: float) -> float:
        if t not in known:
            known[t] = float(detached(place(face, t)))
        return known[t]

    size = max(abs(at(t)) for t in np.linspace(0.0, horizon, BENT).tolist())
    for part in TOLERANCES:
        found = _pieces(at, horizon, part * max(size, 1e-300))
        if found is not None:
            edges, counts, breaks = found
            sums = [_summed(face, a, b, n) for (a, b), n in zip(pairwise(edges), counts, strict=True)]
            return Curve(tuple(edges), tuple(sums), tuple(breaks))
    raise InputError(
        "lower, upper",
        "a face that is smooth nowhere in time",
        f"at most {MOST_BREAKS} jumps and kinks between 0 and T",
    )


def _stacked(values: Sequence[Any]) -> Array:
    if any(is_tensor(v) for v in values):
        import torch

        return torch.stack([torch.as_tensor(v, dtype=torch.float64) for v in values])
    return np.array(values, dtype=float)


def _summed(face: Place, a: float, b: float, count: int) -> tuple[Array, Array]:
    """Coefficients of place and speed on a piece, from values at so many nodes."""
    nodes, matrix = _rules(count)
    values = _stacked([place(face, float(0.5 * (a + b) + 0.5 * (b - a) * s)) for s in nodes])
    slopes = chebyshev.chebder(matrix, scl=2.0 / (b - a))
    return as_like(matrix, values) @ values, as_like(slopes, values) @ values


def _pieces(
    at: Callable[[float], float], horizon: float, tolerance: float
) -> tuple[list[float], list[int], list[float]] | None:
    """Edges, numbers of values and breaks; None where there are too many of them."""
    breaks: list[float] = []
    while len(breaks) <= MOST_BREAKS:
        pieces: list[tuple[float, float, int]] = []
        fresh: list[float] = []
        for low, high in pairwise([0.0, *breaks, horizon]):
            found = _divided(at, low, high, horizon, tolerance)
            if found is None:
                return None
            pieces += found[0]
            fresh += found[1]
        if not fresh:
            return [p[0] for p in pieces] + [horizon], [p[2] for p in pieces], breaks
        breaks = sorted({*breaks, *fresh})
    return None


def _divided(
    at: Callable[[float], float], low: float, high: float, horizon: float, tolerance: float
) -> tuple[list[tuple[float, float, int]], list[float]] | None:
    """Pieces (start, end, number of values) of a stretch, and times inside it about which no piece is smooth."""
    pieces, rough, open_ = [], [], [(low, high)]
    while open_:
        a, b = open_.pop()
        count = _smooth(at, a, b, tolerance)
        if count is None and b - a > SHORTEST * horizon:
            middle = a + PART * (b - a)
            open_ += [(middle, b), (a, middle)]
        else:
            pieces.append((a, b, count or STRAIGHT))
            if b - a < ROUGH * horizon:
                rough.append((a, b))
        if len(pieces) + len(open_) > MOST_PIECES:
            return None
    return pieces, _places(rough, low, high)


def _places(rough: list[tuple[float, float]], low: float, high: float) -> list[float]:
    """One time for each cluster of short pieces inside a stretch: the end of the shortest, or a plain number there."""
    clusters: list[list[tuple[float, float]]] = []
    for piece in rough:
        if clusters and piece[0] == clusters[-1][-1][1]:
            clusters[-1].append(piece)
        else:
            clusters.append([piece])
    found = []
    for cluster in clusters:
        if cluster[0][0] > low and cluster[-1][1] < high:
            a, b = min(cluster, key=lambda piece: piece[1] - piece[0])
            plain = float(f"{b:.9g}")
            found.append(plain if abs(plain - b) <= 4.0 * (b - a) else b)
    return found


def _smooth(at: Callable[[float], float], a: float, b: float, tolerance: float) -> int | None:
    """How many values give a piece to the tolerance; None where none of the numbers tried does."""
    nodes, matrix = _rules(BENT)
    values = np.array([at(float(0.5 * (a + b) + 0.5 * (b - a) * s)) for s in nodes])
    size = np.abs(matrix @ values)
    if size[2:].max() <= 0.1 * tolerance:
        return STRAIGHT
    return BENT if size[-3:].max() <= tolerance else None


@dataclass(frozen=True, eq=False)
class Motion:
    r"""Coordinates in which moving faces stand still: per axis, :math:`x = a(t) + w(t)\,(\xi - \xi_0)`.

    Between two real faces ξ measures the part of the way from one to the other, in units in which the box has the
    reference's ends; beside a single one it moves along with it (w = 1). At t = 0 both are the same, x = ξ, where the
    reference is the box of that time.

    Attributes
    ----------
    axes : tuple of (low, high), each a Curve or None
        Courses of the faces that carry the coordinate; None where that end does not.
    reference : tuple of (low, high)
        Places of these ends in ξ.
    """

    axes: tuple[tuple[Curve | None, Curve | None], ...]
    reference: tuple[tuple[float, float], ...]
    _known: OrderedDict[Any, Any] = field(default_factory=OrderedDict, repr=False)

    @property
    def dim(self) -> int:
        """Dimension d."""
        return len(self.axes)

    @property
    def breaks(self) -> tuple[float, ...]:
        """Times at which a face jumps or bends."""
        return tuple(sorted({t for pair in self.axes for curve in pair if curve is not None for t in curve.breaks}))

    @property
    def jumps(self) -> tuple[float, ...]:
        """Those of the breaks at which a face jumps."""
        curves = [curve for pair in self.axes for curve in pair if curve is not None]
        return tuple(t for t in self.breaks if any(_jumps(curve, t) for curve in curves))

    @cached_property
    def rigid(self) -> bool:
        """Whether no axis is stretched."""
        return all(None in pair for pair in self.axes)

    def width(self, t: float, like: Array, *, before: bool = False) -> Array:
        """w(t), shape (d,)."""
        return self._at(t, like, before)[2]

    def outwards(self, t: float, xi: Array, *, before: bool = False) -> Array:
        """Places x of points ξ (..., d): on a face exactly where one of ξ is."""
        p, q, w, _, _, _, bottom, top = self._at(t, xi, before)
        if self.rigid:
            return p + (xi - bottom)
        return namespace(xi).where(2.0 * xi < bottom + top, p + w * (xi - bottom), q + w * (xi - top))

    def inwards(self, t: float, x: Array, *, before: bool = False) -> Array:
        """Points ξ of places x (..., d)."""
        p, q, w, _, _, _, bottom, top = self._at(t, x, before)
        return namespace(x).where(2.0 * x < p + q, bottom + (x - p) / w, top + (x - q) / w)

    def velocity(self, t: float, xi: Array) -> Array:
        """∂x/∂t at fixed ξ, shape (..., d); (d,) where it is the same everywhere."""
        _, _, _, dp, dq, dw, bottom, top = self._at(t, xi, False)
        if self.rigid:
            return dp
        return namespace(xi).where(2.0 * xi < bottom + top, dp + dw * (xi - bottom), dq + dw * (xi - top))

    def stretch(self, t: float, like: Array) -> Array:
        """Volume in x of a unit of volume in ξ."""
        w = self.width(t, like)
        volume = w[0]
        for i in range(1, self.dim):
            volume = volume * w[i]
        return volume

    def record(self) -> dict[str, Any]:
        """Tree of numbers and arrays that holds everything, for saving."""
        axes = [[None if curve is None else curve.record() for curve in pair] for pair in self.axes]
        return {"axes": axes, "reference": [list(pair) for pair in self.reference]}

    @classmethod
    def from_record(cls, tree: dict[str, Any]) -> "Motion":
        """Rebuild a motion from its record."""
        axes = [tuple(None if c is None else Curve.from_record(c) for c in pair) for pair in tree["axes"]]
        return cls(tuple(axes), tuple((low, high) for low, high in tree["reference"]))  # type: ignore[arg-type]

    def detached(self) -> "Motion":
        """The same motion in NumPy, without gradients."""
        axes = tuple(tuple(None if c is None else c.detached() for c in pair) for pair in self.axes)
        return Motion(axes, self.reference)  # type: ignore[arg-type]

    def _at(self, t: float, like: Array, before: bool) -> tuple[Array, ...]:
        """Places of both ends, widths, their speeds, and the places in ξ: each (d,), in the library of ``like``."""
        # numbers of any kind that equal it are the same instant; what is no number is noticed here
        key = float(t), before, _kind(like)
        if key not in self._known:
            parts = [self._axis(i, key[0], before) for i in range(self.dim)]
            stacked = [_stacked([part[j] for part in parts]) for j in range(8)]
            self._known[key] = tuple(as_like(v if is_tensor(like) else as_numpy(v), like) for v in stacked)
            while len(self._known) > KEPT:
                self._known.popitem(last=False)
        found: tuple[Array, ...] = self._known[key]
        return found

    def _axis(self, i: int, t: float, before: bool) -> tuple[Any, ...]:
        """Of one axis; beside a single face both ends are that one."""
        (low, high), (bottom, top) = self.axes[i], self.reference[i]
        if low is not None and high is not None:
            (p, dp), (q, dq) = low.course(t, before=before), high.course(t, before=before)
            return p, q, (q - p) / (top - bottom), dp, dq, (dq - dp) / (top - bottom), bottom, top
        for curve, end in ((low, bottom), (high, top)):
            if curve is not None:
                p, dp = curve.course(t, before=before)
                return p, p, 1.0, dp, dp, 0.0, end, end
        return 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0


def _jumps(curve: Curve, t: float) -> bool:
    """Whether a face jumps at a break, and does not only bend there."""
    before, after = (float(detached(curve(t, before=side))) for side in (True, False))
    return abs(after - before) > JUMP * max(abs(before), abs(after))


def _kind(like: Array) -> str:
    """Library of an array, and whether gradients are recorded: what is kept without them is of no use with them."""
    if not is_tensor(like):
        return "numpy"
    return f"{like.device} {sys.modules['torch'].is_grad_enabled()}"


def moved_nodes(nodes: tuple[np.ndarray, ...], motion: Motion | None, t: float) -> tuple[np.ndarray, ...]:
    """Where the nodes of each axis are at a time."""
    if motion is None:
        return nodes
    longest = max(len(places) for places in nodes)
    x = motion.outwards(t, np.stack([np.resize(places, longest) for places in nodes], -1))
    return tuple(x[: len(places), i] for i, places in enumerate(nodes))
