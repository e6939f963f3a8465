"""What the systems on FiPy's meshes share: steps in time, and how data at faces are read."""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np

from kolmo.arrays import as_numpy
from kolmo.problem import KolmogorovProblem
from kolmo.problem.sde import evaluate

# Steps taken first as pairs of implicit Euler steps, so that rough terminal data are damped.
DAMPED = 2


def midpoint(euler: Callable[[np.ndarray, float, float], np.ndarray], u: np.ndarray, nodes: np.ndarray) -> np.ndarray:
    """Values at the first of the times from those at the last: implicit midpoint rule, damped first steps.

    ``euler(u, t, dt)`` is an implicit Euler step with the coefficients of time t.
    """
    for n, (start, end) in enumerate(reversed(list(itertools.pairwise(nodes)))):
        half = 0.5 * (end - start)
        if n < DAMPED:
            u = euler(euler(u, end - 0.5 * half, half), start + 0.5 * half, half)
        else:
            # half an implicit Euler step, then as far again in a straight line
            u = 2.0 * euler(u, 0.5 * (start + end), half) - u
    return u


def read(problem: KolmogorovProblem, value: Any, name: str, t: float, x: np.ndarray) -> np.ndarray:
    """Data of a face, a number or a function, at points x of it: shape (points, k)."""
    found = as_numpy(evaluate(value, t, x, name, problem.arrays))
    found = found if found.ndim == 2 else np.reshape(found, (-1, 1))
    return np.array(np.broadcast_to(found, (len(x), found.shape[1])), dtype=float)
