"""First use of a kernel: its compilation is announced, and its time kept apart."""

import logging
import time
from typing import Any

from numba.core.event import Listener, register

_LOGGER = logging.getLogger("kolmo")


class _Compilations(Listener):
    """Seconds spent on compiling kernels that no earlier process left on disk."""

    def __init__(self) -> None:
        self.seconds, self._depth, self._begun, self._told = 0.0, 0, 0.0, False

    def on_start(self, event: Any) -> None:
        if self._depth == 0:
            self._begun = time.perf_counter()
        self._depth += 1  # a kernel compiles those it calls
        # other users of numba compile functions too, some of them without a module (exec of a text)
        if not self._told and (event.data["dispatcher"].py_func.__module__ or "").startswith(__package__):
            self._told = True
            _LOGGER.warning(
                "kolmo compiles its kernels, once after an installation: some seconds each time another is needed"
            )

    def on_end(self, event: Any) -> None:
        self._depth -= 1
        if self._depth == 0:
            self.seconds += time.perf_counter() - self._begun


_compilations = _Compilations()
register("numba:compile", _compilations)  # type: ignore[no-untyped-call]


def clock() -> float:
    """Seconds that pass while nothing is compiled, from some moment on."""
    return time.perf_counter() - _compilations.seconds
