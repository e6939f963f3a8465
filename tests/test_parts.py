"""The parts of the estimate are what they are called: space, time, and the cut of an unbounded domain."""

import numpy as np
import pytest
from scipy.stats import norm

from kolmo import SDE, Box, KolmogorovProblem, solve


def parts(solution):
    return {name: float(np.max(part)) for name, part in solution.discretization.estimate.items()}


def test_an_error_of_the_steps_is_called_time():
    """Constants in space, killed at a rate that oscillates: no grid is to blame."""
    problem = KolmogorovProblem(
        SDE(0.0, 1.0, dim=1), lambda x: 1.0 + 0.0 * x[..., 0], 1.0, killing=lambda t, x: 5.0 + 5.0 * np.sin(9.0 * t)
    )
    found = parts(solve(problem, at=[0.0], rtol=1e-4))
    assert found["time"] > 100.0 * found["space"]


def test_an_error_of_the_grid_is_called_space():
    """A wave of many periods and a horizon within which it hardly changes."""
    problem = KolmogorovProblem(SDE(0.0, 1.0, dim=1), lambda x: np.cos(9.0 * x[..., 0]), 0.01)
    found = parts(solve(problem, at=[0.0, 0.1], rtol=1e-4))
    assert found["space"] > 100.0 * found["time"]


@pytest.mark.parametrize("volatility", [1.0, 1.5])
@pytest.mark.parametrize("rtol", [1e-2, 1e-3])
def test_the_effect_of_the_cut_is_not_underestimated(volatility, rtol):
    """A call under log-normal tails: what is beyond the wider box, too, is as large as what the wider box shows."""
    sde = SDE(0.0, lambda t, x: volatility * x[..., 0], dim=1)
    box = Box(0.0, np.inf, [("natural", "open")])
    problem = KolmogorovProblem(sde, lambda x: np.maximum(x[..., 0] - 1.0, 0.0), 1.0, box)
    up = np.log(0.9) / volatility + 0.5 * volatility
    exact = 0.9 * norm.cdf(up) - norm.cdf(up - volatility)
    solution = solve(problem, at=[0.9], rtol=rtol)
    found, error = parts(solution), abs(float(solution([0.9])) - exact)
    assert found["cut"] > found["space"] + found["time"]  # the error is the cut's
    assert error <= found["cut"] <= rtol * exact
