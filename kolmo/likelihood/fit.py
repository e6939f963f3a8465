"""From a likelihood to an answer: estimates, standard errors, intervals, and what models are compared by."""

import math
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import optimize

from kolmo.arrays import at_home
from kolmo.control.minimize import minimize
from kolmo.control.uncertainty import Uncertainty, uncertainty
from kolmo.errors import InputError, ToleranceWarning
from kolmo.likelihood.base import Likelihood
from kolmo.shown import Shown

# How often the resolution may be renewed at the parameters found.
ROUNDS = 4


@dataclass(frozen=True, eq=False)
class Fit(Shown):
    r"""Parameters at which a likelihood is largest.

    Attributes
    ----------
    x : ndarray, shape (p,)
        The estimates, all parameters one after another.
    log_likelihood : float
        :math:`\ell(\hat\theta)`.
    error_estimate : float
        Its estimated error.
    count : int
        Number of observations.
    result : OptimizeResult
        Of the last minimisation, as ``control.minimize`` returns it.

    Examples
    --------
    >>> Fit(np.array([0.3]), -12.0, 1e-4, 20, optimize.OptimizeResult(success=True)).aic
    26.0
    """

    x: np.ndarray
    log_likelihood: float
    error_estimate: float
    count: int
    result: optimize.OptimizeResult

    @property
    def success(self) -> bool:
        """Whether the minimisation has arrived."""
        return bool(self.result.success)

    @property
    def aic(self) -> float:
        r"""Akaike's criterion :math:`2p - 2\ell`: the smaller, the better the model predicts (Akaike 1974)."""
        return 2.0 * len(self.x) - 2.0 * self.log_likelihood

    @property
    def bic(self) -> float:
        r"""Schwarz's criterion :math:`p\log N - 2\ell` (Schwarz 1978)."""
        return len(self.x) * math.log(self.count) - 2.0 * self.log_likelihood

    def uncertainty(self, *, level: float = 0.95, profile: bool = False) -> Uncertainty:
        """Covariance, standard errors and intervals, from exact second derivatives; see ``control.uncertainty``.

        Parameters
        ----------
        level : float, default 0.95
            Probability of the intervals.
        profile : bool, default False
            Whether to find profile intervals: some more minimisations for each component.
        """
        return uncertainty(self.result, level=level, profile=profile)

    def __repr__(self) -> str:
        parts = [f"log-likelihood {self.log_likelihood:.6g} ± {self.error_estimate:.1e}", f"{self.count} observations"]
        return f"Fit(x={np.array2string(self.x, precision=5)}, {', '.join(parts)}, AIC {self.aic:.6g})"


@at_home
def fit(likelihood: Likelihood, parameters: Any, *, bounds: Any = None, maxiter: int = 200, starts: int = 1) -> Fit:
    r"""Maximise a likelihood over torch parameters.

    .. math:: \hat\theta \in \arg\max_{l \le \theta \le u} \ell(\theta)

    The parameters are updated in place. The resolution that is kept while ℓ is maximised is checked at the parameters
    found; where it does not meet the tolerance there, it is renewed and the maximisation goes on.

    Parameters
    ----------
    likelihood : Likelihood
        Of data, as a function of the parameters.
    parameters, bounds, maxiter, starts
        As for ``control.minimize``.

    Returns
    -------
    Fit
        With ``x`` of shape (p,), all parameters one after another.

    Raises
    ------
    InputError
        For what is no likelihood, and as ``control.minimize``.

    Warns
    -----
    ToleranceWarning
        Where no resolution met the tolerance at the parameters found.

    Examples
    --------
    >>> import torch
    >>> from kolmo.likelihood import FirstPassage, Trials
    >>> v = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    >>> times = np.array([0.4, 0.7, 1.1, 0.5])
    >>> found = fit(FirstPassage(lambda t, x, c: v, upper=1.0).likelihood(Trials(times, [1, 1, 1, 1])), v)
    >>> found.x.round(4), (len(times) / times.sum()).round(4)  # distance over the mean time
    (array([1.4815]), np.float64(1.4815))
    >>> found.uncertainty().standard_errors.round(4), (times.sum() ** -0.5).round(4)
    (array([0.6086]), np.float64(0.6086))
    """
    if not isinstance(likelihood, Likelihood):
        raise InputError(
            "likelihood", f"a {type(likelihood).__name__}", "a likelihood", "control.minimize takes others"
        )
    result = minimize(lambda: -likelihood(), parameters, bounds=bounds, maxiter=maxiter, starts=starts)
    for _ in range(ROUNDS):
        if likelihood.holds():
            break
        likelihood.renew()
        result = minimize(lambda: -likelihood(), parameters, bounds=bounds, maxiter=maxiter)
    else:
        warnings.warn("the tolerance is not met at the parameters found", ToleranceWarning, stacklevel=2)
    return Fit(np.asarray(result.x), -float(result.fun), likelihood.error_estimate, likelihood.count, result)
