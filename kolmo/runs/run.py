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

The folder appears whole. Every file is written beside its place and moved there in one step, so a reader sees the old
file or the new one, never a half. The only files that grow are ``log.txt`` and ``metrics.jsonl``, of which a line cut
short by a kill is dropped when the run resumes, with the lines of the unit that was in flight; so is what else a kill
left behind. A folder that holds anything but ordinary files and folders, such as links, is refused.
"""

import contextlib
import json
import logging
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

import numpy as np

from kolmo.errors import InputError, KolmoWarning
from kolmo.files import (
    FileError,
    append,
    claims,
    damage,
    is_file,
    opened,
    parsed,
    plain,
    read_json,
    read_npz,
    read_tree,
    replacing,
    schema,
    write_bytes,
    write_json,
    write_npz,
    write_tree,
    writing,
)
from kolmo.files.locks import FolderLock, Owner
from kolmo.runs.environment import environment
from kolmo.runs.folders import RunError, check_folder, check_name, fresh_names, known_runs, moved
from kolmo.runs.log import LOGGER, LogFile
from kolmo.runs.records import CONFIG, ENVIRONMENT, LINE, MAX_LINE, STATUS, moment

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
            raise InputError("run", self.folder, "a run folder (one with a config.json)", known_runs(self.folder))
        check_folder(self.folder)
        stored = self._read_json("config.json", CONFIG)
        self.name: str = stored["name"]
        self.config: dict[str, Any] = stored["config"]
        self._lock: FolderLock | None = None
        self._unit: str | None = None
        self._log: logging.Handler | None = None
        self._ending = "done", ""
        self._news: list[str] = []
        self._appending = threading.Lock()

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
        files: Mapping[str, bytes] | None = None,
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
            Exactly this folder instead; one that is there must be empty.
        seeds : sequence of int, optional
            The seeds used, for the record.
        files : mapping of str to bytes, optional
            Files that belong to what was asked, by name; they are there from the start.

        Raises
        ------
        InputError
            When ``out`` exists, or the configuration is no JSON.
        """
        check_name("name", name)
        stored = plain({"name": name, "config": config})
        made_with = environment(seeds)
        names = fresh_names(Path(root), name) if out is None else iter([Path(out)])
        first = next(names)
        try:
            first.parent.mkdir(parents=True, exist_ok=True)
            claims.sweep(first.parent, first.name if out is not None else name)
            with claims.claimed_folder(first.parent, first.name if out is not None else name) as made:
                for file, content in (files or {}).items():
                    write_bytes(made / file, content, in_run=True)
                write_json(made / "environment.json", made_with, in_run=True)
                write_json(made / "config.json", stored, in_run=True)
                held = FolderLock.take(made)
                try:
                    folder = moved(made, [first, *names] if out is None else [first])
                except BaseException:
                    if held is not None:
                        held.release()
                    raise
        except FileError as error:
            raise FileError(str(error).replace(os.fspath(made), os.fspath(first))) from error
        except OSError as error:
            raise FileError(f"cannot make a run folder {first}: {error.strerror or error}.") from error
        run = cls(folder)
        run._hold(held)
        return run

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Self:
        """Open a run for reading."""
        return cls(folder)

    @classmethod
    def resume(cls, folder: str | os.PathLike[str], *, take_over: bool = False) -> Self:
        """Open a run for writing: finished units are kept, what was in flight is forgotten.

        Where versions, source or machine are not those that the run was begun with, that is warned of, and kept in
        ``environment.json`` and the report.

        Parameters
        ----------
        folder : path
            The folder.
        take_over : bool
            Go on also where it cannot be told whether the process that wrote last still does: it runs on another
            machine and the file system has no locks; or a process that it had started holds its lock.

        Raises
        ------
        InputError
            When the folder holds no run.
        RunError
            When another process is writing to it; or may be, unless ``take_over``.
        """
        run = cls(folder)
        run._acquire(take_over)
        claims.sweep_folder(run.folder)
        run._forget_unfinished_metrics()
        run._compare_versions()
        return run

    def __enter__(self) -> Self:
        self._acquire()
        with writing(self.folder / "log.txt"):
            self._log = LogFile(self.folder / "log.txt", encoding="utf-8")
        self._log.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        LOGGER.addHandler(self._log)
        self._ending = "done", ""
        try:
            self._set_status("running")
        except BaseException:
            self._close()
            raise
        for message in self._news:
            self.log(message)
        self._news = []
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if self._lock is None or not self._lock.ours:
            return  # a forked process: how it ends says nothing about the run
        try:
            if kind is None:
                self._set_status(*self._ending)
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

    def interrupted(self, message: str) -> None:
        """Say that the run ends early though no exception ends it: its status will be ``interrupted``."""
        self._ending = "interrupted", message

    def _close(self) -> None:
        if self._log is not None:
            LOGGER.removeHandler(self._log)
            with contextlib.suppress(OSError):  # what it still holds does not fit on the disk
                self._log.close()
            self._log = None
        if self._lock is not None:
            self._lock.release()
            self._lock = None

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
        check_name("key", key)
        path = self.folder / "units" / f"{key}.npz"
        if not path.exists():
            outer, self._unit = self._unit, key
            try:
                value = function()
            finally:
                self._unit = outer
            write_tree(path, value, in_run=True)
        try:
            return read_tree(path, in_run=True)
        except FileError as error:
            raise FileError(f"{error} Delete it and resume the run: the unit is then done again.") from None

    def finished(self, key: str) -> bool:
        """Whether a unit of work is done."""
        return (self.folder / "units" / f"{key}.npz").exists()

    def load_unit(self, key: str) -> Any:
        """Return the result of a finished unit of work."""
        if not self.finished(key):
            raise InputError("key", repr(key), "one of the finished units: " + ", ".join(self.units))
        return read_tree(self.folder / "units" / f"{key}.npz", in_run=True)

    def record(self, **values: Any) -> None:
        """Append one line to ``metrics.jsonl``: the values, the unit of work they belong to, and the time."""
        line = {"unit": self._unit, "time": moment(), **plain(values)}
        content = (json.dumps(line, allow_nan=False) + "\n").encode()
        if len(content) > MAX_LINE:
            needed = f"at most {MAX_LINE} bytes a line"
            raise InputError("values", f"{len(content)} bytes", needed, "save_arrays takes more")
        with self._appending:
            append(self.folder / "metrics.jsonl", content)

    def save_results(self, results: Mapping[str, Any]) -> None:
        """Write ``results.json``: the numbers that answer the question (not-a-number and infinity become null)."""
        write_json(self.folder / "results.json", results, in_run=True)

    def save_arrays(self, name: str, **arrays: Any) -> Path:
        """Write ``arrays/NAME.npz``."""
        check_name("name", name)
        path = self.folder / "arrays" / f"{name}.npz"
        write_npz(path, {key: np.asarray(value) for key, value in arrays.items()}, in_run=True)
        return path

    def save_figure(self, name: str, figure: "Figure") -> Path:
        """Write a Matplotlib figure as ``figures/NAME.png`` and ``figures/NAME.pdf``; return the path of the first."""
        check_name("name", name)
        path = self.folder / "figures" / f"{name}.png"
        with replacing(path, in_run=True) as file:
            figure.savefig(file, format="png", dpi=200)
        with replacing(path.with_suffix(".pdf"), in_run=True) as file:
            figure.savefig(file, format="pdf", metadata={"CreationDate": None})
        return path

    def log(self, message: str, error: BaseException | None = None) -> None:
        """Write a line to ``log.txt``, with the trace of an error if one is given."""
        if self._log is not None:
            level = logging.INFO if error is None else logging.ERROR
            trace = None if error is None else (type(error), error, error.__traceback__)
            self._log.handle(LOGGER.makeRecord(LOGGER.name, level, __file__, 0, message, (), trace))

    # ------------------------------------------------------------------------------------------------- reading

    @property
    def status(self) -> str:
        """``running``, ``done``, ``failed`` or ``interrupted``."""
        found = self._last_status()
        if found.get("state") != "running":
            return str(found.get("state", "interrupted"))
        owner = Owner.read(found.get("owner"))
        here = self._lock is not None and self._lock.ours
        return "running" if here or FolderLock.is_held(self.folder, owner) else "interrupted"

    def _last_status(self) -> dict[str, Any]:
        there = (self.folder / "status.json").exists()
        return self._read_json("status.json", STATUS) if there else {}

    @property
    def environment(self) -> dict[str, Any]:
        """What the run was made with, and resumed with where that differs."""
        return self._read_json("environment.json", ENVIRONMENT)

    @property
    def results(self) -> dict[str, Any]:
        """The numbers in ``results.json``."""
        return self._read_json("results.json", LINE)

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
        check_name("name", name)
        return read_npz(self.folder / "arrays" / f"{name}.npz", in_run=True)

    def figure(self, name: str) -> Path:
        """Path of a figure that was saved."""
        return self.folder / "figures" / f"{name}.png"

    # ------------------------------------------------------------------------------------------------- inside

    def _read_json(self, name: str, check: schema.Check) -> dict[str, Any]:
        stored = read_json(self.folder / name, in_run=True)
        with damage(self.folder / name):
            return cast("dict[str, Any]", check(stored, name.removesuffix(".json")))

    def _set_status(self, state: str, message: str = "") -> None:
        status: dict[str, Any] = {"state": state, "message": message, "time": moment()}
        if state == "running" and self._lock is not None:
            status["owner"] = self._lock.owner.record()
        write_json(self.folder / "status.json", status, in_run=True)
        self.log(state)

    def _metrics(self) -> Iterator[dict[str, Any]]:
        path = self.folder / "metrics.jsonl"
        if not path.exists():
            return
        with opened(path, in_run=True) as file:
            for number, line in enumerate(iter(lambda: file.readline(MAX_LINE + 1), b""), start=1):
                if line == b"\n":
                    continue
                try:
                    found = LINE(parsed(line, strict=True), "line")
                    if not isinstance(found.get("unit", 0), str | None):
                        raise schema.refuse("unit", found.get("unit", 0), "text or nothing")
                except ValueError:
                    if line.endswith(b"\n") or len(line) > MAX_LINE:
                        raise FileError(f"{path} is damaged in line {number}.") from None
                    return  # the last line may have been cut short
                yield found

    def _forget_unfinished_metrics(self) -> None:
        # Lines outside any unit go as well: the code that wrote them runs again.
        with replacing(self.folder / "metrics.jsonl", in_run=True) as file:
            for line in self._metrics():
                if line["unit"] is not None and self.finished(line["unit"]):
                    file.write((json.dumps(line) + "\n").encode())

    def _compare_versions(self) -> None:
        """Warn, and keep, that a run goes on with other versions than it was begun with."""
        begun, now = self.environment, environment()
        changes = {name: [begun[name], now[name]] for name in ("python", "platform", "git") if begun[name] != now[name]}
        packages = begun["packages"] | now["packages"]
        for name in packages:
            pair = [begun["packages"].get(name), now["packages"].get(name)]
            if pair[0] != pair[1]:
                changes[name] = pair
        earlier = begun.get("resumed", [])
        if not changes or (earlier and {k: list(v) for k, v in earlier[-1]["changes"].items()} == changes):
            return
        resumed = [*earlier, {"time": moment(), "changes": changes}]
        write_json(self.folder / "environment.json", begun | {"resumed": resumed}, in_run=True)
        told = "; ".join(f"{name} {old} -> {new}" for name, (old, new) in changes.items())
        self._tell(f"{self.folder} goes on with other versions than it was begun with ({told}): its results mix both.")

    def _tell(self, message: str) -> None:
        """Warn, and have it in the log."""
        self._news.append(message)
        warnings.warn(message, KolmoWarning, stacklevel=2)

    def _acquire(self, take_over: bool = False) -> None:
        if self._lock is not None:
            if not self._lock.ours:
                raise RunError(f"{self.folder} is written by the process that this one was forked from.")
            return
        with writing(self.folder / "lock"):
            held = FolderLock.take(self.folder)
        try:
            self._check_owner(held, take_over)
            if held is None:  # the old one stays with the process that has it
                (self.folder / "lock").unlink(missing_ok=True)
                held = FolderLock.take(self.folder)
                self._check_owner(held, take_over=False)
        except BaseException:
            if held is not None:
                held.release()
            raise
        self._hold(held)

    def _hold(self, held: FolderLock | None) -> None:
        self._lock = held
        if held is not None and not held.supported:
            self._tell(f"the file system of {self.folder} has no locks: see to it that one process writes at a time.")

    def _check_owner(self, held: FolderLock | None, take_over: bool) -> None:
        """Refuse a run that somebody else writes to, by its lock and by the record of who wrote last."""
        found = self._last_status()
        owner = Owner.read(found.get("owner")) if found.get("state") == "running" else None
        word = "resume it with take_over=True, or --take-over"
        who = "another process" if owner is None else f"another process, {owner}"
        busy = RunError(f"{self.folder} is being written by {who}; wait for it or stop it.")
        if held is None:
            if owner is None or owner.alive() is not False:
                raise busy
            if not take_over:
                raise RunError(
                    f"{self.folder} was being written by {owner}, which is gone, but a process that it had started "
                    f"holds its lock. Stop that, or {word}."
                )
        elif owner is not None and FolderLock.is_held(self.folder, owner, held):
            if owner.alive() is None and not take_over:
                raise RunError(
                    f"{self.folder} was being written by {owner}. The file system has no locks, so it cannot be told "
                    f"from here whether it still is. If it is not, {word}."
                )
            if owner.alive() is not None:
                raise busy
        if owner is not None:
            self._news.append(f"goes on with what {owner} left")
