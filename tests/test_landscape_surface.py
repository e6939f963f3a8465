"""Surfaces: exact quadratics, common random numbers, adaptive placement, restored state, resumption to same bytes."""

import contextlib
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from kolmo import bridge, landscape
from kolmo.errors import InputError
from kolmo.files import read_tree


def quadratic(model):
    """½ wᵀ diag(1 … n) w + 2."""
    w = model.weight.flatten()
    return 2.0 + 0.5 * (torch.arange(1.0, len(w) + 1, dtype=w.dtype) * w**2).sum()


def test_a_quadratic_gives_its_exact_plane():
    model = nn.Linear(3, 2, bias=False).double()
    plane = landscape.random_plane(model, seed=1)
    found = landscape.surface(quadratic, model, plane, span=(-1.5, 0.5), points=(7, 5))
    w, d, e = (part["weight"].flatten().numpy() for part in (plane.origin, *plane.directions))
    a, b = np.meshgrid(np.linspace(-1.5, 0.5, 7), np.linspace(-1.5, 0.5, 5), indexing="ij")
    moved = w + a[..., None] * d + b[..., None] * e
    np.testing.assert_allclose(found.mean, 2 + 0.5 * (moved**2 @ np.arange(1, 7)), rtol=1e-12)
    assert not found.standard_error.any()


def noisy_network(law=None, dtype=torch.float64):
    torch.manual_seed(0)
    branches = [bridge.MLPBranch.create(2, 8, rng=k, dtype=dtype) for k in range(6)]
    net = bridge.NoisyResNet(branches, law or bridge.Additive(0.3))
    model = bridge.FlowClassifier(nn.Linear(6, 2, dtype=dtype), net, nn.Linear(2, 3, dtype=dtype))
    g = torch.Generator().manual_seed(1)
    return model, torch.randn(40, 6, generator=g, dtype=dtype), torch.randint(0, 3, (40,), generator=g)


def test_draws_are_those_of_their_seeds_at_every_point():
    model, x, y = noisy_network()
    plane = landscape.random_plane(model, directions=1)
    found = landscape.surface(lambda f: functional.cross_entropy(f(x), y), model, plane, points=3, draws=4, seed=7)
    again, _, _ = noisy_network()
    for i, alpha in enumerate(found.axes[0]):
        again.load_state_dict(plane.weights(alpha))
        for j in range(4):
            torch.manual_seed(7 + j)
            with torch.no_grad():
                assert found.values["loss"][i, j] == functional.cross_entropy(again(x), y).item()
    expected = found.values["loss"].std(-1, ddof=1) / 2
    np.testing.assert_allclose(found.standard_error, expected)


def spread(values):
    return values.std(ddof=1) / np.sqrt(len(values))


@pytest.mark.parametrize("law", [bridge.Additive(0.3), bridge.BranchDropout(0.7), bridge.CentredBernoulli(0.5)])
def test_common_random_numbers_gain_at_small_steps(law):
    model, x, y = noisy_network(law)
    plane = landscape.random_plane(model, directions=1, one_dimensional="scale")
    cut = landscape.surface(
        lambda f: functional.cross_entropy(f(x), y), model, plane, span=(0.0, 0.04), points=3, draws=64
    )
    values = cut.values["loss"]
    independent = np.hypot(spread(values[0]), spread(values[-1]))
    for i in (1, 2):
        assert cut.rise(at=(0,)).standard_error[i] <= independent / 5


def test_pde_control_gains_at_every_step():
    model, x, y = noisy_network()
    with torch.no_grad():
        model.net.branches = nn.ModuleList([model.net.branches[0]] * model.net.depth)
    plane = landscape.random_plane(model, directions=1, one_dimensional="scale")
    options = {"span": (0.0, 0.3), "points": 3, "draws": 6}
    plain, controlled = (
        landscape.surface(landscape.FlowLoss(x, y, paths=4, control=c, rtol=3e-2), model, plane, **options)
        for c in (False, True)
    )
    values = plain.values["network"]
    for i in (1, 2):
        independent = np.hypot(spread(values[0]), spread(values[i]))
        assert controlled.rise(at=(0,)).standard_error[i] <= independent / 5
    assert np.all(np.abs(controlled.mean - plain.mean) < 5 * plain.standard_error)


def test_pde_loss_on_the_plane_is_that_of_the_classifier():
    model, x, y = noisy_network()
    plane = landscape.random_plane(model, directions=1)
    found = landscape.surface(landscape.FlowLoss(x, y, paths=0), model, plane, span=0.2, points=2)
    model.load_state_dict(plane.weights(-0.2))
    pde = model.pde_loss(x, y, rtol=1e-3, atol=1e-4).item()
    assert found.select("pde").mean[0] == pytest.approx(pde, abs=2e-3)


def test_paired_difference_of_noisy_and_plain():
    model, x, y = noisy_network()
    plane = landscape.random_plane(model)

    def loss(f):
        return functional.cross_entropy(f(x), y)

    noisy = landscape.surface(loss, model, plane, points=3, draws=4, noisy=True)
    plain = landscape.surface(loss, model, plane, points=3, noisy=False)
    gap = noisy.difference(plain)
    np.testing.assert_allclose(gap.mean, noisy.mean - plain.mean)
    np.testing.assert_allclose(gap.standard_error, noisy.standard_error)
    zero = noisy.difference(noisy)
    assert not zero.mean.any()
    assert not zero.standard_error.any()
    other = landscape.surface(loss, model, plane, points=3, draws=4, noisy=True, seed=1)
    with pytest.raises(InputError, match="other draws"):
        noisy.difference(other)


def test_adaptive_placement_meets_its_tolerance_with_fewer_evaluations():
    model = nn.Linear(3, 3, bias=False).double()
    plane = landscape.random_plane(model, seed=2)
    x = torch.linspace(-2, 2, 12, dtype=torch.float64).reshape(4, 3)

    def loss(f):
        z = torch.tanh(f(x))
        return {"loss": (z @ torch.ones(3, dtype=z.dtype)).sin().square().mean() + 0.1 * f.weight.square().sum()}

    full = landscape.surface(loss, model, plane)
    for rtol in (5e-3, 5e-4):
        quick = landscape.surface(loss, model, plane, rtol=rtol)
        error = np.abs(quick.mean - full.mean)
        assert error.max() <= rtol * np.abs(full.mean).max()
        assert quick.interpolation_error["loss"] <= rtol * np.abs(full.mean).max()
        assert not error[quick.evaluated].any()
        if rtol == 5e-3:
            assert quick.evaluated.sum() * 3.5 < full.evaluated.sum()


def test_a_network_in_bfloat16():
    model = nn.Linear(4, 3, bias=False)
    plane = landscape.random_plane(model)
    whole = landscape.surface(lambda f: f.weight.square().sum(), model, plane, points=5)
    model = model.bfloat16()
    plane = landscape.random_plane(model)
    half = landscape.surface(lambda f: f.weight.float().square().sum(), model, plane, points=5)
    np.testing.assert_allclose(half.mean, whole.mean, rtol=0.05)


def test_a_line_with_batch_normalisation_ends_at_the_second_network():
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))

    def made(seed):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6, momentum=None), nn.Linear(6, 1))
        model(x)  # running statistics of the data at these weights
        return model.eval()

    def loss(f):
        return f(x).square().mean()

    first, second = made(0), made(1)
    options = {"batchnorm": "recalibrate", "calibrate": lambda f: f(x)}
    found = landscape.surface(loss, first, landscape.line(first, second), span=(0.0, 1.0), points=2, **options)
    assert found.mean[1] == pytest.approx(loss(second).item(), rel=1e-5)


class Stateful(nn.Module):
    """Dropout, batch normalisation, a counter that each pass replaces, and gradients."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm, self.drop = nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(0.5)
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, x):
        self.passes = self.passes + 1
        return self.drop(self.norm(self.linear(x)))


def stateful():
    torch.manual_seed(3)
    model, x = Stateful(), torch.randn(20, 4)
    model(x).square().mean().backward()
    model.drop.eval()
    return model, x


def state(model):
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    gradients = {f"{n}.grad": p.grad.clone() for n, p in model.named_parameters()}
    modes = [m.training for m in model.modules()]
    return {**tensors, **gradients}, modes, torch.get_rng_state(), np.random.get_state()[1], random.getstate()  # noqa: NPY002


def same(a, b):
    return (
        all(torch.equal(a[0][name], b[0][name]) for name in a[0])
        and a[1] == b[1]
        and torch.equal(a[2], b[2])
        and np.array_equal(a[3], b[3])
        and a[4] == b[4]
    )


@pytest.mark.parametrize("batchnorm", ["freeze", "batch", "recalibrate"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("at", [1, 2, 3, 7, 30, None])
def test_state_comes_back_whatever_happens(batchnorm, error, at):
    model, x = stateful()
    objects = dict(model.named_parameters())
    before, calls = state(model), [0]

    def touch():
        calls[0] += 1
        np.random.rand()  # noqa: NPY002
        random.random()
        if calls[0] == at:
            raise error

    def loss(f):
        touch()
        value = f(x).square().mean()
        with torch.enable_grad():
            f(x).square().mean().backward()
        touch()
        return value

    def calibrate(f):
        touch()
        f(x)

    plane = landscape.random_plane(model)
    options = {"calibrate": calibrate} if batchnorm == "recalibrate" else {}
    calm = {"points": 3, "draws": 2, "noisy": True, "batchnorm": batchnorm}
    if at is None:
        landscape.surface(loss, model, plane, **calm, **options)
    else:
        with pytest.raises(error):
            landscape.surface(loss, model, plane, **calm, **options)
    assert same(before, state(model))
    assert all(objects[name] is p for name, p in model.named_parameters())


@pytest.mark.parametrize("stage", [1, 4, 9, 12, 15])
def test_state_comes_back_from_curvature_and_sharpness(stage):
    for measure in (
        lambda loss, model: landscape.curvature(loss, model, top=2, probes=2, density_probes=1, draws=2, noisy=True),
        lambda loss, model: landscape.sharpness(loss, model, pairs=2, draws=2, noisy=True),
        lambda loss, model: landscape.hessian_plane(loss, model, draws=2, noisy=True),
    ):
        model, x = stateful()
        before, calls = state(model), [0]

        def loss(f, x=x, calls=calls):
            calls[0] += 1
            if calls[0] == stage:
                raise KeyboardInterrupt
            return f(x).square().mean()

        with pytest.raises(KeyboardInterrupt):
            measure(loss, model)
        assert same(before, state(model))


def test_batchnorm_policies():
    model, x = stateful()
    shifted = x + 5.0
    plane = landscape.random_plane(model)

    def mean_of_normalised(f):
        return f.norm(f.linear(shifted)).mean()

    found = {
        policy: landscape.surface(
            mean_of_normalised,
            model,
            plane,
            span=0.5,
            points=3,
            batchnorm=policy,
            **({"calibrate": lambda f: f(shifted)} if policy == "recalibrate" else {}),
        )
        for policy in ("freeze", "batch", "recalibrate")
    }
    # Statistics of the data that pass through centre them; frozen ones are those of other data.
    np.testing.assert_allclose(found["batch"].mean, 0.0, atol=1e-5)
    np.testing.assert_allclose(found["recalibrate"].mean, 0.0, atol=1e-5)
    assert np.abs(found["freeze"].mean).min() > 0.1
    assert found["batch"].settings["batchnorm"] == "batch"
    with pytest.raises(InputError, match="calibrate"):
        landscape.surface(mean_of_normalised, model, plane, points=3, batchnorm="recalibrate")


@pytest.mark.parametrize(("rtol", "points", "share"), [(None, 10, 0.1), (1e-4, 21, 0.95)])
def test_an_interrupted_surface_resumes_to_the_same_bytes(tmp_path, rtol, points, share):
    model, x, y = noisy_network(bridge.BranchDropout(0.8))
    x, y, plane = x[:5], y[:5], landscape.random_plane(model)
    calls, stop = [0], -1

    def loss(f):
        calls[0] += 1
        if calls[0] == stop:
            raise KeyboardInterrupt
        scores = f(x)
        return {"loss": functional.cross_entropy(scores, y), "accuracy": (scores.argmax(-1) == y).double().mean()}

    def spent(path, **changes):
        """Calls of the loss that a surface took."""
        calls[0] = 0
        with contextlib.suppress(KeyboardInterrupt):
            landscape.surface(loss, model, plane, path=path, **{**options, **changes})
        return calls[0]

    options = {"points": points, "draws": 2, "rtol": rtol}
    whole, broken = tmp_path / "whole.npz", tmp_path / "broken.npz"
    total = spent(whole)
    # By tolerance a late stop is in a round of refinement: what its file holds must not enter the rounds before.
    stopped = stop = int(share * total)
    assert spent(broken) == stopped
    with pytest.raises(InputError, match="finished"):
        landscape.Surface.load(broken)
    stop = -1
    assert spent(broken) <= total - stopped + 2 + 5  # the draws of the point in flight, and the look for randomness
    assert whole.read_bytes() == broken.read_bytes()
    assert spent(whole) <= 5  # it was finished: the origin alone is compared
    with pytest.raises(InputError, match="path"):
        spent(whole, points=5)


def test_files_hold_plain_arrays(tmp_path):
    model = nn.Linear(2, 2)
    plane = landscape.random_plane(model, seed=4)
    landscape.surface(quadratic, model, plane, points=3).save(tmp_path / "s.npz")
    tree = read_tree(tmp_path / "s.npz")["surface"]
    assert tree["plane"]["seed"] == 4
    np.testing.assert_allclose(tree["plane"]["gram"], plane.gram)


def test_bad_input_is_named():
    model = nn.Linear(2, 2)
    plane = landscape.random_plane(model)
    with pytest.raises(InputError, match="scalar"):
        landscape.surface(lambda f: f.weight, model, plane, points=3)
    with pytest.raises(InputError, match="empty"):
        landscape.surface(lambda f: {}, model, plane, points=3)
    with pytest.raises(InputError, match="plane"):
        landscape.surface(quadratic, nn.Linear(3, 2), plane, points=3)
    for bad in (
        {"points": 1},
        {"points": 2.7},
        {"points": (3, 3, 3)},
        {"draws": 0},
        {"draws": 2.0},
        {"seed": 1.5},
        {"seed": None},
        {"span": -1.0},
        {"span": np.inf},
        {"span": "wide"},
        {"span": (1.0, (0.0,))},
        {"rtol": 0.0},
        {"rtol": np.nan},
        {"batchnorm": "on"},
    ):
        with pytest.raises(InputError, match=next(iter(bad))):
            landscape.surface(quadratic, model, plane, **{"points": 3, **bad})


def test_names_that_change_are_refused():
    model, calls = nn.Linear(2, 2), [0]

    def loss(f):
        calls[0] += 1
        return {"loss" if calls[0] < 9 else "other": f.weight.square().sum()}

    with pytest.raises(InputError, match="names"):
        landscape.surface(loss, model, landscape.random_plane(model), points=3)


class Skipping(nn.Module):
    """Two layers that a whole batch skips with probability 0.1: most seeds give the same loss."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])

    def forward(self, x):
        for layer in self.layers:
            x = x + (torch.rand(()) < 0.9) * layer(x)
        return x


@pytest.mark.parametrize("seed", range(8))
def test_rare_events_are_random_too(seed):
    torch.manual_seed(0)
    model, x = Skipping(), torch.ones(3, 2)
    plane = landscape.random_plane(model, directions=1)
    found = landscape.surface(lambda f: f(x).square().mean(), model, plane, points=3, draws=24, seed=seed)
    np.testing.assert_allclose(found.standard_error, found.values["loss"].std(-1, ddof=1) / np.sqrt(24))
    assert found.standard_error.all()


@pytest.mark.parametrize("measure", ["surface", "curvature", "sharpness"])
def test_noise_that_the_seed_does_not_fix_is_refused(measure, rng):
    model = nn.Linear(2, 2)

    def loss(f):
        return f.weight.square().sum() * (1 + 0.1 * rng.normal())

    options = {"plane": landscape.random_plane(model), "points": 3} if measure == "surface" else {}
    with pytest.raises(InputError, match="torch's global generator"):
        getattr(landscape, measure)(loss, model, **options)


def test_a_file_of_another_law_is_refused(tmp_path):
    path, found = tmp_path / "s.npz", []
    for strength in (0.1, 0.1, 2.0):
        model, x, y = noisy_network(bridge.Additive(strength))
        plane = landscape.random_plane(model)
        options = {"points": np.int64(5), "draws": np.int64(2), "seed": np.int32(3), "noisy": np.True_}

        def loss(f, x=x, y=y):
            return functional.cross_entropy(f(x), y)

        if strength == 2.0:
            with pytest.raises(InputError, match="path"):
                landscape.surface(loss, model, plane, path=path, rtol=np.float64(0.1), **options)
        else:  # whatever kind of integers the settings are
            found.append(landscape.surface(loss, model, plane, path=path, rtol=np.float64(0.1), **options))
    np.testing.assert_array_equal(*(one.mean for one in found))


def test_a_second_quantity_that_is_not_finite_is_no_mistake():
    model = nn.Linear(2, 2)

    def loss(f):
        value = f.weight.square().sum()
        return {"loss": value, "odd": 1 / (value - value)}

    found = landscape.surface(loss, model, landscape.random_plane(model), points=21, rtol=1e-2, draws=2)
    assert found.evaluated.all()
    assert np.isinf(found.select("odd").mean).all()
    assert not found.random
    nowhere = landscape.surface(
        lambda f: f.weight.sum() * torch.nan, model, landscape.random_plane(model), points=3, draws=2
    )
    assert not nowhere.random


@pytest.mark.parametrize("odd", ["loss", "other"])
def test_values_that_are_not_finite_between_the_first_lines_are_found(odd):
    model = nn.Linear(2, 2).double()
    plane = landscape.random_plane(model, directions=1)
    x = plane.directions[0]["weight"]

    def loss(f):
        alpha = ((f.weight - plane.origin["weight"]) * x).sum() / x.square().sum()
        hole = torch.nan if 0.03 < alpha < 0.21 else 1.0  # between the lines at 0 and 0.25
        found = {"loss": 2 + alpha.sin(), "other": 2 + alpha.cos()}
        return found | {odd: found[odd] * hole}

    full, quick = (landscape.surface(loss, model, plane, points=65, rtol=rtol) for rtol in (None, 1e-2))
    np.testing.assert_array_equal(quick.values[odd], full.values[odd])
    assert np.isnan(full.values[odd]).any()


def test_what_a_loss_does_to_the_model_is_undone():
    model = nn.Linear(2, 2)

    def loss(f):
        f.bias.requires_grad_(False)
        f.register_buffer("seen", torch.ones(()), persistent=False)
        f.extra = nn.Linear(2, 2)
        return f.weight.square().sum()

    landscape.surface(loss, model, landscape.random_plane(model), points=3)
    assert model.bias.requires_grad
    assert not dict(model.named_buffers())
    assert not model._non_persistent_buffers_set
    assert list(model.modules()) == [model]


def test_sums_in_another_order_are_no_noise():
    model, calls = nn.Linear(2, 2), [0]

    def loss(f):
        calls[0] += 1
        value = f.weight.square().sum() * (1 + 1e-7 * (calls[0] % 2))
        return {"loss": value, "difference": value - f.weight.square().sum()}  # the second is rounding alone

    found = landscape.surface(loss, model, landscape.random_plane(model), points=3)
    assert not found.standard_error.any()


def test_flow_loss_follows_the_law_of_the_model():
    model, x, y = noisy_network()
    loss = landscape.FlowLoss(x, y, paths=0)
    for law in (bridge.Additive(0.1), bridge.Additive(2.0), bridge.StochasticDepth(0.5)):
        model.net.noise = nn.ModuleList([law] * model.net.depth)
        assert loss(model) == landscape.FlowLoss(x, y, paths=0)(model)
    before = loss(model)["pde"]
    with torch.no_grad():
        next(model.net.branches[0].parameters()).add_(1.0)
    assert loss(model)["pde"] != before


@pytest.mark.parametrize("features", [1, 2])
def test_flow_losses_in_single_precision(features):
    for seed in range(6):
        torch.manual_seed(seed)
        net = bridge.NoisyResNet([bridge.MLPBranch.create(features, 16, rng=seed)] * 4, bridge.Additive(0.3))
        head = nn.Linear(features, 10)
        with torch.no_grad():
            head.weight.mul_(6)
        model = bridge.FlowClassifier(nn.Linear(3, features), net, head)
        x, y = 2 * torch.randn(20, 3), torch.randint(0, 10, (20,))
        single = landscape.FlowLoss(x, y, paths=0)(model)["pde"]
        double = landscape.FlowLoss(x.double(), y, paths=0)(model.double())["pde"]
        assert single == pytest.approx(double, rel=2e-3)


@pytest.mark.parametrize("rtol", [3e-2, 3e-3])
def test_the_stated_error_of_an_interpolated_surface_holds_where_nothing_was_evaluated(rtol):
    """The largest error anywhere, of waves drawn at random, against what the left-out cells said of it."""
    from kolmo.landscape.placement import place

    axes, rng = (np.linspace(-1.0, 1.0, 41),) * 2, np.random.default_rng(0)
    points = np.stack(np.meshgrid(*axes, indexing="ij"), -1)
    for _ in range(12):
        waves, phases = rng.normal(size=(4, 2)) * rng.uniform(1.0, 4.0), rng.uniform(0.0, 6.0, 4)
        exact = np.sin(points @ waves.T + phases).sum(-1) + 3.0 * (points**2).sum(-1)
        store = SimpleNamespace(values={"loss": np.full((*exact.shape, 1), np.nan)}, done=np.zeros(exact.shape, bool))

        def wanted(places, store=store, exact=exact):
            for at in places:
                store.values["loss"][at], store.done[at] = exact[at], True

        values, stated = place(wanted, store, axes, rtol)
        assert np.abs(values["loss"][..., 0] - exact).max() <= max(stated["loss"], 1e-12)
        assert stated["loss"] <= rtol * np.abs(exact).max()
