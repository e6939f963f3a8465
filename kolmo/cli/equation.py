"""Solve, control or fit what an equation file describes, and say the answer with its error."""

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from kolmo.cli.equation_run import keep, kept, point
from kolmo.cli.text import readable
from kolmo.equations import Equation, read
from kolmo.errors import InputError, KolmoWarning
from kolmo.files import plain

if TYPE_CHECKING:
    from kolmo.control import ControlSolution
    from kolmo.solution import Solution

__all__ = ["control", "numbers", "solve", "spoken"]

# What a status means for the exit code; everything else is 1.
_DONE = ("converged", "fixed")


def solve(
    file: Path, assignments: tuple[str, ...], save: Path | None, out: Path | None, quiet: bool, as_json: bool
) -> int:
    """Solve the equation; return the exit code."""
    from kolmo.solve import solve as solve_equation

    equation = read(file, numbers(assignments))
    with kept("solve", equation, out) as run, spoken(equation):
        problem = equation.problem()
        solution = solve_equation(problem, at=equation.at, rtol=equation.rtol, atol=equation.atol, progress=not quiet)
        if solution.status == "interrupted" and 0.0 not in solution.times:
            raise KeyboardInterrupt
        if save is not None:
            solution.save(save)
        answer = _described(equation, solution)
        if run is not None:
            keep(run, answer, solution)
    _say(answer, _value_lines, as_json)
    return 0 if solution.status in _DONE else 1


def control(file: Path, assignments: tuple[str, ...], out: Path | None, quiet: bool, as_json: bool) -> int:
    """Solve the control problem, or fit the parameters; return the exit code."""
    equation = read(file, numbers(assignments))
    if not equation.controlled and equation.fit is None:
        raise InputError(str(file), "neither [controls] nor [fit]", "one of them", f"kolmo solve {file}")
    with kept("control", equation, out) as run, spoken(equation):
        best = _optimum(equation) if equation.controlled else None
        if best is None:
            answer = _fitted(equation, quiet)
        else:
            answer = _described(equation, best, policy=best.policy(0.0, equation.at))
        if run is not None:
            keep(run, answer, best)
    lines = _fit_lines if best is None else _value_lines
    _say(answer, lines, as_json)
    return 0 if answer["status"] in _DONE else 1


def _optimum(equation: Equation) -> "ControlSolution":
    from kolmo.control import solve_hjb

    return solve_hjb(equation.control_problem(), at=equation.at, rtol=equation.rtol, atol=equation.atol)


def _described(equation: Equation, found: "Solution | ControlSolution", **more: Any) -> dict[str, Any]:
    values = found(equation.at)
    return {
        "status": found.status,
        "message": found.message,
        "at": equation.at,
        "values": values,
        "error_estimate": np.broadcast_to(np.asarray(found.error_estimate), np.shape(values)),
        **more,
        "cells": found.stats.get("cells"),
        "steps": found.stats.get("steps"),
    }


def _fitted(equation: Equation, quiet: bool) -> dict[str, Any]:
    import torch

    from kolmo.control import minimize, value

    fit = equation.fit
    assert fit is not None
    free = {
        name: torch.tensor(equation.parameters[name], dtype=torch.float64, requires_grad=True)
        for name in fit.parameters
    }
    problem, weights = equation.problem(free), torch.as_tensor(fit.weights)
    targets = None if fit.targets is None else torch.as_tensor(fit.targets)

    def objective() -> torch.Tensor:
        u = value(problem, equation.at, rtol=equation.rtol, atol=equation.atol)
        if u.ndim > 1:
            raise InputError("terminal", f"{u.shape[-1]} formulas", "one formula where parameters are fitted")
        return (weights * (u if targets is None else (u - targets) ** 2)).sum()

    found = minimize(objective, list(free.values()), bounds=list(fit.bounds), maxiter=fit.maxiter, progress=not quiet)
    history = found.history["objective"]
    with torch.no_grad():
        values = value(problem, equation.at, rtol=equation.rtol, atol=equation.atol)
    return {
        "status": found.status,
        "message": found.message,
        "at": equation.at,
        "values": values.numpy(),
        "targets": fit.targets,
        "weights": fit.weights,
        "history": history,
        "parameters": {name: float(parameter.detach()) for name, parameter in free.items()},
        "objective": float(found.fun),
        "objective_before": float(history[0]) if len(history) else float(found.fun),
        "iterations": int(found.nit),
    }


def numbers(assignments: tuple[str, ...]) -> dict[str, float]:
    """Parameters from NAME=VALUE."""
    numbers = {}
    for assignment in assignments:
        name, _, value = assignment.partition("=")
        try:
            numbers[name.strip()] = float(value)
        except ValueError:
            raise InputError("--set", repr(assignment), "NAME=NUMBER, NAME one of [parameters]") from None
        if not np.isfinite(numbers[name.strip()]):
            raise InputError("--set", repr(assignment), "a finite number")
    return numbers


@contextmanager
def spoken(equation: Equation) -> Iterator[None]:
    """Place errors in the file; of warnings only those of kolmo are shown: formulas may overflow on the way."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore")
        warnings.simplefilter("always", KolmoWarning)
        try:
            yield
        except InputError as error:
            raise equation.placed(error) from None


def _say(answer: dict[str, Any], lines: Callable[[dict[str, Any]], list[str]], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(plain(answer), indent=2))
        return
    click.echo("\n".join(lines(answer)))
    click.echo(f"{answer['status']}: {answer['message']}", err=True)


def _value_lines(answer: dict[str, Any]) -> list[str]:
    """One line for each point: x, value ± estimate for each column, the control where there is one."""
    lines = []
    for i, x in enumerate(answer["at"]):
        values, errors = (np.atleast_1d(answer[key][i]) for key in ("values", "error_estimate"))
        shown = "  ".join(f"{value:.10g} ± {error:.1e}" for value, error in zip(values, errors, strict=True))
        control = f"  a = ({point(answer['policy'][i])})" if "policy" in answer else ""
        lines.append(f"u(0, {point(x)}) = {shown}{control}")
    return lines


def _fit_lines(answer: dict[str, Any]) -> list[str]:
    shown = {name: f"{value:.10g}" for name, value in answer["parameters"].items()}
    return [readable({**shown, "objective": answer["objective"], "before": answer["objective_before"]})]
