"""What a report is made of: sections of text, figures, tables and code."""

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

__all__ = ["Block", "Code", "Figure", "Measured", "Relief", "Section", "Table"]


@dataclasses.dataclass(frozen=True)
class Measured:
    """A number with its uncertainty, printed to two digits of the uncertainty.

    Parameters
    ----------
    value : float
        The number.
    error : float
        Its standard error, or its error estimate.

    Examples
    --------
    >>> print(Measured(0.91234, 0.0042), Measured(1234.5, 56.0), Measured(3.2e-7, 1e-9), sep=", ")
    0.9123 ± 0.0042, 1234 ± 56, 3.200e-07 ± 1.0e-09
    """

    value: float
    error: float

    def __str__(self) -> str:
        if not (math.isfinite(self.value) and math.isfinite(self.error)) or self.error <= 0:
            return f"{self.value:.4g} ± {self.error:.2g}"
        if abs(self.value) < self.error < 1e-4:  # nothing but noise, perhaps that of rounding
            return f"{self.value:.2g} ± {self.error:.1e}"
        digits = 1 - math.floor(math.log10(self.error))  # decimals that show two digits of the error
        leading = math.floor(math.log10(abs(self.value))) if self.value else 0
        if max(leading, -digits) < 6 and leading > -4:
            return f"{self.value:.{max(digits, 0)}f} ± {self.error:.{max(digits, 0)}f}"
        return f"{self.value:.{max(leading + digits, 0)}e} ± {self.error:.1e}"


@dataclasses.dataclass(frozen=True)
class Figure:
    """A figure from a file, embedded in the report.

    Parameters
    ----------
    path : path
        A PNG or SVG file.
    alt : str
        What the figure shows, in words, for those who cannot see it.
    caption : str, optional
        What the reader should take from it.
    """

    path: str | os.PathLike[str]
    alt: str
    caption: str = ""


@dataclasses.dataclass(frozen=True)
class Table:
    """A table; numbers are aligned at the right and printed to four digits.

    Parameters
    ----------
    header : sequence of str
        Column titles.
    rows : sequence of sequences
        Strings, numbers, None (printed as a dash) and `Measured` numbers.
    caption : str, optional
        What the table says and where its uncertainties come from.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[object]]
    caption: str = ""


@dataclasses.dataclass(frozen=True)
class Code:
    """Lines to be copied as they are."""

    text: str


@dataclasses.dataclass(frozen=True)
class Relief:
    """Surfaces over one plane that the reader turns, and goes through with a slider.

    Parameters
    ----------
    axes : pair of arrays, shapes (n,) and (m,)
        Coordinates of the points.
    fields : mapping of str to array, shape (n, m)
        Values of every level by its name, in the order of the slider; not-a-number leaves a hole.
    alt : str
        What the figure shows, in words.
    caption : str, optional
        What the reader should take from it.
    slider : str, default "noise"
        What the slider goes over.
    height : str, default "loss"
        What the values are.
    labels : pair of str
        What the axes are.
    log : bool, optional
        Logarithmic height; by default where all values are positive and span a factor of more than 5.
    """

    axes: Sequence[Any]
    fields: Mapping[str, np.ndarray[Any, Any]]
    alt: str
    caption: str = ""
    slider: str = "noise"
    height: str = "loss"
    labels: tuple[str, str] = ("direction 1", "direction 2")
    log: bool | None = None


Block = str | Figure | Table | Code | Relief


@dataclasses.dataclass(frozen=True)
class Section:
    """A titled part of a report.

    Parameters
    ----------
    title : str
        The heading.
    blocks : sequence of str, Figure, Table, Code or Relief
        What is in it. A string is a paragraph of plain text; words between backquotes are set as code.
    """

    title: str
    blocks: Sequence[Block]
