"""The picture of a field on a grid."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def drawn(ax: Any, nodes: Sequence[np.ndarray], values: np.ndarray, label: str, style: Mapping[str, Any]) -> Any:
    """A line over the nodes of one axis, filled contours over those of two, in the axes given or new ones."""
    import matplotlib.pyplot as plt

    ax = plt.subplots(layout="constrained")[1] if ax is None else ax
    if values.ndim == 1:
        ax.plot(nodes[0], values, **style)
        ax.set(xlabel="$x$", ylabel=label)
        return ax
    filled = ax.contourf(*nodes[:2], values.T, **({"levels": 20, "cmap": "cividis"} | dict(style)))
    ax.figure.colorbar(filled, ax=ax, label=label)
    ax.set(xlabel="$x_1$", ylabel="$x_2$", aspect="equal")
    return ax
