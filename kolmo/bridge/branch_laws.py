"""Noise laws that keep or drop: branches, coordinates and hidden units, and those that mix two branches."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from kolmo.bridge.laws import NoiseLaw, Output, a_number, checked_keep, is_zero
from kolmo.bridge.variables import (
    ShakeDropFactor,
    Variable,
    bernoulli,
    rank,
    shake_drop,
    shake_drop_deviation,
    uniform,
    variable,
)
from kolmo.errors import InputError


class _Bernoulli(NoiseLaw):
    """Laws with a keep probability."""

    numbers: tuple[str, ...] = ("keep",)
    keep: Any

    @property
    def variable(self) -> Variable:  # type: ignore[override]
        """The standardised Bernoulli variable of this keep probability.

        Raises
        ------
        InputError
            For one probability per layer: ask the law of one layer.
        """
        if isinstance(self.keep, tuple):
            raise InputError("keep", "one value for each layer", "the law of one layer", "use law.layer(k, depth)")
        return bernoulli(float(self.keep))

    def draw(self, shape: Sequence[int], like: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw ζ with the call that torchvision and timm make: the same seed drops the same samples."""
        if generator is None and rank():
            on = uniform(shape, like.dtype, like.device) < self.keep
        else:
            on = like.new_empty(tuple(shape)).bernoulli_(self.keep, generator=generator) > 0
        noise = self._noise_to_signal()
        low = -1 / noise if noise else 0.0
        return torch.where(on, like.new_full((), noise), like.new_full((), low))

    def _noise_to_signal(self) -> Any:
        return ((1 - self.keep) / self.keep) ** 0.5

    @property
    def noiseless(self) -> bool:
        """Whether everything is kept."""
        return bool(np.all(np.asarray(self.keep) == 1.0))


class StochasticDepth(_Bernoulli):
    r"""Drop whole branches: ``hfb/keep`` with one Bernoulli b for each sample; without rescale ``hfb``.

    .. math:: \Delta X = hf\,b/p, \qquad P(b = 1) = p = \text{keep}

    Parameters
    ----------
    keep : float or sequence of float
        Probability of keeping the branch; one, or one for each layer (see `linear_decay`).
    rescale : bool
        True (default): divide by keep, so that the mean is hf ("DropPath"). False: the mean is keep · hf, the test-time
        rule of Huang et al. (2016).
    per : {"sample", "batch"}
        One draw for each sample, as in timm and in torchvision's "row" mode, or one that the batch shares, as Huang et
        al. train. Expected losses are the same; gradients of a batch vary more with the second, and `inject` computes
        no branch that the whole batch drops: its weights get zeros for a gradient, its normalisation no statistics.

    Raises
    ------
    InputError
        For a probability outside (0, 1], and a ``per`` that is not known.

    Examples
    --------
    >>> StochasticDepth(0.5).factor(torch.tensor([[0.1, 0.2]]), h=0.1)
    tensor([[[0.1000],
             [0.2000]]])
    """

    linear = True

    def __init__(self, keep: Any, rescale: bool = True, per: str = "sample") -> None:
        super().__init__()
        if per not in ("sample", "batch"):
            fix = "BranchDropout has one for each coordinate"
            raise InputError("per", repr(per), "'sample' or 'batch'", fix)
        self.keep, self.rescale, self.per = checked_keep(keep), rescale, per

    def mean(self, m: Output) -> Tensor:
        """Return hf, or keep · hf without rescale."""
        return m if self.rescale else self.keep * m  # type: ignore[no-any-return]

    def fluctuation(self, m: Output, zeta: Tensor, h: float) -> Tensor:
        """Mean increment times √((1 − keep)/keep) ζ."""
        mean = self.mean(m)
        return mean.mul(self._noise_to_signal() * zeta)

    def increment(self, m: Output, zeta: Tensor, h: float) -> Tensor:
        """Exactly zero where the branch is dropped."""
        on = (zeta >= 0).to(m.dtype)
        return m * (on / self.keep if self.rescale else on)  # type: ignore[no-any-return]


class BranchDropout(StochasticDepth):
    r"""Dropout on the branch output: ``hfb/keep`` with a Bernoulli b for each coordinate; without rescale ``hfb``.

    .. math:: \Delta X = hf \odot b/p, \qquad P(b_i = 1) = p = \text{keep}

    Parameters
    ----------
    keep : float or sequence of float
        Probability of keeping a coordinate; one, or one for each layer.
    rescale : bool
        True (default): divide by keep (inverted dropout).

    Raises
    ------
    InputError
        For a probability outside (0, 1].

    References
    ----------
    Srivastava, Hinton, Krizhevsky, Sutskever & Salakhutdinov (2014), Dropout, Journal of Machine Learning Research 15.

    Examples
    --------
    >>> BranchDropout(0.8).covariance(torch.tensor([[1.0, 2.0]]), h=0.1)  # (1 − keep)/keep diag(m²)
    tensor([[[0.2500, 0.0000],
             [0.0000, 1.0000]]])
    """

    def __init__(self, keep: Any, rescale: bool = True) -> None:
        super().__init__(keep, rescale)
        self.per = "coordinate"


class ShakeDrop(_Bernoulli):
    r"""Shake-drop: ``hf`` with probability keep, else ``αhf`` with α uniform on (−1, 1), for each sample.

    .. math:: \Delta X = (b + \alpha - b\alpha)\,hf, \qquad P(b = 1) = \text{keep}, \quad \alpha \sim U(-1, 1)

    The mean is keep · hf, the test-time rule of Yamada, Iwamura, Akiba & Kise (2019). The backward pass uses the same
    factor, so that gradients are those of the loss.

    Parameters
    ----------
    keep : float or sequence of float
        Probability of an untouched branch; one, or one for each layer (see `linear_decay`).

    Raises
    ------
    InputError
        For a probability outside (0, 1].

    Examples
    --------
    >>> ShakeDrop(0.5).mean(torch.tensor([[2.0]]))
    tensor([[1.]])
    >>> ShakeDrop(0.5).covariance(torch.tensor([[1.0]]), h=0.1)  # keep + (1 − keep)/3 − keep²
    tensor([[[0.4167]]])
    """

    linear = True

    def __init__(self, keep: Any) -> None:
        super().__init__()
        self.keep = checked_keep(keep)

    @property
    def variable(self) -> Variable:  # type: ignore[override]
        """The standardised factor."""
        return ShakeDropFactor(float(self.keep))

    def mean(self, m: Output) -> Tensor:
        """Return keep · hf."""
        return self.keep * m  # type: ignore[no-any-return]

    def draw(self, shape: Sequence[int], like: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw ζ."""
        return shake_drop(uniform(shape, like.dtype, like.device, generator), self.keep)

    def fluctuation(self, m: Output, zeta: Tensor, h: float) -> Tensor:
        """Return hf times the deviation of the factor, times ζ."""
        return m * (shake_drop_deviation(self.keep) * zeta)  # type: ignore[no-any-return]


class CentredBernoulli(_Bernoulli):
    r"""Depth-consistent dropout: ``hf + c√h f ⊙ (b − keep)/√(keep(1 − keep))``, one Bernoulli b for each coordinate.

    .. math:: \Delta X = hf + c\sqrt h\,f \odot \frac{b - p}{\sqrt{p(1 - p)}}, \qquad P(b_i = 1) = p = \text{keep}

    Noise of size √h keeps its effect as the depth grows: for keep = ½ the network tends to dX = f dt + c f ⊙ dW.
    Away from ½ the noise is skewed and the weak order drops to ½ (Lu, Zhong, Li & Dong, 2018, state the condition).

    Parameters
    ----------
    c : float
        Strength.
    keep : float or sequence of float
        Probability of "on".

    Raises
    ------
    InputError
        For a strength that is no finite number, and a probability outside (0, 1].

    Examples
    --------
    >>> CentredBernoulli(0.5).factor(torch.tensor([[0.25, 0.5]]), h=0.25)
    tensor([[[0.2500, 0.0000],
             [0.0000, 0.5000]]])
    """

    numbers = ("c", "keep")
    per = "coordinate"
    scaling = "diffusive"
    linear = True

    def __init__(self, c: Any, keep: Any = 0.5) -> None:
        super().__init__()
        self.c, self.keep = a_number(c, "c"), checked_keep(keep)

    def fluctuation(self, m: Output, zeta: Tensor, h: float) -> Tensor:
        """Return m cζ/√h with m = h f."""
        return m * ((self.c / math.sqrt(h)) * zeta)  # type: ignore[no-any-return]

    def increment(self, m: Output, zeta: Tensor, h: float) -> Tensor:
        """Return m (1 + cζ/√h)."""
        return m * (1 + (self.c / math.sqrt(h)) * zeta)  # type: ignore[no-any-return]

    @property
    def noiseless(self) -> bool:
        """Whether c is zero or everything is kept."""
        return super().noiseless or is_zero(self.c)


class _Hidden(NamedTuple):
    """Hidden units of a branch and its affine read-out, times h."""

    units: Tensor
    readout: Any
    h: float


class HiddenDropout(_Bernoulli):
    r"""Inverted dropout on the hidden units of a branch whose read-out is affine.

    .. math:: \Delta X = h\,R(u \odot b/p), \qquad f = R(u), \quad P(b_i = 1) = p = \text{keep}

    The increment is ``h · readout(hidden ⊙ b/keep)`` with a Bernoulli b for each unit; its mean is exactly that of the
    plain branch because the read-out is affine.

    Parameters
    ----------
    keep : float or sequence of float
        Probability of keeping a hidden unit.

    Raises
    ------
    InputError
        For a probability outside (0, 1].

    References
    ----------
    Srivastava, Hinton, Krizhevsky, Sutskever & Salakhutdinov (2014), Dropout, Journal of Machine Learning Research 15.

    Examples
    --------
    >>> from kolmo import bridge
    >>> branch, law, x = bridge.MLPBranch.create(2, 8, rng=0), HiddenDropout(0.5), torch.ones(1, 2)
    >>> torch.allclose(law.mean(law.evaluate(branch, x, h=0.1)), 0.1 * branch(x))
    True
    """

    per = "coordinate"

    def __init__(self, keep: Any) -> None:
        super().__init__()
        self.keep = checked_keep(keep)

    def evaluate(self, branch: Any, x: Tensor, h: float) -> Output:
        """Evaluate the hidden units; the read-out comes after the noise.

        Raises
        ------
        InputError
            For branches without ``hidden`` and ``readout``.
        """
        if not (hasattr(branch, "hidden") and hasattr(branch, "readout")):
            raise InputError(
                "branches",
                type(branch).__name__,
                "branches with methods hidden(x) and readout(units), readout affine, for HiddenDropout",
                "use bridge.MLPBranch, or give the branch these two methods",
            )
        return _Hidden(branch.hidden(x), branch.readout, h)

    def mean(self, m: Output) -> Tensor:
        """Return h · readout(hidden)."""
        return m.h * m.readout(m.units)  # type: ignore[no-any-return]

    def noise_shape(self, m: Output, state_ndim: int) -> tuple[int, ...]:
        """One ζ for each hidden unit."""
        return tuple(m.units.shape)

    def fluctuation(self, m: Output, zeta: Tensor, h: float) -> Tensor:
        """H times the linear part of the read-out of hidden · √((1 − keep)/keep) ζ."""
        noise = m.units * (self._noise_to_signal() * zeta)
        return m.h * (m.readout(noise) - m.readout(torch.zeros_like(m.units)))  # type: ignore[no-any-return]

    def increment(self, m: Output, zeta: Tensor, h: float) -> Tensor:
        """Return h · readout(hidden ⊙ b/keep)."""
        return m.h * m.readout(m.units * ((zeta >= 0).to(m.units.dtype) / self.keep))  # type: ignore[no-any-return]


class ShakeShake(NoiseLaw):
    r"""Random mix of two branches: ``h(Uf + (1 − U)g)``, U uniform on (0, 1) for each sample (Gastaldi, 2017).

    .. math:: \Delta X = h\big(Uf + (1 - U)g\big), \qquad U \sim U(0, 1)

    The noise acts along f − g only. The backward pass uses the same U, so that gradients are those of the loss.

    Examples
    --------
    >>> pair = torch.tensor([[0.4, 0.0]]), torch.tensor([[0.2, 0.0]])
    >>> ShakeShake().mean(pair), ShakeShake().covariance(pair, h=0.1)[0, 0, 0]  # (m₁ − m₂)²/12
    (tensor([[0.3000, 0.0000]]), tensor(0.0033))
    """

    variable = variable("uniform")

    def evaluate(self, branch: Any, x: Tensor, h: float) -> Output:
        """Evaluate both branches.

        Raises
        ------
        InputError
            Where a layer has no pair of branches.
        """
        if not isinstance(branch, nn.ModuleList) or len(branch) != 2:
            raise InputError("branches", type(branch).__name__, "a pair of branches for each layer for ShakeShake")
        return h * branch[0](x), h * branch[1](x)

    def mean(self, m: Output) -> Tensor:
        """Return h (f + g)/2."""
        return 0.5 * (m[0] + m[1])  # type: ignore[no-any-return]

    def fluctuation(self, m: Output, zeta: Tensor, h: float) -> Tensor:
        """Return h (f − g) ζ/√12."""
        return (m[0] - m[1]) * (zeta / math.sqrt(12.0))  # type: ignore[no-any-return]

    def increment(self, m: Output, zeta: Tensor, h: float) -> Tensor:
        """Return h (Uf + (1 − U)g) with U = ½ + ζ/√12."""
        U = 0.5 + zeta / math.sqrt(12.0)
        return U * m[0] + (1 - U) * m[1]  # type: ignore[no-any-return]
