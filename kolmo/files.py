"""Files that are whole or absent: written in one step, read with a check, never unpickled.

A file is written beside its place, under a name that nobody can guess, and moved there when it is complete and on the
disk, so a reader sees the old one or the new one. Reading takes ordinary files only, bounds what it will hold before
any of it is in memory, and names the file that is missing or damaged.

This room may import ``kolmo.errors``, ``kolmo.claims`` and ``kolmo.memory``.
"""

import contextlib
import errno
import json
import math
import os
import stat
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NoReturn, TypeVar

import numpy as np

from kolmo import claims, memory
from kolmo.errors import InputError, KolmoError

__all__ = [
    "FileError",
    "append",
    "appending",
    "damage",
    "is_file",
    "opened",
    "parsed",
    "plain",
    "read_bytes",
    "read_json",
    "read_npz",
    "read_record",
    "read_text",
    "read_tree",
    "replacing",
    "synced",
    "write_bytes",
    "write_json",
    "write_npz",
    "write_tree",
    "writing",
]

MAX_JSON = 32 * 2**20
"""Bytes of JSON that are read, and written: as Python objects they can take 25 times as much."""

MAX_NESTING = 100
"""Depth of what is read and written as JSON."""

# The list of contents of an npz file, 46 bytes and a name for each array; its entries take 15 times that in memory.
_MAX_CONTENTS = 8 * 2**20

_KINDS = "biufcSUmM"

T = TypeVar("T")


class FileError(KolmoError, RuntimeError):
    """A file is missing, damaged, or cannot be written; the message names it."""


# ------------------------------------------------------------------------------------------------------------- writing


def write_bytes(path: Path, content: bytes, *, in_run: bool = False) -> None:
    """Write a file in one step: complete, or not at all."""
    with replacing(path, in_run=in_run) as file:
        file.write(content)


def write_json(path: Path, value: Any, *, in_run: bool = False) -> None:
    """Write strict JSON in one step; not-a-number and infinity become null."""
    content = (json.dumps(plain(value), indent=2, allow_nan=False) + "\n").encode()
    write_bytes(path, _small(content), in_run=in_run)


def _small(content: bytes) -> bytes:
    """JSON that can be read back."""
    if len(content) > MAX_JSON:
        given = f"{len(content) / 1e6:.0f} MB of numbers and text"
        raise InputError("value", given, f"at most {MAX_JSON / 1e6:.0f} MB", "give long lists as NumPy arrays")
    return content


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


# ------------------------------------------------------------------------------------------------------------- reading


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
    with _reading(path), opened(path, in_run=in_run) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise FileError(f"cannot read {path}: it is larger than the {most / 1e6:.3g} MB that are read.")
    return content


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Name the file where the system cannot read it."""
    try:
        yield
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror or error}.") from error


def read_text(path: Path, most: int = MAX_JSON, *, in_run: bool = False) -> str:
    """Read text in UTF-8."""
    try:
        return read_bytes(path, most, in_run=in_run).decode("utf-8")
    except UnicodeDecodeError as error:
        raise FileError(f"{path} is damaged: {error}.") from None


def read_json(path: Path, *, in_run: bool = False) -> Any:
    """Read strict JSON; a missing or damaged file is named."""
    text = read_text(path, in_run=in_run)
    with damage(path):
        return parsed(text, strict=True)


def parsed(text: str | bytes, *, strict: bool) -> Any:
    """JSON that is not nested too deeply; not-a-number and infinity are refused where it is strict.

    Raises
    ------
    ValueError
        For anything else.
    """
    try:
        found = json.loads(text, parse_constant=_no_number if strict else None)
    except RecursionError:
        raise ValueError(f"it is nested more than {MAX_NESTING} deep") from None
    inside, depth = [found], 0
    while inside := [part for item in inside if isinstance(item, dict | list) for part in _parts(item)]:
        depth += 1
        if depth > MAX_NESTING:
            raise ValueError(f"it is nested more than {MAX_NESTING} deep")
    return found


def _parts(item: Any) -> Any:
    return item.values() if isinstance(item, dict) else item


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


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


# -------------------------------------------------------------------------------------------------------------- arrays


def write_npz(path: Path, arrays: Mapping[str, np.ndarray[Any, Any]], *, in_run: bool = False) -> None:
    """Write arrays of numbers, booleans or strings in one step."""
    for name, array in arrays.items():
        if array.dtype.kind not in _KINDS:
            raise InputError(name, f"an array of {array.dtype}", "numbers, booleans or strings")
    with replacing(path, in_run=in_run) as file:
        np.savez(file, allow_pickle=False, **dict(arrays))


def read_npz(path: Path, *, in_run: bool = False) -> dict[str, np.ndarray[Any, Any]]:
    """Read arrays; a missing or damaged file is named, with the array.

    The arrays must be stored as they are, as `write_npz` does: what is in the file then bounds what it takes in memory.
    The zip container keeps a checksum of every array, and reading checks it.
    """
    with _reading(path), opened(path, in_run=in_run) as file:
        size = os.fstat(file.fileno()).st_size
        free = memory.available()
        if free is not None and size > free:
            raise FileError(f"cannot read {path}: it takes {size / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free.")
        with damage(path):
            _check_contents(file, size)
            with zipfile.ZipFile(file) as stored:
                members = stored.infolist()
                _check_members(members, size)
                found = {}
                for member in members:
                    with damage(path, member.filename):
                        found[member.filename.removesuffix(".npy")] = _array(stored, member)
                return found


def _check_contents(file: IO[bytes], size: int) -> None:
    """Bound the list of contents, which is taken into memory whole, by what the end of the file says of its length."""
    file.seek(max(size - 98, 0))
    end = file.read(98).rjust(98, b"\0")  # the record for large files, its locator, and the record at the end
    if end[76:80] != b"PK\x05\x06" or end[96:] != b"\0\0":
        raise ValueError("it does not end as an npz file does")
    (length,) = struct.unpack("<L", end[88:92])
    if end[56:60] == b"PK\x06\x07":
        length = max(length % 0xFFFFFFFF, *struct.unpack("<Q", end[40:48]))
    if length > _MAX_CONTENTS:
        raise ValueError(
            f"its list of contents takes {length / 1e6:.0f} MB, at most {_MAX_CONTENTS / 1e6:.0f} are read"
        )
    file.seek(0)


def _check_members(members: list[zipfile.ZipInfo], size: int) -> None:
    if sum(member.file_size for member in members) > size:
        raise ValueError("its arrays are larger than the file")
    if len({member.filename for member in members}) < len(members):
        raise ValueError("two arrays have one name")
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
            raise ValueError(f"{member.filename} is compressed or encrypted; kolmo stores arrays as they are")


def _array(stored: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray[Any, Any]:
    """One array, after its header agreed with the bytes that there are."""
    with stored.open(member) as content:
        version = np.lib.format.read_magic(content)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"version {version} of the format")
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, by_columns, dtype = read(content)
        if dtype.kind not in _KINDS or dtype.itemsize == 0:
            raise ValueError(f"values of type {dtype}; needed numbers, booleans or strings")
        count, there = math.prod(shape), member.file_size - content.tell()
        if (
            min(shape, default=0) < 0
            or max(shape, default=0) > np.iinfo(np.int64).max
            or count * dtype.itemsize != there
        ):
            raise ValueError(f"{there} bytes for an array of shape {shape} and type {dtype}")
        values = np.empty(count, dtype)
        _fill(content, values.view(np.uint8).data if count else memoryview(b""))
    values = values.reshape(shape, order="F" if by_columns else "C")
    return values if dtype.isnative else values.astype(dtype.newbyteorder("="))


def _fill(content: IO[bytes], buffer: memoryview) -> None:
    """Read until the buffer is full and the file at its end, where the checksum is compared."""
    at = 0
    while at < len(buffer):
        got = content.readinto(buffer[at : at + 2**24])  # type: ignore[attr-defined]
        if not got:
            raise EOFError("it ends too early")
        at += got
    content.read(1)


# --------------------------------------------------------------------------------------------------------------- trees


def write_tree(path: Path, value: Any, *, in_run: bool = False) -> None:
    """Write numbers, strings, None, arrays, and dictionaries, lists and tuples of them, as one npz file.

    Examples
    --------
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "value.npz"
    >>> write_tree(path, {"loss": 0.5, "weights": [np.eye(2), None]})
    >>> read_tree(path)
    {'loss': 0.5, 'weights': [array([[1., 0.],
           [0., 1.]]), None]}
    """
    arrays: dict[str, np.ndarray[Any, Any]] = {}
    tree = _small(json.dumps(_split(value, arrays)).encode())
    write_npz(path, {"tree": np.frombuffer(tree, np.uint8), **arrays}, in_run=in_run)


def read_tree(path: Path, *, in_run: bool = False) -> Any:
    """Read what `write_tree` wrote; tuples come as lists, NumPy scalars as Python's."""
    arrays = read_npz(path, in_run=in_run)
    with damage(path, "tree"):
        if "tree" not in arrays:
            raise ValueError("it is missing")
        tree = arrays.pop("tree")
        if tree.nbytes > MAX_JSON:
            raise ValueError(f"it is larger than {MAX_JSON / 1e6:.0f} MB")
        return _join(parsed(tree.tobytes(), strict=False), arrays)


def read_record(path: Path, name: str, check: Callable[[Any, str], Any], build: Callable[[Any], T], needed: str) -> T:
    """Read a thing of one kind that was written as a tree ``{name: record}``: checked, then built.

    Parameters
    ----------
    path : path
        The file.
    name : str
        The kind.
    check : callable
        Of `kolmo.schema`: says what a record of this kind holds.
    build : callable
        From a record that was checked to the thing.
    needed : str
        What to say where the file holds another kind.

    Raises
    ------
    FileError
        A file that is missing or damaged.
    InputError
        A file of another kind.
    """
    tree = read_tree(path)
    if not isinstance(tree, dict) or name not in tree:
        fix = "go on with the call that wrote it" if isinstance(tree, dict) and "unfinished" in tree else ""
        raise InputError("path", str(path), needed, fix)
    with damage(path):
        return build(check(tree[name], name))


_ARRAY = "__array__"


def _split(value: Any, arrays: dict[str, np.ndarray[Any, Any]], depth: int = 0) -> Any:
    """Return the value as a JSON tree in which arrays are names; collect the arrays."""
    if isinstance(value, np.ndarray):
        name = f"array{len(arrays)}"
        arrays[name] = value
        return {_ARRAY: name}
    if isinstance(value, Mapping | list | tuple):
        depth = _deeper(depth)
    if isinstance(value, Mapping):
        return {_key(key): _split(item, arrays, depth) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_split(item, arrays, depth) for item in value]
    return _scalar(value)


def _join(tree: Any, arrays: Mapping[str, np.ndarray[Any, Any]]) -> Any:
    if isinstance(tree, dict):
        if tree.keys() == {_ARRAY}:
            if not isinstance(tree[_ARRAY], str) or tree[_ARRAY] not in arrays:
                raise ValueError(f"it names an array {tree[_ARRAY]!r} that is not there")
            return arrays[tree[_ARRAY]]
        return {key: _join(item, arrays) for key, item in tree.items()}
    if isinstance(tree, list):
        return [_join(item, arrays) for item in tree]
    return tree


def plain(value: Any, depth: int = 0) -> Any:
    """Return the value as strict JSON: arrays as nested lists, numbers that are not finite as null."""
    if isinstance(value, np.ndarray):
        return plain(value.tolist(), depth)
    if isinstance(value, Mapping | list | tuple):
        depth = _deeper(depth)
    if isinstance(value, Mapping):
        return {_key(key): plain(item, depth) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, depth) for item in value]
    value = _scalar(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _deeper(depth: int) -> int:
    if depth >= MAX_NESTING:
        raise InputError("value", f"a value nested more than {MAX_NESTING} deep", "a shallower one")
    return depth + 1


def _key(key: object) -> str:
    if isinstance(key, str):
        return key
    if isinstance(key, int | float | np.integer | np.floating):
        return str(key)
    raise InputError("value", f"a dictionary with a key {key!r}", "strings or numbers as keys")


def _scalar(value: Any) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    needed = "numbers, strings, None, NumPy arrays, and dictionaries, lists and tuples of them"
    fix = "tensor.detach().cpu().numpy()" if hasattr(value, "detach") else ""
    raise InputError("value", f"a {type(value).__name__}", needed, fix)
