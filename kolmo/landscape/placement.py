"""Adaptive placement of evaluations on a grid: lines where the interpolation needs them, checked at left-out cells."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.interpolate import make_interp_spline

if TYPE_CHECKING:
    from kolmo.landscape.surface import Store

_DEGREE = 5
_FIRST = 9  # lines along each axis at the start
_CHECKS = 24  # left-out cells: half where two interpolants differ most, half by chance
_SAFETY = 2.5  # the error stated is this many times the largest at the left-out cells: the cells between are more
_SHARE = 0.6  # intervals with this share of the largest indicated error are refined in one round


def place(
    wanted: Callable[[Any], None], store: "Store", axes: tuple[np.ndarray, ...], rtol: float
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Evaluate on a growing tensor grid of lines until left-out cells agree with its spline interpolant.

    Parameters
    ----------
    wanted : callable
        Evaluates points given by their indices.
    store : Values
        Where they are then found.
    axes : tuple of ndarray
        The coordinates.
    rtol : float
        Tolerance relative to the largest absolute value of the first quantity.

    Returns
    -------
    values : dict
        All quantities on the full grid; evaluated cells hold what was evaluated.
    error : dict
        For each quantity, 2.5 times the largest error at the cells left out of the last interpolation; 0 where every
        point was evaluated, as it is where a value is not finite.
    """
    # some lines of each axis, as even as can be
    lines = [np.unique(np.linspace(0, len(a) - 1, min(_FIRST, len(a))).round().astype(int)) for a in axes]
    generator = np.random.default_rng(0)
    # Decisions rest on what this call asked for, not on what a file of an interrupted one held.
    asked = np.zeros(store.done.shape, bool)
    while True:
        asked |= _is_on(lines, asked.shape)
        wanted(zip(*np.nonzero(asked), strict=True))
        first = next(iter(store.values))
        on_lines = {name: value[np.ix_(*lines)] for name, value in store.values.items()}
        full = all(len(chosen) == len(axis) for chosen, axis in zip(lines, axes, strict=True))
        if full or not _finite(store, asked):
            break
        spline = {name: interpolate(value, lines, axes, _DEGREE) for name, value in on_lines.items()}
        coarse = interpolate(on_lines[first].mean(-1)[..., None], lines, axes, 3)[..., 0]
        doubt = np.abs(spline[first].mean(-1) - coarse)
        scale = float(np.abs(spline[first].mean(-1)).max())
        for _ in range(2):  # what the first cells let pass, others must let pass too
            asked[_left_out(doubt, asked, generator)] = True
            wanted(zip(*np.nonzero(asked), strict=True))
            if not _finite(store, asked):
                break
            left_out = asked & ~_is_on(lines, asked.shape)
            error = {
                name: _SAFETY * float(np.abs(store.values[name].mean(-1) - spline[name].mean(-1))[left_out].max())
                for name in spline
            }
            if error[first] > rtol * scale:
                break
        else:
            merged = {name: np.where(asked[..., None], store.values[name], spline[name]) for name in store.values}
            return merged, error
        if not _finite(store, asked):
            break
        lines = _refined(on_lines[first].mean(-1), lines, axes)
    wanted(np.ndindex(*store.done.shape))
    return store.values, dict.fromkeys(store.values, 0.0)


def _finite(store: "Store", asked: np.ndarray) -> bool:
    """Whether everything that was asked for can be interpolated."""
    return all(np.isfinite(value[asked]).all() for value in store.values.values())


def interpolate(values: np.ndarray, lines: list[np.ndarray], axes: tuple[np.ndarray, ...], degree: int) -> np.ndarray:
    """Tensor-product spline through values on chosen lines, at all points; trailing axes are carried along."""
    for k, (chosen, axis) in enumerate(zip(lines, axes, strict=True)):
        values = np.asarray(make_interp_spline(axis[chosen], values, k=_odd(degree, len(chosen)), axis=k)(axis))
    return values


def _odd(degree: int, count: int) -> int:
    """Degree that so many points allow."""
    return min(degree, count - 1 if count % 2 == 0 else max(count - 2, 1))


def _is_on(lines: list[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    """Which points are on the lines of every axis."""
    found = np.zeros(shape, bool)
    found[np.ix_(*lines)] = True
    return found


def _left_out(doubt: np.ndarray, asked: np.ndarray, generator: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Cells not evaluated yet, to check at: where the doubt is largest, and by chance."""
    off = np.flatnonzero(~asked)
    if not len(off):
        return np.nonzero(asked)
    worst = off[np.argsort(doubt.ravel()[off], kind="stable")[::-1]]
    spread = worst[: max(len(worst) // 4, 1)][:: max(len(worst) // 4 // (_CHECKS // 2), 1)][: _CHECKS // 2]
    chance = generator.choice(off, min(_CHECKS // 2, len(off)), replace=False)
    chosen = np.unique(np.concatenate([worst[:2], spread, chance]))
    return np.unravel_index(chosen, doubt.shape)


def _refined(values: np.ndarray, lines: list[np.ndarray], axes: tuple[np.ndarray, ...]) -> list[np.ndarray]:
    """Add lines in the middle of intervals where leaving a line out hurts the interpolation most."""
    marks = [_interval_errors(values, lines, axes, k) for k in range(len(lines))]
    top = max(mark.max(initial=0.0) for mark in marks)
    refined = []
    for chosen, mark in zip(lines, marks, strict=True):
        wide = np.diff(chosen) > 1
        worth = wide & (mark >= _SHARE * top)
        middle = (chosen[:-1] + chosen[1:]) // 2
        refined.append(np.union1d(chosen, middle[worth]))
    if all(len(new) == len(old) for new, old in zip(refined, lines, strict=True)):
        return [np.union1d(c, ((c[:-1] + c[1:]) // 2)[np.diff(c) > 1]) for c in lines]
    return refined


def _interval_errors(values: np.ndarray, lines: list[np.ndarray], axes: tuple[np.ndarray, ...], k: int) -> np.ndarray:
    """For each interval of axis k, the error at its ends when they are left out of the interpolation."""
    x, along = axes[k][lines[k]], np.moveaxis(values, k, 0)
    errors = np.zeros(len(x))
    for i in range(1, len(x) - 1):
        rest = np.delete(np.arange(len(x)), i)
        spline = make_interp_spline(x[rest], along[rest], k=_odd(_DEGREE, len(rest)))
        errors[i] = np.abs(spline(x[i]) - along[i]).max()
    if len(x) > 2:
        errors[0], errors[-1] = errors[1], errors[-2]
    width = np.diff(lines[k])
    return np.asarray(np.maximum(errors[:-1], errors[1:]) * (width / width.max()) ** 2)
