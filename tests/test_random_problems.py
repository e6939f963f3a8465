"""Random problems: no converged answer is wrong by more than ten times its estimate; coordinates, duality, bounds.

A handful by default. ``KOLMO_RANDOM_PROBLEMS=200`` (or 1000) draws that many for the estimates, and the other checks in
proportion. A failure names the ``Spec`` that makes its problem again.
"""

import os
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1]))

import kolmo
from kolmo import catalog
from kolmo.testing import duality_gap, maximum_principle
from validation.random_problems import CATALOG, DATA, PERIODIC, WORDS, Spec, draw_rough, question, trial
from validation.rough_problems import CHARTED, MAKERS, SLANTED, in_units, rough_problem

COUNT = int(os.environ.get("KOLMO_RANDOM_PROBLEMS", "16"))
# How the problems are shared out: three dimensions only where there are many.
SHARES = {
    "free in 1-D": 0.3, "free in 2-D": 0.16, "free in 3-D": 0.02, "manufactured": 0.12, "closed form": 0.2,
    "rough": 0.2,
}  # fmt: skip
# The catalog's slowest problems are drawn with the rest only where there are many.
QUICK = [name for name in CATALOG if name not in ("margrabe", "linear_sde", "langevin", "rotation", "heat")]

seeds = st.integers(0, 2**32 - 1)
charts = st.one_of(st.just(0), st.integers(1, 2**16))
booleans = st.booleans()


def axes(dim, words=WORDS):
    """Faces of an axis: twice as often two different words as a periodic axis or twice the same."""
    words = st.sampled_from(words)
    axis = st.one_of(st.tuples(words, words), st.tuples(words, words), st.just(PERIODIC))
    return st.lists(axis, min_size=dim, max_size=dim).map(tuple)


def free(dim, words=WORDS, loads=booleans, data=DATA, chart=charts, noise=(1.0, 0.5, 0.2, 0.05)):
    mixed = st.sampled_from([0.0, 0.5, 0.8]) if dim > 1 else st.just(0.0)
    return st.builds(
        Spec, st.just("free"), seeds, axes(dim, words), st.sampled_from(data), booleans, loads, mixed,
        st.sampled_from(noise), chart,
    )  # fmt: skip


def manufactured():
    return st.integers(1, 2).flatmap(
        lambda d: st.builds(
            Spec, st.just("manufactured"), seeds, axes(d), clock=booleans, mixed=st.sampled_from([0.0, 0.4]),
            chart=charts,
        )
    )  # fmt: skip


DRAWN = {
    "free in 1-D": free(1),
    "free in 2-D": free(2),
    "free in 3-D": free(3),
    "manufactured": manufactured(),
    # with few problems those in one dimension, which take least
    "rough": st.integers(0, 2**20)
    .map(draw_rough)
    .filter(lambda s: COUNT >= 100 or not (s.kind in SLANTED or question(s).problem.dim > 1)),
    "closed form": st.builds(Spec, st.sampled_from(QUICK if COUNT < 100 else CATALOG), seeds, chart=charts),
}


def check_all(strategy, count, check):
    """Run a check on so many examples, the same in every run; the first failure is told as it is, not shrunk."""
    limits = settings(
        max_examples=count, derandomize=True, deadline=None, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip

    @limits
    @given(strategy)
    def run(example):
        check(example)

    run()


@pytest.mark.parametrize("what", list(DRAWN))
def test_estimates_are_honest(what):
    count = round(SHARES[what] * COUNT)
    if count == 0:
        pytest.skip("drawn where there are more problems: KOLMO_RANDOM_PROBLEMS=200")
    trials = []

    def check(spec):
        result = trial(spec)
        trials.append(result)
        assert not result.status.startswith("error"), result
        assert not result.dishonest, result

    check_all(DRAWN[what], count, check)
    assert sum(r.status == "converged" for r in trials) >= 0.5 * len(trials), trials


@pytest.mark.parametrize("kind", list(MAKERS))
def test_exact_answers_of_rough_problems(kind):
    """A sum of paths agrees with the closed form: what estimates are judged by is right itself."""
    for seed in range(2):
        rough = rough_problem(kind, seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if kind == "repelled":  # Euler's steps may cross the end: |W| in δ dimensions does not
                continue
            steps = 4_000 if kind.endswith("window") else 200  # many of them within the window
            est = kolmo.monte_carlo(rough.problem, rough.points, paths=4_000, steps=steps, rng=seed)
        spread = 5.0 * est.standard_error + np.abs(est.bias_estimate)
        assert (np.abs(np.asarray(est.mean) - rough.answer) <= spread + 0.05 * np.abs(rough.answer).max()).all(), (
            kind, seed, est, rough.answer,
        )  # fmt: skip


@pytest.mark.parametrize("kind", CHARTED[::4])
def test_rough_problems_in_other_units_and_coordinates(kind):
    """The same answers are asked for: in other units times the unit, in other coordinates the same."""
    plain, other = rough_problem(kind, 5), rough_problem(kind, 5, units=3)
    assert other.answer / other.unit == pytest.approx(plain.answer, rel=1e-12)
    same = in_units(plain, 1.0, 1.0, 1.0)
    t, x = 0.3 * (plain.problem.horizon or 0.0), plain.points
    assert np.asarray(same.problem.sde.drift(t, x)) == pytest.approx(np.asarray(plain.problem.sde.drift(t, x)))
    moved = question(Spec(kind, 5, chart=7))
    assert np.asarray(moved.answer) == pytest.approx(plain.answer)
    assert moved.points.shape == plain.points.shape


def test_coordinates_do_not_matter():
    """Twice by tolerance, on grids that have nothing in common: the difference keeps within the estimates."""

    def check(spec):
        from dataclasses import replace

        told = []
        for chart in (0, spec.seed % 997 + 1):
            asked = question(replace(spec, chart=chart))
            sol = kolmo.solve(asked.problem, at=asked.points, rtol=1e-3, atol=1e-9)
            told.append((np.asarray(sol(asked.points)), sol.error_estimate, sol.status))
        (u, e, first), (v, f, second) = told
        if first == second == "converged":
            assert (np.abs(u - v) <= 10.0 * (e + f)).all(), (spec, u, v, e, f)

    check_all(free(1, chart=st.just(0)), max(COUNT // 8, 3), check)


@pytest.mark.parametrize("dim", [1, 2])
def test_forward_and_backward_agree(dim):
    """Separately marched, with killing, source and face values: to rounding."""
    sizes = {1: (17, 5), 2: (11, 2)}

    def check(spec):
        problem = question(spec).problem
        low, high = np.array(problem.box.lower), np.array(problem.box.upper)
        low, high = np.where(np.isfinite(low), low, -1.5), np.where(np.isfinite(high), high, 2.5)
        grid = kolmo.Grid.of(problem.box.replace(low, high), sizes[dim][0])
        scheme = ["central2", "central6", "monotone"][spec.seed % 3]
        split = dim == 2 and scheme != "monotone"  # whose stencils do not split by axis
        stepper = ["radau5", "mcs3" if split else "radau3", "implicit-euler"][spec.seed // 3 % 3]
        table = duality_gap(problem, grid=grid, steps=sizes[dim][1], scheme=scheme, stepper=stepper, laws=1)
        assert table.worst("gap") < 1e-10, (spec, scheme, stepper, table)

    loads = st.just(True)
    check_all(free(dim, loads=loads, chart=st.just(0), noise=(1.0, 0.5)), max(COUNT // 3, 4), check)


@pytest.mark.parametrize("dim", [1, 2])
def test_monotone_steps_keep_the_maximum_principle(dim):
    def check(spec):
        problem = question(spec).problem
        low, high = np.array(problem.box.lower), np.array(problem.box.upper)
        low, high = np.where(np.isfinite(low), low, -1.5), np.where(np.isfinite(high), high, 2.5)
        grid = kolmo.Grid.of(problem.box.replace(low, high), {1: 21, 2: 11}[dim])
        table = maximum_principle(problem, grid=grid, steps=2, scheme="monotone", stepper="implicit-euler", trials=2)
        assert table.worst("overshoot") < 1e-11, (spec, table)

    check_all(free(dim, loads=st.just(False), chart=st.just(0)), max(COUNT // 3, 4), check)


def test_answers_keep_the_maximum_principle():
    """Without source, killing and paying faces u stays between the least and the largest terminal value, or zero."""

    def check(spec):
        asked = question(spec)
        sol = kolmo.solve(asked.problem, at=asked.points, rtol=1e-3, atol=1e-9)
        if sol.status == "converged":
            u, beyond = np.asarray(sol(asked.points)), 10.0 * sol.error_estimate + 1e-12
            # the smooth column has values in [-1, 1.5], the jump in [0, 1]
            jump = u if u.ndim == 1 else u[:, 0]
            least, largest = (0.0, 1.0) if spec.data == "jump" else (-1.0, 1.5)
            slack = beyond if u.ndim == 1 else beyond[:, 0]
            assert (jump >= least - slack).all(), (spec, u)
            assert (jump <= largest + slack).all(), (spec, u)

    drawn = free(1, loads=st.just(False), data=("jump", "smooth"))
    check_all(drawn, max(COUNT // 8, 3), check)


def test_simulation_agrees():
    """Monte Carlo shares neither grid nor scheme: within its bias estimate and five standard errors."""

    def check(spec):
        asked = question(spec)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sol = kolmo.solve(asked.problem, at=asked.points[:2], rtol=1e-3, atol=1e-9)
            est = kolmo.monte_carlo(asked.problem, asked.points[:2], paths=20_000, steps=64, rng=spec.seed)
        u = np.asarray(sol(asked.points[:2]))
        bound = 5.0 * est.standard_error + est.bias_estimate + 10.0 * sol.error_estimate
        assert (np.abs(u - est.mean) <= bound).all(), (spec, u, est)

    words = ("open", "reflecting", "absorbing", "robin")
    check_all(free(1, words=words, chart=st.just(0), noise=(1.0, 0.5)), 20 if COUNT >= 200 else 3, check)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kappa", "sigma", "x", "rtol"),
    [
        (0.8706212582543853, 0.02, 0.53348851551811, 1e-3),
        (-0.9632342375865768, 0.01, 0.09253204330032551, 1e-3),
        (0.8943221132707286, 0.02, 0.6177114476648327, 1e-2),
    ],
)
def test_points_inside_a_sharp_layer(kappa, sigma, x, rtol):
    """A jump carried by the drift stays sharp: the values of coarse grids at one point may agree by chance."""
    case = catalog.ornstein_uhlenbeck("indicator", kappa=kappa, mu=0.0, sigma=sigma)
    points = np.array([[x], [x + 0.4], [x - 0.8]])
    sol = kolmo.solve(case.problem, at=points, rtol=rtol, atol=1e-9)
    error = np.abs(np.asarray(sol(points)) - case.exact(0.0, points)).max()
    assert sol.status != "converged" or error <= 10.0 * sol.error_estimate.max(), (error, sol.error_estimate)


def test_unstable_steps_are_noticed_and_replaced():
    """Strong correlation at reflecting walls: split steps grow without bound there, explicit ones do not."""
    walls = ("absorbing", "reflecting")
    asked = question(Spec("free", 1, (walls, walls), "smooth", clock=False, loads=False, mixed=0.8, noise=1.0, chart=0))
    split = kolmo.solve(asked.problem, grid=(41, 41), steps=64, stepper="mcs3")
    assert np.abs(np.asarray(split(asked.points))).max() > 1e3
    sol = kolmo.solve(asked.problem, at=asked.points, rtol=1e-2, atol=1e-9)
    fixed = kolmo.solve(asked.problem, grid=(41, 41), steps=800, scheme="monotone", stepper="rk4")
    assert (sol.status, sol.discretization.stepper) == ("converged", "rk4")
    assert np.asarray(sol(asked.points)) == pytest.approx(np.asarray(fixed(asked.points)), abs=0.01)
