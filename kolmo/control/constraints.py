r"""State constraints: at a constrained face only controls that keep the state inside are admissible.

There the drift must not point out and no noise may cross (Soner 1986). Of a Hamiltonian that is convex in the control
the best admissible one is the unconstrained one for another gradient and Hessian,

.. math:: \min_{a: n\cdot b(a) \le 0} H(a) = \max_{\mu \ge 0} \min_a\, [H(a) + \mu\, n\cdot b(a)]

n the outward normal: the multiplier μ is added to the slope of V across the face, and a large one to the second
derivative where the control makes the noise. Between two controls that are equally good for the best μ (bang-bang) lies
one whose drift is along the face.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from kolmo.errors import InputError
from kolmo.problem.box import Box

if TYPE_CHECKING:
    from kolmo.control.coefficients import Coefficients

# Drift out of a face below this part of the largest across it is rounding; noise across it likewise.
INSIDE, STILL = 1e-12, 1e-12
# Weight of noise across the face, relative to all other parts of the Hamiltonian.
HEAVY = 1e14
# Doublings of a multiplier until no control leads out, steps of the search for the least one, and rounds in corners.
DOUBLINGS, STEPS, ROUNDS = 60, 60, 4
# Values that differ by this part of their size are worth the same.
TIE = 1e-12
# Points within this part of their size of a face lie on it.
ON_FACE = 1e-12


@dataclass(frozen=True)
class Wall:
    """One constrained face: its axis, the sign of its outward normal, and which points (n,) lie on it."""

    axis: int
    out: float
    on: np.ndarray


def constrained(box: Box, x: np.ndarray, free: np.ndarray) -> list[Wall]:
    """The constrained faces that some of the free ones among points x (n, d) lie on.

    What lies on an absorbing face as well is held there.
    """
    free, found = free.copy(), []
    for axis, side, face in box.each():
        end = (box.lower, box.upper)[side][axis]
        on = np.abs(x[:, axis] - end) <= ON_FACE * max(abs(end), float(np.abs(x[:, axis]).max(initial=0.0)))
        if face.imposed:
            free &= ~on
        elif face.constrains:
            found.append(Wall(axis, 2.0 * side - 1.0, on))
    kept = [Wall(wall.axis, wall.out, wall.on & free) for wall in found]
    return [wall for wall in kept if wall.on.any()]


# Best controls (n, m) without constraint for gradients (n, d) and Hessians (n, d, d), and where there is one.
Best = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Acting:
    """What controls do at the points of some coefficients at a time, for values V (n,)."""

    at: "Coefficients"
    t: float
    V: np.ndarray

    def moving(self, a: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Drift (n, d) and covariance (n, d, d) of controls (n, m)."""
        values = self.at.values(self.t, torch.as_tensor(a))
        return values.b, values.S

    def worth(self, a: np.ndarray, p: np.ndarray, M: np.ndarray) -> np.ndarray:
        """Hamiltonian (n,) of controls (n, m), times the sign of the sense."""
        return np.asarray(self.at.problem.sign * self.at.hamiltonian(self.t, self.V, p, M, torch.as_tensor(a)))


@dataclass(frozen=True)
class Trial:
    """Controls (n, m) that are best for multipliers μ (n,), their drift out of the wall, and their Hamiltonian."""

    mu: np.ndarray
    a: np.ndarray
    out: np.ndarray
    H: np.ndarray

    @property
    def dual(self) -> np.ndarray:
        """What no admissible control is better than."""
        return np.asarray(self.H + self.mu * self.out)

    def where(self, mask: np.ndarray, other: "Trial") -> "Trial":
        """Itself where the mask is, the other one elsewhere."""
        return Trial(
            np.where(mask, self.mu, other.mu),
            np.where(mask[:, None], self.a, other.a),
            np.where(mask, self.out, other.out),
            np.where(mask, self.H, other.H),
        )


class Admissible:
    """The best admissible controls at points on constrained faces.

    Parameters
    ----------
    walls : list of Wall
        The faces, with the points on each.
    x : ndarray, shape (n, d)
        The points, all of them on some face.
    acting : Acting
        What controls do there.
    samples : ndarray, shape (q, m)
        Typical controls; all of them where they are listed.
    listed : bool
        Whether the controls are a list.
    sign : float
        1 when minimising, −1 when maximising.
    """

    def __init__(
        self, walls: list[Wall], x: np.ndarray, acting: Acting, samples: np.ndarray, listed: bool, sign: float
    ) -> None:
        self.walls, self.x, self.acting, self.samples, self.listed, self.sign = walls, x, acting, samples, listed, sign
        one = len(samples) == 1 and not listed
        typical = np.concatenate([samples, samples + 1.0, samples - 1.0]) if one else samples
        self.typical = [np.tile(a, (len(x), 1)) for a in typical]
        parts = [acting.moving(a) for a in self.typical]
        # sizes of drift and noise per axis: what is rounding beside them is nothing
        self.speed = np.max([np.abs(b) for b, _ in parts], axis=0)
        self.noise = np.max([np.einsum("nii->ni", S) for _, S in parts], axis=0)

    def kept(self, a: np.ndarray) -> np.ndarray:
        """Where controls (n, m) keep the state inside, shape (n,)."""
        b, S = self.acting.moving(a)
        inside = np.ones(len(self.x), dtype=bool)
        for wall in self.walls:
            still = S[:, wall.axis, wall.axis] <= STILL * self.noise[:, wall.axis]
            inside &= ~wall.on | (still & (wall.out * b[:, wall.axis] <= INSIDE * self.speed[:, wall.axis]))
        return inside

    def choose(
        self, acting: Acting, p: np.ndarray, M: np.ndarray, best: Best, start: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Best admissible controls, and where the Hamiltonian has an optimum; the start wins ties.

        Raises
        ------
        InputError
            Where no control keeps the state inside.
        """
        a, found = self._listed(acting, p, M, start) if self.listed else _Search(self, acting, M, best).run(p)
        lost = found & ~self.kept(a)
        if lost.any():
            self._refuse(int(np.flatnonzero(lost)[0]), a)
        return a, found

    def _refuse(self, row: int, a: np.ndarray) -> None:
        b, S = self.acting.moving(a)
        wall = next(wall for wall in self.walls if wall.on[row])
        drift, noise = wall.out * b[row, wall.axis] + 0.0, S[row, wall.axis, wall.axis]
        raise InputError(
            f"boundary[{wall.axis}][{int(wall.out > 0)}]",
            f"'constrained' where no control keeps the state inside: drift {drift:.3g} out of it "
            f"and noise {noise:.3g} across it are left at x = {self.x[row].tolist()}",
            "a control without drift out of the face and without noise across it",
            "let noise die at the face, or make it 'reflecting' or 'absorbing'",
        )

    def _listed(self, acting: Acting, p: np.ndarray, M: np.ndarray, start: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The best admissible member of a list."""
        H = np.stack([acting.worth(a, p, M) for a in self.typical])
        H -= TIE * np.abs(H).max(0) * (start[None] == self.samples[:, None]).all(-1)
        H = np.where(np.stack([self.kept(a) for a in self.typical]), H, np.inf)
        return self.samples[H.argmin(0)], np.ones(len(self.x), dtype=bool)


class _Search:
    """The best admissible controls of a set that is no list, by multipliers."""

    def __init__(self, among: Admissible, acting: Acting, M: np.ndarray, best: Best) -> None:
        self.among, self.acting, self.best = among, acting, best
        self.M = M.copy()
        size = 1.0 + np.abs(M).max(initial=0.0)
        for wall in among.walls:
            most = among.noise[:, wall.axis]
            heavy = np.divide(HEAVY * size, most, out=np.zeros_like(most), where=wall.on & (most > 0.0))
            self.M[:, wall.axis, wall.axis] += 2.0 * among.sign * heavy

    def run(self, p: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """One wall after the other; where walls meet, round and round."""
        a, found = self.best(p, self.M)
        if a.shape[1] == 1:
            for wall in self.among.walls:
                a = self._drawn(wall, p, a)
            return a, found
        pushed, walls = p.copy(), self.among.walls
        mu = [np.zeros(len(p)) for _ in walls]
        meet = np.sum([wall.on for wall in walls], axis=0).max() > 1
        for _ in range(ROUNDS if meet else 1):
            for k, wall in enumerate(walls):
                pushed[:, wall.axis] -= self.among.sign * wall.out * mu[k]
                last = self._along(wall, pushed)
                mu[k] = last.mu
                pushed[:, wall.axis] += self.among.sign * wall.out * mu[k]
                a = np.where(wall.on[:, None], last.a, a)
        return a, found

    def _drawn(self, wall: Wall, p: np.ndarray, a: np.ndarray) -> np.ndarray:
        """One control, drawn towards typical ones that do not lead out until it does not either; the best of these."""
        slack, low = INSIDE * self.among.speed[:, wall.axis], self._judged(wall, p, np.zeros(len(p)), a)
        if not (low.out > slack).any():
            return a
        result = replace(low, H=np.full(len(p), np.inf))
        for typical in self.among.typical:
            end = self._judged(wall, p, low.mu, typical)
            near = self._root(wall, p, low, end)
            for option in (end, near):
                result = option.where((option.out <= slack) & (option.H < result.H), result)
        return low.where(low.out <= slack, result).a

    def _root(self, wall: Wall, p: np.ndarray, low: Trial, end: Trial) -> Trial:
        """On the line through two controls the one whose drift is along the wall: at once where that is affine."""
        slack, bounded = INSIDE * self.among.speed[:, wall.axis], len(self.among.samples) > 1
        fall = low.out - end.out
        share = np.where(fall > 0.0, low.out / np.where(fall > 0.0, fall, 1.0), 0.0)
        near = self._judged(
            wall, p, low.mu, low.a + (np.minimum(share, 1.0) if bounded else share)[:, None] * (end.a - low.a)
        )
        inner, outer = end, low
        for _ in range(STEPS):
            if (np.abs(near.out) <= slack)[(low.out > slack) & (end.out <= slack)].all():
                break
            leads = near.out > slack
            inner, outer = near.where(~leads, inner), near.where(leads, outer)
            near = self._judged(wall, p, low.mu, 0.5 * (inner.a + outer.a))
        return near.where(near.out <= slack, inner)

    def _trial(self, wall: Wall, p: np.ndarray, mu: np.ndarray) -> Trial:
        pushed = p.copy()
        pushed[:, wall.axis] += self.among.sign * wall.out * mu
        return self._judged(wall, p, mu, self.best(pushed, self.M)[0])

    def _judged(self, wall: Wall, p: np.ndarray, mu: np.ndarray, a: np.ndarray) -> Trial:
        out = np.where(wall.on, wall.out * self.acting.moving(a)[0][:, wall.axis], 0.0)
        return Trial(mu, a, out, self.acting.worth(a, p, self.M))

    def _along(self, wall: Wall, p: np.ndarray) -> Trial:
        """Controls that do not lead out of one wall, with their multipliers."""
        slack = INSIDE * self.among.speed[:, wall.axis]
        low = high = self._trial(wall, p, np.zeros(len(p)))
        mu = 1.0 + np.abs(p[:, wall.axis])
        for _ in range(DOUBLINGS):
            out = high.out > slack
            if not out.any():
                break
            high, mu = self._trial(wall, p, np.where(out, mu, high.mu)), 2.0 * mu
        return high if high is low else self._between(wall, p, low, high)

    def _between(self, wall: Wall, p: np.ndarray, low: Trial, high: Trial) -> Trial:
        """The best controls along the wall, between those that lead out and those that do not.

        The dual function is concave, with the drift as its slope. That vanishes at a secant where the Hamiltonian is
        quadratic; where lines cross if the controls on either side are ends of the set.
        """
        slack = INSIDE * self.among.speed[:, wall.axis]
        for count in range(STEPS):
            last = self._mixed(wall, p, low, high)
            dual = np.maximum(low.dual, high.dual)
            size = np.abs(last.H) + np.abs(dual) + high.mu * (np.abs(high.out) + np.abs(low.out))
            if (last.H - dual <= TIE * size).all():
                break
            gap = np.where(low.out > high.out, low.out - high.out, 1.0)
            secant, cross = low.mu + (high.mu - low.mu) * low.out / gap, (high.H - low.H) / gap
            mu = (secant, cross, 0.5 * (low.mu + high.mu))[count % 3]
            new = self._trial(wall, p, np.clip(mu, low.mu, high.mu))
            leads = new.out > slack
            low, high = new.where(leads, low), new.where(~leads & (low.out > slack), high)
        return last

    def _mixed(self, wall: Wall, p: np.ndarray, low: Trial, high: Trial) -> Trial:
        """On the way from the one control to the other, where the drift (affine in the control) vanishes."""
        slack = INSIDE * self.among.speed[:, wall.axis]
        gap = np.where(low.out > high.out, low.out - high.out, 1.0)
        share = np.where((high.out < -slack) & (low.out > slack), -high.out / gap, 0.0)
        mixed = self._judged(wall, p, high.mu, high.a + share[:, None] * (low.a - high.a))
        return mixed.where(mixed.out <= slack, high)
