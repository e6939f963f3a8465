"""The Schrödinger bridge: steer one density into another with least effort."""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np

from kolmo.arrays import as_like, as_numpy, as_points, at_home
from kolmo.control.chain_bridge import ChainBridge, ChainBridges
from kolmo.control.densities import GivenDensity
from kolmo.control.gaussian_bridge import GaussianBridge, GaussianBridges
from kolmo.control.linear import LinearProcess
from kolmo.errors import InputError, NotConvergedError, ToleranceWarning
from kolmo.grid import Grid
from kolmo.limits import Limits, OutOfTimeError
from kolmo.problem import KolmogorovProblem
from kolmo.problem.box import Box
from kolmo.problem.sde import SDE, refuse_jumps
from kolmo.refine.estimate import Convergence, observed_order
from kolmo.shown import Shown

# The largest lattice or grid by dimension.
MAX_CELLS = {1: 20_000, 2: 250_000, 3: 1_000_000}
MAX_CHAIN = {1: 2_000, 2: 25_000, 3: 50_000}
MAX_SECONDS = 120.0
# Total variation by which a marginal may be missed, as a part of the relative tolerance; at least.
MISFIT, LEAST_MISFIT = 1e-3, 1e-9
# Times between 0 and T at which tables are made, and nodes of their grid.
INTERVALS = 32
TABLE = {1: 2_000, 2: 25_000, 3: 50_000}
# Nodes up to which the coupling is made as a matrix.
DENSE = 3000
# Levels through which a polynomial in h² is put, and how close to 2 the observed orders have to be for that.
LADDER, NEARLY = 4, 0.5
# Paths, and parts of the horizon, at which drift and density of the levels are compared.
WITNESSES, LOOKS = 32, (0.0, 0.25, 0.5, 0.75, 0.95)
# Points at which coefficients are looked at to see whether the process is linear, by dimension.
PROBES = {1: 1025, 2: 4096, 3: 8192}


# A bridge at one resolution.
_Level = GaussianBridge | ChainBridge


class BridgeErrors(NamedTuple):
    r"""Estimates of errors, all by the same refinement, each as a number.

    Attributes
    ----------
    cost : float
        Of the cost.
    drift : float
        Root mean square, over the law of the bridge, of the error of the steering, at the worst of five times.
    marginals : float
        Total variation between the law at a time and the true one, at the worst of three times.
    coupling : float
        Root mean square of the error of :math:`E[X_T \mid X_0]`.
    """

    cost: float
    drift: float
    marginals: float
    coupling: float


@dataclass(frozen=True, eq=False, repr=False)
class SchroedingerBridge(Shown):
    r"""The process that carries one density into another and is closest to the given one.

    Attributes
    ----------
    sde : SDE
        The steered process, drift :math:`b + \Sigma\nabla\log\psi`.
    cost : float
        :math:`E\int\frac12|\sigma^{-1}a|^2dt`, the entropy relative to the process started in the same law.
    times : ndarray, shape (nt,)
        From 0 to T, for tables.
    iterations : int
        Steps of Sinkhorn's and Newton's iterations on the last level.
    misfit : float
        Total variation by which a marginal is missed on the last level.
    size : int
        Nodes of the last level.
    errors : BridgeErrors
        Estimates of the errors of cost, drift, marginals and coupling.
    status : str
        "converged", "tolerance_not_met" or, after Ctrl-C, "interrupted": the finest level that was finished.

    References
    ----------
    Chen, Georgiou and Pavon 2021 (review).

    Examples
    --------
    >>> import torch, kolmo
    >>> from kolmo import control
    >>> gauss = lambda m: (lambda x: torch.exp(-2.0 * (x[..., 0] - m) ** 2))
    >>> bm = kolmo.SDE(0.0, diffusion=1.0, dim=1)
    >>> bridge = control.schroedinger_bridge(bm, gauss(-0.5), gauss(0.5), 1.0)
    >>> bridge.status, bool(abs(bridge.masses[-1] @ bridge.grid.points[:, 0] - 0.5) < 1e-3)
    ('converged', True)
    """

    sde: SDE
    cost: float
    times: np.ndarray
    iterations: int
    misfit: float
    size: int
    errors: BridgeErrors
    status: str
    _level: _Level = field(repr=False)

    @property
    def error_estimate(self) -> float:
        """Estimate of the error of the cost."""
        return self.errors.cost

    @cached_property
    def grid(self) -> Grid:
        """Nodes of the tables: they hold the paths between the two densities."""
        return self._level.grid(TABLE[self._dim])

    @cached_property
    def log_psi(self) -> np.ndarray:
        """Logarithms of the potential ψ of the steering, shape (nt, size of the grid)."""
        return np.stack([self._level.log_psi(float(t), self.grid.points) for t in self.times])

    @cached_property
    def masses(self) -> np.ndarray:
        """Probability of every cell of the grid at every time, shape (nt, size of the grid)."""
        masses = np.stack([self._level.density(float(t), self.grid.points) for t in self.times]) * self.grid.volumes
        return np.asarray(masses / masses.sum(1, keepdims=True))

    @property
    def _dim(self) -> int:
        return int(self.sde.dim or 1)

    def density(self, t: float, x: Any = None) -> np.ndarray:
        """Density of X_t at points (..., d), shape (...); without points at the nodes, shape grid.shape."""
        if x is None:
            return np.asarray(self._level.density(float(t), self.grid.points)).reshape(self.grid.shape)
        points = as_numpy(as_points(x, self._dim))
        return self._level.density(float(t), points.reshape(-1, self._dim)).reshape(points.shape[:-1])

    def arrival(self, x: Any) -> np.ndarray:
        r"""Mean of the place of arrival, :math:`E[X_T \mid X_0 = x]`, at points (..., d): the entropic map."""
        points = as_numpy(as_points(x, self._dim))
        return self._level.arrival(points.reshape(-1, self._dim)).reshape(points.shape)

    @cached_property
    def coupling(self) -> np.ndarray:
        """Joint probabilities of the cells at times 0 and T, shape (size, size) of the grid.

        Raises
        ------
        InputError
            If the grid has more than 3,000 nodes.
        """
        if self.grid.size > DENSE:
            raise InputError(
                "grid", f"{self.grid.size} nodes", f"at most {DENSE} for the matrix of the coupling", "ask arrival(x)"
            )
        joint = self._level.coupling(self.grid.points) * self.grid.volumes
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

    The optimal steering is :math:`a = \Sigma\nabla\log\psi` with ψ a positive solution of the backward equation, found
    by the iteration of Fortet and Sinkhorn: alternately the backward and the forward equation, each divided into the
    density that is to be met.

    Where drift is affine and noise the same everywhere, and the box is left out or has open faces, transitions are
    Gaussian. The iteration is then one between two lattices, each where its density is, in logarithms: noise may be as
    small and densities as far apart as they like. Densities may jump. Between the ends ψ is an integral of Gaussians.

    Elsewhere the process becomes a Markov chain on a grid, marched by uniformisation, sums of positive terms. Where
    noise is so small that no path of the chain joins the densities, this is said.

    Lattices and grids are refined until the cost is known to the tolerance; errors of drift, marginals and coupling are
    estimated by the same refinement.

    Parameters
    ----------
    sde : SDE
        The process without steering; its functions get torch tensors.
    density0, density1 : callable
        ``density(x)`` -> ``(...)``, torch tensors, not necessarily normalised; it may underflow to zero.
    horizon : float
        T.
    box : Box, optional
        Where to look for the densities: open faces are cuts, that are moved where densities only end in tails there.
        Needed, and finite, with drift that is not affine, noise that is not constant, or faces that reflect; absorbing
        and elastic faces are refused. Without one, densities are looked for out to a distance of 10⁶.
    rtol, atol : float
        Tolerance on the cost.
    max_seconds : float, optional
        Time after which the best level so far is taken, with status "tolerance_not_met"; default 120.
    max_cells : int, optional
        Largest lattice tried; default 20,000, 250,000 or 1,000,000 nodes in one, two or three dimensions; for chains
        2,000, 25,000 or 50,000.

    Returns
    -------
    SchroedingerBridge

    Raises
    ------
    InputError
        For bad densities, densities that are not found, or where a box is missing.
    NotConvergedError
        If the second density cannot be reached from the first one by a chain.

    Notes
    -----
    Fortet 1940; Sinkhorn 1964; Chen, Georgiou and Pavon 2021 (review). Newton's method for the iteration: Brauer,
    Clason, Lorenz and Wirth 2017; from larger to smaller noise: Schmitzer 2019. Uniformisation: Jensen 1953.

    Examples
    --------
    >>> import torch, kolmo
    >>> from kolmo import control
    >>> gauss = lambda m: (lambda x: torch.exp(-2.0 * (x[..., 0] - m) ** 2))
    >>> bm = kolmo.SDE(0.0, diffusion=1.0, dim=1)
    >>> br = control.schroedinger_bridge(bm, gauss(-0.5), gauss(0.5), 1.0)
    >>> bool((abs(br.coupling.sum(0) - br.masses[-1]) < 1e-6).all())
    True
    """
    refuse_jumps(sde, "a Schrödinger bridge", "drift steers what noise moves, not jumps")
    levels, problem = _levels(sde, density0, density1, horizon, box, rtol)
    d = problem.dim
    most = MAX_CELLS if isinstance(levels, GaussianBridges) else MAX_CHAIN
    limits = Limits.of(max_cells, max_seconds, most[d], MAX_SECONDS)
    ladder = _Ladder()
    n = min(1.0, (limits.cells / _cells(levels, 1.0)) ** (1.0 / d))
    while True:
        begun = limits.spent
        try:
            before: Any = ladder.last
            ladder.add(n, levels.level(n, before, limits))
        except OutOfTimeError:
            if ladder.last is None:
                raise NotConvergedError(f"no grid was finished within {limits.over}: allow more") from None
            return _unmet(problem, ladder, atol + rtol * abs(ladder.cost), limits.over)
        except KeyboardInterrupt:
            if ladder.last is None:
                raise
            return _bridge(problem, ladder, "interrupted")
        tolerance = atol + rtol * abs(ladder.cost)
        if len(ladder.costs) >= ladder.levels[-1].fewest and ladder.estimate <= tolerance:
            return _bridge(problem, ladder, "converged")
        # more nodes take longer, by one power for the kernel and by another for its iterations
        reason = limits.excess(_cells(levels, n * levels.growth), (limits.spent - begun) * levels.growth ** (d + 2))
        if reason and (len(ladder.costs) > 1 or limits.late()):
            return _unmet(problem, ladder, tolerance, reason)
        n *= levels.growth


def _cells(levels: GaussianBridges | ChainBridges, resolution: float) -> int:
    """Nodes of the larger lattice at a resolution."""
    return max(math.prod(shape) for shape in levels.shapes(resolution))


def _levels(
    sde: SDE, density0: Callable[..., Any], density1: Callable[..., Any], horizon: float, box: Box | None, rtol: float
) -> tuple[GaussianBridges | ChainBridges, KolmogorovProblem]:
    """The kind of bridge for a process, and the process as it is to be handed tensors."""
    if box is not None and box.has("exits"):
        raise InputError("box", box, "no absorbing or elastic faces: mass would be lost")
    d = box.dim if box is not None else sde.dim
    if d is None:
        raise InputError("sde", "a process without dim", "its dimension, where no box tells it", "SDE(..., dim=1)")
    within = Box.unbounded(d) if box is None else box
    problem = KolmogorovProblem(sde, lambda x: x[..., 0], horizon, within).handing("torch")
    lower, upper = np.array(within.lower), np.array(within.upper)
    first, last = (GivenDensity(f, k, lower, upper) for f, k in ((density0, "density0"), (density1, "density1")))
    if within.where("cut").all():
        (first, hull0), (last, hull1) = first.found(), last.found()
        linear = LinearProcess.found(problem.sde, horizon, _probes(hull0, hull1))
        if linear is not None and linear.reaches(horizon):
            misfit = min(max(MISFIT * rtol, LEAST_MISFIT), MISFIT * MISFIT)
            return GaussianBridges.of(linear, horizon, (first, last), (hull0, hull1), misfit), problem
    if not (np.isfinite(lower).all() and np.isfinite(upper).all()):
        raise InputError(
            "box", box, "a finite box that holds both densities and the paths between them",
            "it can be left out where drift is affine and noise the same everywhere",
        )  # fmt: skip
    return ChainBridges(problem, first, last), problem


def _probes(*hulls: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Points all over the box that holds the hulls."""
    low, high = np.min([h[0] for h in hulls], axis=0), np.max([h[1] for h in hulls], axis=0)
    unit = np.random.default_rng(0).random((PROBES[len(low)], len(low)))
    return np.asarray(low + (high - low) * unit)


class _Ladder:
    r"""Finer and finer levels, and what they say about the errors of the last one.

    Costs are extrapolated where they show order two. Where :math:`C(h) = C + c_1h^2 + c_2h^4 + \dots` the last levels
    give the value at h = 0 of a polynomial in h² (Richardson 1911); the change from the levels before to these is the
    error of those before, and an upper estimate of the error now. Otherwise the last cost stands, with an estimate that
    counts on the order of the method.
    """

    def __init__(self) -> None:
        self.resolutions: list[float] = []
        self.levels: list[_Level] = []
        self.costs: list[float] = []
        self.cost = self.estimate = math.inf

    @property
    def last(self) -> _Level | None:
        """The finest level."""
        return self.levels[-1] if self.levels else None

    def add(self, resolution: float, level: _Level) -> None:
        """Take in the next level."""
        self.resolutions.append(resolution)
        self.levels.append(level)
        self.costs.append(level.cost)
        rounding = level.misfit * max(abs(level.cost), 1.0) + level.rounding
        values = [np.array([[cost]]) for cost in self.costs]
        self.cost = self.costs[-1]
        self.estimate = float(self._judged(values, rounding)[0])
        if len(values) > LADDER and all(self._second_order(k) for k in (len(values), len(values) - 1)):
            now, before = self._limit(len(values)), self._limit(len(values) - 1)
            if abs(now - before) + rounding < self.estimate:
                self.cost, self.estimate = now, abs(now - before) + rounding

    def errors(self, horizon: float) -> BridgeErrors:
        """Estimates of everything, from witnesses: points on paths of the first level."""
        times = horizon * np.array(LOOKS)
        points = self.levels[0].paths(times, WITNESSES, np.random.default_rng(0))
        pairs = list(zip(times.tolist(), points, strict=True))
        drift = [self._distance(partial(_steering, t=t, x=x)) for t, x in pairs]
        laws = [self._distance(partial(_log_density, t=t, x=x), 1, 1.0) for t, x in pairs[1:-1]]
        spread = float(np.std(self.levels[-1].arrival(points[0]), axis=0).max())
        coupling = self._distance(lambda level: level.arrival(points[0]), 2, spread)
        return BridgeErrors(self.estimate, max(drift), 0.5 * max(laws) + self.levels[-1].misfit, coupling)

    def _distance(self, answer: Callable[[_Level], np.ndarray], power: int = 2, size: float | None = None) -> float:
        """Mean, in this power, of estimates of errors of answers at the witnesses; ``size`` tells what is resolved."""
        values = [np.asarray(answer(level)) for level in self.levels]
        rounding = self.levels[-1].between * (float(np.abs(values[-1]).max()) if size is None else size)
        estimate = self._judged([v.reshape(1, -1) for v in values], rounding).reshape(len(values[0]), -1)
        return float(np.mean(np.sqrt((estimate**2).sum(1)) ** power) ** (1.0 / power))

    def _judged(self, values: list[np.ndarray], rounding: float) -> np.ndarray:
        level = self.levels[-1]
        return Convergence(level.order, level.fewest).judge(self.resolutions, values, rounding=rounding).estimate

    def _second_order(self, count: int) -> bool:
        """Whether the last three of so many levels show order two."""
        a, b, c = (np.array([v]) for v in self.costs[count - 3 : count])
        n = self.resolutions[count - 3 : count]
        aligned = bool((b - a) * (c - b) > 0)
        return aligned and abs(float(observed_order(n, np.abs(b - a), np.abs(c - b))[0]) - 2.0) <= NEARLY

    def _limit(self, count: int) -> float:
        """Value at h = 0 of the polynomial in h² through the last few of so many levels (Neville)."""
        first = max(0, count - LADDER)
        h2, table = np.array(self.resolutions[first:count]) ** -2.0, list(self.costs[first:count])
        for width in range(1, len(table)):
            for k in range(len(table) - width):
                table[k] = (h2[k] * table[k + 1] - h2[k + width] * table[k]) / (h2[k] - h2[k + width])
        return float(table[0])


def _steering(level: _Level, t: float, x: np.ndarray) -> np.ndarray:
    return level.steering(t, x)


def _log_density(level: _Level, t: float, x: np.ndarray) -> np.ndarray:
    return np.asarray(np.log(np.maximum(level.density(t, x), 1e-300)))


def _unmet(problem: KolmogorovProblem, ladder: _Ladder, tolerance: float, reason: str) -> SchroedingerBridge:
    """The finest level that was finished, with a warning."""
    message = f"stopped by {reason}: the cost is known to {ladder.estimate:.1e}, tolerance {tolerance:.1e}"
    warnings.warn(message, ToleranceWarning, stacklevel=3)
    return _bridge(problem, ladder, "tolerance_not_met")


def _bridge(problem: KolmogorovProblem, ladder: _Ladder, status: str) -> SchroedingerBridge:
    """The result, with the steered process."""
    level, base, d, horizon = ladder.levels[-1], problem.sde, problem.dim, float(problem.horizon or 0.0)

    def drift(t: float, x: Any) -> Any:
        points = as_points(x, d)
        steer = level.steering(float(t), as_numpy(points).reshape(-1, d)).reshape(tuple(points.shape))
        return base.drift(t, points) + as_like(steer, points)

    steered = SDE(drift, covariance=base.covariance, dim=d, breakpoints=base.breakpoints)
    times = np.linspace(0.0, horizon, INTERVALS + 1)
    errors = ladder.errors(horizon)
    return SchroedingerBridge(
        steered, ladder.cost, times, level.iterations, level.misfit, level.size, errors, status, level
    )
