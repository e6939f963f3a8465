"""The course of bounds that move, and a process in the strip between them, where they stand still."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.polynomial import chebyshev

from kolmo.errors import InputError
from kolmo.likelihood.laws import Covariates
from kolmo.likelihood.modes import integrals, polynomials
from kolmo.likelihood.strip import places
from kolmo.problem.instants import depends_on_time
from kolmo.problem.motion import Curve, traced

if TYPE_CHECKING:
    from kolmo.likelihood.passage import FirstPassage

# Panels on which a function of time is looked at for breaks, their lengths being no plain fractions; the part of its
# size that is left of the last terms of a smooth one; the part of the width by which a bound jumps; and where
# coefficients are looked at.
PANELS, UNEVEN, SMOOTH, JUMP, INSIDE = 6, 1.137, 1e-7, 1e-7, 0.37

# Up to this part of d², where d is the distance in units of noise, nodes are not believed (of a driftless process
# exp(−15) has arrived), and what the potential adds is a polynomial of the own time: so many nodes give it.
SOON, EARLY = 1.0 / 30.0, 4
# Modes that are left at the first node that is believed: beyond, exp(−35) is.
LEFT = 70.0
# Noise at a node that is not believed.
NOISY = 1e-6
# Bounds have met where they are this part of their first distance apart; nothing is left after so many factors of e.
MET, GONE = 1e-4, 35.0
# A stretch of time ends where the squared distance has changed by this factor, so that polynomials follow it.
FACTOR = 16.0
# Times at which a bound is looked at, polynomials in time of a stretch, and of those in space at which it is.
LOOKS, SERIES, ACROSS = 257, 24, 12
# Part of a stretch by which its ends are moved: breaks are known to nine digits.
NUDGE = 1e-8
# Nodes of the interpolation in time.
WIDTH = 7
# Steps of Newton's method to where a place in units of noise is; two more carry its derivatives.
NEWTON = 8


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

    def __init__(self, model: "FirstPassage", c: Covariates, reach: float | None, horizon: float) -> None:
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
