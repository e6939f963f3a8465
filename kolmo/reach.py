"""Where the process goes: an ensemble of simulated paths, summarised by its hull and spread."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import ndtri

from kolmo.arrays import as_numpy, as_points

PATHS = 128
STEPS = 64
# Steps from one look at the paths to the next: order statistics cost more than the step.
BETWEEN = 4


@dataclass(frozen=True)
class Reach:
    """Envelope of an ensemble of paths: per axis, how far the paths went and how spread they were.

    Attributes
    ----------
    low, high : ndarray, shape (d,)
        Hull of the noise-free-like centre of the paths over time.
    spread_low, spread_high : ndarray, shape (d,)
        One standard deviation below and above, at the time where it matters most.
    """

    low: np.ndarray
    high: np.ndarray
    spread_low: np.ndarray
    spread_high: np.ndarray

    def interval(self, tail: float) -> tuple[np.ndarray, np.ndarray]:
        """Ends of the interval left with about the given probability."""
        z = -float(ndtri(0.5 * tail))
        width = np.maximum(self.high - self.low, 1e-3 * np.maximum(1.0, np.abs(self.high)))
        # without noise a cut still needs distance: closures there see data from outside
        pad = 0.15 * width
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
    half = rng.standard_normal((STEPS, max(PATHS // 2, 1), dim))
    normals = np.concatenate([half, -half], 1)
    count = normals.shape[1]
    x = np.repeat(starts[:, None, :], count, 1)
    low, high = starts.min(0), starts.max(0)
    below, above = np.zeros(dim), np.zeros(dim)
    dt = horizon / STEPS
    lower, upper = (np.full(dim, -np.inf), np.full(dim, np.inf)) if within is None else (within.lower, within.upper)
    for n in range(STEPS):
        t = (n + 0.5) * dt
        x = _step(sde, t, x, dt, normals[n])
        x = np.clip(np.nan_to_num(x, nan=0.0, posinf=1e12, neginf=-1e12), lower, upper)
        if (n + 1) % BETWEEN:
            continue
        centre = np.median(x, axis=1)
        low, high = np.minimum(low, centre.min(0)), np.maximum(high, centre.max(0))
        below = np.maximum(below, _spread(centre[:, None] - x))
        above = np.maximum(above, _spread(x - centre[:, None]))
    return Reach(low, high, below, above)


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


def _step(sde: Any, t: float, x: np.ndarray, dt: float, normals: np.ndarray) -> np.ndarray:
    """One step with the drift at its middle: Euler's would spiral out of a rotation."""
    middle = x + 0.5 * dt * _tamed(as_numpy(sde.drift(t, x)), x, dt)
    b = _tamed(as_numpy(sde.drift(t, middle)), x, dt)
    noise = 0.0
    if not sde.noiseless:
        S = as_numpy(sde.covariance(t, x))
        noise = np.einsum("...ij,...j->...i", _root(S), np.broadcast_to(normals, x.shape))
    return np.asarray(x + b * dt + math.sqrt(dt) * noise)


def _tamed(b: np.ndarray, x: np.ndarray, dt: float) -> np.ndarray:
    """Superlinear drifts, bounded so that they do not explode."""
    size = np.abs(b).max(-1, keepdims=True) * dt
    return np.asarray(b / (1.0 + size / (1.0 + np.abs(x).max(-1, keepdims=True))))


def _root(S: np.ndarray) -> np.ndarray:
    """Symmetric square root of positive semidefinite matrices."""
    if S.shape[-1] == 1:
        return np.asarray(np.sqrt(np.maximum(S, 0.0)))
    one = S.reshape(-1, *S.shape[-2:])[:1]
    values, vectors = np.linalg.eigh(one if (one == S).all() else S)
    return np.asarray((vectors * np.sqrt(np.maximum(values, 0.0))[..., None, :]) @ np.swapaxes(vectors, -1, -2))


def _spread(deviation: np.ndarray) -> np.ndarray:
    """One-sided standard deviation: the larger of the root mean square and the 97.7 % quantile over two."""
    positive = np.maximum(deviation, 0.0)
    rms = np.sqrt(2.0 * np.mean(positive**2, axis=1))
    quantile = np.quantile(positive, 0.977, axis=1) / 2.0
    return np.asarray(np.maximum(np.minimum(rms, 2 * quantile + 1e-300), quantile).max(0))
