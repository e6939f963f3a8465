"""Sampled paths: the likelihood of observations of a process, at any spacing, by whichever way is accurate."""

import copy
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.polynomial import legendre

from kolmo.arrays import as_numpy, as_points
from kolmo.errors import InputError
from kolmo.likelihood.base import LEAST, PARTS, Level, log_of
from kolmo.likelihood.chart import NARROW, NEAR, TAIL, Chart, OnChart, confined, modes_on
from kolmo.likelihood.gaussian import is_linear, log_normal, moved
from kolmo.likelihood.local import log_densities
from kolmo.likelihood.modes import integrals, trial
from kolmo.problem.box import Box
from kolmo.problem.faces import Absorbing, Natural, Open, Reflecting
from kolmo.problem.instants import constant, depends_on_time
from kolmo.problem.sde import SDE

# Degrees of the local expansion, per dimension. Each transition takes the least that will do; the next one says by how
# much it errs. Of hundreds of transitions there is one at which two degrees agree by accident: of what lower degrees
# differed by this part counts, for each degree between, and they seldom agree all.
DEGREES, REMAINS = {1: (4, 6, 8, 10, 12), 2: (2, 4, 6, 8, 10), 3: (2, 4, 6, 8)}, 0.1
# Part of the tolerance by which the degrees may differ in all transitions that take the same.
AGREE = 0.1
# Relative accuracy of sums of modes, and of Gaussian means.
ROUNDING, LINEAR = 1e-15, 1e-14
# Points of Gauss on each side of a state, for distribution functions.
QUADRATURE = 64
# Instants and points at which coefficients are compared to see whether they depend on time.
COMPARED, PLACES = 32, 200


@dataclass(frozen=True)
class Transitions:
    """Steps from x to y in a time h: shapes (M, d), (M, d), (M,)."""

    x: torch.Tensor
    y: torch.Tensor
    h: torch.Tensor

    def __getitem__(self, which: torch.Tensor) -> "Transitions":
        return Transitions(self.x[which], self.y[which], self.h[which])

    def __len__(self) -> int:
        return len(self.h)


def transitions(times: Any, states: Any, dim: int) -> Transitions:
    """Steps of one path, or of a list of paths, checked.

    Examples
    --------
    >>> steps = transitions([[0.0, 0.5], [0.0, 1.0, 3.0]], [[1.0, 2.0], [0.0, 0.1, 0.2]], 1)
    >>> steps.h.tolist(), steps.x[:, 0].tolist()
    ([0.5, 1.0, 2.0], [1.0, 0.0, 0.1])
    """
    several = isinstance(times, list | tuple) and len(times) > 0 and np.ndim(as_numpy(times[0])) == 1
    found = []
    for t, x in zip(times, states, strict=True) if several else [(times, states)]:
        at = np.asarray(as_numpy(t), dtype=float).reshape(-1)
        points = np.asarray(as_numpy(as_points(x, dim, "states")), dtype=float).reshape(-1, dim)
        if len(at) != len(points) or len(at) < 2:
            raise InputError("times", f"{len(at)} times with {len(points)} states", "as many of both, two at least")
        if not (np.diff(at) > 0).all():
            raise InputError("times", at[np.flatnonzero(np.diff(at) <= 0)[0] + 1], "increasing times")
        if not np.isfinite(points).all():
            raise InputError("states", "a value that is not finite", "states that were all observed")
        found.append((points[:-1], points[1:], np.diff(at)))
    return Transitions(*(torch.as_tensor(np.concatenate(part)) for part in zip(*found, strict=True)))


def paths(sde: SDE, times: Any, states: Any, *, box: Box | None = None, tol: float = 1e-3) -> "PathLikelihood":
    r"""The likelihood of sampled paths as a function of the torch parameters in a process.

    .. math:: \ell = \sum_i \log p(t_{i+1} - t_i,\ X_{t_i},\ X_{t_{i+1}})

    Parameters
    ----------
    sde : SDE
        The process, in torch, in 1 to 3 dimensions; its coefficients do not depend on time.
    times : array_like, shape (n,), or list of these
        When it was observed: one path, or several.
    states : array_like, shape (n, d), or list of these
        Where it was then.
    box : Box, optional
        In one dimension, the state space: its ends may be reflecting, absorbing (the process is seen no more once it is
        there), natural or open. None: open.
    tol : float, default 1e-3
        Error that ℓ may have.

    Returns
    -------
    PathLikelihood

    Raises
    ------
    InputError
        For coefficients that depend on time, states outside the box, or times that do not increase.

    Notes
    -----
    Of linear processes transitions are Gaussian. Else each transition is taken by the way that is accurate: a local
    expansion where the time is short (:mod:`kolmo.likelihood.local`), and in one dimension eigenfunctions
    (:mod:`kolmo.likelihood.modes`) where it is longer. Beyond one dimension there is the expansion alone: where it does
    not do, the status says so, and ``control.transition_density`` solves the equation on a grid.

    References
    ----------
    Y. Aït-Sahalia (2002), Econometrica 70, and (2008), Annals of Statistics 36: expansions for short times.

    Examples
    --------
    >>> kappa = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    >>> wells = SDE(lambda t, x: kappa * (x - x**3), 0.5, dim=1, arrays="torch")
    >>> found = paths(wells, [0.0, 0.01, 0.5, 3.0], [1.0, 1.02, 0.7, -0.9])
    >>> found().item().__round__(3), found.error_estimate < 1e-3
    (-1.153, True)
    >>> torch.autograd.grad(found(), kappa)[0].round(decimals=3)
    tensor(-0.5240, dtype=torch.float64)
    """
    return PathLikelihood(sde, times, states, box, tol)


class PathLikelihood(OnChart):
    r"""Likelihood :math:`\ell = \sum_k \log p(h_k, x_k, x_{k+1})` of sampled paths; see :func:`paths`.

    Attributes
    ----------
    sde : SDE
        The process.
    steps : Transitions
        The data: M steps between states of shape (M, d).
    box : Box or None
        The state space.

    Raises
    ------
    InputError
        As `paths`.

    References
    ----------
    Y. Aït-Sahalia (2002), Econometrica 70, and (2008), Annals of Statistics 36: expansions for short times.

    Examples
    --------
    >>> paths(SDE(0.0, 1.0, dim=1), [0.0, 1.0], [0.0, 0.0])().item().__round__(4)  # −½ log 2π
    -0.9189
    """

    first, most = 16.0, 420.0

    def __init__(self, sde: SDE, times: Any, states: Any, box: Box | None, tol: float) -> None:
        super().__init__(tol)
        dim = sde.dim if sde.dim is not None else (None if box is None else box.dim)
        if dim is None or not 1 <= dim <= 3:
            raise InputError("sde", f"{dim} dimensions", "1 to 3", "SDE(..., dim=)")
        if box is not None and dim > 1:
            raise InputError("box", box, "None, beyond one dimension")
        self.sde, self.box, self.dim = in_torch(sde), box, dim
        self.steps = transitions(times, states, dim)
        self._places = torch.cat([self.steps.x, self.steps.y])
        self._check()
        # of the expansion, for every transition; zero: eigenfunctions
        self._degrees = torch.zeros(len(self.steps), dtype=torch.long)
        # what is known of the data at a resolution, on a chart (the space that is kept)
        self._tables: tuple[tuple[int, Chart], tuple[torch.Tensor, ...]] | None = None
        self._differ = 0.0

    @property
    def count(self) -> int:
        """Number of transitions."""
        return len(self.steps)

    def _check(self) -> None:
        check_steady(self.sde, self._places, float(self.steps.h.max()))
        if self.box is None:
            return
        inside = self.box.contains(self._places.numpy())
        if not inside.all():
            raise InputError("states", self._places[~torch.as_tensor(inside)][0].tolist(), f"states in {self.box!r}")
        for face in self.box.faces[0]:
            if not isinstance(face, Open | Natural | Reflecting | Absorbing):
                raise InputError("box", face, "open, natural, reflecting or absorbing ends")

    def renew(self) -> float:
        """Decide anew which transitions are short, on the state space, and on a resolution; the estimated error."""
        self._space = None
        if not self._linear():
            self._sort()
        return super().renew()

    def _linear(self) -> bool:
        ends = self.box is not None and not all(isinstance(face, Open) for face in self.box.faces[0])
        return not ends and is_linear(self.sde, self._places.numpy(), float(self.steps.h.max()))

    def _sort(self) -> None:
        """Choose for every transition the least degree that will do; for what is left modes, or the largest degree."""
        tried = DEGREES[self.dim]
        self._degrees = torch.zeros(len(self.steps), dtype=torch.long)
        left = torch.nonzero(self._far())[:, 0]
        before, off, self._differ = self._logs(left, tried[0]), torch.zeros(len(left), dtype=torch.float64), 0.0
        for k in range(1, len(tried)):
            found = self._logs(left, tried[k])
            off, last = _apart(before, found, off), found - before
            if k > 1:
                # the most accurate of them, as long as their errors are a part of the tolerance together
                errors, order = torch.sort(off)
                good = order[torch.cumsum(errors, 0) <= AGREE * self.tol]
                self._degrees[left[good]] = tried[k - 1]
                self._differ += float(off[good].sum())
                stay = torch.ones(len(left), dtype=torch.bool).index_fill(0, good, False)
                left, found, off, last = left[stay], found[stay], off[stay], last[stay]
            before = found
        if self.dim > 1:
            self._degrees[left] = tried[-1]
            self._differ += _in_sums(last)

    def _logs(self, which: torch.Tensor, degree: int) -> torch.Tensor:
        """Logarithms of transition densities by the expansion, without gradient."""
        with torch.no_grad():
            return log_densities(self.sde, *self._parts(self.steps[which]), degree)

    def _apart(self) -> float:
        """By how much degrees differ at those that were chosen, in all."""
        tried, total = DEGREES[self.dim], 0.0
        far = self._far()
        for degree in torch.unique(self._degrees).tolist():
            if degree > 0:
                which = torch.nonzero(self._degrees == degree)[:, 0]
                k = min(tried.index(degree), len(tried) - 2)
                off = torch.zeros(len(which), dtype=torch.float64)
                found = [self._logs(which, d) for d in tried[: k + 2]]
                for pair in pairwise(found):
                    off = _apart(*pair, off)
                if degree == tried[-1]:
                    total += _in_sums(found[-1] - found[-2])
                else:
                    total += float(torch.where(far[which], off, torch.inf).sum())
        return total

    def _levels(self) -> tuple[list[Level], float]:
        if self._linear() or not bool((self._degrees > 0).all()):
            return super()._levels()
        # no resolution enters: what is uncertain is the expansion
        return [replace(self._level(self.first), known=0.0)], self._differ

    def holds(self) -> bool:
        """Whether the resolution, and the choice of ways, meet the tolerance at the present parameters too."""
        if self.resolution is None:
            return False
        if not self._linear():
            self._differ = self._apart()
        return self._differ <= self.tol and super().holds()

    def _far(self) -> torch.Tensor:
        """Which transitions do not see the ends of the state space."""
        far = torch.ones(len(self.steps), dtype=torch.bool)
        if self.box is None:
            return far
        spread = torch.sqrt(self.sde.covariance(0.0, self._places)[:, 0, 0].detach()).reshape(2, -1).amax(0)
        spread = spread * torch.sqrt(self.steps.h)
        for end in (self.box.lower[0], self.box.upper[0]):
            if np.isfinite(end):
                gap = torch.minimum((self.steps.x[:, 0] - end).abs(), (self.steps.y[:, 0] - end).abs())
                far &= gap > FAR * spread
        return far

    @staticmethod
    def _parts(steps: Transitions) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return steps.x, steps.y, steps.h

    def _terms(self, n: float) -> tuple[torch.Tensor, float]:
        if self._linear():
            return self._gaussian()
        found, error = torch.full((len(self.steps),), float(np.log(LEAST)), dtype=torch.float64), self._differ
        for degree in torch.unique(self._degrees).tolist():
            which = torch.nonzero(self._degrees == degree)[:, 0]
            if degree == 0:
                logs, noise = self._by_modes(self.steps[which], int(n))
                error += noise
            else:
                logs = log_densities(self.sde, *self._parts(self.steps[which]), degree)
                good = ~torch.isnan(logs.detach())
                if not bool(good.all()):
                    # what is not to be had counts as next to nothing, and leaves no trace in the others' gradients
                    which = which[good]
                    logs = log_densities(self.sde, *self._parts(self.steps[which]), degree)
            found = found.index_copy(0, which, logs)
        return found, error

    def _gaussian(self) -> tuple[torch.Tensor, float]:
        """Gaussian transitions, and their errors by rounding in all."""
        mean, C = self._moved()
        sizes = self._places.abs().amax() / torch.sqrt(torch.diagonal(C.detach(), dim1=-2, dim2=-1).amin(-1))
        return log_normal(self.steps.y, mean, C), LINEAR * float(sizes.sum())

    def _moved(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Means (M, d) and covariances (M, d, d) of the steps of a linear process."""
        M, shift, C = moved(self.sde, self._places, self.steps.h)
        return (M @ self.steps.x[..., None])[..., 0] + shift, C

    def _by_modes(self, steps: Transitions, n: int) -> tuple[torch.Tensor, float]:
        """Transitions as sums of eigenfunctions, and their errors by rounding in all."""
        if self._space is None:
            self._space = Chart(self.sde, self._interval(steps))
        modes = modes_on(self.sde, self._space, n, self._absorbing)
        if self._tables is None or self._tables[0] != (n, self._space):
            ends = [torch.as_tensor(self._space.inverse(v[:, 0].numpy())) for v in (steps.x, steps.y)]
            grown = integrals(ends[1], modes.slope.shape[1]) - integrals(ends[0], modes.slope.shape[1])
            self._tables = (n, self._space), (trial(ends[0], n), trial(ends[1], n), grown)
        shapes = [table @ modes.shapes[0] for table in self._tables[1][:2]]
        weight = self._tables[1][2] @ modes.slope[0]
        slowest = modes.rates[0, 0]
        decay = torch.exp(-(modes.rates[0] - slowest) * steps.h[:, None])
        parts = decay * shapes[0] * shapes[1]
        total = parts.sum(1)
        noise = torch.log1p(ROUNDING * parts.detach().abs().sum(1) / total.detach().clamp(min=LEAST))
        spread = torch.log(self.sde.covariance(0.0, steps.y)[:, 0, 0])
        return log_of(total) - slowest * steps.h + weight - spread, float(noise.sum())

    def transformed(self) -> torch.Tensor:
        """Every step through its distribution function given where it began, shape (M, d).

        Of linear processes each coordinate given those before it; else in one dimension.

        Raises
        ------
        InputError
            Beyond one dimension, for processes that are not linear.
        """
        if self.resolution is None:
            self.renew()
        if self._linear():
            mean, C = self._moved()
            z = torch.linalg.solve_triangular(torch.linalg.cholesky(C), (self.steps.y - mean)[..., None], upper=False)
            u: torch.Tensor = torch.special.ndtr(z[..., 0])
            return u
        if self.dim > 1:
            raise InputError("sde", f"{self.dim} dimensions", "one, or a linear process")
        low, high = self._range()
        below, above = self._between(low, self.steps.y[:, 0]), self._between(self.steps.y[:, 0], high)
        return (below / (below + above))[:, None]

    def _range(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Ends, per step, beyond which next to nothing goes."""
        x, y = self.steps.x[:, 0], self.steps.y[:, 0]
        noise = torch.sqrt(self.sde.covariance(0.0, self._places)[:, 0, 0].detach()).reshape(2, -1).amax(0)
        away = FAR * noise * torch.sqrt(self.steps.h)
        ends = self._interval(self.steps) if self._space is None else self._space.ends
        return (torch.minimum(x, y) - away).clamp(min=ends[0]), (torch.maximum(x, y) + away).clamp(max=ends[1])

    def _between(self, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        """Integrals of transition densities from low to high, shape (M,)."""
        z, w = (torch.as_tensor(v) for v in legendre.leggauss(QUADRATURE))
        half = 0.5 * (high - low)
        at = low[:, None] + half[:, None] * (1.0 + z)
        other = copy.copy(self)
        many = [v.repeat_interleave(QUADRATURE, 0) for v in (self.steps.x, self.steps.h)]
        other.steps = Transitions(many[0], at.reshape(-1, 1), many[1])
        other._places = torch.cat([other.steps.x, other.steps.y])
        other._degrees, other._tables = self._degrees.repeat_interleave(QUADRATURE), None
        assert self.resolution is not None
        density = torch.exp(other._terms(self.resolution)[0]).reshape(len(half), QUADRATURE)
        return half * (density @ w)

    @property
    def _absorbing(self) -> tuple[bool, bool]:
        if self.box is None:
            return False, False
        low, high = self.box.faces[0]
        return isinstance(low, Absorbing), isinstance(high, Absorbing)

    def _interval(self, steps: Transitions) -> tuple[float, float]:
        """Ends of the state space; where it is open, or ends without noise, they are cuts."""
        x = torch.cat([steps.x, steps.y]).numpy()
        covering = Box.covering(self.sde, x, float(steps.h.max()), within=self.box, tail=TAIL)
        ends, known = [float(covering.lower[0]), float(covering.upper[0])], [float(x.min()), float(x.max())]
        for side in (0, 1):
            face: Any = Open() if self.box is None else self.box.faces[0][side]
            away = ends[side] - known[side]
            if isinstance(face, Natural):
                ends[side] = known[side] + away * (1.0 - NEAR * (NARROW / self._width) ** 6)
            elif isinstance(face, Open):
                ends[side] = known[side] + away * self._width
        cut = confined(self.sde, (known[0], known[1]), (ends[0], ends[1]))
        opened = [self.box is None or isinstance(self.box.faces[0][side], Open) for side in (0, 1)]
        return cut[0] if opened[0] else ends[0], cut[1] if opened[1] else ends[1]

    @property
    def _closed(self) -> bool:
        ends = () if self.box is None else self.box.faces[0]
        return super()._closed or (bool(ends) and all(isinstance(face, Reflecting | Absorbing) for face in ends))


def _apart(before: torch.Tensor, after: torch.Tensor, off: torch.Tensor) -> torch.Tensor:
    """By how much two degrees differ, and those before them did; infinite without an answer."""
    return torch.nan_to_num(torch.maximum((after - before).abs(), REMAINS * off), nan=torch.inf)


def _in_sums(differences: torch.Tensor) -> float:
    """By how much the sum of logarithms differs, or that of a part of them (M,), as levels are compared."""
    # without an answer, nothing is known of what is returned in its place
    known = torch.nan_to_num(differences, nan=torch.inf)
    return max(abs(float(v.sum())) for v in (known, *(known[k::PARTS] for k in range(PARTS))))


# A state within so many standard deviations of an end of the state space may see it.
FAR = 9.0


def check_steady(sde: SDE, places: torch.Tensor, longest: float) -> None:
    """Raise an InputError where coefficients depend on time, as far as it is seen at places (n, d)."""
    x = places[:: max(1, len(places) // PLACES)]
    for name in ("drift", "covariance"):
        f = getattr(sde, name)
        steady = lambda t, y, f=f: as_numpy(f(t, torch.as_tensor(y)).detach())  # noqa: E731
        if depends_on_time(sde.given[name], f, x) and not constant(steady, 0.0, longest, x.numpy(), COMPARED):
            raise InputError(
                name,
                "a function that depends on time",
                "one that does not",
                "control.transition_density(problem, x, y) has the densities of such processes",
            )


def in_torch(sde: SDE) -> SDE:
    """The process, its functions handed tensors."""
    other = copy.copy(sde)
    other.arrays = "torch"
    return other
