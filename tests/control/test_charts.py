"""Processes that scale with an end: logarithmic coordinates, found where they are the natural ones."""

import numpy as np
import pytest
import torch

import kolmo
from kolmo import control
from kolmo.control.charts import Chart, natural_charts
from kolmo.grid.grading import Exponential, Uniform, from_record, record

R, EXCESS, VOL, T = 0.02, 0.06, 0.25, 1.5


def merton(utility, fractions, box=None):
    """Wealth dX = X (r + a ex) dt + a s X dW; the most expected utility at T (Merton 1969)."""
    return control.ControlProblem(
        lambda t, x, a: x * (R + a * EXCESS),
        lambda t, x, a: a * VOL * x,
        controls=fractions,
        terminal=utility,
        horizon=T,
        sense="max",
        box=box or kolmo.Box(0.0, np.inf, [("natural", "open")]),
    )


def power(gamma):
    """Utility, the optimal fraction, and the rate at which the certain equivalent grows."""
    fraction = EXCESS / (VOL**2 * (1.0 - gamma))
    rate = R + 0.5 * fraction * EXCESS
    return lambda x: x[..., 0] ** gamma / gamma, fraction, lambda x: (x * np.exp(rate * T)) ** gamma / gamma


@pytest.mark.parametrize("gamma", [-1.5, -0.4, 0.6])
def test_power_utility_of_either_sign_on_the_half_line(gamma):
    utility, fraction, value = power(gamma)
    x = np.array([0.4, 1.0, 3.0])
    opt = control.solve_hjb(merton(utility, control.Interval(0.0, 2.0 * fraction)), at=x, rtol=1e-5, atol=1e-9)
    assert opt.status == "converged"
    error = np.abs(opt(x) - value(x))
    assert (error <= 1e-5 * np.abs(value(x)).max()).all()
    assert (error <= opt.error_estimate).all()
    np.testing.assert_allclose(opt.policy(0.0, x)[:, 0], fraction, rtol=1e-4)
    step = 1e-4 * x
    np.testing.assert_allclose(opt.gradient(x)[:, 0], (value(x + step) - value(x - step)) / (2 * step), rtol=1e-4)


def test_logarithmic_utility_and_unbounded_fractions():
    fraction = EXCESS / VOL**2
    opt = control.solve_hjb(merton(lambda x: x[..., 0].log(), control.Unbounded(1)), at=[0.5, 2.0], rtol=1e-5)
    exact = np.log([0.5, 2.0]) + (R + 0.5 * EXCESS * fraction) * T
    np.testing.assert_allclose(opt([0.5, 2.0]), exact, atol=1e-5)
    np.testing.assert_allclose(opt.policy(0.0, [1.0]), [fraction], rtol=1e-4)


def test_the_recipe_of_a_logarithmic_grid_is_followed():
    problem = merton(power(-0.4)[0], control.Interval(0.0, 2.0))
    opt = control.solve_hjb(problem, at=[1.0], rtol=1e-3)
    again = control.solve_hjb(problem, discretization=opt.discretization)
    np.testing.assert_allclose(again([0.7]), opt([0.7]), rtol=1e-12)


def test_a_distance_from_an_upper_end():
    """X = 1 − Y with Y geometric: the same problem seen from the other side."""
    utility, fraction, value = power(-0.4)
    problem = control.ControlProblem(
        lambda t, x, a: -(1.0 - x) * (R + a * EXCESS),
        lambda t, x, a: a * VOL * (1.0 - x),
        controls=control.Interval(0.0, 2.0 * fraction),
        terminal=lambda x: utility(1.0 - x),
        horizon=T,
        sense="max",
        box=kolmo.Box(-np.inf, 1.0, [("open", "natural")]),
    )
    opt = control.solve_hjb(problem, at=[0.0, 0.6], rtol=1e-4)
    np.testing.assert_allclose(opt([0.0, 0.6]), value(np.array([1.0, 0.4])), rtol=1e-4)


def problem_of(drift, diffusion, box=None, terminal=lambda x: x[..., 0]):
    return control.ControlProblem(
        drift,
        diffusion,
        controls=control.Interval(0.0, 1.0),
        terminal=terminal,
        horizon=1.0,
        box=box or kolmo.Box(0.0, np.inf, [("natural", "open")]),
    )


@pytest.mark.parametrize(
    ("problem", "chart"),
    [
        # a population that grows and is harvested
        (problem_of(lambda t, x, a: x * (1.0 - x / 5.0 - a), lambda t, x, a: 0.3 * x), Chart(0.0, 1.0)),
        # noise like a square root, and a drift that does not vanish: the end is within reach
        (problem_of(lambda t, x, a: a * x, lambda t, x, a: 0.3 * x.sqrt()), None),
        (problem_of(lambda t, x, a: a * (1.0 - x), lambda t, x, a: 0.3 * x), None),
        # closed by the user, and regular up to the end
        (problem_of(lambda t, x, a: a * x, lambda t, x, a: 0.3 * x, kolmo.Box(0.0, 9.0, [("natural", "open")])), None),
        (
            problem_of(
                lambda t, x, a: a * x, lambda t, x, a: 0.3 * x, kolmo.Box(0.0, 9.0, [("natural", "open")]), torch.sqrt
            ),
            Chart(0.0, 1.0),
        ),
    ],
)
def test_the_logarithm_is_found_where_it_is_natural(problem, chart):
    assert natural_charts(problem, np.array([[0.5], [2.0]])) == (chart,)
    # values are wanted at the end itself
    assert natural_charts(problem, np.array([[0.0], [2.0]])) == (None,)


def test_maps_of_logarithms_invert_and_are_kept():
    for side in (1.0, -1.0):
        grading = Exponential(Uniform(-2.0, 1.0), 3.0, side)
        xi = np.linspace(0.05, 0.95, 7)
        np.testing.assert_allclose(grading.inverse(grading(xi)), xi, atol=1e-12)
        h = 1e-4
        np.testing.assert_allclose(grading.slope(xi), (grading(xi + h) - grading(xi - h)) / (2 * h), rtol=1e-6)
        np.testing.assert_allclose(
            grading.bend(xi), (grading.slope(xi + h) - grading.slope(xi - h)) / (2 * h), rtol=1e-6
        )
        assert from_record(record(grading)) == grading
        longer = grading.extended(0.1, 0.2)
        np.testing.assert_allclose(longer(0.1 + 0.7 * xi), grading(xi), rtol=1e-12)
