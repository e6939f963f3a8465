"""One-dimensional difference operators of any order on a uniform grid, with closures that know the kind of face."""

import itertools
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import scipy.sparse as sp

# What a closure can assume about u at an end of the axis:
CUT = "cut"  # nothing (open faces): central stencils that narrow towards the end
FREE = "free"  # the equation (natural) or a value (absorbing) holds there: one-sided stencils of full order
SLOPE = "slope"  # the derivative is known (reflecting, elastic): stencils that use it
WRAP = "wrap"  # periodic


@dataclass(frozen=True)
class Differences:
    """Difference matrices of one axis in units of its spacing h (divide by h, h²).

    Attributes
    ----------
    first, second : csr_matrix, shape (n, n)
        First and second derivative; at ends of kind "slope" the part that multiplies the known slope is split off. At
        a break: the second derivative there as seen from above (first) and from below (second), without its slope.
    first_slope, second_slope : ndarray, shape (n, 2)
        Weights of h·du/dξ at the low and high end.
    cross : csr_matrix, shape (n, n)
        First derivative that uses no slope, for mixed derivatives.
    """

    first: sp.csr_matrix
    second: sp.csr_matrix
    first_slope: np.ndarray
    second_slope: np.ndarray
    cross: sp.csr_matrix


def stencil_weights(offsets: np.ndarray, derivative: int, slope_at: float | None = None) -> tuple[np.ndarray, float]:
    """Weights of node values (and of one known slope) that give a derivative at zero, exact on polynomials.

    Parameters
    ----------
    offsets : ndarray
        Positions of the nodes relative to where the derivative is wanted.
    derivative : int
        Order of the derivative, at zero.
    slope_at : float, optional
        Position where the first derivative is known.

    Examples
    --------
    >>> stencil_weights(np.array([-1.0, 0.0, 1.0]), 2)[0].round(12).tolist()
    [1.0, -2.0, 1.0]
    """
    m = len(offsets) + (slope_at is not None)
    powers = np.arange(m)
    rows = [offsets**j for j in powers]
    if slope_at is not None:
        rows = [np.append(row, 0.0 if j == 0 else j * slope_at ** (j - 1)) for j, row in zip(powers, rows, strict=True)]
    target = np.zeros(m)
    target[derivative] = 1.0 if derivative == 0 else float(np.prod(np.arange(1, derivative + 1)))
    weights = np.linalg.solve(np.array(rows), target)
    return (weights, 0.0) if slope_at is None else (weights[:-1], float(weights[-1]))


@lru_cache(maxsize=256)
def differences(n: int, order: int, low: str, high: str, breaks: tuple[int, ...] = ()) -> Differences:
    """Difference operators of the given even order on n nodes, with closures for the two ends.

    At ``breaks`` (nodes at which the second derivative may jump) no stencil reaches across: rows beside a break use
    nodes on their own side of it.

    Raises
    ------
    ValueError
        If there are too few nodes for the stencils.
    """
    reach = order // 2
    if n < order + 3:
        raise ValueError(f"an axis with {n} nodes is too short for order {order}: needs {order + 3}")
    first, second, cross = _Rows(n), _Rows(n), _Rows(n)
    first_slope, second_slope = np.zeros((n, 2)), np.zeros((n, 2))
    central = np.arange(-reach, reach + 1)
    inside = np.arange(n) if low == WRAP else np.arange(reach, n - reach)
    for matrix, m in ((first, 1), (second, 2), (cross, 1)):
        matrix.add(inside, (inside[:, None] + central) % n, stencil_weights(central.astype(float), m)[0])
    for side, j in itertools.product((0, 1), range(0 if low == WRAP else reach)):
        # work at the low end; the high end is its mirror image
        kind, sign, end = (low, 1, 0) if side == 0 else (high, -1, n - 1)
        for matrix, m, slopes in ((first, 1, first_slope), (second, 2, second_slope), (cross, 1, None)):
            offsets, known = _closure(kind if slopes is not None else _without_slope(kind), j, m, order)
            weights, slope = stencil_weights(offsets, m, -float(j) if known else None)
            row, columns = end + sign * j, end + sign * (offsets + j).astype(int)
            matrix.add(np.array([row]), columns[None], weights * (sign if m == 1 else 1.0))
            if slopes is not None:
                slopes[row, side] = slope * (1.0 if m == 1 else sign)
    plain = Differences(first.matrix(), second.matrix(), first_slope, second_slope, cross.matrix())
    return _broken(plain, order, breaks) if breaks else plain


@lru_cache(maxsize=8)
def slope_weight(order: int) -> float:
    """Weight of the slope at a break in the second difference there, as seen from below (from above: its negative)."""
    offsets, _ = _closure(SLOPE, 0, 2, order)
    return -stencil_weights(offsets, 2, 0.0)[1]


def _broken(D: Differences, order: int, breaks: tuple[int, ...]) -> Differences:
    """The operators with stencils that do not reach across the breaks."""
    matrices = [D.first.tolil(), D.second.tolil(), D.cross.tolil()]
    for node in breaks:
        for sign in (-1, 1):
            for j in range(1, order // 2):
                for matrix, m in zip(matrices, (1, 2, 1), strict=True):
                    offsets, _ = _closure(FREE, j, m, order)
                    weights, _ = stencil_weights(offsets, m)
                    _put(matrix, node + sign * j, node + sign * (offsets + j), weights * (sign if m == 1 else 1.0))
            # the second derivative at the break as seen from this side, without the part of the slope
            offsets, _ = _closure(SLOPE, 0, 2, order)
            weights, _ = stencil_weights(offsets, 2, 0.0)
            _put(matrices[0 if sign == 1 else 1], node, node + sign * offsets, weights)
        # mixed derivatives: the mean of the slopes as seen from both sides
        offsets, _ = _closure(FREE, 0, 1, order)
        weights = 0.5 * stencil_weights(offsets, 1)[0]
        around = np.concatenate([-offsets[:0:-1], offsets])
        _put(matrices[2], node, node + around, np.concatenate([-weights[:0:-1], [0.0], weights[1:]]))
    first, second, cross = (sp.csr_matrix(matrix) for matrix in matrices)
    return Differences(first, second, D.first_slope, D.second_slope, cross)


def _put(matrix: sp.lil_matrix, row: int, columns: np.ndarray, weights: np.ndarray) -> None:
    """Replace a row."""
    matrix[row] = 0.0
    matrix[row, columns.astype(int)] = weights


class _Rows:
    """A sparse matrix of n rows, given some rows at a time."""

    def __init__(self, n: int) -> None:
        self._n = n
        self._rows: list[np.ndarray] = []
        self._columns: list[np.ndarray] = []
        self._values: list[np.ndarray] = []

    def add(self, rows: np.ndarray, columns: np.ndarray, values: np.ndarray) -> None:
        """Rows of these numbers: columns of shape (rows, width), values of that shape or one for all rows."""
        self._rows.append(np.repeat(rows, columns.shape[1]))
        self._columns.append(columns.ravel())
        self._values.append(np.broadcast_to(values, columns.shape).ravel())

    def matrix(self) -> sp.csr_matrix:
        """All of them."""
        values, rows, columns = (np.concatenate(part) for part in (self._values, self._rows, self._columns))
        matrix = sp.csr_matrix((values, (rows, columns)), shape=(self._n, self._n))
        matrix.eliminate_zeros()
        return matrix


def _without_slope(kind: str) -> str:
    return FREE if kind == SLOPE else kind


def _closure(kind: str, j: int, derivative: int, order: int) -> tuple[np.ndarray, bool]:
    """Offsets of the stencil of row j (counted from the end), and whether the known slope is used."""
    if kind == CUT:
        reach = max(j, 1)
        if j == 0:
            return np.arange(0.0, 3.0), False
        return np.arange(-reach, reach + 1.0), False
    if kind == SLOPE:
        if j == 0 and derivative == 1:
            return np.zeros(1), True
        return np.arange(0.0, order + derivative - 1 + 1) - j, True
    return np.arange(0.0, order + derivative) - j, False


def symbol_bounds(order: int) -> tuple[float, float]:
    """Largest modulus of the symbol of the central first and second difference of an even order, for step bounds.

    Examples
    --------
    >>> [round(v, 3) for v in symbol_bounds(2)]
    [1.0, 4.0]
    """
    theta = np.linspace(0.0, np.pi, 2001)
    central = np.arange(-(order // 2), order // 2 + 1)
    symbols = [
        np.abs(np.exp(1j * np.outer(theta, central)) @ stencil_weights(central.astype(float), m)[0]) for m in (1, 2)
    ]
    return float(symbols[0].max()), float(symbols[1].max())


@lru_cache(maxsize=64)
def spectral_radii(order: int, low: str, high: str) -> tuple[float, float]:
    """Spectral radii of the first and second difference with their closures, in units of h and h².

    At a break stencils close as at a free end.
    """
    D = differences(max(4 * order, 24), order, low, high)
    return tuple(float(np.abs(np.linalg.eigvals(M.toarray())).max()) for M in (D.first, D.second))  # type: ignore[return-value]
