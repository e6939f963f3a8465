"""Targets inside the box and committors: closed forms, and an independent scheme for Müller and Brown's potential."""

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.special import erfc

import kolmo
from kolmo import catalog, control
from kolmo.control.targets import Target, TargetNodes
from kolmo.errors import InputError
from kolmo.grid import Grid


@pytest.mark.parametrize("name", ["time_to_target", "annulus_committor"])
def test_optima_with_targets(name):
    case = catalog.OPTIMA[name]()
    opt = control.solve_hjb(case.problem, at=case.points, rtol=1e-3)
    assert opt.status == "converged"
    error = np.abs(opt(case.points) - case.exact(0.0, case.points)).max()
    assert error <= opt.error_estimate.max()
    assert error < 1e-4


def test_values_beside_a_curved_boundary_are_those_of_cubic_polynomials():
    """Nodes in the target are filled from outside so that cubics that vanish on the boundary of a half-plane pass."""
    grid = Grid.of(kolmo.Box([-1.0, -1.0], [1.0, 1.0]), [31, 31])
    n = torch.tensor([0.6, 0.8], dtype=torch.float64)
    held = TargetNodes(
        [Target(lambda x: x @ n + 0.13, lambda t, x: x[..., 0] + t)], grid, np.zeros(grid.size, dtype=bool), True
    )
    x = grid.points
    level = x @ n.numpy() + 0.13
    cubic = x[:, 0] + 0.5 + level * (1.0 + x[:, 1] - x[:, 0] ** 2)
    free = np.where(held.inside, 0.0, cubic)
    near = held.inside & (level > -0.1)
    np.testing.assert_allclose((held.filled @ free + held.paid(0.5)[:, 0])[near], cubic[near], atol=1e-9)


@pytest.mark.slow
def test_reaching_a_half_plane_in_time():
    """P(W reaches distance d before T) = erfc(d/√(2T)), across the axes of the grid (reflection principle)."""
    n = torch.tensor([0.6, 0.8], dtype=torch.float64)
    cp = control.ControlProblem(
        lambda t, x, a: 0 * x,
        1.0,
        controls=control.Finite([[0.0]]),
        horizon=0.5,
        terminal=lambda x: 0 * x[..., 0],
        box=kolmo.Box([-2.0, -2.0], [3.0, 3.0], "reflecting"),
        targets=control.Target(lambda x: x @ n + 0.37, 1.0),
    )
    opt = control.solve_hjb(cp, at=[[0.2, 0.1]], rtol=1e-2)
    assert opt.status == "converged"
    assert abs(opt([0.2, 0.1]) - erfc(0.57)) < 1e-3
    assert opt([-1.0, -1.0]) == 1.0


def test_committor_and_rate_with_a_current():
    """Radial in two dimensions: rotation changes neither q nor the rate, though the process has a current."""
    beta, inner, outer = 2.0, 0.5, 1.2
    J = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)
    mass = quad(lambda r: np.exp(beta * r * r / 2) / r, inner, outer)[0]
    rates, at = {}, [[0.8, 0.0], [0.0, -1.0]]
    for speed in (0.0, 1.5):
        q = control.committor(
            kolmo.SDE(lambda t, x, w=speed: -x + w * x @ J.T, (2.0 / beta) ** 0.5, dim=2, arrays="torch"),
            lambda x: x.norm(dim=-1) - inner,
            lambda x: outer - x.norm(dim=-1),
            kolmo.Box([-5.0, -5.0], [5.0, 5.0], "reflecting"),
            density=lambda x: torch.exp(-0.5 * beta * (x * x).sum(-1)),
            at=at,
            rtol=1e-2,
        )
        exact = [quad(lambda r: np.exp(beta * r * r / 2) / r, inner, s)[0] / mass for s in (0.8, 1.0)]
        assert np.abs(q(at) - exact).max() <= q.error_estimate.max()
        rates[speed] = q.rate
        # the flux through a circle is 2πr · (1/β) ρ q', with Z = 2π/β and q' = exp(βr²/2) / (r mass)
        assert abs(q.rate - 1.0 / mass) <= q.rate_error
        assert q.rate_error < 2e-2
    with pytest.raises(InputError, match="current of its own"):
        q.flux([0.8, 0.0])
    assert rates[0.0] == pytest.approx(rates[1.5], rel=1e-2)


A, B, C = (-1.0, -1.0, -6.5, 0.7), (0.0, 0.0, 11.0, 0.6), (-10.0, -10.0, -6.5, 0.7)
D, X, Y = (-200.0, -100.0, -170.0, 15.0), (1.0, 0.0, -0.5, -1.0), (0.0, 0.5, 1.5, 1.0)


def parts(x):
    """The terms of Müller and Brown's potential and their gradients."""
    for a, b, c, d, p, q in zip(A, B, C, D, X, Y, strict=True):
        u, v = x[..., 0] - p, x[..., 1] - q
        e = d * torch.exp(a * u * u + b * u * v + c * v * v)
        yield e, torch.stack([e * (2 * a * u + b * v), e * (b * u + 2 * c * v)], -1)


def test_mueller_brown():
    """Against symmetric five-point differences on 580 × 540 nodes, extrapolated (validation/mueller_brown.py)."""
    temperature, centres = 20.0, torch.tensor([[-0.558, 1.442], [0.623, 0.028]], dtype=torch.float64)
    at = [[-0.8, 0.6], [-0.3, 0.5], [0.0, 0.3], [-0.6, 0.8]]
    q = control.committor(
        kolmo.SDE(lambda t, x: -sum(g for _, g in parts(x)), (2.0 * temperature) ** 0.5, dim=2, arrays="torch"),
        lambda x: (x - centres[0]).norm(dim=-1) - 0.15,
        lambda x: (x - centres[1]).norm(dim=-1) - 0.15,
        kolmo.Box([-1.6, -0.6], [1.3, 2.1], "reflecting"),
        density=lambda x: torch.exp(-sum(e for e, _ in parts(x)) / temperature),
        at=at,
        rtol=1e-4,
    )
    assert q.status == "converged"
    assert q.error_estimate.max() < 1e-4
    np.testing.assert_allclose(q(at), [0.303705, 0.723609, 0.848102, 0.288915], atol=2e-5)
    assert q.rate == pytest.approx(0.607886, abs=1e-5)
    assert q.rate_error < 1e-4
    assert q.flux(at).shape == (4, 2)
    assert not q.flux([0.623, 0.028]).any()


def test_mistakes_are_named():
    everywhere = catalog.OPTIMA["time_to_target"](radius=2.0).problem
    with pytest.raises(InputError, match="target"):
        control.solve_hjb(everywhere, at=[0.5])
