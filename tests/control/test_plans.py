"""Plans that are kept between calls: they serve while they are honest, for problems that differ in parameters alone."""

import gc
import importlib
import logging

import numpy as np
import pytest
import torch

import kolmo
from kolmo import ToleranceWarning, control
from kolmo.control.plans import LASTING
from kolmo.control.structure import structure


@pytest.fixture(autouse=True)
def _forgotten():
    LASTING.clear()


@pytest.fixture
def planned(monkeypatch):
    """Counts searches for a plan."""
    module, calls = importlib.import_module("kolmo.control.plans"), []
    original = module.search
    monkeypatch.setattr(module, "search", lambda *args, **kw: calls.append(1) or original(*args, **kw))
    return calls


def leaf(v):
    return torch.tensor(v, dtype=torch.float64, requires_grad=True)


def bump(kappa, sigma, sharp, mean):
    """An OU process and a bump, made anew."""
    sde = kolmo.SDE(lambda t, x: -kappa * x, lambda t, x: sigma + 0 * x, dim=1)
    return kolmo.KolmogorovProblem(sde, lambda x: torch.exp(-0.5 * (sharp * (x[..., 0] - mean)) ** 2), 1.0)


def exact(x, kappa, sigma, sharp, mean):
    """E exp(−½ s² (X − m)²) of a Gaussian X."""
    m = x * np.exp(-kappa) - mean
    v = sigma**2 * (1 - np.exp(-2 * kappa)) / (2 * kappa)
    return np.exp(-0.5 * sharp**2 * m**2 / (1 + sharp**2 * v)) / np.sqrt(1 + sharp**2 * v)


def test_a_loop_of_torch_plans_once_while_little_changes(planned):
    parameters = [leaf(v) for v in (1.0, 0.7, 1.0, 0.2)]
    optimizer = torch.optim.SGD(parameters, lr=1e-3)
    x = torch.linspace(-1.0, 1.0, 5, dtype=torch.float64)
    for _ in range(30):
        optimizer.zero_grad()
        control.value(bump(*parameters), x, rtol=1e-4).sum().backward()
        optimizer.step()
    assert len(planned) == 1


@pytest.mark.parametrize("seed", range(6))
def test_values_meet_the_tolerance_however_the_parameters_move(seed, planned):
    """Random walks of all parameters, slow and fast: bumps become many times sharper than those planned for."""
    rng = np.random.default_rng(seed)
    x = np.linspace(-1.0, 1.0, 7)
    parameters, pace = [leaf(v) for v in (1.0, 0.7, 1.0, 0.2)], rng.uniform(0.02, 0.5)
    steps = 25
    for _ in range(steps):
        u = control.value(bump(*parameters), x, rtol=1e-3, atol=1e-5).detach().numpy()
        truth = exact(x, *(p.item() for p in parameters))
        assert np.abs(u - truth).max() <= 1e-5 + 1e-3 * np.abs(truth).max()
        with torch.no_grad():
            for p in parameters[:3]:
                p.mul_(np.exp(pace * rng.normal())).clamp_(0.05, 30.0)
    assert len(planned) < steps


def test_what_was_planned_afresh_is_logged(caplog):
    sharp = leaf(1.0)
    with caplog.at_level(logging.INFO, logger="kolmo"):
        for value in (1.0, 40.0):
            with torch.no_grad():
                sharp.fill_(value)
            control.value(bump(leaf(1.0), leaf(0.3), sharp, 0.2), [0.0, 0.5], rtol=1e-4)
    assert "planned afresh" in caplog.text
    assert "times the tolerance" in caplog.text


def test_a_plan_serves_points_on_its_grid_alone(planned):
    for x in ([0.0], [0.1], [30.0], [0.0]):
        control.value(bump(leaf(1.0), leaf(0.5), leaf(1.0), 0.0), x, rtol=1e-3)
    assert len(planned) == 2


def test_a_tolerance_that_is_not_met_is_told_once(planned):
    sde = kolmo.SDE(lambda t, x: torch.sin(40 * x), leaf(0.05), dim=1)
    problem = kolmo.KolmogorovProblem(sde, lambda x: x[..., 0].sign(), 1.0)
    with pytest.warns(ToleranceWarning, match="best grid found"):
        control.value(problem, [0.01], rtol=1e-9, atol=0.0, max_cells=80)
    control.value(problem, [0.01], rtol=1e-9, atol=0.0, max_cells=80)
    assert len(planned) == 1


def test_a_search_that_was_interrupted_leaves_no_plan(monkeypatch):
    module = importlib.import_module("kolmo.control.plans")
    original = module.search

    def interrupted(*args, **options):
        outcome = original(*args, **options)
        outcome.status = "interrupted"
        return outcome

    problem = bump(leaf(1.0), leaf(0.5), leaf(1.0), 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(module, "search", interrupted)
        with pytest.raises(KeyboardInterrupt):
            control.value(problem, [0.0], rtol=1e-3)
    calls = []
    monkeypatch.setattr(module, "search", lambda *args, **kw: calls.append(1) or original(*args, **kw))
    control.value(problem, [0.0], rtol=1e-3)
    assert len(calls) == 1


def test_a_minimum_is_judged_with_what_the_objective_computed_last():
    """A width that is computed in the objective: the plan of the first evaluation does not serve the last."""
    raw = leaf(0.0)
    sde = kolmo.SDE(0.0, 1.0, dim=1)

    def objective():
        sharp = torch.exp(raw)
        problem = kolmo.KolmogorovProblem(sde, lambda x: torch.exp(-0.5 * (sharp * x[..., 0]) ** 2), 0.5)
        return (control.value(problem, [0.0], rtol=1e-6).sum() - 0.05) ** 2 * 100

    control.minimize(objective, raw)
    assert np.exp(raw.item()) == pytest.approx(np.sqrt(2 * (1 / 0.05**2 - 1)), rel=1e-4)  # u = 1/sqrt(1 + s²/2)


# names of functions of this module that are looked up
SCALE = 1.0


def scaled(t, x):
    return SCALE * x


def test_structures_differ_in_numbers_and_code_but_not_in_parameters(monkeypatch):
    def made(number, array, tensor, f=lambda t, x: -x):
        sde = kolmo.SDE(f, lambda t, x: tensor + 0 * x, dim=1)
        return kolmo.KolmogorovProblem(sde, lambda x: (x[..., 0] - number) * float(array[0]), 1.0)

    array, tensor = np.ones(2), leaf(1.0)
    key = structure(made(1.0, array, tensor))
    assert key == structure(made(1.0, array.copy(), leaf(2.0)))
    assert hash(key) == hash(structure(made(1.0, array.copy(), leaf(2.0))))
    assert key != structure(made(2.0, array, tensor))
    assert key != structure(made(1.0, 2 * array, tensor))
    assert key != structure(made(1.0, array, torch.tensor(1.0, dtype=torch.float64)))
    assert key != structure(made(1.0, array, tensor, lambda t, x: -x))
    assert structure(made(1.0, array, torch.tensor(1.0))) != structure(made(1.0, array, torch.tensor(2.0)))
    before = structure(made(1.0, array, tensor, scaled))
    monkeypatch.setattr(importlib.import_module(__name__), "SCALE", 2.0)
    assert before != structure(made(1.0, array, tensor, scaled))


def test_modules_are_themselves_and_are_not_kept_alive():
    def made(net):
        sde = kolmo.SDE(lambda t, x: net(x), 1.0, dim=2, arrays="torch")
        return kolmo.KolmogorovProblem(sde, lambda x: x[..., 0], 1.0)

    nets = [torch.nn.Linear(2, 2, dtype=torch.float64) for _ in range(2)]
    key = structure(made(nets[0]))
    again = structure(made(nets[0]))
    assert key == again
    assert key != structure(made(nets[1]))
    del nets[0]
    gc.collect()
    assert key != again  # what is gone equals nothing


def test_tensors_without_numbers_of_numpy_are_themselves():
    small, large = torch.ones(2, dtype=torch.bfloat16), torch.zeros(10_000)

    def made(tensor):
        return kolmo.KolmogorovProblem(kolmo.SDE(0.0, 1.0, dim=1), lambda x: x[..., 0] + tensor.sum(), 1.0)

    for tensor in (small, large):
        assert structure(made(tensor)) == structure(made(tensor))
        assert structure(made(tensor)) != structure(made(tensor.clone()))


def test_objects_that_refer_to_themselves_have_a_structure():
    class Model:
        def __init__(self):
            self.me, self.rate = self, leaf(1.0)

        def drift(self, t, x):
            return -self.rate * x

    def made():
        return kolmo.KolmogorovProblem(kolmo.SDE(Model().drift, 1.0, dim=1), torch.cos, 1.0)

    assert structure(made()) == structure(made())


def test_losses_of_a_classifier_keep_their_plan(planned):
    torch.manual_seed(0)
    branches = [kolmo.bridge.MLPBranch.create(1, 4) for _ in range(3)]
    net = kolmo.bridge.NoisyResNet(branches, kolmo.bridge.Additive(0.3)).double()
    head = torch.nn.Linear(1, 2, dtype=torch.float64)
    model = kolmo.bridge.FlowClassifier(torch.nn.Identity(), net, head)
    x, y = torch.linspace(-1, 1, 8, dtype=torch.float64)[:, None], torch.arange(8) % 2
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(6):
        optimizer.zero_grad()
        model.pde_loss(x, y).backward()
        optimizer.step()
    assert len(planned) == 1
