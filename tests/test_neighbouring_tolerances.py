"""Tolerances 10 % apart: hardly a change in cost, and answers that agree within their estimates."""

import numpy as np
import pytest

import kolmo
from kolmo import catalog

QUICK = [
    "ornstein_uhlenbeck", "geometric_brownian_motion", "down_and_out_call", "cir_bond", "double_well", "exit_right",
    "committor", "wright_fisher", "circle", "heat",
]  # fmt: skip
SLOW = ["layered_ornstein_uhlenbeck", "harmonic_killing", "vasicek_bond", "langevin", "margrabe", "manufactured"]


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_cost_and_answer_change_little(name):
    case = catalog.CASES[name]()
    found = []
    for rtol in (1e-5, 1.1e-5):
        sol = kolmo.solve(case.problem, at=case.points, rtol=rtol, atol=1e-9)
        assert sol.status == "converged"
        cost = sol.grid.size * max(sol.discretization.steps, 1)
        found.append((cost, np.asarray(sol(case.points)), sol.error_estimate))
    (cost, u, estimate), (other, v, beside) = found
    assert 1 / 1.5 < cost / other < 1.5, (cost, other)
    assert (np.abs(u - v) <= estimate + beside + 1e-14 * np.abs(u)).all(), (u, v, estimate, beside)
