"""How well fitted parameters are known: covariance and intervals from the curvature of the objective at its minimum."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy import optimize
from scipy.stats import chi2, norm

from kolmo.arrays import at_home
from kolmo.control.descent import Fitted, Loop, Stopped
from kolmo.control.plans import keeping_plans
from kolmo.errors import InputError, KolmoError, NotConvergedError
from kolmo.shown import Shown

KINDS = ("likelihood", "squares")
# Step of differences of gradients where exact products are not to be had, relative to 1 + |parameter|.
STEP = 1e-4
# Exact products are believed where they differ from differences by no more than this part of their size.
AGREE = 1e-3
# The ends of a profile interval are looked for within so many standard errors, to this part of one.
FARTHEST, CLOSE = 30.0, 1e-3
# Where the objective is not finite it counts as so many times the rise that is looked for.
OUTSIDE = 100.0


@dataclass(frozen=True, eq=False)
class Uncertainty(Shown):
    r"""Covariance C of fitted parameters, and intervals :math:`\hat\theta_k \pm z\,\sqrt{C_{kk}}`.

    Attributes
    ----------
    names : list of str
        One per component of the flat vector of parameters.
    x : ndarray, shape (p,)
        The estimates.
    covariance : ndarray, shape (p, p)
        Their covariance; zero for components that lie at a bound, which count as known.
    standard_errors : ndarray, shape (p,)
        Square roots of its diagonal.
    hessian : ndarray, shape (p, p)
        Second derivatives of the objective.
    intervals : ndarray, shape (p, 2)
        x ± z standard errors.
    profile : ndarray, shape (p, 2), or None
        Ends of the profile intervals; infinite where the objective does not rise far enough.
    level : float
        Their probability.

    Examples
    --------
    >>> Uncertainty(["speed"], np.array([1.0]), np.array([[0.04]]), np.array([[25.0]]), 0.95)
    Uncertainty(normal intervals of 95%)
      speed: 1 ± 0.2  [0.608007, 1.39199]
    """

    names: list[str]
    x: np.ndarray
    covariance: np.ndarray
    hessian: np.ndarray
    level: float
    profile: np.ndarray | None = None
    standard_errors: np.ndarray = field(init=False)
    intervals: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        errors = np.sqrt(np.diag(self.covariance))
        z = float(norm.ppf(0.5 + 0.5 * self.level))
        object.__setattr__(self, "standard_errors", errors)
        object.__setattr__(self, "intervals", np.stack([self.x - z * errors, self.x + z * errors], -1))

    @property
    def correlation(self) -> np.ndarray:
        """Correlations, shape (p, p)."""
        errors = np.where(self.standard_errors > 0, self.standard_errors, 1.0)
        return np.asarray(self.covariance / errors[:, None] / errors)

    def __repr__(self) -> str:
        ends = self.intervals if self.profile is None else self.profile
        lines = [
            f"  {name}: {x:.6g} ± {error:.2g}  [{low:.6g}, {high:.6g}]"
            for name, x, error, (low, high) in zip(self.names, self.x, self.standard_errors, ends, strict=True)
        ]
        kind = "profile" if self.profile is not None else "normal"
        return "\n".join([f"Uncertainty({kind} intervals of {self.level:.0%})", *lines])


@at_home
def uncertainty(
    fit: optimize.OptimizeResult,
    *,
    kind: str = "likelihood",
    observations: int | None = None,
    scale: float = 1.0,
    level: float = 0.95,
    profile: bool = False,
) -> Uncertainty:
    r"""Covariance of fitted parameters from the Hessian of the objective, and profile intervals.

    .. math::
        J = -\log L:\ \operatorname{Cov}\hat\theta \approx (\nabla^2 J)^{-1}, \qquad
        J = \sum r_i^2:\ \operatorname{Cov}\hat\theta \approx 2s^2(\nabla^2 J)^{-1},\quad s^2 = \frac{J}{n - p}

    The Hessian is exact where the objective allows (see ``hessian_product``), else made of differences of gradients. A
    profile interval holds the values of a component at which the objective, minimised over all others, is above its
    minimum by no more than half the quantile of χ² with one degree of freedom (of squares: s² times the quantile).

    Parameters
    ----------
    fit : OptimizeResult
        What ``control.minimize`` returned; the parameters are back at the estimates afterwards.
    kind : {"likelihood", "squares"}
        Whether the objective is the negative logarithm of a likelihood (up to a constant) or a sum of squared
        residuals of equal variance.
    observations : int
        n, for squares.
    scale : float, default 1
        What the objective was multiplied with: 1/n for a mean over n observations.
    level : float, default 0.95
        Probability of the intervals.
    profile : bool, default False
        Whether to find profile intervals: some more minimisations for each component.

    Returns
    -------
    Uncertainty
        Arrays of shape (p,), (p, p) and (p, 2), with p the number of components of the parameters.

    Raises
    ------
    InputError
        For a fit that is not from ``minimize``, too few observations, or a level outside (0, 1).
    NotConvergedError
        If the Hessian is not positive definite: no minimum, or parameters that the data do not tell apart.

    Notes
    -----
    Wilks 1938; profile likelihood: Venzon and Moolgavkar 1988; Seber and Wild 1989, chapter 5.

    Examples
    --------
    The mean of four numbers with variance one:

    >>> import torch
    >>> from kolmo import control
    >>> y, m = torch.tensor([0.1, 0.5, 0.2, 0.8]), torch.tensor(0.0, dtype=torch.float64, requires_grad=True)
    >>> fit = control.minimize(lambda: 0.5 * ((y - m) ** 2).sum(), m)
    >>> control.uncertainty(fit).standard_errors.round(6)
    array([0.5])
    """
    fitted = fit.get("fitted")
    if not isinstance(fitted, Fitted):
        raise InputError("fit", type(fit).__name__, "what control.minimize returned")
    if kind not in KINDS:
        raise InputError("kind", repr(kind), "'likelihood' or 'squares'")
    if not 0.0 < level < 1.0:
        raise InputError("level", level, "a number between 0 and 1")
    if not (np.isfinite(scale) and scale > 0):
        raise InputError("scale", scale, "a positive number")
    x = np.asarray(fit.x, dtype=float)
    free = (x > fitted.low) & (x < fitted.high)
    count = int(free.sum())
    if kind == "squares" and (observations is None or observations <= count):
        raise InputError("observations", observations, f"more than the {count} parameters that are free")
    # the objective is a times the negative logarithm of a likelihood, up to a constant
    a = scale if observations is None or kind == "likelihood" else 2.0 * float(fit.fun) / (observations - count)
    with keeping_plans() as plans:
        loop = Loop(fitted, plans)
        try:
            loop.evaluate(x)
            hessian = _hessian(loop, x, np.minimum(x - fitted.low, fitted.high - x))
            covariance = np.zeros((len(x), len(x)))
            covariance[np.ix_(free, free)] = _inverse(hessian[np.ix_(free, free)], fitted.components(free)) * a
            ends = None
            if profile:
                errors = np.sqrt(np.diag(covariance))
                rise = 0.5 * a * float(chi2.ppf(level, 1))
                ends = np.array([_profile(loop, x, k, covariance, errors, rise) for k in range(len(x))])
        finally:
            loop.put(x)
    return Uncertainty(fitted.components(), x, covariance, hessian, level, ends)


def _hessian(loop: Any, x: np.ndarray, room: np.ndarray) -> np.ndarray:
    """Second derivatives of the objective, symmetrised: exact products, if differences of gradients bear them out.

    Differences stay within the bounds, which are ``room`` away: beyond them there may be no objective. At a bound there
    are none, and what is not exact is zero.
    """
    steps = np.minimum(STEP * (1.0 + np.abs(x)), np.maximum(room, 0.0))

    def difference(v: np.ndarray) -> np.ndarray:
        return np.asarray(0.5 * (loop.evaluate(x + v)[1] - loop.evaluate(x - v)[1]))

    eye, mixed = np.eye(len(x)), steps * np.random.default_rng(0).choice([-1.0, 1.0], len(x))
    about = difference(mixed)
    try:
        H = np.stack([loop.hessian_product(x, v) for v in eye], -1)
        exact = bool((np.abs(H @ mixed - about) <= AGREE * np.abs(H) @ steps + 1e-300).all() and H.any())
    except (KolmoError, RuntimeError):
        exact = False
    if not exact:  # some functions can be differentiated once only
        columns = [difference(h * v) / h if h > 0 else 0.0 * v for h, v in zip(steps, eye, strict=True)]
        H = np.stack(columns, -1)
    return np.asarray(0.5 * (H + H.T))


def _inverse(H: np.ndarray, names: list[str]) -> np.ndarray:
    """Inverse of a positive definite matrix, in units in which its diagonal is one."""
    size = np.sqrt(np.abs(np.diag(H)))
    size = np.where(size > 0, size, 1.0)
    values, vectors = np.linalg.eigh(H / size[:, None] / size)
    if len(values) and values[0] <= 1e-10:
        worst = vectors[:, 0]
        least = [name for name, w in zip(names, worst, strict=True) if abs(w) > 0.3]
        raise NotConvergedError(
            f"the Hessian is not positive definite along {', '.join(least)}: no minimum was reached, or the data do "
            "not tell these parameters apart. Fix: minimise further, fix some of them, or add data"
        )
    return np.asarray((vectors / values) @ vectors.T / size[:, None] / size)


def _profile(
    loop: Any, x: np.ndarray, k: int, covariance: np.ndarray, errors: np.ndarray, rise: float
) -> tuple[float, float]:
    """Where the objective, minimised over the other components, is ``rise`` above its minimum."""
    if errors[k] == 0.0:
        return float(x[k]), float(x[k])
    least = loop.evaluate(x)[0]
    others = np.flatnonzero((np.arange(len(x)) != k) & (errors > 0))
    slope = covariance[others, k] / covariance[k, k]

    def above(value: float) -> float:
        try:
            return float(reached(value) - least - rise)
        except Stopped:  # outside the domain of the objective
            return OUTSIDE * rise

    def reached(value: float) -> float:
        point = x.copy()
        point[k] = value
        if len(others):
            start = np.clip(x[others] + slope * (value - x[k]), loop.low[others], loop.high[others])
            point[others] = start

            def reduced(rest: np.ndarray) -> tuple[float, np.ndarray]:
                point[others] = rest
                J, gradient = loop.evaluate(point.copy())
                return float(J), np.asarray(gradient[others])

            box = list(zip(loop.low[others], loop.high[others], strict=True))
            return float(optimize.minimize(reduced, start, jac=True, method="L-BFGS-B", bounds=box).fun)
        return float(loop.evaluate(point)[0])

    ends = []
    for side in (-1.0, 1.0):
        bound = (loop.low, loop.high)[int(side > 0)][k]
        inner, reach = float(x[k]), 2.5
        end = side * np.inf
        while reach <= FARTHEST:
            outer = float(np.clip(x[k] + side * reach * errors[k], loop.low[k], loop.high[k]))
            if above(outer) > 0.0:
                end = optimize.brentq(above, inner, outer, xtol=CLOSE * errors[k])
                break
            if outer == bound:
                end = outer
                break
            inner, reach = outer, 2.0 * reach
        ends.append(float(end))
    return ends[0], ends[1]
