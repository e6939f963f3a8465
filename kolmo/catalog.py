"""Textbook problems with exact answers, one line each: for tests, demonstrations and comparisons.

>>> from kolmo import catalog
>>> case = catalog.geometric_brownian_motion(strike=100.0)
>>> case.exact(0.0, [[100.0]]).round(4).tolist()
[10.4506]

Control problems with exact optima are in ``catalog.OPTIMA``, bridges in ``catalog.BRIDGES``.

Every function returns a :class:`Case`; :data:`CASES` holds them all under their names. The exact answers are closed
forms, series or one-dimensional spectral solutions that share no code with the solvers.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec

import numpy as np
from numpy.polynomial.chebyshev import Chebyshev
from numpy.polynomial.legendre import leggauss
from scipy.linalg import expm
from scipy.special import erf, erfcx, ive, ndtr

from kolmo.arrays import Array, as_like, einsum, namespace
from kolmo.errors import InputError
from kolmo.problem import KolmogorovProblem
from kolmo.problem.box import Box
from kolmo.problem.case import Case as Case
from kolmo.problem.case import line
from kolmo.problem.faces import Absorbing, Robin
from kolmo.problem.sde import SDE
from kolmo.registry import Registry

P = ParamSpec("P")


CASES: Registry[Callable[..., Case]] = Registry("case")


def _listed(make: Callable[P, Case]) -> Callable[P, Case]:
    """Put a function under its name into the list of cases."""
    CASES.add(make.__name__, make)
    return make


# ---------------------------------------------------------------------------------------------- Ornstein–Uhlenbeck
def _square(x: Array) -> Array:
    return x[..., 0] ** 2


def _cubic(x: Array) -> Array:
    return x[..., 0] ** 3 - 2.0 * x[..., 0]


def _bump(x: Array) -> Array:
    return namespace(x).exp(-2.0 * (x[..., 0] - 0.3) ** 2)


def _cosine(x: Array) -> Array:
    return namespace(x).cos(3.0 * x[..., 0])


def _step(x: Array) -> Array:
    return (x[..., 0] > 0.25) * 1.0


# Terminal data and their expectation under N(m, v).
GAUSSIAN: dict[str, tuple[Callable[[Array], Array], Callable[[Any, Any], Any]]] = {
    "square": (_square, lambda m, v: m**2 + v),
    "cubic": (_cubic, lambda m, v: m**3 + 3.0 * m * v - 2.0 * m),
    "gauss": (_bump, lambda m, v: np.exp(-2.0 * (m - 0.3) ** 2 / (1.0 + 4.0 * v)) / np.sqrt(1.0 + 4.0 * v)),
    "cos": (_cosine, lambda m, v: np.exp(-4.5 * v) * np.cos(3.0 * m)),
    "indicator": (_step, lambda m, v: ndtr((m - 0.25) / np.sqrt(np.maximum(v, 1e-300)))),
}


def _gaussian_pair(terminal: str) -> tuple[Callable[[Array], Array], Callable[[Any, Any], Any]]:
    if terminal not in GAUSSIAN:
        raise InputError("terminal", repr(terminal), "one of " + ", ".join(GAUSSIAN))
    return GAUSSIAN[terminal]


def _ou_law(kappa: float, mu: float, sigma: float, x: Any, tau: float) -> tuple[Any, float]:
    """Mean and variance of X_τ for dX = κ(μ − X)dt + σdW, X_0 = x."""
    if kappa == 0.0:
        return x, sigma**2 * tau
    return mu + (x - mu) * math.exp(-kappa * tau), -(sigma**2) * math.expm1(-2.0 * kappa * tau) / (2.0 * kappa)


@_listed
def ornstein_uhlenbeck(
    terminal: str = "gauss", kappa: float = 1.2, mu: float = 0.3, sigma: float = 0.8, horizon: float = 1.0
) -> Case:
    r"""Ornstein–Uhlenbeck process :math:`dX = \kappa(\mu - X)dt + \sigma dW` on the line.

    Parameters
    ----------
    terminal : {"gauss", "square", "cubic", "cos", "indicator"}
        exp(−2(x−0.3)²), x², x³ − 2x, cos 3x, or 1{x > 0.25}.
    kappa, mu, sigma, horizon : float
        Parameters.

    Examples
    --------
    >>> ornstein_uhlenbeck("square", kappa=1.0, mu=0.0, sigma=1.0).exact(1.0, 2.0)
    array(4.)
    """
    function, expectation = _gaussian_pair(terminal)
    problem = KolmogorovProblem(SDE(lambda t, x: kappa * (mu - x), diffusion=sigma, dim=1), function, horizon)

    def exact(t: float, x: np.ndarray) -> np.ndarray:
        return np.asarray(expectation(*_ou_law(kappa, mu, sigma, x[..., 0], horizon - t)))

    points = line(-1.3, -0.4, 0.0, 0.55, 1.7)
    return Case("ornstein_uhlenbeck", problem, points, "Uhlenbeck and Ornstein (1930)", exact)


@_listed
def layered_ornstein_uhlenbeck(
    terminal: str = "gauss",
    kappa: Sequence[float] = (0.5, 2.0, -0.5, 1.0),
    mu: Sequence[float] = (0.0, 1.0, -1.0, 0.5),
    sigma: Sequence[float] = (0.6, 0.3, 0.9, 0.5),
    horizon: float = 1.0,
) -> Case:
    """Coefficients constant on equal layers of time, as in a network: one value per layer, breakpoints between them.

    Parameters
    ----------
    terminal : str
        As in :func:`ornstein_uhlenbeck`.
    kappa, mu, sigma : sequence of float
        One number per layer.
    horizon : float
        Time T.
    """
    function, expectation = _gaussian_pair(terminal)
    edges = horizon * np.arange(len(kappa) + 1) / len(kappa)

    def layer(t: float) -> int:
        return int(np.clip(np.searchsorted(edges, t, side="right") - 1, 0, len(kappa) - 1))

    sde = SDE(
        lambda t, x: kappa[layer(t)] * (mu[layer(t)] - x),
        diffusion=lambda t, x: sigma[layer(t)] + 0.0 * x[..., 0],
        dim=1,
        breakpoints=edges[1:-1].tolist(),
        autonomous=True,
    )

    def exact(t: float, x: np.ndarray) -> np.ndarray:
        mean, variance = x[..., 0], 0.0
        for k in range(len(kappa)):
            tau = edges[k + 1] - max(edges[k], t)
            if tau > 0:
                mean, noise = _ou_law(kappa[k], mu[k], sigma[k], mean, tau)
                variance = variance * math.exp(-2.0 * kappa[k] * tau) + noise
        return np.asarray(expectation(mean, variance))

    points = line(-1.0, 0.0, 0.4, 1.5)
    return Case(
        "layered_ornstein_uhlenbeck", KolmogorovProblem(sde, function, horizon), points, "composition of laws", exact
    )


@_listed
def running_cost(kappa: float = 1.0, sigma: float = 0.7, horizon: float = 1.0) -> Case:
    r"""Cost that accrues along the path: :math:`u = E\int_t^T X_s^2\,ds` for an Ornstein–Uhlenbeck process around 0.

    Parameters
    ----------
    kappa, sigma, horizon : float
        Parameters.
    """
    problem = KolmogorovProblem(
        SDE(lambda t, x: -kappa * x, diffusion=sigma, dim=1),
        lambda x: 0.0 * x[..., 0],
        horizon,
        source=lambda t, x: x[..., 0] ** 2,
    )

    def exact(t: float, x: np.ndarray) -> np.ndarray:
        tau = horizon - t
        decay = -math.expm1(-2.0 * kappa * tau) / (2.0 * kappa)
        return np.asarray(x[..., 0] ** 2 * decay + sigma**2 / (2.0 * kappa) * (tau - decay))

    points = line(-1.0, 0.0, 0.5, 1.5)
    return Case("running_cost", problem, points, "moments of Uhlenbeck and Ornstein (1930)", exact)


@_listed
def harmonic_killing(omega: float = 1.5, sigma: float = 1.0, horizon: float = 1.0) -> Case:
    r"""Killing that grows: :math:`u = E\exp(-\tfrac12\omega^2\int X^2)` for Brownian motion.

    Parameters
    ----------
    omega, sigma, horizon : float
        Parameters.
    """
    problem = KolmogorovProblem(
        SDE(0.0, diffusion=sigma, dim=1),
        lambda x: 1.0 + 0.0 * x[..., 0],
        horizon,
        killing=lambda t, x: 0.5 * omega**2 * x[..., 0] ** 2,
    )

    def exact(t: float, x: np.ndarray) -> np.ndarray:
        angle = omega * sigma * (horizon - t)
        return np.asarray(
            np.exp(-0.5 * omega / sigma * x[..., 0] ** 2 * math.tanh(angle)) / math.sqrt(math.cosh(angle))
        )

    return Case("harmonic_killing", problem, line(-1.2, 0.0, 0.6, 2.0), "Cameron and Martin (1945); Kac (1949)", exact)


# ---------------------------------------------------------------------------------------------- finance
@_listed
def geometric_brownian_motion(
    payoff: str = "call",
    strike: float = 100.0,
    rate: float = 0.05,
    sigma: float = 0.2,
    dividend: float = 0.0,
    horizon: float = 1.0,
) -> Case:
    """European option: payoff that is kinked or jumps, growing data, degenerate end at 0.

    Parameters
    ----------
    payoff : {"call", "put", "digital"}
        (x − K)⁺, (K − x)⁺ or 1{x > K}.
    strike, rate, sigma, dividend, horizon : float
        Parameters.
    """
    payoffs: dict[str, Callable[[Array], Array]] = {
        "call": lambda x: namespace(x).clip(x[..., 0] - strike, 0.0, None),
        "put": lambda x: namespace(x).clip(strike - x[..., 0], 0.0, None),
        "digital": lambda x: (x[..., 0] > strike) * 1.0,
    }
    if payoff not in payoffs:
        raise InputError("payoff", repr(payoff), "one of " + ", ".join(payoffs))
    problem = KolmogorovProblem(
        SDE(lambda t, x: (rate - dividend) * x, diffusion=lambda t, x: sigma * x, dim=1),
        payoffs[payoff],
        horizon,
        Box(0.0, np.inf, boundary=[("natural", "open")]),
        killing=rate,
    )

    def exact(t: float, x: np.ndarray) -> np.ndarray:
        call, digital = _black_scholes(x[..., 0], strike, rate, sigma, dividend, horizon - t)
        discount = math.exp(-rate * (horizon - t))
        forward = x[..., 0] * math.exp(-dividend * (horizon - t)) - strike * discount
        return {"call": call, "put": call - forward, "digital": digital}[payoff]

    points = strike * line(0.6, 0.9, 1.0, 1.1, 1.5)
    return Case("geometric_brownian_motion", problem, points, "Black and Scholes (1973); Merton (1973)", exact)


def _black_scholes(
    S: np.ndarray, strike: float, rate: float, sigma: float, dividend: float, tau: float
) -> tuple[np.ndarray, np.ndarray]:
    """Value of a call and of a digital call."""
    spread = max(sigma * math.sqrt(tau), 1e-300)
    with np.errstate(divide="ignore"):
        upper = (np.log(S / strike) + (rate - dividend) * tau) / spread + 0.5 * spread
    discount = math.exp(-rate * tau)
    call = S * math.exp(-dividend * tau) * ndtr(upper) - strike * discount * ndtr(upper - spread)
    return call, discount * ndtr(upper - spread)


@_listed
def down_and_out_call(
    barrier: float = 85.0, strike: float = 100.0, rate: float = 0.05, sigma: float = 0.25, horizon: float = 0.5
) -> Case:
    """Call that is lost when the price touches a barrier below the strike: absorbing face, discounting.

    Parameters
    ----------
    barrier, strike, rate, sigma, horizon : float
        Parameters; barrier ≤ strike.
    """
    if barrier > strike:
        raise InputError("barrier", barrier, f"at most the strike {strike}")
    problem = KolmogorovProblem(
        SDE(lambda t, x: rate * x, diffusion=lambda t, x: sigma * x, dim=1),
        lambda x: namespace(x).clip(x[..., 0] - strike, 0.0, None),
        horizon,
        Box(barrier, np.inf, boundary=[("absorbing", "open")]),
        killing=rate,
    )

    def exact(t: float, x: np.ndarray) -> np.ndarray:
        S, tau = x[..., 0], horizon - t
        direct = _black_scholes(S, strike, rate, sigma, 0.0, tau)[0]
        mirrored = _black_scholes(barrier**2 / S, strike, rate, sigma, 0.0, tau)[0]
        return np.asarray(direct - (S / barrier) ** (1.0 - 2.0 * rate / sigma**2) * mirrored)

    points = line(1.01 * barrier, 0.5 * (barrier + strike), strike, 1.2 * strike)
    return Case("down_and_out_call", problem, points, "Merton (1973); Reiner and Rubinstein (1991)", exact)


@_listed
def margrabe(
    sigma: tuple[float, float] = (0.3, 0.2), correlation: float = 0.5, rate: float = 0.05, horizon: float = 1.0
) -> Case:
    """Option to exchange one asset for another, (x₀ − x₁)⁺: two dimensions, mixed derivative, degenerate ends.

    Parameters
    ----------
    sigma : (float, float)
        Volatilities.
    correlation, rate, horizon : float
        Parameters.
    """
    root = np.linalg.cholesky(np.array([[1.0, correlation], [correlation, 1.0]])) * np.array(sigma)[:, None]
    problem = KolmogorovProblem(
        SDE(lambda t, x: rate * x, diffusion=lambda t, x: x[..., :, None] * as_like(root, x), dim=2),
        lambda x: namespace(x).clip(x[..., 0] - x[..., 1], 0.0, None),
        horizon,
        Box([0.0, 0.0], [np.inf, np.inf], boundary=[("natural", "open")] * 2),
        killing=rate,
    )
    relative = math.sqrt(sigma[0] ** 2 + sigma[1] ** 2 - 2.0 * correlation * sigma[0] * sigma[1])

    def exact(t: float, x: np.ndarray) -> np.ndarray:
        # with the second asset as the unit of account: a call on their ratio, without interest
        return np.asarray(x[..., 1] * _black_scholes(x[..., 0] / x[..., 1], 1.0, 0.0, relative, 0.0, horizon - t)[0])

    points = np.array([[100.0, 100.0], [110.0, 90.0], [80.0, 95.0]])
    return Case("margrabe", problem, points, "Margrabe (1978)", exact)


@_listed
def vasicek_bond(kappa: float = 0.8, theta: float = 0.05, sigma: float = 0.06, horizon: float = 2.0) -> Case:
    r"""Zero-coupon bond :math:`E\exp(-\int X)` with a Gaussian short rate: killing of either sign.

    Parameters
    ----------
    kappa, theta, sigma, horizon : float
        Speed, mean, volatility, maturity.
    """
    problem = KolmogorovProblem(
        SDE(lambda t, x: kappa * (theta - x), diffusion=sigma, dim=1),
        lambda x: 1.0 + 0.0 * x[..., 0],
        horizon,
        killing=lambda t, x: x[..., 0],
    )

    def exact(t: float, x: np.ndarray) -> np.ndarray:
        tau = horizon - t
        B = -math.expm1(-kappa * tau) / kappa
        A = (theta - 0.5 * sigma**2 / kappa**2) * (B - tau) - 0.25 * sigma**2 * B**2 / kappa
        return np.asarray(np.exp(A - B * x[..., 0]))

    return Case("vasicek_bond", problem, line(-0.02, 0.01, 0.05, 0.12), "Vasicek (1977)", exact)


@_listed
def cir_bond(kappa: float = 0.5, theta: float = 0.04, sigma: float = 0.3, horizon: float = 2.0) -> Case:
    r"""Zero-coupon bond with a square-root short rate: natural end at 0, here with Feller's condition violated.

    Parameters
    ----------
    kappa, theta, sigma, horizon : float
        Speed, mean, volatility, maturity.
    """
    problem = KolmogorovProblem(
        SDE(lambda t, x: kappa * (theta - x), covariance=lambda t, x: sigma**2 * x, dim=1),
        lambda x: 1.0 + 0.0 * x[..., 0],
        horizon,
        Box(0.0, np.inf, boundary=[("natural", "open")]),
        killing=lambda t, x: x[..., 0],
    )
    gamma = math.sqrt(kappa**2 + 2.0 * sigma**2)

    def exact(t: float, x: np.ndarray) -> np.ndarray:
        tau = horizon - t
        growth = math.expm1(gamma * tau)
        bottom = (gamma + kappa) * growth + 2.0 * gamma
        power = 2.0 * kappa * theta / sigma**2
        A = power * (math.log(2.0 * gamma / bottom) + 0.5 * (kappa + gamma) * tau)
        return np.asarray(np.exp(A - 2.0 * growth / bottom * x[..., 0]))

    return Case("cir_bond", problem, line(0.0, 0.01, 0.04, 0.1, 0.3), "Cox, Ingersoll and Ross (1985)", exact)


# ---------------------------------------------------------------------------------------------- linear, any dimension
def _linear_law(A: np.ndarray, m: np.ndarray, S: np.ndarray, tau: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Flow F, shift f and covariance V with X_τ ~ N(F x + f, V), for dX = (m + A X)dt + noise of covariance rate S."""
    d = len(m)
    zero = np.zeros((d, d))
    block = expm(np.block([[-A, S], [zero, A.T]]) * tau)
    flow = block[d:, d:].T
    shift = expm(np.block([[A, m[:, None]], [np.zeros((1, d + 1))]]) * tau)[:d, d]
    V = flow @ block[:d, d:]
    return flow, shift, 0.5 * (V + V.T)


def _linear(
    name: str, law: Any, goal: Any, horizon: float, points: Any, source: str, *, quadratic: bool = False
) -> Case:
    """Linear SDE dX = (m + A X)dt + noise S, terminal exp(−½(x−q)ᵀQ(x−q)), or the form: of (A, m, S) and (Q, q)."""
    A, m, S, Q, q = (np.asarray(v, dtype=float) for v in (*law, *goal))

    def form(x: Array) -> Array:
        y = x - as_like(q, x)
        return einsum("...i,ij,...j->...", y, as_like(Q, x), y)

    def terminal(x: Array) -> Array:
        return form(x) if quadratic else namespace(x).exp(-0.5 * form(x))

    def drift(t: float, x: Array) -> Array:
        return as_like(m, x) + x @ as_like(A.T, x)

    def exact(t: float, x: np.ndarray) -> np.ndarray:
        flow, shift, V = _linear_law(A, m, S, horizon - t)
        y = x @ flow.T + shift - q
        if quadratic:
            return np.asarray(np.einsum("...i,ij,...j->...", y, Q, y) + np.trace(Q @ V))
        inner = np.eye(len(m)) + V @ Q
        return np.asarray(
            np.exp(-0.5 * np.einsum("...i,ij,...j->...", y, Q @ np.linalg.inv(inner), y))
            / math.sqrt(np.linalg.det(inner))
        )

    sde = SDE(drift, covariance=S if S.any() else None, dim=len(m))
    return Case(name, KolmogorovProblem(sde, terminal, horizon), np.asarray(points, dtype=float), source, exact)


@_listed
def heat(correlation: float = 0.95, sigma: tuple[float, float] = (1.0, 0.5), horizon: float = 0.5) -> Case:
    """Two correlated Brownian motions, Gaussian terminal data: the mixed derivative dominates.

    Parameters
    ----------
    correlation : float
        Between −1 and 1.
    sigma : (float, float)
        Standard deviations per unit of time.
    horizon : float
        Time T.
    """
    cross = correlation * sigma[0] * sigma[1]
    S = [[sigma[0] ** 2, cross], [cross, sigma[1] ** 2]]
    points = [[0.0, 0.0], [0.6, 0.3], [-0.5, 0.4]]
    law, goal = (np.zeros((2, 2)), [0, 0], S), (2.0 * np.eye(2), [0, 0])
    return _linear("heat", law, goal, horizon, points, "Fourier (1822), Gaussian data")


_A3 = np.array([[-0.8, 0.5, 0.0], [-0.5, -0.6, 0.3], [0.1, -0.3, -1.0]])
_S3 = np.array([[0.5, 0.2, -0.1], [0.2, 0.4, 0.15], [-0.1, 0.15, 0.3]])
_Q3 = np.array([[1.0, 0.2, 0.0], [0.2, 1.2, 0.1], [0.0, 0.1, 0.8]])


@_listed
def linear_sde(dim: int = 3, terminal: str = "gauss", horizon: float = 0.8) -> Case:
    """Ornstein–Uhlenbeck process in 1, 2 or 3 dimensions: rotating drift, full covariance.

    Parameters
    ----------
    dim : {1, 2, 3}
        Dimension; the lower ones are the leading blocks of the three-dimensional coefficients.
    terminal : {"gauss", "quadratic"}
        exp(−½(x−q)ᵀQ(x−q)) or (x−q)ᵀQ(x−q).
    horizon : float
        Time T.

    Examples
    --------
    >>> linear_sde(dim=3).values.round(6).tolist()
    [0.75687, 0.703072, 0.653816]
    """
    if dim not in (1, 2, 3):
        raise InputError("dim", dim, "1, 2 or 3")
    if terminal not in ("gauss", "quadratic"):
        raise InputError("terminal", repr(terminal), "'gauss' or 'quadratic'")
    m, q = np.array([0.0, 0.1, -0.1])[:dim], np.array([0.1, 0.0, -0.2])[:dim]
    points = np.array([[0.0, 0.0, 0.0], [0.5, -0.5, 0.3], [-0.6, 0.2, 0.7]])[:, :dim]
    A, S, Q = _A3[:dim, :dim], _S3[:dim, :dim], _Q3[:dim, :dim]
    source = "Van Loan (1978)"
    return _linear("linear_sde", (A, m, S), (Q, q), horizon, points, source, quadratic=terminal == "quadratic")


@_listed
def langevin(friction: float = 0.5, sigma: float = 0.8, horizon: float = 1.0) -> Case:
    """Kinetic Langevin equation of a harmonic oscillator: noise on the velocity only, hypoelliptic.

    Parameters
    ----------
    friction, sigma, horizon : float
        Parameters; x = (position, velocity).
    """
    A, S = [[0.0, 1.0], [-1.0, -friction]], [[0.0, 0.0], [0.0, sigma**2]]
    points = [[0.0, 0.0], [0.5, -0.5], [-0.7, 0.4], [0.3, 1.0]]
    source = "Langevin (1908); Kolmogorov (1934)"
    goal = [[2.0, 0.0], [0.0, 1.0]], [0.2, 0.0]
    return _linear("langevin", (A, [0, 0], S), goal, horizon, points, source)


@_listed
def rotation(speed: float = 2.0, horizon: float = 0.8) -> Case:
    """Transport without noise: a Gaussian bump carried around the origin.

    Parameters
    ----------
    speed, horizon : float
        Angular speed and time.
    """
    A = [[0.0, -speed], [speed, 0.0]]
    points = [[0.5, 0.0], [0.0, -0.5], [0.3, -0.4], [-0.2, -0.6]]
    zero = np.zeros((2, 2))
    goal = 16.0 * np.eye(2), [0.5, 0.0]
    return _linear("rotation", (A, [0, 0], zero), goal, horizon, points, "characteristics")


# ---------------------------------------------------------------------------------------------- faces
@_listed
def reflected_brownian_motion(
    upper: float = 1.0, sigma: float = 1.0, horizon: float = 0.3, kind: str = "linear"
) -> Case:
    """Brownian motion between two reflecting walls at 0 and ``upper``.

    Parameters
    ----------
    upper, sigma, horizon : float
        Length, noise and time.
    kind : {"linear", "cos"}
        Terminal data x, or cos(πx/upper).
    """
    if kind not in ("linear", "cos"):
        raise InputError("kind", repr(kind), "'linear' or 'cos'")
    wave = math.pi / upper
    problem = KolmogorovProblem(
        SDE(0.0, diffusion=sigma, dim=1),
        (lambda x: x[..., 0]) if kind == "linear" else (lambda x: namespace(x).cos(wave * x[..., 0])),
        horizon,
        Box(0.0, upper, boundary="reflecting"),
    )

    def exact(t: float, x: np.ndarray) -> np.ndarray:
        tau, y = horizon - t, x[..., 0]
        if kind == "cos":
            return np.asarray(math.exp(-0.5 * (sigma * wave) ** 2 * tau) * np.cos(wave * y))
        if sigma * math.sqrt(tau) < 0.5 * upper:
            return _folded(y, sigma * math.sqrt(tau), upper)
        n = np.arange(1, 40, 2)
        modes = np.cos(n * wave * y[..., None]) * np.exp(-0.5 * (sigma * n * wave) ** 2 * tau) / n**2
        return np.asarray(0.5 * upper - 4.0 * upper / math.pi**2 * modes.sum(-1))

    points = upper * line(0.0, 0.2, 0.5, 0.9, 1.0)
    return Case("reflected_brownian_motion", problem, points, "method of images; Fourier series", exact)


def _folded(x: np.ndarray, s: float, upper: float) -> np.ndarray:
    """E of the triangle wave of period 2·upper at N(x, s²), for s of the size of upper or less."""

    def ramp(k: float) -> np.ndarray:
        """E max(X − k, 0)."""
        z = (x - k) / max(s, 1e-300)
        return np.asarray((x - k) * ndtr(z) + s * np.exp(-0.5 * z**2) / math.sqrt(2.0 * math.pi))

    # Slopes ±1 that change sign at every multiple of upper; starting from the far left.
    reach = 2 * math.ceil(5.0 * s / upper + 1.0)
    total = x + reach * upper
    for k in range(-reach + 1, reach + 2):
        total = total + (2.0 if k % 2 == 0 else -2.0) * ramp(k * upper)
    return np.asarray(total)


@_listed
def elastic_brownian_motion(kappa: float = 0.8, sigma: float = 1.0, horizon: float = 0.6) -> Case:
    r"""Brownian motion on a half line, killed at the rate κ of its local time at 0: probability of survival.

    Elastic (Robin) face :math:`-\tfrac12\sigma^2u' + \kappa u = 0` at 0.

    Parameters
    ----------
    kappa, sigma, horizon : float
        Parameters.
    """
    problem = KolmogorovProblem(
        SDE(0.0, diffusion=sigma, dim=1),
        lambda x: 1.0 + 0.0 * x[..., 0],
        horizon,
        Box(0.0, np.inf, boundary=[(Robin(kappa), "open")]),
    )

    def exact(t: float, x: np.ndarray) -> np.ndarray:
        spread = math.sqrt(2.0 * sigma**2 * max(horizon - t, 1e-300))
        z = x[..., 0] / spread
        return np.asarray(erf(z) + np.exp(-(z**2)) * erfcx(z + kappa / sigma**2 * spread))

    return Case("elastic_brownian_motion", problem, line(0.0, 0.2, 0.7, 2.0), "Carslaw and Jaeger (1959)", exact)


def _killed(x: np.ndarray, tau: float, mu: float, sigma: float, length: float, rate: float) -> np.ndarray:
    """E[exp(rate·X_τ); not yet at 0 or length] for Brownian motion with drift, by the method of images."""
    spread = max(sigma * math.sqrt(tau), 1e-300)
    slope = mu + rate * sigma**2
    images = math.ceil(5.0 * spread / length) + 3

    def mass(start: np.ndarray) -> np.ndarray:
        weight = np.exp((slope * start - mu * x) / sigma**2 + (slope**2 - mu**2) * tau / (2.0 * sigma**2))
        centre = start + slope * tau
        return np.asarray(weight * (ndtr((length - centre) / spread) - ndtr(-centre / spread)))

    shifts = [2.0 * k * length for k in range(-images, images + 1)]
    return np.asarray(sum(mass(x + s) - mass(s - x) for s in shifts))


@_listed
def survival(mu: float = 0.5, sigma: float = 1.0, length: float = 1.5, horizon: float = 0.4) -> Case:
    """Probability that Brownian motion with drift stays between absorbing ends 0 and ``length`` until T.

    Parameters
    ----------
    mu, sigma, length, horizon : float
        Parameters.
    """
    problem = KolmogorovProblem(
        SDE(mu, diffusion=sigma, dim=1),
        lambda x: 1.0 + 0.0 * x[..., 0],
        horizon,
        Box(0.0, length, boundary="absorbing"),
    )

    def exact(t: float, x: np.ndarray) -> np.ndarray:
        return _killed(x[..., 0], horizon - t, mu, sigma, length, 0.0)

    points = length * line(0.1, 0.3, 0.5, 0.8)
    return Case("survival", problem, points, "Darling and Siegert (1953); method of images", exact)


@_listed
def exit_right(mu: float = 0.4, sigma: float = 0.9, length: float = 1.0, horizon: float = 0.8) -> Case:
    """Probability to leave through the right end before T: absorbing faces with the values 0 and 1.

    Parameters
    ----------
    mu, sigma, length, horizon : float
        Parameters; mu ≠ 0.
    """
    if mu == 0.0:
        raise InputError("mu", mu, "a drift different from zero")
    problem = KolmogorovProblem(
        SDE(mu, diffusion=sigma, dim=1),
        lambda x: 0.0 * x[..., 0],
        horizon,
        Box(0.0, length, boundary=[("absorbing", Absorbing(1.0))]),
    )
    rate = -2.0 * mu / sigma**2
    scale = -math.expm1(rate * length)

    def exact(t: float, x: np.ndarray) -> np.ndarray:
        y, tau = x[..., 0], horizon - t
        ever = -np.expm1(rate * y) / scale
        later = (_killed(y, tau, mu, sigma, length, 0.0) - _killed(y, tau, mu, sigma, length, rate)) / scale
        return np.asarray(ever - later)

    points = length * line(0.1, 0.35, 0.6, 0.95)
    return Case("exit_right", problem, points, "Darling and Siegert (1953); method of images", exact)


def _scale_and_time(potential: Callable[[Any], Any], sigma: float, lower: float, upper: float) -> tuple[Any, Any]:
    """Committor and mean exit time of dX = U'(X)dt + σdW on an interval, by Chebyshev series.

    With the density ρ = exp(2U/σ²): (ρ w')' = 0 and (ρ m')' = −2ρ/σ².
    """
    domain = [lower, upper]

    def series(f: Callable[[Any], Any]) -> Any:
        return Chebyshev.interpolate(f, 160, domain=domain).integ(lbnd=lower)

    def density(y: Any) -> Any:
        return np.exp(2.0 * potential(y) / sigma**2)

    scale = series(lambda y: 1.0 / density(y))
    speed = series(density)
    spent = series(lambda y: 2.0 / sigma**2 * speed(y) / density(y))
    ratio = spent(upper) / scale(upper)
    return (lambda y: scale(y) / scale(upper)), (lambda y: ratio * scale(y) - spent(y))


@_listed
def mean_exit_time(kappa: float = 1.0, sigma: float = 0.8, lower: float = -1.0, upper: float = 1.5) -> Case:
    """Mean time until an Ornstein–Uhlenbeck process leaves an interval: stationary, source 1.

    Parameters
    ----------
    kappa, sigma, lower, upper : float
        Parameters.
    """
    problem = KolmogorovProblem(
        SDE(lambda t, x: -kappa * x, diffusion=sigma, dim=1),
        None,
        None,
        Box(lower, upper, boundary="absorbing"),
        source=1.0,
    )
    _, time = _scale_and_time(lambda y: -0.5 * kappa * y**2, sigma, lower, upper)
    points = lower + (upper - lower) * line(0.2, 0.4, 0.68, 0.88)
    source = "Pontryagin, Andronov and Vitt (1933)"
    return Case("mean_exit_time", problem, points, source, lambda t, x: np.asarray(time(x[..., 0])))


@_listed
def committor(sigma: float = 0.5) -> Case:
    """Probability that a double-well process reaches the right well before the left one: stationary.

    Parameters
    ----------
    sigma : float
        Noise of dX = (X − X³)dt + σdW.
    """
    problem = KolmogorovProblem(
        SDE(lambda t, x: x - x**3, diffusion=sigma, dim=1),
        None,
        None,
        Box(-1.0, 1.0, boundary=[("absorbing", Absorbing(1.0))]),
    )
    probability, _ = _scale_and_time(lambda y: 0.5 * y**2 - 0.25 * y**4, sigma, -1.0, 1.0)
    points = line(-0.6, -0.1, 0.2, 0.8)
    return Case("committor", problem, points, "Kramers (1940)", lambda t, x: np.asarray(probability(x[..., 0])))


@_listed
def mean_exit_time_rectangle(sigma: tuple[float, float] = (1.0, 1.0), sides: tuple[float, float] = (1.0, 1.0)) -> Case:
    """Mean time until Brownian motion leaves a rectangle: stationary, two dimensions, a double series.

    Parameters
    ----------
    sigma, sides : (float, float)
        Noise and length per axis.
    """
    problem = KolmogorovProblem(
        SDE(0.0, diffusion=np.array(sigma), dim=2),
        None,
        None,
        Box([0.0, 0.0], list(sides), boundary="absorbing"),
        source=1.0,
    )

    def along(axis: int, x: np.ndarray) -> np.ndarray:
        """Sine series along one axis, solved in closed form along the other."""
        y, z, length, width = x[..., axis, None], x[..., 1 - axis, None], sides[axis], sides[1 - axis]
        n = np.arange(1, 1000, 2)
        decay = n * math.pi / length * sigma[axis] / sigma[1 - axis]
        layer = (np.exp(-decay * z) + np.exp(-decay * (width - z))) / (1.0 + np.exp(-decay * width))
        modes = 8.0 / (math.pi * n) * np.sin(n * math.pi * y / length) / (n * math.pi * sigma[axis] / length) ** 2
        return np.asarray(y[..., 0] * (length - y[..., 0]) / sigma[axis] ** 2 - (modes * layer).sum(-1))

    def exact(t: float, x: np.ndarray) -> np.ndarray:
        # the series converges geometrically away from the walls across its axis
        distance = np.minimum(x, np.array(sides) - x) * np.array(sides) / np.array(sigma) ** 2
        return np.where(distance[..., 0] < distance[..., 1], along(0, x), along(1, x))

    points = np.array([[0.5, 0.5], [0.2, 0.7], [0.9, 0.1]]) * np.array(sides)
    return Case("mean_exit_time_rectangle", problem, points, "Saint-Venant (1855), torsion of a bar", exact)


@_listed
def circle(concentration: float = 1.5, speed: float = 0.7, sigma: float = 0.8, horizon: float = 0.9) -> Case:
    """Rotating Brownian motion on a circle, terminal exp(c cos x): periodic, all Fourier modes.

    Parameters
    ----------
    concentration, speed, sigma, horizon : float
        Parameters.
    """
    problem = KolmogorovProblem(
        SDE(speed, diffusion=sigma, dim=1),
        lambda x: namespace(x).exp(concentration * namespace(x).cos(x[..., 0])),
        horizon,
        Box(0.0, 2.0 * math.pi, boundary="periodic"),
    )

    def exact(t: float, x: np.ndarray) -> np.ndarray:
        tau, n = horizon - t, np.arange(1, 60)
        waves = np.cos(n * (x + speed * tau)) * ive(n, concentration) * np.exp(-0.5 * (sigma * n) ** 2 * tau)
        return np.asarray(math.exp(concentration) * (ive(0, concentration) + 2.0 * waves.sum(-1)))

    return Case("circle", problem, line(0.0, 1.2, 3.0, 4.4), "von Mises (1918)", exact)


@_listed
def wright_fisher(mutation: float = 0.3, target: float = 0.6, noise: float = 1.0, horizon: float = 0.7) -> Case:
    r"""Gene frequency :math:`dX = m(p - X)dt + s\sqrt{X(1-X)}dW`: natural ends, three columns x, x², x³.

    Parameters
    ----------
    mutation, target, noise, horizon : float
        m ≥ 0, p in [0, 1], s, T; without mutation the ends are traps.
    """
    problem = KolmogorovProblem(
        SDE(lambda t, x: mutation * (target - x), covariance=lambda t, x: noise**2 * x * (1.0 - x), dim=1),
        lambda x: namespace(x).stack([x[..., 0], x[..., 0] ** 2, x[..., 0] ** 3], -1),
        horizon,
        Box(0.0, 1.0, boundary="natural"),
    )
    n = np.arange(4.0)
    fall = mutation * n + 0.5 * noise**2 * n * (n - 1.0)
    gain = mutation * target * n + 0.5 * noise**2 * n * (n - 1.0)
    moments = np.diag(-fall) + np.diag(gain[1:], -1)  # d/dt E X^n couples to E X^(n-1) only

    def exact(t: float, x: np.ndarray) -> np.ndarray:
        return np.asarray((x**n @ expm(moments * (horizon - t)).T)[..., 1:])

    points = line(0.0, 0.1, 0.3, 0.5, 0.85, 1.0)
    return Case("wright_fisher", problem, points, "Fisher (1922); Wright (1931); Kimura (1955)", exact)


# ---------------------------------------------------------------------------------------------- gradient diffusions
class _GradientDiffusion:
    """E φ(X_τ) for dX = U'(X)dt + σdW, reflected at or negligible beyond the ends of an interval.

    Galerkin's method in the polynomials that are orthonormal for the invariant density exp(2U/σ²): the generator is the
    symmetric matrix −½σ²⟨p_i', p_j'⟩ (the walls are its natural condition), and time is its exponential.
    """

    def __init__(
        self, potential: Callable[[Any], Any], sigma: float, lower: float, upper: float, phi: Callable[[Any], Any]
    ) -> None:
        self.degree, self.centre, self.half = 140, 0.5 * (lower + upper), 0.5 * (upper - lower)
        z, weights = leggauss(1500)
        y = self.centre + self.half * z
        exponent = 2.0 * potential(y) / sigma**2
        self.measure = weights * np.exp(exponent - exponent.max())
        self.measure /= self.measure.sum()
        self._recurrence(z)
        p, dp = self._polynomials(z)
        stiffness = 0.5 * sigma**2 / self.half**2 * (dp * self.measure) @ dp.T
        self.rates, vectors = np.linalg.eigh(stiffness)
        self.vectors = vectors
        self.start = vectors.T @ ((p * self.measure) @ phi(y))

    def _recurrence(self, z: np.ndarray) -> None:
        """Coefficients of the three-term recurrence, by Lanczos' method with full orthogonalisation."""
        root = np.sqrt(self.measure)
        basis = np.zeros((self.degree, len(z)))
        basis[0] = root / np.linalg.norm(root)
        self.alpha, self.beta = np.zeros(self.degree), np.zeros(self.degree)
        for j in range(self.degree):
            v = z * basis[j]
            self.alpha[j] = basis[j] @ v
            for _ in range(2):
                v -= basis[: j + 1].T @ (basis[: j + 1] @ v)
            self.beta[j] = np.linalg.norm(v)
            if j + 1 < self.degree:
                basis[j + 1] = v / self.beta[j]

    def _polynomials(self, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Orthonormal polynomials and their derivatives at z in [−1, 1], shape (degree, *z.shape)."""
        p, dp = np.zeros((self.degree, *z.shape)), np.zeros((self.degree, *z.shape))
        p[0] = 1.0
        for j in range(self.degree - 1):
            before = self.beta[j - 1] if j else 0.0
            p[j + 1] = ((z - self.alpha[j]) * p[j] - before * p[j - 1]) / self.beta[j]
            dp[j + 1] = (p[j] + (z - self.alpha[j]) * dp[j] - before * dp[j - 1]) / self.beta[j]
        return p, dp

    def __call__(self, tau: float, y: np.ndarray) -> np.ndarray:
        p, _ = self._polynomials((y - self.centre) / self.half)
        coefficients = self.vectors @ (np.exp(-self.rates * tau) * self.start)
        return np.asarray(np.tensordot(coefficients, p, 1))


@_listed
def double_well(terminal: str = "tanh", sigma: float = 0.5, horizon: float = 5.0) -> Case:
    """Double well dX = (X − X³)dt + σdW: superlinear drift, metastable; reference by a spectral method.

    Parameters
    ----------
    terminal : {"tanh", "square"}
        tanh 2x or x².
    sigma, horizon : float
        Noise (0.4 to 1) and time; the reference needs times well after 0 (about T − t ≥ 0.2).
    """
    terminals: dict[str, Callable[[Array], Array]] = {
        "tanh": lambda x: namespace(x).tanh(2.0 * x[..., 0]),
        "square": _square,
    }
    if terminal not in terminals:
        raise InputError("terminal", repr(terminal), "one of " + ", ".join(terminals))
    phi = terminals[terminal]
    problem = KolmogorovProblem(SDE(lambda t, x: x - x**3, diffusion=sigma, dim=1), phi, horizon)
    end = math.sqrt(1.0 + math.sqrt(1.0 + 130.0 * sigma**2))  # invariant density below 1e-28 of its peak there
    spectral = _GradientDiffusion(
        lambda y: 0.5 * y**2 - 0.25 * y**4, sigma, -end, end, lambda y: np.asarray(phi(y[:, None]))
    )
    points = line(-1.2, -0.5, 0.0, 0.3, 1.0)
    return Case(
        "double_well", problem, points, "Kramers (1940)", lambda t, x: np.asarray(spectral(horizon - t, x[..., 0]))
    )


@_listed
def reflected_ornstein_uhlenbeck(kappa: float = 1.0, mu: float = 0.8, sigma: float = 0.6, horizon: float = 0.9) -> Case:
    """Ornstein–Uhlenbeck process between reflecting walls at −1 and 1: drift at the wall; spectral reference.

    Parameters
    ----------
    kappa, mu, sigma, horizon : float
        Parameters; terminal cos(π(x + 1)/2).
    """
    problem = KolmogorovProblem(
        SDE(lambda t, x: kappa * (mu - x), diffusion=sigma, dim=1),
        lambda x: namespace(x).cos(0.5 * math.pi * (x[..., 0] + 1.0)),
        horizon,
        Box(-1.0, 1.0, boundary="reflecting"),
    )
    spectral = _GradientDiffusion(
        lambda y: -0.5 * kappa * (y - mu) ** 2, sigma, -1.0, 1.0, lambda y: np.cos(0.5 * math.pi * (y + 1.0))
    )
    return Case(
        "reflected_ornstein_uhlenbeck",
        problem,
        line(-1.0, -0.4, 0.3, 1.0),
        "Linetsky (2005)",
        lambda t, x: np.asarray(spectral(horizon - t, x[..., 0])),
    )


# ---------------------------------------------------------------------------------------------- manufactured
# Waves of the manufactured solution: wave vector, phase, and its amplitude in time as value and derivative.
_WAVES = (
    (np.array([1.0, 1.0, 0.0]), 0.0, lambda t: (math.exp(-t), -math.exp(-t))),
    (np.array([2.0, 0.0, 1.0]), 0.7, lambda t: (0.5 * math.cos(2.0 * t), -math.sin(2.0 * t))),
    (np.array([1.0, -1.0, 2.0]), -0.4, lambda t: (0.3 + 0.4 * t, 0.4)),
)


@_listed
def manufactured(dim: int = 2, horizon: float = 0.5) -> Case:
    """Periodic problem with everything in it: full tensor, drift, killing and source, all depending on t and x.

    The source is what the equation leaves over for a chosen sum of three waves.

    Parameters
    ----------
    dim : {1, 2, 3}
        Dimension.
    horizon : float
        Time T.
    """
    if dim not in (1, 2, 3):
        raise InputError("dim", dim, "1, 2 or 3")

    def solution(t: float, x: Array) -> Array:
        xp = namespace(x)
        return sum(f(t)[0] * xp.cos(x @ as_like(k[:dim], x) + phase) for k, phase, f in _WAVES)

    def drift(t: float, x: Array) -> Array:
        xp = namespace(x)
        return xp.stack([xp.cos(x[..., (i + 1) % dim]) + (0.3 + 0.2 * i) * t for i in range(dim)], -1)

    def covariance(t: float, x: Array) -> Array:
        xp = namespace(x)
        waves = [xp.sin(x[..., i]) for i in range(dim)]
        rows = [
            [0.6 + 0.2 * waves[i] if i == j else 0.12 * (waves[i] + waves[j]) + 0.05 for j in range(dim)]
            for i in range(dim)
        ]
        return (1.0 + t) * xp.stack([xp.stack(row, -1) for row in rows], -2)

    def killing(t: float, x: Array) -> Array:
        return 0.3 + 0.2 * namespace(x).cos(x[..., 0] + t)

    def source(t: float, x: Array) -> Array:
        xp, b, S = namespace(x), drift(t, x), covariance(t, x)
        total = killing(t, x) * solution(t, x)
        for wave, phase, f in _WAVES:
            k, (value, slope) = as_like(wave[:dim], x), f(t)
            angle = x @ k + phase
            cosine, sine = xp.cos(angle), xp.sin(angle)
            bend = einsum("...ij,i,j->...", S, k, k)
            total = total - slope * cosine + value * (sine * (b @ k) + 0.5 * bend * cosine)
        return total

    problem = KolmogorovProblem(
        SDE(drift, covariance=covariance, dim=dim),
        lambda x: solution(horizon, x),
        horizon,
        Box([0.0] * dim, [2.0 * math.pi] * dim, boundary="periodic"),
        killing=killing,
        source=source,
    )
    points = np.array([[0.0, 0.5, 1.0], [1.0, 2.0, 3.0], [2.5, 5.0, 0.3], [4.5, 3.0, 6.0]])[:, :dim]
    return Case("manufactured", problem, points, "Roache (2002)", lambda t, x: np.asarray(solution(t, x)))


def __getattr__(name: str) -> Any:
    """OPTIMA and BRIDGES, which load torch."""
    if name in ("OPTIMA", "BRIDGES"):
        from kolmo.control import optima

        return getattr(optima, name)
    raise AttributeError(f"module 'kolmo.catalog' has no attribute {name!r}")
