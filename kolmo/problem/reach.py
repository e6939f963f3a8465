"""Where the process goes: an ensemble of simulated paths, summarised by its hull and spread."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import ndtri

from kolmo.arrays import as_numpy, as_points
from kolmo.kernels import ensemble
from kolmo.problem.instants import depends_on_time

PATHS = 256
# Steps: so many in the time in which the drift draws points together, or apart, by a factor e; at least, at most.
STEPS, LEAST, MOST = 8, 12, 256
# Steps from one look at the paths to the next: order statistics cost more than the step.
BETWEEN = 4
# A step is stiff where the drift draws points together by more than this exponent in it.
STIFF = 0.5
# Quantile of two standard deviations.
FAR = 0.977
# Points along each axis of an open face from which drift is followed outwards, and Runge–Kutta steps of these paths.
STARTS, FOLLOWED = 9, 32
TINY = 1e-300
# Jumps of a kind in a step that are counted: more of them move a path as a drift does.
MOST_JUMPS = 1e6
# How far beside an end that is only left its coefficients are read, as a part of the box or of what is known of scales.
ASIDE = 1e-3


@dataclass(frozen=True)
class Reach:
    """Envelope of an ensemble of paths: per axis, how far the paths went and how spread they were.

    Attributes
    ----------
    low, high : ndarray, shape (d,)
        Hull of the noise-free-like centre of the paths over time.
    spread_low, spread_high : ndarray, shape (d,)
        One standard deviation below and above, at the time where it matters most.
    exploded : float
        Part of the paths that ran away to infinity before the horizon; they are left out of the envelope from there on.
    """

    low: np.ndarray
    high: np.ndarray
    spread_low: np.ndarray
    spread_high: np.ndarray
    exploded: float = 0.0

    def interval(self, tail: float) -> tuple[np.ndarray, np.ndarray]:
        """Ends of the interval left with about the given probability."""
        z = -float(ndtri(0.5 * tail))
        hull = self.high - self.low
        # without noise a cut still needs distance: closures there see data from outside
        still = np.where(np.abs(self.high) > 0, 1e-3 * np.abs(self.high), 1.0)
        moves = np.maximum(hull, self.spread_low + self.spread_high) > 1e-12 * still
        pad = 0.15 * np.where(moves, hull, still)
        return self.low - np.maximum(z * self.spread_low, pad), self.high + np.maximum(z * self.spread_high, pad)


def reach(sde: Any, points: Any, horizon: float, *, within: Any = None, seed: int = 0) -> Reach:
    """Simulate paths from the points and summarise where they go.

    Parameters
    ----------
    sde : SDE
        The process.
    points : array_like, shape (..., d)
        Starting points; of many, the extreme ones are used.
    horizon : float
        Time T.
    within : Box, optional
        Paths are kept inside its finite ends (reflected, or wrapped on periodic axes).
    seed : int
        Seed of the ensemble.
    """
    dim = sde.dim if sde.dim is not None else within.dim
    starts = _extremes(as_numpy(as_points(points, dim, "points")).reshape(-1, dim))
    rng = np.random.default_rng(seed)
    everywhere = np.full(dim, -np.inf), np.full(dim, np.inf)
    ends = everywhere if within is None else _readable(sde, within, starts, horizon)
    starts = np.clip(starts, *ends)
    room = _room(sde, starts, horizon)
    wanted = STEPS * horizon * _rate(sde, starts, horizon, ends, room)
    steps = BETWEEN * math.ceil(min(max(wanted, LEAST), MOST) / BETWEEN)  # the last look is at the end
    half = rng.standard_normal((steps, PATHS // 2, dim))
    normals = np.concatenate([half, -half], 1)
    count = normals.shape[1]
    x = np.repeat(starts[:, None, :], count, 1)
    low, high = starts.min(0), starts.max(0)
    below, above = np.zeros(dim), np.zeros(dim)
    dt = horizon / steps
    steady = not (sde.given["covariance"] is None or callable(sde.given["covariance"]))
    root = _root(as_numpy(sde.covariance(0.0, starts[:1]))) if steady else None
    stepper = _Stepper(sde, dt, room, root, ends, stiff=wanted > MOST)
    gone = np.zeros(x.shape[:2], dtype=bool)
    for n in range(steps):
        moved, away = stepper.step((n + 0.5) * dt, x, normals[n])
        if sde.kinds:
            moved = moved + _jumped(sde, (n + 0.5) * dt, moved, dt, rng)
        for event in (e for e in sde.events if n * dt < e.time <= (n + 1) * dt):
            inside = moved if within is None else np.minimum(np.maximum(moved, ends[0]), ends[1])
            moved = as_numpy(event.run(inside, sde.arrays, sde.device)[0])
        gone |= away | ~np.isfinite(moved).all(-1)
        x = np.where(gone[..., None], x, moved)  # a path that has exploded stays where it was seen last
        if within is not None:
            x = np.minimum(np.maximum(x, ends[0]), ends[1])
        if (n + 1) % BETWEEN:
            continue
        ordered = np.sort(x, axis=1)
        centre = _quantile(ordered, 0.5)
        low, high = np.minimum(low, centre.min(0)), np.maximum(high, centre.max(0))
        below = np.maximum(below, _spread(centre - _quantile(ordered, 1.0 - FAR), centre[:, None] - ordered))
        above = np.maximum(above, _spread(_quantile(ordered, FAR) - centre, ordered - centre[:, None]))
    return Reach(low, high, below, above, float(gone.mean()))


def _jumped(sde: Any, t: float, x: np.ndarray, dt: float, rng: np.random.Generator) -> np.ndarray:
    """What jumps add to positions in a step."""
    rates, moves = (as_numpy(part) for part in sde.jumps(t, x))
    counts = rng.poisson(np.minimum(rates * dt, MOST_JUMPS))
    return np.asarray(np.einsum("...j,...ji->...i", counts, moves))


def _room(sde: Any, starts: np.ndarray, horizon: float) -> np.ndarray:
    """Length per axis that the problem itself has: what drift and noise would do in the whole time, and the starts."""
    b, S = as_numpy(sde.drift(0.0, starts)), as_numpy(sde.covariance(0.0, starts))
    noise = np.sqrt(np.maximum(np.einsum("...ii->...i", S), 0.0) * horizon)
    with np.errstate(over="ignore", invalid="ignore"):
        length = np.nan_to_num((noise + np.abs(b) * horizon).max(0)) + np.ptp(starts, axis=0)
    size = np.abs(starts).max(0)
    return np.asarray(np.where(length > 0, length, np.where(size > 0, size, 1.0)))


def _readable(sde: Any, within: Any, starts: np.ndarray, horizon: float) -> tuple[np.ndarray, np.ndarray]:
    """Ends of the box, a little inside where coefficients may be infinite because the end is only left."""
    ends = np.array([within.lower, within.upper])
    for i, side in np.argwhere(~within.where("reached")):
        scale = float(ends[1, i] - ends[0, i])
        if not math.isfinite(scale):
            scale = float(np.abs(starts[:, i] - ends[side, i]).max())
        if scale == 0.0:
            scale = math.sqrt(horizon * float(np.abs(as_numpy(sde.covariance(0.0, starts))[:, i, i]).max()))
        ends[side, i] += (1.0 - 2.0 * side) * ASIDE * scale
    return ends[0], ends[1]


def _extremes(points: np.ndarray) -> np.ndarray:
    """At most a handful of the points: those extreme in a coordinate or a diagonal, and the median."""
    if len(points) <= 8:
        return points
    d = points.shape[1]
    directions = np.concatenate([np.eye(d), np.stack(np.meshgrid(*[[-1.0, 1.0]] * d), -1).reshape(-1, d)])
    scale = points.std(0) + 1e-300
    scores = (points / scale) @ directions.T
    chosen = (
        set(scores.argmax(0)) | set(scores.argmin(0)) | {int(np.abs(points - np.median(points, 0)).sum(1).argmin())}
    )
    return points[sorted(int(i) for i in chosen)]


def _rate(sde: Any, x: np.ndarray, horizon: float, ends: tuple[np.ndarray, np.ndarray], room: np.ndarray) -> float:
    """Rate at which the drift draws points together or apart: the largest row sum of |∂b| at some times."""
    d = x.shape[1]
    shift = _shift(x, room)
    moves = np.concatenate([np.diag(shift), -np.diag(shift)])
    beside = np.clip(x + moves[:, None], *ends).reshape(-1, d)
    rates = [0.0]
    for t in np.array([0.0, 0.5, 1.0 - 1e-9]) * horizon:
        forth, back = np.split(as_numpy(sde.drift(float(t), beside)).reshape(2 * d, -1, d), 2)
        rates.append(float((np.abs(forth - back) / (2.0 * shift[:, None, None])).sum(0).max()))
    return max(rate for rate in rates if math.isfinite(rate))


def _shift(x: np.ndarray, room: np.ndarray) -> np.ndarray:
    """Distance per axis over which slopes of the drift are taken: small beside the points and beside the room."""
    size = np.abs(x).max(axis=tuple(range(x.ndim - 1)))
    return np.asarray(1e-4 * np.where(size > 0, np.minimum(size, room), room))


@dataclass(frozen=True)
class _Stepper:
    """Steps of the ensemble; ``root`` of a constant Σ.

    With the drift at the middle of the step, since Euler's method would spiral out of a rotation. ``stiff``: steps are
    longer than the drift takes to draw points together; then the step is that of the linear equation with the slope
    that most paths see, and so is its noise, which does not grow with the step.
    """

    sde: Any
    dt: float
    room: np.ndarray
    root: np.ndarray | None
    ends: tuple[np.ndarray, np.ndarray]
    stiff: bool

    def step(self, t: float, x: np.ndarray, normals: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """New positions, and which paths explode."""
        dt, b, room = self.dt, self._drift(t, x), self.room
        rate = self._contraction(t, x) if self.stiff else np.zeros(x.shape[-1])
        slow = rate * dt < STIFF
        lasting = np.where(slow, dt, -np.expm1(-rate * dt) / np.where(slow, 1.0, rate))
        middle, moved, away = np.empty_like(x), np.empty_like(x), np.empty(x.shape[:2], dtype=bool)
        ensemble.half_way(x, b, room, dt, lasting, middle, away)
        b = np.where(slow, self._drift(t, middle), b)
        kept = np.where(slow, 1.0, np.sqrt(-np.expm1(-2.0 * rate * dt) / np.where(slow, 1.0, 2.0 * rate * dt)))
        ensemble.onwards(x, b, room, lasting, self._noise(t, x), normals, kept * math.sqrt(dt), moved)
        return moved, away

    def _drift(self, t: float, x: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(as_numpy(self.sde.drift(t, x)), dtype=float)

    def _noise(self, t: float, x: np.ndarray) -> np.ndarray:
        """Roots of Σ, one of each path or the same for all."""
        if self.sde.given["covariance"] is None:
            return np.zeros((1, 1, x.shape[-1], x.shape[-1]))
        root = _root(as_numpy(self.sde.covariance(t, x))) if self.root is None else self.root
        return np.ascontiguousarray(root, dtype=float).reshape(*[1] * (4 - root.ndim), *root.shape)

    def _contraction(self, t: float, x: np.ndarray) -> np.ndarray:
        """Rate per axis at which the drift draws most paths together."""
        shift, rates = _shift(x, self.room), []
        for i in range(x.shape[-1]):
            move = np.zeros(x.shape[-1])
            move[i] = shift[i]
            forth, back = (as_numpy(self.sde.drift(t, np.clip(x + s * move, *self.ends)))[..., i] for s in (1, -1))
            rates.append(float(np.nanmedian((back - forth) / (2.0 * shift[i]))))
        return np.maximum(rates, 0.0)


def _root(S: np.ndarray) -> np.ndarray:
    """Symmetric square root of positive semidefinite matrices."""
    if S.shape[-1] == 1:
        return np.asarray(np.sqrt(np.maximum(S, 0.0)))
    if S.shape[-1] == 2:  # by Cayley and Hamilton: many eigenvalue problems would take most of the time
        root = np.sqrt(np.maximum(S[..., 0, 0] * S[..., 1, 1] - S[..., 0, 1] * S[..., 1, 0], 0.0))
        trace = np.sqrt(np.maximum(S[..., 0, 0] + S[..., 1, 1] + 2.0 * root, TINY))
        return np.asarray((S + root[..., None, None] * np.eye(2)) / trace[..., None, None])
    one = S.reshape(-1, *S.shape[-2:])[:1]
    values, vectors = np.linalg.eigh(one if (one == S).all() else S)
    return np.asarray((vectors * np.sqrt(np.maximum(values, 0.0))[..., None, :]) @ np.swapaxes(vectors, -1, -2))


def _quantile(ordered: np.ndarray, part: float) -> np.ndarray:
    """Quantile of values in increasing order along axis 1, linear between them."""
    place = part * (ordered.shape[1] - 1)
    before = min(int(place), ordered.shape[1] - 2)
    return np.asarray(ordered[:, before] + (place - before) * (ordered[:, before + 1] - ordered[:, before]))


def _spread(far: np.ndarray, deviation: np.ndarray) -> np.ndarray:
    """One-sided standard deviation: the larger of the root mean square and half of the far quantile."""
    positive, half = np.maximum(deviation, 0.0), 0.5 * far
    rms = np.sqrt(2.0 * np.einsum("ij...,ij...->i...", positive, positive) / positive.shape[1])
    return np.asarray(np.maximum(np.minimum(rms, 2 * half + 1e-300), half).max(0))


def circulates(sde: Any, box: Any, horizon: float | None) -> bool:
    """Whether drift leaves a box through open faces and comes back in time, all noise left out.

    Parameters
    ----------
    sde : SDE
        The process.
    box : Box
        A finite box.
    horizon : float or None
        Time in which it has to be back.

    Examples
    --------
    >>> import kolmo
    >>> box = kolmo.Box([-1.0, -1.0], [1.0, 1.0])
    >>> turns = kolmo.SDE(lambda t, x: 6.0 * x @ np.array([[0.0, 1.0], [-1.0, 0.0]]), 0.1, dim=2)
    >>> grows = kolmo.SDE(lambda t, x: x, 0.1, dim=2)
    >>> circulates(turns, box, 1.0), circulates(grows, box, 1.0)
    (True, False)
    """
    d = len(box.lower)
    low, high = np.array(box.lower), np.array(box.upper)
    opened = box.where("cut")
    if horizon is None or d == 1 or not opened.any():
        return False
    unit = np.stack(np.meshgrid(*[np.linspace(0.0, 1.0, STARTS)] * d, indexing="ij"), -1).reshape(-1, d)
    on_open = ((unit == 0.0) & opened[:, 0]) | ((unit == 1.0) & opened[:, 1])
    unit = unit[on_open.any(1)]
    x = low + (high - low) * unit
    # as far out as the box is long, coefficients may be looked at, beyond other faces never
    least, most = np.where(opened[:, 0], 2 * low - high, low), np.where(opened[:, 1], 2 * high - low, high)
    margin, h, left = 1e-6 * (high - low), horizon / FOLLOWED, np.zeros(len(x), dtype=bool)

    def slope(t: float, y: np.ndarray) -> np.ndarray:
        return np.asarray(np.nan_to_num(as_numpy(sde.drift(t, np.clip(y, least, most))), posinf=0.0, neginf=0.0))

    b = slope(0.0, x)
    outward = ((unit == 0.0) & opened[:, 0] & (b < 0.0)) | ((unit == 1.0) & opened[:, 1] & (b > 0.0))
    if not outward.any() and not depends_on_time(sde.given["drift"], sde.drift, x):
        return False
    for n in range(FOLLOWED):
        t = n * h
        k1 = slope(t, x)
        k2 = slope(t + 0.5 * h, x + 0.5 * h * k1)
        k3 = slope(t + 0.5 * h, x + 0.5 * h * k2)
        k4 = slope(t + h, x + h * k3)
        x = np.clip(x + h / 6.0 * (k1 + 2.0 * (k2 + k3) + k4), least, most)
        outside = ((x < low - margin) | (x > high + margin)).any(1)
        if (left & ~outside).any():
            return True
        left |= outside
    return False
