"""Noise laws: what they declare (mean, covariance, skewness, kurtosis) is what they draw."""

import itertools
import math

import numpy as np
import pytest
import torch

from kolmo import bridge
from kolmo.bridge.variables import VARIABLES, LogNormalFactor, ShakeDropFactor, bernoulli
from kolmo.errors import InputError

DOUBLE = torch.float64
LAWS = {
    "additive": bridge.Additive(0.3),
    "additive-vector": bridge.Additive([0.3, 0.1], law="uniform", scaling="natural"),
    "additive-matrix": bridge.Additive([[0.3, 0.1, 0.0], [0.0, 0.2, 0.4]], law="rademacher"),
    "multiplicative-sample": bridge.Multiplicative(0.5, law="three-point"),
    "multiplicative-coordinate": bridge.Multiplicative(0.5, per="coordinate", scaling="natural"),
    "depth": bridge.StochasticDepth(0.7),
    "depth-unscaled": bridge.StochasticDepth(0.7, rescale=False),
    "dropout": bridge.BranchDropout(0.6),
    "dropout-unscaled": bridge.BranchDropout(0.6, rescale=False),
    "hidden": bridge.HiddenDropout(0.8),
    "shake": bridge.ShakeShake(),
    "centred": bridge.CentredBernoulli(0.7),
    "centred-skewed": bridge.CentredBernoulli(0.7, keep=0.8),
    "log-normal": bridge.LogNormal(0.4),
    "shake-drop": bridge.ShakeDrop(0.7),
}
FORMULAS = {  # mean and covariance of the increment for f = (f1, f2), written out from the laws' definitions
    "depth": lambda f, h: (h * f, h**2 * 0.3 / 0.7 * np.outer(f, f)),
    "depth-unscaled": lambda f, h: (0.7 * h * f, h**2 * 0.21 * np.outer(f, f)),
    "dropout": lambda f, h: (h * f, h**2 * 0.4 / 0.6 * np.diag(f**2)),
    "dropout-unscaled": lambda f, h: (0.6 * h * f, h**2 * 0.24 * np.diag(f**2)),
    "centred": lambda f, h: (h * f, h * 0.49 * np.diag(f**2)),
    "centred-skewed": lambda f, h: (h * f, h * 0.49 * np.diag(f**2)),
    "additive": lambda f, h: (h * f, h * 0.09 * np.eye(2)),
    "additive-vector": lambda f, h: (h * f, h**2 * np.diag([0.09, 0.01])),
    "additive-matrix": lambda f, h: (h * f, h * np.array([[0.10, 0.02], [0.02, 0.20]])),
    "multiplicative-sample": lambda f, h: (h * f, h * 0.25 * np.outer(f, f)),
    "multiplicative-coordinate": lambda f, h: (h * f, h**2 * 0.25 * np.diag(f**2)),
    "log-normal": lambda f, h: (h * f, h**2 * math.expm1(0.16) * np.outer(f, f)),
    "shake-drop": lambda f, h: (0.7 * h * f, h**2 * (0.7 + 0.1 - 0.49) * np.outer(f, f)),
}


def branch_for(law):
    def make(seed):
        return bridge.MLPBranch.create(2, 3, rng=seed, dtype=DOUBLE)

    if isinstance(law, bridge.ShakeShake):
        return torch.nn.ModuleList([make(1), make(2)])
    return make(1)


@pytest.mark.parametrize("name", FORMULAS)
def test_mean_and_covariance_are_those_of_the_definition(name):
    law, h, x = LAWS[name], 0.25, torch.tensor([[0.4, -0.8]], dtype=DOUBLE)
    branch = branch_for(law)
    m = law.evaluate(branch, x, h)
    mean, covariance = FORMULAS[name](branch(x)[0].detach().numpy(), h)
    np.testing.assert_allclose(law.mean(m).detach()[0], mean, rtol=1e-13)
    np.testing.assert_allclose(law.covariance(m, h).detach()[0], covariance, rtol=1e-12, atol=1e-16)


def test_hidden_dropout_covariance():
    law, branch, x, h = LAWS["hidden"], branch_for(LAWS["hidden"]), torch.tensor([[0.4, -0.8]], dtype=DOUBLE), 0.5
    W2, units = (
        branch.W2.detach().numpy(),
        np.tanh(branch.W1.detach().numpy() @ x[0].numpy() + branch.b1.detach().numpy()),
    )
    expected = h**2 * 0.2 / 0.8 * W2 @ np.diag(units**2) @ W2.T
    np.testing.assert_allclose(law.covariance(law.evaluate(branch, x, h), h).detach()[0], expected, rtol=1e-12)


def test_a_constant_in_the_read_out_is_no_noise():
    """b2 is added after the noise: mean it must have, covariance and fluctuations know nothing of it."""
    plain, x, law, h = branch_for(LAWS["hidden"]), torch.tensor([[0.4, -0.8]], dtype=DOUBLE), LAWS["hidden"], 0.5
    moved = bridge.MLPBranch(plain.W1, plain.b1, plain.W2, torch.tensor([3.0, -7.0], dtype=DOUBLE))
    one, other = (law.evaluate(branch, x, h) for branch in (plain, moved))
    np.testing.assert_allclose(law.covariance(other, h).detach(), law.covariance(one, h).detach(), rtol=1e-12)
    np.testing.assert_allclose((law.mean(other) - law.mean(one)).detach()[0], [1.5, -3.5], rtol=1e-12)


def test_shake_shake_covariance():
    law, pair, x, h = LAWS["shake"], branch_for(LAWS["shake"]), torch.tensor([[0.4, -0.8]], dtype=DOUBLE), 0.5
    f, g = (b(x)[0].detach().numpy() for b in pair)
    m = law.evaluate(pair, x, h)
    np.testing.assert_allclose(law.mean(m).detach()[0], h * (f + g) / 2, rtol=1e-13)
    np.testing.assert_allclose(law.covariance(m, h).detach()[0], h**2 / 12 * np.outer(f - g, f - g), rtol=1e-11)


@pytest.mark.parametrize("name", LAWS)
def test_draws_have_the_declared_moments(name):
    law, h, n = LAWS[name], 0.25, 40_000
    x = torch.tensor([[0.4, -0.8]], dtype=DOUBLE)
    with torch.no_grad():
        m = law.evaluate(branch_for(law), x.expand(n, 2), h)
        draws = law.sample(m, h, generator=torch.Generator().manual_seed(3))
        mean, covariance = law.mean(m)[0], law.covariance(m, h)[0]
    centred = draws - mean
    assert torch.all((draws.mean(0) - mean).abs() <= 4 * draws.std(0) / math.sqrt(n) + 1e-14)
    for i, j in itertools.product(range(2), repeat=2):
        moment = centred[:, i] * centred[:, j]
        assert abs(moment.mean() - covariance[i, j]) <= 4 * moment.std() / math.sqrt(n) + 1e-14


@pytest.mark.parametrize("name", [n for n in LAWS if n != "hidden"])
def test_increment_is_mean_plus_fluctuation(name):
    law, h = LAWS[name], 0.25
    x = torch.randn(50, 2, dtype=DOUBLE)
    m = law.evaluate(branch_for(law), x, h)
    zeta = law.variable.sample(law.noise_shape(m, 1), DOUBLE, x.device, torch.Generator().manual_seed(0))
    torch.testing.assert_close(law.increment(m, zeta, h), law.mean(m) + law.fluctuation(m, zeta, h))
    G, flat = law.factor(m, h), zeta.expand(50, zeta.shape[-1])
    torch.testing.assert_close(law.fluctuation(m, zeta, h), torch.einsum("ndr,nr->nd", G, flat))


@pytest.mark.parametrize(
    "variable",
    [*VARIABLES.values(), bernoulli(0.8), bernoulli(0.5), LogNormalFactor(0.1), ShakeDropFactor(0.7)],
    ids=lambda v: v.name,
)
def test_variables_are_standardised_and_declare_their_moments(variable):
    z, w = variable.nodes(12)
    moments = [float(np.sum(w * z**p)) for p in range(5)]
    np.testing.assert_allclose(moments[:3], [1, 0, 1], atol=1e-12)
    assert moments[3] == pytest.approx(variable.skewness, abs=1e-12)
    assert moments[4] - 3 == pytest.approx(variable.excess_kurtosis, abs=1e-12)
    u = (torch.arange(100_000, dtype=DOUBLE) + 0.5) / 100_000
    quantiles = variable.from_uniform(u)
    assert torch.all(quantiles[1:] >= quantiles[:-1])
    sampled = [float((quantiles**p).mean()) for p in range(5)]
    np.testing.assert_allclose(sampled, moments, atol=2e-3)
    drawn = variable.sample((100_000,), DOUBLE, u.device, torch.Generator().manual_seed(0))
    assert abs(float((drawn**3).mean()) - variable.skewness) < 0.06
    for rate in (-3.0, -1.0, 0.5, 2.0):  # the variance proxy bounds the moment generating function
        assert np.sum(w * np.exp(rate * z)) <= math.exp(variable.variance_proxy * rate**2 / 2) * (1 + 1e-9)


def test_no_noise_is_bit_for_bit_the_mean_network():
    branches = [bridge.MLPBranch.create(2, 5, rng=k) for k in range(4)]
    x = torch.randn(30, 2)
    silent = [
        bridge.Additive(0.0),
        bridge.Additive([0.0, 0.0]),
        bridge.Multiplicative(0.0),
        bridge.Multiplicative(0.0, per="coordinate", scaling="natural"),
        bridge.StochasticDepth(1.0),
        bridge.StochasticDepth(1.0, rescale=False),
        bridge.BranchDropout(1.0),
        bridge.HiddenDropout(1.0),
        bridge.LogNormal(0.0),
        bridge.ShakeDrop(1.0),
        bridge.CentredBernoulli(0.0),
        bridge.CentredBernoulli(0.5, keep=1.0),
    ]
    plain = x
    for branch in branches:
        plain = plain + 0.25 * branch(plain)
    for law in silent:
        net = bridge.NoisyResNet(branches, law)
        assert law.noiseless
        assert torch.equal(net.train()(x), plain)
        assert torch.equal(net.eval()(x), plain)


def test_dropped_branch_is_exactly_skipped():
    net = bridge.NoisyResNet([torch.nn.Linear(2, 2)], bridge.StochasticDepth(0.3)).train()
    x = torch.randn(200, 2)
    unchanged = (net(x, generator=torch.Generator().manual_seed(0)) == x).all(-1)
    assert 0.55 < unchanged.double().mean() < 0.85


def test_per_batch_shares_one_draw():
    m = torch.ones(6, 2)
    for per, distinct in (("batch", 1), ("sample", 6), ("coordinate", 12)):
        draws = bridge.Multiplicative(1.0, per=per).sample(m, 0.1, generator=torch.Generator().manual_seed(0))
        assert len(draws.unique()) == distinct
    torch.manual_seed(0)
    kept = torch.cat([bridge.StochasticDepth(0.7, per="batch").sample(m, 0.1).unique() for _ in range(2000)])
    assert len(kept) == 2000
    assert abs((kept > 0).double().mean().item() - 0.7) < 4 * math.sqrt(0.21 / 2000)


def test_linear_decay_and_schedules():
    keep = bridge.linear_decay(0.5, 4)
    net = bridge.NoisyResNet([torch.nn.Linear(1, 1) for _ in range(4)], bridge.StochasticDepth(keep))
    assert [net.law(k).keep for k in range(4)] == [0.875, 0.75, 0.625, 0.5]
    with pytest.raises(InputError, match="4 values"):
        bridge.NoisyResNet([torch.nn.Linear(1, 1)], bridge.StochasticDepth(keep))


@pytest.mark.parametrize(
    ("law", "order"),
    [
        (bridge.StochasticDepth(0.5), 3),
        (bridge.StochasticDepth(0.8), 2),
        (bridge.Additive(0.3, scaling="natural"), 3),
        (bridge.Additive(0.3), 2),
        (bridge.Additive(0.3, "three-point"), 2),
        (bridge.Additive(0.3, "uniform"), 1),
        (bridge.Multiplicative(0.3), 1),
        (bridge.CentredBernoulli(0.5), 1),
        (bridge.CentredBernoulli(0.5, 0.8), 0.5),
        (bridge.ShakeShake(), 3),
        (bridge.LogNormal(0.3), 2),
        (bridge.ShakeDrop(0.7), 2),
    ],
)
def test_weak_orders(law, order):
    assert law.weak_order().order == order


def test_user_defined_law_of_a_few_lines():
    class Jitter(bridge.NoiseLaw):
        variable = bridge.variable("uniform")

        def fluctuation(self, m, zeta, h):
            return 0.5 * m * zeta

    branches = [bridge.MLPBranch.create(2, 4, rng=k, dtype=DOUBLE) for k in range(3)]
    x = torch.tensor([[0.1, 0.4]], dtype=DOUBLE)

    def loss(z):
        return (z**2).sum(-1)

    mine = bridge.expected_loss(bridge.NoisyResNet(branches, Jitter()), loss, x, method="recursion", rtol=1e-9)
    known = bridge.Multiplicative(0.5, law="uniform", scaling="natural")
    theirs = bridge.expected_loss(bridge.NoisyResNet(branches, known), loss, x, method="recursion", rtol=1e-9)
    torch.testing.assert_close(mine.mean, theirs.mean)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: bridge.StochasticDepth(0.0), "keep"),
        (lambda: bridge.BranchDropout(1.2), "keep"),
        (lambda: bridge.HiddenDropout([0.5, -0.1]), "keep"),
        (lambda: bridge.Additive(0.1, law="cauchy"), "'gaussian'"),
        (lambda: bridge.Additive(float("nan")), "finite"),
        (lambda: bridge.Additive(0.1, scaling="big"), "natural"),
        (lambda: bridge.Multiplicative(0.1, per="pixel"), "coordinate"),
        (lambda: bridge.StochasticDepth(0.5, per="coordinate"), "BranchDropout"),
        (lambda: bridge.LogNormal(-0.1), "sigma"),
        (lambda: bridge.ShakeDrop(0.0), "keep"),
        (lambda: bridge.NoisyResNet([torch.nn.Linear(1, 1)], bridge.ShakeShake()), "pair"),
        (lambda: bridge.NoisyResNet([(torch.nn.Linear(1, 1),) * 2], bridge.Additive(0.1)), "pair"),
        (lambda: bridge.NoisyResNet([], bridge.Additive(0.1)), "branches"),
        (lambda: bridge.NoisyResNet([torch.nn.Linear(1, 1)], bridge.Additive(0.1), horizon=0.0), "horizon"),
        (lambda: bridge.NoisyResNet([torch.nn.Linear(1, 1)], [bridge.Additive(0.1)] * 2), "1 layers"),
        (lambda: bridge.NoisyResNet([torch.nn.Linear(1, 1)], 0.3), "noise law"),
        (lambda: bridge.NoisyResNet([torch.nn.Linear(2, 2)], bridge.HiddenDropout(0.5))(torch.ones(1, 2)), "readout"),
        (lambda: bridge.NoisyResNet([torch.nn.Linear(2, 3)], bridge.Additive(0.5))(torch.ones(1, 2)), "keep the shape"),
        (lambda: bridge.MLPBranch(torch.ones(3, 2), torch.ones(3), torch.ones(3, 2)), "width"),
    ],
)
def test_bad_input_is_named(make, said):
    with pytest.raises(InputError, match=said):
        make()


@pytest.mark.parametrize("law", [bridge.Additive, bridge.Multiplicative, bridge.CentredBernoulli])
def test_vectors_of_one_number_are_numbers(law):
    """Sharded training takes no scalars for parameters."""
    m, x = torch.randn(5, 3), torch.randn(4, 2, dtype=torch.float64)
    branches = [bridge.MLPBranch.create(2, 8, rng=k, dtype=torch.float64) for k in range(3)]
    found = []
    for s in (0.3, torch.tensor([0.3])):
        torch.manual_seed(1)
        parts = [law(s).sample(m, 0.1), law(s).covariance(m, 0.1)]
        net = bridge.NoisyResNet(branches, law(s))
        parts.append(bridge.expected_loss(net, lambda z: z[..., 0] ** 2, x, method="pde", rtol=1e-2).mean)
        found.append(parts)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
    with pytest.raises(InputError, match="array of shape"):
        law(torch.ones(2, 2, 2) if law is bridge.Additive else torch.ones(2))
