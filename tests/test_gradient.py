"""The gradient of control.value: exact for the number returned, whatever it is taken with respect to."""

import itertools

import numpy as np
import pytest
import torch

from kolmo import SDE, Absorbing, Box, Grid, InputError, KolmogorovProblem, Robin, solve
from kolmo.control import value
from kolmo.grid.grading import Sinh
from kolmo.schemes.base import SCHEMES
from kolmo.steppers.base import STEPPERS
from kolmo.testing import taylor_test


def parameter(*values):
    return torch.tensor(values if len(values) > 1 else values[0], dtype=torch.float64, requires_grad=True)


class Everything:
    """A problem in one dimension with a parameter in every place one can be."""

    def __init__(self, faces="robin", layers=False, noise="diffusion", clock=1.0):
        self.b, self.s, self.c, self.g = parameter(0.3, -0.8), parameter(0.7, 0.2), parameter(0.4), parameter(0.5, 0.1)
        self.phi, self.left, self.right, self.kappa = (
            parameter(1.3, 0.4),
            parameter(0.2),
            parameter(-0.3),
            parameter(0.6),
        )
        low = Robin(
            lambda t, x: self.kappa * (1.0 + clock * t) + 0 * x[..., 0], lambda t, x: self.left + clock * t * x[..., 0]
        )
        high = Absorbing(lambda t, x: self.right * (1.0 + clock * torch.sin(torch.tensor(3.0 * t))) + 0 * x[..., 0])
        pairs = {
            "robin": (low, high),
            "absorbing": (high, low),
            "open": ("open", "open"),
            "reflecting": ("reflecting", "reflecting"),
        }
        self.box = Box(-1.0, 1.5, [pairs[faces]])
        jump = (lambda t: 1.0 if t < 0.1 else -1.5) if layers else (lambda t: 1.0)

        def drift(t, x):
            return (self.b[0] + self.b[1] * x) * jump(t) * (1.0 + clock * t)

        def noisy(t, x):
            return self.s[0] + self.s[1] * torch.sin(x[..., 0] + clock * t)

        sde = SDE(
            drift,
            **({"diffusion": noisy} if noise == "diffusion" else {"covariance": lambda t, x: noisy(t, x) ** 2}),
            dim=1,
            breakpoints=[0.1] if layers else None,
            arrays="torch",
        )
        self.problem = KolmogorovProblem(
            sde,
            lambda x: torch.stack([torch.tanh(self.phi[0] * x[..., 0]), torch.exp(-self.phi[1] * x[..., 0])], -1),
            0.3,
            self.box,
            killing=lambda t, x: self.c * x[..., 0] ** 2,
            source=lambda t, x: self.g[0] * torch.cos(x[..., 0]) + clock * self.g[1] * t,
        )
        self.parameters = [self.b, self.s, self.c, self.g, self.phi, self.left, self.right, self.kappa]

    def used(self, faces):
        return self.parameters if faces in ("robin", "absorbing") else self.parameters[:5]

    def recipe(self, scheme, stepper, graded=False, steps=None):
        grid = Grid.of(self.box, 15, [Sinh(-1.0, 1.5, 0.1, 0.5)]) if graded else 13
        steps = steps or (4 if STEPPERS[stepper].implicit else 300)
        return solve(self.problem, grid=grid, steps=steps, scheme=scheme, stepper=stepper).discretization


X = torch.tensor([[-0.9], [-0.2], [0.33], [1.21]], dtype=torch.float64)


def objective(problem, recipe, x=X):
    weights = torch.linspace(0.5, 1.5, 2 * len(x), dtype=torch.float64).reshape(len(x), 2)
    return lambda: (weights * value(problem, x, discretization=recipe)).sum()


def has_rate_two(table):
    orders = table.column("order")[1:]
    assert (orders > 1.9).all(), f"\n{table}"
    assert np.isfinite(orders).any(), f"a remainder of rounding alone proves nothing\n{table}"


# Methods for problems of a special kind (alternating directions, characteristics) may refuse; these never do.
GENERAL = ("implicit-euler", "radau3", "radau5", "rk4")


COMBINATIONS = [
    pytest.param(scheme, stepper, marks=pytest.mark.slow if scheme == "central4" or stepper == "mcs" else ())
    for scheme, stepper in itertools.product([s for s in SCHEMES if SCHEMES[s].smooth], STEPPERS)
]


@pytest.mark.parametrize(("scheme", "stepper"), COMBINATIONS)
def test_taylor_remainder_over_schemes_and_steppers(scheme, stepper):
    """All parameters at once: drift, noise, killing, source, terminal, absorbing and elastic data and κ."""
    case = Everything(clock=0.0 if stepper == "rk4" else 1.0)
    try:
        recipe = case.recipe(scheme, stepper)
    except InputError as error:
        assert stepper not in GENERAL
        pytest.skip(str(error))
    has_rate_two(taylor_test(objective(case.problem, recipe), case.parameters, levels=4))


@pytest.mark.parametrize("faces", ["open", "reflecting", "absorbing"])
@pytest.mark.parametrize("scheme", ["central6", "monotone"])
def test_taylor_remainder_over_faces(faces, scheme):
    case = Everything(faces)
    recipe = case.recipe(scheme, "radau5", graded=True)
    has_rate_two(taylor_test(objective(case.problem, recipe), case.used(faces), levels=4, seed=1))


@pytest.mark.parametrize("clock", [0.0, 1.0])
@pytest.mark.parametrize("stepper", ["radau5", "mcs3", "rk4"])
def test_taylor_remainder_with_layers(stepper, clock):
    case = Everything(layers=True, noise="covariance", clock=clock)
    recipe = case.recipe("central4", stepper, steps=6 if STEPPERS[stepper].implicit else 120)
    has_rate_two(taylor_test(objective(case.problem, recipe), case.parameters, levels=4))


@pytest.mark.parametrize("name", ["b", "s", "c", "g", "phi", "left", "right", "kappa"])
def test_gradcheck_of_each_parameter(name):
    """torch's own check, entry by entry."""
    case = Everything(layers=True)
    recipe = case.recipe("central4", "radau3", graded=True)
    original = getattr(case, name)

    def function(p):
        setattr(case, name, p)
        return value(case.problem, X, discretization=recipe)

    assert torch.autograd.gradcheck(function, (original,), eps=1e-6, atol=1e-7, rtol=1e-5)


QUICK = [("central6", "rk4"), ("central6", "radau3"), ("central6", "mcs3"), ("central6", "exponential")]


@pytest.mark.parametrize(
    ("scheme", "stepper"),
    [
        pytest.param(
            scheme, stepper, marks=() if stepper == "radau5" or (scheme, stepper) in QUICK else pytest.mark.slow
        )
        for scheme, stepper in itertools.product([s for s in SCHEMES if SCHEMES[s].smooth], STEPPERS)
    ],
)
def test_gradcheck_over_schemes_and_steppers(scheme, stepper):
    """Noise and an absorbing value, by every method; those of a special kind may refuse the walls."""
    case = Everything(clock=0.0 if stepper in ("rk4", "exponential") else 1.0)
    try:
        recipe = case.recipe(scheme, stepper)
    except InputError:
        assert stepper not in GENERAL
        case = Everything("open", clock=0.0)
        recipe = case.recipe(scheme, stepper) if scheme != "monotone" else None
    if recipe is None:
        pytest.skip("neither walls nor a monotone scheme")

    def function(s, phi):
        case.s, case.phi = s, phi
        return objective(case.problem, recipe)()

    assert torch.autograd.gradcheck(function, (case.s, case.phi), eps=1e-6, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("scheme", ["monotone", "central6"])
def test_gradcheck_of_points(scheme):
    """The interpolant's own derivative, next to faces too."""
    case = Everything()
    recipe = case.recipe(scheme, "radau5")
    x = torch.tensor([[-0.97], [-0.2], [0.31], [1.44]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: value(case.problem, x, discretization=recipe), (x,))


@pytest.mark.parametrize(
    ("scheme", "stepper"), [("central4", "radau5"), ("central2", "mcs"), ("central2", "rk4"), ("monotone", "radau5")]
)
def test_two_dimensions_with_full_tensor(scheme, stepper):
    """The covariance itself, the conormal direction at elastic and reflecting walls included."""
    root, b, kappa = parameter(0.8, 0.2, 0.1, 0.6), parameter(0.5, -0.4), parameter(0.7)
    box = Box(
        [0.0, 0.0], [1.0, 1.2], [("reflecting", Robin(kappa, lambda t, x: kappa * x[..., 1])), ("absorbing", "open")]
    )
    sde = SDE(
        lambda t, x: b * torch.stack([x[..., 1], torch.cos(x[..., 0])], -1),
        diffusion=lambda t, x: root.reshape(2, 2) * (1.0 + 0.3 * x[..., 0])[..., None, None],
        dim=2,
        arrays="torch",
    )
    problem = KolmogorovProblem(sde, lambda x: torch.cos(x[..., 0] + 2.0 * x[..., 1]), 0.02, box)
    recipe = solve(problem, grid=9, steps=3 if stepper != "rk4" else 40, scheme=scheme, stepper=stepper).discretization
    x = torch.tensor([[0.1, 0.2], [0.7, 0.5], [0.96, 1.1]], dtype=torch.float64)
    table = taylor_test(
        lambda: (value(problem, x, discretization=recipe) ** 2).sum(), [root, b, kappa], step=4e-3, levels=4
    )
    has_rate_two(table)


def test_three_dimensions():
    b, s = parameter(0.5, -0.4, 0.3), parameter(0.8, 0.6, 0.7)
    box = Box([0.0] * 3, [1.0] * 3, ["reflecting", "absorbing", "periodic"])
    sde = SDE(lambda t, x: b * torch.sin(6.0 * x), diffusion=lambda t, x: s * (1.0 + 0.0 * x), dim=3, arrays="torch")
    problem = KolmogorovProblem(sde, lambda x: torch.cos(x).prod(-1), 0.01, box)
    recipe = solve(problem, grid=(9, 9, 9), steps=20, scheme="central4", stepper="rk4").discretization
    x = torch.full((1, 3), 0.4, dtype=torch.float64)
    has_rate_two(taylor_test(lambda: value(problem, x, discretization=recipe).sum(), [b, s], levels=4, step=0.1))


@pytest.mark.parametrize("scheme", ["central4", "monotone"])
def test_stationary(scheme):
    b, s, v, g = parameter(0.5), parameter(0.8), parameter(0.3), parameter(1.2)
    box = Box(-1.0, 1.0, [(Absorbing(lambda t, x: v + 0 * x[..., 0]), Robin(0.5, v))])
    sde = SDE(lambda t, x: -b * x, diffusion=lambda t, x: s * (1.0 + 0.2 * x[..., 0] ** 2), dim=1, arrays="torch")
    problem = KolmogorovProblem(
        sde, None, None, box, source=lambda t, x: g * torch.cos(x[..., 0]), killing=lambda t, x: b**2 + 0 * x[..., 0]
    )
    recipe = solve(problem, grid=17, scheme=scheme).discretization
    x = torch.tensor([[-0.8], [0.1], [0.9]], dtype=torch.float64)
    has_rate_two(taylor_test(lambda: value(problem, x, discretization=recipe).sum(), [b, s, v, g], levels=4))


def test_smoothed_kink():
    """A kinked payoff is smoothed by a frozen rule; the value stays smooth in the coefficients."""
    s, a = parameter(0.4), parameter(1.5)
    sde = SDE(0.1, diffusion=lambda t, x: s + 0.0 * x[..., 0], dim=1, arrays="torch")
    problem = KolmogorovProblem(sde, lambda x: a * torch.clamp(x[..., 0] - 0.13, min=0.0), 0.5, Box(-3.0, 3.0))
    recipe = solve(problem, grid=41, steps=6).discretization
    assert recipe.properties["terminal_smoothed"]
    x = torch.tensor([[0.0], [0.4]], dtype=torch.float64)
    has_rate_two(taylor_test(lambda: (value(problem, x, discretization=recipe) ** 2).sum(), [s, a], levels=4))


def test_known_derivatives():
    """d/dκ, d/dσ and d/dx of E X_T² for an Ornstein–Uhlenbeck process."""
    k, s = parameter(1.1), parameter(0.7)
    sde = SDE(lambda t, x: -k * x, diffusion=lambda t, x: s + 0.0 * x[..., 0], dim=1, arrays="torch")
    problem = KolmogorovProblem(sde, lambda x: x[..., 0] ** 2, 0.8)
    x = torch.tensor([0.6], dtype=torch.float64, requires_grad=True)
    u = value(problem, x, rtol=1e-7)
    gradients = torch.autograd.grad(u.sum(), [k, s, x])
    e = torch.exp(-2.0 * k * 0.8)
    exact = x**2 * e + s**2 * (1.0 - e) / (2.0 * k)
    wanted = torch.autograd.grad(exact.sum(), [k, s, x])
    for got, want in zip(gradients, wanted, strict=True):
        assert torch.allclose(got, want, rtol=1e-5), (got, want)
