"""weak_error tables: observed orders of network against PDE, and the predicted failures."""

import math

import numpy as np
import pytest
import torch

from kolmo import bridge
from kolmo.errors import InputError, KolmoWarning

DOUBLE = torch.float64


class Bend(torch.nn.Module):
    """A smooth bounded branch."""

    def __init__(self, dim):
        super().__init__()
        self.dim = dim

    def forward(self, x):
        return torch.tanh(1.5 * torch.roll(x, 1, -1) + 0.3) - 0.4 * x


def maker(law, dim):
    return lambda depth: bridge.NoisyResNet([Bend(dim)] * depth, law)


def loss(x):
    return torch.cos(x.sum(-1)) + 0.3 * x[..., 0] ** 2


def start(dim):
    return torch.tensor([[0.2, -0.4, 0.5][:dim], [0.9, 0.3, -0.6][:dim]], dtype=DOUBLE)


@pytest.mark.parametrize(
    ("law", "order", "expected"),
    [
        (bridge.Additive(0.5), 1, 1),
        pytest.param(bridge.Additive(0.5), 2, 2, marks=pytest.mark.slow),
        (bridge.StochasticDepth(0.5), 2, 2),
        pytest.param(bridge.StochasticDepth(0.5), 3, 3, marks=pytest.mark.slow),
        (bridge.CentredBernoulli(0.7), 1, 1),
    ],
)
def test_orders_in_one_dimension(law, order, expected):
    table = bridge.weak_error(maker(law, 1), [8, 16] if order < 3 else [12, 24], loss, start(1), order=order)
    assert abs(table.order - expected) < 0.25
    assert table.order_uncertainty < 0.1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dim", "law", "order"), [(2, bridge.Additive(0.5), 1), (2, bridge.Additive(0.5), 2), (3, bridge.Additive(0.5), 1)]
)
def test_orders_in_two_and_three_dimensions(dim, law, order):
    table = bridge.weak_error(maker(law, dim), [4, 8] if dim == 3 else [8, 16], loss, start(dim), order=order)
    assert abs(table.order - order) < 0.3


def test_predicted_failure_of_skewed_noise():
    with pytest.warns(KolmoWarning, match="skewness"):
        table = bridge.weak_error(maker(bridge.CentredBernoulli(0.8, 0.8), 1), [32, 64], loss, start(1), strict=False)
    assert abs(table.order - 0.5) < 0.12
    with pytest.raises(InputError, match="skewness"):
        bridge.weak_error(maker(bridge.CentredBernoulli(0.8, 0.8), 1), [32, 64], loss, start(1))


def test_sampled_networks_carry_their_standard_error():
    table = bridge.weak_error(
        maker(bridge.Additive(0.5), 1), [2, 4], loss, start(1), method="monte_carlo", rtol=1e-3, paths=2000, rng=0
    )
    exact = bridge.weak_error(maker(bridge.Additive(0.5), 1), [2, 4], loss, start(1), rtol=1e-6)
    assert np.all(np.abs(table.difference - exact.difference) <= 2.5 * table.uncertainty)
    assert np.all(table.uncertainty > 10 * exact.uncertainty)


def test_text_and_plot():
    table = bridge.weak_error(maker(bridge.Additive(0.5), 1), [4, 8], loss, start(1), rtol=1e-5)
    assert f"observed order {table.order:.2f}" in str(table)
    ax = table.plot(label="Gaussian")
    assert ax.get_xlabel() == "depth L"
    assert "Gaussian" in ax.get_legend().get_texts()[0].get_text()
    assert table.plot(ax=ax) is ax


def test_slopes_of_untrusted_differences_are_not_reported():
    net = torch.nn.Linear(1, 1, dtype=DOUBLE)
    torch.nn.init.zeros_(net.weight)
    torch.nn.init.zeros_(net.bias)  # pure Gaussian steps: the network is its SDE
    table = bridge.weak_error(
        lambda depth: bridge.NoisyResNet([net] * depth, bridge.Additive(0.5)), [2, 4], loss, start(1), rtol=1e-4
    )
    assert math.isnan(table.order)
    assert np.all(table.difference <= table.uncertainty)


def test_bad_input_is_named():
    make = maker(bridge.Additive(0.5), 1)
    with pytest.raises(InputError, match="increasing"):
        bridge.weak_error(make, [8, 4], loss, start(1))
    with pytest.raises(InputError, match="'rms'"):
        bridge.weak_error(make, [4, 8], loss, start(1), norm="l1")
    with pytest.raises(InputError, match="2 layers for depth 4"):
        bridge.weak_error(lambda depth: make(2), [4, 8], loss, start(1))


def test_drift_corrected_network():
    """Its mean is E X_L up to fourth order in the noise: halving the noise divides the error by sixteen."""
    x, errors = start(2), []
    for s in (0.2, 0.1):
        net = maker(bridge.Additive(s), 2)(4)
        exact = bridge.expected_loss(net, lambda z: z, x, method="recursion", rtol=1e-8, atol=1e-11).mean
        mean_net = (net.eval()(x) - exact).abs().max().item()
        errors.append((net.corrected(x).mean - exact).abs().max().item())
        assert errors[-1] < 0.3 * mean_net
    assert abs(math.log2(errors[0] / errors[1]) - 4) < 0.5


def test_moments_of_linear_networks_are_exact():
    layer = torch.nn.Linear(2, 2, dtype=DOUBLE)
    net = bridge.NoisyResNet([layer] * 3, bridge.Additive([[0.4, 0.0], [0.1, 0.3]]))
    x = start(2)
    found = net.corrected(x)
    second = bridge.expected_loss(net, lambda z: z[..., 0] * z[..., 1], x, method="recursion", rtol=1e-9).mean
    torch.testing.assert_close(found.mean, net.eval()(x))
    torch.testing.assert_close(found.covariance[:, 0, 1] + found.mean.prod(-1), second, rtol=1e-8, atol=1e-8)
