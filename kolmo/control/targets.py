r"""Targets inside the box: sets given by a level function, where the process stops and a value is paid.

Nodes inside a target are no unknowns. Those within reach of a stencil get the value of a cubic polynomial that passes
by the unknown nodes outside and by the target's value on its boundary (weighted least squares), so that differences
next to a curved boundary keep their order: an error of order h⁴ of such a value is one of order h⁴ of the solution.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from scipy.ndimage import binary_dilation
from scipy.spatial import cKDTree

from kolmo.arrays import is_tensor
from kolmo.errors import InputError
from kolmo.grid import Grid

# Degree of the polynomials, and reach of the stencils in nodes.
DEGREE, REACH = 3, 3
# Unknown nodes within so many spacings of a boundary point carry its polynomial, by dimension, with weights of a width.
RADIUS, WIDTH = {1: 5.2, 2: 3.6, 3: 3.2}, 2.0
# Weight of points on the boundary, where the value is known, and how many of them.
HELD, NEAR = 8.0, {1: 1, 2: 4, 3: 6}
# Newton steps towards the boundary along the gradient of the level function, and its difference step in spacings.
PROJECTIONS, DIFFERENCE = 12, 1e-4


@dataclass(frozen=True)
class Target:
    r"""A set :math:`\{x : \ell(x) \le 0\}` at which the process stops, and what is paid there.

    Attributes
    ----------
    level : callable
        ``level(x)`` -> ``(...)`` for torch tensors x of shape ``(..., d)``: not positive inside, positive outside, with
        a slope on the boundary, as a signed distance has.
    value : float or callable
        What is paid on arrival: a number, or ``value(t, x)`` -> ``(...)``.

    Raises
    ------
    InputError
        For a level that is no function.

    Examples
    --------
    >>> import torch
    >>> disc = Target(lambda x: (x - torch.tensor([1.0, 0.0])).norm(dim=-1) - 0.5, value=1.0)
    >>> disc.inside(torch.tensor([[1.2, 0.0], [2.0, 0.0]])).tolist()
    [True, False]
    """

    level: Callable[[Any], Any]
    value: float | Callable[[float, Any], Any] = 0.0

    def __post_init__(self) -> None:
        if not callable(self.level):
            raise InputError("level", repr(self.level), "a function level(x), not positive inside the target")

    def levels(self, x: Any) -> np.ndarray:
        """The level function at points (..., d), shape (...).

        Raises
        ------
        InputError
            Where the level function gives a result of another shape.
        """
        points = torch.as_tensor(np.asarray(x, dtype=float)) if not is_tensor(x) else x.detach().double()
        with torch.no_grad():
            level = torch.as_tensor(self.level(points), dtype=torch.float64)
        if tuple(level.shape) == tuple(points.shape) and points.shape[-1] == 1:
            level = level[..., 0]
        if tuple(level.shape) != tuple(points.shape[:-1]):
            raise InputError("level", f"a result of shape {tuple(level.shape)}", f"{tuple(points.shape[:-1])}")
        return np.asarray(level.numpy())

    def slopes(self, x: np.ndarray) -> np.ndarray:
        """Gradient of the level function at points (n, d), shape (n, d)."""
        points = torch.as_tensor(x, dtype=torch.float64).clone().requires_grad_()
        with torch.enable_grad():
            level = torch.as_tensor(self.level(points)).sum()
            known = torch.autograd.grad(level, points, allow_unused=True)[0] if level.requires_grad else None
        return np.zeros_like(x) if known is None else np.asarray(known.numpy())

    def inside(self, x: Any) -> np.ndarray:
        """Whether points (..., d) lie in the target.

        Raises
        ------
        InputError
            Where the level function gives a result of another shape.
        """
        return np.asarray(self.levels(x) <= 0.0)

    def paid(self, t: float, x: np.ndarray) -> np.ndarray:
        """The value at points (n, d), shape (n,)."""
        if not callable(self.value):
            return np.full(len(x), float(self.value))
        with torch.no_grad():
            value = torch.as_tensor(self.value(t, torch.as_tensor(x)), dtype=torch.float64)
        return np.broadcast_to(np.asarray(value.numpy()), (len(x),)).copy()

    def boundary(self, x: np.ndarray, spacing: np.ndarray) -> np.ndarray:
        """Points of the boundary nearest to points (n, d), about: Newton's method along the gradient.

        Raises
        ------
        InputError
            Where the level function gives a result of another shape.
        """
        y = x.copy()
        for _ in range(PROJECTIONS):
            level, gradient = self.levels(y), np.zeros_like(y)
            for i in range(x.shape[1]):
                move = np.zeros(x.shape[1])
                move[i] = DIFFERENCE * spacing[i]
                gradient[:, i] = (self.levels(y + move) - self.levels(y - move)) / (2.0 * move[i])
            scaled = gradient * spacing
            step = (level / np.maximum((scaled**2).sum(-1), 1e-300))[:, None] * scaled
            # no further than a node at once: far from the boundary the level function may be anything
            y = y - spacing * step / np.maximum(1.0, np.abs(step).max(-1, initial=0.0))[:, None]
        return y


class TargetNodes:
    """The nodes of a grid that targets hold, and their values as linear functions of the unknown ones.

    Attributes
    ----------
    inside : ndarray of bool, shape (size,)
        Nodes in a target.
    filled : csr_matrix, shape (size, size)
        Rows of the nodes that stencils reach: the part that comes from unknown nodes.

    Parameters
    ----------
    targets : sequence of Target
        The targets; the first one holds where several overlap.
    grid : Grid
        The nodes.
    known : ndarray of bool, shape (size,)
        Other nodes whose values are prescribed.
    smooth : bool
        False: nodes inside have the value at the nearest point of the boundary, as monotone schemes need it.
    """

    def __init__(self, targets: Sequence[Target], grid: Grid, known: np.ndarray, smooth: bool) -> None:
        self.targets, n, d = tuple(targets), grid.size, grid.dim
        x = grid.points
        owner = np.full(n, -1)
        for k, target in enumerate(self.targets):
            owner[(owner < 0) & target.inside(x)] = k
        self.inside = owner >= 0
        if self.inside.all():
            raise InputError("targets", "every node lies in a target", "room between the targets")
        around = np.ones((2 * REACH + 1,) * d, dtype=bool)
        near = self.inside & binary_dilation(~self.inside.reshape(grid.shape), around).reshape(-1)
        lengths = np.meshgrid(*[axis.lengths for axis in grid.axes], indexing="ij")
        spacing = np.stack(lengths, -1).reshape(-1, d)
        self._parts: list[tuple[Target, np.ndarray, np.ndarray, sp.csr_matrix]] = []
        rows: list[sp.csr_matrix] = []
        unknown = np.flatnonzero(~self.inside & ~known)
        for k, target in enumerate(self.targets):
            nodes = np.flatnonzero(near & (owner == k))
            if not len(nodes):
                continue
            feet = target.boundary(x[nodes], np.median(spacing[nodes], axis=0))
            if smooth:
                free, held = _fitted(x, nodes, feet, unknown, spacing)
                rows.append(sp.csr_matrix((free.data, (nodes[free.row], free.col)), shape=(n, n)))
            else:
                held = sp.identity(len(nodes), format="csr")
            self._parts.append((target, nodes, feet, held))
            deep = np.flatnonzero((owner == k) & ~near)
            if len(deep):
                self._parts.append((target, deep, x[deep], sp.identity(len(deep), format="csr")))
        self.filled = sp.csr_matrix(sum(rows)) if rows else sp.csr_matrix((n, n))
        self.size = n

    def paid(self, t: float) -> np.ndarray:
        """The part of the values that comes from what is paid, shape (size, 1)."""
        values = np.zeros((self.size, 1))
        for target, nodes, feet, held in self._parts:
            values[nodes, 0] = held @ target.paid(t, feet)
        return values


def _fitted(
    x: np.ndarray, nodes: np.ndarray, feet: np.ndarray, unknown: np.ndarray, spacing: np.ndarray
) -> tuple[sp.coo_matrix, sp.csr_matrix]:
    """Values at nodes by polynomials through unknown nodes and boundary points: weights of both."""
    d = x.shape[1]
    unit = np.median(spacing[nodes], axis=0)
    tree, edge = cKDTree(x[unknown] / unit), cKDTree(feet / unit)
    neighbours = tree.query_ball_point(feet / unit, RADIUS[d])
    count = min(NEAR[d], len(feet))
    beside = np.asarray(edge.query(feet / unit, k=count)[1]).reshape(len(nodes), count)
    powers = _powers(d)
    rows, cols, data, held_rows, held_cols, held_data = [], [], [], [], [], []
    for i, (node, foot) in enumerate(zip(nodes, feet, strict=True)):
        points = unknown[np.asarray(neighbours[i], dtype=int)]
        away = (x[points] - foot) / unit
        walls = np.unique(np.concatenate([[i], beside[i]]))
        there = (feet[walls] - foot) / unit
        weights = np.concatenate([np.exp(-((away**2).sum(-1)) / (2.0 * WIDTH**2)), np.full(len(walls), HELD)])
        matrix = weights[:, None] * _monomials(np.concatenate([away, there]), powers)
        here = _monomials(((x[node] - foot) / unit)[None], powers)[0]
        part = weights * (here @ np.linalg.pinv(matrix, rcond=1e-9))
        rows += [i] * len(points)
        cols += points.tolist()
        data += part[: len(points)].tolist()
        held_rows += [i] * len(walls)
        held_cols += walls.tolist()
        held_data += part[len(points) :].tolist()
    free = sp.coo_matrix((data, (rows, cols)), shape=(len(nodes), len(x)))
    return free, sp.csr_matrix((held_data, (held_rows, held_cols)), shape=(len(nodes), len(nodes)))


def _powers(d: int) -> np.ndarray:
    """Exponents of the polynomials, shape (count, d)."""
    lattice = np.stack(np.meshgrid(*[np.arange(DEGREE + 1)] * d, indexing="ij"), -1).reshape(-1, d)
    return np.asarray(lattice[lattice.sum(-1) <= DEGREE])


def _monomials(y: np.ndarray, powers: np.ndarray) -> np.ndarray:
    return np.asarray(np.prod(y[:, None, :] ** powers[None], axis=-1))
