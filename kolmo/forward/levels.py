"""Levels of the search for a law, and what is compared of them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from kolmo.forward.density import Density
from kolmo.forward.exits import Exit
from kolmo.refine.estimate import ALIGNED, Convergence, Verdict

# Error of rounding, relative to the largest value.
ROUNDING = 1e-13
TINY = 1e-300


@dataclass
class LawLevel:
    """One march on the way to the tolerance.

    Attributes
    ----------
    density : Density
        What it found.
    n : float
        Resolution.
    steps : int
        First steps of the clock.
    seconds : float
        Time it took.
    """

    density: Density
    n: float
    steps: int
    seconds: float


@dataclass(frozen=True)
class Quantity:
    """One of the things asked for, on all levels.

    Attributes
    ----------
    name : str or Exit
        "density", "value", or a way out.
    values : list of ndarray
        One per level, of one shape.
    weights : ndarray or None
        None: the error is the largest modulus; else it is the weighted sum over the last axis, at worst.
    least : float
        Size below which the quantity does not count by itself.
    """

    name: Exit
    values: list[np.ndarray]
    weights: np.ndarray | None
    least: float

    def size(self, v: np.ndarray) -> float:
        """Size of a difference or a value."""
        if self.weights is not None:
            return float((np.abs(v) @ self.weights).max())
        return float(np.abs(v).max(initial=0.0))

    @property
    def changes(self) -> list[float]:
        """Differences of consecutive levels."""
        return [self.size(b - a) for a, b in zip(self.values, self.values[1:], strict=False)]

    @property
    def scale(self) -> float:
        """What a relative tolerance refers to."""
        return max(self.size(self.values[-1]), self.least)

    @property
    def negative(self) -> float:
        """By how much it is below zero at worst, where it cannot be: a bound of the error from below."""
        return 0.0 if self.name == "value" else self.size(np.minimum(self.values[-1], 0.0))


def judged(quantity: Quantity, resolutions: Sequence[float], order: float) -> Verdict:
    """What the levels say of a quantity, by its size and whether its differences point the same way.

    Examples
    --------
    >>> n = [40.0, 60.0, 90.0]
    >>> law = Quantity("density", [np.array([[1.0 + 5.0 / k**2, 2.0]]) for k in n], np.ones(2), 0.0)
    >>> verdict = judged(law, n, 2.0)
    >>> verdict.confirmed, float(verdict.estimate[0] / (5.0 / 90**2)).__round__(1)
    (True, 1.4)
    """
    if quantity.weights is None:
        values = [v.reshape(-1, 1) for v in quantity.values]
    else:  # of a law as a whole the differences' sizes, with the sign of their direction
        steps = [(b - a) * quantity.weights for a, b in pairwise(quantity.values)]
        sizes, sign, total = quantity.changes, 1.0, 0.0
        values = [np.zeros((1, 1))]
        for k, size in enumerate(sizes):
            if k > 0:
                sign = sign if _cosine(steps[k - 1], steps[k]) >= ALIGNED else -sign
            total += sign * size
            values.append(np.array([[total]]))
    rounding = ROUNDING * quantity.size(quantity.values[-1])
    return Convergence(order).judge(resolutions, values, rounding=rounding)


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float((a * b).sum()) / max(math.sqrt(float((a * a).sum() * (b * b).sum())), TINY)
