"""Finds what autograd cannot see: terminal data that jump where a comparison with a parameter switches."""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from kolmo.errors import KolmoWarning
from kolmo.grid import Grid

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


def warn_of_jumps(terminal: Callable[[torch.Tensor], torch.Tensor], grid: Grid) -> None:
    """Warn if terminal data jump where a comparison that involves a parameter changes its result.

    Neighbouring nodes on both sides of such a switch are moved towards each other by bisection: where the data still
    differ in the end, they jump, and their derivative with respect to what moves the jump is not the zero of autograd.
    """
    points = torch.as_tensor(grid.points)
    values, patterns = _watched(terminal, points)
    index = np.arange(grid.size).reshape(grid.shape)
    for which, pattern in enumerate(patterns):
        pairs = [
            np.stack([np.delete(index, -1, axis).reshape(-1), np.delete(index, 0, axis).reshape(-1)])
            for axis in range(grid.dim)
        ]
        left, right = np.concatenate(pairs, 1)
        switching = np.flatnonzero((pattern[left] != pattern[right]).any(1))
        if len(switching) == 0:
            continue
        some = switching[:: -(-len(switching) // PAIRS)]
        a, b = _closer(terminal, which, points[left[some]], points[right[some]])
        change = (_watched(terminal, a)[0] - _watched(terminal, b)[0]).abs().amax(1)
        if bool((change > JUMP * values.abs().max()).any()):
            where = a[int(change.argmax())].tolist()
            warnings.warn(
                f"terminal jumps by {float(change.max()):.3g} near x = {where}, where a comparison with a parameter "
                "switches: autograd takes its derivative through the comparison as zero, which it is not. Fix: smooth "
                "the step, e.g. torch.sigmoid((x - K) / width), or let the parameter move the process instead.",
                KolmoWarning,
                stacklevel=4,
            )
            return


def _watched(terminal: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> tuple[torch.Tensor, list[Any]]:
    """Values (n, k) at points, and the results (n, m) of the comparisons there."""
    with torch.enable_grad(), Watch() as watch:
        values = terminal(x)
    results = [r.detach() for r in watch.results if r.numel() and r.shape[:1] == x.shape[:1]]
    return values.detach().reshape(len(x), -1), [r.reshape(len(x), -1).double() for r in results]


def _closer(terminal: Any, which: int, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Points between which a comparison switches, moved together."""
    here = _watched(terminal, a)[1][which]
    for _ in range(HALVINGS):
        middle = 0.5 * (a + b)
        same = (_watched(terminal, middle)[1][which] == here).all(1)[:, None]
        a, b = torch.where(same, middle, a), torch.where(same, b, middle)
    return a, b
