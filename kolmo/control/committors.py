"""Committors between two sets inside the box, with the rate of transitions and their current."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.polynomial.legendre import leggauss
from scipy.special import beta

from kolmo.arrays import Array, as_like, as_numpy, as_points, at_home
from kolmo.control.bellman import Bellman
from kolmo.control.hjb import concluded, outside
from kolmo.control.optimum import ControlSolution
from kolmo.control.policy_level import PolicyLevel, pack
from kolmo.control.policy_search import MAX_CELLS, MAX_SECONDS, Search
from kolmo.control.problem import ControlProblem
from kolmo.control.sets import Finite
from kolmo.control.targets import Target
from kolmo.errors import InputError
from kolmo.grid import Grid
from kolmo.limits import Limits
from kolmo.problem.box import Box
from kolmo.problem.sde import SDE, refuse_jumps
from kolmo.refine.plan import interesting_points
from kolmo.shown import Shown

# The rate is the current through all level sets of q, weighted by q^p (1 − q)^p: smooth up to the sets A and B.
POWER = 4
# Panels along an axis and Gauss nodes in each, by dimension, of integrals of the density alone.
PANELS, GAUSS = {1: 200, 2: 40, 3: 16}, {1: 8, 2: 8, 3: 5}
# Differences of the density, as a part of the box.
DIFFERENCE = 2e-4
# Currents below this part of ρ|b| are none.
STILL = 1e-5


@dataclass(frozen=True, eq=False)
class Committor(Shown):
    r"""Probability q(x) of reaching B before A, and the statistics of transitions from A to B.

    .. math:: b\cdot\nabla q + \tfrac12\Sigma:\nabla^2 q = 0, \qquad q = 0 \text{ on } A, \quad q = 1 \text{ on } B

    Attributes
    ----------
    solution : ControlSolution
        q: ``committor(x)`` is ``committor.solution(x)``, of shape (...) at points (..., d).
    rate : float or None
        Transitions from A to B per unit of time in the stationary process; None without a density.
    rate_error : float or None
        Estimate of its error.

    References
    ----------
    E and Vanden-Eijnden 2006; Metzner, Schütte and Vanden-Eijnden 2006.

    Examples
    --------
    Over a barrier in one dimension (Kramers): transitions and their current, the same everywhere.

    >>> import torch, kolmo
    >>> from kolmo import control
    >>> q = control.committor(kolmo.SDE(lambda t, x: x - x**3, 0.7, dim=1, arrays="torch"), lambda x: x[..., 0] + 1.0,
    ...     lambda x: 1.0 - x[..., 0], kolmo.Box(-3.0, 3.0, "reflecting"), at=[0.0],
    ...     density=lambda x: torch.exp((x[..., 0] ** 2 - 0.5 * x[..., 0] ** 4) / 0.49))
    >>> bool(abs(q(0.0) - 0.5) < 1e-6), bool(abs(q.flux([0.5]) / q.rate - 1.0) < 1e-3)
    (True, True)
    """

    solution: ControlSolution
    rate: float | None
    rate_error: float | None
    _parts: "_Parts | None" = field(repr=False)

    def __call__(self, x: Any) -> Array:
        """q(x) at points (..., d), shape (...)."""
        return self.solution(x)

    @property
    def error_estimate(self) -> np.ndarray:
        """Estimate of the error of q."""
        assert self.solution.error_estimate is not None
        return self.solution.error_estimate

    @property
    def status(self) -> str:
        """Whether it is "converged" or "tolerance_not_met"."""
        return self.solution.status

    @property
    def message(self) -> str:
        """What happened, in a sentence."""
        return self.solution.message

    def flux(self, x: Any) -> Array:
        r"""Current of the transitions from A to B, :math:`\rho\,\tfrac12\Sigma\nabla q`, shape (..., d).

        Raises
        ------
        InputError
            Without a density, and where the process has a current of its own: then the current of transitions needs the
            committor of the reversed process too.
        """
        parts = self._known()
        if not parts.reversible:
            raise InputError("sde", "a process with a current of its own", "a reversible one for flux")
        points = as_points(x, self.solution.grid.dim)
        flat = np.asarray(as_numpy(points), dtype=float).reshape(-1, self.solution.grid.dim)
        slope = np.asarray(self.solution.gradient(flat))
        inside = parts.problem.targets[0].inside(flat) | parts.problem.targets[1].inside(flat)
        current = parts.density(flat)[:, None] * parts.half(flat, slope) * ~inside[:, None]
        return as_like(current.reshape(points.shape), points)

    @cached_property
    def rate_constant(self) -> float:
        """Rate over the probability of having come from A last, of a reversible process: 1 over the mean time to B.

        Raises
        ------
        InputError
            Without a density, and where the process has a current of its own.
        """
        parts = self._known()
        if not parts.reversible or self.rate is None:
            raise InputError("sde", "a process with a current of its own", "a reversible one for rate_constant")
        x, weights = _gauss(parts.problem.box, parts.problem.dim)
        return self.rate / float(weights @ (parts.density(x) * (1.0 - np.asarray(self.solution(x)))))

    def _known(self) -> "_Parts":
        if self._parts is None:
            raise InputError("density", None, "the invariant density", "committor(..., density=lambda x: ...)")
        return self._parts

    def __repr__(self) -> str:
        rate = "" if self.rate is None else f", rate={self.rate:.6g}±{self.rate_error:.1e}"
        return f"Committor({self.status}, error≈{float(np.max(self.error_estimate)):.1e}{rate})"


@at_home
def committor(
    sde: SDE,
    A: Target | Callable[[Any], Any],
    B: Target | Callable[[Any], Any],
    box: Box,
    *,
    density: Callable[[Any], Any] | None = None,
    at: Any = None,
    rtol: float = 1e-3,
    atol: float = 1e-6,
    max_seconds: float | None = None,
    max_cells: int | None = None,
) -> Committor:
    r"""Probability of reaching the set B before the set A, the rate of transitions from A to B, and their current.

    .. math:: b\cdot\nabla q + \tfrac12\Sigma:\nabla^2 q = 0, \quad q = 0 \text{ on } A, \quad q = 1 \text{ on } B

    With the invariant density ρ and its current :math:`J = b\rho - \tfrac12\nabla\cdot(\Sigma\rho)` the flow
    :math:`F = \tfrac12\rho\Sigma\nabla q + Jq` is free of divergence, and the rate is its flux through any surface
    between A and B: here the mean over all level sets of q.

    Parameters
    ----------
    sde : SDE
        The process; coefficients that do not depend on time.
    A, B : callable or Target
        Level functions ``level(x)`` -> ``(...)`` of torch tensors, not positive inside the set.
    box : Box
        Finite box that holds both sets, as a rule with reflecting faces.
    density : callable, optional
        ``density(x)`` -> ``(...)`` of torch tensors, invariant density up to a factor: exp(−βV) where
        dX = −∇V dt + √(2/β) dW. Without it there is no rate.
    at : array_like, shape (..., d), optional
        Points where q matters. None: the core of the box.
    rtol, atol : float
        Tolerance of q, and relative tolerance of the rate.
    max_seconds, max_cells
        As in ``solve_hjb``.

    Returns
    -------
    Committor

    Raises
    ------
    InputError
        For bad input.
    NotConvergedError
        When there is no answer.

    Notes
    -----
    Rate and current of transitions: E and Vanden-Eijnden 2006, Metzner, Schütte and Vanden-Eijnden 2006.

    Examples
    --------
    Between circles about the origin Brownian motion has a logarithm:

    >>> import math, torch, kolmo
    >>> from kolmo import control
    >>> q = control.committor(kolmo.SDE(0.0 * torch.ones(2), 1.0, dim=2), lambda x: x.norm(dim=-1) - 0.4,
    ...     lambda x: 1.2 - x.norm(dim=-1), kolmo.Box([-1.4] * 2, [1.4] * 2, "reflecting"), at=[[0.7, 0.0]], rtol=1e-2)
    >>> bool(abs(q([0.7, 0.0]) - math.log(0.7 / 0.4) / math.log(3.0)) < 1e-3)
    True
    """
    refuse_jumps(sde, "a committor between sets", "kolmo.solve on a box with absorbing faces takes jumps")
    if not (np.isfinite(box.lower).all() and np.isfinite(box.upper).all()):
        raise InputError("box", box, "a finite box")
    sets = [Target(s.level if isinstance(s, Target) else s, value) for s, value in ((A, 0.0), (B, 1.0))]
    problem = ControlProblem(
        lambda t, x, a: sde.drift(t, x),
        covariance=lambda t, x, a: sde.covariance(t, x),
        controls=Finite([[0.0]]),
        terminal=None,
        horizon=None,
        box=box,
        targets=sets,
    )
    points = outside(problem, interesting_points(problem.closed_loop(problem.constant([0.0])), at))
    parts = None if density is None else _Parts(problem, density)
    limits = Limits.of(max_cells, max_seconds, MAX_CELLS[problem.dim], MAX_SECONDS)
    search = _Search(problem, points, rtol, atol, limits, parts)
    level, estimate, status, message, stats = concluded(search)
    shape = () if at is None else tuple(as_points(at, problem.dim, "at").shape[:-1])
    solution = pack(problem, level, np.broadcast_to(estimate, shape).copy(), status, message, stats)
    if parts is None:
        return Committor(solution, None, None, None)
    rate = search.rates[id(level)]
    return Committor(solution, rate, search.rate_error(rate), parts)


class _Search(Search):
    """Levels whose rates have to agree as well."""

    def __init__(
        self, problem: ControlProblem, points: np.ndarray, rtol: float, atol: float, limits: Limits, parts: Any
    ) -> None:
        super().__init__(problem, points, rtol, atol, limits)
        self.parts: _Parts | None = parts
        self.rates: dict[int, float] = {}

    def _solve(self, grid: Grid, n: float, scheme: str) -> PolicyLevel:
        level = super()._solve(grid, n, scheme)
        if self.parts is not None:
            rate = self.rates[id(level)] = self.parts.rate(Bellman(self.problem, grid, scheme), level)
            reference = next(iter(self.rates.values()))
            level.witnessed = np.append(as_numpy(level.witnessed), rate / reference)
        return level

    def rate_error(self, rate: float) -> float:
        """Estimate of the error of the rate of the last level, and of the integral of the density."""
        assert self.parts is not None
        rates = [np.array([[self.rates[id(level)]]]) for level in self.levels]
        verdict = self._policy.judge([level.nodes for level in self.levels], rates)
        return float(verdict.estimate[0]) + rate * self.parts.mass_error


class _Parts:
    """Density and current of the process, normalised."""

    def __init__(self, problem: ControlProblem, density: Callable[[Any], Any]) -> None:
        self.problem, self._density = problem, density
        self._box: Any = problem.box
        self._sde = problem.closed_loop(problem.constant([0.0])).sde
        d = problem.dim
        self.mass = 1.0
        masses = [float(w @ self.density(x)) for x, w in (_gauss(problem.box, d, 0.7), _gauss(problem.box, d))]
        if not (np.isfinite(masses).all() and masses[1] > 0.0):
            raise InputError("density", f"the integral {masses[1]:g}", "a positive and finite integral over the box")
        self.mass, self.mass_error = masses[1], abs(masses[1] - masses[0]) / masses[1]
        x, _ = _gauss(problem.box, d, 0.25)
        pace = np.abs(self.density(x)[:, None] * np.asarray(self._sde.drift(0.0, x))).max()
        self.reversible = bool(np.abs(self.current(x)).max() <= STILL * pace)

    def density(self, x: np.ndarray) -> np.ndarray:
        """ρ at points (n, d)."""
        with torch.no_grad():
            value = torch.as_tensor(self._density(torch.as_tensor(x)), dtype=torch.float64)
        if tuple(value.shape) != (len(x),):
            raise InputError("density", f"a result of shape {tuple(value.shape)}", f"shape {(len(x),)}")
        return np.asarray(value.numpy()) / self.mass

    def half(self, x: np.ndarray, slope: np.ndarray) -> np.ndarray:
        """½ Σ∇q at points (n, d)."""
        return np.asarray(0.5 * np.einsum("nij,nj->ni", np.asarray(self._sde.covariance(0.0, x)), slope))

    def current(self, x: np.ndarray) -> np.ndarray:
        """J = bρ − ½ ∇·(Σρ) at points (n, d), by differences of order four."""
        J = np.asarray(self._sde.drift(0.0, x)) * self.density(x)[:, None]
        length = np.subtract(self._box.upper, self._box.lower)
        for j in range(x.shape[1]):
            step = np.zeros(x.shape[1])
            step[j] = DIFFERENCE * length[j]
            for offset, weight in ((-2, 1.0), (-1, -8.0), (1, 8.0), (2, -1.0)):
                y = x + offset * step
                flow = np.asarray(self._sde.covariance(0.0, y))[:, :, j] * self.density(y)[:, None]
                J = J - 0.5 * weight / (12.0 * step[j]) * flow
        return np.asarray(J)

    def rate(self, bellman: Bellman, level: PolicyLevel) -> float:
        """Flux of ½ρΣ∇q + Jq through the level sets of q."""
        x, q = bellman.grid.points, level.V[:, 0]
        slope, _ = bellman.derivatives(0.0, level.V, level.acts[-1])
        outside = np.ones(len(q)) if bellman.held is None else ~bellman.held.inside
        weight = np.clip(q * (1.0 - q), 0.0, None) ** POWER / beta(POWER + 1, POWER + 1) * outside
        some = weight > 0.0
        flow = self.density(x[some])[:, None] * self.half(x[some], slope[some])
        if not self.reversible:
            flow = flow + self.current(x[some]) * q[some, None]
        return float(((flow * slope[some]).sum(-1) * weight[some] * bellman.grid.volumes[some]).sum())


def _gauss(box: Any, d: int, part: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Points and weights of panels of Gauss quadrature over a box; ``part``: of the panels."""
    t, w = leggauss(GAUSS[d])
    count = max(2, round(part * PANELS[d]))
    axes, weights = [], []
    for low, high in zip(box.lower, box.upper, strict=True):
        edges = np.linspace(low, high, count + 1)
        half = 0.5 * np.diff(edges)
        axes.append((0.5 * (edges[1:] + edges[:-1])[:, None] + half[:, None] * t).reshape(-1))
        weights.append((half[:, None] * w).reshape(-1))
    points = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, d)
    total = np.ones(())
    for factor in weights:
        total = np.multiply.outer(total, factor)
    return points, np.asarray(total).reshape(-1)
