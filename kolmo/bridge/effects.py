r"""What noise in the branches of a network does to its loss: the machinery of all readings.

Every reading is made of losses at changed branches. At a site with branch F, noise matrix G and noise-free loss v of
the state after the addition, the second derivative along a column of G is taken by a symmetric difference,

.. math::
    \delta^T \nabla^2 v\, \delta \approx \frac{v(x + F + \eta\delta) - 2 v(x + F) + v(x + F - \eta\delta)}{\eta^2},

which in the mean over data is right also for kinks such as those of ReLU, where automatic differentiation sees nothing.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kolmo.bridge.inject import injected
from kolmo.bridge.laws import NoiseLaw
from kolmo.bridge.noise import Noise, moved, sample
from kolmo.bridge.selection import Where
from kolmo.bridge.sites import Site
from kolmo.errors import InputError

Loss = Callable[..., Any]
"""``loss(model)``, or ``loss(model, batch)`` where batches are given, -> a scalar, a mean over samples."""

Losses = NDArray[np.float64]
"""Numbers of the batches."""
Slopes = list[list[list[Tensor]] | None]
"""Gradients of the loss of every batch, by row and call."""

# Step of symmetric differences against the state, where the noise is not smaller: the fourth derivatives hardly count,
# rounding in float32 neither, and enough samples cross a kink.
_STEP = 0.1
# Gauss–Hermite nodes of one site's exact expectation: the loss along one direction is smooth at the scale of the noise.
_NODES = 9
# Expected number of times that the rarest value of an addition's noise is drawn, from which on the spread of the draws
# is believed: with less it is missing altogether in more than 5 % of all cases, exp(-3), and then nothing shows that.
_SEEN = 3.0


class Estimate(NamedTuple):
    """A number and its standard error."""

    value: float
    standard_error: float

    def __str__(self) -> str:
        """Return both as text."""
        return f"{self.value:.4g} ± {self.standard_error:.2g}"


class Unit(NamedTuple):
    """One residual addition of a pass: its row and the number of the call."""

    row: int
    call: int


Change = Callable[[Unit, Tensor, NoiseLaw, float, int], Tensor]
"""``change(unit, m, law, h, axis)`` -> what takes the place of a branch output m."""


class Probe:
    """A model whose residual branches are changed at will, in evaluation mode, and its loss.

    Parameters
    ----------
    model : nn.Module
        The model.
    loss : callable
        See `Loss`.
    batches : sequence or None
        Second arguments of the loss, whose mean over them is taken.
    noises : sequence of Noise
        Noise of every site.
    rows : sequence of Site
        The sites.
    """

    def __init__(
        self, model: nn.Module, loss: Loss, batches: Sequence[Any] | None, noises: Sequence[Noise], rows: Sequence[Site]
    ) -> None:
        self.model, self._loss, self.batches = model, loss, batches
        self.rows, self.noises = rows, noises
        self.units = [Unit(k, call) for k, row in enumerate(rows) for call in range(row.calls)]
        self._counts = [0] * len(rows)
        self._change: Change | None = None
        for k, noise in enumerate(noises):
            noise.change = partial(self._changed, k)

    @property
    def parts(self) -> int:
        """Number of batches."""
        return 1 if self.batches is None else len(self.batches)

    def _changed(self, row: int, m: Tensor, law: NoiseLaw, h: float, axis: int) -> Tensor:
        call = self._counts[row] % self.rows[row].calls
        self._counts[row] += 1
        return m if self._change is None else self._change(Unit(row, call), m, law, h, axis)

    def loss(self, change: Change | None, part: int = 0) -> Tensor:
        """Loss of one batch with changed branches."""
        self._change, self._counts = change, [0] * len(self.rows)
        found = self._loss(self.model) if self.batches is None else self._loss(self.model, self.batches[part])
        found = next(iter(found.values())) if isinstance(found, dict) else found
        value = found if isinstance(found, Tensor) else torch.as_tensor(found)
        if value.numel() != 1:
            raise InputError("loss", f"shape {tuple(value.shape)}", "a scalar, the mean over samples")
        if 0 in self._counts:
            unseen = self.rows[self._counts.index(0)].name
            raise InputError("loss", f"a loss that never calls {unseen!r}", "loss(f) that passes data through f")
        return value.reshape(())

    @cached_property
    def base(self) -> Losses:
        """Losses of all batches as they are."""
        return self.values()

    @cached_property
    def gradients(self) -> Slopes:
        """Gradients of the loss of every batch with respect to every branch."""
        return [self.slopes(part) for part in range(self.parts)]

    @torch.no_grad()
    def values(self, change: Change | None = None) -> Losses:
        """Losses of all batches."""
        return np.array([float(self.loss(change, part)) for part in range(self.parts)])

    def slopes(self, part: int = 0) -> list[list[Tensor]] | None:
        """Gradients of the loss with respect to every branch, call by call; None where it has none."""
        shifts: list[list[Tensor]] = [[] for _ in self.rows]

        def shift(unit: Unit, m: Tensor, law: NoiseLaw, h: float, axis: int) -> Tensor:
            shifts[unit.row].append(torch.zeros_like(m, requires_grad=True))
            return m.detach() + shifts[unit.row][-1] if not m.requires_grad else m + shifts[unit.row][-1]

        with torch.enable_grad():
            value = self.loss(shift, part)
            if not value.requires_grad:
                return None
            found = iter(torch.autograd.grad(value, [s for row in shifts for s in row], materialize_grads=True))
        return [[next(found) for _ in row] for row in shifts]


@contextmanager
def probing(
    model: nn.Module,
    loss: Loss,
    inputs: Any,
    law: NoiseLaw | Sequence[NoiseLaw],
    where: Where,
    *,
    horizon: float,
    batches: Sequence[Any] | None = None,
) -> Iterator[Probe]:
    """Noise in place for the block, in evaluation mode and silent; everything is put back afterwards."""
    injection = injected(model, law, where, inputs, horizon, "train")
    try:
        with injection.noisy(0):
            probe = Probe(model, loss, None if batches is None else list(batches), injection.noises, injection.rows)
            _ = probe.base  # what is wrong with the loss shows at once
            yield probe
    finally:
        injection.remove()


def along(law: NoiseLaw, m: Tensor, zeta: Tensor | float, h: float, axis: int) -> Tensor:
    """Fluctuation G ζ of a branch; a number is the same ζ everywhere, a tensor has the samples in front."""

    def fluctuation(front: Tensor) -> Tensor:
        shape = law.noise_shape(front, front.ndim - 1)
        given = front.new_full(shape, zeta) if isinstance(zeta, (int, float)) else zeta
        return law.fluctuation(front, given, h)

    return moved(m, axis, fluctuation)


def signs(law: NoiseLaw, m: Tensor, axis: int, *, always: bool = False) -> Tensor | float:
    """Random signs for every ζ of a branch; samples do not meet, so that one ζ for each needs none at a single site."""
    if law.per != "coordinate" and not always:
        return 1.0
    front = m.movedim(axis, 0)
    shape = law.noise_shape(front, front.ndim - 1)
    return torch.randint(0, 2, tuple(shape), device=m.device).to(m.dtype) * 2 - 1


def step_size(m: Tensor, delta: Tensor, ratio: float) -> float:
    """η of the symmetric difference: a small part of the state x, at most the noise itself."""
    state = float(m.detach().norm()) / ratio if ratio > 0 and math.isfinite(ratio) else float(m.detach().norm())
    size = float(delta.detach().norm())
    return min(1.0, _STEP * state / size) if size > 0 and state > 0 else 1.0


def viscosity(probe: Probe, unit: Unit, probes: int) -> Estimate:
    r"""½ C:∇²v of one addition, and (E ΔX − F)·∇v where the law changes the mean."""
    count = probes if probe.noises[unit.row].law.per == "coordinate" else 1
    table = np.array([_second(probe, unit) for _ in range(count)]) + _drift(probe, unit)
    return Estimate(float(table.mean()), spread(table))


def spread(table: Losses) -> float:
    """Standard error over draws and batches, of a table (draws, batches): batches share their draw's number only."""
    flat = table.reshape(-1)
    return float(flat.std(ddof=1) / math.sqrt(len(flat))) if len(flat) > 1 else 0.0


def _second(probe: Probe, unit: Unit) -> Losses:
    """Half the second difference along random columns of the noise matrix, batch by batch."""
    step = ColumnSteps(probe.rows, {unit})
    up, down = probe.values(step.up), probe.values(step.down())
    second: Losses = (up + down - 2 * probe.base) / (2 * step.eta**2)
    return second


class ColumnSteps:
    """Steps ±ηδ along random columns δ = Gζ of the noise matrices of some additions, ζ signs.

    Parameters
    ----------
    rows : sequence of Site
        The sites, whose ratios tell the size of the states.
    units : set of Unit
        Additions in which steps are taken.
    eta : float, optional
        Size of the steps; chosen at the first step by default.
    """

    def __init__(self, rows: Sequence[Site], units: set[Unit], eta: float | None = None) -> None:
        self._rows, self._units = rows, units
        self._steps: list[Tensor] = []
        self._eta = eta

    @property
    def eta(self) -> float:
        """Size of the steps against the noise, the same for all."""
        return 1.0 if self._eta is None else self._eta

    def up(self, at: Unit, m: Tensor, law: NoiseLaw, h: float, axis: int) -> Tensor:
        """Step forward, along new columns."""
        if at not in self._units:
            return m
        delta = along(law, m, signs(law, m, axis, always=len(self._units) > 1), h, axis)
        if self._eta is None:
            self._eta = step_size(m, delta, self._rows[at.row].ratio)
        self._steps.append(self._eta * delta)
        return m + self._steps[-1]

    def down(self) -> Change:
        """Return the change that takes the same steps backward, in the same order."""
        steps = iter(self._steps)

        def change(at: Unit, m: Tensor, law: NoiseLaw, h: float, axis: int) -> Tensor:
            return m - next(steps) if at in self._units else m

        return change


def _drift(probe: Probe, unit: Unit) -> Losses:
    """Change of the loss by the mean increment instead of the branch, to first order."""
    one = torch.ones(1, 1)
    if torch.equal(probe.noises[unit.row].law.mean(one), one):
        return np.zeros_like(probe.base)

    def there(sign: float) -> Change:
        def change(at: Unit, m: Tensor, law: NoiseLaw, h: float, axis: int) -> Tensor:
            return m + sign * _STEP * (law.mean(m) - m) if at == unit else m

        return change

    slope: Losses = (probe.values(there(1.0)) - probe.values(there(-1.0))) / (2 * _STEP)
    return slope


def jumps(probe: Probe, unit: Unit, draws: int) -> Estimate:
    r"""E v(x + ΔX) − v(x + F) with noise in one addition alone: exact in its law, whatever the size of ΔX.

    One ζ for each sample (or batch): a sum over the values of ζ, or Gauss quadrature. One for each coordinate: sampled,
    the linear part of known mean taken off.
    """
    law = probe.noises[unit.row].law
    if law.per != "coordinate":
        total = np.zeros_like(probe.base)
        for value, weight in zip(*law.variable.nodes(_NODES), strict=True):
            total += weight * (probe.values(_with_value(unit, float(value))) - probe.base)
        return Estimate(float(total.mean()), spread(total))
    # without their linear part, whose mean is zero
    table = np.array([np.subtract(*drawn(probe, seed, only=unit)) for seed in range(draws)])
    return Estimate(float(table.mean()), spread(table))


def _with_value(unit: Unit, zeta: float) -> Change:
    """The change that makes ζ one value everywhere in an addition."""

    def change(at: Unit, m: Tensor, law: NoiseLaw, h: float, axis: int) -> Tensor:
        def increment(front: Tensor) -> Tensor:
            return law.increment(front, front.new_full(law.noise_shape(front, front.ndim - 1), zeta), h)

        return moved(m, axis, increment) if at == unit else m

    return change


class _Draw:
    """A change that adds one draw of the noise, and sums its linear part."""

    def __init__(self, slopes: list[list[Tensor]] | None, gaussian: bool, only: Unit | None) -> None:
        self._slopes, self._gaussian, self._only = slopes, gaussian, only
        self._calls: dict[int, int] = {}
        self.linear = 0.0

    def __call__(self, at: Unit, m: Tensor, law: NoiseLaw, h: float, axis: int) -> Tensor:
        """Return the increment."""
        place = self._calls.get(at.row, 0)
        self._calls[at.row] = place + 1
        if self._only is not None and at != self._only:
            return m
        mean = law.mean(m)
        if self._gaussian:
            front = m.movedim(axis, 0)
            noise = along(law, m, torch.randn_like(front.new_empty(law.noise_shape(front, front.ndim - 1))), h, axis)
        else:
            noise = sample(law, m, h, axis) - mean
        if self._slopes is not None:
            self.linear += float((self._slopes[at.row][place] * noise).sum())
        return mean + noise


@torch.no_grad()
def drawn(probe: Probe, seed: int, *, gaussian: bool = False, only: Unit | None = None) -> tuple[Losses, Losses]:
    """Effect of one draw of the noise, batch by batch, and the linear part Σ ∇v·(ΔX − E ΔX), whose mean is zero."""
    base, slopes = probe.base, probe.gradients  # before the seed, should they draw
    torch.manual_seed(seed)
    effects, linear = np.empty(probe.parts), np.empty(probe.parts)
    for part in range(probe.parts):
        change = _Draw(slopes[part], gaussian, only)
        effects[part] = float(probe.loss(change, part)) - base[part]
        linear[part] = change.linear
    return effects, linear


def sampled(probe: Probe, *, draws: int, rtol: float, seed: int, gaussian: bool = False) -> Estimate:
    """Effect of all noise together, by draws after ``torch.manual_seed(seed + j)``; their linear part is a control.

    Where a rare value of some addition's noise may never have been drawn, the standard error is infinite.
    """
    rarest = math.inf if gaussian else _rarest(probe)
    effects: list[float] = []
    controls: list[float] = []
    while len(effects) < draws:
        effect, linear = drawn(probe, seed + len(effects), gaussian=gaussian)
        effects.append(float(effect.mean()))
        controls.append(float(linear.mean()))
        if len(effects) >= min(16, draws):
            estimate = controlled(np.array(effects), np.array(controls))
            if rarest * len(effects) < _SEEN:
                estimate = estimate._replace(standard_error=math.inf)
            if estimate.standard_error <= rtol * abs(estimate.value):
                break
    return estimate


def _rarest(probe: Probe) -> float:
    """Expected number of draws of the rarest value of an addition's noise in one pass over the data: the least."""
    expected = dict.fromkeys(probe.units, 0.0)

    def note(at: Unit, m: Tensor, law: NoiseLaw, h: float, axis: int) -> Tensor:
        front = m.movedim(axis, 0)
        expected[at] += math.prod(law.noise_shape(front, front.ndim - 1)) * law.variable.rarest
        return m

    probe.values(note)
    return min(expected.values())


def controlled(effects: Losses, controls: Losses) -> Estimate:
    """Mean of effects with a control of mean zero; each draw is corrected with the coefficient of the others."""
    n = len(effects)
    y, c = effects - effects.mean(), controls - controls.mean()
    square, product = float(c @ c), float(c @ y)
    if n < 4 or square == 0.0:
        return Estimate(float(effects.mean()), float(effects.std(ddof=1) / math.sqrt(n)) if n > 1 else math.inf)
    left = n / (n - 1)  # moments without one draw
    rest = square - left * c**2
    coefficients = np.divide(product - left * c * y, rest, out=np.zeros(n), where=rest > 1e-12 * square)
    corrected = effects - coefficients * controls
    return Estimate(float(corrected.mean()), float(corrected.std(ddof=1) / math.sqrt(n)))
