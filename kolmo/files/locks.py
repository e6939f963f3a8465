"""Who writes to a folder: a lock that the system drops with its process, and a record of that process beside it.

The lock decides where it can. The record tells what a lock cannot: who holds it; that the holder lives although its
lock file was deleted; that it is gone although a process that it had started still has the lock open; and whether it
lives where the file system has no locks.
"""

import contextlib
import errno
import functools
import os
import platform
import threading
import time
import weakref
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kolmo.files import schema

__all__ = ["FolderLock", "Owner", "is_at", "lock"]

# What else a lock that is refused may say: that another has it.
_BUSY = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
# Somebody who only looks whether a folder is in use holds its lock for less than this: seconds.
_GLANCE = 0.2

try:
    from fcntl import LOCK_EX, LOCK_NB, LOCK_SH, flock
except ImportError:  # Windows: no locks of this kind
    LOCK_EX = LOCK_NB = LOCK_SH = 0  # type: ignore[misc]

    def flock(fd: int, operation: int) -> None:  # type: ignore[misc]
        """Say that there are no locks."""
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))


def lock(descriptor: int, *, shared: bool = False, wait: bool = False) -> bool | None:
    """Lock an open file: True: it is ours now, False: another has it, None: there are no locks here."""
    try:
        flock(descriptor, (LOCK_SH if shared else LOCK_EX) | (0 if wait else LOCK_NB))
    except OSError as error:
        return False if error.errno in _BUSY else None
    return True


# ------------------------------------------------------------------------------------------------------------- owners


@dataclass(frozen=True)
class Owner:
    """A process that writes to a folder, and its lock file.

    Attributes
    ----------
    host : str
        Name of its machine.
    place : str
        Where numbers of processes mean something: the machine since it was started, and the container.
    pid : int
        Number of the process.
    started : str
        When it began, since numbers are used again; empty where the system does not tell.
    folder, lock : int
        Numbers of the folder and its lock file, by which a copy is known, and a lock that was deleted and made again.
    """

    host: str
    place: str
    pid: int
    started: str
    folder: int
    lock: int

    @classmethod
    def here(cls, folder: int, lock_file: int) -> "Owner":
        """The process that asks."""
        return cls(platform.node(), _place(), os.getpid(), _started(os.getpid()) or "", folder, lock_file)

    @classmethod
    def read(cls, record: Any) -> "Owner | None":
        """The owner of a record; None for none, or for one that is damaged."""
        with contextlib.suppress(ValueError):
            return cls(**_RECORD(record, "owner"))
        return None

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)

    def alive(self) -> bool | None:
        """Whether the process lives; None where that cannot be seen from here."""
        if self.place != _place():
            return None
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except OSError:  # it belongs to somebody else
            pass
        return self.started in ("", _started(self.pid))

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


_RECORD = schema.of(Owner, pid=schema.whole(1), folder=schema.whole(0), lock=schema.whole(0))


@functools.cache
def _place() -> str:
    parts = [platform.node(), _line("/proc/sys/kernel/random/boot_id")]
    with contextlib.suppress(OSError):
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    return " ".join(parts)


def _line(path: str) -> str:
    with contextlib.suppress(OSError):
        return Path(path).read_text(encoding="utf-8").strip()
    return ""


def _started(pid: int) -> str | None:
    """When a process began, in clock ticks of the machine; None where there is none or the system does not tell."""
    try:
        told = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None
    return None if told[0] in (b"Z", b"X") else told[19].decode()  # a process that ended may wait to be noticed


# --------------------------------------------------------------------------------------------------------------- locks


class FolderLock:
    """The lock of a folder, held by this process, not by those that it forks.

    Parameters
    ----------
    folder : path
        The folder.
    descriptor : int
        Its open lock file.
    supported : bool
        Whether the file system has locks.

    Attributes
    ----------
    owner : Owner
        This process.
    supported : bool
        Whether the file system has locks.
    """

    def __init__(self, folder: Path, descriptor: int, supported: bool) -> None:
        self._descriptor: int | None = descriptor
        self.owner, self.supported = Owner.here(_number(folder), os.fstat(descriptor).st_ino), supported
        with _GUARD:
            _HELD.add(self)

    @property
    def ours(self) -> bool:
        """Whether this process holds it: a forked one does not."""
        return self._descriptor is not None

    def release(self) -> None:
        """Give it up."""
        with _GUARD:
            _HELD.discard(self)
        if self._descriptor is not None:
            os.close(self._descriptor)  # the system drops the lock with the file, also when the process is killed
            self._descriptor = None

    def __del__(self) -> None:
        if getattr(self, "_descriptor", None) is not None:
            self.release()

    @classmethod
    def take(cls, folder: Path) -> "FolderLock | None":
        """Take the lock of a folder; None where another has it."""
        path = folder / "lock"
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
        until = time.monotonic() + _GLANCE
        while True:
            descriptor = os.open(path, flags | getattr(os, "O_NONBLOCK", 0), 0o666)
            got = lock(descriptor)
            if got is None or (got and is_at(descriptor, path)):
                return cls(folder, descriptor, got is not None)
            os.close(descriptor)
            if time.monotonic() > until:
                return None
            time.sleep(_GLANCE / 20)

    @staticmethod
    def is_held(folder: Path, owner: Owner | None, mine: "FolderLock | None" = None) -> bool:
        """Whether somebody else writes to a folder whose last record is of an owner; ``mine`` is its lock if taken."""
        free, number = _looked_at(folder / "lock") if mine is None else (mine.supported or None, mine.owner.lock)
        if owner is None or owner.folder != _number(folder):  # of a copy the record tells nothing
            return free is False
        if free is False:  # a process that it had started may have the lock still
            return owner.alive() is not False
        if free and number == owner.lock:
            return False
        if owner.pid == os.getpid() and owner.place == _place():
            with _GUARD:
                return any(held.owner == owner for held in _HELD if held is not mine)
        return owner.alive() is not False if free is None else owner.alive() is True


def _number(folder: Path) -> int:
    """Number of a folder, the same under another name; 0 for none."""
    with contextlib.suppress(OSError):
        return folder.stat().st_ino
    return 0


def is_at(descriptor: int, path: Path) -> bool:
    """Whether the open file is the one that has the name now."""
    with contextlib.suppress(OSError):
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    return False


def _looked_at(path: Path) -> tuple[bool | None, int]:
    """Whether a lock is free, None where there are no locks; and the number of its file, 0 where there is none."""
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    except OSError:
        return True, 0
    try:
        return lock(descriptor, shared=True), os.fstat(descriptor).st_ino
    finally:
        os.close(descriptor)


_HELD: "weakref.WeakSet[FolderLock]" = weakref.WeakSet()
_GUARD = threading.RLock()


def _after_fork() -> None:
    """A forked process has no part in the locks of its parent, and must not keep them when that ends."""
    for held in list(_HELD):
        held.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_GUARD.acquire, after_in_parent=_GUARD.release, after_in_child=_GUARD.release)
    os.register_at_fork(after_in_child=_after_fork)
