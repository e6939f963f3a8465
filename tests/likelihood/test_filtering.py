"""Paths seen through noise: against one Gaussian of all that was seen, gradients, what is hidden, what is refused."""

import math

import numpy as np
import pytest
import torch

import kolmo
from kolmo import likelihood
from kolmo.testing import taylor_test


def parameter(value):
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


def seen(rng, count=12):
    t, y = np.cumsum(rng.exponential(0.3, count)), 0.6 * rng.normal(size=count)
    y[4] = np.nan
    return t, y


def stationary(t, y, k, s, r):
    """Log density of what was seen of a stationary Ornstein–Uhlenbeck process, all at once."""
    there = ~np.isnan(y)
    C = s * s / (2 * k) * np.exp(-k * np.abs(t[there][:, None] - t[there])) + r * r * np.eye(there.sum())
    return (
        torch.distributions.MultivariateNormal(torch.zeros(len(C)).double(), torch.as_tensor(C))
        .log_prob(torch.as_tensor(y[there]))
        .item()
    )


@pytest.mark.parametrize("linear", [True, False])
def test_a_noisy_ornstein_path_is_one_gaussian(linear):
    for seed in range(3):
        rng = np.random.default_rng(seed)
        (t, y), (k, s, r) = seen(rng), rng.uniform([0.5, 0.5, 0.1], [2.0, 1.0, 0.5])
        sde = kolmo.SDE(lambda t, x, k=k: -k * x, s, dim=1)
        found = likelihood.noisy_paths(sde, t, y, r, initial=(0.0, s * s / (2 * k)))
        found._linear = linear
        error = abs(found().item() - stationary(t, y, k, s, r))
        assert error <= found.error_estimate + 1e-12, (seed, found)
        assert found.error_estimate <= found.tol


def test_gradients_of_two_wells(rng):
    t, y = seen(rng)
    k, s, r = (parameter(v) for v in (1.0, 0.8, 0.3))
    sde = kolmo.SDE(lambda t, x: k * (x - x**3), lambda t, x: s + 0 * x, dim=1, arrays="torch")
    found = likelihood.noisy_paths(sde, t, y, lambda: r, initial=(0.0, 0.3))
    assert np.abs(taylor_test(found, [k, s, r], step=1e-3).column("order")[1:] - 2.0).max() < 0.05
    assert found.status == "converged"


def test_a_hidden_speed():
    """The position of a particle with friction, seen through noise: Gaussian with the covariance of its moments."""
    A, s, r = parameter([[0.0, 1.0], [-1.0, -0.5]]), parameter(0.7), 0.2
    noise = torch.tensor([[0.0, 0.0], [0.0, 1.0]]).double()
    sde = kolmo.SDE(lambda t, x: x @ A.T, lambda t, x: (s * noise).expand(*x.shape, 2), dim=2, arrays="torch")
    t, y = [0.0, 0.4, 1.5], [0.3, 0.1, -0.2]
    found = likelihood.noisy_paths(sde, t, y, r, initial=([0.0, 0.0], np.eye(2)), observe=[[1.0, 0.0]])
    assert np.abs(taylor_test(found, [A, s], step=1e-3).column("order")[1:] - 2.0).max() < 0.05
    # X_t = e^{At} X_0 + ∫ e^{A(t−u)} σ dW: covariances by quadrature
    B = A.detach()
    z, w = np.polynomial.legendre.leggauss(40)
    C = np.zeros((3, 3))
    for i, a in enumerate(t):
        for j, b in enumerate(t):
            c = (torch.matrix_exp(a * B) @ torch.matrix_exp(b * B).T)[0, 0].item()
            for u, v in zip(0.5 * min(a, b) * (1 + z), 0.5 * min(a, b) * w, strict=True):
                moved = torch.matrix_exp((a - u) * B)[0, 1] * torch.matrix_exp((b - u) * B)[0, 1]
                c += 0.49 * v * moved.item()
            C[i, j] = c + r * r * (i == j)
    exact = -0.5 * (np.array(y) @ np.linalg.solve(C, y) + np.linalg.slogdet(C)[1] + 3 * math.log(2 * math.pi))
    assert abs(found().item() - exact) < 1e-9


CUBIC = kolmo.SDE(lambda t, x: -(x**3), 1.0, dim=2)


@pytest.mark.parametrize(
    ("named", "change"),
    [
        ("noise", {"noise": 0.0}),
        ("times", {"times": [0.0, 0.0]}),
        ("observations", {"observations": [1.0, 2.0, 3.0]}),
        ("sde", {"sde": CUBIC, "initial": ([0.0, 0.0], np.eye(2)), "observe": [[1.0, 0.0]]}),
        ("drift", {"sde": kolmo.SDE(lambda t, x: t - x, 1.0, dim=1)}),
    ],
)
def test_what_is_refused(named, change):
    given = {
        "sde": kolmo.SDE(lambda t, x: -x, 1.0, dim=1),
        "times": [0.0, 1.0],
        "observations": [1.0, 2.0],
        "noise": 0.1,
        "initial": (0.0, 1.0),
    } | change
    with pytest.raises(kolmo.InputError, match=named):
        likelihood.noisy_paths(**given)()


@pytest.mark.parametrize("seed", range(3))
def test_a_process_that_bends_in_its_tails_is_not_taken_for_a_linear_one(seed):
    """Linear where nearly all of the first law is, and not beyond: what happens there is seen all the same."""
    rng = np.random.default_rng(seed)
    spread, r = rng.uniform(0.5, 2.0), rng.uniform(1.0, 3.0)
    edge = rng.uniform(2.6, 3.4) * spread
    for power, linear in ((0.0, True), (4.0, False)):
        bend = lambda x, power=power: power * ((x - edge).clip(0) - (-x - edge).clip(0))  # noqa: E731
        sde = kolmo.SDE(lambda t, x, bend=bend: -x - bend(x), 1.0, dim=1)
        found = likelihood.noisy_paths(sde, [0.0, 0.4], [np.nan, 0.1], 10.0 * r, initial=(0.0, spread**2))
        assert found._linear is linear
