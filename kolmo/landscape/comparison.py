"""Landscapes compared: over seeds, and paired by seed."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from kolmo.errors import InputError
from kolmo.landscape.draws import standard_error
from kolmo.landscape.summary import Quantity, Summary
from kolmo.shown import Shown


def over_seeds(summaries: Sequence[Summary]) -> Summary:
    r"""Mean of every quantity over independently trained networks, with its standard error over them.

    .. math:: \bar q = \tfrac1n\sum_s q_s, \qquad \text{standard error}^2 = \tfrac{1}{n(n - 1)}\sum_s (q_s - \bar q)^2

    Parameters
    ----------
    summaries : sequence of Summary
        One for each seed, at least two.

    Raises
    ------
    InputError
        For fewer than two summaries.

    Examples
    --------
    >>> one, other = (Summary({"trace": Quantity(value, 0.0, "trace")}) for value in (1.0, 3.0))
    >>> print(over_seeds([one, other]))
    trace: 2 ± 1
    """
    _at_least_two(summaries)
    found = {}
    for name in _common(summaries):
        values = np.array([one[name].value for one in summaries])
        definition = f"{summaries[0][name].definition}; mean over {len(values)} seeds"
        found[name] = Quantity(float(values.mean()), float(standard_error(values)), definition)
    return Summary(found)


@dataclass(frozen=True, repr=False)
class Comparison(Shown):
    r"""Paired difference :math:`\tfrac1n\sum_s (a_s - b_s)` of one quantity over seeds s.

    Attributes
    ----------
    difference : float
        Mean of (first − second).
    standard_error : float
        Of that mean.
    p_value : float
        Two-sided, of the sign-flip test (exact up to 12 pairs): how often random signs of the differences give a mean
        as far from zero. With n pairs it cannot be below 2/2ⁿ.
    pairs : int
        Number of seeds.

    References
    ----------
    R. A. Fisher (1935), The Design of Experiments: the test by random signs.

    Examples
    --------
    >>> first = [Summary({"loss": Quantity(v, 0.0, "")}) for v in (0.8, 0.9, 1.0, 1.1)]
    >>> second = [Summary({"loss": Quantity(v, 0.0, "")}) for v in (0.7, 0.7, 0.7, 0.7)]
    >>> found = paired(first, second)["loss"]
    >>> round(found.difference, 6), found.p_value, found.pairs
    (0.25, 0.125, 4)
    """

    difference: float
    standard_error: float
    p_value: float
    pairs: int


def paired(first: Sequence[Summary], second: Sequence[Summary]) -> dict[str, Comparison]:
    r"""Compare two ways of training over the same seeds, quantity by quantity.

    .. math:: \bar\delta = \tfrac1n\sum_s (a_s - b_s)

    Parameters
    ----------
    first, second : sequence of Summary
        One for each seed, in the same order.

    Returns
    -------
    dict of str to Comparison

    Raises
    ------
    InputError
        For lists of different lengths, and fewer than two pairs.

    References
    ----------
    R. A. Fisher (1935), The Design of Experiments: the test by random signs.

    Examples
    --------
    >>> a = [Summary({"trace": Quantity(value, 0.0, "")}) for value in (3.0, 4.0, 5.0)]
    >>> b = [Summary({"trace": Quantity(value, 0.0, "")}) for value in (1.0, 2.0, 4.0)]
    >>> found = paired(a, b)["trace"]
    >>> round(found.difference, 3), found.p_value
    (1.667, 0.25)
    """
    if len(first) != len(second):
        raise InputError("second", f"{len(second)} summaries", f"{len(first)}, one for each of the first")
    _at_least_two(first)
    found = {}
    for name in _common([*first, *second]):
        gaps = np.array([a[name].value - b[name].value for a, b in zip(first, second, strict=True)])
        found[name] = Comparison(float(gaps.mean()), float(standard_error(gaps)), _sign_flips(gaps), len(gaps))
    return found


def _at_least_two(summaries: Sequence[Summary]) -> None:
    if len(summaries) < 2:
        raise InputError("summaries", f"{len(summaries)} of them", "at least two, to have a standard error")


def _common(summaries: Sequence[Summary]) -> list[str]:
    """Names that all have."""
    return [name for name in summaries[0] if all(name in one.quantities for one in summaries)]


def _sign_flips(gaps: np.ndarray) -> float:
    """P-value of the mean under random signs."""
    if not np.isfinite(gaps).all():
        return math.nan
    if len(gaps) <= 12:
        signs = np.array(list(product((-1.0, 1.0), repeat=len(gaps))))
    else:
        signs = np.random.default_rng(0).choice((-1.0, 1.0), (10_000, len(gaps)))
        signs[0] = 1.0
    return float(np.mean(np.abs(signs @ gaps) >= abs(gaps.sum()) * (1 - 1e-12)))
