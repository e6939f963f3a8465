"""Curvature against dense Hessians: eigenpairs, trace and its standard error, spectral density, noise draws."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional

from kolmo import bridge, landscape
from kolmo.errors import InputError

DOUBLE = torch.float64


def network(width=10):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, width), nn.Tanh(), nn.Linear(width, 4)).double()
    x, y = torch.randn(60, 5, dtype=DOUBLE), torch.randint(0, 4, (60,))
    return model, lambda f: functional.cross_entropy(2 * f(x), y)


def dense(loss, model):
    """Hessian by differentiating the flat weights."""
    names = [name for name, _ in model.named_parameters()]
    shapes = [p.shape for p in model.parameters()]
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])

    class Moved:
        def __init__(self, weights):
            self.weights = weights

        def __call__(self, x):
            return functional_call(model, self.weights, (x,))

    def value(vector):
        parts = torch.split(vector, [s.numel() for s in shapes])
        return loss(Moved({n: p.reshape(s) for n, p, s in zip(names, parts, shapes, strict=True)}))

    return torch.autograd.functional.hessian(value, flat).numpy()


def flat(vector):
    return torch.cat([part.flatten() for part in vector.values()]).numpy()


def test_leading_eigenpairs_of_a_network():
    model, loss = network()
    H = dense(loss, model)
    exact = np.linalg.eigvalsh(H)[::-1]
    curv = landscape.curvature(loss, model, top=5, rtol=1e-6, probes=0, density_probes=0)
    np.testing.assert_allclose(curv.eigenvalues, exact[:5], rtol=1e-8)
    assert curv.residuals.max() <= 1e-6 * exact[0]
    assert curv.products < len(H)
    for value, vector, residual in zip(curv.eigenvalues, curv.eigenvectors, curv.residuals, strict=True):
        v = flat(vector)
        assert np.linalg.norm(v) == pytest.approx(1.0, abs=1e-9)
        assert np.linalg.norm(H @ v - value * v) == pytest.approx(residual, rel=1e-3, abs=1e-9)


def test_trace_is_within_two_standard_errors_as_often_as_it_says():
    model, loss = network(5)
    exact = np.trace(dense(loss, model))
    found = [landscape.curvature(loss, model, top=2, seed=s, density_probes=0, rtol=0.1) for s in range(100)]
    inside = sum(abs(one.trace - exact) <= 2 * one.trace_standard_error for one in found)
    assert inside >= 90
    # And the error bar is no wider than it has to be.
    rms = np.sqrt(np.mean([(one.trace - exact) ** 2 for one in found]))
    assert np.mean([one.trace_standard_error for one in found]) == pytest.approx(rms, rel=0.3)


def test_deflation_narrows_the_trace():
    model, loss = network()
    plain, deflated = (
        np.mean(
            [landscape.curvature(loss, model, top=k, seed=s, density_probes=0).trace_standard_error for s in (0, 1)]
        )
        for k in (0, 8)
    )
    assert deflated < 0.8 * plain


def test_spectral_density_has_the_moments_and_the_negative_share_of_the_dense_spectrum():
    model, loss = network()
    values = np.linalg.eigvalsh(dense(loss, model))
    curv = landscape.curvature(loss, model, top=3, density_probes=12, density_steps=80)
    x, density, error = curv.density(width=0.02)
    step = x[1] - x[0]
    assert density.sum() * step == pytest.approx(1.0, abs=1e-3)
    assert (density * x).sum() * step == pytest.approx(values.mean(), rel=0.25)
    assert np.all(error >= 0)
    share, share_error = curv.fraction_below(-0.05)
    assert abs(share - np.mean(values < -0.05)) < 4 * share_error + 0.01
    assert curv.smallest == pytest.approx(values[0], rel=1e-3)


@pytest.mark.parametrize("size", [4, 30, 200])
def test_quadratics_with_repeated_eigenvalues(size):
    model = nn.Linear(size, 1, bias=False).double()
    scale = torch.zeros(size, dtype=DOUBLE)
    scale[:4] = torch.tensor([5.0, 5.0, 3.0, -7.0], dtype=DOUBLE)
    curv = landscape.curvature(lambda f: 0.5 * (scale * f.weight**2).sum() + f.weight.sum(), model, top=3)
    np.testing.assert_allclose(curv.eigenvalues[:3], [5.0, 5.0, 3.0] if size <= 48 else [5.0, 3.0, 0.0], atol=1e-8)
    assert abs(curv.trace - 6.0) <= 3 * curv.trace_standard_error + 1e-9
    assert curv.gradient_norm == pytest.approx((scale * model.weight.detach() + 1).norm().item())


def test_the_hessian_is_that_of_the_average_over_the_draws():
    torch.manual_seed(1)
    net = bridge.NoisyResNet(
        [bridge.MLPBranch.create(2, 4, rng=k, dtype=DOUBLE) for k in range(2)], bridge.Additive(0.5)
    )
    x = torch.randn(30, 2, dtype=DOUBLE)

    def loss(f):
        return f(x).square().sum(-1).sin().mean()

    def fixed(f):
        total = 0.0
        for j in range(3):
            torch.manual_seed(11 + j)
            total = total + loss(f) / 3
        return total

    H = dense(fixed, net)
    curv = landscape.curvature(loss, net, top=2, draws=3, seed=11, density_probes=0, probes=0, rtol=1e-8)
    np.testing.assert_allclose(curv.eigenvalues, np.linalg.eigvalsh(H)[::-1][:2], rtol=1e-8)
    assert curv.loss == pytest.approx(fixed(net).item())
    single = [landscape.curvature(loss, net, top=0, seed=11 + j, probes=0, density_probes=0).loss for j in range(3)]
    assert curv.loss == pytest.approx(np.mean(single))


def test_standard_error_over_draws_is_that_of_repeated_averages():
    torch.manual_seed(1)
    net = bridge.NoisyResNet([bridge.MLPBranch.create(2, 10, rng=0, dtype=DOUBLE)], bridge.Additive(0.5))
    x = torch.randn(10, 2, dtype=DOUBLE)
    options = {"top": 1, "draws": 6, "probes": 0, "density_probes": 0, "rtol": 1e-2}
    found = [
        landscape.curvature(lambda f: f(x).square().sum(-1).mean(), net, seed=1000 * s, **options) for s in range(12)
    ]
    spread = np.std([one.eigenvalues[0] for one in found], ddof=1)
    stated = np.mean([one.eigenvalue_standard_error[0] for one in found])
    assert stated == pytest.approx(spread, rel=0.5)


def test_few_products_for_the_top_five():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 40), nn.ReLU(), nn.Linear(40, 10))
    x, y = torch.randn(200, 20), torch.randint(0, 10, (200,))
    curv = landscape.curvature(
        lambda f: functional.cross_entropy(f(x), y), model, top=5, rtol=1e-2, probes=0, density_probes=0
    )
    assert curv.residuals.max() <= 1e-2 * curv.eigenvalues[0]
    assert curv.products <= 40


def test_files_and_bad_input(tmp_path):
    model, loss = network(4)
    curv = landscape.curvature(loss, model, top=2)
    curv.save(tmp_path / "c.npz")
    again = landscape.Curvature.load(tmp_path / "c.npz")
    np.testing.assert_array_equal(again.nodes, curv.nodes)
    assert again.trace == curv.trace
    with pytest.raises(InputError, match="loss"):
        landscape.curvature(lambda f: 1.0, model)
    with pytest.raises(InputError, match="depend"):
        landscape.curvature(lambda f: torch.zeros(()), model)
    with pytest.raises(InputError, match="probes"):
        landscape.curvature(loss, model, probes=1)
    with pytest.raises(InputError, match="rtol"):
        landscape.curvature(loss, model, rtol=0.0)
    with pytest.raises(InputError, match="top"):
        landscape.curvature(loss, model, top=1.5)
    for measure in (landscape.curvature, landscape.sharpness):
        with pytest.raises(InputError, match="finite"):
            measure(lambda f: loss(f) * torch.nan, model)


def test_no_eigenpairs_of_several_draws():
    model, loss = network(4)
    found = landscape.curvature(loss, model, top=0, draws=3, density_probes=0)
    assert found.eigenvalues.shape == (0,)
    assert np.isfinite(found.trace)


def test_whether_the_loss_is_random_is_asked_of_that_loss_alone():
    model = nn.Linear(3, 1)

    def loss(f):
        return {"loss": f.weight.square().sum(), "other": torch.rand(()) * f.weight.sum()}

    for name in (None, "loss"):
        found = landscape.curvature(loss, model, top=1, density_probes=0, name=name)
        assert found.eigenvalue_standard_error.tolist() == [0.0]
    other = landscape.curvature(loss, model, top=1, density_probes=0, name="other")
    assert np.isnan(other.eigenvalue_standard_error).all()


@pytest.mark.parametrize("draws", [1, 2])
def test_a_loss_may_use_gradients_within(draws):
    model, x = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)), torch.randn(5, 2, requires_grad=True)

    def loss(f):
        (slope,) = torch.autograd.grad(f(x).sum(), x, create_graph=True)
        return slope.square().sum()

    assert landscape.curvature(loss, model, top=1, probes=0, density_probes=0, draws=draws).eigenvalues[0] > 0
