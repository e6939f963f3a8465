"""The frozen recipe of a solve: box, grids, time nodes, scheme, stepper, treatment of φ; printable and savable."""

import os
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from kolmo import files
from kolmo.arrays import Array
from kolmo.errors import InputError
from kolmo.grid import Axis, Grid, grading
from kolmo.march import March
from kolmo.problem import KolmogorovProblem
from kolmo.problem.rest import at_rest
from kolmo.refine import stored
from kolmo.schemes.base import SCHEMES
from kolmo.schemes.generator import Generator
from kolmo.schemes.terminal import TerminalRule
from kolmo.steppers.base import STEPPERS

# Interpolation uses this many nodes more than the order of the scheme, so that it does not limit the accuracy.
EXTRA_NODES = 2


@dataclass(frozen=True, eq=False)
class Discretization:
    """How a problem is solved: everything that was decided, nothing of the answer.

    Attributes
    ----------
    grid : Grid
        The nodes; its corners are the box used.
    times : tuple of float
        Time nodes from 0 to T (empty: stationary).
    scheme, stepper : str
        Names of the methods.
    terminal : TerminalRule or None
        How φ is put on the grid (None: point values).
    breakpoints : tuple of float
        Times at which something in the problem was seen to jump, besides those it tells.
    averages : dict
        By name, how functions are averaged around the nodes whose breaks lie between these.
    estimate : dict
        Parts of the error estimate found while planning: discretization, cut, unseen (by samples); per column. Empty
        where none was made. What axes, steps and faces add is told by `kolmo.refine.residual.weighted_residual`.

    Examples
    --------
    >>> import kolmo
    >>> ou = kolmo.SDE(lambda t, x: -x, diffusion=1.0, dim=1)
    >>> problem = kolmo.KolmogorovProblem(ou, lambda x: x[..., 0] ** 2, 1.0)
    >>> recipe = kolmo.plan(problem, at=[0.5], rtol=1e-4)
    >>> recipe.scheme, recipe.properties["space_order"]
    ('central6', 6)
    >>> other = kolmo.KolmogorovProblem(ou, lambda x: x[..., 0], 1.0)
    >>> kolmo.solve(other, discretization=recipe).grid.shape == recipe.grid.shape
    True
    """

    grid: Grid
    times: tuple[float, ...]
    scheme: str
    stepper: str
    terminal: TerminalRule | None = None
    breakpoints: tuple[float, ...] = ()
    averages: dict[str, TerminalRule] = field(default_factory=dict)
    estimate: dict[str, list[float]] = field(default_factory=dict)

    @property
    def width(self) -> int:
        """Nodes per axis in the interpolation."""
        return max(4, SCHEMES[self.scheme].order + EXTRA_NODES)

    @property
    def steps(self) -> int:
        """Number of time steps."""
        return max(len(self.times) - 1, 0)

    @cached_property
    def properties(self) -> dict[str, Any]:
        """What is true of these methods: orders, monotonicity, smoothness in the coefficients, conservation.

        ``monotone_step`` is a description: a monotone scheme keeps the discrete maximum principle for every step with
        implicit Euler, and with rk4 as long as dt times the largest leaving rate is at most one.
        """
        scheme, stepper = SCHEMES[self.scheme], STEPPERS[self.stepper]
        bounds = {"implicit-euler": "any step", "rk4": "dt times the largest leaving rate at most 1"}
        return {
            "space_order": scheme.order,
            "time_order": stepper.order if self.times else None,
            "monotone_in_space": scheme.monotone,
            "monotone_step": bounds.get(self.stepper, "no step") if scheme.monotone else "no step",
            "smooth_in_coefficients": scheme.smooth,
            "conservative": True,
            "implicit": stepper.implicit,
            "terminal_smoothed": self.terminal is not None and self.terminal.smoothed,
        }

    def march(self, problem: KolmogorovProblem, like: Array | None = None, coupled: np.ndarray | None = None) -> March:
        """Set up the march of a problem on this recipe; if faces move, in coordinates in which they stand still.

        ``coupled``, shape (d, d): entries of the covariance that stencils are laid out for even where they are zero.
        """
        problem = at_rest(problem, self.grid.box)
        seen = [t for t in self.breakpoints if 0.0 < t < (problem.horizon or 0.0)]
        generator = Generator(
            problem.broken_at(seen), self.grid, SCHEMES[self.scheme], averages=self.averages, coupled=coupled
        )
        return March(generator, STEPPERS[self.stepper], np.array(self.times), like)

    def initial(self, march: March) -> Array:
        """Terminal data on the grid, shape (size, k), with absorbing values put in."""
        problem, grid = march.generator.problem, self.grid
        x = march.generator.nodes(march.like)
        rule = self.terminal or TerminalRule.point_values(grid)
        return march.with_boundary(rule.apply(problem, x), problem.horizon or 0.0)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the recipe to one ``.npz`` file (no pickle), in one step."""
        files.write_tree(Path(path), {"discretization": self.record()})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Discretization":
        """Read a recipe written by ``save``."""
        needed = "a file written by Discretization.save"
        return files.read_record(Path(path), "discretization", stored.recipe(cls), cls.restored, needed)

    @classmethod
    def restored(cls, tree: dict[str, Any]) -> "Discretization":
        """Rebuild a recipe from a record that was checked, and see that its parts fit together."""
        return stored.consistent(cls.from_record(tree))

    def record(self) -> dict[str, Any]:
        """Tree of numbers, strings and arrays that holds everything, for saving."""
        axes = [
            {"n": a.n, "periodic": a.periodic, "grading": grading.record(a.grading), "breaks": list(a.breaks)}
            for a in self.grid.axes
        ]
        parts = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "grid"}
        return parts | {
            "axes": axes,
            "times": list(self.times),
            "terminal": None if self.terminal is None else self.terminal.record(),
            "breakpoints": list(self.breakpoints),
            "averages": {name: rule.record() for name, rule in self.averages.items()},
        }

    @classmethod
    def from_record(cls, tree: dict[str, Any]) -> "Discretization":
        """Rebuild a recipe from its record."""
        maps = [grading.from_record(a["grading"]) for a in tree["axes"]]
        axes = zip(tree["axes"], maps, strict=True)
        grid = Grid([Axis(a["n"], g, a["periodic"], tuple(a.get("breaks", ()))) for a, g in axes])
        terminal = None if tree["terminal"] is None else TerminalRule.from_record(grid, tree["terminal"])
        breakpoints = tuple(tree.get("breakpoints", ()))
        averages = {name: TerminalRule.from_record(grid, rule) for name, rule in tree.get("averages", {}).items()}
        names = tree["scheme"], tree["stepper"]
        return cls(grid, tuple(tree["times"]), *names, terminal, breakpoints, averages, tree["estimate"])

    def __repr__(self) -> str:
        smoothed = self.terminal is not None and self.terminal.smoothed
        parts = [
            repr(self.grid),
            f"scheme={self.scheme!r}",
            f"stepper={self.stepper!r}",
            f"steps={self.steps}",
            f"terminal={'smoothed at ' + str(len(self.terminal.touched)) + ' nodes' if smoothed else 'point values'}",  # type: ignore[union-attr]
        ]
        parts += [f"{name}≈{max(values):.1e}" for name, values in self.estimate.items()]
        return "Discretization(" + ", ".join(parts) + ")"


def steps_given(steps: Any) -> int:
    """Check the number of steps."""
    if not isinstance(steps, (int, np.integer)) or steps < 1:
        raise InputError("steps", steps, "a positive whole number of time steps", "solve(..., grid=(n,), steps=64)")
    return int(steps)
