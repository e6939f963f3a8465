r"""Noisy chains with one hidden layer of tanh units in each step, many paths at once: one fused pass in the cache.

.. math:: x_{k+1} = x_k + m_k(x_k) + \text{noise}, \qquad m_k(x) = V_k^T \tanh(W_k x + b_k) + c_k

Noise comes from Threefry-2x32 with 20 rounds, a counter-based generator (Salmon, Moraes, Dror & Shaw, 2011): the number
of a path and of a layer give its random words, so that results depend neither on blocks nor on threads.
"""

from typing import Any

import numba
import numpy as np
from numba.extending import overload

from kolmo.kernels.cache import compiled

_jit: Any = compiled(fastmath={"contract"})

BLOCK = 512  # paths whose states, noise and accumulators stay in the first-level cache
ADDITIVE, COORDINATE, SAMPLE = 0, 1, 2  # noise A ζ; β m_i ζ_i; β m ζ
GAUSSIAN, UNIFORM, DISCRETE = 0, 1, 2

f32, u32, i32, i64 = np.float32, np.uint32, np.int32, np.int64


@_jit
def _rotated(v: Any, by: int) -> Any:
    return u32(u32(v << u32(by)) | u32(v >> u32(32 - by)))


@_jit
def _four(a: Any, b: Any, r0: int, r1: int, r2: int, r3: int) -> Any:
    """Four rounds of Threefry."""
    a = u32(a + b)
    b = _rotated(b, r0) ^ a
    a = u32(a + b)
    b = _rotated(b, r1) ^ a
    a = u32(a + b)
    b = _rotated(b, r2) ^ a
    a = u32(a + b)
    b = _rotated(b, r3) ^ a
    return a, b


@_jit
def threefry(key0: Any, key1: Any, a: Any, b: Any) -> Any:
    """Two random words from a key and a counter of two words each.

    Examples
    --------
    >>> [hex(word) for word in threefry(*np.zeros(4, np.uint32))]
    ['0x6b200159', '0x99ba4efe']
    """
    key2 = u32(u32(0x1BD11BDA) ^ key0 ^ key1)
    a, b = u32(a + key0), u32(b + key1)
    a, b = _four(a, b, 13, 15, 26, 6)
    a, b = u32(a + key1), u32(b + u32(key2 + u32(1)))
    a, b = _four(a, b, 17, 29, 16, 24)
    a, b = u32(a + key2), u32(b + u32(key0 + u32(2)))
    a, b = _four(a, b, 13, 15, 26, 6)
    a, b = u32(a + key0), u32(b + u32(key1 + u32(3)))
    a, b = _four(a, b, 17, 29, 16, 24)
    a, b = u32(a + key1), u32(b + u32(key2 + u32(4)))
    a, b = _four(a, b, 13, 15, 26, 6)
    return u32(a + key2), u32(b + u32(key0 + u32(5)))


@_jit
def _radius(word: Any) -> Any:
    """√(−2 log u) for u uniform in (0, 1) with 31 bits; the logarithm from exponent and a polynomial of degree 9."""
    u = f32(i32(word >> u32(1))) * f32(2.0**-31) + f32(2.0**-32)
    bits = np.float32(u).view(np.int32)
    exponent = i32(i32(bits - i32(0x3F3504F3)) >> i32(23))
    f = np.int32(bits - i32(exponent << i32(23))).view(np.float32) - f32(1.0)
    p = f32(0.08533313047)
    p = p * f - f32(0.1426925807)
    p = p * f + f32(0.1497740144)
    p = p * f - f32(0.1657799311)
    p = p * f + f32(0.1995593306)
    p = p * f - f32(0.2500135154)
    p = p * f + f32(0.3333419342)
    p = p * f - f32(0.4999999567)
    p = p * f + f32(0.9999999717)
    log = f32(exponent) * f32(0.6931471806) + f * p
    return np.sqrt(max(f32(-2.0) * log, f32(0.0)))


@_jit
def _circle(word: Any) -> Any:
    """Cosine and sine of an angle uniform on the circle, from those of half of it: polynomials of degree 10 and 9."""
    v = f32(i32(word)) * f32(2.0**-31)
    w = v * v
    s = f32(0.0001516717037)
    s = s * w - f32(0.004674143842)
    s = s * w + f32(0.07968991828)
    s = s * w - f32(0.6459637603)
    s = (s * w + f32(1.57079632)) * v
    c = f32(-2.382415231e-05)
    c = c * w + f32(0.0009177229235)
    c = c * w - f32(0.02086268674)
    c = c * w + f32(0.2536693221)
    c = c * w - f32(1.233700529)
    c = c * w + f32(0.9999999998)
    return f32(1.0) - f32(2.0) * s * s, f32(2.0) * s * c


@_jit
def _single_tanh(x: Any) -> Any:
    """Rational function of degree 9 over 8, least maximum error on [−8.5, 8.5]: 3e-7."""
    x = min(max(x, f32(-8.5)), f32(8.5))
    s = x * x
    p = f32(1.40992423918e-08) * s + f32(2.11216095389e-05)
    p = p * s + f32(0.00352582345248)
    p = p * s + f32(0.134062102180)
    p = p * s + f32(0.999999945681)
    q = f32(8.07363019597e-07) * s + f32(0.000333569586341)
    q = q * s + f32(0.0259911534426)
    q = q * s + f32(0.467395216509)
    q = q * s + f32(1.0)
    return x * p / q


@_jit
def _double_tanh(x: Any) -> Any:
    """1 − 2/(exp(2x) + 1), the exponential from a power of two and its series of degree 13."""
    y = min(max(2.0 * x, -40.0), 40.0)
    shifted = y * 1.4426950408889634 + 6755399441055744.0  # 1.5 · 2⁵²: rounds to an integer, kept in the low bits
    n = shifted - 6755399441055744.0
    r = (y - n * 0.6931471803691238) - n * 1.9082149292705877e-10
    p = 1.0 / 6227020800.0
    p = p * r + 1.0 / 479001600.0
    p = p * r + 1.0 / 39916800.0
    p = p * r + 1.0 / 3628800.0
    p = p * r + 1.0 / 362880.0
    p = p * r + 1.0 / 40320.0
    p = p * r + 1.0 / 5040.0
    p = p * r + 1.0 / 720.0
    p = p * r + 1.0 / 120.0
    p = p * r + 1.0 / 24.0
    p = p * r + 1.0 / 6.0
    p = p * r + 1.0 / 2.0
    p = p * r + 1.0
    p = p * r + 1.0
    power = np.int64((np.float64(shifted).view(np.int64) << i64(52)) + i64(0x3FF0000000000000)).view(np.float64)
    return 1.0 - 2.0 / (p * power + 1.0)


def _tanh(x: Any) -> Any:
    """Hyperbolic tangent in the precision of x, for kernels only."""
    raise TypeError("for compiled code only")


@overload(_tanh)
def _tanh_of(x: Any) -> Any:
    of_type = _single_tanh if x == numba.float32 else _double_tanh

    def implementation(x: Any) -> Any:
        return of_type(x)

    return implementation


@_jit
def _mean(x: Any, n: int, W: Any, b: Any, V: Any, c: Any, m: Any) -> None:
    """m = Vᵀ tanh(W x + b) + c for the first n states x (d, ·) of a block."""
    d = x.shape[0]
    for i in range(d):
        for p in range(n):
            m[i, p] = c[i]
    if d == 1:
        x0, m0 = x[0], m[0]
        for j in range(W.shape[0]):
            w0, s, v0 = W[j, 0], b[j], V[j, 0]
            for p in range(n):
                m0[p] += v0 * _tanh(w0 * x0[p] + s)
    elif d == 2:
        x0, x1, m0, m1 = x[0], x[1], m[0], m[1]
        for j in range(W.shape[0]):
            w0, w1, s, v0, v1 = W[j, 0], W[j, 1], b[j], V[j, 0], V[j, 1]
            for p in range(n):
                t = _tanh(w0 * x0[p] + w1 * x1[p] + s)
                m0[p] += v0 * t
                m1[p] += v1 * t
    else:
        x0, x1, x2, m0, m1, m2 = x[0], x[1], x[2], m[0], m[1], m[2]
        for j in range(W.shape[0]):
            w0, w1, w2, s, v0, v1, v2 = W[j, 0], W[j, 1], W[j, 2], b[j], V[j, 0], V[j, 1], V[j, 2]
            for p in range(n):
                t = _tanh(w0 * x0[p] + w1 * x1[p] + w2 * x2[p] + s)
                m0[p] += v0 * t
                m1[p] += v1 * t
                m2[p] += v2 * t


@_jit
def _words(key: Any, first: int, counter: int, n: int, words: Any) -> None:
    """Two random words (2, ·) for each of n paths from the number first on."""
    one, other, start = words[0], words[1], u32(first)
    for p in range(n):
        one[p], other[p] = threefry(key[0], key[1], u32(start + u32(p)), u32(counter))


@_jit
def draw(law: int, values: Any, upper: Any, key: Any, first: int, layer: int, n: int, words: Any, zeta: Any) -> None:
    """Standardised noise zeta (r, ·) of a layer for n paths from the number first on: two values from two words."""
    r = zeta.shape[0]
    pairs = (r + 1) // 2
    one = zeta.dtype.type(1.0)
    for pair in range(pairs):
        _words(key, first, layer * pairs + pair, n, words)
        a, b = words[0], words[1]
        za = zeta[2 * pair]
        if law == GAUSSIAN:
            zb = zeta[min(2 * pair + 1, r - 1)]  # of an odd last one, the cosine alone is used
            for p in range(n):
                c, s = _circle(b[p])
                radius = _radius(a[p])
                zb[p] = one * (radius * s)
                za[p] = one * (radius * c)
            continue
        for half in range(min(2, r - 2 * pair)):
            w, z = words[half], zeta[2 * pair + half]
            if law == UNIFORM:
                for p in range(n):
                    z[p] = one * (f32(i32(w[p])) * f32(2.0**-31 * 1.7320508075688772))
            else:
                for p in range(n):
                    value = values[0]
                    for v in range(upper.shape[0]):
                        value = values[v + 1] if w[p] >= upper[v] else value
                    z[p] = value


@_jit
def _noise(kind: int, m: Any, n: int, zeta: Any, additive: Any, beta: Any, noise: Any) -> None:
    """Noise of one layer for the first n states of a block."""
    d = m.shape[0]
    for i in range(d):
        if kind == ADDITIVE:
            for p in range(n):
                noise[i, p] = additive[i, 0] * zeta[0, p]
            for c in range(1, zeta.shape[0]):
                if additive[i, c] != 0.0:
                    for p in range(n):
                        noise[i, p] += additive[i, c] * zeta[c, p]
        else:
            z = zeta[i if kind == COORDINATE else 0]
            for p in range(n):
                noise[i, p] = beta * m[i, p] * z[p]


@_jit
def march(
    x: Any,
    layers: Any,
    kind: int,
    law: int,
    key: Any,
    first: int,
    start: int,
    stop: int,
    means: Any,
    noises: Any,
) -> None:
    """Take states x ``(d, n)`` in place through the layers start, …, stop − 1.

    ``layers`` are arrays over the layers: W (L, units, d), b (L, units), V (L, units, d), c (L, d), the noise matrix
    (L, d, r), the factor β (L,) of multiplicative noise, values (L, q) and upper ends (L, q − 1), in words, of discrete
    noise. Path p of x has the number first + p. Where ``means`` is not empty, it takes m of the last layer, and
    ``noises`` takes its noise.
    """
    W, b, V, c, additive, beta, values, upper = layers
    d, paths = x.shape
    r = additive.shape[2] if kind == ADDITIVE else d if kind == COORDINATE else 1
    keep = means.shape[0] > 0
    here, m, noise = np.empty((d, BLOCK), x.dtype), np.empty((d, BLOCK), x.dtype), np.empty((d, BLOCK), x.dtype)
    zeta, words = np.empty((r, BLOCK), x.dtype), np.empty((2, BLOCK), np.uint32)
    for begin in range(0, paths, BLOCK):
        n = min(BLOCK, paths - begin)
        for i in range(d):
            for p in range(n):
                here[i, p] = x[i, begin + p]
        for k in range(start, stop):
            _mean(here, n, W[k], b[k], V[k], c[k], m)
            draw(law, values[k], upper[k], key, first + begin, k, n, words, zeta)
            _noise(kind, m, n, zeta, additive[k], beta[k], noise)
            for i in range(d):
                for p in range(n):
                    here[i, p] += m[i, p] + noise[i, p]
                if keep and k == stop - 1:
                    for p in range(n):
                        means[i, begin + p] = m[i, p]
                        noises[i, begin + p] = noise[i, p]
        for i in range(d):
            for p in range(n):
                x[i, begin + p] = here[i, p]
