"""Expected loss: recursion, enumeration, sampling and closed forms agree."""

import json
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import kolmo
from kolmo import bridge
from kolmo.errors import InputError, ToleranceWarning

DOUBLE = torch.float64
CASES = {case["name"]: case for case in json.loads(Path(__file__).with_name("network_cases.json").read_text())["cases"]}
NONLINEAR = [name for name, case in CASES.items() if "weights" in case]
LOSSES = {
    "(x[0]-1.0)**2": lambda x: (x[..., 0] - 1) ** 2,
    "np.log1p(np.exp(-x[0]))": lambda x: torch.nn.functional.softplus(-x[..., 0]),
    "(x[0]-0.5)**2 + np.log1p(np.exp(-x[1]))": lambda x: (
        (x[..., 0] - 0.5) ** 2 + torch.nn.functional.softplus(-x[..., 1])
    ),
    "(x[0]-0.5)**2+(x[1]+0.2)**2": lambda x: (x[..., 0] - 0.5) ** 2 + (x[..., 1] + 0.2) ** 2,
    "np.log1p(np.exp(-(x[0]-x[1])))": lambda x: torch.nn.functional.softplus(x[..., 1] - x[..., 0]),
}


def law_of(injection):
    kind = injection["type"]
    return {
        "gaussian_additive": lambda: bridge.Additive(injection["sigma"]),
        "uniform_multiplicative": lambda: bridge.Multiplicative(
            injection["s"] / math.sqrt(3), "uniform", scaling="natural"
        ),
        "uniform_multiplicative_sqrt_h": lambda: bridge.Multiplicative(injection["s"], "uniform"),
        "stochastic_depth": lambda: bridge.StochasticDepth(injection["p"], injection["rescale"]),
        "dropout_branch": lambda: bridge.BranchDropout(injection["p"]),
        "dropout_hidden": lambda: bridge.HiddenDropout(injection["p"]),
        "shake_shake": bridge.ShakeShake,
    }[kind]()


def case_network(case):
    w = {name: [torch.tensor(v, dtype=DOUBLE) for v in layers] for name, layers in case["weights"].items()}
    branches = [bridge.MLPBranch(*layer) for layer in zip(w["W1"], w["b1"], w["W2"], strict=True)]
    if "V1" in w:
        second = [bridge.MLPBranch(*layer) for layer in zip(w["V1"], w["c1"], w["V2"], strict=True)]
        branches = list(zip(branches, second, strict=True))
    return bridge.NoisyResNet(branches, law_of(case["injection"]), horizon=case["T"])


def points(case):
    return torch.tensor(case["points"], dtype=DOUBLE)


@pytest.mark.parametrize("name", NONLINEAR)
@pytest.mark.parametrize("rtol", [1e-4, 1e-9])
def test_recursion_meets_its_tolerance_and_its_estimate(name, rtol):
    case = CASES[name]
    found = bridge.expected_loss(case_network(case), LOSSES[case["loss"]], points(case), method="recursion", rtol=rtol)
    error = (found.mean - torch.tensor(case["values"], dtype=DOUBLE)).abs()
    assert torch.all(found.error_estimate <= rtol * max(case["values"]) + 1e-9)
    assert torch.all(error <= 3 * found.error_estimate + 10 * case["accuracy"])


@pytest.mark.parametrize("name", [n for n in NONLINEAR if "depth" in n or "dropout" in n])
def test_enumeration_is_exact(name):
    case = CASES[name]
    found = bridge.expected_loss(case_network(case), LOSSES[case["loss"]], points(case), method="enumerate")
    np.testing.assert_allclose(found.mean, case["values"], rtol=1e-12)


@pytest.mark.parametrize("name", NONLINEAR)
def test_sampling_agrees_with_the_exact_value(name):
    case = CASES[name]
    found = bridge.expected_loss(case_network(case), LOSSES[case["loss"]], points(case), paths=20_000, rng=1)
    error = (found.mean - torch.tensor(case["values"], dtype=DOUBLE)).abs()
    assert torch.all(error <= 4 * found.standard_error)
    assert torch.all(found.standard_error > 0)


@pytest.mark.parametrize("name", [n for n in NONLINEAR if "kolmogorov_matched_values" in CASES[n]])
def test_first_order_equation_has_matched_moments(name):
    """The PDE with the mean and covariance of every layer, against an independent spectral solution of it."""
    case = CASES[name]
    net, loss = case_network(case), LOSSES[case["loss"]]
    found = bridge.expected_loss(net, loss, points(case), method="pde", order=1, rtol=1e-5)
    error = (found.mean - torch.tensor(case["kolmogorov_matched_values"], dtype=DOUBLE)).abs()
    assert torch.all(error <= 3e-5 * max(case["kolmogorov_matched_values"]) + 3 * case["kolmogorov_difference"])
    assert found.stats["status"] == "converged"


def test_pde_takes_columns_boxes_and_orders():
    net = bridge.NoisyResNet(
        [bridge.MLPBranch.create(1, 4, rng=k, dtype=DOUBLE) for k in range(4)], bridge.Additive(0.4)
    )
    x = torch.tensor([[0.1], [0.7]], dtype=DOUBLE)

    def two(z):
        return torch.stack([torch.cos(z[..., 0]), z[..., 0] ** 2], -1)

    exact = bridge.expected_loss(net, two, x, method="recursion", rtol=1e-8).mean
    gaps = [
        (bridge.expected_loss(net, two, x, method="pde", order=order, rtol=1e-5).mean - exact).abs().max()
        for order in (1, 2)
    ]
    assert gaps[1] < 0.3 * gaps[0]
    boxed = bridge.expected_loss(net, two, x, method="pde", rtol=1e-4, box=kolmo.Box([-8.0], [8.0]))
    assert (boxed.mean - exact).abs().max() < 1.5 * gaps[0]
    skewed = bridge.NoisyResNet(net.branches, bridge.CentredBernoulli(0.5, 0.8))
    with pytest.raises(InputError, match="skewness"):
        bridge.expected_loss(skewed, two, x, method="pde")
    with pytest.raises(InputError, match="box"):
        bridge.expected_loss(net, two, x, method="recursion", box=kolmo.Box([-8.0], [8.0]))


def linear(A):
    layer = torch.nn.Linear(len(A), len(A), bias=False, dtype=DOUBLE)
    layer.weight.data = torch.tensor(A, dtype=DOUBLE)
    return layer


LINEAR = {
    "linear_net_additive_square": lambda p: ([[p["a"]]], bridge.Additive(p["s"]), [[1.0]]),
    "linear_net_multiplicative_square": lambda p: ([[p["a"]]], bridge.Multiplicative(p["s"] / p["a"]), [[1.0]]),
    "linear_net_stochastic_depth": lambda p: ([[p["a"]]], bridge.StochasticDepth(p["p"]), [[1.0]]),
    "linear_net_2d_full_tensor": lambda p: (p["A"], bridge.Additive(np.linalg.cholesky(p["S"])), p["Q"]),
}


@pytest.mark.parametrize("name", LINEAR)
def test_linear_networks_at_every_depth_with_limit_and_leading_coefficient(name):
    case = CASES[name]
    A, law, Q = LINEAR[name](case["params"])
    Q = torch.tensor(Q, dtype=DOUBLE)
    found, steps = [], []
    for depth, values in case["values_by_depth"].items():
        net = bridge.NoisyResNet([linear(A)] * int(depth), law, horizon=case["T"])
        if int(depth) > 32:
            continue
        est = bridge.expected_loss(
            net, lambda x: torch.einsum("...i,ij,...j", x, Q, x), points(case), method="recursion", rtol=1e-10
        )
        np.testing.assert_allclose(est.mean, values, rtol=2e-9)
        found.append(est.mean.numpy())
        steps.append(case["T"] / int(depth))
    limit, coefficient = np.array(case["sde_limit"]), np.array(case["leading_coefficient"])
    # E_N = E + C h + O(h²): extrapolation over the depths gives both
    powers = np.linalg.solve(np.vander(steps, len(steps), increasing=True), np.array(found))
    np.testing.assert_allclose(powers[0], limit, atol=2e-4 * np.abs(limit).max())
    np.testing.assert_allclose(powers[1], coefficient, atol=0.03 * np.abs(coefficient).max())


def test_second_moments_in_three_dimensions():
    torch.manual_seed(0)
    A, h, depth, keep = 0.8 * torch.randn(3, 3, dtype=DOUBLE), 0.25, 4, 0.7
    net = bridge.NoisyResNet([linear(A.tolist())] * depth, bridge.BranchDropout(keep))
    x = torch.tensor([[0.5, -1.0, 0.3]], dtype=DOUBLE)
    S, E = torch.outer(x[0], x[0]), torch.eye(3, dtype=DOUBLE) + h * A
    for _ in range(depth):
        S = E @ S @ E.T + h**2 * (1 - keep) / keep * torch.diag(torch.diag(A @ S @ A.T))
    for method in ("enumerate", "recursion"):
        est = bridge.expected_loss(
            net, lambda z: torch.stack([z[..., 0] ** 2, z[..., 1] * z[..., 2]], -1), x, method=method, rtol=1e-9
        )
        torch.testing.assert_close(est.mean[0], torch.stack([S[0, 0], S[1, 2]]), rtol=1e-9, atol=1e-9)


def test_tied_stochastic_depth_is_a_binomial_clock():
    branch, depth, keep = bridge.MLPBranch.create(2, 5, rng=0, dtype=DOUBLE), 12, 0.7
    net = bridge.NoisyResNet([branch] * depth, bridge.StochasticDepth(keep, rescale=False), horizon=1.5)

    def loss(z):
        return torch.stack([torch.cos(z[..., 0] + z[..., 1]), z[..., 0] ** 2], -1)

    x = torch.tensor([[0.2, -0.5], [1.0, 1.0]], dtype=DOUBLE)
    exact, state = torch.zeros(2, 2, dtype=DOUBLE), x
    with torch.no_grad():
        for k in range(depth + 1):
            exact += math.comb(depth, k) * keep**k * (1 - keep) ** (depth - k) * loss(state)
            state = state + 1.5 / depth * branch(state)
    enumerated = bridge.expected_loss(net, loss, x, method="enumerate")
    assert enumerated.stats["outcomes"] == 2**depth
    torch.testing.assert_close(enumerated.mean, exact, rtol=1e-12, atol=1e-13)
    recursive = bridge.expected_loss(net, loss, x, method="recursion", rtol=1e-9)
    torch.testing.assert_close(recursive.mean, exact, rtol=3e-9, atol=3e-9)


@pytest.mark.parametrize("sigma", [0.4, [[0.4, 0.0, 0.0], [0.1, 0.3, 0.0], [0.0, 0.2, 0.5]]])
def test_recursion_in_three_dimensions_with_additive_noise(sigma):
    A, depth = [[-0.3, 0.4, 0.0], [-0.5, 0.2, 0.1], [0.0, 0.3, -0.6]], 3
    net = bridge.NoisyResNet([linear(A)] * depth, bridge.Additive(sigma))
    S = np.asarray(sigma) * np.eye(3) if np.ndim(sigma) == 0 else np.asarray(sigma)
    x, c = np.array([0.3, -0.2, 0.5]), np.array([0.7, -0.4, 0.9])
    mean, covariance, E = x, np.zeros((3, 3)), np.eye(3) + np.array(A) / depth
    for _ in range(depth):
        mean, covariance = E @ mean, E @ covariance @ E.T + S @ S.T / depth
    exact = math.cos(c @ mean) * math.exp(-0.5 * c @ covariance @ c)
    est = bridge.expected_loss(
        net, lambda z: torch.cos(z @ torch.tensor(c)), torch.tensor(x[None]), method="recursion", rtol=1e-5
    )
    assert abs(est.mean.item() - exact) <= min(3 * est.error_estimate.item(), 3e-5)


def test_recursion_of_a_network_without_noise_is_the_network():
    net = bridge.NoisyResNet(
        [bridge.MLPBranch.create(2, 5, rng=k, dtype=DOUBLE) for k in range(5)], bridge.Additive(0.0)
    )
    x = torch.randn(20, 2, dtype=DOUBLE)
    est = bridge.expected_loss(net, lambda z: z[..., 0].abs(), x, method="recursion")
    with torch.no_grad():
        assert torch.equal(est.mean, net.eval()(x)[:, 0].abs())


def test_layers_with_and_without_noise_mix():
    branches = [bridge.MLPBranch.create(1, 4, rng=k, dtype=DOUBLE) for k in range(6)]
    laws = [bridge.StochasticDepth(keep) for keep in (1.0, 0.5, 1.0, 0.8, 0.6, 1.0)]
    net, x = bridge.NoisyResNet(branches, laws), torch.tensor([[0.3], [2.0]], dtype=DOUBLE)
    found = [
        bridge.expected_loss(net, lambda z: torch.sin(2 * z[..., 0]), x, method=m, rtol=1e-9).mean
        for m in ("enumerate", "recursion")
    ]
    torch.testing.assert_close(found[0], found[1], rtol=3e-9, atol=3e-9)


@pytest.mark.parametrize(
    "loss",
    [lambda z: z[..., 0].abs(), lambda z: (z[..., 0] > 0.2).to(z), lambda z: torch.clamp(z[..., 0], max=0.5)],
    ids=["kink", "jump", "cap"],
)
def test_recursion_is_honest_about_kinks_and_jumps(loss):
    """One Gaussian layer after another on a linear branch: the final state is Gaussian, the exact value an integral."""
    net = bridge.NoisyResNet([linear([[-0.5]])] * 8, bridge.Additive(0.5))
    x = torch.tensor([[0.1], [0.6]], dtype=DOUBLE)
    shrink = 1 - 0.5 / 8
    sd = math.sqrt(sum(0.25 / 8 * shrink ** (2 * k) for k in range(8)))
    z = torch.linspace(-9, 9, 400_001, dtype=DOUBLE)
    weight = torch.exp(-0.5 * z**2) / math.sqrt(2 * math.pi) * (z[1] - z[0])
    exact = torch.stack([(weight * loss((shrink**8 * start + sd * z)[:, None])).sum() for start in x[:, 0]])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        est = bridge.expected_loss(net, loss, x, method="recursion", rtol=1e-6)
    error = (est.mean - exact).abs()
    assert torch.all(error <= 3 * est.error_estimate + 1e-9)
    assert est.stats["converged"] != any(issubclass(w.category, ToleranceWarning) for w in caught)


def test_float32_networks_and_losses():
    net32 = bridge.NoisyResNet([bridge.MLPBranch.create(2, 5, rng=k) for k in range(4)], bridge.Additive(0.3))
    head, x = torch.nn.Linear(2, 3), torch.randn(5, 2)
    est = bridge.expected_loss(net32, lambda z: torch.log_softmax(head(z), -1), x, method="recursion", rtol=1e-4)
    sampled = bridge.expected_loss(net32, lambda z: torch.log_softmax(head(z), -1), x, paths=20_000, rng=0)
    assert est.mean.shape == (5, 3)
    assert torch.all((est.mean - sampled.mean).abs() < 4.5 * sampled.standard_error)


def test_single_precision_networks_have_equations_in_double_precision():
    single = bridge.NoisyResNet([bridge.MLPBranch.create(2, 16, rng=k) for k in range(5)], bridge.Additive(0.3))
    double = bridge.NoisyResNet(
        [bridge.MLPBranch(*(p.double() for p in branch.parameters())) for branch in single.branches],
        bridge.Additive(0.3),
    )
    x = torch.randn(20, 2, generator=torch.Generator().manual_seed(0))
    drift = [bridge.modified_sde(net, 2).drift(0.5, x.double()) for net in (single, double)]
    torch.testing.assert_close(*drift, rtol=1e-13, atol=1e-13)
    drift[0].sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in single.branches[2].parameters())
    found = bridge.expected_loss(single, lambda z: torch.cos(z.double()).sum(-1), x, method="pde", rtol=1e-4)
    exact = bridge.expected_loss(single, lambda z: torch.cos(z.double()).sum(-1), x, method="recursion", rtol=1e-6)
    assert (found.mean - exact.mean).abs().max() < 0.05


def test_shapes_follow_the_loss():
    net = bridge.NoisyResNet([linear([[0.5]])] * 2, bridge.StochasticDepth(0.5))
    x = torch.randn(4, 3, 1, dtype=DOUBLE)
    for method in ("monte_carlo", "enumerate", "recursion"):
        assert bridge.expected_loss(net, lambda z: z[..., 0], x, method=method).mean.shape == (4, 3)
        assert bridge.expected_loss(net, lambda z: z.expand(*z.shape[:-1], 2), x, method=method).mean.shape == (4, 3, 2)


@pytest.mark.parametrize(
    ("method", "option"),
    [
        *[(m, o) for m in ("enumerate", "recursion", "pde") for o in ("paths", "sampling", "common_noise")],
        *[(m, "control_variate") for m in ("enumerate", "recursion", "pde")],
        *[(m, "max_outcomes") for m in ("monte_carlo", "recursion", "pde")],
        *[(m, "order") for m in ("monte_carlo", "enumerate", "recursion")],
        *[("monte_carlo", o) for o in ("rtol", "atol", "box")],
        *[(m, "box") for m in ("enumerate", "recursion")],
    ],
)
def test_options_that_a_method_does_not_use_are_refused(method, option):
    values = {"paths": 50, "sampling": "sobol", "common_noise": True, "control_variate": "pde", "max_outcomes": 9}
    values |= {"order": 2, "rtol": 1e-2, "atol": 1e-3, "box": kolmo.Box([-8.0], [8.0])}
    net = bridge.NoisyResNet([linear([[0.5]])] * 2, bridge.StochasticDepth(0.5))
    with pytest.raises(InputError, match=f"{option}: got .*{method!r}"):
        bridge.expected_loss(
            net, lambda z: z[..., 0], torch.zeros(1, 1, dtype=DOUBLE), method=method, **{option: values[option]}
        )


def test_options_of_an_analysis_that_computes_no_loss_are_refused():
    net = bridge.NoisyResNet([linear([[0.5]])] * 2, bridge.Additive(0.5))
    with pytest.raises(InputError, match="paths: got given without method="):
        bridge.regularisation(net, lambda z: z[..., 0], torch.zeros(1, 1, dtype=DOUBLE), paths=50)
    with pytest.raises(InputError, match="method: got 'recursion'"):
        bridge.regularisation(
            net, lambda z: z[..., 0], torch.zeros(1, 1, dtype=DOUBLE), law=bridge.Additive(0.1), method="recursion"
        )


def test_bad_input_is_named():
    net = bridge.NoisyResNet([linear([[0.5]])] * 30, bridge.StochasticDepth(0.5))
    x = torch.zeros(1, 1, dtype=DOUBLE)

    def loss(z):
        return z[..., 0]

    with pytest.raises(InputError, match=r"1\.074e\+09 outcomes"):
        bridge.expected_loss(net, loss, x, method="enumerate")
    with pytest.raises(InputError, match="discrete noise"):
        bridge.expected_loss(bridge.NoisyResNet([linear([[0.5]])], bridge.Additive(0.1)), loss, x, method="enumerate")
    with pytest.raises(InputError, match="'recursion'"):
        bridge.expected_loss(net, loss, x, method="exact")
    with pytest.raises(InputError, match="not their mean"):
        bridge.expected_loss(net, lambda z: z.mean(), torch.zeros(3, 1, dtype=DOUBLE))
    four = bridge.NoisyResNet([torch.nn.Linear(4, 4, dtype=DOUBLE)], bridge.Additive(0.1))
    for method in ("recursion", "pde"):
        with pytest.raises(InputError, match="dimension"):
            bridge.expected_loss(four, loss, torch.zeros(1, 4, dtype=DOUBLE), method=method)
    with pytest.raises(InputError, match="paths"):
        bridge.expected_loss(net, loss, x, paths=1)
    wide = [bridge.MLPBranch.create(2, 30, rng=k, dtype=DOUBLE) for k in range(3)]
    with pytest.raises(InputError, match="outcomes"):
        bridge.expected_loss(
            bridge.NoisyResNet(wide, bridge.HiddenDropout(0.5)),
            loss,
            torch.zeros(1, 2, dtype=DOUBLE),
            method="recursion",
        )
    wider = bridge.NoisyResNet([torch.nn.Linear(2, 3, dtype=DOUBLE)], bridge.Additive(0.1))
    for method in ("monte_carlo", "recursion", "pde"):
        with pytest.raises(InputError, match="shape"):
            bridge.expected_loss(wider, loss, torch.zeros(1, 2, dtype=DOUBLE), method=method)
    with pytest.raises(InputError, match="keep the shape"):
        bridge.regularisation(wider, loss, torch.zeros(1, 2, dtype=DOUBLE))
    normed = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    with pytest.raises(InputError, match="BatchNorm1d"):
        bridge.expected_loss(bridge.NoisyResNet([normed], bridge.Additive(0.1)).train(), loss, torch.zeros(1, 2))
