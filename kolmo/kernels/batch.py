"""Radau steps of many one-dimensional equations at once: side by side in the lanes of vector instructions.

Arrays of a block of equations have their number as last axis. Every lane does the same, whatever stands in the others:
results do not depend on how equations are put into blocks.

Matrices I − s Q are factored without exchange of rows, within the envelope of their stencils; ``growth`` tells the
largest multiplier, from which a caller sees where that was not safe.
"""

from typing import Any

import numpy as np

from kolmo.kernels.cache import compiled

_jit: Any = compiled(fastmath={"contract"})
_inlined: Any = compiled(fastmath={"contract"}, inline="always")


@_inlined
def _subtract(R: Any, C: Any, i: int, p: int, z: Any, k: int, j: int) -> None:
    """Row k of the solutions of both modes, less the factors at (i, p) times row j."""
    for m in range(z.shape[2]):
        z[0, k, m] -= R[i, p, m] * z[0, j, m]
        z[1, k, m] -= C[0, i, p, m] * z[1, j, m] - C[1, i, p, m] * z[2, j, m]
        z[2, k, m] -= C[0, i, p, m] * z[2, j, m] + C[1, i, p, m] * z[1, j, m]


@_inlined
def _divide(R: Any, C: Any, i: int, left: int, z: Any) -> None:
    """Row i of the solutions of both modes over the diagonal of the factors, whose inverse is kept."""
    for m in range(z.shape[2]):
        z[0, i, m] *= R[i, left, m]
        re = z[1, i, m] * C[0, i, left, m] - z[2, i, m] * C[1, i, left, m]
        z[2, i, m] = z[1, i, m] * C[1, i, left, m] + z[2, i, m] * C[0, i, left, m]
        z[1, i, m] = re


@_jit
def factor(
    D: Any, first: Any, last: Any, ends: Any, left: int, a: Any, scale: Any, R: Any, C: Any, growth: Any
) -> None:
    """Factors of I − s Q for a real s (in R) and a complex one (in C: real part, imaginary part) of every lane.

    D, shape (2, n, width): differences in band storage, entry (i, j) at ``[i, left + j - i]``, columns first[i] to
    ends[i]; a, shape (3, n, lanes): their numbers, and the killing rate; scale, shape (3, lanes): s real; real and
    imaginary part of the other. The factors fill columns first[i] to last[i]; of the diagonal the inverse is kept.
    """
    n, lanes = a.shape[1], a.shape[2]
    for i in range(n):
        for j in range(first[i], last[i] + 1):
            p = left + j - i
            one = 1.0 if i == j else 0.0
            killed = 1.0 if i == j else 0.0
            inside = j <= ends[i]
            d1 = D[0, i, p] if inside else 0.0
            d2 = D[1, i, p] if inside else 0.0
            for m in range(lanes):
                q = a[0, i, m] * d1 + a[1, i, m] * d2 - killed * a[2, i, m]
                R[i, p, m] = one - scale[0, m] * q
                C[0, i, p, m] = one - scale[1, m] * q
                C[1, i, p, m] = -scale[2, m] * q
        for k in range(first[i], i):
            p, d = left + k - i, left
            for m in range(lanes):
                R[i, p, m] *= R[k, d, m]
                re = C[0, i, p, m] * C[0, k, d, m] - C[1, i, p, m] * C[1, k, d, m]
                im = C[0, i, p, m] * C[1, k, d, m] + C[1, i, p, m] * C[0, k, d, m]
                C[0, i, p, m] = re
                C[1, i, p, m] = im
                growth[m] = max(growth[m], abs(R[i, p, m]), abs(re), abs(im))
            for j in range(k + 1, last[k] + 1):
                o, r = left + j - i, left + j - k
                for m in range(lanes):
                    R[i, o, m] -= R[i, p, m] * R[k, r, m]
                    C[0, i, o, m] -= C[0, i, p, m] * C[0, k, r, m] - C[1, i, p, m] * C[1, k, r, m]
                    C[1, i, o, m] -= C[0, i, p, m] * C[1, k, r, m] + C[1, i, p, m] * C[0, k, r, m]
        for m in range(lanes):
            R[i, left, m] = 1.0 / R[i, left, m]
            size = 1.0 / (C[0, i, left, m] ** 2 + C[1, i, left, m] ** 2)
            C[0, i, left, m] *= size
            C[1, i, left, m] *= -size


@_jit
def march(
    first: Any, last: Any, left: int, R: Any, C: Any, scale: Any, modes: Any, load: Any, u: Any, kept: Any, z: Any
) -> None:
    """All steps of every lane, from u, shape (n, lanes), in place.

    modes: of the real and of the complex mode (real and imaginary part), the sum of the row and the last entry of the
    column; kept, shape (steps, 3, n, lanes): their solutions, for ``pullback`` (with no nodes: they are not kept);
    z, shape (3, n, lanes): work space.
    """
    n, lanes = u.shape
    t0, c0, t1, t2, c1, c2 = modes[0], modes[1], modes[2], modes[3], modes[4], modes[5]
    for step in range(kept.shape[0]):
        for i in range(n):
            for m in range(lanes):
                z[0, i, m] = t0 * (u[i, m] + scale[0, m] * load[i, m])
                re = u[i, m] + scale[1, m] * load[i, m]
                im = scale[2, m] * load[i, m]
                z[1, i, m] = t1 * re - t2 * im
                z[2, i, m] = t1 * im + t2 * re
            for k in range(first[i], i):
                _subtract(R, C, i, left + k - i, z, i, k)
        for i in range(n - 1, -1, -1):
            for j in range(i + 1, last[i] + 1):
                _subtract(R, C, i, left + j - i, z, i, j)
            _divide(R, C, i, left, z)
            for m in range(lanes):
                u[i, m] = c0 * z[0, i, m] + 2.0 * (c1 * z[1, i, m] - c2 * z[2, i, m])
        if kept.shape[2] > 0:
            kept[step] = z


@_jit
def pullback(
    D: Any,
    first: Any,
    last: Any,
    ends: Any,
    left: int,
    R: Any,
    C: Any,
    scale: Any,
    modes: Any,
    kept: Any,
    p: Any,
    w: Any,
    numbers: Any,
    loads: Any,
) -> None:
    """The transposed steps of ``march`` on weights p, shape (n, lanes), in place; adds derivatives to the last two.

    numbers, shape (3, n, lanes): of a; loads, shape (n, lanes); w, shape (3, n, lanes): work space.
    """
    n, lanes = p.shape
    t0, c0, t1, t2, c1, c2 = modes[0], modes[1], modes[2], modes[3], modes[4], modes[5]
    for step in range(kept.shape[0] - 1, -1, -1):
        for i in range(n):
            for m in range(lanes):
                w[0, i, m] = c0 * p[i, m]
                w[1, i, m] = c1 * p[i, m]
                w[2, i, m] = c2 * p[i, m]
        for i in range(n):
            _divide(R, C, i, left, w)
            for j in range(i + 1, last[i] + 1):
                _subtract(R, C, i, left + j - i, w, j, i)
        for i in range(n - 1, -1, -1):
            for k in range(first[i], i):
                _subtract(R, C, i, left + k - i, w, k, i)
        z = kept[step]
        for i in range(n):
            for m in range(lanes):
                # s w of both modes; twice the real part of the product with the complex one
                real = scale[0, m] * w[0, i, m]
                re = 2.0 * (scale[1, m] * w[1, i, m] - scale[2, m] * w[2, i, m])
                im = 2.0 * (scale[1, m] * w[2, i, m] + scale[2, m] * w[1, i, m])
                p[i, m] = t0 * w[0, i, m] + 2.0 * (t1 * w[1, i, m] - t2 * w[2, i, m])
                loads[i, m] += t0 * real + t1 * re - t2 * im
                numbers[2, i, m] -= real * z[0, i, m] + re * z[1, i, m] - im * z[2, i, m]
                w[0, i, m] = real
                w[1, i, m] = re
                w[2, i, m] = im
            for j in range(first[i], ends[i] + 1):
                d1, d2 = D[0, i, left + j - i], D[1, i, left + j - i]
                for m in range(lanes):
                    product = w[0, i, m] * z[0, j, m] + w[1, i, m] * z[1, j, m] - w[2, i, m] * z[2, j, m]
                    numbers[0, i, m] += d1 * product
                    numbers[1, i, m] += d2 * product


@_jit
def missed(
    begin: Any,
    weights: Any,
    nodes: Any,
    values: Any,
    x: Any,
    lengths: Any,
    middles: Any,
    spreads: Any,
    means: Any,
) -> None:
    """Differences between functions and their interpolation, in the mean over where each process goes.

    begin (m,), weights (m, w): of the interpolation at places x (m,), which stand for some lengths; nodes,
    shape (P, n), values, shape (P, m): each function at the nodes and at the places. A process is within a hull,
    middles (P, 2), and some spreads (P,) around it, less likely than :math:`1 / (1 + a + a^2/2 + a^3/6)` with
    :math:`a = z^2/2`, at least :math:`e^{-a}`; the mean over P of that, times lengths, is returned in means (P,).
    """
    m, w = weights.shape
    for q in range(nodes.shape[0]):
        total, low, high, scale = 0.0, middles[q, 0], middles[q, 1], 1.0 / spreads[q]
        for i in range(m):
            error, k = values[q, i], begin[i]
            for j in range(w):
                error -= weights[i, j] * nodes[q, k + j]
            z = max(low - x[i], x[i] - high, 0.0) * scale
            a = 0.5 * z * z
            total += abs(error) * lengths[i] / (1.0 + a * (1.0 + 0.5 * a * (1.0 + a / 3.0)))
        means[q] = total


@_jit
def paths(
    x: Any, drift: Any, noise: Any, starts: Any, normals: Any, horizon: Any, hard: Any, middles: Any, spreads: Any
) -> None:
    """Where paths of many processes go: least and largest mean over starts and time, and the largest spread.

    x, shape (m,): places where drift and noise (√Σ), shape (processes, m), are known; between them they are linear, and
    paths are kept within; starts (s,); normals (steps, paths). hard, shape (2,): whether an end is one of the state
    space. middles, shape (processes, 2), spreads (processes,): results; infinite where more than some paths were kept
    from leaving through an end that is none.
    """
    steps, count, m = normals.shape[0], normals.shape[1], x.shape[0]
    for q in range(drift.shape[0]):
        dt = horizon[q] / steps
        root = dt**0.5
        low, high, widest, lost = starts[0], starts[0], 0.0, 0
        for s in range(starts.shape[0]):
            low, high = min(low, starts[s]), max(high, starts[s])
            y, cell = np.full(count, starts[s]), np.full(count, m // 2)
            for step in range(steps):
                total, squares = 0.0, 0.0
                for k in range(count):
                    a = cell[k]
                    while a > 0 and x[a] > y[k]:
                        a -= 1
                    while a < m - 2 and x[a + 1] <= y[k]:
                        a += 1
                    cell[k], b = a, a + 1
                    f = (y[k] - x[a]) / (x[b] - x[a])
                    move = dt * (drift[q, a] + f * (drift[q, b] - drift[q, a]))
                    move += root * normals[step, k] * (noise[q, a] + f * (noise[q, b] - noise[q, a]))
                    y[k] += move
                    if y[k] < x[0]:
                        lost += 0 if hard[0] else 1
                        y[k] = x[0]
                    if y[k] > x[m - 1]:
                        lost += 0 if hard[1] else 1
                        y[k] = x[m - 1]
                    total += y[k]
                    squares += (y[k] - starts[s]) ** 2
                mean = total / count
                low, high = min(low, mean), max(high, mean)
                widest = max(widest, squares / count - (mean - starts[s]) ** 2)
        middles[q, 0], middles[q, 1] = low, high
        spreads[q] = widest**0.5 if lost == 0 else float("inf")
