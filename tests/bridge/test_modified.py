"""Modified SDEs: weak orders against spectral and polynomial references, predicted failures, refusals, gradients."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.linalg import expm

from kolmo import bridge
from kolmo.errors import InputError, KolmoWarning

DOUBLE = torch.float64
HORIZON = 0.5


class Wave(torch.nn.Module):
    """A branch that is 2π-periodic in every coordinate; its two amplitudes are parameters."""

    def __init__(self, dim, a=0.5, b=0.6):
        super().__init__()
        self.dim = dim
        self.a, self.b = (torch.nn.Parameter(torch.tensor(v, dtype=DOUBLE)) for v in (a, b))

    def forward(self, x):
        if self.dim == 1:
            return self.a * torch.sin(x) + self.b * torch.cos(2 * x) + 0.4
        first = self.a * torch.sin(x[..., 0] + x[..., 1]) + 0.3
        return torch.stack([first, self.b * torch.cos(x[..., 0]) - 0.4 * torch.sin(x[..., 1])], -1)


def periodic_loss(x):
    if x.shape[-1] == 1:
        return torch.cos(x[..., 0]) + 0.5 * torch.sin(2 * x[..., 0])
    return torch.cos(x[..., 0]) * torch.sin(x[..., 1] + 0.5)


def circle(n):
    """Nodes, first and second derivative matrices of the Fourier method."""
    k, identity = np.fft.fftfreq(n, 1 / n), np.eye(n)
    odd = np.where(np.arange(n) == n // 2, 0.0, k)
    F = np.fft.fft(identity, axis=0)
    first = np.fft.ifft(1j * odd[:, None] * F, axis=0).real
    return 2 * np.pi * np.arange(n) / n, first, np.fft.ifft(-(k**2)[:, None] * F, axis=0).real


def generator(sde, t, dim, n):
    """Points of the torus and the matrix of b·∇ + ½ Σ:∇² by the Fourier method."""
    line, first, second = circle(n)
    X = np.stack(np.meshgrid(*[line] * dim, indexing="ij"), -1).reshape(-1, dim)
    with torch.no_grad():
        b, S = (np.asarray(f(t, torch.tensor(X))) for f in (sde.drift, sde.covariance))

    def derivative(*axes):
        factors = [np.eye(n)] * dim
        for i in range(dim):
            factors[i] = {0: np.eye(n), 1: first, 2: second}[axes.count(i)]
        return factors[0] if dim == 1 else np.kron(factors[0], factors[1])

    L = sum(b[:, i, None] * derivative(i) for i in range(dim))
    for i, j in itertools.product(range(dim), repeat=2):
        L = L + 0.5 * S[:, i, j, None] * derivative(i, j)
    return X, L


def weak_errors(law, dim, order, depths, strict=True):
    """Largest difference between the network's expected loss and its modified equation on the torus."""
    errors = []
    for depth in depths:
        net = bridge.NoisyResNet([Wave(dim)] * depth, law, horizon=HORIZON)
        X, L = generator(bridge.modified_sde(net, order, strict=strict), 0.0, dim, 48 if dim == 1 else 20)
        u = expm(HORIZON * L) @ periodic_loss(torch.tensor(X)).numpy()
        some = slice(None, None, 4 if dim == 1 else 23)
        network = bridge.expected_loss(net, periodic_loss, torch.tensor(X[some]), method="recursion", rtol=1e-7)
        errors.append(float(np.abs(network.mean.numpy() - u[some]).max()))
    return np.array(errors)


ORDERS = [
    (bridge.StochasticDepth(0.5), 1, 1),
    (bridge.StochasticDepth(0.5), 2, 2),
    (bridge.StochasticDepth(0.5, rescale=False), 2, 2),
    (bridge.StochasticDepth(0.8), 2, 2),
    (bridge.StochasticDepth(0.5), 3, 3),
    (bridge.BranchDropout(0.5), 2, 2),
    (bridge.BranchDropout(0.5), 3, 3),
    (bridge.Multiplicative(0.8, "uniform", scaling="natural"), 3, 3),
    (bridge.Additive(0.8, scaling="natural"), 3, 3),
    (bridge.Additive(0.7), 1, 1),
    (bridge.Additive(0.7), 2, 2),
    (bridge.Additive(0.7, "three-point"), 2, 2),
    (bridge.Multiplicative(0.6), 1, 1),
    (bridge.CentredBernoulli(0.8), 1, 1),
]


@pytest.mark.parametrize("dim", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("law", "order", "slope"), ORDERS)
def test_weak_order(law, order, slope, dim):
    depths = (16, 32) if order < 3 else (8, 16)
    errors = weak_errors(law, dim, order, depths)
    assert abs(math.log2(errors[0] / errors[1]) - slope) < 0.3


@pytest.mark.parametrize(
    ("law", "order", "slope"),
    [
        (bridge.CentredBernoulli(0.8, 0.8), 1, 0.5),
        (bridge.Additive(0.7, "uniform"), 2, 1.0),
        (bridge.Additive(0.7, "rademacher"), 2, 1.0),
        (bridge.StochasticDepth(0.8), 3, 2.0),
    ],
)
def test_predicted_failures(law, order, slope):
    """Skewed or non-Gaussian noise holds the order down just as the theory says."""
    with pytest.warns(KolmoWarning, match=f"weakly of order {law.weak_order().order:g}"):
        errors = weak_errors(law, 1, order, (16, 32), strict=False)
    assert abs(math.log2(errors[0] / errors[1]) - slope) < 0.12


@pytest.mark.parametrize(("law", "order"), [(bridge.BranchDropout(0.5), 3), (bridge.Additive(0.7), 2)])
def test_weak_order_in_two_dimensions(law, order):
    errors = weak_errors(law, 2, order, (8, 16))
    assert abs(math.log2(errors[0] / errors[1]) - order) < 0.3


def test_correlated_additive_noise_in_two_dimensions():
    law = bridge.Additive([[0.5, 0.2], [0.1, 0.6]])
    errors = weak_errors(law, 2, 2, (8, 16))
    assert abs(math.log2(errors[0] / errors[1]) - 2) < 0.2


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize(
    "law",
    [bridge.StochasticDepth(0.7), pytest.param(bridge.Additive(0.5), marks=pytest.mark.slow)],
    ids=["natural", "diffusive"],
)
def test_smooth_depth_reaches_its_order(law, order):
    """Weights that follow a smooth curve in depth: the interpolated, time-dependent equation reaches the order."""
    errors = []
    for depth in (16, 32):
        curve = [(0.5 + 0.6 * math.sin(3 * k / depth), 0.6 - 0.8 * k / depth) for k in range(depth)]
        net = bridge.NoisyResNet([Wave(1, a, b) for a, b in curve], law)
        sde = bridge.modified_sde(net, order, depth="smooth")
        X, _ = generator(sde, 0.0, 1, 64)
        u = periodic_loss(torch.tensor(X)).numpy()
        steps = 2 * depth
        for i in reversed(range(steps)):  # u' = −L(t) u backwards, midpoint rule through the exponential
            u = expm(generator(sde, (i + 0.5) / steps, 1, 64)[1] / steps) @ u
        network = bridge.expected_loss(net, periodic_loss, torch.tensor(X[::4]), method="recursion", rtol=1e-7)
        errors.append(float(np.abs(network.mean.numpy() - u[::4]).max()))
    assert abs(math.log2(errors[0] / errors[1]) - order) < 0.25


def test_three_dimensional_linear_network_to_third_order():
    """For a linear branch the generator maps quadratics to quadratics: an exact reference for moments."""
    torch.manual_seed(1)
    A = 0.7 * torch.randn(3, 3, dtype=DOUBLE)
    x = torch.tensor([[0.5, -1.0, 0.8]], dtype=DOUBLE)
    errors = {1: [], 2: [], 3: []}
    for depth in (8, 16):
        layer = torch.nn.Linear(3, 3, bias=False, dtype=DOUBLE)
        layer.weight.data = A
        net = bridge.NoisyResNet([layer] * depth, bridge.Multiplicative(0.9, per="coordinate", scaling="natural"))
        E, S = torch.eye(3, dtype=DOUBLE) + A / depth, torch.outer(x[0], x[0])
        for _ in range(depth):
            S = E @ S @ E.T + 0.81 / depth**2 * torch.diag(torch.diag(A @ S @ A.T))
        exact = S[0, 1].item()
        for order in errors:
            sde = bridge.modified_sde(net, order)
            basis = torch.eye(3, dtype=DOUBLE)
            B = sde.drift(0.0, basis).detach().T  # linear: columns are images of the basis
            # Σ(x) is quadratic; the second moments M obey M' = BM + MBᵀ + E Σ(X), linear in M
            pairs = [(i, j) for i in range(3) for j in range(3)]

            def mean_covariance(M, sde=sde):
                values, vectors = torch.linalg.eigh(M)
                points = (vectors * values.abs().sqrt()).T
                return torch.einsum("k,kij->ij", values.sign(), sde.covariance(0.0, points).detach())

            columns = []
            for i, j in pairs:
                M = torch.zeros(3, 3, dtype=DOUBLE)
                M[i, j] += 0.5
                M[j, i] += 0.5
                columns.append((B @ M + M @ B.T + mean_covariance(M)).reshape(-1))
            M = (torch.matrix_exp(torch.stack(columns, 1)) @ torch.outer(x[0], x[0]).reshape(-1)).reshape(3, 3)
            errors[order].append(abs(M[0, 1].item() - exact))
    for order, (coarse, fine) in errors.items():
        assert abs(math.log2(coarse / fine) - order) < 0.3


def test_first_order_is_mean_and_covariance_per_unit_time():
    branches = [bridge.MLPBranch.create(2, 5, rng=k, dtype=DOUBLE) for k in range(4)]
    x = torch.randn(6, 2, dtype=DOUBLE)
    for law in (bridge.HiddenDropout(0.7), bridge.CentredBernoulli(0.5), bridge.Additive([0.2, 0.3])):
        net = bridge.NoisyResNet(branches, law, horizon=2.0)
        sde = bridge.modified_sde(net)
        assert sde.breakpoints == (0.5, 1.0, 1.5)
        for t, k in ((0.0, 0), (0.49, 0), (0.5, 1), (1.999, 3)):
            m = net.output(k, x)
            torch.testing.assert_close(sde.drift(t, x), law.mean(m) / 0.5)
            torch.testing.assert_close(sde.covariance(t, x), law.covariance(m, 0.5) / 0.5)


def test_third_order_covariance_is_the_published_one_up_to_higher_order():
    """C − ½(m·∇C + JC + CJᵀ) + ¼AAᵀ with A = m·∇G + JG: compared with derivatives taken by hand, one dimension."""
    net = bridge.NoisyResNet([Wave(1)] * 10, bridge.StochasticDepth(0.5))
    x, h = torch.linspace(-2, 2, 9, dtype=DOUBLE)[:, None], net.h
    f = 0.5 * torch.sin(x) + 0.6 * torch.cos(2 * x) + 0.4
    d1, d2 = 0.5 * torch.cos(x) - 1.2 * torch.sin(2 * x), -0.5 * torch.sin(x) - 2.4 * torch.cos(2 * x)
    variance, slope = f**2, 2 * f * d1  # Σ = f² for keep = ½
    drift = f - h / 2 * d1 * f + h**2 * (d2 * f * f / 12 + d1 * d1 * f / 3 - variance * d2 / 4)
    rate = h * variance - h**2 / 2 * (f * slope + 2 * d1 * variance) + h**3 / 4 * (f * d1 + d1 * f) ** 2
    sde = bridge.modified_sde(net, 3)
    torch.testing.assert_close(sde.drift(0.0, x).detach(), drift)
    torch.testing.assert_close(sde.covariance(0.0, x)[..., 0].detach(), rate)


@pytest.mark.parametrize("depth", ["layers", "smooth"])
@pytest.mark.parametrize(("law", "order"), [(bridge.Additive(0.3), 2), (bridge.StochasticDepth(0.5), 3)])
def test_coefficients_are_differentiable(law, order, depth):
    branches = [bridge.MLPBranch.create(2, 4, rng=0, dtype=DOUBLE) for _ in range(4)]
    net, x = bridge.NoisyResNet(branches, law), torch.randn(5, 2, dtype=DOUBLE)
    sde, weight = bridge.modified_sde(net, order, depth=depth), branches[1].W1

    def value():
        return sde.drift(0.3, x).sum() + sde.covariance(0.3, x).sum()

    value().backward()
    step = 1e-6
    with torch.no_grad():
        weight[0, 0] += step
        high = value()
        weight[0, 0] -= 2 * step
        low = value()
    assert weight.grad[0, 0].item() == pytest.approx(((high - low) / (2 * step)).item(), rel=1e-6)


class Opaque(torch.nn.Module):
    """An MLPBranch without its closed-form derivatives."""

    def __init__(self, branch):
        super().__init__()
        self.branch = branch

    def forward(self, x):
        return self.branch(x)


@pytest.mark.parametrize(
    ("law", "order"),
    [
        (bridge.Additive([[0.3, 0.1], [0.0, 0.2]]), 2),
        (bridge.Additive(0.3, scaling="natural"), 3),
        (bridge.StochasticDepth(0.5, rescale=False), 3),
        (bridge.BranchDropout(0.5), 3),
        (bridge.Multiplicative(0.4, scaling="natural"), 3),
        (bridge.CentredBernoulli(0.4), 1),
    ],
    ids=str,
)
def test_closed_form_derivatives_are_those_of_autodiff(law, order):
    branches, x = (
        [bridge.MLPBranch.create(2, 4, rng=k, dtype=DOUBLE) for k in range(3)],
        torch.randn(7, 2, dtype=DOUBLE),
    )
    closed = bridge.modified_sde(bridge.NoisyResNet(branches, law), order)
    opaque = bridge.modified_sde(bridge.NoisyResNet([Opaque(b) for b in branches], law), order)
    torch.testing.assert_close(closed.drift(0.4, x), opaque.drift(0.4, x))
    torch.testing.assert_close(closed.covariance(0.4, x), opaque.covariance(0.4, x))


def test_trainable_noise_strength():
    s = torch.tensor(0.3, dtype=DOUBLE, requires_grad=True)
    net = bridge.NoisyResNet([bridge.MLPBranch.create(2, 4, rng=0, dtype=DOUBLE)] * 2, bridge.Additive(s))
    bridge.modified_sde(net).covariance(0.0, torch.zeros(1, 2, dtype=DOUBLE)).sum().backward()
    assert s.grad.item() == pytest.approx(2 * 2 * 0.3)


def test_refusals_say_why():
    def net(law):
        return bridge.NoisyResNet([Wave(1)] * 4, law)

    for law, order, said in (
        (bridge.CentredBernoulli(0.5, 0.8), 1, "skewness"),
        (bridge.CentredBernoulli(0.5), 2, "state-dependent"),
        (bridge.Additive(0.3, "uniform"), 2, "kurtosis"),
        (bridge.StochasticDepth(0.8), 3, "skewness"),
        (bridge.Additive(0.3), 3, "known to order 2"),
        (bridge.Additive(0.3), 4, "1, 2 or 3"),
    ):
        with pytest.raises(InputError, match=said):
            bridge.modified_sde(net(law), order)
    with pytest.raises(InputError, match="'smooth'"):
        bridge.modified_sde(net(bridge.Additive(0.3)), depth="rough")
    mixed = bridge.NoisyResNet([Wave(1), torch.nn.Linear(1, 1, dtype=DOUBLE)], bridge.Additive(0.3))
    with pytest.raises(InputError, match="one kind"):
        bridge.modified_sde(mixed, depth="smooth")
    with pytest.raises(InputError, match="vector states"):
        bridge.modified_sde(bridge.NoisyResNet([torch.nn.Conv2d(1, 1, 1)], bridge.Additive(0.3), state_ndim=3))


def test_roughness_tells_smooth_weights_from_independent_ones():
    smooth = bridge.NoisyResNet([Wave(1, 0.5 + k / 32, 0.6) for k in range(32)], bridge.Additive(0.3))
    rough = [bridge.MLPBranch.create(2, 8, rng=k, dtype=DOUBLE) for k in range(32)]
    assert bridge.roughness(smooth) < 2
    assert 1.2 * 32 < bridge.roughness(bridge.NoisyResNet(rough, bridge.Additive(0.3))) < 1.6 * 32
    with pytest.warns(KolmoWarning, match="from layer to layer"):
        bridge.modified_sde(bridge.NoisyResNet(rough, bridge.Additive(0.3)), depth="smooth")


def linear_net(law, depth, a=-0.8):
    branch = torch.nn.Linear(1, 1, bias=False, dtype=DOUBLE)
    torch.nn.init.constant_(branch.weight, a)
    return bridge.NoisyResNet([branch] * depth, law)


def cubic_gap(law, depth, *, order, jumps):
    """Difference between network and equation in log E X³ of a linear flow: its law is a product of layers."""
    net = linear_net(law, depth)
    sde, one = bridge.modified_sde(net, order, jumps=jumps, strict=False), torch.ones(1, 1, dtype=DOUBLE)
    rate = 3 * sde.drift(0.0, one).item() + 3 * sde.covariance(0.0, one).item()
    if jumps:
        rates, moves = sde.jumps(0.0, one)
        rate += (rates * ((1 + moves[..., 0]) ** 3 - 1)).sum().item()
    layer = net.law(0)
    values, weights = layer.variable.nodes(5)
    output = layer.evaluate(net.branches[0], one, net.h)
    steps = layer.increment(output, torch.as_tensor(values)[:, None], net.h)[:, 0].detach().numpy()
    return abs(rate - math.log(weights @ (1 + steps) ** 3) * depth)


@pytest.mark.filterwarnings("ignore::kolmo.errors.KolmoWarning")
@pytest.mark.parametrize(
    ("law", "order", "diffusion", "jumps"),
    [
        (bridge.CentredBernoulli(0.8, 0.9), 1, 0.5, 1.0),
        (bridge.CentredBernoulli(0.8, 0.3), 1, 0.5, 1.0),
        (bridge.Multiplicative(0.5, "rademacher"), 1, 1.0, 1.0),
        (bridge.StochasticDepth(0.8), 2, 2.0, 2.0),
        (bridge.BranchDropout(0.6), 2, 2.0, 2.0),
        (bridge.LogNormal(0.4), 2, 2.0, 2.0),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, torch.nn.Module) else None,
)
def test_jumps_reach_orders_that_the_diffusion_misses(law, order, diffusion, jumps):
    for reading, predicted in ((False, diffusion), (True, jumps)):
        errors = [cubic_gap(law, depth, order=order, jumps=reading) for depth in (1024, 2048)]
        assert math.log2(errors[0] / errors[1]) == pytest.approx(predicted, abs=0.1)
        assert law.weak_order(reading).order >= min(order, predicted) - 0.01


@pytest.mark.parametrize(
    "law",
    [
        bridge.CentredBernoulli(0.7, 0.8),
        bridge.BranchDropout(0.6),
        bridge.StochasticDepth(0.7),
        bridge.Additive(0.4, "three-point"),
    ],
    ids=lambda law: type(law).__name__,
)
def test_jumps_have_the_moments_of_the_layer(law):
    net = bridge.NoisyResNet([Wave(2)] * 4, law)
    sde, x = bridge.modified_sde(net, jumps=True), torch.rand(5, 2, dtype=DOUBLE)
    rates, moves = sde.jumps(0.6 * net.horizon, x)
    layer = net.law(0)
    C = layer.covariance(layer.evaluate(net.branches[0], x, net.h), net.h)
    torch.testing.assert_close((rates[..., None] * moves).sum(-2), torch.zeros(5, 2, dtype=DOUBLE), atol=1e-12, rtol=0)
    torch.testing.assert_close(torch.einsum("nj,nja,njb->nab", rates, moves, moves), C / net.h)
    assert not sde.covariance(0.0, x).any()


def test_expected_loss_by_an_equation_with_jumps():
    """Rare large steps: at the same depth the equation with jumps is closer than the diffusion."""
    net = bridge.NoisyResNet([Wave(1)] * 4, bridge.CentredBernoulli(1.0, 0.95), horizon=1.0)
    x = torch.linspace(0, 6, 5, dtype=DOUBLE)[:, None]
    exact = bridge.expected_loss(net, periodic_loss, x, method="enumerate").mean
    options = {"method": "pde", "strict": False, "rtol": 1e-3}
    with pytest.warns(KolmoWarning):
        smooth = bridge.expected_loss(net, periodic_loss, x, **options).mean
    found = bridge.expected_loss(net, periodic_loss, x, jumps=True, **options)
    assert (found.mean - exact).abs().max() < 0.7 * (smooth - exact).abs().max()


def test_jumps_refused():
    gaussian = bridge.NoisyResNet([Wave(1)] * 2, bridge.Additive(0.3))
    many = bridge.NoisyResNet([bridge.MLPBranch.create(2, 16, rng=0)] * 2, bridge.HiddenDropout(0.5))
    dropping = bridge.NoisyResNet([Wave(1)] * 2, bridge.CentredBernoulli(0.3, 0.8))
    cases = [
        (gaussian, {}),
        (many, {}),
        (dropping, {"depth": "smooth"}),
        (dropping, {"order": 2}),
        (dropping, {"order": 3}),
    ]
    for net, options in cases:
        with pytest.raises(InputError):
            bridge.modified_sde(net, jumps=True, **options)


def test_gaussian_layers_stay_diffusions():
    laws = [bridge.CentredBernoulli(0.3, 0.8), bridge.Multiplicative(0.5, per="coordinate")]
    net = bridge.NoisyResNet([Wave(1)] * 2, laws)
    sde, x = bridge.modified_sde(net, jumps=True), torch.ones(1, 1, dtype=DOUBLE)
    (first, _), (second, _) = sde.jumps(0.1 * net.horizon, x), sde.jumps(0.9 * net.horizon, x)
    assert first.sum() > 0
    assert second.sum() == 0
    assert sde.covariance(0.1 * net.horizon, x) == 0
    assert sde.covariance(0.9 * net.horizon, x) > 0
