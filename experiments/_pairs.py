"""Comparisons of trained networks over seeds: paired differences, their intervals, and many of them at once."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

LEVEL = 0.95


class Gap(NamedTuple):
    """Mean of paired differences, half the width of its 95 % interval, p of a paired t-test, and number of pairs."""

    mean: float
    half: float
    p: float
    pairs: int

    def __str__(self) -> str:
        """Return mean ± half width."""
        return (
            "" if self.pairs == 0 else f"{self.mean:.3g}" if self.pairs == 1 else f"{self.mean:.3g} ± {self.half:.2g}"
        )


def paired(first: Sequence[float] | np.ndarray, second: Sequence[float] | np.ndarray | float = 0.0) -> Gap:
    """Compare two columns, seed by seed; the interval is Student's, and infinite for one pair."""
    gaps = np.subtract(first, second)
    if len(gaps) < 2:
        return Gap(float(gaps.mean()) if len(gaps) else np.nan, np.inf, 1.0, len(gaps))
    error = float(stats.sem(gaps))
    half = float(stats.t.ppf(0.5 + LEVEL / 2, len(gaps) - 1)) * error
    p = float(stats.ttest_1samp(gaps, 0.0).pvalue) if error else float(gaps.mean() == 0)
    return Gap(float(gaps.mean()), half, p, len(gaps))


def holm(p: Mapping[Any, float]) -> dict[Any, float]:
    """p values adjusted for their number (Holm, 1979): below α for all that may be called different at once."""
    adjusted, least = {}, 0.0
    for rank, key in enumerate(sorted(p, key=lambda key: p[key])):
        least = max(least, min(1.0, (len(p) - rank) * p[key]))
        adjusted[key] = least
    return {key: adjusted[key] for key in p}


class Correlation(NamedTuple):
    """Spearman's rank correlation with a 95 % bootstrap interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        """Return value and interval."""
        return f"{self.value:.2f} ({self.low:.2f} to {self.high:.2f})"


def rank_correlation(
    first: Sequence[float], second: Sequence[float], groups: Sequence[Any], *, draws: int = 2000, seed: int = 0
) -> Correlation:
    """Rank correlation over networks; the bootstrap draws whole groups, since networks of one seed share their data."""
    a, b = np.asarray(first, float), np.asarray(second, float)
    names, member = np.unique(np.asarray(groups), return_inverse=True)
    rows = [np.flatnonzero(member == k) for k in range(len(names))]
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(draws):
        chosen = np.concatenate([rows[k] for k in rng.integers(0, len(rows), len(rows))])
        found.append(_spearman(a[chosen], b[chosen]))
    low, high = np.nanquantile(found, [0.5 - LEVEL / 2, 0.5 + LEVEL / 2])
    return Correlation(_spearman(a, b), float(low), float(high))


def _spearman(a: np.ndarray, b: np.ndarray) -> float:
    ranks = [stats.rankdata(v) for v in (a, b)]
    if min(r.std() for r in ranks) == 0:
        return float("nan")
    return float(np.corrcoef(*ranks)[0, 1])
