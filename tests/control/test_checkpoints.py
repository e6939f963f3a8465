"""Checkpoints: the gradient stays the same to rounding, memory is what was stated, repeats are as few as they claim."""

import weakref
from functools import cache

import numpy as np
import pytest
import torch

import kolmo
from kolmo import InputError, control
from kolmo.control.checkpoints import fewest, repeated


def layered(steps, stepper="radau3", nodes=25, layers=4):
    """A problem with a little network per layer for a drift."""
    torch.manual_seed(0)
    nets = [torch.nn.Sequential(torch.nn.Linear(1, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)) for _ in range(layers)]
    net = torch.nn.ModuleList(nets).double()
    breaks = [0.5 * k / layers for k in range(1, layers)]
    sde = kolmo.SDE(
        lambda t, x: net[min(int(t / 0.5 * layers), layers - 1)](x) * (1.0 + 0.1 * t),
        0.5,
        dim=1,
        breakpoints=breaks,
        arrays="torch",
    )
    box = kolmo.Box(-2.0, 2.0, [("absorbing", "open")])
    problem = kolmo.KolmogorovProblem(sde, lambda x: torch.cos(x[..., 0]), 0.5, box)
    recipe = kolmo.solve(problem, grid=nodes, steps=steps, scheme="central4", stepper=stepper).discretization
    return problem, recipe, list(net.parameters())


def gradient(problem, recipe, parameters, **how):
    u = control.expected_value(problem, [-0.7, 0.1, 1.1], discretization=recipe, **how)
    return u.item(), torch.cat([g.reshape(-1) for g in torch.autograd.grad(u, parameters)])


@pytest.mark.parametrize("how", [{"checkpoints": 2}, {"checkpoints": 3}, {"checkpoints": 11}, {"checkpoints": 99}])
def test_value_and_gradient_are_the_same_to_rounding_under_every_schedule(how):
    problem, recipe, parameters = layered(steps=12)
    value, g = gradient(problem, recipe, parameters)
    again, h = gradient(problem, recipe, parameters, **how)
    assert again == value
    assert (g - h).abs().max() <= 1e-14 * g.abs().max()


def test_a_memory_budget_is_kept_and_stated():
    problem, recipe, parameters = layered(steps=12)
    everything = control.gradient_memory(problem, recipe)
    assert (everything.checkpoints, everything.repeated) == (12, 0)
    plan = control.gradient_memory(problem, recipe, memory=0.5 * everything.bytes)
    assert plan.bytes <= 0.5 * everything.bytes
    assert 0 < plan.repeated < 24
    assert control.gradient_memory(problem, recipe, checkpoints=plan.checkpoints + 1).bytes > 0.5 * everything.bytes
    _, g = gradient(problem, recipe, parameters)
    _, h = gradient(problem, recipe, parameters, memory=0.5 * everything.bytes)
    assert (g - h).abs().max() <= 1e-14 * g.abs().max()


def constant(steps):
    """A constant drift that varies over many nodes, with explicit steps: states are all that counts."""
    speed = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    sde = kolmo.SDE(lambda t, x: speed + 0.0 * x, 0.05, dim=1, arrays="torch")
    problem = kolmo.KolmogorovProblem(sde, lambda x: torch.cos(x[..., 0]), 0.1, kolmo.Box(-2.0, 2.0))
    recipe = kolmo.solve(problem, grid=401, steps=steps, scheme="central2", stepper="rk4").discretization
    return problem, recipe, speed


def most_states(monkeypatch, problem, recipe, checkpoints):
    """Most states that were alive at once while a gradient was computed."""
    arrays, counts = [], []
    original = kolmo.march.March.descend

    def watched(self, u, plans, stages=False):
        last, kept = original(self, u, plans, stages)
        arrays.extend(weakref.ref(array) for array in kept)
        counts.append(sum(array().size // u.size for array in arrays if array() is not None))
        return last, kept

    def once():
        control.expected_value(problem, [0.1], discretization=recipe, checkpoints=checkpoints).backward()

    once()  # while a kernel is compiled, what it was called with stays alive a little longer
    with monkeypatch.context() as patch:
        patch.setattr(kolmo.march.March, "descend", watched)
        once()
    return max(counts)


@pytest.mark.parametrize("checkpoints", [None, 20, 5])
def test_no_more_states_are_alive_than_stated(monkeypatch, checkpoints):
    problem, recipe, _ = constant(steps=60)
    stated = control.gradient_memory(problem, recipe, checkpoints=checkpoints)
    most = stated.checkpoints * stated.states
    # the first state of every stretch may be kept elsewhere, and is not watched there
    assert most - 5 <= most_states(monkeypatch, problem, recipe, checkpoints) <= most
    assert stated.bytes == most * 401 * 8 + stated.coefficient_bytes
    assert stated.states == (4 if checkpoints is None else 1)


def test_the_schedule_repeats_hardly_more_steps_than_the_fewest_possible():
    @cache
    def best(steps, kept):
        if steps <= kept:
            return 0
        if kept == 1:
            return 10**9
        return min(m + best(m, kept) + best(steps - m, kept - 1) for m in range(1, steps))

    for steps in range(1, 90):
        for kept in range(2, 12):
            assert best(steps, kept) <= repeated(steps, kept) <= 1.04 * best(steps, kept)


def test_steps_taken_are_those_stated(monkeypatch):
    problem, recipe, _ = constant(steps=60)
    taken = []
    original = kolmo.march.March.descend

    def counted(self, u, plans, stages=False):
        taken.append(len(plans))
        return original(self, u, plans, stages)

    monkeypatch.setattr(kolmo.march.March, "descend", counted)
    control.expected_value(problem, [0.1], discretization=recipe, checkpoints=5).backward()
    assert sum(taken) == 60 + control.gradient_memory(problem, recipe, checkpoints=5).repeated


@pytest.mark.parametrize("bad", [{"checkpoints": 1}, {"checkpoints": 0}, {"checkpoints": 2.5}, {"memory": 10.0}])
def test_bad_schedules_are_refused(bad):
    problem, recipe, _ = layered(steps=12)
    with pytest.raises(InputError) as caught:
        control.gradient_memory(problem, recipe, **bad)
    assert caught.value.argument in bad
    with pytest.raises(InputError):
        control.value(problem, [0.1], discretization=recipe, **bad)


def test_too_few_checkpoints_are_told_how_many_it_takes():
    problem, recipe, _ = constant(steps=200)
    assert fewest(200) == 3
    with pytest.raises(InputError, match="at least 3 for 200 steps"):
        control.value(problem, [0.1], discretization=recipe, checkpoints=2)


@pytest.mark.slow
def test_the_cost_does_not_grow_with_the_number_of_parameters():
    """A drift read from a table of ten or a hundred thousand entries."""
    import time

    def seconds(count):
        table = torch.zeros(count, dtype=torch.float64, requires_grad=True)
        sde = kolmo.SDE(
            lambda t, x: table[((x[..., 0] + 3.0) / 6.0 * (count - 1)).long()][..., None], 0.5, dim=1, arrays="torch"
        )
        problem = kolmo.KolmogorovProblem(sde, lambda x: torch.cos(x[..., 0]), 0.5, kolmo.Box(-3.0, 3.0))
        recipe = kolmo.solve(problem, grid=801, steps=40, stepper="radau5").discretization
        best = np.inf
        for _ in range(5):
            begun = time.process_time()
            control.expected_value(problem, [0.1], discretization=recipe).backward()
            best = min(best, time.process_time() - begun)
        return best

    assert seconds(100_000) < 1.5 * seconds(10)
