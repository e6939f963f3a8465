"""How large and how long a search may become, and what ends work that runs late."""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kolmo.errors import InputError
from kolmo.kernels.first_use import clock

# Share of the time that is left to what a plan is made for: marching forwards, or once more with a gradient.
PLANNING = 0.5
# Seconds that a step takes at least for every node and column. Measured on one core of 2 GHz: 35e-9 with explicit steps
# in two dimensions, 70e-9 to 2500e-9 with the others; other machines are not ten times as fast.
PER_NODE = 3e-9


class OutOfTimeError(Exception):
    """Work was ended because its time is over; whoever started it has coarser results, or says that there are none."""


@dataclass(frozen=True)
class Limits:
    """Largest number of nodes, and seconds from the moment of creation (compilation does not count).

    Attributes
    ----------
    cells : int
        Nodes of the largest grid.
    seconds : float
        After so many the search ends.
    started : float
        Reading of the clock.

    Examples
    --------
    >>> Limits.of(None, 2.0, 1000, 120.0).excess(cells=1001, ahead=0.0)
    'max_cells = 1000'
    """

    cells: int
    seconds: float
    started: float = field(default_factory=clock)

    @classmethod
    def of(cls, max_cells: Any, max_seconds: Any, cells: int, seconds: float) -> "Limits":
        """What the user gave, or else the defaults.

        Raises
        ------
        InputError
            For limits that are not positive numbers.
        """
        if max_cells is not None and not (isinstance(max_cells, (int, np.integer)) and max_cells > 0):
            raise InputError("max_cells", max_cells, "a positive whole number of nodes, or None")
        if max_seconds is not None and not (isinstance(max_seconds, (int, float)) and max_seconds > 0):
            raise InputError("max_seconds", max_seconds, "a positive number, or None")
        return cls(cells if max_cells is None else int(max_cells), seconds if max_seconds is None else max_seconds)

    @classmethod
    def given(cls, max_cells: Any, max_seconds: Any) -> "Limits":
        """What the user gave for a grid of their own; nothing else limits it."""
        return cls.of(max_cells, max_seconds, sys.maxsize, math.inf)

    def require(self, argument: str, shape: Sequence[int], steps: int, columns: int = 1) -> None:
        """Refuse a grid with more nodes than are allowed, or whose steps take longer: before anything is made.

        Raises
        ------
        InputError
            With the nodes, or the seconds that they take at least.

        Examples
        --------
        >>> Limits.given(None, 1.0).require("grid", (1000, 1000), 100)
        >>> try:
        ...     Limits.given(None, 1.0).require("grid", (1000, 1000), 10_000)
        ... except InputError as error:
        ...     print(error)
        grid: got 1000 × 1000 nodes, 10000 steps, which take at least 30 s; needed at most max_seconds = 1. Fix: fewer \
of these, or a larger limit.
        """
        cells = math.prod(int(n) for n in shape)
        ahead = PER_NODE * cells * columns * max(steps, 1)
        reason = self.excess(cells, ahead)
        if reason:
            counts = {"column": columns, "step": steps}
            beside = "".join(f", {n} {word}s" for word, n in counts.items() if n > 1)
            given = f"{' × '.join(map(str, shape))} nodes{beside}, which take at least {ahead:.2g} s"
            raise InputError(argument, given, f"at most {reason}", "fewer of these, or a larger limit")

    @property
    def spent(self) -> float:
        """Seconds so far."""
        return clock() - self.started

    def late(self) -> bool:
        """Whether the time is over."""
        return self.spent > self.seconds

    def check(self) -> None:
        """Raise where the time is over."""
        if self.late():
            raise OutOfTimeError

    def excess(self, cells: float, ahead: float) -> str:
        """Which limit work of so many nodes and (expected) seconds would break; or nothing."""
        if cells > self.cells:
            return f"max_cells = {self.cells}"
        return self.over if self.spent + ahead > self.seconds else ""

    @property
    def over(self) -> str:
        """The limit of time, in words."""
        return f"max_seconds = {self.seconds:g}"

    def affords(self, seconds: float) -> bool:
        """Whether a little may still be done: within the time, or a tenth of it when that is over."""
        return seconds <= max(0.1 * self.seconds, self.seconds - self.spent)


def part_of(max_seconds: float | None) -> float | None:
    """What planning may take of the time for all."""
    return max_seconds if max_seconds is None or not math.isfinite(max_seconds) else PLANNING * max_seconds
