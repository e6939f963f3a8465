"""What a solution offers: interpolation with derivatives, times, saving, plotting."""

import numpy as np
import pytest
import torch

import kolmo
from kolmo import SDE, Box, Grid, KolmogorovProblem, solve
from kolmo.grid.grading import Sinh

S = np.array([[0.5, 0.2], [0.2, 0.3]])
K = np.array([1.0, 2.0])
DECAY = np.exp(-0.5 * 0.4 * K @ S @ K)


def plane(columns=False):
    """u(0, x) = DECAY · cos(k·x) on a torus; a second column is constant in time."""

    def terminal(x):
        wave = np.cos(x @ K)
        return np.stack([wave, 2.0 + 0.0 * wave], -1) if columns else wave

    box = Box([0.0, 0.0], [2 * np.pi, 2 * np.pi], "periodic")
    return KolmogorovProblem(SDE([0.0, 0.0], covariance=S, dim=2), terminal, 0.4, box)


X = np.array([[0.1, 0.2], [3.0, 6.2], [5.0, 1.0], [-1.0, 9.0]])  # the last one wraps


def test_gradient_and_hessian_against_closed_form():
    sol = solve(plane(), grid=48, steps=4)
    phase = X @ K
    assert np.abs(sol(X) - DECAY * np.cos(phase)).max() < 1e-5
    assert np.abs(sol.gradient(X) + DECAY * np.sin(phase)[:, None] * K).max() < 1e-4
    assert np.abs(sol.hessian(X) + DECAY * np.cos(phase)[:, None, None] * np.outer(K, K)).max() < 2e-3
    assert sol.gradient(X).shape == (4, 2)
    assert sol.hessian(X).shape == (4, 2, 2)


@pytest.mark.parametrize("scheme", ["central4", "central6"])
def test_derivatives_converge_on_graded_nodes(scheme):
    """At least the order of the scheme for the gradient, one less for the second derivative."""
    case = KolmogorovProblem(SDE(0.0, diffusion=1.0, dim=1), lambda x: np.sin(x[..., 0]), 0.5, Box(-5.0, 5.0))
    x = np.array([-1.1, 0.2, 0.7])
    errors = []
    for n in (41, 81):
        grid = Grid.of(case.box, n, [Sinh(-5.0, 5.0, 0.0, 2.0)])
        sol = solve(case, grid=grid, steps=16, scheme=scheme)
        decay = np.exp(-0.25)
        errors.append(
            [
                np.abs(sol.gradient(x)[..., 0] - decay * np.cos(x)).max(),
                np.abs(sol.hessian(x)[..., 0, 0] + decay * np.sin(x)).max(),
            ]
        )
    order = int(scheme[-1])
    rates = np.log2(np.array(errors[0]) / errors[1])
    assert rates[0] > order - 0.6
    assert rates[1] > order - 1.6


def test_columns_follow_the_points():
    sol = solve(plane(columns=True), grid=24, steps=4)
    x = X.reshape(2, 2, 2)
    assert sol.columns == 2
    assert sol(x).shape == (2, 2, 2)
    assert sol.gradient(x).shape == (2, 2, 2, 2)
    assert sol.hessian(x).shape == (2, 2, 2, 2, 2)
    assert np.allclose(sol(x)[..., 1], 2.0)
    assert np.allclose(sol.gradient(x)[..., 1], 0.0, atol=1e-10)
    assert sol.values.shape == (1, 24, 24, 2)


def test_tensors_come_back_as_tensors():
    sol = solve(plane(), grid=24, steps=4)
    x = torch.tensor(X)
    assert isinstance(sol(x), torch.Tensor)
    assert np.allclose(sol(x).numpy(), sol(X))
    assert np.allclose(sol.hessian(x).numpy(), sol.hessian(X))


def test_one_dimension_drops_the_axis():
    problem = KolmogorovProblem(SDE(0.0, diffusion=1.0, dim=1), lambda x: x[..., 0], 0.5, Box(-2.0, 2.0))
    sol = solve(problem, grid=21, steps=4)
    assert sol(0.3).shape == ()
    assert sol([0.3, 0.4]).shape == (2,)
    assert sol([[0.3], [0.4]]).shape == (2,)
    assert sol.gradient(0.3).shape == (1,)


@pytest.mark.parametrize("stepper", ["radau5", "rk4", "implicit-euler"])
def test_saved_times(stepper):
    """In increasing order, each with the answer of that time, faces included."""
    problem = KolmogorovProblem(
        SDE(0.0, diffusion=1.0, dim=1),
        lambda x: np.sin(x[..., 0]),
        1.0,
        Box(0.0, 2.0, kolmo.Absorbing(lambda t, x: np.exp(-0.5 * (1.0 - t)) * np.sin(x[..., 0]))),
    )
    sol = solve(problem, grid=15, steps=180, stepper=stepper, save=[1.0, 0.3, 0.75], scheme="central4")
    assert np.allclose(sol.times, [0.0, 0.3, 0.75, 1.0])
    for t in sol.times:
        assert np.abs(sol([0.0, 0.4, 2.0], t=t) - np.exp(-0.5 * (1.0 - t)) * np.sin([0.0, 0.4, 2.0])).max() < 2e-3


def test_save_and_load(tmp_path):
    problem = KolmogorovProblem(
        SDE(0.0, diffusion=1.0, dim=1), lambda x: np.maximum(x[..., 0] - 0.1, 0.0), 0.5, Box(-3.0, 3.0)
    )
    sol = solve(problem, at=[0.0, 0.5], rtol=1e-3, save=[0.25])
    path = tmp_path / "u.npz"
    sol.save(path)
    again = kolmo.load(path)
    assert np.array_equal(again.values, sol.values)
    assert np.array_equal(again.times, sol.times)
    assert np.array_equal(again([0.3, 1.0]), sol([0.3, 1.0]))
    assert np.array_equal(again.gradient([0.3], t=0.25), sol.gradient([0.3], t=0.25))
    assert np.array_equal(again.error_estimate, sol.error_estimate)
    assert (again.status, again.message) == (sol.status, sol.message)
    # the recipe is complete: solving with it gives the same numbers
    assert np.array_equal(solve(problem, discretization=again.discretization).values[0], sol.values[0])
    assert [p.name for p in tmp_path.iterdir()] == ["u.npz"]


def test_callback_and_interruption():
    problem = KolmogorovProblem(SDE(0.0, diffusion=1.0, dim=1), lambda x: x[..., 0], 1.0, Box(-2.0, 2.0))
    seen = []
    sol = solve(problem, grid=21, steps=10, callback=lambda t, u: seen.append((t, u.shape)) or t < 0.55)
    assert sol.status == "interrupted"
    assert sol.times[0] == pytest.approx(0.5)
    assert seen[0] == (pytest.approx(0.9), (21,))
    assert solve(problem, grid=21, steps=10, callback=lambda t, u: None).status == "fixed"


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_plot(dim):
    box = Box([0.0] * dim, [1.0] * dim, "reflecting")
    problem = KolmogorovProblem(SDE(0.0, diffusion=1.0, dim=dim), lambda x: x[..., 0] ** 2, 0.01, box)
    sol = solve(problem, grid=9, steps=10)
    axes = sol.plot()
    assert axes.get_xlabel()
    assert axes.get_ylabel()
    import matplotlib.pyplot as plt

    given = plt.subplots()[1]
    assert sol.plot(ax=given) is given
    plt.close("all")


def test_estimate_has_the_shape_of_the_points():
    sol = solve(plane(columns=True), at=X.reshape(2, 2, 2), rtol=1e-2)
    assert sol.error_estimate.shape == sol(X.reshape(2, 2, 2)).shape
    assert sol.status == "converged"
    assert (np.abs(sol(X)[:, 0] - DECAY * np.cos(X @ K)) <= 10 * sol.error_estimate.reshape(4, 2)[:, 0]).all()


def test_a_rotation_takes_few_steps_in_a_tight_box():
    """The splitting is exact there: more steps only interpolate more often. No path leaves its circle by far."""
    turn, noise, sharp = 2 * np.pi, 1e-3, 0.15**-2
    sde = SDE(lambda t, x: turn * np.stack([-x[..., 1], x[..., 0]], -1), covariance=noise * np.eye(2), dim=2)

    def bump(x, precision):
        return np.exp(-0.5 * precision * ((x - [0.5, 0.0]) ** 2).sum(-1))

    at = np.stack(np.meshgrid(*[np.linspace(-1.0, 1.0, 5)] * 2), -1).reshape(-1, 2)
    solution = solve(KolmogorovProblem(sde, lambda x: bump(x, sharp), 1.0), at=at, rtol=0.0, atol=1e-3)
    spread = 1.0 + sharp * noise
    assert np.abs(solution(at).reshape(-1) - bump(at, sharp / spread) / spread).max() < 1e-3
    assert solution.discretization.stepper == "semi-lagrangian"
    assert solution.discretization.steps <= 16  # alternating directions take a hundred on such grids
    assert np.abs(solution.grid.box).max() < 2.0
