"""What a problem is made of, whatever the values of its parameters: two with the same structure may share a plan."""

import functools
import types
import weakref
from collections.abc import Hashable, Iterable, Mapping
from typing import Any

import numpy as np
import torch

from kolmo.problem import KolmogorovProblem

# Things looked at, and numbers of an array that are compared one by one, at most: what is larger is only itself.
MOST, FEW = 2000, 4096
# Types of which two are the same where they are equal.
PLAIN = (type(None), bool, int, float, complex, str, bytes, types.CodeType, torch.dtype, torch.device)


class TooLargeError(Exception):
    """More than is looked at."""


class Same:
    """An object that equals only itself; it is not kept alive."""

    def __init__(self, thing: Any) -> None:
        self._id = id(thing)
        try:
            self._found: Any = weakref.ref(thing)
        except TypeError:  # lives as long as what is compared with it
            self._found = lambda: thing

    def __hash__(self) -> int:
        return self._id

    def __eq__(self, other: object) -> bool:
        mine = self._found()
        return isinstance(other, Same) and mine is not None and mine is other._found()


def structure(problem: KolmogorovProblem) -> Hashable | None:
    """A key that two problems share where they differ in parameters alone; None where it is too large to tell.

    Functions are the same where their code is, and what they refer to: numbers and arrays of the same value, tensors
    that require gradients of the same shape, modules that are the same object; other objects are gone through.

    Examples
    --------
    >>> import kolmo
    >>> def call(strike, volatility):
    ...     sde = kolmo.SDE(0.0, lambda t, x: volatility * x, dim=1)
    ...     return kolmo.KolmogorovProblem(sde, lambda x: (x[..., 0] - strike).clamp(min=0.0), 1.0)
    >>> a, b = (torch.tensor(v, requires_grad=True) for v in (0.2, 0.3))
    >>> structure(call(1.0, a)) == structure(call(1.0, b)), structure(call(1.0, a)) == structure(call(1.1, a))
    (True, False)
    """
    try:
        return _Walk().of(problem)
    except (TooLargeError, RecursionError):
        return None


class _Walk:
    """One look at all that something refers to."""

    def __init__(self) -> None:
        self._seen: dict[int, int] = {}
        self._kept: list[Any] = []  # so that no address is met twice

    def of(self, thing: Any) -> Hashable:
        """Token of a thing."""
        if isinstance(thing, PLAIN):
            return thing if thing == thing else "nan"
        if isinstance(thing, (np.ndarray, np.generic, torch.Tensor)):
            return _array(thing)
        if id(thing) in self._seen:
            return ("again", self._seen[id(thing)])
        self._seen[id(thing)] = len(self._seen)
        self._kept.append(thing)
        if len(self._seen) > MOST:
            raise TooLargeError
        return self._parts(thing)

    def _parts(self, thing: Any) -> Hashable:
        if isinstance(thing, types.FunctionType):
            return self._function(thing)
        if isinstance(thing, types.MethodType):
            return ("method", self.of(thing.__func__), self.of(thing.__self__))
        if isinstance(thing, functools.partial):
            return ("partial", self.of(thing.func), self.of(thing.args), self.of(thing.keywords))
        if isinstance(thing, Mapping):
            return ("mapping", *((self.of(k), self.of(v)) for k, v in thing.items()))
        if isinstance(thing, (tuple, list, set, frozenset)):
            return (type(thing).__name__, *map(self.of, thing))
        if isinstance(thing, (torch.nn.Module, type, types.ModuleType)) or not hasattr(thing, "__dict__"):
            return Same(thing)
        return (type(thing), *((name, self.of(part)) for name, part in sorted(vars(thing).items())))

    def _function(self, f: types.FunctionType) -> Hashable:
        """Code, and what it refers to: closures, defaults, and data and functions of the module it stands in."""
        inside: Iterable[Any] = (cell.cell_contents for cell in f.__closure__ or () if _filled(cell))
        named = [f.__globals__[name] for name in _names(f.__code__) if name in f.__globals__]
        around = [v for v in named if not isinstance(v, types.FunctionType) or v.__globals__ is f.__globals__]
        parts = (*inside, f.__defaults__, f.__kwdefaults__, *around)
        return ("function", f.__code__, *map(self.of, parts))


def _array(values: Any) -> Hashable:
    """An array by its numbers; a tensor that has or passes on gradients by its shape."""
    if isinstance(values, torch.Tensor):
        kind: tuple[Any, ...] = (values.dtype, tuple(values.shape), values.device)
        if values.requires_grad:
            return ("parameter", *kind)
        try:
            numbers = values.cpu().numpy() if values.numel() <= FEW else None
        except (RuntimeError, TypeError):  # none of its own, as inside a transform, or none that NumPy has
            numbers = None
    else:
        kind, numbers = (values.dtype.str, values.shape), values
    if numbers is None or numbers.size > FEW or numbers.dtype.hasobject:
        return (*kind, Same(values))
    return (*kind, numbers.tobytes())


def _names(code: types.CodeType) -> tuple[str, ...]:
    """Names that a function and those inside it look up."""
    inner = [name for part in code.co_consts if isinstance(part, types.CodeType) for name in _names(part)]
    return (*code.co_names, *inner)


def _filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018 - raises where nothing is in it
    except ValueError:
        return False
    return True
