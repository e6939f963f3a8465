r"""Coordinates in which a controlled process is regular: the logarithm of the distance from an end it scales with.

Where drift and noise are proportional to the distance from a natural end (wealth, prices, populations) paths never
reach it, and utilities may be infinite there. In y = log(x − end) the coefficients are bounded and the end is a cut:

.. math:: b_y = b/\delta - \tfrac12\Sigma/\delta^2, \qquad \Sigma_y = \Sigma/\delta^2, \qquad \delta = x - end
"""

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from kolmo.control.problem import ControlProblem
from kolmo.grid import Grid
from kolmo.grid.grading import Exponential, Grading
from kolmo.problem import KolmogorovProblem
from kolmo.problem.box import Box
from kolmo.problem.faces import Open
from kolmo.problem.sde import SDE

# Coefficients are proportional to the distance where, this part of the points' distance from the end and a thousand
# times closer, their ratios to it differ by no more than the last part of their size.
NEAR, NEARER, PROPORTIONAL = 1e-4, 1e-7, 1e-2
# A slope that grows so much over that stretch is infinite at the end.
STEEPENS = 1.5
# Instants (parts of the horizon) at which coefficients are looked at.
INSTANTS = (0.0, 0.43, 0.97)


@dataclass(frozen=True)
class Chart:
    """Logarithm of the distance from an end: y = log(x − end) above a lower one, −log(end − x) below an upper one.

    Attributes
    ----------
    end : float
        The end.
    side : float
        1 for a lower end, −1 for an upper one.

    Examples
    --------
    >>> chart = Chart(0.0, 1.0)
    >>> chart.forth(np.array([1.0, np.e])).tolist(), float(chart.back(0.0))
    ([0.0, 1.0], 1.0)
    """

    end: float
    side: float

    def forth(self, x: Any) -> np.ndarray:
        """y(x); infinite at the end."""
        with np.errstate(divide="ignore"):
            return np.asarray(self.side * np.log(self.side * (np.asarray(x, dtype=float) - self.end)))

    def back(self, y: Any) -> Any:
        """x(y), of arrays or tensors."""
        exp = torch.exp if isinstance(y, torch.Tensor) else np.exp
        return self.end + self.side * exp(self.side * y)


Charts = Sequence[Chart | None]


def natural_charts(problem: ControlProblem, points: np.ndarray) -> tuple[Chart | None, ...]:
    """Per axis, the chart in which the process is regular; None where that is the coordinate itself."""
    if problem.horizon is None:
        return (None,) * problem.dim
    return tuple(_chart(problem, points, axis) for axis in range(problem.dim))


def _chart(problem: ControlProblem, points: np.ndarray, axis: int) -> Chart | None:
    box: Any = problem.box
    natural = [s for s in (0, 1) if box.faces[axis][s].degenerate]
    if len(natural) != 1:
        return None
    side = 1.0 - 2.0 * natural[0]
    end = (box.lower, box.upper)[natural[0]][axis]
    distance = side * (points[:, axis] - end)
    if not (distance > 1e-9 * max(abs(end), float(np.abs(distance).max()))).all():
        return None
    if not _proportional(problem, points, axis, end, side * distance):
        return None
    # in a box that the user has closed values are wanted up to the end, as long as they are regular there
    closed = np.isfinite(box.lower[axis]) and np.isfinite(box.upper[axis])
    return Chart(end, side) if not closed or _singular(problem, points, axis, end, side * distance) else None


def _singular(problem: ControlProblem, points: np.ndarray, axis: int, end: float, offset: np.ndarray) -> bool:
    """Whether terminal data or running costs are infinite at the end, or rise to it with an infinite slope."""
    closed = [problem.closed_loop(problem.constant(a)) for a in problem.controls.samples]
    half = 0.5 * float(problem.horizon or 0.0)
    functions: list[Callable[[Any], Any]] = [closed[0].final, *(partial(p.running, half) for p in closed)]
    for f in functions:
        slopes = []
        for part in (NEAR, NEARER):
            values = []
            for beside in (1.0, 2.0):
                x = points.copy()
                x[:, axis] = end + beside * part * offset
                values.append(np.asarray(f(torch.as_tensor(x)).detach(), dtype=float).reshape(-1))
            slopes.append(np.abs(values[1] - values[0]) / part)
        if not np.isfinite(slopes[1]).all() or (slopes[1] > STEEPENS * slopes[0] + 1e-9 * slopes[0].max()).any():
            return True
    return False


def _proportional(problem: ControlProblem, points: np.ndarray, axis: int, end: float, offset: np.ndarray) -> bool:
    """Whether drift and noise of all typical controls fall with the distance from the end, and some noise is there."""
    controls, noisy = problem.controls.samples, False
    if not controls.any():
        controls = np.concatenate([controls, np.ones_like(controls), -np.ones_like(controls)])
    for a in controls:
        sde = problem.closed_loop(problem.constant(a)).sde
        for f in INSTANTS:
            ratios = []
            for part in (NEAR, NEARER):
                x = points.copy()
                x[:, axis] = end + part * offset
                t = f * float(problem.horizon or 0.0)
                b, S = np.asarray(sde.drift(t, x)), np.asarray(sde.covariance(t, x))
                ratios.append((b[:, axis] / (part * offset), S[:, axis, axis] / (part * offset) ** 2))
            rate = PROPORTIONAL * (np.abs(ratios[0][0]) + ratios[0][1])
            for one, other in zip(*ratios, strict=True):
                if not np.isfinite(other).all() or (np.abs(one - other) > rate).any():
                    return False
            noisy |= bool((ratios[1][1] > 0).any())
    return noisy


def opened(problem: ControlProblem, charts: Charts) -> ControlProblem:
    """The same problem with the ends that charts send to infinity as cuts."""
    if all(chart is None for chart in charts):
        return problem
    other = copy(problem)
    other.box = _cut(problem.box, charts)
    return other


def opened_as(problem: ControlProblem, grid: Grid) -> ControlProblem:
    """The problem as it was solved on a grid: ends that its maps do not reach are cuts."""
    charts = [
        Chart(axis.grading.end, axis.grading.side) if isinstance(axis.grading, Exponential) else None
        for axis in grid.axes
    ]
    return opened(problem, charts)


def _cut(box: Any, charts: Charts) -> Box:
    pairs = []
    for pair, chart in zip(box.faces, charts, strict=True):
        low, high = pair
        pairs.append(
            (low if chart is None or chart.side < 0 else Open(), high if chart is None or chart.side > 0 else Open())
        )
    return Box(box.lower, box.upper, boundary=pairs)


def charted(problem: KolmogorovProblem, charts: Charts) -> tuple[SDE, Box]:
    """The process of one policy and its box in the charts' coordinates."""
    box = problem.box
    if all(chart is None for chart in charts):
        return problem.sde, box
    marked = [(i, chart) for i, chart in enumerate(charts) if chart is not None]

    def placed(y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Points x, and the derivatives dy/dx per axis."""
        columns, slopes = list(y.unbind(-1)), [torch.ones_like(y[..., 0]) for _ in range(y.shape[-1])]
        for i, chart in marked:
            columns[i], slopes[i] = chart.back(y[..., i]), torch.exp(-chart.side * y[..., i])
        return torch.stack(columns, -1), torch.stack(slopes, -1)

    def drift(t: float, y: torch.Tensor) -> torch.Tensor:
        x, slope = placed(y)
        b: torch.Tensor = problem.sde.drift(t, x) * slope
        S = problem.sde.covariance(t, x)
        for i, chart in marked:
            bend = torch.zeros_like(b)
            bend[..., i] = -0.5 * chart.side * S[..., i, i] * slope[..., i] ** 2
            b = b + bend
        return b

    def covariance(t: float, y: torch.Tensor) -> torch.Tensor:
        x, slope = placed(y)
        scaled: torch.Tensor = problem.sde.covariance(t, x) * slope[..., :, None] * slope[..., None, :]
        return scaled

    low, high = list(box.lower), list(box.upper)
    for i, chart in marked:
        low[i], high[i] = float(chart.forth(box.lower[i])), float(chart.forth(box.upper[i]))
    faces = [tuple(pair) for pair in _cut(box, charts).faces]
    return SDE(drift, covariance=covariance, dim=box.dim, arrays="torch"), Box(low, high, boundary=faces)


def there(points: np.ndarray, charts: Charts) -> np.ndarray:
    """Points in the charts' coordinates."""
    return np.stack([x if chart is None else chart.forth(x) for x, chart in zip(points.T, charts, strict=True)], -1)


def mapped(grading: Grading, chart: Chart | None) -> Grading:
    """A map of an axis of the chart as one of the coordinate itself."""
    return grading if chart is None else Exponential(grading, chart.end, chart.side)
