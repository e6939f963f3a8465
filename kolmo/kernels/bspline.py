"""Uniform B-splines of odd degree on boxes in one to three dimensions: interpolation, and averages over many points."""

from functools import lru_cache
from math import comb
from typing import Any

import numpy as np
from scipy.linalg import solve_banded

from kolmo.kernels.cache import compiled

_jit: Any = compiled()
# sums may be reordered, so that neighbours in memory are added up several at a time
_fast: Any = compiled(fastmath={"reassoc", "contract"})
_DENSE = 400  # up to this many nodes the interpolation matrix is inverted once and applied by BLAS


@_jit
def _basis(u: float, degree: int, b: Any) -> None:
    """Values at fraction u of a cell of the degree + 1 uniform B-splines that live there (Cox–de Boor)."""
    b[0] = 1.0
    for j in range(1, degree + 1):
        inverse = 1.0 / j
        saved = 0.0
        for r in range(j):
            part = b[r] * inverse
            b[r] = saved + (r + 1 - u) * part
            saved = (u + j - r - 1) * part
        b[j] = saved


@_jit
def average(coefficients: Any, lower: Any, inverse: Any, degree: Any, points: Any, weights: Any, out: Any) -> None:
    """``out[i, :] = Σ_q weights[q] s(points[q, i, :])`` for the spline s; points outside the box are moved to its face.

    Coefficients have shape (n0, n1, n2, k): missing axes have length one and degree 0 (and any coordinate).
    """
    n_weights, n_points = points.shape[0], points.shape[1]
    columns = coefficients.shape[3]
    b0, b1, b2 = np.empty(degree[0] + 1), np.empty(degree[1] + 1), np.empty(degree[2] + 1)
    first = np.empty(3, np.int64)
    for i in range(n_points):
        for k in range(columns):
            out[i, k] = 0.0
        for q in range(n_weights):
            for axis in range(3):
                b = b0 if axis == 0 else b1 if axis == 1 else b2
                if degree[axis] == 0:
                    first[axis] = 0
                    b[0] = 1.0
                    continue
                cells = coefficients.shape[axis] - degree[axis]
                z = min(max((points[q, i, axis] - lower[axis]) * inverse[axis], 0.0), float(cells))
                cell = min(int(z), cells - 1)
                first[axis] = cell
                _basis(z - cell, degree[axis], b)
            for c0 in range(degree[0] + 1):
                for c1 in range(degree[1] + 1):
                    w = weights[q] * b0[c0] * b1[c1]
                    row = coefficients[first[0] + c0, first[1] + c1]
                    if columns == 1:
                        total = 0.0
                        for c2 in range(degree[2] + 1):
                            total += b2[c2] * row[first[2] + c2, 0]
                        out[i, 0] += w * total
                    else:
                        for c2 in range(degree[2] + 1):
                            ww = w * b2[c2]
                            for k in range(columns):
                                out[i, k] += ww * row[first[2] + c2, k]


@_jit
def average_matrix(nodes: int, lower: float, inverse: float, degree: int, points: Any, weights: Any, out: Any) -> None:
    """``out[i, :]``: row that maps coefficients of a line to ``Σ_q weights[q] s(points[q, i])``."""
    b = np.empty(degree + 1)
    cells = nodes - 1
    out[:, :] = 0.0
    for i in range(points.shape[1]):
        for q in range(points.shape[0]):
            z = min(max((points[q, i] - lower) * inverse, 0.0), float(cells))
            cell = min(int(z), cells - 1)
            _basis(z - cell, degree, b)
            for c in range(degree + 1):
                out[i, cell + c] += weights[q] * b[c]


def _bands(nodes: int, degree: int) -> np.ndarray:
    """Collocation at the nodes with not-a-knot ends, as LAPACK bands (degree + 1 on each side)."""
    size, ends, width = nodes + degree - 1, (degree - 1) // 2, degree + 1
    bands = np.zeros((2 * width + 1, size))
    b = np.empty(degree + 1)
    _basis(0.0, degree, b)
    jump = [(-1) ** r * comb(degree + 1, r) / comb(degree + 1, width // 2) for r in range(degree + 2)]
    for i in range(ends):  # the top derivative does not jump at the first and last inner knots
        for r in range(degree + 2):
            bands[width + i - (i + r), i + r] = jump[r]
            row, column = size - 1 - i, size - 1 - (i + r)
            bands[width + row - column, column] = jump[r]
    for i in range(nodes):
        for r in range(degree):
            bands[width + (ends + i) - (i + r), i + r] = b[r]
    return bands


@lru_cache(maxsize=256)
def _inverse(nodes: int, degree: int) -> np.ndarray:
    """Matrix that takes values at the nodes to coefficients."""
    return _solved(np.eye(nodes), degree)


def _solved(values: np.ndarray, degree: int) -> np.ndarray:
    """Coefficients of the spline through values (nodes, columns)."""
    nodes, ends, width = len(values), (degree - 1) // 2, degree + 1
    right = np.pad(values, ((ends, ends), (0, 0)))
    return np.asarray(solve_banded((width, width), _bands(nodes, degree), right))


def interpolation(values: np.ndarray, degree: int) -> np.ndarray:
    """Coefficients of the not-a-knot spline through values along axis 0; at least degree + 2 nodes.

    Examples
    --------
    >>> x = np.linspace(0.0, 1.0, 12)
    >>> c = interpolation(x[:, None] ** 5, 5)
    >>> row = np.empty((1, 16)); average_matrix(12, 0.0, 11.0, 5, np.array([[0.3]]), np.ones(1), row)
    >>> abs(row @ c - 0.3**5).item() < 1e-14
    True
    """
    nodes = values.shape[0]
    flat = values.reshape(nodes, -1)
    c = _inverse(nodes, degree) @ flat if nodes <= _DENSE else _solved(flat, degree)
    return c.reshape(-1, *values.shape[1:])


def periodic_interpolation(values: np.ndarray, degree: int) -> np.ndarray:
    """Coefficients of the periodic spline through values along axis 0 (one cell more than there are gaps).

    Examples
    --------
    >>> c = periodic_interpolation(np.cos(2 * np.pi * np.arange(16.0) / 16), 5)
    >>> c.shape, bool(np.allclose(c[:5], c[-5:]))
    ((21,), True)
    """
    n = values.shape[0]
    b = np.empty(degree + 1)
    _basis(0.0, degree, b)
    row = np.zeros(n)
    np.add.at(row, np.arange(degree + 1) % n, b)
    # a circulant system: node i reads the coefficients from i on
    symbol = np.conj(np.fft.fft(row)).reshape(-1, *[1] * (values.ndim - 1))
    c = np.fft.ifft(np.fft.fft(values, axis=0) / symbol, axis=0).real
    return np.asarray(c[np.arange(n + degree) % n])


@_jit
def _derivatives(u: float, degree: int, scale: float, b: Any, b1: Any, b2: Any) -> None:
    """Values and first and second derivatives of the B-splines of a cell: differences of those of lower degree."""
    _basis(u, degree - 2, b)
    b2[:] = 0.0
    b1[:] = 0.0
    for j in range(degree - 1):
        b2[j] += b[j] * scale * scale
        b2[j + 1] -= 2.0 * b[j] * scale * scale
        b2[j + 2] += b[j] * scale * scale
    _basis(u, degree - 1, b)
    for j in range(degree):
        b1[j] -= b[j] * scale
        b1[j + 1] += b[j] * scale
    _basis(u, degree, b)


def pieces(degree: int, centre: float) -> np.ndarray:
    """Coefficients (powers of u − centre, splines) of the B-splines that live in a cell, as functions of u in it."""
    u = np.polynomial.Polynomial([centre, 1.0])
    found = [np.polynomial.Polynomial([1.0])]
    for j in range(1, degree + 1):  # Cox–de Boor
        below, above = [0.0 * u, *found], [*found, 0.0 * u]
        found = [((u + (j - r)) * below[r] + (r + 1 - u) * above[r]) / j for r in range(j + 1)]
    return np.stack([np.pad(p.coef, (0, degree + 1 - len(p.coef))) for p in found], 1)


# One row per power of u; the coefficients are multiples of 1/120.
QUINTIC = tuple(map(tuple, (np.round(120.0 * pieces(5, 0.0)) / 120.0).tolist()))


@_fast
def generator(c: Any, images: int, z: Any, slope: Any, bend: Any, beyond: Any, b: Any, S: Any, value: Any) -> None:
    """Values of k quintic splines s on a graded grid, and the image of the first of them under a generator.

    Coefficients have shape (k, n0, n1, n2): in d < 3 dimensions the first axes have length one. Per axis, shape (n, d):
    positions z in nodes, moved to the ends of the axis; the map's slope and bend there, in nodes; and how far x is
    beyond the end, where s goes on as a line. b is (n, d) or (1, d), S ``(n, d, d)`` or ``(1, d, d)``. ``value[i]``
    receives s(x) for all, then ``b·∇s(x) + ½S:∇²s(x)`` for the first ``images``.
    """
    n, d = z.shape
    columns = c.shape[0]
    w = np.zeros((3, 3, 6))  # axis, derivative, spline
    sizes, first = np.ones(3, np.int64), np.zeros(3, np.int64)
    for axis in range(3 - d):
        w[axis, 0, 0] = 1.0
    sizes[3 - d :] = 6
    flat = c.reshape(-1)
    n1, n2 = c.shape[2], c.shape[3]
    block = c.shape[1] * n1 * n2
    v, half = np.zeros(3), np.zeros((3, 3))
    for i in range(n):
        own, of = i if b.shape[0] > 1 else 0, i if S.shape[0] > 1 else 0
        for axis in range(d):
            a = 3 - d + axis
            cell = min(int(z[i, axis]), c.shape[1 + a] - 6)
            first[a] = cell
            u = z[i, axis] - cell
            inverse, off = 1.0 / slope[i, axis], beyond[i, axis]
            curve = bend[i, axis] * inverse
            for r in range(6):
                p3, p4, p5 = QUINTIC[3][r], QUINTIC[4][r], QUINTIC[5][r]
                w0 = QUINTIC[0][r] + u * (QUINTIC[1][r] + u * (QUINTIC[2][r] + u * (p3 + u * (p4 + u * p5))))
                w1 = QUINTIC[1][r] + u * (2.0 * QUINTIC[2][r] + u * (3.0 * p3 + u * (4.0 * p4 + u * 5.0 * p5)))
                w2 = 2.0 * QUINTIC[2][r] + u * (6.0 * p3 + u * (12.0 * p4 + u * 20.0 * p5))
                w[a, 0, r] = w0
                w[a, 1, r] = w1 * inverse
                w[a, 2, r] = (w2 - w1 * curve) * inverse * inverse
            if off != 0.0:
                for r in range(6):
                    w[a, 0, r] += off * w[a, 1, r]
                    w[a, 2, r] = 0.0
            v[a] = b[own, axis]
            for other in range(d):
                half[a, 3 - d + other] = 0.5 * S[of, axis, other]
        for k in range(columns):
            total, image = 0.0, 0.0
            for c0 in range(sizes[0]):
                p0, p1, p2 = w[0, 0, c0], w[0, 1, c0], w[0, 2, c0]
                for c1 in range(sizes[1]):
                    q0, q1, q2 = w[1, 0, c1], w[1, 1, c1], w[1, 2, c1]
                    at = k * block + ((first[0] + c0) * n1 + first[1] + c1) * n2 + first[2]
                    f0 = p0 * q0
                    if k >= images:
                        s0 = 0.0
                        for r in range(6):
                            s0 += w[2, 0, r] * flat[at + r]
                        total += f0 * s0
                        continue
                    s0, s1, s2 = 0.0, 0.0, 0.0
                    for r in range(6):
                        s0 += w[2, 0, r] * flat[at + r]
                        s1 += w[2, 1, r] * flat[at + r]
                        s2 += w[2, 2, r] * flat[at + r]
                    g0 = v[0] * p1 * q0 + v[1] * p0 * q1
                    g0 += half[0, 0] * p2 * q0 + half[1, 1] * p0 * q2 + 2.0 * half[0, 1] * p1 * q1
                    g1 = v[2] * f0 + 2.0 * (half[0, 2] * p1 * q0 + half[1, 2] * p0 * q1)
                    total += f0 * s0
                    image += g0 * s0 + g1 * s1 + half[2, 2] * f0 * s2
            value[i, k] = total
            if k < images:
                value[i, columns + k] = image


@_jit
def taylor(coefficients: Any, lower: Any, inverse: Any, degree: int, points: Any, moves: Any, C: Any, out: Any) -> None:
    """``out[i, :] += ∇s(x)·v + ½ vᵀ∇²s(x)v − ½ C:∇²s(x)`` for the spline s, points x, moves v ``(n, d)``.

    Coefficients have shape (n0, n1, n2, k): in d < 3 dimensions the last axes have length one, and the first d entries
    of ``lower`` and ``inverse`` count. C is ``(n, d, d)`` or ``(1, d, d)``. Beyond the box, values at its face.
    """
    n, d = points.shape
    columns = coefficients.shape[3]
    b = np.zeros((3, 3, degree + 1))  # axis, derivative, spline
    for axis in range(d, 3):
        b[axis, 0, 0] = 1.0
    sizes = np.ones(3, np.int64)
    sizes[:d] = degree + 1
    first = np.zeros(3, np.int64)
    linear, square = np.zeros(3), np.zeros((3, 3))
    for i in range(n):
        for axis in range(d):
            cells = coefficients.shape[axis] - degree
            z = min(max((points[i, axis] - lower[axis]) * inverse[axis], 0.0), float(cells))
            cell = min(int(z), cells - 1)
            first[axis] = cell
            _derivatives(z - cell, degree, inverse[axis], b[axis, 0], b[axis, 1], b[axis, 2])
            linear[axis] = moves[i, axis]
        own = C[i if C.shape[0] > 1 else 0]
        for a in range(d):
            for c in range(d):
                square[a, c] = linear[a] * linear[c] - own[a, c]
        for c0 in range(sizes[0]):
            p0, p1, p2 = b[0, 0, c0], b[0, 1, c0], b[0, 2, c0]
            for c1 in range(sizes[1]):
                q0, q1, q2 = b[1, 0, c1], b[1, 1, c1], b[1, 2, c1]
                # factors of the splines of the last axis and of their derivatives
                w0 = linear[0] * p1 * q0 + linear[1] * p0 * q1
                w0 += 0.5 * (square[0, 0] * p2 * q0 + square[1, 1] * p0 * q2) + square[0, 1] * p1 * q1
                w1 = linear[2] * p0 * q0 + square[0, 2] * p1 * q0 + square[1, 2] * p0 * q1
                w2 = 0.5 * square[2, 2] * p0 * q0
                for c2 in range(sizes[2]):
                    w = w0 * b[2, 0, c2] + w1 * b[2, 1, c2] + w2 * b[2, 2, c2]
                    for k in range(columns):
                        out[i, k] += w * coefficients[first[0] + c0, first[1] + c1, first[2] + c2, k]
