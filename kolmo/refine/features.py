"""Narrow features: the spacing that each place of an axis needs, from sixth differences and what they weigh."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from kolmo.grid.grading import Grading
from kolmo.kernels import differences
from kolmo.refine.samples import Field, Room

# What weighs something is followed to spacings at which it has this part of its largest effect left: the first level
# has to see it, the next ones are there to resolve it.
WEIGHS, SEEN = 0.1, 0.03
# A feature is narrower than this part of the axis: a tenth of a spread, about.
NARROW = 128
# A place is a feature where it needs so many times the nodes that are there; spacings grow by this part of the distance
# from a feature. An axis that is rough all along is left to finer levels but for a factor.
FINER, GROWS, MOST_FEATURES, LEAST_USUAL = 1.6, 0.3, 24, 1e-3


@dataclass(frozen=True)
class Feature:
    """Where an axis needs nodes: around the centre, within the half-width, at this spacing (first grid)."""

    centre: float
    width: float
    spacing: float


def spacing(f: Field, axis: int, room: Room, places: Sequence[float], size: float, rtol: float) -> np.ndarray:
    """Spacing in x that a function needs along an axis, at the samples; infinite where any will do."""
    lines = f.lines(axis)
    n, grading = lines.shape[1], room.gradings[axis]
    if f.flat or (f.datum.adds and size == 0.0):
        return np.full(n, np.inf)
    weights = np.ones(1)
    for j, (x, g) in enumerate(zip(f.x, room.gradings, strict=True)):
        if j != axis:
            other = room.density(j, x) * np.asarray(g.slope(f.s))
            weights = np.multiply.outer(weights, other / other.sum()).reshape(-1)
    cell = np.asarray(grading.slope(f.s)) / n
    likely = f.datum.weight / (size if f.datum.adds else 1.0) * room.density(axis, f.x[axis])
    part = np.minimum(cell / room.spread[axis], 1.0)

    def effect(which: slice, sixth: np.ndarray, stride: int) -> np.ndarray:
        return np.asarray(likely[which] * sixth * np.minimum(stride * part[which], 1.0))

    # along one line a break that was no break is a smooth feature; across many, slanted ones are left to the cells
    broken = f.candidates(axis)[0] if lines.shape[2] > 1 else np.zeros((n, 1), dtype=bool)
    return np.asarray(least_spacing(lines, f.s, places, broken, weights, effect, rtol) * cell)


def least_spacing(
    lines: np.ndarray,
    s: np.ndarray,
    places: Sequence[float],
    candidates: np.ndarray,
    weights: np.ndarray,
    effect: Callable[[slice, np.ndarray, int], np.ndarray],
    rtol: float,
) -> np.ndarray:
    """Per sample the smallest spacing, in samples, at which the sixth difference weighs something; infinite if none.

    That is more than a part of the tolerance, and of the largest effect that it has at a wider spacing; the difference
    is the mean over lines with ``weights``. Differences across breaks, of all lines or of one (``candidates``), do not
    count.
    """
    n = len(s)
    wanted, largest = np.full(n, np.inf), np.zeros(n)
    first = max(n // NARROW, 1)
    whole = np.zeros(lines.shape[1:], dtype=np.int32)
    if not (effect(*_sixth(lines, weights, whole, first, 1), first) > WEIGHS * rtol).any():
        return wanted  # seen at every sample, nothing is narrower than that
    broken = np.zeros((n + 1, lines.shape[2]), dtype=np.int32)
    broken[:n] = candidates
    np.add.at(broken, np.searchsorted(s, np.asarray(places)), 1)
    crossed = np.cumsum(broken, axis=0, dtype=np.int32)[:n]
    stride = n // 16
    while stride >= 1:
        every, ends = max(stride // 4, 1), 3 * stride
        if n > 2 * ends:
            inside, sixth = _sixth(lines, weights, crossed, stride, every)
            size = np.repeat(effect(inside, sixth, stride), every)[: n - 2 * ends]
            middle = slice(ends, n - ends)
            largest[middle] = np.maximum(largest[middle], size)
            needs = (size > WEIGHS * rtol) & (size > SEEN * largest[middle])
            wanted[middle] = np.where(needs, stride, wanted[middle])
        stride //= 2
    return wanted


def _sixth(
    lines: np.ndarray, weights: np.ndarray, crossed: np.ndarray, stride: int, every: int
) -> tuple[slice, np.ndarray]:
    """Samples in the middle of sixth differences at a stride, every so many, and the mean size of these."""
    n = lines.shape[1]
    result = np.zeros(-(-max(n - 6 * stride, 0) // every))
    differences.sixth(lines, weights, crossed, stride, every, result)
    return slice(3 * stride, n - 3 * stride, every), result


def features(x: np.ndarray, wanted: np.ndarray, grading: Grading, nodes: int) -> tuple[Feature, ...]:
    """Stretches of an axis that need nodes much closer than the first grid has them, the finest first."""
    if not np.isfinite(wanted).any():
        return ()
    n = len(x)
    base = np.asarray(grading.slope((np.arange(n) + 0.5) / n)) / (nodes - 1)
    # where all of an axis needs closer nodes, finer levels bring them: it is the difference that counts
    usual = float(np.clip(np.median(np.minimum(wanted / base, 1.0)), LEAST_USUAL, 1.0))
    # spacings may not change faster than that along the axis: the zeros of a difference are no places without need
    wanted = np.minimum(wanted / usual, base.max())
    rising = GROWS * x + np.minimum.accumulate(wanted - GROWS * x)
    falling = -GROWS * x + np.minimum.accumulate((wanted + GROWS * x)[::-1])[::-1]
    wanted = np.minimum(rising, falling)
    density = 1.0 / base
    found: list[Feature] = []
    while len(found) < MOST_FEATURES:
        need = 1.0 / (wanted * density)
        worst = int(need.argmax())
        if need[worst] < FINER:
            break
        spacing = float(wanted[worst])
        fine = wanted < 1.5 * spacing
        first = worst - int(np.argmin(np.concatenate([[False], fine[:worst]])[::-1]))
        last = worst + int(np.argmin(np.concatenate([fine[worst:], [False]]))) - 1
        feature = Feature(0.5 * float(x[first] + x[last]), max(0.5 * float(x[last] - x[first]), spacing), spacing)
        found.append(feature)
        density = density + (1.0 / spacing - density[worst]) / np.hypot(1.0, (x - feature.centre) / feature.width)
    return tuple(found)
