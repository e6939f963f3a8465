r"""Law of a process that targets stop: its density, and when and where it arrives.

The steps are the transpose of those that values take: with V before and after a step related by
:math:`V_n = S_n V_{n+1} + s_n`, and :math:`s_n` the load of a payment of one in a target,

.. math:: p_{n+1} = S_n^\top p_n, \qquad F_{n+1} = F_n + s_n \cdot p_n
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from kolmo.arrays import as_numpy, as_points
from kolmo.control.bellman import Bellman
from kolmo.control.policy_search import SMOOTH
from kolmo.control.problem import ControlProblem
from kolmo.errors import InputError
from kolmo.grid import Grid
from kolmo.shown import Shown
from kolmo.steppers.radau import CoupledStep, tableau

# Stages of a step (Radau IIA, order 5), and power of time by which steps grow: the start is a point.
STAGES, CROWDING = 3, 2
# Nodes that carry the start, per axis.
WIDTH = 4


@dataclass(frozen=True, eq=False, repr=False)
class Arrival(Shown):
    r"""Masses of a process under way, and what has arrived in the targets: :math:`\sum_i p_i(t) + \sum_k r_k(t) = 1`.

    Attributes
    ----------
    grid : Grid
        The nodes.
    times : ndarray, shape (nt,)
        From 0 to T.
    masses : ndarray, shape ``(nt, *grid.shape)``
        At the nodes; over the volumes of their cells they are the density.
    reached : ndarray, shape (nt, k)
        Probability of having been stopped in each target by then.

    Examples
    --------
    >>> from kolmo.grid import Axis, Grid
    >>> from kolmo.grid.grading import Uniform
    >>> masses, arrived = np.array([[0.0, 1.0, 0.0], [0.0, 0.6, 0.0]]), np.array([[0.0], [0.4]])
    >>> law = Arrival(Grid([Axis(3, Uniform(0.0, 1.0))]), np.array([0.0, 1.0]), masses, arrived)
    >>> law.mass.tolist(), float(law(0.5, 1.0))
    ([1.0, 0.6], 1.2)
    """

    grid: Grid
    times: np.ndarray
    masses: np.ndarray
    reached: np.ndarray

    @property
    def mass(self) -> np.ndarray:
        """Probability of being under way, shape (nt,)."""
        return np.asarray(self.masses.reshape(len(self.times), -1).sum(1))

    def __call__(self, x: Any, t: float) -> np.ndarray:
        """Density at points (..., d), linear between nodes and times.

        Raises
        ------
        InputError
            For points outside the grid, and times beyond the horizon.
        """
        if not 0.0 <= t <= self.times[-1]:
            raise InputError("t", t, f"a time between 0 and {self.times[-1]:g}")
        k = int(np.clip(np.searchsorted(self.times, t, side="right") - 1, 0, len(self.times) - 2))
        share = (t - self.times[k]) / (self.times[k + 1] - self.times[k])
        masses = (1.0 - share) * self.masses[k] + share * self.masses[k + 1]
        density = masses.reshape(-1) / self.grid.volumes
        return np.asarray(self.grid.interpolate(density, np.asarray(as_numpy(as_points(x, self.grid.dim))), 2))


def arrival(problem: ControlProblem, x: Any, *, grid: Grid | int, steps: int) -> Arrival:
    r"""Law of the process of a policy that starts at a point, until it is stopped in a target.

    .. math::
        \partial_t p = -\nabla\cdot(b\,p) + \tfrac12\nabla\nabla:(\Sigma\,p), \quad p(0) = \delta_x, \quad
        p = 0 \text{ on targets}, \qquad \text{reached}_k(t) = P(\tau \le t,\ X_\tau \in A_k)

    by the transpose of the steps of the value: what is under way and what has arrived add up to one.

    Parameters
    ----------
    problem : ControlProblem
        With targets, a horizon and nothing to choose: ``cp.under(policy)``.
    x : array_like, shape (d,)
        Where it starts.
    grid : Grid or int
        The nodes, such as ``opt.grid``; their number per axis where the box is finite.
    steps : int
        Time steps.

    Returns
    -------
    Arrival

    Raises
    ------
    InputError
        Without targets or horizon, where there is something to choose, or for a point in a target.

    Examples
    --------
    Brownian motion from 0 reaches ±1 by time 1 with probability 0.6292 (Feller 1971, X.5):

    >>> import kolmo
    >>> from kolmo import control
    >>> cp = control.ControlProblem(lambda t, x, a: 0 * x, 1.0, controls=control.Finite([[0.0]]), horizon=1.0,
    ...     terminal=lambda x: 0 * x[..., 0], box=kolmo.Box(-1.5, 1.5),
    ...     targets=control.Target(lambda x: 1 - x[..., 0].abs(), 1.0))
    >>> law = control.arrival(cp, [0.0], grid=121, steps=40)
    >>> law.reached[-1].round(3).tolist(), float(law.mass[-1].round(3))
    ([0.629], 0.371)
    """
    if problem.horizon is None or not problem.targets or len(problem.controls.samples) != 1:
        raise InputError(
            "problem",
            problem,
            "targets, a horizon and nothing to choose",
            "cp.under(policy); for a stationary one control.solve_hjb(cp.under(policy).reaching())",
        )
    box: Any = problem.box
    nodes = grid if isinstance(grid, Grid) else Grid.of(box, [grid] * problem.dim)
    start = np.asarray(as_numpy(as_points(x, problem.dim, "x")), dtype=float).reshape(-1, problem.dim)
    if len(start) != 1 or any(target.inside(start).any() for target in problem.targets):
        raise InputError("x", start.tolist(), "one point outside the targets")
    return _Transposed(problem, nodes).march(start, steps)


class _Transposed:
    """The steps of a linear problem with targets, transposed."""

    def __init__(self, problem: ControlProblem, grid: Grid) -> None:
        self.parts = [Bellman(problem.reaching(k), grid, SMOOTH) for k in range(len(problem.targets))]
        self.first, self.grid, self.horizon = self.parts[0], grid, float(problem.horizon or 0.0)
        self.act = self.first.start()

    def march(self, start: np.ndarray, steps: int) -> Arrival:
        """Masses and arrivals from a point (1, d)."""
        index, weight = self.grid.interpolation(start, WIDTH)
        whole = np.bincount(np.ravel(index), np.ravel(weight), self.grid.size)
        # nodes in targets are linear in those outside and in what is paid
        held: Any = self.first.held
        masses = [self._free(whole + held.filled.T @ whole)]
        reached = [np.array([float(whole @ part.boundary(0.0)[:, 0]) for part in self.parts])]
        times = self.horizon * np.linspace(0.0, 1.0, steps + 1) ** CROWDING
        for a, b in pairwise(times):
            mass, arrived = self._step(masses[-1], float(a), float(b))
            masses.append(mass)
            reached.append(reached[-1] + arrived)
        return Arrival(self.grid, times, np.stack(masses).reshape(-1, *self.grid.shape), np.stack(reached))

    def _free(self, p: np.ndarray) -> np.ndarray:
        return np.asarray(self.first.free(p[:, None])[:, 0])

    def _step(self, p: np.ndarray, a: float, b: float) -> tuple[np.ndarray, np.ndarray]:
        """Masses at b from those at a, and what has arrived in between."""
        table, dt = tableau(STAGES), b - a
        found = [[part.assemble(b - float(c) * dt, self.act) for c in table.c] for part in self.parts]
        # all parts have the same matrices, and loads of their own
        back, shares = CoupledStep(table, [operator for operator, _, _ in found[0]], dt).apply_transposed(p[:, None])
        arrived = [
            sum(float((share * self.first.free(load)).sum()) for share, (_, load, _) in zip(shares, part, strict=True))
            for part in found
        ]
        return self._free(back[:, 0]), np.array(arrived)
