r"""Does a fitted model explain the data? Residuals by the probability integral transform.

With F the distribution function of an observation given those before it, :math:`u_k = F(y_k \mid y_1..y_{k-1})` are
independent and uniform where the model is right (Rosenblatt 1952); :math:`\Phi^{-1}(u_k)` are standard normal.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy import stats

from kolmo.arrays import at_home
from kolmo.errors import InputError
from kolmo.likelihood.base import Likelihood
from kolmo.likelihood.filtering import NoisyPathLikelihood
from kolmo.likelihood.paths import PathLikelihood
from kolmo.likelihood.trials import Trials
from kolmo.likelihood.trials_likelihood import PassageLikelihood
from kolmo.shown import Shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Uniform residuals are kept this far from 0 and 1, so that normal ones are finite.
INSIDE = 1e-15
# Error that the logarithms of all distribution functions together may have.
TOL = 1e-2
# Quantile of the Kolmogorov distribution at 95 %, for the band of the plot.
BAND = float(stats.kstwobign.ppf(0.95))


@dataclass(frozen=True, eq=False)
class Residuals(Shown):
    r"""Residuals :math:`u_k = P(Y_k \le y_k \mid y_1, \dots, y_{k-1})` of a model: uniform, independent if right.

    Attributes
    ----------
    uniform : ndarray, shape (N, q)
        One row for each observation, NaN for what was not observed.
    names : tuple of str
        What the q columns are.

    References
    ----------
    Cox and Snell 1968; Dunn and Smyth 1996.

    Examples
    --------
    >>> found = Residuals(np.linspace(0.005, 0.995, 100)[:, None], ("steps",))
    >>> found
    Residuals(100 observations; steps: Kolmogorov–Smirnov 0.005, p = 1)
    """

    uniform: np.ndarray
    names: tuple[str, ...]

    @property
    def normal(self) -> np.ndarray:
        """The same as standard normal numbers, shape (N, q)."""
        return np.asarray(stats.norm.ppf(self.uniform))

    def check(self) -> dict[str, tuple[float, float]]:
        """Kolmogorov–Smirnov statistic and p-value of every column: whether it is uniform.

        Of parameters fitted to the same data p is too large; what is small still speaks against the model.
        """
        columns = zip(self.names, self.uniform.T, strict=True)
        tests = {name: stats.kstest(u[np.isfinite(u)], "uniform") for name, u in columns}
        return {name: (float(test.statistic), float(test.pvalue)) for name, test in tests.items()}

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Empirical distribution of the residuals less the uniform one, within the band of 95 % at every level."""
        from matplotlib import pyplot as plt

        ax = plt.subplots(layout="constrained")[1] if ax is None else ax
        widest = 0.0
        for name, column in zip(self.names, self.uniform.T, strict=True):
            u = np.sort(column[np.isfinite(column)])
            n = len(u)
            ax.step(np.r_[0.0, u, 1.0], np.r_[0.0, np.arange(1, n + 1) / n - u, 0.0], where="post", label=name)
            widest = max(widest, BAND / np.sqrt(n))
        ax.axhspan(-widest, widest, color="0.88", zorder=0, label="95 % band")
        ax.axhline(0.0, color="0.5", lw=0.8)
        high = max(1.5 * widest, *np.abs(ax.get_ylim()))
        ax.set(xlabel="uniform residual", ylabel="distribution less uniform", xlim=(0.0, 1.0), ylim=(-high, high))
        ax.legend(frameon=False)
        return ax

    def __repr__(self) -> str:
        told = [f"{name}: Kolmogorov–Smirnov {d:.3g}, p = {p:.2g}" for name, (d, p) in self.check().items()]
        return f"Residuals({len(self.uniform)} observations; {'; '.join(told)})"


@at_home
def residuals(likelihood: Likelihood, *, rng: Any = None) -> Residuals:
    r"""Residuals of data under a fitted model, by the probability integral transform.

    .. math:: u_k = P(Y_k \le y_k \mid y_1, \dots, y_{k-1})

    Parameters
    ----------
    likelihood : Likelihood
        Of first passages, of sampled paths (linear, or in one dimension), or of paths seen through noise; at the
        parameters of the moment.
    rng : int or numpy.random.Generator, optional
        Choices are discrete, and of censored trials it is known only that they would have come later: they are drawn
        evenly from what is left open (Cox and Snell 1968; Dunn and Smyth 1996).

    Returns
    -------
    Residuals
        Numbers of shape (N, q).
        Of first passages two columns: the response time, and the choice given the time. Of paths one for each
        coordinate given those before it.

    Raises
    ------
    InputError
        For likelihoods of other kinds, and paths beyond one dimension that are not linear.

    Examples
    --------
    A Brownian motion with drift one is no Brownian motion:

    >>> from kolmo.problem.sde import SDE
    >>> from kolmo.likelihood import paths
    >>> t = np.linspace(0.0, 50.0, 101)
    >>> x = t + np.append(0.0, np.cumsum(np.sqrt(0.5) * np.random.default_rng(0).standard_normal(100)))
    >>> residuals(paths(SDE(1.0, 1.0, dim=1), t, x)).check()["coordinate 1"][1] > 0.05
    True
    >>> residuals(paths(SDE(0.0, 1.0, dim=1), t, x)).check()["coordinate 1"][1] > 0.05
    False
    """
    draws = np.random.default_rng(rng)
    with torch.no_grad():
        if isinstance(likelihood, PassageLikelihood):
            return _of_trials(likelihood, draws)
        if isinstance(likelihood, PathLikelihood | NoisyPathLikelihood):
            found = likelihood.transformed().numpy()
            what = "coordinate" if isinstance(likelihood, PathLikelihood) else "observation"
            return Residuals(_inside(found), tuple(f"{what} {k + 1}" for k in range(found.shape[1])))
    raise InputError("likelihood", f"a {type(likelihood).__name__}", "one of first passages or of paths")


def _inside(u: np.ndarray) -> np.ndarray:
    return np.asarray(np.clip(u, INSIDE, 1.0 - INSIDE))


def _of_trials(likelihood: PassageLikelihood, draws: np.random.Generator) -> Residuals:
    """Response times, and choices given the time."""
    model, trials = likelihood.model, likelihood.trials
    timed = ~np.isnan(trials.times)
    mine = trials[timed]
    nobody = np.full(len(mine), np.nan)

    def logs(choices: np.ndarray, censored: bool) -> np.ndarray:
        given = Trials(mine.times, choices, mine.covariates, np.full(len(mine), censored))
        found: Likelihood = model.likelihood(given, tol=TOL)
        return np.asarray(found.terms())

    late = np.exp(logs(nobody, True))
    late = np.where(mine.censored, late * draws.uniform(size=len(mine)), late)
    times, choices = np.full(len(trials), np.nan), np.full(len(trials), np.nan)
    times[timed] = _inside(1.0 - late)
    if len(model.sides) == 1:
        return Residuals(times[:, None], ("time",))
    density = np.exp(np.stack([logs(np.full(len(mine), float(side)), False) for side in model.sides], -1))
    share = density / density.sum(1, keepdims=True)
    known = ~np.isnan(mine.choices) & ~mine.censored
    k = np.where(known, mine.choices, 0).astype(int)
    rows = np.arange(len(mine))
    below = np.cumsum(share, 1)[rows, k] - share[rows, k]
    choices[timed] = np.where(known, _inside(below + draws.uniform(size=len(mine)) * share[rows, k]), np.nan)
    return Residuals(np.stack([times, choices], -1), ("time", "choice"))
