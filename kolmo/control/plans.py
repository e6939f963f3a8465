"""Plans that are kept: between the calls of one loop, and over a whole minimisation."""

import logging
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace

import numpy as np
import torch

from kolmo.arrays import as_like, as_numpy
from kolmo.control.structure import structure
from kolmo.discretization import Discretization
from kolmo.errors import ToleranceWarning
from kolmo.problem import KolmogorovProblem
from kolmo.refine.family import Family, state
from kolmo.refine.plan import search

LOGGER = logging.getLogger("kolmo")
# Plans kept between calls.
KEPT = 8
# Change of the answer since it was last judged, as a part of its size and of the room that was left between estimate
# and tolerance, from which on it is judged again; calls after which it is in any case.
MOVED, CALLS = 0.1, 16
# Part of the tolerance that a plan is made for where one did not hold: parameters move on.
AHEAD = 0.5
# Calls after which a plan is made afresh, first; each time twice as many.
FIRST_FRESH = 64
# Growth of an estimate that did not meet the tolerance in the first place, up to which a plan serves all the same.
WORSE = 1.5
# Points that a plan is made for, at most: of more, every so many.
MOST_POINTS = 2048


@dataclass(frozen=True)
class Asked:
    """Tolerances and limits that a plan is made for."""

    rtol: float
    atol: float
    max_seconds: float | None = None
    max_cells: int | None = None

    def serves(self, other: "Asked") -> bool:
        """Whether a plan made for this is good enough for the other."""
        return self.rtol <= other.rtol and self.atol <= other.atol


@dataclass
class Kept:
    """A plan that is kept, and what it was made for.

    Attributes
    ----------
    problem : KolmogorovProblem or None
        The problem, where the plan belongs to one object.
    points : tensor, shape (n, d)
        Points it was made for.
    asked : Asked
        Tolerances.
    family : Family
        The levels it was found by; the last is the plan.
    excess : float
        Estimate over tolerance when it was made.
    room : float
        What the estimate left of what it may be, as a part of the tolerance, when it was last judged.
    """

    problem: KolmogorovProblem | None
    points: torch.Tensor
    asked: Asked
    family: Family
    excess: float
    room: float
    _judged: torch.Tensor | None = None
    _calls: int = 0
    _since: int = 0

    @classmethod
    def made(cls, problem: KolmogorovProblem, points: torch.Tensor, asked: Asked, part: float = 1.0) -> "Kept":
        """Plan at the present parameters, for a part of the tolerance."""
        points, finer = thinned(points), replace(asked, rtol=part * asked.rtol, atol=part * asked.atol)
        with torch.no_grad():
            outcome = search(problem.handing("torch", points.device), at=points, **vars(finer))
        if outcome.status == "interrupted":  # part of a search is no plan, and Ctrl-C is for the caller
            raise KeyboardInterrupt
        allowed = asked.atol + asked.rtol * np.abs(outcome.level.values).max(0)
        excess = float(np.max(outcome.estimate / allowed))
        if outcome.status == "tolerance_not_met":
            excess = max(excess, 1.0)
            warnings.warn(
                f"{outcome.message}; the value is that of the best grid found", ToleranceWarning, stacklevel=6
            )
        return cls(problem, points, asked, outcome.family, excess, max(1.0 - excess, 0.0))

    @property
    def limit(self) -> float:
        """Estimate over tolerance up to which it serves: where the tolerance was not met, planning again is no cure."""
        return max(1.0, WORSE * self.excess)

    @property
    def recipe(self) -> Discretization:
        """The plan."""
        return self.family.recipes[-1]

    def covers(self, points: torch.Tensor, asked: Asked) -> bool:
        """Whether it was made for such a tolerance, and points lie on its grid (a circle contains everything)."""
        axes = self.recipe.grid.axes
        low, high = (as_like(end, points) for end in self.recipe.grid.box)
        periodic = torch.tensor([axis.periodic for axis in axes], device=points.device)
        slack = 1e-9 * (high - low)
        inside = bool((((points >= low - slack) & (points <= high + slack)) | periodic).all())
        return inside and self.asked.serves(asked)

    def at_points(self, state: torch.Tensor) -> torch.Tensor:
        """Values at the points that it was made for, shape (n, k), of a state (size, k) on its grid."""
        values: torch.Tensor = self.recipe.grid.interpolate(state, self.points, self.recipe.width)
        return values

    def doubt(self, problem: KolmogorovProblem, points: torch.Tensor, state: torch.Tensor) -> str:
        """Why the plan does not serve any more, or nothing; ``state`` is what it gives on its grid."""
        self._calls, self._since = self._calls + 1, self._since + 1
        values = self.at_points(state)
        if not bool(torch.isfinite(values).all()):
            return "its values are not finite"
        if self._calls >= FIRST_FRESH and (self._calls & (self._calls - 1)) == 0:
            return f"it has served {self._calls} times"
        if self._judged is not None and self._since < CALLS:
            size = values.abs().amax(0) + torch.finfo(values.dtype).tiny
            if bool(((values - self._judged).abs().amax(0) <= MOVED * self.room * size).all()):
                return ""
        self._judged, self._since = values, 0
        everywhere = thinned(torch.cat([self.points, points]))
        with torch.no_grad():
            handed = problem.handing("torch", points.device)
            excess = self.family.excess(handed, as_numpy(everywhere), self.asked.rtol, self.asked.atol)
        self.room = max(self.limit - excess, 0.0)
        return "" if excess <= self.limit else f"the estimate of its error is {excess:.2g} times the tolerance"


Evaluation = Callable[[Discretization], tuple[torch.Tensor, torch.Tensor]]
"""A recipe → values at the points, and the state on its grid (size, k)."""


class Lasting:
    """Plans kept between calls, by the structure of problems; the latest few."""

    def __init__(self) -> None:
        self._kept: OrderedDict[Hashable, Kept] = OrderedDict()
        self._lock = threading.Lock()

    def value(
        self, problem: KolmogorovProblem, points: torch.Tensor, asked: Asked, evaluate: Evaluation
    ) -> torch.Tensor:
        """Values on the plan kept for problems of this structure, if it serves; else on a fresh one."""
        key = structure(problem)
        key = None if key is None else (key, asked)
        with self._lock:
            kept = self._kept.get(key) if key is not None else None
        points = points.reshape(-1, problem.dim)
        if kept is not None:
            if kept.covers(points, asked):
                values, state = evaluate(kept.recipe)
                doubt = kept.doubt(problem, points, state.detach())
                if not doubt:
                    return values
            else:
                doubt, points = "points lie outside of its grid", torch.cat([kept.points, points])
            LOGGER.info("planned afresh: a plan was kept, but %s", doubt)
        fresh = Kept.made(problem, points, asked, 1.0 if kept is None else AHEAD)
        values, state = evaluate(fresh.recipe)
        if key is not None:
            calls = 0 if kept is None else kept._calls
            judged = fresh.at_points(state.detach())
            with self._lock:
                self._kept[key] = replace(fresh, problem=None, _judged=judged, _calls=calls)
                self._kept.move_to_end(key)
                while len(self._kept) > KEPT:
                    self._kept.popitem(last=False)
        return values

    def clear(self) -> None:
        """Forget all."""
        with self._lock:
            self._kept.clear()


LASTING = Lasting()


class Plans:
    """Plans made once per problem and kept, so that an objective does not jump while it is minimised.

    Attributes
    ----------
    rebuilt : bool
        Whether an evaluation after the first met a problem not seen before, nor one of its structure.
    message : str
        What ``hold`` found.
    """

    def __init__(self) -> None:
        self._kept: dict[int, Kept] = {}
        # where a problem is built anew in every evaluation, the latest: it may hold what was computed there
        self._latest: dict[int, KolmogorovProblem] = {}
        self._structures: dict[Hashable, list[int]] = {}
        self._met: dict[Hashable, int] = {}
        self._evaluations = 0
        self._fresh: dict[int, Kept] = {}
        self.rebuilt = False
        self.message = ""

    def begin(self) -> None:
        """Note that an evaluation of the objective begins."""
        self._evaluations += 1
        self._met.clear()

    def _of(self, problem: KolmogorovProblem) -> int:
        """Key of the plan for a problem: that of the object, or of the one that was built in its place before."""
        if id(problem) in self._kept or self._evaluations <= 1:
            return id(problem)
        shape = structure(problem)
        alike = self._structures.get(shape, []) if shape is not None else []
        if not alike:
            return id(problem)
        turn = self._met.get(shape, 0)
        self._met[shape] = turn + 1
        return alike[min(turn, len(alike) - 1)]

    def find(self, problem: KolmogorovProblem, points: torch.Tensor, asked: Asked) -> Discretization:
        """The plan kept for the problem; a fresh one for a new problem, a finer tolerance or points outside."""
        key, flat = self._of(problem), points.reshape(-1, problem.dim)
        kept = self._kept.get(key)
        if kept is not None:
            self._latest[key] = problem
        if kept is not None and kept.covers(flat, asked):
            return kept.recipe
        if kept is None and self._evaluations > 1:
            # a problem made for one evaluation is not kept: it would never be met again
            self.rebuilt = True
            return Kept.made(problem, flat, asked).recipe
        if kept is not None:
            flat = torch.cat([kept.points, flat])
            rtol, atol = min(asked.rtol, kept.asked.rtol), min(asked.atol, kept.asked.atol)
            asked = replace(asked, rtol=rtol, atol=atol)
        else:
            self._structures.setdefault(structure(problem), []).append(key)
        self._kept[key] = Kept.made(problem, flat, asked)
        return self._kept[key].recipe

    def hold(self) -> bool:
        """Whether every kept plan still meets its tolerance at the present parameters, against a fresh plan."""
        self._fresh.clear()
        for key, kept in self._kept.items():
            latest = self._latest.get(key, kept.problem)
            assert latest is not None
            problem = latest.handing("torch")  # its functions may know tensors alone
            fresh = Kept.made(problem, kept.points, kept.asked)
            with torch.no_grad():
                old, new = (plan.at_points(torch.as_tensor(state(problem, plan.recipe))) for plan in (kept, fresh))
            change, scale = (v.abs().amax(0) for v in (old - new, new))
            # both are allowed an error of one tolerance
            if not bool((change <= 2.0 * (kept.asked.atol + kept.asked.rtol * scale)).all()):
                self._fresh[key] = fresh
                self.message = (
                    f"the plan made at the first parameters is off by {float(change.max()):.2e} at those found "
                    f"(rtol = {kept.asked.rtol:g})"
                )
        return not self._fresh

    def renew(self) -> None:
        """Put fresh plans in the place of those that ``hold`` found wanting."""
        self._kept.update(self._fresh)


_PLANS: ContextVar[Plans | None] = ContextVar("plans", default=None)


@contextmanager
def keeping_plans() -> Iterator[Plans]:
    """Within this context ``value`` plans once per problem and keeps the plan."""
    plans = Plans()
    token = _PLANS.set(plans)
    try:
        yield plans
    finally:
        _PLANS.reset(token)


def planned(problem: KolmogorovProblem, points: torch.Tensor, rtol: float, atol: float) -> Discretization:
    """A plan for points (..., d): the one kept, where plans are being kept, else a fresh one."""
    kept, asked = _PLANS.get(), Asked(rtol, atol)
    if kept is not None:
        return kept.find(problem, points, asked)
    return Kept.made(problem, points.reshape(-1, problem.dim), asked).recipe


def on_plan(problem: KolmogorovProblem, points: torch.Tensor, asked: Asked, evaluate: Evaluation) -> torch.Tensor:
    """Values by tolerance: on the plan of the minimisation that is under way, or on one kept between calls."""
    kept = _PLANS.get()
    if kept is not None:
        return evaluate(kept.find(problem, points, asked))[0]
    return LASTING.value(problem, points, asked, evaluate)


def thinned(points: torch.Tensor) -> torch.Tensor:
    """So many of the points as a plan is made for."""
    return points[:: -(-len(points) // MOST_POINTS)] if len(points) > MOST_POINTS else points
