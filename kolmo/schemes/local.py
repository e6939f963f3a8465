"""Coefficients of the equation at the nodes, in index units: the grid's spacing and map are divided out."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import numpy as np

from kolmo.arrays import Array, Held, Spread, as_like, as_numpy, fresh, namespace
from kolmo.grid import Grid
from kolmo.problem.problem import KolmogorovProblem, check_covariance, check_finite

TINY = 1e-300
# How far beside a break the coefficients of its two sides are read, as a part of the cells there.
ASIDE = 1e-8


@dataclass(frozen=True)
class Break:
    r"""Noise across a break of one axis, in index units, from its two sides.

    There u has one slope s and two second derivatives. With :math:`u''_\mp = E_\mp u \pm \alpha s` (E: differences that
    stay on one side) the equation of either side contains s with the factor :math:`\beta_\mp = A_\mp \pm
    \tfrac12\alpha S_\mp`; in the mean with weights λ and 1 − λ, :math:`\lambda\beta_- + (1 - \lambda)\beta_+ = 0`, it
    drops out. Of order two that is the harmonic mean of Σ.

    Attributes
    ----------
    axis : int
        Axis that the break is across.
    nodes : Held of int
        Nodes on the break.
    below, above : array, shape (nodes,)
        λ S from below, (1 − λ) S from above.
    """

    axis: int
    nodes: Held
    below: Array
    above: Array


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
    breaks : tuple of Break
        Where they jump or bend; on a break A, S, c and g are means of the two sides.
    """

    A: Array
    S: Array
    c: Array
    g: Array
    breaks: tuple[Break, ...] = ()


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
Means = Mapping[str, Callable[[float, Array], Array]]
"""Functions that are averaged around the nodes, as (t, nodes) → values."""


class Instead(NamedTuple):
    """What takes the place of values at nodes: averages, and ``limits(t, drift, covariance, killing, source)``.

    The latter puts in what holds at nodes where functions cannot be read.
    """

    means: Means
    limits: Limits | None = None


NOTHING = Instead({})


class _Breaks(NamedTuple):
    """The breaks of an axis, and the indices of the nodes on them."""

    grid: Grid
    axis: int
    nodes: np.ndarray


def local_coefficients(
    problem: KolmogorovProblem,
    grid: Grid,
    metric: Metric,
    t: float,
    x: Array,
    k: int,
    *,
    slope: float = 2.0,
    instead: Instead = NOTHING,
) -> Local:
    """Evaluate and check the coefficients at the nodes x at time t (x a tensor: with gradients).

    ``slope``: weight α of the slope in the scheme's one-sided second differences, for the mean at breaks. ``instead``:
    what takes the place of values at some nodes.
    """
    local = _local(problem, t, x, metric.like(x), k, instead)
    for axis in (i for i, a in enumerate(grid.axes) if a.breaks):
        local = _averaged(problem, _Breaks(grid, axis, break_nodes(grid, axis)), t, x, metric.like(x), local, slope)
    return local


def _local(
    problem: KolmogorovProblem, t: float, x: Array, maps: tuple[Array, Array], k: int, instead: Instead = NOTHING
) -> Local:
    """Coefficients at points x with the grid's map there."""
    (density, bend), (means, limits), sde, box = maps, instead, problem.sde, problem.box
    b = check_finite(means.get("drift", sde.drift)(t, x), x, t, "drift", box)
    S = means.get("covariance", sde.covariance)(t, x).reshape(*x.shape, x.shape[-1])
    S = check_covariance(S, x, t, box)
    c = check_finite(means.get("killing", problem.rate)(t, x), x, t, "killing", box)
    c = c[:, 0] if c.ndim == 2 else c
    g = source_at(problem, t, x, k, means)
    if limits is not None:
        b, S, c, g = limits(t, b, S, c, g)
    A = b * density - 0.5 * namespace(S).einsum("...ii->...i", S) * bend
    S = S * density[:, :, None] * density[:, None, :]
    return Local(A, S, c, g)


def source_at(problem: KolmogorovProblem, t: float, x: Array, k: int, means: Means | None = None) -> Array:
    """Evaluate and check the source, shape (size, k)."""
    g = check_finite((means or {}).get("source", problem.running)(t, x), x, t, "source", problem.box)
    return columns(g, k)


def _averaged(
    problem: KolmogorovProblem,
    breaks: _Breaks,
    t: float,
    x: Array,
    maps: tuple[Array, Array],
    local: Local,
    slope: float,
) -> Local:
    """The coefficients with those on the breaks of an axis replaced by the mean of both sides."""
    axis, nodes = breaks.axis, Held(breaks.nodes)
    where = nodes.like(x)
    there = maps[0][where], maps[1][where]
    sides = [_side(problem, breaks, t, x[where], there, local.g.shape[1], sign) for sign in (-1.0, 1.0)]
    (low, density), (high, density_above) = sides
    weight = _weight(sides, axis, slope)
    below, above = weight * low.S[:, axis, axis], (1.0 - weight) * high.S[:, axis, axis]

    def mean(name: str) -> Array:
        p, q = getattr(low, name), getattr(high, name)
        w = weight.reshape(-1, *([1] * (p.ndim - 1)))
        return w * p + (1.0 - w) * q

    A, S = fresh(mean("A")), fresh(mean("S"))
    # mixed derivatives take the mean of the slopes from both sides, in index units
    spacing, spacing_above = as_like(1.0 / density, x), as_like(1.0 / density_above, x)
    moved = 0.0 * below
    for j in (j for j in range(breaks.grid.dim) if j != axis):
        mixed = weight * low.S[:, axis, j] * spacing + (1.0 - weight) * high.S[:, axis, j] * spacing_above
        S[:, axis, j] = S[:, j, axis] = 2.0 * mixed / (spacing + spacing_above)
        moved = moved + 0.5 * abs(S[:, axis, j])
    # what a chain with exponentially fitted rates needs in order to leave at these two rates, less those of jumps that
    # are slanted (as they are where each axis has noise enough of its own)
    enough = (moved < below) & (moved < above)
    moved = namespace(below).where(enough, moved, 0.0 * moved)
    A[:, axis], S[:, axis, axis] = above - below, 2.0 * (_logarithmic_mean(below - moved, above - moved) + moved)
    parts = [
        put_rows(getattr(local, name), where, v) for name, v in (("A", A), ("S", S), ("c", mean("c")), ("g", mean("g")))
    ]
    found = Break(axis, nodes, below, above)
    return Local(parts[0], parts[1], parts[2], parts[3], (*local.breaks, found))


def _logarithmic_mean(p: Array, q: Array) -> Array:
    """(q − p) / log(q / p), and p where they agree; zero where one of them is."""
    xp = namespace(p, q)
    positive = (p > 0) & (q > 0)
    z = xp.where(
        positive, xp.log(xp.where(positive, q / xp.where(positive, p, as_like(1.0, p)), as_like(1.0, p))), 0.0 * p
    )
    near = abs(z) < 1e-3
    ratio = xp.expm1(z) / xp.where(near, as_like(1.0, p), z)
    return xp.where(positive, p * xp.where(near, 1.0 + z / 2.0 + z**2 / 6.0, ratio), 0.0 * p)


def _side(
    problem: KolmogorovProblem,
    breaks: _Breaks,
    t: float,
    x: Array,
    maps: tuple[Array, Array],
    k: int,
    sign: float,
) -> tuple[Local, np.ndarray]:
    """Coefficients at nodes on breaks of an axis as seen from one side, and the density of nodes there.

    Where breaks meet, the mean of the corners.
    """
    grid, axis, nodes = breaks
    along = grid.axes[axis]
    xi = along.xi[np.unravel_index(nodes, grid.shape)[axis]] + sign * ASIDE * along.h
    slope, bend = np.asarray(along.grading.slope(xi)), np.asarray(along.grading.bend(xi))
    density, bends = fresh(maps[0]), fresh(maps[1])
    density[:, axis], bends[:, axis] = as_like(1.0 / (slope * along.h), x), as_like(bend / (slope**3 * along.h), x)
    corners = [
        _local(problem, t, x + as_like(shift, x), (density, bends), k) for shift in shifts(grid, axis, nodes, sign)
    ]
    mean = Local(*(sum(getattr(corner, name) for corner in corners) / len(corners) for name in ("A", "S", "c", "g")))
    return mean, 1.0 / (slope * along.h)


def _weight(sides: Sequence[tuple[Local, np.ndarray]], axis: int, slope: float) -> Array:
    """Weight λ of the lower side at which the slope drops out of the mean of both sides' equations."""
    (low, density), (high, density_above) = sides
    xp = namespace(low.A, high.A, low.S, high.S)
    leaving = (low.A[:, axis] + 0.5 * slope * low.S[:, axis, axis]) / as_like(density, low.A)
    arriving = (0.5 * slope * high.S[:, axis, axis] - high.A[:, axis]) / as_like(density_above, high.A)
    # where cells are long for the drift the weights would leave [0, 1]
    leaving, arriving = xp.clip(leaving, 0.0, None), xp.clip(arriving, TINY, None)
    return arriving / (leaving + arriving)


def break_weights(problem: KolmogorovProblem, grid: Grid, axis: int, t: float, slope: float) -> np.ndarray:
    """Weights λ of the lower sides at the ``break_nodes`` of an axis at time t, for data that jump there too."""
    nodes, metric = break_nodes(grid, axis), Metric(grid)
    breaks = _Breaks(grid, axis, nodes)
    maps = metric.density[nodes], metric.bend[nodes]
    # no source enters the weights, however many columns it has
    sides = [_side(problem, breaks, t, grid.points[nodes], maps, 1, sign) for sign in (-1.0, 1.0)]
    return np.asarray(as_numpy(_weight(sides, axis, slope)))


def put_rows(values: Array, where: Array, those: Array) -> Array:
    """A copy with some rows replaced."""
    result = fresh(values + 0.0 * those.sum())  # in torch: with the gradients of both
    result[where] = those
    return result


def break_nodes(grid: Grid, axis: int) -> np.ndarray:
    """Indices of the nodes on the breaks of an axis."""
    index = np.arange(grid.size).reshape(grid.shape)
    return np.asarray(index.take(grid.axes[axis].breaks, axis=axis)).reshape(-1)


def shifts(grid: Grid, axis: int, nodes: np.ndarray, sign: float) -> Iterator[np.ndarray]:
    """Displacements (nodes, d) from breaks to one side of them; of breaks of other axes, to both sides in turn."""
    places = np.unravel_index(nodes, grid.shape)
    steps = np.zeros((len(nodes), grid.dim))
    for i, a in enumerate(grid.axes):
        if a.breaks:
            x = a.nodes
            cell = ASIDE * (x[np.minimum(places[i] + 1, a.n - 1)] - x[np.maximum(places[i] - 1, 0)])
            cell = np.maximum(cell, 4.0 * np.spacing(np.abs(x[places[i]])))
            steps[:, i] = np.where(np.isin(places[i], a.breaks), cell, 0.0)
    others = [i for i in range(grid.dim) if i != axis and (steps[:, i] > 0).any()]
    for signs in product((-1.0, 1.0), repeat=len(others)):
        factors = np.zeros(grid.dim)
        factors[axis], factors[others] = sign, signs
        yield steps * factors


def columns(g: Array, k: int) -> Array:
    """Values (n,), (n, 1) or (n, k) as (n, k)."""
    g = g[:, None] if g.ndim == 1 else g
    return g if g.shape[1] == k else g + as_like(np.zeros((1, k)), g)


def wall_nodes(grid: Grid, axis: int, side: int) -> np.ndarray:
    """Indices of the nodes on a face, in C order of the remaining axes."""
    index = np.arange(grid.size).reshape(grid.shape)
    return np.asarray(np.take(index, 0 if side == 0 else -1, axis=axis)).reshape(-1)


def wall_of(grid: Grid, axis: int, side: int) -> np.ndarray:
    """For every node, the node of the face that lies on its line along the axis, shape (size,)."""
    index = np.arange(grid.size).reshape(grid.shape)
    end = index.take([0 if side == 0 else grid.shape[axis] - 1], axis=axis)
    return np.asarray(np.broadcast_to(end, grid.shape)).reshape(-1)


def on_face(grid: Grid, axis: int, side: int) -> np.ndarray:
    """Mask of the nodes on a face, shape (size,)."""
    return np.isin(np.arange(grid.size), wall_nodes(grid, axis, side))
