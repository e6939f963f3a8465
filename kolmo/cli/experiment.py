"""An experiment from the command line: its run is made, or gone on with, and its report written."""

import dataclasses
import shlex
from pathlib import Path
from typing import Any

from kolmo import experiments
from kolmo.cli.kinds import EXPERIMENT, KINDS, Kind
from kolmo.cli.perform import Manner, perform, reopened
from kolmo.cli.text import readable
from kolmo.errors import InputError, KolmoError
from kolmo.experiments import Experiment
from kolmo.files import damage, schema
from kolmo.report import Figure, Section, Table, write_report
from kolmo.runs import Run

__all__ = ["experiment", "pairs", "report"]


def experiment(
    name: str,
    *,
    assignments: tuple[str, ...],
    seeds: str | None = None,
    seed: str | None = None,
    manner: Manner,
) -> int:
    """Run an experiment and return the exit code."""
    chosen = experiments.load(name)
    values = dict(pairs(assignments, "--set")) | {
        key: value for key, value in (("seeds", seeds), ("seed", seed)) if value is not None
    }
    if manner.resume is None:
        config = experiments.configure(chosen.Config, values)
        run = Run.create(name, dataclasses.asdict(config), out=manner.out, seeds=experiments.seeds(config))
    else:
        run, config = _again(name, chosen, values, manner.resume, manner)
    return perform(run, lambda: chosen.run(config, run, not manner.quiet), manner.as_json)


def report(run: Run) -> Path:
    """Write the report of a run that has results."""
    chosen = experiments.load(run.name)
    title = experiments.describe(run.name).removesuffix(".")
    try:
        sections = chosen.report(run) if hasattr(chosen, "report") else _plain_report(run)
        ending = _conclusions(run) if (run.folder / "results.json").exists() else []
        return write_report(run, sections, title=title, command=_command(run, chosen), conclusions=ending)
    except (KolmoError, OSError):
        raise
    except Exception as error:  # what an experiment's results are, it alone knows
        told = f"the report of the experiment {run.name} fails ({type(error).__name__}: {error})"
        causes = f"another version wrote the files in {run.folder}, they are damaged, or it has a mistake"
        raise KolmoError(f"{told}: {causes}.") from error


def _conclusions(run: Run) -> list[str]:
    """What the numbers of a run say, where its experiment says it."""
    chosen = experiments.load(run.name)
    return list(chosen.conclusions(run)) if hasattr(chosen, "conclusions") else []


def _again(name: str, chosen: Experiment, values: dict[str, str], folder: Path, manner: Manner) -> tuple[Run, Any]:
    if values or manner.out is not None:
        given = ", ".join([*values, *(["--out"] if manner.out is not None else [])])
        raise InputError("resume", f"options beside it ({given})", "no others: a run goes on as it was started")
    found = reopened(folder, name, f"one of {name!r}")
    with damage(folder / "config.json"):
        config = experiments.configure(chosen.Config, found.config)
    return Run.resume(folder, take_over=manner.take_over), config


def pairs(assignments: tuple[str, ...], option: str) -> list[tuple[str, str]]:
    """Keys and values of KEY=VALUE, as given to an option."""
    found = []
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not (key and equals):
            raise InputError(option, repr(assignment), "KEY=VALUE")
        found.append((key.strip(), value))
    return found


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


KINDS.add(
    EXPERIMENT,
    Kind(
        again=lambda run: f"kolmo experiment {run.name} --resume {shlex.quote(str(run.folder))}",
        report=report,
        results=schema.mapping(schema.anything),
        said=_conclusions,
        early=lambda run: getattr(experiments.load(run.name), "EARLY_REPORT", False),
    ),
)
