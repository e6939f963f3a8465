"""Whether a function depends on time: read from its code where that tells, else seen at many instants."""

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


def reads_time(f: Any) -> bool:
    """Whether a function ``f(t, x)`` may depend on t: False where its code never reads its first argument.

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
