"""Kernels compiled at first use and kept on disk: by many processes at once, and where nothing can be kept."""

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numba

from kolmo.files.locks import lock

__all__ = ["compiled"]

_LOGGER = logging.getLogger("kolmo")


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Decorate a kernel: numba compiles it at first use, and keeps it on disk if there is a place for it.

    Without one, as in a container that is read-only, it is compiled in every process.

    Parameters
    ----------
    **options
        Of ``numba.njit``.

    Examples
    --------
    >>> @compiled()
    ... def twice(x):
    ...     return 2.0 * x
    >>> twice(1.5)
    3.0
    """

    def decorate(function: Callable[..., Any]) -> Any:
        options.update(error_model="numpy", nogil=True)
        try:
            dispatcher: Any = numba.njit(cache=True, **options)(function)
        except RuntimeError as error:  # no place that can be written
            _LOGGER.debug("%s is compiled in every process: %s", function.__name__, error)
            return numba.njit(**options)(function)
        dispatcher._cache = _Shared(dispatcher._cache)
        return dispatcher

    return decorate


class _Shared:
    """The cache of a kernel, which many processes may fill at the same moment, and which may fail.

    Numba reads the list of what is there, adds to it, and writes list and code one after the other. Two processes that
    do so at once give two variants one name, and the code of one is then taken for the other.
    """

    def __init__(self, cache: Any) -> None:
        self._cache = cache

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    def save_overload(self, signature: Any, data: Any) -> None:
        """Keep what was compiled; where that is not possible the kernel works all the same."""
        try:
            with _alone(Path(self._cache.cache_path)):
                self._cache.save_overload(signature, data)
        except Exception as error:  # whatever a full disk or a damaged list leads to
            _LOGGER.debug("a kernel is not kept: %s", error)

    def load_overload(self, signature: Any, target: Any) -> Any:
        """Find what was compiled before; a damaged file is compiled again."""
        try:
            return self._cache.load_overload(signature, target)
        except Exception as error:  # whatever damaged code leads to
            _LOGGER.debug("a kernel is compiled again: %s", error)
            return None


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Wait until no other process writes to the folder; where there are no locks, hope for the best."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / "kolmo.lock", os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
    try:
        lock(descriptor, wait=True)
        yield
    finally:
        os.close(descriptor)
