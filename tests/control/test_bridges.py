"""Bridges of linear processes at any noise: random draws against closed forms, shapes, tables, their parts."""

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from scipy.special import logsumexp
from scipy.stats import multivariate_normal

import kolmo
from kolmo import catalog, control
from kolmo.control.densities import GivenDensity, masses
from kolmo.control.gaussian_bridge import GaussianBridges
from kolmo.control.linear import LinearProcess
from kolmo.kernels.logsums import Blocks, averaged, pulled

EVERYWHERE = np.full(1, -np.inf), np.full(1, np.inf)


def drawn(seed, d):
    """Gaussians of any shape, up to fifty deviations apart, at noise from .02 to 1, Brownian or drawn in or apart."""
    rng = np.random.default_rng([seed, d])
    widths = np.exp(rng.uniform(np.log(0.05), np.log(1.5), (2, d)))
    turns = [np.linalg.qr(rng.normal(size=(d, d)))[0] for _ in range(2)]
    mean0, direction = rng.normal(size=d), rng.normal(size=d)
    far = rng.uniform(0.0, 50.0) * widths[1].max()
    return catalog.BRIDGES["gaussian_bridge"](
        mean0,
        turns[0] * widths[0] ** 2 @ turns[0].T,
        mean0 + far * direction / np.linalg.norm(direction),
        turns[1] * widths[1] ** 2 @ turns[1].T,
        kappa=rng.choice([0.0, rng.uniform(-0.7, 1.5)]),
        sigma=np.exp(rng.uniform(np.log(0.02 if d == 1 else 0.1), 0.0)),
        horizon=rng.uniform(0.3, 2.0),
    )


@pytest.mark.parametrize(
    ("d", "seed"),
    [(1, seed) for seed in range(8)]
    + [(2, 0), (2, 1)]
    + [pytest.param(2, k, marks=pytest.mark.slow) for k in range(2, 8)],
)
def test_gaussian_bridges_of_any_noise_meet_their_closed_form(d, seed):
    case = drawn(seed, d)
    bridge = control.schroedinger_bridge(case.sde, case.density0, case.density1, case.horizon, rtol=1e-5, atol=0.0)
    assert bridge.status == "converged"
    assert abs(bridge.cost - case.cost) <= bridge.error_estimate <= 1e-5 * case.cost
    rng = np.random.default_rng(seed)
    for part in (0.0, 0.4, 0.9, 0.999):
        t = part * case.horizon
        mean, covariance = case.law(t)
        x = rng.multivariate_normal(mean, covariance, 50)
        steering = np.asarray(bridge.sde.drift(t, x)) - case.sde.drift(t, x)
        size = np.sqrt((case.solution(t, x) ** 2).sum(-1).mean())
        off = np.sqrt(((steering - case.solution(t, x)) ** 2).sum(-1).mean())
        assert off <= 2.0 * bridge.errors.drift
        assert bridge.errors.drift < 0.05 * (1.0 + size)
        ratio = bridge.density(t, x) / multivariate_normal(mean, covariance).pdf(x)
        assert np.abs(ratio - 1.0).mean() <= 4.0 * bridge.errors.marginals
    x = rng.multivariate_normal(*case.law(0.0), 50)
    there = case.solution(0.0, x)
    kernel = LinearProcess.found(case.sde, case.horizon, x).transition(0.0, case.horizon)
    mean = (
        x @ kernel.matrix.T
        + kernel.shift
        + there @ np.linalg.inv(kernel.matrix) @ kernel.covariance / case.sde.covariance(0.0, x)[0, 0, 0]
    )
    off = np.sqrt(((bridge.arrival(x) - mean) ** 2).sum(-1).mean())
    assert off <= 2.0 * bridge.errors.coupling


def test_coupled_noise_and_turning_drift_with_breakpoints():
    """The bridge of a Gaussian into its own free law is free: no cost, no steering."""
    A, root = np.array([[-0.5, 1.0], [-1.5, -0.2]]), np.array([[0.2, 0.0], [0.15, 0.1]])

    def drift(t, x):
        return x @ torch.as_tensor(A.T) * (1.0 if t < 0.4 else 2.0)

    sde = kolmo.SDE(drift, root, dim=2, breakpoints=[0.4], arrays="torch")
    first = np.array([[0.05, 0.02], [0.02, 0.03]])
    y = solve_ivp(
        lambda t, z: np.concatenate(
            [
                (1 + (t >= 0.4)) * A @ z[:2],
                ((1 + (t >= 0.4)) * (A @ z[2:].reshape(2, 2) + z[2:].reshape(2, 2) @ A.T) + root @ root.T).ravel(),
            ]
        ),
        (0.0, 1.0), np.concatenate([[1.0, 0.5], first.ravel()]), rtol=1e-11, atol=1e-13, max_step=0.1,
    ).y[:, -1]  # fmt: skip

    def gauss(m, S):
        P, m = torch.as_tensor(np.linalg.inv(S)), torch.as_tensor(m)
        return lambda x: torch.exp(-0.5 * torch.einsum("...i,ij,...j->...", x - m, P, x - m))

    bridge = control.schroedinger_bridge(sde, gauss([1.0, 0.5], first), gauss(y[:2], y[2:].reshape(2, 2)), 1.0)
    assert abs(bridge.cost) <= bridge.error_estimate + 1e-6
    x = np.array([[1.0, 0.5], [0.8, 0.4]])
    for t in (0.0, 0.5, 0.95):
        np.testing.assert_allclose(bridge.sde.drift(t, x), sde.drift(t, x), atol=1e-3)


def mixture(seed, middle):
    rng = np.random.default_rng(seed)
    m, s, w = middle + rng.uniform(-1.5, 1.5, 3), rng.uniform(0.1, 0.6, 3), rng.uniform(0.2, 1.0, 3)
    m, s, w = (torch.as_tensor(v) for v in (m, s, w))
    return lambda x: (w / s * torch.exp(-0.5 * ((x - m) / s) ** 2)).sum(-1)


@pytest.mark.parametrize("seed", [0, 1])
def test_mixtures_meet_an_independent_iteration(seed):
    """Plain Sinkhorn in logarithms on a fine grid of the whole interval."""
    sigma, f, g = 0.3, mixture(seed, 0.0), mixture(seed + 10, 2.0)
    x = np.linspace(-4.0, 6.0, 320)
    la, lb = (np.log(np.maximum(h(torch.as_tensor(x[:, None])).numpy(), 1e-300)) for h in (f, g))
    la, lb = la - logsumexp(la), lb - logsumexp(lb)
    K, G, misfit = -0.5 * ((x[:, None] - x) / sigma) ** 2, np.zeros(len(x)), 1.0
    while misfit > 1e-8:
        F = -logsumexp(K + lb + G, axis=1)
        after = -logsumexp(K.T + la + F, axis=1)
        misfit, G = 0.5 * (np.exp(lb) * np.abs(np.expm1(np.clip(G - after, -9, 9)))).sum(), after
    exact = np.exp(la) @ F + np.exp(lb) @ (G + lb - np.log(x[1] - x[0])) + 0.5 * np.log(2 * np.pi * sigma**2)
    bridge = control.schroedinger_bridge(kolmo.SDE(0.0, sigma, dim=1), f, g, 1.0, rtol=1e-4)
    assert bridge.status == "converged"
    assert abs(bridge.cost - exact) <= bridge.error_estimate + 1e-6


def disc(x):
    return (x.square().sum(-1) < 1.0).double()


def square(x):
    return ((x - torch.tensor([3.0, 0.5], dtype=x.dtype, device="cpu")).abs().amax(-1) < 0.7).double()


@pytest.mark.parametrize("sigma", [0.6, pytest.param(0.1, marks=pytest.mark.slow)])
def test_disc_to_square_and_back(sigma):
    """Costs there and back differ by the entropies alone, and steered paths end where they should."""
    bm = kolmo.SDE(0.0, sigma, dim=2)
    there, back = (control.schroedinger_bridge(bm, *ends, 1.0) for ends in ((disc, square), (square, disc)))
    assert {there.status, back.status} == {"converged"}
    entropies = np.log(np.pi) - np.log(1.4**2)
    assert abs(there.cost - back.cost - entropies) <= there.error_estimate + back.error_estimate
    rng, count, steps = np.random.default_rng(0), 500, 40
    angle, radius = 2 * np.pi * rng.random(count), np.sqrt(rng.random(count))
    x = np.stack([radius * np.cos(angle), radius * np.sin(angle)], -1)
    for k in range(steps):
        x = x + there.sde.drift(k / steps, x) / steps + sigma / np.sqrt(steps) * rng.normal(size=x.shape)
    cells = np.histogram2d(*(x - [3.0, 0.5]).T, bins=[[-9.0, -0.7, 0.0, 0.7, 9.0]] * 2)[0] / count
    wanted = np.zeros((4, 4))
    wanted[1:3, 1:3] = 0.25
    # the last step leaves the square by σ/√40 at most; the rest is noise of 500 paths
    assert 0.5 * np.abs(cells - wanted).sum() < 0.05 + 2.0 * sigma / np.sqrt(steps) / 0.7
    assert (np.abs(x.mean(0) - [3.0, 0.5]) < 4 * 0.41 / np.sqrt(count) + 0.01).all()


def test_an_open_box_is_a_cut_and_others_are_walls():
    """A box through the tails of both densities changes nothing; a reflecting one far away hardly anything."""
    case = catalog.BRIDGES["gaussian_bridge"]([0.0], [[0.3]], [0.6], [[0.2]], 0.5, 0.8, 1.0)
    ends = case.density0, case.density1, 1.0
    cut = control.schroedinger_bridge(case.sde, *ends, kolmo.Box(-3.0, 3.0), rtol=1e-8)
    assert abs(cut.cost - case.cost) <= cut.error_estimate <= 1e-6 + 1e-8
    walls = control.schroedinger_bridge(case.sde, *ends, kolmo.Box(-5.0, 5.0, "reflecting"), rtol=1e-3)
    assert abs(walls.cost - case.cost) <= walls.error_estimate
    x = np.linspace(-0.5, 1.0, 7)[:, None]
    assert np.abs(walls.sde.drift(0.5, x) - cut.sde.drift(0.5, x)).max() <= 3.0 * walls.errors.drift
    assert np.abs(walls.arrival(x) - cut.arrival(x)).max() <= 3.0 * walls.errors.coupling
    uniform = control.schroedinger_bridge(
        kolmo.SDE(0.0, 0.5, dim=1), lambda x: 1.0 + 0.0 * x[..., 0], case.density1, 1.0, kolmo.Box(-1.0, 1.0)
    )
    assert uniform.density(0.0, [[0.5], [1.5]]).round(3).tolist() == [0.5, 0.0]


def test_what_is_not_linear_is_seen():
    points = np.random.default_rng(0).uniform(-2.0, 2.0, (400, 1))
    bent = [lambda t, x: np.abs(x), lambda t, x: np.sin(0.01 * x), lambda t, x: np.where(t < 0.5, -x, -(x**2))]
    assert all(LinearProcess.found(kolmo.SDE(f, 1.0, dim=1), 1.0, points) is None for f in bent)
    assert LinearProcess.found(kolmo.SDE(lambda t, x: -x, lambda t, x: 1.0 + 0.1 * x, dim=1), 1.0, points) is None


def test_transitions_of_coefficients_that_change_in_time():
    def A(t):
        return np.array([[-1.0 + 0.3 * np.sin(3 * t), 0.8], [-0.5 * t, -0.2]])

    def root(t):
        return np.array([[0.3 + 0.1 * t, 0.0], [0.1, 0.2]])

    sde = kolmo.SDE(lambda t, x: x @ A(t).T + np.cos(t), lambda t, x: np.broadcast_to(root(t), (*x.shape, 2)), dim=2)
    move = LinearProcess.found(sde, 1.3, np.random.default_rng(0).normal(size=(50, 2))).transition(0.2, 1.1)

    def rate(t, z):
        Phi, c, S = z[:4].reshape(2, 2), z[4:6], z[6:].reshape(2, 2)
        return np.concatenate(
            [(A(t) @ Phi).ravel(), A(t) @ c + np.cos(t), (A(t) @ S + S @ A(t).T + root(t) @ root(t).T).ravel()]
        )

    z = solve_ivp(rate, (0.2, 1.1), [1, 0, 0, 1, *[0] * 6], rtol=1e-11, atol=1e-13).y[:, -1]
    for found, exact in zip(move, (z[:4].reshape(2, 2), z[4:6], z[6:].reshape(2, 2)), strict=True):
        np.testing.assert_allclose(found, exact, atol=1e-9)


@pytest.mark.parametrize("scale", [1.0, 60.0])
def test_sums_of_exponentials_against_dense_ones(scale):
    """Both ways: a product of matrices, and one by one where exponentials underflow."""
    rng = np.random.default_rng(0)
    u, v = ((np.linspace(-1, 1, n) * scale, np.linspace(-0.5, 2, m) * scale) for n, m in ((7, 9), (40, 5)))
    g, h = scale * rng.normal(size=(40, 5)), rng.normal(size=(40, 5))
    g[3, 2] = -np.inf
    p, q = (np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 2) for axes in (u, v))
    terms = g.ravel() - 0.5 * ((p[:, None] - q) ** 2).sum(-1)
    np.testing.assert_allclose(pulled(u, v, g).ravel(), logsumexp(terms, axis=1), rtol=1e-12)
    weights = np.exp(terms - logsumexp(terms, axis=1, keepdims=True))
    np.testing.assert_allclose(averaged(u, v, g, h).ravel(), weights @ h.ravel(), atol=1e-12)
    logs, mean = Blocks.of(q, g.ravel(), g.shape).around(p)
    np.testing.assert_allclose(logs, logsumexp(terms, axis=1), rtol=1e-12)
    np.testing.assert_allclose(mean, weights @ q, atol=1e-10 * scale)


def test_densities_are_found_wherever_they_are():
    for middle, width in ((37.0, 0.02), (-4000.0, 0.3), (0.0, 1e-3), (12.3, 200.0)):
        density = GivenDensity(
            lambda x, m=middle, w=width: torch.exp(-0.5 * ((x[..., 0] - m) / w) ** 2), "density0", *EVERYWHERE
        )
        low, high = (float(end[0] - middle) / width for end in density.found()[1])
        assert -7.8 < low < -7.7
        assert 7.7 < high < 7.8


def test_masses_of_densities_that_jump():
    """Means of exp(x) over an interval fall in error with the square of the spacing, wherever the ends lie."""
    box = GivenDensity(lambda x: (x[..., 0] - 0.3).abs().lt(0.77).double(), "density0", *EVERYWHERE)
    (low, high), exact = box.found()[1], (np.exp(1.07) - np.exp(-0.47)) / 1.54
    errors = []
    for n in (13, 26, 52):
        axis = np.linspace(low[0] - 0.01, high[0] + 0.03, n)
        found = masses(box, (axis,), lambda z: z)
        errors.append(abs(found.masses @ np.exp(axis) / found.masses.sum() - exact))
        assert found.masses.sum() == pytest.approx(1.54, abs=2e-3)
    assert errors[1] < 0.35 * errors[0]
    assert errors[2] < 0.35 * errors[1]


def test_a_bridge_that_runs_late_is_told():
    case = catalog.BRIDGES["gaussian_bridge"]()
    with pytest.warns(kolmo.ToleranceWarning, match="max_cells"):
        bridge = control.schroedinger_bridge(
            case.sde, case.density0, case.density1, 1.0, rtol=1e-14, atol=0.0, max_cells=150
        )
    assert bridge.status == "tolerance_not_met"
    assert abs(bridge.cost - case.cost) <= bridge.error_estimate


# ----------------------------------------------------------------------- processes that are linear in other coordinates
def bent(seed):
    """A linear process, and its Gaussians, seen through x + a tanh x: the cost is the same, drift and noise are not."""
    rng = np.random.default_rng([seed, 77])
    kappa, a, sigma = rng.uniform(0.0, 1.5), rng.uniform(0.2, 1.0), 10.0 ** rng.uniform(-1.2, 0.0)
    means, widths = rng.uniform(-1.5, 1.5, 2), sigma * rng.uniform(0.4, 1.2, 2)
    case = catalog.BRIDGES["gaussian_bridge"](
        means[:1], [[widths[0] ** 2]], means[1:], [[widths[1] ** 2]], kappa=kappa, sigma=sigma
    )

    def slope(x):
        return 1.0 + a / torch.cosh(x) ** 2

    def back(y):
        x = y / (1.0 + a)
        for _ in range(40):
            x = x - (x + a * torch.tanh(x) - y) / slope(x)
        return x

    def drift(t, y):
        x = back(y)
        return -kappa * x * slope(x) - sigma**2 * a * torch.tanh(x) / torch.cosh(x) ** 2

    sde = kolmo.SDE(drift, lambda t, y: sigma * slope(back(y))[..., None], dim=1, arrays="torch")
    laws = [lambda y, f=f: f(back(y)) / slope(back(y))[..., 0] for f in (case.density0, case.density1)]
    ends = np.array([means.min(), means.max()]) + 6.0 * max(*widths, sigma) * np.array([-1.0, 1.0])
    return case, sde, laws, kolmo.Box(*(ends + a * np.tanh(ends)))


@pytest.mark.parametrize("seed", [*range(3), *(pytest.param(k, marks=pytest.mark.slow) for k in range(3, 12))])
def test_bridges_of_bent_processes_cost_what_those_of_straight_ones_do(seed):
    """By the chain on a grid: converged or told, the cost lies within the estimate."""
    case, sde, laws, box = bent(seed)
    bridge = control.schroedinger_bridge(sde, *laws, 1.0, box=box, rtol=1e-3)
    assert abs(bridge.cost - case.cost) <= bridge.error_estimate
    assert bridge.status == "tolerance_not_met" or bridge.error_estimate <= 1e-6 + 1e-3 * case.cost


@pytest.mark.parametrize("finished", [0, 2])
def test_an_interrupted_bridge_is_the_finest_level_that_was_finished(monkeypatch, finished):
    case, level, begun = catalog.BRIDGES["gaussian_bridge"](), GaussianBridges.level, []

    def interrupted(self, *given):
        begun.append(given)
        if len(begun) > finished:
            raise KeyboardInterrupt
        return level(self, *given)

    monkeypatch.setattr(GaussianBridges, "level", interrupted)
    given = case.sde, case.density0, case.density1, case.horizon
    if not finished:
        with pytest.raises(KeyboardInterrupt):
            control.schroedinger_bridge(*given, rtol=1e-14, atol=0.0)
        return
    bridge = control.schroedinger_bridge(*given, rtol=1e-14, atol=0.0)
    assert bridge.status == "interrupted"
    assert abs(bridge.cost - case.cost) <= bridge.error_estimate
