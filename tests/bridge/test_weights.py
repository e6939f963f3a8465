"""Noise in weights: its moments, its effect on a loss, and that it belongs to the modules."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from kolmo import bridge
from kolmo.errors import InputError


def network():
    torch.manual_seed(0)
    body = [nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3)]
    return nn.Sequential(*body), torch.randn(5, 2, 3, 3)


@pytest.mark.parametrize("per", ["layer", "filter", "weight"])
def test_moments(per):
    torch.manual_seed(1)
    w = torch.randn(6, 50, 3, dtype=torch.float64) * torch.arange(1.0, 7.0)[:, None, None]
    law = bridge.WeightNoise(0.2, per)
    r = {"layer": w.square().mean().sqrt().expand(6), "filter": w.square().mean((1, 2)).sqrt()}.get(per)
    zeta = torch.stack([law.sample(w) for _ in range(200)]) / (0.2 * (w.abs() if r is None else r[:, None, None]))
    n = zeta.numel()
    assert abs(float(zeta.mean())) < 4 / math.sqrt(n)
    assert abs(float(zeta.square().mean()) - 1) < 4 * math.sqrt(2 / n)
    by_filter = zeta.square().mean((0, 2, 3))
    assert (by_filter - 1).abs().max() < 5 * math.sqrt(2 * 6 / n)
    plain = bridge.WeightNoise(0.2, per, relative=False).scale(w)
    assert torch.equal(plain, torch.full_like(w, 0.2))


def test_effect_on_a_quadratic_loss():
    """E |x·(w + sξ)|² = |x·w|² + s² |x|²."""
    model, x = nn.Linear(4, 1, bias=False).double(), torch.randn(1, 4, dtype=torch.float64)
    noise = bridge.inject(model, bridge.WeightNoise(0.3, relative=False))
    found = noise.mc(x, 4000, rng=0, loss=lambda out: out.square().sum())
    exact = model.eval()(x).square().sum() + 0.09 * x.square().sum()
    assert abs(found.mean - exact) < 4 * found.standard_error


def changed(model, x):
    """Which layers had noise in a pass."""
    seen = []
    handles = [
        m.register_forward_hook(lambda m, a, out: seen.append((a[0], out))) for m in model if hasattr(m, "weight")
    ]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    pairs = zip((m for m in model if hasattr(m, "weight")), seen, strict=True)
    return [not torch.equal(nn.functional.linear(before, m.weight, m.bias), out) for m, (before, out) in pairs]


def turns(depth=3, **options):
    body = [part for _ in range(depth) for part in (nn.Linear(6, 6), nn.Tanh())]
    model = nn.Sequential(*body).double()
    return model, torch.randn(7, 6, dtype=torch.float64), bridge.WeightNoise(0.1, layers="one", **options)


def test_one_layer_has_noise_in_each_pass():
    model, x, law = turns()
    torch.manual_seed(0)
    noise = bridge.inject(model.train(), law)
    counts, n = torch.zeros(3), 400
    for _ in range(n):
        on = torch.tensor(changed(model, x))
        assert int(on.sum()) == 1
        counts += on
    assert (counts / n - 1 / 3).abs().max() < 4 * math.sqrt(2 / 9 / n)
    assert not any(changed(model.eval(), x))
    state = torch.get_rng_state()
    model(x)
    assert torch.equal(torch.get_rng_state(), state)  # quiet passes draw nothing
    with noise.noisy(0):
        assert sum(changed(model, x)) == 1
    noise.remove()
    assert not any(changed(model.train(), x))
    assert not model._forward_pre_hooks


def test_one_layer_at_a_time_adds_the_mean_of_the_curvatures_of_the_layers():
    """½ s² r² tr H of each layer, from the Hessian's blocks, averaged."""
    torch.manual_seed(1)
    model, x, law = turns()
    target = model(x).detach()  # no slope: the effect is of second order

    def loss(f):
        return (f(x) - target).square().sum(-1).mean()

    noise = bridge.inject(model, law)
    with noise.noisy(0), torch.no_grad():
        draws = torch.stack([loss(model) for _ in range(1500)])
    noise.remove()
    curvatures = []
    for name in ("0", "2", "4"):
        weight = model.get_parameter(f"{name}.weight").detach()

        def along(w, name=name):
            return loss(lambda z: torch.func.functional_call(model, {f"{name}.weight": w}, z))

        H = torch.func.hessian(along)(weight).reshape(36, 36)
        curvatures.append(0.5 * law.s**2 * float(weight.square().mean() * H.detach().trace()))
    effect, error = float(draws.mean()), float(draws.std()) / math.sqrt(len(draws))
    assert abs(effect - sum(curvatures) / 3) < 4 * error + 0.02 * sum(curvatures) / 3
    assert abs(effect - sum(curvatures)) > 20 * error


def compiled_and_copied(model, x, count):
    """Outputs (count, ...) of copies under vmap; the compiled model gives what the model gives for the same draws."""
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.manual_seed(2)
    found = compiled(x)
    torch.manual_seed(2)
    torch.testing.assert_close(found, model(x))
    weights = {k: torch.stack([v.detach()] * count) for k, v in model.named_parameters()}
    return torch.func.vmap(lambda w: torch.func.functional_call(model, w, x), randomness="different")(weights)


def test_turns_belong_to_the_modules():
    model, x, law = turns()
    bridge.inject(model.train(), law)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert sum(changed(twin, x)) == 1
        assert twin[0].forward.turns is twin[4].forward.turns is not model[0].forward.turns
        bridge.eject(twin)
        assert not any(changed(twin, x))
    outputs = compiled_and_copied(model, x, 8)
    assert len(torch.unique(outputs[:, 0, 0])) == 8
    gradients = []
    for again in (False, True):
        model.zero_grad()
        torch.manual_seed(5)
        out = checkpoint(model, x, use_reentrant=False) if again else model(x)
        torch.manual_seed(11)
        out.square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(*gradients)
    whole = nn.Sequential(_Again(model[:2]), model[2:])
    bridge.eject(model)
    bridge.inject(whole.train(), law)
    with pytest.raises(InputError, match="whole model"):
        whole(x.requires_grad_()).sum().backward()


class _Again(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=False)


def test_it_belongs_to_the_modules():
    model, x = network()
    before, keys = model.eval()(x), list(model.state_dict())
    noise = bridge.inject(model, bridge.WeightNoise(0.1))
    assert noise.sites == ["0", "4"]
    assert list(model.state_dict()) == keys
    assert torch.equal(model(x), before)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin.eval()(x), before)
        assert not torch.equal(twin.train()(x), twin(x))
        assert twin[0].forward.module is twin[0]
        bridge.eject(twin)
        assert torch.equal(twin.train()(x), twin(x))
    with pytest.raises(InputError, match="without injected noise"):
        bridge.inject(model, bridge.WeightNoise(0.1))
    noise.remove()
    assert torch.equal(model.train()(x), model(x))


def test_gradients_are_those_at_the_noisy_weights():
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    bridge.inject(model, bridge.WeightNoise(0.5))
    torch.manual_seed(3)
    model.train()(x).square().sum().backward()
    torch.manual_seed(3)
    noisy = (model.weight + bridge.WeightNoise(0.5).sample(model.weight)).detach().requires_grad_()
    nn.functional.linear(x, noisy, model.bias).square().sum().backward()
    torch.testing.assert_close(model.weight.grad, noisy.grad)


def test_compilation_transforms_checkpoints_and_half_precision():
    model, x = network()
    bridge.inject(model, bridge.WeightNoise(0.1), where=["0", "4"], batchnorm="train")
    model.train()[1].eval()
    outputs = compiled_and_copied(model, x, 3)
    assert not torch.equal(outputs[0], outputs[1])
    gradients = []
    for again in (False, True):
        model.zero_grad()
        torch.manual_seed(5)
        out = checkpoint(model, x, use_reentrant=False) if again else model(x)
        out.square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(*gradients)
    with torch.autocast("cpu", torch.bfloat16):
        assert bool(model(x).isfinite().all())


def test_one_law_for_each_layer():
    model, x = network()
    noise = bridge.inject(model, [bridge.WeightNoise(0.0), bridge.WeightNoise(0.2)])
    seen = []
    model[0].register_forward_hook(lambda module, args, out: seen.append(out))
    with noise.noisy(0):
        first, second = model(x), model(x)
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(first, second)


def test_refusals():
    model, _ = network()
    attention = nn.TransformerEncoderLayer(8, 2, 16)
    assert bridge.inject(attention, bridge.WeightNoise(0.1)).sites == ["linear1", "linear2"]
    cases = [
        lambda: bridge.WeightNoise(-1.0),
        lambda: bridge.WeightNoise(0.1, "block"),
        lambda: bridge.WeightNoise(0.1, layers="two"),
        lambda: bridge.inject(model, bridge.WeightNoise(0.1), where="1"),
        lambda: bridge.inject(model, [bridge.WeightNoise(0.1)] * 3),
        lambda: bridge.inject(nn.ReLU(), bridge.WeightNoise(0.1)),
        lambda: bridge.inject(copy.deepcopy(model), [bridge.WeightNoise(0.1), bridge.StochasticDepth(0.5)]),
    ]
    for case in cases:
        with pytest.raises(InputError):
            case()
