"""The grid of a law before its resolution: where it starts, where it is when it is asked for, and on which scale."""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from kolmo.arrays import as_numpy
from kolmo.discretization import Discretization
from kolmo.errors import InputError
from kolmo.forward.clock import graded_clock
from kolmo.forward.density import Density, Spreading
from kolmo.grid import Grid
from kolmo.grid.grading import Focused, Grading, Sinh, Uniform
from kolmo.problem import KolmogorovProblem
from kolmo.problem.box import Box
from kolmo.refine.layout import Layout, interfaces
from kolmo.refine.samples import Room
from kolmo.refine.scout import Sight, scout

# Nodes per axis, and first steps, of the rough look at where the law goes: a monotone scheme with implicit Euler steps,
# whose masses are a law whatever the equation. It says where grids shall be fine to within a factor of two or so.
LOOK_NODES, LOOK_STEPS = {1: 161, 2: 31, 3: 11}, 8
# The first steps of that look are those in which noise goes one cell, but not less than this part of the horizon.
LOOK_SHORTEST = 2.0**-24
# The axis is fine within so many standard deviations of a law; and it is not graded at all for a centre that would be
# fine over most of the box.
CORE, EVEN = 2.0, 0.8
# Of many starting points, the distance to a face that this part of them falls short of counts.
NEAREST = 0.1
# Nodes within this many standard deviations of a natural end are crowded there, this close in standard deviations.
AT_END, END_WIDTH = 3.0, 0.3
# Standard deviations that a box is wide, for what counts as a small part of it.
BOX_SPREADS = 12.0
# Centres closer than this part of the smaller of their widths, with widths within a factor two, are one.
APART = 1.0


@dataclass(frozen=True)
class Asked:
    """What is wanted of a law.

    Attributes
    ----------
    kept : tuple of float
        Times at which the law is kept, the horizon among them.
    points : ndarray or None, shape (n, d)
        Where the density is wanted; None: as a whole.
    flux_times : ndarray or None
        Times at which fluxes are wanted; None: at all.
    """

    kept: tuple[float, ...]
    points: np.ndarray | None
    flux_times: np.ndarray | None

    @property
    def fluxes(self) -> bool:
        """Whether fluxes are wanted."""
        return self.flux_times is None or len(self.flux_times) > 0


@dataclass(frozen=True)
class Start:
    """Where a law starts: a cloud of weighted points.

    Attributes
    ----------
    initial : callable or ndarray, shape (n, d)
        As given.
    points : ndarray, shape (m, d)
        The points, or places where the density is not zero.
    weights : ndarray, shape (m,)
        Their share of the mass.
    """

    initial: Any
    points: np.ndarray
    weights: np.ndarray

    @property
    def mean(self) -> np.ndarray:
        """Centre, shape (d,)."""
        return np.asarray(self.weights @ self.points)

    @property
    def spread(self) -> np.ndarray:
        """Standard deviation per axis, shape (d,)."""
        return np.asarray(np.sqrt(np.maximum(self.weights @ (self.points - self.mean) ** 2, 0.0)))


@dataclass(frozen=True)
class LawLayout(Layout):
    """Layout of the grid of a law: a single starting point is a node, where masses are not negative then."""

    @property
    def cut(self) -> bool:
        """Whether the box is cut anywhere."""
        return self.box.has("cut")

    def broken(self, problem: KolmogorovProblem, start: Start, rtol: float) -> tuple["LawLayout", Sight]:
        """The layout with a node on every break of the coefficients, and what was seen of these."""
        low, high = np.array(self.box.lower), np.array(self.box.upper)
        spread = np.maximum((high - low) / BOX_SPREADS, start.spread)
        nodes = LOOK_NODES[problem.dim]
        room = Room(self.gradings, nodes, low, high, spread, problem.horizon or 0.0)
        sight = scout(problem, room, rtol)
        breaks = tuple(interfaces(problem, self.box, i, seen) for i, seen in enumerate(sight.axes))
        return replace(self, breaks=breaks), sight


def start_of(problem: KolmogorovProblem, initial: Any, points: np.ndarray | None) -> Start:
    """Where a law starts; a density is looked at on a grid of the finite box, or around the points asked for."""
    if not callable(initial):
        return Start(initial, initial, np.full(len(initial), 1.0 / len(initial)))
    low, high = np.array(problem.box.lower), np.array(problem.box.upper)
    if not (np.isfinite(low).all() and np.isfinite(high).all()):
        if points is None:
            raise InputError(
                "at", None, "points around which the density lies, or a finite box", "solve_forward(..., at=points)"
            )
        low, high = np.maximum(low, points.min(0)), np.minimum(high, points.max(0))
        pad = np.where(high > low, high - low, np.maximum(np.abs(high), 1.0))
        low, high = np.maximum(low - pad, problem.box.lower), np.minimum(high + pad, problem.box.upper)
    probe = Grid.of(problem.box.replace(low, high), {1: 1001, 2: 101, 3: 31}[problem.dim])
    rho = as_numpy(initial(probe.points)).reshape(-1)
    if rho.shape != (probe.size,):
        raise InputError("initial", f"a result of shape {rho.shape}", f"shape {(probe.size,)}, one number per point")
    masses = np.maximum(rho, 0.0) * probe.volumes
    there = masses > 1e-12 * masses.max(initial=0.0)
    if not there.any() or not np.isfinite(masses).all():
        raise InputError("initial", "a density that is zero or infinite wherever it was looked at", "a density")
    return Start(initial, probe.points[there], masses[there] / masses[there].sum())


def law_layout(problem: KolmogorovProblem, start: Start, asked: Asked, tail: float, *, on_node: bool) -> LawLayout:
    """Box that the process hardly leaves, fine where the law is when it is asked for, and between start and faces.

    With ``on_node`` a single starting point shall be a node.
    """
    box = _reach_box(problem, start, asked, tail)
    seen = _look(problem, start, asked, box)
    gradings = tuple(_grading(problem, start, asked, box, seen, i) for i in range(problem.dim))
    shares = (1.0,) * problem.dim
    if not on_node or callable(start.initial) or len(start.points) > 1:
        return LawLayout(box, gradings, shares, (None,) * problem.dim)
    centred = tuple(_centred(g, float(x)) for g, x in zip(gradings, start.points[0], strict=True))
    return LawLayout(box, centred, shares, tuple(float(x) for x in start.points[0]))


def depth(grading: Grading) -> float:
    """Nodes of a graded axis for each node within the width of a centre, at the centre where that takes most."""
    if isinstance(grading, Sinh):
        centres, widths = np.array([grading.centre]), np.array([grading.width])
    elif isinstance(grading, Focused):
        centres, widths = np.array(grading.centres), np.array(grading.widths)
    else:
        return 1.0
    return float((np.asarray(grading.slope(grading.inverse(centres))) / widths).max())


def _centred(grading: Grading, place: float) -> Grading:
    """An axis around a place, as fine as the given one at its finest."""
    widths = {Sinh: lambda g: g.width, Focused: lambda g: min(g.widths)}.get(type(grading))
    width = EVEN * 0.5 * (grading.upper - grading.lower) if widths is None else widths(grading)
    return Sinh(grading.lower, grading.upper, place, width)


def noise_at(problem: KolmogorovProblem, start: Start) -> np.ndarray:
    """Noise rates Σ_ii at the start, per axis: the mean over some of its points."""
    some = start.points[:: max(1, len(start.points) // 64)]
    S = as_numpy(problem.sde.covariance(0.0, some))
    return np.asarray(np.einsum("nii->ni", S).mean(0))


def first_step(problem: KolmogorovProblem, start: Start, grid: Grid, steps: int) -> float:
    """Time in which noise or drift goes one cell at the start, and at most the horizon over the steps."""
    noise, drift = noise_at(problem, start), as_numpy(problem.sde.drift(0.0, start.mean[None]))[0]
    times = [(problem.horizon or 0.0) / steps]
    for axis, place, s, b in zip(grid.axes, np.clip(start.mean, *grid.box), noise, np.abs(drift), strict=True):
        h = float(axis.grading.slope(axis.grading.inverse(np.float64(place)))) * axis.h
        times += [size / float(rate) for size, rate in ((h * h, s), (h, b)) if rate > 0]
    return min(times)


def _reach_box(problem: KolmogorovProblem, start: Start, asked: Asked, tail: float) -> Box:
    """Finite box around the start, the points asked for and wherever the process goes."""
    box = Box.covering(problem.sde, start.points, problem.horizon or 0.0, within=problem.box, tail=tail)
    everything = start.points if asked.points is None else np.concatenate([start.points, asked.points])
    opened = box.where("cut")
    low, high = np.array(box.lower), np.array(box.upper)
    low = np.where(opened[:, 0], np.minimum(low, everything.min(0)), low)
    high = np.where(opened[:, 1], np.maximum(high, everything.max(0)), high)
    return box.replace(low, high)


def _look(problem: KolmogorovProblem, start: Start, asked: Asked, box: Box) -> Density:
    """The law by a robust method on few nodes."""
    grid = Grid.of(box, LOOK_NODES[problem.dim])
    horizon = problem.horizon or 0.0
    first = max(first_step(problem, start, grid, LOOK_STEPS), LOOK_SHORTEST * horizon)
    times = graded_clock(horizon, first, LOOK_STEPS, fixed=asked.kept, breaks=problem.sde.breakpoints)
    recipe = Discretization(grid, tuple(times.tolist()), "monotone", "implicit-euler", None)
    return Spreading(problem, recipe, asked.kept).run(start.initial)


def _grading(problem: KolmogorovProblem, start: Start, asked: Asked, box: Box, seen: Density, axis: int) -> Grading:
    """Uniform where what matters is as wide as the box, else with a centre for each place that is finer."""
    low, high = box.lower[axis], box.upper[axis]
    if box.periodic[axis]:
        return Uniform(low, high)
    centres = _laws(box, seen, axis)
    if asked.fluxes:
        centres += _passage(problem, start, asked, axis)
    half = 0.5 * (high - low)
    kept: list[tuple[float, float]] = []
    for centre, width in sorted(centres, key=lambda c: c[1]):
        centre = min(max(centre, low), high)
        one = any(abs(centre - c) < APART * w and width < 2.0 * w for c, w in kept)
        if width < EVEN * half and not one:
            kept.append((centre, width))
    if not kept:
        return Uniform(low, high)
    if len(kept) == 1:
        return Sinh(low, high, *kept[0])
    return Focused(low, high, tuple(c for c, _ in kept), tuple(w for _, w in kept), (1.0,) * len(kept))


def _laws(box: Box, seen: Density, axis: int) -> list[tuple[float, float]]:
    """Centres and widths of the law at the first and the last time at which it is kept; and natural ends within it."""
    found = []
    x, h = seen.grid.along(axis, seen.grid.nodes[axis]), float(seen.grid.axes[axis].lengths.max())
    times = [k for k, t in enumerate(seen.times) if t > 0]
    for k in sorted({times[0], times[-1]}):
        p = np.maximum(seen.weights[k], 0.0)
        if p.sum() <= 0:
            continue
        mean = float(p @ x / p.sum())
        spread = max(math.sqrt(max(float(p @ (x - mean) ** 2 / p.sum()), 0.0)), 0.5 * h)
        found.append((mean, CORE * spread))
        for end, face in zip((box.lower[axis], box.upper[axis]), box.faces[axis], strict=True):
            if face.degenerate and abs(mean - end) < AT_END * spread:
                found.append((end, END_WIDTH * spread))
    return found


def _passage(problem: KolmogorovProblem, start: Start, asked: Asked, axis: int) -> list[tuple[float, float]]:
    """Centre and width of the way from the start to the nearer exit on an axis, for the earliest flux wanted."""
    ends = (problem.box.lower[axis], problem.box.upper[axis])
    exits = [e for e, f in zip(ends, problem.box.faces[axis], strict=True) if f.exits]
    if not exits:
        return []
    distance = np.sort(np.min([np.abs(start.points[:, axis] - e) for e in exits], 0))
    distance = distance[distance > 0]
    if len(distance) == 0:
        return []
    width = float(distance[int(NEAREST * (len(distance) - 1))])
    earliest = 0.0 if asked.flux_times is None else float(np.min(asked.flux_times))
    width = max(width, math.sqrt(float(noise_at(problem, start)[axis]) * earliest), float(start.spread[axis]))
    return [(float(start.mean[axis]), width)]
