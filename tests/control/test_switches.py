"""Terminal data whose derivative autograd silently takes as zero are told apart from those it differentiates."""

import warnings

import pytest
import torch

import kolmo
from kolmo import control
from kolmo.errors import KolmoWarning

K = torch.tensor(0.37, dtype=torch.float64, requires_grad=True)

SILENT = {
    "step": lambda x: (x[..., 0] > K).double(),
    "where": lambda x: torch.where(x[..., 0] < K, 0.0 * K, 1.0 + K),
    "heaviside": lambda x: torch.heaviside(x[..., 0] - K, torch.tensor(0.5, dtype=torch.float64)),
    "sign": lambda x: torch.stack([x[..., 0] ** 2, 2.0 + torch.sign(K - x[..., 0])], -1),
    "cash or nothing": lambda x: x[..., 0] * (x[..., 0] >= K),
}
SEEN = {
    "call by mask": lambda x: (x[..., 0] - K) * (x[..., 0] > K),
    "call by clamp": lambda x: torch.clamp(x[..., 0] - K, min=0.0),
    "call by where": lambda x: torch.where(x[..., 0] > K, x[..., 0] - K, 0.0 * K),
    "smooth step": lambda x: torch.sigmoid((x[..., 0] - K) / 0.05),
    "fixed step": lambda x: K * (x[..., 0] > 0.37),
    "relu network": lambda x: torch.relu(K * x[..., 0] + 0.1) + torch.relu(x[..., 0] - K),
    "switch outside": lambda x: x[..., 0] * (x[..., 0] > 100.0 + K),
}


def problem(terminal, dim=1):
    sde = kolmo.SDE(0.0, 0.5, dim=dim, arrays="torch")
    return kolmo.KolmogorovProblem(sde, terminal, 0.5, kolmo.Box([-3.0] * dim, [3.0] * dim))


def differentiated(terminal, dim=1):
    p = problem(terminal, dim)
    recipe = kolmo.solve(p, grid=25, steps=4, stepper="radau5").discretization
    return control.value(p, torch.zeros(1, dim), discretization=recipe)


@pytest.mark.parametrize("name", SILENT)
def test_a_silent_zero_is_told(name):
    with pytest.warns(KolmoWarning, match="terminal jumps"):
        differentiated(SILENT[name])


@pytest.mark.parametrize("name", SEEN)
def test_what_autograd_sees_is_left_in_peace(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        differentiated(SEEN[name])


def test_in_two_dimensions_too_and_where_it_jumps():
    with pytest.warns(KolmoWarning, match="terminal jumps by 1 near"):
        differentiated(lambda x: (x.sum(-1) > K).double(), dim=2)


def test_minimize_still_names_the_parameter_that_does_not_matter():
    p = problem(SILENT["step"])
    with pytest.warns(KolmoWarning, match="terminal jumps"), pytest.raises(kolmo.InputError, match="objective"):
        control.minimize(lambda: control.value(p, [0.0], rtol=1e-2).sum(), K)
