"""Qᵀ p in one pass: every node gathers what others take from it."""

from typing import Any

import numpy as np

from kolmo.kernels.fused import (
    ABSENT,
    FIRST,
    HIGH,
    IDENTITY,
    LOW,
    PAIRS,
    POINTER,
    SECOND,
    along,
    cross_across,
    difference,
    jit,
    seven,
    weights_of,
)


@jit
def _column_sum(
    table: Any, axis: int, fields: Any, mixed: bool, base: Any, row: Any, stride: Any, count: Any, out: Any, at: Any
) -> None:
    """Add to a row of the result the transposed differences along a strided axis."""
    layout, pointer, index, weights, central, _ = table
    first, second, cross = fields
    if layout[LOW + axis] <= row and row < layout[HIGH + axis]:
        o = base + (row - np.uint64(3)) * stride
        for which in range(2):
            v, c = first if which == 0 else second, weights_of(central[which])
            for k in range(count):
                out[at + k] += seven(c, v, o + k, stride)
        return
    start = layout[POINTER + axis] + row
    for e in range(pointer[start], pointer[start + np.uint64(1)]):
        o = base + index[e] * stride
        wf, ws = weights[0, e], weights[1, e]
        for k in range(count):
            out[at + k] += wf * first[o + k] + ws * second[o + k]
        wx = weights[2, e] - wf
        if mixed and wx != 0.0:
            # the first field holds the cross one too
            for k in range(count):
                out[at + k] += wx * cross[o + k]


@jit
def apply_transposed(table: Any, a: Any, q: Any, out: Any, spaces: Any) -> None:
    """``out = Qᵀ q``; the table holds the transposed differences. ``spaces`` is overwritten."""
    layout, pointer, index, weights, central, _ = table
    n0, n1, n2 = layout[0], layout[1], layout[2]
    plane, zero, one, three = n1 * n2, np.uint64(0), np.uint64(1), np.uint64(3)
    f, s = weights_of(central[0]), weights_of(central[1])
    identity, p01, p02, p12 = layout[IDENTITY], layout[PAIRS], layout[PAIRS + 1], layout[PAIRS + 2]
    low1, high1, start1 = layout[LOW + 1], layout[HIGH + 1], layout[POINTER + 1]
    low2, high2, start2 = layout[LOW + 2], layout[HIGH + 2], layout[POINTER + 2]
    own, a01, a02, a11, a12 = (
        a[identity],
        a[layout[FIRST]],
        a[layout[SECOND]],
        a[layout[FIRST + 1]],
        a[layout[SECOND + 1]],
    )
    a21, a22 = a[layout[FIRST + 2]], a[layout[SECOND + 2]]
    first0, second0, cross0, first1, second1, cross1, product01 = spaces
    first2, second2, cross2, line = np.empty(n2), np.empty(n2), np.empty(n2), np.empty(n2)
    b12 = a[p12] if p12 != ABSENT else own
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
            for j in range(n1):
                at = (i * n1 + j) * n2
                if low1 <= j and j < high1:  # as in _column_sum: a call for every line costs up to a third more
                    o = at - three * n2
                    for k in range(n2):
                        out[at + k] += seven(f, first1, o + k, n2)
                    for k in range(n2):
                        out[at + k] += seven(s, second1, o + k, n2)
                else:
                    for e in range(pointer[start1 + j], pointer[start1 + j + one]):
                        o = i * plane + index[e] * n2
                        wf, ws, wx = weights[0, e], weights[1, e], weights[2, e] - weights[0, e]
                        for k in range(n2):
                            out[at + k] += wf * first1[o + k] + ws * second1[o + k]
                        if p12 != ABSENT and wx != 0.0:
                            # the first field holds the cross one too
                            for k in range(n2):
                                out[at + k] += wx * cross1[o + k]
                if p01 != ABSENT:
                    cross_across(table, 1, product01, i * plane, j, n2, n2, line)
                    for k in range(n2):
                        cross0[at + k] += line[k]
        if n0 > 1:
            for k in range(i * plane, (i + one) * plane):
                first0[k] += cross0[k]
    if n0 > 1:
        mixed = p01 != ABSENT or p02 != ABSENT
        for i in range(n0):
            _column_sum(table, 0, (first0, second0, cross0), mixed, zero, i, plane, plane, out, i * plane)
    terms, rows, begin, columns, values = table[5]
    for r in range(len(rows)):
        weight = a[terms[r], rows[r]] * q[rows[r]]
        for e in range(begin[r], begin[r + 1]):
            out[columns[e]] += weight * values[e]
