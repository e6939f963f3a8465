"""Folders of runs: names that are free, moves that are whole, and what must be true of one."""

import contextlib
import datetime
import os
import re
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from kolmo.errors import InputError, KolmoError
from kolmo.files import FileError, synced

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=+-]*")


class RunError(KolmoError, RuntimeError):
    """A run folder cannot be written to: another process does, or it cannot be told whether one does."""


def check_name(argument: str, name: str) -> None:
    """Refuse names that are no plain names of folders."""
    if not _NAME.fullmatch(name):
        raise InputError(argument, repr(name), "letters, digits and . _ = + -, a letter or digit first")


def fresh_names(root: Path, name: str) -> Iterator[Path]:
    """Folders that are not there yet: name, time, and a number where needed."""
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    for attempt in range(1, 1000):
        yield root / (f"{name}-{stamp}" if attempt == 1 else f"{name}-{stamp}-{attempt}")


def moved(made: Path, names: Sequence[Path]) -> Path:
    """Give a complete folder the first name that is free: in one step, and never in the place of something else."""
    for folder in names:
        try:
            if os.name == "nt" and folder.exists():
                continue
            made.rename(folder)
        except OSError:
            if not (folder.exists() or folder.is_symlink()):
                raise
            continue
        synced(folder.parent)
        return folder
    fix = "choose another folder; experiments, sweeps and landscapes go on with --resume"
    raise InputError("out", names[0], "a folder that does not exist yet, or is empty", fix)


def check_folder(folder: Path) -> None:
    """Refuse a folder that holds anything but files and folders of its own: it may come from anybody."""
    kinds = {stat.S_IFLNK: "a link", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    waiting = [os.fspath(folder)]
    try:
        while waiting:
            with os.scandir(waiting.pop()) as entries:
                for entry in entries:
                    mode = entry.stat(follow_symlinks=False).st_mode
                    if stat.S_ISDIR(mode):
                        waiting.append(entry.path)
                    elif not stat.S_ISREG(mode):
                        kind = kinds.get(stat.S_IFMT(mode), "a device")
                        raise FileError(
                            f"{entry.path} is {kind}: a run folder holds files and folders of its own only."
                        )
    except FileNotFoundError:
        pass  # what another process writes comes and goes
    except OSError as error:
        raise FileError(f"cannot read {folder}: {error.strerror or error}.") from error


def known_runs(folder: Path) -> str:
    """What is beside a folder that is not there."""
    inside: list[str] = []
    with contextlib.suppress(OSError):
        inside = sorted(path.parent.name for path in folder.glob("*/config.json"))
    return f"in it are {', '.join(inside[-5:])}" if inside else ""
