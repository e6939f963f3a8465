"""The dynamic-programming optimum: the Hamilton–Jacobi–Bellman equation solved to a tolerance, with its policy."""

import math
import warnings
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from kolmo.arrays import Array, as_like, as_numpy, as_points, at_home, is_tensor, namespace
from kolmo.control.bellman import POLICY_CHANGE, Act, Bellman, ExplicitPolicyStep, ImplicitPolicyStep, solve_stationary
from kolmo.control.breaks import look, terminal_breaks, together
from kolmo.control.charts import natural_charts, opened, opened_as
from kolmo.control.coefficients import Coefficients
from kolmo.control.frame import Frame, frame
from kolmo.control.problem import ControlProblem, Policy
from kolmo.discretization import Discretization
from kolmo.errors import InputError, MissingExtraError, NotConvergedError, ToleranceWarning
from kolmo.grid import Grid
from kolmo.limits import Limits, OutOfTimeError
from kolmo.problem import KolmogorovProblem
from kolmo.refine.estimate import Convergence, Verdict
from kolmo.refine.plan import interesting_points
from kolmo.refine.witnesses import witnesses
from kolmo.schemes.base import SCHEMES
from kolmo.schemes.terminal import plan_terminal

# Space discretisations: smooth solutions; with an obstacle, whose free boundary breaks the second derivative.
SMOOTH, STOPPED, MONOTONE = "central4", "central2", "monotone"
IMPLICIT, EXPLICIT, EULER = "radau5", "rk4", "implicit-euler"

# Nodes per axis of the first level, its implicit steps, and the growth from level to level, by dimension.
FIRST_NODES = {1: 41, 2: 21, 3: 13}
FIRST_STEPS = 6
GROWTH = {1: 1.5, 2: 1.35, 3: 1.25}
MAX_GROWTH = {1: 2.0, 2: 1.7, 3: 1.5}
MAX_CELLS = {1: 6_000, 2: 60_000, 3: 200_000}
# Nodes across a target on the first level, as their number says.
ACROSS = 5
# Processor time after which no finer level is begun.
MAX_SECONDS = 60.0
# The largest grid allowed is tried if the levels say that no more than so many times its nodes an axis are needed.
HOPE = 1.5
# More explicit steps than this call for implicit ones in two dimensions.
MANY_STEPS = 3000
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
# Points at which it is seen whether coefficients are quadratic in the control and constant in time.
LOOKED_AT = 64
# Times kept.
STORED = 129
# Nodes and steps of the monotone solution in which it is looked where policies switch.
SCOUT_NODES, SCOUT_STEPS = 101, 10
# Grids of the monotone check, by dimension, and how far it may be off, in units of its own change.
CHECK_NODES = {1: (21, 41, 81, 161), 2: (17, 33, 49), 3: (9, 13, 17)}
CHECK_FACTOR = 4.0
# Its own change has to be below this part of the value: agreement tells nothing else, and a finer grid is looked at.
TELLING = 0.2


@dataclass(frozen=True, eq=False)
class ControlSolution:
    r"""Value function, gradient and optimal policy.

    Attributes
    ----------
    problem : ControlProblem
        What was solved.
    values : ndarray, shape ``(nt, *grid.shape)``
        V at the nodes at ``times``.
    policies : ndarray, shape ``(nt, *grid.shape, m)``
        Optimal controls there.
    times : ndarray, shape (nt,)
        Increasing, from 0 to T.
    grid : Grid
        The nodes.
    discretization : Discretization
        The recipe used.
    error_estimate : ndarray or None
        Estimate of the error of V at t = 0: shape of ``opt(at)``, without ``at`` one number; None where the
        discretisation was given.
    status : str
        "converged", "fixed", "tolerance_not_met" or, after Ctrl-C, "interrupted": the finest level that was finished,
        not compared with the monotone scheme.
    message : str
        What happened, in a sentence.
    stats : dict
        Cells, steps, levels, policy iterations, seconds, and the monotone check.
    slopes : ndarray or None
        Derivatives of ``values`` with respect to time.
    average : float or None
        Of ergodic problems the cost per unit of time; V is then zero at the first of the points ``at``, and the
        estimate is that of both.

    Examples
    --------
    >>> import kolmo
    >>> from kolmo import control
    >>> problem = control.ControlProblem(lambda t, x, a: a, 1.0, controls=control.Unbounded(1), horizon=1.0,
    ...     terminal=lambda x: x[..., 0] ** 2, running_cost=lambda t, x, a: 0.5 * a[..., 0] ** 2,
    ...     box=kolmo.Box(-6.0, 6.0))
    >>> best = control.solve_hjb(problem, at=[0.5], rtol=1e-4)
    >>> best.policy(0.0, [0.5]).round(3), best.gradient([0.5]).round(3)  # a = −∂V = −2x/3
    (array([-0.333]), array([0.333]))
    """

    problem: ControlProblem
    values: np.ndarray
    policies: np.ndarray
    times: np.ndarray
    grid: Grid
    discretization: Discretization
    error_estimate: np.ndarray | None = None
    status: str = "fixed"
    message: str = ""
    stats: dict[str, Any] = field(default_factory=dict)
    slopes: np.ndarray | None = field(default=None, repr=False)
    average: float | None = None

    def __call__(self, x: Any, t: float = 0.0) -> Array:
        """V(t, x) at points (..., d): shape (...); in targets what they pay."""
        V = self._interpolate(self._at(self.values, t), x, self.discretization.width)
        for target in self.problem.targets[::-1]:
            points = as_points(x, self.grid.dim)
            inside = target.inside(points)
            if inside.any():
                flat = np.asarray(as_numpy(points), dtype=float).reshape(-1, self.grid.dim)
                paid = target.paid(t, flat).reshape(inside.shape)
                V = as_like(np.where(inside, paid, as_numpy(V)), points)
        return V

    def gradient(self, x: Any, t: float = 0.0) -> Array:
        """∇V(t, x), shape (..., d)."""
        d, V = self.grid.dim, self._at(self.values, t)
        parts = [self._interpolate(V, x, self.discretization.width, [int(i == j) for j in range(d)]) for i in range(d)]
        return namespace(parts[0]).stack(parts, -1)

    @at_home
    def policy(self, t: float, x: Any) -> Array:
        """Optimal control a(t, x), shape (..., m): the best one for the value, its gradient and its Hessian there.

        Points beyond the grid get the control at its edge, so that paths may leave it. Where the choice makes no
        difference the control is that of the nodes about.
        """
        points = as_points(x, self.grid.dim)
        low, high = (as_like(end, points) for end in self.grid.box)
        if not all(axis.periodic for axis in self.grid.axes):
            loose = as_like(np.array([0.0 if axis.periodic else 1.0 for axis in self.grid.axes]), points)
            inside = namespace(points).minimum(namespace(points).maximum(points, low), high)
            points = points + loose * (inside - points)
        shape = tuple(points.shape[:-1])
        flat = np.asarray(as_numpy(points)).reshape(-1, self.grid.dim)
        a = as_like(self._best(t, flat).reshape(*shape, self.problem.controls.m), points)
        return a

    def _best(self, t: float, x: np.ndarray) -> np.ndarray:
        """The control at points (n, d) of the grid."""
        reader = self._readers.get("last")
        if reader is None or not np.array_equal(reader.x, x):
            # drift, noise and cost ask one after the other, and a solver asks at the same points again and again
            reader = self._readers["last"] = _Reader(self, x)
        return reader(t)

    @cached_property
    def _readers(self) -> "dict[str, _Reader]":
        return {}

    @cached_property
    def _structure(self) -> Coefficients:
        """What was seen of the coefficients, at some inner points."""
        inner = self.grid.points.reshape(*self.grid.shape, -1)[tuple(slice(1, -1) for _ in self.grid.shape)]
        some = inner.reshape(-1, self.grid.dim)
        return Coefficients(self.problem, torch.as_tensor(some[:: max(1, len(some) // LOOKED_AT)]))

    def module(self) -> torch.nn.Module:
        """The policy as a module, ``module(t, x)``: tensors in and out, without gradients."""
        return _PolicyModule(self)

    def to_xarray(self) -> Any:
        """Value and policy as a table over time and the coordinates (``xarray.Dataset``; needs xarray)."""
        return to_dataset(self)

    def closed_loop(self) -> KolmogorovProblem:
        """The problem under the optimal policy, for ``solve`` and ``monte_carlo``.

        With targets for ``monte_carlo`` alone, whose paths are stopped there: ``opt.problem.under(opt.policy)`` has the
        value for ``solve_hjb``, and for ``arrival`` the law of when and where paths are stopped.
        """
        return self.problem.closed_loop(self.policy)

    def _at(self, stored: np.ndarray, t: float, slopes: np.ndarray | None = None) -> np.ndarray:
        """Node fields at a time, shape (size, ...): linear between stored times, cubic where slopes are given."""
        last = self.times[-1]
        if not -1e-9 * last <= t <= last * (1.0 + 1e-9):
            raise InputError("t", t, f"a time between 0 and {last:g}")
        flat = stored.reshape(len(self.times), self.grid.size, *stored.shape[1 + self.grid.dim :])
        k = int(np.clip(np.searchsorted(self.times, t, side="right") - 1, 0, max(len(self.times) - 2, 0)))
        if len(self.times) == 1 or t <= self.times[0]:
            return np.asarray(flat[0])
        dt = self.times[k + 1] - self.times[k]
        s = (t - self.times[k]) / dt
        line = (1.0 - s) * flat[k] + s * flat[k + 1]
        # just before T slopes are of no size where the data break, or are not what a target pays
        rule = self.discretization.terminal
        rough = bool(self.problem.targets) or (rule is not None and rule.smoothed)
        if slopes is None or (k >= len(self.times) - 2 and rough):
            return np.asarray(line)
        bow = slopes.reshape(flat.shape)
        rise = (flat[k + 1] - flat[k]) / dt
        cubic = dt * s * (1.0 - s) * ((1.0 - s) * (bow[k] - rise) - s * (bow[k + 1] - rise))
        return np.asarray(line + np.where(np.isfinite(cubic), cubic, 0.0))

    def _interpolate(self, u: np.ndarray, x: Any, width: int, derivatives: list[int] | None = None) -> Array:
        points = as_points(x, self.grid.dim)
        return self.grid.interpolate(as_like(u, points) if is_tensor(points) else u, points, width, derivatives)

    def plot(self, ax: Any = None, t: float = 0.0, **style: Any) -> Any:
        """Plot V(t, ·): a line in one dimension, filled contours in two.

        Parameters
        ----------
        ax : matplotlib Axes, optional
            Where to draw; None: a new figure.
        t : float
            The time.
        **style
            Passed to ``Axes.plot`` or ``Axes.contourf``.

        Returns
        -------
        matplotlib.axes.Axes
        """
        import matplotlib.pyplot as plt

        if self.grid.dim > 2:
            raise InputError("grid", f"{self.grid.dim} dimensions", "one or two dimensions to plot")
        ax = plt.subplots(layout="constrained")[1] if ax is None else ax
        V = self._at(self.values, t).reshape(self.grid.shape)
        if self.grid.dim == 1:
            ax.plot(self.grid.nodes[0], V, **style)
            ax.set(xlabel="$x$", ylabel=f"$V({t:g}, x)$")
            return ax
        filled = ax.contourf(*self.grid.nodes, V.T, **({"levels": 20, "cmap": "cividis"} | style))
        ax.figure.colorbar(filled, ax=ax, label=f"$V({t:g}, x)$")
        ax.set(xlabel="$x_1$", ylabel="$x_2$", aspect="equal")
        return ax

    def __repr__(self) -> str:
        estimate = "" if self.error_estimate is None else f", error≈{float(np.max(self.error_estimate)):.1e}"
        return f"ControlSolution({self.status}{estimate}, {self.grid!r}, {len(self.times)} times)"


class _Reader:
    """Reads the policy of a solution at fixed points."""

    def __init__(self, solution: ControlSolution, x: np.ndarray) -> None:
        self.solution, self.x = solution, x.copy()
        grid, width, d = solution.grid, solution.discretization.width, solution.grid.dim
        unit = np.eye(d, dtype=int)
        self.width = 2 if solution.problem.controls.listed else 4
        self.plain = grid.interpolation(x, self.width)
        orders = [0 * unit[0], *unit, *(unit[i] + unit[j] for i in range(d) for j in range(i, d))]
        self.rules = [grid.interpolation(x, width, order.tolist()) for order in orders]
        self.coefficients = Coefficients(solution.problem, torch.as_tensor(self.x), solution._structure)
        self.last: tuple[float, np.ndarray] | None = None

    def __call__(self, t: float) -> np.ndarray:
        """Controls (n, m) at a time."""
        if self.last is not None and self.last[0] == t:
            return self.last[1].copy()
        solution, d = self.solution, self.solution.grid.dim
        index, weight = self.plain
        nodes = solution._at(solution.policies, t)
        start = solution.problem.controls.project((np.asarray(weight)[..., None] * nodes[index]).sum(1))
        V = solution._at(solution.values, t, solution.slopes)
        value, *rest = [(np.asarray(weight) * V[index]).sum(1) for index, weight in self.rules]
        p, M = np.stack(rest[:d], -1), np.zeros((len(self.x), d, d))
        for i, j, second in zip(*np.triu_indices(d), rest[d:], strict=True):
            M[:, i, j] = M[:, j, i] = second
        a, found = self.coefficients.choose(t, value, p, M, torch.as_tensor(start))
        self.last = t, np.where(found[:, None], a.numpy(), start)
        return self.last[1].copy()


class _PolicyModule(torch.nn.Module):
    """A policy as a module."""

    def __init__(self, solution: ControlSolution) -> None:
        super().__init__()
        self._solution = solution

    def forward(self, t: float, x: torch.Tensor) -> torch.Tensor:
        """a(t, x) at points (..., d), shape (..., m)."""
        with torch.no_grad():
            a: torch.Tensor = torch.as_tensor(self._solution.policy(float(t), x.double()))
        return a.to(x)


def to_dataset(solution: ControlSolution) -> Any:
    """Value and policy of a solution over time and the coordinates."""
    try:
        import xarray
    except ImportError:
        raise MissingExtraError("xarray", "xarray") from None
    names = ["x"] if solution.grid.dim == 1 else [f"x{i + 1}" for i in range(solution.grid.dim)]
    coordinates = {"t": solution.times, **dict(zip(names, solution.grid.nodes, strict=True))}
    fields = {
        "value": (("t", *names), solution.values),
        "policy": (("t", *names, "control"), solution.policies),
    }
    return xarray.Dataset(fields, coordinates, {"status": solution.status, "message": solution.message})


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
        return pack(problem, _follow(problem, discretization), None, "fixed", "solved as given", {})
    still = problem.closed_loop(problem.constant(problem.controls.samples[0]))
    points = outside(problem, interesting_points(still, at))
    limits = Limits.of(max_cells, max_seconds, MAX_CELLS[problem.dim], MAX_SECONDS)
    search = Search(problem, points, rtol, atol, limits)
    level, estimate, status, message, stats = concluded(search)
    shape = () if at is None else tuple(as_points(at, problem.dim, "at").shape[:-1])
    return pack(problem, level, np.broadcast_to(estimate, shape).copy(), status, message, stats)


def concluded(search: "Search") -> tuple["PolicyLevel", float, str, str, dict[str, Any]]:
    """What a search found, with a warning where the tolerance is not met; an error where there is no level at all."""
    try:
        found = search.run()
    except OutOfTimeError:
        raise NotConvergedError(f"no level was finished within {search.limits.over}: allow more") from None
    except KeyboardInterrupt:
        if not search.levels:
            raise
        told = "interrupted; the finest level that was finished is returned, not compared with the monotone scheme"
        found = search.found("interrupted", told, {})
    if found[2] == "tolerance_not_met":
        warnings.warn(found[3], ToleranceWarning, stacklevel=3)
    return found


def outside(problem: ControlProblem, points: np.ndarray) -> np.ndarray:
    """The points outside all targets, where there is something to find."""
    inside = _held(problem, points)
    if inside.all():
        raise InputError("at", "points in targets alone", "a point outside the targets")
    return np.asarray(points[~inside])


def _held(problem: ControlProblem, points: np.ndarray) -> np.ndarray:
    """Whether points (n, d) lie in a target."""
    inside = np.zeros(len(points), dtype=bool)
    for target in problem.targets:
        inside |= target.inside(points)
    return inside


@dataclass
class PolicyLevel:
    """One solve: the recipe, the states and policies at the times kept, latest first, what it cost, and its answers.

    ``unsettled`` is what V still changed by where policy iteration did not settle; ``at`` the answer at the points that
    matter (and the average of ergodic problems), ``witnessed`` there and beside them.
    """

    recipe: Discretization
    times: list[float]
    states: list[np.ndarray]
    acts: list[Act]
    iterations: int
    unsettled: float = 0.0
    nodes: float = 0.0
    seconds: float = 0.0
    at: np.ndarray | None = None
    witnessed: np.ndarray | None = None
    slopes: list[np.ndarray] = field(default_factory=list)
    average: float | None = None

    @property
    def V(self) -> np.ndarray:
        """V at t = 0, shape (size, 1)."""
        return self.states[-1]


def pack(
    problem: ControlProblem,
    level: PolicyLevel,
    estimate: np.ndarray | None,
    status: str,
    message: str,
    stats: dict[str, Any],
) -> ControlSolution:
    """Pack a level, in increasing time."""
    grid = level.recipe.grid
    values = np.stack(level.states[::-1], 0)[..., 0].reshape(-1, *grid.shape)
    policies = np.stack([act.a.numpy() for act in level.acts[::-1]], 0).reshape(-1, *grid.shape, problem.controls.m)
    stats = {"cells": grid.size, "steps": level.recipe.steps, "policy_iterations": level.iterations} | stats
    times, slopes = np.array(level.times[::-1]), None
    if len(level.slopes) == len(level.states):
        slopes = np.stack(level.slopes[::-1], 0)[..., 0].reshape(-1, *grid.shape)
    recipe = level.recipe
    return ControlSolution(
        problem, values, policies, times, grid, recipe, estimate, status, message, stats, slopes, level.average
    )


def _nodal_policy(level: PolicyLevel) -> Policy:
    """The policy of a level, linear between its nodes and constant from time to time: enough to see where paths go."""
    grid, times = level.recipe.grid, np.array(level.times)
    low, high = grid.box
    loose = np.array([axis.periodic for axis in grid.axes])
    low, high = np.where(loose, -np.inf, low), np.where(loose, np.inf, high)

    def policy(t: float, x: torch.Tensor) -> torch.Tensor:
        nodes = level.acts[int(np.abs(times - t).argmin())].a.numpy()
        inside = np.clip(x.numpy(), low, high)
        index, weight = grid.interpolation(inside.reshape(-1, grid.dim), 2)
        a = (np.asarray(weight)[..., None] * nodes[index]).sum(1)
        return torch.as_tensor(a.reshape(*x.shape[:-1], nodes.shape[1]))

    return policy


def _follow(problem: ControlProblem, recipe: Discretization) -> PolicyLevel:
    """Solve exactly what a recipe says."""
    problem = opened_as(problem, recipe.grid)
    bellman = Bellman(problem, recipe.grid, recipe.scheme)
    if problem.horizon is None:
        V, settled = solve_stationary(bellman)
        return PolicyLevel(recipe, [0.0], [V], settled.acts, settled.count, settled.change, average=settled.average)
    if len(recipe.times) < 2:
        raise InputError("discretization", "a recipe without time nodes", "one for a finite horizon")
    change = float(recipe.estimate.get("policy", [POLICY_CHANGE])[0])
    return _march(bellman, recipe, list(recipe.times), change=change)


def _march(
    bellman: Bellman,
    recipe: Discretization,
    times: list[float] | None,
    limits: Limits | None = None,
    change: float = POLICY_CHANGE,
) -> PolicyLevel:
    """March from T to 0 along the time nodes; None: explicit steps as long as stability lets them be."""
    T = float(bellman.problem.horizon or 0.0)
    step = (
        ExplicitPolicyStep(bellman)
        if recipe.stepper == EXPLICIT
        else ImplicitPolicyStep(bellman, recipe.stepper, change)
    )
    V = bellman.full(_terminal(bellman, recipe), T)
    acts = [bellman.improve(T, V, bellman.start())]
    level = PolicyLevel(recipe, [T], [V], [acts[-1]], 0)
    if bellman.problem.obstacle is None:
        level.slopes.append(bellman.slope(T, bellman.free(V), acts[-1]))
    free, t, nodes = bellman.free(V), T, [T]
    while t > 0.0:
        if limits is not None:
            limits.check()
        if times is not None:
            dt = t - times[len(times) - 1 - len(nodes)]
        else:
            assert isinstance(step, ExplicitPolicyStep)
            dt = min(step.bound(t, acts[-1]), T / FIRST_STEPS)
            dt = t if dt >= t else min(dt, 0.5 * t) if 2.0 * dt > t else dt
            if len(nodes) > MANY_STEPS:
                raise _TooManySteps
        free, acts = step(t, dt, free, acts)
        t = t - dt if t - dt > 1e-12 * T else 0.0
        nodes.append(t)
        if not np.isfinite(free).all():
            raise NotConvergedError(f"the value became infinite on {recipe.grid!r} with {recipe.stepper}")
        level.times.append(t)
        level.states.append(bellman.full(free, t))
        level.acts.append(acts[-1])
        if bellman.problem.obstacle is None:
            level.slopes.append(bellman.slope(t, free, acts[-1]))
    level.acts[-1] = bellman.improve(0.0, level.V, acts[-1])
    bellman.check(0.0, level.V, level.acts[-1])
    level.iterations, level.unsettled = step.iterations, step.unsettled
    if times is None:
        level.recipe = Discretization(recipe.grid, tuple(nodes[::-1]), recipe.scheme, recipe.stepper, recipe.terminal)
    _thin(level)
    return level


class _TooManySteps(Exception):  # noqa: N818 - a way out, no error
    """Explicit steps would be too many."""


def _thin(level: PolicyLevel) -> None:
    """Keep at most ``STORED`` times, the ends among them."""
    if len(level.times) > STORED:
        keep = np.unique(np.linspace(0, len(level.times) - 1, STORED).round().astype(int))
        level.times = [level.times[i] for i in keep]
        level.states = [level.states[i] for i in keep]
        level.acts = [level.acts[i] for i in keep]
        level.slopes = [level.slopes[i] for i in keep] if level.slopes else []


def _terminal(bellman: Bellman, recipe: Discretization) -> np.ndarray:
    """Terminal data at the nodes, shape (size, 1)."""
    problem = bellman.generator.problem
    if recipe.terminal is not None:
        values = as_numpy(recipe.terminal.apply(problem, bellman.grid.points))
    else:
        values = as_numpy(problem.final(bellman.grid.points))
    values = values.reshape(bellman.grid.size, -1)
    if values.shape[1] != 1:
        raise InputError("terminal", f"{values.shape[1]} columns", "one number per point")
    return np.asarray(values)


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
        self.opened = self._opened(self.problem.box)
        # values that come from the unknown ones next to a curved boundary would bound explicit steps
        self.stepper = IMPLICIT if problem.dim == 1 or problem.targets else EXPLICIT
        self.smoothing = 2
        # policy iteration converges like Newton's method: the last change is far above the error that is left
        self.change = max(POLICY_CHANGE, min(LAST_CHANGE, 1e-3 * rtol))
        self.cut = 0.0
        self.levels: list[PolicyLevel] = []
        self._witnesses: np.ndarray | None = None
        self.iterations = 0

    def run(self) -> tuple[PolicyLevel, float, str, str, dict[str, Any]]:
        """Level, estimate, status, message and statistics."""
        layout = self._first_frame()
        try:
            layout, status, message = self._in_some_box(layout, self.scheme)
        except NotConvergedError as error:
            status, message = "failed", str(error)
        check = Check(True, unchecked=self.limits.over) if self._unfinished() else self._check(layout)
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

    def found(
        self, status: str, message: str, stats: dict[str, Any]
    ) -> tuple[PolicyLevel, float, str, str, dict[str, Any]]:
        """The last level, its estimate, and what is told of it."""
        by_levels = self._estimate()
        stats = stats | {"levels": len(self.levels), "seconds": self.limits.spent, "cut": self.cut}
        level = self.levels[-1]
        level.recipe.estimate.update(discretization=[by_levels], cut=[self.cut], policy=[self.change])
        return level, by_levels + self.cut, status, message, stats

    def _first_frame(self) -> Frame:
        """Frame for typical controls; for unbounded ones also for the policy of a coarse solve."""
        policies: list[Any] = [self.problem.constant(a) for a in self.problem.controls.samples[:5]]
        layout = self._frame(policies)
        if self.problem.controls.unbounded and self.problem.horizon is not None and self._opened(layout.box):
            try:
                level = self._solve_on(layout.grid(FIRST_NODES[self.problem.dim]), FIRST_STEPS, self.scheme)
            except (NotConvergedError, OutOfTimeError):
                return layout
            layout = self._frame([*policies, _nodal_policy(level)])
        return layout

    def _frame(self, policies: list[Any]) -> Frame:
        tail = max(1e-2 * self.rtol, 1e-12)
        layout = frame([self.problem.closed_loop(p) for p in policies], self.points, tail, self.charts)
        if self.problem.controls.unbounded and self._noise_is_controlled():
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

    def _noise_is_controlled(self) -> bool:
        """Whether the covariance depends on the control."""
        return not Coefficients(self.problem, torch.as_tensor(self.points[:8])).covariance_is_fixed

    @staticmethod
    def _opened(box: Any) -> bool:
        return bool(box.has("cut"))

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
            if not self._opened(layout.box):
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

    def _unfinished(self) -> bool:
        """Whether there are levels, and no time for more."""
        return bool(self.levels) and self.limits.late()

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
            self._witnesses = beside[~_held(self.problem, beside)]
        return self._witnesses

    def _solve_on(self, grid: Grid, steps: int, scheme: str) -> PolicyLevel:
        bellman = Bellman(self.problem, grid, scheme)
        if self.problem.horizon is None:
            V, settled = solve_stationary(bellman, self._guess(grid))
            recipe = Discretization(grid, (), scheme, IMPLICIT)
            level = PolicyLevel(
                recipe, [0.0], [V], settled.acts, settled.count, settled.change, average=settled.average
            )
            if level.average is not None:
                level.states = [V - self._answers(level, self.points[:1])]
            return level
        rule = plan_terminal(bellman.generator.problem, grid, bellman.box, self.smoothing if scheme != MONOTONE else 2)
        stepper = EULER if scheme == MONOTONE else self.stepper
        recipe = Discretization(grid, (), scheme, stepper, rule)
        if stepper == EXPLICIT:
            try:
                return _march(bellman, recipe, None, self.limits)
            except _TooManySteps:
                self.stepper = stepper = IMPLICIT
        T, s = self.problem.horizon, np.linspace(0.0, 1.0, steps + 1)
        power = CROWDING if rule.smoothed and scheme != MONOTONE else 1
        times = T * (1.0 - s[::-1] ** power)
        times[0], times[-1] = 0.0, T
        recipe = Discretization(grid, tuple(times.tolist()), scheme, stepper, rule)
        # a second opinion is wrong by far more than policies that are nearly the best
        change = self.change if scheme == self.scheme else max(self.change, OPINION_CHANGE)
        return _march(bellman, recipe, times.tolist(), self.limits, change)

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
