"""Strong control in the noise with an open cut: quadratic values known in closed form."""

import numpy as np
import pytest

import kolmo
from kolmo import control


def square(x):
    return x[..., 0] ** 2


def test_noise_proportional_to_an_unbounded_control():
    """Least mean square about one by trading: V = (x − 1)² exp(−μ²T/s²), a = −(μ/s²)(x − 1) (Zhou & Li 2000)."""
    cp = control.ControlProblem(
        lambda t, x, a: 0.2 * a,
        lambda t, x, a: 0.4 * a,
        controls=control.Unbounded(1),
        terminal=lambda x: (x[..., 0] - 1.0) ** 2,
        horizon=1.0,
        box=kolmo.Box(-np.inf, np.inf),
    )
    opt = control.solve_hjb(cp, at=[0.0, 0.5], rtol=1e-6)
    assert opt.status == "converged"
    np.testing.assert_allclose(opt([0.0, 0.5]), np.exp(-0.25) * np.array([1.0, 0.25]), rtol=1e-6)
    np.testing.assert_allclose(opt.policy(0.0, [0.0, 0.5])[:, 0], [1.25, 0.625], rtol=1e-4)


def test_drift_and_noise_from_one_costly_control():
    """V = p(t) x² + q(t) x + r(t) from Riccati's equations for dX = a dt + (0.3 + 0.8 a) dW with cost ½ a²."""
    from scipy.integrate import solve_ivp

    def slope(_, y):
        p, q, _r = y
        # minimise a(2px + q) + p(0.3 + 0.8a)² + ½a²: a = −(2px + q + 0.48p) / (1 + 1.28p)
        bend = 1.0 + 1.28 * p
        return [-2.0 * p**2 / bend, -2.0 * p * (q + 0.48 * p) / bend, 0.09 * p - (q + 0.48 * p) ** 2 / (2.0 * bend)]

    p, q, r = solve_ivp(slope, (0.0, 1.0), [1.0, 0.0, 0.0], rtol=1e-11, atol=1e-12).y[:, -1]
    cp = control.ControlProblem(
        lambda t, x, a: a,
        lambda t, x, a: 0.3 + 0.8 * a,
        controls=control.Unbounded(1),
        terminal=square,
        horizon=1.0,
        box=kolmo.Box(-np.inf, np.inf),
        running_cost=lambda t, x, a: 0.5 * a[..., 0] ** 2,
    )
    opt = control.solve_hjb(cp, at=[0.0, 0.5], rtol=1e-6)
    np.testing.assert_allclose(opt([0.0, 0.5]), [r, 0.25 * p + 0.5 * q + r], rtol=2e-6)


def test_noise_that_costs():
    """min_a (1 + a)² + a² = ½: V = x² + ½(T − t)."""
    cp = control.ControlProblem(
        0.0,
        lambda t, x, a: 1.0 + a,
        controls=control.Unbounded(1),
        terminal=square,
        horizon=1.0,
        box=kolmo.Box(-np.inf, np.inf),
        running_cost=lambda t, x, a: a[..., 0] ** 2,
    )
    assert control.solve_hjb(cp, at=[0.5])(0.5) == pytest.approx(0.75, abs=1e-8)


@pytest.mark.parametrize("sense", ["min", "max"])
def test_bounded_noise(sense):
    cp = control.ControlProblem(
        0.0,
        lambda t, x, a: a,
        controls=control.Interval(0.2, 1.0),
        terminal=square,
        horizon=1.0,
        box=kolmo.Box(-np.inf, np.inf),
        sense=sense,
    )
    assert control.solve_hjb(cp, at=[0.5])(0.5) == pytest.approx({"min": 0.29, "max": 1.25}[sense], abs=1e-6)


def test_the_cut_of_the_monotone_check_counts_as_its_error():
    """V = P x² for dX = (aX + bu) dt + (gX + du) dW: the monotone scheme is off by more than it shows at the cut."""
    from scipy.integrate import solve_ivp

    a, b, g, q, r, h, T, d = 0.236326, 0.452661, 0.567732, 0.588212, 0.292849, 2.087347, 0.543069, -0.481196
    P = solve_ivp(
        lambda t, P: (2 * a + g * g) * P + q - ((b + g * d) * P) ** 2 / (r + d * d * P), (0, T), [h], rtol=1e-12
    ).y[0, -1]
    cp = control.ControlProblem(
        lambda t, x, u: a * x + b * u,
        lambda t, x, u: g * x + d * u,
        controls=control.Unbounded(1),
        horizon=T,
        terminal=lambda x: h * x[..., 0] ** 2,
        running_cost=lambda t, x, u: q * x[..., 0] ** 2 + r * u[..., 0] ** 2,
        box=kolmo.Box(-5.0, 5.0),
    )
    at = np.array([-1.399025, 0.264026])
    opt = control.solve_hjb(cp, at=at, rtol=1e-5)
    assert opt.status == "converged"
    assert "monotone" not in opt.message
    np.testing.assert_allclose(opt(at), P * at**2, rtol=1e-6)
