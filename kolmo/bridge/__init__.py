"""Noisy residual networks, their modified SDEs and their Kolmogorov equations."""

from kolmo.bridge.laws import (
    Additive,
    BranchDropout,
    CentredBernoulli,
    HiddenDropout,
    Multiplicative,
    NoiseLaw,
    ShakeShake,
    StochasticDepth,
    linear_decay,
)
from kolmo.bridge.loss import LossEstimate, expected_loss
from kolmo.bridge.resnet import MLPBranch, NoisyResNet
from kolmo.bridge.variables import Variable, variable

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
    "CentredBernoulli",
    "linear_decay",
    "Variable",
    "variable",
    "expected_loss",
    "LossEstimate",
]
