"""Readings of noise: closed forms, both sides of the border between diffusions and jumps, and kinks."""

import math
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from kolmo import bridge
from kolmo.errors import InputError

sys.path.insert(0, str(Path(__file__).parent))
from architectures import ARCHITECTURES, PostActivation, Staged, images, vectors

DOUBLE = torch.float64


class Quarter(nn.Module):
    """x + a x, in the code of the block."""

    def __init__(self, a):
        super().__init__()
        self.a = a

    def forward(self, x):
        return x + self.a * (x @ torch.eye(x.shape[-1], dtype=x.dtype))


def square(x):
    return lambda f: f(x).square().sum(-1).mean()


@pytest.mark.parametrize(
    ("law", "covariance"),
    [
        (bridge.StochasticDepth(0.9), lambda m, h: m.square().sum(-1) * 0.1 / 0.9),
        (bridge.BranchDropout(0.9), lambda m, h: m.square().sum(-1) * 0.1 / 0.9),
        (bridge.Multiplicative(0.2, "uniform"), lambda m, h: m.square().sum(-1) * 0.04 / h),
        (bridge.Additive(0.2), lambda m, h: torch.full(m.shape[:-1], 3 * 0.04 * h, dtype=m.dtype)),
    ],
    ids=lambda value: str(value) if isinstance(value, bridge.NoiseLaw) else "",
)
def test_quadratic_losses_in_closed_form(law, covariance):
    """|X|² through linear blocks: ½ C:∇² is all there is, for diffusions and for jumps."""
    x, a = torch.randn(40, 3, dtype=DOUBLE), (0.5, -0.3)
    model = nn.Sequential(*[Quarter(v) for v in a])
    found = bridge.diagnose(model, square(x), x, law, probes=20)
    state, exact = x, []
    for k, v in enumerate(a):
        exact.append(float((covariance(v * state, 0.5) * math.prod(1 + w for w in a[k + 1 :]) ** 2).mean()))
        state = state + v * state
    for value, v, j in zip(exact, found.viscosity, found.jumps, strict=True):
        assert abs(v.value - value) <= 4 * v.standard_error + 1e-8 * value
        assert abs(j.value - value) <= 4 * j.standard_error + 1e-8 * value
    assert found.verdict == "diffusion"
    assert abs(found.measured.value - sum(exact)) < 4 * found.measured.standard_error + 0.2 * sum(exact) ** 2


def test_laws_that_change_the_mean_count_it_once():
    """Not rescaled: E |x + bF|² − |x + F|²."""
    x = torch.randn(30, 3, dtype=DOUBLE)
    found = bridge.diagnose(nn.Sequential(Quarter(0.4)), square(x), x, bridge.StochasticDepth(0.8, rescale=False))
    size = float(x.square().sum(-1).mean())
    assert found.jumps[0].value == pytest.approx(0.2 * (1 - 1.4**2) * size, rel=1e-9)
    drift, second = -0.2 * 0.4 * 2 * 1.4 * size, 0.8 * 0.2 * 0.16 * size
    assert found.viscosity[0].value == pytest.approx(drift + second, rel=1e-6)


@pytest.fixture(scope="module")
def trained():
    """A ResNet whose branches are as large as its states, on handwritten digits."""
    from sklearn.datasets import load_digits

    torch.manual_seed(0)
    digits = load_digits()
    x = torch.tensor(digits.images[:, None] / 16.0, dtype=torch.float32).expand(-1, 3, -1, -1)
    y = torch.tensor(digits.target)
    model = Staged(PostActivation)
    model.fc = nn.Linear(8, 10)
    optimiser = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for _ in range(80):
        batch = torch.randint(0, 1300, (64,))
        optimiser.zero_grad()
        functional.cross_entropy(model(x[batch]), y[batch]).backward()
        optimiser.step()
    held_out, labels = x[1300:], y[1300:]
    return model.eval(), held_out, labels


@pytest.mark.parametrize("keep", [0.99, 0.97])
def test_dropped_branches_of_a_resnet_are_jumps(trained, keep):
    model, x, y = trained

    def loss(f):
        return functional.cross_entropy(f(x), y)

    before = {k: v.clone() for k, v in model.state_dict().items()}
    found = bridge.diagnose(model, loss, x[:2], bridge.StochasticDepth(keep), rtol=0.04)
    assert max(site.ratio for site in found.rows) > 0.5
    assert found.verdict == str(found).split()[-1] == "jumps"
    assert found.explains(found.diffusion).value < 0.7
    assert abs(found.explains(found.total_jumps).value - 1) < 0.15
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(not m._forward_hooks for m in model.modules())


def test_jumps_are_the_loss_without_a_branch_and_with_a_larger_one(trained):
    model, x, y = trained
    keep, name = 0.9, "layer1.1.bn2"

    def loss(f):
        return functional.cross_entropy(f(x), y)

    losses = []
    with torch.no_grad():
        for factor in (1.0, 0.0, 1 / keep):
            handle = model.layer1[1].bn2.register_forward_hook(lambda m, a, out, factor=factor: factor * out)
            losses.append(float(loss(model)))
            handle.remove()
    found = bridge.diagnose(model, loss, x[:2], bridge.StochasticDepth(keep), where=name, rtol=0.1, draws=16)
    exact = (1 - keep) * (losses[1] - losses[0]) + keep * (losses[2] - losses[0])
    assert found.jumps[0].value == pytest.approx(exact, rel=1e-3)


@pytest.mark.parametrize(
    "law", [bridge.Additive(0.1), bridge.CentredBernoulli(0.8), bridge.StochasticDepth(0.8)], ids=str
)
def test_noise_of_a_flow_is_a_diffusion(law):
    branch = bridge.MLPBranch.create(2, 16, rng=0, dtype=DOUBLE)
    model = nn.Sequential(bridge.NoisyResNet([branch] * 8, bridge.Additive(0.0)), nn.Linear(2, 3, dtype=DOUBLE))
    x = torch.randn(300, 2, dtype=DOUBLE)
    y = model(x).argmax(-1)
    found = bridge.diagnose(model, lambda f: functional.cross_entropy(f(x), y), x[:2], law)
    assert found.verdict == str(found).split()[-1] == "diffusion"
    part = found.explains(found.diffusion)
    assert abs(part.value - 1) < 0.05 + 2 * part.standard_error
    assert found.rows.depth == 8


def test_kinks_count():
    """|x + F| with states through 0: all of the second derivative is in the kinks."""
    x = torch.randn(200_000, 1, dtype=DOUBLE)

    def loss(f):
        return f(x).abs().mean()

    found = bridge.diagnose(nn.Sequential(Quarter(0.3)), loss, x[:2], bridge.Additive(0.05), draws=400, rtol=0.01)
    density = 2 / math.sqrt(2 * math.pi) / 1.3  # twice the density of 1.3 x at 0
    assert found.viscosity[0].value == pytest.approx(0.5 * 0.05**2 * density, rel=0.1)
    assert found.measured.value == pytest.approx(0.5 * 0.05**2 * density, rel=0.1)


def test_batches_give_the_same_and_errors_over_them():
    torch.manual_seed(2)
    model, data = ARCHITECTURES["vit"][0]().eval(), [(images(8), torch.randint(5, (8,))) for _ in range(4)]

    def of_batch(f, batch):
        return functional.cross_entropy(f(batch[0]), batch[1])

    def whole(f):
        return functional.cross_entropy(f(torch.cat([b[0] for b in data])), torch.cat([b[1] for b in data]))

    options = {"where": "layers.*.mlp", "draws": 16, "rtol": 0.5}
    law = bridge.StochasticDepth(0.9)
    parts = bridge.diagnose(model, of_batch, data[0][0], law, batches=data, **options)
    one = bridge.diagnose(model, whole, data[0][0], law, **options)
    assert parts.noise_free == pytest.approx(one.noise_free, rel=1e-5)
    for a, b in zip(parts.jumps, one.jumps, strict=True):
        assert a.value == pytest.approx(b.value, rel=0.02, abs=1e-6)
        assert a.standard_error > 0


def test_what_cannot_be_told_is_not_told():
    x = torch.randn(20, 3)
    found = bridge.diagnose(nn.Sequential(Quarter(0.4)), lambda f: f(x).sum() / 20, x, bridge.Additive(0.3), draws=16)
    assert found.verdict == "neither"  # a linear loss: no effect
    assert "too uncertain" in str(found)
    with pytest.raises(InputError, match="scalar"):
        bridge.diagnose(nn.Sequential(Quarter(0.4)), lambda f: f(x), x, bridge.Additive(0.3))
    with pytest.raises(InputError, match="never calls"):
        bridge.diagnose(nn.Sequential(Quarter(0.4)), lambda f: x.sum(), x, bridge.Additive(0.3))


@pytest.mark.parametrize("law", [bridge.StochasticDepth(0.9999), bridge.ShakeDrop(0.9999)], ids=str)
def test_events_that_were_never_drawn_are_not_taken_for_none(law):
    x = torch.ones(10, 3, dtype=DOUBLE)
    rare = bridge.diagnose(nn.Sequential(Quarter(2.0)), square(x), x[:2], law, draws=16)
    assert rare.measured.standard_error == math.inf
    assert rare.verdict == "neither"
    assert "too uncertain" in str(rare)
    x = torch.ones(10_000, 3, dtype=DOUBLE)
    assert (
        bridge.diagnose(nn.Sequential(Quarter(2.0)), square(x), x[:2], law, draws=16).measured.standard_error < math.inf
    )


def test_modules_called_several_times_count_every_call():
    model = ARCHITECTURES["shared"][0]().double()
    x = vectors(200).double()
    loss = square(x)
    found = bridge.diagnose(model, loss, x[:2], bridge.StochasticDepth(0.97), rtol=0.05)
    assert len(found.jumps) == 1
    assert abs(found.explains(found.total_jumps).value - 1) < 0.15
