"""Box and gradings of a control problem's grid: wide enough for every policy that is tried, fine where paths go."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from kolmo.control.charts import Chart, charted, mapped, there
from kolmo.errors import InputError
from kolmo.grid import Axis, Grid
from kolmo.grid.grading import Exponential, Focused, Grading, Sinh, Uniform
from kolmo.problem import KolmogorovProblem
from kolmo.problem.box import Box
from kolmo.problem.reach import Reach, reach
from kolmo.problem.sde import SDE

# Part of the axis (or of its nodes) added beyond every open face to measure the effect of the cut.
CUT_MARGIN = 0.2
# A stationary problem forgets what a discount divides by e to this; its law is stationary where doubling the time
# widens it by less than this factor; times doubled.
FORGOTTEN, SETTLED, DOUBLINGS = 7.0, 1.05, 8


@dataclass(frozen=True)
class Frame:
    """Box and maps: everything about a grid but the number of nodes.

    Attributes
    ----------
    box : Box
        Finite box, in the coordinates of the charts.
    gradings : tuple of Grading
        Map of each axis of it.
    charts : tuple of (Chart or None)
        Per axis, the chart whose coordinate is mapped; None: the coordinate itself.
    node : float or None
        In one dimension, a place that gets a node at every level (a shifted grid has it in the middle of a cell).
    """

    box: Box
    gradings: tuple[Grading, ...]
    charts: tuple[Chart | None, ...]
    node: float | None = None

    def grid(self, n: float, *, shifted: bool = False) -> Grid:
        """Grid with about n nodes per axis, an odd number: what lies in the middle falls on a node at every level.

        The shifted one has a node more: in the middle its nodes lie half a cell beside those of the other.
        """
        count = 2 * round(0.5 * n) + 1 + shifted
        gradings = [
            g.aligned(self.node, count) if isinstance(g, Sinh) and self.node is not None and not shifted else g
            for g in self.gradings
        ]
        maps = [mapped(grading, chart) for grading, chart in zip(gradings, self.charts, strict=True)]
        return Grid.of(self.box, [count] * self.box.dim, maps)

    def widened(self, grid: Grid) -> Grid:
        """The same nodes and some more beyond every open face."""
        axes = []
        for axis, pair in zip(grid.axes, self.box.faces, strict=True):
            more = _more(axis)
            low, high = (more if face.cut else 0 for face in pair)
            ends = axis.grading.lower, axis.grading.upper
            bottom = float(axis.grading(-low * axis.h)) if low else ends[0]
            top = float(axis.grading(1.0 + high * axis.h)) if high else ends[1]
            axes.append(Axis(axis.n + low + high, _moved(axis.grading, bottom, top), axis.periodic))
        return Grid(axes)

    def stretched(self, factor: float) -> "Frame":
        """The same frame with its open faces moved outwards, away from the middle."""
        low, high = np.array(self.box.lower), np.array(self.box.upper)
        opened = self.box.where("cut")
        middle = 0.5 * (low + high)
        low = np.where(opened[:, 0], middle - factor * (middle - low), low)
        high = np.where(opened[:, 1], middle + factor * (high - middle), high)
        gradings = tuple(_moved(g, float(a), float(b)) for g, a, b in zip(self.gradings, low, high, strict=True))
        return replace(self, box=self.box.replace(low, high), gradings=gradings)

    def even(self) -> "Frame":
        """The same box with evenly spaced nodes."""
        even = tuple(Uniform(float(a), float(b)) for a, b in zip(self.box.lower, self.box.upper, strict=True))
        return replace(self, gradings=even)

    def about(self, places: Sequence[tuple[float, float]], node: float | None = None) -> "Frame":
        """In one dimension, the same box with its nodes crowded about some places, each given with a width.

        Errors of a nonlinear equation where its data or its solution break are of first or second order in the spacing
        there, whatever the scheme, and depend on where in its cell the break lies. ``node`` gets a node at every level.
        """
        if not places or self.box.dim > 1 or self.box.periodic[0]:
            return self
        low, high = self.box.lower[0], self.box.upper[0]
        if len(places) == 1:
            return replace(self, gradings=(Sinh(low, high, *places[0]),), node=node)
        centres, widths = zip(*places, strict=True)
        maps = (Focused(low, high, centres, widths, (1.0,) * len(places)),)
        return replace(self, gradings=maps, node=None)


def _more(axis: Axis) -> int:
    """Cells to add beyond an open end: as many as make up a part of the axis, in its chart's coordinate.

    A graded axis needs few for that, and the data may overflow where many would lead.
    """
    grading = axis.grading.base if isinstance(axis.grading, Exponential) else axis.grading
    length = CUT_MARGIN * (grading.upper - grading.lower)
    for more in range(3, math.ceil(CUT_MARGIN * axis.n)):
        if min(grading(1.0 + more * axis.h) - grading.upper, grading.lower - grading(-more * axis.h)) >= length:
            return more
    return max(3, math.ceil(CUT_MARGIN * axis.n))


def frame(
    problems: Sequence[KolmogorovProblem], points: np.ndarray, tail: float, charts: tuple[Chart | None, ...]
) -> Frame:
    """Frame for the processes of several policies, all of which are to stay inside with probability 1 − tail."""
    pairs = [charted(problem, charts) for problem in problems]
    box, horizon, points = pairs[0][1], problems[0].horizon, there(points, charts)
    if horizon is None and not (np.isfinite(box.lower).all() and np.isfinite(box.upper).all()):
        horizon = _memory(problems, [sde for sde, _ in pairs], points, box)
    if horizon is None:
        return Frame(box, tuple(Uniform(a, b) for a, b in zip(box.lower, box.upper, strict=True)), charts)
    clouds = [reach(sde, points, horizon, within=box) for sde, _ in pairs]
    spans = [cloud.interval(tail) for cloud in clouds]
    low, high = np.min([s[0] for s in spans], axis=0), np.max([s[1] for s in spans], axis=0)
    core_low, core_high = _core(clouds)
    given_low, given_high = np.array(box.lower), np.array(box.upper)
    opened = box.where("cut")
    low = np.where(opened[:, 0], np.where(np.isfinite(given_low), np.minimum(low, given_low), low), given_low)
    high = np.where(opened[:, 1], np.where(np.isfinite(given_high), np.maximum(high, given_high), high), given_high)
    gradings = [
        Uniform(low[i], high[i]) if box.periodic[i] else _graded(low[i], high[i], core_low[i], core_high[i])
        for i in range(box.dim)
    ]
    return Frame(box.replace(low, high), tuple(gradings), charts)


def _memory(problems: Sequence[KolmogorovProblem], sdes: Sequence[SDE], points: np.ndarray, box: Box) -> float:
    """Time after which a stationary problem no longer cares where paths go: discounted, or their law is stationary."""
    rates = [float(np.min(np.asarray(problem.rate(0.0, torch.as_tensor(points)).detach()))) for problem in problems]
    if min(rates) > 0.0:
        return FORGOTTEN / min(rates)
    shift = 1e-3 * (1.0 + np.abs(points))
    slopes = [np.abs(sde.drift(0.0, points + shift) - sde.drift(0.0, points - shift)) / (2.0 * shift) for sde in sdes]
    pace = max(float(np.asarray(slope).max()) for slope in slopes)
    horizon, before = 1.0 / pace if pace > 0.0 else 1.0, None
    for _ in range(DOUBLINGS):
        clouds = [reach(sde, points, horizon, within=box) for sde in sdes]
        spread = np.max([cloud.interval(1e-3)[1] - cloud.interval(1e-3)[0] for cloud in clouds], axis=0)
        if before is not None and (spread <= SETTLED * before).all():
            return horizon
        horizon, before = 2.0 * horizon, spread
    raise InputError(
        "box",
        box,
        "a finite box: under typical controls the process goes everywhere",
        "give finite ends; open ones are moved where that matters",
    )


def _core(clouds: Sequence[Reach]) -> tuple[np.ndarray, np.ndarray]:
    """Where the paths spend their time: two spreads about their centres."""
    low = np.min([c.low - 2.0 * c.spread_low for c in clouds], axis=0)
    high = np.max([c.high + 2.0 * c.spread_high for c in clouds], axis=0)
    return low, high


def _graded(low: float, high: float, core_low: float, core_high: float) -> Grading:
    """Uniform where the core fills the box, sinh-graded around it otherwise."""
    core_low, core_high = max(core_low, low), min(core_high, high)
    centre, width = 0.5 * (core_low + core_high), 0.5 * (core_high - core_low)
    # a core of no width says that no noise was seen, not that the solution varies on no scale
    width = max(width, 0.1 * (high - low))
    if max(high - centre, centre - low) < 2.0 * width:
        return Uniform(float(low), float(high))
    return Sinh(float(low), float(high), float(centre), float(width))


def _moved(grading: Grading, low: float, high: float) -> Grading:
    """The same map between other ends."""
    if isinstance(grading, Focused):
        return replace(grading, lower=low, upper=high)
    if isinstance(grading, Exponential):
        ends = (grading.side * math.log(grading.side * (end - grading.end)) for end in (low, high))
        return Exponential(_moved(grading.base, *ends), grading.end, grading.side)
    return Sinh(low, high, grading.centre, grading.width) if isinstance(grading, Sinh) else Uniform(low, high)
