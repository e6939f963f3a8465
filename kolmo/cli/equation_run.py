"""An equation that is solved as a run: what is kept of it, and its report."""

import contextlib
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kolmo.cli.text import readable
from kolmo.equations import Equation
from kolmo.errors import InputError
from kolmo.files import FileError, write_bytes
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
    run = Run.create(name, {"parameters": equation.parameters}, out=out)
    try:
        with run:
            write_bytes(run.folder / "equation.toml", equation.text.encode())
            yield run
    except InputError:
        shutil.rmtree(run.folder)  # of a mistake nothing is kept, so that the folder is free for the next try
        raise


def keep(run: Run, answer: dict[str, Any], solution: "Solution | ControlSolution | None") -> None:
    """Write the results, a figure where there is a solution to draw, and the report."""
    from matplotlib.figure import Figure as Canvas

    from kolmo.solution import Solution

    if isinstance(solution, Solution):
        solution.save(run.folder / "solution.npz")
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
    run.save_results(answer)
    report(run)


def report(run: Run) -> Path:
    """Write the report from what the folder holds."""
    answer = run.results
    found: list[Block] = [f"{answer['status'].capitalize()}: {answer['message']}."]
    found += _fitted(answer) if "objective" in answer else _values(run, answer)
    text = _text(run.folder / "equation.toml")
    words = [f"--set {shlex.quote(f'{name}={value!r}')}" for name, value in run.config["parameters"].items()]
    command = " ".join([f"kolmo {run.name} equation.toml", *words])
    sections = [Section("Answer", found), Section("What was asked", ["`equation.toml` in the folder:", Code(text)])]
    titles = {"solve": "An equation solved", "control": "A parameter fit" if "objective" in answer else "A control"}
    return write_report(run, sections, title=titles[run.name], command=command)


def _values(run: Run, answer: dict[str, Any]) -> list[Block]:
    at, values, errors = (
        np.array(answer[key], dtype=float).reshape(len(answer["at"]), -1) for key in ("at", "values", "error_estimate")
    )
    header = ["x" if at.shape[1] == 1 else ", ".join(f"x[{i}]" for i in range(at.shape[1]))]
    header += ["u(0, x)"] if values.shape[1] == 1 else [f"u{j}(0, x)" for j in range(values.shape[1])]
    rows: list[list[object]] = [
        [", ".join(f"{c:g}" for c in x), *map(Measured, v, e)] for x, v, e in zip(at, values, errors, strict=True)
    ]
    if "policy" in answer:
        header.append("control")
        for row, a in zip(rows, answer["policy"], strict=True):
            row.append(readable(a))
    size = f"{answer['cells']} cells, {answer['steps']} steps."
    blocks: list[Block] = [Table(header, rows, f"± the estimated error of the discretisation; {size}")]
    drawn = run.figure("solution")
    return [*blocks, Figure(drawn, "The solution at t = 0", "u(0, ·), and the points.")] if drawn.exists() else blocks


def _fitted(answer: dict[str, Any]) -> list[Block]:
    rows = [[name, f"{value:.10g}"] for name, value in answer["parameters"].items()]
    caption = f"Objective {answer['objective']:.4g}, before {answer['objective_before']:.4g}."
    return [Table(["parameter", "value"], rows, f"{caption} {answer['iterations']} iterations.")]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"cannot read {path}: {error}.") from error
