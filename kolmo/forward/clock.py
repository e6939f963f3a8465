"""Time nodes for a law that starts from points: steps in proportion to the time that has passed."""

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from kolmo.grid.times import SAME, longest_step, stepped


def graded_clock(
    horizon: float,
    first: float,
    steps: int,
    *,
    fixed: Sequence[float] = (),
    breaks: Sequence[float] = (),
    longest: float = math.inf,
    growth: float = 1.0,
) -> np.ndarray:
    """Time nodes from 0 to the horizon: ``steps`` equal ones, then half as many of twice the length, again and again.

    A law that starts from a point has seen only the scale √t at time t, so that steps in proportion to t are all of the
    same accuracy; there are ``steps / 2`` of them in each doubling of the time. Lengths come from a few values only:
    a factorisation serves many steps.

    Parameters
    ----------
    horizon : float
        Time T.
    first : float
        Length of the first steps, at most T / steps.
    steps : int
        Number of the first steps, even.
    fixed : sequence of float
        Times that shall be nodes.
    breaks : sequence of float
        Breakpoints: nodes too, with some steps from one to the next.
    longest : float
        No step is longer.
    growth : float
        So many times the steps of the first of several levels; see :func:`kolmo.grid.times.stepped`.

    Examples
    --------
    >>> graded_clock(16.0, 1.0, 4).tolist()
    [0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0]
    >>> graded_clock(4.0, 1.0, 4, fixed=[1.5]).tolist()
    [0.0, 0.75, 1.5, 2.333..., 3.166..., 4.0]
    """
    bends, end = [], steps * first
    while end < horizon and 2.0 * first * (end / (steps * first)) <= longest:
        bends.append(end)
        end *= 2.0
    given = sorted({0.0, horizon, *(t for t in (*fixed, *breaks) if 0.0 < t < horizon)})
    pieces = list(pairwise(sorted({0.0, horizon, *(t for t in breaks if 0.0 < t < horizon)})))
    ends = sorted({*given, *(t for t in bends if not any(abs(t - g) <= SAME * t for g in given))})
    nodes = [np.zeros(1)]
    for a, b in pairwise(ends):
        # a stretch that lies within two doublings is in the finer steps of the first
        doublings = math.floor(math.log2(a / (steps * first)) + 1e-9) + 1 if a >= steps * first * (1 - 1e-9) else 0
        piece = next((p, q) for p, q in pieces if b <= q)
        longer = min(longest, longest_step(*piece, growth)) if len(pieces) > 1 else longest
        nodes.append(stepped(a, b, min(first * 2.0**doublings, longer), growth))
    return np.concatenate(nodes)
