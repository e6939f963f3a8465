"""Ways out of the box: where probability leaves, the loads that measure it, and what a law says of it over time."""

from dataclasses import replace
from typing import Any

import numpy as np

from kolmo.arrays import Array, as_like, is_tensor, zeros
from kolmo.errors import InputError
from kolmo.grid import Grid
from kolmo.grid.times import SAME, find
from kolmo.problem.faces import Robin
from kolmo.schemes.base import FaceData
from kolmo.schemes.faces import held
from kolmo.schemes.generator import Generator, Semi
from kolmo.schemes.local import wall_nodes

Exit = tuple[int, int] | str
"""A way out: (axis, side) of an absorbing or elastic face, or "killing"."""

# Interpolation in time takes this many time nodes: one order more than the steps have, so that it does not limit them.
TIME_NODES = 6


class WaysOut:
    """Where probability leaves: absorbing and elastic faces and killing.

    u = 1 solves the equation when every face value and the source are those of a sure reward of one on leaving. Split
    by way out, these loads measure what leaves where: the rate is their product with the masses.

    Parameters
    ----------
    generator : Generator
        The semi-discrete equation.

    Attributes
    ----------
    names : tuple
        The ways out: (axis, side) per face in order, then "killing".
    owned : dict
        Per absorbing face its nodes, as 0 and 1, shape (size,). Nodes shared by two faces belong to the later axis, as
        their values do in ``Generator.boundary``.
    """

    def __init__(self, generator: Generator) -> None:
        self.generator = generator
        self.faces = {(i, s): face for i, s, face in generator.box.each() if face.exits}
        self.names: tuple[Exit, ...] = (*self.faces, *(() if generator.problem.killing is None else ("killing",)))
        self.owned: dict[Exit, np.ndarray] = {}
        for key, face in self.faces.items():
            if face.imposed:
                mine = held(generator.grid, *key, face).astype(float)
                self.owned = {k: v * (1.0 - mine) for k, v in self.owned.items()} | {key: mine}

    def loads(self, semi: Semi, t: float) -> dict[Exit, Array]:
        """Per way out, the load (size,) of a reward of one paid there; in the library of ``semi``, with gradients."""
        if not self.names:
            return {}
        x = self.generator.nodes(semi.a)
        free = as_like((~self.generator.fixed).astype(float), semi.a)
        loads: dict[Exit, Array] = {
            key: semi.stencil.apply(semi.a, as_like(mine[:, None], semi.a))[:, 0] * free
            for key, mine in self.owned.items()
        }
        elastic = {key: face for key, face in self.faces.items() if isinstance(face, Robin)}
        if elastic:
            loads |= self._elastic(t, x, elastic, semi)
        if "killing" in self.names:
            loads["killing"] = free * self.generator.local(t, x if is_tensor(x) else None).c
        return {name: loads[name] for name in self.names}

    def _elastic(self, t: float, x: Array, faces: dict[tuple[int, int], Robin], semi: Semi) -> dict[Exit, Array]:
        """Loads of elastic faces whose value is their rate κ."""
        generator = self.generator
        problem, grid = generator.problem, generator.grid
        local = generator.local(t, x)
        local = replace(local, g=zeros((grid.size, 1), x))
        kappa = {k: problem.on_face(f.kappa, t, x[wall_nodes(grid, *k)]) for k, f in faces.items()}
        loads: dict[Exit, Array] = {}
        for paying in faces:
            data = {k: (v, (v if k == paying else 0.0 * v)[:, None]) for k, v in kappa.items()}
            loads[paying] = generator.scheme.assemble(semi.stencil, local, FaceData(data), generator.metric).load[:, 0]
        return loads


class Passages:
    """What laws in NumPy and in torch have in common: times that were kept, and fluxes through the ways out."""

    times: np.ndarray
    clock: np.ndarray
    grid: Grid
    _flux: dict[Exit, Any]

    @property
    def exits(self) -> tuple[Exit, ...]:
        """The ways out: (axis, side) of absorbing and elastic faces, and "killing"."""
        return tuple(self._flux)

    def exit_flux(self, face: Any, times: Any = None) -> Any:
        """Probability per time that goes out through a face: a first-passage density if it absorbs.

        Parameters
        ----------
        face : (axis, side), side, or "killing"
            Side 0 or "low", 1 or "high"; the axis may be left out in one dimension.
        times : array_like, shape (...), optional
            Times between 0 and the horizon, interpolated between time nodes; None: the time nodes, ``clock``.

        Raises
        ------
        InputError
            For times beyond the horizon, and what is no way out.
        """
        flux = self._flux[self._exit(face)]
        if times is None:
            return flux
        t = np.asarray(times, dtype=float)
        if not ((t >= 0) & (t <= self.clock[-1] * (1.0 + SAME))).all():
            raise InputError(
                "times",
                times,
                f"times between 0 and the horizon {self.clock[-1]:g}",
                "what is later counts by the mass",
            )
        return (as_like(in_time(self.clock, t.reshape(-1)), flux) @ flux).reshape(t.shape)

    def first_passage(self, times: Any, face: Any) -> Any:
        """Density of the time of going out through a face at times (...): ``exit_flux(face, times)``.

        Raises
        ------
        InputError
            As ``exit_flux``.
        """
        return self.exit_flux(face, times)

    def _kept(self, t: float | None) -> int:
        if t is None:
            return len(self.times) - 1
        near = find(self.times, t)
        if near is None:
            raise InputError("t", t, f"one of the kept times {self.times.tolist()}", f"save=[{t}]")
        return near

    def _exit(self, face: Any) -> Exit:
        key = (0, face) if face in (0, 1, "low", "high") and self.grid.dim == 1 else face
        if isinstance(key, tuple) and len(key) == 2:
            key = (key[0], {"low": 0, "high": 1}.get(key[1], key[1]))
        if key not in self._flux:
            raise InputError("face", face, "one of " + (", ".join(map(str, self._flux)) or "none: nothing goes out"))
        return key


def in_time(clock: np.ndarray, t: np.ndarray) -> np.ndarray:
    """Matrix (m, len(clock)) of local Lagrange interpolation from the time nodes to times.

    Examples
    --------
    >>> clock = np.array([0.0, 0.5, 0.8, 1.0, 1.5, 1.7, 2.0])
    >>> bool(np.allclose(in_time(clock, np.array([0.3, 1.2])) @ clock**3, [0.027, 1.728]))
    True
    """
    w = min(TIME_NODES, len(clock))
    start = np.clip(np.searchsorted(clock, t, side="right") - 1 - (w - 1) // 2, 0, len(clock) - w)
    nodes = clock[start[:, None] + np.arange(w)]
    matrix = np.zeros((len(t), len(clock)))
    for j in range(w):
        others = np.delete(nodes, j, 1)
        matrix[np.arange(len(t)), start + j] = ((t[:, None] - others) / (nodes[:, j, None] - others)).prod(1)
    return matrix
