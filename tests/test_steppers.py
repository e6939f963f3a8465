"""Semi-Lagrangian and exponential steps: duality, order in time, exact answers, exact derivatives, honest refusals."""

import itertools

import numpy as np
import pytest
import scipy.linalg

from kolmo import SDE, Box, Grid, KolmogorovProblem, Robin, control, discretize, solve
from kolmo.errors import InputError
from kolmo.grid.grading import Sinh
from kolmo.steppers import adi
from kolmo.steppers.base import STEPPERS, Operator
from kolmo.steppers.exponential import Exponential
from kolmo.testing import duality_gap, manufactured, order_of_accuracy, taylor_test

WORDS = ["open", "natural", "reflecting", "entrance", "absorbing", "robin", "periodic"]
FACES = {"robin": Robin(0.7, 0.2)}
MOVING = ["open", "natural", "reflecting", "periodic"]


def operators(problem, grid, times, scheme="central4"):
    generator = discretize(problem, grid, scheme=scheme)
    fixed = generator.fixed if generator.fixed.any() else None
    known = {t: generator.at(t) for t in times}
    made = {t: Operator(s.stencil, s.a, fixed) for t, s in known.items()}
    return [made[t] for t in times]


def draw(rng, operator, count):
    """Random fields of two columns, zero at fixed nodes."""
    free = 1.0 if operator.fixed is None else ~operator.fixed[:, None]
    return [free * rng.standard_normal((operator.matrix.shape[0], 2)) for _ in range(count)]


def pairing(fields, others):
    return sum(float((f * g).sum()) for f, g in zip(fields, others, strict=True))


def check_linear_map(name, ops, dt, rng):
    """⟨p, S u + Σ L r⟩ equals the transposed sums, and the pulled-back derivative has a remainder of order two."""
    stepper = STEPPERS[name]
    step = stepper.prepare(ops, dt)
    u, p, *loads = draw(rng, ops[0], 2 + len(ops))
    value = pairing([p], [step.apply(u, loads)])
    back, load_adjoints = step.apply_transposed(p)
    scale = np.abs(p).sum() * max(np.abs(u).max(), 1.0)
    assert abs(value - pairing([back], [u]) - pairing(load_adjoints, loads)) < 1e-13 * scale
    again, _, numbers = step.pullback(u, loads, p)
    assert np.allclose(again, back, rtol=0, atol=1e-11 * np.abs(back).max())
    moved = {id(op): rng.standard_normal(op.a.shape) * op.a for op in ops}
    slope = pairing(numbers, [moved[id(op)] for op in ops])
    remainders = []
    for h in (2e-4, 1e-4):
        made = {id(op): Operator(op.stencil, op.a + h * moved[id(op)], op.fixed) for op in ops}
        perturbed = stepper.prepare([made[id(op)] for op in ops], dt).apply(u, loads)
        remainders.append(abs(pairing([p], [perturbed]) - value - h * slope))
    assert np.log2(remainders[0] / remainders[1]) > 1.6, remainders


@pytest.mark.parametrize("name", sorted(STEPPERS))
@pytest.mark.parametrize("columns", [1, 2])
def test_several_steps_at_once_are_those_steps_one_by_one(name, columns, rng):
    drift = lambda t, x: np.stack([-x[..., 0] + 0.3 * x[..., 1], -x[..., 1]], -1)  # noqa: E731
    sde = SDE(drift, covariance=np.array([[0.4, 0.1], [0.1, 0.3]]), dim=2)
    face = "open" if name == "semi-lagrangian" else "absorbing"
    problem = KolmogorovProblem(sde, lambda x: x[..., 0], 0.1, Box([-1.0] * 2, [1.0] * 2, face))
    ops = operators(problem, (11, 12), [0.0]) * len(STEPPERS[name].nodes)
    step = STEPPERS[name].prepare(ops, 1e-3)
    u, p, *loads = (v[:, :columns] for v in draw(rng, ops[0], 2 + len(ops)))
    states = [u]
    for _ in range(4):
        states.append(step.apply(states[-1], loads))
    kept, passed = [], []
    np.testing.assert_allclose(step.apply_many(u, loads, 4, kept), states[4], rtol=0, atol=1e-14 * np.abs(u).max())
    np.testing.assert_allclose(step.apply_many(u, loads, 3), states[3], rtol=0, atol=1e-14 * np.abs(u).max())
    step.apply_many(u, loads, 4, passed, stages=True)
    together, with_stages = (step.pullback_many(*found, loads, p) for found in (kept, passed))
    for one, other in zip(together, with_stages, strict=True):
        np.testing.assert_array_equal(sum(one), sum(other))
    back = p
    adjoints, numbers = 0.0, 0.0
    for state in states[3::-1]:
        # the nodes share their operator: what belongs to it is the sum over them
        back, here, shares = step.pullback(state, loads, back)
        adjoints, numbers = adjoints + np.stack(here), numbers + sum(shares)
    np.testing.assert_allclose(together[0], back, rtol=0, atol=1e-12 * np.abs(back).max())
    np.testing.assert_allclose(together[1], adjoints, rtol=0, atol=1e-12 * np.abs(adjoints).max())
    np.testing.assert_allclose(sum(together[2]), numbers, rtol=0, atol=1e-12 * np.abs(numbers).max())


@pytest.mark.parametrize("shape", [(11, 20), (7, 8, 9)])
@pytest.mark.parametrize("face", ["open", "absorbing"])
def test_factors_made_anew_are_those_that_would_be_kept(face, shape, rng, monkeypatch):
    d = len(shape)
    sde = SDE(lambda t, x: np.roll(x, 1, -1) - x, covariance=0.1 + 0.3 * np.eye(d), dim=d)
    box = Box([-1.0] * d, [1.0] * d, face)
    problem = KolmogorovProblem(sde, lambda x: x[..., 0], 0.1, box, killing=lambda t, x: x[..., 0] ** 2)
    ops = operators(problem, shape, [0.1, 0.05, 0.0])
    u, p, *loads = draw(rng, ops[0], 5)
    found = []
    for limit in (adi.FACTORS_KEPT, 0):
        monkeypatch.setattr(adi, "FACTORS_KEPT", limit)
        step = STEPPERS["mcs3"].prepare(ops, 1e-2)
        found.append([step.apply(u, loads), *step.pullback(u, loads, p)])
    for kept, renewed in zip(*found, strict=True):
        np.testing.assert_array_equal(kept, renewed)


@pytest.mark.parametrize("seed", range(6))
def test_compiled_split_steps_are_those_taken_part_by_part(seed, monkeypatch):
    rng = np.random.default_rng(seed)
    d = 2 + seed % 2
    shape, words = tuple(rng.integers(9, 16, d).tolist()), rng.choice(["open", "absorbing", "reflecting", "robin"], d)
    root = rng.standard_normal((d, d)) if seed % 3 else np.eye(d)
    sde = SDE(lambda t, x: np.roll(x, 1, -1) * (1.0 + t), covariance=root @ root.T + 0.3 * np.eye(d), dim=d)
    faces = [(FACES.get(word, word), "open") for word in words]
    problem = KolmogorovProblem(
        sde, lambda x: x[..., 0], 0.1, Box([-1.0] * d, [1.0] * d, faces), killing=lambda t, x: x[..., 0] ** 2
    )
    ops = operators(problem, shape, [0.1, 0.05, 0.0], "central6")
    u, p, *loads = draw(rng, ops[0], 5)
    found = []
    for compiled in (True, False):
        monkeypatch.setattr(adi.SplitStep, "_compiles", lambda step, u, compiled=compiled: compiled)
        step = STEPPERS["mcs3"].prepare(ops, 1e-2)
        back, adjoints, numbers = step.pullback(u, loads, p)
        found.append([step.apply(u, loads), back, *adjoints, *numbers, step.apply_transposed(p)[0]])
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-13 * np.abs(other).max())


@pytest.mark.parametrize("word", MOVING)
def test_semi_lagrangian_is_a_linear_map_with_exact_derivatives(word, rng):
    problem = manufactured([(word, word)]).problem
    check_linear_map("semi-lagrangian", operators(problem, 15, [0.4, 0.35, 0.3]), 0.1, rng)


def test_semi_lagrangian_with_full_tensor_in_two_dimensions(rng):
    problem = manufactured([("open", "natural"), ("periodic", "periodic")]).problem
    check_linear_map("semi-lagrangian", operators(problem, (8, 9), [0.4, 0.375, 0.35], "central2"), 0.05, rng)


@pytest.mark.parametrize(("word", "scheme"), [*itertools.product(WORDS, ["central6", "monotone"])])
def test_exponential_is_exact(word, scheme, rng):
    """Against the dense matrix exponential, loads included, whatever the faces."""
    problem = manufactured([(word, word)], autonomous=True).problem
    op, _ = ops = operators(problem, 17, [0.2, 0.2], scheme)
    u, load = draw(rng, op, 2)
    n, dt = len(u), 0.4
    augmented = np.zeros((n + 2, n + 2))
    augmented[:n, :n], augmented[:n, n:] = dt * op.matrix.toarray(), dt * load
    exponential = scipy.linalg.expm(augmented)
    exact = exponential[:n, :n] @ u + exponential[:n, n:]
    step = Exponential().prepare(ops, dt)
    assert np.abs(step.apply(u, [load, load]) - exact).max() < 2e-9 * np.abs(u).max()


@pytest.mark.parametrize("word", ["absorbing", "robin", "periodic"])
def test_exponential_is_a_linear_map_with_exact_derivatives(word, rng):
    problem = manufactured([(word, word)], autonomous=True).problem
    check_linear_map("exponential", operators(problem, 15, [0.2, 0.2]), 0.2, rng)


def test_exponential_with_full_tensor_in_two_dimensions(rng):
    problem = manufactured([("robin", "absorbing"), ("open", "natural")], autonomous=True).problem
    check_linear_map("exponential", operators(problem, (9, 10), [0.2, 0.2]), 0.2, rng)


@pytest.mark.parametrize("diffusion", [0.0, 0.02, 1.0, lambda t, x: 0.1 * x])
def test_exponential_with_drift_that_dominates_dies_or_is_stiff(diffusion, rng):
    """Spectra along the imaginary axis, along the real one, and in between; graded nodes."""
    box = Box(-10.0, 10.0)
    problem = KolmogorovProblem(SDE(lambda t, x: 1.0 - x, diffusion=diffusion, dim=1), lambda x: x[..., 0], 1.0, box)
    op, _ = ops = operators(problem, Grid.of(box, 61, [Sinh(-10.0, 10.0, 0.0, 2.0)]), [0.5, 0.5], "central6")
    (u,) = draw(rng, op, 1)
    exact = scipy.linalg.expm(op.matrix.toarray()) @ u
    got = Exponential().prepare(ops, 1.0).apply(u, [0.0 * u, 0.0 * u])
    assert np.abs(got - exact).max() < 1e-8 * np.abs(exact).max()


def test_one_exponential_step_and_many_agree():
    case = manufactured([("reflecting", "open")], autonomous=True)
    sde = SDE(case.problem.sde.drift, covariance=case.problem.sde.covariance, dim=1)
    problem = KolmogorovProblem(sde, lambda x: np.cos(x[..., 0]), 0.4, case.problem.box, killing=0.3, source=0.7)
    one, many = (solve(problem, grid=36, steps=m, stepper="exponential").values for m in (1, 7))
    assert np.abs(one - many).max() < 1e-9


@pytest.mark.parametrize("word", MOVING)
def test_semi_lagrangian_order_in_time(word):
    """Everything depends on time and place; loads are there."""
    case = manufactured([(word, word)])
    table = order_of_accuracy(
        case.problem, case.exact, case.points, nodes=[48], steps=[8, 16], scheme="central6", stepper="semi-lagrangian"
    )
    assert table.rows[-1][-1] > 1.65, table


def test_semi_lagrangian_order_in_two_dimensions_with_full_tensor():
    case = manufactured([("periodic", "periodic")] * 2)
    table = order_of_accuracy(
        case.problem, case.exact, case.points, nodes=[18], steps=[4, 8], scheme="central6", stepper="semi-lagrangian"
    )
    assert table.rows[-1][-1] > 1.75, table


def test_semi_lagrangian_order_with_a_tensor_that_varies():
    """The columns of √Σ do not commute; against small explicit steps on the same grid."""

    def covariance(t, x):
        a, b = 0.6 + 0.3 * np.cos(x[..., 1]), 0.5 + 0.2 * np.sin(x[..., 0] + x[..., 1])
        r = 0.6 * np.cos(x[..., 0])
        return np.stack([np.stack([a * a, r * a * b], -1), np.stack([r * a * b, b * b], -1)], -2)

    sde = SDE(lambda t, x: np.stack([np.sin(x[..., 1]), np.cos(x[..., 0])], -1), covariance=covariance, dim=2)
    box = Box([0.0, 0.0], [2.0 * np.pi] * 2, boundary="periodic")
    problem = KolmogorovProblem(sde, lambda x: np.sin(x[..., 0]) + np.cos(x[..., 0] - x[..., 1]), 1.0, box)
    fine = solve(problem, grid=36, steps=250, scheme="central6", stepper="rk4").values
    errors = [
        np.abs(solve(problem, grid=36, steps=m, scheme="central6", stepper="semi-lagrangian").values - fine).max()
        for m in (4, 8)
    ]
    assert errors[1] < 1e-2, errors
    assert np.log2(errors[0] / errors[1]) > 1.7, errors


def test_transport_is_not_bound_by_the_courant_number():
    """Rotation: a step moves over many cells, and fewer steps are not worse."""
    sde = SDE(lambda t, x: 2.0 * np.stack([-x[..., 1], x[..., 0]], -1), diffusion=0.0, dim=2)
    bump = lambda x: np.exp(-8.0 * ((x[..., 0] - 0.5) ** 2 + x[..., 1] ** 2))  # noqa: E731
    problem = KolmogorovProblem(sde, bump, 0.8, Box([-2.0, -2.0], [2.0, 2.0]))
    x = np.array([[0.5, 0.0], [0.0, -0.5], [0.3, -0.4], [-0.2, -0.6]])
    turn = np.array([[np.cos(1.6), -np.sin(1.6)], [np.sin(1.6), np.cos(1.6)]])
    for steps in (1, 3):
        sol = solve(problem, grid=61, steps=steps, scheme="central6", stepper="semi-lagrangian")
        assert np.abs(sol(x) - bump(x @ turn.T)).max() < 1e-5


def test_nonlinear_drift_without_noise():
    """x' = x − x³ has a closed form."""
    problem = KolmogorovProblem(
        SDE(lambda t, x: x - x**3, diffusion=0.0, dim=1), lambda x: np.cos(3.0 * x[..., 0]), 1.5, Box(-2.0, 2.0)
    )
    x = np.array([-1.5, -0.3, 0.05, 0.9])
    flow = x * np.exp(1.5) / np.sqrt(1.0 + x**2 * (np.exp(3.0) - 1.0))
    sol = solve(problem, grid=201, steps=4, scheme="central6", stepper="semi-lagrangian")
    assert np.abs(sol(x) - np.cos(3.0 * flow)).max() < 5e-6


@pytest.mark.parametrize("stepper", ["semi-lagrangian", "exponential"])
def test_gradient_through_a_march(stepper):
    torch = pytest.importorskip("torch")
    theta = torch.tensor([0.7, 0.4], dtype=torch.float64, requires_grad=True)
    sde = SDE(lambda t, x: torch.sin(theta[0] * x), diffusion=lambda t, x: theta[1] * (1.2 + torch.cos(x)), dim=1)
    box = Box(0.0, 2.0 * np.pi, boundary="periodic")
    problem = KolmogorovProblem(sde, lambda x: torch.sin(x[..., 0]), 0.5, box)
    recipe = solve(problem.handing("torch"), grid=16, steps=2, scheme="central2", stepper=stepper).discretization
    x = torch.tensor([1.0, 2.5], dtype=torch.float64)
    table = taylor_test(lambda: control.value(problem, x, discretization=recipe).sum(), theta)
    assert np.abs(table.column("order")[1:3] - 2.0).max() < 0.2, table


def test_duality_of_whole_marches():
    case = manufactured([("open", "natural")], horizon=0.2)
    methods = {"grid": 17, "steps": 3, "scheme": "central4", "stepper": "semi-lagrangian"}
    table = duality_gap(case.problem, **methods)
    assert table.worst("gap") < 1e-12, table


def test_constants_stay_without_killing():
    """Rows of the step sum to one, so that the transposed step conserves probability."""
    sde = SDE(lambda t, x: np.sin(x), diffusion=0.5, dim=1)
    problem = KolmogorovProblem(sde, lambda x: 1.0 + 0.0 * x[..., 0], 1.0, Box(0.0, 3.0, boundary="reflecting"))
    for stepper in ("semi-lagrangian", "exponential"):
        values = solve(problem, grid=31, steps=3, stepper=stepper).values
        assert np.abs(values - 1.0).max() < 1e-12


def test_refusals():
    moving = manufactured([("periodic", "periodic")]).problem
    with pytest.raises(InputError, match="autonomous"):
        solve(moving, grid=17, steps=2, stepper="exponential")
    for word in ("absorbing", "robin"):
        with pytest.raises(InputError, match="semi-lagrangian"):
            solve(manufactured([(word, word)]).problem, grid=17, steps=2, stepper="semi-lagrangian")
    with pytest.raises(InputError, match="central"):
        solve(moving, grid=17, steps=2, scheme="monotone", stepper="semi-lagrangian")
