"""Linear processes: Gaussian transitions of dX = (A(t)X + β(t))dt + σ(t)dW, from one time to another."""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from scipy.linalg import expm

from kolmo.arrays import as_numpy
from kolmo.problem.sde import SDE

# Relative accuracy to which drift has to be affine and noise the same everywhere.
EXACT = 1e-9
# Times at which that is looked at.
LOOKS = 9
# Pieces per stretch of time for coefficients that change in it, at most, and the agreement that is wanted of them.
PIECES, AGREED = 1024, 1e-11
# Ratio of variances of the noise below which a direction is not reached.
SINGULAR = 1e-12
# Largest exponent of a piece; longer ones are halved so many times, and put together again.
SHORT = 0.5


class Transition(NamedTuple):
    """X_t given X_s = x is Gaussian with mean ``matrix @ x + shift`` and this covariance."""

    matrix: np.ndarray
    shift: np.ndarray
    covariance: np.ndarray

    def then(self, later: "Transition") -> "Transition":
        """Of this one and a later one after it."""
        M = later.matrix
        return Transition(M @ self.matrix, M @ self.shift + later.shift, M @ self.covariance @ M.T + later.covariance)


@dataclass(frozen=True)
class LinearProcess:
    r"""A process with affine drift and noise that is the same everywhere: its transitions are Gaussian.

    Attributes
    ----------
    sde : SDE
        The process.
    centre, size : ndarray, shape (d,)
        Where the drift is read: slopes are differences over ``size`` about the centre.
    pieces : int
        Pieces, per stretch between breakpoints, of Magnus' expansion of order four (1 where coefficients are constant).
    stops : tuple of float
        0, the breakpoints inside, and the horizon.

    Examples
    --------
    >>> ou = SDE(lambda t, x: 1.0 - 2.0 * x, 0.5, dim=1)
    >>> linear = LinearProcess.found(ou, 1.0, np.linspace(-3.0, 3.0, 50)[:, None])
    >>> move = linear.transition(0.0, 1.0)
    >>> np.allclose(move.covariance, 0.25 * (1 - np.exp(-4.0)) / 4.0), np.allclose(move.matrix, np.exp(-2.0))
    (True, True)
    >>> LinearProcess.found(SDE(lambda t, x: -(x**3), 0.5, dim=1), 1.0, np.linspace(-3.0, 3.0, 50)[:, None]) is None
    True
    """

    sde: SDE
    centre: np.ndarray
    size: np.ndarray
    pieces: int
    stops: tuple[float, ...]

    @classmethod
    def found(cls, sde: SDE, horizon: float, points: np.ndarray) -> "LinearProcess | None":
        """The process as a linear one, if it is that at all of the points (n, d)."""
        low, high = points.min(0), points.max(0)
        stops = (0.0, *(t for t in sde.breakpoints if 0.0 < t < horizon), horizon)
        linear = cls(sde, 0.5 * (low + high), np.maximum(high - low, 1e-300), 1, stops)
        times = [a + (b - a) * (k + 0.5) / LOOKS for a, b in pairwise(stops) for k in range(LOOKS)]
        if not all(linear._is_linear(t, points) for t in times):
            return None
        while linear.pieces < PIECES:
            finer = cls(sde, linear.centre, linear.size, 2 * linear.pieces, stops)
            ends = (linear.transition(0.0, horizon), finer.transition(0.0, horizon))
            if all(np.abs(a - b).max() <= AGREED * np.abs(b).max() for a, b in zip(*ends, strict=True)):
                break
            linear = finer
        return linear

    def transition(self, s: float, t: float) -> Transition:
        """From time s to a time t ≥ s."""
        d = len(self.centre)
        whole = Transition(np.eye(d), np.zeros(d), np.zeros((d, d)))
        for low, high in pairwise(self.stops):
            a, b = max(s, low), min(t, high)
            count = max(1, math.ceil(self.pieces * (b - a) / (high - low) - 1e-9)) if b > a else 0
            for k in range(count):
                whole = whole.then(self._piece(a + (b - a) * k / count, (b - a) / count))
        return whole

    def reaches(self, horizon: float) -> bool:
        """Whether noise moves every direction before the horizon, from and to every place: rounding aside."""
        whole = self.transition(0.0, horizon)
        if not np.isfinite(np.concatenate([whole.matrix.ravel(), whole.covariance.ravel()])).all():
            return False
        spreads = np.linalg.eigvalsh(whole.covariance)
        return bool(spreads[0] > SINGULAR * spreads[-1] and abs(np.linalg.det(whole.matrix)) > 0.0)

    def _is_linear(self, t: float, points: np.ndarray) -> bool:
        A, beta, S = self._coefficients(t)
        b, spread = as_numpy(self.sde.drift(t, points)), as_numpy(self.sde.covariance(t, points))
        scale = np.abs(points - self.centre) @ np.abs(A).T + np.abs(b) + np.abs(beta) + 1e-300
        straight = (np.abs(b - points @ A.T - beta) <= EXACT * scale.max()).all()
        return bool(straight and (np.abs(spread - S) <= EXACT * np.abs(S).max()).all())

    def _coefficients(self, t: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """A, β and Σ at a time."""
        d = len(self.centre)
        steps = 0.5 * np.diag(self.size)
        b = as_numpy(self.sde.drift(t, self.centre + np.concatenate([np.zeros((1, d)), steps, -steps])))
        A = ((b[1 : d + 1] - b[d + 1 :]) / self.size[:, None]).T
        A = np.where(np.abs(A) * self.size > 1e-14 * np.abs(b).max(), A, 0.0)
        return A, b[0] - A @ self.centre, as_numpy(self.sde.covariance(t, self.centre[None]))[0]

    def _generator(self, t: float) -> np.ndarray:
        """Matrix of the linear equation of (covariance and shift times the inverse transposed, the same)."""
        A, beta, S = self._coefficients(t)
        d = len(beta)
        C = np.zeros((2 * d + 1, 2 * d + 1))
        C[:d, :d], C[:d, d : 2 * d], C[d : 2 * d, d : 2 * d], C[:d, 2 * d] = A, S, -A.T, beta
        return C

    def _piece(self, s: float, h: float) -> Transition:
        """One piece (Van Loan 1978; Magnus' expansion as in Blanes et al. 2009), from short ones doubled."""
        d, gauss = len(self.centre), math.sqrt(3.0) / 6.0
        first, last = (self._generator(s + (0.5 + c) * h) for c in (-gauss, gauss))
        C = 0.5 * h * (first + last) - math.sqrt(3.0) / 12.0 * h * h * (first @ last - last @ first)
        rate = max(float(np.abs(C[:d, :d]).sum(1).max()), 1e-300)
        halvings = max(0, math.ceil(math.log2(rate / SHORT)))
        E = expm(C * 0.5**halvings)
        matrix = E[:d, :d]
        move = Transition(matrix, E[:d, 2 * d], E[:d, d : 2 * d] @ matrix.T)
        for _ in range(halvings):
            move = move.then(move)
        return move._replace(covariance=0.5 * (move.covariance + move.covariance.T))
