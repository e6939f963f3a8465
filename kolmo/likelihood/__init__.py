"""Likelihood: from data to parameters of a process, to a tolerance on the logarithm, with exact gradients."""

from kolmo.likelihood.base import Likelihood, as_numpy
from kolmo.likelihood.passage import Between, FirstPassage, PassageLikelihood
from kolmo.likelihood.trials import Trials

__all__ = ["Between", "FirstPassage", "Likelihood", "PassageLikelihood", "Trials", "as_numpy"]
