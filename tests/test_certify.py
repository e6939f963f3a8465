"""Certificates: within their own uncertainty of the true error, whatever was solved and however badly."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import kolmo
from kolmo import SDE, Absorbing, Box, Grid, KolmogorovProblem, Robin, catalog, certify
from kolmo.errors import InputError, KolmoWarning, NotConvergedError
from kolmo.grid.grading import Sinh
from kolmo.montecarlo.estimators import Draws, simulate
from kolmo.montecarlo.methods import METHODS
from kolmo.refine.smooth import Interpolant, clock, error_problem, interpolants
from validation.certificates import trial


def first(x):
    return x[..., 0]


def wave(t, x):
    """Smooth, and no solution of anything."""
    return (1.0 + 0.5 * np.sin(3.0 * t)) * np.prod(np.cos(0.7 * x + 0.4), -1)


def anything(box, columns=1, stationary=False):
    """An interpolant of that wave, in several multiples, on a finite box."""
    grid = Grid.of(box, 33 if box.dim < 3 else 17)
    times = [0.0] if stationary else np.linspace(0.0, 1.0, 21)
    states = np.stack([wave(t, grid.points)[:, None] * np.arange(1.0, columns + 1.0) for t in times])
    return Interpolant(grid, times, states)


# ------------------------------------------------------------------------------------------------- true errors
@pytest.mark.parametrize("seed", range(1000, 1012))
def test_true_error_of_a_random_problem(seed):
    found = trial(seed, paths=1000, steps=60, largest=1)
    assert found.away <= 4.0, found  # twelve problems with several columns: three would be too often by chance


@pytest.mark.slow
def test_true_errors_of_two_hundred_random_problems():
    trials = [trial(seed) for seed in range(2000, 2200)]
    off = [str(t) for t in trials if t.away > 3.0]
    assert len(off) <= 5, "\n".join(off)


CASES = [
    "ornstein_uhlenbeck", "layered_ornstein_uhlenbeck", "reflected_brownian_motion", "elastic_brownian_motion",
    "survival", "exit_right", "down_and_out_call", "wright_fisher", "running_cost", "harmonic_killing", "linear_sde",
    "committor", "mean_exit_time_rectangle",
]  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_identity_holds_for_any_smooth_function(name):
    """Also for one that fulfils neither the equation nor the terminal data nor any condition on a face."""
    case = catalog.CASES[name]()
    stationary = case.problem.stationary
    scale = np.full(case.problem.dim, 100.0 if name == "down_and_out_call" else 1.0)
    box = case.problem.box
    low = np.where(np.isfinite(box.lower), box.lower, -4.0 * scale)
    box = box.replace(low, np.where(np.isfinite(box.upper), box.upper, 4.0 * scale))
    columns = case.values.shape[-1] if case.values.ndim > 1 else None
    v = anything(box, columns or 1, stationary)
    points = case.points[:2]
    found = simulate(
        error_problem(case.problem, v, columns), points[:, None], np.ones((1, 1)),
        Draws(1000, 12, 3) if stationary else Draws(4000, 48, 3), METHODS["euler"], None, sampled=True,
    )  # fmt: skip
    truth = case.values[:2].reshape(len(points), -1) - v(0.0, points)
    assert (np.abs(found.mean - truth) <= 4.0 * found.standard_error + found.bias + 1e-9).all()
    assert found.standard_error.max() < 0.1 * np.abs(truth).max() + 0.05 * scale.max()


def test_conditions_on_walls_that_the_smooth_function_does_not_fulfil_are_paid_for():
    """Two dimensions, correlated noise, an elastic, a reflecting and an absorbing face with data that vary."""
    S = np.array([[1.0, 0.4], [0.4, 0.8]])
    faces = [(Robin(0.8, lambda t, x: x[..., 1]), "reflecting"), (Absorbing(lambda t, x: t + x[..., 0]), "reflecting")]
    box = Box([0.0, 0.0], [1.0, 1.2], faces)
    problem = KolmogorovProblem(
        SDE(lambda t, x: 0.3 - x, covariance=S),
        lambda x: np.cos(x.sum(-1)),
        0.4,
        box,
        killing=0.5,
        source=lambda t, x: first(x),
    )
    at = np.array([[0.5, 0.6], [0.1, 1.1]])
    truth = kolmo.solve(problem, grid=(41, 49), steps=24, stepper="mcs3")
    v = anything(box)
    error, draws = error_problem(problem, v, None), Draws(6000, 64, 0)
    found = simulate(error, at[:, None], np.ones((1, 1)), draws, METHODS["euler"], None, sampled=True)
    off = np.abs(found.mean[:, 0] + v(0.0, at)[:, 0] - truth(at))
    assert (off < 4.0 * found.standard_error[:, 0] + found.bias[:, 0]).all(), off
    assert found.standard_error.max() < 0.02


def test_a_wrong_answer_called_converged_is_found_out():
    """A drift that is on for a twentieth of the time, and is said to be constant."""
    problem = KolmogorovProblem(
        SDE(lambda t, x: 5.0 * (0.31 < t < 0.36) + 0.0 * x, 1.0, dim=1, autonomous=True),  # which is not true
        lambda x: np.cos(first(x)),
        1.0,
    )
    grid = Grid.of(Box(-7.0, 7.0), 81)
    solution = kolmo.solve(problem, grid=grid, steps=8)
    truth = math.exp(-0.5) * math.cos(0.55) - float(solution(0.3))
    found = certify(problem, solution, 0.3, paths=1000, steps=400, rng=0)
    assert abs(found.error - truth) < 4.0 * found.uncertainty
    assert abs(found.error) > 3.0 * found.uncertainty
    assert "a real error" in str(found)


def test_a_small_error_is_measured_to_its_own_size():
    case = catalog.ornstein_uhlenbeck("cos")
    solution = kolmo.solve(case.problem, at=case.points, rtol=1e-4)
    found = certify(case.problem, solution, case.points, paths=1000, steps=100, rng=0)
    truth = case.values - solution(case.points)
    assert (np.abs(found.error - truth) < 4.0 * found.uncertainty).all()
    assert found.uncertainty.max() < 1e-6
    assert np.allclose(found.corrected, case.values, atol=4e-6)
    assert (found.bound >= np.abs(found.error)).all()


@pytest.mark.parametrize("place", [0.3, -0.41])
def test_on_a_grid_with_a_node_on_a_jump_the_smooth_function_has_no_corner(place):
    problem = KolmogorovProblem(
        SDE(0.0, diffusion=1.0, dim=1), lambda x: 0.0 * first(x), 1.0, source=lambda t, x: 1.0 * (first(x) > place)
    )
    solution = kolmo.solve(problem, at=[0.0], rtol=1e-4)
    assert solution.grid.axes[0].breaks
    smooth = next(interpolants(problem, solution.discretization, 0.3))
    sides = smooth.slope(0.5, np.array([[place - 1e-9], [place + 1e-9]]), np.ones((1, 1)))
    assert abs(sides[0] - sides[1]) < 1e-6
    found = certify(problem, solution, [0.0], paths=2000, steps=60, rng=0)
    assert abs(found.error) < 3.0 * found.uncertainty < 3e-3, found


def test_averages_of_a_slanted_break_are_made_anew_for_the_grid_of_the_smooth_function():
    problem = KolmogorovProblem(
        SDE(0.0, diffusion=1.0, dim=2),
        lambda x: 0.0 * first(x),
        1.0,
        source=lambda t, x: 1.0 * (first(x) + 0.5 * x[..., 1] > 0.3),
    )
    solution = kolmo.solve(problem, at=[[0.0, 0.0]], rtol=1e-2)
    assert "source" in solution.discretization.averages
    found = certify(problem, solution, [[0.0, 0.0]], paths=200, steps=40, rng=0)
    assert abs(found.error) < 3.0 * found.uncertainty + solution.error_estimate < 0.03, found


def test_the_gradient_is_certified_with_common_noise():
    case = catalog.linear_sde(dim=2, terminal="gauss")
    low, high = [-4.0, -4.0], [4.0, 4.0]
    solution = kolmo.solve(case.problem, grid=Grid.of(Box(low, high), 25), steps=10)
    fine = kolmo.solve(case.problem, at=case.points, rtol=1e-5)
    found = certify(case.problem, solution, case.points, paths=500, steps=40, rng=0, gradient=True)
    truth = fine.gradient(case.points) - solution.gradient(case.points)
    assert found.error.shape == truth.shape == case.points.shape
    assert (np.abs(found.error - truth) < 4.0 * found.uncertainty + 0.05 * np.abs(truth).max()).all()
    assert found.uncertainty.max() < 0.2 * np.abs(truth).max()


def test_the_gradient_at_a_wall_looks_inside():
    case = catalog.reflected_brownian_motion()
    solution = kolmo.solve(case.problem, at=case.points, rtol=1e-4)
    edge = case.problem.box.lower[0]
    found = certify(case.problem, solution, edge, paths=200, steps=20, rng=0, gradient=True)
    assert found.error.shape == (1,)
    assert np.isfinite(found.error).all()


# ------------------------------------------------------------------------------------------------- instants
def pulse(width):
    """∫g is 1 whatever the width; the function that is certified knows nothing of it."""
    problem = KolmogorovProblem(
        SDE(0.0, 0.3, dim=1),
        lambda x: 0.0 * first(x),
        1.0,
        Box(-3.0, 3.0, "reflecting"),
        source=lambda t, x: (abs(t - 0.4) < 0.5 * width) / width + 0.0 * first(x),
    )
    zero = Interpolant(Grid.of(problem.box, 9), [0.0], np.zeros((1, 9, 1)))
    return error_problem(problem, zero, None)


def sampled(problem, seed, paths=10, steps=20):
    draws = Draws(paths, steps, seed)
    return simulate(problem, np.zeros((1, 1, 1)), np.ones((1, 1)), draws, METHODS["euler"], None, sampled=True)


def test_instants_see_a_pulse_shorter_than_a_step_as_often_as_it_lasts():
    """And say how uncertain they are: all paths share the instants, so that their spread alone would be zero."""
    problem = pulse(0.02)
    runs = [sampled(problem, seed, paths=4, steps=14) for seed in range(80)]
    mean, spread = np.mean([r.mean for r in runs]), np.std([r.mean for r in runs])
    assert abs(mean - 1.0) < 4.0 * spread / math.sqrt(len(runs))
    assert spread > 0.5
    told = math.sqrt(np.mean([r.standard_error**2 for r in runs]))
    assert 0.8 * spread < told < 2.0 * spread


def test_steps_get_shorter_towards_the_horizon_and_keep_to_breakpoints():
    seen = []

    def drift(t, x):
        seen.append(t)
        return 0.0 * x

    problem = KolmogorovProblem(SDE(drift, 1.0, dim=1, breakpoints=[0.5]), first, 1.0, Box(-5.0, 5.0))
    found = sampled(problem, 0, steps=16)
    instants = np.unique(seen[1:])
    assert found.steps == 16
    assert (np.histogram(instants[instants < 0.5], 8, (0.0, 0.5))[0] > 0).all()  # equal steps of 1/16 before
    assert 1.0 - instants.max() < 0.5 / 64  # eight of them as squares after


# ------------------------------------------------------------------------------------------------- interpolants
@pytest.mark.parametrize("word", ["open", "periodic"])
@pytest.mark.parametrize(("d", "n"), [(1, 60), (2, 40), (3, 26)])
def test_the_smooth_function_and_its_derivatives(d, n, word, rng):
    length = 2 * np.pi
    gradings = None if word == "periodic" else [Sinh(0.0, length, 2.0, 6.0)] * d
    grid = Grid.of(Box([0.0] * d, [length] * d, word), n, gradings)

    def f(x):
        return np.stack([np.prod(np.sin(x + 0.3), -1), np.cos(x.sum(-1))], -1)

    times = np.linspace(0.0, 1.0, 9)
    v = Interpolant(grid, times, np.stack([f(grid.points) * (1.0 + t**3) for t in times]))
    x = rng.uniform(0.2, length - 0.2, (200, d))
    b, G, e = rng.normal(size=(200, d)), rng.normal(size=(200, d, d)), 1e-3
    S = G @ np.swapaxes(G, 1, 2)
    value, rate, image = v.parts(0.37, x, b, S)
    wanted, unit = 0.0, e * np.eye(d)
    for i in range(d):
        wanted = wanted + b[:, i, None] * (f(x + unit[i]) - f(x - unit[i])) / (2 * e)
        for j in range(d):
            corners = [s * t * f(x + s * unit[i] + t * unit[j]) for s in (1, -1) for t in (1, -1)]
            wanted = wanted + 0.5 * S[:, i, j, None] * sum(corners) / (4 * e**2)
    factor = 1.0 + 0.37**3
    assert np.allclose(value, factor * f(x), atol=3e-5)
    assert np.allclose(rate, 3 * 0.37**2 * f(x), atol=3e-5)
    assert np.abs(image - factor * wanted).max() < 2e-3 * np.abs(wanted).max()


def test_beyond_the_grid_it_goes_on_as_a_line_without_a_kink(rng):
    grid = Grid.of(Box([-1.0, 0.0], [1.0, 2.0]), 15, [Sinh(-1.0, 1.0, 0.3, 0.5), Sinh(0.0, 2.0, 1.0, 1.0)])
    v = Interpolant(grid, [0.0], np.exp(grid.points.sum(-1))[None, :, None])
    for edge, axis, normal in ((1.0, 0, 1.0), (0.0, 1, -1.0)):
        x = np.array([[0.4, 1.3]])
        x[0, axis] = edge
        step = normal * np.eye(2)[axis]
        values = np.array([v(0.0, x + s * step)[0, 0] for s in (-1e-6, 0.0, 1e-6, 1.0, 2.0)])
        assert np.isclose(values[1] - values[0], values[2] - values[1], rtol=1e-4)
        assert np.isclose(values[4] - values[3], values[3] - values[1], rtol=1e-9)


def test_the_derivative_in_time_jumps_at_breakpoints_only():
    grid, times = Grid.of(Box(0.0, 1.0), 9), np.linspace(0.0, 1.0, 21)
    states = np.stack([np.full((9, 1), abs(t - 0.5)) for t in times])
    v = Interpolant(grid, times, states, breaks=[0.5])
    x, b, S = np.array([[0.3]]), np.zeros((1, 1)), np.zeros((1, 1, 1))
    for t, slope in ((0.1, -1.0), (0.49, -1.0), (0.5, 1.0), (0.51, 1.0), (0.9, 1.0)):
        assert np.isclose(v.parts(t, x, b, S)[1].item(), slope)
        assert np.isclose(v(t, x).item(), abs(t - 0.5))


@pytest.mark.parametrize("nodes", [3, 4, 6, 7])
def test_few_nodes_are_joined_by_one_polynomial(nodes):
    grid = Grid.of(Box(0.0, 1.0), nodes)
    degree = min(nodes - 1, 5)
    v = Interpolant(grid, [0.0], grid.points[None] ** degree)
    x = np.linspace(0.0, 1.0, 7)[:, None]
    assert np.allclose(v(0.0, x), x**degree, atol=1e-12)


def test_solved_again_it_keeps_close_to_the_solution_at_all_times():
    case = catalog.layered_ornstein_uhlenbeck()
    solution = kolmo.solve(case.problem, at=case.points, rtol=1e-4)
    v = next(interpolants(case.problem, solution.discretization))
    for t in (0.0, 0.3 * case.problem.horizon, 0.97 * case.problem.horizon):
        assert np.allclose(v(t, case.points)[:, 0], case.exact(t, case.points), atol=1e-4)


def test_the_clock_serves_other_horizons_and_units():
    solution = kolmo.solve(
        KolmogorovProblem(SDE(0.0, 1.0, dim=1), first, 1.0, Box(-1.0, 1.0, "reflecting")), grid=21, steps=7
    )
    for T in (1e-9, 1.0, 1e9):
        problem = KolmogorovProblem(
            SDE(0.0, covariance=1.0 / T, dim=1, breakpoints=[0.31 * T]), first, T, Box(-1.0, 1.0, "reflecting")
        )
        nodes, kept = clock(problem, solution.discretization, longest=0.01 * T)
        assert np.diff(nodes).max() < 0.0101 * T
        assert (np.diff(nodes) > 0).all()
        assert np.isclose(nodes[kept] / T, 0.31, rtol=1e-12).any()
        found = certify(problem, solution, 0.4, paths=50, steps=20, rng=0)
        assert abs(found.error) < 1.0


# ------------------------------------------------------------------------------------------------- the function
@pytest.fixture(scope="module")
def rough():
    """A source that jumps, on a coarse grid with a node on the jump: off by a quarter."""
    problem = KolmogorovProblem(
        SDE(0.0, 1.0, dim=1), lambda x: 0.0 * first(x), 1.0, source=lambda t, x: 1.0 * (x[..., 0] > 0.3)
    )
    return problem, kolmo.solve(problem, grid=Grid.of(Box(-6.0, 6.0), 41), steps=16)


def test_randomness_shapes_and_words(rough):
    problem, solution = rough
    found = certify(problem, solution, [[0.0], [0.5]], paths=200, steps=20, rng=5)
    again = certify(problem, solution, [[0.0], [0.5]], paths=200, steps=20, rng=found.rng)
    assert found.error.shape == found.standard_error.shape == found.bias_estimate.shape == (2,)
    assert np.array_equal(found.error, again.error)
    assert found.status == "finished"
    assert found.seconds > 0.0
    assert (found.paths, found.steps, found.rng) == (200, 20, 5)
    assert str(found).count("off by") == 2
    with pytest.raises(AttributeError):
        found.error = 0.0
    one = certify(problem, solution, 0.0, paths=200, steps=20, rng=5)
    assert np.shape(one.error) == ()


def test_tensors_in_tensors_out(rough):
    problem, solution = rough
    plain = certify(problem, solution, [[0.0], [0.5]], paths=100, steps=10, rng=1)
    tensor = certify(
        KolmogorovProblem(
            SDE(0.0, 1.0, dim=1), lambda x: 0.0 * x[..., 0], 1.0, source=lambda t, x: 1.0 * (x[..., 0] > 0.3)
        ),
        solution,
        torch.tensor([[0.0], [0.5]], dtype=torch.float64),
        paths=100,
        steps=10,
        rng=1,
    )
    assert isinstance(tensor.error, torch.Tensor)
    assert isinstance(tensor.bound, torch.Tensor)
    assert np.allclose(tensor.error.numpy(), plain.error)


def test_a_solution_read_from_a_file_is_certified(rough, tmp_path):
    problem, solution = rough
    solution.save(tmp_path / "u.npz")
    a = certify(problem, solution, 0.0, paths=100, steps=10, rng=1)
    b = certify(problem, kolmo.load(tmp_path / "u.npz"), 0.0, paths=100, steps=10, rng=1)
    assert a.error == b.error


def test_where_the_discretisation_has_no_answer_any_function_does(rough, monkeypatch):
    problem, solution = rough

    def nothing(*_):
        raise NotConvergedError("infinite")

    monkeypatch.setattr("kolmo.montecarlo.certificate.interpolants", nothing)
    found = certify(problem, solution, 0.0, paths=4000, steps=40, rng=0)
    assert abs(found.error + float(solution(0.0)) - 0.30205975) < 4.0 * found.uncertainty
    assert "does not solve" in found.message


def test_paths_that_never_end_are_told(monkeypatch):
    problem = KolmogorovProblem(
        SDE(lambda t, x: -30.0 * x, diffusion=0.1, dim=1), None, None, Box(-1.0, 1.0, "absorbing"), source=1.0
    )
    held = KolmogorovProblem(problem.sde, None, None, problem.box, source=1.0, killing=1e-3)
    solution = kolmo.solve(held, grid=41)
    monkeypatch.setattr("kolmo.montecarlo.pairs.CROSSINGS", 50)
    with pytest.warns(KolmoWarning, match="missing from the error"):
        found = certify(problem, solution, 0.0, paths=2, steps=2, rng=0)
    assert found.status == "truncated"
    assert np.isinf(found.bias_estimate)


def test_what_does_not_fit_is_named(rough):
    problem, solution = rough
    pair = KolmogorovProblem(SDE(0.0, 1.0, dim=1), lambda x: np.stack([first(x), first(x)], -1), 1.0)
    plane = KolmogorovProblem(SDE(0.0, 1.0, dim=2), first, 1.0)
    still = kolmo.solve(
        KolmogorovProblem(SDE(0.0, 1.0, dim=1), None, None, Box(-1.0, 1.0, "absorbing"), source=1.0), grid=21
    )
    for wrong, given in ((pair, solution), (problem, still)):
        with pytest.raises(InputError, match="solution"):
            certify(wrong, given, 0.0, paths=10, steps=4, rng=0)
    with pytest.raises(InputError, match="dimensions"):
        certify(plane, solution, [[0.0, 0.0]], paths=10, steps=4, rng=0)
    for options, argument in (({"paths": 1}, "paths"), ({"steps": 1}, "steps"), ({"rng": -1}, "rng")):
        with pytest.raises(InputError, match=argument):
            certify(problem, solution, 0.0, **{"paths": 10, "steps": 4, "rng": 0, **options})
