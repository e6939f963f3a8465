"""Switching between regimes: a plant's opening and closing in closed form, finite horizons by enumeration."""

import numpy as np
import pytest

import kolmo
from kolmo import catalog, control
from kolmo.errors import InputError

COSTS = [[0.0, 2.0], [0.5, 0.0]]


def test_opening_and_closing_a_plant():
    case = catalog.OPTIMA["plant"]()
    best = control.solve_switching(case.problem, COSTS, at=case.points, rtol=1e-3)
    assert best.status == "converged"
    exact = case.solution(0.0, case.points)
    error = max(np.abs(best(case.points, i) - exact[:, i]).max() for i in (0, 1))
    assert error <= best.error_estimate.max()
    assert error < 4e-3
    # where closed and open differ by the cost in the closed form, to two cells
    x = np.linspace(-1.5, 1.5, 601)
    both = case.solution(0.0, x[:, None])
    opens, closes = x[both[:, 1] - both[:, 0] > 2.0 - 1e-9].min(), x[both[:, 0] - both[:, 1] > 0.5 - 1e-9].max()
    assert x[best.switch(0.0, x, 0) == 1].min() == pytest.approx(opens, abs=0.06)
    assert x[best.switch(0.0, x, 1) == 0].max() == pytest.approx(closes, abs=0.06)


def regime(profit, horizon=1.0, **other):
    return control.ControlProblem(
        lambda t, x, a: 0.0 * x,
        1.0,
        controls=control.Finite([[0.0]]),
        horizon=horizon,
        terminal=lambda x: 0.0 * x[..., 0],
        running_cost=profit,
        sense="max",
        box=kolmo.Box.unbounded(1),
        **other,
    )


def test_free_switching_back_and_dear_switching_there():
    """Where no switch pays each regime is alone; where closing is all that is possible it is stopping."""
    at = [-0.5, 0.5]
    earning = regime(lambda t, x, a: x[..., 0])
    never = control.solve_switching([regime(0.0), earning], [[0.0, 50.0], [50.0, 0.0]], at=at, rtol=1e-3)
    np.testing.assert_allclose(never(at, 0), 0.0, atol=1e-6)
    np.testing.assert_allclose(never(at, 1), at, atol=1e-3)  # ∫ E W = x T
    leaving = control.solve_switching([regime(0.0), earning], [[0.0, np.inf], [0.0, 0.0]], at=at, rtol=1e-3)
    stopping = control.ControlProblem(
        lambda t, x, a: 0.0 * x,
        1.0,
        controls=control.Finite([[0.0]]),
        horizon=1.0,
        terminal=lambda x: 0.0 * x[..., 0],
        running_cost=lambda t, x, a: x[..., 0],
        obstacle=lambda t, x: 0.0 * x[..., 0],
        sense="max",
        box=kolmo.Box.unbounded(1),
    )
    alone = control.solve_hjb(stopping, at=at, rtol=1e-3)
    np.testing.assert_allclose(leaving(at, 1), alone(at), atol=2e-3)


def test_mistakes_are_named():
    with pytest.raises(InputError, match="positive sum"):
        control.solve_switching([regime(0.0), regime(1.0)], [[0.0, 1.0], [-1.0, 0.0]])
    with pytest.raises(InputError, match="horizons"):
        control.solve_switching([regime(0.0), regime(1.0, horizon=2.0)], COSTS)
    with pytest.raises(InputError, match="rows"):
        control.solve_switching([regime(0.0), regime(1.0)], [[0.0, 1.0]])
