"""The semi-discrete Hamilton–Jacobi–Bellman equation V' + min_a (Q(a) V + r(a)) = 0 on a grid."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from scipy.ndimage import distance_transform_edt

from kolmo.control.coefficients import Coefficients, Values
from kolmo.control.game import Game
from kolmo.control.problem import ControlProblem
from kolmo.control.targets import TargetNodes
from kolmo.errors import InputError
from kolmo.grid import Grid
from kolmo.problem.faces import Robin
from kolmo.schemes.base import SCHEMES, FaceData
from kolmo.schemes.generator import Generator
from kolmo.schemes.local import Local, local_coefficients, wall_nodes
from kolmo.steppers.base import Operator

# The size of V that changes are relative to is that within this part of the nodes to either side.
AROUND = 10
# Rate, in units of 1/T, at which V is pulled to the obstacle where it has passed it.
PENALTY = 1e8
# An unbounded control may have no optimum this many nodes from an open, natural or absorbing face.
MARGIN = 6
# Nodes at the ends whose differences have another kernel.
EDGE = 4


@dataclass(frozen=True, eq=False)
class Filled:
    """Q where nodes in targets are linear functions of the unknown ones: rows and columns of the latter alone."""

    matrix: sp.csr_matrix
    # steps take it as they take an operator that has no band
    _band = None
    system = staticmethod(Operator.system)

    @classmethod
    def of(cls, Q: sp.csr_matrix, fixed: np.ndarray, filled: sp.csr_matrix) -> "Filled":
        """From the matrix of all nodes, the fixed ones, and how those are filled."""
        free = sp.diags((~fixed).astype(float))
        return cls(sp.csr_matrix(free @ Q @ (free + filled @ free)))

    def apply(self, u: np.ndarray) -> np.ndarray:
        """Q u for u zero at fixed nodes."""
        return np.asarray(self.matrix @ u)


@dataclass(frozen=True)
class Act:
    """What is done at the nodes: controls (size, m), and where one stops (size,), if one may.

    ``bent`` is a load (size, 1) that belongs to the kinks which switches of the control leave in the Hamiltonian.
    """

    a: torch.Tensor
    stop: np.ndarray | None = None
    bent: np.ndarray | None = None


class Bellman:
    """The nonlinear generator of a control problem on a grid.

    Parameters
    ----------
    problem : ControlProblem
        The problem.
    grid : Grid
        The nodes.
    scheme : str
        A central scheme, or "monotone".
    """

    def __init__(self, problem: ControlProblem, grid: Grid, scheme: str) -> None:
        self.problem, self.grid, self.scheme = problem, grid, SCHEMES[scheme]
        self.x = torch.as_tensor(grid.points)
        still = problem.closed_loop(problem.constant(problem.controls.samples[0]))
        still.box = problem.box or still.box
        # where paths leave is for the policy to say: absorbing values hold everywhere
        self.generator = Generator(still, grid, self.scheme, everywhere=True)
        self.box, self.metric = self.generator.box, self.generator.metric
        self.held = (
            TargetNodes(problem.targets, grid, self.generator.fixed, not self.scheme.monotone)
            if problem.targets
            else None
        )
        fixed = self.generator.fixed if self.held is None else self.generator.fixed | self.held.inside
        self.fixed = fixed if fixed.any() else None
        self.penalty = PENALTY / (problem.horizon or 1.0)
        if self.box.has("elastic") and grid.dim > 1:
            raise InputError("box", self.box, "no elastic (Robin) faces in two or three dimensions")
        self.places = torch.as_tensor(self.generator.places())
        if not self.box.where("reached").all():
            raise InputError("box", self.box, "no entrance: the control could make the end one that is reached")
        self.coefficients = Coefficients(problem, self.places)
        sample = self._typical()
        self.stencil = self.scheme.stencil(grid, self.box, sample)
        self.fields = SCHEMES["central2" if self.scheme.monotone else scheme].stencil(grid, self.box, sample)
        if not self.coefficients.covariance_is_fixed:
            # Where the control sets the noise it is chosen by the normal second derivative, which central schemes drop
            # at open faces: without it the control of a convex value has no optimum at the cut, the value there is that
            # of no noise at all, and both faults spread inwards.
            self.fields = self.fields.with_noise_at_cuts()
            if not self.scheme.monotone:
                self.stencil = self.stencil.with_noise_at_cuts()
        self._soft = self._near_faces() if self.held is None else self._near_faces() | self.held.inside
        # Selling's vectors depend on the covariance: where it never changes, neither does the stencil
        self._one_layout = grid.dim == 1 or self.coefficients.covariance_is_fixed
        # kinks of V'' at switches are put into the load: on intervals, by differences of order 4
        self._switches = (
            scheme == "central4" and grid.dim == 1 and not grid.axes[0].periodic and self.coefficients.switches
        )
        self._assembled: tuple[float, Act, tuple[Any, np.ndarray, Local]] | None = None

    @property
    def banded(self) -> bool:
        """Whether the matrices have a band: on intervals without targets."""
        return self.held is None and self.grid.dim == 1 and not self.grid.axes[0].periodic

    @property
    def linear(self) -> bool:
        """Whether there is nothing to choose."""
        one = len(self.problem.controls.samples) == 1 and not self.problem.controls.unbounded
        return one and self.problem.obstacle is None

    def _near_faces(self) -> np.ndarray:
        """Nodes near faces where derivatives are dropped, degenerate or one-sided."""
        near = np.zeros(self.grid.shape, dtype=bool)
        for i, s, face in self.box.each():
            if face.cut or face.degenerate or face.imposed:
                index = slice(0, MARGIN) if s == 0 else slice(-MARGIN, None)
                near[(slice(None),) * i + (index,)] = True
        return near.reshape(-1)

    def _typical(self) -> np.ndarray:
        """The covariance for which stencils are laid out: mixed terms wherever some control makes them."""
        parts = [self._checked(0.0, self.start(a).a) for a in self.problem.controls.samples]
        if self.problem.controls.samples.any(axis=1).sum() == 0:
            shifted = self.problem.controls.samples[0] + 1.0
            parts.append(self._checked(0.0, self.start(shifted).a))
        several = self.scheme.follows == "pattern"
        return np.asarray(np.max([np.abs(p.S) for p in parts], axis=0) if several else parts[0].S)

    def start(self, a: np.ndarray | None = None) -> Act:
        """The same control at every node: the first of the typical ones unless given."""
        value = torch.as_tensor(self.problem.controls.samples[0] if a is None else a)
        act = value.expand(self.grid.size, len(value)).clone()
        if self.coefficients.on_walls is not None:
            d, n = self.grid.dim, self.grid.size
            best, _ = self.coefficients.choose(0.0, np.zeros(n), np.zeros((n, d)), np.zeros((n, d, d)), act)
            act = self._walled(best, act)
        return Act(act, None if self.problem.obstacle is None else np.zeros(self.grid.size, dtype=bool))

    def _walled(self, a: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """The controls a on constrained faces, the others elsewhere."""
        if self.coefficients.on_walls is None:
            return other
        rows, both = torch.as_tensor(self.coefficients.on_walls), other.clone()
        both[rows] = a[rows]
        return both

    def _checked(self, t: float, a: torch.Tensor) -> Local:
        """Coefficients in index units, checked: finite, and covariances positive semidefinite."""
        closed = self.problem.closed_loop(lambda _t, _x: a)
        with torch.no_grad():
            local = local_coefficients(closed, self.grid, self.metric, t, self.places, 1)
        A, S, c, g = (np.asarray(v.numpy()) for v in (local.A, local.S, local.c, local.g))
        return Local(A, S, c, g)

    def local(self, t: float, a: torch.Tensor) -> Local:
        """Coefficients in index units for controls a."""
        values, density = self.coefficients.values(t, a), self.metric.density
        A = values.b * density - 0.5 * np.einsum("nii->ni", values.S) * self.metric.bend
        return Local(A, values.S * density[:, :, None] * density[:, None, :], values.c, values.g[:, None])

    def _face_data(self, t: float) -> FaceData:
        robin = {}
        for i, s, face in self.box.each():
            if isinstance(face, Robin):
                wall = self.x[wall_nodes(self.grid, i, s)]
                kappa, value = (self.generator.problem.on_face(v, t, wall).numpy() for v in (face.kappa, face.value))
                robin[i, s] = (kappa, value[:, None])
        return FaceData(robin)

    def boundary(self, t: float) -> np.ndarray:
        """Values at absorbing nodes and what targets pay, zero elsewhere, shape (size, 1)."""
        values = np.asarray(self.generator.boundary(t, self.grid.points))
        return values if self.held is None else np.where(self.held.inside[:, None], self.held.paid(t), values)

    def free(self, V: np.ndarray) -> np.ndarray:
        """V with zeros at absorbing nodes."""
        return V if self.fixed is None else V * (~self.fixed)[:, None]

    def full(self, V: np.ndarray, t: float) -> np.ndarray:
        """V with the values at absorbing faces and in targets put in."""
        if self.fixed is None:
            return V
        free = self.free(V)
        filled = free if self.held is None else free + self.held.filled @ free
        return np.asarray(filled + self.boundary(t))

    def assemble(self, t: float, act: Act) -> tuple[Any, np.ndarray, Local]:
        """Q and total load of a policy at time t, and the coefficients they come from; the last result is kept."""
        if self._assembled is None or self._assembled[0] != t or not _identical(self._assembled[1], act):
            self._assembled = t, act, self._assemble(t, act)
        return self._assembled[2]

    def _assemble(self, t: float, act: Act) -> tuple[Any, np.ndarray, Local]:
        local = self.local(t, act.a)
        if act.stop is not None and act.stop.any():
            pull = self.penalty * act.stop
            value = self.problem.stopping(t, self.x).detach().numpy()
            local = Local(local.A, local.S, local.c + pull, local.g + (pull * value)[:, None])
        stencil = self.stencil
        if self.scheme.follows == "values" and not self._one_layout:
            stencil = self.scheme.stencil(self.grid, self.box, local.S)
        assembly = self.scheme.assemble(stencil, local, self._face_data(t), self.metric)
        load = assembly.load if act.bent is None else assembly.load + act.bent
        if self.fixed is not None:
            load = load + stencil.apply(assembly.a, self.boundary(t))
        if self.held is None or self.fixed is None:
            return Operator(stencil, assembly.a, self.fixed), load, local
        return Filled.of(stencil.matrix(assembly.a), self.fixed, self.held.filled), self.free(load), local

    def derivatives(self, t: float, V: np.ndarray, act: Act) -> tuple[np.ndarray, np.ndarray]:
        """∇V (size, d) and ∇²V (size, d, d) as the central scheme takes them, slopes at walls included."""
        d, density, bend = self.grid.dim, self.metric.density, self.metric.bend
        first = [self._along(i, "first", V[:, 0]) for i in range(d)]
        second = [self._along(i, "second", V[:, 0]) for i in range(d)]
        cross = {(i, j): self._along(j, "cross", self._along(i, "cross", V[:, 0])) for i, j in self.fields.pairs}
        if self.fields.slopes:
            self._add_slopes(t, V[:, 0], act, first, second)
        p = np.stack([density[:, i] * first[i] for i in range(d)], -1)
        M = np.zeros((self.grid.size, d, d))
        keep = [mask.array for mask in self.fields.keep]
        for i in range(d):
            M[:, i, i] = keep[i] * density[:, i] ** 2 * second[i] - bend[:, i] * first[i]
        for (i, j), values in cross.items():
            M[:, i, j] = M[:, j, i] = keep[i] * keep[j] * density[:, i] * density[:, j] * values
        return p, M

    def _along(self, axis: int, name: str, u: np.ndarray) -> np.ndarray:
        """A one-dimensional difference operator of the central scheme along an axis of a node field."""
        lines = np.moveaxis(u.reshape(self.grid.shape), axis, 0)
        applied = self.fields.operators[axis][name].matrix @ lines.reshape(lines.shape[0], -1)
        return np.moveaxis(np.asarray(applied).reshape(lines.shape), 0, axis).reshape(-1)

    def _add_slopes(self, t: float, V: np.ndarray, act: Act, first: list[Any], second: list[Any]) -> None:
        """Slopes at walls: along the conormal, and of elastic faces."""
        local, faces = self.local(t, act.a), self._face_data(t)
        for (i, side), (weight1, weight2) in self.fields.slopes.items():
            wall = self.fields.walls[i, side].array
            normal = np.where(local.S[wall, i, i] > 0, local.S[wall, i, i], 1.0)
            slope = np.zeros(self.grid.size)
            for j in self.fields.tilted[i, side]:
                slope -= local.S[wall, i, j] / normal * self._along(j, "cross", V)[wall]
            if (i, side) in faces.robin:
                kappa, value = faces.robin[i, side]
                lookup = self.fields.wall_positions[i, side].array
                sign = 2.0 if side == 1 else -2.0
                slope += sign * self.metric.density[wall, i] / normal * (value[lookup, 0] - kappa[lookup] * V[wall])
            first[i] += weight1.array * slope
            second[i] += weight2.array * slope

    def improve(self, t: float, V: np.ndarray, act: Act) -> Act:
        """The best policy for V (absorbing values included)."""
        stop = None
        if act.stop is not None:
            beyond = self.problem.sign * (V[:, 0] - self.problem.stopping(t, self.x).detach().numpy())
            stop = beyond > 0.0
        p, M = self.derivatives(t, V, act)
        a = self._filled(*self.coefficients.choose(t, V[:, 0], p, M, act.a))
        if self.scheme.monotone:
            # what may have been inadmissible does not compete
            present = replace(act, a=self._walled(a, act.a))
            a = self._discrete_best(t, V, present, [a, *self._one_sided(t, V, M, act.a)])
        return Act(a, stop, self._bent(t, V, p, a) if self._switches else None)

    def _bent(self, t: float, V: np.ndarray, p: np.ndarray, a: torch.Tensor) -> np.ndarray | None:
        r"""What the second difference sees of the kinks that switches leave in the second derivative, as a load.

        The difference is the mean of :math:`V''` under its kernel k, so that beside a place s where the slope of the
        Hamiltonian jumps by q it is off by :math:`-(q/2)(k * |x - s| - |x - s|)`. The place and the jump come from
        what the controls on either side would be worth to each other. Without this the error is of second order and
        depends on where in its cell the place lies.
        """
        n, control = self.grid.size, a.numpy()
        cells = np.flatnonzero((control[1:] != control[:-1]).any(-1))
        cells = cells[(cells >= EDGE) & (cells < n - 1 - EDGE)]
        if not len(cells):
            return None
        after, before = control.copy(), control.copy()
        after[:-1], before[1:] = control[1:], control[:-1]
        own, one, other = (self.coefficients.values(t, torch.as_tensor(c)) for c in (control, after, before))

        def worth(these: Values, at: np.ndarray) -> np.ndarray:
            """What these controls are worth more than the nodes' own, at some nodes."""
            gain = ((these.b - own.b)[at] * p[at]).sum(-1) - (these.c - own.c)[at] * V[at, 0] + (these.g - own.g)[at]
            return np.asarray(gain)

        low, high = worth(one, cells), -worth(other, cells + 1)
        jump = high - low
        shift = np.abs((one.b - own.b)[cells, 0]) * self.metric.density[cells, 0]
        noise = own.S[cells, 0, 0] * self.metric.density[cells, 0] ** 2
        gaps = np.diff(cells, prepend=-n, append=2 * n) > EDGE
        alone = gaps[1:] & gaps[:-1]
        good = (low * high < 0) & (shift <= noise) & alone
        load = np.zeros(n)
        for cell, where, q in zip(cells[good], -low[good] / jump[good], jump[good], strict=True):
            nodes = np.arange(cell - 1, cell + 3)
            load[nodes] += 0.5 * q * _seen(nodes - cell - where)
        return load[:, None]

    def check(self, t: float, V: np.ndarray, act: Act) -> None:
        """Raise where the Hamiltonian has no optimum in the control, or where the coefficients are no good."""
        self._checked(t, act.a)
        p, M = self.derivatives(t, V, act)
        _, found = self.coefficients.choose(t, V[:, 0], p, M, act.a)
        bad = ~found & ~self._soft
        if bad.any() and not self._idle(t, bad):
            optimum = "saddle point" if isinstance(self.problem.controls, Game) else f"{self.problem.sense}imum"
            raise InputError(
                "controls",
                f"a Hamiltonian without {optimum} in the control at "
                f"x = {self.grid.points[np.flatnonzero(bad)[0]].tolist()}, t = {t:g}",
                "one that is definite in a wherever the control acts",
                "add a cost that is convex in the control, or bound the controls (Interval, BoxSet)",
            )

    def _filled(self, a: torch.Tensor, found: np.ndarray) -> torch.Tensor:
        """Controls where there is no optimum, from the nearest node that has one."""
        if found.all() or not found.any():
            return a
        nearest = distance_transform_edt(~found.reshape(self.grid.shape), return_distances=False, return_indices=True)
        index = np.ravel_multi_index(tuple(nearest), self.grid.shape).reshape(-1)
        return a[torch.as_tensor(index)]

    def _idle(self, t: float, bad: np.ndarray) -> bool:
        """Whether the control changes no coefficient at the bad nodes."""
        m = self.problem.controls.m
        one, other = (self.local(t, self.start(v).a) for v in (np.zeros(m), np.ones(m)))
        pairs = zip((one.A, one.S, one.c, one.g), (other.A, other.S, other.c, other.g), strict=True)
        return all(np.allclose(p[bad], q[bad], rtol=0, atol=1e-14 * np.abs(p).max(initial=0.0)) for p, q in pairs)

    def _one_sided(self, t: float, V: np.ndarray, M: np.ndarray, start: torch.Tensor) -> list[torch.Tensor]:
        """Optimal controls for forward and backward differences, the ones that upwinding takes."""
        d, options = self.grid.dim, []
        u = V[:, 0].reshape(self.grid.shape)
        sides = []
        for i, axis in enumerate(self.grid.axes):
            up = np.roll(u, -1, axis=i) - u
            down = u - np.roll(u, 1, axis=i)
            if not axis.periodic:
                first, last = (slice(None),) * i + (0,), (slice(None),) * i + (-1,)
                up[last], down[first] = down[last], up[first]
            sides.append([v.reshape(-1) * self.metric.density[:, i] for v in (up, down)])
        for pick in product((0, 1), repeat=d):
            p = np.stack([sides[i][s] for i, s in enumerate(pick)], -1)
            options.append(self._filled(*self.coefficients.choose(t, V[:, 0], p, M, start)))
        return options

    def _discrete_best(self, t: float, V: np.ndarray, act: Act, options: list[torch.Tensor]) -> torch.Tensor:
        """Of several controls per node the best one for the discrete operator itself; the present one wins ties."""
        controls = self.problem.controls
        if isinstance(controls, Game):
            firsts, seconds = zip(*(controls.split(option) for option in [act.a, *options]), strict=True)
            both = controls.answered(lambda a: self.rate(t, V, Act(a))[:, 0], _distinct(firsts), _distinct(seconds))
            return torch.as_tensor(both)
        best, a = self.rate(t, V, Act(act.a)), act.a
        # where V is stationary the rate vanishes, and rounding is that of its parts
        slack = 1e-13 * (np.abs(best).max() + np.abs(self.assemble(t, Act(act.a))[1]).max())
        for k, option in enumerate(options):
            if any(torch.equal(option, other) for other in [act.a, *options[:k]]):
                continue
            value = self.rate(t, V, Act(option))
            better = self.problem.sign * value < self.problem.sign * best - slack
            best = np.where(better, value, best)
            a = torch.where(torch.as_tensor(better[:, 0])[:, None], option, a)
        return a

    def slope(self, t: float, V: np.ndarray, act: Act) -> np.ndarray:
        """∂V/∂t, shape (size, 1), for the free part of V; no number where values are prescribed."""
        slope = -self.rate(t, V, act)
        return slope if self.fixed is None else np.where(self.fixed[:, None], np.nan, slope)

    def rate(self, t: float, V: np.ndarray, act: Act) -> np.ndarray:
        """Q(a) V + r(a), shape (size, 1); V with or without absorbing values."""
        operator, load, _ = self.assemble(t, act)
        return np.asarray(operator.apply(np.ascontiguousarray(self.free(V))) + load)


def _distinct(options: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Options that differ from those before them."""
    kept: list[torch.Tensor] = []
    for option in options:
        if not any(torch.equal(option, other) for other in kept):
            kept.append(option)
    return kept


def _seen(d: np.ndarray) -> np.ndarray:
    """Mean of the modulus under the kernel of the second difference of order 4, less the modulus, at nodes d from 0."""

    def hat(d: np.ndarray) -> np.ndarray:
        return np.asarray(np.maximum(1.0 - np.abs(d), 0.0) ** 3 / 3.0)

    return (4.0 * hat(d) - 2.0 * hat(0.5 * d)) / 3.0


def _identical(p: Act, q: Act) -> bool:
    """Whether two policies are the same tensors, and stop at the same nodes."""
    stops = [act.stop is not None and bool(act.stop.any()) for act in (p, q)]
    return p.a is q.a and p.bent is q.bent and (not any(stops) or p.stop is q.stop)
