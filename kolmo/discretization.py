"""The frozen recipe of a solve: box, grids, time nodes, scheme, stepper, treatment of φ; printable and savable."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp

from kolmo import grading
from kolmo.arrays import Array, as_like
from kolmo.errors import InputError
from kolmo.grid import Axis, Grid
from kolmo.march import March
from kolmo.problem import KolmogorovProblem
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
    estimate : dict
        Parts of the error estimate found while planning: space and time, cut; per column. Empty where none was made.
    """

    grid: Grid
    times: tuple[float, ...]
    scheme: str
    stepper: str
    terminal: TerminalRule | None = None
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

    def march(self, problem: KolmogorovProblem, like: Array | None = None) -> March:
        """The march of a problem on this recipe."""
        generator = Generator(problem, self.grid, SCHEMES[self.scheme])
        return March(generator, STEPPERS[self.stepper], np.array(self.times), like)

    def initial(self, march: March) -> Array:
        """Terminal data on the grid, shape (size, k), with absorbing values put in."""
        problem, grid = march.generator.problem, self.grid
        x = as_like(grid.points, march.like)
        rule = self.terminal or TerminalRule(grid, 0, np.zeros(0, dtype=int), np.zeros((0, grid.dim)), None, None)
        return march.with_boundary(rule.apply(problem, x), problem.horizon or 0.0)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the recipe to one ``.npz`` file (no pickle), to a temporary name first."""
        write_npz(path, self.record())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Discretization":
        """Read a recipe written by ``save``."""
        return cls.from_record(read_npz(path))

    def record(self) -> dict[str, np.ndarray]:
        """Arrays that hold everything, for saving."""
        head = {
            "axes": [{"n": a.n, "periodic": a.periodic, "grading": grading.record(a.grading)} for a in self.grid.axes],
            "scheme": self.scheme,
            "stepper": self.stepper,
            "estimate": self.estimate,
            "terminal_order": None if self.terminal is None else self.terminal.order,
        }
        arrays = {"discretization": np.array(json.dumps(head)), "steps": np.array(self.times)}
        if self.terminal is not None and self.terminal.matrix is not None:
            arrays |= {"terminal_touched": self.terminal.touched, "terminal_points": self.terminal.points}
            arrays |= _sparse_record("terminal_matrix", self.terminal.matrix)
            if self.terminal.constant is not None:
                arrays |= _sparse_record("terminal_constant", self.terminal.constant)
        return arrays

    @classmethod
    def from_record(cls, arrays: dict[str, np.ndarray]) -> "Discretization":
        """Rebuild a recipe from its arrays."""
        head = json.loads(str(arrays["discretization"]))
        grid = Grid([Axis(a["n"], grading.from_record(a["grading"]), a["periodic"]) for a in head["axes"]])
        terminal = None
        if head["terminal_order"] is not None:
            terminal = TerminalRule(
                grid,
                head["terminal_order"],
                arrays.get("terminal_touched", np.zeros(0, dtype=int)),
                arrays.get("terminal_points", np.zeros((0, grid.dim))),
                _sparse_from("terminal_matrix", arrays),
                _sparse_from("terminal_constant", arrays),
            )
        times = tuple(float(t) for t in arrays["steps"])
        return cls(grid, times, head["scheme"], head["stepper"], terminal, head["estimate"])

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


def _sparse_record(name: str, matrix: sp.csr_matrix) -> dict[str, np.ndarray]:
    return {
        f"{name}_data": matrix.data,
        f"{name}_indices": matrix.indices,
        f"{name}_indptr": matrix.indptr,
        f"{name}_shape": np.array(matrix.shape),
    }


def _sparse_from(name: str, arrays: dict[str, np.ndarray]) -> sp.csr_matrix | None:
    if f"{name}_data" not in arrays:
        return None
    parts = tuple(arrays[f"{name}_{part}"] for part in ("data", "indices", "indptr"))
    return sp.csr_matrix(parts, shape=tuple(arrays[f"{name}_shape"]))


def write_npz(path: str | os.PathLike[str], arrays: dict[str, np.ndarray]) -> None:
    """Write arrays to one ``.npz`` file: to a temporary name in the same folder, then renamed."""
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as stream:
            np.savez_compressed(stream, **arrays)  # type: ignore[arg-type]
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def read_npz(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Read the arrays of an ``.npz`` file without unpickling.

    Raises
    ------
    InputError
        If the file is missing, damaged, or not one of kolmo's.
    """
    try:
        with np.load(path, allow_pickle=False) as data:
            return {name: data[name] for name in data.files}
    except FileNotFoundError:
        raise InputError("path", str(path), "an existing .npz file written by kolmo") from None
    except Exception as error:
        raise InputError("path", f"{path} ({error})", "an undamaged .npz file written by kolmo") from error


def steps_given(steps: int | Sequence[float] | None) -> int:
    """Check the number of steps."""
    if not isinstance(steps, (int, np.integer)) or steps < 1:
        raise InputError("steps", steps, "a positive whole number of time steps", "solve(..., grid=(n,), steps=64)")
    return int(steps)


