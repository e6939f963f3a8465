"""Monte Carlo: the expectation behind the equation, by simulated paths, with its statistical error and its bias."""

import secrets
import warnings
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from kolmo import memory
from kolmo.arrays import Array, as_like, as_numpy, as_points, at_home, is_tensor
from kolmo.errors import InputError, KolmoWarning, NotConvergedError
from kolmo.montecarlo.faces import JUMP_ORDER, STOP_ORDER
from kolmo.montecarlo.methods import METHODS, Method
from kolmo.montecarlo.model import Model
from kolmo.montecarlo.pairs import CROSSINGS, Pair, scheduled
from kolmo.problem.problem import KolmogorovProblem
from kolmo.problem.rest import at_rest
from kolmo.shown import Shown, with_error

# Paths simulated at once: bounds the memory whatever the number of points and paths.
CHUNK = 1 << 16
# Factor on the bias estimate: one pair of step sizes does not show the higher orders.
SAFETY = 2.0
# With instants drawn at random paths are simulated in at least so many chunks, of at least so many paths: each chunk
# has its own instants.
CHUNKS, LEAST_CHUNK = 4, 4000
# Bytes that a path takes at least for each dimension and for each column, each point for each column, and a pair of
# steps where their lengths differ. Measured: 88 and 208 for each dimension, 88 for each column; 64 to 79; 136.
PER_DIMENSION, PER_COLUMN, PER_POINT, PER_PAIR = 200, 80, 48, 110
# Seconds that a step of a path takes at least. Measured on one core of 2 GHz: 63e-9 in one dimension without faces,
# 150e-9 in three, 1600e-9 with faces in two; other machines are not ten times as fast. What is sure to take longer
# than a week is refused.
PER_STEP, LONGEST = 6e-9, 7 * 86400.0


@dataclass(frozen=True, eq=False, repr=False)
class Estimate(Shown):
    """What a simulation says about u(0, x).

    Attributes
    ----------
    mean : array, shape (...) or (..., k)
        Estimate on the finer of two step sizes.
    standard_error : array, same shape
        Its standard deviation over the paths.
    bias_estimate : array, same shape
        Estimate of its discretisation error: difference from the same paths with steps twice as long, plus one
        standard error of that difference, times 2/(2^p − 1) for the weak order p. Infinite where nothing is known:
        ``status`` is "truncated", or the longer steps ran off to infinity.
    paths, steps : int
        Paths per point; steps taken (stationary: steps per crossing time of the box).
    method : str
        Name of the method.
    rng : int
        Seed: the same call with ``rng=estimate.rng`` gives the same numbers.
    status, message : str
        "finished", or "truncated" where paths of a stationary problem had to be given up; what that means.
    """

    mean: Array
    standard_error: Array
    bias_estimate: Array
    paths: int
    steps: int
    method: str
    rng: int
    status: str
    message: str

    def _facts(self) -> dict[str, Any]:
        told = {"mean": with_error(self.mean, self.standard_error), "bias_estimate": self.bias_estimate}
        rest = ("paths", "steps", "method", "rng", "status", "message")
        return told | {name: getattr(self, name) for name in rest}


@at_home
def monte_carlo(
    problem: KolmogorovProblem, x: Any, *, paths: int, steps: int, rng: Any = None, method: str = "euler"
) -> Estimate:
    r"""Estimate :math:`u(0, x) = E[e^{-\int c}\varphi(X_T) + \int e^{-\int c}g\,ds \mid X_0 = x]` by simulated paths.

    Parameters
    ----------
    problem : KolmogorovProblem
        The equation; stationary problems run until the paths are absorbed or killed.
    x : array_like, shape (..., d)
        Starting points (in one dimension ``(...)``).
    paths : int
        Independent paths per point, at least 2.
    steps : int
        Steps over the horizon, rounded up so that none straddles a breakpoint and their number between two is even;
        stationary: steps per crossing time of the box, 1/max(Σ_ii/L_i² + \|b_i\|/L_i).
    rng : None, int, numpy.random.Generator or torch.Generator
        Source of randomness; a generator is asked for one number. The seed used is in the result.
    method : {"euler", "platen"}
        Euler–Maruyama (weak order 1), or Platen's derivative-free scheme of weak order 2 for smooth problems.

    Returns
    -------
    Estimate
        Mean, standard error and bias estimate; tensors if x is one.

    Raises
    ------
    InputError
        For points outside the box, too few paths or steps, more of them than fit into the memory or than can be gone
        through in a week, an unknown method, or a stationary problem whose paths never end.
    NotConvergedError
        If paths run off to infinity: steps are too long.

    Notes
    -----
    Between two instants the path is a Brownian bridge with frozen coefficients. An absorbing face is paid with the
    probability that the bridge touched it, at an instant drawn from its law given that it did, and the path goes on
    with the weight that is left. Reflecting and elastic faces push the path inwards along Σn by the amount that the
    minimum of the bridge asks for; that amount times 2/(n·Σn) is the local time that kills at an elastic face. For
    constant coefficients and one wall this is exact in law. Several walls are treated as if the touches of each were
    independent. Beyond natural ends coefficients are read at the end itself (Lord, Koekkoek and
    van Dijk 2010), which is given order one half; open faces do nothing.
    Jumps come at the end of a step, at the rates and by the displacements of its start (weak order 1): as many of each
    kind as sums of standard exponential numbers stay below rate times step, so that both step sizes jump together.
    Those that land on an absorbing face are paid there.
    Steps twice as long are taken by the same Brownian paths.

    References
    ----------
    P. E. Kloeden and E. Platen (1992), Numerical Solution of Stochastic Differential Equations, sections 14.1 and 15.1;
    E. Gobet (2000), Stochastic Processes and their Applications 87; D. Lépingle (1995), Mathematics and Computers in
    Simulation 38.

    Examples
    --------
    >>> from kolmo import catalog, monte_carlo
    >>> case = catalog.survival()
    >>> estimate = monte_carlo(case.problem, case.points, paths=4000, steps=16, rng=1)
    >>> bool((abs(estimate.mean - case.values) < 4 * estimate.standard_error + estimate.bias_estimate).all())
    True
    """
    points, problem = as_points(x, problem.dim), at_rest(problem)
    starts = np.asarray(as_numpy(points), dtype=float).reshape(-1, problem.dim)
    scheme, seed, (paths, steps) = METHODS[method], seed_of(rng), counts(paths, steps)
    like = points if is_tensor(points) else None
    found = simulate(problem, starts[:, None], np.ones((1, 1)), Draws(paths, steps, seed), scheme, like)
    status, message = ending(found, "mean")
    if status == "truncated":
        warnings.warn(f"monte_carlo: {message}", KolmoWarning, stacklevel=2)
    lead = tuple(points.shape[:-1])

    def shaped(value: np.ndarray) -> Array:
        value = value.reshape(lead + (value.shape[1:] if found.columns is not None else ()))
        return value if like is None else as_like(value, like)

    mean, error, bias = (shaped(value) for value in (found.mean, found.standard_error, found.bias))
    return Estimate(mean, error, bias, paths, found.steps, scheme.name, seed, status, message)


class Draws(NamedTuple):
    """How many paths and steps, and the seed, as of ``monte_carlo``."""

    paths: int
    steps: int
    seed: int


@dataclass(frozen=True, eq=False)
class Sample:
    """What many paths found, per starting point and column, shape (points, k).

    Attributes
    ----------
    mean, standard_error : ndarray
        On the finer of two step sizes, and over the paths (and the instants drawn at random, if any were).
    bias : ndarray
        Estimate of the bias of the finer steps; see ``Estimate``.
    columns : int or None
        None for plain numbers.
    steps : int
        Steps taken.
    lost : float
        Weight of the paths that were given up, as a part of all.
    """

    mean: np.ndarray
    standard_error: np.ndarray
    bias: np.ndarray
    columns: int | None
    steps: int
    lost: float


def simulate(
    problem: KolmogorovProblem,
    starts: np.ndarray,
    weights: np.ndarray,
    draws: Draws,
    scheme: "Method",
    like: Array | None,
    *,
    sampled: bool = False,
) -> Sample:
    r"""Estimate :math:`\sum_j w_j u(0, x_j)`, the paths from the m points of one combination driven by the same noise.

    Parameters
    ----------
    problem : KolmogorovProblem
        The equation.
    starts : ndarray, shape (P, m, d)
        Starting points of P combinations.
    weights : ndarray, shape (P, m) or (1, m)
        Weights w.
    draws : Draws
        Paths, steps and seed.
    scheme : Method
        The one-step method; Euler's if sampled.
    like : tensor or None
        What functions are handed.
    sampled : bool
        Read the coefficients, and pay the source, at an instant drawn at random in every step (see ``SampledWalk``),
        in steps that get shorter towards the horizon.
    """
    _check(problem, starts.reshape(-1, problem.dim))
    paths, steps, seed = draws
    model = Model(problem, like)
    afford(problem, starts.shape, model.columns, paths, steps, graded=sampled)
    schedule = scheduled(problem, model, starts.reshape(-1, problem.dim), steps, graded=sampled)
    fine, difference = Moments.of(len(starts), model.columns), Moments.of(len(starts), model.columns)
    lost, total, m = 0.0, len(starts) * paths, starts.shape[1]
    spread = np.zeros_like(fine.mean)
    size = min(CHUNK, max(LEAST_CHUNK, -(-total // CHUNKS))) if sampled else CHUNK
    root = np.random.SeedSequence(seed)
    for first in range(0, total, max(1, size // m)):
        (child,) = root.spawn(1)
        owner = np.arange(first, min(first + max(1, size // m), total)) // paths
        share = np.broadcast_to(weights, starts.shape[:2])[owner]
        pair = Pair(model, scheme, starts[owner], np.random.default_rng(child), sampled)
        with np.errstate(over="ignore", invalid="ignore"):  # paths that run off are reported below
            lost += pair.run(schedule, spread, owner, share)
            totals = np.einsum("fnmk,nm->fnk", pair.totals, share)
            fine.add(owner, totals[0])
            difference.add(owner, totals[0] - totals[1])
    jumping = [JUMP_ORDER] * bool(problem.sde.kinds)
    jumping += [STOP_ORDER] * bool(problem.stops)
    order = min([scheme.order, *jumping, *(face.weak_order for _, _, face in problem.box.each())])
    bias = SAFETY * (np.abs(difference.mean) + difference.standard_error) / (2.0**order - 1.0)
    bias = np.where(np.isfinite(bias) & (lost == 0.0), bias, np.inf)
    error = np.sqrt(fine.standard_error**2 + np.maximum(spread, 0.0) / float(paths) ** 2)
    if not np.isfinite(fine.mean).all():
        raise NotConvergedError(
            f"paths ran off to infinity with {schedule.steps} steps; take more steps, or a box with faces"
        )
    return Sample(fine.mean, error, bias, model.columns, schedule.steps, lost / (total * m))


def counts(paths: Any, steps: Any) -> tuple[int, int]:
    """Paths and steps as whole numbers; refused where they are none, or below 2."""
    found = []
    fixes = {"paths": "", "steps": "the bias is estimated from steps and steps / 2"}
    for (argument, fix), value in zip(fixes.items(), (paths, steps), strict=True):
        try:
            whole = bool(int(value) == value and value >= 2)
        except (TypeError, ValueError, OverflowError):
            whole = False
        if not whole:
            raise InputError(argument, repr(value), "an integer of at least 2", fix)
        found.append(int(value))
    return found[0], found[1]


def afford(
    problem: KolmogorovProblem,
    shape: tuple[int, ...],
    columns: int | None,
    paths: int,
    steps: int,
    *,
    graded: bool = False,
) -> None:
    """Refuse paths from starts ``(P, m, d)`` that take more memory than there is, or longer than a week."""
    (count, together, dim), k = shape, columns or 1
    walkers = count * together * paths
    what = f"{paths} paths of {steps} steps from {count} points" + (f", {k} columns" if k > 1 else "")
    need = min(walkers, CHUNK) * (PER_DIMENSION * dim + PER_COLUMN * k) + count * k * PER_POINT
    if graded and not problem.stationary:
        need += PER_PAIR * (steps // 2)
    memory.afford("paths", what, need, "fewer of the largest of these")
    days, most = PER_STEP * walkers * steps / 86400.0, LONGEST / 86400.0
    if days > most:
        fix = "fewer: the standard error falls as 1/√paths, the bias as a power of 1/steps"
        raise InputError("paths", f"{what}, which take at least {days:.3g} days", f"at most {most:g} days", fix)


def _check(problem: KolmogorovProblem, starts: np.ndarray) -> None:
    outside = ~problem.box.contains(starts)
    if outside.any():
        raise InputError("x", f"a point at {starts[outside][0].tolist()}", f"points inside {problem.box}")
    ends = problem.box.has("exits") or problem.stops
    if problem.stationary and problem.killing is None and not ends:
        raise InputError(
            "problem", "a stationary problem without absorbing or elastic faces, targets or killing", "paths that end"
        )


def ending(found: Sample, what: str) -> tuple[str, str]:
    """Status and message: whether all paths reached their end."""
    if found.lost == 0.0:
        return "finished", "every path reached its end"
    return "truncated", (
        f"{found.lost:.3g} of the weight was neither absorbed nor killed after {CROSSINGS} crossing times of the box; "
        f"what it would have earned later is missing from the {what}"
    )


def seed_of(rng: Any) -> int:
    """Seed from None, an int, a NumPy generator or a torch generator (each generator is asked for one number).

    Examples
    --------
    >>> seed_of(7)
    7
    """
    if rng is None:
        return secrets.randbits(63)
    if isinstance(rng, int | np.integer) and not isinstance(rng, bool) and rng >= 0:
        return int(rng)
    if isinstance(rng, np.random.Generator):
        return int(rng.integers(2**63))
    if type(rng).__module__.partition(".")[0] == "torch" and type(rng).__name__ == "Generator":
        import torch

        return int(torch.randint(2**62, (), generator=rng, device=rng.device))
    raise InputError(
        "rng", repr(rng), "None, an integer ≥ 0, a numpy.random.Generator or a torch.Generator", "e.g. rng=0"
    )


@dataclass
class Moments:
    """Means and squared deviations of samples that arrive in chunks, per point and column."""

    count: np.ndarray
    mean: np.ndarray
    squares: np.ndarray
    columns: int | None

    @classmethod
    def of(cls, points: int, columns: int | None) -> "Moments":
        """No samples yet."""
        shape = (points, columns or 1)
        return cls(np.zeros(points), np.zeros(shape), np.zeros(shape), columns)

    def add(self, owner: np.ndarray, values: np.ndarray) -> None:
        """Add samples of shape (N, k) that belong to the points ``owner`` (sorted)."""
        first = np.flatnonzero(np.diff(owner, prepend=-1))
        who, n = owner[first], np.diff(np.append(first, len(owner))).astype(float)
        mean = np.add.reduceat(values, first, axis=0) / n[:, None]
        squares = np.add.reduceat((values - np.repeat(mean, n.astype(int), axis=0)) ** 2, first, axis=0)
        before, gap = self.count[who], mean - self.mean[who]
        after = before + n
        self.mean[who] += gap * (n / after)[:, None]
        self.squares[who] += squares + gap**2 * (before * n / after)[:, None]
        self.count[who] = after

    @property
    def standard_error(self) -> np.ndarray:
        """Standard error of the mean, shape (points, k)."""
        n = self.count[:, None]
        return np.asarray(np.sqrt(self.squares / (n * np.maximum(n - 1.0, 1.0))))
