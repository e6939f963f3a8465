"""Many problems at once: one plan, or a few, for all of them; each is certified by its own levels."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kolmo.arrays import as_like, as_numpy, as_points, is_tensor
from kolmo.errors import InputError, KolmoError
from kolmo.many.ensemble import Ensemble, Judged
from kolmo.many.look import extremes, kind_of, sampled
from kolmo.problem import KolmogorovProblem
from kolmo.refine.plan import interesting_points, search
from kolmo.shown import Shown
from kolmo.solution import Solution
from kolmo.solve import solve

# Part of the tolerance that a plan aims at, so that it serves problems that are somewhat harder.
AIM = 0.5
# Plans that are made for problems of one kind at most; so many problems are solved one by one, and a plan after
# the first that serves a smaller part of those left is the last.
PLANS, FEW, WORTH = 4, 3, 0.2
# Problems among which the first one to plan for is chosen, by how far the process goes: that with this quantile, so
# that it is not the odd one out.
COMPARED, FAR = 32, 0.9
# Of those that a plan does not serve the next one is made for that with this quantile of the estimate.
HARD = 0.75


@dataclass(frozen=True, eq=False)
class Members:
    """Problems that an ensemble solved.

    Attributes
    ----------
    ensemble : Ensemble
        Their plan.
    which : ndarray of int
        Their places in the list.
    judged : Judged
        What was found of them, in this order.
    """

    ensemble: Ensemble
    which: np.ndarray
    judged: Judged


@dataclass(frozen=True, eq=False)
class Solutions(Shown, Sequence[Solution]):
    """Solutions :math:`u^p(0, x)` of many problems p, in their order; ``solutions[i]`` is that of one.

    Attributes
    ----------
    values : array, shape (P, ...)
        u(0, ·) of every problem at the points.
    error_estimate : ndarray, shape (P, ...)
        Estimates of their errors.
    statuses : tuple of str
        "converged" or "tolerance_not_met".
    members, alone
        Problems that were solved together, by plan; and, by place, solutions of those solved alone.
    horizons : tuple of float or None
        Horizon of every problem.
    stats : dict
        How many were solved together and alone, by how many plans, and seconds.

    Examples
    --------
    >>> import numpy as np, kolmo
    >>> def problem(rate):
    ...     sde = kolmo.SDE(lambda t, x: -rate * x, diffusion=1.0, dim=1)
    ...     return kolmo.KolmogorovProblem(sde, lambda x: np.cos(x[..., 0]), 1.0)
    >>> found = kolmo.solve_many([problem(rate) for rate in np.linspace(0.5, 1.5, 8)], at=[0.0, 0.5], rtol=1e-4)
    >>> found.values.shape, set(found.statuses), found[3].grid.dim
    ((8, 2), {'converged'}, 1)
    """

    values: Any
    error_estimate: np.ndarray
    statuses: tuple[str, ...]
    members: tuple[Members, ...]
    alone: dict[int, Solution]
    horizons: tuple[float | None, ...]
    stats: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.statuses)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        i = range(len(self))[i]
        if i in self.alone:
            return self.alone[i]
        members, place = next((m, np.flatnonzero(m.which == i)) for m in self.members if i in m.which)
        j, judged = int(place[0]), members.judged
        recipe = members.ensemble.recipe(self.horizons[i] or 0.0, {k: float(v[j]) for k, v in judged.parts.items()})
        stats = {"cells": recipe.grid.size, "steps": recipe.steps, "estimate": dict(recipe.estimate)}
        told = "the estimate meets the tolerance"
        state = judged.states[None, j]
        return Solution(state, np.zeros(1), recipe.grid, recipe, self.error_estimate[i], self.statuses[i], told, stats)

    def __iter__(self) -> Iterator[Solution]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        told = ", ".join(f"{self.statuses.count(s)} {s}" for s in dict.fromkeys(self.statuses))
        return f"Solutions({told}; {self.stats['together']} together by {self.stats['plans']} plans)"


def solve_many(
    problems: Sequence[KolmogorovProblem],
    *,
    at: Any,
    rtol: float = 1e-3,
    atol: float = 1e-6,
    plan: Solutions | None = None,
) -> Solutions:
    r"""Solve problems that differ in parameters, each to the tolerance.

    .. math::
        \partial_t u^p + b^p\cdot\nabla u^p + \tfrac12\Sigma^p:\nabla^2 u^p - c^pu^p + g^p = 0, \qquad
        u^p(T, \cdot) = \varphi^p, \qquad p = 1, \dots, P

    One of them is planned for, and its levels are marched for all, side by side in one compiled loop; so is a wider
    box. Every problem is then judged by its own levels, by where its process goes, and by what its functions do between
    the nodes. For those that the plan does not serve another one is made; what no plan serves is solved alone.

    Problems are taken together in one dimension where they share box and faces ("open", "natural", "reflecting",
    "absorbing" with a number), depend on time nowhere, have one column of smooth terminal data and no jumps, events or
    breaks. All others are solved alone, so that any mixture can be handed over.

    Parameters
    ----------
    problems : sequence of KolmogorovProblem
        The equations.
    at : array_like, shape (..., d)
        Points where the answers matter, the same for all.
    rtol, atol : float, default 1e-3 and 1e-6
        Relative and absolute tolerance, for each problem as in :func:`kolmo.solve`.
    plan : Solutions, optional
        Of an earlier call with such problems and these points: its plans are tried first.

    Returns
    -------
    Solutions

    Raises
    ------
    InputError
        For bad input, in the problems too; the message names the argument.

    Warns
    -----
    ToleranceWarning
        As ``solve``, for problems solved alone.

    Examples
    --------
    >>> import numpy as np, kolmo
    >>> def problem(rate):
    ...     sde = kolmo.SDE(lambda t, x: -rate * x, diffusion=1.0, dim=1)
    ...     return kolmo.KolmogorovProblem(sde, lambda x: x[..., 0] ** 2, 1.0)
    >>> rates = np.linspace(0.5, 1.5, 5)
    >>> u = kolmo.solve_many([problem(rate) for rate in rates], at=[0.5], rtol=1e-5).values
    >>> exact = 0.25 * np.exp(-2 * rates) + (1 - np.exp(-2 * rates)) / (2 * rates)
    >>> bool((abs(u - exact) < 1e-5).all())
    True
    """
    begun = time.perf_counter()
    problems = listed(problems)
    dims = {problem.dim for problem in problems}
    if len(dims) > 1:
        raise InputError("problems", f"dimensions {sorted(dims)}", "one dimension, so that the points fit all of them")
    points = interesting_points(problems[0], at)
    handed = [p.handing("torch", at.device) for p in problems] if is_tensor(at) else problems
    kinds: dict[Any, list[int]] = {}
    for i, problem in enumerate(handed):
        kinds.setdefault(kind_of(problem), []).append(i)
    rest = kinds.pop(None, [])
    members: list[Members] = []
    for mine in kinds.values():
        left = mine
        for earlier in plan.members if plan is not None else ():
            left = _served(earlier.ensemble, handed, left, points, (rtol, atol), members)[0]
        rest += _together(handed, left, points, (rtol, atol), members)
    alone = {i: solve(problems[i], at=at, rtol=rtol, atol=atol) for i in sorted(rest)}
    return _packed(problems, at, members, alone, begun)


def listed(problems: Sequence[KolmogorovProblem]) -> list[KolmogorovProblem]:
    """The problems, if they are some."""
    found = list(problems)
    if not found or not all(isinstance(p, KolmogorovProblem) for p in found):
        raise InputError("problems", "no problems" if not found else "something else", "a sequence of problems")
    return found


def _together(
    problems: list[KolmogorovProblem],
    left: list[int],
    points: np.ndarray,
    tolerance: tuple[float, float],
    members: list[Members],
) -> list[int]:
    """Serve problems of one kind by some plans; those that are left."""
    rest: list[int] = []
    chosen = _farthest(problems, left, points) if len(left) > FEW else -1
    for made in range(PLANS):
        if len(left) <= FEW:
            break
        ensemble = _planned(problems[chosen], points, tolerance)
        if ensemble is None:
            rest.append(chosen)
            left = [i for i in left if i != chosen]
            chosen = left[len(left) // 2] if left else -1
            continue
        before = len(left)
        left, excess = _served(ensemble, problems, left, points, tolerance, members)
        if made > 0 and before - len(left) < WORTH * before:
            break
        if left:
            chosen = left[int(np.argsort(excess)[int(HARD * (len(left) - 1))])]
    return rest + left


def _served(
    ensemble: Ensemble,
    problems: list[KolmogorovProblem],
    left: list[int],
    points: np.ndarray,
    tolerance: tuple[float, float],
    members: list[Members],
) -> tuple[list[int], np.ndarray]:
    """Problems that an ensemble does not serve, and their estimates over the tolerance; what it serves is added."""
    same = np.array_equal(ensemble.points, points)
    if not left or not same or kind_of(ensemble.problem) != kind_of(problems[left[0]]):
        return left, np.zeros(len(left))
    judged = ensemble.judge([problems[i] for i in left], *tolerance)
    if judged.good.any():
        members.append(Members(ensemble, np.array(left)[judged.good], judged.where(judged.good)))
    bad = np.flatnonzero(~judged.good)
    with np.errstate(divide="ignore", invalid="ignore"):
        excess = np.nan_to_num(judged.estimate[bad] / judged.allowed[bad], nan=np.inf)
    return [left[i] for i in bad], excess


def _planned(problem: KolmogorovProblem, points: np.ndarray, tolerance: tuple[float, float]) -> Ensemble | None:
    """The plan for one problem, if it can serve others."""
    rtol, atol = tolerance
    try:
        outcome = search(problem, at=points, rtol=AIM * rtol, atol=AIM * atol)
    except KolmoError:
        return None  # it says so when it is solved alone
    ensemble = Ensemble(problem, outcome.family, points)
    return ensemble if outcome.status == "converged" and ensemble.fits() else None


def _farthest(problems: list[KolmogorovProblem], left: list[int], points: np.ndarray) -> int:
    """The one of some problems whose process goes far."""
    some = left[:: max(1, len(left) // COMPARED)]
    starts = extremes(points)[:, None]

    def distance(problem: KolmogorovProblem) -> float:
        seen, T = sampled(problem, starts), problem.horizon or 0.0
        if seen is None:
            return -1.0
        drift, noise = (float(np.max(np.abs(seen.values[name]))) for name in ("drift", "covariance"))
        return T * drift + 4.0 * float(np.sqrt(T * noise))

    ordered = sorted(some, key=lambda i: distance(problems[i]))
    return ordered[int(FAR * (len(ordered) - 1))]


def _packed(
    problems: list[KolmogorovProblem], at: Any, members: list[Members], alone: dict[int, Solution], begun: float
) -> Solutions:
    """The answers in the order of the problems."""
    lead = tuple(as_points(at, problems[0].dim, "at").shape[:-1])
    single = {i: np.asarray(as_numpy(solution(at))) for i, solution in alone.items()}
    shapes = {u.shape for u in single.values()} | ({lead} if members else set())
    if len(shapes) > 1:
        raise InputError("problems", f"answers of shapes {sorted(shapes)}", "the same number of columns in all of them")
    shape = shapes.pop()
    values, estimate = np.empty((len(problems), *shape)), np.empty((len(problems), *shape))
    statuses = ["converged"] * len(problems)
    for m in members:
        values[m.which] = m.judged.values.reshape(-1, *shape)
        estimate[m.which] = m.judged.estimate.reshape(-1, *[1] * len(shape))
    for i, solution in alone.items():
        values[i], estimate[i], statuses[i] = single[i], as_numpy(solution.error_estimate), solution.status
    stats = {
        "together": len(problems) - len(alone),
        "alone": len(alone),
        "plans": len({id(m.ensemble) for m in members}),
        "seconds": time.perf_counter() - begun,
    }
    horizons = tuple(problem.horizon for problem in problems)
    answers = as_like(values, at) if is_tensor(at) else values
    return Solutions(answers, estimate, tuple(statuses), tuple(members), alone, horizons, stats)
