"""Splines of degree seven on unit-spaced nodes: averages over many positions, their transpose and derivatives."""

from functools import cached_property, lru_cache
from math import comb
from typing import Any

import numpy as np
import scipy.sparse as sp

from kolmo.arrays import Array, Held, is_tensor
from kolmo.kernels.cache import compiled
from kolmo.kernels.linear import Factorization, factorize

_jit: Any = compiled()
# sums may be reordered, so that neighbours in memory are added up several at a time
_fast: Any = compiled(fastmath={"reassoc", "contract"})

# What happens beyond an end of an axis: the value at the end, the other end's, or the line through the last two nodes.
CLAMP, WRAP, LINEAR = 0, 1, 2
DEGREE = 7
WIDTH = DEGREE + 1
RECIPROCALS = tuple(1.0 / max(j, 1) for j in range(WIDTH))


@_jit
def _uniform(u: float, w: Any, dw: Any) -> None:
    """The eight B-splines that live in a cell, at its fraction u, and their derivatives (Cox–de Boor)."""
    w[0] = 1.0
    for j in range(1, DEGREE + 1):
        if j == DEGREE:
            dw[0] = -w[0]
            for r in range(1, DEGREE):
                dw[r] = w[r - 1] - w[r]
            dw[DEGREE] = w[DEGREE - 1]
        saved = 0.0
        for r in range(j):
            part = w[r] * RECIPROCALS[j]
            w[r] = saved + (r + 1 - u) * part
            saved = (u + j - r - 1) * part
        w[j] = saved


@_jit
def _basis(z: float, n: int, low: int, high: int, w: Any, dw: Any) -> tuple[int, int]:
    """Weights of the coefficients from ``first`` on at position z, and their derivatives; returns first and count."""
    if n == 1:
        w[0], dw[0] = 1.0, 0.0
        return 0, 1
    if low == WRAP:
        z -= n * np.floor(z / n)
        cell = min(int(z), n - 1)
        _uniform(z - cell, w, dw)
        return cell, WIDTH
    if 0.0 <= z <= n - 1:
        cell = min(int(z), n - 2)
        _uniform(z - cell, w, dw)
        return cell, WIDTH
    # values of the last two nodes, which share eight coefficients
    below = z < 0.0
    slope = 1.0 if (low if below else high) == LINEAR else 0.0
    beyond = slope * (-z if below else z - (n - 1))
    _uniform(0.0 if below else 1.0, w, dw)
    if below:
        for r in range(DEGREE, -1, -1):
            change = (w[r - 1] if r > 0 else 0.0) - w[r]
            w[r] -= beyond * change
            dw[r] = slope * change
        return 0, WIDTH
    for r in range(WIDTH):
        change = w[r] - (w[r + 1] if r < DEGREE else 0.0)
        w[r] += beyond * change
        dw[r] = slope * change
    return n - 2, WIDTH


@_jit
def _reads(z: float, n: int, ends: Any, m: int, w: Any, dw: Any, at: Any) -> Any:
    """Which of m coefficients position z reads and their weights; returns their number."""
    first, count = _basis(z, n, ends[0], ends[1], w, dw)
    for r in range(count):
        at[r] = (first + r) % m
    return count


@_fast
def average(c: Any, shape: Any, ends: Any, positions: Any, weights: Any, out: Any) -> None:
    """``out[i, :] = Σ_q weights[q] s(positions[q, i])`` for the spline s with coefficients c (m0, m1, m2, k).

    Missing axes come first and have length one; positions (q, points, 3) are in nodes; shape (3,) counts nodes; ends
    (3, 2) says what happens beyond the ends.
    """
    m0, m1, m2, columns = c.shape
    flat = c.reshape(-1)
    w, dw, at = np.empty((3, WIDTH)), np.empty(WIDTH), np.empty((3, WIDTH), dtype=np.int64)
    for i in range(positions.shape[1]):
        for k in range(columns):
            out[i, k] = 0.0
        for q in range(positions.shape[0]):
            c0 = _reads(positions[q, i, 0], shape[0], ends[0], m0, w[0], dw, at[0])
            c1 = _reads(positions[q, i, 1], shape[1], ends[1], m1, w[1], dw, at[1])
            c2 = _reads(positions[q, i, 2], shape[2], ends[2], m2, w[2], dw, at[2])
            first = at[2, 0]
            together = columns == 1 and c2 == WIDTH and at[2, WIDTH - 1] == first + WIDTH - 1
            for a in range(c0):
                for b in range(c1):
                    weight = weights[q] * w[0, a] * w[1, b]
                    line = (at[0, a] * m1 + at[1, b]) * m2
                    if together:  # one column, not wrapped: neighbours in memory
                        value = 0.0
                        for e in range(WIDTH):
                            value += w[2, e] * flat[line + first + e]
                        out[i, 0] += weight * value
                    else:
                        for e in range(c2):
                            for k in range(columns):
                                out[i, k] += weight * w[2, e] * flat[(line + at[2, e]) * columns + k]


@_fast
def spread(p: Any, shape: Any, ends: Any, positions: Any, weights: Any, out: Any) -> None:
    """Transpose of ``average``: adds to out (m0, m1, m2, k)."""
    m0, m1, m2, columns = out.shape
    flat = out.reshape(-1)
    w, dw, at = np.empty((3, WIDTH)), np.empty(WIDTH), np.empty((3, WIDTH), dtype=np.int64)
    for i in range(positions.shape[1]):
        for q in range(positions.shape[0]):
            c0 = _reads(positions[q, i, 0], shape[0], ends[0], m0, w[0], dw, at[0])
            c1 = _reads(positions[q, i, 1], shape[1], ends[1], m1, w[1], dw, at[1])
            c2 = _reads(positions[q, i, 2], shape[2], ends[2], m2, w[2], dw, at[2])
            for a in range(c0):
                for b in range(c1):
                    weight = weights[q] * w[0, a] * w[1, b]
                    line = (at[0, a] * m1 + at[1, b]) * m2
                    for e in range(c2):
                        for k in range(columns):
                            flat[(line + at[2, e]) * columns + k] += weight * w[2, e] * p[i, k]


@_fast
def slopes(c: Any, p: Any, shape: Any, ends: Any, positions: Any, weights: Any, out: Any) -> None:
    """``out[q, i, :] = weights[q] Σ_k p[i, k] ∇s_k(positions[q, i])``: derivative with respect to the positions."""
    m0, m1, m2, columns = c.shape
    w, dw, at = np.empty((3, WIDTH)), np.empty((3, WIDTH)), np.empty((3, WIDTH), dtype=np.int64)
    for i in range(positions.shape[1]):
        for q in range(positions.shape[0]):
            c0 = _reads(positions[q, i, 0], shape[0], ends[0], m0, w[0], dw[0], at[0])
            c1 = _reads(positions[q, i, 1], shape[1], ends[1], m1, w[1], dw[1], at[1])
            c2 = _reads(positions[q, i, 2], shape[2], ends[2], m2, w[2], dw[2], at[2])
            x, y, z = 0.0, 0.0, 0.0
            for a in range(c0):
                for b in range(c1):
                    line = c[at[0, a], at[1, b]]
                    for e in range(c2):
                        value = 0.0
                        for k in range(columns):
                            value += p[i, k] * line[at[2, e], k]
                        x += dw[0, a] * w[1, b] * w[2, e] * value
                        y += w[0, a] * dw[1, b] * w[2, e] * value
                        z += w[0, a] * w[1, b] * dw[2, e] * value
            out[q, i, 0], out[q, i, 1], out[q, i, 2] = weights[q] * x, weights[q] * y, weights[q] * z


def _at_nodes(derivative: int) -> np.ndarray:
    """Weights of seven coefficients that give an even derivative of the spline at a node."""
    degree = DEGREE - derivative
    values = np.array([1.0])
    for j in range(2, degree + 1):
        r = np.arange(j)
        padded = np.concatenate([[0.0], values, [0.0]])
        # B-splines of degree j at the integers from those of degree j − 1
        values = ((r + 1) * padded[1 : j + 1] + (j - r) * padded[:j]) / j
    differences = [(-1.0) ** (derivative - j) * comb(derivative, j) for j in range(derivative + 1)]
    return np.convolve(values, differences)


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
