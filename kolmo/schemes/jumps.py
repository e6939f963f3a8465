"""Jumps on a grid: Σ_j λ_j (u(x + J_j) − u(x)) as one sparse operator beside the stencil of a scheme."""

from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.sparse as sp

from kolmo import memory
from kolmo.arrays import Array, as_like, as_numpy, is_tensor, namespace
from kolmo.grid import Axis, Grid
from kolmo.problem.box import Box
from kolmo.problem.sde import SDE
from kolmo.schemes.monotone import JumpStencil

# Bytes for a node from which a jump is interpolated: indices, weights, and the matrix made of them.
PER_ENTRY = 64


class WithJumps:
    """The operator of a scheme plus one of jumps; numbers are those of the scheme, flat, and then those of the jumps.

    Parameters
    ----------
    local : Stencil
        The scheme's.
    shape : tuple of int
        Shape of its numbers.
    jumps : JumpStencil
        Where jumps start and, with interpolation, end.
    """

    def __init__(self, local: Any, shape: tuple[int, ...], jumps: JumpStencil) -> None:
        self.local, self.shape, self.jumps = local, tuple(shape), jumps
        self.count = int(np.prod(self.shape))
        self._made: tuple[Any, sp.csr_matrix] | None = None

    def parts(self, a: Array) -> tuple[Array, Array]:
        """Numbers of the scheme and of the jumps."""
        return a[: self.count].reshape(self.shape), a[self.count :]

    def _jump_matrix(self, a: np.ndarray) -> sp.csr_matrix:
        """The jumps' matrix, kept for the numbers that came last: it serves in every step."""
        if self._made is None or self._made[0] is not a:
            self._made = a, self.jumps.matrix(a[self.count :])
        return self._made[1]

    def apply(self, a: Array, u: Array) -> Array:
        """Q(a) u."""
        numbers, weights = self.parts(a)
        far = self.jumps.apply(weights, u) if is_tensor(u) else self._jump_matrix(a) @ u
        return self.local.apply(numbers, u) + far

    def apply_transposed(self, a: Array, p: Array) -> Array:
        """Q(a)ᵀ p."""
        numbers, weights = self.parts(a)
        far = self.jumps.apply_transposed(weights, p) if is_tensor(p) else self._jump_matrix(a).T @ p
        return self.local.apply_transposed(numbers, p) + far

    def pullback(self, p: Array, u: Array) -> Array:
        """Derivative of ⟨p, Q(a) u⟩ with respect to a."""
        near = self.local.pullback(p, u).reshape(-1)
        return namespace(near).concatenate([near, self.jumps.pullback(p, u)])

    def matrix(self, a: np.ndarray) -> sp.csr_matrix:
        """Q(a) as a sparse matrix."""
        return sp.csr_matrix(self.local.matrix(self.parts(a)[0]) + self._jump_matrix(a))

    def split(self, a: Array) -> tuple[list[Any], list[Array], Callable[[int, Array], Array]]:
        """Split by direction as ``TensorStencil.split``: jumps go with the terms that couple axes, which are explicit.

        Source: K. J. in 't Hout and J. Toivanen (2018), ADI schemes for valuing European options under the Bates model.
        """
        numbers, weights = self.parts(a)
        stencils, values, spread = self.local.split(numbers)
        first = WithJumps(stencils[0], tuple(values[0].shape), self.jumps)

        def back(part: int, derivative: Array) -> Array:
            near, far = first.parts(derivative) if part == 0 else (derivative, 0.0 * weights)
            return namespace(derivative).concatenate([spread(part, near).reshape(-1), far])

        return [first, *stencils[1:]], [joined(values[0], weights), *values[1:]], back


def joined(numbers: Array, weights: Array) -> Array:
    """Numbers of a scheme and of jumps in one flat array."""
    return namespace(numbers).concatenate([numbers.reshape(-1), weights])


def landing(box: Box, x: Array) -> Array:
    """Where jumps that aim at x end: beyond faces that are no cut, on them; periods are wrapped around."""
    low, high = np.array(box.lower), np.array(box.upper)
    closed = box.where("closed")
    xp = namespace(x)
    ends = (as_like(np.where(closed[:, s], end, sign * np.inf), x) for s, end, sign in ((0, low, -1), (1, high, 1)))
    least, most = ends
    inside = xp.minimum(xp.maximum(x, least), most)
    wrapped = np.array(box.periodic)
    if not wrapped.any():
        return inside
    position = as_numpy(inside)
    length = np.where(wrapped, high - low, 1.0)
    turns = np.where(wrapped, np.floor((position - np.where(wrapped, low, 0.0)) / length), 0.0)
    return inside - as_like(turns * length, x)


def with_jumps(
    stencil: Any, numbers: Array, sde: SDE, grid: Grid, box: Box, at: tuple[float, Array], start: "Start"
) -> tuple[WithJumps, Array]:
    """The stencil and numbers of a scheme, completed by the jumps of a process.

    Parameters
    ----------
    stencil, numbers : Stencil, array
        The scheme's.
    sde, grid, box : SDE, Grid, Box
        The process; the nodes; their faces.
    at : (float, array of shape (size, d))
        The time, and where the coefficients of the nodes are read.
    start : Start
        The nodes that jumps start from, and how they are interpolated.
    """
    t, places = at
    rates, moves = sde.jumps(t, places)
    kinds, corners = len(sde.kinds), min(start.width, max(grid.shape)) ** grid.dim
    entries = grid.size * kinds * corners
    what, fix = f"{kinds} kinds of jumps on {grid.size} nodes", "fewer kinds of jumps, or a coarser grid"
    memory.afford("jumps", what, PER_ENTRY * entries, fix)
    if start.fixed is not None:
        rates = rates * as_like((~start.fixed).astype(float)[:, None], rates)
    aims = start.nodes[:, None, :] + moves
    index, weight = interpolation(grid, box, landing(box, aims.reshape(-1, grid.dim)), start.width, start.linear)
    weight = (weight.reshape(grid.size, kinds, -1) * rates[..., None]).reshape(-1)
    rows = np.repeat(np.arange(grid.size), kinds * index.shape[1])
    jumps = JumpStencil(grid.size, rows, index.reshape(-1))
    weights = namespace(weight).concatenate([weight, as_like(np.zeros(grid.size), weight)])
    return WithJumps(stencil, tuple(numbers.shape), jumps), joined(numbers, weights)


class Start:
    """Where jumps start, and how the ends are interpolated.

    Parameters
    ----------
    nodes : array, shape (size, d)
        The nodes.
    fixed : ndarray of bool or None
        Nodes where the process has ended.
    width : int
        Nodes per axis of the interpolation.
    linear : bool
        Go on linearly beyond open faces; else with the value there (monotone schemes).
    """

    def __init__(self, nodes: Array, fixed: np.ndarray | None, width: int, linear: bool) -> None:
        self.nodes, self.fixed, self.width, self.linear = nodes, fixed, width, linear


def interpolation(grid: Grid, box: Box, x: Array, width: int, linear: bool) -> tuple[np.ndarray, Array]:
    """As ``Grid.interpolation``, at points beyond open faces too: along each axis the field goes on there."""
    index, weight = np.zeros((len(x), 1), dtype=int), as_like(np.ones((len(x), 1)), x)
    for i, axis in enumerate(grid.axes):
        nodes, w = _along(axis, x[:, i], width, linear)
        index = (index[:, :, None] * axis.n + nodes[:, None, :]).reshape(len(x), -1)
        weight = (weight[:, :, None] * w[:, None, :]).reshape(len(x), -1)
    return index, weight


def _along(axis: Axis, x: Array, width: int, linear: bool) -> tuple[np.ndarray, Array]:
    """Nodes and weights along an axis."""
    if axis.periodic:
        return axis.weights(x, width)
    low, high = axis.grading.lower, axis.grading.upper
    inside = namespace(x).clip(x, low, high)
    nodes, weights = axis.weights(inside, width)
    beyond, position = x - inside, as_numpy(x)
    for out, pair in ((position < low, (0, 1)), (position > high, (axis.n - 2, axis.n - 1))):
        if linear and out.any():
            step = axis.nodes[pair[1]] - axis.nodes[pair[0]]
            slope = ((nodes == pair[1]).astype(float) - (nodes == pair[0])) / step * out[:, None]
            weights = weights + as_like(slope, x) * beyond[:, None]
    return nodes, weights
