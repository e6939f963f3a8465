r"""The PDE as control variate of sampled losses.

Along a path, with :math:`y_k = X_k + m_k`, noise :math:`v_k = \Delta X_k - m_k` and u a solution of the backward
equation,

.. math:: \sum_k \nabla u(t_{k+1}, y_k)\cdot v_k + \tfrac12 v_k^T \nabla^2 u\, v_k - \tfrac12 C_k : \nabla^2 u

has mean zero whatever u is. With u close to the expected loss it removes all but the third order of its variance.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kolmo.bridge.resnet import Draw, NoisyResNet
from kolmo.bridge.sampling import of_paths
from kolmo.errors import InputError
from kolmo.kernels import bspline
from kolmo.problem import KolmogorovProblem
from kolmo.problem.box import Box
from kolmo.problem.sde import SDE
from kolmo.solve import solve

_DEGREE = 3
_NODES = {1: 65, 2: 25, 3: 15}  # per axis
_PILOT = 1024  # paths that show where the network goes
_MARGIN = 0.15  # of their extent, on either side
_EXPLICIT = 2.0  # bound on step times spectral radius for the explicit stepper
_MOST_SUBSTEPS = 4


class ControlVariate:
    """Control variate from a solution saved at the layer times; u is held as cubic splines on a uniform grid.

    Parameters
    ----------
    net : NoisyResNet
        The network.
    solution : kolmo.Solution
        Solution of its backward equation, saved at the layer times.

    Attributes
    ----------
    columns : int
        Number of losses.
    """

    def __init__(self, net: NoisyResNet, solution: Any) -> None:
        lines = [np.asarray(line) for line in solution.grid.nodes]
        if not all(len(line) >= _DEGREE + 2 and np.allclose(np.diff(line), line[1] - line[0]) for line in lines):
            lines = [np.linspace(line.min(), line.max(), _NODES[len(lines)]) for line in lines]
        self._lower = np.array([line[0] for line in lines])
        self._inverse = np.array([1.0 / (line[1] - line[0]) for line in lines])
        nodes = np.stack(np.meshgrid(*lines, indexing="ij"), -1)
        self._splines = [_spline(solution, nodes, (k + 1) * net.h) for k in range(net.depth)]
        self.columns = self._splines[0].shape[-1]

    def add(self, k: int, points: np.ndarray, noise: np.ndarray, C: np.ndarray, total: np.ndarray) -> None:
        """Add the terms of layer k at points ``(n, d)`` to the total ``(n, columns)``; C is ``(n or 1, d, d)``."""
        rows = [np.ascontiguousarray(v, dtype=float) for v in (points, noise, C)]
        bspline.taylor(self._splines[k], self._lower, self._inverse, _DEGREE, *rows, total)


def _spline(solution: Any, nodes: np.ndarray, t: float) -> np.ndarray:
    """Spline coefficients ``(n0, n1, n2, columns)`` of the solution at a layer time."""
    d = nodes.shape[-1]
    times = np.asarray(solution.times)
    index = int(np.argmin(np.abs(times - t)))
    if abs(float(times[index]) - t) > 1e-9 * max(t, 1.0):
        raise InputError(
            "control_variate",
            f"a solution without the layer time {t:g}",
            "a solution saved at all layer times",
            "solve(..., save=[k * net.h for k in range(net.depth + 1)])",
        )
    if tuple(solution.grid.shape) == nodes.shape[:-1]:
        values = np.asarray(solution.values[index])
    else:
        values = np.asarray(solution(nodes.reshape(-1, d), t=float(times[index])))
    values = values.reshape(*nodes.shape[:-1], -1)
    for axis in range(d):
        values = np.moveaxis(bspline.interpolation(np.moveaxis(values, axis, 0), _DEGREE), 0, axis)
    return np.ascontiguousarray(values.reshape(*values.shape[:-1], *(1,) * (3 - d), values.shape[-1]))


@torch.no_grad()
def solved_variate(
    net: NoisyResNet, sde: SDE, loss: Callable[[Tensor], Tensor], x: Tensor, generator: torch.Generator
) -> ControlVariate:
    """Control variate from a coarse solution on a grid around the paths of a pilot run; x is ``(n, d)``."""
    paths = max(2, _PILOT // len(x))
    lower, upper, speed, spread = _pilot(net, x.expand(paths, *x.shape), of_paths(paths, generator))
    margin = _MARGIN * (upper - lower) + 1e-6 * (1.0 + np.abs(upper))
    problem = KolmogorovProblem(sde, loss, net.horizon, Box(lower - margin, upper + margin))
    nodes = _NODES[len(lower)]
    spacing = (upper - lower + 2 * margin) / (nodes - 1)
    # stencils of order six: 6/Δ² for the second derivative, 1.6/Δ for the first
    radius = 3.0 * (spread / spacing**2).sum() + 1.6 * (speed / spacing).sum()
    substeps = max(1, math.ceil(net.h * radius / _EXPLICIT))
    stepper, steps = ("rk4", net.depth * substeps) if substeps <= _MOST_SUBSTEPS else ("mcs", net.depth)
    times = [k * net.h for k in range(net.depth)] + [net.horizon]
    return ControlVariate(net, solve(problem, grid=(nodes,) * len(lower), steps=steps, stepper=stepper, save=times))


def _pilot(net: NoisyResNet, x: Tensor, draw: Draw) -> tuple[np.ndarray, ...]:
    """Lowest and highest states on the way, and the largest drift and variance per unit of time, ``(d,)`` each."""
    d = x.shape[-1]
    seen = [x.reshape(-1, d)]
    speed = spread = torch.zeros(d, dtype=x.dtype)
    for k in range(net.depth):
        law, output = net.law(k), net.output(k, x)
        mean = law.mean(output)
        zeta = draw(k, law.variable, law.noise_shape(output, 1), mean)
        x = x + law.increment(output, zeta, net.h)
        variance = law.factor(output, net.h).square().sum(-1)
        speed = torch.maximum(speed, mean.abs().reshape(-1, d).amax(0) / net.h)
        spread = torch.maximum(spread, variance.reshape(-1, d).amax(0) / net.h)
        seen.append(x.reshape(-1, d))
    states = torch.cat(seen)
    return tuple(v.double().numpy() for v in (states.amin(0), states.amax(0), speed, spread))


def final_state(
    net: NoisyResNet, x: Tensor, draw: Draw, control: ControlVariate | None
) -> tuple[Tensor, Tensor | float]:
    """Final states of noisy passes, and the value of the control variate along them."""
    if control is None:
        return net.path(x, draw), 0.0
    d = x.shape[-1]
    total = np.zeros((x.numel() // d, control.columns))
    for k in range(net.depth):
        law, output = net.law(k), net.output(k, x)
        mean = law.mean(output)
        zeta = draw(k, law.variable, law.noise_shape(output, net.state_ndim), mean)
        increment = law.increment(output, zeta, net.h)
        C = law.covariance(output, net.h).expand(*x.shape, d).reshape(-1, d, d)
        points, noise = (np.asarray(row.reshape(-1, d)) for row in (x + mean, increment - mean))
        control.add(k, points, noise, np.asarray(C[:1] if law.constant else C), total)
        x = x + increment
    return x, torch.as_tensor(total).reshape(*x.shape[:-1], -1)
