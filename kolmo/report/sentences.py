"""Conclusions in sentences: never more than the numbers and their errors say."""

import math
from collections.abc import Sequence

from kolmo.report.blocks import Measured

__all__ = ["agrees", "compared", "held"]

# Standard errors within which nothing is said to differ.
BEYOND = 2.0


def compared(what: str, before: float, after: float, error: float | None, between: tuple[str, str]) -> str:
    """How a quantity differs between two cases; "no difference is seen" within two standard errors.

    Parameters
    ----------
    what : str
        The quantity, as a sentence begins.
    before, after : float
        Its values.
    error : float or None
        Standard error of their difference; None where there is none to be had, from one seed, say: the numbers are
        told then, and nothing is concluded from them.
    between : pair of str
        What the two cases are.

    Examples
    --------
    >>> compared("Accuracy", 0.969, 0.920, 0.011, ("without noise", "with Gaussian noise 0.3"))
    'Accuracy falls by 0.049 ± 0.011, from 0.969 without noise to 0.92 with Gaussian noise 0.3.'
    >>> compared("Accuracy", 0.969, 0.961, 0.011, ("without noise", "with dropout"))
    'Accuracy: no difference is seen (0.969 without noise, 0.961 with dropout; difference -0.008 ± 0.011).'
    >>> compared("Accuracy", 0.969, 0.920, None, ("without noise", "with noise"))
    'Accuracy is 0.969 without noise and 0.92 with noise; one run knows no error of the difference.'
    """
    first, second = between
    if error is None:
        return f"{what} is {before:.4g} {first} and {after:.4g} {second}; one run knows no error of the difference."
    change = Measured(after - before, error)
    if not abs(after - before) > BEYOND * error:
        told = f"{before:.4g} {first}, {after:.4g} {second}; difference {change}"
        return f"{what}: no difference is seen ({told})."
    word = "rises" if after > before else "falls"
    return (
        f"{what} {word} by {Measured(abs(after - before), error)}, from {before:.4g} {first} to {after:.4g} {second}."
    )


def agrees(what: str, difference: float, uncertainty: float, unit: str = "") -> str:
    """Whether two ways to one number agree within what both may be off.

    Examples
    --------
    >>> agrees("Network and equation", -0.0012, 0.003)
    'Network and equation agree: their difference, -0.0012, is within the uncertainty of both, 0.003.'
    >>> agrees("Network and equation", 0.0373, 0.003)
    'Network and equation differ by 0.0373 ± 0.0030: more than the uncertainty of both.'
    """
    if not (math.isfinite(difference) and math.isfinite(uncertainty)):
        return f"{what}: their difference is not known."
    if abs(difference) <= uncertainty:
        told = f"their difference, {difference:.2g}{unit}, is within the uncertainty of both, {uncertainty:.2g}{unit}"
        return f"{what} agree: {told}."
    return f"{what} differ by {Measured(difference, uncertainty)}{unit}: more than the uncertainty of both."


def held(what: str, errors: Sequence[float], bounds: Sequence[float], bound: str) -> str:
    """In how many cases an error stayed within a bound, and by how much it did not.

    Examples
    --------
    >>> held("The value of solve_hjb", [1e-4, 2e-5], [1e-3, 1e-5], "the estimate")
    'The value of solve_hjb was within the estimate in 1 of 2 cases; at worst it was off by 2 times the estimate.'
    >>> held("The value", [1e-4], [1e-3], "the tolerance")
    'The value was within the tolerance in all cases (1); at worst it was off by 0.1 times the tolerance.'
    """
    ratios = [abs(error) / bound if bound > 0 else math.inf for error, bound in zip(errors, bounds, strict=True)]
    within, worst = sum(ratio <= 1.0 for ratio in ratios), max(ratios)
    count = f"in all cases ({len(ratios)})" if within == len(ratios) else f"in {within} of {len(ratios)} cases"
    return f"{what} was within {bound} {count}; at worst it was off by {worst:.2g} times {bound}."
