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

``model = "ou"``, ``"cir"``, ``"gbm"``, ``"ddm"`` or ``"lca"`` in ``[equation]`` stands for formulas
(``kolmo.equations.models``).

Parameters are estimated from a table of data, in CSV, where there is ``[data]`` (:class:`Observed`). Decisions::

    [data]                            # names of columns
    times = "rt"
    choices = "choice"                # 1 or upper, 0 or lower
    covariates = ["coherence"]        # columns that formulas of drift, noise and [decision] may use
    censored = "late"                 # 1 where there was no response up to the time

    [decision]                        # numbers, or formulas of parameters and covariates
    lower = "-bound"                  # one of the bounds may be left out
    upper = "bound"                   # a formula of t is a bound that moves
    start = 0.0                       # or two formulas, of the ends of an interval; so also delay
    delay = 0.3                       # or two formulas
    lapse = 0.01                      # probability of a guess, at any time until span
    span = 5.0

With two formulas of ``drift`` these are two accumulators that race: ``upper`` has two formulas, ``lower`` (floors,
which may be left out) and ``start`` one or two, and ``choices`` are 0 or 1. Sampled paths::

    [data]
    times = "t"
    states = ["x"]
    path = "animal"                   # column that tells paths apart, if there are several
    noise = "s"                       # seen with an error of this deviation; then also
    mean = [0.0]                      # mean and variance of the state when it is first seen, and
    variance = [1.0]
    observe = [[1.0, 0.0]]            # what is seen of the coordinates, if not they themselves

and in both::

    [fit]
    parameters = ["bound", "v"]       # left out: all; they start from the values in [parameters]
    bounds = { bound = [0.1, 5.0] }
    starts = 4                        # places to start from, the others drawn within the bounds
    profile = true                    # intervals by the profile likelihood
    tol = 1e-2                        # error that the log-likelihood may have
    maxiter = 200
"""

from kolmo.equations.equation import Equation, Fit, read
from kolmo.equations.observed import Estimation, Observed
from kolmo.equations.table import Sheet

__all__ = ["Equation", "Estimation", "Fit", "Observed", "Sheet", "read"]
