"""Second derivatives are exact: Taylor remainders of order three, symmetry, gradients of gradients, Newton's method."""

import numpy as np
import pytest
import torch

import kolmo
from kolmo import Absorbing, Box, InputError, KolmogorovProblem, Robin, control
from kolmo.steppers.base import STEPPERS


def parameter(*values):
    return torch.tensor(values if len(values) > 1 else values[0], dtype=torch.float64, requires_grad=True)


class Everything:
    """Drift, noise, killing, source, terminal and face data with parameters, in one or two dimensions."""

    def __init__(self, dim=1, clock=0.0):
        self.b, self.s, self.c, self.g = parameter(0.3, -0.8), parameter(0.7, 0.2), parameter(0.4), parameter(0.5, 0.1)
        self.phi, self.edge, self.kappa = parameter(1.3, 0.4), parameter(0.2), parameter(0.6)
        elastic = Robin(lambda t, x: self.kappa**2 + 0 * x[..., 0], lambda t, x: self.edge + clock * t * x[..., 0])
        absorbing = Absorbing(lambda t, x: self.edge**2 * torch.cos(x[..., 0]))
        faces = [(elastic, absorbing), ("reflecting", "open")][:dim]
        self.box = Box([-1.0, 0.0][:dim], [1.5, 2.0][:dim], faces)

        def noise(t, x):
            level = self.s[0] + self.s[1] * torch.sin(x[..., 0] + clock * t)
            if dim == 1:
                return level
            return torch.stack([level, 0.3 * level, 0.0 * level, 0.5 * level**2], -1).reshape(*x.shape[:-1], 2, 2)

        sde = kolmo.SDE(
            lambda t, x: (self.b[0] + self.b[1] ** 3 * x) * (1.0 + clock * t), noise, dim=dim, arrays="torch"
        )
        self.problem = KolmogorovProblem(
            sde,
            lambda x: torch.tanh(self.phi[0] * x[..., 0]) + torch.exp(-self.phi[1] * x.sum(-1)),
            0.3,
            self.box,
            killing=lambda t, x: self.c**2 * x[..., 0] ** 2,
            source=lambda t, x: self.g[0] ** 2 * torch.cos(x[..., 0]) + clock * self.g[1] * t,
        )
        self.parameters = [self.b, self.s, self.c, self.g, self.phi, self.edge, self.kappa]
        self.points = torch.tensor([[-0.9, 0.3], [0.33, 1.1], [1.21, 0.2]], dtype=torch.float64)[:, :dim]

    def recipe(self, scheme, stepper):
        steps = 4 if STEPPERS[stepper].implicit else (300 if self.problem.dim == 1 else 60)
        grid = 13 if self.problem.dim == 1 else 9
        return kolmo.solve(self.problem, grid=grid, steps=steps, scheme=scheme, stepper=stepper).discretization

    def objective(self, recipe, **how):
        return lambda: (control.value(self.problem, self.points, discretization=recipe, **how) ** 2).sum()


def remainders(objective, parameters, size=0.1, levels=3, seed=0):
    """|J(θ + εv) − J − ε g·v − ½ ε² v·Hv| for halving ε."""
    generator = torch.Generator().manual_seed(seed)
    v = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in parameters]
    H = control.hessian_product(objective, parameters, v)
    J = objective()
    g = torch.autograd.grad(J, parameters, allow_unused=True)
    first = sum(float((a * b).sum()) for a, b in zip(g, v, strict=True) if a is not None)
    second = sum(float((a * b).sum()) for a, b in zip(H, v, strict=True))
    found = []
    for eps in size * 0.5 ** np.arange(levels):
        with torch.no_grad():
            for p, w in zip(parameters, v, strict=True):
                p.add_(eps * w)
            found.append(abs(float(objective() - J) - eps * first - 0.5 * eps**2 * second))
            for p, w in zip(parameters, v, strict=True):
                p.sub_(eps * w)
    assert second != 0.0
    return np.array(found)


def rates(found):
    return np.log2(found[:-1] / found[1:])


@pytest.mark.parametrize(
    ("scheme", "stepper", "dim", "clock"),
    [
        ("central4", "radau5", 1, 1.0),
        ("central4", "radau3", 1, 0.0),
        ("monotone", "implicit-euler", 1, 1.0),
        ("central6", "rk4", 1, 0.0),
        ("central2", "mcs", 1, 1.0),
        ("central2", "mcs3", 2, 0.0),
        ("central4", "radau5", 2, 0.0),
        ("central4", "exponential", 2, 0.0),
        ("monotone", "rk4", 2, 0.0),
    ],
)
def test_taylor_remainder_has_rate_three(scheme, stepper, dim, clock):
    case = Everything(dim, clock)
    objective = case.objective(case.recipe(scheme, stepper))
    found = rates(remainders(objective, case.parameters, size=0.02))
    assert (np.abs(found - 3.0) < 0.15).all(), found


@pytest.mark.parametrize("scheme", ["central4", "monotone"])
def test_taylor_remainder_of_stationary_problems(scheme):
    b, s, v, g = parameter(0.5), parameter(0.8), parameter(0.3), parameter(1.2)
    box = Box(-1.0, 1.0, [(Absorbing(lambda t, x: v**2 + 0 * x[..., 0]), Robin(0.5, v))])
    sde = kolmo.SDE(lambda t, x: -b * x, lambda t, x: s * (1.0 + 0.2 * x[..., 0] ** 2), dim=1, arrays="torch")
    problem = KolmogorovProblem(
        sde, None, None, box, source=lambda t, x: g * torch.cos(x[..., 0]), killing=lambda t, x: b**2 + 0 * x[..., 0]
    )
    recipe = kolmo.solve(problem, grid=17, scheme=scheme).discretization
    x = torch.tensor([[-0.8], [0.1], [0.9]], dtype=torch.float64)
    found = rates(remainders(lambda: control.value(problem, x, discretization=recipe).sum(), [b, s, v, g], size=0.05))
    assert (np.abs(found - 3.0) < 0.15).all(), found


def test_the_hessian_is_symmetric_and_the_same_under_checkpoints():
    case = Everything(clock=1.0)
    recipe = case.recipe("central4", "radau3")
    generator = torch.Generator().manual_seed(1)
    v, w = ([torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in case.parameters] for _ in range(2))

    def inner(a, b):
        return sum(float((p * q).sum()) for p, q in zip(a, b, strict=True))

    of_v, of_w = (control.hessian_product(case.objective(recipe), case.parameters, d) for d in (v, w))
    assert inner(w, of_v) == pytest.approx(inner(v, of_w), rel=1e-10)
    again = control.hessian_product(case.objective(recipe, checkpoints=2), case.parameters, v)
    assert inner(w, again) == pytest.approx(inner(w, of_v), rel=1e-10)


def test_gradgradcheck():
    """torch's own check of all second derivatives, the mixed ones with the points among them."""
    case = Everything()
    recipe = case.recipe("central4", "radau3")

    def function(b, s, edge, x):
        case.b, case.s, case.edge = b, s, edge
        return control.value(case.problem, x, discretization=recipe)

    x = torch.tensor([[-0.53], [0.71]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(function, (case.b, case.s, case.edge, x), atol=1e-6, rtol=1e-5)


def test_semi_lagrangian_steps_say_that_they_have_no_second_derivative():
    speed = parameter(0.4)
    sde = kolmo.SDE(lambda t, x: speed * x, 0.1, dim=1, arrays="torch")
    problem = KolmogorovProblem(sde, lambda x: x[..., 0] ** 2, 0.5, Box(-2.0, 2.0))
    recipe = kolmo.solve(problem, grid=33, steps=4, stepper="semi-lagrangian").discretization
    with pytest.raises(InputError, match="second derivatives"):
        control.hessian_product(
            lambda: control.value(problem, [0.3], discretization=recipe).sum(), speed, [torch.tensor(1.0)]
        )


def test_newton_takes_few_steps_through_the_equation():
    """Mean and variance of an Ornstein–Uhlenbeck process, matched exactly by two of its parameters."""
    kappa, level = parameter(0.5), parameter(-0.2)
    sde = kolmo.SDE(lambda t, x: -kappa * (x - level), 0.6, dim=1, arrays="torch")
    problem = KolmogorovProblem(sde, lambda x: torch.cat([x, x**2], -1), 1.0)
    recipe = kolmo.plan(problem.handing("torch"), at=[1.0], rtol=1e-5)
    mean = 0.4 + 0.6 * np.exp(-1.3)
    wanted = torch.tensor([mean, mean**2 + 0.36 * (1 - np.exp(-2.6)) / 2.6], dtype=torch.float64)

    def misfit():
        return ((control.value(problem, [1.0], discretization=recipe) - wanted) ** 2).sum()

    fit = control.minimize(misfit, [kappa, level], method="trust-ncg")
    assert fit.nit <= 20
    np.testing.assert_allclose([kappa.item(), level.item()], [1.3, 0.4], atol=1e-3)
