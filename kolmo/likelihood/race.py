"""Races: two or three accumulators, and the first of them that reaches its bound."""

from collections.abc import Sequence
from typing import Any

import torch

from kolmo.arrays import as_numpy, at_home
from kolmo.errors import InputError
from kolmo.likelihood.course import moves
from kolmo.likelihood.laws import Covariates, Given, a_number
from kolmo.likelihood.passage import Decision, density_of
from kolmo.likelihood.race_likelihood import RaceLikelihood
from kolmo.likelihood.trials import Trials


class Race(Decision):
    r"""Two or three accumulators that race: the first to reach its bound is the choice, and ends the trial.

    .. math::
        dX = b(t, X)\,dt + \sigma(t, X)\,dW, \qquad X_0 = \text{start}, \qquad
        \text{response time} = \text{delay} + \min_k \inf\{t: X^k_t \ge \text{upper}_k\}

    and with probability ``lapse`` the response is a guess: any choice, at a time even between 0 and ``span``. Where an
    accumulator has a floor it is reflected there, as at 0 in leaky competing accumulators (Usher and McClelland 2001).

    Parameters
    ----------
    drift : array_like or callable
        ``drift(t, x, c)`` -> ``(..., d)`` for points x of shape ``(..., d)``, in torch; c holds the covariates of a
        condition by name.
    diffusion : number, array_like or callable, default 1
        σ, likewise: a number, ``(d,)`` or ``(d, d)``.
    upper : sequence of d numbers, tensors or callables
        The bounds, d = 2 or 3; ``upper[k](c)``.
    lower : number, tensor, callable or sequence of d of these, optional
        Floors; None: there is none.
    start : number, tensor, sequence of d numbers, or callable, default 0
        Where it starts; ``start(c)``.
    delay, lapse, span, killing
        As for :class:`FirstPassage`.

    Raises
    ------
    InputError
        For other numbers of bounds, and bounds that move.

    Notes
    -----
    The law of the process is moved on a grid by implicit steps, once for all trials of a condition; what goes out
    through a face is the density of that choice. Passages so early that next to none has arrived have that of the
    accumulator by itself, with drift and noise on the straight way to its bound, the others at their starts. Where
    noise is correlated, or depends on other axes or on time, estimates for these grow the earlier they are.

    Examples
    --------
    Two accumulators that inhibit each other:

    >>> inhibition = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    >>> speed = torch.tensor([1.5, 1.0], dtype=torch.float64)
    >>> race = Race(lambda t, x, c: speed - inhibition * x.flip(-1), upper=[1.0, 1.0], lower=0.0, delay=0.2)
    >>> likelihood = race.likelihood(Trials([0.6, 0.8, 1.1], [0, 1, 0]), tol=1e-2)
    >>> likelihood().item().__round__(1), likelihood.status
    (-4.3, 'converged')
    >>> bool(torch.isfinite(torch.autograd.grad(likelihood(), inhibition)[0]))
    True
    """

    def __init__(
        self,
        drift: Any,
        diffusion: Any = 1.0,
        *,
        upper: Sequence[Given],
        lower: Any = None,
        start: Any = 0.0,
        delay: Given = 0.0,
        lapse: Given = 0.0,
        span: float | None = None,
        killing: Any = None,
    ) -> None:
        self.upper: tuple[Given, ...] = tuple(upper)
        self.dim = len(self.upper)
        if self.dim not in (2, 3):
            needed = "two or three, one for each accumulator"
            raise InputError("upper", f"{self.dim} bounds", needed, "FirstPassage for one")
        floors = lower if isinstance(lower, list | tuple) else [lower] * self.dim
        if len(floors) != self.dim:
            raise InputError("lower", f"{len(floors)} floors", f"{self.dim}, or one for all")
        self.lower: tuple[Given, ...] | None = None if all(v is None for v in floors) else tuple(floors)
        for name, ends in (("upper", self.upper), ("lower", self.lower or ())):
            if any(moves(end) for end in ends):
                raise InputError(name, "a bound that moves", "bounds of races that stand still", "functions of c alone")
        self.drift, self.diffusion, self.killing = drift, diffusion, killing
        self.start, self.delay, self.lapse, self.span = start, delay, lapse, span

    @property
    def sides(self) -> tuple[int, ...]:
        """Choices that there are: the axes."""
        return tuple(range(self.dim))

    def begin(self, c: Covariates) -> torch.Tensor:
        """Where it starts under a condition, shape (d,)."""
        found = self.start(c) if callable(self.start) else self.start
        parts = [torch.as_tensor(v, dtype=torch.float64) for v in found] if isinstance(found, list | tuple) else found
        point = torch.stack(parts) if isinstance(parts, list) else torch.as_tensor(parts, dtype=torch.float64)
        if point.ndim > 1 or point.numel() not in (1, self.dim) or not bool(torch.isfinite(point).all()):
            raise InputError("start", as_numpy(point.detach()), f"a number, or {self.dim} of them")
        return point.expand(self.dim)

    def ends(self, c: Covariates) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Start, origin and unit of every axis, each (d,): at the origin the floor or else the start, at one the bound.

        Raises
        ------
        InputError
            For a start that is not between floor and bound.
        """
        begin = self.begin(c)
        high = torch.stack([a_number(v, c, "upper") for v in self.upper])
        floors = self.lower or (None,) * self.dim
        low = torch.stack([begin[k] if v is None else a_number(v, c, "lower") for k, v in enumerate(floors)])
        if not bool(((low <= begin) & (begin < high)).all()):
            told = f"{begin.tolist()}, with bounds {high.tolist()} and floors {low.tolist()}"
            raise InputError("start", told, "a start below the bounds, and not below the floors")
        return begin, low, high - low

    def likelihood(self, trials: Trials, *, tol: float = 1e-3) -> RaceLikelihood:
        """The likelihood of trials as a function of the parameters in the model; see :meth:`FirstPassage.likelihood`.

        Parameters
        ----------
        trials : Trials
            The data; choices are axes.
        tol : float, default 1e-3
            Error that the logarithm may have.

        Returns
        -------
        RaceLikelihood
        """
        return RaceLikelihood(self, trials, tol)

    @at_home
    def density(self, times: Any, choice: int = 1, covariates: Covariates | None = None, *, tol: float = 1e-2) -> Any:
        """Density of response time and choice at times (N,), a tensor (N,): guesses included.

        Parameters
        ----------
        times : array_like, shape (N,)
            Response times.
        choice : int, default 1
            The axis.
        covariates : mapping, optional
            The condition.
        tol : float, default 1e-2
            Error that the sum of the logarithms may have.
        """
        return density_of(self, times, choice, covariates, tol)
