"""The report of a run: the experiment's own sections, then what they were made with and how to make them again."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from kolmo.files import claims, write_bytes
from kolmo.report.blocks import Code, Section, Table
from kolmo.report.html import as_html
from kolmo.runs import Run

__all__ = ["write_report"]


def write_report(
    run: Run, sections: Sequence[Section], *, title: str, command: str, conclusions: Sequence[str] = ()
) -> Path:
    """Write ``report.html`` into a run folder.

    Parameters
    ----------
    run : Run
        The run.
    sections : sequence of Section
        What the experiment has to say.
    title : str
        The title.
    command : str
        The command that makes the run again.
    conclusions : sequence of str, optional
        What the numbers say, in sentences; they end the report, before how to reproduce it.

    Returns
    -------
    pathlib.Path
        The path of the report.
    """
    subtitle = f"kolmo run `{run.folder.name}`"
    claims.sweep(run.folder, "report.html")  # what a report that was killed left
    ending = [Section("Conclusions", conclusions)] if conclusions else []
    page = as_html(title, [*sections, *ending, _reproduce(run, command)], subtitle, run.folder)
    write_bytes(run.folder / "report.html", page, in_run=True)
    return run.folder / "report.html"


def _reproduce(run: Run, command: str) -> Section:
    made = run.environment
    drawn = ", its figures in `figures/` beside it, each also as PDF" if any((run.folder / "figures").glob("*")) else ""
    versions = ", ".join(f"{name} {version}" for name, version in made["packages"].items() if version)
    facts = [
        ["Python", made["python"]],
        ["packages", versions],
        ["platform", f"{made['platform']}, {made['cores']} cores"],
        ["git revision", made["git"] or "an installed release"],
        ["seeds", ", ".join(map(str, made["seeds"])) or "none"],
        *([f"resumed {one['time']} with", _changes(one["changes"])] for one in made.get("resumed", [])),
        ["threads", ", ".join(f"{name} {count}" for name, count in made["threads"].items()) or "not limited"],
    ]
    return Section(
        "How to reproduce",
        [
            f"The numbers of this report are in `results.json`{drawn}.",
            Code(command),
            Table(
                ["option", "value"], [[key, _shown(value)] for key, value in run.config.items()], "The configuration."
            ),
            Table(["made with", ""], facts, "Machine, source and versions."),
        ],
    )


def _changes(changes: Mapping[str, Sequence[object]]) -> str:
    """Other versions, as a run that was resumed keeps them."""
    return ", ".join(f"{name} {new} (before: {old})" for name, (old, new) in changes.items())


def _shown(value: object) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{key}={_shown(item)}" for key, item in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
