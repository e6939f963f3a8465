"""What all likelihoods share: a resolution found by a tolerance on the log-likelihood, and then kept."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from kolmo.arrays import at_home
from kolmo.control.descent import Fitted, flattened
from kolmo.control.minimize import collect
from kolmo.errors import InputError, NotConvergedError, ToleranceWarning
from kolmo.refine.estimate import Convergence
from kolmo.shown import Shown

# Growth of the resolution from level to level.
GROWTH = 1.5
# Sums over so many parts of the observations are compared besides the whole: errors may cancel in a sum.
PARTS = 8
# Smallest density that counts: below it there are no numbers.
LEAST = 1e-300
# Part of an error that is left from one level to the next, from which on it is one that finer levels share.
SHARED = 0.9
# Logarithms below the negative of this have no exponential.
HOPELESS = 690.0
# Part of a tolerance that a cut may take.
CUT_SHARE = 0.3
# A level that is off by more, as far as it knows itself, is no evidence.
NONSENSE = 1.0
# What moving a cut changes is not all that it does.
CUT_SAFETY = 2.0
# Times that a cut is moved.
CUT_TRIES = 6
ROUNDING = 1e-13


@dataclass(frozen=True)
class Level:
    """What one resolution says.

    Attributes
    ----------
    n : float
        The resolution.
    sums : ndarray, shape (1 + PARTS, 1)
        Log-likelihood, and its parts.
    known : float
        Error that finer levels share: of formulas that are used where densities are next to nothing.
    """

    n: float
    sums: np.ndarray
    known: float

    def distance(self, other: "Level") -> float:
        """Largest difference from another level."""
        return float(np.abs(self.sums - other.sums).max())


class Likelihood(Shown, ABC):
    r"""Logarithm of a likelihood as a function of torch parameters, to a tolerance.

    .. math:: \ell(\theta) = \sum_i \log p_\theta(y_i)

    ``likelihood()`` is a torch scalar with the exact gradient of the number returned. At the first call levels are
    compared until the error of ℓ is estimated to be below ``tol``; that resolution is kept, so that ℓ is a smooth
    function. ``renew`` looks again, at the parameters of the moment.

    Attributes
    ----------
    tol : float
        Error of ℓ, a tensor of shape (), that is asked for.
    resolution : float or None
        What was decided; None before the first call.
    error_estimate : float
        Of ℓ at the parameters at which the resolution was decided; infinite before.
    status : str
        "converged", "tolerance_not_met", or "unplanned" before the first call.
    message : str
        Why.

    Raises
    ------
    InputError
        For a tolerance that is not positive.

    Examples
    --------
    >>> from kolmo.likelihood import FirstPassage, Trials
    >>> found = FirstPassage(1.0, lower=-1.0, upper=1.0).likelihood(Trials([0.5, 0.9], [1, 0]), tol=1e-4)
    >>> found.status, found().item().__round__(3), found.status, found.error_estimate <= 1e-4
    ('unplanned', -2.933, 'converged', True)
    """

    first: float = 16.0
    most: float = 400.0
    order: float = 6.0
    fastest: float = 0.0
    # factor by which cuts are moved, and nodes added, and whether these are an even number
    wider: float = 1.0
    even: bool = True

    def __init__(self, tol: float) -> None:
        if not (np.isfinite(tol) and tol > 0):
            raise InputError("tol", tol, "a positive number: the error that the log-likelihood may have")
        self.tol = float(tol)
        self.resolution: float | None = None
        self.error_estimate = np.inf
        self.status, self.message = "unplanned", "no resolution was looked for yet"
        # how far out the cuts are, and what was made for them: moved, it is made anew
        self._width = 1.0
        self._space: Any = None

    # ------------------------------------------------------------------------------------------- for users
    @at_home
    def __call__(self) -> torch.Tensor:
        """ℓ, a torch scalar.

        Raises
        ------
        NotConvergedError
            Where an observation has no finite value.
        """
        return self.terms().sum()

    @at_home
    def terms(self) -> torch.Tensor:
        """Logarithms of what every observation adds, shape (N,).

        Raises
        ------
        NotConvergedError
            Where an observation has no finite value.
        """
        if self.resolution is None:
            self.renew()
        assert self.resolution is not None
        return self._terms(self.resolution)[0]

    def renew(self) -> float:
        """Decide on a resolution at the present parameters, and return the estimated error of ℓ.

        Raises
        ------
        NotConvergedError
            Where there is no finite value.

        Warns
        -----
        ToleranceWarning
            Where the tolerance is not met; the finest level is kept.
        """
        for _ in range(CUT_TRIES):
            levels, error = self._levels()
            cut = CUT_SAFETY * self._cut(levels[-1])
            if cut <= CUT_SHARE * self.tol:
                break
            self._widen()
        self._decide(levels, error + cut)
        if self.status == "tolerance_not_met":
            warnings.warn(f"{self.message}: ± {self.error_estimate:.1e} for {self.tol:.1e}", ToleranceWarning, 2)
        return self.error_estimate

    def holds(self) -> bool:
        """Whether the resolution that is kept meets the tolerance at the present parameters too.

        Raises
        ------
        NotConvergedError
            Where an observation has no finite value.
        """
        if self.resolution is None:
            return False
        levels, error = self._levels()
        kept = self._level(self.resolution)
        return kept.distance(levels[-1]) + kept.known + error + CUT_SAFETY * self._cut(levels[-1]) <= 2.0 * self.tol

    def __repr__(self) -> str:
        told = f"± {self.error_estimate:.1e}, " if self.resolution is not None else ""
        return f"{type(self).__name__}({self.count} observations, {told}{self.status})"

    # ------------------------------------------------------------------------------------------- for kinds
    @property
    @abstractmethod
    def count(self) -> int:
        """Number of observations."""

    @abstractmethod
    def _terms(self, n: float) -> tuple[torch.Tensor, float]:
        """Logarithms at a resolution, shape (N,), and an error that finer levels share."""

    @property
    def _closed(self) -> bool:
        """Whether the state space has no cuts."""
        return True

    def _cut(self, level: Level) -> float:
        """Effect of cuts of an unbounded state space on ℓ, zero where there are none."""
        if self._closed:
            return 0.0
        kept = self._width, self._space
        self._widen()
        nodes = self.wider * level.n
        other = self._level(2 * round(0.5 * nodes) if self.even else round(nodes))
        self._width, self._space = kept
        return other.distance(level)

    def _widen(self) -> None:
        """Move the cuts outwards."""
        self._width, self._space = self.wider * self._width, None

    # ------------------------------------------------------------------------------------------- levels
    def _level(self, n: float) -> Level:
        with torch.no_grad():
            found, known = self._terms(n)
        terms = found.numpy()
        if not np.isfinite(terms).all():
            raise NotConvergedError(f"observation {int(np.argmin(np.isfinite(terms)))} has no finite log-likelihood")
        parts = [terms[k::PARTS].sum() for k in range(PARTS)]
        return Level(n, np.array([terms.sum(), *parts])[:, None], known)

    def _levels(self) -> tuple[list[Level], float]:
        """Levels until the last of them meets the tolerance, and its error."""
        policy, n, levels = Convergence(self.order, fastest=self.fastest), self.first, list[Level]()
        knowns: list[float] = []
        while True:
            if levels and levels[-1].known > NONSENSE:
                levels.clear()
            levels.append(self._level(n))
            rounding = ROUNDING * np.abs(levels[-1].sums).max()
            verdict = policy.judge([v.n for v in levels], [v.sums for v in levels], rounding=rounding)
            # levels that all say zero are what the data ask for: of no observations, the logarithm is zero
            error = 0.0 if verdict.silent.all() and len(levels) > 2 else float(verdict.estimate.max())
            error += levels[-1].known
            # what is not confirmed has the estimate that no accident makes small; that of three levels is not enough
            shown = len(levels) >= (3 if verdict.confirmed or verdict.silent.all() else 4)
            enough, left = (1.0 - CUT_SHARE) * self.tol, error - levels[-1].known
            met = shown and error <= enough
            knowns.append(levels[-1].known)
            # a density that is lost among the errors of a grid comes out on a finer one
            nonsense = len(knowns) > 2 and min(knowns[-3:]) > NONSENSE and max(knowns[-3:]) < HOPELESS
            # finer levels would have the same error
            stuck = ((shown and left <= enough) or nonsense) and knowns[-1] >= SHARED * knowns[-2]
            grown = self._next(n)
            if met or stuck or grown > self.most:
                return levels, error
            n = grown

    def _next(self, n: float) -> float:
        return float(2 * round(0.5 * GROWTH * n))

    def _decide(self, levels: list[Level], error: float) -> None:
        """Keep the level after the coarsest one within the tolerance: other parameters may ask for more."""
        last = levels[-1]
        errors = [v.distance(last) + max(v.known - last.known, 0.0) + error for v in levels]
        allowed = self.tol + (last.known if errors[-1] > self.tol else 0.0)  # what they share no resolution mends
        k = next((k + 1 for k, found in enumerate(errors[:-1]) if found <= allowed), -1)
        self.resolution, self.error_estimate = levels[k].n, errors[k]
        met = self.error_estimate <= self.tol
        self.status = "converged" if met else "tolerance_not_met"
        shared = last.known > (1.0 - CUT_SHARE) * self.tol
        why = (
            "most of the error is one that finer levels share" if shared else f"stopped at the finest level, {last.n:g}"
        )
        self.message = "the estimate meets the tolerance" if met else why


def log_of(density: torch.Tensor) -> torch.Tensor:
    """Logarithm; densities below 1e-300 count as that."""
    return torch.log(density.clamp(min=LEAST))


def as_numpy(
    objective: Callable[[], torch.Tensor], parameters: Any
) -> tuple[Callable[[Any], tuple[float, np.ndarray]], np.ndarray]:
    r"""A torch scalar of torch parameters as a NumPy function x ↦ (value, gradient), and the present parameters.

    .. math:: x \mapsto \big(J(x),\ \nabla J(x)\big)

    For SciPy's optimisers (``jac=True``), samplers, and others that know nothing of torch.

    Parameters
    ----------
    objective : callable
        ``objective()`` -> torch scalar: a likelihood, or a function of some.
    parameters : tensor, nn.Module, or iterable of these
        As for ``control.minimize``; x holds them one after another, and calls write it into them.

    Returns
    -------
    function : callable
        ``function(x)`` -> (float, ndarray of shape (p,)).
    x : ndarray, shape (p,)
        The present parameters.

    Raises
    ------
    InputError
        For parameters that are no leaf tensors, and x of another size.

    Examples
    --------
    >>> theta = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    >>> function, x = as_numpy(lambda: (theta**2).sum(), theta)
    >>> function(x + 1.0)
    (13.0, array([4., 6.]))
    """
    names, tensors = collect(parameters)
    now = flattened(tensors)
    free = np.full(len(now), np.inf)
    fitted = Fitted(objective, names, tensors, -free, free)

    def function(x: Any) -> tuple[float, np.ndarray]:
        flat = np.array(x, dtype=float).reshape(-1)
        if len(flat) != len(now):
            raise InputError("x", f"{len(flat)} numbers", f"{len(now)}, all parameters one after another")
        fitted.put(flat)
        value = objective()
        return float(value.detach()), flattened(torch.autograd.grad(value.reshape(()), tensors))

    return function, now
