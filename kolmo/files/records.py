"""Records: JSON, arrays, and trees of both, in files that are whole; never unpickled.

Reading bounds what it will hold before any of it is in memory, and names the file that is missing or damaged.
"""

import json
import math
import os
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, NoReturn, TypeVar

import numpy as np

from kolmo import memory
from kolmo.errors import InputError
from kolmo.files.whole import FileError, damage, opened, read_bytes, reading, replacing, write_bytes

MAX_JSON = 32 * 2**20
"""Bytes of JSON that are read, and written: as Python objects they can take 25 times as much."""

MAX_NESTING = 100
"""Depth of what is read and written as JSON."""

# The list of contents of an npz file, 46 bytes and a name for each array; its entries take 15 times that in memory.
_MAX_CONTENTS = 8 * 2**20

_KINDS = "biufcSUmM"

T = TypeVar("T")


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
    with reading(path), opened(path, in_run=in_run) as file:
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
        Of `kolmo.files.schema`: says what a record of this kind holds.
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
    return _walked(value, lambda item, depth: _split(item, arrays, depth), depth)


def _walked(value: Any, each: Callable[[Any, int], Any], depth: int) -> Any:
    """A value whose parts, if it has some, were each changed."""
    if not isinstance(value, Mapping | list | tuple):
        return _scalar(value)
    if depth >= MAX_NESTING:
        raise InputError("value", f"a value nested more than {MAX_NESTING} deep", "a shallower one")
    if isinstance(value, Mapping):
        return {_key(key): each(item, depth + 1) for key, item in value.items()}
    return [each(item, depth + 1) for item in value]


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
    value = _walked(value, plain, depth)
    return None if isinstance(value, float) and not math.isfinite(value) else value


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
