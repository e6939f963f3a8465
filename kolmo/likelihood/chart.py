"""Coordinates of one dimension in which the noise is the same everywhere, and the cuts at which they end."""

from typing import Any

import numpy as np
import torch
from numpy.polynomial import chebyshev, legendre

from kolmo.arrays import as_numpy
from kolmo.errors import InputError
from kolmo.likelihood.base import Likelihood
from kolmo.likelihood.modes import Modes, rule
from kolmo.problem.sde import SDE

# What may be gone beyond a cut, the part of the way there at which it is first, the factor by which one is moved, and
# the part of the way to a natural end that is left.
TAIL, NARROW, WIDER, NEAR = 1e-10, 0.4, 1.3, 0.05
# Points on the way outwards to a cut, and the logarithm of what is left of a stationary law where it is as good as one.
OUTWARDS, DEEP = 401, -50.0
# Polynomials of the chart; panels on which its length is summed, points in each, and rounds in which they are placed;
# steps of Newton's method.
CHART, PANELS, GAUSS, ROUNDS, NEWTON = 64, 400, 8, 8, 4


class OnChart(Likelihood):
    """Likelihood on a chart of the state space; ends that are cuts are moved outwards until they do nothing."""

    wider = WIDER

    def __init__(self, tol: float) -> None:
        super().__init__(tol)
        self._width = NARROW

    @property
    def _closed(self) -> bool:
        return self._space is None


class Chart:
    """A coordinate z in [−1, 1] on an interval, in which the noise is the same everywhere as the parameters are.

    The logarithm of dx/dz is a polynomial, so that the chart keeps its digits where x goes over many powers of ten.

    Parameters
    ----------
    sde : SDE
        The process, as it is at the moment.
    ends : (float, float)
        Ends of the interval.
    """

    def __init__(self, sde: SDE, ends: tuple[float, float]) -> None:
        self.ends = low, high = ends
        self._gauss, self._weights = legendre.leggauss(GAUSS)

        def noise(x: np.ndarray) -> np.ndarray:
            at = torch.as_tensor(np.clip(x, low, high).reshape(-1, 1))
            sigma = np.sqrt(as_numpy(sde.covariance(0.0, at).detach())[:, 0, 0]).reshape(x.shape)
            if not (sigma > 0).all():
                raise InputError("diffusion", "no noise inside the state space", "noise between the states")
            return np.asarray(sigma)

        edges, even = np.linspace(low, high, PANELS + 1), np.linspace(-1.0, 1.0, PANELS + 1)
        for _ in range(ROUNDS):  # panels of one length in z
            grown = np.append(0.0, np.cumsum(self._over(edges[:-1], edges[1:], lambda x: 1.0 / noise(x))))
            edges = np.interp(even, 2.0 * grown / grown[-1] - 1.0, edges)
        z = np.cos(np.pi * np.arange(CHART, -1, -1) / CHART)
        self._series = chebyshev.chebfit(z, np.log(noise(np.interp(z, even, edges))), CHART)
        self._edges = even
        grown = np.append(0.0, np.cumsum(self._over(even[:-1], even[1:], self._slope)))
        self._scale = (high - low) / grown[-1]
        self._grown = self._scale * grown

    def _over(self, begin: np.ndarray, end: np.ndarray, f: Any) -> np.ndarray:
        """Integrals of a function over intervals."""
        half = 0.5 * (end - begin)
        return np.asarray(half * (self._weights @ f(begin + (1.0 + self._gauss[:, None]) * half)))

    def _slope(self, z: np.ndarray) -> np.ndarray:
        return np.asarray(np.exp(chebyshev.chebval(z, self._series)))

    def _place(self, z: np.ndarray) -> np.ndarray:
        k = np.clip(np.searchsorted(self._edges, z) - 1, 0, PANELS - 1)
        return np.asarray(self.ends[0] + self._grown[k] + self._scale * self._over(self._edges[k], z, self._slope))

    def at(self, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x and dx/dz."""
        return torch.as_tensor(self._place(z.numpy())), torch.as_tensor(self._scale * self._slope(z.numpy()))

    def inverse(self, x: np.ndarray) -> np.ndarray:
        """Where x is: by interpolation, and Newton's method."""
        z = np.interp(x - self.ends[0], self._grown, self._edges)
        for _ in range(NEWTON):
            z = np.clip(z - (self._place(z) - x) / (self._scale * self._slope(z)), -1.0, 1.0)
        return np.asarray(z)


def modes_on(sde: SDE, chart: Chart, n: int, absorbing: tuple[bool, bool]) -> Modes:
    """Eigenfunctions of a process on a chart."""
    x, stretch = chart.at(rule(n).points)
    b, S = sde.drift(0.0, x[:, None])[:, 0], sde.covariance(0.0, x[:, None])[:, 0, 0]
    return Modes.of(n, (b / S)[None], (1.0 / S)[None], None, stretch[None], absorbing)


def confined(sde: SDE, inner: tuple[float, float], ends: tuple[float, float]) -> tuple[float, float]:
    """Ends of a cut, moved inwards to where next to nothing is left of a stationary law beyond an inner part."""
    found = []
    for begin, end in zip(inner, ends, strict=True):
        x = np.linspace(begin, end, OUTWARDS)
        at = torch.as_tensor(0.5 * (x[1:] + x[:-1]))[:, None]
        b, S = sde.drift(0.0, at).detach()[:, 0], sde.covariance(0.0, at).detach()[:, 0, 0]
        fallen = np.cumsum(as_numpy(2.0 * b / S) * np.diff(x))
        beyond = np.flatnonzero(fallen < DEEP)
        found.append(float(x[beyond[0] + 1]) if len(beyond) else end)
    return found[0], found[1]
