"""Sums of exponentials by their logarithms: Gaussian kernels between nodes, where the exponentials would underflow."""

from typing import Any, NamedTuple

import numpy as np

from kolmo.kernels.cache import compiled

_jit: Any = compiled()
# Terms below e^-37 of the largest are below rounding.
_NEXT_TO_NOTHING = 37.0
# Exponents that float64 holds without underflow: those within this range are summed as a product of matrices.
_REPRESENTABLE = 600.0
# Neighbours along an axis that are looked at together.
_RUN = 16
# Nodes per axis of the blocks that are looked at together, by dimension.
BLOCK = {1: 16, 2: 6, 3: 4}


def pulled(u: tuple[np.ndarray, ...], v: tuple[np.ndarray, ...], g: np.ndarray) -> np.ndarray:
    r"""Logarithms of Gaussian sums between two lattices: :math:`\log\sum_j e^{g_j - |u_i - v_j|^2/2}`, axis by axis.

    Parameters
    ----------
    u, v : tuple of ndarray
        Nodes per axis of the lattice of the result and of that which is summed over.
    g : ndarray, shape (n_1, .., n_d)
        Logarithms of weights; −∞ where there is none.

    Examples
    --------
    >>> axis = np.array([0.0, 1.0])
    >>> pulled((axis,), (axis - 1000.0,), np.array([0.0, -np.inf])).tolist()
    [-500000.0, -501000.5]
    """
    for axis, (x, y) in enumerate(zip(u, v, strict=True)):
        rows = np.ascontiguousarray(np.moveaxis(g, axis, -1))
        g = np.moveaxis(_along(x, y, rows, None)[0], -1, axis)
    return g


def averaged(u: tuple[np.ndarray, ...], v: tuple[np.ndarray, ...], g: np.ndarray, values: np.ndarray) -> np.ndarray:
    r"""Averages of values with the weights of :func:`pulled`: their mean given where the sum is taken from.

    Parameters
    ----------
    u, v, g
        As for :func:`pulled`.
    values : ndarray, shape (n_1, .., n_d)
        What is averaged.

    Examples
    --------
    >>> axis = np.array([0.0, 1.0])
    >>> averaged((axis,), (axis,), np.zeros(2), np.array([3.0, 3.0])).tolist()
    [3.0, 3.0]
    """
    for axis, (x, y) in enumerate(zip(u, v, strict=True)):
        rows, h = (np.ascontiguousarray(np.moveaxis(a, axis, -1)) for a in (g, values))
        g, values = (np.moveaxis(a, -1, axis) for a in _along(x, y, rows, h))
    return values


def _along(x: np.ndarray, y: np.ndarray, g: np.ndarray, h: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Logarithmic sums, and averages of h, along the last axis."""
    finite = g[np.isfinite(g)]
    top = float(finite.max()) if finite.size else 0.0
    spread = top - float(finite.min()) if finite.size else 0.0
    farthest = max(abs(x[-1] - y[0]), abs(y[-1] - x[0]))
    if spread + 0.5 * farthest**2 <= _REPRESENTABLE:
        kernel, weight = np.exp(-0.5 * np.subtract.outer(y, x) ** 2), np.exp(g - top)
        total = weight @ kernel
        with np.errstate(divide="ignore"):
            logs = np.log(total) + top
        mean = (
            total if h is None else np.divide((weight * h) @ kernel, total, out=np.zeros_like(total), where=total > 0)
        )
        return logs, mean
    shape = (*g.shape[:-1], len(x))
    logs, mean = np.empty((g.size // len(y), len(x))), np.empty((g.size // len(y), len(x)))
    _rows(x, y, g.reshape(-1, len(y)), (g if h is None else h).reshape(-1, len(y)), h is not None, logs, mean)
    return logs.reshape(shape), mean.reshape(shape)


@_jit
def _rows(x: Any, y: Any, g: Any, h: Any, averages: bool, logs: Any, mean: Any) -> None:
    """``logs[r, i] = log Σ_j exp(g[r, j] − ½(x[i] − y[j])²)``, and the average of ``h[r]`` with these weights."""
    n, count = y.shape[0], (y.shape[0] + _RUN - 1) // _RUN
    highest, bound = np.empty(count), np.empty(count)
    for r in range(g.shape[0]):
        for k in range(count):
            highest[k] = g[r, k * _RUN : (k + 1) * _RUN].max()
        for i in range(x.shape[0]):
            best = 0
            for k in range(count):
                gap = max(y[k * _RUN] - x[i], x[i] - y[min((k + 1) * _RUN, n) - 1], 0.0)
                bound[k] = highest[k] - 0.5 * gap * gap
                if bound[k] > bound[best]:
                    best = k
            top, total, sum_h = -np.inf, 0.0, 0.0
            for turn in range(count):  # the most promising run first: others are then measured by it
                k = best if turn == 0 else turn - 1 if turn <= best else turn
                if bound[k] <= top - _NEXT_TO_NOTHING:
                    continue
                for j in range(k * _RUN, min((k + 1) * _RUN, n)):
                    term = g[r, j] - 0.5 * (x[i] - y[j]) ** 2
                    if term <= top - _NEXT_TO_NOTHING:
                        continue
                    if term > top:
                        shrink = np.exp(top - term)
                        total, sum_h, top = total * shrink, sum_h * shrink, term
                    weight = np.exp(term - top)
                    total += weight
                    if averages:
                        sum_h += weight * h[r, j]
            logs[r, i] = top + np.log(total) if total > 0.0 else -np.inf
            mean[r, i] = sum_h / total if total > 0.0 else 0.0


class Blocks(NamedTuple):
    """Weighted nodes in blocks that lie together, with what is needed to pass over a whole block."""

    nodes: np.ndarray
    weights: np.ndarray
    starts: np.ndarray
    low: np.ndarray
    high: np.ndarray
    top: np.ndarray

    @classmethod
    def of(cls, nodes: np.ndarray, weights: np.ndarray, shape: tuple[int, ...]) -> "Blocks":
        """Blocks of a lattice in C order: nodes (n, d), log weights (n,); those of weight 0 are left out."""
        d = len(shape)
        where = np.stack(np.unravel_index(np.flatnonzero(weights > -np.inf), shape), -1)
        blocks = np.ravel_multi_index(tuple((where // BLOCK[d]).T), shape)
        order = np.argsort(blocks, kind="stable")
        kept = np.ravel_multi_index(tuple(where[order].T), shape)
        starts = np.flatnonzero(np.diff(blocks[order], prepend=-1))
        p, g = np.ascontiguousarray(nodes[kept]), np.ascontiguousarray(weights[kept])
        low, high = np.minimum.reduceat(p, starts), np.maximum.reduceat(p, starts)
        return cls(p, g, np.append(starts, len(p)), low, high, np.maximum.reduceat(g, starts))

    def around(self, q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        r""":math:`\log\sum_j e^{g_j - |q_i - p_j|^2/2}` at points (m, d), and the average of the nodes p there, (m, d).

        Examples
        --------
        >>> blocks = Blocks.of(np.array([[-1.0], [1.0]]), np.zeros(2), (2,))
        >>> blocks.around(np.array([[0.0]]))[1].tolist()
        [[0.0]]
        """
        logs, mean = np.empty(len(q)), np.empty(q.shape)
        _around(np.ascontiguousarray(q), *self, logs, mean)
        return logs, mean


@_jit
def _around(
    q: Any, nodes: Any, weights: Any, starts: Any, low: Any, high: Any, tops: Any, logs: Any, mean: Any
) -> None:
    """Sums over nodes in blocks; blocks that cannot add anything are passed over."""
    d, count = q.shape[1], tops.shape[0]
    bound = np.empty(count)
    for i in range(q.shape[0]):
        best = 0
        for b in range(count):
            away = 0.0
            for k in range(d):
                gap = max(low[b, k] - q[i, k], q[i, k] - high[b, k], 0.0)
                away += gap * gap
            bound[b] = tops[b] - 0.5 * away
            if bound[b] > bound[best]:
                best = b
        top, total = -np.inf, 0.0
        for k in range(d):
            mean[i, k] = 0.0
        for turn in range(count):  # the most promising block first: others are then measured by it
            b = best if turn == 0 else turn - 1 if turn <= best else turn
            if bound[b] <= top - _NEXT_TO_NOTHING:
                continue
            for j in range(starts[b], starts[b + 1]):
                away = 0.0
                for k in range(d):
                    away += (q[i, k] - nodes[j, k]) ** 2
                term = weights[j] - 0.5 * away
                if term <= top - _NEXT_TO_NOTHING:
                    continue
                if term > top:
                    shrink = np.exp(top - term)
                    total *= shrink
                    for k in range(d):
                        mean[i, k] *= shrink
                    top = term
                weight = np.exp(term - top)
                total += weight
                for k in range(d):
                    mean[i, k] += weight * nodes[j, k]
        logs[i] = top + np.log(total)
        for k in range(d):
            mean[i, k] /= total
