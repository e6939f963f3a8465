"""The parts of the estimate: discretisation, and the cut of an unbounded domain."""

import numpy as np
import pytest
from scipy.stats import norm

from kolmo import SDE, Box, KolmogorovProblem, solve


def parts(solution):
    return {name: float(np.max(part)) for name, part in solution.discretization.estimate.items()}


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
    assert found["cut"] > found["discretization"]  # the error is the cut's
    assert error <= found["cut"] <= rtol * exact


def test_what_open_faces_send_in_on_a_coarse_grid_is_left_to_finer_ones():
    """A rotating flow that draws to the middle of a box of ten spreads: a wider one would not help."""
    A, S = np.array([[-1.0, 0.6], [-0.8, -0.7]]), np.array([[0.5, 0.3], [0.3, 0.4]])
    flow = SDE(lambda t, x: x @ A.T + [0.1, -0.2], covariance=S, dim=2)
    problem = KolmogorovProblem(
        flow, lambda x: np.cos(1.5 * x[..., 0] - x[..., 1] + 0.3), 1.0, Box([-5.0] * 2, [5.0] * 2)
    )
    solution = solve(problem, at=[[0.0, 0.0], [0.5, -0.3], [-0.8, 0.6], [1.0, 1.0]], rtol=1e-4)
    assert solution.status == "converged"
    assert max(np.abs(solution.grid.box).ravel()) <= 5.0


@pytest.mark.parametrize("seed", range(2))
def test_a_break_between_the_nodes_asks_for_a_fourth_level(seed):
    """Where no node can lie on a break, three levels may agree by luck: it moves, at random, or stays away."""
    from kolmo.refine.plan import search

    rng = np.random.default_rng(seed)
    place, speed, size = rng.uniform(-0.3, 0.3), rng.uniform(0.5, 1.0), rng.uniform(0.5, 1.5)
    found = []
    for jump in (0.0, size):
        killing = lambda t, x, jump=jump: 0.3 + jump * (x[..., 0] > place + speed * t)  # noqa: E731
        problem = KolmogorovProblem(SDE(0.0, 1.0, dim=1), lambda x: np.cos(x[..., 0]), 0.5, killing=killing)
        found.append(search(problem, at=[place], rtol=5e-2, atol=0.0))
    still, moving = found
    assert still.family.convergence.fewest == 3
    assert moving.family.convergence.fewest == 4


def test_what_is_enough_leaves_room_for_the_cut(monkeypatch):
    """Levels that agree and a cut that fits meet the tolerance together, whatever each of them takes of it."""
    from kolmo.refine.search import Search

    rng, search, ended = np.random.default_rng(0), Search.__new__(Search), 0
    search.levels = [None] * 3
    monkeypatch.setattr(Search, "_tolerance", lambda self: np.ones(2))
    for _ in range(400):
        estimate, search.cut = rng.random(2), 0.3 * rng.random(2)
        monkeypatch.setattr(Search, "_estimate", lambda self, estimate=estimate: estimate)
        if search._enough() and search._cut_fits():
            ended += 1
            assert (estimate + search.cut <= 1.0).all()
    assert ended > 50
