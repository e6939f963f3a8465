"""NoisyResNet: modes, reproducible noise, precision, image states, averaging."""

import math

import numpy as np
import pytest
import torch

from kolmo import bridge
from kolmo.errors import InputError


def network(law, depth=4, dtype=torch.float32):
    return bridge.NoisyResNet([bridge.MLPBranch.create(2, 6, rng=k, dtype=dtype) for k in range(depth)], law)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_forward_keeps_dtype_and_is_reproducible(dtype):
    net, x = network(bridge.Additive(0.3), dtype=dtype).train(), torch.randn(10, 2, dtype=dtype)
    first = net(x, generator=torch.Generator().manual_seed(5))
    assert first.dtype == dtype
    assert torch.equal(first, net(x, generator=torch.Generator().manual_seed(5)))
    assert not torch.equal(first, net(x, generator=torch.Generator().manual_seed(6)))


def test_eval_is_the_mean_network():
    net, x = network(bridge.StochasticDepth(0.7, rescale=False)).eval(), torch.randn(10, 2)
    plain = x
    for branch in net.branches:
        plain = plain + 0.7 * (0.25 * branch(plain))
    torch.testing.assert_close(net(x), plain)


def test_gradients_reach_every_parameter():
    net = network(bridge.CentredBernoulli(0.5)).train()
    net(torch.randn(10, 2)).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in net.parameters())


def test_image_states_take_one_draw_per_image():
    branch = torch.nn.Conv2d(3, 3, 3, padding=1)
    net = bridge.NoisyResNet([branch], bridge.StochasticDepth(0.5), state_ndim=3).train()
    x = torch.randn(64, 3, 5, 5)
    moved = (net(x, generator=torch.Generator().manual_seed(0)) != x).flatten(1).any(1)
    assert 16 < int(moved.sum()) < 48
    with torch.no_grad():
        torch.testing.assert_close(net.eval()(x), x + branch(x))


def test_averaging_estimates_the_mean_and_its_error():
    torch.manual_seed(0)
    linear = torch.nn.Linear(2, 2, bias=False)
    net = bridge.NoisyResNet([linear] * 4, bridge.Additive(0.5))
    x = torch.tensor([[1.0, -1.0]])
    found = net.mc(x, 2000, rng=0)
    with torch.no_grad():
        exact = net.eval()(x)  # linear: the mean network is the network of the mean
        A, S = torch.eye(2) + 0.25 * linear.weight, torch.zeros(2, 2)
        for _ in range(4):
            S = A @ S @ A.T + 0.25 * 0.25 * torch.eye(2)
    assert torch.all((found.mean - exact).abs() < 4 * found.standard_error)
    np.testing.assert_allclose(found.standard_error[0], torch.diag(S).sqrt() / math.sqrt(2000), rtol=0.1)


def test_seeds_of_every_kind_and_nothing_else():
    net, x = network(bridge.Additive(0.3)), torch.zeros(1, 2)
    for rng in (3, np.random.default_rng(3), torch.Generator().manual_seed(3), None):
        assert net.mc(x, 3, rng=rng).mean.shape == (1, 2)
    with pytest.raises(InputError, match="rng"):
        net.mc(x, 3, rng="seed")
    with pytest.raises(InputError, match="at least 2"):
        net.mc(x, 1)
