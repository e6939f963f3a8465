"""One level of the search for an optimum: a grid, the march of its policy, and what is kept of both."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from kolmo.arrays import as_numpy
from kolmo.control.bellman import Act, Bellman
from kolmo.control.charts import opened_as
from kolmo.control.optimum import STORED, ControlSolution
from kolmo.control.policy_steps import (
    POLICY_CHANGE,
    ExplicitPolicyStep,
    ImplicitPolicyStep,
    Settled,
    solve_stationary,
)
from kolmo.control.problem import ControlProblem, Policy
from kolmo.discretization import Discretization
from kolmo.errors import InputError, NotConvergedError
from kolmo.limits import Limits

IMPLICIT, EXPLICIT, EULER = "radau5", "rk4", "implicit-euler"
FIRST_STEPS = 6
# More explicit steps than this call for implicit ones in two dimensions.
MANY_STEPS = 3000


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

    @classmethod
    def still(cls, recipe: Discretization, solved: tuple[np.ndarray, Settled]) -> "PolicyLevel":
        """What ``solve_stationary`` found."""
        V, settled = solved
        return cls(recipe, [0.0], [V], settled.acts, settled.count, settled.change, average=settled.average)

    @property
    def V(self) -> np.ndarray:
        """V at t = 0, shape (size, 1)."""
        return self.states[-1]


class Outcome(NamedTuple):
    """What a search says of its last level: estimate of the error at the points, status, message and statistics."""

    estimate: Any
    status: str
    message: str
    stats: dict[str, Any]


def pack(problem: ControlProblem, level: PolicyLevel, outcome: Outcome) -> ControlSolution:
    """Pack a level, in increasing time."""
    grid = level.recipe.grid
    values = np.stack(level.states[::-1], 0)[..., 0].reshape(-1, *grid.shape)
    policies = np.stack([act.a.numpy() for act in level.acts[::-1]], 0).reshape(-1, *grid.shape, problem.controls.m)
    recipe = level.recipe
    stats = {"cells": grid.size, "steps": recipe.steps, "policy_iterations": level.iterations} | outcome.stats
    told = outcome._replace(stats=stats)
    times, slopes = np.array(level.times[::-1]), None
    if len(level.slopes) == len(level.states):
        slopes = np.stack(level.slopes[::-1], 0)[..., 0].reshape(-1, *grid.shape)
    return ControlSolution(problem, values, policies, times, grid, recipe, *told, slopes, level.average)


def nodal_policy(level: PolicyLevel) -> Policy:
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


def follow(problem: ControlProblem, recipe: Discretization) -> PolicyLevel:
    """Solve exactly what a recipe says."""
    problem = opened_as(problem, recipe.grid)
    bellman = Bellman(problem, recipe.grid, recipe.scheme)
    if problem.horizon is None:
        return PolicyLevel.still(recipe, solve_stationary(bellman))
    if len(recipe.times) < 2:
        raise InputError("discretization", "a recipe without time nodes", "one for a finite horizon")
    change = float(recipe.estimate.get("policy", [POLICY_CHANGE])[0])
    return march(bellman, recipe, list(recipe.times), change=change)


def march(
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
                raise TooManySteps
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


class TooManySteps(Exception):  # noqa: N818 - a way out, no error
    """Explicit steps would be too many."""


def _thin(level: PolicyLevel) -> None:
    """Keep at most ``STORED`` times, the ends among them."""
    if len(level.times) > STORED:
        keep = np.unique(np.linspace(0, len(level.times) - 1, STORED).round().astype(int))
        for name in ("times", "states", "acts", *(["slopes"] if level.slopes else [])):
            setattr(level, name, [getattr(level, name)[i] for i in keep])


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


def held(problem: ControlProblem, points: np.ndarray) -> np.ndarray:
    """Whether points (n, d) lie in a target."""
    inside = np.zeros(len(points), dtype=bool)
    for target in problem.targets:
        inside |= target.inside(points)
    return inside
