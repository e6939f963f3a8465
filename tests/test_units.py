"""The same problem in other units of place, time and value: the same digits."""

import numpy as np
import pytest

import kolmo
from kolmo import SDE, Absorbing, Box, KolmogorovProblem, Robin, monte_carlo, solve, solve_forward
from kolmo.grid.times import find, merged
from kolmo.march import March, time_nodes
from kolmo.problem.problem import check_covariance, check_vectorised
from kolmo.schemes.generator import discretize
from kolmo.steppers.base import STEPPERS
from kolmo.testing import manufactured

WORDS = ["open", "natural", "reflecting", "entrance", "absorbing", "robin"]


class Units:
    """Units of every coordinate, of time and of the values, drawn between 1e-9 and 1e9."""

    def __init__(self, rng, dim):
        self.x = 10.0 ** rng.uniform(-9.0, 9.0, dim)
        self.t, self.u = 10.0 ** rng.uniform(-9.0, 9.0, 2)

    def problem(self, given, breakpoints=()):
        """The problem stated in these units."""
        L, T, U = self.x, self.t, self.u

        def scaled(f, factor):
            return lambda t, x: factor * (f(t / T, x / L) if callable(f) else f)

        def face(f, i):
            if isinstance(f, Absorbing):
                return Absorbing(scaled(f.value, U))
            if isinstance(f, Robin):
                return Robin(scaled(f.kappa, L[i] / T), scaled(f.value, U * L[i] / T))
            return f

        sde = SDE(
            scaled(given.sde.drift, L / T),
            covariance=scaled(given.sde.covariance, np.multiply.outer(L, L) / T),
            dim=given.dim,
            breakpoints=[T * t for t in breakpoints] or None,
        )
        box = Box(
            L * np.array(given.box.lower),
            L * np.array(given.box.upper),
            [tuple(face(f, i) for f in pair) for i, pair in enumerate(given.box.faces)],
        )
        return KolmogorovProblem(
            sde,
            None if given.terminal is None else lambda x: U * given.terminal(x / L),
            None if given.horizon is None else T * given.horizon,
            box,
            killing=scaled(given.killing, 1.0 / T),
            source=scaled(given.source, U / T),
        )


def drawn(rng, dim):
    """A problem with everything in it and faces of any kind, some of them periodic; its points."""
    faces = []
    for _ in range(dim):
        periodic = rng.random() < 0.2
        faces.append(("periodic", "periodic") if periodic else tuple(str(w) for w in rng.choice(WORDS, 2)))
    case = manufactured(faces, autonomous=bool(rng.integers(2)))
    return case.problem, case.points


@pytest.mark.parametrize("seed", range(12))
def test_march_in_any_units(seed):
    """Every scheme and a stepper of each sort: values at t = 0 and at saved times, and the gradient."""
    rng = np.random.default_rng(seed)
    dim = 1 + seed % 2
    given, x = drawn(rng, dim)
    units = Units(rng, dim)
    scheme = str(rng.choice(["central2", "central4", "central6", "monotone"]))
    stepper = str(rng.choice(["radau5", "radau3", "implicit-euler"] if dim == 1 else ["mcs3", "radau5"]))
    breaks = [0.1, 0.25] if seed % 3 == 0 else []
    given = KolmogorovProblem(
        SDE(given.sde.drift, covariance=given.sde.covariance, dim=dim, breakpoints=breaks or None),
        given.terminal, given.horizon, given.box, killing=given.killing, source=given.source,
    )  # fmt: skip
    save = [0.05, 0.1, 0.3]
    options = {"grid": 19 if dim == 1 else 13, "steps": 9, "scheme": scheme, "stepper": stepper}
    one = solve(given, save=save, **options)
    other = solve(units.problem(given, breaks), save=[units.t * t for t in save], **options)
    size = np.abs(one.values).max()
    assert len(other.times) == len(one.times) == 4
    for t in [0.0, *save]:
        assert np.abs(other(units.x * x, units.t * t) / units.u - one(x, t)).max() < 1e-9 * size
    slope = np.moveaxis(other.gradient(units.x * x, units.t * 0.3), 1, -1) * units.x / units.u
    before = np.moveaxis(one.gradient(x, 0.3), 1, -1)
    assert np.abs(slope - before).max() < 1e-8 * np.abs(before).max()


@pytest.mark.parametrize("seed", range(4))
def test_forwards_in_any_units(seed):
    """Masses, times kept, and what goes out at every time node."""
    rng = np.random.default_rng(100 + seed)
    given, x = drawn(rng, 1)
    units = Units(rng, 1)
    one = solve_forward(given, x, grid=25, steps=8, save=[0.2])
    other = solve_forward(units.problem(given), units.x * x, grid=25, steps=8, save=[units.t * 0.2])
    assert np.abs(other.weights - one.weights).max() < 1e-10
    assert np.abs(other.value / units.u - one.value).max() < 1e-10 * np.abs(one.value).max()
    inside = np.array([[0.6], [0.9]])
    assert np.allclose(other(units.x * inside, units.t * 0.2) * units.x, one(inside, 0.2), rtol=1e-8, atol=1e-10)
    for way in one.exits:
        assert np.allclose(other.exit_flux(way) * units.t, one.exit_flux(way), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_paths_in_any_units(seed):
    """The same seed draws the same paths."""
    rng = np.random.default_rng(200 + seed)
    given, x = drawn(rng, 1 + seed % 2)
    units = Units(rng, given.dim)
    one = monte_carlo(given, x, paths=200, steps=8, rng=seed)
    other = monte_carlo(units.problem(given), units.x * x, paths=200, steps=8, rng=seed)
    for name in ("mean", "standard_error", "bias_estimate"):
        assert np.allclose(getattr(other, name) / units.u, getattr(one, name), rtol=1e-6), name


@pytest.mark.parametrize("horizon", [1e-12, 1e-9, 1.0, 1e9])
def test_saved_times_of_any_length(horizon):
    """E cos(W) at T/2 and T/4 of a horizon of any length; what was not saved is not found."""
    rate = 0.5 / horizon
    problem = KolmogorovProblem(
        SDE(0.0, covariance=1.0 / horizon, dim=1), lambda x: np.cos(x[..., 0]), horizon, Box(0.0, np.pi, "reflecting")
    )
    sol = solve(problem, at=[0.0], rtol=1e-6, atol=1e-9, save=[horizon / 2, horizon / 4])
    for t in (0.0, horizon / 4, horizon / 2):
        assert abs(sol(0.0, t) - np.exp(-rate * (horizon - t))) < 2e-6
    with pytest.raises(kolmo.InputError, match="saved times"):
        sol(0.0, horizon / 3)
    with pytest.raises(kolmo.InputError, match="saved times"):
        solve(problem, grid=21, steps=8)(0.0, horizon)


def test_equal_times_are_found_by_the_length_of_the_whole():
    assert find([0.0, 1e-13, 1e-12], 1e-13) == 1
    assert find([0.0, 0.3, 1.0], 0.1 + 0.2) == 1
    assert find([0.0, 1e-12], 0.5e-12) is None
    assert find([np.inf], np.inf) == 0
    assert merged([0.0, 0.3, 1.0], [0.1 + 0.2, 1e-12]).tolist() == [0.0, 1e-12, 0.3, 1.0]
    nodes = time_nodes([(0.0, 0.3), (0.3, 1.0)], 4, save=[0.1 + 0.2])
    assert np.diff(nodes).min() > 0.1  # no step between a breakpoint and its rounding


def test_a_stage_on_a_breakpoint_reads_the_interval_below_in_any_unit():
    for T in (1e-11, 1.0, 1e11):
        sde = SDE(lambda t, x: -x * t, diffusion=1.0 / T, dim=1, breakpoints=[T / 2])
        problem = KolmogorovProblem(sde, lambda x: x[..., 0], T, Box(0.0, 1.0, "reflecting"))
        march = March(discretize(problem, 9, "central2"), STEPPERS["radau5"], time_nodes([(0, T / 2), (T / 2, T)], 4))
        late, early = march.plans[:2], march.plans[2:]
        assert all(t >= T / 2 for plan in late for t in plan.instants)
        assert all(t < T / 2 for plan in early for t in plan.instants)


def test_points_on_the_face_of_a_small_box_belong_to_it():
    for size in (1e-12, 1e-3, 1e12):
        box = Box([0.1 * size, 0.0], [0.3 * size, size], "reflecting")
        assert box.contains([[0.1 * size * 3, 0.5 * size], [0.3 * size, size]]).tolist() == [True, True]
        assert not box.contains([[0.31 * size, 0.5 * size]]).any()
        assert not box.contains([[0.2 * size, -0.01 * size]]).any()


def test_functions_that_look_at_their_neighbours_are_found_in_small_units():
    for unit in (1e-15, 1.0, 1e15):
        problem = KolmogorovProblem(
            SDE(0.0, diffusion=1.0, dim=1), lambda x, unit=unit: unit * (x[..., 0] - x[..., 0].mean()), 1.0
        )
        with pytest.raises(kolmo.InputError, match="terminal"):
            check_vectorised(problem, np.linspace(0.0, 1.0, 5)[:, None])


def test_drift_out_of_a_natural_face_is_found_in_slow_units():
    for rate in (1e-15, 1.0, 1e15):
        sde = SDE(lambda t, x, rate=rate: rate * (x - 0.7), diffusion=0.0, dim=1)
        problem = KolmogorovProblem(sde, lambda x: x[..., 0], 1.0 / rate, Box(0.0, 1.0, "natural"))
        with pytest.raises(kolmo.InputError, match="pointing out"):
            discretize(problem, 11)


@pytest.mark.parametrize("seed", range(6))
def test_a_covariance_that_is_none_is_found_whatever_the_units_of_its_axes(seed):
    """Correlation above one, or two halves that differ, in one pair of axes of any size."""
    rng = np.random.default_rng(300 + seed)
    L = 10.0 ** rng.uniform(-9.0, 9.0, 3)
    S = np.eye(3)
    S[0, 1], S[1, 0] = (1.01, 1.01) if seed % 2 else (0.2, 0.21)
    order = rng.permutation(3)
    S = S[np.ix_(order, order)] * np.multiply.outer(L, L)
    x = rng.random((5, 3))
    with pytest.raises(kolmo.InputError, match="semidefinite" if seed % 2 else "symmetric"):
        check_covariance(np.broadcast_to(S, (5, 3, 3)), x, 0.0)
    check_covariance(np.broadcast_to(0.5 * (S + S.T) * (0.9 + 0.1 * np.eye(3)), (5, 3, 3)), x, 0.0)
