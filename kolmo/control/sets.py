"""Control sets: where a may lie, and how the Hamiltonian is minimised over them, node by node."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch

from kolmo.errors import InputError

Hamiltonian = Callable[[torch.Tensor], torch.Tensor]
"""H(a): controls of shape (n, m), one per node, to values of shape (n,)."""

# Newton iterations of the pointwise minimisation; a quadratic Hamiltonian needs one.
ITERATIONS = 30
# Curvatures below this part of the largest one over the nodes count as none.
CURVED = 1e-10
# Lattice points per coordinate from which a minimisation over a box starts, by number of coordinates.
LATTICE = {1: 5, 2: 3, 3: 3}
MAX_CONTROLS = 6
# Every control of a list is tried at every node and step.
MAX_LISTED = 10_000
# Every node keeps a matrix of second derivatives of so many rows and columns.
MAX_UNBOUNDED = 64
# Times that the lattice is halved about its best point before Newton's method takes over.
HALVINGS = 5


@dataclass(frozen=True)
class Choice:
    """Minimisers, one per node.

    Attributes
    ----------
    a : tensor, shape (n, m)
        The controls.
    found : tensor of bool, shape (n,)
        False where the Hamiltonian has no minimum (indefinite or linear in an unbounded control).
    acts : tensor of bool, shape (n,)
        Whether the Hamiltonian depends on the control at all.
    """

    a: torch.Tensor
    found: torch.Tensor
    acts: torch.Tensor


class BoxSet:
    r"""Controls in a box, :math:`\{a \in R^m : lo \le a \le hi\}`.

    Parameters
    ----------
    lo, hi : float or sequence of float, shape (m,)
        Corners, finite.

    Raises
    ------
    InputError
        If the corners are crossed, not finite, or of different shapes.

    Examples
    --------
    >>> BoxSet([-1.0, 0.0], [1.0, 2.0])
    BoxSet([-1.0, 0.0], [1.0, 2.0])
    """

    # What a set is made of: a list, bounds, directions without bounds.
    listed, has_bounds, unbounded = False, True, False

    def __init__(self, lo: float | Sequence[float], hi: float | Sequence[float]) -> None:
        low, high = np.atleast_1d(np.asarray(lo, dtype=float)), np.atleast_1d(np.asarray(hi, dtype=float))
        if low.shape != high.shape or low.ndim != 1 or not 0 < len(low) <= MAX_CONTROLS:
            raise InputError(
                "lo, hi", f"shapes {low.shape} and {high.shape}", f"two (m,) sequences with m up to {MAX_CONTROLS}"
            )
        if not (np.isfinite(low).all() and np.isfinite(high).all()):
            raise InputError("lo, hi", f"{low.tolist()} and {high.tolist()}", "finite ends", "use Unbounded(m)")
        if (low > high).any():
            raise InputError("lo, hi", f"{low.tolist()} and {high.tolist()}", "lo <= hi: an empty set", "swap them")
        self.lo, self.hi = low, high

    @property
    def m(self) -> int:
        """Number of coordinates of a."""
        return len(self.lo)

    @property
    def samples(self) -> np.ndarray:
        """Typical controls, shape (q, m): the centre and the corners."""
        corners = np.array(list(product(*zip(self.lo, self.hi, strict=True))))
        return np.unique(np.concatenate([0.5 * (self.lo + self.hi)[None], corners]), axis=0)

    def project(self, a: Any) -> Any:
        """The nearest point of the set, for arrays or tensors of shape (..., m)."""
        if isinstance(a, torch.Tensor):
            return a.clamp(torch.as_tensor(self.lo).to(a), torch.as_tensor(self.hi).to(a))
        return np.clip(a, self.lo, self.hi)

    def minimize(self, H: Hamiltonian, start: torch.Tensor) -> Choice:
        """Minimise over the set from a lattice and the start, closing in, then by projected Newton steps."""
        count = LATTICE.get(self.m, 2)
        axes = [np.linspace(a, b, count) if b > a else np.array([a]) for a, b in zip(self.lo, self.hi, strict=True)]
        candidates = [start] + [torch.tensor(point).expand_as(start) for point in product(*axes)]
        best = _best_of(H, candidates)
        low, high = torch.as_tensor(self.lo), torch.as_tensor(self.hi)
        # Newton's method needs a start where the curvature is positive: close in on the minimum first
        spacing = (high - low) / (count - 1)
        for _ in range(HALVINGS):
            spacing = 0.5 * spacing
            moves = [sign * spacing * unit for unit in torch.eye(self.m, dtype=torch.float64) for sign in (-1.0, 1.0)]
            best = _best_of(H, [best, *(torch.minimum(torch.maximum(best + move, low), high) for move in moves)])
        a, _, acts = _newton(H, best, low, high)
        return Choice(a, torch.ones(len(a), dtype=torch.bool), acts)

    def minimize_quadratic(
        self, h: np.ndarray, H: np.ndarray, start: np.ndarray, centre: np.ndarray, scale: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Minimise h·s + ½ s·Hs over a = centre + scale·s in the set; s (n, m), and that there is a minimum."""
        low, high = (self.lo - centre) / scale, (self.hi - centre) / scale
        if self.m == 1:
            return _interval_minimum(h[:, 0], H[:, 0, 0], start[:, 0], low[0], high[0]), np.ones(len(h), dtype=bool)
        # the minimum is the stationary point of one of the faces: every coordinate at its low end, high end, or free
        options = [start]
        for ends in product((0, 1, None), repeat=self.m):
            options.append(_face_minimum(h, H, start, ends, low, high))
        points = np.stack(options, 0)
        values = np.einsum("qni,ni->qn", points, h) + 0.5 * np.einsum("qni,nij,qnj->qn", points, H, points)
        # the first wins a tie, so that a policy does not change without gain
        gain = values < values[0] - 1e-15 * np.abs(values).max(0)
        best = np.where(gain, values, np.inf).argmin(0) * gain.any(0)
        return points[best, np.arange(len(h))], np.ones(len(h), dtype=bool)

    def __repr__(self) -> str:
        return f"BoxSet({self.lo.tolist()}, {self.hi.tolist()})"


class Interval(BoxSet):
    r"""One control in an interval, :math:`\{a \in R : lo \le a \le hi\}`; policies have shape (..., 1).

    Parameters
    ----------
    lo, hi : float
        Ends, finite.

    Raises
    ------
    InputError
        If the ends are crossed or not finite.

    Examples
    --------
    >>> Interval(-1.0, 1.0)
    Interval(-1.0, 1.0)
    """

    def __init__(self, lo: float, hi: float) -> None:
        super().__init__(float(lo), float(hi))

    def __repr__(self) -> str:
        return f"Interval({self.lo[0]}, {self.hi[0]})"


class Finite:
    r"""Controls from a finite list, :math:`\{a_1, \dots, a_q\} \subset R^m`.

    Parameters
    ----------
    values : sequence, shape (q,) or (q, m)
        The controls.

    Raises
    ------
    InputError
        If the list is empty, too long or not finite.

    Examples
    --------
    >>> Finite([-1.0, 0.0, 1.0]).m
    1
    """

    listed, has_bounds, unbounded = True, True, False

    def __init__(self, values: Any) -> None:
        points = np.asarray(values, dtype=float)
        points = points[:, None] if points.ndim == 1 else points
        if points.ndim != 2 or points.size == 0 or not np.isfinite(points).all():
            raise InputError("values", f"an array of shape {points.shape}", "at least one control, finite")
        if len(points) > MAX_LISTED:
            raise InputError("values", f"{len(points)} controls", f"at most {MAX_LISTED}", "Interval or BoxSet")
        self.values = points

    @property
    def m(self) -> int:
        """Number of coordinates of a."""
        return int(self.values.shape[1])

    @property
    def samples(self) -> np.ndarray:
        """All the controls, shape (q, m)."""
        return self.values

    def project(self, a: Any) -> Any:
        """The nearest control of the list, for arrays or tensors of shape (..., m)."""
        values = torch.as_tensor(self.values).to(a) if isinstance(a, torch.Tensor) else self.values
        return values[((a[..., None, :] - values) ** 2).sum(-1).argmin(-1)]

    def minimize(self, H: Hamiltonian, start: torch.Tensor) -> Choice:
        """Take the best of the list."""
        a = _best_of(H, [torch.tensor(value).expand_as(start) for value in self.values])
        return Choice(a, torch.ones(len(a), dtype=torch.bool), torch.ones(len(a), dtype=torch.bool))

    def __repr__(self) -> str:
        return f"Finite({self.values.tolist()})"


class Unbounded:
    """All controls in :math:`R^m`; the Hamiltonian must have a minimum where the control acts (positive definite in a).

    Parameters
    ----------
    m : int
        Number of coordinates; policies have shape (..., m).

    Raises
    ------
    InputError
        For a number of coordinates that is not whole, or not from 1 to 64.

    Examples
    --------
    >>> Unbounded(2)
    Unbounded(2)
    """

    listed, has_bounds, unbounded = False, False, True

    def __init__(self, m: int = 1) -> None:
        if not isinstance(m, (int, np.integer)) or not 1 <= m <= MAX_UNBOUNDED:
            raise InputError("m", m, f"a whole number from 1 to {MAX_UNBOUNDED}")
        self.m = int(m)

    @property
    def samples(self) -> np.ndarray:
        """No control at all, shape (1, m)."""
        return np.zeros((1, self.m))

    def project(self, a: Any) -> Any:
        """Everything lies in the set."""
        return a

    def minimize(self, H: Hamiltonian, start: torch.Tensor) -> Choice:
        """Newton's method from the start, node by node."""
        free = torch.full((self.m,), torch.inf, dtype=torch.float64)
        a, definite, acts = _newton(H, start, -free, free)
        return Choice(a, definite, acts)

    def minimize_quadratic(
        self, h: np.ndarray, H: np.ndarray, start: np.ndarray, centre: np.ndarray, scale: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Minimise h·s + ½ s·Hs; s (n, m), and where H is positive definite."""
        curvature = np.linalg.eigvalsh(H)[:, 0] if self.m > 1 else H[:, 0, 0]
        definite = curvature > CURVED * (np.abs(H).max(initial=0.0) + 1e-300)
        safe = np.where(definite[:, None, None], H, np.eye(self.m))
        if self.m == 1:
            return np.where(definite[:, None], -h / safe[:, :, 0], start), definite
        return np.where(definite[:, None], -np.linalg.solve(safe, h[..., None])[..., 0], start), definite

    def __repr__(self) -> str:
        return f"Unbounded({self.m})"


def _interval_minimum(h: np.ndarray, H: np.ndarray, start: np.ndarray, low: float, high: float) -> np.ndarray:
    """Minimisers (n, 1) of h s + ½ H s² in an interval; the start wins ties."""
    options = [start, np.full_like(h, low), np.full_like(h, high)]
    if H.any():
        inner = -h / np.where(H > 0, H, 1.0)
        options.append(np.where((H > 0) & (inner >= low) & (inner <= high), inner, start))
    values = [h * s + 0.5 * H * s * s for s in options]
    best, least = start, values[0] - 1e-15 * np.max(np.abs(values), axis=0)
    for s, value in zip(options[1:], values[1:], strict=True):
        better = value < least
        best, least = np.where(better, s, best), np.where(better, value, least)
    return best[:, None]


def _face_minimum(
    h: np.ndarray, H: np.ndarray, start: np.ndarray, ends: tuple[int | None, ...], low: np.ndarray, high: np.ndarray
) -> np.ndarray:
    """Stationary points of h·s + ½ s·Hs on a face of a box; the start where there is none inside."""
    free = [k for k, end in enumerate(ends) if end is None]
    s = np.tile([0.0 if end is None else (low, high)[end][k] for k, end in enumerate(ends)], (len(h), 1))
    if not free:
        return s
    right = -(h + np.einsum("nij,nj->ni", H, s))[:, free]
    reduced = H[:, free][:, :, free]
    lowest = np.linalg.eigvalsh(reduced)[:, 0] if len(free) > 1 else reduced[:, 0, 0]
    safe = np.where((lowest > 0)[:, None, None], reduced, np.eye(len(free)))
    s[:, free] = np.linalg.solve(safe, right[..., None])[..., 0] if len(free) > 1 else right / safe[:, :, 0]
    good = (lowest > 0) & (s >= low).all(-1) & (s <= high).all(-1)
    return np.where(good[:, None], s, start)


def _best_of(H: Hamiltonian, candidates: list[torch.Tensor]) -> torch.Tensor:
    """Per node the candidate with the least H; the first wins a tie."""
    with torch.no_grad():
        best, a = H(candidates[0]), candidates[0].clone()
        for candidate in candidates[1:]:
            value = H(candidate)
            better = value < best
            best = torch.where(better, value, best)
            a = torch.where(better[:, None], candidate, a)
    return a


def _newton(
    H: Hamiltonian, start: torch.Tensor, low: torch.Tensor, high: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Projected Newton iterations; controls, where the curvature is positive, and where the control acts."""
    a = start.clone()
    n, m = a.shape
    eye = torch.eye(m, dtype=torch.float64)
    definite = acts = torch.ones(n, dtype=torch.bool)
    size = torch.zeros(m, dtype=torch.float64)  # largest control met so far, per coordinate
    for _ in range(ITERATIONS):
        value, g, B = derivatives(H, a)
        held = ((a <= low) & (g > 0)) | ((a >= high) & (g < 0))
        if bool(held.all()):
            break
        loose = (~held).double()
        g = g * loose
        B = B * loose[:, :, None] * loose[:, None, :]
        curvature = torch.linalg.eigvalsh(B + torch.diag_embed(held.double()) * _size(B))[:, 0]
        definite = curvature > CURVED * _size(B)
        acts = (_size(B, nodes=False) > CURVED * _size(B)) | (g.abs().amax(1) > CURVED * float(g.abs().max()))
        safe = torch.where(definite[:, None, None], B + torch.diag_embed(held.double()), eye)
        step = -torch.linalg.solve(safe, g[..., None])[..., 0] * definite[:, None]
        step = torch.minimum(torch.maximum(a + step, low), high) - a
        size = torch.maximum(size, torch.maximum(a.abs(), (a + step).abs()).amax(0))
        if bool((step.abs() <= 1e-10 * size).all()):
            break
        a = _descend(H, a, step, value)
    return a, definite, acts


def _size(B: torch.Tensor, *, nodes: bool = True) -> Any:
    """Largest entry of the matrices, over all nodes or per node."""
    return float(B.abs().max()) + 1e-300 if nodes else B.abs().amax((1, 2))


def _descend(H: Hamiltonian, a: torch.Tensor, step: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Take the step where it does not increase H, a shorter one elsewhere."""
    with torch.no_grad():
        result, open_nodes = a, torch.ones(len(a), dtype=torch.bool)
        slack = 1e-12 * value.abs().max()
        for _ in range(6):
            trial = a + step
            good = open_nodes & (H(trial) <= value + slack)
            result = torch.where(good[:, None], trial, result)
            open_nodes = open_nodes & ~good
            if not bool(open_nodes.any()):
                break
            step = 0.25 * step
    return result


def derivatives(H: Hamiltonian, a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """H, its gradient (n, m) and its Hessian (n, m, m) in a, node by node."""
    n, m = a.shape
    with torch.enable_grad():
        a = a.detach().requires_grad_(True)
        value = H(a)
        if not value.requires_grad:
            return value, torch.zeros(n, m, dtype=torch.float64), torch.zeros(n, m, m, dtype=torch.float64)
        g = torch.autograd.grad(value.sum(), a, create_graph=True)[0]
        B = torch.zeros(n, m, m, dtype=torch.float64)
        for k in range(m):
            if g.requires_grad:
                row = torch.autograd.grad(g[:, k].sum(), a, retain_graph=True, allow_unused=True)[0]
                if row is not None:
                    B[:, k] = row
    return value.detach(), g.detach(), B
