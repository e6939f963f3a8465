"""What faces do to a step of a path, taken for a Brownian bridge: touches, pushes, and the weak order that is left."""

from dataclasses import dataclass

import numpy as np
from scipy.special import log_ndtr, ndtr

# A path is dropped when its weight has fallen below this, and an exit less likely is not looked at.
NEGLIGIBLE = 1e-14
# Weak order that jumps allow.
JUMP_ORDER = 1.0
# Of targets: their boundaries are taken for planes within a step (Gobet 2001).
STOP_ORDER = 1.0


def conormal(S: np.ndarray, axis: int) -> np.ndarray:
    """Σn over n·Σn for the face normal to an axis, shape (N, d); n where no noise crosses the face."""
    normal = S[:, axis, axis, None]
    direction = np.divide(S[:, :, axis], normal, out=np.zeros(S.shape[:2]), where=normal > 0.0)
    direction[:, axis] = 1.0
    return np.asarray(direction)


@dataclass(frozen=True)
class Touch:
    """Law of the first touch of a wall by Brownian bridges that start and stop at given distances from it.

    The bridge touches with probability exp(−2·start·stop/variance) (surely if it stops beyond); the instant, as a
    fraction f of the step, then has f/(1 − f) inverse Gaussian with mean start over the modulus of stop and shape
    start²/variance.

    Attributes
    ----------
    start, stop, variance : ndarray, shape (N,)
        Distance at the start (≥ 0), its modulus at the end, variance of the free path.
    chance, growth : ndarray, shape (N,)
        Probability of a touch, and exp(2·start·abs(stop)/variance) times it (as a logarithm).
    """

    start: np.ndarray
    stop: np.ndarray
    variance: np.ndarray
    chance: np.ndarray
    growth: np.ndarray

    @classmethod
    def of(cls, start: np.ndarray, stop: np.ndarray, variance: np.ndarray) -> "Touch":
        """Law from signed distances; without variance the path is a straight line, which may start on the wall."""
        sure = (stop < 0.0) | ((variance > 0.0) & ((start == 0.0) | (stop == 0.0)))
        variance = np.maximum(variance, 1e-300)
        exponent = 2.0 * start * stop / variance
        exponent = np.where(sure | (exponent > 0.0), exponent, np.inf)
        chance = np.where(sure, 1.0, np.exp(-np.maximum(exponent, 0.0)))
        return cls(start, np.abs(stop), variance, chance, np.where(stop <= 0.0, -exponent, 0.0))

    def instant(self, which: np.ndarray, normal: np.ndarray, uniform: np.ndarray) -> np.ndarray:
        """Draw the fraction of the step at which a bridge that touches does so (Michael, Schucany and Haas 1976)."""
        start, stop = self.start[which], self.stop[which]
        scaled = 0.5 * normal**2 * self.variance[which] / np.maximum(start * stop, 1e-300)
        lesser = 1.0 / (1.0 + scaled + np.sqrt(scaled * (2.0 + scaled)))  # root of the quadratic, over the mean
        near = uniform * (1.0 + lesser) <= 1.0  # odds start/stop·lesser, else start/(stop·lesser)
        towards = np.where(near, start * lesser, start)
        left = np.where(near, stop, stop * lesser)
        return np.asarray(np.divide(towards, towards + left, out=np.zeros(len(which)), where=start > 0.0))

    def chance_before(self, which: np.ndarray, fraction: np.ndarray) -> np.ndarray:
        """Probability of a touch before a fraction of the step."""
        early = np.zeros(len(which))
        some = np.flatnonzero(self.chance[which] > NEGLIGIBLE)
        pick, f = which[some], fraction[some]
        odds = f / np.maximum(1.0 - f, 1e-300)
        scale = 1.0 / np.sqrt(np.maximum(odds * self.variance[pick], 1e-300))
        first = ndtr(scale * (odds * self.stop[pick] - self.start[pick]))
        second = log_ndtr(-scale * (odds * self.stop[pick] + self.start[pick]))
        early[some] = self.chance[pick] * first + np.exp(np.minimum(self.growth[pick] + second, 0.0))
        return np.asarray(np.minimum(early, self.chance[which]))
