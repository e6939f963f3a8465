"""The front door: state the equation and the accuracy, get the solution with its error estimate."""

import time
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np

from kolmo import memory
from kolmo.arrays import Array, as_points, at_home, is_tensor, namespace
from kolmo.discretization import Discretization
from kolmo.errors import InputError, KolmoError, NotConvergedError, ToleranceWarning
from kolmo.grid import Grid
from kolmo.grid.times import missing
from kolmo.limits import Limits
from kolmo.march import Callback, Run
from kolmo.problem import KolmogorovProblem
from kolmo.problem.motion import Motion
from kolmo.problem.rest import at_rest
from kolmo.refine.levels import Options
from kolmo.refine.plan import check_names, prescribe, search
from kolmo.refine.search import SILENT
from kolmo.solution import Solution
from kolmo.stationary import solve_stationary

BACKENDS = ("auto", "numba", "torch")
# No first grid has fewer nodes along an axis.
LEAST = 9


@at_home
def solve(
    problem: KolmogorovProblem,
    *,
    at: Any = None,
    rtol: float = 1e-3,
    atol: float = 1e-6,
    discretization: Discretization | None = None,
    grid: Grid | int | Sequence[int] | None = None,
    steps: int | None = None,
    scheme: str = "auto",
    stepper: str = "auto",
    backend: str = "auto",
    save: Sequence[float] | None = None,
    callback: Callback | None = None,
    progress: bool = False,
    throw: bool = True,
    max_seconds: float | None = None,
    max_cells: int | None = None,
) -> Solution:
    r"""Solve a backward Kolmogorov equation.

    .. math:: \partial_t u + b\cdot\nabla u + \tfrac12\Sigma:\nabla^2 u - cu + g = 0, \qquad u(T, \cdot) = \varphi

    By tolerance (the default) the box, grid, scheme and steps are chosen and refined until the estimate of the error at
    t = 0 is at most ``atol + rtol * max |u_j|`` at the points, per column j. With ``discretization``, or ``grid`` and
    ``steps``, exactly that is solved.

    Parameters
    ----------
    problem : KolmogorovProblem
        The equation.
    at : array_like, shape (..., d), optional
        Points where the answer matters. None: the core of the box.
    rtol, atol : float, default 1e-3 and 1e-6
        Relative and absolute tolerance.
    discretization : Discretization, optional
        A recipe from ``plan`` or from another solution.
    grid : Grid, int or sequence of int, optional
        Nodes, or numbers of nodes per axis of the (finite) box; needs ``steps`` unless the problem is stationary.
    steps : int, optional
        Number of time steps with ``grid``.
    scheme : str, default "auto"
        "central2", "central4", "central6", "central6-still", "monotone".
    stepper : str, default "auto"
        "radau5", "radau3", "implicit-euler", "rk4", "mcs", "mcs3", "semi-lagrangian", "exponential".
    backend : {"auto", "numba", "torch"}
        "torch": march in torch (no "radau5", "radau3", "implicit-euler"), on the device of ``at`` if that is a tensor.
    save : sequence of float, optional
        Times whose values are kept besides t = 0.
    callback : callable, optional
        ``callback(t, u)`` after each step; a true result stops the march.
    progress : bool, default False
        Show a progress bar on stderr.
    throw : bool, default True
        Raise when there is no answer at all; else return a solution of NaN that says so.
    max_seconds : float, optional
        By tolerance: time after which the best finished level is returned, with status "tolerance_not_met"; default
        25. With ``grid`` or ``discretization``: time after which there is no answer; what is sure to take longer is
        refused before it begins; default none. Compilation does not count.
    max_cells : int, optional
        By tolerance: largest grid tried; default 40,000, 700,000 or 4,000,000 nodes in one, two or three dimensions.
        Otherwise: largest grid that is not refused.

    Returns
    -------
    Solution

    Raises
    ------
    InputError
        For bad input; the message names the argument.
    NotConvergedError
        When there is no answer and ``throw`` is true.

    References
    ----------
    P. J. Roache (1998), Verification and Validation in Computational Science and Engineering: estimates by grids of
    different resolution.

    Examples
    --------
    >>> import numpy as np, kolmo
    >>> bm = kolmo.SDE(0.0, diffusion=1.0, dim=1)
    >>> problem = kolmo.KolmogorovProblem(bm, lambda x: np.cos(x[..., 0]), 1.0)
    >>> sol = kolmo.solve(problem, at=[0.0, 0.5], rtol=1e-5)
    >>> bool(np.all(abs(sol([0.0, 0.5]) - np.exp(-0.5) * np.cos([0.0, 0.5])) < 1e-5))
    True
    """
    if backend not in BACKENDS:
        raise InputError("backend", repr(backend), "one of " + ", ".join(BACKENDS))
    check_names(scheme, stepper)
    if is_tensor(at) or backend == "torch":
        problem = problem.handing("torch", at.device if is_tensor(at) else None)
    like = _like(at, backend)
    with _without_gradients(like):
        there = grid if discretization is None else discretization.grid
        problem = at_rest(problem, there.box if isinstance(there, Grid) else None)
    saved = _save_times(problem, save)
    options = Options(saved, scheme, stepper, like, callback, progress)
    try:
        with _without_gradients(like):
            if discretization is not None:
                if grid is not None or steps is not None:
                    raise InputError(
                        "discretization, grid, steps", "several", "either discretization= or grid= with steps="
                    )
                limits = Limits.given(max_cells, max_seconds)
                limits.require("discretization", discretization.grid.shape, discretization.steps, _width(problem))
                return _fixed(problem, discretization, options, limits)
            if grid is not None:
                limits = Limits.given(max_cells, max_seconds)
                shape = grid.shape if isinstance(grid, Grid) else np.atleast_1d(grid).tolist()
                if len(shape) == 1:  # the same along every axis
                    shape = list(shape) * problem.dim
                counted = steps if isinstance(steps, (int, np.integer)) and steps > 0 else 0
                columns = _width(problem)
                memory.require("grid", shape, columns=columns, saved=len(saved), steps=int(counted))
                limits.require("grid", shape, int(counted), columns)
                recipe = prescribe(problem, grid, steps, scheme, stepper, saved, like)
                return _fixed(problem, recipe, options, limits)
            if steps is not None:
                raise InputError("steps", steps, "grid= with it, or neither to solve by tolerance")
            memory.require("terminal", [LEAST] * problem.dim, columns=_width(problem), saved=len(saved))
            asked = {"rtol": rtol, "atol": atol, "max_seconds": max_seconds, "max_cells": max_cells}
            return _by_tolerance(problem, at, options, asked)
    except NotConvergedError as error:
        if throw:
            raise
        return _no_answer(problem, grid, error)


def _width(problem: KolmogorovProblem) -> int:
    """Columns of the terminal data, asked at one point before anything of the size of a grid is made; 1 without any."""
    if problem.terminal is None:
        return 1
    low, high = (np.asarray(ends, dtype=float) for ends in (problem.box.lower, problem.box.upper))
    inside = np.where(np.isfinite(low), low, np.where(np.isfinite(high), high - 1.0, 0.0))
    bounded = np.isfinite(low) & np.isfinite(high)
    inside = np.where(bounded, 0.5 * (inside + np.where(bounded, high, 0.0)), inside + np.isfinite(low))
    values = problem.final(inside[None])
    return int(values.shape[-1]) if values.ndim > 1 else 1


def _save_times(problem: KolmogorovProblem, save: Sequence[float] | None) -> tuple[float, ...]:
    if save is None:
        return ()
    if problem.horizon is None:
        raise InputError("save", save, "None for a stationary problem")
    times = tuple(sorted({float(t) for t in np.atleast_1d(np.asarray(save, dtype=float))}))
    if any(not 0 <= t <= problem.horizon for t in times):
        raise InputError("save", times, f"times between 0 and {problem.horizon}")
    return times


def _like(at: Any, backend: str) -> Any:
    """A tensor on the device to march on, or None for NumPy."""
    if backend != "torch":
        return None
    import torch

    return torch.zeros((), dtype=torch.float64, device=at.device if is_tensor(at) else "cpu")


def _without_gradients(like: Any) -> Any:
    """Context in which torch records nothing of a march."""
    if like is None:
        return nullcontext()
    import torch

    return torch.no_grad()


def _by_tolerance(problem: KolmogorovProblem, at: Any, options: Options, asked: dict[str, Any]) -> Solution:
    outcome = search(problem, at=at, options=options, **asked)
    if outcome.status == "tolerance_not_met" or outcome.message == SILENT:
        warnings.warn(outcome.message, ToleranceWarning, stacklevel=4)
    columns = outcome.level.columns
    estimate = outcome.estimate if columns is not None else outcome.estimate[0]
    if at is not None:
        lead = tuple(as_points(at, problem.dim, "at").shape[:-1])
        estimate = np.broadcast_to(estimate, lead + (() if columns is None else (columns,)))
    return _solution(
        outcome.level.discretization,
        outcome.level.run,
        columns,
        np.array(estimate),
        outcome.status,
        outcome.message,
        outcome.stats,
        problem.motion,
    )


def _fixed(problem: KolmogorovProblem, recipe: Discretization, options: Options, limits: Limits) -> Solution:
    """Solve exactly what the recipe says."""
    begun = time.perf_counter()
    if recipe.grid.dim != problem.dim:
        raise InputError("discretization", f"{recipe.grid.dim} dimensions", f"{problem.dim} dimensions")
    # a stationary equation is one sparse system, solved in NumPy
    march = recipe.march(problem, None if problem.stationary else options.like)
    if problem.stationary:
        run = Run(solve_stationary(march), 0.0)
    else:
        absent = missing(march.times, options.save)
        if absent:
            raise InputError("save", absent, "time nodes of the discretization", "plan or solve with grid= and save=")
        run = march.backward(recipe.initial(march), **options.told, stop=limits.late)
        if run.late:
            raise NotConvergedError(f"the march came from {recipe.times[-1]:g} to {run.time:g} within {limits.over}")
    if not bool(namespace(run.state).isfinite(run.state).all()):
        raise NotConvergedError(f"the solution became infinite with {recipe!r}")
    status = "interrupted" if run.interrupted else "fixed"
    message = "interrupted: values at the last time reached" if run.interrupted else "solved as given"
    stats = {"cells": recipe.grid.size, "steps": recipe.steps, "seconds": time.perf_counter() - begun}
    return _solution(recipe, run, march.generator.columns, None, status, message, stats, problem.motion)


def _solution(
    recipe: Discretization,
    run: Run,
    columns: int | None,
    estimate: np.ndarray | None,
    status: str,
    message: str,
    stats: dict[str, Any],
    motion: Motion | None,
) -> Solution:
    """Pack the states of a run, in increasing time."""
    states: list[tuple[float, Array]] = [(run.time, run.state)]
    states += [(t, u) for t, u in reversed(run.saved) if t != run.time]
    stacked = namespace(run.state).stack([u for _, u in states], 0)
    stacked = stacked[..., 0] if columns is None else stacked
    shape = (len(states), *recipe.grid.shape) + (() if columns is None else (columns,))
    times = np.array([t for t, _ in states])
    moved = None if motion is None else motion.detached()
    return Solution(stacked.reshape(shape), times, recipe.grid, recipe, estimate, status, message, stats, moved)


def _no_answer(problem: KolmogorovProblem, grid: Any, error: KolmoError) -> Solution:
    """A solution of NaN that says why there is none."""
    from kolmo.problem.box import Box

    low, high = np.array(problem.box.lower), np.array(problem.box.upper)
    box = Box(np.where(np.isfinite(low), low, -1.0), np.where(np.isfinite(high), high, 1.0))
    nodes = grid if isinstance(grid, Grid) else Grid.of(box, 9)
    recipe = Discretization(nodes, (), "central2", "radau5", None)
    values = np.full((1, *nodes.shape), np.nan)
    return Solution(values, np.zeros(1), nodes, recipe, np.array(np.inf), "tolerance_not_met", str(error), {})
