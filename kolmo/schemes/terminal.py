"""Terminal data on the grid: point values where they are smooth, a smoothing kernel where they have kinks or jumps."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse as sp
from numpy.polynomial import legendre

from kolmo.arrays import Array, Spread, as_like, as_numpy, is_tensor, namespace
from kolmo.box import Box, Entrance, Reflecting, Robin
from kolmo.grid import Grid
from kolmo.problem import KolmogorovProblem, check_finite
from kolmo.schemes.differences import slope_weight
from kolmo.schemes.local import break_nodes, break_weights, put_rows, shifts

if TYPE_CHECKING:
    from scipy.interpolate import BSpline

# Coefficients of the centred differences δ⁰, δ², δ⁴ that turn the B-spline into a kernel of the order (Kreiss, Thomée
# & Widlund 1970): with s = sin(ω/2), δ² = −4s², the factors are 1, 1 + ⅔s², 1 + s² + (13/15)s⁴.
CORRECTIONS = {2: (1.0,), 4: (1.0, -1.0 / 6.0), 6: (1.0, -1.0 / 4.0, 13.0 / 240.0)}

# A fourth difference that shrinks by less than this factor when the spacing is halved is not that of smooth data
# (smooth 1/16, kink 1/2, jump 1), unless it is below the floor, relative to the largest value.
SHRINK, FLOOR = 0.15, 1e-7

# In two dimensions rough cells are sampled along lines: Gauss panels (and points in each) between the breaks of the
# stack of lines, and on either side of a line's own break.
PANELS, STACK_POINTS = 3, 4
LINE_PANELS, LINE_POINTS = 2, 3
# A square in which breaks meet is told from others by what a polynomial of this degree cannot follow, and is divided
# into so many parts a side, so many times; not more squares at a time than these (the worst).
FOLLOWED, MEETING, PARTS, DEPTH, WORST = 5, 1e-5, 4, 3, 40
# Distance from the faces of a cell, as a part of it, from which on a break counts as inside.
MARGIN = 1e-6
# Divisions of an interval into four that locate a jump to rounding.
DIVISIONS = 14
# Times at most that one looks closer at a kink to locate it, and the change, in cells, at which it is found.
CLOSER, FOUND = 5, 1e-9


@lru_cache(maxsize=8)
def kernel(order: int) -> "BSpline":
    """Smoothing kernel of an order on unit spacing, as a piecewise polynomial; integrates to one.

    Examples
    --------
    >>> round(float(kernel(4).integrate(-3, 3)), 12)
    1.0
    """
    from scipy.interpolate import BSpline  # not with the package: it takes a quarter of the time of its import

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


@lru_cache(maxsize=16)
def _gauss(q: int) -> tuple[np.ndarray, np.ndarray]:
    """Gauss points on [−1, 1] and their weights; not to be changed."""
    return legendre.leggauss(q)


def support(order: int) -> int:
    """Half-width of the kernel in cells."""
    return order // 2 + len(CORRECTIONS[order]) - 1


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
        smooth = self._lattice_values(problem, x)
        shape = [len(v) for v in self.lattice]
        for i, matrix in enumerate(self.smoothing):
            smooth = _multiply_along(matrix, smooth, shape, i)
            shape[i] = matrix.shape[0]
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
        gathered = _multiply_along(self._gather, projected, [rows], 0)
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
        return {
            "order": self.order,
            "touched": self.touched,
            "lattice": list(self.lattice),
            "smoothing": [_sparse_record(m) for m in self.smoothing],
            "rough": self.rough,
            "owner": self.owner,
            "points": self.points,
            "weights": list(self.weights),
            "met": self.met,
            "beside": self.beside,
            "shares": self.shares,
        }

    @classmethod
    def from_record(cls, grid: Grid, tree: dict[str, Any]) -> "TerminalRule":
        """Rebuild a rule from its record."""
        parts = dict(tree)
        parts["smoothing"] = tuple(_sparse_from(m) for m in tree["smoothing"])
        parts["lattice"], parts["weights"] = tuple(tree["lattice"]), tuple(tree["weights"])
        return cls(grid, **parts)

    @property
    def smoothed(self) -> bool:
        """Whether anything is smoothed."""
        return len(self.touched) > 0


def _sparse_record(matrix: sp.csr_matrix) -> dict[str, Any]:
    return {"data": matrix.data, "indices": matrix.indices, "indptr": matrix.indptr, "shape": list(matrix.shape)}


def _sparse_from(tree: dict[str, Any]) -> sp.csr_matrix:
    return sp.csr_matrix((tree["data"], tree["indices"], tree["indptr"]), shape=tuple(tree["shape"]))


def _multiply_along(matrix: sp.csr_matrix, values: Array, shape: list[int], axis: int) -> Array:
    """Sparse matrix applied along one axis of a flat field of the given shape (and columns)."""
    outer = int(np.prod(shape[:axis]))
    view = values.reshape(outer, shape[axis], -1)
    if is_tensor(values):
        return as_like(matrix.toarray(), values) @ view
    moved = np.moveaxis(view, 1, 0).reshape(shape[axis], -1)
    result = (matrix @ moved).reshape(matrix.shape[0], outer, -1)
    return np.ascontiguousarray(np.moveaxis(result, 0, 1))


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
        return _final(problem, grid, np.insert(rest.astype(float), i, along, axis=-1))

    low, high = first.astype(float), last.astype(float)
    place = np.full(len(others), np.inf)
    for _ in range(CLOSER):  # a kink is found the better the closer one looks, a jump at once
        before, place = place, low + _break(values, len(others)) * (high - low)
        if np.abs(place - before).max() < FOUND:
            break
        low, high = np.maximum(place - 0.1 * (high - low), 0.0), np.minimum(place + 0.1 * (high - low), len(columns))
    if np.ptp(place) > 1e-4:
        return None
    return float(grid.axes[i].grading(np.median(place) * grid.axes[i].h))


def plan_terminal(problem: KolmogorovProblem, grid: Grid, box: Box, order: int) -> TerminalRule:
    """Find where φ is rough on the grid's scale and lay out the smoothing there."""
    met, beside, shares = _on_breaks(problem, grid, order)
    rough = _rough_cells(problem, grid)
    if order not in CORRECTIONS or not rough.any():
        return TerminalRule(grid, order, np.zeros(0, dtype=int), met=met, beside=beside, shares=shares)
    near = _near(rough, grid, support(order))
    touched = np.flatnonzero(near.reshape(-1))
    gauss = 0.5 * (_gauss(order)[0] + 1.0)
    lattice, smoothing, kept = [], [], []
    for i, axis in enumerate(grid.axes):
        position = (np.arange(rough.shape[i])[:, None] + gauss).reshape(-1)
        ends = [] if axis.periodic else [0.0, float(axis.n - 1)]
        odd = tuple(not isinstance(face, (Reflecting, Robin, Entrance)) for face in box.faces[i])
        matrix = _smoothing(axis.n, axis.periodic, odd, order)
        # only what the touched nodes see: φ is evaluated there
        rows = near.any(axis=tuple(j for j in range(grid.dim) if j != i))
        seen = np.unique(matrix[rows].indices) if grid.dim > 1 else np.arange(matrix.shape[1])
        lattice.append(np.asarray(axis.grading(np.concatenate([position, ends])[seen] * axis.h)))
        smoothing.append(matrix[:, seen] if grid.dim > 1 else matrix)
        kept.append(seen)
    # in three dimensions the lattice itself has to do: projecting every rough cell would cost more than it gains
    cells = np.stack(np.nonzero(rough if grid.dim < 3 else np.zeros_like(rough)), -1)
    if not _crossed(problem, grid, cells):
        cells = cells[:0]
    owner, points, weights = _samples(problem, grid, cells, order)
    index = _lattice_index(cells, kept, order)
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


def _cells(grid: Grid) -> tuple[int, ...]:
    return tuple(a.n if a.periodic else a.n - 1 for a in grid.axes)


def _rough_cells(problem: KolmogorovProblem, grid: Grid) -> np.ndarray:
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


def _near(rough: np.ndarray, grid: Grid, reach: int) -> np.ndarray:
    """Nodes whose kernel touches a rough cell."""
    near = rough
    for i, axis in enumerate(grid.axes):
        spread = np.zeros([axis.n if j == i else s for j, s in enumerate(near.shape)], dtype=bool)
        moved = np.moveaxis(spread, i, 0)
        source = np.moveaxis(near, i, 0)
        for r in range(-reach, reach):  # node j sees cells j − reach … j + reach − 1
            if axis.periodic:
                moved |= np.roll(source, -r, axis=0)
            else:
                first, last = max(0, -r), min(axis.n, len(source) - r)
                moved[first:last] |= source[first + r : last + r]
        near = spread
    return near


@lru_cache(maxsize=64)
def _smoothing(n: int, periodic: bool, odd: tuple[bool, bool], order: int) -> sp.csr_matrix:
    """Kernel × Gauss weights from the lattice of one axis to its n nodes, folded back at the ends; not to be changed.

    φ is extended oddly about its value at the faces, or evenly beyond walls, where the slope vanishes.
    """
    reach, q, cells = support(order), order, n if periodic else n - 1
    s, w = _gauss(q)
    relative = np.arange(-reach, reach)
    weights = 0.5 * w * kernel(order)(relative[:, None] + 0.5 * (s + 1.0))
    cell = np.arange(n)[:, None] + relative
    below, above = cell < 0, cell >= cells
    data = np.broadcast_to(weights, (n, 2 * reach, q)).copy()
    point = np.broadcast_to(np.arange(q), data.shape).copy()
    if periodic:
        columns = (cell % cells)[:, :, None] * q + point
        return sp.csr_matrix((data.reshape(-1), (np.repeat(np.arange(n), 2 * reach * q), columns.reshape(-1))))
    mass = weights.sum(1)
    ends = np.stack([2.0 * (outside * mass).sum(1) * o for outside, o in zip((below, above), odd, strict=True)], 1)
    data[(below & odd[0]) | (above & odd[1])] *= -1.0
    point[below | above] = np.arange(q)[::-1]
    folded = np.clip(np.where(below, -1 - cell, np.where(above, 2 * cells - 1 - cell, cell)), 0, cells - 1)
    columns = folded[:, :, None] * q + point
    inner = sp.csr_matrix(
        (data.reshape(-1), (np.repeat(np.arange(n), 2 * reach * q), columns.reshape(-1))), shape=(n, cells * q)
    )
    return sp.csr_matrix(sp.hstack([inner, sp.csr_matrix(ends)]))


def _crossed(problem: KolmogorovProblem, grid: Grid, cells: np.ndarray) -> bool:
    """Whether φ breaks inside one of the cells: where it does on their faces only, the lattice's points do."""
    if len(cells) == 0:
        return False
    along = np.linspace(MARGIN, 1.0 - MARGIN, 9)
    mesh = np.stack(np.meshgrid(*[along] * grid.dim, indexing="ij"), -1)
    values = _final(problem, grid, cells.reshape(-1, *[1] * grid.dim, grid.dim) + mesh)
    values = np.moveaxis(values / (np.abs(values).max(axis=tuple(range(grid.dim + 1))) + 1e-300), 0, -1)
    for i in range(grid.dim):
        line = np.moveaxis(values, i, 0)
        # lines beside each other: all but the cells, which are last, go into the maximum
        small, large = (np.abs(np.diff(v, 4, axis=0)).max(tuple(range(grid.dim + 1))) for v in (line, line[::2]))
        if ((small > SHRINK * large) & (small > FLOOR)).any():
            return True
    return False


def _lattice_index(cells: np.ndarray, kept: list[np.ndarray], q: int) -> np.ndarray:
    """Flat indices of the Gauss points of cells among the lattice points kept of each axis, shape (cells, q^d)."""
    index = np.zeros((len(cells), 1), dtype=int)
    size = 1
    for i, seen in enumerate(kept):
        size *= q
        along = np.searchsorted(seen, cells[:, i, None] * q + np.arange(q))
        index = (index[:, :, None] * len(seen) + along[:, None, :]).reshape(len(cells), size)
    return index


def _samples(
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
    gauss = _gauss(q)[0]
    to_gauss = legendre.legvander(gauss, q - 1).T
    factors = []
    for i in range(grid.dim):
        basis = legendre.legvander(2.0 * local[..., i] - 1.0, q - 1) * (2.0 * np.arange(q) + 1.0)
        factors.append(basis @ to_gauss)
    factors[0] = factors[0] * weight[..., None]
    return owner, _to_x(grid, cells[owner][:, None, :] + local), tuple(factors)


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
    values = _final(problem, grid, cells[:, None] + points)
    shape = (len(cells), 3, PANELS * STACK_POINTS, 2 * LINE_PANELS * LINE_POINTS)
    line = weights.reshape(shape).sum(3)
    sums = (weights[..., None] * values).reshape(*shape, -1).sum(3)
    means = sums / (np.ptp(values, axis=(0, 1)) + 1e-300) / np.maximum(line, 1e-300)[..., None]
    stack = _composite(np.linspace(-1.0, 1.0, PANELS + 1), STACK_POINTS)[0]
    basis = np.linalg.qr(legendre.legvander(stack, FOLLOWED))[0]
    left = means - np.einsum("si,ti,nptk->npsk", basis, basis, means)
    return points, size**2 * weights, (np.abs(left).max((2, 3)) * line.sum(2)).max(1)


def _composite(edges: np.ndarray, q: int) -> tuple[np.ndarray, np.ndarray]:
    """Composite Gauss points and weights for rows of panel edges (…, panels + 1)."""
    gauss, w = _gauss(q)
    widths = np.diff(edges, axis=-1)
    s = edges[..., :-1, None] + 0.5 * widths[..., None] * (gauss + 1.0)
    return s.reshape(*edges.shape[:-1], -1), (0.5 * widths[..., None] * w).reshape(*edges.shape[:-1], -1)


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
                return _final(problem, grid, home[rows][:, None] + size * np.stack(parts, -1))

            sides.append(_break(along, len(chosen)))
        low, high = np.minimum(*sides)[:, None], np.maximum(*sides)[:, None]
        edges = np.concatenate([low * unit, low + (high - low) * unit[1:], high + (1.0 - high) * unit[1:]], 1)
        t, v = _composite(edges, STACK_POINTS)
        local, weight = _lines(problem, grid, home, size, inner, t[..., None], deep=False)
        points[chosen] = local.reshape(len(chosen), -1, 2)
        weights[chosen] = (weight * v[..., None]).reshape(len(chosen), -1)
    return points, weights


def _final(problem: KolmogorovProblem, grid: Grid, position: np.ndarray) -> np.ndarray:
    """Values of φ, shape (…, k), at positions (…, d) in node units."""
    values = as_numpy(problem.final(_to_x(grid, position).reshape(-1, grid.dim)))
    return np.asarray(values.reshape(*position.shape[:-1], -1))


def _steeper_axis(problem: KolmogorovProblem, grid: Grid, corners: np.ndarray, size: float) -> np.ndarray:
    """The axis along which φ varies more abruptly in each square."""
    s = np.linspace(0.03, 0.97, 7)
    mesh = np.stack(np.meshgrid(s, s, indexing="ij"), -1)
    values = _final(problem, grid, corners[:, None, None, :] + size * mesh)
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
        return np.asarray(_final(problem, grid, home[rows][:, None, :] + size * line(s, rows)))

    split = _break(values, count * lines)
    panels = 16 if deep else LINE_PANELS
    unit = np.linspace(0.0, 1.0, panels + 1)
    if deep:  # panels that shrink towards the break, where a kink may be known only roughly
        unit = 1.0 - (1.0 - unit) ** 3
    left, right = split[:, None] * unit, 1.0 - (1.0 - split[:, None]) * unit
    edges = np.concatenate([left, right[:, ::-1][:, 1:]], 1)
    s, w = _composite(edges, 6 if deep else LINE_POINTS)
    points = line(s, np.arange(count * lines))
    return points.reshape(count, lines, -1, grid.dim), w.reshape(count, lines, -1)


def _break(values: Any, count: int) -> np.ndarray:
    """Where functions on [0, 1] jump or bend most, shape (count,): bracketed by samples, closed in by division.

    ``values(s, rows)`` gives the functions of the given rows at points s (rows, m).
    """
    samples, quarters = np.linspace(0.0, 1.0, 14), np.linspace(0.0, 1.0, 5)
    f = values(np.broadcast_to(samples, (count, len(samples))), np.arange(count))
    steps = np.abs(np.diff(f, axis=1)).sum(-1)
    bends = np.abs(np.diff(f, 2, axis=1)).sum(-1)
    split = _vertex(samples, f, bends)
    # a jump stands out among the steps between samples beside it, a bend does not
    padded = np.pad(steps, ((0, 0), (1, 1)))
    peak, every = steps.argmax(1), np.arange(count)
    beside = np.maximum(padded[every, peak], padded[every, peak + 2])
    rows = np.flatnonzero(steps.max(1) > 3.0 * beside + FLOOR * np.abs(f).max(initial=0.0))
    first = steps[rows].argmax(1)
    a, b = samples[first], samples[first + 1]
    for _ in range(2):
        # looked at more closely, a jump is still one step, a steep slope is many
        fine = a[:, None] + (b - a)[:, None] * np.linspace(0.0, 1.0, 7)
        g = values(fine, rows) if len(rows) else np.zeros((0, 7, 1))
        parts = np.abs(np.diff(g, axis=1)).sum(-1)
        sharp = parts.max(1, initial=0.0) > 0.7 * parts.sum(1)
        rows, fine, g, peak = rows[sharp], fine[sharp], g[sharp], parts.argmax(1)[sharp]
        every = np.arange(len(rows))
        a, b, fa, fb = fine[every, peak], fine[every, peak + 1], g[every, peak], g[every, peak + 1]
    for _ in range(DIVISIONS if len(rows) else 0):
        fine = a[:, None] + (b - a)[:, None] * quarters
        g = np.concatenate([fa[:, None], values(fine[:, 1:-1], rows), fb[:, None]], 1)
        peak = np.abs(np.diff(g, axis=1)).sum(-1).argmax(1)
        a, b, fa, fb = fine[every, peak], fine[every, peak + 1], g[every, peak], g[every, peak + 1]
    split[rows] = 0.5 * (a + b)
    return np.asarray(np.clip(split, 1e-12, 1.0 - 1e-12))


def _vertex(samples: np.ndarray, f: np.ndarray, bends: np.ndarray) -> np.ndarray:
    """Where the lines through the two samples on either side of the sharpest bend meet."""
    rows, h = np.arange(len(f)), samples[1] - samples[0]
    middle = np.clip(1 + bends.argmax(1), 2, len(samples) - 3)
    column = np.abs(np.diff(f, 2, axis=1)).max(1).argmax(1)
    # the bend may lie on either side of the sample: take slopes one sample away
    g = [f[rows, middle + m, column] for m in (-2, -1, 1, 2)]
    left, right = (g[1] - g[0]) / h, (g[3] - g[2]) / h
    with np.errstate(divide="ignore", invalid="ignore"):
        offset = ((g[2] - right * h) - (g[1] + left * h)) / (left - right)
    return np.asarray(np.where(np.abs(offset) <= 2 * h, samples[middle] + offset, samples[middle]))


def _to_x(grid: Grid, position: np.ndarray) -> np.ndarray:
    """Positions in node units → points."""
    parts = [np.asarray(a.grading(position[..., i] * a.h)) for i, a in enumerate(grid.axes)]
    return np.stack(parts, -1)
