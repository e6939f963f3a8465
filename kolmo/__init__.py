"""kolmo: backward Kolmogorov equations, their control, and the noisy residual networks they describe."""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Public names and the modules they live in; loaded at first use, so that ``import kolmo`` stays light.
_HOMES = {
    "SDE": "kolmo.sde",
    "Box": "kolmo.box",
    "Absorbing": "kolmo.box",
    "Robin": "kolmo.box",
    "KolmogorovProblem": "kolmo.problem",
    "Grid": "kolmo.grid",
    "plan": "kolmo.plan",
    "Discretization": "kolmo.discretization",
    "discretize": "kolmo.discretization",
    "solve": "kolmo.solve",
    "solve_forward": "kolmo.forward",
    "Solution": "kolmo.solution",
    "load": "kolmo.solution",
    "monte_carlo": "kolmo.montecarlo",
    "InputError": "kolmo.errors",
    "KolmoError": "kolmo.errors",
    "NotConvergedError": "kolmo.errors",
    "ToleranceWarning": "kolmo.errors",
}
