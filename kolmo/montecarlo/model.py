"""A problem as paths see it: its functions as NumPy functions of NumPy points, read inside closed faces."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from kolmo.arrays import Array, as_like, as_numpy
from kolmo.problem.box import Box
from kolmo.problem.events import Event
from kolmo.problem.faces import Absorbing, Robin
from kolmo.problem.problem import KolmogorovProblem
from kolmo.problem.sde import evaluate

# The end of a step that falls on a breakpoint is read just before it.
INSIDE = 1e-10


class Model:
    """A problem's functions as NumPy functions of NumPy points, read inside its closed faces.

    Parameters
    ----------
    problem : KolmogorovProblem
        The equation.
    like : tensor or None
        A tensor: functions are handed tensors on its device.
    """

    def __init__(self, problem: KolmogorovProblem, like: Array | None) -> None:
        self.problem, self.like = problem, like
        self.box: Box = problem.box
        self.torch = like is not None or problem.arrays == "torch"
        low, high = np.array(self.box.lower), np.array(self.box.upper)
        closed = self.box.where("closed")
        self.low, self.high = np.where(closed[:, 0], low, -np.inf), np.where(closed[:, 1], high, np.inf)
        self.closed = bool(closed.any())
        self.bridged = self.box.has("exits") or self.box.has("turns")
        self.bridged |= bool(problem.stops)
        self.entrances = [(i, s) for i, s, face in self.box.each() if not face.reached]
        self.periodic = np.array(self.box.periodic)
        self.origin, self.period = np.where(self.periodic, low, 0.0), np.where(self.periodic, high - low, 1.0)
        self.columns = self._columns()

    def _columns(self) -> int | None:
        """Count the columns; None for plain numbers."""
        finite_low = np.where(np.isfinite(self.box.lower), self.box.lower, 0.0)
        probe = np.clip(np.zeros((2, self.box.dim)), finite_low, np.maximum(finite_low, self.box.upper))
        values = [self.running(0.0, probe)] + ([] if self.problem.stationary else [self.final(probe)])
        for _, _, face in self.box.each():
            if isinstance(face, Absorbing | Robin):
                values.append(self.face(face.value, 0.0, probe))
        columns = [v.shape[1] for v in values if v.ndim == 2]
        return max(columns) if columns else None

    def _call(self, f: Callable[..., Array], *args: Any) -> np.ndarray:
        *time, x = args
        if not self.torch:
            return np.asarray(f(*time, x), dtype=float)
        import torch

        with torch.no_grad():
            hand = torch.as_tensor(x, device=None if self.like is None else self.like.device)
            return np.asarray(as_numpy(f(*time, hand)), dtype=float)

    def fit(self, x: np.ndarray) -> np.ndarray:
        """Points brought back to where coefficients may be read: projected on closed faces, wrapped around periods."""
        return self.wrap(np.clip(x, self.low, self.high) if self.closed else x)

    def readable(self, t: float, x: np.ndarray, dt: float) -> np.ndarray:
        """Points where a step of that length reads its coefficients: fit, and as far from entrances as its noise goes.

        Nearer, the drift is too large for one step.
        """
        x = self.fit(x)
        for axis, side in self.entrances:
            edge, inward = self.wall(axis, side)
            x = x.copy()
            gap = inward * (x[:, axis] - edge)
            # the noise is read at the path that is farthest from the end, where nothing is singular
            farthest = x[[int(gap.argmax())]]
            reach = math.sqrt(float(self.covariance(t, farthest)[0, axis, axis]) * dt)
            x[:, axis] = edge + inward * np.maximum(gap, reach)
        return x

    def mirror(self, x: np.ndarray) -> np.ndarray:
        """Points beyond an entrance put back inside, at the same distance (a fresh array where there is one)."""
        for axis, side in self.entrances:
            edge, inward = self.wall(axis, side)
            x = x.copy()
            x[:, axis] = edge + inward * np.abs(x[:, axis] - edge)
        return x

    def wall(self, axis: int, side: int) -> tuple[float, float]:
        """Where a closed face is, and the sign of the way inwards."""
        return (self.low, self.high)[side][axis], 1.0 if side == 0 else -1.0

    def wrap(self, x: np.ndarray) -> np.ndarray:
        """Points wrapped around periods."""
        if not self.periodic.any():
            return x
        return np.where(self.periodic, self.origin + np.mod(x - self.origin, self.period), x)

    def happens(self, event: Event, x: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Where an event moves paths to, and what it pays."""
        like = self.like
        moved, paid = self.problem.happens(event, x if like is None else as_like(x, like))
        return np.asarray(as_numpy(moved)), None if paid is None else np.asarray(as_numpy(paid))

    def drift(self, t: float, x: np.ndarray) -> np.ndarray:
        """Drift, shape (N, d)."""
        return self._call(self.problem.sde.drift, t, x)

    def diffusion(self, t: float, x: np.ndarray) -> np.ndarray:
        """Noise matrix, shape (N, d, m); a triangular one where only Σ was given."""
        if self.problem.sde._diffusion is None:
            return _triangular_root(self.covariance(t, x))
        return self._call(self.problem.sde.diffusion, t, x)

    def jumps(self, t: float, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rates (N, J) and displacements (N, J, d) of jumps."""
        sde = self.problem.sde
        return self._call(lambda t, x: sde.jumps(t, x)[0], t, x), self._call(lambda t, x: sde.jumps(t, x)[1], t, x)

    def covariance(self, t: float, x: np.ndarray) -> np.ndarray:
        """Covariance rate, shape (N, d, d)."""
        return self._call(self.problem.sde.covariance, t, x)

    def final(self, x: np.ndarray) -> np.ndarray:
        """Terminal data, shape (N,) or (N, k)."""
        return self._call(self.problem.final, x)

    def rate(self, t: float, x: np.ndarray) -> np.ndarray:
        """Killing rate, shape (N,)."""
        return self._call(self.problem.rate, t, x)

    def running(self, t: float, x: np.ndarray) -> np.ndarray:
        """Source, shape (N,) or (N, k)."""
        return self._call(self.problem.running, t, x)

    def face(self, value: Any, t: float, x: np.ndarray) -> np.ndarray:
        """Datum of a face, shape (N,) or (N, k)."""

        def read(t: float, x: Array) -> Array:
            return evaluate(value, t, x, "face value", "torch" if self.torch else None)

        result = self._call(read, t, x)
        if result.ndim == 2 and result.shape[1] == 1 and x.shape[1] == 1:
            return result[:, 0]
        return np.broadcast_to(result, (len(x), *result.shape[1:]))


def uniform(M: np.ndarray) -> bool:
    """Whether matrices of shape (N, d, m) are one matrix broadcast to all points."""
    return len(M) > 1 and M.strides[0] == 0


def _triangular_root(S: np.ndarray) -> np.ndarray:
    """Cholesky factors of positive semidefinite matrices; a column without a pivot is zero."""
    if uniform(S):
        return np.broadcast_to(_triangular_root(S[:1]), S.shape)
    L = np.zeros(S.shape)
    for j in range(S.shape[-1]):
        rest = S[..., j:, j] - np.einsum("...ik,...k->...i", L[..., j:, :j], L[..., j, :j])
        pivot = np.sqrt(np.maximum(rest[..., :1], 0.0))
        L[..., j:, j] = np.divide(rest, pivot, out=np.zeros(rest.shape), where=pivot > 0.0)
    return L
