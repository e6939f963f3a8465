"""Central differences of order 2, 4 and 6 on the uniform computational grid, full diffusion tensor."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import combinations
from typing import Any, Literal

import numpy as np
import scipy.sparse as sp

from kolmo.arrays import Array, Held, as_like, detached, empty, is_tensor, namespace, zeros
from kolmo.errors import InputError
from kolmo.grid import Grid
from kolmo.kernels.linear import NARROW
from kolmo.kernels.lines import LineOperator
from kolmo.kernels.tensor import Fused, Key, factors, kronecker
from kolmo.problem.box import Box
from kolmo.problem.faces import Face
from kolmo.schemes.base import SCHEMES, Assembly, FaceData
from kolmo.schemes.differences import FREE, SLOPE, Differences, differences, slope_weight, spectral_radii
from kolmo.schemes.faces import held
from kolmo.schemes.local import Local, Metric, put_rows, wall_nodes, wall_of

# Drift out of a cut, in units of the noise across it (nodes² per unit of time), above which it may be held back. The
# cell's Péclet number is twice that.
MOST_OUTWARD = 1.0
# Mixed derivatives at walls stretch the spectrum: by up to 31 % at correlation 0.8 (eigenvalues of 16 × 16 matrices).
WALL_MARGIN = 0.5


class TensorStencil:
    """Q(a) = Σ_m diag(a_m) B_m with B_m a product of one-dimensional operators; a has shape (terms, size).

    Parameters
    ----------
    shape : tuple of int
        Shape of the grid.
    operators : list of dict
        Per axis, its one-dimensional operators by name.
    terms : list of tuple
        Per term and axis, the name of an operator, or None for the identity.
    """

    def __init__(self, shape: tuple[int, ...], operators: list[dict[str, LineOperator]], terms: list[Key]) -> None:
        self.shape, self.operators, self.terms = shape, operators, terms
        self._matrices: list[sp.csr_matrix] | None = None

    def _fields(self, u: Array) -> list[Array]:
        """B_m u for every term, tensors of shape (size, k) that share partial products."""
        known: dict[Key, Array] = {(None,) * len(self.shape): u}
        return [self._field(known, key) for key in self.terms]

    def _field(self, known: dict[Key, Array], key: Key) -> Array:
        """B u for one term, from the products known (no closure: it would keep u alive until garbage is collected)."""
        if key not in known:
            axis = next(i for i, name in enumerate(key) if name is not None)
            rest = (*key[:axis], None, *key[axis + 1 :])
            factor = self._field(known, rest)
            known[key] = self.operators[axis][key[axis] or ""].apply(factor, self.shape, axis)
        return known[key]

    @cached_property
    def fused(self) -> Fused:
        """Kernels that do all terms in one pass."""
        return Fused(self.shape, self.operators, self.terms)

    def apply(self, a: Array, u: Array) -> Array:
        """Q(a) u."""
        if not is_tensor(u):
            return self.fused.apply(a, u)
        total = namespace(u).zeros_like(u)
        for weight, field in zip(a, self._fields(u), strict=True):
            total = total.addcmul(weight[:, None], field)
        return total

    def apply_transposed(self, a: Array, p: Array) -> Array:
        """Q(a)ᵀ p."""
        return self._transposed(a, p) if is_tensor(p) else self.fused.apply_transposed(a, p)

    def _transposed(self, a: Array, p: Array) -> Array:
        """Term by term."""
        out = namespace(p).zeros_like(p)
        for weight, key in zip(a, self.terms, strict=True):
            part = weight[:, None] * p
            for axis, name in enumerate(key):
                if name is not None:
                    part = self.operators[axis][name].transposed.apply(part, self.shape, axis)
            out += part
        return out

    def pullback(self, p: Array, u: Array) -> Array:
        """Derivative of ⟨p, Q(a) u⟩ with respect to a."""
        if not self.terms:
            return as_like(np.zeros((0, p.shape[0])), p)
        if is_tensor(p):
            return namespace(p).stack([(p * field).sum(-1) for field in self._fields(u)], 0)
        return self.fused.pullback(p, u)

    def matrix(self, a: np.ndarray) -> sp.csr_matrix:
        """Q(a) as a sparse matrix."""
        if self._matrices is None:
            self._matrices = [kronecker(factors(self.shape, self.operators, key)) for key in self.terms]
        total = sp.csr_matrix(self._matrices[0].shape)
        for weight, B in zip(a, self._matrices, strict=True):
            total = total + sp.diags(weight) @ B
        return sp.csr_matrix(total)

    def band(self, a: np.ndarray, fixed: np.ndarray | None) -> tuple[np.ndarray, int, int] | None:
        """In one dimension: Q(a) in LAPACK's band storage with room for its factors, and the numbers of its diagonals.

        Columns of fixed nodes are left out. None where the band would be wide.
        """
        if len(self.shape) > 1:
            return None
        n, ops = self.shape[0], self.operators[0]
        widths = [ops[key[0]].width for key in self.terms if key[0] is not None]
        below, above = (max((w[side] for w in widths), default=0) for side in (0, 1))
        if below + above > min(NARROW, n // 2):
            return None
        band, diagonal = np.zeros((2 * below + above + 1, n), order="F"), np.arange(n)
        for weight, (name,) in zip(a, self.terms, strict=True):
            row, column, data = (diagonal, diagonal, 1.0) if name is None else ops[name].entries
            band[below + above + row - column, column] += weight[row] * data
        if fixed is not None:
            band[:, fixed] = 0.0
        return band, below, above

    @cached_property
    def _groups(self) -> list[list[int]]:
        """The terms that couple axes, then those along each axis; −c is among all of these."""
        owners = [tuple(i for i, name in enumerate(key) if name is not None) for key in self.terms]
        groups = [[m for m, o in enumerate(owners) if len(o) > 1]]
        return groups + [[m for m, o in enumerate(owners) if o in ((axis,), ())] for axis in range(len(self.shape))]

    def together(self, stencils: "list[TensorStencil]", *, transposed: bool = False) -> tuple[Any, ...]:
        """Tables of the stencils of ``split``, or of their transposes, for the numbers of ``common``."""
        terms = len(self.terms)
        rows = [[m if any(self.terms[m]) else terms for m in group] for group in self._groups]
        pairs = zip(stencils, rows, strict=True)
        return tuple(s.fused.table_with(mine, terms + 1, transposed=transposed) for s, mine in pairs)

    def common(self, a: np.ndarray) -> np.ndarray:
        """Numbers that the stencils of ``split`` share: all terms, an axis' share of −c, zeros."""
        more = np.zeros((2, a.shape[1]))
        more[0] = a[self._own].sum(0) * (1.0 / len(self.shape))
        return np.concatenate([a, more])

    def uncommon(self, derivative: np.ndarray) -> np.ndarray:
        """The transpose of ``common``; its first argument is overwritten."""
        own, result = self._own, derivative[: len(self.terms)]
        result[own] += derivative[len(self.terms)] * (1.0 / len(self.shape))
        return result

    @cached_property
    def _own(self) -> np.ndarray:
        """Terms without differences."""
        return np.flatnonzero([not any(key) for key in self.terms])

    def split(self, a: Array) -> "tuple[list[TensorStencil], list[Array], Callable[[int, Array], Array]]":
        """Split by direction: the terms that couple axes, then those along each axis with their share of −c.

        Returns the stencils, their numbers, and the transpose of the splitting: (part, derivative) → derivative of a.
        """
        groups, share = self._groups, [1.0 if any(key) else 1.0 / len(self.shape) for key in self.terms]
        stencils = [TensorStencil(self.shape, self.operators, [self.terms[m] for m in group]) for group in groups]

        def spread(part: int, derivative: Array) -> Array:
            result = zeros((len(self.terms), derivative.shape[1]), derivative)
            for m, row in zip(groups[part], derivative, strict=True):
                result[m] = share[m] * row
            return result

        def gathered(group: list[int]) -> Array:
            numbers = empty((len(group), a.shape[1]), a)
            for row, m in zip(numbers, group, strict=True):
                row[...] = share[m] * a[m]
            return numbers

        return stencils, [gathered(group) for group in groups], spread

    def _along(self, axis: int) -> list[LineOperator]:
        """What every term does along an axis."""
        n, operators = self.shape[axis], self.operators[axis]
        return [_identity(n) if key[axis] is None else operators[key[axis] or ""] for key in self.terms]

    def widths(self, axis: int) -> tuple[int, int]:
        """Diagonals below and above the main one on the lines of an axis."""
        below, above = zip(*(M.width for M in self._along(axis)), strict=True)
        return max(below), max(above)

    def bands(self, a: Array, axis: int, free: Array | None) -> tuple[Array, int]:
        """Band storage (n, width, lines) of the operator on each line of an axis, and its number of sub-diagonals.

        ``free`` is one at free nodes and zero at fixed ones, whose columns are left out.
        """
        n, (below, above) = self.shape[axis], self.widths(axis)
        band = zeros((n, below + above + 1, a.shape[1] // n), a)
        for M, w in zip(self._along(axis), a, strict=True):
            M.add_to_bands(band, below, self._lines(w, axis))
        if free is not None:
            kept = self._lines(free, axis)
            for offset in range(-below, above + 1):
                low, high = max(-offset, 0), min(n, n - offset)
                band[low:high, below + offset] *= kept[low + offset : high + offset]
        return band, below

    def _lines(self, w: Array, axis: int) -> Array:
        """A field (size,) as (n, lines) along an axis."""
        return namespace(w).moveaxis(w.reshape(self.shape), axis, 0).reshape(self.shape[axis], -1)


@dataclass(frozen=True)
class Central:
    """Central differences of an even order; one-sided or slope-aware closures of the same order at faces.

    Not monotone. Linear and smooth in the coefficients. Rows sum to −c, so the transpose conserves probability.

    At open faces the normal second derivative is dropped, so that lines remain lines. ``still``: and drift out of them
    that noise does not hold, for flows that leave and come back, which that would amplify; lines do not remain lines.

    Source: stencils from the Vandermonde conditions (Fornberg 1988); at open faces the normal second derivative is
    dropped (Windcliff, Forsyth & Vetzal 2004).
    """

    order: int = 6
    still: bool = False
    monotone: bool = False
    smooth: bool = True
    follows: Literal["pattern"] = "pattern"

    @property
    def name(self) -> str:
        """Name in the registry."""
        return f"central{self.order}{'-still' if self.still else ''}"

    @property
    def minimum_nodes(self) -> int:
        """Fewest nodes an axis may have."""
        return self.order + 3

    @property
    def slope_weight(self) -> float:
        """Weight of the slope in the second difference at a break."""
        return slope_weight(self.order)

    def stencil(self, grid: Grid, box: Box, covariance: Array) -> "CentralStencil":
        """Difference operators of every axis and the list of terms."""
        operators, slopes = [], {}
        for i, axis in enumerate(grid.axes):
            if axis.n < self.minimum_nodes:
                raise InputError(f"grid[{i}]", axis.n, f"at least {self.minimum_nodes} nodes for scheme {self.name!r}")
            low, high = (face.closure for face in box.faces[i])
            elastic = box.faces[i][0].elastic, box.faces[i][1].elastic
            ops, ends = _along_axis(axis.n, self.order, low, high, elastic, axis.breaks)
            slopes.update({(i, side): weights for side, weights in ends.items()})
            operators.append(ops)
        return CentralStencil.of(grid, box, operators, slopes, covariance)

    def assemble(self, stencil: "CentralStencil", local: Local, faces: FaceData, metric: Metric) -> Assembly:
        """Stencil numbers from local coefficients."""
        A, S, xp = local.A, local.S, namespace(local.A, local.S, local.c)
        keep = [m.like(A) for m in stencil.keep]
        numbers = [-local.c]
        d = A.shape[1]
        for i in range(d):
            drift = stencil.held_back(i, A[:, i], S[:, i, i]) if self.still else A[:, i]
            along = drift, 0.5 * S[:, i, i] * keep[i]
            for found in (b for b in local.breaks if b.axis == i):
                where = found.nodes.like(A)
                along = put_rows(along[0], where, 0.5 * found.above), put_rows(along[1], where, 0.5 * found.below)
            numbers += along
        for i, j in stencil.pairs:
            numbers.append(S[:, i, j] * keep[i] * keep[j])
        load = local.g
        for (i, side), (first, second) in stencil.slopes.items():
            weight = A[:, i] * first.like(A) + 0.5 * S[:, i, i] * second.like(A)
            wall = stencil.walls[i, side].like(A)
            normal = S[wall, i, i]
            safe = xp.where(normal > 0, normal, as_like(1.0, A))
            for j in stencil.tilted[i, side]:
                numbers.append(-weight * (S[wall, i, j] / safe))
            if (i, side) in faces.robin:
                kappa, value = faces.robin[i, side]
                lookup = stencil.wall_positions[i, side].like(A)
                sign = 2.0 if side == 1 else -2.0
                factor = weight * (sign * metric.like(A)[0][wall, i] / safe)
                numbers.append(-factor * kappa[lookup])
                load = load + factor[:, None] * value[lookup]
        free = stencil.free.like(A)
        active = np.array([bool(getattr(n, "requires_grad", False)) for n in numbers])
        a = xp.stack(numbers, 0)
        a *= free  # in place: these are the largest arrays of a large problem
        return Assembly(a, load * free[:, None], active)

    def stiffness(self, grid: Grid, box: Box, local: Local, faces: FaceData, metric: Metric) -> tuple[float, float]:
        """Bounds of the real and imaginary extent of the spectrum of Q."""
        real, imaginary = float(np.max(np.abs(local.c), initial=0.0)), 0.0
        for i in range(grid.dim):
            first, second = spectral_radii(self.order, *(face.closure for face in box.faces[i]))
            if grid.axes[i].breaks:
                first, second = np.maximum((first, second), spectral_radii(self.order, FREE, SLOPE)).tolist()
            real += 0.5 * float(np.max(local.S[:, i, i])) * second
            imaginary += float(np.max(np.abs(local.A[:, i]))) * first
        for (i, side), (kappa, _) in faces.robin.items():
            # the wall's own rate: the second difference's weight of the slope, which is 2 κ u / S
            slopes = differences(grid.axes[i].n, self.order, *(f.closure for f in box.faces[i])).second_slope
            density = metric.density[wall_nodes(grid, i, side), i]
            real += float(np.abs(slopes[:, side]).max() * np.max(np.abs(kappa) * density))
        walls = box.has("turns")
        return real * (1.0 + WALL_MARGIN * _correlation(local.S) * walls), imaginary


@lru_cache(maxsize=64)
def _along_axis(
    n: int, order: int, low: str, high: str, elastic: tuple[bool, bool], breaks: tuple[int, ...] = ()
) -> tuple[dict[str, LineOperator], dict[int, tuple[np.ndarray, np.ndarray]]]:
    """Operators of an axis by name, and at sides where the slope is known its weights in the two differences."""
    D = differences(n, order, low, high, breaks)
    first, first_slope = _first(D, elastic)
    ops, ends = {"first": LineOperator(first), "second": LineOperator(D.second), "cross": LineOperator(D.cross)}, {}
    for side, closure in enumerate((low, high)):
        if closure == SLOPE:
            ends[side] = first_slope[:, side], D.second_slope[:, side]
            rows = np.flatnonzero((ends[side][0] != 0) | (ends[side][1] != 0))
            columns = np.full(len(rows), 0 if side == 0 else n - 1)
            ops[f"pick{side}"] = LineOperator(sp.csr_matrix((np.ones(len(rows)), (rows, columns)), shape=(n, n)))
    return ops, ends


@lru_cache(maxsize=64)
def _identity(n: int) -> LineOperator:
    return LineOperator(sp.identity(n))


def _first(D: Differences, elastic: tuple[bool, bool]) -> tuple[sp.csr_matrix, np.ndarray]:
    """First difference and its slope weights; one-sided at elastic walls.

    There the slope is 2 (κ u − v) / Σ: carried inwards by the drift it would grow without bound until the grid
    resolves the layer of width Σ / b.
    """
    matrix, slope = D.first.tolil(), D.first_slope.copy()
    for side in (0, 1):
        if elastic[side]:
            rows = np.flatnonzero(slope[:, side])
            matrix[rows] = D.cross[rows]
            slope[rows, side] = 0.0
    return sp.csr_matrix(matrix), slope


def _correlation(S: np.ndarray) -> float:
    """Largest correlation |S_ij| / √(S_ii S_jj) over the nodes."""
    largest = 0.0
    for i, j in zip(*np.triu_indices(S.shape[1], 1), strict=True):
        scale = np.sqrt(np.maximum(S[:, i, i], 0.0) * np.maximum(S[:, j, j], 0.0))
        ratio = np.divide(np.abs(S[:, i, j]), scale, out=np.zeros(len(S)), where=scale > 0)
        largest = max(largest, float(ratio.max(initial=0.0)))
    return largest


class CentralStencil(TensorStencil):
    """Terms of the central scheme, with the masks and look-ups its assembly needs."""

    free: Held
    keep: list[Held]
    pairs: list[tuple[int, int]]
    slopes: dict[tuple[int, int], tuple[Held, Held]]
    walls: dict[tuple[int, int], Held]
    wall_positions: dict[tuple[int, int], Held]
    tilted: dict[tuple[int, int], list[int]]
    faces: tuple[tuple[Face, Face], ...]
    cuts: dict[tuple[int, int], Held]

    def with_noise_at_cuts(self) -> "CentralStencil":
        """The same terms, with the normal second derivative at open faces too (as that of the next node)."""
        stencil = copy.copy(self)
        stencil.keep = [Held(np.ones(len(mask.array))) for mask in self.keep]
        return stencil

    def held_back(self, axis: int, A: Array, noise: Array) -> Array:
        """Drift along an axis, on its cuts no more of it outwards than noise can hold."""
        for (i, side), nodes in self.cuts.items():
            if i == axis:
                where, sign = nodes.like(A), 1.0 if side == 1 else -1.0
                outwards = sign * A[where]
                most = MOST_OUTWARD * noise[where]
                A = put_rows(A, where, sign * namespace(A).where(outwards > most, most, outwards))
        return A

    def coefficients(self, a: Array) -> tuple[Array, Array, Array]:
        """Killing rate (size,), drift (size, d) and covariance rate (size, d, d) in index units, from the numbers.

        The inverse of the assembly; noise across an open face is zero at its nodes, as it is in the numbers.
        """
        d, xp = len(self.shape), namespace(a)
        entries = {(i, i): 2.0 * a[2 + 2 * i] for i in range(d)}
        for m, (i, j) in enumerate(self.pairs):
            entries[i, j] = entries[j, i] = a[1 + 2 * d + m]
        rows = [xp.stack([entries.get((i, j), 0.0 * a[0]) for j in range(d)], -1) for i in range(d)]
        return -a[0], xp.stack([a[1 + 2 * i] for i in range(d)], -1), xp.stack(rows, -2)

    @classmethod
    def of(cls, grid: Grid, box: Box, operators: Any, slopes: Any, covariance: Array) -> "CentralStencil":
        """Lay out the terms for a grid; mixed terms only where the covariance has them.

        ``slopes``: per face where the slope is known, its weights in the two differences along the axis.
        """
        d = grid.dim

        def key(**names: str) -> Key:
            return tuple(names.get(f"x{i}") for i in range(d))

        S = detached(covariance)
        scale = float(abs(S).max())
        mixed = {(i, j) for i, j in combinations(range(d), 2) if float(abs(S[:, i, j]).max()) > 1e-14 * scale}
        terms = [key()]
        terms += [key(**{f"x{i}": name}) for i in range(d) for name in ("first", "second")]
        pairs = sorted(mixed)
        # without walls and breaks the mixed derivatives use the first differences that are there anyway
        own = [(i, 0) in slopes or (i, 1) in slopes or bool(grid.axes[i].breaks) for i in range(d)]
        once = ["cross" if apart else "first" for apart in own]
        terms += [key(**{f"x{i}": once[i], f"x{j}": once[j]}) for i, j in pairs]
        tilted, sloping = {}, []
        for i, side in slopes:
            # at an entrance it is the slope across that vanishes, not the one along Σn
            tilted[i, side] = [j for j in range(d) if (min(i, j), max(i, j)) in mixed and box.faces[i][side].reached]
            terms += [key(**{f"x{i}": f"pick{side}", f"x{j}": once[j]}) for j in tilted[i, side]]
            elastic = box.faces[i][side].elastic
            if elastic:
                terms.append(key(**{f"x{i}": f"pick{side}"}))
            if elastic or tilted[i, side]:
                sloping.append((i, side))
        stencil = cls(grid.shape, operators, terms)
        stencil.pairs, stencil.tilted = pairs, tilted
        # at other faces the slope is zero
        stencil.slopes = {face: tuple(Held(grid.along(face[0], w)) for w in slopes[face]) for face in sloping}  # type: ignore[misc]
        stencil.faces = box.faces
        walls = {face: wall_of(grid, *face).copy() for face in sloping}
        stencil.walls = {face: Held(wall) for face, wall in walls.items()}
        stencil.wall_positions = {
            face: Held(np.searchsorted(wall_nodes(grid, *face), wall)) for face, wall in walls.items()
        }
        free = np.ones(grid.size, dtype=bool)
        keep = [np.ones(grid.size, dtype=bool) for _ in range(d)]
        stencil.cuts = {}
        for i, side, face in box.each():
            free &= ~held(grid, i, side, face)
            if face.cut:
                stencil.cuts[i, side] = Held(wall_nodes(grid, i, side))
                keep[i][wall_nodes(grid, i, side)] = False
        stencil.free, stencil.keep = Held(free), [Held(mask) for mask in keep]
        return stencil


for _order in (2, 4, 6):
    SCHEMES.add(f"central{_order}", Central(_order))
SCHEMES.add("central6-still", Central(6, still=True))
