"""Smooth maps ξ → x from the unit interval: the grid is uniform in ξ and graded in x."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Protocol, TypeVar

import numpy as np

from kolmo.arrays import Array, as_like, as_numpy, namespace

# A map of several arsinh is inverted by Newton's method from a table with so many places a centre. After a step of this
# part of the local scale the next one would be its square, which is rounding: one or two do inside the axis, some more
# beyond its ends.
TABLE, NEWTON, CLOSE = 129, 40, 3e-8
# ξ of a node is known to rounding.
ROUNDING = 1e-12


class Grading(Protocol):
    """A smooth increasing map of [0, 1] onto [lower, upper]."""

    @property
    def lower(self) -> float:
        """Position of ξ = 0."""
        ...

    @property
    def upper(self) -> float:
        """Position of ξ = 1."""
        ...

    def __call__(self, xi: Array) -> Array:
        """Position x(ξ)."""
        ...

    def slope(self, xi: Array) -> Array:
        """dx/dξ."""
        ...

    def bend(self, xi: Array) -> Array:
        """d²x/dξ²."""
        ...

    def inverse(self, x: Array) -> Array:
        """ξ(x)."""
        ...

    def extended(self, below: float, above: float) -> "Grading":
        """The map of a longer axis on which this one is the part from ``below`` to 1 − ``above``, in the new ξ."""
        ...


@dataclass(frozen=True)
class Uniform:
    """x = lower + (upper − lower) ξ.

    Examples
    --------
    >>> float(Uniform(0.0, 2.0)(0.25))
    0.5
    """

    lower: float
    upper: float

    def __call__(self, xi: Array) -> Array:
        """Position x(ξ)."""
        return self.lower + (self.upper - self.lower) * xi

    def slope(self, xi: Array) -> Array:
        """dx/dξ."""
        return (self.upper - self.lower) + 0.0 * xi

    def bend(self, xi: Array) -> Array:
        """d²x/dξ² = 0."""
        return 0.0 * xi

    def inverse(self, x: Array) -> Array:
        """ξ(x)."""
        return (x - self.lower) / (self.upper - self.lower)

    def extended(self, below: float, above: float) -> "Uniform":
        """The map of a longer axis."""
        return Uniform(*_longer(self, below, above))


@dataclass(frozen=True)
class Sinh:
    r"""Nodes concentrated around a centre: :math:`x = c + w\sinh(a + (b - a)\xi)`.

    Within the width w of the centre the spacing is nearly uniform; beyond, it grows geometrically.

    Examples
    --------
    >>> g = Sinh(-100.0, 100.0, centre=0.0, width=1.0)
    >>> float(g(0.5)), bool(g.slope(0.5) < 0.1 * g.slope(1.0))
    (0.0, True)
    """

    lower: float
    upper: float
    centre: float
    width: float

    @property
    def _ends(self) -> tuple[float, float]:
        return (
            float(np.arcsinh((self.lower - self.centre) / self.width)),
            float(np.arcsinh((self.upper - self.centre) / self.width)),
        )

    def __call__(self, xi: Array) -> Array:
        """Position x(ξ)."""
        a, b = self._ends
        return self.centre + self.width * namespace(xi).sinh(a + (b - a) * xi)

    def slope(self, xi: Array) -> Array:
        """dx/dξ."""
        a, b = self._ends
        return self.width * (b - a) * namespace(xi).cosh(a + (b - a) * xi)

    def bend(self, xi: Array) -> Array:
        """d²x/dξ²."""
        a, b = self._ends
        return self.width * (b - a) ** 2 * namespace(xi).sinh(a + (b - a) * xi)

    def inverse(self, x: Array) -> Array:
        """ξ(x)."""
        a, b = self._ends
        return (namespace(x).arcsinh((x - self.centre) / self.width) - a) / (b - a)

    def extended(self, below: float, above: float) -> "Sinh":
        """The map of a longer axis."""
        return Sinh(*_longer(self, below, above), self.centre, self.width)

    def aligned(self, place: float, n: int) -> "Sinh":
        """Map with the place on one of n nodes: the centre moves by less than a cell, the ends stay.

        Examples
        --------
        >>> g = Sinh(0.0, 100.0, centre=10.0, width=1.0).aligned(10.0, 42)
        >>> float(abs(g(np.linspace(0.0, 1.0, 42)) - 10.0).min()) < 1e-9
        True
        """
        return _aligned(lambda centre: Sinh(self.lower, self.upper, centre, self.width), self.centre, place, n)


@dataclass(frozen=True)
class Focused:
    r"""Nodes concentrated around several centres.

    .. math:: \xi(x) \propto \sum_k a_k\operatorname{arsinh}((x - c_k)/w_k)

    The density of nodes is :math:`\sum_k (a_k/w_k)/\sqrt{1 + ((x - c_k)/w_k)^2}`: around a centre it is that of the
    feature there, and it falls off geometrically.

    Examples
    --------
    >>> g = Focused(-1.0, 1.0, centres=(-0.5, 0.25), widths=(1.0, 0.01), weights=(1.0, 1.0))
    >>> bool(g.slope(g.inverse(np.float64(0.25))) < 0.1 * g.slope(0.0)), round(float(g(g.inverse(np.float64(0.3)))), 12)
    (True, 0.3)
    """

    lower: float
    upper: float
    centres: tuple[float, ...]
    widths: tuple[float, ...]
    weights: tuple[float, ...]

    def _sum(self, x: Array) -> Array:
        """Σ a arsinh((x − c)/w)."""
        return sum((a * namespace(x).arcsinh((x - c) / w) for c, w, a in self._parts), 0.0 * x)

    def _density(self, x: Array) -> Array:
        """Its derivative."""
        return sum((a / w / namespace(x).sqrt(1.0 + ((x - c) / w) ** 2) for c, w, a in self._parts), 0.0 * x)

    def _change(self, x: Array) -> Array:
        """Its second derivative."""
        return sum((-a * (x - c) / w**3 / (1.0 + ((x - c) / w) ** 2) ** 1.5 for c, w, a in self._parts), 0.0 * x)

    @property
    def _parts(self) -> list[tuple[float, float, float]]:
        return list(zip(self.centres, self.widths, self.weights, strict=True))

    @cached_property
    def ends(self) -> tuple[float, float]:
        """The sum at the two ends."""
        return float(self._sum(np.float64(self.lower))), float(self._sum(np.float64(self.upper)))

    def inverse(self, x: Array) -> Array:
        """ξ(x)."""
        a, b = self.ends
        return (self._sum(x) - a) / (b - a)

    def __call__(self, xi: Array) -> Array:
        """Position x(ξ): from a table, closed in by Newton's method."""
        a, b = self.ends
        wanted = a + (b - a) * as_numpy(xi)
        x = np.asarray(self._table(wanted))
        # beyond the ends the sum is concave or convex: Newton's method from outside its range goes there by itself
        for _ in range(NEWTON):
            slope = self._density(x)
            move = (self._sum(x) - wanted) / slope
            x = x - move
            if not (np.abs(move) * slope > CLOSE).any():
                break
        return as_like(x, xi)

    @cached_property
    def _table(self) -> Any:
        """Position as a function of the sum: cubic between places dense around the centres."""
        from scipy.interpolate import CubicHermiteSpline  # not with the package: it takes long to import

        parts = [np.array([self.lower, self.upper])]
        for c, w in zip(self.centres, self.widths, strict=True):
            low, high = (float(np.arcsinh((end - c) / w)) for end in (self.lower, self.upper))
            parts.append(c + w * np.sinh(np.linspace(low, high, TABLE)))
        x = np.unique(np.clip(np.concatenate(parts), self.lower, self.upper))
        x = x[np.concatenate([[True], np.diff(x) > ROUNDING * (self.upper - self.lower)])]
        return CubicHermiteSpline(self._sum(x), x, 1.0 / self._density(x))

    def slope(self, xi: Array) -> Array:
        """dx/dξ."""
        a, b = self.ends
        return (b - a) / self._density(self(xi))

    def bend(self, xi: Array) -> Array:
        """d²x/dξ²."""
        a, b = self.ends
        x = self(xi)
        return -((b - a) ** 2) * self._change(x) / self._density(x) ** 3

    def aligned(self, place: float, n: int) -> "Focused":
        """Map with the place on one of n nodes: the nearest centre moves by less than a cell, the ends stay."""
        nearest = min(range(len(self.centres)), key=lambda k: abs(self.centres[k] - place))

        def moved(centre: float) -> Focused:
            return replace(self, centres=(*self.centres[:nearest], centre, *self.centres[nearest + 1 :]))

        return _aligned(moved, self.centres[nearest], place, n)

    def extended(self, below: float, above: float) -> "Focused":
        """The map of a longer axis."""
        return Focused(*_longer(self, below, above), self.centres, self.widths, self.weights)


@dataclass(frozen=True)
class Pieces:
    """A map put together at places that get the ξ asked for (a node each): in between it is another, stretched.

    Smooth but at the places, where its slope jumps; ξ there belongs to the piece above.

    Parameters
    ----------
    base : Grading
        The map of each piece.
    places : tuple of float
        Where the pieces meet, increasing.
    knots : tuple of float
        Their ξ, increasing.

    Examples
    --------
    >>> g = Pieces(Uniform(0.0, 1.0), places=(0.3,), knots=(0.5,))
    >>> g(np.array([0.0, 0.5, 1.0])).tolist(), g.slope(np.array([0.4, 0.6])).tolist()
    ([0.0, 0.3, 1.0], [0.6, 1.4])
    """

    base: Grading
    places: tuple[float, ...]
    knots: tuple[float, ...]

    @property
    def lower(self) -> float:
        """Position of ξ = 0."""
        return self.base.lower

    @property
    def upper(self) -> float:
        """Position of ξ = 1."""
        return self.base.upper

    @cached_property
    def _own(self) -> np.ndarray:
        """ξ of the base at the ends of the pieces."""
        return np.array([0.0, *(float(self.base.inverse(np.float64(p))) for p in self.places), 1.0])

    @cached_property
    def _all(self) -> np.ndarray:
        return np.array([0.0, *self.knots, 1.0])

    def _based(self, xi: Array) -> tuple[Array, Array]:
        """ξ of the base, and its slope in ξ."""
        piece = np.searchsorted(np.array(self.knots), as_numpy(xi), side="right")
        rate = as_like((np.diff(self._own) / np.diff(self._all))[piece], xi)
        return as_like(self._own[piece], xi) + (xi - as_like(self._all[piece], xi)) * rate, rate

    def __call__(self, xi: Array) -> Array:
        """Position x(ξ)."""
        x = self.base(self._based(xi)[0])
        for place, knot in zip(self.places, self.knots, strict=True):  # exactly
            x = namespace(x).where(abs(xi - knot) < ROUNDING, as_like(place, x), x)
        return x

    def slope(self, xi: Array) -> Array:
        """dx/dξ."""
        own, rate = self._based(xi)
        return self.base.slope(own) * rate

    def bend(self, xi: Array) -> Array:
        """d²x/dξ²."""
        own, rate = self._based(xi)
        return self.base.bend(own) * rate**2

    def inverse(self, x: Array) -> Array:
        """ξ(x)."""
        piece = np.searchsorted(np.array(self.places), as_numpy(x), side="right")
        rate = as_like((np.diff(self._all) / np.diff(self._own))[piece], x)
        return as_like(self._all[piece], x) + (self.base.inverse(x) - as_like(self._own[piece], x)) * rate

    def extended(self, below: float, above: float) -> "Pieces":
        """The map of a longer axis."""
        low, high = _longer(self, below, above)
        inside = 1.0 - below - above
        knots = tuple(below + inside * knot for knot in self.knots)
        whole = Pieces(self.base, self.places, self.knots)
        reach = [
            float(v)
            for v in (whole._based(np.float64(-below / inside))[0], whole._based(np.float64(1.0 + above / inside))[0])
        ]
        base = self.base.extended(-reach[0] / (reach[1] - reach[0]), (reach[1] - 1.0) / (reach[1] - reach[0]))
        if not isinstance(base, Pieces):
            base = replace(base, lower=low, upper=high)  # type: ignore[type-var]
        return Pieces(base, self.places, knots)


@dataclass(frozen=True)
class Exponential:
    r"""A map of the logarithm of the distance from an end: :math:`x = e + s\,e^{s\,y(\xi)}`, s = 1 above the end e.

    Examples
    --------
    >>> g = Exponential(Uniform(-1.0, 1.0), end=2.0, side=1.0)
    >>> float(g(0.5)), round(float(g.inverse(3.0)), 12)
    (3.0, 0.5)
    """

    base: Grading
    end: float
    side: float

    @property
    def lower(self) -> float:
        """Position of ξ = 0."""
        return float(self._placed(np.float64(self.base.lower)))

    @property
    def upper(self) -> float:
        """Position of ξ = 1."""
        return float(self._placed(np.float64(self.base.upper)))

    def _placed(self, y: Array) -> Array:
        return self.end + self.side * namespace(y).exp(self.side * y)

    def __call__(self, xi: Array) -> Array:
        """Position x(ξ)."""
        return self._placed(self.base(xi))

    def slope(self, xi: Array) -> Array:
        """dx/dξ."""
        return namespace(xi).exp(self.side * self.base(xi)) * self.base.slope(xi)

    def bend(self, xi: Array) -> Array:
        """d²x/dξ²."""
        distance = namespace(xi).exp(self.side * self.base(xi))
        return distance * (self.side * self.base.slope(xi) ** 2 + self.base.bend(xi))

    def inverse(self, x: Array) -> Array:
        """ξ(x)."""
        return self.base.inverse(self.side * namespace(x).log(self.side * (x - self.end)))

    def extended(self, below: float, above: float) -> "Exponential":
        """The map of a longer axis."""
        return Exponential(self.base.extended(below, above), self.end, self.side)


def _longer(grading: Grading, below: float, above: float) -> tuple[float, float]:
    """Ends of the longer axis of ``extended``."""
    inside = 1.0 - below - above
    low = grading.lower if below == 0.0 else float(grading(np.float64(-below / inside)))
    high = grading.upper if above == 0.0 else float(grading(np.float64(1.0 + above / inside)))
    return low, high


def chart(grading: Grading, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ξ(x) with slope and bend of the map there; of a Sinh for the price of one arcsinh.

    Examples
    --------
    >>> g, x = Sinh(-3.0, 5.0, centre=0.3, width=0.7), np.array([-1.0, 4.0])
    >>> xi = g.inverse(x)
    >>> [bool(np.allclose(a, b)) for a, b in zip(chart(g, x), (xi, g.slope(xi), g.bend(xi)), strict=True)]
    [True, True, True]
    """
    xi = np.asarray(grading.inverse(x))
    if isinstance(grading, Sinh):
        a, b = grading._ends
        off = x - grading.centre
        return xi, (b - a) * np.sqrt(grading.width**2 + off * off), (b - a) ** 2 * off
    return xi, np.asarray(grading.slope(xi)), np.asarray(grading.bend(xi))


def from_record(record: dict[str, Any]) -> Grading:
    """Rebuild a map from the plain dictionary that ``record`` made."""
    kinds: dict[str, Any] = {kind.__name__: kind for kind in (Uniform, Sinh, Focused, Pieces, Exponential)}
    values: dict[str, Any] = {n: tuple(v) if isinstance(v, (list, np.ndarray)) else v for n, v in record.items()}
    if "base" in values:
        values["base"] = from_record(values["base"])
    return kinds[values.pop("kind")](**values)  # type: ignore[no-any-return]


def record(grading: Grading) -> dict[str, Any]:
    """Plain dictionary of a map, for saving."""
    names = [f.name for f in fields(grading)]  # type: ignore[arg-type]
    values = {name: getattr(grading, name) for name in names}
    plain = {
        name: record(v) if name == "base" else [float(x) for x in v] if isinstance(v, tuple) else float(v)
        for name, v in values.items()
    }
    return {"kind": type(grading).__name__, **plain}


Centred = TypeVar("Centred", Sinh, Focused)


def _aligned(moved: Callable[[float], Centred], centre: float, place: float, n: int) -> Centred:
    """The map of a family, its centre moved by a cell and a half at most, with a node at a place if that can be."""

    def offset(centre: float) -> float:
        return float(moved(centre).inverse(np.float64(place))) * (n - 1)

    own = moved(centre)
    node = round(offset(centre))
    cell = float(own.slope(own.inverse(np.float64(place)))) / (n - 1)
    low, high = centre - 1.5 * cell, centre + 1.5 * cell
    if (offset(low) - node) * (offset(high) - node) > 0:
        return own
    from scipy.optimize import brentq  # not with the package: it takes long to import

    return moved(float(brentq(lambda c: offset(c) - node, low, high, xtol=1e-15 * (own.upper - own.lower))))
