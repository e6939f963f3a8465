"""Image classification data from the official files that a user has: Fashion-MNIST, MNIST, CIFAR-10.

Nothing is downloaded. Every file is checked against the MD5 sum that its publisher gives.
"""

import gzip
import hashlib
import io
import os
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kolmo.errors import InputError
from kolmo.files import FileError, read_bytes

__all__ = ["Images", "load"]

_IDX = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
_MD5 = {
    "fashion-mnist": {
        "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
        "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
        "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
    },
    "mnist": {
        "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
        "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
        "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
    },
    "cifar10": {"cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530"},
}
# Bytes of the largest of these files, with room.
_MOST = 256 * 2**20
_CIFAR = {"train": [f"data_batch_{k}.bin" for k in range(1, 6)], "test": ["test_batch.bin"]}


@dataclass(frozen=True, eq=False)
class Images:
    """Images with their labels.

    Attributes
    ----------
    train_x, test_x : ndarray of uint8, shape (n, channels, height, width)
        Pixels.
    train_y, test_y : ndarray of int64, shape (n,)
        Labels 0 to 9.
    name : str
        Name of the data set.
    """

    train_x: np.ndarray
    train_y: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray
    name: str


def load(name: str, folder: str | os.PathLike[str]) -> Images:
    """Read a data set from a folder with its official files.

    Parameters
    ----------
    name : {"fashion-mnist", "mnist", "cifar10"}
        Which data set.
    folder : path
        Where the files are: for MNIST and Fashion-MNIST the four ``*-ubyte.gz`` files, for CIFAR-10 the binary
        version ``cifar-10-binary.tar.gz``.

    Returns
    -------
    Images

    Raises
    ------
    InputError
        An unknown name, or files that are not there; the message lists those expected.
    FileError
        A file whose MD5 sum is not the published one.

    Examples
    --------
    >>> load("mnist", "no such folder")
    Traceback (most recent call last):
    ...
    kolmo.errors.InputError: data: got no such folder without train-images-idx3-ubyte.gz; needed ...
    """
    if name not in _MD5:
        raise InputError("name", repr(name), "one of " + ", ".join(map(repr, _MD5)))
    root = Path(folder)
    for file in _MD5[name]:
        if not (root / file).is_file():
            expected = ", ".join(_MD5[name])
            raise InputError(
                "data",
                f"{folder} without {file}",
                f"a folder with the official files of {name}: {expected}",
                "get them from the publisher; kolmo downloads nothing",
            )
    parts = _read_cifar(root) if name == "cifar10" else _read_idx(root, name)
    train_x, train_y, test_x, test_y = parts
    return Images(train_x, train_y, test_x, test_y, name)


def _checked(path: Path, md5: str) -> bytes:
    """Content of a file whose sum is right."""
    content = read_bytes(path, _MOST)
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if found != md5:
        raise FileError(f"{path} is not the published file: its MD5 sum is {found}, that of the official file {md5}.")
    return content


def _read_idx(root: Path, name: str) -> list[np.ndarray]:
    found = [read_idx(gzip.decompress(_checked(root / f"{n}.gz", _MD5[name][f"{n}.gz"])), f"{n}.gz") for n in _IDX]
    return [part[:, None] if part.ndim == 3 else part.astype(np.int64) for part in found]


def read_idx(content: bytes, name: str = "file") -> np.ndarray:
    """Read an array of bytes in LeCun's idx format.

    Examples
    --------
    >>> read_idx(bytes([0, 0, 8, 1, 0, 0, 0, 3, 7, 8, 9]))
    array([7, 8, 9], dtype=uint8)
    """
    if content[:3] != b"\x00\x00\x08" or len(content) < 4:
        raise FileError(f"{name} is no idx file of bytes.")
    axes = content[3]
    shape = [int(n) for n in np.frombuffer(content, ">u4", axes, 4)]
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * axes)
    if values.size != np.prod(shape):
        raise FileError(f"{name} is damaged: {values.size} bytes for an array of shape {tuple(shape)}.")
    return values.reshape(shape)


def _read_cifar(root: Path) -> list[np.ndarray]:
    name = "cifar-10-binary.tar.gz"
    content = _checked(root / name, _MD5["cifar10"][name])
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        members = {Path(member.name).name: member for member in archive.getmembers() if member.isfile()}
        found: list[Any] = []
        for part in ("train", "test"):
            files = [archive.extractfile(members[file]) for file in _CIFAR[part]]
            found += read_cifar(b"".join(file.read() for file in files if file is not None))
    return found


def read_cifar(content: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Read images and labels in the binary format of CIFAR-10: a label byte, then 3 × 32 × 32 pixel bytes.

    Examples
    --------
    >>> x, y = read_cifar(bytes([6] + [255] * 3072))
    >>> x.shape, y
    ((1, 3, 32, 32), array([6]))
    """
    if len(content) % 3073:
        raise FileError(f"CIFAR-10 batches are damaged: {len(content)} bytes are no multiple of 3073.")
    rows = np.frombuffer(content, np.uint8).reshape(-1, 3073)
    return rows[:, 1:].reshape(-1, 3, 32, 32), rows[:, 0].astype(np.int64)
