"""The optimum of a control problem: value, policy and closed loop, with what was decided to find them."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch

from kolmo.arrays import Array, as_like, as_numpy, as_points, at_home, is_tensor, namespace
from kolmo.control.coefficients import Coefficients
from kolmo.control.problem import ControlProblem
from kolmo.discretization import Discretization
from kolmo.errors import InputError, MissingExtraError
from kolmo.grid import Grid
from kolmo.grid.picture import drawn, filmed
from kolmo.problem import KolmogorovProblem
from kolmo.shown import Shown

# Points at which it is seen whether coefficients are quadratic in the control and constant in time.
LOOKED_AT = 64

# Times kept.
STORED = 129


@dataclass(frozen=True, eq=False)
class ControlSolution(Shown):
    r"""Value function :math:`V(t, x)`, gradient and optimal policy :math:`a(t, x)`.

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
        Derivatives of ``values`` with respect to time, of their shape.
    average : float or None
        Of ergodic problems the cost per unit of time; V is then zero at the first of the points ``at``, and the
        estimate is that of both.

    References
    ----------
    W. H. Fleming and H. M. Soner (2006), Controlled Markov Processes and Viscosity Solutions, second edition.

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
        """V(t, x) at points (..., d): shape (...); in targets what they pay.

        Raises
        ------
        InputError
            For points outside the grid, and times beyond the horizon.
        """
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
        """∇V(t, x), shape (..., d).

        Raises
        ------
        InputError
            For points outside the grid, and times beyond the horizon.
        """
        d, V = self.grid.dim, self._at(self.values, t)
        parts = [self._interpolate(V, x, self.discretization.width, [int(i == j) for j in range(d)]) for i in range(d)]
        return namespace(parts[0]).stack(parts, -1)

    @at_home
    def policy(self, t: float, x: Any) -> Array:
        """Optimal control a(t, x), shape (..., m): the best one for the value, its gradient and its Hessian there.

        Points beyond the grid get the control at its edge, so that paths may leave it. Where the choice makes no
        difference the control is that of the nodes about.
        """
        points = self.grid.clamped(as_points(x, self.grid.dim))
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
        """Value and policy as a table over time and the coordinates (``xarray.Dataset``; needs xarray).

        Raises
        ------
        MissingExtraError
            Without xarray.
        """
        try:
            import xarray
        except ImportError:
            raise MissingExtraError("xarray", "xarray") from None
        names = ["x"] if self.grid.dim == 1 else [f"x{i + 1}" for i in range(self.grid.dim)]
        coordinates = {"t": self.times, **dict(zip(names, self.grid.nodes, strict=True))}
        fields = {"value": (("t", *names), self.values), "policy": (("t", *names, "control"), self.policies)}
        return xarray.Dataset(fields, coordinates, {"status": self.status, "message": self.message})

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

        Raises
        ------
        InputError
            For a time beyond the horizon, and in three dimensions.
        """
        if self.grid.dim > 2:
            raise InputError("grid", f"{self.grid.dim} dimensions", "one or two dimensions to plot")
        V = self._at(self.values, t).reshape(self.grid.shape)
        return drawn(ax, self.grid.nodes, V, f"$V({t:g}, x)$", style)

    def animate(self, ax: Any = None, **style: Any) -> Any:
        """V(t, ·) over the stored times, on one scale: a line in one dimension, filled contours in two.

        Parameters
        ----------
        ax : matplotlib Axes, optional
            Where to draw; None: a new figure.
        **style
            Passed to ``Axes.plot`` or ``Axes.contourf``.

        Returns
        -------
        matplotlib.animation.FuncAnimation
            ``.save("u.gif")`` writes it, ``.to_jshtml()`` shows it in a notebook. Keep it: matplotlib forgets a film
            that nobody holds.

        Raises
        ------
        InputError
            Beyond two dimensions, and for problems that run for ever.

        Examples
        --------
        >>> import kolmo
        >>> from kolmo import control
        >>> problem = control.ControlProblem(lambda t, x, a: a, 1.0, controls=control.Interval(-1.0, 1.0), horizon=1.0,
        ...     terminal=lambda x: x[..., 0] ** 2, box=kolmo.Box(-3.0, 3.0, "reflecting"))
        >>> control.solve_hjb(problem, at=[0.5], rtol=1e-2).animate().save("V.gif")  # doctest: +SKIP
        """
        if self.grid.dim > 2:
            raise InputError("grid", f"{self.grid.dim} dimensions", "one or two dimensions to animate")

        def frame(t: float) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
            return self.grid.nodes, self._at(self.values, t).reshape(self.grid.shape)

        return filmed(ax, self.times.tolist(), frame, "$V(t, x)$", style)

    def __repr__(self) -> str:
        estimate = "" if self.error_estimate is None else f", error≈{float(np.max(self.error_estimate)):.1e}"
        return f"ControlSolution({self.status}{estimate}, {self.grid!r}, {len(self.times)} times)"


class OfSolution(Shown):
    """An answer that is made of a solution, and whose error and status are those of the solution."""

    solution: ControlSolution

    @property
    def error_estimate(self) -> np.ndarray:
        """Estimate of the error at t = 0."""
        assert self.solution.error_estimate is not None
        return self.solution.error_estimate

    @property
    def status(self) -> str:
        """Whether it is "converged" or "tolerance_not_met"."""
        return self.solution.status

    @property
    def message(self) -> str:
        """What happened, in a sentence."""
        return self.solution.message


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
