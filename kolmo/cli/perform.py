"""Perform an experiment: make or resume its run, do the work, write results and report."""

import dataclasses
import json
import shlex
from pathlib import Path
from typing import Any

import click

from kolmo import experiments
from kolmo.cli.kinds import going_on
from kolmo.cli.text import readable
from kolmo.errors import InputError, KolmoError
from kolmo.experiments import Experiment
from kolmo.files import damage
from kolmo.report import Figure, Section, Table, write_report
from kolmo.runs import Run

__all__ = ["experiment", "pairs", "report"]


def experiment(
    name: str,
    *,
    assignments: tuple[str, ...],
    seeds: str | None,
    seed: str | None,
    out: Path | None,
    resume: Path | None,
    take_over: bool,
    quiet: bool,
    as_json: bool,
) -> int:
    """Run an experiment and return the exit code."""
    chosen = experiments.load(name)
    values = dict(pairs(assignments, "--set")) | {
        key: value for key, value in (("seeds", seeds), ("seed", seed)) if value is not None
    }
    if resume is None:
        run, config = _start(name, chosen, values, out)
    else:
        run, config = _again(name, chosen, values, out, resume, take_over)
    click.echo(f"run folder: {run.folder}", err=True)
    try:
        with run:
            run.save_results(chosen.run(config, run, not quiet))
            path = report(run)
    except KeyboardInterrupt:
        click.echo(f"kolmo: interrupted. {_how_to_go_on(run)}", err=True)
        return 1
    except KolmoError:
        click.echo(_how_to_go_on(run), err=True)
        raise
    except Exception as error:
        message = f"kolmo: {type(error).__name__}: {error} (the trace is in {run.folder / 'log.txt'})."
        click.echo(f"{message} {_how_to_go_on(run)}", err=True)
        return 1
    answer = {"run": str(run.folder), "report": str(path), "results": run.results}
    click.echo(json.dumps(answer, indent=2) if as_json else f"{readable(run.results)}\nreport: {path}")
    return 0


def report(run: Run) -> Path:
    """Write the report of a run that has results."""
    chosen = experiments.load(run.name)
    sections = chosen.report(run) if hasattr(chosen, "report") else _plain_report(run)
    return write_report(
        run, sections, title=experiments.describe(run.name).removesuffix("."), command=_command(run, chosen)
    )


def _start(name: str, chosen: Experiment, values: dict[str, str], out: Path | None) -> tuple[Run, Any]:
    config = experiments.configure(chosen.Config, values)
    return Run.create(name, dataclasses.asdict(config), out=out, seeds=experiments.seeds(config)), config


def _again(
    name: str, chosen: Experiment, values: dict[str, str], out: Path | None, folder: Path, take_over: bool
) -> tuple[Run, Any]:
    if values or out is not None:
        given = ", ".join([*values, *(["--out"] if out is not None else [])])
        raise InputError("resume", f"options beside it ({given})", "no others: a run goes on as it was started")
    found = Run.open(folder)
    if found.name != name:
        raise InputError(
            "resume", f"a run of {found.name!r}", f"one of {name!r}", f"kolmo experiment {found.name} --resume {folder}"
        )
    with damage(folder / "config.json"):
        config = experiments.configure(chosen.Config, found.config)
    return Run.resume(folder, take_over=take_over), config


def pairs(assignments: tuple[str, ...], option: str) -> list[tuple[str, str]]:
    """Keys and values of KEY=VALUE, as given to an option."""
    found = []
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not (key and equals):
            raise InputError(option, repr(assignment), "KEY=VALUE")
        found.append((key.strip(), value))
    return found


def _how_to_go_on(run: Run) -> str:
    return f"Finished work is kept; go on with: {going_on(run)}"


def _command(run: Run, chosen: Experiment) -> str:
    config = experiments.configure(chosen.Config, run.config)
    changed = [
        (key, getattr(config, key))
        for key, _, default in experiments.options(chosen.Config)
        if getattr(config, key) != default
    ]
    return " ".join(
        [
            f"kolmo experiment {run.name}",
            *(f"--set {key}={shlex.quote(experiments.written(value))}" for key, value in changed),
        ]
    )


def _plain_report(run: Run) -> list[Section]:
    """Report of an experiment that says nothing of its own: its numbers and its figures."""
    rows = [[key, readable(value)] for key, value in run.results.items()]
    figures = [Figure(path, alt=path.stem.replace("-", " ")) for path in sorted((run.folder / "figures").glob("*.png"))]
    sections = [Section("Results", [Table(["quantity", "value"], rows)])]
    return [*sections, Section("Figures", figures)] if figures else sections
