"""The figures of the demo: fit for a talk, readable without colour vision."""

from typing import Any

import numpy as np
from kolmo.experiments._digits import REACH
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

RESOLVED = 10.0  # a difference counts where it is this many times its error estimate
PLANE = np.linspace(-REACH, REACH, 81)  # axis of the plane of the encoder's features
WIDE = np.linspace(-5.0, 5.0, 201)  # axis of the plane of final features
SHOWN = 60  # held-out digits whose trajectories are drawn
# Ten colours that stay apart under the common colour deficiencies (Paul Tol's muted scheme, and a grey); the digits are
# written out as well.
COLOURS = ["#332288", "#88CCEE", "#44AA99", "#117733", "#999933", "#DDCC77", "#CC6677", "#882255", "#AA4499", "#777777"]
MEASURES = {
    "mean_gradient": "mean |∇u|",
    "largest_laplacian": "max |Δu|",
    "largest_probability_slope": "max slope of a probability",
    "largest_change": "max change of u",
}

FLOW = (
    "Shaded: the class that the head reads off at each point of the plane. Lines: noisy passes of held-out digits, "
    "from the encoder's feature (dot) to the final one (the digit itself)."
)
SURFACES = (
    "Expected loss u(0, x) of one class, started at x, on one scale. Above: the weights trained without noise, "
    "the noise switched on. In the middle: what that changes. Below: weights trained with that noise. White dots: "
    "held-out digits of the class. Scales end where these do."
)
DEPTH = (
    "Root-mean-square difference of network and PDE loss over the held-out digits, one vector field at every depth. "
    "Bars: error estimates of PDE and recursion together. Hollow: not resolved, less than ten times that estimate. "
    "Dotted: slopes of first and second order."
)
SMOOTHING = (
    "The loss surface at the held-out digits: mean |∇u| and max |Δu| for the true class, the steepest class "
    "probability, and the largest change of a class loss against the same weights without noise. Bars: standard error "
    "over seeds, where there are several."
)


def draw(digit: int, first: dict[str, Any], results: dict[str, Any]) -> dict[str, Figure]:
    """All figures by name, from what the first seed found and from the results."""
    return {
        "flow": flow(first),
        "surfaces": surfaces(digit, first),
        "depth": depth({name: seeds[0] for name, seeds in results["depth"].items()}),
        "smoothing": smoothing(results["smoothing"]),
    }


def flow(found: dict[str, Any]) -> Figure:
    """Decision regions with noisy trajectories, a panel for each noise."""
    figure, axes = _panels(len(found["trained"]), (4.6, 4.6))
    for ax, (name, one) in zip(axes, found["trained"].items(), strict=True):
        regions = one["regions"].reshape(len(WIDE), len(WIDE)).T
        ax.imshow(
            regions,
            origin="lower",
            extent=2 * (WIDE[0], WIDE[-1]),
            cmap=ListedColormap(COLOURS),
            vmin=-0.5,
            vmax=9.5,
            alpha=0.3,
            interpolation="nearest",
        )
        for path, label in zip(one["lines"].swapaxes(0, 1)[:SHOWN], found["labels"][:SHOWN], strict=True):
            ax.plot(*path.T, color=COLOURS[label], linewidth=0.8)
            ax.plot(*path[0], ".", color="black", markersize=2.5)
            ax.text(*path[-1], str(label), ha="center", va="center", fontsize=8, fontweight="bold")
        accuracy = f"{one['accuracy']:.3f}"
        ax.set(title=f"{name}: accuracy {accuracy}", xlabel="feature 1", ylabel="feature 2", aspect="equal")
        ax.set(xlim=WIDE[[0, -1]], ylim=WIDE[[0, -1]])
    return figure


def surfaces(digit: int, found: dict[str, Any]) -> Figure:
    """u(0, ·) of one class: noise at the weights trained without, what it changes, weights trained with it."""
    rows = [
        [(name, "trained without noise", one) for name, one in found["fixed"].items()],
        [(name, "trained with it", one) for name, one in list(found["trained"].items())[1:]],
    ]
    # the scale ends where digits of the class do: beyond, the loss goes to ten times as much, and panels look alike
    mine = found["labels"] == digit
    highest = max(one["losses"][mine, digit].max() for row in rows for _, _, one in row)
    levels = MaxNLocator(14).tick_values(0.0, highest)
    figure = Figure(figsize=(3.2 * len(rows[0]) + 0.9, 10.0), layout="constrained")
    panels = figure.subplots(3, len(rows[0]), sharex=True, sharey=True, squeeze=False)
    grid = panels[[0, 2]]
    changes(panels[1], digit, mine, [(name, one) for name, _, one in rows[0]])
    for ax, (name, training, one) in zip(grid.ravel(), [*rows[0], *rows[1]], strict=True):
        field = np.maximum(one["plane"][:, digit], 0.0).reshape(len(PLANE), len(PLANE)).T
        filled = ax.contourf(PLANE, PLANE, field, levels, cmap="cividis", extend="max")
        ax.contour(PLANE, PLANE, field, levels[1::2], colors="white", linewidths=0.4, alpha=0.6)
        ax.plot(
            *one["points"][mine].T, "o", color="white", markeredgecolor="black", markersize=3.5, markeredgewidth=0.6
        )
        ax.set(title=f"{name},\n{training}", aspect="equal")
    for ax in grid[-1]:
        ax.set_xlabel("feature 1")
    for ax in grid[:, 0]:
        ax.set_ylabel("feature 2")
    for row in grid:
        figure.colorbar(filled, ax=list(row), label=f"expected loss $u(0, x)$ of class {digit}", shrink=0.85)
    return figure


def changes(axes: Any, digit: int, mine: np.ndarray, surfaces: list[tuple[str, dict[str, Any]]]) -> None:
    """What noise changes at fixed weights, on one scale about zero; the first panel has none, and stays empty."""
    (_, plain), *noisy = surfaces
    fields = [one["plane"][:, digit] - plain["plane"][:, digit] for _, one in noisy]
    most = max((float(np.abs((one["losses"] - plain["losses"])[mine, digit]).max()) for _, one in noisy), default=0.0)
    levels = np.linspace(-most, most, 16) if most > 0 else np.linspace(-1.0, 1.0, 16)
    axes[0].set_axis_off()
    for ax, (name, _), field in zip(axes[1:], noisy, fields, strict=False):
        filled = ax.contourf(
            PLANE, PLANE, field.reshape(len(PLANE), len(PLANE)).T, levels, cmap="RdBu_r", extend="both"
        )
        ax.set(title=f"{name}\nminus no noise", aspect="equal")
    if noisy:
        axes[0].figure.colorbar(filled, ax=list(axes), label="change", format="%.2g", shrink=0.85)


def depth(found: dict[str, Any]) -> Figure:
    """Difference against depth, a panel for each noise, the orders told apart by marker and colour."""
    figure = Figure(figsize=(4.2 * len(found), 4.6), layout="constrained")
    axes = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
    for ax, (name, numbers) in zip(axes, found.items(), strict=True):
        for order, colour, marker in ((1, COLOURS[0], "o"), (2, COLOURS[6], "s")):
            if f"order {order}" in numbers:
                _depth_line(ax, numbers["depths"], order, numbers[f"order {order}"], colour, marker)
        depths = numbers["depths"]
        ax.set(title=name, xlabel="depth $L$", xscale="log", yscale="log")
        ax.set_xticks(depths, [str(L) for L in depths])
        ax.minorticks_off()
        ax.grid(alpha=0.3)
    # Room under the lines, so that the legend hides nothing.
    low, high = axes[0].get_ylim()
    axes[0].set_ylim(low / 8, high * 1.3)
    for ax in axes:
        ax.legend(loc="lower left", fontsize=9)
    axes[0].set_ylabel("network loss − PDE loss (root mean square)")
    return figure


def _depth_line(ax: Any, depths: Any, order: int, numbers: dict[str, Any], colour: str, marker: str) -> None:
    difference, error = np.asarray(numbers["difference"]), np.asarray(numbers["error_estimate"])
    L = np.asarray(depths, dtype=float)
    ax.plot(L, 0.5 * difference[0] * (L / L[0]) ** -order, color="0.6", linestyle="dotted", zorder=1)
    slope = "not resolved" if numbers["slope"] is None else f"slope {numbers['slope']:.2f}"
    lower = np.minimum(error, 0.9 * difference)  # a bar that reaches zero has no end on a logarithmic axis
    ax.errorbar(L, difference, yerr=[lower, error], color=colour, capsize=3)
    ax.plot(L, difference, marker, color=colour, markerfacecolor="white", zorder=3)
    resolved = difference >= RESOLVED * error
    label = f"against order {order}: {slope}"
    ax.plot(L[resolved], difference[resolved], marker, color=colour, zorder=4, label=label)


def smoothing(measures: dict[str, Any]) -> Figure:
    """Four measures of the surface against the noise, for fixed and for trained weights."""
    figure, axes = _panels(len(MEASURES), (4.8, 3.2))
    names = list(measures["trained"])
    styles = {
        "fixed": ("weights trained without noise", COLOURS[0], "o", -0.06),
        "trained": ("weights trained with the noise", COLOURS[6], "s", 0.06),
    }
    for ax, (key, title) in zip(axes, MEASURES.items(), strict=True):
        for weights, (label, colour, marker, shift) in styles.items():
            shown = {name: levels[key] for name, levels in measures[weights].items() if key in levels}
            ax.errorbar(
                [names.index(name) + shift for name in shown],
                [numbers["mean"] for numbers in shown.values()],
                yerr=[numbers["standard_error"] or 0.0 for numbers in shown.values()],
                color=colour,
                marker=marker,
                linestyle="none",
                markersize=8,
                capsize=4,
                label=label,
            )
        ax.set(xlabel="noise", ylabel=title)
        top = 1.1 * ax.get_ylim()[1]
        ax.set_ylim(-0.04 * top, top)  # a little below zero, so that a marker at zero is whole
        ax.set_xticks(range(len(names)), names)
        ax.set_xlim(-0.5, len(names) - 0.5)
        ax.grid(axis="y", alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def _panels(count: int, size: tuple[float, float]) -> tuple[Figure, Any]:
    """Figure with so many panels in two columns, each of the given width and height."""
    rows = -(-count // 2)
    figure = Figure(figsize=(2 * size[0], rows * size[1]), layout="constrained")
    axes = figure.subplots(rows, 2, squeeze=False).ravel()
    for ax in axes[count:]:
        ax.set_axis_off()
    return figure, axes[:count]
