"""Whether a function depends on time: read from its code, else from what it does with one, else seen at many instants.

A function that hands its time on, to a network or to another function, may or may not use it. It is called once with
an object in its place that can be handed on, but notices whatever else is done with it: arithmetic, comparisons,
conversions, attributes. Only ``is``, ``id`` and ``type`` go unnoticed.
"""

import dis
from collections.abc import Callable
from functools import lru_cache
from types import CodeType
from typing import Any

import numpy as np

# Instants at which values are compared, as irregular fractions of an interval: no period is met twice.
COMPARED = 128
# Names by which a function can get at its arguments without naming them.
HIDDEN = {"locals", "vars", "eval", "exec"}


# What can be done with an object, and is looked for in its type.
_OPERATIONS = """
    add sub mul matmul truediv floordiv mod divmod pow lshift rshift and xor or radd rsub rmul rmatmul rtruediv
    rfloordiv rmod rdivmod rpow rlshift rrshift rand rxor ror neg pos abs invert round trunc floor ceil lt le eq ne gt
    ge hash bool int float complex index str repr format bytes len iter next contains getitem setitem delitem call
    getattribute setattr delattr enter exit reduce_ex copy deepcopy array array_ufunc array_function torch_function
"""


def depends_on_time(value: Any, f: Callable[[Any, Any], Any], x: Any) -> bool:
    """Whether a function may depend on time.

    Parameters
    ----------
    value : object
        As it was given: a function of (t, x), or a constant.
    f : callable
        It as a function that checks what it returns.
    x : array
        Points to call it at.

    Examples
    --------
    >>> def decay(t, x, rate=1.0):
    ...     return -rate * x
    >>> given = lambda t, x: decay(t, x)
    >>> reads_time(given), depends_on_time(given, given, np.zeros((3, 1)))
    (True, False)
    >>> given = lambda t, x: decay(t, x, rate=1.0 + t)
    >>> depends_on_time(given, given, np.zeros((3, 1)))
    True
    """
    return reads_time(value) and not _hands_on(f, x)


def _hands_on(f: Callable[[Any, Any], Any], x: Any) -> bool:
    """Whether a function does nothing with its time but to hand it on."""
    used: list[str] = []

    def notice(name: str) -> Callable[..., Any]:
        def method(*_: Any) -> Any:
            used.append(name)
            raise TypeError(f"{name} of a time that is only looked after")

        return method

    watched = type("Time", (), {f"__{name}__": notice(name) for name in _OPERATIONS.split()})()
    try:
        f(watched, x)
    except Exception:
        return False
    return not used


def reads_time(f: Any) -> bool:
    """Whether the code of a function ``f(t, x)`` reads its first argument; True where there is no code to look at.

    Examples
    --------
    >>> reads_time(lambda t, x: -x), reads_time(lambda t, x: t * x), reads_time(1.0)
    (False, True, False)
    """
    if not callable(f):
        return False
    code = getattr(f, "__code__", None)
    if not isinstance(code, CodeType):
        return True  # a module, a partial function: nothing tells
    return _reads(code, 1 if getattr(f, "__self__", None) is not None else 0)


@lru_cache(maxsize=256)
def _reads(code: CodeType, place: int) -> bool:
    """Whether code reads its argument at a place."""
    if code.co_argcount <= place:
        return True
    name = code.co_varnames[place]
    if name in code.co_cellvars or HIDDEN & set(code.co_names):
        return True
    return any(
        instruction.argval == name or (isinstance(instruction.argval, tuple) and name in instruction.argval)
        for instruction in dis.get_instructions(code)
        if instruction.opname not in ("STORE_FAST", "DELETE_FAST")
    )


def fractions(count: int, seed: int = 0) -> np.ndarray:
    """Irregular increasing fractions of [0, 1), one in each of ``count`` equal parts, the first at 0."""
    parts = (np.arange(count) + np.random.default_rng(seed).uniform(0.02, 0.98, count)) / count
    parts[0] = 0.0
    return parts


def constant(f: Callable[[float, Any], Any], a: float, b: float, x: Any, count: int = COMPARED) -> bool:
    """Whether f(t, x) is the same at many instants of [a, b); values are copied, since buffers may be used again."""
    seen: np.ndarray | None = None
    for fraction in fractions(count):
        now = np.array(f(a + fraction * (b - a), x), dtype=float)
        if seen is not None and not np.array_equal(seen, now, equal_nan=True):
            return False
        seen = now
    return True
