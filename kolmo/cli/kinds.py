"""The kinds of runs that commands make: how one goes on, how its report is written, what its results hold.

Every module that makes runs adds its kind here, under the first word of the names of its runs; a name that no other
kind claims is that of an experiment.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kolmo.files import damage
from kolmo.files.schema import Check
from kolmo.registry import Registry
from kolmo.runs import Run

__all__ = ["EXPERIMENT", "KINDS", "Kind", "asked", "going_on", "kind_of"]

EXPERIMENT = "experiment"


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of run.

    Attributes
    ----------
    again : callable
        ``again(run)``: the command that goes on with an unfinished run, or does it again where it is one piece.
    report : callable
        ``report(run)`` writes the report from what the folder holds, and returns its path.
    results : Check
        What its results hold.
    shown : callable
        ``shown(results)``: what of them is shown in a terminal; by default all.
    said : callable
        ``said(run)``: its conclusions in sentences, shown in a terminal in place of numbers; by default none.
    early : callable
        ``early(run)``: whether its report can be written before it has results; by default not.
    """

    again: Callable[[Run], str]
    report: Callable[[Run], Path]
    results: Check
    shown: Callable[[dict[str, Any]], Mapping[str, Any]] = dict
    said: Callable[[Run], list[str]] = lambda _: []
    early: Callable[[Run], bool] = lambda _: False


KINDS = Registry[Kind]("kind of run")


def kind_of(run: Run) -> Kind:
    """The kind of a run, by the first word of its name."""
    word = run.name.partition("-")[0]
    return KINDS[word if word in KINDS else EXPERIMENT]


def asked(run: Run, check: Check) -> dict[str, Any]:
    """What was asked, from the folder of a run."""
    with damage(run.folder / "config.json"):
        found: dict[str, Any] = check(run.config, "config")
    return found


def going_on(run: Run) -> str:
    """The command that goes on with an unfinished run, or does it again where it is one piece."""
    return kind_of(run).again(run)
