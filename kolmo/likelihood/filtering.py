r"""Paths seen through noise: the law of the state given what was seen so far, from one observation to the next.

Between observations the law moves by the forward equation; at one it is multiplied by the likelihood of what is seen,
and the factor by which that makes it smaller is what the observation adds:

.. math:: p_{k|k-1} = e^{h_kL^*}p_{k-1}, \qquad p_k = \frac{N(y_k; Hx, R)\,p_{k|k-1}}{\int N(y_k; Hx, R)\,p_{k|k-1}\,dx}

Of linear processes the law stays Gaussian (Kalman 1960); in one dimension it is a sum of eigenfunctions, for which
multiplying needs values at quadrature points alone.
"""

import math
from typing import Any

import numpy as np
import torch

from kolmo.arrays import as_numpy
from kolmo.errors import InputError
from kolmo.likelihood.base import HOPELESS, Level, Likelihood, log_of
from kolmo.likelihood.gaussian import is_linear, log_normal, moves
from kolmo.likelihood.modes import rule
from kolmo.likelihood.paths import NARROW, ROUNDING, TAIL, WIDER, Chart, check_steady, confined, in_torch, modes_on
from kolmo.problem.box import Box
from kolmo.problem.sde import SDE

# Standard deviations of the first law, once the first observation is seen, that count as where the process is.
SPREADS = 6.0


def noisy_paths(
    sde: SDE,
    times: Any,
    observations: Any,
    noise: Any,
    *,
    initial: tuple[Any, Any],
    observe: Any = None,
    tol: float = 1e-3,
) -> "NoisyPathLikelihood":
    r"""The likelihood of a path seen through noise, as a function of the torch parameters in process and noise.

    .. math::
        y_k = HX_{t_k} + \eta_k, \quad \eta_k \sim N(0, R), \qquad
        \ell = \sum_k\log p(y_k \mid y_0, \dots, y_{k-1})

    Parameters
    ----------
    sde : SDE
        The process, in torch; linear in one to three dimensions, or any in one. Coefficients do not depend on time.
    times : array_like, shape (n,)
        When something was seen.
    observations : array_like, shape (n, m)
        What; NaN for what was not.
    noise : number, tensor or callable
        Standard deviation of the noise, the same in all components, or one for each (m,); ``noise()`` where it is
        computed from parameters.
    initial : (mean, covariance)
        Of the Gaussian law at the first time, before anything is seen: shapes (d,) and (d, d), or numbers in one
        dimension.
    observe : array_like, shape (m, d), optional
        H; None: the state itself. Coordinates that it leaves out are hidden.
    tol : float, default 1e-3
        Error that ℓ may have.

    Returns
    -------
    NoisyPathLikelihood

    Raises
    ------
    InputError
        For processes that are neither linear nor in one dimension, and for shapes that do not fit.

    Examples
    --------
    >>> kappa = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    >>> wells = SDE(lambda t, x: kappa * (x - x**3), 0.5, dim=1, arrays="torch")
    >>> found = noisy_paths(wells, [0.0, 0.1, 0.5, 3.0], [1.1, 0.8, 0.9, -0.9], 0.2, initial=(1.0, 0.1))
    >>> found().item().__round__(3), found.error_estimate < 1e-3
    (-3.284, True)
    """
    return NoisyPathLikelihood(sde, times, observations, noise, initial, observe, tol)


class NoisyPathLikelihood(Likelihood):
    """Likelihood of a path seen through noise; see :func:`noisy_paths`.

    Attributes
    ----------
    sde : SDE
        The process.
    times : ndarray, shape (n,)
        When something was seen.
    observations : tensor, shape (n, m)
        What.

    Examples
    --------
    >>> found = noisy_paths(SDE(0.0, 1.0, dim=1), [0.0, 1.0], [0.0, 0.0], 1.0, initial=(0.0, 1.0))
    >>> found().item().__round__(4)  # −log 2π − ½ log 5
    -2.6426
    """

    first, most = 24.0, 420.0

    def __init__(
        self, sde: SDE, times: Any, observations: Any, noise: Any, initial: tuple[Any, Any], observe: Any, tol: float
    ) -> None:
        super().__init__(tol)
        if sde.dim is None or not 1 <= sde.dim <= 3:
            raise InputError("sde", f"{sde.dim} dimensions", "1 to 3", "SDE(..., dim=)")
        d = sde.dim
        self.sde, self.times = in_torch(sde), np.asarray(as_numpy(times), dtype=float).reshape(-1)
        self.H = torch.eye(d, dtype=torch.float64) if observe is None else _tensor(observe).reshape(-1, d)
        seen = torch.as_tensor(np.asarray(as_numpy(observations), dtype=float))
        self.observations = seen[:, None] if seen.ndim == 1 else seen
        if tuple(self.observations.shape) != (len(self.times), len(self.H)):
            raise InputError("observations", f"shape {tuple(seen.shape)}", f"shape {(len(self.times), len(self.H))}")
        if not (np.diff(self.times) > 0).all():
            raise InputError("times", self.times.tolist()[:4], "increasing times")
        self._noise = noise
        self.mean, self.covariance = _tensor(initial[0]).reshape(d), _tensor(initial[1]).reshape(d, d)
        self._places = self._where()
        check_steady(self.sde, self._places, float(np.diff(self.times).max(initial=1.0)))
        self._linear = is_linear(self.sde, self._places.numpy(), float(np.diff(self.times).max(initial=1.0)))
        if not self._linear and d > 1:
            raise InputError("sde", f"a process in {d} dimensions that is not linear", "a linear one, or one dimension")
        self._chart: Chart | None = None
        self._wider = NARROW

    @property
    def count(self) -> int:
        """Number of observations."""
        return len(self.times)

    @property
    def deviations(self) -> torch.Tensor:
        """Standard deviations of the noise, shape (m,)."""
        found = _tensor(self._noise() if callable(self._noise) else self._noise)
        if not bool((found > 0).all()):
            raise InputError("noise", found.tolist(), "positive standard deviations", "likelihood.paths has no noise")
        return found.expand(len(self.H))

    def _where(self) -> torch.Tensor:
        """Points (p, d) about which the process is, as far as the first law and what was seen tell."""
        m, C = self._seen(self.mean.detach(), self.covariance.detach(), self.observations[0], self.deviations.detach())[
            :2
        ]
        spread = SPREADS * torch.sqrt(torch.diagonal(C))
        points = [m - spread, m, m + spread]
        seen = self.observations[~torch.isnan(self.observations).any(1)]
        if len(seen):
            back = torch.linalg.pinv(self.H)
            points += [*(seen @ back.T)]
        return torch.stack(points).detach()

    def renew(self) -> float:
        """Decide anew on the state space and on a resolution; the estimated error."""
        self._chart = None
        return super().renew()

    def _terms(self, n: float) -> tuple[torch.Tensor, float]:
        return (self._kalman(), 0.0) if self._linear else self._by_modes(int(n))

    def _kalman(self) -> torch.Tensor:
        """The Gaussian filter."""
        low, high = self._places.amin(0), self._places.amax(0)
        size = torch.maximum(high - low, torch.full_like(low, 1e-300))
        spacing, which = np.unique(np.diff(self.times), return_inverse=True)
        moved = moves(self.sde, 0.5 * (low + high), size, torch.as_tensor(spacing)) if len(spacing) else None
        m, C, spread = self.mean, self.covariance, self.deviations
        terms = []
        for k, y in enumerate(self.observations):
            if k and moved is not None:
                j = int(which[k - 1])
                M = moved.matrix[j]
                m, C = M @ m + moved.shift[j], M @ C @ M.T + moved.covariance[j]
            m, C, term = self._seen(m, C, y, spread)
            terms.append(term)
        return torch.stack(terms)

    def _seen(
        self, m: torch.Tensor, C: torch.Tensor, y: torch.Tensor, spread: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Mean and covariance of a Gaussian law after an observation, and the logarithm of the density of that."""
        H = self.H
        if bool(torch.isnan(y).any()):
            there = torch.nonzero(~torch.isnan(y))[:, 0]
            H, y, spread = H[there], y[there], spread[there]
        seen = H @ C
        L = torch.linalg.cholesky(seen @ H.T + torch.diag(spread**2))
        off = y - H @ m
        gain = torch.cholesky_solve(seen, L).T
        rest = torch.eye(len(m), dtype=torch.float64) - gain @ H
        z = torch.linalg.solve_triangular(L, off[:, None], upper=False)[:, 0]
        term = -0.5 * z @ z - torch.log(torch.diagonal(L)).sum() - 0.5 * len(y) * math.log(2.0 * math.pi)
        return m + gain @ off, rest @ C @ rest.T + (gain * spread**2) @ gain.T, term

    def _by_modes(self, n: int) -> tuple[torch.Tensor, float]:
        """The filter in one dimension: the law is g/Σ times a sum of eigenfunctions."""
        if self._chart is None:
            self._chart = Chart(self.sde, self._interval())
        modes = modes_on(self.sde, self._chart, n, (False, False))
        x, stretch = self._chart.at(rule(n).points)
        psi = rule(n).values @ modes.shapes[0]
        S = self.sde.covariance(0.0, x[:, None])[:, 0, 0]
        weights = rule(n).weights * stretch
        g = torch.exp(modes.log_weight(rule(n).points[None])[0])
        start = torch.exp(log_normal(x[:, None], self.mean.expand(len(x), 1), self.covariance.expand(len(x), 1, 1)))
        spread, terms = self.deviations, []
        a, steps = torch.zeros(psi.shape[1], dtype=torch.float64), [0.0, *np.diff(self.times).tolist()]
        for k, (h, y) in enumerate(zip(steps, self.observations, strict=True)):
            likely = _likely(x, y, self.H[:, 0], spread)
            if k == 0:
                first = weights * start * likely / g
                a = first @ psi
            else:
                a = a * torch.exp(-modes.rates[0].clamp(min=0.0) * h)
                a = (weights / S * (psi @ a) * likely) @ psi
            total = a @ modes.mass[0]
            terms.append(log_of(total))
            a = a / total
        # the first law may be wide where the process seldom is
        rounding = ROUNDING * float((first.abs().sum() * psi.abs().max() * modes.mass[0].abs().max()).detach())
        return torch.stack(terms), rounding * math.exp(min(-float(terms[0].detach()), HOPELESS))

    def _interval(self) -> tuple[float, float]:
        longest = float(self.times[-1] - self.times[0])
        covering = Box.covering(self.sde, self._places.numpy(), max(longest, 1e-12), tail=TAIL)
        low, high = float(self._places.min()), float(self._places.max())
        ends = low - self._wider * (low - covering.lower[0]), high + self._wider * (covering.upper[0] - high)
        return confined(self.sde, (low, high), (float(ends[0]), float(ends[1])))

    def _cut(self, level: Level) -> float:
        if self._linear:
            return 0.0
        kept, wider = self._chart, self._wider
        self._wider, self._chart = WIDER * wider, None
        other = self._level(2 * round(0.5 * WIDER * level.n))
        self._wider, self._chart = wider, kept
        return other.distance(level)

    def _widen(self) -> bool:
        self._wider, self._chart = WIDER * self._wider, None
        return True


def _likely(x: torch.Tensor, y: torch.Tensor, H: torch.Tensor, spread: torch.Tensor) -> torch.Tensor:
    """Likelihood of what was seen at places (Q,)."""
    there = torch.nonzero(~torch.isnan(y))[:, 0]
    z = (y[there] - x[:, None] * H[there]) / spread[there]
    return torch.exp(-0.5 * (z**2).sum(1)) / torch.prod(np.sqrt(2.0 * np.pi) * spread[there])


def _tensor(value: Any) -> torch.Tensor:
    return torch.as_tensor(value, dtype=torch.float64)
