"""Planes in weight space: norms of hand-computed filters, principal components, lines, projections."""

import numpy as np
import pytest
import torch
from torch import nn

from kolmo import landscape
from kolmo.errors import InputError


class ByHand(nn.Module):
    """Weights whose filter norms are known: 5 and 13 for the convolution, 3 and 0 for the linear layer."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.linear = nn.Conv2d(1, 2, (1, 2)), nn.BatchNorm2d(2), nn.Linear(3, 2)
        with torch.no_grad():
            self.conv.weight.copy_(torch.tensor([[3.0, 4.0], [5.0, 12.0]]).reshape(2, 1, 1, 2))
            self.linear.weight.copy_(torch.tensor([[1.0, 2.0, 2.0], [0.0, 0.0, 0.0]]))


def test_filter_normalisation_of_a_network_computed_by_hand():
    for direction in landscape.random_plane(ByHand(), seed=3).directions:
        norms = direction["conv.weight"].flatten(1).norm(dim=1)
        torch.testing.assert_close(norms, torch.tensor([5.0, 13.0]))
        torch.testing.assert_close(direction["linear.weight"].norm(dim=1), torch.tensor([3.0, 0.0]))
        for name in ("conv.bias", "norm.weight", "norm.bias", "linear.bias"):
            assert not direction[name].any()


def test_other_normalisations():
    model = ByHand()
    (layer,) = landscape.random_plane(model, 0, "layer", directions=1).directions
    assert layer["conv.weight"].norm().item() == pytest.approx(np.sqrt(25 + 169), rel=1e-6)
    (whole,) = landscape.random_plane(model, 0, "model", directions=1, one_dimensional="scale").directions
    squares = sum(float(p.detach().square().sum()) for p in model.parameters())
    assert sum(float(d.square().sum()) for d in whole.values()) == pytest.approx(squares, rel=1e-5)
    (scaled,) = landscape.random_plane(model, 0, one_dimensional="scale", directions=1).directions
    assert scaled["norm.weight"].norm().item() == pytest.approx(np.sqrt(2), rel=1e-6)


def test_directions_are_gaussian_on_both_sides_and_reproducible():
    model = nn.Linear(200, 50)
    one, other = (landscape.random_plane(model, seed=5, normalization="none") for _ in range(2))
    assert one.fingerprint == other.fingerprint
    assert landscape.random_plane(model, seed=6).fingerprint != one.fingerprint
    entries = one.directions[0]["weight"]
    assert abs(entries.mean().item()) < 4 / 100
    assert entries.std().item() == pytest.approx(1.0, abs=0.03)
    assert one.record["seed"] == 5


def test_gram_matrix_and_weights():
    plane = landscape.random_plane(ByHand(), seed=1)
    flat = torch.stack([torch.cat([d[n].double().flatten() for n in plane.origin]) for d in plane.directions])
    np.testing.assert_allclose(plane.gram, (flat @ flat.T).numpy(), rtol=1e-6)
    alpha, distance = plane.project(plane.weights(0.3, -0.2))
    np.testing.assert_allclose(alpha, [0.3, -0.2], atol=1e-6)
    assert distance < 1e-4


def test_principal_components_of_a_trajectory_with_a_known_third_dimension():
    model = nn.Linear(3, 1, bias=False).double()
    with torch.no_grad():
        model.weight.zero_()
    t = np.linspace(0, 2 * np.pi, 9)[:-1]
    corners = np.stack([4 * np.cos(t), 2 * np.sin(t), 0.5 * np.cos(2 * t)], -1)
    plane = landscape.pca_plane(model, [{"weight": torch.as_tensor(row)[None]} for row in corners])
    variance = np.array([16.0, 4.0, 0.25])
    np.testing.assert_allclose(plane.record["explained_variance"], variance[:2] / variance.sum(), rtol=1e-10)
    np.testing.assert_allclose(plane.distance, np.abs(corners[:, 2]), atol=1e-6)
    np.testing.assert_allclose(np.abs(plane.trajectory), np.abs(corners[:, :2]), atol=1e-10)
    np.testing.assert_allclose(plane.gram, np.eye(2), atol=1e-12)
    for (low, high), path in zip(plane.span, plane.trajectory.T, strict=True):
        assert low < path.min()
        assert high > path.max()


def test_eigenvectors_of_a_quadratic():
    model = nn.Linear(4, 1, bias=False).double()
    scale = torch.tensor([1.0, 7.0, 3.0, -9.0], dtype=torch.float64)
    plane = landscape.hessian_plane(lambda f: 0.5 * (scale * f.weight**2).sum(), model)
    np.testing.assert_allclose(plane.record["eigenvalues"], [7.0, 3.0], rtol=1e-8)
    for direction, k in zip(plane.directions, (1, 2), strict=True):
        np.testing.assert_allclose(direction["weight"].abs().numpy()[0], np.eye(4)[k], atol=1e-6)


def test_line_ends_at_both_networks():
    a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    plane = landscape.line(a, b)
    assert torch.equal(plane.weights(0.0)["weight"], a.weight)
    torch.testing.assert_close(plane.weights(1.0)["bias"], b.bias.detach())


def test_a_plane_is_read_back(tmp_path):
    plane = landscape.random_plane(ByHand(), seed=1)
    plane.save(tmp_path / "plane.npz")
    again = landscape.Plane.load(tmp_path / "plane.npz")
    assert again.fingerprint == plane.fingerprint
    assert again.span == plane.span


def test_bad_input_is_named():
    model = nn.Linear(2, 2)
    with pytest.raises(InputError, match="normalization"):
        landscape.random_plane(model, 0, "filters")
    with pytest.raises(InputError, match="checkpoints"):
        landscape.pca_plane(model, [model, model])
    with pytest.raises(InputError, match="weight"):
        landscape.line(model, {"bias": torch.zeros(2)})
    with pytest.raises(InputError, match="same weights"):
        landscape.line(model, model)
    other = nn.Linear(2, 3)
    with pytest.raises(InputError, match="architecture"):
        landscape.line(model, other)
    with pytest.raises(InputError, match="architecture"):
        landscape.pca_plane(model, [other] * 3)
    with pytest.raises(InputError, match="at least two"):
        landscape.hessian_plane(lambda f: f.weight.square().sum(), nn.Linear(1, 1, bias=False))


def test_seeds_are_whole_numbers_of_any_kind():
    model = nn.Linear(2, 2)

    def loss(f):
        return f.weight.pow(4).sum()

    for seed in (np.int64(3), np.int32(3)):
        plane = landscape.random_plane(model, seed=seed)
        assert plane.fingerprint == landscape.random_plane(model, seed=3).fingerprint
        assert landscape.curvature(loss, model, top=1, seed=seed).settings["seed"] == 3
        assert landscape.sharpness(loss, model, seed=seed)["random sharpness"].value > 0
    for measure in (landscape.random_plane, lambda m, seed: landscape.curvature(loss, m, seed=seed)):
        with pytest.raises(InputError, match="seed"):
            measure(model, seed=1.5)


def test_directions_that_move_nothing_are_refused():
    with pytest.raises(InputError, match="one_dimensional='scale'"):
        landscape.random_plane(nn.LayerNorm(4))
    assert landscape.random_plane(nn.LayerNorm(4), one_dimensional="scale").gram[0, 0] > 0
    zeros = nn.Linear(2, 2)
    nn.init.zeros_(zeros.weight)
    with pytest.raises(InputError, match="all zero"):
        landscape.random_plane(zeros)
