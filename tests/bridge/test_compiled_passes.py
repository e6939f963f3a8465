"""The compiled Monte Carlo: the chains of the layers themselves, exact laws, draws that depend on the seed alone."""

import itertools

import numpy as np
import pytest
import torch
from scipy import stats

from kolmo import bridge
from kolmo.bridge.compiled_passes import CompiledPasses
from kolmo.kernels import bspline, chains

DTYPES = (torch.float32, torch.float64)


def loss(x):
    return torch.stack([torch.cos(2 * x.sum(-1)), x[..., 0] ** 2], -1)


def network(law, d, dtype, depth=4):
    branches = [bridge.MLPBranch.create(d, 5, rng=k, dtype=dtype) for k in range(depth)]
    for branch in branches:
        branch.b2.data += 0.3
    return bridge.NoisyResNet(branches, law, horizon=1.5)


def start(d, dtype):
    return torch.randn(3, d, generator=torch.Generator().manual_seed(d), dtype=dtype)


def test_threefry_gives_the_published_words():
    """Known answers of the reference implementation for 20 rounds."""
    ones, digits = (
        np.full(4, 0xFFFFFFFF, np.uint32),
        np.array([0x13198A2E, 0x03707344, 0x243F6A88, 0x85A308D3], np.uint32),
    )
    assert [int(w) for w in chains.threefry(*ones)] == [0x1CB996FC, 0xBB002BE7]
    assert [int(w) for w in chains.threefry(*digits)] == [0xC4923A9C, 0x483DF7A0]


def drawn(law, key, r, n):
    zeta, words = np.empty((r, n), np.float32), np.empty((2, n), np.uint32)
    chains.draw(law, np.zeros(1, np.float32), np.zeros(0, np.uint32), key, 0, 3, n, words, zeta)
    return zeta


@pytest.mark.parametrize(
    ("law", "distribution"), [(chains.GAUSSIAN, stats.norm()), (chains.UNIFORM, stats.uniform(-(3**0.5), 2 * 3**0.5))]
)
def test_draws_have_their_law(law, distribution):
    zeta = drawn(law, np.array([5, 7], np.uint32), 3, 400_000)
    for row in zeta.astype(float):
        assert stats.kstest(row, distribution.cdf).pvalue > 1e-3
        assert abs(row.mean()) < 4.5 / 400_000**0.5
    for a, b in itertools.combinations(zeta.astype(float), 2):
        for power in (1, 2):
            assert abs(np.corrcoef(a**power, b**power)[0, 1]) < 4.5 / 400_000**0.5
    lag = np.corrcoef(zeta[0, 1:], zeta[0, :-1])[0, 1]
    assert abs(lag) < 4.5 / 400_000**0.5


def test_gaussian_tails():
    zeta = drawn(chains.GAUSSIAN, np.array([1, 2], np.uint32), 2, 4_000_000)
    for level in (3.0, 4.0):
        expected = 2 * stats.norm.sf(level) * zeta.size
        assert abs((np.abs(zeta) > level).sum() - expected) < 5 * expected**0.5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [1, 2, 3])
def test_mean_of_a_layer_is_the_branch(d, dtype):
    """A layer with next to no noise: the kernel's tanh to the precision of the numbers, far out too."""
    net = network(bridge.Additive(1e-30), d, dtype, depth=1)
    x = 30 * torch.randn(2000, d, generator=torch.Generator().manual_seed(0), dtype=dtype)
    final = next(CompiledPasses.of(net, x).run(x, 1, None, torch.Generator())).final[0]
    with torch.no_grad():
        exact = x + net.mean_increment(0, x)
    tolerance = 3e-6 if dtype == torch.float32 else 3e-14
    torch.testing.assert_close(final, exact, rtol=tolerance, atol=tolerance)


LAWS = [
    bridge.Additive(0.5),
    bridge.Additive([0.5, 0.0], "uniform"),
    bridge.Additive([[0.4, 0.0, 0.2], [0.1, 0.3, -0.1]], "three-point"),
    bridge.Multiplicative(0.7, "uniform"),
    bridge.Multiplicative(0.7, per="coordinate", scaling="natural"),
    bridge.StochasticDepth([1.0, 0.9, 0.6, 0.3], rescale=False),
    bridge.BranchDropout(0.6),
    bridge.CentredBernoulli(0.5, 0.7),
]


@pytest.mark.parametrize("controlled", [False, True], ids=["plain", "controlled"])
@pytest.mark.parametrize("law", LAWS, ids=str)
def test_every_law_is_unbiased_with_an_honest_standard_error(law, controlled):
    net, x = network(law, 2, torch.float32), start(2, torch.float32)
    assert CompiledPasses.of(net, x) is not None
    exact = bridge.expected_loss(net, loss, x, method="recursion", rtol=1e-5).mean
    est = bridge.expected_loss(
        net, loss, x, paths=2000 if controlled else 20_000, rng=3, control_variate="pde" if controlled else None
    )
    assert torch.all((est.mean - exact).abs() <= 4.5 * est.standard_error + 2e-5)


@pytest.mark.parametrize("d", [1, 3])
def test_other_dimensions(d):
    net, x = network(bridge.Additive(0.4), d, torch.float64), start(d, torch.float64)
    exact = bridge.expected_loss(net, loss, x, method="recursion", rtol=1e-4).mean
    plain, controlled = (
        bridge.expected_loss(net, loss, x, paths=2000, rng=0, control_variate=v) for v in (None, "pde")
    )
    for est in (plain, controlled):
        assert torch.all((est.mean - exact).abs() <= 4.5 * est.standard_error + 2e-4)
    assert torch.all(controlled.standard_error < {1: 0.3, 3: 0.6}[d] * plain.standard_error)


def test_draws_depend_on_the_seed_alone(monkeypatch):
    net, x = network(bridge.CentredBernoulli(0.5), 2, torch.float32, depth=3), start(2, torch.float32)
    runner = CompiledPasses.of(net, x)

    def final(seed=1):
        return torch.cat([part.final for part in runner.run(x, 1000, None, torch.Generator().manual_seed(seed))])

    whole = final()
    monkeypatch.setattr("kolmo.bridge.compiled_passes._PATHS", 600)
    monkeypatch.setattr("kolmo.bridge.compiled_passes._FOR_A_THREAD", 100)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert torch.equal(final(), whole)
    finally:
        torch.set_num_threads(before)
    assert not torch.equal(final(2), whole)


def test_what_the_kernel_cannot_do_goes_through_the_layers():
    x = start(2, torch.float64)
    for law in (bridge.HiddenDropout(0.5), bridge.Additive(0.0), bridge.Multiplicative(0.5, per="batch")):
        assert CompiledPasses.of(network(law, 2, torch.float64), x) is None
    assert CompiledPasses.of(network(bridge.Additive(0.3), 2, torch.float32), x) is None
    plain = bridge.NoisyResNet([torch.nn.Linear(2, 2).double()], bridge.Additive(0.3))
    assert CompiledPasses.of(plain, x) is None
    hooked = network(bridge.Additive(0.3), 2, torch.float64)
    hooked.branches[1].register_forward_hook(lambda module, given, out: 2 * out)
    assert CompiledPasses.of(hooked, x) is None


@pytest.mark.parametrize("d", [1, 2, 3])
def test_taylor_terms_of_a_polynomial(d):
    """A cubic spline holds a polynomial of degree 3 exactly, with its derivatives."""
    g = np.random.default_rng(d)
    c, line = g.normal(size=d), np.linspace(-1.0, 2.0, 9)
    nodes = np.stack(np.meshgrid(*[line] * d, indexing="ij"), -1)
    values = np.stack([(nodes @ c) ** 3, (nodes @ c) ** 2], -1)
    for axis in range(d):
        values = np.moveaxis(bspline.interpolation(np.moveaxis(values, axis, 0), 3), 0, axis)
    coefficients = np.ascontiguousarray(values.reshape(*values.shape[:-1], *(1,) * (3 - d), 2))
    x, v = g.uniform(-1, 2, (20, d)), g.normal(size=(20, d))
    G = g.normal(size=(20, d, d))
    C, out = G @ G.transpose(0, 2, 1), np.zeros((20, 2))
    bspline.taylor(coefficients, np.full(d, -1.0), np.full(d, 8 / 3), 3, x, v, C, out)
    s, move, spread = x @ c, v @ c, np.einsum("i,nij,j->n", c, C, c)
    np.testing.assert_allclose(out[:, 0], 3 * s**2 * move + 3 * s * (move**2 - spread), atol=1e-11 * np.abs(out).max())
    np.testing.assert_allclose(out[:, 1], 2 * s * move + move**2 - spread, atol=1e-11 * np.abs(out).max())
