"""One-dimensional operators and their application along an axis of a field, in NumPy or torch."""

import math
from functools import cached_property
from typing import Any

import numpy as np
import scipy.sparse as sp

from kolmo.arrays import Array, Held, along, is_tensor


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

    def apply(self, u: Array, shape: tuple[int, ...], axis: int) -> Array:
        """Apply along an axis of the field u, shape ``(size, k)`` over a grid of a shape."""
        if not is_tensor(u):
            return along(self.matrix.__matmul__, u.reshape(*shape, -1), axis).reshape(u.shape)
        view, dense = u.reshape(math.prod(shape[:axis]), shape[axis], -1), self._dense.like(u)
        return (view[:, :, 0] @ dense.T if view.shape[2] == 1 else dense @ view).reshape(u.shape)

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
