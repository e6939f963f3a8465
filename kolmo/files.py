"""Files that are whole or absent: written in one step, read with a check, never unpickled.

A file is written beside its place and moved there when it is complete, so a reader sees the old one or the new one.
Reading names the file that is missing or damaged.

This room may import ``kolmo.errors``.
"""

import contextlib
import json
import math
import os
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from kolmo.errors import InputError, KolmoError

__all__ = [
    "FileError",
    "is_file",
    "plain",
    "read_json",
    "read_npz",
    "read_tree",
    "replacing",
    "write_bytes",
    "write_json",
    "write_npz",
    "write_tree",
    "writing",
]


class FileError(KolmoError, RuntimeError):
    """A file is missing, damaged, or cannot be written; the message names it."""


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file in one step: complete, or not at all."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path, value: Any) -> None:
    """Write strict JSON in one step; not-a-number and infinity become null."""
    write_bytes(path, (json.dumps(plain(value), indent=2, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """Read JSON; a missing or damaged file is named."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileError(f"{path} is missing.") from None
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror or error}.") from error
    except ValueError as error:
        raise FileError(f"{path} is damaged: {error}.") from None


def is_file(path: Path) -> bool:
    """Whether there is a file; not where there cannot be one, such as under a name that is too long."""
    try:
        return path.is_file()
    except OSError:
        return False


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Name the file where the system refuses to write it."""
    try:
        yield
    except OSError as error:
        raise FileError(f"cannot write {path}: {error.strerror or error}.") from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path beside the real one; move it there, flushed to the disk, if all went well."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with writing(path):
            if path.exists() and not path.is_file():  # a device would be replaced by a file, and be gone
                raise FileError(f"cannot write {path}: it is a folder or a device.")
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_npz(path: Path, arrays: Mapping[str, np.ndarray[Any, Any]]) -> None:
    """Write arrays of numbers, booleans or strings in one step."""
    for name, array in arrays.items():
        if array.dtype.hasobject:
            raise InputError(name, f"an array of {array.dtype}", "numbers, booleans or strings")
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, allow_pickle=False, **dict(arrays))


def read_npz(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Read arrays; a missing or damaged file is named."""
    # The zip container keeps a checksum of every array, and reading checks it.
    try:
        with np.load(path, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except FileNotFoundError:
        raise FileError(f"{path} is missing.") from None
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise FileError(f"{path} is damaged: {error}.") from None


def write_tree(path: Path, value: Any) -> None:
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
    tree = json.dumps(_split(value, arrays))
    write_npz(path, {"tree": np.frombuffer(tree.encode(), np.uint8), **arrays})


def read_tree(path: Path) -> Any:
    """Read what `write_tree` wrote; tuples come as lists, NumPy scalars as Python's."""
    arrays = read_npz(path)
    try:
        return _join(json.loads(arrays["tree"].tobytes()), arrays)
    except (KeyError, ValueError) as error:
        raise FileError(f"{path} is damaged: {error}.") from None


_ARRAY = "__array__"


def _split(value: Any, arrays: dict[str, np.ndarray[Any, Any]]) -> Any:
    """Return the value as a JSON tree in which arrays are names; collect the arrays."""
    if isinstance(value, np.ndarray):
        name = f"array{len(arrays)}"
        arrays[name] = value
        return {_ARRAY: name}
    if isinstance(value, Mapping):
        return {_key(key): _split(item, arrays) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_split(item, arrays) for item in value]
    return _scalar(value)


def _join(tree: Any, arrays: Mapping[str, np.ndarray[Any, Any]]) -> Any:
    if isinstance(tree, dict):
        if tree.keys() == {_ARRAY}:
            return arrays[tree[_ARRAY]]
        return {key: _join(item, arrays) for key, item in tree.items()}
    if isinstance(tree, list):
        return [_join(item, arrays) for item in tree]
    return tree


def plain(value: Any) -> Any:
    """Return the value as strict JSON: arrays as nested lists, numbers that are not finite as null."""
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, Mapping):
        return {_key(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    value = _scalar(value)
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
