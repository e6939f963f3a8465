"""Closed loops with targets: sampled cost, value of the policy, density and law of arrival agree with the optimum."""

import numpy as np
import pytest
import torch
from scipy.special import erfc

import kolmo
from kolmo import catalog, control
from kolmo.errors import InputError


def chase(d=1, horizon=0.6):
    """Reach a ball with bounded speed in a flow, paying for time and for what is left at the end."""
    flow = 0.8 * torch.tensor([[0.3, 1.0], [-1.0, 0.0]], dtype=torch.float64)[:d, :d]
    return control.ControlProblem(
        lambda t, x, a: x @ flow + 1.2 * a,
        0.5,
        controls=control.BoxSet([-1.0] * d, [1.0] * d),
        terminal=lambda x: 0.6 + 0.0 * x[..., 0],
        running_cost=1.0,
        horizon=horizon,
        box=kolmo.Box([-1.5] * d, [1.5] * d, "reflecting"),
        targets=control.Target(lambda x: x.norm(dim=-1) - 0.4, lambda t, x: 0.1 + 0.1 * x[..., 0]),
    )


@pytest.mark.parametrize("name", ["time_to_target", pytest.param("annulus_committor", marks=pytest.mark.slow)])
def test_paths_are_stopped_in_targets(name):
    case = catalog.OPTIMA[name]()
    opt = control.solve_hjb(case.problem, at=case.points, rtol=1e-2)
    paths = kolmo.monte_carlo(opt.closed_loop(), case.points, paths=1000, steps=100, rng=3)
    exact = case.exact(0.0, case.points)
    assert (np.abs(paths.mean - exact) < 4.0 * paths.standard_error + paths.bias_estimate + 1e-2 * exact).all()
    assert (paths.standard_error < 0.05).all()


@pytest.mark.parametrize(("d", "rtol"), [(1, 1e-2), pytest.param(2, 3e-2, marks=pytest.mark.slow)])
def test_optimum_policy_paths_and_law_agree(d, rtol):
    cp, x = chase(d), np.array([[0.8, 0.1]])[:, :d]
    opt = control.solve_hjb(cp, at=x, rtol=rtol, max_seconds=300)
    under = cp.under(opt.policy)
    # a jump of the policy is one of a linear equation, for which nodes do not crowd: to a smaller tolerance
    followed = control.solve_hjb(under, at=x, rtol=0.1 * rtol, max_seconds=300)
    bound = opt.error_estimate.max() + followed.error_estimate.max()
    assert bound < 0.05
    assert np.abs(followed(x) - opt(x)).max() <= bound
    paths = kolmo.monte_carlo(opt.closed_loop(), x, paths=1000, steps=30, rng=0)
    assert abs(paths.mean[0] - opt(x)[0]) < 4.0 * paths.standard_error[0] + paths.bias_estimate[0] + bound
    law = control.arrival(under, x[0], grid=opt.grid, steps=12)
    np.testing.assert_allclose(law.mass + law.reached.sum(1), 1.0, atol=1e-9)
    reached = kolmo.monte_carlo(
        under.reaching().closed_loop(lambda t, y: 0.0 * y[..., 0]), x, paths=1000, steps=30, rng=1
    )
    slack = 4.0 * reached.standard_error[0] + reached.bias_estimate[0] + 1e-2
    assert abs(law.reached[-1, 0] - reached.mean[0]) < slack
    assert 0.2 < law.reached[-1, 0] < 0.95


def test_the_law_of_arrival_of_brownian_motion():
    """Reflection principle: P(W reaches the distance d before t) = erfc(d/√(2t)); the density by images."""
    cp = control.ControlProblem(
        lambda t, x, a: 0.0 * x,
        1.0,
        controls=control.Finite([[0.0]]),
        horizon=0.5,
        terminal=lambda x: 0.0 * x[..., 0],
        box=kolmo.Box(-5.0, 1.0),
        targets=control.Target(lambda x: 0.437 - x[..., 0], 1.0),
    )
    law = control.arrival(cp, [0.0], grid=241, steps=60)
    late = law.times > 0.05
    exact = erfc(0.437 / np.sqrt(2.0 * law.times[late]))
    np.testing.assert_allclose(law.reached[late, 0], exact, atol=2e-4)
    x = np.array([-0.7, 0.0, 0.3])
    images = (np.exp(-(x**2)) - np.exp(-((x - 0.874) ** 2))) / np.sqrt(np.pi)
    np.testing.assert_allclose(law(x, 0.5), images, atol=2e-3)
    # the touch of a Brownian bridge is exact however long the steps are
    paths = kolmo.monte_carlo(cp.closed_loop(cp.constant(0.0)), [0.0], paths=20_000, steps=4, rng=0)
    assert abs(paths.mean - erfc(0.437)) < 4.0 * paths.standard_error
    assert paths.standard_error < 5e-3


def test_what_knows_nothing_of_targets_says_so():
    cp = chase(2)
    loop = cp.closed_loop(lambda t, x: 0.0 * x)
    with pytest.raises(InputError, match="targets inside the box"):
        kolmo.solve(loop, at=[[0.8, 0.1]], rtol=1e-2)
    with pytest.raises(InputError, match="nothing to choose"):
        control.arrival(cp, [0.8, 0.1], grid=31, steps=5)
    under = cp.under(lambda t, x: 0.0 * x)
    with pytest.raises(InputError, match="outside the targets"):
        control.arrival(under, [0.1, 0.1], grid=31, steps=5)
    with pytest.raises(InputError, match="one of 1 targets"):
        cp.reaching(1)
