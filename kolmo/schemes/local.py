"""Coefficients of the equation at the nodes, in index units: the grid's spacing and map are divided out."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from kolmo.arrays import Array, Spread, as_like, namespace
from kolmo.grid import Grid
from kolmo.problem import KolmogorovProblem, check_covariance, check_finite


@dataclass(frozen=True)
class Local:
    r"""Coefficients at the nodes: :math:`A\cdot\partial_i u + \tfrac12 S:\partial_i\partial_j u - cu + g`.

    Attributes
    ----------
    A : array, shape (size, d)
        Drift in nodes per unit of time: :math:`b_i/(x_i'h_i) - \tfrac12\Sigma_{ii}x_i''/(x_i'^3h_i)`.
    S : array, shape (size, d, d)
        Covariance rate in nodes² per unit of time: :math:`\Sigma_{ij}/(x_i'h_ix_j'h_j)`.
    c : array, shape (size,)
        Killing rate.
    g : array, shape (size, k)
        Source.
    """

    A: Array
    S: Array
    c: Array
    g: Array


class Metric:
    """The grid's map at its nodes, shape (size, d) each: nodes per unit length, and the bend that drifts.

    Parameters
    ----------
    grid : Grid
        The grid.
    """

    def __init__(self, grid: Grid) -> None:
        slopes = [np.asarray(axis.grading.slope(axis.xi)) for axis in grid.axes]
        bends = [np.asarray(axis.grading.bend(axis.xi)) for axis in grid.axes]
        spacings = [axis.h for axis in grid.axes]
        self._density = Spread([1.0 / (s * h) for s, h in zip(slopes, spacings, strict=True)])
        self._bend = Spread([b / (s**3 * h) for b, s, h in zip(bends, slopes, spacings, strict=True)])

    @property
    def density(self) -> np.ndarray:
        """Nodes per unit length."""
        return np.asarray(self._density.like(np.empty(0)))

    @property
    def bend(self) -> np.ndarray:
        """What the map's second derivative adds to the drift, for each unit of noise."""
        return np.asarray(self._bend.like(np.empty(0)))

    def like(self, like: Array) -> tuple[Array, Array]:
        """Density and bend in the library (and on the device) of ``like``."""
        return self._density.like(like), self._bend.like(like)


Limits = Callable[[float, Array, Array, Array, Array], tuple[Array, Array, Array, Array]]


def local_coefficients(
    problem: KolmogorovProblem, metric: Metric, t: float, x: Array, k: int, limits: Limits | None = None
) -> Local:
    """Evaluate and check the coefficients at the nodes x at time t (x a tensor: with gradients).

    ``limits(t, drift, covariance, killing, source)`` puts in what holds at nodes where they cannot be read.
    """
    sde, box = problem.sde, problem.box
    b = check_finite(sde.drift(t, x), x, t, "drift", box)
    density, bend = metric.like(x)
    S = check_covariance(sde.covariance(t, x), x, t, box)
    c = check_finite(problem.rate(t, x), x, t, "killing", box)
    g = check_finite(problem.running(t, x), x, t, "source", box)
    if limits is not None:
        b, S, c, g = limits(t, b, S, c, g)
    A = b * density - 0.5 * namespace(S).einsum("...ii->...i", S) * bend
    S = S * density[:, :, None] * density[:, None, :]
    g = g[:, None] if g.ndim == 1 else g
    return Local(A, S, c, _columns(g, k))


def _columns(g: Array, k: int) -> Array:
    """Broadcast to k columns."""
    if g.shape[1] == k:
        return g
    return g + as_like(np.zeros((1, k)), g)


def wall_nodes(grid: Grid, axis: int, side: int) -> np.ndarray:
    """Indices of the nodes on a face, in C order of the remaining axes."""
    index = np.arange(grid.size).reshape(grid.shape)
    return np.asarray(np.take(index, 0 if side == 0 else -1, axis=axis)).reshape(-1)


def wall_of(grid: Grid, axis: int, side: int) -> np.ndarray:
    """For every node, the node of the face that lies on its line along the axis, shape (size,)."""
    index = np.arange(grid.size).reshape(grid.shape)
    end = index.take([0 if side == 0 else grid.shape[axis] - 1], axis=axis)
    return np.asarray(np.broadcast_to(end, grid.shape)).reshape(-1)


def on_face(grid: Grid, axis: int, side: int) -> Any:
    """Mask of the nodes on a face, shape (size,)."""
    mask = np.zeros(grid.shape, dtype=bool)
    mask[(slice(None),) * axis + (0 if side == 0 else -1,)] = True
    return mask.reshape(-1)
