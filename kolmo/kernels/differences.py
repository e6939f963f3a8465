"""Differences of samples along lines, arrays (n, lines, m) of m functions: where they stand out, what they weigh."""

from typing import Any

import numpy as np

from kolmo.kernels.cache import compiled

_jit: Any = compiled()
# Where values are finite, and the order of sums does not matter: several at once.
_fast: Any = compiled(fastmath=True)


@_fast
def ends(samples: Any, low: Any, high: Any) -> None:
    """Least and largest sample of each of m functions, samples (count, m), all of them finite."""
    for k in range(samples.shape[1]):
        least, most = samples[0, k], samples[0, k]
        for i in range(samples.shape[0]):
            least = min(least, samples[i, k])
            most = max(most, samples[i, k])
        low[k], high[k] = least, most


@_jit
def second(samples: Any, scale: Any, out: Any) -> None:
    """``out[i, l] = max_k |second difference of samples[:, l, k] at i| / scale[k]``; zero at both ends."""
    n, lines, m = samples.shape
    part = 1.0 / scale
    for i in range(1, n - 1):
        for j in range(lines):
            largest = 0.0
            for k in range(m):
                bend = abs(samples[i + 1, j, k] - 2.0 * samples[i, j, k] + samples[i - 1, j, k]) * part[k]
                largest = max(largest, bend)
            out[i, j] = largest


@_fast
def stand_out(size: Any, factor: float, least: float, found: Any) -> None:
    """``found[i, l]``: whether a size is above ``least`` and above ``factor`` times those two and three rows away."""
    n, lines = size.shape
    for i in range(3, n - 3):
        for j in range(lines):
            here = size[i, j]
            near = max(min(size[i - 2, j], size[i - 3, j]), min(size[i + 2, j], size[i + 3, j]))
            found[i, j] = (here > least) & (here > factor * near)


@_jit
def sixth(samples: Any, weights: Any, crossed: Any, stride: int, every: int, out: Any) -> None:
    """``out[r] = max_k Σ_l weights[l] |sixth difference of samples[:, l, k] at row r·every, at a stride| / 64``.

    Lines on which ``crossed`` (a count of breaks, shape (n, lines)) is not the same at both ends are left out.
    """
    lines, m = samples.shape[1:]
    total = np.zeros(m)
    for r in range(out.shape[0]):
        i = r * every
        total[:] = 0.0
        for j in range(lines):
            if crossed[i, j] != crossed[i + 6 * stride, j]:
                continue
            for k in range(m):
                total[k] += weights[j] * abs(
                    samples[i, j, k]
                    + samples[i + 6 * stride, j, k]
                    - 6.0 * (samples[i + stride, j, k] + samples[i + 5 * stride, j, k])
                    + 15.0 * (samples[i + 2 * stride, j, k] + samples[i + 4 * stride, j, k])
                    - 20.0 * samples[i + 3 * stride, j, k]
                )
        out[r] = total.max() / 64.0
