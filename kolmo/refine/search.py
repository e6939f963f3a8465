"""The search: from a first layout through levels, until the estimate meets the tolerance or a limit is met."""

import contextlib
import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from kolmo.arrays import as_numpy
from kolmo.discretization import Discretization
from kolmo.errors import NotConvergedError
from kolmo.limits import Limits, OutOfTimeError
from kolmo.problem.problem import KolmogorovProblem
from kolmo.refine.estimate import Convergence, Verdict
from kolmo.refine.family import Family, rounding_of
from kolmo.refine.layout import FIRST_NODES, Layout
from kolmo.refine.levels import (
    EXPLICIT,
    FIRST_SPLIT_STEPS,
    GROWTH,
    IMPLICIT,
    LEAST_PACE,
    MOST_STEPS,
    ROBUST,
    SPLIT,
    SPLIT_GROWTH,
    TINY,
    TRANSPORT,
    Level,
    Levels,
    RanAwayError,
    drawing_rate,
    relative_change,
    sizes,
)
from kolmo.refine.witnesses import groups
from kolmo.schemes.base import SCHEMES
from kolmo.steppers.base import STEPPERS

MAX_GROWTH = {1: 2.0, 2: 1.8, 3: 1.6}
# Order of the splines of degree seven that are read at the feet of characteristics.
SPLINES = 8.0
# Part of the last change, by twice the steps along characteristics, that the next one has to fall to: they are of order
# 2 at least, but each interpolates, and on a coarse grid many of them do so badly.
CALMER = 0.7
SILENT = (
    "terminal data, source and face values were zero wherever they were looked at, and so is the answer; if they are "
    "not, say where by breaks="
)
# Ranges of the data by which an answer may lie outside of them on the way; at the end it may not at all.
RUNAWAY_RANGE = 1.0
# Part of the tolerance that the next level aims at.
AIM = 0.7
# Change of an axis' share of the nodes from which on the first level is solved again.
RESHAPED = 0.1
# Least proportion between the axes' numbers of nodes.
LEAST_SHARE = 0.4
# Levels that are solved again to see whether a plan still holds.
JUDGED = 4
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
# Least estimate, as a part of the tolerance, where functions were sampled: narrow things are followed from a tenth of
# the tolerance on, and the box leaves out a hundredth of it, times how high they are.
UNSEEN = 0.03


@dataclass
class Outcome:
    """Result of a search: the finest level with its estimate, and the levels that it was judged by."""

    level: Level
    estimate: np.ndarray
    status: str
    message: str
    family: Family
    stats: dict[str, Any] = field(default_factory=dict)


class Search(Levels):
    """State of one search."""

    def __init__(self, problem: KolmogorovProblem, *given: Any) -> None:
        super().__init__(problem, *given)
        self._abandoned: list[Level] = []
        self.cut = np.zeros(1)
        self._measured: Level | None = None
        self._cut_seen: tuple[Discretization, ...] = ()
        self._judged: tuple[list[Level], Verdict] | None = None
        self._growth, self._hurried = GROWTH[problem.dim], False

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
            self._cut_seen = ()
            self._growth = GROWTH[self.problem.dim]
            with contextlib.suppress(RanAwayError):
                return self._refine()
        raise AssertionError("the last way is not guarded")

    def _refine(self) -> Outcome:
        """Levels until one will do, or a limit, Ctrl-C or the callback ends them."""
        try:
            return self._from_level_to_level()
        except KeyboardInterrupt:
            if not self.levels:
                raise
            return self._outcome("interrupted", "interrupted by the callback or Ctrl-C; the finest level is returned")

    def _from_level_to_level(self) -> Outcome:
        """From the first level on, and then see to the cut."""
        d = self.problem.dim
        layout = self._layout
        n = min(float(FIRST_NODES[d]), (self.limits.cells / math.prod(layout.shares)) ** (1.0 / d))
        if d > 1 and not self.problem.stationary:
            generator = self._generator(layout.grid(n, SCHEMES[self.scheme].minimum_nodes))
            # steps that are long for the drift may agree, and be wrong
            wanted = (self.problem.horizon or 0.0) * drawing_rate(generator)
            self._hurried = wanted > MOST_STEPS
            self._slowest = 0.0 if self._hurried else wanted / FIRST_SPLIT_STEPS
            self._pace = max(1.0, self._slowest)
            if self._along_characteristics(generator):
                self._carried = self.stepper != "auto" or self._carrying_pays(layout, n)
                layout, self._pace = self._way(layout, carried=self._carried)
        try:
            while True:
                level = self._solve(layout, n)
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
            raise RanAwayError

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
            except RanAwayError:
                break  # it is the distance that this grid does not bear: a finer one has to show what is there
            if self._cut_fits():
                self._follow(layout)
                return layout, True
            effects.append(float(np.max(self.cut)))
            if len(effects) > CUT_PATIENCE and effects[-1] > 0.5 * effects[-1 - CUT_PATIENCE]:
                break  # it does not get smaller with the distance: a finer level has to show what it is
        return layout, False

    def _follow(self, layout: Layout) -> None:
        """The levels below the last one on its wider box: else they differ by what the narrower one has cut off."""
        *below, last = self.levels
        self.levels = [*(self._solve(layout, level.n) for level in below[-2:]), last]

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
        self._cut_seen = level.discretization, wide.discretization
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
        return Outcome(best, estimate, status, message, self._family(), stats)

    def _family(self) -> Family:
        """The last levels as recipes."""
        levels = self.levels[-JUDGED:]
        return Family(
            recipes=tuple(level.discretization for level in levels),
            resolutions=tuple(level.n for level in levels),
            convergence=self._convergence,
            cut=self._cut_seen,
            safety=CUT_SAFETY,
            unseen=0.0 if self.sight.proved else UNSEEN,
        )

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
        return self._convergence.judge(
            [level.n for level in self.levels],
            [level.witnessed for level in self.levels],
            groups=groups(len(self.points), self.problem.dim),
            rounding=rounding_of(as_numpy(self.levels[-1].run.state), system=self.problem.stationary),
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

    def _proportioned(self, layout: Layout, n: float) -> Layout:
        """Give each axis nodes, and time steps, in proportion to the error they cause, seen by refining one alone."""
        base, gains, d = self.levels[-1], [], self.problem.dim
        for i in range(d):
            shares = tuple(share * (1.4 if j == i else 1.0) for j, share in enumerate(layout.shares))
            grid = replace(layout, shares=shares).grid(n, SCHEMES[self.scheme].minimum_nodes)
            gains.append(relative_change(base, self._solve_on(grid, base.effort, n)))
        worst = max(gains)
        shares = tuple(max((g / (worst + TINY)) ** (1.0 / self.order), LEAST_SHARE) for g in gains)
        # the same number of cells, differently shaped
        scale = math.prod(shares) ** (-1.0 / len(shares))
        by_space = worst * scale**-self.order
        self._set_pace(by_space)
        # of the three levels that it takes at least, the last shall meet the tolerance; estimates are twice the error
        allowed = float(np.min(AIM * self._tolerance() / sizes(base)))
        excess = 2.0 * d * by_space / max(allowed, TINY)
        self._growth = min(max(excess ** (0.5 / self.order), GROWTH[d]), MAX_GROWTH[d])
        return replace(layout, shares=tuple(scale * share for share in shares)) if worst > 0 else layout

    def _set_pace(self, by_space: float) -> None:
        """Take as many steps as keep the error in time at that in space: a grid does not know how long the horizon is.

        The steps of the first level are doubled until that changes it no more than refining its axes does; or no longer
        changes it less and less: then it is the grid that errs in every step.
        """
        wanted = max(by_space, CUT_SHARE * float(np.min(self._tolerance() / sizes(self.levels[-1]))))
        before, calmest = math.inf, self.levels[-1]
        while self._pace * FIRST_SPLIT_STEPS <= MOST_STEPS:
            level = self.levels[-1]
            if not self._splits(level):
                return
            self._pace *= 2.0
            self.levels[-1] = self._solve_on(level.discretization.grid, level.effort, level.n)
            change = relative_change(level, self.levels[-1])
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
