"""Races against accumulators that know nothing of each other: densities are products of those of one dimension."""

import numpy as np
import pytest
import torch
from scipy.stats import norm

from kolmo.errors import InputError, ToleranceWarning
from kolmo.likelihood import FirstPassage, Race, Trials

TOL = 0.05


def wiener(t, distance, drift):
    """Density and survival of the first passage of a Wiener process to one bound (inverse Gaussian law)."""
    root, over = np.sqrt(t), np.exp(2 * drift * distance)
    density = distance / np.sqrt(2 * np.pi * t**3) * np.exp(-((distance - drift * t) ** 2) / (2 * t))
    return density, norm.cdf((distance - drift * t) / root) - over * norm.cdf((-distance - drift * t) / root)


def test_independent_accumulators_without_floors():
    rng = np.random.default_rng(3)
    speeds, bounds = rng.uniform(0.5, 2.0, 2), rng.uniform(0.8, 1.4, 2)
    speed = torch.tensor(speeds, requires_grad=True)
    upper = torch.tensor(bounds, requires_grad=True)
    delay = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    t, choices = rng.uniform(0.4, 2.0, 24), rng.integers(0, 2, 24).astype(float)
    choices[::6] = np.nan  # the time alone
    censored = np.arange(24) % 7 == 0
    race = Race(lambda t, x, c: speed + 0.0 * x, upper=[lambda c: upper[0], lambda c: upper[1]], delay=lambda c: delay)
    found = race.likelihood(Trials(t, choices, censored=censored), tol=TOL)
    (f0, s0), (f1, s1) = (wiener(t - 0.2, b, v) for b, v in zip(bounds, speeds, strict=True))
    both = [f0 * s1, f1 * s0]
    seen = np.where(np.isnan(choices), both[0] + both[1], np.where(choices == 0, *both))
    exact = np.log(np.where(censored, s0 * s1, seen)).sum()
    assert abs(found().item() - exact) <= found.error_estimate <= TOL
    parameters = (speed, upper, delay)
    gradient = torch.autograd.grad(found(), parameters)
    ways = [torch.as_tensor(rng.standard_normal(p.shape)) for p in parameters]
    slope = sum(float((g * w).sum()) for g, w in zip(gradient, ways, strict=True))
    first = found().item()
    rests = []
    for h in (4e-3, 2e-3):
        for p, w in zip(parameters, ways, strict=True):
            p.data += h * w
        rests.append(found().item() - first - h * slope)
        for p, w in zip(parameters, ways, strict=True):
            p.data -= h * w
    assert 3.5 < rests[0] / rests[1] < 4.5


def test_three_accumulators():
    rng = np.random.default_rng(3)
    speeds, bounds = rng.uniform(0.5, 2.0, 3), rng.uniform(0.8, 1.4, 3)
    t, choices = rng.uniform(0.2, 1.5, 20), rng.integers(0, 3, 20)
    speed = torch.tensor(speeds, requires_grad=True)
    found = Race(lambda t, x, c: speed + 0.0 * x, upper=list(bounds)).likelihood(Trials(t, choices), tol=0.3)

    def exact(v):
        of = [wiener(t, b, u) for b, u in zip(bounds, v, strict=True)]
        ways = [np.prod([of[j][j != k] for j in range(3)], 0) for k in range(3)]
        return np.log(np.choose(choices, ways)).sum()

    assert abs(found().item() - exact(speeds)) <= found.error_estimate <= 0.3
    slopes = [(exact(speeds + 1e-5 * e) - exact(speeds - 1e-5 * e)) / 2e-5 for e in np.eye(3)]
    np.testing.assert_allclose(torch.autograd.grad(found(), speed)[0], slopes, atol=0.1)


def test_floors_reflect():
    # a Brownian motion that is reflected at zero is |B|: one that leaves (-1, 1)
    t, choices = np.array([0.2, 0.5, 0.9, 1.4, 0.7]), np.array([0.0, 1.0, 1.0, 0.0, np.nan])
    found = Race(0.0, [1.0, 0.8], upper=[1.0, 1.0], lower=0.0).likelihood(Trials(t, choices), tol=TOL)
    f, s = [], []
    for noise in (1.0, 0.8):
        alone = FirstPassage(0.0, noise, lower=-1.0, upper=1.0)
        nobody = np.full(5, np.nan)
        f.append(alone.likelihood(Trials(t, nobody)).terms().exp().numpy())
        s.append(alone.likelihood(Trials(t, nobody, censored=np.full(5, True))).terms().exp().numpy())
    both = [f[0] * s[1], f[1] * s[0]]
    exact = np.log(np.where(np.isnan(choices), both[0] + both[1], np.where(choices == 0, *both))).sum()
    assert abs(found().item() - exact) <= found.error_estimate <= TOL


def test_a_choice_without_a_time():
    found = Race([1.0, 1.0], upper=[1.0, 1.0], lower=0.0).likelihood(Trials([np.nan, 0.5], [0, 1]), tol=TOL)
    assert found.terms()[0].exp().item() == pytest.approx(0.5, abs=0.01)


def test_what_is_refused():
    with pytest.raises(InputError, match="upper"):
        Race(0.0, upper=[1.0])
    with pytest.raises(InputError, match="upper"):
        Race(0.0, upper=[1.0, 1.0, 1.0, 1.0])
    with pytest.raises(InputError, match="moves"):
        Race(0.0, upper=[lambda t, c: 1.0 - t, 1.0])
    with pytest.raises(InputError, match="start"):
        Race(0.0, upper=[1.0, 1.0], start=2.0).likelihood(Trials([1.0], [0]))()
    with pytest.raises(InputError, match="choice"):
        Race(0.0, upper=[1.0, 1.0]).likelihood(Trials([1.0], [2]))


@pytest.mark.parametrize("soon", [3, 8])
def test_what_finer_levels_share_is_not_looked_for_on_them(soon):
    # times of responses far too soon for the delay: what the formula of early passages may be off does not shrink
    race = Race(lambda t, x, c: 2.0 - x.flip(-1), upper=[1.2, 1.2], lower=0.0, delay=0.37)
    found = race.likelihood(Trials([0.42] * soon + [0.8], [0] * soon + [1]), tol=0.01)
    with pytest.warns(ToleranceWarning, match="share"):
        found()
    assert found.status == "tolerance_not_met"
    assert found.error_estimate > 0.01
    assert found.resolution < 100
