r"""Switching between regimes: one value function for each, coupled by what it costs to switch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch

from kolmo.arrays import Array, as_numpy, as_points, at_home, is_tensor
from kolmo.control.bellman import Act, Bellman, Filled
from kolmo.control.charts import opened
from kolmo.control.frame import Frame, frame
from kolmo.control.hjb import concluded
from kolmo.control.optimum import ControlSolution
from kolmo.control.policy_level import IMPLICIT, PolicyLevel, pack
from kolmo.control.policy_search import CROWDING, MAX_CELLS, MAX_SECONDS, MONOTONE, STOPPED, Search
from kolmo.control.policy_steps import ImplicitPolicyStep, solve_stationary
from kolmo.control.problem import ControlProblem
from kolmo.discretization import Discretization
from kolmo.errors import InputError
from kolmo.grid import Grid
from kolmo.limits import Limits
from kolmo.refine.plan import interesting_points
from kolmo.schemes.base import SCHEMES
from kolmo.schemes.terminal import plan_terminal
from kolmo.shown import Shown

# Values that differ by less than a cost and this part of their size differ by the cost.
SLACK = 1e-7

Cost = float | Callable[[float, Any], Any]


@dataclass(frozen=True, eq=False)
class Switching(Shown):
    r"""Value functions :math:`V_i \le \min_{j \ne i}(V_j + k_{ij})` of all regimes, their policies, and when to switch.

    Attributes
    ----------
    regimes : tuple of ControlSolution
        Value, gradient and policy of each of the k regimes.
    costs : tuple of tuples, shape (k, k)
        What was given.

    References
    ----------
    Brekke and Øksendal 1994.

    Examples
    --------
    >>> from kolmo import catalog, control
    >>> case = catalog.OPTIMA["plant"]()
    >>> best = control.solve_switching(case.problem, [[0.0, 2.0], [0.5, 0.0]], at=case.points, rtol=1e-2)
    >>> best.regimes[1].status, best.switch(0.0, [0.0], 1).tolist()
    ('converged', 1)
    """

    regimes: tuple[ControlSolution, ...]
    costs: tuple[tuple[Cost, ...], ...]

    def __call__(self, x: Any, regime: int, t: float = 0.0) -> Array:
        """V of a regime at points (..., d), shape (...)."""
        return self.regimes[regime](x, t)

    def switch(self, t: float, x: Any, regime: int) -> Array:
        """The regime to be in, shape (...): the present one, or another one to switch to at once."""
        grid, sign = self.regimes[0].grid, self.regimes[0].problem.sign
        points = as_points(x, grid.dim)
        flat = np.asarray(as_numpy(points), dtype=float).reshape(-1, grid.dim)
        worth = [sign * np.asarray(solution(flat, t)) for solution in self.regimes]
        best, to = worth[regime], np.full(len(flat), regime)
        # where it is best to switch the values differ by the cost, up to what the penalty leaves
        slack = SLACK * max(float(np.abs(values).max()) for values in worth)
        for j, other in enumerate(worth):
            if j != regime:
                gain = best + slack >= other + _cost(self.costs[regime][j], t, flat)
                best, to = np.where(gain, other, best), np.where(gain, j, to)
        to = to.reshape(points.shape[:-1])
        return torch.as_tensor(to) if is_tensor(points) else to

    @property
    def error_estimate(self) -> np.ndarray:
        """Estimate of the error of all values at t = 0."""
        estimate = self.regimes[0].error_estimate
        assert estimate is not None
        return estimate

    @property
    def status(self) -> str:
        """Whether it is "converged" or "tolerance_not_met"."""
        return self.regimes[0].status

    @property
    def message(self) -> str:
        """What happened, in a sentence."""
        return self.regimes[0].message

    def __repr__(self) -> str:
        return f"Switching({self.status}, {len(self.regimes)} regimes, error≈{float(np.max(self.error_estimate)):.1e})"


@at_home
def solve_switching(
    regimes: Sequence[ControlProblem],
    costs: Sequence[Sequence[Cost]],
    *,
    at: Any = None,
    rtol: float = 1e-3,
    atol: float = 1e-6,
    max_seconds: float | None = None,
    max_cells: int | None = None,
) -> Switching:
    r"""Optimal switching between regimes, each with its own dynamics and costs.

    .. math:: \max\{-\partial_t V_i - \min_a [L^a_i V_i + \ell_i],\; V_i - \min_{j\ne i}(V_j + k_{ij})\} = 0

    Parameters
    ----------
    regimes : sequence of ControlProblem
        Two or more, of one sense, horizon and box; nothing to choose but the regime: ``controls=Finite([[0.0]])``. No
        obstacles, targets or long-run averages.
    costs : nested sequence, shape (k, k)
        ``costs[i][j]``: what switching from i to j costs, a number (infinite: impossible) or ``cost(t, x)``; paid
        whether the expected value is minimised or maximised. There and back must cost something.
    at, rtol, atol, max_seconds, max_cells
        As in ``solve_hjb``; the tolerance is relative to the largest value of all regimes at the points.

    Returns
    -------
    Switching

    Raises
    ------
    InputError
        For bad input.
    NotConvergedError
        When there is no answer.

    Notes
    -----
    Brekke and Øksendal 1994. Differences of second order, since second derivatives jump where one switches; the
    constraint is a penalty, found by policy iteration (Forsyth and Vetzal 2002).

    Examples
    --------
    A plant that may be closed (earning nothing) or open (earning x − 1), and the price x wanders:

    >>> import kolmo
    >>> from kolmo import control
    >>> def plant(profit):
    ...     return control.ControlProblem(lambda t, x, a: -x, 0.5, controls=control.Finite([[0.0]]), horizon=None,
    ...         terminal=None, running_cost=profit, killing=0.2, sense="max", box=kolmo.Box.unbounded(1))
    >>> best = control.solve_switching([plant(0.0), plant(lambda t, x, a: x[..., 0])], [[0.0, 0.3], [0.2, 0.0]],
    ...     at=[-1.0, 0.0, 1.0], rtol=1e-2)
    >>> best.switch(0.0, [-1.5, 0.0, 1.5], 0).tolist(), best.switch(0.0, [-1.5, 0.0, 1.5], 1).tolist()
    ([0, 0, 1], [0, 1, 1])
    """
    first, table = _checked(regimes, costs)
    points = interesting_points(first.closed_loop(first.constant(first.controls.samples[0])), at)
    limits = Limits.of(max_cells, max_seconds, MAX_CELLS[first.dim], MAX_SECONDS)
    search = _Search(regimes, table, points, rtol, atol, limits)
    level, estimate, status, message, stats = concluded(search)
    shape = () if at is None else tuple(as_points(at, first.dim, "at").shape[:-1])
    answers = []
    for i, problem in enumerate(regimes):
        part = search.part(level, i)
        answers.append(pack(problem, part, np.broadcast_to(estimate, shape).copy(), status, message, dict(stats)))
    return Switching(tuple(answers), table)


def _checked(
    regimes: Sequence[ControlProblem], costs: Sequence[Sequence[Cost]]
) -> tuple[ControlProblem, tuple[tuple[Cost, ...], ...]]:
    """The first regime and the table of costs, checked."""
    k = len(regimes)
    if k < 2 or not all(isinstance(problem, ControlProblem) for problem in regimes):
        raise InputError("regimes", f"{k} of them", "two ControlProblems or more")
    first = regimes[0]
    for problem in regimes:
        if problem.obstacle is not None or problem.targets or problem.ergodic:
            raise InputError("regimes", "an obstacle, targets or a long-run average", "none of them")
        if (problem.sense, problem.horizon, problem.dim) != (first.sense, first.horizon, first.dim):
            raise InputError("regimes", "different senses, horizons or dimensions", "the same ones")
        if repr(problem.box) != repr(first.box):
            raise InputError("regimes", "different boxes", "one box")
    table = tuple(tuple(row) for row in costs)
    if len(table) != k or any(len(row) != k for row in table):
        raise InputError("costs", f"rows of {[len(row) for row in table]}", f"{k} rows of {k}")
    for i in range(k):
        for j in range(i):
            there, back = table[i][j], table[j][i]
            if not callable(there) and not callable(back) and not there + back > 0.0:
                raise InputError("costs", f"{there} and {back} there and back", "a positive sum")
    return first, table


def _cost(cost: Cost, t: float, x: np.ndarray) -> np.ndarray:
    """A cost at points (n, d)."""
    if not callable(cost):
        return np.full(len(x), float(cost))
    with torch.no_grad():
        return np.asarray(torch.as_tensor(cost(t, torch.as_tensor(x)), dtype=torch.float64).expand(len(x)).numpy())


class _Coupled:
    """The equations of all regimes on one grid, stacked; as ``Bellman`` is one of them.

    ``Act.stop`` is 0 where one stays and j + 1 where one switches to regime j.
    """

    banded = linear = False

    def __init__(
        self, regimes: Sequence[ControlProblem], costs: Sequence[Sequence[Cost]], grid: Grid, scheme: str
    ) -> None:
        self.parts = [Bellman(problem, grid, scheme) for problem in regimes]
        self.problem, self.grid, self.costs = regimes[0], grid, costs
        self.size, self.m = grid.size, max(problem.controls.m for problem in regimes)
        fixed = [np.zeros(grid.size, dtype=bool) if part.fixed is None else part.fixed for part in self.parts]
        self.fixed = np.concatenate(fixed) if np.any(fixed) else None
        self.penalty = self.parts[0].penalty

    def slices(self) -> list[slice]:
        """The rows of every regime."""
        return [slice(i * self.size, (i + 1) * self.size) for i in range(len(self.parts))]

    def start(self) -> Act:
        """Typical controls, and no switch."""
        a = [torch.nn.functional.pad(part.start().a, (0, self.m - part.problem.controls.m)) for part in self.parts]
        return Act(torch.cat(a), np.zeros(self.size * len(self.parts), dtype=int))

    def own(self, act: Act, i: int) -> Act:
        """What is done in a regime besides switching."""
        return Act(act.a[self.slices()[i], : self.parts[i].problem.controls.m])

    def boundary(self, t: float) -> np.ndarray:
        """Values at absorbing nodes."""
        return np.concatenate([part.boundary(t) for part in self.parts])

    def free(self, V: np.ndarray) -> np.ndarray:
        """V with zeros at absorbing nodes."""
        return V if self.fixed is None else V * (~self.fixed)[:, None]

    def full(self, V: np.ndarray, t: float) -> np.ndarray:
        """V with the absorbing values put in."""
        return V if self.fixed is None else np.asarray(self.free(V) + self.boundary(t))

    def assemble(self, t: float, act: Act) -> tuple[Filled, np.ndarray, None]:
        """Matrix and load of a policy."""
        found = [part.assemble(t, self.own(act, i)) for i, part in enumerate(self.parts)]
        Q, load = sp.block_diag([f[0].matrix for f in found], format="csr"), np.concatenate([f[1] for f in found])
        assert act.stop is not None
        rows = np.flatnonzero(act.stop)
        if len(rows):
            here, to = np.divmod(rows, self.size)[0], act.stop[rows] - 1
            node = rows % self.size
            size = len(act.stop)
            data = np.full(len(rows), self.penalty)
            # what V is pulled to, and that it is pulled
            Q = Q + sp.coo_matrix((data, (rows, to * self.size + node)), shape=(size, size))
            Q = Q - sp.coo_matrix((data, (rows, rows)), shape=(size, size))
            load = load.copy()
            x = self.grid.points
            for i, j in {(int(i), int(j)) for i, j in zip(here, to, strict=True)}:
                some = (here == i) & (to == j)
                load[rows[some], 0] += self.penalty * self.problem.sign * _cost(self.costs[i][j], t, x[node[some]])
            if self.fixed is not None:
                known = self.boundary(t)
                load += self.penalty * _placed(rows, known[to * self.size + node, 0], size)
                Q = Q @ sp.diags((~self.fixed).astype(float))
        return Filled(sp.csr_matrix(Q)), load, None

    def improve(self, t: float, V: np.ndarray, act: Act) -> Act:
        """The best policy for V."""
        k, parts, sign = len(self.parts), [], self.problem.sign
        fields = V.reshape(k, self.size)
        for i, part in enumerate(self.parts):
            a = part.improve(t, V[self.slices()[i]], self.own(act, i)).a
            parts.append(torch.nn.functional.pad(a, (0, self.m - a.shape[1])))
        stops = []
        for i in range(k):
            best, to = sign * fields[i], np.zeros(self.size, dtype=int)
            for j in range(k):
                if j == i:
                    continue
                other = sign * fields[j] + _cost(self.costs[i][j], t, self.grid.points)
                to, best = np.where(other < best, j + 1, to), np.minimum(other, best)
            stops.append(to)
        stop = np.concatenate(stops)
        return Act(torch.cat(parts), stop if self.fixed is None else np.where(self.fixed, 0, stop))

    def check(self, t: float, V: np.ndarray, act: Act) -> None:
        """Raise where a Hamiltonian has no optimum."""
        for i, part in enumerate(self.parts):
            part.check(t, V[self.slices()[i]], self.own(act, i))


def _placed(rows: np.ndarray, values: np.ndarray, size: int) -> np.ndarray:
    result = np.zeros((size, 1))
    result[rows, 0] = values
    return result


class _Search(Search):
    """Finer and finer levels of all regimes together."""

    def __init__(
        self,
        regimes: Sequence[ControlProblem],
        costs: Sequence[Sequence[Cost]],
        points: np.ndarray,
        rtol: float,
        atol: float,
        limits: Limits,
    ) -> None:
        super().__init__(regimes[0], points, rtol, atol, limits)
        self.regimes, self.costs = [opened(problem, self.charts) for problem in regimes], costs
        # second derivatives jump where one switches
        self.scheme, self.kinked, self.stepper = STOPPED, True, IMPLICIT
        self.order = SCHEMES[STOPPED].order

    def _first_frame(self) -> Frame:
        tail = max(1e-2 * self.rtol, 1e-12)
        loops = [p.closed_loop(p.constant(a)) for p in self.regimes for a in p.controls.samples[:5]]
        return frame(loops, self.points, tail, self.charts)

    def _solve_on(self, grid: Grid, steps: int, scheme: str) -> PolicyLevel:
        system: Any = _Coupled(self.regimes, self.costs, grid, scheme)
        horizon = self.problem.horizon
        if horizon is None:
            V, settled = solve_stationary(system, self._guess(grid) or system.start())
            recipe = Discretization(grid, (), scheme, IMPLICIT)
            return PolicyLevel(recipe, [0.0], [V], settled.acts, settled.count, settled.change)
        first = system.parts[0]
        rule = plan_terminal(first.generator.problem, grid, first.box, self.smoothing)
        s = np.linspace(0.0, 1.0, steps + 1)
        times = horizon * (1.0 - s[::-1] ** (CROWDING if rule.smoothed and scheme != MONOTONE else 1))
        stepper = "implicit-euler" if scheme == MONOTONE else IMPLICIT
        recipe = Discretization(grid, tuple(times.tolist()), scheme, stepper, rule)
        step = ImplicitPolicyStep(system, stepper, self.change)
        V = np.concatenate(
            [
                np.asarray(as_numpy(rule.apply(part.generator.problem, grid.points))).reshape(-1, 1)
                for part in system.parts
            ]
        )
        V, acts = system.full(V, horizon), [system.start()]
        acts = [system.improve(horizon, V, acts[0])]
        level = PolicyLevel(recipe, [horizon], [V], [acts[-1]], 0)
        free = system.free(V)
        for after, before in zip(times[:0:-1], times[-2::-1], strict=True):
            self.limits.check()
            free, acts = step(float(after), float(after - before), free, acts)
            level.times.append(float(before))
            level.states.append(system.full(free, float(before)))
            level.acts.append(acts[-1])
        level.iterations, level.unsettled = step.iterations, step.unsettled
        return level

    def _guess(self, grid: Grid) -> Act | None:
        if not self.levels:
            return None
        coarse = self.levels[-1].recipe.grid
        guesses = [
            self._nearest(self.part(self.levels[-1], i).acts[-1], coarse, grid) for i in range(len(self.regimes))
        ]
        stops = [guess.stop for guess in guesses if guess.stop is not None]
        return Act(torch.cat([guess.a for guess in guesses]), np.concatenate(stops))

    def _answers(self, level: PolicyLevel, points: np.ndarray) -> np.ndarray:
        fields = level.V.reshape(len(self.regimes), -1)
        grid, width = level.recipe.grid, level.recipe.width
        return np.concatenate([np.asarray(grid.interpolate(V, points, width)) for V in fields])

    def part(self, level: PolicyLevel, i: int) -> PolicyLevel:
        """What a level says of one regime."""
        n = level.recipe.grid.size
        rows = slice(i * n, (i + 1) * n)
        m = self.regimes[i].controls.m
        acts = [Act(act.a[rows, :m], None if act.stop is None else act.stop[rows]) for act in level.acts]
        states = [V[rows] for V in level.states]
        return PolicyLevel(level.recipe, level.times, states, acts, level.iterations, level.unsettled)
