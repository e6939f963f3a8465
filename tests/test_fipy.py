"""The cross-check on FiPy: it converges to exact answers and to kolmo's own solver, on every kind of face."""

import numpy as np
import pytest

import kolmo.fipy
from kolmo import catalog
from kolmo.errors import InputError
from kolmo.problem import KolmogorovProblem
from kolmo.problem.box import Box
from kolmo.problem.faces import Absorbing, Robin
from kolmo.problem.sde import SDE
from kolmo.solve import solve

TURN = 2.0 * np.pi
# Finite boxes for cases on infinite ones: wide enough that the cut does not show at these sizes.
CUTS = {
    "ornstein_uhlenbeck": (-4.0, 5.0),
    "layered_ornstein_uhlenbeck": (-5.0, 5.0),
    "running_cost": (-4.0, 4.0),
    "harmonic_killing": (-6.0, 6.0),
    "geometric_brownian_motion": (0.0, 400.0),
    "down_and_out_call": (85.0, 300.0),
    "vasicek_bond": (-0.5, 0.6),
    "cir_bond": (0.0, 4.0),
    "elastic_brownian_motion": (0.0, 5.0),
    "double_well": (-2.5, 2.5),
    "heat": ([-4.0, -3.0], [4.0, 3.0]),
    "langevin": ([-3.5, -3.5], [3.5, 3.5]),
    "margrabe": ([0.0, 0.0], [400.0, 400.0]),
    "rotation": ([-1.5, -1.5], [1.5, 1.5]),
    "linear_sde": ([-3.0, -3.0], [3.0, 3.0]),
}
FACES = {
    "reflecting": "reflecting",
    "absorbing": Absorbing(lambda t, x: np.cos(2.0 * x[..., 0] + x[..., 1] + t)),
    "elastic": Robin(lambda t, x: 0.7 + 0.1 * x[..., 0] + 0.0 * t, 0.2),
    "mixed": [("reflecting", Absorbing(0.5)), "periodic"],
}


def finite(name):
    case = catalog.CASES[name](**({"dim": 2} if name == "linear_sde" else {}))
    if name not in CUTS:
        return case, case.problem
    old = case.problem
    box = old.box.replace(*CUTS[name])
    return case, KolmogorovProblem(old.sde, old.terminal, old.horizon, box, killing=old.killing, source=old.source)


def error(case, problem, n):
    solution = kolmo.fipy.solve(problem, steps=None if problem.stationary else n, shape=n)
    return np.abs(solution(case.points) - case.values).max() / np.abs(case.values).max()


@pytest.mark.parametrize("name", list(catalog.CASES))
def test_second_order_convergence_to_the_exact_answer(name):
    case, problem = finite(name)
    n = 40 if problem.dim == 1 else 12 if name == "manufactured" else 20
    coarse, fine = error(case, problem, n), error(case, problem, 2 * n)
    assert fine < 0.08
    assert coarse / fine > 2.7, (coarse, fine)


def full_tensor(face, correlation=0.25):
    S = np.array([[0.5, correlation], [correlation, 0.4]])
    sde = SDE(lambda t, x: np.stack([0.6 - np.sin(TURN * x[..., 1]), 0.3 * x[..., 0] - 0.8], -1), covariance=S, dim=2)
    return KolmogorovProblem(
        sde,
        lambda x: np.cos(2.0 * x[..., 0]) + 0.3 * np.sin(TURN * x[..., 1]),
        0.5,
        Box([0.0, 0.0], [1.0, 1.0], face),
        killing=0.3,
    )


@pytest.mark.parametrize("kind", FACES)
def test_full_tensor_and_drift_at_walls_converge_to_solve(kind):
    problem = full_tensor(FACES[kind])
    x = np.array([[0.1, 0.2], [0.3, 0.9], [0.5, 0.5]])
    other = solve(problem, grid=(21, 21), steps=20, scheme="central2", stepper="auto")
    coarse, fine = (kolmo.fipy.solve(problem, steps=n, shape=n)(x) for n in (16, 32))
    # first order at the elastic walls, second elsewhere: the difference of two sizes bounds the error of the finer
    assert (np.abs(fine - other(x)) <= np.abs(fine - coarse).max() + 2e-3).all()
    assert np.abs(fine - coarse).max() < 5e-3


def test_drift_across_an_elastic_wall_is_second_order():
    sde = SDE(lambda t, x: 1.0 - 3.0 * x, diffusion=0.8, dim=1)
    box = Box(0.0, 1.0, [(Robin(0.9, 0.3), Robin(0.4))])
    problem = KolmogorovProblem(sde, lambda x: np.cos(3.0 * x[..., 0]), 0.5, box)
    x = np.linspace(0.05, 0.95, 7)
    exact = solve(problem, at=x, rtol=1e-6)(x)
    errors = [np.abs(kolmo.fipy.solve(problem, steps=n, shape=n)(x) - exact).max() for n in (20, 40)]
    assert errors[0] / errors[1] > 3.3, errors
    assert errors[1] < 1e-3


@pytest.mark.parametrize("periodic", ["periodic", "reflecting", [("reflecting"), ("periodic")]])
def test_matrix_is_consistent_with_fipys_divergence(periodic, rng):
    """Mixed fluxes are summed over the faces of a cell as FiPy does it, also around periods."""
    import fipy

    system = kolmo.fipy.System(full_tensor(periodic), (7, 12))
    system.at(0.1)
    u = rng.normal(size=84)
    slopes = np.stack([slope @ u for slope in system._slopes()])
    flux = (system.mixed * slopes).sum(0) * np.asarray(system.mesh.faceNormals)
    wanted = fipy.FaceVariable(mesh=system.mesh, rank=1, value=flux).divergence.value
    got = (system._inner() @ u + system.decay * u) - system._residual(u)
    assert np.allclose(got, wanted, atol=1e-9)
    assert np.abs(wanted).max() > 1.0


def test_matrix_is_exact_for_quadratic_functions():
    system = kolmo.fipy.System(full_tensor("reflecting", 0.25), (8, 9))
    A, _ = system.at(0.0)
    x, y = system.cells.T
    inside = (np.abs(x - 0.5) < 0.3) & (np.abs(y - 0.5) < 0.3)
    for f, fx, fy, second in ((x * y, y, x, 0.25), (x**2, 2 * x, 0.0, 0.5), (y**2, 0.0, 2 * y, 0.4)):
        wanted = (0.6 - np.sin(TURN * y)) * fx + (0.3 * x - 0.8) * fy + second - 0.3 * f
        assert np.allclose((A @ f)[inside], wanted[inside], atol=1e-10)


def test_columns_are_solved_side_by_side():
    case = catalog.wright_fisher()
    solution = kolmo.fipy.solve(case.problem, steps=20, shape=40)
    assert solution.values.shape == (40, 3)
    assert solution(case.points).shape == (6, 3)
    assert solution(0.3).shape == (3,)
    assert np.allclose(solution(case.points), case.values, atol=1e-3)


def test_absorbing_values_per_column():
    box = Box(0.0, 1.0, [("absorbing", Absorbing(lambda t, x: np.stack([0 * x[..., 0], 1 + 0 * x[..., 0]], -1)))])
    problem = KolmogorovProblem(
        SDE(0.0, diffusion=1.0, dim=1), lambda x: np.stack([x[..., 0], x[..., 0]], -1) * 0, 8.0, box
    )
    values = kolmo.fipy.solve(problem, steps=40, shape=20)([0.25, 0.5])
    assert np.allclose(values, [[0.0, 0.25], [0.0, 0.5]], atol=1e-6)


def test_values_and_points_belong_together():
    problem = full_tensor("reflecting")
    solution = kolmo.fipy.solve(problem, steps=4, shape=(6, 9))
    assert solution.values.shape == (6, 9)
    assert solution.points.shape == (54, 2)
    assert np.allclose(solution(solution.points), solution.values.reshape(-1))
    assert solution.centres[1][0] == pytest.approx(1 / 18)


def test_interpolation_wraps_around_periods():
    case = catalog.circle()
    solution = kolmo.fipy.solve(case.problem, steps=20, shape=40)
    x = np.array([0.01, 3.0, 6.27])
    assert np.allclose(solution(x), solution(x + 2 * np.pi))
    assert np.allclose(solution(x), case.exact(0.0, x), atol=2e-2)


def test_steps_keep_to_breakpoints():
    _, problem = finite("layered_ornstein_uhlenbeck")
    assert kolmo.fipy.solve(problem, steps=6, shape=20).steps == 8


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda: kolmo.fipy.solve(catalog.ornstein_uhlenbeck().problem, steps=4), "box"),
        (lambda: kolmo.fipy.solve(catalog.manufactured(dim=3).problem, steps=4), "problem"),
        (lambda: kolmo.fipy.solve(catalog.circle().problem), "steps"),
        (lambda: kolmo.fipy.solve(catalog.committor().problem, steps=4), "steps"),
        (lambda: kolmo.fipy.solve(catalog.circle().problem, steps=4, shape=3), "shape"),
        (lambda: kolmo.fipy.solve(catalog.circle().problem, steps=4, shape=(8, 8)), "shape"),
        (lambda: kolmo.fipy.solve(catalog.survival().problem, steps=4, shape=8)([2.0]), "x"),
        (
            lambda: kolmo.fipy.solve(
                KolmogorovProblem(SDE(0.0, diffusion=1.0, dim=1), None, None, Box(0.0, 1.0, "reflecting"), source=1.0)
            ),
            "problem",
        ),
    ],
)
def test_bad_input_is_named(call, argument):
    with pytest.raises(InputError) as caught:
        call()
    assert caught.value.argument == argument


def test_one_point_has_one_value():
    """Wherever it lies, as of any other solution: alone, and as the only one of its array."""
    bm = kolmo.SDE(0.0, 1.0, dim=1)
    problem = kolmo.KolmogorovProblem(bm, lambda x: x[..., 0], 1.0, kolmo.Box(0.0, 1.0, "reflecting"))
    found = kolmo.fipy.solve(problem, shape=20, steps=10)
    assert found([0.5]).shape == kolmo.solve(problem, grid=9, steps=4)([0.5]).shape == ()
    assert found([[0.5]]).shape == (1,)
    assert found([0.5]) == pytest.approx(0.5)
