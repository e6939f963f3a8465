"""The invariant law of a process that nothing leaves."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.sparse as sp

from kolmo.arrays import at_home
from kolmo.discretization import Discretization
from kolmo.errors import InputError, NotConvergedError
from kolmo.forward.density import Density, readings
from kolmo.grid import Grid
from kolmo.kernels.linear import factorize
from kolmo.problem.problem import KolmogorovProblem, refuse_moves
from kolmo.refine.plan import plan
from kolmo.schemes.generator import Generator, discretize


@at_home
def stationary_density(
    problem: KolmogorovProblem,
    *,
    discretization: Discretization | None = None,
    at: Any = None,
    rtol: float = 1e-3,
    atol: float = 1e-6,
    grid: Grid | int | Sequence[int] | None = None,
    scheme: str = "auto",
) -> Density:
    r"""Invariant law of a process that nothing leaves: :math:`Q^T p = 0`, :math:`\sum_i p_i = 1`.

    Parameters
    ----------
    problem : KolmogorovProblem
        The process; coefficients that do not depend on time, no absorbing or elastic face, no killing.
    discretization, at, rtol, atol
        Where the grid comes from, as in ``solve``; points have shape (..., d).
    grid, scheme
        Fixed grid, as in ``solve``.

    Returns
    -------
    Density
        With one time, infinity.

    Raises
    ------
    InputError
        If something leaves, or coefficients depend on time.
    NotConvergedError
        If no invariant law was found.

    References
    ----------
    H. Risken (1989), The Fokker–Planck Equation, second edition.

    Examples
    --------
    >>> import numpy as np, kolmo
    >>> ou = kolmo.SDE(lambda t, x: -x, diffusion=1.0, dim=1)
    >>> problem = kolmo.KolmogorovProblem(ou, lambda x: x[..., 0], 1.0, kolmo.Box(-5.0, 5.0, "reflecting"))
    >>> density = kolmo.stationary_density(problem, grid=101)
    >>> bool(abs(density(0.0) - 1.0 / np.sqrt(np.pi)) < 1e-6)
    True
    """
    refuse_moves(problem, "a stationary law")
    if grid is None:
        discretization = discretization or plan(problem, at=at, rtol=rtol, atol=atol)
        grid, scheme = discretization.grid, discretization.scheme
    generator = discretize(problem, grid, scheme)
    if not generator.autonomous or problem.sde.breakpoints:
        raise InputError("problem", "coefficients that depend on time", "constant ones")
    Q = generator.matrix(0.0)
    size = np.abs(Q).max()
    if generator.fixed.any() or np.abs(np.asarray(Q.sum(1))).max() > 1e-9 * size:
        raise InputError("problem", "an absorbing or elastic face, or killing", "a process that nothing leaves")
    p = _null_vector(Q, generator)
    recipe = Discretization(generator.grid, (), generator.scheme.name, "radau5", None)
    ever, read = np.array([np.inf]), readings(generator)
    return Density(p[None, :], ever, ever, np.ones(1), float("nan"), generator.grid, recipe, {}, {}, read)


def _null_vector(Q: sp.csr_matrix, generator: Generator) -> np.ndarray:
    """Left null vector of Q by inverse iteration from the uniform law."""
    factors = factorize(Q - 1e-7 * generator.pace * sp.identity(Q.shape[0]))
    p = np.asarray(generator.volumes / generator.volumes.sum())[:, None]
    for _ in range(4):
        p = factors.solve(p, transposed=True)
        p = p / p.sum()
    residual = float(np.abs(Q.T @ p).max() / np.abs(Q).max())
    if not np.isfinite(p).all() or residual > 1e-8:
        raise NotConvergedError(f"no invariant law found: residual {residual:.1e}")
    return p[:, 0]
