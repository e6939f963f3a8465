"""Fokker–Planck: densities, first-passage fluxes and invariant laws against closed forms."""

import numpy as np
import pytest

from kolmo import SDE, Box, InputError, KolmogorovProblem, Robin, solve
from kolmo.forward import solve_forward, stationary_density


def one(x):
    return 1.0 + 0.0 * x[..., 0]


def first_passage(t, x0, mu, sigma, length):
    """Density of the time at which Brownian motion with drift leaves (0, length) below and above; images."""
    n = np.arange(-60, 61)[:, None]

    def kernel(a):
        return a / np.sqrt(2.0 * np.pi * t**3) / sigma * np.exp(-(a**2) / (2.0 * sigma**2 * t))

    tilt = np.exp(-(mu**2) * t / (2.0 * sigma**2))
    below = np.exp(-mu * x0 / sigma**2) * tilt * kernel(x0 + 2 * n * length).sum(0)
    above = np.exp(mu * (length - x0) / sigma**2) * tilt * kernel(length - x0 + 2 * n * length).sum(0)
    return below, above


@pytest.mark.parametrize(("scheme", "limit"), [("central6", 1e-7), ("central4", 1e-5), ("monotone", 2e-3)])
def test_first_passage_density(scheme, limit):
    mu, sigma, length, x0 = 0.5, 1.0, 1.5, 0.6
    problem = KolmogorovProblem(SDE(mu, diffusion=sigma, dim=1), one, 0.8, Box(0.0, length, "absorbing"))
    density = solve_forward(problem, x0, grid=61, steps=64, scheme=scheme)
    late = density.clock > 0.2
    below, above = first_passage(density.clock[late], x0, mu, sigma, length)
    assert np.abs(density.exit_flux("low")[late] - below).max() < limit
    assert np.abs(density.exit_flux((0, "high"))[late] - above).max() < limit
    t = np.linspace(1e-4, 0.8, 20001)
    for side, flux in enumerate(first_passage(t, x0, mu, sigma, length)):
        assert abs(density.exited(side)[-1] - np.trapezoid(flux, t)) < limit


def test_density_of_ornstein_uhlenbeck_from_a_point_samples_and_a_function():
    problem = KolmogorovProblem(SDE(lambda t, x: -x, diffusion=0.8, dim=1), one, 1.0)
    x = np.linspace(-1.0, 1.5, 11)

    def exact(mean, variance):
        v = variance * np.exp(-2.0) + 0.32 * (1.0 - np.exp(-2.0))
        return np.exp(-((x - mean * np.exp(-1.0)) ** 2) / (2 * v)) / np.sqrt(2 * np.pi * v)

    point = solve_forward(problem, 0.7, rtol=1e-6)
    assert np.abs(point(x) - exact(0.7, 0.0)).max() < 1e-5
    assert np.allclose(solve_forward(problem, [[0.7]] * 4, discretization=point.discretization)(x), point(x))
    two = solve_forward(problem, [[0.7], [0.2]], discretization=point.discretization)
    assert np.abs(two(x) - 0.5 * (exact(0.7, 0.0) + exact(0.2, 0.0))).max() < 1e-5
    function = solve_forward(
        problem,
        lambda y: np.exp(-((y[..., 0] - 0.3) ** 2) / 0.08) / np.sqrt(0.08 * np.pi),
        discretization=point.discretization,
    )
    assert np.abs(function(x) - exact(0.3, 0.04)).max() < 1e-5
    assert abs(function.expectation(lambda y: y[..., 0]) - 0.3 * np.exp(-1.0)) < 1e-6


def test_correlated_gaussian_in_two_dimensions():
    S = np.array([[0.5, 0.2], [0.2, 0.3]])
    problem = KolmogorovProblem(SDE([0.3, -0.2], covariance=S, dim=2), one, 0.5, Box([-3.6, -3.2], [3.9, 3.0]))
    density = solve_forward(problem, [0.1, 0.2], grid=(51, 51), steps=8, save=[0.25])
    assert density.times.tolist() == [0.25, 0.5]
    x = np.array([[0.2, 0.1], [0.8, 0.6], [-0.4, -0.3]])
    for t in density.times:
        y = x - np.array([0.1, 0.2]) - t * np.array([0.3, -0.2])
        exact = np.exp(-0.5 * np.einsum("ni,ij,nj->n", y, np.linalg.inv(S * t), y))
        exact /= 2 * np.pi * t * np.sqrt(np.linalg.det(S))
        assert np.abs(density(x, t) - exact).max() < 5e-3 * exact.max()


def test_density_next_to_walls():
    """Reflected, elastic and absorbed Brownian motion: image sums."""
    t, x0 = 0.1, 0.35

    def images(y, sign):
        n = np.arange(-8, 9)[:, None]
        near, far = y - x0 + 2 * n, y + x0 + 2 * n
        return (np.exp(-(near**2) / (2 * t)) + sign * np.exp(-(far**2) / (2 * t))).sum(0) / np.sqrt(2 * np.pi * t)

    x = np.array([0.0, 0.004, 0.02, 0.1, 0.5, 0.93, 1.0])
    for word, sign in (("reflecting", 1.0), ("absorbing", -1.0)):
        problem = KolmogorovProblem(SDE(0.0, diffusion=1.0, dim=1), one, t, Box(0.0, 1.0, word))
        density = solve_forward(problem, x0, grid=121, steps=16)
        assert np.abs(density(x) - images(x, sign)).max() < 5e-3, word


def test_elastic_outflow_is_rate_times_density():
    """Through ½u' = κu at the wall leaves κρ (with Σ = 1 and the flux of the adjoint)."""
    problem = KolmogorovProblem(SDE(0.0, diffusion=1.0, dim=1), one, 0.5, Box(0.0, 1.0, [(Robin(0.8), "reflecting")]))
    density = solve_forward(problem, 0.4, grid=121, steps=32)
    assert abs(density.exit_flux(0)[-1] - 0.8 * density(0.0)) < 5e-3
    assert density.exits == ((0, 0),)


def test_stationary_density_of_a_gradient_diffusion():
    sigma = 0.7
    sde = SDE(lambda t, x: x - x**3, diffusion=sigma, dim=1)
    problem = KolmogorovProblem(sde, one, 1.0, Box(-2.6, 2.6, "reflecting"))
    density = stationary_density(problem, grid=201)
    x = np.linspace(-2.6, 2.6, 4001)
    weight = np.exp(2.0 * (0.5 * x**2 - 0.25 * x**4) / sigma**2)
    inner = np.abs(x) < 2.0
    assert np.abs(density(x) - weight / np.trapezoid(weight, x))[inner].max() < 1e-5


def test_stationary_density_of_rotating_flow_in_two_dimensions():
    """N(0, V) with A V + V Aᵀ + Σ = 0, which is no gradient."""
    A = np.array([[-1.0, 1.5], [-1.5, -1.0]])
    sde = SDE(lambda t, x: x @ A.T, diffusion=0.6, dim=2)
    density = stationary_density(KolmogorovProblem(sde, one, 1.0, Box([-2.2] * 2, [2.2] * 2, "reflecting")), grid=45)
    x = np.array([[0.0, 0.0], [0.4, 0.1], [-0.3, 0.5]])
    exact = np.exp(-(x**2).sum(1) / 0.36) / (np.pi * 0.36)
    assert np.abs(density(x) / exact - 1.0).max() < 2e-3
    later = solve_forward(
        KolmogorovProblem(sde, one, 8.0, Box([-2.2] * 2, [2.2] * 2, "reflecting")), [0.5, 0.0], grid=45, steps=16
    )
    assert np.abs(later(x) / density(x) - 1.0).max() < 2e-3


def test_value_is_that_of_solve():
    problem = KolmogorovProblem(
        SDE(0.3, diffusion=1.0, dim=1), lambda x: np.cos(x[..., 0]), 0.4, Box(0.0, 1.0, ["absorbing"]), source=1.0
    )
    sol = solve(problem, grid=31, steps=8)
    assert abs(solve_forward(problem, 0.3, discretization=sol.discretization).value - sol(0.3)) < 1e-14


def test_plot():
    problem = KolmogorovProblem(SDE(0.0, diffusion=1.0, dim=1), one, 0.1, Box(0.0, 1.0, "reflecting"))
    axes = solve_forward(problem, 0.4, grid=21, steps=4).plot()
    assert axes.get_xlabel() == "$x$"


def test_bad_input():
    problem = KolmogorovProblem(SDE(0.0, diffusion=1.0, dim=1), one, 0.1, Box(0.0, 1.0, "reflecting"))
    leaky = KolmogorovProblem(SDE(0.0, diffusion=1.0, dim=1), one, 0.1, Box(0.0, 1.0, "absorbing"))
    exit_time = KolmogorovProblem(SDE(0.0, diffusion=1.0, dim=1), None, None, Box(0.0, 1.0, "absorbing"), source=1.0)
    density = solve_forward(problem, 0.4, grid=21, steps=4)
    recipe = density.discretization
    for call, argument in [
        (lambda: solve_forward(exit_time, 0.4), "problem"),
        (lambda: solve_forward(problem, 0.4, save=[0.2], grid=21, steps=4), "save"),
        (lambda: solve_forward(problem, 0.4, save=[0.03], discretization=recipe), "save"),
        (lambda: solve_forward(problem, 0.4, discretization=recipe, grid=21), "discretization, grid, steps"),
        (lambda: solve_forward(problem, np.zeros((0, 1)), grid=21, steps=4), "initial"),
        (lambda: solve_forward(problem, lambda x: x[..., 0] - 0.5, grid=21, steps=4), "initial"),
        (lambda: solve_forward(problem, lambda x: x[..., :1] @ np.ones((1, 3)), grid=21, steps=4), "initial"),
        (lambda: density.exit_flux("low"), "face"),
        (lambda: density(0.5, t=0.05), "t"),
        (lambda: stationary_density(leaky, grid=21), "problem"),
    ]:
        with pytest.raises(InputError) as caught:
            call()
        assert caught.value.argument == argument
