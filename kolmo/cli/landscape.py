"""The loss landscape of somebody's network, from the command line."""

import dataclasses
import importlib
import math
import shlex
import sys
from pathlib import Path
from typing import Any

from kolmo import experiments
from kolmo.cli.kinds import KINDS, Kind, asked
from kolmo.cli.perform import Manner, perform, reopened
from kolmo.errors import InputError, KolmoError
from kolmo.files import is_file, opened, schema
from kolmo.report import Figure, Measured, Relief, Section, Table, write_report
from kolmo.runs import Run

__all__ = ["Options", "landscape", "report", "resume"]

_KIND = "landscape"


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


def landscape(options: Options, manner: Manner) -> int:
    """Measure the surface, draw it, and write numbers and report into a run folder; return the exit code."""
    model, loss = _made(options)
    run = Run.create(_KIND, dataclasses.asdict(options), out=manner.out, seeds=[options.seed])
    return _measured(run, options, model, loss, manner)


def resume(folder: Path, manner: Manner) -> int:
    """Go on with a landscape that was interrupted; what was evaluated is kept. Return the exit code."""
    options = _asked(reopened(folder, _KIND, "one of kolmo landscape"))
    model, loss = _made(options)
    return _measured(Run.resume(folder, take_over=manner.take_over), options, model, loss, manner)


_CONFIG = schema.of(Options, points=schema.whole(5, 1001), draws=schema.whole(1), span=schema.number(0.0))


def _asked(run: Run) -> Options:
    """What was asked, from the folder of a run."""
    return Options(**asked(run, _CONFIG))


def _measured(run: Run, options: Options, model: Any, loss: Any, manner: Manner) -> int:
    def work() -> dict[str, Any]:
        from matplotlib.figure import Figure as Canvas

        from kolmo import landscape as rooms

        surface = rooms.surface(
            loss,
            model,
            rooms.random_plane(model, seed=options.seed),
            span=options.span,
            points=options.points,
            draws=options.draws,
            seed=options.seed,
            noisy=options.noisy,
            path=run.folder / "surface.npz",
            progress=not manner.quiet,
        )
        run.save_figure("contours", surface.plot(ax=Canvas(layout="constrained").subplots()).figure)
        found = rooms.summary(surface)
        return {name: dataclasses.asdict(found[name]) for name in found}

    return perform(run, work, manner.as_json)


def report(run: Run) -> Path:
    """Write the report of a landscape from its surface and its results."""
    from kolmo.landscape import Surface

    options, surface = _asked(run), Surface.load(run.folder / "surface.npz")
    error = f", {options.draws} noisy passes a point" if options.draws > 1 else ""
    turning = Relief(
        surface.axes,
        {"": surface.mean},
        f"{surface.name} over a random plane through the weights",
        f"A random filter-normalised plane{error}. Drag to turn it.",
        height=surface.name,
    )
    drawn = Figure(run.figure("contours"), f"{surface.name} over a random plane through the weights", "The same plane.")
    rows = [
        [name, Measured(q["value"], q["standard_error"]) if q["standard_error"] else q["value"], q["definition"]]
        for name, q in run.results.items()
    ]
    sections = [Section("Landscape", [turning, drawn, Table(["quantity", "value", "definition"], rows)])]
    return write_report(run, sections, title=f"Loss landscape of {options.model}", command=_command(options))


def _made(options: Options) -> tuple[Any, Any]:
    """Model and loss, from a run folder or a factory, with the weights of a state dict if one is named."""
    if is_file(Path(options.model) / "config.json"):
        model, loss = _of_run(Path(options.model), options.network)
    elif options.network is not None:
        raise InputError("network", repr(options.network), "none beside a factory, which returns one model")
    else:
        model, loss = _factory(options.model)
    if options.state is not None:
        _restore(model, Path(options.state))
    return model, loss


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
    except (Exception, SystemExit) as error:
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
        with opened(path) as file:
            model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    except Exception as error:  # whatever a damaged file leads to
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


def _shown(results: dict[str, Any]) -> dict[str, str]:
    """Every quantity with its error, in a line; None stands for what is no number."""
    from kolmo.landscape import Quantity

    def number(value: float | None) -> float:
        return math.nan if value is None else value

    return {
        name: str(Quantity(number(q["value"]), number(q["standard_error"]), q["definition"]))
        for name, q in results.items()
    }


_NUMBER = schema.optional(schema.number())
KINDS.add(
    _KIND,
    Kind(
        again=lambda run: f"kolmo landscape --resume {shlex.quote(str(run.folder))}",
        report=report,
        results=schema.mapping(
            schema.table({"value": _NUMBER, "standard_error": _NUMBER, "definition": schema.text()})
        ),
        shown=_shown,
    ),
)
