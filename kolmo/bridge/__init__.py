"""Noisy residual networks, their modified SDEs and their Kolmogorov equations."""

from kolmo.bridge.branch_laws import (
    BranchDropout,
    CentredBernoulli,
    HiddenDropout,
    ShakeDrop,
    ShakeShake,
    StochasticDepth,
)
from kolmo.bridge.budget import Regulariser, Schedule, SiteEffects, schedule
from kolmo.bridge.classifier import FlowClassifier
from kolmo.bridge.diagnose import Diagnosis, diagnose
from kolmo.bridge.inject import Injection, inject
from kolmo.bridge.laws import Additive, LogNormal, Multiplicative, NoiseLaw, linear_decay
from kolmo.bridge.loss import LossEstimate, expected_loss
from kolmo.bridge.modified import modified_sde, roughness
from kolmo.bridge.noise import eject
from kolmo.bridge.regularisation import Regularisation, regularisation
from kolmo.bridge.resnet import MLPBranch, NoisyResNet
from kolmo.bridge.sites import Site, Sites, sites
from kolmo.bridge.variables import Variable, variable
from kolmo.bridge.weak_error import WeakErrorTable, weak_error
from kolmo.bridge.weights import WeightNoise

__all__ = [
    "MLPBranch",
    "NoisyResNet",
    "NoiseLaw",
    "Additive",
    "Multiplicative",
    "StochasticDepth",
    "BranchDropout",
    "HiddenDropout",
    "ShakeShake",
    "LogNormal",
    "ShakeDrop",
    "CentredBernoulli",
    "WeightNoise",
    "linear_decay",
    "Variable",
    "variable",
    "modified_sde",
    "roughness",
    "FlowClassifier",
    "inject",
    "Injection",
    "eject",
    "diagnose",
    "Diagnosis",
    "schedule",
    "Schedule",
    "SiteEffects",
    "Regulariser",
    "sites",
    "Site",
    "Sites",
    "weak_error",
    "WeakErrorTable",
    "expected_loss",
    "LossEstimate",
    "regularisation",
    "Regularisation",
]


def __dir__() -> list[str]:
    return sorted(__all__)
