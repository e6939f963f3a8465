"""inject: noise in other people's residual networks, at the right places, of the right size, and gone afterwards."""

import math

import pytest
import torch
from torch import nn

from kolmo import bridge
from kolmo.errors import InputError


class BasicBlock(nn.Module):
    """CIFAR-style block: relu(shortcut(x) + bn(conv(relu(bn(conv(x))))))."""

    def __init__(self, channels, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Identity() if stride == 1 else nn.Conv2d(channels, channels, 1, stride)

    def forward(self, x):
        out = torch.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return torch.relu(out)


class CifarNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.layer1 = nn.Sequential(BasicBlock(4), BasicBlock(4))
        self.layer2 = nn.Sequential(BasicBlock(4, 2), BasicBlock(4))
        self.head = nn.Linear(4, 10)

    def forward(self, x):
        return self.head(self.layer2(self.layer1(self.stem(x))).mean((2, 3)))


class DropPath(nn.Module):
    """As in timm: drops whole samples of its input in training mode."""

    def __init__(self, drop_prob):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x):
        if not self.training:
            return x
        keep = 1 - self.drop_prob
        return x * torch.bernoulli(torch.full((len(x), 1, 1), keep)) / keep


class TimmBlock(nn.Module):
    def __init__(self, dim, drop):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim), nn.Linear(dim, dim)
        self.drop_path1 = DropPath(drop) if drop else nn.Identity()
        self.norm2, self.mlp = nn.LayerNorm(dim), nn.Linear(dim, dim)
        self.drop_path2 = DropPath(drop) if drop else nn.Identity()

    def forward(self, x):
        x = x + self.drop_path1(self.attn(self.norm1(x)))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


class Line(nn.Module):
    """Linear blocks, for exact moments."""

    def __init__(self, depth):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(3, 3, bias=False, dtype=torch.float64) for _ in range(depth))

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return x


def images(n=4):
    return torch.randn(n, 3, 8, 8)


def test_sites_of_a_cifar_network_are_found():
    noise = bridge.inject(CifarNet(), bridge.StochasticDepth(0.5))
    assert noise.sites == ["layer1.0.bn2", "layer1.1.bn2", "layer2.0.bn2", "layer2.1.bn2"]
    assert noise.h == 0.25


def test_sites_can_be_named_or_chosen():
    by_name = bridge.inject(CifarNet(), bridge.StochasticDepth(0.5), where="layer1.*.bn2")
    assert by_name.sites == ["layer1.0.bn2", "layer1.1.bn2"]
    chosen = bridge.inject(CifarNet(), bridge.StochasticDepth(0.5), where=lambda name, m: name.endswith("1.bn2"))
    assert chosen.sites == ["layer1.1.bn2", "layer2.1.bn2"]


def test_evaluation_mode_is_untouched_and_removal_restores_the_model():
    model, x = CifarNet().eval(), images()
    before, state = model(x), {k: v.clone() for k, v in model.state_dict().items()}
    with bridge.inject(model, bridge.CentredBernoulli(0.8)) as noise:
        assert torch.equal(model(x), before)
        assert noise.mc(x, 4, rng=0).standard_error.max() > 0
        assert not model.training
    assert torch.equal(model(x), before)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    with noise.noisy(0):
        assert torch.equal(model(x), before)


def test_no_noise_is_bit_for_bit_the_model():
    model, x = CifarNet().eval(), images()
    before = model(x)
    for law in (
        bridge.StochasticDepth(1.0),
        bridge.Additive(0.0),
        bridge.CentredBernoulli(0.0),
        bridge.BranchDropout(1.0),
    ):
        with bridge.inject(model, law) as noise, noise.noisy(0):
            assert torch.equal(model(x), before)


def test_training_mode_batchnorm_is_refused_or_frozen():
    model, x = CifarNet().train(), images()
    with bridge.inject(model, bridge.StochasticDepth(0.5)), pytest.raises(InputError, match=r"training mode.*freeze"):
        model(x)
    with pytest.raises(InputError, match=r"fresh statistics.*layer1.0.bn1"):
        bridge.inject(model, bridge.StochasticDepth(0.5), batchnorm="freeze")
    model(x)
    model.layer2[1].bn1.eval()  # by its owner, who gets it back like that
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    modes = [m.training for m in norms]
    with bridge.inject(model, bridge.StochasticDepth(0.5), batchnorm="freeze"):
        mean = model.layer1[0].bn1.running_mean.clone()
        model(x)
        assert torch.equal(model.layer1[0].bn1.running_mean, mean)
    assert [m.training for m in norms] == modes
    model(x)
    assert not torch.equal(model.layer1[0].bn1.running_mean, mean)
    normless = Line(2).train()
    with bridge.inject(normless, bridge.StochasticDepth(0.5), where="blocks.*"):
        normless(torch.ones(1, 3, dtype=torch.float64))


def test_modes_are_put_back_after_an_exception():
    model = CifarNet().train()
    model.layer1.eval()
    noise = bridge.inject(model, bridge.StochasticDepth(0.5))
    with pytest.raises(ZeroDivisionError), noise.noisy(0):
        1 / 0  # noqa: B018
    assert model.training
    assert not model.layer1.training
    assert model.layer2.training


@pytest.mark.parametrize("drop", [0.0, 0.6])
def test_drop_path_blocks_get_our_law_instead_of_theirs(drop):
    model, x = TimmBlock(5, drop), torch.randn(400, 2, 5)
    noise = bridge.inject(model, bridge.StochasticDepth(0.9))
    assert noise.sites == ["drop_path1", "drop_path2"]
    noise.generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        out = model.train()(x)
    untouched = (out == x).all(-1).all(-1).double().mean().item()
    assert untouched < 0.04  # both dropped: 0.01; with drop_prob 0.6 of their own it would be 0.4


@pytest.mark.parametrize(
    "law", [bridge.Additive(0.5), bridge.CentredBernoulli(0.6), bridge.StochasticDepth(0.7)], ids=str
)
def test_injected_noise_is_that_of_the_noisy_residual_network(law):
    """The same branches as a NoisyResNet with h f = branch output: equal first and second moments."""
    depth = 3
    model, x = Line(depth), torch.tensor([[0.5, -1.0, 0.8]], dtype=torch.float64)

    class Scaled(nn.Module):
        def __init__(self, block):
            super().__init__()
            self.block = block

        def forward(self, z):
            return self.block(z) * depth

    net = bridge.NoisyResNet([Scaled(b) for b in model.blocks], law)

    def moments(z):
        return torch.stack([z[..., 0], z[..., 1], z[..., 0] * z[..., 1], z[..., 2] ** 2], -1)

    if law.constant:
        exact = bridge.expected_loss(net, moments, x, method="recursion", rtol=1e-6).mean
    else:
        exact = bridge.expected_loss(net, moments, x, method="enumerate").mean
    with bridge.inject(model, law, where="blocks.*") as noise:
        found = noise.mc(x.expand(200, 3), 100, rng=0, loss=lambda z: moments(z).mean(0, keepdim=True))
    assert torch.all((found.mean - exact).abs() < 4.5 * found.standard_error)


def test_unscaled_stochastic_depth_takes_its_mean_in_evaluation():
    model, x = Line(2).eval(), torch.ones(1, 3, dtype=torch.float64)
    with bridge.inject(model, bridge.StochasticDepth(0.5, rescale=False), where="blocks.*"), torch.no_grad():
        halved = model(x)
    expected = x
    with torch.no_grad():
        for block in model.blocks:
            expected = expected + 0.5 * block(expected)
    torch.testing.assert_close(halved, expected)


def test_schedules_follow_the_blocks():
    model = Line(4)
    x = torch.randn(4000, 3, dtype=torch.float64)
    law = bridge.StochasticDepth([1.0, 1.0, 1.0, 0.3])
    with bridge.inject(model, law, where="blocks.*") as noise, noise.noisy(0), torch.no_grad():
        out = model(x)
    plain = x
    with torch.no_grad():
        for block in model.blocks[:3]:
            plain = plain + block(plain)
    share = (out == plain).all(-1).double().mean().item()
    assert abs(share - 0.7) < 4 * math.sqrt(0.21 / 4000)


def test_bad_input_is_named():
    with pytest.raises(InputError, match="law"):
        bridge.inject(CifarNet(), bridge.HiddenDropout(0.5))
    with pytest.raises(InputError, match="residual branch"):
        bridge.inject(nn.Sequential(nn.Linear(1, 1)), bridge.StochasticDepth(0.5))
    with pytest.raises(InputError, match="stem"):
        bridge.inject(CifarNet(), bridge.StochasticDepth(0.5), where="block*")
    with pytest.raises(InputError, match=r"needed 'refuse', 'train' or 'freeze'"):
        bridge.inject(CifarNet(), bridge.StochasticDepth(0.5), batchnorm="ignore")
