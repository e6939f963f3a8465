"""Levels: solves of a problem on grids of one family, with the scheme, the stepper and the number of steps of each."""

import math
from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from kolmo.arrays import as_numpy
from kolmo.discretization import Discretization
from kolmo.errors import NotConvergedError
from kolmo.grid import Grid
from kolmo.kernels.first_use import clock
from kolmo.limits import Limits, OutOfTimeError
from kolmo.march import Callback, March, Run, time_nodes
from kolmo.problem.problem import KolmogorovProblem
from kolmo.problem.reach import circulates
from kolmo.refine.layout import FIRST_NODES, Layout, first_layout
from kolmo.refine.witnesses import witnesses
from kolmo.schemes.base import SCHEMES
from kolmo.schemes.generator import Generator
from kolmo.schemes.terminal import TerminalRule, plan_averages, plan_terminal
from kolmo.stationary import solve_stationary
from kolmo.steppers.base import STEPPERS

SCHEME, STILL, ROBUST = "central6", "central6-still", "monotone"
IMPLICIT, SPLIT, EXPLICIT, TRANSPORT = "radau5", "mcs3", "rk4", "semi-lagrangian"
# Implicit steps of the first level.
FIRST_STEPS = 8
# Growth of the number of nodes from level to level.
GROWTH = {1: 1.5, 2: 1.35, 3: 1.25}
# Beyond one dimension: explicit steps that cost as much as one step of alternating directions.
EXPLICIT_PER_SPLIT = 10
# First number of split steps, and its growth with the resolution (space has order 6, the splitting 3).
FIRST_SPLIT_STEPS, SPLIT_GROWTH = 8, 1.7
# Steps along characteristics that are tried first, as a part of the split ones: where the splitting is exact, as for a
# rotation, few are enough. Steps on the first level at most, and the least part taken of the fewest that were tried.
CARRIED_PACE, MOST_STEPS, LEAST_PACE = 0.125, 4000, 0.25
# Mean drift on the coarsest grid, in nodes a unit of time, over the largest covariance there, from which on steps
# follow the characteristics.
CARRIED = 20.0
# Change from one coarse grid to the next, of the answer, up to which a method has begun to converge.
BEGUN = 0.1
# Stable explicit steps on the coarsest grid, for one along characteristics, from which on these are worth their price.
EXPLICIT_PER_CARRIED = 5
# Growth of the values from level to level at which steps are taken to be unstable.
RUNAWAY = 10.0
TINY = 1e-300
# Levels of a search that are remembered, for another question to the same grid, and their cells at most.
KEPT_LEVELS, KEPT_CELLS = 8, 200_000
# Cells of a grid, and processor time, at most.
MAX_CELLS = {1: 40_000, 2: 700_000, 3: 4_000_000}
MAX_SECONDS = 25.0


@dataclass(frozen=True)
class Options:
    """Methods of a solve, what is kept of it, and who hears of its steps: as of :func:`kolmo.solve`.

    Attributes
    ----------
    save : tuple of float
        Times whose states are kept besides t = 0.
    scheme, stepper : str
        Names, or "auto".
    like : tensor or None
        March in torch, on its device.
    callback, progress : callable or None, bool
        Called after each step; whether there is a progress bar.
    """

    save: tuple[float, ...] = ()
    scheme: str = "auto"
    stepper: str = "auto"
    like: Any = None
    callback: Callback | None = None
    progress: bool = False

    @property
    def told(self) -> dict[str, Any]:
        """What ``March.backward`` takes of them."""
        return {"save": self.save, "callback": self.callback, "progress": self.progress}


@dataclass
class Level:
    """One solve on the way to the tolerance.

    Attributes
    ----------
    discretization : Discretization
        What was solved.
    run : Run
        The states.
    values : ndarray, shape (points, k)
        Answer at the points that matter.
    witnessed : ndarray, shape (more points, k)
        Answer there and at witnesses beside them, for the estimate.
    seconds : float
        Wall time.
    n : float
        Resolution.
    effort : int
        Steps an implicit method of order five would take; other steppers derive theirs from it.
    count : int
        Steps that were asked for; breakpoints add some.
    columns : int or None
        Columns of the answer, None for a plain number a point.
    """

    discretization: Discretization
    run: Run
    values: np.ndarray
    witnessed: np.ndarray
    seconds: float
    n: float
    effort: int
    count: int
    columns: int | None


class RanAwayError(Exception):
    """Steps let the solution grow: with strong correlations they may, at walls."""


class Levels:
    """Solves of one problem, level by level; ``sight`` is what was seen of its data before.

    What it is made from is as of :func:`kolmo.refine.plan.search`.
    """

    def __init__(
        self, problem: KolmogorovProblem, points: np.ndarray, rtol: float, atol: float, options: Options
    ) -> None:
        self.points, self.rtol, self.atol, self.options, self.like = points, rtol, atol, options, options.like
        self.free, self.stepper = options.scheme == "auto", options.stepper
        self.scheme = SCHEME if self.free else options.scheme
        self.guarded, self.order = False, SCHEMES[self.scheme].order
        self.levels: list[Level] = []
        self._solved: OrderedDict[tuple[Any, ...], Level] = OrderedDict()
        self._beside: np.ndarray | None = None
        self._carried: bool | None = None
        self._pace, self._slowest, self._closing = 1.0, 0.0, False
        self.limits = Limits(MAX_CELLS[problem.dim], MAX_SECONDS)
        self._layout, self.sight = first_layout(problem, points, max(1e-2 * rtol, 1e-12), rtol, atol)
        if self.free and circulates(problem.sde, self._layout.box, problem.horizon):
            self.scheme = STILL
        self.problem = problem.broken_at(self.sight.breakpoints)

    def _solve(self, layout: Layout, n: float) -> Level:
        steps = max(4, math.ceil(FIRST_STEPS * n / FIRST_NODES[self.problem.dim]))
        return self._solve_on(layout.grid(n, SCHEMES[self.scheme].minimum_nodes), steps, n)

    def _solve_on(self, grid: Grid, steps: int, n: float, stepper: str = "") -> Level:
        """The level on a grid, solved once."""
        first = self.levels[0].count if self.levels else 0
        asked = (grid.axes, steps, stepper, self.scheme, self.stepper, self._carried, self._pace, first)
        known = self._solved.get(asked)
        if known is not None:
            return replace(known, n=n)
        level = self._solved_anew(grid, steps, n, stepper)
        if grid.size <= KEPT_CELLS:
            self._solved[asked] = level
            while len(self._solved) > KEPT_LEVELS:
                self._solved.popitem(last=False)
        return level

    def _solved_anew(self, grid: Grid, steps: int, n: float, stepper: str) -> Level:
        if self.levels and not self._closing:
            self.limits.check()
        begun = clock()
        averages = self._averages(grid)
        generator = self._generator(grid, averages)
        count = 0
        if self.problem.stationary:
            recipe = Discretization(grid, (), self.scheme, IMPLICIT, None, (), averages)
            march = March(generator, STEPPERS[IMPLICIT], np.zeros(0))
            run = Run(solve_stationary(march), 0.0)
        else:
            stepper, count = self._choose_stepper(generator, steps, stepper or self.stepper)
            closer = FIRST_STEPS / steps
            short = [(p.start, p.end, p.step * closer) for p in self.sight.pulses]
            growth = count / self.levels[0].count if self.levels else 1.0
            times = time_nodes(generator.intervals(), count, self.options.save, short, growth)
            rule = self._terminal(generator, stepper)
            seen = self.sight.breakpoints
            recipe = Discretization(grid, tuple(times.tolist()), self.scheme, stepper, rule, seen, averages)
            march = March(generator, STEPPERS[stepper], times, self.like)
            first = recipe.initial(march)
            stop = None if self._closing else self.limits.late
            run = march.backward(first, **self.options.told, stop=stop)
            if run.late:
                raise OutOfTimeError
        if not np.isfinite(as_numpy(run.state)).all():
            if self.guarded:
                raise RanAwayError
            raise NotConvergedError(
                f"the solution became infinite on {grid!r} with {recipe.stepper} and {recipe.steps} steps; "
                "the drift may blow up inside the box: try a smaller box, or solve(..., scheme='monotone')"
            )
        everywhere = np.concatenate([self.points, self._witnesses(grid)])
        witnessed = as_numpy(grid.interpolate(as_numpy(run.state), everywhere, recipe.width))
        witnessed = witnessed.reshape(len(everywhere), -1)
        if self.levels and self.guarded and recipe.stepper in (SPLIT, EXPLICIT):
            self._check_growth(march, as_numpy(first), witnessed[: len(self.points)])
        seconds, columns = clock() - begun, generator.columns
        level = Level(recipe, run, witnessed[: len(self.points)], witnessed, seconds, n, steps, count, columns)
        if run.interrupted:  # whatever it was solved for: a part of a march is compared with nothing
            self.levels = self.levels or [level]
            raise KeyboardInterrupt
        return level

    def _check_growth(self, march: March, first: np.ndarray, values: np.ndarray) -> None:
        """Values do not grow tenfold beyond what the data and the level before allow, unless steps are unstable."""
        load = (self.problem.horizon or 0.0) * as_numpy(march.ingredients(march.plans[-1].instants[-1])[0].load)
        allowed = max(float(np.abs(v).max()) for v in (as_numpy(self.levels[-1].run.state), first, load))
        if np.abs(values).max() > RUNAWAY * allowed:
            raise RanAwayError

    def _averages(self, grid: Grid) -> dict[str, TerminalRule]:
        """How functions are averaged whose breaks lie between the nodes."""
        if not self.sight.unresolved:
            return {}
        box = self.problem.box.replace(*grid.box)
        return plan_averages(self.problem, grid, box, self.order, self.sight.unresolved)

    def _terminal(self, generator: Generator, stepper: str) -> TerminalRule:
        """How φ is put on the grid: what proves to be smooth needs no look at its cells, and no averages."""
        if "terminal" in self.sight.smooth and stepper != TRANSPORT:
            return TerminalRule.point_values(generator.grid, self.order)
        return plan_terminal(self.problem, generator.grid, generator.box, self.order)

    def _generator(self, grid: Grid, averages: dict[str, TerminalRule] | None = None) -> Generator:
        """The problem on a grid; whether it depends on time was seen."""
        return Generator(self.problem, grid, SCHEMES[self.scheme], self.sight.steady, averages)

    def _splits(self, level: Level) -> bool:
        """Whether the steps of a level treat parts of the equation in turn: any number of them can be taken."""
        return level.discretization.stepper in (TRANSPORT, SPLIT, "mcs") and not self.problem.sde.noiseless

    def _witnesses(self, grid: Grid) -> np.ndarray:
        """The same witnesses on all levels."""
        if self._beside is None:
            self._beside = witnesses(grid, self.points)
        return self._beside

    def _along_characteristics(self, generator: Generator) -> bool:
        """Whether steps follow characteristics through noise: cheap to trace where it is the same at all nodes."""
        if self.problem.sde.noiseless:
            return False
        return self._choose_stepper(generator, FIRST_STEPS, self.stepper)[0] == TRANSPORT

    def _way(self, layout: Layout, *, carried: bool) -> tuple[Layout, float]:
        """Layout and first pace for steps along characteristics, or for others."""
        return (layout.evened(), max(CARRIED_PACE, self._slowest)) if carried else (layout, max(1.0, self._slowest))

    def _carrying_pays(self, layout: Layout, n: float) -> bool:
        """Whether steps along characteristics cost less than others for the tolerance, by two coarse grids each."""
        d, prices = self.problem.dim, []
        for carried in (True, False):
            self._carried = carried
            tried, self._pace = self._way(layout, carried=carried)
            try:
                coarse, fine = (self._solve(tried, m) for m in (n, GROWTH[d] * n))
            except RanAwayError:
                prices.append(math.inf)
                continue
            if relative_change(fine, coarse) > BEGUN:  # it says nothing yet of what finer grids will cost
                prices.append(math.inf)
                continue
            allowed = self.atol + self.rtol * np.abs(fine.values).max(0)
            excess = float((np.abs(fine.values - coarse.values).max(0) / np.maximum(allowed, TINY)).max())
            prices.append(fine.seconds * max(excess, 1.0) ** ((d + SPLIT_GROWTH) / self.order))
        return prices[0] <= prices[1]

    def _choose_stepper(self, generator: Generator, steps: int, name: str) -> tuple[str, int]:
        """Along characteristics where drift does it all; implicit in one dimension; else explicit or split."""
        if self.problem.sde.kinds:  # who jumps does not follow a characteristic
            self._carried = False
        implicit = self.problem.dim == 1 and self.like is None
        if name == IMPLICIT or (name == "auto" and implicit and self._carried is False):
            return IMPLICIT, steps  # what explicit steps would cost is not asked
        split = math.ceil(self._pace * FIRST_SPLIT_STEPS * (steps / FIRST_STEPS) ** SPLIT_GROWTH)
        horizon, noisy = self.problem.horizon or 0.0, generator.sample.S.any()
        explicit = math.ceil(horizon / STEPPERS[EXPLICIT].largest_step(*generator.stiffness())) + 1
        if self._carried is None:  # once for all levels: they belong together
            worth = not noisy or explicit > EXPLICIT_PER_CARRIED * split
            self._carried = name == "auto" and worth and _carried(generator)
        if name == TRANSPORT or (name == "auto" and self._carried):
            return TRANSPORT, split if noisy else steps
        if name == "auto":
            affordable = explicit <= EXPLICIT_PER_SPLIT * split or (self.like is not None and self.scheme == ROBUST)
            name = IMPLICIT if implicit else EXPLICIT if affordable else SPLIT
        if name == EXPLICIT:
            return name, max(explicit, steps)
        return name, split if name in (SPLIT, "mcs") else steps


def sizes(level: Level) -> np.ndarray:
    """Largest modulus per column at the points, never zero."""
    return np.asarray(TINY + np.abs(level.values).max(0))


def relative_change(level: Level, other: Level) -> float:
    """Largest difference of two levels at the points, relative to each column's size."""
    return float(np.max(np.abs(other.values - level.values) / sizes(level)))


def drawing_rate(generator: Generator) -> float:
    """Rate at which the drift draws neighbours on an axis together, or apart, at half of the nodes."""
    problem, grid = generator.problem, generator.grid
    b = as_numpy(problem.sde.drift(0.5 * (problem.horizon or 0.0), grid.points)).reshape(*grid.shape, grid.dim)
    x = grid.points.reshape(b.shape)
    with np.errstate(invalid="ignore"):  # what is not finite is told where coefficients are checked
        slopes = [np.diff(b[..., i], axis=i) / np.diff(x[..., i], axis=i) for i in range(grid.dim)]
    return max(float(np.median(np.abs(slope))) for slope in slopes)


def _carried(generator: Generator) -> bool:
    """Whether drift carries the solution, noise hardly matters between nodes, and characteristics can be followed."""
    A, S = np.abs(generator.sample.A), generator.sample.S
    faces = [face for pair in generator.box.faces for face in pair]
    if any(face.exits or not face.reached for face in faces):
        return False  # their values are not seen along characteristics
    if not S.any():
        return True
    # with noise the step is worth tracing only if it serves often, and averages cost little
    slanted = any(face.turns for face in faces) and np.triu(S, 1).any()
    worth = generator.grid.dim == 2 and generator.autonomous and not slanted
    return bool(worth and A.mean(0).max() > CARRIED * np.abs(S).max())
