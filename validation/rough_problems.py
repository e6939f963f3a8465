"""Random problems whose data jump, bend, are narrow in space or time, or degenerate at a face; each with its answer.

Every maker takes a random generator and gives the equation, points, and the exact values there: Gaussian integrals,
Kac's functional (Kac 1949), dry friction (Karatzas and Shreve 1991, section 6.5), Green's function on an interval, the
noncentral χ² law. A problem can be asked in other units of place, time and value: nothing else about it changes.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from scipy.integrate import quad
from scipy.special import erfc, ive
from scipy.stats import ncx2, norm

from kolmo import SDE, Absorbing, Box, KolmogorovProblem
from kolmo.arrays import as_numpy

Array = np.ndarray
# Units of place, time and value are drawn between the negative and positive power of ten of these.
POWERS = 9.0
QUAD = {"epsabs": 1e-14, "epsrel": 1e-12, "limit": 400}


@dataclass(frozen=True)
class Rough:
    """A problem, points (P, d), its exact answer (P,) and the unit of its values."""

    problem: KolmogorovProblem
    points: Array
    answer: Array
    unit: float = 1.0


def asked(problem: KolmogorovProblem, points: Any, answer: Any) -> Rough:
    """Put a problem together; points of one dimension may be plain numbers."""
    return Rough(problem, np.asarray(points, float).reshape(-1, problem.dim), np.asarray(answer, float))


def brownian(sigma: float, dim: int = 1, drift: float = 0.0) -> SDE:
    """Brownian motion with drift."""
    return SDE(drift if dim == 1 else np.full(dim, drift), sigma, dim=dim)


def direction(rng: np.random.Generator) -> Array:
    """A unit vector of the plane."""
    angle = rng.uniform(0, np.pi)
    return np.array([np.cos(angle), np.sin(angle)])


# --------------------------------------------------------------------------------------------- Gaussian expectations
def bump(x: Array, centre: float, width: float) -> Array:
    """A Gaussian of height one."""
    return np.exp(-((x - centre) ** 2) / (2 * width**2))


def mean_bump(mean: Array, spread: Array, centre: float, width: float) -> Array:
    """Its mean under a normal law."""
    total = np.hypot(width, spread)
    return width / total * np.exp(-((mean - centre) ** 2) / (2 * total**2))


def mean_wave(mean: Array, spread: float, k: float) -> Array:
    """Mean of cos(k·) under a normal law."""
    return np.asarray(np.exp(-((k * spread) ** 2) / 2) * np.cos(k * mean))


def time_above(x: float, m: float, s: float, start: float, end: float) -> float:
    """Expected time in which x + m t + s W is positive, between two times."""

    def integrand(q: float) -> float:
        return float(2 * q * norm.cdf((x + m * q * q) / (s * q))) if q > 0 else 0.0

    # the integrand changes where the path's mean, and where its spread, meets the place
    kinks = {abs(x) / s, math.sqrt(max(-x / m, 0.0)) if m else 0.0}
    inside = sorted(q for q in kinks if math.sqrt(start) < q < math.sqrt(end))
    return float(quad(integrand, math.sqrt(start), math.sqrt(end), points=inside or None, **QUAD)[0])


def kac(y: float, theta: float, T: float) -> float:
    """E exp(−θ · time that W spends above 0 until T) from y: to the first zero, then Lévy's arcsine law."""
    rate = theta if y > 0 else 0.0
    if y == 0.0:
        return float(ive(0, theta * T / 2))
    a, least = abs(y), abs(y) / math.sqrt(T)

    def after(v: float) -> float:  # W meets 0 first at (a / v)², v the modulus of a standard normal variable
        return float(2 * norm.pdf(v) * math.exp(-rate * (a / v) ** 2) * ive(0, theta * (T - (a / v) ** 2) / 2))

    met = quad(after, least, 40.0, points=[least + 0.1, least + 1.0, least + 6.0], **QUAD)[0] if least < 30 else 0.0
    return float(met + np.exp(-rate * T) * (1 - 2 * norm.sf(least)))


def friction(x: float, function: Callable[[float], float], m: float, T: float) -> float:
    """E f(X_T) of dX = −m sign(X) dt + dW from x."""

    def density(y: float) -> float:
        a, b = abs(x), y if x >= 0 else -y
        front = 1 / math.sqrt(2 * np.pi * T)
        if b >= 0:
            direct = front * math.exp(-((a - b - m * T) ** 2) / (2 * T))
            return float(direct + m * math.exp(-2 * m * b) * norm.sf((a + b - m * T) / math.sqrt(T)))
        direct = front * math.exp(2 * m * a - (a - b + m * T) ** 2 / (2 * T))
        return float(direct + m * math.exp(2 * m * b) * norm.sf((a - b - m * T) / math.sqrt(T)))

    far = 12 * math.sqrt(T) + 5 + abs(x)
    total = 0.0
    for low, high in ((-far, 0.0), (0.0, far)):
        middle = [p for p in (x, x - m * T, x + m * T) if low < p < high]
        total += quad(lambda y: density(y) * function(y), low, high, points=middle or None, **QUAD)[0]
    return total


def before_exit(x: float, source: Callable[[float], float], L: float, kinks: Sequence[float]) -> float:
    """E of a source summed up along W from x until it leaves (−L, L): by Green's function."""
    ends = sorted({-L, L, x, *(k for k in kinks if -L < k < L)})

    def green(y: float) -> float:
        return (L - max(x, y)) * (min(x, y) + L) / L

    return float(sum(quad(lambda y: green(y) * source(y), a, b, **QUAD)[0] for a, b in pairwise(ends)))


# ------------------------------------------------------------------------------------------- jumps and kinks in space
def jumping_source(rng: np.random.Generator) -> Rough:
    """A source with up to four jumps; how long it is met, by superposition."""
    s, m, T = rng.uniform(0.3, 2), rng.uniform(-1, 1), rng.uniform(0.2, 3)
    spread, count = s * math.sqrt(T), int(rng.integers(1, 5))
    c, a = rng.normal(size=count) * 0.7 * spread, rng.uniform(-1, 1, count)
    at = rng.normal(size=2) * 0.7 * spread
    problem = KolmogorovProblem(
        brownian(s, drift=m),
        lambda x: 0 * x[..., 0],
        T,
        source=lambda t, x: ((x > c) * a).sum(-1),
    )
    return asked(problem, at, [sum(w * time_above(x - k, m, s, 0, T) for k, w in zip(c, a, strict=True)) for x in at])


def jumping_killing(rng: np.random.Generator) -> Rough:
    """Killed at a rate above a place."""
    s, theta, T, c = rng.uniform(0.3, 2), rng.uniform(0.3, 5), rng.uniform(0.2, 3), rng.normal()
    y = rng.normal(size=2) * math.sqrt(T) * 0.7
    problem = KolmogorovProblem(
        brownian(s), lambda x: 1 + 0 * x[..., 0], T, killing=lambda t, x: theta * (x[..., 0] > c)
    )
    return asked(problem, c + s * y, [kac(v, theta, T) for v in y])


def jumping_drift(rng: np.random.Generator) -> Rough:
    """Dry friction; φ is smooth, bends or jumps at the same place."""
    m, c, T = rng.uniform(0.3, 3), rng.uniform(-1, 1), rng.uniform(0.2, 2)
    at = c + rng.normal(size=2) * math.sqrt(T)
    shapes: list[Callable[[Any], Any]] = [np.square, np.abs, lambda z: (z > 0) * 1.0]
    f = shapes[int(rng.integers(3))]
    problem = KolmogorovProblem(SDE(lambda t, x: -m * np.sign(x - c), 1.0, dim=1), lambda x: f(x[..., 0] - c), T)
    return asked(problem, at, [friction(x - c, f, m, T) for x in at])


def jumping_noise(rng: np.random.Generator) -> Rough:
    """The noise jumps, and φ at the same place."""
    a, b = 10 ** rng.uniform(-1, 0.5, 2)
    c, T = rng.uniform(-1, 1), rng.uniform(0.2, 2)
    z = rng.normal(size=2) * math.sqrt(T) * min(a, b)

    def above(z: float) -> float:
        if z > 0:
            return float(1 - a / (a + b) * erfc(z / (a * math.sqrt(2 * T))))
        return float(b / (a + b) * erfc(-z / (b * math.sqrt(2 * T))))

    sde = SDE(0.0, lambda t, x: np.where(x[..., 0] > c, a, b), dim=1)
    return asked(KolmogorovProblem(sde, lambda x: (x[..., 0] > c) * 1.0, T), c + z, [above(v) for v in z])


def stationary_source(rng: np.random.Generator) -> Rough:
    """Before leaving an interval: a source with jumps, a kink and a narrow bump."""
    L, at = rng.uniform(0.5, 3), rng.uniform(-0.9, 0.9, 2)
    c, k, w = rng.uniform(-0.9, 0.9, 2) * L, rng.uniform(-0.8, 0.8) * L, 10 ** rng.uniform(-2, -0.5) * L
    part = rng.uniform(-1, 1, 3)

    def source(y: Any) -> Any:
        return (
            part[0] * ((y > c[0]) + 2.0 * (y > c[1]))
            + part[1] * np.abs(y - k)
            + part[2] * L / w * bump(y, 0.5 * (c[0] + k), w)
        )

    middle = 0.5 * (c[0] + k)
    kinks = [*c, k, middle, *(middle + n * w for n in (-8, -3, 3, 8))]
    problem = KolmogorovProblem(
        brownian(1.0), None, None, Box(-L, L, "absorbing"), source=lambda t, x: source(x[..., 0])
    )
    return asked(problem, at * L, [before_exit(x, source, L, kinks) for x in at * L])


# ------------------------------------------------------------------------------------------------------ slanted breaks
def slanted_source(rng: np.random.Generator) -> Rough:
    """Two dimensions, the source jumps across a line."""
    s, T, c, w = rng.uniform(0.5, 1.5), rng.uniform(0.3, 2), rng.normal() * 0.4, direction(rng)
    at = rng.normal(size=(2, 2)) * 0.5
    problem = KolmogorovProblem(brownian(s, 2), lambda x: 0 * x[..., 0], T, source=lambda t, x: (x @ w > c) * 1.0)
    return asked(problem, at, [time_above(x @ w - c, 0.0, s, 0, T) for x in at])


def slanted_killing(rng: np.random.Generator) -> Rough:
    """Two dimensions, killed on one side of a line."""
    s, T, c, w = rng.uniform(0.5, 1.5), rng.uniform(0.3, 1.5), rng.normal() * 0.4, direction(rng)
    theta, at = rng.uniform(0.3, 4), rng.normal(size=(2, 2)) * 0.5
    problem = KolmogorovProblem(
        brownian(s, 2), lambda x: 1 + 0 * x[..., 0], T, killing=lambda t, x: theta * (x @ w > c)
    )
    return asked(problem, at, [kac((x @ w - c) / s, theta, T) for x in at])


def slanted_drift(rng: np.random.Generator) -> Rough:
    """Two dimensions, friction across a line."""
    m, T, c, w = rng.uniform(0.3, 2), rng.uniform(0.3, 1.5), rng.normal() * 0.4, direction(rng)
    at = rng.normal(size=(2, 2)) * 0.5
    sde = SDE(lambda t, x: -m * np.sign(x @ w - c)[..., None] * w, 1.0, dim=2)
    problem = KolmogorovProblem(sde, lambda x: (x @ w - c) ** 2, T)
    return asked(problem, at, [friction(x @ w - c, lambda y: y * y, m, T) for x in at])


# ----------------------------------------------------------------------------------------------------- narrow features
def narrow_window(rng: np.random.Generator) -> Rough:
    """P(a < X_T < a + w): w down to 1/1000 of the spread, in two dimensions 1/200."""
    d = 1 if rng.random() < 0.7 else 2
    s, T, k = rng.uniform(0.3, 2), rng.uniform(0.2, 3), rng.uniform(0.5, 2)
    spread = s * math.sqrt(T)
    w, a = spread * 10 ** rng.uniform(-3 if d == 1 else -2.3, 0), rng.normal() * spread
    at = rng.normal(size=(2, d)) * 0.5 * spread

    def phi(x: Array) -> Array:
        inside = ((x[..., 0] > a) & (x[..., 0] < a + w)) * 1.0
        return inside if d == 1 else inside * np.cos(k / spread * x[..., 1])

    answer = norm.cdf((a + w - at[:, 0]) / spread) - norm.cdf((a - at[:, 0]) / spread)
    if d == 2:
        answer = answer * mean_wave(at[:, 1], spread, k / spread)
    return asked(KolmogorovProblem(brownian(s, d), phi, T), at, answer)


def narrow_bumps(rng: np.random.Generator) -> Rough:
    """One to three bumps in φ: widths down to 1/1000 of the spread, in two dimensions 1/200."""
    d = 1 if rng.random() < 0.7 else 2
    s, T, count = rng.uniform(0.3, 2), rng.uniform(0.2, 3), int(rng.integers(1, 4))
    spread = s * math.sqrt(T)
    c, w = rng.normal(size=(count, d)) * spread, spread * 10 ** rng.uniform(-3 if d == 1 else -2.3, -0.3, count)
    height, at = rng.uniform(0.5, 2, count) * (spread / w) ** d, rng.normal(size=(2, d)) * 0.7 * spread

    def phi(x: Array) -> Array:
        parts = [h * np.prod(bump(x, k, v), axis=-1) for h, k, v in zip(height, c, w, strict=True)]
        return np.asarray(1.0 + sum(parts))

    parts = [h * np.prod(mean_bump(at, spread, k, v), axis=-1) for h, k, v in zip(height, c, w, strict=True)]
    return asked(KolmogorovProblem(brownian(s, d), phi, T), at, 1.0 + sum(parts))


def narrow_source(rng: np.random.Generator) -> Rough:
    """A narrow source in a wide space."""
    s, T = rng.uniform(0.5, 2), rng.uniform(0.5, 4)
    w, c, at = s * math.sqrt(T) * 10 ** rng.uniform(-3, -0.5), rng.uniform(-3, 3), rng.uniform(-3, 3, 2)

    def met(x: float) -> float:
        kinks = {math.sqrt(T) * f for f in (0.1, 0.5)} | {abs(x - c) / s, w / s}
        inside = sorted(q for q in kinks if 0 < q < math.sqrt(T))
        f = lambda q: 2 * q / w * mean_bump(np.float64(x), np.float64(s * q), c, w)  # noqa: E731
        return float(quad(f, 0, math.sqrt(T), points=inside, **QUAD)[0])

    problem = KolmogorovProblem(
        brownian(s), lambda x: 1 + 0 * x[..., 0], T, source=lambda t, x: bump(x[..., 0], c, w) / w
    )
    return asked(problem, at, [1 + met(x) for x in at])


# ------------------------------------------------------------------------------------------------ windows in time
def stretch(rng: np.random.Generator, T: float) -> tuple[float, float]:
    """A window of [0, T], down to a hundredth of it."""
    length = T * 10 ** rng.uniform(-2, -0.3)
    start = rng.uniform(0.02, 0.98) * (T - length)
    return start, start + length


def drift_window(rng: np.random.Generator) -> Rough:
    """A drift that is on for some time."""
    T, s, K, k = rng.uniform(0.3, 3), rng.uniform(0.3, 1), rng.normal() * 0.5, rng.uniform(0.5, 2)
    t0, t1 = stretch(rng, T)
    push, at = rng.uniform(-2, 2) / (t1 - t0), rng.normal(size=2)
    jumps = rng.random() < 0.5
    sde = SDE(lambda t, x: push * (t0 <= t < t1) + 0 * x, s, dim=1)
    phi = (lambda x: (x[..., 0] > K) * 1.0) if jumps else (lambda x: np.cos(k * x[..., 0]))
    mean, spread = at + push * (t1 - t0), s * math.sqrt(T)
    answer = norm.cdf((mean - K) / spread) if jumps else mean_wave(mean, spread, k)
    return asked(KolmogorovProblem(sde, phi, T), at, answer)


def killing_window(rng: np.random.Generator) -> Rough:
    """A killing rate that is on for some time, in one or two dimensions."""
    d, T, s, k = int(rng.integers(1, 3)), rng.uniform(0.3, 3), rng.uniform(0.3, 1), rng.uniform(0.5, 2)
    t0, t1 = stretch(rng, T)
    rate, at = rng.uniform(0.2, 3) / (t1 - t0), rng.normal(size=(2, d))
    problem = KolmogorovProblem(
        brownian(s, d),
        lambda x: np.cos(k * x).prod(-1),
        T,
        killing=lambda t, x: rate * (t0 <= t < t1) + 0 * x[..., 0],
    )
    return asked(problem, at, np.exp(-rate * (t1 - t0)) * mean_wave(at, s * math.sqrt(T), k).prod(-1))


def source_window(rng: np.random.Generator) -> Rough:
    """A source that jumps in space and is on for some time."""
    s, m, T = rng.uniform(0.3, 2), rng.uniform(-1, 1), rng.uniform(0.2, 3)
    t0, t1 = stretch(rng, T)
    c, at = 0.5 * rng.normal() * s * math.sqrt(T), rng.normal(size=2) * s * math.sqrt(T) * 0.7
    problem = KolmogorovProblem(
        brownian(s, drift=m),
        lambda x: 0 * x[..., 0],
        T,
        source=lambda t, x: (x[..., 0] > c) * (t0 <= t < t1) / (t1 - t0),
    )
    return asked(problem, at, [time_above(x - c, m, s, t0, t1) / (t1 - t0) for x in at])


def source_pulse(rng: np.random.Generator) -> Rough:
    """A smooth source that is on for a short time."""
    tau, t0, s, k = 10 ** rng.uniform(-2.5, -1), rng.uniform(0.2, 0.8), rng.uniform(0.5, 1.5), rng.uniform(0.5, 2)
    at = rng.normal(size=2)
    ends = max(-12.0, -t0 / tau), min(12.0, (1 - t0) / tau)
    part = quad(lambda z: np.exp(-((k * s) ** 2) * (t0 + tau * z) / 2) * norm.pdf(z), *ends, **QUAD)[0]
    problem = KolmogorovProblem(
        brownian(s),
        lambda x: np.cos(k * x[..., 0]),
        1.0,
        source=lambda t, x: norm.pdf((t - t0) / tau) / tau * np.cos(k * x[..., 0]),
    )
    return asked(problem, at, np.cos(k * at) * (part + np.exp(-((k * s) ** 2) / 2)))


def face_window(rng: np.random.Generator) -> Rough:
    """Paid where a path arrives at a face during some time: the law of the first passage."""
    s, T = rng.uniform(0.3, 2), rng.uniform(0.3, 3)
    t0, t1 = stretch(rng, T)
    at = s * math.sqrt(T) * rng.uniform(0.1, 1.5, 2)

    def arrived(t: float) -> Array:
        return np.asarray(2 * norm.sf(at / (s * math.sqrt(t))))

    box = Box(0.0, np.inf, [(Absorbing(lambda t, x: 1.0 * (t0 <= t < t1) + 0 * x[..., 0]), "open")])
    return asked(KolmogorovProblem(brownian(s), lambda x: 0 * x[..., 0], T, box), at, arrived(t1) - arrived(t0))


# ------------------------------------------------------------------------------------------- repelled, degenerate faces
def repelled(rng: np.random.Generator) -> Rough:
    """A Bessel process: an infinite drift keeps it from the face."""
    delta, T, K = rng.uniform(2.2, 5), rng.uniform(0.3, 2), rng.uniform(0.5, 2)
    at = rng.uniform(0.05, 2, 2) * math.sqrt(T)
    sde = SDE(lambda t, x: (delta - 1) / (2 * x), 1.0, dim=1)
    box = Box(0.0, np.inf, [("entrance", "open")])
    problem = KolmogorovProblem(sde, lambda x: (x[..., 0] > K) * 1.0, T, box)
    return asked(problem, at, ncx2.sf(K**2 / T, delta, at**2 / T))


def degenerate(rng: np.random.Generator) -> Rough:
    """Square-root noise that dies at the face."""
    a, b, s, T = rng.uniform(0.3, 2), rng.uniform(0.2, 1), rng.uniform(0.2, 1), rng.uniform(0.3, 2)
    K, at, e = rng.uniform(0.3, 2) * b, rng.uniform(0.1, 2, 2) * b, math.exp(-a * T)
    c = s * s * (1 - e) / (4 * a)
    sde = SDE(lambda t, x: a * (b - x), covariance=lambda t, x: (s * s * x)[..., None], dim=1)
    box = Box(0.0, np.inf, [("natural", "open")])
    return asked(
        KolmogorovProblem(sde, lambda x: (x[..., 0] > K) * 1.0, T, box),
        at,
        ncx2.sf(K / c, 4 * a * b / s**2, at * e / c),
    )


def one_way(rng: np.random.Generator) -> Rough:
    """No noise along one axis: paths enter through one absorbing face, and leave through the other."""
    v, s, T, k = rng.uniform(0.3, 1.5) * rng.choice([-1, 1]), rng.uniform(0.5, 1.5), rng.uniform(0.3, 1), 1.3
    at = np.stack([rng.uniform(0.1, 0.9, 2), rng.normal(size=2)], -1)
    left = (1 - at[:, 0] if v > 0 else at[:, 0]) / abs(v)
    out, never = Absorbing(lambda t, x: np.cos(k * x[..., 1])), Absorbing(7.0)
    box = Box([0.0, -np.inf], [1.0, np.inf], [(never, out) if v > 0 else (out, never), ("open", "open")])
    sde = SDE(np.array([v, 0.0]), covariance=np.diag([0.0, s * s]), dim=2)
    problem = KolmogorovProblem(sde, lambda x: np.cos(k * x[..., 1]), T, box)
    return asked(
        problem, at, [float(mean_wave(y, s * math.sqrt(min(r, T)), k)) for y, r in zip(at[:, 1], left, strict=True)]
    )


MAKERS: dict[str, Callable[[np.random.Generator], Rough]] = {
    f.__name__: f
    for f in (
        jumping_source, jumping_killing, jumping_drift, jumping_noise, stationary_source, slanted_source,
        slanted_killing, slanted_drift, narrow_window, narrow_bumps, narrow_source, drift_window, killing_window,
        source_window, source_pulse, face_window, repelled, degenerate, one_way,
    )
}  # fmt: skip
# Those whose faces allow a change of coordinates, and those in two dimensions, which take longer.
CHARTED = tuple(name for name in MAKERS if name not in ("repelled", "degenerate", "one_way", "face_window"))
SLANTED = ("slanted_source", "slanted_killing", "slanted_drift")


def rough_problem(name: str, seed: int, units: int = 0) -> Rough:
    """The problem of a name and a seed; ``units``: the seed of other units, 0 for those it was made in."""
    rough = MAKERS[name](np.random.default_rng([11, seed]))
    if not units:
        return rough
    powers = np.random.default_rng([12, units]).uniform(-POWERS, POWERS, 3)
    return in_units(rough, *(10.0**powers).tolist())


def in_units(rough: Rough, length: float, time: float, value: float) -> Rough:
    """The same problem with x, t and u measured in other units."""
    p = rough.problem

    def drift(t: float, x: Array) -> Array:
        return np.asarray(as_numpy(p.sde.drift(t / time, x / length)) * (length / time))

    def covariance(t: float, x: Array) -> Array:
        return np.asarray(as_numpy(p.sde.covariance(t / time, x / length)) * (length**2 / time))

    def scaled(f: Any, factor: float) -> Any:
        if f is None or not callable(f):
            return None if f is None else f * factor
        return lambda t, x: f(t / time, x / length) * factor

    def face(f: Any) -> Any:
        return Absorbing(scaled(f.value, value)) if isinstance(f, Absorbing) else f

    box = Box(
        length * np.array(p.box.lower),
        length * np.array(p.box.upper),
        boundary=[tuple(face(f) for f in pair) for pair in p.box.faces],
    )
    other = KolmogorovProblem(
        SDE(drift, covariance=covariance, dim=p.dim),
        None if p.terminal is None else (lambda x: p.final(x / length) * value),
        None if p.horizon is None else p.horizon * time,
        box,
        killing=scaled(p.killing, 1.0 / time),
        source=scaled(p.source, value / time),
    )
    return Rough(other, rough.points * length, rough.answer * value, value)
