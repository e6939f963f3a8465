"""First passages: against closed forms and another solver, gradients, what is missing, and what is refused."""

import math

import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from scipy.stats import invgauss

import kolmo
from kolmo import control, likelihood
from kolmo.testing import taylor_test


def parameter(value):
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


def wiener(t, v, a, w):
    """Log density of Brownian motion with drift v from w·a that leaves (0, a) at 0 (Feller 1968, XIV.6)."""
    t, k, j = np.asarray(t)[:, None], np.arange(-40, 41), np.arange(1, 200)
    u = t / a**2
    early = logsumexp(-((w + 2 * k) ** 2) / 2 / u, b=(w + 2 * k) + 0 * u, axis=1) - 0.5 * np.log(
        2 * np.pi * u[:, 0] ** 3
    )
    late = np.log(np.pi) + logsumexp(-(j**2) * np.pi**2 * u / 2, b=j * np.sin(j * np.pi * w) + 0 * u, axis=1)
    return np.where(u[:, 0] < 0.5, early, late) - 2 * np.log(a) - v * a * w - v * v * t[:, 0] / 2


def drawn(rng):
    """A random drift–diffusion model, trials from far before to far after its mean, and the exact log-likelihood."""
    v, a, w, s = rng.uniform(-4, 4), rng.uniform(0.5, 3), rng.uniform(0.06, 0.94), rng.uniform(0.3, 2)
    low, delay = rng.normal(), rng.uniform(0.1, 0.4)
    s_times = (a / s) ** 2 * np.exp(rng.uniform(math.log(0.004), math.log(2), 40))
    choices = rng.integers(0, 2, 40)
    model = likelihood.FirstPassage(v, s, lower=low, upper=low + a, start=low + w * a, delay=delay)
    exact = np.where(choices == 0, wiener(s_times, v / s, a / s, w), wiener(s_times, -v / s, a / s, 1 - w)).sum()
    return model.likelihood(likelihood.Trials(s_times + delay, choices)), exact


def check_random_models(seeds):
    for seed in seeds:
        found, exact = drawn(np.random.default_rng(seed))
        error = abs(found().item() - exact)
        assert error <= found.error_estimate <= found.tol, (seed, error, found)


def test_random_models_are_within_their_estimates():
    check_random_models(range(25))


@pytest.mark.slow
def test_many_random_models_are_within_their_estimates():
    check_random_models(range(1000, 1200))


def test_one_bound_is_inverse_gaussian(rng):
    for _ in range(5):
        v, a, s = rng.uniform(0.2, 3), rng.uniform(0.3, 2), rng.uniform(0.5, 1.5)
        t = invgauss.rvs(s * s / (v * a), scale=a * a / s / s, size=50, random_state=rng)
        found = likelihood.FirstPassage(-v, s, lower=-a).likelihood(likelihood.Trials(t, 0 * t))
        error = abs(found().item() - invgauss.logpdf(t, s * s / (v * a), scale=a * a / s / s).sum())
        assert error <= found.error_estimate <= found.tol


def test_a_leaky_process_is_what_another_solver_finds():
    sde = kolmo.SDE(lambda t, x: 0.8 - 1.5 * x, lambda t, x: 1.0 + 0.2 * x, dim=1)
    box, rate = kolmo.Box(-1.0, 1.2, "absorbing"), lambda t, x: 0.3 + x[..., 0] ** 2
    problem = kolmo.KolmogorovProblem(sde, lambda x: 0 * x[..., 0], 1.5, box, killing=rate)
    t = np.array([0.1, 0.3, 0.8, 1.5])
    law = kolmo.solve_forward(problem, [0.2], flux_times=t, rtol=1e-5)
    found = likelihood.FirstPassage(
        lambda t, x, c: 0.8 - 1.5 * x,
        lambda t, x, c: 1.0 + 0.2 * x,
        lower=-1.0,
        upper=1.2,
        start=0.2,
        killing=lambda t, x, c: rate(t, x),
    )
    for choice, side in ((0, "low"), (1, "high")):
        exact = law.first_passage(t, side)
        assert np.abs(found.density(t, choice).numpy() - exact).max() < 2e-5 * exact.max()
    censored = likelihood.Trials(t[-1:], [1], censored=[True])
    assert abs(found.likelihood(censored, tol=1e-7)().exp().item() - law.mass[-1]) < 1e-5


@pytest.mark.filterwarnings("error::kolmo.ToleranceWarning")
def test_what_is_not_known_is_summed_over():
    model = likelihood.FirstPassage(0.7, lower=-1.0, upper=0.8, start=0.1)
    t, w = np.polynomial.legendre.leggauss(200)
    t, w = 10.0 * (t + 1), 10.0 * w
    up, down = ((model.density(t, choice, tol=1e-6).numpy() * w).sum() for choice in (1, 0))

    def chance(times, choices, censored=False):
        trials = likelihood.Trials([times], [choices], censored=[censored])
        return float(
            likelihood.FirstPassage(0.7, lower=-1.0, upper=0.8, start=0.1, span=20.0).likelihood(trials)().exp()
        )

    assert abs(chance(np.nan, 1) - up) < 1e-6
    # the scale function: Karlin and Taylor 1981, section 15.3
    assert abs(up - (math.exp(-1.4 * 0.1) - math.exp(1.4)) / (math.exp(-1.4 * 0.8) - math.exp(1.4))) < 1e-6
    assert abs(up + down - 1.0) < 1e-6
    assert abs(chance(0.5, np.nan) - sum(float(model.density([0.5], k)) for k in (0, 1))) < 1e-6
    assert chance(np.nan, np.nan) == 1.0


def test_a_censored_trial_is_the_rest_of_the_density():
    model = likelihood.FirstPassage(0.7, lower=-1.0, upper=0.8, start=0.1, delay=0.2)
    z, w = np.polynomial.legendre.leggauss(100)
    t = 1.0 + 12.0 * (z + 1)
    rest = sum((model.density(t, k, tol=1e-6).numpy() * 12.0 * w).sum() for k in (0, 1))
    found = model.likelihood(likelihood.Trials([1.0], [0], censored=[True]), tol=1e-6)
    assert abs(float(found().exp()) - rest) < 1e-6


def full_model():
    names = {"v": 1.2, "a": 1.1, "z": 0.1, "delay": 0.25, "leak": 0.6, "noise": 0.8, "lapse": 0.03, "width": 0.15}
    p = {name: parameter(value) for name, value in names.items()}
    model = likelihood.FirstPassage(
        lambda t, x, c: p["v"] * c["dose"] - p["leak"] * x,
        lambda t, x, c: p["noise"] * (1 + 0.1 * x**2),
        lower=lambda c: -p["a"],
        upper=lambda c: p["a"] * (1 + 0.1 * c["dose"]),
        start=lambda c: likelihood.Between(p["z"] - p["width"], p["z"] + p["width"]),
        delay=lambda c: likelihood.Between(p["delay"] - 0.5 * p["width"], p["delay"] + 0.5 * p["width"]),
        lapse=p["lapse"],
    )
    rng, n = np.random.default_rng(0), 60
    times, choices, censored = 0.35 + rng.gamma(2, 0.3, n), rng.integers(0, 2, n).astype(float), np.arange(n) % 11 == 10
    choices[:3], times[3:6] = np.nan, np.nan
    times[6:9] = [0.33, 0.34, 0.5]  # next to the delay
    return model, likelihood.Trials(times, choices, {"dose": rng.choice([0.1, 0.5, 1.0], n)}, censored), [*p.values()]


def test_gradients_in_all_parameters():
    model, trials, parameters = full_model()
    found = model.likelihood(trials)
    for seed in range(2):
        table = taylor_test(found, parameters, step=2e-3, seed=seed)
        assert np.abs(table.column("order")[1:] - 2.0).max() < 0.05
    assert found.status == "converged"


def test_second_derivatives():
    model, trials, parameters = full_model()
    found = model.likelihood(trials)
    found()
    direction = [torch.ones_like(p) for p in parameters]
    product = control.hessian_product(lambda: found(), parameters, direction)

    def gradient(step):
        with torch.no_grad():
            for p in parameters:
                p += step
        return torch.stack(torch.autograd.grad(found(), parameters))

    difference = (gradient(1e-4) - gradient(-2e-4)) / 2e-4
    assert torch.allclose(torch.stack(product), difference, rtol=1e-3, atol=1e-2)


def test_numpy_sees_the_same():
    model, trials, parameters = full_model()
    found = model.likelihood(trials)
    function, x = likelihood.as_numpy(found, parameters)
    value, gradient = function(x)
    assert value == found().item()
    assert np.allclose(gradient, torch.stack(torch.autograd.grad(found(), parameters)).numpy())


def test_impossible_times_are_finite_and_lapses_explain_them():
    trials = likelihood.Trials([0.1, 0.9], [1, 1])
    hopeless = likelihood.FirstPassage(1.0, lower=-1.0, upper=1.0, delay=0.3).likelihood(trials)
    assert -1e7 < float(hopeless()) < -1e4
    guessed = likelihood.FirstPassage(1.0, lower=-1.0, upper=1.0, delay=0.3, lapse=0.1, span=1.0).likelihood(trials)
    assert abs(float(guessed.terms()[0]) - math.log(0.1 / 2)) < 1e-9


def test_derivative_where_there_are_no_lapses():
    rate = parameter(0.0)
    found = likelihood.FirstPassage(1.0, lower=-1.0, upper=1.0, lapse=rate, span=2.0).likelihood(
        likelihood.Trials([0.7], [1])
    )
    slope = torch.autograd.grad(found(), rate)[0]
    q = likelihood.FirstPassage(1.0, lower=-1.0, upper=1.0).density([0.7])
    assert torch.isclose(slope, 0.25 / q[0] - 1.0, rtol=1e-6)


ONE = likelihood.Trials([1.0], [0])


def model(drift=1.0, noise=1.0, lower=-1.0, upper=1.0, **more):
    return likelihood.FirstPassage(drift, noise, lower=lower, upper=upper, **more)


@pytest.mark.parametrize(
    ("named", "make"),
    [
        ("lower, upper", lambda: model(lower=None, upper=None)),
        ("trials", lambda: model(lower=None).likelihood(ONE)),
        ("trials", lambda: model(upper=None).likelihood(likelihood.Trials([np.nan, 1.0], [0, 0]))),
        ("start", lambda: model(lower=0.0).likelihood(ONE)()),
        ("lower, upper", lambda: model(lower=2.0).likelihood(ONE)()),
        ("diffusion", lambda: model(noise=0.0).likelihood(ONE)()),
        ("lapse", lambda: model(lapse=1.5).likelihood(ONE)()),
        ("tol", lambda: model().likelihood(ONE, tol=0.0)),
        ("choices", lambda: likelihood.Trials([1.0], [0.5])),
        ("times", lambda: likelihood.Trials([-1.0], [0])),
        ("dose", lambda: likelihood.Trials([1.0], [0], {"dose": [1, 2]})),
        ("frame", lambda: likelihood.Trials.of({"rt": [1.0]}, "rt", "choice")),
    ],
)
def test_what_is_refused(named, make):
    with pytest.raises(kolmo.InputError, match=named):
        make()


def test_trials_can_be_chosen():
    trials = likelihood.Trials([1.0, 2.0, 3.0], [0, 1, 0], {"dose": [1, 2, 2]})
    some = trials[trials.covariates["dose"] == 2]
    assert len(some) == 2
    assert some.conditions == [{"dose": 2.0}]
