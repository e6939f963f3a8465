"""Losses over batches: the same numbers as the whole, in the memory of one batch; attention; blocks of the Hessian."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from kolmo import landscape
from kolmo.errors import InputError

sys.path.insert(0, str(Path(__file__).parent / "bridge"))
from architectures import ARCHITECTURES

X, Y = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)), torch.arange(50) % 3


def network(*, dropout=0.0):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Dropout(dropout), nn.Linear(5, 3))


def of_batch(f, batch):
    scores = f(batch[0])
    return {
        "loss": functional.cross_entropy(scores, batch[1]),
        "accuracy": (scores.argmax(-1) == batch[1]).float().mean(),
    }


def whole(f):
    return of_batch(f, (X, Y))


LOADER = DataLoader(TensorDataset(X, Y), batch_size=16)  # the last one is smaller


def test_surface_and_curvature_are_those_of_the_whole():
    model, loss = network(), landscape.BatchLoss(of_batch, LOADER)
    plane = landscape.random_plane(model, seed=0)
    surfaces = [landscape.surface(one, model, plane, points=3, noisy=False) for one in (loss, whole)]
    np.testing.assert_allclose(surfaces[0].mean, surfaces[1].mean, rtol=1e-5)
    np.testing.assert_allclose(surfaces[0].select("accuracy").mean, surfaces[1].select("accuracy").mean, rtol=1e-5)
    curvatures = [landscape.curvature(one, model, top=3, probes=6, density_probes=0) for one in (loss, whole)]
    np.testing.assert_allclose(curvatures[0].eigenvalues, curvatures[1].eigenvalues, rtol=1e-3)
    assert curvatures[0].trace == pytest.approx(curvatures[1].trace, rel=1e-3)
    assert curvatures[0].loss == pytest.approx(curvatures[1].loss, rel=1e-6)
    assert curvatures[0].gradient_norm == pytest.approx(curvatures[1].gradient_norm, rel=1e-5)


def test_noise_is_drawn_alike_in_every_product():
    loss = landscape.BatchLoss(of_batch, LOADER)
    curv = landscape.curvature(loss, network(dropout=0.3), top=2, draws=3, noisy=True, probes=0, density_probes=0)
    assert np.all(curv.residuals < 2e-3 * curv.eigenvalues[0])
    assert np.all(curv.eigenvalue_standard_error > 0)


PROGRAM = """
import resource, torch
from torch import nn
from kolmo import landscape
torch.set_num_threads(1)
model, x = nn.Sequential(nn.Linear(8, 1000), nn.Tanh(), nn.Linear(1000, 1)), torch.randn(20000, 8)
def most(count):
    loss = landscape.BatchLoss(lambda f, z: f(z).square().mean(), x.chunk(count))
    landscape.curvature(loss, model, top=1, max_products=2, probes=0, density_probes=0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
most(1000)
start = most(1000)
print(most(40) - start, most(1) - start)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the unit of ru_maxrss")
def test_a_product_takes_the_memory_of_one_batch():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    batched, at_once = map(float, done.stdout.split())
    assert batched < 0.2 * at_once


@pytest.mark.parametrize("name", ["vit", "encoder (B, T, D)"])
def test_curvature_of_attention(name):
    make, inputs, _, _, _ = ARCHITECTURES[name]
    model, x = make().eval(), inputs(4)
    curv = landscape.curvature(lambda f: f(x).square().mean(), model, top=1, probes=0, density_probes=0)
    assert curv.eigenvalues[0] > 0


def test_blocks_of_the_hessian():
    model = network().double()
    data = X.double()

    def loss(f):
        return functional.cross_entropy(f(data), Y)

    parameters = dict(model.named_parameters())

    def of_weight(w):
        return functional.cross_entropy(torch.func.functional_call(model, {**parameters, "3.weight": w}, data), Y)

    dense = torch.func.hessian(of_weight)(parameters["3.weight"].detach()).detach().reshape(15, 15)
    curv = landscape.curvature(loss, model, top=3, where="3.weight", probes=0, density_probes=0)
    assert curv.parameters == 15
    np.testing.assert_allclose(curv.eigenvalues, torch.linalg.eigvalsh(dense).flip(0)[:3].numpy(), rtol=1e-6)
    assert landscape.curvature(loss, model, top=1, where="3.*", probes=0, density_probes=0).parameters == 18
    with pytest.raises(InputError, match="does not cross dots"):
        landscape.curvature(loss, model, where="3")


def test_bad_batches_are_named():
    with pytest.raises(InputError, match="used up"):
        landscape.BatchLoss(of_batch, iter(LOADER))
    with pytest.raises(InputError, match="none"):
        landscape.BatchLoss(of_batch, [])
    with pytest.raises(InputError, match="samples in front"):
        landscape.BatchLoss(of_batch, ["text"])
