"""Time steps and stationary solutions of the Hamilton–Jacobi–Bellman equation, by policy iteration."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from scipy.linalg import lapack
from scipy.ndimage import maximum_filter1d

from kolmo.control.bellman import AROUND, Act, Bellman
from kolmo.errors import InputError, NotConvergedError
from kolmo.kernels.linear import factorize
from kolmo.schemes.central import TensorStencil
from kolmo.schemes.monotone import JumpStencil
from kolmo.stationary import anchored
from kolmo.steppers.base import STEPPERS
from kolmo.steppers.radau import CoupledStep, tableau

# Policy iterations of one step or stationary solve, and the change of V (relative to its size) at which they end.
POLICY_ITERATIONS = 50
POLICY_CHANGE = 1e-11
# Policy iterations after which the load that belongs to kinks is held, and controls that go back and forth stay.
HOLD, STAY = 15, 35
# Time steps that differ by this part of their size are the same.
ALIKE = 1e-9


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
        self.step: CoupledStep | None = None
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
            return self._coupled(dt, [p[0] for p in parts]).stages(V, [p[1] for p in parts])

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

    def _coupled(self, dt: float, operators: list[Any]) -> CoupledStep:
        """The step for the operators of its stages; one does for all steps where coefficients never change."""
        alike = self.bellman.linear and self.bellman.coefficients.autonomous
        if self.step is None or not alike or abs(self.step.dt - dt) > ALIKE * dt:
            self.step = CoupledStep(tableau(len(operators)), operators, dt)
        return self.step


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
    stops = p.stop is None or q.stop is None or np.array_equal(p.stop, q.stop)
    return torch.equal(p.a, q.a) and stops and p.bent is q.bent


def solve_stationary(bellman: Bellman, start: Act | None = None) -> tuple[np.ndarray, Settled]:
    """V with min_a (Q(a) V + r(a)) = 0 by policy iteration, and how that ended.

    Begun with a policy of a coarser grid it takes few: otherwise the edge of a stopping set moves a node in each.

    Raises
    ------
    InputError
        If nothing holds the solution: no absorbing or elastic face and no killing.
    """
    average = _Average(bellman) if bellman.problem.ergodic else None

    def solve(acts: list[Act]) -> list[np.ndarray]:
        operator, load, _ = bellman.assemble(0.0, acts[0])
        Q, right = operator.matrix, -np.asarray(load)
        return [factorize(anchored(Q, bellman.fixed)).solve(right) if average is None else average.solve(Q, right)]

    def improve(states: list[np.ndarray], acts: list[Act], count: int) -> list[Act]:
        better = bellman.improve(0.0, bellman.full(states[0], 0.0), acts[0])
        return [replace(better, bent=acts[0].bent) if count > HOLD else better]

    settled = iterate(solve, improve, [bellman.start() if start is None else start])
    V = bellman.full(settled.states[0], 0.0)
    bellman.check(0.0, V, settled.acts[0])
    return V, settled if average is None else replace(settled, average=average.value)


class _Average:
    """The average λ with Q V + r = λ, where V is zero at the node in the middle: it is the unknown of that node."""

    def __init__(self, bellman: Bellman) -> None:
        if bellman.fixed is not None:
            raise InputError("box", bellman.box, "no absorbing face where the long-run average is wanted")
        size, shape = bellman.grid.size, bellman.grid.shape
        self.middle = int(np.ravel_multi_index([n // 2 for n in shape], shape))
        self.value, nodes, same = 0.0, np.arange(size), np.full(size, self.middle)
        self.others = sp.diags((nodes != self.middle).astype(float))
        self.column = sp.coo_matrix((np.full(size, -1.0), (nodes, same)), shape=(size, size))

    def solve(self, Q: sp.csr_matrix, right: np.ndarray) -> np.ndarray:
        """V for the right side −r."""
        V = factorize(sp.csr_matrix(Q @ self.others + self.column)).solve(right)
        self.value = float(V[self.middle, 0])
        V[self.middle] = 0.0
        return V
