"""Which of the residual additions of a network are meant: rows, names, patterns."""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from torch import nn

from kolmo.bridge.probing import probe
from kolmo.bridge.sites import Followed, Site, Sites, follow, refuse_broken
from kolmo.bridge.watching import Output
from kolmo.errors import InputError

Where = None | str | Site | Sequence[str | Site] | Callable[[str, nn.Module], bool]


class Selection(NamedTuple):
    """The sites that are asked for, in the order of the pass, and the modules that it calls where that is known."""

    sites: Sites
    called: frozenset[str] | None


def select(model: nn.Module, where: Where, inputs: Sequence[Any] | None) -> Selection:
    """Return the sites that `inject` is asked for."""
    rows = [where] if isinstance(where, Site) else where
    if isinstance(rows, (list, tuple)) and rows and all(isinstance(row, Site) for row in rows):
        return Selection(_known(model, Sites(rows)), None)
    followed = _followed(model, inputs)
    names = None if where is None else _named(model, where, followed)
    if followed is None:
        if names is None:
            raise InputError(
                "inputs",
                "none, and the model takes none of those that its first layer suggests",
                "inputs of one pass, to find the residual branches",
                "inject(model, law, inputs=(x,)), or where=bridge.sites(model, x)",
            )
        _refuse_nested(names)
        return Selection(Sites(_trusted(name, k) for k, name in enumerate(names)), None)
    chosen = followed.sites if names is None else _rows(names, followed.sites)
    if names is not None:
        chosen = Sites(sorted(chosen, key=lambda site: site.order))
    refuse_broken(followed, chosen)
    reasons = [why for name, why in followed.unlike.items() if name in chosen.names]
    if reasons:
        fix = "let its code add the same tensors in both modes, or give the branch a module of its own"
        raise InputError("model", reasons[0], "branches that are found again in training mode", fix)
    if followed.dropping in chosen.names:
        raise InputError(
            "model",
            f"{followed.dropping!r}, whose code drops or scales its branch sample by sample in training mode",
            "no noise of the model's own in the branches",
            "set its rate to zero",
        )
    return Selection(_numbered(chosen), followed.called)


def _trusted(name: str, k: int) -> Site:
    """A site of which nothing is known but its name."""
    return Site(name, 1, (k,), float("nan"), (), 0, "unknown", (), name, name.rpartition(".")[0], Output())


def _numbered(chosen: Sites) -> Sites:
    """Sites whose calls are counted among the chosen ones."""
    calls = sorted(k for site in chosen for k in site.order)
    place = {k: i for i, k in enumerate(calls)}
    return Sites(Site(**{**site.__dict__, "order": tuple(place[k] for k in site.order)}) for site in chosen)


def _followed(model: nn.Module, inputs: Sequence[Any] | None) -> Followed | None:
    if inputs is None:
        inputs = probe(model)
        if not inputs:
            return None
    return follow(model, inputs)


def _known(model: nn.Module, rows: Sites) -> Sites:
    """Rows of a table whose modules the model has."""
    modules = dict(model.named_modules())
    for row in rows:
        if row.module not in modules:
            raise InputError("where", f"a site in {row.module!r}", "sites of this model", "call bridge.sites on it")
    return _numbered(rows)


def _named(model: nn.Module, where: Any, followed: Followed | None) -> list[str]:
    """Names that are asked for, in the order of the modules."""
    modules = [(name, module) for name, module in model.named_modules() if name]
    if callable(where):
        return [name for name, module in modules if where(name, module)]
    patterns = [p.name if isinstance(p, Site) else p for p in ([where] if isinstance(where, str) else where)]
    known = [name for name, _ in modules]
    if followed is not None:
        known += [name for name in followed.sites.names if name not in set(known)]
    found: list[str] = []
    for asked in patterns:
        if not isinstance(asked, str):
            raise InputError("where", type(asked).__name__, "names, patterns or rows of bridge.sites")
        matching = [name for name in known if pattern(asked).fullmatch(name)]
        if not matching:
            shown = ", ".join(known[:20])
            fix = "* does not cross dots, ** does"
            raise InputError("where", asked, f"the pattern of a module's name; the first are {shown}", fix)
        found += [name for name in matching if name not in found]
    return sorted(found, key=known.index)


def pattern(pattern: str) -> re.Pattern[str]:
    """Pattern of names as a regular expression: ``*`` and ``?`` stay within a part of the name."""
    parts = re.split(r"(\*\*|\*|\?)", pattern)
    words = {"**": ".*", "*": "[^.]*", "?": "[^.]"}
    return re.compile("".join(words.get(part) or re.escape(part) for part in parts))


def _rows(names: Iterable[str], known: Sites) -> Sites:
    """Sites by the names of modules that return their branches; other names are refused."""
    by_name = {alias: site for site in known for alias in (*site.aliases, site.name)}
    by_name.update({site.name: site for site in known})
    chosen = Sites()
    for name in names:
        if name not in by_name:
            near = [site.name for site in known if site.name.startswith((name + ".", name + ":"))]
            near = near or [s.name for s in known if name.startswith(s.name.rpartition(".")[0] + ".")] or known.names
            raise InputError(
                "where",
                repr(name),
                "modules whose output is a residual branch, all of it, as it enters the addition",
                "the branches near it end in " + ", ".join(near[:6]),
            )
        if by_name[name] not in chosen:
            chosen.append(by_name[name])
    return chosen


def _refuse_nested(names: list[str]) -> None:
    """Refuse a module inside another one."""
    for name in names:
        outer = next((other for other in names if name.startswith(other + ".")), None)
        if outer is not None:
            raise InputError("where", f"{name!r} inside {outer!r}", "modules that are not inside one another")
