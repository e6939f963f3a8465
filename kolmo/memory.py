"""Memory: what a grid will need at least, and what there is; too large a grid is refused before anything is built."""

import math
from collections.abc import Sequence
from pathlib import Path

from kolmo.errors import InputError

# Bytes of a cell, a column and a saved time. Measured by benchmarks.scale: 226 a cell in two dimensions and 298 in
# three with explicit steps, 257 and 288 with split ones; four more columns take 344 in two dimensions.
PER_CELL, PER_COLUMN, PER_SAVED = 140, 85, 8

# Bytes of a time step whatever the grid: its node, and the plan of its stages. Measured: 256, and 329 where
# coefficients depend on time.
PER_STEP = 200
# Bytes of which it is not asked whether they are there: to read it off takes a tenth of a small solve.
SMALL = 4_000_000


def predicted(shape: Sequence[int], *, columns: int = 1, saved: int = 0, steps: int = 0) -> int:
    """Bytes that a solution on a grid needs at least, by measured sizes.

    Parameters
    ----------
    shape : sequence of int
        Nodes along each axis.
    columns : int, default 1
        Terminal conditions solved together.
    saved : int, default 0
        Times kept besides t = 0.
    steps : int, default 0
        Time steps.

    Examples
    --------
    >>> predicted((100, 100, 100)) // 10**6
    225
    """
    cells = math.prod(int(n) for n in shape)
    return cells * (PER_CELL + columns * (PER_COLUMN + PER_SAVED * saved)) + PER_STEP * steps


def available() -> int | None:
    """Bytes of memory that can still be had, by the kernel and the control group; None where neither tells."""
    found = []
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemAvailable:"):
            found.append(1024 * int(line.split()[1]))
    limit, used = (_lines(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
    if limit and used and limit[0].isdigit():
        found.append(int(limit[0]) - int(used[0]))
    return min(found, default=None)


def require(argument: str, shape: Sequence[int], *, columns: int = 1, saved: int = 0, steps: int = 0) -> None:
    """Refuse a grid, columns, saved times or steps for which there is not enough memory.

    Raises
    ------
    InputError
        With the memory needed and the memory there is.
    """
    counts = {"column": columns, "saved time": saved, "step": steps}
    beside = "".join(f", {n} {word}s" for word, n in counts.items() if n > 1)
    what = f"{' × '.join(map(str, shape))} nodes{beside}"
    fix = "fewer of the largest of these, or no grid: a tolerance places nodes where they count"
    afford(argument, what, predicted(shape, columns=columns, saved=saved, steps=steps), fix)


def afford(argument: str, what: str, need: int, fix: str = "") -> None:
    """Refuse what takes more bytes than there are; see `require`."""
    there = None if need <= SMALL else available()
    if there is not None and need > there:
        given = f"{what}, which take at least {need / 1e9:.1f} GB"
        raise InputError(argument, given, f"at most the {there / 1e9:.1f} GB of memory that are free", fix)


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
