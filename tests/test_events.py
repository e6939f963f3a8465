"""Events: the state is moved, or something is paid, at given times; against closed forms, quadrature and identities."""

import numpy as np
import pytest
import torch
from scipy.stats import norm

import kolmo
from kolmo import control
from kolmo.arrays import as_like
from kolmo.problem.rest import at_rest
from kolmo.refine.residual import weighted_residual

R, S, K, T = 0.03, 0.25, 100.0, 1.0
BM = kolmo.SDE(0.0, 1.0, dim=1)
STOCK = kolmo.SDE(lambda t, x: R * x, lambda t, x: S * x, dim=1)
STRIP = kolmo.Box(-1.0, 1.0, "absorbing")
ABOVE = kolmo.Box(0.0, np.inf, [("natural", "open")])


def one(x):
    return 1.0 + 0.0 * x[..., 0]


def call(x):
    return np.maximum(x[..., 0] - K, 0.0)


def black_scholes(x, years):
    d = (np.log(x / K) + (R + 0.5 * S * S) * years) / (S * np.sqrt(years))
    return x * norm.cdf(d) - K * np.exp(-R * years) * norm.cdf(d - S * np.sqrt(years))


def option(events):
    return kolmo.KolmogorovProblem(STOCK, call, T, ABOVE, killing=R, events=events)


def dividends(x, times, amounts):
    """The call with fixed dividends, by Gauss–Hermite quadrature from one to the next."""
    z, w = np.polynomial.hermite_e.hermegauss(160)
    w = w / w.sum()

    def value(x, k):
        x = np.maximum(x, 1e-12)
        if k == len(times):
            return black_scholes(x, T - times[-1])
        h = times[k] - (times[k - 1] if k else 0.0)
        ahead = x[..., None] * np.exp((R - 0.5 * S * S) * h + S * np.sqrt(h) * z)
        return np.exp(-R * h) * (value(ahead - amounts[k], k + 1) @ w)

    return value(np.asarray(x, dtype=float), 0)


def test_a_proportional_dividend_moves_the_price():
    rng = np.random.default_rng(1)
    x = np.array([85.0, 100.0, 120.0])
    for _ in range(3):
        t, kept = rng.uniform(0.05, 0.95), rng.uniform(0.7, 1.1)
        sol = kolmo.solve(option({t: lambda x: kept * x}), at=x, rtol=1e-5)  # noqa: B023
        error = np.abs(sol(x) - black_scholes(kept * x, T)).max()
        assert sol.status == "converged"
        assert error <= np.max(sol.error_estimate)
        assert error < 1e-5 * black_scholes(kept * 120.0, T) + 1e-6


def test_fixed_dividends_against_quadrature():
    times, amounts, x = [0.3, 0.7], [3.0, 4.0], np.array([90.0, 100.0, 110.0])
    paid = {t: (lambda x, d=d: np.maximum(x - d, 0.0)) for t, d in zip(times, amounts, strict=True)}
    sol = kolmo.solve(option(paid), at=x, rtol=1e-4, save=[0.3])
    exact = dividends(x, times, amounts)
    assert np.abs(sol(x) - exact).max() <= np.max(sol.error_estimate)
    assert np.abs(sol(x) - exact).max() < 2e-3
    # at the time of an event the state is that afterwards
    after = np.exp(-R * 0.0) * sol(x, t=0.3)
    z, w = np.polynomial.hermite_e.hermegauss(160)
    ahead = x[:, None] * np.exp((R - 0.5 * S * S) * 0.4 + S * np.sqrt(0.4) * z)
    later = np.exp(-R * 0.4) * (black_scholes(np.maximum(ahead - 4.0, 1e-12), 0.3) @ (w / w.sum()))
    assert np.abs(after - later).max() < 2e-3


def test_payments_add_up():
    rng = np.random.default_rng(5)
    a, t = rng.uniform(0.5, 2.0), rng.uniform(0.2, 0.8)
    events = {
        t: [kolmo.Payment(lambda x: x[..., 0] ** 2), lambda x: a * x, kolmo.Payment(0.5)],
        0.9: kolmo.Payment(1.0),
    }
    problem = kolmo.KolmogorovProblem(BM, lambda x: x[..., 0] ** 2, 1.0, killing=0.2, events=events)
    x = np.array([-0.5, 0.4])
    moments = x**2 + t
    exact = np.exp(-0.2 * t) * (moments + 0.5) + np.exp(-0.18) + np.exp(-0.2) * (a**2 * moments + 1.0 - t)
    sol = kolmo.solve(problem, at=x, rtol=1e-6)
    assert np.abs(sol(x) - exact).max() < 1e-5
    two = kolmo.KolmogorovProblem(
        BM, lambda x: np.stack([0.0 * x[..., 0], x[..., 0]], -1), 1.0,
        events={0.5: kolmo.Payment(lambda x: np.stack([x[..., 0] ** 2, one(x)], -1))},
    )  # fmt: skip
    assert np.abs(kolmo.solve(two, at=x, rtol=1e-6)(x) - np.stack([x**2 + 0.5, x + 1.0], -1)).max() < 1e-5


def test_only_a_payment_is_not_nothing():
    problem = kolmo.KolmogorovProblem(
        BM, lambda x: 0.0 * x[..., 0], 1.0, events={0.5: kolmo.Payment(lambda x: np.exp(-8.0 * x[..., 0] ** 2))}
    )
    sol = kolmo.solve(problem, at=[0.0], rtol=1e-5)
    assert abs(float(sol(0.0)) - 1.0 / 3.0) < 1e-5  # 1/√(1 + 16/2)


def mixed(barrier=False):
    """Moves inwards and beyond absorbing and reflecting faces, payments, and a face that jumps."""
    upper = (lambda t: 1.2 if t < 0.55 else 0.8) if barrier else 1.0
    box = kolmo.Box(-1.0, upper, [("reflecting", kolmo.Absorbing(2.0))])
    events = {0.25: lambda x: x + 0.4, 0.75: [kolmo.Payment(lambda x: x[..., 0]), lambda x: 1.5 * x - 0.5]}
    return kolmo.KolmogorovProblem(
        kolmo.SDE(lambda t, x: -x, 0.8, dim=1), one, 1.0, box, source=lambda t, x: np.cos(x[..., 0]), events=events
    )


@pytest.mark.parametrize("barrier", [False, True])
@pytest.mark.parametrize("scheme", ["central2", "central6", "monotone"])
def test_forwards_and_backwards_agree(scheme, barrier):
    problem = mixed(barrier)
    sol = kolmo.solve(problem, grid=41, steps=30, scheme=scheme)
    law = kolmo.solve_forward(problem, [0.2], discretization=sol.discretization, save=[0.25, 1.0])
    width = sol.discretization.width
    backward = float(sol.grid.interpolate(sol.values[0], np.array([[0.2]]), width)[0])
    assert law.value == pytest.approx(backward, abs=1e-11)
    assert np.abs(law.mass + sum(law.exited(e) for e in law.exits) - 1.0).max() < 1e-10
    if scheme == "monotone" and not barrier:
        implicit = kolmo.solve(problem, grid=41, steps=30, scheme=scheme, stepper="implicit-euler")
        free = kolmo.solve_forward(problem, [0.2], discretization=implicit.discretization)
        assert free.weights.min() > -1e-15


def test_transposed_steps_of_random_fields():
    """⟨E u, p⟩ = ⟨u, Eᵀ p⟩ for any u and p, in one and two dimensions, in NumPy and torch."""
    rng = np.random.default_rng(9)
    for dim, n in ((1, 31), (2, 13)):
        turn = rng.normal(size=dim)
        problem = kolmo.KolmogorovProblem(
            kolmo.SDE(0.0, 1.0, dim=dim), one, 1.0, kolmo.Box([-1.0] * dim, [1.0] * dim, [("open", "absorbing")] * dim),
            events={0.5: lambda x, turn=turn: x * as_like(turn, x) + 0.1},
        )  # fmt: skip
        march = kolmo.solve(problem, grid=n, steps=2, stepper="mcs3").discretization.march(problem)
        u, p = rng.normal(size=(2, march.generator.grid.size, 2))
        crossing = march.crossing(0.5)
        left, right = (crossing.apply(u) * p).sum(), (u * crossing.apply_transposed(p)).sum()
        assert left == pytest.approx(right, rel=1e-12)
        like = torch.zeros((), dtype=torch.float64)
        other = march.crossing(0.5, like)
        for function, v in (("apply", u), ("apply_transposed", p)):
            found = getattr(other, function)(torch.as_tensor(v)).numpy()
            assert np.abs(found - getattr(crossing, function)(v)).max() < 1e-12


def fitted(theta):
    """Event maps, payments and the height of a jump of a barrier with parameters."""

    def upper(t):
        return 1.2 + 0.1 * theta[2] * t if t < 0.55 else theta[2] - 0.2

    box = kolmo.Box(-1.0, upper, [("reflecting", kolmo.Absorbing(2.0))])
    events = {
        0.25: lambda x: theta[0] * x + 0.1,
        0.75: [kolmo.Payment(lambda x: theta[1] * x[..., 0] ** 2), lambda x: x - theta[1]],
    }
    return kolmo.KolmogorovProblem(
        kolmo.SDE(lambda t, x: -x, 0.8, dim=1, arrays="torch"), lambda x: 1 + x[..., 0] ** 2, 1.0, box, events=events
    )


@pytest.mark.parametrize("checkpoints", [None, 4])
def test_gradients_with_respect_to_events(checkpoints):
    theta = torch.tensor([0.9, 0.15, 1.0], dtype=torch.float64, requires_grad=True)
    way = torch.tensor([0.3, -0.7, 0.4], dtype=torch.float64)
    with torch.no_grad():
        recipe = kolmo.solve(fitted(theta), grid=25, steps=14).discretization
    y = torch.tensor([0.1, 0.3], dtype=torch.float64)

    def value(p):
        return control.value(fitted(p), [0.3], discretization=recipe, checkpoints=checkpoints).sum()

    def law(p):
        found = control.law(fitted(p), [0.3], discretization=recipe)
        return found(y).log().sum() + found.exit_flux("high", [0.2, 0.5]).sum() + found.mass()

    for function in (value, law) if checkpoints is None else (value,):
        there = function(theta)
        (gradient,) = torch.autograd.grad(there, theta)
        left = [abs(float((function(theta + h * way) - there - h * (gradient @ way)).detach())) for h in (8e-3, 4e-3)]
        assert left[0] / left[1] == pytest.approx(4.0, abs=0.4), function.__name__
        assert (gradient.abs() > 1e-3).all()


def test_values_with_gradients_are_those_of_solve():
    theta = torch.tensor([0.9, 0.15, 1.0], dtype=torch.float64)
    sol = kolmo.solve(fitted(theta), grid=33, steps=24)
    u = control.value(fitted(theta), [0.3, -0.2], discretization=sol.discretization)
    assert np.abs(u.numpy() - sol([0.3, -0.2])).max() < 1e-12
    forward = kolmo.solve_forward(fitted(theta), [0.3], discretization=sol.discretization, save=[0.25])
    law = control.law(fitted(theta), [0.3], discretization=sol.discretization, save=[0.25])
    assert np.abs(law.weights.numpy() - forward.weights).max() < 1e-12
    assert np.abs(law.flux("high").numpy() - forward.exit_flux("high")).max() < 1e-10


@pytest.mark.parametrize("barrier", [False, True])
def test_paths_and_certificates_agree(barrier):
    problem, x = mixed(barrier), np.array([-0.3, 0.4])
    sol = kolmo.solve(problem, at=x, rtol=1e-5)
    for method in ("euler", "platen"):
        estimate = kolmo.monte_carlo(problem, x, paths=10000, steps=40, rng=4, method=method)
        assert (np.abs(estimate.mean - sol(x)) < 4 * estimate.standard_error + estimate.bias_estimate).all()
        assert (estimate.bias_estimate < 0.1).all()
    coarse = kolmo.solve(problem, grid=13, steps=8)
    found = kolmo.certify(problem, coarse, x, paths=2000, steps=60, rng=5)
    assert (np.abs(found.corrected - sol(x)) < 4 * found.uncertainty).all()
    assert (found.standard_error < 0.02).all()


def test_a_law_from_one_event_to_the_next():
    """Reset to a point: the law afterwards is that of a fresh start."""
    problem = kolmo.KolmogorovProblem(BM, one, 1.0, events={0.6: lambda x: 0.0 * x + 0.3})
    law = kolmo.solve_forward(problem, [-1.0], at=[0.0, 0.5], rtol=1e-4)
    assert np.abs(law([0.0, 0.5]) - norm.pdf([0.0, 0.5], 0.3, np.sqrt(0.4))).max() <= law.error_estimate["density"]
    assert float(law.mass[-1]) == pytest.approx(1.0, abs=1e-9)


def test_the_box_covers_what_events_reach():
    problem = kolmo.KolmogorovProblem(BM, lambda x: np.cos(x[..., 0]), 1.0, events={0.5: lambda x: x + 20.0})
    sol = kolmo.solve(problem, at=[0.0], rtol=1e-5)
    assert abs(float(sol(0.0)) - np.exp(-0.5) * np.cos(20.0)) < 1e-5


def test_events_in_two_dimensions():
    swap = {0.5: lambda x: x[..., ::-1]}
    sde = kolmo.SDE(lambda t, x: np.stack([-x[..., 0], 0.0 * x[..., 1]], -1), np.array([0.5, 1.0]), dim=2)
    problem = kolmo.KolmogorovProblem(sde, lambda x: x[..., 0] ** 2, 1.0, events=swap)
    sol = kolmo.solve(problem, at=[[0.3, -0.4]], rtol=1e-4)
    # the second coordinate, a Brownian motion up to 0.5, decays from there
    exact = np.exp(-1.0) * (0.16 + 0.5) + 0.125 * (1.0 - np.exp(-1.0))
    assert abs(float(sol([0.3, -0.4])) - exact) < 1e-4


def test_a_face_that_jumps_over_paths_absorbs_them():
    box = kolmo.Box(-np.inf, lambda t: 1.0 if t < 0.5 else 0.6, [("open", "absorbing")])
    problem = kolmo.KolmogorovProblem(BM, one, 1.0, box)
    y = np.linspace(-8.0, 0.6, 100001)
    before = norm.pdf(y, scale=np.sqrt(0.5)) - norm.pdf(y - 2.0, scale=np.sqrt(0.5))
    exact = np.trapezoid(before * (2 * norm.cdf((0.6 - y) / np.sqrt(0.5)) - 1), y)
    sol = kolmo.solve(problem, at=[0.0], rtol=1e-4)
    assert abs(float(sol(0.0)) - exact) <= float(np.max(sol.error_estimate))
    assert abs(float(sol(0.0)) - exact) < 1e-4
    away = kolmo.Box(-np.inf, lambda t: 1.0 if t < 0.5 else 1.5, [("open", "absorbing")])
    sol = kolmo.solve(kolmo.KolmogorovProblem(BM, one, 1.0, away), at=[0.0], rtol=1e-4)
    y = np.linspace(-8.0, 1.0, 100001)
    before = norm.pdf(y, scale=np.sqrt(0.5)) - norm.pdf(y - 2.0, scale=np.sqrt(0.5))
    exact = np.trapezoid(before * (2 * norm.cdf((1.5 - y) / np.sqrt(0.5)) - 1), y)
    assert abs(float(sol(0.0)) - exact) < 1e-4


@pytest.mark.parametrize(
    ("make", "argument"),
    [
        (lambda: option({0.0: lambda x: x}), "events"),
        (lambda: option({1.0: lambda x: x}), "events"),
        (lambda: option({"soon": lambda x: x}), "events"),
        (lambda: option({0.5: 3.0}), "events"),
        (lambda: option({0.5: []}), "events"),
        (lambda: kolmo.solve(option({0.5: lambda x: x.sum()}), at=[100.0]), "events"),
        (lambda: kolmo.solve(option({0.5: lambda x: x * np.inf}), at=[100.0]), "events"),
        (lambda: kolmo.solve(option({0.5: kolmo.Payment(lambda x: np.ones(3))}), at=[100.0]), "events"),
        (lambda: kolmo.solve(option({0.123: one}), discretization=kolmo.plan(option(None), at=[100.0])), "events"),
        (lambda: kolmo.KolmogorovProblem(BM, None, None, STRIP, events={1.0: one}), "events"),
        (lambda: kolmo.spectrum(kolmo.KolmogorovProblem(
            BM, one, 1.0, STRIP, events={0.5: lambda x: -x}), 2), "events"),
        (lambda: weighted_residual(mixed(), kolmo.solve(mixed(), grid=21, steps=8).discretization, [0.0]), "events"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(make, argument):
    with pytest.raises(kolmo.InputError) as caught:
        make()
    assert argument in caught.value.argument


def test_nothing_is_changed_behind_ones_back():
    problem = mixed()
    assert problem.sde.breakpoints == (0.25, 0.75)
    assert kolmo.KolmogorovProblem(BM, one, 1.0, events={0.5: lambda x: x}).sde is not BM
    assert BM.events == ()
    assert BM.breakpoints == ()
    assert at_rest(problem) is problem
