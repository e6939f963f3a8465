"""The noise draws under which a loss is looked at, and what batch normalisation does meanwhile: one value for all."""

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from kolmo.errors import InputError

BATCHNORM = ("freeze", "recalibrate", "batch")


@dataclass(frozen=True)
class Draws:
    """Which noise a loss is averaged over: draw j is made after ``torch.manual_seed(seed + j)``, whatever the weights.

    Parameters
    ----------
    count : int
        Number of draws.
    seed : int
        Seed of the first.
    noisy : bool, optional
        True: training mode; False: evaluation mode; None: each module's mode as it is.
    batchnorm : {"freeze", "recalibrate", "batch"}
        See `surface`.
    calibrate : callable, optional
        ``calibrate(model)`` passes data through the model, for "recalibrate".

    Raises
    ------
    InputError
        No draws, an unknown policy, or "recalibrate" without data.

    Examples
    --------
    >>> Draws(count=8, noisy=True).settings()
    {'draws': 8, 'seed': 0, 'noisy': True, 'batchnorm': 'freeze'}
    """

    count: int = 1
    seed: int = 0
    noisy: bool | None = None
    batchnorm: str = "freeze"
    calibrate: Callable[[nn.Module], Any] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "count", whole("draws", self.count, 1))
        object.__setattr__(self, "seed", whole("seed", self.seed))
        object.__setattr__(self, "noisy", None if self.noisy is None else bool(self.noisy))
        if self.batchnorm not in BATCHNORM:
            raise InputError("batchnorm", repr(self.batchnorm), "one of " + ", ".join(map(repr, BATCHNORM)))
        if (self.batchnorm == "recalibrate") != (self.calibrate is not None):
            given = "nothing" if self.calibrate is None else f"a callable with batchnorm={self.batchnorm!r}"
            needed = "batchnorm='recalibrate' together with calibrate(model), which passes data through it"
            raise InputError("calibrate", given, needed)

    def settings(self) -> dict[str, Any]:
        """What a result keeps of them."""
        return {"draws": self.count, "seed": self.seed, "noisy": self.noisy, "batchnorm": self.batchnorm}


def whole(argument: str, value: Any, least: int | None = None) -> int:
    """A whole number from whatever kind of integer was given, not below `least`."""
    try:
        found = operator.index(value)
    except TypeError:
        found = None
    if found is None or (least is not None and found < least):
        needed = "a whole number" if least is None else f"a whole number, at least {least}"
        raise InputError(argument, repr(value), needed)
    return found


def standard_error(values: np.ndarray, axis: int = 0) -> Any:
    """Standard error of the mean over an axis; NaN for a single value, and where one is not finite."""
    count = values.shape[axis]
    if count < 2:
        return np.full(np.delete(values.shape, axis), np.nan)
    with np.errstate(invalid="ignore"):
        return values.std(axis, ddof=1) / math.sqrt(count)
