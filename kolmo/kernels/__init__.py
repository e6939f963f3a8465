"""The only compiled code: operators along lines, banded solves, splines, noisy chains. Knows no equation.

A kernel that a march needs exists twice under the same names and arguments: in numba, for NumPy arrays, in a module
``kolmo.kernels.<name>``, and in torch, for tensors, on the device they are on, in ``kolmo.kernels.<name>_torch``.
:func:`of` is the one rule by which the two are told apart. (Where torch takes a line or two, as along the lines of
``kolmo.kernels.lines``, both live in one function, which asks the same question of its array.)
"""

from importlib import import_module
from typing import Any

from kolmo.arrays import Array, is_tensor


def of(name: str, like: Array) -> Any:
    """The module of kernels for arrays like this one: numba for NumPy, torch for a tensor.

    Examples
    --------
    >>> import numpy as np
    >>> of("splitting", np.zeros(3)).__name__
    'kolmo.kernels.splitting'
    """
    return import_module(f"kolmo.kernels.{name}{'_torch' if is_tensor(like) else ''}")
