"""The static Schrödinger problem on lattices: Sinkhorn's iteration and Newton's, in logarithms."""

from typing import NamedTuple

import numpy as np

from kolmo.kernels.logsums import averaged, pulled
from kolmo.limits import Limits

Axes = tuple[np.ndarray, ...]

# A step of Sinkhorn's that leaves more than this part of the misfit is followed by one of Newton's.
SLOW = 0.2
# Misfit that Sinkhorn's steps go on to, as long as they are fast.
STRICT = 1e-9
# Steps of either kind at most, conjugate gradients in one of Newton's, and halvings of it.
STEPS, GRADIENTS, HALVINGS = 500, 200, 12
# Differences of potentials, in logarithms, are cut off there: farther away Sinkhorn's step is taken anyway.
FARTHEST = 30.0


class Potentials(NamedTuple):
    r"""Potentials of the coupling :math:`a_ib_je^{F_i + G_j - |u_i - v_j|^2/2}`.

    F goes with the first marginal, which is met to rounding; the second one is missed by ``misfit`` in total variation.
    """

    F: np.ndarray
    G: np.ndarray
    misfit: float
    iterations: int


def potentials(
    u: Axes, v: Axes, a: np.ndarray, b: np.ndarray, limits: Limits, guess: np.ndarray, misfit: float
) -> Potentials:
    r"""Potentials whose coupling has the marginals a and b.

    Where Sinkhorn's steps are slow, Newton's are taken, for :math:`G = -\log\sum a e^{F(G) - |u - v|^2/2}`;
    they have to raise the concave dual :math:`\sum b G + \sum a F(G)` by more than Sinkhorn's, and their equations are
    solved by conjugate gradients in :math:`L^2(b)`.

    Parameters
    ----------
    u, v : tuple of ndarray
        Nodes per axis.
    a, b : ndarray
        Masses at the nodes, each of sum 1.
    limits : Limits
        When the time is over, the best so far is taken.
    guess : ndarray
        G to begin with.
    misfit : float
        Total variation at which it ends.

    Notes
    -----
    Sinkhorn 1964; Brauer, Clason, Lorenz and Wirth 2017 (Newton's method for it).

    Examples
    --------
    >>> axis = (np.linspace(-4.0, 4.0, 33),)
    >>> mass = np.exp(-0.5 * axis[0] ** 2) / np.exp(-0.5 * axis[0] ** 2).sum()
    >>> potentials(axis, axis, mass, mass, Limits.given(None, None), np.zeros(33), 1e-9).misfit < 1e-8
    True
    """
    with np.errstate(divide="ignore"):
        return _Marginals(u, v, np.log(a), np.log(b), limits).solved(guess, misfit)


class _Marginals(NamedTuple):
    """The problem, with logarithms of the masses."""

    u: Axes
    v: Axes
    la: np.ndarray
    lb: np.ndarray
    limits: Limits

    def solved(self, G: np.ndarray, tolerance: float) -> Potentials:
        """Alternate Sinkhorn's steps with Newton's where those are slow."""
        b = np.exp(self.lb)
        before, best, count = np.inf, None, 0
        while True:
            F = -pulled(self.u, self.v, self.lb + G)
            after = -pulled(self.v, self.u, self.la + F)
            excess = np.where(b > 0, np.expm1(np.clip(G - after, -FARTHEST, FARTHEST)), 0.0)
            misfit = 0.5 * float((b * np.abs(excess)).sum())
            count += 1
            if best is None or misfit < best.misfit:
                best = Potentials(F, G, misfit, count)
            slow = misfit > SLOW * before
            enough = tolerance if slow else min(tolerance, STRICT)
            if best.misfit <= enough or count >= STEPS or self.limits.late():
                return best._replace(iterations=count)
            G = self._newton(F, G, after, excess) if slow else after
            before = misfit

    def _newton(self, F: np.ndarray, G: np.ndarray, after: np.ndarray, excess: np.ndarray) -> np.ndarray:
        """A step of Newton's that does not lose what Sinkhorn's gains."""
        b = np.exp(self.lb)
        step = self._gradients(F, G, np.where(b > 0, after - G, 0.0), b * (1.0 + excess))
        best, top = after, self._dual(after, b)
        for k in range(HALVINGS):
            tried = G + 0.5**k * step
            reached = self._dual(tried, b)
            if reached >= top:
                best, top = tried, reached
            elif best is not after:
                break
        return best if best is after else -pulled(self.v, self.u, self.la - pulled(self.u, self.v, self.lb + best))

    def _dual(self, G: np.ndarray, b: np.ndarray) -> float:
        a, F = np.exp(self.la), -pulled(self.u, self.v, self.lb + G)
        return float((b * np.where(b > 0, G, 0.0)).sum() + (a * np.where(a > 0, F, 0.0)).sum())

    def _gradients(self, F: np.ndarray, G: np.ndarray, r: np.ndarray, q: np.ndarray) -> np.ndarray:
        """Solve δ − E[E[δ|X]|Y] = r by conjugate gradients in L²(q)."""
        forth, back = self.lb + G, self.la + F
        r = r - (q * r).sum() / q.sum()
        x, p, square = np.zeros(r.shape), r, float((q * r * r).sum())
        wanted = min(0.1, square**0.25) ** 2 * square
        for _ in range(GRADIENTS):
            image = p - averaged(self.v, self.u, back, averaged(self.u, self.v, forth, p))
            curvature = float((q * p * image).sum())
            if not curvature > 1e-14 * float((q * p * p).sum()):
                break
            alpha = square / curvature
            x, r = x + alpha * p, r - alpha * image
            before, square = square, float((q * r * r).sum())
            if square <= wanted or self.limits.late():
                break
            p = r + square / before * p
        return x
