"""Data of first passages: when a process left, through which face, and under which conditions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kolmo.arrays import as_numpy
from kolmo.errors import InputError
from kolmo.shown import Shown

# What is known of a trial.
SEEN, UNSIDED, UNTIMED, CENSORED, NOTHING = range(5)


def _numbers(name: str, value: Any) -> np.ndarray:
    """A column as numbers."""
    try:
        return np.asarray(as_numpy(value), dtype=float).reshape(-1)
    except (TypeError, ValueError) as error:
        fix = "1 for the upper face, 0 for the lower one" if name == "choices" else "code categories as numbers"
        raise InputError(name, str(error), "numbers, NaN where one is missing", fix) from None


@dataclass(frozen=True, eq=False)
class Trials(Shown):
    """Times and choices :math:`(t_i, c_i)` of trials, with covariates.

    Attributes
    ----------
    times : ndarray, shape (N,)
        When the process left (the response time); NaN where only the choice is known. Of censored trials the time up to
        which there was no response.
    choices : ndarray, shape (N,)
        1 for the upper face, 0 for the lower one; NaN where only the time is known. Of races, the axis of the face.
    covariates : dict of str to ndarray, shape (N,)
        What drift, noise, bounds, start and so on depend on. Trials that agree in all of them are one condition.
    censored : ndarray of bool, shape (N,)
        Whether there was no response up to the time given; the choice does not count then.

    Raises
    ------
    InputError
        For lengths that differ, times that are not positive, or choices that are no whole numbers.

    Examples
    --------
    >>> trials = Trials([0.6, 0.8, 0.7, 2.0], [1, 0, np.nan, 1], {"dose": [1, 1, 2, 2]}, [False, False, False, True])
    >>> trials
    Trials(4 trials, 2 conditions of dose, 1 censored, 1 without choice)
    >>> trials.conditions
    [{'dose': 1.0}, {'dose': 2.0}]
    """

    times: np.ndarray
    choices: np.ndarray
    covariates: Mapping[str, Any] = field(default_factory=dict)
    censored: Any = None

    def __post_init__(self) -> None:
        times, choices = (_numbers(name, v) for name, v in (("times", self.times), ("choices", self.choices)))
        censored = np.zeros(len(times), dtype=bool) if self.censored is None else np.asarray(self.censored, dtype=bool)
        covariates = {str(k): _numbers(str(k), v) for k, v in self.covariates.items()}
        for name, value in {"choices": choices, "censored": censored, **covariates}.items():
            if len(value) != len(times):
                raise InputError(name, f"{len(value)} entries", f"{len(times)}, one per time")
        if len(times) == 0:
            raise InputError("times", "no trials", "at least one")
        if (times <= 0).any() or np.isinf(times).any():
            raise InputError("times", times[(times <= 0) | np.isinf(times)][0], "positive finite times, or NaN")
        known = choices[~np.isnan(choices)]
        if ((known != np.round(known)) | (known < 0)).any():
            raise InputError("choices", known[(known != np.round(known)) | (known < 0)][0], "0, 1, …, or NaN")
        if np.isnan(times[censored]).any():
            raise InputError("times", "NaN of a censored trial", "the time up to which there was no response")
        for name, value in covariates.items():
            if not np.isfinite(value).all():
                raise InputError(name, "a value that is not finite", "finite covariates", "leave such trials out")
        checked = {"times": times, "choices": choices, "censored": censored, "covariates": covariates}
        for name, part in checked.items():
            object.__setattr__(self, name, part)
        columns = np.stack([*covariates.values()], -1) if covariates else np.zeros((len(times), 1))
        rows, group = np.unique(columns, axis=0, return_inverse=True)
        conditions = [dict(zip(covariates, row.tolist(), strict=False)) for row in rows]
        object.__setattr__(self, "_groups", (conditions, np.asarray(group).reshape(-1)))

    @classmethod
    def of(cls, frame: Any, times: str, choices: str, covariates: Sequence[str] = (), censored: str = "") -> "Trials":
        """Trials from the columns of a data frame, or of any mapping of names to columns.

        Examples
        --------
        >>> Trials.of({"rt": [0.5, 0.6], "correct": [1, 0], "coherence": [0.1, 0.2]}, "rt", "correct", ["coherence"])
        Trials(2 trials, 2 conditions of coherence)
        """
        for name in (times, choices, *covariates, *([censored] if censored else [])):
            if name not in frame:
                raise InputError("frame", f"no column {name!r}", f"one of {', '.join(map(str, frame))}")
        column = {name: frame[name] for name in covariates}
        return cls(frame[times], frame[choices], column, frame[censored] if censored else None)

    @property
    def conditions(self) -> list[dict[str, float]]:
        """Covariates of every condition."""
        found: list[dict[str, float]] = self.__dict__["_groups"][0]
        return found

    @property
    def group(self) -> np.ndarray:
        """Condition of every trial, shape (N,)."""
        return np.asarray(self.__dict__["_groups"][1])

    @property
    def known(self) -> np.ndarray:
        """What is known of every trial: SEEN, UNSIDED, UNTIMED, CENSORED or NOTHING, shape (N,)."""
        untimed, unsided = np.isnan(self.times), np.isnan(self.choices)
        found = np.where(untimed & unsided, NOTHING, np.where(untimed, UNTIMED, np.where(unsided, UNSIDED, SEEN)))
        return np.where(self.censored, CENSORED, found)

    def __len__(self) -> int:
        return len(self.times)

    def __getitem__(self, which: Any) -> "Trials":
        """Some of the trials, by a mask, indices or a slice."""
        columns = {name: value[which] for name, value in self.covariates.items()}
        return Trials(self.times[which], self.choices[which], columns, self.censored[which])

    def __repr__(self) -> str:
        parts = [f"{len(self)} trials"]
        if self.covariates:
            parts.append(f"{len(self.conditions)} conditions of {', '.join(self.covariates)}")
        known = self.known
        words = {CENSORED: "censored", UNSIDED: "without choice", UNTIMED: "without time", NOTHING: "missing"}
        parts += [f"{int((known == k).sum())} {word}" for k, word in words.items() if (known == k).any()]
        return f"Trials({', '.join(parts)})"
