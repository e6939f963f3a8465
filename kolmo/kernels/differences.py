"""Differences of samples along lines, arrays (m, n, lines) of m functions: where they stand out, what they weigh."""

from typing import Any

from kolmo.kernels.cache import compiled

_jit: Any = compiled()
# Where values are finite, and the order of sums does not matter: several at once.
_fast: Any = compiled(fastmath=True)
# Where only the order of sums does not matter.
_sums: Any = compiled(fastmath={"reassoc", "contract"})


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
    """``out[i, l] = max_k |second difference of samples[k, :, l] at i| / scale[k]``; zero at both ends."""
    m, n, lines = samples.shape
    for k in range(m):
        part = 1.0 / scale[k]
        if lines == 1:
            line, largest = samples[k, :, 0], out[:, 0]
            for i in range(1, n - 1):
                largest[i] = max(largest[i], part * abs(line[i + 1] - 2.0 * line[i] + line[i - 1]))
            continue
        for i in range(1, n - 1):
            before, here, after, most = samples[k, i - 1], samples[k, i], samples[k, i + 1], out[i]
            for j in range(lines):
                most[j] = max(most[j], part * abs(after[j] - 2.0 * here[j] + before[j]))


@_jit
def stand_out(size: Any, factor: float, least: float, found: Any) -> None:
    """``found[i, l]``: whether a size is above ``least`` and above ``factor`` times those two and three rows away."""
    n, lines = size.shape
    if lines == 1:
        line, found_here = size[:, 0], found[:, 0]
        for i in range(3, n - 3):
            near = max(min(line[i - 2], line[i - 3]), min(line[i + 2], line[i + 3]))
            found_here[i] = (line[i] > least) & (line[i] > factor * near)
        return
    for i in range(3, n - 3):
        a, b, here, c, d, found_here = size[i - 3], size[i - 2], size[i], size[i + 2], size[i + 3], found[i]
        for j in range(lines):
            near = max(min(b[j], a[j]), min(c[j], d[j]))
            found_here[j] = (here[j] > least) & (here[j] > factor * near)


@_sums
def sixth(samples: Any, weights: Any, crossed: Any, stride: int, every: int, out: Any) -> None:
    """``out[r] = max_k Σ_l weights[l] |sixth difference of samples[k, :, l] at row r·every, at a stride| / 64``.

    Lines on which ``crossed`` (a count of breaks, shape (n, lines)) is not the same at both ends are left out; ``out``
    begins as zero.
    """
    m, _, lines = samples.shape
    for k in range(m):
        if lines == 1:
            x, breaks, part = samples[k, :, 0], crossed[:, 0], weights[0] / 64.0
            for r in range(out.shape[0]):
                i = r * every
                size = part * abs(
                    (x[i] + x[i + 6 * stride])
                    - 6.0 * (x[i + stride] + x[i + 5 * stride])
                    + 15.0 * (x[i + 2 * stride] + x[i + 4 * stride])
                    - 20.0 * x[i + 3 * stride]
                )
                whole = breaks[i] == breaks[i + 6 * stride]
                out[r] = max(out[r], size if whole else 0.0)
            continue
        for r in range(out.shape[0]):
            i = r * every
            a, b, c, d = samples[k, i], samples[k, i + stride], samples[k, i + 2 * stride], samples[k, i + 3 * stride]
            e, f, g = samples[k, i + 4 * stride], samples[k, i + 5 * stride], samples[k, i + 6 * stride]
            first, last = crossed[i], crossed[i + 6 * stride]
            total = 0.0
            for j in range(lines):
                size = abs((a[j] + g[j]) - 6.0 * (b[j] + f[j]) + 15.0 * (c[j] + e[j]) - 20.0 * d[j])
                total += weights[j] * (size if first[j] == last[j] else 0.0)
            out[r] = max(out[r], total / 64.0)
