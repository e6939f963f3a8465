"""The experiments: found, listed, loaded, configured.

An experiment is one short file in the folder ``experiments/`` of the source tree, which travels inside the package
when it is installed. It has

- a docstring whose first line says what it does (`kolmo list` shows it);
- a frozen dataclass ``Config``: its options, each with a type and a default. Fields called ``seeds`` (how many) and
  ``seed`` (the first) are what ``--seeds`` and ``--seed`` set;
- ``run(config, run, progress)``: does the work in units of ``run`` (a `kolmo.runs.Run`) and returns the results, a
  dictionary; ``progress`` says whether to show progress on stderr;
- if it likes, ``report(run)``: the sections of its report (`kolmo.report`), made from what is in the run folder alone;
- if it likes, ``conclusions(run)``: what the numbers say, in sentences (`kolmo.report.compared` and others make them
  with their errors); they end the report and are what a terminal shows;
- if it likes, ``networks(run)``: the trained networks in the run folder, by name, each a triple of a flow classifier,
  inputs and labels of held-out data; `kolmo compare` and `kolmo landscape` take them.

This module doubles as a package whose modules are those files, so ``import kolmo.experiments.demo`` works from a
source tree and from a wheel, and in the worker processes of either.
"""

import ast
import dataclasses
import importlib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

from kolmo.errors import InputError, KolmoError, did_you_mean
from kolmo.runs import Run

if TYPE_CHECKING:
    from torch import Tensor

    from kolmo.bridge import FlowClassifier
    from kolmo.report import Section

    Network = tuple[FlowClassifier, Tensor, Tensor]

__all__ = ["Experiment", "configure", "describe", "folder", "load", "names", "networks", "options", "seeds", "written"]


class Experiment(Protocol):
    """What an experiment's file has; ``report``, ``conclusions`` and ``networks`` are optional.

    ``EARLY_REPORT = True`` in the file says that its report can be written of a run that has no results yet.
    """

    Config: type[Any]

    def run(self, config: Any, run: Run, progress: bool) -> dict[str, Any]:
        """Do the work and return the results."""

    def report(self, run: Run) -> "Sequence[Section]":
        """Return the sections of the report, from what is in the run folder."""

    def conclusions(self, run: Run) -> "Sequence[str]":
        """Return what the numbers say, in sentences."""

    def networks(self, run: Run) -> "Mapping[str, Network]":
        """Return the trained networks in the run folder."""


def folder() -> Path:
    """Return the folder of the experiments: in the package when installed, beside it in a source tree."""
    package = Path(__file__).resolve().parent
    installed = package / "_experiments"
    return installed if installed.is_dir() else package.parent / "experiments"


__path__ = [str(folder())]


def names() -> list[str]:
    """Return the names of all experiments.

    Examples
    --------
    >>> "__init__" in names()
    False
    """
    return sorted(path.stem for path in folder().glob("[!_]*.py"))


def describe(name: str) -> str:
    """Return the first line of an experiment's docstring, without running the file."""
    docstring = ast.get_docstring(ast.parse((folder() / f"{name}.py").read_text(encoding="utf-8")))
    return (docstring or "").partition("\n")[0]


def load(name: str) -> Experiment:
    """Import an experiment by name.

    Raises
    ------
    InputError
        When there is none of that name; the message lists those there are.

    Examples
    --------
    >>> load("no such thing")
    Traceback (most recent call last):
    ...
    kolmo.errors.InputError: experiment: got 'no such thing'; needed one of ...
    """
    if name not in names():
        raise InputError("experiment", repr(name), f"one of {', '.join(names())}", did_you_mean(name, names()))
    module = importlib.import_module(f"{__name__}.{name}")
    for attribute in ("Config", "run"):
        if not hasattr(module, attribute):
            raise KolmoError(f"the experiment {module.__file__} has no {attribute}.")
    return cast("Experiment", module)


def networks(run: Run, only: Sequence[str] = ()) -> "dict[str, Network]":
    """Return the trained networks of a run, those of some names or all, each with held-out inputs and labels.

    Raises
    ------
    InputError
        When the run's experiment keeps none, the run has not come that far, or there is none of that name.
    """
    chosen = load(run.name)
    if not hasattr(chosen, "networks"):
        keeps = [name for name in names() if "\ndef networks(" in (folder() / f"{name}.py").read_text(encoding="utf-8")]
        raise InputError("run", f"a run of {run.name!r}, which keeps no networks", f"a run of {' or '.join(keeps)}")
    if run.status != "done":
        fix = f"kolmo experiment {run.name} --resume {run.folder}"
        raise InputError("run", f"{run.folder}, which is {run.status}", "a run that is done", fix)
    found = dict(chosen.networks(run))
    for name in only:
        if name not in found:
            raise InputError("network", repr(name), f"one of {', '.join(found)}", did_you_mean(name, found))
    return {name: network for name, network in found.items() if not only or name in only}


def options(config: type[Any]) -> list[tuple[str, str, Any]]:
    """Return name, type and default of each option of a ``Config``."""
    hints = typing.get_type_hints(config)
    return [(field.name, _type_name(hints[field.name]), _default(field)) for field in dataclasses.fields(config)]


def configure(config: type[Any], values: Mapping[str, Any]) -> Any:
    """Make a ``Config`` from strings typed by a user or from values stored as JSON.

    Parameters
    ----------
    config : type
        A frozen dataclass; its fields are ``int``, ``float``, ``bool``, ``str``, ``Literal``, tuples of these (written
        with commas) or one of these ``| None`` (written ``none``).
    values : mapping
        Option names to values; what is absent keeps its default.

    Returns
    -------
    Config
        The configuration.

    Raises
    ------
    InputError
        For an unknown name (the known ones are listed) or a value that does not fit the option's type.

    Examples
    --------
    >>> @dataclasses.dataclass(frozen=True)
    ... class Config:
    ...     depths: tuple[int, ...] = (8, 16)
    ...     noise: float = 0.1
    >>> configure(Config, {"depths": "4,8,16"})
    Config(depths=(4, 8, 16), noise=0.1)
    """
    hints = typing.get_type_hints(config)
    known = [field.name for field in dataclasses.fields(config)]
    for key in values:
        if key not in known:
            raise InputError(key, f"an unknown option {key!r}", f"one of {', '.join(known)}", did_you_mean(key, known))
    return config(**{key: _parse(key, hints[key], value) for key, value in values.items()})


def written(value: Any) -> str:
    """Write an option's value the way `configure` reads it.

    Examples
    --------
    >>> written((8, 16)), written(0.1), written(None)
    ('8,16', '0.1', 'none')
    """
    if isinstance(value, list | tuple):
        return ",".join(written(item) for item in value)
    return "none" if value is None else str(value)


def seeds(config: Any) -> list[int]:
    """Return the seeds that a configuration asks for: ``seeds`` of them from ``seed`` on."""
    first = getattr(config, "seed", None)
    count = getattr(config, "seeds", 1)
    return [] if first is None else list(range(first, first + count))


def _default(field: "dataclasses.Field[Any]") -> Any:
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


def _type_name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint).replace("typing.", "")


def _parse(key: str, hint: Any, value: Any) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None or (isinstance(value, str) and value.lower() == "none" and types.NoneType in arguments):
            return None
        return _parse(key, next(argument for argument in arguments if argument is not types.NoneType), value)
    if origin is tuple:
        items = [item for item in value.split(",") if item.strip()] if isinstance(value, str) else value
        return tuple(_parse(key, arguments[0], item) for item in items)
    if origin is Literal:
        if value not in arguments:
            raise InputError(
                key, repr(value), f"one of {', '.join(map(str, arguments))}", did_you_mean(str(value), arguments)
            )
        return value
    return _parse_scalar(key, hint, value)


def _parse_scalar(key: str, kind: Any, value: Any) -> Any:
    if kind is bool:
        words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
        if str(value).lower() in words:
            return words[str(value).lower()]
        raise InputError(key, repr(value), "true or false")
    if kind not in (int, float, str):
        raise KolmoError(f"the option {key} has a type that cannot be set: {_type_name(kind)}.")
    try:
        return kind(value.strip() if isinstance(value, str) else value)
    except (TypeError, ValueError):
        raise InputError(key, repr(value), {int: "a whole number", float: "a number"}[kind]) from None
