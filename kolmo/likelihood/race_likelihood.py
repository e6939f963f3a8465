"""The likelihood of races: one march of the law of the process serves all trials of a condition."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.polynomial import legendre

from kolmo.arrays import as_numpy
from kolmo.control.law import law
from kolmo.errors import InputError
from kolmo.forward.exits import TIME_NODES
from kolmo.likelihood.base import HOPELESS, LEAST, log_of
from kolmo.likelihood.law_likelihood import FIRST, MOST, ORDER, TAIL, WIDER, Recipes
from kolmo.likelihood.laws import NODES, Covariates, a_number, laws_of
from kolmo.likelihood.moving import through
from kolmo.likelihood.trials import UNTIMED, Trials
from kolmo.likelihood.trials_likelihood import LONGEST, SOONEST, PassageLikelihood
from kolmo.problem.box import Box
from kolmo.problem.instants import reads_time
from kolmo.problem.problem import KolmogorovProblem
from kolmo.problem.sde import SDE

if TYPE_CHECKING:
    from kolmo.likelihood.race import Race

# Up to this part of d², with the distance d in units of noise, a passage is early: of a driftless process exp(−10) has
# arrived, and what the grid says is no more than its own error.
SOON = 1.0 / 20.0
# A choice without a time is followed until no more than this is undecided.
UNDECIDED = 1e-6
# Points of Gauss on the way to a bound, places per axis at which noise is compared, and the relative difference that is
# none.
ALONG, CROSS, COMPARED = 12, 5, 1e-9
# Errors of the formula of early passages, of a logarithm, that fade with time (−log erf(x) x² grows up to 0.3).
FADES = 0.25


class RaceLikelihood(PassageLikelihood):
    r"""Likelihood :math:`\ell = \sum_i \log q_{c_i}(t_i)` of a race, trials of shape (N,); see :meth:`Race.likelihood`.

    References
    ----------
    Usher and McClelland 2001 (leaky competing accumulators).

    Examples
    --------
    >>> from kolmo.likelihood import Race, Trials
    >>> Race([1.0, 0.5], upper=[1.0, 1.0]).likelihood(Trials([0.5], [1]))
    RaceLikelihood(1 observations, unplanned)
    """

    model: Any
    wider, even = WIDER, False

    def __init__(self, model: "Race", trials: Trials, tol: float) -> None:
        super().__init__(model, trials, tol)  # type: ignore[arg-type]

    def _settle(self) -> None:
        dim = self.model.dim
        self.first, self.most, self.order = FIRST[dim], MOST[dim], ORDER[dim]

    def renew(self) -> float:
        """Decide anew on the state space, the steps and the resolution; the estimated error."""
        self._space, self._width = None, 1.0
        return super().renew()

    def _passages(self, n: int) -> "_Exits":
        if self._space is None:
            self._space = [self._course(c) for c in self._conditions]
        delays = laws_of(self.model.delay, self._conditions, NODES, "delay")
        if bool((delays[0] < 0).any()):
            raise InputError("delay", delays[0].detach().tolist(), "a delay that is not negative")
        guesses = [float(a_number(self.model.lapse, c, "lapse").detach()) > 0.0 for c in self._conditions]
        return _Exits([_Exit.of(course, n) for course in self._space], delays, guesses)

    def _course(self, c: Covariates) -> "_Course":
        horizon = max(self._span, float(self._times.max()))
        untimed = bool((self.trials.known == UNTIMED).any())
        while True:
            course = _Course(self.model, c, horizon, self._width)
            if not untimed or horizon > LONGEST * self._span:
                return course
            with torch.no_grad():
                left = float(_Exit.of(course, int(self.first)).left[-1])
            if left < UNDECIDED:
                return course
            horizon *= 2.0

    @property
    def _closed(self) -> bool:
        return self._space is None or all(course.floored.all() for course in self._space)


class _Course:
    """What is decided of a condition until the resolution is looked for anew: horizon, box, clock and recipes."""

    def __init__(self, model: "Race", c: Covariates, horizon: float, wider: float) -> None:
        self.model, self.c, self.horizon = model, c, horizon
        # what no code reads is not looked for at every call
        self.autonomous = None if any(map(reads_time, (model.drift, model.diffusion))) else True
        with torch.no_grad():
            now = self.present()
            begin, noise = as_numpy(now.begin), torch.diagonal(now.covariance(0.0, now.begin[None])[0]).numpy()
        if not (noise > 0).all():
            raise InputError("diffusion", noise.tolist(), "noise on every axis, at the start")
        self.floored = now.floored
        self.first = min(SOON * float(((1.0 - begin) ** 2 / noise).min()), 0.5 * horizon)
        self.start = (begin, np.sqrt(self.first * noise))
        pairs = [("reflecting" if f else "open", "absorbing") for f in self.floored]
        low, high = np.zeros(model.dim), np.ones(model.dim)
        if not self.floored.all():
            within = Box(np.where(self.floored, 0.0, -np.inf), high, pairs)
            found = np.asarray(Box.covering(now.process(), begin[None], horizon, within=within, tail=TAIL).lower)
            low = np.where(self.floored, 0.0, wider * found)
        self.box = Box(low, high, pairs)

    def present(self) -> "_Present":
        """The process at the parameters of the moment."""
        return _Present(self.model, self.c)

    def problem(self, now: "_Present") -> KolmogorovProblem:
        """The process until it is decided."""
        killing = None if self.model.killing is None else now.killing
        sde, nothing = now.process(self.autonomous), lambda x: 0.0 * x[..., 0]
        return KolmogorovProblem(sde, nothing, self.horizon, self.box, killing=killing).handing("torch")

    @cached_property
    def recipes(self) -> Recipes:
        """Grids and steps by resolution: the same ones until the resolution is looked for anew."""
        seen, ends = np.array([self.first, self.horizon]), (np.array(self.box.lower), np.array(self.box.upper))
        with torch.no_grad():
            return Recipes(self.problem(self.present()), ends, self.start, seen)

    @cached_property
    def straight(self) -> bool:
        """Whether early passages go straight: noise of an axis that depends on the place on it alone."""
        d, now = self.model.dim, self.present()
        with torch.no_grad():
            at = torch.linspace(0.0, 1.0, CROSS, dtype=torch.float64)
            places = torch.stack(torch.meshgrid(*[at] * d, indexing="ij"), -1)
            seen, later = (now.covariance(t, places).expand(*places.shape, d) for t in (0.0, self.first))
        kept = [(seen, later), (seen, torch.diag_embed(seen.diagonal(dim1=-2, dim2=-1)))]
        for i in range(d):
            own = seen[..., i, i].movedim(i, 0).reshape(CROSS, -1)
            kept.append((own, own[:, :1]))
        least = COMPARED * float(seen.abs().max())
        return all(float((a - b).abs().max()) <= least for a, b in kept)


class _Present:
    """A condition at the parameters of the moment, where bounds are at one, and floors, or else the start, at zero."""

    def __init__(self, model: "Race", c: Covariates) -> None:
        self.model, self.c, self.sde = model, c, model.sde(c)
        begin, self.low, self.unit = model.ends(c)
        self.begin = (begin - self.low) / self.unit
        self.floored = np.array([floor is not None for floor in model.lower or (None,) * model.dim])

    def process(self, autonomous: bool | None = None) -> SDE:
        """The process in these coordinates."""
        return SDE(self.drift, covariance=self.covariance, dim=self.model.dim, arrays="torch", autonomous=autonomous)

    @cached_property
    def alone(self) -> "list[_Alone]":
        """What every accumulator is by itself, early."""
        return [self._alone(side) for side in self.model.sides]

    def _alone(self, side: int) -> "_Alone":
        """It goes straight to its bound while the others are at their starts."""
        begin, (z, w) = self.begin, (torch.as_tensor(v) for v in legendre.leggauss(ALONG))
        parts = torch.cat([0.5 * (1.0 + z), torch.tensor([0.0, 1.0])])
        line, back = (self._line(side, begin[side], end, parts) for end in (torch.ones(()), torch.zeros(())))
        drift, noise = line
        length, weights = 1.0 - begin[side], 0.5 * w
        way = length * (weights / noise[:-2]).sum()
        action = length * (weights * drift[:-2] / noise[:-2] ** 2).sum() - 0.5 * torch.log(noise[-1] / noise[-2])
        squares = length * (weights * drift[:-2] ** 2 / noise[:-2] ** 3).sum() / way
        ends = drift[-2:] / noise[-2:]
        rates = [0.5 * (squares + (ends[1] - ends[0]) / way)]
        if not self.floored[side]:
            return _Alone(way[None], action, torch.stack(rates))
        # reflected paths are those of a drift that is odd about the floor: on the way there and back it adds nothing
        drift, noise = back
        there = begin[side] * (weights / noise[:-2]).sum()
        whole = way + 2.0 * there
        more = 2.0 * begin[side] * (weights * drift[:-2] ** 2 / noise[:-2] ** 3).sum()
        rates.append(0.5 * (squares * way + more + ends[1] + ends[0]) / whole)
        return _Alone(torch.stack([way, whole]), action, torch.stack(rates))

    def _line(
        self, side: int, begin: torch.Tensor, end: torch.Tensor, parts: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Drift and noise of an axis at parts (m,) of the way to an end, the other axes at their starts."""
        places = self.begin.expand(len(parts), -1)
        index = torch.tensor([side])
        places = places.index_copy(1, index, (begin + parts * (end - begin))[:, None])
        covariance = self.covariance(0.0, places).expand(len(parts), self.model.dim, self.model.dim)
        return self.drift(0.0, places)[:, side], covariance[:, side, side].sqrt()

    def _outwards(self, y: torch.Tensor) -> torch.Tensor:
        return self.low + self.unit * y

    def drift(self, t: Any, y: torch.Tensor) -> torch.Tensor:
        """Drift at points (..., d)."""
        return torch.as_tensor(self.sde.drift(t, self._outwards(y))).expand(y.shape) / self.unit

    def covariance(self, t: Any, y: torch.Tensor) -> torch.Tensor:
        """Covariance, (..., d, d) or the same for all."""
        return torch.as_tensor(self.sde.covariance(t, self._outwards(y))) / (self.unit[:, None] * self.unit)

    def killing(self, t: Any, y: torch.Tensor) -> torch.Tensor:
        """Killing rate."""
        found = self.model.killed(self._outwards(y), self.c, t)
        assert found is not None
        return found


@dataclass(frozen=True)
class _Alone:
    """Early passages of an accumulator: Girsanov's weight about straight paths, but for terms of second order in time.

    ``ways`` (1,) to the bound, or (2,) with that of the image behind the floor, in units of noise; ``action``, the
    logarithm of what drift adds however short the time; ``rates`` like ``ways``, what it takes away per time.
    """

    ways: torch.Tensor
    action: torch.Tensor
    rates: torch.Tensor


@dataclass(frozen=True)
class _Exit:
    """What goes out under a condition: in the steps of the clock through every bound (n − 1, d); what is left (n,)."""

    course: _Course
    now: _Present
    clock: np.ndarray
    gone: torch.Tensor
    left: torch.Tensor

    @classmethod
    def of(cls, course: _Course, n: int) -> "_Exit":
        recipe, now = course.recipes.at(n), course.present()
        found = law(course.problem(now), now.begin, discretization=recipe, save=recipe.times)
        gone = torch.stack([found.gone((k, 1))[1:] for k in course.model.sides], -1)
        return cls(course, now, np.asarray(recipe.times), gone, found.weights.sum(1))

    def chosen(self, side: int) -> torch.Tensor:
        """Probability of a choice."""
        return self.gone[:, side].sum()

    def density(self, side: int, s: torch.Tensor) -> torch.Tensor:
        """Probability per time of a choice at times of any shape: the slope of what is gone."""
        nodes, index = self._near(s)
        gone = torch.cumsum(self.gone[index[..., :-1], side], -1)  # since the first of the nodes: no digits are lost
        slopes = torch.stack([_slope(nodes, j, s) for j in range(1, nodes.shape[-1])], -1)
        return (gone * slopes).sum(-1)

    def under_way(self, s: torch.Tensor) -> torch.Tensor:
        """Probability of no choice up to times of any shape."""
        nodes, index = self._near(s)
        return through(nodes, self.left[index], s)

    def _near(self, s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Time nodes (..., m) about times, and their numbers."""
        clock, m = torch.as_tensor(self.clock), min(TIME_NODES, len(self.clock))
        begin = torch.searchsorted(clock, s.detach().contiguous(), right=True) - 1 - (m - 1) // 2
        index = begin.clamp(0, len(clock) - m)[..., None] + torch.arange(m)
        return clock[index], index

    def early(self, side: int, s: torch.Tensor) -> torch.Tensor:
        """Logarithm of the density of early passages at times: of the accumulator alone, and its image."""
        alone = self.now.alone[side]
        logs = [
            torch.log(d / math.sqrt(2.0 * math.pi)) - 1.5 * torch.log(s) - d**2 / (2.0 * s) + alone.action - rate * s
            for d, rate in zip(alone.ways, alone.rates, strict=True)
        ]
        return torch.logaddexp(*logs) if len(logs) == 2 else logs[0]


def _slope(nodes: torch.Tensor, j: int, s: torch.Tensor) -> torch.Tensor:
    """Derivative of Lagrange's polynomial of node j (..., m) at times (...)."""
    others = torch.cat([nodes[..., :j], nodes[..., j + 1 :]], -1)
    apart, count = nodes[..., j, None] - others, others.shape[-1]
    ratios = ((s[..., None] - others) / apart)[..., None, :].expand(*s.shape, count, count)
    without = torch.where(torch.eye(count, dtype=torch.bool), 1.0 / apart[..., None, :], ratios)
    return without.prod(-1).sum(-1)


class _Exits:
    """Exits of all conditions at one resolution."""

    def __init__(self, exits: list[_Exit], delays: tuple[torch.Tensor, torch.Tensor], guesses: list[bool]) -> None:
        self.exits, (self.delays, self.shares), self.guesses = exits, delays, guesses

    @property
    def undecided(self) -> torch.Tensor:
        """What may be off in the probabilities of choices, shape (C,)."""
        return torch.stack([found.left[-1].detach() for found in self.exits])

    def chosen(self, side: int) -> torch.Tensor:
        """Probability of a choice, shape (C,)."""
        return torch.stack([found.chosen(side) for found in self.exits])

    def survival(self, t: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
        """Probability of no response up to times (N,)."""
        total = torch.zeros(len(t), dtype=torch.float64)
        for k, found in enumerate(self.exits):
            which = torch.nonzero(group == k)[:, 0]
            s = t[which, None] - self.delays[k]
            left = found.under_way(s.clamp(min=0.0)).clamp(0.0, 1.0)
            soon = s < float(found.clock[1])  # next to nothing is gone
            total = total.index_copy(0, which, torch.where(soon, torch.ones_like(s), left) @ self.shares[k])
        return total

    def log_density(self, side: int, t: torch.Tensor, group: torch.Tensor) -> tuple[torch.Tensor, float]:
        """Logarithm of the density of the response time at times (N,), and what is known of its error in all."""
        logs, error = torch.zeros(len(t), dtype=torch.float64), 0.0
        for k, found in enumerate(self.exits):
            which = torch.nonzero(group == k)[:, 0]
            if len(which):
                part, off = self._of(
                    found, side, t[which, None] - self.delays[k], log_of(self.shares[k]), self.guesses[k]
                )
                logs, error = logs.index_copy(0, which, part), error + off
        return logs, error

    @staticmethod
    def _of(
        found: _Exit, side: int, s: torch.Tensor, shares: torch.Tensor, guesses: bool
    ) -> tuple[torch.Tensor, float]:
        """Logarithms under a condition at times (m, J) since the start, summed over delays."""
        way = float(found.now.alone[side].ways[0].detach())
        soon = SOON * way**2
        s = torch.maximum(s, torch.tensor(SOONEST * way**2, dtype=torch.float64))
        flux = found.density(side, s)
        early = s.detach() < soon
        logs = torch.where(early, found.early(side, s), log_of(flux))
        total = torch.logsumexp(logs + shares, 1)
        with torch.no_grad():
            # where both are right they show by how much the formula is off
            at = torch.tensor(soon, dtype=torch.float64)
            off = float((found.early(side, at) - log_of(found.density(side, at))).abs())
            errors = torch.where(early, off * _fading(s / soon, off, found.course.straight), torch.zeros_like(s))
            if not guesses:
                # a density that is lost among the errors of the grid: what is said of it says nothing
                errors[~early & (flux <= LEAST)] = HOPELESS
            parts = torch.exp(logs + shares - total[:, None])
            return total, float((parts * errors).sum())


def _fading(part: torch.Tensor, off: float, straight: bool) -> torch.Tensor:
    """How an error of the formula goes on at parts of the time at which it was seen.

    It is of first order in time; but where the other accumulator is gone (a logarithm of a probability, which is convex
    in time only while it is small) it may stay as large, and where paths bend, lengths of ways are off.
    """
    if not straight:
        return 1.0 / part
    return part if off <= FADES else torch.ones_like(part)
