r"""A problem whose faces move, in coordinates in which they stand still.

With :math:`x = a(t) + w(t)\,(\xi - \xi_0)` along each axis (:class:`kolmo.problem.motion.Motion`), v(t, ξ) = u(t, x)
solves the equation with the drift :math:`(b - \partial_tx)/w` and the covariance rate :math:`\Sigma_{ij}/(w_iw_j)` on a
box at rest; a wall that reflects still does, and an elastic one has κ/w. Everything that solves, differentiates or
simulates a problem sees that one; only points and times that are asked for are translated.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np

from kolmo.arrays import Array, detached, namespace
from kolmo.errors import InputError
from kolmo.problem.box import Box
from kolmo.problem.events import Event
from kolmo.problem.faces import Absorbing, Face, Robin
from kolmo.problem.motion import Curve, Motion, traced
from kolmo.problem.problem import KolmogorovProblem
from kolmo.problem.sde import SDE

__all__ = ["at_rest"]

# Bounds that meet are followed until they are this part of their first distance apart: what is left of the paths ends
# on them as if nothing but noise were there.
MET = 1e-4
# From where on they are less than this part apart, times at which the distance has fallen to a quarter are breakpoints.
NEAR, QUARTER = 0.5, 0.25
# Looks at the distance of two faces on each piece, and bisections that find where they meet.
LOOKS, BISECTIONS = 33, 60

Reference = tuple[Any, Any]


def at_rest(problem: KolmogorovProblem, reference: Reference | None = None) -> KolmogorovProblem:
    """The problem in coordinates in which no face moves; itself where none does.

    Parameters
    ----------
    problem : KolmogorovProblem
        Any.
    reference : (lower, upper), optional
        Ends of the box at rest, of a grid that is there already; None: the ends at t = 0, where both coordinates agree.

    Raises
    ------
    InputError
        For faces that begin in the wrong order or are smooth nowhere, and faces that meet
        although neither absorbs.

    Examples
    --------
    >>> import kolmo
    >>> bm, closing = kolmo.SDE(0.0, 1.0, dim=1), kolmo.Box(lambda t: t - 1.0, 1.0, "absorbing")
    >>> still = at_rest(kolmo.KolmogorovProblem(bm, lambda x: 1.0 + 0.0 * x[..., 0], 1.0, closing))
    >>> still.box, still.sde.drift(0.5, np.array([[-1.0], [1.0]])).tolist()
    (Box(-1..1 absorbing), [[-1.3333333333333333], [0.0]])
    """
    box = problem.box
    if not box.moves:
        return problem
    if reference is not None and len(reference[0]) != box.dim:
        raise InputError("grid", f"{len(reference[0])} axes", f"{box.dim} axes")
    assert problem.horizon is not None  # stationary problems with such faces are refused where they are made
    curves = [_carriers(box, axis, problem.horizon) for axis in range(box.dim)]
    met = [_met(pair, problem.horizon) for pair in curves]
    horizon = min((end for end, _ in met), default=problem.horizon)
    closing = [axis for axis, (end, _) in enumerate(met) if end < problem.horizon and end == horizon]
    ends = [_ends(box, axis, pair, reference) for axis, pair in enumerate(curves)]
    motion = Motion(tuple(curves), tuple(ends))
    nearer = [t for axis in closing for t in met[axis][1]]
    times = {*problem.sde.breakpoints, *motion.breaks, *nearer}
    known = {event.time: event for event in problem.events}
    happening = sorted(t for t in {*known, *motion.jumps} if t < horizon)
    still = copy.copy(problem)
    still.motion, still.horizon, still._handed = motion, horizon, problem.arrays
    still.sde = _process(problem.sde, motion, tuple(sorted(t for t in times if 0.0 < t < horizon)))
    still.sde.events = tuple(MovedEvent(t, (), problem, motion, known.get(t)) for t in happening)
    pairs = [tuple(_face(problem, motion, axis, f) for f in pair) for axis, pair in enumerate(box.faces)]
    still.box = Box([low for low, _ in ends], [high for _, high in ends], pairs)
    still.terminal = partial(_final, problem, motion, horizon)
    if closing:
        still.terminal, still.met = _Ended(problem, motion, horizon, closing[0]), True
    still.killing = partial(_outside, problem.rate, motion) if callable(problem.killing) else problem.killing
    still.source = partial(_outside, problem.running, motion) if callable(problem.source) else problem.source
    still.breaks = tuple(partial(_break, place, motion, horizon) for place in problem.breaks)
    return still


def _carriers(box: Box, axis: int, horizon: float) -> tuple[Curve | None, Curve | None]:
    """Courses of the ends of an axis that carry its coordinate."""
    if box.moving[axis] == (None, None):
        return None, None
    low, high = (
        None if face.cut else traced(end, horizon) for face, end in zip(box.faces[axis], box.ends(axis), strict=True)
    )
    return low, high


def _ends(
    box: Box, axis: int, pair: tuple[Curve | None, Curve | None], reference: Reference | None
) -> tuple[float, float]:
    """Ends of an axis at rest; one that does not carry the coordinate is where it was given."""
    found = []
    for side, (curve, end) in enumerate(zip(pair, box.ends(axis), strict=True)):
        if curve is None:
            found.append(float(end))  # type: ignore[arg-type]
        else:
            found.append(float(detached(curve(0.0)) if reference is None else reference[side][axis]))
    if not found[0] < found[1]:
        where = f"{found[0]:g} and {found[1]:g} at t = 0 on axis {axis}"
        raise InputError("lower, upper", where, "lower < upper there")
    return found[0], found[1]


def _met(pair: tuple[Curve | None, Curve | None], horizon: float) -> tuple[float, list[float]]:
    """Time at which two faces have all but met (else the horizon), and those at which their distance is quartered."""
    low, high = pair
    if low is None or high is None:
        return horizon, []

    def apart(t: float) -> float:
        return float(detached(high(t) - low(t)))

    first = apart(0.0)
    edges = sorted({0.0, horizon, *low.edges, *high.edges})
    times = sorted({t for a, b in pairwise(edges) for t in np.linspace(a, b, LOOKS).tolist()})
    gaps = [apart(t) for t in times]
    meeting = next((k for k, gap in enumerate(gaps) if gap <= MET * first), None)
    if meeting is None or first <= 0.0:
        return horizon, []
    before = max(k for k in range(meeting) if gaps[k] > NEAR * first) if meeting else 0
    found, share = [], NEAR
    while share > MET:
        found.append(_crossing(apart, share * first, times[before], times[meeting]))
        share *= QUARTER
    return _crossing(apart, MET * first, times[before], times[meeting]), found


def _crossing(f: Callable[[float], float], level: float, a: float, b: float) -> float:
    """A time in [a, b] at which f falls through a level."""
    for _ in range(BISECTIONS):
        middle = 0.5 * (a + b)
        a, b = (middle, b) if f(middle) > level else (a, middle)
    return b


def _process(sde: SDE, motion: Motion, breakpoints: tuple[float, ...]) -> SDE:
    """The process in coordinates at rest."""

    def drift(t: float, xi: Array) -> Array:
        return (sde.drift(t, motion.outwards(t, xi)) - motion.velocity(t, xi)) / motion.width(t, xi)

    def noise_at(f: Any, given: Any, scale: Array, t: float, xi: Array) -> Array:
        if callable(given):
            return f(t, motion.outwards(t, xi)) / scale
        # a constant is the same at all points, and one matrix stands for them all
        one = f(t, xi.reshape(-1, motion.dim)[:1])[0] / scale
        return namespace(xi).broadcast_to(one, (*xi.shape[:-1], *one.shape))

    def diffusion(t: float, xi: Array) -> Array:
        return noise_at(sde.diffusion, sde._diffusion, motion.width(t, xi)[:, None], t, xi)

    def covariance(t: float, xi: Array) -> Array:
        w = motion.width(t, xi)
        return noise_at(sde.covariance, sde._covariance, w[:, None] * w, t, xi)

    def rate(j: int, t: float, xi: Array) -> Array:
        return sde.jumps(t, motion.outwards(t, xi))[0][..., j]

    def displacement(j: int, t: float, xi: Array) -> Array:
        return sde.jumps(t, motion.outwards(t, xi))[1][..., j, :] / motion.width(t, xi)

    noise: dict[str, Any] = {"diffusion": sde._diffusion, "covariance": sde._covariance}
    for name, function in (("diffusion", diffusion), ("covariance", covariance)):
        if noise[name] is not None and not (motion.rigid and not callable(noise[name])):
            noise[name] = function
    kinds = [(partial(rate, j), partial(displacement, j)) for j in range(len(sde.kinds))]
    still = SDE(
        drift, **noise, jumps=kinds or None, dim=motion.dim, breakpoints=breakpoints, arrays=sde.arrays
    )  # fmt: skip
    still.device = sde.device
    return still


@dataclass(frozen=True, eq=False)
class MovedEvent(Event):
    """An event in coordinates at rest: from those before it to those after it, which differ where a face jumps.

    Attributes
    ----------
    problem, motion : KolmogorovProblem, Motion
        As they were given.
    event : Event or None
        What happens there; None where only a face jumps.
    """

    problem: KolmogorovProblem
    motion: Motion
    event: Event | None

    @property
    def pays(self) -> bool:
        """Whether anything is paid."""
        return self.event is not None and self.event.pays

    def run(self, x: Array, arrays: str | None = None, device: Any = None) -> tuple[Array, Array | None]:
        """Where points ξ (..., d) are moved to, and what is paid."""
        outside, paid = self.motion.outwards(self.time, x, before=True), None
        if self.event is not None:
            outside, paid = self.event.run(outside, arrays, device)
        return self.motion.inwards(self.time, outside), paid


def _face(problem: KolmogorovProblem, motion: Motion, axis: int, face: Face) -> Face:
    """The condition on a face, in coordinates at rest."""

    def outside(value: Any, t: float, xi: Array) -> Array:
        return problem.on_face(value, t, motion.outwards(t, xi))

    def stretched(value: Any, t: float, xi: Array) -> Array:
        return outside(value, t, xi) / motion.width(t, xi)[axis]

    if isinstance(face, Absorbing):
        return Absorbing(partial(outside, face.value) if callable(face.value) else face.value)
    if isinstance(face, Robin) and None not in motion.axes[axis]:
        return Robin(partial(stretched, face.kappa), partial(stretched, face.value))
    if isinstance(face, Robin):
        kappa, value = (partial(outside, v) if callable(v) else v for v in (face.kappa, face.value))
        return Robin(kappa, value)
    return face


def _final(problem: KolmogorovProblem, motion: Motion, horizon: float, xi: Array) -> Array:
    return problem.final(motion.outwards(horizon, xi))


def _outside(f: Callable[[float, Array], Array], motion: Motion, t: float, xi: Array) -> Array:
    return f(t, motion.outwards(t, xi))


def _break(place: Any, motion: Motion, horizon: float, xi: Array) -> Array:
    """A function whose zero set a break is at the horizon: where terminal data break."""
    x = motion.outwards(horizon, xi)
    return place(x) if callable(place) else x[..., 0] - place


class _Ended:
    """Terminal data where two faces have met: between them only noise is left, and u is linear.

    Parameters
    ----------
    problem : KolmogorovProblem
        As it was given.
    motion : Motion
        Its faces.
    horizon : float
        The time.
    axis : int
        Whose faces have met.
    """

    def __init__(self, problem: KolmogorovProblem, motion: Motion, horizon: float, axis: int) -> None:
        self.problem, self.motion, self.horizon, self.axis = problem, motion, horizon, axis
        self.faces = problem.box.faces[axis]
        ending = [face.imposed or (face.turns and not face.elastic) for face in self.faces]
        if not all(ending) or not any(face.imposed for face in self.faces):
            raise InputError(
                f"boundary[{axis}]",
                f"{self.faces[0].word} and {self.faces[1].word} faces that meet at about t = {horizon:g}",
                "absorbing faces there, or one that absorbs and one that reflects",
            )

    def __call__(self, xi: Array) -> Array:
        """Values at points (..., d)."""
        x, k = self.motion.outwards(self.horizon, xi), self.axis
        (bottom, top), xp = self.motion.reference[k], namespace(xi)
        columns = self.problem.final(x).shape[xi.ndim - 1 :]
        values: list[Array] = []
        for end, face in zip((bottom, top), self.faces, strict=True):
            if isinstance(face, Absorbing):
                on = xp.stack([xi[..., i] if i != k else 0.0 * xi[..., i] + end for i in range(xi.shape[-1])], -1)
                values.append(self.problem.on_face(face.value, self.horizon, self.motion.outwards(self.horizon, on)))
        low, high = values[0], values[-1]  # a wall that reflects leads to the other face
        part = (xi[..., k] - bottom) / (top - bottom)
        if len(columns):
            part = part[..., None]
            low, high = (v if v.ndim == xi.ndim else v[..., None] for v in (low, high))
        mixed = (1.0 - part) * low + part * high
        return mixed + 0.0 * part if not len(columns) else xp.broadcast_to(mixed, (*xi.shape[:-1], *columns))
