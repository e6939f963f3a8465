"""The exponential of an autonomous operator, whatever the length of the step: one polynomial of Q, matrix-free."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from kolmo.arrays import Array, as_like, as_numpy, is_tensor, namespace
from kolmo.errors import InputError, NotConvergedError
from kolmo.schemes.base import Readable
from kolmo.steppers.base import STEPPERS, Operator, Repeated, Step, Unbounded

# Room around the estimated spectrum, and growth e^GROWTH of the exponential that the ellipse may reach on the right.
MARGIN, GROWTH = 1.1, 2.0
DIRECTIONS = np.linspace(0.0, np.pi, 129)
# Growth of the polynomials beyond which the spectrum was not inside the ellipse.
RUNAWAY = 1e4


@dataclass(frozen=True)
class Ellipse:
    r"""An ellipse :math:`z = x + \gamma(w + \sigma/w)`, w on the unit circle, axes along the real and imaginary one.

    Its Faber polynomials are :math:`F_0 = 1`, :math:`F_1 = (z - x)/\gamma`, :math:`F_2 = F_1^2 - 2\sigma` and
    :math:`F_{n+1} = F_1F_n - \sigma F_{n-1}`; on it they are w^n + (σ/w)^n, so of modulus about one.

    Attributes
    ----------
    x : float
        Centre.
    gamma, sigma : float
        Half the sum of the semi-axes, and their difference over their sum.
    """

    x: float
    gamma: float
    sigma: float

    @classmethod
    def around(cls, support: np.ndarray, dt: float) -> "Ellipse":
        """Ellipse around the convex set with the given support function in DIRECTIONS (0: right, π: left)."""
        left, right = -float(support[-1]), float(support[0]) + GROWTH / dt
        centre, a = 0.5 * (left + right), 0.5 * (right - left)
        cos, sin = np.cos(DIRECTIONS[1:-1]), np.sin(DIRECTIONS[1:-1])
        beyond = np.maximum(support[1:-1] - centre * cos, 0.0) ** 2 - (a * cos) ** 2
        b = math.sqrt(max(float((beyond / sin**2).max()), 1e-6 * a**2))
        return cls(centre, 0.5 * (a + b), (a - b) / (a + b))

    def coefficients(self, function: Callable[[np.ndarray], np.ndarray], tolerance: float) -> np.ndarray:
        """Coefficients of a function in the Faber polynomials until their remainder is below the tolerance."""
        count = 64
        while True:
            w = np.exp(2j * np.pi * np.arange(count) / count)
            values = function(self.x + self.gamma * (w + self.sigma / w))
            series = (np.fft.fft(values) / count).real[: count // 2]
            # what is smaller is rounding
            seen = np.where(np.abs(series) > 1e-15 * np.abs(values).max(), np.abs(series), 0.0)
            tail = np.cumsum(seen[::-1])[::-1]
            small = np.flatnonzero(tail[: count // 4] <= tolerance)
            if len(small):
                return np.asarray(series[: max(int(small[0]), 2)])
            count *= 2


def phi_one(z: np.ndarray) -> np.ndarray:
    """(e^z − 1)/z.

    Examples
    --------
    >>> phi_one(np.array([1e-9 + 0j, 1.0])).real.round(6).tolist()
    [1.0, 1.718282]
    """
    small = np.abs(z) < 1e-2
    safe = np.where(small, 1.0, z)
    series = np.polynomial.polynomial.polyval(z, [1.0 / math.factorial(j + 1) for j in range(8)])
    return np.where(small, series, np.expm1(safe) / safe)


def seen_support(operator: Operator) -> np.ndarray:
    """Support function in DIRECTIONS of the spectrum of Q as Arnoldi's iteration sees it, with room around it."""
    z = ritz_values(operator)
    real = np.where(z.real < 0, MARGIN * z.real, z.real / MARGIN)
    imaginary = MARGIN * np.abs(z.imag) + (MARGIN - 1.0) * np.abs(z.imag).max()
    return np.asarray(
        (np.multiply.outer(np.cos(DIRECTIONS), real) + np.multiply.outer(np.sin(DIRECTIONS), imaginary)).max(1)
    )


def wide_support(operator: Operator) -> np.ndarray:
    """The same from every node's coefficients alone, as if they held everywhere; wider where noise dies."""
    a, stencil = as_numpy(operator.a), operator.stencil
    cos, sin = np.cos(DIRECTIONS), np.sin(DIRECTIONS)
    if not isinstance(stencil, Readable):
        # Gershgorin: a row with non-negative off-diagonals that sums to −c
        matrix = operator.matrix
        centre = matrix.diagonal()
        radius = np.asarray(abs(matrix).sum(1)).reshape(-1) - np.abs(centre)
        return np.asarray((np.multiply.outer(cos, centre) + radius).max(1))
    c, A, S = stencil.coefficients(a)
    real, imaginary = np.zeros(len(c)), np.zeros(len(c))
    for i, ops in enumerate(stencil.operators):
        first, second = (_radius(ops[name].matrix) for name in ("first", "second"))
        imaginary += MARGIN * first * np.abs(A[:, i])
        real += MARGIN * second * 0.5 * S[:, i, i]
    # every node alone would have its spectrum in an ellipse that touches −c on the right
    extents = np.stack([c, real, imaginary], -1)
    scale = np.abs(extents).max() or 1.0
    nodes = scale * np.unique((extents / scale).round(12), axis=0)
    result = np.full(len(cos), -np.inf)
    for part in np.array_split(nodes, math.ceil(len(nodes) / 4096)):
        c, a, b = part[:, :1], 0.5 * part[:, 1:2], part[:, 2:]
        result = np.maximum(result, (-(c + a) * cos + np.hypot(a * cos, b * sin)).max(0))
    return np.asarray(np.maximum(result, seen_support(operator)))


def _random(operator: Operator, seed: int) -> np.ndarray:
    """A random field, zero at fixed nodes."""
    size = int(operator.a.shape[1] if operator.a.ndim == 2 else operator.matrix.shape[0])
    v = np.random.default_rng(seed).standard_normal((size, 1))
    return v if operator.fixed is None else v * ~operator.fixed[:, None]


def ritz_values(operator: Operator, steps: int = 60) -> np.ndarray:
    """Ritz values of Q from Arnoldi's iteration with a fixed start: its outlying eigenvalues come first."""
    v = _random(operator, 0)
    steps = min(steps, len(v))
    H, basis = np.zeros((steps + 1, steps)), [v / np.linalg.norm(v)]
    for j in range(steps):
        w = operator.apply(basis[j])
        for _ in range(2):
            V = np.concatenate(basis, 1)
            h = V.T @ w
            w = w - V @ h
            H[: j + 1, j] += h[:, 0]
        H[j + 1, j] = np.linalg.norm(w)
        if H[j + 1, j] <= 1e-12 * np.abs(H).max():
            return np.asarray(np.linalg.eigvals(H[: j + 1, : j + 1]))
        basis.append(w / H[j + 1, j])
    return np.asarray(np.linalg.eigvals(H[:-1]))


def _radius(matrix: Any) -> float:
    """Spectral radius of a one-dimensional operator."""
    return _known_radius(matrix.shape[0], matrix.indptr.tobytes(), matrix.indices.tobytes(), matrix.data.tobytes())


@lru_cache(maxsize=64)
def _known_radius(n: int, indptr: bytes, indices: bytes, data: bytes) -> float:
    import scipy.sparse as sp

    parts = (np.frombuffer(data), np.frombuffer(indices, np.int32), np.frombuffer(indptr, np.int32))
    dense = sp.csr_matrix(parts, shape=(n, n)).toarray()
    if n > 96:
        # rows in the middle repeat
        keep = np.r_[0:48, n - 48 : n]
        dense = dense[np.ix_(keep, keep)]
    return float(np.abs(np.linalg.eigvals(dense)).max())


class ExponentialStep(Repeated):
    """u ↦ u + dt φ₁(dt Q)(Q u + r), with φ₁ a sum of Faber polynomials: e^{dt Q} u and what a constant load adds."""

    def __init__(self, operator: Operator, dt: float, tolerance: float) -> None:
        self.dt, self.tolerance, self.runaway = dt, tolerance, RUNAWAY
        primal = operator.primal
        if is_tensor(primal.a):  # the spectrum is looked at once, in NumPy
            primal = Operator(primal.stencil, as_numpy(primal.a), primal.fixed)
        self._fit(seen_support(primal))
        try:
            self._sum(primal.apply, _random(primal, 1))
        except NotConvergedError:
            self._fit(wide_support(primal))
        self.operator = operator
        # derivatives of the polynomials grow like their degree squared
        self.runaway = RUNAWAY if operator.primal is operator else math.inf

    def _fit(self, reach: np.ndarray) -> None:
        """Ellipse around a support function, and the polynomial for it."""
        self.ellipse = Ellipse.around(reach, self.dt)
        # φ₁ is multiplied by dt Q
        size = max(1.0, self.dt * float(np.abs(reach).max()))
        self.series = self.dt * self.ellipse.coefficients(lambda z: phi_one(self.dt * z), self.tolerance / size)

    def _polynomials(self, multiply: Callable[[Array], Array], v: Array) -> Any:
        """F_0(Q) v, F_1(Q) v, ... one after the other."""
        e, limit = self.ellipse, self.runaway * float(abs(v).max())
        before, now = v, (multiply(v) - e.x * v) / e.gamma
        yield before
        yield now
        for n in range(2, len(self.series)):
            twice = 2.0 if n == 2 else 1.0
            before, now = now, (multiply(now) - e.x * now) / e.gamma - (twice * e.sigma) * before
            if n % 32 == 0 and not float(abs(now).max()) <= limit:
                raise NotConvergedError(
                    "the spectrum of the operator is larger than estimated for stepper 'exponential'; use another one"
                )
            yield now

    def _sum(self, multiply: Callable[[Array], Array], v: Array) -> Array:
        total = namespace(v).zeros_like(v)
        for weight, term in zip(self.series, self._polynomials(multiply, v), strict=True):
            total += float(weight) * term
        return total

    def apply(self, u: Array, loads: Sequence[Array]) -> Array:
        """The state after the step."""
        return u + self._sum(self.operator.apply, self._slope(u, loads))

    def _slope(self, u: Array, loads: Sequence[Array]) -> Array:
        return self.operator.apply(u) + 0.5 * (loads[0] + loads[1])

    def apply_transposed(self, p: Array) -> tuple[Array, list[Array]]:
        """Transposed step and the derivatives of the loads."""
        q = self._sum(self.operator.apply_transposed, p)
        return p + self.operator.apply_transposed(q), [0.5 * q, 0.5 * q]

    def pullback(self, u: Array, loads: Sequence[Array], p: Array) -> tuple[Array, list[Array], list[Array]]:
        """Derivatives with respect to state, loads and stencil numbers: the recurrence run backwards."""
        e, op, count = self.ellipse, self.operator, len(self.series)
        states = list(self._polynomials(op.apply, self._slope(u, loads)))
        # adjoints of F_n(Q) v, from the last n down
        later = now = as_like(np.zeros(tuple(p.shape)), p)
        numbers = 0.0 * op.a
        for n in range(count - 1, -1, -1):
            if n < count - 1:
                numbers += op.stencil.pullback(now, states.pop()) / e.gamma
            back = (op.apply_transposed(now) - e.x * now) / e.gamma
            twice = 2.0 if n == 0 else 1.0
            later, now = now, float(self.series[n]) * p + back - (twice * e.sigma) * later
            if n == count - 1:
                states.pop()
        numbers += op.stencil.pullback(now, u)
        return p + op.apply_transposed(now), [0.5 * now, 0.5 * now], [0.5 * numbers, 0.5 * numbers]


@dataclass(frozen=True)
class Exponential(Unbounded):
    r"""The exponential of an autonomous operator to about ten digits, in one step of any length, matrix-free.

    .. math:: u(t - dt) = e^{dt\,Q}u(t) + dt\,\varphi_1(dt\,Q)\,r, \qquad \varphi_1(z) = (e^z - 1)/z

    The number of products with Q grows like the square root of dt times the real extent of the spectrum, and like dt
    times its imaginary extent. Coefficients and loads must not depend on time between breakpoints.

    Source: Faber polynomials on an ellipse around the spectrum (Moret & Novati 2001); no interval is assumed.
    """

    name: str = "exponential"
    order: int = 8
    implicit: bool = True
    kept: int = 1
    tolerance: float = 1e-10

    @property
    def nodes(self) -> tuple[float, ...]:
        """Both ends, to see that coefficients are the same there."""
        return (0.0, 1.0)

    def prepare(self, operators: Sequence[Operator], dt: float) -> Step:
        """Find the ellipse and the polynomial."""
        if operators[0] is not operators[1]:
            raise InputError(
                "stepper",
                "'exponential' with coefficients, loads or face values that depend on time",
                "an autonomous problem (constant in time between breakpoints)",
                "use stepper='radau5', 'mcs3' or 'rk4'",
            )
        return ExponentialStep(operators[0], dt, self.tolerance)


STEPPERS.add("exponential", Exponential())
