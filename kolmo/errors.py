"""Errors and warnings of kolmo: what was given, what is needed, what to do about it."""

import difflib
from collections.abc import Callable, Iterable
from typing import Any


class KolmoError(Exception):
    """Base class of every error that kolmo raises on purpose.

    Examples
    --------
    >>> import kolmo
    >>> try:
    ...     kolmo.Box(1.0, 0.0)
    ... except kolmo.KolmoError as error:
    ...     print(error)
    lower, upper: got [1.0] and [0.0]; needed lower < upper on every axis. Fix: swap them.
    """


def _sentence(words: str) -> str:
    return words if words.endswith(("?", ".")) else f"{words}."


class InputError(KolmoError, ValueError):
    """Bad input: names the argument, what was given, what is needed and the likely fix.

    Parameters
    ----------
    argument : str
        Name of the argument as the user wrote it.
    given : object
        What came; shown by ``str``.
    needed : str
        What is needed.
    fix : str, optional
        The likely fix.

    Examples
    --------
    >>> raise InputError("horizon", -1.0, "a positive number", "time runs from 0 to horizon")
    Traceback (most recent call last):
    ...
    kolmo.errors.InputError: horizon: got -1.0; needed a positive number. Fix: time runs from 0 to horizon.
    """

    def __init__(self, argument: str, given: object, needed: str, fix: str = "") -> None:
        self.argument, self.given, self.needed, self.fix = argument, given, needed, fix
        super().__init__(f"{argument}: got {given}; needed {needed}." + (f" Fix: {_sentence(fix)}" if fix else ""))

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
        """Cross to another process with the same message; what was given goes as text unless it is a plain value."""
        plain = self.given is None or type(self.given) in (bool, int, float, str)
        given = self.given if plain else f"{self.given}"
        return type(self), (self.argument, given, self.needed, self.fix), {**vars(self), "given": given}


def did_you_mean(name: object, known: Iterable[object]) -> str:
    """Suggest the known name that is most like one that is not known, as the fix of an `InputError`; or nothing.

    Examples
    --------
    >>> did_you_mean("dirft", ["drift", "diffusion"])
    "did you mean 'drift'?"
    """
    near = difflib.get_close_matches(str(name), list(map(str, known)), n=1)
    return f"did you mean {near[0]!r}?" if near else ""


class NotConvergedError(KolmoError, RuntimeError):
    """An iteration or a refinement ended without any usable answer.

    Examples
    --------
    >>> issubclass(NotConvergedError, KolmoError), issubclass(NotConvergedError, RuntimeError)
    (True, True)
    """


class MissingExtraError(KolmoError, ImportError):
    """An optional package is needed; the message names the extra that brings it.

    Parameters
    ----------
    package : str
        The missing package.
    extra : str
        The extra of kolmo that installs it.

    Examples
    --------
    >>> print(MissingExtraError("gmsh", "gmsh"))
    this needs gmsh, which is not installed. Fix: pip install 'kolmo[gmsh]'.
    """

    def __init__(self, package: str, extra: str) -> None:
        self.package, self.extra = package, extra
        super().__init__(f"this needs {package}, which is not installed. Fix: pip install 'kolmo[{extra}]'.")

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
        """Cross to another process."""
        return type(self), (self.package, self.extra), dict(vars(self))


class KolmoWarning(UserWarning):
    """Base class of kolmo's warnings, so that they can be filtered.

    Examples
    --------
    Make all of them errors:

    >>> import warnings
    >>> with warnings.catch_warnings():
    ...     warnings.simplefilter("error", KolmoWarning)
    ...     warnings.warn("something to look at", KolmoWarning)
    Traceback (most recent call last):
    ...
    kolmo.errors.KolmoWarning: something to look at
    """


class ToleranceWarning(KolmoWarning):
    """The tolerance asked for was not met; the best answer and its error estimate were returned.

    Examples
    --------
    A tolerance that nothing can meet:

    >>> import warnings, kolmo
    >>> bm = kolmo.SDE(0.0, diffusion=1.0, dim=1)
    >>> problem = kolmo.KolmogorovProblem(bm, lambda x: x[..., 0] ** 4, 1.0)
    >>> with warnings.catch_warnings(record=True) as caught:
    ...     warnings.simplefilter("always")
    ...     solution = kolmo.solve(problem, at=[0.0], rtol=1e-18, atol=0.0)
    >>> caught[0].category.__name__, solution.status
    ('ToleranceWarning', 'tolerance_not_met')
    """
