"""What is asked: process, domain with its faces, events, equation; and where the process goes."""

from kolmo.problem.box import Box
from kolmo.problem.events import Payment
from kolmo.problem.faces import Absorbing, Robin
from kolmo.problem.problem import KolmogorovProblem
from kolmo.problem.sde import SDE

__all__ = ["SDE", "Absorbing", "Box", "KolmogorovProblem", "Payment", "Robin"]
