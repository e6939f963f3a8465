"""solve_hjb against closed forms, Riccati equations, trees and roll-outs of its own policy."""

import dataclasses

import numpy as np
import pytest
import torch
from scipy.integrate import quad, solve_ivp
from scipy.stats import norm

import kolmo
from kolmo import control
from kolmo.control import policy_search as hjb
from kolmo.control.bellman import Bellman
from kolmo.control.policy_steps import solve_stationary
from kolmo.errors import InputError, NotConvergedError, ToleranceWarning
from kolmo.grid import Grid


def linear_quadratic(alpha, sigma=0.6, q=1.0, r=0.5, h=2.0, T=1.0, delta=0.0):
    """dX = (α(t) X + a) dt + sqrt(σ² + δ²a²) dW, cost ∫ qX² + ra² + hX_T²."""
    return control.ControlProblem(
        lambda t, x, a: alpha(t) * x + a,
        covariance=lambda t, x, a: sigma**2 + delta**2 * a[..., 0] ** 2,
        controls=control.Unbounded(1),
        terminal=lambda x: h * x[..., 0] ** 2,
        horizon=T,
        box=kolmo.Box(-6.0, 6.0),
        running_cost=lambda t, x, a: q * x[..., 0] ** 2 + r * a[..., 0] ** 2,
    )


def riccati(alpha, sigma=0.6, q=1.0, r=0.5, h=2.0, T=1.0, delta=0.0):
    """p and s of V = p x² + s at time 0, and the feedback gain: a = −gain x."""

    def right(s, y):
        p = y[0]
        return [q + 2.0 * alpha(T - s) * p - p**2 / (r + delta**2 * p), sigma**2 * p]

    p, s = solve_ivp(right, (0.0, T), [h, 0.0], rtol=1e-11, atol=1e-12).y[:, -1]
    return p, s, p / (r + delta**2 * p)


@pytest.mark.parametrize(
    ("alpha", "delta"), [(lambda t: -0.5, 0.0), (lambda t: np.sin(3.0 * t), 0.0), (lambda t: 0.2, 0.3)]
)
def test_linear_quadratic_problems_against_riccati(alpha, delta):
    x = np.array([-1.5, 0.0, 0.7])
    opt = control.solve_hjb(linear_quadratic(alpha, delta=delta), at=x, rtol=1e-4)
    p, s, gain = riccati(alpha, delta=delta)
    assert opt.status == "converged"
    assert opt.stats["monotone_check"]["agrees"]
    np.testing.assert_allclose(opt(x), p * x**2 + s, atol=2e-4 * p * 1.5**2)
    assert (np.abs(opt(x) - (p * x**2 + s)) <= 10 * opt.error_estimate + 1e-12).all()
    np.testing.assert_allclose(opt.policy(0.0, x).reshape(-1), -gain * x, atol=1e-3)
    np.testing.assert_allclose(opt.gradient(x)[:, 0], 2 * p * x, atol=1e-3)


def exit_problem(sigma=0.5, controls=None):
    """Least time to leave (−1, 1) with drift at most one."""
    return control.ControlProblem(
        lambda t, x, a: a,
        sigma,
        controls=controls or control.Interval(-1.0, 1.0),
        terminal=None,
        horizon=None,
        box=kolmo.Box(-1.0, 1.0, boundary="absorbing"),
        running_cost=1.0,
    )


def fastest_exit(x, sigma=0.5):
    """Drift away from the middle."""
    return (1 - np.abs(x)) - 0.5 * sigma**2 * (np.exp(-2 * np.abs(x) / sigma**2) - np.exp(-2 / sigma**2))


@pytest.mark.parametrize("controls", [control.Interval(-1.0, 1.0), control.Finite([-1.0, 0.0, 1.0])])
def test_fastest_exit_is_bang_bang(controls):
    x = np.array([-0.8, -0.2, 0.0, 0.5])
    opt = control.solve_hjb(exit_problem(controls=controls), at=x, rtol=1e-4)
    np.testing.assert_allclose(opt(x), fastest_exit(x), atol=2e-4)
    assert opt.policy(0.0, [-0.5, 0.5]).reshape(-1).tolist() == pytest.approx([-1.0, 1.0])


def black_scholes(S, K, r, sigma, T):
    d1 = (np.log(S / K) + (r + 0.5 * sigma**2) * T) / (sigma * np.sqrt(T))
    return S * norm.cdf(d1) - K * np.exp(-r * T) * norm.cdf(d1 - sigma * np.sqrt(T))


@pytest.mark.parametrize(("sense", "sigma"), [("max", 0.3), ("min", 0.15)])
def test_uncertain_volatility_of_a_convex_payoff_takes_an_end(sense, sigma):
    cp = control.ControlProblem(
        lambda t, x, a: 0.05 * x,
        covariance=lambda t, x, a: (a * x)[..., 0] ** 2,
        controls=control.Interval(0.15, 0.3),
        terminal=lambda x: torch.clamp(x[..., 0] - 100.0, min=0.0),
        horizon=1.0,
        box=kolmo.Box(0.0, 500.0, boundary=[("natural", "open")]),
        killing=0.05,
        sense=sense,
    )
    S = np.array([80.0, 100.0, 120.0])
    opt = control.solve_hjb(cp, at=S, rtol=1e-3)
    np.testing.assert_allclose(opt(S), black_scholes(S, 100.0, 0.05, sigma, 1.0), atol=2e-3 * 30)
    np.testing.assert_allclose(opt.policy(0.5, S).reshape(-1), sigma, atol=1e-12)


def put(controls=None):
    def payoff(x):
        return torch.clamp(100.0 - x[..., 0], min=0.0)

    return control.ControlProblem(
        lambda t, x, a: 0.05 * x,
        covariance=lambda t, x, a: (0.2 * x[..., 0]) ** 2,
        controls=controls or control.Finite([0.0]),
        terminal=payoff,
        horizon=1.0,
        box=kolmo.Box(0.0, 300.0, boundary=[("natural", "open")]),
        killing=0.05,
        obstacle=lambda t, x: payoff(x),
        sense="max",
    )


def tree(S, steps, r=0.05, sigma=0.2, K=100.0):
    """American put on a binomial tree (Cox, Ross & Rubinstein 1979)."""
    dt = 1.0 / steps
    u = np.exp(sigma * np.sqrt(dt))
    p = (np.exp(r * dt) - 1 / u) / (u - 1 / u)
    v = np.maximum(K - S * u ** np.arange(-steps, steps + 1, 2.0), 0)
    for n in range(steps - 1, -1, -1):
        stop = K - S * u ** np.arange(-n, n + 1, 2.0)
        v = np.maximum(np.exp(-r * dt) * (p * v[1:] + (1 - p) * v[:-1]), stop)
    return v[0]


def test_optimal_stopping_of_an_american_put_against_a_tree():
    S = np.array([90.0, 100.0, 110.0])
    opt = control.solve_hjb(put(), at=S, rtol=1e-3)
    exact = [0.5 * (tree(s, 1500) + tree(s, 1501)) for s in S]
    np.testing.assert_allclose(opt(S), exact, atol=2e-3 * 11.5)
    low = np.linspace(20.0, 75.0, 12)
    np.testing.assert_allclose(opt(low), 100.0 - low, atol=1e-3)
    assert (opt(np.linspace(20.0, 200.0, 50)) >= np.maximum(100 - np.linspace(20.0, 200.0, 50), 0) - 0.02).all()


def test_merton_fraction_although_nothing_acts_at_the_degenerate_end():
    mu, r, sigma, gamma = 0.08, 0.02, 0.25, 0.5
    cp = control.ControlProblem(
        lambda t, x, a: x * (r + a * (mu - r)),
        covariance=lambda t, x, a: (a * sigma * x)[..., 0] ** 2,
        controls=control.Unbounded(1),
        terminal=lambda x: x[..., 0] ** gamma / gamma,
        horizon=1.0,
        box=kolmo.Box(0.0, 8.0, boundary=[("natural", "open")]),
        sense="max",
    )
    x = np.array([0.5, 1.0, 2.0])
    opt = control.solve_hjb(cp, at=x, rtol=1e-3)
    rate = r * gamma + 0.5 * gamma * (mu - r) ** 2 / (sigma**2 * (1 - gamma))
    np.testing.assert_allclose(opt(x), x**gamma / gamma * np.exp(rate), rtol=1e-3)
    np.testing.assert_allclose(opt.policy(0.0, x).reshape(-1), (mu - r) / (sigma**2 * (1 - gamma)), rtol=2e-2)


def double_well(cost):
    return control.ControlProblem(
        lambda t, x, a: x - x**3 + 0.7 * a,
        0.7,
        controls=control.Unbounded(1),
        terminal=lambda x: 2.0 * (x[..., 0] - 1.0) ** 2,
        horizon=1.0,
        box=kolmo.Box(-3.0, 3.0),
        running_cost=cost,
    )


def test_policy_iteration_and_the_linear_equation_agree():
    cp = double_well(lambda t, x, a: 0.5 * a[..., 0] ** 2)
    x = np.array([-1.2, -0.3, 1.0])
    opt, linear = control.solve_hjb(cp, at=x, rtol=1e-4), control.hopf_cole(cp, at=x, rtol=1e-5)
    assert linear.strength == pytest.approx(1.0)
    np.testing.assert_allclose(opt(x), linear(x), atol=2e-4 * float(opt(x).max()))
    np.testing.assert_allclose(opt.policy(0.0, x), linear.policy(0.0, x).reshape(opt.policy(0.0, x).shape), atol=5e-3)


@pytest.mark.parametrize(
    ("change", "argument"),
    [
        ({"controls": control.Interval(-1.0, 1.0)}, "controls"),
        ({"running_cost": lambda t, x, a: a[..., 0] ** 4}, "drift, running_cost"),
        ({"covariance": lambda t, x, a: 1.0 + 0.1 * a[..., 0] ** 2}, "covariance"),
        ({"killing": 0.3}, "killing"),
        ({"drift": lambda t, x, a: (1.0 + x**2) * a}, "drift"),
    ],
)
def test_the_linear_route_refuses_what_is_not_linearly_solvable(change, argument):
    given = {
        "drift": lambda t, x, a: a,
        "covariance": 1.0,
        "controls": control.Unbounded(1),
        "running_cost": lambda t, x, a: 0.5 * a[..., 0] ** 2,
    } | change
    drift = given.pop("drift")
    cp = control.ControlProblem(
        drift, **given, terminal=lambda x: x[..., 0] ** 2, horizon=1.0, box=kolmo.Box(-4.0, 4.0)
    )
    with pytest.raises(InputError) as caught:
        control.hopf_cole(cp, at=[0.0, 0.5])
    assert caught.value.argument == argument


@pytest.mark.slow
def test_a_cost_that_is_not_quadratic_against_a_fine_list_of_controls():
    x = np.array([-0.5, 0.5])
    cost = lambda t, x, a: 0.25 * a[..., 0] ** 4 + 0.1 * a[..., 0].cos()  # noqa: E731
    smooth = control.solve_hjb(_with(cost, control.Interval(-3.0, 3.0)), at=x, rtol=1e-2)
    listed = control.solve_hjb(_with(cost, control.Finite(np.linspace(-3.0, 3.0, 31))), at=x, rtol=1e-2)
    np.testing.assert_allclose(smooth(x), listed(x), atol=6e-3 * float(np.abs(listed(x)).max()))


def _with(cost, controls):
    return control.ControlProblem(
        lambda t, x, a: x - x**3 + 0.7 * a,
        0.7,
        controls=controls,
        terminal=lambda x: 2.0 * (x[..., 0] - 1.0) ** 2,
        horizon=0.5,
        box=kolmo.Box(-3.0, 3.0),
        running_cost=cost,
    )


def benes():
    return control.ControlProblem(
        lambda t, x, a: a,
        1.0,
        controls=control.Interval(-1.0, 1.0),
        terminal=lambda x: x[..., 0] ** 2,
        horizon=1.0,
        box=kolmo.Box(-8.0, 8.0),
    )


def test_a_rolled_out_policy_costs_what_the_value_says():
    from kolmo.montecarlo import monte_carlo

    opt = control.solve_hjb(benes(), at=[0.5], rtol=1e-3)
    est = monte_carlo(opt.closed_loop(), np.array([[0.5]]), paths=20_000, steps=64, rng=0)
    slack = 4 * est.standard_error + np.abs(est.bias_estimate) + opt.error_estimate
    assert np.all(np.abs(est.mean - opt([0.5])) <= slack)
    worse = monte_carlo(benes().closed_loop(lambda t, x: x.sign()), np.array([[0.5]]), paths=20_000, steps=64, rng=0)
    assert np.all(worse.mean > est.mean + 0.5)


def test_the_monotone_scheme_converges_to_the_same_value():
    cp, x = exit_problem(), np.array([-0.8, -0.2, 0.0, 0.5])
    exact = fastest_exit(x)
    errors = []
    for n in (41, 81, 161):
        bellman = Bellman(cp, Grid.of(cp.box, n), "monotone")
        V, settled = solve_stationary(bellman)
        errors.append(np.abs(bellman.grid.interpolate(V[:, 0], x, 4) - exact).max())
        Q = bellman.assemble(0.0, settled.acts[0])[0].matrix.toarray()
        assert (Q - np.diag(np.diag(Q)) >= 0).all()
    assert errors[0] > 1.8 * errors[1] > 3.2 * errors[2]


def test_a_given_discretization_is_followed():
    opt = control.solve_hjb(benes(), at=[0.5], rtol=1e-2)
    again = control.solve_hjb(benes(), discretization=opt.discretization)
    assert again.status == "fixed"
    np.testing.assert_allclose(again([0.3]), opt([0.3]), rtol=1e-10)


def test_an_unbounded_control_without_cost_is_named_with_its_node():
    cp = control.ControlProblem(
        lambda t, x, a: a,
        1.0,
        controls=control.Unbounded(1),
        terminal=lambda x: x[..., 0] ** 2,
        horizon=1.0,
        box=kolmo.Box(-4.0, 4.0),
    )
    with pytest.raises(InputError, match=r"controls.*at x = \["):
        control.solve_hjb(cp, at=[0.0])


@pytest.mark.parametrize(
    ("change", "argument"),
    [
        ({"controls": "all"}, "controls"),
        ({"sense": "least"}, "sense"),
        ({"horizon": -1.0}, "horizon"),
        ({"obstacle": 3.0}, "obstacle"),
        ({"box": None}, "dim"),
    ],
)
def test_bad_problems_name_the_argument(change, argument):
    given = {
        "controls": control.Interval(-1.0, 1.0),
        "terminal": lambda x: x[..., 0],
        "horizon": 1.0,
        "box": kolmo.Box(-1.0, 1.0),
    }
    with pytest.raises(InputError) as caught:
        control.ControlProblem(lambda t, x, a: a, lambda t, x, a: 1.0 + 0 * x[..., 0], **(given | change))
    assert caught.value.argument == argument


def test_a_policy_of_the_wrong_shape_is_refused():
    with pytest.raises(InputError, match="policy"):
        kolmo.solve(benes().closed_loop(lambda t, x: x[..., :0]), at=[0.0])


# --------------------------------------------------------------------------------------------- refinement and its end
def test_an_answer_that_the_monotone_scheme_contradicts_is_not_returned(monkeypatch):
    """High-order levels that agree on something wrong, as a solution that is not the viscosity solution."""
    solve_on = hjb.Search._solve_on

    def wrong(self, grid, steps, scheme):
        level = solve_on(self, grid, steps, scheme)
        return level if scheme == hjb.MONOTONE else dataclasses.replace(level, states=[level.states[0] + 0.5])

    monkeypatch.setattr(hjb.Search, "_solve_on", wrong)
    opt = control.solve_hjb(exit_problem(), at=[0.2], rtol=2e-2)
    assert abs(opt([0.2]).item() - fastest_exit(0.2)) < 0.05
    assert not opt.stats["monotone_check"]["agrees"]
    assert "monotone" in opt.message


def test_good_levels_outlive_a_finer_one_without_an_answer(monkeypatch):
    solve_on = hjb.Search._solve_on

    def failing(self, grid, steps, scheme):
        if grid.size > 130 and scheme != hjb.MONOTONE:
            raise NotConvergedError("policy iteration still changes V")
        return solve_on(self, grid, steps, scheme)

    monkeypatch.setattr(hjb.Search, "_solve_on", failing)
    with pytest.warns(ToleranceWarning, match="no finer level"):
        opt = control.solve_hjb(exit_problem(), at=[0.2], rtol=1e-7)
    assert opt.status == "tolerance_not_met"
    assert abs(opt([0.2]).item() - fastest_exit(0.2)) <= opt.error_estimate.max() < 1e-2


def test_a_high_order_answer_outlives_a_monotone_scheme_without_one(monkeypatch):
    """They disagree, and then the monotone scheme fails: what is left counts with their difference."""
    solve_on = hjb.Search._solve_on

    def wrong(self, grid, steps, scheme):
        if scheme == hjb.MONOTONE and self.scheme == hjb.MONOTONE:
            raise NotConvergedError("no answer")
        level = solve_on(self, grid, steps, scheme)
        return level if scheme == hjb.MONOTONE else dataclasses.replace(level, states=[level.states[0] + 0.5])

    monkeypatch.setattr(hjb.Search, "_solve_on", wrong)
    with pytest.warns(ToleranceWarning, match="no answer"):
        opt = control.solve_hjb(exit_problem(), at=[0.2], rtol=2e-2)
    assert abs(opt([0.2]).item() - fastest_exit(0.2)) <= 1.1 * opt.error_estimate.max()


def test_a_box_outlives_a_wider_one_without_an_answer(monkeypatch):
    """The cut counts for too much, and beyond it there is no answer."""
    solve_on, widest = hjb.Search._solve_on, []

    def failing(self, grid, steps, scheme):
        if len(widest) > 4 and grid.box[1][0] > 1.2 * min(widest):
            raise NotConvergedError("no answer")
        widest.append(float(grid.box[1][0]))
        return solve_on(self, grid, steps, scheme)

    monkeypatch.setattr(hjb.Search, "_solve_on", failing)
    monkeypatch.setattr(hjb.Search, "_measure_cut", lambda self, layout, scheme: setattr(self, "cut", 0.5) or True)
    problem = linear_quadratic(lambda t: -0.5)
    with pytest.warns(ToleranceWarning, match="wider box"):
        opt = control.solve_hjb(problem, at=np.array([0.0, 0.7]), rtol=1e-2)
    assert opt.status == "tolerance_not_met"
    assert opt.error_estimate.max() >= 0.5


def test_a_kink_close_to_the_middle_of_all_grids_is_not_taken_for_convergence():
    """Bounded steering towards c with cost |X_T - c|; law of the optimum in Karatzas and Shreve (1991), 6.5."""
    mu, s, T, c = 2.2, 1.1, 0.47, -0.135
    m, at = mu / s, np.array([-0.386, 0.030])

    def density(x, y):  # of (X_T - c) / s with drift -m sign
        x, y = abs(x), y if x >= 0 else -y
        root = np.sqrt(T)
        if y >= 0:
            return norm.pdf(x - y - m * T, scale=root) + m * np.exp(-2 * m * y) * norm.sf((x + y - m * T) / root)
        return np.exp(2 * m * x) * norm.pdf(x - y + m * T, scale=root) + m * np.exp(2 * m * y) * norm.sf(
            (x - y - m * T) / root
        )

    def expected(z):
        return sum(quad(lambda y: density(z, y) * s * abs(y), *ends)[0] for ends in ((-9, 0), (0, 9)))

    exact = [expected(z) for z in (at - c) / s]
    problem = control.ControlProblem(
        lambda t, x, a: mu * a,
        s,
        controls=control.Interval(-1.0, 1.0),
        terminal=lambda x: (x[..., 0] - c).abs(),
        horizon=T,
        box=kolmo.Box.unbounded(1),
    )
    opt = control.solve_hjb(problem, at=at[:, None], rtol=1e-3, atol=1e-9)
    assert opt.status == "converged"
    assert np.abs(opt(at[:, None]) - exact).max() < 5.0 * opt.error_estimate.max()
    assert np.abs(opt(at[:, None]) - exact).max() < 1e-3 * max(exact)


def test_a_perpetual_put_on_fine_grids():
    """The edge of the stopping set begins where the coarser level left it (McKean 1965)."""
    r, sigma, K = 0.05, 0.3, 10.0
    g = 2 * r / sigma**2
    star = K * g / (1 + g)

    def value(S):
        return np.where(star < S, (K - star) * (S / star) ** -g, K - S)

    ends = (kolmo.Absorbing(float(value(2.0))), kolmo.Absorbing(float(value(40.0))))
    problem = control.ControlProblem(
        lambda t, x, a: r * x,
        lambda t, x, a: sigma * x,
        controls=control.Finite([[0.0]]),
        horizon=None,
        terminal=None,
        killing=r,
        obstacle=lambda t, x: (K - x[..., 0]).clamp(min=0),
        sense="max",
        box=kolmo.Box(2.0, 40.0, [ends]),
    )
    S = np.array([8.0, 12.0, 17.0])
    opt = control.solve_hjb(problem, at=S, rtol=1e-5, atol=1e-9)
    assert opt.status == "converged"
    assert np.abs(opt(S) - value(S)).max() < 1e-4
    assert np.abs(opt(S) - value(S)).max() < 5.0 * opt.error_estimate.max()
    assert opt.stats["cells"] > 400
    assert opt.stats["policy_iterations"] < 10


def test_the_dimension_may_be_told():
    """Nothing else tells it where every coefficient is a function and there is no box."""
    cp = control.ControlProblem(
        lambda t, x, a: a,
        lambda t, x, a: 1.0 + 0.0 * x[..., 0],
        controls=control.Unbounded(1),
        terminal=lambda x: x[..., 0] ** 2,
        horizon=1.0,
        running_cost=lambda t, x, a: 0.5 * a[..., 0] ** 2,
        dim=1,
    )
    opt = control.solve_hjb(cp, at=[0.5], rtol=1e-3)  # p = 1/(1 + 2), V = p x² + ½ log 3
    np.testing.assert_allclose(opt([0.5]), 0.25 / 3 + 0.5 * np.log(3.0), rtol=1e-4)
    with pytest.raises(InputError, match="dim"):
        control.ControlProblem(
            0.0, 1.0, controls=control.Unbounded(1), terminal=None, horizon=None, box=kolmo.Box(0.0, 1.0), dim=2
        )


@pytest.mark.parametrize(
    ("drift", "fix"),
    [
        (lambda t, x, a: torch.nn.Linear(1, 1)(x) + a, r"\.double\(\)"),
        (lambda x, a: a, "the time comes first"),
    ],
)
def test_single_precision_and_a_missing_time_are_named(drift, fix):
    cp = control.ControlProblem(
        drift,
        1.0,
        controls=control.Interval(-1.0, 1.0),
        terminal=lambda x: x[..., 0] ** 2,
        horizon=1.0,
        box=kolmo.Box(-3.0, 3.0),
    )
    with pytest.raises(InputError, match=fix):
        control.solve_hjb(cp, at=[0.0])


def test_time_that_ends_while_a_level_is_confirmed_loses_nothing(monkeypatch):

    from kolmo.control import policy_search as hjb
    from kolmo.limits import OutOfTimeError

    def late(self, layout, scheme):
        raise OutOfTimeError

    monkeypatch.setattr(hjb.Search, "_stands", late)
    cp = control.ControlProblem(
        lambda t, x, a: a,
        1.0,
        controls=control.Interval(-1.0, 1.0),
        terminal=lambda x: x[..., 0] ** 2,
        horizon=1.0,
        box=kolmo.Box(-6.0, 6.0),
    )
    with pytest.warns(kolmo.errors.ToleranceWarning, match="no time was left"):
        opt = control.solve_hjb(cp, at=[0.0], rtol=1e-2)
    assert opt.status == "tolerance_not_met"
    assert abs(opt(0.0) - 0.33337) <= opt.error_estimate.max()


def test_what_is_no_control_problem_is_refused_by_name():
    sde = kolmo.SDE(0.0, 1.0, dim=1, jumps=[(1.0, lambda t, x: 0.0 * x + 0.1)])
    with pytest.raises(InputError, match=r"problem: got KolmogorovProblem.*kolmo\.solve"):
        control.solve_hjb(kolmo.KolmogorovProblem(sde, lambda x: x[..., 0], 1.0), at=[0.0])


@pytest.mark.parametrize("finished", [0, 1, 2, 3])
def test_after_an_interrupt_the_finest_level_finished_is_returned(monkeypatch, finished):
    """With what its levels say of its error; nothing is thrown away but a search without a level."""
    solve, calls = hjb.Search._solve, []

    def interrupted(search, grid, n, scheme):
        if len(calls) == finished:
            raise KeyboardInterrupt
        calls.append(grid.size)
        return solve(search, grid, n, scheme)

    monkeypatch.setattr(hjb.Search, "_solve", interrupted)
    cp, (p, rest, _) = linear_quadratic(lambda t: -0.5), riccati(lambda t: -0.5)
    if finished == 0:
        with pytest.raises(KeyboardInterrupt):
            control.solve_hjb(cp, at=[0.3], rtol=1e-9)
        return
    opt = control.solve_hjb(cp, at=[0.3], rtol=1e-9)
    assert opt.status == "interrupted"
    assert opt.grid.size == calls[-1]
    assert "not compared" in opt.message
    assert np.isinf(opt.error_estimate).all() == (finished == 1)
    assert abs(opt([0.3]).item() - (p * 0.3**2 + rest)) <= opt.error_estimate.max()


def test_a_cut_that_cannot_be_measured_counts_as_much_as_the_levels_differ(monkeypatch):
    """A wider box that has no answer is no evidence that nothing comes from beyond."""
    solve_on, widths = hjb.Search._solve_on, []

    def failing(self, grid, steps, scheme):
        width = float(np.ptp(grid.box[:, 0] if isinstance(grid.box, np.ndarray) else [end[0] for end in grid.box]))
        if len(self.levels) > 2 and scheme == self.scheme and width > 1.01 * max(widths):
            raise NotConvergedError("no answer")
        widths.append(width)
        return solve_on(self, grid, steps, scheme)

    monkeypatch.setattr(hjb.Search, "_solve_on", failing)
    opt = control.solve_hjb(linear_quadratic(lambda t: -0.5), at=np.array([0.0, 0.7]), rtol=1e-2)
    found = opt.discretization.estimate
    assert found["cut"][0] >= found["discretization"][0] > 0.0
    assert opt.error_estimate.max() >= 2.0 * found["discretization"][0]
