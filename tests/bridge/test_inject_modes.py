"""Noise goes into the same branches in training mode, where a network's own code may add other things too."""

import numpy as np
import pytest
import torch
from torch import nn

from kolmo import bridge
from kolmo.errors import InputError


class Chain(nn.Module):
    """Residual layers whose code adds tensors of zeros at given places in training mode: (layer, before or after F)."""

    def __init__(self, weights, extras):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(3, 3, bias=False) for _ in weights)
        for layer, weight in zip(self.layers, weights, strict=True):
            layer.weight.data.copy_(weight)
        self.extras = extras

    def own(self, k, place, x):
        """x, with something of the network's own in training mode."""
        return x + torch.zeros_like(x) if self.training and (k, place) in self.extras else x

    def forward(self, x):
        for k, layer in enumerate(self.layers):
            x = self.own(k, "before", x)
            x = self.own(k, "after", x + self.own(k, "branch", torch.tanh(layer(x))))
        return x


def sampled(model, x, law):
    """What injected noise adds in training mode, with its draws fixed."""
    noise = bridge.inject(model, law, inputs=x[:4])
    with torch.no_grad():
        mean = model.eval()(x)
        torch.manual_seed(0)
        found = model.train()(x) - mean
    return list(noise.sites), found


@pytest.mark.parametrize("seed", range(12))
def test_additions_of_training_mode_alone_do_not_move_the_noise(seed):
    rng = np.random.default_rng(seed)
    depth, x = int(rng.integers(1, 5)), torch.as_tensor(rng.standard_normal((64, 3)), dtype=torch.float32)
    weights = [torch.as_tensor(rng.standard_normal((3, 3)), dtype=torch.float32) for _ in range(depth)]
    places = [(k, place) for k in range(depth) for place in ("before", "branch", "after")]
    extras = {places[j] for j in rng.choice(len(places), int(rng.integers(1, len(places) + 1)), replace=False)}
    law = bridge.Multiplicative(0.5, law="rademacher")
    plain, other = (sampled(Chain(weights, e), x, law) for e in (set(), extras))
    assert plain[0] == other[0]
    assert plain[1].abs().max() > 0.05
    torch.testing.assert_close(plain[1], other[1])


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_network_of_kolmo_without_noise_takes_it(depth):
    net = bridge.NoisyResNet([bridge.MLPBranch.create(2, 8, rng=k) for k in range(depth)], bridge.Additive(0.0))
    x = torch.zeros(4000, 2)
    _, found = sampled(net.train(), x, bridge.Additive(0.3))
    expected = 0.3 if depth == 1 else 0.25
    assert expected * 0.9 < float(found.std()) < 0.4


def test_branches_that_training_mode_adds_elsewhere_are_refused():
    class Fickle(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            x = x + torch.tanh(self.first(x))
            return x + torch.tanh(self.second(x)) if self.training else x

    with pytest.raises(InputError, match="in training mode 'the model' adds more"):
        bridge.inject(Fickle(), bridge.Additive(0.1), inputs=(torch.randn(4, 3),))
