"""The picture of a field on a grid, and its film over time."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from kolmo.errors import InputError

# Milliseconds that a frame stays.
STAYS = 80


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


Frame = tuple[Sequence[np.ndarray], np.ndarray]


def filmed(
    ax: Any, times: Sequence[float], frame: Callable[[float], Frame], label: str, style: Mapping[str, Any]
) -> Any:
    """An animation over times: lines or filled contours, on the scale that holds all of them.

    Parameters
    ----------
    ax : matplotlib Axes or None
        Where to draw; None: a new figure.
    times : sequence of float
        At least two.
    frame : callable
        ``frame(t)``: the nodes of each axis, and values of shape (n,) or (n, m).
    label : str
        What the values are.
    style : mapping
        Passed to ``Axes.plot`` or ``Axes.contourf``.
    """
    import matplotlib.pyplot as plt
    from matplotlib.animation import FuncAnimation

    if len(times) < 2:
        fix = "save=np.linspace(0.0, T, 41) where it is solved; for a density, save= as well"
        raise InputError("times", f"{len(times)} saved", "two saved times or more to animate", fix)
    ax = plt.subplots(layout="constrained")[1] if ax is None else ax
    frames = [frame(float(t)) for t in times]
    finite = np.concatenate([values[np.isfinite(values)] for _, values in frames])
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    edges = [(min(n[i][0] for n, _ in frames), max(n[i][-1] for n, _ in frames)) for i in range(frames[0][1].ndim)]
    if len(edges) == 1:
        margin = 0.05 * (high - low or 1.0)
        (line,) = ax.plot([], [], **style)
        ax.set(xlabel="$x$", ylabel=label, xlim=edges[0], ylim=(low - margin, high + margin))

        def show(k: int) -> list[Any]:
            nodes, values = frames[k]
            line.set_data(nodes[0], values)
            return [line, ax.set_title(f"$t = {times[k]:.3g}$")]

    else:
        levels = np.linspace(low, high if high > low else low + 1.0, 21)
        options = {"levels": levels, "cmap": "cividis"} | dict(style)
        ax.set(xlabel="$x_1$", ylabel="$x_2$", xlim=edges[0], ylim=edges[1], aspect="equal")
        artists: list[Any] = []

        def show(k: int) -> list[Any]:
            nodes, values = frames[k]
            for old in artists:
                old.remove()
            artists[:] = [ax.contourf(*nodes[:2], values.T, **options)]
            return [*artists, ax.set_title(f"$t = {times[k]:.3g}$")]

        show(0)
        ax.figure.colorbar(artists[0], ax=ax, label=label)
    return FuncAnimation(ax.figure, show, frames=len(frames), interval=STAYS, repeat=True)
