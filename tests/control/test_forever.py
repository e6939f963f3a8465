"""Problems without an end: discounted costs and long-run averages."""

import numpy as np
import pytest

import kolmo
from kolmo import catalog, control
from kolmo.errors import InputError


@pytest.mark.parametrize("name", ["ergodic_regulator", "discounted_regulator"])
def test_regulators_on_the_line(name):
    case = catalog.OPTIMA[name]()
    opt = control.solve_hjb(case.problem, at=case.points, rtol=1e-4)
    assert opt.status == "converged"
    error = np.abs(opt(case.points) - case.exact(0.0, case.points)).max()
    assert error <= opt.error_estimate.max()
    assert error < 1e-5
    if case.average is not None:
        assert abs(opt.average - case.average) <= opt.error_estimate.max()
        assert opt.average == pytest.approx(case.average, rel=1e-6)


def test_average_between_walls():
    """Least average of x² with drift at most μ between reflecting walls: the law is exp(−2μ|x|/σ²)."""
    mu, sigma = 0.7, 0.9
    cp = control.ControlProblem(
        lambda t, x, a: mu * a,
        sigma,
        controls=control.Interval(-1.0, 1.0),
        terminal=None,
        horizon=None,
        running_cost=lambda t, x, a: x[..., 0] ** 2,
        ergodic=True,
        box=kolmo.Box(-1.0, 1.0, "reflecting"),
    )
    opt = control.solve_hjb(cp, at=[0.0, 0.5], rtol=1e-4)
    k = 2.0 * mu / sigma**2
    x = np.linspace(0.0, 1.0, 20001)
    law = np.exp(-k * x)
    exact = np.trapezoid(x**2 * law, x) / np.trapezoid(law, x)
    assert opt.status == "converged"
    assert abs(opt.average - exact) <= min(2.0 * opt.error_estimate.max(), 1e-4 * exact)
    assert abs(opt(0.0)) < 1e-15


def test_mistakes_are_named():
    free = {
        "controls": control.Interval(-1.0, 1.0), "terminal": None, "horizon": None, "running_cost": 1.0
    }  # fmt: skip
    wandering, absorbed = (
        control.ControlProblem(lambda t, x, a: a, 1.0, ergodic=True, box=box, **free)
        for box in (kolmo.Box.unbounded(1), kolmo.Box(-1.0, 1.0, "absorbing"))
    )
    with pytest.raises(InputError, match="ends the process"):
        control.ControlProblem(lambda t, x, a: a, 1.0, killing=1.0, ergodic=True, box=kolmo.Box(-1.0, 1.0), **free)
    with pytest.raises(InputError, match="absorbing"):
        control.solve_hjb(absorbed)
    with pytest.raises(InputError, match="goes everywhere"):
        control.solve_hjb(wandering, at=[0.0])
