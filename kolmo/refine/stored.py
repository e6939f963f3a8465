"""What the record of a recipe must hold before anything is made of it, and what must fit together afterwards."""

import math
from dataclasses import dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse as sp

from kolmo import memory
from kolmo.files import schema
from kolmo.grid import Axis, grading
from kolmo.schemes.base import SCHEMES
from kolmo.schemes.terminal import TerminalRule
from kolmo.steppers.base import STEPPERS

if TYPE_CHECKING:
    from kolmo.discretization import Discretization

__all__ = ["consistent", "motion", "recipe"]

_GRADINGS = {name: kind for name, kind in vars(grading).items() if is_dataclass(kind)}
_MOST_AXES = 8


def _grading(value: Any, where: str) -> dict[str, Any]:
    """A map of an axis, of its own kind."""
    if not isinstance(value, dict):
        raise schema.refuse(where, value, "a table")
    kind = schema.text(_GRADINGS)(value.get("kind"), f"{where}.kind")
    rest = {name: item for name, item in value.items() if name != "kind"}
    ends = {f.name: schema.number() for f in fields(_GRADINGS[kind]) if f.name in ("lower", "upper")}
    check = schema.of(_GRADINGS[kind], {grading.Grading: _grading}, **ends)
    return {"kind": kind, **check(rest, where)}


@dataclass
class _Sparse:
    """A sparse matrix, row by row."""

    data: np.ndarray
    indices: np.ndarray
    indptr: np.ndarray
    shape: tuple[int, int]


_KNOWN = {sp.csr_matrix: schema.of(_Sparse)}


def recipe(kind: type["Discretization"]) -> schema.Check:
    """The check of the record of a recipe."""
    axis = schema.of(Axis, grading=_grading, n=schema.whole(1))
    rule = schema.of(TerminalRule, _KNOWN, grid=None)
    check = schema.of(
        kind,
        grid=None,
        axes=schema.many(axis, 1, _MOST_AXES),
        scheme=schema.text(list(SCHEMES)),
        stepper=schema.text(list(STEPPERS)),
        terminal=schema.optional(rule),
        averages=schema.mapping(rule),
        times=schema.many(schema.number()),
        estimate=schema.mapping(schema.many(schema.number(finite=False), 1)),
    )

    def checked(value: Any, where: str) -> dict[str, Any]:
        found: dict[str, Any] = check(value, where)
        memory.require("axes", [axis["n"] for axis in found["axes"]])
        return found

    return checked


def motion() -> schema.Check:
    """The check of the record of faces that move."""
    times = schema.many(schema.number())
    sums = schema.many(schema.pair(schema.array("f", None)), 1)
    curve = schema.table({"edges": times, "sums": sums, "breaks": times})
    axes = schema.many(schema.many(schema.optional(curve), 2, 2), 1, _MOST_AXES)
    ends = schema.many(schema.pair(schema.number(finite=False)), 1, _MOST_AXES)
    return schema.table({"axes": axes, "reference": ends})


def consistent(made: "Discretization") -> "Discretization":
    """The recipe itself, whose parts fit together.

    Raises
    ------
    ValueError
        With what does not.
    """
    for i, axis in enumerate(made.grid.axes):
        steps = np.diff(axis.nodes)
        _hold(bool(np.isfinite(axis.nodes).all() and (steps > 0).all()), f"nodes of axis {i + 1} that do not increase")
    times = np.asarray(made.times)
    _hold(
        len(times) == 0 or (times[0] == 0.0 and bool((np.diff(times) > 0).all())), "times that do not increase from 0"
    )
    for axis in made.grid.axes:
        _within(np.asarray(axis.breaks, dtype=int), axis.n, "breaks")
    for rule in (made.terminal, *made.averages.values()):
        if rule is not None:
            _consistent_rule(rule)
    return made


def _consistent_rule(rule: TerminalRule) -> None:
    grid, lattice = rule.grid, [len(v) for v in rule.lattice]
    # without a lattice nothing is smoothed, and the other parts are those of an empty rule
    _hold(rule.order >= 0 and len(lattice) in (0, grid.dim), "a lattice of other dimensions than the grid")
    _hold(len(rule.smoothing) == len(lattice), "smoothing of other dimensions than the lattice")
    _hold(bool(lattice) or rule.touched.size == rule.rough.size == 0, "smoothed nodes without a lattice")
    for axis, n, matrix in zip(grid.axes if lattice else (), lattice, rule.smoothing, strict=True):
        _hold(matrix.shape == (axis.n, n), "smoothing that does not fit the grid")
        matrix.check_format(full_check=True)  # places in it are used without a look
    _within(rule.touched, grid.size, "smoothed nodes")
    _within(rule.rough, math.prod(lattice) if lattice else 0, "rough cells")
    _within(rule.owner, len(rule.rough), "owners of rough cells")
    _hold([rule.touched.ndim, rule.rough.ndim, rule.points.ndim] == [1, 2, 3], "arrays of a terminal rule")
    _within(rule.met, grid.size, "nodes on breaks")
    fits = rule.beside.shape == (*rule.shares.shape, grid.dim) and len(rule.shares) == len(rule.met)
    _hold(rule.met.size == 0 or fits, "sides of nodes on breaks")
    if rule.rough.size:
        rows, m, d = rule.points.shape
        _hold(d == grid.dim and rule.owner.shape == (rows,), "points of rough cells")
        _hold(all(w.ndim == 3 and w.shape[:2] == (rows, m) for w in rule.weights), "weights of rough cells")
        _hold(math.prod(w.shape[2] for w in rule.weights) == rule.rough.shape[1], "weights of rough cells")


def _within(places: np.ndarray, most: int, what: str) -> None:
    ok = places.size == 0 or (places.dtype.kind in "iu" and places.min() >= 0 and places.max() < most)
    _hold(ok, f"{what} that are not there")


def _hold(true: bool, what: str) -> None:
    if not true:
        raise ValueError(f"discretization: got {what}")
