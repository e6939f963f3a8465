"""Branches that a whole batch drops: not computed, and nothing else is different."""

import copy
import pickle
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from kolmo import bridge
from kolmo.errors import InputError

sys.path.insert(0, str(Path(__file__).parent))
from architectures import ARCHITECTURES, Bottleneck, PostActivation, PreActivation, Staged, images

KEEP = 0.5


def computed(model):
    """The same noisy model whose dropped branches are computed all the same."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        for key in list(module._forward_pre_hooks):
            if type(module._forward_pre_hooks[key]).__name__ == "Entry":
                del module._forward_pre_hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key)
    for _, noise in bridge.noise.carriers(twin):
        noise.enters = False
    return twin


def settled(model):
    """Normalisation with statistics of its own, in evaluation mode, so that passes can be compared to rounding."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.5, 2.0)
    return model


def quiet(model):
    """Training mode but for dropout and batch normalisation."""
    model.train()
    for module in model.modules():
        if isinstance(module, (nn.Dropout, nn.MultiheadAttention, nn.modules.batchnorm._BatchNorm)):
            module.eval()
    return model


def passed(model, x, seed):
    model.zero_grad()
    torch.manual_seed(seed)
    out = model(x)
    out = out[0] if isinstance(out, tuple) else out
    out.square().sum().backward()
    return out.detach(), [None if p.grad is None else p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_passes_and_gradients_are_those_of_computed_branches(name):
    make, inputs, _, _, _ = ARCHITECTURES[name]
    model, x = settled(make()), inputs(4)
    noise = bridge.inject(model, bridge.StochasticDepth(KEEP, per="batch"), batchnorm="train", inputs=[x])
    twin = computed(model)
    quiet(model)
    quiet(twin)
    for seed in range(3):
        one, other = passed(model, x, seed), passed(twin, x, seed)
        torch.testing.assert_close(one[0], other[0])
        for a, b in zip(one[1], other[1], strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    noise.remove()
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("block", [PostActivation, PreActivation, Bottleneck])
def test_dropped_branches_are_not_computed(block):
    model, x = Staged(block).train(), images(4, 8)
    noise = bridge.inject(model, bridge.StochasticDepth(0.01, per="batch"), batchnorm="train", inputs=[x])
    assert all(one.enters for one in noise.noises)
    sizes = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
            module.register_forward_hook(lambda module, args, out: sizes.append(len(args[0])))
    model(x)
    assert sizes.count(0) > len(sizes) / 2


def test_statistics_are_those_of_passes_that_took_the_branch():
    model, x = Staged(PostActivation).train(), images(4, 8)
    bridge.inject(model, bridge.StochasticDepth(1e-9, per="batch"), batchnorm="train", inputs=[x])
    before = {k: v.clone() for k, v in model.state_dict().items() if "layer" in k and "running" in k}
    model(x)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items() if "bn2" in k)


def test_the_share_of_dropped_batches_and_their_scale():
    model, x = Staged(PostActivation), images(2, 8)
    noise = bridge.inject(settled(model), bridge.StochasticDepth(0.7, per="batch"), inputs=[x], where="layer1.0.bn2")
    seen = []
    model.get_submodule("layer1.0.bn2").register_forward_hook(lambda module, args, out: seen.append(out.clone()))
    with noise.noisy(0), torch.no_grad():
        for _ in range(400):
            model(x)
    dropped = [not out.any() for out in seen]
    assert abs(sum(dropped) / 400 - 0.3) < 4 * (0.21 / 400) ** 0.5
    kept = next(out for out, gone in zip(seen, dropped, strict=True) if not gone)
    seen.clear()
    model.eval()(x)
    torch.testing.assert_close(kept, seen[0] / 0.7)


def test_copies_checkpoints_compilation_and_transforms():
    model, x = settled(Staged(PostActivation)), images(4, 8)
    bridge.inject(model, bridge.StochasticDepth(KEEP, per="batch"), batchnorm="train", inputs=[x])
    quiet(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(passed(twin, x, 1), passed(model, x, 1))

    def pieces(z):
        z = model.conv1(z)
        for block in (*model.layer1, *model.layer2):
            z = checkpoint(block, z, use_reentrant=False)
        return model.fc(z.mean((2, 3)))

    whole = passed(model, x, 2)[1]
    model.zero_grad()
    torch.manual_seed(2)
    pieces(x).square().sum().backward()
    torch.testing.assert_close([p.grad for p in model.parameters()], whole)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.manual_seed(3)
    found = compiled(x)
    torch.manual_seed(3)
    torch.testing.assert_close(found, model(x))
    weights = {k: torch.stack([v.detach()] * 3) for k, v in model.named_parameters()}
    call = lambda w: torch.func.functional_call(model, w, x)  # noqa: E731
    outputs = torch.func.vmap(call, randomness="different")(weights)
    assert len(outputs) == 3


def test_a_checkpoint_that_begins_inside_a_branch_is_refused():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
            self.again = False

        def forward(self, x):
            y = torch.tanh(self.first(x))
            return x + (checkpoint(self.second, y, use_reentrant=False) if self.again else self.second(y))

    model, x = nn.Sequential(Block()), torch.randn(4, 8)
    bridge.inject(model, bridge.StochasticDepth(0.9999, per="batch"))
    model[0].again = True
    torch.manual_seed(0)
    loss = model.train()(x).square().sum()
    with pytest.raises(InputError, match="checkpoints around whole branches"):
        loss.backward()
