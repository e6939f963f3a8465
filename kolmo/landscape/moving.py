"""Weights moved in a plane, and the axes of its coordinates."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kolmo.errors import InputError
from kolmo.landscape.draws import whole
from kolmo.landscape.planes import Plane


class Mover:
    """Writes weights of a plane into the parameters of a model."""

    def __init__(self, model: nn.Module, plane: Plane) -> None:
        parameters = dict(model.named_parameters())
        missing = [name for name in plane.origin if name not in parameters]
        shapes = [n for n in plane.origin if n in parameters and parameters[n].shape != plane.origin[n].shape]
        if missing or shapes:
            raise InputError(
                "plane", f"weights {(missing + shapes)[0]!r} that the model lacks", "a plane of this model"
            )
        self._targets = [
            (p, _near(plane.origin[name], p), [_near(d[name], p) if name in d else None for d in plane.directions])
            for name, p in parameters.items()
            if name in plane.origin
        ]

    @torch.no_grad()
    def to(self, coordinates: Sequence[float]) -> None:
        """Move to θ₀ + Σ αᵢ dᵢ; always from θ₀, so that nothing accumulates."""
        for parameter, origin, directions in self._targets:
            moved = origin
            for alpha, d in zip(coordinates, directions, strict=True):
                if d is not None and alpha != 0.0:
                    moved = moved.add(d, alpha=float(alpha))
            parameter.copy_(moved)


def _near(value: Tensor, parameter: Tensor) -> Tensor:
    """The value on the device of the parameter, in its precision and memory format."""
    return torch.empty_like(parameter).copy_(value)


def plane_axes(plane: Plane, span: Any, points: int | Sequence[int]) -> tuple[np.ndarray, ...]:
    """Coordinates along each direction."""
    count = len(plane.directions)
    given = [points] * count if np.ndim(points) == 0 else list(points)  # type: ignore[arg-type]
    if len(given) != count:
        raise InputError("points", points, f"a number, or one for each of the {count} directions")
    numbers = [whole("points", n, 2) for n in given]
    ranges = list(plane.span) if span is None else _ranges(span, count)
    return tuple(np.linspace(low, high, n) for (low, high), n in zip(ranges, numbers, strict=True))


def _ranges(span: Any, count: int) -> list[tuple[float, float]]:
    """Pairs (low, high), one for each direction."""
    try:
        # (low, high) is for all directions; two positive numbers are one s for each
        shared = np.ndim(span) == 0 or (np.shape(span) == (2,) and (count == 1 or span[0] < 0 < span[1]))
        given = [span] * count if shared else list(span)
        pairs = [(-float(s), float(s)) if np.ndim(s) == 0 else (float(s[0]), float(s[1])) for s in given]
    except (TypeError, ValueError, IndexError):
        pairs = []
    if len(pairs) != count or not all(-math.inf < low < high < math.inf for low, high in pairs):
        raise InputError("span", repr(span), "a positive number, (low, high), or one of these for each direction")
    return pairs
