"""First use of a kernel: its compilation is announced, its time kept apart, and it is not interrupted."""

import logging
import signal
import threading
import time
from typing import Any

from numba.core.event import Listener, register

_LOGGER = logging.getLogger("kolmo")


class _Patience:
    """Ctrl-C, or a polite kill, waits until a kernel is compiled: LLVM, left in the middle, takes the process along."""

    def __init__(self) -> None:
        self._before: list[int] = []
        self._came = False

    def begin(self) -> None:
        """Hold back what would interrupt this thread."""
        if threading.current_thread() is threading.main_thread():  # others are not interrupted
            numbers = [getattr(signal, name, None) for name in ("SIGINT", "SIGTERM", "SIGHUP")]
            self._before = [n for n in numbers if n is not None and signal.getsignal(n) is signal.default_int_handler]
            for number in self._before:
                signal.signal(number, self._hold)

    def _hold(self, *_: Any) -> None:
        self._came = True

    def end(self) -> None:
        """Let through what has come."""
        for number in self._before:
            signal.signal(number, signal.default_int_handler)
        came, self._before, self._came = self._came, [], False
        if came:
            raise KeyboardInterrupt


class _Compilations(Listener):
    """Seconds spent on compiling kernels that no earlier process left on disk."""

    def __init__(self) -> None:
        self.seconds, self._depth, self._begun, self._told = 0.0, 0, 0.0, False
        self._patience = _Patience()

    def on_start(self, event: Any) -> None:
        if self._depth == 0:
            self._begun = time.perf_counter()
            self._patience.begin()
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
            self._patience.end()


_compilations = _Compilations()
register("numba:compile", _compilations)  # type: ignore[no-untyped-call]


def clock() -> float:
    """Seconds that pass while nothing is compiled, from some moment on."""
    return time.perf_counter() - _compilations.seconds
