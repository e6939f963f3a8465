"""Covariances and intervals of fitted parameters against closed forms; several starts."""

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from scipy.stats import chi2

import kolmo
from kolmo import control
from kolmo.errors import InputError, NotConvergedError


def tensor(value):
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


@pytest.fixture
def sample():
    return torch.as_tensor(np.random.default_rng(3).normal(1.3, 0.7, 40))


def test_mean_and_spread_of_a_normal_sample(sample):
    """At the maximum the information is diagonal: n/s² for the mean, 2n for the logarithm of s."""
    mean, log_s = tensor(0.5), tensor([0.0])
    fit = control.minimize(lambda: (0.5 * ((sample - mean) / log_s.exp()) ** 2 + log_s).sum(), [mean, log_s])
    found = control.uncertainty(fit)
    s, n = float(sample.std(correction=0)), len(sample)
    np.testing.assert_allclose(found.standard_errors, [s / np.sqrt(n), 1 / np.sqrt(2 * n)], rtol=1e-5)
    np.testing.assert_allclose(found.correlation, np.eye(2), atol=1e-5)
    np.testing.assert_allclose(
        found.intervals[0], float(sample.mean()) + np.array([-1, 1]) * 1.959964 * s / np.sqrt(n), rtol=1e-5
    )
    assert "parameters[1][0]" in str(found)
    # a mean over observations is a multiple of the likelihood
    fit = control.minimize(lambda: (0.5 * ((sample - mean) / log_s.exp()) ** 2 + log_s).mean(), [mean, log_s])
    np.testing.assert_allclose(control.uncertainty(fit, scale=1 / n).covariance, found.covariance, rtol=1e-4, atol=1e-9)


def test_profile_intervals_are_those_of_the_likelihood_ratio():
    """The rate of an exponential law from its mean: not symmetric about the estimate."""
    waits = torch.tensor([0.2, 1.1, 0.7, 0.4, 2.0, 0.6], dtype=torch.float64)
    rate, shift = tensor(1.0), tensor(0.1)
    objective = lambda: (rate * waits - rate.log()).sum() + 2.0 * (shift - 0.3 * rate) ** 2  # noqa: E731
    fit = control.minimize(objective, [rate, shift])
    found = control.uncertainty(fit, profile=True)
    n, mean = len(waits), float(waits.mean())

    def above(r):
        return 2 * n * (r * mean - np.log(r) - 1 - np.log(mean)) - chi2.ppf(0.95, 1)

    exact = brentq(above, 1e-3, 1 / mean), brentq(above, 1 / mean, 20.0)
    np.testing.assert_allclose(found.profile[0], exact, rtol=2e-3)
    assert found.profile[0, 1] - rate.item() > 1.2 * (rate.item() - found.profile[0, 0])
    assert rate.item() == pytest.approx(1 / mean, rel=1e-5)  # the parameters are where they were


def test_squares_against_linear_regression():
    rng = np.random.default_rng(5)
    X = torch.as_tensor(rng.normal(size=(30, 2)))
    y = X @ torch.tensor([1.0, -2.0], dtype=torch.float64) + 0.3 * torch.as_tensor(rng.normal(size=30))
    beta = tensor([0.0, 0.0])
    fit = control.minimize(lambda: (y - X @ beta).square().sum(), beta)
    found = control.uncertainty(fit, kind="squares", observations=30)
    residual = float((y - X @ beta.detach()).square().sum())
    exact = residual / 28 * np.linalg.inv((X.T @ X).numpy())
    np.testing.assert_allclose(found.covariance, exact, rtol=1e-6)


def test_the_speed_of_a_diffusion_is_known_to_the_noise_of_its_increments():
    """The drift m of dX = m dt + s dW from n increments: standard error s / sqrt(nΔ)."""
    speed = tensor(0.3)
    walk = kolmo.SDE(lambda t, x: speed + 0 * x, 0.8, dim=1, arrays="torch")
    problem = kolmo.KolmogorovProblem(walk, lambda x: x[..., 0], 0.5, kolmo.Box(-5.0, 5.0))
    recipe = control.law(problem, [0.0], grid=161, steps=10).discretization
    steps = torch.tensor([0.3, -0.4, 0.9, 0.1, -0.2])
    start = torch.zeros(5, dtype=torch.float64)
    loss = lambda: -control.transition_density(problem, start, steps, discretization=recipe).log().sum()  # noqa: E731
    found = control.uncertainty(control.minimize(loss, speed))
    assert found.standard_errors[0] == pytest.approx(0.8 / np.sqrt(5 * 0.5), rel=1e-3)


def test_components_at_a_bound_count_as_known():
    a, b = tensor(0.5), tensor(0.5)
    objective = lambda: (a - 2.0) ** 2 + 0.5 * (b - a) ** 2  # noqa: E731
    found = control.uncertainty(control.minimize(objective, [a, b], bounds=[(0.0, 1.0), None]))
    np.testing.assert_allclose(found.covariance, [[0.0, 0.0], [0.0, 1.0]], atol=1e-9)


def test_what_cannot_be_told():
    a, b = tensor(0.5), tensor(0.5)
    with pytest.raises(NotConvergedError, match="tell these parameters apart"):
        control.uncertainty(control.minimize(lambda: (a + b - 1.0) ** 2, [a, b]))
    with pytest.raises(InputError, match="observations"):
        control.uncertainty(control.minimize(lambda: (a - 1.0) ** 2, a), kind="squares", observations=1)
    with pytest.raises(InputError, match=r"control\.minimize"):
        control.uncertainty({})


def test_several_starts_find_the_lower_well():
    x = tensor(0.9)
    well = lambda: (x**2 - 1.0) ** 2 + 0.3 * x  # noqa: E731
    stuck = control.minimize(well, x)
    assert x.item() > 0
    fit = control.minimize(well, x, bounds=(-2.0, 2.0), starts=6, rng=1)
    assert x.item() < 0
    assert fit.fun == fit.minima.min() < stuck.fun
    assert len(fit.minima) == 6
    with pytest.raises(InputError, match="bounds"):
        control.minimize(well, x, starts=2)


@pytest.mark.parametrize("seed", range(3))
def test_a_profile_interval_ends_where_the_objective_does(seed):
    """Beyond an edge drawn at random on either side there is no objective, though it has not risen far enough."""
    rng = np.random.default_rng(seed)
    middle, spread, side = rng.normal(), rng.uniform(0.3, 2.0), [-1.0, 1.0][seed % 2]
    edge = middle + side * rng.uniform(0.4, 1.5) * spread
    mean, other = tensor(middle + 0.1 * side * spread), tensor(0.2)

    def objective():
        inside = side * (edge - mean.detach()) > 0
        return 0.5 * ((mean - middle) / spread) ** 2 + (other - mean) ** 2 + (0.0 if inside else np.nan)

    found = control.uncertainty(control.minimize(objective, [mean, other]), profile=True)
    ends = sorted([edge, middle - side * np.sqrt(chi2.ppf(0.95, 1)) * spread])
    np.testing.assert_allclose(found.profile[0], ends, atol=2e-3 * spread)


class _DifferentiableOnce(torch.autograd.Function):
    """x⁴, whose gradient is right and says nothing of where it came from."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**4

    @staticmethod
    def backward(ctx, g):
        return g * 4.0 * ctx.saved_tensors[0].detach() ** 3


@pytest.mark.parametrize("seed", range(3))
def test_second_derivatives_that_gradients_contradict_are_not_believed(seed):
    """Without the quartic part, which autograd differentiates to zero, the errors would be several times too large."""
    a, b = np.random.default_rng(seed).uniform(0.5, 3.0, 2)
    x = tensor([0.7, 0.4])

    def objective():
        return (a * _DifferentiableOnce.apply(x) - b * x**2).sum() + (x[0] - x[1]) ** 2

    found = control.uncertainty(control.minimize(objective, x))
    hessian = np.diag(12.0 * a * found.x**2 - 2.0 * b) + 2.0 * np.array([[1.0, -1.0], [-1.0, 1.0]])
    np.testing.assert_allclose(found.hessian, hessian, rtol=1e-4)
