"""Data from a CSV file: columns by name, with errors that name file, row and column.

This module may import ``kolmo.errors`` and ``kolmo.files``.
"""

import csv
import io
import math
from pathlib import Path
from typing import NoReturn

import numpy as np

from kolmo.errors import InputError, did_you_mean
from kolmo.files import FileError, read_bytes

__all__ = ["Sheet"]

MAX_BYTES = 64_000_000
MISSING = {"", "na", "nan", "null", "none"}
WORDS = {"true": 1.0, "false": 0.0, "upper": 1.0, "lower": 0.0, "high": 1.0, "low": 0.0}
SHOWN = 40


class Sheet:
    r"""A CSV file: a line of names, and a row of numbers for each observation.

    Parameters
    ----------
    path : path
        The file, at most 64 MB, in UTF-8.

    Attributes
    ----------
    names : list of str
        The columns.
    content : bytes
        The file as it is.

    Raises
    ------
    InputError
        For what is no table; the message names file and row.

    Examples
    --------
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "trials.csv"
    >>> _ = path.write_text("rt,choice\n0.5,upper\n0.7,\n")
    >>> sheet = Sheet(path)
    >>> len(sheet), sheet.column("rt").tolist(), sheet.column("choice", missing=True).tolist()
    (2, [0.5, 0.7], [1.0, nan])
    >>> try:
    ...     sheet.column("choice")
    ... except InputError as error:
    ...     print(str(error).replace(str(path), "trials.csv"))
    trials.csv, row 3, column choice: got nothing; needed a number.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.content = read_bytes(path, MAX_BYTES)
            text = self.content.decode("utf-8-sig")
        except FileError as error:
            raise InputError(str(path), str(error).rstrip("."), "a CSV file that can be read") from None
        except UnicodeDecodeError:
            raise InputError(str(path), "bytes that are not UTF-8", "a CSV file") from None
        lines = list(csv.reader(io.StringIO(text, newline="")))
        # blank lines count where rows are named, and nowhere else
        filled = [(k, row) for k, row in enumerate(lines, 1) if any(cell.strip() for cell in row)]
        if len(filled) < 2:
            raise InputError(str(path), f"{len(filled)} rows", "a row of names and at least one of numbers")
        self.names = [cell.strip() for cell in filled[0][1]]
        twice = [name for name in self.names if name and self.names.count(name) > 1]
        if twice:
            raise InputError(str(path), f"two columns {twice[0]!r}", "names that differ")
        self._rows = filled[1:]
        for number, row in self._rows:
            if len(row) != len(self.names):
                self.refuse(number, "", f"{len(row)} cells", f"{len(self.names)}, one for each column")

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def rows(self) -> list[int]:
        """Lines of the file that the observations are on."""
        return [number for number, _ in self._rows]

    def text(self, name: str) -> list[str]:
        """Cells of a column as they are."""
        if name not in self.names:
            fix = did_you_mean(name, self.names)
            raise InputError(str(self.path), f"no column {name!r}", f"one of {', '.join(self.names)}", fix)
        k = self.names.index(name)
        return [row[k].strip() for _, row in self._rows]

    def column(self, name: str, *, missing: bool = False) -> np.ndarray:
        """Numbers of a column, shape (n,); an empty cell is NaN where cells may be missing."""
        return np.array(
            [self._number(k, name, cell, missing) for k, cell in zip(self.rows, self.text(name), strict=True)]
        )

    def check(self, name: str, good: np.ndarray, needed: str) -> None:
        """Refuse the first cell of a column that is not as it has to be."""
        if not good.all():
            k = int(np.flatnonzero(~good)[0])
            self.refuse(self.rows[k], name, self.text(name)[k] or "nothing", needed)

    def refuse(self, row: int, name: str, given: str, needed: str) -> NoReturn:
        """Raise an InputError that names file, row and column."""
        column = f", column {name}" if name else ""
        raise InputError(f"{self.path}, row {row}{column}", given, needed)

    def _number(self, row: int, name: str, cell: str, missing: bool) -> float:
        word = cell.lower()
        if word in MISSING:
            return math.nan if missing else self.refuse(row, name, "nothing" if not cell else repr(cell), "a number")
        if word in WORDS:
            return WORDS[word]
        try:
            value = float(cell)
        except ValueError:
            self.refuse(row, name, repr(cell[:SHOWN]), "a number")
        return value if math.isfinite(value) else self.refuse(row, name, repr(cell), "a finite number")
