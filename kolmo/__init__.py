"""kolmo: backward Kolmogorov equations, their control, and the noisy residual networks they describe."""

from kolmo.box import Absorbing, Box, Robin
from kolmo.certificate import Certificate, certify
from kolmo.discretization import Discretization
from kolmo.errors import (
    InputError,
    KolmoError,
    KolmoWarning,
    MissingExtraError,
    NotConvergedError,
    ToleranceWarning,
)
from kolmo.forward import Density, solve_forward, stationary_density
from kolmo.grid import Grid
from kolmo.montecarlo import monte_carlo
from kolmo.problem import KolmogorovProblem
from kolmo.refine.plan import plan
from kolmo.schemes.generator import Generator, discretize
from kolmo.sde import SDE
from kolmo.solution import Solution, load
from kolmo.solve import solve
from kolmo.spectrum import Spectrum, spectrum

__version__ = "0.1.0"

__all__ = [
    "SDE",
    "Absorbing",
    "Box",
    "Certificate",
    "Density",
    "Discretization",
    "Generator",
    "Grid",
    "InputError",
    "KolmoError",
    "KolmoWarning",
    "KolmogorovProblem",
    "MissingExtraError",
    "NotConvergedError",
    "Robin",
    "Solution",
    "Spectrum",
    "ToleranceWarning",
    "certify",
    "discretize",
    "load",
    "monte_carlo",
    "plan",
    "solve",
    "solve_forward",
    "spectrum",
    "stationary_density",
]
