"""Absorbing faces that no noise crosses: values hold where paths leave, the equation itself where they enter."""

import numpy as np
import pytest
from scipy.linalg import eigvals

import kolmo
from kolmo import SDE, Absorbing, Box, KolmogorovProblem, discretize, monte_carlo, solve, solve_forward
from kolmo.schemes.base import SCHEMES


class Langevin:
    """dx = v dt, dv = (force(x) − γv) dt + σ dW in [0, L] × [−V, V], x absorbing, with random numbers."""

    def __init__(self, rng):
        self.gamma, self.sigma = rng.uniform(0.3, 2.0), rng.uniform(0.5, 1.2)
        self.pull, self.L, self.T = rng.uniform(-1.0, 1.0), rng.uniform(0.8, 1.5), rng.uniform(0.4, 0.8)

    def drift(self, t, x):
        return np.stack([x[..., 1], self.pull * np.sin(3.0 * x[..., 0]) - self.gamma * x[..., 1]], -1)

    def problem(self, terminal, face="absorbing", source=None):
        box = Box([0.0, -4.0], [self.L, 4.0], [face, "reflecting"])
        sde = SDE(self.drift, covariance=np.diag([0.0, self.sigma**2]), dim=2)
        return KolmogorovProblem(sde, terminal, self.T, box, source=source)


def manufactured(langevin):
    """u = exp(−t) (2 + sin(2x + 0.3)) cos(πv/4) with the source and the values at exits that it needs."""

    def parts(x):
        w = np.pi / 4.0
        f, df = 2.0 + np.sin(2.0 * x[..., 0] + 0.3), 2.0 * np.cos(2.0 * x[..., 0] + 0.3)
        g, dg, ddg = np.cos(w * x[..., 1]), -w * np.sin(w * x[..., 1]), -(w**2) * np.cos(w * x[..., 1])
        return f, df, g, dg, ddg

    def exact(t, x):
        f, _, g, _, _ = parts(x)
        return np.exp(-t) * f * g

    def source(t, x):
        f, df, g, dg, ddg = parts(x)
        b = langevin.drift(t, x)
        return np.exp(-t) * (f * g - b[..., 0] * df * g - b[..., 1] * f * dg - 0.5 * langevin.sigma**2 * f * ddg)

    return langevin.problem(lambda x: exact(langevin.T, x), Absorbing(exact), source), exact


@pytest.mark.parametrize("scheme", list(SCHEMES))
@pytest.mark.parametrize("seed", range(2))
def test_order_with_values_at_exits_only(scheme, seed):
    """Closures next to an exit have order two, so that high orders show three; also on the face itself."""
    langevin = Langevin(np.random.default_rng(seed))
    problem, exact = manufactured(langevin)
    x = np.array([[0.5, 0.0], [0.0, 1.0], [0.0, -1.0], [0.1, 0.3], [langevin.L, -2.0], [langevin.L, 0.7]])
    errors = []
    for n in (24, 36):
        stepper = "radau5" if scheme == "monotone" else "mcs3"
        sol = solve(problem, grid=n + 1, steps=32, scheme=scheme, stepper=stepper)
        errors.append(np.abs(sol(x) - exact(0.0, x)).max())
    order = {1: 0.6, 2: 1.6}.get(SCHEMES[scheme].order, 2.4)
    assert np.log(errors[0] / errors[1]) / np.log(1.5) > order, errors


@pytest.mark.parametrize("seed", range(3))
def test_exit_of_a_particle_agrees_with_paths_for_every_scheme(seed):
    """Survival weighted by a bump, from inside and from the parts of the faces where paths enter."""
    langevin = Langevin(np.random.default_rng(10 + seed))
    problem = langevin.problem(lambda x: np.sin(np.pi * x[..., 0] / langevin.L) ** 2 * np.exp(-(x[..., 1] ** 2)))
    x = np.array([[0.5, 0.0], [0.2, 0.6], [0.7, -1.0], [0.0, 1.0], [langevin.L, -1.0]])
    paths = monte_carlo(problem, x, paths=10_000, steps=64, rng=seed)
    for scheme in SCHEMES:
        n, stepper = (57, "implicit-euler") if scheme == "monotone" else (41, "mcs3")
        sol = solve(problem, grid=n, steps=64, scheme=scheme, stepper=stepper)
        room = 4.0 * paths.standard_error + paths.bias_estimate + (5e-2 if scheme == "monotone" else 4e-3)
        assert (np.abs(sol(x) - paths.mean) < room).all(), scheme
        assert np.abs(sol.values).max() < 1.02
        assert (sol(x[-2:]) > 0.05).all()  # not the value zero that holds where paths leave


@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_no_mode_grows(scheme):
    """Nothing is earned on the way, so that no eigenvalue may have a positive real part."""
    langevin = Langevin(np.random.default_rng(4))
    generator = discretize(langevin.problem(lambda x: x[..., 0]), (21, 21), scheme)
    free = ~generator.fixed
    assert generator.fixed.sum() == 20  # ten velocities point out at each end, the one that is zero points nowhere
    assert eigvals(generator.matrix(0.0)[free][:, free].toarray()).real.max() < 1e-9


@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_transport_out_of_a_box_without_any_noise(scheme):
    """dx = dt on (0, 1): u(0, x) is what the exit at 1 pays at time 1 − x; the face at 0 is only entered."""
    pay = lambda t: np.cos(2.0 * t)  # noqa: E731
    box = Box(0.0, 1.0, Absorbing(lambda t, x: np.where(x[..., 0] > 0.5, pay(t), 1e6)))
    problem = KolmogorovProblem(SDE(1.0, dim=1), lambda x: pay(1.0 + 1.0 - x[..., 0]), 1.0, box)
    x = np.linspace(0.0, 1.0, 9)
    errors = [np.abs(solve(problem, grid=n, steps=64, scheme=scheme)(x) - pay(1.0 - x)).max() for n in (41, 81)]
    assert errors[1] < {1: 3e-2, 2: 2e-3}.get(SCHEMES[scheme].order, 1e-4)
    assert np.log2(errors[0] / errors[1]) > {1: 0.8, 2: 1.7}.get(SCHEMES[scheme].order, 2.6)


def test_a_stock_never_reaches_zero_and_a_square_root_may():
    """Geometric motion: the value at 0 is never paid. Square root with 2ab < σ²: it is, and 2ab > σ²: it is not."""
    horizon = 0.7
    wrong = Absorbing(50.0)
    for sde, reached in (
        (SDE(lambda t, x: 0.1 * x, diffusion=lambda t, x: 0.4 * x, dim=1), False),
        (SDE(lambda t, x: 0.1 * (1.0 - x), diffusion=lambda t, x: 0.6 * np.sqrt(x), dim=1), True),
        (SDE(lambda t, x: 0.9 * (1.0 - x), diffusion=lambda t, x: 0.6 * np.sqrt(x), dim=1), False),
        (SDE(0.0, diffusion=lambda t, x: np.sqrt(x * (4.0 - x)), dim=1), True),
    ):
        problem = KolmogorovProblem(sde, lambda x: 1.0 + x[..., 0], horizon, Box(0.0, 4.0, [(wrong, "reflecting")]))
        generator = discretize(problem, 41, "central4")
        assert bool(generator.fixed[0]) == reached
        value = solve(problem, grid=81, steps=32, scheme="central4")(0.05)
        assert (value > 5.0) == reached


@pytest.mark.parametrize("seed", range(3))
def test_what_goes_out_of_a_kinetic_box(seed):
    """Probability inside and gone through the faces sums to one; nothing goes out where paths enter."""
    langevin = Langevin(np.random.default_rng(30 + seed))
    problem = langevin.problem(lambda x: x[..., 0])
    law = solve_forward(problem, [[0.4, 1.2]], grid=(31, 31), steps=24, scheme="monotone")
    assert np.abs(law.mass + law.exited((0, 0)) + law.exited((0, 1)) - 1.0).max() < 1e-10
    assert law.exited((0, 1))[-1] > 0.02
    backward = solve(problem, discretization=law.discretization)
    assert abs(backward([0.4, 1.2]) - law.value) < 1e-10


def test_a_face_that_is_left_and_entered_in_turn_is_refused():
    sde = SDE(lambda t, x: np.cos(3.0 * t) + 0.0 * x, dim=1)
    problem = KolmogorovProblem(sde, lambda x: x[..., 0], 1.0, Box(0.0, 1.0, "absorbing"))
    with pytest.raises(kolmo.InputError, match=r"boundary\[0\]\[0\].*leave at some times and enter at others"):
        solve(problem, grid=21, steps=8)
    # with noise across it the face is reached at all times
    noisy = KolmogorovProblem(SDE(sde.drift, diffusion=0.3, dim=1), lambda x: x[..., 0], 1.0, problem.box)
    assert discretize(noisy, 21).fixed.sum() == 2


def test_fipy_refuses_a_face_that_is_left_in_parts_only():
    fipy = pytest.importorskip("kolmo.fipy")
    problem = Langevin(np.random.default_rng(0)).problem(lambda x: x[..., 0])
    with pytest.raises(kolmo.InputError, match="imposes the value on all of it"):
        fipy.solve(problem, shape=8, steps=4)
