r"""Paths seen through noise: the law of the state given what was seen so far, from one observation to the next.

Between observations the law moves by the forward equation; at one it is multiplied by the likelihood of what is seen,
and the factor by which that makes it smaller is what the observation adds:

.. math:: p_{k|k-1} = e^{h_kL^*}p_{k-1}, \qquad p_k = \frac{N(y_k; Hx, R)\,p_{k|k-1}}{\int N(y_k; Hx, R)\,p_{k|k-1}\,dx}

Of linear processes the law stays Gaussian (Kalman 1960); in one dimension it is a sum of eigenfunctions, for which
multiplying needs values at quadrature points alone.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from kolmo.arrays import as_numpy
from kolmo.errors import InputError
from kolmo.likelihood.base import HOPELESS, log_of
from kolmo.likelihood.chart import TAIL, Chart, OnChart, confined, modes_on
from kolmo.likelihood.gaussian import is_linear, log_normal, moved
from kolmo.likelihood.modes import rule
from kolmo.likelihood.paths import ROUNDING, check_steady, in_torch
from kolmo.problem.box import Box
from kolmo.problem.sde import SDE

# Standard deviations of the first law, once the first observation is seen, that count as where the process is.
SPREADS = 6.0

Watch = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Any]


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

    References
    ----------
    A. H. Jazwinski (1970), Stochastic Processes and Filtering Theory.

    Examples
    --------
    >>> kappa = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    >>> wells = SDE(lambda t, x: kappa * (x - x**3), 0.5, dim=1, arrays="torch")
    >>> found = noisy_paths(wells, [0.0, 0.1, 0.5, 3.0], [1.1, 0.8, 0.9, -0.9], 0.2, initial=(1.0, 0.1))
    >>> found().item().__round__(3), found.error_estimate < 1e-3
    (-3.284, True)
    """
    return NoisyPathLikelihood(sde, times, observations, noise, initial, observe, tol)


class NoisyPathLikelihood(OnChart):
    r"""Likelihood :math:`\sum_k \log p(y_k \mid y_0, \dots, y_{k-1})` of a path in noise; see :func:`noisy_paths`.

    Attributes
    ----------
    sde : SDE
        The process.
    times : ndarray, shape (n,)
        When something was seen.
    observations : tensor, shape (n, m)
        What.

    Raises
    ------
    InputError
        As `noisy_paths`.

    References
    ----------
    A. H. Jazwinski (1970), Stochastic Processes and Filtering Theory.

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

    @property
    def count(self) -> int:
        """Number of observations."""
        return len(self.times)

    @property
    def deviations(self) -> torch.Tensor:
        """Standard deviations of the noise, shape (m,).

        Raises
        ------
        InputError
            For noise that is not positive.
        """
        found = _tensor(self._noise() if callable(self._noise) else self._noise)
        if not bool((found > 0).all()):
            raise InputError("noise", found.tolist(), "positive standard deviations", "likelihood.paths has no noise")
        return found.expand(len(self.H))

    def _where(self) -> torch.Tensor:
        """Points (p, d) about which the process is, as far as the first law and what was seen tell."""
        H, y, noise, _ = self._masked()
        law = _Passage.first(self.mean.detach()[None], self.covariance.detach()[None], H[:1], y[:1], noise[:1].detach())
        m, C = law.b[0], law.C[0]
        spread = SPREADS * torch.sqrt(torch.diagonal(C))
        points = [m - spread, m, m + spread]
        seen = self.observations[~torch.isnan(self.observations).any(1)]
        if len(seen):
            back = torch.linalg.pinv(self.H)
            points += [*(seen @ back.T)]
        return torch.stack(points).detach()

    def renew(self) -> float:
        """Decide anew on the state space and on a resolution; the estimated error."""
        self._space = None
        return super().renew()

    def _terms(self, n: float) -> tuple[torch.Tensor, float]:
        return (self._kalman(), 0.0) if self._linear else self._by_modes(int(n))

    def transformed(self) -> torch.Tensor:
        """Every observation through its distribution function given those before it, shape (n, m); NaN if not seen."""
        if self.resolution is None:
            self.renew()
        assert self.resolution is not None
        found: list[torch.Tensor] = []
        if self._linear:
            found += [self._gaussian(*law) for law in zip(*self._predicted(), self.observations, strict=True)]
        else:
            self._by_modes(int(self.resolution), lambda x, masses, y: found.append(self._summed(x, masses, y)))
        return torch.stack(found)

    def _gaussian(self, m: torch.Tensor, C: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Distribution functions (m,) of what is seen of a Gaussian law, each given those before it."""
        there = torch.nonzero(~torch.isnan(y))[:, 0]
        H = self.H[there]
        L = torch.linalg.cholesky(H @ C @ H.T + torch.diag(self.deviations[there] ** 2))
        z = torch.linalg.solve_triangular(L, (y[there] - H @ m)[:, None], upper=False)[:, 0]
        return torch.full_like(y, torch.nan).index_copy(0, there, torch.special.ndtr(z))

    def _summed(self, x: torch.Tensor, masses: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Distribution functions (m,) of what is seen of masses at places (Q,), each given those before it."""
        found = torch.full_like(y, torch.nan)
        for k, (value, h, s) in enumerate(zip(y, self.H[:, 0], self.deviations, strict=True)):
            if not bool(torch.isnan(value)):
                z = (value - h * x) / s
                found[k] = (masses * torch.special.ndtr(z)).sum() / masses.sum()
                masses = masses * torch.exp(-0.5 * z**2)
        return found

    def _kalman(self) -> torch.Tensor:
        """Logarithms (n,) of what the Gaussian filter expects of each observation."""
        H, y, spread, missing = self._masked()
        mean, C = self._predicted()
        S = H @ C @ H.mT + torch.diag_embed(spread**2)
        # of a component that was not seen, a standard normal number that is zero stands in its place
        return log_normal(y, (H @ mean[..., None])[..., 0], S) + 0.5 * math.log(2.0 * math.pi) * missing

    def _masked(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """H (n, m, d), y and deviations (n, m), with zero, zero and one where nothing was seen; how often (n,)."""
        seen = ~torch.isnan(self.observations)
        y = torch.where(seen, self.observations, 0.0)
        spread = torch.where(seen, self.deviations, torch.ones((), dtype=torch.float64))
        return self.H * seen[..., None], y, spread, (~seen).double().sum(1)

    def _predicted(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Means (n, d) and covariances (n, d, d) of the state before each observation, given those before it."""
        first = self.mean[None], self.covariance[None]
        if len(self.times) == 1:
            return first
        F, u, Q = moved(self.sde, self._places, torch.as_tensor(np.diff(self.times)))
        H, y, spread, _ = self._masked()
        begin = _Passage.first(*first, H[:1], y[:1], spread[:1])
        passed = begin.followed(_Passage.step(F, u, Q, H[1:], y[1:], spread[1:])).through()
        mean = (F @ passed.b[:-1, :, None])[..., 0] + u
        C = F @ passed.C[:-1] @ F.mT + Q
        return torch.cat([first[0], mean]), torch.cat([first[1], 0.5 * (C + C.mT)])

    def _by_modes(self, n: int, watch: Watch = lambda *_: None) -> tuple[torch.Tensor, float]:
        """The filter in one dimension, of laws g/Σ times a sum of eigenfunctions; ``watch(x, masses, y)`` sees them."""
        if self._space is None:
            self._space = Chart(self.sde, self._interval())
        modes = modes_on(self.sde, self._space, n, (False, False))
        x, stretch = self._space.at(rule(n).points)
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
                watch(x, weights * start, y)
                first = weights * start * likely / g
                a = first @ psi
            else:
                a = a * torch.exp(-modes.rates[0].clamp(min=0.0) * h)
                law = weights / S * (psi @ a)
                watch(x, g * law, y)
                a = (law * likely) @ psi
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
        ends = low - self._width * (low - covering.lower[0]), high + self._width * (covering.upper[0] - high)
        return confined(self.sde, (low, high), (float(ends[0]), float(ends[1])))


class _Passage(NamedTuple):
    r"""Gaussian filters over stretches of observations, which can be put together in any order.

    Of the state x at the end given z before the stretch,

    .. math:: p(x \mid z, y) = N(x; Az + b, C), \qquad
        p(y \mid z) \propto \exp(z^{\mathsf T}\eta - \tfrac12 z^{\mathsf T}Jz)

    so that n observations take log n rounds (Särkkä and García-Fernández 2021). Shapes (n, d, d), (n, d), (n, d, d),
    (n, d), (n, d, d).
    """

    A: torch.Tensor
    b: torch.Tensor
    C: torch.Tensor
    eta: torch.Tensor
    J: torch.Tensor

    @classmethod
    def first(
        cls, m: torch.Tensor, P: torch.Tensor, H: torch.Tensor, y: torch.Tensor, spread: torch.Tensor
    ) -> "_Passage":
        """The law at the first time, and what is seen then."""
        none = torch.zeros_like(P)
        return cls.step(none, m, P, H, y, spread)

    @classmethod
    def step(
        cls, F: torch.Tensor, u: torch.Tensor, Q: torch.Tensor, H: torch.Tensor, y: torch.Tensor, spread: torch.Tensor
    ) -> "_Passage":
        """A move x = Fz + u + noise of covariance Q, and what is seen after it."""
        L = torch.linalg.cholesky(H @ Q @ H.mT + torch.diag_embed(spread**2))
        weighted = torch.cholesky_solve(H, L)
        off = (y - (H @ u[..., None])[..., 0])[..., None]
        gain = Q @ weighted.mT
        rest = torch.eye(Q.shape[-1], dtype=torch.float64) - gain @ H
        C = rest @ Q @ rest.mT + (gain * spread[:, None, :] ** 2) @ gain.mT
        eta = F.mT @ weighted.mT @ off
        return cls(rest @ F, u + (gain @ off)[..., 0], C, eta[..., 0], F.mT @ H.mT @ weighted @ F)

    def followed(self, other: "_Passage") -> "_Passage":
        """Others behind these, one after another."""
        return _Passage(*(torch.cat(pair) for pair in zip(self, other, strict=True)))

    def then(self, later: "_Passage") -> "_Passage":
        """Each together with a later one."""
        eye = torch.eye(self.C.shape[-1], dtype=torch.float64)
        between = torch.linalg.solve(eye + self.C @ later.J, torch.cat([self.A, self.C, self._held(later)], -1))
        d = self.C.shape[-1]
        A, C, b = later.A @ between[..., :d], between[..., d : 2 * d], later.A @ between[..., 2 * d :]
        back = torch.linalg.solve(eye + later.J @ self.C, torch.cat([later.J @ self.A, self._told(later)], -1))
        eta = (self.A.mT @ back[..., d:])[..., 0] + self.eta
        covariance = later.A @ C @ later.A.mT + later.C
        J = self.A.mT @ back[..., :d] + self.J
        return _Passage(A, b[..., 0] + later.b, 0.5 * (covariance + covariance.mT), eta, 0.5 * (J + J.mT))

    def _held(self, later: "_Passage") -> torch.Tensor:
        return (self.b + (self.C @ later.eta[..., None])[..., 0])[..., None]

    def _told(self, later: "_Passage") -> torch.Tensor:
        return (later.eta - (later.J @ self.b[..., None])[..., 0])[..., None]

    def through(self) -> "_Passage":
        """Of a row of them, each together with all before it."""
        found, reach = self, 1
        while reach < len(found.b):
            earlier = _Passage(*(v[:-reach] for v in found))
            joined = earlier.then(_Passage(*(v[reach:] for v in found)))
            found = _Passage(*(v[:reach] for v in found)).followed(joined)
            reach *= 2
        return found


def _likely(x: torch.Tensor, y: torch.Tensor, H: torch.Tensor, spread: torch.Tensor) -> torch.Tensor:
    """Likelihood of what was seen at places (Q,)."""
    there = torch.nonzero(~torch.isnan(y))[:, 0]
    z = (y[there] - x[:, None] * H[there]) / spread[there]
    return torch.exp(-0.5 * (z**2).sum(1)) / torch.prod(np.sqrt(2.0 * np.pi) * spread[there])


def _tensor(value: Any) -> torch.Tensor:
    return torch.as_tensor(value, dtype=torch.float64)
