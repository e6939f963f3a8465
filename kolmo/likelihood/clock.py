"""The clock of a march of first passages: panels in time, graded after breaks and where bounds move quickly."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from numpy.polynomial import chebyshev

from kolmo.errors import InputError
from kolmo.likelihood.course import (
    ACROSS,
    FACTOR,
    GONE,
    LEFT,
    LOOKS,
    MET,
    NEWTON,
    SERIES,
    SOON,
    Process,
)
from kolmo.likelihood.strip import places

# A clock makes so many steps per resolution while time grows by a factor e, and in that part of the own time in which
# what is left falls by a factor e^(1.5); so many on a stretch at least.
PACE, RELAXED, FEWEST = 1.0 / 6.0, 0.3, 6
# First steps after a break, in units of those after the start.
FRESH = 1e-3


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
