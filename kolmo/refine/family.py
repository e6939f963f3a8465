"""The levels that a search ended with, to be solved and judged again where parameters have changed."""

import math
from dataclasses import dataclass

import numpy as np

from kolmo.arrays import as_numpy
from kolmo.discretization import Discretization
from kolmo.problem.problem import KolmogorovProblem
from kolmo.problem.rest import at_rest
from kolmo.refine.estimate import Convergence
from kolmo.refine.witnesses import groups, witnesses
from kolmo.stationary import solve_stationary

# Rounding of a march: a few units in the last place of the largest value, as random as the number of nodes; of one
# large system, which is as ill-conditioned as there are nodes, not so random.
ROUNDING = 4e-15


@dataclass(frozen=True)
class Family:
    """Recipes of levels that belong together, coarsest first, and how they are judged.

    Attributes
    ----------
    recipes : tuple of Discretization
        The levels; the answer is that of the last one.
    resolutions : tuple of float
        Nodes per axis that each stands for.
    convergence : Convergence
        What is believed of them.
    cut : tuple of Discretization
        A level and the same on a wider box; empty where nothing is cut.
    safety : float
        So many times their difference is the effect of the cut.
    unseen : float
        Least estimate, as a part of the tolerance.
    """

    recipes: tuple[Discretization, ...]
    resolutions: tuple[float, ...]
    convergence: Convergence
    cut: tuple[Discretization, ...] = ()
    safety: float = 1.0
    unseen: float = 0.0

    def excess(self, problem: KolmogorovProblem, points: np.ndarray, rtol: float, atol: float) -> float:
        """Estimate of the last level over the tolerance, for a problem with other parameters: at most 1 where it holds.

        Parameters
        ----------
        problem : KolmogorovProblem
            Of the structure that the levels were made for.
        points : ndarray, shape (n, d)
            Where the answer matters.
        rtol, atol : float
            Tolerance.
        """
        everywhere = np.concatenate([points, witnesses(self.recipes[0].grid, points)])
        solved = {id(recipe): state(problem, recipe) for recipe in {*self.recipes, *self.cut}}
        if not all(np.isfinite(u).all() for u in solved.values()):
            return math.inf

        def read(recipe: Discretization) -> np.ndarray:
            return np.asarray(recipe.grid.interpolate(solved[id(recipe)], everywhere, recipe.width))

        last = solved[id(self.recipes[-1])]
        values = [read(recipe) for recipe in self.recipes]
        verdict = self.convergence.judge(
            self.resolutions,
            values,
            groups=groups(len(points), points.shape[1]),
            rounding=rounding_of(last, system=problem.stationary),
        )
        allowed = atol + rtol * np.abs(values[-1][: len(points)]).max(0)
        estimate = verdict.estimate
        if self.cut:
            narrow, wide = (read(recipe)[: len(points)] for recipe in self.cut)
            estimate = estimate + self.safety * np.abs(wide - narrow).max(0)
        return float(np.max(np.maximum(estimate / allowed, self.unseen)))


def rounding_of(last: np.ndarray, *, system: bool) -> np.ndarray:
    """What the arithmetic can resolve of a state (size, k) of a march, or of the solution of one large system."""
    return np.asarray(ROUNDING * np.abs(last).max(0) * (len(last) if system else math.sqrt(len(last))))


def state(problem: KolmogorovProblem, recipe: Discretization) -> np.ndarray:
    """u(0, ·) at the nodes of a recipe, shape (size, k), in NumPy."""
    march = recipe.march(at_rest(problem, recipe.grid.box))
    if problem.stationary:
        return np.asarray(solve_stationary(march))
    run = march.backward(recipe.initial(march))
    if run.interrupted:
        raise KeyboardInterrupt
    return np.asarray(as_numpy(run.state))
