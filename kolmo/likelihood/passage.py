"""First passages in one dimension: a model of drift, noise, bounds, start, delay and lapses, and its likelihood."""

from typing import Any

import numpy as np
import torch

from kolmo.arrays import as_numpy, at_home
from kolmo.errors import InputError
from kolmo.likelihood.course import at_once, bound_at, moves
from kolmo.likelihood.laws import Covariates, Given, a_number
from kolmo.likelihood.trials import Trials
from kolmo.likelihood.trials_likelihood import PassageLikelihood
from kolmo.problem.sde import SDE


class Decision:
    """A process that is observed when it reaches a bound: its functions under a condition."""

    drift: Any
    diffusion: Any
    killing: Any
    dim: int = 1

    def sde(self, c: Covariates) -> SDE:
        """The process under a condition."""
        return SDE(under(self.drift, c), under(self.diffusion, c), dim=self.dim, arrays="torch")

    def killed(self, x: torch.Tensor, c: Covariates, t: Any = 0.0) -> torch.Tensor | None:
        """Killing rate at points (..., d), shape (...)."""
        if self.killing is None:
            return None
        rate = under(self.killing, c)
        found = torch.as_tensor(rate(t, x) if callable(rate) else rate, dtype=torch.float64)
        return (found[..., 0] if found.ndim == x.ndim and found.shape[-1] == 1 else found).expand(x.shape[:-1])


class FirstPassage(Decision):
    r"""A process that starts between two bounds, or on one side of one, and is observed when it reaches one of them.

    .. math::
        dX = b(t, X)\,dt + \sigma(t, X)\,dW, \qquad X_0 \sim \text{start}, \qquad
        \text{response time} = \text{delay} + \inf\{t: X_t \notin (\text{lower}, \text{upper})\}

    and with probability ``lapse`` the response is a guess: either choice, at a time even between 0 and ``span``.

    Parameters
    ----------
    drift : number, tensor or callable
        ``drift(t, x, c)`` -> ``(..., 1)`` or ``(...)`` for points x of shape ``(..., 1)``, in torch; c holds the
        covariates of a condition by name. The time counts from the start of the process and is a tensor, of shape ()
        or, where that gives the same, one that broadcasts against x.
    diffusion : number, tensor or callable, default 1
        σ, likewise.
    lower, upper : number, tensor or callable, optional
        Bounds; ``lower(c)``, or ``lower(t, c)`` where one moves: t counts from the start of the process, and is a
        tensor, of shape (n,) where the function takes many times at once, else (). Bounds that meet end the problem.
        None: there is none. At least one.
    start : number, tensor, Between or callable, default 0
        Where it starts, or a law on an interval between the bounds; ``start(c)``.
    delay : number, tensor, Between or callable, default 0
        Non-decision time, or its law; ``delay(c)``.
    lapse : number, tensor or callable, default 0
        Probability of a guess; ``lapse(c)``.
    span : float, optional
        Longest time of a guess; None: the longest time in the data.
    killing : number, tensor or callable, optional
        Rate at which a trial ends without a response; ``killing(t, x, c)``.

    Raises
    ------
    InputError
        Without a bound.

    References
    ----------
    R. Ratcliff (1978), A theory of memory retrieval, Psychological Review 85.

    Examples
    --------
    A drift–diffusion model with two conditions, its likelihood and gradient:

    >>> v = torch.tensor([0.5, 1.5], dtype=torch.float64, requires_grad=True)
    >>> model = FirstPassage(lambda t, x, c: v[int(c["hard"] == 0)], lower=-1.0, upper=1.0, delay=0.3)
    >>> trials = Trials([0.8, 0.7, 1.1], [1, 1, 0], {"hard": [0, 0, 1]})
    >>> likelihood = model.likelihood(trials)
    >>> likelihood().item().__round__(4), likelihood.error_estimate < 1e-3
    (-1.517, True)
    >>> torch.autograd.grad(likelihood(), v)[0].round(decimals=4)
    tensor([-1.4000,  0.6500], dtype=torch.float64)

    Bounds that collapse:

    >>> low, high = (lambda t, c, s=s: s * torch.exp(-t) for s in (-1.0, 1.0))
    >>> collapsing = FirstPassage(lambda t, x, c: v[0], lower=low, upper=high, delay=0.3)
    >>> collapsing.likelihood(trials)().item().__round__(3)
    -1.665
    """

    def __init__(
        self,
        drift: Any,
        diffusion: Any = 1.0,
        *,
        lower: Given = None,
        upper: Given = None,
        start: Given = 0.0,
        delay: Given = 0.0,
        lapse: Given = 0.0,
        span: float | None = None,
        killing: Any = None,
    ) -> None:
        if lower is None and upper is None:
            raise InputError("lower, upper", "no bound", "at least one")
        self.drift, self.diffusion, self.killing = drift, diffusion, killing
        self.bounds: tuple[Given, Given] = (lower, upper)
        self.start, self.delay, self.lapse, self.span = start, delay, lapse, span

    @property
    def sides(self) -> tuple[int, ...]:
        """Choices that there are: 0 for the lower bound, 1 for the upper one."""
        return tuple(s for s in (0, 1) if self.bounds[s] is not None)

    @property
    def moves(self) -> bool:
        """Whether a bound moves."""
        return any(moves(bound) for bound in self.bounds)

    def places(self, side: int, times: Any, c: Covariates) -> torch.Tensor:
        """Where a bound is at times (n,) since the start, under a condition: a tensor (n,).

        Examples
        --------
        >>> FirstPassage(0.0, upper=lambda t, c: 1.0 - 0.5 * t).places(1, [0.0, 1.0], {})
        tensor([1.0000, 0.5000], dtype=torch.float64)
        """
        bound, name = self.bounds[side], ("lower", "upper")[side]
        t = torch.as_tensor(np.asarray(as_numpy(times), dtype=float).reshape(-1))
        if moves(bound):
            return bound_at(bound, t, c, name, at_once(bound, float(t.max()), c))
        return a_number(bound, c, name).expand(t.shape)

    def likelihood(self, trials: Trials, *, tol: float = 1e-3) -> "PassageLikelihood":
        r"""The likelihood of trials as a function of the parameters in the model.

        .. math:: \ell = \sum_i \log\Big((1 - \epsilon)\,q_{c_i}(t_i) + \frac{\epsilon}{K\,\text{span}}\Big)

        with q the density of the response time of a choice, K the number of choices and ε the probability of a lapse;
        where only the choice is known its probability, and of censored trials that of no response so far.

        Parameters
        ----------
        trials : Trials
            The data.
        tol : float, default 1e-3
            Error that ℓ may have.

        Returns
        -------
        PassageLikelihood

        Raises
        ------
        InputError
            For choices that the model has not, bounds that jump, or bad values.
        """
        return PassageLikelihood(self, trials, tol)

    @at_home
    def density(self, times: Any, choice: int = 1, covariates: Covariates | None = None, *, tol: float = 1e-4) -> Any:
        """Density of response time and choice at times (N,), a tensor (N,): guesses included.

        Parameters
        ----------
        times : array_like, shape (N,)
            Response times.
        choice : int, default 1
            0 for the lower bound, 1 for the upper one.
        covariates : mapping, optional
            The condition.
        tol : float, default 1e-4
            Error that the sum of the logarithms may have.

        Examples
        --------
        >>> model = FirstPassage(1.0, upper=1.0)
        >>> model.density([1.0]).round(decimals=6)  # (2π)^(−½), Schrödinger 1915
        tensor([0.3989], dtype=torch.float64)
        """
        return density_of(self, times, choice, covariates, tol)


def density_of(model: Any, times: Any, choice: int, covariates: Covariates | None, tol: float) -> torch.Tensor:
    """Density of response time and choice under a model at times (N,), from its likelihood."""
    t = np.asarray(as_numpy(times), dtype=float).reshape(-1)
    c = {name: np.full(len(t), v) for name, v in (covariates or {}).items()}
    return torch.exp(model.likelihood(Trials(t, np.full(len(t), float(choice)), c), tol=tol).terms())


def under(f: Any, c: Covariates) -> Any:
    """A function of (t, x, c) as one of (t, x); constants as they are."""
    if not callable(f):
        return f

    def of(t: Any, x: torch.Tensor) -> Any:
        time = torch.tensor(t, dtype=torch.float64) if isinstance(t, float | int) else t
        found = torch.as_tensor(f(time, x, c), dtype=torch.float64)
        return found.expand(x.shape[:-1]) if found.ndim == 0 else found

    return of
