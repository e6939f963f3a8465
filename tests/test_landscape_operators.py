"""Gauss–Newton and Fisher matrices against dense ones, operators of others, eigenvalues alone."""

import numpy as np
import pytest
import scipy.sparse.linalg as spla
import torch
from torch import nn
from torch.func import functional_call, jacrev
from torch.nn import functional

from kolmo import landscape
from kolmo.errors import InputError

DOUBLE = torch.float64


def problem():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    x, y = torch.randn(12, 3, dtype=DOUBLE), torch.randint(0, 4, (12,))
    return model, x, y


def jacobian(model, x):
    """J of all outputs, shape (samples, outputs, parameters)."""
    weights = {name: p.detach() for name, p in model.named_parameters()}
    found = jacrev(lambda w: functional_call(model, w, (x,)))(weights)
    return torch.cat([found[name].flatten(2) for name in weights], 2)


def dense(kind, model, x, y):
    J, o = jacobian(model, x), model(x).detach()
    p = o.softmax(1)
    if kind == "ggn":
        curvatures = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
        return torch.einsum("nop,noq,nqr->pr", J, curvatures, J).numpy() / len(x)
    slopes = torch.einsum("nop,no->np", J, p - functional.one_hot(y, 4))
    return (slopes.T @ slopes).numpy() / len(x)


@pytest.mark.parametrize("batches", [None, 5])
@pytest.mark.parametrize("kind", ["ggn", "fisher"])
def test_against_dense_matrices(kind, batches):
    model, x, y = problem()
    loss = lambda f: functional.cross_entropy(f(x), y)  # noqa: E731
    if batches:
        data = list(zip(x.split(batches), y.split(batches), strict=True))
        loss = landscape.BatchLoss(lambda f, batch: functional.cross_entropy(f(batch[0]), batch[1]), data)
    exact = dense(kind, model, x, y)
    found = landscape.curvature(loss, model, kind=kind, top=4, rtol=1e-8, probes=40, density_probes=0)
    values = np.linalg.eigvalsh(exact)[::-1]
    np.testing.assert_allclose(found.eigenvalues, values[:4], rtol=1e-7)
    assert abs(found.trace - np.trace(exact)) <= 3 * found.trace_standard_error + 1e-9
    vector = torch.cat([v.flatten() for v in found.eigenvectors[0].values()]).numpy()
    np.testing.assert_allclose(exact @ vector, values[0] * vector, atol=1e-7)
    assert found.settings["kind"] == kind


def test_gauss_newton_is_the_hessian_of_a_linear_model():
    torch.manual_seed(0)
    model, x, y = nn.Linear(4, 3).double(), torch.randn(9, 4, dtype=DOUBLE), torch.randint(0, 3, (9,))
    loss = lambda f: functional.cross_entropy(f(x), y)  # noqa: E731
    one, other = (landscape.eigenvalues(loss, model, kind=kind, rtol=1e-8) for kind in ("hessian", "ggn"))
    np.testing.assert_allclose(one.eigenvalues, other.eigenvalues, rtol=1e-7)


def test_a_block_and_noise():
    model, x, y = problem()
    noisy = nn.Sequential(model, nn.Dropout(0.3))
    found = landscape.curvature(
        lambda f: functional.cross_entropy(f(x), y), noisy, kind="ggn", where="0.2.**", top=2, draws=4, noisy=True
    )
    assert found.parameters == 24
    assert (found.eigenvalue_standard_error > 0).all()
    assert found.smallest > -1e-9


def test_eigenvalues_alone_take_few_products():
    model, x, y = problem()
    loss = lambda f: functional.cross_entropy(f(x), y)  # noqa: E731
    alone, everything = landscape.eigenvalues(loss, model, top=3), landscape.curvature(loss, model, top=3)
    np.testing.assert_allclose(alone.eigenvalues, everything.eigenvalues, rtol=1e-6)
    assert alone.products < 0.4 * everything.products
    assert np.isnan(alone.trace)
    assert alone.nodes.size == 0


class Torch:
    """As curvlinops writes them: shape, dtype and device, and ``@`` on tensors."""

    def __init__(self, matrix):
        self.matrix, self.shape, self.dtype, self.device = matrix, tuple(matrix.shape), matrix.dtype, matrix.device

    def __matmul__(self, v):
        assert isinstance(v, torch.Tensor)
        return self.matrix @ v


@pytest.mark.parametrize("library", ["torch", "scipy"])
def test_operators_of_others(library):
    a = np.random.default_rng(0).standard_normal((60, 60))
    A = a + a.T
    operator = Torch(torch.tensor(A)) if library == "torch" else spla.aslinearoperator(A)
    found = landscape.curvature(operator, top=3, rtol=1e-8, probes=30)
    np.testing.assert_allclose(found.eigenvalues, np.linalg.eigvalsh(A)[::-1][:3], rtol=1e-7)
    assert abs(found.trace - np.trace(A)) <= 3 * found.trace_standard_error
    assert found.eigenvectors[0]["x"].shape == (60,)
    assert found.fraction_below(0.0)[0] == pytest.approx((np.linalg.eigvalsh(A) < 0).mean(), abs=0.15)


def test_refusals():
    model, x, y = problem()
    loss = lambda f: functional.cross_entropy(f(x), y)  # noqa: E731
    cases = [
        (loss, model, {"kind": "kfac"}),
        (loss, None, {}),
        (np.ones((3, 4)), None, {}),
        (lambda f: sum(p.square().sum() for p in f.parameters()), model, {"kind": "ggn"}),
    ]
    for given, network, options in cases:
        with pytest.raises(InputError):
            landscape.curvature(given, network, **options)
