"""Limits of time and size: not overrun, and the best finished level is returned."""

import dataclasses
import math
import time
import warnings

import numpy as np
import pytest
import torch

import kolmo
from kolmo import SDE, Box, KolmogorovProblem, control, march, solve, solve_forward, spectrum
from kolmo.kernels.first_use import clock
from kolmo.limits import PER_NODE, Limits, OutOfTimeError
from kolmo.march import March, time_nodes
from kolmo.refine import levels
from kolmo.schemes.generator import discretize
from kolmo.steppers.base import STEPPERS


def hard(dim=2, box=None):
    """A rotation of random data, at a tolerance that no grid meets."""

    def drift(t, x):
        return 3.0 * np.stack([-x[..., 1], x[..., 0], 0.0 * x[..., 0]][:dim], -1) if dim > 1 else -3.0 * x

    sde = SDE(drift, diffusion=0.1, dim=dim)
    return KolmogorovProblem(sde, lambda x: np.sin(5.0 * x).prod(-1), 2.0, box or Box([-2.0] * dim, [2.0] * dim))


def timed(call):
    """What a call gives, and how long it takes besides compilation."""
    begun = clock()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", kolmo.ToleranceWarning)
        result = call()
    return result, clock() - begun


def test_solve_ends_in_time():
    solve(hard(), at=[[0.3, 0.2]], rtol=1e-2)  # compiles
    x = [[0.3, 0.2]]
    sol, seconds = timed(lambda: solve(hard(), at=x, rtol=1e-14, atol=0.0, max_seconds=4.0))
    assert sol.status == "tolerance_not_met"
    assert "max_seconds" in sol.message
    assert seconds < 1.2 * 4.0
    with pytest.warns(kolmo.ToleranceWarning, match="max_cells = 900"):
        few = solve(hard(), at=x, rtol=1e-14, atol=0.0, max_cells=900)
    assert few.grid.size <= 900


def test_the_march_stops_when_told():
    generator = discretize(hard(), 31, "central2")
    march = March(generator, STEPPERS["rk4"], time_nodes([(0.0, 2.0)], 40_000))
    asked = []
    run = march.backward(generator.terminal[:, None], stop=lambda: asked.append(0) or len(asked) > 2)
    assert run.late
    assert 0.0 < run.time < 2.0
    whole = march.backward(generator.terminal[:, None], stop=lambda: False)
    assert not whole.late
    assert whole.time == 0.0


def test_no_level_in_time_is_said():
    moving = SDE(lambda t, x: np.cos(t) * x, diffusion=0.3, dim=1)  # no two steps are equal: each may be the last
    problem = KolmogorovProblem(moving, lambda x: x[..., 0], 1.0, Box(-2.0, 2.0))
    with pytest.raises(kolmo.NotConvergedError, match="max_seconds = 1e-06"):
        solve(problem, at=[0.3], max_seconds=1e-6)
    lost = solve(problem, at=[0.3], max_seconds=1e-6, throw=False)
    assert np.isnan(lost.values).all()
    # a level that was finished all the same is an answer, of unknown error
    with pytest.warns(kolmo.ToleranceWarning, match="max_seconds"):
        first = solve(hard(), at=[[0.3, 0.2]], max_seconds=1e-6)
    assert np.isfinite(first([0.3, 0.2]))
    assert np.isinf(first.error_estimate).all()


@pytest.mark.parametrize("name", ["max_seconds", "max_cells"])
@pytest.mark.parametrize("bad", [0, -1.0, "much"])
def test_limits_are_positive_numbers(name, bad):
    problem = hard(1)
    cp = control.ControlProblem(
        lambda t, x, a: a, covariance=1.0, controls=control.Interval(-1.0, 1.0),
        terminal=lambda x: x[..., 0] ** 2, horizon=1.0, box=Box(-8.0, 8.0),
    )  # fmt: skip
    density = lambda x: torch.exp(-(x[..., 0] ** 2))  # noqa: E731
    for call in (
        lambda **k: solve(problem, at=[0.0], **k),
        lambda **k: solve_forward(problem, [0.0], **k),
        lambda **k: spectrum(problem, 2, **k),
        lambda **k: control.solve_hjb(cp, at=[0.0], **k),
        lambda **k: control.schroedinger_bridge(SDE(0.0, diffusion=1.0, dim=1), density, density, 1.0, cp.box, **k),
        lambda **k: control.value(problem, [0.0], **k),
        lambda **k: control.expected_value(problem, [[0.0]], **k),
    ):
        with pytest.raises((kolmo.InputError, TypeError), match=name if bad != "much" else ""):
            call(**{name: bad})


def test_control_and_bridges_end_at_their_limits():
    cp = control.ControlProblem(
        lambda t, x, a: a + torch.sin(3.0 * x), covariance=0.05, controls=control.Interval(-1.0, 1.0),
        terminal=lambda x: x[..., 0].abs(), horizon=1.0, box=Box(-8.0, 8.0),
    )  # fmt: skip
    control.solve_hjb(cp, at=[0.3], rtol=1e-1)  # compiles
    _, whole = timed(lambda: control.solve_hjb(cp, at=[0.3], rtol=1e-1))
    limit = 1.0 + 2.0 * whole  # a busy machine finishes a level too
    opt, seconds = timed(lambda: control.solve_hjb(cp, at=[0.3], rtol=1e-12, atol=0.0, max_seconds=limit))
    assert opt.status == "tolerance_not_met"
    assert seconds < 1.2 * limit + 0.5
    with pytest.warns(kolmo.ToleranceWarning, match="max_cells"):
        few = control.solve_hjb(cp, at=[0.3], rtol=1e-12, atol=0.0, max_cells=150)
    assert few.grid.size <= 151
    density = lambda m: lambda x: torch.exp(-8.0 * (x[..., 0] - m) ** 2)  # noqa: E731
    ask = {"rtol": 1e-12, "atol": 0.0}
    bm, box = SDE(0.0, diffusion=1.0, dim=1), Box(-4.0, 4.0)
    bridge, seconds = timed(
        lambda: control.schroedinger_bridge(bm, density(-1.0), density(1.0), 1.0, box, max_seconds=2.0, **ask)
    )
    assert bridge.status == "tolerance_not_met"
    assert seconds < 1.2 * 2.0 + 0.5
    with pytest.warns(kolmo.ToleranceWarning, match="max_cells = 200"):
        small = control.schroedinger_bridge(bm, density(-1.0), density(1.0), 1.0, box, max_cells=200, **ask)
    assert small.grid.size <= 200


def test_value_and_density_pass_their_limits_on():
    problem = hard(1)
    x = torch.tensor([0.3], dtype=torch.float64)
    ask = {"rtol": 1e-13, "atol": 0.0, "max_cells": 120}
    law, _ = timed(lambda: solve_forward(problem, [0.3], **ask))
    assert law.grid.size <= 120
    torched = KolmogorovProblem(SDE(lambda t, x: -3.0 * x, diffusion=0.1, dim=1), lambda x: x[..., 0] ** 2, 2.0)
    for call in (control.value, control.expected_value):
        one, _ = timed(lambda call=call: call(torched, x, **ask))
        other, _ = timed(lambda call=call: call(torched, x, **ask | {"max_cells": 60}))
        assert one.item() != other.item()  # another grid
        assert abs(one.item() - other.item()) < 1e-6


def still(columns=None):
    """A problem whose grid is given."""
    final = (lambda x: x[..., 0]) if columns is None else (lambda x: x[..., :1] * np.ones(columns))
    return KolmogorovProblem(SDE(0.0, diffusion=0.1, dim=1), final, 1.0, Box(-1.0, 1.0, "reflecting"))


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: solve(still(), grid=1001, steps=10**6, max_seconds=1.0), "grid: got 1001 nodes, 1000000 steps"),
        (lambda: solve(still(1000), grid=1001, steps=10**4, max_seconds=1.0), "1000 columns, 10000 steps"),
        (lambda: solve_forward(still(), [0.0], grid=1001, steps=10**6, max_seconds=1.0), "1001 nodes, 1000000 steps"),
    ],
)
def test_what_is_sure_to_take_longer_is_refused_before_it_begins(call, told, monkeypatch):
    monkeypatch.setattr(march, "time_nodes", None)  # nothing is laid out
    message = rf"{told}, which take at least [\d.]+ s; needed at most max_seconds = 1\."
    with pytest.raises(kolmo.InputError, match=message):
        call()


def test_recipes_and_cells_count_too():
    found = solve(still(), grid=101, steps=50)
    for later in (solve, lambda *a, **k: solve_forward(a[0], [0.0], **k)):
        with pytest.raises(kolmo.InputError, match=r"discretization: got 101 nodes, 50 steps.*max_seconds = 1e-07"):
            later(still(), discretization=found.discretization, max_seconds=1e-7)
        with pytest.raises(kolmo.InputError, match="max_cells = 100"):
            later(still(), grid=101, steps=50, max_cells=100)
    assert solve(still(), grid=101, steps=50, max_cells=101, max_seconds=60.0).status == "fixed"


def test_a_march_that_is_late_ends():
    for later in (solve, lambda *a, **k: solve_forward(a[0], [0.0], **k)):
        begun = time.perf_counter()
        with pytest.raises(kolmo.NotConvergedError, match=r"max_seconds = 0\.3"):
            later(still(), grid=401, steps=30_000, stepper="radau5", max_seconds=0.3)
        assert time.perf_counter() - begun < 30.0


def test_the_time_that_is_predicted_is_a_lower_bound():
    for columns in (None, 20):
        begun = time.process_time()
        solve(still(columns), grid=401, steps=500)
        assert PER_NODE * 401 * 500 * (columns or 1) < 0.5 * (time.process_time() - begun)


def test_limits_say_which_is_broken():
    limits = Limits.of(None, None, 100, 5.0)
    assert limits.excess(101, 0.0) == "max_cells = 100"
    assert limits.excess(50, 6.0) == "max_seconds = 5"
    assert limits.excess(50, 1.0) == ""
    over = Limits(10, 1.0, limits.started - 100.0)
    assert over.late()
    with pytest.raises(OutOfTimeError):
        over.check()
    assert over.affords(0.05)
    assert not over.affords(0.5)
    assert Limits.of(7, math.inf, 100, 5.0).excess(7, 1e9) == ""


@pytest.mark.parametrize("seed", range(6))
def test_ctrl_c_in_any_solve_of_a_search_ends_it(monkeypatch, seed):
    """Also in those that only look at the cut, at axes or at steps: a part of a march is compared with nothing."""
    dim = 1 + seed % 2
    sde = kolmo.SDE(lambda t, x: -x, diffusion=1.0, dim=dim)
    problem = kolmo.KolmogorovProblem(sde, lambda x: np.cos(x).sum(-1), 1.0)
    backward, calls, at = March.backward, [], np.inf

    def interrupted(march, *args, **named):
        calls.append(march)
        run = backward(march, *args, **named)
        return dataclasses.replace(run, interrupted=True, state=0.5 * run.state) if len(calls) == at else run

    monkeypatch.setattr(March, "backward", interrupted)
    assert kolmo.solve(problem, at=[[0.3] * dim], rtol=1e-5).status == "converged"
    for at in {1, 2, *np.random.default_rng(seed).integers(1, len(calls) + 1, 3).tolist()}:
        calls.clear()
        assert kolmo.solve(problem, at=[[0.3] * dim], rtol=1e-5).status == "interrupted", at
        assert len(calls) == at


def test_a_method_that_runs_away_leaves_its_last_level_where_no_other_has_time(monkeypatch):
    """It is told, without an estimate: nothing is thrown away."""
    solve_on, calls = levels.Levels._solve_on, []

    def running_away(search, *args, **named):
        calls.append(search.stepper)
        if len(calls) > 3:
            raise OutOfTimeError if search.stepper == levels.IMPLICIT else levels.RanAwayError
        return solve_on(search, *args, **named)

    monkeypatch.setattr(levels.Levels, "_solve_on", running_away)
    sde = kolmo.SDE(lambda t, x: -x, diffusion=1.0, dim=1)
    solution = kolmo.solve(kolmo.KolmogorovProblem(sde, lambda x: np.cos(x[..., 0]), 1.0), at=[[0.3]], rtol=1e-9)
    assert calls[-1] == levels.IMPLICIT
    assert solution.status == "tolerance_not_met"
    assert np.isinf(solution.error_estimate).all()
    assert "ran away" in solution.message
    assert np.isfinite(solution([[0.3]])).all()
