"""Fokker–Planck: densities, first-passage fluxes and invariant laws against closed forms."""

import numpy as np
import pytest

from kolmo import SDE, Absorbing, Box, Discretization, InputError, KolmogorovProblem, Robin, ToleranceWarning, solve
from kolmo.forward import WaysOut, initial_masses, solve_forward, stationary_density
from kolmo.forward.clock import graded_clock
from kolmo.forward.levels import Quantity, judged
from kolmo.grid.grading import Focused
from kolmo.schemes.base import SCHEMES
from kolmo.schemes.generator import Generator


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


def test_early_first_passage_by_tolerance():
    """Passage at rate 2000: nearly all of it before the first two thousandths of the horizon."""
    t = np.linspace(2e-5, 2e-3, 400)
    problem = KolmogorovProblem(SDE(0.0, diffusion=1.0, dim=1), one, 1.0, Box(0.0, 0.1, "absorbing"))
    density = solve_forward(problem, 0.05, rtol=1e-4)
    below, above = first_passage(t, 0.05, 0.0, 1.0, 0.1)
    peak = below.max()
    assert density.status == "converged"
    for side, exact in (("low", below), ("high", above)):
        error = np.abs(density.exit_flux(side, t) - exact).max()
        assert error < 1e-4 * peak
        assert error < 3.0 * density.flux_error(side) < 3e-4 * peak
        assert density.exit_flux(side).min() > -density.flux_error(side)
    assert np.array_equal(density.first_passage(t, "low"), density.exit_flux("low", t))


def test_what_is_asked_for_decides_the_grid():
    """Late fluxes and a late density need no fine start."""
    problem = KolmogorovProblem(SDE(0.0, diffusion=1.0, dim=1), one, 1.0, Box(0.0, 1.0, "absorbing"))
    early = solve_forward(problem, 0.03, rtol=1e-3)
    late = solve_forward(problem, 0.03, rtol=1e-3, flux_times=[0.2, 0.5], at=[0.5])
    assert late.discretization.steps < 0.5 * early.discretization.steps
    below, _ = first_passage(np.array([0.2, 0.5]), 0.03, 0.0, 1.0, 1.0)
    assert np.abs(late.exit_flux("low", [0.2, 0.5]) - below).max() < 1e-3 * below.max()
    nothing = solve_forward(problem, 0.03, rtol=1e-3, flux_times=[], at=[0.5])
    assert "flux" not in nothing.error_estimate


def test_faces_of_a_box_in_the_plane_take_all_that_leaves():
    problem = KolmogorovProblem(
        SDE([0.5, -0.3], diffusion=1.0, dim=2), one, 0.4, Box([0.0, 0.0], [1.0, 0.8], [("absorbing",) * 2] * 2)
    )
    density = solve_forward(problem, [0.4, 0.3], rtol=1e-2, at=[[0.5, 0.4]])
    gone = sum(density.exited(e) for e in density.exits)
    assert len(density.exits) == 4
    assert np.abs(gone + density.mass - 1.0).max() < 1e-12
    t, late = density.clock, density.clock > 0.02
    total = sum(density.exit_flux(e) for e in density.exits)
    assert np.abs(np.trapezoid(total[late], t[late]) - np.ptp(gone[late])) < 2e-3


def test_monotone_laws_are_nowhere_negative():
    problem = KolmogorovProblem(SDE(1.0, diffusion=1.0, dim=1), one, 0.5, Box(0.0, 1.0, [("absorbing", "reflecting")]))
    density = solve_forward(problem, 0.37, rtol=3e-2, scheme="monotone", save=[0.01])
    assert density.status == "converged"
    assert density.weights.min() >= 0.0
    assert density.exit_flux("low").min() >= 0.0
    assert density.values.min() >= 0.0
    assert "negative" not in density.message


def test_what_is_negative_is_told():
    problem = KolmogorovProblem(SDE(0.0, diffusion=1.0, dim=1), one, 0.5, Box(0.0, 1.0, "absorbing"))
    density = solve_forward(problem, 0.13, grid=21, steps=200)
    assert density.exit_flux("low").min() < 0
    assert "flux through (0, 0) is negative" in density.message
    assert "monotone" in density.message


def test_a_tolerance_that_is_not_met_is_told():
    problem = KolmogorovProblem(SDE(0.0, diffusion=1.0, dim=1), one, 1.0, Box(0.0, 1.0, "absorbing"))
    with pytest.warns(ToleranceWarning, match="max_cells = 130.*flux through"):
        density = solve_forward(problem, 0.3, rtol=1e-9, max_cells=130)
    assert density.status == "tolerance_not_met"
    t = density.clock[1:]
    error = np.abs(density.exit_flux(0)[1:] - first_passage(t, 0.3, 0.0, 1.0, 1.0)[0]).max()
    assert 1e-12 < error < 2.0 * density.flux_error(0)
    with pytest.warns(ToleranceWarning, match="max_seconds"):
        assert solve_forward(problem, 0.3, rtol=1e-12, max_seconds=1e-6).error_estimate["flux"] == np.inf


def test_a_law_that_is_negative_has_at_least_that_error():
    flux = Quantity((0, 0), [np.array([1.0, v]) for v in (0.0, -1e-3, -1e-3)], None, 0.0)
    assert flux.negative == 1e-3
    assert judged(flux, [1.0, 1.5, 2.25], 6.0).estimate[0] > 0


def test_initial_densities_that_jump_are_smoothed():
    """Uniform on an interval whose ends fall anywhere between nodes: order 6, where point values have order 1."""
    problem = KolmogorovProblem(SDE(0.0, diffusion=1.0, dim=1), one, 0.2, Box(-4.0, 4.0))
    x = np.linspace(-1.0, 1.0, 21)
    from scipy.special import ndtr

    exact = (ndtr((x + 0.317) / np.sqrt(0.2)) - ndtr((x - 0.538) / np.sqrt(0.2))) / 0.855
    errors = []
    for n in (41, 81):
        density = solve_forward(
            problem, lambda y: np.where(np.abs(y[..., 0] - 0.1105) < 0.4275, 1 / 0.855, 0.0), grid=n, steps=20
        )
        assert abs(density.mass[0] - 1.0) < 1e-12
        errors.append(np.abs(density(x) - exact).max())
    assert errors[0] < 1e-3
    assert errors[1] < errors[0] / 20


def test_horizons_of_any_length():
    """Times are compared relative to themselves: the law at T of 1e-12 is not that at its start."""
    problem = KolmogorovProblem(SDE(0.0, diffusion=1e6, dim=1), one, 1e-12, Box(-8.0, 8.0))
    density = solve_forward(problem, 0.0, grid=121, steps=8, save=[0.0, 0.5e-12])
    assert density.times.tolist() == [0.0, 0.5e-12, 1e-12]
    assert abs(density(0.0, 0.5e-12) - 1.0 / np.sqrt(np.pi)) < 1e-4
    assert abs(density(0.0) - 1.0 / np.sqrt(2 * np.pi)) < 1e-4


def test_corners_belong_to_the_later_axis():
    """A corner of two absorbing faces counts once, for the face whose value it has."""
    box = Box([0.0, 0.0], [1.0, 1.0], [("absorbing", Absorbing(1.0)), ("reflecting", Absorbing(2.0))])
    problem = KolmogorovProblem(SDE([0.0, 0.0], diffusion=1.0), one, 1.0, box)
    recipe = solve(problem, grid=9, steps=1).discretization
    generator = Generator(problem, recipe.grid, SCHEMES["central2"])
    owned = WaysOut(generator).owned
    values = generator.boundary(0.0, recipe.grid.points)[:, 0]
    assert np.array_equal(sum(owned.values()), generator.fixed.astype(float))
    assert np.array_equal(values, owned[0, 1] + 2.0 * owned[1, 1])
    corner = np.flatnonzero((recipe.grid.points == [1.0, 1.0]).all(1))[0]
    assert owned[1, 1][corner] == 1.0
    assert owned[0, 1][corner] == 0.0


def test_graded_clock():
    times = graded_clock(1.0, 1e-6, 8, fixed=[0.3, 0.7], longest=0.05)
    steps = np.diff(times)
    assert {0.3, 0.7, 1.0} <= set(times)
    assert steps.max() <= 0.05 * (1 + 1e-12)
    assert (steps > 0).all()
    late = times[1:] > 8e-6
    assert (steps[late] <= 0.26 * times[1:][late]).all()
    assert len(times) < 8 + 4 * 17 + 25


def test_recipes_of_laws_are_saved(tmp_path):
    problem = KolmogorovProblem(SDE(0.0, diffusion=1.0, dim=1), one, 3.0, Box(-np.inf, 1.0, [("open", "absorbing")]))
    density = solve_forward(problem, 0.9, rtol=1e-2)
    assert isinstance(density.grid.axes[0].grading, Focused)
    density.discretization.save(tmp_path / "recipe.npz")
    again = solve_forward(problem, 0.9, discretization=Discretization.load(tmp_path / "recipe.npz"))
    assert np.array_equal(again.exit_flux("high"), density.exit_flux("high"))


def test_points_have_the_masses_of_interpolation():
    problem = KolmogorovProblem(SDE(0.0, diffusion=1.0, dim=1), one, 0.1, Box(0.0, 1.0, "reflecting"))
    recipe = solve_forward(problem, 0.4, grid=21, steps=4).discretization
    masses = initial_masses(np.array([[0.37]]), recipe)[:, 0]
    for power in range(recipe.width):
        assert abs(masses @ recipe.grid.nodes[0] ** power - 0.37**power) < 1e-12


def test_plot():
    problem = KolmogorovProblem(SDE(0.0, diffusion=1.0, dim=1), one, 0.1, Box(0.0, 1.0, "reflecting"))
    axes = solve_forward(problem, 0.4, grid=21, steps=4).plot()
    assert axes.get_xlabel() == "$x$"


def test_bad_input():
    problem = KolmogorovProblem(SDE(0.0, diffusion=1.0, dim=1), one, 0.1, Box(0.0, 1.0, "reflecting"))
    leaky = KolmogorovProblem(SDE(0.0, diffusion=1.0, dim=1), one, 0.1, Box(0.0, 1.0, "absorbing"))
    exit_time = KolmogorovProblem(SDE(0.0, diffusion=1.0, dim=1), None, None, Box(0.0, 1.0, "absorbing"), source=1.0)
    free = KolmogorovProblem(SDE(0.0, diffusion=1.0, dim=1), one, 0.1)
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
        (lambda: solve_forward(problem, 0.4, at=[1.5]), "at"),
        (lambda: solve_forward(problem, 0.4, at=np.zeros((0, 1))), "at"),
        (lambda: solve_forward(leaky, 0.4, flux_times=[0.2]), "flux_times"),
        (lambda: solve_forward(problem, 0.4, rtol=-1.0), "rtol"),
        (lambda: solve_forward(problem, 0.4, rtol=0.0), "rtol, atol"),
        (lambda: solve_forward(problem, 0.4, steps=4), "steps"),
        (lambda: solve_forward(free, lambda x: np.exp(-(x[..., 0] ** 2))), "at"),
        (lambda: solve_forward(problem, lambda x: 0.0 * x[..., 0]), "initial"),
        (lambda: stationary_density(leaky, grid=21), "problem"),
    ]:
        with pytest.raises(InputError) as caught:
            call()
        assert caught.value.argument == argument
