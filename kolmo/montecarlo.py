"""Monte Carlo: the expectation behind the equation, by simulated paths, with its statistical error and its bias."""

import itertools
import math
import secrets
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import log_ndtr, ndtr

from kolmo import memory
from kolmo.arrays import Array, as_like, as_numpy, as_points, at_home, is_tensor
from kolmo.box import Absorbing, Box, Entrance, Natural, Open, Periodic, Reflecting, Robin
from kolmo.errors import InputError, KolmoWarning, NotConvergedError
from kolmo.events import Event
from kolmo.problem import KolmogorovProblem, Stop
from kolmo.registry import Registry
from kolmo.rest import at_rest
from kolmo.sde import evaluate

# Paths simulated at once: bounds the memory whatever the number of points and paths.
CHUNK = 1 << 16
# Jumps of a kind that are drawn in a step: for rates so many times those seen, plus standard deviations, and at least.
ROOM, SURE, LEAST_ARRIVALS = 2.0, 6.0, 10
# A path is dropped when its weight has fallen below this, and an exit less likely is not looked at.
NEGLIGIBLE = 1e-14
# A stationary problem is given up after this many crossing times of its box.
CROSSINGS = 1000
# The end of a step that falls on a breakpoint is read just before it.
INSIDE = 1e-10
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
# Weak order that jumps allow, and the treatment of a face; free of it where not listed.
JUMP_ORDER = 1.0
FACE_ORDER: dict[type, float] = {Reflecting: 1.0, Robin: 1.0, Absorbing: 1.0, Entrance: 0.5, Natural: 0.5}
# Of targets: their boundaries are taken for planes within a step (Gobet 2001).
STOP_ORDER = 1.0


@dataclass(frozen=True, eq=False)
class Estimate:
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
    found = simulate(
        problem, starts[:, None], np.ones((1, 1)), paths, steps, seed, scheme, points if is_tensor(points) else None
    )
    return _estimate(scheme, found, points, (paths, seed))


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
    paths: int,
    steps: int,
    seed: int,
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
    paths, steps, seed : int
        As ``monte_carlo``.
    scheme : Method
        The one-step method; Euler's if sampled.
    like : tensor or None
        What functions are handed.
    sampled : bool
        Read the coefficients, and pay the source, at an instant drawn at random in every step (see ``SampledWalk``),
        in steps that get shorter towards the horizon.
    """
    _check(problem, starts.reshape(-1, problem.dim))
    model = Model(problem, like)
    afford(problem, starts.shape, model.columns, paths, steps, graded=sampled)
    schedule = _schedule(problem, model, starts.reshape(-1, problem.dim), steps, graded=sampled)
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
    order = min([scheme.order, *jumping, *(FACE_ORDER.get(type(f), 9.0) for faces in problem.box.faces for f in faces)])
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
    faces = [f for pair in problem.box.faces for f in pair]
    ends = any(isinstance(f, Absorbing | Robin) for f in faces) or problem.stops
    if problem.stationary and problem.killing is None and not ends:
        raise InputError(
            "problem", "a stationary problem without absorbing or elastic faces, targets or killing", "paths that end"
        )


def _estimate(scheme: "Method", found: Sample, points: Array, drawn: tuple[int, int]) -> Estimate:
    status, message = ending(found, "mean")
    if status == "truncated":
        warnings.warn(f"monte_carlo: {message}", KolmoWarning, stacklevel=3)
    lead = tuple(points.shape[:-1])

    def shaped(value: np.ndarray) -> Array:
        columns = value.shape[1:] if found.columns is not None else ()
        value = value.reshape(lead + columns)
        return as_like(value, points) if is_tensor(points) else value

    return Estimate(
        mean=shaped(found.mean),
        standard_error=shaped(found.standard_error),
        bias_estimate=shaped(found.bias),
        paths=drawn[0],
        steps=found.steps,
        method=scheme.name,
        rng=drawn[1],
        status=status,
        message=message,
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


# ------------------------------------------------------------------------------------------------------- coefficients
class Model:
    """A problem's functions as NumPy functions of NumPy points, read inside its closed faces.

    Parameters
    ----------
    problem : KolmogorovProblem
        The equation.
    like : tensor or None
        A tensor: functions are handed tensors on its device.
    """

    def __init__(self, problem: KolmogorovProblem, like: Array | None) -> None:
        self.problem, self.like = problem, like
        self.box: Box = problem.box
        self.torch = like is not None or problem.arrays == "torch"
        low, high = np.array(self.box.lower), np.array(self.box.upper)
        closed = np.array([[not isinstance(f, Open | Periodic) for f in pair] for pair in self.box.faces])
        self.low, self.high = np.where(closed[:, 0], low, -np.inf), np.where(closed[:, 1], high, np.inf)
        self.closed = bool(closed.any())
        self.bridged = any(isinstance(f, Absorbing | Reflecting | Robin) for pair in self.box.faces for f in pair)
        self.bridged |= bool(problem.stops)
        self.entrances = [
            (i, s) for i, pair in enumerate(self.box.faces) for s, f in enumerate(pair) if isinstance(f, Entrance)
        ]
        self.periodic = np.array(self.box.periodic)
        self.origin, self.period = np.where(self.periodic, low, 0.0), np.where(self.periodic, high - low, 1.0)
        self.columns = self._columns()

    def _columns(self) -> int | None:
        """Count the columns; None for plain numbers."""
        finite_low = np.where(np.isfinite(self.box.lower), self.box.lower, 0.0)
        probe = np.clip(np.zeros((2, self.box.dim)), finite_low, np.maximum(finite_low, self.box.upper))
        values = [self.running(0.0, probe)] + ([] if self.problem.stationary else [self.final(probe)])
        for face in (f for pair in self.box.faces for f in pair):
            if isinstance(face, Absorbing | Robin):
                values.append(self.face(face.value, 0.0, probe))
        columns = [v.shape[1] for v in values if v.ndim == 2]
        return max(columns) if columns else None

    def _call(self, f: Callable[..., Array], *args: Any) -> np.ndarray:
        *time, x = args
        if not self.torch:
            return np.asarray(f(*time, x), dtype=float)
        import torch

        with torch.no_grad():
            hand = torch.as_tensor(x, device=None if self.like is None else self.like.device)
            return np.asarray(as_numpy(f(*time, hand)), dtype=float)

    def fit(self, x: np.ndarray) -> np.ndarray:
        """Points brought back to where coefficients may be read: projected on closed faces, wrapped around periods."""
        return self.wrap(np.clip(x, self.low, self.high) if self.closed else x)

    def readable(self, t: float, x: np.ndarray, dt: float) -> np.ndarray:
        """Points where a step of that length reads its coefficients: fit, and as far from entrances as its noise goes.

        Nearer, the drift is too large for one step.
        """
        x = self.fit(x)
        for axis, side in self.entrances:
            edge, inward = (self.low, self.high)[side][axis], 1.0 if side == 0 else -1.0
            x = x.copy()
            gap = inward * (x[:, axis] - edge)
            # the noise is read at the path that is farthest from the end, where nothing is singular
            farthest = x[[int(gap.argmax())]]
            reach = math.sqrt(float(self.covariance(t, farthest)[0, axis, axis]) * dt)
            x[:, axis] = edge + inward * np.maximum(gap, reach)
        return x

    def mirror(self, x: np.ndarray) -> np.ndarray:
        """Points beyond an entrance put back inside, at the same distance (a fresh array where there is one)."""
        for axis, side in self.entrances:
            edge, inward = (self.low, self.high)[side][axis], 1.0 if side == 0 else -1.0
            x = x.copy()
            x[:, axis] = edge + inward * np.abs(x[:, axis] - edge)
        return x

    def wrap(self, x: np.ndarray) -> np.ndarray:
        """Points wrapped around periods."""
        if not self.periodic.any():
            return x
        return np.where(self.periodic, self.origin + np.mod(x - self.origin, self.period), x)

    def events_at(self, end: float, h: float) -> list[Event]:
        """What happens at the end of a step of length h."""
        return [event for event in self.problem.events if abs(event.time - end) < 0.5 * h]

    def happens(self, event: Event, x: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Where an event moves paths to, and what it pays."""
        like = self.like
        moved, paid = self.problem.happens(event, x if like is None else as_like(x, like))
        return np.asarray(as_numpy(moved)), None if paid is None else np.asarray(as_numpy(paid))

    def drift(self, t: float, x: np.ndarray) -> np.ndarray:
        """Drift, shape (N, d)."""
        return self._call(self.problem.sde.drift, t, x)

    def diffusion(self, t: float, x: np.ndarray) -> np.ndarray:
        """Noise matrix, shape (N, d, m); a triangular one where only Σ was given."""
        if self.problem.sde._diffusion is None:
            return _triangular_root(self.covariance(t, x))
        return self._call(self.problem.sde.diffusion, t, x)

    def jumps(self, t: float, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rates (N, J) and displacements (N, J, d) of jumps."""
        sde = self.problem.sde
        return self._call(lambda t, x: sde.jumps(t, x)[0], t, x), self._call(lambda t, x: sde.jumps(t, x)[1], t, x)

    def covariance(self, t: float, x: np.ndarray) -> np.ndarray:
        """Covariance rate, shape (N, d, d)."""
        return self._call(self.problem.sde.covariance, t, x)

    def final(self, x: np.ndarray) -> np.ndarray:
        """Terminal data, shape (N,) or (N, k)."""
        return self._call(self.problem.final, x)

    def rate(self, t: float, x: np.ndarray) -> np.ndarray:
        """Killing rate, shape (N,)."""
        return self._call(self.problem.rate, t, x)

    def running(self, t: float, x: np.ndarray) -> np.ndarray:
        """Source, shape (N,) or (N, k)."""
        return self._call(self.problem.running, t, x)

    def face(self, value: Any, t: float, x: np.ndarray) -> np.ndarray:
        """Datum of a face, shape (N,) or (N, k)."""

        def read(t: float, x: Array) -> Array:
            return evaluate(value, t, x, "face value", "torch" if self.torch else None)

        result = self._call(read, t, x)
        if result.ndim == 2 and result.shape[1] == 1 and x.shape[1] == 1:
            return result[:, 0]
        return np.broadcast_to(result, (len(x), *result.shape[1:]))

    def noise_columns(self, x: np.ndarray) -> int:
        """Count the independent noises."""
        return int(self.diffusion(0.0, x[:1]).shape[-1])


def _uniform(M: np.ndarray) -> bool:
    """Whether matrices of shape (N, d, m) are one matrix broadcast to all points."""
    return len(M) > 1 and M.strides[0] == 0


def _triangular_root(S: np.ndarray) -> np.ndarray:
    """Cholesky factors of positive semidefinite matrices; a column without a pivot is zero."""
    if _uniform(S):
        return np.broadcast_to(_triangular_root(S[:1]), S.shape)
    L = np.zeros(S.shape)
    for j in range(S.shape[-1]):
        rest = S[..., j:, j] - np.einsum("...ik,...k->...i", L[..., j:, :j], L[..., j, :j])
        pivot = np.sqrt(np.maximum(rest[..., :1], 0.0))
        L[..., j:, j] = np.divide(rest, pivot, out=np.zeros(rest.shape), where=pivot > 0.0)
    return L


# ------------------------------------------------------------------------------------------------------- one step
@dataclass(frozen=True)
class Increment:
    """A time step [t, t + dt] with its Brownian increment.

    Attributes
    ----------
    t, end, dt : float
        Start; end as coefficients see it (just before a breakpoint); length.
    dW : ndarray, shape (N, m)
        Increment.
    signs : ndarray, shape (N, m, m)
        Random signs, antisymmetric, for the double integrals.
    """

    t: float
    end: float
    dt: float
    dW: np.ndarray
    signs: np.ndarray


Step = Callable[[Model, np.ndarray, Increment], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Method:
    """A one-step method: name, weak order, and ``step(model, x, increment)`` -> (new x, σ(t, x))."""

    name: str
    order: float
    step: Step


METHODS: Registry[Method] = Registry("method")


def _applied(sigma: np.ndarray, dW: np.ndarray) -> np.ndarray:
    if _uniform(sigma):
        return np.asarray(dW @ sigma[0].T)
    return np.asarray(np.einsum("nij,nj->ni", sigma, dW))


def _squared(sigma: np.ndarray) -> np.ndarray:
    """σσᵀ, shape (N, d, d); of one matrix for all points one product."""
    one = sigma[:1] if _uniform(sigma) else sigma
    return np.broadcast_to(one @ np.swapaxes(one, -1, -2), (*sigma.shape[:-1], sigma.shape[-2]))


def euler(model: Model, x: np.ndarray, inc: Increment) -> tuple[np.ndarray, np.ndarray]:
    """Euler–Maruyama step, weak order 1."""
    sigma = model.diffusion(inc.t, x)
    return x + model.drift(inc.t, x) * inc.dt + _applied(sigma, inc.dW), sigma


def platen(model: Model, x: np.ndarray, inc: Increment) -> tuple[np.ndarray, np.ndarray]:
    """Platen's explicit step of weak order 2 for general noise (Kloeden and Platen 1992, equation 15.1.3)."""
    dt, dW, root = inc.dt, inc.dW, math.sqrt(inc.dt)
    a, b = model.drift(inc.t, x), model.diffusion(inc.t, x)
    ahead = x + a * dt
    y = (
        x
        + 0.5 * dt * (a + model.drift(inc.end, model.readable(inc.end, ahead + _applied(b, dW), dt)))
        + _applied(b, dW)
    )
    if _uniform(b) and _uniform(after := model.diffusion(inc.end, model.readable(inc.end, ahead, dt))):
        return y + 0.5 * _applied(after - b, dW), b  # what is left of the corrections for noise without x
    for j in range(b.shape[-1]):
        shift = b[..., j] * root
        # the noise ahead, moved along column j: all columns of the row "U", column j of the row "R"
        up, down = (
            model.diffusion(inc.end, model.readable(inc.end, ahead + s * shift, dt))[..., j] for s in (1.0, -1.0)
        )
        w = dW[:, j, None]
        y += 0.25 * (up + down - 2.0 * b[..., j]) * w + 0.25 / root * (up - down) * (w**2 - dt)
        if b.shape[-1] > 1:
            up_all, down_all = (model.diffusion(inc.t, model.readable(inc.t, x + s * shift, dt)) for s in (1.0, -1.0))
            mixed = dW[:, j, None] * dW + dt * inc.signs[:, j, :]
            first, second = (up_all - down_all) / root, up_all + down_all - 2.0 * b
            first[..., j], second[..., j] = 0.0, 0.0
            y += 0.25 * (_applied(second, dW) + _applied(first, mixed))
    return y, b


METHODS.add("euler", Method("euler", 1.0, euler))
METHODS.add("platen", Method("platen", 2.0, platen))


@dataclass(frozen=True)
class Draws:
    """Random numbers of one fine step, for N paths.

    Attributes
    ----------
    dW : ndarray, shape (N, m)
        Brownian increment.
    signs : ndarray, shape (N, m, m)
        Antisymmetric signs.
    exponential, normal, uniform : ndarray, shape (N, d, 2)
        One of each per face, for the extremes of bridges and the instants at which they touch; then those of targets.
    fraction : float
        Instant in the step, as a part of it.
    aside : ndarray, shape (N, m)
        Brownian path there, less the line between the ends of the step.
    arrivals : ndarray, shape (N, J, K)
        Per kind of jumps sums of standard exponential numbers, increasing: there are as many jumps as are below rate
        times step.
    """

    dW: np.ndarray
    signs: np.ndarray
    exponential: np.ndarray
    normal: np.ndarray
    uniform: np.ndarray
    fraction: float
    aside: np.ndarray
    arrivals: np.ndarray


# ------------------------------------------------------------------------------------------------------- paths
class Walk:
    """Paths that walk: positions, weights that are left, what has been paid so far, and by the source in a step."""

    def __init__(self, model: Model, method: Method, x: np.ndarray) -> None:
        self.model, self.method, self.x = model, method, x.copy()
        self.weight = np.ones(len(x))
        self.paid = np.zeros((len(x), model.columns or 1))
        self.earned = np.zeros_like(self.paid)
        self.stationary = model.problem.stationary

    def keep(self, which: np.ndarray) -> None:
        """Drop all paths but the given ones."""
        self.x, self.weight, self.paid = self.x[which], self.weight[which], self.paid[which]

    def pay(self, amount: np.ndarray, value: np.ndarray, which: Any = slice(None)) -> None:
        """Add amount × value; a path without weight is paid nothing, whatever the value."""
        value = value[:, None] if value.ndim == 1 else value
        self.paid[which] += np.where(amount[:, None] != 0.0, amount[:, None] * value, 0.0)

    def advance(self, t: float, end: float, h: float, draws: list[Draws]) -> None:
        """One step made of one fine one, or of two of which the coefficients are read once."""
        model, dt = self.model, h * len(draws)
        dW = draws[0].dW if len(draws) == 1 else draws[0].dW + draws[1].dW
        killing, source = model.problem.killing is not None, model.problem.source is not None
        x = model.readable(t, self.x, dt)
        c = model.rate(t, x) if killing else np.zeros(len(x))
        g = model.running(t, x) if source else None
        y, sigma = self.method.step(model, x, Increment(t, end, dt, dW, draws[0].signs))
        y = y + (self.x - x)
        moves = self._moves(t, x, h, draws)
        if model.bridged:
            stops = [y]
            if len(draws) == 2:
                stops = [0.5 * (self.x + y + _applied(sigma, draws[0].dW - draws[1].dW)), y]
            middle = t if self.stationary else t + 0.5 * dt
            self._walk(Bridge(t, middle, end, dt, stops, _squared(sigma), c, g), draws)
        else:
            self.x = y
        self._jump(end, moves)
        self.x = model.wrap(model.mirror(self.x))
        survived = self.weight
        if killing:
            self.weight = survived * np.exp(-0.5 * (c + model.rate(end, model.fit(self.x))) * dt)
        if g is not None:
            self.pay(0.5 * dt * survived, g)
            self.pay(0.5 * dt * self.weight, model.running(end, model.fit(self.x)))

    def _moves(self, t: float, x: np.ndarray, h: float, draws: list[Draws]) -> np.ndarray | None:
        """Displacements by jumps, at the rates of the start; None without jumps."""
        if not self.model.problem.sde.kinds:
            return None
        rates, moves = self.model.jumps(t, x)
        counts = sum((d.arrivals < h * rates[..., None]).sum(-1) for d in draws)
        return np.asarray(np.einsum("nj,nji->ni", counts, moves))

    def _jump(self, t: float, moves: np.ndarray | None) -> None:
        """Let paths jump: onto faces at most, and paid for where the face absorbs."""
        if moves is None:
            return
        jumping = np.flatnonzero((moves != 0.0).any(1) & (self.weight > 0.0))
        aims = self.x[jumping] + moves[jumping]
        ends = self.model.fit(aims)
        self.x[jumping] = ends
        for axis, pair in enumerate(self.model.box.faces):
            for side, face in enumerate(pair):
                if isinstance(face, Absorbing):
                    edge = (self.model.low, self.model.high)[side][axis]
                    over = aims[:, axis] <= edge if side == 0 else aims[:, axis] >= edge
                    out = jumping[over & (self.weight[jumping] > 0.0)]
                    if len(out):
                        self.pay(self.weight[out], self.model.face(face.value, t, self.x[out]), out)
                        self.weight[out] = 0.0

    def happen(self, event: Event) -> None:
        """Let an event pay and move the paths: onto faces at most, and paid for where the face absorbs."""
        x = self.model.fit(self.x)
        moved, paid = self.model.happens(event, x)
        if paid is not None:
            self.pay(self.weight, paid)
        self.x = x
        self._jump(event.time, moved - x)
        self.x = self.model.wrap(self.x)

    def _walk(self, bridge: "Bridge", draws: list[Draws]) -> None:
        """Follow a bridge: push at reflecting and elastic faces, pay at absorbing ones."""
        faces = [(i, s, self.model.box.faces[i][s]) for i in range(self.x.shape[1]) for s in (0, 1)]
        q = bridge.stops[-1].copy()
        for axis, side, face in faces:
            if isinstance(face, Reflecting | Robin):
                self._push(bridge, q, axis, side, face, [d.exponential[:, axis, side] for d in draws])
        self._inside_walls(q)
        self._absorb(bridge, q, [f for f in faces if isinstance(f[2], Absorbing)], draws[0])
        self.x = q

    def _inside_walls(self, q: np.ndarray) -> None:
        """Project on the walls that push: a second push may have left a corner."""
        for axis, pair in enumerate(self.model.box.faces):
            for side, face in enumerate(pair):
                if isinstance(face, Reflecting | Robin):
                    edge = (self.model.low, self.model.high)[side][axis]
                    q[:, axis] = np.maximum(q[:, axis], edge) if side == 0 else np.minimum(q[:, axis], edge)

    def _push(
        self, bridge: "Bridge", q: np.ndarray, axis: int, side: int, face: Any, exponentials: list[np.ndarray]
    ) -> None:
        """Skorokhod's reflection of q along Σn, by the depth that the minimum of the bridge reaches beyond the wall."""
        edge, inward = (self.model.low, self.model.high)[side][axis], 1.0 if side == 0 else -1.0
        heights = [inward * (stop[:, axis] - edge) for stop in [self.x, *bridge.stops[:-1], q]]
        spread = 2.0 * bridge.S[:, axis, axis] * bridge.dt / len(exponentials)
        depth = np.zeros(len(q))
        for start, stop, exponential in zip(heights, heights[1:], exponentials, strict=False):
            lowest = 0.5 * (start + stop - np.sqrt((stop - start) ** 2 + spread * exponential))
            depth = np.maximum(depth, -lowest)
        hit = np.flatnonzero((depth > 0.0) & (self.weight > 0.0))
        if not len(hit):
            return
        wall = self.model.fit(q[hit])
        wall[:, axis] = edge
        S = self.model.covariance(bridge.t, wall)
        normal = S[:, axis, axis]
        q[hit] += inward * depth[hit, None] * _conormal(S, axis)
        if isinstance(face, Robin):
            self._kill(bridge, face, hit, wall, 2.0 * depth[hit] / np.maximum(normal, 1e-300))

    def _kill(self, bridge: "Bridge", face: Robin, hit: np.ndarray, wall: np.ndarray, local_time: np.ndarray) -> None:
        """Elastic face: pay v at the rate of the local time, kill at the rate κ of it."""
        t = bridge.middle
        exponent = self.model.face(face.kappa, t, wall) * local_time
        share = np.divide(-np.expm1(-exponent), exponent, out=np.ones_like(exponent), where=exponent != 0.0)
        self.pay(self.weight[hit] * local_time * share, self.model.face(face.value, t, wall), hit)
        self.weight[hit] *= np.exp(-exponent)

    def _absorb(self, bridge: "Bridge", q: np.ndarray, faces: list[tuple[int, int, Any]], draw: Draws) -> None:
        """Pay at absorbing faces with the probability that the bridge touched them."""
        stops = self.model.problem.stops
        if not faces and not stops:
            return
        touches = []
        for axis, side, _ in faces:
            edge, inward = (self.model.low, self.model.high)[side][axis], 1.0 if side == 0 else -1.0
            start, stop = np.maximum(inward * (self.x[:, axis] - edge), 0.0), inward * (q[:, axis] - edge)
            touches.append(Touch.of(start, stop, bridge.S[:, axis, axis] * bridge.dt))
        for which in stops:
            slopes = which.slopes(self.x)
            across = np.einsum("ni,nij,nj->n", slopes, bridge.S, slopes)
            start, stop = np.maximum(which.levels(self.x), 0.0), which.levels(self.model.fit(q))
            touches.append(Touch.of(start, stop, across * bridge.dt))
        # targets draw their numbers after those of the faces
        faces = [*faces, *((self.x.shape[1] + k, 0, which) for k, which in enumerate(stops))]
        for n, (touch, (axis, side, face)) in enumerate(zip(touches, faces, strict=True)):
            hit = np.flatnonzero((touch.chance > NEGLIGIBLE) & (self.weight > 0.0))
            if not len(hit):
                continue
            fraction = touch.instant(hit, draw.normal[hit, axis, side], draw.uniform[hit, axis, side])
            share = touch.chance[hit]
            for m, other in enumerate(touches):
                if m != n:
                    before = other.chance_before(hit, fraction)
                    # a path that starts in a corner leaves through the first of its faces
                    before = np.where(touch.start[hit] == 0.0, (other.start[hit] == 0.0) & (m < n), before)
                    share = share * (1.0 - before)
            self._exit(bridge, q, (axis, side, face), hit, fraction, self.weight[hit] * share)
        for touch in touches:
            self.weight = self.weight * (1.0 - touch.chance)

    def _exit(
        self,
        bridge: "Bridge",
        q: np.ndarray,
        which: tuple[int, int, Any],
        hit: np.ndarray,
        fraction: np.ndarray,
        amount: np.ndarray,
    ) -> None:
        """Pay the source until the exit and the face's value there."""
        axis, side, face = which
        spent, p = fraction * bridge.dt, self.x[hit]
        if bridge.g is not None:
            self.pay(amount * spent, bridge.g[hit], hit)
        amount = amount * np.exp(-bridge.c[hit] * spent)
        place = p + fraction[:, None] * (q[hit] - p)
        if axis >= self.x.shape[1]:
            self.pay(amount, self._paid_in(bridge, face, self.model.fit(place), fraction), hit)
            return
        gap = (self.model.low, self.model.high)[side][axis] - place[:, axis]
        place = self.model.fit(place + gap[:, None] * _conormal(bridge.S[hit], axis))
        value = self.model.face(face.value, bridge.t, place)
        if callable(face.value) and not self.stationary:
            # functions take one time for all points: linear between the ends of the step
            along = fraction[:, None] if value.ndim == 2 else fraction
            value = value + along * (self.model.face(face.value, bridge.end, place) - value)
        self.pay(amount, value, hit)

    def _paid_in(self, bridge: "Bridge", stop: Stop, place: np.ndarray, fraction: np.ndarray) -> np.ndarray:
        """What a target pays about a place, at the point of its boundary along the slope of its level."""
        slope = stop.slopes(place)
        steep = np.maximum((slope**2).sum(-1), 1e-300)
        place = self.model.fit(place - (stop.levels(place) / steep)[:, None] * slope)
        first = stop.paid(0.0 if self.stationary else bridge.t, place)
        if self.stationary:
            return first
        return np.asarray(first + fraction * (stop.paid(bridge.end, place) - first))


class SampledWalk(Walk):
    r"""Euler's paths whose coefficients are read, and whose source is paid, at instants drawn at random.

    One uniform instant per fine step, the same for all paths; a step twice as long pays at both of its two, and reads
    its coefficients at one of them, drawn too. At that instant the path is where Brownian motion with the step's
    coefficients would be, and the source is paid with the probability that it is still alive there: the sum over
    steps is an unbiased estimate of the integral along Euler's paths in continuous time, however rough the source is
    in time and space.
    """

    def advance(self, t: float, end: float, h: float, draws: list[Draws]) -> None:
        """One step made of one fine one, or of two of which the coefficients are read once."""
        model, dt = self.model, h * len(draws)
        begins = [0.0 if self.stationary else t + n * h for n in range(len(draws))]
        instants = [a if self.stationary else a + d.fraction * h for a, d in zip(begins, draws, strict=True)]
        # the fraction of the last fine step, drawn anew every time, chooses without another number
        now = instants[int(draws[-1].fraction * 2.0**20) % len(draws)]
        x = model.fit(self.x)
        drift, sigma = model.drift(now, x), model.diffusion(now, x)
        S = _squared(sigma)
        killing, rate = model.problem.killing is not None, np.zeros(len(x))
        W = np.zeros_like(draws[0].dW)
        paid = self.paid.copy()
        for n, (draw, instant) in enumerate(zip(draws, instants, strict=True)):
            spent = (n + draw.fraction) * h
            free = self.x + drift * spent + _applied(sigma, W + draw.fraction * draw.dW + draw.aside)
            place, alive = self._somewhere(free, S, spent)
            amount = h * self.weight * alive
            if killing:
                c = model.rate(instant, place)
                amount *= np.exp(-(rate + c * draw.fraction * h))
                rate = rate + c * h
            self.pay(amount, model.running(instant, place))
            W = W + draw.dW
        self.earned = self.paid - paid
        moves = self._moves(now, x, h, draws)
        y = self.x + drift * dt + _applied(sigma, W)
        if model.bridged:
            stops = [y]
            if len(draws) == 2:
                stops = [0.5 * (self.x + y + _applied(sigma, draws[0].dW - draws[1].dW)), y]
            self._walk(Bridge(t, now, end, dt, stops, S, rate / dt, None), draws)
        else:
            self.x = y
        if killing:
            self.weight = self.weight * np.exp(-rate)
        self._jump(end, moves)
        self.x = model.wrap(self.x)

    def _somewhere(self, free: np.ndarray, S: np.ndarray, spent: float) -> tuple[np.ndarray, np.ndarray]:
        """Where a path is inside a step, and the probability that it still is: folded at walls that push."""
        alive = np.ones(len(free))
        if not self.model.bridged:
            return self.model.fit(free), alive
        place = free.copy()
        for axis, pair in enumerate(self.model.box.faces):
            for side, face in enumerate(pair):
                edge, inward = (self.model.low, self.model.high)[side][axis], 1.0 if side == 0 else -1.0
                height = inward * (place[:, axis] - edge)
                if isinstance(face, Absorbing):
                    start = np.maximum(inward * (self.x[:, axis] - edge), 0.0)
                    alive = alive * (1.0 - Touch.of(start, height, S[:, axis, axis] * spent).chance)
                elif isinstance(face, Reflecting | Robin) and (height < 0.0).any():
                    place += 2.0 * inward * np.maximum(-height, 0.0)[:, None] * _conormal(S, axis)
        return self.model.fit(place), alive


def _conormal(S: np.ndarray, axis: int) -> np.ndarray:
    """Σn over n·Σn for the face normal to an axis, shape (N, d); n where no noise crosses the face."""
    normal = S[:, axis, axis, None]
    direction = np.divide(S[:, :, axis], normal, out=np.zeros(S.shape[:2]), where=normal > 0.0)
    direction[:, axis] = 1.0
    return np.asarray(direction)


@dataclass(frozen=True)
class Bridge:
    """One step of a path as a Brownian bridge: from where the walk is over the stops (the last is its end).

    Attributes
    ----------
    t, middle, end, dt : float
        Start, an instant inside at which local time is paid for, end as coefficients see it, length.
    stops : list of ndarray, shape (N, d)
        Free path after equal parts of the step.
    S, c, g : ndarray
        Covariance rate, killing rate and source at the start.
    """

    t: float
    middle: float
    end: float
    dt: float
    stops: list[np.ndarray]
    S: np.ndarray
    c: np.ndarray
    g: np.ndarray | None


@dataclass(frozen=True)
class Touch:
    """Law of the first touch of a wall by Brownian bridges that start and stop at given distances from it.

    The bridge touches with probability exp(−2·start·stop/variance) (surely if it stops beyond); the instant, as a
    fraction f of the step, then has f/(1 − f) inverse Gaussian with mean start over the modulus of stop and shape
    start²/variance.

    Attributes
    ----------
    start, stop, variance : ndarray, shape (N,)
        Distance at the start (≥ 0), its modulus at the end, variance of the free path.
    chance, growth : ndarray, shape (N,)
        Probability of a touch, and exp(2·start·abs(stop)/variance) times it (as a logarithm).
    """

    start: np.ndarray
    stop: np.ndarray
    variance: np.ndarray
    chance: np.ndarray
    growth: np.ndarray

    @classmethod
    def of(cls, start: np.ndarray, stop: np.ndarray, variance: np.ndarray) -> "Touch":
        """Law from signed distances; without variance the path is a straight line, which may start on the wall."""
        sure = (stop < 0.0) | ((variance > 0.0) & ((start == 0.0) | (stop == 0.0)))
        variance = np.maximum(variance, 1e-300)
        exponent = 2.0 * start * stop / variance
        exponent = np.where(sure | (exponent > 0.0), exponent, np.inf)
        chance = np.where(sure, 1.0, np.exp(-np.maximum(exponent, 0.0)))
        return cls(start, np.abs(stop), variance, chance, np.where(stop <= 0.0, -exponent, 0.0))

    def instant(self, which: np.ndarray, normal: np.ndarray, uniform: np.ndarray) -> np.ndarray:
        """Draw the fraction of the step at which a bridge that touches does so (Michael, Schucany and Haas 1976)."""
        start, stop = self.start[which], self.stop[which]
        scaled = 0.5 * normal**2 * self.variance[which] / np.maximum(start * stop, 1e-300)
        lesser = 1.0 / (1.0 + scaled + np.sqrt(scaled * (2.0 + scaled)))  # root of the quadratic, over the mean
        near = uniform * (1.0 + lesser) <= 1.0  # odds start/stop·lesser, else start/(stop·lesser)
        towards = np.where(near, start * lesser, start)
        left = np.where(near, stop, stop * lesser)
        return np.asarray(np.divide(towards, towards + left, out=np.zeros(len(which)), where=start > 0.0))

    def chance_before(self, which: np.ndarray, fraction: np.ndarray) -> np.ndarray:
        """Probability of a touch before a fraction of the step."""
        early = np.zeros(len(which))
        some = np.flatnonzero(self.chance[which] > NEGLIGIBLE)
        pick, f = which[some], fraction[some]
        odds = f / np.maximum(1.0 - f, 1e-300)
        scale = 1.0 / np.sqrt(np.maximum(odds * self.variance[pick], 1e-300))
        first = ndtr(scale * (odds * self.stop[pick] - self.start[pick]))
        second = log_ndtr(-scale * (odds * self.stop[pick] + self.start[pick]))
        early[some] = self.chance[pick] * first + np.exp(np.minimum(self.growth[pick] + second, 0.0))
        return np.asarray(np.minimum(early, self.chance[which]))


# ------------------------------------------------------------------------------------------------------- many paths
@dataclass(frozen=True)
class Schedule:
    """Pairs of fine steps.

    Attributes
    ----------
    pieces : tuple of (start, step, pairs)
        Pieces without breakpoints; a stationary problem has one.
    breaks : tuple of float
        Ends of pieces at which coefficients jump.
    steps : int
        Fine steps in all (stationary: per crossing time).
    """

    pieces: tuple[tuple[float, float, int], ...]
    breaks: tuple[float, ...]
    steps: int

    def pairs(self) -> Iterator[tuple[float, float, float, float]]:
        """Yield start, middle and end (as coefficients see it) of every pair of steps, and the length of one."""
        for start, h, pairs in self.pieces:
            for n in range(pairs):
                t = start + 2 * n * h
                end = start + (2 * n + 2) * h
                at_break = n == pairs - 1 and self.breaks
                yield t, t + h, end - INSIDE * h if at_break else end, h


def _schedule(
    problem: KolmogorovProblem, model: Model, starts: np.ndarray, steps: int, graded: bool = False
) -> Schedule:
    """Equal steps between breakpoints; graded: shorter and shorter ones towards the horizon in the last stretch."""
    if problem.horizon is None:
        h = _crossing_time(model, starts) / steps
        return Schedule(((0.0, h, CROSSINGS * math.ceil(steps / 2)),), (), steps)
    edges = [0.0, *problem.sde.breakpoints, problem.horizon]
    pieces = []
    for a, b in itertools.pairwise(edges):
        pairs = max(1, math.ceil(0.5 * steps * (b - a) / problem.horizon - 1e-9))
        if graded and b == problem.horizon:
            inner = b - (b - a) * np.linspace(1.0, 0.0, pairs + 1) ** 2
            pieces += [(float(p), 0.5 * float(q - p), 1) for p, q in itertools.pairwise(inner)]
        else:
            pieces.append((a, 0.5 * (b - a) / pairs, pairs))
    return Schedule(tuple(pieces), problem.sde.breakpoints, 2 * sum(n for *_, n in pieces))


def _crossing_time(model: Model, starts: np.ndarray) -> float:
    """1/max(Σ_ii/L_i² + |b_i|/L_i) over a few points of the box; the killing time where the box is infinite."""
    low, high = np.array(model.box.lower), np.array(model.box.upper)
    finite = np.isfinite(high - low)
    ends = [np.where(finite, low, starts.min(0)), np.where(finite, high, starts.max(0))]
    mesh = np.meshgrid(*np.linspace(ends[0], ends[1], 9).T, indexing="ij")
    points = np.concatenate([np.stack(mesh, -1).reshape(-1, len(low)), starts])
    rate = float(model.rate(0.0, points).max()) if not finite.any() else 0.0
    length = (high - low)[finite]
    variances = np.einsum("nii->ni", model.covariance(0.0, points))[:, finite]
    speeds = np.abs(model.drift(0.0, points))[:, finite]
    rate = max(rate, float((variances / length**2 + speeds / length).max(initial=0.0)))
    if rate <= 0.0:
        raise InputError("problem", "a stationary problem in which nothing moves", "noise or drift")
    return 1.0 / rate


class Pair:
    """The same paths with steps h and 2h; from the m points of starts (N, m, d) they are driven by the same noise."""

    def __init__(
        self, model: Model, method: Method, starts: np.ndarray, rng: np.random.Generator, sampled: bool = False
    ) -> None:
        self.model, self.rng, self.sampled = model, rng, sampled
        self.count, self.together = starts.shape[:2]
        places = starts.reshape(-1, starts.shape[-1])
        kind = SampledWalk if sampled else Walk
        self.walks = [kind(model, method, places), kind(model, method, places)]
        self.paid = np.zeros((2, len(places), model.columns or 1))
        self.index = np.arange(len(places))
        self.noises = model.noise_columns(places)
        faces = [f for pair in model.box.faces for f in pair]
        self.pushed = any(isinstance(f, Reflecting | Robin) for f in faces)
        self.absorbed = any(isinstance(f, Absorbing) for f in faces) or bool(model.problem.stops)
        self.signed = method.order > 1.0 and self.noises > 1

    @property
    def totals(self) -> np.ndarray:
        """What each path was paid, fine and coarse, shape (2, N, m, k)."""
        return self.paid.reshape(2, self.count, self.together, -1)

    def run(self, schedule: Schedule, spread: np.ndarray, owner: np.ndarray, share: np.ndarray) -> float:
        """Simulate; totals receive what each path was paid. Returns the weight of the paths that had to be given up.

        To ``spread``, shape (points, k), is added the variance that instants drawn for all paths together bring into
        the sums over paths (weighted by ``share``, shape (N, m)) of the ``owner`` points. Of a single instant per step
        a variance cannot be seen: the squared difference of two neighbouring steps is taken, which is at least as
        large in the mean (collapsed strata: W. G. Cochran, 1977, Sampling Techniques, section 5A.12), less the part
        that the paths themselves bring.
        """
        first = np.flatnonzero(np.diff(owner, prepend=-1))
        n = np.diff(np.append(first, len(owner)))[:, None].astype(float)
        stationary = self.model.problem.stationary
        for t, middle, end, h in schedule.pairs():
            if stationary:
                t = middle = end = 0.0
            draws = [self._draw(t, h), self._draw(t, h)]
            fine, coarse = self.walks
            fine.advance(t, middle, h, draws[:1])
            earned = fine.earned
            fine.advance(middle, end, h, draws[1:])
            coarse.advance(t, end, h, draws)
            for event in self.model.events_at(end, h):
                for walk in self.walks:
                    walk.happen(event)
            if self.sampled and not stationary:
                uneven = np.zeros((self.count * self.together, spread.shape[1]))
                uneven[self.index] = earned - fine.earned
                uneven = np.einsum("nmk,nm->nk", uneven.reshape(*share.shape, -1), share)
                total, squares = np.add.reduceat(uneven, first), np.add.reduceat(uneven**2, first)
                spread[owner[first]] += total**2 - (squares - total**2 / n) * n / np.maximum(n - 1.0, 1.0)
            self._drop()
            if not len(self.index):
                return 0.0
        left = float(self.walks[0].weight.sum()) if stationary else 0.0
        for walk in self.walks:
            if not stationary:
                walk.pay(walk.weight, self.model.final(self.model.fit(walk.x)))
        self._store(np.ones(len(self.index), dtype=bool))
        return left

    def _draw(self, t: float, h: float) -> Draws:
        """Draw the random numbers of one fine step; paths that go together share them."""
        d, m, rng = self.model.box.dim, self.noises, self.rng
        n = len(self.index) if self.together == 1 else self.count
        signs = np.zeros((n, m, m)) if self.signed else np.zeros((n, 0, 0))
        if self.signed:
            upper = np.triu(2.0 * rng.integers(0, 2, (n, m, m)) - 1.0, 1)
            signs = upper - np.swapaxes(upper, -1, -2)
        dW = math.sqrt(h) * rng.standard_normal((n, m))
        push = rng.standard_exponential((n, d, 2)) if self.pushed else np.zeros((n, d, 2))
        shape = (n, d + len(self.model.problem.stops), 2)
        normal, uniform = (rng.standard_normal(shape), rng.random(shape)) if self.absorbed else (np.zeros(shape),) * 2
        fraction, aside = 0.5, np.zeros((n, m))
        if self.sampled:
            fraction = float(rng.random())
            aside = math.sqrt(fraction * (1.0 - fraction) * h) * rng.standard_normal((n, m))
        arrivals = self._arrivals(t, h, n)
        who = self.index // self.together if self.together > 1 else slice(None)
        return Draws(dW[who], signs[who], push[who], normal[who], uniform[who], fraction, aside[who], arrivals[who])

    def _arrivals(self, t: float, h: float, n: int) -> np.ndarray:
        """Sums of exponential numbers, enough for twice the largest rate that any path has now."""
        if not self.model.problem.sde.kinds:
            return np.zeros((n, 0, 0))
        rates = [self.model.jumps(t, self.model.fit(walk.x))[0] for walk in self.walks]
        mean = ROOM * h * max(float(rate.max(initial=0.0)) for rate in rates)
        count = math.ceil(mean + SURE * math.sqrt(mean)) + LEAST_ARRIVALS
        return np.cumsum(self.rng.standard_exponential((n, rates[0].shape[1], count)), -1)

    def _drop(self) -> None:
        """Forget paths that are over in both walks, once there are enough of them."""
        alive = (self.walks[0].weight > NEGLIGIBLE) | (self.walks[1].weight > NEGLIGIBLE)
        if alive.sum() <= 0.8 * len(alive):
            self._store(~alive)
            for walk in self.walks:
                walk.keep(alive)
            self.index = self.index[alive]

    def _store(self, which: np.ndarray) -> None:
        for total, walk in zip(self.paid, self.walks, strict=True):
            total[self.index[which]] = walk.paid[which]


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
