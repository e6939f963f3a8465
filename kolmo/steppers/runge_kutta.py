"""The classical explicit Runge–Kutta method of order 4: matrix-free, any dimension, steps bounded by stability."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from kolmo.arrays import Array, is_tensor
from kolmo.kernels.tensor import Fused
from kolmo.schemes.base import Compiled
from kolmo.steppers.base import STEPPERS, Operator, Repeated, Step, gather

# Nodes of the four stages: the second and third share the middle.
STAGE_NODES = (0, 1, 1, 2)


class ExplicitStep(Repeated):
    """One classical Runge–Kutta step of u' = Q u + r in backward time."""

    def __init__(self, operators: Sequence[Operator], dt: float) -> None:
        self.start, self.middle, self.end = operators
        self.dt = dt

    def apply(self, u: Array, loads: Sequence[Array], states: list[Array] | None = None) -> Array:
        """The state after the step, with as few fresh arrays as can be; ``states`` gets those of the later stages."""
        dt, (r0, r1, r2) = self.dt, loads
        total = self.start.apply(u)
        total += r0
        y = total * (0.5 * dt)
        for operator, load, next_step in ((self.middle, r1, 0.5 * dt), (self.middle, r1, dt), (self.end, r2, 0.0)):
            y += u
            if states is not None:
                states.append(y)
            k = operator.apply(y)
            k += load
            total += k
            if next_step:
                total += k
            k *= next_step
            y = k
        total *= dt / 6.0
        total += u
        return total

    def apply_transposed(self, p: Array) -> tuple[Array, list[Array]]:
        """Transposed step and the derivatives of the loads."""
        back, stages = self._transposed(p)
        return back, gather(stages, STAGE_NODES)

    def pullback(self, u: Array, loads: Sequence[Array], p: Array) -> tuple[Array, list[Array], list[Array]]:
        """Stage j meets Q only in Q Y_j, so its share is the stencil's pullback at Y_j."""
        back, stages = self._transposed(p)
        operators = (self.start, self.middle, self.middle, self.end)
        states = [u]
        self.apply(u, loads, states)
        numbers = [op.stencil.pullback(q, Y) for op, q, Y in zip(operators, stages, states, strict=True)]
        return back, gather(stages, STAGE_NODES), gather(numbers, STAGE_NODES)

    def _transposed(self, p: Array) -> tuple[Array, list[Array]]:
        dt = self.dt
        q4 = (dt / 6.0) * p
        z4 = self.end.apply_transposed(q4)
        q3 = (dt / 3.0) * p + dt * z4
        z3 = self.middle.apply_transposed(q3)
        q2 = (dt / 3.0) * p + (0.5 * dt) * z3
        z2 = self.middle.apply_transposed(q2)
        q1 = (dt / 6.0) * p + (0.5 * dt) * z2
        z1 = self.start.apply_transposed(q1)
        return p + z1 + z2 + z3 + z4, [q1, q2, q3, q4]


class FusedStep:
    """The same step by kernels that do a whole step in a call.

    Parameters
    ----------
    operators : sequence of Operator
        At the start, in the middle and at the end, with one tensor stencil.
    dt : float
        Length of the step.
    """

    def __init__(self, operators: Sequence[Operator], dt: float) -> None:
        self.operators, self.dt = operators, dt
        self.fused: Fused = operators[0].stencil.fused
        self.numbers = tuple(self.fused.numbers(op.a) for op in operators)

    @cached_property
    def _free(self) -> np.ndarray:
        fixed = self.operators[0].fixed
        return np.zeros(0) if fixed is None else (~fixed).astype(float)

    def apply(self, u: Array, loads: Sequence[Array]) -> Array:
        """The state after the step."""
        return self.apply_many(u, loads, 1)

    def apply_many(
        self, u: Array, loads: Sequence[Array], count: int, keep: list[Array] | None = None, stages: bool = False
    ) -> Array:
        """The state after ``count`` steps; ``keep`` gets the states before them, those of all stages if asked for."""
        kept = 0 if keep is None else 4 if stages else 1
        last, states = self.fused.runge_kutta(self.numbers, loads, u, self.dt, count, kept)
        if keep is not None:
            keep.append(states)
        return last

    def apply_transposed(self, p: Array) -> tuple[Array, list[Array]]:
        """Transposed step and the derivatives of the loads."""
        return self.fused.runge_kutta_transposed(self.numbers, p, self.dt, self._free)

    def pullback(self, u: Array, loads: Sequence[Array], p: Array) -> tuple[Array, list[Array], list[Array]]:
        """Derivatives with respect to state, loads and stencil numbers."""
        return self.pullback_many(u.T[:, None, None], loads, p)

    def pullback_many(self, kept: Array, loads: Sequence[Array], p: Array) -> tuple[Array, list[Array], list[Array]]:
        """The same over several steps, summed."""
        active = self.operators[0].active
        return self.fused.runge_kutta_pullback(self.numbers, loads, kept, p, self.dt, self._free, active)


@dataclass(frozen=True)
class RungeKutta4:
    """Classical Runge–Kutta method of order 4 (Kutta 1901).

    Positive on a monotone scheme for dt times the largest leaving rate ≤ 1.
    """

    name: str = "rk4"
    order: int = 4
    implicit: bool = False
    kept: int = 4

    @property
    def nodes(self) -> tuple[float, ...]:
        """Fractions of the step at which coefficients are needed; the middle one serves two stages."""
        return (0.0, 0.5, 1.0)

    def prepare(self, operators: Sequence[Operator], dt: float) -> Step:
        """Choose the kernels where they know the stencil."""
        stencil = operators[0].stencil
        one = all(op.stencil is stencil and not is_tensor(op.a) for op in operators)
        if one and isinstance(stencil, Compiled):
            return FusedStep(operators, dt)
        return ExplicitStep(operators, dt)

    def largest_step(self, real: float, imaginary: float) -> float:
        """Bound from the stability region: 2.6 over the hypotenuse of the spectrum's extents."""
        return 2.6 / max(math.hypot(real, imaginary), 1e-300)


STEPPERS.add("rk4", RungeKutta4())
