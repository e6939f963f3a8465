"""The Schrödinger bridge: steer one density into another with least effort."""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch

from kolmo.arrays import as_like, as_numpy, as_points, at_home, is_tensor, namespace
from kolmo.box import Absorbing, Box, Robin
from kolmo.errors import InputError, NotConvergedError, ToleranceWarning
from kolmo.grid import Grid
from kolmo.limits import Limits, OutOfTimeError
from kolmo.problem import KolmogorovProblem
from kolmo.refine.estimate import Convergence, observed_order
from kolmo.schemes.generator import Generator, discretize
from kolmo.sde import SDE, refuse_jumps

# Nodes per axis of the first level and growth of the levels, by dimension, and the largest grid.
FIRST_NODES = {1: 65, 2: 25, 3: 13}
GROWTH = 1.4
MAX_CELLS = {1: 2_000, 2: 25_000, 3: 50_000}
MAX_SECONDS = 120.0
# Times between 0 and T at which the potentials are kept.
INTERVALS = 32
# Alternations of Sinkhorn's iteration, and the misfit of the marginals (total variation) at which it ends.
ITERATIONS = 3000
MISFIT = 1e-9
# Probability that may be left out where no path arrives: at the ends of open faces the chain stays where it is.
LOST = 1e-6
# Nodes up to which the coupling is made as a matrix.
DENSE = 3000
# Nodes up to which transition matrices are made, where coefficients are constant in time.
SMALL = 800
# Levels through which a polynomial in h² is put, and how close to 2 the observed orders have to be for that.
LADDER, NEARLY = 4, 0.5
# Logarithms of zero.
NOTHING = -690.0
WIDTH = 6


@dataclass(frozen=True, eq=False)
class SchroedingerBridge:
    r"""The process that carries one density into another and is closest to the given one.

    Attributes
    ----------
    sde : SDE
        The steered process, drift :math:`b + \Sigma\nabla\log\psi`.
    cost : float
        :math:`E\int\frac12|\sigma^{-1}a|^2dt`, the entropy relative to the process started in the same law.
    grid : Grid
        The nodes.
    times : ndarray, shape (nt,)
        From 0 to T.
    log_psi : ndarray, shape (nt, size)
        Potential ψ of the steering, in logarithms.
    masses : ndarray, shape (nt, size)
        Probability of every cell at every time.
    iterations : int
        Alternations of Sinkhorn's iteration.
    misfit : float
        Total variation by which the first marginal is missed.
    error_estimate : float
        Estimate of the error of the cost, from the levels.
    status : str
        "converged" or "tolerance_not_met".

    Examples
    --------
    >>> import torch, kolmo
    >>> from kolmo import control
    >>> gauss = lambda m: (lambda x: torch.exp(-2.0 * (x[..., 0] - m) ** 2))
    >>> bm = kolmo.SDE(0.0, diffusion=1.0, dim=1)
    >>> bridge = control.schroedinger_bridge(bm, gauss(-0.5), gauss(0.5), 1.0, kolmo.Box(-5.0, 5.0))
    >>> bridge.status, bool(abs(bridge.masses[-1] @ bridge.grid.points[:, 0] - 0.5) < 1e-3)
    ('converged', True)
    """

    sde: SDE
    cost: float
    grid: Grid
    times: np.ndarray
    log_psi: np.ndarray
    masses: np.ndarray
    iterations: int
    misfit: float
    error_estimate: float
    status: str
    _chain: "_Chain" = field(repr=False)

    def density(self, t: float) -> np.ndarray:
        """Density at the nodes at a time, shape grid.shape; linear between ``times``."""
        k, s = _bracket(self.times, t)
        mass = (1.0 - s) * self.masses[k] + s * self.masses[min(k + 1, len(self.times) - 1)]
        return np.asarray(mass / self.grid.volumes).reshape(self.grid.shape)

    @cached_property
    def coupling(self) -> np.ndarray:
        """Joint probabilities of the cells at times 0 and T, shape (size, size).

        Raises
        ------
        InputError
            If the grid has more than 3,000 nodes.
        """
        if self.grid.size > DENSE:
            raise InputError("grid", f"{self.grid.size} nodes", f"at most {DENSE} for the matrix of the coupling")
        kernel = self._chain.pulled(np.eye(self.grid.size))
        joint = np.exp(np.clip(self.log_psi[-1], NOTHING, None))[None] * kernel
        rows = joint.sum(1)
        return np.asarray(joint * (self.masses[0] / np.where(rows > 0, rows, 1.0))[:, None])


@at_home
def schroedinger_bridge(
    sde: SDE,
    density0: Callable[..., Any],
    density1: Callable[..., Any],
    horizon: float,
    box: Box | None = None,
    *,
    rtol: float = 1e-3,
    atol: float = 1e-6,
    max_seconds: float | None = None,
    max_cells: int | None = None,
) -> SchroedingerBridge:
    r"""Steer one density into another with least effort.

    .. math::
        \min_a E\int_0^T \tfrac12|\sigma^{-1}a|^2\,dt,\quad dX = (b + a)\,dt + \sigma\,dW,\quad
        X_0 \sim \rho_0,\ X_T \sim \rho_1

    The optimal steering is :math:`a = \Sigma\nabla\log\psi` with ψ a positive solution of the backward equation,
    found by the iteration of Fortet and Sinkhorn: alternately the backward and the forward equation, each divided into
    the density that is to be met. Both are marched by uniformisation of a monotone scheme, a sum of non-negative terms:
    positive for every step, and exact in time for autonomous coefficients (frozen at the middle of T/32 otherwise).
    Potentials are kept in logarithms. Grids are refined until the cost changes by less than the tolerance.

    Parameters
    ----------
    sde : SDE
        The process without steering; its functions get torch tensors.
    density0, density1 : callable
        ``density(x)`` -> ``(...)``, torch tensors, not necessarily normalised.
    horizon : float
        T.
    box : Box
        Finite domain that holds both densities and the paths between them; no absorbing or elastic faces.
    rtol, atol : float
        Tolerance on the cost.
    max_seconds : float, optional
        Time after which the best finished grid is taken, with status "tolerance_not_met"; default 120.
    max_cells : int, optional
        Largest grid tried; default 2,000, 25,000 or 50,000 nodes in one, two or three dimensions.

    Returns
    -------
    SchroedingerBridge

    Raises
    ------
    InputError
        For bad densities, or where a box is missing.
    NotConvergedError
        If the second density cannot be reached from the first one (no or hardly any noise).

    Notes
    -----
    Fortet 1940; Sinkhorn 1964; Chen, Georgiou and Pavon 2021 (review). Uniformisation: Jensen 1953.

    Examples
    --------
    >>> import torch, kolmo
    >>> from kolmo import control
    >>> gauss = lambda m: (lambda x: torch.exp(-2.0 * (x[..., 0] - m) ** 2))
    >>> bm = kolmo.SDE(0.0, diffusion=1.0, dim=1)
    >>> br = control.schroedinger_bridge(bm, gauss(-0.5), gauss(0.5), 1.0, kolmo.Box(-5.0, 5.0))
    >>> bool((abs(br.coupling.sum(0) - br.masses[-1]) < 1e-6).all())
    True
    """
    refuse_jumps(sde, "a Schrödinger bridge", "drift steers what noise moves, not jumps")
    if box is None or not (np.isfinite(box.lower).all() and np.isfinite(box.upper).all()):
        raise InputError("box", box, "a finite box that holds both densities and the paths between them")
    if any(isinstance(face, (Absorbing, Robin)) for pair in box.faces for face in pair):
        raise InputError("box", box, "no absorbing or elastic faces: mass would be lost")
    problem = KolmogorovProblem(sde, lambda x: x[..., 0], horizon, box).handing("torch")
    n, d = float(FIRST_NODES[box.dim]), box.dim
    limits = Limits.of(max_cells, max_seconds, MAX_CELLS[d], MAX_SECONDS)
    n = min(n, limits.cells ** (1.0 / d))
    ladder = _Ladder()
    tolerance = math.inf
    level: _Level | None = None
    while True:
        begun = limits.spent
        try:
            level = _Level(problem, Grid.of(box, [round(n)] * d), density0, density1, limits)
        except OutOfTimeError:
            if level is None:
                raise NotConvergedError(f"no grid was finished within {limits.over}: allow more") from None
            return _unmet(level, problem, ladder, tolerance, limits.over)
        ladder.add(level)
        tolerance = atol + rtol * abs(ladder.cost)
        if len(ladder.costs) > 2 and ladder.estimate <= tolerance:
            return level.bridge(problem, ladder.cost, ladder.estimate, "converged")
        # the stiffer matrices of a finer grid take more products of a larger one
        reason = limits.excess((n * GROWTH) ** d, (limits.spent - begun) * GROWTH ** (d + 2))
        if reason and (len(ladder.costs) > 1 or limits.late()):
            return _unmet(level, problem, ladder, tolerance, reason)
        n *= GROWTH


class _Ladder:
    r"""Costs of finer and finer grids, extrapolated where they show the second order of chains that noise dominates.

    Where :math:`C(h) = C + c_1h^2 + c_2h^4 + \dots` the last levels give the value at h = 0 of a polynomial in h²
    (Richardson 1911); the change from the levels before to these is the error of those before, and an upper estimate
    of the error now. Otherwise the last cost stands, with an estimate that counts on first order.
    """

    def __init__(self) -> None:
        self.spacings: list[float] = []
        self.costs: list[float] = []
        self.cost = self.estimate = math.inf

    def add(self, level: "_Level") -> None:
        """Take in the next grid."""
        self.spacings.append(1.0 / (max(level.grid.shape) - 1))
        self.costs.append(level.cost)
        rounding = level.misfit * abs(level.cost)
        values = [np.array([[cost]]) for cost in self.costs]
        resolutions = [1.0 / h for h in self.spacings]
        self.cost = self.costs[-1]
        self.estimate = float(Convergence(1.0).judge(resolutions, values, rounding=rounding).estimate[0])
        if len(values) > LADDER and all(self._second_order(k) for k in (len(values), len(values) - 1)):
            now, before = self._limit(len(values)), self._limit(len(values) - 1)
            if abs(now - before) + rounding < self.estimate:
                self.cost, self.estimate = now, abs(now - before) + rounding

    def _second_order(self, count: int) -> bool:
        """Whether the last three of so many levels show order two."""
        a, b, c = (np.array([v]) for v in self.costs[count - 3 : count])
        n = [1.0 / h for h in self.spacings[count - 3 : count]]
        aligned = bool((b - a) * (c - b) > 0)
        return aligned and abs(float(observed_order(n, np.abs(b - a), np.abs(c - b))[0]) - 2.0) <= NEARLY

    def _limit(self, count: int) -> float:
        """Value at h = 0 of the polynomial in h² through the last few of so many levels (Neville)."""
        first = max(0, count - LADDER)
        h2, table = np.array(self.spacings[first:count]) ** 2, list(self.costs[first:count])
        for width in range(1, len(table)):
            for k in range(len(table) - width):
                table[k] = (h2[k] * table[k + 1] - h2[k + width] * table[k]) / (h2[k] - h2[k + width])
        return float(table[0])


def _unmet(
    level: "_Level", problem: KolmogorovProblem, ladder: _Ladder, tolerance: float, reason: str
) -> SchroedingerBridge:
    """The finest grid that was finished, with a warning."""
    message = f"stopped by {reason}: the cost is known to {ladder.estimate:.1e}, tolerance {tolerance:.1e}"
    warnings.warn(message, ToleranceWarning, stacklevel=3)
    return level.bridge(problem, ladder.cost, ladder.estimate, "tolerance_not_met")


class _Chain:
    """The process as a Markov chain on the nodes, marched by uniformisation over equal intervals.

    Coefficients that depend on time are frozen in every interval: of those there are more on finer grids.
    """

    def __init__(self, generator: Generator, horizon: float) -> None:
        same = generator.autonomous and len(generator.intervals()) == 1
        finer = max(generator.grid.shape) / FIRST_NODES[generator.grid.dim]
        self.count = INTERVALS if same else round(INTERVALS * max(finer, 1.0))
        self.dt = horizon / self.count
        middles = [(k + 0.5) * self.dt for k in range(self.count)]
        first = sp.csr_matrix(generator.matrix(middles[0]))
        self.matrices = [first] * self.count if same else [sp.csr_matrix(generator.matrix(t)) for t in middles]
        self.kernel: np.ndarray | None = None
        self.whole: np.ndarray | None = None
        if same and generator.grid.size <= SMALL:
            self.kernel = self._exponential(first, np.eye(generator.grid.size))
            self.whole = np.linalg.matrix_power(self.kernel, self.count)

    def _exponential(self, Q: sp.csr_matrix, v: np.ndarray) -> np.ndarray:
        """exp(dt Q) v as a sum of non-negative terms."""
        rate = 1.02 * float(-Q.diagonal().min()) + 1e-300
        stay = sp.csr_matrix(sp.identity(Q.shape[0]) + Q / rate)
        mean = rate * self.dt
        # the terms beyond twelve standard deviations of the Poisson law are below rounding
        last = math.ceil(mean + 12.0 * math.sqrt(mean) + 20.0)
        logs = -mean + np.arange(last + 1) * math.log(mean) - np.array([math.lgamma(k + 1.0) for k in range(last + 1)])
        weights, total, term = np.exp(logs), np.zeros(v.shape), v
        for weight in weights:
            total = total + weight * term
            term = stay @ term
        return np.asarray(total)

    def backward(self, v: np.ndarray) -> list[np.ndarray]:
        """States at all times, latest first, from v at T."""
        states = [v]
        for Q in self.matrices[::-1]:
            last = states[-1]
            states.append(self._exponential(Q, last) if self.kernel is None else self.kernel @ last)
        return states

    def forward(self, mass: np.ndarray) -> list[np.ndarray]:
        """Masses at all times, from those at 0."""
        states = [mass]
        for Q in self.matrices:
            last = states[-1]
            states.append(self._exponential(sp.csr_matrix(Q.T), last) if self.kernel is None else last @ self.kernel)
        return states

    def pulled(self, v: np.ndarray) -> np.ndarray:
        """State at 0 from v at T."""
        return self.backward(v)[-1] if self.whole is None else self.whole @ v

    def pushed(self, mass: np.ndarray) -> np.ndarray:
        """Masses at T from those at 0."""
        return self.forward(mass)[-1] if self.whole is None else mass @ self.whole


class _Level:
    """Sinkhorn's iteration on one grid."""

    def __init__(
        self,
        problem: KolmogorovProblem,
        grid: Grid,
        density0: Callable[..., Any],
        density1: Callable[..., Any],
        limits: Limits,
    ) -> None:
        self.grid = grid
        self.chain = _Chain(discretize(problem, grid, "monotone"), float(problem.horizon or 0.0))
        m0, m1 = (_mass(f, grid, name) for f, name in ((density0, "density0"), (density1, "density1")))
        logs = np.zeros(grid.size)
        for count in range(1, ITERATIONS + 1):
            limits.check()
            psi = _scaled(logs)
            start = self.chain.pulled(psi)
            m0 = self._reached(start, m0, "the second density cannot be reached from all of the first one")
            share = np.where(m0 > 0, m0 / np.where(start > 0, start, 1.0), 0.0)
            end = self.chain.pushed(share)
            m1 = self._reached(end, m1, "the first density does not reach all of the second one")
            misfit = 0.5 * float(np.abs(end * psi - m1).sum())
            self.misfit, self.iterations = misfit, count
            if misfit <= MISFIT:
                break
            with np.errstate(divide="ignore"):
                logs = np.where(m1 > 0, np.log(m1) - np.log(np.where(end > 0, end, 1.0)), NOTHING)
        psi = _scaled(logs)
        states = self.chain.backward(psi)[::-1]
        share = np.where(m0 > 0, m0 / np.where(states[0] > 0, states[0], 1.0), 0.0)
        with np.errstate(divide="ignore"):
            self.log_psi = np.maximum(np.log(np.stack(states)), NOTHING)
        self.masses = np.stack([a * b for a, b in zip(states, self.chain.forward(share), strict=True)])
        self.cost = float((m1 * self.log_psi[-1])[m1 > 0].sum() - (m0 * self.log_psi[0])[m0 > 0].sum())

    def _reached(self, there: np.ndarray, mass: np.ndarray, otherwise: str) -> np.ndarray:
        """The mass without what no path joins, if that is next to nothing; else it is refused."""
        missed = (mass > 0) & ~(there > 0)
        if mass[missed].sum() > LOST:
            raise NotConvergedError(
                f"{otherwise}: nothing arrives at {self.grid.points[missed][0].tolist()}. Fix: more noise; or "
                "'reflecting' faces, as corners of a grid with open faces stay where they are"
            )
        return np.asarray(np.where(missed, 0.0, mass) / mass[~missed].sum()) if missed.any() else mass

    def bridge(self, problem: KolmogorovProblem, cost: float, estimate: float, status: str) -> SchroedingerBridge:
        """The result, with the steered process."""
        times = np.linspace(0.0, float(problem.horizon or 0.0), self.chain.count + 1)
        base, grid, logs = problem.sde, self.grid, self.log_psi
        low, high = grid.box
        loose = np.array([0.0 if axis.periodic else 1.0 for axis in grid.axes])

        def drift(t: float, x: Any) -> Any:
            points = as_points(x, grid.dim)
            xp = namespace(points)
            inside = xp.minimum(xp.maximum(points, as_like(low, points)), as_like(high, points))
            inside = points + as_like(loose, points) * (inside - points)
            k, s = _bracket(times, t)
            u = as_like((1.0 - s) * logs[k] + s * logs[min(k + 1, len(times) - 1)], points)
            slopes = [
                grid.interpolate(u, inside, WIDTH, [int(i == j) for j in range(grid.dim)]) for i in range(grid.dim)
            ]
            steer = xp.einsum("...ij,...j->...i", base.covariance(t, points), xp.stack(slopes, -1))
            return base.drift(t, points) + steer

        steered = SDE(drift, covariance=base.covariance, dim=grid.dim, breakpoints=base.breakpoints)
        return SchroedingerBridge(
            steered,
            cost,
            grid,
            times,
            logs,
            self.masses,
            self.iterations,
            self.misfit,
            estimate,
            status,
            self.chain,
        )


def _scaled(logs: np.ndarray) -> np.ndarray:
    """exp(logs), scaled so that its largest entry is 1."""
    return np.where(logs > NOTHING, np.exp(np.clip(logs - logs.max(), NOTHING, None)), 0.0)


def _mass(density: Callable[..., Any], grid: Grid, name: str) -> np.ndarray:
    """Probabilities of the cells, normalised; tails below rounding of the largest are dropped."""
    values = density(torch.as_tensor(grid.points))
    values = as_numpy(values) if is_tensor(values) else np.asarray(values, dtype=float)
    if values.shape != (grid.size,):
        raise InputError(name, f"a result of shape {values.shape}", f"shape {(grid.size,)}")
    if not np.isfinite(values).all() or (values < 0).any() or values.max() <= 0:
        raise InputError(name, f"values from {values.min()} to {values.max()}", "a finite, non-negative density")
    mass = values * grid.volumes
    mass = np.where(mass > 1e-16 * mass.max(), mass, 0.0)
    return np.asarray(mass / mass.sum())


def _bracket(times: np.ndarray, t: float) -> tuple[int, float]:
    """Index and fraction of a time between stored ones."""
    k = int(np.clip(np.searchsorted(times, t, side="right") - 1, 0, len(times) - 2))
    return k, float(np.clip((t - times[k]) / (times[k + 1] - times[k]), 0.0, 1.0))
