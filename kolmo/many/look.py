"""Functions of many problems, sampled at once: on the grids of a plan and between their nodes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import ndtri

from kolmo.arrays import as_numpy, is_module, is_tensor
from kolmo.errors import InputError
from kolmo.kernels import batch
from kolmo.problem import KolmogorovProblem
from kolmo.problem.faces import Absorbing, Natural, Open, Reflecting
from kolmo.problem.instants import depends_on_time, reads_time

# Paths and steps by which it is seen where a process goes: spreads to 10 %. Spreads that have to lie in the box: what
# is farther out, its cut shows.
PATHS, PATH_STEPS, SPREADS = 32, 32, 4.0
# Noise at an absorbing end over that beside it from which on it is no end where noise dies.
ALIVE = 0.1
# Noise across a natural end, and drift out of it, as a part of the largest, up to which they are rounding.
DEGENERATE = 1e-12
# Faces whose problems are marched together.
TOGETHER = (Open, Natural, Reflecting, Absorbing)
NAMES = ("drift", "covariance", "killing", "source", "terminal")


@dataclass(frozen=True, eq=False)
class Sampled:
    """Values of one problem at common points, shape (points,) each, and at its two ends.

    Attributes
    ----------
    values : dict
        By name; a number where it is the same everywhere.
    ranges : dict
        By name, the least and the largest.
    faces : ndarray, shape (2,)
        Values of absorbing ends.
    """

    values: dict[str, Any]
    ranges: dict[str, tuple[float, float]]
    faces: np.ndarray


def kind_of(problem: KolmogorovProblem) -> tuple[Any, ...] | None:
    """What problems have in common that one march can take together; None for one that has to be solved alone."""
    sde, box = problem.sde, problem.box
    if problem.dim > 1 or problem.horizon is None or box.moves or problem.motion is not None:
        return None
    if sde.kinds or sde.noiseless or sde.breakpoints or problem.events or problem.stops or problem.breaks:
        return None
    faces = box.faces[0]
    if any(type(face) not in TOGETHER for face in faces) or not _steady(problem):
        return None
    return tuple(box.lower), tuple(box.upper), tuple(face.word for face in faces), problem.arrays


def _steady(problem: KolmogorovProblem) -> bool:
    """Whether nothing in a problem depends on time."""
    given: list[tuple[Any, Any]] = [(problem.killing, problem.rate), (problem.source, problem.running)]
    given += [(f, getattr(problem.sde, name)) for name, f in problem.sde.given.items() if not problem.sde.autonomous]
    timed = [(f, call) for f, call in given if callable(f) and reads_time(f)]
    faces = [f.value for f in problem.box.faces[0] if isinstance(f, Absorbing) and callable(f.value)]
    if faces or not timed:  # only of numbers it is known that a face does not move
        return not faces
    low, high = problem.box.lower[0], problem.box.upper[0]
    inside = np.nan_to_num(np.array([[0.75 * low + 0.25 * high], [0.25 * low + 0.75 * high]]), posinf=1.0, neginf=-1.0)
    return not any(depends_on_time(f, call, inside) for f, call in timed)


def sampled(problem: KolmogorovProblem, x: np.ndarray) -> Sampled | None:
    """Coefficients and data at points (m, 1); None where they are not finite, or have several columns."""
    problem = problem.handing(problem.arrays or "numpy")  # what it is handed need not be asked for at every call
    t, sde = 0.5 * (problem.horizon or 0.0), problem.sde
    ranges: dict[str, tuple[float, float]] = {}
    try:
        values = {
            "drift": _values(sde.given["drift"], lambda: sde.drift(t, x)[:, 0]),
            "covariance": _values(sde.given["covariance"], lambda: sde.covariance(t, x)[:, 0, 0], rooted=sde.rooted),
            "killing": _values(problem.killing, lambda: problem.rate(t, x)),
            "source": _values(problem.source, lambda: problem.running(t, x)),
            "terminal": as_numpy(problem.final(x)),
        }
    except InputError:
        return None  # it says so when it is solved alone
    for name, v in values.items():
        if isinstance(v, np.ndarray):
            low, high = float(v.min()), float(v.max())
        else:
            low = high = float(v)
        if np.ndim(v) > 1 or not low > -np.inf or not high < np.inf:
            return None
        ranges[name] = low, high
    if ranges["covariance"][0] < 0.0:
        return None
    ends = [float(as_numpy(f.value)) if isinstance(f, Absorbing) else 0.0 for f in problem.box.faces[0]]
    return Sampled(values, ranges, np.array(ends))


def _values(given: Any, call: Any, *, rooted: bool = False) -> Any:
    """What was given as a number, or the values of a function."""
    if given is None:
        return 0.0
    given = None if callable(given) or is_module(given) or is_tensor(given) else np.asarray(given, dtype=float)
    if given is None or given.size > 1:
        return as_numpy(call())
    return float(given.reshape(())) ** (2 if rooted else 1)


def regular(box: Any, nodes: np.ndarray, drift: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    """Which problems, of values (P, n) at the nodes, are at both ends what their faces say."""
    fine = np.ones(len(drift), dtype=bool)
    noise, speed = covariance.max(1), np.abs(drift).max(1)
    for side, face in enumerate(box.faces[0]):
        end, beside, outward = (0, 1, -1.0) if side == 0 else (-1, -2, 1.0)
        cell = abs(nodes[beside] - nodes[end])
        if isinstance(face, Natural):
            fine &= (covariance[:, end] <= DEGENERATE * noise) & (outward * drift[:, end] <= DEGENERATE * speed)
        if isinstance(face, Absorbing):
            alive = np.minimum(covariance[:, end], covariance[:, beside]) > ALIVE * np.maximum(
                covariance[:, end], covariance[:, beside]
            )
            fine &= alive & (np.abs(drift[:, end]) * cell < covariance[:, end] / ALIVE)
    return fine


@dataclass(frozen=True, eq=False)
class Whereabouts:
    """Where the processes of P problems go.

    Attributes
    ----------
    middles : ndarray, shape (P, 2)
        Hull of the means of paths, over starts and time.
    spreads : ndarray, shape (P,)
        Largest standard deviation; infinite where paths leave the box.
    """

    middles: np.ndarray
    spreads: np.ndarray

    @classmethod
    def of(
        cls,
        x: np.ndarray,
        drift: np.ndarray,
        covariance: np.ndarray,
        starts: np.ndarray,
        horizons: np.ndarray,
        hard: np.ndarray,
    ) -> "Whereabouts":
        """By paths from starts (s,), of coefficients (P, n) at places x (n,); ``hard``: ends of the state space."""
        rng = np.random.default_rng(0)
        levels = ndtri((np.arange(PATHS) + 0.5) / PATHS)
        normals = np.stack([rng.permutation(levels) for _ in range(PATH_STEPS)])
        normals /= normals.std()
        middles, spreads = np.empty((len(drift), 2)), np.empty(len(drift))
        batch.paths(x, drift, np.sqrt(covariance), starts, normals, horizons, hard, middles, spreads)
        return cls(middles, spreads)

    def inside(self, low: float, high: float, hard: np.ndarray) -> np.ndarray:
        """Of which problems the process stays between open ends."""
        far = SPREADS * self.spreads
        down = hard[0] | (self.middles[:, 0] - far >= low)
        up = hard[1] | (self.middles[:, 1] + far <= high)
        return np.asarray(np.isfinite(self.spreads) & down & up)


def extremes(points: np.ndarray) -> np.ndarray:
    """Least and largest of the points (n, 1)."""
    low, high = float(points.min()), float(points.max())
    return np.array([low, high] if low < high else [low])


def rows(parts: Sequence[Sampled], name: str, where: slice) -> np.ndarray:
    """Values of every problem at some of the points, shape (P, count)."""
    result = np.empty((len(parts), where.stop - where.start))
    for row, part in zip(result, parts, strict=True):
        value = part.values[name]
        row[...] = value[where] if isinstance(value, np.ndarray) else value
    return result
