"""What noise costs layer by layer, against automatic derivatives and paired measurements, and how it is spent."""

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
from architectures import ARCHITECTURES, images, vectors

DOUBLE = torch.float64


class Smooth(nn.Module):
    def __init__(self, width=6):
        super().__init__()
        self.fc = nn.Linear(width, width, dtype=DOUBLE)

    def forward(self, x):
        return x + 0.4 * torch.tanh(self.fc(x))


def smooth(depth=3):
    torch.manual_seed(1)
    return nn.Sequential(*[Smooth() for _ in range(depth)])


def quartic(x):
    return lambda f: (f(x).square().sum(-1) / 6).square().mean()


@pytest.mark.parametrize(
    "law",
    [bridge.StochasticDepth(0.999), bridge.BranchDropout(0.999), bridge.Additive(0.03), bridge.Multiplicative(0.02)],
    ids=str,
)
def test_effects_are_second_derivatives_of_the_rest_of_the_network(law):
    """½ C:∇²v by differentiating the later layers automatically."""
    model, x = smooth(), torch.randn(400, 6, dtype=DOUBLE)
    found = bridge.regularisation(model, quartic(x), x[:2], law=law, probes=40)
    state = x
    for k, block in enumerate(model):
        m = (0.4 * torch.tanh(block.fc(state))).detach()
        after = (state + m).detach()

        def rest(z, k=k):
            for later in model[k + 1 :]:
                z = later(z)
            return (z.square().sum(-1) / 6).square().mean()

        exact = 0.0
        for column in law.factor(m, found.rows.h).unbind(-1):
            slope = torch.func.grad(rest)
            exact += 0.5 * float((torch.func.jvp(slope, (after,), (column.contiguous(),))[1] * column).sum())
        assert abs(found.effects[k].value - exact) <= 4 * found.effects[k].standard_error + 0.02 * abs(exact)
        state = after


@pytest.mark.parametrize(("name", "side"), [("post-activation", 8), ("vit", 32)])
def test_effects_agree_with_paired_measurements_layer_by_layer(name, side):
    """Networks with ReLU and with attention: the effect of each site's noise alone, exact in its law."""
    torch.manual_seed(0)
    model, x, y = ARCHITECTURES[name][0]().eval(), images(400, side), torch.randint(5, (400,))
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.data.mul_(2.0)  # losses that are not flat

    def loss(f):
        return functional.cross_entropy(4 * f(x), y)

    law = bridge.Multiplicative(0.1, scaling="natural")
    found = bridge.regularisation(model, loss, x[:2], law=law)
    paired = bridge.regularisation(model, loss, x[:2], law=law, reading="jumps")
    for a, b in zip(found.effects, paired.effects, strict=True):
        assert a.value == pytest.approx(b.value, rel=0.1, abs=0.02 * abs(paired.total.value))
    assert found.predicted == pytest.approx(found.noise_free + found.total.value)
    assert str(found).count("\n") == len(found.rows) + 1


def test_batches_have_standard_errors_that_hold():
    model, x = smooth(), torch.randn(640, 6, dtype=DOUBLE)
    law = bridge.StochasticDepth(0.99)

    def of_batch(f, z):
        return quartic(z)(f)

    whole = bridge.regularisation(model, quartic(x), x[:2], law=law)
    found = bridge.regularisation(model, of_batch, x[:2], law=law, batches=x.split(40))
    assert found.total.value == pytest.approx(whole.total.value, rel=1e-4)  # the step is that of the first batch
    other = bridge.regularisation(model, of_batch, x[:2], law=law, batches=torch.randn(16, 40, 6, dtype=DOUBLE))
    error = math.hypot(found.total.standard_error, other.total.standard_error)
    assert 0 < error < 0.5 * abs(found.total.value)
    assert abs(found.total.value - other.total.value) < 4.5 * error


@pytest.mark.parametrize(
    "law", [bridge.StochasticDepth(0.95), bridge.Additive(0.1), bridge.BranchDropout(0.95)], ids=str
)
def test_regulariser_is_the_sum_and_differentiable(law):
    model, x = smooth(), torch.randn(3000, 6, dtype=DOUBLE)
    loss = quartic(x)
    exact = bridge.regularisation(model, loss, x[:2], law=law, probes=10).total
    regulariser = bridge.Regulariser(model, law)
    draws = torch.stack([regulariser(loss).detach() for _ in range(40)])
    error = math.hypot(float(draws.std()) / math.sqrt(40), exact.standard_error)
    assert abs(float(draws.mean()) - exact.value) < 4.5 * error + 0.01 * abs(exact.value)
    assert len(draws.unique()) == len(draws)  # every call takes columns of its own
    parameters = list(model.parameters())
    torch.manual_seed(3)
    gradients = torch.autograd.grad(regulariser(loss), parameters)
    direction = [torch.randn_like(p) for p in parameters]
    values = []
    for sign in (1e-4, -1e-4):
        with torch.no_grad():
            for p, d in zip(parameters, direction, strict=True):
                p.add_(sign * d)
            torch.manual_seed(3)
            values.append(float(regulariser(loss)))
            for p, d in zip(parameters, direction, strict=True):
                p.sub_(sign * d)
    slope = sum(float((g * d).sum()) for g, d in zip(gradients, direction, strict=True))
    assert slope == pytest.approx((values[0] - values[1]) / 2e-4, rel=1e-4, abs=1e-8)
    assert all(not m._forward_hooks and "forward" not in m.__dict__ for m in model.modules())


def test_training_with_the_regulariser_lowers_the_effect_of_the_noise():
    law, x, effects = bridge.StochasticDepth(0.8), torch.randn(200, 6, dtype=DOUBLE), []
    loss = quartic(x)
    for weight in (0.0, 20.0):
        model = smooth(2)
        regulariser = bridge.Regulariser(model, law)
        optimiser = torch.optim.SGD(model.parameters(), 0.05)
        for _ in range(40):
            optimiser.zero_grad()
            (loss(model) + weight * regulariser(loss)).backward()
            optimiser.step()
        effects.append(bridge.regularisation(model, loss, x[:2], law=law, reading="jumps").total.value)
    assert effects[1] < 0.8 * effects[0]


@pytest.mark.parametrize(
    "law", [bridge.StochasticDepth(0.9), bridge.Multiplicative(0.1), bridge.Additive(0.1)], ids=str
)
def test_a_schedule_spends_its_budget_in_equal_shares(law):
    torch.manual_seed(1)
    model, x = smooth(), torch.randn(500, 6, dtype=DOUBLE)
    with torch.no_grad():
        model[1].fc.weight.mul_(4)
    loss = quartic(x)
    budget = 0.05 * float(loss(model))
    found = bridge.schedule(model, loss, x[:2], law, budget, rtol=0.03, draws=200, probes=20)
    share = sum(effect.value for effect in found.effects) / 3
    assert share == pytest.approx(budget / 3, rel=0.1)
    for effect in found.effects:
        assert effect.value == pytest.approx(share, rel=0.04)
    assert abs(found.measured.value - budget) < 4 * found.measured.standard_error + 0.05 * budget
    with bridge.inject(model, found.laws, where=found.rows) as noise, noise.noisy(0), torch.no_grad():
        values = torch.stack([loss(model) for _ in range(200)]) - loss_without(model, x)
    error = float(values.std()) / math.sqrt(200)
    assert abs(float(values.mean()) - budget) < 4 * error + 0.1 * budget


def test_a_budget_is_met_where_effects_of_layers_do_not_add():
    """Two factors of mean 1 and variance q/(1 − q): E of their product squared is more than the sum of the two."""

    class Double(nn.Module):
        def forward(self, x):
            return x + 2 * (x @ torch.eye(1, dtype=DOUBLE))

    model, x = nn.Sequential(*[Double() for _ in range(4)]), torch.ones(4000, 1, dtype=DOUBLE)
    loss, law = (lambda f: f(x).square().mean()), bridge.StochasticDepth(0.9)
    found = bridge.schedule(model, loss, x[:2], law, 81.0**2, rtol=0.01, draws=400)
    drops = [1 - law.keep for law in found.laws]
    assert max(drops) == pytest.approx(min(drops), rel=0.05)
    exact = math.prod(1 + 4 / 9 * q / (1 - q) for q in drops) - 1  # relative to the loss, 81²
    assert exact == pytest.approx(1.0, rel=0.1)
    assert sum(effect.value for effect in found.effects) < 0.85 * 81**2


def test_a_share_is_met_where_little_noise_makes_the_loss_smaller():
    """(b − 1)⁴ − 1.2 (b − 1)² of the factor b of the branch: negative for few drops, large for many."""

    class Double(nn.Module):
        def forward(self, x):
            return x + x @ torch.eye(1, dtype=DOUBLE)

    x = torch.ones(3000, 1, dtype=DOUBLE)

    def loss(f):
        off = (f(x) - 2).square()
        return (off.square() - 1.2 * off).mean()

    for budget in (0.1, 1.0, 5.0):
        found = bridge.schedule(nn.Sequential(Double()), loss, x[:2], bridge.StochasticDepth(0.9), budget, rtol=0.01)
        q = 1 - found.laws[0].keep
        more = q / (1 - q)  # b − 1 where the branch is kept
        assert q * (1 - 1.2) + (1 - q) * (more**4 - 1.2 * more**2) == pytest.approx(budget, rel=0.08)


def loss_without(model, x):
    for block in model:
        x = x + 0.4 * torch.tanh(block.fc(x))
    return (x.square().sum(-1) / 6).square().mean()


def test_what_a_layer_cannot_spend_goes_to_the_others():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 6, dtype=DOUBLE)

        def forward(self, x):
            return x + 1e-3 * self.fc(x)

    model, x = nn.Sequential(Smooth(), Idle(), Smooth()), torch.randn(300, 6, dtype=DOUBLE)
    budget = 0.05 * float(quartic(x)(model))
    found = bridge.schedule(model, quartic(x), x[:2], bridge.StochasticDepth(0.9), budget)
    assert found.laws[1].keep == pytest.approx(0.1)
    assert sum(effect.value for effect in found.effects) == pytest.approx(budget, rel=0.03)


def test_bad_input_is_named():
    model, x = smooth(), vectors(4)
    with pytest.raises(InputError, match="budget"):
        bridge.schedule(model, quartic(x), x, bridge.StochasticDepth(0.9), 0.0)
    with pytest.raises(InputError, match="reading"):
        bridge.regularisation(model, quartic(x), x, law=bridge.Additive(0.1), reading="exact")
    with pytest.raises(InputError, match="law="):
        bridge.regularisation(model, quartic(x), x)
    with pytest.raises(InputError, match="rescale=True"):
        bridge.Regulariser(model, bridge.StochasticDepth(0.9, rescale=False))
