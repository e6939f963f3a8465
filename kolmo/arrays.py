"""NumPy or torch: the few things that differ, so that assembly is written once for both."""

import sys
from types import ModuleType
from typing import Any

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


def as_numpy(value: object) -> Any:
    """Return value as a NumPy array; tensors are detached and copied to the CPU."""
    return value.detach().cpu().numpy() if is_tensor(value) else np.asarray(value)  # type: ignore[attr-defined]


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
    x = x.double() if is_tensor(x) else np.asarray(x, dtype=float)  # type: ignore[attr-defined]
    shape = tuple(x.shape)
    if dim == 1 and (len(shape) == 0 or shape[-1] != 1):
        x = x[..., None]
    elif len(shape) == 0 or shape[-1] != dim:
        raise InputError(
            argument, f"points of shape {shape}", f"shape (..., {dim}): the last axis is the coordinate in R^{dim}"
        )
    if np.isnan(as_numpy(x)).any():
        raise InputError(argument, "points with NaN", "finite coordinates")
    return x


def einsum(subscripts: str, *operands: Array) -> Array:
    """Einstein summation in the operands' library."""
    return namespace(*operands).einsum(subscripts, *operands)
