"""The weighted residual against true errors, and its budget against what was done badly."""

import math

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import norm

import kolmo
from kolmo import SDE, Box, Grid, KolmogorovProblem, Robin, catalog
from kolmo.errors import InputError
from kolmo.refine.residual import weighted_residual


def first(x):
    return x[..., 0]


def ratio(problem, recipe, at, exact):
    """Estimated over true error at a point, and the whole."""
    solution = kolmo.solve(problem, discretization=recipe)
    found = weighted_residual(problem, recipe, at)
    truth = np.asarray(exact) - np.asarray(solution(at))
    return float(np.squeeze(found.error / truth)), found


@pytest.mark.parametrize("scheme", ["central2", "central4", "central6"])
@pytest.mark.parametrize("nodes", [25, 37])
def test_smooth_problems_are_predicted(scheme, nodes):
    case = catalog.ornstein_uhlenbeck("gauss", kappa=1.0, mu=0.0, sigma=1.0, horizon=1.0)
    problem, at = case.problem, np.array([[0.7]])
    grid = Grid.of(Box(-6.0, 6.0), nodes)
    recipe = kolmo.solve(problem, grid=grid, steps=32, scheme=scheme).discretization
    predicted, found = ratio(problem, recipe, at, case.exact(0.0, at))
    assert 0.7 < predicted < 1.4
    assert found.budget["space"].max() > 3 * found.budget["time"].max()


@pytest.mark.parametrize("place", [0.05, 0.2, 0.31, 0.47])
def test_a_source_that_jumps_between_the_nodes_is_seen(place):
    """Wherever in its cell: the true error changes its sign there, and the estimate follows."""
    problem = KolmogorovProblem(
        SDE(0.0, 1.0, dim=1), lambda x: 0 * first(x), 1.0, Box(-6.0, 6.0), source=lambda t, x: 1.0 * (first(x) > place)
    )
    exact = quad(lambda q: 2 * q * norm.sf(place / q) if q > 0 else 0.0, 0.0, 1.0)[0]
    recipe = kolmo.solve(problem, grid=25, steps=16).discretization
    truth = exact - float(kolmo.solve(problem, discretization=recipe)(0.0))
    found = weighted_residual(problem, recipe, [0.0])
    assert abs(found.error.item() - truth) < 0.4 * abs(truth) + 5e-3  # a point stands for half a per cent of the answer
    assert abs(truth) > 1e-2


def test_a_window_in_time_between_the_instants_of_a_method_is_seen():
    """Planning takes the drift for constant in time; a quarter of a step is what two instants a step can miss."""
    problem = KolmogorovProblem(
        SDE(lambda t, x: 2.0 * (0.41 < t < 0.48) + 0.0 * x, 0.5, dim=1), lambda x: np.cos(first(x)), 1.0, Box(-4.0, 4.0)
    )
    recipe = kolmo.solve(problem, grid=61, steps=30).discretization
    exact = math.exp(-0.125) * math.cos(0.2 + 0.14)
    predicted, _ = ratio(problem, recipe, [0.2], exact)
    assert 0.4 < predicted < 2.0


def test_two_dimensions_and_the_axis_that_is_coarse():
    case = catalog.linear_sde(dim=2, terminal="gauss")
    grid = Grid.of(Box([-4.0, -4.0], [4.0, 4.0]), (13, 31))
    at = case.points[:1]
    recipe = kolmo.solve(case.problem, grid=grid, steps=16, stepper="mcs3").discretization
    predicted, found = ratio(case.problem, recipe, at, case.values[:1])
    assert 0.5 < predicted < 2.0
    assert found.budget["space"][0].max() > 10 * found.budget["space"][1].max()
    turned = kolmo.solve(case.problem, grid=Grid.of(Box([-4.0, -4.0], [4.0, 4.0]), (31, 13)), steps=16, stepper="mcs3")
    other = weighted_residual(case.problem, turned.discretization, at)
    assert other.budget["space"][1].max() > 10 * other.budget["space"][0].max()


def test_walls_and_killing():
    box = Box(0.0, 1.5, [(Robin(1.2, 0.3), "reflecting")])
    problem = KolmogorovProblem(
        SDE(lambda t, x: 0.5 - x, 0.6, dim=1),
        lambda x: np.exp(-first(x)),
        0.8,
        box,
        killing=lambda t, x: 1.0 + first(x),
    )
    at = np.array([[0.4], [0.1]])
    exact = kolmo.solve(problem, grid=161, steps=64)(at)
    recipe = kolmo.solve(problem, grid=11, steps=24, scheme="central2").discretization
    truth = exact - kolmo.solve(problem, discretization=recipe)(at)
    found = weighted_residual(problem, recipe, at)
    assert (np.abs(found.error[:, 0] - truth) < 0.7 * np.abs(truth)).all()


def test_stationary_problems():
    problem = KolmogorovProblem(
        SDE(0.0, 1.0, dim=1), None, None, Box(-1.0, 1.0, "absorbing"), source=lambda t, x: 1.0 * (first(x) > 0.33)
    )
    exact = 2 * quad(lambda y: (1.0 - y) / 2.0, 0.33, 1.0)[0]
    recipe = kolmo.solve(problem, grid=20).discretization
    predicted, found = ratio(problem, recipe, [0.0], exact)
    assert 0.6 < predicted < 1.7
    assert found.budget["time"].max() == 0.0


def test_several_columns_and_points_are_told_apart():
    case = catalog.wright_fisher()
    recipe = kolmo.solve(case.problem, grid=9, steps=16).discretization
    found = weighted_residual(case.problem, recipe, case.points)
    assert found.error.shape == case.values.shape
    for part in ("time", "terminal", "faces", "cut"):
        assert found.budget[part].shape == (case.values.shape[-1],)


def test_long_steps_and_the_cut_are_told_by_the_budget():
    case = catalog.ornstein_uhlenbeck("gauss", kappa=1.0, mu=0.0, sigma=1.0, horizon=1.0)
    few = kolmo.solve(case.problem, grid=Grid.of(Box(-6.0, 6.0), 61), steps=3, stepper="radau3").discretization
    narrow = kolmo.solve(case.problem, grid=Grid.of(Box(-1.5, 1.5), 41), steps=24).discretization
    parts = weighted_residual(case.problem, few, [0.5]).budget
    assert parts["time"].max() > 10 * max(parts["space"].max(), parts["cut"].max())
    parts = weighted_residual(case.problem, narrow, [0.5]).budget
    assert parts["cut"].max() > 10 * max(parts["space"].max(), parts["time"].max())


def test_what_does_not_fit_is_named():
    problem = KolmogorovProblem(SDE(0.0, 1.0, dim=1), first, 1.0, Box(-1.0, 1.0, "reflecting"))
    still = KolmogorovProblem(SDE(0.0, 1.0, dim=1), None, None, Box(-1.0, 1.0, "absorbing"), source=1.0)
    with pytest.raises(InputError, match="discretization"):
        weighted_residual(problem, kolmo.solve(still, grid=11).discretization, [0.0])


@pytest.mark.parametrize("order", [2, 4, 6])
def test_the_truncation_of_the_budget_is_that_of_the_differences(order):
    """What central differences of undivided order p leave over of x^(p+1)/(p+1)! and x^(p+2)/(p+2)!."""
    from kolmo.refine.residual import TRUNCATION
    from kolmo.schemes.differences import CUT, differences

    n = order + 5
    x = np.arange(n) - n // 2
    D = differences(n, order, CUT, CUT)
    left = [
        abs((matrix @ (x ** (order + m) / math.factorial(order + m)))[n // 2])
        for m, matrix in ((1, D.first), (2, D.second))
    ]
    np.testing.assert_allclose(left, TRUNCATION[order], rtol=1e-9)


def test_the_budget_does_not_depend_on_how_often_it_is_looked_at(monkeypatch):
    """Only some instants are; each of them stands for those between."""
    case = catalog.ornstein_uhlenbeck("gauss", kappa=1.0, mu=0.0, sigma=1.0, horizon=1.0)
    recipe = kolmo.solve(case.problem, grid=Grid.of(Box(-6.0, 6.0), 25), steps=32, scheme="central2").discretization
    seldom = weighted_residual(case.problem, recipe, [0.7]).budget
    monkeypatch.setattr("kolmo.refine.residual.BUDGET_EVERY", 1)
    always = weighted_residual(case.problem, recipe, [0.7]).budget
    for part in ("space", "time"):
        assert seldom[part].max() == pytest.approx(always[part].max(), rel=0.3)
