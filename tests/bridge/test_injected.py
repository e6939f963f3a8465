"""Noise in networks of fourteen shapes: its moments, and that it belongs to the modules whatever is done with them."""

import copy
import io
import math
import pickle
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from kolmo import bridge
from kolmo.bridge.variables import VARIABLES, bernoulli
from kolmo.errors import InputError

sys.path.insert(0, str(Path(__file__).parent))
from architectures import ARCHITECTURES, DropPath, PostActivation, Shared, Staged, images, vectors

KEEP = 0.7
# law: mean and noise matrix (as a factor field) of a branch m, whether each entry has its own ζ, and E ζ⁴
BERNOULLI_KURTOSIS = (1 - 3 * KEEP * (1 - KEEP)) / (KEEP * (1 - KEEP))
LAWS = {
    "additive": (bridge.Additive(0.3), lambda m, h: (m, math.sqrt(h) * 0.3 * torch.ones_like(m)), True, 3.0),
    "uniform, natural": (
        bridge.Additive(0.3, "uniform", "natural"),
        lambda m, h: (m, h * 0.3 * torch.ones_like(m)),
        True,
        1.8,
    ),
    "multiplicative": (bridge.Multiplicative(0.3), lambda m, h: (m, 0.3 * m / math.sqrt(h)), False, 3.0),
    "by coordinate": (
        bridge.Multiplicative(0.3, "rademacher", "coordinate", "natural"),
        lambda m, h: (m, 0.3 * m),
        True,
        1.0,
    ),
    "stochastic depth": (
        bridge.StochasticDepth(KEEP),
        lambda m, h: (m, m * math.sqrt((1 - KEEP) / KEEP)),
        False,
        BERNOULLI_KURTOSIS,
    ),
    "not rescaled": (
        bridge.StochasticDepth(KEEP, rescale=False),
        lambda m, h: (KEEP * m, m * math.sqrt(KEEP * (1 - KEEP))),
        False,
        BERNOULLI_KURTOSIS,
    ),
    "dropout": (
        bridge.BranchDropout(KEEP),
        lambda m, h: (m, m * math.sqrt((1 - KEEP) / KEEP)),
        True,
        BERNOULLI_KURTOSIS,
    ),
    "centred": (bridge.CentredBernoulli(0.3), lambda m, h: (m, 0.3 * m / math.sqrt(h)), True, 1.0),
}
SAMPLES = 200
# every pair of the table; a quarter of them by default, in which each network and each law is met several times
TABLE = [
    pytest.param(name, law, marks=[] if (i + j) % 4 == 0 else pytest.mark.slow)
    for i, name in enumerate(ARCHITECTURES)
    for j, law in enumerate(LAWS)
]


class Branches(TorchFunctionMode):
    """Keeps both operands of every addition of two tensors of one shape."""

    def __init__(self):
        super().__init__()
        self.pairs = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        named = getattr(function, "__name__", "") in ("add", "add_", "__add__", "__iadd__", "__radd__")
        if named and all(isinstance(a, torch.Tensor) for a in args[:2]) and args[0].shape == args[1].shape:
            self.pairs.append((args[0].clone(), args[1].clone()))
        return function(*args, **(kwargs or {}))


def operands(model, x):
    with Branches() as seen, torch.no_grad():
        model(x)
    return seen.pairs


def repeated(inputs, axis):
    """One sample, many times."""
    x = inputs(SAMPLES)
    return x.select(axis, 0).unsqueeze(axis).expand_as(x).contiguous()


@pytest.mark.parametrize(("name", "law"), TABLE)
def test_moments_of_the_noise_at_the_last_site(name, law):
    make, inputs, names, calls, axis = ARCHITECTURES[name]
    noise_law, closed, entrywise, kurtosis = LAWS[law]
    model, x = make().eval(), repeated(inputs, axis)
    quiet = operands(model, x)
    noise = bridge.inject(model, noise_law, where=names[-1])
    assert noise.h == 1 / calls
    with noise.noisy(0):
        noisy = operands(model, x)
    changed = [
        (side, a, b)
        for before, after in zip(quiet, noisy, strict=True)
        for side, (a, b) in enumerate(zip(before, after, strict=True))
        if not torch.equal(a, b)
    ]
    _, m, found = changed[0]  # later ones have changed because the state has
    mean, G = (v.movedim(axis, 0).flatten(1).double() for v in closed(m, noise.h))
    found = found.movedim(axis, 0).flatten(1).double()
    if entrywise:
        zeta = ((found - mean) / G)[G.abs() > 1e-3 * G.abs().max()]
    else:
        zeta = ((found - mean) * G).sum(1) / (G * G).sum(1)
        torch.testing.assert_close(found, mean + zeta[:, None] * G, rtol=1e-3, atol=1e-4 * float(m.abs().max()))
    n = len(zeta)
    assert abs(float(zeta.mean())) < 4 / math.sqrt(n)
    assert abs(float((zeta**2).mean()) - 1) < 4 * math.sqrt((kurtosis - 1) / n) + 1e-4
    if not entrywise:
        assert len(zeta.round(decimals=4).unique()) >= (2 if "depth" in law or "not" in law else 100)


@pytest.mark.parametrize(("name", "law"), TABLE)
def test_copies_and_evaluation(name, law):
    """Evaluation is the mean network; copies and unpickled models are noisy in their own training mode alone."""
    make, inputs, names, calls, _ = ARCHITECTURES[name]
    model, x = make().eval(), inputs(20)
    before, keys = first(model(x)), list(model.state_dict())
    noise = bridge.inject(model, LAWS[law][0], batchnorm="train", inputs=[x])
    assert noise.sites == names
    assert noise.h == 1 / (calls * len(names))
    assert list(model.state_dict()) == keys
    mean = first(model(x))
    assert torch.equal(mean, before) == (law != "not rescaled")
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        model.train()
        assert not twin.training
        assert torch.equal(first(twin(x)), mean)
        twin.train()
        model.eval()
        assert torch.equal(first(model(x)), mean)
        assert not torch.equal(noisy_pass(twin, x), noisy_pass(twin, x))
        bridge.eject(twin)
        assert torch.equal(first(twin.eval()(x)), before)
    noise.remove()
    assert torch.equal(first(model(x)), before)


def first(output):
    return output[0] if isinstance(output, tuple) else output


def noisy_pass(model, x):
    """A noisy pass with dropout off and normalisation as in evaluation."""
    modes = {m: m.training for m in model.modules()}
    for module in model.modules():
        if isinstance(module, (nn.Dropout, nn.modules.batchnorm._BatchNorm)):
            module.eval()
    with torch.no_grad():
        out = first(model(x))
    for module, mode in modes.items():
        module.training = mode
    return out


# Each network with one law, and each law with one network: autocast and checkpoints see modules and their output alone,
# whatever law is drawn in them, and a law sees a branch output, whatever network it is of.
CROSS = [
    *(pytest.param(name, "stochastic depth", id=name) for name in ARCHITECTURES),
    *(pytest.param("post-activation", law, id=law) for law in LAWS if law != "stochastic depth"),
]


def touched(name):
    """A network of the table whose batch normalisation has seen data."""
    model = ARCHITECTURES[name][0]()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.fill_(0.01)
    return model


@pytest.mark.parametrize(("name", "law"), CROSS)
def test_half_precision_and_gradients(name, law):
    model, x = touched(name), ARCHITECTURES[name][1](4)
    bridge.inject(model, LAWS[law][0], batchnorm="freeze", inputs=[x])
    with torch.autocast("cpu", torch.bfloat16):
        out = first(model.train()(x))
        assert not torch.equal(out, first(model(x)))
    out.float().square().mean().backward()
    assert bool(out.isfinite().all())
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize(("name", "law"), CROSS)
def test_a_checkpoint_around_the_network_repeats_its_noise(name, law):
    model, x = touched(name), ARCHITECTURES[name][1](4)
    bridge.inject(model, LAWS[law][0], batchnorm="train", inputs=[x])
    model.train()
    gradients = []
    for again in (False, True):
        torch.manual_seed(1)
        model.zero_grad()
        out = first(checkpoint(model, x, use_reentrant=False) if again else model(x))
        torch.manual_seed(2)  # whatever happens between
        out.square().sum().backward()
        gradients.append([torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)
    assert any(bool(g.any()) for g in gradients[0])


def checkpointed(model, x):
    """The same pass with every block of a `Staged` network checkpointed."""
    x = model.conv1(x)
    for block in (*model.layer1, *model.layer2):
        x = checkpoint(block, x, use_reentrant=False)
    return model.fc(x.mean((2, 3)))


@pytest.mark.parametrize("block", ["post-activation", "squeeze"])
def test_checkpoints_repeat_the_noise(block):
    model, x = ARCHITECTURES[block][0](), images(4, 8)
    bridge.inject(model, bridge.StochasticDepth(0.5), batchnorm="train")
    model.train()
    gradients = []
    for whole in (lambda z: model.fc(model.layer2(model.layer1(model.conv1(z))).mean((2, 3))), None):
        torch.manual_seed(1)
        model.zero_grad()
        (checkpointed(model, x) if whole is None else whole(x)).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_checkpoints_repeat_the_noise_of_a_generator():
    class Blocks(nn.Module):
        def __init__(self, again):
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
            self.again = again

        def forward(self, x):
            for block in self.blocks:
                x = x + (checkpoint(block, x, use_reentrant=False) if self.again else block(x))
            return x

    torch.manual_seed(3)
    plain, again = Blocks(False), Blocks(True)
    again.load_state_dict(plain.state_dict())
    gradients, x = [], vectors(6)
    for model in (plain, again):
        noise = bridge.inject(model.train(), bridge.StochasticDepth(0.5), where="blocks.*")
        noise.generator = torch.Generator().manual_seed(7)
        outside = torch.get_rng_state()
        loss = model(x).square().sum()
        torch.manual_seed(12)  # whatever happens between
        loss.backward()
        torch.set_rng_state(outside)
        gradients.append([p.grad for p in model.parameters()])
        assert not torch.equal(model(x), model(x))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(InputError, match="checkpoint the blocks"):
        checkpoint(plain, x.requires_grad_(), use_reentrant=False).sum().backward()


def test_whole_models_are_saved_and_averaged():
    model, x = ARCHITECTURES["vit"][0](), images(3)
    noise = bridge.inject(model.train(), bridge.StochasticDepth(0.5))
    average = AveragedModel(model).eval()
    assert torch.equal(average(x), average(x))
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    loaded = torch.load(stored, weights_only=False).eval()
    assert torch.equal(loaded(x), model.eval()(x))
    with noise.noisy(0):
        inside = copy.deepcopy(model)
    assert torch.equal(inside(x), inside(x))


def test_functional_calls_and_vmap():
    model, x = Shared(), vectors(40)
    bridge.inject(model, bridge.StochasticDepth(0.5))
    model.train()
    weights = {k: 2 * v.detach() for k, v in model.named_parameters()}
    torch.manual_seed(5)
    called = torch.func.functional_call(model, weights, x)
    for parameter in model.parameters():
        parameter.data.mul_(2)
    torch.manual_seed(5)
    torch.testing.assert_close(called, model(x))
    stacked = {k: torch.stack([v, v, v]) for k, v in weights.items()}
    ensemble = torch.func.vmap(lambda w: torch.func.functional_call(model, w, x), in_dims=0, randomness="different")
    found = ensemble(stacked)
    assert not torch.equal(found[0], found[1])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_each_network_is_saved_averaged_and_transformed(name):
    """The same seed gives the same noisy pass to all that is made of a network."""
    model, x = touched(name), ARCHITECTURES[name][1](6)
    bridge.inject(model, bridge.StochasticDepth(0.5), batchnorm="freeze", inputs=[x])
    stored = io.BytesIO()
    torch.save(model.train(), stored)
    stored.seek(0)
    average = AveragedModel(model)
    average.update_parameters(model)
    weights = {key: p.detach() for key, p in model.named_parameters()}
    made = (torch.load(stored, weights_only=False), average, lambda z: torch.func.functional_call(model, weights, z))
    for f in (model, *made):
        torch.manual_seed(8)
        found = first(f(x)).detach()
        if f is model:
            expected = found
        torch.testing.assert_close(found, expected)
    assert not torch.equal(first(average(x)), first(average(x)))
    quiet = first(model.eval()(x))
    torch.testing.assert_close(first(average.eval()(x)), quiet)
    twins = {key: torch.stack([p, p]) for key, p in weights.items()}
    for module in model.modules():
        module.training = not isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.Dropout))

    def ensemble(w):
        return first(torch.func.functional_call(model, w, x))

    one, other = torch.func.vmap(ensemble, randomness="different")(twins)
    assert not torch.equal(one, other)
    assert one.shape == expected.shape


def without_functions(x):
    with torch._C.DisableTorchFunction():
        return x + 1


@pytest.fixture
def one_graph():
    """The compiler of torch 2.6 cannot follow what keeps the noise apart from the additions of the network."""
    try:
        torch.compile(without_functions, fullgraph=True, backend="eager")(torch.ones(2))
    except torch._dynamo.exc.Unsupported:
        pytest.skip("this torch cannot compile DisableTorchFunction")


@pytest.mark.usefixtures("one_graph")
@pytest.mark.parametrize(
    "law", [pytest.param(law, marks=[] if law == "stochastic depth" else pytest.mark.slow) for law in LAWS]
)
def test_each_law_is_compiled_in_one_graph(law):
    model, x = Staged(PostActivation).train(), images(4, 8)
    bridge.inject(model, LAWS[law][0], batchnorm="train")
    torch._dynamo.reset()  # what other tests have compiled counts
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.manual_seed(2)
    found = compiled(x)
    torch.manual_seed(2)
    torch.testing.assert_close(found, model(x))
    assert not torch.equal(compiled(x), compiled(x))


@pytest.mark.slow
@pytest.mark.usefixtures("one_graph")
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_each_network_is_compiled_in_one_graph(name):
    make, inputs, _, _, _ = ARCHITECTURES[name]
    model, x = make().train(), inputs(4)
    bridge.inject(model, bridge.StochasticDepth(0.5), batchnorm="train")
    torch._dynamo.reset()  # what other tests have compiled counts
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    first(compiled(x)).square().sum().backward()
    assert not torch.equal(first(compiled(x)), first(compiled(x)))


def test_strengths_that_are_learnt_are_parameters():
    strength = nn.Parameter(torch.tensor(0.3))
    model, x = Shared(), vectors(50)
    keys = set(model.state_dict())
    noise = bridge.inject(model, bridge.Additive(strength))
    assert set(model.state_dict()) - keys == {"noise_s"}
    assert any(p is strength for p in model.parameters())
    model.train()(x).square().sum().backward()
    assert strength.grad is not None
    twin = copy.deepcopy(model)
    with torch.no_grad():
        strength.zero_()
    assert not torch.equal(twin(x), twin(x))
    assert torch.equal(model(x), model(x))
    moved = torch.func.functional_call(model, {"noise_s": torch.tensor(1.0)}, x)
    assert not torch.equal(moved, model(x))
    noise.remove()
    assert set(model.state_dict()) == keys
    with pytest.raises(InputError, match=r"nn\.Parameter"):
        bridge.inject(Shared(), bridge.Additive(torch.tensor(0.3, requires_grad=True)))


def test_a_second_injection_is_refused_and_foreign_noise_replaced():
    class Block(nn.Module):
        def __init__(self, place):
            super().__init__()
            self.fc, self.quiet, self.place = nn.Linear(8, 8), _Stochastic(0.6), place

        def forward(self, x):
            if self.place == "end":
                return x + self.quiet(self.fc(x))
            return x + self.fc(self.quiet(torch.tanh(x)))

    model = nn.Sequential(Block("end"))
    noise, x = bridge.inject(model, bridge.StochasticDepth(0.9)), vectors(2000)
    with torch.no_grad():
        share = (model.train()(x) == x).all(1).double().mean().item()
    assert abs(share - 0.1) < 4 * math.sqrt(0.09 / 2000)
    with pytest.raises(InputError, match="remove"):
        bridge.inject(model, bridge.StochasticDepth(0.9))
    noise.remove()
    with torch.no_grad():
        share = (model(x) == x).all(1).double().mean().item()
    assert abs(share - 0.6) < 4 * math.sqrt(0.24 / 2000)  # its own noise is there again
    with pytest.raises(InputError, match=r"quiet.*_Stochastic.*not the end"):
        bridge.inject(nn.Sequential(Block("inside")), bridge.StochasticDepth(0.9))


def test_noise_in_the_code_of_a_block_is_refused_by_name():
    class Block(nn.Module):
        def __init__(self, rate):
            super().__init__()
            self.fc, self.rate = nn.Linear(8, 8), rate

        def forward(self, x):
            out = self.fc(torch.tanh(nn.functional.dropout(x, 0.1, self.training)))
            if self.training and self.rate:
                out = out * torch.empty(len(x), 1).bernoulli_(1 - self.rate) / (1 - self.rate)
            return x + out

    torch.manual_seed(0)
    model = nn.Sequential(Block(0.0), Block(0.2))
    bridge.inject(model, bridge.StochasticDepth(0.9), where="0.fc", inputs=[vectors(4)])

    class Quiet(Block):
        def forward(self, x):
            out = self.fc(torch.tanh(x))
            return x + (out * torch.empty(len(x), 1).bernoulli_(0.8) / 0.8 if self.training else out)

    with pytest.raises(InputError, match=r"'0.fc'.*sample by sample"):
        bridge.inject(nn.Sequential(Quiet(0.2)), bridge.StochasticDepth(0.9), inputs=[vectors(4)])


def test_a_network_with_noise_of_its_own_is_refused_and_can_be_read():
    branches = [bridge.MLPBranch.create(2, 4, rng=k) for k in range(2)]
    net, x = bridge.NoisyResNet(branches, bridge.Additive(0.2)), torch.randn(50, 2)
    with pytest.raises(InputError, match="noise of its own"):
        bridge.inject(net, bridge.StochasticDepth(0.9))
    found = bridge.regularisation(net, lambda f: f(x).square().mean(), x, law=bridge.Additive(0.2))
    assert found.rows.depth == 2
    line = bridge.NoisyResNet([bridge.MLPBranch.create(1, 4, rng=k) for k in range(2)], bridge.Additive(0.2))
    states = torch.randn(50, 1)  # of one number, whose noise is a multiple of it
    found = bridge.regularisation(line, lambda f: f(states).square().mean(), states, law=bridge.Additive(0.2))
    assert found.rows.depth == 2
    bridge.inject(bridge.NoisyResNet(branches, bridge.Additive(0.0)), bridge.StochasticDepth(0.9), inputs=[x])


class _Stochastic(DropPath):
    """In place, to make it hard."""

    def forward(self, x):
        if self.training:
            x.mul_(torch.empty(len(x), *[1] * (x.ndim - 1)).bernoulli_(1 - self.rate) / (1 - self.rate))
        return x


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_probabilities_are_those_asked_for_in_every_precision(dtype):
    m, n = torch.ones(1_000_000, 1, dtype=dtype), 1_000_000
    dropped = (bridge.StochasticDepth(0.999).sample(m, 1.0) == 0).double().mean().item()
    assert abs(dropped - 0.001) < 4 * math.sqrt(0.001 / n)
    dropped = (bridge.BranchDropout(0.999).sample(m, 1.0) == 0).double().mean().item()
    assert abs(dropped - 0.001) < 4 * math.sqrt(0.001 / n)
    low = bridge.CentredBernoulli(0.5, keep=0.999).sample(m, 1.0) < 0
    assert abs(low.double().mean().item() - 0.001) < 4 * math.sqrt(0.001 / n)
    zeta = bridge.Multiplicative(1.0, "uniform", scaling="natural").sample(m, 1.0).double() - 1
    assert abs(zeta.mean().item()) < 4 / math.sqrt(n)
    assert abs(zeta.square().mean().item() - 1) < 4 * math.sqrt(0.8 / n) + 2e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_variables_of_half_precision_are_those_of_single_precision_rounded(dtype):
    n = 1_000_000
    low = bernoulli(0.999).sample((n,), dtype, torch.device("cpu")) < 0
    assert abs(low.double().mean().item() - 0.001) < 4 * math.sqrt(0.001 / n)
    zeta = VARIABLES["uniform"].sample((n,), dtype, torch.device("cpu")).double()
    assert abs(zeta.mean().item()) < 4 / math.sqrt(n)


def test_processes_that_train_together_draw_different_noise(monkeypatch):
    """Ranks with one seed: each has the law, and no two have common or opposite numbers."""
    m, n, found = torch.ones(20_000, 1), 20_000, {}
    for rank in (0, 1, 2, 3):
        for module in ("kolmo.bridge.variables.rank", "kolmo.bridge.branch_laws.rank"):
            monkeypatch.setattr(module, lambda rank=rank: rank)
        for law in (bridge.Additive(1.0), bridge.StochasticDepth(0.7), bridge.Additive(1.0, "uniform")):
            torch.manual_seed(0)
            zeta = law.sample(m, 1.0).double().flatten() - 1
            found.setdefault(str(law.variable.name), []).append(zeta / law.covariance(m[:1], 1.0).sqrt().item())
    for draws_of_ranks in found.values():
        for zeta in draws_of_ranks:
            assert abs(zeta.mean()) < 4 / math.sqrt(n)
            assert abs((zeta**2).mean() - 1) < 4 * math.sqrt(2 / n)
        for i, one in enumerate(draws_of_ranks):
            for other in draws_of_ranks[:i]:
                for shift in (0, 1, -1, 2):
                    assert abs((one * other.roll(shift)).mean()) < 4.5 / math.sqrt(n)


def test_wrapped_models_are_noisy_too():
    class Wrapper(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self._wrapped = inner

        def forward(self, *args):
            return self._wrapped(*args)

    model, x = Shared(), vectors(40)
    bridge.inject(model, bridge.StochasticDepth(0.5))
    wrapped = Wrapper(model).train()
    assert not torch.equal(wrapped(x), wrapped(x))
    assert torch.equal(wrapped.eval()(x), wrapped(x))


def test_schedules_over_calls_and_sites():
    model, x = ARCHITECTURES["mixer"][0](), images(2)
    for keep in ([0.9, 0.5], [0.9, 0.9, 0.5, 0.5]):
        with bridge.inject(model, bridge.StochasticDepth(keep)):
            found = {name: hook.law.keep for name, m in model.named_modules() for hook in m._forward_hooks.values()}
        assert found == {"blocks.0.drop_path": 0.9, "blocks.1.drop_path": 0.5}
    with pytest.raises(InputError, match=r"2 calls of 'blocks.0.drop_path'"):
        bridge.inject(model, bridge.StochasticDepth([0.9, 0.8, 0.7, 0.6]))
    with bridge.inject(model, [bridge.StochasticDepth(0.5), bridge.Additive(0.1)], inputs=[x]) as noise:
        assert noise.sites == ["blocks.0.drop_path", "blocks.1.drop_path"]
    with pytest.raises(InputError, match="3 laws"):
        bridge.inject(model, [bridge.StochasticDepth(0.5)] * 3)


class Torchvision(nn.Module):
    """Row mode of torchvision's StochasticDepth, written from its documentation."""

    def __init__(self, rate):
        super().__init__()
        self.rate = rate

    def forward(self, x):
        if not self.training:
            return x
        noise = torch.empty([x.shape[0]] + [1] * (x.ndim - 1), dtype=x.dtype).bernoulli_(1 - self.rate)
        return x * noise.div_(1 - self.rate)


class WithDepth(PostActivation):
    rate = None

    def __init__(self, inside, outside, stride=1):
        super().__init__(inside, outside, stride)
        self.bn2 = nn.Sequential(self.bn2, Torchvision(self.rate)) if self.rate else nn.Sequential(self.bn2)


def test_stochastic_depth_with_batch_statistics_trains_as_torchvisions_does():
    """The same draws: weights, statistics and losses agree to rounding over a training."""
    theirs = Staged(type("Theirs", (WithDepth,), {"rate": 0.3}))
    ours = Staged(WithDepth)
    ours.load_state_dict(theirs.state_dict())
    noise = bridge.inject(ours, bridge.StochasticDepth(0.7), batchnorm="train")
    assert noise.couples_samples
    assert "no equation for one sample" in str(noise)
    x, y, weights = images(32, 8), torch.randint(5, (32,)), []
    for model in (theirs, ours):
        torch.manual_seed(4)
        optimiser = torch.optim.SGD(model.train().parameters(), 0.1, momentum=0.9)
        for _ in range(8):
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimiser.step()
        weights.append(model.state_dict())
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value, rtol=1e-5, atol=1e-6)
    assert not torch.equal(weights[0]["layer1.0.bn2.0.running_mean"], torch.zeros(6))


def test_frozen_statistics_leave_the_noise_on():
    """The branch ends in a normalisation that stays in evaluation mode; the noise follows the block."""
    model, x = Staged(PostActivation).train(), images(16, 8)
    model(x)
    bridge.inject(model, bridge.StochasticDepth(0.5), batchnorm="freeze")
    assert not torch.equal(model(x), model(x))
    assert not model.layer1[0].bn2.training
    twin = copy.deepcopy(model)
    bridge.eject(twin)
    assert twin.layer1[0].bn2.training
    assert not model.layer1[0].bn2.training
