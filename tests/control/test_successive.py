"""Successive approximations reach what gradient training reaches, fall at every step, and know their bounds."""

import sys

import numpy as np
import pytest
import torch

import kolmo
from kolmo import InputError, control

LAYERS = 4


def double_well(push, start=None):
    """Steering over a barrier with one constant drift per layer; noise grows with the push."""
    layer = lambda t: push[min(int(t * LAYERS), LAYERS - 1)]  # noqa: E731
    sde = kolmo.SDE(
        lambda t, x: 2.0 * (x - x**3) + layer(t),
        lambda t, x: 0.5 + 0.1 * layer(t) ** 2 + 0.0 * x[..., 0],
        dim=1,
        breakpoints=[k / LAYERS for k in range(1, LAYERS)],
        arrays="torch",
    )
    problem = kolmo.KolmogorovProblem(
        sde,
        lambda x: (x[..., 0] - 1.0) ** 2,
        1.0,
        kolmo.Box(-3.0, 3.0, "reflecting"),
        source=lambda t, x: 0.2 * layer(t) ** 2 + 0.0 * x[..., 0],
    )
    return problem, kolmo.solve(problem, grid=41, steps=8, scheme="central4").discretization


def test_it_arrives_where_gradients_arrive():
    points, weights = [-1.2, -1.0, -0.7], [0.3, 0.4, 0.3]
    by_gradient = torch.zeros(LAYERS, dtype=torch.float64, requires_grad=True)
    problem, recipe = double_well(by_gradient)
    fit = control.minimize(lambda: control.expected_value(problem, points, weights, discretization=recipe), by_gradient)
    push = torch.zeros(LAYERS, dtype=torch.float64, requires_grad=True)
    problem, recipe = double_well(push)
    found = control.successive(problem, points, push, weights, discretization=recipe)
    assert found.status == "converged"
    assert found.fun == pytest.approx(fit.fun, rel=1e-7)
    np.testing.assert_allclose(push.detach(), by_gradient.detach(), atol=2e-4)
    assert (np.diff(found.history["objective"]) < 0).all()
    assert found.nit == len(found.history["objective"]) < 60


def test_the_hamiltonian_has_the_gradient_of_the_value():
    from kolmo.control.successive import _Game

    push = torch.tensor([0.3, -0.2, 0.5, 0.1], dtype=torch.float64, requires_grad=True)
    problem, recipe = double_well(push)
    points = torch.tensor([[-1.0], [0.4]], dtype=torch.float64)
    wanted = torch.autograd.grad(control.expected_value(problem, points, discretization=recipe), push)[0]
    game = _Game(problem, points, None, recipe)
    found = torch.autograd.grad(game.augmented(game.costate(), 7.0)(), push)[0]
    assert torch.allclose(found, wanted, rtol=1e-10)


def test_bounds_hold():
    push = torch.zeros(LAYERS, dtype=torch.float64, requires_grad=True)
    problem, recipe = double_well(push)
    control.successive(problem, [-1.0], push, discretization=recipe, bounds=(-0.5, 0.5), maxiter=5)
    assert push.detach().abs().max() == 0.5


@pytest.mark.parametrize(
    ("how", "argument"), [({"penalty": 0.0}, "penalty"), ({"maxiter": 0}, "maxiter"), ({"bounds": (1, 0)}, "bounds")]
)
def test_bad_input_names_the_argument(how, argument):
    push = torch.zeros(LAYERS, dtype=torch.float64, requires_grad=True)
    problem, recipe = double_well(push)
    with pytest.raises(InputError) as caught:
        control.successive(problem, [-1.0], push, discretization=recipe, **how)
    assert caught.value.argument == argument


def test_the_penalty_rises_where_a_step_does_not_keep_its_promise(monkeypatch):
    """Hardly held, the first step goes far beyond where the Hamiltonian is of use; the penalty ends that."""
    successive, calls = sys.modules["kolmo.control.successive"], []

    def counted(*given, **options):
        calls.append(1)
        assert len(calls) < 60, "the same step again and again"
        return control.minimize(*given, **options)

    monkeypatch.setattr(successive, "minimize", counted)
    push = torch.tensor([0.2, -0.3], dtype=torch.float64, requires_grad=True)
    layer = lambda t: push[int(t >= 0.5)]  # noqa: E731
    sde = kolmo.SDE(lambda t, x: layer(t) * (1 + 0.3 * x), 0.5, dim=1, breakpoints=[0.5], arrays="torch")
    problem = kolmo.KolmogorovProblem(
        sde,
        lambda x: (x[..., 0] - 1.0) ** 2,
        1.0,
        kolmo.Box(-3.0, 3.0, "reflecting"),
        source=lambda t, x: 0.1 * layer(t) ** 2 + 0.0 * x[..., 0],
    )
    recipe = kolmo.solve(problem, grid=17, steps=4, scheme="central2").discretization
    before = control.expected_value(problem, [-0.5], discretization=recipe).item()
    found = control.successive(problem, [-0.5], push, discretization=recipe, penalty=1e-6, maxiter=1)
    assert found.fun < before
    assert found.history["penalty"][0] > 1e3 * 1e-6
