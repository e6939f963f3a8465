"""The levels of one plan, marched for many problems; each of them is judged by its own levels."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np

from kolmo.discretization import Discretization
from kolmo.kernels import batch
from kolmo.many.lines import Coefficients, Lines
from kolmo.many.look import NAMES, Sampled, Whereabouts, extremes, regular, rows, sampled
from kolmo.problem import KolmogorovProblem
from kolmo.problem.faces import Absorbing
from kolmo.refine.family import Family, rounding_of
from kolmo.refine.samples import offset
from kolmo.refine.witnesses import groups, witnesses

# Places between the nodes at which functions are compared with what the nodes say. In the core there are some 16
# spreads of the process, so that they lie 1/250 of a spread apart.
BETWEEN = 4096
# Share of the tolerance left to the effect of the cut, as in a search for one problem; and the part of it that an
# estimate is at least, since what lies between the samples has not been seen.
CUT_SHARE, UNSEEN = 0.2, 0.03
# Area of a Gaussian of spread and height one.
GAUSSIAN = 2.5066
TINY = 1e-300
# Problems that are sampled and judged at a time: some megabytes.
BLOCK = 128


@dataclass(frozen=True, eq=False)
class Judged:
    """What an ensemble found of some problems, P of them; of those that it could not sample nothing counts.

    Attributes
    ----------
    values : ndarray, shape (P, m)
        Answers at the points.
    states : ndarray, shape (P, n)
        u(0, ·) at the nodes of the finest level.
    estimate, allowed : ndarray, shape (P,)
        Estimate of the error, and the tolerance.
    good : ndarray of bool, shape (P,)
        Whether the answer can be given.
    parts : dict
        By name, parts of the estimate (P,).
    """

    parts: dict[str, np.ndarray]
    values: np.ndarray
    states: np.ndarray
    estimate: np.ndarray
    allowed: np.ndarray
    good: np.ndarray

    @classmethod
    def joined(cls, blocks: Sequence["Judged"]) -> "Judged":
        """All blocks in one."""
        parts = {name: np.concatenate([b.parts[name] for b in blocks]) for name in blocks[0].parts}
        return cls(parts, *(np.concatenate(v) for v in zip(*[b.arrays for b in blocks], strict=True)))

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        """All but the parts."""
        return self.values, self.states, self.estimate, self.allowed, self.good

    def where(self, mask: np.ndarray) -> "Judged":
        """What was found of some of the problems."""
        return Judged({name: v[mask] for name, v in self.parts.items()}, *(v[mask] for v in self.arrays))


@dataclass(frozen=True, eq=False)
class Ensemble:
    """A plan for one problem, used for others of its kind.

    Parameters
    ----------
    problem : KolmogorovProblem
        The one that was planned for.
    family : Family
        The levels of its plan.
    points : ndarray, shape (m, 1)
        Where answers matter.
    """

    problem: KolmogorovProblem
    family: Family
    points: np.ndarray

    @cached_property
    def levels(self) -> list[Lines]:
        """The levels, coarsest first."""
        return [Lines(self.problem, recipe) for recipe in self.family.recipes]

    @cached_property
    def _cut(self) -> list[Lines]:
        """A level and the same on a wider box, or nothing."""
        known = {id(line.recipe): line for line in self.levels}
        return [known.get(id(recipe)) or Lines(self.problem, recipe) for recipe in self.family.cut]

    def fits(self) -> bool:
        """Whether its levels can be marched for many, and can tell whether they may be."""
        cut = self.problem.box.has("cut")
        whole = len(self.levels) > 2 and (not cut or len(self._cut) == 2)
        return whole and all(line.fits() for line in (*self.levels, *self._cut))

    @cached_property
    def _lines(self) -> list[Lines]:
        """All that are marched."""
        return [*self.levels, *(line for line in self._cut if line not in self.levels)]

    @cached_property
    def _between(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Places between the nodes of the last level, their lengths; of the interpolation, first nodes and weights."""
        recipe, xi = self.levels[-1].recipe, offset(BETWEEN)
        axis = recipe.grid.axes[0]
        x = np.asarray(axis.grading(xi))
        index, weights = axis.weights(x, recipe.width)
        return x, np.asarray(axis.grading.slope(xi)) / BETWEEN, index[:, 0].copy(), np.asarray(weights)

    @cached_property
    def places(self) -> np.ndarray:
        """Where functions are sampled, shape (all, 1): at the nodes of every level, and between those of the last."""
        return np.concatenate([*(line.places for line in self._lines), self._between[0][:, None]])

    def _slice(self, line: Lines | None) -> slice:
        """Which of the places belong to a level; None: those between."""
        begin = 0
        for other in self._lines:
            if other is line:
                return slice(begin, begin + len(other.places))
            begin += len(other.places)
        return slice(begin, len(self.places))

    @cached_property
    def _hard(self) -> np.ndarray:
        """Ends of the state space, shape (2,)."""
        return np.array([not face.cut for face in self.problem.box.faces[0]])

    def judge(self, problems: Sequence[KolmogorovProblem], rtol: float, atol: float) -> Judged:
        """Solve some problems on all levels, and judge each."""
        blocks = [problems[i : i + BLOCK] for i in range(0, len(problems), BLOCK)]
        return Judged.joined([self._block(block, rtol, atol) for block in blocks])

    def _block(self, problems: Sequence[KolmogorovProblem], rtol: float, atol: float) -> Judged:
        found = [sampled(problem, self.places) for problem in problems]
        which = np.flatnonzero([part is not None for part in found])
        m, n = len(self.points), self.levels[-1].recipe.grid.size
        count = len(problems)
        judged = Judged(
            {name: np.full(count, np.inf) for name in ("discretization", "cut", "between")},
            np.full((count, m), np.nan),
            np.full((count, n), np.nan),
            np.full(count, np.inf),
            np.zeros(count),
            np.zeros(count, dtype=bool),
        )
        if len(which):
            horizons = np.array([problems[i].horizon or 0.0 for i in which.tolist()])
            self._fill(judged, which, [part for part in found if part is not None], horizons, rtol, atol)
        return judged

    def _fill(
        self, judged: Judged, which: np.ndarray, parts: list[Sampled], horizons: np.ndarray, rtol: float, atol: float
    ) -> None:
        """Solve and judge those that were sampled."""
        with np.errstate(all="ignore"):  # what is not finite is not good
            solved = {id(line): line.states(self._coefficients(parts, line), horizons) for line in self._lines}
        last = self.levels[-1]
        everywhere = np.concatenate([self.points, witnesses(self.levels[0].recipe.grid, self.points)])

        def read(line: Lines) -> np.ndarray:
            u = np.nan_to_num(solved[id(line)][0], nan=np.inf).T
            with np.errstate(invalid="ignore"):
                return np.asarray(line.recipe.grid.interpolate(u, everywhere, line.recipe.width))

        finite = np.all([trusted & np.isfinite(u).all(1) for u, trusted in solved.values()], axis=0)
        levels = [np.where(finite, read(line), 0.0) for line in self.levels]
        states = np.where(finite[:, None], solved[id(last)][0], 0.0)
        verdict = self.family.convergence.judge(
            self.family.resolutions,
            levels,
            groups=groups(len(self.points), 1),
            rounding=rounding_of(states.T, system=False),
        )
        values = levels[-1][: len(self.points)].T
        size = np.abs(values).max(1)
        allowed = atol + rtol * size
        cut = np.zeros(len(parts))
        if self._cut:
            narrow, wide = (np.where(finite, read(line), 0.0)[: len(self.points)] for line in self._cut)
            cut = self.family.safety * np.abs(wide - narrow).max(0)
        widest = self._cut[-1] if self._cut else last
        drift, covariance = (rows(parts, name, self._slice(widest)) for name in ("drift", "covariance"))
        x = np.ascontiguousarray(widest.places[:, 0])
        going = Whereabouts.of(x, drift, covariance, extremes(self.points), horizons, self._hard)
        between = self._unresolved(parts, going, horizons, size)
        estimate = verdict.estimate + cut + between
        nodes = last.places[:, 0]
        mine = [rows(parts, name, self._slice(last)) for name in ("drift", "covariance")]
        good = finite & ~verdict.silent & regular(self.problem.box, nodes, *mine)
        good &= going.inside(float(nodes[0]), float(nodes[-1]), self._hard)
        good &= (verdict.estimate <= (1.0 - CUT_SHARE) * allowed) & (cut <= CUT_SHARE * allowed) & (estimate <= allowed)
        good &= self._possible(parts, values, allowed)
        for name, part in (("discretization", verdict.estimate), ("cut", cut), ("between", between)):
            judged.parts[name][which] = part
        judged.values[which], judged.states[which], judged.good[which] = values, states, good
        judged.estimate[which], judged.allowed[which] = np.maximum(estimate, UNSEEN * allowed), allowed

    def _coefficients(self, parts: list[Sampled], line: Lines) -> Coefficients:
        """Samples at the nodes of a level."""
        read = partial(rows, parts, where=self._slice(line))
        drift, covariance, killing, source, terminal = (read(name) for name in NAMES)
        faces = np.stack([part.faces for part in parts])
        return Coefficients(drift, covariance, killing, source, terminal, faces)

    def _unresolved(
        self, parts: list[Sampled], going: Whereabouts, horizons: np.ndarray, size: np.ndarray
    ) -> np.ndarray:
        """What functions do between the nodes of the last level that these do not say, in its effect on the answer.

        That is the difference from its interpolation, where the process goes, times what a unit of the function does.
        """
        x, lengths, begin, interpolation = self._between
        spread = np.maximum(np.where(np.isfinite(going.spreads), going.spreads, 1.0), TINY)
        weights = {
            "drift": horizons * size / spread,
            "covariance": horizons * size / spread**2,
            "killing": horizons * size,
            "source": horizons,
            "terminal": np.ones(len(parts)),
        }
        total, nodes, between = np.zeros(len(parts)), self._slice(self.levels[-1]), self._slice(None)
        for name, weight in weights.items():
            varies = np.flatnonzero([part.ranges[name][0] < part.ranges[name][1] for part in parts])
            some, means = [parts[i] for i in varies], np.empty(len(varies))
            seen, told = rows(some, name, between), rows(some, name, nodes)
            batch.missed(begin, interpolation, told, seen, x, lengths, going.middles[varies], spread[varies], means)
            total[varies] += weight[varies] * means / (GAUSSIAN * spread[varies])
        return total

    def _possible(self, parts: list[Sampled], values: np.ndarray, allowed: np.ndarray) -> np.ndarray:
        """Whether answers lie within the bounds of the maximum principle, where there are some."""
        terminal = np.array([part.ranges["terminal"] for part in parts])
        ends = [part.faces[[isinstance(f, Absorbing) for f in self.problem.box.faces[0]]] for part in parts]
        paid = np.array([[end.min(), end.max()] if len(end) else [np.inf, -np.inf] for end in ends])
        killing = np.array([part.ranges["killing"] for part in parts])
        zero = np.where(killing[:, 1] > 0.0, 0.0, np.nan)
        low = np.fmin(np.fmin(terminal[:, 0], paid[:, 0]), zero)
        high = np.fmax(np.fmax(terminal[:, 1], paid[:, 1]), zero)
        unbounded = np.array([part.ranges["source"] != (0.0, 0.0) for part in parts]) | (killing[:, 0] < 0.0)
        within = (values.min(1) >= low - allowed) & (values.max(1) <= high + allowed)
        return np.asarray(within | unbounded)

    def recipe(self, horizon: float, parts: dict[str, float]) -> Discretization:
        """The recipe of the last level for a problem with this horizon."""
        last = self.levels[-1].recipe
        times = np.linspace(0.0, horizon, len(last.times))
        estimate = {name: [part] for name, part in parts.items()}
        return Discretization(
            last.grid, tuple(times.tolist()), last.scheme, last.stepper, last.terminal, estimate=estimate
        )
