"""Stationary problems: b·∇u + ½ Σ:∇²u − cu + g = 0 as one linear solve."""

import numpy as np
import scipy.sparse as sp

from kolmo.errors import InputError, NotConvergedError
from kolmo.kernels.linear import factorize
from kolmo.march import March


def solve_stationary(march: March, weights: np.ndarray | None = None) -> np.ndarray:
    """State of shape (size, k) with Q u + r = 0 and the absorbing values; with weights p, q with Qᵀq = −p instead.

    Raises
    ------
    InputError
        If nothing holds the solution: no absorbing or elastic face and no killing.
    """
    _, operator, load = march.ingredients(0.0)
    try:
        factors = factorize(anchored(operator.matrix, march.fixed))
        if weights is not None:
            return factors.solve(-weights, transposed=True)
        u = factors.solve(-np.asarray(load))
    except NotConvergedError as error:
        raise NotConvergedError(f"the stationary equation has no unique solution: {error}") from error
    return np.asarray(march.with_boundary(u, 0.0))


def anchored(Q: sp.csr_matrix, fixed: np.ndarray | None) -> sp.csr_matrix:
    """Q with minus one on the diagonal where values are fixed; refused where nothing holds the solution."""
    ones = np.zeros(Q.shape[0]) if fixed is None else fixed.astype(float)
    if not ones.any() and np.abs(np.asarray(Q.sum(1))).max() <= 1e-10 * np.abs(Q).max():
        raise InputError(
            "box, killing",
            "no absorbing or elastic face and no killing",
            "something that holds the stationary solution",
            "make a face absorbing, or give a horizon",
        )
    return Q - sp.diags(ones)
