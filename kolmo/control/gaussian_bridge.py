"""Bridges of linear processes: the kernel is Gaussian and known, so that only its marginals need lattices."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np
from scipy.ndimage import map_coordinates, spline_filter

from kolmo.control.densities import CLOSER, GivenDensity, Masses, masses
from kolmo.control.gaussian_ends import Affine, Guess, Quadratic, inverse_square_root, moments_of, square_root
from kolmo.control.linear import LinearProcess, Transition
from kolmo.control.sinkhorn import Potentials, potentials
from kolmo.grid import Grid
from kolmo.kernels.logsums import Blocks, pulled
from kolmo.limits import Limits
from kolmo.problem.box import Box

# Spacing of the first lattice, in deviations of one end given the other in the Gaussian bridge of the same variances:
# the trapezoidal rule has an error of exp(−2π²/s²) for Gaussians s spacings wide.
FIRST_SPACING = 1.25
# Product of the two spreads over the variance of the noise with which the search begins, and the misfit (total
# variation) up to which it is followed from there.
EASY, ROUGH = 4.0, 1e-2
# Misfit at which the bridge between Gaussians of the same covariances is near enough to begin with.
ALIKE = 0.1
# Part of the potentials that sums over them cannot resolve, and that the cut tails of densities may hold.
ROUNDING = 1e-12
# Nodes per axis at least.
FEWEST = 17
# Where a kernel is narrower than the lattice, its product with the density has a lattice of its own, of so many nodes
# with this spacing in its deviations, by dimension, moved and resized up to so many times, until neither changes more
# than a part; what that leaves of errors, as a part.
LOCAL, LOCAL_SPACING, MOVES, SETTLED = {1: 15, 2: 11, 3: 9}, {1: 0.85, 2: 1.0, 3: 1.1}, 12, 0.25
LOCAL_ERROR = 1e-5
# Spacing of a lattice, in deviations of a kernel, up to which its sums are as accurate as that.
RESOLVED = 1.2
# Variances by which it is resized at once, at least and at most.
RESIZED, TINY = (0.16, 9.0), 1e-300
# Deviations from which on it is only moved and widened.
NEAR = 2.0
# Degree of the splines through potentials there, and nodes added on all sides: what the ends of splines do wrong falls
# by 0.43 from node to node.
DEGREE, PADDING = 5, 32
# Part of the horizon before the ends up to which functions of time are evaluated.
END = 1e-9
# Deviations of the kernel by which the grid reaches beyond the paths between the two densities.
BEYOND = 6.0
# Spacing of the nodes of tables, in deviations of marginals, and of either end given the other.
TABLE_SPACING = 0.5
# Coordinates of kernels that are kept at once.
KEPT = 8
# Points in a batch, to keep local lattices small.
BATCH = 20_000


@dataclass(frozen=True, eq=False)
class End:
    """One of the two densities on a lattice, with the potential that the bridge gives it.

    Attributes
    ----------
    density : GivenDensity
        As the user gave it.
    frame : Affine
        Coordinates in which the kernel between the ends is :math:`e^{-|u - v|^2/2}`, but for shifts.
    axes : tuple of ndarray
        Nodes per axis, in coordinates.
    masses : ndarray
        Probability of every node.
    scale : float
        Integral of the density as it was given.
    potential : ndarray
        Logarithm of the factor that the density gets.
    beyond : ndarray
        The same with ``PADDING`` nodes more on all sides, where there is no density: for splines.
    """

    density: GivenDensity
    frame: Affine
    axes: tuple[np.ndarray, ...]
    masses: np.ndarray
    scale: float
    potential: np.ndarray
    beyond: np.ndarray

    @cached_property
    def points(self) -> np.ndarray:
        """The nodes, shape (n, d)."""
        return self.frame.place(np.stack(np.meshgrid(*self.axes, indexing="ij"), -1).reshape(-1, len(self.axes)))

    @cached_property
    def logs(self) -> np.ndarray:
        """Logarithms of masses with their factors, shape (n,)."""
        with np.errstate(divide="ignore"):
            return np.asarray((np.log(self.masses) + self.potential).reshape(-1))

    @cached_property
    def _splines(self) -> np.ndarray:
        return np.asarray(spline_filter(self.beyond, order=DEGREE))

    def log_factor(self, x: np.ndarray) -> np.ndarray:
        """Potential at points (n, d)."""
        z = self.frame.coordinates(x)
        steps = [PADDING + (c - axis[0]) / (axis[1] - axis[0]) for c, axis in zip(z.T, self.axes, strict=True)]
        return np.asarray(map_coordinates(self._splines, steps, order=DEGREE, prefilter=False, mode="nearest"))

    def log_density(self, x: np.ndarray) -> np.ndarray:
        """Logarithm of the density, normalised."""
        with np.errstate(divide="ignore"):
            return np.asarray(np.log(self.density(x)) - math.log(self.scale))

    def averaged(self, P: np.ndarray, q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        r""":math:`\log\int\rho(z)e^{\text{potential}(z) - |Pz - q|^2/2}dz` at q (m, d), and the mean of z there."""
        steps = self.frame.matrix * np.array([axis[1] - axis[0] for axis in self.axes])
        wide = max(1.0, float(np.linalg.norm(P @ steps, axis=0).max()) / RESOLVED)
        logs, p = self._blocks(P.tobytes()).around(q)
        mean = np.linalg.solve(P, p.T).T
        if wide > 1.0:
            # a kernel as wide as the lattice is shows which way the mass lies, the nearest nodes that lattice where
            ahead = q + (self._blocks((P / wide).tobytes()).around(q / wide)[1] * wide - q) / wide**2
            p = np.clip(ahead, p - wide, p + wide)
            for first in range(0, len(q), BATCH):
                part = slice(first, first + BATCH)
                logs[part], mean[part] = self._locally(P, q[part], p[part], logs[part], mean[part])
        return logs, mean

    @cached_property
    def _blocks(self) -> Callable[[bytes], Blocks]:
        """Nodes in the coordinates of a kernel, kept for the last few of these."""
        d = len(self.axes)
        return lru_cache(maxsize=KEPT)(
            lambda P: Blocks.of(self.points @ np.frombuffer(P).reshape(d, d).T, self.logs, self.masses.shape)
        )

    def _locally(
        self, P: np.ndarray, q: np.ndarray, p: np.ndarray, logs: np.ndarray, mean: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The same by lattices about the points p; where there is no density, what was found stays."""
        d, logs, mean = len(self.axes), logs.copy(), mean.copy()
        unit = LOCAL_SPACING[d] * (np.arange(LOCAL[d]) - LOCAL[d] // 2)
        around = np.stack(np.meshgrid(*[unit] * d, indexing="ij"), -1).reshape(-1, d)
        volume = d * math.log(LOCAL_SPACING[d]) - float(np.linalg.slogdet(P)[1])
        moving, size = np.arange(len(q)), np.broadcast_to(np.eye(d), (len(q), d, d))
        for _ in range(MOVES):
            at = p[:, None] + around @ np.swapaxes(size, 1, 2)
            z = np.linalg.solve(P, at.reshape(-1, d).T).T
            terms = (self.log_density(z) + self.log_factor(z)).reshape(at.shape[:2])
            terms -= 0.5 * ((at - q[moving, None]) ** 2).sum(-1)
            live = np.isfinite(terms.max(1))
            moving, p, size, terms = moving[live], p[live], size[live], terms[live]
            top = terms.max(1)
            weights = np.exp(terms - top[:, None])
            total = weights.sum(1)
            move = (weights @ around) / total[:, None]
            p = p + (size @ move[..., None])[..., 0]
            logs[moving] = top + np.log(total) + volume + np.linalg.slogdet(size)[1]
            mean[moving] = np.linalg.solve(P, p.T).T
            apart = around - move[:, None]
            spread = np.einsum("mj,mjk,mjl->mkl", weights / total[:, None], apart, apart)
            values, vectors = np.linalg.eigh(spread)
            off = (np.abs(move) > SETTLED).any(1) | (np.abs(np.log(np.maximum(values, TINY))) > SETTLED).any(1)
            # at its edge the mass looks narrow, and a lattice that shrinks there does not arrive
            far = (np.abs(move) > NEAR).any(1, keepdims=True)
            values = np.where(far, np.maximum(values, 1.0), values)
            size = (size @ (vectors * np.sqrt(np.clip(values, *RESIZED))[:, None]))[off]
            moving, p = moving[off], p[off]
            if not len(moving):
                break
        return logs, mean


@dataclass(frozen=True, eq=False)
class GaussianBridge:
    r"""The bridge on one pair of lattices; see ``kolmo.control.schroedinger`` for what is asked of it.

    With whitened coordinates the kernel from 0 to T is :math:`e^{-|u - v|^2/2}`. The coupling has the density
    :math:`\rho_0(x)\rho_1(y)e^{F(x) + G(y) - |u - v|^2/2}`, and what is asked between the ends are integrals of
    Gaussians over the one end or the other, taken in logarithms.
    """

    linear: LinearProcess
    horizon: float
    start: End
    end: End
    cost: float
    misfit: float
    iterations: int
    rounding: float
    widths: np.ndarray
    normalisation: float
    size: int
    order: float = field(default=6.0, init=False)
    fewest: int = field(default=4, init=False)
    between: float = field(default=LOCAL_ERROR, init=False)

    def log_psi(self, t: float, x: np.ndarray) -> np.ndarray:
        """Logarithm of ψ at points (n, d)."""
        if t >= self.horizon:
            d = x.shape[1]
            constant = self.normalisation + 0.5 * d * math.log(2.0 * math.pi)
            return np.asarray(self.end.log_density(x) + self.end.log_factor(x) + constant)
        return self._psi(t, x)[0]

    def _psi(self, t: float, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, Transition]:
        move = self.linear.transition(min(t, (1.0 - END) * self.horizon), self.horizon)
        W = inverse_square_root(move.covariance)
        logs, mean = self.end.averaged(W, (x @ move.matrix.T + move.shift) @ W.T)
        return logs + float(np.linalg.slogdet(W)[1]) + self.normalisation, mean, move

    def steering(self, t: float, x: np.ndarray) -> np.ndarray:
        """Σ∇log ψ at points (n, d)."""
        _, mean, move = self._psi(t, x)
        ahead = np.linalg.solve(move.covariance, (mean - x @ move.matrix.T - move.shift).T)
        S = self.linear.sde.covariance(t, x)
        return np.asarray(np.einsum("...ij,...j->...i", S, (move.matrix.T @ ahead).T))

    def arrival(self, x: np.ndarray) -> np.ndarray:
        """E[X_T | X_0 = x]."""
        return self._psi(0.0, x)[1]

    def density(self, t: float, x: np.ndarray) -> np.ndarray:
        """Density of X_t at points (n, d)."""
        if t <= 0.0 or t >= self.horizon:
            return np.asarray(np.exp((self.start if t <= 0.0 else self.end).log_density(x)))
        move = self.linear.transition(0.0, max(t, END * self.horizon))
        W = inverse_square_root(move.covariance)
        logs = self.start.averaged(W @ move.matrix, (x - move.shift) @ W.T)[0]
        d = x.shape[1]
        scale = float(np.linalg.slogdet(W)[1]) - 0.5 * d * math.log(2.0 * math.pi)
        return np.asarray(np.exp(logs + scale + self.log_psi(t, x)))

    def coupling(self, x: np.ndarray) -> np.ndarray:
        """Density of (X_0, X_T) over that of X_0, at all pairs of points (n, d)."""
        whole = self.linear.transition(0.0, self.horizon)
        W = inverse_square_root(whole.covariance)
        u, v = (x @ whole.matrix.T + whole.shift) @ W.T, x @ W.T
        squares = ((u[:, None] - v) ** 2).sum(-1)
        logs = self.end.log_density(x) + self.end.log_factor(x) - 0.5 * squares
        top = logs.max(1, keepdims=True)
        return np.asarray(np.exp(logs - np.where(np.isfinite(top), top, 0.0)))

    def paths(self, times: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
        """Points (len(times), count, d) of paths of the bridge: of the first lattice, where it should be looked at."""
        x = self.start.points[rng.choice(self.start.masses.size, count, p=self.start.masses.reshape(-1))]
        whole = self.linear.transition(0.0, self.horizon)
        W = inverse_square_root(whole.covariance)
        u, v = (x @ whole.matrix.T + whole.shift) @ W.T, self.end.points @ W.T
        logs = self.end.logs - 0.5 * ((u[:, None] - v) ** 2).sum(-1)
        y = self.end.points[np.argmax(logs + rng.gumbel(size=logs.shape), axis=1)]
        found = []
        for t in times:
            before, after = self.linear.transition(0.0, t), self.linear.transition(t, self.horizon)
            gain = before.covariance @ after.matrix.T @ np.linalg.inv(whole.covariance)
            mean = x @ before.matrix.T + before.shift + (y - x @ whole.matrix.T - whole.shift) @ gain.T
            spread = before.covariance - gain @ after.matrix @ before.covariance
            found.append(mean + rng.normal(size=x.shape) @ square_root(spread))
        return np.stack(found)

    def grid(self, cells: int) -> Grid:
        """A grid that holds the paths between the two densities, as fine as their marginals ask for."""
        times = np.linspace(0.0, self.horizon, 17)
        ends, spacing = [], TABLE_SPACING * self.widths
        whole = self.linear.transition(0.0, self.horizon)
        for t in times:
            before, after = self.linear.transition(0.0, t), self.linear.transition(t, self.horizon)
            gain = before.covariance @ after.matrix.T @ np.linalg.inv(whole.covariance)
            first = before.matrix - gain @ whole.matrix
            kernel = np.sqrt(np.maximum(np.diag(before.covariance - gain @ after.matrix @ before.covariance), 0.0))
            hulls = [(e.points[e.masses.reshape(-1) > 0] @ M.T) for e, M in ((self.start, first), (self.end, gain))]
            shift = before.shift - gain @ whole.shift
            low, high = (sum(getattr(np, f)(h, axis=0) for h in hulls) + shift for f in ("min", "max"))
            ends += [low - BEYOND * kernel, high + BEYOND * kernel]
            variances = [
                M @ np.cov(e.points.T, aweights=e.masses.reshape(-1), ddof=0).reshape(M.shape) @ M.T
                for e, M in ((self.start, first), (self.end, gain))
            ]
            spacing = np.minimum(spacing, TABLE_SPACING * np.sqrt(np.maximum(np.diag(sum(variances)), kernel**2)))
        low, high = np.min(ends, axis=0), np.max(ends, axis=0)
        counts = np.clip((high - low) / spacing, FEWEST, cells ** (1.0 / len(low))).astype(int) + 1
        return Grid.of(Box(low, high), counts.tolist())


@dataclass(frozen=True, eq=False)
class GaussianBridges:
    """Bridges between two densities of a linear process, on finer and finer lattices.

    Attributes
    ----------
    linear : LinearProcess
        The process.
    horizon : float
        T.
    density0, density1 : GivenDensity
        The two ends.
    frames : tuple of Affine
        Whitened coordinates of both.
    hulls : tuple
        Ends of the lattices, in these coordinates.
    coupled : _Coupled
        The bridge between Gaussians of the same covariances.
    apart : ndarray, shape (d,)
        Mean displacement, in whitened coordinates.
    entropy_scale : float
        ½ log det of the kernel's covariance, and (d/2) log 2π.
    misfit : float
        Total variation by which the second marginal may be missed.
    """

    linear: LinearProcess
    horizon: float
    density0: GivenDensity
    density1: GivenDensity
    frames: tuple[Affine, Affine]
    hulls: tuple[tuple[np.ndarray, np.ndarray], ...]
    coupled: "_Coupled"
    apart: np.ndarray
    entropy_scale: float
    misfit: float
    growth: float = field(default=1.25, init=False)

    @classmethod
    def of(
        cls,
        linear: LinearProcess,
        horizon: float,
        densities: tuple[GivenDensity, GivenDensity],
        boxes: tuple[Any, Any],
        misfit: float,
    ) -> "GaussianBridges":
        """Coordinates and lattices for densities inside these boxes."""
        whole = linear.transition(0.0, horizon)
        W, d = inverse_square_root(whole.covariance), len(whole.shift)
        matrices = np.linalg.inv(W @ whole.matrix), np.linalg.inv(W)
        frames, hulls, spreads = [], [], []
        for density, (low, high), M in zip(densities, boxes, matrices, strict=True):
            rough = Affine(M, 0.5 * (low + high))
            corners = np.stack(np.meshgrid(*zip(low, high, strict=True), indexing="ij"), -1).reshape(-1, d)
            z = rough.coordinates(corners)
            axes = [np.linspace(a, b, CLOSER[d]) for a, b in zip(z.min(0), z.max(0), strict=True)]
            low, high = density.closed_in(axes, rough.place)
            fine = tuple(np.linspace(a, b, CLOSER[d]) for a, b in zip(low, high, strict=True))
            mass = masses(density, fine, rough.place).masses
            mean, spread = moments_of(fine, mass / mass.sum())
            frames.append(Affine(M, rough.place(mean[None])[0]))
            hulls.append((low - mean, high - mean))
            spreads.append(spread)
        coupled = _Coupled.of(*spreads)
        apart = W @ (whole.matrix @ frames[0].centre + whole.shift - frames[1].centre)
        scale = 0.5 * d * math.log(2.0 * math.pi) - float(np.linalg.slogdet(W)[1])
        return cls(linear, horizon, *densities, tuple(frames), tuple(hulls), coupled, apart, scale, misfit)  # type: ignore[arg-type]

    def shapes(self, resolution: float) -> list[tuple[int, ...]]:
        """Nodes per axis of both lattices at a resolution (1: that of the first level)."""
        found = []
        for (low, high), spacing in zip(self.hulls, self.coupled.widths, strict=True):
            counts = np.maximum((high - low) / (FIRST_SPACING * spacing), FEWEST - 1) * resolution
            found.append(tuple(int(n) + 1 for n in np.ceil(counts)))
        return found

    def level(self, resolution: float, before: GaussianBridge | None, limits: Limits) -> GaussianBridge:
        """The bridge on lattices of a resolution, beginning with the potentials of a level before."""
        if before is None:
            guess = self._first_guess(resolution, limits)
        else:
            start = before.start
            untilted = start.potential - self._tilt(start.axes) - 0.5 * float(self.apart @ self.apart)
            with np.errstate(divide="ignore"):
                guess = Guess(start.axes, np.log(start.masses) + untilted, 1.0)
        found, axes, first, last = self._solved(resolution, 1.0, guess, self.misfit, limits)
        a, b = (m.masses / m.masses.sum() for m in (first, last))
        tilts = [self._tilt(x) for x in axes]
        wider = [tuple(_padded(x) for x in ends) for ends in axes]
        scales = [
            float(m.masses.sum()) * abs(float(np.linalg.det(frame.matrix)))
            for m, frame in zip((first, last), self.frames, strict=True)
        ]
        square = 0.5 * float(self.apart @ self.apart)
        entropy = last.entropy / float(last.masses.sum()) - math.log(scales[1])
        cost = float((a * (found.F + tilts[0])).sum() + (b * (found.G - tilts[1])).sum()) + square
        with np.errstate(divide="ignore"):
            beyond0 = self._tilt(wider[0]) + square - pulled(wider[0], axes[1], np.log(b) + found.G)
            beyond1 = -self._tilt(wider[1]) - pulled(wider[1], axes[0], np.log(a) + found.F)
        start = End(self.density0, self.frames[0], axes[0], a, scales[0], found.F + tilts[0] + square, beyond0)
        end = End(self.density1, self.frames[1], axes[1], b, scales[1], found.G - tilts[1], beyond1)
        return GaussianBridge(
            self.linear,
            self.horizon,
            start,
            end,
            cost + entropy + self.entropy_scale,
            found.misfit,
            found.iterations,
            ROUNDING * float((a * np.abs(start.potential)).sum() + (b * np.abs(end.potential)).sum() + 1.0),
            np.min([np.abs(f.matrix) @ w for f, w in zip(self.frames, self.coupled.widths, strict=True)], axis=0),
            self.entropy_scale - 0.5 * len(self.apart) * math.log(2.0 * math.pi),
            max(a.size, b.size),
        )

    def _first_guess(self, resolution: float, limits: Limits) -> "Guess | Quadratic | None":
        """Potentials of twice the noise on lattices half as fine, and so on from where the search is easy.

        Those of small noise are those of larger noise, times the ratio of variances, to first order (Schmitzer 2019).
        """
        quadratic = self._solved(resolution, 1.0, Quadratic(self.coupled.curvature), math.inf, limits)
        if quadratic[0].misfit <= ALIKE:
            return Quadratic(self.coupled.curvature)
        halvings, guess = round(0.5 * math.log2(max(self.coupled.spread / EASY, 1.0))), None
        for k in range(halvings, 0, -1):
            scale = 0.5**k
            found, axes, first, _ = self._solved(resolution * scale, scale, guess, ROUGH, limits)
            with np.errstate(divide="ignore"):
                guess = Guess(axes[0], np.log(first.masses / first.masses.sum()) + found.F, scale)
        return guess

    def _solved(
        self, resolution: float, scale: float, guess: "Guess | Quadratic | None", misfit: float, limits: Limits
    ) -> tuple[Potentials, list[tuple[np.ndarray, ...]], Masses, Masses]:
        """Potentials, lattices and masses, with the noise divided by ``scale``."""
        axes = [
            tuple(np.linspace(a, b, n) for a, b, n in zip(*hull, shape, strict=True))
            for hull, shape in zip(self.hulls, self.shapes(resolution), strict=True)
        ]
        limits.check()
        first, last = (
            masses(density, x, frame.place)
            for density, x, frame in zip((self.density0, self.density1), axes, self.frames, strict=True)
        )
        a, b = (m.masses / m.masses.sum() for m in (first, last))
        u, v = (tuple(scale * x for x in ends) for ends in axes)
        G = np.zeros(b.shape) if guess is None else guess.at(axes[1], scale)
        return potentials(u, v, a, b, limits, G, misfit), axes, first, last

    def _tilt(self, axes: tuple[np.ndarray, ...]) -> np.ndarray:
        """What the displacement of the means adds to potentials on a lattice."""
        return np.asarray(np.tensordot(self.apart, np.stack(np.meshgrid(*axes, indexing="ij")), 1))


def _padded(axis: np.ndarray) -> np.ndarray:
    """The nodes, and as many more on either side as splines need."""
    return np.asarray(axis[0] + (axis[1] - axis[0]) * np.arange(-PADDING, len(axis) + PADDING))


class _Coupled(NamedTuple):
    r"""The bridge between two centred Gaussians with a kernel of unit covariance (Janati et al. 2020).

    Attributes
    ----------
    widths : tuple of ndarray
        Of either end given the other, deviation along each axis with the other coordinates held.
    curvature : ndarray, shape (d, d)
        The second potential is :math:`G = \tfrac12 v^T H v`.
    spread : float
        Largest product of deviations.
    """

    widths: tuple[np.ndarray, np.ndarray]
    curvature: np.ndarray
    spread: float

    @classmethod
    def of(cls, A: np.ndarray, B: np.ndarray) -> "_Coupled":
        """For covariances of the two ends."""
        unit, root = np.eye(len(A)), square_root(A)
        inner = square_root(root @ B @ root + 0.25 * unit)
        C = root @ inner @ np.linalg.inv(root) - 0.5 * unit
        inverses = [np.linalg.inv(S) for S in (A - C @ np.linalg.solve(B, C.T), B - C.T @ np.linalg.solve(A, C))]
        first, last = (1.0 / np.sqrt(np.maximum(np.diag(S), 1e-300)) for S in inverses)
        curvature = np.linalg.inv(B) + unit - inverses[1]
        return cls((first, last), curvature, float(np.sqrt((np.diag(A) * np.diag(B)).max())))
