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
    split = vertex(np.broadcast_to(samples, (count, len(samples))), f, bends.argmax(1), 1)
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


def vertex(s: np.ndarray, f: np.ndarray, peak: np.ndarray, gap: int) -> np.ndarray:
    """Where the lines through two samples on either side of the sharpest bend, some samples away from it, meet.

    Functions f (rows, n, k) at even places s (rows, n), and the largest of each one's second differences.
    """
    rows, h = np.arange(len(f)), s[:, 1] - s[:, 0]
    middle = np.clip(peak + 1, gap + 1, s.shape[1] - 2 - gap)
    column = np.abs(np.diff(f, 2, axis=1)).max(1).argmax(1)
    # the bend may lie on either side of the sample
    g = [f[rows, middle + m, column] for m in (-gap - 1, -gap, gap, gap + 1)]
    left, right = (g[1] - g[0]) / h, (g[3] - g[2]) / h
    with np.errstate(divide="ignore", invalid="ignore"):
        offset = ((g[2] - gap * right * h) - (g[1] + gap * left * h)) / (left - right)
    near = np.isfinite(offset) & (np.abs(offset) <= (gap + 1) * h)
    return np.asarray(s[rows, middle] + np.where(near, offset, 0.0))


def values_at(problem: KolmogorovProblem, grid: Grid, position: np.ndarray) -> np.ndarray:
    """Values of φ, shape (…, k), at positions (…, d) in node units."""
    values = as_numpy(problem.final(points_at(grid, position).reshape(-1, grid.dim)))
    return np.asarray(values.reshape(*position.shape[:-1], -1))


def points_at(grid: Grid, position: np.ndarray) -> np.ndarray:
    """Positions in node units → points."""
    parts = [np.asarray(a.grading(position[..., i] * a.h)) for i, a in enumerate(grid.axes)]
    return np.stack(parts, -1)
