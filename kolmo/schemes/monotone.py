"""A monotone scheme for every full diffusion tensor: the generator of a Markov chain on the nodes."""

from dataclasses import dataclass, field
from itertools import product
from typing import Any, Literal

import numpy as np
import scipy.sparse as sp

from kolmo.arrays import Array, as_like, as_numpy, namespace
from kolmo.grid import Grid
from kolmo.problem.box import Box
from kolmo.problem.faces import Absorbing, Entrance, Natural, Open, Reflecting, Robin
from kolmo.schemes import selling
from kolmo.schemes.base import SCHEMES, Assembly, FaceData
from kolmo.schemes.faces import held
from kolmo.schemes.fitting import fitted_rates
from kolmo.schemes.local import Local, Metric, on_face, wall_nodes, wall_of


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
        out = a[entries:, None] * u
        return out.index_add(0, as_index(self.rows, u), a[:entries, None] * (u[self.cols] - u[self.rows]))

    def apply_transposed(self, a: Array, p: Array) -> Array:
        """Q(a)ᵀ p."""
        entries = len(self.rows)
        if namespace(p) is np:
            rates, diagonal = self._jumps(a)
            return rates.T @ p + diagonal[:, None] * p
        flow = a[:entries, None] * p[self.rows]
        out = (a[entries:, None] * p).index_add(0, as_index(self.cols, p), flow)
        return out.index_add(0, as_index(self.rows, p), -flow)

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


def as_index(index: np.ndarray, like: Array) -> Array:
    """Index array as a tensor on the device of ``like``."""
    import torch

    return torch.as_tensor(index, device=like.device)


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
                killing = killing + _add_at(spread, node, strength * kappa[lookup])
                load = load + _add_at(as_like(np.zeros(tuple(load.shape)), A), node, strength[:, None] * value[lookup])
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


def _add_at(out: Array, index: np.ndarray, values: Array) -> Array:
    """Sum values into rows of out (a fresh array)."""
    if namespace(out, values) is np:
        np.add.at(out, index, values)
        return out
    return out.index_add(0, as_index(index, values), values)


def _lay_out(grid: Grid, box: Box, S: np.ndarray) -> tuple[Jumps, np.ndarray]:
    """Where every jump of every node lands; see ``Jumps``."""
    d, N = grid.dim, grid.size
    superbase = selling.obtuse_superbase(S)
    E = selling.offsets(superbase)
    unit = np.abs(E).sum(2) == 1
    aligned = unit[:, :, None] & (np.abs(E) == 1)
    free = np.ones(N)
    blocked, flat = np.ones((N, 2 * d)), np.ones((N, d))
    for i, side in product(range(d), (0, 1)):
        face = box.faces[i][side]
        free[held(grid, i, side, face)] = 0.0
        if face.cut or face.degenerate:
            blocked[on_face(grid, i, side), 2 * i + (1 - side)] = 0.0
            flat[on_face(grid, i, side), i] = 0.0
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
    arm, hit_axis, hit_side = walker.arms(node, step)
    opposite, _, _ = walker.arms(node, -step)
    oblique = slot >= 2 * d
    leaves = walker.dropped(hit_axis, hit_side)
    back = walker.dropped(*walker.arms(node, -step)[1:])
    factor = np.where(oblique, 2.0 / ((arm + opposite) * arm), 1.0)
    alive = ~(oblique & (leaves | back)) & ~(~oblique & leaves)
    node, slot, step, factor = node[alive], slot[alive], step[alive], factor[alive]
    arm, hit_axis, hit_side = arm[alive], hit_axis[alive], hit_side[alive]
    factor = np.where(slot < 2 * d, 1.0, factor)
    entry_jump, entry_corner, cols, tilt = walker.land(node, step, arm, hit_axis, hit_side)
    layout = Jumps(superbase, node, slot, factor, aligned, blocked, flat, entry_jump, entry_corner, tilt, free)
    return layout, cols


class _Walker:
    """Follows jumps to where they land: inside, on an absorbing face, or reflected at a wall."""

    def __init__(self, grid: Grid, box: Box, sample: np.ndarray) -> None:
        self.grid, self.box, self.sample = grid, box, sample
        self.shape = np.array(grid.shape)
        self.home = np.stack(np.unravel_index(np.arange(grid.size), grid.shape), -1)
        self.periodic = np.array([a.periodic for a in grid.axes])

    def arms(self, node: np.ndarray, step: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Fraction of the step until a face is hit (1: none, or a wall that reflects), and which face (−1: none)."""
        start, J = self.home[node], len(node)
        arm, axis, side = np.full(J, np.inf), np.full(J, -1), np.zeros(J, dtype=int)
        for i in range(self.grid.dim):
            if self.periodic[i]:
                continue
            end = start[:, i] + step[:, i]
            for s, outside in ((0, end < 0), (1, end > self.shape[i] - 1)):
                gap = (start[:, i] if s == 0 else self.shape[i] - 1 - start[:, i]).astype(float)
                fraction = np.where(outside, gap / np.maximum(np.abs(step[:, i]), 1), np.inf)
                nearer = outside & (fraction < arm)
                arm = np.where(nearer, fraction, arm)
                axis, side = np.where(nearer, i, axis), np.where(nearer, s, side)
        absorbing = self._is(axis, side, (Absorbing,))
        return np.where(absorbing, np.clip(arm, 1e-3, 1.0), 1.0), axis, side

    def dropped(self, axis: np.ndarray, side: np.ndarray) -> np.ndarray:
        """Whether a jump leaves through an open or natural face."""
        return self._is(axis, side, (Open, Natural))

    def _is(self, axis: np.ndarray, side: np.ndarray, kinds: tuple[type, ...]) -> np.ndarray:
        result = np.zeros(len(axis), dtype=bool)
        for i, s in product(range(self.grid.dim), (0, 1)):
            if isinstance(self.box.faces[i][s], kinds):
                result |= (axis == i) & (side == s)
        return result

    def land(
        self, node: np.ndarray, step: np.ndarray, arm: np.ndarray, axis: np.ndarray, side: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, Tilt]:
        """Entries (jump, corner, column) of all jumps, and the table of reflected ones."""
        d = self.grid.dim
        walls = np.flatnonzero(self._is(axis, side, (Reflecting, Robin, Entrance)))
        absorbed = np.flatnonzero(self._is(axis, side, (Absorbing,)))
        plain = np.ones(len(node), dtype=bool)
        plain[walls] = plain[absorbed] = False
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

        inside = np.flatnonzero(plain)
        corner(inside, self.home[node[inside]] + step[inside], np.zeros((len(inside), d), dtype=bool))
        tables = [self._reflect(node, step, axis, side, walls), self._stop(node, step, arm, axis, side, absorbed)]
        for jump, lower, moving, _ in tables:
            corner(jump, lower, moving)
        jump = np.concatenate([walls, absorbed])
        base = np.concatenate([tables[0][3], tables[1][3]])
        moving = np.concatenate([tables[0][2], tables[1][2]])
        wall = np.zeros(len(jump), dtype=int)
        distance = np.zeros(len(jump))
        robin = {}
        for i, s in product(range(d), (0, 1)):
            member = np.flatnonzero((axis[jump] == i) & (side[jump] == s))
            wall[member] = wall_of(self.grid, i, s)[node[jump[member]]] if len(member) else 0
            mirror = member[member < len(walls)]
            end = self.home[node[jump[mirror]], i] + step[jump[mirror], i]
            if self.box.faces[i][s].reached:  # mirrored, not pushed along Σn
                distance[mirror] = 2.0 * (end - (self.shape[i] - 1) if s == 1 else end)
            if self.box.faces[i][s].elastic:
                robin[i, s] = (member, np.searchsorted(wall_nodes(self.grid, i, s), wall[member]))
        tilt = Tilt(jump, wall, np.maximum(axis[jump], 0), distance, base, moving.astype(float), robin)
        return np.concatenate(jumps), np.concatenate(corners), np.concatenate(cols), tilt

    def _index(self, position: np.ndarray) -> np.ndarray:
        wrapped = np.where(self.periodic, position % self.shape, np.clip(position, 0, self.shape - 1))
        return np.asarray(np.ravel_multi_index(tuple(wrapped.T), self.grid.shape))

    def _reflect(
        self, node: np.ndarray, step: np.ndarray, axis: np.ndarray, side: np.ndarray, jump: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Mirror image across the wall; the tilt along it is added where the rates are assembled."""
        end = self.home[node[jump]] + step[jump]
        n = np.arange(len(jump))
        top = (self.shape - 1)[axis[jump]]
        beyond = end[n, axis[jump]]
        mirrored = end.copy()
        mirrored[n, axis[jump]] = np.clip(np.where(side[jump] == 1, 2 * top - beyond, -beyond), 0, top)
        return self._between(jump, mirrored.astype(float), axis, node, step, side, tilted=True)

    def _stop(
        self, node: np.ndarray, step: np.ndarray, arm: np.ndarray, axis: np.ndarray, side: np.ndarray, jump: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Point where the jump meets an absorbing face."""
        hit = self.home[node[jump]] + arm[jump, None] * step[jump]
        n = np.arange(len(jump))
        hit[n, axis[jump]] = np.where(side[jump] == 1, (self.shape - 1)[axis[jump]], 0)
        return self._between(jump, hit, axis, node, step, side, tilted=False)

    def _between(
        self,
        jump: np.ndarray,
        position: np.ndarray,
        axis: np.ndarray,
        node: np.ndarray,
        step: np.ndarray,
        side: np.ndarray,
        tilted: bool,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Lower corner, which axes lie between nodes, and the fraction without tilt."""
        d, n = self.grid.dim, np.arange(len(jump))
        if tilted and d > 1:
            position = position - self._sample_shift(jump, node, step, axis, side)
        inside = np.where(self.periodic, position, np.clip(position, 0, self.shape - 1))
        lower = np.floor(inside + 1e-9).astype(int)
        lower = np.where(self.periodic, lower, np.minimum(lower, np.maximum(self.shape - 2, 0)))
        fraction = inside - lower
        normal = np.zeros((len(jump), d), dtype=bool)
        normal[n, axis[jump]] = True
        lower[normal] = np.round(inside[normal]).astype(int)
        moving = (fraction > 1e-9) & ~normal
        whole = (fraction >= 1 - 1e-9) & ~normal
        lower[whole] += 1
        moving &= ~whole
        base = np.where(moving, fraction, 0.0)
        if tilted and d > 1:
            clamped = (np.abs(inside - position) > 1e-12) & ~self.periodic
            moving &= ~clamped
            base = np.where(moving, position + self._sample_shift(jump, node, step, axis, side) - lower, 0.0)
        return jump, lower, moving, base

    def _sample_shift(
        self, jump: np.ndarray, node: np.ndarray, step: np.ndarray, axis: np.ndarray, side: np.ndarray
    ) -> np.ndarray:
        """Tilt 2δ S_ij / S_ii along the wall, for the sample covariance; zero along the normal."""
        shift = np.zeros((len(jump), self.grid.dim))
        for i, s in product(range(self.grid.dim), (0, 1)):
            if not self.box.faces[i][s].reached:
                continue
            member = np.flatnonzero((axis[jump] == i) & (side[jump] == s))
            wall = wall_of(self.grid, i, s)[node[jump[member]]]
            end = self.home[node[jump[member]], i] + step[jump[member], i]
            distance = 2.0 * (end - (self.shape[i] - 1) if s == 1 else end)
            normal = self.sample[wall, i, i]
            shift[member] = self.sample[wall, i] / np.where(normal > 0, normal, 1.0)[:, None] * distance[:, None]
            shift[member, i] = 0.0
        return shift


SCHEMES.add("monotone", Monotone())
