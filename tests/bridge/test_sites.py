"""Residual additions are found by what a pass does: in networks of fourteen shapes, whatever their parts are called."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from kolmo import bridge
from kolmo.errors import InputError

sys.path.insert(0, str(Path(__file__).parent))
from architectures import ARCHITECTURES, GPT, DropPath, PostActivation, Staged, UNet, images, vectors


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_addition_is_found_and_no_other(name):
    make, inputs, names, calls, axis = ARCHITECTURES[name]
    model, x = make().train(), inputs(2)
    state, seed = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    found = bridge.sites(model, x)
    assert found.names == names
    assert [site.calls for site in found] == [calls] * len(names)
    assert found.h == 1 / (calls * len(names)) == 1 / found.depth
    assert [site.batch_axis for site in found] == [axis] * len(names)
    assert sorted(k for site in found for k in site.order) == list(range(found.depth))
    assert all(0 < site.ratio < 10 for site in found)
    assert model.training
    assert torch.equal(torch.get_rng_state(), seed)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_sizes_of_branches_against_their_shortcuts():
    class Block(nn.Module):
        def forward(self, x):
            return x + 0.25 * x @ torch.eye(4)

    found = bridge.sites(nn.Sequential(Block(), Block()), torch.randn(3, 4))
    assert [site.ratio for site in found] == pytest.approx([0.25, 0.25])
    assert [site.name for site in found] == ["0:0", "1:0"]


def test_table_tells_projections_and_what_each_site_is():
    text = str(bridge.sites(Staged(PostActivation), images(2, 8)))
    assert "layer2.0.bn2" in text
    assert "projection" in text.splitlines()[3]  # a shortcut that subsamples and pads
    assert text.splitlines()[1].endswith("identity")
    assert text.endswith("depth 4, h = T/4")


@pytest.mark.parametrize(
    ("join", "told"), [("concatenate", "used again later"), ("add", "inside|used again later|past")]
)
def test_u_shaped_networks_are_refused_with_the_reason(join, told):
    with pytest.raises(InputError, match=told):
        bridge.sites(UNet(join), images(2, 8))
    with pytest.raises(InputError, match=told):
        bridge.inject(UNet(join), bridge.StochasticDepth(0.9))


def test_dense_and_plain_networks_are_refused_with_the_reason():
    class Dense(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x):
            return torch.cat([x, self.conv(x)], 1)

    with pytest.raises(InputError, match="concatenates"):
        bridge.sites(Dense(), images(2, 8))
    with pytest.raises(InputError, match="without residual additions"):
        bridge.sites(nn.Sequential(nn.Linear(2, 2), nn.Tanh()), torch.randn(2, 2))


def test_a_branch_inside_a_branch_is_refused_and_the_outer_one_can_be_chosen():
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x):
            return x + self.fc(x)

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.last = Inner(), nn.Linear(8, 8)

        def forward(self, x):
            return x + self.last(torch.tanh(self.inner(x)))

    model, x = nn.Sequential(Outer(), Outer()), vectors(2)
    with pytest.raises(InputError, match=r"'0.inner.fc' inside the branch of '0.last'"):
        bridge.sites(model, x)
    noise = bridge.inject(model, bridge.StochasticDepth(0.9), where="*.last", inputs=[x])
    assert noise.sites == ["0.last", "1.last"]
    assert noise.h == 0.5


def test_additions_that_are_no_residuals_are_left_alone():
    class Others(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            x = self.a(x) + self.b(x)  # two linear ways
            x = torch.tanh(self.a(x)) + torch.relu(self.b(x))  # two nonlinear ways
            x = torch.cos(x) * x + torch.sin(x) * x.flip(-1)  # a rotation
            x = x + torch.arange(8.0)  # a constant
            return x + self.c(torch.relu(x))

    assert bridge.sites(Others(), vectors(2)).names == ["c"]


def test_samples_are_told_from_tokens():
    """One sample alone, tokens that mix, a given axis, and a model that mixes everything."""
    encoder = ARCHITECTURES["encoder (T, B, D)"][0]()
    assert [s.batch_axis for s in bridge.sites(encoder, vectors(5, 1))] == [1] * 4
    assert [s.batch_axis for s in bridge.sites(GPT(), torch.randint(11, (1, 6)))] == [0] * 4
    assert bridge.sites(encoder, vectors(5, 3), batch_axis=1)[0].batch_axis == 1

    class Mixing(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x):
            return x + self.fc(x - x.mean())

    assert bridge.sites(Mixing(), vectors(4))[0].batch_axis is None


class Odd(nn.Module):
    """A block whose branch is an odd function of the normalised state: a mirrored sample has a branch of equal size."""

    def __init__(self, start=None):
        super().__init__()
        self.norm = nn.LayerNorm(8, elementwise_affine=False)
        self.mix, self.fc = nn.Linear(8, 8, bias=False), nn.Linear(8, 8)
        if start is not None:
            nn.init.constant_(self.fc.weight, start)
            nn.init.constant_(self.fc.bias, 0.0)

    def forward(self, x):
        values = torch.tanh(self.mix(self.norm(x)))
        return x + self.fc(values - values.mean(0, keepdim=True))  # tokens in front mix


@pytest.mark.parametrize("start", [None, 0.0])
@pytest.mark.parametrize("seed", range(4))
def test_samples_are_told_where_branches_are_odd_or_zero_yet(start, seed):
    """Zero: what blocks begin with that are to be identities first, and mix nothing yet."""
    torch.manual_seed(seed)
    model = nn.Sequential(Odd(start), Odd(start))
    state = {k: v.clone() for k, v in model.state_dict().items()}
    for x in (vectors(5, 3), vectors(5, 2), torch.ones(5, 2, 8)):
        assert [s.batch_axis for s in bridge.sites(model, x)] == [1, 1]
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("size", [1e-3, 1e-6])
def test_samples_are_told_where_the_input_hardly_matters(size):
    class Biased(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.bias = nn.Linear(8, 8), nn.Parameter(torch.randn(8))

        def forward(self, x):
            return x + (self.bias + size * torch.tanh(self.fc(x)) @ torch.eye(8))

    model = nn.Sequential(Biased(), Biased())
    assert [s.batch_axis for s in bridge.sites(model, vectors(6, 2))] == [0, 0]


class _Activated(nn.BatchNorm2d):
    """Normalisation and activation in one, as libraries have it."""

    def forward(self, x):
        return torch.relu(super().forward(x))


class _Counted(nn.Module):
    """Counts its passes in training mode, and renews a running mean."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.register_buffer("passes", torch.zeros((), dtype=torch.long))
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x):
        out = self.conv(x)
        if self.training:
            self.passes += 1
            self.mean = 0.9 * self.mean + 0.1 * out.detach().mean((0, 2, 3))
        return x + out


def test_statistics_of_layers_that_are_not_torchs_own_are_left_alone():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), _Activated(4), _Counted(), _Counted())
    x, state = images(3, 8), {k: v.clone() for k, v in model.state_dict().items()}
    held = [b for _, b in model.named_buffers()]
    for use in (lambda: bridge.sites(model, x), lambda: bridge.inject(model, bridge.StochasticDepth(0.5)).remove()):
        use()
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
        assert all(b is old for (_, b), old in zip(model.named_buffers(), held, strict=True))


def test_names_patterns_and_rows_choose():
    model, x = Staged(PostActivation), images(2, 8)
    law, rows = bridge.StochasticDepth(0.5), bridge.sites(model, x)

    def chosen(where):
        with bridge.inject(model, law, where) as noise:
            return noise.sites, noise.h

    assert chosen(rows[1:3]) == (["layer1.1.bn2", "layer2.0.bn2"], 0.5)
    assert chosen(rows[0]) == (["layer1.0.bn2"], 1.0)
    assert chosen("layer1.*.bn2") == chosen(["layer1.1.bn2", "layer1.0.bn2"])
    assert chosen("**.bn2")[0] == chosen(None)[0] == rows.names
    assert chosen("layer?.0.bn2") == (["layer1.0.bn2", "layer2.0.bn2"], 0.5)
    with pytest.raises(InputError, match="does not cross dots"):
        chosen("layer*.bn2")
    with pytest.raises(InputError, match=r"'layer1.0.conv2'.*layer1.0.bn2"):
        chosen("layer1.0.conv2")  # before the last normalisation
    with pytest.raises(InputError, match=r"'layer1.0'.*layer1.0.bn2"):
        chosen("layer1.*")


def test_a_module_before_a_gate_is_refused_by_name():
    model = ARCHITECTURES["squeeze"][0]()
    with pytest.raises(InputError, match=r"'layer1.0.bn2'.*layer1.0:0"):
        bridge.inject(model, bridge.StochasticDepth(0.5), where="**.bn2", inputs=[images(2, 8)])
    assert bridge.inject(model, bridge.StochasticDepth(0.5), where="layer1.*:0").sites == ["layer1.0:0", "layer1.1:0"]


def test_a_module_that_is_used_elsewhere_too_does_not_carry_the_noise():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.dropout = nn.Linear(8, 8), nn.Dropout(0.3)

        def forward(self, x):
            return x + self.dropout(self.fc(torch.tanh(self.dropout(x))))

    assert bridge.sites(nn.Sequential(Block(), Block()), vectors(2)).names == ["0:0", "1:0"]


def test_inputs_that_cannot_be_guessed_are_asked_for():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x, scale):
            return x + scale * self.fc(x)

    with pytest.raises(InputError, match=r"inputs=\(x,\)"):
        bridge.inject(Two(), bridge.StochasticDepth(0.5))
    noise = bridge.inject(Two(), bridge.StochasticDepth(0.5), inputs=(vectors(3), torch.ones(8)))
    assert noise.sites == [":0"]
    with pytest.raises(InputError, match="inside"):
        bridge.inject(nn.Sequential(Two(), nn.Sequential(Two())), bridge.StochasticDepth(0.5), where=["1", "1.0"])


def test_drop_path_by_name_is_no_condition():
    assert bridge.sites(nn.Sequential(_Renamed(), _Renamed()), vectors(2, 4)).names == ["0.whatever", "1.whatever"]


class _Renamed(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.whatever = nn.Linear(8, 8), DropPath(0.4)

    def forward(self, x):
        return self.whatever(self.fc(x)) + x
