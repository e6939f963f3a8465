"""Ways of sampling: all unbiased, standard errors that hold, and smaller ones where promised."""

import math

import pytest
import torch

import kolmo
from kolmo import bridge
from kolmo.errors import InputError

DOUBLE = torch.float64


def network(law, depth=4):
    return bridge.NoisyResNet([bridge.MLPBranch.create(2, 5, rng=k, dtype=DOUBLE) for k in range(depth)], law)


def loss(x):
    return torch.stack([torch.nn.functional.softplus(x[..., 0] - x[..., 1]), torch.cos(2 * x[..., 0])], -1)


X = torch.tensor([[0.2, -0.4], [1.0, 0.5], [-0.7, 0.1]], dtype=DOUBLE)
WAYS = {
    "independent": {},
    "common": {"common_noise": True},
    "antithetic": {"sampling": "antithetic"},
    "sobol": {"sampling": "sobol"},
    "control": {"control_variate": "pde"},
}


LAWS = [bridge.Additive(0.5), bridge.StochasticDepth(0.6), bridge.Multiplicative(0.6, per="batch")]


@pytest.mark.parametrize(
    ("way", "law"),
    [
        pytest.param(way, law, marks=pytest.mark.slow if way == "control" and law is not LAWS[0] else ())
        for way in WAYS
        for law in LAWS
    ],
    ids=str,
)
def test_every_way_is_unbiased_with_an_honest_standard_error(way, law):
    net = network(law)
    exact = bridge.expected_loss(net, loss, X, method="recursion", rtol=1e-8).mean
    for seed in (0, 1):
        est = bridge.expected_loss(net, loss, X, paths=2048, rng=seed, **WAYS[way])
        bound = 6.0 if way == "sobol" else 4.5  # sixteen replicates: a t distribution
        assert torch.all((est.mean - exact).abs() <= bound * est.standard_error + 1e-9)
        assert est.stats["paths"] == 2048


@pytest.mark.parametrize("way", ["independent", "antithetic"])
def test_standard_error_is_the_spread_over_seeds(way):
    net = network(bridge.StochasticDepth(0.6))
    runs = [bridge.expected_loss(net, loss, X, paths=100, rng=seed, **WAYS[way]) for seed in range(300)]
    spread = torch.stack([run.mean for run in runs]).std(0)
    said = torch.stack([run.standard_error for run in runs]).square().mean(0).sqrt()
    assert torch.all((spread / said - 1).abs() < 0.25)


def test_variance_reduction():
    net = network(bridge.Additive(0.3), depth=8)
    errors = {
        way: bridge.expected_loss(net, loss, X, paths=2048, rng=0, **WAYS[way]).standard_error.max().item()
        for way in WAYS
    }
    assert errors["antithetic"] < 0.8 * errors["independent"]
    assert errors["sobol"] < 0.3 * errors["independent"]
    assert errors["control"] < 0.2 * errors["independent"]


def test_antithetic_noise_cancels_in_linear_networks():
    net = bridge.NoisyResNet([torch.nn.Linear(2, 2, dtype=DOUBLE)] * 3, bridge.Additive(0.5))
    est = bridge.expected_loss(net, lambda z: z[..., 0], X, paths=10, rng=0, sampling="antithetic")
    with torch.no_grad():
        torch.testing.assert_close(est.mean, net.eval()(X)[:, 0])
    assert est.standard_error.max() < 1e-8


def test_common_noise_sharpens_differences():
    net = network(bridge.Additive(0.5))
    near = torch.tensor([[0.2, -0.4], [0.21, -0.4]], dtype=DOUBLE)

    def spread(**options):
        runs = [bridge.expected_loss(net, loss, near, paths=50, rng=s, **options).mean[:, 0] for s in range(40)]
        return torch.stack([run[1] - run[0] for run in runs]).std().item()

    assert spread(common_noise=True) < 0.1 * spread()


def test_noise_per_batch_is_drawn_anew_for_every_path():
    net = network(bridge.Multiplicative(0.6, per="batch"))
    est = bridge.expected_loss(net, loss, X, paths=200, rng=0)
    assert est.standard_error.min() > 0
    model = bridge.FlowClassifier(torch.nn.Identity(), net, torch.nn.Linear(2, 2, dtype=DOUBLE))
    y = torch.zeros(3, dtype=torch.int64)
    with torch.no_grad():
        one, many = (model.sampled_loss(X, y, draws=n, rng=0) for n in (1, 64))
    assert one != many


def test_a_given_solution_serves_as_control():
    net = network(bridge.Additive(0.4))
    problem = kolmo.KolmogorovProblem(bridge.modified_sde(net), loss, 1.0)
    times = [k * net.h for k in range(net.depth + 1)]
    solution = kolmo.solve(problem, at=X, rtol=1e-2, save=times)
    plain = bridge.expected_loss(net, loss, X, paths=500, rng=0)
    controlled = bridge.expected_loss(net, loss, X, paths=500, rng=0, control_variate=solution)
    assert controlled.standard_error.max() < 0.3 * plain.standard_error.max()
    with pytest.raises(InputError, match="layer time"):
        bridge.expected_loss(net, loss, X, control_variate=kolmo.solve(problem, at=X, rtol=1e-2))


def test_bad_input_is_named():
    net = network(bridge.Additive(0.5))
    with pytest.raises(InputError, match="'antithetic'"):
        bridge.expected_loss(net, loss, X, sampling="halton")
    with pytest.raises(InputError, match="even"):
        bridge.expected_loss(net, loss, X, sampling="antithetic", paths=5)
    with pytest.raises(InputError, match="32"):
        bridge.expected_loss(net, loss, X, sampling="sobol", paths=20)
    images = bridge.NoisyResNet([torch.nn.Identity()] * 4, bridge.BranchDropout(0.5), state_ndim=3)
    with pytest.raises(InputError, match="random numbers"):
        bridge.expected_loss(images, lambda z: z.sum((-1, -2, -3)), torch.zeros(1, 3, 80, 80), sampling="sobol")
    assert math.isfinite(bridge.expected_loss(net, loss, X, paths=32, sampling="sobol").mean.sum())
