"""Finer and finer grids and clocks until the density and the fluxes that were asked for are within the tolerance."""

import contextlib
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np

from kolmo.arrays import as_numpy
from kolmo.discretization import Discretization
from kolmo.errors import NotConvergedError
from kolmo.forward.clock import graded_clock
from kolmo.forward.density import Density, Spreading, read_again
from kolmo.forward.exits import Exit
from kolmo.forward.layout import Asked, LawLayout, Start, depth, first_step, law_layout
from kolmo.forward.levels import ROUNDING, TINY, LawLevel, Quantity, judged
from kolmo.grid import Grid
from kolmo.kernels.first_use import clock
from kolmo.limits import Limits, OutOfTimeError
from kolmo.problem import KolmogorovProblem
from kolmo.refine.estimate import Convergence, Verdict
from kolmo.refine.levels import GROWTH
from kolmo.refine.search import AIM, CUT_SAFETY, CUT_SHARE, LEAST_SHARE, MAX_GROWTH
from kolmo.schemes.base import SCHEMES
from kolmo.schemes.terminal import plan_averages, plan_terminal
from kolmo.steppers.base import STEPPERS

SCHEME, ROBUST, POSITIVE = "central6", "monotone", "implicit-euler"
# How much finer the first level is, in turn, where the law grows on it.
FINER = (1.0, 2.0, 4.0, 8.0)
# Nodes per axis of the first level.
FIRST_NODES = {1: 61, 2: 25, 3: 15}
# Nodes of the first level within the width of a centre of a graded axis.
SEEN = 6.0
MAX_SECONDS = 120.0
# First steps of the first clock, by order in time; at most so many.
FIRST_STEPS, MOST_STEPS = {1: 16, 2: 12, 3: 12, 5: 8}, 4096
# Times that the box is widened.
CUT_TRIES = 8
# Axes are refined alone by this factor to see what each contributes.
ALONE = 1.4
# A way out through which less than this part of the largest flux goes, or of the mass in the whole time; points where
# the density is less than this part of its peak; and a law of which less is left count as if they had so much: rounding
# leaves no more digits.
NEGLIGIBLE = 1e-6
# Places at which the whole law is compared, per axis.
WHOLE = {1: 401, 2: 61, 3: 17}
# Part of an axis next to a cut where the law is not looked at: what it would be beyond has gathered there.
AT_CUT = 0.05
# Sum of the moduli of a law's masses from which on the steps are taken to be unstable.
GREW = 10.0
# Angle by which the drift may turn in a step; beyond one dimension only.
TURN = 1.0
# Part of the change before which the last one falls short of where levels converge (order one would do: 1 / GROWTH).
STUCK = 0.7


class LawSearch:
    """State of one search.

    Parameters
    ----------
    problem : KolmogorovProblem
        The process.
    start : Start
        Where it starts.
    asked : Asked
        What is wanted of it.
    rtol, atol : float
        Tolerance.
    scheme, stepper : str
        Names, or "auto".
    """

    def __init__(
        self,
        problem: KolmogorovProblem,
        start: Start,
        asked: Asked,
        rtol: float,
        atol: float,
        scheme: str,
        stepper: str,
    ) -> None:
        self.problem, self.start, self.asked, self.rtol, self.atol = problem, start, asked, rtol, atol
        self.scheme, self.stepper = SCHEME if scheme == "auto" else scheme, stepper
        self.ways = self._ways(free=scheme == "auto")
        self.levels: list[LawLevel] = []
        self.cut: dict[Exit, float] = {}
        self._judged: tuple[LawLevel, list[tuple[Quantity, float, Verdict]]] | None = None
        self._shortest: float | None = None
        self._probe: tuple[np.ndarray, np.ndarray] | None = None

    def _ways(self, *, free: bool) -> list[tuple[str, str, float]]:
        """Schemes, steppers and first resolutions in turn: what takes over where a law grows.

        Implicit steps in one dimension, split ones beyond it; where the coarse grids do not bear the drift, finer ones;
        in the end the scheme that bears everything.
        """
        if self.stepper != "auto":
            return [(self.scheme, self.stepper, 1.0)]
        if SCHEMES[self.scheme].monotone:
            return [(self.scheme, POSITIVE, 1.0)]
        if self.problem.dim == 1:
            ways = [(self.scheme, "radau5", finer) for finer in FINER]
        else:
            leaves = self.problem.box.has("exits")
            # values of faces are not seen along characteristics
            steppers = ["mcs3"] + ["semi-lagrangian"] * (not leaves) + ["radau5"] * (self.problem.dim == 2)
            ways = [(self.scheme, stepper, 1.0) for stepper in steppers]
        return ways + [(ROBUST, POSITIVE, 1.0)] * free

    @property
    def order(self) -> int:
        """Order of the scheme."""
        return SCHEMES[self.scheme].order

    def run(self, limits: Limits) -> Density:
        """Refine until the estimates meet the tolerance."""
        self.limits = limits
        self._turning = self._longest()
        tail = max(1e-2 * self.rtol, 1e-12)
        on_node = SCHEMES[self.scheme].monotone
        layout = law_layout(self.problem, self.start, self.asked, tail, on_node=on_node)
        self.layout, self.sight = layout.broken(self.problem, self.start, self.rtol)
        self.problem = self.problem.broken_at(self.sight.breakpoints)
        for way in self.ways:
            self.scheme, self.stepper, self._finer = way
            self.levels, self.cut, self._growth, self._shortest = [], {}, GROWTH[self.problem.dim], None
            with contextlib.suppress(_GrewError):
                return self._refine()
        raise NotConvergedError(
            f"the law grew beyond all bounds on {self.layout.box!r} in every way tried: {self.ways}"
        )

    def _refine(self) -> Density:
        """From the first level on, and then see to the cut."""
        n, steps = self._first, FIRST_STEPS[STEPPERS[self.stepper].order]
        try:
            self.levels.append(self._solve(self.layout.grid(n, self._least), n, steps))
            self._balance()
            while True:
                if self._stuck():
                    self._balance()
                grown = self._next() / self.levels[-1].n
                n, steps = self.levels[-1].n * grown, self._paced(self.levels[-1].steps, grown)
                told = self._limit(n)
                if told:
                    if self.layout.cut and not self.cut:
                        self._measure_cut(self.levels[max(0, len(self.levels) - 2)])
                    return self._result("tolerance_not_met", told)
                self.levels.append(self._solve(self.layout.grid(n, self._least), n, steps))
                if len(self.levels) >= 3 and self._within(1.0 - CUT_SHARE) and self._settle_cut():
                    return self._result("converged", "the estimates meet the tolerance")
        except OutOfTimeError:
            return self._result("tolerance_not_met", f"stopped by {self.limits.over}")
        except KeyboardInterrupt:
            if not self.levels:
                raise
            return self._result("interrupted", "interrupted; the finest level finished is returned")

    @property
    def _first(self) -> float:
        """Resolution of the first level: nodes that an even axis has, and those that see the finest place of others."""
        seen = (SEEN * depth(g) for g in self.layout.gradings)
        return self._finer * max([float(FIRST_NODES[self.problem.dim]), *seen])

    @property
    def _least(self) -> int:
        return SCHEMES[self.scheme].minimum_nodes

    def _paced(self, steps: int, grown: float) -> int:
        """Steps for a grid that grew: the errors in space and time fall alike."""
        more = steps * grown ** (self.order / STEPPERS[self.stepper].order)
        return int(min(2 * math.ceil(0.5 * more), MOST_STEPS))

    def _solve(self, grid: Grid, n: float, steps: int, times: tuple[float, ...] = ()) -> LawLevel:
        begun, problem = clock(), self.problem
        times = times or self._times(steps)
        box, seen = problem.box.replace(*grid.box), self.sight
        rule = None if problem.terminal is None else plan_terminal(problem, grid, box, self.order)
        averages = plan_averages(problem, grid, box, self.order, seen.unresolved)
        recipe = Discretization(grid, times, self.scheme, self.stepper, rule, seen.breakpoints, averages)
        stop = self.limits.late if self.levels else None
        density = Spreading(problem, recipe, self.asked.kept, stop).run(self.start.initial)
        # of a law the moduli of the masses sum to about one, with ringing to two or three
        if not np.abs(density.weights).sum(1).max() < GREW:
            raise _GrewError
        return LawLevel(density, n, steps, clock() - begun)

    def _times(self, steps: int) -> tuple[float, ...]:
        """Clock: on the first one the first steps are those in which the law goes a cell of the first grid."""
        problem = self.problem
        horizon = problem.horizon or 0.0
        if self._shortest is None:
            grid = self.layout.grid(self._first, self._least)
            self._shortest = first_step(problem, self.start, grid, steps) * steps
        longest = min(horizon / steps, self._turning)
        first = min(min(self._shortest, self._earliest()) / steps, longest)
        kept, breaks = self.asked.kept, problem.sde.breakpoints
        growth = steps / FIRST_STEPS[STEPPERS[self.stepper].order]
        clock = graded_clock(horizon, first, steps, fixed=kept, breaks=breaks, longest=longest, growth=growth)
        return tuple(clock.tolist())

    def _earliest(self) -> float:
        """First time at which something is asked for; where fluxes are wanted at all times, the steps show it."""
        times = [t for t in self.asked.kept if t > 0]
        if self.asked.flux_times is not None:
            times += [t for t in self.asked.flux_times.tolist() if t > 0]
        return min(times)

    def _longest(self) -> float:
        """Time in which the drift turns by so much around the start: longer split steps may agree, and err."""
        if self.problem.dim == 1:
            return math.inf
        x = self.start.mean
        shift = 1e-4 * (np.abs(x).max() + float(self.start.spread.max()) + 1e-3)
        moves = shift * np.eye(self.problem.dim)
        b = self.problem.sde.drift
        slopes = [(np.asarray(b(0.0, (x + m)[None])) - np.asarray(b(0.0, (x - m)[None])))[0] for m in moves]
        turning = float(np.abs(np.linalg.eigvals(np.array(slopes).T / (2.0 * shift)).imag).max())
        return TURN / turning if turning > 0 else math.inf

    # ------------------------------------------------------------------------------------------- what was asked for
    def _quantities(self, levels: Sequence[LawLevel]) -> list[Quantity]:
        """What was asked for, on some levels, at places and times that they share."""
        laws = [level.density for level in levels]
        last = laws[-1]
        found = [self._density_of(laws)]
        if self.asked.fluxes and last.exits:
            times = last.clock if self.asked.flux_times is None else self.asked.flux_times
            values = {e: [law.exit_flux(e, times) for law in laws] for e in last.exits}
            largest = max(float(np.abs(v[-1]).max()) for v in values.values())
            least = NEGLIGIBLE * max(largest, 1.0 / (self.problem.horizon or 1.0))
            found += [Quantity(e, v, None, least) for e, v in values.items()]
        least = NEGLIGIBLE * self._typical
        return [*found, Quantity("value", [np.atleast_1d(law.value) for law in laws], None, least)]

    @cached_property
    def _typical(self) -> float:
        """Size of the terminal data, by the median over the box: they may grow towards its ends."""
        if self.problem.terminal is None:
            return 0.0
        return float(np.median(np.abs(as_numpy(self.problem.final(self._places()[0])))))

    def _density_of(self, laws: list[Density]) -> Quantity:
        """The density at the points and times kept, or as a whole."""
        times = [t for t in self.asked.kept if t > 0]
        if self.asked.points is not None:
            values = [np.array([law(self.asked.points, t) for t in times]) for law in laws]
            peak = max(float(np.abs(laws[-1].values[-len(times) :]).max()), TINY)
            return Quantity("density", values, None, NEGLIGIBLE * peak)
        points, volumes = self._places()
        values = [np.array([law(points, t) for t in times]) for law in laws]
        return Quantity("density", values, volumes, NEGLIGIBLE)

    def _places(self) -> tuple[np.ndarray, np.ndarray]:
        """Places where the law as a whole is compared, and their volumes."""
        if self._probe is None:
            self._probe = _probe(self.layout)
        return self._probe

    def _beyond(self, law: Density) -> float:
        """Mass near the ends of a cut, where the law as a whole is not looked at."""
        if self.asked.points is not None:
            return 0.0
        places, x = self._places()[0], law.grid.points
        outside = ((x < places.min(0)) | (x > places.max(0))).any(1)
        opened = self.layout.cut and bool(outside.any())
        return float(np.abs(law.weights[:, outside]).sum(1).max()) if opened else 0.0

    def _tolerance(self, quantity: Quantity) -> float:
        return self.atol + self.rtol * quantity.scale

    def _estimates(self) -> list[tuple[Quantity, float, Verdict]]:
        """Every quantity, its estimated error (the cut not counted), and what the levels say of it."""
        if self._judged is not None and self._judged[0] is self.levels[-1]:
            return self._judged[1]
        resolutions = [level.n for level in self.levels]
        found = []
        for quantity in self._quantities(self.levels):
            verdict = judged(quantity, resolutions, self.order)
            error = float(verdict.estimate.max())
            if quantity.name == "density":
                error += self._unread()
            found.append((quantity, max(error, quantity.negative), verdict))
        self._judged = self.levels[-1], found
        return found

    def _unread(self) -> float:
        """By how much two readings of the density next to walls differ on the last level: levels share that error."""
        law = self.levels[-1].density
        other = read_again(law, self.problem.box.replace(*law.grid.box))
        return self._density_of([other, law]).changes[0]

    def _within(self, share: float) -> bool:
        return all(error <= share * self._tolerance(q) for q, error, _ in self._estimates())

    # ------------------------------------------------------------------------------------------- where to go from here
    def _next(self) -> float:
        """Resolution of the next level, from what the levels say of every quantity."""
        last = self.levels[-1]
        if len(self.levels) < 3:
            return last.n * self._growth
        policy, resolutions, most = Convergence(self.order), [level.n for level in self.levels], MAX_GROWTH
        wanted = []
        for q, _, verdict in self._estimates():
            allowed = max(AIM * (self._tolerance(q) - self.cut.get(q.name, 0.0)), 0.1 * self._tolerance(q))
            bounds = {"least": self._slightly, "most": most[self.problem.dim]}
            wanted.append(policy.next_resolution(resolutions, verdict, np.array([allowed]), **bounds))
        return max(wanted)

    @property
    def _slightly(self) -> float:
        """Growth at least: levels nearer to each other do not tell an order."""
        return 1.0 + 0.5 * (GROWTH[self.problem.dim] - 1.0)

    def _limit(self, n: float) -> str:
        """Why no finer level may be begun, or nothing."""
        cells = math.prod(n * share for share in self.layout.shares)
        last = self.levels[-1]
        ahead = last.seconds * (n / last.n) ** (self.problem.dim + self.order / STEPPERS[self.stepper].order)
        reason = self.limits.excess(cells, ahead)
        return f"stopped by {reason}" if reason else ""

    def _change(self, before: LawLevel, after: LawLevel) -> float:
        """Largest change of what was asked for from one level to another, relative to its size."""
        return max(q.changes[-1] / (q.scale + TINY) for q in self._quantities([before, after]))

    def _stuck(self) -> bool:
        """Whether the last levels differ hardly less than those before: one of their parts lags behind."""
        if len(self.levels) < 3:
            return False
        before, last = (self._change(a, b) for a, b in zip(self.levels[-3:], self.levels[-2:], strict=False))
        return last > max(STUCK * before, self.rtol)

    def _balance(self) -> None:
        """Give the axes nodes, and the clock steps, in proportion to the errors that they cause on the last level.

        Each axis is refined alone, on the same clock. The steps are doubled until that changes the answer no more than
        the axes do, or the tolerance asks for. Levels begin anew from there.
        """
        base, d = self.levels[-1], self.problem.dim
        gains = []
        for i in range(d):
            shares = tuple(s * (ALONE if j == i else 1.0) for j, s in enumerate(self.layout.shares))
            grid = replace(self.layout, shares=shares).grid(base.n, self._least)
            same = base.density.discretization.times
            gains.append(self._change(base, self._solve(grid, base.n, base.steps, same)))
        worst, change = max(gains), math.inf
        while 2 * base.steps <= MOST_STEPS:
            finer = self._solve(base.density.grid, base.n, 2 * base.steps)
            change = self._change(base, finer)
            if change <= max(worst, self.rtol):
                break
            base = finer
            self.levels = [base]
        if d > 1 and worst > 0:
            parts = [max((g / worst) ** (1.0 / self.order), LEAST_SHARE) for g in gains]
            scale = math.prod(parts) ** (-1.0 / d)
            wanted = np.array(self.layout.shares) * scale * np.array(parts)
            wanted = np.maximum(wanted, LEAST_SHARE * wanted.max())
            self.layout = replace(self.layout, shares=tuple(wanted.tolist()))
        # of the three levels that it takes at least, the last shall meet the tolerance
        excess = max(worst, change) / (AIM * max(self.rtol, TINY))
        self._growth = min(max(excess ** (0.5 / self.order), self._slightly), MAX_GROWTH[d])

    # ------------------------------------------------------------------------------------------- the cut
    def _settle_cut(self) -> bool:
        """Measure the effect of the cut; while it exceeds its share, go over to the wider box."""
        if not self.layout.cut:
            return True
        # it depends little on the resolution, and costs less on a coarser level
        self._measure_cut(self.levels[-2])
        if self._cut_fits():
            return True
        for _ in range(CUT_TRIES):
            layout, wide = self._measure_cut(self.levels[-1])
            if self._cut_fits():
                return True
            # the wider box has the same nodes inside: its solution takes the place of the last level, and of those
            # before, which would differ from it by the cut
            self.levels = [*(self._wider(level)[1] for level in self.levels[-3:-1]), wide]
            self.layout, self._probe = layout, None
        return False

    def _cut_fits(self) -> bool:
        return all(self.cut[q.name] <= CUT_SHARE * self._tolerance(q) for q in self._quantities(self.levels[-1:]))

    def _measure_cut(self, level: LawLevel) -> tuple[LawLayout, LawLevel]:
        """Solve again with nodes beyond the open faces: the difference is the effect of the cut."""
        layout, wide = self._wider(level)
        self.cut = {q.name: CUT_SAFETY * q.changes[-1] for q in self._quantities([level, wide])}
        self.cut["density"] += self._beyond(level.density)
        return layout, wide

    def _wider(self, level: LawLevel) -> tuple[LawLayout, LawLevel]:
        """A level with nodes beyond the open faces."""
        layout, grid = self.layout.widened(level.density.grid)
        return layout, self._solve(grid, level.n, level.steps, level.density.discretization.times)

    # ------------------------------------------------------------------------------------------- the answer
    def _result(self, status: str, message: str) -> Density:
        best = self.levels[-1]
        found = [(q, error + self.cut.get(q.name, 0.0)) for q, error, _ in self._estimates()]
        errors = {q.name: error for q, error in found}
        fluxes = {e: errors[e] for e in best.density.exits if e in errors}
        told = {"density": errors["density"], "value": errors["value"]}
        if fluxes:
            told["flux"] = max(fluxes.values())
        recipe = best.density.discretization
        recipe.estimate.update({name: [error] for name, error in told.items()})
        stats = {
            "cells": recipe.grid.size,
            "steps": recipe.steps,
            "levels": len(self.levels),
            "seconds": self.limits.spent,
        }
        return replace(
            best.density,
            error_estimate=told,
            status=status,
            message=message + self._unmet(found) + _negative([q for q, _ in found]),
            stats=stats,
            _flux_errors=fluxes,
        )

    def _unmet(self, found: list[tuple[Quantity, float]]) -> str:
        """Which tolerances are not met, and by what."""
        unmet = [
            f"{_named(q.name)} ± {error:.1e} for {self._tolerance(q):.1e}"
            for q, error in found
            if error > self._tolerance(q)
        ]
        return "".join("; " + part for part in unmet)


def _probe(layout: LawLayout) -> tuple[np.ndarray, np.ndarray]:
    """Places (n, d) where the law as a whole is compared, and their volumes; not at the very ends of a cut."""
    grid = Grid.of(layout.box, WHOLE[layout.box.dim], layout.gradings)
    ends = []
    for axis, pair in zip(grid.axes, layout.box.faces, strict=True):
        low, high = (AT_CUT if face.cut else 0.0 for face in pair)
        ends.append((axis.xi >= low) & (axis.xi <= 1.0 - high))
    inside = grid.product(ends) > 0
    return grid.points[inside], grid.volumes[inside]


class _GrewError(Exception):
    """Steps let the law grow: with strong correlations split ones may, at walls."""


def _named(name: Exit) -> str:
    return str(name) if name in ("density", "value") else f"flux through {name}"


def _negative(quantities: list[Quantity]) -> str:
    """What is negative by more than rounding, and what never is."""
    told = [
        f"{_named(q.name)} is negative by up to {q.negative:.1e}"
        for q in quantities
        if q.negative > ROUNDING * max(q.scale, TINY)
    ]
    if not told:
        return ""
    return "; " + ", ".join(told) + ": scheme='monotone' keeps both non-negative"
