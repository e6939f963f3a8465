"""Run folders: what was asked, with what, and what came out; atomic, resumable, free of pickle.

A run owns one folder::

    config.json        what was asked
    environment.json   versions, git revision, platform, threads, seeds
    status.json        running, done, failed or interrupted
    metrics.jsonl      one JSON object a line, while it goes
    units/KEY.npz      the result of each finished unit of work
    results.json       the numbers that answer the question
    arrays/NAME.npz    arrays beside them
    figures/NAME.png   figures, each with a vector copy NAME.pdf
    log.txt            what happened when
    lock               held by the process that writes to the folder; empty

Every file is written beside its place and moved there in one step, so a reader sees the old file or the new one,
never a half. The only file that grows is ``metrics.jsonl``; a line cut short by a kill is dropped when the run
resumes, with the lines of the unit that was in flight.

This room may import ``kolmo.errors`` and ``kolmo.files``.
"""

import contextlib
import datetime
import importlib.metadata
import json
import logging
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Self

import numpy as np

from kolmo.errors import InputError, KolmoError
from kolmo.files import (
    FileError,
    is_file,
    plain,
    read_json,
    read_npz,
    read_tree,
    replacing,
    write_bytes,
    write_json,
    write_npz,
    write_tree,
    writing,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

try:
    import fcntl
except ImportError:  # Windows has no flock: there nothing stops two processes from resuming one run
    fcntl = None  # type: ignore[assignment]

__all__ = ["Run", "RunError", "environment"]

_PACKAGES = ("kolmo", "numpy", "scipy", "numba", "torch", "fipy", "matplotlib", "scikit-learn", "tqdm", "click")
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=+-]*")
_LOGGER = logging.getLogger("kolmo")


class RunError(KolmoError, RuntimeError):
    """A run folder cannot be written to: another process does."""


class Run:
    """One run folder, open for reading, and for writing inside ``with run:``.

    Make one with `Run.create`, `Run.resume` (both give a run to write to) or `Run.open` (to read).
    A run used as a context manager keeps its status: ``done`` when the block ends, ``interrupted`` after Ctrl-C,
    ``failed`` after any other exception; killed without warning it reads as ``interrupted`` too.

    Parameters
    ----------
    folder : path
        The folder; it must hold a ``config.json``.

    Attributes
    ----------
    folder : pathlib.Path
        Where everything is.
    name : str
        What was run.
    config : dict
        The configuration, as JSON gives it back (tuples as lists).

    Examples
    --------
    >>> import tempfile
    >>> root = tempfile.mkdtemp()
    >>> with Run.create("toy", {"n": 3}, root=root) as run:
    ...     squares = run.unit("squares", lambda: np.arange(run.config["n"]) ** 2)
    ...     run.save_results({"sum": squares.sum()})
    >>> run.status, run.results
    ('done', {'sum': 5})
    >>> with Run.resume(run.folder) as again:
    ...     again.unit("squares", lambda: 1 / 0)  # finished before: read, not run
    array([0, 1, 4])
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        if not is_file(self.folder / "config.json"):
            raise InputError("run", self.folder, "a run folder (one with a config.json)", _known_runs(self.folder))
        stored = self._read_json("config.json")
        if not {"name", "config"} <= set(stored):
            raise FileError(f"{self.folder / 'config.json'} is damaged: it has no name and configuration.")
        self.name: str = stored["name"]
        self.config: dict[str, Any] = stored["config"]
        self._lock: IO[bytes] | None = None
        self._unit: str | None = None
        self._log: logging.Handler | None = None

    # ---------------------------------------------------------------------------------------------- making one

    @classmethod
    def create(
        cls,
        name: str,
        config: Mapping[str, Any],
        *,
        root: str | os.PathLike[str] = "runs",
        out: str | os.PathLike[str] | None = None,
        seeds: Sequence[int] = (),
    ) -> Self:
        """Make a fresh run folder, never one that exists.

        Parameters
        ----------
        name : str
            What is run; part of the folder's name.
        config : mapping
            What was asked: JSON values only.
        root : path, default "runs"
            The folder gets a fresh name in here: ``root/name-date-time``.
        out : path, optional
            Exactly this folder instead.
        seeds : sequence of int, optional
            The seeds used, for the record.

        Raises
        ------
        InputError
            When ``out`` exists, or the configuration is no JSON.
        """
        _check_name("name", name)
        stored = plain({"name": name, "config": config})
        made_with = environment(seeds)
        folder = _fresh_folder(Path(root), name) if out is None else _exactly(Path(out))
        try:
            write_json(folder / "environment.json", made_with)
            write_json(folder / "config.json", stored)
        except FileError:
            shutil.rmtree(folder, ignore_errors=True)  # nothing half-made stays where a disk is full
            raise
        run = cls(folder)
        run._acquire()
        return run

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Self:
        """Open a run for reading."""
        return cls(folder)

    @classmethod
    def resume(cls, folder: str | os.PathLike[str]) -> Self:
        """Open a run for writing: finished units are kept, what was in flight is forgotten.

        Raises
        ------
        InputError
            When the folder holds no run.
        RunError
            When another process is writing to it.
        """
        run = cls(folder)
        run._acquire()
        run._forget_unfinished_metrics()
        return run

    def __enter__(self) -> Self:
        self._acquire()
        with writing(self.folder / "log.txt"):
            self._log = _LogFile(self.folder / "log.txt", encoding="utf-8")
        self._log.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        _LOGGER.addHandler(self._log)
        self._set_status("running")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        try:
            if kind is None:
                self._set_status("done")
            elif issubclass(kind, KeyboardInterrupt):
                self._set_status("interrupted")
            else:
                self.log("failed", error=error)
                self._set_status("failed", f"{kind.__name__}: {error}")
        except FileError:
            if kind is None:
                raise  # else what ended the run says more
        finally:
            self._close()

    def _close(self) -> None:
        if self._log is not None:
            _LOGGER.removeHandler(self._log)
            with contextlib.suppress(OSError):  # what it still holds does not fit on the disk
                self._log.close()
            self._log = None
        self._release()

    # ------------------------------------------------------------------------------------------------- working

    def unit(self, key: str, function: Callable[[], Any]) -> Any:
        """Do a named unit of work once, and have its result ever after.

        The result is stored in one step when the function returns. A run that was killed and resumed reads the
        results of finished units and does the others, so it loses at most the unit in flight.

        Parameters
        ----------
        key : str
            Name of the unit, unique in the run: letters, digits and ``. _ = + -``.
        function : callable
            Takes nothing; returns numbers, strings, None, NumPy arrays, and dictionaries, lists and tuples of them.

        Returns
        -------
        object
            What was stored, read back, so that a resumed run goes on with the same thing: tuples come as lists and
            NumPy scalars as Python's.
        """
        _check_name("key", key)
        path = self.folder / "units" / f"{key}.npz"
        if not path.exists():
            outer, self._unit = self._unit, key
            try:
                value = function()
            finally:
                self._unit = outer
            write_tree(path, value)
        try:
            return read_tree(path)
        except FileError as error:
            raise FileError(f"{error} Delete it and resume the run: the unit is then done again.") from None

    def finished(self, key: str) -> bool:
        """Whether a unit of work is done."""
        return (self.folder / "units" / f"{key}.npz").exists()

    def load_unit(self, key: str) -> Any:
        """Return the result of a finished unit of work."""
        if not self.finished(key):
            raise InputError("key", repr(key), "one of the finished units: " + ", ".join(self.units))
        return read_tree(self.folder / "units" / f"{key}.npz")

    def record(self, **values: Any) -> None:
        """Append one line to ``metrics.jsonl``: the values, the unit of work they belong to, and the time."""
        line = {"unit": self._unit, "time": _now(), **plain(values)}
        path = self.folder / "metrics.jsonl"
        with writing(path), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")

    def save_results(self, results: Mapping[str, Any]) -> None:
        """Write ``results.json``: the numbers that answer the question (not-a-number and infinity become null)."""
        write_json(self.folder / "results.json", results)

    def save_arrays(self, name: str, **arrays: Any) -> Path:
        """Write ``arrays/NAME.npz``."""
        _check_name("name", name)
        path = self.folder / "arrays" / f"{name}.npz"
        write_npz(path, {key: np.asarray(value) for key, value in arrays.items()})
        return path

    def save_figure(self, name: str, figure: "Figure") -> Path:
        """Write a Matplotlib figure as ``figures/NAME.png`` and ``figures/NAME.pdf``; return the path of the first."""
        _check_name("name", name)
        path = self.folder / "figures" / f"{name}.png"
        with replacing(path) as temporary:
            figure.savefig(temporary, format="png", dpi=200)
        with replacing(path.with_suffix(".pdf")) as temporary:
            figure.savefig(temporary, format="pdf", metadata={"CreationDate": None})
        return path

    def log(self, message: str, error: BaseException | None = None) -> None:
        """Write a line to ``log.txt``, with the trace of an error if one is given."""
        if self._log is not None:
            level = logging.INFO if error is None else logging.ERROR
            trace = None if error is None else (type(error), error, error.__traceback__)
            self._log.handle(_LOGGER.makeRecord(_LOGGER.name, level, __file__, 0, message, (), trace))

    # ------------------------------------------------------------------------------------------------- reading

    @property
    def status(self) -> str:
        """``running``, ``done``, ``failed`` or ``interrupted``."""
        if not (self.folder / "status.json").exists():
            return "interrupted"
        state: str = self._read_json("status.json").get("state", "interrupted")
        return "interrupted" if state == "running" and not self._being_written() else state

    @property
    def environment(self) -> dict[str, Any]:
        """What the run was made with."""
        return self._read_json("environment.json")

    @property
    def results(self) -> dict[str, Any]:
        """The numbers in ``results.json``."""
        return self._read_json("results.json")

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of ``metrics.jsonl``."""
        return list(self._metrics())

    @property
    def units(self) -> list[str]:
        """The names of the finished units of work."""
        return sorted(path.stem for path in (self.folder / "units").glob("[!.]*.npz"))

    def load_arrays(self, name: str) -> dict[str, np.ndarray[Any, Any]]:
        """Read ``arrays/NAME.npz``."""
        return read_npz(self.folder / "arrays" / f"{name}.npz")

    def figure(self, name: str) -> Path:
        """Path of a figure that was saved."""
        return self.folder / "figures" / f"{name}.png"

    # ------------------------------------------------------------------------------------------------- inside

    def _read_json(self, name: str) -> dict[str, Any]:
        stored = read_json(self.folder / name)
        if not isinstance(stored, dict):
            raise FileError(f"{self.folder / name} is damaged: it holds no table of names and values.")
        return stored

    def _set_status(self, state: str, message: str = "") -> None:
        write_json(self.folder / "status.json", {"state": state, "message": message, "time": _now()})
        self.log(state)

    def _metrics(self) -> Iterator[dict[str, Any]]:
        path = self.folder / "metrics.jsonl"
        if not path.exists():
            return
        lines = path.read_bytes().split(b"\n")
        for number, line in enumerate(lines, start=1):
            if not line:
                continue
            try:
                found = json.loads(line)
            except ValueError:
                if number == len(lines):  # the last line may have been cut short
                    return
                found = None
            if not isinstance(found, dict) or not isinstance(found.get("unit", 0), str | None):
                raise FileError(f"{path} is damaged in line {number}.")
            yield found

    def _forget_unfinished_metrics(self) -> None:
        # Lines outside any unit go as well: the code that wrote them runs again.
        kept = [line for line in self._metrics() if line["unit"] is not None and self.finished(line["unit"])]
        write_bytes(self.folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in kept).encode())

    def _acquire(self) -> None:
        if self._lock is not None:
            return
        with writing(self.folder / "lock"):
            lock = (self.folder / "lock").open("ab")
        if fcntl is not None:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                lock.close()
                raise RunError(f"{self.folder} is being written by another process; wait for it or stop it.") from None
        self._lock = lock

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.close()  # the system drops the lock with the file, also when the process is killed
            self._lock = None

    def _being_written(self) -> bool:
        if self._lock is not None or fcntl is None:
            return True
        with contextlib.suppress(OSError), (self.folder / "lock").open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
        return (self.folder / "lock").exists()


class _LogFile(logging.FileHandler):
    """A log that is left short where the disk is full: it must neither end the run nor show a trace."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - the name that logging calls
        """Say nothing."""


# --------------------------------------------------------------------------------------------------- environment


def environment(seeds: Sequence[int] = ()) -> dict[str, Any]:
    """Describe what a result depends on beside its configuration.

    Parameters
    ----------
    seeds : sequence of int, optional
        The seeds used.

    Returns
    -------
    dict
        ``python``, ``platform``, ``cores``, ``packages`` (name to version), ``git`` (revision of kolmo's source tree,
        with ``+changes`` when it has uncommitted ones; None outside one), ``threads`` and ``seeds``.

    Examples
    --------
    >>> environment(seeds=[1])["seeds"]
    [1]
    """
    torch = sys.modules.get("torch")
    threads: dict[str, Any] = {name: os.environ[name] for name in _THREAD_VARIABLES if name in os.environ}
    if torch is not None:
        threads["torch"] = torch.get_num_threads()
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "git": _git_revision(),
        "threads": threads,
        "seeds": [int(seed) for seed in seeds],
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_revision() -> str | None:
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():  # an installed copy; a repository further up would be somebody else's
        return None

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None


# --------------------------------------------------------------------------------------------------------- names


def _check_name(argument: str, name: str) -> None:
    if not _NAME.fullmatch(name):
        raise InputError(argument, repr(name), "letters, digits and . _ = + -, a letter or digit first")


def _fresh_folder(root: Path, name: str) -> Path:
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    try:
        root.mkdir(parents=True, exist_ok=True)
        for attempt in range(1, 1000):
            folder = root / (f"{name}-{stamp}" if attempt == 1 else f"{name}-{stamp}-{attempt}")
            with contextlib.suppress(FileExistsError):
                folder.mkdir()
                return folder
    except OSError as error:
        raise FileError(f"cannot make a run folder in {root}: {error.strerror or error}.") from error
    raise FileError(f"cannot make a run folder in {root}: a thousand were made in this second.")


def _exactly(folder: Path) -> Path:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir()
    except FileExistsError:
        fix = "choose another folder, or continue the run that is in it with --resume"
        raise InputError("out", folder, "a folder that does not exist yet", fix) from None
    except OSError as error:
        raise FileError(f"cannot make the folder {folder}: {error.strerror or error}.") from error
    return folder


def _known_runs(folder: Path) -> str:
    inside: list[str] = []
    with contextlib.suppress(OSError):
        inside = sorted(path.parent.name for path in folder.glob("*/config.json"))
    return f"in it are {', '.join(inside[-5:])}" if inside else ""


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
