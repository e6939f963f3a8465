"""The report of a run, whatever command made it, written again from what its folder holds."""

from collections.abc import Callable
from pathlib import Path

from kolmo.cli import equation_run, landscape, perform, sweep
from kolmo.cli.kinds import SWEEP, going_on
from kolmo.errors import InputError, KolmoError
from kolmo.files import FileError
from kolmo.runs import Run

__all__ = ["rewrite"]


def rewrite(run: Run) -> Path:
    """Write the report of a run again, from what its folder holds.

    Raises
    ------
    InputError
        When the run has no results yet.
    FileError
        When a file is damaged, or does not hold what the report needs.
    """
    if not (run.folder / "results.json").exists():
        raise InputError("run", f"{run.folder}, which is {run.status}", "a run that has results", going_on(run))
    try:
        return _writer(run)(run)
    except KolmoError:
        raise
    except Exception as error:  # whatever a damaged file leads to
        told = f"{type(error).__name__}: {error}"
        raise FileError(
            f"the files in {run.folder} do not hold what the report needs ({told}): "
            "they are damaged, or another version wrote them."
        ) from error


def _writer(run: Run) -> Callable[[Run], Path]:
    if run.name.startswith(SWEEP):
        return sweep.report
    if run.name == "landscape":
        return landscape.report
    return equation_run.report if run.name in ("solve", "control") else perform.report
