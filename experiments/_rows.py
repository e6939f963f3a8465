"""Rows of finished units in a file that outlives the run folders, so that a sweep goes on from it on any machine.

A file of JSON lines: each has the options that the unit depends on, its name, its numbers without weights and
histories, and the machine that they come from. What a file holds is not computed again; what is computed is added.
"""

import functools
import json
import platform
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from kolmo.errors import InputError
from kolmo.files import FileError, parsed, plain, read_text, replacing
from kolmo.runs import Run

# Options that no unit depends on: where things are, and which units are asked for.
_ASKING = frozenset({"data", "rows", "workers", "seeds", "seed"})
_DIGITS = 6
_MOST = 1 << 25  # bytes of such a file


class Rows:
    """The rows of one configuration in a file, or in none.

    Parameters
    ----------
    path : str or None
        The file; it need not exist. None: nothing is read or written.
    options : mapping
        Options of the experiment. Units belong to the same configuration where all of them but `free` agree.
    free : iterable of str
        Further options that only say which units are asked for.
    keep : callable, optional
        Part of a unit that goes into its row; None for a unit that is not to be kept. Default: all of it.
    """

    def __init__(
        self,
        path: str | None,
        options: Mapping[str, Any],
        free: Iterable[str] = (),
        keep: Callable[[Any], Any] = lambda unit: unit,
    ) -> None:
        self._path = None if path is None else Path(path)
        left_out = _ASKING.union(free)
        self._settings = _rounded({name: value for name, value in options.items() if name not in left_out})
        self._keep = keep
        self._found = self._own()

    def _own(self) -> dict[str, dict[str, Any]]:
        return {row["unit"]: row for row in self._read() if row["settings"] == self._settings}

    def fill(self, run: Run, keys: Iterable[str]) -> None:
        """Give a run the units that the file has by now."""
        self._found = self._own() | self._found
        for key in keys:
            if key in self._found and not run.finished(key):
                run.unit(key, functools.partial(self._found[key].__getitem__, "value"))

    def lacking(self, keys: Iterable[str]) -> list[str]:
        """Units that the file has not, where there is a file."""
        return [] if self._path is None else [key for key in keys if key not in self._found]

    def add(self, key: str, unit: Any) -> None:
        """Write the row of a finished unit, unless there is one."""
        value = self._keep(unit) if self.lacking([key]) else None
        if value is None:
            return
        assert self._path is not None
        self._found[key] = {"unit": key, "settings": self._settings, "machine": machine(), "value": _rounded(value)}
        # Another run may have written rows of its own in the meantime.
        others = [row for row in self._read() if not (row["settings"] == self._settings and row["unit"] in self._found)]
        lines = [json.dumps(row, allow_nan=False) for row in [*others, *self._found.values()]]
        with replacing(self._path) as file:
            file.write(("\n".join(sorted(lines)) + "\n").encode())

    def machines(self) -> dict[str, int]:
        """Number of rows from each machine."""
        names = [row["machine"] for row in self._found.values()]
        return {name: names.count(name) for name in sorted(set(names))}

    def _read(self) -> list[dict[str, Any]]:
        if self._path is None or not self._path.exists():
            return []
        found = []
        for number, line in enumerate(read_text(self._path, _MOST).splitlines(), start=1):
            try:
                row = parsed(line, strict=True)
            except ValueError:
                raise FileError(f"{self._path} is damaged in line {number}.") from None
            if not isinstance(row, dict) or set(row) != {"unit", "settings", "machine", "value"}:
                needed = "rows with unit, settings, machine and value"
                raise InputError("rows", f"{self._path}, line {number}", needed, "name another file")
            found.append(row)
        return found


def _rounded(value: Any) -> Any:
    """Plain values with floats of six digits, as they are read back."""
    return json.loads(json.dumps(_short(plain(value)), allow_nan=False))


def _short(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _short(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_short(one) for one in value]
    return float(f"{value:.{_DIGITS}g}") if isinstance(value, float) else value


def machine() -> str:
    """Kind of processor and version of torch, without a name."""
    return f"{_processor()}, torch {version('torch')}"


@functools.cache
def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
