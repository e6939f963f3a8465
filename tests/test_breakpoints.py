"""Steps between breakpoints, however close these are: enough of them, and more on every level."""

from itertools import pairwise

import numpy as np
import pytest

import kolmo
from kolmo.forward.clock import graded_clock
from kolmo.march import time_nodes


@pytest.mark.parametrize("seed", range(20))
def test_steps_between_breakpoints_grow_with_the_levels(seed):
    """However close they are: as many steps on two levels, or many fewer than elsewhere, would hide an error."""
    rng = np.random.default_rng(seed)
    a, length = rng.uniform(0.0, 0.8), 10.0 ** rng.uniform(-4, -1)
    ends = [0.0, a, a + length, 1.0]
    first = int(rng.integers(8, 80))
    for clock in (
        lambda steps, growth: time_nodes(list(pairwise(ends)), steps, growth=growth),
        lambda steps, growth: graded_clock(1.0, 1e-3 / steps, steps, breaks=ends[1:3], growth=growth),
    ):
        inside = []
        for growth in (1.0, 1.35, 1.8, 2.4):
            times = clock(2 * round(0.5 * first * growth), growth)
            inside.append(int(((times > a + 1e-9) & (times < a + length * (1 + 1e-9))).sum()))
        assert inside[0] >= 4
        assert all(after > before for before, after in pairwise(inside)), inside


@pytest.mark.parametrize("seed", range(6))
def test_windows_of_a_strong_killing_rate_are_integrated(seed):
    """The rate of a window times its length is up to 3: a few explicit steps would be off by a tenth on every level."""
    rng = np.random.default_rng(seed)
    rate, length, T = rng.uniform(0.5, 3.0), 10.0 ** rng.uniform(-2.5, -1.0), rng.uniform(1.0, 3.0)
    start = rng.uniform(0.1, 0.8) * T
    k, at = rng.uniform(0.5, 1.5), rng.normal(size=(2, 2))
    problem = kolmo.KolmogorovProblem(
        kolmo.SDE(0.0, 0.6, dim=2),
        lambda x: np.cos(k * x).prod(-1),
        T,
        killing=lambda t, x: rate / length * (start <= t < start + length) + 0.0 * x[..., 0],
    )
    solution = kolmo.solve(problem, at=at, rtol=1e-3)
    exact = np.exp(-rate - 0.36 * k**2 * T) * np.cos(k * at).prod(-1)
    assert solution.status == "converged"
    assert (np.abs(solution(at) - exact) <= 3.0 * solution.error_estimate).all()
