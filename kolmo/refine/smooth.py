"""A smooth function through the node values of a solution, and what is left of the equation when it is put in."""

from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from kolmo.arrays import Array, as_like, as_numpy
from kolmo.discretization import Discretization
from kolmo.errors import InputError, NotConvergedError
from kolmo.grid import Axis, Grid, grading
from kolmo.kernels import bspline
from kolmo.march import March
from kolmo.problem import KolmogorovProblem
from kolmo.problem.box import Box
from kolmo.problem.events import Event, Payment
from kolmo.problem.faces import Absorbing, FaceValue, Reflecting, Robin
from kolmo.refine.layout import widened
from kolmo.schemes.base import SCHEMES
from kolmo.schemes.generator import Generator
from kolmo.schemes.jumps import landing
from kolmo.schemes.terminal import plan_averages, plan_terminal
from kolmo.stationary import solve_stationary
from kolmo.steppers.base import STEPPERS

if TYPE_CHECKING:
    from scipy.interpolate import BSpline

# Degree in space: second derivatives are those of a C⁴ function, of order 4 where the solution is smooth.
DEGREE = 5
# Nodes that values between them are read from, where a map has corners.
WIDTH = DEGREE + 3
# Degree in time: low, because the solution is rough close to the horizon.
TIME_DEGREE = 3
# By dimension: nodes that an axis has at least; times that open faces are moved out; times at which a solution is kept.
LEAST_NODES, WIDER, TIMES = {1: 120, 2: 60, 3: 24}, {1: 3, 2: 2, 3: 1}, {1: 48, 2: 48, 3: 24}
# Steps of alternating directions in place of implicit ones, whose systems take long beyond one dimension.
SPLIT, WHOLE = "mcs3", ("implicit-euler", "radau3", "radau5")
# Growth over the terminal data and the solution at which steps are taken to be unstable.
RUNAWAY = 1e4
# Numbers kept at most, and times at least where that is many.
NUMBERS, LEAST_TIMES = 20_000_000, 9
# Towards the horizon they crowd as a power of the time that is left, down to a part of the horizon: from a kink or jump
# the solution spreads over the root of that time. By whether φ was smoothed.
POWER, LAST = {False: 2.0, True: 4.0}, {False: 4e-4, True: 1e-6}
# Ratio of the last steps to each other: the square root of two.
RATIO = 0.5**0.5


@dataclass(frozen=True, eq=False)
class Piece:
    """Spline coefficients over a stretch of time without breakpoints, as splines in time (None: no time)."""

    start: float
    stop: float
    values: "BSpline | None"
    rates: "BSpline | None"
    constant: np.ndarray

    def at(self, t: float) -> np.ndarray:
        """Coefficients of the function and of its derivative in time, shape (2k, n0, n1, n2)."""
        if self.values is None or self.rates is None:
            return np.concatenate([self.constant, np.zeros_like(self.constant)])
        t = min(max(t, self.start), self.stop)
        return np.concatenate([self.values(t), self.rates(t)])


class Interpolant:
    r"""A function v(t, x) through node values: C⁴ in space, and C² in time between breakpoints.

    Splines of degree 5 in the coordinates ξ of the grid, in which its nodes are uniform, with not-a-knot ends (periodic
    axes: periodic); cubic splines in time between breakpoints, across which v is continuous. Beyond the grid v goes on
    as a line (along each axis), with continuous slope, so that Itô's formula holds everywhere. Where the map of an axis
    has corners, as at breaks, values are read at the nodes of the map without them: v would have corners too.

    Parameters
    ----------
    grid : Grid
        The nodes.
    times : sequence of float
        Increasing; one: v does not depend on time.
    states : ndarray, shape (nt, size, k)
        Node values.
    breaks : sequence of float
        Those of the times at which the derivative in time may jump; where a time comes twice v jumps, from the first of
        the two states to the second.

    Examples
    --------
    >>> from kolmo.problem.box import Box
    >>> grid = Grid.of(Box(0.0, 1.0), 41)
    >>> v = Interpolant(grid, [0.0], np.exp(grid.points)[None])
    >>> value, rate, image = v.parts(0.0, np.array([[0.33]]), np.ones((1, 1)), np.ones((1, 1, 1)))
    >>> bool(abs(value - np.exp(0.33)) < 1e-9), bool(abs(image - 1.5 * np.exp(0.33)) < 1e-6), float(rate[0, 0])
    (True, True, 0.0)
    """

    def __init__(self, grid: Grid, times: Sequence[float], states: np.ndarray, breaks: Sequence[float] = ()) -> None:
        self.grid, self.columns = Grid([_smoothly_mapped(axis) for axis in grid.axes]), int(states.shape[-1])
        at = np.asarray(times, dtype=float)
        c = np.moveaxis(states.reshape(len(at), *grid.shape, self.columns), -1, 1)
        self._fine = []
        for i, (axis, own) in enumerate(zip(self.grid.axes, grid.axes, strict=True)):
            values = np.ascontiguousarray(np.moveaxis(c, i + 2, 0))
            moved, count = _coefficients(axis, values if axis is own else _at(own, axis.nodes, values))
            self._fine.append(count)
            c = np.moveaxis(moved, 0, i + 2)
        c = np.ascontiguousarray(c).reshape(*c.shape[:2], *[1] * (3 - grid.dim), *c.shape[2:])
        edges = [int(np.argmin(np.abs(at - t))) for t in breaks]
        ends = sorted({0, len(at) - 1, *edges}) if len(at) > 1 else [0, 0]
        twice = {a for a in ends[1:-1] if at[a + 1] == at[a]}
        self.pieces = [_piece(at[a + (a in twice) : b + 1], c[a + (a in twice) : b + 1]) for a, b in pairwise(ends)]
        self._starts = np.array([p.start for p in self.pieces[1:]])
        self._at = lru_cache(maxsize=4)(self._read)

    def _read(self, t: float) -> np.ndarray:
        return np.ascontiguousarray(self.pieces[int(np.searchsorted(self._starts, t, side="right"))].at(t))

    def parts(
        self, t: float, x: np.ndarray, drift: np.ndarray, covariance: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """v, ∂_t v and b·∇v + ½Σ:∇²v at points (P, d), each of shape (P, k)."""
        where = self._positions(x)
        c, k = self._at(float(t)), self.columns
        found = np.empty((len(x), 3 * k))
        bspline.generator(c, k, *where, _few(drift, len(x)), _few(covariance, len(x)), found)
        return found[:, :k], found[:, k : 2 * k], found[:, 2 * k :]

    def __call__(self, t: float, x: np.ndarray) -> np.ndarray:
        """v(t, x) at points (P, d), shape (P, k)."""
        d = self.grid.dim
        return self.parts(t, x, np.zeros((1, d)), np.zeros((1, d, d)))[0]

    def before(self, t: float, x: np.ndarray) -> np.ndarray:
        """v(t−, x), the limit from before, at points (P, d), shape (P, k)."""
        d, k = self.grid.dim, self.columns
        c = np.ascontiguousarray(self.pieces[int(np.searchsorted(self._starts, t, side="left"))].at(t))
        found = np.empty((len(x), 3 * k))
        bspline.generator(c, k, *self._positions(x), np.zeros((1, d)), np.zeros((1, d, d)), found)
        return found[:, :k]

    def slope(self, t: float, x: np.ndarray, direction: np.ndarray) -> np.ndarray:
        """Derivative of v along directions (P, d) or (1, d) at points (P, d), shape (P, k)."""
        d = self.grid.dim
        return self.parts(t, x, direction, np.zeros((1, d, d)))[2]

    def _positions(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Per axis: position in nodes, slope and bend of the map there, and distance beyond the grid; shape (P, d)."""
        z, slope, bend, beyond = (np.empty(x.shape) for _ in range(4))
        for i, (axis, count) in enumerate(zip(self.grid.axes, self._fine, strict=True)):
            g, p = axis.grading, x[:, i]
            if axis.periodic:
                p = g.lower + np.mod(p - g.lower, g.upper - g.lower)
            inside = np.minimum(np.maximum(p, g.lower), g.upper)
            xi, slope[:, i], bend[:, i] = grading.chart(g, inside)
            z[:, i], beyond[:, i] = np.minimum(np.maximum(xi * count, 0.0), count), p - inside
            slope[:, i] /= count
            bend[:, i] /= count**2
        return z, slope, bend, beyond


def _few(a: np.ndarray, n: int) -> np.ndarray:
    """One row in place of n equal ones."""
    return np.ascontiguousarray(a[:1] if len(a) == n > 1 and a.strides[0] == 0 else a, dtype=float)


def _smoothly_mapped(axis: Axis) -> Axis:
    """The axis, or one with as many nodes on the map without corners."""
    g = axis.grading
    return Axis(axis.n, g.base, axis.periodic) if isinstance(g, grading.Pieces) else axis


def _at(axis: Axis, x: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Values along axis 0, interpolated from the nodes of an axis to places x."""
    index, weights = axis.weights(x, WIDTH)
    result = np.zeros((len(x), *values.shape[1:]))
    for i, w in zip(index.T, weights.T, strict=True):
        result += w.reshape(-1, *[1] * (values.ndim - 1)) * values[i]
    return result


def _coefficients(axis: Axis, values: np.ndarray) -> tuple[np.ndarray, int]:
    """Spline coefficients along axis 0, and the number of cells they count."""
    if axis.periodic:
        return bspline.periodic_interpolation(values, DEGREE), axis.n
    if axis.n < DEGREE + 2:  # the polynomial through all nodes, at as many nodes as a spline needs
        index, weights = axis.weights(np.asarray(axis.grading(np.linspace(0.0, 1.0, DEGREE + 2))), axis.n)
        values = np.einsum("pw,pw...->p...", weights, values[index])
    return bspline.interpolation(values, DEGREE), values.shape[0] - 1


def _piece(times: np.ndarray, c: np.ndarray) -> Piece:
    if len(times) == 1:
        return Piece(float(times[0]), float(times[0]), None, None, c[0])
    from scipy.interpolate import make_interp_spline  # not with the package: its import takes long

    spline = make_interp_spline(times, c, min(TIME_DEGREE, len(times) - 1))
    return Piece(float(times[0]), float(times[-1]), spline, spline.derivative(), c[0])


# ------------------------------------------------------------------------------------------------------- from a solve
def interpolants(problem: KolmogorovProblem, recipe: Discretization, scale: float = 0.0) -> Iterator[Interpolant]:
    """Solve a problem much as a recipe says, for functions that are smooth in time and space and close to the solution.

    Some nodes more are put beyond open faces; axes with few nodes, and long steps, are divided; steps get shorter
    towards the horizon; beyond one dimension implicit steps become split ones. The widest grid is the first, then come
    those inside it, down to the nodes of the recipe.

    Parameters
    ----------
    problem, recipe : KolmogorovProblem, Discretization
        What is solved, and how.
    scale : float
        Size of the solution, where it is known.

    Raises
    ------
    NotConvergedError
        If no march came to an end.
    """
    grids = [Grid([_divided(axis, LEAST_NODES[problem.dim]) for axis in recipe.grid.axes])]
    if problem.box.has("cut"):
        for _ in range(WIDER[problem.dim]):
            grids.append(widened(grids[-1], problem.box))
    found = False
    for grid in reversed(grids):  # coefficients need not be what they should be further out
        with suppress(NotConvergedError, InputError):
            solved = _solved(problem, _moved(problem, recipe, grid), scale)
            found = True
            yield solved
    if not found:
        yield _solved(problem, recipe, scale)


def _divided(axis: Axis, least: int) -> Axis:
    """The axis with its cells divided into equal parts, so that its nodes stay nodes."""
    cells = axis.n if axis.periodic else axis.n - 1
    parts = -(-least // cells)
    breaks = tuple(parts * node for node in axis.breaks)
    return Axis(parts * cells + (not axis.periodic), axis.grading, axis.periodic, breaks)


def _moved(problem: KolmogorovProblem, recipe: Discretization, grid: Grid) -> Discretization:
    """The recipe on another grid."""
    scheme = SCHEMES[recipe.scheme]
    averages = plan_averages(problem, grid, problem.box.replace(*grid.box), scheme.order, list(recipe.averages))
    if problem.stationary:
        return replace(recipe, grid=grid, terminal=None, averages=averages)
    rule = plan_terminal(problem, grid, Generator(problem, grid, scheme).box, scheme.order)
    split = problem.dim > 1 and recipe.stepper in WHOLE
    stepper = SPLIT if split else recipe.stepper
    return replace(recipe, grid=grid, stepper=stepper, terminal=rule, averages=averages)


def _solved(problem: KolmogorovProblem, recipe: Discretization, scale: float) -> Interpolant:
    if problem.horizon is None:
        state = np.asarray(solve_stationary(recipe.march(problem)))
        if not np.isfinite(state).all():
            raise NotConvergedError(f"the solution became infinite with {recipe!r}")
        return Interpolant(recipe.grid, [0.0], state[None])
    generator = Generator(problem, recipe.grid, SCHEMES[recipe.scheme])
    longest = STEPPERS[recipe.stepper].largest_step(*generator.stiffness())
    nodes, kept = clock(problem, recipe, longest)
    march = replace(recipe, times=tuple(nodes.tolist())).march(problem)
    first = np.asarray(recipe.initial(march))
    states = states_at(march, first, set(np.flatnonzero(kept).tolist()))
    stacked = np.stack([u for _, u in states])
    if not np.abs(stacked[0]).max() <= RUNAWAY * max(scale, float(np.abs(first).max())):
        raise NotConvergedError(f"the solution became infinite with {recipe!r}")
    return Interpolant(recipe.grid, nodes[[n for n, _ in states]].tolist(), stacked, problem.sde.breakpoints)


def states_at(march: March, first: np.ndarray, wanted: Container[int]) -> list[tuple[int, np.ndarray]]:
    """States (size, k) at some of the time nodes of a march, in order; at an event that before it and that after it."""
    shape = (march.generator.grid.size, march.generator.columns or 1)
    states = [(len(march.times) - 1, np.broadcast_to(first, shape))]
    below = iter(range(len(march.times) - 2, -1, -1))

    def keep(t: float, u: Array) -> None:
        n = next(below)
        if n in wanted:
            states.append((n, np.array(u).reshape(shape)))
        if t in march.events:
            before = march.with_boundary(march.crossed(march.without_boundary(np.array(u).reshape(shape)), t), t)
            states.append((n, np.asarray(before)))

    with np.errstate(over="ignore", invalid="ignore"):  # what comes of unstable steps is looked at afterwards
        run = march.backward(first, callback=keep)
    if run.interrupted:
        raise KeyboardInterrupt
    return states[::-1]


def clock(problem: KolmogorovProblem, recipe: Discretization, longest: float = np.inf) -> tuple[np.ndarray, np.ndarray]:
    """Time nodes for a march whose states are to be joined by splines, and which of them to keep.

    Parameters
    ----------
    problem, recipe : KolmogorovProblem, Discretization
        What is solved, and how.
    longest : float
        Step up to which the stepper is stable.

    Examples
    --------
    >>> import kolmo
    >>> bm = kolmo.SDE(0.0, diffusion=1.0, dim=1)
    >>> problem = kolmo.KolmogorovProblem(bm, lambda x: x[..., 0], 2.0, kolmo.Box(-1.0, 1.0, "reflecting"))
    >>> nodes, kept = clock(problem, kolmo.solve(problem, grid=21, steps=8).discretization)
    >>> float(nodes[0]), float(nodes[-1]), bool(2.0 - nodes[-2] < 2e-3), bool(kept[0]), bool(kept[-1])
    (0.0, 2.0, True, True, True)
    """
    T = float(problem.horizon or 0.0)
    breaks = np.array(problem.sde.breakpoints)
    own = np.asarray(recipe.times, dtype=float) if recipe.times else np.linspace(0.0, 1.0, TIMES[problem.dim] + 1)
    own = own * (T / own[-1])
    if len(breaks):  # a node that should be a breakpoint is one
        near = np.abs(own[:, None] - breaks).min(1) < 1e-9 * T
        own = np.unique(np.concatenate([own[~near], breaks]))
    least = -(-TIMES[problem.dim] // (len(own) - 1))
    parts = [max(least, int(np.ceil((b - a) / longest - 0.1))) for a, b in pairwise(own)]
    pieces = [np.linspace(a, b, n + 1)[:-1] for (a, b), n in zip(pairwise(own), parts, strict=True)]
    nodes = np.concatenate([*pieces, own[-1:]])
    rough = recipe.terminal is not None and recipe.terminal.smoothed
    last = [nodes[-1] - nodes[-2]]
    while last[-1] > LAST[rough] * T:
        last.append(RATIO * last[-1])
    nodes = np.concatenate([nodes[:-1], T - np.array(last[1:]), [T]])
    count = int(np.clip(NUMBERS // recipe.grid.size, LEAST_TIMES, TIMES[problem.dim]))
    left = np.linspace(1.0, 0.0, count + 1) ** POWER[rough]
    wanted = [T * (1.0 - left), T * np.linspace(0.0, 1.0, count // 2 + 1), breaks]
    kept = np.zeros(len(nodes), dtype=bool)
    for t in np.concatenate(wanted):
        kept[int(np.argmin(np.abs(nodes - t)))] = True
    return nodes, kept


# ------------------------------------------------------------------------------------------------------- what is left
def error_problem(problem: KolmogorovProblem, v: Interpolant, columns: int | None) -> KolmogorovProblem:
    r"""The problem that the error u − v of a smooth function v solves.

    .. math::
        \partial_t e + b\cdot\nabla e + \tfrac12\Sigma:\nabla^2 e - ce + r = 0, \qquad
        r = \partial_t v + b\cdot\nabla v + \tfrac12\Sigma:\nabla^2 v - cv + g, \qquad e(T) = \varphi - v(T)

    On absorbing faces e is the datum less v; on reflecting and elastic ones
    :math:`\tfrac12n\cdot\Sigma\nabla e + \kappa e` is the datum less the same of v.

    Parameters
    ----------
    problem : KolmogorovProblem
        The problem of u.
    v : Interpolant
        The smooth function.
    columns : int or None
        Number of columns, None for plain numbers.

    Examples
    --------
    >>> import kolmo
    >>> bm = kolmo.SDE(0.0, diffusion=1.0, dim=1)
    >>> problem = kolmo.KolmogorovProblem(bm, lambda x: np.cos(x[..., 0]), 1.0, kolmo.Box(-1.0, 1.0, "reflecting"))
    >>> zero = Interpolant(Grid.of(problem.box, 9), [0.0], np.zeros((1, 9, 1)))
    >>> error = error_problem(problem, zero, None)
    >>> float(error.final(np.array([[0.5]]))[0] - np.cos(0.5)), error.box.faces[0][0].word
    (0.0, 'robin')
    """

    def shaped(value: np.ndarray, x: Array) -> Array:
        return as_like(value if columns is not None else value[:, 0], x)

    def source(t: float, x: Array) -> Array:
        b, S = as_numpy(problem.sde.drift(t, x)), as_numpy(problem.sde.covariance(t, x))
        value, rate, image = v.parts(t, np.asarray(as_numpy(x)), b, S)
        left = rate + image
        if problem.sde.kinds:
            left = left + jump_term(problem, v, t, x, value)
        if problem.killing is not None:
            left -= table(problem.rate(t, x)) * value
        if problem.source is not None:
            left = left + table(problem.running(t, x))
        return shaped(left, x)

    def left_at(event: Event, x: Array) -> Array:
        points = np.asarray(as_numpy(x))
        moved, paid = (None if part is None else np.asarray(as_numpy(part)) for part in problem.happens(event, x))
        left = v(event.time, np.asarray(landing(problem.box, moved))) - v.before(event.time, points)
        return shaped(left if paid is None else left + table(paid), x)

    def terminal(x: Array) -> Array:
        return shaped(table(problem.final(x)) - v(problem.horizon or 0.0, np.asarray(as_numpy(x))), x)

    box = problem.box
    faces = [tuple(_left(problem, v, (i, side), shaped) for side in (0, 1)) for i in range(box.dim)]
    other = KolmogorovProblem(
        problem.sde,
        None if problem.stationary else terminal,
        problem.horizon,
        Box(box.lower, box.upper, faces),
        killing=problem.killing,
        source=source,
        events={
            event.time: [Payment(partial(left_at, event)), partial(_moved_by, problem, event)]
            for event in problem.events
        },
    )
    return other.handing("torch", problem.device) if problem.arrays == "torch" else other


def table(value: Array) -> np.ndarray:
    """Values (P,) or (P, k) as (P, k), in NumPy."""
    rows = np.asarray(as_numpy(value), dtype=float)
    return rows[:, None] if rows.ndim == 1 else rows


def _moved_by(problem: KolmogorovProblem, event: Event, x: Array) -> Array:
    return problem.happens(event, x)[0]


def jump_term(problem: KolmogorovProblem, v: Interpolant, t: float, x: Array, value: np.ndarray) -> np.ndarray:
    r"""Σ_j λ_j (v(x + J_j) − v(x)) at points x, where v is ``value``; shape (P, k)."""
    rates, moves = (as_numpy(part) for part in problem.sde.jumps(t, x))
    total, points = np.zeros(value.shape), np.asarray(as_numpy(x))
    for j in range(rates.shape[-1]):
        ends = np.asarray(landing(problem.box, points + moves[:, j]))
        total += rates[:, j, None] * (v(t, ends) - value)
    return total


def _left(
    problem: KolmogorovProblem, v: Interpolant, where: tuple[int, int], shaped: Callable[[np.ndarray, Array], Array]
) -> Any:
    """Condition of the error on a face."""
    axis, side = where
    face = problem.box.faces[axis][side]
    outward = -1.0 if side == 0 else 1.0

    def datum(value: FaceValue, t: float, x: Array) -> np.ndarray:
        return table(problem.on_face(value, t, x))

    def value_left(t: float, x: Array) -> Array:
        return shaped(datum(face.value, t, x) - v(t, np.asarray(as_numpy(x))), x)  # type: ignore[attr-defined]

    def flux_left(t: float, x: Array) -> Array:
        p = np.asarray(as_numpy(x))
        S = np.asarray(as_numpy(problem.sde.covariance(t, x)))
        left = -0.5 * v.slope(t, p, outward * S[:, axis])
        if isinstance(face, Robin):
            left = left + datum(face.value, t, x) - datum(face.kappa, t, x) * v(t, p)
        return shaped(left, x)

    if isinstance(face, Absorbing):
        return Absorbing(value_left)
    if isinstance(face, Reflecting | Robin):
        return Robin(face.kappa if isinstance(face, Robin) else 0.0, flux_left)
    return face
