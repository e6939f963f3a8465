"""Likelihoods under a law: what is counted, and not followed one by one, by the law of the process on a grid."""

import math
from abc import abstractmethod
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp
import torch
from numpy.polynomial import legendre
from scipy.special import gammaln

from kolmo.arrays import as_numpy, as_points
from kolmo.control.densities import GivenDensity
from kolmo.control.law import Law, law
from kolmo.discretization import Discretization
from kolmo.errors import InputError, NotConvergedError
from kolmo.forward import WaysOut
from kolmo.grid.grading import Grading, Sinh, Uniform
from kolmo.grid.grid import Axis, Grid
from kolmo.likelihood.base import Likelihood, log_of
from kolmo.likelihood.paths import in_torch
from kolmo.march import time_nodes
from kolmo.problem.box import Box
from kolmo.problem.faces import Open
from kolmo.problem.problem import KolmogorovProblem
from kolmo.problem.rest import at_rest
from kolmo.problem.sde import SDE
from kolmo.schemes.generator import discretize
from kolmo.spectrum import near_zero

# Nodes per axis of the first level and of the finest one, by dimension.
FIRST, MOST = {1: 48.0, 2: 16.0, 3: 12.0}, {1: 1700.0, 2: 260.0, 3: 52.0}
# Order that levels show: of the steps, beside which space has six.
ORDER = {1: 5.0, 2: 3.0, 3: 3.0}
STEPPER = {1: "radau5", 2: "mcs3", 3: "mcs3"}
# Steps in each doubling of time, per node of an axis, and doublings before the first time that is looked at.
STEPS, BEFORE = {1: 1.0 / 8.0, 2: 1.0 / 4.0, 3: 1.0 / 3.0}, 3
# So many steps are made at least while what is left falls by this exponent. Where it falls by more in a step, what has
# died out comes back: split steps damp quick modes by little, and of e^(-7) that is left they are soon the most.
FALLS = 1.25
# By more than this exponent no more steps than that are made: what is left then says nothing of data.
NOTHING_LEFT = 100.0
# Nodes per axis of a grid that tells how quickly what is left falls, by dimension, and where it is looked at.
FALLING, INSTANTS = {1: 48, 2: 20, 3: 10}, (0.0, 0.5, 1.0)
# Nodes lie about the start: evenly within so many standard deviations that it has at the first time.
WIDE = 4.0
# What may be gone beyond a cut, and the factor by which one is moved.
TAIL, WIDER = 1e-9, 1.25
# Points of Gauss on a stretch between nodes: exact for the widest interpolant.
IN_SPACE = 5
# Edges of bins that are infinite.
FAR = 1e300


class Started(NamedTuple):
    """A process from its start in a state space, and the tolerance: what a likelihood under a law is of."""

    sde: SDE
    initial: Any
    box: Box | None
    killing: Any
    tol: float


class Recipes:
    """Grids about the start of a process and steps graded from the first time seen on, by resolution: made once.

    Parameters
    ----------
    problem : KolmogorovProblem
        The process.
    ends : (ndarray, ndarray), shape (d,)
        Of the grid, in coordinates in which faces stand still.
    start : (ndarray, ndarray), shape (d,)
        Where it starts, and its spread when something is seen first.
    seen : ndarray, shape (m,)
        Positive times.
    """

    def __init__(
        self,
        problem: KolmogorovProblem,
        ends: tuple[np.ndarray, np.ndarray],
        start: tuple[np.ndarray, np.ndarray],
        seen: np.ndarray,
    ) -> None:
        self._problem, self._seen, (middle, spread) = problem, seen, start
        self._maps = [_about(*given) for given in zip(*ends, middle, WIDE * spread, strict=True)]
        self._rate = falling(at_rest(problem), self._maps, float(seen[-1]))
        self._known: dict[int, Discretization] = {}

    def at(self, n: int) -> Discretization:
        """That of n nodes per axis."""
        if n not in self._known:
            self._known[n] = self._made(n)
        return self._known[n]

    def _made(self, n: int) -> Discretization:
        dim, seen = len(self._maps), self._seen
        periodic = at_rest(self._problem).box.periodic
        grid = Grid([Axis(n, g, p) for g, p in zip(self._maps, periodic, strict=True)])
        generator = discretize(self._problem, grid)
        steps, first, last = max(2, round(STEPS[dim] * n)), float(seen[0]), float(seen[-1])
        edges = [0.0, *(first * 2.0**k for k in range(-BEFORE, math.ceil(math.log2(last / first)) + 1))]
        rate = max(self._rate, FALLS / last)
        longest = [FALLS / rate if a * rate < NOTHING_LEFT else last for a in edges]
        pairs = zip(pairwise(edges), longest, strict=False)
        short = [(a, min(b, last), min(b - a, most) / steps) for (a, b), most in pairs if a < last]
        times = time_nodes(generator.intervals(), 1, seen.tolist(), short)
        return Discretization(grid, tuple(times.tolist()), generator.scheme.name, STEPPER[dim])


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
    >>> from kolmo import SDE
    >>> from kolmo.likelihood import moments
    >>> from kolmo.likelihood.law_likelihood import LawLikelihood
    >>> found = moments(SDE(0.0, 1.0, dim=1), [0.0], [1.0], [0.5], [0.1])
    >>> isinstance(found, LawLikelihood), found.times.tolist()
    (True, [1.0])
    """

    wider, even = WIDER, False

    def __init__(self, given: Started, times: Any) -> None:
        sde, initial, box, killing, tol = given
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

    def renew(self) -> float:
        """Decide anew on the state space and on a resolution; the estimated error."""
        self._space, self._width = None, 1.0
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

    def _begin(self) -> np.ndarray:
        """Points (n, d) about which the process starts, at t = 0."""
        if not callable(self.initial):
            found = torch.as_tensor(as_points(self.initial, self.dim, "initial"))
            return np.asarray(as_numpy(found.detach()), dtype=float).reshape(-1, self.dim)
        low, high = (np.asarray(v, dtype=float) for v in (self.problem.box.lower, self.problem.box.upper))
        return np.stack(GivenDensity(self.initial, "initial", low, high).found()[1])

    def _recipe(self, n: int) -> Discretization:
        """Grid and steps of a resolution: the same ones until the state space is looked for anew."""
        if self._space is None:
            self._space = self._recipes()
        recipe: Discretization = self._space.at(n)
        return recipe

    def _recipes(self) -> Recipes:
        rest, begin, seen = at_rest(self.problem), self._begin(), self._seen()
        if rest.motion is not None:
            begin = np.asarray(rest.motion.inwards(0.0, begin))
        middle, seen = begin.mean(0), seen[seen > 0]
        noise = as_numpy(rest.sde.covariance(0.0, torch.as_tensor(middle[None])).detach())[0]
        spread = np.sqrt(begin.var(0) + float(seen[0]) * np.maximum(np.diag(noise), 0.0))
        return Recipes(self.problem, self._cover(rest, begin), (middle, spread), seen)

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
            np.where(opened[:, side], middle + self._width * (cuts[side] - middle), real[side]) for side in (0, 1)
        )
        return low, high

    @property
    def _closed(self) -> bool:
        return not any(isinstance(face, Open) for _, _, face in self.problem.box.each())


def falling(problem: KolmogorovProblem, maps: Sequence[Grading], last: float) -> float:
    """Rate at which what is left falls in the end: of the slowest mode, on a coarse grid."""
    dim = len(maps)
    axes = [Axis(FALLING[dim], g, p) for g, p in zip(maps, problem.box.periodic, strict=True)]
    generator = discretize(problem, Grid(axes))
    if not WaysOut(generator).names:
        return 0.0
    free = np.flatnonzero(~generator.fixed)
    rates = [_slowest(sp.csr_matrix(generator.matrix(part * last)[free][:, free]), last) for part in INSTANTS]
    return max(0.0, *rates)


def _slowest(Q: sp.csr_matrix, time: float) -> float:
    """Rate of the slowest mode of u' = −Q u; what grows grows by noise in Q alone, or by a killing rate below zero."""
    try:
        values, _ = near_zero(Q, 1, 1.0 / time)
    except NotConvergedError:
        values = np.linalg.eigvals(Q.toarray())
    return -float(values.real.max())


def _about(low: float, high: float, middle: float, width: float) -> Grading:
    """Nodes about the start, unless it is as wide as the axis."""
    return Sinh(low, high, middle, width) if 0.0 < width < 0.25 * (high - low) else Uniform(low, high)


class GroupLikelihood(LawLikelihood):
    """Likelihood of survivors in groups that are looked at once; see :func:`survival_counts`.

    Examples
    --------
    >>> from kolmo import SDE, Box
    >>> from kolmo.likelihood import survival_counts
    >>> sde, box = SDE(0.0, 1.0, dim=1), Box(-1.0, 1.0, "absorbing")
    >>> survival_counts(sde, [0.0], [0.5, 1.0], [68, 37], [100, 100], box=box).count
    200
    """

    def __init__(self, given: Started, at: np.ndarray, alive: np.ndarray, total: np.ndarray) -> None:
        if not (np.diff(at) > 0).all() or (at <= 0).any():
            raise InputError("times", at.tolist()[:6], "increasing positive times")
        if (alive > total).any():
            raise InputError("alive", alive.tolist()[:6], f"at most the totals {total.tolist()[:6]}")
        super().__init__(given, at)
        self.at, self.alive, self.total = at, alive, total

    @property
    def count(self) -> int:
        """How many there were in all groups."""
        return int(self.total.sum())

    def _logs(self, law: Law) -> torch.Tensor:
        left = torch.stack([under_way(law, t) for t in self.at])
        pairs = zip(self.alive, self.total, left, strict=True)
        return torch.cat([multinomial(np.array([a, n - a]), torch.stack([p, 1.0 - p])) for a, n, p in pairs])


def checked_counts(given: Any, shape: tuple[int, ...], name: str) -> np.ndarray:
    """Numbers of a shape, checked."""
    found = np.asarray(as_numpy(given), dtype=float)
    if found.shape != shape:
        raise InputError(name, f"shape {found.shape}", f"shape {shape}")
    if not np.isfinite(found).all() or (found < 0).any():
        raise InputError(name, found.reshape(-1).tolist()[:6], "finite numbers that are not negative")
    return found


def multinomial(counts: np.ndarray, chance: torch.Tensor) -> torch.Tensor:
    """Terms of the logarithm of a multinomial probability, shape (m,): its coefficient is shared among them."""
    total = counts.sum()
    shares = counts / total if total else counts
    constant = torch.as_tensor(shares * gammaln(total + 1.0) - gammaln(counts + 1.0))
    some = torch.as_tensor(counts > 0)
    return torch.as_tensor(counts) * log_of(torch.where(some, chance, 1.0)) + constant


def under_way(law: Law, t: float) -> torch.Tensor:
    """Probability of being under way at a time."""
    if t == 0.0:
        return torch.ones((), dtype=torch.float64)
    return law.mass(t) if t <= law.times[-1] else 0.0 * law.mass()


def sums_over(law: Law, axis: int, edges: np.ndarray, t: float) -> torch.Tensor:
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
