"""The kinds of runs that commands make: how each goes on, and how its report is written again."""

import shlex
from pathlib import Path

from kolmo.errors import InputError
from kolmo.runs import Run

__all__ = ["going_on", "report"]

_SWEEP = "sweep-"


def going_on(run: Run) -> str:
    """The command that goes on with an unfinished run, or does it again where it is one piece."""
    folder = shlex.quote(str(run.folder))
    if run.name.startswith(_SWEEP):
        return f"kolmo sweep {run.name.removeprefix(_SWEEP)} --resume {folder}"
    if run.name == "landscape":
        return f"kolmo landscape --resume {folder}"
    if run.name in ("solve", "control"):
        return f"kolmo {run.name} {shlex.quote(str(run.folder / 'equation.toml'))} --out NEW_FOLDER"
    return f"kolmo experiment {run.name} --resume {folder}"


def report(run: Run) -> Path:
    """Write the report of a run again, from what its folder holds.

    Raises
    ------
    InputError
        When the run has no results yet.
    """
    if not (run.folder / "results.json").exists():
        raise InputError("run", f"{run.folder}, which is {run.status}", "a run that has results", going_on(run))
    if run.name.startswith(_SWEEP):
        from kolmo.cli import sweep

        return sweep.report(run)
    if run.name == "landscape":
        from kolmo.cli import landscape

        return landscape.report(run)
    if run.name in ("solve", "control"):
        from kolmo.cli import equation_run

        return equation_run.report(run)
    from kolmo.cli import perform

    return perform.report(run)
