"""Control problems with exact optima, one line each: the part of the catalogue that needs torch.

>>> from kolmo import catalog, control
>>> case = catalog.OPTIMA["time_to_target"]()
>>> opt = control.solve_hjb(case.problem, at=case.points, rtol=1e-4)
>>> bool(abs(opt(case.points) - case.exact(0.0, case.points)).max() < 1e-4)
True
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.integrate import solve_ivp
from scipy.linalg import sqrtm
from scipy.optimize import brentq, fsolve

from kolmo.control import ControlProblem, Finite, Game, Interval, Target, Unbounded
from kolmo.problem.box import Box
from kolmo.problem.case import Case, line
from kolmo.problem.sde import SDE
from kolmo.registry import Registry


@dataclass(frozen=True, repr=False)
class Optimum(Case):
    """A control problem, its exact value, and where it comes from.

    Attributes
    ----------
    average : float or None
        Cost per unit of time, where the problem is ergodic; then ``solution`` is known up to a constant.
    """

    average: float | None = None


OPTIMA: Registry[Callable[..., Optimum]] = Registry("control problem")


def _listed(make: Callable[..., Optimum]) -> Callable[..., Optimum]:
    """Put a function under its name into the list of optima."""
    OPTIMA.add(make.__name__, make)
    return make


@_listed
def linear_quadratic_game(
    a: float = -0.3,
    gains: tuple[float, float] = (1.2, 0.7),
    prices: tuple[float, float] = (0.8, 3.0),
    sigma: float = 0.6,
    horizon: float = 1.2,
) -> Optimum:
    """Robust control: dX = (aX + b₁u + b₂w) dt + σ dW, cost ½(X² + r u² − γ w²), 0.75 X_T², u against w.

    Parameters
    ----------
    a, sigma, horizon : float
        Drift, noise, horizon.
    gains, prices : tuple of two floats
        b₁, b₂ and r, γ.
    """
    (b1, b2), (r, gamma) = gains, prices

    def value(t: float, x: np.ndarray) -> np.ndarray:
        def slope(_: float, y: np.ndarray) -> list[float]:
            return [1.0 + 2.0 * a * y[0] - (b1**2 / r - b2**2 / gamma) * y[0] ** 2, 0.5 * sigma**2 * y[0]]

        P, k = solve_ivp(slope, (0.0, horizon - t), [1.5, 0.0], rtol=1e-11, atol=1e-12).y[:, -1]
        return np.asarray(0.5 * P * x[..., 0] ** 2 + k)

    problem = ControlProblem(
        lambda t, x, u: a * x + b1 * u[..., :1] + b2 * u[..., 1:],
        sigma,
        controls=Game(Unbounded(1), Unbounded(1)),
        terminal=lambda x: 0.75 * x[..., 0] ** 2,
        running_cost=lambda t, x, u: 0.5 * (x[..., 0] ** 2 + r * u[..., 0] ** 2 - gamma * u[..., 1] ** 2),
        horizon=horizon,
        box=Box.unbounded(1),
    )
    return Optimum("linear_quadratic_game", problem, line(-0.7, 1.3), "Basar and Bernhard (1995)", value)


@_listed
def time_to_target(speed: float = 0.8, sigma: float = 0.6, radius: float = 0.3) -> Optimum:
    """Least expected time to |x| <= radius from within (−1, 1), whose ends reflect, with drift at most ``speed``.

    Parameters
    ----------
    speed, sigma, radius : float
        Largest drift, noise, and half the width of the target.
    """
    k = 2.0 * speed / sigma**2

    def value(t: float, x: np.ndarray) -> np.ndarray:
        y = np.maximum(np.abs(x[..., 0]), radius)
        return np.asarray(((y - radius) - (np.exp(k * (y - 1.0)) - np.exp(k * (radius - 1.0))) / k) / speed)

    problem = ControlProblem(
        lambda t, x, u: speed * u,
        sigma,
        controls=Interval(-1.0, 1.0),
        terminal=None,
        horizon=None,
        running_cost=1.0,
        box=Box(-1.0, 1.0, "reflecting"),
        targets=[Target(lambda x: x[..., 0].abs() - radius)],
    )
    return Optimum("time_to_target", problem, line(-0.5, 0.8), "Mandl (1968)", value)


@_listed
def annulus_committor(inner: float = 0.3, outer: float = 1.3, centre: tuple[float, float] = (0.05, -0.03)) -> Optimum:
    """Probability that Brownian motion between two circles reaches the outer one first.

    Parameters
    ----------
    inner, outer : float
        Radii.
    centre : tuple of two floats
        Centre.
    """
    import torch

    def radius(x: Any) -> Any:
        return (x - torch.tensor(centre, dtype=torch.float64)).norm(dim=-1)

    def value(t: float, x: np.ndarray) -> np.ndarray:
        r = np.linalg.norm(x - np.array(centre), axis=-1)
        return np.asarray(np.log(np.clip(r, inner, outer) / inner) / np.log(outer / inner))

    problem = ControlProblem(
        lambda t, x, u: 0.0 * x,
        1.0,
        controls=Finite([[0.0]]),
        terminal=None,
        horizon=None,
        box=Box([-1.5, -1.5], [1.5, 1.5], "reflecting"),
        targets=[Target(lambda x: radius(x) - inner), Target(lambda x: outer - radius(x), 1.0)],
    )
    points = np.array([[0.5, 0.2], [-0.3, 0.6], [0.05, -0.5]])
    return Optimum("annulus_committor", problem, points, "Kakutani (1944)", value)


def _quadratic_cost(
    a: float, b: float, sigma: float, q: float, r: float, discount: float
) -> tuple[ControlProblem, float]:
    """Linear dynamics and quadratic cost for ever, and P of V = P x² + constant."""
    P = (2.0 * a - discount + np.sqrt((2.0 * a - discount) ** 2 + 4.0 * q * b**2 / r)) * r / (2.0 * b**2)
    problem = ControlProblem(
        lambda t, x, u: a * x + b * u,
        sigma,
        controls=Unbounded(1),
        terminal=None,
        horizon=None,
        running_cost=lambda t, x, u: q * x[..., 0] ** 2 + r * u[..., 0] ** 2,
        killing=discount if discount > 0.0 else None,
        ergodic=discount == 0.0,
        box=Box.unbounded(1),
    )
    return problem, float(P)


@_listed
def ergodic_regulator(a: float = -0.5, b: float = 0.8, sigma: float = 0.7, q: float = 1.0, r: float = 0.5) -> Optimum:
    """Least long-run average of qX² + ru² for dX = (aX + bu) dt + σ dW: λ = σ² P.

    Parameters
    ----------
    a, b, sigma, q, r : float
        Drift, gain, noise, prices of state and effort.
    """
    problem, P = _quadratic_cost(a, b, sigma, q, r, 0.0)
    points = line(0.0, 0.6, -1.1)
    return Optimum("ergodic_regulator", problem, points, "Wonham (1968)", lambda t, x: P * x[..., 0] ** 2, sigma**2 * P)


@_listed
def discounted_regulator(
    a: float = 0.2, b: float = 0.8, sigma: float = 0.7, q: float = 1.0, r: float = 0.5, discount: float = 0.6
) -> Optimum:
    """Least discounted cost of qX² + ru² for ever: V = P x² + σ² P / discount.

    Parameters
    ----------
    a, b, sigma, q, r, discount : float
        Drift, gain, noise, prices of state and effort, discount rate.
    """
    problem, P = _quadratic_cost(a, b, sigma, q, r, discount)
    constant = sigma**2 * P / discount
    points = line(-0.5, 0.8)
    return Optimum("discounted_regulator", problem, points, "Wonham (1968)", lambda t, x: P * x[..., 0] ** 2 + constant)


@_listed
def plant(
    growth: float = 0.01,
    sigma: float = 0.25,
    rate: float = 0.06,
    running: float = 1.0,
    costs: tuple[float, float] = (2.0, 0.5),
) -> Optimum:
    """When to open and to close a plant whose product's price is exp(x), a geometric Brownian motion.

    ``problem`` is the pair of the regimes, closed and open, and ``solution(t, x)`` has a last axis for them; for
    ``control.solve_switching(case.problem, [[0, costs[0]], [costs[1], 0]])``.

    Parameters
    ----------
    growth, sigma, rate : float
        Growth and noise of the price, discount rate.
    running : float
        Cost per unit of time while open.
    costs : tuple of two floats
        Of opening and of closing.
    """
    half = 0.5 - growth / sigma**2
    root = np.sqrt(half**2 + 2.0 * rate / sigma**2)
    up, down = half + root, half - root

    def parts(y: np.ndarray, x: Any) -> tuple[Any, Any, Any, Any]:
        """Values of the plant closed and open, and their slopes."""
        fixed, variable = np.exp(x) / (rate - growth), running / rate
        closed, opened = y[0] * np.exp(up * x), y[1] * np.exp(down * x)
        return closed, opened + fixed - variable, up * closed, down * opened + fixed

    def fit(y: np.ndarray) -> list[float]:
        closed, opened, slope, other = parts(y, y[2])
        shut, run, fall, rise = parts(y, y[3])
        return [closed - opened + costs[0], slope - other, run - shut + costs[1], rise - fall]

    y = fsolve(fit, [4.0, 4.0, np.log(1.8 * running), np.log(0.6 * running)], xtol=1e-13)

    def value(t: float, x: np.ndarray) -> np.ndarray:
        closed, opened, _, _ = parts(y, x[..., 0])
        shut = np.where(x[..., 0] < y[2], closed, opened - costs[0])
        return np.stack([shut, np.where(x[..., 0] > y[3], opened, closed - costs[1])], -1)

    def regime(profit: Any) -> ControlProblem:
        return ControlProblem(
            lambda t, x, u: growth - 0.5 * sigma**2 + 0.0 * x,
            sigma,
            controls=Finite([[0.0]]),
            terminal=None,
            horizon=None,
            running_cost=profit,
            killing=rate,
            sense="max",
            box=Box.unbounded(1),
        )

    problem = (regime(0.0), regime(lambda t, x, u: x[..., 0].exp() - running))
    return Optimum("plant", problem, line(-0.3, 0.0, 0.4), "Brekke and Oksendal (1994)", value)


@_listed
def kept_above(
    speed: float = 0.7, sigma: float = 0.5, curvature: float = 0.8, reward: float = 0.6, horizon: float = 1.0
) -> Optimum:
    """A state that must not fall below 0, dX = a dt + σX dW with |a| <= speed, and is paid for falling: V = αx² − κx.

    The cost is 2αvx − ασ²x² + κa, so that a = −v is best all the way down to 0, where it is not admissible. Without the
    constraint the cost at 0 is lower by κv per unit of time.

    Parameters
    ----------
    speed, sigma, curvature, reward, horizon : float
        v, σ, α, κ and T.
    """

    def cost(t: float, x: Any, a: Any) -> Any:
        return curvature * x[..., 0] * (2.0 * speed - sigma**2 * x[..., 0]) + reward * a[..., 0]

    def final(x: Any) -> Any:
        return curvature * x[..., 0] ** 2 - reward * x[..., 0]

    problem = ControlProblem(
        lambda t, x, a: a,
        lambda t, x, a: sigma * x,
        controls=Interval(-speed, speed),
        terminal=final,
        horizon=horizon,
        running_cost=cost,
        box=Box(0.0, np.inf, [("constrained", "open")]),
    )
    return Optimum("kept_above", problem, line(0.0, 0.1, 0.5, 1.2), "Soner (1986)", lambda t, x: np.asarray(final(x)))


@_listed
def saving_without_debt(income: float = 1.0, discount: float = 0.5, most: float = 2.0) -> Optimum:
    r"""Most discounted logarithmic utility of consumption c for ever, dX = (y − c) dt, without debt: X >= 0.

    An impatient saver at wealth x consumes :math:`c = y e^{\rho\tau}`, τ the time until nothing is left:
    :math:`x = y\,((e^{\rho\tau} - 1)/\rho - \tau)`, and :math:`\rho V = \log c + (y - c)/c`. At 0 the income is
    consumed; c rises from there like a square root, and V is no smoother than that.

    Parameters
    ----------
    income, discount : float
        y and ρ.
    most : float
        Wealth up to which the problem is solved.
    """

    def left(x: float) -> float:
        return float(brentq(lambda u: income * (np.expm1(discount * u) / discount - u) - x, 0.0, 200.0, xtol=1e-14))

    def value(t: float, x: np.ndarray) -> np.ndarray:
        times = np.array([left(float(v)) for v in x[..., 0].ravel()]).reshape(x.shape[:-1])
        c = income * np.exp(discount * times)
        return np.asarray((np.log(c) + (income - c) / c) / discount)

    problem = ControlProblem(
        lambda t, x, c: income - c,
        controls=Interval(0.2 * income, 5.0 * income),
        terminal=None,
        horizon=None,
        running_cost=lambda t, x, c: c[..., 0].log(),
        killing=discount,
        sense="max",
        box=Box(0.0, most, [("constrained", "open")]),
    )
    source = "Achdou, Han, Lasry, Lions and Moll (2022)"
    return Optimum("saving_without_debt", problem, line(0.0, 0.05, 0.5, 1.0), source, value)


@dataclass(frozen=True)
class BridgeCase:
    """Two densities and a process, with the exact Schrödinger bridge between them.

    Attributes
    ----------
    name : str
        Name of the function that made it.
    sde : SDE
        The process without steering.
    density0, density1 : callable
        The two ends, not normalised.
    horizon : float
        T.
    source : str
        Author and year.
    cost : float
        Exact cost.
    solution : callable
        ``solution(t, x)``: exact steering at points ``(..., d)``, without the drift of the process.
    law : callable
        ``law(t)``: mean and covariance of the bridge.
    """

    name: str
    sde: SDE
    density0: Callable[[Any], Any]
    density1: Callable[[Any], Any]
    horizon: float
    source: str
    cost: float
    solution: Callable[[float, np.ndarray], np.ndarray]
    law: Callable[[float], tuple[np.ndarray, np.ndarray]]


BRIDGES: Registry[Callable[..., BridgeCase]] = Registry("bridge")


def gaussian_bridge(
    mean0: Any = (-1.0,),
    covariance0: Any = ((0.01,),),
    mean1: Any = (2.0,),
    covariance1: Any = ((0.04,),),
    kappa: float = 0.0,
    sigma: float = 0.05,
    horizon: float = 1.0,
) -> BridgeCase:
    """Schrödinger bridge between two Gaussians for dX = −κX dt + σ dW: by default at small noise, 60 deviations apart.

    Parameters
    ----------
    mean0, mean1 : array_like, shape (d,)
        Means.
    covariance0, covariance1 : array_like, shape (d, d)
        Covariances.
    kappa, sigma, horizon : float
        Parameters of the process.

    Examples
    --------
    >>> round(gaussian_bridge().cost, 6)
    1801.669046
    """
    m0, A, m1, B = (np.asarray(v, dtype=float) for v in (mean0, covariance0, mean1, covariance1))
    d = len(m0)

    def kernel(time: float) -> tuple[float, float]:
        if kappa == 0.0:
            return 1.0, sigma**2 * time
        return float(np.exp(-kappa * time)), sigma**2 * float(-np.expm1(-2.0 * kappa * time)) / (2.0 * kappa)

    f, v = kernel(horizon)
    start, root = f * f * A, np.real(sqrtm(f * f * A))
    # joint covariance of f X_0 and X_T: root (root B root + v²/4)^½ root⁻¹ − v/2
    C = root @ np.real(sqrtm(root @ B @ root + 0.25 * v * v * np.eye(d))) @ np.linalg.inv(root) - 0.5 * v * np.eye(d)
    G = C.T @ np.linalg.inv(start)
    V = B - G @ C
    away, turn = m1 - f * m0, G - np.eye(d)
    quadratic = np.trace(V) + away @ away + np.trace(turn @ start @ turn.T)
    cost = 0.5 * (quadratic / v - d - np.linalg.slogdet(V / v)[1])

    def steering(t: float, x: np.ndarray) -> np.ndarray:
        g, w = kernel(horizon - t)
        # X_T given X_t = x: the kernel from t times exp(−½ yᵀQy + qᵀy)
        Q = np.linalg.inv(V) - np.eye(d) / v
        q = np.linalg.solve(V, m1 - G @ (f * m0))
        mean = np.linalg.solve(np.eye(d) / w + Q, (g * np.asarray(x) / w + q)[..., None])[..., 0]
        return np.asarray(sigma**2 * g / w * (mean - g * np.asarray(x)))

    def law(t: float) -> tuple[np.ndarray, np.ndarray]:
        (before, spread), (after, _) = kernel(t), kernel(horizon - t)
        gain = spread * after / v
        first = (before / f - gain) * np.eye(d)
        covariance = first @ start @ first + gain * (first @ C + C.T @ first) + gain**2 * B
        return (first @ (f * m0) + gain * m1), covariance + (spread - gain * after * spread) * np.eye(d)

    def density(mean: np.ndarray, S: np.ndarray) -> Callable[[Any], Any]:
        centre, P = torch.as_tensor(mean), torch.as_tensor(np.linalg.inv(S))
        return lambda x: torch.exp(-0.5 * torch.einsum("...i,ij,...j->...", x - centre, P, x - centre))

    return BridgeCase(
        "gaussian_bridge",
        SDE(lambda t, x: -kappa * x, sigma, dim=d),
        density(m0, A),
        density(m1, B),
        horizon,
        "Chen, Georgiou and Pavon 2016; Janati et al. 2020",
        float(cost),
        steering,
        law,
    )


BRIDGES.add("gaussian_bridge", gaussian_bridge)
