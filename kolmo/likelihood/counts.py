r"""Data of many together: how many are left, where they went out and when, how they are spread, and their moments.

All are functionals of one law, which is moved by the transposes of the steps that values take: with masses
:math:`p_{n+1} = S_n^{\mathsf T}p_n` at the nodes,

.. math::
    P(\tau > t) = \sum_i p_i(t), \qquad
    P(\tau \in (s, t],\ X_\tau \in F) = \sum_n\langle L_n, r_F\rangle, \qquad
    P(X_t \in B) = \int_B \rho(t, x)\,dx, \qquad E f(X_t) = \sum_i p_i(t) f(x_i)

with ρ the density read off the masses, and the derivatives L of a step in its loads, of which a sure reward of one on
the face F has r: what the steps themselves let out, so that nothing is lost.
"""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from kolmo.arrays import as_numpy
from kolmo.control.law import Law
from kolmo.errors import InputError
from kolmo.likelihood.base import Likelihood
from kolmo.likelihood.law_likelihood import (
    GroupLikelihood,
    LawLikelihood,
    Started,
    checked_counts,
    multinomial,
    under_way,
)
from kolmo.problem.box import Box
from kolmo.problem.sde import SDE


def exit_counts(
    sde: SDE,
    initial: Any,
    edges: Any,
    counts: Any,
    survivors: float = 0,
    *,
    box: Box,
    killing: Any = None,
    tol: float = 1e-3,
) -> "ExitLikelihood":
    r"""The likelihood of how many left between given times, and where, as a function of torch parameters.

    .. math::
        \ell = \log\frac{N!}{\prod_{jF} n_{jF}!\,m!} + \sum_{jF} n_{jF}\log P(\tau\in(t_{j-1}, t_j],\ X_\tau\in F)
        + m\log P(\tau > t_J), \qquad \tau = \inf\{t: X_t \notin \text{box}\}

    given that all N = Σn + m are under way at the first edge.

    Parameters
    ----------
    sde : SDE
        The process, in torch, in 1 to 3 dimensions; its coefficients may depend on time.
    initial : array_like, tensor or callable
        Where all start at t = 0: a point (d,), points (n, d) with equal shares, or a density in torch, ``initial(x)``
        -> ``(...)``.
    edges : array_like, shape (J + 1,)
        Ends of the intervals of time, increasing, the first not negative.
    counts : array_like of shape (J,), or mapping of faces to such
        How many left in each interval; by the way out if that is known: "low" or "high" in one dimension,
        ``(axis, side)``, or "killing". All ways out are needed then.
    survivors : float, default 0
        How many are under way still at the last edge.
    box : Box
        The state space; faces that absorb (they may move), or are elastic, let out.
    killing : number, tensor or callable, optional
        ``killing(t, x)``, a rate at which it ends anywhere.
    tol : float, default 1e-3
        Error that ℓ may have.

    Returns
    -------
    ExitLikelihood

    Raises
    ------
    InputError
        For counts that do not fit, and where there is no way out.

    Examples
    --------
    Of a hundred Brownian motions with drift between ±1, by the face that they left through:

    >>> v = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    >>> sde = SDE(lambda t, x: v + 0 * x, 1.0, dim=1, arrays="torch")
    >>> counts = {"low": [8, 12], "high": [18, 34]}
    >>> found = exit_counts(sde, [0.0], [0.0, 0.5, 2.0], counts, 28, box=Box(-1.0, 1.0, "absorbing"))
    >>> found().item().__round__(2), found.status
    (-24.53, 'converged')
    >>> bool(torch.isfinite(torch.autograd.grad(found(), v)[0]))
    True
    """
    return ExitLikelihood(Started(sde, initial, box, killing, tol), edges, counts, survivors)


class ExitLikelihood(LawLikelihood):
    r"""Likelihood :math:`\ell = \sum_j n_j\log p_j` of numbers of exits; see :func:`exit_counts`.

    Attributes
    ----------
    edges : ndarray, shape (J + 1,)
        Ends of the intervals.
    counts : dict
        Numbers by way out, each of shape (J,); of all ways out together under None.
    survivors : float
        How many were left.

    Raises
    ------
    InputError
        As `exit_counts`.

    Examples
    --------
    >>> sde, box = SDE(0.0, 1.0, dim=1), Box(-1.0, 1.0, "absorbing")
    >>> exit_counts(sde, [0.0], [0.0, 1.0], [63], 37, box=box).count
    100
    """

    def __init__(self, given: Started, edges: Any, counts: Any, survivors: float) -> None:
        self.edges = np.asarray(as_numpy(edges), dtype=float).reshape(-1)
        if len(self.edges) < 2 or not (np.diff(self.edges) > 0).all():
            raise InputError("edges", self.edges.tolist()[:6], "at least two increasing times")
        super().__init__(given, self.edges)
        ways = counts if isinstance(counts, Mapping) else {None: counts}
        self.counts = {way: checked_counts(n, (len(self.edges) - 1,), "counts") for way, n in ways.items()}
        self.survivors = float(checked_counts(survivors, (), "survivors"))

    @property
    def count(self) -> int:
        """How many there were."""
        return int(sum(n.sum() for n in self.counts.values()) + self.survivors)

    def _logs(self, law: Law) -> torch.Tensor:
        if not law.exits:
            raise InputError("box", self.problem.box, "a face that absorbs, or killing", 'boundary="absorbing"')
        alive = torch.stack([under_way(law, t) for t in self.edges])
        if None in self.counts:
            chances = [alive[:-1] - alive[1:]]
        else:
            named = {law._exit(way): way for way in self.counts}
            if named.keys() != set(law.exits):
                raise InputError(
                    "counts", list(self.counts), f"numbers for all ways out: {', '.join(map(str, law.exits))}"
                )
            chances = [self._out(law, way) for way in self.counts]
        chance = torch.cat([*chances, alive[-1:]]) / alive[0]
        return multinomial(np.concatenate([*self.counts.values(), [self.survivors]]), chance)

    def _out(self, law: Law, way: Any) -> torch.Tensor:
        """Probability of leaving by a way in each interval between the edges, which are time nodes."""
        gone = law.gone(way)
        ends = [int(np.abs(law.clock - min(t, law.clock[-1])).argmin()) for t in self.edges]
        return torch.stack([gone[a + 1 : b + 1].sum() for a, b in pairwise(ends)])


def survival_counts(
    sde: SDE, initial: Any, times: Any, alive: Any, total: Any, *, box: Box, killing: Any = None, tol: float = 1e-3
) -> Likelihood:
    r"""The likelihood of how many are under way still at given times.

    .. math::
        \ell = \sum_j\log\binom{N_j}{a_j} + a_j\log P(\tau > t_j) + (N_j - a_j)\log P(\tau \le t_j)

    for groups of N_j that are looked at once each; of one group that is looked at again and again, the likelihood of
    the exits in between.

    Parameters
    ----------
    sde, initial, box, killing, tol
        As for :func:`exit_counts`.
    times : array_like, shape (J,)
        Increasing positive times.
    alive : array_like, shape (J,)
        How many were under way then.
    total : float, or array_like of shape (J,)
        How many started: one number, one group that is followed; one per time, a group for each.

    Returns
    -------
    Likelihood

    Raises
    ------
    InputError
        For counts that do not fit.

    Examples
    --------
    >>> sde, box = SDE(0.0, 1.0, dim=1), Box(-1.0, 1.0, "absorbing")
    >>> found = survival_counts(sde, [0.0], [1.0], [37], 100, box=box)
    >>> found().item().__round__(3)  # binomial with probability 0.3708 (Feller 1971, X.5)
    -2.496
    >>> survival_counts(sde, [0.0], [0.5, 1.0], [68, 37], 100, box=box).count
    100
    """
    at, given = np.asarray(as_numpy(times), dtype=float).reshape(-1), Started(sde, initial, box, killing, tol)
    left = checked_counts(alive, (len(at),), "alive")
    if np.ndim(as_numpy(total)) == 0:
        gone = -np.diff(np.append(float(checked_counts(total, (), "total")), left))
        if (gone < 0).any():
            raise InputError("alive", left.tolist()[:6], f"numbers that do not grow, at most the total {total}")
        return ExitLikelihood(given, np.append(0.0, at), gone, float(left[-1]))
    return GroupLikelihood(given, at, left, checked_counts(total, (len(at),), "total"))
