"""Summaries: exact numbers of quadratics and waves, jackknife errors, seeds and paired comparisons."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from kolmo import landscape
from kolmo.errors import InputError
from kolmo.landscape import Quantity, Summary


def made(axes, field, kind="random", random=False):
    values = field if random else field[..., None]
    return landscape.Surface(
        axes, {"loss": values}, np.ones(values.shape[:-1], bool), {"kind": kind}, {"seed": 0}, {}, random
    )


def grid(n=41, span=1.0):
    axis = np.linspace(-span, span, n)
    return (axis, axis), np.meshgrid(axis, axis, indexing="ij")


def test_a_quadratic_gives_its_exact_radius_and_sharpness():
    axes, (a, b) = grid()
    found = landscape.summary(made(axes, 0.5 + 4 * a**2 + 16 * b**2))
    radius = 1 / np.sqrt(4 * np.cos(t := 2 * np.pi * np.arange(64) / 64) ** 2 + 16 * np.sin(t) ** 2) * np.sqrt(0.5)
    assert found["doubling radius"].value == pytest.approx(radius.mean(), rel=1e-4)
    assert found["least doubling radius"].value == pytest.approx(np.sqrt(0.5 / 16), rel=1e-4)
    assert found["sharpness in the plane"].value == pytest.approx(100 * 20 * 0.25**2 / 1.5, rel=1e-6)
    assert found["negative curvature in the plane"].value == 0.0
    assert found["excess variation"].value == pytest.approx(0.0, abs=1e-12)
    assert found["doubling radius"].standard_error == 0.0


def test_a_quadratic_loss_of_a_network_end_to_end():
    model = nn.Linear(2, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.3, 0.4]]))
    centre = model.weight.detach().clone()
    plane = landscape.random_plane(model, seed=3, normalization="model")
    found = landscape.surface(lambda f: 2.0 + 3.0 * (f.weight - centre).square().sum(), model, plane, points=31, span=3)
    d = [plane.directions[k]["weight"].numpy()[0] for k in (0, 1)]
    angles = 2 * np.pi * np.arange(64) / 64
    lengths = [np.linalg.norm(np.cos(t) * d[0] + np.sin(t) * d[1]) for t in angles]
    exact = np.sqrt(2 / 3) / np.array(lengths)
    summary = landscape.summary(found)
    assert exact.max() < 3  # within the window
    assert summary["doubling radius"].value == pytest.approx(exact.mean(), rel=1e-3)
    assert summary["least doubling radius"].value == pytest.approx(exact.min(), rel=1e-3)


def test_a_radius_beyond_the_window_is_infinite():
    axes, (a, b) = grid(11)
    found = landscape.summary(made(axes, 1.0 + 0.1 * (a**2 + b**2)))
    assert found["doubling radius"].value == np.inf


def bowl(n):
    axes, (a, b) = grid(n)
    return made(axes, 2.0 + 10 * (a**2 + b**2))


def test_what_a_surface_does_not_tell_is_left_out():
    names = {"excess variation", "negative curvature in the plane", "short-wave share"}
    whole, even = landscape.summary(bowl(21)), landscape.summary(bowl(20))
    assert names <= set(whole)
    assert set(whole) - set(even) == {"doubling radius", "least doubling radius", "sharpness in the plane"}
    one = bowl(21)
    holes = np.ones((21, 21), bool)
    holes[3, 4] = False
    assert set(whole) - set(landscape.summary(dataclasses.replace(one, evaluated=holes))) == names


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_surface_with_values_that_are_not_finite_has_no_numbers(value):
    one = bowl(21)
    one.values["loss"][0, 0] = value
    assert np.isnan(list(landscape.summary(one).values().values())).all()


def test_no_radius_at_which_a_loss_that_is_not_positive_doubles():
    one = bowl(21)
    one.values["loss"][:] -= 3.0
    assert np.isnan(landscape.summary(one)["doubling radius"].value)


def test_roughness_sees_waves_and_their_length():
    axes, (a, b) = grid(51)
    bowl = 1 + a**2 + b**2
    smooth, rough, long = (
        landscape.summary(made(axes, bowl + amplitude * np.sin(np.pi * k * a)))
        for amplitude, k in ((0.0, 1), (0.05, 12), (0.05, 1.5))
    )
    assert rough["excess variation"].value > 0.1 > smooth["excess variation"].value
    assert rough["short-wave share"].value > 0.9
    assert long["short-wave share"].value < 0.1
    assert rough["negative curvature in the plane"].value > 0.3
    assert rough["mean slope"].value > smooth["mean slope"].value


def test_barrier_on_a_line():
    t = np.linspace(-0.5, 1.5, 41)
    found = landscape.summary(made((t,), 1 + 0.5 * t + 2 * np.sin(np.pi * t) ** 2, kind="line"))
    assert found["barrier"].value == pytest.approx(2.0, abs=1e-3)


def test_jackknife_is_the_standard_error_of_a_mean(rng):
    axes, (a, b) = grid(9)
    noise = rng.normal(0, 0.1, 30)
    draws = (1 + a**2 + b**2)[..., None] * (1 + noise)
    found = landscape.summary(made(axes, draws, random=True))
    slope = np.sqrt(np.sum(np.square(np.gradient(1 + a**2 + b**2, *axes)), axis=0)).mean()
    exact = slope * noise.std(ddof=1) / np.sqrt(30)
    assert found["mean slope"].standard_error == pytest.approx(exact, rel=1e-6)
    assert found["least doubling radius"].standard_error == pytest.approx(0.0, abs=1e-8)  # scale-free


def test_curvature_enters_with_its_errors():
    model = nn.Linear(60, 1, bias=False).double()
    scale = torch.linspace(-1, 4, 60, dtype=torch.float64)
    curv = landscape.curvature(lambda f: 0.5 * (scale * f.weight**2).sum(), model, top=2, density_steps=40)
    found = landscape.summary(curvature=curv)
    assert found["largest eigenvalue"].value == pytest.approx(4.0, rel=1e-3)
    assert abs(found["trace"].value - 90.0) <= 4 * found["trace"].standard_error + 1e-6
    assert abs(found["negative fraction"].value - 12 / 60) < 0.1
    assert found["indefiniteness"].value == pytest.approx(0.25, rel=0.1)


def test_published_sharpness_of_a_quadratic():
    model = nn.Linear(2, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 2.0]]))
    found = landscape.sharpness(lambda f: f.weight.square().sum(), model, rho=0.1, sigma=0.01, pairs=200)
    norm = np.sqrt(5)
    assert found["SAM sharpness"].value == pytest.approx((norm + 0.1) ** 2 - 5)
    step = 0.5 * np.array([1.0, 8.0]) / np.sqrt(1 + 16)
    assert found["adaptive SAM sharpness"].value == pytest.approx(np.sum((np.array([1, 2]) + step) ** 2) - 5)
    exact = 1e-4 * 5  # the slope, 50 times as large for one ε, is out of the pairs
    assert abs(found["random sharpness"].value - exact) < 4 * found["random sharpness"].standard_error
    assert found["random sharpness"].standard_error < 0.1 * exact
    assert found["SAM sharpness"].standard_error == 0.0


def seeds(values):
    return [Summary({"trace": Quantity(float(v), 0.0, "trace")}) for v in values]


def test_over_seeds_and_paired():
    found = landscape.over_seeds(seeds([1, 2, 3, 4, 5]))["trace"]
    assert found.value == 3.0
    assert found.standard_error == pytest.approx(np.sqrt(2.5 / 5))
    one = landscape.paired(seeds([2, 3, 4, 5, 6]), seeds([1, 2, 3, 4, 5]))["trace"]
    assert (one.difference, one.standard_error) == (1.0, 0.0)
    assert one.p_value == 2 / 2**5
    assert landscape.paired(seeds([1, -1]), seeds([0, 0]))["trace"].p_value == 1.0
    with pytest.raises(InputError, match="two"):
        landscape.over_seeds(seeds([1]))
    with pytest.raises(InputError, match="second"):
        landscape.paired(seeds([1, 2]), seeds([1]))
