"""Coefficients at the nodes as functions of the control: quadratic in it wherever they are, found by probing."""

from collections import OrderedDict
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from kolmo import memory
from kolmo.control.constraints import Acting, Admissible, Wall, constrained
from kolmo.control.problem import ControlProblem
from kolmo.control.sets import Finite
from kolmo.problem.box import Box
from kolmo.schemes.generator import PROBES

# Values that differ by less than this part of their size count as the same.
SAME = 1e-11
# Differences of values below this part of their size are rounding.
NOTHING = 1e-14
# Instants whose coefficients are kept when they depend on time.
KEPT = 8


@dataclass(frozen=True)
class Values:
    """b (n, d), Σ (n, d, d), c (n,) and ℓ (n,) at the nodes for one control per node."""

    b: np.ndarray
    S: np.ndarray
    c: np.ndarray
    g: np.ndarray

    @property
    def parts(self) -> tuple[np.ndarray, ...]:
        """All four."""
        return self.b, self.S, self.c, self.g

    def hamiltonian(self, V: np.ndarray, p: np.ndarray, M: np.ndarray) -> np.ndarray:
        """b·p + ½Σ:M − cV + ℓ, shape (n,)."""
        return np.asarray((self.b * p).sum(-1) + 0.5 * (self.S * M).sum((-1, -2)) - self.c * V + self.g)


class Quadratic:
    """Coefficients as quadratic functions of s = (a − centre)/scale, from values at a star of controls."""

    def __init__(
        self, problem: ControlProblem, t: float, x: torch.Tensor, centre: np.ndarray, scale: np.ndarray
    ) -> None:
        m = len(centre)
        self.centre, self.scale = centre, scale

        def at(s: np.ndarray) -> tuple[np.ndarray, ...]:
            a = torch.as_tensor(centre + scale * s).expand(len(x), m)
            return evaluate(problem, t, x, a).parts

        eye = np.eye(m)
        middle, up, down = at(np.zeros(m)), [at(e) for e in eye], [at(-e) for e in eye]
        self.zero = middle
        self.linear = [
            [0.5 * _difference(p, q) for p, q in zip(u, d, strict=True)] for u, d in zip(up, down, strict=True)
        ]
        self.square: dict[tuple[int, int], list[np.ndarray]] = {}
        for k in range(m):
            self.square[k, k] = [_difference(p + q, 2.0 * z) for p, q, z in zip(up[k], down[k], middle, strict=True)]
            for j in range(k):
                both = at(eye[k] + eye[j])
                self.square[j, k] = [
                    _difference(v + z, p + q) for v, p, q, z in zip(both, up[k], up[j], middle, strict=True)
                ]  # fmt: skip
        # which coefficients (of four) depend on which controls, and how: most do not, and cost nothing then
        self.linear_in = [[bool(part.any()) for part in parts] for parts in self.linear]
        self.square_in = {key: [bool(part.any()) for part in parts] for key, parts in self.square.items()}

    def __call__(self, a: np.ndarray) -> Values:
        """Values for controls a (n, m)."""
        s = (a - self.centre) / self.scale
        parts = []
        for i, zero in enumerate(self.zero):
            total = zero.copy()
            for k in range(len(self.centre)):
                if self.linear_in[k][i]:
                    total += _times(s[:, k], self.linear[k][i])
            for (j, k), square in self.square.items():
                if not self.square_in[j, k][i]:
                    continue
                total += _times(s[:, j] * s[:, k] * (0.5 if j == k else 1.0), square[i])
            parts.append(total)
        return Values(*parts)

    def hamiltonian(self, V: np.ndarray, p: np.ndarray, M: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Gradient (n, m) and Hessian (n, m, m) in s of b·p + ½Σ:M − cV + ℓ at s = 0."""

        def contract(parts: list[np.ndarray], present: list[bool]) -> np.ndarray:
            b, S, c, g = parts
            total = np.zeros(len(V))
            if present[0]:
                total += (b * p).sum(-1)
            if present[1]:
                total += 0.5 * (S * M).sum((-1, -2))
            if present[2]:
                total -= c * V
            return total + g if present[3] else total

        m = len(self.centre)
        linear = np.stack([contract(*both) for both in zip(self.linear, self.linear_in, strict=True)], -1)
        square = np.zeros((len(V), m, m))
        for (j, k), parts in self.square.items():
            square[:, j, k] = square[:, k, j] = contract(parts, self.square_in[j, k])
        return linear, square


def _difference(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """p − q, zero where only rounding is left."""
    difference = p - q
    return np.where(np.abs(difference) <= NOTHING * (np.abs(p) + np.abs(q)), 0.0, difference)


def _times(weight: np.ndarray, values: np.ndarray) -> np.ndarray:
    return np.asarray(weight.reshape(-1, *[1] * (values.ndim - 1)) * values)


def evaluate(problem: ControlProblem, t: float, x: torch.Tensor, a: torch.Tensor) -> Values:
    """Coefficients at points x (n, d) for controls a (n, m), by the user's functions."""
    with torch.no_grad():
        closed = problem.closed_loop(lambda _t, _x: a)
        parts = closed.sde.drift(t, x), closed.sde.covariance(t, x), closed.rate(t, x), closed.running(t, x)
    b, S, c, g = (np.array(v.numpy()) for v in parts)
    return Values(b, S, c, g.reshape(len(x)))


class Coefficients:
    """Coefficients of a control problem at fixed points.

    Parameters
    ----------
    problem : ControlProblem
        The problem.
    x : tensor, shape (n, d)
        The points.
    like : Coefficients, optional
        Those at other points, where it was seen already whether they are quadratic and constant in time.
    """

    def __init__(self, problem: ControlProblem, x: torch.Tensor, like: "Coefficients | None" = None) -> None:
        self.problem, self.x = problem, x
        samples = problem.controls.samples
        self.centre = samples.mean(0)
        spread = 0.5 * (samples.max(0) - samples.min(0))
        self.scale = np.where(spread > 0, spread, 1.0)
        self._models: OrderedDict[float, Quadratic] = OrderedDict()
        self.autonomous: bool = self._autonomous() if like is None else like.autonomous
        if like is None:
            self.quadratic: bool = not problem.controls.listed and self._quadratic()
        else:
            self.quadratic = like.quadratic

    def _trial(self, seed: int) -> torch.Tensor:
        """Random controls of the set, one per point."""
        rng = np.random.default_rng(seed)
        a = self.centre + self.scale * rng.uniform(-1.0, 1.0, (len(self.x), len(self.centre)))
        return torch.as_tensor(self.problem.controls.project(a))

    def _autonomous(self) -> bool:
        if self.problem.horizon is None:
            return True
        a, first = self._trial(0), None
        for f in PROBES:
            now = evaluate(self.problem, f * self.problem.horizon, self.x, a)
            if first is not None and any(not np.array_equal(p, q) for p, q in zip(first.parts, now.parts, strict=True)):
                return False
            first = now
        return True

    def _quadratic(self) -> bool:
        T = self.problem.horizon or 0.0
        for seed, t in enumerate((0.37 * T, 0.81 * T)):
            a = self._trial(seed + 1)
            model, exact = self.model(t)(a.numpy()), evaluate(self.problem, t, self.x, a)
            for p, q in zip(model.parts, exact.parts, strict=True):
                if not (np.abs(p - q) <= SAME * (np.abs(q).max(initial=0.0) + 1e-300)).all():
                    return False
        return True

    @cached_property
    def _list(self) -> list[Values]:
        """Values for every control of a finite set, constant in time."""
        controls, (n, d) = self.problem.controls.samples, self.x.shape
        memory.afford("controls", f"{len(controls)} controls at {n} nodes", 8 * len(controls) * n * (d * d + d + 2))
        return [evaluate(self.problem, 0.0, self.x, torch.as_tensor(a).expand(len(self.x), len(a))) for a in controls]

    def _listed(self, V: np.ndarray, p: np.ndarray, M: np.ndarray, start: torch.Tensor) -> torch.Tensor:
        """The best control of a finite set; the present one wins ties."""
        controls = self.problem.controls.samples
        H = self.problem.sign * np.stack([values.hamiltonian(V, p, M) for values in self._list], 0)
        now = ((start.numpy()[None] - controls[:, None]) ** 2).sum(-1).argmin(0)
        nodes = np.arange(len(V))
        best = H.argmin(0)
        gain = H[best, nodes] < H[now, nodes] - 1e-15 * np.abs(H).max(0)
        return torch.as_tensor(controls[np.where(gain, best, now)])

    @property
    def covariance_is_fixed(self) -> bool:
        """Whether Σ depends on neither time nor control."""
        if not (self.autonomous and self.quadratic):
            return False
        model = self.model(0.0)
        return not any(np.any(parts[1]) for parts in [*model.linear, *model.square.values()])

    @cached_property
    def switches(self) -> bool:
        """Whether the control only ever jumps (between members of a list, or ends) and leaves the noise alone."""
        if self.problem.controls.unbounded:
            return False
        if isinstance(self.problem.controls, Finite):
            T, a = self.problem.horizon or 0.0, self.problem.controls.samples
            parts = [
                evaluate(self.problem, 0.37 * T, self.x, torch.as_tensor(v).expand(len(self.x), len(v))).S for v in a
            ]
            return len(parts) > 1 and all(np.array_equal(parts[0], S) for S in parts[1:])
        if not self.quadratic:
            return False
        model = self.model(0.37 * (self.problem.horizon or 0.0))
        bends = any(any(present) for present in model.square_in.values())
        return not bends and not any(present[1] for present in model.linear_in)

    def model(self, t: float) -> Quadratic:
        """The quadratic model at a time."""
        key = 0.0 if self.autonomous else t
        if key not in self._models:
            self._models[key] = Quadratic(self.problem, t, self.x, self.centre, self.scale)
            while len(self._models) > KEPT:
                self._models.popitem(last=False)
        return self._models[key]

    def values(self, t: float, a: torch.Tensor) -> Values:
        """Coefficients for controls a (n, m)."""
        if self.quadratic:
            return self.model(t)(a.numpy())
        return evaluate(self.problem, t, self.x, a)

    def hamiltonian(self, t: float, V: np.ndarray, p: np.ndarray, M: np.ndarray, a: torch.Tensor) -> np.ndarray:
        """b·p + ½Σ:M − cV + ℓ for controls a (n, m), shape (n,)."""
        return self.values(t, a).hamiltonian(V, p, M)

    def choose(
        self, t: float, V: np.ndarray, p: np.ndarray, M: np.ndarray, start: torch.Tensor
    ) -> tuple[torch.Tensor, np.ndarray]:
        """Minimisers (of sign × Hamiltonian) per node, and where there is one and the control acts.

        On constrained faces they are those among the controls that keep the state inside.
        """
        a, found = self._choose(t, V, p, M, start)
        if self.on_walls is not None:
            rows = self.on_walls
            where = torch.as_tensor(rows)
            best, there = self._walls.choose(t, V[rows], p[rows], M[rows], start[where])
            a, found = a.clone(), found.copy()
            a[where], found[rows] = best, there
        return a, found

    @cached_property
    def _faces(self) -> list[Wall]:
        """The constrained faces with the points on them that are in no target."""
        if not self.problem.constrained:
            return []
        x, box = self.x.numpy(), self.problem.box or Box.unbounded(self.x.shape[1])
        free = np.ones(len(x), dtype=bool)
        for target in self.problem.targets:
            free &= ~target.inside(x)
        return constrained(box, x, free)

    @cached_property
    def on_walls(self) -> np.ndarray | None:
        """The points on constrained faces, if there are any."""
        return np.flatnonzero(np.any([wall.on for wall in self._faces], axis=0)) if self._faces else None

    @cached_property
    def _walls(self) -> "OnWalls":
        rows = np.asarray(self.on_walls)
        walls = [replace(wall, on=wall.on[rows]) for wall in self._faces]
        return OnWalls(Coefficients(self.problem, self.x[torch.as_tensor(rows)], self), walls)

    def _choose(
        self, t: float, V: np.ndarray, p: np.ndarray, M: np.ndarray, start: torch.Tensor
    ) -> tuple[torch.Tensor, np.ndarray]:
        controls: Any = self.problem.controls
        if isinstance(controls, Finite) and self.autonomous:
            return self._listed(V, p, M, start), np.ones(len(V), dtype=bool)
        if self.quadratic:
            model = self.model(t)
            linear, square = model.hamiltonian(V, p, M)
            h, H = self.problem.sign * linear, self.problem.sign * square
            s0 = (start.numpy() - model.centre) / model.scale
            s, found = controls.minimize_quadratic(h, H, s0, model.centre, model.scale)
            return torch.as_tensor(model.centre + model.scale * s), found
        function = self.problem.hamiltonian(t, self.x, *(torch.as_tensor(v) for v in (V, p, M)))
        choice = controls.minimize(function, start)
        return choice.a, (choice.found & choice.acts).numpy()


class OnWalls:
    """Coefficients at the points on constrained faces alone, and the best admissible controls there."""

    def __init__(self, here: Coefficients, walls: list[Wall]) -> None:
        self.here, self.walls = here, walls
        self._kept: tuple[float, Admissible] | None = None

    def choose(
        self, t: float, V: np.ndarray, p: np.ndarray, M: np.ndarray, start: torch.Tensor
    ) -> tuple[torch.Tensor, np.ndarray]:
        """The best admissible controls, and where there are some."""

        def best(p: np.ndarray, M: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            a, found = self.here._choose(t, V, p, M, start)
            return a.numpy(), found

        a, found = self._admissible(t).choose(Acting(self.here, t, V), p, M, best, start.numpy())
        return torch.as_tensor(a), found

    def _admissible(self, t: float) -> Admissible:
        key = 0.0 if self.here.autonomous else t
        if self._kept is None or self._kept[0] != key:
            problem, x = self.here.problem, self.here.x.numpy()
            acting, controls = Acting(self.here, t, np.zeros(len(x))), problem.controls
            self._kept = key, Admissible(self.walls, x, acting, controls.samples, controls.listed, problem.sign)
        return self._kept[1]
