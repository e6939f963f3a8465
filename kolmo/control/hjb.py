"""Hamilton–Jacobi–Bellman equations, solved to a tolerance."""

import warnings
from typing import Any

import numpy as np

from kolmo.arrays import as_points, at_home
from kolmo.control.optimum import ControlSolution
from kolmo.control.policy_level import Outcome, PolicyLevel, follow, held, pack
from kolmo.control.policy_search import MAX_CELLS, MAX_SECONDS, Search
from kolmo.control.problem import ControlProblem
from kolmo.discretization import Discretization
from kolmo.errors import InputError, NotConvergedError, ToleranceWarning
from kolmo.limits import Limits, OutOfTimeError
from kolmo.refine.plan import interesting_points


@at_home
def solve_hjb(
    problem: ControlProblem,
    *,
    at: Any = None,
    rtol: float = 1e-3,
    atol: float = 1e-6,
    discretization: Discretization | None = None,
    max_seconds: float | None = None,
    max_cells: int | None = None,
) -> ControlSolution:
    r"""Solve the Hamilton–Jacobi–Bellman equation of a control problem.

    .. math:: \partial_t V + \min_a [b(a)\cdot\nabla V + \tfrac12\Sigma(a):\nabla^2 V - c(a)V + \ell(a)] = 0

    Fourth-order central differences (second-order with an obstacle) with policy iteration in every implicit time step
    (Radau IIA of order 5 in one dimension, explicit Runge–Kutta beyond), on finer and finer grids until the estimate of
    the error at t = 0 is at most ``atol + rtol * max |V|`` at the points. The answer is accepted only if a monotone
    scheme, which converges to the viscosity solution, agrees with it within its own error; where it does not, the
    answer is the monotone scheme's.

    Parameters
    ----------
    problem : ControlProblem
        The problem.
    at : array_like, shape (..., d), optional
        Points where the answer matters. None: the core of the (finite) box.
    rtol, atol : float, default 1e-3 and 1e-6
        Relative and absolute tolerance.
    discretization : Discretization, optional
        A recipe from an earlier solution: exactly that is solved, without the check.
    max_seconds : float, optional
        Time after which the best finished level is returned, with status "tolerance_not_met"; default 60.
    max_cells : int, optional
        Largest grid tried; default 6,000, 60,000 or 200,000 nodes in one, two or three dimensions.

    Returns
    -------
    ControlSolution

    Raises
    ------
    InputError
        For bad input; also where an unbounded control has no optimum, with the node.
    NotConvergedError
        When there is no answer.

    Notes
    -----
    Policy iteration: Howard 1960; Bokanowski, Maroso and Zidani 2009. Convergence of monotone schemes: Barles and
    Souganidis 1991. High-order schemes held by a monotone one: Froese and Oberman 2013.

    Examples
    --------
    Least mean square at time 1 with drift at most one (Beneš 1974):

    >>> import kolmo
    >>> from kolmo import control
    >>> cp = control.ControlProblem(lambda t, x, a: a, covariance=1.0, controls=control.Interval(-1.0, 1.0),
    ...     terminal=lambda x: x[..., 0] ** 2, horizon=1.0, box=kolmo.Box(-8.0, 8.0))
    >>> opt = control.solve_hjb(cp, at=[0.0, 0.5], rtol=1e-3)
    >>> bool(abs(opt(0.0) - 0.33337) < 1e-3), opt.policy(0.0, [0.5]).round(3).tolist()
    (True, [-1.0])
    """
    if not isinstance(problem, ControlProblem):
        raise InputError(
            "problem",
            type(problem).__name__,
            "a control.ControlProblem, whose process has no jumps",
            "kolmo.solve for a process that is not controlled, with jumps or without",
        )
    for name, number in (("rtol", rtol), ("atol", atol)):
        if not (np.isfinite(number) and number >= 0):
            raise InputError(name, number, "a non-negative number")
    if rtol == 0 and atol == 0:
        raise InputError("rtol, atol", "0 and 0", "at least one positive tolerance")
    if discretization is not None:
        if discretization.grid.dim != problem.dim:
            raise InputError("discretization", f"{discretization.grid.dim} dimensions", f"{problem.dim} dimensions")
        return pack(problem, follow(problem, discretization), Outcome(None, "fixed", "solved as given", {}))
    still = problem.closed_loop(problem.constant(problem.controls.samples[0]))
    points = outside(problem, interesting_points(still, at))
    limits = Limits.of(max_cells, max_seconds, MAX_CELLS[problem.dim], MAX_SECONDS)
    return pack(problem, *concluded(Search(problem, points, rtol, atol, limits), at))


def concluded(search: Search, at: Any) -> tuple[PolicyLevel, Outcome]:
    """What a search found, with a warning where the tolerance is not met; an error where there is no level at all."""
    try:
        level, outcome = search.run()
    except OutOfTimeError:
        raise NotConvergedError(f"no level was finished within {search.limits.over}: allow more") from None
    except KeyboardInterrupt:
        if not search.levels:
            raise
        told = "interrupted; the finest level that was finished is returned, not compared with the monotone scheme"
        level, outcome = search.found("interrupted", told, {})
    if outcome.status == "tolerance_not_met":
        warnings.warn(outcome.message, ToleranceWarning, stacklevel=3)
    shape = () if at is None else tuple(as_points(at, search.problem.dim, "at").shape[:-1])
    return level, outcome._replace(estimate=np.broadcast_to(outcome.estimate, shape).copy())


def outside(problem: ControlProblem, points: np.ndarray) -> np.ndarray:
    """The points outside all targets, where there is something to find."""
    inside = held(problem, points)
    if inside.all():
        raise InputError("at", "points in targets alone", "a point outside the targets")
    return np.asarray(points[~inside])
