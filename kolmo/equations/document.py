"""A TOML file of tables whose errors name line and key."""

import functools
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from kolmo.equations.expressions import CONSTANTS, FUNCTIONS
from kolmo.equations.models import MODELS
from kolmo.errors import InputError, did_you_mean
from kolmo.files import FileError, read_bytes

MAX_BYTES = 32_768
MAX_POINTS = 2000
MAX_DOTS = 1000
"""The time to read a dotted key grows with the square of their number."""
KEYS = {
    "equation": (
        *("model", "dim", "drift", "diffusion", "covariance", "terminal", "horizon", "breakpoints"),
        *("killing", "source", "running_cost", "obstacle", "sense"),
    ),
    "box": ("lower", "upper", "boundary"),
    "events": ("times", "pay", "move"),
    "solve": ("at", "rtol", "atol"),
    "controls": ("lower", "upper", "values", "unbounded"),
    "fit": ("parameters", "targets", "weights", "bounds", "maxiter", "starts", "tol", "profile"),
    "data": (
        *("times", "choices", "censored", "covariates", "states", "path"),
        *("noise", "observe", "mean", "variance"),
    ),
    "decision": ("lower", "upper", "start", "delay", "lapse", "span"),
}


class Document:
    """The tables of a file, and where each key is."""

    def __init__(self, path: Path) -> None:
        self.path, self.text = path, _text(path)
        if any(part.count(".") > MAX_DOTS for part in re.split(r"[^\w\s.'\"-]", self.text)):
            raise InputError(str(path), "a key with very many dots", f"at most {MAX_DOTS}")
        try:
            self.tables: dict[str, Any] = tomllib.loads(self.text)
        except (tomllib.TOMLDecodeError, RecursionError, ValueError, OverflowError) as error:
            raise InputError(str(path), f"no TOML: {error}", "a TOML file with tables [equation] and [solve]") from None
        known = ["parameters", *KEYS]
        for name, table in self.tables.items():
            if name not in known:
                self.refuse(name, "", "an unknown table", f"one of {', '.join(known)}", did_you_mean(name, known))
            if not isinstance(table, dict):
                self.refuse(name, "", repr(table), f"a table: a line [{name}] and keys below it")
            for key in table if name in KEYS else ():
                if key not in KEYS[name]:
                    self.refuse(
                        name, key, "an unknown key", f"one of {', '.join(KEYS[name])}", did_you_mean(key, KEYS[name])
                    )
        self.table("equation")
        if "equation" not in self.tables:
            self.refuse("equation", "", "nothing", "a table [equation]")
        if "model" in self.tables["equation"]:
            self._stand_in()

    def _stand_in(self) -> None:
        """Put in what the model that is named stands for, where the file does not say something else."""
        name = self.tables["equation"]["model"]
        if not isinstance(name, str) or name not in MODELS:
            fix = did_you_mean(name, list(MODELS)) if isinstance(name, str) else ""
            self.refuse("equation", "model", repr(name), f"one of {', '.join(MODELS)}", fix)
        for table, content in MODELS[name].items():
            self.tables[table] = content | self.tables.get(table, {})

    def has(self, table: str) -> bool:
        """Whether a table is there."""
        return table in self.tables

    def table(self, name: str) -> dict[str, Any]:
        """A table, empty when it is not there."""
        found: dict[str, Any] = self.tables.get(name, {})
        return found

    def parameters(self) -> dict[str, float]:
        """Names to numbers."""
        for name, value in self.table("parameters").items():
            if not (name.isidentifier() and name.isascii()) or name in {"t", "x", "a", *CONSTANTS, *FUNCTIONS}:
                self.refuse("parameters", name, repr(name), "a name of letters, digits and _ that is not taken")
            if not (is_number(value) and np.isfinite(floating(value))):
                self.refuse("parameters", name, repr(value), "a finite number")
        return {name: float(value) for name, value in self.table("parameters").items()}

    def number(self, table: str, key: str, default: Any) -> Any:
        """A finite number."""
        value = self.table(table).get(key, default)
        if value is default:
            return default
        if not (is_number(value) and np.isfinite(floating(value))):
            self.refuse(table, key, repr(value), "a finite number")
        return float(value)

    def numbers(
        self, table: str, key: str, shape: tuple[int | None, ...], most: int = MAX_POINTS, *, infinite: bool = False
    ) -> np.ndarray:
        """Numbers of a shape, where None is any length; a single number stands for a list of one."""
        value = self.table(table).get(key)
        needed = "numbers of shape (" + ", ".join("n" if n is None else str(n) for n in shape) + ")"
        if is_number(value):
            value = [value]
        try:
            array = np.array(value, dtype=object)
            flat = [value for value in array.ravel() if is_number(value)]
            result = np.array([floating(v) for v in flat]).reshape(array.shape)
        except ValueError:
            self.refuse(table, key, repr(value)[:80], needed)
        fits = len(shape) == result.ndim and all(shape[i] in (None, result.shape[i]) for i in range(len(shape)))
        if not fits or result.size == 0 or len(result) > most or not (infinite or np.isfinite(result).all()):
            self.refuse(table, key, repr(value)[:80], needed + ("" if len(shape) == 0 else f", at most {most}"))
        return result

    # ------------------------------------------------------------------------------------------------ its errors

    def refuse(self, table: str, key: str, given: str, needed: str, fix: str = "") -> NoReturn:
        """Raise an InputError that names line and key."""
        raise InputError(self.where(table, key), given, needed, fix)

    def where(self, table: str, key: str = "") -> str:
        """File, line and key as text."""
        line = self.line(table, key) or self.line(table, "")
        return f"{self.path}{f', line {line}' if line else ''}, {f'{table}.{key}' if key else f'[{table}]'}"

    def line(self, table: str, key: str) -> int | None:
        """Line on which a table, or a key of one, begins."""
        return self._lines.get((table, key))

    @functools.cached_property
    def _lines(self) -> dict[tuple[str, str], int]:
        """First lines of tables and keys; the text is gone through once."""
        found: dict[tuple[str, str], int] = {}
        inside: tuple[str, ...] = ()
        for number, name, value in _statements(self.text):
            path = _names(name)
            if value is None:
                inside = path
            path = path if value is None else inside + path
            nested = _as_table(tomllib.loads(f"x = {value}")["x"]) if value is not None and len(path) == 1 else ()
            for key in ("", *path[1:2], *nested):
                found.setdefault((path[0], key), number)
        return found

    def placed(self, error: InputError) -> InputError:
        """The same error with line and key, if its argument is a key of this file."""
        word = error.argument.replace("[", ",").partition(",")[0]
        if word == "covariance" and "diffusion" in self.table("equation"):
            word = "diffusion"  # Σ = σσᵀ is what is checked
        for table, keys in KEYS.items():
            if word in keys and word in self.table(table):
                return InputError(self.where(table, word), error.given, error.needed, error.fix)
        if error.argument.startswith(str(self.path)):
            return error
        return InputError(f"{self.path}, {error.argument}", error.given, error.needed, error.fix)

    def about(self, table: str, key: str) -> "_About":
        """Place errors raised inside at this key."""
        return _About(self, table, key)

    def __enter__(self) -> None:
        """Place errors raised inside."""

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, InputError):
            raise self.placed(error) from None


@dataclass(frozen=True)
class _About:
    document: Document
    table: str
    key: str

    def __enter__(self) -> None:
        """Place errors raised inside at this key."""

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, InputError):
            self.document.refuse(self.table, self.key, str(error.given), error.needed, error.fix)


_PART = re.compile(
    r'"""(?:\\.|(?!""").)*"{3,5}|\'\'\'.*?\'{3,5}|"(?:\\.|[^"\\\n])*"|\'[^\'\n]*\'|#[^\n]*|\n|[\[\]{}=]|[^"\'#\n\[\]{}=]+',
    re.DOTALL,
)


def _statements(text: str) -> Iterator[tuple[int, str, str | None]]:
    """First line, name and value of each statement of a valid TOML text; a table has no value."""
    depth, line, name, value, begun = 0, 1, "", None, 1
    for part in _PART.findall(text + "\n"):
        if part == "\n" and depth == 0:
            if name.strip():
                yield begun, name.strip(), value
            name, value = "", None
        elif not part.startswith("#"):
            if not name.strip():
                begun = line
            depth += (part in ("[", "{")) - (part in ("]", "}"))
            if value is not None:
                value += part
            elif part == "=":
                value = ""
            else:
                name += part
        line += part.count("\n")


def _names(name: str) -> tuple[str, ...]:
    """The names in a dotted key, or in the line that opens a table."""
    inner: Any = tomllib.loads(f"{name.strip('[] ')} = 0")
    names = []
    while isinstance(inner, dict):
        ((key, inner),) = inner.items()
        names.append(key)
    return tuple(names)


def _as_table(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(path: Path) -> str:
    try:
        return read_bytes(path, MAX_BYTES).decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError:
        raise InputError(str(path), "bytes that are not UTF-8", "a TOML file") from None
    except FileError as error:
        needed = f"a file of at most {MAX_BYTES} bytes that can be read"
        raise InputError(str(path), str(error).rstrip("."), needed) from None


def is_number(value: Any) -> bool:
    """Whether a value is a number, and not NaN."""
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value


def floating(value: float) -> float:
    """A number as float; a whole one that is too large is infinite."""
    try:
        return float(value)
    except OverflowError:
        return float("inf")
