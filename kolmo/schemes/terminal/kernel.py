"""The smoothing kernel: a piecewise polynomial, and its sums over a lattice of Gauss points."""

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import scipy.sparse as sp
from numpy.polynomial import legendre

from kolmo.grid import Grid

if TYPE_CHECKING:
    from scipy.interpolate import BSpline

# Coefficients of the centred differences δ⁰, δ², δ⁴ that turn the B-spline into a kernel of the order (Kreiss, Thomée
# & Widlund 1970): with s = sin(ω/2), δ² = −4s², the factors are 1, 1 + ⅔s², 1 + s² + (13/15)s⁴.
CORRECTIONS = {2: (1.0,), 4: (1.0, -1.0 / 6.0), 6: (1.0, -1.0 / 4.0, 13.0 / 240.0)}


@lru_cache(maxsize=8)
def kernel(order: int) -> "BSpline":
    """Smoothing kernel of an order on unit spacing, as a piecewise polynomial; integrates to one.

    Examples
    --------
    >>> round(float(kernel(4).integrate(-3, 3)), 12)
    1.0
    """
    from scipy.interpolate import BSpline  # not with the package: it takes a quarter of the time of its import

    half = order // 2 + len(CORRECTIONS[order]) - 1
    knots = np.arange(-half, half + 1.0)
    filtered = np.zeros(2 * len(CORRECTIONS[order]) - 1)
    middle = len(CORRECTIONS[order]) - 1
    difference = np.ones(1)
    for m, factor in enumerate(CORRECTIONS[order]):
        filtered[middle - m : middle + m + 1] += factor * difference
        difference = np.convolve(difference, [1.0, -2.0, 1.0])
    extended = np.concatenate([knots[0] - np.arange(order - 1, 0, -1), knots, knots[-1] + np.arange(1, order)])
    coefficients = np.zeros(len(extended) - order)
    start = order - 1
    coefficients[start : start + len(filtered)] = filtered
    return BSpline(extended, coefficients, order - 1)


@lru_cache(maxsize=16)
def gauss_rule(q: int) -> tuple[np.ndarray, np.ndarray]:
    """Gauss points on [−1, 1] and their weights; not to be changed."""
    return legendre.leggauss(q)


def support(order: int) -> int:
    """Half-width of the kernel in cells."""
    return order // 2 + len(CORRECTIONS[order]) - 1


@lru_cache(maxsize=64)
def smoothing_matrix(n: int, periodic: bool, odd: tuple[bool, bool], order: int) -> sp.csr_matrix:
    """Kernel × Gauss weights from the lattice of one axis to its n nodes, folded back at the ends; not to be changed.

    φ is extended oddly about its value at the faces, or evenly beyond walls, where the slope vanishes.
    """
    reach, q, cells = support(order), order, n if periodic else n - 1
    s, w = gauss_rule(q)
    relative = np.arange(-reach, reach)
    weights = 0.5 * w * kernel(order)(relative[:, None] + 0.5 * (s + 1.0))
    cell = np.arange(n)[:, None] + relative
    below, above = cell < 0, cell >= cells
    data = np.broadcast_to(weights, (n, 2 * reach, q)).copy()
    point = np.broadcast_to(np.arange(q), data.shape).copy()
    if periodic:
        columns = (cell % cells)[:, :, None] * q + point
        return sp.csr_matrix((data.reshape(-1), (np.repeat(np.arange(n), 2 * reach * q), columns.reshape(-1))))
    mass = weights.sum(1)
    ends = np.stack([2.0 * (outside * mass).sum(1) * o for outside, o in zip((below, above), odd, strict=True)], 1)
    data[(below & odd[0]) | (above & odd[1])] *= -1.0
    point[below | above] = np.arange(q)[::-1]
    folded = np.clip(np.where(below, -1 - cell, np.where(above, 2 * cells - 1 - cell, cell)), 0, cells - 1)
    columns = folded[:, :, None] * q + point
    inner = sp.csr_matrix(
        (data.reshape(-1), (np.repeat(np.arange(n), 2 * reach * q), columns.reshape(-1))), shape=(n, cells * q)
    )
    return sp.csr_matrix(sp.hstack([inner, sp.csr_matrix(ends)]))


def near_rough(rough: np.ndarray, grid: Grid, reach: int) -> np.ndarray:
    """Nodes whose kernel touches a rough cell."""
    near = rough
    for i, axis in enumerate(grid.axes):
        spread = np.zeros([axis.n if j == i else s for j, s in enumerate(near.shape)], dtype=bool)
        moved = np.moveaxis(spread, i, 0)
        source = np.moveaxis(near, i, 0)
        for r in range(-reach, reach):  # node j sees cells j − reach … j + reach − 1
            if axis.periodic:
                moved |= np.roll(source, -r, axis=0)
            else:
                first, last = max(0, -r), min(axis.n, len(source) - r)
                moved[first:last] |= source[first + r : last + r]
        near = spread
    return near
