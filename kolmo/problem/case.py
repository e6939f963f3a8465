"""A question whose answer is known."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from kolmo.arrays import as_points


@dataclass(frozen=True)
class Case:
    """A problem, its exact answer, and where it comes from.

    Attributes
    ----------
    name : str
        Name of the function that made it.
    problem : KolmogorovProblem or ControlProblem
        The question.
    points : ndarray, shape (P, d)
        A few points of interest.
    source : str
        Author and year.
    solution : callable
        ``solution(t, x)`` for an array x of shape ``(..., d)``; :meth:`exact` is the comfortable form.
    """

    name: str
    problem: Any
    points: np.ndarray
    source: str
    solution: Callable[[float, np.ndarray], np.ndarray]

    def exact(self, t: float, x: Any) -> np.ndarray:
        """Answer at (t, x), points ``(..., d)`` (in one dimension ``(...)``): shape ``(...)`` or ``(..., k)``."""
        return np.asarray(self.solution(t, np.asarray(as_points(x, self.problem.dim))))

    @property
    def values(self) -> np.ndarray:
        """Exact answer at the case's points at t = 0."""
        return self.exact(0.0, self.points)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name}, {self.problem!r}, {self.source})"


def line(*points: float) -> np.ndarray:
    """Points of one dimension, shape (P, 1)."""
    return np.array(points)[:, None]
