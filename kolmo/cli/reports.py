"""The report of a run, whatever command made it, written again from what its folder holds."""

from pathlib import Path

from kolmo.cli import equation_run, landscape, perform, sweep
from kolmo.cli.kinds import SWEEP, going_on
from kolmo.errors import InputError
from kolmo.runs import Run

__all__ = ["rewrite"]


def rewrite(run: Run) -> Path:
    """Write the report of a run again, from what its folder holds.

    Raises
    ------
    InputError
        When the run has no results yet.
    """
    if not (run.folder / "results.json").exists():
        raise InputError("run", f"{run.folder}, which is {run.status}", "a run that has results", going_on(run))
    if run.name.startswith(SWEEP):
        return sweep.report(run)
    if run.name == "landscape":
        return landscape.report(run)
    if run.name in ("solve", "control"):
        return equation_run.report(run)
    return perform.report(run)
