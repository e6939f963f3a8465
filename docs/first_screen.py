"""Draw the four figures of the first screen from what the blocks of README.md leave, and print what they print.

Run it from the root of the repository when a block changes: ``python docs/first_screen.py``.
"""

import re
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("agg")
import matplotlib.pyplot as plt

FOLDER = Path(__file__).parent / "_static" / "first"
BLUE, RED, GREY = "#0072b2", "#d55e00", "#8a8f98"


def panel() -> tuple[Any, Any]:
    return plt.subplots(figsize=(6.0, 2.6), layout="constrained")


def number(names: dict[str, Any]) -> Any:
    figure, ax = panel()
    price = np.linspace(60.0, 140.0, 200)
    ax.plot(price, np.maximum(price - 100.0, 0.0), color=GREY, ls="--", label="payoff in a year")
    ax.plot(price, names["solution"](price[:, None]), color=BLUE, label="value today")
    ax.plot(100.0, names["solution"](100.0), "o", color=RED)
    ax.set(xlabel="price of the stock", ylabel="value of the call")
    ax.legend(frameon=False)
    return figure


def control(names: dict[str, Any]) -> Any:
    figure, ax = panel()
    place = np.linspace(-1.5, 1.5, 301)
    for t, colour in ((0.0, BLUE), (0.8, RED), (0.95, GREY)):
        ax.plot(place, names["best"].policy(t, place[:, None])[:, 0], color=colour, label=f"t = {t:g}")
    ax.set(xlabel="place $x$", ylabel="force")
    ax.legend(frameon=False)
    return figure


def data(names: dict[str, Any]) -> Any:
    figure, axes = plt.subplots(1, 2, figsize=(6.0, 2.6), layout="constrained", width_ratios=(2, 1), sharey=True)
    axes[0].plot(names["times"], names["path"], ".-", color=GREY, ms=2.5, lw=0.5)
    axes[0].set(xlabel="time", ylabel="state")
    place = np.linspace(-2.0, 2.0, 200)
    for strength, colour, label in ((1.0, GREY, "true"), (names["fit"].x[0], BLUE, "fitted")):
        axes[1].plot(strength * (place**4 / 4 - place**2 / 2), place, color=colour, label=label)
    axes[1].set(xlabel="potential", xlim=(-0.3, 0.5))
    axes[1].legend(frameon=False, fontsize=8)
    return figure


def network(names: dict[str, Any]) -> Any:
    figure, ax = panel()
    told = names["told"]
    place = np.arange(len(told.rows))
    for shift, readings, colour, label in (
        (-0.2, told.viscosity, BLUE, "first order of the diffusion"),
        (0.2, told.jumps, RED, "jumps"),
    ):
        values = [one.value for one in readings]
        errors = [one.standard_error for one in readings]
        ax.bar(place + shift, values, 0.38, yerr=errors, color=colour, label=label, capsize=2)
    ax.set_xticks(place, [f"layer {k + 1}" for k in place])
    ax.set(ylabel="added to the loss")
    ax.legend(frameon=False)
    return figure


def main() -> None:
    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    for code in re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        exec(code, names)
    FOLDER.mkdir(exist_ok=True)
    for draw in (number, control, data, network):
        draw(names).savefig(FOLDER / f"{draw.__name__}.png", dpi=110)


if __name__ == "__main__":
    main()
