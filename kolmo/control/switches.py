"""Finds what autograd cannot see: data and coefficients that jump where a comparison with a parameter switches."""

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from kolmo.errors import KolmoWarning
from kolmo.problem import KolmogorovProblem
from kolmo.schemes.generator import Generator
from kolmo.schemes.local import wall_nodes

# Functions whose results are constant in pieces: their derivatives are zero wherever there are any.
STEPS = frozenset(
    [
        *("gt", "ge", "lt", "le", "eq", "ne", "greater", "greater_equal", "less", "less_equal", "not_equal", "isclose"),
        *("sign", "sgn", "heaviside", "floor", "ceil", "round", "trunc"),
        *("argmax", "argmin", "bucketize", "searchsorted"),
    ]
)
# Pairs of neighbours followed to the switch, halvings of their distance, and the relative change that is a jump.
PAIRS, HALVINGS, JUMP = 64, 40, 1e-6
# Points at most at which it is asked whether a function compares anything with a parameter; times between which a
# coefficient that depends on time is looked at; intervals between breakpoints at most, otherwise.
SOME, MOMENTS, MANY = 256, 8, 8


class Watch(TorchFunctionMode):
    """While it is on, collects the results of piecewise constant functions of tensors that carry gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.results: list[torch.Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function; look at its name and arguments."""
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "").strip("_")
        if name in STEPS and any(isinstance(a, torch.Tensor) and a.requires_grad for a in args):
            self.results.append(result)
        return result


def warn_of_jumps(problem: KolmogorovProblem, generator: Generator, like: torch.Tensor) -> None:
    """Warn if data or coefficients jump where a comparison that involves a parameter changes its result.

    Terminal data, drift, covariance, killing, source and the values of faces are looked at on the grid, and, where they
    depend on time, between some times too. Neighbours on both sides of a switch are moved towards each other by
    bisection: where the values still differ in the end, they jump, and their derivative with respect to what moves the
    jump is not the zero of autograd.
    """
    intervals = generator.intervals()
    times = [0.5 * (a + b) for a, b in intervals[:: max(1, len(intervals) // MANY)]]
    if not generator.autonomous:
        times = np.linspace(0.0, problem.horizon or 0.0, MOMENTS + 1).tolist()
    for what, function, points, shape, timed in _functions(problem, generator, like):
        some = points[:: max(1, len(points) // SOME)]
        seen = [_patterns(function, t, some) for t in (times if timed else times[:1])]
        found = None
        for t, pattern in zip(times, seen, strict=False):
            if pattern:
                found = found or _jump_in_space(partial(function, t), points, shape)
        found = found or _jump_in_time(function, some, times, seen)
        if found is not None:
            size, where = found
            warnings.warn(
                f"{what} jumps by {size:.3g} near {where}, where a comparison with a parameter "
                "switches: autograd takes its derivative through the comparison as zero, which it is not. Fix: smooth "
                "the step, e.g. torch.sigmoid((x - K) / width), or let the parameter move the process instead.",
                KolmoWarning,
                stacklevel=4,
            )


Found = tuple[float, str] | None


def _functions(
    problem: KolmogorovProblem, generator: Generator, like: torch.Tensor
) -> Iterator[tuple[str, Callable[[float, torch.Tensor], torch.Tensor], torch.Tensor, tuple[int, ...], bool]]:
    """What the user gave: its name, the function, points on a grid of a shape, and whether time enters."""
    grid = generator.grid
    everywhere, nodes = generator.places(like), generator.nodes(like)
    if problem.terminal is not None:
        yield "terminal", lambda t, x: problem.final(x), nodes, grid.shape, False
    given: list[tuple[str, Any, Any]] = [(name, f, getattr(problem.sde, name)) for name, f in problem.sde.given.items()]
    given += [("killing", problem.killing, problem.rate), ("source", problem.source, problem.running)]
    for name, value, function in given:
        if callable(value):
            yield name, function, everywhere, grid.shape, True
    for i, side, face in generator.box.each():
        wall = nodes[wall_nodes(grid, i, side)]
        shape = (*grid.shape[:i], *grid.shape[i + 1 :])
        for name in face.data:
            value = getattr(face, name)
            if callable(value):
                yield f"{name} of boundary[{i}][{side}]", partial(problem.on_face, value), wall, shape, True


def _patterns(function: Any, t: float, x: torch.Tensor) -> list[Any]:
    """Results of all comparisons of a function at a time, as flat arrays."""
    with torch.enable_grad(), Watch() as watch:
        function(t, x)
    return [r.detach().cpu().reshape(-1) for r in watch.results]


def _jump_in_space(function: Callable[[torch.Tensor], torch.Tensor], points: torch.Tensor, shape: Any) -> Found:
    """The largest of some jumps between neighbours, and where."""
    values, patterns = _watched(function, points)
    index = np.arange(len(points)).reshape(shape)
    for which, pattern in enumerate(patterns):
        pairs = [
            np.stack([np.delete(index, -1, axis).reshape(-1), np.delete(index, 0, axis).reshape(-1)])
            for axis in range(len(shape))
        ]
        left, right = np.concatenate(pairs, 1) if pairs else np.zeros((2, 0), dtype=int)
        switching = np.flatnonzero((pattern[left] != pattern[right]).any(1))
        if len(switching) == 0:
            continue
        some = switching[:: -(-len(switching) // PAIRS)]
        a, b = _closer(function, which, points[left[some]], points[right[some]])
        change = (_watched(function, a)[0] - _watched(function, b)[0]).abs().amax(1)
        if bool((change > JUMP * values.abs().max()).any()):
            return float(change.max()), f"x = {a[int(change.argmax())].tolist()}"
    return None


def _jump_in_time(function: Any, x: torch.Tensor, times: list[float], seen: list[list[Any]]) -> Found:
    """The first jump between two of the times at which comparisons that know no place come out differently."""

    def alone(patterns: list[Any]) -> list[float]:
        return [float(r) for r in patterns if r.numel() == 1]

    for start, stop, before, after in zip(times, times[1:], seen, seen[1:], strict=False):
        if alone(before) == alone(after):
            continue
        a, b = start, stop
        for _ in range(HALVINGS):
            middle = 0.5 * (a + b)
            a, b = (middle, b) if alone(_patterns(function, middle, x)) == alone(before) else (a, middle)
        early, late = (_watched(partial(function, t), x)[0] for t in (a, b))
        change = float((early - late).abs().max())
        if change > JUMP * float(early.abs().max() + late.abs().max()):
            return change, f"t = {b:.6g}"
    return None


def _watched(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> tuple[torch.Tensor, list[Any]]:
    """Values (n, k) at points, and the results (n, m) of the comparisons there."""
    with torch.enable_grad(), Watch() as watch:
        values = function(x)
    results = [r.detach() for r in watch.results if r.numel() and r.shape[:1] == x.shape[:1]]
    return values.detach().cpu().reshape(len(x), -1), [r.cpu().reshape(len(x), -1).double() for r in results]


def _closer(function: Any, which: int, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Points between which a comparison switches, moved together."""
    here = _watched(function, a)[1][which]
    for _ in range(HALVINGS):
        middle = 0.5 * (a + b)
        same = (_watched(function, middle)[1][which] == here).all(1)[:, None].to(a.device)
        a, b = torch.where(same, middle, a), torch.where(same, b, middle)
    return a, b
