"""Smooth maps ξ → x from the unit interval: the grid is uniform in ξ and graded in x."""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from kolmo.arrays import Array, namespace


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

    def aligned(self, place: float, n: int) -> "Sinh":
        """Map with the place on one of n nodes: the centre moves by less than a cell, the ends stay.

        Examples
        --------
        >>> g = Sinh(0.0, 100.0, centre=10.0, width=1.0).aligned(10.0, 42)
        >>> float(abs(g(np.linspace(0.0, 1.0, 42)) - 10.0).min()) < 1e-9
        True
        """

        def offset(centre: float) -> float:
            return float(Sinh(self.lower, self.upper, centre, self.width).inverse(np.float64(place))) * (n - 1)

        node = round(offset(self.centre))
        cell = float(self.slope(self.inverse(np.float64(place)))) / (n - 1)
        low, high = self.centre - 1.5 * cell, self.centre + 1.5 * cell
        if (offset(low) - node) * (offset(high) - node) > 0:
            return self
        from scipy.optimize import brentq  # not with the package: it takes long to import

        centre = brentq(lambda c: offset(c) - node, low, high, xtol=1e-15 * (self.upper - self.lower))
        return Sinh(self.lower, self.upper, float(centre), self.width)


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
    kinds: dict[str, Any] = {"Uniform": Uniform, "Sinh": Sinh}
    values = dict(record)
    return kinds[values.pop("kind")](**values)  # type: ignore[no-any-return]


def record(grading: Grading) -> dict[str, Any]:
    """Plain dictionary of a map, for saving."""
    return {"kind": type(grading).__name__, **{k: float(v) for k, v in vars(grading).items()}}
