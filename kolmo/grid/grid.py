"""Grids: nodes, dual cells, and interpolation from the nodes with its transpose."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Any

import numpy as np

from kolmo.arrays import Array, Spread, as_like, as_numpy, as_points, namespace
from kolmo.errors import InputError
from kolmo.grid.grading import Grading, Uniform
from kolmo.problem.box import Box

# Part of a cell within which a point lies on the node above it: rounding shall not choose its stencil.
ON_NODE = 1e-9


@dataclass(frozen=True)
class Axis:
    """Nodes of one axis: uniform in ξ, both ends included (periodic: the right end is not repeated).

    Parameters
    ----------
    n : int
        Number of nodes.
    grading : Grading
        Map ξ → x.
    periodic : bool
        Whether the two ends are the same point.
    breaks : tuple of int
        Nodes at which coefficients jump or bend, increasing: neither differences nor interpolation reach across them.
    """

    n: int
    grading: Grading
    periodic: bool = False
    breaks: tuple[int, ...] = ()

    @property
    def h(self) -> float:
        """Spacing in ξ."""
        return 1.0 / (self.n if self.periodic else self.n - 1)

    @cached_property
    def xi(self) -> np.ndarray:
        """Nodes in ξ, shape (n,)."""
        return np.arange(self.n) * self.h

    @cached_property
    def nodes(self) -> np.ndarray:
        """Nodes in x, shape (n,)."""
        x = np.array(self.grading(self.xi), dtype=float)
        x[0] = self.grading.lower
        if not self.periodic:
            x[-1] = self.grading.upper
        return x

    @cached_property
    def lengths(self) -> np.ndarray:
        """Lengths of the dual cells, shape (n,): from midpoint to midpoint in ξ, half cells at the ends."""
        edges = np.asarray(self.grading(np.concatenate([self.xi - 0.5 * self.h, self.xi[-1:] + 0.5 * self.h])))
        if not self.periodic:
            edges[0], edges[-1] = self.grading.lower, self.grading.upper
        return np.diff(edges)

    @property
    def pieces(self) -> list[tuple[int, int]]:
        """First and last node of the pieces between breaks."""
        return list(pairwise([0, *self.breaks, self.n if self.periodic else self.n - 1]))

    def weights(self, x: Array, width: int, derivative: int = 0) -> tuple[np.ndarray, Array]:
        """Node indices ``(P, w)`` and weights ``(P, w)`` of local Lagrange interpolation (or its x-derivative)."""
        xp = namespace(x)
        w = min(width, self.n)
        s = self.grading.inverse(x) / self.h
        position = as_numpy(s)
        start = np.floor(position + ON_NODE).astype(int) - (w - 1) // 2
        if not self.periodic:
            start = np.clip(start, 0, self.n - w)
        for low, high in self.pieces if self.breaks else ():
            inside = (position >= low) & (position < high) & (high - low >= w - 1)
            start = np.where(inside, np.clip(start, low, high - w + 1), start)
        local = s - as_like(start + 0.5 * (w - 1), x)
        C = as_like(lagrange_coefficients(w), x)
        values = [_powers(local, w, m, xp) @ C for m in range(derivative + 1)]
        index = (start[:, None] + np.arange(w)) % self.n
        if derivative == 0:
            return index, values[0]
        xi = self.grading.inverse(x)
        slope = self.grading.slope(xi)[:, None] * self.h
        if derivative == 1:
            return index, values[1] / slope
        bend = self.grading.bend(xi)[:, None] * self.h**2
        return index, (values[2] - values[1] * bend / slope) / slope**2


@lru_cache(maxsize=32)
def lagrange_coefficients(w: int) -> np.ndarray:
    """Monomial coefficients ``C[j, k]`` of the Lagrange basis on w unit-spaced nodes centred at zero."""
    nodes = np.arange(w) - 0.5 * (w - 1)
    return np.linalg.inv(np.vander(nodes, increasing=True))


def _powers(s: Array, w: int, derivative: int, xp: Any) -> Array:
    """Monomials s^j (or their derivative), shape (P, w)."""
    powers = [xp.ones_like(s)]  # one from the other: a power of its own costs as much as all of them
    for _ in range(w - 1 - derivative):
        powers.append(powers[-1] * s)
    falling = [math.perm(j, derivative) for j in range(derivative, w)]
    columns = [xp.zeros_like(s)] * derivative + [f * p if f != 1 else p for f, p in zip(falling, powers, strict=True)]
    return xp.stack(columns, -1)


class Grid:
    r"""A tensor grid: one axis of nodes :math:`x_j = X(\xi_j)` per coordinate, with ξ evenly spaced in [0, 1].

    Its d axes make ``size`` nodes; ``points`` have shape (size, d), ``volumes`` shape (size,), the first axis slowest.

    Parameters
    ----------
    axes : sequence of Axis
        One per coordinate.

    Examples
    --------
    >>> grid = Grid.of(Box(0.0, 1.0, boundary="reflecting"), (5,))
    >>> grid.nodes[0].tolist()
    [0.0, 0.25, 0.5, 0.75, 1.0]
    >>> float(grid.volumes.sum())
    1.0
    """

    def __init__(self, axes: Sequence[Axis]) -> None:
        self.axes = tuple(axes)

    @classmethod
    def of(cls, box: Box, shape: int | Sequence[int], gradings: Sequence[Grading] | None = None) -> "Grid":
        """Grid over a finite box: n nodes per axis, uniform unless maps are given.

        Raises
        ------
        InputError
            If the box is infinite, or an axis has fewer than 3 nodes.
        """
        if not (np.isfinite(box.lower).all() and np.isfinite(box.upper).all()):
            raise InputError("box", box, "finite ends", "give a finite box, or use Box.covering(sde, points, horizon)")
        counts = (shape,) * box.dim if isinstance(shape, (int, np.integer)) else tuple(shape)
        if len(counts) != box.dim or any(int(n) < 3 for n in counts):
            raise InputError("grid", counts, f"{box.dim} numbers of nodes, each at least 3")
        maps = gradings or [Uniform(a, b) for a, b in zip(box.lower, box.upper, strict=True)]
        return cls([Axis(int(n), g, p) for n, g, p in zip(counts, maps, box.periodic, strict=True)])

    @property
    def dim(self) -> int:
        """Dimension d."""
        return len(self.axes)

    @property
    def shape(self) -> tuple[int, ...]:
        """Numbers of nodes per axis."""
        return tuple(axis.n for axis in self.axes)

    @property
    def size(self) -> int:
        """Number of nodes."""
        return math.prod(self.shape)

    @property
    def nodes(self) -> tuple[np.ndarray, ...]:
        """Nodes of each axis."""
        return tuple(axis.nodes for axis in self.axes)

    @cached_property
    def points(self) -> np.ndarray:
        """All nodes in C order, shape (size, d)."""
        return np.asarray(Spread(self.nodes).like(np.empty(0)))

    @cached_property
    def volumes(self) -> np.ndarray:
        """Volumes of the dual cells, shape (size,)."""
        return self.product([axis.lengths for axis in self.axes])

    def product(self, factors: Sequence[Any]) -> np.ndarray:
        """Tensor product of one array per axis, flattened in C order."""
        result = np.ones(())
        for factor in factors:
            result = np.multiply.outer(result, factor)
        return np.asarray(result).reshape(-1)

    def along(self, axis: int, values: np.ndarray) -> np.ndarray:
        """Values of one axis (n,) spread over all nodes (size,)."""
        return self.product([values if i == axis else np.ones(a.n) for i, a in enumerate(self.axes)])

    @property
    def box(self) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper corners."""
        return (
            np.array([a.grading.lower for a in self.axes]),
            np.array([a.grading.upper for a in self.axes]),
        )

    def inside(self, x: Array, argument: str = "x") -> Array:
        """Points with periodic axes wrapped.

        Raises
        ------
        InputError
            Where one lies outside the grid.
        """
        position = as_numpy(x)
        low, high = self.box
        slack = 1e-9 * (high - low)
        outside = (position < low - slack) | (position > high + slack)
        outside[:, [a.periodic for a in self.axes]] = False
        if outside.any():
            first = position[np.flatnonzero(outside.any(-1))[0]]
            raise InputError(
                argument,
                f"a point at {first.tolist()}",
                f"points inside the box {low.tolist()} .. {high.tolist()}",
                "pass the points as at= (or a larger box) when solving",
            )
        if not any(a.periodic for a in self.axes):
            return x
        turns = np.where([a.periodic for a in self.axes], np.floor((position - low) / (high - low)), 0.0)
        return x - as_like(turns * (high - low), x)

    def clamped(self, x: Array) -> Array:
        """Points (..., d), those beyond the grid moved to its edge; along periodic axes as they are."""
        low, high = (as_like(end, x) for end in self.box)
        inside = namespace(x).minimum(namespace(x).maximum(x, low), high)
        loose = as_like(np.array([0.0 if axis.periodic else 1.0 for axis in self.axes]), x)
        return x + loose * (inside - x)

    def interpolation(self, x: Array, width: int, derivatives: Sequence[int] | None = None) -> tuple[np.ndarray, Array]:
        """Node indices and weights ``(P, w^d)`` such that ``(weights * u[indices]).sum(1)`` interpolates u at x.

        Parameters
        ----------
        x : array, shape (P, d)
            Points inside the grid; tensors keep their gradients.
        width : int
            Number of nodes per axis in a stencil: interpolation of that order.
        derivatives : sequence of int, optional
            Order of differentiation per axis (0, 1 or 2).

        Raises
        ------
        InputError
            For points outside the grid.
        """
        x = self.inside(x)
        orders = derivatives or [0] * self.dim
        index, weight = np.zeros((len(x), 1), dtype=int), as_like(np.ones((len(x), 1)), x)
        for i, axis in enumerate(self.axes):
            idx, w = axis.weights(x[:, i], width, orders[i])
            index = (index[:, :, None] * axis.n + idx[:, None, :]).reshape(len(x), -1)
            weight = (weight[:, :, None] * w[:, None, :]).reshape(len(x), -1)
        return index, weight

    def interpolate(self, u: Array, x: Any, width: int, derivatives: Sequence[int] | None = None) -> Array:
        """Values of the node field u ``(size[, k])`` at points ``(..., d)``: shape ``(...[, k])``.

        Raises
        ------
        InputError
            For points outside the grid.
        """
        x = as_points(x, self.dim)
        lead = tuple(x.shape[:-1])
        index, weight = self.interpolation(x.reshape(-1, self.dim), width, derivatives)
        columns = tuple(u.shape[1:])
        gathered = u.reshape(self.size, -1)[index.reshape(-1)].reshape(*index.shape, -1)
        values = (as_like(weight, u)[..., None] * gathered).sum(1)
        return values.reshape(lead + columns)

    def __repr__(self) -> str:
        spans = ", ".join(f"{a.grading.lower:.5g}..{a.grading.upper:.5g} ({a.n})" for a in self.axes)
        return f"Grid({spans})"
