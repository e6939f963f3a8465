"""Times that are the same but for rounding: told by the length of the whole, never by an absolute number."""

from collections.abc import Iterable, Sequence

import numpy as np

# Part of the longest time within which two of them are one: numbers typed with nine digits still find theirs.
SAME = 1e-9
# Part within which times are one by rounding: a step between them would be of no length.
ROUNDING = 1e-13


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
