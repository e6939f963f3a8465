"""Steps of Runge and Kutta in compiled loops: forwards, transposed, and pulled back to their numbers."""

from typing import Any

import numpy as np

from kolmo.kernels.fused import jit, shares, stage
from kolmo.kernels.fused_transposed import apply_transposed


@jit
def _stages(table: Any, numbers: Any, loads: Any, dt: float, count: int, ys: Any, total: Any, spare: Any) -> None:
    """First stages of a classical Runge–Kutta step from the state ``ys[0]``: their states, and the weighted slopes."""
    # one place that calls, so that it is compiled once; the state after the last stage is not read
    for at in range(count):
        node = (at + 1) // 2
        c = dt if at == 2 else 0.5 * dt
        rule = c, 2.0 if node == 1 else 1.0, at == 0
        following = ys[at + 1] if at < 3 else spare
        stage(table, numbers[node], ys[at], rule, (loads[node], ys[0], following, total))


@jit
def runge_kutta(table: Any, numbers: Any, loads: Any, dt: float, count: int, u: Any, kept: Any) -> None:
    """Classical Runge–Kutta steps with numbers and loads at their start, middle and end; u is replaced.

    ``kept`` is empty, or gets for each step its first state (count, 1, size) or those of its stages (count, 4, size).
    """
    n = len(u)
    own, total, spare = np.empty((4, n)), np.empty(n), np.empty(n)
    for step in range(count):
        ys = kept[step] if len(kept) > 0 and kept.shape[1] == 4 else own
        ys[0, :] = u
        _stages(table, numbers, loads, dt, 4, ys, total, spare)
        if len(kept) > 0 and kept.shape[1] == 1:
            kept[step, 0, :] = u
        for k in range(n):
            u[k] += (dt / 6.0) * total[k]


@jit
def _transposed_step(table: Any, numbers: Any, p: Any, dt: float, free: Any, qs: Any, loads: Any, spaces: Any) -> None:
    """The transposed step, p replaced; ``qs`` (4, size): derivatives with respect to what its stages add to Q Y.

    They are added to those with respect to the loads (3, size).
    """
    n = len(p)
    z, total, last = np.empty(n), np.empty(n), qs[3]
    for k in range(n):
        last[k] = (dt / 6.0) * p[k]
        total[k] = p[k]
    for step in range(4):
        at = 3 - step
        q, load = qs[at], loads[(at + 1) // 2]
        apply_transposed(table, numbers[(at + 1) // 2], q, z, spaces)
        for k in range(len(free)):
            z[k] *= free[k]
        if at > 0:
            weight, back, before = dt / (6.0 if at == 1 else 3.0), dt if at == 3 else 0.5 * dt, qs[at - 1]
            for k in range(n):
                load[k] += q[k]
                total[k] += z[k]
                before[k] = weight * p[k] + back * z[k]
        else:
            for k in range(n):
                load[k] += q[k]
                p[k] = total[k] + z[k]


@jit
def runge_kutta_transposed(table: Any, numbers: Any, p: Any, dt: float, free: Any, loads: Any, spaces: Any) -> None:
    """A transposed step, p replaced; ``loads`` (3, size) gets the derivatives with respect to the loads.

    ``free`` is empty, or zero at fixed nodes and one elsewhere.
    """
    _transposed_step(table, numbers, p, dt, free, np.empty((4, len(p))), loads, spaces)


@jit
def runge_kutta_pullback(
    tables: Any, numbers: Any, loads: Any, kept: Any, p: Any, dt: float, free: Any, wanted: Any, targets: Any
) -> None:
    """Transposed steps, the last one first; p is replaced.

    Parameters
    ----------
    kept : ndarray, shape (count, 1 or 4, size)
        States before the steps, or of all their stages.
    tables : (table, back, spaces)
        Of the stencil and of its transpose, with work spaces.
    wanted : ndarray of bool
        Terms whose derivatives are asked for.
    targets : (adjoints, derivatives)
        What is added to: derivatives with respect to the loads (3, size), and three arrays (terms, size).
    """
    (table, back, spaces), (adjoints, derivatives) = tables, targets
    n = len(p)
    qs, own, total, spare = np.empty((4, n)), np.empty((4, n)), np.empty(n), np.empty(n)
    for step in range(len(kept)):
        passed = kept[len(kept) - 1 - step]
        ys = passed if len(passed) == 4 else own
        _transposed_step(back, numbers, p, dt, free, qs, adjoints, spaces)
        if len(passed) == 1:
            ys[0, :] = passed[0]
            _stages(table, numbers, loads, dt, 3, ys, total, spare)
        for at in range(4):
            shares(table, ys[at], qs[at], wanted, derivatives[(at + 1) // 2])
