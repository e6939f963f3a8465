"""How results show themselves: one line at a prompt, a small table in a notebook."""

import html
import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, ClassVar

import numpy as np

from kolmo.arrays import as_numpy, is_tensor

__all__ = ["Shown", "brief"]

# Numbers of an array that are shown one by one; longer arrays show their shape and their range.
FEW = 4
# Characters of anything else.
LONGEST = 100


def brief(value: Any) -> str:
    """Anything in a few words: numbers to six digits, arrays by shape and range, functions by name.

    Examples
    --------
    >>> import numpy as np
    >>> brief(0.123456789), brief(np.array([1.0, 2.5])), brief(np.zeros((3, 40)))
    ('0.123457', '[1, 2.5]', 'array (3, 40) from 0 to 0')
    >>> brief({"cells": 92, "steps": 40})
    'cells 92, steps 40'
    """
    if is_tensor(value) or isinstance(value, np.ndarray):
        return _array(as_numpy(value))
    if isinstance(value, float | np.floating):
        return f"{value:.6g}"
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        told = [f"{key} {brief(item)}" for key, item in list(value.items())[:FEW]]
        return ", ".join(told) + (f", … ({len(value)})" if len(value) > FEW else "")
    if isinstance(value, list | tuple):
        told = [brief(item) for item in value[:FEW]]
        return f"[{', '.join(told)}{f', … ({len(value)})' if len(value) > FEW else ''}]"
    if callable(value) and hasattr(value, "__name__"):
        return str(value.__name__)
    text = " ".join(repr(value).split())
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


def _array(value: np.ndarray) -> str:
    """Few numbers as they are, many by their shape and range."""
    if value.ndim == 0:
        return brief(value.item())
    if value.size <= FEW and value.ndim == 1:
        return f"[{', '.join(brief(item) for item in value.tolist())}]"
    shape = f"array {tuple(value.shape)}"
    if value.size == 0 or value.dtype.kind not in "iuf":
        return shape
    finite = value[np.isfinite(value)]
    if finite.size == 0:
        return f"{shape}, nothing finite"
    holes = "" if finite.size == value.size else f", {value.size - finite.size} not finite"
    return f"{shape} from {brief(finite.min().item())} to {brief(finite.max().item())}{holes}"


class Shown:
    """Base of results: ``repr`` takes one line, and a notebook shows a table of the same facts.

    A class says what it tells by ``_facts``; without that it tells its ``_told`` attributes, and without those the
    public fields of a dataclass. A class that has a ``__repr__`` of its own keeps it, with the table beside it; one
    that prints as a table (``__str__``) shows that at the prompt and in notebooks too.

    Examples
    --------
    >>> from dataclasses import dataclass
    >>> @dataclass(frozen=True, repr=False)
    ... class Found(Shown):
    ...     mean: float
    ...     status: str
    >>> Found(0.25, "converged")
    Found(mean=0.25, status=converged)
    >>> print(Found(0.25, "a < b")._repr_html_().count("<tr>"))
    2
    """

    _told: ClassVar[tuple[str, ...]] = ()

    def _facts(self) -> dict[str, Any]:
        """What is shown, by name; None is left out."""
        names = list(self._told)
        own: Any = type(self)
        if not names and is_dataclass(own):
            names = [field.name for field in fields(own) if field.repr and not field.name.startswith("_")]
        return {name: getattr(self, name) for name in names}

    def _shown(self) -> dict[str, str]:
        told = {name: brief(value) for name, value in self._facts().items() if value is not None}
        return {name: text for name, text in told.items() if text}

    def __repr__(self) -> str:
        if type(self).__str__ is not object.__str__:
            return str(self)
        return f"{type(self).__name__}({', '.join(f'{name}={text}' for name, text in self._shown().items())})"

    def _repr_html_(self) -> str:
        """A table for notebooks; colours are those of the page."""
        name = f"<b>{html.escape(type(self).__name__)}</b>"
        if type(self).__str__ is not object.__str__:
            return f"<p>{name}</p><pre>{html.escape(str(self))}</pre>"
        rows = "".join(
            f'<tr><th scope="row" style="text-align:left">{html.escape(fact.replace("_", " "))}</th>'
            f'<td style="text-align:left">{html.escape(text)}</td></tr>'
            for fact, text in self._shown().items()
        )
        caption = f'<caption style="text-align:left">{name}</caption>'
        return f"<table>{caption}<tbody>{rows}</tbody></table>"


def with_error(value: Any, error: Any) -> str:
    """A number, or a few, with their errors; longer arrays by their ranges.

    Examples
    --------
    >>> with_error(0.62528, 3.1e-5)
    '0.62528 ± 3.1e-05'
    """
    if error is None:
        return brief(value)
    numbers, errors = (np.asarray(as_numpy(part), dtype=float) for part in (value, error))
    numbers, errors = np.broadcast_arrays(numbers, errors)
    if numbers.size > FEW:
        worst = float(np.nanmax(errors)) if np.isfinite(errors).any() else math.inf
        return f"{brief(numbers)}, ± {worst:.1e} at most"
    told = [f"{v:.6g} ± {e:.1e}" for v, e in zip(numbers.ravel(), errors.ravel(), strict=True)]
    return told[0] if numbers.ndim == 0 else f"[{', '.join(told)}]"
