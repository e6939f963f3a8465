"""Radau IIA: implicit, L-stable, stiffly accurate, of order 1, 3 and 5."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from kolmo.arrays import Array, is_tensor
from kolmo.errors import InputError
from kolmo.kernels.linear import Factorization
from kolmo.steppers.base import STEPPERS, Operator, Repeated, Step, Unbounded


@dataclass(frozen=True)
class Tableau:
    """Butcher matrix A and nodes c of a collocation method, with the eigen-decomposition of A."""

    A: np.ndarray
    c: np.ndarray
    eigenvalues: np.ndarray
    T: np.ndarray
    T_inverse: np.ndarray


@lru_cache(maxsize=8)
def tableau(stages: int) -> Tableau:
    """Radau IIA with the given number of stages (Hairer & Wanner 1996, section IV.5).

    Examples
    --------
    >>> tableau(2).c.round(4).tolist()
    [0.3333, 1.0]
    """
    # nodes: roots of P_s − P_{s−1} shifted to [0, 1]
    legendre = np.polynomial.legendre.Legendre.basis(stages) - np.polynomial.legendre.Legendre.basis(stages - 1)
    c = np.sort((np.real(legendre.roots()) + 1.0) / 2.0)
    c[-1] = 1.0
    powers = np.arange(1, stages + 1)
    A = (c[:, None] ** powers / powers) @ np.linalg.inv(c[:, None] ** (powers - 1))
    values, T = np.linalg.eig(A)
    return Tableau(A, c, values, T, np.linalg.inv(T))


class CollocationStep(Repeated, ABC):
    """What the two kinds of Radau step share: stage j meets Q only in Q_j Y_j + r_j."""

    operators: Sequence[Operator]

    @abstractmethod
    def stages(self, u: Array, loads: Sequence[Array]) -> list[Array]:
        """Stage states Y_j."""

    @abstractmethod
    def apply_transposed(self, p: Array) -> tuple[Array, list[Array]]:
        """Transposed step and the derivatives of the loads."""

    def pullback(self, u: Array, loads: Sequence[Array], p: Array) -> tuple[Array, list[Array], list[Array]]:
        """Derivatives with respect to state, loads and stencil numbers."""
        back, adjoints = self.apply_transposed(p)
        stages = self.stages(u, loads)
        numbers = [op.stencil.pullback(q, Y) for op, q, Y in zip(self.operators, adjoints, stages, strict=True)]
        return back, adjoints, numbers


@dataclass(frozen=True)
class Mode:
    """One solve of a step with one operator, in the direction of an eigenvector of A.

    Attributes
    ----------
    weight : float
        2 for a conjugate pair, of which one is solved; else 1.
    scale : complex
        Step length times the eigenvalue.
    row, column : ndarray
        The row of T⁻¹ and the column of T.
    solver : Factorization
        Of I − scale Q.
    """

    weight: float
    scale: complex
    row: np.ndarray
    column: np.ndarray
    solver: Factorization

    @cached_property
    def total(self) -> Any:
        """Sum of the row."""
        return self.row.sum().item()


class ConstantStep(CollocationStep):
    """A Radau step with one operator: the stage system falls apart into one solve per eigenvalue of A."""

    def __init__(self, table: Tableau, operator: Operator, dt: float) -> None:
        self.dt, self.operators = dt, [operator] * len(table.c)
        self._modes = []
        for value, row, column in zip(table.eigenvalues, table.T_inverse, table.T.T, strict=True):
            if value.imag == 0:
                scale = dt * float(value.real)
                self._modes.append(Mode(1.0, scale, row.real, column.real, operator.shifted(scale)))
            elif value.imag > 0:
                self._modes.append(Mode(2.0, dt * value, row, column, operator.shifted(dt * value)))

    def _forcing(self, loads: Sequence[Array]) -> list[Array]:
        """What the loads add to the right side of each solve."""
        return [m.scale * sum(w * r for w, r in zip(m.row, loads, strict=True)) for m in self._modes]

    def _solutions(self, u: Array, forcing: list[Array]) -> list[Array]:
        return [m.solver.solve(m.total * u + f) for m, f in zip(self._modes, forcing, strict=True)]

    def _stage(self, j: int, solutions: list[Array]) -> Array:
        """State of a stage, from the solutions."""
        return sum(m.weight * np.real(m.column[j] * z) for m, z in zip(self._modes, solutions, strict=True))

    def stages(self, u: Array, loads: Sequence[Array]) -> list[Array]:
        """Stage states."""
        solutions = self._solutions(u, self._forcing(loads))
        return [self._stage(j, solutions) for j in range(len(self.operators))]

    def loaded(self, loads: Sequence[Array]) -> Callable[[Array], Array]:
        """The step with these loads, as a function of the state: the last stage."""
        forcing = self._forcing(loads)
        return lambda u: self._stage(-1, self._solutions(u, forcing))

    def apply(self, u: Array, loads: Sequence[Array]) -> Array:
        """The state after the step."""
        return self.loaded(loads)(u)

    def apply_transposed(self, p: Array) -> tuple[Array, list[Array]]:
        """Transposed step and the adjoints of the loads."""
        back, loads = np.zeros(p.shape), [np.zeros(p.shape) for _ in self.operators]
        for m in self._modes:
            w = m.solver.solve(m.column[-1] * p, transposed=True)
            back = back + m.weight * np.real(m.total * w)
            for j, load in enumerate(loads):
                load += m.weight * np.real(m.scale * m.row[j] * w)
        return back, loads


class CoupledStep(CollocationStep):
    """A Radau step whose operators differ between stages: all stages are solved together."""

    def __init__(self, table: Tableau, operators: Sequence[Operator], dt: float) -> None:
        self.table, self.dt, self.s, self.operators = table, dt, len(table.c), operators
        # column j of A alone: stage j meets only its own operator
        columns = [dt * table.A * (np.arange(self.s) == j) for j in range(self.s)]
        self._solver = operators[0].system(operators, columns)

    def _solve(self, parts: list[np.ndarray], transposed: bool) -> list[np.ndarray]:
        n, k = parts[0].shape
        x = self._solver.solve(np.stack(parts, 1).reshape(n * self.s, k), transposed=transposed)
        return [np.ascontiguousarray(x.reshape(n, self.s, k)[:, j]) for j in range(self.s)]

    def stages(self, u: Array, loads: Sequence[Array]) -> list[Array]:
        """Stage states."""
        A = self.table.A
        right = [u + self.dt * sum(A[i, j] * loads[j] for j in range(self.s)) for i in range(self.s)]
        return self._solve(right, transposed=False)

    def apply(self, u: Array, loads: Sequence[Array]) -> Array:
        """The state after the step: the last stage."""
        return self.stages(u, loads)[-1]

    def apply_transposed(self, p: Array) -> tuple[Array, list[Array]]:
        """Transposed step and the adjoints of the loads."""
        zero = np.zeros(p.shape)
        w = self._solve([zero] * (self.s - 1) + [p], transposed=True)
        loads: list[Any] = [self.dt * sum(self.table.A[i, j] * w[i] for i in range(self.s)) for j in range(self.s)]
        return sum(w, zero), loads


@dataclass(frozen=True)
class RadauIIA(Unbounded):
    """Radau IIA with 1 (implicit Euler), 2 or 3 stages: order 2s − 1, L-stable.

    With one stage it is positive for every step on a monotone scheme. Source: Hairer & Wanner 1996, section IV.5;
    for constant coefficients the stability function is the subdiagonal Padé approximant of the exponential.
    """

    stages: int = 3
    implicit: bool = True
    kept: int = 1

    @property
    def name(self) -> str:
        """Name in the registry."""
        return "implicit-euler" if self.stages == 1 else f"radau{2 * self.stages - 1}"

    @property
    def order(self) -> int:
        """Order of accuracy."""
        return 2 * self.stages - 1

    @property
    def nodes(self) -> tuple[float, ...]:
        """Fractions of the step at which coefficients are needed."""
        return tuple(float(c) for c in tableau(self.stages).c)

    def prepare(self, operators: Sequence[Operator], dt: float) -> Step:
        """Factorise the step."""
        if any(is_tensor(op.a) for op in operators):
            raise InputError("stepper", f"{self.name!r} with tensors", "'mcs3', 'rk4' or another that marches in torch")
        table = tableau(self.stages)
        if all(op is operators[0] for op in operators):
            return ConstantStep(table, operators[0], dt)
        return CoupledStep(table, operators, dt)


for _stages in (1, 2, 3):
    STEPPERS.add(RadauIIA(_stages).name, RadauIIA(_stages))
