"""Equations in small TOML files: read, checked with errors that name line and key, and turned into problems.

A file has these tables; only ``[equation]`` and ``[solve]`` are always needed::

    [parameters]                      # numbers with names, for the formulas below
    kappa = 1.0

    [equation]                        # formulas of t, x[0].., and the parameters; see kolmo.equations.expressions
    drift = "-kappa * x[0]"           # several dimensions: a list with one formula each
    diffusion = 0.5                   # one, a list of d (diagonal), or d lists of m; or covariance = ...
    terminal = "maximum(x[0], 0)"     # a list: several problems solved together
    horizon = 1.0                     # without terminal and horizon: stationary
    killing = 0.0
    source = "0"

    [box]                             # left out: all of R^d
    lower = [-inf]
    upper = [2.0]                     # or a formula of t and the parameters: a face that moves, upper = ["2 - t"]
    boundary = [["open", { absorbing = "exp(-t)" }]]    # per axis: a word, or low and high; { kappa = .., value = .. }

    [events]
    times = [0.25, 0.5]
    pay = "0.1"                       # what is paid then, and where the state is moved: formulas of t, x[0].. and the
    move = "0.95 * x[0]"              # parameters; in several dimensions a list with one formula each

    [solve]
    at = [0.0, 0.5]                   # points where the answer is wanted; in d dimensions lists of d
    rtol = 1e-4
    atol = 1e-6

``[controls]`` (``lower`` and ``upper``, ``values``, or ``unbounded = m``) makes a control problem of it: formulas of
``[equation]`` may then use a[0].., and ``running_cost``, ``obstacle`` and ``sense`` join them. ``[fit]`` names
``parameters`` to be fitted, with ``targets``, ``weights``, ``bounds`` and ``maxiter``.
"""

from kolmo.equations.equation import Equation, Fit, read

__all__ = ["Equation", "Fit", "read"]
