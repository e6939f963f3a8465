"""Values of many problems: those of control.value, with its gradients."""

import numpy as np
import pytest
import torch

import kolmo
from kolmo import control

AT = torch.linspace(-0.8, 0.8, 4, dtype=torch.float64)


def problem(theta, box=None):
    """Drift, noise, killing, source, φ and what a wall pays: each has its parameter."""
    a, s, c, g, m, paid = theta
    sde = kolmo.SDE(lambda t, x: -a * x + 0.1 * torch.sin(x), diffusion=lambda t, x: s + 0.1 * torch.cos(m * x))
    if box is None:
        box = kolmo.Box(-1.5, 1.5, [("reflecting", kolmo.Absorbing(paid))])

    def data(x):
        return paid + torch.sin(m * (x[..., 0] - 1.5)) * (x[..., 0] - 1.5) ** 2

    return kolmo.KolmogorovProblem(
        sde, data, 0.7, box, killing=lambda t, x: c * x[..., 0] ** 2, source=lambda t, x: g * torch.cos(x[..., 0])
    )


def parameters(seed, count):
    rng = np.random.default_rng(seed)
    return torch.tensor(rng.uniform(0.5, 1.0, (count, 6)), requires_grad=True)


@pytest.mark.parametrize("box", [None, kolmo.Box(-1.5, 1.5, "open")])
def test_gradients_are_those_of_control_value(box):
    theta, weights = parameters(1, 7), torch.tensor(np.random.default_rng(2).normal(size=(7, 4)))
    at = AT.clone().requires_grad_()
    problems = [problem(row, box) for row in theta]
    found = kolmo.solve_many(problems, at=AT, rtol=1e-4)
    assert found.stats["together"] == 7
    u = control.values(problems, at, rtol=1e-4, plan=found)
    together = torch.autograd.grad((weights * u).sum(), [theta, at])
    alone = [control.value(p, at, discretization=found[i].discretization) for i, p in enumerate(problems)]
    one_by_one = torch.autograd.grad((weights * torch.stack(alone)).sum(), [theta, at])
    assert torch.allclose(u, torch.stack(alone), atol=1e-11)
    for mine, theirs in zip(together, one_by_one, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-8, atol=1e-10)
    assert bool((together[0].abs().sum(0) > 0)[:5].all())


def test_taylor_remainders_are_of_order_two():
    theta, direction = parameters(3, 6), torch.tensor(np.random.default_rng(4).normal(size=(6, 6)))
    plan = kolmo.solve_many([problem(row) for row in theta], at=AT, rtol=1e-4)

    def objective(there):
        return (control.values([problem(row) for row in there], AT, rtol=1e-4, plan=plan) ** 2).sum()

    J = objective(theta)
    (gradient,) = torch.autograd.grad(J, theta)
    slope = float((gradient * direction).sum())
    steps = [8e-3, 4e-3, 2e-3]
    with torch.no_grad():
        rests = [abs(float(objective(theta + h * direction)) - float(J) - h * slope) for h in steps]
    rates = np.log2(np.array(rests[:-1]) / rests[1:])
    assert (rates > 1.85).all()


def test_problems_that_are_solved_alone_have_their_gradients_too():
    theta = parameters(5, 5)
    problems = [problem(row) for row in theta]
    timed = kolmo.SDE(lambda t, x: -theta[4, 0] * x + t, diffusion=0.5, dim=1)
    problems[4] = kolmo.KolmogorovProblem(timed, lambda x: torch.sin(x[..., 0]), 0.7)
    u = control.values(problems, AT, rtol=1e-4)
    (gradient,) = torch.autograd.grad(u.sum(), theta)
    assert bool((gradient[:, 0] != 0.0).all())
    with pytest.raises(kolmo.InputError, match="problems"):
        control.values([], AT)
