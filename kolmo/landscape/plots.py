"""Static figures of landscapes, fit for a paper: they take ``ax=None`` (`panels` a figure) and return the Axes."""

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kolmo import files
from kolmo.errors import InputError
from kolmo.landscape.draws import whole

if TYPE_CHECKING:
    from kolmo.landscape.curvature import Curvature
    from kolmo.landscape.features import FeatureLandscape
    from kolmo.landscape.surface import Surface

MAP = "cividis"
# Of differences: white at zero.
DIFFERENCES = "RdBu_r"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#555555")  # Okabe & Ito
_MARKS = "osD^vP<X>*p"  # one more than colours: labels that share a colour have different ones
_DASHES = ("-", "--", "-.", ":")  # curves that coincide, or are printed in grey, can still be told apart
_LEVELS = 20
_SYMBOLS = {"loss": "u", "probability": "p", "slope": "|∇u|", "laplacian": "Δu"}


def contour(
    surface: "Surface",
    ax: Any = None,
    *,
    levels: Any = _LEVELS,
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
    ax = _new(ax)
    field = _plane(surface)
    log = _is_wide(field) and not surface.is_difference if log is None else log
    chosen = _levels(field, levels, log)
    filled = _filled(ax, surface, chosen, log, lines, style)
    _bar(filled, ax, surface.name, chosen, log)
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
    field = _plane(surface)
    log = _is_wide(field) if log is None else log
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
    levels: Any = _LEVELS,
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
    fields = np.concatenate([_plane(one).ravel() for one in surfaces.values()])
    differences = any(one.is_difference for one in surfaces.values())
    log = _is_wide(fields) and not differences if log is None else log
    if log and not np.nanmin(fields) > 0:
        raise InputError("log", True, "positive values", "log=False")
    label = names.pop() if label is None else label
    columns = min(whole("columns", columns, 1), len(surfaces))
    rows = -(-len(surfaces) // columns)
    if figure is None:
        import matplotlib.pyplot as plt

        figure = plt.figure(figsize=(0.9 + 3.6 * columns, 3.5 * rows), layout="constrained")
    if kind == "surface":
        axes = _grid(figure, rows, columns, len(surfaces), subplot_kw={"projection": "3d"})
        height = np.log10(fields) if log else fields
        low, high = float(np.nanmin(height)), float(np.nanmax(height))
        for ax, one in zip(axes, surfaces.values(), strict=True):
            relief(one, ax, log=log, **({"vmin": low, "vmax": high} | style))
            ax.set(zlim=(low, high), zlabel=f"log₁₀ {label}" if log else label)
    else:
        axes = _grid(figure, rows, columns, len(surfaces))
        chosen = _levels(fields, levels, log)
        for ax, one in zip(axes, surfaces.values(), strict=True):
            filled = _filled(ax, one, chosen, log, lines, style)
        _bar(filled, list(axes), label, chosen, log)
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
    ax = _new(ax)
    named = dict(surfaces) if isinstance(surfaces, Mapping) else {"": surfaces}
    if not named:
        raise InputError("surfaces", "none", "at least one surface, by name")
    for k, (name, one) in enumerate(named.items()):
        through: Any = (slice(None), *one.centre[1:])
        mean, error = one.mean[through], one.standard_error[through]
        own = {"color": COLOURS[k % len(COLOURS)], "ls": _DASHES[k % len(_DASHES)], "label": name or None}
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
    ax = _new(ax)
    named = dict(curvature) if isinstance(curvature, Mapping) else {"": curvature}
    for k, (name, one) in enumerate(named.items()):
        x, density, error = one.density()
        colour = COLOURS[k % len(COLOURS)]
        floor = 0.1 / (one.parameters * (x[-1] - x[0]))  # a tenth of one eigenvalue spread over the spectrum
        above = np.where(density > floor, density, np.nan)
        ax.plot(x, above, **({"color": colour, "ls": _DASHES[k % len(_DASHES)], "label": name or None} | style))
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
    fields = _shown(landscape, kind)
    for argument, index, count in (
        ("column", column, fields.shape[-1]),
        ("level", level, len(landscape.levels)),
        ("time", time, len(landscape.times)),
    ):
        if not -count <= index < count:
            raise InputError(argument, index, f"an index below {count}")
    ax = _new(ax)
    field = fields[level, time if kind in ("loss", "probability") else 0, ..., column]
    t = float(landscape.times[time]) if kind in ("loss", "probability") else 0.0
    label = f"{_SYMBOLS[kind]}({t:.3g}, x), class {column}"
    if len(landscape.axes) == 1:
        ax.plot(landscape.axes[0], field, **style)
        ax.set(xlabel="feature", ylabel=label, title=landscape.levels[level])
        return ax
    low, high = limits or (float(field.min()), float(field.max()))
    levels = np.linspace(low, high if high > low else low + 1.0, _LEVELS + 1)
    given = {"cmap": MAP, "extend": "neither" if limits is None else "both"} | _centred(levels)
    filled = ax.contourf(*landscape.axes, field.T, levels, **(given | style))
    ax.contour(*landscape.axes, field.T, levels[::2], colors="white", linewidths=0.4, alpha=0.6)
    if limits is None:
        ax.figure.colorbar(filled, ax=ax, label=label, ticks=_round(low, high, log=False))
    drawn = _paths(ax, landscape, level, paths)
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
    field = _shown(landscape, kind)[..., column]
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
        ticks = _round(*limits, log=False)
        figure.colorbar(ax.collections[0], ax=ax, label=f"{_SYMBOLS[kind]}(t, x), class {column}", ticks=ticks)
    movie = FuncAnimation(figure, draw, frames=frames)
    with tempfile.TemporaryDirectory() as folder:  # Pillow writes in pieces; the file is to be whole
        whole = Path(folder) / "movie.gif"
        movie.save(whole, writer=PillowWriter(fps=max(round(frames / seconds), 1)))
        files.write_bytes(Path(path), whole.read_bytes())


def _new(ax: Any) -> Any:
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    return plt.subplots(layout="constrained")[1]


def _plane(surface: "Surface") -> np.ndarray:
    if len(surface.axes) != 2:
        raise InputError("surface", "a line", "a surface over a plane", "landscape.plots.cut draws lines")
    field = np.where(np.isfinite(surface.mean), surface.mean, np.nan)
    if np.isnan(field).all():
        raise InputError("surface", "no finite value", "a loss that is finite somewhere on the plane")
    return field


def _filled(ax: Any, surface: "Surface", levels: np.ndarray, log: bool, lines: bool, style: dict[str, Any]) -> Any:
    """Filled contours of a surface on given levels, with lines, labels and trajectory; return what was filled."""
    from matplotlib.colors import LogNorm

    field = _plane(surface)
    centred = {} if log else _centred(levels, surface.is_difference)
    given = {"cmap": MAP, "extend": "neither"} | ({"norm": LogNorm()} if log else centred) | style
    filled = ax.contourf(*surface.axes, field.T, levels, **given)
    values = _round(levels[0], levels[-1], log)
    if lines:
        depth = [abs(filled.norm(v) - 0.5) - 0.35 if centred else 0.6 - filled.norm(v) for v in values]
        shade = ["white" if deep > 0 else "black" for deep in depth]
        drawn = ax.contour(*surface.axes, field.T, values, colors=shade, linewidths=0.5, alpha=0.8)
        _inside(ax, ax.clabel(drawn, fmt=_short, fontsize=8))
    _trajectory(ax, surface)
    ax.set(xlabel=surface.label(0), ylabel=surface.label(1))
    return filled


def _centred(levels: np.ndarray, always: bool = False) -> dict[str, Any]:
    """Colours for values of both signs, and always for differences: white at zero, as deep on either side."""
    if not (always or levels[0] < 0.0 < levels[-1]):
        return {}
    most = float(np.abs(levels).max())
    return {"cmap": DIFFERENCES, "vmin": -most, "vmax": most}


def _bar(filled: Any, ax: Any, label: str, levels: np.ndarray, log: bool) -> None:
    """Colour bar with round numbers, of one Axes or of several."""
    ticks = _round(levels[0], levels[-1], log)
    figure = (ax[0] if isinstance(ax, list) else ax).figure
    figure.colorbar(filled, ax=ax, label=label, ticks=ticks, format=lambda v, _: _short(v)).minorticks_off()


def _grid(figure: Any, rows: int, columns: int, count: int, **options: Any) -> np.ndarray:
    """So many axes of a grid; what is left of it is removed."""
    axes = figure.subplots(rows, columns, squeeze=False, **options).ravel()
    for ax in axes[count:]:
        ax.remove()
    return np.asarray(axes[:count])


def _is_wide(field: np.ndarray) -> bool:
    low, high = float(np.nanmin(field)), float(np.nanmax(field))
    return low > 0 and high > 5 * low


def _levels(field: np.ndarray, levels: Any, log: bool) -> np.ndarray:
    """Levels from the lowest to the highest value."""
    if np.ndim(levels):
        return np.asarray(levels, dtype=float)
    low, high = float(np.nanmin(field)), float(np.nanmax(field))
    if high <= low:
        high = low + 1.0
    return np.geomspace(low, high, levels + 1) if log else np.linspace(low, high, levels + 1)


def _round(low: float, high: float, log: bool) -> np.ndarray:
    """Round numbers between two values, for lines and ticks; logarithmically 1, 2 and 5 in each decade."""
    from matplotlib.ticker import LogLocator, MaxNLocator

    locators = [LogLocator(subs=(1.0, 2.0, 5.0), numticks=100)] if log else []
    for locator in (*locators, MaxNLocator(7)):
        found = np.asarray(locator.tick_values(low, high))
        inside = found[(found >= low) & (found <= high)]
        if len(inside) > 2:
            return inside
    return np.array([low, high])


def _inside(ax: Any, labels: Any) -> None:
    """Take away labels that the frame would cut."""
    for label in labels:
        place = ax.transAxes.inverted().transform(ax.transData.transform(label.get_position()))
        if place.min() < 0.05 or place.max() > 0.95:
            label.remove()


def _short(value: float) -> str:
    return f"{value:.4g}".replace("-", "−")


def _trajectory(ax: Any, surface: "Surface") -> None:
    path = surface.plane.get("trajectory")
    if path is not None:
        ax.plot(*np.asarray(path).T, "o-", color="white", markeredgecolor="black", ms=4, lw=1.0)
        ax.plot(*np.asarray(path)[-1], "*", color="white", markeredgecolor="black", ms=12)


def _shown(landscape: "FeatureLandscape", kind: str) -> np.ndarray:
    """Field of shape (levels, times or 1, ..., columns)."""
    if kind not in _SYMBOLS:
        raise InputError("kind", repr(kind), ", ".join(map(repr, _SYMBOLS)))
    return np.asarray(
        getattr(landscape, kind) if kind in ("loss", "probability") else getattr(landscape, kind)[:, None]
    )


def _paths(ax: Any, landscape: "FeatureLandscape", level: int, count: int) -> list[Any]:
    """Draw trajectories, each label in a colour and with a mark at its end; return one of each, in their order."""
    if not count or landscape.trajectories is None or landscape.labels is None:
        return []
    from matplotlib import colormaps
    from matplotlib.patheffects import Normal, Stroke

    colours = colormaps["tab10"]
    edge = [Stroke(linewidth=1.8, foreground="white"), Normal()]  # seen on dark ground and on light
    paths, drawn = landscape.trajectories[level].swapaxes(0, 1), dict[int, Any]()
    for label, path in sorted(zip(map(int, landscape.labels[:count]), paths, strict=False), key=lambda pair: pair[0]):
        look = {"color": colours(label % 10), "marker": _MARKS[label % len(_MARKS)], "markevery": [-1], "ms": 4.5}
        name = None if label in drawn else str(label)
        (line,) = ax.plot(*path.T, lw=0.8, markeredgewidth=0, path_effects=edge, label=name, **look)
        drawn.setdefault(label, line)
    return list(drawn.values())
