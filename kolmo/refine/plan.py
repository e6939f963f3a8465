"""How "auto" chooses: box, graded grid, scheme, stepper and steps, refined until the estimate meets the tolerance."""

import contextlib
import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from kolmo import memory
from kolmo.arrays import Array, as_numpy, as_points, at_home, is_tensor
from kolmo.discretization import Discretization, steps_given
from kolmo.errors import InputError, NotConvergedError
from kolmo.grid import Grid
from kolmo.kernels.first_use import clock
from kolmo.limits import Limits, OutOfTimeError
from kolmo.march import Callback, March, Run, time_nodes
from kolmo.problem.box import Box
from kolmo.problem.faces import Absorbing
from kolmo.problem.problem import KolmogorovProblem, check_vectorised
from kolmo.problem.reach import circulates
from kolmo.problem.rest import at_rest
from kolmo.refine.estimate import Convergence, Verdict
from kolmo.refine.layout import FIRST_NODES, Layout, first_layout
from kolmo.refine.witnesses import groups, witnesses
from kolmo.schemes.base import SCHEMES
from kolmo.schemes.generator import Generator, discretize
from kolmo.schemes.terminal import TerminalRule, plan_averages, plan_terminal
from kolmo.stationary import solve_stationary
from kolmo.steppers.base import STEPPERS

SCHEME, STILL, ROBUST = "central6", "central6-still", "monotone"
IMPLICIT, SPLIT, EXPLICIT, TRANSPORT = "radau5", "mcs3", "rk4", "semi-lagrangian"

# Implicit steps of the first level.
FIRST_STEPS = 8
# Growth of the number of nodes from level to level.
GROWTH = {1: 1.5, 2: 1.35, 3: 1.25}
MAX_GROWTH = {1: 2.0, 2: 1.8, 3: 1.6}
# Beyond one dimension: explicit steps that cost as much as one step of alternating directions.
EXPLICIT_PER_SPLIT = 10
# First number of split steps, and its growth with the resolution (space has order 6, the splitting 3).
FIRST_SPLIT_STEPS, SPLIT_GROWTH = 8, 1.7
# Steps along characteristics that are tried first, as a part of the split ones: where the splitting is exact, as for a
# rotation, few are enough. Steps on the first level at most, and the least part taken of the fewest that were tried.
CARRIED_PACE, MOST_STEPS, LEAST_PACE = 0.125, 4000, 0.25
# Order of the splines of degree seven that are read at the feet of characteristics.
SPLINES = 8.0
# Part of the last change, by twice the steps along characteristics, that the next one has to fall to: they are of order
# 2 at least, but each interpolates, and on a coarse grid many of them do so badly.
CALMER = 0.7
# Mean drift on the coarsest grid, in nodes a unit of time, over the largest covariance there, from which on steps
# follow the characteristics.
CARRIED = 20.0
# Change from one coarse grid to the next, of the answer, up to which a method has begun to converge.
BEGUN = 0.1
# Stable explicit steps on the coarsest grid, for one along characteristics, from which on these are worth their price.
EXPLICIT_PER_CARRIED = 5
# Growth of the values from level to level at which steps are taken to be unstable.
RUNAWAY = 10.0
SILENT = (
    "terminal data, source and face values were zero wherever they were looked at, and so is the answer; if they are "
    "not, say where by breaks="
)
# Ranges of the data by which an answer may lie outside of them on the way; at the end it may not at all.
RUNAWAY_RANGE = 1.0
TINY = 1e-300
# Rounding of a march: a few units in the last place of the largest value, as random as the number of nodes; of one
# large system, which is as ill-conditioned as there are nodes, not so random.
ROUNDING = 4e-15
# Part of the tolerance that the next level aims at.
AIM = 0.7
# Change of an axis' share of the nodes from which on the first level is solved again.
RESHAPED = 0.1
# Least proportion between the axes' numbers of nodes.
LEAST_SHARE = 0.4
MAX_CELLS = {1: 40_000, 2: 700_000, 3: 4_000_000}
MAX_SECONDS = 25.0
# Least estimate, as a part of the tolerance, where functions were sampled: narrow things are followed from a tenth of
# the tolerance on, and the box leaves out a hundredth of it, times how high they are.
UNSEEN = 0.03
# Share of the tolerance left to the effect of the cut.
CUT_SHARE = 0.2
CUT_TRIES, CUT_PATIENCE = 12, 3
# Part of the effect of the cut on one level to which that on the next has fallen, from which on it is the grid's: what
# comes in from the closures of open faces, against the drift, as the waves that a coarse grid cannot hold.
CUT_BY_GRID = 0.25
# Number of levels after which the cut is looked at even if there are finer ones to come.
FIRST_CUT = 4
# The wider box is cut too: with heavy tails what is left may be as large as what was seen.
CUT_SAFETY = 2.0


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


@dataclass
class Outcome:
    """Result of a search: the finest level with its estimate."""

    level: Level
    estimate: np.ndarray
    status: str
    message: str
    stats: dict[str, Any] = field(default_factory=dict)


@at_home
def plan(
    problem: KolmogorovProblem,
    *,
    at: Any = None,
    rtol: float = 1e-3,
    atol: float = 1e-6,
    max_cells: int | None = None,
    max_seconds: float | None = None,
) -> Discretization:
    """Find a discretisation that meets a tolerance.

    Parameters
    ----------
    problem : KolmogorovProblem
        The equation.
    at : array_like, shape (..., d), optional
        Points where the answer matters; None: the core of the (finite) box.
    rtol, atol : float
        Per column j the error at t = 0 shall be at most ``atol + rtol * max |u_j|`` over the points.
    max_cells : int, optional
        Largest grid tried; default 40,000, 700,000 or 4,000,000 in one, two or three dimensions.
    max_seconds : float, optional
        Time after which the best finished level is taken, with status "tolerance_not_met"; default 25.

    Returns
    -------
    Discretization
        Frozen and reusable: box used, grid, time nodes, scheme, stepper, treatment of φ, error estimate.

    Examples
    --------
    >>> import kolmo
    >>> ou = kolmo.SDE(lambda t, x: -x, diffusion=1.0, dim=1)
    >>> problem = kolmo.KolmogorovProblem(ou, lambda x: x[..., 0] ** 2, 1.0)
    >>> kolmo.plan(problem, at=[0.0, 1.0], rtol=1e-4).scheme
    'central6'
    """
    return search(
        problem, at=at, rtol=rtol, atol=atol, max_cells=max_cells, max_seconds=max_seconds
    ).level.discretization


def search(
    problem: KolmogorovProblem,
    *,
    at: Any = None,
    rtol: float,
    atol: float,
    max_cells: int | None = None,
    max_seconds: float | None = None,
    save: Sequence[float] = (),
    scheme: str = "auto",
    stepper: str = "auto",
    like: Any = None,
    callback: Callback | None = None,
    progress: bool = False,
) -> Outcome:
    """Plan and solve on finer and finer levels until the estimate meets the tolerance."""
    _check_tolerances(rtol, atol)
    limits = Limits.of(max_cells, max_seconds, MAX_CELLS[problem.dim], MAX_SECONDS)
    problem = at_rest(problem.handing("torch", at.device) if is_tensor(at) else problem)
    points = interesting_points(problem, at)
    check_vectorised(problem, points)
    searcher = _Search(problem, points, rtol, atol, tuple(save), scheme, stepper, like, callback, progress)
    outcome = searcher.run(limits)
    return _with_rest(problem, points, rtol, atol, outcome) if problem.met else outcome


def _with_rest(problem: KolmogorovProblem, points: np.ndarray, rtol: float, atol: float, outcome: Outcome) -> Outcome:
    """An outcome whose estimate counts paths that are left where two faces have met: what they are paid is not known.

    All that is known is that it lies between what the faces pay there; so many paths are left as the same steps find
    when nothing else is asked for.
    """
    nodes = outcome.level.discretization.grid.points
    paid = as_numpy(problem.final(nodes)).reshape(len(nodes), -1)
    differs = np.ptp(paid, axis=0)
    allowed = atol + rtol * np.abs(outcome.level.values).max(0)
    if not differs.any():
        return outcome
    remaining = copy.copy(problem)
    remaining.terminal, remaining.source = _one, None
    pairs = [tuple(Absorbing() if face.imposed else face for face in pair) for pair in problem.box.faces]
    remaining.box = Box(problem.box.lower, problem.box.upper, pairs)
    recipe = outcome.level.discretization
    march = recipe.march(remaining)
    alive = np.asarray(march.backward(recipe.initial(march)).state)[:, 0]
    shares = np.abs(recipe.grid.interpolate(alive, points, recipe.width))
    left = differs * float(shares.max())
    estimate = outcome.estimate + left
    recipe.estimate["left"] = (left + np.zeros(len(estimate))).tolist()
    stats = outcome.stats | {"estimate": dict(recipe.estimate)}
    met = bool((estimate <= allowed).all())
    if outcome.status == "converged" and not met:
        message = f"paths are left where the faces meet: {float(left.max()):.2e} of what they are paid is not known"
        return replace(outcome, estimate=estimate, status="tolerance_not_met", message=message, stats=stats)
    return replace(outcome, estimate=estimate, stats=stats)


def _one(x: Array) -> Array:
    """Terminal data of those that are left."""
    return 1.0 + 0.0 * x[..., 0]


def prescribe(
    problem: KolmogorovProblem,
    grid: Grid | int | Sequence[int],
    steps: int | None,
    scheme: str,
    stepper: str,
    save: tuple[float, ...],
    like: Any,
) -> Discretization:
    """The discretisation for a grid and a number of steps given by the user."""
    problem = at_rest(problem, grid.box if isinstance(grid, Grid) else None)
    generator = discretize(problem, grid, scheme)
    name = stepper
    if name == "auto":
        name = "radau5" if problem.dim < 3 and like is None else "rk4"
    if problem.stationary:
        return Discretization(generator.grid, (), generator.scheme.name, name, None)
    memory.require("steps", generator.grid.shape, saved=len(save), steps=steps_given(steps))
    times = time_nodes(generator.intervals(), steps_given(steps), save)
    bound = STEPPERS[name].largest_step(*generator.stiffness())
    if np.diff(times).max() > bound * 1.1:
        needed = int(np.ceil((problem.horizon or 0.0) / bound))
        raise InputError(
            "steps",
            steps,
            f"at least {needed} steps for stepper {name!r} on this grid",
            "or stepper='radau5'" if like is None else "or stepper='mcs3'",
        )
    rule = plan_terminal(problem, generator.grid, generator.box, generator.scheme.order)
    return Discretization(generator.grid, tuple(times.tolist()), generator.scheme.name, name, rule)


def interesting_points(problem: KolmogorovProblem, at: Any) -> np.ndarray:
    """Points where the answer matters, shape (n, d): ``at``, or the core of the box."""
    if at is not None:
        points = as_numpy(as_points(at, problem.dim, "at")).reshape(-1, problem.dim)
        if len(points) == 0:
            raise InputError("at", "no points", "at least one point")
        outside = ~problem.box.contains(points)
        hard = np.zeros(len(points), dtype=bool)
        for i, pair in enumerate(problem.box.faces):
            for side, face in enumerate(pair):
                if not face.cut:
                    end = problem.box.lower[i] if side == 0 else problem.box.upper[i]
                    hard |= (
                        points[:, i] < end - 1e-12 * abs(end) if side == 0 else points[:, i] > end + 1e-12 * abs(end)
                    )
        hard &= outside
        if hard.any():
            raise InputError("at", f"a point at {points[hard][0].tolist()}", f"points inside {problem.box!r}")
        return np.asarray(points)
    low, high = np.array(problem.box.lower), np.array(problem.box.upper)
    if not (np.isfinite(low).all() and np.isfinite(high).all()):
        raise InputError(
            "at", None, "points where the answer matters, or a finite box", "solve(problem, at=points, ...)"
        )
    opened = problem.box.where("cut")
    low, high = low + 0.25 * (high - low) * opened[:, 0], high - 0.25 * (high - low) * opened[:, 1]
    count = {1: 33, 2: 9, 3: 5}[problem.dim]
    axes = [np.linspace(a, b, count) for a, b in zip(low, high, strict=True)]
    return np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, problem.dim)


class _RanAwayError(Exception):
    """Steps let the solution grow: with strong correlations they may, at walls."""


class _Search:
    """State of one search."""

    def __init__(
        self,
        problem: KolmogorovProblem,
        points: np.ndarray,
        rtol: float,
        atol: float,
        save: tuple[float, ...],
        scheme: str,
        stepper: str,
        like: Any,
        callback: Callback | None,
        progress: bool,
    ) -> None:
        self.problem, self.points, self.rtol, self.atol = problem, points, rtol, atol
        self.save, self.scheme, self.stepper = save, SCHEME if scheme == "auto" else scheme, stepper
        self.like, self.callback, self.progress = like, callback, progress
        self.free, self.guarded, self.order = scheme == "auto", False, SCHEMES[self.scheme].order
        self.levels: list[Level] = []
        self._abandoned: list[Level] = []
        self.cut = np.zeros(1)
        self._measured: Level | None = None
        self._judged: tuple[list[Level], Verdict] | None = None
        self._beside: np.ndarray | None = None
        self._carried: bool | None = None
        self._pace, self._slowest, self._growth = 1.0, 0.0, GROWTH[problem.dim]
        self._hurried = self._closing = False
        self.limits = Limits(MAX_CELLS[problem.dim], MAX_SECONDS)
        self._layout, self.sight = first_layout(problem, points, max(1e-2 * rtol, 1e-12), rtol, atol)
        if self.free and circulates(problem.sde, self._layout.box, problem.horizon):
            self.scheme = STILL
        self.problem = problem.broken_at(self.sight.breakpoints)

    def run(self, limits: Limits) -> Outcome:
        """Refine until the estimate meets the tolerance; if steps prove unstable, again in a more robust way."""
        self.limits = limits
        ways = [(self.scheme, self.stepper)]
        if self.stepper == "auto":
            robust = EXPLICIT if self.problem.dim > 1 or self.like is not None else IMPLICIT
            ways += [(self.scheme, EXPLICIT)] * (self.problem.dim > 1 and not self.problem.stationary)
            ways += [(ROBUST, robust)] * self.free
        for self.scheme, self.stepper in ways:
            self.order, self.guarded = SCHEMES[self.scheme].order, (self.scheme, self.stepper) != ways[-1]
            self._abandoned = self.levels or self._abandoned
            self.levels, self.cut, self._measured, self._pace = [], np.zeros(1), None, 1.0
            self._growth = GROWTH[self.problem.dim]
            with contextlib.suppress(_RanAwayError):
                return self._refine()
        raise AssertionError("the last way is not guarded")

    def _refine(self) -> Outcome:
        """From the first level on, and then see to the cut."""
        d = self.problem.dim
        layout = self._layout
        n = min(float(FIRST_NODES[d]), (self.limits.cells / math.prod(layout.shares)) ** (1.0 / d))
        if d > 1 and not self.problem.stationary:
            generator = self._generator(layout.grid(n, SCHEMES[self.scheme].minimum_nodes))
            # steps that are long for the drift may agree, and be wrong
            wanted = (self.problem.horizon or 0.0) * _rate(generator)
            self._hurried = wanted > MOST_STEPS
            self._slowest = 0.0 if self._hurried else wanted / FIRST_SPLIT_STEPS
            self._pace = max(1.0, self._slowest)
            if self._along_characteristics(generator):
                self._carried = self.stepper != "auto" or self._carrying_pays(layout, n)
                layout, self._pace = self._way(layout, carried=self._carried)
        try:
            while True:
                level = self._solve(layout, n)
                if level.run.interrupted:
                    self.levels = self.levels or [level]
                    return self._outcome("interrupted", "interrupted by the callback or Ctrl-C")
                self.levels = sorted([*self.levels, level], key=lambda level: level.n)
                if self.sight.exploded > 0.0:
                    return self._outcome("tolerance_not_met", self._explosion())
                if self._hurried and self._splits(self.levels[-1]):
                    told = f"the horizon is longer than {MOST_STEPS} split steps that are short enough for the drift"
                    return self._outcome("tolerance_not_met", told)
                self._check_possible(RUNAWAY_RANGE)
                if d > 1 and len(self.levels) == 1:
                    before, layout = layout, self._proportioned(layout, n)
                    if max(abs(p / q - 1.0) for p, q in zip(layout.shares, before.shares, strict=True)) > RESHAPED:
                        self.levels = [self._solve(layout, n)]  # levels of one family, or their differences say little
                settled = False
                if len(self.levels) == FIRST_CUT or self._enough():
                    layout, settled = self._settle_cut(layout)
                if settled and self._enough() and self._cut_fits() and self._possible(0.0):
                    return self._outcome(
                        "converged", SILENT if self.sight.silent else "the estimate meets the tolerance"
                    )
                n = self._next()
                told = self._limit(n, layout)
                if told:
                    return self._told(layout, told)
        except OutOfTimeError:
            if self.levels:
                return self._told(layout, self._stopped(self.limits.over))
            if self._abandoned:
                return self._without_estimate()
            raise NotConvergedError(
                f"no level was finished within {self.limits.over}: allow more, or give grid= and steps="
            ) from None
        except KeyboardInterrupt:
            if not self.levels:
                raise
            return self._outcome("interrupted", "interrupted; the finest level finished is returned")

    def _without_estimate(self) -> Outcome:
        """The last level of a way that was left when it ran away, where no other one finished a level in time."""
        self.levels, self.cut = self._abandoned, np.full(1, np.inf)
        way = self.levels[-1].discretization.stepper
        told = f"steps by {way} ran away on a further grid, and no other method finished a level within "
        return self._outcome("tolerance_not_met", f"{told}{self.limits.over}: nothing is known of the error")

    def _possible(self, slack: float) -> bool:
        """Whether the answer lies within the bounds of the maximum principle, up to the tolerance and some slack."""
        if self.sight.bounds is None:
            return True
        low, high = self.sight.bounds
        values, allowed = self.levels[-1].values, self._tolerance() + slack * (high - low)
        return bool(((values >= low - allowed) & (values <= high + allowed)).all())

    def _check_possible(self, slack: float) -> None:
        """Leave an answer that cannot be to a more robust way, if there is one."""
        if self.guarded and not self._possible(slack):
            raise _RanAwayError

    def _explosion(self) -> str:
        return (
            f"{self.sight.exploded:.0%} of the paths from the points run away to infinity before the horizon: what the "
            "answer is depends on what happens there; give a box whose faces say it, or try monte_carlo"
        )

    def _enough(self) -> bool:
        """Whether three levels or more agree within what the cut leaves of the tolerance."""
        within = self._estimate() <= (1 - CUT_SHARE) * self._tolerance()
        return len(self.levels) >= 3 and bool(within.all())

    def _told(self, layout: Layout, message: str) -> Outcome:
        """The best level when a limit is met; the cut is measured on the coarsest one, where that is affordable."""
        self._check_possible(0.0)
        if self._measured is None:
            if self.limits.affords(2.0 * self.levels[0].seconds):
                self._closing = True
                self._measure_cut(layout, self.levels[0])
            elif self.problem.box.has("cut"):
                self.cut, message = np.full(1, np.inf), message + "; no time was left to measure the effect of the cut"
        return self._outcome("tolerance_not_met", message)

    def _limit(self, n: float, layout: Layout) -> str:
        """Why no finer level may be begun, or nothing."""
        cells = math.prod(n * share for share in layout.shares)
        # the next level costs more than the last by the growth of cells and steps
        last = self.levels[-1]
        more = {EXPLICIT: 2.0, SPLIT: SPLIT_GROWTH}.get(last.discretization.stepper, 1.0)
        reason = self.limits.excess(cells, last.seconds * (n / last.n) ** (self.problem.dim + more))
        return self._stopped(reason) if reason else ""

    def _stopped(self, reason: str) -> str:
        """What to tell when a limit is met."""
        worst, wanted = float(self._estimate().max()), float(self._tolerance().min())
        return f"stopped by {reason}: estimate {worst:.2e}, tolerance {wanted:.2e}; {self._advice()}"

    def _advice(self) -> str:
        """What stood in the way, and what to try."""
        names = " and ".join(self.sight.unresolved)
        seen = f"{names} break between the nodes (breaks= may say where); " if names else ""
        reason = self._verdict().reason
        return f"{seen}{reason + '; ' if reason else ''}try a larger max_seconds, scheme='monotone' or monte_carlo"

    def _settle_cut(self, layout: Layout) -> tuple[Layout, bool]:
        """Measure the effect of the cut; while it exceeds its share, go over to the wider box."""
        # it depends little on the resolution, and costs less on a coarse level; too coarse a one shows too much
        effects = []
        for level in self.levels[max(1, len(self.levels) - 3) :]:
            wider = self._measure_cut(layout, level)
            if self._cut_fits():
                return layout, True
            effects.append(float(np.max(self.cut)))
        if len(effects) > 1 and effects[-1] < CUT_BY_GRID * effects[-2]:
            return layout, False  # what comes in from the open faces is an error of the grid: finer levels have less
        for _ in range(CUT_TRIES):
            # the wider box has the same nodes inside: its solution takes the place of the last level
            layout, self.levels[-1] = wider
            try:
                wider = self._measure_cut(layout, self.levels[-1])
            except _RanAwayError:
                break  # it is the distance that this grid does not bear: a finer one has to show what is there
            if self._cut_fits():
                return layout, True
            effects.append(float(np.max(self.cut)))
            if len(effects) > CUT_PATIENCE and effects[-1] > 0.5 * effects[-1 - CUT_PATIENCE]:
                break  # it does not get smaller with the distance: a finer level has to show what it is
        return layout, False

    def _cut_fits(self) -> bool:
        return bool((self.cut <= CUT_SHARE * self._tolerance()).all())

    def _measure_cut(self, layout: Layout, level: Level) -> tuple[Layout, Level]:
        """Solve again with nodes beyond the open faces: the difference is the effect of the cut."""
        opened = self.problem.box.has("cut")
        if not opened or self.problem.stationary or level is self._measured:
            return layout, level
        wider, grid = layout.widened(level.discretization.grid)
        wide = self._solve_on(grid, level.effort, level.n, level.discretization.stepper)
        self.cut, self._measured = CUT_SAFETY * np.abs(wide.values - level.values).max(0), level
        return wider, wide

    def _outcome(self, status: str, message: str) -> Outcome:
        best = self.levels[-1]
        parts = self._estimate() if len(self.levels) > 1 else np.full(best.values.shape[1], np.inf)
        found = {"discretization": parts, "cut": self.cut + np.zeros(len(parts))}
        if not self.sight.proved:  # what weighs less than the scout looks for, or lies beyond the box, is on no level
            found["unseen"] = np.maximum(UNSEEN * self._tolerance() - parts - self.cut, 0.0)
        estimate = np.sum(list(found.values()), axis=0) if self.sight.exploded == 0.0 else np.full(len(parts), np.inf)
        recipe = best.discretization
        recipe.estimate.update({name: part.tolist() for name, part in found.items()})
        stats = {
            "cells": recipe.grid.size,
            "steps": recipe.steps,
            "levels": len(self.levels),
            "seconds": self.limits.spent,
            "estimate": dict(recipe.estimate),
        }
        return Outcome(best, estimate, status, message, stats)

    def _tolerance(self) -> np.ndarray:
        """atol + rtol max |u_j| per column, at the points asked for."""
        return np.asarray(self.atol + self.rtol * np.abs(self.levels[-1].values).max(0))

    def _estimate(self) -> np.ndarray:
        """Error estimate per column."""
        verdict = self._verdict()
        # that nothing has been met so far is no evidence where there is something to be met
        return np.where(verdict.silent, np.maximum(verdict.estimate, self.sight.size), verdict.estimate)

    def _verdict(self) -> Verdict:
        """What the levels say about the last one; judged once."""
        if self._judged is None or [*map(id, self._judged[0])] != [*map(id, self.levels)]:
            self._judged = list(self.levels), self._judge()
        return self._judged[1]

    def _judge(self) -> Verdict:
        """Judge them."""
        last = as_numpy(self.levels[-1].run.state)
        rounding = ROUNDING * np.abs(last).max(0) * (len(last) if self.problem.stationary else math.sqrt(len(last)))
        return self._convergence.judge(
            [level.n for level in self.levels],
            [level.witnessed for level in self.levels],
            groups=groups(len(self.points), self.problem.dim),
            rounding=rounding,
        )

    @property
    def _convergence(self) -> Convergence:
        """How levels are judged: with one more of them where breaks lie between the nodes."""
        along = self.sight.unbroken and self.levels[-1].discretization.stepper == TRANSPORT
        return Convergence(self.order, 4 if self.sight.unresolved else 3, SPLINES if along else 0.0)

    def _next(self) -> float:
        """Resolution of the next level, from the estimate and the order: finer, or one that may confirm the last."""
        d = self.problem.dim
        if len(self.levels) < 3:
            return self.levels[-1].n * self._growth
        tolerance = self._tolerance()
        allowed = np.maximum(AIM * (tolerance - self.cut), 0.1 * tolerance)
        least = 1.0 + 0.5 * (GROWTH[d] - 1.0)
        verdict, nodes = self._verdict(), [level.n for level in self.levels]
        between = self._convergence.between(nodes, verdict, allowed, least=least)
        return between or self._convergence.next_resolution(nodes, verdict, allowed, least=least, most=MAX_GROWTH[d])

    def _solve(self, layout: Layout, n: float) -> Level:
        steps = max(4, math.ceil(FIRST_STEPS * n / FIRST_NODES[self.problem.dim]))
        return self._solve_on(layout.grid(n, SCHEMES[self.scheme].minimum_nodes), steps, n)

    def _solve_on(self, grid: Grid, steps: int, n: float, stepper: str = "") -> Level:
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
            times = time_nodes(generator.intervals(), count, self.save, short, growth)
            rule = plan_terminal(self.problem, grid, generator.box, self.order)
            seen = self.sight.breakpoints
            recipe = Discretization(grid, tuple(times.tolist()), self.scheme, stepper, rule, seen, averages)
            march = March(generator, STEPPERS[stepper], times, self.like)
            first = recipe.initial(march)
            stop = None if self._closing else self.limits.late
            run = march.backward(first, save=self.save, callback=self.callback, progress=self.progress, stop=stop)
            if run.late:
                raise OutOfTimeError
            self._check_growth(recipe, march, as_numpy(first), as_numpy(run.state))
        if not np.isfinite(as_numpy(run.state)).all():
            if self.guarded:
                raise _RanAwayError
            raise NotConvergedError(
                f"the solution became infinite on {grid!r} with {recipe.stepper} and {recipe.steps} steps; "
                "the drift may blow up inside the box: try a smaller box, or solve(..., scheme='monotone')"
            )
        everywhere = np.concatenate([self.points, self._witnesses(grid)])
        witnessed = as_numpy(grid.interpolate(as_numpy(run.state), everywhere, recipe.width))
        witnessed = witnessed.reshape(len(everywhere), -1)
        return Level(
            recipe, run, witnessed[: len(self.points)], witnessed, clock() - begun, n, steps, count, generator.columns
        )

    def _check_growth(self, recipe: Discretization, march: March, first: np.ndarray, last: np.ndarray) -> None:
        """Values do not grow tenfold beyond what the data and the level before allow, unless steps are unstable."""
        if not self.guarded or recipe.stepper not in (SPLIT, EXPLICIT):
            return
        if not np.isfinite(last).all():
            raise _RanAwayError
        if self.levels:
            load = (self.problem.horizon or 0.0) * as_numpy(march.ingredients(march.plans[-1].instants[-1])[0].load)
            allowed = max(float(np.abs(v).max()) for v in (as_numpy(self.levels[-1].run.state), first, load))
            if np.abs(recipe.grid.interpolate(last, self.points, recipe.width)).max() > RUNAWAY * allowed:
                raise _RanAwayError

    def _averages(self, grid: Grid) -> dict[str, TerminalRule]:
        """How functions are averaged whose breaks lie between the nodes."""
        box = self.problem.box.replace(*grid.box)
        return plan_averages(self.problem, grid, box, self.order, self.sight.unresolved)

    def _generator(self, grid: Grid, averages: dict[str, TerminalRule] | None = None) -> Generator:
        """The problem on a grid; whether it depends on time was seen."""
        return Generator(self.problem, grid, SCHEMES[self.scheme], self.sight.steady, averages)

    def _proportioned(self, layout: Layout, n: float) -> Layout:
        """Give each axis nodes, and time steps, in proportion to the error they cause, seen by refining one alone."""
        base, gains, d = self.levels[-1], [], self.problem.dim
        for i in range(d):
            shares = tuple(share * (1.4 if j == i else 1.0) for j, share in enumerate(layout.shares))
            grid = replace(layout, shares=shares).grid(n, SCHEMES[self.scheme].minimum_nodes)
            gains.append(_change(base, self._solve_on(grid, base.effort, n)))
        worst = max(gains)
        shares = tuple(max((g / (worst + TINY)) ** (1.0 / self.order), LEAST_SHARE) for g in gains)
        # the same number of cells, differently shaped
        scale = math.prod(shares) ** (-1.0 / len(shares))
        by_space = worst * scale**-self.order
        self._set_pace(by_space)
        # of the three levels that it takes at least, the last shall meet the tolerance; estimates are twice the error
        allowed = float(np.min(AIM * self._tolerance() / _size(base)))
        excess = 2.0 * d * by_space / max(allowed, TINY)
        self._growth = min(max(excess ** (0.5 / self.order), GROWTH[d]), MAX_GROWTH[d])
        return replace(layout, shares=tuple(scale * share for share in shares)) if worst > 0 else layout

    def _set_pace(self, by_space: float) -> None:
        """Take as many steps as keep the error in time at that in space: a grid does not know how long the horizon is.

        The steps of the first level are doubled until that changes it no more than refining its axes does; or no longer
        changes it less and less: then it is the grid that errs in every step.
        """
        wanted = max(by_space, CUT_SHARE * float(np.min(self._tolerance() / _size(self.levels[-1]))))
        before, calmest = math.inf, self.levels[-1]
        while self._pace * FIRST_SPLIT_STEPS <= MOST_STEPS:
            level = self.levels[-1]
            if not self._splits(level):
                return
            self._pace *= 2.0
            self.levels[-1] = self._solve_on(level.discretization.grid, level.effort, level.n)
            change = _change(level, self.levels[-1])
            if change > CALMER * before and self._carried:
                self._pace, self.levels[-1] = max(0.25 * self._pace, self._slowest), calmest
                return
            before, calmest = change, level
            if change <= wanted:
                order = STEPPERS[level.discretization.stepper].order
                self._pace *= 0.5 * max((change / wanted) ** (1.0 / order), LEAST_PACE)
                self._pace = max(self._pace, self._slowest)
                self.levels[-1] = level
                return

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
            except _RanAwayError:
                prices.append(math.inf)
                continue
            if _change(fine, coarse) > BEGUN:  # it says nothing yet of what finer grids will cost
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


def _size(level: Level) -> np.ndarray:
    """Largest modulus per column at the points, never zero."""
    return np.asarray(TINY + np.abs(level.values).max(0))


def _change(level: Level, other: Level) -> float:
    """Largest difference of two levels at the points, relative to each column's size."""
    return float(np.max(np.abs(other.values - level.values) / _size(level)))


def _rate(generator: Generator) -> float:
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


def _check_tolerances(rtol: float, atol: float) -> None:
    for name, value in (("rtol", rtol), ("atol", atol)):
        if not (np.isfinite(value) and value >= 0):
            raise InputError(name, value, "a non-negative number")
    if rtol == 0 and atol == 0:
        raise InputError("rtol, atol", "0 and 0", "at least one positive tolerance")
