"""Splines of degree seven in torch: averages over many positions, their transpose and derivatives.

The arguments are those of ``kolmo.kernels.septic``. Each position reads eight coefficients an axis; the eight along the
last axis are gathered together, for all nodes and as many feet as memory allows at once.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.polynomial import polynomial

from kolmo.arrays import Held
from kolmo.kernels.septic import DEGREE, LINEAR, PIECES, WIDTH, WRAP

# Numbers gathered at a time.
GATHERED = 2**24


@lru_cache(maxsize=16)
def _table(low: int, high: int) -> Held:
    """Weights (10, 8) of the coefficients for powers of u − ½ in a cell, and for distances beyond the two ends."""
    table = np.concatenate([PIECES, np.zeros((2, WIDTH))])
    start, stop = polynomial.polyval(np.array([-0.5, 0.5]), PIECES).T
    if low == LINEAR:
        table[WIDTH] = np.append(0.0, start[:-1]) - start
    if high == LINEAR:
        table[WIDTH + 1] = stop - np.append(stop[1:], 0.0)
    return Held(table)


def _basis(z: Any, n: int, ends: Any, m: int, slopes: bool) -> tuple[Any, Any, Any]:
    """Which of m coefficients positions read, their weights, and the derivatives of these; each (..., 8)."""
    if n == 1:
        one = torch.ones_like(z)[..., None]
        return torch.zeros_like(one, dtype=torch.int64), one, torch.zeros_like(one)
    periodic = ends[0] == WRAP
    near = z - n * torch.floor(z / n) if periodic else z.clamp(0.0, n - 1.0)
    cell = near.floor().clamp(max=n - 1 if periodic else n - 2)
    v, beyond = near - cell - 0.5, torch.zeros_like(z) if periodic else z - near
    table = _table(int(ends[0]), int(ends[1])).like(z)
    powers = torch.ones((*z.shape, WIDTH + 2), dtype=z.dtype, device=z.device)
    powers[..., 1:WIDTH] = torch.cumprod(v[..., None].expand(*z.shape, DEGREE), -1)
    rates = None
    if slopes:
        rates = torch.zeros_like(powers)
        rates[..., 1:WIDTH] = powers[..., :DEGREE] * torch.arange(1, WIDTH, dtype=z.dtype, device=z.device)
        rates *= (beyond == 0.0)[..., None]
        rates[..., WIDTH], rates[..., WIDTH + 1] = beyond < 0.0, beyond > 0.0
        rates = rates @ table
    powers[..., WIDTH], powers[..., WIDTH + 1] = beyond.clamp(max=0.0), beyond.clamp(min=0.0)
    at = cell.long()[..., None] + torch.arange(WIDTH, device=z.device)
    return (at % m if periodic else at), powers @ table, rates


def _blocks(positions: Any, columns: int) -> Iterator[slice]:
    """The feet of a node that are done together."""
    feet, nodes, _ = positions.shape
    step = max(1, GATHERED // max(nodes * WIDTH * columns, 1))
    return (slice(first, first + step) for first in range(0, feet, step))


def _read(c: Any, shape: Any, ends: Any, positions: Any, slopes: bool = False) -> list[tuple[Any, Any, Any]]:
    """What positions (q, points, 3) read along each axis: ``_basis``, with axes (points, q, 8)."""
    z = positions.transpose(0, 1)
    return [_basis(z[..., i].contiguous(), int(shape[i]), ends[i], c.shape[i], slopes) for i in range(3)]


def _lines(c: Any, reads: list[tuple[Any, Any, Any]]) -> Iterator[tuple[int, int, Any]]:
    """Per pair of coefficients along the first two axes: which, and the places of those along the last, flattened."""
    (first, _, _), (second, _, _), (last, _, _) = reads
    for a in range(first.shape[-1]):
        for b in range(second.shape[-1]):
            line = (first[..., a] * c.shape[1] + second[..., b]) * c.shape[2]
            yield a, b, line[..., None] + last


def average(c: Any, shape: Any, ends: Any, positions: Any, weights: Any, out: Any) -> None:
    """``out[i, :] = Σ_q weights[q] s(positions[q, i])``."""
    flat, nodes, columns = c.reshape(-1, c.shape[3]), positions.shape[1], c.shape[3]
    out.zero_()
    for feet in _blocks(positions, columns):
        reads = _read(c, shape, ends, positions[feet])
        (_, v, _), (_, w, _), (_, x, _) = reads
        for a, b, at in _lines(c, reads):
            factor = (weights[feet] * v[..., a] * w[..., b])[..., None] * x
            factor, values = factor.reshape(nodes, 1, -1), flat[at.reshape(nodes, -1)]
            # a product of matrices for every node pays where these have several columns
            out += (factor @ values)[:, 0] if columns > 1 else (factor[:, 0] * values[..., 0]).sum(-1, keepdim=True)


def spread(p: Any, shape: Any, ends: Any, positions: Any, weights: Any, out: Any) -> None:
    """Transpose of ``average``: adds to out (m0, m1, m2, k)."""
    flat, columns = out.reshape(-1, out.shape[3]), out.shape[3]
    for feet in _blocks(positions, columns):
        reads = _read(out, shape, ends, positions[feet])
        (_, v, _), (_, w, _), (_, x, _) = reads
        for a, b, at in _lines(out, reads):
            factor = (weights[feet] * v[..., a] * w[..., b])[..., None] * x
            flat.index_add_(0, at.reshape(-1), (factor[..., None] * p[:, None, None]).reshape(-1, columns))


def slopes(c: Any, p: Any, shape: Any, ends: Any, positions: Any, weights: Any, out: Any) -> None:
    """``out[q, i, :] = weights[q] Σ_k p[i, k] ∇s_k(positions[q, i])``: derivative with respect to the positions."""
    flat, nodes, columns = c.reshape(-1, c.shape[3]), positions.shape[1], c.shape[3]
    out.zero_()
    for feet in _blocks(positions, columns):
        reads = _read(c, shape, ends, positions[feet], slopes=True)
        (_, v, dv), (_, w, dw), (_, x, dx) = reads
        part = out[feet].transpose(0, 1)
        for a, b, at in _lines(c, reads):
            values = (flat[at.reshape(nodes, -1)] * p[:, None]).sum(-1).reshape(at.shape)
            along, turned = (x * values).sum(-1), (dx * values).sum(-1)
            part[..., 0] += dv[..., a] * w[..., b] * along
            part[..., 1] += v[..., a] * dw[..., b] * along
            part[..., 2] += v[..., a] * w[..., b] * turned
        part *= weights[feet][:, None]
