"""Fokker–Planck: how an initial law spreads, as the exact transpose of the steps that ``solve`` takes."""

from kolmo.forward.density import Density, initial_at_rest, initial_masses, quadrature, readings
from kolmo.forward.exits import Exit, WaysOut
from kolmo.forward.front import solve_forward
from kolmo.forward.invariant import stationary_density

__all__ = [
    "Density",
    "Exit",
    "WaysOut",
    "initial_at_rest",
    "initial_masses",
    "quadrature",
    "readings",
    "solve_forward",
    "stationary_density",
]
