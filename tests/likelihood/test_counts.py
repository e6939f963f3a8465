"""Counts of exits and survivors, histograms and moments: against closed forms, gradients, and what is refused."""

import math
from itertools import pairwise

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from numpy.polynomial import legendre
from scipy.stats import binom, multinomial, ncx2, norm

import kolmo
from kolmo import likelihood
from kolmo.errors import InputError, NotConvergedError
from kolmo.likelihood import law_likelihood
from kolmo.testing import taylor_test


def parameter(value):
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


def rate_out(t, x, v, side):
    """Rate at which Brownian motion with drift v from x leaves (−1, 1) at a side (images; Cox and Miller 1965, 5.7)."""
    t, k = np.asarray(t)[:, None], np.arange(-40, 41)
    away = (x + 1.0 if side == 0 else 1.0 - x) + 4.0 * k
    series = (away / np.sqrt(2 * np.pi * t**3) * np.exp(-(away**2) / (2 * t))).sum(1)
    d, along = (x + 1.0, -v) if side == 0 else (1.0 - x, v)
    return series * np.exp(along * d - 0.5 * v * v * t[:, 0])


def leaves(begin, end, x, v, side):
    """Probability of leaving at a side between two times."""
    z, w = legendre.leggauss(200)
    t = max(begin, 1e-9) + (end - begin) * 0.5 * (z + 1.0)
    return 0.5 * (end - begin) * (w @ rate_out(t, x, v, side))


def check(found, exact):
    error = abs(found().item() - exact)
    assert error <= found.error_estimate <= found.tol, (error, found)
    assert found.status == "converged"


def brownian(v=0.0, dim=1):
    return kolmo.SDE(lambda t, x: v + 0.0 * x, 1.0, dim=dim, arrays="torch")


@pytest.mark.parametrize("seed", range(4))
def test_exits_by_face_are_those_of_images(seed):
    rng = np.random.default_rng(seed)
    v, x, edges = rng.uniform(-2, 2), rng.uniform(-0.7, 0.7), np.append(0.0, np.cumsum(rng.uniform(0.1, 0.8, 3)))
    chance = np.array([[leaves(a, b, x, v, s) for a, b in pairwise(edges)] for s in (0, 1)])
    chance = np.append(chance, 1.0 - chance.sum())
    n = rng.multinomial(400, chance)
    counts = {"low": n[:3], "high": n[3:6]}
    found = likelihood.exit_counts(brownian(v), [x], edges, counts, n[6], box=kolmo.Box(-1.0, 1.0, "absorbing"))
    check(found, multinomial.logpmf(n, 400, chance))
    assert found.count == 400
    assert len(found.terms()) == 7


def test_a_cohort_that_is_entered_late_is_conditional():
    chance = np.array([sum(leaves(a, b, 0.2, 0.5, s) for s in (0, 1)) for a, b in ((0.0, 0.3), (0.3, 0.9))])
    box = kolmo.Box(-1.0, 1.0, "absorbing")
    found = likelihood.exit_counts(brownian(0.5), [0.2], [0.3, 0.9], [30], 50, box=box)
    check(found, binom.logpmf(30, 80, chance[1] / (1.0 - chance[0])))


@pytest.mark.parametrize("groups", [False, True])
def test_survival_in_a_square_is_a_product(groups):
    x, t = np.array([0.3, -0.4]), np.array([0.2, 0.6])
    alive = np.array([np.prod([1.0 - leaves(0, s, y, 0, 0) - leaves(0, s, y, 0, 1) for y in x]) for s in t])
    box, total = kolmo.Box([-1.0, -1.0], [1.0, 1.0], "absorbing"), np.array([200, 200]) if groups else 200
    found = likelihood.survival_counts(brownian(dim=2), x, t, [110, 40], total, box=box, tol=0.01)
    if groups:
        check(found, binom.logpmf([110, 40], 200, alive).sum())
    else:
        check(found, multinomial.logpmf([90, 70, 40], 200, [1 - alive[0], alive[0] - alive[1], alive[1]]))


def test_a_barrier_that_moves_lets_out_as_bachelier_levy_says():
    # Brownian motion below 1 + t/2: P(τ ≤ t) (Bachelier 1900; Lévy 1948)
    t = np.array([0.4, 1.5])
    gone = norm.sf((1 + 0.5 * t) / np.sqrt(t)) + math.exp(-1.0) * norm.cdf((0.5 * t - 1) / np.sqrt(t))
    box = kolmo.Box(-np.inf, lambda t: 1.0 + 0.5 * t, [("open", "absorbing")])
    found = likelihood.survival_counts(brownian(), [0.0], t, [180, 130], 200, box=box)
    check(found, multinomial.logpmf([20, 50, 130], 200, [gone[0], gone[1] - gone[0], 1 - gone[1]]))


@pytest.mark.parametrize(("dim", "seed"), [(1, 0), (1, 1), (2, 2), pytest.param(3, 3, marks=pytest.mark.slow)])
def test_bins_of_a_gaussian(dim, seed):
    rng = np.random.default_rng(seed)
    k, s, x, t = rng.uniform(0.3, 2), rng.uniform(0.4, 1.2), rng.normal(size=dim), np.array([0.4, 1.0])
    edges = [np.array([-np.inf, -0.3, 0.4, np.inf])] * dim
    exact, counts = 0.0, []
    for now in t:
        spread, chance = s * np.sqrt((1 - np.exp(-2 * k * now)) / (2 * k)), np.ones(())
        for i in range(dim):
            chance = np.multiply.outer(chance, np.diff(norm.cdf(edges[i], x[i] * np.exp(-k * now), spread)))
        counts.append(rng.multinomial(100, chance.ravel()).reshape(chance.shape))
        exact += multinomial.logpmf(counts[-1].ravel(), 100, chance.ravel())
    sde = kolmo.SDE(lambda t, x: -k * x, s, dim=dim, arrays="torch")
    given = edges[0] if dim == 1 else edges
    check(likelihood.histogram(sde, x, t, given, counts, tol={1: 1e-3, 2: 0.01, 3: 0.5}[dim]), exact)


def test_bins_of_a_square_root_process():
    k, m, s, x, t = 1.5, 0.8, 0.6, 0.5, 0.7
    c = 2 * k / (s * s * (1 - math.exp(-k * t)))
    edges = np.array([0.2, 0.6, 1.0, 1.8])
    chance = np.diff(ncx2.cdf(2 * c * edges, 4 * k * m / s**2, 2 * c * x * math.exp(-k * t)))
    sde = kolmo.SDE(lambda t, y: k * (m - y), lambda t, y: s * torch.sqrt(y.clamp(min=0.0)), dim=1, arrays="torch")
    found = likelihood.histogram(
        sde, [x], t, edges, [40, 70, 50], rest=20, box=kolmo.Box(0.0, np.inf, [("natural", "open")])
    )
    check(found, multinomial.logpmf([40, 70, 50, 20], 180, [*chance, 1 - chance.sum()]))


def test_bins_without_the_rest_are_conditional():
    edges, sd = np.array([-0.5, 0.1, 0.8]), 1.0
    chance = np.diff(norm.cdf(edges, 0.0, sd))
    found = likelihood.histogram(brownian(), [0.0], 1.0, edges, [30, 20])
    check(found, multinomial.logpmf([30, 20], 50, chance / chance.sum()))


def test_moments_of_survivors_and_of_a_density():
    # from a Gaussian density, second moments of Brownian motion with drift
    start = lambda x: torch.exp(-(x[..., 0] ** 2) / 0.08) / math.sqrt(0.08 * math.pi)  # noqa: E731
    both = lambda x: torch.cat([x, x**2], -1)  # noqa: E731
    values, errors = np.array([[0.1, 0.5], [0.9, 2.0]]), np.array([0.05, 0.2])
    found = likelihood.moments(brownian(0.7), start, [0.5, 1.0], values, errors, both)
    mean = np.array([[0.35, 0.54 + 0.35**2], [0.7, 1.04 + 0.49]])
    check(found, norm.logpdf(values, mean, errors).sum())
    # of those that never touched ±1, in the long run: the first eigenfunction, E x² = 1 − 8/π²
    box = kolmo.Box(-1.0, 1.0, "absorbing")
    kept = likelihood.moments(brownian(), [0.0], 6.0, [0.2], [0.01], lambda x: x[..., 0] ** 2, box=box)
    check(kept, norm.logpdf(0.2, 1 - 8 / math.pi**2, 0.01))


def test_gradients_are_those_of_the_number_returned():
    v, a, start = parameter(0.4), parameter(1.1), parameter([0.1])
    sde = kolmo.SDE(lambda t, x: v * (1.0 + 0.3 * x), 1.0, dim=1, arrays="torch")
    box = kolmo.Box(lambda t: -1.0 - 0.0 * a, lambda t: a - 0.2 * t, "absorbing")
    counts = {"low": [12, 15], "high": [20, 40]}
    found = likelihood.exit_counts(sde, start, [0.0, 0.4, 1.0], counts, 30, box=box, tol=1.0)
    bins = likelihood.histogram(sde, start, 0.5, [-0.5, 0.0, 0.5], [10, 15], rest=40, box=box, tol=1.0)
    found.resolution, bins.resolution = 32.0, 32.0  # of whatever number is returned
    taylor_test(lambda: found() + bins(), [v, a, start])


def test_fit_finds_the_drift():
    rng, v = np.random.default_rng(5), parameter(0.0)
    edges = np.array([0.0, 0.5, 1.5])
    chance = np.array([[leaves(a, b, 0, 0.8, s) for a, b in pairwise(edges)] for s in (0, 1)])
    n = rng.multinomial(2000, np.append(chance, 1 - chance.sum()))
    box = kolmo.Box(-1.0, 1.0, "absorbing")
    found = likelihood.exit_counts(brownian(v), [0.0], edges, {"low": n[:2], "high": n[2:4]}, n[4], box=box, tol=0.1)
    fit = likelihood.fit(found, v, bounds=[(-5, 5)])
    error = fit.uncertainty().standard_errors[0]
    assert fit.success
    assert 0.01 < error < 0.05
    assert abs(v.item() - 0.8) < 4 * error


BOX = kolmo.Box(-1.0, 1.0, "absorbing")


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda s: likelihood.exit_counts(s, [0.0], [0.0, 1.0], [[3]], 1, box=BOX), "counts"),
        (lambda s: likelihood.exit_counts(s, [0.0], [0.0, 1.0], [-3], 1, box=BOX), "counts"),
        (lambda s: likelihood.exit_counts(s, [0.0], [1.0, 0.5], [3], 1, box=BOX), "edges"),
        (lambda s: likelihood.exit_counts(s, [0.0], [0.0, 1.0], {"low": [3]}, 1, box=BOX)(), "counts"),
        (lambda s: likelihood.exit_counts(s, [0.0], [0.0, 1.0], [3], 1, box=kolmo.Box(-1.0, 1.0))(), "box"),
        (lambda s: likelihood.survival_counts(s, [0.0], [0.5, 1.0], [3, 4], 9, box=BOX), "alive"),
        (lambda s: likelihood.survival_counts(s, [0.0], [0.5], [3], [2], box=BOX), "alive"),
        (lambda s: likelihood.histogram(s, [0.0], 1.0, [0.0, 1.0], [3, 4]), "counts"),
        (lambda s: likelihood.histogram(s, [0.0], 1.0, [1.0, 0.0], [3]), "edges"),
        (lambda s: likelihood.moments(s, [0.0], 1.0, [0.0], [0.0]), "standard_errors"),
        (lambda s: likelihood.moments(s, [0.0], 1.0, [0.0, 1.0], [1.0, 1.0])(), "function"),
        (lambda s: likelihood.moments(s, [0.0], -1.0, [0.0], [1.0]), "times"),
    ],
)
def test_what_is_refused(call, argument):
    with pytest.raises(InputError) as refused:
        call(brownian())
    assert refused.value.argument == argument


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("converges", [True, False])
def test_the_slowest_mode_may_turn(seed, converges, monkeypatch):
    rng = np.random.default_rng(seed)
    modes = -np.diag(np.r_[2.0, 2.0, rng.uniform(20.0, 60.0, 18)])
    modes[0, 1], modes[1, 0] = rng.uniform(-9.0, 9.0) * np.array([1.0, -1.0])
    turned = np.linalg.qr(rng.standard_normal((20, 20)))[0]
    if not converges:

        def fails(*_):
            raise NotConvergedError("not this time")

        monkeypatch.setattr(law_likelihood, "near_zero", fails)
    found = law_likelihood._slowest(sp.csr_matrix(turned @ modes @ turned.T), rng.uniform(0.5, 2.0))
    assert found == pytest.approx(2.0, rel=1e-6)
