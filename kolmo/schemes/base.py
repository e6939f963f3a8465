"""What a scheme is: stencils on a grid, and the numbers in them as a function of the local coefficients."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import scipy.sparse as sp

from kolmo.arrays import Array
from kolmo.grid import Grid
from kolmo.problem.box import Box
from kolmo.problem.faces import Face
from kolmo.registry import Registry
from kolmo.schemes.local import Local, Metric


class Stencil(Protocol):
    """A family of linear operators Q(a) on node fields, linear in the array ``a`` of stencil numbers.

    All fields have shape ``(size, k)``. The three faces: apply, apply transposed, pull back to the numbers. What some
    stencils offer besides is in the protocols below.
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


@runtime_checkable
class Banded(Protocol):
    """A stencil whose operator may have a narrow band: direct solves keep to it."""

    def band(self, a: np.ndarray, fixed: np.ndarray | None) -> tuple[np.ndarray, int, int] | None:
        """Q(a) without the columns of fixed nodes in LAPACK's band storage, with room for factors; None where wide."""
        ...


@runtime_checkable
class Split(Protocol):
    """A stencil that is a sum of one that couples axes and of one along each axis: alternating directions."""

    def split(self, a: Array) -> tuple[list[Any], list[Array], Callable[[int, Array], Array]]:
        """Stencils, their numbers, and the transpose of the splitting: (part, derivative) → derivative of a."""
        ...


@runtime_checkable
class Together(Split, Protocol):
    """A split stencil whose parts are applied together by compiled steps."""

    def together(self, stencils: list[Any], *, transposed: bool = False) -> tuple[Any, ...]:
        """Tables of the stencils of ``split``, or of their transposes, for the numbers they share."""
        ...

    def common(self, a: np.ndarray) -> np.ndarray:
        """The numbers they share."""
        ...

    def uncommon(self, derivative: np.ndarray) -> np.ndarray:
        """The transpose of ``common``."""
        ...


@runtime_checkable
class Readable(Protocol):
    """A stencil from whose numbers the coefficients can be read back.

    Attributes
    ----------
    shape : tuple of int
        Nodes per axis.
    operators : list of dict
        Difference operators by axis and name ("first", "second").
    pairs : list of (int, int)
        Axes with mixed derivatives.
    faces : tuple of (Face, Face)
        By axis.
    tilted : dict
        By (axis, side), axes along which noise that meets the wall is not normal to it.
    """

    shape: tuple[int, ...]
    operators: Any
    pairs: list[tuple[int, int]]
    faces: tuple[tuple[Face, Face], ...]
    tilted: dict[tuple[int, int], list[int]]

    def coefficients(self, a: Array) -> tuple[Array, Array, Array]:
        """Killing rate (size,), drift (size, d) and covariance rate (size, d, d) in index units."""
        ...


@runtime_checkable
class Compiled(Protocol):
    """A stencil with compiled steps of Runge and Kutta."""

    @property
    def fused(self) -> Any:
        """The kernels for its terms: ``runge_kutta``, its transpose and pullback."""
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

    @property
    def follows(self) -> Literal["pattern", "values"]:
        """What of the covariance stencils in several dimensions are laid out for: where it is zero, or what it is."""
        ...

    def stencil(self, grid: Grid, box: Box, covariance: Array) -> Any:
        """Frozen stencils for a grid, laid out for a covariance in index units, shape (size, d, d)."""
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
