"""Expected loss of the finite network by backward recursion over its layers, without sampling.

With u_L = φ and u_k(x) = E u_{k+1}(x + ΔX_k(x)), the network's expected loss is u_0. The law's expectation is a finite
sum (discrete noise) or a Gauss rule; between layers u_k is a B-spline of degree 7 on a box that the network reaches.
"""

import copy
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch

from kolmo.bridge.resnet import NoisyResNet, check_shape
from kolmo.bridge.variables import Gaussian, Variable
from kolmo.errors import InputError, ToleranceWarning
from kolmo.kernels import bspline
from kolmo.refine.estimate import Convergence

DEGREE = 7
_FIRST_CELLS = {1: 40, 2: 24, 3: 14}  # cells per axis of the first level
_REFINEMENT = {1: 2.0, 2: 1.6, 3: 1.5}
# Spacing, Gauss rule and tail are refined together: errors are taken to fall with this order in 2^level, which for
# smooth losses is much less than they do and is what a loss with kinks allows at best.
_POLICY = Convergence(3.0)
_MOST_LEVELS = 9
_MOST_EVALUATIONS = 6e7  # spline evaluations per layer beyond which no further refinement is tried
_MOST_NODES = 1.5e6
_CHUNK = 1_000_000


class RecursionResult(NamedTuple):
    """Values ``(n, k)``, error estimate ``(k,)``, whether it met the tolerance, and what was used."""

    values: np.ndarray
    error_estimate: np.ndarray
    converged: bool
    stats: dict[str, Any]


class Rule(NamedTuple):
    """Outcomes of the noise of one layer: values ``(Q, r)`` of ζ and weights ``(Q,)``."""

    zeta: np.ndarray
    weights: np.ndarray


@dataclass(frozen=True)
class Resolution:
    """One resolution of the recursion."""

    spacing: float
    extra: int
    tail: float


class Layer:
    """One layer as NumPy functions of points ``(..., d)``, in the coordinates y = Qᵀx of an orthogonal matrix Q."""

    def __init__(self, net: NoisyResNet, k: int, axes: np.ndarray) -> None:
        self._net, self._k, self._axes = net, k, axes
        law = net.law(k)
        self.variable: Variable = law.variable
        self.noiseless, self.constant = law.noiseless, law.constant
        self._gaussian = isinstance(self.variable, Gaussian)

    @torch.no_grad()
    def transition(self, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean increment ``(..., d)`` and noise matrix ``(..., d, r)`` at y."""
        x = torch.as_tensor(y @ self._axes.T)
        law, output = self._net.law(self._k), self._net.output(self._k, x)
        mean, factor = law.mean(output), law.factor(output, self._net.h)
        check_shape(mean, x, self._k)
        G = np.asarray(self._axes.T @ factor.numpy())
        if self._gaussian and (self.constant or G.shape[-1] > G.shape[-2]):
            G = _principal_factor(G)
        return np.asarray(mean.numpy() @ self._axes), G

    @torch.no_grad()
    def mean(self, y: np.ndarray) -> np.ndarray:
        """Mean increment alone."""
        x = torch.as_tensor(y @ self._axes.T)
        return np.asarray(self._net.mean_increment(self._k, x).numpy() @ self._axes)

    def separable(self, d: int) -> np.ndarray | None:
        """Return the standard deviation per axis where the noise is constant and independent over the axes."""
        if not self.constant:
            return None
        G = self.transition(np.zeros((1, d)))[1][0]
        off = G - np.diag(np.diag(G)) if G.shape[0] == G.shape[1] else G
        return np.asarray(np.diag(G)) if np.abs(off).max() <= 1e-14 * np.abs(G).max() else None

    def rule(self, r: int, extra: int) -> Rule:
        """All outcomes of r independent ζ, or a product Gauss rule whose size grows with the level."""
        z, w = self.variable.nodes({1: 8 + 4 * extra, 2: 6 + 2 * extra}.get(r, 4 + 2 * extra))
        zeta = np.array(list(product(z, repeat=r)))
        weights = np.prod(np.array(list(product(w, repeat=r))), axis=1)
        kept = weights > (0.0 if self.variable.is_discrete else 1e-18)
        return Rule(zeta[kept], weights[kept])

    def outcomes(self, r: int, extra: int) -> float:
        """Size of that rule, without building it."""
        return float(len(self.variable.nodes({1: 8 + 4 * extra, 2: 6 + 2 * extra}.get(r, 4 + 2 * extra))[0])) ** r


def _principal_factor(G: np.ndarray) -> np.ndarray:
    """Replace Gaussian noise G ζ by one of the same covariance with d columns, diagonal where the covariance is."""
    d = G.shape[-2]
    C = G @ np.swapaxes(G, -1, -2)
    diagonal = np.diagonal(C, axis1=-2, axis2=-1)
    off = C - diagonal[..., None] * np.eye(d)
    if np.abs(off).max() <= 1e-14 * np.abs(C).max():
        return np.asarray(np.sqrt(diagonal)[..., None] * np.eye(d))
    values, vectors = np.linalg.eigh(C)
    return np.asarray(vectors * np.sqrt(np.clip(values, 0.0, None))[..., None, :])


class Exact:
    """The loss itself, handed tensors of the network's dtype in the network's coordinates."""

    def __init__(self, columns: Callable[[torch.Tensor], torch.Tensor], axes: np.ndarray, dtype: torch.dtype) -> None:
        self._columns, self._axes, self._dtype = columns, axes, dtype

    @torch.no_grad()
    def average(self, points: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """``Σ_q weights[q] u(points[q])``: points ``(Q, n, d)`` -> ``(n, k)``."""
        shape = points.shape
        x = torch.as_tensor(points.reshape(-1, shape[-1]) @ self._axes.T, dtype=self._dtype)
        values = np.asarray(self._columns(x).double())
        return np.tensordot(weights, values.reshape(*shape[:2], -1), axes=(0, 0))


class Composed:
    """u after a layer without noise: no interpolation is needed."""

    def __init__(self, layer: Layer, value: "Value") -> None:
        self._layer, self._value = layer, value

    def average(self, points: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Weighted sum of u(x + m(x)) over outcomes."""
        return self._value.average(points + self._layer.mean(points), weights)


class Spline:
    """Tensor-product spline through values at the nodes of a box; constant beyond its faces."""

    def __init__(self, lower: np.ndarray, upper: np.ndarray, values: np.ndarray) -> None:
        self.lower, self.upper = lower, upper
        d = len(lower)
        self.nodes = np.array(values.shape[:d])
        for axis in range(d):
            values = np.moveaxis(bspline.interpolation(np.moveaxis(values, axis, 0), DEGREE), 0, axis)
        self._missing = 3 - d
        self.coefficients = np.ascontiguousarray(values[(None,) * self._missing])
        self._lower = np.concatenate([np.zeros(self._missing), lower])
        self._inverse = np.concatenate([np.ones(self._missing), (self.nodes - 1) / (upper - lower)])
        self._degree = np.array([0] * self._missing + [DEGREE] * d)

    def average(self, points: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Weighted sum of spline values over outcomes."""
        padded = np.zeros((*points.shape[:2], 3))
        padded[..., self._missing :] = points
        out = np.empty((points.shape[1], self.coefficients.shape[-1]))
        bspline.average(self.coefficients, self._lower, self._inverse, self._degree, padded, weights, out)
        return out

    def smoothed(
        self, sd: np.ndarray, variable: Variable, lower: np.ndarray, upper: np.ndarray, spacing: float
    ) -> "Spline":
        """E u(· + sd ζ) for independent noise on the axes, as a spline on another box: one axis after the other."""
        d = len(sd)
        z, w = variable.nodes(32)
        nodes = node_counts(lower, upper, spacing)
        values = self.coefficients.reshape(self.coefficients.shape[self._missing :])
        for axis in range(d):
            line = np.linspace(lower[axis], upper[axis], nodes[axis])
            offsets, weights = (sd[axis] * z[:, None], w) if sd[axis] != 0 else (np.zeros((1, 1)), np.ones(1))
            matrix = np.empty((nodes[axis], values.shape[axis]))
            bspline.average_matrix(
                int(self.nodes[axis]),
                float(self.lower[axis]),
                float(self._inverse[axis + self._missing]),
                DEGREE,
                line + offsets,
                weights,
                matrix,
            )
            values = np.moveaxis(np.tensordot(matrix, values, axes=(1, axis)), 0, axis)
        return Spline(lower, upper, values)


# A function u of points that can be averaged over outcomes.
Value = Exact | Composed | Spline


def node_counts(lower: np.ndarray, upper: np.ndarray, spacing: float) -> np.ndarray:
    """Nodes per axis for that spacing; enough of them for the spline."""
    return np.asarray(np.maximum(np.ceil((upper - lower) / spacing).astype(int) + 1, DEGREE + 3))


def mesh(lower: np.ndarray, upper: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Points ``(n1·…·nd, d)`` of a tensor grid."""
    lines = [np.linspace(a, b, n) for a, b, n in zip(lower, upper, counts, strict=True)]
    return np.stack(np.meshgrid(*lines, indexing="ij"), -1).reshape(-1, len(lines))


class PathBoxes:
    r"""Boxes that the network leaves with probability of the order of exp(−tail²/2) only.

    A path whose noise spends the "budget" Σ|ζ|² ≤ r² stays in the box B_k(r); one more layer with |ζ| = q leads from
    B_k(√(r² − q²)) to B_{k+1}(r). The boxes for a ladder of r up to the tail are pushed through the layers together.
    """

    LADDER, SPLITS = 12, 40

    def __init__(self, tail: float) -> None:
        self.radii = np.linspace(0.0, tail, self.LADDER)
        share = np.concatenate([[0.0], np.logspace(-5, 0, self.SPLITS - 1)])
        self._spent = self.radii[:, None] * np.sqrt(share)
        left = self.radii[:, None] * np.sqrt(1.0 - share)
        self._interpolate = np.maximum(0.0, 1.0 - np.abs(left[..., None] - self.radii) / self.radii[1])

    def boxes(self, layers: list[Layer], points: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        """Lower and upper corner after 0, 1, … layers.

        Where bounded noise cannot leave a box of at most twice the width, that box is taken and nothing is cut off.
        """
        d = points.shape[1]
        unit = mesh(np.zeros(d), np.ones(d), np.full(d, 5 if d == 3 else 9))
        lower = np.repeat(points.min(0)[None], self.LADDER, 0)
        upper = np.repeat(points.max(0)[None], self.LADDER, 0)
        found, everything = [(lower[-1], upper[-1])], (lower[:1], upper[:1])
        for layer in layers:
            low, high, size, most = _spread(layer, lower, upper, unit)
            gain = np.minimum(self._spent[..., None] * (self._interpolate @ size), self._interpolate @ most)
            upper = (self._interpolate @ high + gain).max(1)
            lower = (self._interpolate @ low - gain).min(1)
            box = (lower[-1], upper[-1])
            if np.isfinite(layer.variable.bound) and np.isfinite(everything[1]).all():
                low, high, _, most = _spread(layer, *everything, unit)
                everything = (low - most, high + most)
                if np.all(everything[1] - everything[0] <= 2.0 * (box[1] - box[0])):
                    box = (everything[0][0], everything[1][0])
            else:
                everything = (np.full((1, d), -np.inf), np.full((1, d), np.inf))
            found.append(box)
        if not all(np.isfinite(a).all() and np.isfinite(b).all() for a, b in found):
            raise InputError("x", "a network whose states overflow", "finite states along the network")
        return [_widened(a, b, max(float((v - u).max()) for u, v in found)) for a, b in found]


def _spread(layer: Layer, lower: np.ndarray, upper: np.ndarray, unit: np.ndarray) -> tuple[np.ndarray, ...]:
    """Boxes ``(n, d)`` after the mean step, and the most that noise adds there: for each unit of |ζ|, and at all."""
    x = lower[:, None] + unit * (upper - lower)[:, None]
    mean, G = layer.transition(x)
    size = np.sqrt((G**2).sum(-1)).max(1) * math.sqrt(layer.variable.variance_proxy)
    bound = layer.variable.bound if np.isfinite(layer.variable.bound) else 1e300
    margin = 0.05 * np.abs(mean).max(1)  # the samples may miss the extremes
    return (x + mean).min(1) - margin, (x + mean).max(1) + margin, 1.05 * size, 1.05 * np.abs(G).sum(-1).max(1) * bound


def _widened(lower: np.ndarray, upper: np.ndarray, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Make sure that no width is zero."""
    margin = np.maximum(1e-3 * max(scale, 1e-6) - 0.5 * (upper - lower), 0.0)
    return lower - margin, upper + margin


def recursion(
    net: NoisyResNet,
    columns: Callable[[torch.Tensor], torch.Tensor],
    points: np.ndarray,
    *,
    rtol: float,
    atol: float,
    dtype: torch.dtype,
) -> RecursionResult:
    """Compute the expected loss at points ``(n, d)``; ``columns`` maps ``(m, d)`` to ``(m, k)``.

    Refines spacing, Gauss rules and boxes together until the estimate meets atol + rtol max|u| in every column. The
    estimate is that of :class:`kolmo.refine.estimate.Convergence`; of two levels it is their difference.
    """
    d = points.shape[1]
    if d > 3 or net.state_ndim != 1:
        raise InputError(
            "method",
            f"'recursion' for states of dimension {d}" if net.state_ndim == 1 else "'recursion' for tensor states",
            "vector states of dimension 1, 2 or 3",
            "use method='monte_carlo'",
        )
    if dtype != torch.float64:
        net = copy.deepcopy(net).double()
    axes = _common_axes(net, d)
    layers = [Layer(net, k, axes) for k in range(net.depth)]
    y = points @ axes
    exact = Exact(columns, axes, dtype)
    if all(layer.noiseless for layer in layers):
        value: Value = exact
        for layer in reversed(layers):
            value = Composed(layer, value)
        values = value.average(y[None], np.ones(1))
        return RecursionResult(values, _rounding(values, net.depth), True, {"levels": 0})
    return _refine(layers, exact, y, rtol, atol)


def _rounding(values: np.ndarray, depth: int) -> np.ndarray:
    """Floor of every estimate: rounding errors of that many layers."""
    return np.asarray(4e-16 * (depth + 10) * np.abs(values).max(0))


def _refine(layers: list[Layer], exact: Exact, y: np.ndarray, rtol: float, atol: float) -> RecursionResult:
    """Levels until the estimate meets the tolerance or the work becomes too much."""
    d = y.shape[1]
    tail = math.sqrt(2 * math.log(2 * d * len(layers) / (1e-2 * min(max(rtol, 1e-13), 1e-3))))
    boxes = PathBoxes(tail).boxes(layers, y)
    spacing = max(float((b - a).max()) for a, b in boxes) / _FIRST_CELLS[d]
    found: list[np.ndarray] = []
    estimate = np.array([math.inf])
    converged, done = False, Resolution(spacing, 0, tail)
    for level in range(_MOST_LEVELS):
        now = Resolution(spacing / _REFINEMENT[d] ** level, level, tail + level)
        boxes = PathBoxes(now.tail).boxes(layers, y)
        _check_work(layers, boxes, now, y, first=level == 0)
        if level > 0 and not _affordable(layers, boxes, now, y):
            break
        values = _sweep(layers, exact, y, boxes, now)
        found.append(values)
        resolutions = [2.0**k for k in range(len(found))]
        estimate = _POLICY.judge(resolutions, found, rounding=_rounding(values, len(layers))).estimate
        done = now
        if np.all(estimate <= atol + rtol * np.abs(values).max(0)):
            converged = True
            break
    if not converged:
        warnings.warn(
            f"recursion stopped at level {done.extra} with error estimate {float(estimate.max()):.1e}, above tolerance "
            f"(rtol={rtol:g}, atol={atol:g}); kinked or bounded-below losses converge slowly",
            ToleranceWarning,
            stacklevel=4,
        )
    stats = {"levels": done.extra + 1, "spacing": done.spacing, "tail": done.tail, "boxes": boxes}
    return RecursionResult(found[-1], estimate, converged, stats)


def _sweep(
    layers: list[Layer], exact: Exact, y: np.ndarray, boxes: list[tuple[np.ndarray, np.ndarray]], level: Resolution
) -> np.ndarray:
    """One backward pass at one resolution."""
    value: Value = exact
    for k in range(len(layers) - 1, 0, -1):
        if layers[k].noiseless:
            value = Composed(layers[k], value)
            continue
        lower, upper = boxes[k]
        counts = node_counts(lower, upper, level.spacing)
        values = _expectation(layers[k], value, mesh(lower, upper, counts), boxes[k + 1], level)
        value = Spline(lower, upper, values.reshape(*counts, -1))
    return _expectation(layers[0], value, y, boxes[1], level)


def _expectation(
    layer: Layer, value: Value, y: np.ndarray, after: tuple[np.ndarray, np.ndarray], level: Resolution
) -> np.ndarray:
    """E u(y + ΔX(y)) at points ``(n, d)``."""
    d = y.shape[1]
    if layer.noiseless:
        return Composed(layer, value).average(y[None], np.ones(1))
    sd = layer.separable(d) if d > 1 and len(y) > 1000 else None
    if sd is not None:
        mapped = y + layer.mean(y)
        if not isinstance(value, Spline):
            nodes = node_counts(*after, level.spacing)
            values = value.average(mesh(*after, nodes)[None], np.ones(1))
            value = Spline(*after, values.reshape(*nodes, -1))
        box = _widened(mapped.min(0), mapped.max(0), 0.0)
        smooth = value.smoothed(sd, layer.variable, *box, level.spacing)
        return smooth.average(mapped[None], np.ones(1))
    mean, G = layer.transition(y)
    rule = layer.rule(G.shape[-1], level.extra)
    rows = max(1, _CHUNK // len(rule.weights))
    parts = []
    for start in range(0, len(y), rows):
        part = slice(start, start + rows)
        points = (y[part] + mean[part])[None] + np.einsum("ndr,qr->qnd", G[part], rule.zeta)
        parts.append(value.average(points, rule.weights))
    return np.concatenate(parts)


def _evaluations(layer: Layer, box: tuple[np.ndarray, np.ndarray], level: Resolution, d: int) -> tuple[float, float]:
    """Nodes of a layer and outcomes per node."""
    nodes = float(np.prod(node_counts(*box, level.spacing).astype(float)))
    if layer.noiseless or (d > 1 and layer.separable(d) is not None):
        return nodes, 1.0
    r = layer.transition(np.zeros((1, d)))[1].shape[-1]
    return nodes, layer.outcomes(r, level.extra)


def _affordable(
    layers: list[Layer], boxes: list[tuple[np.ndarray, np.ndarray]], level: Resolution, y: np.ndarray
) -> bool:
    """Whether the next level stays within the limits of work and memory."""
    for layer, box in zip(layers[1:], boxes[1:], strict=False):
        nodes, outcomes = _evaluations(layer, box, level, y.shape[1])
        if nodes > _MOST_NODES or nodes * outcomes > _MOST_EVALUATIONS:
            return False
    return True


def _check_work(
    layers: list[Layer], boxes: list[tuple[np.ndarray, np.ndarray]], level: Resolution, y: np.ndarray, *, first: bool
) -> None:
    """Refuse what cannot be done even at the first level."""
    if not first or _affordable(layers, boxes, level, y):
        return
    work = [_evaluations(layer, box, level, y.shape[1]) for layer, box in zip(layers[1:], boxes[1:], strict=False)]
    nodes, outcomes = max(work, key=lambda pair: pair[0] * pair[1])
    raise InputError(
        "method",
        f"'recursion' with {outcomes:.3g} outcomes of the noise at each of {nodes:.3g} nodes in one layer",
        f"at most {_MOST_EVALUATIONS:.0e} evaluations and {_MOST_NODES:.0e} nodes",
        "use method='monte_carlo'",
    )


def _common_axes(net: NoisyResNet, d: int) -> np.ndarray:
    """Axes in which the additive Gaussian noise of all layers is independent; the given ones where there are none."""
    covariances = []
    for k in range(net.depth):
        law = net.law(k)
        if not (law.constant and isinstance(law.variable, Gaussian)):
            return np.eye(d)
        with torch.no_grad():
            covariances.append(
                np.asarray(law.covariance(net.output(k, torch.zeros(1, d, dtype=torch.float64)), net.h))[0]
            )
    total = np.sum(covariances, 0)
    if np.abs(total - np.diag(np.diag(total))).max() <= 1e-14 * np.abs(total).max():
        return np.eye(d)
    axes = np.linalg.eigh(total)[1]
    turned = axes.T @ np.array(covariances) @ axes
    off = turned - np.einsum("kii->ki", turned)[..., None] * np.eye(d)
    return axes if np.abs(off).max() <= 1e-13 * np.abs(turned).max() else np.eye(d)
