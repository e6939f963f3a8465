"""Affine drift, Gaussian noise, and the ends of bridges in coordinates in which they are simple."""

from typing import NamedTuple

import numpy as np

from kolmo.kernels.logsums import pulled


class Affine(NamedTuple):
    """Affine coordinates z of points x: ``x = centre + z @ matrix.T``."""

    matrix: np.ndarray
    centre: np.ndarray

    def place(self, z: np.ndarray) -> np.ndarray:
        """Points at coordinates."""
        return np.asarray(self.centre + z @ self.matrix.T)

    def coordinates(self, x: np.ndarray) -> np.ndarray:
        """Coordinates of points."""
        return np.asarray(np.linalg.solve(self.matrix, (x - self.centre).T).T)


class Guess(NamedTuple):
    """Logarithms of masses with their factors on a lattice, with the noise divided by ``scale``."""

    axes: tuple[np.ndarray, ...]
    logs: np.ndarray
    scale: float

    def at(self, axes: tuple[np.ndarray, ...], scale: float) -> np.ndarray:
        """Potential of the other end on another lattice, for noise of another scale."""
        u, v = (tuple(self.scale * x for x in ends) for ends in (self.axes, axes))
        return -pulled(v, u, self.logs) * (scale / self.scale) ** 2


class Quadratic(NamedTuple):
    """The potential between Gaussians."""

    curvature: np.ndarray

    def at(self, axes: tuple[np.ndarray, ...], scale: float) -> np.ndarray:
        """On a lattice."""
        v = scale * np.stack(np.meshgrid(*axes, indexing="ij"), -1)
        return np.asarray(0.5 * np.einsum("...i,ij,...j->...", v, self.curvature, v))


def moments_of(axes: tuple[np.ndarray, ...], mass: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance."""
    points = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(axes))
    mean = mass.reshape(-1) @ points
    return mean, (points - mean).T @ (mass.reshape(-1, 1) * (points - mean))


def square_root(S: np.ndarray) -> np.ndarray:
    """Symmetric root."""
    values, vectors = np.linalg.eigh(S)
    return np.asarray((vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T)


def inverse_square_root(S: np.ndarray) -> np.ndarray:
    """Symmetric inverse square root."""
    values, vectors = np.linalg.eigh(S)
    return np.asarray((vectors / np.sqrt(values)) @ vectors.T)
