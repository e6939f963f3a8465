"""Sweeps: one experiment with many settings and seeds, on Dask workers or in this process, with the same results."""

import contextlib
import copy
import functools
import importlib
import itertools
import math
import pickle
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kolmo import experiments
from kolmo.errors import InputError, KolmoError, MissingExtraError
from kolmo.runs.run import Run

__all__ = ["averages", "perform", "settings", "spread"]

Task = tuple[Callable[..., Any], tuple[Any, ...]]

# Dask's workers give memory back to the system as soon as they can; large arrays that come and go then cost most of the
# time in page faults. None: as in any other process.
TRIMMING = "distributed.nanny.pre-spawn-environ.MALLOC_TRIM_THRESHOLD_"


def settings(name: str, fixed: Mapping[str, str], varied: Mapping[str, Sequence[str]]) -> dict[str, dict[str, str]]:
    """All combinations of settings of an experiment, checked, by the name of their task.

    Parameters
    ----------
    name : str
        The experiment.
    fixed : mapping
        Options that all tasks share.
    varied : mapping
        Options to lists of values; every combination is a task.

    Raises
    ------
    InputError
        For an unknown option or a value that does not fit.
    """
    config = experiments.load(name).Config
    known = [option for option, _, _ in experiments.options(config)]
    alone = {"workers": "1"} if "workers" in known else {}  # a task is one process
    tasks = {}
    for values in itertools.product(*varied.values()):
        chosen = dict(zip(varied, values, strict=True))
        experiments.configure(config, {**alone, **fixed, **chosen})
        words = [f"{key}={value}" for key, value in chosen.items()] or [name]
        key = "".join(c if c.isalnum() or c in "._=+-" else "_" for c in "-".join(words))
        tasks[key] = {**alone, **fixed, **chosen}
    return tasks


def perform(
    run: Run,
    name: str,
    tasks: Mapping[str, Mapping[str, str]],
    *,
    scheduler: str | None = None,
    workers: int = 2,
    progress: bool = False,
) -> dict[str, str]:
    """Do the tasks that a run has not finished; each result is stored as soon as it is there.

    Parameters
    ----------
    run : Run
        Where the results go, one unit for each task.
    name : str
        The experiment.
    tasks : mapping
        From `settings`.
    scheduler : str, optional
        Address of a Dask scheduler, as ``tcp://host:8786``; None: a local cluster.
    workers : int, default 2
        Worker processes of the local cluster; 0: no Dask, one task after the other in this process.
    progress : bool
        Show progress on stderr.

    Returns
    -------
    dict
        Tasks that failed, with what they said.
    """
    waiting: dict[str, Task] = {
        key: (_experiment, (name, dict(values))) for key, values in tasks.items() if not run.finished(key)
    }
    return store(run, waiting, len(tasks), scheduler=scheduler, workers=workers, progress=progress)


def store(
    run: Run, tasks: Mapping[str, Task], total: int, *, scheduler: str | None, workers: int, progress: bool
) -> dict[str, str]:
    """Do tasks and store what they return as units of the run; return those that failed, with what they said."""
    from tqdm import tqdm

    failed = {}
    with tqdm(total=total, initial=total - len(tasks), disable=not progress, unit="task") as bar:
        for key, result in spread(tasks, scheduler=scheduler, workers=workers):
            try:
                run.unit(key, result)
            except Exception as error:
                failed[key] = told(error)
                run.log(f"{key} failed", error)
            bar.update()
    return failed


def spread(
    tasks: Mapping[str, Task], *, scheduler: str | None = None, workers: int = 2
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Do functions on Dask workers; yield each name with a function that returns the result or raises its error.

    A worker that dies costs the task that it had: Dask gives it to another one. Every task runs on one thread, so that
    the results depend neither on the number of workers nor on which one had it.

    Parameters
    ----------
    tasks : mapping
        Names to functions and their arguments; functions that workers can import.
    scheduler : str, optional
        Address of a scheduler; None: a local cluster.
    workers : int, default 2
        Processes of the local cluster; 0: this process, one after the other.

    Raises
    ------
    MissingExtraError
        If Dask is needed and not installed.
    InputError
        If no scheduler answers at the address.
    KolmoError
        If the scheduler is gone before the end.
    """
    if not tasks:
        return
    if workers == 0 and scheduler is None:
        for key, (function, arguments) in tasks.items():
            yield key, functools.partial(steadily, function, *arguments)
        return
    as_completed = _distributed().as_completed
    with _client(scheduler, min(workers, len(tasks))) as client:
        left, futures = iter(tasks.items()), {}
        done = as_completed([])

        def fill() -> None:
            """One task for each thread there is: a worker that holds nothing else can lose nothing else."""
            threads = max(1, sum(client.nthreads().values()))
            for key, (function, arguments) in itertools.islice(left, max(0, threads - done.count())):
                future = client.submit(steadily, function, *arguments, pure=False)
                futures[future] = key
                done.add(future)

        with _connected(client):
            fill()
            for future in done:
                if future.status in ("cancelled", "lost"):  # nobody else cancels them
                    raise _gone(client)
                yield futures.pop(future), future.result
                fill()


@contextlib.contextmanager
def _client(scheduler: str | None, workers: int) -> Iterator[Any]:
    """Client of a scheduler, or of a local cluster that ends with the block."""
    distributed = _distributed()
    if scheduler is None:
        options = {"threads_per_worker": 1, "dashboard_address": None, "silence_logs": "ERROR"}
        with importlib.import_module("dask").config.set({TRIMMING: None}):
            cluster = distributed.LocalCluster(n_workers=max(1, workers), **options)
        with cluster, distributed.Client(cluster) as client:
            yield client
        return
    try:
        client = distributed.Client(scheduler, timeout="5s")
    except (OSError, ValueError) as error:
        fix = "start one with `dask scheduler`"
        raise InputError("scheduler", f"{scheduler} ({error})", "the address of a running scheduler", fix) from None
    with client:
        yield client


@contextlib.contextmanager
def _connected(client: Any) -> Iterator[None]:
    """Say that the scheduler is gone where that is what an error comes from."""
    try:
        yield
    except KolmoError:
        raise
    except Exception as error:
        if client.status == "running" and not isinstance(error, OSError):
            raise
        raise _gone(client) from error


def _gone(client: Any) -> KolmoError:
    return KolmoError(f"the scheduler {client.scheduler.address} is gone; what is finished is kept.")


def _distributed() -> Any:
    """Dask's package, which carries no types."""
    try:
        return importlib.import_module("distributed")
    except ImportError:
        raise MissingExtraError("dask", "cluster") from None


def steadily(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function on one thread with deterministic kernels; what it raises can cross to another process."""
    import torch
    from threadpoolctl import threadpool_limits

    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    try:
        with threadpool_limits(1):
            return function(*arguments)
    except Exception as error:
        if _crosses(error):
            raise
        raise TaskError(told(error)) from None
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)


class TaskError(KolmoError, RuntimeError):
    """What a task raised that cannot go from one process to another: its kind and its message."""


def told(error: BaseException) -> str:
    """Kind and message of what a task raised, the same in this process and from a worker."""
    return str(error) if isinstance(error, TaskError) else f"{type(error).__name__}: {error}"


def _crosses(error: Exception) -> bool:
    """Whether an exception survives the way from one process to another."""
    try:
        pickle.dumps(error)
        return str(copy.copy(error)) == str(error)  # rebuilt from the parts that are sent
    except Exception:
        return False


def _experiment(name: str, values: dict[str, str]) -> dict[str, Any]:
    """Results of one experiment, done in a folder that is thrown away."""
    chosen = experiments.load(name)
    config = experiments.configure(chosen.Config, values)
    with tempfile.TemporaryDirectory(prefix="kolmo-") as folder:
        with Run.create(name, vars(config), out=Path(folder) / "run", seeds=experiments.seeds(config)) as run:
            run.save_results(chosen.run(config, run, False))
        return run.results


def averages(results: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, float | None]]:
    """Mean and standard error of every number that all results have; nested names are joined with dots.

    Examples
    --------
    >>> averages([{"a": {"b": 1.0}}, {"a": {"b": 3.0}}])
    {'a.b': {'mean': 2.0, 'standard_error': 1.0}}
    >>> averages([{"a": 0.1}] * 3)
    {'a': {'mean': 0.1, 'standard_error': 0.0}}
    """
    flat = [dict(_numbers(result)) for result in results]
    if not flat:
        raise KolmoError("no results to average.")
    shared = [name for name in flat[0] if all(name in other for other in flat)]
    found = {}
    for name in shared:
        first = flat[0][name]
        moved = np.array([one[name] for one in flat]) - first  # equal numbers have no error, not even one of rounding
        error = float(moved.std(ddof=1) / math.sqrt(len(moved))) if len(moved) > 1 else None
        found[name] = {"mean": float(first + moved.mean()), "standard_error": error}
    return found


def _numbers(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{key}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}{key}", float(value)
