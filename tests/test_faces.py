"""Each kind of face against a closed form."""

import numpy as np
import pytest

from kolmo import SDE, Absorbing, Box, KolmogorovProblem, Robin, catalog, solve
from kolmo.schemes.base import SCHEMES

LIMITS = {"monotone": 4e-3, "central2": 4e-3, "central4": 6e-5, "central6": 3e-6}


@pytest.mark.parametrize("scheme", LIMITS)
@pytest.mark.parametrize(
    "name",
    ["reflected_brownian_motion", "reflected_ornstein_uhlenbeck", "survival", "exit_right", "circle", "wright_fisher"],
)
def test_catalogue_on_a_bounded_interval(scheme, name):
    """Reflecting with and without drift at the wall, absorbing with values, periodic, natural."""
    case = catalog.CASES[name]()
    sol = solve(case.problem, grid=81, steps=48, scheme=scheme)
    limit = LIMITS[scheme]
    if name in ("survival", "exit_right"):
        limit = max(limit, 4e-5)  # the terminal data jump at the face
    if name == "wright_fisher" and scheme == "monotone":
        limit = 2e-2  # first order where drift outweighs noise, next to the ends
    assert np.abs(sol(case.points) - case.values).max() < limit


@pytest.mark.parametrize("scheme", LIMITS)
def test_elastic_face(scheme):
    """½ n·Σ∇u + κu = 0 at 0; the box ends far away."""
    case = catalog.elastic_brownian_motion()
    problem = KolmogorovProblem(
        case.problem.sde, case.problem.terminal, case.problem.horizon, Box(0.0, 6.0, [(Robin(0.8), "open")])
    )
    sol = solve(problem, grid=121, steps=96, scheme=scheme)
    # φ = 1 does not satisfy the condition: an initial layer
    assert np.abs(sol(case.points) - case.values).max() < max(LIMITS[scheme], 3e-4)


@pytest.mark.parametrize("scheme", LIMITS)
def test_elastic_value_against_a_stationary_line(scheme):
    """u = a + bx with ½σ²b + κu = v at 1 and u = 0 at 0: exact for every scheme, on either side."""
    sigma, kappa, v = 0.9, 0.7, 1.3
    slope = v / (0.5 * sigma**2 + kappa)
    for faces, exact in [
        (("absorbing", Robin(kappa, v)), lambda x: slope * x),
        ((Robin(kappa, v), "absorbing"), lambda x: slope * (1.0 - x)),
    ]:
        problem = KolmogorovProblem(SDE(0.0, diffusion=sigma, dim=1), None, None, Box(0.0, 1.0, [faces]), source=0.0)
        x = np.linspace(0.0, 1.0, 7)
        assert np.allclose(solve(problem, grid=21, scheme=scheme)(x), exact(x), atol=1e-10)


@pytest.mark.parametrize("scheme", LIMITS)
def test_absorbing_value_that_moves(scheme):
    """u = exp(½σ²(T − t)) cosh x is a solution; its own values are prescribed at the faces."""
    problem = KolmogorovProblem(
        SDE(0.0, diffusion=0.8, dim=1),
        lambda x: np.cosh(x[..., 0]),
        0.7,
        Box(-1.0, 2.0, Absorbing(lambda t, x: np.exp(0.32 * (0.7 - t)) * np.cosh(x[..., 0]))),
    )
    x = np.linspace(-1.0, 2.0, 11)
    sol = solve(problem, grid=61, steps=16, scheme=scheme)
    assert np.abs(sol(x) - np.exp(0.224) * np.cosh(x)).max() < LIMITS[scheme]


@pytest.mark.parametrize("scheme", LIMITS)
@pytest.mark.parametrize("tilt", [0.4, -0.6])
def test_conormal_reflection_with_full_tensor(scheme, tilt):
    """n·Σ∇u = 0, not n·∇u = 0: u = cos(πx₀) cos(x₁ − (r/a)x₀) decays along both directions of the tilted frame.

    In y = x₁ − (r/a)x₀ the noises are independent and the walls are those of x₀ alone.
    """
    a, c = 1.0, 0.8
    S = np.array([[a, tilt], [tilt, c]])
    decay = 0.5 * (a * np.pi**2 + c - tilt**2 / a)

    def wave(x):
        return np.cos(np.pi * x[..., 0]) * np.cos(x[..., 1] - tilt / a * x[..., 0])

    box = Box([0.0, 0.0], [1.0, 2.0 * np.pi], ["reflecting", "periodic"])
    problem = KolmogorovProblem(SDE([0.0, 0.0], covariance=S, dim=2), wave, 0.1, box)
    x = np.array([[0.0, 0.5], [0.04, 3.0], [0.5, 1.0], [0.97, 4.0], [1.0, 6.0]])
    exact = np.exp(-0.1 * decay) * wave(x)
    sol = solve(problem, grid=(25, 48), steps=4, scheme=scheme)
    limit = {"monotone": 5e-2, "central2": 1e-2, "central4": 3e-4, "central6": 3e-5}[scheme]
    assert np.abs(sol(x) - exact).max() < limit
    # the normal derivative itself is far from zero there
    wrong = solve(
        KolmogorovProblem(SDE([0.0, 0.0], covariance=np.diag([a, c]), dim=2), wave, 0.1, box), grid=(25, 48), steps=4
    )
    assert np.abs(wrong(x) - exact).max() > 2e-2


def test_natural_end_takes_no_condition():
    """CIR with Feller violated: the equation itself at 0."""
    case = catalog.cir_bond()
    problem = KolmogorovProblem(
        case.problem.sde,
        case.problem.terminal,
        case.problem.horizon,
        Box(0.0, 4.0, [("natural", "open")]),
        killing=case.problem.killing,
    )
    assert np.abs(solve(problem, grid=201, steps=16)(case.points) - case.values).max() < 2e-4


@pytest.mark.parametrize("scheme", LIMITS)
def test_open_face_is_exact_for_lines(scheme):
    """Growing terminal data, drift towards the inside at both cuts."""
    problem = KolmogorovProblem(
        SDE(lambda t, x: -x, diffusion=1.0, dim=1), lambda x: 3.0 * x[..., 0] + 1.0, 1.0, Box(-2.0, 3.0)
    )
    x = np.array([-2.0, -1.0, 0.3, 3.0])
    assert np.allclose(solve(problem, grid=41, steps=16, scheme=scheme)(x), 3.0 * x * np.exp(-1.0) + 1.0, atol=1e-7)


def test_faces_that_meet():
    """A rectangle with absorbing, reflecting and elastic sides: product of one-dimensional answers."""
    horizon = 0.2

    def one(side, faces, terminal, grid=81):
        p = KolmogorovProblem(SDE(0.0, diffusion=1.0, dim=1), terminal, horizon, Box(0.0, side, [faces]))
        return solve(p, grid=grid, steps=32, scheme="central6")

    first = one(1.0, ("absorbing", "reflecting"), lambda x: np.sin(0.5 * np.pi * x[..., 0]))
    second = one(1.3, (Robin(0.5), "reflecting"), lambda x: np.cos(x[..., 0] - 1.3))
    box = Box([0.0, 0.0], [1.0, 1.3], [("absorbing", "reflecting"), (Robin(0.5), "reflecting")])
    problem = KolmogorovProblem(
        SDE([0.0, 0.0], diffusion=1.0, dim=2),
        lambda x: np.sin(0.5 * np.pi * x[..., 0]) * np.cos(x[..., 1] - 1.3),
        horizon,
        box,
    )
    x = np.array([[0.01, 0.02], [0.5, 0.6], [1.0, 0.0], [0.99, 1.29]])
    for scheme in SCHEMES:
        sol = solve(problem, grid=41, steps=16, scheme=scheme)
        limit = 1e-3 if SCHEMES[scheme].order < 4 else 2e-5
        assert np.abs(sol(x) - first(x[:, 0]) * second(x[:, 1])).max() < limit, scheme


@pytest.mark.parametrize("stepper", ["rk4", "mcs3"])
def test_drift_out_of_a_cut_lets_nothing_grow(stepper):
    """A rotation through the corners of an open box, with little noise: lines beyond it grew by 1e6 to 1e19."""
    for seed in range(3):
        rng = np.random.default_rng(seed)
        turn, damping = rng.uniform(3, 9) * rng.choice([-1, 1]), rng.uniform(0.05, 0.4)
        A, angle = np.array([[-damping, -turn], [turn, -damping]]), rng.uniform(0, 2 * np.pi)
        way = np.array([np.cos(angle), np.sin(angle)])
        sde = SDE(lambda t, x, A=A: x @ A.T, 10 ** rng.uniform(-1.5, -0.7), dim=2)
        box = Box(-rng.uniform(1.5, 3, 2), rng.uniform(1.5, 3, 2))
        problem = KolmogorovProblem(sde, lambda x, way=way: np.tanh(6.0 * (x @ way)), 1.0, box)
        sol = solve(problem, grid=(61, 47), steps=400, stepper=stepper, scheme="central6-still")
        # dispersion leaves ripples of a tenth
        assert np.abs(sol.values[0]).max() < 1.3, seed
