"""What a scheme is: stencils on a grid, and the numbers in them as a function of the local coefficients."""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import scipy.sparse as sp

from kolmo.arrays import Array
from kolmo.grid import Grid
from kolmo.problem.box import Box
from kolmo.registry import Registry
from kolmo.schemes.local import Local, Metric


class Stencil(Protocol):
    """A family of linear operators Q(a) on node fields, linear in the array ``a`` of stencil numbers.

    All fields have shape ``(size, k)``. The three faces: apply, apply transposed, pull back to the numbers.
    """

    def apply(self, a: Array, u: Array) -> Array:
        """Q(a) u."""
        ...

    def apply_transposed(self, a: Array, p: Array) -> Array:
        """Q(a)ᵀ p."""
        ...

    def pullback(self, p: Array, u: Array) -> Array:
        """Derivative of ⟨p, Q(a) u⟩ with respect to a, the shape of a."""
        ...

    def matrix(self, a: np.ndarray) -> sp.csr_matrix:
        """Q(a) as a sparse matrix."""
        ...


@dataclass(frozen=True)
class Assembly:
    """Numbers of a semi-discrete equation u' + Q(a) u + r = 0 at one time, before boundary values are put in.

    Attributes
    ----------
    a : array
        Stencil numbers.
    load : array, shape (size, k)
        Source, and inhomogeneous data of elastic faces.
    active : ndarray of bool or None, shape (terms,)
        Numbers that depend on a parameter; None: they may all.
    """

    a: Array
    load: Array
    active: np.ndarray | None = None


class Scheme(Protocol):
    """A space discretisation, found by name in ``SCHEMES``."""

    @property
    def name(self) -> str:
        """Name in the registry."""
        ...

    @property
    def order(self) -> int:
        """Order of accuracy for smooth solutions."""
        ...

    @property
    def monotone(self) -> bool:
        """Whether off-diagonal entries of Q are never negative."""
        ...

    @property
    def smooth(self) -> bool:
        """Whether Q depends smoothly on the coefficients."""
        ...

    @property
    def minimum_nodes(self) -> int:
        """Fewest nodes an axis may have."""
        ...

    @property
    def slope_weight(self) -> float:
        """Weight of the slope in one-sided second differences, for the mean of coefficients at breaks."""
        ...

    def stencil(self, grid: Grid, box: Box, sample: Local) -> Any:
        """Frozen stencils for a grid; ``sample`` holds the coefficients they are laid out for."""
        ...

    def assemble(self, stencil: Any, local: Local, faces: "FaceData", metric: Metric) -> Assembly:
        """Stencil numbers from local coefficients, in NumPy or torch alike."""
        ...

    def stiffness(self, grid: Grid, box: Box, local: Local, faces: "FaceData", metric: Metric) -> tuple[float, float]:
        """Bounds of the real and imaginary extent of the spectrum of Q."""
        ...


@dataclass(frozen=True)
class FaceData:
    """Data of elastic faces at one time: (axis, side) → (κ, v) at the nodes of the face."""

    robin: dict[tuple[int, int], tuple[Array, Array]]


SCHEMES: Registry[Scheme] = Registry("scheme")
