"""A certificate: the actual error of a solution, sampled by Dynkin's formula, whatever grid it came from."""

import time
import warnings
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np

from kolmo.arrays import Array, as_like, as_numpy, as_points, at_home, is_tensor
from kolmo.errors import InputError, KolmoWarning, NotConvergedError
from kolmo.montecarlo.estimators import Draws, afford, counts, ending, seed_of, simulate
from kolmo.montecarlo.methods import METHODS
from kolmo.problem import KolmogorovProblem
from kolmo.problem.rest import at_rest
from kolmo.refine.smooth import Interpolant, error_problem, interpolants
from kolmo.shown import Shown
from kolmo.solution import Solution

# Half the distance of the two points whose difference stands for a derivative, in cells of the grid.
APART = 0.5


@dataclass(frozen=True, eq=False, repr=False)
class Certificate(Shown):
    r"""What simulated paths say about the error of a solution at t = 0.

    .. math::
        \text{corrected} = v + e, \qquad \text{uncertainty} = \sqrt{s^2 + \beta^2}, \qquad
        \text{bound} = |e| + 3\,\sqrt{s^2 + \beta^2}

    with v the value, e the error, s its standard error and β the estimate of its bias.

    Attributes
    ----------
    error : array, shape of ``solution(at)`` (with ``gradient=True`` of ``solution.gradient(at)``)
        Estimate of u − solution: exact less returned.
    standard_error : array, same shape
        Its standard deviation over paths and instants drawn.
    bias_estimate : array, same shape
        Estimate of the part that is due to the steps of the paths, as in ``monte_carlo``, and to paths too rare
        to be drawn: what the smooth function still changes by on a wider grid. Infinite where paths of a stationary
        problem had to be given up.
    value : array, same shape
        What the solution says at the points.
    paths, steps : int
        Paths per point; steps taken (stationary: per crossing time of the box).
    seconds : float
        Wall time, the solve for a smooth function included.
    rng : int
        Seed: the same call with ``rng=certificate.rng`` gives the same numbers.
    status, message : str
        "finished" or "truncated", as in ``monte_carlo``; and what was done.

    References
    ----------
    E. B. Dynkin (1965), Markov Processes.

    Examples
    --------
    >>> from kolmo import catalog, certify, solve
    >>> case = catalog.survival()
    >>> solution = solve(case.problem, at=case.points, rtol=1e-3)
    >>> found = certify(case.problem, solution, case.points, paths=500, steps=40, rng=1)
    >>> bool((abs(found.corrected - case.values) < 4 * found.uncertainty).all())
    True
    >>> bool((found.bound >= abs(found.error)).all())
    True
    """

    error: Array
    standard_error: Array
    bias_estimate: Array
    value: Array
    paths: int
    steps: int
    seconds: float
    rng: int
    status: str
    message: str

    @property
    def corrected(self) -> Array:
        """The value with the error put right: where the certificate is sharp, a better answer than the solution's."""
        return self.value + self.error

    @property
    def uncertainty(self) -> Array:
        """Standard error and bias of the certificate together, as the root of their squares."""
        return (self.standard_error**2 + self.bias_estimate**2) ** 0.5

    @property
    def bound(self) -> Array:
        """Modulus of the error plus three times the uncertainty: what the error does not exceed."""
        return abs(self.error) + 3.0 * self.uncertainty

    def __str__(self) -> str:
        parts = (self.value, self.error, self.standard_error, self.bias_estimate)
        rows = zip(*(np.ravel(as_numpy(a)) for a in parts), strict=True)
        lines = [f"Error of a solution, from {self.paths} paths of {self.steps} steps a point ({self.seconds:.2f} s):"]
        for value, error, noise, bias in rows:
            off = f"off by {error:+.2e} ± {noise:.1e} (paths) ± {bias:.1e} (steps)"
            sure = "a real error" if abs(error) > 3.0 * np.hypot(noise, bias) else "no error is seen"
            lines.append(f"  {value:.10g} is {off}: {sure}")
        return "\n".join([*lines, f"  {self.message}; rng={self.rng}"])


@at_home
def certify(
    problem: KolmogorovProblem,
    solution: Solution,
    at: Any,
    *,
    paths: int,
    steps: int,
    rng: Any = None,
    gradient: bool = False,
) -> Certificate:
    r"""Measure the actual error of a solution by simulated paths.

    For any smooth function v, by Dynkin's formula,

    .. math::
        u(0, x) - v(0, x) = E\Big[D_T(\varphi - v(T, \cdot))(X_T)
        + \int_0^T D_t\big(\partial_tv + b\cdot\nabla v + \tfrac12\Sigma:\nabla^2v - cv + g\big)(t, X_t)\,dt\Big],
        \qquad D_t = e^{-\int_0^t c}

    (with what v leaves of the conditions on the faces, there). The problem is solved again, much as the solution's
    discretisation says, and v is a spline through these values; the error returned is that of v plus the difference
    between v and the solution. It holds whatever the grids are and whatever they did not see; the variance, and the
    bias of the steps, are those of a simulation multiplied by what v leaves of the equation, which is small.

    Parameters
    ----------
    problem : KolmogorovProblem
        The equation; it need not be the one that was solved.
    solution : Solution
        Of ``solve``, at t = 0.
    at : array_like, shape (..., d)
        Points (in one dimension ``(...)``).
    paths : int
        Independent paths per point, at least 2.
    steps : int
        Steps over the horizon, shorter towards its end; stationary: per crossing time of the box. See ``monte_carlo``.
    rng : None, int, numpy.random.Generator or torch.Generator
        Source of randomness.
    gradient : bool, default False
        The error of ``solution.gradient(at)``: paths driven by the same noise from two points half a cell on either
        side. That the difference of the errors stands for their derivative costs an error of second order in a cell.

    Returns
    -------
    Certificate
        Tensors if ``at`` is one.

    Raises
    ------
    InputError
        For points outside the box, too few paths or steps, more of them than fit into the memory or than can be gone
        through in a week, a stationary problem whose paths never end, or a solution that does not fit the problem or
        has no finite values at the points.
    NotConvergedError
        If paths run off to infinity: steps are too long.

    Notes
    -----
    What no path meets is not seen: a feature that is felt by less than some tens of the paths, in less than some steps,
    needs more of them. In every step the equation is looked at at an instant drawn at random.

    References
    ----------
    E. B. Dynkin (1965), Markov Processes; used as here by E. Gobet and S. Maire (2005), Sequential control variates for
    functionals of Markov processes, SIAM Journal on Numerical Analysis 43.

    Examples
    --------
    >>> import numpy as np, kolmo
    >>> bm, source = kolmo.SDE(0.0, diffusion=1.0, dim=1), lambda t, x: 1.0 * (x[..., 0] > 0.3)
    >>> problem = kolmo.KolmogorovProblem(bm, lambda x: 0 * x[..., 0], 1.0, source=source)
    >>> grid = kolmo.Grid.of(kolmo.Box(-6.0, 6.0), 40)
    >>> solution = kolmo.solve(problem, grid=grid, steps=16)
    >>> found = kolmo.certify(problem, solution, [0.0], paths=2000, steps=100, rng=0)
    >>> exact = 0.30205975  # ∫ P(W_t > 0.3) dt
    >>> bool(abs(solution([0.0]) + found.error - exact) < 3 * found.uncertainty)
    True
    >>> bool(abs(found.error) > 3 * found.uncertainty)  # and that it is off is beyond doubt
    True
    """
    begun = time.perf_counter()
    points = as_points(at, problem.dim, "at")
    seed, (paths, steps) = seed_of(rng), counts(paths, steps)
    value = solution.gradient(points) if gradient else solution(points)
    problem, solution = at_rest(problem, solution.grid.box), replace(solution, motion=None)
    motion, given = problem.motion, points
    points = points if motion is None else motion.inwards(0.0, points)
    if (
        gradient
        and motion is not None
        and not np.array_equal(as_numpy(motion.width(0.0, points)), np.ones(problem.dim))
    ):
        raise InputError("solution", "one on a grid made for faces at other places", "one of this problem itself")
    # breakpoints that the solver found are where v is not smooth in time; that none was missed is not counted on
    problem = problem.broken_at(t for t in solution.discretization.breakpoints if 0.0 < t < (problem.horizon or 0.0))
    columns = _fitting(problem, solution, value)
    places = np.asarray(as_numpy(points), dtype=float).reshape(-1, problem.dim)
    starts, weights = _differences(problem, solution, places) if gradient else (places[:, None], np.ones((1, 1)))
    afford(problem, starts.shape, columns, paths, steps, graded=True)
    (v, *inner), told = _smooth(problem, solution)
    like = given if is_tensor(given) else None
    error_of = error_problem(problem, v, columns)
    found = simulate(error_of, starts, weights, Draws(paths, steps, seed), METHODS["euler"], like, sampled=True)
    status, message = ending(found, "error")
    if status == "truncated":
        warnings.warn(f"certify: {message}", KolmoWarning, stacklevel=2)
    d, shape = problem.dim, tuple(np.shape(as_numpy(value)))

    def shaped(table: np.ndarray) -> Array:
        """From one row a point (and direction) to the shape of the value."""
        return as_like(table.reshape(shape), value)

    def read(function: Interpolant) -> np.ndarray:
        if not gradient:
            return function(0.0, places)
        return np.stack([function.slope(0.0, places, way) for way in np.eye(d)[:, None]], 1)

    smooth = read(v)
    # what a wider grid still changes is due to paths that few, or none, of those drawn are among
    unseen = np.abs(smooth - read(inner[0])) if inner else np.zeros(smooth.shape)
    return Certificate(
        error=shaped(found.mean.reshape(smooth.shape) + smooth - as_numpy(value).reshape(smooth.shape)),
        standard_error=shaped(found.standard_error),
        bias_estimate=shaped(found.bias + unseen.reshape(found.bias.shape)),
        value=value,
        paths=paths,
        steps=found.steps,
        seconds=time.perf_counter() - begun,
        rng=seed,
        status=status,
        message=f"{message}; {told}",
    )


def _fitting(problem: KolmogorovProblem, solution: Solution, value: Array) -> int | None:
    """Columns of both, or what does not fit."""
    if solution.grid.dim != problem.dim:
        raise InputError("solution", f"{solution.grid.dim} dimensions", f"{problem.dim} dimensions")
    if problem.horizon is not None and not solution.discretization.times:
        raise InputError("solution", "that of a stationary problem", "one of a problem with a horizon")
    generator = solution.discretization.march(problem).generator
    if generator.columns != solution.columns:
        raise InputError("solution", f"{solution.columns} columns", f"{generator.columns} columns, as the problem has")
    if not np.isfinite(as_numpy(value)).all():
        raise InputError("solution", "values that are not finite at the points", "a solution with an answer")
    return solution.columns


def _smooth(problem: KolmogorovProblem, solution: Solution) -> tuple[list[Interpolant], str]:
    """Smooth functions close to the solution of the problem, on a wide grid and on the one inside it, if any."""
    scale = float(np.abs(as_numpy(solution.values[0])).max())
    try:
        found = list(islice(interpolants(problem, solution.discretization, scale), 2))
        return found, "the smooth function: solved again on a grid like it"
    except NotConvergedError:
        # the identity holds for any function: this one is constant in time
        values = np.asarray(as_numpy(solution.values), dtype=float)[:1].reshape(1, solution.grid.size, -1)
        told = "its discretisation does not solve the problem: the smooth function is the solution at all times"
        return [Interpolant(solution.grid, [0.0], values)], told


def _differences(problem: KolmogorovProblem, solution: Solution, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of points a cell apart, and the weights of their difference quotients; a combination per direction."""
    low, high = np.array(problem.box.lower), np.array(problem.box.upper)
    wrapped = np.array(problem.box.periodic)
    starts = np.repeat(places[:, None, None], problem.dim, 1).repeat(2, 2)
    for i, axis in enumerate(solution.grid.axes):
        xi = np.clip(axis.grading.inverse(places[:, i]), 0.0, 1.0)
        move = APART * axis.h * np.asarray(axis.grading.slope(xi))
        both = places[:, i, None] + np.array([-1.0, 1.0]) * move[:, None]
        starts[:, i, :, i] = both if wrapped[i] else np.clip(both, low[i], high[i])
    own = np.einsum("pimi->pim", starts)
    weights = np.array([-1.0, 1.0]) / (own[..., 1] - own[..., 0])[..., None]
    return starts.reshape(-1, 2, problem.dim), weights.reshape(-1, 2)
