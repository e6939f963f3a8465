"""Operators over dual numbers, Q + εQ̇ with ε² = 0: a step taken with them is the step and its derivative at once.

A field (u, u̇) is stacked, tangent below: shape (2 size, k); stencil numbers (a, ȧ) along a new first axis. Sums and
products of block triangular matrices [[Q, 0], [Q̇, Q]] are those of dual numbers, so that every stepper, which is made
of such sums, products and inverses, gives its exact derivative; its pullback then gives second derivatives.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import scipy.sparse as sp

from kolmo.kernels.linear import Factorization
from kolmo.steppers.base import Operator


def halves(u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The field and its tangent, from a stacked field."""
    n = len(u) // 2
    return u[:n], u[n:]


class DualStencil:
    """The stencil of Q + εQ̇, from that of Q.

    Parameters
    ----------
    stencil : Stencil
        The stencil of Q (and of Q̇: stencils are linear in their numbers).
    """

    def __init__(self, stencil: Any) -> None:
        self.stencil = stencil

    def apply(self, a: np.ndarray, u: np.ndarray) -> np.ndarray:
        """(Q u, Q̇ u + Q u̇)."""
        value, tangent = halves(u)
        apply = self.stencil.apply
        return np.concatenate([apply(a[0], value), apply(a[1], value) + apply(a[0], tangent)])

    def apply_transposed(self, a: np.ndarray, p: np.ndarray) -> np.ndarray:
        """(Qᵀ p + Q̇ᵀ ṗ, Qᵀ ṗ)."""
        value, tangent = halves(p)
        back = self.stencil.apply_transposed
        return np.concatenate([back(a[0], value) + back(a[1], tangent), back(a[0], tangent)])

    def pullback(self, p: np.ndarray, u: np.ndarray) -> np.ndarray:
        """Derivative of ⟨p, Q u⟩ + ⟨ṗ, Q̇ u + Q u̇⟩ with respect to (a, ȧ)."""
        (p_value, p_tangent), (value, tangent) = halves(p), halves(u)
        pull = self.stencil.pullback
        return np.stack([pull(p_value, value) + pull(p_tangent, tangent), pull(p_tangent, value)])

    def matrix(self, a: np.ndarray) -> sp.csr_matrix:
        """[[Q, 0], [Q̇, Q]]."""
        Q = self.stencil.matrix(a[0])
        return sp.csr_matrix(sp.bmat([[Q, None], [self.stencil.matrix(a[1]), Q]]))

    def split(self, a: np.ndarray) -> tuple[list["DualStencil"], list[np.ndarray], Callable[[int, Any], np.ndarray]]:
        """Split by direction, as ``TensorStencil.split``."""
        stencils, values, spread = self.stencil.split(a[0])
        _, tangents, _ = self.stencil.split(a[1])

        def both(part: int, derivative: np.ndarray) -> np.ndarray:
            return np.stack([spread(part, d) for d in derivative])

        return [DualStencil(s) for s in stencils], [np.stack(p) for p in zip(values, tangents, strict=True)], both


class NestedFactors:
    """Factors of M + εṀ, from those of M.

    Parameters
    ----------
    factors : Factorization
        Factors of M.
    tangent : sparse matrix
        Ṁ.
    """

    def __init__(self, factors: Any, tangent: sp.spmatrix) -> None:
        self.factors, self.tangent = factors, sp.csr_matrix(tangent)

    def solve(self, b: np.ndarray, transposed: bool = False) -> np.ndarray:
        """Solve with the stacked matrix [[M, 0], [Ṁ, M]], or its transpose."""
        value, tangent = halves(b)
        if transposed:
            y = self.factors.solve(tangent, transposed=True)
            return np.concatenate([self.factors.solve(value - self.tangent.T @ y, transposed=True), y])
        x = self.factors.solve(value)
        return np.concatenate([x, self.factors.solve(tangent - self.tangent @ x)])


@dataclass(frozen=True, eq=False)
class DualOperator(Operator):
    """Q + εQ̇, acting on stacked fields; ``fixed`` is stacked too."""

    @cached_property
    def primal(self) -> Operator:
        """Q."""
        return self._part(0)

    @cached_property
    def tangent(self) -> Operator:
        """Q̇."""
        return self._part(1)

    def _part(self, which: int) -> Operator:
        fixed = None if self.fixed is None else halves(self.fixed)[0]
        return Operator(self.stencil.stencil, self.a[which], fixed)

    def shifted(self, scale: complex) -> Factorization:
        """Factors of I − scale (Q + εQ̇)."""
        return NestedFactors(self.primal.shifted(scale), -scale * self.tangent.matrix)

    @classmethod
    def system(cls, operators: Sequence[Any], columns: Sequence[np.ndarray]) -> Factorization:
        """Factors of I − Σ_j (Q_j + εQ̇_j) ⊗ C_j, those of the primal system used twice."""
        tangent = sum(sp.kron(op.tangent.matrix, C, format="csr") for op, C in zip(operators, columns, strict=True))
        return NestedFactors(Operator.system([op.primal for op in operators], columns), -tangent)
