"""Uniform B-splines of odd degree on boxes in one to three dimensions: interpolation, and averages over many points."""

from functools import lru_cache
from math import comb
from typing import Any

import numpy as np
from scipy.linalg import solve_banded

from kolmo.kernels.cache import compiled

_jit: Any = compiled()
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
    ends, width = (degree - 1) // 2, degree + 1
    right = np.zeros((nodes + degree - 1, nodes))
    right[ends : ends + nodes] = np.eye(nodes)
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
    if nodes <= _DENSE:
        c = _inverse(nodes, degree) @ flat
    else:
        ends, width = (degree - 1) // 2, degree + 1
        right = np.zeros((nodes + degree - 1, flat.shape[1]))
        right[ends : ends + nodes] = flat
        c = solve_banded((width, width), _bands(nodes, degree), right)
    return np.asarray(c).reshape(-1, *values.shape[1:])


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
