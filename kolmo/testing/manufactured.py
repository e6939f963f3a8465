"""Problems made so that a given wave solves them, with any faces."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from kolmo.arrays import Array, as_like, namespace
from kolmo.catalog import Case
from kolmo.problem import KolmogorovProblem
from kolmo.problem.box import Box
from kolmo.problem.faces import Absorbing, Robin
from kolmo.problem.sde import SDE

# Faces at which the solution of ``manufactured`` is even; its drift at entrances, in units of Σ over the distance.
EVEN, PULL = {"reflecting", "entrance"}, 0.8


def manufactured(
    faces: Sequence[tuple[str, str]], *, horizon: float = 0.4, autonomous: bool = False, mixed: float = 0.4
) -> Case:
    r"""Problem with everything in it and a known answer, for any mixture of faces in one to three dimensions.

    .. math:: g = -\partial_t u - b\cdot\nabla u - \tfrac12\Sigma:\nabla^2 u + cu \quad\text{for a chosen } u

    Full tensor, drift, killing and two columns, which depend on time and place; the source and the face values are what
    the equation leaves over for chosen products of waves.

    Parameters
    ----------
    faces : sequence of (str, str)
        Low and high face per axis: "open", "natural", "reflecting", "entrance", "absorbing", "robin" or "periodic".
    horizon : float
        Time T.
    autonomous : bool
        True: coefficients that do not depend on time (the source still does).
    mixed : float
        Correlation of the noise between axes.

    Returns
    -------
    Case

    Raises
    ------
    InputError
        For faces that are not known.

    References
    ----------
    P. J. Roache (2002), Code verification by the method of manufactured solutions, Journal of Fluids Engineering 124.

    Examples
    --------
    >>> from kolmo.testing import order_of_accuracy
    >>> case = manufactured([("robin", "absorbing"), ("periodic", "periodic")])
    >>> table = order_of_accuracy(case.problem, case.exact, case.points, nodes=[12, 24], steps=16, scheme="central4")
    >>> bool(table.rows[-1][-1] > 3.0)
    True
    """
    waves = _Waves(faces, horizon, 0.0 if autonomous else 1.0, mixed)
    low, high = np.full(waves.d, 0.2), 0.2 + waves.lengths
    problem = KolmogorovProblem(
        SDE(waves.drift, covariance=waves.covariance, dim=waves.d),
        lambda x: waves.solution(horizon, x),
        horizon,
        Box(low, high, boundary=[tuple(waves.face(i, s) for s in (0, 1)) for i in range(waves.d)]),
        killing=waves.killing,
        source=waves.source,
    )
    z = np.array([[0.5, 0.5, 0.5], [0.2, 0.7, 0.3], [0.85, 0.3, 0.6], [0.05, 0.95, 0.1]])[:, : waves.d]
    return Case("manufactured", problem, low + z * waves.lengths, "Roache (2002)", waves.solution)


class _Waves:
    """Coefficients and solution of ``manufactured``; z is the position in the box, from 0 to 1 along each axis."""

    def __init__(self, faces: Sequence[tuple[str, str]], horizon: float, clock: float, mixed: float) -> None:
        self.faces, self.d, self.clock, self.mixed = [tuple(pair) for pair in faces], len(faces), clock, mixed
        self.lengths = np.array([1.0, 1.4, 0.8])[: self.d]
        self.horizon = horizon

    def face(self, axis: int, side: int) -> Any:
        """The condition on a face, with the values that the solution has there."""
        word = self.faces[axis][side]
        if word == "absorbing":
            return Absorbing(self.solution)
        if word == "robin":
            return Robin(lambda t, x: 0.6 + 0.2 * x[..., 0], lambda t, x: self._elastic(t, x, axis, side))
        return word

    def _shapes(self, axis: int, column: int, z: Array) -> tuple[Array, Array, Array]:
        """One factor of the solution along an axis with its two derivatives in z: what the faces there allow."""
        xp, words, phase = namespace(z), self.faces[axis], 0.3 + axis + column
        if "periodic" in words:
            w, at = 2.0 * math.pi, 2.0 * math.pi * z + phase
        elif not EVEN.isdisjoint(words) and "open" not in words:
            w, at = math.pi, math.pi * z
        elif "open" in words:
            slope = 0.5 + 0.2 * column if EVEN.isdisjoint(words) else 0.0
            return 1.0 + slope * z, slope + 0.0 * z, 0.0 * z
        else:
            w, at = 1.7, 1.7 * z + phase
        return 1.4 + xp.cos(at), -w * xp.sin(at), -(w**2) * xp.cos(at)

    def _derivatives(self, t: float, x: Array) -> tuple[Array, Array, Array, Array]:
        """u (..., 2), ∂_t u, ∇u (..., d, 2) and ∇²u (..., d, d, 2)."""
        xp, z = namespace(x), (x - 0.2) / as_like(self.lengths, x)
        columns = []
        for column, (a, da) in enumerate(
            ((math.exp(-t), -math.exp(-t)), (1.0 + math.sin(2.0 * t), 2.0 * math.cos(2.0 * t)))
        ):
            f = [self._shapes(i, column, z[..., i]) for i in range(self.d)]

            def term(orders: Any, f: Any = f) -> Array:
                result = f[0][orders[0]] / self.lengths[0] ** orders[0]
                for i in range(1, self.d):
                    result = result * f[i][orders[i]] / self.lengths[i] ** orders[i]
                return result

            units = np.eye(self.d, dtype=int)
            first = xp.stack([a * term(e) for e in units], -1)
            second = xp.stack([xp.stack([a * term(e + g) for g in units], -1) for e in units], -2)
            columns.append((a * term([0] * self.d), da * term([0] * self.d), first, second))
        return tuple(xp.stack(parts, -1) for parts in zip(*columns, strict=True))

    def solution(self, t: float, x: Array) -> Array:
        """The chosen answer, two columns."""
        return self._derivatives(t, x)[0]

    def drift(self, t: float, x: Array) -> Array:
        """Waves; at natural and open faces pointing inwards, at entrances without bound."""
        xp, z = namespace(x), (x - 0.2) / as_like(self.lengths, x)
        parts = []
        for i, words in enumerate(self.faces):
            j = (i + 1) % self.d
            rough = 0.5 * (
                xp.sin(2.0 * math.pi * z[..., j]) if self.faces[j][0] == "periodic" else xp.cos(2.0 * x[..., j])
            )
            low, high = (1.0 if w in ("natural", "open") else 0.0 for w in words)
            inside = (z[..., i] if low else 1.0) * ((1.0 - z[..., i]) if high else 1.0)
            b = (rough + 0.2 + 0.3 * self.clock * t) * inside
            b = b + 0.4 * low * (1.0 - z[..., i]) - 0.4 * high * z[..., i]
            for word, distance, sign, end in zip(
                words, (z[..., i], 1.0 - z[..., i]), (1.0, -1.0), (0.0, 1.0), strict=True
            ):
                if word == "entrance":
                    noise = (1.0 + 0.5 * self.clock * t) * float(self._spread(i, np.asarray(end))) ** 2
                    b = b + sign * PULL * noise / (distance * self.lengths[i]) * (1.0 - distance)
            parts.append(b)
        return xp.stack(parts, -1)

    def _spread(self, i: int, z: Array) -> Array:
        """Noise along an axis: vanishes at natural faces."""
        low, high = (w == "natural" for w in self.faces[i])
        return (0.7 + 0.1 * i) * (2.0 * z if low else 1.0) * (2.0 * (1.0 - z) if high else 1.0) + 0.0 * z

    def covariance(self, t: float, x: Array) -> Array:
        """Full tensor; its mixed part fades at reflecting and open faces, which the solution would not satisfy."""
        xp, z = namespace(x), (x - 0.2) / as_like(self.lengths, x)
        noise = [self._spread(i, z[..., i]) for i in range(self.d)]
        faded = [not {"reflecting", "open"}.isdisjoint(words) for words in self.faces]
        fade = [xp.sin(math.pi * z[..., i]) ** 2 if faded[i] else 1.0 for i in range(self.d)]
        rows = [
            [noise[i] * noise[j] * (1.0 if i == j else self.mixed * fade[i] * fade[j]) for j in range(self.d)]
            for i in range(self.d)
        ]
        return (1.0 + 0.5 * self.clock * t) * xp.stack([xp.stack(row, -1) for row in rows], -2)

    def killing(self, t: float, x: Array) -> Array:
        """A rate that varies."""
        return 0.3 + 0.1 * namespace(x).cos(x[..., 0] + self.clock * t)

    def source(self, t: float, x: Array) -> Array:
        """What the equation leaves over."""
        u, change, gradient, hessian = self._derivatives(t, x)
        xp = namespace(x)
        transport = xp.einsum("...i,...ik->...k", self.drift(t, x), gradient)
        diffusion = xp.einsum("...ij,...ijk->...k", self.covariance(t, x), hessian)
        return self.killing(t, x)[..., None] * u - change - transport - 0.5 * diffusion

    def _elastic(self, t: float, x: Array, axis: int, side: int) -> Array:
        """½ n·Σ∇u + κu on a face."""
        u, _, gradient, _ = self._derivatives(t, x)
        slope = namespace(x).einsum("...j,...jk->...k", self.covariance(t, x)[..., axis, :], gradient)
        return (0.5 if side == 1 else -0.5) * slope + (0.6 + 0.2 * x[..., 0])[..., None] * u
