"""Laws drawn at random, with closed forms: errors keep to the estimates, whatever the units.

One of each kind by default and some more of the fast ones. ``KOLMO_RANDOM_LAWS=200`` draws that many.
"""

import os
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

import kolmo
from validation.random_laws import DISHONEST, KINDS, draw, judge

COUNT, FIRST = int(os.environ.get("KOLMO_RANDOM_LAWS", "13")), 9


@pytest.mark.parametrize("seed", range(FIRST, FIRST + COUNT))
def test_errors_keep_to_their_estimates(seed):
    case = draw(seed)
    if COUNT <= 13 and case.kind == "rectangle":
        pytest.skip("takes seconds: tests/test_forward.py has a box in the plane")
    judged = judge(case)
    law = judged.law
    assert law.status == "converged", law.message
    assert judged.over_estimate < DISHONEST, (case.kind, law)
    assert judged.over_tolerance < 1.5, (case.kind, law)


def test_the_unit_of_time_and_length_is_free():
    """The same law in other units takes the same grid and clock and gives the same digits."""

    def law(second, metre):
        sde = kolmo.SDE(0.5 * metre / second, diffusion=metre / second**0.5, dim=1)
        box = kolmo.Box(0.0, metre, "absorbing")
        problem = kolmo.KolmogorovProblem(sde, lambda x: 0.0 * x[..., 0], 2.0 * second, box)
        return kolmo.solve_forward(problem, [0.3 * metre], rtol=1e-4)

    one = law(1.0, 1.0)
    for second, metre in ((1e-9, 1e3), (1e9, 1e-6)):
        other = law(second, metre)
        np.testing.assert_allclose(other.clock / second, one.clock, rtol=1e-9)
        np.testing.assert_allclose(other.grid.nodes[0] / metre, one.grid.nodes[0], rtol=1e-9)
        flux = one.exit_flux("low")
        np.testing.assert_allclose(other.exit_flux("low") * second, flux, rtol=1e-6, atol=1e-9 * flux.max())


def test_every_kind_is_drawn():
    assert {draw(seed).kind for seed in range(len(KINDS))} == set(KINDS)
