"""Formulas written as text, such as ``"-kappa * x[0] + sin(t)"``: parsed by a whitelist, never run as code.

The text goes through Python's parser only to become a syntax tree; every node must be one of those named here, and
becomes a small function of arrays. There are no attributes, no strings, no calls of anything but the functions below.
"""

import ast
import functools
import math
import operator
import warnings
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np

from kolmo.arrays import Array, as_like, is_tensor, namespace
from kolmo.errors import InputError, did_you_mean

__all__ = ["CONSTANTS", "FUNCTIONS", "Expression"]

CONSTANTS = {"pi": math.pi, "e": math.e, "inf": math.inf}
"""Constants that a formula may use."""

_ARITIES: dict[str, tuple[int, int]] = {
    **dict.fromkeys(["sin", "cos", "tan", "arcsin", "arccos", "arctan", "sinh", "cosh", "tanh"], (1, 1)),
    **dict.fromkeys(["exp", "log", "log1p", "expm1", "sqrt", "abs", "sign", "floor", "ceil", "erf"], (1, 1)),
    **dict.fromkeys(["minimum", "maximum"], (2, 6)),
    "where": (3, 3),
}
FUNCTIONS = tuple(_ARITIES)
"""Functions that a formula may call; ``where(condition, a, b)`` takes a where the condition holds."""

# Longer or deeper formulas are refused: they would take long to parse, or more stack than there is.
MAX_LENGTH = 4000
MAX_DEPTH = 100

_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
    ast.Mod: operator.mod,
}
_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}

Values = Mapping[str, Any]
Node = Callable[[Values], Array]


class Expression:
    """A formula of named scalars and of vectors with a known number of coordinates.

    Numbers, ``+ - * / % **``, comparisons (1 where they hold, 0 where not), ``and``, ``or``, ``not``,
    ``a if condition else b``, the functions in ``FUNCTIONS`` and the constants in ``CONSTANTS``.

    Parameters
    ----------
    text : str
        The formula; at most 4000 characters, nested at most 100 deep.
    scalars : collection of str, optional
        Names that stand for numbers, such as ``t`` and parameters.
    vectors : mapping of str to int, optional
        Names that are indexed, with their number of coordinates: ``{"x": 2}`` allows ``x[0]`` and ``x[1]``.
    argument : str, default "formula"
        What errors call it.

    Attributes
    ----------
    text : str
        The formula.
    names : frozenset of str
        The scalars and vectors that occur in it.

    Raises
    ------
    InputError
        For anything else; the message says what was not understood and what is allowed.

    Examples
    --------
    >>> f = Expression("-kappa * x[0] + sin(t)", scalars=["t", "kappa"], vectors={"x": 1})
    >>> f({"t": 0.0, "kappa": 2.0, "x": np.array([[1.0], [3.0]])})
    array([-2., -6.])
    >>> Expression("__import__('os')", vectors={"x": 1})
    Traceback (most recent call last):
    ...
    kolmo.errors.InputError: formula: got '__import__(...)' in "__import__('os')"; needed one of the functions sin, ...
    """

    def __init__(
        self,
        text: str,
        *,
        scalars: Collection[str] = (),
        vectors: Mapping[str, int] | None = None,
        argument: str = "formula",
    ) -> None:
        self.text = text
        reader = _Reader(text, frozenset(scalars), dict(vectors or {}), argument)
        self._node = reader.node(_parsed(text, argument), 0)
        self.names = frozenset(reader.used)

    def __call__(self, values: Values) -> Array:
        """Evaluate it: numbers or tensors for scalars, arrays or tensors of shape ``(..., n)`` for vectors.

        Returns
        -------
        float or array of shape (...)
            A plain number where only numbers went in.
        """
        with np.errstate(all="ignore"):  # what is not finite is reported where it matters, with its place
            return self._node(values)

    def __repr__(self) -> str:
        return f"Expression({self.text!r})"


def _parsed(text: str, argument: str) -> ast.expr:
    if not text.strip():
        raise InputError(argument, "an empty formula", "a number or a formula such as 'x[0]**2'")
    if len(text) > MAX_LENGTH:
        raise InputError(argument, f"a formula of {len(text)} characters", f"at most {MAX_LENGTH}")
    try:
        with warnings.catch_warnings(action="ignore"):  # such as those about 1if x[0] else 2
            return ast.parse(" ".join(text.split()), mode="eval").body
    except SyntaxError as error:
        place = f" at '{_shortened(text[error.offset - 1 :])}'" if error.offset and error.offset <= len(text) else ""
        fix = "powers are written x[0]**2" if "^" in text else ""
        raise InputError(argument, f'"{_shortened(text)}" ({error.msg}{place})', "a formula", fix) from None
    except (ValueError, RecursionError, MemoryError) as error:
        raise InputError(argument, f'"{_shortened(text)}" ({error})', "a formula") from None


def _shortened(text: str, length: int = 60) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."


class _Reader:
    """Turns a syntax tree into functions, refusing every node that is not on the list."""

    def __init__(self, text: str, scalars: frozenset[str], vectors: dict[str, int], argument: str) -> None:
        self.text, self.scalars, self.vectors, self.argument = text, scalars, vectors, argument
        self.used: set[str] = set()

    def node(self, tree: ast.expr, depth: int) -> Node:
        """Return the function of one node."""
        if depth > MAX_DEPTH:
            raise self.refused("parts nested too deeply", f"at most {MAX_DEPTH} levels")
        inner = functools.partial(self.node, depth=depth + 1)
        match tree:
            case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
                return self.number(value)
            case ast.Name(id=name):
                return self.name(name)
            case ast.Subscript(value=ast.Name(id=name), slice=index):
                return self.coordinate(name, index)
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return _applied(operator.neg, inner(operand))
            case ast.UnaryOp(op=ast.UAdd(), operand=operand):
                return inner(operand)
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return _applied(lambda a: 1.0 - _holds(a), inner(operand))
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
                return _applied(_BINARY[type(op)], inner(left), inner(right))
            case ast.BoolOp(op=op, values=values):
                combine = operator.mul if isinstance(op, ast.And) else _either
                return _applied(lambda *parts: functools.reduce(combine, map(_holds, parts)), *map(inner, values))
            case ast.Compare(left=left, ops=ops, comparators=others) if all(type(op) in _COMPARISONS for op in ops):
                return self.chain([_COMPARISONS[type(op)] for op in ops], [inner(left), *map(inner, others)])
            case ast.IfExp(test=test, body=body, orelse=orelse):
                return _applied(_where, inner(test), inner(body), inner(orelse))
            case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]):
                return self.call(name, arguments, inner)
        if isinstance(tree, ast.BinOp) and isinstance(tree.op, ast.BitXor):
            raise self.refused("'^'", "'**' for powers")
        raise self.refused(f"'{self.shown(tree)}'", "numbers, names, + - * / % **, comparisons and function calls")

    def number(self, value: float) -> Node:
        """A number; whole ones become floats, so that no power of them takes forever."""
        try:
            constant = float(value)
        except OverflowError:
            raise self.refused("a whole number beyond 1e308", "a smaller one") from None
        return lambda _: constant

    def name(self, name: str) -> Node:
        """A scalar or a constant."""
        if name in self.scalars:
            self.used.add(name)
            return operator.itemgetter(name)
        if name in CONSTANTS:
            constant = CONSTANTS[name]
            return lambda _: constant
        if name in self.vectors:
            raise self.refused(f"'{name}' without an index", self.coordinates())
        raise self.refused(f"the unknown name '{name}'", f"one of {self.known()}", self.near(name))

    def coordinate(self, name: str, index: ast.expr) -> Node:
        """One coordinate of a vector."""
        if name not in self.vectors:
            fix = f"{name} is a number" if name in self.scalars else self.near(name)
            raise self.refused(f"'{name}[...]'", f"an index on {' or '.join(self.vectors) or 'nothing here'}", fix)
        match index:
            case ast.Constant(value=int() as place) if type(place) is int and 0 <= place < self.vectors[name]:
                self.used.add(name)
                return lambda values: values[name][..., place]
        raise self.refused(f"'{name}[{self.shown(index)}]'", self.coordinates())

    def chain(self, comparisons: list[Callable[[Any, Any], Any]], parts: list[Node]) -> Node:
        """Comparisons, also chained ones such as 0 < x[0] < 1."""

        def compare(*values: Any) -> Any:
            held = [_truth(f, a, b) for f, a, b in zip(comparisons, values, values[1:], strict=False)]
            return functools.reduce(operator.mul, held)

        return _applied(compare, *parts)

    def call(self, name: str, arguments: list[ast.expr], inner: Callable[[ast.expr], Node]) -> Node:
        """A function on the list, with the right number of arguments."""
        if name not in _ARITIES:
            raise self.refused(f"'{name}(...)'", f"one of the functions {', '.join(FUNCTIONS)}", self.near(name))
        least, most = _ARITIES[name]
        if not least <= len(arguments) <= most:
            count = f"{least}" if least == most else f"{least} to {most}"
            raise self.refused(f"'{name}' with {len(arguments)} arguments", f"{count}")
        parts = [inner(argument) for argument in arguments]
        if name == "where":
            return _applied(_where, *parts)
        if name in ("minimum", "maximum"):
            return _applied(lambda *values: functools.reduce(functools.partial(_extreme, name), values), *parts)
        return _applied(functools.partial(_function, name), *parts)

    def refused(self, given: str, needed: str, fix: str = "") -> InputError:
        """What is wrong, with the formula it is in."""
        return InputError(self.argument, f'{given} in "{_shortened(self.text)}"', needed, fix)

    def known(self) -> str:
        """Names that may be used."""
        return ", ".join([*sorted(self.scalars), *(f"{name}[0]" for name in self.vectors), *CONSTANTS])

    def coordinates(self) -> str:
        """Coordinates that there are."""
        return ", ".join(f"{name}[{i}]" for name, n in self.vectors.items() for i in range(n))

    def near(self, name: str) -> str:
        """Suggest a name like the one that was not found."""
        known = [*self.scalars, *self.vectors, *CONSTANTS, *FUNCTIONS]
        return did_you_mean(name, known)

    def shown(self, tree: ast.expr) -> str:
        """A part of the formula as text."""
        return _shortened(ast.get_source_segment(" ".join(self.text.split()), tree) or type(tree).__name__)


def _applied(function: Callable[..., Any], *parts: Node) -> Node:
    """The node that applies a function to what its parts give; numbers go through NumPy, which raises nothing."""

    def node(values: Values) -> Array:
        given = [part(values) for part in parts]
        if any(hasattr(value, "shape") for value in given):
            return function(*given)
        return float(function(*map(np.float64, given)))

    return node


def _aligned(*values: Any) -> list[Any]:
    """The values as arrays of one library: that of the first tensor, else NumPy."""
    like = next((value for value in values if is_tensor(value)), np.zeros(()))
    return [value if is_tensor(value) else as_like(value, like) for value in values]


def _function(name: str, a: Any) -> Any:
    library = namespace(a)
    if name != "erf":
        return getattr(library, name)(a)
    if library is np:
        from scipy import special

        return special.erf(a)
    return library.special.erf(a)


def _extreme(name: str, a: Any, b: Any) -> Any:
    return getattr(namespace(a, b), name)(*_aligned(a, b))


def _where(condition: Any, a: Any, b: Any) -> Any:
    held, *values = _aligned(condition, a, b)
    return namespace(held).where(held != 0, *values)


def _truth(comparison: Callable[[Any, Any], Any], a: Any, b: Any) -> Any:
    """1 where a comparison holds, else 0."""
    left, right = _aligned(a, b)
    held = comparison(left, right)
    return held.double() if is_tensor(held) else np.asarray(held, dtype=float)


def _holds(a: Any) -> Any:
    return _truth(operator.ne, a, 0.0)


def _either(a: Any, b: Any) -> Any:
    return a + b - a * b
