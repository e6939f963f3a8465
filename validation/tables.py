"""Tables of validation: each function compares kolmo with a closed form or an asymptotic law from the literature."""

import math
import warnings
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
from scipy.integrate import quad

import kolmo
from kolmo import SDE, Absorbing, Box, Grid, KolmogorovProblem, catalog
from kolmo.forward import solve_forward
from kolmo.grid.grading import Sinh
from kolmo.schemes.base import SCHEMES
from kolmo.schemes.generator import Generator
from kolmo.steppers.base import STEPPERS
from kolmo.testing import Table
from validation.certificates import certified

Array = np.ndarray
ATOL = 1e-9


def _asked(
    problem: KolmogorovProblem, points: Array, answer: Array, rtol: float
) -> tuple[float, float, str, kolmo.Solution]:
    """Largest error and largest estimate relative to the largest answer, and whether the solver says it met rtol."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sol = kolmo.solve(problem, at=points, rtol=rtol, atol=ATOL)
    scale = float(np.abs(answer).max())
    error = float(np.abs(np.asarray(sol(points)) - answer).max()) / scale
    estimate = float(np.max(np.asarray(sol.error_estimate))) / scale
    return error, estimate, "yes" if sol.status == "converged" else "no", sol


# ---------------------------------------------------------------------------------------------------- closed forms
CLOSED = (
    "ornstein_uhlenbeck", "layered_ornstein_uhlenbeck", "harmonic_killing", "geometric_brownian_motion",
    "down_and_out_call", "vasicek_bond", "cir_bond", "heat", "langevin", "reflected_brownian_motion",
    "elastic_brownian_motion", "survival", "exit_right", "mean_exit_time", "committor", "mean_exit_time_rectangle",
    "circle", "wright_fisher", "double_well",
)  # fmt: skip


def closed_forms() -> Table:
    """Problems of ``kolmo.catalog`` with their default parameters at two tolerances."""
    rows = []
    for name in CLOSED:
        case = catalog.CASES[name]()
        for rtol in (1e-3, 1e-6):
            error, estimate, met, sol = _asked(case.problem, case.points, case.values, rtol)
            nodes = " × ".join(str(n) for n in sol.grid.shape)
            rows.append((name, case.source, rtol, error, estimate, met, nodes, sol.discretization.steps))
    columns = ("problem", "source", "rtol", "error", "estimate", "met", "nodes", "steps")
    return Table("Problems with closed forms", columns, tuple(rows))


# ---------------------------------------------------------------------------------------------------- Heston
# kappa, theta, sigma, rho, rate, dividend, horizon
HESTON: dict[str, tuple[float, ...]] = {
    "1": (1.5, 0.04, 0.3, -0.9, 0.025, 0.0, 1.0),
    "2": (3.0, 0.12, 0.04, 0.6, 0.01, 0.04, 1.0),
    "3": (0.6067, 0.0707, 0.2928, -0.7571, 0.03, 0.0, 3.0),
    "4": (2.5, 0.06, 0.5, -0.1, 0.0507, 0.0469, 0.25),
}
STRIKE = 100.0


def heston_call(S: float, v: float, parameters: tuple[float, ...], strike: float = STRIKE) -> float:
    r"""European call in Heston's model as one Fourier integral (Lewis 2001).

    .. math::
        C = Se^{-qT} - \frac{\sqrt{SK}\,e^{-(r+q)T/2}}{\pi}
            \int_0^\infty \operatorname{Re}\big[e^{iuk}\,\phi(u - \tfrac i2)\big]\frac{du}{u^2 + \frac14},
        \qquad k = \log\frac SK + (r - q)T

    with φ the characteristic function of :math:`\log S_T - \log E S_T` in the form that stays on one branch of the
    logarithm (Albrecher, Mayer, Schoutens and Tistaert 2007).
    """
    kappa, theta, sigma, rho, rate, dividend, T = parameters

    def phi(u: complex) -> complex:
        beta = kappa - rho * sigma * 1j * u
        d = np.sqrt(beta**2 + sigma**2 * (1j * u + u * u))
        g = (beta - d) / (beta + d)
        decay = np.exp(-d * T)
        level = kappa * theta / sigma**2 * ((beta - d) * T - 2.0 * np.log((1 - g * decay) / (1 - g)))
        slope = (beta - d) / sigma**2 * (1 - decay) / (1 - g * decay)
        return complex(np.exp(level + v * slope))

    k = math.log(S / strike) + (rate - dividend) * T

    def integrand(u: float) -> float:
        return (np.exp(1j * u * k) * phi(u - 0.5j)).real / (u * u + 0.25)

    pieces = [quad(integrand, a, b, epsabs=1e-13, epsrel=1e-12, limit=400)[0] for a, b in ((0, 20), (20, 120))]
    pieces.append(quad(integrand, 120, np.inf, epsabs=1e-12, limit=400)[0])
    factor = math.sqrt(S * strike) * math.exp(-0.5 * (rate + dividend) * T) / math.pi
    return S * math.exp(-dividend * T) - factor * sum(pieces)


def heston_problem(parameters: tuple[float, ...]) -> KolmogorovProblem:
    """The call in coordinates (S, v): both degenerate ends are natural, whether Feller's condition holds or not."""
    kappa, theta, sigma, rho, rate, dividend, T = parameters

    def drift(t: float, x: Array) -> Array:
        return np.stack([(rate - dividend) * x[..., 0], kappa * (theta - x[..., 1])], -1)

    def covariance(t: float, x: Array) -> Array:
        S, v = x[..., 0], x[..., 1]
        mixed = rho * sigma * S * v
        return np.stack([np.stack([v * S**2, mixed], -1), np.stack([mixed, sigma**2 * v], -1)], -2)

    return KolmogorovProblem(
        SDE(drift, covariance=covariance, dim=2),
        lambda x: np.maximum(x[..., 0] - STRIKE, 0.0),
        T,
        Box([0.0, 0.0], [np.inf, np.inf], boundary=[("natural", "open")] * 2),
        killing=rate,
    )


def heston(rtol: float = 1e-4) -> Table:
    """The four parameter sets of in 't Hout and Foulon (2010), calls with strike 100."""
    rows = []
    for name, parameters in HESTON.items():
        theta = parameters[1]
        points = np.array([[75.0, theta], [100.0, theta], [125.0, theta], [100.0, 2.0 * theta]])
        answer = np.array([heston_call(S, v, parameters) for S, v in points])
        error, estimate, met, sol = _asked(heston_problem(parameters), points, answer, rtol)
        feller = 2.0 * parameters[0] * theta / parameters[2] ** 2
        nodes = " × ".join(str(n) for n in sol.grid.shape)
        price = float(sol([[100.0, theta]])[0])
        rows.append((name, feller, float(answer[1]), price, error, estimate, met, nodes, sol.discretization.steps))
    columns = ("set", "2κθ/σ²", "exact at 100", "kolmo at 100", "error", "estimate", "met", "nodes", "steps")
    return Table(f"Heston's model, rtol {rtol:g}", columns, tuple(rows))


# ---------------------------------------------------------------------------------------------------- Kramers
def _crossing_time(sigma: float, start: float, end: float) -> float:
    r"""Mean first-passage time from start up to end in V = x⁴/4 − x²/2 by the double integral (Gardiner 1985).

    .. math:: \frac{2}{\sigma^2}\int_{x}^{b}\int_{-\infty}^{y} e^{2(V(y) - V(z))/\sigma^2}\,dz\,dy
    """
    scale = 2.0 / sigma**2

    def inner(y: float) -> float:
        def weight(z: float) -> float:
            return math.exp(scale * ((y**4 - z**4) / 4.0 - (y**2 - z**2) / 2.0))

        edges = [-4.0, -1.6, -1.0, -0.4, 0.0, 0.5, 1.0]
        edges = [e for e in edges if e < y] + [y]
        return sum(quad(weight, a, b, epsabs=0.0, epsrel=1e-12)[0] for a, b in pairwise(edges))

    middle = [start, -0.5, 0.0, 0.5, end]
    parts = [quad(inner, a, b, epsabs=0.0, epsrel=1e-11)[0] for a, b in pairwise(middle)]
    return scale * sum(parts)


def kramers(rtol: float = 1e-6) -> Table:
    """Mean time from one minimum of the double well to the other: solver, double integral, Kramers' law (1940)."""
    rows = []
    for sigma in (0.7, 0.5, 0.4, 0.3, 0.25):
        problem = KolmogorovProblem(
            SDE(lambda t, x: x - x**3, diffusion=sigma, dim=1),
            None,
            None,
            Box(-3.0, 1.0, boundary=[("reflecting", "absorbing")]),
            source=1.0,
        )
        exact = _crossing_time(sigma, -1.0, 1.0)
        law = 2.0 * math.pi / math.sqrt(2.0) * math.exp(0.5 / sigma**2)
        error, estimate, met, sol = _asked(problem, np.array([[-1.0]]), np.array([exact]), rtol)
        rows.append((sigma, float(sol(-1.0)), exact, error, estimate, met, law, law / exact))
    columns = ("σ", "kolmo", "double integral", "error", "estimate", "met", "Kramers' law", "law / exact")
    return Table(f"Mean time between the minima of a double well, rtol {rtol:g}", columns, tuple(rows))


# ---------------------------------------------------------------------------------------------------- first passage
def first_passage(rtol: float = 1e-6) -> Table:
    """First-passage density of Brownian motion with drift to a level: the inverse Gaussian law (Schrödinger 1915)."""
    rows = []
    for mu, sigma, level, horizon in ((1.0, 1.0, 1.0, 3.0), (0.5, 0.5, 1.0, 4.0), (-0.3, 0.8, 0.7, 2.0)):
        problem = KolmogorovProblem(
            SDE(mu, diffusion=sigma, dim=1),
            lambda x: 1.0 + 0.0 * x[..., 0],
            horizon,
            Box(-np.inf, level, boundary=[("open", "absorbing")]),
        )
        density = solve_forward(problem, [0.0], rtol=rtol)
        t = density.clock[1:]
        law = np.exp(-((level - mu * t) ** 2) / (2 * sigma**2 * t)) * level / (sigma * np.sqrt(2 * np.pi * t**3))
        flux = float(np.abs(density.exit_flux("high")[1:] - law).max() / law.max())
        passed = float(np.abs(density.exited("high")[1:] - _inverse_gaussian(t, mu, sigma, level)).max())
        lost = float(np.abs(density.mass + density.exited("high") - 1.0).max())
        estimate = density.flux_error("high") / float(law.max())
        rows.append((mu, sigma, level, horizon, len(t), flux, estimate, passed, lost))
    columns = ("μ", "σ", "level", "T", "steps", "density, error", "estimate", "passed by t, error", "mass lost")
    return Table(f"First-passage times of Brownian motion with drift, rtol {rtol:g}", columns, tuple(rows))


def _inverse_gaussian(t: Array, mu: float, sigma: float, level: float) -> Array:
    """Probability that μs + σW_s has reached the level by time t."""
    from scipy.special import log_ndtr, ndtr

    spread = sigma * np.sqrt(t)
    mirrored = np.exp(2 * mu * level / sigma**2 + log_ndtr((-level - mu * t) / spread))
    return np.asarray(ndtr((mu * t - level) / spread) + mirrored)


# ---------------------------------------------------------------------------------------------------- densities
def densities(rtol: float = 1e-6) -> Table:
    """Transition densities found forwards: Ornstein–Uhlenbeck and geometric Brownian motion."""
    rows = []
    kappa, sigma, T, start = 1.2, 0.8, 1.0, 0.7
    problem = KolmogorovProblem(SDE(lambda t, x: -kappa * x, diffusion=sigma, dim=1), lambda x: x[..., 0] ** 2, T)
    density = solve_forward(problem, [start], rtol=rtol)
    mean, variance = start * math.exp(-kappa * T), sigma**2 * -math.expm1(-2 * kappa * T) / (2 * kappa)
    x = mean + np.linspace(-3, 3, 61) * math.sqrt(variance)
    exact = np.exp(-((x - mean) ** 2) / (2 * variance)) / math.sqrt(2 * math.pi * variance)
    rows.append(("Ornstein–Uhlenbeck", *_density_errors(density, x, exact, mean, mean**2 + variance)))
    rate, vol, T, start = 0.05, 0.3, 1.0, 1.0
    problem = KolmogorovProblem(
        SDE(lambda t, x: rate * x, diffusion=lambda t, x: vol * x, dim=1),
        lambda x: x[..., 0] ** 2,
        T,
        Box(0.0, np.inf, boundary=[("natural", "open")]),
    )
    density = solve_forward(problem, [start], rtol=rtol)
    x = np.exp((rate - 0.5 * vol**2) * T + np.linspace(-3, 3, 61) * vol * math.sqrt(T))
    z = (np.log(x / start) - (rate - 0.5 * vol**2) * T) / (vol * math.sqrt(T))
    exact = np.exp(-0.5 * z**2) / (x * vol * math.sqrt(2 * math.pi * T))
    second = math.exp((2 * rate + vol**2) * T)
    rows.append(("geometric Brownian motion", *_density_errors(density, x, exact, math.exp(rate * T), second)))
    columns = ("process", "density, error", "mean, error", "second moment, error", "mass lost", "nodes")
    return Table(f"Transition densities from a point, rtol {rtol:g}", columns, tuple(rows))


def _density_errors(density: Any, x: Array, exact: Array, mean: float, second: float) -> tuple[Any, ...]:
    pointwise = float(np.abs(density(x) - exact).max() / exact.max())
    first = abs(float(density.expectation(lambda y: y[..., 0])) / mean - 1.0)
    square = abs(float(density.expectation(lambda y: y[..., 0] ** 2)) / second - 1.0)
    return pointwise, first, square, float(abs(density.mass[-1] - 1.0)), density.grid.shape[0]


# ---------------------------------------------------------------------------------------------------- committor
def committor_in_the_plane(rtol: float = 1e-5) -> Table:
    """Brownian motion in a rectangle: probability of leaving through the right side, as a series."""
    a, b = 1.0, 0.7
    problem = KolmogorovProblem(
        SDE([0.0, 0.0], diffusion=1.0),
        None,
        None,
        Box([0.0, 0.0], [a, b], boundary=[("absorbing", Absorbing(1.0)), ("absorbing", "absorbing")]),
    )
    points = np.array([[0.5, 0.35], [0.9, 0.35], [0.2, 0.1], [0.7, 0.6]])
    n = np.arange(1, 400, 2)[:, None]
    x, y = points.T
    # sinh(nπx/b)/sinh(nπa/b) without overflow
    rise = np.exp(n * np.pi * (x - a) / b) * -np.expm1(-2 * n * np.pi * x / b) / -np.expm1(-2 * n * np.pi * a / b)
    exact = (4 / (n * np.pi) * np.sin(n * np.pi * y / b) * rise).sum(0)
    error, estimate, met, sol = _asked(problem, points, exact, rtol)
    values = sol(points)
    rows = [
        (f"({p[0]:g}, {p[1]:g})", float(e), float(u), abs(float(u - e)))
        for p, e, u in zip(points, exact, values, strict=True)
    ]
    rows.append(("largest", math.nan, math.nan, error * float(exact.max())))
    rows.append((f"estimate (met: {met})", math.nan, math.nan, estimate * float(exact.max())))
    return Table(
        f"Exit through one side of a rectangle, rtol {rtol:g}", ("point", "series", "kolmo", "error"), tuple(rows)
    )


# ---------------------------------------------------------------------------------------------------- methods
def schemes() -> Table:
    """Errors of the schemes on the same nodes, with time steps that do not matter."""
    rows = []
    well, call, heat = catalog.double_well(horizon=2.0), catalog.geometric_brownian_motion(), catalog.heat()
    for label, case, grids, stepper, steps in (
        ("double well", well, [Grid.of(Box(-3.0, 3.0), n) for n in (41, 81, 161)], "radau5", 64),
        (
            "call, graded nodes",
            call,
            [Grid.of(call.problem.box.replace(0.0, 800.0), n, [Sinh(0.0, 800.0, 100.0, 20.0)]) for n in (41, 81, 161)],
            "radau5",
            64,
        ),
        (
            "heat, correlation 0.95",
            heat,
            [Grid.of(Box([-4.5, -2.2], [4.5, 2.6]), n) for n in (31, 61, 121)],
            "rk4",
            None,
        ),
    ):
        scale = float(np.abs(case.values).max())
        for scheme in ("central6", "central4", "central2", "monotone"):
            errors = []
            for grid in grids:
                taken = steps or _stable_steps(case.problem, grid, scheme)
                sol = kolmo.solve(case.problem, grid=grid, steps=taken, scheme=scheme, stepper=stepper)
                errors.append(float(np.abs(np.asarray(sol(case.points)) - case.values).max()) / scale)
            rows.append((label, scheme, " / ".join(str(g.shape[0]) for g in grids), *errors))
    columns = ("problem", "scheme", "nodes per axis", "error, coarse", "error, middle", "error, fine")
    return Table("Schemes on the same nodes", columns, tuple(rows))


def _stable_steps(problem: KolmogorovProblem, grid: Grid, scheme: str) -> int:
    """Fewest steps that are stable with rk4."""
    largest = STEPPERS["rk4"].largest_step(*Generator(problem, grid, SCHEMES[scheme]).stiffness())
    return math.ceil((problem.horizon or 0.0) / largest) + 1


def steppers() -> Table:
    """Errors of the steppers on the same fine nodes; rk4 with the fewest steps that are stable."""
    rows = []
    line, plane = catalog.ornstein_uhlenbeck(horizon=1.0), catalog.heat()
    for label, case, grid, names in (
        ("Ornstein–Uhlenbeck", line, Grid.of(Box(-4.5, 5.0), 241), ("radau5", "radau3", "implicit-euler", "rk4")),
        (
            "heat, correlation 0.95",
            plane,
            Grid.of(Box([-4.5, -2.2], [4.5, 2.6]), 81),
            ("radau5", "mcs3", "mcs", "implicit-euler", "rk4"),
        ),
    ):
        scale = float(np.abs(case.values).max())
        for name in names:
            counts = (_stable_steps(case.problem, grid, "central6"),) if name == "rk4" else (4, 8, 16, 32)
            for steps in counts:
                sol = kolmo.solve(case.problem, grid=grid, steps=steps, scheme="central6", stepper=name)
                error = float(np.abs(np.asarray(sol(case.points)) - case.values).max()) / scale
                rows.append((label, name, steps, error))
    return Table("Steppers on the same nodes, central6", ("problem", "stepper", "steps", "error"), tuple(rows))


def transport() -> Table:
    """No noise, or next to none: differences against semi-Lagrangian steps on the same nodes."""
    rows = []
    turn = catalog.rotation()
    drift = catalog.ornstein_uhlenbeck("gauss", kappa=1.2, mu=0.3, sigma=0.05)
    for label, case, grids in (
        ("rotation, no noise", turn, [Grid.of(Box([-1.5, -1.5], [1.5, 1.5]), n) for n in (41, 81)]),
        ("linear drift, σ = 0.05", drift, [Grid.of(Box(-4.0, 4.6), n) for n in (81, 161)]),
    ):
        scale = float(np.abs(case.values).max())
        for stepper, counts in (("rk4", (0,)), ("semi-lagrangian", (4, 16))):
            for count in counts:
                errors, taken = [], []
                for grid in grids:
                    taken.append(count or _stable_steps(case.problem, grid, "central6"))
                    sol = kolmo.solve(case.problem, grid=grid, steps=taken[-1], scheme="central6", stepper=stepper)
                    errors.append(float(np.abs(np.asarray(sol(case.points)) - case.values).max()) / scale)
                nodes = " / ".join(str(g.shape[0]) for g in grids)
                rows.append((label, stepper, nodes, " / ".join(map(str, taken)), *errors))
    columns = ("problem", "stepper", "nodes per axis", "steps", "error, coarse", "error, fine")
    return Table("Transport", columns, tuple(rows))


TABLES: dict[str, Callable[[], Table]] = {
    "closed_forms": closed_forms,
    "heston": heston,
    "kramers": kramers,
    "first_passage": first_passage,
    "densities": densities,
    "committor": committor_in_the_plane,
    "certified": certified,
    "schemes": schemes,
    "steppers": steppers,
    "transport": transport,
}
