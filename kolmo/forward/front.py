"""The front door: state the process, the start and the accuracy, get its law over time."""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from kolmo.arrays import as_numpy, as_points, at_home
from kolmo.discretization import Discretization
from kolmo.errors import InputError, NotConvergedError, ToleranceWarning
from kolmo.forward.density import Density, Spreading, initial_at_rest
from kolmo.forward.layout import Asked, start_of
from kolmo.forward.search import MAX_SECONDS, LawSearch
from kolmo.grid import Grid
from kolmo.limits import Limits, OutOfTimeError
from kolmo.problem.problem import KolmogorovProblem, check_vectorised
from kolmo.problem.rest import at_rest
from kolmo.refine.levels import MAX_CELLS
from kolmo.refine.plan import check_names, check_tolerances, plan, prescribe

# Of many samples, this many are used where every point costs.
PLANNING_POINTS = 200


@at_home
def solve_forward(
    problem: KolmogorovProblem,
    initial: Any,
    *,
    discretization: Discretization | None = None,
    at: Any = None,
    rtol: float = 1e-3,
    atol: float = 0.0,
    flux_times: Any = None,
    grid: Grid | int | Sequence[int] | None = None,
    steps: int | None = None,
    scheme: str = "auto",
    stepper: str = "auto",
    save: Sequence[float] | None = None,
    max_cells: int | None = None,
    max_seconds: float | None = None,
) -> Density:
    r"""Solve the Fokker–Planck equation, the adjoint of the backward equation, for an initial law.

    .. math::
        \partial_t\rho = -\nabla\cdot(b\rho) + \tfrac12\nabla^2:(\Sigma\rho) - c\,\rho

    with absorbing faces where u is prescribed, elastic ones where it is elastic, and no flux at reflecting walls. Each
    step is the transpose of the step that ``solve`` takes, so that expectations found forwards and backwards agree to
    rounding, and probability that does not leave is conserved.

    By tolerance (the default) box, grid and clock are refined until the density and the fluxes that were asked for are
    within ``rtol`` of their largest modulus, plus ``atol``:

    - the density at the points ``at`` and the times kept (``save`` and the horizon); without points the law as a whole,
      :math:`\int|\rho - \rho_h|\,dx \le \mathrm{rtol}\,\int\rho\,dx + \mathrm{atol}` at these times;
    - the flux through every way out at ``flux_times``; without times, at all time nodes of the clock;
    - ``value``.

    With ``discretization``, or ``grid`` and ``steps``, exactly that is solved.

    Parameters
    ----------
    problem : KolmogorovProblem
        The process, its faces and killing, and the horizon; terminal data and source only enter ``Density.value``.
    initial : callable or array_like
        Density ``initial(x)`` -> ``(...)``; or samples of shape (n, d), each of mass 1/n; or one point (d,).
    discretization : Discretization, optional
        A recipe from ``plan`` or from a solution.
    at : array_like, shape (..., d), optional
        Points where the density is wanted. For an initial density on an infinite box it lies around them.
    rtol, atol : float, default 1e-3 and 0
        Relative and absolute tolerance; the latter in the units of a density (in ``at``), of a rate, and of ``value``.
    flux_times : array_like, shape (m,), optional
        Times at which fluxes are wanted; ``[]``: at none.
    grid, steps
        Fixed discretisation, as in ``solve``.
    scheme, stepper : str, default "auto"
        As in ``solve``. By tolerance "auto" takes "central6" with "radau5" in one dimension and "mcs3" beyond it; with
        "monotone" it takes "implicit-euler", and masses are not negative where points lie on nodes.
    save : sequence of float, optional
        Times at which the law is kept besides the horizon.
    max_cells : int, optional
        Largest grid tried; default 40,000, 700,000 or 4,000,000 in one, two or three dimensions.
    max_seconds : float, optional
        Time after which the finest level finished is returned; default 120. Both as in ``solve`` with ``grid`` or
        ``discretization``.

    Returns
    -------
    Density
        With ``error_estimate``, ``status`` and ``message``.

    Raises
    ------
    InputError
        For bad input; the message names the argument.
    NotConvergedError
        When there is no answer.

    Warns
    -----
    ToleranceWarning
        Where the tolerance was not met; the best law and its estimate are returned.

    Notes
    -----
    Moments, masses and fluxes have the order of the scheme. Point values of the density do too away from walls; within
    a few nodes of a reflecting, elastic or absorbing face they are read off moments and are less accurate.

    A density or a flux is never negative; where the discrete one is, its estimate is at least that, and ``message``
    says so. A way out with less than a millionth of the largest flux, points where the density is less than a millionth
    of its peak, and a law of which less than a millionth is left are held to the tolerance of that millionth.

    The start is resolved to the scale that is asked for: steps begin with the time in which noise goes one cell, and
    grow with the time that has passed.

    Examples
    --------
    >>> import numpy as np, kolmo
    >>> ou = kolmo.SDE(lambda t, x: -x, diffusion=1.0, dim=1)
    >>> problem = kolmo.KolmogorovProblem(ou, lambda x: x[..., 0] ** 2, 1.0)
    >>> density = kolmo.solve_forward(problem, [0.5], at=[0.0, 0.3], rtol=1e-6)
    >>> variance = 0.5 * (1 - np.exp(-2.0))
    >>> bool(abs(density(0.0) - np.exp(-0.125 * np.exp(-2) / variance) / np.sqrt(2 * np.pi * variance)) < 1e-6)
    True
    >>> round(float(density.mass[-1]), 9)
    1.0

    The density of the time at which Brownian motion first reaches 1:

    >>> bm = kolmo.SDE(0.0, diffusion=1.0, dim=1)
    >>> box = kolmo.Box(-np.inf, 1.0, [("open", "absorbing")])
    >>> problem = kolmo.KolmogorovProblem(bm, lambda x: 0 * x[..., 0], 2.0, box)
    >>> t = np.array([0.05, 0.3, 1.0])
    >>> passage = kolmo.solve_forward(problem, [0.0], flux_times=t, rtol=1e-4)
    >>> exact = np.exp(-0.5 / t) / np.sqrt(2 * np.pi * t**3)  # Schrödinger 1915
    >>> bool(np.abs(passage.first_passage(t, "high") - exact).max() < 1e-4)
    True
    """
    if problem.horizon is None:
        raise InputError("problem", "a stationary problem", "a horizon", "stationary_density(problem) has none")
    there = grid if discretization is None else discretization.grid
    problem = at_rest(problem, there.box if isinstance(there, Grid) else None)
    horizon = problem.horizon or 0.0
    check_tolerances(rtol, atol)
    check_names(scheme, stepper)
    kept = tuple(sorted({float(t) for t in ([] if save is None else save)} | {horizon}))
    if kept[0] < 0 or kept[-1] > horizon:
        raise InputError("save", kept, f"times between 0 and {horizon}" + " where faces have met" * problem.met)
    if discretization is not None and (grid is not None or steps is not None):
        raise InputError("discretization, grid, steps", "several", "either discretization= or grid= with steps=")
    given = initial
    if not callable(initial):
        given = as_numpy(as_points(initial, problem.dim, "initial")).reshape(-1, problem.dim)
        if len(given) == 0:
            raise InputError("initial", "no samples", "a density function, at least one sample, or a point")
    given = initial_at_rest(problem, given)
    given_limits = Limits.given(max_cells, max_seconds)
    if grid is not None:
        shape = grid.shape if isinstance(grid, Grid) else np.broadcast_to(grid, problem.dim).tolist()
        given_limits.require("grid", shape, steps if isinstance(steps, (int, np.integer)) else 1)
        discretization = prescribe(problem, grid, steps, scheme, stepper, kept, None)
    elif discretization is not None:
        given_limits.require("discretization", discretization.grid.shape, discretization.steps)
    elif steps is not None:
        raise InputError("steps", steps, "grid= with it, or neither to solve by tolerance")
    if discretization is not None:
        try:
            return _told(_placed(problem, Spreading(problem, discretization, kept, given_limits.late).run(given)))
        except OutOfTimeError:
            raise NotConvergedError(f"the march did not end within {given_limits.over}") from None
    asked = Asked(kept, _points(problem, at, kept), _times(problem, flux_times))
    limits = Limits.of(max_cells, max_seconds, MAX_CELLS[problem.dim], MAX_SECONDS)
    if problem.sde.noiseless:
        return _without_noise(problem, given, asked, rtol, atol, limits)
    start = start_of(problem, given, asked.points)
    check_vectorised(problem, start.points)
    density = LawSearch(problem, start, asked, rtol, atol, scheme, stepper).run(limits)
    if density.status == "tolerance_not_met":
        warnings.warn(density.message, ToleranceWarning, stacklevel=2)
    return _placed(problem, density, at)


def _placed(problem: KolmogorovProblem, density: Density, at: Any = None) -> Density:
    """A law found in coordinates at rest, to be read in those of the user; ``at``: points that were asked for."""
    if problem.motion is None:
        return density
    motion, told = problem.motion.detached(), density.error_estimate
    if told is not None and "density" in told:
        # without points it is an integral over all places, the same in all coordinates
        narrow = 1.0 if at is None else min(float(motion.stretch(t, np.zeros(1))) for t in density.times)
        told = told | {"density": told["density"] / narrow}
    return replace(density, motion=motion, error_estimate=told)


def _points(problem: KolmogorovProblem, at: Any, kept: tuple[float, ...]) -> np.ndarray | None:
    """Points where the density is wanted, shape (n, d), in coordinates at rest: wherever they are at the times kept."""
    if at is None:
        return None
    points = np.asarray(as_numpy(as_points(at, problem.dim, "at"))).reshape(-1, problem.dim)
    if len(points) == 0:
        raise InputError("at", "no points", "at least one point, or None for the law as a whole")
    if problem.motion is not None:
        moved = np.concatenate([problem.motion.inwards(t, points) for t in kept])
        moved = np.asarray(moved[problem.box.contains(moved)])
        if len(moved) == 0:
            raise InputError("at", f"points outside of the faces at {kept}", "points inside at one of these times")
        return moved
    inside = problem.box.contains(points)
    if not inside.all():
        raise InputError("at", f"a point at {points[~inside][0].tolist()}", f"points inside {problem.box!r}")
    return points


def _times(problem: KolmogorovProblem, times: Any) -> np.ndarray | None:
    """Times at which fluxes are wanted, shape (m,)."""
    if times is None:
        return None
    found = np.asarray(as_numpy(times), dtype=float).reshape(-1)
    if not ((found >= 0) & (found <= (problem.horizon or 0.0))).all():
        raise InputError("flux_times", found.tolist(), f"times between 0 and the horizon {problem.horizon}")
    return found


def _told(density: Density) -> Density:
    """A law on a given discretisation, with a word on values that no law has."""
    parts = {"density": density.values, **{f"flux through {e}": density.exit_flux(e) for e in density.exits}}
    low = {name: -float(v.min()) / float(np.abs(v).max()) for name, v in parts.items() if np.abs(v).max() > 0}
    told = [f"{name} is negative by up to {part:.1e} of its largest value" for name, part in low.items() if part > 1e-9]
    if not told:
        return density
    return replace(density, message="; ".join(["solved as given", *told]) + ": scheme='monotone', or a tolerance")


def _without_noise(
    problem: KolmogorovProblem, initial: Any, asked: Asked, rtol: float, atol: float, limits: Limits
) -> Density:
    """Without noise points remain points: there is no density that could be refined, only expectations."""
    where = asked.points if callable(initial) else initial[:: max(1, len(initial) // PLANNING_POINTS)]
    recipe = plan(problem, at=where, rtol=rtol, atol=atol, max_cells=limits.cells, max_seconds=limits.seconds)
    if len(asked.kept) > 1:
        raise InputError("save", asked.kept[:-1], "grid= and steps= with it: without noise only the value is refined")
    density = Spreading(problem, recipe, asked.kept).run(initial)
    error = max(map(sum, zip(*recipe.estimate.values(), strict=True)))
    met = error <= atol + rtol * float(np.abs(density.value).max())
    status = "converged" if met else "tolerance_not_met"
    message = "without noise there is no density: the tolerance is that of the value"
    if not met:
        warnings.warn(message, ToleranceWarning, stacklevel=3)
    return replace(density, error_estimate={"value": error}, status=status, message=message)
