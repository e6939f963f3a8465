"""Kinks and jumps in the terminal data: the smoothing kernels and the order that they keep."""

import numpy as np
import pytest
from scipy.stats import norm

from kolmo import SDE, Box, Grid, KolmogorovProblem, plan, solve
from kolmo.catalog import CASES
from kolmo.schemes.terminal import common_break, plan_terminal
from kolmo.schemes.terminal.kernel import kernel, support
from kolmo.testing import order_of_accuracy


@pytest.mark.parametrize("order", [2, 4, 6])
def test_kernel_reproduces_polynomials(order):
    """Smoothing at all positions keeps polynomials of degree below the order."""
    s, w = np.polynomial.legendre.leggauss(12)
    cells = np.arange(-support(order), support(order))
    x = (cells[:, None] + 0.5 * (s + 1.0)).ravel()
    weights = np.tile(0.5 * w, len(cells)) * kernel(order)(x)
    moments = [weights @ x**m for m in range(order + 1)]
    assert np.allclose(moments[:order], [1.0] + [0.0] * (order - 1), atol=1e-12)
    assert abs(moments[order]) > 1e-3


@pytest.mark.parametrize("order", [2, 4, 6])
def test_kernel_damps_what_the_grid_cannot_see(order):
    """Its Fourier transform has zeros of the order at multiples of 2π, so that what aliases is gone."""
    s, w = np.polynomial.legendre.leggauss(40)
    cells = np.arange(-support(order), support(order))
    x = (cells[:, None] + 0.5 * (s + 1.0)).ravel()
    weights = np.tile(0.5 * w, len(cells)) * kernel(order)(x)
    small, large = (abs((weights * np.cos((2.0 * np.pi + e) * x)).sum()) for e in (0.1, 0.2))
    assert abs(np.log2(large / small) - order) < 0.4


# Off the nodes and of no special position relative to them.
BREAK = 0.1371


def jump(x):
    return (x[..., 0] > BREAK) * 1.0


def kink(x):
    return np.maximum(x[..., 0] - BREAK, 0.0)


def brownian(terminal):
    return KolmogorovProblem(SDE(0.0, diffusion=1.0, dim=1), terminal, 0.5, Box(-6.0, 6.0))


def exact(terminal):
    from scipy.special import ndtr

    s = np.sqrt(0.5)

    def u(t, x):
        z = (np.asarray(x)[..., 0] - BREAK) / s
        return ndtr(z) if terminal is jump else s * (z * ndtr(z) + np.exp(-0.5 * z**2) / np.sqrt(2.0 * np.pi))

    return u


X = np.array([[-0.7], [0.05], [0.1371], [0.4], [1.3]])


@pytest.mark.parametrize("terminal", [jump, kink])
@pytest.mark.parametrize("scheme", ["central2", "central4", "central6"])
def test_breaks_keep_the_order(terminal, scheme):
    order = int(scheme[-1])
    nodes = [45, 91, 181] if order < 6 else [45, 67, 91]
    table = order_of_accuracy(
        brownian(terminal), exact(terminal), X, nodes=nodes, steps=32, scheme=scheme, stepper="radau5"
    )
    # over both refinements, so that the position of the break among the nodes does not matter
    errors = table.column("error")
    spacing = 1.0 / (np.array(nodes) - 1.0)
    assert np.log(errors[0] / errors[-1]) / np.log(spacing[0] / spacing[-1]) > order - 0.6, table


def test_without_smoothing_the_order_is_lost():
    from kolmo.discretization import Discretization

    errors = []
    for n in (45, 91):
        recipe = solve(brownian(jump), grid=n, steps=32, scheme="central6").discretization
        plain = Discretization(recipe.grid, recipe.times, recipe.scheme, recipe.stepper)
        errors.append(np.abs(solve(brownian(jump), discretization=plain)(X) - exact(jump)(0.0, X)).max())
        assert recipe.properties["terminal_smoothed"]
    assert np.log2(errors[0] / errors[1]) < 3.0
    assert errors[1] > 1e-3


def test_smooth_data_are_left_alone():
    for name in ("circle", "reflected_ornstein_uhlenbeck", "wright_fisher"):
        recipe = solve(CASES[name]().problem, grid=81, steps=4).discretization
        assert not recipe.properties["terminal_smoothed"], name


def test_columns_are_smoothed_together():
    both = KolmogorovProblem(
        SDE(0.0, diffusion=1.0, dim=1), lambda x: np.stack([jump(x), np.cos(x[..., 0])], -1), 0.5, Box(-6.0, 6.0)
    )
    values = solve(both, grid=91, steps=16)(X)
    assert np.abs(values[:, 0] - exact(jump)(0.0, X)).max() < 1e-5
    inner = np.abs(values[:, 1] - np.exp(-0.25) * np.cos(X[:, 0]))
    assert inner.max() < 1e-5


def test_break_along_a_slanted_line():
    """1{x₀ + x₁ > c}: one-dimensional in the sum, whose variance is 2T."""
    from scipy.special import ndtr

    problem = KolmogorovProblem(
        SDE([0.0, 0.0], diffusion=1.0, dim=2),
        lambda x: (x[..., 0] + 0.6 * x[..., 1] > BREAK) * 1.0,
        0.5,
        Box([-4.0, -4.0], [4.0, 4.0]),
    )
    x = np.array([[0.0, 0.0], [0.5, -0.3], [-0.4, 0.2]])
    wanted = ndtr((x[:, 0] + 0.6 * x[:, 1] - BREAK) / np.sqrt(0.5 * 1.36))
    errors = [np.abs(solve(problem, grid=n, steps=8, scheme="central4")(x) - wanted).max() for n in (31, 61)]
    assert errors[1] < 5e-4
    assert np.log2(errors[0] / errors[1]) > 2.5


@pytest.mark.parametrize("dim", [2, 3])
def test_gentle_waves_across_three_dimensions_plan(dim):
    """Data that look rough along some lines only leave nothing to sample, or something: both work."""
    box = Box([0.0] * dim, [1.0] * dim, ["reflecting", "absorbing", "periodic"][:dim])
    problem = KolmogorovProblem(SDE([0.0] * dim, diffusion=1.0, dim=dim), lambda x: np.cos(x).prod(-1), 0.01, box)
    assert np.isfinite(solve(problem, grid=9, steps=20, scheme="central4", stepper="rk4").values).all()


@pytest.mark.parametrize("turn", [0.1, 0.7, 2.0])
@pytest.mark.parametrize("n", [40, 63])
def test_corners_of_breaks_keep_their_area(turn, n):
    """The smoothing keeps integrals: the sum over the nodes is the triangle's area, corners inside cells included."""
    corners = np.array([[0.9, 0.13], [-0.8, 0.71], [-0.31, -1.1]]) @ np.array(
        [[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]
    )

    def cross(u, v):
        return u[..., 0] * v[..., 1] - u[..., 1] * v[..., 0]

    def inside(x):
        sides = zip(corners, np.roll(corners, -1, axis=0), strict=True)
        return np.all([cross(b - a, x - a) > 0 for a, b in sides], axis=0) * 1.0

    box = Box([-3.0, -3.0], [3.0, 3.0])
    problem = KolmogorovProblem(SDE([0.0, 0.0], diffusion=1.0, dim=2), inside, 1.0, box)
    grid = Grid.of(box, n)
    values = plan_terminal(problem, grid, box, 6).apply(problem, grid.points)
    area = 0.5 * cross(corners[1] - corners[0], corners[2] - corners[0])
    assert abs(values.sum() * (6.0 / (n - 1)) ** 2 - area) < 2e-6


@pytest.mark.parametrize("dim", [1, 2])
def test_a_break_at_one_place_is_found_and_gets_a_node(dim):
    sde = SDE(lambda t, x: 0.0 * x, diffusion=lambda t, x: 0.4 * x, dim=dim)
    box = Box([0.0] * dim, [np.inf] * dim, [("natural", "open")] * dim)
    problem = KolmogorovProblem(sde, lambda x: np.maximum(x[..., 0] ** 2 - BREAK**2, 0.0) + 0.0 * x[..., -1], 1.0, box)
    probe = Grid.of(Box([0.0] * dim, [1.0] * dim), 41)
    assert abs(common_break(problem, probe, 0) - BREAK) < 1e-6
    nodes = plan(problem, at=np.full((1, dim), 0.14), rtol=1e-2).grid.axes[0].nodes
    assert np.abs(nodes - BREAK).min() < 1e-6


def test_a_slanted_break_has_no_one_place():
    problem = KolmogorovProblem(
        SDE([0.0, 0.0], diffusion=1.0, dim=2), lambda x: np.maximum(x[..., 0] - x[..., 1], 0.0), 1.0
    )
    assert common_break(problem, Grid.of(Box([-6.0, -6.0], [6.0, 6.0]), 41), 0) is None


@pytest.mark.parametrize("order", [4, 6])
@pytest.mark.parametrize("flipped", [False, True])
def test_smoothing_goes_on_oddly_beyond_faces_and_evenly_beyond_walls(flipped, order):
    """Lines stay lines up to an absorbing face, parabolas about a reflecting one stay what they are."""
    box = Box(0.0, 1.0, [("reflecting", "absorbing") if flipped else ("absorbing", "reflecting")])
    problem = KolmogorovProblem(SDE(0.0, 1.0, dim=1), jump, 0.1, box)
    rule = plan_terminal(problem, Grid.of(box, 31), box, order)
    assert rule.smoothed
    lattice, nodes = rule.lattice[0], np.linspace(0.0, 1.0, 31)
    face, wall = (nodes > 0.7, nodes < 0.3) if flipped else (nodes < 0.3, nodes > 0.7)
    at = 0.0 if flipped else 1.0
    assert np.allclose((rule.smoothing[0] @ (3.0 + lattice))[face], 3.0 + nodes[face], rtol=0, atol=1e-12)
    assert np.allclose((rule.smoothing[0] @ (lattice - at) ** 2)[wall], (nodes[wall] - at) ** 2, rtol=0, atol=1e-12)


@pytest.mark.parametrize("seed", range(2))
def test_a_slanted_kink_in_three_dimensions_by_tolerance(seed):
    """Sampled averages keep the order of the scheme: judged by order 2, levels never confirmed each other."""
    rng = np.random.default_rng([78, seed])
    w, c, at = rng.normal(size=3), 0.3 * rng.normal(), 0.3 * rng.normal(size=(1, 3))
    problem = KolmogorovProblem(SDE(0.0, 0.7, dim=3), lambda x: np.maximum(x @ w - c, 0.0), 0.8)
    mean, spread = float(at[0] @ w) - c, 0.7 * np.sqrt(0.8 * w @ w)
    exact = mean * norm.cdf(mean / spread) + spread * norm.pdf(mean / spread)
    sol = solve(problem, at=at, rtol=1e-3)
    assert sol.status == "converged"
    assert abs(float(sol(at)[0]) - exact) <= min(float(sol.error_estimate[0]), 1e-3 * exact)
