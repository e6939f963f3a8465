"""Two players with opposite aims: one minimises what the other maximises, and the Hamiltonian has a saddle point."""

from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import torch

from kolmo.control.sets import CURVED, BoxSet, Choice, Finite, Hamiltonian, Unbounded, derivatives
from kolmo.errors import InputError

Player = BoxSet | Finite | Unbounded

# Lattice points per coordinate of a player from which a saddle point is looked for.
LATTICE = 5
# Newton steps towards a saddle point of a Hamiltonian that is not quadratic.
ITERATIONS = 30
# Slopes and distances below this part of their size are rounding.
ROUNDING = 1e-9


class Game:
    r"""Controls of a two-player zero-sum game: the first player minimises the expected cost, the second maximises it.

    .. math:: \partial_t V + \min_a \max_b [b(a, b)\cdot\nabla V + \tfrac12\Sigma(a, b):\nabla^2 V - cV + \ell] = 0

    The functions of the ``ControlProblem`` get the controls of both, the minimiser's coordinates first: ``f(t, x, a)``
    with a of shape ``(..., m1 + m2)``. The value exists where min max and max min of the Hamiltonian agree (Isaacs'
    condition), as they do where it is convex in the first and concave in the second control or a sum of two parts;
    where they do not, V is the value of the player who answers: the second one ("upper value").

    Parameters
    ----------
    minimizer, maximizer : Interval, BoxSet, Finite or Unbounded
        The sets of the two players.

    Raises
    ------
    InputError
        If a player is none of these sets.

    Notes
    -----
    Isaacs 1965; existence and uniqueness of the value: Fleming and Souganidis 1989. With an unbounded, penalised second
    player V is the worst case over unknown drifts (robust control; Hansen and Sargent 2001).

    Examples
    --------
    A pursuer twice as fast as the evader: together they are Beneš's problem with half the speed.

    >>> import kolmo
    >>> from kolmo import control
    >>> cp = control.ControlProblem(lambda t, x, a: a[..., :1] + 0.5 * a[..., 1:], 1.0, horizon=1.0,
    ...     controls=control.Game(control.Interval(-1.0, 1.0), control.Interval(-1.0, 1.0)),
    ...     terminal=lambda x: x[..., 0] ** 2, box=kolmo.Box(-8.0, 8.0))
    >>> opt = control.solve_hjb(cp, at=[0.5], rtol=1e-3)
    >>> opt.policy(0.0, [0.5]).round(3).tolist()
    [-1.0, 1.0]
    """

    def __init__(self, minimizer: Player, maximizer: Player) -> None:
        for name, player in (("minimizer", minimizer), ("maximizer", maximizer)):
            if not isinstance(player, (BoxSet, Finite, Unbounded)):
                raise InputError(name, repr(player), "control.Interval, BoxSet, Finite or Unbounded")
        self.minimizer, self.maximizer = minimizer, maximizer
        self.m = minimizer.m + maximizer.m
        self.listed = minimizer.listed or maximizer.listed
        self.has_bounds = minimizer.has_bounds or maximizer.has_bounds
        self.unbounded = minimizer.unbounded or maximizer.unbounded

    @property
    def samples(self) -> np.ndarray:
        """Typical controls of both, shape (q, m): every pair."""
        pairs = product(self.minimizer.samples, self.maximizer.samples)
        return np.array([np.concatenate(pair) for pair in pairs])

    def project(self, a: Any) -> Any:
        """The nearest point of both sets, for arrays or tensors of shape (..., m)."""
        first, second = self.split(a)
        return self.join(self.minimizer.project(first), self.maximizer.project(second))

    def split(self, a: Any) -> tuple[Any, Any]:
        """Controls of the minimiser and of the maximiser."""
        return a[..., : self.minimizer.m], a[..., self.minimizer.m :]

    @staticmethod
    def join(first: Any, second: Any) -> Any:
        """Controls of both."""
        if isinstance(first, torch.Tensor):
            return torch.cat([first, second], -1)
        return np.concatenate([first, second], -1)

    def answered(self, value: Callable[[Any], np.ndarray], firsts: list[Any], seconds: list[Any]) -> Any:
        """Per node the pair with min max ``value``; the first pair stays where no other one is better."""
        best, result = None, self.join(firsts[0], seconds[0])
        scale = None
        for first in firsts:
            worst = chosen = None
            for second in seconds:
                pair = self.join(first, second)
                now = value(pair)
                scale = np.abs(now).max() if scale is None else scale
                if worst is None or chosen is None:
                    worst, chosen = now, pair
                    continue
                more = now > worst + 1e-13 * scale
                worst, chosen = np.where(more, now, worst), _where(more, pair, chosen)
            assert worst is not None
            assert scale is not None
            if best is None:
                best, result = worst, chosen
                continue
            less = worst < best - 1e-13 * scale
            best, result = np.where(less, worst, best), _where(less, chosen, result)
        return result

    def minimize(self, H: Hamiltonian, start: torch.Tensor) -> Choice:
        """Saddle points of any Hamiltonian: best answers on a lattice, then Newton's method where sets are no lists."""

        def value(a: torch.Tensor) -> np.ndarray:
            with torch.no_grad():
                return np.asarray(H(a).numpy())

        options = []
        for player, now in zip((self.minimizer, self.maximizer), self.split(start), strict=True):
            options.append([now, *(torch.tensor(point).expand_as(now) for point in _lattice(player))])
        a = self.answered(value, *options)
        everywhere = torch.ones(len(a), dtype=torch.bool)
        if self.listed:
            return Choice(a, everywhere, everywhere)
        found = everywhere
        for _ in range(ITERATIONS):
            _, g, B = derivatives(H, a)
            step, found_now = self._saddle(g.numpy(), B.numpy(), np.zeros(a.shape), a.numpy(), np.ones(self.m))
            a, found = a + torch.as_tensor(step), torch.as_tensor(found_now)
            if float(np.abs(step).max()) <= ROUNDING * float(a.abs().max()):
                break
        return Choice(a, found, everywhere)

    def minimize_quadratic(
        self, h: np.ndarray, H: np.ndarray, start: np.ndarray, centre: np.ndarray, scale: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Saddle points of h·s + ½ s·Hs over a = centre + scale·s in the sets; s (n, m), and where there is one."""
        k = self.minimizer.m
        if not H[:, :k, k:].any():
            first: Any = self.minimizer
            second: Any = self.maximizer
            one, good = first.minimize_quadratic(h[:, :k], H[:, :k, :k], start[:, :k], centre[:k], scale[:k])
            two, fine = second.minimize_quadratic(-h[:, k:], -H[:, k:, k:], start[:, k:], centre[k:], scale[k:])
            return self.join(one, two), good & fine
        return self._saddle(h, H, start, np.broadcast_to(centre, h.shape), scale)

    def _saddle(
        self, h: np.ndarray, H: np.ndarray, start: np.ndarray, centre: np.ndarray, scale: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Points where no player gains: every coordinate is at an end or free, and slopes have the right sign."""
        k, n = self.minimizer.m, len(h)
        sign = np.where(np.arange(self.m) < k, 1.0, -1.0)
        low, high = (self._ends(side) for side in (0, 1))
        low, high = (low - centre) / scale, (high - centre) / scale
        s, found = start.copy(), np.zeros(n, dtype=bool)
        size = np.abs(h).max(initial=0.0) + np.abs(H).max(initial=0.0)
        bounded = np.isfinite(low).all(0)
        for ends in product(*[(None, 0, 1) if bound else (None,) for bound in bounded]):
            point, good = _stationary(h, H, ends, low, high, sign)
            slope = sign * (h + np.einsum("nij,nj->ni", H, point))
            room = ROUNDING * (1.0 + np.abs(point))
            good &= ((point >= low - room) & (point <= high + room)).all(-1)
            for i, end in enumerate(ends):
                if end is not None:
                    good &= (slope[:, i] >= -ROUNDING * size) if end == 0 else (slope[:, i] <= ROUNDING * size)
            new = good & ~found
            s[new], found = np.clip(point, low, high)[new], found | good
        return s, found

    def _ends(self, side: int) -> np.ndarray:
        """Low (0) or high (1) ends of all coordinates."""
        parts = []
        for player in (self.minimizer, self.maximizer):
            if isinstance(player, BoxSet):
                parts.append((player.lo, player.hi)[side])
            else:
                parts.append(np.full(player.m, (-np.inf, np.inf)[side]))
        return np.concatenate(parts)

    def __repr__(self) -> str:
        return f"Game({self.minimizer!r}, {self.maximizer!r})"


def _where(mask: np.ndarray, one: Any, other: Any) -> Any:
    if isinstance(one, torch.Tensor):
        return torch.where(torch.as_tensor(mask.reshape(len(one), 1)), one, other)
    return np.where(mask.reshape(len(one), 1), one, other)


def _lattice(player: Player) -> np.ndarray:
    """Points of a player's set: all of a list, a lattice of a box, the origin of an unbounded one."""
    if not isinstance(player, BoxSet):
        return player.samples
    axes = [np.linspace(a, b, LATTICE) for a, b in zip(player.lo, player.hi, strict=True)]
    return np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, player.m)


def _stationary(
    h: np.ndarray, H: np.ndarray, ends: tuple[int | None, ...], low: np.ndarray, high: np.ndarray, sign: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Stationary points with some coordinates at their ends; whether the free ones are at their best there."""
    n, m = h.shape
    free = [i for i, end in enumerate(ends) if end is None]
    s = np.zeros((n, m))
    for i, end in enumerate(ends):
        if end is not None:
            s[:, i] = (low, high)[end][:, i]
    if not free:
        return s, np.ones(n, dtype=bool)
    right = -(h + np.einsum("nij,nj->ni", H, s))[:, free]
    reduced = H[:, free][:, :, free]
    good = np.ones(n, dtype=bool)
    for kind in (1.0, -1.0):
        mine = [j for j, i in enumerate(free) if sign[i] == kind]
        if mine:
            own = kind * reduced[:, mine][:, :, mine]
            good &= np.linalg.eigvalsh(own)[:, 0] >= -CURVED * (np.abs(reduced).max(initial=0.0) + 1e-300)
    determinant = np.abs(np.linalg.det(reduced))
    good &= determinant > CURVED * (np.abs(reduced).max((1, 2)) ** len(free) + 1e-300)
    safe = np.where(good[:, None, None], reduced, np.eye(len(free)))
    s[:, free] = np.where(good[:, None], np.linalg.solve(safe, right[..., None])[..., 0], 0.0)
    return s, good
