"""Residuals are uniform where the model is right and not where it is wrong; models side by side; pictures."""

import math

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from scipy import stats

import kolmo
from kolmo import likelihood
from kolmo.errors import InputError


def decisions(rng, count, v=1.0, a=1.0):
    """Choices and times of Brownian motion with drift v between ±a, by small steps with bridges."""
    x, t, choice, dt = np.zeros(count), np.zeros(count), np.full(count, -1), 2e-3
    while (going := choice < 0).any():
        y = x + v * dt + math.sqrt(dt) * rng.standard_normal(count)
        t += dt * going
        for side, gap in ((1, (a - x) * (a - y)), (0, (a + x) * (a + y))):
            crossed = going & (choice < 0) & (rng.uniform(size=count) < np.exp(-2 * np.maximum(gap, 0.0) / dt))
            choice[crossed] = side
        x = y
    return t, choice


@pytest.fixture(scope="module")
def trials():
    rng = np.random.default_rng(3)
    t, choice = decisions(rng, 400)
    late = t > 1.6
    return likelihood.Trials(np.where(late, 1.6, t) + 0.2, np.where(late, np.nan, choice), {}, late)


def test_first_passages(trials):
    right = likelihood.FirstPassage(1.0, lower=-1.0, upper=1.0, delay=0.2).likelihood(trials)
    wrong = likelihood.FirstPassage(0.3, lower=-1.2, upper=1.2, delay=0.2).likelihood(trials)
    found = likelihood.residuals(right, rng=0)
    assert found.names == ("time", "choice")
    assert np.isnan(found.uniform[trials.censored, 1]).all()
    assert all(p > 0.01 for _, p in found.check().values()), found
    assert all(p < 1e-4 for _, p in likelihood.residuals(wrong, rng=0).check().values())
    again = likelihood.residuals(right, rng=0).uniform
    assert np.array_equal(found.uniform, again, equal_nan=True)


def test_a_single_bound_has_times_alone():
    rng = np.random.default_rng(0)
    t = stats.invgauss.rvs(1.0 / 1.5, scale=1.0, size=300, random_state=rng)  # distance 1, speed 1.5
    found = likelihood.residuals(likelihood.FirstPassage(1.5, upper=1.0).likelihood(likelihood.Trials(t, 1 + 0 * t)))
    assert np.abs(found.uniform[:, 0] - stats.invgauss.cdf(t, 1.0 / 1.5, scale=1.0)).max() < 1e-3


def test_steps_of_paths_in_two_dimensions_and_through_noise():
    rng, k, s = np.random.default_rng(1), 1.3, 0.7
    t = np.cumsum(rng.exponential(0.4, 300))
    x = np.zeros((300, 2))
    for i, h in enumerate(np.diff(t)):
        x[i + 1] = np.exp(-k * h) * x[i] + s * np.sqrt((1 - np.exp(-2 * k * h)) / (2 * k)) * rng.standard_normal(2)
    sde = kolmo.SDE(lambda t, x: -k * x, s, dim=2, arrays="torch")
    found = likelihood.residuals(likelihood.paths(sde, t, x))
    assert found.uniform.shape == (299, 2)
    assert all(p > 0.01 for _, p in found.check().values())
    seen = x + 0.3 * rng.standard_normal(x.shape)
    seen[5] = np.nan
    noisy = likelihood.noisy_paths(sde, t, seen, 0.3, initial=(np.zeros(2), 0.1 * np.eye(2)))
    u = likelihood.residuals(noisy).uniform
    assert np.isnan(u[5]).all()
    assert np.isfinite(np.delete(u, 5, 0)).all()
    assert all(p > 0.01 for _, p in likelihood.residuals(noisy).check().values())
    wrong = likelihood.noisy_paths(sde, t, seen, 0.8, initial=(np.zeros(2), 0.1 * np.eye(2)))
    assert all(p < 1e-3 for _, p in likelihood.residuals(wrong).check().values())


def test_modes_and_gauss_agree_in_one_dimension():
    rng = np.random.default_rng(2)
    t = np.cumsum(np.append(rng.exponential(0.02, 10), rng.exponential(1.0, 10)))
    x = np.cumsum(0.2 * rng.standard_normal(20))
    # an Ornstein–Uhlenbeck process as it is, and one whose drift bends where the path never is
    linear = kolmo.SDE(lambda t, x: -x, 0.7, dim=1, arrays="torch")
    bent = kolmo.SDE(lambda t, x: -x - 1e-9 * x**3, 0.7, dim=1, arrays="torch")
    pair = [likelihood.residuals(likelihood.paths(sde, t, x)).uniform for sde in (linear, bent)]
    assert np.abs(pair[0] - pair[1]).max() < 1e-5
    through = []
    for sde in (linear, bent):
        noisy = likelihood.noisy_paths(sde, t, x, 0.2, initial=(0.0, 0.1))
        noisy._linear = sde is linear
        through.append(likelihood.residuals(noisy).uniform)
    assert np.abs(through[0] - through[1]).max() < 1e-4


def test_comparison(trials):
    train, others = trials[:300], trials[300:]
    fits, outside = {}, {}
    for name, bounded in (("free", True), ("no drift", False)):
        v, a = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (0.5 if bounded else 0.0, 0.8))
        lower, upper = (lambda c, a=a: -a), (lambda c, a=a: a)
        model = likelihood.FirstPassage(lambda t, x, c, v=v: v, lower=lower, upper=upper, delay=0.2)
        bounds = [(-5, 5), (0.2, 4)]
        fits[name] = likelihood.fit(
            model.likelihood(train), [v, a] if bounded else [a], bounds=bounds if bounded else bounds[1:]
        )
        outside[name] = model.likelihood(others)
    found = likelihood.compare(fits, outside)
    assert found.best == "free"
    assert found.rows[0].difference == 0.0
    assert math.isclose(sum(row.weight for row in found.rows), 1.0)
    gap = 2 * (fits["free"].log_likelihood - fits["no drift"].log_likelihood) - 2
    assert math.isclose(found.rows[1].difference, gap)
    assert found.rows[0].held_out > found.rows[1].held_out + found.rows[1].held_out_error
    assert "held out" in str(found)
    with pytest.raises(InputError, match="held_out"):
        likelihood.compare(fits, {"free": outside["free"]})


def test_pictures(trials):
    found = likelihood.FirstPassage(1.0, lower=-1.0, upper=1.0, delay=0.2).likelihood(trials)
    axes = Figure().subplots(1, 2)
    ax = likelihood.plot_choices(found, ax=axes[0])
    assert ax is axes[0]
    lower, upper = (line.get_ydata() for line in ax.lines[:2])
    assert (lower <= 0).all()
    assert (upper >= 0).all()
    # bars and curve have the same area: the share of the choice among all trials
    share = np.mean(trials.choices == 1)
    x = ax.lines[1].get_xdata()
    assert abs(np.trapezoid(upper, x) - share) < 0.05
    assert likelihood.residuals(found, rng=0).plot(axes[1]) is axes[1]
    with pytest.raises(InputError, match="condition"):
        likelihood.plot_choices(found, {"dose": 1.0})


def test_other_likelihoods_are_refused():
    bins = likelihood.histogram(kolmo.SDE(0.0, 1.0, dim=1), [0.0], 1.0, [-1.0, 1.0], [3])
    with pytest.raises(InputError, match="likelihood"):
        likelihood.residuals(bins)
