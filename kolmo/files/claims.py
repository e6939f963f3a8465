"""Temporary files and folders: made exclusively under names that nobody can guess, held in use, swept afterwards.

A temporary that was planned by somebody else is never opened: it is created exclusively, which follows no link. Its
maker holds a lock on it, so that one whose maker is gone can be told from one in use, and is removed by whoever next
makes a temporary for the same name. Where the file system has no locks the two cannot be told apart: such leftovers
are removed with the run folder they are in, when that is resumed.
"""

import contextlib
import hashlib
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from kolmo.files.locks import is_at, lock

__all__ = ["claimed_file", "claimed_folder", "is_temporary", "remove", "sweep", "sweep_folder"]

_NAME = re.compile(r"\.kolmo-[0-9a-f]{8}-[0-9a-f]{16}\.tmp")
_EXCLUSIVE = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
_FOLDER = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
# A fresh name is taken, or its file swept between its creation and its lock: once is unlikely, this often a fault.
_ATTEMPTS = 100


def is_temporary(name: str) -> bool:
    """Whether a name is that of a temporary.

    Examples
    --------
    >>> is_temporary(".kolmo-0123abcd-0123456789abcdef.tmp"), is_temporary("u.npz")
    (True, False)
    """
    return _NAME.fullmatch(name) is not None


def _tag(target: str) -> str:
    """What the names of all temporaries for one name share; short, however long that is."""
    return f".kolmo-{hashlib.sha256(os.fsencode(target)).hexdigest()[:8]}-"


@contextlib.contextmanager
def claimed_file(folder: Path, target: str, mode: int | None = None) -> Iterator[tuple[IO[bytes], Path]]:
    """A new file, open for writing, in the folder of the one that it will become; removed unless it was moved away.

    Parameters
    ----------
    folder : path
        Where.
    target : str
        Name that the file will get.
    mode : int, optional
        Permissions; None: those of any new file.

    Yields
    ------
    file, pathlib.Path
        The file and where it is.
    """
    descriptor, path = _made_file(folder, target, 0o666 if mode is None else 0o600)
    file = os.fdopen(descriptor, "w+b")
    try:
        if mode is not None and hasattr(os, "fchmod"):
            os.fchmod(descriptor, mode)
        yield file, path
    finally:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            file.close()


def _made_file(folder: Path, target: str, mode: int) -> tuple[int, Path]:
    for _ in range(_ATTEMPTS):
        path = folder / f"{_tag(target)}{secrets.token_hex(8)}.tmp"
        try:
            descriptor = os.open(path, _EXCLUSIVE, mode)
        except FileExistsError:
            continue
        if _held(descriptor, path):
            return descriptor, path
        os.close(descriptor)
    raise FileExistsError(17, "no name for a temporary file", str(folder))


@contextlib.contextmanager
def claimed_folder(parent: Path, target: str) -> Iterator[Path]:
    """A new folder beside the one that it will become; removed with all that is in it unless it was moved away."""
    descriptor, path = _made_folder(parent, target)
    try:
        yield path
    finally:
        remove(path)
        if descriptor is not None:
            os.close(descriptor)


def _made_folder(parent: Path, target: str) -> tuple[int | None, Path]:
    for _ in range(_ATTEMPTS):
        path = parent / f"{_tag(target)}{secrets.token_hex(8)}.tmp"
        try:
            path.mkdir()
            if os.name == "nt":  # folders are not opened there
                return None, path
            descriptor = os.open(path, _FOLDER)
        except (FileExistsError, FileNotFoundError):
            continue
        if _held(descriptor, path):
            return descriptor, path
        os.close(descriptor)
    raise FileExistsError(17, "no name for a temporary folder", str(parent))


def _held(descriptor: int, path: Path) -> bool:
    """Lock a temporary; False if it was swept before that."""
    if lock(descriptor, wait=True) is None:  # where there are no locks nobody sweeps either
        return True
    return is_at(descriptor, path)


def sweep(folder: Path, target: str) -> None:
    """Remove temporaries for a name whose makers are gone."""
    tag = _tag(target)
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(tag) and is_temporary(entry.name):
                _remove_if_left(Path(entry.path))


def sweep_folder(folder: Path) -> None:
    """Remove all temporaries in a folder that nobody but the caller writes to, and in the folders in it."""
    for path, _, _ in os.walk(folder):
        with contextlib.suppress(OSError), os.scandir(path) as entries:
            for entry in entries:
                if is_temporary(entry.name):
                    _remove_if_left(Path(entry.path), certain=True)


def _remove_if_left(path: Path, *, certain: bool = False) -> None:
    """Remove a temporary that nobody has locked; where there are no locks, only if that is certain without."""
    with contextlib.suppress(OSError):
        found = path.lstat()
        mine = not hasattr(os, "geteuid") or found.st_uid == os.geteuid()
        if not mine or not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):
            return
        kind = _FOLDER if stat.S_ISDIR(found.st_mode) else os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0)
        descriptor = os.open(path, kind | getattr(os, "O_CLOEXEC", 0))
        try:
            free = lock(descriptor)
            if free or (free is None and certain):
                remove(path)
        finally:
            os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file, a link or a whole folder, without following links; nothing happens where that is not possible."""
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
