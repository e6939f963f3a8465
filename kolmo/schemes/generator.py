"""The semi-discrete equation u' + Q(t) u + r(t) = 0 on a grid: the generator that every march and adjoint uses."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import pairwise, product
from typing import Any

import numpy as np
import scipy.sparse as sp

from kolmo import memory
from kolmo.arrays import Array, Held, Spread, as_like, as_numpy, detached, is_tensor, namespace, zeros
from kolmo.errors import InputError
from kolmo.grid import Grid
from kolmo.problem.box import Box
from kolmo.problem.faces import Absorbing, Robin
from kolmo.problem.instants import COMPARED, constant, depends_on_time
from kolmo.problem.problem import KolmogorovProblem, check_finite, check_vectorised
from kolmo.problem.rest import at_rest
from kolmo.schemes.base import SCHEMES, FaceData, Scheme
from kolmo.schemes.faces import Entrances, check_natural, held, probe, resolved, shrunk
from kolmo.schemes.jumps import Start, with_jumps
from kolmo.schemes.local import Instead, Local, Means, Metric, columns, local_coefficients, source_at, wall_nodes
from kolmo.schemes.terminal import TerminalRule

# How far beside a node of a face its values are looked at, as a part of the box; the change that is a jump, relative to
# the largest of them.
BESIDE, JUMP = 1e-9, 1e-6
# Irregular instants (fractions of an interval) at which it is asked where paths leave.
PROBES = (0.0, 0.1309, 0.3717, 0.5, 0.6283, 0.8571, 0.9999)
# Nodes per axis between which the ends of jumps are interpolated: two for monotone schemes; else as many as the order
# of the scheme, four at least. Largest sum of moduli of the weights in the middle of six nodes (of eight: 1.7).
LINEAR, LEAST_WIDTH, LEBESGUE = 2, 4, 1.6
# Nodes at which coefficients are compared to see whether they depend on time, and the least number of instants in each
# interval between breakpoints, of which there may be many.
COMPARED_NODES, LEAST_COMPARED = 400, 8
# Entries of the covariance that may become something count as this part of the largest in a layout.
BARELY = 1e-12


@dataclass(frozen=True)
class Semi:
    """Stencil numbers, load and boundary values at one time: the ingredients of u' = −(Q(a) u + r).

    Attributes
    ----------
    stencil : Stencil
        Frozen stencils.
    a : array
        Numbers in them.
    load : array, shape (size, k)
        Source and elastic data (without the part of absorbing values).
    boundary : array, shape (size, k)
        Values at absorbing nodes, zero elsewhere.
    active : ndarray of bool or None
        Numbers that depend on a parameter; None: they may all.
    """

    stencil: Any
    a: Array
    load: Array
    boundary: Array
    active: np.ndarray | None = None


class _Once:
    """A function of (t, x) that does not depend on t, of the same points at every call: it is called once."""

    def __init__(self, f: Callable[[float, Array], Array]) -> None:
        self._f = f
        self._values: Array | None = None

    def __call__(self, t: float, x: Array) -> Array:
        if self._values is None:
            self._values = self._f(t, x)
        return self._values


class Generator:
    r"""Space discretisation of a problem: :math:`u' + Q(t)u + r(t) = 0`.

    Parameters
    ----------
    problem : KolmogorovProblem
        The equation.
    grid : Grid
        The nodes.
    scheme : str or Scheme
        Name of the scheme, see ``kolmo.schemes.SCHEMES``.
    autonomous : bool, optional
        Whether coefficients, source and face data are constant in time, where that is known from another grid.
    averages : mapping, optional
        Rules by name of functions ("drift", "covariance", "killing", "source") that are averaged around the nodes.
    everywhere : bool, default False
        Values hold at all nodes of absorbing faces, whether the process leaves there or not.
    coupled : ndarray of bool, shape (d, d), optional
        Entries of the covariance that stencils are laid out for even where they are zero: they may become something.

    Raises
    ------
    InputError
        For targets inside the box, and faces that the process contradicts.

    Examples
    --------
    >>> import kolmo
    >>> bm, box = kolmo.SDE(0.0, diffusion=1.0, dim=1), kolmo.Box(0.0, 1.0, boundary="reflecting")
    >>> problem = kolmo.KolmogorovProblem(bm, lambda x: x[..., 0], 1.0, box)
    >>> float(abs(kolmo.discretize(problem, 11, scheme="central2").matrix(0.0).sum(1)).max()) < 1e-9
    True
    """

    def __init__(
        self,
        problem: KolmogorovProblem,
        grid: Grid,
        scheme: Scheme,
        autonomous: bool | None = None,
        averages: Mapping[str, TerminalRule] | None = None,
        *,
        everywhere: bool = False,
        coupled: np.ndarray | None = None,
    ) -> None:
        self._coupled = coupled
        self._means = {
            name: partial(_mean, rule, problem, name) for name, rule in ({} if averages is None else averages).items()
        }
        self.problem, self.grid, self.scheme, self._known = problem, grid, scheme, autonomous
        if problem.stops and not everywhere:
            raise InputError(
                "problem",
                "a process that is stopped in targets inside the box",
                "a problem without them: only paths (monte_carlo) are stopped there",
                "control.solve_hjb(cp.under(policy)) for its value, control.arrival(cp.under(policy), x) for its law",
            )
        low, high = grid.box
        box = problem.box.replace(low, high)
        self.box: Box = box if everywhere else resolved(problem, grid, box, self._face_times())
        self._evaluated: dict[float, Local] = {}
        self._walls: dict[tuple[int, int], tuple[Held, Held]] = {}
        self._kept: Local | None = None
        self._stencil: Any = None
        self._entrances = Entrances(problem, grid, self.box)
        if problem.box.has("degenerate"):
            check_natural(problem, grid, self.box, self.places())

    def _face_times(self) -> list[float]:
        """Times at which it is asked where paths leave."""
        steady = not any(callable(f) for f in self.problem.sde.given.values()) or self.problem.sde.autonomous
        intervals = _some(self.intervals())
        return [a + f * (b - a) for a, b in intervals for f in (PROBES[:1] if steady or a == b else PROBES)]

    @cached_property
    def _spread(self) -> Spread:
        return Spread(self.grid.nodes)

    def nodes(self, like: Array | None) -> Array:
        """The nodes, shape (size, d), in the library (and on the device) of ``like``."""
        return self._spread.like(like) if is_tensor(like) else self.grid.points

    @cached_property
    def _places(self) -> Held:
        x = self.grid.points
        if self.fixed.any() or self._entrances.ends:
            x = x.copy()
            for axis, side, face in self.box.each():
                if face.unread:
                    wall, unread = wall_nodes(self.grid, axis, side), ~self._read(axis, side)
                    x[wall[unread]] = probe(self.grid, self.box, axis, side, 1)[unread]
        return Held(x)

    def _read(self, axis: int, side: int) -> np.ndarray:
        """Nodes of an absorbing face or entrance whose own coefficients count, shape (nodes of the face,)."""
        wall, face = wall_nodes(self.grid, axis, side), self.box.faces[axis][side]
        return np.asarray(~held(self.grid, axis, side, face)[wall] & face.reached)

    def places(self, like: Array | None = None) -> Array:
        """Where the coefficients of the nodes are read, shape (size, d): at the nodes themselves, mostly.

        On faces where values are prescribed, or that the process only leaves, they may be infinite: there it is a
        little inside.
        """
        return self._places.like(like) if is_tensor(like) else self._places.array

    @cached_property
    def metric(self) -> Metric:
        """The grid's map at its nodes."""
        return Metric(self.grid)

    @property
    def volumes(self) -> np.ndarray:
        """Volumes of the cells, shape (size,)."""
        return self.grid.volumes

    @cached_property
    def columns(self) -> int | None:
        """Number of columns k, or None when the unknown is a plain number per node."""
        if self.problem.terminal is not None:
            values = as_numpy(self.problem.final(self.grid.points[:2]))
        else:
            values = as_numpy(self.problem.running(0.0, self.places()[:2]))
        return int(values.shape[1]) if values.ndim == 2 else None

    @cached_property
    def fixed(self) -> np.ndarray:
        """Mask of the nodes on absorbing faces from which paths leave, shape (size,)."""
        mask = np.zeros(self.grid.size, dtype=bool)
        for axis, side, face in self.box.each():
            mask |= held(self.grid, axis, side, face)
        return mask

    def intervals(self) -> list[tuple[float, float]]:
        """Pieces of [0, T] between breakpoints."""
        if self.problem.horizon is None:
            return [(0.0, 0.0)]
        ends = [0.0, *self.problem.sde.breakpoints, self.problem.horizon]
        return list(pairwise(ends))

    @cached_property
    def sample(self) -> Local:
        """Coefficients at the nodes, largest over several times: what layouts and step bounds are made for."""
        times = self._sample_times()
        locals_ = [self.local(t) for t in times]
        if len(times) == 1:
            self._evaluated[times[0]] = locals_[0]
        if len(locals_) == 1:
            return locals_[0]
        pick = [
            max(items, key=lambda v: float(np.abs(v).max()))
            for items in zip(*[(s.A, s.c) for s in locals_], strict=True)
        ]
        S = np.max([np.abs(s.S) for s in locals_], axis=0)
        return Local(pick[0], S, pick[1], locals_[0].g)

    def _sample_times(self) -> list[float]:
        chosen = _some(self.intervals())
        fractions = (0.5,) if self.autonomous else (0.0, 0.5, 1.0 - 1e-9)
        return [a + f * (b - a) for a, b in chosen for f in fractions]

    @property
    def stencil(self) -> Any:
        """Stencils laid out for the sample coefficients, which do not count in one dimension."""
        if self._stencil is None:
            self._stencil = self._lay_out(np.zeros((self.grid.size, 1, 1)) if self.grid.dim == 1 else self.sample.S)
        return self._stencil

    def _lay_out(self, covariance: Array) -> Any:
        S = as_numpy(covariance)
        if self._coupled is not None and self.scheme.follows == "pattern":
            S = S + BARELY * np.abs(S).max() * self._coupled
        return self.scheme.stencil(self.grid, self.box, S)

    @cached_property
    def autonomous(self) -> bool:
        """Whether coefficients, source and face data are constant in time between breakpoints."""
        if self._known is not None:
            return self._known
        if self.problem.stationary or self.problem.sde.autonomous is not None:
            return self.problem.stationary or (bool(self.problem.sde.autonomous) and self._same_over_time(sde=False))
        return self._same_over_time(sde=True)

    def _same_over_time(self, *, sde: bool) -> bool:
        x = self.places()[:: max(1, self.grid.size // COMPARED_NODES)]
        intervals = self.intervals()
        count = max(COMPARED // len(intervals), LEAST_COMPARED)
        return all(
            constant(lambda t, y, f=f: as_numpy(f(t, y)), a, b, x, count)  # type: ignore[misc]
            for a, b in intervals
            for f in self._functions(x, sde=sde)
        )

    def _functions(self, x: Array, *, sde: bool) -> list[Callable[[float, Array], Array]]:
        """What might depend on time, as far as its code tells, and a call at points x."""
        problem = self.problem
        given: list[tuple[Any, Callable[[float, Array], Array]]] = [
            (problem.killing, problem.rate),
            (problem.source, problem.running),
        ]
        if sde:
            given += [(f, getattr(problem.sde, name)) for name, f in problem.sde.given.items()]
            given += [(f, partial(self._part_of_jumps, part)) for part, f in self._jumping()]
        for _, _, face in self.box.each():
            given += [(value, partial(problem.on_face, value)) for value in (getattr(face, name) for name in face.data)]
        return [f for value, f in given if depends_on_time(value, f, x)]

    def _jumping(self) -> list[tuple[int, Any]]:
        """Functions among the rates (0) and displacements (1) of jumps."""
        return [(part, f) for kind in self.problem.sde.kinds for part, f in enumerate(kind) if callable(f)]

    def _part_of_jumps(self, part: int, t: float, x: Array) -> Array:
        return self.problem.sde.jumps(t, x)[part]

    def local(self, t: float, like: Array | None = None) -> Local:
        """Coefficients in index units at the nodes; ``like`` a tensor: in torch, with gradients."""
        x = self.places(like)
        if is_tensor(x):
            return self._fresh(t, x, self._means)
        if self._kept is not None:
            return replace(self._kept, g=source_at(self.problem, t, x, self.columns or 1, self._means))
        local = self._fresh(t, x, self._once)
        whole = not (any(axis.breaks for axis in self.grid.axes) or self._entrances.ends)
        if whole and {"drift", "covariance", "killing"} <= set(self._timeless):
            self._kept = local
        return local

    def _fresh(self, t: float, x: Array, means: Means) -> Local:
        return local_coefficients(
            self.problem,
            self.grid,
            self.metric,
            t,
            x,
            self.columns or 1,
            slope=self.scheme.slope_weight,
            instead=Instead(means, self._entrances.limits if self._entrances.ends else None),
        )

    @cached_property
    def _timeless(self) -> dict[str, Callable[[float, Array], Array]]:
        """Coefficients and source, as functions of (t, x), of those that do not depend on time."""
        problem, some = self.problem, self.places()[:2]
        given = {"killing": problem.killing, "source": problem.source, **problem.sde.given}
        values = {"killing": problem.rate, "source": problem.running}
        values |= {"drift": problem.sde.drift, "covariance": problem.sde.covariance}
        return {name: f for name, f in values.items() if not depends_on_time(given[name], f, some)}

    @cached_property
    def _once(self) -> Means:
        """What is read in place of the functions at the nodes: means, and what does not depend on time once."""
        if self.autonomous:
            return self._means  # everything is read once
        return {**{name: _Once(f) for name, f in self._timeless.items()}, **self._means}

    def at(self, t: float, like: Array | None = None) -> Semi:
        """Stencil numbers, load and boundary values at time t; ``like`` a tensor: in torch, with gradients."""
        x, once = self.nodes(like), self.autonomous and len(self.intervals()) == 1
        # what the layout is made for serves the march too, once, and the other way round
        local = None if like is not None else self._evaluated.pop(t, None)
        local = self.local(t, like) if local is None else local
        if once and self._stencil is None:
            self._stencil = self._lay_out(local.S)
        stencil = self.stencil
        if self.scheme.follows == "values" and self.grid.dim > 1 and not once:
            stencil = self.scheme.stencil(self.grid, self.box, local.S)
        assembly = self.scheme.assemble(stencil, local, self._face_data(t, x), self.metric)
        if once:
            self._release()
        numbers, active = assembly.a, assembly.active
        if self.problem.sde.kinds:
            stencil, numbers = self._with_jumps(stencil, numbers, t, like)
            active = None
        return Semi(stencil, numbers, assembly.load, self.boundary(t, x), active)

    def _with_jumps(self, stencil: Any, numbers: Array, t: float, like: Array | None) -> tuple[Any, Array]:
        """The operator with the jumps of the process, interpolated to the order of the scheme."""
        monotone = self.scheme.monotone
        width = LINEAR if monotone else max(LEAST_WIDTH, self.scheme.order)
        start = Start(self.nodes(like), self.fixed if self.fixed.any() else None, width, linear=not monotone)
        at = t, self.places(like)
        return with_jumps(stencil, numbers, self.problem.sde, self.grid, self.box, at, start)

    def _release(self) -> None:
        """Let go of what only serves to assemble (it is made again if asked for): on a large grid it counts."""
        for name in ("sample", "metric"):
            self.__dict__.pop(name, None)

    def _face_data(self, t: float, x: Array) -> FaceData:
        robin = {}
        for axis, side, face in self.box.each():
            if isinstance(face, Robin):
                wall = x[self._wall(axis, side)[0].like(x)]
                value = self.problem.on_face(face.value, t, wall)
                robin[axis, side] = (self.problem.on_face(face.kappa, t, wall), columns(value, self.columns or 1))
        return FaceData(robin)

    def boundary(self, t: float, x: Array) -> Array:
        """Values at absorbing nodes and zero elsewhere, shape (size, k); later axes win at shared edges."""
        values = zeros((self.grid.size, self.columns or 1), x)
        for axis, side, face in self.box.each():
            if isinstance(face, Absorbing):
                wall = self._wall(axis, side)[1].like(x)
                at_wall = self._mean_on_jumps(face.value, t, x[wall], axis)
                values[wall] = columns(check_finite(at_wall, x[wall], t, "Absorbing.value"), self.columns or 1)
        return values

    def _mean_on_jumps(self, value: Any, t: float, x: Array, axis: int) -> Array:
        """Values of a face at its nodes x; where they jump along it, the mean of what is around a node."""
        at_nodes = self.problem.on_face(value, t, x)
        if not callable(value) or self.grid.dim == 1 or not len(x):
            return at_nodes
        xp, (low, high) = namespace(x), self.grid.box
        moves = np.array(list(product(*[(0.0,) if i == axis else (-1.0, 1.0) for i in range(self.grid.dim)])))
        beside = x + as_like(BESIDE * (high - low) * moves, x)[:, None]
        beside = xp.minimum(xp.maximum(beside, as_like(low, x)), as_like(high, x)).reshape(-1, self.grid.dim)
        around = self.problem.on_face(value, t, beside)
        around = around.reshape(len(moves), len(x), *at_nodes.shape[1:])
        seen = detached(around)
        jumps = abs(seen - seen[:1]).max(0) if xp is np else abs(seen - seen[:1]).amax(0)
        return xp.where(jumps > JUMP * abs(seen).max(), around.mean(0), at_nodes)

    def _wall(self, axis: int, side: int) -> tuple[Held, Held]:
        """Indices of the nodes on a face, and of those whose values are prescribed."""
        if (axis, side) not in self._walls:
            prescribed = np.flatnonzero(held(self.grid, axis, side, self.box.faces[axis][side]))
            self._walls[axis, side] = Held(wall_nodes(self.grid, axis, side)), Held(prescribed)
        return self._walls[axis, side]

    def matrix(self, t: float) -> sp.csr_matrix:
        """Q(t) as a SciPy CSR matrix; rows of absorbing nodes are zero, their columns carry the boundary values."""
        semi = self.at(t)
        return sp.csr_matrix(semi.stencil.matrix(as_numpy(semi.a)))

    def load(self, t: float) -> np.ndarray:
        """r(t), shape (size[, k]): source and data of elastic faces."""
        return np.asarray(self.shaped(as_numpy(self.at(t).load)))

    @property
    def terminal(self) -> np.ndarray:
        """Terminal data at the nodes, shape (size[, k])."""
        return np.asarray(as_numpy(self.problem.final(self.grid.points)))

    def shaped(self, u: Array) -> Array:
        """Drop the column axis where the problem has none."""
        return u[..., 0] if self.columns is None else u

    def stiffness(self) -> tuple[float, float]:
        """Bounds of the real and imaginary extent of the spectrum of Q."""
        faces = self._face_data(self._sample_times()[0], self.grid.points)
        real, imaginary = self.scheme.stiffness(self.grid, self.box, self.sample, faces, self.metric)
        return real + self._jump_rate(), imaginary

    @property
    def pace(self) -> float:
        """Rate at which the process crosses the box, from its noise and drift."""
        n = np.array(self.grid.shape)
        noise = np.einsum("nii->ni", self.sample.S).max(0) / n**2
        return float(max(noise.max(), (np.abs(self.sample.A) / n).max()))

    def _jump_rate(self) -> float:
        """Bound of what jumps add: rates times twice the largest sum of moduli of interpolation weights."""
        if not self.problem.sde.kinds:
            return 0.0
        rates = [as_numpy(self.problem.sde.jumps(t, self.places())[0]).sum(-1).max() for t in self._sample_times()]
        return 2.0 * LEBESGUE**self.grid.dim * float(max(rates))


def _mean(rule: TerminalRule, problem: KolmogorovProblem, name: str, t: float, x: Array) -> Array:
    """Averages of a function around the nodes at an instant."""
    return rule.apply(problem.showing(name, t), x)


def _some(intervals: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most some of many intervals."""
    return intervals if len(intervals) <= 8 else intervals[:: max(1, len(intervals) // 8)]


def discretize(problem: KolmogorovProblem, grid: Grid | int | Sequence[int], scheme: str = "auto") -> Generator:
    """Space discretisation of a problem on a grid: :math:`u' + Q(t)u + r(t) = 0`.

    Parameters
    ----------
    problem : KolmogorovProblem
        The equation; its box must be finite when the grid is given by numbers. Of faces that move it is that in
        coordinates in which they stand still: those of t = 0.
    grid : Grid, int or sequence of int
        The grid, or numbers of nodes per axis.
    scheme : str, default "auto"
        "central2", "central4", "central6", "central6-still" or "monotone"; "auto": the highest order that fits.

    Returns
    -------
    Generator
        With ``matrix(t)`` of shape (size, size), ``load(t)``, ``volumes`` and ``terminal`` of shape (size,).

    Raises
    ------
    InputError
        For a scheme that is not known, a grid that does not fit the problem, and as `Generator`.

    Examples
    --------
    >>> import kolmo
    >>> problem = kolmo.KolmogorovProblem(kolmo.SDE(0.0, 1.0, dim=1), lambda x: x[..., 0], 1.0, kolmo.Box(-4.0, 4.0))
    >>> kolmo.discretize(problem, 9, scheme="monotone").matrix(0.0).shape
    (9, 9)
    """
    problem = at_rest(problem, grid.box if isinstance(grid, Grid) else None)
    if not isinstance(grid, Grid):
        memory.require("grid", (grid,) * problem.dim if isinstance(grid, (int, np.integer)) else tuple(grid))
        grid = Grid.of(problem.box, grid)
    if grid.dim != problem.dim:
        raise InputError("grid", f"{grid.dim} axes", f"{problem.dim} axes")
    if scheme == "auto":
        fitting = [n for n in ("central6", "central4", "central2") if min(grid.shape) >= SCHEMES[n].minimum_nodes]
        scheme = fitting[0] if fitting else "monotone"
    check_vectorised(problem, shrunk(grid))
    return Generator(problem, grid, SCHEMES[scheme])
