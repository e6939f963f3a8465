"""Box and gradings of a control problem's grid: wide enough for every policy that is tried, fine where paths go."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from kolmo.box import Box, Open
from kolmo.errors import InputError
from kolmo.grading import Grading, Sinh, Uniform
from kolmo.grid import Axis, Grid
from kolmo.problem import KolmogorovProblem
from kolmo.reach import Reach, reach

# Part of the nodes added beyond every open face to measure the effect of the cut.
CUT_MARGIN = 0.2
# Width, as a part of the box, within which nodes crowd about a jump.
JUMP_WIDTH = 0.003


@dataclass(frozen=True)
class Frame:
    """Box and maps: everything about a grid but the number of nodes.

    Attributes
    ----------
    box : Box
        Finite box.
    gradings : tuple of Grading
        Map of each axis.
    """

    box: Box
    gradings: tuple[Grading, ...]

    def grid(self, n: float, *, shifted: bool = False) -> Grid:
        """Grid with about n nodes per axis, an odd number: what lies in the middle falls on a node at every level.

        The shifted one has a node more: in the middle its nodes lie half a cell beside those of the other.
        """
        return Grid.of(self.box, [2 * round(0.5 * n) + 1 + shifted] * self.box.dim, self.gradings)

    def widened(self, grid: Grid) -> Grid:
        """The same nodes and some more beyond every open face."""
        axes = []
        for axis, pair in zip(grid.axes, self.box.faces, strict=True):
            more = max(3, math.ceil(CUT_MARGIN * axis.n))
            low, high = (more if isinstance(face, Open) else 0 for face in pair)
            ends = axis.grading.lower, axis.grading.upper
            bottom = float(axis.grading(-low * axis.h)) if low else ends[0]
            top = float(axis.grading(1.0 + high * axis.h)) if high else ends[1]
            axes.append(Axis(axis.n + low + high, _moved(axis.grading, bottom, top), axis.periodic))
        return Grid(axes)

    def stretched(self, factor: float) -> "Frame":
        """The same frame with its open faces moved outwards, away from the middle."""
        low, high = np.array(self.box.lower), np.array(self.box.upper)
        opened = np.array([[isinstance(face, Open) for face in pair] for pair in self.box.faces])
        middle = 0.5 * (low + high)
        low = np.where(opened[:, 0], middle - factor * (middle - low), low)
        high = np.where(opened[:, 1], middle + factor * (high - middle), high)
        gradings = tuple(_moved(g, float(a), float(b)) for g, a, b in zip(self.gradings, low, high, strict=True))
        return Frame(self.box.replace(low, high), gradings)

    def even(self) -> "Frame":
        """The same box with evenly spaced nodes."""
        return Frame(
            self.box, tuple(Uniform(float(a), float(b)) for a, b in zip(self.box.lower, self.box.upper, strict=True))
        )

    def about_jumps(self, terminal: Callable[..., Any] | None) -> "Frame":
        """In one dimension, the same box with its nodes crowded about the jumps of the terminal data, if there are any.

        The error that a jump leaves in a nonlinear equation is of first order in the spacing there.
        """
        if terminal is None or self.box.dim > 1 or self.box.periodic[0]:
            return self
        low, high = self.box.lower[0], self.box.upper[0]
        jumps = _jumps(terminal, low, high)
        if not len(jumps):
            return self
        width = max(0.5 * (jumps.max() - jumps.min()), JUMP_WIDTH * (high - low))
        return Frame(self.box, (Sinh(low, high, 0.5 * float(jumps.max() + jumps.min()), float(width)),))


def _jumps(terminal: Callable[..., Any], low: float, high: float) -> np.ndarray:
    """Where terminal data jump: differences that do not shrink with the spacing."""
    x = np.linspace(low, high, 8001)[:, None]
    values = torch.as_tensor(terminal(torch.as_tensor(x))).detach().double().reshape(-1).expand(len(x)).numpy()
    if not np.isfinite(values).all():
        return np.zeros(0)
    step = np.abs(np.diff(values))
    around = np.array([np.roll(step, shift) for shift in (-3, -2, 2, 3)]).max(0)
    middle = 0.5 * (x[1:, 0] + x[:-1, 0])
    return np.asarray(middle[(step > 20.0 * around) & (step > 1e-3 * np.ptp(values)) & (step > 0.0)])


def frame(problems: Sequence[KolmogorovProblem], points: np.ndarray, tail: float) -> Frame:
    """Frame for the processes of several policies, all of which are to stay inside with probability 1 − tail."""
    box, horizon = problems[0].box, problems[0].horizon
    if horizon is None:
        if not (np.isfinite(box.lower).all() and np.isfinite(box.upper).all()):
            raise InputError("box", box, "a finite box for a stationary problem")
        return Frame(box, tuple(Uniform(a, b) for a, b in zip(box.lower, box.upper, strict=True)))
    clouds = [reach(problem.sde, points, horizon, within=box) for problem in problems]
    spans = [cloud.interval(tail) for cloud in clouds]
    low, high = np.min([s[0] for s in spans], axis=0), np.max([s[1] for s in spans], axis=0)
    core_low, core_high = _core(clouds)
    given_low, given_high = np.array(box.lower), np.array(box.upper)
    opened = np.array([[isinstance(face, Open) for face in pair] for pair in box.faces])
    low = np.where(opened[:, 0], np.where(np.isfinite(given_low), np.minimum(low, given_low), low), given_low)
    high = np.where(opened[:, 1], np.where(np.isfinite(given_high), np.maximum(high, given_high), high), given_high)
    gradings = [
        Uniform(low[i], high[i]) if box.periodic[i] else _graded(low[i], high[i], core_low[i], core_high[i])
        for i in range(box.dim)
    ]
    return Frame(box.replace(low, high), tuple(gradings))


def _core(clouds: Sequence[Reach]) -> tuple[np.ndarray, np.ndarray]:
    """Where the paths spend their time: two spreads about their centres."""
    low = np.min([c.low - 2.0 * c.spread_low for c in clouds], axis=0)
    high = np.max([c.high + 2.0 * c.spread_high for c in clouds], axis=0)
    return low, high


def _graded(low: float, high: float, core_low: float, core_high: float) -> Grading:
    """Uniform where the core fills the box, sinh-graded around it otherwise."""
    core_low, core_high = max(core_low, low), min(core_high, high)
    centre, width = 0.5 * (core_low + core_high), 0.5 * (core_high - core_low)
    # a core of no width says that no noise was seen, not that the solution varies on no scale
    width = max(width, 0.1 * (high - low))
    if max(high - centre, centre - low) < 2.0 * width:
        return Uniform(float(low), float(high))
    return Sinh(float(low), float(high), float(centre), float(width))


def _moved(grading: Grading, low: float, high: float) -> Grading:
    """The same map between other ends."""
    return Sinh(low, high, grading.centre, grading.width) if isinstance(grading, Sinh) else Uniform(low, high)
