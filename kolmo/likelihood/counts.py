r"""Data of many together: how many are left, where they went out and when, how they are spread, and their moments.

All are functionals of one law, which is moved by the transposes of the steps that values take: with masses
:math:`p_{n+1} = S_n^{\mathsf T}p_n` at the nodes,

.. math::
    P(\tau > t) = \sum_i p_i(t), \qquad
    P(\tau \in (s, t],\ X_\tau \in F) = \int_s^t j_F\,dt, \qquad
    P(X_t \in B) = \int_B \rho(t, x)\,dx, \qquad E f(X_t) = \sum_i p_i(t) f(x_i)

with j the outflow through a face and ρ the density read off the masses.
"""

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.polynomial import legendre
from scipy.special import gammaln

from kolmo.arrays import as_numpy, as_points
from kolmo.control.densities import GivenDensity
from kolmo.control.law import Law, law
from kolmo.discretization import Discretization
from kolmo.errors import InputError
from kolmo.forward.exits import in_time
from kolmo.grid.grading import Grading, Sinh, Uniform
from kolmo.grid.grid import Axis, Grid
from kolmo.likelihood.base import Level, Likelihood, log_of
from kolmo.likelihood.paths import in_torch
from kolmo.march import time_nodes
from kolmo.problem.box import Box
from kolmo.problem.faces import Open
from kolmo.problem.problem import KolmogorovProblem
from kolmo.problem.rest import at_rest
from kolmo.problem.sde import SDE
from kolmo.schemes.generator import discretize

# Nodes per axis of the first level and of the finest one, by dimension.
FIRST, MOST = {1: 48.0, 2: 32.0, 3: 20.0}, {1: 1700.0, 2: 260.0, 3: 52.0}
# Order that levels show: of the steps, beside which space has six.
ORDER = {1: 5.0, 2: 3.0, 3: 3.0}
STEPPER = {1: "radau5", 2: "mcs3", 3: "mcs3"}
# Steps in each doubling of time, per node of an axis, and doublings before the first time that is looked at.
STEPS, BEFORE = {1: 1.0 / 8.0, 2: 1.0 / 8.0, 3: 1.0 / 6.0}, 3
# Nodes lie about the start: evenly within so many standard deviations that it has at the first time.
WIDE = 4.0
# What may be gone beyond a cut, and the factor by which one is moved.
TAIL, WIDER = 1e-9, 1.25
# Points of Gauss on a stretch between nodes: exact for the interpolant in time; in space for the widest one.
IN_TIME, IN_SPACE = 3, 5
# Edges of bins that are infinite.
FAR = 1e300


class LawLikelihood(Likelihood):
    """Likelihood of data that are functionals of the law of a process at given times.

    Attributes
    ----------
    sde : SDE
        The process.
    initial : callable, array_like or tensor
        Where it starts.
    box : Box or None
        The state space.
    times : ndarray
        When something was seen, increasing.

    Examples
    --------
    >>> found = moments(SDE(0.0, 1.0, dim=1), [0.0], [1.0], [0.5], [0.1])
    >>> isinstance(found, LawLikelihood), found.times.tolist()
    (True, [1.0])
    """

    def __init__(self, sde: SDE, initial: Any, times: Any, box: Box | None, killing: Any, tol: float) -> None:
        super().__init__(tol)
        dim = sde.dim if sde.dim is not None else (None if box is None else box.dim)
        if dim is None or not 1 <= dim <= 3:
            raise InputError("sde", f"{dim} dimensions", "1 to 3", "SDE(..., dim=)")
        self.sde, self.initial, self.box, self.killing, self.dim = in_torch(sde), initial, box, killing, dim
        self.first, self.most, self.order = FIRST[dim], MOST[dim], ORDER[dim]
        self.times = np.unique(np.asarray(as_numpy(times), dtype=float).reshape(-1))
        if not np.isfinite(self.times).all() or len(self.times) == 0 or (self.times < 0).any() or self.times[-1] <= 0:
            raise InputError("times", as_numpy(times), "finite times, not negative, the last of them positive")
        self.problem = KolmogorovProblem(
            self.sde, lambda x: 0.0 * x[..., 0], float(self.times[-1]), box, killing=killing
        ).handing("torch")
        self._ends: tuple[np.ndarray, np.ndarray] | None = None
        self._wider = 1.0

    def renew(self) -> float:
        """Decide anew on the state space and on a resolution; the estimated error."""
        self._ends, self._wider = None, 1.0
        return super().renew()

    @abstractmethod
    def _logs(self, law: Law) -> torch.Tensor:
        """Logarithms of what every observation adds, shape (N,)."""

    def _terms(self, n: float) -> tuple[torch.Tensor, float]:
        kept = [t for t in self._seen() if t > 0.0]
        return self._logs(law(self.problem, self.initial, discretization=self._recipe(int(n)), save=kept)), 0.0

    def _next(self, n: float) -> float:
        return float(round(1.35 * n)) if self.dim == 3 else super()._next(n)

    # ------------------------------------------------------------------------------------------- where and when
    def _seen(self) -> np.ndarray:
        """Times that are kept: none after faces have met."""
        end = at_rest(self.problem).horizon or float(self.times[-1])
        return np.unique(np.minimum(self.times, end))

    def _kept(self, law: Law, t: float) -> float:
        """The time at which the law is asked what it is at a time."""
        return min(t, float(law.times[-1]))

    def _begin(self) -> np.ndarray:
        """Points (n, d) about which the process starts, at t = 0."""
        if not callable(self.initial):
            found = torch.as_tensor(as_points(self.initial, self.dim, "initial"))
            return np.asarray(as_numpy(found.detach()), dtype=float).reshape(-1, self.dim)
        low, high = (np.asarray(v, dtype=float) for v in (self.problem.box.lower, self.problem.box.upper))
        return np.stack(GivenDensity(self.initial, "initial", low, high).found()[1])

    def _recipe(self, n: int) -> Discretization:
        """Grid and steps of a resolution, on the state space that is kept."""
        rest, begin = at_rest(self.problem), self._begin()
        if rest.motion is not None:
            begin = np.asarray(rest.motion.inwards(0.0, begin))
        if self._ends is None:
            self._ends = self._cover(rest, begin)
        middle, seen = begin.mean(0), self._seen()
        first, last = float(seen[seen > 0][0]), float(seen[-1])
        noise = as_numpy(rest.sde.covariance(0.0, torch.as_tensor(middle[None])).detach())[0]
        spread = np.sqrt(begin.var(0) + first * np.maximum(np.diag(noise), 0.0))
        maps = [_about(*given) for given in zip(*self._ends, middle, WIDE * spread, strict=True)]
        grid = Grid([Axis(n, g, p) for g, p in zip(maps, rest.box.periodic, strict=True)])
        generator = discretize(self.problem, grid)
        steps = max(2, round(STEPS[self.dim] * n))
        edges = [0.0, *(first * 2.0**k for k in range(-BEFORE, math.ceil(math.log2(last / first)) + 1))]
        short = [(a, min(b, last), (b - a) / steps) for a, b in pairwise(edges) if a < last]
        times = time_nodes(generator.intervals(), 1, seen[seen > 0].tolist(), short)
        return Discretization(grid, tuple(times.tolist()), generator.scheme.name, STEPPER[self.dim])

    def _cover(self, rest: KolmogorovProblem, begin: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ends of the grid: those of the state space, and where it is open, cuts."""
        opened = np.array([[isinstance(face, Open) for face in pair] for pair in rest.box.faces])
        real = [np.array(v, dtype=float) for v in (rest.box.lower, rest.box.upper)]
        if not opened.any():
            return real[0], real[1]
        free = [np.where(opened[:, side], (-np.inf, np.inf)[side], real[side]) for side in (0, 1)]
        within = rest.box.replace(*free)
        covering = Box.covering(rest.sde, begin, float(self.times[-1]), within=within, tail=TAIL)
        middle, cuts = begin.mean(0), (np.asarray(covering.lower), np.asarray(covering.upper))
        low, high = (
            np.where(opened[:, side], middle + self._wider * (cuts[side] - middle), real[side]) for side in (0, 1)
        )
        return low, high

    def _opened(self) -> bool:
        return any(isinstance(face, Open) for pair in self.problem.box.faces for face in pair)

    def _cut(self, level: Level) -> float:
        if not self._opened():
            return 0.0
        kept, wider = self._ends, self._wider
        self._wider, self._ends = WIDER * wider, None
        other = self._level(round(WIDER * level.n))
        self._wider, self._ends = wider, kept
        return other.distance(level)

    def _widen(self) -> bool:
        self._wider, self._ends = WIDER * self._wider, None
        return True


def _about(low: float, high: float, middle: float, width: float) -> Grading:
    """Nodes about the start, unless it is as wide as the axis."""
    return Sinh(low, high, middle, width) if 0.0 < width < 0.25 * (high - low) else Uniform(low, high)


# --- exits and survival -----------------------------------------------------------------------------------------------


def exit_counts(
    sde: SDE,
    initial: Any,
    edges: Any,
    counts: Any,
    survivors: float = 0,
    *,
    box: Box,
    killing: Any = None,
    tol: float = 1e-3,
) -> "ExitLikelihood":
    r"""The likelihood of how many left between given times, and where, as a function of torch parameters.

    .. math::
        \ell = \log\frac{N!}{\prod_{jF} n_{jF}!\,m!} + \sum_{jF} n_{jF}\log P(\tau\in(t_{j-1}, t_j],\ X_\tau\in F)
        + m\log P(\tau > t_J), \qquad \tau = \inf\{t: X_t \notin \text{box}\}

    given that all N = Σn + m are under way at the first edge.

    Parameters
    ----------
    sde : SDE
        The process, in torch, in 1 to 3 dimensions; its coefficients may depend on time.
    initial : array_like, tensor or callable
        Where all start at t = 0: a point (d,), points (n, d) with equal shares, or a density in torch, ``initial(x)``
        -> ``(...)``.
    edges : array_like, shape (J + 1,)
        Ends of the intervals of time, increasing, the first not negative.
    counts : array_like of shape (J,), or mapping of faces to such
        How many left in each interval; by the way out if that is known: "low" or "high" in one dimension,
        ``(axis, side)``, or "killing". All ways out are needed then.
    survivors : float, default 0
        How many are under way still at the last edge.
    box : Box
        The state space; faces that absorb (they may move), or are elastic, let out.
    killing : number, tensor or callable, optional
        ``killing(t, x)``, a rate at which it ends anywhere.
    tol : float, default 1e-3
        Error that ℓ may have.

    Returns
    -------
    ExitLikelihood

    Raises
    ------
    InputError
        For counts that do not fit, and where there is no way out.

    Examples
    --------
    Of a hundred Brownian motions with drift between ±1, by the face that they left through:

    >>> v = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    >>> sde = SDE(lambda t, x: v + 0 * x, 1.0, dim=1, arrays="torch")
    >>> counts = {"low": [8, 12], "high": [18, 34]}
    >>> found = exit_counts(sde, [0.0], [0.0, 0.5, 2.0], counts, 28, box=Box(-1.0, 1.0, "absorbing"))
    >>> found().item().__round__(2), found.status
    (-24.53, 'converged')
    >>> bool(torch.isfinite(torch.autograd.grad(found(), v)[0]))
    True
    """
    return ExitLikelihood(sde, initial, edges, counts, survivors, box, killing, tol)


class ExitLikelihood(LawLikelihood):
    """Likelihood of numbers of exits; see :func:`exit_counts`.

    Attributes
    ----------
    edges : ndarray, shape (J + 1,)
        Ends of the intervals.
    counts : dict
        Numbers by way out, each of shape (J,); of all ways out together under None.
    survivors : float
        How many were left.

    Examples
    --------
    >>> sde, box = SDE(0.0, 1.0, dim=1), Box(-1.0, 1.0, "absorbing")
    >>> exit_counts(sde, [0.0], [0.0, 1.0], [63], 37, box=box).count
    100
    """

    def __init__(
        self,
        sde: SDE,
        initial: Any,
        edges: Any,
        counts: Any,
        survivors: float,
        box: Box,
        killing: Any,
        tol: float,
    ) -> None:
        self.edges = np.asarray(as_numpy(edges), dtype=float).reshape(-1)
        if len(self.edges) < 2 or not (np.diff(self.edges) > 0).all():
            raise InputError("edges", self.edges.tolist()[:6], "at least two increasing times")
        super().__init__(sde, initial, self.edges, box, killing, tol)
        given = counts if isinstance(counts, Mapping) else {None: counts}
        self.counts = {way: _counts(n, (len(self.edges) - 1,), "counts") for way, n in given.items()}
        self.survivors = float(_counts(survivors, (), "survivors"))

    @property
    def count(self) -> int:
        """How many there were."""
        return int(sum(n.sum() for n in self.counts.values()) + self.survivors)

    def _logs(self, law: Law) -> torch.Tensor:
        if not law.exits:
            raise InputError("box", self.problem.box, "a face that absorbs, or killing", 'boundary="absorbing"')
        alive = self._alive(law, self.edges)
        if None in self.counts:
            chances = [alive[:-1] - alive[1:]]
        else:
            named = {law._exit(way): way for way in self.counts}
            if named.keys() != set(law.exits):
                raise InputError(
                    "counts", list(self.counts), f"numbers for all ways out: {', '.join(map(str, law.exits))}"
                )
            chances = [self._out(law, way) for way in self.counts]
        chance = torch.cat([*chances, alive[-1:]]) / alive[0]
        return _multinomial(np.concatenate([*self.counts.values(), [self.survivors]]), chance)

    def _alive(self, law: Law, times: np.ndarray) -> torch.Tensor:
        """Probability of being under way at times, shape (n,)."""
        return torch.stack([_under_way(law, t) for t in times])

    def _out(self, law: Law, way: Any) -> torch.Tensor:
        """Probability of leaving by a way in each interval: the outflow, interpolated between time nodes, summed."""
        z, w = legendre.leggauss(IN_TIME)
        half = 0.5 * np.diff(law.clock)
        at = law.clock[:-1, None] + half[:, None] * (1.0 + z)
        matrix = in_time(law.clock, at.reshape(-1)).reshape(len(half), IN_TIME, -1)
        parts = torch.as_tensor(np.einsum("kqn,q,k->kn", matrix, w, half)) @ law.flux(way)
        grown = torch.cat([torch.zeros(1, dtype=torch.float64), torch.cumsum(parts, 0)])
        ends = [int(np.abs(law.clock - min(t, law.clock[-1])).argmin()) for t in self.edges]
        return grown[ends[1:]] - grown[ends[:-1]]


def survival_counts(
    sde: SDE, initial: Any, times: Any, alive: Any, total: Any, *, box: Box, killing: Any = None, tol: float = 1e-3
) -> Likelihood:
    r"""The likelihood of how many are under way still at given times.

    .. math::
        \ell = \sum_j\log\binom{N_j}{a_j} + a_j\log P(\tau > t_j) + (N_j - a_j)\log P(\tau \le t_j)

    for groups of N_j that are looked at once each; of one group that is looked at again and again, the likelihood of
    the exits in between.

    Parameters
    ----------
    sde, initial, box, killing, tol
        As for :func:`exit_counts`.
    times : array_like, shape (J,)
        Increasing positive times.
    alive : array_like, shape (J,)
        How many were under way then.
    total : float, or array_like of shape (J,)
        How many started: one number, one group that is followed; one per time, a group for each.

    Returns
    -------
    Likelihood

    Raises
    ------
    InputError
        For counts that do not fit.

    Examples
    --------
    >>> sde, box = SDE(0.0, 1.0, dim=1), Box(-1.0, 1.0, "absorbing")
    >>> found = survival_counts(sde, [0.0], [1.0], [37], 100, box=box)
    >>> found().item().__round__(3)  # binomial with probability 0.3708 (Feller 1971, X.5)
    -2.496
    >>> survival_counts(sde, [0.0], [0.5, 1.0], [68, 37], 100, box=box).count
    100
    """
    at = np.asarray(as_numpy(times), dtype=float).reshape(-1)
    left = _counts(alive, (len(at),), "alive")
    if np.ndim(as_numpy(total)) == 0:
        gone = -np.diff(np.append(float(_counts(total, (), "total")), left))
        if (gone < 0).any():
            raise InputError("alive", left.tolist()[:6], f"numbers that do not grow, at most the total {total}")
        return ExitLikelihood(sde, initial, np.append(0.0, at), gone, float(left[-1]), box, killing, tol)
    return GroupLikelihood(sde, initial, at, left, _counts(total, (len(at),), "total"), box, killing, tol)


class GroupLikelihood(LawLikelihood):
    """Likelihood of survivors in groups that are looked at once; see :func:`survival_counts`.

    Examples
    --------
    >>> sde, box = SDE(0.0, 1.0, dim=1), Box(-1.0, 1.0, "absorbing")
    >>> survival_counts(sde, [0.0], [0.5, 1.0], [68, 37], [100, 100], box=box).count
    200
    """

    def __init__(
        self,
        sde: SDE,
        initial: Any,
        at: np.ndarray,
        alive: np.ndarray,
        total: np.ndarray,
        box: Box,
        killing: Any,
        tol: float,
    ) -> None:
        if not (np.diff(at) > 0).all() or (at <= 0).any():
            raise InputError("times", at.tolist()[:6], "increasing positive times")
        if (alive > total).any():
            raise InputError("alive", alive.tolist()[:6], f"at most the totals {total.tolist()[:6]}")
        super().__init__(sde, initial, at, box, killing, tol)
        self.at, self.alive, self.total = at, alive, total

    @property
    def count(self) -> int:
        """How many there were in all groups."""
        return int(self.total.sum())

    def _logs(self, law: Law) -> torch.Tensor:
        left = torch.stack([_under_way(law, t) for t in self.at])
        pairs = zip(self.alive, self.total, left, strict=True)
        return torch.cat([_multinomial(np.array([a, n - a]), torch.stack([p, 1.0 - p])) for a, n, p in pairs])


# --- histograms and moments -------------------------------------------------------------------------------------------


def histogram(
    sde: SDE,
    initial: Any,
    times: Any,
    edges: Any,
    counts: Any,
    rest: Any = None,
    *,
    box: Box | None = None,
    killing: Any = None,
    tol: float = 1e-3,
) -> "HistogramLikelihood":
    r"""The likelihood of how many are in each bin of the state at given times, as a function of torch parameters.

    .. math::
        \ell = \sum_k \log\frac{N_k!}{\prod_B n_{kB}!} + \sum_{kB} n_{kB}\log\frac{P(X_{t_k}\in B)}{P(X_{t_k}\in\cup B)}

    with others at each time (of the same ones it is a composite likelihood). With ``rest``, those that were in none of
    the bins, or had left, are one bin more.

    Parameters
    ----------
    sde, initial, killing, tol
        As for :func:`exit_counts`.
    times : float or array_like, shape (K,)
        When.
    edges : array_like of shape (m + 1,), or list of d such
        Edges of the bins along each axis, increasing; the outer ones may be infinite.
    counts : array_like, shape (K, m_1, ..., m_d)
        How many were in each; without the first axis for one time.
    rest : float or array_like, shape (K,), optional
        How many were elsewhere. None: that is not known, and what is in the bins is all there is.
    box : Box, optional
        The state space. None: all of it.

    Returns
    -------
    HistogramLikelihood

    Raises
    ------
    InputError
        For counts that do not fit the edges.

    Examples
    --------
    >>> kappa = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    >>> ou = SDE(lambda t, x: -kappa * x, 1.0, dim=1, arrays="torch")
    >>> found = histogram(ou, [1.0], 0.5, [-np.inf, 0.0, 1.0, np.inf], [20, 49, 31])
    >>> found().item().__round__(3), found.status
    (-8.121, 'converged')
    """
    return HistogramLikelihood(sde, initial, times, edges, counts, rest, box, killing, tol)


class HistogramLikelihood(LawLikelihood):
    """Likelihood of histograms; see :func:`histogram`.

    Attributes
    ----------
    edges : list of ndarray
        Edges of the bins along each axis.
    counts : ndarray, shape (K, m_1, ..., m_d)
        How many were in each.

    Examples
    --------
    >>> found = histogram(SDE(0.0, 1.0, dim=1), [0.0], [1.0], [-1.0, 0.0, 1.0], [[3, 2]], rest=[3])
    >>> found.count
    8
    """

    def __init__(
        self,
        sde: SDE,
        initial: Any,
        times: Any,
        edges: Any,
        counts: Any,
        rest: Any,
        box: Box | None,
        killing: Any,
        tol: float,
    ) -> None:
        super().__init__(sde, initial, times, box, killing, tol)
        several = self.dim > 1 or (isinstance(edges, list | tuple) and np.ndim(edges[0]) == 1)
        self.edges = [np.asarray(as_numpy(e), dtype=float).reshape(-1) for e in (edges if several else [edges])]
        if len(self.edges) != self.dim or any(len(e) < 2 or not (np.diff(e) > 0).all() for e in self.edges):
            raise InputError("edges", edges, f"increasing edges for each of {self.dim} axes")
        self.at = np.asarray(as_numpy(times), dtype=float).reshape(-1)
        shape = (len(self.at), *(len(e) - 1 for e in self.edges))
        known = np.asarray(as_numpy(counts), dtype=float)
        self.counts = _counts(known[None] if np.ndim(times) == 0 else known, shape, "counts")
        self.rest = None if rest is None else _counts(np.reshape(as_numpy(rest), -1), (len(self.at),), "rest")

    @property
    def count(self) -> int:
        """How many were seen."""
        return int(self.counts.sum() + (0.0 if self.rest is None else self.rest.sum()))

    def chances(self, law: Law, t: float) -> torch.Tensor:
        """Probabilities of the bins at a time, shape (m_1, ..., m_d)."""
        if t == 0.0:
            raise InputError("times", 0.0, "times after the start")
        if t > law.times[-1]:
            return torch.zeros([len(e) - 1 for e in self.edges], dtype=torch.float64)
        rho = law.nodal_density(t).reshape(law.grid.shape)
        for axis, edges in enumerate(self.edges):
            matrix = _sums(law, axis, edges, t)
            rho = torch.tensordot(matrix, rho, dims=([1], [axis])).movedim(0, axis)
        return rho

    def _logs(self, law: Law) -> torch.Tensor:
        terms = []
        for k, t in enumerate(self.at):
            chance, counts = self.chances(law, float(t)).reshape(-1), self.counts[k].reshape(-1)
            if self.rest is None:
                chance = chance / chance.sum()
            else:
                chance, counts = torch.cat([chance, 1.0 - chance.sum()[None]]), np.append(counts, self.rest[k])
            terms.append(_multinomial(counts, chance))
        return torch.cat(terms)


def moments(
    sde: SDE,
    initial: Any,
    times: Any,
    values: Any,
    standard_errors: Any,
    function: Callable[[torch.Tensor], torch.Tensor] | None = None,
    *,
    box: Box | None = None,
    killing: Any = None,
    tol: float = 1e-3,
) -> "MomentLikelihood":
    r"""The likelihood of sample means of functions of the state at given times, as a function of torch parameters.

    .. math::
        \ell = -\tfrac12\sum_{kj}\Big(\frac{m_{kj} - E[f_j(X_{t_k}) \mid \tau > t_k]}{s_{kj}}\Big)^2
        - \sum_{kj}\log\sqrt{2\pi}s_{kj}

    for means with known, independent errors; of those that are under way still where there are ways out.

    Parameters
    ----------
    sde, initial, killing, tol
        As for :func:`exit_counts`.
    times : float or array_like, shape (K,)
        When.
    values : array_like, shape (K, q)
        Means m that were found; (K,) for one function, without the first axis for one time.
    standard_errors : array_like
        Their standard errors s, of the same shape or one that goes with it.
    function : callable, optional
        f: ``function(x)`` of points (..., d) -> ``(...)`` or ``(..., q)``, in torch. None: the coordinates themselves.
    box : Box, optional
        The state space. None: all of it.

    Returns
    -------
    MomentLikelihood

    Raises
    ------
    InputError
        For shapes that do not fit and standard errors that are not positive.

    Examples
    --------
    Mean and second moment of an Ornstein–Uhlenbeck process that starts at one:

    >>> kappa = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    >>> ou = SDE(lambda t, x: -kappa * x, 1.0, dim=1, arrays="torch")
    >>> both = lambda x: torch.cat([x, x**2], -1)
    >>> found = moments(ou, [1.0], [0.5, 1.0], [[0.6, 0.7], [0.4, 0.55]], [0.02, 0.05], both)
    >>> found().item().__round__(3), found.status
    (8.683, 'converged')
    """
    return MomentLikelihood(sde, initial, times, values, standard_errors, function, box, killing, tol)


class MomentLikelihood(LawLikelihood):
    """Likelihood of sample moments; see :func:`moments`.

    Attributes
    ----------
    at : ndarray, shape (K,)
        When.
    values, standard_errors : ndarray, shape (K, q)
        Means that were found, and their errors.

    Examples
    --------
    >>> moments(SDE(0.0, 1.0, dim=1), [0.0], 1.0, 0.0, 0.1)().item().__round__(4)  # log(10/√(2π))
    1.3836
    """

    def __init__(
        self,
        sde: SDE,
        initial: Any,
        times: Any,
        values: Any,
        standard_errors: Any,
        function: Callable[[torch.Tensor], torch.Tensor] | None,
        box: Box | None,
        killing: Any,
        tol: float,
    ) -> None:
        super().__init__(sde, initial, times, box, killing, tol)
        self.at = np.asarray(as_numpy(times), dtype=float).reshape(-1)
        self.function = function if function is not None else lambda x: x
        found = np.asarray(as_numpy(values), dtype=float).reshape(len(self.at), -1)
        self.values, spread = found, np.asarray(as_numpy(standard_errors), dtype=float)
        try:
            self.standard_errors = np.broadcast_to(spread if spread.ndim != 1 or len(spread) == found.shape[1]
                                                   else spread[:, None], found.shape)  # fmt: skip
        except ValueError:
            raise InputError("standard_errors", f"shape {spread.shape}", f"shape {found.shape}") from None
        if not (self.standard_errors > 0).all() or not np.isfinite(found).all():
            raise InputError("standard_errors", spread.tolist(), "positive numbers, with finite values")

    @property
    def count(self) -> int:
        """Number of means."""
        return int(self.values.size)

    def expected(self, law: Law, t: float) -> torch.Tensor:
        """E[f(X_t) | under way], shape (q,)."""
        mean = law.expectation(self.function, self._kept(law, t)).reshape(-1)
        if len(mean) != self.values.shape[1]:
            raise InputError("function", f"{len(mean)} values", f"{self.values.shape[1]}, as there are means")
        return mean / _under_way(law, t) if law.exits else mean

    def _logs(self, law: Law) -> torch.Tensor:
        mean = torch.stack([self.expected(law, float(t)) for t in self.at])
        spread = torch.as_tensor(np.array(self.standard_errors))
        z = (torch.as_tensor(self.values) - mean) / spread
        return (-0.5 * z**2 - torch.log(spread) - 0.5 * math.log(2.0 * math.pi)).reshape(-1)


# --- shared -----------------------------------------------------------------------------------------------------------


def _counts(given: Any, shape: tuple[int, ...], name: str) -> np.ndarray:
    """Numbers of a shape, checked."""
    found = np.asarray(as_numpy(given), dtype=float)
    if found.shape != shape:
        raise InputError(name, f"shape {found.shape}", f"shape {shape}")
    if not np.isfinite(found).all() or (found < 0).any():
        raise InputError(name, found.reshape(-1).tolist()[:6], "finite numbers that are not negative")
    return found


def _multinomial(counts: np.ndarray, chance: torch.Tensor) -> torch.Tensor:
    """Terms of the logarithm of a multinomial probability, shape (m,): its coefficient is shared among them."""
    total = counts.sum()
    shares = counts / total if total else counts
    constant = torch.as_tensor(shares * gammaln(total + 1.0) - gammaln(counts + 1.0))
    some = torch.as_tensor(counts > 0)
    return torch.as_tensor(counts) * log_of(torch.where(some, chance, 1.0)) + constant


def _under_way(law: Law, t: float) -> torch.Tensor:
    """Probability of being under way at a time."""
    if t == 0.0:
        return torch.ones((), dtype=torch.float64)
    return law.mass(t) if t <= law.times[-1] else 0.0 * law.mass()


def _sums(law: Law, axis: int, edges: np.ndarray, t: float) -> torch.Tensor:
    """Matrix (m, n) that sums values at the nodes of an axis, interpolated, over bins between edges."""
    nodes = law.grid.axes[axis].nodes
    ends = torch.as_tensor(np.clip(edges, -FAR, FAR))
    if law.motion is not None:
        places = torch.zeros(len(ends), law.grid.dim, dtype=torch.float64)
        ends = law.motion.inwards(t, places.index_copy(1, torch.tensor([axis]), ends[:, None]))[:, axis]
    ends = ends.clamp(float(nodes[0]), float(nodes[-1]))
    z, w = (torch.as_tensor(v) for v in legendre.leggauss(IN_SPACE))
    rows = []
    for a, b in pairwise(ends):
        inner = torch.as_tensor(nodes[(nodes > float(a.detach())) & (nodes < float(b.detach()))])
        cuts = torch.cat([a[None], inner, b[None]])
        half = 0.5 * (cuts[1:] - cuts[:-1])
        at = (cuts[:-1, None] + half[:, None] * (1.0 + z)).reshape(-1)
        index, weight = law.grid.axes[axis].weights(at, law.discretization.width)
        whole = (half[:, None] * w).reshape(-1, 1) * weight
        row = torch.zeros(len(nodes), dtype=torch.float64)
        rows.append(row.index_add(0, torch.as_tensor(index).reshape(-1), whole.reshape(-1)))
    return torch.stack(rows)
