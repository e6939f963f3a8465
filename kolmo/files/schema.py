"""What a stored thing must hold: small checks that name the place, what is there and what is needed.

A check takes a value and the name of its place, and returns the value, or raises a ``ValueError``; checks of tables and
lists are made of those of their parts. `kolmo.files.read_record` says which file it was.
"""

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

__all__ = [
    "Check",
    "anything",
    "array",
    "many",
    "mapping",
    "number",
    "of",
    "optional",
    "pair",
    "refuse",
    "same_shape",
    "table",
    "text",
    "truth",
    "whole",
]

Check = Callable[[Any, str], Any]

# More of a value than this is not shown.
_SHOWN = 60
# Whole numbers beyond this are no count of anything; as JSON they may have thousands of digits.
_LARGEST = 2**63 - 1


def refuse(where: str, value: Any, needed: str) -> ValueError:
    """The error that says what is wrong where."""
    if isinstance(value, np.ndarray):
        given = f"an array of {value.dtype} of shape {value.shape}"
    elif isinstance(value, dict | list):
        given = f"a {'table' if isinstance(value, dict) else 'list'} of {len(value)}"
    elif isinstance(value, int) and abs(value) > _LARGEST:
        given = "a very large number"
    else:
        given = repr(value) if len(repr(value)) <= _SHOWN else repr(value)[:_SHOWN] + "..."
    return ValueError(f"{where}: got {given}; needed {needed}")


def number(low: float = -math.inf, high: float = math.inf, *, finite: bool = True) -> Check:
    """A number, not a truth value.

    Examples
    --------
    >>> number(0.0)(0.5, "rtol")
    0.5
    >>> number()(True, "rtol")
    Traceback (most recent call last):
    ...
    ValueError: rtol: got True; needed a finite number
    """

    def check(value: Any, where: str) -> float:
        ok = type(value) in (int, float) and (type(value) is float or abs(value) <= _LARGEST)
        if not ok or (finite and not math.isfinite(value)) or not (low <= value <= high or value != value):
            limits = f" from {low:g} to {high:g}" if (low, high) != (-math.inf, math.inf) else ""
            raise refuse(where, value, f"a {'finite ' if finite else ''}number{limits}")
        return float(value)

    return check


def whole(low: int = -_LARGEST, high: int = _LARGEST) -> Check:
    """A whole number."""

    def check(value: Any, where: str) -> int:
        if type(value) is not int or not low <= value <= high:
            raise refuse(where, value, f"a whole number from {low} to {high}")
        return value

    return check


def truth(value: Any, where: str) -> bool:
    """True or false."""
    if type(value) is not bool:
        raise refuse(where, value, "true or false")
    return value


def text(known: Collection[str] | None = None) -> Check:
    """Text, one of those that are known if there are any."""

    def check(value: Any, where: str) -> str:
        if not isinstance(value, str) or (known is not None and value not in known):
            raise refuse(where, value, "text" if known is None else f"one of {', '.join(known)}")
        return value

    return check


def array(kinds: str = "f", *axes: int | None, finite: bool = True) -> Check:
    """An array of numbers.

    Parameters
    ----------
    kinds : str, default "f"
        Kinds of values, as NumPy abbreviates them: "f" floating, "i" whole, "b" truth values.
    *axes : int or None
        Length of each axis, None for any; no axes: any shape.
    finite : bool, default True
        Whether floating values must be finite.

    Examples
    --------
    >>> array("f", None, 2)(np.zeros((3, 2)), "points").shape
    (3, 2)
    >>> array("f")(np.zeros(3, complex), "values")
    Traceback (most recent call last):
    ...
    ValueError: values: got an array of complex128 of shape (3,); needed floating numbers
    """
    names = {"f": "floating", "i": "whole", "u": "whole positive", "b": "true or false"}

    def check(value: Any, where: str) -> np.ndarray:
        if not isinstance(value, np.ndarray) or value.dtype.kind not in kinds:
            raise refuse(where, value, f"{' or '.join(names[k] for k in kinds)} numbers")
        fits = len(axes) == value.ndim and all(n in (None, m) for n, m in zip(axes, value.shape, strict=True))
        if axes and not fits:
            raise refuse(where, value, f"shape ({', '.join('n' if n is None else str(n) for n in axes)})")
        if finite and value.dtype.kind == "f" and not np.isfinite(value).all():
            raise refuse(where, value, "finite numbers")
        return value

    return check


def optional(check: Check) -> Check:
    """None, or what the check says."""
    return lambda value, where: None if value is None else check(value, where)


def many(check: Check, least: int = 0, most: int | None = None) -> Check:
    """A list whose entries all pass."""

    def checked(value: Any, where: str) -> list[Any]:
        if not isinstance(value, list) or len(value) < least or (most is not None and len(value) > most):
            limits = f" of {least} to {most}" if most is not None else f" of at least {least}" if least else ""
            raise refuse(where, value, f"a list{limits}")
        return [check(item, f"{where}[{i}]") for i, item in enumerate(value)]

    return checked


def pair(check: Check) -> Check:
    """A list of two, which becomes a tuple."""
    listed = many(check, 2, 2)
    return lambda value, where: tuple(listed(value, where))


def mapping(check: Check, least: int = 0) -> Check:
    """A table with any names, whose values all pass."""

    def checked(value: Any, where: str) -> dict[str, Any]:
        if not isinstance(value, dict) or len(value) < least:
            raise refuse(where, value, f"a table{f' of at least {least}' if least else ''}")
        return {key: check(item, f"{where}.{key[:_SHOWN]}") for key, item in value.items()}

    return checked


def table(fields: dict[str, Check], absent: Collection[str] = ()) -> Check:
    """A table with exactly these names, of which some may be absent.

    Examples
    --------
    >>> table({"n": whole(1)})({"n": 3, "m": 4}, "axis")
    Traceback (most recent call last):
    ...
    ValueError: axis: got an unknown entry 'm'; needed n
    """

    def checked(value: Any, where: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise refuse(where, value, f"a table with {', '.join(fields)}")
        for key in value:
            if key not in fields:
                raise ValueError(f"{where}: got an unknown entry {key[:_SHOWN]!r}; needed {', '.join(fields)}")
        for key in fields:
            if key not in value and key not in absent:
                raise ValueError(f"{where}: got no {key}; needed {', '.join(fields)}")
        return {key: check(value[key], f"{where}.{key}") for key, check in fields.items() if key in value}

    return checked


def of(kind: Any, known: Mapping[Any, Check] | None = None, **named: Check | None) -> Check:
    """The check of a dataclass, by the types of its fields; what has a default may be absent.

    Parameters
    ----------
    kind : type
        A dataclass, or the type of a field.
    known : mapping of type to check, optional
        How other types are stored.
    **named : check or None
        Fields that their types do not describe, or that are stored beside them; None for one that is not stored.

    Examples
    --------
    >>> @dataclasses.dataclass
    ... class Level:
    ...     n: int
    ...     errors: tuple[float, ...] = ()
    >>> of(Level)({"n": 3, "errors": [0.5, "x"]}, "level")
    Traceback (most recent call last):
    ...
    ValueError: level.errors[1]: got 'x'; needed a number
    """
    known = known or {}
    if kind in known:
        return known[kind]
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        fields = [f for f in dataclasses.fields(kind) if named.get(f.name, truth) is not None]
        checks = {f.name: named.get(f.name) or of(hints[f.name], known) for f in fields}
        checks |= {name: check for name, check in named.items() if check is not None}
        missing = dataclasses.MISSING
        return table(checks, [f.name for f in fields if (f.default, f.default_factory) != (missing, missing)])
    plain = {
        bool: truth,
        int: whole(),
        float: number(finite=False),
        str: text(),
        np.ndarray: array("fiub", finite=False),
    }
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if kind in plain:
        return plain[kind]
    if origin is np.ndarray:
        return plain[np.ndarray]
    if origin in (types.UnionType, typing.Union) and types.NoneType in parts:
        return optional(of(next(part for part in parts if part is not types.NoneType), known))
    if origin is tuple and len(parts) == 2 and parts[1] is not Ellipsis:
        return pair(of(parts[0], known))
    if origin in (list, tuple):
        listed = many(of(parts[0], known))
        return listed if origin is list else lambda value, where: tuple(listed(value, where))
    if origin is dict:
        return mapping(of(parts[1], known))
    return anything


def anything(value: Any, where: str) -> Any:
    """Numbers, text, None, arrays of numbers, and lists and tables of them: what a tree can hold is checked already."""
    if isinstance(value, np.ndarray) and value.dtype.kind not in "biufU":
        raise refuse(where, value, "an array of numbers")
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        anything(item, f"{where}.{str(key)[:_SHOWN]}")
    return value


def same_shape(where: str, shape: Sequence[int], **arrays: np.ndarray) -> None:
    """Refuse arrays whose first axes are not those they must have."""
    for name, found in arrays.items():
        if found.shape[: len(shape)] != tuple(shape):
            raise refuse(f"{where}.{name}", found, f"shape {tuple(shape)}")
