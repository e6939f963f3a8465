"""FlowClassifier: sampled, recursive and PDE losses agree, and the PDE's gradient is that of the expected loss."""

import pytest
import torch

import kolmo
from kolmo import bridge
from kolmo.errors import InputError

DOUBLE = torch.float64


def classifier(dtype=DOUBLE, law=None, depth=4):
    torch.manual_seed(0)
    branches = [bridge.MLPBranch.create(2, 5, rng=k, dtype=dtype) for k in range(depth)]
    net = bridge.NoisyResNet(branches, law or bridge.Additive(0.4))
    return bridge.FlowClassifier(torch.nn.Linear(6, 2, dtype=dtype), net, torch.nn.Linear(2, 3, dtype=dtype))


@pytest.fixture
def data():
    g = torch.Generator().manual_seed(1)
    return torch.randn(12, 6, generator=g, dtype=DOUBLE), torch.randint(0, 3, (12,), generator=g)


def test_class_losses_are_cross_entropies(data):
    model, y = classifier(), data[1]
    z = torch.randn(12, 2, dtype=DOUBLE)
    picked = model.class_losses(z)[torch.arange(12), y]
    torch.testing.assert_close(picked, torch.nn.functional.cross_entropy(model.head(z), y, reduction="none"))


def test_sampled_loss_estimates_the_recursion(data):
    model = classifier()
    exact = model.expected_loss(*data, method="recursion", rtol=1e-7).mean
    with torch.no_grad():
        draws = torch.stack([model.sampled_loss(*data, rng=s, reduction="none") for s in range(400)])
    assert torch.all((draws.mean(0) - exact).abs() < 4.5 * draws.std(0) / 20)
    model.eval()  # the noise of sampled_loss does not depend on the mode
    with torch.no_grad():
        assert torch.equal(model.sampled_loss(*data, rng=0, reduction="none"), draws[0])


def test_losses_without_noise_are_the_plain_cross_entropy(data):
    model, (x, y) = classifier(law=bridge.Additive(0.0)).eval(), data
    plain = torch.nn.functional.cross_entropy(model(x), y, reduction="none")
    torch.testing.assert_close(model.sampled_loss(x, y, reduction="none"), plain)
    torch.testing.assert_close(model.sampled_loss(x, y, draws=3), plain.mean())
    torch.testing.assert_close(model.expected_loss(x, y, method="recursion").mean, plain.detach())


def test_pde_loss_is_the_expected_loss_of_its_equation(data):
    model = classifier(law=bridge.Additive(0.4))
    network = model.expected_loss(*data, method="recursion", rtol=1e-7).mean
    error = {}
    for order in (1, 2):
        pde = model.pde_loss(*data, order=order, rtol=1e-4, reduction="none").detach()
        error[order] = (pde - network).abs().max().item()
    assert error[2] < 0.3 * error[1]
    assert error[1] < 0.1


def test_gradient_through_the_pde(data):
    model = classifier()
    plan = model.plan(data[0], rtol=1e-3)
    parameters = [model.encoder.weight, model.net.branches[1].W1, model.head.weight]
    loss = model.pde_loss(*data, discretization=plan)
    gradients = torch.autograd.grad(loss, parameters)
    generator = torch.Generator().manual_seed(0)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        direction = torch.randn(parameter.shape, generator=generator, dtype=DOUBLE)
        values = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                parameter += step * direction
                values.append(model.pde_loss(*data, discretization=plan).item())
                parameter -= step * direction
        assert (gradient * direction).sum().item() == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-4, abs=1e-8)


def test_float32_model_and_a_box(data):
    model = classifier(torch.float32)
    x, y = data[0].float(), data[1]
    loss = model.pde_loss(x, y, box=kolmo.Box([-8.0, -8.0], [8.0, 8.0]))
    loss.backward()
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in model.parameters())
    exact = model.expected_loss(x, y, method="recursion").mean.mean()
    assert abs(loss.item() - exact.item()) < 0.05


def test_bad_input_is_named(data):
    with pytest.raises(InputError, match="NoisyResNet"):
        bridge.FlowClassifier(torch.nn.Identity(), torch.nn.Identity(), torch.nn.Identity())
    with pytest.raises(InputError, match="reduction"):
        classifier().sampled_loss(*data, reduction="sum")
