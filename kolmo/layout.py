"""The grid before its resolution: box that the process hardly leaves, map of each axis, a node on breaks of φ."""

import math
from dataclasses import dataclass, replace

import numpy as np

from kolmo.arrays import as_numpy
from kolmo.box import Box, Natural, Open
from kolmo.errors import InputError
from kolmo.grading import Grading, Sinh, Uniform
from kolmo.grid import Axis, Grid
from kolmo.problem import KolmogorovProblem
from kolmo.reach import Reach, reach
from kolmo.schemes.terminal import common_break, rough_places

# Nodes along an axis when kinks and jumps of φ are looked for.
PROBE_NODES = 301
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
    """

    box: Box
    gradings: tuple[Grading, ...]
    shares: tuple[float, ...]
    places: tuple[float | None, ...]

    @classmethod
    def even(cls, box: Box, gradings: tuple[Grading, ...]) -> "Layout":
        """As many nodes along every axis, wherever they fall."""
        return cls(box, gradings, (1.0,) * box.dim, (None,) * box.dim)

    def grid(self, n: float, least: int) -> Grid:
        """Grid of resolution n."""
        counts = [max(round(n * share), least) for share in self.shares]
        gradings = [
            grading.aligned(place, count) if place is not None and isinstance(grading, Sinh) else grading
            for grading, place, count in zip(self.gradings, self.places, counts, strict=True)
        ]
        return Grid.of(self.box, counts, gradings)

    def evened(self) -> "Layout":
        """Uniform axes where grading wins little: constant coefficients remain constant between the nodes."""
        gradings = tuple(
            Uniform(g.lower, g.upper)
            if isinstance(g, Sinh) and max(g.upper - g.centre, g.centre - g.lower) < GRADED_RATHER_THAN_EVEN * g.width
            else g
            for g in self.gradings
        )
        return replace(self, gradings=gradings)

    def widened(self, grid: Grid) -> tuple["Layout", Grid]:
        """The same nodes and some more beyond every open face."""
        wider = widened(grid, self.box)
        axes = wider.axes
        shares = tuple(share * a.n / b.n for share, a, b in zip(self.shares, axes, grid.axes, strict=True))
        gradings = tuple(a.grading for a in axes)
        return replace(self, box=self.box.replace(*wider.box), gradings=gradings, shares=shares), wider


def widened(grid: Grid, box: Box) -> Grid:
    """The same nodes and some more beyond every open face."""
    axes = []
    for axis, pair in zip(grid.axes, box.faces, strict=True):
        more = max(3, math.ceil(CUT_MARGIN[grid.dim] * axis.n))
        low, high = (more if isinstance(face, Open) else 0 for face in pair)
        ends = [axis.grading.lower, axis.grading.upper]
        if low:
            ends[0] = float(axis.grading(-low * axis.h))
        if high:
            ends[1] = float(axis.grading(1.0 + high * axis.h))
        if isinstance(axis.grading, Sinh):
            wide: Grading = Sinh(ends[0], ends[1], axis.grading.centre, axis.grading.width)
        else:
            wide = Uniform(ends[0], ends[1])
        axes.append(Axis(axis.n + low + high, wide, axis.periodic))
    return Grid(axes)


def first_layout(problem: KolmogorovProblem, points: np.ndarray, tail: float) -> Layout:
    """Box that the process from the points hardly leaves, fine where it spends its time, coarser in the tails."""
    box = problem.box
    bounded = np.isfinite(box.lower).all() and np.isfinite(box.upper).all()
    opened = np.array([[isinstance(face, Open) for face in pair] for pair in box.faces])
    horizon = problem.horizon
    if horizon is None:
        if not bounded:
            raise InputError("box", box, "a finite box for a stationary problem")
        gradings: tuple[Grading, ...] = tuple(Uniform(a, b) for a, b in zip(box.lower, box.upper, strict=True))
        return Layout.even(box, gradings)
    cloud = reach(problem.sde, points, horizon, within=box)
    low, high = cloud.interval(tail)
    core_low, core_high = cloud.low - 2.0 * cloud.spread_low, cloud.high + 2.0 * cloud.spread_high
    given_low, given_high = np.array(box.lower), np.array(box.upper)
    low = np.where(opened[:, 0], np.where(np.isfinite(given_low), np.minimum(low, given_low), low), given_low)
    high = np.where(opened[:, 1], np.where(np.isfinite(given_high), np.maximum(high, given_high), high), given_high)
    reach_box = box.replace(low, high)
    gradings = tuple(_grading(problem, points, i, reach_box, core_low[i], core_high[i]) for i in range(problem.dim))
    layout = Layout.even(reach_box, gradings)
    return _focused(problem, layout, cloud)


def _grading(
    problem: KolmogorovProblem, points: np.ndarray, axis: int, box: Box, core_low: float, core_high: float
) -> Grading:
    """Uniform where the core fills the box, sinh-graded around it otherwise; around a natural end inside the core."""
    low, high = box.lower[axis], box.upper[axis]
    if box.periodic[axis]:
        return Uniform(low, high)
    core_low, core_high = max(core_low, low), min(core_high, high)
    centre, width = 0.5 * (core_low + core_high), 0.5 * (core_high - core_low)
    ends = [end for end, face in zip((low, high), box.faces[axis], strict=True) if isinstance(face, Natural)]
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


def _focused(problem: KolmogorovProblem, layout: Layout, cloud: Reach) -> Layout:
    """Centre an axis on the kinks or jumps of φ where they keep to one place, one standard deviation wide."""
    gradings, places = list(layout.gradings), list(layout.places)
    for i, grading in enumerate(layout.gradings):
        spread = 0.5 * float(cloud.spread_low[i] + cloud.spread_high[i])
        if not isinstance(grading, Sinh) or grading.centre in (grading.lower, grading.upper):
            continue
        probe = Grid.of(layout.box, [PROBE_NODES if j == i else 5 for j in range(problem.dim)], layout.gradings)
        rough = rough_places(problem, probe, i)
        if len(rough) and np.ptp(rough) <= spread and grading.lower < rough.mean() < grading.upper:
            places[i] = place = common_break(problem, probe, i)
            centre = float(rough.mean()) if place is None else place
            gradings[i] = Sinh(grading.lower, grading.upper, centre, min(grading.width, spread))
    return replace(layout, gradings=tuple(gradings), places=tuple(places))
