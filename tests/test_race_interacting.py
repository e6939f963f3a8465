"""Races that interact: against the backward equation, at random, and their derivatives; and passages that are early."""

import numpy as np
import pytest
import torch
from numpy.polynomial.legendre import leggauss

import kolmo
from kolmo import SDE, Absorbing, Box, KolmogorovProblem
from kolmo.likelihood import FirstPassage, Race, Trials

INPUT, LEAK, INHIBITION, NOISE = np.array([1.6, 1.1]), np.array([0.4, 0.7]), 0.9, [1.0, 0.8]
UPPER, START = [1.0, 1.2], [0.2, 0.1]
FLOORS = ([0.0, 0.0], [0.0, None])


def leaky(lower, **given):
    drift = lambda t, x, c: torch.tensor(INPUT) - torch.tensor(LEAK) * x - INHIBITION * x.flip(-1)  # noqa: E731
    return Race(drift, NOISE, upper=UPPER, lower=lower, start=START, **given)


def chosen_before(lower, choice, t):
    """Probability of a choice before a time, by the backward equation: one on its bound, zero on the other."""
    drift = lambda t, x: INPUT - LEAK * x - INHIBITION * x[..., ::-1]  # noqa: E731
    faces = [
        ("open" if low is None else "reflecting", Absorbing(1.0 if axis == choice else 0.0))
        for axis, low in enumerate(lower)
    ]
    box = Box([-np.inf if low is None else low for low in lower], UPPER, faces)
    problem = KolmogorovProblem(SDE(drift, NOISE, dim=2), lambda x: 0.0 * x[..., 0], t, box)
    found = kolmo.solve(problem, at=[START], rtol=1e-4, atol=1e-6)
    assert found.status == "converged"
    return float(found([START])[0])


@pytest.mark.parametrize(
    ("lower", "choice"),
    [
        (FLOORS[1], 0),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in [(FLOORS[0], 0), (FLOORS[0], 1), (FLOORS[1], 1)]),
    ],
)
def test_probabilities_of_intervals_are_those_of_the_backward_equation(lower, choice):
    z, w = leggauss(6)
    for first, last in [(0.15, 0.3), (0.6, 1.2)]:
        half = 0.5 * (last - first)
        found = leaky(lower).likelihood(Trials(first + half * (1.0 + z), [choice] * 6), tol=0.03)
        density = found.terms().exp().numpy()
        exact = chosen_before(lower, choice, last) - chosen_before(lower, choice, first)
        # the estimate is of the sum of the logarithms and of parts of it: by so much a density may be off, relatively
        assert abs(half * w @ density / exact - 1.0) <= min(found.error_estimate + 1e-4, 0.01)


@pytest.mark.parametrize("lower", FLOORS)
def test_a_choice_without_a_time_is_that_of_the_backward_equation(lower):
    found = leaky(lower, span=1.0).likelihood(Trials([np.nan], [0]), tol=0.01)
    assert abs(found().item() - np.log(chosen_before(lower, 0, 20.0))) <= found.error_estimate + 1e-4


def drawn(seed):
    """A leaky competing race and trials, at random."""
    rng = np.random.default_rng(seed)
    speed, leak, noise = (torch.as_tensor(rng.uniform(a, b, 2)) for a, b in [(0.3, 2.5), (0.0, 1.5), (0.6, 1.3)])
    inhibition, upper = rng.uniform(0.0, 1.5), rng.uniform(0.8, 1.4, 2)
    lower = [0.0 if rng.random() < 0.6 else None for _ in range(2)]
    delay = rng.uniform(0.0, 0.3)
    race = Race(
        lambda t, x, c: speed - leak * x - inhibition * x.flip(-1),
        noise,
        upper=upper.tolist(),
        lower=lower,
        start=(upper * rng.uniform(0.0, 0.4, 2)).tolist(),
        delay=delay,
    )
    times = delay + np.exp(rng.uniform(np.log(0.15), np.log(2.0), 6))
    return race, Trials(times, rng.integers(0, 2, 6), censored=np.arange(6) == 5)


@pytest.mark.parametrize("seed", [0, *(pytest.param(k, marks=pytest.mark.slow) for k in range(1, 12))])
def test_errors_are_within_the_estimate_at_random(seed):
    race, trials = drawn(seed)
    found = race.likelihood(trials, tol=0.05)
    value = found().item()
    assert found.status == "converged"
    twice = found._terms(2.0 * found.resolution)[0].sum().item()  # on the same state space
    assert abs(value - twice) <= found.error_estimate


PARAMETERS = {
    "start": [0.2, 0.15], "floor": [-0.1, 0.0], "upper": [1.0, 1.1], "noise": [1.0, 0.8],
    "leak": [0.5, 0.8], "inhibition": [0.7, 0.4], "lapse": [0.1], "delay": [0.1],
}  # fmt: skip


def test_gradients_in_each_parameter():
    p = {k: torch.tensor(v, dtype=torch.float64, requires_grad=True) for k, v in PARAMETERS.items()}
    race = Race(
        lambda t, x, c: torch.tensor([1.5, 1.0]) - p["leak"] * x - p["inhibition"] * x.flip(-1),
        lambda t, x, c: torch.diag(p["noise"]).expand(*x.shape, 2),
        upper=[lambda c: p["upper"][0], lambda c: p["upper"][1]],
        lower=[lambda c: p["floor"][0], lambda c: p["floor"][1]],
        start=lambda c: p["start"],
        lapse=lambda c: p["lapse"][0],
        delay=lambda c: p["delay"][0],
        span=2.0,
    )
    # the first is early: by the formula
    found = race.likelihood(Trials([0.128, 0.5, 0.8, 1.2], [0, 1, 0, 1]), tol=1e9)
    first = found()
    slopes = dict(zip(p, torch.autograd.grad(first, list(p.values())), strict=True))
    for name, tensor in p.items():
        way = torch.tensor([-1.0, 0.7], dtype=torch.float64)[: len(tensor)]
        rests = []
        for h in (8e-4, 4e-4):
            with torch.no_grad():
                tensor += h * way
                rests.append(found().item() - first.item() - h * float((slopes[name] * way).sum()))
                tensor -= h * way
        assert abs(rests[0]) > 1e-9, name
        assert 3.5 < rests[0] / rests[1] < 4.5, (name, rests)


@pytest.mark.parametrize("noise", [lambda x: 1.0 + 0.0 * x, lambda x: 1.0 / (1.0 + 0.4 * x**2)])
def test_early_passages_know_the_drift_and_noise_on_their_way(noise):
    speeds, leak, start, upper = [1.6, 1.1], 1.5, [0.3, -0.2], [1.0, 1.2]
    race = Race(
        lambda t, x, c: torch.tensor(speeds) - leak * x,
        lambda t, x, c: torch.diag_embed(noise(x)),
        upper=upper,
        start=start,
    )
    alone = [
        FirstPassage(lambda t, x, c, v=v: v - leak * x, lambda t, x, c: noise(x), upper=b, start=s)
        for v, b, s in zip(speeds, upper, start, strict=True)
    ]
    t = np.array([0.003, 0.009, 0.02])
    exact = (
        alone[0].likelihood(Trials(t, [1] * 3)).terms()
        + alone[1].likelihood(Trials(t, [1] * 3, censored=[True] * 3)).terms()
    )
    found, known = race.likelihood(Trials(t, [0] * 3), tol=1.0)._terms(96.0)
    assert float((found - exact).abs().sum()) <= min(known, 0.05)


def test_early_passages_off_the_floor():
    # |x| under a drift that is odd: leaves (-1.2, 1.2)
    t = np.array([0.02, 0.05])
    drift = lambda x: (1.0 - 0.8 * x.abs()) * torch.sign(x)  # noqa: E731
    race = Race(lambda t, x, c: 1.0 - 0.8 * x, upper=[1.2, 9.0], lower=0.0, start=[0.1, 0.1])
    free = FirstPassage(lambda t, x, c: drift(x), lower=-1.2, upper=1.2, start=0.1)
    exact = free.likelihood(Trials(t, [np.nan] * 2), tol=0.03).terms()
    found, known = race.likelihood(Trials(t, [0] * 2), tol=1.0)._terms(64.0)
    assert float((found - exact).abs().sum()) <= 0.1, (found, exact, known)


@pytest.mark.slow
def test_long_after_nearly_all_have_arrived():
    # of two alike, the logarithm of density times survival: of the slowest modes of one in one dimension (40 digits)
    race = lambda lapse: Race(3.0, 0.5, upper=[1.0, 1.0], lower=0.0, lapse=lapse, span=20.0)  # noqa: E731
    late = race(0.0).likelihood(Trials([1.5], [0]), tol=0.05)
    assert abs(late().item() - -39.85518631) <= late.error_estimate <= 0.05
    # of what is lost among the errors of the grid, nothing is believed
    with pytest.warns(kolmo.errors.ToleranceWarning):
        assert race(0.0).likelihood(Trials([12.0], [0]), tol=0.05).renew() > 1.0
    guessed = race(0.05).likelihood(Trials([12.0], [0]), tol=0.05)
    assert abs(guessed().item() - np.log(0.05 / 2 / 20.0)) <= guessed.error_estimate <= 0.05
