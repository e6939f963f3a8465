"""What is asked: the equation, its terminal data, horizon and domain."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial, reduce
from typing import Any, Protocol

import numpy as np

from kolmo.arrays import Array, as_numpy, detached, is_module, is_tensor, namespace
from kolmo.errors import InputError
from kolmo.problem.box import Box
from kolmo.problem.events import Event, Payment, happening
from kolmo.problem.faces import FaceValue
from kolmo.problem.motion import Motion
from kolmo.problem.sde import SDE, evaluate

Function = Callable[..., Array]

# Horizons from here on make products with rates and squares overflow.
LONGEST = 1e100


class Stop(Protocol):
    """A set inside the box where paths stop and are paid: not positive levels."""

    def levels(self, x: Any) -> np.ndarray:
        """The level function at points (n, d), shape (n,)."""

    def slopes(self, x: np.ndarray) -> np.ndarray:
        """Its gradient there, shape (n, d)."""

    def paid(self, t: float, x: np.ndarray) -> np.ndarray:
        """What is paid at points (n, d), shape (n,)."""


class KolmogorovProblem:
    r"""A backward Kolmogorov equation.

    .. math::
        \partial_t u + b\cdot\nabla u + \tfrac12\,\mathrm{tr}(\Sigma\nabla^2 u)
        + \sum_j\lambda_j\,\big(u(\cdot + J_j) - u\big) - c\,u + g = 0
        \quad\text{on } [0, T), \qquad u(T, \cdot) = \varphi

    so that :math:`u(t, x) = E[e^{-\int c}\varphi(X_T) + \int e^{-\int c} g\,ds \mid X_t = x]` (Feynman–Kac).

    Parameters
    ----------
    sde : SDE
        Drift b and covariance rate Σ; jumps by J_j at the rates λ_j, if it has any.
    terminal : callable or None
        φ: ``terminal(x)`` -> ``(...)``, or ``(..., k)`` for k problems solved together. None if stationary.
    horizon : float or None
        T > 0; time runs from 0 to T. None: stationary, b·∇u + ½ Σ:∇²u − cu + g = 0 (exit times, committors).
    box : Box, optional
        Domain and faces; None: all of R^d.
    killing, source : callable or float, optional
        c and g: ``f(t, x)`` -> ``(...)``; a source may also give ``(..., k)``.
    breaks : sequence, optional
        Places where coefficients or data jump or bend: numbers in one dimension, or functions ``f(x)`` -> ``(...)``
        whose zero sets they are. Solvers by tolerance look for breaks themselves; what is told here they need not find.
    events : dict, optional
        What happens at times inside (0, T): ``{t: map}``, the state is moved from x to ``map(x)`` (dividends, resets,
        doses, layers), u(t−, x) = u(t, map(x)); ``{t: Payment(amount)}``, something is paid, u(t−, x) = u(t, x) +
        amount(x); or a list of both, in their order. At t itself the state is that afterwards.

    Raises
    ------
    InputError
        For a horizon that is not positive, dimensions that disagree, or terminal data that do not fit the horizon.

    References
    ----------
    I. Karatzas and S. E. Shreve (1991), Brownian Motion and Stochastic Calculus, section 5.7: the formula of
    Feynman and Kac.

    Examples
    --------
    >>> import numpy as np, kolmo
    >>> ou = kolmo.SDE(lambda t, x: -x, diffusion=0.5, dim=1)
    >>> kolmo.KolmogorovProblem(ou, lambda x: np.tanh(x[..., 0]), 1.0)
    KolmogorovProblem(dim=1, horizon=1.0, Box(-inf..inf open))
    """

    def __init__(
        self,
        sde: SDE,
        terminal: Function | None,
        horizon: float | None,
        box: Box | None = None,
        *,
        killing: Function | float | None = None,
        source: Function | float | None = None,
        breaks: Sequence[float | Function] | None = None,
        events: Mapping[float, Any] | None = None,
    ) -> None:
        if horizon is not None and not 0.0 < float(horizon) < LONGEST:
            raise InputError(
                "horizon", horizon, f"a positive number below {LONGEST:g}, or None for a stationary problem"
            )
        if (terminal is None) != (horizon is None):
            raise InputError(
                "terminal, horizon",
                "no terminal data" if terminal is None else "terminal data without a horizon",
                "both, or neither for a stationary problem (horizon=None, terminal=None)",
            )
        if terminal is not None and not callable(terminal):
            raise InputError("terminal", repr(terminal), "a function terminal(x) of points x of shape (..., d)")
        dims = {n: d for n, d in (("sde", sde.dim), ("box", None if box is None else box.dim)) if d is not None}
        if not dims:
            raise InputError("dim", "nothing that tells the dimension", "a box, or dim=d of SDE or ControlProblem")
        if len(set(dims.values())) > 1:
            raise InputError("sde, box", f"dimensions {dims}", "one dimension")
        self.dim: int = next(iter(dims.values()))
        if self.dim > 3:
            raise InputError("dim", self.dim, "1, 2 or 3", "map the state to fewer features first")
        self.sde, self.terminal, self.killing, self.source = sde, terminal, killing, source
        self.breaks = _checked_breaks(breaks, self.dim)
        if sde.kinds and box is not None and not box.where("reached").all():
            raise InputError(
                "boundary", "'entrance' with jumps", "'natural', 'reflecting', 'absorbing' or 'open' faces"
            )
        if box is not None and box.has("constrains"):
            raise InputError(
                "boundary",
                "'constrained' without a control to choose",
                "a control.ControlProblem for such a face",
                "'natural' where noise dies and the drift does not point out, else 'reflecting' or 'absorbing'",
            )
        self.horizon = None if horizon is None else float(horizon)
        self._handed: str | None = None
        self.stops: tuple[Stop, ...] = ()
        self.box = Box.unbounded(self.dim) if box is None else box
        # of a problem in coordinates at rest: how its faces move, and whether it ends because they have met
        self.motion: Motion | None = None
        self.met = False
        if self.stationary and self.box.moves:
            raise InputError("box", "faces that move in a stationary problem", "a horizon, or faces at rest")
        if events or sde.events:
            self.sde = copy.copy(sde)
            self.sde.events = happening(events, self.horizon)
            self.sde.breakpoints = tuple(sorted({*sde.breakpoints, *(event.time for event in self.sde.events)}))
        if self.horizon is not None and any(not 0 < t < self.horizon for t in sde.breakpoints):
            outside = [t for t in sde.breakpoints if not 0 < t < self.horizon]
            raise InputError("breakpoints", outside, f"times inside (0, {self.horizon})")

    @property
    def stationary(self) -> bool:
        """Whether no time is involved."""
        return self.horizon is None

    def handing(self, arrays: str, device: Any = None) -> "KolmogorovProblem":
        """The same problem whose functions are handed arrays of the given library ("numpy" or "torch"), on a device."""
        other = copy.copy(self)
        other.sde = copy.copy(self.sde)
        other.sde.arrays = other._handed = arrays
        other.sde.device = self.sde.device if device is None else device
        return other

    def stopped_in(self, stops: Iterable[Stop]) -> "KolmogorovProblem":
        """The same problem with sets inside the box where paths stop: for ``monte_carlo``, solvers refuse it."""
        other = copy.copy(self)
        other.stops = tuple(stops)
        return other

    def broken_at(self, times: Iterable[float]) -> "KolmogorovProblem":
        """The same problem with more breakpoints: times at which anything in it jumps."""
        more = tuple(sorted({*self.sde.breakpoints, *times}))
        if more == self.sde.breakpoints:
            return self
        other = copy.copy(self)
        other.sde = copy.copy(self.sde)
        other.sde.breakpoints = more
        return other

    def showing(self, name: str, t: float) -> "KolmogorovProblem":
        """The same problem with another of its functions at an instant as terminal data: to treat both alike.

        ``name``: "drift", "covariance" (d² columns), "killing" or "source".
        """
        functions: dict[str, Function] = {
            "drift": self.sde.drift,
            "covariance": lambda t, x: self.sde.covariance(t, x).reshape(*x.shape[:-1], -1),
            "killing": self.rate,
            "source": self.running,
        }
        other = copy.copy(self)
        other.terminal = lambda x: functions[name](t, x)
        return other

    @property
    def device(self) -> Any:
        """Device of the tensors that functions are handed; None: the CPU."""
        return self.sde.device

    @property
    def arrays(self) -> str | None:
        """Library of what functions are handed: "torch" if asked for, or if one of them is a module or a tensor."""
        if self._handed is not None:
            return self._handed
        parts = [self.terminal, self.killing, self.source]
        for part in (part for event in self.events for part in event.parts):
            parts.append(part.amount if isinstance(part, Payment) else part)
        parts += [getattr(face, name) for _, _, face in self.box.each() for name in face.data]
        return "torch" if any(is_module(p) or is_tensor(p) for p in parts) else self.sde.arrays

    def final(self, x: Array) -> Array:
        """Terminal data φ at points x, shape ``(...)`` or ``(..., k)``."""
        if self.terminal is None:
            raise InputError("terminal", None, "terminal data", "the problem is stationary")
        terminal = self.terminal
        value = self._evaluate(lambda t, y: terminal(y), self.horizon or 0.0, x, "terminal")
        return _keep_points(value, x, "terminal", columns=True)

    def rate(self, t: float, x: Array) -> Array:
        """Killing rate c, shape ``(...)``."""
        value = self._evaluate(0.0 if self.killing is None else self.killing, t, x, "killing")
        return _keep_points(value, x, "killing", columns=False)

    def running(self, t: float, x: Array) -> Array:
        """Running source g, shape ``(...)`` or ``(..., k)``."""
        value = self._evaluate(0.0 if self.source is None else self.source, t, x, "source")
        return _keep_points(value, x, "source", columns=True)

    @property
    def events(self) -> tuple[Event, ...]:
        """What happens at given times, in order."""
        return self.sde.events

    def happens(self, event: Event, x: Array) -> tuple[Array, Array | None]:
        """Where an event moves points (..., d) to, and what it pays: (...) or (..., k), None where it pays nothing."""
        return event.run(x, self.arrays, self.device)

    def on_face(self, value: FaceValue, t: float, x: Array) -> Array:
        """Datum of a face (number, tensor or function of (t, x)) at points x, shape ``(...)`` or ``(..., k)``."""
        return _keep_points(self._evaluate(value, t, x, "boundary value"), x, "boundary value", columns=True)

    def _evaluate(self, f: Any, t: float, x: Array, argument: str) -> Array:
        return evaluate(f, t, x, argument, self.arrays, self.device)

    def __repr__(self) -> str:
        return f"KolmogorovProblem(dim={self.dim}, horizon={self.horizon}, {self.box!r})"


def refuse_moves(problem: KolmogorovProblem, method: str, instead: str = "") -> None:
    """Raise an InputError where a method knows neither faces that move nor events."""
    if problem.box.moves or problem.motion is not None:
        raise InputError("box", "faces that move", f"faces at rest for {method}", instead)
    if problem.events:
        raise InputError("events", f"{len(problem.events)} of them", f"a problem without events for {method}", instead)


def _checked_breaks(breaks: Sequence[float | Function] | None, dim: int) -> tuple[float | Function, ...]:
    """Breaks as they were given: finite numbers in one dimension, or functions."""
    given = () if breaks is None else tuple(breaks)
    for place in given:
        number = isinstance(place, (int, float, np.number)) and not isinstance(place, bool)
        if not (callable(place) or (number and dim == 1 and np.isfinite(place))):
            raise InputError(
                "breaks",
                repr(place),
                "functions f(x) whose zero sets the breaks are" + (", or finite numbers" if dim == 1 else ""),
                "breaks=[lambda x: x[..., 0] - 0.5]",
            )
    return tuple(place if callable(place) else float(place) for place in given)


def _keep_points(value: Array, x: Array, argument: str, *, columns: bool) -> Array:
    """Check that a function of points kept their leading axes; broadcast plain numbers."""
    lead = tuple(x.shape[:-1])
    if tuple(value.shape) == lead or (columns and value.ndim == len(lead) + 1 and tuple(value.shape[:-1]) == lead):
        return value
    if value.ndim == 0:
        return value + 0.0 * x[..., 0]
    if x.shape[-1] == 1 and tuple(value.shape) == (*lead, 1):
        return value[..., 0]
    raise InputError(
        argument,
        f"a result of shape {tuple(value.shape)}",
        f"shape {lead}"
        + (f" or ({', '.join(map(str, lead))}, k)" if columns else "")
        + f" for points of shape {tuple(x.shape)}",
        f"{argument} must be vectorised over the leading axes of x, e.g. use x[..., 0] and numpy functions",
    )


def check_vectorised(problem: KolmogorovProblem, points: np.ndarray) -> None:
    """Raise an InputError where a function's value at a point depends on which other points it is handed with."""
    t = 0.5 * (problem.horizon or 0.0)
    points = points[~_unread(points, problem.box)]
    if not len(points):
        return
    sde = problem.sde
    asked: list[tuple[str, Any, Callable[[np.ndarray], Array]]] = [
        ("drift", sde.given["drift"], partial(sde.drift, t)),
        ("covariance", sde.given["covariance"], partial(sde.covariance, t)),
        ("killing", problem.killing, partial(problem.rate, t)),
        ("source", problem.source, partial(problem.running, t)),
        ("terminal", problem.terminal, problem.final),
    ]
    for _, given, f in asked:
        if not (given is None or callable(given) or isinstance(given, (int, float))):
            f(points[:1])  # says so where a constant is no number
    functions = {argument: f for argument, given, f in asked if callable(given)}
    functions |= {f"jumps[{j}]": partial(_one_kind, problem, t, j) for j in range(len(sde.kinds))}
    some = points[:: max(1, len(points) // 5)][:6]
    # on a jump rounding decides, which may differ with the number of points: a little aside it does not
    aside = some + 1e-6 * (np.roll(some, 1, axis=0) - some)
    for argument, f in functions.items():
        handed = some.copy()
        f(handed)
        if not np.array_equal(some, handed):
            fix = "write x = x + 1.0 in place of x += 1.0"
            raise InputError(argument, "a function that changes the points it is handed", "one that leaves them", fix)
        apart = _apart(f, some)
        if (apart > 0).any() and (_apart(f, aside) > 0).any():
            where = some[int(apart.argmax())]
            raise InputError(
                argument,
                f"a value at x = {where.tolist()} that depends on the other points in the array",
                "a function vectorised over the leading axes of x (and not random)",
                "use x[..., 0], x[..., 1] for the coordinates, not x[0], x[1]",
            )


def _one_kind(problem: KolmogorovProblem, t: float, j: int, x: np.ndarray) -> np.ndarray:
    """Rate and displacement of one kind of jumps, shape (..., 1 + d)."""
    rates, moves = problem.sde.jumps(t, x)
    return np.concatenate([as_numpy(rates)[..., j, None], as_numpy(moves)[..., j, :]], -1)


def _unread(points: np.ndarray, box: Box) -> np.ndarray:
    """Which points lie on faces where coefficients may be infinite."""
    on = np.stack([points == np.array(ends) for ends in (box.lower, box.upper)], -1)
    return np.asarray((on & box.where("unread")).any((1, 2)))


def _apart(f: Callable[[np.ndarray], Array], x: np.ndarray) -> np.ndarray:
    """How far values at points together differ from those at each alone, beyond rounding; shape (points,)."""
    together, alone = as_numpy(f(x)), np.stack([as_numpy(f(one[None]))[0] for one in x])
    scale = np.abs(np.where(np.isfinite(together), together, 0.0)).max(0)
    same = np.isclose(together, alone, rtol=1e-7, atol=1e-12 * scale, equal_nan=True)
    with np.errstate(over="ignore"):
        single = together.astype(np.float32)
    if np.array_equal(together, single, equal_nan=True):
        # of a network in single precision, which sums in another order where it gets another number of points
        same |= np.abs(together - alone) <= 1e-5 * scale
    difference = np.nan_to_num(np.abs(together - alone), nan=np.inf)
    return np.asarray(np.where(same, 0.0, difference).reshape(len(x), -1).max(1))


def check_finite(value: Array, x: Array, t: float, argument: str, box: Box | None = None) -> Array:
    """Raise an InputError that says where a coefficient is NaN or infinite, and on which face of the box."""
    if not bool(namespace(value).isfinite(value).all()):
        where = np.argwhere(~np.isfinite(as_numpy(value)))[0]
        point = as_numpy(x)[tuple(where[: x.ndim - 1])]
        face = "" if box is None else _named_face(point, box)
        raise InputError(
            argument,
            f"{as_numpy(value)[tuple(where)]} at t = {t:g}, x = {point.tolist()}{face}",
            "finite values everywhere in the box",
            "boundary 'entrance' where the process leaves the end at once and never reaches it, or a box that begins "
            "a little inside (from a small positive number in place of 0)"
            if face
            else "",
        )
    return value


def _named_face(point: np.ndarray, box: Box) -> str:
    """Which face of a box a point lies on, in words; nothing where it lies on none."""
    for axis, side, face in box.each():
        if point[axis] == (box.lower, box.upper)[side][axis]:
            return f", on the {'low' if side == 0 else 'high'} {face.word!r} face of axis {axis}"
    return ""


def check_covariance(S: Array, x: Array, t: float, box: Box | None = None) -> Array:
    """Raise an InputError where Σ is not symmetric positive semidefinite, with the eigenvalue."""
    check_finite(S, x, t, "covariance", box)
    given, S = S, detached(S)
    sizes = _axis_sizes(S)
    # pair by pair: on a large grid whole matrices would be the largest arrays there are
    d = S.shape[-1]
    skew = sum(
        (abs(S[..., i, j] - S[..., j, i]) / (sizes[i] * sizes[j]) for i in range(d) for j in range(i)),
        0.0 * S[..., 0, 0],
    )
    if bool((skew > 1e-10).any()):
        where = np.unravel_index(int(skew.argmax()), tuple(skew.shape))
        raise InputError(
            "covariance",
            f"{as_numpy(S[where]).tolist()} at t = {t:g}, x = {as_numpy(x)[where].tolist()}",
            "a symmetric matrix",
        )
    suspicious = _least_minor(S, sizes) < -1e-12
    if not bool(suspicious.any()):
        return given
    suspects = np.nonzero(as_numpy(suspicious))
    matrices = as_numpy(S)[suspects]
    lowest = np.linalg.eigvalsh(matrices / np.multiply.outer(sizes, sizes))[..., 0]
    if (lowest < -1e-10).any():
        worst = int(np.argmin(lowest))
        at = tuple(int(index[worst]) for index in suspects)
        raise InputError(
            "covariance",
            f"eigenvalue {np.linalg.eigvalsh(matrices[worst])[0]:.3g} at t = {t:g}, x = {as_numpy(x)[at].tolist()}",
            "a positive semidefinite matrix Σ = σσᵀ",
            "give the noise matrix as diffusion=σ if that is what you have",
        )
    return given


def _axis_sizes(S: Array) -> np.ndarray:
    """Largest noise along each axis, as a standard deviation, shape (d,): every coordinate may have its own unit."""
    sizes = np.sqrt([float(abs(S[..., i, i]).max()) for i in range(S.shape[-1])])
    return np.asarray(np.where(sizes > 0.0, sizes, sizes.max() or float(abs(S).max()) ** 0.5 or 1.0))


def _least_minor(S: Array, sizes: np.ndarray) -> Array:
    """Smallest principal minor of the scaled S up to 3 × 3, shape (...): not negative where these are semidefinite."""
    d = S.shape[-1]

    def entry(i: int, j: int) -> Array:
        return S[..., i, j] / (sizes[i] * sizes[j])

    def pair(i: int, j: int, k: int, m: int) -> Array:
        return entry(i, k) * entry(j, m) - entry(i, m) * entry(j, k)

    def minors() -> Iterator[Array]:  # one at a time: they need not be kept
        yield from (entry(i, i) for i in range(d))
        yield from (pair(i, j, i, j) for i in range(d) for j in range(i))
        if d == 3:
            yield entry(0, 0) * pair(1, 2, 1, 2) - entry(0, 1) * pair(1, 2, 0, 2) + entry(0, 2) * pair(1, 2, 0, 1)

    return reduce(namespace(S).minimum, minors())
