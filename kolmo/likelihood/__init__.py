"""Likelihood: from data to parameters of a process, to a tolerance on the logarithm, with exact gradients."""

from kolmo.likelihood.base import Likelihood, as_numpy
from kolmo.likelihood.counts import (
    ExitLikelihood,
    HistogramLikelihood,
    MomentLikelihood,
    exit_counts,
    histogram,
    moments,
    survival_counts,
)
from kolmo.likelihood.filtering import NoisyPathLikelihood, noisy_paths
from kolmo.likelihood.fit import Fit, fit
from kolmo.likelihood.passage import Between, FirstPassage, PassageLikelihood
from kolmo.likelihood.paths import PathLikelihood, paths
from kolmo.likelihood.trials import Trials

__all__ = [
    "Between",
    "ExitLikelihood",
    "FirstPassage",
    "Fit",
    "HistogramLikelihood",
    "Likelihood",
    "MomentLikelihood",
    "NoisyPathLikelihood",
    "PassageLikelihood",
    "PathLikelihood",
    "Trials",
    "as_numpy",
    "exit_counts",
    "fit",
    "histogram",
    "moments",
    "noisy_paths",
    "paths",
    "survival_counts",
]
