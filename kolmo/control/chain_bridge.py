"""Bridges of any process in a box, as Markov chains on a grid: positive for every step, of second order at best."""

import math
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import scipy.sparse as sp

from kolmo.control.densities import GivenDensity
from kolmo.errors import InputError, NotConvergedError
from kolmo.grid import Grid
from kolmo.limits import Limits
from kolmo.problem import KolmogorovProblem
from kolmo.schemes.generator import Generator, discretize

# Nodes per axis of the first level, by dimension.
FIRST_NODES = {1: 65, 2: 25, 3: 13}
# Times between 0 and T at which the potentials are kept.
INTERVALS = 32
# Alternations of Sinkhorn's iteration, and the misfit of the marginals (total variation) at which it ends.
ITERATIONS = 3000
MISFIT = 1e-9
# Probability that may be left out where no path arrives: at the ends of open faces the chain stays where it is.
LOST = 1e-6
# Nodes up to which transition matrices are made, where coefficients are constant in time.
SMALL = 800
# Logarithms of zero.
NOTHING = -690.0
WIDTH = 6
# Part of the cost that sums over it cannot resolve.
ROUNDING = 1e-12


class Chain:
    """The process as a Markov chain on the nodes, marched by uniformisation over equal intervals.

    Coefficients that depend on time are frozen in every interval: of those there are more on finer grids.
    """

    def __init__(self, generator: Generator, horizon: float) -> None:
        same = generator.autonomous and len(generator.intervals()) == 1
        finer = max(generator.grid.shape) / FIRST_NODES[generator.grid.dim]
        self.count = INTERVALS if same else round(INTERVALS * max(finer, 1.0))
        self.dt = horizon / self.count
        middles = [(k + 0.5) * self.dt for k in range(self.count)]
        first = sp.csr_matrix(generator.matrix(middles[0]))
        self.matrices = [first] * self.count if same else [sp.csr_matrix(generator.matrix(t)) for t in middles]
        self.kernel: np.ndarray | None = None
        self.whole: np.ndarray | None = None
        if same and generator.grid.size <= SMALL:
            self.kernel = self._exponential(first, np.eye(generator.grid.size))
            self.whole = np.linalg.matrix_power(self.kernel, self.count)

    def _exponential(self, Q: sp.csr_matrix, v: np.ndarray) -> np.ndarray:
        """exp(dt Q) v as a sum of non-negative terms."""
        rate = 1.02 * float(-Q.diagonal().min()) + 1e-300
        stay = sp.csr_matrix(sp.identity(Q.shape[0]) + Q / rate)
        mean = rate * self.dt
        # the terms beyond twelve standard deviations of the Poisson law are below rounding
        last = math.ceil(mean + 12.0 * math.sqrt(mean) + 20.0)
        logs = -mean + np.arange(last + 1) * math.log(mean) - np.array([math.lgamma(k + 1.0) for k in range(last + 1)])
        weights, total, term = np.exp(logs), np.zeros(v.shape), v
        for weight in weights:
            total = total + weight * term
            term = stay @ term
        return np.asarray(total)

    def backward(self, v: np.ndarray) -> list[np.ndarray]:
        """States at all times, latest first, from v at T."""
        states = [v]
        for Q in self.matrices[::-1]:
            last = states[-1]
            states.append(self._exponential(Q, last) if self.kernel is None else self.kernel @ last)
        return states

    def forward(self, mass: np.ndarray) -> list[np.ndarray]:
        """Masses at all times, from those at 0."""
        states = [mass]
        for Q in self.matrices:
            last = states[-1]
            states.append(self._exponential(sp.csr_matrix(Q.T), last) if self.kernel is None else last @ self.kernel)
        return states

    def pulled(self, v: np.ndarray) -> np.ndarray:
        """State at 0 from v at T."""
        return self.backward(v)[-1] if self.whole is None else self.whole @ v

    def pushed(self, mass: np.ndarray) -> np.ndarray:
        """Masses at T from those at 0."""
        return self.forward(mass)[-1] if self.whole is None else mass @ self.whole


@dataclass(frozen=True, eq=False)
class ChainBridge:
    """The bridge on one grid; see ``kolmo.control.schroedinger`` for what is asked of it."""

    problem: KolmogorovProblem
    nodes: Grid
    chain: Chain
    states: list[np.ndarray]
    share: np.ndarray
    cost: float
    misfit: float
    iterations: int
    order: float = field(default=1.0, init=False)
    fewest: int = field(default=3, init=False)
    between: float = field(default=0.0, init=False)

    @property
    def rounding(self) -> float:
        """What the arithmetic can resolve of the cost."""
        return ROUNDING * abs(self.cost)

    @property
    def size(self) -> int:
        """Number of nodes."""
        return self.nodes.size

    @cached_property
    def times(self) -> np.ndarray:
        """Times at which the potentials are kept."""
        return np.linspace(0.0, float(self.problem.horizon or 0.0), self.chain.count + 1)

    @cached_property
    def logs(self) -> np.ndarray:
        """Logarithms of ψ, shape (nt, size)."""
        with np.errstate(divide="ignore"):
            return np.asarray(np.maximum(np.log(np.stack(self.states)), NOTHING))

    @cached_property
    def masses(self) -> np.ndarray:
        """Probabilities of the cells, shape (nt, size)."""
        return np.stack([a * b for a, b in zip(self.states, self.chain.forward(self.share), strict=True)])

    def log_psi(self, t: float, x: np.ndarray) -> np.ndarray:
        """Logarithm of ψ at points (n, d)."""
        return np.asarray(self.nodes.interpolate(self._between(self.logs, t), self._inside(x), WIDTH))

    def steering(self, t: float, x: np.ndarray) -> np.ndarray:
        """Σ∇log ψ at points (n, d)."""
        inside, u, d = self._inside(x), self._between(self.logs, t), x.shape[1]
        slopes = [self.nodes.interpolate(u, inside, WIDTH, [int(i == j) for j in range(d)]) for i in range(d)]
        S = self.problem.sde.covariance(t, x)
        return np.asarray(np.einsum("...ij,...j->...i", S, np.stack(slopes, -1)))

    def arrival(self, x: np.ndarray) -> np.ndarray:
        """E[X_T | X_0 = x]."""
        psi = self.states[-1]
        ahead = self.chain.pulled(psi[:, None] * self.nodes.points) / np.maximum(self.states[0], 1e-300)[:, None]
        return np.asarray(self.nodes.interpolate(ahead, self._inside(x), 2))

    def density(self, t: float, x: np.ndarray) -> np.ndarray:
        """Density of X_t at points (n, d)."""
        there = self._between(self.masses, t) / self.nodes.volumes
        inside = self._inside(x)
        return np.where((inside == x).all(-1), self.nodes.interpolate(there, inside, 2), 0.0)

    def coupling(self, x: np.ndarray) -> np.ndarray:
        """Probabilities of the nodes at T over those at 0 (x are the nodes), but for factors of the latter."""
        del x
        return np.asarray(self.states[-1][None] * self.chain.pulled(np.eye(self.nodes.size)))

    def paths(self, times: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
        """Points (len(times), count, d) of the bridge, drawn at each time for itself."""
        near = [int(np.abs(self.times - t).argmin()) for t in times]
        return np.stack(
            [self.nodes.points[rng.choice(self.nodes.size, count, p=m / m.sum())] for m in self.masses[near]]
        )

    def grid(self, cells: int) -> Grid:
        """The nodes."""
        del cells
        return self.nodes

    def _between(self, values: np.ndarray, t: float) -> np.ndarray:
        """Values at a time, linear between those that are kept."""
        k = int(np.clip(np.searchsorted(self.times, t, side="right") - 1, 0, len(self.times) - 2))
        s = float(np.clip((t - self.times[k]) / (self.times[k + 1] - self.times[k]), 0.0, 1.0))
        return np.asarray((1.0 - s) * values[k] + s * values[k + 1])

    def _inside(self, x: np.ndarray) -> np.ndarray:
        """The points, or the next ones in the box."""
        loose = np.array([not axis.periodic for axis in self.nodes.axes])
        return np.where(loose, np.clip(x, *self.nodes.box), x)


@dataclass(frozen=True, eq=False)
class ChainBridges:
    """Bridges between two densities as chains, on finer and finer grids.

    Attributes
    ----------
    problem : KolmogorovProblem
        The process, its box and the horizon.
    density0, density1 : GivenDensity
        The two ends.
    """

    problem: KolmogorovProblem
    density0: GivenDensity
    density1: GivenDensity
    growth: float = field(default=1.4, init=False)

    def shapes(self, resolution: float) -> list[tuple[int, ...]]:
        """Nodes per axis at a resolution (1: that of the first level)."""
        d = self.problem.dim
        return [(max(round(FIRST_NODES[d] * resolution), 3),) * d]

    def level(self, resolution: float, before: ChainBridge | None, limits: Limits) -> ChainBridge:
        """The bridge on a grid of a resolution."""
        del before
        grid = Grid.of(self.problem.box, self.shapes(resolution)[0])
        chain = Chain(discretize(self.problem, grid, "monotone"), float(self.problem.horizon or 0.0))
        m0, m1 = (_mass(density, grid) for density in (self.density0, self.density1))
        logs = np.zeros(grid.size)
        for count in range(1, ITERATIONS + 1):
            limits.check()
            psi = _scaled(logs)
            start = chain.pulled(psi)
            m0 = _reached(grid, start, m0, "the second density cannot be reached from all of the first one")
            share = np.where(m0 > 0, m0 / np.where(start > 0, start, 1.0), 0.0)
            end = chain.pushed(share)
            m1 = _reached(grid, end, m1, "the first density does not reach all of the second one")
            misfit, iterations = 0.5 * float(np.abs(end * psi - m1).sum()), count
            if misfit <= MISFIT:
                break
            with np.errstate(divide="ignore"):
                logs = np.where(m1 > 0, np.log(m1) - np.log(np.where(end > 0, end, 1.0)), NOTHING)
        psi = _scaled(logs)
        states = chain.backward(psi)[::-1]
        share = np.where(m0 > 0, m0 / np.where(states[0] > 0, states[0], 1.0), 0.0)
        first, last = (np.where(m > 0, np.log(np.where(m > 0, s, 1.0)), 0.0) for m, s in ((m0, states[0]), (m1, psi)))
        cost = float((m1 * last).sum() - (m0 * first).sum())
        return ChainBridge(self.problem, grid, chain, states, share, cost, misfit, iterations)


def _reached(grid: Grid, there: np.ndarray, mass: np.ndarray, otherwise: str) -> np.ndarray:
    """The mass without what no path joins, if that is next to nothing; else it is refused."""
    missed = (mass > 0) & ~(there > 0)
    if mass[missed].sum() > LOST:
        raise NotConvergedError(
            f"{otherwise}: nothing arrives at {grid.points[missed][0].tolist()}. Fix: more noise; or "
            "'reflecting' faces, as corners of a grid with open faces stay where they are"
        )
    return np.asarray(np.where(missed, 0.0, mass) / mass[~missed].sum()) if missed.any() else mass


def _scaled(logs: np.ndarray) -> np.ndarray:
    """exp(logs), scaled so that its largest entry is 1."""
    return np.where(logs > NOTHING, np.exp(np.clip(logs - logs.max(), NOTHING, None)), 0.0)


def _mass(density: GivenDensity, grid: Grid) -> np.ndarray:
    """Probabilities of the cells, normalised; tails below rounding of the largest are dropped."""
    mass = density(grid.points) * grid.volumes
    if not mass.max() > 0:
        raise InputError(density.name, "zero at all nodes", "a density that does not vanish", "a box that holds it")
    mass = np.where(mass > 1e-16 * mass.max(), mass, 0.0)
    return np.asarray(mass / mass.sum())
