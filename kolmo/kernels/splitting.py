"""Alternating directions: band matrices along the lines of a grid, and whole split steps."""

from collections.abc import Callable
from typing import Any

import numpy as np

from kolmo.kernels.cache import compiled
from kolmo.kernels.fused import FIRST, IDENTITY, POINTER, SECOND, shares, stage
from kolmo.kernels.fused_transposed import apply_transposed

# Signed with unsigned indices would give floats.
_signed: Any = np.int64

# Lines that are factorised together where factors are not kept: a few cache lines' worth.
TOGETHER = 16

_jit: Any = compiled()


@_jit
def factor_bands(band: Any, below: int) -> None:
    """LU factors, in place and without pivoting, of many band matrices: ``band[i, below + j − i, line]``."""
    n, width, lines_ = band.shape
    above = width - 1 - below
    for i in range(n):
        for r in range(1, min(below, n - 1 - i) + 1):
            for line in range(lines_):
                band[i + r, below - r, line] /= band[i, below, line]
            for c in range(1, min(above, n - 1 - i) + 1):
                if below - r + c < width:
                    for line in range(lines_):
                        band[i + r, below - r + c, line] -= band[i + r, below - r, line] * band[i, below + c, line]


@_jit
def solve_bands(band: Any, below: int, x: Any) -> None:
    """Solve with the factors for right sides x (n, lines) in place."""
    n, width, lines_ = band.shape
    above = width - 1 - below
    for i in range(n):
        for r in range(1, min(below, i) + 1):
            for line in range(lines_):
                x[i, line] -= band[i, below - r, line] * x[i - r, line]
    for i in range(n - 1, -1, -1):
        for c in range(1, min(above, n - 1 - i) + 1):
            for line in range(lines_):
                x[i, line] -= band[i, below + c, line] * x[i + c, line]
        for line in range(lines_):
            x[i, line] /= band[i, below, line]


@_jit
def solve_bands_transposed(band: Any, below: int, x: Any) -> None:
    """Solve with the transposed matrices for right sides x (n, lines) in place."""
    n, width, lines_ = band.shape
    above = width - 1 - below
    for i in range(n):
        for line in range(lines_):
            x[i, line] /= band[i, below, line]
        for c in range(1, min(above, n - 1 - i) + 1):
            for line in range(lines_):
                x[i + c, line] -= band[i, below + c, line] * x[i, line]
    for i in range(n - 1, -1, -1):
        for r in range(1, min(below, i) + 1):
            for line in range(lines_):
                x[i - r, line] -= band[i, below - r, line] * x[i, line]


@_jit
def _solve(band: Any, below: int, x: Any, transposed: bool) -> None:
    """One of the two solves (no choice between functions at run time: these have no common type)."""
    if transposed:
        solve_bands_transposed(band, below, x)
    else:
        solve_bands(band, below, x)


@_jit
def solve_lines(solver: Any, y: Any, transposed: bool) -> None:
    """Solve with the factors, or their transposes, along every line of an axis for a field y, in place.

    ``solver`` = (factors, sub-diagonals, stride of the axis).
    """
    band, below, stride = solver
    n, _, count = band.shape
    if count == stride:
        _solve(band, below, y.reshape(n, count), transposed)
        return
    x = np.empty((n, count))
    for outer in range(count // stride):
        for i in range(n):
            at = (outer * n + i) * stride
            for k in range(stride):
                x[i, outer * stride + k] = y[at + k]
    _solve(band, below, x, transposed)
    for outer in range(count // stride):
        for i in range(n):
            at = (outer * n + i) * stride
            for k in range(stride):
                y[at + k] = x[i, outer * stride + k]


def factor_lines(matrices: np.ndarray, below: int, stride: int) -> tuple[np.ndarray, int, int]:
    """Factors of a band matrix for each line of an axis, in place, as ``solve_lines`` takes them."""
    factor_bands(matrices, below)
    return matrices, below, stride


@_jit
def solve_renewed(part: Any, along: Any, free: Any, y: Any, transposed: bool) -> None:
    """As ``solve_lines`` for I − scale × a part along an axis, whose factors are made for some lines at a time.

    Parameters
    ----------
    part : (table, numbers)
        Of the part.
    along : (axis, sub-diagonals, super-diagonals, scale)
        Axis counted among three.
    free : ndarray
        Empty, or zero at fixed nodes and one elsewhere.
    """
    (table, a), (axis, below, above, scale) = part, along
    layout, pointer, index, weights, _, _ = table
    n, start, stride = _signed(layout[axis]), _signed(layout[POINTER + axis]), 1
    for later in range(axis + 1, 3):
        stride *= _signed(layout[later])
    own, first, second = a[layout[IDENTITY]], a[layout[FIRST + axis]], a[layout[SECOND + axis]]
    # neighbouring lines begin so far apart, and so many lie in a block
    hop, lines_ = n, len(y) // n
    if stride > 1:
        hop, lines_ = 1, stride
    band, x = np.empty((n, below + above + 1, TOGETHER)), np.empty((n, TOGETHER))
    for base in range(0, len(y), n * lines_):
        for line in range(0, lines_, TOGETHER):
            begin, count = base + line * hop, min(TOGETHER, lines_ - line)
            band[:] = 0.0
            for i in range(n):
                at = begin + i * stride
                for k in range(count):
                    band[i, below, k] = own[at + k * hop]
                    x[i, k] = y[at + k * hop]
                for k in range(count, TOGETHER):
                    x[i, k] = 0.0
                for e in range(pointer[start + i], pointer[start + i + 1]):
                    c, wf, ws = below + _signed(index[e]) - i, weights[0, e], weights[1, e]
                    if wf != 0.0 or ws != 0.0:
                        for k in range(count):
                            band[i, c, k] = band[i, c, k] + wf * first[at + k * hop] + ws * second[at + k * hop]
                for c in range(max(0, below - i), min(below + above + 1, n + below - i)):
                    if len(free) > 0:
                        for k in range(count):
                            band[i, c, k] *= free[at + (c - below) * stride + k * hop]
                    for k in range(TOGETHER):
                        band[i, c, k] *= -scale
                for k in range(TOGETHER):
                    band[i, below, k] += 1.0
            factor_bands(band, below)
            _solve(band, below, x, transposed)
            for i in range(n):
                at = begin + i * stride
                for k in range(count):
                    y[at + k * hop] = x[i, k]


def solve_fields(factors: tuple[np.ndarray, int, int], b: np.ndarray, transposed: bool) -> np.ndarray:
    """Solve with the factors along every line of the axis for fields (size, k)."""
    return _by_column(lambda column: solve_lines(factors, column, transposed), b)


def solve_fields_renewed(part: Any, along: Any, free: np.ndarray, b: np.ndarray, transposed: bool) -> np.ndarray:
    """The same with factors made anew."""
    return _by_column(lambda column: solve_renewed(part, along, free, column, transposed), b)


def _by_column(solve: Callable[[np.ndarray], None], b: np.ndarray) -> np.ndarray:
    """Let a kernel solve for every column, in place."""
    columns = np.array(b.T, order="C")
    for column in columns:
        solve(column)
    return np.ascontiguousarray(columns.T)


@_jit
def solve_along(part: Any, solver: Any, y: Any, transposed: bool) -> None:
    """Solve along every line of an axis in place, with the factors kept or, where there are none, with new ones.

    ``solver`` = (factors or an empty array, stride of the axis, what ``solve_renewed`` takes: along, free).
    """
    band, stride, along, free = solver
    if len(band) > 0:
        solve_lines((band, along[1], stride), y, transposed)
    else:
        solve_renewed(part, along, free, y, transposed)


@_jit
def _parts(operator: Any, u: Any, load: Any, spaces: Any, parts: Any, total: Any) -> None:
    """Parts of Q u, the first with the load, of which the first ``len(parts)`` are kept, and their sum."""
    (tables, numbers), (zero, rest) = operator, spaces
    for j in range(len(tables)):
        # A flag written as True or False would be a type of its own, and stage compiled once more for each.
        kept = j < len(parts)
        if not kept:
            stage(tables[j], numbers, u, (0.0, 1.0, kept), (zero, zero, rest, total))
            continue
        stage(tables[j], numbers, u, (0.0, 1.0, kept), (load if j == 0 else zero, zero, rest, parts[j]))
        for k in range(len(u)):
            total[k] = parts[j, k] + (total[k] if j > 0 else 0.0)


@_jit
def split_step(operators: Any, solvers: Any, loads: Any, rule: Any, u: Any, states: Any) -> None:
    """One step of the modified Craig–Sneyd scheme.

    Parameters
    ----------
    operators : (start, end)
        Each the tables of the parts of Q (mixed derivatives, then those along each axis) and their common numbers.
    solvers : tuple
        Of I − θ dt Q_j for each axis, as ``solve_along`` takes them.
    loads : (start, end)
        Fields.
    rule : (dt, theta)
        Length of the step and weight of what is implicit.
    u : ndarray, shape (size,)
        The state before the step.
    states : ndarray, shape (2, d, size) or (1, 1, size)
        Gets the states after each solve of both sweeps, or the last of them.
    """
    (start, end), (dt, theta) = operators, rule
    n, d, every = len(u), len(solvers), len(states) > 1
    zero, rest, f, g = np.zeros(n), np.empty(n), np.empty((d + 1, n)), np.empty((1, n))
    before, total, after = np.empty(n), np.empty(n), np.empty(n)
    _parts(start, u, loads[0], (zero, rest), f, total)
    for k in range(n):
        before[k] = u[k] + dt * total[k]
    for sweep in range(2):
        y, last = states[0, 0], before
        for j in range(d):
            if every:
                y = states[sweep, j]
            for k in range(n):
                y[k] = last[k] - theta * dt * f[j + 1, k]
            solve_along((end[0][j + 1], end[1]), solvers[j], y, False)
            last = y
        if sweep == 0:
            _parts(end, y, loads[1], (zero, rest), g, after)
            for k in range(n):
                before[k] += theta * dt * (g[0, k] - f[0, k]) + (0.5 - theta) * dt * (after[k] - total[k])


@_jit
def _gathered(operator: Any, fields: Any, free: Any, spaces: Any, work: Any, total: Any) -> None:
    """Sum of Q_jᵀ f_j over the parts, zero at fixed nodes."""
    tables, numbers = operator
    for j in range(len(tables)):
        apply_transposed(tables[j], numbers, fields[j], work, spaces)
        for k in range(len(total)):
            total[k] = work[k] + (total[k] if j > 0 else 0.0)
    if len(free) > 0:
        for k in range(len(total)):
            total[k] *= free[k]


@_jit
def split_step_transposed(operators: Any, end: Any, solvers: Any, rule: Any, held: Any, p: Any, adjoints: Any) -> None:
    """The transpose of ``split_step``.

    Parameters
    ----------
    operators : (start, end)
        Each the tables of the transposed parts and their common numbers.
    end : (tables, numbers)
        As ``split_step`` takes them, for factors that are made anew.
    solvers, rule
        As for ``split_step``.
    held : (free, spaces)
        ``free`` empty, or zero at fixed nodes and one elsewhere; work spaces of the transposed differences.
    p : ndarray, shape (size,)
        Derivative with respect to the state after the step.
    adjoints : (back, f, g, solves)
        Get the derivatives with respect to the state before the step (size,), to the parts at its start and its end
        (1 + d, size), of which the first are those of the loads, and to the right sides of the solves (2, d, size).
    """
    (before, after), (dt, theta), (free, spaces) = operators, rule, held
    back, f, g, solves = adjoints
    n, d = len(p), len(solvers)
    work, y = np.empty(n), np.empty(n)
    f[:] = 0.0
    for sweep in range(1, -1, -1):
        last = p if sweep == 1 else y
        for j in range(d - 1, -1, -1):
            z = solves[sweep, j]
            for k in range(n):
                z[k] = last[k]
            solve_along((end[0][j + 1], end[1]), solvers[j], z, True)
            for k in range(n):
                f[j + 1, k] -= theta * dt * z[k]
            last = z
        if sweep == 0:
            break
        for k in range(n):
            back[k] = last[k]
        for j in range(d + 1):
            share = (0.5 - theta) * dt + (theta * dt if j == 0 else 0.0)
            for k in range(n):
                g[j, k] = share * last[k]
                f[j, k] -= share * last[k]
        _gathered(after, g, free, spaces, work, y)
    for k in range(n):
        back[k] += last[k]
    for j in range(d + 1):
        for k in range(n):
            f[j, k] += dt * back[k]
    _gathered(before, f, free, spaces, work, y)
    for k in range(n):
        back[k] += y[k]


@_jit
def split_step_shares(tables: Any, rule: Any, u: Any, states: Any, adjoints: Any, wanted: Any, shared: Any) -> None:
    """Add the derivatives with respect to the numbers of a step at its start and end, ``shared`` = (start, end).

    ``tables`` = (start, end) of the parts, ``states`` of ``split_step`` from u, ``adjoints`` of its transpose;
    ``wanted`` flags rows of the common numbers.
    """
    (start, end), (dt, theta), (of_start, of_end) = tables, rule, shared
    _, f, g, solves = adjoints
    d, q = solves.shape[1], np.empty(len(u))
    for j in range(d + 1):
        shares(start[j], u, f[j], wanted, of_start)
        shares(end[j], states[0, d - 1], g[j], wanted, of_end)
    for sweep in range(2):
        for j in range(d):
            for k in range(len(u)):
                q[k] = theta * dt * solves[sweep, j, k]
            shares(end[j + 1], states[sweep, j], q, wanted, of_end)
