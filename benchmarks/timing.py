"""Clocks and records shared by the benchmarks: CPU time on one thread, or wall time with BENCHMARK_CLOCK=wall."""

import gc
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

CLOCK = os.environ.get("BENCHMARK_CLOCK", "cpu")
clock = time.perf_counter if CLOCK == "wall" else time.process_time


@dataclass
class Record:
    """One setting of one solver: errors and seconds.

    ``first`` is the first call in the process (compilation and caches included), ``whole`` the median warm call, of
    which ``march`` is the time stepping alone where the solver lets it be told apart. ``found`` is ``whole`` and what
    it costs to know the error besides, where that was asked for; ``finding_out`` measures the latter.
    """

    problem: str
    solver: str
    setting: str
    error: float
    whole: float
    first: float
    march: float | None = None
    note: str = ""
    found: float | None = None
    finding_out: Callable[[], float] | None = field(default=None, repr=False)

    def as_dict(self) -> dict[str, Any]:
        return {key: v for key, v in vars(self).items() if key != "finding_out"}


def measure(work: Callable[[], Any], repeats: int = 5, slow: float = 2.0) -> tuple[Any, float, float]:
    """Result, median of the warm calls, and the first call; a slow one is repeated once."""
    seconds: list[float] = []
    result: Any = None
    first = None
    while len(seconds) < repeats:
        gc.collect()
        start = clock()
        result = work()
        spent = clock() - start
        if first is None:
            first = spent
            continue
        seconds.append(spent)
        if spent > slow:
            break
    return result, statistics.median(seconds), float(first or 0.0)


def shown(seconds: float) -> str:
    """Seconds in three digits."""
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"
