"""First passages where bounds move or coefficients depend on time: one march, compared at its nodes, for all times."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import torch
from numpy.polynomial import chebyshev

from kolmo.errors import InputError
from kolmo.likelihood.base import log_of
from kolmo.likelihood.modes import integrals, polynomials
from kolmo.likelihood.strip import Start, Stretch, in_time, log_first, march, places
from kolmo.problem.instants import depends_on_time
from kolmo.problem.motion import Curve, traced
from kolmo.problem.sde import SDE

# Up to this part of d², where d is the distance in units of noise, nodes are not believed (of a driftless process
# exp(−15) has arrived), and what the potential adds is a polynomial of the own time: so many nodes give it.
SOON, EARLY = 1.0 / 30.0, 4
# Modes that are left at the first node that is believed: beyond, exp(−35) is.
LEFT = 70.0
# Noise at a node that is not believed.
NOISY = 1e-6
# A clock makes so many steps per resolution while time grows by a factor e, and in that part of the own time in which
# what is left falls by a factor e^(1.5); so many on a stretch at least.
PACE, RELAXED, FEWEST = 1.0 / 6.0, 0.3, 6
# Bounds have met where they are this part of their first distance apart; nothing is left after so many factors of e.
MET, GONE = 1e-4, 35.0
# A stretch of time ends where the squared distance has changed by this factor, so that polynomials follow it.
FACTOR = 16.0
# Times at which a bound is looked at, polynomials in time of a stretch, and of those in space at which it is.
LOOKS, SERIES, ACROSS = 257, 24, 12
# Panels on which a function of time is looked at for breaks, their lengths being no plain fractions; the part of its
# size that is left of the last terms of a smooth one; the part of the width by which a bound jumps; and where
# coefficients are looked at.
PANELS, UNEVEN, SMOOTH, JUMP, INSIDE = 6, 1.137, 1e-7, 1e-7, 0.37
# First steps after a break, in units of those after the start.
FRESH = 1e-3
# Part of a stretch by which its ends are moved: breaks are known to nine digits.
NUDGE = 1e-8
# Nodes of the interpolation in time.
WIDTH = 7
# Times before a passage can be are taken to be this part of d².
SOONEST = 1e-6
# Steps of Newton's method to where a place in units of noise is; two more carry its derivatives.
NEWTON = 8
# What may be left of trials whose time is missing, as a factor of e, and the longest time in units of that in the data.
LONGEST = 64.0

Covariates = Mapping[str, float]


class Model(Protocol):
    """What is asked of a model."""

    bounds: tuple[Any, Any]
    killing: Any

    @property
    def sides(self) -> tuple[int, ...]:
        """Choices that there are."""

    def sde(self, c: Covariates) -> SDE:
        """The process under a condition."""

    def killed(self, x: torch.Tensor, c: Covariates, t: Any = 0.0) -> torch.Tensor | None:
        """Killing rate at points (..., 1), shape (...)."""

    def places(self, side: int, times: torch.Tensor, c: Covariates) -> torch.Tensor:
        """Where a bound is at times (n,)."""


def at_times(
    f: Callable[[Any, torch.Tensor], torch.Tensor], form: str, t: torch.Tensor, x: torch.Tensor
) -> torch.Tensor:
    """Values of a coefficient f(t, x) -> (n,) of points (n, 1), at times (P,) and places (P, Q)."""
    P, Q = x.shape
    if form == "constant":
        return f(0.0, x[:1, :1]).expand(P, Q)
    if form == "steady":
        return f(0.0, x.reshape(-1, 1)).reshape(P, Q)
    if form == "each":
        return torch.stack([f(s, row[:, None]) for s, row in zip(t, x, strict=True)])
    flat = t.detach().repeat_interleave(Q)
    return f(flat[:, None] if form == "column" else flat, x.reshape(-1, 1)).reshape(P, Q)


def form_of(f: Callable[[Any, torch.Tensor], torch.Tensor], given: Any, horizon: float, x: torch.Tensor) -> str:
    """How a coefficient takes many times at once: "column", "row", only "each"; or it is "steady", "constant".

    Examples
    --------
    >>> x = torch.tensor([[0.1], [0.4]], dtype=torch.float64)
    >>> ramp = lambda t, x: (t * x)[..., 0]
    >>> form_of(ramp, ramp, 1.0, x), form_of(lambda t, x: 0 * x[:, 0], 1.0, 1.0, x)
    ('column', 'constant')
    """
    if not callable(given):
        return "constant"
    if not depends_on_time(given, f, x):
        return "steady"
    t = torch.tensor([0.0, 0.3, 0.71, 1.0], dtype=torch.float64) * horizon
    rows = x[:, 0].expand(len(t), -1)
    with torch.no_grad():
        apart = at_times(f, "each", t, rows)
        for form in ("column", "row"):
            try:
                together = at_times(f, form, t, rows)
            except Exception:
                continue
            if torch.allclose(together, apart, rtol=1e-12, atol=0.0):
                return form
    return "each"


def at_once(given: Any, horizon: float, c: Covariates) -> bool:
    """Whether a bound f(t, c) takes many times at once.

    Examples
    --------
    >>> at_once(lambda t, c: 1.0 - t, 1.0, {}), at_once(lambda t, c: max(1.0 - t, 0.5), 1.0, {})
    (True, False)
    """
    times = torch.tensor([0.0, 0.3, 0.71, 1.0], dtype=torch.float64) * horizon
    with torch.no_grad():
        try:
            found = torch.as_tensor(given(times, c), dtype=torch.float64)
        except Exception:
            return False
        if found.shape != times.shape:
            return False
        apart = torch.stack([_number(given(t, c), "lower, upper") for t in times])
        return torch.allclose(found, apart, rtol=1e-12, atol=0.0)


def bound_at(given: Any, times: torch.Tensor, c: Covariates, name: str, together: bool) -> torch.Tensor:
    """Places (n,) of a bound f(t, c) at times (n,)."""
    found = given(times, c) if together else torch.stack([_number(given(t, c), name) for t in times])
    found = torch.as_tensor(found, dtype=torch.float64)
    if not bool(torch.isfinite(found).all()):
        where = float(times[int(torch.isfinite(found).int().argmin())])
        raise InputError(name, f"a bound that is not finite at t = {where:g}", "bounds at finite places")
    return found


def _number(value: Any, name: str) -> torch.Tensor:
    found = torch.as_tensor(value, dtype=torch.float64)
    if found.numel() != 1:
        raise InputError(name, f"shape {tuple(found.shape)}", "one number for each time and condition")
    return found.reshape(())


@dataclass(frozen=True)
class Course:
    """A condition's coefficients at times (P,) and points (P, Q), and the width (P,)."""

    x: torch.Tensor
    width: torch.Tensor
    drift: torch.Tensor
    noise: torch.Tensor
    killing: torch.Tensor | None


class Process:
    """A condition of a model between its bounds, in units of noise.

    Parameters
    ----------
    model : Model
        The model.
    c : mapping
        The condition.
    reach : float or None
        Distance of the cut where there is one bound.
    horizon : float
        The last time.
    """

    def __init__(self, model: Model, c: Covariates, reach: float | None, horizon: float) -> None:
        self.model, self.c, self.reach, self.horizon = model, c, reach, horizon
        self.sde = model.sde(c)
        self._together = {s: moves(model.bounds[s]) and at_once(model.bounds[s], horizon, c) for s in model.sides}
        low, high = (float(v.detach()) for v in self.ends(torch.zeros(1, dtype=torch.float64)))
        inner, given = torch.linspace(low, high, 5, dtype=torch.float64)[1:-1, None], self.sde.given
        self.forms = {
            "drift": form_of(self._drift, given["drift"], horizon, inner),
            "noise": form_of(self._noise, given["covariance"], horizon, inner),
            "killing": form_of(self._killing, model.killing, horizon, inner),
        }

    def _drift(self, t: Any, x: torch.Tensor) -> torch.Tensor:
        return self.sde.drift(t, x)[..., 0]  # type: ignore[no-any-return]

    def _noise(self, t: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.sqrt(self.sde.covariance(t, x)[..., 0, 0])

    def _killing(self, t: Any, x: torch.Tensor) -> torch.Tensor:
        found = self.model.killed(x, self.c, t)
        return torch.zeros_like(x[..., 0]) if found is None else found

    def ends(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Both ends (P,) at times (P,)."""
        found = {s: self._bound(s, t) for s in self.model.sides}
        if len(found) == 1:
            assert self.reach is not None
            ((side, bound),) = found.items()
            found[1 - side] = bound + (1 - 2 * side) * self.reach
        low, high = found[0], found[1]
        return low, high

    def _bound(self, side: int, t: torch.Tensor) -> torch.Tensor:
        bound, name = self.model.bounds[side], ("lower", "upper")[side]
        if not moves(bound):
            return self.model.places(side, t, self.c)
        return bound_at(bound, t, self.c, name, self._together[side])

    def course(self, t: torch.Tensor, count: int) -> Course:
        """Coefficients at times (P,) and so many points that divide the way between the ends in units of noise."""
        low, high = self.ends(t)
        zeta, span = places(count).points, (high - low)[:, None]
        x = low[:, None] + zeta * span
        noise = at_times(self._noise, self.forms["noise"], t, x)
        if not bool((noise > 0).all()):
            raise InputError("diffusion", "no noise", "noise between the bounds")
        if bool(((noise - noise[:, :1]).abs() <= 1e-13 * noise).all()):
            width = span[:, 0] / noise[:, 0]
            noise = noise[:, :1].expand(x.shape)
        else:
            s, width = _divided(noise / span, zeta)
            x = low[:, None] + s * span
            noise = at_times(self._noise, self.forms["noise"], t, x)
        drift = at_times(self._drift, self.forms["drift"], t, x)
        if not bool(torch.isfinite(drift).all()):
            raise InputError("drift", "a drift that is not finite", "a finite drift between the bounds")
        killed = self.model.killing is None
        return Course(x, width, drift, noise, None if killed else at_times(self._killing, self.forms["killing"], t, x))

    def inner(self, x: torch.Tensor, count: int) -> torch.Tensor:
        """Where places (S,) are at first, as a part of the way in units of noise."""
        low, high = self.ends(torch.zeros(1, dtype=torch.float64))
        s = (x - low) / (high - low)
        y = low + places(count).points * (high - low)
        noise = at_times(self._noise, self.forms["noise"], torch.zeros(1, dtype=torch.float64), y[None])
        if bool(((noise - noise[:, :1]).abs() <= 1e-13 * noise).all()):
            return s
        series = (1.0 / noise) @ places(count).expand.T
        ways = integrals(2.0 * s - 1.0, count) @ series[0]
        return ways / (integrals(torch.ones(1, dtype=torch.float64), count) @ series[0])

    def breaks(self) -> list[float]:
        """Times at which a bound or a coefficient bends or jumps."""
        found: set[float] = set()
        with torch.no_grad():
            low, high = (float(v) for v in self.ends(torch.zeros(1, dtype=torch.float64)))
            for side in self.model.sides:
                if moves(self.model.bounds[side]):
                    curve = self._broken(partial(self._bound, side))
                    found |= set(curve.breaks)
                    for t in curve.breaks:
                        if abs(float(curve(t)) - float(curve(t, before=True))) > JUMP * (high - low):
                            named = ("lower", "upper")[side]
                            raise InputError(named, f"a bound that jumps at t = {t:g}", "a bound without jumps")
            for name, form in self.forms.items():
                if form not in ("steady", "constant"):
                    f, x = getattr(self, f"_{name}"), torch.tensor([[low + INSIDE * (high - low)]], dtype=torch.float64)
                    at = lambda t, f=f, x=x, form=form: at_times(f, form, t, x.expand(len(t), 1))[:, 0]  # noqa: E731
                    found |= set(self._broken(at).breaks)
        return sorted(t for t in found if 0.0 < t < self.horizon)

    def _broken(self, f: Callable[[torch.Tensor], torch.Tensor]) -> Curve:
        """The course of a function of times (n,) -> (n,); without breaks where a look at all of it shows none."""
        z, edges = chebyshev.chebpts1(SERIES), self.horizon * np.linspace(0.0, 1.0, PANELS + 1) ** UNEVEN
        t = np.concatenate([0.5 * (a + b) + 0.5 * (b - a) * z for a, b in pairwise(edges)])
        values = f(torch.as_tensor(t)).numpy().reshape(PANELS, SERIES)
        series = np.abs(chebyshev.chebfit(z, values.T, SERIES - 1))
        if series[-4:].max() <= SMOOTH * np.abs(values).max():
            return Curve((), ())
        return traced(lambda t: float(f(torch.tensor([t], dtype=torch.float64))), self.horizon)


def moves(bound: Any) -> bool:
    """Whether a bound is a function of time and condition, and not of the condition alone.

    Examples
    --------
    >>> moves(lambda t, c: 1.0 - t), moves(lambda c: c["a"]), moves(1.0)
    (True, False, False)
    """
    if not callable(bound):
        return False
    import inspect

    try:
        kinds = inspect.signature(bound).parameters.values()
    except (TypeError, ValueError):
        return False
    plain = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in plain and p.default is p.empty for p in kinds) == 2


def _divided(noise: torch.Tensor, zeta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Parts s of an interval of length one at which the way in units of noise (P, Q) is ζ, and the whole way (P,)."""
    count = noise.shape[1]
    series = (1.0 / noise) @ places(count).expand.T
    whole = 0.5 * series @ integrals(torch.ones(1, dtype=torch.float64), count)[0]
    s = zeta.expand(noise.shape)

    def better(s: torch.Tensor, series: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
        y = 2.0 * s - 1.0
        way = 0.5 * (integrals(y, count) * series[:, None]).sum(-1) / whole[:, None]
        rate = (polynomials(y, count) * series[:, None]).sum(-1) / whole[:, None]
        return s - (way - zeta) / rate

    with torch.no_grad():
        for _ in range(NEWTON):
            s = better(s, series, whole).clamp(0.0, 1.0)
    return better(better(s, series, whole), series, whole), whole


@dataclass(frozen=True)
class Clock:
    """Times of a condition's steps, as a smooth function of their number; frozen, so that ℓ is smooth.

    Attributes
    ----------
    edges : list of float
        Ends of the stretches.
    series : list of ndarray
        Own time on each, as Chebyshev coefficients.
    rate : float
        Of the drift.
    nearest : float
        Least distance of a start from a bound that counts, in units of the width.
    gone : bool
        Whether nothing is left at the end.
    fresh : list of bool
        Whether something breaks where a stretch begins: what leaves is like the root of the time since then.
    """

    edges: list[float]
    series: list[np.ndarray]
    rate: float
    nearest: float
    gone: bool
    fresh: list[bool]
    _known: dict[tuple[int, int, int], np.ndarray] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, process: Process, starts: torch.Tensor, breaks: Sequence[float]) -> "Clock":
        """The clock at the present parameters."""
        with torch.no_grad():
            t = np.unique(np.concatenate([np.linspace(0.0, process.horizon, LOOKS), breaks]))
            at = torch.as_tensor(t)
            low, high = process.ends(at)
            if not bool(low[0] < high[0]):
                raise InputError("lower, upper", f"{float(low[0]):g} and {float(high[0]):g}", "lower < upper")
            apart = (high - low).numpy()
            t, end = _until(process, t, apart)
            at = torch.as_tensor(t)
            course = process.course(at, ACROSS)
            width = course.width.numpy()
            bend = (course.drift @ places(ACROSS).slopes.T / (course.width[:, None] * course.noise)).abs()
            held = float(bend.max())
            drift, size = course.drift.numpy(), course.noise.numpy() / width[:, None]
            size = np.maximum(np.abs(drift).max(), size)
            stretches = [(t > a) & (t < b) for a, b in pairwise([-1.0, *breaks, np.inf])]
            quick = [_quickest(t[k], v[k], s[k]) for k in stretches for v, s in ((width[:, None],) * 2, (drift, size))]
            rate = held + 2.0 * max(quick, default=0.0)
            gone = np.maximum(0.5 * np.pi**2 / width**2 - 0.5 * held, 0.0)
            fallen = np.append(0.0, np.cumsum(0.5 * np.diff(t) * (gone[1:] + gone[:-1])))
            gone_by = bool(fallen[-1] > GONE) or end < process.horizon
            if fallen[-1] > GONE:
                k = int(np.argmax(fallen > GONE))
                end = float(np.interp(GONE, fallen[: k + 1], t[: k + 1]))
            level = np.log(width[0] ** 2 / width**2) / np.log(FACTOR)
            marks, cut = [], level[0]
            for time, value in zip(t, level, strict=True):
                if abs(value - cut) > 1.0:
                    marks.append(float(time))
                    cut = value
            edges = sorted({0.0, end, *(b for b in (*breaks, *marks) if 0.0 < b < end * (1.0 - 1e-9))})
            series, begun = [], 0.0
            for a, b in pairwise(edges):
                z = chebyshev.chebpts1(SERIES)
                inside = torch.as_tensor(0.5 * (a + b) + 0.5 * (b - a) * z)
                own = process.course(inside, ACROSS).width.numpy() ** -2.0
                grown = chebyshev.chebint(chebyshev.chebfit(z, 0.5 * (b - a) * own, SERIES - 1), lbnd=-1.0, k=begun)
                series.append(grown)
                begun = float(chebyshev.chebval(1.0, grown))
            z0 = process.inner(starts, ACROSS)
            sides = [z0 if s == 0 else 1.0 - z0 for s in process.model.sides]
            return cls(
                edges, series, rate, float(torch.stack(sides).amin()), gone_by, [e in breaks for e in edges[:-1]]
            )

    def soon(self, n: int) -> float:
        """Own time from which on nodes are believed."""
        return max(SOON * self.nearest**2, LEFT / (np.pi * n) ** 2)

    def counts(self, n: int) -> np.ndarray:
        """Steps on each stretch, in fractions."""
        ends = [self._number(n, k, np.array([-1.0, 1.0])) for k in range(len(self.series))]
        return np.array([b - a for a, b in ends])

    def _number(self, n: int, k: int, z: np.ndarray) -> np.ndarray:
        """Number of the step at points z in [−1, 1] of a stretch."""
        pace, (a, b) = PACE * n, self.edges[k : k + 2]
        tau = np.maximum(chebyshev.chebval(z, self.series[k]), 0.0)
        slow = 0.5 * pace * self.soon(n)  # the first step is half of what is soon
        t = 0.5 * (a + b) + 0.5 * (b - a) * z
        steps = np.log1p(tau / slow) + tau / RELAXED + self.rate * t
        if self.fresh[k]:
            steps = steps + np.log1p(np.maximum(tau - chebyshev.chebval(-1.0, self.series[k]), 0.0) / (FRESH * slow))
        return np.asarray(pace * steps)

    def nodes(self, n: int, k: int, steps: int) -> np.ndarray:
        """Nodes and middles of so many steps on a stretch."""
        if (n, k, steps) in self._known:
            return self._known[n, k, steps]
        low, high = self._number(n, k, np.array([-1.0, 1.0]))
        wanted = np.linspace(low, high, 2 * steps + 1)
        z = -1.0 + 2.0 * np.append(0.0, np.geomspace(1e-9, 1.0, 40 * steps))
        z = np.interp(wanted, self._number(n, k, z), z)
        for _ in range(NEWTON):
            step = 1e-4 * (1.0 + z) + 1e-9
            a, b = np.maximum(z - step, -1.0), np.minimum(z + step, 1.0)
            slope = (self._number(n, k, b) - self._number(n, k, a)) / (b - a)
            z = np.clip(z - (self._number(n, k, z) - wanted) / slope, -1.0, 1.0)
        z[0], z[-1] = -1.0, 1.0
        a, b = self.edges[k : k + 2]
        self._known[n, k, steps] = 0.5 * (a + b) + 0.5 * (b - a) * z
        return self._known[n, k, steps]

    def divided(self, count: int) -> "Clock":
        """The same with more stretches: the longest in own time are halved."""
        edges, series, fresh = list(self.edges), list(self.series), list(self.fresh)
        while len(series) < count:
            k = int(np.argmax([v[1:].sum() - (v[1:] * (-1.0) ** np.arange(1, len(v))).sum() for v in series]))
            z, middle = chebyshev.chebpts1(SERIES + 1), 0.5 * (edges[k] + edges[k + 1])
            halves = [chebyshev.chebfit(z, chebyshev.chebval(0.5 * (z + s), series[k]), SERIES) for s in (-1.0, 1.0)]
            edges.insert(k + 1, middle)
            series[k : k + 1] = halves
            fresh.insert(k + 1, False)
        return Clock(edges, series, self.rate, self.nearest, self.gone, fresh)


def _quickest(t: np.ndarray, values: np.ndarray, size: np.ndarray) -> float:
    """The largest rate at which values (P, Q) bend: √(|second derivative| / size)."""
    if len(t) < 3:
        return 0.0
    slopes = np.diff(values, axis=0) / np.diff(t)[:, None]
    bends = np.diff(slopes, axis=0) / (0.5 * (t[2:] - t[:-2]))[:, None]
    return float(np.sqrt(np.max(np.abs(bends) / np.broadcast_to(size, values.shape)[1:-1], initial=0.0)))


def _until(process: Process, t: np.ndarray, apart: np.ndarray) -> tuple[np.ndarray, float]:
    """Times up to where the ends have all but met, if they do; the last of them."""
    met = np.flatnonzero(apart <= MET * apart[0])
    if not len(met):
        return t, float(t[-1])
    a, b = t[met[0] - 1], t[met[0]]
    for _ in range(60):
        middle = 0.5 * (a + b)
        low, high = process.ends(torch.tensor([middle], dtype=torch.float64))
        a, b = (middle, b) if float(high - low) > MET * apart[0] else (a, middle)
    # closer and closer to where they meet
    closing = a - (a - t[met[0] - 1]) * 0.7 ** np.arange(1, 40)
    return np.concatenate([t[: met[0]], closing[closing > t[met[0] - 1]]]), float(a)


class Timed:
    """Passages of all conditions at one resolution; the same methods as those of passages at rest.

    Parameters
    ----------
    model : Model
        The model.
    conditions : sequence
        Its conditions.
    clocks : sequence of Clock
        Of each, with the same number of stretches.
    laws : pair of (points, weights)
        Of starts and delays, shapes (C, S) and (C, J).
    n : int
        Sines.
    reach : float or None
        Distance of the cut where there is one bound.
    horizon : float
        The last time.
    """

    def __init__(
        self,
        processes: Sequence[Process],
        clocks: Sequence[Clock],
        laws: tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
        n: int,
    ) -> None:
        count = 10 + n // 4
        (starts, weights), (self.delays, self.shares) = laws
        self.clocks = clocks
        steps = np.maximum(np.ceil(np.max([clock.counts(n) for clock in clocks], 0)).astype(int), FEWEST)
        times = [[clock.nodes(n, k, m) for k, m in enumerate(steps)] for clock in clocks]
        stacked = [torch.as_tensor(np.stack([row[k] for row in times])) for k in range(len(steps))]
        looks = [torch.as_tensor(np.concatenate([_inside(t) for t in row])) for row in times]
        courses = [p.course(t, count) for p, t in zip(processes, looks, strict=True)]
        if any(not bool((course.width > 0).all()) for course in courses):
            raise CrossedError
        cuts = np.cumsum([0, *(2 * steps + 1)])
        stretches = []
        for k, t in enumerate(stacked):
            mine = slice(cuts[k], cuts[k + 1])
            x, width, drift, noise = (
                torch.stack([getattr(course, name)[mine] for course in courses])
                for name in ("x", "width", "drift", "noise")
            )
            killing = None
            if courses[0].killing is not None:
                killing = torch.stack([course.killing[mine] for course in courses])  # type: ignore[index]
            stretches.append(Stretch.of(t, x, width, drift, noise, killing))
        z = torch.stack([p.inner(x, count) for p, x in zip(processes, starts, strict=True)])
        if not bool(((z > 0) & (z < 1)).all()):
            k = int(((z <= 0) | (z >= 1)).any(1).nonzero()[0])
            raise InputError("start", starts[k].tolist()[:3], "a start between the bounds")
        self.start = Start(z, weights, stretches[0])
        self.record = march(stretches, self.start, n)
        self.sides = processes[0].model.sides
        self._at_nodes = {s: self.start.log_first(s, self.record.tau[:, 1:]) for s in self.sides}
        self.width = torch.stack([course.width[-1] for course in courses])
        self._believe(n)

    def _believe(self, n: int) -> None:
        """Replace what early nodes say by a polynomial of the own time through zero and the first that are believed."""
        record = self.record
        tau, excess = record.tau.detach(), record.excess
        soon = torch.as_tensor([clock.soon(n) for clock in self.clocks])
        good = (tau[:, None] >= soon[:, None, None] * (1.0 - 1e-9)) & (record.noise < NOISY)
        first = good.int().argmax(-1).clamp(max=tau.shape[1] - EARLY)
        index = first[..., None] + torch.arange(EARLY)
        known = record.tau[:, None].expand(excess.shape).gather(2, index)
        values = excess.gather(2, index)
        self._first = first
        rates, self._rates = values / known, []
        for count in (EARLY - 1, EARLY):
            self._rates.append((known[..., :count], rates[..., :count]))
        early = torch.arange(tau.shape[1]) < first[..., None]
        own, (nodes, slopes) = record.tau[:, None].expand(excess.shape), self._rates[1]
        poly = own * _through(nodes[..., None, :], slopes[..., None, :], own)
        self.excess = torch.where(early, poly, excess)

    def log_density(self, side: int, t: torch.Tensor, group: torch.Tensor) -> tuple[torch.Tensor, float]:
        """Logarithm of the density of the response time at times (N,), and what is known of its error in all."""
        s, over, _ = self._times(t, group)
        excess, scale, tau = self._between(s, group, self.excess[:, side], self.record.scale[:, side], self.record.tau)
        logs = excess + scale + self._free(side, tau, group)
        logs = logs - over * (0.5 * np.pi**2 / self.width[group] ** 2)[:, None]
        total = torch.logsumexp(logs + log_of(self.shares[group]), 1)
        parts = torch.exp((logs + log_of(self.shares[group]) - total[:, None]).detach())
        return total, float((parts * self._off(side, s, tau, group)).sum())

    def _times(self, t: torch.Tensor, group: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Times since the start (N, J) that are marched over, by how much they are later, and the soonest."""
        s = t[:, None] - self.delays[group]
        nearest = torch.as_tensor([clock.nearest for clock in self.clocks])
        first = self.record.t[:, 1] / self.record.tau[:, 1].detach()
        soonest = (SOONEST * nearest**2 * first)[group][:, None]
        last = self.record.t[:, -1][group][:, None]
        return torch.minimum(torch.maximum(s, soonest), last), (s - last).clamp(min=0.0), soonest

    def _free(self, side: int, tau: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
        start = self.start
        d = start.z if side == 0 else 1.0 - start.z
        return torch.logsumexp(start.logs[group][:, None, :] + log_first(tau[..., None], d[group][:, None, :]), -1)

    def _off(self, side: int, s: torch.Tensor, tau: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
        """What is known of the errors of logarithms at times (N, J): rounding, and the polynomial of early times."""
        record = self.record
        with torch.no_grad():
            tau = tau.detach()
            first = self._first[:, side][group]
            begun = record.tau[group, first][:, None]
            near = torch.searchsorted(record.t[group], s.detach()).clamp(max=record.t.shape[1] - 1)
            noise = record.noise[:, side][group].gather(1, torch.maximum(near, first[:, None])).clamp(max=1.0)
            fine, coarse = (
                _through(known[:, side][group][:, None, :], rates[:, side][group][:, None, :], tau)
                for known, rates in self._rates[::-1]
            )
            return noise + torch.where(tau < begun, tau * (fine - coarse).abs(), torch.zeros_like(tau))

    def survival(self, t: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
        """Probability of no response up to times (N,)."""
        s, over, soonest = self._times(t, group)
        (mass,) = self._between(s, group, self.record.mass)
        mass = torch.where(s <= soonest, torch.zeros_like(mass), mass)
        left = torch.exp(mass - over * (0.5 * np.pi**2 / self.width[group] ** 2)[:, None]).clamp(max=1.0)
        return (self.shares[group] * left).sum(1)

    def chosen(self, side: int) -> torch.Tensor:
        """Probability of leaving through a bound, shape (C,)."""
        record, model_sides = self.record, self.sides
        flows = {s: torch.exp(self.excess[:, s, 1:] + record.scale[:, s, 1:] + self._at_nodes[s]) for s in model_sides}
        whole = torch.zeros(len(record.t), dtype=torch.float64)
        for first in np.unique(record.first):
            last = int(record.last[first])
            slopes, pieces = in_time(last - first + 1)
            t = record.t[:, first : last + 1]
            flow = torch.cat([torch.zeros_like(whole)[:, None], flows[side]], 1)[:, first : last + 1]
            whole = whole + ((flow * (t @ slopes.T)) @ pieces.T).sum(1)
        out = sum(flow[:, -1] for flow in flows.values())
        return whole + self.undecided * (flows[side][:, -1] / out).detach()

    @property
    def undecided(self) -> torch.Tensor:
        """What is left at the end, shape (C,)."""
        return torch.exp(self.record.mass[:, -1].detach())

    def _between(self, s: torch.Tensor, group: torch.Tensor, *tables: torch.Tensor) -> list[torch.Tensor]:
        """Values of tables (C, M) at times (N, J), by polynomials through nodes on one side of every break."""
        record = self.record
        t = record.t[group]
        at = (torch.searchsorted(t, s.detach(), right=True) - 1).clamp(0, t.shape[1] - 1)
        first, last = torch.as_tensor(record.first)[at], torch.as_tensor(record.last)[at]
        begin = torch.minimum(torch.maximum(at - WIDTH // 2, first), last - WIDTH + 1)
        index = begin[..., None] + torch.arange(WIDTH)
        rows = group[:, None, None]
        known = record.t[rows, index]
        apart = known[..., :, None] - known[..., None, :] + torch.eye(WIDTH, dtype=torch.float64)
        away = s[..., None] - known
        each = away[..., None, :].expand(apart.shape)
        each = torch.where(torch.eye(WIDTH, dtype=torch.bool), torch.ones_like(each), each)
        weights = each.prod(-1) / apart.prod(-1)
        return [(weights * table[rows, index]).sum(-1) for table in tables]


def _inside(t: np.ndarray) -> np.ndarray:
    """Nodes of a stretch, the first and the last moved inwards a little, in front of what jumps there."""
    away = NUDGE * (t[-1] - t[0])
    return np.concatenate([[t[0] + away * (t[0] > 0.0)], t[1:-1], [t[-1] - away]])


class CrossedError(Exception):
    """Bounds have met before the clock says so."""


def _through(known: torch.Tensor, values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The polynomial through values at points (..., m), at x (...)."""
    m = known.shape[-1]
    total = torch.zeros_like(x)
    for i in range(m):
        term = values[..., i]
        for j in range(m):
            if j != i:
                term = term * (x - known[..., j]) / (known[..., i] - known[..., j])
        total = total + term
    return total
