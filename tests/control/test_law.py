"""control.law: the numbers of solve_forward, with exact gradients, and likelihoods that textbooks know."""

import itertools

import numpy as np
import pytest
import torch

import kolmo
from kolmo import Absorbing, Box, InputError, Robin, control
from kolmo.forward import solve_forward
from kolmo.steppers.base import STEPPERS


def parameter(*values):
    return torch.tensor(values if len(values) > 1 else values[0], dtype=torch.float64, requires_grad=True)


class Leaving:
    """A process that leaves through an absorbing face, an elastic one and by killing; in time-dependent ways."""

    def __init__(self, clock=1.0):
        self.b, self.s, self.c, self.kappa = parameter(0.5, -0.4), parameter(0.6, 0.15), parameter(0.5), parameter(0.7)
        elastic = Robin(lambda t, x: self.kappa * (1.0 + clock * t) + 0 * x[..., 0], 0.3)
        self.box = Box(-1.0, 1.5, [(elastic, Absorbing(0.2))])
        sde = kolmo.SDE(
            lambda t, x: (self.b[0] + self.b[1] * x) * (1.0 + clock * t),
            lambda t, x: self.s[0] + self.s[1] * torch.sin(x[..., 0] + clock * t),
            dim=1,
            arrays="torch",
        )
        self.problem = kolmo.KolmogorovProblem(
            sde, lambda x: torch.cos(x[..., 0]), 0.4, self.box, killing=lambda t, x: self.c * x[..., 0] ** 2
        )
        self.parameters = [self.b, self.s, self.c, self.kappa]

    def recipe(self, scheme, stepper):
        steps = 6 if STEPPERS[stepper].implicit else 400
        found = kolmo.solve(self.problem, grid=17, steps=steps, scheme=scheme, stepper=stepper, save=[0.2])
        return found.discretization


@pytest.mark.parametrize("stepper", ["radau3", "implicit-euler", "mcs3"])
def test_the_numbers_are_those_of_solve_forward(stepper):
    case = Leaving()
    recipe = case.recipe("central4", stepper)
    mine = control.law(case.problem, [0.1, 0.6], discretization=recipe, save=[0.2])
    density = solve_forward(case.problem, [0.1, 0.6], discretization=recipe, save=[0.2])
    x = np.array([-0.4, 0.2, 0.9])
    for t in (0.2, 0.4):
        np.testing.assert_allclose(mine(x, t).detach(), density(x, t), rtol=1e-12, atol=1e-13)
    for face in ((0, 0), "high", "killing"):
        np.testing.assert_allclose(mine.flux(face).detach(), density.exit_flux(face), rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(mine.exited(face).detach(), density.exited(face), rtol=1e-9, atol=1e-13)
    assert mine.mass().item() == pytest.approx(density.mass[-1], rel=1e-12)
    moment = density.expectation(lambda x: x[..., 0] ** 2)
    assert mine.expectation(lambda x: x[..., 0] ** 2).item() == pytest.approx(moment, rel=1e-12)


@pytest.mark.parametrize(
    ("scheme", "stepper"), [("central4", "radau3"), ("monotone", "implicit-euler"), ("central2", "mcs3")]
)
def test_gradients_are_exact(scheme, stepper):
    case = Leaving(clock=1.0 if scheme == "central4" else 0.0)
    recipe = case.recipe(scheme, stepper)

    def function(b, s, c, kappa, start):
        case.b, case.s, case.c, case.kappa = b, s, c, kappa
        law = control.law(case.problem, start, discretization=recipe, save=[0.2])
        return (
            law([-0.3, 0.7], 0.2),
            law([0.1]),
            law.first_passage([0.17, 0.33], "high"),
            law.flux("low")[::3],
            *gone(law),
        )

    def gone(law):
        return [law.gone(face)[::2] for face in ((0, 0), "high", "killing")]

    start = torch.tensor([[0.07], [0.61]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, (*case.parameters, start), eps=1e-6, atol=1e-7, rtol=1e-5)


def test_gradients_of_transition_densities_in_two_dimensions():
    root, b = parameter(0.8, 0.2, 0.1, 0.6), parameter(0.5, -0.4)
    sde = kolmo.SDE(
        lambda t, x: b * torch.sin(x), lambda t, x: root.reshape(2, 2) + 0.0 * x[..., None], dim=2, arrays="torch"
    )
    problem = kolmo.KolmogorovProblem(sde, lambda x: x[..., 0], 0.3, Box([-3.0] * 2, [3.0] * 2))
    recipe = kolmo.solve(problem, grid=15, steps=3, scheme="central4").discretization
    x = torch.tensor([[0.1, 0.4], [-0.3, 0.2]], dtype=torch.float64)

    def function(root_, b_, y):
        root.data, b.data = root_.data, b_.data
        return control.transition_density(problem, x, y, discretization=recipe)

    y = torch.tensor([[0.3, 0.2], [-0.6, 0.5]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda y: function(root, b, y), (y,), atol=1e-7)
    loss = function(root, b, y).log().sum()
    g = torch.autograd.grad(loss, [root, b])
    for p, gradient in zip((root, b), g, strict=True):
        for i in range(len(p)):
            values = []
            for eps in (1e-5, -1e-5):
                with torch.no_grad():
                    p[i] += eps
                    values.append(function(root, b, y).log().sum().item())
                    p[i] -= eps
            assert gradient[i].item() == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-5, abs=1e-7)


def test_first_passage_of_brownian_motion_with_drift():
    """Inverse Gaussian law (Schrödinger 1915) and the gradient of its likelihood."""
    mu, sigma = parameter(0.8), parameter(0.9)
    sde = kolmo.SDE(lambda t, x: mu + 0 * x, lambda t, x: sigma + 0 * x[..., 0], dim=1, arrays="torch")
    box = Box(-6.0, 1.0, [("open", "absorbing")])
    problem = kolmo.KolmogorovProblem(sde, lambda x: 0 * x[..., 0], 3.0, box)
    t = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    found = control.law(problem, [0.0], grid=161, steps=40).first_passage(t, "high")
    exact = torch.exp(-((1 - mu * t) ** 2) / (2 * sigma**2 * t)) / (sigma * torch.sqrt(2 * torch.pi * t**3))
    np.testing.assert_allclose(found.detach(), exact.detach(), rtol=5e-4)
    got, wanted = (torch.autograd.grad(v.log().sum(), [mu, sigma]) for v in (found, exact))
    np.testing.assert_allclose(np.array(got), np.array(wanted), rtol=1e-3)


def test_maximum_likelihood_finds_the_estimate_in_closed_form():
    """Transitions of an Ornstein–Uhlenbeck process: its likelihood is that of an autoregression."""
    rng, dt = np.random.default_rng(0), 0.5
    x = np.zeros(201)
    for k in range(200):
        x[k + 1] = np.exp(-dt) * x[k] + np.sqrt((1 - np.exp(-2 * dt)) / 2) * rng.standard_normal()
    kappa, sigma = parameter(0.6), parameter(0.8)
    sde = kolmo.SDE(lambda t, x: -kappa * x, lambda t, x: sigma + 0 * x[..., 0], dim=1, arrays="torch")
    problem = kolmo.KolmogorovProblem(sde, lambda x: x[..., 0], dt, Box(-5.0, 5.0))
    recipe = kolmo.solve(problem, grid=121, steps=8).discretization

    def misfit():
        return -control.transition_density(problem, x[:-1], x[1:], discretization=recipe).log().mean()

    control.minimize(misfit, [kappa, sigma])
    slope = (x[:-1] @ x[1:]) / (x[:-1] @ x[:-1])
    exact = -np.log(slope) / dt
    variance = np.mean((x[1:] - slope * x[:-1]) ** 2)
    assert kappa.item() == pytest.approx(exact, rel=2e-4)
    assert sigma.item() == pytest.approx(np.sqrt(2 * exact * variance / (1 - slope**2)), rel=2e-4)


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda p, r: control.law(p, [0.1], discretization=r, save=[0.123]), "save"),
        (lambda p, r: control.law(p, [0.1], discretization=r, save=[9.0]), "save"),
        (lambda p, r: control.law(p, [], discretization=r), "initial"),
        (lambda p, r: control.law(p, lambda x: torch.ones(3), discretization=r), "initial"),
        (lambda p, r: control.law(p, lambda x: x), "discretization"),
        (lambda p, r: control.law(p, [0.1], discretization=r, grid=9), "discretization, grid, steps"),
        (lambda p, r: control.law(p, [0.1], discretization=r)([0.1], 0.2), "t"),
        (lambda p, r: control.law(p, [0.1], discretization=r).flux((3, 0)), "face"),
        (lambda p, r: control.law(p, [0.1], discretization=r).first_passage([0.5], "high"), "times"),
        (lambda p, r: control.transition_density(p, [0.1], [0.1, 0.2], discretization=r), "y"),
    ],
)
def test_bad_input_names_the_argument(call, argument):
    case = Leaving()
    recipe = case.recipe("central2", "radau3")
    with pytest.raises(InputError) as caught:
        call(case.problem, recipe)
    assert caught.value.argument == argument


def test_every_probability_leaves_through_one_face():
    """At a corner of two absorbing faces the later axis takes what leaves, as in solve_forward: nothing twice."""
    # correlated noise joins the corners to nodes inside
    sde = kolmo.SDE(lambda t, x: 0.3 * x, covariance=np.array([[0.6, 0.4], [0.4, 0.6]]), dim=2, arrays="torch")
    problem = kolmo.KolmogorovProblem(sde, lambda x: x[..., 0], 0.3, Box([-1.0, -1.0], [1.0, 1.0], "absorbing"))
    recipe = kolmo.solve(problem, grid=(9, 9), steps=8, scheme="monotone", stepper="implicit-euler").discretization
    mine = control.law(problem, [[0.5, 0.6]], discretization=recipe)
    density = solve_forward(problem, [[0.5, 0.6]], discretization=recipe)
    for face in itertools.product((0, 1), (0, 1)):
        np.testing.assert_allclose(mine.flux(face).detach(), density.exit_flux(face), rtol=1e-10, atol=1e-13)
    assert mine.flux((0, 1)).max() > 0.1


@pytest.mark.parametrize("seed", range(4))
def test_what_has_gone_and_what_is_left_sum_to_one(seed):
    rng = np.random.default_rng(seed)
    faces = [tuple(rng.choice(["absorbing", "reflecting"], 2)) for _ in range(2)]
    faces[0] = ("absorbing", faces[0][1])
    A, root = rng.standard_normal((2, 2)), rng.standard_normal((2, 2)) + 1.5 * np.eye(2)
    sde = kolmo.SDE(lambda t, x: x @ torch.as_tensor(A.T), covariance=root @ root.T, dim=2, arrays="torch")
    events = {0.1: lambda x: 1.1 * x} if seed % 2 else None
    problem = kolmo.KolmogorovProblem(
        sde, lambda x: 0.0 * x[..., 0], 0.2, Box([-1.0, -1.0], [1.0, 1.0], faces), events=events
    )
    law = control.law(problem, [0.2, -0.1], grid=[14, 15], steps=6)
    gone = sum(law.exited(face)[-1] for face in law.exits)
    assert (gone + law.mass()).item() == pytest.approx(1.0, abs=1e-11)
