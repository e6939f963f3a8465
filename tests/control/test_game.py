"""Two players: saddle points node by node, closed forms of games."""

import numpy as np
import pytest
import torch

import kolmo
from kolmo import catalog, control
from kolmo.errors import InputError


def test_linear_quadratic_game():
    case = catalog.OPTIMA["linear_quadratic_game"]()
    opt = control.solve_hjb(case.problem, at=case.points, rtol=1e-4)
    assert opt.status == "converged"
    error = np.abs(opt(case.points) - case.exact(0.0, case.points)).max()
    assert error <= opt.error_estimate.max()
    assert error < 1e-6
    # u = −b₁ V'/r and w = b₂ V'/γ
    slope = opt.gradient(case.points)[:, 0]
    np.testing.assert_allclose(opt.policy(0.0, case.points), np.stack([-1.5 * slope, 0.7 / 3.0 * slope], -1), rtol=1e-5)


@pytest.mark.parametrize(
    "evader", [control.Interval(-1.0, 1.0), pytest.param(control.Finite([-1.0, 1.0]), marks=pytest.mark.slow)]
)
def test_bounded_pursuit_is_steering_with_the_difference_of_speeds(evader):
    def solved(drift, controls, rtol):
        cp = control.ControlProblem(
            drift, 1.0, controls=controls, horizon=1.0, terminal=lambda x: x[..., 0] ** 2, box=kolmo.Box(-8.0, 8.0)
        )
        return control.solve_hjb(cp, at=[0.2, 0.8], rtol=rtol)

    both = control.Game(control.Interval(-1.0, 1.0), evader)
    game = solved(lambda t, x, a: a[..., :1] + 0.4 * a[..., 1:], both, 1e-3)
    alone = solved(lambda t, x, a: 0.6 * a, control.Interval(-1.0, 1.0), 1e-4)
    np.testing.assert_allclose(game([0.2, 0.8]), alone([0.2, 0.8]), rtol=1e-3)
    assert game.policy(0.0, [0.8]).reshape(-1).tolist() == [-1.0, 1.0]


@pytest.mark.parametrize("seed", range(3))
def test_saddle_points_with_bounds(seed):
    """Convex–concave and coupled: no player gains by moving alone."""
    rng, n = np.random.default_rng(seed), 50
    game = control.Game(control.BoxSet([-1.0, -0.5], [1.0, 0.5]), control.Interval(-0.7, 0.9))
    H = rng.normal(size=(n, 3, 3))
    H = H + np.swapaxes(H, 1, 2)
    H[:, :2, :2] = H[:, :2, :2] @ np.swapaxes(H[:, :2, :2], 1, 2) + 0.1 * np.eye(2)
    H[:, 2, 2] = -np.abs(H[:, 2, 2]) - 0.1
    h = rng.normal(size=(n, 3))
    s, found = game.minimize_quadratic(h, H, np.zeros((n, 3)), np.zeros(3), np.ones(3))

    def value(p):
        return np.einsum("ni,ni->n", h, p) + 0.5 * np.einsum("ni,nij,nj->n", p, H, p)

    assert found.all()
    for _ in range(200):
        other = np.stack([rng.uniform(-1, 1, n), rng.uniform(-0.5, 0.5, n), rng.uniform(-0.7, 0.9, n)], -1)
        first, second = np.where([True, True, False], other, s), np.where([False, False, True], other, s)
        assert (value(first) >= value(s) - 1e-9).all()
        assert (value(second) <= value(s) + 1e-9).all()
    a = torch.as_tensor(s)
    choice = game.minimize(
        lambda p: (torch.as_tensor(h) * p).sum(-1) + 0.5 * torch.einsum("ni,nij,nj->n", p, torch.as_tensor(H), p),
        torch.zeros_like(a),
    )
    np.testing.assert_allclose(choice.a, s, atol=1e-8)


def test_mistakes_are_named():
    with pytest.raises(InputError, match="maximizer"):
        control.Game(control.Interval(-1.0, 1.0), 3.0)
    with pytest.raises(InputError, match="first player"):
        control.ControlProblem(
            lambda t, x, a: x,
            1.0,
            controls=control.Game(control.Interval(-1.0, 1.0), control.Interval(-1.0, 1.0)),
            terminal=lambda x: x[..., 0],
            horizon=1.0,
            box=kolmo.Box(-1.0, 1.0),
            sense="max",
        )
