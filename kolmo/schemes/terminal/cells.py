"""Rough cells: samples in them, and weights that leave the integrals against polynomials exact across their breaks."""

import numpy as np
from numpy.polynomial import legendre

from kolmo.grid import Grid
from kolmo.problem import KolmogorovProblem
from kolmo.schemes.terminal.kernel import gauss_rule
from kolmo.schemes.terminal.kinks import break_of, points_at, values_at

# In two dimensions rough cells are sampled along lines: Gauss panels (and points in each) between the breaks of the
# stack of lines, and on either side of a line's own break.
PANELS, STACK_POINTS = 3, 4
LINE_PANELS, LINE_POINTS = 2, 3
# A square in which breaks meet is told from others by what a polynomial of this degree cannot follow, and is divided
# into so many parts a side, so many times; not more squares at a time than these (the worst).
FOLLOWED, MEETING, PARTS, DEPTH, WORST = 5, 1e-5, 4, 3, 40


def lattice_index(cells: np.ndarray, kept: list[np.ndarray], q: int) -> np.ndarray:
    """Flat indices of the Gauss points of cells among the lattice points kept of each axis, shape (cells, q^d)."""
    index = np.zeros((len(cells), 1), dtype=int)
    size = 1
    for i, seen in enumerate(kept):
        size *= q
        along = np.searchsorted(seen, cells[:, i, None] * q + np.arange(q))
        index = (index[:, :, None] * len(seen) + along[:, None, :]).reshape(len(cells), size)
    return index


def cell_samples(
    problem: KolmogorovProblem, grid: Grid, cells: np.ndarray, q: int
) -> tuple[np.ndarray, np.ndarray, tuple[np.ndarray, ...]]:
    """Samples in rough cells, one row or several a cell: the row's cell, points, factors of the projection."""
    if len(cells) == 0:
        owner, local, weight = np.zeros(0, dtype=int), np.zeros((0, 1, grid.dim)), np.zeros((0, 1))
    elif grid.dim == 1:
        local, weight = _lines(problem, grid, cells, 1.0, 0, np.zeros((len(cells), 1, 1)), deep=True)
        owner, local, weight = np.arange(len(cells)), local[:, 0], weight[:, 0]
    else:
        owner, local, weight = _divided(problem, grid, cells)
    gauss = gauss_rule(q)[0]
    to_gauss = legendre.legvander(gauss, q - 1).T
    factors = []
    for i in range(grid.dim):
        basis = legendre.legvander(2.0 * local[..., i] - 1.0, q - 1) * (2.0 * np.arange(q) + 1.0)
        factors.append(basis @ to_gauss)
    factors[0] = factors[0] * weight[..., None]
    return owner, points_at(grid, cells[owner][:, None, :] + local), tuple(factors)


def _divided(problem: KolmogorovProblem, grid: Grid, cells: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rule for every cell, put together from smaller squares where breaks meet: the cell of a row, points, weights."""
    rows = []
    owner, corners, size = np.arange(len(cells)), np.zeros((len(cells), 2)), 1.0
    for depth in range(DEPTH + 1):
        points, weights, bend = _integrated(problem, grid, cells[owner], corners, size)
        divided = np.zeros(len(owner), dtype=bool)
        if depth < DEPTH:
            worst = np.argsort(-bend)[:WORST]
            divided[worst] = bend[worst] > MEETING
        rows.append((owner[~divided], points[~divided], weights[~divided]))
        if not divided.any():
            break
        size /= PARTS
        parts = size * np.stack(np.meshgrid(np.arange(PARTS), np.arange(PARTS), indexing="ij"), -1).reshape(-1, 2)
        corners = (corners[divided, None] + parts).reshape(-1, 2)
        owner = np.repeat(owner[divided], len(parts))
    together = [np.concatenate([row[i] for row in rows]) for i in range(3)]
    return together[0], together[1], together[2]


def _integrated(
    problem: KolmogorovProblem, grid: Grid, cells: np.ndarray, corners: np.ndarray, size: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rule on squares inside cells, in the cells' coordinates, and how far it is from that for a single break.

    Across a single break the mean over a line varies from line to line like a polynomial. Where breaks meet it bends:
    what a polynomial cannot follow, as a part of the range of φ, times the length of that part of the stack, is told.
    """
    local, weights = _across_breaks(problem, grid, cells + corners, size)
    points = corners[:, None] + size * local
    values = values_at(problem, grid, cells[:, None] + points)
    shape = (len(cells), 3, PANELS * STACK_POINTS, 2 * LINE_PANELS * LINE_POINTS)
    line = weights.reshape(shape).sum(3)
    sums = (weights[..., None] * values).reshape(*shape, -1).sum(3)
    means = sums / (np.ptp(values, axis=(0, 1)) + 1e-300) / np.maximum(line, 1e-300)[..., None]
    stack = _composite(np.linspace(-1.0, 1.0, PANELS + 1), STACK_POINTS)[0]
    basis = np.linalg.qr(legendre.legvander(stack, FOLLOWED))[0]
    left = means - np.einsum("si,ti,nptk->npsk", basis, basis, means)
    return points, size**2 * weights, (np.abs(left).max((2, 3)) * line.sum(2)).max(1)


def _across_breaks(
    problem: KolmogorovProblem, grid: Grid, corners: np.ndarray, size: float
) -> tuple[np.ndarray, np.ndarray]:
    """Iterated rule in two dimensions: lines across the break, split where they meet it, stacked along the other axis.

    For squares of the given corners (n, 2) and size, in node units; points and weights refer to the unit square. Where
    the break leaves the square through a side, the integrals along the lines have a kink: the stack is split where φ
    breaks along the two sides.
    """
    across = _steeper_axis(problem, grid, corners, size)
    unit = np.linspace(0.0, 1.0, PANELS + 1)
    lines, along_line = 3 * PANELS * STACK_POINTS, 2 * LINE_PANELS * LINE_POINTS
    points, weights = np.zeros((len(corners), lines * along_line, 2)), np.zeros((len(corners), lines * along_line))
    for inner in (0, 1):
        chosen = np.flatnonzero(across == inner)
        if len(chosen) == 0:
            continue
        home = corners[chosen]
        sides = []
        for side in (0.0, 1.0):

            def along(
                t: np.ndarray, rows: np.ndarray, side: float = side, home: np.ndarray = home, inner: int = inner
            ) -> np.ndarray:
                """Values of φ along a side of the cells."""
                parts = [np.full(t.shape, side) if i == inner else t for i in (0, 1)]
                return values_at(problem, grid, home[rows][:, None] + size * np.stack(parts, -1))

            sides.append(break_of(along, len(chosen)))
        low, high = np.minimum(*sides)[:, None], np.maximum(*sides)[:, None]
        edges = np.concatenate([low * unit, low + (high - low) * unit[1:], high + (1.0 - high) * unit[1:]], 1)
        t, v = _composite(edges, STACK_POINTS)
        local, weight = _lines(problem, grid, home, size, inner, t[..., None], deep=False)
        points[chosen] = local.reshape(len(chosen), -1, 2)
        weights[chosen] = (weight * v[..., None]).reshape(len(chosen), -1)
    return points, weights


def _steeper_axis(problem: KolmogorovProblem, grid: Grid, corners: np.ndarray, size: float) -> np.ndarray:
    """The axis along which φ varies more abruptly in each square."""
    s = np.linspace(0.03, 0.97, 7)
    mesh = np.stack(np.meshgrid(s, s, indexing="ij"), -1)
    values = values_at(problem, grid, corners[:, None, None, :] + size * mesh)
    steep = [np.abs(np.diff(values, 2, axis=1 + i)).max(axis=1 + i).sum(axis=(1, 2)) for i in (0, 1)]
    return np.asarray(np.where(steep[0] >= steep[1], 0, 1))


def _lines(
    problem: KolmogorovProblem,
    grid: Grid,
    corners: np.ndarray,
    size: float,
    axis: int,
    heights: np.ndarray,
    *,
    deep: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """Rule along lines through cells, split at their break: points (cells, lines, m, d) and weights (cells, lines, m).

    ``heights`` (cells, lines, 1) is the position along the other axis. Deep: one line a cell, many more panels.
    """
    count, lines = heights.shape[:2]

    home = np.repeat(corners, lines, axis=0)
    height = heights.reshape(-1, 1)

    def line(s: np.ndarray, rows: np.ndarray) -> np.ndarray:
        parts = [s if i == axis else np.broadcast_to(height[rows], s.shape) for i in range(grid.dim)]
        return np.stack(parts, -1)

    def values(s: np.ndarray, rows: np.ndarray) -> np.ndarray:
        return np.asarray(values_at(problem, grid, home[rows][:, None, :] + size * line(s, rows)))

    split = break_of(values, count * lines)
    panels = 16 if deep else LINE_PANELS
    unit = np.linspace(0.0, 1.0, panels + 1)
    if deep:  # panels that shrink towards the break, where a kink may be known only roughly
        unit = 1.0 - (1.0 - unit) ** 3
    left, right = split[:, None] * unit, 1.0 - (1.0 - split[:, None]) * unit
    edges = np.concatenate([left, right[:, ::-1][:, 1:]], 1)
    s, w = _composite(edges, 6 if deep else LINE_POINTS)
    points = line(s, np.arange(count * lines))
    return points.reshape(count, lines, -1, grid.dim), w.reshape(count, lines, -1)


def _composite(edges: np.ndarray, q: int) -> tuple[np.ndarray, np.ndarray]:
    """Composite Gauss points and weights for rows of panel edges (…, panels + 1)."""
    gauss, w = gauss_rule(q)
    widths = np.diff(edges, axis=-1)
    s = edges[..., :-1, None] + 0.5 * widths[..., None] * (gauss + 1.0)
    return s.reshape(*edges.shape[:-1], -1), (0.5 * widths[..., None] * w).reshape(*edges.shape[:-1], -1)
