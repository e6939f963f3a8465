"""Perform a run that a command made: the work, its results, the report and the answer, however it ends."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import click

from kolmo.cli.kinds import Kind, going_on, kind_of
from kolmo.cli.text import readable
from kolmo.errors import InputError, KolmoError
from kolmo.files import damage
from kolmo.runs import Run

__all__ = ["Manner", "perform", "reopened", "rewrite"]

# Lines of an answer that a terminal shows.
LINES = 10


class Manner(NamedTuple):
    """How a run is kept and told of: what every command that makes one can be asked."""

    out: Path | None
    resume: Path | None
    take_over: bool
    quiet: bool
    as_json: bool


def perform(run: Run, work: Callable[[], Mapping[str, Any]], as_json: bool) -> int:
    """Do the work of a run, keep its results, write its report and print the answer; return the exit code.

    Whatever ends it early, the command that goes on with it is told; what is no mistake of the user's is in its log.
    """
    click.echo(f"run folder: {run.folder}", err=True)
    kind, kept = kind_of(run), f"Finished work is kept; go on with: {going_on(run)}"
    try:
        with run:
            run.save_results(work())
            path = kind.report(run)
    except KeyboardInterrupt:
        click.echo(f"kolmo: interrupted. {kept}", err=True)
        return 1
    except KolmoError:
        click.echo(kept, err=True)
        raise
    except Exception as error:
        message = f"kolmo: {type(error).__name__}: {error} (the trace is in {run.folder / 'log.txt'})."
        click.echo(f"{message} {kept}", err=True)
        return 1
    answer = {"run": str(run.folder), "report": str(path), "results": run.results}
    click.echo(json.dumps(answer, indent=2) if as_json else f"{summary(kind, run)}\nreport: {path}")
    return 0


def summary(kind: Kind, run: Run) -> str:
    """What a terminal shows of a run: its conclusions, or its first numbers; the rest is in its folder."""
    told = kind.said(run)
    lines = told if told else readable(kind.shown(run.results)).splitlines()
    if len(lines) <= LINES:
        return "\n".join(lines)
    rest = f"… {len(lines) - LINES + 1} more in {run.folder / 'results.json'}"
    return "\n".join([*lines[: LINES - 1], rest])


def reopened(folder: Path, name: str, needed: str) -> Run:
    """The run in a folder, to be gone on with; one of another name is refused, with the command that does so."""
    found = Run.open(folder)
    if found.name != name:
        raise InputError("resume", f"a run of {found.name!r}", needed, going_on(found))
    return found


def rewrite(run: Run) -> Path:
    """Write the report of a run again, from what its folder holds.

    Raises
    ------
    InputError
        When the run has no results yet, and its report needs them.
    FileError
        When a file is damaged, or does not hold what the report needs.
    """
    path, kind = run.folder / "results.json", kind_of(run)
    if path.exists():
        with damage(path):
            kind.results(run.results, "results")
    elif not kind.early(run):
        raise InputError("run", f"{run.folder}, which is {run.status}", "a run that has results", going_on(run))
    return kind.report(run)
