"""Units of work of a run, several at a time."""

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Self

from kolmo.experiments._rows import Rows
from tqdm import tqdm

from kolmo.errors import KolmoError
from kolmo.runs import Run
from kolmo.sweep import Task, steadily

# Products of matrices on a GPU have a deterministic order only with a workspace of a fixed size, chosen before its
# first use.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


class Crew:
    """Processes that do units of work, with a progress bar on stderr; a result is stored as soon as it is there.

    Every unit is done on one thread with deterministic kernels, so that results depend neither on the number of
    workers nor on the machine's load.

    Parameters
    ----------
    run : Run
        Where the results go; what it holds already is not done again.
    workers : int
        Number of processes; 1: no process but this one.
    units : int
        Number of units to come, for the progress bar.
    progress : bool
        Whether to show it.
    rows : Rows, optional
        File that units are taken from, and added to, beside the run folder.
    """

    def __init__(self, run: Run, workers: int, *, units: int, progress: bool, rows: Rows | None = None) -> None:
        self._run, self._workers, self._rows = run, workers, rows
        self._bar = tqdm(total=units, disable=not progress, unit="unit")
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._bar.close()
        if self._pool is not None:
            if kind is not None:  # do not wait for what is in flight
                for process in multiprocessing.active_children():
                    process.terminate()
            self._pool.shutdown(cancel_futures=True)

    def do(self, tasks: Mapping[str, Task]) -> dict[str, Any]:
        """Do the units of these names, the first ones first, and return their results in the same order."""
        if self._rows is not None:
            self._rows.fill(self._run, tasks)
            for key in self._rows.lacking(tasks):
                if self._run.finished(key):
                    self._rows.add(key, self._run.load_unit(key))
        waiting = {key: task for key, task in tasks.items() if not self._run.finished(key)}
        self._bar.update(len(tasks) - len(waiting))
        for key, result in self._together(waiting) if self._workers > 1 else self._alone(waiting):
            unit = self._run.unit(key, result)
            if self._rows is not None:
                self._rows.add(key, unit)
            self._bar.set_description(f"{key} done")
            self._bar.update()
        return {key: self._run.load_unit(key) for key in tasks}

    def _alone(self, tasks: dict[str, Task]) -> Iterator[tuple[str, Callable[[], Any]]]:
        for key, (function, arguments) in tasks.items():
            yield key, lambda function=function, arguments=arguments: steadily(function, *arguments)

    def _together(self, tasks: dict[str, Task]) -> Iterator[tuple[str, Callable[[], Any]]]:
        if tasks and self._pool is None:
            context = multiprocessing.get_context("spawn")  # a fork would copy the locks of other threads
            self._pool = ProcessPoolExecutor(self._workers, context, initializer=_end_with_parent)
        futures: dict[Future[Any], str] = {}
        for key, (function, arguments) in tasks.items():
            assert self._pool is not None
            futures[self._pool.submit(steadily, function, *arguments)] = key
        for future in as_completed(futures):
            if isinstance(future.exception(), BrokenProcessPool):
                raise KolmoError("a worker process was killed, or the machine is out of memory.")
            yield futures[future], future.result


def _end_with_parent() -> None:
    """Let this worker end when the process that started it does, even if that was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
