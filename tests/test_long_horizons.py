"""Horizons short and long beside the time in which the process forgets: estimates are honest, steps know them."""

import numpy as np
import pytest

import kolmo
from kolmo.steppers.base import STEPPERS

NOISE = np.array([[0.5, 0.2], [0.2, 0.4]])
BEND = 0.2
PLACES = np.array([[0.0, 0.0], [0.5, -0.3], [-0.8, 0.6]])


def straight(y):
    """x of y = (x_0 + BEND sin x_1, x_1)."""
    return np.stack([y[..., 0] - BEND * np.sin(y[..., 1]), y[..., 1]], -1)


def bent_ornstein_uhlenbeck(rate, horizon):
    """dX = −rate X dt + noise, in bent coordinates, where the correlated noise varies; with points and values."""

    def drift(t, y):
        x = straight(y)
        bend = BEND * np.cos(x[..., 1]) * x[..., 1] + 0.5 * BEND * np.sin(x[..., 1]) * NOISE[1, 1]
        return -rate * np.stack([x[..., 0] + bend, x[..., 1]], -1)

    def covariance(t, y):
        slope = np.zeros((*y.shape, 2)) + np.eye(2)
        slope[..., 0, 1] = BEND * np.cos(y[..., 1])
        return rate * slope @ NOISE @ np.swapaxes(slope, -1, -2)

    sde = kolmo.SDE(drift, covariance=covariance, dim=2)
    problem = kolmo.KolmogorovProblem(sde, lambda y: np.exp(-(straight(y) ** 2).sum(-1)), horizon)
    left = np.exp(-rate * horizon)
    C = 0.5 * NOISE * (1.0 - left**2)
    mean, scale = left * PLACES, np.linalg.det(np.eye(2) + 2.0 * C)
    values = np.exp(-0.5 * np.einsum("ni,ij,nj->n", mean, np.linalg.inv(0.5 * np.eye(2) + C), mean)) / np.sqrt(scale)
    return problem, PLACES + BEND * np.sin(PLACES[:, 1:]) * [1.0, 0.0], values


@pytest.mark.parametrize(("rate", "horizon"), [(1.0, 0.01), (1.0, 1.0), (1.0, 100.0), (100.0, 1.0), (0.01, 100.0)])
def test_estimates_are_honest(rate, horizon):
    problem, points, values = bent_ornstein_uhlenbeck(rate, horizon)
    sol = kolmo.solve(problem, at=points, rtol=1e-3, atol=0.0)
    assert sol.status == "converged"
    assert np.abs(sol(points) - values).max() <= 3.0 * sol.error_estimate.max()
    assert np.abs(sol(points) - values).max() <= 1e-3 * values.max()


def test_split_steps_are_no_longer_than_the_drift_allows():
    """Longer ones agree with each other, and are wrong: doubling them would show nothing."""
    rate, horizon = 1.0, 100.0
    problem, points, _ = bent_ornstein_uhlenbeck(rate, horizon)
    recipe = kolmo.plan(problem, at=points, rtol=1e-2)
    assert not np.isfinite(STEPPERS[recipe.stepper].largest_step(1.0, 1.0))
    assert recipe.steps >= rate * horizon


def test_horizons_too_long_for_split_steps_are_told():
    problem, points, _ = bent_ornstein_uhlenbeck(1.0, 1e6)
    with pytest.warns(kolmo.errors.ToleranceWarning, match="short enough for the drift"):
        sol = kolmo.solve(problem, at=points, rtol=1e-2)
    assert sol.status == "tolerance_not_met"
    assert not np.isfinite(sol.error_estimate).any()


def test_boxes_do_not_grow_once_the_process_has_forgotten():
    ou = kolmo.SDE(lambda t, x: -x, diffusion=1.0, dim=1)
    widths = [np.ptp([box.lower, box.upper]) for box in (kolmo.Box.covering(ou, [0.0, 1.0], T) for T in (20.0, 200.0))]
    assert widths[1] < 1.5 * widths[0]


@pytest.mark.parametrize("seed", range(3))
def test_a_rotation_with_little_noise(seed):
    """Steps along characteristics are few: on a coarse grid each one interpolates, and 4,000 of them were tried."""
    rng = np.random.default_rng([77, seed])
    turn, damping, noise = rng.uniform(3, 9), rng.uniform(0.05, 0.4), 10 ** rng.uniform(-1.5, -0.5)
    A, angle = np.array([[-damping, -turn], [turn, -damping]]), rng.uniform(0, np.pi)
    way, at = np.array([np.cos(angle), np.sin(angle)]), 0.7 * rng.normal(size=(2, 2))
    sde = kolmo.SDE(lambda t, x: x @ A.T, noise, dim=2)
    problem = kolmo.KolmogorovProblem(sde, lambda x: np.exp(-(((x @ way) / 0.3) ** 2) / 2), 1.0)
    flow = np.exp(-damping) * np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    mean, spread = at @ flow.T @ way, noise**2 * (1 - np.exp(-2 * damping)) / (2 * damping)
    exact = 0.3 / np.sqrt(0.09 + spread) * np.exp(-(mean**2) / (2 * (0.09 + spread)))
    sol = kolmo.solve(problem, at=at, rtol=1e-4)
    off = np.abs(sol(at) - exact).max()
    assert sol.status == "converged"
    assert sol.discretization.steps < 1000
    assert off <= sol.error_estimate.max()
    assert off <= 1e-4 * np.abs(exact).max()
