"""One-dimensional operators and their application along an axis of a field, in NumPy (numba) or torch."""

from functools import cached_property
from typing import Any

import numpy as np
import scipy.sparse as sp

from kolmo.arrays import Array, is_tensor


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
        self._tensors: dict[Any, Array] = {}

    @cached_property
    def transposed(self) -> "LineOperator":
        """The transposed operator."""
        return LineOperator(self.matrix.T)

    def apply(self, u: Array, shape: tuple[int, ...], axis: int) -> Array:
        """Apply along an axis of the field u, shape ``(size, k)`` over a grid of the given shape."""
        n = shape[axis]
        outer = int(np.prod(shape[:axis]))
        inner = u.shape[0] * u.shape[1] // (outer * n)
        view = u.reshape(outer, n, inner)
        if is_tensor(u):
            return (self._dense(u) @ view).reshape(u.shape)
        from kolmo.kernels import compiled

        out = np.empty_like(view)
        compiled.lines(self.matrix.indptr, self.matrix.indices, self.matrix.data, view, out)
        return out.reshape(u.shape)

    def _dense(self, like: Array) -> Array:
        if like.device not in self._tensors:
            import torch

            self._tensors[like.device] = torch.as_tensor(self.matrix.toarray(), device=like.device)
        return self._tensors[like.device]


def add_product(a: Array, f: Array, out: Array) -> None:
    """``out[i, :] += a[i] f[i, :]`` in place, for a of shape (size,) and f, out of shape (size, k)."""
    if is_tensor(out):
        out += a[:, None] * f
        return
    from kolmo.kernels import compiled

    compiled.add_product(a, f, out)
