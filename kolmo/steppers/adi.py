"""Alternating directions with mixed derivatives: the modified Craig–Sneyd scheme."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from kolmo.arrays import Array, is_tensor, namespace
from kolmo.errors import InputError
from kolmo.kernels.linear import Factorization, LineSolver, RenewedLineSolver
from kolmo.kernels.splitting import split_step, split_step_shares, split_step_transposed
from kolmo.schemes.base import Split, Together
from kolmo.steppers.base import STEPPERS, Operator, Repeated, Step, Unbounded
from kolmo.steppers.dual import DualStencil, NestedFactors, halves

# Bytes of an axis' factors up to which they are kept: read from memory they are hardly faster than made anew.
FACTORS_KEPT = 16_000_000


class SplitStep(Repeated):
    """One modified Craig–Sneyd step; part 0 holds mixed derivatives and loads, part i the derivatives along axis i."""

    def __init__(self, start: "_Parts", end: "_Parts", dt: float, theta: float) -> None:
        self.dt, self.theta, self.start, self.end = dt, theta, start, end
        self.axes = range(1, len(self.end.stencils))
        self._solvers: dict[int, Any] = {j: self.end.line_solver(j - 1, theta * dt) for j in self.axes}

    def _sweep(self, y: Array, f: list[Array]) -> list[Array]:
        """The implicit corrections along each axis in turn; returns the states after each."""
        states = []
        for j in self.axes:
            y = self._solvers[j].solve(y - self.theta * self.dt * f[j])
            states.append(y)
        return states

    def _compiles(self, u: Array) -> bool:
        """Whether the compiled step takes a state."""
        return self.end.compiled and not is_tensor(u)

    def _states(self, u: Array, loads: Sequence[Array], kept: tuple[int, int]) -> np.ndarray:
        """States of the two sweeps after each axis, shape (k, 2, d, size), or only the last one, kept = (1, 1)."""
        size, count = u.shape
        states = np.empty((count, *kept, size))
        operators, rule = (self.start.kernel, self.end.kernel), (self.dt, self.theta)
        solvers = tuple(self._solvers[j].kernel for j in self.axes)
        for m in range(count):
            mine = tuple(np.ascontiguousarray(load[:, m]) for load in loads)
            split_step(operators, solvers, mine, rule, np.ascontiguousarray(u[:, m]), states[m])
        return states

    def _adjoints(self, p: np.ndarray) -> list[tuple[np.ndarray, ...]]:
        """For every column the derivatives that ``split_step_transposed`` finds: of u, the parts, and the solves."""
        size, d = len(p), len(self.axes)
        operators, rule = (self.start.back, self.end.back), (self.dt, self.theta)
        solvers = tuple(self._solvers[j].kernel for j in self.axes)
        found: list[tuple[np.ndarray, ...]] = []
        for column in p.T:
            shapes = (size,), (1 + d, size), (1 + d, size), (2, d, size)
            found.append(tuple(np.empty(shape) for shape in shapes))
            given = np.array(column)
            split_step_transposed(operators, self.end.kernel, solvers, rule, self.end.held, given, found[-1])
        return found

    def _swept(self, u: Array, loads: Sequence[Array]) -> tuple[list[Array], list[Array]]:
        """The same in torch and for dual numbers, part by part."""
        dt, theta = self.dt, self.theta
        f = self.start.apply(u)
        f[0] = f[0] + loads[0]
        total = sum(f[1:], f[0])
        y0 = u + dt * total
        first = self._sweep(y0, f)
        g = self.end.apply(first[-1])
        g[0] = g[0] + loads[1]
        again = y0 + theta * dt * (g[0] - f[0]) + (0.5 - theta) * dt * (sum(g[1:], g[0]) - total)
        return first, self._sweep(again, f)

    def apply(self, u: Array, loads: Sequence[Array]) -> Array:
        """The state after the step."""
        if not self._compiles(u):
            return self._swept(u, loads)[1][-1]
        return np.ascontiguousarray(self._states(u, loads, (1, 1))[:, 0, 0].T)

    def _sweep_back(self, z: Array, df: list[Array]) -> tuple[Array, list[Array]]:
        """Transpose of a sweep; adds to the derivatives of f and returns those of the solves."""
        solved: list[Array] = []
        for j in reversed(self.axes):
            z = self._solvers[j].solve(z, transposed=True)
            df[j] = df[j] - self.theta * self.dt * z
            solved.insert(0, z)
        return z, solved

    def _transposed(self, p: Array) -> tuple[Array, list[Array], list[Array], list[list[Array]]]:
        """Derivatives of u, of the parts at start (f) and end (g), and of the solves of the two sweeps."""
        dt, theta = self.dt, self.theta
        df = [namespace(p).zeros_like(p) for _ in self.start.stencils]
        z, second = self._sweep_back(p, df)
        dy0 = z
        dg = [(0.5 - theta) * dt * z for _ in df]
        dg[0] = dg[0] + theta * dt * z
        df = [d - (0.5 - theta) * dt * z for d in df]
        df[0] = df[0] - theta * dt * z
        y, first = self._sweep_back(self.end.apply_transposed(dg), df)
        dy0 = dy0 + y
        df = [d + dt * dy0 for d in df]
        return dy0 + self.start.apply_transposed(df), df, dg, [first, second]

    def apply_transposed(self, p: Array) -> tuple[Array, list[Array]]:
        """Transposed step and the derivatives of the loads."""
        if self._compiles(p):
            return _of_columns(self._adjoints(p))
        back, df, dg, _ = self._transposed(p)
        return back, [df[0], dg[0]]

    def pullback(self, u: Array, loads: Sequence[Array], p: Array) -> tuple[Array, list[Array], list[Array]]:
        """Derivatives with respect to state, loads and stencil numbers at start and end."""
        if self._compiles(p):
            found = self._adjoints(p)
            return *_of_columns(found), self._shares(u, loads, found)
        back, df, dg, solves = self._transposed(p)
        first, second = self._swept(u, loads)
        start = self.start.pullback(df, u)
        end = self.end.pullback(dg, first[-1])
        for adjoints, states in zip(solves, (first, second), strict=True):
            for j, q, y in zip(self.axes, adjoints, states, strict=True):
                end = end + self.end.pullback_part(j, self.theta * self.dt * q, y)
        return back, [df[0], dg[0]], [start, end]

    def _shares(self, u: np.ndarray, loads: Sequence[np.ndarray], adjoints: Any) -> list[Array]:
        """Derivatives with respect to the stencil numbers, by the compiled step."""
        states = self._states(u, loads, (2, len(self.axes)))
        tables, shared = (self.start.kernel[0], self.end.kernel[0]), tuple(map(self._nothing, (self.start, self.end)))
        wanted = self.end.wanted
        for column, mine, adjoint in zip(u.T, states, adjoints, strict=True):
            split_step_shares(tables, (self.dt, self.theta), np.array(column), mine, adjoint, wanted, shared)
        return [v.operator.stencil.uncommon(d) for v, d in zip((self.start, self.end), shared, strict=True)]

    @staticmethod
    def _nothing(part: "_Parts") -> np.ndarray:
        """Derivatives of the numbers that the parts share, to be added to."""
        return np.zeros_like(part.kernel[1])


def _of_columns(adjoints: list[tuple[np.ndarray, ...]]) -> tuple[np.ndarray, list[np.ndarray]]:
    """The transposed step and the derivatives of the loads, of columns of adjoints."""
    back, start, end = ([v[k] if k == 0 else v[k][0] for v in adjoints] for k in range(3))
    return _fields(back), [_fields(start), _fields(end)]


def _fields(columns: list[np.ndarray]) -> np.ndarray:
    """Columns as a field (size, k)."""
    return np.ascontiguousarray(np.stack(columns, 1))


class _Parts:
    """An operator split by axis: the mixed part first."""

    def __init__(self, operator: Operator) -> None:
        if not isinstance(operator.stencil, Split):
            raise InputError("stepper", "'mcs' with a scheme that does not split by axis", "a central scheme")
        self.operator = operator
        self.stencils, _, self._spread = operator.stencil.split(operator.a)

    @cached_property
    def compiled(self) -> bool:
        """Whether the compiled step knows the stencil: not that of dual numbers, nor of jumps."""
        return isinstance(self.operator.stencil, Together)

    @cached_property
    def kernel(self) -> tuple[Any, ...]:
        """Tables and their common numbers for the compiled step."""
        return self.operator.stencil.together(self.stencils), self.operator.stencil.common(self.operator.a)

    @cached_property
    def back(self) -> tuple[Any, ...]:
        """The same for its transpose."""
        return self.operator.stencil.together(self.stencils, transposed=True), self.kernel[1]

    @cached_property
    def held(self) -> tuple[Any, ...]:
        """What is free, and work spaces, for the transpose."""
        free = self.operator.free
        return np.zeros(0) if free is None else free.ravel(), self.stencils[0].fused.spaces

    @cached_property
    def wanted(self) -> np.ndarray:
        """Rows of the common numbers whose derivatives are asked for: not those of the zeros."""
        active, terms = self.operator.active, len(self.operator.a)
        return np.append(np.ones(terms, dtype=bool) if active is None else active, [True, False])

    @cached_property
    def numbers(self) -> list[Array]:
        """Numbers of each part, as large as those of the operator: only where they are asked for."""
        return self.operator.stencil.split(self.operator.a)[1]  # type: ignore[no-any-return]

    def apply(self, u: Array) -> list[Array]:
        return [s.apply(a, u) for s, a in zip(self.stencils, self.numbers, strict=True)]

    def apply_transposed(self, p: list[Array]) -> Array:
        total = sum(s.apply_transposed(a, q) for s, a, q in zip(self.stencils, self.numbers, p, strict=True))
        return total if self.operator.free is None else total * self.operator.free

    def pullback(self, p: list[Array], u: Array) -> Array:
        return sum(self.pullback_part(j, q, u) for j, q in enumerate(p))

    def pullback_part(self, j: int, p: Array, u: Array) -> Array:
        """Derivative of ⟨p, part j of Q u⟩ with respect to all numbers of Q."""
        return self._spread(j, self.stencils[j].pullback(p, u))

    def line_solver(self, axis: int, scale: float) -> Factorization:
        """Factors of I − scale × the part along an axis."""
        stencil = self.stencils[axis + 1]
        free, fixed = self.operator.free, self.operator.fixed
        if isinstance(stencil, DualStencil):
            free, fixed = (None if v is None else halves(v)[0] for v in (free, fixed))
            numbers = self.numbers[axis + 1]
            tangent = Operator(stencil.stencil, numbers[1], fixed).matrix
            return NestedFactors(_line_solver(stencil.stencil, numbers[0], axis, scale, free), -scale * tangent)
        widths = stencil.widths(axis)
        small = 8 * math.prod(stencil.shape) * (sum(widths) + 1) <= FACTORS_KEPT
        # terms that act only at walls are not among what is made anew
        if small or not self.compiled or is_tensor(self.operator.a) or len(stencil.fused.table[-1][0]) > 0:
            return _line_solver(stencil, self.numbers[axis + 1], axis, scale, free)
        part = self.kernel[0][axis + 1], self.kernel[1]
        mask = np.zeros(0) if free is None else free.ravel()
        return RenewedLineSolver(part, (3 - len(stencil.shape) + axis, *widths, scale), mask)


def _line_solver(stencil: Any, numbers: Array, axis: int, scale: float, free: Array | None) -> LineSolver:
    """Factors of I − scale × a stencil whose terms act along one axis."""
    band, below = stencil.bands(numbers, axis, free)
    band *= -scale
    band[:, below] += 1.0
    return LineSolver(band, below, stencil.shape, axis)


class ExtrapolatedStep(Repeated):
    """Two half steps and one whole one, combined 4 : −1 over 3: a linear map of one order more."""

    def __init__(self, whole: SplitStep, first: SplitStep, second: SplitStep) -> None:
        self.whole, self.first, self.second = whole, first, second

    def apply(self, u: Array, loads: Sequence[Array]) -> Array:
        """The state after the step; loads at start, middle and end."""
        r0, r1, r2 = loads
        halves = self.second.apply(self.first.apply(u, [r0, r1]), [r1, r2])
        return (4.0 * halves - self.whole.apply(u, [r0, r2])) / 3.0

    def apply_transposed(self, p: Array) -> tuple[Array, list[Array]]:
        """Transposed step and the derivatives of the loads."""
        a, (a0, a2) = self.whole.apply_transposed(-p / 3.0)
        b, (b1, b2) = self.second.apply_transposed(4.0 * p / 3.0)
        c, (c0, c1) = self.first.apply_transposed(b)
        return a + c, [a0 + c0, b1 + c1, a2 + b2]

    def pullback(self, u: Array, loads: Sequence[Array], p: Array) -> tuple[Array, list[Array], list[Array]]:
        """Derivatives with respect to state, loads and stencil numbers at start, middle and end."""
        r0, r1, r2 = loads
        a, (a0, a2), wholes = self.whole.pullback(u, [r0, r2], -p / 3.0)
        middle = self.first.apply(u, [r0, r1])
        b, (b1, b2), seconds = self.second.pullback(middle, [r1, r2], 4.0 * p / 3.0)
        c, (c0, c1), firsts = self.first.pullback(u, [r0, r1], b)
        return (
            a + c,
            [a0 + c0, b1 + c1, a2 + b2],
            [wholes[0] + firsts[0], seconds[0] + firsts[1], wholes[1] + seconds[1]],
        )


@dataclass(frozen=True)
class ModifiedCraigSneyd(Unbounded):
    """Modified Craig–Sneyd scheme: order 2, or 3 by local extrapolation; one banded solve per axis and sweep.

    Unconditionally stable for pure diffusion with mixed derivatives in two dimensions (θ = 1/3); in three, in practice.

    Source: in 't Hout & Welfert 2009 (Appl. Numer. Math. 59), θ = 1/3 for two axes with mixed derivatives.
    """

    extrapolated: bool = False
    theta: float = 1.0 / 3.0
    implicit: bool = True
    kept: int = 1

    @property
    def name(self) -> str:
        """Name in the registry."""
        return "mcs3" if self.extrapolated else "mcs"

    @property
    def order(self) -> int:
        """Order of accuracy."""
        return 3 if self.extrapolated else 2

    @property
    def nodes(self) -> tuple[float, ...]:
        """Coefficients are needed at the ends of the step (and in the middle, if extrapolated)."""
        return (0.0, 0.5, 1.0) if self.extrapolated else (0.0, 1.0)

    def prepare(self, operators: Sequence[Operator], dt: float) -> Step:
        """Factorise the lines along every axis."""
        parts = {id(op): _Parts(op) for op in operators}
        if not self.extrapolated:
            start, end = (parts[id(op)] for op in operators)
            return SplitStep(start, end, dt, self.theta)
        start, middle, end = (parts[id(op)] for op in operators)
        first = SplitStep(start, middle, 0.5 * dt, self.theta)
        second = first if start is middle and middle is end else SplitStep(middle, end, 0.5 * dt, self.theta)
        return ExtrapolatedStep(SplitStep(start, end, dt, self.theta), first, second)


for _extrapolated in (False, True):
    STEPPERS.add(ModifiedCraigSneyd(_extrapolated).name, ModifiedCraigSneyd(_extrapolated))
