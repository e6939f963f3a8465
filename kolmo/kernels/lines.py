"""One-dimensional operators and their application along an axis of a field, in NumPy (numba) or torch."""

import math
from functools import cached_property
from typing import Any

import numpy as np
import scipy.sparse as sp

from kolmo.arrays import Array, Held, is_tensor


class LineOperator:
    """A sparse n × n matrix that acts along one axis.

    Parameters
    ----------
    matrix : sparse matrix, shape (n, n)
        The operator.
    """

    def __init__(self, matrix: Any) -> None:
        self.matrix = sp.csr_matrix(matrix)
        self.matrix.sort_indices()

    @cached_property
    def transposed(self) -> "LineOperator":
        """The transposed operator."""
        return LineOperator(self.matrix.T)

    @cached_property
    def entries(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows, columns and values of the entries."""
        coo = self.matrix.tocoo()
        return coo.row, coo.col, coo.data

    @cached_property
    def width(self) -> tuple[int, int]:
        """Diagonals below and above the main one."""
        offset = self.entries[0] - self.entries[1]
        return int(max(offset.max(initial=0), 0)), int(max((-offset).max(initial=0), 0))

    @cached_property
    def _central(self) -> tuple[np.ndarray, int, int, int]:
        """The stencil of the middle rows, how far left of the diagonal it begins, and the rows that have it."""
        M, n = self.matrix, self.matrix.shape[0]

        def row(i: int) -> tuple[np.ndarray, np.ndarray]:
            inside = slice(M.indptr[i], M.indptr[i + 1])
            return M.indices[inside] - i, M.data[inside]

        offsets, weights = row(n // 2)
        if len(offsets) == 0 or np.ptp(offsets) + 1 != len(offsets):
            return np.zeros(0), 0, n, n

        def same(i: int) -> bool:
            there, values = row(i)
            return len(there) == len(offsets) and bool((there == offsets).all() and np.allclose(values, weights))

        low = high = n // 2
        while low > 0 and same(low - 1):
            low -= 1
        while high < n and same(high):
            high += 1
        return weights.copy(), int(-offsets[0]), low, high

    def apply(self, u: Array, shape: tuple[int, ...], axis: int) -> Array:
        """Apply along an axis of the field u, shape ``(size, k)`` over a grid of a shape."""
        n = shape[axis]
        outer = math.prod(shape[:axis])
        inner = u.shape[0] * u.shape[1] // (outer * n)
        view = u.reshape(outer, n, inner)
        if is_tensor(u):
            dense = self._dense.like(u)
            return (view[:, :, 0] @ dense.T if inner == 1 else dense @ view).reshape(u.shape)
        from kolmo.kernels import compiled

        out = np.empty_like(u)
        M = self.matrix
        compiled.lines(M.indptr, M.indices, M.data, *self._central, view, out.reshape(outer, n, inner))
        return out

    def add_to_bands(self, band: Array, below: int, weights: Array) -> None:
        """Add diag(w) M on each line to band storage (n, width, lines), w of shape (n, lines), main diagonal below."""
        if is_tensor(band):
            low, high = below - self.width[0], below + self.width[1] + 1
            band[:, low:high].addcmul_(self._diagonals.like(band)[:, :, None], weights[:, None])
            return
        rows, columns, values = self.entries
        band[rows, below + columns - rows] += values[:, None] * weights[rows]

    @cached_property
    def _dense(self) -> Held:
        return Held(self.matrix.toarray())

    @cached_property
    def _diagonals(self) -> Held:
        """Band storage (n, width)."""
        rows, columns, values = self.entries
        diagonals = np.zeros((self.matrix.shape[0], sum(self.width) + 1))
        diagonals[rows, self.width[0] + columns - rows] = values
        return Held(diagonals)
