"""Tensor stencils in one pass over flat arrays: apply, apply transposed, pull back, and whole Runge–Kutta steps.

A stencil of up to three axes is a sum of terms diag(a_m) B_m: the identity, the first and second difference along each
axis, and products of two first ("cross") differences. A grid of fewer axes has leading axes of one node. Difference
matrices come as packed tables; the rows ``low`` to ``high`` of an axis hold one stencil of seven points and are done
several nodes at once. Indices are unsigned, and what is done for every node or line is put into the caller before
compilation: to hand arrays to a function costs as much as the line.
"""

from typing import Any

import numpy as np

from kolmo.kernels.cache import compiled

jit: Any = compiled(fastmath={"contract"})
inlined: Any = compiled(fastmath={"contract"}, inline="always")
# Where things stand in the layout: the sizes; per axis the rows of the common stencil and the place of the row
# pointers; the numbers of the terms.
LOW, HIGH, POINTER, IDENTITY, FIRST, SECOND, PAIRS = 3, 6, 9, 12, 13, 16, 19
LAYOUT = 22
ABSENT = 1 << 32  # a pair that there is not


@inlined
def weights_of(c: Any) -> Any:
    """The weights of a stencil as numbers, which stay in registers."""
    return c[0], c[1], c[2], c[3], c[4], c[5], c[6]


@inlined
def seven(c: Any, v: Any, o: Any, step: Any) -> float:
    """Weighted sum of seven values from ``o`` on, one step apart."""
    two = step + step
    three, four = two + step, two + two
    low = c[0] * v[o] + c[1] * v[o + step] + c[2] * v[o + two] + c[3] * v[o + three]
    return low + c[4] * v[o + four] + c[5] * v[o + four + step] + c[6] * v[o + three + three]  # type: ignore[no-any-return]


@inlined
def opened(table: Any, a: Any) -> Any:
    """Sizes, pairs, what closes the last two axes, and the numbers of the terms, all by name."""
    layout = table[0]
    pairs = layout[PAIRS], layout[PAIRS + 1], layout[PAIRS + 2]
    second = layout[LOW + 1], layout[HIGH + 1], layout[POINTER + 1]
    third = layout[LOW + 2], layout[HIGH + 2], layout[POINTER + 2]
    own, a01, a11, a21 = a[layout[IDENTITY]], a[layout[FIRST]], a[layout[FIRST + 1]], a[layout[FIRST + 2]]
    a02, a12, a22 = a[layout[SECOND]], a[layout[SECOND + 1]], a[layout[SECOND + 2]]
    b12 = a[pairs[2]] if pairs[2] != ABSENT else own
    return (layout[0], layout[1], layout[2]), pairs, second, third, (own, a01, a02, a11, a12, a21, a22, b12)


@jit
def _across(table: Any, axis: int, field: Any, base: Any, row: Any, stride: Any, f: Any, s: Any, x: Any) -> bool:
    """First and second difference of a field along a strided axis, for one row; whether the cross one is the first."""
    layout, pointer, index, weights, central, _ = table
    if layout[LOW + axis] <= row and row < layout[HIGH + axis]:
        o = base + (row - np.uint64(3)) * stride
        first, second = weights_of(central[0]), weights_of(central[1])
        for k in range(stride):
            slope, bend = seven(first, field, o + k, stride), seven(second, field, o + k, stride)
            f[k] = slope
            s[k] = bend
        return True
    for k in range(stride):
        f[k] = 0.0
        s[k] = 0.0
        x[k] = 0.0
    at = layout[POINTER + axis] + row
    for e in range(pointer[at], pointer[at + np.uint64(1)]):
        o = base + index[e] * stride
        wf, ws, wx = weights[0, e], weights[1, e], weights[2, e]
        for k in range(stride):
            v = field[o + k]
            f[k] += wf * v
            s[k] += ws * v
            x[k] += wx * v
    return False


@jit
def cross_across(table: Any, axis: int, field: Any, base: Any, row: Any, stride: Any, count: Any, x: Any) -> None:
    """Cross difference along a strided axis of the first ``count`` nodes of one row."""
    layout, pointer, index, weights, _, _ = table
    for k in range(count):
        x[k] = 0.0
    at = layout[POINTER + axis] + row
    for e in range(pointer[at], pointer[at + np.uint64(1)]):
        o, w = base + index[e] * stride, weights[2, e]
        if w != 0.0:
            for k in range(count):
                x[k] += w * field[o + k]


@jit
def along(table: Any, which: int, field: Any, base: Any, out: Any) -> None:
    """One difference (first, second or cross) along the last axis, for the line that begins at ``base``."""
    layout, pointer, index, weights, central, _ = table
    n, low, high = layout[2], layout[LOW + 2], layout[HIGH + 2]
    start = layout[POINTER + 2]
    for i in range(n):
        if low <= i and i < high:
            continue
        total = 0.0
        for e in range(pointer[start + i], pointer[start + i + np.uint64(1)]):
            total += weights[which, e] * field[base + index[e]]
        out[i] = total
    if high <= low:
        return
    c, one = weights_of(central[which % 2]), np.uint64(1)
    o = base + low - np.uint64(3)
    for k in range(high - low):
        out[low + k] = seven(c, field, o + k, one)


@jit
def difference(table: Any, axis: int, which: int, field: Any, factor: Any, out: Any) -> None:
    """One difference (first, second or cross) of a whole field along an axis; with a factor, added times that."""
    layout, pointer, index, weights, central, _ = table
    n, low, high, start = layout[axis], layout[LOW + axis], layout[HIGH + axis], layout[POINTER + axis]
    stride = np.uint64(1)
    for later in range(axis + 1, 3):
        stride *= layout[later]
    block, one, three = n * stride, np.uint64(1), np.uint64(3)
    c = weights_of(central[which % 2])
    for base in range(np.uint64(0), np.uint64(len(field)), block):
        for row in range(n):
            if low <= row and row < high:
                continue
            to = base + row * stride
            if factor is None:  # decided when this is compiled
                for k in range(stride):
                    out[to + k] = 0.0
            for e in range(pointer[start + row], pointer[start + row + one]):
                o, w = base + index[e] * stride, weights[which, e]
                if factor is None:
                    for k in range(stride):
                        out[to + k] += w * field[o + k]
                else:
                    for k in range(stride):
                        out[to + k] += w * factor[to + k] * field[o + k]
        # rows of one stencil lie behind each other
        for k in range(base + low * stride, base + high * stride):
            value = seven(c, field, k - three * stride, stride)
            if factor is None:
                out[k] = value
            else:
                out[k] += factor[k] * value


@jit
def shares(table: Any, y: Any, q: Any, wanted: Any, derivative: Any) -> None:
    """Add q B_m y to the derivative with respect to a_m, for wanted terms."""
    layout = table[0]
    if wanted[layout[IDENTITY]]:
        out = derivative[layout[IDENTITY]]
        for k in range(len(y)):
            out[k] += q[k] * y[k]
    for axis in range(3):
        for which in range(2):
            term = layout[(FIRST if which == 0 else SECOND) + axis]
            if layout[axis] > 1 and wanted[term]:
                difference(table, axis, which, y, q, derivative[term])
    for pair in range(3):
        term = layout[PAIRS + pair]
        if term != ABSENT and wanted[term]:
            half = np.empty(len(y))
            difference(table, 1 if pair == 2 else 0, 2, y, None, half)
            difference(table, 1 if pair == 0 else 2, 2, half, q, derivative[term])
    terms, rows, pointer, index, weights = table[5]
    for r in range(len(rows)):
        if wanted[terms[r]]:
            total = 0.0
            for e in range(pointer[r], pointer[r + 1]):
                total += weights[e] * y[index[e]]
            derivative[terms[r], rows[r]] += q[rows[r]] * total


@jit
def _sweep(table: Any, a: Any, y: Any, rule: Any, targets: Any) -> None:
    """One pass over y: k = Q y + load, following = base + c k, collected = (collected or nothing) + weight k."""
    _, pointer, index, weights, central, _ = table
    (c, weight, begins), (load, base, following, collected) = rule, targets
    (n0, n1, n2), (p01, p02, p12), (low1, high1, start1), (low2, high2, start2), numbers = opened(table, a)
    own, a01, a02, a11, a12, a21, a22, b12 = numbers
    plane, one, three, zero = n1 * n2, np.uint64(1), np.uint64(3), np.uint64(0)
    f, s = weights_of(central[0]), weights_of(central[1])
    room = plane if n0 > 1 else one
    slope0, bend0, wide0 = np.empty(room), np.empty(room), np.empty(room)
    slope1, bend1, wide1 = np.empty(n2), np.empty(n2), np.empty(n2)
    total, line = np.empty(n2), np.empty(n2)
    for i in range(n0):
        x0 = wide0
        if n0 > 1 and _across(table, 0, y, zero, i, plane, slope0, bend0, wide0):
            x0 = slope0
        for j in range(n1):
            at = (i * n1 + j) * n2
            x1 = wide1
            if n1 == 1:
                for k in range(n2):
                    total[k] = own[at + k] * y[at + k]
            elif low1 <= j and j < high1:
                x1 = slope1
                o = at - three * n2
                for k in range(n2):
                    value = y[at + k]
                    first, second = seven(f, y, o + k, n2), seven(s, y, o + k, n2)
                    slope1[k] = first
                    bend1[k] = second
                    total[k] = own[at + k] * value + a11[at + k] * first + a12[at + k] * second
            else:
                for k in range(n2):  # as in _across, which would cost up to a tenth more here
                    slope1[k] = 0.0
                    bend1[k] = 0.0
                    wide1[k] = 0.0
                for e in range(pointer[start1 + j], pointer[start1 + j + one]):
                    o = i * plane + index[e] * n2
                    wf, ws, wx = weights[0, e], weights[1, e], weights[2, e]
                    for k in range(n2):
                        slope1[k] += wf * y[o + k]
                        bend1[k] += ws * y[o + k]
                        wide1[k] += wx * y[o + k]
                for k in range(n2):
                    total[k] = own[at + k] * y[at + k] + a11[at + k] * slope1[k] + a12[at + k] * bend1[k]
            if n0 > 1:
                o = j * n2
                for k in range(n2):
                    total[k] += a01[at + k] * slope0[o + k] + a02[at + k] * bend0[o + k]
            # along the line itself, and the difference along it of the one across it
            for end in range(2):
                for k in range(zero if end == 0 else high2, low2 if end == 0 else n2):
                    first, second, cross = 0.0, 0.0, 0.0
                    for e in range(pointer[start2 + k], pointer[start2 + k + one]):
                        v, to = y[at + index[e]], index[e]
                        first += weights[0, e] * v
                        second += weights[1, e] * v
                        cross += weights[2, e] * x1[to]
                    total[k] += a21[at + k] * first + a22[at + k] * second
                    if p12 != ABSENT:
                        total[k] += b12[at + k] * cross
            if p12 == ABSENT:
                for k in range(low2, high2):
                    o = at + k - three
                    first, second = seven(f, y, o, one), seven(s, y, o, one)
                    total[k] += a21[at + k] * first + a22[at + k] * second
            else:
                for k in range(low2, high2):
                    o = at + k - three
                    first, second = seven(f, y, o, one), seven(s, y, o, one)
                    cross = seven(f, x1, k - three, one)
                    total[k] += a21[at + k] * first + a22[at + k] * second + b12[at + k] * cross
            if p02 != ABSENT:
                along(table, 2, x0, j * n2, line)
                for k in range(n2):
                    total[k] += a[p02, at + k] * line[k]
            if p01 != ABSENT:
                cross_across(table, 1, x0, zero, j, n2, n2, line)
                for k in range(n2):
                    total[k] += a[p01, at + k] * line[k]
            if begins:
                for k in range(n2):
                    value = total[k] + load[at + k]
                    following[at + k] = base[at + k] + c * value
                    collected[at + k] = weight * value
            else:
                for k in range(n2):
                    value = total[k] + load[at + k]
                    following[at + k] = base[at + k] + c * value
                    collected[at + k] += weight * value


@jit
def _walls(table: Any, a: Any, y: Any, load: Any, out: Any) -> None:
    """The load and the terms at walls, which come row by row."""
    terms, rows, pointer, index, weights = table[5]
    for k in range(len(load)):
        out[k] = load[k]
    for r in range(len(rows)):
        total = 0.0
        for e in range(pointer[r], pointer[r + 1]):
            total += weights[e] * y[index[e]]
        out[rows[r]] += a[terms[r], rows[r]] * total


@jit
def stage(table: Any, a: Any, y: Any, rule: Any, targets: Any) -> None:
    """k = Q y + load, following = base + c k, collected = (collected or nothing) + weight k.

    Parameters
    ----------
    table : tuple
        From ``tensor.Fused``.
    a, y : ndarray
        Numbers (terms, size) and field (size,).
    rule : (c, weight, begins)
        ``begins``: nothing has been collected.
    targets : (load, base, following, collected)
        Fields.
    """
    load, base, following, collected = targets
    if len(table[5][0]) > 0:
        more = np.empty(len(load))
        _walls(table, a, y, load, more)
        load = more
    _sweep(table, a, y, rule, (load, base, following, collected))
