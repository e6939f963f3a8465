"""Where terminal data and policies break in one dimension, and how finely they have to be looked at there."""

from dataclasses import dataclass

import numpy as np
import torch
from scipy.ndimage import maximum_filter1d

from kolmo.control.bellman import Act, Bellman
from kolmo.control.charts import Chart, there
from kolmo.control.frame import Frame
from kolmo.grid.grading import Uniform
from kolmo.problem import KolmogorovProblem
from kolmo.schemes.terminal import common_break

Place = tuple[float, float]
"""Where a break is, in the chart's coordinate, and the width within which nodes crowd about it."""

# Width, as a part of the box, within which nodes crowd about a jump, and about a bend.
JUMP_WIDTH, BEND_WIDTH = 0.003, 0.02
# Places at which terminal data are looked at for breaks, and nodes of the grid on which a bend is found exactly.
PROBES, PROBE_NODES = 8001, 301
# A difference stands out where it is so many times those around it.
OUTSTANDING = 20.0
# Second differences of data below this part of their size are rounding; more bends than this are no bends.
ROUNDING, MANY = 1e-10, 8
# A jump is found to this part of the spacing of the places looked at.
PLACED = 1e-9
# A control switches where it moves by this part of its range from a node to the next.
SWITCHED = 0.5
# A control is at a bound within this part of its range.
BOUND = 1e-9
# The control matters where it can change the value by this part within the horizon (without one: of the most it can).
WORTH = 1e-3
# Controls of a long list that are compared for that.
COMPARED = 8
# More switches than this at a time are no curves that a grid can follow; nodes at the ends that are not looked at.
MOST, EDGE = 4, 4


@dataclass(frozen=True)
class Breaks:
    """Where terminal data break.

    Attributes
    ----------
    places : list of Place
        Where they jump or bend.
    node : float or None
        The one bend or jump, exactly, if it is the only break.
    jump : bool
        Whether they jump.
    """

    places: list[Place]
    node: float | None = None
    jump: bool = False


def terminal_breaks(problem: KolmogorovProblem, layout: Frame) -> Breaks:
    """Find where terminal data jump or bend in one dimension, in the chart's coordinate."""
    if problem.terminal is None:
        return Breaks([])
    low, high, chart = layout.box.lower[0], layout.box.upper[0], layout.charts[0]
    x = np.linspace(low, high, PROBES)[:, None]
    values = problem.final(torch.as_tensor(x if chart is None else chart.back(x))).detach().reshape(-1).numpy()
    if not np.isfinite(values).all():
        return Breaks([])
    jumps = x[:-1][_alone(np.diff(values), 1e-3 * float(np.ptp(values)))][:, 0] + 0.5 * (x[1, 0] - x[0, 0])
    width = JUMP_WIDTH * (high - low)
    if len(jumps) == 1:
        place = _exactly(problem, chart, float(jumps[0]), float(x[1, 0] - x[0, 0]))
        return Breaks([(place, width)], place, jump=True)
    if len(jumps):
        middle, spread = 0.5 * float(jumps.max() + jumps.min()), 0.5 * float(np.ptp(jumps))
        return Breaks([(middle, max(spread, width))], jump=True)
    bends = x[1:-1][_alone(np.diff(values, 2), ROUNDING * float(np.abs(values).max()))][:, 0]
    groups = np.split(bends, np.flatnonzero(np.diff(bends) > 3.0 * (x[1, 0] - x[0, 0])) + 1) if len(bends) else []
    places = [(float(group.mean()), BEND_WIDTH * (high - low)) for group in groups]
    if len(places) != 1:
        return Breaks(places if len(places) <= MANY else [])
    probe = Frame(layout.box, (Uniform(low, high),), layout.charts).grid(PROBE_NODES)
    found = common_break(problem, probe, 0)
    found = found if found is None or chart is None else float(chart.forth(found))
    return Breaks([(found, places[0][1])] if found is not None else places, found)


def _exactly(problem: KolmogorovProblem, chart: Chart | None, place: float, cell: float) -> float:
    """The place of a jump, closed in by halves."""

    def value(y: float) -> float:
        x = torch.as_tensor([[y if chart is None else float(chart.back(y))]], dtype=torch.float64)
        return float(problem.final(x).reshape(()))

    low, high = place - cell, place + cell
    below, above = value(low), value(high)
    while high - low > PLACED * cell:
        middle = 0.5 * (low + high)
        now = value(middle)
        if abs(now - below) < abs(now - above):
            low, below = middle, now
        else:
            high, above = middle, now
    return 0.5 * (low + high)


def _alone(differences: np.ndarray, least: float) -> np.ndarray:
    """Indices of differences that stand out: they do not shrink with the spacing as those around them do."""
    step = np.abs(differences)
    around = np.array([np.roll(step, shift) for shift in (-3, -2, 2, 3)]).max(0)
    return np.flatnonzero((step > OUTSTANDING * around) & (step > least) & (step > 1e-9 * step.max(initial=0.0)))


@dataclass(frozen=True)
class Sight:
    """What a coarse solution shows of its policy.

    Attributes
    ----------
    places : list of Place
        Where it switches or begins to stop, all times together; none where that is everywhere.
    kinked : bool
        Whether it switches, stops or meets a bound anywhere.
    """

    places: list[Place]
    kinked: bool


def look(
    bellman: Bellman, times: list[float], states: list[np.ndarray], acts: list[Act], layout: Frame, size: float
) -> Sight:
    """Look at the policies of a coarse solution in one dimension; ``size`` is that of the values that matter."""
    samples = bellman.problem.controls.samples
    low, high = samples.min(0), samples.max(0)
    spread = np.where(high > low, high - low, np.inf)
    y = there(bellman.grid.points, layout.charts)[:, 0]
    cells: set[int] = set()
    kinked = crowded = False
    for t, V, act in zip(times, states, acts, strict=True):
        share = (act.a.numpy() - low) / spread
        matters = _matters(bellman, t, V, act, size)
        met = (np.abs(np.diff(share, axis=0)) > SWITCHED).any(-1) & matters
        if act.stop is not None:
            met |= act.stop[1:] != act.stop[:-1]
        held = (share > 1.0 - BOUND) * 1 - (share < BOUND) * 1
        bounds = (np.diff(held, axis=0) != 0).any(-1) & matters
        inner = slice(EDGE, len(y) - 1 - EDGE)
        kinked |= bool((met | bounds)[inner].any())
        found = np.flatnonzero(met[inner]) + EDGE
        crowded |= len(found) > MOST
        cells |= set(found.tolist())
    return Sight([] if crowded or not cells else _places(bellman, y, np.array(sorted(cells))), kinked)


def _places(bellman: Bellman, y: np.ndarray, cells: np.ndarray) -> list[Place]:
    """Groups of neighbouring cells as places: as wide as they are, or as the layer that noise makes of a switch."""
    thickness = _thickness(bellman, cells) * (y[cells + 1] - y[cells])
    length = y[-1] - y[0]
    places = []
    for group in np.split(np.arange(len(cells)), np.flatnonzero(np.diff(cells) > 2) + 1):
        low, high = y[cells[group[0]]], y[cells[group[-1]] + 1]
        needed = float(np.clip(thickness[group].min(), JUMP_WIDTH * length, BEND_WIDTH * length))
        swept = 0.5 * (high - low) if len(group) > 2 else 0.0
        places.append((0.5 * float(low + high), max(float(swept), needed)))
    return places


def _matters(bellman: Bellman, t: float, V: np.ndarray, act: Act, size: float) -> np.ndarray:
    """Cells about which it makes a difference to the value what is done; elsewhere switches are rounding."""
    p, M = bellman.derivatives(t, V, act)
    options = bellman.problem.controls.samples[:: max(1, len(bellman.problem.controls.samples) // COMPARED)]
    worth = np.ptp([bellman.coefficients.hamiltonian(t, V[:, 0], p, M, bellman.start(a).a) for a in options], axis=0)
    horizon = bellman.problem.horizon
    scale = worth.max(initial=0.0) if horizon is None else (np.abs(V[:, 0]) + size) / horizon
    matters = np.asarray(maximum_filter1d(worth, 5) > WORTH * scale)
    return np.asarray(matters[1:] | matters[:-1])


def _thickness(bellman: Bellman, cells: np.ndarray) -> np.ndarray:
    """Cells over which noise balances the drift that the control can make."""
    samples = bellman.problem.controls.samples
    parts = [bellman.local(0.0, bellman.start(a).a) for a in samples]
    drift = np.ptp([p.A[cells, 0] for p in parts], axis=0)
    noise = np.max([p.S[cells, 0, 0] for p in parts], axis=0)
    return np.asarray(noise / np.maximum(drift, 1e-300))


def together(breaks: Breaks, found: list[Place], cell: float) -> list[Place]:
    """Breaks of the terminal data and of the policy; where they coincide, the place is that of the data.

    About a jump the width stays that of the jump: what is lost there in the first instants is of first order.
    """
    places = list(breaks.places)
    for centre, width in found:
        same = [k for k, (place, _) in enumerate(places) if abs(place - centre) <= max(1.5 * cell, width)]
        if not same:
            places.append((centre, width))
        for k in same:
            narrow = breaks.jump or width < 1.5 * cell
            places[k] = places[k][0], (min if narrow else max)(places[k][1], width)
    return sorted(places)
