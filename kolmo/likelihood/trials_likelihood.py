"""The likelihood of first passages: conditions solved together, and what each trial adds."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kolmo.arrays import as_numpy
from kolmo.errors import InputError, NotConvergedError
from kolmo.likelihood.base import HOPELESS, LEAST, Likelihood, log_of
from kolmo.likelihood.clock import Clock
from kolmo.likelihood.course import Process
from kolmo.likelihood.laws import COMPARED, NODES, PART, PLACES, Covariates, a_number, law_of, laws_of
from kolmo.likelihood.modes import Modes, rule
from kolmo.likelihood.moving import CrossedError, Timed
from kolmo.likelihood.onset import Way
from kolmo.likelihood.trials import CENSORED, SEEN, UNSIDED, UNTIMED, Trials
from kolmo.problem.box import Box
from kolmo.problem.instants import constant, depends_on_time

if TYPE_CHECKING:
    from kolmo.likelihood.passage import FirstPassage

# Up to this part of d², where d is the distance in units of noise, a passage is early: of a driftless process exp(−20)
# has arrived, and sums of modes have lost that many digits.
SOON = 1.0 / 40.0
# Times before a passage can be are taken to be this part of d²: the logarithm of the density is finite, and hopeless.
SOONEST = 1e-6
# Relative accuracy of sums of modes.
ROUNDING = 1e-15
# What may be gone beyond a cut, and the factor by which one is moved.
TAIL, WIDER = 1e-8, 1.3
# Where something depends on time: resolutions; the order counted on, which is what is left where a passage is early
# (measured: 2.5), and that of the steps; the longest time, in units of that in the data, for which a choice without a
# time is followed.
FIRST_TIMED, MOST_TIMED, ORDER_TIMED, FASTEST_TIMED, LONGEST = 16.0, 260.0, 2.5, 4.0, 64.0


class PassageLikelihood(Likelihood):
    r"""Likelihood :math:`\ell = \sum_i \log q_{c_i}(t_i)` of first passages; see :meth:`FirstPassage.likelihood`.

    Attributes
    ----------
    model : FirstPassage
        The model.
    trials : Trials
        The data: N times and choices, of shape (N,).

    Raises
    ------
    InputError
        For trials that the model cannot have.

    References
    ----------
    R. Ratcliff (1978), A theory of memory retrieval, Psychological Review 85.

    Examples
    --------
    >>> from kolmo.likelihood import FirstPassage, Trials
    >>> FirstPassage(1.0, lower=-1.0, upper=1.0).likelihood(Trials([0.5], [1]))
    PassageLikelihood(1 observations, unplanned)
    """

    first, most = 16.0, 420.0
    wider = WIDER

    def __init__(self, model: "FirstPassage", trials: Trials, tol: float) -> None:
        super().__init__(tol)
        self.model, self.trials = model, trials
        self._check()
        self._conditions, self._group = trials.conditions, torch.as_tensor(trials.group)
        self._times = torch.as_tensor(np.where(np.isnan(trials.times), 1.0, trials.times))
        self._span = float(np.nanmax(trials.times)) if model.span is None else float(model.span)
        # processes of the conditions, and their clocks
        self._clocks: dict[float | None, tuple[list[Process], list[Clock]]] = {}
        # how far from one bound alone the process goes, before its cut is moved
        self._far: float | None = None
        self._settle()

    def _settle(self) -> None:
        """Decide on the way in which densities are found, and on the cut, with one bound alone."""
        model = self.model
        self._timed = model.moves or any(
            self._changes(c) for c in self._conditions[:: max(1, len(self._conditions) - 1)]
        )
        if self._timed:
            self.first, self.most = FIRST_TIMED, MOST_TIMED
            self.order, self.fastest = ORDER_TIMED, FASTEST_TIMED
        self._far = None if len(model.sides) == 2 else self._distance(TAIL)

    @property
    def _reach(self) -> float | None:
        """How far from one bound alone the process goes; None with two."""
        return None if self._far is None else self._width * self._far

    @property
    def _closed(self) -> bool:
        return self._far is None

    @property
    def count(self) -> int:
        """Number of trials."""
        return len(self.trials)

    def _check(self) -> None:
        model, trials = self.model, self.trials
        chosen = trials.choices[np.isin(trials.known, (SEEN, UNTIMED))]
        other = chosen[~np.isin(chosen, model.sides)]
        if len(other):
            raise InputError("trials", f"choice {other[0]:g}", f"choices of the model, {model.sides}")
        if (trials.known == UNTIMED).any() and len(model.sides) == 1:
            raise InputError("trials", "a time that is missing, with one bound", "the time, or a censored trial")
        if np.isnan(trials.times).all() and model.span is None:
            raise InputError("span", None, "a number, where no time is known")

    def _changes(self, c: Covariates) -> bool:
        """Whether a coefficient depends on time."""
        sde, (low, high) = self.model.sde(c), self._ends(c)
        x = torch.linspace(low, high, PLACES, dtype=torch.float64)[1:-1, None]
        rate = lambda t, y: torch.zeros(()) if (r := self.model.killed(y, c, t)) is None else r  # noqa: E731
        parts = [(sde.drift, sde.given["drift"]), (sde.covariance, sde.given["covariance"]), (rate, self.model.killing)]
        for f, given in parts:
            steady = lambda t, y, f=f: as_numpy(f(t, torch.as_tensor(y)).detach())  # noqa: E731
            if depends_on_time(given, f, x) and not constant(steady, 0.0, self._span, x.numpy(), COMPARED):
                return True
        return False

    def _ends(self, c: Covariates) -> tuple[float, float]:
        """Bounds at first as numbers, and where there is none something beyond the start."""
        low, high = (float(self.model.places(s, [0.0], c).detach()) if s in self.model.sides else None for s in (0, 1))
        if low is not None and high is not None:
            return low, high
        starts = law_of(self.model.start, c, NODES, "start")[0].detach()
        known = low if low is not None else high
        assert known is not None
        away = 2.0 * float((starts - known).abs().max())
        return (known, known + away) if low is not None else (known - away, known)

    def _distance(self, tail: float) -> float:
        """How far from its one bound the process goes."""
        side, farthest = self.model.sides[0], 0.0
        for c in self._conditions:
            course = self.model.places(side, np.linspace(0.0, self._span, COMPARED), c).detach()
            bound, other = (float(v) for v in (course.min(), course.max())[:: 1 - 2 * side])
            ends = [-np.inf, np.inf]
            ends[side] = bound
            pair = ("absorbing", "open") if side == 0 else ("open", "absorbing")
            starts = law_of(self.model.start, c, NODES, "start")[0].detach().numpy()
            box = Box.covering(self.model.sde(c), starts, self._span, within=Box(ends[0], ends[1], [pair]), tail=tail)
            farthest = max(farthest, abs(float((box.upper, box.lower)[side][0]) - other))
        return farthest

    def renew(self) -> float:
        """Decide anew on a resolution, and on the times of the steps where there are some; the estimated error."""
        self._clocks.clear()
        return super().renew()

    def _passages(self, n: int) -> Any:
        model, conditions = self.model, self._conditions
        if not self._timed:
            return _Passages(model, conditions, n, self._reach)
        count = NODES + int(PART * n)
        starts, delays = (laws_of(getattr(model, name), conditions, count, name) for name in ("start", "delay"))
        for _ in range(2):
            known = self._clocks.get(self._reach)
            if known is None:
                known = self._clocks[self._reach] = self._wound(starts[0].detach())
            try:
                return Timed(*known, (starts, delays), n)
            except CrossedError:
                self._clocks.pop(self._reach)
        raise NotConvergedError("bounds that cross where they were followed to where they meet")

    def _wound(self, starts: torch.Tensor) -> tuple[list[Process], list[Clock]]:
        """Processes of the conditions, and a clock for each, with equal numbers of stretches."""
        horizon, untimed = self._span, bool((self.trials.known == UNTIMED).any())
        while True:
            processes = [Process(self.model, c, self._reach, horizon) for c in self._conditions]
            clocks = [Clock.of(p, x, p.breaks()) for p, x in zip(processes, starts, strict=True)]
            if not untimed or horizon > LONGEST * self._span or all(clock.gone for clock in clocks):
                count = max(len(clock.series) for clock in clocks)
                return processes, [clock.divided(count) for clock in clocks]
            horizon *= 2.0

    def _terms(self, n: float) -> tuple[torch.Tensor, float]:
        found = self._passages(int(n))
        known, group = self.trials.known, self._group
        lapse = torch.stack([a_number(self.model.lapse, c, "lapse") for c in self._conditions])
        if bool(((lapse < 0) | (lapse > 1)).any()):
            raise InputError("lapse", lapse.detach().tolist(), "probabilities")
        K, sides = len(self.model.sides), self.model.sides
        logs = torch.zeros(len(known), dtype=torch.float64)
        guess, error = torch.ones(len(known), dtype=torch.float64), 0.0
        for kind in np.unique(known):
            which = torch.as_tensor(np.flatnonzero(known == kind))
            g, t = group[which], self._times[which]
            within = (t <= self._span).double() / self._span
            part, chance = torch.zeros(len(which), dtype=torch.float64), within
            if kind == CENSORED:
                part, chance = log_of(found.survival(t, g)), (1.0 - t / self._span).clamp(min=0.0)
            elif kind == UNTIMED:
                choices = torch.as_tensor(self.trials.choices)[which].long()
                part, chance = log_of(torch.stack([found.chosen(s) for s in sides])[choices, g]), 0.0 * t + 1.0 / K
                error += float((found.undecided[g] / torch.exp(part.detach())).sum())
            elif kind == UNSIDED:
                both = [found.log_density(s, t, g) for s in sides]
                part, error = torch.logsumexp(torch.stack([q for q, _ in both]), 0), error + sum(e for _, e in both)
            elif kind == SEEN:
                chance = within / K
                for s in sides:
                    i = torch.as_tensor(np.flatnonzero(self.trials.choices[which.numpy()] == s))
                    q, early = found.log_density(s, t[i], g[i])
                    part, error = part.index_copy(0, i, q), error + early
            else:
                chance = torch.ones_like(t)
            logs, guess = logs.index_copy(0, which, part), guess.index_copy(0, which, chance)
        return _mixed(logs, lapse[group], guess), error


class _Passages:
    """Passages of all conditions at one resolution."""

    def __init__(self, model: "FirstPassage", conditions: Sequence[Covariates], n: int, reach: float | None) -> None:
        self.model, self.conditions = model, conditions
        count = NODES + int(PART * n)
        low, high = self._bounds(reach)
        self.starts, self.weights = laws_of(model.start, conditions, count, "start")
        self.delays, self.shares = laws_of(model.delay, conditions, count, "delay")
        if not bool(((self.starts > low[:, None]) & (self.starts < high[:, None])).all()):
            k = int(((self.starts <= low[:, None]) | (self.starts >= high[:, None])).any(1).nonzero()[0])
            told = f"{self.starts[k].tolist()[:3]} with bounds {float(low[k]):g} and {float(high[k]):g}"
            raise InputError("start", told, "a start between the bounds")
        half, Q = 0.5 * (high - low), len(rule(n).points)
        ways = [Way(self.starts, end) for end in (low, high)]
        x = [low[:, None] + (1.0 + rule(n).points) * half[:, None], *(way.points.flatten(1) for way in ways)]
        b, S, c = self._coefficients(torch.cat(x, 1))
        absorbing = (model.bounds[0] is not None, model.bounds[1] is not None)
        killing = None if c is None else c[:, :Q]
        self.modes = Modes.of(n, (b / S)[:, :Q], 1.0 / S[:, :Q], killing, half[:, None].expand(x[0].shape), absorbing)
        self.places = (self.starts - low[:, None]) / half[:, None] - 1.0
        start = self.modes.start(self.places, self.weights)
        self.flows = {s: start * self.modes.outflow(s) for s in model.sides}
        self.left = start * self.modes.mass
        onsets = []
        for way, begin in zip(ways, (Q, Q + x[1].shape[1]), strict=True):
            mine, shape = slice(begin, begin + x[1].shape[1]), way.points.shape
            rate = None if c is None else c[:, mine].reshape(shape)
            onsets.append(way.onset(b[:, mine].reshape(shape), S[:, mine].reshape(shape), rate))
        self.onsets = {s: onsets[s].beside(onsets[1 - s] if 1 - s in model.sides else None) for s in model.sides}

    def _bounds(self, reach: float | None) -> tuple[torch.Tensor, torch.Tensor]:
        named = zip(self.model.bounds, ("lower", "upper"), strict=True)
        found: list[Any] = [
            None if b is None else torch.stack([a_number(b, c, name) for c in self.conditions]) for b, name in named
        ]
        if reach is not None:
            found = [v if v is not None else found[1 - s] + (2 * s - 1) * reach for s, v in enumerate(found)]
        low, high = found
        if not bool((low < high).all()):
            raise InputError("lower, upper", f"{low.tolist()[:3]} and {high.tolist()[:3]}", "lower < upper")
        return low, high

    def _coefficients(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """(b, Σ, c) at points (C, m)."""
        drifts, noises, kills = [], [], []
        for row, c in zip(x[..., None], self.conditions, strict=True):
            sde = self.model.sde(c)
            drifts.append(sde.drift(0.0, row)[..., 0])
            noises.append(sde.covariance(0.0, row)[..., 0, 0])
            kills.append(self.model.killed(row, c))
        b, S = torch.stack(drifts), torch.stack(noises)
        if not bool((S > 0).all()) or not bool(torch.isfinite(b).all()):
            raise InputError("drift, diffusion", "no noise, or a drift that is not finite", "noise between the bounds")
        return b, S, None if kills[0] is None else torch.stack(kills)  # type: ignore[arg-type]

    @property
    def undecided(self) -> torch.Tensor:
        """What may be off in these probabilities, shape (C,)."""
        return torch.zeros(len(self.conditions), dtype=torch.float64)

    def chosen(self, side: int) -> torch.Tensor:
        """Probability of leaving through a bound, shape (C,)."""
        return self.modes.chosen(side, self.places, self.weights)

    def survival(self, t: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
        """Probability of no response up to times (N,)."""
        amounts = self.left if self.model.killing is not None else sum(self.flows.values()) / self.modes.rates
        nearest = torch.stack([v.distance.detach().amin(1) for v in self.onsets.values()]).amin(0)
        s = t[:, None] - self.delays[group]
        found = self._over_time(torch.as_tensor(amounts), s, group).clamp(0.0, 1.0)
        # by then next to nothing is gone
        left = torch.where(s > SOON * nearest[group][:, None] ** 2, found, torch.ones_like(s))
        return (self.shares[group] * left).sum(1)

    def _over_time(self, amounts: torch.Tensor, s: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
        """Sums of modes at times (N, J)."""
        decay = torch.exp(-self.modes.rates[group][:, None, :] * s.clamp(min=0.0)[..., None])
        return (decay @ amounts[group][:, :, None])[..., 0]

    def log_density(self, side: int, t: torch.Tensor, group: torch.Tensor) -> tuple[torch.Tensor, float]:
        """Logarithm of the density of the response time at times (N,), and what is known of its error in all."""
        shortest = self.onsets[side].distance.detach().amin(1)[group][:, None]
        s = torch.maximum(t[:, None] - self.delays[group], SOONEST * shortest**2)
        shares = log_of(self.shares[group])
        rows, columns, off = self._early(side, s.detach(), group, shortest)
        logs, noise = self._log_over_time(self.flows[side], s, group)
        if len(rows):
            logs = logs.index_put((rows, columns), self._formula(side, s[rows, columns][:, None], group[rows])[:, 0])
            noise[rows, columns] = off
        total = torch.logsumexp(logs + shares, 1)
        parts = torch.exp((logs + shares - total[:, None]).detach())
        return total, float((parts * noise).sum())

    def _log_over_time(
        self, amounts: torch.Tensor, s: torch.Tensor, group: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logarithms of sums of modes at times (N, J), and their errors by rounding."""
        slowest = self.modes.rates[:, :1]
        decay = torch.exp(-(self.modes.rates - slowest)[group][:, None, :] * s[..., None])
        sums = (decay @ amounts[group][:, :, None])[..., 0]
        largest = (decay.detach() @ amounts.detach().abs()[group][:, :, None])[..., 0]
        noise = torch.log1p(ROUNDING * largest / sums.detach().clamp(min=LEAST))
        return log_of(sums) - slowest[group] * s, noise

    def _formula(self, side: int, s: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
        """Logarithm of the density of early passages at times (N, J)."""
        logs = self.onsets[side].log_density(s, group) + log_of(self.weights[group])[:, None, :]
        return torch.logsumexp(logs, -1)

    def _early(
        self, side: int, s: torch.Tensor, group: torch.Tensor, shortest: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Which passages are early (rows, columns), and by how much the logarithms by the formula may be off."""
        with torch.no_grad():
            soon = SOON * shortest**2
            rows, columns = (s < soon).nonzero(as_tuple=True)
            # where both are right they show by how much the formula is off; it is less so the earlier it is
            at = soon[rows]
            exact, noise = self._log_over_time(self.flows[side], at, group[rows])
            off = (self._formula(side, at, group[rows]) - exact).abs() + noise
            return rows, columns, off[:, 0] * s[rows, columns] / at[:, 0]


def _mixed(logs: torch.Tensor, lapse: torch.Tensor, guess: torch.Tensor) -> torch.Tensor:
    """log((1 − ε) exp(logs) + ε guess), with its derivative at ε = 0, and whatever logs are."""
    mixed = torch.logaddexp(log_of(1.0 - lapse) + logs, log_of(lapse * guess))
    pure = logs + torch.log1p(lapse * (guess * torch.exp((-logs).clamp(max=HOPELESS)) - 1.0))
    return torch.where(lapse > 0, mixed, pure)
