"""One recipe in one dimension, prepared for many problems: their coefficients in, their states at time 0 out."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import scipy.sparse as sp

from kolmo.arrays import Array, as_like, as_numpy
from kolmo.discretization import Discretization
from kolmo.kernels import batch
from kolmo.problem import KolmogorovProblem
from kolmo.schemes.central import Central
from kolmo.steppers.radau import tableau

# Equations that are solved side by side: two vectors of eight numbers, whose factors stay in the cache of a core.
LANES = 16
# Multiplier from which on a factorisation without exchange of rows is not trusted: so many times rounding is lost.
LARGEST = 1e3
STAGES = 3


@dataclass(frozen=True, eq=False)
class Coefficients:
    """Coefficients of P problems at the nodes of a recipe, each of shape (P, n), and values on the two faces (P, 2).

    Attributes
    ----------
    drift, covariance, killing, source, terminal : array
        b, Σ, c, g and φ.
    faces : array
        Values at absorbing ends, 0 at others.
    """

    drift: Array
    covariance: Array
    killing: Array
    source: Array
    terminal: Array
    faces: Array


@dataclass(frozen=True, eq=False)
class Lines:
    """A recipe that was laid out for one problem, ready for others with the same box and faces.

    Parameters
    ----------
    problem : KolmogorovProblem
        The problem that the recipe was planned for.
    recipe : Discretization
        In one dimension, of equal Radau steps of order five on central differences; see ``fits``.
    """

    problem: KolmogorovProblem
    recipe: Discretization

    @cached_property
    def _generator(self) -> Any:
        return self.recipe.march(self.problem).generator

    def fits(self) -> bool:
        """Whether this kind of recipe can be marched for many: no breaks, smooth φ, noise that reaches what absorbs."""
        recipe, axis, faces = self.recipe, self.recipe.grid.axes[0], self._generator.box.faces[0]
        plain = recipe.stepper == "radau5" and isinstance(self._generator.scheme, Central)
        smooth = recipe.terminal is None or not (recipe.terminal.smoothed or len(recipe.terminal.met))
        told = recipe.breakpoints or recipe.averages or axis.breaks or axis.periodic
        equal = np.ptp(np.diff(recipe.times)) <= 1e-9 * recipe.times[-1]
        known = all(type(f) is type(g) for f, g in zip(faces, self.problem.box.faces[0], strict=True))
        return bool(plain and smooth and not told and equal and known and self._generator.autonomous)

    @cached_property
    def places(self) -> np.ndarray:
        """Where coefficients are read, shape (n, 1)."""
        return np.asarray(self._generator.places())

    @cached_property
    def _held(self) -> np.ndarray:
        """Ends whose values are prescribed."""
        return np.asarray(self._generator.fixed[[0, -1]])

    @cached_property
    def _matrices(self) -> tuple[sp.csr_matrix, sp.csr_matrix]:
        operators = self._generator.stencil.operators[0]
        return operators["first"].matrix, operators["second"].matrix

    @cached_property
    def _band(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, int]:
        """Differences in band storage without the columns of held ends; first, last and own last column of each row."""
        n = len(self.places)
        entries = [m.tocoo() for m in self._matrices]
        first, ends = np.arange(n), np.arange(n)
        held = self._generator.fixed
        for m in entries:
            free = ~held[m.col] & ~held[m.row]
            np.minimum.at(first, m.row[free], m.col[free])
            np.maximum.at(ends, m.row[free], m.col[free])
        last = ends.copy()
        for i in range(n):
            last[i] = max([last[i], *last[first[i] : i]])
        left = int((np.arange(n) - first).max())
        band = np.zeros((2, n, left + int((last - np.arange(n)).max()) + 1))
        for k, m in enumerate(entries):
            free = ~held[m.col] & ~held[m.row]
            band[k, m.row[free], left + m.col[free] - m.row[free]] = m.data[free]
        return band, first, last, ends, left

    def numbers(self, given: Coefficients) -> tuple[Array, Array, Array, Array]:
        """Numbers of both differences and the killing rate at the nodes, and the load, shape (P, n) each."""
        generator, like = self._generator, given.drift
        density, bend = (as_like(v[:, 0], like) for v in (generator.metric.density, generator.metric.bend))
        free = as_like((~generator.fixed).astype(float), like)
        noisy = as_like(generator.stencil.keep[0].array.astype(float), like)
        first = (given.drift * density - 0.5 * given.covariance * bend) * free
        second = 0.5 * given.covariance * density**2 * noisy * free
        load = given.source * free
        for side in np.flatnonzero(self._held):
            columns = [as_like(m[:, [0 if side == 0 else -1]].toarray()[:, 0], like) for m in self._matrices]
            load = load + given.faces[:, side, None] * (first * columns[0] + second * columns[1])
        return first, second, given.killing * free, load

    def begun(self, given: Coefficients) -> Array:
        """Terminal data at the free nodes, shape (P, n)."""
        return given.terminal * as_like((~self._generator.fixed).astype(float), given.terminal)

    def ended(self, u: Array, given: Coefficients) -> Array:
        """States with the values of held ends put in, shape (P, n)."""
        for side in np.flatnonzero(self._held):
            end = np.zeros(u.shape[1])
            end[0 if side == 0 else -1] = 1.0
            u = u + given.faces[:, side, None] * as_like(end, u)
        return u

    def states(self, given: Coefficients, horizons: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """u(0, ·) of every problem, shape (P, n), and whether its factors can be trusted."""
        march = Marched(self, self.numbers(given), horizons)
        u = march.run(self.begun(given), keep=False)
        return self.ended(u, given), march.trusted


class Marched:
    """The march of many problems, block by block; with ``keep`` it can be transposed.

    Parameters
    ----------
    lines : Lines
        The recipe.
    numbers : four ndarrays, shape (P, n)
        From ``Lines.numbers``.
    horizons : ndarray, shape (P,)
        T of every problem.
    """

    def __init__(self, lines: Lines, numbers: Sequence[Array], horizons: np.ndarray) -> None:
        *differences, self._load = (as_numpy(v) for v in numbers)
        self._lines, self._numbers, self._horizons = lines, np.stack(differences), horizons
        self._kept: list[tuple[np.ndarray, ...]] = []
        self.trusted = np.ones(len(self._load), dtype=bool)
        table = tableau(STAGES)
        real, pair = (int(np.argmax(table.eigenvalues.imag == 0)), int(np.argmax(table.eigenvalues.imag)))
        self._eigenvalues = table.eigenvalues[real].real, table.eigenvalues[pair]
        total, column = table.T_inverse[pair].sum(), table.T[-1, pair]
        modes = [table.T_inverse[real].sum().real, table.T[-1, real].real, total.real, total.imag]
        self._modes = np.array([*modes, column.real, column.imag])

    def run(self, u: np.ndarray, *, keep: bool) -> np.ndarray:
        """States after all steps, from the free part of the terminal data (P, n)."""
        result = np.empty_like(u)
        for block in self._blocks():
            result[block] = self._one(block, u[block], keep)
        return result

    def _blocks(self) -> list[slice]:
        return [slice(i, i + LANES) for i in range(0, len(self._load), LANES)]

    def _one(self, block: slice, u: np.ndarray, keep: bool) -> np.ndarray:
        band, first, last, ends, left = self._lines._band
        state, load = _lanes(u), _lanes(self._load[block])
        n, lanes = state.shape
        a = np.stack([_lanes(v[block]) for v in self._numbers])
        dt = _lanes(self._horizons[block, None])[0] / self._lines.recipe.steps
        real, pair = self._eigenvalues
        scale = np.stack([dt * real, dt * pair.real, dt * pair.imag])
        R, C, growth = np.empty((n, band.shape[2], lanes)), np.empty((2, n, band.shape[2], lanes)), np.zeros(lanes)
        batch.factor(band, first, last, ends, left, a, scale, R, C, growth)
        count = len(u)
        self.trusted[block] = growth[:count] <= LARGEST
        kept = np.empty((self._lines.recipe.steps, 3, n if keep else 0, lanes))
        batch.march(first, last, left, R, C, scale, self._modes, load, state, kept, np.empty((3, n, lanes)))
        if keep:
            self._kept.append((R, C, scale, kept))
        return state[:, :count].T

    def pullback(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Derivatives of Σ weights · states with respect to the numbers (3, P, n), the load and the terminal data."""
        numbers, loads, begun = np.empty_like(self._numbers), np.empty_like(self._load), np.empty_like(self._load)
        band, first, last, ends, left = self._lines._band
        for block, (R, C, scale, kept) in zip(self._blocks(), self._kept, strict=True):
            p = _lanes(weights[block])
            n, lanes = p.shape
            a, r, count = np.zeros((3, n, lanes)), np.zeros((n, lanes)), len(weights[block])
            work = np.empty((3, n, lanes))
            batch.pullback(band, first, last, ends, left, R, C, scale, self._modes, kept, p, work, a, r)
            numbers[:, block] = np.swapaxes(a, 1, 2)[:, :count]
            loads[block], begun[block] = r[:, :count].T, p[:, :count].T
        return numbers, loads, begun


def _lanes(values: np.ndarray) -> np.ndarray:
    """Rows of at most LANES problems as lanes (n, LANES), the last one repeated."""
    if len(values) < LANES:
        values = np.concatenate([values, np.repeat(values[-1:], LANES - len(values), axis=0)])
    return np.ascontiguousarray(values.T)
