"""The law of the process over time, and the one march that finds it: transposed steps, and what leaves on the way."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.polynomial import legendre

from kolmo.arrays import Array, added_at, along, as_like, as_numpy, as_points, zeros
from kolmo.discretization import Discretization
from kolmo.errors import InputError
from kolmo.forward.exits import Exit, Passages, WaysOut
from kolmo.grid import Axis, Grid
from kolmo.grid.picture import drawn, filmed
from kolmo.grid.times import find, missing
from kolmo.limits import OutOfTimeError
from kolmo.problem import KolmogorovProblem
from kolmo.problem.box import Box
from kolmo.problem.faces import Face
from kolmo.problem.motion import Motion, moved_nodes
from kolmo.problem.sde import SDE
from kolmo.schemes.base import SCHEMES
from kolmo.schemes.crossing import Crossing
from kolmo.schemes.generator import Generator
from kolmo.schemes.terminal import plan_terminal
from kolmo.shown import Shown

# Within this many nodes of a wall the weights of high-order one-sided stencils are no point values of a density; there
# it is read off as a polynomial of this degree that has the right moments (see ``_reading``).
WALL_NODES, WALL_DEGREE = 24, 4
# The same with fewer nodes: another reading, to see how far one can be trusted.
OTHER_WALL_NODES = 18


@dataclass(frozen=True, eq=False)
class Density(Shown, Passages):
    r"""Law of the process over time: masses at the nodes, what is left and what has gone out where.

    Attributes
    ----------
    weights : ndarray, shape (nt, size)
        Masses p at the nodes at ``times``: :math:`E f(X_t) = \sum_i p_i f(x_i)`, to the accuracy of the scheme.
    times : ndarray, shape (nt,)
        Times at which the law was kept, increasing; the horizon is the last.
    clock : ndarray, shape (steps + 1,)
        All time nodes, for ``mass``, ``exit_flux`` and ``exited``.
    mass : ndarray, shape (steps + 1,)
        Probability that is still inside, at ``clock``.
    value : float or ndarray, shape (k,)
        :math:`\int u(0, x)\rho_0(x)\,dx` found forwards, terminal data, source and face values included: what ``solve``
        finds backwards, to rounding.
    grid : Grid
        The nodes.
    discretization : Discretization
        The recipe used.
    error_estimate : dict or None
        By tolerance: "density" and "flux", the largest error that is to be expected of what was asked for (without
        points: of the whole law, :math:`\int|\rho - \rho_h|\,dx`), and "value". A given discretisation has none.
    status : str
        "converged", "tolerance_not_met", "interrupted", or "fixed" for a given discretisation.
    message : str
        Why, and by how much the density or a flux is negative, where one is.
    stats : dict
        Cells, steps, levels, seconds.
    motion : Motion or None
        Of faces that move: where the nodes are at other times than t = 0, see ``nodes``.

    References
    ----------
    H. Risken (1989), The Fokker–Planck Equation, second edition.

    Examples
    --------
    >>> import kolmo
    >>> bm = kolmo.SDE(0.0, diffusion=1.0, dim=1)
    >>> box = kolmo.Box(-6.0, 1.0, [("open", "absorbing")])
    >>> problem = kolmo.KolmogorovProblem(bm, lambda x: 0 * x[..., 0], 1.0, box)
    >>> density = kolmo.solve_forward(problem, [0.0], grid=121, steps=40)
    >>> round(float(density.exited("high")[-1]), 3)  # 2 P(W_1 > 1)
    0.317
    """

    weights: np.ndarray
    times: np.ndarray
    clock: np.ndarray
    mass: np.ndarray
    value: float | np.ndarray
    grid: Grid
    discretization: Discretization
    _flux: dict[Exit, np.ndarray]
    _exited: dict[Exit, np.ndarray]
    _readings: tuple[sp.csr_matrix, ...]
    error_estimate: dict[str, float] | None = None
    status: str = "fixed"
    message: str = "solved as given"
    stats: dict[str, Any] = field(default_factory=dict)
    _flux_errors: dict[Exit, float] = field(default_factory=dict)
    motion: Motion | None = None

    def nodes(self, t: float | None = None) -> tuple[np.ndarray, ...]:
        """Nodes of each axis at a kept time (None: the last one): those of the grid, unless faces move."""
        return moved_nodes(self.grid.nodes, self.motion, float(self.times[self._kept(t)]))

    @cached_property
    def values(self) -> np.ndarray:
        """Density ρ at the nodes and ``times``, shape ``(nt, *grid.shape)``."""
        rho = self.weights.reshape(len(self.times), *self.grid.shape)
        for i, matrix in enumerate(self._readings):
            rho = along(matrix.__matmul__, rho, i + 1)
        if self.motion is not None:
            volumes = np.array([self.motion.stretch(float(t), rho) for t in self.times])
            rho = rho / volumes.reshape(-1, *[1] * self.grid.dim)
        return np.ascontiguousarray(rho)

    def __call__(self, x: Any, t: float | None = None) -> np.ndarray:
        """Density ρ(t, x) at points (..., d), interpolated; t a kept time (None: the last one)."""
        which, points = self._kept(t), as_numpy(as_points(x, self.grid.dim))
        rho = self.values[which].reshape(self.grid.size)
        if self.motion is not None:
            points = self.motion.inwards(float(self.times[which]), points)
        return np.asarray(self.grid.interpolate(rho, points, self.discretization.width))

    def expectation(self, function: Callable[[np.ndarray], Any], t: float | None = None) -> Any:
        """E[f(X_t); still inside] for ``function(x)`` of points (..., d), shape () or (k,)."""
        which, points = self._kept(t), self.grid.points
        if self.motion is not None:
            points = self.motion.outwards(float(self.times[which]), points)
        return np.tensordot(self.weights[which], np.asarray(function(points), dtype=float), 1)

    def flux_error(self, face: Any) -> float:
        """Estimated largest error of the flux through one way out; NaN for a given discretisation."""
        return self._flux_errors.get(self._exit(face), np.nan)

    def exited(self, face: Any) -> np.ndarray:
        """Probability that has gone out through a face (or by killing) so far, at ``clock``."""
        return self._exited[self._exit(face)]

    def plot(self, ax: Any = None, t: float | None = None, **style: Any) -> Any:
        """Plot ρ(t, ·): a line in one dimension, filled contours in two, the marginal of the first two in three.

        Returns
        -------
        matplotlib.axes.Axes
        """
        label = rf"$\rho({self.times[self._kept(t)]:g}, x)$"
        return drawn(ax, self.nodes(t), self._drawn(t), label, style)

    def animate(self, ax: Any = None, **style: Any) -> Any:
        """ρ(t, ·) over the kept times, on one scale: a line in one dimension, filled contours beyond.

        In three dimensions the marginal of the first two is shown.

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
            Where fewer than two times were kept: ``solve_forward(..., save=times)``.

        Examples
        --------
        >>> import kolmo, numpy as np
        >>> bm = kolmo.SDE(0.0, diffusion=1.0, dim=1)
        >>> problem = kolmo.KolmogorovProblem(bm, lambda x: x[..., 0], 1.0, kolmo.Box(-1.0, 1.0, "reflecting"))
        >>> law = kolmo.solve_forward(problem, [0.2], grid=41, steps=20, save=np.linspace(0.1, 1.0, 4))
        >>> law.animate().save("law.gif")  # doctest: +SKIP
        """
        return filmed(ax, self.times.tolist(), lambda t: (self.nodes(t), self._drawn(t)), r"$\rho(t, x)$", style)

    def _drawn(self, t: float | None) -> np.ndarray:
        """What is drawn of the density at a kept time: of three dimensions the marginal of two."""
        which = self._kept(t)
        rho = self.values[which]
        if self.grid.dim == 3:
            stretch = 1.0 if self.motion is None else self.motion.width(float(self.times[which]), rho)[2]
            rho = np.tensordot(rho, self.grid.axes[2].lengths * stretch, 1)
        return np.asarray(rho)

    def __repr__(self) -> str:
        told = [f"{name} ± {error:.1e}" for name, error in (self.error_estimate or {}).items()]
        parts = [f"mass={self.mass[-1]:.6g}", repr(self.grid), f"{len(self.times)} times", self.status, *told]
        return "Density(" + ", ".join(parts) + ")"


class Spreading:
    """One transposed march with its book-keeping of what leaves.

    Parameters
    ----------
    problem : KolmogorovProblem
        The process.
    recipe : Discretization
        How.
    kept : tuple of float
        Times at which the law is kept; they have to be time nodes.
    stop : callable, optional
        Asked after each step: whether the march is given up.
    """

    def __init__(
        self,
        problem: KolmogorovProblem,
        recipe: Discretization,
        kept: tuple[float, ...],
        stop: Callable[[], bool] | None = None,
    ) -> None:
        self.problem, self.recipe, self.kept = problem, recipe, kept
        self.march = recipe.march(problem)
        self.clock = np.asarray(recipe.times)
        absent = missing(self.clock, kept)
        if absent:
            raise InputError("save", absent, "time nodes of the discretization", "use grid= and steps= with save=")
        self.exits = WaysOut(self.march.generator)
        self._stop = stop
        self.saved: list[tuple[float, np.ndarray]] = []
        self.mass: list[float] = []
        self.flux: dict[Exit, list[float]] = {e: [] for e in self.exits.names}
        self.exited: dict[Exit, list[float]] = {e: [0.0] for e in self.exits.names}
        self._kept = {find(self.clock, t) for t in kept}
        self._loads: dict[float, np.ndarray] = {}

    def run(self, initial: Any) -> Density:
        """Spread the initial law and read everything off on the way."""
        march = self.march
        steps = list(reversed(march.plans))
        start = initial_masses(initial, self.recipe, march.generator.box)
        value = (start * march.boundary(0.0)).sum(0)
        for e, owned in self.exits.owned.items():
            self.exited[e][0] = float(start[:, 0] @ owned)
        self._watch(march.without_boundary(start), steps[0].instants[-1])

        moved: dict[Exit, float] = {}  # what an event has moved onto faces

        def observe(t: float, p: Array, adjoints: list[Array]) -> None:
            nonlocal value
            if self._stop is not None and self._stop():
                raise OutOfTimeError
            done = len(self.mass)
            at: dict[float, Array] = {}
            for instant, a in zip(steps[done - 1].instants, adjoints, strict=True):
                at[instant] = at[instant] + a if instant in at else a
            gone = np.zeros(len(self.exits.names))
            for instant, a in at.items():
                a = march.without_boundary(a)
                value = value + (a * march.ingredients(instant)[2]).sum(0)
                gone += self._unit_loads(instant) @ a[:, 0]
            for e, amount in zip(self.exits.names, gone.tolist(), strict=True):
                self.exited[e].append(self.exited[e][-1] + amount + moved.pop(e, 0.0))
            # at the end of a step the coefficients are those of the next one, [t_k, t_{k+1})
            last = steps[-1].instants[0] if march.generator.autonomous else t
            self._watch(p, steps[done].instants[-1] if done < len(steps) else last)

        def arrive(t: float, before: Array, after: Array, crossing: Crossing) -> None:
            nonlocal value
            value = value + (after * march.boundary(t)).sum(0)
            if crossing.paid is not None:
                value = value + (before * crossing.paid).sum(0)
            moved.update({e: float(after[:, 0] @ owned) for e, owned in self.exits.owned.items()})

        p = march.forward(start, observe=observe, arrive=arrive)
        value = value + (p * march.without_boundary(self.recipe.initial(march))).sum(0)
        return Density(
            np.array([w for _, w in self.saved]),
            np.array([t for t, _ in self.saved]),
            self.clock,
            np.array(self.mass),
            float(value[0]) if march.generator.columns is None else value,
            self.recipe.grid,
            self.recipe,
            {e: np.array(v) for e, v in self.flux.items()},
            {e: np.array(v) for e, v in self.exited.items()},
            readings(march.generator),
        )

    def _unit_loads(self, instant: float) -> np.ndarray:
        """Loads of a sure reward of one at an instant, shape (ways out, size); kept where they come again."""
        if instant not in self._loads:
            if not self.march.generator.autonomous:
                self._loads.clear()
            loads = self.exits.loads(self.march.ingredients(instant)[0], instant)
            self._loads[instant] = np.array([*loads.values()]).reshape(len(loads), self.recipe.grid.size)
        return self._loads[instant]

    def _watch(self, p: Array, instant: float) -> None:
        """Note what there is to see at the time node that was reached."""
        done = len(self.mass)
        self.mass.append(float(p.sum()))
        for e, rate in zip(self.exits.names, (self._unit_loads(instant) @ p[:, 0]).tolist(), strict=True):
            self.flux[e].append(rate)
        if done in self._kept:
            self.saved.append((float(self.clock[done]), np.array(p[:, 0])))


def initial_at_rest(problem: KolmogorovProblem, initial: Any) -> Any:
    """An initial law in coordinates in which faces that move stand still: those of t = 0, unless a grid says more."""
    motion = problem.motion
    if motion is None:
        return initial
    if not callable(initial):
        return motion.inwards(0.0, initial)
    return lambda xi: initial(motion.outwards(0.0, xi)) * motion.stretch(0.0, xi)


def initial_masses(initial: Any, recipe: Discretization, box: Box | None = None, like: Any = None) -> Array:
    """Masses at the nodes, shape (size, 1), of a density function or of points with equal masses.

    Points are spread by the transpose of the interpolation, whose weights are exact for polynomials up to the order of
    the scheme and beyond. A density is integrated against the same functions: by a quadrature at the nodes where it is
    smooth, and where it has kinks or jumps after the kernel that terminal data are smoothed by (the transpose of a
    smoothing is a smoothing).

    Parameters
    ----------
    initial : callable or array
        Density ``initial(x)``, or points (..., d).
    recipe : Discretization
        Grid and order.
    box : Box, optional
        Faces, on the grid's box; None: open ones.
    like : tensor, optional
        Compute in torch, with gradients.
    """
    grid = recipe.grid
    if not callable(initial):
        points = as_points(initial, grid.dim, "initial").reshape(-1, grid.dim)
        if len(points) == 0:
            raise InputError("initial", "no samples", "a density function, at least one sample, or a point")
        return _point_masses(points, recipe)[:, None]
    x = grid.points if like is None else as_like(grid.points, like)
    _check_density(initial(x), grid)
    box = Box(*grid.box) if box is None else box
    stand_in = KolmogorovProblem(SDE(0.0, diffusion=1.0, dim=grid.dim), initial, 1.0, box)
    stand_in = stand_in.handing("numpy" if like is None else "torch")
    rho = plan_terminal(stand_in, grid, box, SCHEMES[recipe.scheme].order).apply(stand_in, x)
    return rho * as_like(grid.product([quadrature(axis) for axis in grid.axes])[:, None], rho)


def _point_masses(points: Array, recipe: Discretization) -> Array:
    """Equal masses at points (n, d), spread over the nodes, shape (size,)."""
    index, weight = recipe.grid.interpolation(points, recipe.width)
    return added_at(zeros((recipe.grid.size,), weight), index.reshape(-1), weight.reshape(-1) / len(points))


def _check_density(values: Any, grid: Grid) -> None:
    """Raise an InputError where a result is not one number per node, none of them negative."""
    shape, rho = tuple(values.shape), as_numpy(values)
    if shape not in ((grid.size,), (grid.size, 1)):
        raise InputError("initial", f"a result of shape {shape}", f"shape {(grid.size,)}, one number per point")
    if not np.isfinite(rho).all() or (rho < -1e-12 * np.abs(rho).max()).any():
        raise InputError("initial", "a density with negative or infinite values", "non-negative finite values")


def quadrature(axis: Axis) -> np.ndarray:
    """Weights (n,) of a quadrature at the nodes: the trapezoidal rule in ξ with ends corrected to order 6 (Gregory).

    Examples
    --------
    >>> from kolmo.grid.grading import Uniform
    >>> axis = Axis(21, Uniform(0.0, 1.0))
    >>> bool(abs(quadrature(axis) @ np.exp(axis.nodes) - (np.e - 1.0)) < 1e-9)
    True
    """
    weights = np.ones(axis.n)
    if not axis.periodic:
        m = min(5, axis.n // 2)
        powers = np.arange(m)
        # Σ i^k over a half line falls short of ∫ z^k dz = 0 (regularised) by ½ − 1 and −ζ(−k): Euler & Maclaurin
        leftover = np.array([-0.5, 1.0 / 12.0, 0.0, -1.0 / 120.0, 0.0])[:m]
        correction = np.linalg.solve(np.arange(m)[None, :] ** powers[:, None].astype(float), leftover)
        weights[:m] += correction
        weights[-m:] += correction[::-1]
    return np.asarray(weights * axis.grading.slope(axis.xi) * axis.h)


def readings(generator: Generator) -> tuple[sp.csr_matrix, ...]:
    """Per axis, the matrix (n, n) that reads point values of a density off the masses at the nodes."""
    return _readings(generator.grid, generator.box, generator.scheme.monotone, WALL_NODES)


def read_again(density: Density, box: Box) -> Density:
    """The same law, its density read off fewer nodes at walls: how far the two differ is how far either is known."""
    monotone = SCHEMES[density.discretization.scheme].monotone
    return replace(density, _readings=_readings(density.grid, box, monotone, OTHER_WALL_NODES))


def _readings(grid: Grid, box: Box, monotone: bool, nodes: int) -> tuple[sp.csr_matrix, ...]:
    if monotone:  # masses of a Markov chain are those of the cells, and not negative
        return tuple(sp.csr_matrix(sp.diags(1.0 / axis.lengths)) for axis in grid.axes)
    return tuple(_reading(axis, pair, nodes) for axis, pair in zip(grid.axes, box.faces, strict=True))


def _reading(axis: Axis, faces: tuple[Face, Face], nodes: int) -> sp.csr_matrix:
    r"""Masses over lengths inside; near a face the polynomial with the same moments.

    The mass at an open end is all that went there; the density there is that of the next node. The masses are dual to
    smooth functions, and near a face only their sums against such functions mean anything. The test functions are even
    (at walls, where u' = 0) or odd (at absorbing faces, where u = 0) in the distance, and vanish smoothly where the
    masses can be read directly.
    """
    matrix = sp.lil_matrix(sp.diags(1.0 / (axis.grading.slope(axis.xi) * axis.h)))
    M = min(nodes, (axis.n - 1) // 2)
    if axis.periodic or M < WALL_DEGREE + 2:
        return sp.csr_matrix(matrix)
    s = np.arange(M + 1) / M
    for side in (0, 1):
        columns = np.arange(M + 1) if side == 0 else axis.n - 1 - np.arange(M + 1)
        if faces[side].cut:
            matrix[columns[0]] = matrix[columns[1]]
        if faces[side].parity == 0:
            continue
        fit = _wall_fit(s, odd=faces[side].parity < 0)
        density = 1.0 / (axis.grading.slope(axis.xi[columns]) * axis.h)
        rows = np.arange(M // 2)
        matrix[np.ix_(columns[rows], columns)] = density[rows, None] * fit[rows]
    return sp.csr_matrix(matrix)


def _wall_fit(s: np.ndarray, *, odd: bool) -> np.ndarray:
    """Matrix (M + 1, M + 1) from masses to masses per node of the polynomial with the same moments."""
    gauss, weights = legendre.leggauss(24)
    gauss, weights = 0.5 * (gauss + 1.0), 0.5 * weights * (len(s) - 1)

    def tests(z: np.ndarray) -> np.ndarray:
        powers = 2 * np.arange(WALL_DEGREE + (0 if odd else 1)) + (1 if odd else 0)
        return np.asarray(z[:, None] ** powers * ((1.0 - z**2) ** 4)[:, None])

    def trials(z: np.ndarray) -> np.ndarray:
        basis = legendre.legvander(2.0 * z - 1.0, WALL_DEGREE - (1 if odd else 0))
        return np.asarray(basis * z[:, None] if odd else basis)

    moments = (tests(gauss) * weights[:, None]).T @ trials(gauss)
    return np.asarray(trials(s) @ np.linalg.solve(moments, tests(s).T))
