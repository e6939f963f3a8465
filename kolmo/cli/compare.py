"""Expected losses of the networks in a run, by the network itself and by its equation."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kolmo import experiments
from kolmo.report import Measured
from kolmo.runs import Run

if TYPE_CHECKING:
    from torch import Tensor

    from kolmo.bridge import FlowClassifier, LossEstimate

__all__ = ["compare"]


def compare(
    folder: Path, only: tuple[str, ...], examples: int | None, order: int, rtol: float, quiet: bool, as_json: bool
) -> int:
    """Print both losses of every network, averaged over held-out examples, and return the exit code."""
    found = experiments.networks(Run.open(folder), only)
    answer = {}
    for name, (model, x, y) in found.items():
        if not quiet:
            click.echo(f"{name} ...", err=True)
        answer[name] = compared(model, x[:examples], y[:examples], order, rtol)
    if as_json:
        click.echo(json.dumps(answer, indent=2))
        return 0
    width = max(len(name) for name in answer)
    click.echo(f"{'':{width}}  {'network':>20}  {'PDE':>20}  {'network - PDE':>24}")
    for name, losses in answer.items():
        shown = [str(Measured(*losses[part])) for part in ("network", "PDE", "difference")]
        click.echo(f"{name:{width}}  {shown[0]:>20}  {shown[1]:>20}  {shown[2]:>24}")
    return 0


def compared(model: "FlowClassifier", x: "Tensor", y: "Tensor", order: int, rtol: float) -> dict[str, Any]:
    """Mean loss with its error estimate: by recursion over the layers, without sampling, and by the modified equation.

    Their difference is the weak error of the equation, as far as it exceeds its own error estimate.
    """
    network = model.expected_loss(x, y, method="recursion", rtol=rtol)
    equation = model.expected_loss(x, y, method="pde", rtol=rtol, order=order)
    difference = float((network.mean - equation.mean).mean())
    errors = [_error(estimate) for estimate in (network, equation)]
    return {
        "network": [float(network.mean.mean()), errors[0]],
        "PDE": [float(equation.mean.mean()), errors[1]],
        "difference": [difference, sum(errors)],
        "order": order,
        "examples": len(y),
    }


def _error(estimate: "LossEstimate") -> float:
    """Error of the mean over examples: estimates may all have one sign."""
    return 0.0 if estimate.error_estimate is None else float(estimate.error_estimate.mean())
