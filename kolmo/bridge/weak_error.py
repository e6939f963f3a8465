"""How fast a noisy network tends to its modified equation as the depth grows: tables and plots of weak errors."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kolmo.arrays import at_home
from kolmo.bridge.loss import LossEstimate, expected_loss
from kolmo.bridge.resnet import NoisyResNet
from kolmo.errors import InputError
from kolmo.shown import Shown

_TOLERANCES = (1e-4, 1e-5, 1e-6, 1e-7, 1e-8)
_TRUSTED = 10.0  # a difference counts towards the order when it is this many times its uncertainty
_SHARP = 0.02  # tolerances are tightened until the uncertainty is this part of the difference


@dataclass(frozen=True, repr=False)
class WeakErrorTable(Shown):
    r"""Weak errors of a network over depth.

    Attributes
    ----------
    depths : ndarray, shape (m,)
        Numbers of layers L.
    network, pde : ndarray
        Expected losses by the network and by its modified equation, ``(m, n, k)``.
    difference : ndarray, shape (m,)
        Norm of network − PDE over points and columns, one for each depth.
    uncertainty : ndarray, shape (m,)
        Uncertainty of the difference: error estimates of both sides (two standard errors of a sampled one).
    slopes : ndarray, shape (m - 1,)
        Observed order :math:`\log(e_i/e_{i+1})/\log(L_{i+1}/L_i)` between successive depths; NaN where a
        difference is below ten times its uncertainty.
    order, order_uncertainty : float
        Slope between the deepest trusted pair of depths, and what the uncertainties make of it.

    References
    ----------
    D. Talay and L. Tubaro (1990), Stochastic Analysis and Applications 8.

    Examples
    --------
    >>> from kolmo import bridge
    >>> branch = torch.nn.Linear(1, 1, dtype=torch.float64)
    >>> _ = torch.nn.init.constant_(branch.weight, -0.8), torch.nn.init.zeros_(branch.bias)
    >>> table = bridge.weak_error(lambda depth: bridge.NoisyResNet([branch] * depth, bridge.Additive(0.6)), [4, 8],
    ...     lambda z: z[..., 0] ** 2, torch.tensor([[0.5]], dtype=torch.float64), order=2)
    >>> bool(abs(table.order - 2) < 0.2), table.difference.shape
    (True, (2,))
    """

    depths: np.ndarray
    network: np.ndarray
    pde: np.ndarray
    difference: np.ndarray
    uncertainty: np.ndarray
    slopes: np.ndarray
    order: float
    order_uncertainty: float

    def __str__(self) -> str:
        """Return the table as text."""
        lines = [f"{'depth':>6} {'network':>13} {'PDE':>13} {'difference':>11} {'± ':>9} {'order':>6}"]
        for i, depth in enumerate(self.depths):
            slope = "" if i == 0 or math.isnan(self.slopes[i - 1]) else f"{self.slopes[i - 1]:.2f}"
            lines.append(
                f"{depth:>6} {self.network[i].mean():>13.8f} {self.pde[i].mean():>13.8f} "
                f"{self.difference[i]:>11.3e} {self.uncertainty[i]:>9.1e} {slope:>6}"
            )
        lines.append(f"observed order {self.order:.2f} ± {self.order_uncertainty:.2f}")
        return "\n".join(lines)

    def plot(self, ax: Any = None, label: str | None = None, **style: Any) -> Any:
        """Draw the difference against depth on logarithmic axes, with error bars and a line of the observed order.

        Parameters
        ----------
        ax : matplotlib.axes.Axes, optional
            Where to draw; a new figure by default.
        label : str, optional
            Text of the legend; the observed order is added to it.
        **style
            Passed to ``Axes.errorbar``.

        Returns
        -------
        matplotlib.axes.Axes
        """
        if ax is None:
            import matplotlib.pyplot as plt

            ax = plt.subplots(layout="constrained")[1]
        slope = "" if math.isnan(self.order) else f"order {self.order:.2f} ± {self.order_uncertainty:.2f}"
        text = ", ".join(part for part in (label, slope) if part)
        bars = ax.errorbar(
            self.depths, self.difference, yerr=self.uncertainty, label=text, **{"marker": "o", "capsize": 3, **style}
        )
        if not math.isnan(self.order):
            guide = self.difference[-1] * (self.depths / self.depths[-1]) ** -float(round(2 * self.order) / 2)
            ax.plot(self.depths, guide, linestyle=":", color=bars[0].get_color(), linewidth=1)
        ax.set(xscale="log", yscale="log", xlabel="depth L", ylabel="|network − PDE|")
        ax.set_xticks(self.depths, [str(d) for d in self.depths])
        ax.minorticks_off()
        ax.legend()
        return ax


@at_home
def weak_error(
    make_net: Callable[[int], NoisyResNet],
    depths: Sequence[int],
    loss: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    order: int = 1,
    method: str = "recursion",
    norm: str = "max",
    strict: bool = True,
    depth: str = "layers",
    jumps: bool = False,
    rtol: float | None = None,
    atol: float = 1e-10,
    max_seconds: float | None = None,
    **options: Any,
) -> WeakErrorTable:
    r"""Compare networks of growing depth with the PDE of their modified equation.

    .. math:: \max_j \big|E\,\ell(X_L \mid X_0 = x_j) - u(0, x_j)\big| = O(h^p)

    Parameters
    ----------
    make_net : callable
        ``make_net(depth)`` -> `NoisyResNet`: the same flow with that many layers.
    depths : sequence of int
        At least two depths, increasing.
    loss : callable
        See `expected_loss`.
    x : Tensor, shape (..., d)
        Initial states.
    order : {1, 2, 3}
        Weak order asked of the modified equation.
    method : {"recursion", "enumerate", "monte_carlo"}
        How the network's loss is computed.
    norm : {"max", "rms"}
        Norm of the difference over points and columns.
    strict : bool
        False: also build equations that do not reach the order, to see by how much they fail.
    depth : {"layers", "smooth"}
        See `modified_sde`.
    jumps : bool, default False
        Compare with the equation that reads the noise as jumps; see `modified_sde`.
    rtol, atol : float
        Tolerance of recursion and PDE. rtol=None (default): tightened from 1e-4 to 1e-8 until the uncertainty is 2 %
        of the difference.
    max_seconds : float, optional
        Of each solution of the equation, see `kolmo.solve`.
    **options
        Further options of `expected_loss` for a sampled network (``paths``, ``rng``, ``control_variate``, ...).

    Returns
    -------
    WeakErrorTable
        Print it, or use its ``plot``.

    Raises
    ------
    InputError
        For fewer than two depths, depths that do not increase, a network of another depth, a norm that is not known,
        and as `expected_loss`.

    References
    ----------
    D. Talay and L. Tubaro (1990), Expansion of the global error for numerical schemes solving stochastic differential
    equations, Stochastic Analysis and Applications 8.

    Examples
    --------
    >>> from kolmo import bridge
    >>> branch = torch.nn.Linear(1, 1, dtype=torch.float64)
    >>> _ = torch.nn.init.constant_(branch.weight, -0.8), torch.nn.init.zeros_(branch.bias)
    >>> def make(depth):
    ...     return bridge.NoisyResNet([branch] * depth, bridge.Additive(0.6))
    >>> x = torch.tensor([[0.5], [1.5]], dtype=torch.float64)
    >>> table = bridge.weak_error(make, [4, 8], lambda z: z[..., 0] ** 2, x)
    >>> bool(abs(table.order - 1) < 0.15)
    True
    """
    depths = [int(d) for d in depths]
    if len(depths) < 2 or any(a >= b for a, b in pairwise(depths)):
        raise InputError("depths", depths, "at least two increasing depths")
    if norm not in ("max", "rms"):
        raise InputError("norm", repr(norm), "'max' or 'rms'")
    rows = []
    for layers in depths:
        net = make_net(layers)
        if net.depth != layers:
            raise InputError("make_net", f"{net.depth} layers for depth {layers}", "a network of that depth")
        for tolerance in _TOLERANCES if rtol is None else (rtol,):
            accuracy: dict[str, Any] = {"rtol": tolerance, "atol": atol}
            sampled = method == "monte_carlo"  # what its accuracy is, the number of paths says
            network = expected_loss(net, loss, x, method=method, **({} if sampled else accuracy), **options)
            equation: dict[str, Any] = {"order": order, "strict": strict, "depth": depth, "jumps": jumps}
            pde = expected_loss(net, loss, x, method="pde", **equation, **accuracy, max_seconds=max_seconds)
            distance, error = _compared(network, pde, norm)
            if error <= _SHARP * distance:
                break
        rows.append((network, pde, distance, error))
    difference = np.array([row[2] for row in rows])
    uncertainty = np.array([row[3] for row in rows])
    slopes, errors = _slopes(np.array(depths), difference, uncertainty)
    trusted = np.flatnonzero(~np.isnan(slopes))
    last = trusted[-1] if len(trusted) else None
    return WeakErrorTable(
        np.array(depths),
        np.stack([_columns(row[0].mean, x) for row in rows]),
        np.stack([_columns(row[1].mean, x) for row in rows]),
        difference,
        uncertainty,
        slopes,
        math.nan if last is None else float(slopes[last]),
        math.nan if last is None else float(errors[last]),
    )


def _columns(values: Tensor, x: Tensor) -> np.ndarray:
    return values.double().cpu().numpy().reshape(int(np.prod(x.shape[:-1])), -1)


def _compared(network: LossEstimate, pde: LossEstimate, norm: str) -> tuple[float, float]:
    """Norm of the difference and its uncertainty."""

    def size(values: Tensor) -> float:
        return float(values.abs().max() if norm == "max" else values.square().mean().sqrt())

    errors = torch.zeros_like(network.mean)
    for estimate in (network, pde):
        if estimate.standard_error is not None:
            errors = errors + 2 * estimate.standard_error
        if estimate.error_estimate is not None:
            errors = errors + estimate.error_estimate
    return size(network.mean - pde.mean), size(errors)


def _slopes(depths: np.ndarray, difference: np.ndarray, uncertainty: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Observed orders between successive depths and their uncertainties; NaN where a difference is not trusted."""
    trusted = difference >= _TRUSTED * uncertainty
    step = np.log(depths[1:] / depths[:-1])
    with np.errstate(divide="ignore", invalid="ignore"):
        slopes = np.log(difference[:-1] / difference[1:]) / step
        relative = uncertainty / difference
    errors = (relative[:-1] + relative[1:]) / step
    return np.where(trusted[:-1] & trusted[1:], slopes, math.nan), errors
