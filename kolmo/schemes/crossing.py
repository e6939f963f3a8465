"""Events on a grid: u(t−) = E u(t) + h, with E the interpolation at the points where the nodes are moved to."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from kolmo.arrays import Array, added_at, as_like, namespace, zeros
from kolmo.schemes.jumps import interpolation, landing

if TYPE_CHECKING:
    from kolmo.problem.events import Event
    from kolmo.schemes.generator import Generator

# Nodes whose stencils are made at once: of a large grid in three dimensions they would not fit together.
CHUNK = 1 << 14


class Crossing:
    """From the state after an event to that before it, and transposed; with gradients in torch.

    Points that are moved beyond faces end on them; beyond open ones u goes on as a line (of monotone schemes: as a
    constant). Interpolation is of two orders more than the scheme, so that it does not limit the accuracy; that of a
    monotone scheme is linear, and keeps the discrete maximum principle.

    Parameters
    ----------
    generator : Generator
        The semi-discrete equation.
    event : Event
        What happens.
    like : array
        In whose library, and on whose device.
    """

    def __init__(self, generator: "Generator", event: "Event", like: Array) -> None:
        self.grid, self.box = generator.grid, generator.box
        self.monotone = generator.scheme.monotone
        self.width = 2 if self.monotone else max(4, generator.scheme.order + 2)
        moved, paid = generator.problem.happens(event, generator.nodes(like))
        self.ends = landing(self.box, moved)
        self.paid = None if paid is None else paid.reshape(self.grid.size, -1)

    def _stencils(self) -> Iterator[tuple[slice, np.ndarray, Array]]:
        for first in range(0, self.grid.size, CHUNK):
            rows = slice(first, min(first + CHUNK, self.grid.size))
            index, weight = interpolation(self.grid, self.box, self.ends[rows], self.width, not self.monotone)
            yield rows, index, weight

    def apply(self, u: Array) -> Array:
        """E u + h for a state (size, k)."""
        parts = [
            (as_like(weight, u)[..., None] * u[index.reshape(-1)].reshape(*index.shape, -1)).sum(1)
            for _, index, weight in self._stencils()
        ]
        moved: Any = parts[0] if len(parts) == 1 else namespace(u).concatenate(parts)
        return moved if self.paid is None else moved + as_like(self.paid, u)

    def apply_transposed(self, p: Array) -> Array:
        """Eᵀ p for weights (size, k)."""
        total = zeros(tuple(p.shape), p)
        for rows, index, weight in self._stencils():
            spread = (as_like(weight, p)[..., None] * p[rows][:, None, :]).reshape(-1, p.shape[-1])
            total = added_at(total, index.reshape(-1), spread)
        return total
