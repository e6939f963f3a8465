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


def warm() -> None:
    """Compile (or load from the cache) every kernel."""
    one = np.ones((1, 2, 2))
    pointer, index, weight = np.array([0, 1, 2], np.int32), np.array([0, 1], np.int32), np.ones(2)
    lines(pointer, index, weight, one, one.copy())
    add_product(np.ones(2), np.ones((2, 1)), np.ones((2, 1)))
