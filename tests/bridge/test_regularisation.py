"""The small-noise expansion: closed forms, its remainder against exact losses, and what happens as the depth grows."""

import math

import pytest
import torch

from kolmo import bridge
from kolmo.errors import InputError, KolmoWarning

DOUBLE = torch.float64
X = torch.tensor([[0.2, -0.4], [1.0, 0.5], [-0.7, 0.1]], dtype=DOUBLE)
BRANCH = bridge.MLPBranch.create(2, 4, rng=1, dtype=DOUBLE)


def loss(x):
    return torch.stack([torch.nn.functional.softplus(x[..., 0] - x[..., 1]), torch.cos(2 * x[..., 0])], -1)


def parts(law, depth, branch=BRANCH, **options):
    branches = (
        [(branch, bridge.MLPBranch.create(2, 6, rng=2, dtype=DOUBLE))]
        if isinstance(law, bridge.ShakeShake)
        else [branch]
    )
    return bridge.regularisation(bridge.NoisyResNet(branches * depth, law), loss, X, **options)


def size(values):
    return values.abs().max().item()


NATURAL = {
    "dropout": bridge.BranchDropout(0.5),
    "stochastic depth": bridge.StochasticDepth(0.5),
    "not rescaled": bridge.StochasticDepth(0.8, rescale=False),
    "hidden dropout": bridge.HiddenDropout(0.7),
    "shake-shake": bridge.ShakeShake(),
    "natural additive": bridge.Additive(0.7, "uniform", "natural"),
}


@pytest.mark.parametrize("law", NATURAL.values(), ids=NATURAL)
def test_natural_noise_vanishes_with_depth_and_the_remainder_faster(law):
    coarse, fine = (parts(law, depth, method="recursion", rtol=1e-5) for depth in (8, 16))
    assert fine.diffusion.shape == (16, 3, 2)
    assert size(fine.diffusion.sum(0)) == pytest.approx(0.5 * size(coarse.diffusion.sum(0)), rel=0.15)
    assert fine.viscosity.mean() == pytest.approx(0.5 * coarse.viscosity.mean().item(), rel=0.1)
    assert size(fine.remainder) < 0.36 * size(coarse.remainder)
    assert size(fine.remainder) < 0.1 * size(fine.diffusion.sum(0))


def test_centred_bernoulli_noise_stays():
    found = [parts(bridge.CentredBernoulli(0.2), depth, method="recursion", rtol=1e-4) for depth in (8, 16, 32)]
    effects = [size(f.diffusion.sum(0)) for f in found]
    assert max(effects) < 1.1 * min(effects)
    assert max(f.viscosity.mean() for f in found) < 1.05 * min(f.viscosity.mean() for f in found)
    assert size(found[2].remainder) < 0.05 * effects[2]


@pytest.mark.parametrize("make", [bridge.Additive, bridge.CentredBernoulli], ids=["additive", "centred"])
def test_remainder_is_of_second_order_in_the_covariance(make):
    small, large = (parts(make(s), 8, method="recursion", rtol=1e-8) for s in (0.1, 0.2))
    assert size(large.diffusion) == pytest.approx(4 * size(small.diffusion), rel=1e-9)
    assert size(large.remainder) == pytest.approx(16 * size(small.remainder), rel=0.15)


def test_enumeration_and_drift_correction():
    law, found = bridge.StochasticDepth(0.9), {}
    for depth in (5, 10):
        found[depth] = parts(law, depth, method="enumerate")
        gap = found[depth].noise_free - found[depth].flow
        assert size(gap - found[depth].drift.sum(0)) < 0.3 * size(gap)
    errors = {depth: size(f.noise_free - f.flow - f.drift.sum(0)) for depth, f in found.items()}
    assert errors[10] < 0.3 * errors[5]
    net = bridge.NoisyResNet([BRANCH] * 5, law).eval()
    with torch.no_grad():
        torch.testing.assert_close(found[5].noise_free, loss(net(X)))
    assert size(found[10].remainder) < 0.36 * size(found[5].remainder)


def test_linear_networks_in_closed_form():
    """A square at the end of a linear chain: the expansion is all there is for additive noise."""
    a, s, depth = -0.7, 0.6, 6
    branch = torch.nn.Linear(1, 1, bias=False, dtype=DOUBLE)
    torch.nn.init.constant_(branch.weight, a)
    net = bridge.NoisyResNet([branch] * depth, bridge.Additive(s), horizon=1.5)
    x, h = torch.tensor([[0.8], [-2.0]], dtype=DOUBLE), 1.5 / depth
    found = bridge.regularisation(net, lambda z: z[..., 0] ** 2, x, method="recursion", rtol=1e-9)
    growth = (1 + h * a) ** 2
    for k in range(depth):
        torch.testing.assert_close(
            found.diffusion[k], torch.full((2,), s**2 * h * growth ** (depth - 1 - k), dtype=DOUBLE)
        )
    torch.testing.assert_close(found.flow, x[:, 0] ** 2 * math.exp(2 * a * 1.5), rtol=1e-4, atol=0.0)
    torch.testing.assert_close(found.viscosity, torch.full((depth, 2), 0.5 * s**2, dtype=DOUBLE))
    assert size(found.remainder) < 1e-7


def test_closed_derivatives_and_automatic_ones_agree():
    """The same branch without its jet: derivatives by forward-mode differentiation."""

    class Plain(torch.nn.Module):
        def forward(self, x):
            return BRANCH(x)

    for law in (bridge.CentredBernoulli(0.4), bridge.StochasticDepth(0.6, rescale=False)):
        closed, automatic = (parts(law, 4, branch) for branch in (BRANCH, Plain()))
        torch.testing.assert_close(closed.diffusion, automatic.diffusion)
        torch.testing.assert_close(closed.drift, automatic.drift)


def test_expansion_against_second_derivatives_of_the_whole_network():
    """Effect of layer k: half the second derivative of the later layers along every column of its noise matrix."""
    net = bridge.NoisyResNet(
        [bridge.MLPBranch.create(2, 5, rng=k, dtype=DOUBLE) for k in range(4)], bridge.HiddenDropout(0.6)
    )
    found, x = bridge.regularisation(net, loss, X), X
    with torch.no_grad():
        for k in range(4):
            G, after = net.factor(k, x), net.step(k, x)

            def later(z, k=k):
                for j in range(k + 1, 4):
                    z = net.step(j, z)
                return loss(z)

            step, total = 1e-3, torch.zeros(3, 2, dtype=DOUBLE)
            for column in G.unbind(-1):
                ends = later(after + step * column) + later(after - step * column)
                total += 0.5 * (ends - 2 * later(after)) / step**2
            torch.testing.assert_close(found.diffusion[k], total, rtol=1e-5, atol=1e-8)
            x = after


def classifier():
    torch.manual_seed(0)
    branches = [bridge.MLPBranch.create(2, 5, rng=k, dtype=DOUBLE) for k in range(4)]
    net = bridge.NoisyResNet(branches, bridge.CentredBernoulli(0.3))
    return bridge.FlowClassifier(torch.nn.Linear(6, 2, dtype=DOUBLE), net, torch.nn.Linear(2, 3, dtype=DOUBLE))


def test_regularised_loss_of_a_classifier_and_its_gradient():
    model, g = classifier(), torch.Generator().manual_seed(1)
    x, y = torch.randn(12, 6, generator=g, dtype=DOUBLE), torch.randint(0, 3, (12,), generator=g)
    exact = model.expected_loss(x, y, method="recursion", rtol=1e-7).mean
    regularised = model.regularised_loss(x, y, reduction="none")
    with torch.no_grad():
        plain = torch.nn.functional.cross_entropy(model.eval()(x), y, reduction="none")
    assert size(regularised - exact) < 0.1 * size(plain - exact)
    parameters = [model.encoder.weight, model.net.branches[1].W1, model.net.branches[2].W2, model.head.weight]
    gradients = torch.autograd.grad(model.regularised_loss(x, y), parameters)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        direction, values = torch.randn(parameter.shape, generator=g, dtype=DOUBLE), []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                parameter += step * direction
                values.append(model.regularised_loss(x, y).item())
                parameter -= step * direction
        assert (gradient * direction).sum().item() == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-6, abs=1e-9)


def test_regularised_loss_without_noise_is_the_cross_entropy():
    model = classifier()
    quiet = bridge.FlowClassifier(
        model.encoder, bridge.NoisyResNet(model.net.branches, bridge.Additive(0.0)), model.head
    ).eval()
    x, y = torch.randn(5, 6, dtype=DOUBLE), torch.arange(5) % 3
    plain = torch.nn.functional.cross_entropy(quiet(x), y)
    torch.testing.assert_close(quiet.regularised_loss(x, y), plain, rtol=1e-13, atol=0.0)


def test_bad_input_is_named():
    images = bridge.NoisyResNet([torch.nn.Identity()], bridge.Additive(0.1), state_ndim=3)
    with pytest.raises(InputError, match="state_ndim"):
        bridge.regularisation(images, loss, torch.zeros(1, 3, 4, 4))
    with pytest.raises(InputError, match="not their mean"):
        bridge.regularisation(bridge.NoisyResNet([BRANCH], bridge.Additive(0.1)), lambda z: z.mean(), X)
    with pytest.raises(InputError, match="exact loss"):
        _ = parts(bridge.Additive(0.1), 2).remainder
    with pytest.raises(InputError, match="floating"):
        bridge.regularisation(
            bridge.NoisyResNet([BRANCH], bridge.Additive(0.1)), loss, torch.zeros(1, 2, dtype=torch.int64)
        )


def test_plot_and_text():
    found = parts(bridge.Additive(0.2), 3, method="recursion")
    assert "remainder" in str(found)
    assert len(found.plot().patches) == 6


@pytest.mark.parametrize("kinked", ["branch", "loss"])
def test_kinks_are_told_and_differences_count_them(kinked):
    """ReLU after the first noise: what second derivatives leave out of the effect, differences have."""

    class Branch(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = torch.nn.Linear(2, 2, dtype=DOUBLE)

        def forward(self, x):
            return torch.relu(self.fc(x)) if kinked == "branch" else 0.5 * self.fc(x)

    def last(z):
        return z[..., 0].abs() if kinked == "loss" else z[..., 0]

    net = bridge.NoisyResNet([Branch(), Branch()], bridge.Additive(0.05))
    x = torch.randn(20_000, 2, dtype=DOUBLE)
    with pytest.warns(KolmoWarning, match=r"(Relu|Abs) in the branches or the loss.*law="):
        blind = bridge.regularisation(net, last, x).diffusion.sum(0).mean().item()
    found = bridge.regularisation(net, lambda f: last(f(x)).mean(), x[:2], law=bridge.Additive(0.05), probes=8).total
    assert abs(blind) < 1e-12
    assert found.value > 8 * found.standard_error


def test_smooth_networks_are_not_warned_of(recwarn):
    first_branch = torch.nn.Sequential(torch.nn.Linear(2, 2, dtype=DOUBLE), torch.nn.ReLU())
    for branches in ([BRANCH, BRANCH], [first_branch, BRANCH]):  # before the first noise nothing is differentiated
        bridge.regularisation(bridge.NoisyResNet(branches, bridge.Additive(0.1)), loss, X)
    assert not [one for one in recwarn if issubclass(one.category, KolmoWarning)]


def test_the_drift_correction_of_a_layer_is_its_integral():
    """Twice the layers: two of half the length have together half of it, up to the second power of the length."""
    law = bridge.Additive(0.1)
    drift = {depth: parts(law, depth).drift for depth in (2, 4, 8)}
    gaps = [size(drift[n] - 2.0 * drift[2 * n].unflatten(0, (n, 2)).sum(1)) / size(drift[n]) for n in (2, 4)]
    assert gaps[1] < 0.3 * gaps[0] < 0.1
