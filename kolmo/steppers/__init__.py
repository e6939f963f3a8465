"""Time: one step of u' + Q u + r = 0 backwards as a linear map, applied and applied transposed. One stepper a file."""

from kolmo.steppers.adi import ModifiedCraigSneyd as ModifiedCraigSneyd
from kolmo.steppers.base import STEPPERS as STEPPERS
from kolmo.steppers.base import Stepper as Stepper
from kolmo.steppers.exponential import Exponential as Exponential
from kolmo.steppers.radau import RadauIIA as RadauIIA
from kolmo.steppers.runge_kutta import RungeKutta4 as RungeKutta4
from kolmo.steppers.semi_lagrangian import SemiLagrangian as SemiLagrangian
