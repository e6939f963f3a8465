"""Where φ jumps or bends along a line, to rounding where it can be."""

from typing import Any

import numpy as np

from kolmo.arrays import as_numpy
from kolmo.grid import Grid
from kolmo.problem import KolmogorovProblem

# A fourth difference that shrinks by less than this factor when the spacing is halved is not that of smooth data
# (smooth 1/16, kink 1/2, jump 1), unless it is below the floor, relative to the largest value.
SHRINK, FLOOR = 0.15, 1e-7

# Divisions of an interval into four that locate a jump to rounding.
DIVISIONS = 14


def break_of(values: Any, count: int) -> np.ndarray:
    """Where functions on [0, 1] jump or bend most, shape (count,): bracketed by samples, closed in by division.

    ``values(s, rows)`` gives the functions of the given rows at points s (rows, m).
    """
    samples, quarters = np.linspace(0.0, 1.0, 14), np.linspace(0.0, 1.0, 5)
    f = values(np.broadcast_to(samples, (count, len(samples))), np.arange(count))
    steps = np.abs(np.diff(f, axis=1)).sum(-1)
    bends = np.abs(np.diff(f, 2, axis=1)).sum(-1)
    split = _vertex(samples, f, bends)
    # a jump stands out among the steps between samples beside it, a bend does not
    padded = np.pad(steps, ((0, 0), (1, 1)))
    peak, every = steps.argmax(1), np.arange(count)
    beside = np.maximum(padded[every, peak], padded[every, peak + 2])
    rows = np.flatnonzero(steps.max(1) > 3.0 * beside + FLOOR * np.abs(f).max(initial=0.0))
    first = steps[rows].argmax(1)
    a, b = samples[first], samples[first + 1]
    for _ in range(2):
        # looked at more closely, a jump is still one step, a steep slope is many
        fine = a[:, None] + (b - a)[:, None] * np.linspace(0.0, 1.0, 7)
        g = values(fine, rows) if len(rows) else np.zeros((0, 7, 1))
        parts = np.abs(np.diff(g, axis=1)).sum(-1)
        sharp = parts.max(1, initial=0.0) > 0.7 * parts.sum(1)
        rows, fine, g, peak = rows[sharp], fine[sharp], g[sharp], parts.argmax(1)[sharp]
        every = np.arange(len(rows))
        a, b, fa, fb = fine[every, peak], fine[every, peak + 1], g[every, peak], g[every, peak + 1]
    for _ in range(DIVISIONS if len(rows) else 0):
        fine = a[:, None] + (b - a)[:, None] * quarters
        g = np.concatenate([fa[:, None], values(fine[:, 1:-1], rows), fb[:, None]], 1)
        peak = np.abs(np.diff(g, axis=1)).sum(-1).argmax(1)
        a, b, fa, fb = fine[every, peak], fine[every, peak + 1], g[every, peak], g[every, peak + 1]
    split[rows] = 0.5 * (a + b)
    return np.asarray(np.clip(split, 1e-12, 1.0 - 1e-12))


def _vertex(samples: np.ndarray, f: np.ndarray, bends: np.ndarray) -> np.ndarray:
    """Where the lines through the two samples on either side of the sharpest bend meet."""
    rows, h = np.arange(len(f)), samples[1] - samples[0]
    middle = np.clip(1 + bends.argmax(1), 2, len(samples) - 3)
    column = np.abs(np.diff(f, 2, axis=1)).max(1).argmax(1)
    # the bend may lie on either side of the sample: take slopes one sample away
    g = [f[rows, middle + m, column] for m in (-2, -1, 1, 2)]
    left, right = (g[1] - g[0]) / h, (g[3] - g[2]) / h
    with np.errstate(divide="ignore", invalid="ignore"):
        offset = ((g[2] - right * h) - (g[1] + left * h)) / (left - right)
    return np.asarray(np.where(np.abs(offset) <= 2 * h, samples[middle] + offset, samples[middle]))


def values_at(problem: KolmogorovProblem, grid: Grid, position: np.ndarray) -> np.ndarray:
    """Values of φ, shape (…, k), at positions (…, d) in node units."""
    values = as_numpy(problem.final(points_at(grid, position).reshape(-1, grid.dim)))
    return np.asarray(values.reshape(*position.shape[:-1], -1))


def points_at(grid: Grid, position: np.ndarray) -> np.ndarray:
    """Positions in node units → points."""
    parts = [np.asarray(a.grading(position[..., i] * a.h)) for i, a in enumerate(grid.axes)]
    return np.stack(parts, -1)
