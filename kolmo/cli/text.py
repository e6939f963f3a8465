"""Results as text for a terminal."""

from collections.abc import Mapping
from typing import Any

from kolmo.report import Measured

__all__ = ["averaged", "readable"]


def averaged(mean: float | None, standard_error: float | None, values: object = None) -> Measured | float | None:
    """Return a mean over seeds and its standard error, as results hold them, as one number; one seed has no error."""
    return mean if mean is None or standard_error is None else Measured(mean, standard_error)


def readable(value: Any, indent: int = 0) -> str:
    """Return a value as text: one line for each entry of a dictionary, nested ones indented, lists with commas.

    Parameters
    ----------
    value : object
        Numbers, strings, None, and dictionaries and lists of them; a mean over seeds takes one line.
    indent : int, default 0
        Columns before each line.

    Examples
    --------
    >>> print(readable({"accuracy": 0.91234567, "depths": [8, 16], "loss": {"mean": 0.5}}))
    accuracy  0.912346
    depths    8,16
    loss
      mean  0.5
    >>> print(readable({"loss": {"mean": 0.5, "standard_error": 0.012, "values": [0.488, 0.512]}}))
    loss  0.500 ± 0.012
    >>> print(readable({"loss": {"mean": [0.5, 0.2], "standard_error": [0.012, 0.1]}}))
    loss
      mean            0.5,0.2
      standard_error  0.012,0.1
    """
    if not isinstance(value, Mapping):
        return _inline(value)
    width = max((len(str(key)) for key in value), default=0)
    lines = []
    for key, item in value.items():
        if _is_average(item):
            lines.append(f"{'':{indent}}{key:{width}}  {_inline(averaged(**item))}")
        elif isinstance(item, Mapping) and item:
            lines.append(f"{'':{indent}}{key}\n{readable(item, indent + 2)}")
        elif isinstance(item, list) and any(isinstance(entry, Mapping) for entry in item):
            lines.append(f"{'':{indent}}{key}")
            lines += [f"{'':{indent + 2}}{_inline(entry)}" for entry in item]
        else:
            lines.append(f"{'':{indent}}{key:{width}}  {_inline(item)}")
    return "\n".join(lines)


def _is_average(item: Any) -> bool:
    """Whether this is one mean over seeds with its error; a list of them is shown as two lists."""
    if not isinstance(item, Mapping) or not {"mean", "standard_error"} <= item.keys() <= {
        "mean",
        "standard_error",
        "values",
    }:
        return False
    return isinstance(item["mean"], int | float) and isinstance(item["standard_error"], int | float | None)


def _inline(value: Any) -> str:
    if isinstance(value, Mapping):
        return "  ".join(f"{key} {_inline(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ",".join(_inline(item) for item in value)
    if isinstance(value, float):
        return f"{value:.6g}"
    return "none" if value is None else str(value)
