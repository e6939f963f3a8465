"""Alternating directions: band matrices along the lines of a grid, and whole split steps."""

from typing import Any

import numba
import numpy as np

from kolmo.kernels.fused import stage

_jit: Any = numba.njit(cache=True, error_model="numpy", nogil=True)


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


def solve_fields(factors: tuple[np.ndarray, int, int], b: np.ndarray, transposed: bool) -> np.ndarray:
    """Solve along every line of the axis for fields (size, k)."""
    columns = np.array(b.T, order="C")
    for column in columns:
        solve_lines(factors, column, transposed)
    return np.ascontiguousarray(columns.T)


@_jit
def _parts(operator: Any, u: Any, load: Any, f: Any, total: Any) -> None:
    """Parts of Q u, the first with the load, and their sum."""
    tables, numbers = operator
    zero, rest = np.zeros(len(u)), np.empty(len(u))
    for j in range(len(tables)):
        stage(tables[j], numbers[j], u, (0.0, 1.0, True), (load if j == 0 else zero, zero, rest, f[j]))
    for k in range(len(u)):
        total[k] = f[0, k]
        for j in range(1, len(f)):
            total[k] += f[j, k]


@_jit
def split_step(operators: Any, solvers: Any, loads: Any, rule: Any, u: Any, states: Any) -> None:
    """One step of the modified Craig–Sneyd scheme.

    Parameters
    ----------
    operators : (start, end)
        Each the tables and the numbers of the parts of Q: mixed derivatives, then those along each axis.
    solvers : tuple
        Of I − θ dt Q_j for each axis, as ``solve_lines`` takes them.
    loads : (start, end)
        Fields.
    rule : (dt, theta)
        Length of the step and weight of what is implicit.
    u : ndarray, shape (size,)
        The state before the step.
    states : ndarray, shape (2, d, size)
        Gets the states after each solve of both sweeps.
    """
    (start, end), (dt, theta) = operators, rule
    n, d = len(u), len(solvers)
    f, g = np.empty((d + 1, n)), np.empty((d + 1, n))
    total, after = np.empty(n), np.empty(n)
    _parts(start, u, loads[0], f, total)
    before = u + dt * total
    for sweep in range(2):
        for j in range(d):
            y, last = states[sweep, j], before if j == 0 else states[sweep, j - 1]
            for k in range(n):
                y[k] = last[k] - theta * dt * f[j + 1, k]
            solve_lines(solvers[j], y, False)
        if sweep == 0:
            _parts(end, states[0, d - 1], loads[1], g, after)
            for k in range(n):
                before[k] += theta * dt * (g[0, k] - f[0, k]) + (0.5 - theta) * dt * (after[k] - total[k])
