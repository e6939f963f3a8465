"""The law of the process as tensors: densities, expectations and first-passage rates that carry gradients."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from kolmo.arrays import as_points
from kolmo.box import Absorbing, Robin
from kolmo.control.adjoint import Steps, differentiable_march, own, seed
from kolmo.control.value import planned
from kolmo.discretization import Discretization
from kolmo.errors import InputError
from kolmo.forward import Exit, quadrature, readings
from kolmo.grid import Grid
from kolmo.march import March, StepPlan
from kolmo.problem import KolmogorovProblem
from kolmo.refine.plan import prescribe
from kolmo.schemes.base import SCHEMES, FaceData
from kolmo.schemes.faces import held
from kolmo.schemes.generator import Generator, Semi
from kolmo.schemes.local import Local, wall_nodes
from kolmo.times import SAME, find, missing

# Interpolation in time takes this many time nodes.
TIME_NODES = 4


@dataclass(frozen=True, eq=False)
class Law:
    r"""Law of the process as tensors with gradients, by the transposes of the steps that ``solve`` takes.

    Attributes
    ----------
    weights : tensor, shape (nt, size)
        Masses at the nodes at ``times``.
    times : ndarray, shape (nt,)
        Times kept, increasing; the horizon is the last.
    clock : ndarray, shape (steps + 1,)
        All time nodes, for ``flux``.
    grid : Grid
        The nodes.
    discretization : Discretization
        The recipe used: pass it on, so that a likelihood does not jump from one call to the next.

    Examples
    --------
    >>> import torch, kolmo
    >>> from kolmo import control
    >>> kappa = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    >>> ou = kolmo.SDE(lambda t, x: -kappa * x, 1.0, dim=1)
    >>> problem = kolmo.KolmogorovProblem(ou, lambda x: x[..., 0], 1.0, kolmo.Box(-6.0, 6.0))
    >>> law = control.law(problem, [1.0], grid=121, steps=16)
    >>> mean = law.expectation(lambda x: x[..., 0])
    >>> torch.autograd.grad(mean, kappa)[0].round(decimals=4)  # d/dκ exp(−κ)
    tensor(-0.3679, dtype=torch.float64)
    """

    weights: torch.Tensor
    times: np.ndarray
    clock: np.ndarray
    grid: Grid
    discretization: Discretization
    _flux: dict[Exit, torch.Tensor]
    _readings: tuple[torch.Tensor, ...]

    def __call__(self, x: Any, t: float | None = None) -> torch.Tensor:
        """Density ρ(t, x) at points (..., d), shape (...); t a kept time (None: the horizon)."""
        points = torch.as_tensor(as_points(x, self.grid.dim))
        rho = read(self.weights[self._kept(t)][:, None], self.grid, self._readings)[:, 0]
        values: torch.Tensor = self.grid.interpolate(rho, points, self.discretization.width)
        return values

    def expectation(self, function: Callable[[torch.Tensor], torch.Tensor], t: float | None = None) -> torch.Tensor:
        """E[f(X_t); still inside] for ``function(x)`` of points (..., d), shape () or (k,)."""
        values = function(torch.as_tensor(self.grid.points))
        mean: torch.Tensor = torch.tensordot(self.weights[self._kept(t)], values.double(), 1)
        return mean

    def mass(self, t: float | None = None) -> torch.Tensor:
        """Probability of being inside still."""
        return self.weights[self._kept(t)].sum(0)

    def flux(self, face: Any) -> torch.Tensor:
        """Probability per time that goes out at ``clock``, shape (steps + 1,); faces as for ``Density.exit_flux``."""
        key = (0, face) if face in (0, 1, "low", "high") and self.grid.dim == 1 else face
        if isinstance(key, tuple) and len(key) == 2:
            key = (key[0], {"low": 0, "high": 1}.get(key[1], key[1]))
        if key not in self._flux:
            raise InputError("face", face, "one of " + (", ".join(map(str, self._flux)) or "none: nothing goes out"))
        return self._flux[key]

    def first_passage(self, times: Any, face: Any) -> torch.Tensor:
        """Density of the time of going out through a face at times (...): the flux, interpolated in time."""
        t = np.asarray(times, dtype=float)
        if not ((t >= 0) & (t <= self.clock[-1] * (1.0 + SAME))).all():
            raise InputError(
                "times", times, f"times between 0 and the horizon {self.clock[-1]:g}", "what is later counts by mass()"
            )
        matrix = torch.as_tensor(in_time(self.clock, t.reshape(-1)))
        return (matrix @ self.flux(face)).reshape(t.shape)

    def _kept(self, t: float | None) -> int:
        near = find(self.times, self.times[-1] if t is None else t)
        if near is None:
            raise InputError("t", t, f"one of the kept times {self.times.tolist()}", f"law(..., save=[{t}])")
        return near

    def __repr__(self) -> str:
        return f"Law({self.grid!r}, {len(self.times)} times)"


def law(
    problem: KolmogorovProblem,
    initial: Any,
    *,
    rtol: float = 1e-3,
    atol: float = 1e-6,
    discretization: Discretization | None = None,
    grid: Any = None,
    steps: int | None = None,
    save: Sequence[float] | None = None,
) -> Law:
    r"""Law of the process at the horizon, differentiable in every torch parameter of the process and in the start.

    .. math:: p_{k+1} = S_k^{\mathsf T} p_k, \qquad E f(X_t) = \sum_i p_i f(x_i)

    What ``solve_forward`` computes, as tensors: for maximum likelihood from an observed density, from samples at given
    times, or from first-passage times. Gradients are those of the discretisation: the derivative of a transposed march
    is a march back.

    Parameters
    ----------
    problem : KolmogorovProblem
        The process, its faces and killing, and the horizon.
    initial : callable or array_like
        Density ``initial(x)`` -> ``(...)`` in torch; or points of shape (n, d), each of mass 1/n; or one point (d,).
    rtol, atol : float
        Tolerance for the expected terminal value by which a discretisation is planned; inside ``minimize`` once.
    discretization : Discretization, optional
        A frozen recipe.
    grid, steps
        Fixed discretisation instead, as in ``solve``.
    save : sequence of float, optional
        Times kept besides the horizon; they have to be time nodes (with ``grid`` and ``steps`` they become such).

    Returns
    -------
    Law

    Raises
    ------
    InputError
        For bad input; the message names the argument.

    Examples
    --------
    The likelihood of samples, differentiated with respect to the drift:

    >>> import torch, kolmo
    >>> from kolmo import control
    >>> speed = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    >>> bm = kolmo.SDE(lambda t, x: speed + 0 * x, 1.0, dim=1)
    >>> problem = kolmo.KolmogorovProblem(bm, lambda x: x[..., 0], 1.0, kolmo.Box(-6.0, 6.0))
    >>> density = control.law(problem, [0.0], grid=121, steps=16)
    >>> samples = torch.tensor([0.2, 0.9, 1.3])
    >>> torch.autograd.grad(density(samples).log().sum(), speed)[0].round(decimals=4)  # Σ (y − speed)
    tensor(0.9000, dtype=torch.float64)
    """
    problem, recipe, kept = _prepared(problem, initial, rtol, atol, discretization, grid, steps, save)
    start = _masses(initial, recipe)
    march = differentiable_march(problem, recipe)
    clock = np.asarray(recipe.times)
    exits = _exits(march.generator)
    indices = [int(np.abs(clock - t).argmin()) for t in kept]
    watched = list(range(len(clock))) if exits else indices
    semis = _assembled(march)
    masses = _spread(march, semis, start, watched)
    flux = _fluxes(march, semis, masses[..., 0], exits) if exits else {}
    weights = masses[[watched.index(k) for k in indices]][..., 0]
    if 0 in indices:
        weights = torch.cat([start.T, weights[1:]])
    return Law(weights, clock[indices], clock, recipe.grid, recipe, flux, _reading_tensors(march.generator))


def transition_density(
    problem: KolmogorovProblem,
    x: Any,
    y: Any,
    *,
    rtol: float = 1e-3,
    atol: float = 1e-6,
    discretization: Discretization | None = None,
    grid: Any = None,
    steps: int | None = None,
) -> torch.Tensor:
    r"""Transition densities p(y_i | x_i) over the horizon: the likelihood of an observed path is their product.

    .. math:: \log L(\theta) = \sum_i \log p_\theta(T, y_i \mid x_i)

    Parameters
    ----------
    problem : KolmogorovProblem
        The process over the time T between two observations; coefficients that depend on time begin anew each time.
    x, y : array_like or tensor, shape (n, d)
        Where it was and where it was T later.
    rtol, atol, discretization, grid, steps
        As for ``law``.

    Returns
    -------
    torch.Tensor, shape (n,)

    Raises
    ------
    InputError
        For bad input; the message names the argument.

    Examples
    --------
    >>> import torch, kolmo
    >>> from kolmo import control
    >>> ou = kolmo.SDE(lambda t, x: -x, 1.0, dim=1, arrays="torch")
    >>> problem = kolmo.KolmogorovProblem(ou, lambda x: x[..., 0], 0.5, kolmo.Box(-5.0, 5.0))
    >>> control.transition_density(problem, [0.0, 1.0], [0.1, 0.4], grid=121, steps=16).round(decimals=4)
    tensor([0.6985, 0.6633], dtype=torch.float64)
    """
    problem, recipe, _ = _prepared(problem, x, rtol, atol, discretization, grid, steps, None)
    begin, end = (
        torch.as_tensor(as_points(v, problem.dim, n)).reshape(-1, problem.dim) for v, n in ((x, "x"), (y, "y"))
    )
    if begin.shape != end.shape:
        raise InputError("y", f"{len(end)} points", f"{len(begin)} points, one per point of x")
    march = differentiable_march(problem, recipe)
    start = _point_masses(begin, recipe)
    masses = _spread(march, _assembled(march), start, [len(recipe.times) - 1])[0]
    rho = read(masses, recipe.grid, _reading_tensors(march.generator))
    index, weight = recipe.grid.interpolation(end, recipe.width)
    own = rho[torch.as_tensor(index), torch.arange(len(end))[:, None]]
    return (torch.as_tensor(weight) * own).sum(1)


def _prepared(
    problem: KolmogorovProblem,
    initial: Any,
    rtol: float,
    atol: float,
    recipe: Discretization | None,
    grid: Any,
    steps: int | None,
    save: Sequence[float] | None,
) -> tuple[KolmogorovProblem, Discretization, tuple[float, ...]]:
    """The problem in torch, a recipe, and the times kept."""
    if problem.horizon is None:
        raise InputError("problem", "a stationary problem", "a horizon")
    kept = tuple(sorted({float(t) for t in ([] if save is None else save)} | {problem.horizon}))
    if kept[0] < 0 or kept[-1] > problem.horizon:
        raise InputError("save", kept, f"times between 0 and {problem.horizon}")
    if recipe is not None and (grid is not None or steps is not None):
        raise InputError("discretization, grid, steps", "several", "either discretization= or grid= with steps=")
    if recipe is None and grid is not None:
        recipe = prescribe(problem.handing("torch"), grid, steps, "auto", "auto", kept, None)
    if recipe is None:
        if callable(initial):
            raise InputError("discretization", None, "discretization=, or grid= with steps=, for an initial density")
        points = torch.as_tensor(as_points(initial, problem.dim, "initial")).detach().reshape(-1, problem.dim)
        recipe = planned(problem, points, rtol, atol)
    if not SCHEMES[recipe.scheme].smooth:
        raise InputError("discretization", recipe.scheme, "a scheme that is smooth in the coefficients")
    absent = missing(recipe.times, kept)
    if absent:
        raise InputError("save", absent, "time nodes of the discretization", "use grid= and steps= with save=")
    return problem.handing("torch"), recipe, kept


def _masses(initial: Any, recipe: Discretization) -> torch.Tensor:
    """Masses at the nodes, shape (size, 1), of a density function or of points with equal masses."""
    grid = recipe.grid
    if callable(initial):
        rho: torch.Tensor = initial(torch.as_tensor(grid.points)).reshape(-1)
        if rho.shape != (grid.size,):
            raise InputError("initial", f"a result of shape {tuple(rho.shape)}", f"shape {(grid.size,)}")
        return (rho * torch.as_tensor(grid.product([quadrature(axis) for axis in grid.axes])))[:, None]
    points = torch.as_tensor(as_points(initial, grid.dim, "initial")).reshape(-1, grid.dim)
    if len(points) == 0:
        raise InputError("initial", "no samples", "a density function, at least one sample, or a point")
    return _point_masses(points, recipe).mean(1, keepdim=True)


def _point_masses(points: torch.Tensor, recipe: Discretization) -> torch.Tensor:
    """Unit masses at points (n, d) spread over the nodes by the transpose of interpolation, shape (size, n)."""
    index, weight = recipe.grid.interpolation(points, recipe.width)
    start = torch.zeros(recipe.grid.size, len(points), dtype=torch.float64)
    columns = torch.arange(len(points))[:, None].expand(index.shape)
    return start.index_put((torch.as_tensor(index), columns), torch.as_tensor(weight), accumulate=True)


def _assembled(march: March) -> dict[float, Semi]:
    """Semi-discrete equations at all instants, in torch."""
    like = torch.zeros((), dtype=torch.float64)
    return {t: march.generator.at(t, like) for t in sorted({t for plan in march.plans for t in plan.instants})}


def _spread(march: March, semis: dict[float, Semi], start: torch.Tensor, keep: list[int]) -> torch.Tensor:
    """Masses at the time nodes numbered ``keep``, shape (len(keep), size, k)."""
    flow = Steps(march, march.plans, {t: semi.stencil for t, semi in semis.items()})
    tensors = [v for semi in semis.values() for v in (semi.a, semi.load, semi.boundary)]
    masses: torch.Tensor = _Spread.apply(flow, keep, start, *tensors)  # type: ignore[no-untyped-call]
    return masses


class _Spread(torch.autograd.Function):
    """Masses pushed forward by transposed steps; the derivative marches weights back."""

    @staticmethod
    def forward(ctx: Any, flow: Steps, keep: list[int], start: torch.Tensor, *tensors: torch.Tensor) -> Any:
        """Transposed steps from 0 to T."""
        seed(flow, tensors)
        march = flow.march
        p = [np.ascontiguousarray(march.without_boundary(own(start, march)))]
        for plan in reversed(flow.plans):
            p.append(march.prepared(plan)[0].apply_transposed(p[-1])[0])
        ctx.flow, ctx.keep, ctx.masses = flow, keep, p
        ctx.save_for_backward(*tensors)
        return torch.from_numpy(np.stack([p[k] for k in keep]))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        """⟨w, Sᵀ p⟩ = ⟨p, S w⟩: march w back without loads and pull each step back to its numbers."""
        flow, march = ctx.flow, ctx.flow.march
        seed(flow, ctx.saved_tensors)
        given = dict(zip(ctx.keep, own(gradients[0], march), strict=True))
        zero = np.zeros_like(ctx.masses[0])
        w = march.without_boundary(given.get(len(flow.plans), zero))
        numbers: dict[float, np.ndarray] = {}
        for k, plan in zip(range(len(flow.plans), 0, -1), flow.plans, strict=True):
            step, _ = march.prepared(plan)
            nothing = [zero] * len(plan.instants)
            for t, derivative in zip(plan.instants, step.pullback(w, nothing, ctx.masses[k - 1])[2], strict=True):
                numbers[t] = numbers[t] + derivative if t in numbers else derivative
            w = step.apply(w, nothing) + march.without_boundary(given.get(k - 1, zero))
        parts: list[Any] = [torch.from_numpy(np.ascontiguousarray(w))]
        for t in flow.stencils:
            parts += [torch.from_numpy(np.ascontiguousarray(numbers[t])), None, None]
        return (None, None, *parts)


def read(masses: torch.Tensor, grid: Grid, matrices: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Point values of densities from masses (size, k), see ``kolmo.forward.readings``."""
    rho = masses.reshape(*grid.shape, -1)
    for i, matrix in enumerate(matrices):
        rho = torch.tensordot(matrix, rho, dims=([1], [i])).movedim(0, i)
    return rho.reshape(grid.size, -1)


def _reading_tensors(generator: Generator) -> tuple[torch.Tensor, ...]:
    return tuple(torch.as_tensor(matrix.toarray()) for matrix in readings(generator))


def _exits(generator: Generator) -> dict[Exit, Any]:
    """Ways out: absorbing and elastic faces, and killing."""
    faces: dict[Exit, Any] = {
        (i, s): face
        for i, pair in enumerate(generator.box.faces)
        for s, face in enumerate(pair)
        if isinstance(face, (Absorbing, Robin))
    }
    return faces if generator.problem.killing is None else faces | {"killing": None}


def _fluxes(
    march: March, semis: dict[float, Semi], masses: torch.Tensor, exits: dict[Exit, Any]
) -> dict[Exit, torch.Tensor]:
    """Probability per time through every way out at all time nodes: masses times the loads of a sure reward of one."""
    plans: list[StepPlan] = march.plans[::-1]
    # at the end of a step the coefficients are those of the next one; at the horizon its own
    last = plans[-1].instants[-1] if march.generator.autonomous else plans[-1].start
    instants = [plan.instants[-1] for plan in plans] + [last]
    semis = {last: march.generator.at(last, torch.zeros((), dtype=torch.float64))} | semis
    loads = {t: _unit_loads(march.generator, semis[t], t, exits) for t in set(instants)}
    return {e: torch.stack([masses[k] @ loads[t][e] for k, t in enumerate(instants)]) for e in exits}


def _unit_loads(generator: Generator, semi: Semi, t: float, exits: dict[Exit, Any]) -> dict[Exit, torch.Tensor]:
    """Per way out, the load (size,) of a reward of one paid there."""
    grid, x = generator.grid, torch.as_tensor(generator.grid.points)
    free = torch.as_tensor((~generator.fixed).astype(float))
    owned: dict[Exit, np.ndarray] = {}
    for key, face in exits.items():
        if isinstance(face, Absorbing) and isinstance(key, tuple):
            mine = held(grid, key[0], key[1], face).astype(float)
            # shared nodes belong to the later axis, as their values do
            owned = {k: v * (1.0 - mine) for k, v in owned.items()} | {key: mine}
    loads = {k: semi.stencil.apply(semi.a, torch.as_tensor(v)[:, None])[:, 0] * free for k, v in owned.items()}
    elastic = {key: face for key, face in exits.items() if isinstance(face, Robin)}
    if elastic:
        local = generator.local(t, x)
        local = Local(local.A, local.S, local.c, torch.zeros(grid.size, 1, dtype=torch.float64))
        kappa = {k: generator.problem.on_face(f.kappa, t, x[wall_nodes(grid, *k)]) for k, f in elastic.items()}
        for paying in elastic:
            data: Any = {k: (v, (v if k == paying else 0.0 * v)[:, None]) for k, v in kappa.items()}
            assembly = generator.scheme.assemble(semi.stencil, local, FaceData(data), generator.metric)
            loads[paying] = assembly.load[:, 0]
    if "killing" in exits:
        loads["killing"] = free * generator.problem.rate(t, generator.places(x))
    return loads


def in_time(clock: np.ndarray, t: np.ndarray) -> np.ndarray:
    """Matrix (m, len(clock)) of local Lagrange interpolation from the time nodes to times.

    Examples
    --------
    >>> clock = np.array([0.0, 0.5, 0.8, 1.0, 1.5])
    >>> bool(np.allclose(in_time(clock, np.array([0.3, 1.2])) @ clock**3, [0.027, 1.728]))
    True
    """
    w = min(TIME_NODES, len(clock))
    start = np.clip(np.searchsorted(clock, t, side="right") - 1 - (w - 1) // 2, 0, len(clock) - w)
    nodes = clock[start[:, None] + np.arange(w)]
    matrix = np.zeros((len(t), len(clock)))
    for j in range(w):
        others = np.delete(nodes, j, 1)
        matrix[np.arange(len(t)), start + j] = ((t[:, None] - others) / (nodes[:, j, None] - others)).prod(1)
    return matrix
