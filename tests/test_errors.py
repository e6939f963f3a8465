"""Bad input: every message names the argument, what came and what is needed."""
# ruff: noqa: E501 -- one case a line

import numpy as np
import pytest

import kolmo
from kolmo import SDE, Absorbing, Box, Grid, InputError, KolmogorovProblem, Robin, plan, solve
from kolmo.control import expected_value, value
from kolmo.problem.problem import check_vectorised
from kolmo.refine.plan import search


def one(x):
    return x[..., 0]


def problem(drift=0.0, box=None, **options):
    noise = {"diffusion": 1.0} if "covariance" not in options else {"covariance": options.pop("covariance")}
    dim = options.pop("dim", 1)
    terminal = options.pop("terminal", one)
    box = Box([0.0] * dim, [1.0] * dim, "reflecting") if box is None else box
    return KolmogorovProblem(SDE(drift, dim=dim, **noise), terminal, options.pop("horizon", 1.0), box, **options)


def run(**options):
    return solve(problem(**options), grid=15, steps=4)


SOLUTION = solve(problem(), grid=15, steps=4)

CASES = {
    "both noises": (lambda: SDE(0.0, 1.0, covariance=1.0), "diffusion, covariance", "both"),
    "breakpoints": (lambda: SDE(0.0, 1.0, dim=1, breakpoints=[0.5, 0.2]), "breakpoints", "increasing"),
    "breakpoints outside": (lambda: KolmogorovProblem(SDE(0.0, 1.0, dim=1, breakpoints=[2.0]), one, 1.0), "breakpoints", "inside"),
    "arrays": (lambda: SDE(0.0, 1.0, dim=1, arrays="jax"), "arrays", "'torch'"),
    "dim": (lambda: SDE(0.0, 1.0, dim=0), "dim", "positive"),
    "no dim": (lambda: KolmogorovProblem(SDE(lambda t, x: x), one, 1.0), "dim", "tells"),
    "too many dims": (lambda: KolmogorovProblem(SDE(0.0, 1.0, dim=4), one, 1.0), "dim", "features"),
    "dims disagree": (lambda: KolmogorovProblem(SDE(0.0, 1.0, dim=2), one, 1.0, Box(0.0, 1.0)), "sde, box", "dimensions"),
    "negative horizon": (lambda: problem(horizon=-1.0), "horizon", "-1.0"),
    "absurd horizon": (lambda: problem(horizon=1e307), "horizon", "below"),
    "infinite horizon": (lambda: problem(horizon=np.inf), "horizon", "positive"),
    "terminal without horizon": (lambda: problem(horizon=None), "terminal, horizon", "stationary"),
    "terminal is no function": (lambda: problem(terminal=3.0), "terminal", "function"),
    "swapped corners": (lambda: Box(1.0, 0.0), "lower, upper", "lower < upper"),
    "unknown face": (lambda: Box(0.0, 1.0, "absorb"), "boundary[0][0]", "absorbing"),
    "half periodic": (lambda: Box(0.0, 1.0, [("periodic", "open")]), "boundary[0]", "both"),
    "too many faces": (lambda: Box(0.0, 1.0, ["open", "open"]), "boundary", "1 axes"),
    "wall at infinity": (lambda: Box(0.0, np.inf, "reflecting"), "boundary[0][1]", "infinity"),
    "false natural face": (lambda: run(box=Box(0.0, 1.0, "natural")), "boundary[0][0]", "noise"),
    "unknown scheme": (lambda: solve(problem(), grid=15, steps=4, scheme="central5"), "scheme", "central4"),
    "unknown stepper": (lambda: solve(problem(), grid=15, steps=4, stepper="radau"), "stepper", "radau5"),
    "unknown backend": (lambda: solve(problem(), grid=15, steps=4, backend="jax"), "backend", "numba"),
    "no steps": (lambda: solve(problem(), grid=15), "steps", "positive"),
    "steps alone": (lambda: solve(problem(), steps=4), "steps", "grid"),
    "steps are no number": (lambda: solve(problem(), grid=15, steps=2.5), "steps", "2.5"),
    "unstable steps": (lambda: solve(problem(), grid=99, steps=4, stepper="rk4"), "steps", "at least"),
    "too few nodes": (lambda: solve(problem(), grid=5, steps=4, scheme="central6"), "grid[0]", "at least 9"),
    "grid of other dimension": (lambda: solve(problem(), grid=(15, 15), steps=4), "grid", "1 numbers"),
    "grid and recipe": (lambda: solve(problem(), discretization=SOLUTION.discretization, grid=9), "discretization, grid, steps", "either"),
    "recipe of other dimension": (lambda: solve(problem(dim=2), discretization=SOLUTION.discretization), "discretization", "2 dimensions"),
    "infinite grid": (lambda: Grid.of(Box(-np.inf, np.inf), 9), "box", "finite"),
    "negative rtol": (lambda: solve(problem(), rtol=-1.0), "rtol", "non-negative"),
    "NaN atol": (lambda: plan(problem(), atol=np.nan), "atol", "nan"),
    "no points": (lambda: solve(problem(), at=np.zeros((0, 1))), "at", "at least one"),
    "NaN points": (lambda: solve(problem(), at=[np.nan]), "at", "NaN"),
    "point beyond a wall": (lambda: solve(problem(), at=[0.5, 1.5]), "at", "1.5"),
    "unbounded without points": (lambda: solve(problem(box=Box(-np.inf, np.inf))), "at", "finite box"),
    "wrong axis": (lambda: solve(problem(dim=2), at=[[0.1, 0.2, 0.3]]), "at", "(..., 2)"),
    "save outside": (lambda: solve(problem(), grid=15, steps=4, save=[2.0]), "save", "between"),
    "evaluate outside": (lambda: SOLUTION(1.5), "x", "1.5"),
    "time not saved": (lambda: SOLUTION(0.5, t=0.25), "t", "saved"),
    "NaN drift": (lambda: run(drift=lambda t, x: np.where(x > 0.8, np.nan, x)), "drift", "x = [0.8"),
    "infinite killing": (lambda: run(killing=lambda t, x: 1.0 / np.where(x[..., 0] == 0.5, 0.0, 1.0)), "killing", "x = [0.5]"),
    "NaN source": (lambda: run(source=lambda t, x: np.sqrt(x[..., 0] - 0.5)), "source", "x = [0.0]"),
    "NaN terminal": (lambda: run(terminal=lambda x: np.sqrt(x[..., 0] - 0.2)), "terminal", "finite"),
    "NaN absorbing value": (lambda: run(box=Box(0.0, 1.0, Absorbing(np.nan))), "Absorbing.value", "finite"),
    "NaN covariance": (lambda: run(covariance=lambda t, x: np.nan + x[..., 0]), "covariance", "x = [0.0]"),
    "negative covariance": (lambda: run(covariance=lambda t, x: x[..., 0] - 0.5), "covariance", "eigenvalue -0.5"),
    "indefinite covariance": (
        lambda: run(dim=2, covariance=lambda t, x: np.array([[1.0, 2.0], [2.0, 1.0]]) * np.ones((*x.shape, 1))), "covariance", "eigenvalue -1",
    ),
    "skew covariance": (lambda: run(dim=2, covariance=[[1.0, 0.2], [0.0, 1.0]]), "covariance", "symmetric"),
    "drift of wrong shape": (lambda: run(dim=2, drift=lambda t, x: np.ones((*x.shape[:-1], 3))), "drift", "(..., 2)"),
    "drift not vectorised": (lambda: run(dim=2, drift=lambda t, x: np.array([1.0, 2.0, 3.0])), "drift", "vectorised"),
    "terminal not vectorised": (lambda: run(terminal=lambda x: x[0]), "terminal", "vectorised"),
    "killing with columns": (lambda: run(killing=lambda t, x: np.ones((*x.shape[:-1], 3))), "killing", "shape"),
    "stationary and nothing holds": (
        lambda: solve(KolmogorovProblem(SDE(0.0, 1.0, dim=1), None, None, Box(0.0, 1.0, "reflecting"), source=1.0), grid=15), "box, killing", "holds",
    ),
    "weights": (lambda: expected_value(problem(), [0.1, 0.2], [1.0, 2.0, 3.0], discretization=SOLUTION.discretization), "weights", "(2,)"),
    "value with another recipe": (lambda: value(problem(dim=2), [[0.1, 0.2]], discretization=SOLUTION.discretization), "discretization", "2 dimensions"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_message_names_what_is_wrong(name):
    call, argument, said = CASES[name]
    with pytest.raises(InputError) as caught:
        call()
    assert caught.value.argument == argument, str(caught.value)
    assert said in str(caught.value)
    assert "needed" in str(caught.value)


def test_errors_of_user_functions_name_the_function_and_keep_their_cause():
    with pytest.raises(InputError) as caught:
        run(drift=lambda t, x: "one" + x)
    assert caught.value.argument == "drift"
    assert isinstance(caught.value.__cause__, TypeError)


def test_damaged_and_missing_files(tmp_path):
    path = tmp_path / "u.npz"
    with pytest.raises(kolmo.KolmoError, match=r"u\.npz"):
        kolmo.load(path)
    path.write_bytes(b"not a zip file")
    with pytest.raises(kolmo.KolmoError, match=r"u\.npz"):
        kolmo.load(path)
    SOLUTION.discretization.save(path)
    with pytest.raises(kolmo.KolmoError, match=r"u\.npz"):
        kolmo.load(path)


def test_input_errors_are_value_errors_with_all_parts():
    error = InputError("steps", 0, "a positive number", "steps=8")
    assert isinstance(error, ValueError)
    assert isinstance(error, kolmo.KolmoError)
    assert str(error) == "steps: got 0; needed a positive number. Fix: steps=8."


def test_no_answer_raises_or_says_so():
    """A solution that overflows: an error, or with throw=False a solution of NaN."""
    endless = problem(horizon=1e5, source=1e305)
    with pytest.raises(kolmo.NotConvergedError):
        solve(endless, grid=15, steps=2)
    sol = solve(endless, grid=15, steps=2, throw=False)
    assert sol.status == "tolerance_not_met"
    assert np.isnan(sol.values).all()


def test_tolerance_not_met_warns_and_answers():
    tough = problem(box=Box(0.0, 1.0, Robin(1.0)), terminal=lambda x: np.sin(20.0 * x[..., 0]))
    outcome = search(tough, rtol=1e-13, atol=0.0, max_cells=150)
    assert outcome.status == "tolerance_not_met"
    assert "max_cells" in outcome.message
    assert np.isfinite(outcome.level.values).all()


def test_rounding_at_a_jump_is_no_dependence_on_other_points():
    def jump(x):  # alone at the threshold it is 0, beside others 1
        return (x[..., 0] + 2e-17 * x.size > 0.3).astype(float)

    points = np.array([[0.1], [0.3], [0.5]])
    assert jump(points)[1] != jump(points[1:2])[0]
    asked = problem(terminal=jump)
    check_vectorised(asked, points)


def test_dependence_on_other_points_is_seen_beside_larger_numbers_too():
    def columns(x):
        return np.stack([1e3 + x[..., 0], 1e-3 * (x[..., 0] - x[..., 0].mean())], -1)

    with pytest.raises(InputError, match="depends on the other points"):
        check_vectorised(problem(terminal=columns), np.array([[0.1], [0.3], [0.5]]))


@pytest.mark.parametrize("single", [True, False])
def test_rounding_of_a_network_in_single_precision_is_no_dependence_on_other_points(single):
    def rounded(x):  # in another order of its sums where there are more points
        value = np.sin(x[..., 0]) * (1 + 2e-7 * (x.size > 1)) + 1e-4
        return value.astype(np.float32) if single else value

    points = np.array([[0.1], [0.3], [0.5]])
    if single:
        check_vectorised(problem(terminal=rounded), points)
    else:
        with pytest.raises(InputError, match="depends on the other points"):
            check_vectorised(problem(terminal=rounded), points)
