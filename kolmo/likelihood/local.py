r"""Transition densities over short times, in any dimension: a Gaussian that has the right moments, times polynomials.

Over a time h from x the law is near a Gaussian with mean :math:`x + hv` and covariance :math:`hLL^{\mathsf T}`. At
:math:`t = \rho^2 h`, in :math:`z = L^{-1}(X - x - tv)/(\rho\sqrt h)`, write its density as the standard normal one
times :math:`\sum_\alpha c_\alpha(\rho)\,he_\alpha(z)` with normalised Hermite polynomials. The Fokker–Planck
equation is then

.. math::
    \rho\,c_\alpha' = -|\alpha|\,c_\alpha + \sum_\beta R_{\alpha\beta}(\rho)\,c_\beta, \qquad
    R_{\alpha\beta} = E\Big[he_\beta(z)\big(2\rho\sqrt h\,L^{-1}(b - v)\cdot\nabla
        + (L^{-1}\Sigma L^{-\mathsf T} - I):\nabla^2\big)he_\alpha(z)\Big],

with b and Σ at :math:`x + \rho^2hv + \rho\sqrt hLz`; expectations are Gauss–Hermite sums, and no derivative of a
coefficient is needed. R is small where the time is short, so that

.. math:: c_\alpha(\rho) = \rho^{-|\alpha|}\int_0^\rho s^{|\alpha| - 1}\sum_\beta R_{\alpha\beta}(s)\,c_\beta(s)\,ds

is solved by iteration, at Gauss–Legendre points. v and L come from the moments of the Gaussian that keeps them (assumed
density); whatever they are, polynomials of higher degree correct them. In one dimension the process is taken to unit
noise first (Lamperti), where the expansion is good far into the tails; beyond one it is where the noise is the same
everywhere. The expansion in √h alone is that of Aït-Sahalia (2002, 2008); here all of b and Σ is kept.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any

import numpy as np
import torch
from numpy.polynomial import chebyshev, hermite_e, legendre
from torch.utils.checkpoint import checkpoint

from kolmo.kernels.hermite import solutions
from kolmo.likelihood.base import LEAST
from kolmo.problem.sde import SDE

# Points per axis of the expectations beyond the degree; steps of the moments' equation, and the degree whose points it
# takes: polynomials correct what it finds; points in ρ beyond half of the degree.
MORE_POINTS, STEPS, MOMENTS, MORE_TIMES = 3, 2, 2, 2
# Rounds of the iteration at most, and the change of coefficients, as a part of the largest, at which it ends.
ROUNDS, SETTLED = 200, 1e-12
# In one dimension: Chebyshev nodes for the drift around a point beyond the degree, Gauss points on the way from x to y,
# how far the drift is followed, in standard deviations: at least, and beyond y; Runge–Kutta steps between nodes.
NODES, WAY, WIDE, ASIDE, BETWEEN = 11, 24, 7.0, 3.0, 2
# Numbers held at once, about what a processor keeps near; beyond it transitions are taken in turn, and made again for
# the gradient.
AT_ONCE = 500_000

Coefficients = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""(b, Σ) at points (M, K, P, d)."""


@dataclass(frozen=True)
class Basis:
    """Hermite polynomials up to a degree in d dimensions, and quadratures.

    Attributes
    ----------
    points, weights : tensor, shape (P, d) and (P,)
        Gauss–Hermite points of the standard normal law.
    degrees : tensor, shape (n,)
        |α|.
    values : tensor, shape (P, n)
        he_α there.
    slopes : tensor, shape (P, s, n)
        Its first derivatives, then the second ones of each pair of axes once, times the weights.
    indices : ndarray, shape (n, d)
        α.
    times : tensor, shape (K,)
        Points ρ in [0, 1]; the last is 1.
    solve : tensor, shape (n, K, K)
        From values of a function f at the points to ρ^{−k} ∫ s^{k−1} f ds there, k = |α|; zero for k = 0.
    """

    points: torch.Tensor
    weights: torch.Tensor
    degrees: torch.Tensor
    values: torch.Tensor
    slopes: torch.Tensor
    indices: np.ndarray
    times: torch.Tensor
    solve: torch.Tensor


@lru_cache(maxsize=32)
def basis(dim: int, degree: int) -> Basis:
    """The basis of a degree.

    Examples
    --------
    >>> found = basis(2, 4)
    >>> products = found.values.T @ (found.weights[:, None] * found.values)
    >>> len(found.indices), bool(products.allclose(torch.eye(15).double()))
    (15, True)
    """
    z, w = hermite_e.hermegauss(degree + MORE_POINTS)
    w = w / w.sum()
    points = np.array(list(product(z, repeat=dim)))
    weights = np.array([math.prod(v) for v in product(w, repeat=dim)])
    found = sorted((a for a in product(range(degree + 1), repeat=dim) if sum(a) <= degree), key=lambda a: (sum(a), a))
    indices = np.array(found)
    # he_k, he_k' and he_k'' per axis
    orders = [np.stack([_derivative(points, k, o) for k in range(degree + 1)]) for o in range(3)]

    def of(counts: tuple[int, ...]) -> np.ndarray:
        parts = [orders[o][indices[:, i], :, i].T for i, o in enumerate(counts)]
        return np.asarray(np.prod(parts, axis=0))

    unit = np.eye(dim, dtype=int)
    slopes = [of(tuple(unit[i])) for i in range(dim)] + [of(tuple(unit[i] + unit[j])) for i, j in _pairs(dim)]
    times, solve = _volterra(degree // 2 + MORE_TIMES, degree)
    return Basis(
        torch.as_tensor(points),
        torch.as_tensor(weights),
        torch.as_tensor(indices.sum(1)),
        torch.as_tensor(of((0,) * dim)),
        torch.as_tensor(weights[:, None, None] * np.stack(slopes, 1)),
        indices,
        torch.as_tensor(times),
        torch.as_tensor(solve[indices.sum(1)]),
    )


def _pairs(dim: int) -> list[tuple[int, int]]:
    """Pairs of axes."""
    return [(i, j) for i in range(dim) for j in range(i, dim)]


def _derivative(z: np.ndarray, k: int, order: int) -> np.ndarray:
    """Derivative of the normalised Hermite polynomial of degree k."""
    if order > k:
        return np.zeros_like(z)
    factor = math.sqrt(math.factorial(k)) / math.factorial(k - order)
    return np.asarray(factor * hermite_e.hermeval(z, [0.0] * (k - order) + [1.0]))


def _volterra(count: int, degree: int) -> tuple[np.ndarray, np.ndarray]:
    """Points in [0, 1], the last 1, and the matrices (degree + 1, count, count) of ρ^{−k} ∫_0^ρ s^{k−1} f ds."""
    times = np.append(0.5 * (1.0 + legendre.leggauss(count - 1)[0]), 1.0)
    powers = np.arange(count)
    monomials = times[:, None] ** powers
    # of s^j the integral is ρ^j / (k + j)
    inverse = np.linalg.inv(monomials)
    return times, np.stack(
        [np.zeros((count, count)), *(monomials / (k + powers) @ inverse for k in range(1, degree + 1))]
    )


def log_densities(sde: SDE, x: torch.Tensor, y: torch.Tensor, spacing: torch.Tensor, degree: int) -> torch.Tensor:
    """Logarithms of transition densities, shape (M,); NaN where they are not to be had this way.

    Parameters
    ----------
    sde : SDE
        The process; its coefficients do not depend on time.
    x, y : tensor, shape (M, d)
        From where to where.
    spacing : tensor, shape (M,)
        In which time.
    degree : int
        Of the polynomials.
    """
    found = basis(x.shape[1], degree)
    step = max(1, AT_ONCE // (len(found.times) * len(found.slopes) * found.slopes.shape[1]))
    parts = []
    for k in range(0, len(x), step):
        chunk = (x[k : k + step], y[k : k + step], spacing[k : k + step])
        if len(x) > step and torch.is_grad_enabled():
            part = checkpoint(_log_density, sde, found, *chunk, use_reentrant=False, preserve_rng_state=False)
        else:
            part = _log_density(sde, found, *chunk)
        parts.append(part)
    return torch.cat(parts) if parts else x.new_zeros(0)


def _log_density(sde: SDE, B: Basis, x: torch.Tensor, y: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    if x.shape[1] == 1:
        chart = UnitNoise.of(sde, x[:, 0], y[:, 0], h, NODES + 2 * (int(B.degrees[-1]) // 2))
        return _expanded(chart.coefficients, B, torch.zeros_like(x), chart.end[:, None], h) - chart.log_noise
    return _expanded(lambda places: _coefficients(sde, places), B, x, y, h)


def _expanded(f: Coefficients, B: Basis, x: torch.Tensor, y: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    d = x.shape[1]
    mean, covariance = _moments(f, basis(d, MOMENTS), x, h)
    v, L = (mean - x) / h[:, None], _root(covariance / h[:, None, None])
    inverse, root = torch.linalg.inv(L), torch.sqrt(h)
    z = (inverse @ (y - mean)[..., None])[..., 0] / root[:, None]
    ratio = _Ratio.apply(_rates(f, B, x, v, L, inverse, root), _hermite(z, B), B)  # type: ignore[no-untyped-call]
    size = torch.log(torch.diagonal(L, dim1=-2, dim2=-1)).sum(-1) + 0.5 * d * torch.log(2.0 * math.pi * h)
    logs = torch.log(ratio.clamp(min=LEAST)) - 0.5 * (z**2).sum(-1) - size
    return torch.where(ratio > 0, logs, torch.full_like(logs, torch.nan))


def _rates(
    f: Coefficients,
    B: Basis,
    x: torch.Tensor,
    v: torch.Tensor,
    L: torch.Tensor,
    inverse: torch.Tensor,
    root: torch.Tensor,
) -> torch.Tensor:
    """What stands before the derivatives of he_α in R, in the order of ``slopes``: shape (M, K, P, s)."""
    d, rho, scale = x.shape[1], B.times[:, None], root[:, None, None]
    offsets = (B.points @ L.mT)[:, None]
    places = x[:, None, None] + (rho**2)[..., None] * (root[:, None] ** 2 * v)[:, None, None]
    b, S = f(places + rho[..., None] * scale[..., None] * offsets)
    b = b - v[:, None, None]
    to = inverse[:, :, :, None, None]
    parts = [
        2.0 * rho * scale * _dot([to[:, i, j] for j in range(i + 1)], [b[..., j] for j in range(i + 1)])
        for i in range(d)
    ]
    for i, j in _pairs(d):
        several = [(k, m) for k in range(i + 1) for m in range(j + 1)]
        found = _dot([to[:, i, k] * to[:, j, m] for k, m in several], [S[..., k, m] for k, m in several])
        parts.append(found - 1.0 if i == j else 2.0 * found)
    return torch.stack(parts, -1)


def _dot(factors: list[torch.Tensor], others: list[torch.Tensor]) -> torch.Tensor:
    total = factors[0] * others[0]
    for a, b in zip(factors[1:], others[1:], strict=True):
        total = total + a * b
    return total


class _Ratio(torch.autograd.Function):
    """Σ_α c_α w_α at the end, shape (M,), for coefficients c = e + Ac: e is one for α = 0, and A is in the rates.

    The gradient needs the solution of the transposed equation besides, whatever the number of rounds was.
    """

    @staticmethod
    def forward(ctx: Any, rates: torch.Tensor, w: torch.Tensor, B: Basis) -> torch.Tensor:
        sides = _sides(w, B)
        c, other = _solutions(rates, sides[0], sides[1] if any(ctx.needs_input_grad) else None, B)
        ctx.save_for_backward(rates, w, c, other)
        ctx.basis = B
        return (c[:, -1] * w).sum(-1)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        rates, w, c, other = ctx.saved_tensors
        if torch.is_grad_enabled():  # it will be differentiated itself
            one, two = _sides(w, ctx.basis)
            c = _Solution.apply(rates, one, ctx.basis, False)  # type: ignore[no-untyped-call]
            other = _Solution.apply(rates, two, ctx.basis, True)  # type: ignore[no-untyped-call]
        g = gradients[0]
        return g[:, None, None, None] * _outer(c, other, rates, ctx.basis), g[:, None] * c[:, -1], None


class _Solution(torch.autograd.Function):
    """The solution of one of the two equations, shape (M, K, n), for gradients of gradients."""

    @staticmethod
    def forward(ctx: Any, rates: torch.Tensor, right: torch.Tensor, B: Basis, transposed: bool) -> torch.Tensor:
        found = _solutions(rates, None, right, B)[1] if transposed else _solutions(rates, right, None, B)[0]
        ctx.save_for_backward(rates, found)
        ctx.basis, ctx.transposed = B, transposed
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        rates, found = ctx.saved_tensors
        back = _Solution.apply(rates, gradients[0], ctx.basis, not ctx.transposed)  # type: ignore[no-untyped-call]
        c, other = (back, found) if ctx.transposed else (found, back)
        return _outer(c, other, rates, ctx.basis), back, None, None


def _sides(w: torch.Tensor, B: Basis) -> tuple[torch.Tensor, torch.Tensor]:
    """Right sides of both equations, shapes (M, K, n)."""
    shape = (len(w), len(B.times), len(B.degrees))
    last = torch.zeros(shape[1], dtype=torch.float64)
    last[-1] = 1.0
    return torch.eye(1, shape[2], dtype=torch.float64).expand(shape), last[:, None] * w[:, None]


def _solutions(
    rates: torch.Tensor, right: torch.Tensor | None, back: torch.Tensor | None, B: Basis
) -> tuple[torch.Tensor, torch.Tensor]:
    none = torch.empty(0, len(B.times), len(B.degrees), dtype=torch.float64)
    parts = (rates, none if right is None else right, none if back is None else back, B.values, B.slopes, B.solve)
    found = solutions(*(np.ascontiguousarray(v.detach().numpy()) for v in parts), ROUNDS, SETTLED)
    return torch.as_tensor(found[0]), torch.as_tensor(found[1])


def _outer(c: torch.Tensor, other: torch.Tensor, rates: torch.Tensor, B: Basis) -> torch.Tensor:
    """Derivative with respect to the rates, shape (M, K, P, s)."""
    moved = torch.einsum("nab,man->mbn", B.solve, other)
    slopes = (moved @ B.slopes.flatten(0, 1).T).reshape(rates.shape)
    return slopes * (c @ B.values.T)[..., None]


def _moments(f: Coefficients, B: Basis, x: torch.Tensor, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and covariance after h of the Gaussian that keeps its moments: Runge–Kutta steps of order four."""
    d, w = x.shape[1], B.weights
    eye = torch.eye(d, dtype=torch.float64)

    def rates(m: torch.Tensor, C: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        tiny = 1e-30 + 1e-14 * torch.diagonal(C, dim1=-2, dim2=-1).detach().amax(-1)
        deviations = B.points @ _root(C + tiny[:, None, None] * eye).mT
        b, S = (v[:, 0] for v in f((m[:, None] + deviations)[:, None]))
        cross = (w[:, None] * b).mT @ deviations
        return (w[:, None] * b).sum(1), cross + cross.mT + (w[:, None, None] * S).sum(1)

    m, C, dt = x, x.new_zeros(len(x), d, d), h[:, None] / STEPS
    for _ in range(STEPS):
        k1 = rates(m, C)
        k2 = rates(m + 0.5 * dt * k1[0], C + 0.5 * dt[..., None] * k1[1])
        k3 = rates(m + 0.5 * dt * k2[0], C + 0.5 * dt[..., None] * k2[1])
        k4 = rates(m + dt * k3[0], C + dt[..., None] * k3[1])
        m = m + dt / 6.0 * (k1[0] + 2.0 * k2[0] + 2.0 * k3[0] + k4[0])
        C = C + dt[..., None] / 6.0 * (k1[1] + 2.0 * k2[1] + 2.0 * k3[1] + k4[1])
    return m, C


def _root(C: torch.Tensor) -> torch.Tensor:
    """Cholesky factors; NaN for what is no covariance: there is no answer there, and others have theirs."""
    good = torch.isfinite(C.detach()).all(-1).all(-1)
    eye = torch.eye(C.shape[-1], dtype=torch.float64)
    L, info = torch.linalg.cholesky_ex(torch.where(good[:, None, None], C, eye))
    return torch.where((good & (info == 0))[:, None, None], L, torch.full_like(L, torch.nan))


@dataclass(frozen=True)
class UnitNoise:
    r"""Processes in one dimension around points x, in the coordinate :math:`z = \int_x dx/\sigma` in which σ is one.

    Attributes
    ----------
    reach : tensor, shape (M,)
        |z| up to which the drift is known.
    drift : tensor, shape (M, n)
        Coefficients of :math:`b/\sigma - \tfrac12\sigma'` in Chebyshev polynomials of z / reach.
    end : tensor, shape (M,)
        Where y is.
    log_noise : tensor, shape (M,)
        log σ(y).
    """

    reach: torch.Tensor
    drift: torch.Tensor
    end: torch.Tensor
    log_noise: torch.Tensor

    @classmethod
    def of(cls, sde: SDE, x: torch.Tensor, y: torch.Tensor, h: torch.Tensor, count: int) -> "UnitNoise":
        """Around the way from x to y, all of shape (M,), by an odd number of nodes."""

        def noise(at: torch.Tensor) -> torch.Tensor:
            return torch.sqrt(sde.covariance(0.0, at.reshape(-1, 1))[:, 0, 0].reshape(at.shape))

        gauss, weights = (torch.as_tensor(v) for v in legendre.leggauss(WAY))
        way = x[:, None] + 0.5 * (1.0 + gauss) * (y - x)[:, None]
        end = ((0.5 * weights) * (y - x)[:, None] / noise(way)).sum(1)
        root = torch.sqrt(h)
        reach = torch.maximum(WIDE * root, end.detach().abs() + ASIDE * root)
        nodes, to_series, slopes = _chebyshev(count)
        # from the middle outwards, on both sides at once
        middle = len(nodes) // 2
        at, places = torch.stack([x, x]), [x[:, None]]
        for k in range(middle, len(nodes) - 1):
            step = (nodes[k + 1] - nodes[k]) / BETWEEN * torch.stack([reach, -reach])
            for _ in range(BETWEEN):
                k1 = noise(at)
                k2 = noise(at + 0.5 * step * k1)
                k3 = noise(at + 0.5 * step * k2)
                at = at + step / 6.0 * (k1 + 2.0 * k2 + 2.0 * k3 + noise(at + step * k3))
            places = [at[1][:, None], *places, at[0][:, None]]
        points = torch.cat(places, 1)
        sigma = noise(points)
        b = sde.drift(0.0, points.reshape(-1, 1))[:, 0].reshape(points.shape)
        mu = (b - 0.5 * (sigma @ slopes.T) / reach[:, None]) / sigma
        return cls(reach, mu @ to_series.T, end, torch.log(noise(y)))

    def coefficients(self, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Drift and (unit) covariance at points (M, K, P, 1)."""
        s = (places[..., 0] / self.reach[:, None, None]).clamp(-1.0, 1.0)
        # Clenshaw's recurrence
        after = before = torch.zeros_like(s)
        for k in range(self.drift.shape[1] - 1, 0, -1):
            after, before = before, self.drift[:, k, None, None] + 2.0 * s * before - after
        b = self.drift[:, 0, None, None] + s * before - after
        return b[..., None], torch.ones_like(places)[..., None]


@lru_cache(maxsize=16)
def _chebyshev(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Nodes in [−1, 1], and matrices from values there to coefficients of Chebyshev polynomials and to slopes."""
    z = np.sin(0.5 * np.pi * np.linspace(-1.0, 1.0, count))
    V = chebyshev.chebvander(z, count - 1)
    series = np.linalg.inv(V)
    slopes = chebyshev.chebvander(z, count - 2) @ chebyshev.chebder(np.eye(count)) @ series
    return torch.as_tensor(z), torch.as_tensor(series), torch.as_tensor(slopes)


def _coefficients(sde: SDE, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(b, Σ) at points (M, K, P, d)."""
    flat = places.reshape(-1, places.shape[-1])
    b, S = sde.drift(0.0, flat), sde.covariance(0.0, flat)
    d = flat.shape[-1]
    return b.reshape(places.shape), S.reshape(*places.shape[:-1], d, d)


def _hermite(z: torch.Tensor, B: Basis) -> torch.Tensor:
    """he_α at points (M, d), shape (M, n)."""
    he = [torch.ones_like(z), z]
    for k in range(1, int(B.degrees[-1])):
        he.append((z * he[k] - math.sqrt(k) * he[k - 1]) / math.sqrt(k + 1))
    table = torch.stack(he, -1)
    return torch.stack([table[:, i, B.indices[:, i]] for i in range(z.shape[1])]).prod(0)
