"""Histograms of states and moments at given times, and their likelihoods."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from kolmo.arrays import as_numpy
from kolmo.control.law import Law
from kolmo.errors import InputError
from kolmo.likelihood.law_likelihood import (
    LawLikelihood,
    Started,
    checked_counts,
    multinomial,
    sums_over,
    under_way,
)
from kolmo.problem.box import Box
from kolmo.problem.sde import SDE

Function = Callable[[torch.Tensor], torch.Tensor]


def histogram(
    sde: SDE,
    initial: Any,
    times: Any,
    edges: Any,
    counts: Any,
    rest: Any = None,
    *,
    box: Box | None = None,
    killing: Any = None,
    tol: float = 1e-3,
) -> "HistogramLikelihood":
    r"""The likelihood of how many are in each bin of the state at given times, as a function of torch parameters.

    .. math::
        \ell = \sum_k \log\frac{N_k!}{\prod_B n_{kB}!} + \sum_{kB} n_{kB}\log\frac{P(X_{t_k}\in B)}{P(X_{t_k}\in\cup B)}

    with others at each time (of the same ones it is a composite likelihood). With ``rest``, those that were in none of
    the bins, or had left, are one bin more.

    Parameters
    ----------
    sde, initial, killing, tol
        As for :func:`exit_counts`.
    times : float or array_like, shape (K,)
        When.
    edges : array_like of shape (m + 1,), or list of d such
        Edges of the bins along each axis, increasing; the outer ones may be infinite.
    counts : array_like, shape (K, m_1, ..., m_d)
        How many were in each; without the first axis for one time.
    rest : float or array_like, shape (K,), optional
        How many were elsewhere. None: that is not known, and what is in the bins is all there is.
    box : Box, optional
        The state space. None: all of it.

    Returns
    -------
    HistogramLikelihood

    Raises
    ------
    InputError
        For counts that do not fit the edges.

    Examples
    --------
    >>> kappa = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    >>> ou = SDE(lambda t, x: -kappa * x, 1.0, dim=1, arrays="torch")
    >>> found = histogram(ou, [1.0], 0.5, [-np.inf, 0.0, 1.0, np.inf], [20, 49, 31])
    >>> found().item().__round__(3), found.status
    (-8.121, 'converged')
    """
    return HistogramLikelihood(Started(sde, initial, box, killing, tol), times, edges, counts, rest)


class HistogramLikelihood(LawLikelihood):
    r"""Likelihood :math:`\ell = \sum_{kj} n_{kj}\log p_{kj}` of histograms; see :func:`histogram`.

    Attributes
    ----------
    edges : list of ndarray
        Edges of the bins along axis i, shape (m_i + 1,).
    counts : ndarray, shape (K, m_1, ..., m_d)
        How many were in each.

    Raises
    ------
    InputError
        As `histogram`.

    Examples
    --------
    >>> found = histogram(SDE(0.0, 1.0, dim=1), [0.0], [1.0], [-1.0, 0.0, 1.0], [[3, 2]], rest=[3])
    >>> found.count
    8
    """

    def __init__(self, given: Started, times: Any, edges: Any, counts: Any, rest: Any) -> None:
        super().__init__(given, times)
        several = self.dim > 1 or (isinstance(edges, list | tuple) and np.ndim(edges[0]) == 1)
        self.edges = [np.asarray(as_numpy(e), dtype=float).reshape(-1) for e in (edges if several else [edges])]
        if len(self.edges) != self.dim or any(len(e) < 2 or not (np.diff(e) > 0).all() for e in self.edges):
            raise InputError("edges", edges, f"increasing edges for each of {self.dim} axes")
        self.at = np.asarray(as_numpy(times), dtype=float).reshape(-1)
        shape = (len(self.at), *(len(e) - 1 for e in self.edges))
        known = np.asarray(as_numpy(counts), dtype=float)
        self.counts = checked_counts(known[None] if np.ndim(times) == 0 else known, shape, "counts")
        self.rest = None if rest is None else checked_counts(np.reshape(as_numpy(rest), -1), (len(self.at),), "rest")

    @property
    def count(self) -> int:
        """How many were seen."""
        return int(self.counts.sum() + (0.0 if self.rest is None else self.rest.sum()))

    def chances(self, law: Law, t: float) -> torch.Tensor:
        """Probabilities of the bins at a time, shape (m_1, ..., m_d).

        Raises
        ------
        InputError
            For a time at which the process has only begun.
        """
        if t == 0.0:
            raise InputError("times", 0.0, "times after the start")
        if t > law.times[-1]:
            return torch.zeros([len(e) - 1 for e in self.edges], dtype=torch.float64)
        rho = law.nodal_density(t).reshape(law.grid.shape)
        for axis, edges in enumerate(self.edges):
            matrix = sums_over(law, axis, edges, t)
            rho = torch.tensordot(matrix, rho, dims=([1], [axis])).movedim(0, axis)
        return rho

    def _logs(self, law: Law) -> torch.Tensor:
        terms = []
        for k, t in enumerate(self.at):
            chance, counts = self.chances(law, float(t)).reshape(-1), self.counts[k].reshape(-1)
            if self.rest is None:
                chance = chance / chance.sum()
            else:
                chance, counts = torch.cat([chance, 1.0 - chance.sum()[None]]), np.append(counts, self.rest[k])
            terms.append(multinomial(counts, chance))
        return torch.cat(terms)


def moments(
    sde: SDE,
    initial: Any,
    times: Any,
    values: Any,
    standard_errors: Any,
    function: Function | None = None,
    *,
    box: Box | None = None,
    killing: Any = None,
    tol: float = 1e-3,
) -> "MomentLikelihood":
    r"""The likelihood of sample means of functions of the state at given times, as a function of torch parameters.

    .. math::
        \ell = -\tfrac12\sum_{kj}\Big(\frac{m_{kj} - E[f_j(X_{t_k}) \mid \tau > t_k]}{s_{kj}}\Big)^2
        - \sum_{kj}\log\sqrt{2\pi}s_{kj}

    for means with known, independent errors; of those that are under way still where there are ways out.

    Parameters
    ----------
    sde, initial, killing, tol
        As for :func:`exit_counts`.
    times : float or array_like, shape (K,)
        When.
    values : array_like, shape (K, q)
        Means m that were found; (K,) for one function, without the first axis for one time.
    standard_errors : array_like
        Their standard errors s, of the same shape or one that goes with it.
    function : callable, optional
        f: ``function(x)`` of points (..., d) -> ``(...)`` or ``(..., q)``, in torch. None: the coordinates themselves.
    box : Box, optional
        The state space. None: all of it.

    Returns
    -------
    MomentLikelihood

    Raises
    ------
    InputError
        For shapes that do not fit and standard errors that are not positive.

    Examples
    --------
    Mean and second moment of an Ornstein–Uhlenbeck process that starts at one:

    >>> kappa = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    >>> ou = SDE(lambda t, x: -kappa * x, 1.0, dim=1, arrays="torch")
    >>> both = lambda x: torch.cat([x, x**2], -1)
    >>> found = moments(ou, [1.0], [0.5, 1.0], [[0.6, 0.7], [0.4, 0.55]], [0.02, 0.05], both)
    >>> found().item().__round__(3), found.status
    (8.683, 'converged')
    """
    given = Started(sde, initial, box, killing, tol)
    return MomentLikelihood(given, times, values, standard_errors, function or (lambda x: x))


class MomentLikelihood(LawLikelihood):
    r"""Likelihood :math:`\prod_{kj} N(y_{kj};\, m_{kj}, s_{kj}^2)` of sample moments; see :func:`moments`.

    Attributes
    ----------
    at : ndarray, shape (K,)
        When.
    values, standard_errors : ndarray, shape (K, q)
        Means that were found, and their errors.

    Raises
    ------
    InputError
        As `moments`.

    Examples
    --------
    >>> moments(SDE(0.0, 1.0, dim=1), [0.0], 1.0, 0.0, 0.1)().item().__round__(4)  # log(10/√(2π))
    1.3836
    """

    def __init__(self, given: Started, times: Any, values: Any, standard_errors: Any, function: Function) -> None:
        super().__init__(given, times)
        self.at = np.asarray(as_numpy(times), dtype=float).reshape(-1)
        self.function = function
        found = np.asarray(as_numpy(values), dtype=float).reshape(len(self.at), -1)
        self.values, spread = found, np.asarray(as_numpy(standard_errors), dtype=float)
        try:
            self.standard_errors = np.broadcast_to(spread if spread.ndim != 1 or len(spread) == found.shape[1]
                                                   else spread[:, None], found.shape)  # fmt: skip
        except ValueError:
            raise InputError("standard_errors", f"shape {spread.shape}", f"shape {found.shape}") from None
        if not (self.standard_errors > 0).all() or not np.isfinite(found).all():
            raise InputError("standard_errors", spread.tolist(), "positive numbers, with finite values")

    @property
    def count(self) -> int:
        """Number of means."""
        return int(self.values.size)

    def expected(self, law: Law, t: float) -> torch.Tensor:
        """E[f(X_t) | under way], shape (q,).

        Raises
        ------
        InputError
            Where the function has another number of values than there are means.
        """
        mean = law.expectation(self.function, min(t, float(law.times[-1]))).reshape(-1)
        if len(mean) != self.values.shape[1]:
            raise InputError("function", f"{len(mean)} values", f"{self.values.shape[1]}, as there are means")
        return mean / under_way(law, t) if law.exits else mean

    def _logs(self, law: Law) -> torch.Tensor:
        mean = torch.stack([self.expected(law, float(t)) for t in self.at])
        spread = torch.as_tensor(np.array(self.standard_errors))
        z = (torch.as_tensor(self.values) - mean) / spread
        return (-0.5 * z**2 - torch.log(spread) - 0.5 * math.log(2.0 * math.pi)).reshape(-1)
