r"""A process between two ends that absorb, in coordinates in which it is noise alone: the march and its numbers.

On :math:`0 < \zeta < 1`, where the ends stand still and the noise is the same everywhere, with drift m in units of it
and own time τ, the density is :math:`e^{\Phi}\psi` with :math:`\Phi = \int m\,d\zeta` and

.. math::
    \partial_\tau\psi = \tfrac12\psi'' - V\psi, \qquad V = \tfrac12(m^2 + m') + \partial_\tau\Phi + \text{killing}.

The first part is exact in sines, the second in values; they alternate by Chin's forward scheme of order four (1997), in
which only ∇V enters, and of which the coefficients are positive. What leaves is a mean of :math:`e^{-\int V}` over
paths, so that its logarithm is accurate where next to nothing leaves too: it is compared with the density for V = 0.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.polynomial import legendre

from kolmo.likelihood.base import LEAST, log_of
from kolmo.likelihood.modes import integrals, polynomials

# Points of the formulas for derivatives and integrals in time and in the middle of the strip.
STENCIL = 9
# Images on each side, and sines, of the density for V = 0, and the own time at which the second take over.
IMAGES, SINES, LATE = 3, 6, 0.35
# Points of the integral over a step of what is like a root; and what Simpson's rule lacks of one in all steps, by that
# in the one where it begins: −ζ(−½)(4 − √8)/(3√8) by 2/3 − (√8 + 1)/6.
ROOTS, STEPS_BEFORE = 8, 1.0037635
# Times and lengths below this are none.
TINY = 1e-30
# Relative accuracy of sums of sines.
ROUNDING = 1e-15


@dataclass(frozen=True)
class Places:
    """Gauss–Legendre points on [0, 1], at which coefficients are known, and what is linear in values there.

    Attributes
    ----------
    points : tensor, shape (Q,)
        Where.
    weights : tensor, shape (Q,)
        Of integrals.
    expand, slopes, ends : tensor, shape (Q, Q), the last (2, Q)
        To coefficients of Legendre polynomials, to derivatives at the points, and to values at the ends.
    """

    points: torch.Tensor
    weights: torch.Tensor
    expand: torch.Tensor
    slopes: torch.Tensor
    ends: torch.Tensor


@lru_cache(maxsize=32)
def places(count: int) -> Places:
    """The points, so many.

    Examples
    --------
    >>> found = places(5)
    >>> bool((found.slopes @ found.points**3 - 3 * found.points**2).abs().max() < 1e-13)
    True
    """
    z, w = legendre.leggauss(count)
    expand = (np.arange(count) + 0.5)[:, None] * legendre.legvander(z, count - 1).T * w
    slopes = 2.0 * legendre.legvander(z, count - 2) @ legendre.legder(np.eye(count)) @ expand
    ends = np.stack([(-1.0) ** np.arange(count), np.ones(count)]) @ expand
    return Places(*(torch.as_tensor(v) for v in (0.5 * (1.0 + z), 0.5 * w, expand, slopes, ends)))


@lru_cache(maxsize=32)
def grid(n: int, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """What is linear in n values between the ends, and in coefficients of so many Legendre polynomials.

    Sines at the n places (n, n), weights of the integral of values, and from coefficients to values, slopes and
    integrals at the places and the two ends (n + 2, count).
    """
    x = np.arange(1, n + 1) / (n + 1.0)
    sines = np.sin(np.pi * np.arange(1, n + 1) * x[:, None])
    weights = in_time(n + 2)[1].sum(0).numpy()[1:-1] / (n + 1.0)
    z = torch.as_tensor(np.concatenate([2.0 * x - 1.0, [-1.0, 1.0]]))
    slopes = 2.0 * legendre.legvander(z.numpy(), count - 2) @ legendre.legder(np.eye(count))
    whole = 0.5 * integrals(z, count)
    return (
        torch.as_tensor(sines),
        torch.as_tensor(weights),
        polynomials(z, count),
        torch.as_tensor(slopes),
        whole,
    )


@lru_cache(maxsize=64)
def in_time(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """At nodes one apart: derivatives there (count, count), and integrals from each to the next (count − 1, count).

    Examples
    --------
    >>> slopes, pieces = in_time(12)
    >>> t = torch.arange(12, dtype=torch.float64)
    >>> bool((slopes @ t**3 - 3 * t**2).abs().max() < 1e-9), round(float((pieces @ t**3).sum()), 6)
    (True, 3660.25)
    """
    width = min(STENCIL, count)
    slopes, pieces = np.zeros((count, count)), np.zeros((count - 1, count))
    local = np.arange(width) - 0.5 * (width - 1)
    inverse = np.linalg.inv(np.vander(local, increasing=True))
    powers = np.arange(width)
    for i in range(count):
        begin = min(max(i - width // 2, 0), count - width)
        at = i - begin - 0.5 * (width - 1)
        row = np.where(powers > 0, powers * at ** np.maximum(powers - 1, 0), 0.0)
        slopes[i, begin : begin + width] = row @ inverse
        if i < count - 1:
            begin = min(max(i - width // 2 + 1, 0), count - width)
            at = i - begin - 0.5 * (width - 1)
            row = ((at + 1.0) ** (powers + 1) - at ** (powers + 1)) / (powers + 1)
            pieces[i, begin : begin + width] = row @ inverse
    return torch.as_tensor(slopes), torch.as_tensor(pieces)


def log_first(tau: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    """Logarithm of the density of the time τ at which noise alone leaves (0, 1) by the end at the distance d.

    Examples
    --------
    >>> t = torch.tensor([0.35 - 1e-9, 0.35 + 1e-9], dtype=torch.float64)  # two formulas
    >>> bool(log_first(t, torch.tensor(0.3).double()).diff().abs() < 1e-7)
    True
    """
    soon, late = tau.clamp(max=LATE), tau.clamp(min=LATE)
    images = 1.0 + 0.0 * soon * d
    for k in range(1, IMAGES + 1):
        for far in (d + 2.0 * k, d - 2.0 * k):
            images = images + far / d * torch.exp(-(far**2 - d**2) / (2.0 * soon))
    early = torch.log(d) - 0.5 * math.log(2.0 * math.pi) - 1.5 * torch.log(soon) - d**2 / (2.0 * soon) + log_of(images)
    rates = torch.arange(1, SINES + 1, dtype=torch.float64) * math.pi
    decay = torch.exp(-0.5 * (rates**2 - rates[0] ** 2) * late[..., None])
    sums = (rates * torch.sin(rates * d[..., None]) * decay).sum(-1)
    return torch.where(tau < LATE, early, log_of(sums) - 0.5 * rates[0] ** 2 * late)


@dataclass(frozen=True)
class Stretch:
    """Coefficients of C processes on a stretch of time without breaks, at its nodes and the middles between them.

    Attributes
    ----------
    t : tensor, shape (C, 2K + 1)
        Times.
    tau : tensor, shape (C, 2K)
        Own time from each to the next.
    width : tensor, shape (C, 2K + 1)
        Distance of the ends in units of noise.
    gauge, potential : tensor, shape (C, 2K + 1, Q)
        m and V per step, as coefficients of Legendre polynomials.
    pace : tensor, shape (C, 2K + 1)
        dτ per step.
    """

    t: torch.Tensor
    tau: torch.Tensor
    width: torch.Tensor
    gauge: torch.Tensor
    potential: torch.Tensor
    pace: torch.Tensor

    @classmethod
    def of(
        cls,
        t: torch.Tensor,
        x: torch.Tensor,
        width: torch.Tensor,
        drift: torch.Tensor,
        noise: torch.Tensor,
        killing: torch.Tensor | None,
    ) -> "Stretch":
        """From places x, drift, noise and killing rate at the points (C, 2K + 1, Q)."""
        found, (slopes, pieces) = places(x.shape[-1]), in_time(t.shape[1])
        per_step = 2.0 * t @ slopes.T  # from a node to a middle is half a step
        speed = 2.0 * torch.einsum("ij,cjq->ciq", slopes, x) / per_step[..., None]
        m = width[..., None] * (drift - speed) / noise - 0.5 * torch.log(noise) @ found.slopes.T
        pace = per_step / width**2
        V = 0.5 * (m**2 + m @ found.slopes.T)
        if killing is not None:
            V = V + killing * width[..., None] ** 2
        gauge = m @ found.expand.T
        phi = gauge @ (0.5 * integrals(2.0 * found.points - 1.0, gauge.shape[-1])).T
        V = pace[..., None] * V + 2.0 * torch.einsum("ij,cjq->ciq", slopes, phi)
        return cls(t, 0.5 * pace @ pieces.T, width, gauge, V @ found.expand.T, pace)


@dataclass(frozen=True)
class Record:
    """What left, at all nodes.

    Attributes
    ----------
    t, tau : tensor, shape (C, M)
        Times and own times, breaks twice.
    first : ndarray of int, shape (M,)
        Node at which the stretch of each begins.
    last : ndarray of int, shape (M,)
        And ends.
    scale : tensor, shape (C, 2, M)
        Logarithm of the density at the ends where V = 0, but for that of :func:`log_first`.
    excess : tensor, shape (C, 2, M)
        What V adds to it.
    noise : tensor, shape (C, 2, M)
        Relative errors by rounding.
    mass : tensor, shape (C, M)
        Logarithm of what is left.
    """

    t: torch.Tensor
    tau: torch.Tensor
    first: np.ndarray
    last: np.ndarray
    scale: torch.Tensor
    excess: torch.Tensor
    noise: torch.Tensor
    mass: torch.Tensor


class Start:
    """Starting points (C, S) in the strip, with their weights."""

    def __init__(self, z: torch.Tensor, weights: torch.Tensor, stretch: Stretch) -> None:
        count = stretch.gauge.shape[-1]
        self.z, y = z, 2.0 * z - 1.0
        self.gauge = 0.5 * (integrals(y, count) * stretch.gauge[:, :1]).sum(-1)
        self.potential = (polynomials(y, count) * stretch.potential[:, :1]).sum(-1)
        self.logs = log_of(weights) - self.gauge

    def log_first(self, side: int, tau: torch.Tensor) -> torch.Tensor:
        """Logarithm of the density for V = 0 at own times (C, M)."""
        d = self.z if side == 0 else 1.0 - self.z
        return torch.logsumexp(self.logs[:, None, :] + log_first(tau[..., None], d[:, None, :]), -1)

    def lacking(self, times: torch.Tensor, slopes: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
        """What the last step before each node lacks of −∫V near the ends: shape (C, 2, M).

        A path that leaves comes as a Bessel process (Williams 1974): at a time s before it is at a distance like √s,
        which Simpson's rule, that is what the scheme is along paths, does not integrate well where V has a slope.

        Parameters
        ----------
        times : tensor, shape (C, M)
            Own times of the nodes.
        slopes : tensor, shape (C, M, 2)
            ∂V/∂ζ per step at the ends.
        steps : tensor, shape (C, M, 2)
            Own times of the two halves of the step before each node, zero where there is none.
        """
        late, early = steps[..., 1], steps.sum(-1)
        # s(r) through 0, the middle and the whole of the step
        bend = 2.0 * early - 4.0 * late
        rho, w = places(ROOTS).points, places(ROOTS).weights
        r = rho**2
        s = r * (early - bend)[..., None] + r**2 * bend[..., None]
        found = []
        for side, d in enumerate((self.z, 1.0 - self.z)):
            at = torch.cat([s, late[..., None], early[..., None]], -1)
            away = _bessel(at[:, :, None, :], times[:, :, None, None], d[:, None, :, None])
            logs = self.logs[:, None, :] + log_first(times.clamp(min=TINY)[..., None], d[:, None, :])
            away = (torch.softmax(logs, -1)[..., None] * away).sum(2)
            short = away[..., :-2] @ (2.0 * rho * w) - (4.0 * away[..., -2] + away[..., -1]) / 6.0
            found.append((2.0 * side - 1.0) * STEPS_BEFORE * slopes[..., side] * short)
        return torch.stack(found, 1)


def _bessel(s: torch.Tensor, tau: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    """Mean at s of the Bessel bridge in three dimensions from 0 to d at τ."""
    tau = tau.clamp(min=TINY)
    part = (s / tau).clamp(max=1.0)
    mean, spread = (d * part).clamp(min=TINY), torch.sqrt((s * (1.0 - part)).clamp(min=TINY))
    ratio = mean / spread
    return spread * math.sqrt(2.0 / math.pi) * torch.exp(-0.5 * ratio**2) + (mean + spread / ratio) * torch.erf(
        ratio * math.sqrt(0.5)
    )


def march(stretches: list[Stretch], start: Start, n: int) -> Record:
    """March n sines through all stretches."""
    count = stretches[0].gauge.shape[-1]
    S, weights, values, slopes, whole = grid(n, count)
    back, k = 2.0 / (n + 1.0) * S, math.pi * torch.arange(1, n + 1, dtype=torch.float64)
    signs = torch.stack([k, -k * torch.cos(k)], 1)  # outward slopes at the ends
    inside, ends = slice(0, n), slice(n, n + 2)
    told: list[tuple[torch.Tensor, ...]] = []
    offset = torch.zeros(len(start.z), dtype=torch.float64)
    tau, phi_before = offset, torch.zeros(())
    a = v = torch.zeros(())
    for number, stretch in enumerate(stretches):
        V, slope = stretch.potential @ values.T, stretch.potential @ slopes.T
        phi = stretch.gauge[:, ::2] @ whole.T
        steps = stretch.tau.shape[1] // 2
        middle = V[:, 1::2, inside] + stretch.pace[:, 1::2, None] * slope[:, 1::2, inside] ** 2 / 48.0
        low, lower = V[:, ::2, inside].detach().amin(-1), middle.detach().amin(-1)
        kick = torch.exp(-(V[:, ::2, inside] - low[..., None]) / 6.0)
        push = torch.exp(-2.0 / 3.0 * (middle - lower[..., None]))
        spread = torch.exp(-0.5 * k**2 * stretch.tau[..., None])
        edge, log_mass = V[:, ::2, ends] / 6.0, phi[:, :, inside]
        scale = phi[:, :, ends] - 2.0 * torch.log(stretch.width[:, ::2])[..., None]
        # taken apart at once: a slice at a time would be put back into the whole at a time in the gradient
        kicks, pushes, spreads, parts, edges_, scales, phis, gauges, at = (
            v.unbind(1) for v in (kick, push, spread, stretch.tau, edge, scale, phi, torch.exp(log_mass), stretch.t)
        )
        if number == 0:
            begin = torch.exp(start.logs - (start.potential - low[:, :1]) / 6.0)
            a = 2.0 * (begin[..., None] * torch.sin(k * start.z[..., None])).sum(1)
            nothing = torch.zeros(len(a), 2, dtype=torch.float64)
            told.append((at[0], tau, scales[0], nothing, nothing, nothing[:, 0]))
        else:
            v = v * torch.exp(phi_before[:, inside] - phis[0][:, inside]) * kicks[0]
            a = v @ back
            _, tau, _, slope_there, noise, mass = told[-1]
            slope_there = slope_there + phi_before[:, ends] - phis[0][:, ends]
            told.append((at[0], tau, scales[0], slope_there, noise, mass))
        offset = offset - low[:, 0] / 6.0
        for j in range(steps):
            v = (a * spreads[2 * j]) @ S * pushes[j]
            a = (v @ back) * spreads[2 * j + 1]
            offset = offset - 2.0 / 3.0 * lower[:, j]
            tau = tau + parts[2 * j] + parts[2 * j + 1]
            out = a @ signs
            noise = ROUNDING * (a.detach().abs() @ signs.abs()) / out.detach().clamp(min=LEAST)
            v = (a @ S) * kicks[j + 1]
            mass = offset - low[:, j + 1] / 6.0 + log_of((v * gauges[j + 1]) @ weights)
            left = offset[:, None] - edges_[j + 1] + log_of(0.5 * out)
            told.append((at[2 * j + 2], tau, scales[j + 1], left, noise, mass))
            offset = offset - low[:, j + 1] / 6.0
            if j < steps - 1:
                a = (v * kicks[j + 1]) @ back
                offset = offset - low[:, j + 1] / 6.0
        phi_before = phis[-1]
    told_slopes = torch.cat([(stretch.potential[:, ::2] @ slopes[ends].T) for stretch in stretches], 1)
    steps_of = [torch.nn.functional.pad(s.tau.reshape(len(s.tau), -1, 2), (0, 0, 1, 0)) for s in stretches]
    t, times, scale, left, noise, mass = (torch.stack(part, -1) for part in zip(*told, strict=True))
    free = torch.stack([start.log_first(side, times[:, 1:]) for side in (0, 1)], 1)
    lacking = start.lacking(times, told_slopes, torch.cat(steps_of, 1))
    left = torch.cat([torch.zeros_like(left[..., :1]), left[..., 1:] - free + lacking[..., 1:]], -1)
    return Record(t, times, *_ends_of(stretches), scale, left, noise, mass)


def _ends_of(stretches: list[Stretch]) -> tuple[np.ndarray, np.ndarray]:
    """For every node in time the first and the last of its stretch."""
    counts = [stretch.tau.shape[1] // 2 + 1 for stretch in stretches]
    edges = np.cumsum([0, *counts])
    return np.repeat(edges[:-1], counts), np.repeat(edges[1:] - 1, counts)
