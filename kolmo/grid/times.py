"""Times that are the same but for rounding, told by the length of the whole; steps that grow with levels."""

import math
from collections.abc import Iterable, Sequence

import numpy as np

# Part of the longest time within which two of them are one: numbers typed with nine digits still find theirs.
SAME = 1e-9
# Part within which times are one by rounding: a step between them would be of no length.
ROUNDING = 1e-13
# Steps at least between two breakpoints, on the first of several levels.
LEAST_STEPS = 4


def find(times: Sequence[float] | np.ndarray, t: float) -> int | None:
    """Position of the time that is t but for rounding, the nearest one of several; None where there is none.

    Examples
    --------
    >>> find([0.0, 5e-10, 1e-9], 5e-10)
    1
    >>> find([0.0, 1.0], 0.5) is None
    True
    """
    known = np.asarray(times, dtype=float)
    exact = np.flatnonzero(known == t)
    if len(exact):
        return int(exact[0])
    gaps = np.abs(known - t)
    if not len(gaps) or not np.isfinite(gaps.min()):
        return None
    nearest = int(gaps.argmin())
    return nearest if gaps[nearest] <= SAME * np.abs(known[np.isfinite(known)]).max(initial=0.0) else None


def missing(times: Sequence[float] | np.ndarray, wanted: Iterable[float]) -> list[float]:
    """Those of the wanted times that are not among the times."""
    return [t for t in wanted if find(times, t) is None]


def merged(first: Iterable[float], second: Iterable[float]) -> np.ndarray:
    """All times in order, those of the second left out that are one of the first, or of each other, by rounding.

    Examples
    --------
    >>> merged([0.0, 1.0], [0.3, 0.1 + 0.2]).tolist()
    [0.0, 0.3, 1.0]
    """
    kept = np.unique(np.fromiter(first, float))
    for t in np.unique(np.fromiter(second, float)):
        if np.abs(kept - t).min() > ROUNDING * kept[-1]:
            kept = np.sort(np.append(kept, t))
    return kept


def stepped(start: float, end: float, length: float, growth: float = 1.0) -> np.ndarray:
    """Ends of equal steps from start (left out) to end, about of a length.

    ``growth``: so many times the steps of the first of several levels. The number that there was, rounded up, grows as
    much: as many steps on every level, as rounding each up may give, would be an error that no level shows.

    Examples
    --------
    >>> stepped(0.0, 1.0, 0.4).round(3).tolist()
    [0.333, 0.667, 1.0]
    >>> [len(stepped(0.0, 1.0, 0.8 / g, g)) for g in (1.0, 1.2, 1.5, 2.0)]
    [2, 3, 3, 4]
    """
    first = max(1, math.ceil((end - start) / (length * growth) - 1e-6))
    count = math.ceil(first * growth - 1e-6)
    nodes = start + (end - start) * np.arange(1, count + 1) / count
    nodes[-1] = end
    return np.asarray(nodes)


def longest_step(start: float, end: float, growth: float) -> float:
    """Longest step from one breakpoint to the next, however near that is."""
    return (end - start) / (LEAST_STEPS * growth)
