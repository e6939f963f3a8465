"""control.minimize: finds known minima by every method, keeps what is good when things go wrong, says what is wrong."""

import importlib

import numpy as np
import pytest
import torch

import kolmo
from kolmo import control
from kolmo.errors import InputError, KolmoWarning


def leaf(value):
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


def rosenbrock(p):
    return (1 - p[0]) ** 2 + 100 * (p[1] - p[0] ** 2) ** 2


@pytest.mark.parametrize("method", ["L-BFGS-B", "trust-ncg"])
def test_newton_like_methods_find_the_rosenbrock_minimum(method):
    p = leaf([-1.2, 1.0])
    fit = control.minimize(lambda: rosenbrock(p), [p], method=method)
    assert fit.success
    assert fit.status == "converged"
    np.testing.assert_allclose(p.detach(), [1.0, 1.0], atol=1e-6)
    np.testing.assert_array_equal(p.detach(), fit.x)


@pytest.mark.parametrize("method", ["adam", "adamw"])
def test_adam_minimises_a_quadratic(method):
    p = leaf([0.5, -0.4])
    fit = control.minimize(lambda: (torch.tensor([1.0, 3.0]) * (p - 0.1) ** 2).sum(), p, method=method)
    np.testing.assert_allclose(p.detach(), [0.1, 0.1], atol=2e-2)
    assert fit.fun <= fit.history["objective"].min()


def test_bounds_hold_on_the_way_and_at_the_end():
    p = leaf([0.0, 0.0])
    seen = []

    def objective():
        seen.append(p.detach().clone())
        return ((p - torch.tensor([2.0, -3.0])) ** 2).sum()

    control.minimize(objective, [p], bounds=(-1.0, 0.5))
    np.testing.assert_allclose(p.detach(), [0.5, -1.0])
    assert torch.stack(seen).max() <= 0.5
    assert torch.stack(seen).min() >= -1.0
    q = leaf([0.0, 0.0])
    control.minimize(lambda: ((q - 3.0) ** 2).sum(), [q], bounds=[(None, np.array([1.0, 2.0]))], method="adam")
    assert (q.detach() <= torch.tensor([1.0, 2.0])).all()


def test_a_module_is_trained_in_place_in_its_own_precision():
    torch.manual_seed(0)
    net = torch.nn.Linear(2, 1)
    x = torch.randn(50, 2)
    y = x @ torch.tensor([[1.5], [-0.5]]) + 0.25
    control.minimize(lambda: ((net(x) - y) ** 2).mean(), net)
    assert net.weight.dtype == torch.float32
    np.testing.assert_allclose(net.weight.detach(), [[1.5, -0.5]], atol=1e-3)
    np.testing.assert_allclose(net.bias.detach(), [0.25], atol=1e-3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_value_on_the_way_leaves_the_last_good_parameters(bad):
    p = leaf(3.0)
    calls = []

    def objective():
        calls.append(p.item())
        return (p - 1) ** 2 if len(calls) < 4 else bad * p

    fit = control.minimize(objective, p, method="adam")
    assert fit.status == "diverged"
    assert not fit.success
    assert p.item() == min(calls[:3], key=lambda v: (v - 1) ** 2)


def test_an_objective_without_lower_bound_is_told():
    p = leaf(1.0)
    fit = control.minimize(lambda: -(p**4), p)
    assert fit.status == "diverged"
    assert np.isfinite(p.item())


@pytest.mark.parametrize("power", [2, 4])
def test_parameters_of_an_objective_without_lower_bound_stay_near(power):
    """It ends ten powers of ten below the first value, not where numbers end."""
    for start in np.random.default_rng(power).uniform(0.1, 3.0, 3):
        p = leaf(start)
        fit = control.minimize(lambda: -(p**power), p)  # noqa: B023
        assert fit.status == "diverged"
        assert -1e10 * (1.0 + start**power) <= fit.fun < -(start**power)


def test_callback_and_maxiter_stop():
    p = leaf([-1.2, 1.0])
    fit = control.minimize(lambda: rosenbrock(p), p, callback=lambda n, value: n == 3)
    assert (fit.status, fit.nit) == ("stopped", 3)
    p = leaf([-1.2, 1.0])
    fit = control.minimize(lambda: rosenbrock(p), p, maxiter=5)
    assert (fit.status, fit.nit, fit.success) == ("maxiter", 5, False)
    assert len(fit.history["objective"]) == len(fit.history["gradient"]) == len(fit.history["seconds"]) == 5
    assert fit.fun == pytest.approx(rosenbrock(p).item())


def test_ctrl_c_keeps_the_best(monkeypatch):
    p = leaf(3.0)
    calls = []

    def objective():
        calls.append(p.item())
        if len(calls) == 4:
            raise KeyboardInterrupt
        return (p - 1) ** 2

    fit = control.minimize(objective, p, method="adam")
    assert fit.status == "interrupted"
    assert p.item() == min(calls[:3], key=lambda v: abs(v - 1))


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda p, q: control.minimize(lambda: p**2, [p, q]), "parameters"),
        (lambda p, q: control.minimize(lambda: p**2, p, bounds=(1.0, 0.0)), "bounds"),
        (lambda p, q: control.minimize(lambda: p**2, p, bounds=[(0, 1), (0, 1)]), "bounds"),
        (lambda p, q: control.minimize(lambda: p**2, p, bounds=(0, 1), method="trust-ncg"), "bounds"),
        (lambda p, q: control.minimize(lambda: p**2, p, method="newton"), "method"),
        (lambda p, q: control.minimize(lambda: p**2, p, maxiter=0), "maxiter"),
        (lambda p, q: control.minimize(lambda: p * torch.ones(2), p), "objective"),
        (lambda p, q: control.minimize(lambda: float(p.detach()), p), "objective"),
        (lambda p, q: control.minimize(lambda: p * float("nan"), p), "objective"),
        (lambda p, q: control.minimize(lambda: p.detach() ** 2, p), "objective"),
        (lambda p, q: control.minimize(lambda: p**2, []), "parameters"),
        (lambda p, q: control.minimize(lambda: p**2, [torch.tensor(1.0)]), "parameters[0]"),
        (lambda p, q: control.minimize(lambda: p**2, [p * 2]), "parameters[0]"),
        (lambda p, q: control.minimize(lambda: p**2, [3.0]), "parameters[0]"),
    ],
)
def test_bad_input_names_the_argument(call, argument):
    p, q = leaf(1.0), leaf(2.0)
    with pytest.raises(InputError) as caught:
        call(p, q)
    assert caught.value.argument == argument
    assert (p.item(), q.item()) == (1.0, 2.0)


def test_the_parameter_that_does_not_matter_is_named():
    p, q = leaf(1.0), leaf(2.0)
    with pytest.raises(InputError, match=r"parameters\[1\]"):
        control.minimize(lambda: p**2, [p, q])


def drifting(theta):
    sde = kolmo.SDE(lambda t, x: theta + 0 * x, diffusion=0.5, dim=1)
    return kolmo.KolmogorovProblem(sde, lambda x: (x[..., 0] - 1) ** 2, 1.0)


def counted(monkeypatch):
    module = importlib.import_module("kolmo.control.plans")

    planned = []
    original = module.search
    monkeypatch.setattr(module, "search", lambda *args, **kw: planned.append(1) or original(*args, **kw))
    return planned


def test_within_a_run_a_problem_is_planned_once_and_checked_once(monkeypatch):
    planned = counted(monkeypatch)
    theta = leaf(1.2)
    problem = drifting(theta)
    fit = control.minimize(lambda: control.value(problem, [-0.5], rtol=1e-4).sum(), theta)
    assert fit.nfev > 2
    assert len(planned) == 2
    assert theta.item() == pytest.approx(1.5, abs=1e-3)
    control.value(problem, [-0.5], rtol=1e-2)
    assert len(planned) == 3


def test_a_problem_built_in_the_objective_keeps_its_plan(monkeypatch):
    planned = counted(monkeypatch)
    theta = leaf(1.2)
    fit = control.minimize(lambda: control.value(drifting(theta), [-0.5], rtol=1e-3).sum(), theta)
    assert fit.nfev > 2
    assert len(planned) == 2
    assert theta.item() == pytest.approx(1.5, abs=1e-3)


def test_another_problem_at_every_evaluation_is_told():
    theta, targets = leaf(0.0), iter(np.linspace(1.0, 1.1, 100))

    def objective():
        sde, target = kolmo.SDE(lambda t, x: theta + 0 * x, diffusion=0.5, dim=1), next(targets)
        problem = kolmo.KolmogorovProblem(sde, lambda x: (x[..., 0] - target) ** 2, 1.0)
        return control.value(problem, [-0.5], rtol=1e-3).sum()

    with pytest.warns(KolmoWarning, match="build the problem once"):
        control.minimize(objective, theta, maxiter=3)


def test_a_plan_outgrown_by_the_parameters_is_renewed(monkeypatch):
    """A terminal bump that becomes twenty times narrower than the one the grid was made for."""
    planned = counted(monkeypatch)
    sharp = leaf(1.0)
    sde = kolmo.SDE(0.0, diffusion=1.0, dim=1)
    target = 0.05
    problem = kolmo.KolmogorovProblem(sde, lambda x: torch.exp(-0.5 * (sharp * x[..., 0]) ** 2), 0.5)
    control.minimize(lambda: (control.value(problem, [0.0], rtol=1e-6).sum() - target) ** 2 * 100, sharp)
    # u(0, 0) = 1/sqrt(1 + s²/2)
    assert len(planned) > 2
    assert sharp.item() == pytest.approx(np.sqrt(2 * (1 / target**2 - 1)), rel=1e-4)


def test_hessian_product_matches_the_closed_form_and_taylor_rate_three():
    kappa, sigma = leaf(0.8), leaf(0.6)
    sde = kolmo.SDE(lambda t, x: -kappa * x, diffusion=lambda t, x: sigma + 0 * x[..., 0], dim=1)
    problem = kolmo.KolmogorovProblem(sde, lambda x: x[..., 0] ** 2, 1.0)
    recipe = kolmo.plan(problem.handing("torch"), at=[1.0], rtol=1e-5)

    def J():
        return control.value(problem, [1.0], discretization=recipe).sum()

    v = [leaf(0.7).detach(), leaf(-0.4).detach()]
    product = control.hessian_product(J, [kappa, sigma], v)
    base = J()
    g = torch.autograd.grad(base, [kappa, sigma])
    first = sum(float(a * b) for a, b in zip(g, v, strict=True))
    second = sum(float(a * b) for a, b in zip(product, v, strict=True))
    start = [kappa.item(), sigma.item()]
    remainders = []
    for eps in (0.2, 0.1, 0.05):
        with torch.no_grad():
            kappa.fill_(start[0] + eps * v[0].item())
            sigma.fill_(start[1] + eps * v[1].item())
            remainders.append(abs(float(J() - base) - eps * first - 0.5 * eps**2 * second))
    rates = np.log2(np.array(remainders[:-1]) / remainders[1:])
    assert np.all(np.abs(rates - 3.0) < 0.25), rates


def test_terminal_data_that_know_tensors_alone():
    target = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    sde = kolmo.SDE(lambda t, x: target - x, 0.5, dim=1)
    problem = kolmo.KolmogorovProblem(sde, lambda x: -torch.exp(-(x[..., 0] ** 2)), 1.0)
    found = control.minimize(lambda: control.value(problem, [0.3]).sum(), [target], maxiter=3)
    with torch.no_grad():
        assert found.fun == pytest.approx(control.value(problem, [0.3]).item(), rel=1e-3)
