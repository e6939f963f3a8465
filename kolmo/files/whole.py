"""Files that are whole or absent: written in one step, read with a check.

A file is written beside its place, under a name that nobody can guess, and moved there when it is complete and on the
disk, so a reader sees the old one or the new one. Reading takes ordinary files only, and no more than is asked for.
"""

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from kolmo.errors import KolmoError
from kolmo.files import claims


class FileError(KolmoError, RuntimeError):
    """A file is missing, damaged, or cannot be written; the message names it."""


def write_bytes(path: Path, content: bytes, *, in_run: bool = False) -> None:
    """Write a file in one step: complete, or not at all."""
    with replacing(path, in_run=in_run) as file:
        file.write(content)


def is_file(path: Path) -> bool:
    """Whether there is a file; not where there cannot be one, such as under a name that is too long."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Name the file where the system refuses to write it."""
    try:
        yield
    except (OSError, ValueError) as error:
        if isinstance(error, KolmoError):
            raise
        raise FileError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}.") from error


@contextlib.contextmanager
def replacing(path: Path, *, in_run: bool = False) -> Iterator[IO[bytes]]:
    """Give a file to write to; if all went well it takes the place of the named one, when it is on the disk.

    The named file keeps its permissions. A link stays a link: what it points to is replaced. In a run folder, which
    somebody else may have filled, links are refused; what a kill left behind there is swept when the run is resumed.
    """
    with writing(path):
        target, mode = _place(path, in_run)
        target.parent.mkdir(parents=True, exist_ok=True)
        if not in_run:
            claims.sweep(target.parent, target.name)
        with claims.claimed_file(target.parent, target.name, mode) as (file, temporary):
            yield file
            file.flush()
            os.fsync(file.fileno())
            if os.name == "nt":  # an open file cannot be moved there
                file.close()
            os.replace(temporary, target)  # noqa: PTH105 -- one call that tests can let fail
            synced(target.parent)


def _place(path: Path, in_run: bool) -> tuple[Path, int | None]:
    """The file that is to be replaced, and its permissions if it is there."""
    if path.is_symlink():
        if in_run:
            raise FileError(f"cannot write {path}: it is a link.")
        path = Path(os.path.realpath(path))
    try:
        found = path.stat()
    except FileNotFoundError:
        return path, None
    if not stat.S_ISREG(found.st_mode):  # a device would be replaced by a file, and be gone
        raise FileError(f"cannot write {path}: it is a folder or a device.")
    return path, stat.S_IMODE(found.st_mode)


def appending(path: Path) -> int:
    """Open a file of a run for writing at its end, not through a link; the descriptor."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0), 0o666)


def append(path: Path, content: bytes) -> None:
    """Add to a file of a run: all of it or, where the disk is full, nothing."""
    with writing(path):
        descriptor = appending(path)
        try:
            before = os.fstat(descriptor).st_size
            try:
                if os.write(descriptor, content) < len(content):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(descriptor, before)
                raise
        finally:
            os.close(descriptor)


# What file systems say that cannot sync a folder, which is then as safe as it gets there.
_UNSYNCED = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF, errno.EACCES, errno.EPERM)


def synced(folder: Path) -> None:
    """See to it that the names in a folder are on the disk."""
    if os.name == "nt":  # folders are not opened there
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _UNSYNCED:
            raise


def opened(path: Path, *, in_run: bool = False) -> IO[bytes]:
    """Open an ordinary file for reading; pipes and devices are refused without opening them.

    Raises
    ------
    FileError
        When the file is missing, no ordinary file, or a link in a run folder.
    """
    flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        _ordinary(path, path.lstat() if in_run else path.stat())
        # a pipe put there in this moment is not waited for, and seen in what was opened
        descriptor = os.open(path, flags | (getattr(os, "O_NOFOLLOW", 0) if in_run else 0))
        try:
            _ordinary(path, os.fstat(descriptor))
            return os.fdopen(descriptor, "rb")
        except BaseException:
            os.close(descriptor)
            raise
    except FileNotFoundError:
        raise FileError(f"{path} is missing.") from None
    except (OSError, ValueError) as error:
        if isinstance(error, KolmoError):
            raise
        raise FileError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}.") from error


def _ordinary(path: Path, found: os.stat_result) -> None:
    kinds = {stat.S_IFLNK: "a link", stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    if not stat.S_ISREG(found.st_mode):
        raise FileError(f"cannot read {path}: it is {kinds.get(stat.S_IFMT(found.st_mode), 'a device')}.")


def read_bytes(path: Path, most: int, *, in_run: bool = False) -> bytes:
    """Read an ordinary file of at most so many bytes."""
    with reading(path), opened(path, in_run=in_run) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise FileError(f"cannot read {path}: it is larger than the {most / 1e6:.3g} MB that are read.")
    return content


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Name the file where the system cannot read it."""
    try:
        yield
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror or error}.") from error


@contextlib.contextmanager
def damage(path: Path, member: str = "") -> Iterator[None]:
    """Name the file, and the part of it, where its content is not what it should be, whatever that leads to."""
    try:
        yield
    except (FileError, OSError):
        raise
    except MemoryError:
        raise FileError(f"{path} is damaged, or does not fit in memory{f': {member}' if member else ''}.") from None
    except Exception as error:
        told = str(error) if isinstance(error, ValueError) and str(error) else f"{type(error).__name__}: {error}"
        raise FileError(f"{path} is damaged: {f'{member}: ' if member else ''}{told.rstrip('.')}.") from error
