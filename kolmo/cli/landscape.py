"""The loss landscape of somebody's network, from the command line."""

import dataclasses
import importlib
import json
import pickle
import shlex
import sys
from pathlib import Path
from typing import Any

import click

from kolmo import experiments
from kolmo.cli.text import readable
from kolmo.errors import InputError, KolmoError
from kolmo.report import Figure, Measured, Section, Table, write_report
from kolmo.runs import Run

__all__ = ["Options", "landscape"]


@dataclasses.dataclass(frozen=True)
class Options:
    """What was asked; kept in the run folder."""

    model: str
    network: str | None
    state: str | None
    points: int
    draws: int
    seed: int
    span: float
    noisy: bool | None


def landscape(options: Options, out: Path | None, quiet: bool, as_json: bool) -> int:
    """Measure the surface, draw it, and write numbers and report into a run folder; return the exit code."""
    from kolmo import landscape as rooms

    model, loss = _made(options)
    if options.state is not None:
        _restore(model, Path(options.state))
    with Run.create("landscape", dataclasses.asdict(options), out=out, seeds=[options.seed]) as run:
        click.echo(f"run folder: {run.folder}", err=True)
        plane = rooms.random_plane(model, seed=options.seed)
        surface = rooms.surface(
            loss,
            model,
            plane,
            span=options.span,
            points=options.points,
            draws=options.draws,
            seed=options.seed,
            noisy=options.noisy,
            path=run.folder / "surface.npz",
            progress=not quiet,
        )
        run.save_figure("contours", surface.plot().figure)
        found = rooms.summary(surface)
        run.save_results(
            {name: {"value": found[name].value, "standard_error": found[name].standard_error} for name in found}
        )
        rows = [
            [name, Measured(found[name].value, found[name].standard_error), found[name].definition] for name in found
        ]
        drawn = Figure(run.figure("contours"), alt="Loss over a random plane through the weights")
        sections = [Section("Landscape", [drawn, Table(["quantity", "value", "definition"], rows)])]
        path = write_report(run, sections, title=f"Loss landscape of {options.model}", command=_command(options))
    answer = {"run": str(run.folder), "report": str(path), "results": run.results}
    shown = {name: str(found[name]) for name in found}
    click.echo(json.dumps(answer, indent=2) if as_json else f"{readable(shown)}\nreport: {path}")
    return 0


def _made(options: Options) -> tuple[Any, Any]:
    """Model and loss, from a run folder or a factory."""
    if (Path(options.model) / "config.json").is_file():
        return _of_run(Path(options.model), options.network)
    if options.network is not None:
        raise InputError("network", repr(options.network), "none beside a factory, which returns one model")
    return _factory(options.model)


def _of_run(folder: Path, name: str | None) -> tuple[Any, Any]:
    """A network of a run, and its cross-entropy on held-out data."""
    from torch.nn.functional import cross_entropy

    found = experiments.networks(Run.open(folder), () if name is None else (name,))
    if len(found) > 1:
        raise InputError("network", "none", f"one of the networks of this run: {', '.join(found)}")
    model, x, y = next(iter(found.values()))
    return model, lambda f: cross_entropy(f(x), y)


def _factory(name: str) -> tuple[Any, Any]:
    """Model and loss from ``package.module:factory``."""
    module, colon, factory = name.partition(":")
    needed = "package.module:factory, a function that returns the model and its loss, or a run folder"
    if not (module and colon and factory):
        raise InputError("model", repr(name), needed)
    sys.path.insert(0, str(Path.cwd()))
    try:
        made = getattr(importlib.import_module(module), factory)()
    except KolmoError:
        raise
    except Exception as error:
        raise InputError("model", f"{name} ({type(error).__name__}: {error})", needed) from error
    finally:
        sys.path.remove(str(Path.cwd()))
    import torch

    if not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], torch.nn.Module) and callable(made[1])):
        fix = "return model, loss with loss(f) -> a scalar, f the model at moved weights"
        raise InputError("model", f"{name} that returns a {type(made).__name__}", "a pair (model, loss)", fix)
    return made


def _restore(model: Any, path: Path) -> None:
    """Load a state dict, weights only: nothing in the file is run."""
    import torch

    try:
        model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except (OSError, RuntimeError, ValueError, TypeError, AttributeError, EOFError, pickle.UnpicklingError) as error:
        first = str(error).strip().partition("\n")[0]
        raise InputError(
            "state", f"{path} ({first})", "a state dict of the model, torch.save(model.state_dict())"
        ) from None


def _command(options: Options) -> str:
    words = ["kolmo landscape", shlex.quote(options.model)]
    for name in ("network", "state", "points", "draws", "seed", "span"):
        value = getattr(options, name)
        words += [] if value is None else [f"--{name} {shlex.quote(str(value))}"]
    if options.noisy is not None:
        words.append("--noisy" if options.noisy else "--plain")
    return " ".join(words)
