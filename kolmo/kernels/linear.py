"""Direct solution of sparse linear systems and their transposes: banded LAPACK or SuperLU."""

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import scipy.sparse as sp
import scipy.sparse.linalg as spla
from scipy.linalg import lapack

from kolmo import kernels
from kolmo.arrays import Array
from kolmo.errors import NotConvergedError
from kolmo.kernels import splitting

# A band this much narrower than the matrix is solved by LAPACK's banded factorisation.
NARROW = 40


class Factorization(Protocol):
    """A factorised matrix."""

    def solve(self, b: np.ndarray, transposed: bool = False) -> np.ndarray:
        """Solve M x = b, or Mᵀ x = b."""
        ...


class BandedLU:
    """LU factorisation of a band matrix (LAPACK gbtrf), real or complex.

    Parameters
    ----------
    band : ndarray, shape (2 below + above + 1, n)
        Entry (i, j) at ``[below + above + i - j, j]``, in Fortran order; overwritten.
    below, above : int
        Numbers of diagonals beside the main one.
    """

    def __init__(self, band: np.ndarray, below: int, above: int) -> None:
        self._below, self._above = below, above
        factor, self._solve = (
            (lapack.zgbtrf, lapack.zgbtrs) if np.iscomplexobj(band) else (lapack.dgbtrf, lapack.dgbtrs)
        )
        self._lu, self._pivots, info = factor(band, below, above, overwrite_ab=True)
        if info != 0:
            raise NotConvergedError(f"the linear system of a time step is singular (LAPACK gbtrf: {info})")

    @classmethod
    def of(cls, matrix: sp.coo_matrix, below: int, above: int) -> "BandedLU":
        """Factors of a sparse matrix."""
        band = np.zeros((2 * below + above + 1, matrix.shape[0]), dtype=matrix.dtype, order="F")
        band[below + above + matrix.row - matrix.col, matrix.col] = matrix.data
        return cls(band, below, above)

    @classmethod
    def coupled(cls, bands: Sequence[np.ndarray], below: int, above: int, columns: Sequence[np.ndarray]) -> "BandedLU":
        """Factors of I − Σ_j Q_j ⊗ C_j for band matrices Q_j (stored as above) and small C_j.

        Unknowns are interleaved, those of one row of Q_j side by side, so that the band is m times as wide for C_j of
        m rows.
        """
        n, m = bands[0].shape[1], len(columns[0])
        lower, upper = m * below + m - 1, m * above + m - 1
        whole = np.zeros((2 * lower + upper + 1, n * m), order="F")
        whole[lower + upper] = 1.0
        for d in range(-above, below + 1):  # row − column in Q_j
            diagonals = [band[below + above + d] for band in bands]
            for p, q in np.ndindex(m, m):
                part = sum(C[p, q] * values for C, values in zip(columns, diagonals, strict=True) if C[p, q] != 0.0)
                whole[lower + upper + d * m + p - q, q::m] -= part
        return cls(whole, lower, upper)

    def solve(self, b: np.ndarray, transposed: bool = False) -> np.ndarray:
        """Solve M x = b, or Mᵀ x = b."""
        x, _ = self._solve(self._lu, self._below, self._above, b, self._pivots, trans=1 if transposed else 0)
        return np.asarray(x).reshape(b.shape)


class SparseLU:
    """LU factorisation by SuperLU, real or complex."""

    def __init__(self, matrix: sp.csr_matrix) -> None:
        try:
            self._lu: Any = spla.splu(matrix.tocsc())
        except RuntimeError as error:
            raise NotConvergedError(f"the linear system of a time step is singular ({error})") from error
        self._complex = np.iscomplexobj(matrix.data)

    def solve(self, b: np.ndarray, transposed: bool = False) -> np.ndarray:
        """Solve M x = b, or Mᵀ x = b."""
        b = b.astype(complex) if self._complex else b
        return np.asarray(self._lu.solve(np.ascontiguousarray(b), "T" if transposed else "N"))


def factorize(matrix: sp.spmatrix) -> Factorization:
    """Factorise a square sparse matrix once, for solves with it and with its transpose.

    Examples
    --------
    >>> A = sp.diags([[1.0] * 3, [2.0] * 4], [1, 0]).tocsr()
    >>> factorize(A).solve(np.ones(4)).round(4).tolist()
    [0.3125, 0.375, 0.25, 0.5]
    """
    csr = sp.csr_matrix(matrix)
    coo = csr.tocoo()
    offset = coo.row - coo.col
    below, above = int(max(offset.max(initial=0), 0)), int(max((-offset).max(initial=0), 0))
    if below + above <= min(NARROW, csr.shape[0] // 2):
        return BandedLU.of(coo, below, above)
    return SparseLU(csr)


class LineSolver:
    """Factors of one band matrix per grid line along an axis, in NumPy or torch.

    Parameters
    ----------
    matrices : array, shape (n, width, lines)
        Band storage, entry (i, j) of each line at ``[i, below + j - i, line]``; overwritten.
    below : int
        Number of sub-diagonals.
    shape : tuple of int
        Shape of the grid.
    axis : int
        The axis of the lines.
    """

    def __init__(self, matrices: Array, below: int, shape: tuple[int, ...], axis: int) -> None:
        self._kernels = kernels.of("splitting", matrices)
        self._factors = self._kernels.factor_lines(matrices, below, math.prod(shape[axis + 1 :]))
        self._along = 3 - len(shape) + axis, below, matrices.shape[1] - 1 - below, 0.0

    @cached_property
    def kernel(self) -> tuple[Any, ...]:
        """What the compiled step needs: factors and stride of the axis; the rest only where there are no factors."""
        matrices, _, stride = self._factors
        return matrices, stride, self._along, np.zeros(0)

    def solve(self, b: Array, transposed: bool = False) -> Array:
        """Solve along every line for fields b of shape (size, k)."""
        return self._kernels.solve_fields(self._factors, b, transposed)


class RenewedLineSolver:
    """The same for I − scale × a part of an operator, with factors made anew in every solve: they take no memory.

    Parameters
    ----------
    part : (table, numbers)
        For the kernels.
    along : (axis, sub-diagonals, super-diagonals, scale)
        Axis counted among three.
    free : ndarray
        Empty, or zero at fixed nodes and one elsewhere.
    """

    def __init__(self, part: tuple[Any, Any], along: tuple[int, int, int, float], free: np.ndarray) -> None:
        self._part = part
        self.kernel: tuple[Any, ...] = np.zeros((0, 0, 0)), 0, along, free

    def solve(self, b: np.ndarray, transposed: bool = False) -> np.ndarray:
        """Solve along every line for fields b of shape (size, k)."""
        _, _, along, free = self.kernel
        return splitting.solve_fields_renewed(self._part, along, free, b, transposed)
