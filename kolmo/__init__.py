"""kolmo: backward Kolmogorov equations, their control, and the noisy residual networks they describe.

The rooms `control`, `likelihood`, `bridge`, `landscape`, `fipy`, `catalog` and `testing` are loaded when they are first
asked for.
"""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

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
from kolmo.many import Solutions, solve_many
from kolmo.montecarlo import Certificate, certify, monte_carlo
from kolmo.problem import SDE, Absorbing, Box, KolmogorovProblem, Payment, Robin
from kolmo.refine.plan import plan
from kolmo.schemes.generator import Generator, discretize
from kolmo.solution import Solution, load
from kolmo.solve import solve
from kolmo.spectrum import Spectrum, spectrum

if _TYPE_CHECKING:
    from kolmo import bridge as bridge
    from kolmo import catalog as catalog
    from kolmo import control as control
    from kolmo import fipy as fipy
    from kolmo import landscape as landscape
    from kolmo import likelihood as likelihood
    from kolmo import testing as testing

__version__ = "0.2.0"

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
    "Payment",
    "Robin",
    "Solution",
    "Solutions",
    "Spectrum",
    "ToleranceWarning",
    "certify",
    "discretize",
    "load",
    "monte_carlo",
    "plan",
    "solve",
    "solve_forward",
    "solve_many",
    "spectrum",
    "stationary_density",
]

_ROOMS = ("bridge", "catalog", "control", "fipy", "landscape", "likelihood", "testing")


def __getattr__(name: str) -> _Any:
    if name in _ROOMS:
        return _import_module(f"kolmo.{name}")
    raise AttributeError(f"module 'kolmo' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_ROOMS, "__version__"])
