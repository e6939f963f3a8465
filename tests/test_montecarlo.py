"""Monte Carlo against exact answers: means, errors that tell the truth, faces, weak orders, randomness."""

import itertools
import math

import numpy as np
import pytest
import torch
from numpy.polynomial.hermite_e import hermegauss
from scipy.linalg import expm
from scipy.stats import poisson

from kolmo import catalog
from kolmo.errors import InputError, KolmoWarning, NotConvergedError
from kolmo.montecarlo.estimators import Moments, monte_carlo, seed_of
from kolmo.montecarlo.faces import Touch
from kolmo.montecarlo.methods import METHODS, Increment
from kolmo.montecarlo.model import Model
from kolmo.problem import KolmogorovProblem
from kolmo.problem.box import Box
from kolmo.problem.faces import Absorbing, Robin
from kolmo.problem.sde import SDE


def one(x):
    return 1.0 + 0.0 * x[..., 0]


def first(x):
    return x[..., 0]


def agrees(estimate, exact):
    """Within four standard errors and the bias estimate, and with an error bar small enough to mean something."""
    assert (np.abs(estimate.mean - exact) <= 4.0 * estimate.standard_error + estimate.bias_estimate + 1e-12).all()


@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("name", list(catalog.CASES))
def test_every_case_of_the_catalogue(name, method):
    case = catalog.CASES[name]()
    estimate = monte_carlo(
        case.problem,
        case.points,
        paths=4000 if name == "elastic_brownian_motion" else 600,
        steps=16,
        rng=5,
        method=method,
    )
    assert estimate.mean.shape == case.values.shape
    assert estimate.status == "finished"
    agrees(estimate, case.values)


# Faces that are exact in law for constant coefficients: two steps are enough, and without bridges far from it.
def test_survival_beside_one_wall_is_exact_with_two_steps():
    problem = KolmogorovProblem(SDE(-0.4, diffusion=1.2, dim=1), one, 1.0, Box(0.0, np.inf, [("absorbing", "open")]))
    x, s = np.array([0.2, 1.0]), 1.2
    from scipy.special import ndtr

    exact = ndtr((x - 0.4) / s) - np.exp(2 * 0.4 * x / s**2) * ndtr((-x - 0.4) / s)
    estimate = monte_carlo(problem, x, paths=40_000, steps=2, rng=0)
    assert (np.abs(estimate.mean - exact) < 4 * estimate.standard_error).all()
    assert estimate.standard_error.max() < 0.003


def test_discounted_value_at_the_exit_is_exact():
    """E exp(−cτ) = exp(−x√(2c)/σ): chance and instant of the exit are both drawn from their laws."""
    c, sigma = 0.7, 1.3
    box = Box(0.0, np.inf, [(Absorbing(1.0), "open")])
    problem = KolmogorovProblem(SDE(0.0, diffusion=sigma, dim=1), None, None, box, killing=c)
    x = np.array([0.1, 0.8])
    estimate = monte_carlo(problem, x, paths=20_000, steps=4, rng=1)
    assert (np.abs(estimate.mean - np.exp(-x * math.sqrt(2 * c) / sigma)) < 4 * estimate.standard_error).all()


def test_value_that_depends_on_time_is_read_at_the_exit():
    """A payment exp(−ct) at the exit is the payment 1 with killing c."""
    c, sde = 0.7, SDE(0.3, diffusion=1.0, dim=1)
    timed = Box(0.0, np.inf, [(Absorbing(lambda t, x: np.exp(-c * t) + 0.0 * x[..., 0]), "open")])
    plain = Box(0.0, np.inf, [(Absorbing(1.0), "open")])
    a = monte_carlo(KolmogorovProblem(sde, lambda x: 0 * x[..., 0], 1.0, timed), 0.5, paths=2000, steps=20, rng=1)
    b = monte_carlo(
        KolmogorovProblem(sde, lambda x: 0 * x[..., 0], 1.0, plain, killing=c), 0.5, paths=2000, steps=20, rng=1
    )
    assert np.isclose(a.mean, b.mean, rtol=3e-4)  # at the start or end of the step it would be off by 2e-2


def test_time_spent_until_the_exit_is_exact():
    """E τ = x/|b| for Brownian motion with drift towards the wall."""
    problem = KolmogorovProblem(
        SDE(-0.8, diffusion=0.9, dim=1), None, None, Box(0.0, 40.0, [("absorbing", "reflecting")]), source=1.0
    )
    estimate = monte_carlo(problem, [0.5, 2.0], paths=4000, steps=40, rng=3)
    assert (np.abs(estimate.mean - np.array([0.5, 2.0]) / 0.8) < 4 * estimate.standard_error).all()


def test_place_of_the_exit_follows_the_correlation():
    """The tangential coordinate is a martingale that stops at the wall; a step ends beside the place of its exit."""
    S = np.array([[1.0, 0.6], [0.6, 0.8]])
    box = Box([0.0, -np.inf], [np.inf, np.inf], [(Absorbing(lambda t, x: x[..., 1]), "open"), "open"])
    problem = KolmogorovProblem(SDE(np.array([-1.0, 0.0]), covariance=S), lambda x: x[..., 1], 1.0, box)
    x = np.array([[0.4, 0.3]])
    estimate = monte_carlo(problem, x, paths=20_000, steps=8, rng=0)
    assert abs(estimate.mean[0] - 0.3) < 4 * estimate.standard_error[0]


def test_a_path_that_starts_on_absorbing_faces_is_paid_once():
    box = Box([0.0, 0.0], [1.0, 1.0], Absorbing(lambda t, x: 3.0 + x[..., 0] + x[..., 1]))
    problem = KolmogorovProblem(SDE(0.2, diffusion=1.0, dim=2), lambda x: 0 * x[..., 0], 1.0, box)
    corners = np.array([[0.0, 0.0], [1.0, 1.0], [0.0, 1.0], [0.4, 0.0]])
    estimate = monte_carlo(problem, corners, paths=2, steps=2, rng=0)
    assert np.allclose(estimate.mean, 3.0 + corners.sum(-1), rtol=1e-14)


def test_pushed_amount_at_a_reflecting_wall_is_conormal():
    """From the wall without drift E K = √(2Σ₀₀T/π); the other coordinate is carried by Σ₁₀/Σ₀₀ of it."""
    S, T = np.array([[1.2, 0.7], [0.7, 0.9]]), 0.8
    push = math.sqrt(2.0 * 1.2 * T / math.pi)
    box = Box([0.0, -np.inf], [np.inf, np.inf], [("reflecting", "open"), "open"])
    terminal = lambda x: np.stack([x[..., 0], x[..., 1]], -1)  # noqa: E731
    estimate = monte_carlo(
        KolmogorovProblem(SDE(0.0, covariance=S), terminal, T, box), [[0.0, 0.0]], paths=40_000, steps=2, rng=0
    )
    assert (np.abs(estimate.mean[0] - [push, 0.7 / 1.2 * push]) < 4 * estimate.standard_error[0]).all()


def test_local_time_of_an_elastic_wall():
    """κ = 0, v = 1: u is the mean local time 2K/Σ at the wall, for κ u + ½n·Σ∇u = v."""
    sigma, T = 1.4, 0.6
    box = Box(0.0, np.inf, [(Robin(0.0, 1.0), "open")])
    problem = KolmogorovProblem(SDE(0.0, diffusion=sigma, dim=1), lambda x: 0 * x[..., 0], T, box)
    estimate = monte_carlo(problem, 0.0, paths=40_000, steps=2, rng=0)
    assert abs(estimate.mean - 2 / sigma**2 * sigma * math.sqrt(2 * T / math.pi)) < 4 * estimate.standard_error


def test_elastic_wall_is_exact_with_two_steps():
    case = catalog.elastic_brownian_motion(kappa=1.5)
    estimate = monte_carlo(case.problem, case.points, paths=40_000, steps=2, rng=2)
    assert (np.abs(estimate.mean - case.values) < 4 * estimate.standard_error + 1e-12).all()
    assert estimate.standard_error[0] < 0.003


def test_law_of_the_first_touch():
    """Drawn instants against the distribution function, and that against a fine random walk."""
    rng = np.random.default_rng(0)
    n = 20_000
    for start, stop in ((0.3, 0.5), (0.6, -0.4)):
        touch = Touch.of(np.full(n, start), np.full(n, stop), np.full(n, 0.8))
        every = np.arange(n)
        fractions = touch.instant(every, rng.standard_normal(n), rng.random(n))
        for f in (0.2, 0.5, 0.8):
            wanted = touch.chance_before(every[:1], np.array([f]))[0]
            assert abs((fractions < f).mean() * touch.chance[0] - wanted) < 4 / math.sqrt(n)
        steps = np.cumsum(rng.standard_normal((4000, 1000)), 1) * math.sqrt(0.8 / 1000)
        grid = np.arange(1, 1001) / 1000
        bridge = start + steps - grid * (steps[:, -1:] - (stop - start))
        seen = (bridge[:, :500] < 0).any(1).mean()
        wanted = touch.chance_before(every[:1], np.array([0.5]))[0]
        assert abs(seen - wanted) < 4 / math.sqrt(4000) + 0.02  # the walk is seen at 1000 instants only


# Weak orders, without sampling: the noise of one step is replaced by quadrature.
def moments_after_one_step(name, A, B, x, h):
    """E[X], E[XXᵀ] after one step for dX = AX dt + Σ_j B_j X dW_j, exactly for the scheme."""
    d, m = 2, len(B)
    sde = SDE(lambda t, x: x @ A.T, diffusion=lambda t, x: np.stack([x @ b.T for b in B], -1), dim=d)
    model = Model(KolmogorovProblem(sde, one, 1.0), None)
    nodes, weights = hermegauss(7)
    mean, second = np.zeros(d), np.zeros((d, d))
    for index in itertools.product(range(7), repeat=m):
        for sign in (-1.0, 1.0):
            dW = math.sqrt(h) * nodes[list(index)][None]
            signs = np.array([[[0.0, sign], [-sign, 0.0]]])
            y, _ = METHODS[name].step(model, x[None], Increment(0.0, h, h, dW, signs))
            w = 0.5 * np.prod(weights[list(index)] / math.sqrt(2 * math.pi))
            mean += w * y[0]
            second += w * np.outer(y[0], y[0])
    return mean, second


@pytest.mark.parametrize(("name", "rate"), [("euler", 2), ("platen", 3)])
def test_local_weak_order_with_noise_that_does_not_commute(name, rate):
    A = np.array([[-0.5, 1.0], [-0.7, 0.2]])
    B = np.array([[[0.3, 0.4], [0.0, -0.2]], [[0.1, 0.0], [0.5, 0.3]]])
    x = np.array([0.8, -0.5])
    eye = np.eye(2)
    lyapunov = np.kron(A, eye) + np.kron(eye, A) + sum(np.kron(b, b) for b in B)
    errors = []
    for h in (0.1, 0.05, 0.025):
        mean, second = moments_after_one_step(name, A, B, x, h)
        exact = (expm(lyapunov * h) @ np.outer(x, x).reshape(-1)).reshape(2, 2)
        errors.append(max(np.abs(mean - expm(A * h) @ x).max(), np.abs(second - exact).max()))
    rates = np.log2(np.array(errors[:-1]) / errors[1:])
    assert (np.abs(rates - rate) < 0.25).all(), rates


@pytest.mark.parametrize("as_matrix", [False, True])
def test_noise_without_x_takes_the_same_step_in_the_short_way(as_matrix, rng):
    """Whether σ(t) is recognised as one matrix for all points or not."""

    def diffusion(t, x):
        M = np.array([[0.3 + t, 0.1], [0.2 * t, 0.5]])
        return np.broadcast_to(M, (*x.shape[:-1], 2, 2)) if as_matrix else M + 0.0 * x[..., :1, None]

    sde = SDE(lambda t, x: np.cos(x) + t, diffusion=diffusion, dim=2)
    model = Model(KolmogorovProblem(sde, one, 1.0), None)
    x, dW = rng.normal(size=(2, 5, 2))
    step = Increment(0.2, 0.5, 0.3, dW, np.zeros((5, 2, 2)))
    y, b = METHODS["platen"].step(model, x, step)
    B, B_end = diffusion(0.2, x)[0], diffusion(0.5, x)[0]
    ahead = x + 0.3 * (np.cos(x) + 0.2) + dW @ B.T
    wanted = x + 0.15 * (np.cos(x) + 0.2 + np.cos(ahead) + 0.5) + 0.5 * dW @ (B + B_end).T
    assert np.allclose(y, wanted, rtol=1e-13)
    assert np.allclose(b, B)


@pytest.mark.parametrize(("name", "rate"), [("euler", 1), ("platen", 2)])
def test_global_order_and_bias_estimate_without_noise(name, rate):
    case = catalog.rotation()
    runs = [monte_carlo(case.problem, case.points, paths=2, steps=n, rng=0, method=name) for n in (32, 64)]
    errors = [np.abs(r.mean - case.values).max() for r in runs]
    assert abs(math.log2(errors[0] / errors[1]) - rate) < 0.2
    assert 0.5 < runs[1].bias_estimate.max() / errors[1] < 4.0


def test_no_step_straddles_a_breakpoint():
    """Without noise and with a drift constant per layer, Euler's method is exact if it keeps to the layers."""
    edges, speeds = [0.13, 0.41, 0.8], [1.0, -3.0, 0.5, 7.0]
    sde = SDE(lambda t, x: speeds[int(np.searchsorted(edges, t, side="right"))] + 0.0 * x, dim=1, breakpoints=edges)
    exact = 0.2 + float(np.dot(speeds, np.diff([0.0, *edges, 1.0])))
    for method in METHODS:
        estimate = monte_carlo(KolmogorovProblem(sde, first, 1.0), 0.2, paths=2, steps=3, rng=0, method=method)
        assert np.isclose(estimate.mean, exact, rtol=1e-13)
        assert estimate.steps == 8


@pytest.mark.parametrize("boundary", ["reflecting", "natural", "absorbing", Robin(1.0), "periodic"])
def test_coefficients_are_not_read_beyond_closed_faces(boundary):
    seen = []

    def watched(f):
        def g(t, x):
            seen.append((x.min(), x.max(), t))
            return f(x)

        return g

    sde = SDE(watched(lambda x: 1.0 - x), diffusion=watched(lambda x: x * (1.0 - x) + 0.2), dim=1, breakpoints=[0.5])
    problem = KolmogorovProblem(sde, first, 1.0, Box(0.0, 1.0, boundary), killing=watched(first), source=watched(first))
    for method in METHODS:
        monte_carlo(problem, [0.02, 0.5, 1.0], paths=200, steps=4, rng=0, method=method)
    low, high, times = np.array(seen).T
    assert low.min() >= 0.0
    assert high.max() <= 1.0
    assert times.max() <= 1.0


def test_randomness_conventions():
    case = catalog.ornstein_uhlenbeck()

    def run(rng):
        return monte_carlo(case.problem, 0.3, paths=50, steps=4, rng=rng)

    assert run(3).mean == run(3).mean != run(4).mean
    assert run(None).mean != run(None).mean
    for make in (lambda: np.random.default_rng(1), lambda: torch.Generator().manual_seed(1)):
        generator = make()
        a, b = run(generator), run(generator)
        assert a.mean != b.mean
        assert run(make()).mean == a.mean == run(a.rng).mean
    state = torch.get_rng_state()
    run(torch.Generator().manual_seed(1))
    assert torch.equal(state, torch.get_rng_state())
    with pytest.raises(InputError, match="rng"):
        seed_of("seed")


def test_standard_error_is_the_spread_over_seeds():
    case = catalog.ornstein_uhlenbeck("square")
    runs = [monte_carlo(case.problem, 0.5, paths=100, steps=4, rng=i) for i in range(200)]
    spread = np.std([r.mean for r in runs])
    assert np.isclose(np.mean([r.standard_error for r in runs]), spread, rtol=0.15)


def test_moments_merge_as_if_seen_at_once(rng):
    owner = np.repeat([0, 1, 2], [40, 3, 20])
    values = rng.normal(size=(63, 2)) + 1e6
    moments = Moments.of(3, 2)
    for part in np.split(np.arange(63), [7, 41, 50]):
        moments.add(owner[part], values[part])
    for i in range(3):
        mine = values[owner == i]
        assert np.allclose(moments.mean[i], mine.mean(0), rtol=1e-14)
        assert np.allclose(moments.standard_error[i], mine.std(0, ddof=1) / math.sqrt(len(mine)), rtol=1e-8)


def test_chunks_do_not_change_shapes_or_truth(monkeypatch):
    monkeypatch.setattr("kolmo.montecarlo.estimators.CHUNK", 777)
    case = catalog.wright_fisher()
    estimate = monte_carlo(case.problem, case.points.reshape(2, 3, 1), paths=1000, steps=16, rng=0)
    assert estimate.mean.shape == (2, 3, 3)
    agrees(estimate, case.values.reshape(2, 3, 3))


def test_every_chunk_has_its_own_randomness(monkeypatch):
    """Were a chunk drawn twice, the mean would not get better, and the standard error would not say so."""
    monkeypatch.setattr("kolmo.montecarlo.estimators.CHUNK", 50)
    problem = KolmogorovProblem(
        SDE(0.0, 1.0, dim=1), lambda x: np.stack([np.sin(k * x[..., 0]) for k in (1, 2, 3)], -1), 1.0
    )
    once = monte_carlo(problem, [0.0], paths=50, steps=2, rng=0)
    twice = monte_carlo(problem, [0.0], paths=100, steps=2, rng=0)
    assert (np.abs(twice.mean - once.mean) > 1e-6).all()
    many = monte_carlo(problem, [0.0], paths=20_000, steps=2, rng=0)
    assert (np.abs(many.mean) <= 4.0 * many.standard_error + many.bias_estimate).all()


def test_the_bias_estimate_is_no_smaller_than_its_own_noise():
    """Few paths: the difference of two step sizes is zero by accident for some seed, its standard error is not."""
    problem = KolmogorovProblem(SDE(lambda t, x: -x, lambda t, x: 0.5 + 0.3 * np.sin(x[..., 0]), dim=1), first, 1.0)
    biases = [monte_carlo(problem, [0.3], paths=30, steps=4, rng=seed).bias_estimate.item() for seed in range(60)]
    assert min(biases) > 0.2 * np.median(biases)


@pytest.mark.parametrize("name", ["euler", "platen"])
def test_coefficients_that_depend_on_time_are_those_of_their_own_layer(name):
    """The drift is linear in time in each layer; a step that ends at the break takes the limit from before."""

    def drift(t, x):
        assert 0.0 <= t <= 1.0
        return t + 9.0 * (t >= 0.5) + 0.0 * x

    problem = KolmogorovProblem(SDE(drift, covariance=0.0, dim=1, breakpoints=[0.5]), first, 1.0)
    found = monte_carlo(problem, [0.0], paths=2, steps=4, rng=0, method=name).mean.item()
    left = 0.5 * 0.25 if name == "euler" else 0.0  # the left end of four steps of a line
    assert found == pytest.approx(5.0 - left, abs=1e-8)


def test_tensors_in_tensors_out_and_modules_as_coefficients():
    layer = torch.nn.Linear(2, 2).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[-0.5, 0.2], [0.1, -0.4]]))
        layer.bias.copy_(torch.tensor([0.3, -0.1]))

    class Drift(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, t, x):
            return self.layer(x)

    x = torch.tensor([[0.3, 0.4]], dtype=torch.float64)
    terminal = lambda y: torch.cos(y[..., 0])  # noqa: E731
    problem = KolmogorovProblem(SDE(Drift(), diffusion=0.4, dim=2), terminal, 1.0)
    a = monte_carlo(problem, x, paths=100, steps=4, rng=0)
    assert isinstance(a.mean, torch.Tensor)
    assert not a.mean.requires_grad
    b = monte_carlo(problem, x.numpy(), paths=100, steps=4, rng=0)
    assert isinstance(b.mean, np.ndarray)
    assert np.allclose(a.mean.numpy(), b.mean)
    W, c = layer.weight.detach().numpy(), layer.bias.detach().numpy()
    plain = KolmogorovProblem(SDE(lambda t, x: x @ W.T + c, diffusion=0.4, dim=2), lambda y: np.cos(y[..., 0]), 1.0)
    assert np.allclose(monte_carlo(plain, x.numpy(), paths=100, steps=4, rng=0).mean, b.mean)


def test_paths_that_never_end_are_reported():
    problem = KolmogorovProblem(
        SDE(lambda t, x: -30.0 * x, diffusion=0.1, dim=1), None, None, Box(-1.0, 1.0, "absorbing"), source=1.0
    )
    with pytest.warns(KolmoWarning, match="neither absorbed nor killed"):
        estimate = monte_carlo(problem, 0.0, paths=2, steps=2, rng=0)
    assert estimate.status == "truncated"
    assert estimate.bias_estimate == np.inf


def test_paths_that_run_off_are_an_error_or_an_unknown_bias():
    case = catalog.double_well("square")
    with pytest.raises(NotConvergedError, match="more steps"):
        monte_carlo(case.problem, 30.0, paths=10, steps=12, rng=0)
    sde = SDE(lambda t, x: -(x**3), dim=1)
    estimate = monte_carlo(KolmogorovProblem(sde, first, 40.0), 1.3, paths=2, steps=38, rng=0)
    assert np.isfinite(estimate.mean)
    assert estimate.bias_estimate == np.inf


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ({"x": [1.2]}, "x"),
        ({"paths": 1}, "paths"),
        ({"steps": 1}, "steps"),
        ({"steps": 2.5}, "steps"),
        ({"method": "eulr"}, "method"),
        ({"rng": -1}, "rng"),
    ],
)
def test_bad_input_is_named(options, argument):
    problem = KolmogorovProblem(SDE(0.0, diffusion=1.0, dim=1), first, 1.0, Box(0.0, 1.0, "reflecting"))
    with pytest.raises(InputError) as caught:
        monte_carlo(problem, **{"x": [0.5], "paths": 10, "steps": 4, "rng": 0, **options})
    assert caught.value.argument == argument


def test_stationary_problem_without_an_end_is_refused():
    problem = KolmogorovProblem(SDE(0.0, diffusion=1.0, dim=1), None, None, Box(0.0, 1.0, "reflecting"), source=1.0)
    with pytest.raises(InputError, match="paths that end"):
        monte_carlo(problem, 0.5, paths=10, steps=4, rng=0)


@pytest.mark.parametrize("seed", range(3))
def test_jumps_that_land_on_a_face_are_paid_there(seed):
    """Without noise a path may come to lie on the face exactly: after the n-th jump, as Poisson says."""
    rng = np.random.default_rng(seed)
    n, rate, reward, horizon = int(rng.integers(1, 4)), rng.uniform(1.0, 3.0), rng.uniform(0.5, 2.0), 1.0
    side = int(rng.integers(2))
    sde = SDE(0.0, jumps=[(rate, 0.25 * (2 * side - 1))], dim=1)
    faces = [(Absorbing(reward), "open"), ("open", Absorbing(reward))][side]
    problem = KolmogorovProblem(sde, lambda x: 0.0 * x[..., 0], horizon, Box(-1.0, 1.0, [faces]))
    start = (2 * side - 1) * (1.0 - 0.25 * n)
    found = monte_carlo(problem, [start], paths=20_000, steps=64, rng=seed)
    exact = reward * poisson.sf(n - 1, rate * horizon)
    assert abs(found.mean - exact) <= 4.0 * found.standard_error + found.bias_estimate


@pytest.mark.parametrize("word", ["natural", "reflecting", "absorbing"])
def test_faces_of_a_lower_order_widen_the_bias_estimate(word):
    """The same paths, which meet no face: their two step sizes tell less where the order may be that of the face."""
    sde = SDE(lambda t, x: 1.0 - x**2, dim=1)
    found = {}
    for kind in ("open", word):
        box = Box(0.0, np.inf, [(kind, "open")])
        problem = KolmogorovProblem(sde, lambda x: x[..., 0], 1.0, box)
        found[kind] = monte_carlo(problem, [0.3], paths=2, steps=16, rng=0, method="platen")
    order = min(2.0, box.faces[0][0].weak_order)
    assert found[word].mean == pytest.approx(found["open"].mean, rel=1e-12)
    assert found[word].bias_estimate == pytest.approx(found["open"].bias_estimate * 3.0 / (2.0**order - 1.0), rel=1e-9)
    assert word != "natural" or found[word].bias_estimate > 5.0 * found["open"].bias_estimate


@pytest.mark.parametrize("method", ["euler", "platen"])
def test_killing_that_changes_along_the_way_is_its_mean_over_a_step(method):
    """Linear along straight paths: then the mean of both ends of a step is exact, however long it is."""
    sde = SDE(0.7, dim=1)
    problem = KolmogorovProblem(sde, one, 1.0, killing=lambda t, x: 0.4 + 1.3 * x[..., 0])
    found = monte_carlo(problem, [0.2], paths=2, steps=2, rng=0, method=method)
    assert found.mean == pytest.approx(np.exp(-(0.4 + 1.3 * (0.2 + 0.35))), rel=1e-12)
