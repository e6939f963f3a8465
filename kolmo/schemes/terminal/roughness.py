"""Which cells of a grid φ is rough in: where it has kinks or jumps on the scale of the spacing."""

import numpy as np

from kolmo.arrays import Spread, as_numpy
from kolmo.grid import Grid
from kolmo.problem import KolmogorovProblem
from kolmo.schemes.local import break_nodes, shifts
from kolmo.schemes.terminal.kinks import FLOOR, SHRINK, break_of, values_at

# Distance from the faces of a cell, as a part of it, from which on a break counts as inside.
MARGIN = 1e-6
# Times at most that one looks closer at a kink to locate it, and the change, in cells, at which it is found.
CLOSER, FOUND = 5, 1e-9


def rough_places(problem: KolmogorovProblem, grid: Grid, i: int) -> np.ndarray:
    """Middles of the cells of axis i in which φ has a kink or jump along that axis."""
    axis = grid.axes[i]
    flagged = _rough_along(problem, grid, i, _at_nodes(problem, grid))
    cells = np.flatnonzero(flagged.any(axis=tuple(j for j in range(grid.dim) if j != i)))
    return np.asarray(axis.grading(axis.xi[cells] + 0.5 * axis.h))


def common_break(problem: KolmogorovProblem, grid: Grid, i: int) -> float | None:
    """Where φ has its one kink or jump along axis i, if it is at the same place on every line that has one."""
    flagged = np.moveaxis(_rough_along(problem, grid, i, _at_nodes(problem, grid)), i, 0)
    others, columns = np.argwhere(flagged.any(0)), flagged[:, flagged.any(0)]
    if len(others) == 0:
        return None
    first, last = columns.argmax(0), len(columns) - columns[::-1].argmax(0)

    def values(s: np.ndarray, rows: np.ndarray) -> np.ndarray:
        along = low[rows, None] + s * (high - low)[rows, None]
        rest = np.broadcast_to(others[rows, None, :], (*s.shape, grid.dim - 1))
        return values_at(problem, grid, np.insert(rest.astype(float), i, along, axis=-1))

    low, high = first.astype(float), last.astype(float)
    place = np.full(len(others), np.inf)
    for _ in range(CLOSER):  # a kink is found the better the closer one looks, a jump at once
        before, place = place, low + break_of(values, len(others)) * (high - low)
        if np.abs(place - before).max() < FOUND:
            break
        low, high = np.maximum(place - 0.1 * (high - low), 0.0), np.minimum(place + 0.1 * (high - low), len(columns))
    if np.ptp(place) > 1e-4:
        return None
    return float(grid.axes[i].grading(np.median(place) * grid.axes[i].h))


def rough_cells(problem: KolmogorovProblem, grid: Grid) -> np.ndarray:
    """Mask of the cells in which φ is not smooth on the scale of the grid, along any axis."""
    rough, values = np.zeros(_cells(grid), dtype=bool), _at_nodes(problem, grid)
    for i in range(grid.dim):
        flagged = _rough_along(problem, grid, i, values)
        # a cell belongs to 2^(d-1) lines of nodes: it is rough if one of them is
        for j in range(grid.dim):
            if j != i:
                following = np.roll(flagged, -1, axis=j)
                flagged = flagged | following
                if not grid.axes[j].periodic:
                    flagged = np.take(flagged, np.arange(grid.shape[j] - 1), axis=j)
        rough |= flagged
    return rough


def _cells(grid: Grid) -> tuple[int, ...]:
    return tuple(a.n if a.periodic else a.n - 1 for a in grid.axes)


def _at_nodes(problem: KolmogorovProblem, grid: Grid) -> np.ndarray:
    """Values of φ at the nodes, the shape of the grid and one axis of columns."""
    return np.asarray(as_numpy(problem.final(grid.points)).reshape(*grid.shape, -1))


def _rough_along(problem: KolmogorovProblem, grid: Grid, i: int, values: np.ndarray) -> np.ndarray:
    """Mask of (cells of axis i) × (nodes of the others) between whose nodes, with these values, φ is not smooth."""
    axis = grid.axes[i]
    scale = np.abs(values).max(axis=tuple(range(grid.dim))) + 1e-300
    middle = np.asarray(axis.grading(axis.xi[: _cells(grid)[i]] + 0.5 * axis.h))
    nodes = [middle if j == i else a.nodes for j, a in enumerate(grid.axes)]
    x = Spread(nodes).like(values)
    halves = as_numpy(problem.final(x)).reshape(*[len(v) for v in nodes], -1)
    values, halves = np.moveaxis(values, i, 0), np.moveaxis(halves, i, 0)
    if not axis.breaks:
        return np.moveaxis(_flag(values, halves, scale, axis.periodic), 0, i)
    sides = [_beside(problem, grid, i, sign) for sign in (-1.0, 1.0)]
    flagged = []
    for piece, (low, high) in enumerate(axis.pieces):  # what jumps on a break is smooth on either side of it
        part = values.take(range(low, high + 1), axis=0, mode="wrap")
        if piece > 0:
            part[0] = sides[1][piece - 1]
        if piece < len(axis.breaks):
            part[-1] = sides[0][piece]
        flagged.append(_flag(part, halves[low:high], scale, False))
    return np.moveaxis(np.concatenate(flagged), 0, i)


def _beside(problem: KolmogorovProblem, grid: Grid, i: int, sign: float) -> np.ndarray:
    """Values of φ beside the breaks of an axis, shape (breaks, nodes of the other axes …, k)."""
    nodes = break_nodes(grid, i)
    shift = next(shifts(grid, i, nodes, sign))
    values = as_numpy(problem.final(grid.points[nodes] + shift))
    shape = [len(grid.axes[i].breaks) if j == i else n for j, n in enumerate(grid.shape)]
    return np.moveaxis(values.reshape(*shape, -1), i, 0)


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
    small = np.abs(np.diff(fine, 4, axis=0) / scale).max(-1)
    large = np.abs(np.diff(wide, 4, axis=0) / scale).max(-1)
    if not (len(small) and len(large)):
        return np.zeros((cells, *values.shape[1:-1]), dtype=bool)
    # windows of half steps that lie in a cell and its neighbours, and windows of full steps around them
    first = pad if periodic else 0
    peak = _largest(small, first - 2, 3, 2, cells)
    return np.asarray((peak > SHRINK * _largest(large, first - 5, 8, 1, cells)) & (peak > FLOOR))


def _largest(values: np.ndarray, first: int, width: int, stride: int, count: int) -> np.ndarray:
    """Maxima along the first axis over windows, the first of which begins at ``first``; nothing lies outside."""
    before, last = max(-first, 0), first + (count - 1) * stride + width
    outside = [np.full((n, *values.shape[1:]), -np.inf) for n in (before, max(last - len(values), 0))]
    padded = np.concatenate([outside[0], values, outside[1]])[first + before :]
    windows = [padded[j : j + (count - 1) * stride + 1 : stride] for j in range(width)]
    largest = windows[0].copy()
    for window in windows[1:]:  # one after the other: together they would be the largest array there is
        np.maximum(largest, window, out=largest)
    return largest


def crossed(problem: KolmogorovProblem, grid: Grid, cells: np.ndarray) -> bool:
    """Whether φ breaks inside one of the cells: where it does on their faces only, the lattice's points do."""
    if len(cells) == 0:
        return False
    along = np.linspace(MARGIN, 1.0 - MARGIN, 9)
    mesh = np.stack(np.meshgrid(*[along] * grid.dim, indexing="ij"), -1)
    values = values_at(problem, grid, cells.reshape(-1, *[1] * grid.dim, grid.dim) + mesh)
    values = np.moveaxis(values / (np.abs(values).max(axis=tuple(range(grid.dim + 1))) + 1e-300), 0, -1)
    for i in range(grid.dim):
        line = np.moveaxis(values, i, 0)
        # lines beside each other: all but the cells, which are last, go into the maximum
        small, large = (np.abs(np.diff(v, 4, axis=0)).max(tuple(range(grid.dim + 1))) for v in (line, line[::2]))
        if ((small > SHRINK * large) & (small > FLOOR)).any():
            return True
    return False
