"""Qᵀ p in one pass: every node gathers what others take from it."""

from typing import Any

import numpy as np

from kolmo.kernels.fused import (
    ABSENT,
    HIGH,
    LOW,
    POINTER,
    along,
    cross_across,
    difference,
    inlined,
    jit,
    opened,
    seven,
    weights_of,
)


@inlined
def _column_sums(
    table: Any, axis: int, first: Any, second: Any, cross: Any, mixed: bool, base: Any, stride: Any, out: Any
) -> None:
    """Add the transposed differences along a strided axis; the first field holds the cross one.

    Put into the caller, with all lines: a call for every line costs up to a third more.
    """
    layout, pointer, index, weights, central, _ = table
    low, high, start = layout[LOW + axis], layout[HIGH + axis], layout[POINTER + axis]
    one, three, f, s = np.uint64(1), np.uint64(3), weights_of(central[0]), weights_of(central[1])
    for row in range(layout[axis]):
        at = base + row * stride
        if low <= row and row < high:
            o = at - three * stride
            for k in range(stride):
                out[at + k] += seven(f, first, o + k, stride)
            for k in range(stride):
                out[at + k] += seven(s, second, o + k, stride)
        else:
            for e in range(pointer[start + row], pointer[start + row + one]):
                o = base + index[e] * stride
                wf, ws, wx = weights[0, e], weights[1, e], weights[2, e] - weights[0, e]
                for k in range(stride):
                    out[at + k] += wf * first[o + k] + ws * second[o + k]
                if mixed and wx != 0.0:
                    for k in range(stride):
                        out[at + k] += wx * cross[o + k]


@jit
def apply_transposed(table: Any, a: Any, q: Any, out: Any, spaces: Any) -> None:
    """``out = Qᵀ q``; the table holds the transposed differences. ``spaces`` is overwritten."""
    _, pointer, index, weights, central, _ = table
    (n0, n1, n2), (p01, p02, p12), _, (low2, high2, start2), numbers = opened(table, a)
    own, a01, a02, a11, a12, a21, a22, b12 = numbers
    plane, zero, one, three = n1 * n2, np.uint64(0), np.uint64(1), np.uint64(3)
    f, s = weights_of(central[0]), weights_of(central[1])
    first0, second0, cross0, first1, second1, cross1, product01 = spaces
    first2, second2, cross2, line = np.empty(n2), np.empty(n2), np.empty(n2), np.empty(n2)
    mixed, turned = np.empty(plane), np.empty(plane)
    for i in range(n0):
        for j in range(n1):
            at = (i * n1 + j) * n2
            for k in range(n2):
                first2[k] = a21[at + k] * q[at + k]
                second2[k] = a22[at + k] * q[at + k]
                out[at + k] = own[at + k] * q[at + k]
            for end in range(2):
                for k in range(zero if end == 0 else high2, low2 if end == 0 else n2):
                    value = 0.0
                    for e in range(pointer[start2 + k], pointer[start2 + k + one]):
                        to = index[e]
                        value += weights[0, e] * first2[to] + weights[1, e] * second2[to]
                    out[at + k] += value
            for k in range(low2, high2):
                o = k - three
                out[at + k] += seven(f, first2, o, one) + seven(s, second2, o, one)
            if n1 > 1:
                for k in range(n2):
                    first1[at + k] = a11[at + k] * q[at + k]
                    second1[at + k] = a12[at + k] * q[at + k]
                if p12 != ABSENT:
                    for k in range(n2):
                        mixed[j * n2 + k] = b12[at + k] * q[at + k]
            if n0 > 1:
                for k in range(n2):
                    first0[at + k] = a01[at + k] * q[at + k]
                    second0[at + k] = a02[at + k] * q[at + k]
                    cross0[at + k] = 0.0
                if p02 != ABSENT:
                    for k in range(n2):
                        cross2[k] = a[p02, at + k] * q[at + k]
                    along(table, 2, cross2, zero, line)
                    for k in range(n2):
                        cross0[at + k] = line[k]
                if p01 != ABSENT:
                    for k in range(n2):
                        product01[at + k] = a[p01, at + k] * q[at + k]
        if p12 != ABSENT:
            difference(table, 2, 2, mixed, None, turned)
            for k in range(plane):
                cross1[i * plane + k] = turned[k]
                first1[i * plane + k] += turned[k]
        if n1 > 1:
            _column_sums(table, 1, first1, second1, cross1, p12 != ABSENT, i * plane, n2, out)
        if p01 != ABSENT:
            for j in range(n1):
                cross_across(table, 1, product01, i * plane, j, n2, n2, line)
                for k in range(n2):
                    cross0[(i * n1 + j) * n2 + k] += line[k]
        if n0 > 1:
            for k in range(i * plane, (i + one) * plane):
                first0[k] += cross0[k]
    if n0 > 1:
        _column_sums(table, 0, first0, second0, cross0, p01 != ABSENT or p02 != ABSENT, zero, plane, out)
    terms, rows, begin, columns, values = table[5]
    for r in range(len(rows)):
        weight = a[terms[r], rows[r]] * q[rows[r]]
        for e in range(begin[r], begin[r + 1]):
            out[columns[e]] += weight * values[e]
