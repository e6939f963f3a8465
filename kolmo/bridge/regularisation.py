r"""What the noise of a network adds to its loss: the small-noise expansion, layer by layer.

Let :math:`v_k` be the loss of the noise-free layers k, …, L − 1 and :math:`x_k` the noise-free path. To first order in
the covariances,

.. math::
    E\,\varphi(X_L) \approx v_0(x_0) + \tfrac12 \sum_k C_k(x_k) : \nabla^2 v_{k+1}(x_{k+1}).

Along the path, :math:`v_k` and its first and second derivatives g and H obey

.. math::
    g_k = (I + J_k)^T g_{k+1}, \qquad H_k = (I + J_k)^T H_{k+1} (I + J_k) + g_{k+1} \cdot m_k'' .
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor, nn

from kolmo.arrays import at_home
from kolmo.bridge.budget import SiteEffects, site_effects
from kolmo.bridge.effects import Loss
from kolmo.bridge.graph import kinks
from kolmo.bridge.jets import Point, layer_point, symmetric, units
from kolmo.bridge.laws import NoiseLaw
from kolmo.bridge.loss import Columns, LossEstimate, expected_loss, refuse_batchnorm
from kolmo.bridge.resnet import NoisyResNet, check_shape
from kolmo.errors import InputError, KolmoWarning
from kolmo.shown import Shown


@dataclass(frozen=True, repr=False)
class Regularisation(Shown):
    r"""Loss of a noisy network, taken apart.

    .. math::
        \text{noisy loss} = \text{noise-free loss} + \text{drift correction}
            + \tfrac12\sum \Sigma\,\Delta t : \nabla^2 u + \text{remainder}

    Attributes
    ----------
    flow : Tensor
        Loss of the flow dX = f dt, the solution of the transport equation; ``(...)`` or ``(..., k)`` as the loss is.
    noise_free : Tensor
        Loss of the mean network, of the same shape. It differs from `flow` by the drift correction, up to O(h²).
    drift : Tensor
        −½ (J_m m)·∇u along the flow, ``(L, ...)``: what taking finite steps does to the loss, layer by layer.
    diffusion : Tensor
        ½ C:∇²u along the noise-free path, ``(L, ...)``: what the noise of each layer does to the loss.
    viscosity : Tensor
        tr C/(2dh) along the path, ``(L, ...)``: the factor of the Laplacian in the Kolmogorov equation, averaged over
        directions, per unit of time.
    exact : LossEstimate or None
        The noisy loss itself, where it was asked for.

    References
    ----------
    Camuto, Willetts, Simsekli, Roberts & Holmes (2020), Explicit regularisation in Gaussian noise injections.

    Examples
    --------
    >>> from kolmo import bridge
    >>> branch = torch.nn.Linear(1, 1, dtype=torch.float64)
    >>> net = bridge.NoisyResNet([branch] * 4, bridge.Additive(0.1))
    >>> parts = bridge.regularisation(net, lambda z: z[..., 0] ** 2, torch.ones(1, 1).double(), method="recursion")
    >>> parts.diffusion.shape, bool(parts.remainder.abs().max() < 1e-6)  # a quadratic loss has no remainder
    (torch.Size([4, 1]), True)
    """

    flow: Tensor
    noise_free: Tensor
    drift: Tensor
    diffusion: Tensor
    viscosity: Tensor
    exact: LossEstimate | None

    @property
    def predicted(self) -> Tensor:
        """Noisy loss by the expansion: `noise_free` plus the `diffusion` of all layers."""
        return self.noise_free + self.diffusion.sum(0)

    @property
    def remainder(self) -> Tensor:
        """Exact noisy loss minus `predicted`: second order in the covariances, first in the third moments.

        Raises
        ------
        InputError
            Where the exact loss was not asked for.
        """
        if self.exact is None:
            raise InputError("method", None, "a method for the exact loss", "regularisation(..., method='recursion')")
        return self.exact.mean - self.predicted

    def __str__(self) -> str:
        """Return the means over the states as text."""
        rows = [
            ("loss of the flow", self.flow),
            ("drift correction", self.drift.sum(0)),
            ("loss of the mean network", self.noise_free),
            ("effect of the noise, ½ C:∇²u", self.diffusion.sum(0)),
            ("predicted noisy loss", self.predicted),
        ]
        if self.exact is not None:
            rows += [(f"noisy loss ({self.exact.method})", self.exact.mean), ("remainder", self.remainder)]
        lines = [f"{text:<30} {value.mean().item():>14.6e}" for text, value in rows]
        viscosity = self.viscosity.flatten(1).mean(1)
        lines.append(f"{'viscosity, first to last layer':<30} {viscosity[0].item():.3e} … {viscosity[-1].item():.3e}")
        return "\n".join(lines)

    def plot(self, ax: Any = None) -> Any:
        """Draw the mean effect of every layer: drift correction and noise.

        Parameters
        ----------
        ax : matplotlib.axes.Axes, optional
            Where to draw; a new figure by default.

        Returns
        -------
        matplotlib.axes.Axes
        """
        if ax is None:
            import matplotlib.pyplot as plt

            ax = plt.subplots(layout="constrained")[1]
        layers = torch.arange(len(self.diffusion))
        for values, label, shift in (
            (self.diffusion, "noise, ½ C:∇²u", -0.2),
            (self.drift, "drift correction, −½ Jm m·∇u", 0.2),
        ):
            ax.bar(layers + shift, values.flatten(1).mean(1).numpy(), width=0.4, label=label)
        ax.axhline(0.0, color="black", linewidth=0.8)
        ax.set(xlabel="layer", ylabel="contribution to the loss")
        ax.legend(frameon=False)
        return ax


@overload
def regularisation(
    net: NoisyResNet, loss: Callable[[Tensor], Tensor], x: Tensor, *, method: str | None = None, **options: Any
) -> Regularisation: ...


@overload
def regularisation(net: nn.Module, loss: Loss, x: Any, *, law: Any, **options: Any) -> SiteEffects: ...


@at_home
def regularisation(
    net: nn.Module,
    loss: Callable[..., Any],
    x: Any,
    *,
    method: str | None = None,
    law: NoiseLaw | Sequence[NoiseLaw] | None = None,
    **options: Any,
) -> Regularisation | SiteEffects:
    r"""Take the expected loss of a noisy network apart, layer by layer.

    .. math::
        E\,\varphi(X_L) \approx \varphi(\Phi_T(x)) - \tfrac12 \sum_k (J_k m_k)\cdot\nabla u
            + \tfrac12 \sum_k C_k : \nabla^2 u

    with Φ the flow of dX = f dt and u its loss. The regulariser of a law is its C: s²h or s²h² times the Laplacian for
    additive noise, the curvature of u along the branch for stochastic depth, the curvature along every coordinate,
    weighted by the squares of the branch, for dropout. Under natural scaling C = O(h²): the sum over L = T/h layers is
    O(h) and vanishes with depth (plain dropout with any fixed keep probability). Under diffusive scaling C = O(h): the
    sum tends to ½ ∫ Σ:∇²u dt, and the effect stays (`CentredBernoulli`).

    With ``law=`` the network is a model of any kind, of states of any shape and width. The second derivatives
    :math:`\tfrac12 C:\nabla^2 v` are then symmetric differences along the noise, site by site, which count the kinks of
    ReLU too, where the expansion above needs smooth branches. `Regulariser` is the same as a term to train with.

    Parameters
    ----------
    net : NoisyResNet, or nn.Module with ``law=``
        A network of vector states; d(d + 1)/2 second derivatives are taken in every layer. Or any model.
    loss : callable
        φ: final states -> ``(...)`` or ``(..., k)``, twice differentiable. With ``law=``: ``loss(f)`` -> scalar, f the
        model, the mean of a loss over samples; ``loss(f, batch)`` with ``batches=``.
    x : Tensor
        Initial states ``(..., d)``. With ``law=``: example inputs of one pass, to find the sites.
    method : {None, "recursion", "enumerate", "monte_carlo", "pde"}
        How to compute the noisy loss itself (see `expected_loss`), for the remainder. None: not at all.
    law : NoiseLaw or sequence of NoiseLaw, optional
        The noise of any model, see `inject`.
    **options
        Options of `expected_loss`. With ``law=``: ``where``, ``batches`` (of equal size; standard errors are then over
        them too), ``reading`` ("diffusion", or "jumps": the exact effect of each site's noise alone, see `diagnose`),
        ``probes`` (draws for each site where every coordinate has its own noise), ``horizon``.

    Returns
    -------
    Regularisation or SiteEffects
        All values detached; print it. The first has a ``plot``, the second is that of ``law=``.

    Raises
    ------
    InputError
        States that are not vectors, BatchNorm in training mode, a loss of the wrong shape, options that are not used.

    Warns
    -----
    KolmoWarning
        Without ``law=``: branches or a loss with kinks, such as those of ReLU.

    References
    ----------
    Camuto, Willetts, Simsekli, Roberts & Holmes (2020), Explicit regularisation in Gaussian noise injections.

    Examples
    --------
    One layer adds the variance of its noise to a square:

    >>> from kolmo import bridge
    >>> net = bridge.NoisyResNet([torch.nn.Identity()], bridge.Additive(0.5))
    >>> x = torch.tensor([[1.0]], dtype=torch.float64)
    >>> parts = bridge.regularisation(net, lambda z: z[..., 0] ** 2, x, method="recursion")
    >>> parts.noise_free.item(), parts.diffusion.sum().item()
    (4.0, 0.25)
    >>> abs(parts.remainder.item()) < 1e-12
    True
    """
    if law is not None and method is not None:
        raise InputError("method", repr(method), "none beside law=", "reading='jumps': the exact effect of each site")
    if law is None and method is None and options:
        needed = "a method that uses them"
        raise InputError(", ".join(options), "given without method=", needed, "method='recursion'")
    if law is not None:
        return site_effects((net, loss, x, law), **options)
    _check(net, x)
    assert isinstance(net, NoisyResNet)
    x = x.detach()
    lead = x.shape[:-1]
    flat = x.reshape(-1, x.shape[-1])
    columns = Columns(loss, 1, lead)
    found = expansion(net, columns, flat)
    flow, drift = _drift_correction(net, columns, flat)
    warn_of_kinks(net, columns, flat)
    exact = None if method is None else expected_loss(net, loss, x, method=method, **options)

    flow, noise_free = (columns.shaped(values.detach()) for values in (flow, found.loss))
    drifts, effects = (torch.stack([columns.shaped(v.detach()) for v in part]) for part in (drift, found.effects))
    viscosity = torch.stack([value.detach().reshape(lead) for value in found.viscosity])
    return Regularisation(flow, noise_free, drifts, effects, viscosity, exact)


class Expansion(NamedTuple):
    """Noise-free loss ``(n, k)``; per layer the effect of the noise ``(n, k)`` and the viscosity ``(n,)``."""

    loss: Tensor
    effects: list[Tensor]
    viscosity: list[Tensor]


def expansion(net: NoisyResNet, columns: Callable[[Tensor], Tensor], x: Tensor) -> Expansion:
    """Expand the loss of states x ``(n, d)`` to first order in the noise; differentiable in everything."""
    points = []
    for k in range(net.depth):
        points.append(layer_point(net, k, x))
        mean = points[-1].mean()
        check_shape(mean, x, k)
        x = x + mean
    loss, slope, curvature = _jet(columns, x)
    effects, viscosity = [], []
    for point in reversed(points):
        G = point.factor().expand(*x.shape, -1)
        effects.append(0.5 * torch.einsum("nir,nkij,njr->nk", G, curvature, G))
        viscosity.append((G**2).sum((-1, -2)) / (2 * x.shape[-1] * net.h))
        slope, curvature = _pulled_back(point, slope, curvature)
    return Expansion(loss, effects[::-1], viscosity[::-1])


def warn_of_kinks(net: NoisyResNet, columns: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """Warn where what comes after the first noise has kinks, whose second derivatives the expansion does not see."""
    with torch.enable_grad():
        state = (x + net.mean_increment(0, x)).detach().requires_grad_()
        for k in range(1, net.depth):
            state = state + net.mean_increment(k, state)
        found = kinks(columns(state))
    if found:
        warnings.warn(
            f"the expansion differentiates twice, and sees nothing of kinks: {', '.join(found)} in the branches or the "
            "loss. regularisation(net, loss, x, law=...) takes differences, which count them",
            KolmoWarning,
            stacklevel=3,
        )


def _check(net: nn.Module, x: Tensor) -> None:
    if not isinstance(net, NoisyResNet):
        raise InputError("net", type(net).__name__, "a NoisyResNet", "for any other model give law=")
    if net.state_ndim != 1:
        raise InputError("net", f"state_ndim = {net.state_ndim}", "vector states (state_ndim = 1)")
    refuse_batchnorm(net)
    if x.ndim < 1 or not x.is_floating_point():
        raise InputError("x", f"{x.dtype} of shape {tuple(x.shape)}", "floating-point states (..., d)")


def _jet(f: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Value ``(n, k)``, gradient ``(n, k, d)`` and Hessian ``(n, k, d, d)`` of f at x."""

    def along(v: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda y: torch.func.jvp(f, (y,), (v,))[1]

    ways = units(x)
    gradient = torch.stack([along(v)(x) for v in ways], -1)
    return f(x), gradient, symmetric(lambda i, j: torch.func.jvp(along(ways[i]), (x,), (ways[j],))[1], len(ways))


def _pulled_back(point: Point, slope: Tensor, curvature: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient and Hessian before the step x -> x + m(x) from those after it."""
    E = point.jacobian() + torch.eye(slope.shape[-1], dtype=slope.dtype, device=slope.device)
    moved = torch.einsum("nai,nkab,nbj->nkij", E, curvature, E)
    return torch.einsum("nai,nka->nki", E, slope), moved + torch.einsum("nka,naij->nkij", slope, point.hessian())


def _drift_correction(net: NoisyResNet, columns: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Loss of the flow dX = f dt, and −½ ∫ (J_m m)·∇u dn over each layer by the trapezoidal rule."""
    path, backward = [x], []
    for k in range(net.depth):
        after, pull = torch.func.vjp(lambda z, k=k: _flowed(net, k, z), path[-1])  # type: ignore[misc]
        path.append(after)
        backward.append(pull)
    loss, slope, _ = _jet(columns, path[-1])
    drift = []
    for k in reversed(range(net.depth)):
        before = torch.stack([backward[k](slope[:, column])[0] for column in range(slope.shape[1])], 1)
        start, end = (
            torch.einsum("nd,nkd->nk", _bend(net, k, z), g) for z, g in ((path[k], before), (path[k + 1], slope))
        )
        drift.append(-0.25 * (start + end))
        slope = before
    return loss, drift[::-1]


def _bend(net: NoisyResNet, k: int, x: Tensor) -> Tensor:
    """J_m m of layer k."""
    point = layer_point(net, k, x)
    return point.along(point.mean(), 0.0)


def _flowed(net: NoisyResNet, k: int, x: Tensor) -> Tensor:
    """Flow of dX = m_k(X) dn over one layer, by one classical Runge–Kutta step."""
    m1 = net.mean_increment(k, x)
    m2 = net.mean_increment(k, x + 0.5 * m1)
    m3 = net.mean_increment(k, x + 0.5 * m2)
    m4 = net.mean_increment(k, x + m3)
    return x + (m1 + 2 * m2 + 2 * m3 + m4) / 6
