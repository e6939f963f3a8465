"""Noisy residual networks: X_{k+1} = X_k + ΔX_k with a noise law in every layer."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from kolmo.arrays import default_device
from kolmo.bridge.branch_laws import ShakeShake
from kolmo.bridge.laws import NoiseLaw
from kolmo.bridge.variables import Variable
from kolmo.errors import InputError

Rng = None | int | np.random.Generator | torch.Generator
Draw = Callable[[int, Variable, Sequence[int], Tensor], Tensor]
"""ζ of one layer: ``draw(layer, variable, shape, like)``."""


def as_generator(rng: Rng, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a torch generator from a seed, a NumPy generator, a torch generator, or None (a fresh seed)."""
    if isinstance(rng, torch.Generator):
        return rng
    generator = torch.Generator(device=device)
    if rng is None:
        generator.seed()
    elif isinstance(rng, np.random.Generator):
        generator.manual_seed(int(rng.integers(2**63 - 1)))
    elif isinstance(rng, (int, np.integer)):
        generator.manual_seed(int(rng))
    else:
        raise InputError("rng", type(rng).__name__, "None, an integer, a NumPy generator or a torch generator")
    return generator


class MLPBranch(nn.Module):
    r"""Branch with one hidden layer, :math:`f(x) = W_2 \tanh(W_1 x + b_1) + b_2`.

    Parameters
    ----------
    W1 : Tensor
        ``(width, d)``.
    b1 : Tensor
        ``(width,)``.
    W2 : Tensor
        ``(d, width)``.
    b2 : Tensor, optional
        ``(d,)``; none by default.

    Raises
    ------
    InputError
        If the shapes do not fit together.

    Examples
    --------
    >>> branch = MLPBranch.create(2, 8, rng=0)
    >>> branch(torch.zeros(5, 2)).shape
    torch.Size([5, 2])
    """

    def __init__(self, W1: Any, b1: Any, W2: Any, b2: Any = None) -> None:
        super().__init__()
        W1, b1, W2 = (torch.as_tensor(v) for v in (W1, b1, W2))
        if W1.ndim != 2 or tuple(W2.shape) != tuple(W1.shape[::-1]) or tuple(b1.shape) != (W1.shape[0],):
            raise InputError(
                "W1, b1, W2",
                f"shapes {tuple(W1.shape)}, {tuple(b1.shape)}, {tuple(W2.shape)}",
                "(width, d), (width,), (d, width)",
            )
        self.W1, self.b1, self.W2 = nn.Parameter(W1.clone()), nn.Parameter(b1.clone()), nn.Parameter(W2.clone())
        self.b2: nn.Parameter | None = None if b2 is None else nn.Parameter(torch.as_tensor(b2).clone())
        if self.b2 is not None and tuple(self.b2.shape) != (W2.shape[0],):
            raise InputError("b2", f"shape {tuple(self.b2.shape)}", f"({W2.shape[0]},)")

    @classmethod
    def create(
        cls, dim: int, width: int, *, scale: float = 1.0, rng: Rng = None, dtype: torch.dtype | None = None
    ) -> "MLPBranch":
        """Random branch: W1 and W2 with variance scale²/fan-in, b1 standard normal times scale/2, b2 zero.

        Parameters
        ----------
        dim, width : int
            Dimension of the state and number of hidden units.
        scale : float
            Size of the weights.
        rng : None, int or generator
            Source of randomness.
        dtype : torch.dtype, optional
            Default: torch's default.
        """
        g = as_generator(rng)

        def drawn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=g, device=g.device, dtype=dtype).to(default_device())

        W1 = drawn(width, dim) * (scale / math.sqrt(dim))
        b1 = drawn(width) * (scale / 2)
        W2 = drawn(dim, width) * (scale / math.sqrt(width))
        return cls(W1, b1, W2, torch.zeros(dim, dtype=dtype))

    @property
    def dim(self) -> int:
        """Dimension of the state."""
        return self.W1.shape[1]

    def hidden(self, x: Tensor) -> Tensor:
        """Hidden units tanh(W1 x + b1)."""
        return torch.tanh(functional.linear(x, self.W1, self.b1))

    def readout(self, units: Tensor) -> Tensor:
        """W2 · units + b2."""
        return functional.linear(units, self.W2, self.b2)

    def forward(self, x: Tensor) -> Tensor:
        """Branch output at x of shape ``(..., d)``."""
        return self.readout(self.hidden(x))

    def jet(self, x: Tensor) -> "Jet":
        """Value and first and second derivatives at x, in closed form."""
        return Jet(self, x)


class Jet:
    """Value, first and second directional derivatives of an `MLPBranch` at given points."""

    def __init__(self, branch: MLPBranch, x: Tensor) -> None:
        self._W1, self._W2 = branch.W1, branch.W2
        units = branch.hidden(x)
        self.value = branch.readout(units)
        self._slope = 1 - units**2
        self._curve = -2 * units * self._slope

    def along(self, v: Tensor) -> Tensor:
        """J v."""
        return functional.linear(self._slope * functional.linear(v, self._W1), self._W2)

    def second(self, u: Tensor, v: Tensor) -> Tensor:
        """f''(u, v)."""
        both = functional.linear(u, self._W1) * functional.linear(v, self._W1)
        return functional.linear(self._curve * both, self._W2)

    def jacobian(self) -> Tensor:
        """J, ``(..., d, d)``."""
        weights = torch.einsum("am,mi->mai", self._W2, self._W1)
        return torch.tensordot(self._slope, weights, 1)  # type: ignore[no-any-return]

    def hessian(self) -> Tensor:
        """f'', ``(..., d, d, d)``: component first."""
        weights = torch.einsum("am,mi,mj->maij", self._W2, self._W1, self._W1)
        return torch.tensordot(self._curve, weights, 1)  # type: ignore[no-any-return]


class Averaged(NamedTuple):
    """Mean over noisy passes and its standard error, elementwise."""

    mean: Tensor
    standard_error: Tensor


class Moments(NamedTuple):
    """Mean ``(..., d)`` and covariance ``(..., d, d)`` of the final state."""

    mean: Tensor
    covariance: Tensor


class NoisyResNet(nn.Module):
    r"""A residual network with noise in its layers.

    .. math:: X_{k+1} = X_k + \Delta X_k, \qquad E\,\Delta X_k = h f_k(X_k), \qquad h = T/L

    ``train()``: a noisy pass. ``eval()``: the mean network x + E ΔX.

    Parameters
    ----------
    branches : iterable of nn.Module
        One branch f_k for each of the L layers (a pair of branches for `ShakeShake`).
    noise : NoiseLaw or sequence of NoiseLaw
        One law for all layers, or one for each.
    horizon : float
        T; the step is h = T/L.
    state_ndim : int
        Number of trailing axes that make up one state: 1 for vectors, 3 for images. The others are samples.

    Raises
    ------
    InputError
        No branches, a horizon that is not positive, laws that do not match the layers, a branch that changes shape.

    References
    ----------
    Sun, Tao & Du (2018), Stochastic training of residual networks: a differential equation viewpoint.

    Examples
    --------
    >>> from kolmo import bridge
    >>> net = bridge.NoisyResNet([bridge.MLPBranch.create(2, 8, rng=k) for k in range(4)], bridge.Additive(0.3))
    >>> net.train()(torch.zeros(10, 2), generator=torch.Generator().manual_seed(0)).shape
    torch.Size([10, 2])
    """

    def __init__(self, branches: Iterable[Any], noise: Any, *, horizon: float = 1.0, state_ndim: int = 1) -> None:
        super().__init__()
        self.branches = nn.ModuleList(_as_branch(branch) for branch in branches)
        if len(self.branches) == 0:
            raise InputError("branches", "none", "one nn.Module for each layer")
        if not horizon > 0:
            raise InputError("horizon", horizon, "a positive number")
        if state_ndim < 1:
            raise InputError("state_ndim", state_ndim, "a positive integer")
        self.noise = nn.ModuleList(_laws_of(noise, len(self.branches)))
        for branch, law in zip(self.branches, self.noise, strict=True):
            if isinstance(branch, nn.ModuleList) != isinstance(law, ShakeShake):
                raise InputError(
                    "branches",
                    "pairs of branches" if isinstance(branch, nn.ModuleList) else "single branches",
                    "a pair (f, g) for each layer with ShakeShake, single branches with any other law",
                )
        self.horizon, self.state_ndim = float(horizon), state_ndim

    @property
    def depth(self) -> int:
        """Number of layers L."""
        return len(self.branches)

    @property
    def h(self) -> float:
        """Step h = T/L."""
        return self.horizon / self.depth

    @property
    def dim(self) -> int | None:
        """Dimension of a vector state where the first branch tells it (``dim`` or ``in_features``)."""
        first = self.branches[0]
        first = first[0] if isinstance(first, nn.ModuleList) else first
        dim = getattr(first, "dim", getattr(first, "in_features", None))
        return dim if self.state_ndim == 1 and isinstance(dim, int) else None

    def law(self, k: int) -> NoiseLaw:
        """Noise law of layer k."""
        return self.noise[k]  # type: ignore[return-value]

    def output(self, k: int, x: Tensor) -> Any:
        """Return what the law of layer k makes of the branch at x (see `NoiseLaw.evaluate`)."""
        return self.law(k).evaluate(self.branches[k], x, self.h)

    def mean_increment(self, k: int, x: Tensor) -> Tensor:
        """E ΔX of layer k at x."""
        return self.law(k).mean(self.output(k, x))

    def factor(self, k: int, x: Tensor) -> Tensor:
        """Noise matrix G of layer k at x, ``(..., d, r)``: Cov ΔX = G Gᵀ (vector states)."""
        return self.law(k).factor(self.output(k, x), self.h)

    def step(self, k: int, x: Tensor, draw: Draw | None = None) -> Tensor:
        """Apply layer k: the mean layer without `draw`, else a noisy one."""
        law, output = self.law(k), self.output(k, x)
        mean = law.mean(output)
        check_shape(mean, x, k)
        if draw is None or law.silent:
            return x + mean
        zeta = draw(k, law.variable, law.noise_shape(output, self.state_ndim), mean)
        return x + law.increment(output, zeta, self.h)

    def path(self, x: Tensor, draw: Draw | None = None) -> Tensor:
        """Pass x through all layers with noise from `draw` (None: the mean network), whatever the mode."""
        for k in range(self.depth):
            x = self.step(k, x, draw)
        return x

    def forward(self, x: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Return the final state: noisy in training mode, the mean network in evaluation mode.

        Parameters
        ----------
        x : Tensor
            States; the trailing ``state_ndim`` axes are one state.
        generator : torch.Generator, optional
            Source of the noise; torch's global one by default.
        """
        return self.path(x, independent(generator) if self.training else None)

    @torch.no_grad()
    def mc(self, x: Tensor, n: int, rng: Rng = None) -> Averaged:
        """Average the final state over n noisy passes (test time averaging), whatever the mode.

        Parameters
        ----------
        x : Tensor
            States.
        n : int
            Number of passes, at least 2.
        rng : None, int or generator
            Source of the noise.

        Returns
        -------
        Averaged
            ``mean`` and ``standard_error``, shaped like x.
        """
        generator = as_generator(rng, x.device)
        return average(lambda: self.path(x, independent(generator)), n)

    def corrected(self, x: Tensor) -> Moments:
        r"""Drift-corrected deterministic network: one pass that carries mean and covariance of the state.

        .. math::
            \mu_{k+1} = \mu_k + m_k(\mu_k) + \tfrac12 P_k : m_k''(\mu_k), \qquad
            P_{k+1} = (I + J_k) P_k (I + J_k)^T + C_k(\mu_k)

        The mean network ignores that E m(X) ≠ m(E X); this pass includes it to second order in the noise, so that its
        mean is E X_L up to fourth order. Differentiable; about 3d directional derivatives for each layer.

        Parameters
        ----------
        x : Tensor
            States ``(..., d)``.

        Raises
        ------
        InputError
            For states that are not vectors.
        """
        if self.state_ndim != 1:
            raise InputError("x", f"states with {self.state_ndim} axes", "vector states (state_ndim = 1)")
        d = x.shape[-1]
        P = torch.zeros(*x.shape, d, dtype=x.dtype, device=x.device)
        for k in range(self.depth):

            def m(z: Tensor, k: int = k) -> Tensor:
                return self.mean_increment(k, z)

            G = self.factor(k, x)
            curvature = sum(
                _derivative(lambda z, e=unit: _derivative(m, z, e.expand_as(z)), x, P[..., a])  # type: ignore[misc]
                for a, unit in enumerate(torch.eye(d, dtype=x.dtype, device=x.device))
            )
            half = _pushed(m, x, P)
            P = _pushed(m, x, half.mT) + G @ G.mT
            x = x + m(x) + 0.5 * curvature
        return Moments(x, P)


def check_shape(mean: Tensor, x: Tensor, k: int) -> None:
    """Refuse a branch that changes the shape of the state."""
    if mean.shape != x.shape:
        raise InputError(
            "branches",
            f"output of shape {tuple(mean.shape)} in layer {k} for a state of shape {tuple(x.shape)}",
            "branches that keep the shape",
        )


def _derivative(f: Callable[[Tensor], Tensor], x: Tensor, v: Tensor) -> Tensor:
    """Directional derivative of f at x along v."""
    return torch.func.jvp(f, (x,), (v,))[1]  # type: ignore[no-any-return]


def _pushed(m: Callable[[Tensor], Tensor], x: Tensor, columns: Tensor) -> Tensor:
    """(I + J) applied to every column."""
    moved = [columns[..., j] + _derivative(m, x, columns[..., j]) for j in range(columns.shape[-1])]
    return torch.stack(moved, -1)


def average(sample: Callable[[], Tensor], n: int) -> Averaged:
    """Mean and standard error of n draws, by Welford's running update."""
    if n < 2:
        raise InputError("n", n, "at least 2 passes, to have a standard error")
    mean = sample()
    squares = torch.zeros_like(mean)
    for i in range(2, n + 1):
        delta = sample() - mean
        mean = mean + delta / i
        squares = squares + delta**2 * ((i - 1) / i)
    return Averaged(mean, (squares / (n - 1) / n).sqrt())


def independent(generator: torch.Generator | None) -> Draw:
    """Return independent draws for every state."""

    def draw(k: int, variable: Variable, shape: Sequence[int], like: Tensor) -> Tensor:
        return variable.sample(shape, like.dtype, like.device, generator)

    return draw


def _as_branch(branch: Any) -> nn.Module:
    """Return a branch as a module; a pair of branches as a ModuleList of two."""
    if isinstance(branch, nn.Module):
        return branch
    if isinstance(branch, (tuple, list)) and len(branch) == 2 and all(isinstance(b, nn.Module) for b in branch):
        return nn.ModuleList(branch)
    raise InputError("branches", type(branch).__name__, "an nn.Module, or a pair of them, for each layer")


def _laws_of(noise: Any, depth: int) -> list[NoiseLaw]:
    """One law for each layer."""
    if isinstance(noise, NoiseLaw):
        return [noise.layer(k, depth) for k in range(depth)]
    laws = list(noise) if isinstance(noise, (list, tuple, nn.ModuleList)) else [noise]
    if not all(isinstance(law, NoiseLaw) for law in laws):
        raise InputError("noise", type(noise).__name__, "a noise law of kolmo.bridge, or one for each layer")
    if len(laws) != depth:
        raise InputError("noise", f"{len(laws)} laws", f"one law, or one for each of the {depth} layers")
    return laws
