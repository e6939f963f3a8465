"""The frozen rule from values of φ to terminal data: point values where it is smooth, the kernel where it is not."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

import numpy as np
import scipy.sparse as sp

from kolmo.arrays import Array, Spread, along, as_like, is_tensor, namespace
from kolmo.grid import Grid
from kolmo.problem.box import Box
from kolmo.problem.problem import KolmogorovProblem, check_finite
from kolmo.schemes.differences import slope_weight
from kolmo.schemes.local import break_nodes, break_weights, put_rows, shifts
from kolmo.schemes.terminal.cells import cell_samples, lattice_index
from kolmo.schemes.terminal.kernel import CORRECTIONS, gauss_rule, near_rough, smoothing_matrix, support
from kolmo.schemes.terminal.roughness import crossed, rough_cells


@dataclass(frozen=True, eq=False)
class TerminalRule:
    """Frozen linear rule from values of φ at chosen points to terminal data at the nodes.

    Near rough cells φ is sampled on a lattice, the tensor product of Gauss points in every cell (and the two ends) of
    each axis. In the rough cells themselves (in one and two dimensions) the lattice values come from a projection of
    many more samples, which leaves the integral against the kernel's polynomial pieces exact. The kernel then acts
    axis by axis.

    Attributes
    ----------
    grid : Grid
        The nodes.
    order : int
        Order of the kernel.
    touched : ndarray of int
        Nodes whose value is smoothed; the others take φ at the node.
    lattice : tuple of ndarray
        Lattice points of each axis.
    smoothing : tuple of csr_matrix
        Per axis, from lattice points to nodes.
    rough : ndarray of int, shape (cells, q^d)
        Flat lattice indices of the Gauss points of the rough cells.
    owner : ndarray of int, shape (rows,)
        Rough cell to which a row of samples belongs; a cell in which breaks meet has several.
    points : ndarray, shape (rows, m, d)
        Samples in the rough cells.
    weights : tuple of ndarray, shape (rows, m, q)
        Per axis, factors of the projection onto the Gauss points.
    met : ndarray of int
        Nodes on breaks of the grid. There φ is the mean of its values ``beside`` (nodes, sides, d), with ``shares``
        (nodes, sides): those that the two sides have in the scheme's own sum over the nodes, so that a jump there costs
        no accuracy and needs no smoothing.
    """

    grid: Grid
    order: int
    touched: np.ndarray
    lattice: tuple[np.ndarray, ...] = ()
    smoothing: tuple[sp.csr_matrix, ...] = ()
    rough: np.ndarray = field(default_factory=lambda: np.zeros((0, 1), dtype=int))
    owner: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=int))
    points: np.ndarray = field(default_factory=lambda: np.zeros((0, 1, 1)))
    weights: tuple[np.ndarray, ...] = ()
    met: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=int))
    beside: np.ndarray = field(default_factory=lambda: np.zeros((0, 2, 1)))
    shares: np.ndarray = field(default_factory=lambda: np.zeros((0, 2)))

    def apply(self, problem: KolmogorovProblem, x: Array) -> Array:
        """Terminal data of shape (size, k) at the nodes x; tensors keep their gradients."""
        values = self._evaluate(problem, x)
        if len(self.met):
            sides = self._evaluate(problem, as_like(self.beside.reshape(-1, self.grid.dim), x))
            sides = sides.reshape(*self.shares.shape, -1)
            values = put_rows(values, self.met, (sides * as_like(self.shares, x)[..., None]).sum(1))
        if not self.smoothed:
            return values
        smooth = self._lattice_values(problem, x).reshape(*map(len, self.lattice), -1)
        for i, matrix in enumerate(self.smoothing):
            smooth = _multiplied(matrix, smooth, i)
        smooth = smooth.reshape(self.grid.size, -1)
        position = np.arange(self.grid.size)
        position[self.touched] += self.grid.size
        return namespace(values).concatenate([values, smooth])[position]

    def _evaluate(self, problem: KolmogorovProblem, x: Array) -> Array:
        values = check_finite(problem.final(x), x, problem.horizon or 0.0, "terminal", problem.box)
        return values[:, None] if values.ndim == 1 else values

    def _lattice_values(self, problem: KolmogorovProblem, like: Array) -> Array:
        values = self._evaluate(problem, Spread(self.lattice).like(like))
        if self.rough.size == 0:
            return values
        rows, m = self.points.shape[:2]
        samples = self._evaluate(problem, as_like(self.points.reshape(-1, self.grid.dim), like))
        xp = namespace(values)
        product, *factors = [as_like(w, like) for w in self.weights]
        for factor in factors:
            product = (product[..., :, None] * factor[..., None, :]).reshape(rows, m, -1)
        projected = (product.swapaxes(1, 2) @ samples.reshape(rows, m, -1)).reshape(rows, -1)
        gathered = _multiplied(self._gather, projected, 0)
        position = np.arange(len(values))
        position[self.rough.reshape(-1)] = len(values) + np.arange(self.rough.size)
        return xp.concatenate([values, gathered.reshape(self.rough.size, -1)])[position]

    @cached_property
    def _gather(self) -> sp.csr_matrix:
        """Sums the rows of every rough cell."""
        rows = np.arange(len(self.owner))
        return sp.csr_matrix((np.ones(len(rows)), (self.owner, rows)), shape=(len(self.rough), len(rows)))

    @classmethod
    def point_values(cls, grid: Grid, order: int = 0) -> "TerminalRule":
        """Take φ at every node."""
        return cls(grid, order, np.zeros(0, dtype=int))

    def record(self) -> dict[str, Any]:
        """Tree of numbers and arrays, for saving."""
        parts = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "grid"}
        smoothing = [_sparse_record(m) for m in self.smoothing]
        return parts | {"lattice": list(self.lattice), "smoothing": smoothing, "weights": list(self.weights)}

    @classmethod
    def from_record(cls, grid: Grid, tree: dict[str, Any]) -> "TerminalRule":
        """Rebuild a rule from its record."""
        smoothing = tuple(_sparse_from(m) for m in tree["smoothing"])
        several = {"lattice": tuple(tree["lattice"]), "smoothing": smoothing, "weights": tuple(tree["weights"])}
        return cls(grid, **{**tree, **several})

    @property
    def smoothed(self) -> bool:
        """Whether anything is smoothed."""
        return len(self.touched) > 0


def plan_terminal(problem: KolmogorovProblem, grid: Grid, box: Box, order: int) -> TerminalRule:
    """Find where φ is rough on the grid's scale and lay out the smoothing there."""
    met, beside, shares = _on_breaks(problem, grid, order)
    rough = rough_cells(problem, grid)
    if order not in CORRECTIONS or not rough.any():
        return TerminalRule(grid, order, np.zeros(0, dtype=int), met=met, beside=beside, shares=shares)
    near = near_rough(rough, grid, support(order))
    touched = np.flatnonzero(near.reshape(-1))
    gauss = 0.5 * (gauss_rule(order)[0] + 1.0)
    lattice, smoothing, kept = [], [], []
    for i, axis in enumerate(grid.axes):
        position = (np.arange(rough.shape[i])[:, None] + gauss).reshape(-1)
        ends = [] if axis.periodic else [0.0, float(axis.n - 1)]
        odd = tuple(face.parity <= 0 for face in box.faces[i])
        matrix = smoothing_matrix(axis.n, axis.periodic, odd, order)
        # only what the touched nodes see: φ is evaluated there
        rows = near.any(axis=tuple(j for j in range(grid.dim) if j != i))
        seen = np.unique(matrix[rows].indices) if grid.dim > 1 else np.arange(matrix.shape[1])
        lattice.append(np.asarray(axis.grading(np.concatenate([position, ends])[seen] * axis.h)))
        smoothing.append(matrix[:, seen] if grid.dim > 1 else matrix)
        kept.append(seen)
    # in three dimensions the lattice itself has to do: projecting every rough cell would cost more than it gains
    cells = np.stack(np.nonzero(rough if grid.dim < 3 else np.zeros_like(rough)), -1)
    if not crossed(problem, grid, cells):
        cells = cells[:0]
    owner, points, weights = cell_samples(problem, grid, cells, order)
    index = lattice_index(cells, kept, order)
    touched = np.setdiff1d(touched, met)
    return TerminalRule(
        grid, order, touched, tuple(lattice), tuple(smoothing), index, owner, points, weights, met, beside, shares
    )


def plan_averages(
    problem: KolmogorovProblem, grid: Grid, box: Box, order: int, names: Sequence[str]
) -> dict[str, TerminalRule]:
    """Rules that average functions whose breaks lie between the nodes, as terminal data are averaged.

    The kernel leaves sums over the nodes exact to its order, so that what multiplies a smooth factor loses nothing
    where it jumps. Of noise, which must stay positive, the plain (hat) kernel is taken.
    """
    middle = 0.5 * (problem.horizon or 0.0)
    return {
        name: plan_terminal(problem.showing(name, middle), grid, box, 2 if name == "covariance" else order)
        for name in names
    }


def _on_breaks(problem: KolmogorovProblem, grid: Grid, order: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Nodes on breaks, points beside them, and the share of each: see ``TerminalRule.met``."""
    met: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    most = 2 ** sum(bool(a.breaks) for a in grid.axes)
    before = (problem.horizon or 0.0) * (1.0 - 1e-9)
    for axis in (i for i, a in enumerate(grid.axes) if a.breaks):
        nodes = break_nodes(grid, axis)
        low = break_weights(problem, grid, axis, before, slope_weight(order))
        sides = [list(shifts(grid, axis, nodes, sign)) for sign in (-1.0, 1.0)]
        points = grid.points[nodes][:, None] + np.stack([*sides[0], *sides[1]], 1)
        share = np.repeat(np.stack([low, 1.0 - low], 1) / len(sides[0]), len(sides[0]), axis=1)
        pad = most - points.shape[1]
        points, share = np.pad(points, ((0, 0), (0, pad), (0, 0)), mode="edge"), np.pad(share, ((0, 0), (0, pad)))
        met.update(zip(nodes.tolist(), zip(points, share, strict=True), strict=True))
    if not met:
        return np.zeros(0, dtype=int), np.zeros((0, 2, grid.dim)), np.zeros((0, 2))
    return np.array(list(met)), np.stack([p for p, _ in met.values()]), np.stack([s for _, s in met.values()])


def _multiplied(matrix: sp.csr_matrix, values: Array, axis: int) -> Array:
    """Sparse matrix applied along an axis."""
    known = as_like(matrix.toarray(), values) if is_tensor(values) else matrix
    return along(lambda columns: known @ columns, values, axis)


def _sparse_record(matrix: sp.csr_matrix) -> dict[str, Any]:
    return {"data": matrix.data, "indices": matrix.indices, "indptr": matrix.indptr, "shape": list(matrix.shape)}


def _sparse_from(tree: dict[str, Any]) -> sp.csr_matrix:
    return sp.csr_matrix((tree["data"], tree["indices"], tree["indptr"]), shape=tuple(tree["shape"]))
