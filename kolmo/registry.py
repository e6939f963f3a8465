"""Methods found by name: one registry per kind (scheme, stepper, ...)."""

from collections.abc import Iterator
from typing import Generic, TypeVar

from kolmo.errors import InputError, did_you_mean

T = TypeVar("T")


class Registry(Generic[T]):
    """A dictionary of named methods that lists what it knows when asked for what it does not.

    Parameters
    ----------
    kind : str
        What is registered, for the error message ("scheme", "stepper").

    Examples
    --------
    >>> colours = Registry[int]("colour")
    >>> colours.add("red", 1)
    1
    >>> colours["red"]
    1
    >>> colours["rad"]
    Traceback (most recent call last):
    ...
    kolmo.errors.InputError: colour: got 'rad'; needed one of red. Fix: did you mean 'red'?
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._known: dict[str, T] = {}

    def add(self, name: str, method: T) -> T:
        """Register a method under a name."""
        self._known[name] = method
        return method

    def __getitem__(self, name: str) -> T:
        if name not in self._known:
            raise InputError(self.kind, repr(name), "one of " + ", ".join(self._known), did_you_mean(name, self._known))
        return self._known[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._known)

    def __contains__(self, name: object) -> bool:
        return name in self._known
