"""Which model is best? AIC, BIC and held-out likelihoods side by side; observed and fitted densities in one picture."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from kolmo.arrays import at_home
from kolmo.errors import InputError
from kolmo.likelihood.base import Likelihood
from kolmo.likelihood.fit import Fit
from kolmo.likelihood.trials_likelihood import PassageLikelihood
from kolmo.shown import Shown

# Points on which a fitted density is drawn, and the error that the sum of their logarithms may have.
POINTS, TOL = 120, 0.1
COLOURS = ("#d55e00", "#0072b2", "#009e73")


@dataclass(frozen=True)
class Row:
    """What is known of one model; see :class:`Comparison`."""

    name: str
    parameters: int
    log_likelihood: float
    aic: float
    difference: float
    weight: float
    bic: float
    held_out: float | None = None
    held_out_error: float | None = None


@dataclass(frozen=True, repr=False)
class Comparison(Shown):
    r"""Models side by side, the best by :math:`\text{AIC} = 2p - 2\ell` first.

    Attributes
    ----------
    rows : tuple of Row
        ``name``, ``parameters``, ``log_likelihood``, ``aic``, ``difference`` from the best, ``weight`` (Akaike's),
        ``bic``; and ``held_out``, the log-likelihood of data that were held out, of which ``held_out_error`` is the
        standard error of the difference from the first row (of itself there), None without such data.

    References
    ----------
    K. P. Burnham and D. R. Anderson (2002), Model Selection and Multimodel Inference, section 2.9.

    Examples
    --------
    >>> print(Comparison((Row("drift", 2, -10.0, 24.0, 0.0, 0.88, 25.1), Row("none", 1, -13.0, 28.0, 4.0, 0.12, 28.5))))
    model  parameters  log-likelihood  AIC  difference  weight   BIC
    drift           2             -10   24           0    0.88  25.1
    none            1             -13   28           4    0.12  28.5
    """

    rows: tuple[Row, ...]

    @property
    def best(self) -> str:
        """Name of the model of least AIC."""
        return self.rows[0].name

    @property
    def header(self) -> list[str]:
        """Titles of the columns of ``table``."""
        titles = ["model", "parameters", "log-likelihood", "AIC", "difference", "weight", "BIC"]
        return titles + ["held out", "± of the difference"] * (self.rows[0].held_out is not None)

    @property
    def table(self) -> list[list[Any]]:
        """One row for each model."""
        return [[v for v in vars(row).values() if v is not None] for row in self.rows]

    def __str__(self) -> str:
        cells = [[v if isinstance(v, str) else f"{v:.6g}" for v in row] for row in self.table]
        widths = [max(len(line[k]) for line in [self.header, *cells]) for k in range(len(self.header))]
        lines = [[v.rjust(w) if k else v.ljust(w) for k, (v, w) in enumerate(zip(line, widths, strict=True))]
                 for line in [self.header, *cells]]  # fmt: skip
        return "\n".join("  ".join(line).rstrip() for line in lines)


@at_home
def compare(fits: Mapping[str, Fit], held_out: Mapping[str, Likelihood] | None = None) -> Comparison:
    r"""Compare models that were fitted to the same data.

    .. math:: \text{AIC} = 2p - 2\ell, \qquad w_j = \frac{e^{-\Delta_j/2}}{\sum_i e^{-\Delta_i/2}}

    Parameters
    ----------
    fits : mapping of str to Fit
        By name.
    held_out : mapping of str to Likelihood, optional
        Likelihoods of the same data that took no part in the fits, evaluated at the parameters of the moment.

    Returns
    -------
    Comparison

    Raises
    ------
    InputError
        For fits to different numbers of observations, and names that differ.

    Notes
    -----
    Weights: Burnham and Anderson 2002, section 2.9.

    Examples
    --------
    >>> from scipy.optimize import OptimizeResult
    >>> fits = {"one": Fit(np.ones(1), -13.0, 0.0, 20, OptimizeResult()),
    ...         "two": Fit(np.ones(2), -10.0, 0.0, 20, OptimizeResult())}
    >>> found = compare(fits)
    >>> found.best, found.rows[1].difference
    ('two', 4.0)
    """
    if not fits:
        raise InputError("fits", "none", "at least one fit")
    counts = {name: fit.count for name, fit in fits.items()}
    if len(set(counts.values())) > 1:
        raise InputError("fits", f"numbers of observations {counts}", "fits to the same data")
    if held_out is not None and held_out.keys() != fits.keys():
        raise InputError("held_out", list(held_out), f"likelihoods for {', '.join(fits)}")
    least = min(fit.aic for fit in fits.values())
    weights = {name: float(np.exp(-0.5 * (fit.aic - least))) for name, fit in fits.items()}
    order = sorted(fits, key=lambda name: fits[name].aic)
    outside = {} if held_out is None else {name: _terms(held_out[name]) for name in order}
    if len({len(terms) for terms in outside.values()}) > 1:
        raise InputError("held_out", {k: len(v) for k, v in outside.items()}, "likelihoods of the same data")
    rows = []
    for name in order:
        fit, more = fits[name], tuple[float, ...]()
        if outside:
            against = outside[name] - outside[order[0]] if name != order[0] else outside[name]
            more = (float(outside[name].sum()), float(np.sqrt(len(against) * against.var())))
        weight = weights[name] / sum(weights.values())
        rows.append(Row(name, len(fit.x), fit.log_likelihood, fit.aic, fit.aic - least, weight, fit.bic, *more))
    return Comparison(tuple(rows))


def _terms(likelihood: Likelihood) -> np.ndarray:
    with torch.no_grad():
        return np.asarray(likelihood.terms().numpy())


@at_home
def plot_choices(
    likelihood: PassageLikelihood, condition: Mapping[str, float] | None = None, *, bins: int = 25, ax: Any = None
) -> Any:
    """Draw observed response times as histograms and the fitted densities :math:`q_c(t)` over them.

    Of two choices, one is mirrored.

    Parameters
    ----------
    likelihood : PassageLikelihood
        Of trials under a model, at the parameters of the moment.
    condition : mapping, optional
        Covariates of the trials to be shown. None: all trials, with the densities of their conditions in proportion.
    bins : int, default 25
        Bins of the histograms.
    ax : Axes, optional
        Where to draw.

    Returns
    -------
    Axes

    Raises
    ------
    InputError
        For a condition that no trial has.

    Examples
    --------
    >>> from kolmo.likelihood import FirstPassage, Trials
    >>> found = FirstPassage(1.0, lower=-1.0, upper=1.0).likelihood(Trials([0.5, 0.9, 0.7], [1, 0, 1]))
    >>> plot_choices(found).get_xlabel()
    'response time'
    """
    from matplotlib import pyplot as plt

    model, trials = likelihood.model, likelihood.trials
    which = np.ones(len(trials), dtype=bool)
    for name, value in (condition or {}).items():
        if name not in trials.covariates:
            raise InputError("condition", name, f"one of {', '.join(trials.covariates) or 'none'}")
        which &= trials.covariates[name] == value
    timed = which & ~np.isnan(trials.times) & ~trials.censored
    if not timed.any():
        raise InputError("condition", dict(condition or {}), "one that trials with a time have")
    ax = plt.subplots(layout="constrained")[1] if ax is None else ax
    low, high = float(trials.times[timed].min()), float(trials.times[timed].max())
    edges, t = np.linspace(low, high, bins + 1), np.linspace(low, high, POINTS)
    shares = np.bincount(trials.group[which], minlength=len(trials.conditions)) / which.sum()
    for side in model.sides:
        sign = -1.0 if len(model.sides) == 2 and side == 0 else 1.0
        mine = timed & (trials.choices == side)
        heights = np.histogram(trials.times[mine], edges)[0] / which.sum() / np.diff(edges)
        ax.stairs(sign * heights, edges, fill=True, color=COLOURS[side], alpha=0.35)
        with torch.no_grad():
            fitted = sum(
                share * model.density(t, side, c, tol=TOL).numpy()
                for share, c in zip(shares, trials.conditions, strict=True)
                if share > 0
            )
        ax.plot(t, sign * fitted, color=COLOURS[side], label=f"choice {side}")
    ax.axhline(0.0, color="0.4", lw=0.8)
    ax.yaxis.set_major_formatter(lambda v, _: f"{abs(v):g}")
    ax.set(xlabel="response time", ylabel="density")
    ax.legend(frameon=False)
    return ax
