"""What faces do on a grid: where paths leave through an absorbing one, and the equation at an end they only leave."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from kolmo.arrays import Array, Held, as_like, as_numpy, detached
from kolmo.errors import InputError
from kolmo.grid import Grid
from kolmo.problem import KolmogorovProblem
from kolmo.problem.box import Box
from kolmo.problem.faces import Absorbing, Closure, Face
from kolmo.schemes.local import columns, put_rows, wall_nodes

# How far inside a face its coefficients are looked at, as a part of the first cell: they may be infinite on it.
INSIDE = 1e-2
# Weights at one to four times that distance that continue a cubic to the face.
CONTINUED = (4.0, -6.0, 4.0, -1.0)
# Drift across a face that is less than this part of the largest there is rounding, as is noise of this part of the
# largest on the grid.
NEGLIGIBLE, DEGENERATE = 1e-9, 1e-12
# Power of the distance from which on noise that dies towards a face does not let paths reach it (Feller 1952: the
# integral of distance / variance diverges at 2).
DEAD = 1.9
# Nodes at most at which the noise of the inside is looked at.
SOME = 64
# Change of distance times drift between one and four probes at which it is not of the form a / distance.
STEADY = 2.0


@dataclass(frozen=True, eq=False)
class Swept(Absorbing):
    """Absorbing face that no noise crosses, at least in parts: values hold only where the drift carries paths out.

    Differences narrow towards it, as at a cut: one-sided ones of high order next to a value that drift carries inwards
    are unstable (eigenvalues of the first difference of order 6 with real part 0.2 / spacing, of order 4 with some).

    Parameters
    ----------
    value : float or callable
        As of the absorbing face.
    leaves : ndarray of bool, shape (nodes of the face,)
        Where paths leave.
    """

    degenerate: ClassVar[bool] = True
    closure: ClassVar[Closure] = "cut"

    leaves: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=bool))


class Unreached(Swept):
    """Absorbing face that nothing reaches: the equation itself holds there, as at a natural end."""

    closure: ClassVar[Closure] = "free"


def held(grid: Grid, axis: int, side: int, face: Face) -> np.ndarray:
    """Mask (size,) of the nodes of a face whose values are prescribed."""
    mask = np.zeros(grid.size, dtype=bool)
    if isinstance(face, Absorbing):
        wall = wall_nodes(grid, axis, side)
        mask[wall] = face.leaves if isinstance(face, Swept) else True
    return mask


def resolved(problem: KolmogorovProblem, grid: Grid, box: Box, times: Sequence[float]) -> Box:
    """The box with those absorbing faces told apart that paths leave through in parts only.

    Raises
    ------
    InputError
        If paths leave at some times where they enter at others, or a face that is singular cannot be reached.
    """
    faces = [list(pair) for pair in box.faces]
    for axis, side, face in box.each():
        if isinstance(face, Absorbing):
            leaves, noisy = _leaves(problem, grid, box, axis, side, times)
            if not noisy.all():
                faces[axis][side] = (Swept if leaves.any() else Unreached)(face.value, leaves)
    return Box(box.lower, box.upper, boundary=faces)


def _leaves(
    problem: KolmogorovProblem, grid: Grid, box: Box, axis: int, side: int, times: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """Where on an absorbing face paths leave, and where noise alone makes them, shape (nodes of the face,)."""
    wall = wall_nodes(grid, axis, side)
    leaving, entering = np.zeros(len(wall), dtype=bool), np.zeros(len(wall), dtype=bool)
    noisy = ~leaving
    for t in times:
        reached, out, back = _at_face(problem, grid, box, axis, side, t)
        leaving, entering, noisy = leaving | out, entering | back, noisy & reached
    both = leaving & entering
    if both.any():
        x = grid.points[wall[np.flatnonzero(both)[0]]].tolist()
        raise InputError(
            f"boundary[{axis}][{side}]",
            f"an absorbing face at x = {x} through which paths leave at some times and enter at others",
            "noise across it, or a drift that keeps its sign there",
            "solve from one change of sign to the next, each with the answer of the later one as terminal data",
        )
    return leaving, noisy


def _at_face(
    problem: KolmogorovProblem, grid: Grid, box: Box, axis: int, side: int, t: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where noise takes paths out through a face at a time, where they leave at all, and where they enter.

    Noise reaches the face unless it dies there like the square of the distance or faster, or the drift away from it is
    too strong: with variance Σ and drift b at a small distance δ, unless 2 δ b ≥ Σ (Feller 1952). Without it the drift
    on the face decides.
    """
    near, far = (probe(grid, box, axis, side, m) for m in (1, 2))
    inward = 1.0 if side == 0 else -1.0
    step = np.abs(near[:, axis] - grid.box[side][axis])
    noise_near, noise_far = (as_numpy(problem.sde.covariance(t, x))[:, axis, axis] for x in (near, far))
    b1, b2 = (inward * as_numpy(problem.sde.drift(t, x))[:, axis] for x in (near, far))
    elsewhere = as_numpy(problem.sde.covariance(t, shrunk(grid)[:: max(1, grid.size // SOME)]))[:, axis, axis]
    largest = max(float(np.abs(elsewhere).max()), float(np.abs(noise_far).max()))
    with np.errstate(divide="ignore", invalid="ignore"):
        power = np.log2(noise_far / noise_near)
        reached = (noise_near > DEGENERATE * largest) & (power < DEAD) & (2.0 * step * b1 < noise_near)
    across = 2.0 * b1 - b2
    slack = NEGLIGIBLE * max(np.abs(b1).max(), np.abs(b2).max())
    repelled = ~reached & (power < DEAD) & (b1 > DEAD * b2)
    if repelled.any():
        x = near[int(repelled.argmax())].tolist()
        raise InputError(
            f"boundary[{axis}][{side}]",
            f"{box.faces[axis][side].word!r} at an end that is never reached: drift {b1[repelled][0]:.3g} away from it "
            f"at t = {t:g}, x = {x}, noise {noise_near[repelled][0]:.3g}",
            "a face that paths can reach",
            "boundary 'entrance' for such an end",
        )
    return reached, reached | (across < -slack), ~reached & (across > slack)


def check_natural(problem: KolmogorovProblem, grid: Grid, box: Box, places: np.ndarray) -> None:
    """A natural face needs no noise across it and a drift that does not point out; coefficients are read at places."""
    drift, covariance = (as_numpy(f(0.0, places)) for f in (problem.sde.drift, problem.sde.covariance))
    for axis, side, face in box.each():
        if not face.degenerate or face.imposed or face.constrains:
            continue
        wall = wall_nodes(grid, axis, side)
        noise, speed = covariance[:, axis, axis], drift[:, axis]
        normal, outward = noise[wall], speed[wall] * (1.0 if side == 1 else -1.0)
        if (normal > DEGENERATE * max(noise.max(), 1e-300)).any():
            where = places[wall][int(normal.argmax())].tolist()
            raise InputError(
                f"boundary[{axis}][{side}]",
                f"'natural' with noise Σ = {normal.max():.3g} across it at {where}",
                "no noise across a natural face",
                "use 'reflecting', 'absorbing' or 'open'",
            )
        if (outward > DEGENERATE * np.abs(speed).max()).any():
            where = places[wall][int(outward.argmax())].tolist()
            raise InputError(
                f"boundary[{axis}][{side}]",
                f"'natural' with drift {outward.max():.3g} pointing out at {where}",
                "a drift that does not point out of a natural face",
                "use 'open' where the state space goes on",
            )


def shrunk(grid: Grid) -> np.ndarray:
    """The nodes, all drawn a little towards the middle of the box: none lies on a face, shape (size, d)."""
    middle = 0.5 * (grid.box[0] + grid.box[1])
    return np.asarray(middle + (1.0 - 1e-3) * (grid.points - middle))


def probe(grid: Grid, box: Box, axis: int, side: int, multiple: int) -> np.ndarray:
    """Points some multiples of a small distance inside the nodes of a face, shape (nodes of the face, d).

    They are inside the other faces too that may not be read.
    """
    x = grid.points[wall_nodes(grid, axis, side)].copy()
    for i, a in enumerate(grid.axes):
        low, high = box.faces[i]
        for s, face, end, first in ((0, low, 0, a.nodes[1]), (1, high, -1, a.nodes[-2])):
            if (i, s) == (axis, side) or (face.unread and i != axis):
                at = x[:, i] == a.nodes[end]
                x[at, i] += (multiple if i == axis else 1) * INSIDE * (first - a.nodes[end])
    return np.asarray(x)


class Entrances:
    """Ends that the process leaves at once: the equation there, as the limit of that inside.

    With drift a/δ + … at the distance δ, and u_x = 0 at the end, the drift's part becomes another a u_xx: the end is a
    reflecting wall with covariance Σ + 2a and no drift.

    Parameters
    ----------
    problem, grid, box
        As of the generator.
    """

    def __init__(self, problem: KolmogorovProblem, grid: Grid, box: Box) -> None:
        self.problem = problem
        self.ends: list[tuple[int, int, Held, list[Held], list[Held]]] = []
        for axis, side, face in box.each():
            if not face.reached:
                points = [probe(grid, box, axis, side, m) for m in range(1, len(CONTINUED) + 1)]
                steps = [np.abs(x[:, axis] - grid.box[side][axis]) for x in points]
                index = Held(wall_nodes(grid, axis, side))
                self.ends.append((axis, side, index, [Held(x) for x in points], [Held(s) for s in steps]))

    def limits(self, t: float, b: Array, S: Array, c: Array, g: Array) -> tuple[Array, Array, Array, Array]:
        """Drift, covariance, killing and source at all nodes, with the limits put in at the ends."""
        problem = self.problem
        for axis, side, index, points, steps in self.ends:
            inward = 1.0 if side == 0 else -1.0
            parts: list[Array] = [0.0, 0.0, 0.0, 0.0]
            pull: Array = 0.0
            for weight, x, step in zip(CONTINUED, points, steps, strict=True):
                x, step = x.like(b), step.like(b)
                drift = problem.sde.drift(t, x)
                source = columns(problem.running(t, x), g.shape[1])
                seen = (drift, problem.sde.covariance(t, x), problem.rate(t, x), source)
                parts = [part + weight * v for part, v in zip(parts, seen, strict=True)]
                pull = pull + weight * step * inward * drift[:, axis]
            self._check(t, axis, side, pull, parts[1][:, axis, axis])
            normal = as_like(np.eye(b.shape[1])[axis], b)
            drift = parts[0] * (1.0 - normal)
            noise = parts[1] + 2.0 * pull[:, None, None] * normal[:, None] * normal[None, :]
            limits, where = (drift, noise, parts[2], parts[3]), index.like(b)
            b, S, c, g = (put_rows(v, where, limit) for v, limit in zip((b, S, c, g), limits, strict=True))
        return b, S, c, g

    def _check(self, t: float, axis: int, side: int, pull: Array, noise: Array) -> None:
        """The drift near the end has to grow like a / distance, strongly enough that the end is not reached."""
        _, _, _, points, steps = next(end for end in self.ends if end[:2] == (axis, side))
        a, S = as_numpy(detached(pull)), as_numpy(detached(noise))
        inward = 1.0 if side == 0 else -1.0
        near, far = (
            steps[m].array * inward * as_numpy(self.problem.sde.drift(t, points[m].array))[:, axis] for m in (0, -1)
        )
        wrong = ~(np.isfinite(a) & np.isfinite(S) & (S > 0.0) & (2.0 * a >= (1.0 - 1e-6) * S))
        wrong |= ~((near <= STEADY * far) & (far <= STEADY * near))
        if wrong.any():
            k = int(wrong.argmax())
            step = steps[0].array[k]
            raise InputError(
                f"boundary[{axis}][{side}]",
                f"'entrance' with drift {near[k] / step:.3g} (inwards) at the distance {step:.3g} and noise Σ = "
                f"{S[k]:.3g}, at x = {points[0].array[k].tolist()}, t = {t:g}",
                "noise Σ > 0 and a drift that grows like a / distance, inwards, with 2a ≥ Σ",
                "'reflecting' or 'absorbing' where the end is reached, 'natural' where noise dies there",
            )
