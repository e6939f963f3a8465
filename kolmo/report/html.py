"""Blocks to HTML: no external resources, readable on a phone and on paper.

The only script is the one that turns reliefs; a report without them has none.
"""

import base64
import functools
import html
import importlib.resources
import json
import math
import numbers
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kolmo.errors import InputError
from kolmo.files import FileError, plain, read_bytes, write_bytes
from kolmo.report.blocks import Block, Code, Figure, Measured, Relief, Section, Table

__all__ = ["as_html", "write_html"]

_MEDIA = {".png": "image/png", ".svg": "image/svg+xml"}
# Bytes of a figure that is put into a page.
_MAX_FIGURE = 64 * 2**20

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>
{style}</style>
</head>
<body>
<header>
<h1>{title}</h1>
{subtitle}</header>
<main>
{sections}
</main>
{script}</body>
</html>
"""


def write_html(path: str | Path, title: str, sections: Sequence[Section], *, subtitle: str = "") -> Path:
    """Write a report as one self-contained HTML file.

    Parameters
    ----------
    path : path
        The file; an older one is replaced in one step.
    title : str
        The title.
    sections : sequence of Section
        The report.
    subtitle : str, optional
        A line under the title.

    Returns
    -------
    pathlib.Path
        The path.

    Examples
    --------
    >>> import tempfile
    >>> table = Table(["depth", "difference"], [[8, Measured(0.012, 0.0004)], [16, Measured(0.0061, 0.0003)]])
    >>> path = write_html(Path(tempfile.mkdtemp()) / "report.html", "Depth", [Section("Result", ["It falls.", table])])
    >>> "0.01200 ± 0.00040" in path.read_text(encoding="utf-8")
    True
    """
    write_bytes(Path(path), as_html(title, sections, subtitle))
    return Path(path)


def as_html(title: str, sections: Sequence[Section], subtitle: str, folder: Path | None = None) -> bytes:
    """The page; figures must lie in the folder if one is given."""
    turned = any(isinstance(block, Relief) for section in sections for block in section.blocks)
    page = _PAGE.format(
        title=html.escape(title),
        subtitle=f'<p class="subtitle">{_text(subtitle)}</p>\n' if subtitle else "",
        style=_part("style.css"),
        sections="\n".join(_section(section, folder) for section in sections),
        script=f"<script>\n{_part('relief.js')}</script>\n" if turned else "",
    )
    return page.encode(errors="replace")  # a folder's name may hold bytes that are no text


def _part(name: str) -> str:
    """A file of this folder that goes into the page."""
    return importlib.resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _section(section: Section, folder: Path | None) -> str:
    body = "\n".join(_figure(block, folder) if isinstance(block, Figure) else _block(block) for block in section.blocks)
    return f"<section>\n<h2>{html.escape(section.title)}</h2>\n{body}\n</section>"


@functools.singledispatch
def _block(block: Block) -> str:
    raise InputError("blocks", f"a {type(block).__name__}", "a string, Figure, Table, Code or Relief")


@_block.register
def _paragraph(block: str) -> str:
    return f"<p>{_text(block)}</p>"


@_block.register
def _code(block: Code) -> str:
    return f'<pre tabindex="0"><code>{html.escape(block.text)}</code></pre>'


def _figure(block: Figure, folder: Path | None) -> str:
    caption = f"\n<figcaption>{_text(block.caption)}</figcaption>" if block.caption else ""
    source = _embedded(Path(block.path), folder)
    return f'<figure>\n<img src="{source}" alt="{html.escape(block.alt)}">{caption}\n</figure>'


@_block.register
def _table(block: Table) -> str:
    for row in block.rows:
        if len(row) != len(block.header):
            raise InputError(
                "rows", f"a row of {len(row)} cells: {list(row)}", f"{len(block.header)}, as in the header"
            )
    numeric = [all(_is_number(row[column]) for row in block.rows) for column in range(len(block.header))]
    head = "".join(_cell("th", title, right) for title, right in zip(block.header, numeric, strict=True))
    cells = [zip(row, numeric, block.header, strict=True) for row in block.rows]
    rows = ["".join(_cell("td", cell, right, title) for cell, right, title in row) for row in cells]
    body = "\n".join(f'<tr role="row">{row}</tr>' for row in rows)
    caption = f"<figcaption>{_text(block.caption)}</figcaption>\n" if block.caption else ""
    # Roles are said: shown as cards on a phone, it would be no table any more for those who hear it.
    kind = ' class="cards"' if len(block.header) > 2 else ""
    head, body = f'<thead role="rowgroup">\n<tr role="row">{head}</tr>', f'<tbody role="rowgroup">\n{body}'
    table = f'<table{kind} role="table">\n{head}\n</thead>\n{body}\n</tbody>\n</table>'
    # The caption stays in sight while a wide table scrolls under it.
    return f'<figure>\n{caption}<div class="scroll" tabindex="0">\n{table}\n</div>\n</figure>'


_RELIEF = """<figure class="relief">
<script type="application/json">{data}</script>
<canvas role="img" aria-label="{alt}" tabindex="0"></canvas>
<label{hidden}>{slider} <input type="range" min="0" max="{last}" step="1" value="0"></label>
<output></output>
<noscript><p>{alt}. This figure is drawn by a script.</p></noscript>
{caption}</figure>"""
_POINTS = 61  # along an axis: more are not seen, and take long to draw


@_block.register
def _relief(block: Relief) -> str:
    stack = _stacked(block)
    low, high = float(np.nanmin(stack)), float(np.nanmax(stack))
    log = low > 0 and (high > 5 * low if block.log is None else block.log)
    steps = [max(1, math.ceil(len(axis) / _POINTS)) for axis in block.axes]
    stack = stack[:, :: steps[0], :: steps[1]]
    height = np.log10(stack) if log else stack
    data = {
        "axes": [_rounded(np.asarray(axis, dtype=float)[::step]) for axis, step in zip(block.axes, steps, strict=True)],
        "levels": list(block.fields),
        "heights": _rounded(height),
        "range": [math.log10(low), math.log10(high)] if log else [low, high],
        "log": log,
        "name": block.height,
        "labels": list(block.labels),
    }
    return _RELIEF.format(
        data=json.dumps(plain(data), separators=(",", ":")).replace("<", "\\u003c"),  # no text ends the script
        alt=html.escape(block.alt),
        hidden=" hidden" if len(stack) == 1 else "",
        slider=html.escape(block.slider),
        last=len(stack) - 1,
        caption=f"<figcaption>{_text(block.caption)}</figcaption>\n" if block.caption else "",
    )


def _stacked(block: Relief) -> np.ndarray[Any, Any]:
    """The fields as one array, checked."""
    shape = tuple(len(axis) for axis in block.axes)
    fields = [np.asarray(field, dtype=float) for field in block.fields.values()]
    for name, field in zip(block.fields, fields, strict=True):
        if field.shape != shape or len(shape) != 2 or min(shape) < 2:
            raise InputError("fields", f"{name!r} of shape {field.shape} on axes of {shape}", "a field over a plane")
        if not np.isfinite(field).any():
            raise InputError("fields", f"{name!r} without a finite value", "values to draw")
    if not fields:
        raise InputError("fields", "none", "at least one")
    stack = np.stack(fields)
    return np.where(np.isfinite(stack), stack, np.nan)


def _rounded(values: np.ndarray[Any, Any]) -> Any:
    """Nested lists of five digits: as many as a figure shows."""
    return np.vectorize(lambda value: float(f"{value:.5g}"), otypes=[float])(values).tolist()


def _cell(tag: str, content: object, right: bool, title: str = "") -> str:
    scope = ' scope="col" role="columnheader"' if tag == "th" else f' role="cell" data-title="{html.escape(title)}"'
    align = ' class="number"' if right else ""
    return f"<{tag}{scope}{align}>{_breakable(_text(_shown(content)))}</{tag}>"


def _breakable(text: str) -> str:
    """Names such as a.long_name may break after their dots and underscores, so that tables fit a phone."""
    return re.sub(r"(?<=[a-z])([._])(?=\w)", r"\1<wbr>", text)


def _is_number(cell: object) -> bool:
    return cell is None or isinstance(cell, Measured | numbers.Real)


def _shown(cell: object) -> str:
    if cell is None:
        return "–"
    if isinstance(cell, numbers.Real) and not isinstance(cell, numbers.Integral):
        return f"{float(cell):.4g}"
    return str(cell)


def _text(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))


def _embedded(path: Path, folder: Path | None) -> str:
    media = _MEDIA.get(path.suffix.lower())
    if media is None:
        raise InputError("path", path, "a figure that ends in .png or .svg")
    if folder is not None and not path.resolve().is_relative_to(folder.resolve()):
        raise FileError(f"the figure {path} lies outside {folder}: it is not put into its report.")
    content = read_bytes(path, _MAX_FIGURE, in_run=folder is not None)
    return f"data:{media};base64,{base64.b64encode(content).decode()}"
