"""Static figures of landscapes, fit for a paper: they take ``ax=None`` (`panels` a figure) and return the Axes."""

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kolmo import files
from kolmo.errors import InputError
from kolmo.landscape.canvas import (
    DASHES,
    LEVELS,
    MAP,
    SYMBOLS,
    centred_colours,
    colour_bar,
    draw_paths,
    field_on_plane,
    filled_contours,
    new_axes,
    nice_levels,
    rounded_ends,
    shown_points,
    small_multiples,
    spans_decades,
)
from kolmo.landscape.draws import whole

if TYPE_CHECKING:
    from kolmo.landscape.curvature import Curvature
    from kolmo.landscape.features import FeatureLandscape
    from kolmo.landscape.surface import Surface

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#555555")  # Okabe & Ito


def contour(
    surface: "Surface",
    ax: Any = None,
    *,
    levels: Any = LEVELS,
    log: bool | None = None,
    lines: bool = True,
    **style: Any,
) -> Any:
    """Filled contours of the mean over the draws, with the trajectory of a PCA plane.

    Parameters
    ----------
    surface : Surface
        Over a plane.
    ax : matplotlib Axes, optional
        Where to draw; None: a new figure.
    levels : int or array_like
        Number of levels, or the levels.
    log : bool, optional
        Logarithmic levels; by default where all values are positive and span a factor of more than 5, but for
        differences, whose colours are white at zero.
    lines : bool
        Whether to draw thin lines between the levels, labelled.
    **style
        Passed to ``Axes.contourf``.

    Returns
    -------
    matplotlib.axes.Axes
    """
    ax = new_axes(ax)
    field = field_on_plane(surface)
    log = spans_decades(field) and not surface.is_difference if log is None else log
    chosen = nice_levels(field, levels, log)
    filled = filled_contours(ax, surface, chosen, log, lines, style)
    colour_bar(filled, ax, surface.name, chosen, log)
    return ax


def relief(surface: "Surface", ax: Any = None, *, log: bool | None = None, **style: Any) -> Any:
    """Surface in three dimensions of the mean over the draws.

    Parameters
    ----------
    surface : Surface
        Over a plane.
    ax : matplotlib Axes, optional
        Three-dimensional axes; None: a new figure.
    log : bool, optional
        Logarithmic height; by default where all values are positive and span a factor of more than 5.
    **style
        Passed to ``Axes3D.plot_surface``.

    Returns
    -------
    mpl_toolkits.mplot3d.axes3d.Axes3D
    """
    if ax is None:
        import matplotlib.pyplot as plt

        ax = plt.subplots(layout="constrained", subplot_kw={"projection": "3d"})[1]
    field = field_on_plane(surface)
    log = spans_decades(field) if log is None else log
    height = np.log10(field) if log else field
    grid = np.meshgrid(*surface.axes, indexing="ij")
    ax.plot_surface(*grid, height, **({"cmap": MAP, "linewidth": 0.1, "rcount": 80, "ccount": 80} | style))
    label = f"log₁₀ {surface.name}" if log else surface.name
    ax.set(xlabel=surface.label(0), ylabel=surface.label(1), zlabel=label)
    return ax


def panels(
    surfaces: "Mapping[str, Surface]",
    figure: Any = None,
    *,
    kind: str = "contour",
    columns: int = 3,
    levels: Any = LEVELS,
    log: bool | None = None,
    label: str | None = None,
    lines: bool = True,
    **style: Any,
) -> np.ndarray:
    """Surfaces over planes side by side, to be compared: all on one scale.

    Parameters
    ----------
    surfaces : dict of str to Surface
        Surfaces of one quantity, by name.
    figure : matplotlib Figure, optional
        Where to draw; None: a new figure.
    kind : {"contour", "surface"}
        Filled contours, or surfaces in three dimensions.
    columns : int
        Panels in a row, at most.
    levels, log, lines
        See `contour`; levels and lines are for contours, and the levels are those of all surfaces together.
    label : str, optional
        Of the colour bar, or of the height; None: the name of the quantity.
    **style
        Passed to ``Axes.contourf`` or ``Axes3D.plot_surface``.

    Returns
    -------
    ndarray of matplotlib Axes
        One for each surface.

    Raises
    ------
    InputError
        Without any surface, for surfaces over lines or of several quantities, for another kind, or for logarithmic
        levels of values that are not positive.

    Examples
    --------
    >>> import torch
    >>> from matplotlib.figure import Figure
    >>> from kolmo import landscape
    >>> model = torch.nn.Linear(2, 1)
    >>> loss = lambda f: f.weight.square().sum()
    >>> found = landscape.surface(loss, model, landscape.random_plane(model), points=5)
    >>> landscape.plots.panels({"first": found, "second": found.rise()}, Figure()).shape
    (2,)
    """
    if not surfaces:
        raise InputError("surfaces", "none", "at least one surface, by name")
    if kind not in ("contour", "surface"):
        raise InputError("kind", repr(kind), "'contour' or 'surface'")
    names = {one.name for one in surfaces.values()}
    if label is None and len(names) > 1:
        raise InputError("surfaces", f"the quantities {', '.join(sorted(names))}", "one quantity, or a label for all")
    fields = np.concatenate([field_on_plane(one).ravel() for one in surfaces.values()])
    differences = any(one.is_difference for one in surfaces.values())
    log = spans_decades(fields) and not differences if log is None else log
    if log and not np.nanmin(fields) > 0:
        raise InputError("log", True, "positive values", "log=False")
    label = names.pop() if label is None else label
    columns = min(whole("columns", columns, 1), len(surfaces))
    rows = -(-len(surfaces) // columns)
    if figure is None:
        import matplotlib.pyplot as plt

        figure = plt.figure(figsize=(0.9 + 3.6 * columns, 3.5 * rows), layout="constrained")
    if kind == "surface":
        axes = small_multiples(figure, rows, columns, len(surfaces), subplot_kw={"projection": "3d"})
        height = np.log10(fields) if log else fields
        low, high = float(np.nanmin(height)), float(np.nanmax(height))
        for ax, one in zip(axes, surfaces.values(), strict=True):
            relief(one, ax, log=log, **({"vmin": low, "vmax": high} | style))
            ax.set(zlim=(low, high), zlabel=f"log₁₀ {label}" if log else label)
    else:
        axes = small_multiples(figure, rows, columns, len(surfaces))
        chosen = nice_levels(fields, levels, log)
        for ax, one in zip(axes, surfaces.values(), strict=True):
            filled = filled_contours(ax, one, chosen, log, lines, style)
        colour_bar(filled, list(axes), label, chosen, log)
    for ax, name in zip(axes, surfaces, strict=True):
        ax.set_title(name)
    return axes


def cut(surfaces: "Surface | Mapping[str, Surface]", ax: Any = None, *, band: float = 2.0, **style: Any) -> Any:
    """Profiles with error bands: of lines, or of planes along their first direction through the centre.

    Parameters
    ----------
    surfaces : Surface or dict of str to Surface
        One, or several by name.
    ax : matplotlib Axes, optional
        Where to draw; None: a new figure.
    band : float
        Half width of the band in standard errors.
    **style
        Passed to ``Axes.plot``.

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    InputError
        Without any surface.
    """
    ax = new_axes(ax)
    named = dict(surfaces) if isinstance(surfaces, Mapping) else {"": surfaces}
    if not named:
        raise InputError("surfaces", "none", "at least one surface, by name")
    for k, (name, one) in enumerate(named.items()):
        through: Any = (slice(None), *one.centre[1:])
        mean, error = one.mean[through], one.standard_error[through]
        own = {"color": COLOURS[k % len(COLOURS)], "ls": DASHES[k % len(DASHES)], "label": name or None}
        drawn = ax.plot(one.axes[0], mean, **(own | style))
        if np.isfinite(error).all() and error.any():
            colour = drawn[0].get_color()
            ax.fill_between(one.axes[0], mean - band * error, mean + band * error, color=colour, alpha=0.25, lw=0)
    first = next(iter(named.values()))
    label = "α (0: first, 1: second network)" if first.plane["kind"] == "line" else first.label(0)
    ax.set(xlabel=label, ylabel=first.name)
    if len(named) > 1:
        ax.legend(frameon=False)
    ax.grid(alpha=0.3)
    return ax


def spectrum(curvature: "Curvature | Mapping[str, Curvature]", ax: Any = None, **style: Any) -> Any:
    """Spectral density of the Hessian, with its band over the probes, and the leading eigenvalues as ticks.

    Parameters
    ----------
    curvature : Curvature or dict of str to Curvature
        One, or several by name.
    ax : matplotlib Axes, optional
        Where to draw; None: a new figure.
    **style
        Passed to ``Axes.plot``.

    Returns
    -------
    matplotlib.axes.Axes
    """
    ax = new_axes(ax)
    named = dict(curvature) if isinstance(curvature, Mapping) else {"": curvature}
    for k, (name, one) in enumerate(named.items()):
        x, density, error = one.density()
        colour = COLOURS[k % len(COLOURS)]
        floor = 0.1 / (one.parameters * (x[-1] - x[0]))  # a tenth of one eigenvalue spread over the spectrum
        above = np.where(density > floor, density, np.nan)
        ax.plot(x, above, **({"color": colour, "ls": DASHES[k % len(DASHES)], "label": name or None} | style))
        if np.isfinite(error).all():
            low, high = (np.maximum(above + sign * error, floor) for sign in (-1, 1))
            ax.fill_between(x, low, high, color=colour, alpha=0.2, lw=0)
        ax.plot(one.eigenvalues, np.full(len(one.eigenvalues), floor), "|", color=colour, ms=12, mew=1.5)
    ax.set(xlabel="eigenvalue of the Hessian", ylabel="density", yscale="log")
    ax.axvline(0.0, color="0.6", lw=0.8, zorder=0)
    if len(named) > 1:
        ax.legend(frameon=False)
    return ax


def features(
    landscape: "FeatureLandscape",
    ax: Any = None,
    *,
    column: int = 0,
    level: int = 0,
    time: int = 0,
    kind: str = "loss",
    paths: int = 0,
    limits: tuple[float, float] | None = None,
    **style: Any,
) -> Any:
    """Level sets over feature space: of a loss, a probability, its slope or Laplacian at t = 0, with trajectories.

    Parameters
    ----------
    landscape : FeatureLandscape
        Of one or two features.
    ax : matplotlib Axes, optional
        Where to draw; None: a new figure.
    column : int
        The class.
    level, time : int
        Index of the noise level and of the time.
    kind : {"loss", "probability", "slope", "laplacian"}
        What is shown; slope and Laplacian are those of the loss, at t = 0.
    paths : int
        Number of trajectories that are drawn, with a colour and a mark at the end for each label.
    limits : (low, high), optional
        Range of colours; give it to compare panels.
    **style
        Passed to ``Axes.contourf`` (``Axes.plot`` for one feature).

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    InputError
        For a kind, class, noise level or time that there is not.
    """
    fields = shown_points(landscape, kind)
    for argument, index, count in (
        ("column", column, fields.shape[-1]),
        ("level", level, len(landscape.levels)),
        ("time", time, len(landscape.times)),
    ):
        if not -count <= index < count:
            raise InputError(argument, index, f"an index below {count}")
    ax = new_axes(ax)
    field = fields[level, time if kind in ("loss", "probability") else 0, ..., column]
    t = float(landscape.times[time]) if kind in ("loss", "probability") else 0.0
    label = f"{SYMBOLS[kind]}({t:.3g}, x), class {column}"
    if len(landscape.axes) == 1:
        ax.plot(landscape.axes[0], field, **style)
        ax.set(xlabel="feature", ylabel=label, title=landscape.levels[level])
        return ax
    low, high = limits or (float(field.min()), float(field.max()))
    levels = np.linspace(low, high if high > low else low + 1.0, LEVELS + 1)
    given = {"cmap": MAP, "extend": "neither" if limits is None else "both"} | centred_colours(levels)
    filled = ax.contourf(*landscape.axes, field.T, levels, **(given | style))
    ax.contour(*landscape.axes, field.T, levels[::2], colors="white", linewidths=0.4, alpha=0.6)
    if limits is None:
        ax.figure.colorbar(filled, ax=ax, label=label, ticks=rounded_ends(low, high, log=False))
    drawn = draw_paths(ax, landscape, level, paths)
    if limits is None and drawn:
        ax.legend(handles=drawn, title="label of the path", loc="upper right", fontsize=7, ncols=2)
    ax.set(xlabel="feature 1", ylabel="feature 2", title=landscape.levels[level], aspect="equal")
    ax.set(xlim=landscape.axes[0][[0, -1]], ylim=landscape.axes[1][[0, -1]])
    return ax


def animate(
    landscape: "FeatureLandscape",
    path: str | os.PathLike[str],
    *,
    over: str = "noise",
    column: int = 0,
    kind: str = "loss",
    seconds: float = 4.0,
) -> None:
    """Write an animation (GIF) over the noise level or over time, with fixed colours.

    Parameters
    ----------
    landscape : FeatureLandscape
        With several noise levels, or several times.
    path : path
        The file; it should end in ``.gif``.
    over : {"noise", "time"}
        What changes from frame to frame; the first noise level or time is kept of the other.
    column : int
        The class.
    kind : {"loss", "probability"}
        What is shown.
    seconds : float
        Duration.
    """
    from matplotlib.animation import FuncAnimation, PillowWriter
    from matplotlib.figure import Figure

    if over not in ("noise", "time"):
        raise InputError("over", repr(over), "'noise' or 'time'")
    frames = len(landscape.levels) if over == "noise" else len(landscape.times)
    field = shown_points(landscape, kind)[..., column]
    limits = float(field.min()), float(field.max())
    figure = Figure(figsize=(5.6, 4.4), layout="constrained")
    ax = figure.subplots()
    style: dict[str, Any] = {"limits": limits, "extend": "neither"} if len(landscape.axes) == 2 else {}

    def draw(k: int) -> Any:
        ax.clear()
        chosen: dict[str, Any] = {"level": k, "time": 0} if over == "noise" else {"level": 0, "time": k}
        features(landscape, ax, column=column, kind=kind, **style, **chosen)
        ax.set_title(f"{landscape.levels[chosen['level']]}, t = {landscape.times[chosen['time']]:.2f}")
        if len(landscape.axes) == 1:
            ax.set_ylim(limits)
        return []

    draw(0)
    if len(landscape.axes) == 2:
        ticks = rounded_ends(*limits, log=False)
        figure.colorbar(ax.collections[0], ax=ax, label=f"{SYMBOLS[kind]}(t, x), class {column}", ticks=ticks)
    movie = FuncAnimation(figure, draw, frames=frames)
    with tempfile.TemporaryDirectory() as folder:  # Pillow writes in pieces; the file is to be whole
        whole = Path(folder) / "movie.gif"
        movie.save(whole, writer=PillowWriter(fps=max(round(frames / seconds), 1)))
        files.write_bytes(Path(path), whole.read_bytes())
