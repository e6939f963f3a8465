"""Axes, levels and labels that plots of landscapes share."""

from typing import TYPE_CHECKING, Any

import numpy as np

from kolmo.errors import InputError

if TYPE_CHECKING:
    from kolmo.landscape.features import FeatureLandscape
    from kolmo.landscape.surface import Surface

MARKS = "osD^vP<X>*p"  # one more than colours: labels that share a colour have different ones

MAP = "cividis"
# Of differences: white at zero.
DIFFERENCES = "RdBu_r"
DASHES = ("-", "--", "-.", ":")  # curves that coincide, or are printed in grey, can still be told apart
LEVELS = 20
SYMBOLS = {"loss": "u", "probability": "p", "slope": "|∇u|", "laplacian": "Δu"}


def new_axes(ax: Any) -> Any:
    """The axes given, or fresh ones."""
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    return plt.subplots(layout="constrained")[1]


def field_on_plane(surface: "Surface") -> np.ndarray:
    """The mean of a surface over a plane, of which something was computed."""
    if len(surface.axes) != 2:
        raise InputError("surface", "a line", "a surface over a plane", "landscape.plots.cut draws lines")
    field = np.where(np.isfinite(surface.mean), surface.mean, np.nan)
    if np.isnan(field).all():
        raise InputError("surface", "no finite value", "a loss that is finite somewhere on the plane")
    return field


def filled_contours(
    ax: Any, surface: "Surface", levels: np.ndarray, log: bool, lines: bool, style: dict[str, Any]
) -> Any:
    """Filled contours of a surface on given levels, with lines, labels and trajectory; return what was filled."""
    from matplotlib.colors import LogNorm

    field = field_on_plane(surface)
    centred = {} if log else centred_colours(levels, surface.is_difference)
    given = {"cmap": MAP, "extend": "neither"} | ({"norm": LogNorm()} if log else centred) | style
    filled = ax.contourf(*surface.axes, field.T, levels, **given)
    values = rounded_ends(levels[0], levels[-1], log)
    if lines:
        depth = [abs(filled.norm(v) - 0.5) - 0.35 if centred else 0.6 - filled.norm(v) for v in values]
        shade = ["white" if deep > 0 else "black" for deep in depth]
        drawn = ax.contour(*surface.axes, field.T, values, colors=shade, linewidths=0.5, alpha=0.8)
        _inside(ax, ax.clabel(drawn, fmt=_short, fontsize=8))
    _trajectory(ax, surface)
    ax.set(xlabel=surface.label(0), ylabel=surface.label(1))
    return filled


def centred_colours(levels: np.ndarray, always: bool = False) -> dict[str, Any]:
    """Colours for values of both signs, and always for differences: white at zero, as deep on either side."""
    if not (always or levels[0] < 0.0 < levels[-1]):
        return {}
    most = float(np.abs(levels).max())
    return {"cmap": DIFFERENCES, "vmin": -most, "vmax": most}


def colour_bar(filled: Any, ax: Any, label: str, levels: np.ndarray, log: bool) -> None:
    """Colour bar with round numbers, of one Axes or of several."""
    ticks = rounded_ends(levels[0], levels[-1], log)
    figure = (ax[0] if isinstance(ax, list) else ax).figure
    figure.colorbar(filled, ax=ax, label=label, ticks=ticks, format=lambda v, _: _short(v)).minorticks_off()


def small_multiples(figure: Any, rows: int, columns: int, count: int, **options: Any) -> np.ndarray:
    """So many axes of a grid; what is left of it is removed."""
    axes = figure.subplots(rows, columns, squeeze=False, **options).ravel()
    for ax in axes[count:]:
        ax.remove()
    return np.asarray(axes[:count])


def spans_decades(field: np.ndarray) -> bool:
    """Whether logarithmic levels show more."""
    low, high = float(np.nanmin(field)), float(np.nanmax(field))
    return low > 0 and high > 5 * low


def nice_levels(field: np.ndarray, levels: Any, log: bool) -> np.ndarray:
    """Levels from the lowest to the highest value."""
    if np.ndim(levels):
        return np.asarray(levels, dtype=float)
    low, high = float(np.nanmin(field)), float(np.nanmax(field))
    if high <= low:
        high = low + 1.0
    return np.geomspace(low, high, levels + 1) if log else np.linspace(low, high, levels + 1)


def rounded_ends(low: float, high: float, log: bool) -> np.ndarray:
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


def shown_points(landscape: "FeatureLandscape", kind: str) -> np.ndarray:
    """Field of shape (levels, times or 1, ..., columns)."""
    if kind not in SYMBOLS:
        raise InputError("kind", repr(kind), ", ".join(map(repr, SYMBOLS)))
    return np.asarray(
        getattr(landscape, kind) if kind in ("loss", "probability") else getattr(landscape, kind)[:, None]
    )


def draw_paths(ax: Any, landscape: "FeatureLandscape", level: int, count: int) -> list[Any]:
    """Draw trajectories, each label in a colour and with a mark at its end; return one of each, in their order."""
    if not count or landscape.trajectories is None or landscape.labels is None:
        return []
    from matplotlib import colormaps
    from matplotlib.patheffects import Normal, Stroke

    colours = colormaps["tab10"]
    edge = [Stroke(linewidth=1.8, foreground="white"), Normal()]  # seen on dark ground and on light
    paths, drawn = landscape.trajectories[level].swapaxes(0, 1), dict[int, Any]()
    for label, path in sorted(zip(map(int, landscape.labels[:count]), paths, strict=False), key=lambda pair: pair[0]):
        look = {"color": colours(label % 10), "marker": MARKS[label % len(MARKS)], "markevery": [-1], "ms": 4.5}
        name = None if label in drawn else str(label)
        (line,) = ax.plot(*path.T, lw=0.8, markeredgewidth=0, path_effects=edge, label=name, **look)
        drawn.setdefault(label, line)
    return list(drawn.values())
