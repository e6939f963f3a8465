"""Conservation of probability: nothing is lost behind reflecting and periodic faces; what leaves is accounted for."""

import itertools

import numpy as np
import pytest

from kolmo import SDE, Absorbing, Box, Grid, KolmogorovProblem, Robin
from kolmo.forward import solve_forward
from kolmo.grid.grading import Sinh
from kolmo.schemes.base import SCHEMES
from kolmo.testing import manufactured, mass_balance


def swirl(dim, box, killing=None):
    """Rotating drift that points through the walls, full tensor that depends on place and time."""

    def drift(t, x):
        return np.stack([3.0 * np.sin(2.0 * x[..., (i + 1) % dim] + i + 5.0 * t) for i in range(dim)], -1)

    def covariance(t, x):
        full = 0.5 * np.eye(dim) + 0.3 * np.ones((dim, dim))
        return full * (1.0 + 0.5 * np.sin(x[..., 0]) ** 2 + t)[..., None, None]

    return KolmogorovProblem(
        SDE(drift, covariance=covariance, dim=dim), lambda x: 1.0 + 0.0 * x[..., 0], 0.05, box, killing=killing
    )


STEPS = {"radau5": {1: 6, 2: 2}, "rk4": {1: 60, 2: 20, 3: 8}, "mcs3": {1: 6, 2: 3, 3: 2}}
COMBINATIONS = [
    (dim, scheme, stepper)
    for dim, scheme, stepper in itertools.product((1, 2, 3), SCHEMES, STEPS)
    if dim in STEPS[stepper] and not (stepper == "mcs3" and scheme.startswith("monotone"))
]


@pytest.mark.parametrize(("dim", "scheme", "stepper"), COMBINATIONS)
@pytest.mark.parametrize("word", ["reflecting", "periodic"])
def test_mass_is_conserved(dim, scheme, stepper, word):
    box = Box([0.0] * dim, [np.pi] * dim, word)
    nodes = {1: 25, 2: 11, 3: 9}[dim]
    x = np.random.default_rng(0).random((4, dim)) * 3.0
    density = solve_forward(swirl(dim, box), x, grid=nodes, steps=STEPS[stepper][dim], scheme=scheme, stepper=stepper)
    assert np.abs(density.mass - 1.0).max() < 1e-12
    assert density.exits == ()


@pytest.mark.parametrize("scheme", [*SCHEMES])
@pytest.mark.parametrize("stepper", ["radau5", "rk4"])
def test_what_leaves_is_accounted_for(scheme, stepper):
    """Absorbing and elastic faces that meet, killing, graded nodes, everything depending on time."""
    box = Box(
        [0.0, -1.0], [1.0, 1.0], [("absorbing", Robin(lambda t, x: 1.0 + t)), (Robin(0.4), Absorbing(2.0))]
    )  # fmt: skip
    problem = swirl(2, box, killing=lambda t, x: 1.0 + x[..., 0] + t)
    grid = Grid.of(box, 9, [Sinh(0.0, 1.0, 0.2, 0.9), Sinh(-1.0, 1.0, 0.0, 0.9)])
    table = mass_balance(problem, grid=grid, steps=2 if stepper == "radau5" else 40, scheme=scheme, stepper=stepper)
    assert table.rows[-1][1] < 1e-12, table
    assert [row[0] for row in table.rows[:5]] == ["(0, 0)", "(0, 1)", "(1, 0)", "(1, 1)", "killing"]
    assert all(row[1] > 1e-3 for row in table.rows[:5]), table


def test_mass_is_lost_where_it_should_be():
    problem = manufactured([("absorbing", "reflecting")]).problem
    density = solve_forward(problem, 0.4, grid=31, steps=8)
    assert density.mass[-1] < 0.9
    assert (np.diff(density.mass) < 0).all()
