"""Duality: the backward solve and the transposed march, run separately, agree to rounding."""

import itertools

import numpy as np
import pytest

from kolmo import SDE, Absorbing, Box, Grid, InputError, KolmogorovProblem, Robin, solve
from kolmo.forward import solve_forward
from kolmo.grid.grading import Sinh
from kolmo.schemes.base import SCHEMES
from kolmo.steppers.base import STEPPERS
from kolmo.testing import duality_gap, manufactured

FACES = ["open", "natural", "reflecting", "entrance", "absorbing", "robin", "periodic"]
OTHERS = [("robin", "absorbing"), ("periodic", "periodic")]
SMALL = {1: (17, 3, 24), 2: (9, 2, 20), 3: (9, 1, 20)}


def fixed(dim, scheme, stepper):
    nodes, implicit, explicit = SMALL[dim]
    return {"grid": nodes, "steps": implicit if STEPPERS[stepper].implicit else explicit} | {
        "scheme": scheme,
        "stepper": stepper,
    }


# Methods for problems of a special kind (alternating directions, characteristics) may refuse; these never do.
GENERAL = ("implicit-euler", "radau3", "radau5", "rk4")


def gap_of(problem, **options):
    try:
        return duality_gap(problem, laws=1, **options)
    except InputError as error:
        assert options["stepper"] not in GENERAL
        return pytest.skip(str(error))


def combinations(words, schemes, steppers, slow):
    """All of them; those that name something in ``slow`` are left to the long run."""
    return [
        pytest.param(*names, marks=pytest.mark.slow if slow & {*names} else ())
        for names in itertools.product(words, schemes, steppers)
    ]


@pytest.mark.parametrize(
    ("word", "scheme", "stepper"), combinations(FACES, SCHEMES, STEPPERS, {"central4", "radau3", "mcs"})
)
def test_one_dimension(word, scheme, stepper):
    """Sources, face values and coefficients depend on time."""
    problem = manufactured([(word, word)], horizon=0.02).problem
    table = gap_of(problem, **fixed(1, scheme, stepper))
    assert table.worst("gap") < 1e-12, table


@pytest.mark.parametrize(
    ("word", "scheme", "stepper"), combinations(FACES, SCHEMES, ("radau5", "rk4", "mcs3"), {"central2", "central4"})
)
def test_two_dimensions(word, scheme, stepper):
    case = manufactured([(word, word), OTHERS[0]], horizon=0.01, autonomous=stepper != "mcs3")
    options = fixed(2, scheme, stepper)
    table = gap_of(case.problem, **options)
    assert table.worst("gap") < 1e-12, table


@pytest.mark.parametrize("stepper", ["radau3", "implicit-euler"])
def test_two_dimensions_with_coupled_stages(stepper):
    case = manufactured([("reflecting", "natural"), OTHERS[0]], horizon=0.02)
    table = gap_of(case.problem, **fixed(2, "central4", stepper))
    assert table.worst("gap") < 1e-12, table


@pytest.mark.parametrize(("scheme", "stepper"), [("central6", "rk4"), ("central2", "mcs"), ("monotone", "rk4")])
def test_three_dimensions(scheme, stepper):
    case = manufactured([("reflecting", "open"), *OTHERS], horizon=0.005, autonomous=True)
    table = gap_of(case.problem, **fixed(3, scheme, stepper))
    assert table.worst("gap") < 1e-12, table


@pytest.mark.parametrize(("scheme", "stepper"), [*itertools.product(SCHEMES, STEPPERS)])
def test_graded_nodes_layers_loads_and_face_values(scheme, stepper):
    sde = SDE(
        lambda t, x: (1.0 if t < 0.013 else -2.0) * np.sin(x),
        diffusion=lambda t, x: 1.0 + 0.2 * x[..., 0] ** 2 + (0.5 if t >= 0.031 else 0.0),
        dim=1,
        breakpoints=[0.013, 0.031],
    )
    box = Box(-1.0, 3.0, boundary=[(Robin(lambda t, x: 0.5 + t, 0.3), Absorbing(lambda t, x: np.cos(t) + x[..., 0]))])
    problem = KolmogorovProblem(
        sde, lambda x: np.abs(x[..., 0]), 0.05, box, killing=0.4, source=lambda t, x: t * x[..., 0]
    )
    grid = Grid.of(box, 19, [Sinh(-1.0, 3.0, 0.0, 0.4)])
    table = gap_of(problem, grid=grid, steps=7 if STEPPERS[stepper].implicit else 60, scheme=scheme, stepper=stepper)
    assert table.worst("gap") < 1e-12, table


def test_duality_of_a_density_given_as_a_function():
    """Forward from a function; backward integrated with the same quadrature."""
    from kolmo.forward import initial_masses

    case = manufactured([("absorbing", "robin")])
    sol = solve(case.problem, grid=31, steps=8)
    rho = lambda x: 1.0 + x[..., 0]  # noqa: E731
    density = solve_forward(case.problem, rho, discretization=sol.discretization)
    backward = initial_masses(rho, sol.discretization).T @ sol.values[0]
    assert np.allclose(density.value, backward[0], rtol=1e-13)


def test_another_recipe_has_another_answer():
    """The gap can be seen: forward on other steps than backward is off by the error in time."""
    case = manufactured([("robin", "absorbing")])
    sol = solve(case.problem, grid=21, steps=4, stepper="implicit-euler")
    x = np.array([[0.5]])
    other = solve_forward(case.problem, x, grid=21, steps=5, stepper="implicit-euler")
    assert np.abs(sol(x)[0] - other.value).max() > 1e-5
