"""Functions that prove to be smooth: bounds hold for random ones, and what has a break proves nothing."""

import math

import numpy as np
import pytest
import torch

from kolmo import SDE, Box, KolmogorovProblem
from kolmo.refine import samples
from kolmo.refine.bounds import Bounds, proof, variables
from kolmo.refine.layout import first_layout

LOW, HIGH, SPREAD, HORIZON = np.array([-2.0, 0.5]), np.array([3.0, 4.0]), np.array([0.7, 1.6]), 1.3
FUNCTIONS = ("sin", "cos", "exp", "tanh", "arctan", "sinh", "cosh", "expm1")


def expression(rng, depth):
    """A random function of (library, t, x, y)."""
    if depth == 0:
        which, number = int(rng.integers(4)), float(rng.normal())
        return lambda xp, t, x, y: (t, x, y, number)[which] if which < 3 else number + 0.0 * x
    kind = rng.choice(["+", "-", "*", "power", "scaled", "function", "inverse", "root", "log", "bump", "base"])
    f, g = expression(rng, depth - 1), expression(rng, depth - int(rng.integers(1, depth + 1)))
    c, n, name = float(rng.normal()), int(rng.integers(2, 4)), str(rng.choice(FUNCTIONS))
    return {
        "+": lambda xp, *v: f(xp, *v) + g(xp, *v),
        "-": lambda xp, *v: c - f(xp, *v) - g(xp, *v),
        "*": lambda xp, *v: f(xp, *v) * g(xp, *v),
        "power": lambda xp, *v: f(xp, *v) ** n,
        "scaled": lambda xp, *v: c * f(xp, *v) / 1.7,
        "function": lambda xp, *v: getattr(xp, name)(0.3 * f(xp, *v)),
        "inverse": lambda xp, *v: 1.0 / (3.0 + xp.sin(f(xp, *v))),
        "root": lambda xp, *v: xp.sqrt(2.0 + xp.cos(f(xp, *v))),
        "log": lambda xp, *v: xp.log(1.5 + xp.tanh(f(xp, *v))),
        "bump": lambda xp, *v: xp.exp(0.1 - f(xp, *v) ** 2 - 0.3 * g(xp, *v) ** 2),
        "base": lambda xp, *v: 1.3 ** (0.2 * f(xp, *v)) + 0.0 * v[1],
    }[kind]


def derivatives(f, axis, points):
    """Values and the first six derivatives along time or an axis, by torch."""
    variables_ = [torch.tensor(points[:, j], requires_grad=True) for j in range(3)]
    value = f(torch, *variables_)
    found = [value.detach().numpy()]
    for _ in range(6):
        slope = None
        if value.requires_grad:
            (slope,) = torch.autograd.grad(value.sum(), variables_[axis], create_graph=True, allow_unused=True)
        value = torch.zeros(len(points), dtype=torch.float64) if slope is None else slope
        found.append(value.detach().numpy())
    return found


@pytest.mark.parametrize("seed", range(120))
def test_bounds_of_random_functions_hold(seed):
    rng = np.random.default_rng(seed)
    check_bounds(expression(rng, int(rng.integers(1, 5))), rng)


@pytest.mark.parametrize("name", ["sin", "cos"])
@pytest.mark.parametrize("other", ["sin", "cos", "exp"])
def test_bounds_of_products_hold(name, other):
    """Rates add up: sin x cos x has the frequency 2."""
    rng = np.random.default_rng(1)
    check_bounds(lambda xp, t, x, y: getattr(xp, name)(2.0 * x) * getattr(xp, other)(0.0 * t - 2.0 * x), rng)
    check_bounds(lambda xp, t, x, y: getattr(xp, name)(y) ** 3 * getattr(xp, other)(-y), rng)


@pytest.mark.parametrize("seed", range(20))
def test_bounds_of_bumps_hold_and_are_close(seed):
    """exp of a quadratic that bends down: not far from the truth, wherever its top lies."""
    rng = np.random.default_rng([7, seed])
    weights, places = np.exp(rng.uniform(-1.0, 2.0, 2)), rng.uniform(-3.0, 5.0, 2)
    factor, tilt = rng.normal(size=2)

    def bump(xp, t, x, y):
        q = weights[0] * (x - places[0]) ** 2 + (y - places[1]) * (y - places[1]) * weights[1]
        return factor * xp.exp(0.3 * tilt - 0.5 * q)

    check_bounds(bump, rng)
    t, x = variables(LOW, HIGH, SPREAD, HORIZON)
    assert bump(np, t, x[0, 0], x[0, 1]).rates[1:] == pytest.approx(1.74 * np.sqrt(weights) * SPREAD)
    saddle = lambda xp, t, x, y: xp.exp(0.1 * (x - 1.0) ** 2 - y**2)  # noqa: E731
    tilted = lambda xp, t, x, y: xp.exp(-((x + t) ** 2) - (y - x) ** 2 + 0.0 * t)  # noqa: E731
    sloping = lambda xp, t, x, y: xp.exp(0.3 * x - y**2)  # noqa: E731
    for f in (saddle, tilted, sloping, lambda xp, *v: bump(xp, *v) * tilted(xp, *v) + sloping(xp, *v)):
        check_bounds(f, rng)


def check_bounds(f, rng):
    """Values and derivatives at random points keep to the bounds."""
    t, x = variables(LOW, HIGH, SPREAD, HORIZON)
    try:
        b = f(np, t, x[0, 0], x[0, 1])
    except TypeError:  # exp of exp of ...
        pytest.skip("bounds that are not finite")
    points = rng.uniform([0.0, *LOW], [HORIZON, *HIGH], (200, 3))
    for axis, unit in enumerate((HORIZON, *SPREAD)):
        value, *slopes = derivatives(f, axis, points)
        tiny = 1e-9 * (1.0 + np.abs(value).max())
        assert (value >= b.low - tiny).all()
        assert (value <= b.high + tiny).all()
        for k, slope in enumerate(slopes, 1):
            most = b.size * b.rates[axis] ** k
            assert np.abs(slope).max() * unit**k <= most * (1.0 + 1e-9) + tiny, (axis, k)


def test_something_is_known_of_common_coefficients():
    """Bounds that are true and useless would leave everything to samples."""
    A = np.array([[-0.5, 2.0], [-2.0, -0.5]])
    for f in (
        lambda t, x: x @ A.T,
        lambda t, x: np.stack([np.cos(x[..., 1]), -x[..., 0] + 0.5 * t], -1),
        lambda t, x: x[..., 0] - x[..., 0] ** 3,
        lambda t, x: np.exp(-t) * np.sin(x[..., 0]) * np.cos(x[..., 1]),
        lambda t, x: np.tanh(0.5 * (x @ A.T)),
        lambda t, x: np.maximum(x[..., 1], 0.0)[..., None, None] * np.array([[1.0, -0.3], [-0.3, 0.2]]),
        lambda t, x: np.einsum("ij,...j->...i", A, x),
        lambda t, x: np.zeros(x.shape),
        lambda t, x: np.linalg.solve(A, (x - 0.3).T).T,
        lambda t, x: np.linalg.solve(A, np.stack([x[..., 1], -x[..., 0]], -1)[..., None])[..., 0],
    ):
        known = proof(f, LOW, HIGH, SPREAD, HORIZON)
        assert known is not None
        assert known.in_space <= samples.SMOOTH
        assert known.in_time <= samples.CALM


BROKEN = {
    "where": lambda t, x: np.where(x[..., 0] > 0.3, 1.0, 0.0),
    "product": lambda t, x: x[..., 0] * (x[..., 0] > 0.3),
    "abs": lambda t, x: np.abs(x[..., 0] - 0.3),
    "maximum": lambda t, x: np.maximum(x[..., 0], 0.3),
    "clip": lambda t, x: np.clip(x[..., 0], -1.0, 0.3),
    "sign": lambda t, x: np.sign(x[..., 0] - 0.3),
    "floor": lambda t, x: np.floor(x[..., 0]),
    "round": lambda t, x: np.round(x[..., 0]),
    "rest": lambda t, x: x[..., 0] % 1.0,
    "heaviside": lambda t, x: np.heaviside(x[..., 0] - 0.3, 1.0),
    "interp": lambda t, x: np.interp(x[..., 0], [-2.0, 0.3, 3.0], [0.0, 1.0, 0.0]),
    "table": lambda t, x: np.array([0.0, 1.0])[np.searchsorted([0.3], x[..., 0])],
    "float": lambda t, x: np.asarray(x, dtype=float)[..., 0] > 0.3,
    "astype": lambda t, x: x.astype(float)[..., 0] ** 2,
    "mask": lambda t, x: np.full(x.shape[:-1], float(bool((x[..., 0] > 0.3).all()))),
    "equal": lambda t, x: 1.0 * (x[..., 0] == 0.3),
    "int": lambda t, x: np.vectorize(int)(x[..., 0]),
    "sort": lambda t, x: np.sort(x, -1)[..., 0],
    "largest": lambda t, x: x.max(-1),
    "norm": lambda t, x: np.linalg.norm(x - 1.0, axis=-1),
    "root": lambda t, x: np.sqrt((x[..., 0] - 0.3) ** 2),
    "power": lambda t, x: ((x[..., 0] - 0.3) ** 2) ** 0.5,
    "fraction": lambda t, x: 1.0 / (x[..., 0] - 0.3),
    "steep": lambda t, x: np.tanh(200.0 * (x[..., 0] - 0.3)),
    "narrow": lambda t, x: np.exp(-500.0 * (x[..., 0] - 0.3) ** 2),
    "waves": lambda t, x: np.sin(300.0 * x[..., 0]),
    "hidden": lambda t, x: np.cos(np.exp(4.0 * x[..., 0])),
    "torch": lambda t, x: torch.relu(torch.as_tensor(x))[..., 0].numpy(),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_not_smooth_proves_nothing(name):
    known = proof(BROKEN[name], LOW, HIGH, SPREAD, HORIZON)
    assert known is None or known.in_space > samples.SMOOTH


@pytest.mark.parametrize("name", ["where", "abs", "maximum", "sign", "rest", "waves"])
def test_the_same_over_time(name):
    known = proof(lambda t, x: BROKEN[name](0.0, x * 0.0 + t), LOW, HIGH, SPREAD, HORIZON)
    assert known is None or known.in_time > samples.CALM


def test_a_scout_with_bounds_sees_what_one_without_sees(monkeypatch):
    """Random problems: smooth and broken functions together have the same breaks and places."""
    rng = np.random.default_rng(7)
    for _ in range(6):
        a, c, w = rng.normal(), rng.uniform(-0.8, 0.8), rng.uniform(0.5, 1.0)
        problem = KolmogorovProblem(
            SDE(lambda t, x, a=a, w=w: -x + 0.3 * a * np.cos(w * x), lambda t, x: 1.0 + 0.2 * np.sin(x), dim=1),
            lambda x, c=c: np.maximum(x[..., 0] - c, 0.0),
            1.0,
            killing=lambda t, x: 0.2 + 0.1 * np.sin(t) * np.cos(x[..., 0]),
            source=lambda t, x, c=c: 1.0 * (x[..., 0] > -c),
        )
        with monkeypatch.context() as patched:
            patched.setattr(samples, "proof", lambda *args: None)
            without = first_layout(problem, np.zeros((1, 1)), 1e-6, 1e-4)[1]
        seen = first_layout(problem, np.zeros((1, 1)), 1e-6, 1e-4)[1]
        assert seen.axes == without.axes
        assert (seen.breakpoints, seen.slanted, seen.steady) == (without.breakpoints, without.slanted, without.steady)
        assert seen.size == pytest.approx(without.size, rel=1e-3)


def test_bounds_where_the_process_is_carried_to_the_largest_value():
    """Without noise the answer takes the largest value of φ: what few samples miss is not held against it."""
    import kolmo

    problem = KolmogorovProblem(SDE(0.4, dim=1), lambda x: np.cos(x[..., 0]), 1.0, Box(-3.0, 3.0, "open"))
    solution = kolmo.solve(problem, at=[[-0.4]], rtol=1e-8)
    assert solution.status == "converged"
    assert float(solution([[-0.4]])[0]) == pytest.approx(1.0, abs=1e-8)


def test_numbers_stay_numbers():
    u = variables(LOW, HIGH, SPREAD, None)[1][0, 0]
    zero = 0.0 * u
    assert isinstance(zero, Bounds)
    assert zero.constant
    assert (np.cos(np.array([zero], dtype=object))[0].low, (zero**0).low, abs(zero - 2.0).low) == (1.0, 1.0, 2.0)
    assert math.isclose((zero + 2.0).sqrt().high, math.sqrt(2.0))
    assert (zero + 1.0 > 0.5) is True
