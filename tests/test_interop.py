"""torchsde and xarray: what goes out and comes back is the same process, the same numbers."""

import numpy as np
import pytest
import torch

import kolmo
from kolmo import control
from kolmo.errors import InputError
from kolmo.interop import TorchSDE

torchsde = pytest.importorskip("torchsde")


class Module(torch.nn.Module):
    """dy = −κ y dt + noise, with noise of a given type, Itô or Stratonovich."""

    def __init__(self, noise_type, sde_type):
        super().__init__()
        self.noise_type, self.sde_type = noise_type, sde_type
        self.kappa = torch.nn.Parameter(torch.tensor(0.5, dtype=torch.float64))

    def f(self, t, y):
        return -self.kappa * y + 0.1 * t

    def g(self, t, y):
        shape = {
            "diagonal": lambda: 0.3 + 0.2 * torch.sin(y),
            "scalar": lambda: (0.3 * y.flip(-1))[..., None],
            "additive": lambda: torch.tensor([[0.3, 0.1], [0.0, 0.2]], dtype=y.dtype).expand(len(y), 2, 2),
            "general": lambda: torch.stack([0.3 * y, torch.cos(y.flip(-1)), 0.1 * torch.ones_like(y)], -1),
        }
        return shape[self.noise_type]()


TYPES = ["diagonal", "scalar", "additive", "general"]


@pytest.mark.parametrize("noise_type", TYPES)
def test_coefficients_are_those_of_the_module_with_the_ito_correction(noise_type, rng):
    x = torch.as_tensor(rng.normal(size=(4, 3, 2)))
    ito, stratonovich = Module(noise_type, "ito"), Module(noise_type, "stratonovich")
    g = ito.g(torch.tensor(0.3), x.reshape(-1, 2))
    g = torch.diag_embed(g) if noise_type == "diagonal" else g
    plain = kolmo.SDE.from_torchsde(ito, dim=2)
    assert torch.allclose(plain.covariance(0.3, x), (g @ g.mT).reshape(4, 3, 2, 2))
    assert torch.allclose(plain.drift(0.3, x), ito.f(0.3, x))
    corrected = kolmo.SDE.from_torchsde(stratonovich, dim=2)
    # ½ Σ_j (g_j·∇) g_j by differences along the columns
    matrix = lambda y: torch.diag_embed(ito.g(0.3, y)) if noise_type == "diagonal" else ito.g(0.3, y)  # noqa: E731
    y, h = x.reshape(-1, 2), 1e-5
    steps = [(matrix(y + h * g[..., j]) - matrix(y - h * g[..., j]))[..., j] / (2 * h) for j in range(g.shape[-1])]
    correction = 0.5 * sum(steps).reshape(x.shape)
    assert torch.allclose(corrected.drift(0.3, x) - plain.drift(0.3, x), correction, atol=1e-9)
    assert (noise_type == "additive") == bool((correction.abs() < 1e-12).all())


def test_parameters_of_a_module_have_exact_gradients():
    module = Module("diagonal", "ito")
    problem = kolmo.KolmogorovProblem(kolmo.SDE.from_torchsde(module, dim=1), lambda x: x[..., 0], 1.0)
    control.value(problem, [1.0], rtol=1e-4).sum().backward()
    kappa = 0.5  # E X_1 = e^{-κT} + 0.1 ∫ s e^{-κ(T-s)} ds
    mean = lambda k: np.exp(-k) + 0.1 * (1 / k - (1 - np.exp(-k)) / k**2)  # noqa: E731
    exact = (mean(kappa + 1e-6) - mean(kappa - 1e-6)) / 2e-6
    assert abs(module.kappa.grad.item() - exact) < 1e-3


def test_torchsde_simulates_kolmos_process_and_finds_the_same_mean():
    sde = kolmo.SDE(lambda t, x: -x + 0.2 * t, lambda t, x: 0.2 + 0.1 * abs(x), dim=1, arrays="torch")
    terminal = lambda x: x[..., 0] ** 2  # noqa: E731
    problem = kolmo.KolmogorovProblem(sde, terminal, 1.0)
    u = kolmo.solve(problem, at=[1.0], rtol=1e-4)(1.0)
    noise = torchsde.BrownianInterval(0.0, 1.0, size=(20_000, 1), entropy=3, dtype=torch.float64)
    start = torch.ones(20_000, 1, dtype=torch.float64)
    with torch.no_grad():
        end = torchsde.sdeint(TorchSDE(sde), start, torch.tensor([0.0, 1.0]), bm=noise, dt=0.02, method="euler")[-1]
    sample = terminal(end)
    error = sample.std().item() / np.sqrt(len(sample))
    assert abs(sample.mean().item() - float(u)) < 4 * error + 0.01 * float(u)


def test_there_and_back_is_the_same_process(rng):
    sde = kolmo.SDE(lambda t, x: -x * x.roll(1, -1), [[0.1, 0.0, 0.3], [0.2, 0.5, 0.0]], dim=2, arrays="torch")
    back = kolmo.SDE.from_torchsde(TorchSDE(sde), dim=2)
    x = torch.as_tensor(rng.normal(size=(5, 2)))
    assert torch.equal(back.drift(0.2, x), sde.drift(0.2, x))
    assert torch.equal(back.covariance(0.2, x), sde.covariance(0.2, x))


def test_the_adapter_finds_the_parameters_and_keeps_single_precision():
    drift = torch.nn.Linear(2, 2)

    class Drift(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = drift

        def forward(self, t, x):
            return self.inner(x)

    module = TorchSDE(kolmo.SDE(Drift(), diffusion=0.1, dim=2))
    assert {id(p) for p in module.parameters()} == {id(p) for p in drift.parameters()}
    end = torchsde.sdeint(module, torch.ones(3, 2), torch.tensor([0.0, 0.1]), dt=0.05, method="euler")[-1]
    assert end.dtype == torch.float32
    end.sum().backward()
    assert drift.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [({"noise_type": "white"}, "noise_type"), ({"sde_type": None}, "sde_type"), ({"f": None}, r"module\.f")],
)
def test_other_modules_are_refused(change, message):
    module = Module("diagonal", "ito")
    for name, value in change.items():
        setattr(module, name, value)
    with pytest.raises(InputError, match=message):
        kolmo.SDE.from_torchsde(module, dim=1)
    with pytest.raises(InputError, match="without noise"):
        TorchSDE(kolmo.SDE(0.0, dim=1))


def test_an_xarray_has_the_values_with_their_places():
    pytest.importorskip("xarray")
    sde = kolmo.SDE(0.0, diffusion=0.3, dim=2)
    box = kolmo.Box([0, 0], [1, 2], boundary="reflecting")
    problem = kolmo.KolmogorovProblem(sde, lambda x: x, 1.0, box)
    sol = kolmo.solve(problem, grid=(9, 17), steps=4, save=[0.5, 1.0])
    u = sol.to_xarray()
    assert u.dims == ("t", "x1", "x2", "column")
    assert u.sel(t=0.5, column=1).interp(x1=0.5, x2=1.25).item() == pytest.approx(sol([0.5, 1.25], 0.5)[1], abs=1e-3)
    assert np.array_equal(u.values, sol.values)
    assert u.attrs["status"] == "fixed"
