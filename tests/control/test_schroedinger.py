"""Schrödinger bridges: Gaussian closed form, marginals, and what cannot be reached."""

import numpy as np
import pytest
import torch

import kolmo
from kolmo import control
from kolmo.errors import InputError, NotConvergedError


def gauss(m, s):
    return lambda x: torch.exp(-0.5 * ((x[..., 0] - m) / s) ** 2)


@pytest.fixture(scope="module")
def bridge():
    bm = kolmo.SDE(0.0, diffusion=1.0, dim=1)
    return control.schroedinger_bridge(bm, gauss(-1.0, 0.5), gauss(1.0, 0.8), 1.0, kolmo.Box(-8.0, 8.0))


def test_gaussian_bridge_against_its_closed_form(bridge):
    """Static entropic transport between N(−1, ½²) and N(1, 0.8²) with noise 1: the optimal coupling is Gaussian."""
    s0, s1, eps = 0.5, 0.8, 1.0
    # covariance c of the coupling: c/(s0² s1² − c²) = 1/eps
    c = 0.5 * (np.sqrt(eps**2 + 4 * s0**2 * s1**2) - eps)
    x = bridge.grid.points[:, 0]
    covariance = (x - (-1.0)) @ bridge.coupling @ (x - 1.0)
    assert covariance == pytest.approx(c, abs=2e-3)
    slope = c / s0**2 - 1.0
    at = np.array([-1.5, -1.0, 0.0])
    np.testing.assert_allclose(bridge.sde.drift(0.0, at[:, None])[:, 0], 2.0 + slope * (at + 1.0), atol=1e-2)
    # entropy of the coupling relative to the free one started in the same law
    free = np.array([[s0**2, s0**2], [s0**2, s0**2 + eps]])
    joint = np.array([[s0**2, c], [c, s1**2]])
    mean = np.array([0.0, 2.0])
    inverse = np.linalg.inv(free)
    exact = 0.5 * (
        np.trace(inverse @ joint) - 2 + mean @ inverse @ mean + np.log(np.linalg.det(free) / np.linalg.det(joint))
    )
    assert bridge.cost == pytest.approx(exact, rel=2e-3)


def test_marginals_of_the_coupling_and_mass_on_the_way(bridge):
    np.testing.assert_allclose(bridge.coupling.sum(1), bridge.masses[0], atol=1e-8)
    np.testing.assert_allclose(bridge.coupling.sum(0), bridge.masses[-1], atol=1e-8)
    np.testing.assert_allclose(bridge.masses.sum(1), 1.0, atol=1e-9)
    assert (bridge.masses >= 0).all()
    assert (bridge.coupling >= 0).all()


def test_steered_paths_arrive_in_the_second_density(bridge):
    rng = np.random.default_rng(0)
    x = rng.normal(-1.0, 0.5, (4000, 1))
    steps = 200
    for n in range(steps):
        x = x + bridge.sde.drift(n / steps, x) / steps + rng.normal(size=x.shape) / np.sqrt(steps)
    assert abs(x.mean() - 1.0) < 4 * 0.8 / np.sqrt(4000) + 0.02
    assert abs(x.std() - 0.8) < 0.05


def test_wide_tails_at_open_faces_do_not_end_it():
    """At the ends of an open box the chain stays where it is: the 1e-8 of probability there is left out."""
    bm, s0, s1, noise = kolmo.SDE(0.0, diffusion=0.9, dim=1), 1.2, 0.6, 0.81
    found = control.schroedinger_bridge(bm, gauss(0.4, s0), gauss(-0.3, s1), 1.0, kolmo.Box(-7.0, 7.0), rtol=3e-2)
    C = 0.5 * (np.sqrt(4.0 * (s0 * s1) ** 2 + noise**2) - noise)
    v, slope = s1**2 - (C / s0) ** 2, C / s0**2 - 1.0
    exact = 0.5 * (v / noise + (0.7**2 + (slope * s0) ** 2) / noise - 1.0 - np.log(v / noise))
    assert found.status == "converged"
    assert abs(found.cost - exact) <= found.error_estimate <= 3e-2 * exact + 1e-6


def test_what_cannot_be_reached_is_told():
    still = kolmo.SDE(lambda t, x: -(x**3), diffusion=0.01, dim=1)
    with pytest.raises(NotConvergedError, match=r"nothing arrives at .*more noise"):
        control.schroedinger_bridge(still, gauss(-3.0, 0.1), gauss(3.0, 0.1), 0.1, kolmo.Box(-4.0, 4.0))


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (
            lambda bm: control.schroedinger_bridge(
                kolmo.SDE(lambda t, x: -(x**3), 1.0, dim=1), gauss(0, 1), gauss(1, 1), 1.0
            ),
            "box",
        ),
        (lambda bm: control.schroedinger_bridge(kolmo.SDE(lambda t, x: -x, 1.0), gauss(0, 1), gauss(1, 1), 1.0), "sde"),
        (lambda bm: control.schroedinger_bridge(bm, lambda x: 1.0 + 0.0 * x[..., 0], gauss(1, 1), 1.0), "density0"),
        (lambda bm: control.schroedinger_bridge(bm, gauss(0, 1), lambda x: 0.0 * x[..., 0], 1.0), "density1"),
        (
            lambda bm: control.schroedinger_bridge(bm, gauss(0, 1), gauss(1, 1), 1.0, kolmo.Box(-1, 1, "absorbing")),
            "box",
        ),
        (
            lambda bm: control.schroedinger_bridge(bm, lambda x: x[..., 0], gauss(1, 1), 1.0, kolmo.Box(-1, 1)),
            "density0",
        ),
        (lambda bm: control.schroedinger_bridge(bm, gauss(0, 1), lambda x: x, 1.0, kolmo.Box(-1, 1)), "density1"),
    ],
)
def test_bad_input_names_the_argument(call, argument):
    with pytest.raises(InputError) as caught:
        call(kolmo.SDE(0.0, diffusion=1.0, dim=1))
    assert caught.value.argument == argument


def test_costs_of_few_grids_are_extrapolated():
    """Gaussians (Bunne et al. 2023): six digits from grids of a few hundred nodes."""
    s0, s1, shift, sigma = 0.4, 0.6, 0.8, 0.7
    c = 0.5 * (np.sqrt(4 * (s0 * s1) ** 2 + sigma**4) - sigma**2)
    v, slope = s1**2 - (c / s0) ** 2, c / s0**2 - 1
    exact = 0.5 * (v / sigma**2 + (shift**2 + (slope * s0) ** 2) / sigma**2 - 1 - np.log(v / sigma**2))

    def normal(m, w):
        return lambda x: torch.exp(-0.5 * ((x[..., 0] - m) / w) ** 2)

    bm = kolmo.SDE(0.0, sigma, dim=1)
    bridge = control.schroedinger_bridge(
        bm, normal(0.0, s0), normal(shift, s1), 1.0, kolmo.Box(-6.0, 6.0), rtol=1e-6, atol=0.0
    )
    assert bridge.status == "converged"
    assert bridge.grid.size < 600
    assert abs(bridge.cost - exact) <= bridge.error_estimate <= 1e-6 * exact
