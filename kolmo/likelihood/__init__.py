"""Likelihood: from data to parameters of a process, to a tolerance on the logarithm, with exact gradients."""

from kolmo.likelihood.base import Likelihood, as_numpy
from kolmo.likelihood.compare import Comparison, compare, plot_choices
from kolmo.likelihood.counts import ExitLikelihood, exit_counts, survival_counts
from kolmo.likelihood.filtering import NoisyPathLikelihood, noisy_paths
from kolmo.likelihood.fit import Fit, fit
from kolmo.likelihood.histograms import HistogramLikelihood, MomentLikelihood, histogram, moments
from kolmo.likelihood.laws import Between
from kolmo.likelihood.passage import FirstPassage
from kolmo.likelihood.paths import PathLikelihood, paths
from kolmo.likelihood.race import Race
from kolmo.likelihood.race_likelihood import RaceLikelihood
from kolmo.likelihood.residuals import Residuals, residuals
from kolmo.likelihood.trials import Trials
from kolmo.likelihood.trials_likelihood import PassageLikelihood

__all__ = [
    "Between",
    "Comparison",
    "ExitLikelihood",
    "FirstPassage",
    "Fit",
    "HistogramLikelihood",
    "Likelihood",
    "MomentLikelihood",
    "NoisyPathLikelihood",
    "PassageLikelihood",
    "PathLikelihood",
    "Race",
    "RaceLikelihood",
    "Residuals",
    "Trials",
    "as_numpy",
    "compare",
    "exit_counts",
    "fit",
    "histogram",
    "moments",
    "noisy_paths",
    "paths",
    "plot_choices",
    "residuals",
    "survival_counts",
]


def __dir__() -> list[str]:
    return sorted(__all__)
