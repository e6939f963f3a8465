"""Densities given as functions: where they are, and their masses on lattices, also where they jump."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.ndimage import binary_dilation

from kolmo.arrays import as_numpy, default_device, is_tensor
from kolmo.errors import InputError

# Below this part of its largest value a density counts as zero: of a Gaussian 1e-14 is left out.
TAIL = 1e-13
# At the ends of its box a density is cut off in its tails if it is below this part of its largest value.
SMALL = 1e-3
# Nodes per axis of the first grid on which a density is looked for, and of later ones, by dimension; how often they
# close in at most, and until when.
SCAN, CLOSER = {1: 8193, 2: 513, 3: 65}, {1: 4097, 2: 257, 3: 49}
ROUNDS, CLOSE = 40, 0.8
# Without a box densities are looked for out to this distance, on a scale that is even in the logarithm beyond FINE.
FAR, FINE = 1e6, 1e-2
# A cell is looked into where the density changes by this part of its largest value across it; it is broken where most
# of the change happens between neighbours of so many points per axis.
STEEP, BROKEN, INSIDE = 0.1, 0.5, {1: 512, 2: 16, 3: 6}


@dataclass(frozen=True)
class GivenDensity:
    """A density as the user gave it: checked, and zero outside its box.

    Attributes
    ----------
    function : callable
        ``function(x)`` -> ``(...)``, torch tensors.
    name : str
        The argument it was given as.
    lower, upper : ndarray, shape (d,)
        Box, perhaps infinite.
    device : torch.device
        Where the points are that it is handed.
    """

    function: Callable[..., Any]
    name: str
    lower: np.ndarray
    upper: np.ndarray
    device: Any = field(default_factory=default_device)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Values at points (n, d).

        Raises
        ------
        InputError
            For values that are no finite, non-negative numbers.
        """
        held = np.clip(x, self.lower, self.upper)
        with torch.no_grad():
            values = self.function(torch.as_tensor(held, device=self.device))
        values = as_numpy(values) if is_tensor(values) else np.asarray(values, dtype=float)
        if values.shape != x.shape[:-1]:
            raise InputError(self.name, f"a result of shape {values.shape}", f"shape {x.shape[:-1]}")
        if not np.isfinite(values).all() or (values < 0).any():
            raise InputError(
                self.name, f"values from {values.min()} to {values.max()}", "a finite, non-negative density"
            )
        return np.where((held == x).all(-1), values, 0.0)

    def found(self) -> tuple["GivenDensity", tuple[np.ndarray, np.ndarray]]:
        """The density, with a box outside which there is next to nothing of it.

        Ends of a box are cuts, as open faces are: where the density is small at them and falls off beyond, the cut
        moves outwards; else it stays, and there is nothing beyond.

        Raises
        ------
        InputError
            Where it is zero wherever it was looked for, or has no end.
        """
        low, high = self.closed_in(self._axes())
        if not np.isfinite(self.upper - self.lower).all():
            if (np.maximum(np.abs(low), np.abs(high)) >= 0.5 * FAR).any():
                raise InputError(self.name, f"no end of it up to {FAR:g}", "a density that falls off", "give a box")
            return self, (low, high)
        cut = (low <= self.lower) | (high >= self.upper)
        if not cut.any() or not self._small_at_ends():
            return self, (low, high)
        span = self.upper - self.lower
        wider = replace(self, lower=self.lower - span, upper=self.upper + span)
        try:
            low, high = wider.closed_in(wider._axes())
        except InputError:  # it is not meant to be looked at there
            return self, self.closed_in(self._axes())
        if ((low <= wider.lower) | (high >= wider.upper)).any():
            return self, self.closed_in(self._axes())
        return wider, (low, high)

    def _axes(self) -> list[np.ndarray]:
        """Axes of the grid on which it is looked for."""
        count = SCAN[len(self.lower)]
        scan = FINE * np.sinh(np.linspace(-1.0, 1.0, count) * np.arcsinh(FAR / FINE))
        return [
            np.linspace(a, b, count) if np.isfinite(b - a) else np.unique(np.clip(scan, a, b))
            for a, b in zip(self.lower, self.upper, strict=True)
        ]

    def _small_at_ends(self) -> bool:
        """Whether it has all but vanished at the ends of its box."""
        axes = self._axes()
        values = self(_lattice(axes)).reshape([len(axis) for axis in axes])
        inner = values[(slice(1, -1),) * values.ndim]
        ends = values.copy()
        ends[(slice(1, -1),) * values.ndim] = 0.0
        return bool(ends.max() <= SMALL * inner.max())

    def closed_in(
        self, axes: list[np.ndarray], place: Callable[[np.ndarray], np.ndarray] = lambda z: z
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ends of its hull, in coordinates of which ``place`` makes points, beginning with a lattice on these axes."""
        for _ in range(ROUNDS):
            values = self(place(_lattice(axes)))
            if not values.max() > 0:
                raise InputError(
                    self.name, f"zero at all of {values.size} points", "a density that is found", "give a box around it"
                )
            there = (values > TAIL * values.max()).reshape([len(axis) for axis in axes])
            ends = [_ends(axis, there, i) for i, axis in enumerate(axes)]
            shrunk = [(b - a) / (axis[-1] - axis[0]) for (a, b), axis in zip(ends, axes, strict=True)]
            even = all(np.ptp(np.diff(axis)) <= 1e-6 * (axis[-1] - axis[0]) for axis in axes)
            axes = [np.linspace(a, b, CLOSER[len(axes)]) for a, b in ends]
            if even and min(shrunk) > CLOSE:
                break
        return np.array([axis[0] for axis in axes]), np.array([axis[-1] for axis in axes])


class Masses(NamedTuple):
    """Masses of the nodes of a lattice, not normalised, and the integral of ρ log ρ."""

    masses: np.ndarray
    entropy: float


def masses(density: GivenDensity, axes: tuple[np.ndarray, ...], place: Callable[[np.ndarray], np.ndarray]) -> Masses:
    """Masses by the trapezoidal rule; cells across which the density jumps are summed over finer points.

    What is found there is given to the corners by multilinear weights, so that mass and mean stay what they are: errors
    fall with the square of the spacing, whatever place the jump has in its cell. (Without jumps they fall faster than
    any power.)

    Parameters
    ----------
    density : GivenDensity
        The density.
    axes : tuple of ndarray
        Uniform nodes per axis.
    place : callable
        Points (n, d) at coordinates (n, d).
    """
    values = density(place(_lattice(axes))).reshape([len(axis) for axis in axes])
    steps = [axis[1] - axis[0] for axis in axes]
    corner = float(np.prod(steps)) * 0.5 ** len(axes)
    corners = [_corner(values, k) for k in np.ndindex(*[2] * len(axes))]
    steep = np.ptp(corners, axis=0) > STEEP * values.max()
    cells = np.argwhere(binary_dilation(steep, np.ones([3] * len(axes))))  # a corner may be cut off the next cell
    ends = np.stack([c[tuple(cells.T)] for c in corners])
    finer, jumps, integrals = _inside(density, axes, cells, ends, place)
    broken = jumps > STEEP * values.max()
    whole = np.ones(steep.shape, dtype=bool)
    whole[tuple(cells[broken].T)] = False
    found, surprise = np.zeros(values.shape), 0.0
    for k, value in zip(np.ndindex(*[2] * len(axes)), corners, strict=True):
        share = np.where(whole, corner * value, 0.0)
        share[tuple(cells[broken].T)] = finer[broken][(slice(None), *k)]
        found[tuple(slice(i, n - 1 + i) for i, n in zip(k, values.shape, strict=True))] += share
        surprise += float(np.where(whole, corner * _xlogx(value), 0.0).sum())
    return Masses(found, surprise + float(integrals[broken].sum()))


def _inside(
    density: GivenDensity, axes: tuple[np.ndarray, ...], cells: np.ndarray, ends: np.ndarray, place: Callable[..., Any]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of cells (m, d) with corner values (2^d, m): masses (m, 2, .., 2) of the corners, height of a jump, ∫ρ log ρ."""
    d = len(axes)
    parts = (np.arange(INSIDE[d]) + 0.5) / INSIDE[d]
    steps = np.array([axis[1] - axis[0] for axis in axes])
    corners = np.stack([axis[cells[:, i]] for i, axis in enumerate(axes)], -1)
    points = corners[:, None] + _lattice([parts] * d) * steps
    values = density(place(points.reshape(-1, d))).reshape(len(cells), *[len(parts)] * d)
    flat = values.reshape(len(cells), len(parts) ** d)
    change = np.max([np.abs(np.diff(values, axis=1 + i)).max(tuple(range(1, d + 1))) for i in range(d)], axis=0)
    whole = np.maximum(flat.max(1), ends.max(0)) - np.minimum(flat.min(1), ends.min(0))
    # what does not change inside by as much as to the corners jumps next to one
    jumps = np.where((change > BROKEN * whole) | (np.ptp(flat, axis=1) < BROKEN * whole), whole, 0.0)
    hats, volume, shares = np.stack([1.0 - parts, parts], 1), float(np.prod(steps / len(parts))), values
    for _ in range(d):
        shares = np.tensordot(shares, hats, ((1,), (0,)))
    return volume * shares, jumps, volume * _xlogx(flat).sum(1)


def _xlogx(values: np.ndarray) -> np.ndarray:
    return np.where(values > 0, values * np.log(np.where(values > 0, values, 1.0)), 0.0)


def _corner(values: np.ndarray, k: tuple[int, ...]) -> np.ndarray:
    """Values at one of the corners of all cells."""
    return values[tuple(slice(i, n - 1 + i) for i, n in zip(k, values.shape, strict=True))]


def _lattice(axes: Any) -> np.ndarray:
    """Points of a tensor lattice in C order, shape (n, d)."""
    return np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(axes))


def _ends(axis: np.ndarray, there: np.ndarray, i: int) -> tuple[float, float]:
    """First and last node that a mask reaches along axis i, and one more on either side."""
    reached = np.flatnonzero(there.any(tuple(j for j in range(there.ndim) if j != i)))
    return float(axis[max(reached[0] - 1, 0)]), float(axis[min(reached[-1] + 1, len(axis) - 1)])
