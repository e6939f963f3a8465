r"""From a sequence of levels to an estimate of the error of the last one, and to the resolution of the next.

An error of order q leaves differences of levels :math:`|v_j - v_i| = C|n_i^{-q} - n_j^{-q}|`, hence an error
:math:`|v_j - v_i| / ((n_j/n_i)^q - 1)` of the finer one. Three levels show q. That is the grid convergence index of
Roache (1998), whose factor of safety is 1.25 where three grids show the order of the method and 3 where they do not.
Here caution lies in the order instead of a factor: less is counted on than was observed, never more than the method
has.

Where the observed order is not the method's, or levels disagree in turn with either sign, the last difference may be
small by accident: an error that depends on where a jump falls in its cell is C/n times a number that is as good as
random. Then nothing is divided: the estimate is the largest of the last differences, as the data range of Eça and
Hoekstra (2009) for oscillating sequences; Oberkampf and Roy (2010, chapter 8) too return to a low order and a large
factor where the observed order departs from the formal one.

What it cannot see
------------------
- What all levels share: a wrong coefficient, a feature that no level saw, the cut of an unbounded domain.
- Two parts of an error that cancel in three levels and not beyond.
- Luck in three levels of an erratic sequence that shows, by accident, the order of the method with the right sign: of
  random sequences with a jump somewhere in its cell 2 in 100 had an error above ten estimates at order 6, 1 at order 4,
  0.2 at order 2; with four levels 0.2, 0.4 and 0.1, with six 0.2 or fewer. Where a break is known to lie between nodes,
  ``fewest=4`` asks for a fourth level.
- A jump so close to a place where every grid has a node, as in the middle, that they all see it there.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

# Part of the observed order that is counted on: for a clean sequence of order 6 and levels of ratio 1.5 the estimate
# is then 1.7 times the error, of order 2 1.4 times. Roache's factor for three levels is 1.25, for a known order.
CAUTION = 0.8
# But the estimate is no more than this multiple of what the observed order gives (Roache's factor where an order is not
# shown): a resolution that grows fivefold would multiply it by 7 otherwise.
MOST_FACTOR = 3.0
# Observed orders that count as the method's: from this part of it up to one more. Below, another and slower error
# rules; above, one part of the error dies while another has not shown itself. In Oberkampf and Roy's (2010) advice the
# band is 10 %; smooth problems on their first three grids were seen to scatter from 4.4 to 7 at order 6.
LEAST_PART, MOST_ABOVE = 0.75, 1.0
# After two declines faster than the method can be, the order counted on, as a part of the method's.
SURPRISED = 0.5
# Observed orders of successive levels agree where they differ by at most this part of the larger; the least of them.
AGREEMENT, LEAST_ORDER = 0.25, 0.7
# Part of the method's order that the levels before must have shown: a plateau followed by a drop is no convergence.
BEFORE = 0.4
# Cosine of successive differences, over points and witnesses, from which on they have the same sign; and its negative,
# from which on the other one. Between them, as often on coarse grids in several dimensions, they have different shapes.
ALIGNED = 0.5
# Differences looked at where a sequence is erratic. An accident in two of them is rarer than 1 in 300, and with more
# of them a sequence would pay for its coarsest levels for ever.
WINDOW = 3
# Differences up to this multiple of rounding are rounding.
AT_ROUNDING = 4.0
# Levels whose resolutions differ by less are two views of the same one, such as grids shifted by part of a cell.
SAME = 1.02
# Least and largest order that are looked for, and the steps of Newton's method that find it to rounding.
FLATTEST, STEEPEST, NEWTON = 1e-6, 40.0, 8
TINY = 1e-300


@dataclass(frozen=True)
class Verdict:
    """What a sequence of levels says about its last one.

    Attributes
    ----------
    estimate : ndarray, shape (k,)
        Estimate of the error of the last level, per column; infinite with fewer than two levels. Where the column is
        not confirmed, this is the largest of the last differences: no accident makes it small.
    order : ndarray, shape (k,)
        Order counted on; 1 where a column is not confirmed.
    confirmed : bool
        Whether every column converges as the method should. Otherwise the last difference is no evidence: another
        level, or a grid of the same resolution shifted by part of a cell, has to confirm it, or the (large) estimate
        has to do.
    reason : str
        Why it is not confirmed, in words; else empty.
    hoped : ndarray, shape (k,)
        What the estimate would be if the last difference could be believed.
    silent : ndarray of bool, shape (k,)
        Columns that were zero at every point of every level: nothing has been seen yet, unless there is nothing.
    """

    estimate: np.ndarray
    order: np.ndarray
    confirmed: bool
    reason: str
    hoped: np.ndarray
    silent: np.ndarray


@dataclass(frozen=True)
class Convergence:
    r"""The policy: what is believed of a sequence of levels with errors of the kind :math:`n^{-p}`.

    Parameters
    ----------
    order : float
        p, the order of the method.
    fewest : int, default 3
        Levels from which on the order can be confirmed: 3; or 4 where breaks are known to lie between the nodes.
    fastest : float, default 0
        Order of the parts of the method that converge faster, if there are some: nothing surprises up to it.

    Examples
    --------
    >>> import numpy as np
    >>> n = [40, 60, 90]
    >>> verdict = Convergence(2.0).judge(n, [np.array([[1.0 + 5.0 / k**2]]) for k in n])
    >>> verdict.confirmed, (verdict.estimate / (5.0 / 90**2)).round(1), verdict.order.round(1)
    (True, array([1.4]), array([1.6]))
    >>> verdict = Convergence(2.0).judge(n, [np.array([[v]]) for v in (1.0, 1.2, 1.19999)])
    >>> verdict.confirmed, verdict.estimate.round(2), verdict.reason
    (False, array([0.13]), 'the last levels agree better than order 2 can make them')
    """

    order: float
    fewest: int = 3
    fastest: float = 0.0

    @property
    def surprising(self) -> float:
        """Observed order above which the method cannot be what made the levels agree."""
        return max(self.order, self.fastest) + MOST_ABOVE

    def judge(
        self,
        resolutions: Sequence[float],
        values: Sequence[np.ndarray],
        *,
        groups: np.ndarray | None = None,
        rounding: np.ndarray | float = 0.0,
    ) -> Verdict:
        """Judge the last level.

        Parameters
        ----------
        resolutions : sequence of float
            Nodes per axis of every level (or what else errors fall with the order of), coarsest first. The last two
            may be the same: a shifted grid, which confirms the other or not.
        values : sequence of ndarray, shape (m, k)
            Answers of every level at the same m points, and witnesses beside them.
        groups : ndarray of int, shape (g, w), optional
            Which rows belong together: a point that matters, first, and its witnesses. The median of a group counts for
            it, and what differs by more than it and than every point that matters counts as no more. None: every row
            matters.
        rounding : float or ndarray, shape (k,)
            What the arithmetic can resolve.

        Returns
        -------
        Verdict
        """
        n, levels, scatter = _views(resolutions, values, groups)
        k = levels[-1].shape[1]
        floor = np.broadcast_to(np.asarray(rounding, dtype=float), (k,))
        silent = np.max([np.abs(v).max(0) for v in levels], axis=0) <= floor
        if len(n) < 2:
            nothing = np.full(k, np.inf)
            return Verdict(nothing, np.ones(k), False, "one level shows nothing", nothing, silent)
        differences = [_moderate(fine - coarse, groups) for coarse, fine in pairwise(levels)]
        finds = self._findings(n, differences, floor)
        if len(n) > 3 and not finds.confirmed.all():
            finds = _carried(finds, self._findings(n[:-1], differences[:-1], floor), n, np.abs(differences[-1]).max(0))
        # a second view of the last resolution is as good as another level
        confirmed = finds.confirmed | (scatter is not None and len(n) >= self.fewest)
        estimate = np.where(confirmed, finds.believed, finds.range)
        if scatter is not None:
            estimate = np.maximum(estimate, scatter)
        reason = "every answer is zero" if silent.any() else "" if confirmed.all() else finds.reason
        return Verdict(
            _finite(estimate + floor),
            np.where(confirmed, finds.order, 1.0),
            not reason,
            reason,
            _finite(finds.hoped + floor),
            silent,
        )

    def next_resolution(
        self, resolutions: Sequence[float], verdict: Verdict, allowed: np.ndarray, *, least: float, most: float
    ) -> float:
        """Resolution of the next level.

        Parameters
        ----------
        resolutions : sequence of float
            Those of the levels so far.
        verdict : Verdict
            What they say.
        allowed : ndarray, shape (k,)
            Errors that the next level may have.
        least, most : float
            Bounds of its growth. With fewer than three levels it grows by the least.

        Returns
        -------
        float
        """
        last = float(resolutions[-1])
        if len(resolutions) < 3:
            return last * least
        # what is not believed yet needs a level near by, that shows whether to believe it
        wanted = verdict.estimate if verdict.confirmed else verdict.hoped
        order = np.where(verdict.order < LEAST_PART * CAUTION * self.order, verdict.order, self.order)
        order = order if verdict.confirmed else np.full(len(order), self.order)
        growth = np.max((wanted / np.maximum(allowed, TINY)) ** (1.0 / order))
        return last * float(min(max(np.nan_to_num(growth, nan=most), least), most))

    def between(
        self, resolutions: Sequence[float], verdict: Verdict, allowed: np.ndarray, *, least: float
    ) -> float | None:
        """Resolution, between the last two levels, of one that may confirm the last, where no better one is needed.

        If the last difference can be believed, then the last level is good enough, and one beside it may show that: it
        costs a part of what a finer one would.

        Parameters
        ----------
        resolutions, verdict, allowed, least
            As for :meth:`next_resolution`.

        Returns
        -------
        float or None
            The geometric mean; None where the last level is believed, or not good enough, or the last two are too near.
        """
        if len(resolutions) < 3 or verdict.confirmed or (verdict.hoped > allowed).any():
            return None
        before, last = (float(n) for n in resolutions[-2:])
        return math.sqrt(before * last) if last >= least**2 * before else None

    def _findings(self, n: list[float], differences: list[np.ndarray], floor: np.ndarray) -> "_Findings":
        """What differences of successive levels say, per column."""
        sizes = [np.abs(difference).max(0) for difference in differences]
        ratio = n[-1] / n[-2]
        plain = sizes[-1] / (ratio - 1.0)
        carried = [size * (a / n[-1]) for size, a in zip(sizes, n[1:], strict=True)]
        spread = np.maximum(np.max(carried[-WINDOW:], axis=0), plain)
        ones = np.ones(len(floor))
        if len(n) < 3:
            return _Findings(plain, plain, spread, ones, ones < 0, "two levels show no order")
        seen = _Seen.of(n, differences, [np.maximum(size, floor) for size in sizes])
        order, confirmed = self._trusted(seen)
        observed = np.clip(seen.orders[-1], order, self.order)
        hoped, capped = sizes[-1] / (ratio**order - 1.0), MOST_FACTOR * sizes[-1] / (ratio**observed - 1.0)
        hoped = np.where(confirmed & (seen.orders[-1] <= self.surprising), np.minimum(hoped, capped), hoped)
        # what fell faster than the method can be has, if that was no accident, its order at least
        surprising = sizes[-1] / (ratio**self.order - 1.0)
        hoped = np.where(~confirmed & (seen.orders[-1] > self.surprising), surprising, hoped)
        # a level is no better than the one before it allows at the order of the method
        before = sizes[-2] / ((n[-2] / n[-3]) ** self.order - 1.0) * (n[-2] / n[-1]) ** self.order
        believed = np.maximum(hoped, before)
        still = np.maximum(sizes[-1], sizes[-2]) <= AT_ROUNDING * floor
        believed = np.where(still, np.maximum(sizes[-1], sizes[-2]), believed)
        return _Findings(
            hoped,
            believed,
            np.maximum(spread, believed),
            order,
            confirmed | still,
            self._reason(seen, confirmed | still),
        )

    def _trusted(self, seen: "_Seen") -> tuple[np.ndarray, np.ndarray]:
        """Order counted on, and where the sequence converges as it should."""
        p, last, surprised = self.order, seen.orders[-1], seen.orders[-1] > self.surprising
        if len(seen.orders) == 1:
            steady = (last >= LEAST_PART * p) & ~surprised & seen.aligned & (self.fewest <= 3)
            order = np.where(surprised, 1.0, CAUTION * last)
        else:
            before = seen.orders[-2]
            least, most = np.minimum(last, before), np.maximum(last, before)
            fast = (least >= LEAST_PART * p) & ~seen.reversed
            even = (most - least <= AGREEMENT * most) & (least >= LEAST_ORDER) & seen.aligned
            steady = fast | even
            if len(seen.orders) > 2:
                earlier = seen.orders[-3]
                steady &= (earlier >= BEFORE * p) | (even & (np.abs(last - earlier) <= AGREEMENT * most))
            order = np.where(surprised, SURPRISED * p, CAUTION * np.where(steady, least, last))
        return np.clip(order, min(1.0, CAUTION * p), p), steady

    def _reason(self, seen: "_Seen", confirmed: np.ndarray) -> str:
        """Why the first column that is not confirmed is not."""
        if confirmed.all():
            return ""
        j = int(np.argmin(confirmed))
        orders = [float(order[j]) for order in seen.orders]
        if orders[-1] > self.surprising:
            return f"the last levels agree better than order {self.surprising - MOST_ABOVE:g} can make them"
        if not seen.aligned[j]:
            return "the differences of the levels change their sign or their shape"
        if len(orders) > 1 and orders[-1] >= LEAST_PART * self.order:
            return f"the observed order jumps from {orders[-2]:.1f} to {orders[-1]:.1f}"
        if orders[-1] >= LEAST_PART * self.order:
            return f"three levels are not enough to confirm order {self.order:g}"
        return f"the levels show order {orders[-1]:.1f}, the method has {self.order:g}"


class _Findings(NamedTuple):
    """Per column: error by the last difference alone, with the one before, without trust; order; confirmed; why not."""

    hoped: np.ndarray
    believed: np.ndarray
    range: np.ndarray
    order: np.ndarray
    confirmed: np.ndarray
    reason: str


class _Seen(NamedTuple):
    """Per column: orders of the last triples of levels; the last two have one sign; the last one has either."""

    orders: list[np.ndarray]
    aligned: np.ndarray
    reversed: np.ndarray

    @classmethod
    def of(cls, n: list[float], differences: list[np.ndarray], sizes: list[np.ndarray]) -> "_Seen":
        triples = range(max(1, len(differences) - 3), len(differences))
        orders = [observed_order(n[i - 1 : i + 2], sizes[i - 1], sizes[i]) for i in triples]
        cosines = np.array([_cosine(differences[i - 1], differences[i]) for i in triples[-2:]])
        return cls(orders, np.asarray((cosines >= ALIGNED).all(0)), np.asarray(cosines[-1] <= -ALIGNED))


def observed_order(n: Sequence[float], before: np.ndarray, last: np.ndarray) -> np.ndarray:
    r"""Order q with :math:`(n_0^{-q} - n_1^{-q}) / (n_1^{-q} - n_2^{-q})` = before / last, from 0 to 40, per column.

    Parameters
    ----------
    n : sequence of three floats
        Resolutions, growing.
    before, last : ndarray, shape (k,)
        Moduli of the differences of the first and of the last two.
    """
    first, second = np.log(n[1] / n[0]), np.log(n[2] / n[1])
    wanted = np.log(np.maximum(before, TINY)) - np.log(np.maximum(last, TINY))
    # the logarithm of the left side is almost linear: its slope grows or falls from (first + second) / 2 to first
    order = np.clip(2.0 * (wanted - np.log(first / second)) / (first + second), FLATTEST, STEEPEST)
    for _ in range(NEWTON):
        left = np.log(np.expm1(order * first) / -np.expm1(-order * second))
        slope = first / -np.expm1(-order * first) - second / np.expm1(order * second)
        order = np.clip(order - (left - wanted) / slope, FLATTEST, STEEPEST)
    return np.asarray(order)


def _cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosine of the angle between differences (m, k), per column."""
    a, b = (x / np.maximum(np.abs(x).max(0), TINY) for x in (a, b))
    return np.asarray((a * b).sum(0) / np.maximum(np.sqrt((a * a).sum(0) * (b * b).sum(0)), TINY))


def _carried(finds: _Findings, before: _Findings, n: list[float], change: np.ndarray) -> _Findings:
    """What was confirmed one level ago stays so, unless the next level contradicts it.

    A finer level that moves by no more than the estimate of the one before is no worse than that; the estimate falls as
    it would have at the order that was counted on then.
    """
    sure = before.confirmed & ~finds.confirmed & (change <= before.believed)
    carried = np.maximum(before.believed * (n[-2] / n[-1]) ** before.order, finds.hoped)
    return finds._replace(
        believed=np.where(sure, carried, finds.believed),
        order=np.where(sure, before.order, finds.order),
        confirmed=finds.confirmed | sure,
    )


def _moderate(difference: np.ndarray, groups: np.ndarray | None) -> np.ndarray:
    """The difference (m, k) of two levels, no larger at witnesses than the points that matter and most witnesses say.

    A witness is there to tell an accident at its point. One that errs by much more than the others, as where its
    solution is steeper, would rule the estimate of answers that nobody asked for.
    """
    if groups is None:
        return difference
    sizes = np.abs(difference)
    most = np.median(sizes[groups], axis=1).max(0)
    asked = np.delete(sizes, groups[:, 1:].ravel(), axis=0).max(0)
    limit = np.maximum(most, asked)
    return np.asarray(np.clip(difference, -limit, limit))


def _views(
    resolutions: Sequence[float], values: Sequence[np.ndarray], groups: np.ndarray | None
) -> tuple[list[float], list[np.ndarray], np.ndarray | None]:
    """Levels of different resolutions, and the scatter (k,) of two views of the last one."""
    n, levels = [float(x) for x in resolutions], [np.asarray(v, dtype=float) for v in values]
    kept = [i for i in range(len(n)) if i == len(n) - 1 or n[i + 1] / n[i] >= SAME]
    twice = len(n) > 1 and n[-1] / n[-2] < SAME
    scatter = np.abs(_moderate(levels[-1] - levels[-2], groups)).max(0) if twice else None
    return [n[i] for i in kept], [levels[i] for i in kept], scatter


def _finite(estimate: np.ndarray) -> np.ndarray:
    """The estimate, infinite where it is no number."""
    return np.where(np.isfinite(estimate), estimate, np.inf)
