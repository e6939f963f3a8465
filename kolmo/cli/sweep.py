"""A sweep from the command line: make or resume its run, do the tasks, average over seeds, report."""

import shlex
from pathlib import Path
from typing import Any

from kolmo import experiments
from kolmo import sweep as sweeps
from kolmo.cli.kinds import KINDS, Kind, asked
from kolmo.cli.perform import Manner, perform, reopened
from kolmo.cli.text import averaged
from kolmo.errors import InputError, KolmoError
from kolmo.files import damage, schema
from kolmo.report import Section, Table, write_report
from kolmo.runs import Run

__all__ = ["report", "sweep"]

_KIND = "sweep"


def sweep(
    name: str,
    *,
    fixed: dict[str, str],
    varied: dict[str, list[str]],
    seeds: int | None,
    scheduler: str | None,
    workers: int,
    manner: Manner,
) -> int:
    """Run every combination of settings; return the exit code."""
    if manner.resume is not None:
        if fixed or varied or seeds is not None or manner.out is not None:
            raise InputError("resume", "options beside it", "none but --scheduler and --workers")
        fixed, varied = _asked(reopened(manner.resume, f"{_KIND}-{name}", f"a sweep of {name!r}"))
        with damage(manner.resume / "config.json"):
            tasks = sweeps.settings(name, fixed, varied)
        run = Run.resume(manner.resume, take_over=manner.take_over)
    else:
        if seeds is not None:
            fixed, varied = _seeded(name, fixed, varied, seeds)
        tasks = sweeps.settings(name, fixed, varied)
        run = Run.create(
            f"{_KIND}-{name}",
            {"set": fixed, "vary": varied},
            out=manner.out,
            seeds=[int(s) for s in varied.get("seed", [])],
        )

    def work() -> dict[str, Any]:
        failed = sweeps.perform(run, name, tasks, scheduler=scheduler, workers=workers, progress=not manner.quiet)
        if failed:
            said = [f"{key}: {message}" for key, message in failed.items()]
            raise KolmoError("\n".join([*said, f"{len(failed)} of {len(tasks)} tasks failed; the others are kept."]))
        return _averaged(run, tasks)

    return perform(run, work, manner.as_json)


def _seeded(
    name: str, fixed: dict[str, str], varied: dict[str, list[str]], seeds: int
) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Settings with so many seeds, each a task."""
    config = experiments.load(name).Config
    known = [option for option, _, _ in experiments.options(config)]
    if "seed" not in known or "seed" in varied:
        raise InputError("seeds", seeds, "an experiment with an option 'seed' that is not varied already")
    first = experiments.configure(config, {"seed": fixed["seed"]} if "seed" in fixed else {}).seed
    others = {key: value for key, value in fixed.items() if key != "seed"}
    one = {"seeds": "1"} if "seeds" in known else {}
    return others | one, {**varied, "seed": [str(first + i) for i in range(seeds)]}


_WORDS = schema.mapping(schema.text())
_CONFIG = schema.table({"set": _WORDS, "vary": schema.mapping(schema.many(schema.text(), 1))})


def _asked(run: Run) -> tuple[dict[str, str], dict[str, list[str]]]:
    """What is fixed and what is varied in a sweep, from its folder."""
    config = asked(run, _CONFIG)
    return config["set"], config["vary"]


def _averaged(run: Run, tasks: dict[str, dict[str, str]]) -> dict[str, Any]:
    """Mean and standard error over the seeds, for every combination of the other settings."""
    varied = [key for key in run.config["vary"] if key != "seed"]
    groups: dict[str, list[str]] = {}
    for key, values in tasks.items():
        groups.setdefault(" ".join(f"{name}={values[name]}" for name in varied) or "all", []).append(key)
    return {group: sweeps.averages(run.load_unit(key) for key in keys) for group, keys in groups.items()}


def report(run: Run) -> Path:
    """Write the report of a sweep from its results."""
    name = _swept(run)
    fixed, varied = _asked(run)
    rows = [
        [group, number, averaged(**found)]
        for group, numbers in run.results.items()
        for number, found in numbers.items()
    ]
    table = Table(["settings", "quantity", "mean ± standard error"], rows, "Over the seeds of each setting.")
    words = [f"--set {shlex.quote(f'{key}={value}')}" for key, value in fixed.items()]
    words += [f"--vary {shlex.quote(f'{key}={v}')}" for key, values in varied.items() for v in values]
    command = " ".join(["kolmo sweep", name, *words])
    return write_report(run, [Section("Results", [table])], title=f"Sweep of {name}", command=command)


def _swept(run: Run) -> str:
    """The experiment that a run is a sweep of."""
    return run.name.removeprefix(f"{_KIND}-")


_NUMBER = schema.optional(schema.number())
KINDS.add(
    _KIND,
    Kind(
        again=lambda run: f"kolmo sweep {_swept(run)} --resume {shlex.quote(str(run.folder))}",
        report=report,
        results=schema.mapping(schema.mapping(schema.table({"mean": _NUMBER, "standard_error": _NUMBER}))),
    ),
)
