"""Eigenvalues of the generator against closed forms."""

import numpy as np
import pytest

from kolmo import SDE, Box, InputError, KolmogorovProblem, Robin
from kolmo.spectrum import spectrum


def problem_of(sde, box=None, **options):
    return KolmogorovProblem(sde, lambda x: x[..., 0], 2.0, box, **options)


def test_ornstein_uhlenbeck():
    """λ_k = −kθ with Hermite polynomials."""
    theta, sigma = 1.3, 0.8
    sde = SDE(lambda t, x: -theta * x, diffusion=sigma, dim=1)
    found = spectrum(problem_of(sde, Box(-4.0, 4.0)), 5)
    assert np.allclose(found.eigenvalues, -theta * np.arange(5), atol=1e-4)
    x = np.linspace(-1.0, 1.0, 9)
    second = x**2 - sigma**2 / (2 * theta)
    ratio = found(x)[:, 2] / second
    assert np.allclose(ratio, ratio[0], rtol=1e-4)


def test_ornstein_uhlenbeck_on_the_line():
    sde = SDE(lambda t, x: -1.3 * x, diffusion=0.8, dim=1)
    assert np.allclose(spectrum(problem_of(sde), 3, at=[0.0]).eigenvalues, -1.3 * np.arange(3), atol=1e-4)


@pytest.mark.parametrize(
    ("word", "modes"), [("absorbing", [1, 2, 3]), ("reflecting", [0, 1, 2]), ("periodic", [0, 2, 2])]
)
def test_brownian_motion_between_walls(word, modes):
    found = spectrum(problem_of(SDE(0.0, diffusion=0.9, dim=1), Box(0.0, 1.7, word)), 3)
    assert np.allclose(found.eigenvalues, -0.5 * (0.9 * np.pi * np.array(modes) / 1.7) ** 2, atol=1e-6)
    assert (found.residuals < 1e-10).all()
    assert (np.abs(found.error_estimate) < 1e-6).all()


def test_elastic_walls():
    """ψ = cos(ωx) with ω tan(ω) = 2κ on [−1, 1], by bisection."""
    kappa = 0.7
    low, high = 1e-9, np.pi / 2 - 1e-9
    for _ in range(80):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if middle * np.tan(middle) < 2 * kappa else (low, middle)
    found = spectrum(problem_of(SDE(0.0, diffusion=1.0, dim=1), Box(-1.0, 1.0, Robin(kappa))), 1)
    assert np.allclose(found.eigenvalues, -0.5 * low**2, atol=1e-7)


def test_rotation_in_two_dimensions_with_killing():
    """A rotating linear process has the eigenvalues −(θ ± iω) of its drift; killing shifts all of them."""
    A = np.array([[-1.0, 2.0], [-2.0, -1.0]])
    sde = SDE(lambda t, x: x @ A.T, diffusion=0.7, dim=2)
    found = spectrum(problem_of(sde, Box([-2.6] * 2, [2.6] * 2), killing=0.25), 3, grid=(41, 41), scheme="central6")
    assert np.allclose(found.eigenvalues, [-0.25, -1.25 + 2j, -1.25 - 2j], atol=2e-3)


def test_kramers_gap_of_the_double_well():
    """The gap is the transition rate twice over: compared with the exact exit time of the well."""
    from kolmo import solve

    sigma = 0.36
    sde = SDE(lambda t, x: x - x**3, diffusion=sigma, dim=1)
    gap = -spectrum(problem_of(sde, Box(-2.2, 2.2, "reflecting")), 2, grid=201).eigenvalues[1]
    exit_ = KolmogorovProblem(sde, None, None, Box(-2.2, 0.0, [("reflecting", "absorbing")]), source=1.0)
    time = solve(exit_, grid=201)(-1.0)
    assert abs(gap * time - 1.0) < 0.02


def test_bad_input():
    sde = SDE(lambda t, x: -x * t, diffusion=1.0, dim=1)
    for call, argument in [
        (lambda: spectrum(problem_of(sde, Box(-1.0, 1.0))), "problem"),
        (lambda: spectrum(problem_of(SDE(0.0, diffusion=1.0, dim=1))), "at"),
        (lambda: spectrum(problem_of(SDE(0.0, diffusion=1.0, dim=1), Box(0.0, 1.0)), 0), "k"),
        (lambda: spectrum(problem_of(SDE(0.0, diffusion=1.0, dim=1), Box(0.0, 1.0)), 99, grid=21), "k"),
    ]:
        with pytest.raises(InputError) as caught:
            call()
        assert caught.value.argument == argument


@pytest.mark.parametrize("seed", range(5))
def test_the_estimate_counts_the_cut(seed):
    """−nθ of an Ornstein–Uhlenbeck process, up to n = 8, in units between 1e-9 and 1e9: within the estimate."""
    rng = np.random.default_rng(seed)
    length, clock = 10.0 ** rng.uniform(-9.0, 9.0, 2)
    theta, k = rng.uniform(0.5, 2.0), int(rng.integers(5, 10))
    centre = rng.uniform(-2.0, 2.0)
    ou = SDE(lambda t, x: theta * (centre - x / length) * length / clock, covariance=length**2 / clock, dim=1)
    problem = KolmogorovProblem(ou, lambda x: x[..., 0], clock)
    modes = spectrum(problem, k, at=[centre * length])
    error = np.abs(modes.eigenvalues * clock + theta * np.arange(k))
    assert (error <= modes.error_estimate * clock + 1e-10).all()
    assert (modes.error_estimate * clock < 1e-2 * theta * k).all()


@pytest.mark.parametrize("seed", range(2))
def test_the_estimate_counts_the_cut_where_the_process_rotates(seed):
    rng = np.random.default_rng(10 + seed)
    a, w = rng.uniform(0.5, 1.5, 2)
    A = np.array([[-a, w], [-w, -a]])
    problem = KolmogorovProblem(SDE(lambda t, x: x @ A.T, diffusion=1.0, dim=2), lambda x: x[..., 0], 1.0)
    modes = spectrum(problem, 6, at=[[0.0, 0.0]])
    exact = np.array([0.0, -a + 1j * w, -a - 1j * w, -2 * a + 2j * w, -2 * a, -2 * a - 2j * w])
    error = np.abs(modes.eigenvalues[:, None] - exact).min(1)
    assert (error <= modes.error_estimate + 1e-10).all()
    assert modes.error_estimate.max() < 1e-3


def test_lengths_of_any_size():
    for length in (1e-9, 1e-3, 1e9):
        bm = SDE(0.0, diffusion=length, dim=1)
        problem = KolmogorovProblem(bm, lambda x: x[..., 0], 1.0, Box(0.0, length, "reflecting"))
        assert np.allclose(spectrum(problem, 4).eigenvalues, -0.5 * np.pi**2 * np.arange(4) ** 2, atol=1e-6)


def test_with_no_room_to_widen_the_cut_is_measured_all_the_same():
    ou = SDE(lambda t, x: -x, diffusion=1.0, dim=1)
    problem = KolmogorovProblem(ou, lambda x: x[..., 0], 1.0, Box(-3.0, 3.0))
    modes = spectrum(problem, 5, max_cells=200)
    assert modes.grid.size <= 200
    assert (np.abs(modes.eigenvalues + np.arange(5)) <= modes.error_estimate).all()
