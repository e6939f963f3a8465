"""A model and its data: an equation file with ``[data]``, and the table that it speaks of, as a likelihood."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kolmo.arrays import as_like, namespace
from kolmo.equations.document import is_number
from kolmo.equations.equation import Equation
from kolmo.equations.expressions import Expression
from kolmo.equations.table import Sheet

if TYPE_CHECKING:
    from kolmo.likelihood import FirstPassage, Likelihood, Race, Trials

__all__ = ["Estimation", "Observed"]

MAX_STARTS = 1000


@dataclass(frozen=True)
class Estimation:
    """What ``[fit]`` asks for beside ``[data]``.

    Attributes
    ----------
    parameters : tuple of str
        Names of those that are estimated; by default all.
    bounds : tuple of (low, high)
        One pair for each, ±inf where there is none.
    maxiter, starts : int
        Largest number of iterations, and of places that a maximisation starts from.
    tol : float
        Error that the log-likelihood may have.
    profile : bool
        Whether intervals are those of the profile likelihood.
    """

    parameters: tuple[str, ...]
    bounds: tuple[tuple[float, float], ...]
    maxiter: int
    starts: int
    tol: float
    profile: bool


class Observed(Equation):
    r"""A model read from a file, and what was observed of it, read from another.

    Parameters
    ----------
    path : path
        The equation file, with ``[data]``.
    data : path
        The table, in CSV.
    parameters : mapping of str to float, optional
        Values to start from instead of those in ``[parameters]``.

    Attributes
    ----------
    sheet : Sheet
        The table.
    estimation : Estimation
        What is to be estimated, and how.
    choices : bool
        Whether these are choices and times; else paths.

    Raises
    ------
    InputError
        For anything that is not understood; the message names file, and line and key, or row and column.

    Examples
    --------
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> _ = (folder / "ou.toml").write_text('''
    ... parameters = { kappa = 1.0, mean = 0.0, sigma = 1.0 }
    ... equation = { model = "ou" }
    ... data = { times = "t", states = ["x"] }
    ... ''')
    >>> _ = (folder / "ou.csv").write_text("t,x\n0,0\n1,0.5\n2,0.1\n")
    >>> observed = Observed(folder / "ou.toml", folder / "ou.csv")
    >>> float(observed.likelihood()().round(decimals=4))
    -1.2966
    """

    def __init__(self, path: str | Path, data: str | Path, parameters: Mapping[str, float] | None = None) -> None:
        super().__init__(path, parameters)
        document = self._document
        if not document.has("data"):
            document.refuse("data", "", "nothing", 'a table with the columns, such as times = "t", states = ["x"]')
        if self.controlled or document.has("events") or "breakpoints" in document.table("equation"):
            document.refuse("data", "", "controls, events or breakpoints", "a process without them")
        self.sheet = Sheet(Path(data))
        given = document.table("data")
        self.choices = "choices" in given
        self._covariates = self._names("covariates") if "covariates" in given else []
        self._check_tables(given)
        self.estimation = self._estimation()

    # ------------------------------------------------------------------------------------------- the likelihood
    def likelihood(self, values: Mapping[str, Any] | None = None) -> "Likelihood":
        """The likelihood of the data; ``values`` (tensors) stand for the parameters of these names."""
        known = self.parameters | dict(values or {})
        with self._document:
            if self.choices:
                return self._of_choices(known)
            return self._of_noisy_path(known) if "noise" in self._document.table("data") else self._of_paths(known)

    def _of_choices(self, known: Mapping[str, Any]) -> "Likelihood":
        equation = self._document.table("equation")
        common = {
            **{key: self._law(key, known) for key in ("delay", "lapse")},
            "span": self._document.number("decision", "span", None),
            "killing": None if equation.get("killing") is None else self._coefficient("killing", known),
        }
        model = self._passage(known, common) if self.dim == 1 else self._race(known, common)
        found: Likelihood = model.likelihood(self._trials(), tol=self.estimation.tol)
        return found

    def _trials(self) -> "Trials":
        from kolmo.likelihood import Trials

        given, sheet = self._document.table("data"), self.sheet
        times, choices = (sheet.column(given[key], missing=True) for key in ("times", "choices"))
        sheet.check(given["times"], ~(times <= 0), "a positive time, or nothing where it is not known")
        told = "0 (lower), 1 (upper) or nothing" if self.dim == 1 else "0 or 1 (the accumulator) or nothing"
        sheet.check(given["choices"], np.isin(choices, [0.0, 1.0]) | np.isnan(choices), told)
        censored = sheet.column(given["censored"]) != 0 if "censored" in given else np.zeros(len(sheet), dtype=bool)
        sheet.check(given["times"], ~(censored & np.isnan(times)), "a time, of a trial that is censored")
        return Trials(times, choices, {name: sheet.column(name) for name in self._covariates}, censored)

    def _law(self, key: str, known: Mapping[str, Any]) -> Any:
        """A number of covariates, or where two are given the law between them."""
        from kolmo.likelihood import Between

        item = self._document.table("decision").get(key, 0.0)
        if not isinstance(item, list):
            return self._formula("decision", key, item, known)
        low, high = self._pair(key, item, known, "a formula, or two for the ends of an interval")
        return lambda c: Between(low(c), high(c))

    def _pair(self, key: str, item: Any, known: Mapping[str, Any], needed: str) -> list[Callable[..., Any]]:
        """Two formulas."""
        if not isinstance(item, list) or len(item) != 2:
            self._document.refuse("decision", key, repr(item)[:80], needed)
        return [self._formula("decision", key, end, known) for end in item]

    def _passage(self, known: Mapping[str, Any], common: dict[str, Any]) -> "FirstPassage":
        from kolmo.likelihood import FirstPassage

        bounds: dict[str, Any] = {
            key: self._bound_of(key, known) for key in ("lower", "upper") if key in self._decision
        }
        drift, noise = (self._coefficient(key, known) for key in ("drift", "diffusion"))
        return FirstPassage(drift, noise, **bounds, start=self._law("start", known), **common)

    def _race(self, known: Mapping[str, Any], common: dict[str, Any]) -> "Race":
        from kolmo.likelihood import Race

        decision, needed = self._decision, "two formulas, one for each accumulator"
        ends: dict[str, Any] = {"upper": self._pair("upper", decision.get("upper"), known, needed)}
        for key in {"lower", "start"} & decision.keys():
            item = decision[key]
            ends[key] = self._pair(key, item if isinstance(item, list) else [item, item], known, needed)
        start = ends.pop("start", None)
        begin = 0.0 if start is None else lambda c: [f(c) for f in start]
        drift, noise = (self._coefficient(key, known) for key in ("drift", "diffusion"))
        return Race(drift, noise, **ends, start=begin, **common)

    @property
    def _decision(self) -> Mapping[str, Any]:
        return self._document.table("decision")

    def _of_paths(self, known: Mapping[str, Any]) -> "Likelihood":
        from kolmo.likelihood import paths

        times, states = self.paths()
        box = self._box(known)
        return paths(self.process(known), times, states, box=box, tol=self.estimation.tol)

    def _of_noisy_path(self, known: Mapping[str, Any]) -> "Likelihood":
        from kolmo.likelihood import noisy_paths

        given, document = self._document.table("data"), self._document
        times, states = self.paths()
        if len(times) > 1:
            document.refuse("data", "path", f"{len(times)} paths", "one path where there is noise")
        if self._document.has("box"):
            document.refuse("box", "", "a box", "none, of a path that is seen through noise")
        for key in ("mean", "variance"):
            if key not in given:
                document.refuse("data", key, "nothing", "mean and variance of the state when it is first observed")
        mean, variance = (document.numbers("data", key, (self.dim,)) for key in ("mean", "variance"))
        noise = self._formula("data", "noise", given["noise"], known)
        observe = document.numbers("data", "observe", (None, self.dim)) if "observe" in given else None
        first = (mean, np.diag(variance))
        tol = self.estimation.tol
        return noisy_paths(
            self.process(known), times[0], states[0], lambda: noise({}), initial=first, observe=observe, tol=tol
        )

    def paths(self) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Times (n,) and states (n, d) of every path, in the order of the table; NaN for what was not seen."""
        given, sheet = self._document.table("data"), self.sheet
        names = self._names("states")
        if "observe" not in given and len(names) != self.dim:
            self._document.refuse("data", "states", f"{len(names)} columns", f"{self.dim}, one for each coordinate")
        t = sheet.column(given["times"])
        x = np.stack([sheet.column(name, missing="noise" in given) for name in names], -1)
        of = sheet.text(given["path"]) if "path" in given else [""] * len(sheet)
        times, states = [], []
        for name in dict.fromkeys(of):
            mine = np.flatnonzero(np.array(of) == name)
            back = np.flatnonzero(np.diff(t[mine]) <= 0)
            if len(back):
                k = mine[back[0] + 1]
                sheet.refuse(
                    sheet.rows[k], given["times"], f"{t[k]:g} after {t[mine[back[0]]]:g}", "times that increase"
                )
            if len(mine) < 2:
                sheet.refuse(sheet.rows[mine[0]], given.get("path", ""), "a path of one row", "at least two")
            times.append(t[mine])
            states.append(x[mine])
        return times, states

    # ------------------------------------------------------------------------------------------- the formulas
    def _coefficient(self, key: str, known: Mapping[str, Any]) -> Callable[..., Any]:
        """Drift, noise or killing of (t, x, c): one formula, or one for each coordinate."""
        item = self._document.table("equation").get(key, 0.0)
        while isinstance(item, list) and len(item) == 1:
            item = item[0]
        items = item if isinstance(item, list) else [item] * (1 if key == "killing" else self.dim)
        if len(items) != (1 if key == "killing" else self.dim):
            self._document.refuse("equation", key, repr(item)[:80], f"{self.dim} formulas, one for each coordinate")
        formulas = [self._expression("equation", key, part, ["t", *known], {"x": self.dim}) for part in items]

        def function(t: Any, x: Any, c: Mapping[str, float]) -> Any:
            given = {**known, **c, "t": t, "x": x}
            values = [as_like(formula(given), x) + 0.0 * x[..., 0] for formula in formulas]
            return values[0] if len(values) == 1 else namespace(x).stack(values, -1)

        return function

    def _formula(
        self, table: str, key: str, item: Any, known: Mapping[str, Any]
    ) -> Callable[[Mapping[str, float]], Any]:
        """A number that depends on parameters and covariates."""
        formula = self._expression(table, key, item, [*known], {})
        return lambda c: formula({**known, **c})

    def _bound_of(self, key: str, known: Mapping[str, Any]) -> Callable[..., Any]:
        """A bound that depends on parameters and covariates, and on t where the formula does."""
        item = self._document.table("decision")[key]
        formula = self._expression("decision", key, item, ["t", *known], {})
        if "t" in formula.names:
            return lambda t, c: formula({**known, **c, "t": t})
        return lambda c: formula({**known, **c})

    def _expression(
        self, table: str, key: str, item: Any, scalars: list[str], vectors: Mapping[str, int]
    ) -> Expression:
        if not isinstance(item, str) and not is_number(item):
            self._document.refuse(table, key, repr(item)[:80], "a number or a formula")
        return self._parsed(table, key, item, [*scalars, *self._covariates], vectors)

    # ------------------------------------------------------------------------------------------- the tables
    def _check_tables(self, given: Mapping[str, Any]) -> None:
        document = self._document
        for key in ("times", "choices", "censored", "path"):
            if key in given and not isinstance(given[key], str):
                document.refuse("data", key, repr(given[key]), "the name of a column")
        if "times" not in given or ("choices" in given) == ("states" in given):
            document.refuse("data", "", ", ".join(given) or "nothing", "times with choices, or times with states")
        mine = {"times", "choices", "censored", "covariates"} if self.choices else {
            "times", "states", "path", *(("noise", "observe", "mean", "variance") if "noise" in given else ())
        }  # fmt: skip
        for key in given.keys() - mine:
            document.refuse("data", key, "a value", f"only {', '.join(sorted(mine))} here")
        if self.choices != document.has("decision"):
            told = (
                ("nothing", "a table with lower, upper or both") if self.choices else ("a table", "none beside states")
            )
            document.refuse("decision", "", *told)
        if self.choices and (self.dim > 2 or document.has("box")):
            needed = "bounds here, of one process or of two accumulators"
            document.refuse("decision", "", f"{self.dim} dimensions, or a box", needed)
        for name in self._covariates:
            if not name.isidentifier() or name in self.parameters or name in ("t", "x"):
                document.refuse("data", "covariates", repr(name), "columns whose names are free to stand in formulas")

    def _names(self, key: str) -> list[str]:
        found = self._document.table("data")[key]
        if not isinstance(found, list) or not found or not all(isinstance(name, str) for name in found):
            self._document.refuse("data", key, repr(found), "a list of names of columns")
        return found

    def _estimation(self) -> Estimation:
        document, given = self._document, self._document.table("fit")
        for key in {"targets", "weights"} & given.keys():
            document.refuse("fit", key, "a value", "none beside [data]")
        names = given.get("parameters", list(self.parameters))
        self._check_fitted(names)
        maxiter, starts = (self._whole(key, default) for key, default in (("maxiter", 200), ("starts", 1)))
        tol, profile = document.number("fit", "tol", 1e-2), given.get("profile", False)
        if tol <= 0:
            document.refuse("fit", "tol", repr(tol), "a positive number")
        if not isinstance(profile, bool):
            document.refuse("fit", "profile", repr(profile), "true or false")
        found = Estimation(tuple(names), self._bounds(given, names), maxiter, starts, tol, profile)
        if starts > 1 and not np.isfinite(found.bounds).all():
            document.refuse("fit", "starts", f"{starts} without bounds", "finite bounds of all parameters")
        for name, (low, high) in zip(found.parameters, found.bounds, strict=True):
            if not low <= self.parameters[name] <= high:
                document.refuse(
                    "fit", "bounds", f"{name} = {self.parameters[name]:g}", f"a start in [{low:g}, {high:g}]"
                )
        return found

    def _whole(self, key: str, default: int) -> int:
        value = self._document.table("fit").get(key, default)
        if type(value) is not int or not 1 <= value <= (MAX_STARTS if key == "starts" else 100_000):
            self._document.refuse("fit", key, repr(value), "a positive whole number")
        return int(value)
