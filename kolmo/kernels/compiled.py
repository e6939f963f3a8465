"""Numba kernels on flat float64 arrays; compiled at first use and cached on disk."""

from typing import Any

import numba
import numpy as np

_jit: Any = numba.njit(cache=True, error_model="numpy", nogil=True)


@_jit
def lines(indptr: Any, indices: Any, weights: Any, u: Any, out: Any) -> None:
    """``out[o, i, :] = Σ_j M[i, j] u[o, j, :]`` for a CSR matrix M and arrays of shape (outer, n, inner)."""
    outer, n, inner = u.shape
    if inner == 1:
        for o in range(outer):
            for i in range(n):
                total = 0.0
                for p in range(indptr[i], indptr[i + 1]):
                    total += weights[p] * u[o, indices[p], 0]
                out[o, i, 0] = total
        return
    for o in range(outer):
        for i in range(n):
            for k in range(inner):
                out[o, i, k] = 0.0
            for p in range(indptr[i], indptr[i + 1]):
                w = weights[p]
                j = indices[p]
                for k in range(inner):
                    out[o, i, k] += w * u[o, j, k]


@_jit
def add_product(a: Any, f: Any, out: Any) -> None:
    """``out[i, :] += a[i] f[i, :]``."""
    n, k = f.shape
    if k == 1:
        for i in range(n):
            out[i, 0] += a[i] * f[i, 0]
        return
    for i in range(n):
        for c in range(k):
            out[i, c] += a[i] * f[i, c]


@_jit
def factor_bands(band: Any, below: int) -> None:
    """LU factors, in place and without pivoting, of many band matrices: ``band[i, below + j − i, line]``."""
    n, width, lines_ = band.shape
    above = width - 1 - below
    for i in range(n):
        for r in range(1, min(below, n - 1 - i) + 1):
            for line in range(lines_):
                band[i + r, below - r, line] /= band[i, below, line]
            for c in range(1, min(above, n - 1 - i) + 1):
                if below - r + c < width:
                    for line in range(lines_):
                        band[i + r, below - r + c, line] -= band[i + r, below - r, line] * band[i, below + c, line]


@_jit
def solve_bands(band: Any, below: int, x: Any) -> None:
    """Solve with the factors for right sides x (n, lines) in place."""
    n, width, lines_ = band.shape
    above = width - 1 - below
    for i in range(n):
        for r in range(1, min(below, i) + 1):
            for line in range(lines_):
                x[i, line] -= band[i, below - r, line] * x[i - r, line]
    for i in range(n - 1, -1, -1):
        for c in range(1, min(above, n - 1 - i) + 1):
            for line in range(lines_):
                x[i, line] -= band[i, below + c, line] * x[i + c, line]
        for line in range(lines_):
            x[i, line] /= band[i, below, line]


@_jit
def solve_bands_transposed(band: Any, below: int, x: Any) -> None:
    """Solve with the transposed matrices for right sides x (n, lines) in place."""
    n, width, lines_ = band.shape
    above = width - 1 - below
    for i in range(n):
        for line in range(lines_):
            x[i, line] /= band[i, below, line]
        for c in range(1, min(above, n - 1 - i) + 1):
            for line in range(lines_):
                x[i + c, line] -= band[i, below + c, line] * x[i, line]
    for i in range(n - 1, -1, -1):
        for r in range(1, min(below, i) + 1):
            for line in range(lines_):
                x[i - r, line] -= band[i, below - r, line] * x[i, line]


def warm() -> None:
    """Compile (or load from the cache) every kernel."""
    one = np.ones((1, 2, 2))
    pointer, index, weight = np.array([0, 1, 2], np.int32), np.array([0, 1], np.int32), np.ones(2)
    lines(pointer, index, weight, one, one.copy())
    add_product(np.ones(2), np.ones((2, 1)), np.ones((2, 1)))
    band, right = np.ones((3, 3, 1)) + np.array([0.0, 3.0, 0.0])[None, :, None], np.ones((3, 1))
    factor_bands(band, 1)
    solve_bands(band, 1, right)
    solve_bands_transposed(band, 1, right)
