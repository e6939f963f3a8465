"""Interactive landscapes: one self-contained HTML file with a slider for the noise level."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kolmo import files
from kolmo.errors import InputError, MissingExtraError
from kolmo.landscape.features import FeatureLandscape
from kolmo.landscape.surface import Surface


def write_html(
    content: Mapping[str, Surface] | FeatureLandscape,
    path: str | os.PathLike[str],
    *,
    title: str = "Loss landscape",
    log: bool = True,
    column: int = 0,
    kind: str = "loss",
) -> None:
    """Write surfaces in three dimensions to an HTML file that opens offline, with a slider.

    Parameters
    ----------
    content : dict of str to Surface, or FeatureLandscape
        Surfaces by the name of their noise level, on planes; or a landscape of two features, whose slider goes over its
        noise levels and, within each, its times.
    path : path
        The file.
    title : str
        The title.
    log : bool
        Logarithmic height, where all values are positive.
    column : int
        The class, of a `FeatureLandscape`.
    kind : {"loss", "probability"}
        What of a `FeatureLandscape` is shown.

    Raises
    ------
    MissingExtraError
        Without plotly, which the extra ``plotly`` of kolmo brings.
    InputError
        Without any surface, or for lines.

    Examples
    --------
    >>> import torch
    >>> from kolmo import landscape
    >>> model = torch.nn.Linear(2, 1)
    >>> loss = lambda f: f.weight.square().sum()
    >>> found = landscape.surface(loss, model, landscape.random_plane(model), points=5)
    >>> landscape.write_html({"no noise": found}, "landscape.html")  # doctest: +SKIP
    """
    try:
        import plotly.graph_objects as go
    except ImportError:
        raise MissingExtraError("plotly", "plotly") from None
    if isinstance(content, FeatureLandscape):
        names, axes, fields = _of_features(content, column, kind)
        labels, height = ("feature 1", "feature 2"), f"{kind} of class {column}"
    else:
        names, axes, fields = _of_surfaces(content)
        first = next(iter(content.values()))
        shared = len({one.plane.get("fingerprint") for one in content.values()}) == 1
        one, other = (first.label(k) if shared else f"direction {k + 1}" for k in (0, 1))
        labels = one, other
        height = first.name
    stack = np.stack(fields)
    log = log and bool(np.nanmin(stack) > 0)
    shown = np.log10(stack) if log else stack
    limits = float(np.nanmin(shown)), float(np.nanmax(shown))
    traces = [
        go.Surface(
            x=axes[0],
            y=axes[1],
            z=z.T,
            customdata=field.T,
            cmin=limits[0],
            cmax=limits[1],
            colorscale="Cividis",
            visible=k == 0,
            name=name,
            hovertemplate="%{x:.3g}, %{y:.3g}<br>" + height + " %{customdata:.4g}<extra></extra>",
            colorbar={"title": f"log₁₀ {height}" if log else height},
        )
        for k, (name, z, field) in enumerate(zip(names, shown, stack, strict=True))
    ]
    figure = go.Figure(traces)
    figure.update_layout(
        title=title,
        sliders=[_slider(names)],
        scene={
            "xaxis_title": labels[0],
            "yaxis_title": labels[1],
            "zaxis": {"title": f"log₁₀ {height}" if log else height, "range": limits},
            "aspectmode": "manual",  # the same box for every surface
            "aspectratio": {"x": 1.0, "y": 1.0, "z": 0.8},
            "camera": {"eye": {"x": 1.5, "y": 1.5, "z": 1.1}, "center": {"x": 0.0, "y": 0.0, "z": -0.2}},
        },
        margin={"l": 20, "r": 20, "b": 40, "t": 50},
    )
    page = figure.to_html(include_plotlyjs=True, full_html=True, div_id="landscape", default_height="95vh")
    files.write_bytes(Path(path), page.encode())


def _slider(names: Sequence[str]) -> dict[str, Any]:
    """A slider that shows one of the surfaces."""
    steps = [
        {"label": name, "method": "update", "args": [{"visible": [i == k for i in range(len(names))]}]}
        for k, name in enumerate(names)
    ]
    place = {"pad": {"t": 20}, "x": 0.05, "len": 0.9}
    return {"active": 0, "currentvalue": {"prefix": "noise: "}, "steps": steps, **place}


def _of_surfaces(surfaces: Mapping[str, Surface]) -> tuple[list[str], Any, list[np.ndarray]]:
    if not surfaces:
        raise InputError("content", "no surface", "at least one")
    first = next(iter(surfaces.values()))
    for name, one in surfaces.items():
        same = len(one.axes) == 2 and all(map(np.array_equal, one.axes, first.axes))
        if not same:
            raise InputError("content", f"{name!r} on other points, or on a line", "surfaces on the same plane grid")
    return list(surfaces), first.axes, [one.mean for one in surfaces.values()]


def _of_features(landscape: FeatureLandscape, column: int, kind: str) -> tuple[list[str], Any, list[np.ndarray]]:
    if kind not in ("loss", "probability") or len(landscape.axes) != 2:
        raise InputError("kind", repr(kind), "'loss' or 'probability' of a landscape of two features")
    several = len(landscape.times) > 1
    names, fields = [], []
    for level, values in zip(landscape.levels, getattr(landscape, kind), strict=True):
        for t, field in zip(landscape.times, values[..., column], strict=True):
            names.append(f"{level}, t = {t:.2f}" if several else level)
            fields.append(field)
    return names, landscape.axes, fields
