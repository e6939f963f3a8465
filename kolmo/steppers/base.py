"""What a stepper is: a linear map with three faces."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import scipy.sparse as sp

from kolmo.arrays import Array, Held, empty, fresh
from kolmo.kernels.linear import BandedLU, Factorization, factorize
from kolmo.registry import Registry
from kolmo.schemes.base import Banded

# Stages times diagonals of systems of several stages that are solved as a band. Measured with three stages and with
# differences that are one-sided at the ends (48), 60 to 700 nodes: 6 ms a step in place of 15 ms by sparse products.
WIDE = 100


@dataclass(frozen=True, eq=False)
class Operator:
    """Q with its numbers, acting on the free nodes only: fields are zero at fixed nodes before and after.

    Attributes
    ----------
    stencil : Stencil
        The stencils.
    a : array
        The numbers in them.
    fixed : ndarray of bool or None, shape (size,)
        Nodes on absorbing faces.
    active : ndarray of bool or None, shape (terms,)
        Numbers whose derivatives are wanted; None: all. The others' may be left zero.
    mask : Held or None
        One at free nodes and zero at fixed ones, shape (size, 1), where it is at hand already.
    """

    stencil: Any
    a: Array
    fixed: np.ndarray | None
    active: np.ndarray | None = None
    mask: Held | None = None

    def apply(self, u: Array) -> Array:
        """Q u for u zero at fixed nodes."""
        return self.stencil.apply(self.a, u)

    def apply_transposed(self, p: Array) -> Array:
        """Qᵀ p, with zeros put at fixed nodes."""
        q = self.stencil.apply_transposed(self.a, p)
        return q if self.free is None else q * self.free

    @cached_property
    def free(self) -> Array | None:
        """One at free nodes and zero at fixed ones, shape (size, 1); None where all are free."""
        mask = self.mask or mask_of(self.fixed)
        return None if mask is None else mask.like(self.a)

    @cached_property
    def matrix(self) -> sp.csr_matrix:
        """Q with the columns of fixed nodes removed, as a sparse matrix."""
        Q = self.stencil.matrix(np.asarray(self.a))
        return Q if self.fixed is None else sp.csr_matrix(Q @ sp.diags((~self.fixed).astype(float)))

    @cached_property
    def _band(self) -> tuple[np.ndarray, int, int] | None:
        """Q in band storage, with room for factors and the numbers of its diagonals; None where that does not pay."""
        return self.stencil.band(np.asarray(self.a), self.fixed) if isinstance(self.stencil, Banded) else None

    def shifted(self, scale: complex) -> Factorization:
        """Factors of I − scale Q."""
        if self._band is None:
            return self.system([self], [np.array([[scale]])])
        band, below, above = self._band
        band = -scale * band
        band[below + above] += 1.0
        return BandedLU(band, below, above)

    @property
    def primal(self) -> "Operator":
        """The operator itself (of one over dual numbers: the part that is no tangent)."""
        return self

    @classmethod
    def system(cls, operators: "Sequence[Operator]", columns: Sequence[np.ndarray]) -> Factorization:
        """Factors of I − Σ_j Q_j ⊗ C_j; unknowns are interleaved node by node, so that a band matrix stays one."""
        bands = [operator._band for operator in operators if operator._band is not None]
        widths = {(below, above) for _, below, above in bands}
        if len(bands) == len(operators) and len(widths) == 1:
            below, above = widths.pop()
            if len(columns[0]) * (below + above + 2) <= WIDE:
                return BandedLU.coupled([band for band, _, _ in bands], below, above, columns)
        total = sp.identity(operators[0].matrix.shape[0] * len(columns[0]), format="csr")
        for operator, column in zip(operators, columns, strict=True):
            total = total - sp.kron(operator.matrix, column, format="csr")
        return factorize(total)


def mask_of(fixed: np.ndarray | None) -> Held | None:
    """One at nodes that are free, zero at those that are fixed, shape (size, 1); None where all are free."""
    return None if fixed is None else Held((~fixed).astype(float)[:, None])


class Step(Protocol):
    """A prepared step from t to t − dt: u ↦ S u + Σ_j L_j r_j, linear in the state and the stage loads."""

    def apply(self, u: Array, loads: Sequence[Array]) -> Array:
        """The state after the step; one load per node."""
        ...

    def apply_transposed(self, p: Array) -> tuple[Array, list[Array]]:
        """Sᵀ p and, per node, the derivative with respect to its load."""
        ...

    def pullback(self, u: Array, loads: Sequence[Array], p: Array) -> tuple[Array, list[Array], list[Array]]:
        """As ``apply_transposed``, and per node the derivative of ⟨p, step⟩ with respect to the stencil numbers."""
        ...

    def apply_many(
        self, u: Array, loads: Sequence[Array], count: int, keep: list[Array] | None = None, stages: bool = False
    ) -> Array:
        """The state after several equal steps; ``keep`` gets one array with what ``pullback_many`` needs of them.

        With ``stages`` that may hold the states of stages too, else only the state before each step.
        """
        ...

    def pullback_many(self, kept: Array, loads: Sequence[Array], p: Array) -> tuple[Array, list[Array], list[Array]]:
        """As ``pullback``, over equal steps of which so much was kept; derivatives are summed."""
        ...


class Repeated:
    """Several equal steps, taken one by one."""

    def loaded(self: Any, loads: Sequence[Array]) -> Callable[[Array], Array]:
        """The step with these loads, as a function of the state: what does not depend on the state is done once."""
        return lambda u: self.apply(u, loads)

    def apply_many(
        self, u: Array, loads: Sequence[Array], count: int, keep: list[Array] | None = None, stages: bool = False
    ) -> Array:
        """The state after ``count`` steps; ``keep`` gets the states before them in one array."""
        before, advance = None if keep is None else empty((count, *u.shape), u), self.loaded(loads)
        for step in range(count):
            if before is not None:
                before[step] = u
            u = advance(u)
        if keep is not None:
            keep.append(before)
        return u

    def pullback_many(
        self: Step, kept: Array, loads: Sequence[Array], p: Array
    ) -> tuple[Array, list[Array], list[Array]]:
        """As ``pullback`` over steps from the states kept, the last one first; derivatives are summed."""
        total: tuple[list[Array], list[Array]] | None = None
        for step in reversed(range(len(kept))):
            p, *parts = self.pullback(kept[step], loads, p)
            if total is None:
                total = [fresh(v) for v in parts[0]], [fresh(v) for v in parts[1]]
                continue
            for sums, part in zip(total, parts, strict=True):
                for j, v in enumerate(part):
                    sums[j] += v
        return p, *(total or ([], []))


def gather(adjoints: Sequence[Array], nodes: Sequence[int]) -> list[Array]:
    """Sum what belongs to stages into what belongs to their nodes."""
    total: list[Array] = [None] * (max(nodes) + 1)
    for adjoint, node in zip(adjoints, nodes, strict=True):
        total[node] = adjoint if total[node] is None else total[node] + adjoint
    return total


class Stepper(Protocol):
    """A one-step method, found by name in ``STEPPERS``."""

    @property
    def name(self) -> str:
        """Name in the registry."""
        ...

    @property
    def order(self) -> int:
        """Order of accuracy."""
        ...

    @property
    def implicit(self) -> bool:
        """Whether a step solves linear systems."""
        ...

    @property
    def kept(self) -> int:
        """States that a step keeps for its pullback where memory allows: 1, or one for each stage."""
        ...

    @property
    def nodes(self) -> tuple[float, ...]:
        """Where in the step (fraction from its start, backwards in time) coefficients and loads are needed."""
        ...

    def prepare(self, operators: Sequence[Operator], dt: float) -> Step:
        """Make the step for the operators at the nodes; all the same object when coefficients are constant."""
        ...

    def largest_step(self, real: float, imaginary: float) -> float:
        """Stability bound on dt for a spectrum of the given extent; infinite for L-stable methods."""
        ...


class Unbounded:
    """A stepper that is stable for steps of any length."""

    def largest_step(self, real: float, imaginary: float) -> float:
        """No bound."""
        return float("inf")


STEPPERS: Registry[Stepper] = Registry("stepper")
