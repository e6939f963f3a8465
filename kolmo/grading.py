"""Smooth maps ξ → x from the unit interval: the grid is uniform in ξ and graded in x."""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from kolmo.arrays import Array, as_like, as_numpy, namespace

# Positions on ``Foci``: points of the table for each centre, and Newton steps from there; each squares the error, which
# in the table is at most a part in (TABLE / log(box / width))².
TABLE, NEWTON = 129, 4


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

    @property
    def depth(self) -> float:
        """Length of the axis in units of the width of its finest place, as its nodes see it; 1 where it is even."""
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

    @property
    def depth(self) -> float:
        """Length of the axis in units of the width of its finest place."""
        return 1.0


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

    @property
    def depth(self) -> float:
        """Length of the axis in units of the width of its finest place, as its nodes see it."""
        a, b = self._ends
        return b - a

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


@dataclass(frozen=True)
class Foci:
    r"""Nodes concentrated around several centres: :math:`\xi(x) \propto \sum_k\operatorname{arsinh}((x - c_k)/w_k)`.

    With one centre this is ``Sinh``; each further one adds the nodes that it would have alone.

    Examples
    --------
    >>> g = Foci(0.0, 10.0, centres=(1.0, 9.0), widths=(0.1, 0.5))
    >>> x = g(np.linspace(0.0, 1.0, 101))
    >>> bool(np.allclose(g.inverse(x), np.linspace(0.0, 1.0, 101), atol=1e-14)), bool(g.slope(0.0) > g.slope(0.3))
    (True, True)
    """

    lower: float
    upper: float
    centres: tuple[float, ...]
    widths: tuple[float, ...]

    def __call__(self, xi: Array) -> Array:
        """Position x(ξ), by Newton's method from a table."""
        low, high = self._sum(np.float64(self.lower)), self._sum(np.float64(self.upper))
        wanted = low + (high - low) * xi
        x, target = self._near(as_numpy(wanted)), as_numpy(wanted)
        for _ in range(NEWTON):
            x = x - (self._sum(x) - target) / self._crowding(x)
        x = as_like(x, xi)
        # the last step in the library of ξ: it carries the gradient
        return x - (self._sum(x) - wanted) / self._crowding(x)

    def slope(self, xi: Array) -> Array:
        """dx/dξ."""
        return self._span / self._crowding(self(xi))

    def bend(self, xi: Array) -> Array:
        """d²x/dξ²."""
        x = self(xi)
        change = sum((c - x) / ((x - c) ** 2 + w**2) ** 1.5 for c, w in zip(self.centres, self.widths, strict=True))
        return -change * self._span**2 / self._crowding(x) ** 3

    def inverse(self, x: Array) -> Array:
        """ξ(x)."""
        return (self._sum(x) - self._sum(np.float64(self.lower))) / self._span

    @property
    def depth(self) -> float:
        """Length of the axis in units of the width of its finest place, as its nodes see it."""
        crowding = [float(self._crowding(np.float64(c))) for c in self.centres]
        return max(self._span / (d * w) for d, w in zip(crowding, self.widths, strict=True))

    @property
    def _span(self) -> float:
        return float(self._sum(np.float64(self.upper)) - self._sum(np.float64(self.lower)))

    def _sum(self, x: Array) -> Array:
        return sum(namespace(x).arcsinh((x - c) / w) for c, w in zip(self.centres, self.widths, strict=True))

    def _crowding(self, x: Array) -> Array:
        """Derivative of the sum: how close nodes lie."""
        return sum(((x - c) ** 2 + w**2) ** -0.5 for c, w in zip(self.centres, self.widths, strict=True))

    def _near(self, wanted: np.ndarray) -> np.ndarray:
        """Positions from a table whose points lie as the nodes do."""
        reach = self.upper - self.lower
        parts = [
            c + w * np.sinh(np.linspace(-1.0, 1.0, TABLE) * np.arcsinh(2.0 * reach / w))
            for c, w in zip(self.centres, self.widths, strict=True)
        ]
        x = np.unique(np.concatenate(parts))
        return np.asarray(np.interp(wanted, self._sum(x), x))


def from_record(record: dict[str, Any]) -> Grading:
    """Rebuild a map from the plain dictionary that ``record`` made."""
    kinds: dict[str, Any] = {"Uniform": Uniform, "Sinh": Sinh, "Foci": Foci}
    values = {k: tuple(v) if isinstance(v, (list, tuple)) else v for k, v in record.items() if k != "kind"}
    return kinds[record["kind"]](**values)  # type: ignore[no-any-return]


def record(grading: Grading) -> dict[str, Any]:
    """Plain dictionary of a map, for saving."""
    plain = {k: [float(e) for e in v] if isinstance(v, tuple) else float(v) for k, v in vars(grading).items()}
    return {"kind": type(grading).__name__, **plain}
