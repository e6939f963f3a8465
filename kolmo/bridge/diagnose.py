"""Which reading of a network's noise is right: a diffusion, jumps, or neither."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from kolmo.arrays import at_home
from kolmo.bridge.budget import READINGS, by_row, read, summed
from kolmo.bridge.effects import Estimate, Loss, probing, sampled
from kolmo.bridge.laws import NoiseLaw
from kolmo.bridge.selection import Where
from kolmo.bridge.sites import Sites
from kolmo.bridge.variables import variable
from kolmo.shown import Shown

# Differences from the measurement with which a reading is still said to hold, relative to it.
_DIFFUSION, _JUMPS = 0.10, 0.15


@dataclass(frozen=True, repr=False)
class Diagnosis(Shown):
    r"""Effect :math:`E\,L(\text{noisy}) - L(\text{noise-free})` on a loss, read in three ways; made by `diagnose`.

    Attributes
    ----------
    rows : Sites
        The sites.
    viscosity : list of Estimate
        First order of the diffusion at every site, ½ C:∇²v, and (E ΔX − F)·∇v where a law changes the mean.
    jumps : list of Estimate
        E v(x + ΔX) − v(x + F) at every site with noise there alone: exact to first order in rare events.
    diffusion : Estimate
        Of all sites together, with Gaussian steps of the same mean and covariance: what the equation describes.
    measured : Estimate
        Of all sites together with the law itself, sampled.
    noise_free : float
        The loss without noise.

    References
    ----------
    Camuto, Willetts, Simsekli, Roberts & Holmes (2020), Explicit regularisation in Gaussian noise injections.

    Examples
    --------
    >>> import torch
    >>> from kolmo import bridge
    >>> class Block(nn.Module):
    ...     def forward(self, x):
    ...         return x + 0.5 * x.flip(-1).cumsum(-1)
    >>> x, law = torch.ones(2, 3), bridge.StochasticDepth(0.9)
    >>> found = bridge.diagnose(Block(), lambda f: f(x).square().sum(-1).mean(), x, law)
    >>> abs(found.total_viscosity.value - 0.1 / 0.9 * 0.25 * 14) < 1e-3  # a square: (1 − p)/p |F|²
    True
    """

    rows: Sites
    viscosity: list[Estimate]
    jumps: list[Estimate]
    diffusion: Estimate
    measured: Estimate
    noise_free: float

    @property
    def total_viscosity(self) -> Estimate:
        """Sum over the sites."""
        return summed(self.viscosity)

    @property
    def total_jumps(self) -> Estimate:
        """Sum over the sites."""
        return summed(self.jumps)

    @property
    def resolved(self) -> bool:
        """Whether the measured effect is known well enough to judge: to 15 % (two standard errors)."""
        return 2 * self.measured.standard_error <= _JUMPS * abs(self.measured.value)

    def explains(self, reading: Estimate) -> Estimate:
        """Return a reading as a part of the measured effect."""
        if self.measured.value == 0:
            return Estimate(math.nan, math.nan)
        part = reading.value / self.measured.value
        error = math.hypot(reading.standard_error, part * self.measured.standard_error) / abs(self.measured.value)
        return Estimate(part, error)

    def _holds(self, reading: Estimate, tolerance: float) -> bool:
        error = 2 * math.hypot(reading.standard_error, self.measured.standard_error)
        return abs(reading.value - self.measured.value) <= max(tolerance * abs(self.measured.value), error)

    @property
    def verdict(self) -> str:
        """One of "diffusion", "jumps" and "neither"; the first where both hold."""
        if not self.resolved:
            return "neither"
        if self._holds(self.diffusion, _DIFFUSION):
            return "diffusion"
        return "jumps" if self._holds(self.total_jumps, _JUMPS) else "neither"

    def __str__(self) -> str:
        """Return the table, the readings and, as the last word, the verdict."""
        width = max(9, *(len(name) for name in self.rows.names))
        lines = [f"{'site':<{width}}  ‖F‖/‖x‖  {'viscosity':>20}  {'jumps':>20}"]
        for site, v, j in zip(self.rows, self.viscosity, self.jumps, strict=True):
            lines.append(f"{site.name:<{width}}  {site.ratio:7.3f}  {v!s:>20}  {j!s:>20}")
        lines.append(f"{'together':<{width}}  {'':7}  {self.total_viscosity!s:>20}  {self.total_jumps!s:>20}")
        lines += [
            f"diffusion of the same covariance: {self.diffusion}",
            f"measured: {self.measured}, of a loss of {self.noise_free:.4g}",
            f"the diffusion explains {_percent(self.explains(self.diffusion))} (its first order "
            f"{_percent(self.explains(self.total_viscosity))}), jumps {_percent(self.explains(self.total_jumps))}",
        ]
        if not self.resolved:
            lines.append("the measured effect is too uncertain to tell: more draws or more data")
        return "\n".join([*lines, f"verdict: {self.verdict}"])


@at_home
def diagnose(
    model: nn.Module,
    loss: Loss,
    inputs: Any,
    law: NoiseLaw | Sequence[NoiseLaw],
    *,
    where: Where = None,
    batches: Sequence[Any] | None = None,
    draws: int = 256,
    rtol: float = 0.02,
    probes: int = 4,
    seed: int = 0,
    horizon: float = 1.0,
) -> Diagnosis:
    r"""Compare what noise does to a loss with what a diffusion, and what jumps would do.

    .. math::
        \text{diffusion: } \tfrac12 \sum_k C_k : \nabla^2 v_k, \qquad
        \text{jumps: } \sum_k \mathrm{E}\, v_k(x_k + \Delta X_k) - v_k(x_k + F_k)

    with :math:`v_k` the loss of the noise-free rest of the network. For stochastic depth a summand of the second is
    (1 − p)(v(x) − v(x + F)) + p (v(x + F/p) − v(x + F)). The first is the small-step limit of the second; where a
    dropped branch is no small step, ‖F‖ ≈ ‖x‖, they differ, and no equation of second order describes the noise.

    Parameters
    ----------
    model : nn.Module
        The model; read in evaluation mode, and afterwards as it was.
    loss : callable
        ``loss(f)`` -> scalar, f the model: the mean of a loss over samples, of data of your own.
    inputs : Tensor or sequence, shapes (n, ...)
        Example inputs of one pass, to find the sites (see `sites`).
    law : NoiseLaw or sequence of NoiseLaw
        See `inject`.
    where : optional
        See `inject`.
    batches : sequence, optional
        Batches of equal size; the loss is then called as ``loss(f, batch)``, and its mean over the batches is read.
        The standard errors of the readings of single sites are then over batches too.
    draws : int
        Noisy passes over the data at most, for the measurement and for the diffusion each, after
        ``torch.manual_seed(seed + j)``.
    rtol : float
        Standard error, relative to the effect, at which no more draws are made.
    probes : int
        Draws for each site where every coordinate has its own noise.
    seed : int
        Seed of the first draw.
    horizon : float
        See `inject`.

    Returns
    -------
    Diagnosis
        Print it; its last word is the verdict.

    Raises
    ------
    InputError
        As `inject`; a loss that is no scalar, or does not call the model.

    References
    ----------
    Camuto, Willetts, Simsekli, Roberts & Holmes (2020), Explicit regularisation in Gaussian noise injections; Hayou &
    Ayed (2021), Regularization in ResNet with stochastic depth.

    Examples
    --------
    >>> import torch
    >>> from kolmo import bridge
    >>> class Block(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.fc = nn.Linear(4, 4)
    ...     def forward(self, x):
    ...         return x + 0.1 * torch.tanh(self.fc(x))
    >>> model, x = nn.Sequential(Block(), Block()), torch.randn(50, 4)
    >>> found = diagnose(model, lambda f: f(x).square().sum(-1).mean(), x, bridge.Additive(0.1))
    >>> str(found).split()[-1]
    'diffusion'
    """
    with probing(model, loss, inputs, law, where, horizon=horizon, batches=batches) as probe:
        diffused, jumped = ([read(probe, unit, reading, probes) for unit in probe.units] for reading in READINGS)
        measured = sampled(probe, draws=draws, rtol=rtol, seed=seed)
        if all(noise.law.variable is variable("gaussian") for noise in probe.noises):
            diffusion = measured  # the same draws
        else:
            diffusion = sampled(probe, draws=draws, rtol=rtol, seed=seed, gaussian=True)
        return Diagnosis(
            Sites(probe.rows),
            by_row(diffused, probe.units),
            by_row(jumped, probe.units),
            diffusion,
            measured,
            float(np.mean(probe.base)),
        )


def _percent(part: Estimate) -> str:
    return f"{100 * part.value:.0f} ± {100 * part.standard_error:.0f} %"
