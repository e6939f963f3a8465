"""A monotone scheme for every full diffusion tensor: the generator of a Markov chain on the nodes."""

from dataclasses import dataclass, field
from itertools import product
from typing import Any, Literal, NamedTuple

import numpy as np
import scipy.sparse as sp

from kolmo.arrays import Array, added_at, as_like, as_numpy, namespace
from kolmo.grid import Grid
from kolmo.problem.box import Box
from kolmo.problem.faces import Absorbing, Entrance, Natural, Open, Reflecting, Robin
from kolmo.schemes import selling
from kolmo.schemes.base import SCHEMES, Assembly, FaceData
from kolmo.schemes.faces import held
from kolmo.schemes.fitting import fitted_rates
from kolmo.schemes.local import Local, Metric, wall_nodes, wall_of


class JumpStencil:
    """Q(a) u at row n = Σ a_e (u[col e] − u[n]) over the entries e of row n, minus a killing rate.

    The array a has shape (entries + size,): jump rates, then −c per node.

    Parameters
    ----------
    size : int
        Number of nodes.
    rows, cols : ndarray of int, shape (entries,)
        Where each jump starts and ends; rows in increasing order.
    """

    def __init__(self, size: int, rows: np.ndarray, cols: np.ndarray) -> None:
        self.size, self.rows, self.cols = size, rows, cols
        self._pointer = np.searchsorted(rows, np.arange(size + 1))

    def _jumps(self, a: np.ndarray) -> tuple[sp.csr_matrix, np.ndarray]:
        rates = sp.csr_matrix((a[: len(self.rows)], self.cols, self._pointer), shape=(self.size, self.size))
        leaving = np.bincount(self.rows, weights=a[: len(self.rows)], minlength=self.size)
        return rates, a[len(self.rows) :] - leaving

    def apply(self, a: Array, u: Array) -> Array:
        """Q(a) u."""
        entries = len(self.rows)
        if namespace(u) is np:
            rates, diagonal = self._jumps(a)
            return rates @ u + diagonal[:, None] * u
        return added_at(a[entries:, None] * u, self.rows, a[:entries, None] * (u[self.cols] - u[self.rows]))

    def apply_transposed(self, a: Array, p: Array) -> Array:
        """Q(a)ᵀ p."""
        entries = len(self.rows)
        if namespace(p) is np:
            rates, diagonal = self._jumps(a)
            return rates.T @ p + diagonal[:, None] * p
        flow = a[:entries, None] * p[self.rows]
        return added_at(added_at(a[entries:, None] * p, self.cols, flow), self.rows, -flow)

    def pullback(self, p: Array, u: Array) -> Array:
        """Derivative of ⟨p, Q(a) u⟩ with respect to a."""
        jumps = (p[self.rows] * (u[self.cols] - u[self.rows])).sum(-1)
        return namespace(p).concatenate([jumps, (p * u).sum(-1)])

    def matrix(self, a: np.ndarray) -> sp.csr_matrix:
        """Q(a) as a sparse matrix."""
        rates, diagonal = self._jumps(a)
        total = sp.csr_matrix(rates + sp.diags(diagonal))
        total.sum_duplicates()
        return total


@dataclass(frozen=True)
class Jumps:
    """Jumps laid out for one grid and one covariance: where they start, which numbers drive them, where they end.

    Attributes
    ----------
    node : ndarray of int, shape (J,)
        Starting node of each jump.
    slot : ndarray of int, shape (J,)
        Column of the rate table: 2i for up, 2i + 1 for down along axis i; 2d + k for Selling's vector k.
    factor : ndarray, shape (J,)
        Constant factor of the rate (arms shortened by an absorbing face).
    aligned : ndarray of bool, shape (N, K, d)
        Which Selling vectors lie along which axis: their weight is the axis diffusion that the drift is fitted to.
    blocked : ndarray, shape (N, 2d)
        0 where an axis jump leaves through an open or natural face.
    flat : ndarray, shape (N, d)
        0 where the normal diffusion is dropped (open and natural faces).
    """

    superbase: np.ndarray
    node: np.ndarray
    slot: np.ndarray
    factor: np.ndarray
    aligned: np.ndarray
    blocked: np.ndarray
    flat: np.ndarray
    entry_jump: np.ndarray
    entry_corner: np.ndarray
    tilt: "Tilt"
    free: np.ndarray


@dataclass(frozen=True)
class Tilt:
    """Jumps reflected at a wall: they land off the nodes, displaced along it by 2δ S_ij / S_ii.

    Attributes
    ----------
    jump : ndarray of int, shape (R,)
        Which jumps.
    wall : ndarray of int, shape (R,)
        Wall node where S is read.
    axis : ndarray of int, shape (R,)
        Normal axis.
    distance : ndarray, shape (R,)
        2δ, signed like the outward normal.
    base : ndarray, shape (R, d)
        Tangential landing position without the tilt, minus the frozen lower corner.
    robin : list
        (axis, side) → positions in this table and look-up into the face data.
    """

    jump: np.ndarray
    wall: np.ndarray
    axis: np.ndarray
    distance: np.ndarray
    base: np.ndarray
    moving: np.ndarray
    robin: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)


class MonotoneStencil(JumpStencil):
    """A jump stencil with the layout its assembly needs."""

    layout: Jumps
    order_of_entries: np.ndarray


@dataclass(frozen=True)
class Monotone:
    """Selling's decomposition for the diffusion, exponentially fitted drift: off-diagonal entries never negative.

    The covariance is written as Σ λ_k e_k e_kᵀ with integer vectors; each vector gives a symmetric pair of jumps, and
    the drift tilts the pair along its axis (Scharfetter & Gummel 1969), which becomes upwinding without noise. Second
    order where noise dominates along each axis, first order where drift does. Smooth in the drift, piecewise smooth
    in the covariance (the vectors change). Reflecting walls send jumps back along the conormal; open and natural
    faces drop the pair that leaves (exact on linear functions); absorbing faces shorten the arm.

    Source: Fehrenbach & Mirebeau 2014 (J. Math. Imaging Vis. 49), section 2.
    """

    name: str = "monotone"
    order: int = 1
    monotone: bool = True
    smooth: bool = True
    follows: Literal["values"] = "values"

    @property
    def minimum_nodes(self) -> int:
        """Fewest nodes an axis may have."""
        return 4

    @property
    def slope_weight(self) -> float:
        """Weight of the slope in the second difference at a break: that of three nodes."""
        return 2.0

    def stencil(self, grid: Grid, box: Box, covariance: Array) -> MonotoneStencil:
        """Lay out the jumps for a covariance."""
        layout, cols = _lay_out(grid, box, as_numpy(covariance))
        rows = layout.node[layout.entry_jump]
        order = np.argsort(rows, kind="stable")
        stencil = MonotoneStencil(grid.size, rows[order], cols[order])
        stencil.layout, stencil.order_of_entries = layout, order
        return stencil

    def assemble(self, stencil: MonotoneStencil, local: Local, faces: FaceData, metric: Metric) -> Assembly:
        """Jump rates from local coefficients."""
        layout, A, S = stencil.layout, local.A, local.S
        xp, d = namespace(A, S, local.c), A.shape[1]
        lam = selling.weights(S, layout.superbase)
        alpha = (lam[:, :, None] * as_like(layout.aligned.astype(float), S)).sum(1) * as_like(layout.flat, S)
        table = []
        for i in range(d):
            up, down = fitted_rates(alpha[:, i], A[:, i])
            table += [up, down]
        blocked = as_like(layout.blocked, A)
        table = [rate * blocked[:, m] for m, rate in enumerate(table)]
        table += [0.5 * lam[:, k] for k in range(lam.shape[1])]
        rates = xp.stack(table, -1)[layout.node, layout.slot] * as_like(layout.factor, A)
        tilt, load = layout.tilt, local.g
        killing = local.c
        convex = as_like(np.ones(len(layout.entry_jump)), A)
        if len(tilt.jump):
            normal = S[tilt.wall, tilt.axis, tilt.axis]
            safe = xp.where(normal > 0, normal, as_like(1.0, A))
            shift = S[tilt.wall, tilt.axis, :] / safe[:, None] * as_like(tilt.distance, A)[:, None]
            fraction = as_like(tilt.base, A) - shift * as_like(tilt.moving, A)
            fraction = xp.clip(fraction, 0.0, 1.0)
            convex = self._convex(layout, fraction, xp, A)
            for (i, side), (member, lookup) in tilt.robin.items():
                kappa, value = faces.robin[i, side]
                jump, wall = tilt.jump[member], tilt.wall[member]
                strength = (
                    2.0
                    * as_like(np.abs(tilt.distance[member]) * metric.density[wall, i], A)
                    / safe[member]
                    * rates[jump]
                )
                spread = as_like(np.zeros(A.shape[0]), A)
                node = layout.node[jump]
                killing = killing + added_at(spread, node, strength * kappa[lookup])
                paid = as_like(np.zeros(tuple(load.shape)), A)
                load = load + added_at(paid, node, strength[:, None] * value[lookup])
        free = as_like(layout.free, A)
        entries = (rates[layout.entry_jump] * convex * free[layout.node[layout.entry_jump]])[stencil.order_of_entries]
        return Assembly(xp.concatenate([entries, -killing * free]), load * free[:, None])

    @staticmethod
    def _convex(layout: Jumps, fraction: Array, xp: Any, like: Array) -> Array:
        """Weights of the corners that a reflected jump lands between; 1 for jumps that land on a node."""
        position = np.full(len(layout.node), -1)
        position[layout.tilt.jump] = np.arange(len(layout.tilt.jump))
        row = position[layout.entry_jump]
        padded = xp.concatenate([fraction, as_like(np.zeros((1, fraction.shape[1])), like)])
        at = padded[np.where(row < 0, len(fraction), row)]
        upper = as_like((layout.entry_corner == 1).astype(float), like)
        lower = as_like((layout.entry_corner == 0).astype(float), like)
        still = as_like((layout.entry_corner < 0).astype(float), like)
        factors = upper * at + lower * (1.0 - at) + still
        result = factors[:, 0]
        for j in range(1, factors.shape[1]):
            result = result * factors[:, j]
        return result

    def stiffness(self, grid: Grid, box: Box, local: Local, faces: FaceData, metric: Metric) -> tuple[float, float]:
        """Gershgorin: twice the largest rate of leaving a node."""
        S, A = as_numpy(local.S), as_numpy(local.A)
        leaving = np.einsum("nii->n", S) + np.abs(A).sum(1)
        killing = float(np.abs(as_numpy(local.c)).max(initial=0.0))
        for (i, side), (kappa, _) in faces.robin.items():
            # a jump beyond an elastic wall is killed at the rate 4 κ / (S h) times its own
            wall = wall_nodes(grid, i, side)
            normal = np.where(S[wall, i, i] > 0, S[wall, i, i], np.inf)
            killing += float((4.0 * np.abs(as_numpy(kappa)) * metric.density[wall, i] / normal * leaving[wall]).max())
        return float(2.0 * leaving.max() + killing), 0.0


def _lay_out(grid: Grid, box: Box, S: np.ndarray) -> tuple[Jumps, np.ndarray]:
    """Where every jump of every node lands; see ``Jumps``."""
    d, N = grid.dim, grid.size
    superbase = selling.obtuse_superbase(S)
    E = selling.offsets(superbase)
    unit = np.abs(E).sum(2) == 1
    aligned = unit[:, :, None] & (np.abs(E) == 1)
    free = np.ones(N)
    blocked, flat = np.ones((N, 2 * d)), np.ones((N, d))
    for i, side, face in box.each():
        free[held(grid, i, side, face)] = 0.0
        if face.cut or face.degenerate:
            wall = wall_nodes(grid, i, side)
            blocked[wall, 2 * i + (1 - side)] = flat[wall, i] = 0.0
    nodes, slots, steps = [], [], []
    everyone = np.arange(N)
    for i in range(d):
        for column, sign in ((2 * i, 1), (2 * i + 1, -1)):
            along = np.zeros((N, d), dtype=int)
            along[:, i] = sign
            nodes.append(everyone)
            slots.append(np.full(N, column))
            steps.append(along)
    for k in range(E.shape[1]):
        slanted = np.flatnonzero(~unit[:, k])
        for sign in (1, -1):
            nodes.append(slanted)
            slots.append(np.full(len(slanted), 2 * d + k))
            steps.append(sign * E[slanted, k])
    node, slot, step = np.concatenate(nodes), np.concatenate(slots), np.concatenate(steps)
    keep = free[node] > 0
    node, slot, step = node[keep], slot[keep], step[keep]
    walker = _Walker(grid, box, S)
    flights, back = walker.flights(node, step), walker.flights(node, -step)
    oblique = slot >= 2 * d
    factor = np.where(oblique, 2.0 / ((flights.arm + back.arm) * flights.arm), 1.0)
    alive = ~(walker.dropped(flights) | (oblique & walker.dropped(back)))
    entry_jump, entry_corner, cols, tilt = walker.land(flights.of(alive))
    jumps = node[alive], slot[alive], factor[alive]
    layout = Jumps(superbase, *jumps, aligned, blocked, flat, entry_jump, entry_corner, tilt, free)
    return layout, cols


class _Flights(NamedTuple):
    """Jumps on their way: nodes, steps, part of the step until a face is met, and which face (axis −1: none)."""

    node: np.ndarray
    step: np.ndarray
    arm: np.ndarray
    axis: np.ndarray
    side: np.ndarray

    def of(self, which: np.ndarray) -> "_Flights":
        return _Flights(*(part[which] for part in self))


class _Walker:
    """Follows jumps to where they land: inside, on an absorbing face, or reflected at a wall."""

    def __init__(self, grid: Grid, box: Box, sample: np.ndarray) -> None:
        self.grid, self.box, self.sample = grid, box, sample
        self.shape = np.array(grid.shape)
        self.home = np.stack(np.unravel_index(np.arange(grid.size), grid.shape), -1)
        self.periodic = np.array([a.periodic for a in grid.axes])

    def flights(self, node: np.ndarray, step: np.ndarray) -> _Flights:
        """Which face jumps meet; all of a step (1) is taken where there is none, or a wall that reflects."""
        start, J = self.home[node], len(node)
        arm, axis, side = np.full(J, np.inf), np.full(J, -1), np.zeros(J, dtype=int)
        for i in np.flatnonzero(~self.periodic):
            end = start[:, i] + step[:, i]
            for s, outside in ((0, end < 0), (1, end > self.shape[i] - 1)):
                gap = (start[:, i] if s == 0 else self.shape[i] - 1 - start[:, i]).astype(float)
                fraction = np.where(outside, gap / np.maximum(np.abs(step[:, i]), 1), np.inf)
                nearer = outside & (fraction < arm)
                arm = np.where(nearer, fraction, arm)
                axis, side = np.where(nearer, i, axis), np.where(nearer, s, side)
        found = _Flights(node, step, arm, axis, side)
        return found._replace(arm=np.where(self._meet(found, Absorbing), np.clip(arm, 1e-3, 1.0), 1.0))

    def dropped(self, flights: _Flights) -> np.ndarray:
        """Whether a jump leaves through an open or natural face."""
        return self._meet(flights, Open, Natural)

    def _meet(self, flights: _Flights, *kinds: type) -> np.ndarray:
        """Whether jumps meet a face of some kinds."""
        result = np.zeros(len(flights.axis), dtype=bool)
        for i, s, face in self.box.each():
            if isinstance(face, kinds):
                result |= (flights.axis == i) & (flights.side == s)
        return result

    def land(self, flights: _Flights) -> tuple[np.ndarray, np.ndarray, np.ndarray, Tilt]:
        """Entries (jump, corner, column) of all jumps, and the table of those that meet a wall or end on a face."""
        d = self.grid.dim
        reflected = self._meet(flights, Reflecting, Robin, Entrance)
        meets = reflected | self._meet(flights, Absorbing)
        jumps, corners, cols = [], [], []

        def corner(jump: np.ndarray, position: np.ndarray, moving: np.ndarray) -> None:
            """Entries at the 2^m corners around a position, given its lower corner and which axes lie between."""
            for bits in product((0, 1), repeat=d):
                use = np.ones(len(jump), dtype=bool)
                for j, bit in enumerate(bits):
                    use &= moving[:, j] | (bit == 0)
                if use.any():
                    jumps.append(jump[use])
                    corners.append(np.where(moving[use], np.array(bits), -1))
                    cols.append(self._index(position[use] + np.array(bits) * moving[use]))

        inside, jump = np.flatnonzero(~meets), np.flatnonzero(meets)
        plain, met = flights.of(inside), flights.of(jump)
        corner(inside, self.home[plain.node] + plain.step, np.zeros((len(inside), d), dtype=bool))
        wall, distance, robin = self._walls(met)
        lower, moving, base = self._between(met, self._ends(met, reflected[jump]), wall, distance)
        corner(jump, lower, moving)
        tilt = Tilt(jump, wall, met.axis, distance, base, moving.astype(float), robin)
        return np.concatenate(jumps), np.concatenate(corners), np.concatenate(cols), tilt

    def _index(self, position: np.ndarray) -> np.ndarray:
        wrapped = np.where(self.periodic, position % self.shape, np.clip(position, 0, self.shape - 1))
        return np.asarray(np.ravel_multi_index(tuple(wrapped.T), self.grid.shape))

    def _walls(self, met: _Flights) -> tuple[np.ndarray, np.ndarray, dict[tuple[int, int], Any]]:
        """Wall nodes and distances of ``Tilt`` (0 where nothing is pushed along Σn), and its table of elastic walls."""
        wall, distance, robin = np.zeros(len(met.node), dtype=int), np.zeros(len(met.node)), {}
        for i, s, face in self.box.each():
            member = np.flatnonzero((met.axis == i) & (met.side == s))
            wall[member] = wall_of(self.grid, i, s)[met.node[member]]
            if face.turns:  # mirrored
                end = self.home[met.node[member], i] + met.step[member, i]
                distance[member] = 2.0 * (end - (self.shape[i] - 1) if s == 1 else end)
            if face.elastic:
                robin[i, s] = (member, np.searchsorted(wall_nodes(self.grid, i, s), wall[member]))
        return wall, distance, robin

    def _ends(self, met: _Flights, reflected: np.ndarray) -> np.ndarray:
        """Where jumps end: mirrored at a wall (the tilt along it comes with the rates), or on an absorbing face."""
        position = self.home[met.node] + met.arm[:, None] * met.step
        each, top = np.arange(len(met.node)), (self.shape - 1)[met.axis]
        beyond = position[each, met.axis]
        mirrored = np.clip(np.where(met.side == 1, 2 * top - beyond, -beyond), 0, top)
        position[each, met.axis] = np.where(reflected, mirrored, np.where(met.side == 1, top, 0))
        return np.asarray(position)

    def _between(
        self, met: _Flights, position: np.ndarray, wall: np.ndarray, distance: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Lower corner, which axes lie between nodes, and the fraction without the tilt of the sample covariance."""
        each = np.arange(len(met.node))
        across = np.arange(self.grid.dim) == met.axis[:, None]
        normal = self.sample[wall, met.axis, met.axis]
        shift = self.sample[wall, met.axis] * (distance / np.where(normal > 0, normal, 1.0))[:, None]
        shift[each, met.axis] = 0.0
        tilted = position - shift
        inside = np.where(self.periodic, tilted, np.clip(tilted, 0, self.shape - 1))
        lower = np.floor(inside + 1e-9).astype(int)
        lower = np.where(self.periodic, lower, np.minimum(lower, np.maximum(self.shape - 2, 0)))
        fraction = inside - lower
        lower[across] = np.round(inside[across]).astype(int)
        whole = (fraction >= 1 - 1e-9) & ~across
        lower[whole] += 1
        clamped = (np.abs(inside - tilted) > 1e-12) & ~self.periodic
        moving = (fraction > 1e-9) & ~across & ~whole & ~clamped
        return lower, moving, np.where(moving, position - lower, 0.0)


SCHEMES.add("monotone", Monotone())
