r"""What noise costs layer by layer in a network of any size, and how a given total is spent best."""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kolmo.arrays import at_home
from kolmo.bridge.effects import (
    ColumnSteps,
    Estimate,
    Loss,
    Probe,
    Unit,
    jumps,
    probing,
    sampled,
    step_size,
    viscosity,
)
from kolmo.bridge.inject import inject
from kolmo.bridge.laws import NoiseLaw
from kolmo.bridge.selection import Where
from kolmo.bridge.sites import Sites
from kolmo.errors import InputError
from kolmo.shown import Shown

READINGS = ("diffusion", "jumps")
# A share is met to this part of it, in at most so many steps: effects are nearly linear in the variance, mostly.
_MET, _STEPS = 0.02, 16
# The total is met to this part of it, or to two standard errors of the measurement, in at most so many measurements.
_SPENT, _ROUNDS = 0.05, 6
# Powers of its factor with which the effect of all layers together is taken to grow: 1 where effects add.
_POWERS = 0.5, 4.0
# Largest drop probability, and largest variance against the one that was given.
_LARGEST_DROP, _LARGEST_FACTOR = 0.9, 1e4


@dataclass(frozen=True, repr=False)
class SiteEffects(Shown):
    r"""What the noise of site k does to the loss, :math:`e_k = E\,L - L_0`; made by `regularisation` for any model.

    Attributes
    ----------
    rows : Sites
        The sites.
    effects : list of Estimate
        Effect of every site.
    noise_free : float
        Loss without noise.
    reading : {"diffusion", "jumps"}
        How they were read.

    Examples
    --------
    >>> from kolmo import bridge
    >>> class Block(nn.Module):
    ...     def forward(self, x):
    ...         return x + 0.5 * x.flip(-1).cumsum(-1)
    >>> x = torch.ones(4, 2)
    >>> found = bridge.regularisation(Block(), lambda f: f(x).square().mean(), x, law=bridge.Additive(0.1))
    >>> round(found.total.value, 4)  # s² h
    0.01
    """

    rows: Sites
    effects: list[Estimate]
    noise_free: float
    reading: str

    @property
    def total(self) -> Estimate:
        """Sum over the sites: what noise of this law adds to the loss, to first order."""
        return summed(self.effects)

    @property
    def predicted(self) -> float:
        """Noisy loss by this reading."""
        return self.noise_free + self.total.value

    def __str__(self) -> str:
        """Return the effects as a table."""
        width = max(10, *(len(name) for name in self.rows.names))
        lines = [f"{'site':<{width}}  ‖F‖/‖x‖  effect as {self.reading}"]
        pairs = zip(self.rows, self.effects, strict=True)
        lines += [f"{site.name:<{width}}  {site.ratio:7.3f}  {effect}" for site, effect in pairs]
        return "\n".join([*lines, f"{'together':<{width}}  {'':7}  {self.total}, of a loss of {self.noise_free:.4g}"])


def summed(parts: Sequence[Estimate]) -> Estimate:
    """Sum of independent estimates."""
    return Estimate(sum(part.value for part in parts), math.sqrt(sum(part.standard_error**2 for part in parts)))


def by_row(parts: Sequence[Estimate], units: Sequence[Unit]) -> list[Estimate]:
    """Sums over the calls of every row."""
    count = max(unit.row for unit in units) + 1
    return [summed([p for p, unit in zip(parts, units, strict=True) if unit.row == k]) for k in range(count)]


def site_effects(
    probed: tuple[nn.Module, Loss, Any, NoiseLaw | Sequence[NoiseLaw]],
    *,
    where: Where = None,
    batches: Sequence[Any] | None = None,
    reading: str = "diffusion",
    probes: int = 4,
    horizon: float = 1.0,
) -> SiteEffects:
    """Effect of every site's noise on the loss, one way or the other, of model, loss, inputs and law.

    See `regularisation`.
    """
    if reading not in READINGS:
        raise InputError("reading", repr(reading), "'diffusion' or 'jumps'", "bridge.diagnose says which holds")
    with probing(*probed, where, horizon=horizon, batches=batches) as probe:
        found = [read(probe, unit, reading, probes) for unit in probe.units]
        return SiteEffects(Sites(probe.rows), by_row(found, probe.units), float(np.mean(probe.base)), reading)


def read(probe: Probe, unit: Unit, reading: str, probes: int) -> Estimate:
    """Effect of the noise of one addition."""
    if reading == "diffusion":
        return viscosity(probe, unit, probes)
    return jumps(probe, unit, max(2, 2 * probes))


class Regulariser:
    r"""The effect of small noise on a loss, as a term to train with: :math:`\tfrac12\sum_k C_k : \nabla^2 v_k`.

    Every call takes steps ±η along one random column of the noise in all sites together; with independent signs the
    mixed derivatives vanish in the mean, so that the value is an unbiased estimate of the sum over the sites, at the
    cost of three passes, differentiable with respect to all weights and learnable strengths.

    Parameters
    ----------
    model : nn.Module
        The model. Its mode is as you set it: with batch normalisation in training mode the losses are those of the
        batch, and its running statistics see all three passes.
    law : NoiseLaw or sequence of NoiseLaw
        Laws that keep the mean; see `inject`.
    where, inputs, horizon : optional
        See `inject`.

    Raises
    ------
    InputError
        As `inject`; a law that changes the mean.

    References
    ----------
    Camuto, Willetts, Simsekli, Roberts & Holmes (2020), Explicit regularisation in Gaussian noise injections.

    Examples
    --------
    >>> from kolmo import bridge
    >>> class Block(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.fc = nn.Linear(4, 4)
    ...     def forward(self, x):
    ...         return x + torch.tanh(self.fc(x))
    >>> model, x = nn.Sequential(Block(), Block()), torch.randn(32, 4)
    >>> regulariser = Regulariser(model, bridge.StochasticDepth(0.9))
    >>> def loss(f):
    ...     return f(x).square().mean()
    >>> (loss(model) + regulariser(loss)).backward()
    >>> model[0].fc.weight.grad.shape
    torch.Size([4, 4])
    """

    @at_home
    def __init__(
        self,
        model: nn.Module,
        law: NoiseLaw | Sequence[NoiseLaw],
        *,
        where: Where = None,
        inputs: Any = None,
        horizon: float = 1.0,
    ) -> None:
        injection = inject(model, law, where, inputs=inputs, horizon=horizon, batchnorm="train")
        self.rows, self._laws = injection.rows, [noise.law for noise in injection.noises]
        injection.remove()
        if any(not torch.equal(one.mean(torch.ones(1, 1)), torch.ones(1, 1)) for one in self._laws):
            raise InputError("law", "a law that changes the mean", "one that keeps it", "rescale=True")
        self.model, self._horizon = model, horizon
        self._eta: float | None = None

    def __call__(self, loss: Loss) -> Tensor:
        """Estimate the term for a loss ``loss(f)``, f the model.

        Parameters
        ----------
        loss : callable
            ``loss(f)`` -> scalar tensor, such as ``lambda f: cross_entropy(f(x), y)``.
        """
        return self._estimated(self.model, loss)

    @at_home
    def _estimated(self, model: nn.Module, loss: Loss) -> Tensor:
        """The term of the model, where the model is."""
        injection = inject(model, self._laws, self.rows, horizon=self._horizon, batchnorm="train")
        state = torch.get_rng_state()
        try:
            probe = Probe(model, loss, None, injection.noises, self.rows)
            if self._eta is None:
                self._eta = _common_step(probe)
            step = ColumnSteps(self.rows, set(probe.units), self._eta)
            values = []
            after = state
            for change in (step.up, step.down(), None):
                torch.set_rng_state(state)  # the model's own dropout is the same in all three
                values.append(probe.loss(change))
                after = torch.get_rng_state() if change == step.up else after
            torch.set_rng_state(after)  # the next call takes other columns
            return (values[0] + values[1] - 2 * values[2]) / (2 * self._eta**2)
        finally:
            injection.remove()


def _common_step(probe: Probe) -> float:
    """Smallest step size that any site asks for."""
    sizes = []

    def note(at: Unit, m: Tensor, law: NoiseLaw, h: float, axis: int) -> Tensor:
        delta = ColumnSteps(probe.rows, {at}, 1.0).up(at, m, law, h, axis) - m
        sizes.append(step_size(m, delta, probe.rows[at.row].ratio))
        return m

    with torch.no_grad():
        probe.loss(note)
    return min(sizes)


@dataclass(frozen=True, repr=False)
class Schedule(Shown):
    r"""Noise for every site that spends a budget, :math:`\sum_k e_k(q_k) = \text{budget}`; made by `schedule`.

    Attributes
    ----------
    rows : Sites
        The sites.
    laws : list of NoiseLaw
        Law of every site: ``inject(model, schedule.laws, where=schedule.rows)``.
    effects : list of Estimate
        What each does to the loss, alone.
    measured : Estimate
        What they do together, sampled.
    budget : float
        What was to be spent.

    References
    ----------
    Hayou & Ayed (2021), Regularization in ResNet with stochastic depth.

    Examples
    --------
    >>> from kolmo import bridge
    >>> class Block(nn.Module):
    ...     def __init__(self, a):
    ...         super().__init__()
    ...         self.a = a
    ...     def forward(self, x):
    ...         return x + self.a * x.flip(-1).cumsum(-1)
    >>> x = torch.ones(4, 2)
    >>> model = nn.Sequential(Block(0.5), Block(0.1))
    >>> found = bridge.schedule(model, lambda f: f(x).square().mean(), x, bridge.StochasticDepth(0.9), 0.1)
    >>> found.laws[0].keep > found.laws[1].keep  # the larger branch is dropped less
    True
    """

    rows: Sites
    laws: list[NoiseLaw]
    effects: list[Estimate]
    measured: Estimate
    budget: float

    def __str__(self) -> str:
        """Return the schedule as a table."""
        width = max(10, *(len(name) for name in self.rows.names))
        lines = [f"{'site':<{width}}  effect               law"]
        for site, effect, law in zip(self.rows, self.effects, self.laws, strict=True):
            lines.append(f"{site.name:<{width}}  {effect!s:<20} {law}")
        return "\n".join([*lines, f"together: {self.measured} measured, {self.budget:.4g} asked for"])


@at_home
def schedule(
    model: nn.Module,
    loss: Loss,
    inputs: Any,
    law: NoiseLaw,
    budget: float,
    *,
    where: Where = None,
    batches: Sequence[Any] | None = None,
    draws: int = 64,
    rtol: float = 0.05,
    probes: int = 4,
    horizon: float = 1.0,
) -> Schedule:
    r"""Spread noise over the layers so that it adds a given total to the loss.

    With :math:`q_k` the drop probability of layer k, or the variance of its noise, and :math:`e_k(q_k)` its effect on
    the loss,

    .. math:: \max \sum_k \log q_k \quad\text{subject to}\quad \sum_k e_k(q_k) = \text{budget} .

    Effects are proportional to :math:`q_k` where they are small, and then the best schedule gives every layer the same
    share of the budget: layers on which much depends get little noise, others much. Effects are those of `diagnose`
    for jumps, exact for noise in one layer alone. Where no drop probability up to .9 spends a share, the layer gets
    that, and the rest is spread over the others. What all do together is then measured, and where that is not the
    budget, since effects of several layers do not just add, all :math:`q_k` are multiplied by a common factor.

    Parameters
    ----------
    model, loss, inputs, where, batches, horizon
        See `diagnose`.
    law : NoiseLaw
        One law; its ``keep``, or its strength ``s`` or ``c``, is chosen for every site.
    budget : float
        Total effect on the loss, positive.
    draws, rtol
        Of the measurement at the end, see `diagnose`.
    probes : int
        Draws for each site where every coordinate has its own noise.

    Returns
    -------
    Schedule
        Laws for `inject`, their effects, and the measured effect of all together.

    Raises
    ------
    InputError
        As `diagnose`; a budget that is not positive; a law without a number to choose.

    References
    ----------
    Hayou & Ayed (2021), Regularization in ResNet with stochastic depth: survival rates under a budget.

    Examples
    --------
    >>> from kolmo import bridge
    >>> class Block(nn.Module):
    ...     def forward(self, x):
    ...         return x + 0.5 * x.flip(-1).cumsum(-1)
    >>> x = torch.ones(4, 2)
    >>> found = schedule(nn.Sequential(Block(), Block()), lambda f: f(x).square().mean(), x, bridge.Additive(1.0), 0.2)
    >>> [round(effect.value, 2) for effect in found.effects]
    [0.1, 0.1]
    """
    if not budget > 0:
        raise InputError("budget", budget, "a positive number: what the noise may add to the loss")
    name = _chosen(law)
    with probing(model, loss, inputs, law, where, horizon=horizon, batches=batches) as probe:
        shares = _Shares(probe, law, name, probes)

        def measure(found: Sequence[tuple[NoiseLaw, Estimate]]) -> Estimate:
            for noise, (one, _) in zip(probe.noises, found, strict=True):
                noise.law = one
            return sampled(probe, draws=draws, rtol=rtol, seed=0)

        found, measured = _spend(shares, budget, measure)
        return Schedule(Sites(probe.rows), [one for one, _ in found], [effect for _, effect in found], measured, budget)


def _chosen(law: NoiseLaw) -> str:
    """Name of the number of a law that a schedule chooses."""
    for name in ("c", "s", "keep"):
        if name in law.numbers and not isinstance(getattr(law, name), (tuple, nn.Parameter)):
            return name
    raise InputError("law", str(law), "one number keep, s or c", "bridge.StochasticDepth(0.9), say")


def _spend(
    shares: "_Shares", budget: float, measure: Callable[[Sequence[tuple[NoiseLaw, Estimate]]], Estimate]
) -> tuple[list[tuple[NoiseLaw, Estimate]], Estimate]:
    """Equal shares, times the factor with which all together have the effect: the effect as a power of the factor."""
    found, power = shares.spent(budget), 1.0
    measured = measure(found)
    for _ in range(_ROUNDS):
        off = abs(measured.value - budget)
        if measured.value <= 0 or off <= max(_SPENT * budget, 2 * measured.standard_error):
            break
        factor = (budget / measured.value) ** (1 / power)
        found = shares.scaled(found, factor)
        before, measured = measured.value, measure(found)
        if measured.value > 0:
            power = min(_POWERS[1], max(_POWERS[0], math.log(measured.value / before) / math.log(factor)))
    return found, measured


class _Shares:
    """Noise of every site that has a given effect."""

    def __init__(self, probe: Probe, law: NoiseLaw, name: str, probes: int) -> None:
        self._probe, self._law, self._name, self._probes = probe, law, name, probes
        self._largest = _LARGEST_DROP if name == "keep" else _LARGEST_FACTOR

    def spent(self, budget: float) -> list[tuple[NoiseLaw, Estimate]]:
        """Laws and effects; what a site cannot spend goes to the others."""
        found: dict[int, tuple[NoiseLaw, Estimate]] = {}
        open_sites, left = list(range(len(self._probe.rows))), budget
        while open_sites:
            share = left / len(open_sites)
            tried = {k: self._met(k, share) for k in open_sites}
            short = [k for k in open_sites if tried[k][1].value < (1 - 2 * _MET) * share]
            for k in short or open_sites:
                found[k] = tried[k]
                left -= max(0.0, tried[k][1].value)
            open_sites = [k for k in open_sites if k not in short] if short else []
        return [found[k] for k in range(len(self._probe.rows))]

    def scaled(self, found: Sequence[tuple[NoiseLaw, Estimate]], factor: float) -> list[tuple[NoiseLaw, Estimate]]:
        """Laws with that many times the drop probability or variance, and their effects."""
        return [self._at(k, min(self._largest, factor * self._q(law))) for k, (law, _) in enumerate(found)]

    def _q(self, law: NoiseLaw) -> float:
        """Drop probability, or the variance against the one that was given."""
        value = float(getattr(law, self._name))
        return 1 - value if self._name == "keep" else (value / float(getattr(self._law, self._name))) ** 2

    def _met(self, row: int, share: float) -> tuple[NoiseLaw, Estimate]:
        """Law of one site whose effect is the share, or the largest one.

        By proportion, which is right for small effects, within what is known to be too little and too much.
        """
        q, low, high = 0.05 if self._name == "keep" else 1.0, 0.0, math.inf
        for _ in range(_STEPS):
            law, effect = self._at(row, q)
            if abs(effect.value - share) <= _MET * share or (q == self._largest and effect.value < share):
                break
            low, high = (q, high) if effect.value < share else (low, q)
            guess = min(self._largest, q * share / effect.value) if effect.value > 0 else self._largest
            q = guess if low < guess < high else math.sqrt(max(low, 1e-4 * high) * high)
        return law, effect

    def _at(self, row: int, q: float) -> tuple[NoiseLaw, Estimate]:
        """Law with drop probability q, or q times the variance that was given, and its effect."""
        value = 1 - q if self._name == "keep" else math.sqrt(q) * getattr(self._law, self._name)
        law = copy.copy(self._law).replaced(**{self._name: value})
        self._probe.noises[row].law = law
        units = [unit for unit in self._probe.units if unit.row == row]
        effects = [read(self._probe, unit, "jumps", self._probes) for unit in units]
        return law, summed(effects)
