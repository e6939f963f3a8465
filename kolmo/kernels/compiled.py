"""Numba kernels on flat float64 arrays; compiled at first use and cached on disk."""

from typing import Any

from kolmo.kernels.cache import compiled

_jit: Any = compiled()


@_jit
def lines(
    indptr: Any, indices: Any, weights: Any, central: Any, left: int, low: int, high: int, u: Any, out: Any
) -> None:
    """``out[o, i, :] = Σ_j M[i, j] u[o, j, :]`` for a CSR matrix M and arrays of shape (outer, n, inner).

    Rows ``low`` to ``high`` hold one stencil, ``central``, which begins ``left`` columns before the
    diagonal: where the line itself is contiguous they are done together, several nodes at once.
    """
    outer, n, inner = u.shape
    if inner == 1:
        # as flat arrays, so that the compiler sees unit strides
        v, w = u.reshape(outer * n), out.reshape(outer * n)
        for o in range(outer):
            base = o * n
            for i in range(n):
                if low <= i < high:
                    continue
                total = 0.0
                for p in range(indptr[i], indptr[i + 1]):
                    total += weights[p] * v[base + indices[p]]
                w[base + i] = total
            if central.shape[0] == 7:
                # the stencil of order 6, unrolled: one pass that the compiler vectorises
                c0, c1, c2, c3, c4, c5, c6 = (
                    central[0],
                    central[1],
                    central[2],
                    central[3],
                    central[4],
                    central[5],
                    central[6],
                )
                for i in range(base + low - left, base + high - left):
                    w[i + left] = (
                        c0 * v[i]
                        + c1 * v[i + 1]
                        + c2 * v[i + 2]
                        + c3 * v[i + 3]
                        + c4 * v[i + 4]
                        + c5 * v[i + 5]
                        + c6 * v[i + 6]
                    )
                continue
            for i in range(base + low, base + high):
                w[i] = 0.0
            for p in range(central.shape[0]):
                c = central[p]
                shift = p - left
                for i in range(base + low, base + high):
                    w[i] += c * v[i + shift]
        return
    for o in range(outer):
        for i in range(n):
            for k in range(inner):
                out[o, i, k] = 0.0
            for p in range(indptr[i], indptr[i + 1]):
                c = weights[p]
                j = indices[p]
                for k in range(inner):
                    out[o, i, k] += c * u[o, j, k]
