"""Jumps: processes with closed forms, at random; every method that takes them, and those that do not say so."""

import numpy as np
import pytest
import torch
from scipy.special import factorial

import kolmo
from kolmo import InputError, control


def levy(rng: np.random.Generator, dim: int, kinds: int = 2):
    """A process with constant coefficients, φ = cos(k·x), points and the values there, by Lévy and Khinchin."""
    drift, noise = rng.uniform(-1, 1, dim), rng.uniform(0.2, 0.6, dim)
    moves, rates = rng.uniform(-0.7, 0.7, (kinds, dim)), rng.uniform(0.3, 2.0, kinds)
    horizon, k, at = rng.uniform(0.3, 1.0), rng.uniform(-1.5, 1.5, dim), rng.uniform(-0.5, 0.5, (3, dim))
    sde = kolmo.SDE(drift, noise, jumps=list(zip(rates, moves, strict=True)))
    exponent = 1j * k @ drift - 0.5 * noise**2 @ k**2 + rates @ (np.exp(1j * moves @ k) - 1.0)
    exact = np.exp(1j * at @ k + horizon * exponent).real
    return kolmo.KolmogorovProblem(sde, lambda x: np.cos(x @ k), horizon), at, exact


def within(solution, at, exact, rtol, atol=1e-9) -> bool:
    error = np.abs(solution(at) - exact)
    allowed = atol + rtol * np.abs(exact).max()
    return (
        solution.status == "converged"
        and bool((error <= allowed).all())
        and bool((error <= solution.error_estimate + 1e-14).all())
    )


@pytest.mark.parametrize("seed", range(3))
def test_processes_with_constant_jumps(seed):
    problem, at, exact = levy(np.random.default_rng(seed), 1)
    for rtol in (1e-3, 1e-5):
        assert within(kolmo.solve(problem, at=at, rtol=rtol, atol=1e-9), at, exact, rtol)


@pytest.mark.slow
@pytest.mark.parametrize(("dim", "rtol"), [(2, 1e-4), (3, 1e-3)])
def test_in_more_dimensions(dim, rtol):
    problem, at, exact = levy(np.random.default_rng(5), dim)
    assert within(kolmo.solve(problem, at=at, rtol=rtol, atol=1e-9), at, exact, rtol)


@pytest.mark.parametrize("seed", range(2))
def test_proportional_jumps_of_a_call(seed):
    """Merton (1976) with finitely many sizes: a sum over the numbers of jumps of each."""
    from scipy.stats import norm

    rng = np.random.default_rng(seed)
    mu, sigma = rng.uniform(-0.1, 0.1), rng.uniform(0.2, 0.4)
    rates, sizes = rng.uniform(0.3, 2.0, 2), np.array([rng.uniform(-0.5, -0.1), rng.uniform(0.1, 0.5)])
    jumps = [(rate, lambda t, x, y=y: y * x) for rate, y in zip(rates, sizes, strict=True)]
    sde = kolmo.SDE(lambda t, x: mu * x, lambda t, x: sigma * x, jumps=jumps, dim=1)
    box = kolmo.Box(0.0, np.inf, boundary=[("natural", "open")])
    at, exact = np.array([0.8, 1.0, 1.3]), np.zeros(3)
    for n in range(30):
        for m in range(30):
            weight = np.prod(np.exp(-rates) * rates ** np.array([n, m]) / factorial([n, m]))
            forward = at * np.exp(mu) * (1 + sizes[0]) ** n * (1 + sizes[1]) ** m
            d1 = (np.log(forward) + 0.5 * sigma**2) / sigma
            exact += weight * (forward * norm.cdf(d1) - norm.cdf(d1 - sigma))
    call = kolmo.KolmogorovProblem(sde, lambda x: np.maximum(x[..., 0] - 1.0, 0.0), 1.0, box)
    assert within(kolmo.solve(call, at=at, rtol=1e-4, atol=1e-9), at, exact, 1e-4)
    mean = at * np.exp(mu + rates @ sizes)
    linear = kolmo.KolmogorovProblem(sde, lambda x: x[..., 0], 1.0, box)
    assert within(kolmo.solve(linear, at=at, rtol=1e-5, atol=1e-9), at, mean, 1e-5)


def test_rates_that_depend_on_time_alone_are_seen():
    """E X_T = x + ∫ λ(t) J dt, when nothing else in the problem depends on time."""
    sde = kolmo.SDE(0.0, 0.3, jumps=[(lambda t, x: 1.0 + np.sin(5 * t) + 0 * x[..., 0], 0.5)], dim=1)
    problem = kolmo.KolmogorovProblem(sde, lambda x: x[..., 0], 1.0)
    exact = 0.5 * (1.0 + (1.0 - np.cos(5.0)) / 5.0)
    solution = kolmo.solve(problem, at=[0.0], rtol=1e-6)
    assert abs(solution([0.0]) - exact) < 1e-6
    estimate = kolmo.monte_carlo(problem, [0.0], paths=4000, steps=32, rng=0)
    assert abs(estimate.mean - exact) < 4 * estimate.standard_error + estimate.bias_estimate


def test_state_dependent_rates():
    """Births at rate x, deaths at rate 1: the mean of a branching process, which jumps by one, is linear."""
    sde = kolmo.SDE(0.0, 0.2, jumps=[(lambda t, x: np.abs(x[..., 0] + 3.0), 0.1), (1.0, -0.1)], dim=1)
    problem = kolmo.KolmogorovProblem(sde, lambda x: x[..., 0], 1.0, kolmo.Box(-2.0, 6.0))
    at = np.array([1.0, 2.0])
    exact = -3.0 + (at + 3.0) * np.exp(0.1) - 0.1 * np.expm1(0.1) / 0.1
    assert np.abs(kolmo.solve(problem, at=at, rtol=1e-5)(at) - exact).max() < 1e-4
    estimate = kolmo.monte_carlo(problem, at, paths=4000, steps=32, rng=0)
    assert (np.abs(estimate.mean - exact) < 4 * estimate.standard_error + estimate.bias_estimate).all()


LAM, SIGMA = 1.7, 0.6


def leaving(**data) -> kolmo.KolmogorovProblem:
    """Brownian motion on (0, 1) that jumps out at the rate LAM."""
    sde = kolmo.SDE(0.0, SIGMA, jumps=[(LAM, 2.0)], dim=1)
    return kolmo.KolmogorovProblem(sde, data.pop("terminal", None), data.pop("horizon", None), **data)


def test_jumps_onto_absorbing_faces():
    """Mean exit time, with LAM as a killing rate: ½σ²u'' − λu + 1 = 0."""
    at, k = np.array([0.2, 0.5, 0.9]), np.sqrt(2 * LAM) / SIGMA
    exact = (1.0 - np.cosh(k * (at - 0.5)) / np.cosh(k / 2)) / LAM
    problem = leaving(box=kolmo.Box(0.0, 1.0, "absorbing"), source=1.0)
    assert np.abs(kolmo.solve(problem, at=at, rtol=1e-6)(at) - exact).max() < 1e-6
    estimate = kolmo.monte_carlo(problem, at, paths=2000, steps=100, rng=0)
    assert (np.abs(estimate.mean - exact) < 4 * estimate.standard_error + estimate.bias_estimate).all()
    coarse = kolmo.solve(problem, grid=9)
    found = kolmo.certify(problem, coarse, at, paths=300, steps=60, rng=0)
    assert np.abs(found.error - (exact - coarse(at))).max() < 1e-9


def test_the_value_of_a_face_is_paid_where_jumps_land():
    """Which face is left through first: the high one also by jumps."""
    at, k = np.array([0.2, 0.7]), np.sqrt(2 * LAM) / SIGMA
    exact = 1.0 - np.sinh(k * (1.0 - at)) / np.sinh(k)  # not through the low face
    faces = [(kolmo.Absorbing(0.0), kolmo.Absorbing(1.0))]
    problem = leaving(box=kolmo.Box(0.0, 1.0, faces))
    assert np.abs(kolmo.solve(problem, at=at, rtol=1e-6)(at) - exact).max() < 1e-6
    estimate = kolmo.monte_carlo(problem, at, paths=4000, steps=100, rng=0)
    assert (np.abs(estimate.mean - exact) < 4 * estimate.standard_error + estimate.bias_estimate).all()


def test_flux_through_a_face_counts_jumps():
    problem = leaving(box=kolmo.Box(0.0, 1.0, "absorbing"), terminal=lambda x: 1.0 + 0 * x[..., 0], horizon=1.0)
    recipe = kolmo.solve(problem, grid=101, steps=200).discretization
    start = lambda x: np.pi / 2 * np.sin(np.pi * x[..., 0])  # noqa: E731
    density = kolmo.solve_forward(problem, start, discretization=recipe)
    rate = LAM + 0.5 * SIGMA**2 * np.pi**2  # of an eigenfunction
    assert abs(float(density.mass[-1]) - np.exp(-rate)) < 1e-4
    noise = 0.5 * SIGMA**2 * np.pi**2 / 2  # through either face, a unit of mass
    late = np.array([0.5, 0.9])
    for face, through in (((0, 0), noise), ((0, 1), noise + LAM)):
        assert np.abs(density.exit_flux(face, late) / (through * np.exp(-rate * late)) - 1).max() < 1e-2


@pytest.mark.parametrize("stepper", ["radau5", "rk4", "exponential"])
def test_periods_and_steppers(stepper):
    at, box = np.array([0.2, 1.0, 6.0]), kolmo.Box(0.0, 2 * np.pi, "periodic")
    sde = kolmo.SDE(0.3, 0.4, jumps=[(2.0, 2.5), (1.0, lambda t, x: 0 * x - 4.0)], dim=1)
    problem = kolmo.KolmogorovProblem(sde, lambda x: np.cos(2 * x[..., 0]), 1.0, box)
    exponent = 0.6j - 0.32 + 2 * (np.exp(5j) - 1) + (np.exp(-8j) - 1)
    solution = kolmo.solve(problem, grid=64, steps=200, stepper=stepper)
    assert np.abs(solution(at) - np.exp(2j * at + exponent).real).max() < 1e-6


@pytest.mark.parametrize(("scheme", "order"), [("central2", 2), ("central4", 4), ("central6", 6)])
def test_interpolation_keeps_the_order_of_the_scheme(scheme, order):
    sde = kolmo.SDE(0.3, 0.4, jumps=[(1.0, 0.37), (0.7, -0.53)], dim=1)
    problem = kolmo.KolmogorovProblem(sde, lambda x: np.cos(2 * x[..., 0]), 1.0)
    exponent = 0.6j - 0.32 + np.exp(0.74j) - 1 + 0.7 * (np.exp(-1.06j) - 1)
    at, errors = np.array([-0.3, 0.1, 0.5]), []
    for n in (41, 81):
        grid = kolmo.Grid.of(kolmo.Box(-8.0, 8.0), n)
        solution = kolmo.solve(problem, grid=grid, steps=60, scheme=scheme)
        errors.append(np.abs(solution(at) - np.exp(2j * at + exponent).real).max())
    assert np.log2(errors[0] / errors[1]) > order - 0.7


def test_monotone_scheme_stays_monotone():
    problem, _, _ = levy(np.random.default_rng(2), 1)
    matrix = kolmo.discretize(problem, kolmo.Grid.of(kolmo.Box(-3.0, 3.0), 41), "monotone").matrix(0.0)
    off = matrix - np.diag(matrix.diagonal())
    assert off.min() >= 0.0
    assert np.abs(matrix.sum(1)).max() < 1e-9


@pytest.mark.parametrize("stepper", ["radau5", "rk4", "mcs3"])
def test_steps_transposed(stepper):
    """⟨p, S u⟩ = ⟨Sᵀ p, u⟩ in two dimensions, where splitting takes jumps with the explicit part."""
    problem, _, _ = levy(np.random.default_rng(3), 2)
    grid = kolmo.Grid.of(kolmo.Box([-2.0, -2.0], [2.0, 2.0]), (12, 13))
    march = kolmo.solve(problem, grid=grid, steps=40, stepper=stepper).discretization.march(problem)
    rng = np.random.default_rng(0)
    u, p = rng.standard_normal((2, grid.size, 1))
    there = march.backward(u).state - march.backward(0 * u).state
    assert abs((p * there).sum() - (march.forward(p) * u).sum()) < 1e-9 * np.abs(p * there).sum()


def test_splitting_agrees_with_explicit_steps():
    problem, at, _ = levy(np.random.default_rng(3), 2)
    grid = kolmo.Grid.of(kolmo.Box([-4.0, -4.0], [4.0, 4.0]), (24, 24))
    values = [kolmo.solve(problem, grid=grid, steps=60, stepper=s)(at) for s in ("rk4", "mcs3")]
    assert np.abs(values[0] - values[1]).max() < 1e-5


def test_gradients_with_respect_to_rates_and_displacements():
    J, rate, b = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.4, 1.3, 0.2))
    sde = kolmo.SDE(lambda t, x: b + 0 * x, 0.4, jumps=[(rate, lambda t, x: J + 0 * x)], dim=1, arrays="torch")
    problem = kolmo.KolmogorovProblem(sde, lambda x: torch.cos(1.3 * x[..., 0]), 0.8)
    x = torch.tensor([[0.3], [-0.2]], dtype=torch.float64)
    u = control.value(problem, x, rtol=1e-6, atol=1e-9)
    exponent = 1.3j * b - 0.08 * 1.69 + rate * (torch.exp(1.3j * J) - 1)
    exact = torch.exp(1.3j * x[:, 0] + 0.8 * exponent).real
    found, wanted = (torch.autograd.grad(v.sum(), [J, rate, b]) for v in (u, exact))
    for one, other in zip(found, wanted, strict=True):
        assert abs(float(one - other)) < 2e-5


def test_gradient_is_that_of_the_number_returned():
    J = torch.tensor([0.35, -0.2], dtype=torch.float64, requires_grad=True)
    start = torch.tensor([[0.1, 0.2]], dtype=torch.float64)

    def value(J: torch.Tensor) -> torch.Tensor:
        jumps = [(lambda t, x: 1.0 + J[0] * x[..., 0] ** 2, lambda t, x: J + 0.1 * x)]
        sde = kolmo.SDE(0.0, [0.4, 0.3], jumps=jumps, arrays="torch")
        problem = kolmo.KolmogorovProblem(sde, lambda x: torch.cos(x.sum(-1)), 0.5)
        return control.value(problem, start, discretization=recipe(problem)).sum()

    def recipe(problem):
        grid = kolmo.Grid.of(kolmo.Box([-3.0, -3.0], [3.0, 3.0]), (11, 12))
        return kolmo.solve(problem, grid=grid, steps=12, stepper="mcs3").discretization

    assert torch.autograd.gradcheck(value, (J,), atol=1e-7)


def test_density_moves_as_the_moments_say():
    jumps, b = [(1.5, 0.6), (0.5, -1.0)], 1.0
    sde = kolmo.SDE(lambda t, x: -b * x, 0.5, jumps=jumps, dim=1)
    problem = kolmo.KolmogorovProblem(sde, lambda x: x[..., 0], 1.0)
    density = kolmo.solve_forward(problem, [0.4], rtol=1e-4)
    x, w = density.grid.points[:, 0], density.grid.volumes
    p = density(x) * w
    mean = 0.4 * np.exp(-b) + (1 - np.exp(-b)) * sum(r * j for r, j in jumps)
    variance = (0.25 + sum(r * j**2 for r, j in jumps)) / 2 * (1 - np.exp(-2 * b))
    assert abs(p.sum() - 1) < 1e-4
    assert abs(p @ x - mean) < 1e-3
    assert abs(p @ (x - mean) ** 2 - variance) < 1e-3


def test_spectrum_of_a_jumping_ornstein_uhlenbeck_process():
    """Jumps that do not depend on the state leave its eigenvalues −n where they are."""
    sde = kolmo.SDE(lambda t, x: -x, 0.5, jumps=[(1.5, 0.6), (0.5, -1.0)], dim=1)
    found = kolmo.spectrum(kolmo.KolmogorovProblem(sde, None, None, kolmo.Box(-6.0, 6.0)), 3)
    assert np.abs(np.real(found.eigenvalues) - [0.0, -1.0, -2.0]).max() < 1e-3


def test_certificates_measure_errors_of_solutions_with_jumps():
    problem, at, exact = levy(np.random.default_rng(6), 1)
    coarse = kolmo.solve(problem, grid=kolmo.Grid.of(kolmo.Box(-5.0, 5.0), 24), steps=12)
    found = kolmo.certify(problem, coarse, at, paths=500, steps=40, rng=0)
    true = exact - coarse(at)
    assert np.abs(true).max() > 1e-6
    assert (np.abs(found.error - true) < 4 * found.uncertainty + 0.01 * np.abs(true)).all()


def test_paths_of_both_step_sizes_jump_together():
    problem, at, exact = levy(np.random.default_rng(4), 2)
    estimate = kolmo.monte_carlo(problem, at, paths=4000, steps=8, rng=0)
    assert (np.abs(estimate.mean - exact) < 4 * estimate.standard_error).all()
    assert np.max(estimate.bias_estimate) < 1e-12  # of constant coefficients there is none


@pytest.mark.parametrize("jumps", [[1.0], [(1.0,)], [(-1.0, 0.5)], [(lambda t, x: x[..., 0], 0.5)], [(1.0, np.inf)]])
def test_what_is_no_jump_is_refused(jumps):
    def solved() -> None:
        sde = kolmo.SDE(0.0, 0.3, jumps=jumps, dim=1)
        kolmo.solve(kolmo.KolmogorovProblem(sde, lambda x: x[..., 0], 1.0), at=[0.0])

    with pytest.raises(InputError, match="jump"):
        solved()


def test_methods_that_know_no_jumps_say_so():
    from kolmo import fipy
    from kolmo.interop import TorchSDE

    sde = kolmo.SDE(0.0, 0.3, jumps=[(1.0, 0.5)], dim=1)
    box = kolmo.Box(0.0, 1.0, "reflecting")
    problem = kolmo.KolmogorovProblem(sde, lambda x: x[..., 0], 1.0, box)
    with pytest.raises(InputError, match="jumps"):
        TorchSDE(sde)
    with pytest.raises(InputError, match="jumps"):
        fipy.solve(problem, steps=4)
    with pytest.raises(InputError, match="jumps"):
        control.schroedinger_bridge(sde, lambda x: 1.0 + 0 * x[..., 0], lambda x: 1.0 + 0 * x[..., 0], 1.0, box)
    with pytest.raises(InputError, match="jumps"):
        control.committor(sde, lambda x: x[..., 0] - 0.1, lambda x: 0.9 - x[..., 0], box)
    with pytest.raises(InputError, match="jumps"):
        kolmo.solve(problem, grid=21, steps=8, stepper="semi-lagrangian")
    with pytest.raises(InputError, match="jumps"):
        kolmo.KolmogorovProblem(sde, lambda x: x[..., 0], 1.0, kolmo.Box(0.0, 1.0, [("entrance", "open")]))


@pytest.mark.parametrize("scheme", ["central2", "central4", "central6"])
def test_jumps_of_a_cubic_are_exact_between_the_nodes(scheme):
    """Where a jump leads is read from four nodes at least, whatever the order of the scheme: cubics lose nothing."""
    rate, jump, noise = 1.7, 0.137, 0.3
    sde = kolmo.SDE(0.0, noise, jumps=[(rate, jump)], dim=1)
    problem = kolmo.KolmogorovProblem(sde, lambda x: x[..., 0] ** 3, 1.0, kolmo.Box(-2.0, 2.0))
    generator = kolmo.discretize(problem, kolmo.Grid.of(problem.box, 41), scheme)
    x = generator.grid.nodes[0]
    inside = np.abs(x) < 1.2
    found = generator.matrix(0.5) @ x**3
    exact = 3.0 * noise**2 * x + rate * ((x + jump) ** 3 - x**3)
    np.testing.assert_allclose(found[inside], exact[inside], atol=1e-10)


@pytest.mark.parametrize("scheme", ["central2", "central6", "monotone"])
@pytest.mark.parametrize("seed", range(4))
def test_explicit_steps_within_their_bound_let_nothing_grow(scheme, seed):
    """Every eigenvalue times the longest step lies where the Runge–Kutta step shrinks, however often paths jump."""
    from kolmo.steppers.base import STEPPERS

    rng = np.random.default_rng(seed)
    jumps = [(10.0 ** rng.uniform(0.0, 4.0), rng.uniform(-0.5, 0.5)) for _ in range(2)]
    sde = kolmo.SDE(rng.uniform(-1.0, 1.0), 0.2 * rng.random() + 1e-3, jumps=jumps, dim=1)
    word = ["reflecting", "absorbing", "periodic"][rng.integers(3)]
    problem = kolmo.KolmogorovProblem(sde, lambda x: x[..., 0], 1.0, kolmo.Box(-1.0, 1.0, word))
    generator = kolmo.discretize(problem, int(rng.integers(15, 40)), scheme)
    z = STEPPERS["rk4"].largest_step(*generator.stiffness()) * np.linalg.eigvals(generator.matrix(0.0).toarray())
    assert np.abs(1.0 + z + z**2 / 2.0 + z**3 / 6.0 + z**4 / 24.0).max() <= 1.0 + 1e-9
