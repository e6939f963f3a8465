"""The semi-discrete Hamilton–Jacobi–Bellman equation V' + min_a (Q(a) V + r(a)) = 0 on a grid, and its time steps."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from scipy.linalg import lapack
from scipy.ndimage import distance_transform_edt, maximum_filter1d

from kolmo.control.coefficients import Coefficients, Values
from kolmo.control.game import Game
from kolmo.control.problem import ControlProblem
from kolmo.control.targets import TargetNodes
from kolmo.errors import InputError, NotConvergedError
from kolmo.grid import Grid
from kolmo.kernels.linear import factorize
from kolmo.problem.faces import Robin
from kolmo.schemes.base import SCHEMES, FaceData
from kolmo.schemes.central import TensorStencil
from kolmo.schemes.generator import Generator
from kolmo.schemes.local import Local, local_coefficients, wall_nodes
from kolmo.schemes.monotone import JumpStencil
from kolmo.stationary import anchored
from kolmo.steppers.base import STEPPERS, Operator
from kolmo.steppers.radau import tableau

# Policy iterations of one step or stationary solve, and the change of V (relative to its size) at which they end.
POLICY_ITERATIONS = 50
POLICY_CHANGE = 1e-11
# Policy iterations after which the load that belongs to kinks is held, and controls that go back and forth stay.
HOLD, STAY = 15, 35
# The size of V that changes are relative to is that within this part of the nodes to either side.
AROUND = 10
# Time steps that differ by this part of their size are the same.
ALIKE = 1e-9
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

    def _faces(self) -> list[tuple[int, int, Any]]:
        return self.box.each()

    def _near_faces(self) -> np.ndarray:
        """Nodes near faces where derivatives are dropped, degenerate or one-sided."""
        near = np.zeros(self.grid.shape, dtype=bool)
        for i, s, face in self._faces():
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
        for i, s, face in self._faces():
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
        return Act(a, stop, self._bent(t, V, p, M, a) if self._switches else None)

    def _bent(self, t: float, V: np.ndarray, p: np.ndarray, M: np.ndarray, a: torch.Tensor) -> np.ndarray | None:
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
            raise InputError(
                "controls",
                f"a Hamiltonian without {self._optimum()} in the control at "
                f"x = {self.grid.points[np.flatnonzero(bad)[0]].tolist()}, t = {t:g}",
                "one that is definite in a wherever the control acts",
                "add a cost that is convex in the control, or bound the controls (Interval, BoxSet)",
            )

    def _optimum(self) -> str:
        return "saddle point" if isinstance(self.problem.controls, Game) else f"{self.problem.sense}imum"

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


class TridiagonalEuler:
    """Implicit Euler steps of a chain on an interval: jumps to the neighbours, three diagonals (LAPACK gtsv)."""

    def __init__(self, stencil: JumpStencil) -> None:
        self.size, self.up, self.rows = stencil.size, stencil.cols > stencil.rows, stencil.rows

    @classmethod
    def of(cls, bellman: Bellman) -> "TridiagonalEuler | None":
        """The steps of a monotone scheme on an interval; None elsewhere."""
        if not bellman.banded or not isinstance(bellman.stencil, JumpStencil):
            return None
        return cls(bellman.stencil)

    def stages(self, u: np.ndarray, dt: float, numbers: list[Any], loads: list[np.ndarray]) -> list[np.ndarray]:
        """The one stage, for stencil numbers and loads."""
        a, entries = numbers[0], len(self.rows)
        above, below = (
            np.bincount(self.rows, weights=a[:entries] * mask, minlength=self.size) for mask in (self.up, ~self.up)
        )
        diagonal = 1.0 - dt * (a[entries:] - above - below)
        *_, x, info = lapack.dgtsv(-dt * below[1:], diagonal, -dt * above[:-1], u + dt * loads[0])
        if info != 0:
            raise NotConvergedError(f"the linear system of a time step is singular (LAPACK gtsv: {info})")
        return [x]


class BandedRadau:
    """The coupled Radau system in one dimension, put straight into band storage and solved by LAPACK."""

    def __init__(self, terms: list[sp.coo_matrix], free: np.ndarray, stages: int) -> None:
        self.terms, self.free, self.table = terms, free, tableau(stages)
        self.width = max(int(np.abs(term.row - term.col).max(initial=0)) for term in terms)
        self.rows = np.concatenate([term.row for term in terms])
        self.cols = np.concatenate([term.col for term in terms])
        self.data = np.concatenate([term.data for term in terms]) * free[self.cols]

    @classmethod
    def of(cls, bellman: Bellman, stages: int) -> "BandedRadau | None":
        """The system of a central scheme on an interval; None elsewhere."""
        if not bellman.banded or not isinstance(bellman.stencil, TensorStencil):
            return None
        n, operators = bellman.grid.size, bellman.stencil.operators[0]
        terms = [
            sp.coo_matrix(sp.identity(n) if key[0] is None else operators[key[0]].matrix)
            for key in bellman.stencil.terms
        ]
        return cls(terms, np.ones(n) if bellman.fixed is None else (~bellman.fixed).astype(float), stages)

    def stages(self, u: np.ndarray, dt: float, numbers: list[Any], loads: list[np.ndarray]) -> list[np.ndarray]:
        """Stage states for stencil numbers and loads per stage."""
        A, s, n = self.table.A, len(self.table.c), len(u)
        reach = s * (self.width + 1) - 1
        counts = [len(term.data) for term in self.terms]
        size = s * n
        flat = np.zeros((3 * reach + 1) * size)
        for j in range(s):
            weight = np.repeat(np.arange(len(counts)), counts)
            values = -dt * numbers[j][weight, self.rows] * self.data
            for i in range(s):
                row, col = s * self.rows + i, s * self.cols + j
                flat += np.bincount((2 * reach + row - col) * size + col, A[i, j] * values, len(flat))
        band = flat.reshape(3 * reach + 1, size)
        band[2 * reach] += 1.0
        right = np.stack([u + dt * sum(A[i, j] * loads[j] for j in range(s)) for i in range(s)], 1).reshape(size, 1)
        _, _, x, info = lapack.dgbsv(reach, reach, band, right)
        if info != 0:
            raise NotConvergedError(f"the linear system of a time step is singular (LAPACK gbsv: {info})")
        return [x.reshape(n, s, 1)[:, j] for j in range(s)]


class ImplicitPolicyStep:
    """A Radau step by policy iteration: the stages and their policies are found together."""

    def __init__(self, bellman: Bellman, stepper: str, change: float = POLICY_CHANGE) -> None:
        self.bellman, self.stepper, self.change = bellman, STEPPERS[stepper], change
        self.iterations, self.unsettled = 0, 0.0
        self.before: tuple[float, list[Act]] | None = None
        self.factors: tuple[float, Any] | None = None
        # where controls have bounds the policy jumps at some nodes, and changes shrink by fits and starts
        self.like: tuple[float, ...] | None = None if bellman.problem.controls.has_bounds else ()
        stages = len(self.stepper.nodes)
        chain = TridiagonalEuler.of(bellman) if stages == 1 else None
        self.banded = BandedRadau.of(bellman, stages) if chain is None else chain

    def __call__(self, t: float, dt: float, V: np.ndarray, acts: list[Act]) -> tuple[np.ndarray, list[Act]]:
        """V (free part) at t − dt from V at t; ``acts`` is a guess of the stage policies."""
        bellman = self.bellman
        instants = [t - c * dt for c in self.stepper.nodes]
        # coefficients at the start of the step are never those on the other side of T
        acts = self._continued(dt) or (acts if len(acts) == len(instants) else [acts[-1]] * len(instants))

        def solve(acts: list[Act]) -> list[np.ndarray]:
            parts = [bellman.assemble(s, act) for s, act in zip(instants, acts, strict=True)]
            if self.banded is not None:
                return self.banded.stages(V, dt, [p[0].a for p in parts], [p[1] for p in parts])
            return self._coupled(V, dt, [p[0].matrix for p in parts], [p[1] for p in parts])

        def improve(stages: list[np.ndarray], acts: list[Act], count: int) -> list[Act]:
            better = [
                bellman.improve(s, bellman.full(Y, s), act) for s, Y, act in zip(instants, stages, acts, strict=True)
            ]
            # what belongs to kinks is a small correction: where it moves with every policy it is held
            held = count > HOLD
            return [replace(new, bent=old.bent) if held else new for new, old in zip(better, acts, strict=True)]

        settled = iterate(solve, improve, acts, self.change, self.like)
        if self.like is not None and len(settled.changes) > 1:
            self.like = settled.changes
        self.iterations += settled.count
        self.unsettled += settled.change
        self.before = dt, settled.acts
        return settled.states[-1], settled.acts

    def _continued(self, dt: float) -> list[Act] | None:
        """Policies of the stages of the last step, continued in time: a better guess where controls are not bounded."""
        if self.before is None or self.bellman.problem.controls.has_bounds:
            return None
        last, acts = self.before
        nodes = np.asarray(self.stepper.nodes)
        others = [np.delete(nodes, j) for j in range(len(nodes))]
        guesses = []
        for c in 1.0 + nodes * dt / last:
            weights = [np.prod((c - rest) / (node - rest)) for node, rest in zip(nodes, others, strict=True)]
            a = sum(float(w) * act.a for w, act in zip(weights, acts, strict=True))
            guesses.append(replace(acts[-1], a=torch.as_tensor(a)))
        return guesses

    def _coupled(
        self, u: np.ndarray, dt: float, matrices: list[sp.csr_matrix], loads: list[np.ndarray]
    ) -> list[np.ndarray]:
        """Stage states by one sparse factorisation, stages interleaved node by node."""
        A, s, n = tableau(len(loads)).A, len(loads), len(u)
        if self.factors is None or not self._always_alike or abs(self.factors[0] - dt) > ALIKE * dt:
            total = sp.identity(n * s, format="csr")
            for j, Q in enumerate(matrices):
                column = np.zeros((s, s))
                column[:, j] = A[:, j]
                total = total - dt * sp.kron(Q, column, format="csr")
            self.factors = dt, factorize(total)
        right = np.stack([u + dt * sum(A[i, j] * loads[j] for j in range(s)) for i in range(s)], 1)
        x = self.factors[1].solve(right.reshape(n * s, 1)).reshape(n, s, 1)
        return [x[:, j] for j in range(s)]

    @property
    def _always_alike(self) -> bool:
        """Whether the equation is linear with coefficients that never change: one factorisation does for all steps."""
        return self.bellman.linear and self.bellman.coefficients.autonomous


class ExplicitPolicyStep:
    """The classical Runge–Kutta step with the best policy at every stage."""

    def __init__(self, bellman: Bellman) -> None:
        self.bellman, self.iterations, self.unsettled = bellman, 0, 0.0

    def bound(self, t: float, act: Act) -> float:
        """Largest stable step for the present policy."""
        bellman = self.bellman
        local = bellman.local(t, act.a)
        faces = bellman._face_data(t)
        real, imaginary = bellman.scheme.stiffness(bellman.grid, bellman.box, local, faces, bellman.metric)
        return STEPPERS["rk4"].largest_step(real, imaginary)

    def __call__(self, t: float, dt: float, V: np.ndarray, acts: list[Act]) -> tuple[np.ndarray, list[Act]]:
        """V (free part) at t − dt from V at t."""
        bellman, act = self.bellman, acts[-1]
        slopes: list[np.ndarray] = []
        for c in (0.0, 0.5, 0.5, 1.0):
            Y = V + c * dt * slopes[-1] if slopes else V
            act = Act(bellman.improve(t - c * dt, bellman.full(Y, t - c * dt), act).a)
            slopes.append(bellman.rate(t - c * dt, Y, act))
            self.iterations += 1
        k1, k2, k3, k4 = slopes
        V = V + dt / 6.0 * (k1 + 2.0 * k2 + 2.0 * k3 + k4)
        stop = None
        if bellman.problem.obstacle is not None:
            wall = bellman.problem.stopping(t - dt, bellman.x).detach().numpy()[:, None]
            stop = (bellman.problem.sign * (V - wall) > 0)[:, 0]
            V = bellman.free(np.where(stop[:, None], wall, V))
        return V, [Act(act.a, stop)]


@dataclass(frozen=True)
class Settled:
    """Where policy iteration ended: states, their policies, iterations, and what V still changed by (absolute).

    ``changes`` are those from one policy to the next, relative to V; ``average`` the long-run cost of ergodic problems.
    """

    states: list[np.ndarray]
    acts: list[Act]
    count: int
    change: float
    changes: tuple[float, ...] = ()
    average: float | None = None


def iterate(
    solve: Callable[[list[Act]], list[np.ndarray]],
    improve: Callable[[list[np.ndarray], list[Act], int], list[Act]],
    acts: list[Act],
    close: float = POLICY_CHANGE,
    like: Sequence[float] | None = None,
) -> Settled:
    """Policy iteration (Howard 1960): solve for the policies, improve them, until V no longer changes.

    It always ends: controls that go back and forth stay where they are (they are worth the same there, or the
    discrete problem has no fixed point), and what V still changes by in the end is told.

    Raises
    ------
    NotConvergedError
        If V is infinite.
    """
    before: list[np.ndarray] | None = None
    older: list[Act] | None = None
    moved, changes = np.inf, list[float]()
    for count in range(1, POLICY_ITERATIONS + 1):
        states = solve(acts)
        if not all(np.isfinite(V).all() for V in states):
            raise NotConvergedError("policy iteration met an infinite value")
        if before is not None:
            moved = max(float(np.abs(V - W).max()) for V, W in zip(states, before, strict=True))
            changes.append(max(_change(V, W) for V, W in zip(states, before, strict=True)))
            if changes[-1] <= close or _expected(changes, like) <= close:
                return Settled(states, acts, count, 0.0, tuple(changes))
        better = improve(states, acts, count)
        if count > STAY and older is not None:
            better = [_kept(new, now, old) for new, now, old in zip(better, acts, older, strict=True)]
        if all(_same(p, q) for p, q in zip(acts, better, strict=True)):
            return Settled(states, acts, count, 0.0 if count <= STAY or before is None else moved, tuple(changes))
        older, acts, before = acts, better, states
    return Settled(states, acts, POLICY_ITERATIONS, moved, tuple(changes))


def _expected(changes: Sequence[float], like: Sequence[float] | None) -> float:
    """Most that the next policy is expected to change, where that shrinks superlinearly as in Newton's method.

    ``like`` are the changes of an iteration as this one, such as that of the time step before; None: policies may jump,
    and nothing is expected.
    """
    if like is None:
        return np.inf
    if len(changes) > 1:
        return changes[-1] ** 2 / max(changes[-2], 1e-300)
    if len(like) > 1 and changes[0] <= 2.0 * like[0]:
        return changes[0] * like[1] / max(like[0], 1e-300)
    return np.inf


def _change(V: np.ndarray, W: np.ndarray) -> float:
    """Largest change relative to V around the node: values may be of other orders of magnitude far away."""
    size = maximum_filter1d(np.abs(V[:, 0]), 2 * (len(V) // AROUND) + 1) + 1e-300
    return float((np.abs(V - W)[:, 0] / size).max(initial=0.0))


def _kept(new: Act, now: Act, old: Act) -> Act:
    """The new policy, but where it goes back to the one before the present one the present one stays."""
    back = (new.a == old.a).all(-1) & (now.a != old.a).any(-1)
    stop = new.stop
    if stop is not None and now.stop is not None and old.stop is not None:
        stop = np.where((stop == old.stop) & (now.stop != old.stop), now.stop, stop)
    return Act(torch.where(back[:, None], now.a, new.a), stop, new.bent)


def _same(p: Act, q: Act) -> bool:
    bent = p.bent is not q.bent
    stops = p.stop is None or q.stop is None or np.array_equal(p.stop, q.stop)
    return torch.equal(p.a, q.a) and stops and not bent


def solve_stationary(bellman: Bellman, start: Act | None = None) -> tuple[np.ndarray, Settled]:
    """V with min_a (Q(a) V + r(a)) = 0 by policy iteration, and how that ended.

    Begun with a policy of a coarser grid it takes few: otherwise the edge of a stopping set moves a node in each.

    Raises
    ------
    InputError
        If nothing holds the solution: no absorbing or elastic face and no killing.
    """
    if bellman.problem.ergodic:
        return _solve_ergodic(bellman, start)

    def solve(acts: list[Act]) -> list[np.ndarray]:
        operator, load, _ = bellman.assemble(0.0, acts[0])
        return [factorize(anchored(operator.matrix, bellman.fixed)).solve(-np.asarray(load))]

    def improve(states: list[np.ndarray], acts: list[Act], count: int) -> list[Act]:
        better = bellman.improve(0.0, bellman.full(states[0], 0.0), acts[0])
        return [replace(better, bent=acts[0].bent) if count > HOLD else better]

    settled = iterate(solve, improve, [bellman.start() if start is None else start])
    V = bellman.full(settled.states[0], 0.0)
    bellman.check(0.0, V, settled.acts[0])
    return V, settled


def _solve_ergodic(bellman: Bellman, start: Act | None) -> tuple[np.ndarray, Settled]:
    """V, zero at the node in the middle, and the average λ with min_a (Q(a) V + r(a)) = λ: the unknown of that node."""
    size = bellman.grid.size
    middle = int(np.ravel_multi_index([n // 2 for n in bellman.grid.shape], bellman.grid.shape))
    if bellman.fixed is not None:
        raise InputError("box", bellman.box, "no absorbing face where the long-run average is wanted")
    others = sp.diags((np.arange(size) != middle).astype(float))
    column = sp.coo_matrix((np.full(size, -1.0), (np.arange(size), np.full(size, middle))), shape=(size, size))
    average = 0.0

    def solve(acts: list[Act]) -> list[np.ndarray]:
        nonlocal average
        operator, load, _ = bellman.assemble(0.0, acts[0])
        V = factorize(sp.csr_matrix(operator.matrix @ others + column)).solve(-np.asarray(load))
        average = float(V[middle, 0])
        V[middle] = 0.0
        return [V]

    def improve(states: list[np.ndarray], acts: list[Act], count: int) -> list[Act]:
        better = bellman.improve(0.0, states[0], acts[0])
        return [replace(better, bent=acts[0].bent) if count > HOLD else better]

    settled = iterate(solve, improve, [bellman.start() if start is None else start])
    bellman.check(0.0, settled.states[0], settled.acts[0])
    return settled.states[0], replace(settled, average=average)
