"""The optimum, its policy as a plain problem, and its policy between nodes and at faces."""

import numpy as np
import pytest
import torch

import kolmo
from kolmo import control


def steering(controls=None, **change):
    given = {
        "controls": controls or control.Interval(-1.0, 1.0),
        "terminal": lambda x: (x[..., 0] - 0.3).abs(),
        "horizon": 1.0,
        "box": kolmo.Box.unbounded(1),
    }
    return control.ControlProblem(lambda t, x, a: 1.5 * a, 0.6, **(given | change))


def quadratic():
    """V = p x² + s with p' = q − p²/r …: a = −p x / r at all times (linear-quadratic regulator)."""
    return control.ControlProblem(
        lambda t, x, a: 0.4 * x + a,
        0.5,
        controls=control.Unbounded(1),
        terminal=lambda x: 2.0 * x[..., 0] ** 2,
        horizon=1.0,
        running_cost=lambda t, x, a: x[..., 0] ** 2 + 0.5 * a[..., 0] ** 2,
        box=kolmo.Box.unbounded(1),
    )


def gain(t):
    from scipy.integrate import solve_ivp

    rate = lambda s, p: 1.0 + 0.8 * p - 2.0 * p**2  # noqa: E731 - a = −2 p x
    return 2.0 * solve_ivp(rate, (0.0, 1.0 - t), [2.0], rtol=1e-10, atol=1e-12).y[0, -1]


@pytest.mark.parametrize(
    "problem",
    [
        pytest.param(steering(), marks=pytest.mark.slow),
        pytest.param(steering(control.Finite([-1.0, 0.0, 1.0])), marks=pytest.mark.slow),
        quadratic(),
    ],
)
def test_the_value_of_the_policy_is_the_optimum(problem):
    x = np.array([-0.2, 0.5])
    opt = control.solve_hjb(problem, at=x, rtol=1e-3)
    loop = kolmo.solve(opt.closed_loop(), at=x, rtol=1e-3)
    bound = np.max(opt.error_estimate) + np.max(loop.error_estimate)
    assert np.abs(loop(x) - opt(x)).max() <= bound
    paths = kolmo.monte_carlo(opt.closed_loop(), x, paths=1000, steps=40, rng=1)
    assert (np.abs(paths.mean - opt(x)) < 4.0 * paths.standard_error + 1e-2).all()


def test_policies_between_nodes_and_times_are_as_good_as_the_gradient():
    opt = control.solve_hjb(quadratic(), at=[0.0, 0.8], rtol=1e-5)
    x = np.array([-0.71, 0.05, 0.333, 0.8])
    for t in (0.0, 0.137, 0.5, 0.811):
        np.testing.assert_allclose(opt.policy(t, x)[:, 0], -gain(t) * x, atol=2e-4)
    # far fewer steps than nodes, yet the value is good at all times
    assert len(opt.times) < 40


def test_a_policy_that_switches_does_so_at_once():
    opt = control.solve_hjb(steering(), at=[0.0, 0.5], rtol=1e-4)
    x = 0.3 + np.array([-1e-3, 1e-3])
    np.testing.assert_array_equal(opt.policy(0.41, x)[:, 0], [1.0, -1.0])


def test_policies_at_faces_and_beyond():
    cp = control.ControlProblem(
        lambda t, x, a: a,
        0.5,
        controls=control.Interval(-1.0, 1.0),
        terminal=None,
        horizon=None,
        box=kolmo.Box(-1.0, 1.0, boundary="absorbing"),
        running_cost=1.0,
    )
    opt = control.solve_hjb(cp, at=[0.2], rtol=1e-3)
    policy = opt.policy(0.0, [-1.5, -1.0, 1.0, 1.5])[:, 0]
    np.testing.assert_allclose(policy, [-1.0, -1.0, 1.0, 1.0], rtol=1e-14)


def test_the_policy_as_a_module_and_as_a_table():
    opt = control.solve_hjb(steering(), at=[0.0], rtol=1e-2)
    module = opt.module()
    x = torch.tensor([[0.0], [0.9]], dtype=torch.float32)
    assert module(0.2, x).dtype == torch.float32
    assert module(0.2, x).reshape(-1).tolist() == [1.0, -1.0]
    xarray = pytest.importorskip("xarray")
    table = opt.to_xarray()
    assert isinstance(table, xarray.Dataset)
    assert dict(table.sizes) == {"t": len(opt.times), "x": opt.grid.size, "control": 1}
    assert float(table["value"].interp(t=0.0, x=0.1)) == pytest.approx(opt([0.1]).item(), rel=1e-2)
