"""Points beside those that matter: two levels may agree at a few points by accident, hardly at all of these."""

import numpy as np

from kolmo.grid import Grid

# Points at most that get witnesses, and how far beside them these lie, as a part of the nodes of an axis.
MOST, SHIFT = 8, 0.02


def witnesses(grid: Grid, points: np.ndarray) -> np.ndarray:
    """Points to either side of some of the given ones, along every axis of a grid.

    Parameters
    ----------
    grid : Grid
        Its maps say how far is far, and it holds the result.
    points : ndarray, shape (n, d)
        Points that matter.

    Returns
    -------
    ndarray, shape (2 d min(n, 8 or so), d)
    """
    some = points[_witnessed(len(points))]
    xi = np.stack([axis.grading.inverse(some[:, i]) for i, axis in enumerate(grid.axes)], -1)
    shifts = SHIFT * np.concatenate([np.eye(grid.dim), -np.eye(grid.dim)])
    xi = np.clip((xi[:, None] + shifts).reshape(-1, grid.dim), 0.0, 1.0)
    return np.stack([axis.grading(xi[:, i]) for i, axis in enumerate(grid.axes)], -1)


def groups(points: int, dim: int) -> np.ndarray:
    """Rows of the points followed by their witnesses that belong together, shape (g, 1 + 2 d): a point and its own."""
    some = _witnessed(points)
    beside = points + np.arange(2 * dim * len(some)).reshape(len(some), 2 * dim)
    return np.column_stack([some, beside])


def _witnessed(points: int) -> np.ndarray:
    """Which of a number of points get witnesses."""
    return np.arange(0, points, max(1, points // MOST))
