"""Control: exact discrete adjoints that fit drift and diffusion, and the dynamic-programming optimum beside them."""

from kolmo.control.arrivals import Arrival, arrival
from kolmo.control.checkpoints import GradientMemory
from kolmo.control.committors import Committor, committor
from kolmo.control.game import Game
from kolmo.control.hjb import solve_hjb
from kolmo.control.hopf_cole import HopfColeSolution, hopf_cole
from kolmo.control.law import Law, law, transition_density
from kolmo.control.many import values
from kolmo.control.minimize import hessian_product, minimize
from kolmo.control.optimum import ControlSolution
from kolmo.control.problem import ControlProblem
from kolmo.control.regimes import Switching, solve_switching
from kolmo.control.schroedinger import SchroedingerBridge, schroedinger_bridge
from kolmo.control.sets import BoxSet, Finite, Interval, Unbounded
from kolmo.control.successive import successive
from kolmo.control.targets import Target
from kolmo.control.uncertainty import Uncertainty, uncertainty
from kolmo.control.value import expected_value, gradient_memory, value

__all__ = [
    "expected_value",
    "gradient_memory",
    "GradientMemory",
    "hessian_product",
    "law",
    "Law",
    "transition_density",
    "minimize",
    "successive",
    "uncertainty",
    "Uncertainty",
    "value",
    "values",
    "ControlProblem",
    "ControlSolution",
    "solve_hjb",
    "HopfColeSolution",
    "hopf_cole",
    "SchroedingerBridge",
    "schroedinger_bridge",
    "BoxSet",
    "Finite",
    "Game",
    "Switching",
    "solve_switching",
    "committor",
    "Committor",
    "Target",
    "arrival",
    "Arrival",
    "Interval",
    "Unbounded",
]


def __dir__() -> list[str]:
    return sorted(__all__)
