"""How "auto" chooses: box, graded grid, scheme, stepper and steps, refined until the estimate meets the tolerance."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from kolmo import memory
from kolmo.arrays import Array, as_numpy, as_points, at_home, is_tensor
from kolmo.discretization import Discretization, steps_given
from kolmo.errors import InputError
from kolmo.grid import Grid
from kolmo.limits import Limits
from kolmo.march import time_nodes
from kolmo.problem.box import Box
from kolmo.problem.faces import Absorbing
from kolmo.problem.problem import KolmogorovProblem, check_vectorised
from kolmo.problem.rest import at_rest
from kolmo.refine.levels import MAX_CELLS, MAX_SECONDS, Options
from kolmo.refine.search import Outcome, Search
from kolmo.schemes.base import SCHEMES
from kolmo.schemes.generator import discretize
from kolmo.schemes.terminal import plan_terminal
from kolmo.steppers.base import STEPPERS

PLAIN = Options()


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
    r"""Find a discretisation that meets a tolerance.

    .. math:: |u_{h,j}(0, x) - u_j(0, x)| \le \mathrm{atol} + \mathrm{rtol}\,\max_x |u_j(0, x)|

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

    Raises
    ------
    InputError
        For bad input; the message names the argument.
    NotConvergedError
        Where no level gives an answer, or none is finished in time.

    References
    ----------
    P. J. Roache (1998), Verification and Validation in Computational Science and Engineering: estimates by grids of
    different resolution.

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
    options: Options = PLAIN,
) -> Outcome:
    """Plan and solve on finer and finer levels until the estimate meets the tolerance."""
    check_tolerances(rtol, atol)
    limits = Limits.of(max_cells, max_seconds, MAX_CELLS[problem.dim], MAX_SECONDS)
    problem = at_rest(problem.handing("torch", at.device) if is_tensor(at) else problem)
    points = interesting_points(problem, at)
    check_vectorised(problem, points)
    outcome = Search(problem, points, rtol, atol, options).run(limits)
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
    run = march.backward(recipe.initial(march))
    if run.interrupted:
        told = "interrupted while it was asked what is left where the faces meet"
        return replace(outcome, estimate=np.full_like(outcome.estimate, np.inf), status="interrupted", message=told)
    alive = np.asarray(run.state)[:, 0]
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
        low, high, hard = np.array(problem.box.lower), np.array(problem.box.upper), ~problem.box.where("cut")
        beyond = np.stack([points < low - 1e-12 * abs(low), points > high + 1e-12 * abs(high)], -1)
        hard = (beyond & hard).any((1, 2)) & ~problem.box.contains(points)
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


def check_names(scheme: str, stepper: str) -> None:
    """Raise an InputError for methods that there are not."""
    for known, name in ((SCHEMES, scheme), (STEPPERS, stepper)):
        if name != "auto":
            known[name]


def check_tolerances(rtol: float, atol: float) -> None:
    """Raise an InputError for tolerances that are negative, or all zero."""
    for name, value in (("rtol", rtol), ("atol", atol)):
        if not (np.isfinite(value) and value >= 0):
            raise InputError(name, value, "a non-negative number")
    if rtol == 0 and atol == 0:
        raise InputError("rtol, atol", "0 and 0", "at least one positive tolerance")
