"""From likelihoods to answers: estimates that are known in closed form, intervals, criteria, resolutions renewed."""

import numpy as np
import pytest
import torch

import kolmo
from kolmo import likelihood


def parameter(value):
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


def test_an_inverse_gaussian_fit_is_the_known_one(rng):
    """Tweedie 1957: the mean is the sample mean, 1/λ the mean of 1/t − 1/mean."""
    t = rng.wald(0.8, 1.5, 80)
    v, a = parameter(0.7), parameter(0.9)
    found = likelihood.FirstPassage(lambda t, x, c: v, upper=lambda c: a).likelihood(likelihood.Trials(t, 0 * t + 1))
    fit = likelihood.fit(found, [v, a], bounds=[(0.01, 5), (0.1, 5)])
    mean, rate = t.mean(), 1.0 / (1.0 / t - 1.0 / t.mean()).mean()
    assert fit.success
    assert np.allclose(fit.x, [np.sqrt(rate) / mean, np.sqrt(rate)], rtol=1e-4)
    assert fit.aic == pytest.approx(4.0 - 2.0 * fit.log_likelihood)
    assert fit.bic == pytest.approx(2.0 * np.log(80) - 2.0 * fit.log_likelihood)


def test_intervals_of_a_rate(rng):
    t, v = rng.wald(1.0, 1.0, 60), parameter(0.5)
    found = likelihood.FirstPassage(lambda t, x, c: v, upper=1.0).likelihood(likelihood.Trials(t, 0 * t + 1), tol=1e-5)
    fit = likelihood.fit(found, v)
    known = fit.uncertainty(profile=True)
    # ℓ is a parabola in v: −½ Σ (1 − v t)² / t
    error = t.sum() ** -0.5
    assert np.allclose(known.standard_errors, error, rtol=1e-3)
    assert np.allclose(known.profile, len(t) / t.sum() + 1.959964 * error * np.array([[-1, 1]]), rtol=2e-3)


def test_a_resolution_that_will_not_do_is_renewed(rng):
    t, v = rng.wald(1.0, 1.0, 60), parameter(0.5)
    found = likelihood.FirstPassage(lambda t, x, c: v, lower=-2.0, upper=1.0)
    found = found.likelihood(likelihood.Trials(t, 0 * t + 1))
    found()
    found.resolution = 8.0
    assert not found.holds()
    fit = likelihood.fit(found, v)
    assert found.holds()
    assert found.resolution > 8.0
    assert fit.error_estimate <= found.tol


def test_only_likelihoods_are_fitted():
    with pytest.raises(kolmo.InputError, match="likelihood"):
        likelihood.fit(lambda: torch.zeros(()), parameter(1.0))


def test_errors_are_found_beside_a_bound_of_the_domain():
    # no guesses in the data: their probability ends at zero, or so close to it that a difference would be beyond
    rng = np.random.default_rng(2)
    times = rng.wald(1.0 / 1.2, 1.0, 300)
    v, lapse = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (0.8, 0.01))
    model = likelihood.FirstPassage(lambda t, x, c: v, upper=1.0, lapse=lambda c: lapse)
    fit = likelihood.fit(
        model.likelihood(likelihood.Trials(times, np.ones(300))), [v, lapse], bounds=[(0, 5), (0, 0.5)]
    )
    for place in (0.0, 1e-7):
        fit.result.x[1] = place
        errors = fit.uncertainty().standard_errors
        assert 0.9 < errors[0] * np.sqrt(times.sum()) < 2.0  # exactly one where the lapses are known
