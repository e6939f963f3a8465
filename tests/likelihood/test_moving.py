"""First passages in time that moves things: against integral equations, gradients, breaks, and bounds that meet."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

import kolmo
from kolmo import control, likelihood
from kolmo.testing import taylor_test


def parameter(value):
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


def integral_equations(bounds, rates, y0, times):
    """Densities of first passage of W through two smooth bounds at increasing times that begin just after 0, by the
    trapezoidal rule (Buonocore, Giorno, Nobile and Ricciardi 1990). bounds, rates: (2, n)."""
    n = len(times)
    h = np.gradient(np.append(0.0, times))[1:]
    g = np.zeros((2, n))

    def psi(side, k, y, s):
        gap, distance = times[k] - s, bounds[side, k] - y
        return 0.5 * np.exp(-(distance**2) / (2 * gap)) / np.sqrt(2 * np.pi * gap) * (rates[side, k] - distance / gap)

    for k in range(n):
        for side, sign in ((0, -1.0), (1, 1.0)):
            total = -2.0 * psi(side, k, y0, 0.0)
            for other in (0, 1):
                total += 2.0 * (h[:k] * g[other, :k]) @ psi(side, k, bounds[other, :k], times[:k])
            g[side, k] = sign * total
    return g


class GaussMarkov:
    """dX = (v − kX + w sin(ωt)) dt + s dW between bounds that move, by a change of time to noise alone."""

    def __init__(self, rng):
        self.v, self.k, self.s = rng.uniform(-2, 2), rng.uniform(-0.8, 2.0), rng.uniform(0.6, 1.6)
        self.w, self.omega = rng.uniform(-1, 1) * (rng.random() < 0.4), rng.uniform(1, 5)
        self.a, self.b, self.tau = rng.uniform(0.6, 1.6), rng.uniform(0.6, 1.6), rng.uniform(0.4, 3.0)
        self.kind = rng.choice(["exponential", "hyperbolic", "weibull", "wave", "linear"])
        self.x0 = rng.uniform(-0.75 * self.a, 0.75 * self.b)

    def shape(self, t):
        """Part of the first distance at which the bounds are, for floats, arrays and tensors."""
        xp = torch if isinstance(t, torch.Tensor) else np
        if self.kind == "exponential":
            return 0.25 + 0.75 * xp.exp(-t / self.tau)
        if self.kind == "hyperbolic":
            return 1.0 / (1.0 + t / self.tau)
        if self.kind == "weibull":
            return 1.0 - 0.8 * (1.0 - xp.exp(-((t / self.tau) ** 3)))
        if self.kind == "wave":
            return 1.0 + 0.3 * xp.sin(3.0 * t / self.tau)
        return 1.0 - 0.12 * t / self.tau

    @property
    def model(self):
        def drift(t, x, c):
            return self.v - self.k * x + self.w * torch.sin(self.omega * t)

        return likelihood.FirstPassage(
            drift,
            self.s,
            lower=lambda t, c: -self.a * self.shape(t),
            upper=lambda t, c: self.b * self.shape(t),
            start=self.x0,
        )

    def densities(self, last, n=150):
        """Times up to the last one, and the densities there at both bounds, extrapolated: of the steps
        the root of the time in the kernel leaves the powers 1.5 and 2."""
        levels = []
        for m in (n, 2 * n, 4 * n):
            t = last * np.arange(1, m + 1) / m
            own, (ahead, behind) = self.own(t), (t * (1 + 1e-6), t * (1 - 1e-6))
            rates = (self.moved(ahead) - self.moved(behind)) / (self.own(ahead) - self.own(behind))
            g = integral_equations(self.moved(t), rates, self.x0, own) * self.s**2 * np.exp(2 * self.k * t)
            levels.append(g[:, m // n - 1 :: m // n])
        better = [b + (b - a) / (2**1.5 - 1) for a, b in pairwise(levels)]
        best = better[1] + (better[1] - better[0]) / 3.0
        return last * np.arange(1, n + 1) / n, best, np.abs(best - better[1])

    def own(self, t):
        """Time of the noise."""
        return self.s**2 * np.expm1(2 * self.k * t) / (2 * self.k)

    def moved(self, t):
        """Bounds in the coordinate in which there is noise alone."""
        k = self.k
        pulled = self.v * np.expm1(k * t) / k
        if self.w:
            o = self.omega
            pulled = pulled + self.w * (np.exp(k * t) * (k * np.sin(o * t) - o * np.cos(o * t)) + o) / (k * k + o * o)
        return np.stack([np.exp(k * t) * x * self.shape(t) for x in (-self.a, self.b)]) - pulled


def check_random_models(seeds, n):
    """Errors of sums of logarithms within the estimate and twice the reference's own error; where they are not, the
    reference is asked again with steps of a sixth: what it says of itself is too little now and then."""
    told = 0
    for seed in seeds:
        rng = np.random.default_rng(seed)
        drawn = GaussMarkov(rng)
        t, exact, off = drawn.densities(2.5, n)
        side, k = np.nonzero((exact > 3e-4 * exact.max()) & (off < 2e-5 * exact))
        some = rng.choice(len(side), min(40, len(side)), replace=False)
        side, k = side[some], k[some]
        found = drawn.model.likelihood(likelihood.Trials(t[k], side))
        value = found().item()
        error, known = abs(value - np.log(exact[side, k]).sum()), 2.0 * (off / exact)[side, k].sum()
        if error > found.error_estimate + known:
            _, exact, off = (v[..., 5::6] for v in drawn.densities(2.5, 6 * n))
            error, known = abs(value - np.log(exact[side, k]).sum()), 2.0 * (off / exact)[side, k].sum()
        assert error <= found.error_estimate + known, (seed, drawn.kind, error, found, known)
        told += found.status != "converged"
    assert told <= 0.05 * len(seeds)


def test_random_models_are_within_their_estimates():
    check_random_models(range(4), 200)


@pytest.mark.slow
def test_many_random_models_are_within_their_estimates():
    check_random_models(range(100, 300), 300)


def test_bounds_at_rest_agree_with_eigenfunctions():
    times = np.array([0.1, 0.3, 0.8, 2.0])
    trials = likelihood.Trials(np.tile(times, 2), np.repeat([0.0, 1.0], 4))
    common = {"start": 0.2, "delay": likelihood.Between(0.0, 0.05), "killing": lambda t, x, c: 0.2 + x[..., 0] ** 2}
    coefficients = (lambda t, x, c: 0.5 - 1.5 * x), (lambda t, x, c: 1.0 + 0.3 * x)
    still = likelihood.FirstPassage(*coefficients, lower=-1.0, upper=1.2, **common)
    moving = likelihood.FirstPassage(*coefficients, lower=-1.0, upper=lambda t, c: 1.2 + 0.0 * t, **common)
    assert not still.moves
    assert moving.moves
    exact, found = (model.likelihood(trials, tol=1e-4).terms() for model in (still, moving))
    assert (found - exact).abs().max() < 5e-5


def test_one_bound_that_moves_in_a_line_is_inverse_gaussian():
    a, b, t = 0.9, -0.6, np.array([0.05, 0.4, 0.8, 2.0])
    exact = a / np.sqrt(2 * np.pi * t**3) * np.exp(-((a + b * t) ** 2) / (2 * t))
    up = likelihood.FirstPassage(0.0, upper=lambda t, c: a + b * t)
    down = likelihood.FirstPassage(0.0, lower=lambda t, c: -a - b * t)
    assert np.abs(up.density(t, 1).numpy() / exact - 1.0).max() < 1e-4
    assert np.abs(down.density(t, 0).numpy() / exact - 1.0).max() < 1e-4


def collapsing(**more):
    names = {"v": 1.2, "a": 1.1, "tau": 1.5, "z": 0.1, "delay": 0.25, "leak": 0.6, "noise": 0.8, "lapse": 0.03}
    p = {name: parameter(value) for name, value in names.items()}
    model = likelihood.FirstPassage(
        lambda t, x, c: p["v"] * c["dose"] * (1 - torch.exp(-t / 0.1)) - p["leak"] * x,
        lambda t, x, c: p["noise"] * (1 + 0.1 * x**2),
        lower=lambda t, c: -p["a"] * torch.exp(-t / p["tau"]),
        upper=lambda t, c: p["a"] * (1 + 0.1 * c["dose"]) * torch.exp(-t / p["tau"]),
        start=lambda c: likelihood.Between(p["z"] - 0.1, p["z"] + 0.1),
        delay=lambda c: p["delay"],
        lapse=p["lapse"],
        **more,
    )
    rng, n = np.random.default_rng(0), 16
    times, choices, censored = 0.35 + rng.gamma(2, 0.2, n), rng.integers(0, 2, n).astype(float), np.arange(n) % 11 == 10
    choices[:3], times[3:5] = np.nan, np.nan
    times[6:8] = [0.26, 0.3]  # next to the delay
    return model, likelihood.Trials(times, choices, {"dose": np.full(n, 0.5)}, censored), [*p.values()]


def test_gradients_in_all_parameters_and_second_derivatives():
    model, trials, parameters = collapsing()
    found = model.likelihood(trials, tol=0.1)
    table = taylor_test(found, parameters, step=1e-3, seed=0)
    assert np.abs(table.column("order")[1:] - 2.0).max() < 0.05
    assert found.status == "converged"
    product = torch.stack(
        control.hessian_product(lambda: found(), parameters, [torch.ones_like(p) for p in parameters])
    )

    def gradient(step):
        with torch.no_grad():
            for p in parameters:
                p += step
        return torch.stack(torch.autograd.grad(found(), parameters))

    difference = (gradient(1e-4) - gradient(-2e-4)) / 2e-4
    assert torch.allclose(product, difference, rtol=1e-3, atol=2e-2)


def test_what_is_not_known_is_summed_over():
    def model(**more):
        closing = {"lower": lambda t, c: -torch.exp(-t), "upper": lambda t, c: 0.8 * torch.exp(-t)}
        return likelihood.FirstPassage(0.7, start=0.1, **closing, **more)

    z, w = np.polynomial.legendre.leggauss(40)
    q = [model().density(1.2 * (z + 1), k, tol=1e-2).numpy() @ (1.2 * w) for k in (0, 1)]
    trials = likelihood.Trials([np.nan, np.nan, 0.6], [0, 1, 0], censored=[False, False, True])
    found = model(span=2.4).likelihood(trials).terms().exp().numpy()
    assert np.abs(found[:2] - q).max() < 1e-4
    rest = sum(model().density(0.6 + 0.9 * (z + 1), k, tol=1e-2).numpy() @ (0.9 * w) for k in (0, 1))
    assert abs(found[2] - rest) < 1e-4


def test_bounds_that_meet_end_the_problem():
    model = likelihood.FirstPassage(0.5, lower=lambda t, c: t - 1.0, upper=lambda t, c: 1.0 - t)
    z, w = np.polynomial.legendre.leggauss(60)
    t = 0.5 * (z + 1)
    whole = sum(0.5 * w @ model.density(t, k, tol=1e-2).numpy() for k in (0, 1))
    assert abs(whole - 1.0) < 1e-5
    late = model.likelihood(likelihood.Trials([0.5, 1.5], [1, 1])).terms()
    assert late[0] > -2.0
    assert -1e12 < late[1] < -300.0
    lapses = likelihood.FirstPassage(
        0.5, lower=lambda t, c: t - 1.0, upper=lambda t, c: max(1.0 - t, torch.zeros(())), lapse=0.1, span=2.0
    )
    guess = lapses.likelihood(likelihood.Trials([1.5], [1]))
    assert abs(guess().item() - math.log(0.1 / 4)) < 1e-9


def test_a_drift_that_jumps_and_a_bound_that_bends():
    def drift(t, x, c):
        return (2.0 if t < 0.4 else -1.0) + 0.0 * x

    t = np.linspace(0.0, 1.4, 1401)[1:]
    gone, rate = np.where(t < 0.4, 2.0 * t, 0.8 - (t - 0.4)), np.where(t < 0.4, 2.0, -1.0)
    bounds = np.stack([-1.0 - gone, np.maximum(1.2 - t, 0.5) - gone])
    exact = integral_equations(bounds, np.stack([-rate, np.where(t < 0.7, -1.0, 0.0) - rate]), 0.1, t)
    model = likelihood.FirstPassage(drift, lower=-1.0, upper=lambda t, c: torch.clamp(1.2 - t, min=0.5), start=0.1)
    some = np.array([199, 389, 449, 799, 1399])
    for choice in (0, 1):
        found = model.density(t[some], choice).numpy()
        assert np.abs(found - exact[choice, some]).max() < 5e-4 * exact[choice].max()


@pytest.mark.parametrize(
    ("named", "bounds"),
    [
        ("upper", {"lower": -1.0, "upper": lambda t, c: 1.0 if t < 0.5 else 0.5}),
        ("upper", {"lower": -1.0, "upper": lambda t, c: 1.0 / (t - t)}),
        ("lower, upper", {"lower": 1.0, "upper": lambda t, c: 0.5 + 0 * t}),
        ("start", {"lower": -1.0, "upper": lambda t, c: -0.5 - t}),
    ],
)
def test_what_is_refused(named, bounds):
    with pytest.raises(kolmo.InputError, match=named):
        likelihood.FirstPassage(0.0, **bounds).likelihood(likelihood.Trials([1.0], [0]))()


def test_bounds_are_found_where_they_are():
    model = likelihood.FirstPassage(0.0, lower=-2.0, upper=lambda t, c: max(c["a"] - t, torch.tensor(0.5)))
    assert torch.equal(
        model.places(1, [0.0, 0.25, 3.0], {"a": 1.0}), torch.tensor([1.0, 0.75, 0.5], dtype=torch.float64)
    )
    assert torch.equal(model.places(0, [0.0, 1.0], {}), torch.tensor([-2.0, -2.0], dtype=torch.float64))
