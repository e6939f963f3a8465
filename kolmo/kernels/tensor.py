"""Tables of difference operators for the fused kernels, and the kernels on fields of shape (size, k)."""

from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import scipy.sparse as sp

from kolmo.kernels import fused, fused_march, fused_transposed
from kolmo.kernels.lines import LineOperator

Key = tuple[str | None, ...]
"""One term: per axis the name of the operator that acts along it, or None."""
Numbers = tuple[np.ndarray, ...]
"""Numbers (terms, size) at the start, in the middle and at the end of a step."""

# Points of the stencil that is unrolled; shorter ones are padded with zeros.
POINTS = 7


@lru_cache(maxsize=128)
def _packed(
    first: LineOperator, second: LineOperator, cross: LineOperator, transposed: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, int, int]:
    """Row pointers, columns, weights (3, entries), the two stencils of the middle rows, and the rows that have them."""
    n = first.matrix.shape[0]
    operators = [op.transposed if transposed else op for op in (first, second, cross)]
    matrices = [op.matrix.tocoo() for op in operators]
    rows, columns = (np.concatenate([getattr(M, part) for M in matrices]) for part in ("row", "col"))
    places, where = np.unique(rows.astype(np.int64) * n + columns, return_inverse=True)
    weights = np.zeros((3, len(places)))
    which = np.repeat(np.arange(3), [M.nnz for M in matrices])
    weights[which, where] = np.concatenate([M.data for M in matrices])
    row, column = places // n, places % n
    pointer = np.searchsorted(row, np.arange(n + 1))
    # windows of seven columns around the diagonal; rows that reach beyond have none
    offset = column - row + POINTS // 2
    inside = (offset >= 0) & (offset < POINTS)
    windows = np.zeros((3, n, POINTS))
    windows[:, row[inside], offset[inside]] = weights[:, inside]
    # of the transpose too, the common stencil is that of the matrix: closures may reach its middle row
    central = _packed(first, second, cross, False)[3][:, ::-1] if transposed else windows[:2, n // 2]
    central = np.concatenate([central, central[:1]])
    same = np.isclose(windows, central[:, None], rtol=1e-12, atol=1e-14).all((0, 2))
    same[row[~inside]] = False
    same[: POINTS // 2] = same[n - POINTS // 2 :] = False
    different = np.flatnonzero(~same)
    below, above = different[different <= n // 2], different[different >= n // 2]
    low, high = int(below.max(initial=-1)) + 1, int(above.min(initial=n))
    low, high = (low, high) if low < high else (0, 0)
    return pointer, column, weights, central[:2].copy(), low, high


def kronecker(factors: Sequence[LineOperator | int]) -> sp.csr_matrix:
    """Product of operators, or of identities of a size."""
    product = sp.identity(1, format="csr")
    for factor in factors:
        product = sp.kron(product, sp.identity(factor) if isinstance(factor, int) else factor.matrix, format="csr")
    return product


@lru_cache(maxsize=128)
def _nonzero_rows(factors: tuple[LineOperator | int, ...]) -> tuple[np.ndarray, ...]:
    """Rows that are not zero of a product of operators (or of identities of a size), with their entries."""
    product = kronecker(factors)
    counts = np.diff(product.indptr)
    return np.flatnonzero(counts), counts[counts > 0], product.indices, product.data


def factors(shape: Sequence[int], operators: Sequence[dict[str, LineOperator]], key: Key) -> tuple[Any, ...]:
    """What a term is the product of."""
    return tuple(n if name is None else ops[name] for n, ops, name in zip(shape, operators, key, strict=True))


class Fused:
    """A tensor stencil in the fused kernels: differences along an axis, products of two; others row by row.

    Parameters
    ----------
    shape : tuple of int
        Shape of the grid.
    operators : list of dict
        Per axis, its one-dimensional operators by name.
    terms : list of tuple
        Per term and axis, the name of an operator, or None.
    """

    def __init__(self, shape: tuple[int, ...], operators: list[dict[str, LineOperator]], terms: Sequence[Key]) -> None:
        self.shape, self.operators = shape, operators
        d = len(shape)
        # what is absent takes a row of zeros after the last term, but pairs, which are left out
        self._terms = len(terms)
        self._slots = np.full(fused.LAYOUT - fused.IDENTITY, self._terms, dtype=np.uint64)
        self._slots[fused.PAIRS - fused.IDENTITY :] = fused.ABSENT
        others: list[int] = []
        crossing = [{key[i] for key in terms if sum(name is not None for name in key) == 2} for i in range(d)]
        # the operator of the mixed terms along each axis
        self._cross = ["cross" if "cross" in names else "first" for names in crossing]
        for m, key in enumerate(terms):
            slot = self._slot(key, 3 - d)
            if slot is None:
                others.append(m)
            else:
                self._slots[slot] = m
        self._walls = self._others(terms, others)
        axes = slice(3 - d, 3), slice(6 - d, 6)
        self._padded = self._slots[0] == self._terms or any((self._slots[1:7][a] == self._terms).any() for a in axes)
        self._seen: tuple[np.ndarray, np.ndarray] | None = None

    def _slot(self, key: Key, lead: int) -> int | None:
        """Place of a term in the layout of the kernels, counted from that of the identity."""
        named = [(i, name) for i, name in enumerate(key) if name is not None]
        if not named:
            return 0
        if len(named) == 1:
            (i, name) = named[0]
            return {"first": 1, "second": 4}[name] + lead + i if name in ("first", "second") else None
        if len(named) == 2 and all(name == self._cross[i] for i, name in named):
            return 7 + {(0, 1): 0, (0, 2): 1, (1, 2): 2}[lead + named[0][0], lead + named[1][0]]
        return None

    def _others(self, terms: Sequence[Key], which: list[int]) -> tuple[np.ndarray, ...]:
        """Term, place, entries of the rows of terms that act only at walls."""
        parts = [_nonzero_rows(factors(self.shape, self.operators, terms[m])) for m in which]
        parts.append((np.zeros(0),) * 4)  # where there are none
        rows, counts, columns, weights = (np.concatenate(part) for part in zip(*parts, strict=True))
        term = np.repeat([*which, 0], [len(part[0]) for part in parts])
        pointer = np.concatenate([[0], np.cumsum(counts)])
        whole = (v.astype(np.int64) for v in (term, rows, pointer, columns))
        return (*whole, weights)

    def _table(self, transposed: bool) -> tuple[Any, ...]:
        """Layout, row pointers, columns, weights and central stencils of all axes."""
        lead = 3 - len(self.shape)
        layout = np.zeros(12, dtype=np.uint64)
        layout[:3] = 1
        pointers, columns, weights, central, entries, rows = [], [], [], np.zeros((2, POINTS)), 0, 0
        for i, ops in enumerate(self.operators):
            picked = [ops["first"], ops["second"], ops[self._cross[i]]]
            pointer, column, weight, stencils, low, high = _packed(*picked, transposed)
            layout[[lead + i, 3 + lead + i, 6 + lead + i, 9 + lead + i]] = self.shape[i], low, high, rows
            central = stencils if low < high else central
            pointers.append(pointer + entries)
            columns.append(column)
            weights.append(weight)
            entries += len(column)
            rows += len(pointer)
        return (
            np.concatenate([layout, self._slots]),
            np.concatenate(pointers).astype(np.uint64),
            np.concatenate(columns).astype(np.uint64),
            np.ascontiguousarray(np.concatenate(weights, 1)),
            central,
            self._walls,
        )

    @cached_property
    def table(self) -> tuple[Any, ...]:
        """What the kernels need to apply the stencil."""
        return self._table(transposed=False)

    def table_with(self, rows: Sequence[int], absent: int, *, transposed: bool = False) -> tuple[Any, ...]:
        """A table for numbers that hold the terms in other rows, and zeros in the row ``absent``."""
        layout, *rest, walls = self.back if transposed else self.table
        places, known = np.append(rows, absent).astype(np.int64), self._slots != fused.ABSENT
        slots = self._slots.copy()
        slots[known] = places[slots[known].astype(np.int64)]
        layout = np.concatenate([layout[: -len(slots)], slots])
        return (layout, *rest, (places[walls[0]], *walls[1:]))

    @cached_property
    def back(self) -> tuple[Any, ...]:
        """What they need to apply its transpose."""
        return self._table(transposed=True)

    @cached_property
    def spaces(self) -> tuple[np.ndarray, ...]:
        """Work spaces of the transpose: seven fields, of which a grid of fewer axes needs fewer."""
        size = int(np.prod(self.shape))
        needed = {1: 0, 2: 3, 3: 7}[len(self.shape)]
        used = [3, 4, 5, 0, 1, 2, 6][:needed]
        return tuple(np.zeros(size if m in used else 1) for m in range(7))

    def numbers(self, a: np.ndarray) -> np.ndarray:
        """The numbers as the kernels want them: with a row of zeros for terms that are absent."""
        if not self._padded:
            return _plain(a)
        if self._seen is None or self._seen[0] is not a:
            self._seen = a, np.concatenate([a, np.zeros((1, a.shape[1]))])
        return self._seen[1]

    def apply(self, a: np.ndarray, u: np.ndarray) -> np.ndarray:
        """Q(a) u for u of shape (size, k)."""
        a, zero, rest = self.numbers(a), np.zeros(len(u)), np.empty(len(u))
        rule = 0.0, 1.0, True
        return _by_column(u, lambda column, out: fused.stage(self.table, a, column, rule, (zero, zero, rest, out)))

    def apply_transposed(self, a: np.ndarray, p: np.ndarray) -> np.ndarray:
        """Q(a)ᵀ p."""
        a, transposed = self.numbers(a), fused_transposed.apply_transposed
        return _by_column(p, lambda column, out: transposed(self.back, a, column, out, self.spaces))

    def pullback(self, p: np.ndarray, u: np.ndarray) -> np.ndarray:
        """Derivative of ⟨p, Q(a) u⟩ with respect to a."""
        derivative, wanted = np.zeros((self._terms + 1, len(u))), self._wanted(None)
        for q, column in zip(_columns(p), _columns(u), strict=True):
            fused.shares(self.table, column, q, wanted, derivative)
        return derivative[: self._terms]

    def _wanted(self, active: np.ndarray | None) -> np.ndarray:
        """The terms whose derivatives are asked for (None: all), with one more for those that are absent."""
        return np.append(np.ones(self._terms, dtype=bool) if active is None else active, False)

    def runge_kutta(
        self, numbers: Numbers, loads: Sequence[np.ndarray], u: np.ndarray, dt: float, count: int, kept: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Classical Runge–Kutta steps; numbers and loads at their start, middle and end.

        The last state, and what was kept (k, count, kept, size): nothing, the states before the steps (1) or those of
        all stages (4).
        """
        columns, wide = _columns(u).copy(), [_columns(load) for load in loads]
        states = np.empty((len(columns), count if kept else 0, max(kept, 1), columns.shape[1]))
        for m, column in enumerate(columns):
            fused_march.runge_kutta(self.table, numbers, tuple(load[m] for load in wide), dt, count, column, states[m])
        return _back(columns), states

    def runge_kutta_transposed(
        self, numbers: Numbers, p: np.ndarray, dt: float, free: np.ndarray
    ) -> tuple[np.ndarray, list[np.ndarray]]:
        """The transposed step, and the derivatives with respect to its loads."""
        columns = _columns(p).copy()
        loads = np.zeros((len(columns), 3, columns.shape[1]))
        for column, load in zip(columns, loads, strict=True):
            fused_march.runge_kutta_transposed(self.back, numbers, column, dt, free, load, self.spaces)
        return _back(columns), [_back(loads[:, j]) for j in range(3)]

    def runge_kutta_pullback(
        self,
        numbers: Numbers,
        loads: Sequence[np.ndarray],
        kept: np.ndarray,
        p: np.ndarray,
        dt: float,
        free: np.ndarray,
        active: np.ndarray | None,
    ) -> tuple[np.ndarray, list[np.ndarray], list[np.ndarray]]:
        """Transposed steps over what was kept of them, with derivatives of loads and active numbers summed."""
        wanted, columns, wide = self._wanted(active), _columns(p).copy(), [_columns(load) for load in loads]
        kept = _plain(kept)
        adjoints = np.zeros((len(columns), 3, columns.shape[1]))
        # numbers that are the same array share one sum, which is told once
        sums = {id(a): np.zeros((self._terms + 1, columns.shape[1])) for a in numbers}
        derivatives = tuple(sums[id(a)] for a in numbers)
        tables = self.table, self.back, self.spaces
        for m, column in enumerate(columns):
            here = tuple(load[m] for load in wide)
            targets = adjoints[m], derivatives
            fused_march.runge_kutta_pullback(tables, numbers, here, kept[m], column, dt, free, wanted, targets)
        none = np.zeros((1, 1))
        shares = [sums.pop(id(a), none)[: self._terms] for a in numbers]
        return _back(columns), [_back(adjoints[:, j]) for j in range(3)], shares


def _columns(u: np.ndarray) -> np.ndarray:
    """A field (size, k) as k rows."""
    return _plain(u.reshape(1, -1) if u.shape[1] == 1 else u.T)


def _plain(v: np.ndarray) -> np.ndarray:
    """Contiguous and writable: the kernels are compiled anew for every other kind of array."""
    v = np.ascontiguousarray(v)
    return v if v.flags.writeable else v.copy()


def _back(columns: np.ndarray) -> np.ndarray:
    """Rows as a field (size, k)."""
    return columns.reshape(-1, 1) if len(columns) == 1 else np.ascontiguousarray(columns.T)


def _by_column(u: np.ndarray, work: Callable[[np.ndarray, np.ndarray], None]) -> np.ndarray:
    """Let the kernel fill every column of the result."""
    columns = _columns(u)
    result = np.empty(columns.shape)
    for column, out in zip(columns, result, strict=True):
        work(column, out)
    return _back(result)
