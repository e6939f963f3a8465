"""Leading eigenvalues of the generator: how fast the process forgets, and where it gets stuck."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import scipy.sparse as sp
import scipy.sparse.linalg as spla

from kolmo.arrays import as_numpy, as_points, at_home
from kolmo.discretization import EXTRA_NODES
from kolmo.errors import InputError, NotConvergedError
from kolmo.grid import Grid
from kolmo.kernels.linear import factorize
from kolmo.limits import Limits
from kolmo.problem.box import Box
from kolmo.problem.problem import KolmogorovProblem, refuse_moves
from kolmo.refine.layout import widened
from kolmo.schemes.generator import discretize
from kolmo.shown import Shown

# Nodes per axis when no grid is given; the coarser ones give the error estimate.
NODES = {1: (241, 161), 2: (49, 35), 3: (17, 14)}
# Largest grid, and seconds, unless limits are given.
MAX_CELLS, MAX_SECONDS = {1: 4_000, 2: 20_000, 3: 20_000}, 120.0
# Where there are cuts: by which part of it the box is widened on each side to see their effect, how often at most, the
# factor for what is still to come, and the part of the largest eigenvalue wanted that is rounding.
WIDER, CUT_TRIES, CUT_SAFETY, ROUNDING = 0.125, 10, 2.0, 1e-10
# Up to this many nodes all eigenvalues are computed at once.
DENSE = 320


@dataclass(frozen=True, eq=False)
class Spectrum(Shown):
    r"""Eigenvalues of the generator with the largest real parts, :math:`L\psi = \lambda\psi`.

    Attributes
    ----------
    eigenvalues : ndarray, shape (k,)
        λ, real part decreasing; real unless the process rotates. −1/λ is a relaxation time.
    functions : ndarray, shape ``(k, *grid.shape)``
        Eigenfunctions ψ at the nodes, largest absolute value one.
    residuals : ndarray, shape (k,)
        Largest :math:`|Q\psi - \lambda\psi|` over the nodes, relative to the largest entry of Q.
    error_estimate : ndarray or None, shape (k,)
        Change of λ from a coarser grid and, where there are cuts, in a wider box; None where the grid was given.
    grid : Grid
        The nodes.
    scheme : str
        Name of the scheme.

    References
    ----------
    R. B. Lehoucq, D. C. Sorensen and C. Yang (1998), ARPACK Users' Guide.

    Examples
    --------
    >>> import kolmo
    >>> ou = kolmo.SDE(lambda t, x: -x, diffusion=1.0, dim=1)
    >>> problem = kolmo.KolmogorovProblem(ou, lambda x: x[..., 0], 1.0, kolmo.Box(-6.0, 6.0, "reflecting"))
    >>> modes = kolmo.spectrum(problem, 2, grid=101)
    >>> round(float(-1 / modes.eigenvalues[1]), 4), modes([0.0, 1.0]).shape  # relaxation time; two modes at two points
    (1.0, (2, 2))
    """

    eigenvalues: np.ndarray
    functions: np.ndarray
    residuals: np.ndarray
    error_estimate: np.ndarray | None
    grid: Grid
    scheme: str
    _width: int

    def __call__(self, x: Any) -> np.ndarray:
        """Eigenfunctions interpolated at points (..., d): shape (..., k)."""
        psi = self.functions.reshape(len(self.eigenvalues), self.grid.size).T
        points = as_numpy(as_points(x, self.grid.dim))
        value = self.grid.interpolate(np.ascontiguousarray(psi.real), points, self._width)
        if np.iscomplexobj(psi):
            value = value + 1j * self.grid.interpolate(np.ascontiguousarray(psi.imag), points, self._width)
        return np.asarray(value)

    def __repr__(self) -> str:
        shown = ", ".join(f"{v:.6g}" for v in self.eigenvalues[:6]) + (", ..." if len(self.eigenvalues) > 6 else "")
        return f"Spectrum([{shown}], {self.grid!r}, {self.scheme})"


@at_home
def spectrum(
    problem: KolmogorovProblem,
    k: int = 6,
    *,
    at: Any = None,
    grid: Grid | int | Sequence[int] | None = None,
    scheme: str = "auto",
    max_seconds: float | None = None,
    max_cells: int | None = None,
) -> Spectrum:
    r"""Leading eigenvalues and eigenfunctions of the generator with killing and faces.

    .. math:: b\cdot\nabla\psi + \tfrac12\Sigma:\nabla^2\psi - c\,\psi = \lambda\psi

    with ψ = 0 at absorbing faces and homogeneous conditions at elastic and reflecting ones. Of the problem only the
    process, killing and faces count.

    Parameters
    ----------
    problem : KolmogorovProblem
        The process; its coefficients must not depend on time.
    k : int
        How many.
    at : array_like, shape (..., d), optional
        Points around which an unbounded problem is cut, as in ``Box.covering`` with the problem's horizon.
    grid : Grid, int or tuple, optional
        Nodes; None: chosen, with an error estimate from a coarser grid.
    scheme : str, default "auto"
        As in ``solve``.
    max_seconds : float, optional
        Without ``grid``: time after which cuts are moved no more; default 120.
    max_cells : int, optional
        Without ``grid``: largest grid; default 4,000 nodes in one dimension, 20,000 in two or three.

    Returns
    -------
    Spectrum

    Raises
    ------
    InputError
        For coefficients that depend on time, or an unbounded box without ``at``.
    NotConvergedError
        If the iteration does not converge.

    Notes
    -----
    Shift and invert with ARPACK (Lehoucq, Sorensen & Yang 1998) around a small positive number; all eigenvalues at once
    on small grids. High-order schemes have spurious eigenvalues far from zero: compare with ``error_estimate``.

    Examples
    --------
    >>> import kolmo
    >>> from kolmo.spectrum import spectrum
    >>> bm = kolmo.SDE(0.0, diffusion=1.0, dim=1)
    >>> problem = kolmo.KolmogorovProblem(bm, lambda x: x[..., 0], 1.0, kolmo.Box(0.0, 1.0, "reflecting"))
    >>> (spectrum(problem, 3).eigenvalues / (-0.5 * np.pi**2)).round(6).tolist()  # 0, 1, 4
    [-0.0, 1.0, 4.0]
    """
    if not isinstance(k, (int, np.integer)) or k < 1:
        raise InputError("k", k, "a positive whole number")
    refuse_moves(problem, "a spectrum")
    if grid is not None:
        return _solve(problem, int(k), grid, scheme)
    limits = Limits.of(max_cells, max_seconds, MAX_CELLS[problem.dim], MAX_SECONDS)
    return _refined(problem, int(k), _finite(problem, at), scheme, limits)


def _refined(problem: KolmogorovProblem, k: int, box: Box, scheme: str, limits: Limits) -> Spectrum:
    """Two grids tell the error of the discretisation, a wider box that of the cuts, moved until it is the lesser."""
    d = problem.dim
    most = int(limits.cells ** (1.0 / d) + 1e-9)
    fine_nodes, coarse_nodes = (min(n, round(most * n / NODES[d][0])) for n in NODES[d])
    begun = limits.spent
    grid = Grid.of(box, fine_nodes)
    fine = _solve(problem, k, grid, scheme)
    seconds = limits.spent - begun
    coarse = _solve(problem, k, Grid.of(box, coarse_nodes), scheme)
    change, cut = _change(fine, coarse), None
    for _ in range(CUT_TRIES if box.has("cut") else 0):
        wider = widened(grid, box, WIDER, 1)
        if limits.excess(wider.size, seconds * wider.size / grid.size):
            break
        begun = limits.spent
        wide = _solve(problem, k, wider, scheme)
        seconds = limits.spent - begun
        cut, grid, fine = CUT_SAFETY * _change(wide, fine), wider, wide
        if (cut <= np.maximum(change, ROUNDING * np.abs(fine.eigenvalues).max())).all():
            break
    if cut is None and box.has("cut"):  # no room for it: measured on the coarser grid
        cut = CUT_SAFETY * _change(_solve(problem, k, widened(coarse.grid, box, WIDER, 1), scheme), coarse)
    return replace(fine, error_estimate=change if cut is None else change + cut)


def _change(one: Spectrum, other: Spectrum) -> np.ndarray:
    """How far eigenvalues differ."""
    return np.asarray(np.abs(one.eigenvalues - other.eigenvalues))


def _finite(problem: KolmogorovProblem, at: Any) -> Box:
    if np.isfinite([*problem.box.lower, *problem.box.upper]).all():
        return problem.box
    if at is None or problem.horizon is None:
        raise InputError(
            "at",
            None,
            "points around which to cut the unbounded box, and a horizon",
            "or give the problem a finite box",
        )
    return Box.covering(problem.sde, at, problem.horizon, within=problem.box)


def _solve(problem: KolmogorovProblem, k: int, grid: Grid | int | Sequence[int], scheme: str) -> Spectrum:
    generator = discretize(problem, grid, scheme)
    if not generator.autonomous or problem.sde.breakpoints:
        raise InputError("problem", "coefficients that depend on time", "constant ones")
    free = np.flatnonzero(~generator.fixed)
    if k > len(free) - 2:
        raise InputError("k", k, f"at most {len(free) - 2} on this grid")
    Q = sp.csr_matrix(generator.matrix(0.0)[free][:, free])
    found = np.linalg.eig(Q.toarray()) if len(free) <= DENSE else near_zero(Q, k, 0.1 * generator.pace)
    values, vectors = (np.asarray(part, dtype=complex) for part in found)
    # pairs of conjugates belong together whatever rounding says of their real parts
    scale = np.sort(np.abs(values))[min(k, len(values)) - 1] or 1.0
    order = np.lexsort((-values.imag, -np.round(values.real / scale, 9)))[:k]
    values, vectors = values[order], vectors[:, order]
    vectors = vectors / vectors[np.abs(vectors).argmax(0), np.arange(k)]
    residuals = np.abs(Q @ vectors - vectors * values).max(0) / np.abs(Q).max()
    if residuals.max() > 1e-6:
        raise NotConvergedError(f"eigenvalues did not converge: residuals up to {residuals.max():.1e}")
    if np.abs(values.imag).max() <= 1e-9 * np.abs(values).max():
        values, vectors = values.real, vectors.real
    functions = np.zeros((k, generator.grid.size), dtype=vectors.dtype)
    functions[:, free] = vectors.T
    width = max(4, generator.scheme.order + EXTRA_NODES)
    shape = (k, *generator.grid.shape)
    return Spectrum(values, functions.reshape(shape), residuals, None, generator.grid, generator.scheme.name, width)


def near_zero(Q: sp.csr_matrix, k: int, shift: float) -> tuple[np.ndarray, np.ndarray]:
    """A few more eigenvalues than wanted, and their vectors, around a shift just right of zero.

    Raises
    ------
    NotConvergedError
        Where Arnoldi's iteration does not end.
    """
    factors = factorize(Q - shift * sp.identity(Q.shape[0]))
    inverse = spla.LinearOperator(Q.shape, matvec=lambda v: factors.solve(v.reshape(-1, 1)).ravel(), dtype=float)
    start = np.random.default_rng(0).standard_normal(Q.shape[0])
    more = min(k + 4, Q.shape[0] - 2)
    try:
        mu, vectors = spla.eigs(inverse, more, which="LM", v0=start, ncv=min(Q.shape[0] - 1, 2 * more + 20))
    except spla.ArpackNoConvergence as error:
        raise NotConvergedError(f"eigenvalues did not converge: {error}") from error
    return shift + 1.0 / mu, vectors
