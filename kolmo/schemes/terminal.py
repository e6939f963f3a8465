"""Terminal data on the grid: point values where they are smooth, a smoothing kernel where they have kinks or jumps."""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.polynomial import legendre
from scipy.interpolate import BSpline

from kolmo.arrays import Array, as_like, as_numpy, is_tensor, namespace
from kolmo.box import Box, Reflecting, Robin
from kolmo.grid import Grid
from kolmo.problem import KolmogorovProblem, check_finite

# Coefficients of the centred differences δ⁰, δ², δ⁴ that turn the B-spline into a kernel of the order (Kreiss, Thomée
# & Widlund 1970): with s = sin(ω/2), δ² = −4s², the factors are 1, 1 + ⅔s², 1 + s² + (13/15)s⁴.
CORRECTIONS = {2: (1.0,), 4: (1.0, -1.0 / 6.0), 6: (1.0, -1.0 / 4.0, 13.0 / 240.0)}

# A fourth difference that shrinks by less than this factor when the spacing is halved is not that of smooth data
# (smooth 1/16, kink 1/2, jump 1), unless it is below the floor, relative to the largest value.
SHRINK, FLOOR = 0.3, 1e-7

# Sub-cells per axis with which rough cells are sampled in two and three dimensions.
SUBCELLS = {2: 12, 3: 6}


@lru_cache(maxsize=8)
def kernel(order: int) -> BSpline:
    """Smoothing kernel of an order on unit spacing, as a piecewise polynomial; integrates to one.

    Examples
    --------
    >>> round(float(kernel(4).integrate(-3, 3)), 12)
    1.0
    """
    half = order // 2 + len(CORRECTIONS[order]) - 1
    knots = np.arange(-half, half + 1.0)
    filtered = np.zeros(2 * len(CORRECTIONS[order]) - 1)
    middle = len(CORRECTIONS[order]) - 1
    difference = np.ones(1)
    for m, factor in enumerate(CORRECTIONS[order]):
        filtered[middle - m : middle + m + 1] += factor * difference
        difference = np.convolve(difference, [1.0, -2.0, 1.0])
    extended = np.concatenate([knots[0] - np.arange(order - 1, 0, -1), knots, knots[-1] + np.arange(1, order)])
    coefficients = np.zeros(len(extended) - order)
    start = order - 1
    coefficients[start : start + len(filtered)] = filtered
    return BSpline(extended, coefficients, order - 1)


def support(order: int) -> int:
    """Half-width of the kernel in cells."""
    return order // 2 + len(CORRECTIONS[order]) - 1


@dataclass(frozen=True, eq=False)
class TerminalRule:
    """Frozen linear rule from values of φ at chosen points to terminal data at the nodes.

    Attributes
    ----------
    grid : Grid
        The nodes.
    order : int
        Order of the kernel.
    touched : ndarray of int
        Nodes whose value is smoothed; the others take φ at the node.
    matrix : csr_matrix or None
        Rows: touched nodes; columns: sample points.
    points : ndarray, shape (samples, d)
        Sample points.
    constant : csr_matrix or None
        Weights of φ at the nodes of the faces, from its extension beyond them.
    """

    grid: Grid
    order: int
    touched: np.ndarray
    points: np.ndarray
    matrix: sp.csr_matrix | None
    constant: sp.csr_matrix | None

    def apply(self, problem: KolmogorovProblem, x: Array) -> Array:
        """Terminal data of shape (size, k) at the nodes x; tensors keep their gradients."""
        values = check_finite(problem.final(x), x, problem.horizon or 0.0, "terminal")
        values = values[:, None] if values.ndim == 1 else values
        if self.matrix is None:
            return values
        points = as_like(self.points, x)
        samples = check_finite(problem.final(points), points, problem.horizon or 0.0, "terminal")
        smooth = _multiply(self.matrix, samples[:, None] if samples.ndim == 1 else samples)
        if self.constant is not None:
            smooth = smooth + _multiply(self.constant, values)
        position = np.arange(self.grid.size)
        position[self.touched] = self.grid.size + np.arange(len(self.touched))
        return namespace(values).concatenate([values, smooth])[position]

    @classmethod
    def point_values(cls, grid: Grid, order: int = 0) -> "TerminalRule":
        """Take φ at every node."""
        return cls(grid, order, np.zeros(0, dtype=int), np.zeros((0, grid.dim)), None, None)

    def record(self) -> dict[str, Any]:
        """Tree of numbers and arrays, for saving."""
        return {
            "order": self.order,
            "touched": self.touched,
            "points": self.points,
            "matrix": _sparse_record(self.matrix),
            "constant": _sparse_record(self.constant),
        }

    @classmethod
    def from_record(cls, grid: Grid, tree: dict[str, Any]) -> "TerminalRule":
        """Rebuild a rule from its record."""
        matrices = [_sparse_from(tree[name]) for name in ("matrix", "constant")]
        return cls(grid, tree["order"], tree["touched"], tree["points"], *matrices)

    @cached_property
    def smoothed(self) -> bool:
        """Whether anything is smoothed."""
        return self.matrix is not None


def _sparse_record(matrix: sp.csr_matrix | None) -> dict[str, Any] | None:
    if matrix is None:
        return None
    return {"data": matrix.data, "indices": matrix.indices, "indptr": matrix.indptr, "shape": list(matrix.shape)}


def _sparse_from(tree: dict[str, Any] | None) -> sp.csr_matrix | None:
    if tree is None:
        return None
    return sp.csr_matrix((tree["data"], tree["indices"], tree["indptr"]), shape=tuple(tree["shape"]))


def _multiply(matrix: sp.csr_matrix, values: Array) -> Array:
    """Sparse matrix times dense array, in NumPy or torch."""
    if not is_tensor(values):
        return matrix @ values
    import torch

    coo = matrix.tocoo()
    index = torch.as_tensor(np.stack([coo.row, coo.col]), dtype=torch.int64, device=values.device)
    data = torch.as_tensor(coo.data, device=values.device)
    return torch.sparse_coo_tensor(index, data, coo.shape, check_invariants=False) @ values


def plan_terminal(problem: KolmogorovProblem, grid: Grid, box: Box, order: int) -> TerminalRule:
    """Find where φ is rough on the grid's scale and lay out the smoothing there."""
    rough = _rough_cells(problem, grid)
    if order not in CORRECTIONS or not rough.any():
        return TerminalRule.point_values(grid, order)
    touched = np.flatnonzero(_near(rough, grid, support(order)).reshape(-1))
    lines = [_line_weights(axis_cells, box, i, order, grid) for i, axis_cells in enumerate(rough.shape)]
    cells = _needed_cells(touched, grid, rough.shape, lines)
    points, local = _samples(problem, grid, cells, rough, order)
    matrix, constant = _tensor_rows(touched, grid, lines, cells, local, rough.shape, order)
    return TerminalRule(grid, order, touched, points, matrix, constant)


def _cells(grid: Grid) -> tuple[int, ...]:
    return tuple(a.n if a.periodic else a.n - 1 for a in grid.axes)


def _rough_cells(problem: KolmogorovProblem, grid: Grid) -> np.ndarray:
    """Mask of the cells in which φ is not smooth on the scale of the grid, along any axis."""
    rough = np.zeros(_cells(grid), dtype=bool)
    values = as_numpy(problem.final(grid.points))
    values = values.reshape(*grid.shape, -1)
    scale = np.abs(values).max(axis=tuple(range(grid.dim))) + 1e-300
    if not np.isfinite(values).all():
        return rough
    for i, axis in enumerate(grid.axes):
        middle = np.asarray(axis.grading(axis.xi[: rough.shape[i]] + 0.5 * axis.h))
        nodes = [middle if j == i else a.nodes for j, a in enumerate(grid.axes)]
        x = np.stack(np.meshgrid(*nodes, indexing="ij"), -1).reshape(-1, grid.dim)
        halves = as_numpy(problem.final(x)).reshape(*[len(v) for v in nodes], -1)
        flagged = _flag(np.moveaxis(values, i, 0), np.moveaxis(halves, i, 0), scale, axis.periodic)
        flagged = np.moveaxis(flagged, 0, i)
        # a cell belongs to 2^(d-1) lines of nodes: it is rough if one of them is
        for j in range(grid.dim):
            if j != i:
                following = np.roll(flagged, -1, axis=j)
                flagged = flagged | following
                if not grid.axes[j].periodic:
                    flagged = np.take(flagged, np.arange(grid.shape[j] - 1), axis=j)
        rough |= flagged
    return rough


def _flag(values: np.ndarray, halves: np.ndarray, scale: np.ndarray, periodic: bool) -> np.ndarray:
    """Two-scale test on fourth differences along the first axis: nodes (n, …, k) and mid-cell values (cells, …, k)."""
    cells = len(halves)
    fine = np.empty((2 * cells + (0 if periodic else 1), *values.shape[1:]))
    fine[0::2], fine[1::2] = values, halves
    pad = 4
    if periodic:
        wide, fine = (
            np.concatenate([values[-pad:], values, values[:pad]]),
            np.concatenate([fine[-pad:], fine, fine[:pad]]),
        )
    else:
        wide = values
    fine_difference = np.abs(np.diff(fine, 4, axis=0) / scale).max(-1)
    coarse_difference = np.abs(np.diff(wide, 4, axis=0) / scale).max(-1)
    rough = np.zeros((cells, *values.shape[1:-1]), dtype=bool)
    for cell in range(cells):
        # windows of half steps that lie in this cell and its neighbours, and windows of full steps around them
        at = 2 * cell + (pad if periodic else 0)
        small = fine_difference[max(at - 2, 0) : at + 1]
        node = cell + (pad if periodic else 0)
        large = coarse_difference[max(node - 5, 0) : node + 3]
        if len(small) and len(large):
            peak = small.max(0)
            rough[cell] = (peak > SHRINK * large.max(0)) & (peak > FLOOR)
    return rough


def _near(rough: np.ndarray, grid: Grid, reach: int) -> np.ndarray:
    """Nodes whose kernel touches a rough cell."""
    near = rough
    for i, axis in enumerate(grid.axes):
        spread = np.zeros([axis.n if j == i else s for j, s in enumerate(near.shape)], dtype=bool)
        moved = np.moveaxis(spread, i, 0)
        source = np.moveaxis(near, i, 0)
        for cell in range(len(source)):
            # node j sees cells j − reach … j + reach − 1
            ends = np.arange(cell - reach + 1, cell + reach + 1)
            ends = ends % axis.n if axis.periodic else ends[(ends >= 0) & (ends < axis.n)]
            moved[ends] |= source[cell]
        near = spread
    return near


@dataclass(frozen=True)
class _Line:
    """Kernel weights of one axis: per node and relative cell, which cell, sign, and values at its Gauss points."""

    cell: np.ndarray
    mirrored: np.ndarray
    sign: np.ndarray
    weights: np.ndarray


def _line_weights(cells: int, box: Box, axis: int, order: int, grid: Grid) -> _Line:
    """Kernel × Gauss weights for the cells around a node, folded back at the ends.

    φ is extended evenly beyond walls, where the slope vanishes, and oddly about its value at the face elsewhere.
    """
    reach, n = support(order), grid.axes[axis].n
    s, w = legendre.leggauss(order)
    relative = np.arange(-reach, reach)
    weights = 0.5 * w * kernel(order)(relative[:, None] + 0.5 * (s + 1.0))
    cell = np.arange(n)[:, None] + relative
    if grid.axes[axis].periodic:
        return _Line(cell % cells, np.zeros(cell.shape, bool), np.ones(cell.shape), weights)
    odd = [not isinstance(face, (Reflecting, Robin)) for face in box.faces[axis]]
    below, above = cell < 0, cell >= cells
    sign = np.where((below & odd[0]) | (above & odd[1]), -1.0, 1.0)
    folded = np.where(below, -1 - cell, np.where(above, 2 * cells - 1 - cell, cell))
    return _Line(np.clip(folded, 0, cells - 1), below | above, sign, weights)


def _needed_cells(touched: np.ndarray, grid: Grid, cells: tuple[int, ...], lines: list[_Line]) -> np.ndarray:
    """Flat indices of the cells that the touched nodes sample."""
    needed = np.zeros(cells, dtype=bool)
    home = np.unravel_index(touched, grid.shape)
    if grid.dim == 1:
        needed[lines[0].cell[home[0]].reshape(-1)] = True
        return np.flatnonzero(needed)
    parts = [line.cell[h] for line, h in zip(lines, home, strict=True)]
    if grid.dim == 2:
        needed[parts[0][:, :, None], parts[1][:, None, :]] = True
    else:
        needed[parts[0][:, :, None, None], parts[1][:, None, :, None], parts[2][:, None, None, :]] = True
    return np.flatnonzero(needed.reshape(-1))


def _samples(
    problem: KolmogorovProblem, grid: Grid, cells: np.ndarray, rough: np.ndarray, order: int
) -> tuple[np.ndarray, sp.csr_matrix]:
    """Sample points, and the matrix from their values to effective values at the Gauss points of the needed cells.

    In smooth cells the Gauss points themselves; in rough ones many points, projected on polynomials (which leaves the
    integral against the kernel's pieces exact).
    """
    q, d = order, grid.dim
    flagged = rough.reshape(-1)[cells]
    gauss, _ = legendre.leggauss(q)
    corner = np.stack(np.unravel_index(cells, rough.shape), -1)
    unit = np.stack(np.meshgrid(*[0.5 * (gauss + 1.0)] * d, indexing="ij"), -1).reshape(-1, d)
    per_cell = len(unit)
    points = [_to_x(grid, corner[~flagged][:, None, :] + unit).reshape(-1, d)]
    smooth_rows = (np.flatnonzero(~flagged)[:, None] * per_cell + np.arange(per_cell)).reshape(-1)
    rows, columns = [smooth_rows], [np.arange(len(smooth_rows))]
    data: list[Any] = [np.ones(len(smooth_rows))]
    offset = len(smooth_rows)
    for position in np.flatnonzero(flagged):
        local, weights = _rough_rule(problem, grid, corner[position], d)
        basis = [legendre.legvander(2.0 * local[:, i] - 1.0, q - 1) * (2.0 * np.arange(q) + 1.0) for i in range(d)]
        at_gauss = legendre.legvander(gauss, q - 1)
        project = [b @ at_gauss.T for b in basis]
        dense = weights[:, None] * project[0]
        for factor in project[1:]:
            dense = (dense[:, :, None] * factor[:, None, :]).reshape(len(local), -1)
        points.append(_to_x(grid, corner[position] + local))
        rows.append(np.tile(position * per_cell + np.arange(per_cell), len(local)))
        columns.append(np.repeat(offset + np.arange(len(local)), per_cell))
        data.append(dense.reshape(-1))
        offset += len(local)
    shape = (len(cells) * per_cell, offset)
    matrix = sp.csr_matrix((np.concatenate(data), (np.concatenate(rows), np.concatenate(columns))), shape=shape)
    return np.concatenate(points), matrix


def _to_x(grid: Grid, position: np.ndarray) -> np.ndarray:
    """Positions in node units → points."""
    parts = [np.asarray(a.grading(position[..., i] * a.h)) for i, a in enumerate(grid.axes)]
    return np.stack(parts, -1)


def _rough_rule(problem: KolmogorovProblem, grid: Grid, corner: np.ndarray, d: int) -> tuple[np.ndarray, np.ndarray]:
    """Quadrature points in the unit cell (m, d) and weights (m,) that cope with a kink or jump inside."""
    gauss, w = legendre.leggauss(4 if d == 1 else 2)
    edges = _dyadic(problem, grid, corner) if d == 1 else np.linspace(0.0, 1.0, SUBCELLS[d] + 1)
    widths = np.diff(edges)
    s = (edges[:-1, None] + 0.5 * widths[:, None] * (gauss + 1.0)).reshape(-1)
    v = (0.5 * widths[:, None] * w).reshape(-1)
    points = np.stack(np.meshgrid(*[s] * d, indexing="ij"), -1).reshape(-1, d)
    weights = v
    for _ in range(d - 1):
        weights = np.multiply.outer(weights, v).reshape(-1)
    return points, weights


def _dyadic(problem: KolmogorovProblem, grid: Grid, corner: np.ndarray, depth: int = 44) -> np.ndarray:
    """Edges of a dyadic subdivision of a one-dimensional cell that closes in on kinks and jumps."""
    gauss = 0.5 * (legendre.leggauss(6)[0] + 1.0)
    edges = {0.0, 1.0}
    active = [(0.0, 1.0)]
    vander = legendre.legvander(2.0 * gauss - 1.0, 3)
    residual = np.eye(6) - vander @ np.linalg.pinv(vander)
    scale: float | None = None
    for _ in range(depth):
        if not active:
            break
        split = [(a, 0.5 * (a + b)) for a, b in active] + [(0.5 * (a + b), b) for a, b in active]
        edges.update(0.5 * (a + b) for a, b in active)
        s = np.array([a + (b - a) * gauss for a, b in split])
        values = as_numpy(problem.final(_to_x(grid, corner + s.reshape(-1, 1))))
        values = values.reshape(len(split), 6, -1)
        misfit = np.abs(residual @ values).max(axis=(1, 2))
        scale = max(float(np.abs(values).max()), 1e-300) if scale is None else scale
        active = [piece for piece, m in zip(split, misfit, strict=True) if m * (piece[1] - piece[0]) > 1e-13 * scale]
        if len(active) > 64:
            break
    return np.array(sorted(edges))


def _tensor_rows(
    touched: np.ndarray,
    grid: Grid,
    lines: list[_Line],
    cells: np.ndarray,
    local: sp.csr_matrix,
    shape: tuple[int, ...],
    order: int,
) -> tuple[sp.csr_matrix, sp.csr_matrix | None]:
    """Smoothing matrix from sample values to the touched nodes, and the part of the values at the faces."""
    q, d, T = order, grid.dim, len(touched)
    position = np.full(int(np.prod(shape)), -1)
    position[cells] = np.arange(len(cells))
    home = np.unravel_index(touched, grid.shape)
    index, weight = np.zeros((T, 1), dtype=int), np.ones((T, 1))
    gauss_index = np.zeros((T, 1), dtype=int)
    for i, line in enumerate(lines):
        cell, sign, mirrored = (v[home[i]] for v in (line.cell, line.sign, line.mirrored))
        w = sign[:, :, None] * line.weights
        g = np.where(mirrored[:, :, None], np.arange(q)[::-1], np.arange(q))
        cell_wide = np.broadcast_to(cell[:, :, None], w.shape).reshape(T, -1)
        index = (index[:, :, None] * shape[i] + cell_wide[:, None, :]).reshape(T, -1)
        gauss_index = (gauss_index[:, :, None] * q + g.reshape(T, 1, -1)).reshape(T, -1)
        weight = (weight[:, :, None] * w.reshape(T, 1, -1)).reshape(T, -1)
    columns = position[index] * q**d + gauss_index
    rows = np.repeat(np.arange(T), weight.shape[1])
    effective = sp.csr_matrix((weight.reshape(-1), (rows, columns.reshape(-1))), shape=(T, local.shape[0]))
    return sp.csr_matrix(effective @ local), _odd_constant(touched, grid, lines, home)


def _odd_constant(touched: np.ndarray, grid: Grid, lines: list[_Line], home: Any) -> sp.csr_matrix | None:
    """Weights of the values at the faces: beyond one that is no wall, φ is 2 φ(face) − φ(mirror image)."""
    if not any(line.mirrored[h].any() for line, h in zip(lines, home, strict=True)):
        return None
    rows, columns, data = [], [], []
    for i, line in enumerate(lines):
        mass = line.weights.sum(1)
        outside = (line.sign[home[i]] < 0) * mass
        for side in (0, 1):
            half = line.cell.shape[1] // 2
            lower = np.arange(line.cell.shape[1]) < half
            amount = 2.0 * (outside * (lower if side == 0 else ~lower)).sum(1)
            wall = [
                np.full(len(touched), (0 if side == 0 else grid.shape[j] - 1)) if j == i else h
                for j, h in enumerate(home)
            ]
            rows.append(np.arange(len(touched)))
            columns.append(np.ravel_multi_index(wall, grid.shape))
            data.append(amount)
    return sp.csr_matrix(
        (np.concatenate(data), (np.concatenate(rows), np.concatenate(columns))), shape=(len(touched), grid.size)
    )
