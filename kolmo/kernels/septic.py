"""Splines of degree seven on unit-spaced nodes: averages over many positions, their transpose and derivatives."""

from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.polynomial import polynomial

from kolmo.arrays import Array, Held, is_tensor
from kolmo.kernels.bspline import pieces
from kolmo.kernels.cache import compiled
from kolmo.kernels.linear import Factorization, factorize

_jit: Any = compiled()
# sums may be reordered, so that neighbours in memory are added up several at a time
_fast: Any = compiled(fastmath={"reassoc", "contract"})

# What happens beyond an end of an axis: the value at the end, the other end's, or the line through the last two nodes.
CLAMP, WRAP, LINEAR = 0, 1, 2
DEGREE = 7
WIDTH = DEGREE + 1


# In powers of u − ½. All eight by Horner's rule, side by side: from one to the next each would wait for the one before.
PIECES = pieces(DEGREE, 0.5)
SLOPES = np.arange(1.0, WIDTH)[:, None] * PIECES[1:]


@_fast
def _uniform(u: float, axis: int, w: Any, dw: Any) -> None:
    """The eight B-splines that live in a cell, at its fraction u; their derivatives where there is room for them."""
    v = u - 0.5
    for r in range(WIDTH):
        w[axis, r] = PIECES[DEGREE, r]
    for power in range(DEGREE - 1, -1, -1):
        for r in range(WIDTH):
            w[axis, r] = w[axis, r] * v + PIECES[power, r]
    if dw.shape[0] > 0:
        for r in range(WIDTH):
            dw[axis, r] = SLOPES[DEGREE - 1, r]
        for power in range(DEGREE - 2, -1, -1):
            for r in range(WIDTH):
                dw[axis, r] = dw[axis, r] * v + SLOPES[power, r]


@_jit
def _basis(z: float, n: int, low: int, high: int, axis: int, w: Any, dw: Any) -> tuple[int, int]:
    """Weights of the coefficients from ``first`` on at position z, and their derivatives; returns first and count."""
    slopes = dw.shape[0] > 0
    if n == 1:
        w[axis, 0] = 1.0
        if slopes:
            dw[axis, 0] = 0.0
        return 0, 1
    if low == WRAP:
        z -= n * np.floor(z / n)
        cell = min(int(z), n - 1)
        _uniform(z - cell, axis, w, dw)
        return cell, WIDTH
    if 0.0 <= z <= n - 1:
        cell = min(int(z), n - 2)
        _uniform(z - cell, axis, w, dw)
        return cell, WIDTH
    # values of the last two nodes, which share eight coefficients
    below = z < 0.0
    slope = 1.0 if (low if below else high) == LINEAR else 0.0
    beyond = slope * (-z if below else z - (n - 1))
    _uniform(0.0 if below else 1.0, axis, w, dw)
    if below:
        for r in range(DEGREE, -1, -1):
            change = (w[axis, r - 1] if r > 0 else 0.0) - w[axis, r]
            w[axis, r] -= beyond * change
            if slopes:
                dw[axis, r] = slope * change
        return 0, WIDTH
    for r in range(WIDTH):
        change = w[axis, r] - (w[axis, r + 1] if r < DEGREE else 0.0)
        w[axis, r] += beyond * change
        if slopes:
            dw[axis, r] = slope * change
    return n - 2, WIDTH


@_fast
def average(c: Any, shape: Any, ends: Any, positions: Any, weights: Any, out: Any) -> None:
    """``out[i, :] = Σ_q weights[q] s(positions[q, i])`` for the spline s with coefficients c (m0, m1, m2, k).

    Missing axes come first and have length one; positions (q, points, 3) are in nodes; shape (3,) counts nodes; ends
    (3, 2) says what happens beyond the ends.
    """
    m0, m1, m2, columns = c.shape
    flat = c.reshape(-1)
    w, none = np.empty((3, WIDTH)), np.empty((0, 0))
    for i in range(positions.shape[1]):
        for k in range(columns):
            out[i, k] = 0.0
        for q in range(positions.shape[0]):
            first0, c0 = _basis(positions[q, i, 0], shape[0], ends[0, 0], ends[0, 1], 0, w, none)
            first1, c1 = _basis(positions[q, i, 1], shape[1], ends[1, 0], ends[1, 1], 1, w, none)
            first2, c2 = _basis(positions[q, i, 2], shape[2], ends[2, 0], ends[2, 1], 2, w, none)
            if columns == 1 and c2 == WIDTH and first2 + WIDTH <= m2:  # not wrapped: neighbours in memory
                total = 0.0
                for a in range(c0):
                    for b in range(c1):
                        line = (_around(first0 + a, m0) * m1 + _around(first1 + b, m1)) * m2 + first2
                        value = 0.0
                        for e in range(WIDTH):
                            value += w[2, e] * flat[line + e]
                        total += w[0, a] * w[1, b] * value
                out[i, 0] += weights[q] * total
                continue
            for a in range(c0):
                for b in range(c1):
                    weight = weights[q] * w[0, a] * w[1, b]
                    line = (_around(first0 + a, m0) * m1 + _around(first1 + b, m1)) * m2
                    for e in range(c2):
                        at = (line + _around(first2 + e, m2)) * columns
                        for k in range(columns):
                            out[i, k] += weight * w[2, e] * flat[at + k]


@_jit
def _around(at: Any, m: Any) -> Any:
    """A coefficient of m on a circle; divisions would cost more than all of the weights."""
    return at - m if at >= m else at


@_fast
def spread(p: Any, shape: Any, ends: Any, positions: Any, weights: Any, out: Any) -> None:
    """Transpose of ``average``: adds to out (m0, m1, m2, k)."""
    m0, m1, m2, columns = out.shape
    flat = out.reshape(-1)
    w, none = np.empty((3, WIDTH)), np.empty((0, 0))
    for i in range(positions.shape[1]):
        for q in range(positions.shape[0]):
            first0, c0 = _basis(positions[q, i, 0], shape[0], ends[0, 0], ends[0, 1], 0, w, none)
            first1, c1 = _basis(positions[q, i, 1], shape[1], ends[1, 0], ends[1, 1], 1, w, none)
            first2, c2 = _basis(positions[q, i, 2], shape[2], ends[2, 0], ends[2, 1], 2, w, none)
            for a in range(c0):
                for b in range(c1):
                    weight = weights[q] * w[0, a] * w[1, b]
                    line = (_around(first0 + a, m0) * m1 + _around(first1 + b, m1)) * m2
                    for e in range(c2):
                        at = (line + _around(first2 + e, m2)) * columns
                        for k in range(columns):
                            flat[at + k] += weight * w[2, e] * p[i, k]


@_fast
def slopes(c: Any, p: Any, shape: Any, ends: Any, positions: Any, weights: Any, out: Any) -> None:
    """``out[q, i, :] = weights[q] Σ_k p[i, k] ∇s_k(positions[q, i])``: derivative with respect to the positions."""
    m0, m1, m2, columns = c.shape
    w, dw = np.empty((3, WIDTH)), np.empty((3, WIDTH))
    for i in range(positions.shape[1]):
        for q in range(positions.shape[0]):
            first0, c0 = _basis(positions[q, i, 0], shape[0], ends[0, 0], ends[0, 1], 0, w, dw)
            first1, c1 = _basis(positions[q, i, 1], shape[1], ends[1, 0], ends[1, 1], 1, w, dw)
            first2, c2 = _basis(positions[q, i, 2], shape[2], ends[2, 0], ends[2, 1], 2, w, dw)
            x, y, z = 0.0, 0.0, 0.0
            for a in range(c0):
                for b in range(c1):
                    line = c[_around(first0 + a, m0), _around(first1 + b, m1)]
                    for e in range(c2):
                        at = _around(first2 + e, m2)
                        value = 0.0
                        for k in range(columns):
                            value += p[i, k] * line[at, k]
                        x += dw[0, a] * w[1, b] * w[2, e] * value
                        y += w[0, a] * dw[1, b] * w[2, e] * value
                        z += w[0, a] * w[1, b] * dw[2, e] * value
            out[q, i, 0], out[q, i, 1], out[q, i, 2] = weights[q] * x, weights[q] * y, weights[q] * z


def _at_nodes(derivative: int) -> np.ndarray:
    """Weights of seven coefficients that give an even derivative of the spline at a node."""
    return np.asarray(polynomial.polyval(-0.5, polynomial.polyder(PIECES, derivative)))[:DEGREE]


class Prefilter:
    """Takes values at n nodes to the coefficients of the spline through them, in NumPy or torch.

    At an end the second derivative is that of the parabola through four nodes, the fourth and sixth vanish. Not-a-knot
    ends would be more accurate, and make repeated interpolation unstable.

    Parameters
    ----------
    n : int
        Number of nodes, at least 4 (periodic: 8).
    periodic : bool
        Whether the ends are joined.

    Examples
    --------
    >>> x = np.linspace(0.0, 1.0, 8)[:, None]
    >>> filter = Prefilter(8, periodic=False)
    >>> c, out = filter.apply(x**2), np.empty((1, 1))
    >>> where = np.array([[[0.0, 0.0, 3.5]]])
    >>> shape, ends = np.array([1, 1, 8]), np.zeros((3, 2), dtype=np.int64)
    >>> average(c.reshape(1, 1, -1, 1), shape, ends, where, np.ones(1), out)
    >>> abs(out.item() - 0.25) < 1e-14
    True
    """

    def __init__(self, n: int, periodic: bool) -> None:
        value = _at_nodes(0)
        self.size = n if periodic else n + DEGREE - 1
        matrix, right = sp.lil_matrix((self.size, self.size)), sp.lil_matrix((self.size, n))
        ends = 0 if periodic else (DEGREE - 1) // 2
        for i in range(n):
            for r, w in enumerate(value):
                matrix[ends + i, (i + r) % self.size] += w
            right[ends + i, i] = 1.0
        for m in range(ends):
            weights = _at_nodes(2 * m + 2)
            matrix[m, :DEGREE] = weights
            matrix[-1 - m, -DEGREE:] = weights[::-1]
        if ends:
            right[0, :4], right[-1, -4:] = [2.0, -5.0, 4.0, -1.0], [-1.0, 4.0, -5.0, 2.0]
        self._right = sp.csr_matrix(right)
        self._solver: Factorization = factorize(sp.csr_matrix(matrix))

    @cached_property
    def _dense(self) -> Held:
        """The map as a matrix (size, n): on a GPU a product costs less than a solve from node to node."""
        return Held(self.apply(np.eye(self._right.shape[1])))

    def apply(self, u: Array) -> Array:
        """Coefficients (size, columns) of values (n, columns)."""
        if is_tensor(u):
            return self._dense.like(u) @ u
        return self._solver.solve(np.asarray(self._right @ u))

    def apply_transposed(self, c: Array) -> Array:
        """The transposed map, (size, columns) to (n, columns)."""
        if is_tensor(c):
            return self._dense.like(c).T @ c
        return np.asarray(self._right.T @ self._solver.solve(np.ascontiguousarray(c), transposed=True))


@lru_cache(maxsize=64)
def prefilter(n: int, periodic: bool) -> Prefilter:
    """The filter for n nodes; kept."""
    return Prefilter(n, periodic)
