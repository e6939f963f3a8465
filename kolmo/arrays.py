"""NumPy or torch: the few things that differ, so that assembly is written once for both."""

import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import ModuleType
from typing import Any, ParamSpec, TypeVar

import numpy as np

from kolmo.errors import InputError

Array = Any
"""A NumPy array or a torch tensor; shapes are given in the docstrings."""


def is_tensor(x: object) -> bool:
    """Whether x is a torch tensor (without importing torch)."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor)


def is_module(f: object) -> bool:
    """Whether f is a ``torch.nn.Module`` (without importing torch)."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(f, torch.nn.Module)


def namespace(*arrays: object) -> ModuleType:
    """Return torch if any of the arrays is a tensor, else NumPy."""
    return sys.modules["torch"] if any(is_tensor(a) for a in arrays) else np


def as_like(value: object, like: Array) -> Array:
    """Return value as a float64 array of the library (and device) of ``like``; keeps torch gradients."""
    if is_tensor(like):
        import torch

        return torch.as_tensor(value, dtype=torch.float64, device=like.device)
    return np.asarray(as_numpy(value), dtype=float)


def empty(shape: tuple[int, ...], like: Array) -> Array:
    """An array of a shape, not filled, in the library (and on the device) of ``like``."""
    return like.new_empty(shape) if is_tensor(like) else np.empty(shape)


def zeros(shape: tuple[int, ...], like: Array) -> Array:
    """Zeros of a shape in the library (and on the device) of ``like``."""
    return like.new_zeros(shape) if is_tensor(like) else np.zeros(shape)


def fresh(value: Array) -> Array:
    """A copy that may be changed in place."""
    return value.clone() if is_tensor(value) else value.copy()


def contiguous(value: Array) -> Array:
    """The same array, without gaps in memory."""
    return value.contiguous() if is_tensor(value) else np.ascontiguousarray(value)


def along(apply: Callable[[Array], Array], block: Array, axis: int) -> Array:
    """A map of columns, (n, m) to (n', m), applied along an axis of a block."""
    xp = namespace(block)
    moved = xp.moveaxis(block, axis, 0)
    result = apply(contiguous(moved).reshape(len(moved), -1))
    return xp.moveaxis(result.reshape(-1, *moved.shape[1:]), 0, axis)


def added_at(total: Array, index: np.ndarray, values: Array) -> Array:
    """The total with values summed into rows of it; in NumPy in place."""
    if is_tensor(total):
        import torch

        return total.index_add(0, torch.as_tensor(index, device=total.device), values)
    np.add.at(total, index, values)
    return total


def detached(value: Array) -> Array:
    """The same numbers without gradients, where they are."""
    return value.detach() if is_tensor(value) else value


def called(f: Callable[..., Any], *arguments: Any) -> tuple[Any, bool]:
    """What a function returns, and whether it is new: nobody else can hold it, and change it later.

    A function may fill one array again and again, or return what it was handed; the references that there are tell.

    Examples
    --------
    >>> buffer = np.zeros(3)
    >>> called(lambda: buffer)[1], called(lambda: buffer[1:])[1], called(lambda: buffer + 1.0)[1]
    (False, False, True)
    """
    value, references = _counted(f, *arguments)
    return value, references in _NEW


def _counted(f: Callable[..., Any], *arguments: Any) -> tuple[Any, tuple[Any, ...]]:
    value = f(*arguments)
    references = _references(value, sys.getrefcount(value))
    return value, references


def _references(value: Any, holders: int) -> tuple[Any, ...]:
    """How often an array is referred to, and what it is a view of; numbers and lists are converted anyway."""
    if isinstance(value, np.ndarray):
        base = value.base
        return "numpy", holders, base is not None, _count(base)
    if is_tensor(value):
        return "torch", holders, value._is_view(), _count(value._base), _storage_count(value)
    return ()


def _count(base: Any) -> int:
    """References to the owner of a view; what is no array may be held by anybody."""
    return 0 if base is None else sys.getrefcount(base) if isinstance(base, np.ndarray) or is_tensor(base) else -1


def _storage_count(value: Any) -> int:
    """Tensors that share the memory of one; -1 where torch does not tell."""
    torch = sys.modules["torch"]
    count = getattr(torch._C, "_storage_Use_Count", None)
    if count is None or value.requires_grad:  # what is kept for a gradient may share it, and is not changed
        return 0 if value.requires_grad else -1
    try:
        return int(count(value.untyped_storage()._cdata))
    except (RuntimeError, NotImplementedError):  # of a transform such as torch.func.grad
        return -1


class _New:
    """References to arrays that are new, measured in the same way: they differ between versions of Python."""

    def __init__(self) -> None:
        self._numpy = {(), *map(self._of, (lambda: np.empty(4), lambda: np.empty(4).reshape(2, 2)))}
        self._torch: set[Any] = set()

    @staticmethod
    def _of(make: Callable[[], Any]) -> tuple[Any, ...]:
        return _counted(make)[1]

    def __contains__(self, references: object) -> bool:
        if references in self._numpy:
            return True
        if not isinstance(references, tuple) or references[:1] != ("torch",):
            return False
        if not self._torch:
            import torch

            def empty() -> Any:
                return torch.empty(4, device="cpu")

            def recorded() -> Any:
                return torch.empty(4, device="cpu", requires_grad=True) * 1.0

            with torch.enable_grad():
                makes = (empty, lambda: empty().reshape(2, 2), recorded, lambda: recorded().reshape(2, 2))
                self._torch = set(map(self._of, makes))
        return references in self._torch


_NEW = _New()


class Held:
    """A constant array that is at hand in torch too: sent to a device once, not at every step of a march.

    Parameters
    ----------
    array : ndarray
        The constant; not to be changed.
    """

    def __init__(self, array: np.ndarray) -> None:
        self.array = array
        self._copies: dict[Any, Array] = {}

    def like(self, like: Array) -> Array:
        """The constant in the library (and on the device) of ``like``."""
        if not is_tensor(like):
            return self.array
        if like.device not in self._copies:
            import torch

            self._copies[like.device] = torch.as_tensor(self.array, device=like.device)
        return self._copies[like.device]


class Spread:
    """One vector per axis of a grid, each spread over all nodes, shape (size, d); on a device they are spread there.

    Parameters
    ----------
    vectors : sequence of ndarray
        Numbers along each axis; not to be changed.
    """

    def __init__(self, vectors: Sequence[np.ndarray]) -> None:
        self.vectors = tuple(vectors)
        self._copies: dict[Any, Array] = {}

    def like(self, like: Array) -> Array:
        """The numbers at all nodes in the library (and on the device) of ``like``."""
        key = like.device if is_tensor(like) else None
        if key not in self._copies:
            d = len(self.vectors)
            result = empty((*map(len, self.vectors), d), as_like(0.0, like))
            for i, vector in enumerate(self.vectors):
                result[..., i] = as_like(vector.reshape([-1 if j == i else 1 for j in range(d)]), like)
            self._copies[key] = result.reshape(-1, d)
        return self._copies[key]


def as_numpy(value: object) -> Any:
    """Return value as a NumPy array; tensors are detached and copied to the CPU.

    Raises
    ------
    InputError
        For a tensor without numbers of its own, as inside ``torch.func.grad`` or ``vmap``.
    """
    if not is_tensor(value):
        return np.asarray(value)
    if transformed(value):
        raise InputError("tensor", "one inside a transform of torch.func", *UNTRANSFORMED)
    return value.detach().cpu().numpy()  # type: ignore[attr-defined]


UNTRANSFORMED = (
    "plain tensors: a march looks at their numbers",
    "loss.backward() or torch.autograd.grad, through kolmo.control.value",
)
"""What is needed in place of a transform of torch.func, and what does the same."""


def transformed(value: object) -> bool:
    """Whether a value is a tensor inside ``torch.func.grad``, ``vmap`` or the like."""
    if not is_tensor(value):
        return False
    functorch = getattr(sys.modules["torch"]._C, "_functorch", None)
    wrapped = getattr(functorch, "is_functorch_wrapped_tensor", None)
    return wrapped is not None and bool(wrapped(value))


P = ParamSpec("P")
R = TypeVar("R")


def at_home(function: Callable[P, R]) -> Callable[P, R]:
    """Let a function make its tensors where those are that it was given, whatever torch's default device is.

    Examples
    --------
    >>> import torch
    >>> made = at_home(lambda x: torch.zeros(2))
    >>> with torch.device("meta"):
    ...     made(np.zeros(2)).device
    device(type='cpu')
    """

    @functools.wraps(function)
    def run(*args: P.args, **named: P.kwargs) -> R:
        torch = sys.modules.get("torch")
        if torch is None:
            return function(*args, **named)
        device = next(_devices([*args, *named.values()]), torch.device("cpu"))
        try:
            same = default_device() == device
        except RuntimeError:  # inside a transform of torch.func, which is refused further in
            same = True
        if same:
            return function(*args, **named)
        with torch.device(device):
            return function(*args, **named)

    return run


def default_device() -> Any:
    """Torch's default device."""
    import torch

    try:
        return torch.get_default_device()
    except AttributeError:  # torch 2.6 has no answer after torch.set_default_device(None)
        return torch.device("cpu")


def _devices(values: Iterable[Any]) -> Iterator[Any]:
    """Devices of the tensors among values, in lists and in modules."""
    for value in values:
        if is_tensor(value):
            yield value.device
        elif is_module(value):
            yield from (parameter.device for parameter in value.parameters())
        elif isinstance(value, list | tuple):
            yield from _devices(value)


def as_points(x: object, dim: int, argument: str = "x") -> Array:
    """Return points as an array of shape ``(..., dim)``; in one dimension the last axis may be missing.

    Raises
    ------
    InputError
        If the last axis is not the coordinate, or a coordinate is NaN.

    Examples
    --------
    >>> as_points([0.0, 1.0, 2.0], 1).shape
    (3, 1)
    >>> as_points([[0.0, 1.0]], 2).shape
    (1, 2)
    """
    if transformed(x):
        raise InputError(argument, "a tensor inside a transform of torch.func", *UNTRANSFORMED)
    x = x.double() if is_tensor(x) else np.asarray(x, dtype=float)  # type: ignore[attr-defined]
    shape = tuple(x.shape)
    if dim == 1 and (len(shape) == 0 or shape[-1] != 1):
        x = x[..., None]
    elif len(shape) == 0 or shape[-1] != dim:
        raise InputError(
            argument, f"points of shape {shape}", f"shape (..., {dim}): the last axis is the coordinate in R^{dim}"
        )
    if bool(namespace(x).isnan(x).any()):
        raise InputError(argument, "points with NaN", "finite coordinates")
    return x


def einsum(subscripts: str, *operands: Array) -> Array:
    """Einstein summation in the operands' library."""
    return namespace(*operands).einsum(subscripts, *operands)
