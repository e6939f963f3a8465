"""Semi-Lagrangian steps: u is read where the characteristics come from, so that the step is not bound by CFL."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from kolmo import kernels
from kolmo.arrays import Array, Held, along, as_like, contiguous, detached, empty, fresh, is_tensor, namespace, zeros
from kolmo.errors import InputError
from kolmo.kernels import septic
from kolmo.kernels.lines import LineOperator
from kolmo.problem.faces import Open, Periodic
from kolmo.schemes.base import Readable
from kolmo.schemes.jumps import WithJumps
from kolmo.steppers.base import STEPPERS, Operator, Repeated, Step, Unbounded
from kolmo.steppers.dual import DualOperator

# Gauss–Hermite points per direction of noise, by dimension.
POINTS = {1: 5, 2: 5, 3: 3}
# Substeps of a characteristic: time over which the drift may change direction, in units of 1/‖∇A‖, and their limit.
SUBSTEP, MOST_SUBSTEPS = 0.25, 64

# Explicit Runge–Kutta method of order 6 with seven stages (Butcher 1964).
STAGES = (
    (),
    (1 / 3,),
    (0, 2 / 3),
    (1 / 12, 1 / 3, -1 / 12),
    (-1 / 16, 9 / 8, -3 / 16, -3 / 8),
    (0, 9 / 8, -3 / 8, -3 / 4, 1 / 2),
    (9 / 44, -9 / 11, 63 / 44, 18 / 11, 0, -16 / 11),
)
SUM = (11 / 120, 0, 27 / 40, 27 / 40, -4 / 15, -4 / 15, 11 / 120)


class Lattice:
    """Interpolation of node fields at positions given in nodes, with the axes' ends.

    Parameters
    ----------
    shape : tuple of int
        Shape of the grid.
    faces : sequence of (Face, Face)
        Faces per axis: beyond open ones fields go on linearly, beyond others as they are at the face.
    like : array
        Fields are interpolated in its library, and on its device.
    """

    def __init__(self, shape: tuple[int, ...], faces: Sequence[Any], like: Array) -> None:
        self.shape, self.dim, self.like, self._kernels = shape, len(shape), like, kernels.of("septic", like)
        self.one = as_like(np.ones(1), like)
        missing = 3 - self.dim
        self._counts = np.array([*(1,) * missing, *shape], dtype=np.int64)
        self._ends = np.zeros((3, 2), dtype=np.int64)
        lower, upper = np.full(self.dim, -np.inf), np.full(self.dim, np.inf)
        for i, pair in enumerate(faces):
            for side, face in enumerate(pair):
                self._ends[missing + i, side] = {Periodic: septic.WRAP, Open: septic.LINEAR}.get(
                    type(face), septic.CLAMP
                )
                if not face.periodic:
                    # beyond an open face characteristics are followed over one more box at most
                    more = shape[i] if face.cut else 0
                    bound = lower if side == 0 else upper
                    bound[i] = -more if side == 0 else shape[i] - 1 + more
        self.lower, self.upper = Held(lower), Held(upper)
        self._filters = [septic.prefilter(n, pair[0].periodic) for n, pair in zip(shape, faces, strict=True)]
        self._full = (*(1,) * missing, *(f.size for f in self._filters))
        self._last: tuple[Array, Array] | None = None

    def coefficients(self, u: Array) -> Array:
        """Spline coefficients of a field (size, k); those of the field asked for last are kept."""
        if self._last is None or self._last[0] is not u:
            block = self._own(u).reshape(*self.shape, u.shape[1])
            for axis, known in enumerate(self._filters):
                block = along(known.apply, block, axis)
            self._last = (u, contiguous(block).reshape(*self._full, u.shape[1]))
        return self._last[1]

    def average(self, u: Array, feet: Array, weights: Array) -> Array:
        """``Σ_q weights[q] u(feet[q, i])`` for u of shape (size, k) and feet (q, points, d)."""
        out = empty((feet.shape[1], u.shape[1]), self.like)
        self._kernels.average(self.coefficients(u), self._counts, self._ends, self._padded(feet), weights, out)
        return out

    def spread(self, p: Array, feet: Array, weights: Array) -> Array:
        """Transpose of ``average``."""
        out = zeros((*self._full, p.shape[1]), self.like)
        self._kernels.spread(contiguous(self._own(p)), self._counts, self._ends, self._padded(feet), weights, out)
        block = out.reshape(*(f.size for f in self._filters), p.shape[1])
        for axis, known in enumerate(self._filters):
            block = along(known.apply_transposed, block, axis)
        return contiguous(block).reshape(-1, p.shape[1])

    def slopes(self, u: Array, p: Array, feet: Array, weights: Array) -> Array:
        """Derivative of ⟨p, average⟩ with respect to the feet, shape (q, points, d)."""
        out = empty((*feet.shape[:2], 3), self.like)
        parts = (self.coefficients(u), contiguous(self._own(p)), self._counts, self._ends, self._padded(feet), weights)
        self._kernels.slopes(*parts, out)
        return out[..., 3 - self.dim :]

    def sample(self, field: Array, positions: Array) -> Array:
        """Values (..., m) of a field (size, m) at positions (..., d); tensors keep their gradients."""
        if is_tensor(positions) or is_tensor(field):
            flat = _sampling().apply(self, field, positions.reshape(-1, self.dim))
        else:
            flat = self.average(field, positions.reshape(1, -1, self.dim), self.one)
        return flat.reshape(*positions.shape[:-1], field.shape[1])

    def _own(self, v: Array) -> Array:
        """An array in the library of the lattice, without gradients."""
        return as_like(detached(v), self.like)

    def _padded(self, feet: Array) -> Array:
        padded = zeros((*feet.shape[:-1], 3), self.like)
        padded[..., 3 - self.dim :] = self._own(feet)
        return padded


@lru_cache(maxsize=2)
def _nodes(shape: tuple[int, ...]) -> Held:
    """Positions of the nodes, shape (size, d)."""
    return Held(np.stack(np.unravel_index(np.arange(math.prod(shape)), shape), -1).astype(float))


@lru_cache(maxsize=64)
def _extension(n: int, low: bool, high: bool) -> LineOperator:
    """Replaces the values at ends by the parabola through the next three nodes."""
    matrix = np.eye(n)
    for end, inward in [(0, 1)] * low + [(n - 1, -1)] * high:
        matrix[end] = 0.0
        matrix[end, [end + inward, end + 2 * inward, end + 3 * inward]] = [3.0, -3.0, 1.0]
    return LineOperator(matrix)


@lru_cache(maxsize=1)
def _sampling() -> Any:
    """``Lattice.sample`` as a torch function."""
    import torch

    class Sampling(torch.autograd.Function):
        """Interpolation at positions that may carry gradients, of fields that may."""

        @staticmethod
        def forward(ctx: Any, lattice: Lattice, field: Any, positions: Any) -> Any:
            ctx.lattice, ctx.field, ctx.feet = lattice, field, positions[None]
            return as_like(lattice.average(field, ctx.feet, lattice.one), positions)

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, *gradients: Any) -> Any:
            p, lattice = gradients[0], ctx.lattice
            spread = lattice.spread(p, ctx.feet, lattice.one)
            slopes = lattice.slopes(ctx.field, p, ctx.feet, lattice.one)
            return None, as_like(spread, p), as_like(slopes[0], p)

    return Sampling


class Characteristics:
    """Where the values of a step come from, as a function of the stencil numbers, in NumPy or torch.

    With noise: half a step along the drift, noise, half a step along the drift (Strang). The noise runs along the flows
    of the columns of √Σ (Ninomiya & Victoir 2008), the drift is that of Stratonovich's equation.
    """

    def __init__(self, stencil: Any, dt: float, like: Array) -> None:
        if not isinstance(stencil, Readable):
            raise InputError("stepper", "'semi-lagrangian' with a scheme that is not central", "a central scheme")
        for i, pair in enumerate(stencil.faces):
            for side, face in enumerate(pair):
                tilted = bool(stencil.tilted.get((i, side)))
                if face.exits or not face.reached or tilted:
                    kind = "noise that is not normal to a wall" if tilted else type(face).__name__.lower()
                    raise InputError(
                        f"boundary[{i}][{side}]",
                        f"{kind} with stepper 'semi-lagrangian'",
                        "open, natural, reflecting (noise normal to the wall) or periodic faces",
                        "use stepper='radau5', 'mcs3' or 'rk4'",
                    )
        self.stencil, self.dt = stencil, dt
        self.lattice = Lattice(stencil.shape, stencil.faces, like)
        self.dim = self.lattice.dim
        self._open = [[face.cut for face in pair] for pair in stencil.faces]
        self._walls = [[face.turns for face in pair] for pair in stencil.faces]

    def coefficients(self, a: Array) -> tuple[Array, Array, Array]:
        """Killing rate, drift and covariance rate at the nodes, with noise across open faces put back."""
        c, A, S = self.stencil.coefficients(a)
        flat = S.reshape(len(S), -1)
        for axis, ends in enumerate(self._open):
            if any(ends):
                extension = _extension(self.stencil.shape[axis], *ends)
                flat = extension.apply(contiguous(flat), self.stencil.shape, axis)
        return c, A, flat.reshape(-1, self.dim, self.dim)

    def feet(self, numbers: Sequence[Array], general: bool) -> tuple[list[Array], list[Array]]:
        """Feet (q, size, d) and their weights of the one or two interpolations of a step, the last first.

        ``numbers`` are those at the start, in the middle and at the end of the step. ``general``: do not make use of
        covariances that happen to be constant (derivatives shall know that they might not be).
        """
        known = {id(a): self.coefficients(a)[1:] for a in numbers}
        fields = [known[id(a)] for a in numbers]
        steady = numbers[0] is numbers[1] and numbers[1] is numbers[2]
        nodes = _nodes(self.stencil.shape).like(numbers[0])[None]
        S, one = fields[1][1], self.lattice.one
        noisy = [j for j in range(self.dim) if any(bool((s[:, j, j] > 0).any()) for _, s in fields)]
        if not noisy:
            return [self._flow(self._in_time([A for A, _ in fields]), nodes, 1.0, 0.0, steady)], [one]
        corrected = {id(A): A - self._correction(s) for A, s in fields}
        drift = self._in_time([corrected[id(A)] for A, _ in fields])
        middle = self._flow(drift, nodes, 1.0, 0.5, steady)
        first, weights = self._noise(S, middle, noisy, general)
        # the second half is the first again where nothing depends on time
        last = middle if steady else self._flow(drift, nodes, 0.5, 0.0, steady)
        return [first, last], [as_like(weights, self.lattice.like), one]

    def _correction(self, S: Array) -> Array:
        """Itô minus Stratonovich drift, ½ Σ_j (V_j·∇)V_j."""
        d, xp = self.dim, namespace(S)
        if not self.stencil.pairs:
            return xp.stack([0.25 * self._derivative(S[:, i, i], i) for i in range(d)], -1)
        columns = _columns(S)
        parts = [sum(V[:, k] * self._derivative(V[:, i], k) for V in columns for k in range(d)) for i in range(d)]
        return 0.5 * xp.stack(parts, -1)

    def _derivative(self, field: Array, axis: int) -> Array:
        """Derivative along an axis, per node."""
        return self.stencil.operators[axis]["cross"].apply(contiguous(field[:, None]), self.stencil.shape, axis)[:, 0]

    @staticmethod
    def _in_time(fields: list[Array]) -> Callable[[float], Array]:
        """Field at a fraction of the step: the parabola through start, middle and end."""
        start, middle, end = fields
        if start is middle and middle is end:
            return lambda f: start

        def at(f: float) -> Array:
            return (1 - f) * (1 - 2 * f) * start + 4 * f * (1 - f) * middle + f * (2 * f - 1) * end

        return at

    def _flow(self, drift: Callable[[float], Array], z: Array, begin: float, stop: float, steady: bool) -> Array:
        """Follow the drift from the nodes z, from one fraction of the step to another (time runs as fractions fall)."""
        length = (begin - stop) * self.dt
        count = min(max(1, math.ceil(length * self._steepness(drift(0.5 * (begin + stop))) / SUBSTEP)), MOST_SUBSTEPS)
        if not steady:
            return self._followed(drift, z, begin, stop, count)
        # a flow that does not depend on time, twice in a row: each time twice as far
        doublings = math.ceil(math.log2(count))
        nodes, z = z, self._followed(drift, z, begin, begin - (begin - stop) / 2**doublings, 1)
        for _ in range(doublings):
            z = self._inside(z + self.lattice.sample((z - nodes)[0], z))
        return z

    def _followed(self, drift: Callable[[float], Array], z: Array, begin: float, stop: float, count: int) -> Array:
        """Positions after so many Runge–Kutta steps."""
        h = (begin - stop) * self.dt / count
        for n in range(count):
            slopes: list[Array] = []
            for row in STAGES:
                f = begin - (begin - stop) * (n + sum(row)) / count
                y = z
                for weight, k in zip(row, slopes, strict=True):
                    y = y + (h * weight) * k if weight else y
                slopes.append(self.lattice.sample(drift(f), self._inside(y)))
            for weight, k in zip(SUM, slopes, strict=True):
                z = z + (h * weight) * k if weight else z
            z = self._inside(z)
        return z

    def _steepness(self, A: Array) -> float:
        """Largest ‖∇A‖ between neighbouring nodes."""
        xp, block = namespace(A), detached(A).reshape(*self.stencil.shape, self.dim)
        lines = [xp.moveaxis(block, i, 0) for i in range(self.dim)]
        changes = [xp.amax(abs(line[1:] - line[:-1]).reshape(-1, self.dim), 0) for line in lines]
        return float(sum(changes).max())

    def _inside(self, z: Array) -> Array:
        """Positions moved back to the faces."""
        xp = namespace(z)
        return xp.minimum(xp.maximum(z, self.lattice.lower.like(z)), self.lattice.upper.like(z))

    def _noise(self, S: Array, z: Array, noisy: list[int], general: bool) -> tuple[Array, np.ndarray]:
        """Positions after noise over the whole step from positions (1, size, d), and their weights."""
        xi, w = np.polynomial.hermite_e.hermegauss(POINTS[self.dim])
        w = w / w.sum()
        rows, columns = (index.tolist() for index in np.tril_indices(self.dim))
        field = S[:, rows, columns]
        constant = not general and bool((abs(field - field[:1]) <= 1e-13 * _largest(field)).all())
        frozen = _columns(S[:1]) if constant else None
        scale = _largest(field)

        def along(j: int, y: Array) -> Array:
            if frozen is not None:
                return frozen[j]
            sampled = self.lattice.sample(field, self._inside(y))
            lower = {(r, s): sampled[..., m] for m, (r, s) in enumerate(zip(rows, columns, strict=True))}
            entries = [[lower[max(r, s), min(r, s)] for s in range(self.dim)] for r in range(self.dim)]
            return _columns_of(entries, scale)[j]

        # flows along different columns need not commute: both orders, half each
        orders = [noisy] if constant or len(noisy) == 1 else [noisy, noisy[::-1]]
        feet, weights = [], []
        for order in orders:
            y, weight = z, np.ones(1) / len(orders)
            for j in order:
                step = as_like(math.sqrt(self.dt) * np.tile(xi, len(weight)), z)[:, None, None]
                y = y[:, None].repeat(len(xi), 1) if not is_tensor(y) else y[:, None].expand(-1, len(xi), -1, -1)
                y = y.reshape(-1, *z.shape[1:])
                weight = np.outer(weight, w).reshape(-1)
                if constant:
                    y = y + step * along(j, y)
                else:
                    k1 = along(j, y)
                    k2 = along(j, y + (0.5 * step) * k1)
                    k3 = along(j, y + (0.5 * step) * k2)
                    k4 = along(j, y + step * k3)
                    y = y + (step / 6.0) * (k1 + 2.0 * (k2 + k3) + k4)
            feet.append(y)
            weights.append(weight)
        return self._mirrored(namespace(z).concatenate(feet, 0)), np.concatenate(weights)

    def _mirrored(self, z: Array) -> Array:
        """Positions behind reflecting faces mirrored."""
        xp, axes = namespace(z), []
        for i, (low, high) in enumerate(self._walls):
            top, x = self.stencil.shape[i] - 1.0, z[..., i]
            x = abs(x) if low else x
            axes.append(top - abs(top - x) if high else x)
        return xp.stack(axes, -1)


def _columns(S: Array) -> list[Array]:
    """Columns of the Cholesky factor of covariances (..., d, d)."""
    d = S.shape[-1]
    return _columns_of([[S[..., i, j] for j in range(d)] for i in range(d)], _largest(S))


def _largest(field: Array) -> float:
    """Largest modulus, as a plain number."""
    return float(abs(detached(field)).max())


def _columns_of(entries: list[list[Array]], scale: float) -> list[Array]:
    """Columns of the Cholesky factor, zero where the noise is."""
    d, xp = len(entries), namespace(entries[0][0])
    L: list[list[Array]] = [[0.0 * entries[0][0]] * d for _ in range(d)]
    for j in range(d):
        rest = entries[j][j] - sum(L[j][m] ** 2 for m in range(j))
        noisy = rest > 1e-14 * scale
        root = xp.where(noisy, xp.where(noisy, rest, 1.0 + 0.0 * rest) ** 0.5, 0.0 * rest)
        safe = xp.where(noisy, root, 1.0 + 0.0 * rest)
        L[j][j] = root
        for i in range(j + 1, d):
            part = entries[i][j] - sum(L[i][m] * L[j][m] for m in range(j))
            L[i][j] = xp.where(noisy, part / safe, 0.0 * rest)
    return [xp.stack([L[i][j] for i in range(d)], -1) for j in range(d)]


class TransportStep(Repeated):
    """One step: half the killing and load, interpolation at the feet, half the killing and load."""

    def __init__(self, operators: Sequence[Operator], dt: float) -> None:
        self.operators, self.dt = operators, dt
        self.traced = Characteristics(operators[0].stencil, dt, operators[0].a)
        self.lattice = self.traced.lattice
        self.feet, self.weights = self.traced.feet([op.a for op in operators], general=False)
        xp = namespace(operators[0].a)
        self._before, self._after = (
            xp.exp(-0.5 * dt * self.traced.coefficients(op.a)[0])[:, None] for op in (operators[0], operators[2])
        )

    def _states(self, u: Array, loads: Sequence[Array]) -> list[Array]:
        """States before each interpolation, in the order of the feet."""
        states = [self._before * (u + (0.5 * self.dt) * loads[0])]
        for feet, weights in zip(self.feet[:0:-1], self.weights[:0:-1], strict=True):
            states.insert(0, self.lattice.average(states[0], feet, weights))
        return states

    def apply(self, u: Array, loads: Sequence[Array]) -> Array:
        """The state after the step."""
        last = self.lattice.average(self._states(u, loads)[0], self.feet[0], self.weights[0])
        return self._after * last + (0.5 * self.dt) * loads[2]

    def _adjoints(self, p: Array) -> list[Array]:
        """Adjoints after each interpolation in the order of the feet, and finally of what is first read."""
        adjoints = [self._after * p]
        for feet, weights in zip(self.feet, self.weights, strict=True):
            adjoints.append(self.lattice.spread(adjoints[-1], feet, weights))
        return adjoints

    def apply_transposed(self, p: Array) -> tuple[Array, list[Array]]:
        """Transposed step and the derivatives of the loads."""
        return self._back(self._adjoints(p), p)

    def _back(self, adjoints: list[Array], p: Array) -> tuple[Array, list[Array]]:
        back = self._before * adjoints[-1]
        return back, [(0.5 * self.dt) * back, namespace(p).zeros_like(p), (0.5 * self.dt) * p]

    def pullback(self, u: Array, loads: Sequence[Array], p: Array) -> tuple[Array, list[Array], list[Array]]:
        """Derivatives with respect to state, loads and stencil numbers: the feet are traced again in torch."""
        import torch

        states, adjoints = self._states(u, loads), self._adjoints(p)
        back, load_adjoints = self._back(adjoints, p)
        leaves = {id(op): torch.as_tensor(fresh(op.a)).requires_grad_() for op in self.operators}
        numbers = [leaves[id(op)] for op in self.operators]
        with torch.enable_grad():
            feet, weights = self.traced.feet(numbers, general=True)
            before, after = (self.traced.coefficients(a)[0] for a in (numbers[0], numbers[2]))
        slopes = [self.lattice.slopes(v, q, f, w) for v, q, f, w in zip(states, adjoints, feet, weights, strict=False)]
        last = self._after * self.lattice.average(states[0], self.feet[0], self.weights[0])
        slopes += [-0.5 * self.dt * (states[-1] * adjoints[-1]).sum(-1), -0.5 * self.dt * (last * p).sum(-1)]
        torch.autograd.backward([*feet, before, after], [as_like(s, before) for s in slopes])
        derivatives: list[Array] = []
        for op in self.operators:
            leaf = leaves.pop(id(op), None)
            # an operator that serves several nodes is counted once
            found = None if leaf is None else leaf.grad
            derivatives.append(namespace(op.a).zeros_like(op.a) if found is None else as_like(found, op.a))
        return back, load_adjoints, derivatives


@dataclass(frozen=True)
class SemiLagrangian(Unbounded):
    """Semi-Lagrangian steps with splines of degree 7, of order 2; no bound on the step.

    Without noise, killing and source only the characteristics are approximate: order 3, and 6 for autonomous drift.
    For central schemes on open faces (fields go on linearly beyond), natural, reflecting (noise normal to the wall) and
    periodic ones. Where there is no noise, the derivative with respect to the covariance is reported as zero: that
    with respect to σ is exact, that with respect to σσᵀ is not.

    Source: Strang splitting; Ninomiya & Victoir 2008 (noise along flows).
    """

    name: str = "semi-lagrangian"
    order: int = 2
    implicit: bool = False
    kept: int = 1

    @property
    def nodes(self) -> tuple[float, ...]:
        """Coefficients are needed at the ends and in the middle of the step."""
        return (0.0, 0.5, 1.0)

    def prepare(self, operators: Sequence[Operator], dt: float) -> Step:
        """Trace the characteristics."""
        if isinstance(operators[0], DualOperator):
            raise InputError(
                "stepper",
                "second derivatives with 'semi-lagrangian'",
                "a stepper other than 'semi-lagrangian' for Hessian products",
                "minimize with method='L-BFGS-B', or give a discretization with stepper='radau5', 'mcs3' or 'rk4'",
            )
        if isinstance(operators[0].stencil, WithJumps):
            raise InputError(
                "stepper", "'semi-lagrangian' with jumps", "a stepper that takes jumps", "'radau5', 'mcs3' or 'rk4'"
            )
        return TransportStep(operators, dt)


STEPPERS.add("semi-lagrangian", SemiLagrangian())
