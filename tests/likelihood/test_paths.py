"""Sampled paths: against exact transition densities, gradients, ends of the state space, and what is refused."""

import math

import numpy as np
import pytest
import torch
from scipy.special import ive
from scipy.stats import lognorm, norm

import kolmo
from kolmo import likelihood
from kolmo.likelihood.local import log_densities
from kolmo.testing import taylor_test

POSITIVE = kolmo.Box(0.0, np.inf, [("natural", "open")])


def parameter(value):
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


def spacings(rng, shortest, longest, count=30):
    return np.exp(rng.uniform(math.log(shortest), math.log(longest), count))


def times_of(h):
    return np.append(0.0, np.cumsum(h))


def ornstein(rng):
    """A random Ornstein–Uhlenbeck path, from 1e-4 to 3 relaxation times apart."""
    k, mean, s = np.exp(rng.normal()), rng.normal(), np.exp(0.5 * rng.normal())
    h = spacings(rng, 1e-4, 3.0) / k
    decay, spread = np.exp(-k * h), s * np.sqrt(-np.expm1(-2 * k * h) / 2 / k)
    x = [mean + s]
    for a, b in zip(decay, spread, strict=True):
        x.append(mean + (x[-1] - mean) * a + b * rng.normal())
    x = np.array(x)
    sde = kolmo.SDE(lambda t, x: k * (mean - x), s, dim=1)
    return likelihood.paths(sde, times_of(h), x), norm.logpdf(x[1:], mean + (x[:-1] - mean) * decay, spread).sum()


def geometric(rng):
    """A random geometric Brownian path."""
    m, s = 0.2 * rng.normal(), np.exp(0.4 * rng.normal() - 1)
    h = spacings(rng, 1e-4, 1.0)
    steps = (m - 0.5 * s * s) * h + s * np.sqrt(h) * rng.normal(size=len(h))
    x = np.exp(times_of(steps))
    sde = kolmo.SDE(lambda t, x: m * x, lambda t, x: s * x, dim=1)
    exact = lognorm.logpdf(x[1:], s * np.sqrt(h), scale=x[:-1] * np.exp((m - 0.5 * s * s) * h)).sum()
    return likelihood.paths(sde, times_of(h), x, box=POSITIVE), exact


def square_root(rng):
    """A random square-root path (Cox, Ingersoll and Ross 1985, equation 18)."""
    k, mean, df = np.exp(0.5 * rng.normal()), np.exp(0.5 * rng.normal()), rng.uniform(5.0, 12.0)
    s = math.sqrt(4 * k * mean / df)
    h, x, exact = spacings(rng, 1e-3, 2.0) / k, [mean], 0.0
    for dt in h:
        c = s * s * -math.expm1(-k * dt) / (4 * k)
        nc, nu = x[-1] * math.exp(-k * dt) / c, df / 2 - 1
        x.append(c * rng.noncentral_chisquare(df, nc))
        u = x[-1] / c
        exact -= math.log(2 * c) + 0.5 * (math.sqrt(u) - math.sqrt(nc)) ** 2
        exact += 0.5 * nu * math.log(u / nc) + math.log(ive(nu, math.sqrt(u * nc)))
    sde = kolmo.SDE(lambda t, x: k * (mean - x), lambda t, x: s * torch.sqrt(x), dim=1, arrays="torch")
    return likelihood.paths(sde, times_of(h), np.array(x), box=POSITIVE), exact


def check(make, seeds, *, linear=True):
    for seed in seeds:
        found, exact = make(np.random.default_rng(seed))
        if not linear:
            found._linear = lambda: False
        error = abs(found().item() - exact)
        assert error <= found.error_estimate <= found.tol, (seed, error, found)


def test_linear_processes_are_exact():
    check(ornstein, range(5))


@pytest.mark.parametrize("make", [ornstein, geometric, square_root])
def test_random_paths_are_within_their_estimates(make):
    check(make, range(2), linear=False)


@pytest.mark.slow
@pytest.mark.parametrize("make", [ornstein, geometric, square_root])
def test_many_random_paths_are_within_their_estimates(make):
    check(make, range(100, 120), linear=False)


def wells():
    """A path between two wells, with noise that depends on the state, observed at random times."""
    rng = np.random.default_rng(3)
    p = [parameter(v) for v in (1.0, 0.8, 0.6)]
    sde = kolmo.SDE(
        lambda t, x: p[0] * (p[1] * x - x**3), lambda t, x: p[2] * torch.sqrt(1 + 0.2 * x**2), dim=1, arrays="torch"
    )
    h = spacings(rng, 1e-2, 1.0, 25)
    x = [0.5]
    for dt in h:
        y = x[-1]
        for _ in range(20):
            y += (0.8 * y - y**3) * dt / 20 + 0.6 * math.sqrt((1 + 0.2 * y * y) * dt / 20) * rng.normal()
        x.append(y)
    return likelihood.paths(sde, times_of(h), x), p


def test_gradients_in_one_dimension():
    found, parameters = wells()
    assert np.abs(taylor_test(found, parameters, step=1e-3).column("order")[1:] - 2.0).max() < 0.05
    assert found.status == "converged"
    assert 0 < int((found._degrees > 0).sum()) < found.count  # both ways were taken


def rotating(noise):
    """A damped rotation with a cubic force, noise by a matrix, and its parameters."""
    p = [parameter(v) for v in (1.0, noise)]

    def drift(t, x):
        return torch.stack([x[..., 1] - 0.3 * p[0] * x[..., 0] ** 3, -x[..., 0] - 0.5 * x[..., 1]], -1)

    def sigma(t, x):
        one = torch.ones_like(x[..., 0])
        return torch.stack([torch.stack([p[1] * one, 0 * one], -1), torch.stack([0.2 * one, 0.4 * one], -1)], -2)

    rng = np.random.default_rng(5)
    h, x = rng.uniform(0.005, 0.08, 20), [np.array([1.0, 0.0])]
    for dt in h:
        w = math.sqrt(dt) * rng.normal(size=2)
        y = x[-1]
        x.append(
            y + dt * np.array([y[1] - 0.3 * y[0] ** 3, -y[0] - 0.5 * y[1]]) + [noise * w[0], 0.2 * w[0] + 0.4 * w[1]]
        )
    return kolmo.SDE(drift, sigma, dim=2, arrays="torch"), times_of(h), np.array(x), p


@pytest.mark.slow
def test_two_dimensions_against_a_grid():
    sde, times, states, p = rotating(0.5)
    found = likelihood.paths(sde, times, states)
    assert np.abs(taylor_test(found, p, step=1e-3).column("order")[1:] - 2.0).max() < 0.05
    assert found.status == "converged"
    h = 0.3
    one = likelihood.paths(sde, [0.0, h], [[0.4, 0.2], [0.5, -0.1]], tol=1e-3)
    box = kolmo.Box([-1.6, -1.6], [2.4, 1.8])
    problem = kolmo.KolmogorovProblem(sde, lambda x: 0 * x[..., 0], h, box)
    law = kolmo.solve_forward(problem, [[0.4, 0.2]], at=[[0.5, -0.1]], rtol=1e-3)
    assert abs(one().item() - math.log(law([[0.5, -0.1]])[0])) < 3e-3


def test_linear_pairs_have_exact_gradients():
    A, s = parameter([[-1.0, 0.3], [0.1, -2.0]]), parameter(0.7)
    sde = kolmo.SDE(
        lambda t, x: x @ A.T, lambda t, x: s * torch.eye(2).double().expand(*x.shape, 2), dim=2, arrays="torch"
    )
    times, states = [0.0, 0.1, 0.7, 30.0], [[1.0, 0.0], [0.8, 0.3], [0.1, -0.4], [0.2, 0.1]]
    found = likelihood.paths(sde, times, states)
    assert np.abs(taylor_test(found, [A, s], step=1e-3).column("order")[1:] - 2.0).max() < 0.05
    last = likelihood.paths(sde, times[-2:], states[-2:])
    # by then it is stationary: AC + CAᵀ + s² = 0
    C = torch.as_tensor(
        np.linalg.solve(np.kron(A.detach(), np.eye(2)) + np.kron(np.eye(2), A.detach()), -0.49 * np.eye(2).ravel())
    )
    law = torch.distributions.MultivariateNormal(torch.zeros(2).double(), C.reshape(2, 2))
    assert abs((last() - law.log_prob(torch.tensor([0.2, 0.1], dtype=torch.float64))).item()) < 1e-9


def test_ends_of_the_state_space_are_seen():
    sde = kolmo.SDE(0.0, 1.0, dim=1)
    x, y, h = 0.1, 0.3, 0.2
    for word, sign in (("reflecting", 1), ("absorbing", -1)):
        found = likelihood.paths(sde, [0.0, h], [x, y], box=kolmo.Box(0.0, np.inf, [(word, "open")]))
        exact = math.log(norm.pdf(y - x, scale=math.sqrt(h)) + sign * norm.pdf(y + x, scale=math.sqrt(h)))
        assert abs(found().item() - exact) <= found.error_estimate <= 1e-3


def test_several_paths_add_up():
    sde = kolmo.SDE(lambda t, x: -(x**3), 0.7, dim=1)
    whole = likelihood.paths(sde, [[0.0, 0.2], [0.0, 0.1, 0.3]], [[0.1, 0.3], [0.5, 0.4, 0.1]], tol=1e-6)
    parts = [([0.0, 0.2], [0.1, 0.3]), ([0.0, 0.1, 0.3], [0.5, 0.4, 0.1])]
    assert abs(whole().item() - sum(likelihood.paths(sde, *part, tol=1e-6)().item() for part in parts)) < 2e-6


def test_the_expansion_says_where_it_ends():
    ou = kolmo.SDE(lambda t, x: -x, 1.0, dim=1, arrays="torch")
    at, h = torch.zeros(1, 1).double(), torch.tensor([0.05]).double()
    exact = norm.logpdf(0.5, scale=math.sqrt(-math.expm1(-0.1) / 2))
    errors = [abs(log_densities(ou, at, at + 0.5, h, degree).item() - exact) for degree in (2, 4, 6, 8)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-7


@pytest.mark.parametrize(
    ("named", "make"),
    [
        ("times", lambda sde: likelihood.paths(sde, [0.0, 0.0], [1.0, 2.0])),
        ("times", lambda sde: likelihood.paths(sde, [0.0], [1.0])),
        ("states", lambda sde: likelihood.paths(sde, [0.0, 1.0], [1.0, np.nan])),
        ("states", lambda sde: likelihood.paths(sde, [0.0, 1.0], [1.0, -2.0], box=POSITIVE)),
        ("drift", lambda sde: likelihood.paths(kolmo.SDE(lambda t, x: t - x, 1.0, dim=1), [0.0, 1.0], [1.0, 2.0])),
        ("sde", lambda sde: likelihood.paths(kolmo.SDE(lambda t, x: -x), [0.0, 1.0], [1.0, 2.0])),
        ("box", lambda sde: likelihood.paths(sde, [0.0, 1.0], [1.0, 2.0], box=kolmo.Box(0.0, 3.0, "periodic"))),
    ],
)
def test_what_is_refused(named, make):
    with pytest.raises(kolmo.InputError, match=named):
        make(kolmo.SDE(lambda t, x: -(x**3), 1.0, dim=1))


def test_degrees_that_agree_by_accident_are_not_believed():
    # of 400 transitions of middling length the expansion is fooled in some, unless more than two degrees are asked
    rng, sde = np.random.default_rng(0), kolmo.SDE(lambda t, x: x - x**3, 0.6, dim=1, arrays="torch")
    x = [1.0]
    for _ in range(400):
        y = x[-1]
        for z in rng.standard_normal(40):
            y += (y - y**3) * 0.005 + 0.6 * np.sqrt(0.005) * z
        x.append(y)
    t = 0.2 * np.arange(401)
    sharp = float(likelihood.paths(sde, t, x, tol=1e-7)())
    for tol in (1e-1, 1e-2, 1e-3, 1e-4):
        found = likelihood.paths(sde, t, x, tol=tol)
        assert abs(float(found()) - sharp) <= found.error_estimate <= tol


def pair(seed, longest=0.1, count=10):
    """Two processes with noise that depends on the state and nothing in common; alone, and together; parameters."""
    rng = np.random.default_rng(seed)
    p = [parameter(v) for v in np.exp(rng.normal(0.0, 0.3, 2)) * [1.0, 0.5]]

    def drift(t, x):
        return p[0] * (x - x**3)

    def noise(t, x):
        return p[1] * torch.sqrt(1.0 + 0.3 * x**2)

    h, x = spacings(rng, 1e-3, longest, count), [np.array([1.0, -0.5])]
    for dt in h:
        y = torch.as_tensor(x[-1])
        for z in torch.as_tensor(rng.normal(size=(10, 2))):
            y = y + (drift(0, y) * dt / 10 + noise(0, y) * math.sqrt(dt / 10) * z).detach()
        x.append(y.numpy())
    both = kolmo.SDE(drift, lambda t, x: torch.diag_embed(noise(t, x)), dim=2, arrays="torch")
    return kolmo.SDE(drift, noise, dim=1, arrays="torch"), both, times_of(h), np.array(x), p


@pytest.mark.parametrize("seed", range(2))
def test_two_dimensions_err_no_more_than_they_say(seed):
    alone, both, times, x, _ = pair(seed)
    exact = sum(likelihood.paths(alone, times, x[:, i], tol=1e-6)().item() for i in range(2))
    found = likelihood.paths(both, times, x, tol=1e-2)
    assert abs(found().item() - exact) <= found.error_estimate <= 1e-2
    assert len(torch.unique(found._degrees)) > 1


def test_what_does_not_converge_is_not_said_to():
    # with spacings of half a relaxation time the largest degree is not enough, and says so
    alone, both, times, x, _ = pair(1, longest=0.5)
    exact = sum(likelihood.paths(alone, times, x[:, i], tol=1e-6)().item() for i in range(2))
    found = likelihood.paths(both, times, x)
    with pytest.warns(kolmo.ToleranceWarning):
        value = found().item()
    assert abs(value - exact) <= found.error_estimate
    assert found.status == "tolerance_not_met"


def test_second_derivatives_in_two_dimensions():
    _, both, times, x, p = pair(2, longest=0.05, count=4)
    found, step = likelihood.paths(both, times, x, tol=1e-2), 1e-4
    exact = [v.item() for v in kolmo.control.hessian_product(found, p, [torch.tensor(1.0), torch.tensor(0.0)])]
    slopes = []
    for sign in (1.0, -1.0):
        with torch.no_grad():
            p[0] += sign * step
        slopes.append(torch.stack(torch.autograd.grad(found(), p)))
        with torch.no_grad():
            p[0] -= sign * step
    assert np.allclose(exact, (slopes[0] - slopes[1]) / (2 * step), rtol=1e-5)


@pytest.mark.parametrize("degree", [6, 8, 10])
def test_what_has_a_value_has_a_gradient(degree):
    """A line search goes anywhere: transitions of double wells over times in which the expansion hardly settles."""
    rng = np.random.default_rng(degree)
    kappa, sigma = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.8, 0.9))
    wells = kolmo.SDE(lambda t, x: kappa * (x - x**3), lambda t, x: sigma + 0 * x, dim=1, arrays="torch")
    x, y = (torch.as_tensor(rng.uniform(-1.5, 1.5, (400, 1))) for _ in range(2))
    h = torch.as_tensor(np.exp(rng.uniform(np.log(0.02), np.log(1.0), 400)))
    logs = log_densities(wells, x, y, h, degree)
    known = ~torch.isnan(logs.detach())
    assert 0 < known.sum() < len(known)
    logs = log_densities(wells, x[known], y[known], h[known], degree)
    assert all(torch.isfinite(g) for g in torch.autograd.grad(logs.sum(), [kappa, sigma]))
