"""An ensemble of paths in one step: arrays (starts, paths, d)."""

import math
from typing import Any

from kolmo.kernels.cache import compiled

_jit: Any = compiled()


@_jit
def _size(v: Any, room: Any) -> Any:
    """Largest |v_i| / room_i."""
    size = 0.0
    for i in range(len(room)):
        size = max(size, abs(v[i]) / room[i])
    return size


@_jit
def _tamed(b: Any, x: Any, room: Any, lasting: Any) -> Any:
    """Factor that bounds a drift so that a step does not overshoot by more than the path's own size."""
    far = 0.0
    for i in range(len(room)):
        far = max(far, abs(lasting[i] * b[i]) / room[i])
    return 1.0 / (1.0 + far / (1.0 + _size(x, room)))


@_jit
def half_way(x: Any, b: Any, room: Any, dt: float, lasting: Any, middle: Any, away: Any) -> None:
    """Positions in the middle of a step, and which paths explode: they are far out and run further than that."""
    for s in range(x.shape[0]):
        for p in range(x.shape[1]):
            outward = 0.0
            for i in range(len(room)):
                outward += b[s, p, i] * x[s, p, i]
            far = _size(x[s, p], room)
            away[s, p] = outward > 0.0 and far > 1.0 and dt * _size(b[s, p], room) > 1.0 + far
            factor = _tamed(b[s, p], x[s, p], room, lasting)
            for i in range(len(room)):
                middle[s, p, i] = x[s, p, i] + 0.5 * lasting[i] * factor * b[s, p, i]


@_jit
def onwards(x: Any, b: Any, room: Any, lasting: Any, root: Any, normals: Any, noise: Any, moved: Any) -> None:
    """Positions after a step with the drift b and the noise ``noise[i] root[s, p] normals[p]``, root maybe the same."""
    d = len(room)
    for s in range(x.shape[0]):
        for p in range(x.shape[1]):
            factor = _tamed(b[s, p], x[s, p], room, lasting)
            own = root[min(s, root.shape[0] - 1), min(p, root.shape[1] - 1)]
            for i in range(d):
                shock = 0.0
                for j in range(d):
                    shock += own[i, j] * normals[p, j]
                place = x[s, p, i] + lasting[i] * factor * b[s, p, i] + noise[i] * shock
                moved[s, p, i] = place if math.isfinite(place) else math.nan
