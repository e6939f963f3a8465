"""The equation that a file describes: its tables turned into a problem, a control problem or a fit."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kolmo.arrays import Array, as_like, namespace
from kolmo.equations.document import MAX_POINTS, Document, floating, is_number
from kolmo.equations.expressions import Expression
from kolmo.errors import InputError
from kolmo.problem import KolmogorovProblem
from kolmo.problem.box import Box
from kolmo.problem.events import Payment
from kolmo.problem.faces import Absorbing, Robin
from kolmo.problem.sde import SDE

if TYPE_CHECKING:
    from kolmo.control import ControlProblem

__all__ = ["Equation", "Fit", "read"]

MAX_DIM = 3
MAX_COLUMNS = 64
Function = Callable[..., Array]


@dataclass(frozen=True)
class Fit:
    """What ``[fit]`` asks for.

    Attributes
    ----------
    parameters : tuple of str
        Names of those that are varied.
    targets : ndarray or None, shape (n,)
        Values that u(0, x_i) should have: their squared deviations are minimised; None: Σ w_i u(0, x_i) is.
    weights : ndarray, shape (n,)
        w_i, of the points or of the squared deviations.
    bounds : tuple of (low, high)
        One pair for each parameter, ±inf where there is none.
    maxiter : int
        Largest number of iterations.
    """

    parameters: tuple[str, ...]
    targets: np.ndarray | None
    weights: np.ndarray
    bounds: tuple[tuple[float, float], ...]
    maxiter: int


class Equation:
    """An equation read from a file.

    Parameters
    ----------
    path : path
        The file.
    parameters : mapping of str to float, optional
        Values instead of those in ``[parameters]``; only names that are there.

    Attributes
    ----------
    parameters : dict of str to float
        All parameters.
    at : ndarray, shape (n, d)
        Points where the answer is wanted.
    rtol, atol : float
        Tolerance.
    dim : int
        Dimension d.
    fit : Fit or None
        What is to be fitted.
    controlled : bool
        Whether there are ``[controls]``.
    """

    def __init__(self, path: str | Path, parameters: Mapping[str, float] | None = None) -> None:
        self._document = Document(Path(path))
        self.parameters = self._document.parameters() | self._overriding(parameters or {})
        self.dim = self._dimension()
        solve = self._document.table("solve")
        self.at = np.empty((0, self.dim)) if self._document.has("data") and not solve else self._points(solve)
        self.rtol, self.atol = (self._document.number("solve", key, v) for key, v in (("rtol", 1e-3), ("atol", 1e-6)))
        self.controlled = self._document.has("controls")
        self._actions = {"a": len(self._controls().samples[0])} if self.controlled else {}
        for key in () if self.controlled else ("running_cost", "obstacle", "sense"):
            if key in self._document.table("equation"):
                self._document.refuse(
                    "equation", key, "no table [controls]", "[controls]: this belongs to a control problem"
                )
        self.fit = self._fit() if self._document.has("fit") and not self._document.has("data") else None

    @property
    def text(self) -> str:
        """The text of the file."""
        return self._document.text

    def problem(self, values: Mapping[str, Any] | None = None) -> KolmogorovProblem:
        """The problem; ``values`` (numbers or tensors) stand for the parameters of these names."""
        if self.controlled:
            self._document.refuse("controls", "", "a control problem", "none here", "kolmo control FILE")
        known, number = self.parameters | dict(values or {}), self._document.number
        terminal = self._function("terminal", known, columns=True)
        with self._document:
            return KolmogorovProblem(
                self.process(known),
                None if terminal is None else lambda x: terminal(horizon or 0.0, x),
                horizon := number("equation", "horizon", None),
                self._box(known),
                killing=self._function("killing", known),
                source=self._function("source", known, columns=True),
                events=self._events(known),
            )

    def process(self, known: Mapping[str, Any]) -> SDE:
        """The process, with values for all parameters."""
        d, times = self.dim, self._document.table("equation").get("breakpoints", [])
        breakpoints = self._document.numbers("equation", "breakpoints", (None,), MAX_POINTS) if times else None
        with self._document:
            return SDE(
                self._function("drift", known, shape=(d,)) or 0.0,
                self._function("diffusion", known, shape=(d, None)),
                covariance=self._function("covariance", known, shape=(d, d)),
                dim=d,
                breakpoints=None if breakpoints is None else breakpoints.tolist(),
            )

    def control_problem(self) -> "ControlProblem":
        """The control problem of a file with ``[controls]``."""
        from kolmo.control import ControlProblem

        if not self.controlled:
            self._document.refuse("controls", "", "nothing", "a table with the set of controls")
        known, d = self.parameters, self.dim
        equation = self._document.table("equation")
        if self._document.has("events"):
            self._document.refuse("events", "", "events", "none in a control problem")
        for key in {"source", "breakpoints"} & equation.keys():
            fix = "a control problem has running_cost" if key == "source" else ""
            self._document.refuse("equation", key, "a value", "none in a control problem", fix)
        terminal = self._function("terminal", known)
        obstacle = self._function("obstacle", known, actions=False)
        with self._document:
            return ControlProblem(
                self._function("drift", known, shape=(d,)) or [0.0] * d,
                self._function("diffusion", known, shape=(d, None)),
                covariance=self._function("covariance", known, shape=(d, d)),
                controls=self._controls(),
                terminal=None if terminal is None else lambda x: terminal(horizon or 0.0, x),
                horizon=(horizon := self._document.number("equation", "horizon", None)),
                box=self._box(known) or Box.unbounded(d),
                running_cost=self._function("running_cost", known),
                killing=self._function("killing", known),
                obstacle=obstacle,
                sense=equation.get("sense", "min"),
            )

    def placed(self, error: InputError) -> InputError:
        """The same error with the line and key that it is about."""
        return self._document.placed(error)

    # -------------------------------------------------------------------------------------------------- the parts

    def _overriding(self, parameters: Mapping[str, float]) -> dict[str, float]:
        known = self._document.parameters()
        for name in parameters:
            if name not in known:
                raise InputError(name, "a value", f"a name in [parameters]: {', '.join(known) or 'there is none'}")
        return dict(parameters)

    def _dimension(self) -> int:
        document, equation = self._document, self._document.table("equation")
        if "dim" in equation:
            given = equation["dim"]
            if type(given) is not int or not 1 <= given <= MAX_DIM:
                document.refuse("equation", "dim", repr(given), f"a whole number from 1 to {MAX_DIM}")
            return given
        for table, key in (("equation", "drift"), ("box", "lower")):
            value = document.table(table).get(key)
            if isinstance(value, list):
                if not 1 <= len(value) <= MAX_DIM:
                    document.refuse(table, key, f"{len(value)} entries", f"one for each dimension, 1 to {MAX_DIM}")
                return len(value)
        return 1

    def _points(self, solve: Mapping[str, Any]) -> np.ndarray:
        if "at" not in solve:
            self._document.refuse("solve", "at", "nothing", "the points where the answer is wanted, such as at = [0.0]")
        nested = isinstance(solve["at"], list) and any(isinstance(point, list) for point in solve["at"])
        if self.dim == 1 and not nested:
            return self._document.numbers("solve", "at", (None,), MAX_POINTS)[:, None]
        return self._document.numbers("solve", "at", (None, self.dim), MAX_POINTS)

    def _box(self, known: Mapping[str, Any]) -> Box | None:
        document = self._document
        if not document.has("box"):
            return None
        lower, upper = (self._corner(key, known) for key in ("lower", "upper"))
        boundary = document.table("box").get("boundary", "open")
        if not isinstance(boundary, str):
            boundary = self._faces(boundary, known)
        with document:
            return Box(lower, upper, boundary=boundary)

    def _events(self, known: Mapping[str, Any]) -> dict[float, list[Any]]:
        """At each of the times what is paid, and then where the state is moved."""
        document, given = self._document, self._document.table("events")
        if not document.has("events"):
            return {}
        for key in ("times",) if {"pay", "move"} & given.keys() else ("times", "move"):
            if key not in given:
                document.refuse("events", key, "nothing", "times, and pay or move")
        pay, move = (
            self._compiled("events", key, given[key], known, shape, {}) if key in given else None
            for key, shape in (("pay", (None,)), ("move", (self.dim,)))
        )

        def at(t: float) -> list[Any]:
            paid = [] if pay is None else [Payment(lambda x: pay(t, x))]
            return [*paid, *([] if move is None else [lambda x: move(t, x)])]

        return {t: at(t) for t in document.numbers("events", "times", (None,)).tolist()}

    def _corner(self, key: str, known: Mapping[str, Any]) -> Any:
        """Numbers, or formulas of t and the parameters for faces that move; one for each axis."""
        document = self._document
        given = document.table("box").get(key)
        items: list[Any] = given if isinstance(given, list) else [given]
        if not any(isinstance(item, str) for item in items):
            return document.numbers("box", key, (self.dim,), infinite=True)
        if len(items) != self.dim or not all(isinstance(item, str) or is_number(item) for item in items):
            document.refuse("box", key, repr(given)[:80], f"{self.dim} numbers, or formulas of t and the parameters")
        return [self._moving(key, item, known) if isinstance(item, str) else floating(item) for item in items]

    def _moving(self, key: str, text: str, known: Mapping[str, Any]) -> Callable[[float], Any]:
        """The place of a face as a function of time."""
        formula = self._parsed("box", key, text, ["t", *known], {})
        return lambda t: formula({**known, "t": t})

    def _faces(self, boundary: Any, known: Mapping[str, Any]) -> list[Any]:
        if not isinstance(boundary, list) or len(boundary) != self.dim:
            given = f"{len(boundary)} entries" if isinstance(boundary, list) else repr(boundary)
            self._document.refuse(
                "box", "boundary", given, f"a word, or a list with one entry for each of {self.dim} axes"
            )
        return [
            tuple(self._face(face, known) for face in axis) if isinstance(axis, list) else self._face(axis, known)
            for axis in boundary
        ]

    def _face(self, face: Any, known: Mapping[str, Any]) -> Any:
        def value(key: str) -> Any:
            return self._compiled("box", "boundary", face.get(key, 0.0), known, ())

        match face:
            case str():
                return face
            case {"absorbing": _, **rest} if not rest:
                return Absorbing(value("absorbing"))
            case {"kappa": _, **rest} if not rest.keys() - {"value"}:
                return Robin(value("kappa"), value("value"))
            case _:
                needed = "a word, { absorbing = formula } or { kappa = formula, value = formula }"
                return self._document.refuse("box", "boundary", repr(face), needed)

    def _controls(self) -> Any:
        from kolmo.control import BoxSet, Finite, Unbounded

        document, given = self._document, self._document.table("controls")
        kinds = [kind for kind in ({"lower", "upper"}, {"values"}, {"unbounded"}) if kind & given.keys()]
        if len(kinds) != 1 or kinds[0] != given.keys():
            document.refuse("controls", "", ", ".join(given) or "nothing", "lower and upper, or values, or unbounded")
        with document:
            if "unbounded" in given:
                return Unbounded(given["unbounded"])
            if "values" in given:
                nested = isinstance(given["values"], list) and any(isinstance(v, list) for v in given["values"])
                values = document.numbers("controls", "values", (None, None) if nested else (None,))
                return Finite(values)
            lower, upper = (document.numbers("controls", key, (None,)).tolist() for key in ("lower", "upper"))
            return BoxSet(lower, upper)

    def _fit(self) -> Fit:
        document, given = self._document, self._document.table("fit")
        for key in ("starts", "tol", "profile"):
            if key in given:
                document.refuse("fit", key, "a value", "none without [data]")
        names = given.get("parameters", [])
        self._check_fitted(names)
        n = len(self.at)
        maxiter = given.get("maxiter", 200)
        if type(maxiter) is not int or not 1 <= maxiter <= 100_000:
            document.refuse("fit", "maxiter", repr(maxiter), "a positive whole number")
        return Fit(
            tuple(names),
            document.numbers("fit", "targets", (n,)) if "targets" in given else None,
            document.numbers("fit", "weights", (n,)) if "weights" in given else np.ones(n),
            self._bounds(given, names),
            maxiter,
        )

    def _check_fitted(self, names: Any) -> None:
        """Whether these are names of parameters."""
        known_names = isinstance(names, list) and all(
            isinstance(name, str) and name in self.parameters for name in names
        )
        if not known_names or not names:
            known = ", ".join(self.parameters) or "there is none"
            self._document.refuse("fit", "parameters", repr(names), f"a list of names in [parameters]: {known}")

    def _bounds(self, given: Mapping[str, Any], names: Sequence[str]) -> tuple[tuple[float, float], ...]:
        """A pair for each of the fitted parameters."""
        bounds = given.get("bounds", {})
        if not isinstance(bounds, dict) or not bounds.keys() <= set(names):
            needed = "a table with a pair for some of the fitted parameters"
            self._document.refuse("fit", "bounds", repr(bounds), needed)
        return tuple(self._bound(name, bounds.get(name, [-np.inf, np.inf])) for name in names)

    def _bound(self, name: str, pair: Any) -> tuple[float, float]:
        if not isinstance(pair, list) or len(pair) != 2 or not all(is_number(end) for end in pair):
            self._document.refuse("fit", "bounds", f"{name} = {pair!r}", "two numbers, ±inf where there is no bound")
        return float(pair[0]), float(pair[1])

    # ---------------------------------------------------------------------------------------------- the formulas

    def _function(
        self,
        key: str,
        known: Mapping[str, Any],
        *,
        shape: tuple[int | None, ...] = (),
        columns: bool = False,
        actions: bool = True,
    ) -> Function | None:
        value = self._document.table("equation").get(key)
        if value is None:
            return None
        given: Mapping[str, int] | None = {} if key == "terminal" or not actions else None
        return self._compiled("equation", key, value, known, (None,) if columns else shape, actions=given)

    def _parsed(
        self, table: str, key: str, item: float | str, scalars: list[str], vectors: Mapping[str, int]
    ) -> Expression:
        """A formula, or a number, of names."""
        with self._document.about(table, key):
            text = item if isinstance(item, str) else repr(floating(item))
            return Expression(text, scalars=scalars, vectors=vectors, argument=key)

    def _compiled(
        self,
        table: str,
        key: str,
        value: Any,
        known: Mapping[str, Any],
        shape: tuple[int | None, ...],
        actions: Mapping[str, int] | None = None,
    ) -> Function:
        """One function of (t, x[, a]) for a formula, or nested lists of them of a shape whose axes may be left out."""
        refuse = self._document.refuse
        actions = self._actions if actions is None and table == "equation" else actions or {}
        needed = "a formula" + "".join(f" or a list of {n or 'some'}" for n in shape[:1])
        needed += f", or {shape[0]} lists" if len(shape) == 2 else ""

        def built(item: Any, axes: tuple[int | None, ...]) -> Any:
            if isinstance(item, list):
                if not axes or not item or len(item) != (axes[0] or len(item)) or len(item) > MAX_COLUMNS:
                    refuse(table, key, f"a list of {len(item)}", needed)
                rows = [built(entry, axes[1:]) for entry in item]
                if len({len(row) if isinstance(row, list) else 0 for row in rows}) > 1:
                    refuse(table, key, "rows of different lengths", needed)
                return rows
            if isinstance(item, bool) or not isinstance(item, int | float | str):
                refuse(table, key, repr(item), needed)
            return self._parsed(table, key, item, ["t", *known], {"x": self.dim, **actions})

        tree = built(value, shape)
        if shape == (self.dim,) and self.dim > 1 and not isinstance(tree, list):
            refuse(table, key, repr(value), f"a list of {self.dim} formulas, one for each coordinate")

        def function(t: float, x: Array, a: Array = None) -> Array:
            return _stacked(tree, {**known, "t": t, "x": x, "a": a}, x)

        return function


def read(path: str | Path, parameters: Mapping[str, float] | None = None) -> Equation:
    """Read an equation file.

    Parameters
    ----------
    path : path
        A TOML file, at most 32 kB.
    parameters : mapping of str to float, optional
        Values instead of those in the file.

    Returns
    -------
    Equation

    Raises
    ------
    InputError
        For anything that is not understood, with line and key.

    Examples
    --------
    >>> import tempfile, kolmo
    >>> path = Path(tempfile.mkdtemp()) / "ou.toml"
    >>> _ = path.write_text('''
    ... parameters = { kappa = 1.0 }
    ... equation = { drift = "-kappa * x[0]", diffusion = 0.5, terminal = "x[0]**2", horizon = 1.0 }
    ... solve = { at = [1.0] }
    ... ''')
    >>> equation = read(path)
    >>> u = kolmo.solve(equation.problem(), at=equation.at, rtol=1e-6)(equation.at)
    >>> bool(abs(u[0] - (np.exp(-2) + 0.125 * (1 - np.exp(-2)))) < 1e-6)
    True
    """
    return Equation(path, parameters)


def _stacked(tree: Any, values: Mapping[str, Any], x: Array) -> Array:
    """Values of nested lists of formulas, their axes last."""
    if isinstance(tree, Expression):
        return tree(values)
    parts = [as_like(_stacked(item, values, x), x) for item in tree]
    inner = parts[0].ndim if isinstance(tree[0], list) else 0
    if inner:
        return namespace(x).stack(parts, -2)
    flat = 0.0 * x[..., 0]
    return namespace(x).stack([part + flat for part in parts], -1)
