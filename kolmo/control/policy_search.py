"""The search for an optimum to a tolerance: frames, levels, the effect of cuts, and a monotone check."""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from kolmo.arrays import as_numpy
from kolmo.control.bellman import Act, Bellman
from kolmo.control.breaks import look, terminal_breaks, together
from kolmo.control.charts import natural_charts, opened
from kolmo.control.coefficients import Coefficients
from kolmo.control.frame import Frame, frame
from kolmo.control.policy_level import (
    EULER,
    EXPLICIT,
    FIRST_STEPS,
    IMPLICIT,
    Outcome,
    PolicyLevel,
    TooManySteps,
    held,
    march,
    nodal_policy,
)
from kolmo.control.policy_steps import POLICY_CHANGE, solve_stationary
from kolmo.control.problem import ControlProblem
from kolmo.discretization import Discretization
from kolmo.errors import InputError, NotConvergedError
from kolmo.grid import Grid
from kolmo.limits import Limits, OutOfTimeError
from kolmo.refine.estimate import Convergence, Verdict
from kolmo.refine.witnesses import witnesses
from kolmo.schemes.base import SCHEMES
from kolmo.schemes.terminal import plan_terminal

# Space discretisations: smooth solutions; with an obstacle, whose free boundary breaks the second derivative.
SMOOTH, STOPPED, MONOTONE = "central4", "central2", "monotone"
# Nodes per axis of the first level, its implicit steps, and the growth from level to level, by dimension.
FIRST_NODES = {1: 41, 2: 21, 3: 13}
GROWTH = {1: 1.5, 2: 1.35, 3: 1.25}
MAX_GROWTH = {1: 2.0, 2: 1.7, 3: 1.5}
MAX_CELLS = {1: 6_000, 2: 60_000, 3: 200_000}
# Nodes across a target on the first level, as their number says.
ACROSS = 5
# Processor time after which no finer level is begun.
MAX_SECONDS = 60.0
# The largest grid allowed is tried if the levels say that no more than so many times its nodes an axis are needed.
HOPE = 1.5
# Rough terminal data: time nodes crowd towards T like this power.
CROWDING = 3
# Share of the tolerance left to the effect of the cut, and tries at widening the box.
CUT_SHARE, CUT_TRIES = 0.2, 6
# Part of the tolerance that the next level aims at.
AIM = 0.6
# Rounding of policy iteration in many time steps, relative to the largest value.
ROUNDING = 1e-12
# Largest change of the last policy iteration of a step, relative to V, at tolerances that are not smaller still.
LAST_CHANGE = 1e-7
# The same for monotone solutions that are only compared or looked at.
OPINION_CHANGE = 1e-5
# Nodes and steps of the monotone solution in which it is looked where policies switch.
SCOUT_NODES, SCOUT_STEPS = 101, 10
# Grids of the monotone check, by dimension, and how far it may be off, in units of its own change.
CHECK_NODES = {1: (21, 41, 81, 161), 2: (17, 33, 49), 3: (9, 13, 17)}
CHECK_FACTOR = 4.0
# Its own change has to be below this part of the value: agreement tells nothing else, and a finer grid is looked at.
TELLING = 0.2


@dataclass(frozen=True)
class Check:
    """Comparison with a monotone scheme: its difference from the answer, its own last change; NaN where none was made.

    ``unchecked`` says why there was no (further) comparison.
    """

    agrees: bool
    difference: float = math.nan
    change: float = math.nan
    unchecked: str = ""

    def record(self) -> dict[str, Any]:
        """For the statistics of a solution."""
        return {name: value for name, value in vars(self).items() if name != "unchecked" or value}


class Search:
    """Finer and finer levels until the estimate meets the tolerance, then the monotone check."""

    def __init__(self, problem: ControlProblem, points: np.ndarray, rtol: float, atol: float, limits: Limits) -> None:
        self.charts = natural_charts(problem, points)
        self.problem, self.points, self.rtol, self.atol = opened(problem, self.charts), points, rtol, atol
        self.limits = limits
        self.scheme = SMOOTH if problem.obstacle is None else STOPPED
        self.order = SCHEMES[self.scheme].order
        # bounded controls switch, and stopping sets end, somewhere between nodes
        choice = problem.controls.has_bounds and len(problem.controls.samples) > 1
        self.kinked = problem.obstacle is not None or choice
        self.opened = self.problem.box is not None and self.problem.box.has("cut")
        # values that come from the unknown ones next to a curved boundary would bound explicit steps
        self.stepper = IMPLICIT if problem.dim == 1 or problem.targets else EXPLICIT
        self.smoothing = 2
        # policy iteration converges like Newton's method: the last change is far above the error that is left
        self.change = max(POLICY_CHANGE, min(LAST_CHANGE, 1e-3 * rtol))
        self.cut = 0.0
        self.levels: list[PolicyLevel] = []
        self._witnesses: np.ndarray | None = None
        self.iterations = 0

    def run(self) -> tuple[PolicyLevel, Outcome]:
        """The last level, and what is told of it."""
        layout = self._first_frame()
        try:
            layout, status, message = self._in_some_box(layout, self.scheme)
        except NotConvergedError as error:
            status, message = "failed", str(error)
        late = bool(self.levels) and self.limits.late()
        check = Check(True, unchecked=self.limits.over) if late else self._check(layout)
        stats: dict[str, Any] = {"monotone_check": check.record()}
        if status == "failed" or not check.agrees:
            reason = message if status == "failed" else "the high-order answer disagrees with the monotone scheme"
            found = (self.levels, self.cut, self.scheme, self.order)
            self.scheme, self.order, self.stepper = MONOTONE, 1, EULER
            try:
                layout, status, message = self._in_some_box(layout, MONOTONE)
            except NotConvergedError as error:
                if len(found[0]) < 2:
                    raise
                self.levels, self.cut, self.scheme, self.order = found
                self.cut += check.difference if math.isfinite(check.difference) else 0.0
                status, message = "tolerance_not_met", f"the monotone scheme has no answer ({error})"
            message = f"{message} (monotone scheme: {reason})"
        elif check.unchecked:
            message += "; not checked, for the monotone scheme found no answer"
        return self.found(status, message, stats)

    def found(self, status: str, message: str, stats: dict[str, Any]) -> tuple[PolicyLevel, Outcome]:
        """The last level, its estimate, and what is told of it."""
        by_levels = self._estimate()
        stats = stats | {"levels": len(self.levels), "seconds": self.limits.spent, "cut": self.cut}
        level = self.levels[-1]
        level.recipe.estimate.update(discretization=[by_levels], cut=[self.cut], policy=[self.change])
        return level, Outcome(by_levels + self.cut, status, message, stats)

    def _first_frame(self) -> Frame:
        """Frame for typical controls; for unbounded ones also for the policy of a coarse solve."""
        policies: list[Any] = [self.problem.constant(a) for a in self.problem.controls.samples[:5]]
        layout = self._frame(policies)
        if self.problem.controls.unbounded and self.problem.horizon is not None and layout.box.has("cut"):
            try:
                level = self._solve_on(layout.grid(FIRST_NODES[self.problem.dim]), FIRST_STEPS, self.scheme)
            except (NotConvergedError, OutOfTimeError):
                return layout
            layout = self._frame([*policies, nodal_policy(level)])
        return layout

    def _frame(self, policies: list[Any]) -> Frame:
        tail = max(1e-2 * self.rtol, 1e-12)
        layout = frame([self.problem.closed_loop(p) for p in policies], self.points, tail, self.charts)
        seen = Coefficients(self.problem, torch.as_tensor(self.points[:8]))
        if self.problem.controls.unbounded and not seen.covariance_is_fixed:
            # the policy at a cut comes from second derivatives taken there, which are good on even nodes only
            layout = layout.even()
        return self._about_breaks(layout)

    def _about_breaks(self, layout: Frame) -> Frame:
        """In one dimension, nodes crowd about breaks of the terminal data and about switches of a coarse policy."""
        if self.problem.dim > 1 or layout.box.periodic[0]:
            return layout
        still = self.problem.closed_loop(self.problem.constant(self.problem.controls.samples[0]))
        breaks = terminal_breaks(still, layout)
        # smoothing of higher order overshoots at a jump, and a maximiser would live on that
        self.smoothing = 2 if breaks.jump else self.order
        places = breaks.places
        if self.kinked:
            grid = layout.grid(SCOUT_NODES)
            try:
                level = self._solve_on(grid, SCOUT_STEPS, MONOTONE)
            except (NotConvergedError, OutOfTimeError):
                return layout.about(places, breaks.node)
            size = float(np.abs(self._answers(level, self.points)).max())
            sight = look(Bellman(self.problem, grid, MONOTONE), level.times, level.states, level.acts, layout, size)
            cell = (layout.box.upper[0] - layout.box.lower[0]) / SCOUT_NODES
            places = together(breaks, sight.places, cell)
            self.kinked = sight.kinked or self.problem.obstacle is not None
        return layout.about(places, breaks.node if len(places) == 1 else None)

    def _in_some_box(self, layout: Frame, scheme: str) -> tuple[Frame, str, str]:
        """Refine; where moving the cut changes the answer too much, move it outwards and refine again."""
        n = self._first_nodes(layout)
        n = min(n, self.limits.cells ** (1.0 / self.problem.dim))
        for attempt in range(CUT_TRIES):
            before = (self.levels, self.cut)
            try:
                status, message = self._refine(layout, scheme, n)
            except NotConvergedError as error:
                if attempt == 0:
                    raise
                self.levels, self.cut = before
                message = f"the cut of the box counts for {self.cut:.2e}, and a wider box has no answer ({error})"
                return layout, "tolerance_not_met", message
            if not layout.box.has("cut"):
                break
            reachable = self._measure_cut(layout, scheme)
            if self.cut <= CUT_SHARE * self._tolerance() or not reachable:
                break
            if self.limits.spent > 0.5 * self.limits.seconds:
                break
            factor = 1.25 if attempt < 2 else 1.6
            layout, n = layout.stretched(factor), 0.7 * factor * self.levels[-1].nodes
        if status == "converged" and self._estimate() + self.cut > self._tolerance():
            status = "tolerance_not_met"
            message = (
                f"the cut of the box counts for {self.cut:.2e}, tolerance {self._tolerance():.2e}; "
                "the terminal data may not be finite in a wider one"
            )
        return layout, status, message

    def _first_nodes(self, layout: Frame) -> float:
        """Nodes per axis of the first level: so many that every target has some across."""
        d = self.problem.dim
        n = FIRST_NODES[d] * GROWTH[d]
        if not self.problem.targets:
            return n
        n *= 2.0
        while n**d < self.limits.cells / 2.0**d:
            x = layout.grid(n).points
            if all(np.sum(target.inside(x)) >= ACROSS**d for target in self.problem.targets):
                break
            n *= GROWTH[d]
        return n

    def _measure_cut(self, layout: Frame, scheme: str) -> bool:
        """Measure the effect of the cut by a wider box; whether that box could be solved at all."""
        coarser = [level for level in self.levels if level.nodes < self.levels[-1].nodes]
        level = (coarser or self.levels)[-1]
        wide = layout.widened(level.recipe.grid)
        try:
            more = self._solve_on(wide, max(level.recipe.steps, FIRST_STEPS), scheme)
        except (InputError, NotConvergedError, OutOfTimeError) as error:
            if isinstance(error, InputError) and error.argument != "terminal":
                raise
            # the data overflow there, or there is no answer or no time for one: nothing to compare with
            self.cut = max(self.cut, self._estimate())
            return False
        self.cut = float(np.abs(self._at(more) - as_numpy(level.at)).max())
        return True

    def _refine(self, layout: Frame, scheme: str, n: float) -> tuple[str, str]:
        d = self.problem.dim
        self.levels, self.cut = [], 0.0
        while True:
            try:
                self.levels.append(self._solve(layout.grid(n), n, scheme))
            except OutOfTimeError:
                if not self.levels:
                    raise NotConvergedError(f"no level was finished within {self.limits.over}: allow more") from None
                self._keep_best()
                return "tolerance_not_met", self._stopped(self.limits.over)
            except NotConvergedError as error:
                if len(self.levels) < 2:
                    raise
                self._keep_best()
                # the coarser levels are good, and their estimate says how good
                return "tolerance_not_met", (
                    f"no finer level than {self.levels[-1].nodes:.0f} nodes an axis has an answer ({error}): "
                    f"estimate {self._estimate():.2e}, tolerance {self._tolerance():.2e}"
                )
            try:
                if self._enough() and self._stands(layout, scheme):
                    return "converged", "the estimate meets the tolerance"
            except OutOfTimeError:
                return "tolerance_not_met", f"no time was left to confirm the last level: {self.limits.over}"
            before, n = n, self._next(n)
            most = self.limits.cells ** (1.0 / d)
            # the largest grid allowed is still tried where it is worth it
            if before * (1.0 + 0.5 * (GROWTH[d] - 1.0)) <= most < n and self._needed() <= HOPE * most:
                n = most
            ahead = self.levels[-1].seconds * (n / before) ** (d + 1)
            reason = self.limits.excess(math.floor(n**d + 0.5), ahead)
            if reason:
                self._keep_best()
                return "tolerance_not_met", self._stopped(reason)

    def _keep_best(self) -> None:
        """Go back to the level with the least estimate: the finest ones may be spoilt by rounding."""
        levels, estimates = self.levels, []
        for count in range(3, len(levels) + 1):
            self.levels = levels[:count]
            estimates.append(self._estimate())
        self.levels = levels[: 3 + int(np.argmin(estimates))] if estimates else levels

    def _stopped(self, reason: str) -> str:
        """What to tell when a limit is met."""
        return f"stopped by {reason}: estimate {self._estimate():.2e}, tolerance {self._tolerance():.2e}"

    def _enough(self) -> bool:
        """Whether three levels or more agree within what the cut leaves of the tolerance."""
        left = 1.0 - CUT_SHARE * self.opened
        return len(self.levels) >= 3 and self._estimate() <= left * self._tolerance()

    def _stands(self, layout: Frame, scheme: str) -> bool:
        """Whether the agreement stands on a shifted grid, where the kinks of V fall elsewhere in their cells.

        A kink close to the middle has nearly the same place in its cell on all grids, which then share its error.
        """
        if not self.kinked or scheme == MONOTONE:
            return True
        n = self.levels[-1].nodes
        self.levels.insert(-1, self._solve(layout.grid(n, shifted=True), n, scheme))
        return self._enough()

    def _tolerance(self) -> float:
        return self.atol + self.rtol * float(np.abs(as_numpy(self.levels[-1].at)).max())

    @property
    def _policy(self) -> Convergence:
        return Convergence(self.order)

    def _verdict(self) -> Verdict:
        """What the levels say about the last one."""
        values = [as_numpy(level.witnessed)[:, None] for level in self.levels]
        rounding = max(ROUNDING, 0.1 * self.change) * float(np.abs(values[-1]).max())
        return self._policy.judge([level.nodes for level in self.levels], values, rounding=rounding)

    def _estimate(self) -> float:
        return float(self._verdict().estimate[0]) + self.levels[-1].unsettled

    def _next(self, n: float) -> float:
        d = self.problem.dim
        if len(self.levels) < 3:
            return n * GROWTH[d]
        return self._needed(least=1.0 + 0.5 * (GROWTH[d] - 1.0), most=MAX_GROWTH[d])

    def _needed(self, least: float = 1.0, most: float = math.inf) -> float:
        """Resolution that the levels say the tolerance needs, within bounds of its growth."""
        nodes, allowed = [level.nodes for level in self.levels], np.array([AIM * self._tolerance()])
        return self._policy.next_resolution(nodes, self._verdict(), allowed, least=least, most=most)

    def _solve(self, grid: Grid, n: float, scheme: str) -> PolicyLevel:
        # the steppers are of higher order than the scheme
        steps = max(FIRST_STEPS, math.ceil(FIRST_STEPS * (n / FIRST_NODES[self.problem.dim]) ** 0.75))
        if scheme == MONOTONE:
            steps *= 3
        begun = self.limits.spent
        level = self._solve_on(grid, steps, scheme)
        level.nodes, level.seconds = n, self.limits.spent - begun
        level.at = self._at(level)
        level.witnessed = np.concatenate([level.at, self._answers(level, self._beside(grid))])
        self.iterations += level.iterations
        return level

    def _at(self, level: PolicyLevel) -> np.ndarray:
        """The answer at the points that matter, and the average of ergodic problems."""
        answers = self._answers(level, self.points)
        return answers if level.average is None else np.append(answers, level.average)

    def _answers(self, level: PolicyLevel, points: np.ndarray) -> np.ndarray:
        return np.asarray(level.recipe.grid.interpolate(level.V[:, 0], points, level.recipe.width))

    def _beside(self, grid: Grid) -> np.ndarray:
        """Witnesses beside the points, the same for all levels in a box."""
        if not self.levels or self._witnesses is None:
            beside = witnesses(grid, self.points)
            self._witnesses = beside[~held(self.problem, beside)]
        return self._witnesses

    def _solve_on(self, grid: Grid, steps: int, scheme: str) -> PolicyLevel:
        bellman = Bellman(self.problem, grid, scheme)
        if self.problem.horizon is None:
            solved = solve_stationary(bellman, self._guess(grid))
            level = PolicyLevel.still(Discretization(grid, (), scheme, IMPLICIT), solved)
            if level.average is not None:
                level.states = [level.V - self._answers(level, self.points[:1])]
            return level
        rule = plan_terminal(bellman.generator.problem, grid, bellman.box, self.smoothing if scheme != MONOTONE else 2)
        stepper = EULER if scheme == MONOTONE else self.stepper
        recipe = Discretization(grid, (), scheme, stepper, rule)
        if stepper == EXPLICIT:
            try:
                return march(bellman, recipe, None, self.limits)
            except TooManySteps:
                self.stepper = stepper = IMPLICIT
        times = self._times(steps, scheme, rule.smoothed)
        recipe = Discretization(grid, tuple(times.tolist()), scheme, stepper, rule)
        # a second opinion is wrong by far more than policies that are nearly the best
        change = self.change if scheme == self.scheme else max(self.change, OPINION_CHANGE)
        return march(bellman, recipe, times.tolist(), self.limits, change)

    def _times(self, steps: int, scheme: str, rough: bool) -> np.ndarray:
        """Time nodes; those of terminal data that were smoothed crowd towards the horizon."""
        power = CROWDING if rough and scheme != MONOTONE else 1
        return np.asarray((self.problem.horizon or 0.0) * (1.0 - np.linspace(0.0, 1.0, steps + 1)[::-1] ** power))

    def _guess(self, grid: Grid) -> Act | None:
        """Policy of the finest level so far at the nearest nodes."""
        if not self.levels:
            return None
        return self._nearest(self.levels[-1].acts[-1], self.levels[-1].recipe.grid, grid)

    @staticmethod
    def _nearest(act: Act, coarse: Grid, grid: Grid) -> Act:
        """A policy at the nearest nodes of another grid."""
        nearest = [
            np.searchsorted(0.5 * (old[1:] + old[:-1]), new) for old, new in zip(coarse.nodes, grid.nodes, strict=True)
        ]
        index = np.ravel_multi_index(np.meshgrid(*nearest, indexing="ij"), coarse.shape).reshape(-1)
        return Act(act.a[torch.as_tensor(index)], None if act.stop is None else act.stop[index])

    def _check(self, layout: Frame) -> Check:
        """Compare with a monotone scheme on coarse grids: within its own error it must agree."""
        d = self.problem.dim
        mine = None if not self.levels else as_numpy(self.levels[-1].at)
        before: np.ndarray | None = None
        record = Check(False)
        # what converges at the order of a smooth solution is looked at on coarse grids, all else from finer ones on
        smooth = self.levels and self._verdict().confirmed and not self.kinked
        for n in CHECK_NODES[d][:-1] if smooth and d == 1 else CHECK_NODES[d][1:] if d == 1 else CHECK_NODES[d]:
            try:
                level = self._solve(layout.grid(n), float(n), MONOTONE)
            except (InputError, NotConvergedError, OutOfTimeError) as error:
                if mine is None:
                    raise
                # no answer to compare with: the high-order one stands on its own convergence, and says so
                return replace(record, agrees=True, unchecked=str(error) or self.limits.over)
            now = as_numpy(level.at)
            if before is not None and mine is not None:
                change, difference = float(np.abs(now - before).max()), float(np.abs(now - mine).max())
                agrees = bool(difference <= CHECK_FACTOR * change + 10.0 * self._tolerance())
                record = Check(agrees, difference, change)
                if agrees and change <= TELLING * float(np.abs(mine).max()):
                    break
            before = now
        if not record.agrees and self.opened:
            record = self._with_its_cut(layout, level, record)
        return record

    def _with_its_cut(self, layout: Frame, level: PolicyLevel, record: Check) -> Check:
        """The comparison again in a wider box: the error of the monotone scheme at a cut is of first order too."""
        try:
            wide = self._solve_on(layout.widened(level.recipe.grid), level.recipe.steps, MONOTONE)
        except (InputError, NotConvergedError, OutOfTimeError):
            return record
        moved = float(np.abs(self._at(wide) - as_numpy(level.at)).max())
        change = record.change + moved
        agrees = bool(record.difference <= CHECK_FACTOR * change + 10.0 * self._tolerance())
        return replace(record, agrees=agrees, change=change)
