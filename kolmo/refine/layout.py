"""The grid before its resolution: box that the process hardly leaves, map of each axis, nodes on breaks."""

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Self

import numpy as np

from kolmo.arrays import as_numpy
from kolmo.errors import InputError
from kolmo.grid import Axis, Grid
from kolmo.grid.grading import Focused, Grading, Pieces, Sinh, Uniform
from kolmo.problem import KolmogorovProblem
from kolmo.problem.box import Box
from kolmo.problem.reach import Reach, reach
from kolmo.refine.features import Feature
from kolmo.refine.samples import Room
from kolmo.refine.scout import AxisSight, Sight, scout
from kolmo.schemes.terminal import rough_places

# Nodes per axis of the first level, by dimension.
FIRST_NODES = {1: 41, 2: 21, 3: 15}
# Spreads that a box without a horizon counts as wide, as one that an unbounded process needs is.
SPREADS = 8.0
# A stretch between breaks gets so many cells at least on the first level, a gap between breaks of φ so many.
GAP_CELLS, MARK_CELLS = 8, 4

# Nodes along an axis when kinks and jumps of φ are looked for.
PROBE_NODES = 301
# A feature is worth a centre of its own where it needs so much more than the density there; an even axis is this wide
# an arsinh, in lengths.
WORTH, EVEN = 1.5, 2.0
# Part of the cells added on each open side to measure the cut, by dimension.
CUT_MARGIN = {1: 0.2, 2: 0.2, 3: 0.12}
# Half of the box over that of the core, from which on an axis is graded; and where an even axis has its own worth.
GRADED, GRADED_RATHER_THAN_EVEN = 1.2, 2.0


@dataclass(frozen=True)
class Layout:
    """Box, maps and proportions: everything about the grid but the resolution n.

    Attributes
    ----------
    box : Box
        Finite box.
    gradings : tuple of Grading
        Map of each axis.
    shares : tuple of float
        Nodes of each axis at resolution 1.
    places : tuple of (float or None)
        Per axis, the one place where φ breaks. A node is put there: where noise does not smooth a kink at once, as at
        the degenerate end of Heston's equation, errors of order two come and go with its place in the cell.
    breaks : tuple of tuple of float
        Per axis, places where coefficients jump or bend: each gets a node that no difference reaches across.
    """

    box: Box
    gradings: tuple[Grading, ...]
    shares: tuple[float, ...]
    places: tuple[float | None, ...]
    breaks: tuple[tuple[float, ...], ...] = ()

    @classmethod
    def even(cls, box: Box, gradings: tuple[Grading, ...]) -> "Layout":
        """As many nodes along every axis, wherever they fall."""
        return cls(box, gradings, (1.0,) * box.dim, (None,) * box.dim)

    def grid(self, n: float, least: int) -> Grid:
        """Grid of resolution n; ``least`` nodes along an axis, and between breaks of one."""
        axes = []
        for i, (share, grading, place) in enumerate(zip(self.shares, self.gradings, self.places, strict=True)):
            count, breaks = max(round(n * share), least), self.breaks[i] if self.breaks else ()
            if breaks:
                axes.append(pieced(grading, breaks, count, least, self.box.periodic[i]))
                continue
            if place is not None and isinstance(grading, Sinh | Focused):
                grading = grading.aligned(place, count)
            axes.append(Axis(count, grading, self.box.periodic[i]))
        return Grid(axes)

    def evened(self) -> "Layout":
        """Uniform axes where grading wins little: constant coefficients remain constant between the nodes."""
        gradings = tuple(
            Uniform(g.lower, g.upper)
            if isinstance(g, Sinh) and max(g.upper - g.centre, g.centre - g.lower) < GRADED_RATHER_THAN_EVEN * g.width
            else g
            for g in self.gradings
        )
        return replace(self, gradings=gradings)

    def widened(self, grid: Grid) -> tuple[Self, Grid]:
        """The same nodes and some more beyond every open face."""
        wider = widened(grid, self.box)
        shares = tuple(share * a.n / b.n for share, a, b in zip(self.shares, wider.axes, grid.axes, strict=True))
        gradings = tuple(a.grading.base if isinstance(a.grading, Pieces) else a.grading for a in wider.axes)
        return replace(self, box=self.box.replace(*wider.box), gradings=gradings, shares=shares), wider


def widened(grid: Grid, box: Box, part: float | None = None, least: int = 3) -> Grid:
    """The same nodes and some more beyond every open face: a part of those of the axis."""
    axes = []
    for axis, pair in zip(grid.axes, box.faces, strict=True):
        more = max(least, math.ceil((part or CUT_MARGIN[grid.dim]) * axis.n))
        low, high = (more if face.cut else 0 for face in pair)
        cells = axis.n - (0 if axis.periodic else 1) + low + high
        wide = axis.grading.extended(low / cells, high / cells)
        axes.append(Axis(axis.n + low + high, wide, axis.periodic, tuple(b + low for b in axis.breaks)))
    return Grid(axes)


def pieced(grading: Grading, breaks: tuple[float, ...], count: int, least: int, periodic: bool) -> Axis:
    """Axis with a node on every break, about ``count`` nodes, and at least ``least`` of them in every piece."""
    inside = tuple(b for b in breaks if grading.lower < b < grading.upper)
    ends = np.array([0.0, *(float(grading.inverse(np.float64(b))) for b in inside), 1.0])
    cells = np.maximum(np.round(np.diff(ends) * (count - 1)).astype(int), least - 1)
    nodes = np.cumsum(cells)[:-1]
    knots = tuple((nodes / cells.sum()).tolist())
    total = int(cells.sum()) + (0 if periodic else 1)
    return Axis(total, Pieces(grading, inside, knots) if inside else grading, periodic, tuple(nodes.tolist()))


def first_layout(
    problem: KolmogorovProblem, points: np.ndarray, tail: float, rtol: float, atol: float = 0.0
) -> tuple[Layout, Sight]:
    """Box that the process from the points hardly leaves, fine where it spends its time and where the data ask for it.

    With it what was seen of the data.
    """
    box = problem.box
    bounded = np.isfinite(box.lower).all() and np.isfinite(box.upper).all()
    horizon = problem.horizon
    if horizon is None:
        if not bounded:
            raise InputError("box", box, "a finite box for a stationary problem")
        gradings: tuple[Grading, ...] = tuple(Uniform(a, b) for a, b in zip(box.lower, box.upper, strict=True))
        layout, cloud = Layout.even(box, gradings), None
    else:
        cloud = reach(problem.sde, points, horizon, within=box)
        layout = _reached(problem, points, cloud, tail)
    sight = scout(problem, _room(problem, layout, cloud), rtol, atol)
    if cloud is not None:
        layout = _focused(problem, layout, cloud, sight)
        sight = replace(sight, exploded=cloud.exploded)
    return _seen(problem, layout, sight), sight


def _reached(problem: KolmogorovProblem, points: np.ndarray, cloud: Reach, tail: float) -> Layout:
    """Box and maps for where the process goes."""
    box = problem.box
    opened = box.where("cut")
    low, high = cloud.interval(tail)
    core_low, core_high = cloud.low - 2.0 * cloud.spread_low, cloud.high + 2.0 * cloud.spread_high
    given_low, given_high = np.array(box.lower), np.array(box.upper)
    low = np.where(opened[:, 0], np.where(np.isfinite(given_low), np.minimum(low, given_low), low), given_low)
    high = np.where(opened[:, 1], np.where(np.isfinite(given_high), np.maximum(high, given_high), high), given_high)
    reach_box = box.replace(low, high)
    gradings = tuple(_grading(problem, points, i, reach_box, core_low[i], core_high[i]) for i in range(problem.dim))
    return Layout.even(reach_box, gradings)


def _room(problem: KolmogorovProblem, layout: Layout, cloud: Reach | None) -> Room:
    """Where the process goes, for the scout."""
    low, high = np.array(layout.box.lower), np.array(layout.box.upper)
    nodes = FIRST_NODES[problem.dim]
    if cloud is not None:
        spread = np.maximum(0.5 * (cloud.spread_low + cloud.spread_high), (high - low) / (10.0 * SPREADS))
        return Room(layout.gradings, nodes, cloud.low, cloud.high, spread, problem.horizon or 0.0)
    spread = (high - low) / SPREADS
    middle = 0.5 * (low + high)[None]
    noise = np.einsum("ii->i", as_numpy(problem.sde.covariance(0.0, middle))[0])
    drift = np.abs(as_numpy(problem.sde.drift(0.0, middle))[0])
    rate = float((noise / spread**2 + drift / spread).max())
    return Room(layout.gradings, nodes, low, high, spread, 1.0 / rate if np.isfinite(rate) and rate > 0 else 1.0)


def _seen(problem: KolmogorovProblem, layout: Layout, sight: Sight) -> Layout:
    """The layout with nodes where the data ask for them."""
    gradings, shares, places, breaks = list(layout.gradings), list(layout.shares), list(layout.places), []
    for i, seen in enumerate(sight.axes):
        mine = interfaces(problem, layout.box, i, seen)
        breaks.append(mine)
        gradings[i], share = _with_features(layout.gradings[i], _all_features(layout, i, seen, mine), problem.dim)
        shares[i] *= share
        if mine:
            places[i] = None
    return replace(layout, gradings=tuple(gradings), shares=tuple(shares), places=tuple(places), breaks=tuple(breaks))


def interfaces(problem: KolmogorovProblem, box: Box, axis: int, seen: AxisSight) -> tuple[float, ...]:
    """Breaks that differences may not reach across: of coefficients, and then of φ too, where there is noise across."""
    if not seen.breaks or problem.sde.noiseless:
        return ()
    middle = np.array([0.5 * (a + b) for a, b in zip(box.lower, box.upper, strict=True)])
    found = []
    for place in sorted({*seen.breaks, *seen.marks}):
        sides = np.stack([middle, middle])
        step = 1e-6 * (box.upper[axis] - box.lower[axis])
        sides[:, axis] = place - step, place + step
        noise = as_numpy(problem.sde.covariance(0.5 * (problem.horizon or 0.0), sides))[:, axis, axis]
        if (noise > 0).all() and box.lower[axis] + step < place < box.upper[axis] - step:
            found.append(place)
    return tuple(found)


def _all_features(layout: Layout, axis: int, seen: AxisSight, breaks: tuple[float, ...]) -> list[Feature]:
    """Features seen, and gaps between breaks that lie close together."""
    features = list(seen.features)
    for places, cells in ((breaks, GAP_CELLS), (seen.marks, MARK_CELLS)):
        for p, q in pairwise(places):
            if p in breaks and q in breaks and places is seen.marks:
                continue
            features.append(Feature(0.5 * (p + q), 0.5 * (q - p), (q - p) / cells))
    return features


def _with_features(grading: Grading, features: list[Feature], dim: int) -> tuple[Grading, float]:
    """The map with more nodes around features, and by how much the number of nodes grows."""
    if not features:
        return grading, 1.0
    cells = FIRST_NODES[dim] - 1
    centres, widths, weights = _as_sum(grading, cells)
    for feature in features:
        density = 1.0 / feature.spacing
        here = sum(a / math.hypot(w, feature.centre - c) for c, w, a in zip(centres, widths, weights, strict=True))
        if density > WORTH * here:
            centres.append(feature.centre)
            widths.append(feature.width)
            weights.append((density - here) * feature.width)
    if len(centres) == 1:
        return grading, 1.0
    focused = Focused(grading.lower, grading.upper, tuple(centres), tuple(widths), tuple(weights))
    low, high = focused.ends
    return focused, (high - low) / cells


def _as_sum(grading: Grading, cells: int) -> tuple[list[float], list[float], list[float]]:
    """A map as the first centre, width and weight of a sum of arsinh that counts its cells."""
    if isinstance(grading, Sinh):
        centre, width = grading.centre, grading.width
    else:
        centre, width = 0.5 * (grading.lower + grading.upper), EVEN * (grading.upper - grading.lower)
    whole = math.asinh((grading.upper - centre) / width) - math.asinh((grading.lower - centre) / width)
    return [centre], [width], [cells / whole]


def _grading(
    problem: KolmogorovProblem, points: np.ndarray, axis: int, box: Box, core_low: float, core_high: float
) -> Grading:
    """Uniform where the core fills the box, sinh-graded around it otherwise; around a natural end inside the core."""
    low, high = box.lower[axis], box.upper[axis]
    if box.periodic[axis]:
        return Uniform(low, high)
    core_low, core_high = max(core_low, low), min(core_high, high)
    centre, width = 0.5 * (core_low + core_high), 0.5 * (core_high - core_low)
    ends = [end for end, face in zip((low, high), box.faces[axis], strict=True) if face.degenerate]
    near = [end for end in ends if core_low <= end <= core_high and _square_root(problem, points, axis, end)]
    if len(near) == 1 and high - low > 4.0 * width:
        # noise dies at the end: the solution varies on the scale of the distance of the points from it
        distance = np.abs(points[:, axis] - near[0])
        scale = float(np.min(distance, initial=width, where=distance > 1e-3 * width))
        return Sinh(low, high, near[0], min(max(scale, 0.1 * width), width))
    if width <= 0 or max(high - centre, centre - low) < GRADED * width:
        return Uniform(low, high)
    return Sinh(low, high, centre, width)


def _square_root(problem: KolmogorovProblem, points: np.ndarray, axis: int, end: float) -> bool:
    """Whether the noise dies like a square root at an end: Σ is halved where the distance is (CIR, Wright–Fisher)."""
    halfway = points.copy()
    halfway[:, axis] = 0.5 * (points[:, axis] + end)
    full, half = (as_numpy(problem.sde.covariance(0.0, x))[:, axis, axis] for x in (points, halfway))
    return bool((half > 0.35 * full).any() and (full > 0).any())


def _focused(problem: KolmogorovProblem, layout: Layout, cloud: Reach, sight: Sight) -> Layout:
    """Centre an axis on the kinks or jumps of φ where they keep to one place, one standard deviation wide."""
    gradings, places = list(layout.gradings), list(layout.places)
    for i, grading in enumerate(layout.gradings):
        spread = 0.5 * float(cloud.spread_low[i] + cloud.spread_high[i])
        if not isinstance(grading, Sinh) or grading.centre in (grading.lower, grading.upper) or spread == 0.0:
            continue
        marks = np.array(sight.axes[i].marks)
        if not len(marks) and "terminal" in (*sight.slanted, *sight.crowded):  # breaks that do not run along the others
            marks = rough_places(problem, Grid.of(layout.box, _probe_shape(problem.dim, i), layout.gradings), i)
        elif len(marks) == 1:
            places[i] = float(marks[0])
        if len(marks) and np.ptp(marks) <= spread and grading.lower < marks.mean() < grading.upper:
            gradings[i] = Sinh(grading.lower, grading.upper, float(marks.mean()), min(grading.width, spread))
        else:
            places[i] = layout.places[i]
    return replace(layout, gradings=tuple(gradings), places=tuple(places))


def _probe_shape(dim: int, axis: int) -> list[int]:
    """Nodes of a grid that is fine along one axis."""
    return [PROBE_NODES if j == axis else 5 for j in range(dim)]
