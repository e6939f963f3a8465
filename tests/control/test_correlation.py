"""A correlation that happens to be zero still has its derivative."""

import pytest
import torch

import kolmo
from kolmo import control


@pytest.mark.parametrize("form", ["covariance", "diffusion"])
@pytest.mark.parametrize("stepper", ["radau5", "mcs3", "rk4"])
def test_the_derivative_at_no_correlation(form, stepper):
    """E X Y of correlated Brownian motions is ρT."""
    rho = torch.tensor(0.0, dtype=torch.float64, requires_grad=True)

    def noise(t, x):
        one = torch.ones_like(x[..., 0])
        entries = [one, rho * one, rho * one, one] if form == "covariance" else [one, 0 * one, rho * one, one]
        return torch.stack(entries, -1).reshape(*x.shape, 2)

    sde = kolmo.SDE(0.0, **{form: noise}, dim=2, arrays="torch")
    box = kolmo.Box([-4.0, -4.0], [4.0, 4.0])
    problem = kolmo.KolmogorovProblem(sde, lambda x: x[..., 0] * x[..., 1], 0.3, box)
    steps = 20 if stepper == "rk4" else 3
    recipe = kolmo.solve(problem, grid=17, steps=steps, scheme="central4", stepper=stepper).discretization
    u = control.value(problem, [[0.0, 0.0]], discretization=recipe).sum()
    assert torch.autograd.grad(u, rho)[0].item() == pytest.approx(0.3, rel=1e-6)
    law = control.law(problem, [0.0, 0.0], discretization=recipe)
    moment = law.expectation(lambda x: x[..., 0] * x[..., 1])
    assert torch.autograd.grad(moment, rho)[0].item() == pytest.approx(0.3, rel=1e-6)


def test_diagonal_noise_pays_nothing_for_it():
    from kolmo.control.adjoint import differentiable_march

    s = torch.tensor([0.5, 0.8], dtype=torch.float64, requires_grad=True)
    sde = kolmo.SDE(0.0, lambda t, x: s * (1.0 + x**2), dim=2, arrays="torch")
    problem = kolmo.KolmogorovProblem(sde, lambda x: x[..., 0], 0.3, kolmo.Box([-1.0] * 2, [1.0] * 2))
    recipe = kolmo.solve(problem, grid=9, steps=2, scheme="central4", stepper="radau5").discretization
    assert differentiable_march(problem, recipe).generator.stencil.pairs == []
