"""The same paths with steps h and 2h: the schedule of their steps, and the random numbers they share."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from kolmo.errors import InputError
from kolmo.montecarlo.faces import NEGLIGIBLE
from kolmo.montecarlo.methods import Method
from kolmo.montecarlo.model import INSIDE, Model
from kolmo.montecarlo.walk import Draws, SampledWalk, Walk
from kolmo.problem.problem import KolmogorovProblem

# Jumps of a kind that are drawn in a step: for rates so many times those seen, plus standard deviations, and at least.
ROOM, SURE, LEAST_ARRIVALS = 2.0, 6.0, 10
# A stationary problem is given up after this many crossing times of its box.
CROSSINGS = 1000


@dataclass(frozen=True)
class Schedule:
    """Pairs of fine steps.

    Attributes
    ----------
    pieces : tuple of (start, step, pairs)
        Pieces without breakpoints; a stationary problem has one.
    breaks : tuple of float
        Ends of pieces at which coefficients jump.
    steps : int
        Fine steps in all (stationary: per crossing time).
    """

    pieces: tuple[tuple[float, float, int], ...]
    breaks: tuple[float, ...]
    steps: int

    def pairs(self) -> Iterator[tuple[float, float, float, float]]:
        """Yield start, middle and end (as coefficients see it) of every pair of steps, and the length of one."""
        for start, h, pairs in self.pieces:
            for n in range(pairs):
                t = start + 2 * n * h
                end = start + (2 * n + 2) * h
                at_break = n == pairs - 1 and self.breaks
                yield t, t + h, end - INSIDE * h if at_break else end, h


def scheduled(
    problem: KolmogorovProblem, model: Model, starts: np.ndarray, steps: int, graded: bool = False
) -> Schedule:
    """Equal steps between breakpoints; graded: shorter and shorter ones towards the horizon in the last stretch."""
    if problem.horizon is None:
        h = _crossing_time(model, starts) / steps
        return Schedule(((0.0, h, CROSSINGS * math.ceil(steps / 2)),), (), steps)
    edges = [0.0, *problem.sde.breakpoints, problem.horizon]
    pieces = []
    for a, b in itertools.pairwise(edges):
        pairs = max(1, math.ceil(0.5 * steps * (b - a) / problem.horizon - 1e-9))
        if graded and b == problem.horizon:
            inner = b - (b - a) * np.linspace(1.0, 0.0, pairs + 1) ** 2
            pieces += [(float(p), 0.5 * float(q - p), 1) for p, q in itertools.pairwise(inner)]
        else:
            pieces.append((a, 0.5 * (b - a) / pairs, pairs))
    return Schedule(tuple(pieces), problem.sde.breakpoints, 2 * sum(n for *_, n in pieces))


def _crossing_time(model: Model, starts: np.ndarray) -> float:
    """1/max(Σ_ii/L_i² + |b_i|/L_i) over a few points of the box; the killing time where the box is infinite."""
    low, high = np.array(model.box.lower), np.array(model.box.upper)
    finite = np.isfinite(high - low)
    ends = [np.where(finite, low, starts.min(0)), np.where(finite, high, starts.max(0))]
    mesh = np.meshgrid(*np.linspace(ends[0], ends[1], 9).T, indexing="ij")
    points = np.concatenate([np.stack(mesh, -1).reshape(-1, len(low)), starts])
    rate = float(model.rate(0.0, points).max()) if not finite.any() else 0.0
    length = (high - low)[finite]
    variances = np.einsum("nii->ni", model.covariance(0.0, points))[:, finite]
    speeds = np.abs(model.drift(0.0, points))[:, finite]
    rate = max(rate, float((variances / length**2 + speeds / length).max(initial=0.0)))
    if rate <= 0.0:
        raise InputError("problem", "a stationary problem in which nothing moves", "noise or drift")
    return 1.0 / rate


class Pair:
    """The same paths with steps h and 2h; from the m points of starts (N, m, d) they are driven by the same noise."""

    def __init__(
        self, model: Model, method: Method, starts: np.ndarray, rng: np.random.Generator, sampled: bool = False
    ) -> None:
        self.model, self.rng, self.sampled = model, rng, sampled
        self.count, self.together = starts.shape[:2]
        places = starts.reshape(-1, starts.shape[-1])
        kind = SampledWalk if sampled else Walk
        self.walks = [kind(model, method, places), kind(model, method, places)]
        self.paid = np.zeros((2, len(places), model.columns or 1))
        self.index = np.arange(len(places))
        self.noises = int(model.diffusion(0.0, places[:1]).shape[-1])
        self.pushed = model.box.has("turns")
        self.absorbed = model.box.has("imposed") or bool(model.problem.stops)
        self.signed = method.order > 1.0 and self.noises > 1

    @property
    def totals(self) -> np.ndarray:
        """What each path was paid, fine and coarse, shape (2, N, m, k)."""
        return self.paid.reshape(2, self.count, self.together, -1)

    def run(self, schedule: Schedule, spread: np.ndarray, owner: np.ndarray, share: np.ndarray) -> float:
        """Simulate; totals receive what each path was paid. Returns the weight of the paths that had to be given up.

        To ``spread``, shape (points, k), is added the variance that instants drawn for all paths together bring into
        the sums over paths (weighted by ``share``, shape (N, m)) of the ``owner`` points. Of a single instant per step
        a variance cannot be seen: the squared difference of two neighbouring steps is taken, which is at least as
        large in the mean (collapsed strata: W. G. Cochran, 1977, Sampling Techniques, section 5A.12), less the part
        that the paths themselves bring.
        """
        first = np.flatnonzero(np.diff(owner, prepend=-1))
        n = np.diff(np.append(first, len(owner)))[:, None].astype(float)
        stationary = self.model.problem.stationary
        for t, middle, end, h in schedule.pairs():
            if stationary:
                t = middle = end = 0.0
            draws = [self._draw(t, h), self._draw(t, h)]
            fine, coarse = self.walks
            fine.advance(t, middle, h, draws[:1])
            earned = fine.earned
            fine.advance(middle, end, h, draws[1:])
            coarse.advance(t, end, h, draws)
            for event in self.model.problem.events:
                if abs(event.time - end) < 0.5 * h:
                    for walk in self.walks:
                        walk.happen(event)
            if self.sampled and not stationary:
                uneven = np.zeros((self.count * self.together, spread.shape[1]))
                uneven[self.index] = earned - fine.earned
                uneven = np.einsum("nmk,nm->nk", uneven.reshape(*share.shape, -1), share)
                total, squares = np.add.reduceat(uneven, first), np.add.reduceat(uneven**2, first)
                spread[owner[first]] += total**2 - (squares - total**2 / n) * n / np.maximum(n - 1.0, 1.0)
            self._drop()
            if not len(self.index):
                return 0.0
        left = float(self.walks[0].weight.sum()) if stationary else 0.0
        for walk in self.walks:
            if not stationary:
                walk.pay(walk.weight, self.model.final(self.model.fit(walk.x)))
        self._store(np.ones(len(self.index), dtype=bool))
        return left

    def _draw(self, t: float, h: float) -> Draws:
        """Draw the random numbers of one fine step; paths that go together share them."""
        d, m, rng = self.model.box.dim, self.noises, self.rng
        n = len(self.index) if self.together == 1 else self.count
        signs = np.zeros((n, m, m)) if self.signed else np.zeros((n, 0, 0))
        if self.signed:
            upper = np.triu(2.0 * rng.integers(0, 2, (n, m, m)) - 1.0, 1)
            signs = upper - np.swapaxes(upper, -1, -2)
        dW = math.sqrt(h) * rng.standard_normal((n, m))
        push = rng.standard_exponential((n, d, 2)) if self.pushed else np.zeros((n, d, 2))
        shape = (n, d + len(self.model.problem.stops), 2)
        normal, uniform = (rng.standard_normal(shape), rng.random(shape)) if self.absorbed else (np.zeros(shape),) * 2
        fraction, aside = 0.5, np.zeros((n, m))
        if self.sampled:
            fraction = float(rng.random())
            aside = math.sqrt(fraction * (1.0 - fraction) * h) * rng.standard_normal((n, m))
        arrivals = self._arrivals(t, h, n)
        who = self.index // self.together if self.together > 1 else slice(None)
        return Draws(dW[who], signs[who], push[who], normal[who], uniform[who], fraction, aside[who], arrivals[who])

    def _arrivals(self, t: float, h: float, n: int) -> np.ndarray:
        """Sums of exponential numbers, enough for twice the largest rate that any path has now."""
        if not self.model.problem.sde.kinds:
            return np.zeros((n, 0, 0))
        rates = [self.model.jumps(t, self.model.fit(walk.x))[0] for walk in self.walks]
        mean = ROOM * h * max(float(rate.max(initial=0.0)) for rate in rates)
        count = math.ceil(mean + SURE * math.sqrt(mean)) + LEAST_ARRIVALS
        return np.cumsum(self.rng.standard_exponential((n, rates[0].shape[1], count)), -1)

    def _drop(self) -> None:
        """Forget paths that are over in both walks, once there are enough of them."""
        alive = (self.walks[0].weight > NEGLIGIBLE) | (self.walks[1].weight > NEGLIGIBLE)
        if alive.sum() <= 0.8 * len(alive):
            self._store(~alive)
            for walk in self.walks:
                walk.keep(alive)
            self.index = self.index[alive]

    def _store(self, which: np.ndarray) -> None:
        for total, walk in zip(self.paid, self.walks, strict=True):
            total[self.index[which]] = walk.paid[which]
