"""Paths: values of problems sampled with their errors, and certificates of answers found otherwise."""

from kolmo.montecarlo.certificate import Certificate, certify
from kolmo.montecarlo.estimators import Estimate, monte_carlo
from kolmo.montecarlo.methods import METHODS

__all__ = ["METHODS", "Certificate", "Estimate", "certify", "monte_carlo"]
