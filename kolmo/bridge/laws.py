r"""Noise laws of residual layers.

One layer adds the increment

.. math:: \Delta X = m(X) + \sum_j \zeta_j\, G_j(X), \qquad C(X) = G(X)\,G(X)^T,

with m its mean, C its covariance and ζ_j independent standardised variables. Every law of this module is of that form;
a law says how m and G come from the branch output, and which variable ζ is.
"""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from kolmo.bridge.variables import LogNormalFactor, Variable, bernoulli, log_normal, variable
from kolmo.errors import InputError

Output = Any
"""What `NoiseLaw.evaluate` hands on: h times the branch output, or what the law needs instead of it."""


class WeakOrder(NamedTuple):
    """Highest weak order that a modified SDE of a law reaches, and why not more."""

    order: float
    reason: str


class NoiseLaw(nn.Module, ABC):
    r"""Base class of noise laws; a new law needs `mean`, `fluctuation` and `variable`.

    .. math::
        \Delta X = m + G\zeta, \qquad E\zeta = 0, \quad E\zeta\zeta^T = I, \qquad \operatorname{Cov}\Delta X = GG^T

    with m the mean increment of a layer, shape ``(n, ..., d)``; for vector states G has shape ``(n, d, r)``.

    Attributes
    ----------
    scaling : {"natural", "diffusive"}
        Natural: standard deviation O(h) per layer, so the noise fades as the depth grows. Diffusive: O(√h), so that it
        tends to a diffusion.
    per : {"sample", "coordinate", "batch"}
        How many ζ a state gets: one, one for each coordinate, or one that the whole batch shares. The expected loss of
        one sample is the same for "sample" and "batch"; the variance of a batch mean is not.
    constant : bool
        Whether G does not depend on the state.
    linear : bool
        Whether mean and (unless constant) G are linear in the branch output, so that derivatives of the branch in
        closed form can be used (`MLPBranch.jet`). False is always right.

    Examples
    --------
    A law that multiplies the branch output by 1 + ζ/2 with ζ uniform:

    >>> class Jitter(NoiseLaw):
    ...     variable = variable("uniform")
    ...     def fluctuation(self, m, zeta, h):
    ...         return 0.5 * m * zeta
    >>> Jitter().factor(torch.tensor([[2.0, 4.0]]), 0.1)
    tensor([[[1.],
             [2.]]])
    """

    scaling: str = "natural"
    per: str = "sample"
    constant: bool = False
    linear: bool = False
    numbers: tuple[str, ...] = ()
    """Names of the attributes that may differ from layer to layer; interpolated by ``depth="smooth"``."""

    variable: Variable = variable("gaussian")

    def evaluate(self, branch: Any, x: Tensor, h: float) -> Output:
        """Evaluate the branch: ``h * branch(x)``."""
        return h * branch(x)

    def mean(self, m: Output) -> Tensor:
        """Mean increment."""
        return m  # type: ignore[no-any-return]

    @abstractmethod
    def fluctuation(self, m: Output, zeta: Tensor, h: float) -> Tensor:
        """Random part of the increment, linear in ζ."""

    def increment(self, m: Output, zeta: Tensor, h: float) -> Tensor:
        """Return the increment of the layer."""
        return self.mean(m) + self.fluctuation(m, zeta, h)

    def noise_shape(self, m: Output, state_ndim: int) -> tuple[int, ...]:
        """Shape of ζ for a branch output; it broadcasts against the increment (or its samples)."""
        shape = tuple(self.mean(m).shape)
        if self.per == "coordinate":
            return shape
        if self.per == "batch":
            return (1,) * len(shape)
        return shape[: len(shape) - state_ndim] + (1,) * state_ndim

    def draw(self, shape: Sequence[int], like: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw ζ, of the kind of a given tensor."""
        return self.variable.sample(shape, like.dtype, like.device, generator)

    def sample(self, m: Output, h: float, *, state_ndim: int = 1, generator: torch.Generator | None = None) -> Tensor:
        """Draw an increment for every state of the batch; numbers of half precision are drawn in single precision.

        Raises
        ------
        InputError
            For a strength that does not fit the states.
        """
        if isinstance(m, Tensor) and m.dtype in (torch.float16, torch.bfloat16):
            return self.sample(m.float(), h, state_ndim=state_ndim, generator=generator).to(m.dtype)
        mean = self.mean(m)
        shape = self.noise_shape(m, state_ndim)
        return self.increment(m, self.draw(shape, mean, generator), h)

    def factor(self, m: Output, h: float) -> Tensor:
        """Noise matrix G of shape ``(..., d, r)``: one column for each ζ (vector states)."""
        mean = self.mean(m)
        r = 1 if self.per == "batch" else self.noise_shape(m, 1)[-1]
        eye = torch.eye(r, dtype=mean.dtype, device=mean.device)
        return torch.stack([self.fluctuation(m, eye[j], h).expand(mean.shape) for j in range(r)], -1)

    def covariance(self, m: Output, h: float) -> Tensor:
        """Covariance C = G Gᵀ of the increment, ``(..., d, d)``."""
        G = self.factor(m, h)
        return G @ G.mT

    @property
    def skewness(self) -> float:
        """Skewness E ζ³ of the noise."""
        return self.variable.skewness

    @property
    def excess_kurtosis(self) -> float:
        """Excess kurtosis E ζ⁴ − 3 of the noise."""
        return self.variable.excess_kurtosis

    @property
    def silent(self) -> bool:
        """Whether it has no noise, and none that could be learnt."""
        return self.noiseless and not any(isinstance(p, nn.Parameter) for p in self.parameters())

    @property
    def noiseless(self) -> bool:
        """Whether this law adds no noise at all."""
        return self.variable.bound == 0.0

    def layer(self, k: int, depth: int) -> "NoiseLaw":
        """Return the law of layer k of a network with that many layers (schedules are given as sequences).

        Raises
        ------
        InputError
            For a sequence of another length than the depth.
        """
        chosen = {}
        for name in self.numbers:
            value = getattr(self, name)
            if isinstance(value, tuple):
                if len(value) != depth:
                    raise InputError(
                        name, f"{len(value)} values", f"one for each of the {depth} layers", "see bridge.linear_decay"
                    )
                chosen[name] = value[k]
        return self.replaced(**chosen) if chosen else self

    def replaced(self, **numbers: Any) -> "NoiseLaw":
        """Return a copy with other numbers."""
        law = copy.copy(self)
        law.__dict__.update(numbers)
        return law

    @property
    def jumping(self) -> bool:
        """Whether the noise can be read as jumps: any but Gaussian noise, which is a diffusion."""
        return not self.noiseless and self.variable.name != "gaussian"

    def weak_order(self, jumps: bool = False) -> WeakOrder:
        """Highest weak order of a modified SDE for this law, with the reason for the limit (networks of any depth).

        ``jumps``: of the equation that reads the noise as jumps, where it can be.
        """
        if jumps and self.jumping:
            if self.scaling == "natural":
                return WeakOrder(2, "the drift of the equation with jumps is known to order 2")
            return WeakOrder(1, "with jumps of size sqrt(h) the drift of the equation is known to order 1")
        skewed, heavy = abs(self.skewness) > 1e-12, abs(self.excess_kurtosis) > 1e-12
        if self.noiseless:
            return WeakOrder(3, "the modified equation is known to order 3")
        if self.scaling == "natural":
            if skewed:
                return WeakOrder(
                    2, f"skewness {self.skewness:.3g} of the noise adds a third-order term to the generator"
                )
            return WeakOrder(3, "the modified equation is known to order 3")
        if skewed:
            return WeakOrder(
                0.5, f"skewness {self.skewness:.3g} of noise of size sqrt(h) adds a third-order term of size sqrt(h)"
            )
        if not self.constant:
            return WeakOrder(
                1, "with state-dependent noise of size sqrt(h) the second-order generator has a third-order term"
            )
        if heavy:
            return WeakOrder(
                1,
                f"excess kurtosis {self.excess_kurtosis:.3g} of noise of size sqrt(h) adds a term of size h",
            )
        return WeakOrder(2, "for noise of size sqrt(h) the modified equation is known to order 2")

    def extra_repr(self) -> str:
        """Numbers of the law."""
        return ", ".join(f"{name}={getattr(self, name)}" for name in self.numbers)


def linear_decay(last: float, depth: int) -> list[float]:
    """Keep probabilities :math:`1 - (l/L)(1 - p_L)`, l = 1 … L: the linear-decay rule of stochastic depth.

    Parameters
    ----------
    last : float
        Keep probability :math:`p_L` of the last layer.
    depth : int
        Number of layers L.

    Returns
    -------
    list of float, shape (L,)
        One for each layer.

    References
    ----------
    Huang, Sun, Liu, Sedra & Weinberger (2016), Deep networks with stochastic depth.

    Examples
    --------
    >>> linear_decay(0.5, 4)
    [0.875, 0.75, 0.625, 0.5]
    """
    return [1.0 - (layer / depth) * (1.0 - last) for layer in range(1, depth + 1)]


def _checked_scaling(scaling: str) -> str:
    if scaling not in ("natural", "diffusive"):
        raise InputError("scaling", repr(scaling), "'natural' or 'diffusive'")
    return scaling


def _checked_per(per: str) -> str:
    if per not in ("sample", "coordinate", "batch"):
        raise InputError("per", repr(per), "'sample', 'coordinate' or 'batch'")
    return per


def checked_keep(keep: Any) -> float | tuple[float, ...]:
    """Keep probability, or one for each layer, as floats in (0, 1]."""
    values = np.asarray(keep, dtype=float)
    if values.ndim > 1 or not np.all((values > 0) & (values <= 1)):
        raise InputError("keep", keep, "a probability in (0, 1], or one for each layer", "keep = 1 - drop probability")
    return float(values) if values.ndim == 0 else tuple(float(v) for v in values)


def _strength(s: Any, argument: str) -> float | Tensor:
    """Noise strength as a float or, if it is an array or a tensor, as a tensor that keeps its gradient."""
    value = s if isinstance(s, Tensor) else torch.from_numpy(np.asarray(s, dtype=float))
    if not bool(torch.isfinite(value).all()):
        raise InputError(argument, s, "finite numbers")
    return value if isinstance(s, Tensor) or value.ndim else float(value)


def a_number(s: Any, argument: str) -> float | Tensor:
    """Noise strength that is one number, or a vector of one: sharded training takes no scalars for parameters."""
    value = _strength(s, argument)
    if isinstance(value, Tensor) and tuple(value.shape) not in ((), (1,)):
        raise InputError(argument, f"an array of shape {tuple(value.shape)}", "a number")
    return value


def is_zero(s: float | Tensor) -> bool:
    """Whether a noise strength is zero everywhere."""
    return not (bool(s.any()) if isinstance(s, Tensor) else s)


class Additive(NoiseLaw):
    r"""Additive noise: natural ``h(f + sζ)``, diffusive ``hf + √h sζ``.

    .. math::
        \Delta X = hf + \sqrt h\,s\zeta \text{ (diffusive)}, \qquad \Delta X = h(f + s\zeta) \text{ (natural)}

    Parameters
    ----------
    s : float or array_like
        Strength: a number (every coordinate), ``(d,)`` (a coordinate each) or a matrix ``(d, m)`` that multiplies m
        variables. A tensor that requires grad stays differentiable.
    law : {"gaussian", "uniform", "rademacher", "three-point"}
        Law of ζ.
    scaling : {"diffusive", "natural"}
        See `NoiseLaw`. Default "diffusive".

    Raises
    ------
    InputError
        For a strength that is not finite or has more than two axes, a law or a scaling that is not known.

    References
    ----------
    Camuto, Willetts, Simsekli, Roberts & Holmes (2020), Explicit regularisation in Gaussian noise injections.

    Examples
    --------
    >>> Additive(0.3).covariance(torch.zeros(1, 2), h=0.25)
    tensor([[[0.0225, 0.0000],
             [0.0000, 0.0225]]])
    """

    numbers = ("s",)
    per = "coordinate"
    constant = True
    linear = True

    def __init__(self, s: Any, law: str = "gaussian", scaling: str = "diffusive") -> None:
        super().__init__()
        self.variable = variable(law)
        self.scaling = _checked_scaling(scaling)
        self.s = _strength(s, "s")
        if isinstance(self.s, Tensor) and self.s.ndim > 2:
            raise InputError("s", f"an array of shape {tuple(self.s.shape)}", "a number, (d,) or (d, m)")

    def _size(self, h: float) -> float:
        """√h or h."""
        return math.sqrt(h) if self.scaling == "diffusive" else h

    def noise_shape(self, m: Output, state_ndim: int) -> tuple[int, ...]:
        """Like the increment; with a matrix s the last axis is its number of columns.

        Raises
        ------
        InputError
            For a matrix or vector s of another number of rows than coordinates.
        """
        shape = tuple(m.shape)
        if not isinstance(self.s, Tensor) or self.s.shape in ((), (1,)):
            return shape
        if self.s.shape[0] != shape[-1]:
            raise InputError("s", f"an array of shape {tuple(self.s.shape)}", f"{shape[-1]} rows, one per coordinate")
        return (*shape[:-1], self.s.shape[-1])

    def fluctuation(self, m: Output, zeta: Tensor, h: float) -> Tensor:
        """√h sζ or h sζ."""
        size = self._size(h)
        if not isinstance(self.s, Tensor):
            return (size * self.s) * zeta
        s = self.s.to(m)
        return size * (zeta @ s.mT if s.ndim == 2 else s * zeta)

    def increment(self, m: Output, zeta: Tensor, h: float) -> Tensor:
        """Return m + √h sζ or m + h sζ, in one pass over the numbers where s is one."""
        if isinstance(self.s, Tensor):
            return super().increment(m, zeta, h)
        return torch.add(m, zeta, alpha=self.s * self._size(h))

    def factor(self, m: Output, h: float) -> Tensor:
        """Size times s, the same at every state."""
        s = torch.as_tensor(self.s, dtype=m.dtype, device=m.device)
        if s.ndim < 2:
            s = torch.diag(s.expand(m.shape[-1]))
        return (self._size(h) * s).expand(*m.shape[:-1], *s.shape)

    @property
    def noiseless(self) -> bool:
        """Whether s is zero."""
        return is_zero(self.s)


class Multiplicative(NoiseLaw):
    r"""Noise proportional to the branch output: natural ``hf(1 + sζ)``, diffusive ``hf + √h s f ζ``.

    .. math::
        \Delta X = hf + \sqrt h\,sf \odot \zeta \text{ (diffusive)}, \qquad hf \odot (1 + s\zeta) \text{ (natural)}

    Parameters
    ----------
    s : float
        Strength.
    law : {"gaussian", "uniform", "rademacher", "three-point"}
        Law of ζ.
    per : {"sample", "coordinate", "batch"}
        One ζ for each sample, coordinate, or for the whole batch.
    scaling : {"diffusive", "natural"}
        See `NoiseLaw`. Default "diffusive".

    Raises
    ------
    InputError
        For a strength that is no finite number, a law, a scaling or a ``per`` that is not known.

    Examples
    --------
    >>> Multiplicative(0.5, per="coordinate", scaling="natural").factor(torch.tensor([[0.2, 0.4]]), h=0.1)
    tensor([[[0.1000, 0.0000],
             [0.0000, 0.2000]]])
    """

    numbers = ("s",)
    linear = True

    def __init__(self, s: Any, law: str = "gaussian", per: str = "sample", scaling: str = "diffusive") -> None:
        super().__init__()
        self.variable = variable(law)
        self.scaling = _checked_scaling(scaling)
        self.per, self.s = _checked_per(per), a_number(s, "s")

    def fluctuation(self, m: Output, zeta: Tensor, h: float) -> Tensor:
        """Return m sζ (natural) or m sζ/√h (diffusive), with m = h f."""
        return m * ((self.s if self.scaling == "natural" else self.s / math.sqrt(h)) * zeta)  # type: ignore[no-any-return]

    def increment(self, m: Output, zeta: Tensor, h: float) -> Tensor:
        """Return m (1 + sζ) or m (1 + sζ/√h)."""
        return m * (1 + (self.s if self.scaling == "natural" else self.s / math.sqrt(h)) * zeta)  # type: ignore[no-any-return]

    @property
    def noiseless(self) -> bool:
        """Whether s is zero."""
        return is_zero(self.s)


class LogNormal(NoiseLaw):
    r"""Log-normal factor of mean 1: ``hf exp(σZ − σ²/2)``, Z standard normal; never changes the sign of a branch.

    .. math:: \Delta X = hf \odot e^{\sigma Z - \sigma^2/2}, \qquad Z \sim N(0, 1)

    Parameters
    ----------
    sigma : float or sequence of float
        Standard deviation of the logarithm; one, or one for each layer.
    per : {"sample", "coordinate", "batch"}
        One Z for each sample, coordinate, or for the whole batch.

    Raises
    ------
    InputError
        For a negative σ, and a ``per`` that is not known.

    Examples
    --------
    >>> LogNormal(0.5).covariance(torch.tensor([[1.0]]), h=0.1)  # m² (exp(σ²) − 1)
    tensor([[[0.2840]]])
    """

    numbers = ("sigma",)
    linear = True

    def __init__(self, sigma: Any, per: str = "sample") -> None:
        super().__init__()
        values = np.asarray(sigma, dtype=float)
        if values.ndim > 1 or not np.all((values >= 0) & np.isfinite(values)):
            raise InputError("sigma", sigma, "a number, zero or positive, or one for each layer")
        self.sigma: Any = float(values) if values.ndim == 0 else tuple(values.tolist())
        self.per = _checked_per(per)

    @property
    def variable(self) -> Variable:  # type: ignore[override]
        """The standardised log-normal variable; zero without noise."""
        return LogNormalFactor(self.sigma) if self.sigma else bernoulli(1.0)

    def draw(self, shape: Sequence[int], like: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw ζ."""
        if not self.sigma:
            return like.new_zeros(tuple(shape))
        return log_normal(variable("gaussian").sample(shape, like.dtype, like.device, generator), self.sigma)

    def fluctuation(self, m: Output, zeta: Tensor, h: float) -> Tensor:
        """Return m √(exp(σ²) − 1) ζ."""
        return m * (math.sqrt(math.expm1(self.sigma**2)) * zeta)  # type: ignore[no-any-return]
