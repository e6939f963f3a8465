"""Fokker–Planck: how an initial law spreads, as the exact transpose of the steps that ``solve`` takes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.polynomial import legendre

from kolmo.arrays import Array, as_numpy, as_points
from kolmo.box import Absorbing, Entrance, Reflecting, Robin
from kolmo.discretization import Discretization
from kolmo.errors import InputError, NotConvergedError
from kolmo.grid import Axis, Grid
from kolmo.kernels.linear import factorize
from kolmo.limits import part_of
from kolmo.march import March
from kolmo.problem import KolmogorovProblem
from kolmo.refine.plan import plan, prescribe
from kolmo.schemes.base import FaceData
from kolmo.schemes.faces import held
from kolmo.schemes.generator import Generator, discretize
from kolmo.schemes.local import Local, wall_nodes
from kolmo.times import find, missing

Exit = tuple[int, int] | str
"""A way out: (axis, side) of an absorbing or elastic face, or "killing"."""

# Within this many nodes of a wall the weights of high-order one-sided stencils are no point values of a density; there
# it is read off as a polynomial of this degree that has the right moments (see ``_reading``).
WALL_NODES, WALL_DEGREE = 24, 4
# Of many samples, this many are used to plan the grid.
PLANNING_POINTS = 200


@dataclass(frozen=True, eq=False)
class Density:
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

    @property
    def exits(self) -> tuple[Exit, ...]:
        """The ways out: (axis, side) of absorbing and elastic faces, and "killing"."""
        return tuple(self._flux)

    @cached_property
    def values(self) -> np.ndarray:
        """Density ρ at the nodes and ``times``, shape ``(nt, *grid.shape)``."""
        rho = self.weights.reshape(len(self.times), *self.grid.shape)
        for i, matrix in enumerate(self._readings):
            moved = np.moveaxis(rho, i + 1, 0)
            read = (matrix @ moved.reshape(moved.shape[0], -1)).reshape(moved.shape)
            rho = np.moveaxis(read, 0, i + 1)
        return np.ascontiguousarray(rho)

    def __call__(self, x: Any, t: float | None = None) -> np.ndarray:
        """Density ρ(t, x) at points (..., d), interpolated; t a kept time (None: the last one)."""
        rho = self.values[self._kept(t)].reshape(self.grid.size)
        return np.asarray(self.grid.interpolate(rho, as_numpy(as_points(x, self.grid.dim)), self.discretization.width))

    def expectation(self, function: Callable[[np.ndarray], Any], t: float | None = None) -> Any:
        """E[f(X_t); still inside] for ``function(x)`` of points (..., d), shape () or (k,)."""
        values = np.asarray(function(self.grid.points), dtype=float)
        return np.tensordot(self.weights[self._kept(t)], values, 1)

    def exit_flux(self, face: Any) -> np.ndarray:
        """Probability per time that goes out through a face, at ``clock``: a first-passage density if it absorbs.

        Parameters
        ----------
        face : (axis, side), side, or "killing"
            Side 0 or "low", 1 or "high"; the axis may be left out in one dimension.
        """
        return self._flux[self._exit(face)]

    def exited(self, face: Any) -> np.ndarray:
        """Probability that has gone out through a face (or by killing) so far, at ``clock``."""
        return self._exited[self._exit(face)]

    def plot(self, ax: Any = None, t: float | None = None, **style: Any) -> Any:
        """Plot ρ(t, ·): a line in one dimension, filled contours in two, the marginal of the first two in three.

        Returns
        -------
        matplotlib.axes.Axes
        """
        import matplotlib.pyplot as plt

        ax = plt.subplots(layout="constrained")[1] if ax is None else ax
        which = self._kept(t)
        rho, label = self.values[which], rf"$\rho({self.times[which]:g}, x)$"
        if self.grid.dim == 1:
            ax.plot(self.grid.nodes[0], rho, **style)
            ax.set(xlabel="$x$", ylabel=label)
            return ax
        if self.grid.dim == 3:
            rho = np.tensordot(rho, self.grid.axes[2].lengths, 1)
        filled = ax.contourf(*self.grid.nodes[:2], rho.T, **({"levels": 20, "cmap": "cividis"} | style))
        ax.figure.colorbar(filled, ax=ax, label=label)
        ax.set(xlabel="$x_1$", ylabel="$x_2$", aspect="equal")
        return ax

    def _kept(self, t: float | None) -> int:
        near = find(self.times, self.times[-1] if t is None else t)
        if near is None:
            raise InputError("t", t, f"one of the kept times {self.times.tolist()}", f"solve_forward(..., save=[{t}])")
        return near

    def _exit(self, face: Any) -> Exit:
        key = (0, face) if face in (0, 1, "low", "high") and self.grid.dim == 1 else face
        if isinstance(key, tuple) and len(key) == 2:
            key = (key[0], {"low": 0, "high": 1}.get(key[1], key[1]))
        if key not in self._flux:
            raise InputError("face", face, "one of " + (", ".join(map(str, self._flux)) or "none: nothing goes out"))
        return key

    def __repr__(self) -> str:
        return f"Density(mass={self.mass[-1]:.6g}, {self.grid!r}, {len(self.times)} times)"


def solve_forward(
    problem: KolmogorovProblem,
    initial: Any,
    *,
    discretization: Discretization | None = None,
    at: Any = None,
    rtol: float = 1e-3,
    atol: float = 1e-6,
    grid: Grid | int | Sequence[int] | None = None,
    steps: int | None = None,
    scheme: str = "auto",
    stepper: str = "auto",
    save: Sequence[float] | None = None,
    max_seconds: float | None = None,
    max_cells: int | None = None,
) -> Density:
    r"""Solve the Fokker–Planck equation, the adjoint of the backward equation, for an initial law.

    .. math::
        \partial_t\rho = -\nabla\cdot(b\rho) + \tfrac12\nabla^2:(\Sigma\rho) - c\,\rho

    with absorbing faces where u is prescribed, elastic ones where it is elastic, and no flux at reflecting walls. Each
    step is the transpose of the step that ``solve`` takes, so that expectations found forwards and backwards agree to
    rounding, and probability that does not leave is conserved.

    Parameters
    ----------
    problem : KolmogorovProblem
        The process, its faces and killing, and the horizon; terminal data and source only enter ``Density.value``.
    initial : callable or array_like
        Density ``initial(x)`` -> ``(...)``; or samples of shape (n, d), each of mass 1/n; or one point (d,).
    discretization : Discretization, optional
        A recipe from ``plan`` or from a solution.
    at : array_like, shape (..., d), optional
        Points from which the grid is planned by tolerance. None: the samples, or the core of the (finite) box.
    rtol, atol : float
        Tolerance for ``value`` when planning.
    grid, steps, scheme, stepper
        Fixed discretisation, as in ``solve``.
    save : sequence of float, optional
        Times at which the law is kept besides the horizon.
    max_seconds, max_cells : optional
        Time for all, and largest grid, when planning by tolerance; defaults as in ``solve``.

    Returns
    -------
    Density

    Raises
    ------
    InputError
        For bad input; the message names the argument.

    Notes
    -----
    Moments, masses and fluxes have the order of the scheme. Point values of the density do too away from walls; within
    a few nodes of a reflecting, elastic or absorbing face they are read off moments and are less accurate (about 1e-3).

    Examples
    --------
    >>> import numpy as np, kolmo
    >>> ou = kolmo.SDE(lambda t, x: -x, diffusion=1.0, dim=1)
    >>> problem = kolmo.KolmogorovProblem(ou, lambda x: x[..., 0] ** 2, 1.0)
    >>> from kolmo.forward import solve_forward
    >>> density = solve_forward(problem, [0.5], rtol=1e-6)
    >>> variance = 0.5 * (1 - np.exp(-2.0))
    >>> bool(abs(density(0.0) - np.exp(-0.125 * np.exp(-2) / variance) / np.sqrt(2 * np.pi * variance)) < 1e-5)
    True
    >>> round(float(density.mass[-1]), 9)
    1.0
    """
    if problem.horizon is None:
        raise InputError("problem", "a stationary problem", "a horizon", "stationary_density(problem) has none")
    kept = tuple(sorted({float(t) for t in ([] if save is None else save)} | {problem.horizon}))
    if kept[0] < 0 or kept[-1] > problem.horizon:
        raise InputError("save", kept, f"times between 0 and {problem.horizon}")
    if discretization is not None and (grid is not None or steps is not None):
        raise InputError("discretization, grid, steps", "several", "either discretization= or grid= with steps=")
    points = (
        None if callable(initial) else as_numpy(as_points(initial, problem.dim, "initial")).reshape(-1, problem.dim)
    )
    if points is not None and len(points) == 0:
        raise InputError("initial", "no samples", "a density function, at least one sample, or a point")
    if grid is not None:
        discretization = prescribe(problem, grid, steps, scheme, stepper, kept, None)
    if discretization is None:
        where = at if at is not None or points is None else points[:: max(1, len(points) // PLANNING_POINTS)]
        seconds = part_of(max_seconds)
        discretization = plan(problem, at=where, rtol=rtol, atol=atol, max_cells=max_cells, max_seconds=seconds)
    return _Forward(problem, discretization, kept).run(initial if points is None else points)


class _Forward:
    """One transposed march with its book-keeping of what leaves."""

    def __init__(self, problem: KolmogorovProblem, recipe: Discretization, kept: tuple[float, ...]) -> None:
        self.problem, self.recipe, self.kept = problem, recipe, kept
        self.march = recipe.march(problem)
        self.clock = np.asarray(recipe.times)
        absent = missing(self.clock, kept)
        if absent:
            raise InputError("save", absent, "time nodes of the discretization", "use grid= and steps= with save=")
        self.keeping = {find(self.clock, t) for t in kept}
        self.exits = WaysOut(self.march)
        self.saved: list[tuple[float, np.ndarray]] = []
        self.mass: list[float] = []
        self.flux: dict[Exit, list[float]] = {e: [] for e in self.exits.names}
        self.exited: dict[Exit, list[float]] = {e: [0.0] for e in self.exits.names}

    def run(self, initial: Any) -> Density:
        """Spread the initial law and read everything off on the way."""
        march = self.march
        steps = list(reversed(march.plans))
        start = initial_masses(initial, self.recipe)
        value = (start * march.boundary(0.0)).sum(0)
        for e, owned in self.exits.owned.items():
            self.exited[e][0] = float(start[:, 0] @ owned)
        self._watch(march.without_boundary(start), steps[0].instants[-1])

        def observe(t: float, p: Array, adjoints: list[Array]) -> None:
            nonlocal value
            done = len(self.mass)
            gone = dict.fromkeys(self.exits.names, 0.0)
            for instant, a in zip(steps[done - 1].instants, adjoints, strict=True):
                a = march.without_boundary(a)
                value = value + (a * march.ingredients(instant)[2]).sum(0)
                for e, unit in self.exits.unit_loads(instant).items():
                    gone[e] += float(a[:, 0] @ unit)
            for e, amount in gone.items():
                self.exited[e].append(self.exited[e][-1] + amount)
            # at the end of a step the coefficients are those of the next one, [t_k, t_{k+1})
            last = steps[-1].instants[0] if march.generator.autonomous else t
            self._watch(p, steps[done].instants[-1] if done < len(steps) else last)

        p = march.forward(start, observe=observe)
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

    def _watch(self, p: Array, instant: float) -> None:
        """Note what there is to see at the time node that was reached."""
        t = float(self.clock[len(self.mass)])
        self.mass.append(float(p.sum()))
        for e, unit in self.exits.unit_loads(instant).items():
            self.flux[e].append(float(p[:, 0] @ unit))
        if len(self.mass) - 1 in self.keeping:
            self.saved.append((t, np.array(p[:, 0])))


class WaysOut:
    """Where probability leaves: absorbing and elastic faces and killing.

    u = 1 solves the equation when every face value and the source are those of a sure reward of one on leaving. Split
    by way out, these loads measure what leaves where: the rate is their product with the masses.

    Parameters
    ----------
    march : March
        The march whose masses are watched.
    """

    def __init__(self, march: March) -> None:
        self.march, generator = march, march.generator
        self.faces = {
            (i, s): face
            for i, pair in enumerate(generator.box.faces)
            for s, face in enumerate(pair)
            if isinstance(face, (Absorbing, Robin))
        }
        self.names: tuple[Exit, ...] = (*self.faces, *(() if generator.problem.killing is None else ("killing",)))
        self.owned = self._owned()
        self._loads: dict[float, dict[Exit, np.ndarray]] = {}

    def _owned(self) -> dict[Exit, np.ndarray]:
        """Absorbing nodes per face, as 0 and 1; shared ones belong to the later axis, as their values do."""
        owned: dict[Exit, np.ndarray] = {}
        for key, face in self.faces.items():
            if isinstance(face, Absorbing):
                mine = held(self.march.generator.grid, *key, face).astype(float)
                owned = {k: v * (1.0 - mine) for k, v in owned.items()} | {key: mine}
        return owned

    def unit_loads(self, instant: float) -> dict[Exit, np.ndarray]:
        """Per way out, the load (size,) of a reward of one paid there."""
        if instant not in self._loads:
            if not self.march.generator.autonomous:
                self._loads.clear()
            self._loads[instant] = self._make(instant)
        return self._loads[instant]

    def _make(self, instant: float) -> dict[Exit, np.ndarray]:
        if not self.names:
            return {}
        generator = self.march.generator
        semi = self.march.ingredients(instant)[0]
        free = (~generator.fixed).astype(float)
        loads: dict[Exit, np.ndarray] = {
            key: semi.stencil.apply(semi.a, mine[:, None])[:, 0] * free for key, mine in self.owned.items()
        }
        elastic = {key: face for key, face in self.faces.items() if isinstance(face, Robin)}
        if elastic:
            loads |= self._elastic(instant, elastic, semi)
        if "killing" in self.names:
            loads["killing"] = free * as_numpy(generator.problem.rate(instant, generator.places()))
        return {name: loads[name] for name in self.names}

    def _elastic(self, instant: float, faces: dict[tuple[int, int], Robin], semi: Any) -> dict[Exit, np.ndarray]:
        """Loads of elastic faces whose value is their rate κ."""
        generator = self.march.generator
        problem, grid, x = generator.problem, generator.grid, generator.grid.points
        local = generator.local(instant)
        local = Local(local.A, local.S, local.c, np.zeros((grid.size, 1)))
        kappa = {k: as_numpy(problem.on_face(f.kappa, instant, x[wall_nodes(grid, *k)])) for k, f in faces.items()}
        loads: dict[Exit, np.ndarray] = {}
        for paying in faces:
            data = {k: (v, (v if k == paying else 0.0 * v)[:, None]) for k, v in kappa.items()}
            loads[paying] = generator.scheme.assemble(semi.stencil, local, FaceData(data), generator.metric).load[:, 0]
        return loads


def initial_masses(initial: Any, recipe: Discretization) -> np.ndarray:
    """Masses at the nodes, shape (size, 1), of a density function or of points with equal masses."""
    grid = recipe.grid
    if not callable(initial):
        weights = grid.interpolation_matrix(initial, recipe.width)
        return np.asarray(weights.mean(0)).reshape(-1, 1)
    rho = np.asarray(initial(grid.points), dtype=float)
    rho = rho[:, 0] if rho.shape == (grid.size, 1) else rho
    if rho.shape != (grid.size,):
        raise InputError("initial", f"a result of shape {rho.shape}", f"shape {(grid.size,)}, one number per point")
    if not np.isfinite(rho).all() or (rho < -1e-12 * np.abs(rho).max()).any():
        raise InputError("initial", "a density with negative or infinite values", "non-negative finite values")
    return np.asarray(rho * grid.product([quadrature(axis) for axis in grid.axes]))[:, None]


def quadrature(axis: Axis) -> np.ndarray:
    """Weights (n,) of a quadrature at the nodes: the trapezoidal rule in ξ with ends corrected to order 6 (Gregory).

    Examples
    --------
    >>> from kolmo.grading import Uniform
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
    return tuple(
        _reading(
            axis, [isinstance(f, (Reflecting, Robin, Entrance)) for f in pair], [isinstance(f, Absorbing) for f in pair]
        )
        for axis, pair in zip(generator.grid.axes, generator.box.faces, strict=True)
    )


def _reading(axis: Axis, wall: list[bool], absorbing: list[bool]) -> sp.csr_matrix:
    r"""Masses over lengths inside; near a face the polynomial with the same moments.

    The masses are dual to smooth functions, and near a face only their sums against such functions mean anything. The
    test functions are even (at walls, where u' = 0) or odd (at absorbing faces, where u = 0) in the distance, and
    vanish smoothly where the masses can be read directly.
    """
    matrix = sp.lil_matrix(sp.diags(1.0 / (axis.grading.slope(axis.xi) * axis.h)))
    M = min(WALL_NODES, (axis.n - 1) // 2)
    if axis.periodic or M < WALL_DEGREE + 2:
        return sp.csr_matrix(matrix)
    s = np.arange(M + 1) / M
    for side in (0, 1):
        if not (wall[side] or absorbing[side]):
            continue
        fit = _wall_fit(s, odd=absorbing[side])
        columns = np.arange(M + 1) if side == 0 else axis.n - 1 - np.arange(M + 1)
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


def stationary_density(
    problem: KolmogorovProblem,
    *,
    discretization: Discretization | None = None,
    at: Any = None,
    rtol: float = 1e-3,
    atol: float = 1e-6,
    grid: Grid | int | Sequence[int] | None = None,
    scheme: str = "auto",
) -> Density:
    r"""Invariant law of a process that nothing leaves: :math:`Q^T p = 0`, :math:`\sum_i p_i = 1`.

    Parameters
    ----------
    problem : KolmogorovProblem
        The process; coefficients that do not depend on time, no absorbing or elastic face, no killing.
    discretization, at, rtol, atol
        Where the grid comes from, as in ``solve``.
    grid, scheme
        Fixed grid, as in ``solve``.

    Returns
    -------
    Density
        With one time, infinity.

    Raises
    ------
    InputError
        If something leaves, or coefficients depend on time.
    NotConvergedError
        If no invariant law was found.

    Examples
    --------
    >>> import numpy as np, kolmo
    >>> ou = kolmo.SDE(lambda t, x: -x, diffusion=1.0, dim=1)
    >>> problem = kolmo.KolmogorovProblem(ou, lambda x: x[..., 0], 1.0, kolmo.Box(-5.0, 5.0, "reflecting"))
    >>> density = stationary_density(problem, grid=101)
    >>> bool(abs(density(0.0) - 1.0 / np.sqrt(np.pi)) < 1e-6)
    True
    """
    if grid is None:
        discretization = discretization or plan(problem, at=at, rtol=rtol, atol=atol)
        grid, scheme = discretization.grid, discretization.scheme
    generator = discretize(problem, grid, scheme)
    if not generator.autonomous or problem.sde.breakpoints:
        raise InputError("problem", "coefficients that depend on time", "constant ones")
    Q = generator.matrix(0.0)
    size = np.abs(Q).max()
    if generator.fixed.any() or np.abs(np.asarray(Q.sum(1))).max() > 1e-9 * size:
        raise InputError("problem", "an absorbing or elastic face, or killing", "a process that nothing leaves")
    p = _null_vector(Q, generator)
    recipe = Discretization(generator.grid, (), generator.scheme.name, "radau5", None)
    nothing = np.array([1.0])
    return Density(
        p[None, :], np.array([np.inf]), np.array([np.inf]), nothing, float("nan"), generator.grid, recipe, {}, {},
        readings(generator),
    )  # fmt: skip


def _null_vector(Q: sp.csr_matrix, generator: Generator) -> np.ndarray:
    """Left null vector of Q by inverse iteration from the uniform law."""
    pace = float(np.max(np.einsum("nii->ni", generator.sample.S) / np.array(generator.grid.shape) ** 2))
    pace = max(pace, float(np.max(np.abs(generator.sample.A) / np.array(generator.grid.shape))))
    factors = factorize(Q - 1e-7 * pace * sp.identity(Q.shape[0]))
    p = np.asarray(generator.volumes / generator.volumes.sum())[:, None]
    for _ in range(4):
        p = factors.solve(p, transposed=True)
        p = p / p.sum()
    residual = float(np.abs(Q.T @ p).max() / np.abs(Q).max())
    if not np.isfinite(p).all() or residual > 1e-8:
        raise NotConvergedError(f"no invariant law found: residual {residual:.1e}")
    return p[:, 0]
