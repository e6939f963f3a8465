r"""Modified SDEs of noisy residual networks: the diffusions that their layers sample to weak order 1, 2 or 3.

All formulas are written for one layer, with time counted in layers: with m = E ΔX, C = Cov ΔX = G Gᵀ and J the
Jacobian of m,

.. math::

    \text{order 1:}\quad & m, \qquad G \\
    \text{order 2, natural:}\quad & m - \tfrac12 J m, \qquad G \\
    \text{order 2, additive diffusive:}\quad & m - \tfrac12 (J m + \tfrac12 C{:}m''), \qquad G - \tfrac12 J G \\
    \text{order 3, natural:}\quad & m - \tfrac12 J m + \tfrac1{12} m''(m, m) + \tfrac13 J J m - \tfrac14 C{:}m'',
    \qquad G - \tfrac12 (m\cdot\nabla G + J G)

Read as jumps, the generator of one layer is m·∇u + E u(x + ΔX − m) − u, with the law of ΔX itself (a finite set of
displacements, for continuous laws that of a quadrature): all moments of the noise are those of the layer, the third
one too. Natural scaling takes the drift of order 2 as above.

The square of the last factor is C − ½(m·∇C + JC + CJᵀ) plus a term beyond third order, and never indefinite. Per
unit time, drift and covariance are divided by h.
"""

import copy
import math
import warnings
from collections.abc import Callable
from functools import partial
from itertools import pairwise, product
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from kolmo.arrays import at_home
from kolmo.bridge.jets import Field, Point, layer_point
from kolmo.bridge.laws import Additive, NoiseLaw
from kolmo.bridge.resnet import NoisyResNet
from kolmo.errors import InputError, KolmoWarning
from kolmo.problem.sde import SDE

"""A function of layer time n (a scalar tensor) and state x ``(..., d)``."""
# Values of a continuous variable: the nodes of a quadrature that has its first five moments.
_VALUES = 3
# Kinds of jumps at most: each is interpolated at every node.
_MOST_KINDS = 64


@at_home
def modified_sde(
    net: NoisyResNet,
    order: int = 1,
    *,
    depth: str = "layers",
    strict: bool = True,
    dim: int | None = None,
    jumps: bool = False,
) -> SDE:
    r"""SDE that the network samples to the given weak order in h.

    .. math::
        dX = b\,dt + \sigma\,dW; \qquad
        \text{order 1:}\quad b = E[\Delta X]/h, \quad \sigma\sigma^T = \mathrm{Cov}[\Delta X]/h

    Higher orders correct drift and noise matrix; see the formulas at the head of `kolmo.bridge.modified`. Derivatives
    of the branches are exact (forward mode), and coefficients are differentiable with respect to all parameters.

    Parameters
    ----------
    net : NoisyResNet
        A network of vector states.
    order : {1, 2, 3}
        Weak order. Natural scaling: 2 for any law, 3 where the noise has no skewness. Diffusive scaling: 1 without
        skewness, 2 for additive noise with E ζ³ = 0 and E ζ⁴ = 3.
    depth : {"layers", "smooth"}
        "layers": coefficients constant on [kh, (k+1)h), breakpoints kh. "smooth": weights interpolated in time by
        cubics through the layers (layer k at time kh), and Jf becomes ∂_t f + Jf; see `roughness`.
    strict : bool
        False: build the equation also where it does not reach the order, with a warning.
    dim : int, optional
        Dimension of the state where the branches do not tell it.
    jumps : bool, default False
        Read noise that is not Gaussian as jumps: at the rate 1/h, by ΔX − E ΔX with the law's own values (per layer one
        jump in the mean). Reaches order 2 in natural scaling, and 1 in diffusive scaling for skewed laws too, of which
        the diffusion reaches ½; and it holds where steps are rare and large, as of dropped branches.

    Returns
    -------
    kolmo.SDE
        Working on torch tensors.

    Raises
    ------
    InputError
        If the law cannot reach the order (with the reason), the layers cannot be interpolated, or noise read as jumps
        is Gaussian everywhere or has too many values.

    References
    ----------
    Shardlow (2006), Modified equations for stochastic differential equations; Zygalakis (2011), On the existence and
    the applications of modified equations for stochastic differential equations.

    Examples
    --------
    A linear branch f(x) = ax has the modified drift (a − ha²/2) x:

    >>> from kolmo import bridge
    >>> branch = torch.nn.Linear(1, 1, bias=False, dtype=torch.float64)
    >>> _ = torch.nn.init.constant_(branch.weight, -1.0)
    >>> net = bridge.NoisyResNet([branch] * 4, bridge.StochasticDepth(0.5))
    >>> bridge.modified_sde(net, order=2).drift(0.0, torch.ones(1, 1, dtype=torch.float64)).item()
    -1.125

    Its branch adds twice −x/4 or nothing, half the time each; as jumps that is −x/4 more or less than the mean:

    >>> rates, moves = bridge.modified_sde(net, jumps=True).jumps(0.0, torch.ones(1, 1, dtype=torch.float64))
    >>> rates.tolist(), moves.flatten().tolist()
    ([[2.0, 2.0]], [0.25, -0.25])
    """
    if net.state_ndim != 1:
        raise InputError("net", f"state_ndim = {net.state_ndim}", "vector states (state_ndim = 1)")
    if depth not in ("layers", "smooth"):
        raise InputError("depth", repr(depth), "'layers' or 'smooth'")
    dim = net.dim if dim is None else dim
    if jumps:
        _check_jumps(net, depth)
    _check_order(net, order, strict, jumps)
    equation = _Equation(net, order, smooth=depth == "smooth", jumps=jumps)
    diffusion = None
    if not (jumps and all(law.jumping or law.noiseless for law in _laws(net))):
        constant = None if jumps else _constant_noise(net, order)
        diffusion = equation.diffusion if constant is None else constant
    return SDE(
        equation.drift,
        diffusion=diffusion,
        jumps=_Atoms(net, equation, dim).kinds() if jumps else None,
        dim=dim,
        breakpoints=[k * net.h for k in range(1, net.depth)],
        autonomous=depth == "layers",
        arrays="torch",
    )


@at_home
def roughness(net: NoisyResNet) -> float:
    r"""How fast the weights change with depth.

    .. math:: L\,\frac{\sum_l \|\theta_{l+1} - \theta_l\| / (L - 1)}{\sum_l \|\theta_l\| / L}

    Stays bounded as L grows where the weights sample a smooth function of depth; about 1.4 L for independent layers,
    for which an equation that is smooth in depth means nothing.

    Parameters
    ----------
    net : NoisyResNet
        A network whose layers have the same shape.

    Raises
    ------
    InputError
        For layers of different shape, or without weights.

    Examples
    --------
    >>> branch = torch.nn.Linear(2, 2)
    >>> roughness(NoisyResNet([branch] * 8, Additive(0.1)))
    0.0
    """
    weights = [_flat(branch) for branch in net.branches]
    if len({w.shape for w in weights}) > 1 or weights[0].numel() == 0:
        raise InputError("net", "layers of different shape or without weights", "layers of the same shape")
    steps = [float((b - a).norm()) for a, b in pairwise(weights)]
    size = sum(float(w.norm()) for w in weights) / len(weights)
    return net.depth * sum(steps) / max(len(steps), 1) / max(size, 1e-300)


def _flat(module: nn.Module) -> Tensor:
    parts = [p.detach().reshape(-1) for p in module.parameters()]
    return torch.cat(parts) if parts else torch.zeros(0)


def _laws(net: NoisyResNet) -> list[NoiseLaw]:
    return [net.law(k) for k in range(net.depth)]


def _check_jumps(net: NoisyResNet, depth: str) -> None:
    """Refuse what has no jumps."""
    if depth != "layers":
        raise InputError("depth", f"{depth!r} with jumps=True", "'layers'")
    if not any(law.jumping for law in _laws(net)):
        raise InputError("jumps", "True for Gaussian noise", "noise with values of its own", "jumps=False")


def _check_order(net: NoisyResNet, order: int, strict: bool, jumps: bool = False) -> None:
    """Refuse (or warn about) orders that the laws cannot reach."""
    if order not in (1, 2, 3):
        raise InputError("order", order, "1, 2 or 3")
    lowest = min((law.weak_order(jumps) for law in _laws(net)), key=lambda found: found.order)
    if order <= lowest.order:
        return
    diffusive = any(_is_diffusive(law) for law in _laws(net))
    no_formula = (order == 3 and (diffusive or jumps)) or (order == 2 and diffusive and jumps)
    if strict or no_formula:
        raise InputError(
            "order",
            order,
            f"at most {lowest.order:g} for this network: {lowest.reason}",
            "ask for a lower order, or strict=False to build the equation all the same" * (not no_formula),
        )
    warnings.warn(
        f"modified_sde of order {order} is only weakly of order {lowest.order:g}: {lowest.reason}",
        KolmoWarning,
        stacklevel=3,
    )


def _is_diffusive(law: NoiseLaw) -> bool:
    return law.scaling == "diffusive" and not law.noiseless


def _constant_noise(net: NoisyResNet, order: int) -> Any:
    """Return σ where it is the same number or array everywhere, so that solvers can see that; else None."""
    laws = [net.law(k) for k in range(net.depth)]
    first = laws[0]
    if order == 3 or (order == 2 and any(_is_diffusive(law) for law in laws)):
        return None
    if not isinstance(first, Additive) or any(
        type(law) is not type(first) or law.s is not first.s or law.scaling != first.scaling for law in laws
    ):
        return None
    s = first.s.reshape(()) if isinstance(first.s, Tensor) and first.s.shape == (1,) else first.s
    return s if first.scaling == "diffusive" else math.sqrt(net.h) * s


class _LayerField(nn.Module):
    """Mean increment and noise matrix of one layer, as one module whose parameters can be replaced."""

    def __init__(self, branch: nn.Module, law: NoiseLaw, h: float) -> None:
        super().__init__()
        self.branch, self.h = branch, h
        self.laws = [law]  # in a list, so that the law's numbers stay plain attributes

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        law = self.laws[0]
        output = law.evaluate(self.branch, x, self.h)
        return law.mean(output), law.factor(output, self.h)


class _Equation:
    """Coefficients of the modified SDE."""

    def __init__(self, net: NoisyResNet, order: int, *, smooth: bool, jumps: bool = False) -> None:
        self._net, self._order, self._smooth, self._jumps = net, order, smooth, jumps
        self._rate = 1.0 if smooth else 0.0  # d(layer time)/dn in the extended state (n, x)
        self._single = any(p.dtype != torch.float64 for p in net.parameters())
        if smooth:
            _check_smooth(net)

    def _at(self, t: float, x: Tensor) -> "Point":
        """Mean increment, noise matrix and their derivatives at (t, x)."""
        net, x, k = self._net, x.double(), self.layer(t)
        if not self._smooth:
            return layer_point(net, k, x, self.branch(k))
        both = _interpolated(net, k)
        n = torch.tensor(t / net.h, dtype=torch.float64, device=x.device)
        return Point(lambda s, y: both(s, y)[0], lambda s, y: both(s, y)[1], n, x, net.law(k))

    def layer(self, t: float) -> int:
        """Number of the layer at time t."""
        return min(max(int(t / self._net.h + 1e-9), 0), self._net.depth - 1)

    def branch(self, k: int) -> nn.Module:
        """Branch of layer k, in double precision."""
        return _in_double(self._net.branches[k]) if self._single else self._net.branches[k]

    def drift(self, t: float, x: Tensor) -> Tensor:
        """Return the modified drift b(t, x) per unit time."""
        at = self._at(t, x)
        b = mean = at.mean()
        if self._order >= 2:
            bend = at.along(mean, self._rate)
            b = b - 0.5 * bend
            if self._order == 3 or _is_diffusive(at.law):
                G = at.factor()
                b = b - 0.25 * sum(at.second(G[..., j], 0.0) for j in range(G.shape[-1]))
            if self._order == 3:
                b = b + at.second(mean, self._rate) / 12 + at.along(bend, 0.0) / 3
        return b / self._net.h

    def diffusion(self, t: float, x: Tensor) -> Tensor:
        """Return the modified noise matrix σ(t, x), ``(..., d, r)``, per square root of unit time."""
        at = self._at(t, x)
        G = at.factor()
        if self._jumps and at.law.jumping:
            return torch.zeros_like(G)
        if self._order == 3 or (self._order == 2 and _is_diffusive(at.law)):
            pushed = torch.stack([at.along(G[..., j], 0.0) for j in range(G.shape[-1])], -1)
            G = G - 0.5 * (at.factor_along(at.mean(), self._rate) + pushed)
        return G / math.sqrt(self._net.h)


class _Atoms:
    """Values of the noise of every layer with their probabilities: the jumps of the equation."""

    def __init__(self, net: NoisyResNet, equation: _Equation, dim: int | None) -> None:
        if dim is None:
            raise InputError("dim", None, "the dimension of the state", "modified_sde(net, jumps=True, dim=2)")
        self._net, self._equation = net, equation
        found = [self._of_layer(k, dim) for k in range(net.depth)]
        self._count = max(len(weights) for _, weights in found)
        self._values, self._weights = zip(*found, strict=True)

    def _of_layer(self, k: int, dim: int) -> tuple[Tensor, list[float]]:
        """Values ζ, shape (J, r), and their probabilities."""
        law = self._net.law(k)
        if not law.jumping:
            return torch.zeros(0, 1, dtype=torch.float64), []
        x = torch.zeros(1, dim, dtype=torch.float64)
        with torch.no_grad():
            output = law.evaluate(self._equation.branch(k), x, self._net.h)
            r = 1 if law.per == "batch" else law.noise_shape(output, 1)[-1]
        values, weights = law.variable.nodes(_VALUES)
        if len(values) ** r > _MOST_KINDS:
            raise InputError(
                "jumps",
                f"{len(values)}^{r} values of {type(law).__name__} in one layer",
                f"at most {_MOST_KINDS} kinds of jumps",
                "jumps=False, or noise with one variable for each sample",
            )
        grid = list(product(zip(values.tolist(), weights.tolist(), strict=True), repeat=r))
        zeta = torch.tensor([[z for z, _ in point] for point in grid], dtype=torch.float64)
        return zeta, [math.prod(w for _, w in point) for point in grid]

    def kinds(self) -> list[tuple[Field, Field]]:
        """Pairs of rate and displacement."""
        return [(partial(self._rate, j), partial(self._move, j)) for j in range(self._count)]

    def _rate(self, j: int, t: float, x: Tensor) -> Tensor:
        weights = self._weights[self._equation.layer(t)]
        return torch.full_like(x[..., 0], weights[j] / self._net.h if j < len(weights) else 0.0)

    def _move(self, j: int, t: float, x: Tensor) -> Tensor:
        k = self._equation.layer(t)
        zeta, x = self._values[k], x.double()
        if j >= len(zeta):
            return torch.zeros_like(x)
        law, h = self._net.law(k), self._net.h
        output = law.evaluate(self._equation.branch(k), x, h)
        return law.fluctuation(output, zeta[j].to(x.device), h).expand(x.shape)


def _in_double(module: nn.Module) -> nn.Module:
    """Return a copy in double precision through which gradients reach the parameters of the module."""
    twin = copy.copy(module)
    for name in ("_parameters", "_buffers"):
        tensors = {
            key: value.double() if value is not None and value.is_floating_point() else value
            for key, value in getattr(module, name).items()
        }
        twin.__dict__[name] = tensors
    twin.__dict__["_modules"] = {
        key: None if part is None else _in_double(part) for key, part in module._modules.items()
    }
    return twin


def _check_smooth(net: NoisyResNet) -> None:
    """Refuse layers that cannot be interpolated; warn about rough ones."""
    shapes = [[(name, tuple(p.shape)) for name, p in branch.named_parameters()] for branch in net.branches]
    laws = [net.law(k) for k in range(net.depth)]
    if any(s != shapes[0] for s in shapes) or any(
        type(law) is not type(laws[0]) or law.scaling != laws[0].scaling for law in laws
    ):
        raise InputError(
            "depth", "'smooth' for layers that differ in shape or kind of law", "layers of one kind", "depth='layers'"
        )
    if shapes[0] and net.depth > 1 and roughness(net) > 0.5 * net.depth:
        warnings.warn(
            f"the weights change by {roughness(net) / net.depth:.0%} of their size from layer to layer: an equation "
            "smooth in depth does not describe this network; use depth='layers'",
            KolmoWarning,
            stacklevel=4,
        )


def _interpolated(net: NoisyResNet, k: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return m and G of the layer at time n in [k, k + 1), its weights on the cubic through the layers nearby."""
    first = max(min(k - 1, net.depth - 4), 0)
    nodes = range(first, min(first + 4, net.depth))
    places = torch.arange(len(nodes), dtype=torch.float64, device="cpu")  # whatever the default device is
    powers = torch.linalg.inv(torch.vander(places, increasing=True)).T
    stacked = {
        name: torch.stack([dict(net.branches[j].named_parameters())[name].double() for j in nodes])
        for name, _ in net.branches[k].named_parameters()
    }

    def both(n: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        s = n - first
        weights = powers.to(n) @ torch.stack([s**p for p in range(len(nodes))])  # Lagrange's polynomials at n

        def blend(values: list[Any]) -> Any:
            if all(value is values[0] for value in values):
                return values[0]
            return sum(weights[i] * value for i, value in enumerate(values))

        law = net.law(k)
        law = law.replaced(**{name: blend([getattr(net.law(j), name) for j in nodes]) for name in law.numbers})
        blended = {f"branch.{name}": torch.tensordot(weights, values, 1) for name, values in stacked.items()}
        return functional_call(_LayerField(net.branches[k], law, net.h), blended, (x,))  # type: ignore[no-any-return]

    return both
