"""Numbers and laws that depend on covariates: starts, delays, lapses."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from numpy.polynomial import legendre

from kolmo.errors import InputError

Covariates = Mapping[str, float]
Given = float | torch.Tensor | Callable[[Covariates], Any] | Any
"""A number, a tensor, or a function of the covariates."""
# Points by which a law of starts or delays is summed: so many, and this part of the trial functions.
NODES, PART = 8, 0.25
# Times and points at which coefficients are compared to see whether they depend on time.
COMPARED, PLACES = 32, 9


@dataclass(frozen=True)
class Between:
    """A law on an interval :math:`[l, u]`, for starts and delays that differ from trial to trial.

    Attributes
    ----------
    low, high : number or tensor, shape ()
        Its ends.
    density : callable, optional
        ``density(x)`` -> ``(...)`` in torch, up to a factor; None: uniform.

    Examples
    --------
    >>> points, weights = Between(0.2, 0.4).nodes(8)
    >>> float(weights @ points).__round__(12)
    0.3
    """

    low: Any
    high: Any
    density: Callable[[torch.Tensor], torch.Tensor] | None = None

    def nodes(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Points and weights that sum to one, of shape (count,) (Gauss–Legendre)."""
        z, w = (torch.as_tensor(v) for v in legendre.leggauss(count))
        low, high = (torch.as_tensor(v, dtype=torch.float64) for v in (self.low, self.high))
        points = low + 0.5 * (1.0 + z) * (high - low)
        weights = 0.5 * w if self.density is None else w * self.density(points).double()
        return points, weights / weights.sum()


def a_number(given: Given, c: Covariates, name: str) -> torch.Tensor:
    """A number, a tensor or a function of covariates as a tensor ()."""
    found = torch.as_tensor(given(c) if callable(given) else given, dtype=torch.float64)
    if found.numel() != 1 or not bool(torch.isfinite(found).all()):
        raise InputError(name, found.tolist(), "one finite number for each condition")
    return found.reshape(())


def law_of(given: Given, c: Covariates, count: int, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Points (s,) and weights of a law under a condition."""
    found = given(c) if callable(given) else given
    if isinstance(found, Between):
        points, weights = found.nodes(count)
        if not bool((weights >= 0).all()) or not bool(torch.isfinite(points).all()):
            raise InputError(name, found, "a density that is not negative, between finite ends")
        return points, weights
    return a_number(found, c, name)[None], torch.ones(1, dtype=torch.float64)


def laws_of(given: Given, conditions: Sequence[Covariates], count: int, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Points and weights (C, s) under all conditions; where there are fewer, some of weight zero."""
    laws = [law_of(given, c, count, name) for c in conditions]
    most = max(len(points) for points, _ in laws)
    points = torch.stack([torch.cat([p, p[:1].expand(most - len(p))]) for p, _ in laws])
    weights = torch.stack([torch.cat([w, w.new_zeros(most - len(w))]) for _, w in laws])
    return points, weights
