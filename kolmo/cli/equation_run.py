"""An equation that is solved as a run: what is kept of it, and its report."""

import contextlib
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kolmo.cli.kinds import KINDS, Kind, asked
from kolmo.cli.text import readable
from kolmo.equations import Equation
from kolmo.equations.document import MAX_BYTES
from kolmo.errors import InputError
from kolmo.files import is_file, read_bytes, read_text, schema
from kolmo.report import Block, Code, Figure, Measured, Section, Table, write_report
from kolmo.runs import Run

if TYPE_CHECKING:
    from kolmo.control import ControlSolution
    from kolmo.solution import Solution

__all__ = ["keep", "kept", "report"]


@contextlib.contextmanager
def kept(name: str, equation: Equation, out: Path | None) -> Iterator[Run | None]:
    """A run in a new folder, with a copy of the equation; none where no folder is named."""
    if out is None:
        yield None
        return
    config, text = {"parameters": equation.parameters}, equation.text.encode()
    run = _unfinished(name, config, text, out)
    if run is None:
        run = Run.create(name, config, out=out, files={"equation.toml": text})
    try:
        with run:
            yield run
    except InputError:
        shutil.rmtree(run.folder)  # of a mistake nothing is kept, so that the folder is free for the next try
        raise


def _unfinished(name: str, config: dict[str, Any], text: bytes, folder: Path) -> Run | None:
    """The run of this very equation that was begun in the folder and not ended, to be done again."""
    if not is_file(folder / "config.json"):
        return None
    run = Run.open(folder)
    same = (run.name, run.config) == (name, config) and is_file(folder / "equation.toml")
    if not same or run.status == "done" or read_bytes(folder / "equation.toml", MAX_BYTES, in_run=True) != text:
        return None
    return Run.resume(folder)


def keep(run: Run, answer: dict[str, Any], solution: "Solution | ControlSolution | None") -> None:
    """Write the results, a figure where there is a solution to draw, and the report."""
    from matplotlib.figure import Figure as Canvas

    from kolmo.solution import Solution

    if isinstance(solution, Solution):
        solution.save(run.folder / "solution.npz")
    if answer["status"] == "interrupted":
        run.interrupted(answer["message"])
    if solution is not None:
        canvas = Canvas(figsize=(6.4, 4.2), layout="constrained")
        ax = solution.plot(ax=canvas.subplots())
        at = np.asarray(answer["at"])
        if at.shape[1] == 1:
            values = np.asarray(answer["values"]).reshape(len(at), -1)[:, 0]
            ax.plot(at[:, 0], values, "o", color="#d55e00", label="at the points")
            ax.legend(frameon=False)
        else:
            ax.plot(at[:, 0], at[:, 1], "o", color="#d55e00", markeredgecolor="white")
        run.save_figure("solution", canvas)
    if "history" in answer:
        run.save_figure("fit", _drawn_fit(answer))
    run.save_results(answer)
    report(run)


def _drawn_fit(answer: dict[str, Any]) -> Any:
    """The objective over the iterations, and beside it the fitted values over their targets where there are any."""
    from matplotlib.figure import Figure as Canvas

    matched = answer["targets"] is not None
    canvas = Canvas(figsize=(8.4 if matched else 5.2, 3.8), layout="constrained")
    axes = canvas.subplots(1, 2) if matched else [canvas.subplots()]
    history = np.asarray(answer["history"], dtype=float)
    axes[0].plot(history, "o-", ms=3)
    axes[0].set(xlabel="iteration", ylabel="objective", yscale="log" if (history > 0).all() else "linear")
    if matched:
        targets, values = np.asarray(answer["targets"]), np.asarray(answer["values"])
        axes[1].axline((float(targets.mean()),) * 2, slope=1.0, color="0.6", lw=0.8)
        axes[1].plot(targets, values, "o", color="#d55e00")
        axes[1].set(xlabel="target", ylabel="u(0, x), fitted")
    return canvas


def report(run: Run) -> Path:
    """Write the report from what the folder holds."""
    answer = run.results
    found: list[Block] = [f"{answer['status'].capitalize()}: {answer['message']}."]
    found += _fitted(run, answer) if "objective" in answer else _values(run, answer)
    text = read_text(run.folder / "equation.toml", MAX_BYTES, in_run=True)
    command = f"kolmo {run.name} equation.toml{_set_to(run)}"
    sections = [Section("Answer", found), Section("What was asked", ["`equation.toml` in the folder:", Code(text)])]
    titles = {"solve": "An equation solved", "control": "A parameter fit" if "objective" in answer else "A control"}
    told = _concluded(answer)
    return write_report(run, sections, title=titles[run.name], command=command, conclusions=told)


def _concluded(answer: dict[str, Any]) -> list[str]:
    """What the answer says, in a sentence or two."""
    done = answer["status"] in ("converged", "fixed")
    if "objective" in answer:
        before, after = answer["objective_before"], answer["objective"]
        fell = (
            f"The objective fell from {before:.4g} to {after:.4g}" if after < before else "The objective did not fall"
        )
        found = "; the fit has arrived." if done else f"; the fit has not arrived: {answer['message']}."
        return [f"{fell} in {answer['iterations']} iterations{found}"]
    values, errors = (np.array(answer[key], dtype=float).reshape(-1) for key in ("values", "error_estimate"))
    if not (np.isfinite(values).all() and np.isfinite(errors).all()):
        return ["Not every value is known: see the table."]
    k, several = int(errors.argmax()), len(errors) > 1
    what = f"The least certain of {len(values)} values is" if several else "The value is"
    met = "the tolerance is met" if done else f"the tolerance is not met: {answer['message']}"
    return [f"{what} {Measured(values[k], errors[k])}; {met}."]


def _values(run: Run, answer: dict[str, Any]) -> list[Block]:
    at, values, errors = (
        np.array(answer[key], dtype=float).reshape(len(answer["at"]), -1) for key in ("at", "values", "error_estimate")
    )
    header = ["x" if at.shape[1] == 1 else ", ".join(f"x[{i}]" for i in range(at.shape[1]))]
    header += ["u(0, x)"] if values.shape[1] == 1 else [f"u{j}(0, x)" for j in range(values.shape[1])]
    rows: list[list[object]] = [[point(x), *map(Measured, v, e)] for x, v, e in zip(at, values, errors, strict=True)]
    if "policy" in answer:
        header.append("control")
        for row, a in zip(rows, answer["policy"], strict=True):
            row.append(readable(a))
    size = f"{answer['cells']} cells, {answer['steps']} steps."
    blocks: list[Block] = [Table(header, rows, f"± the estimated error of the discretisation; {size}")]
    drawn = run.figure("solution")
    return [*blocks, Figure(drawn, "The solution at t = 0", "u(0, ·), and the points.")] if drawn.exists() else blocks


def _fitted(run: Run, answer: dict[str, Any]) -> list[Block]:
    rows = [[name, f"{value:.10g}"] for name, value in answer["parameters"].items()]
    caption = f"Objective {answer['objective']:.4g}, before {answer['objective_before']:.4g}."
    blocks: list[Block] = [Table(["parameter", "value"], rows, f"{caption} {answer['iterations']} iterations.")]
    drawn = run.figure("fit")
    if not drawn.exists():
        return blocks
    blocks.append(Figure(drawn, "The objective over the iterations", "The fit, iteration by iteration."))
    header = ["x", "u(0, x)", "weight"]
    columns = [[point(x) for x in answer["at"]], answer["values"], answer["weights"]]
    if answer["targets"] is not None:
        header, columns = [*header, "target"], [*columns, answer["targets"]]
    return [*blocks, Table(header, [list(row) for row in zip(*columns, strict=True)], "At the points of the fit.")]


def point(x: Any) -> str:
    """Coordinates, or other numbers, in a row."""
    return ", ".join(f"{c:g}" for c in np.atleast_1d(x))


_CONFIG = schema.table({"parameters": schema.mapping(schema.number())})


def _set_to(run: Run) -> str:
    """The parameters of a run, as options."""
    parameters = asked(run, _CONFIG)["parameters"]
    return "".join(f" --set {shlex.quote(f'{name}={value!r}')}" for name, value in parameters.items())


def _again(run: Run) -> str:
    file, folder = (shlex.quote(str(path)) for path in (run.folder / "equation.toml", run.folder))
    return f"kolmo {run.name} {file}{_set_to(run)} --out {folder}"


_NUMBER = schema.optional(schema.number())  # None: not a number
_ROWS = schema.many(schema.many(_NUMBER, 1), 1)
_SAID = {"status": schema.text(), "message": schema.text(), "at": _ROWS}


def _columns(value: Any, where: str) -> Any:
    """A number for each point, or a row of them."""
    return (_ROWS if isinstance(value, list) and value and isinstance(value[0], list) else schema.many(_NUMBER, 1))(
        value, where
    )


_VALUES = schema.table(
    {**_SAID, "values": _columns, "error_estimate": _columns, "policy": _ROWS, "cells": _NUMBER, "steps": _NUMBER},
    absent=["policy"],
)
_LINE = schema.many(_NUMBER, 1)
_FIT = schema.table(
    {
        **_SAID,
        "values": _LINE,
        "targets": schema.optional(_LINE),
        "weights": _LINE,
        "history": schema.many(_NUMBER),
        "parameters": schema.mapping(schema.number()),
        "objective": schema.number(),
        "objective_before": schema.number(),
        "iterations": schema.whole(0),
    }
)


def _results(value: Any, where: str) -> Any:
    """An answer at points: values, or a fit; all in as many rows as there are points, all rows of one length."""
    found = (_FIT if isinstance(value, dict) and "objective" in value else _VALUES)(value, where)
    for name in ("at", "values", "error_estimate", "policy", "targets", "weights"):
        rows = found.get(name)
        if rows is not None and (len(rows) != len(found["at"]) or len({np.size(row) for row in rows}) > 1):
            raise schema.refuse(f"{where}.{name}", rows, f"{len(found['at'])} rows of one length")
    return found


for _name in ("solve", "control"):
    KINDS.add(_name, Kind(_again, report, _results))
