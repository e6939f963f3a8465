"""The law of the process as tensors: densities, expectations and first-passage rates that carry gradients."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from kolmo.arrays import as_points, at_home
from kolmo.control.adjoint import Steps, Taken, assembled, differentiable_march, instants, numbers_of, own, pieces
from kolmo.control.plans import planned
from kolmo.discretization import Discretization
from kolmo.errors import InputError
from kolmo.forward import Exit, WaysOut, initial_at_rest, initial_masses, readings
from kolmo.forward.exits import Passages
from kolmo.grid import Grid
from kolmo.grid.times import find, missing
from kolmo.march import March, StepPlan
from kolmo.problem import KolmogorovProblem
from kolmo.problem.motion import Motion
from kolmo.problem.rest import at_rest
from kolmo.refine.plan import prescribe
from kolmo.schemes.base import SCHEMES
from kolmo.schemes.generator import Generator, Semi
from kolmo.shown import Shown


@dataclass(frozen=True, eq=False)
class Law(Shown, Passages):
    r"""Law of the process as tensors with gradients, by the transposes of the steps that ``solve`` takes.

    Attributes
    ----------
    weights : tensor, shape (nt, size)
        Masses p at the nodes at ``times``: :math:`E f(X_t) = \sum_i p_i f(x_i)`.
    times : ndarray, shape (nt,)
        Times kept, increasing; the horizon is the last.
    clock : ndarray, shape (steps + 1,)
        All time nodes, for ``flux`` and ``exited``.
    grid : Grid
        The nodes.
    discretization : Discretization
        The recipe used: pass it on, so that a likelihood does not jump from one call to the next.
    motion : Motion or None
        How faces move, with gradients.

    References
    ----------
    H. Risken (1989), The Fokker–Planck Equation, second edition.

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
    _gone: dict[Exit, torch.Tensor]
    _readings: tuple[torch.Tensor, ...]
    motion: Motion | None = None

    @at_home
    def __call__(self, x: Any, t: float | None = None) -> torch.Tensor:
        """Density ρ(t, x) at points (..., d), shape (...); t a kept time (None: the horizon)."""
        which, points = self._kept(t), torch.as_tensor(as_points(x, self.grid.dim))
        rho = self.nodal_density(t)
        if self.motion is not None:
            time = float(self.times[which])
            points, rho = self.motion.inwards(time, points), rho / self.motion.stretch(time, rho)
        values: torch.Tensor = self.grid.interpolate(rho, points, self.discretization.width)
        return values

    def nodal_density(self, t: float | None = None) -> torch.Tensor:
        """Density at the nodes, shape (size,); of faces that move, in the coordinates in which they stand still."""
        return read(self.weights[self._kept(t)][:, None], self.grid, self._readings)[:, 0]

    @at_home
    def expectation(self, function: Callable[[torch.Tensor], torch.Tensor], t: float | None = None) -> torch.Tensor:
        """E[f(X_t); still inside] for ``function(x)`` of points (..., d), shape () or (k,)."""
        which, points = self._kept(t), torch.as_tensor(self.grid.points)
        if self.motion is not None:
            points = self.motion.outwards(float(self.times[which]), points)
        mean: torch.Tensor = torch.tensordot(self.weights[which], function(points).double(), 1)
        return mean

    def mass(self, t: float | None = None) -> torch.Tensor:
        """Probability of being inside still."""
        return self.weights[self._kept(t)].sum(0)

    def flux(self, face: Any) -> torch.Tensor:
        """Probability per time that goes out at ``clock``, shape (steps + 1,): ``exit_flux(face)``."""
        flux: torch.Tensor = self.exit_flux(face)
        return flux

    def exited(self, face: Any) -> torch.Tensor:
        """Probability that has gone out through a face (or by killing) so far, at ``clock``, shape (steps + 1,).

        As the steps themselves let it out: of all ways out, with ``mass``, it sums to one.
        """
        return self.gone(face).cumsum(0)

    def gone(self, face: Any) -> torch.Tensor:
        """The terms of ``exited``, which keep their digits however small: what starts there, and that of each step."""
        return self._gone[self._exit(face)]

    def __repr__(self) -> str:
        return f"Law({self.grid!r}, {len(self.times)} times)"


@at_home
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
        Tolerance for the expected terminal value alone, by which a discretisation is planned; inside ``minimize`` once.
        Densities and fluxes have the accuracy that this grid and clock happen to give them.
    discretization : Discretization, optional
        A frozen recipe: that of ``solve_forward``, for a density or a flux to a tolerance at the present parameters.
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

    References
    ----------
    H. Risken (1989), The Fokker–Planck Equation, second edition.

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
    march = differentiable_march(problem, recipe)
    start = _masses(problem, initial, recipe, march)
    clock = np.asarray(recipe.times)
    exits = WaysOut(march.generator)
    indices = [k for k in (find(clock, t) for t in kept) if k is not None]
    watched = list(range(len(clock))) if exits.names else indices
    semis = assembled(march, march.plans)
    ways = _Ways(exits.names, exits.owned, {t: exits.loads(semi, t) for t, semi in semis.items()})
    masses, gone = _spread(march, semis, start, watched, ways)
    flux = _fluxes(march, masses[..., 0], exits, ways.loads) if exits.names else {}
    weights = masses[[watched.index(k) for k in indices]][..., 0]
    if 0 in indices:
        weights = torch.cat([start.T, weights[1:]])
    reading = _reading_tensors(march.generator)
    return Law(weights, clock[indices], clock, recipe.grid, recipe, flux, gone, reading, problem.motion)


@at_home
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

    References
    ----------
    H. Risken (1989), The Fokker–Planck Equation, second edition.

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
    if problem.motion is not None:
        begin = problem.motion.inwards(0.0, begin)
        end = problem.motion.inwards(problem.horizon or 0.0, end)
    start = _point_masses(begin, recipe)
    nobody_asks = _Ways((), {}, {})
    masses = _spread(march, assembled(march, march.plans), start, [len(recipe.times) - 1], nobody_asks)[0][0]
    rho = read(masses, recipe.grid, _reading_tensors(march.generator))
    index, weight = recipe.grid.interpolation(end, recipe.width)
    own = rho[torch.as_tensor(index), torch.arange(len(end))[:, None]]
    density = (torch.as_tensor(weight) * own).sum(1)
    return density if problem.motion is None else density / problem.motion.stretch(problem.horizon or 0.0, density)


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
    horizon = at_rest(problem).horizon or problem.horizon  # earlier where faces meet
    kept = tuple(sorted({float(t) for t in ([] if save is None else save)} | {horizon}))
    if kept[0] < 0 or kept[-1] > horizon:
        raise InputError("save", kept, f"times between 0 and {horizon}")
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
    problem = at_rest(problem.handing("torch"), recipe.grid.box)
    absent = missing(recipe.times, kept)
    if absent:
        raise InputError("save", absent, "time nodes of the discretization", "use grid= and steps= with save=")
    return problem, recipe, kept


def _masses(problem: KolmogorovProblem, initial: Any, recipe: Discretization, march: March) -> torch.Tensor:
    """Masses at the nodes, shape (size, 1), of a density function or of points with equal masses."""
    like = torch.zeros((), dtype=torch.float64)
    given = initial if callable(initial) else torch.as_tensor(as_points(initial, recipe.grid.dim, "initial"))
    given = initial_at_rest(problem, given)
    masses: torch.Tensor = initial_masses(given, recipe, march.generator.box, like)
    return masses


def _point_masses(points: torch.Tensor, recipe: Discretization) -> torch.Tensor:
    """Unit masses at points (n, d) spread over the nodes by the transpose of interpolation, shape (size, n)."""
    index, weight = recipe.grid.interpolation(points, recipe.width)
    start = torch.zeros(recipe.grid.size, len(points), dtype=torch.float64)
    columns = torch.arange(len(points))[:, None].expand(index.shape)
    return start.index_put((torch.as_tensor(index), columns), torch.as_tensor(weight), accumulate=True)


class _Ways(NamedTuple):
    """Ways out that are asked about, nodes on absorbing faces by way, and loads of a sure reward of one by instant."""

    names: tuple[Exit, ...]
    owned: dict[Exit, np.ndarray]
    loads: dict[float, dict[Exit, torch.Tensor]]

    def rewards(self, semis: dict[float, Semi]) -> torch.Tensor:
        """The loads of some instants, shape (instants, ways, size)."""
        return torch.stack([self._rows(self.loads.get(t, {}), semi.a[0]) for t, semi in semis.items()])

    def lying(self, masses: torch.Tensor) -> torch.Tensor:
        """What lies on absorbing faces of masses (size, k), shape (ways,)."""
        rows = self._rows({e: torch.as_tensor(owned) for e, owned in self.owned.items()}, masses[:, 0])
        return rows @ masses.sum(1)

    def _rows(self, fields: Mapping[Exit, torch.Tensor], like: torch.Tensor) -> torch.Tensor:
        """Fields by way out as rows (ways, size), zero where there is none."""
        rows = [fields.get(e, torch.zeros_like(like)) for e in self.names]
        return torch.stack(rows) if rows else like.new_zeros(0, len(like))


def _spread(
    march: March, semis: dict[float, Semi], start: torch.Tensor, keep: list[int], ways: _Ways
) -> tuple[torch.Tensor, dict[Exit, torch.Tensor]]:
    """Masses at the time nodes numbered ``keep``, shape (len(keep), size, k), at an event those after it.

    With them what starts on each of the ways out and goes out in every step, (steps + 1,), of all columns together.
    """
    free = None if march.fixed is None else torch.as_tensor(~march.fixed, dtype=start.dtype)[:, None]
    found: list[torch.Tensor] = []
    gone = [ways.lying(start)[None]]
    first, p, taken = 0, start, Taken(march)
    for plans in reversed(pieces(march)):
        last = first + len(plans)
        mine = {t: semis[t] for t in instants(plans)}
        flow = Steps(taken, plans, mine)
        crossing = march.crossing(plans[0].start, start)
        inside = [k for k in keep if first <= k < last or (k == last and crossing is None)]
        own_keep = [k - first for k in inside]
        asked = [*own_keep, *([] if crossing is None else [len(plans)])]
        masses, out = _Spread.apply(flow, asked, ways.rewards(mine), p, *numbers_of(mine))  # type: ignore[no-untyped-call]
        found.append(masses[: len(own_keep)])
        if crossing is not None:
            after = crossing.apply_transposed(masses[-1])
            out = torch.cat([out[:-1], out[-1:] + ways.lying(after)])
            p = after if free is None else after * free
        gone.append(out)
        first = last
    steps = torch.cat(gone, 0)
    return torch.cat(found, 0), {e: steps[:, j] for j, e in enumerate(ways.names)}


class _Spread(torch.autograd.Function):
    """Masses pushed forward by transposed steps, and what goes out; the derivative marches weights back."""

    @staticmethod
    def forward(
        ctx: Any, flow: Steps, keep: list[int], rewards: torch.Tensor, start: torch.Tensor, *tensors: Any
    ) -> Any:
        """Transposed steps from 0 to T; ``rewards`` (instants, ways, size) tell what goes out by which way."""
        march = flow.taken.by(flow, tensors)
        paid = dict(zip(flow.stencils, own(rewards, march), strict=True))
        p, gone = [np.ascontiguousarray(march.without_boundary(own(start, march)))], []
        for plan in reversed(flow.plans):
            after, loads = march.prepared(plan)[0].apply_transposed(p[-1])
            parts = zip(plan.instants, loads, strict=True)
            gone.append(sum(paid[t] @ march.without_boundary(load).sum(1) for t, load in parts))
            p.append(after)
        ctx.flow, ctx.keep, ctx.masses, ctx.paid = flow, keep, p, paid
        ctx.save_for_backward(*tensors)
        size, ways = len(p[0]), rewards.shape[1]
        masses = np.stack([p[k] for k in keep]) if keep else np.zeros((0, size, p[0].shape[1]))
        return torch.from_numpy(masses), torch.from_numpy(np.reshape(gone, (len(gone), ways)))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        """⟨w, Sᵀ p⟩ = ⟨p, S w⟩: march w back, paid for what goes out, and pull each step back to its numbers."""
        flow, paid = ctx.flow, ctx.paid
        march = flow.taken.by(flow, ctx.saved_tensors)
        given = dict(zip(ctx.keep, own(gradients[0], march), strict=True))
        prices = own(gradients[1], march)
        zero = np.zeros_like(ctx.masses[0])
        w = march.without_boundary(given.get(len(flow.plans), zero))
        numbers: dict[float, np.ndarray] = {}
        rewards = {t: np.zeros_like(fields) for t, fields in paid.items()}
        for k, plan in zip(range(len(flow.plans), 0, -1), flow.plans, strict=True):
            step, price = march.prepared(plan)[0], prices[k - 1]
            loads = [zero + march.without_boundary((price @ paid[t])[:, None]) for t in plan.instants]
            _, out, derivatives = step.pullback(w, loads, ctx.masses[k - 1])
            for t, load, derivative in zip(plan.instants, out, derivatives, strict=True):
                numbers[t] = numbers[t] + derivative if t in numbers else derivative
                rewards[t] += np.outer(price, march.without_boundary(load).sum(1))
            w = step.apply(w, loads) + march.without_boundary(given.get(k - 1, zero))
        of_rewards = torch.from_numpy(np.stack([rewards[t] for t in flow.stencils]))
        parts: list[Any] = [torch.from_numpy(np.ascontiguousarray(w))]
        for t in flow.stencils:
            parts += [torch.from_numpy(np.ascontiguousarray(numbers[t])), None, None]
        return (None, None, of_rewards, *parts)


def read(masses: torch.Tensor, grid: Grid, matrices: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Point values of densities from masses (size, k), see ``kolmo.forward.readings``."""
    rho = masses.reshape(*grid.shape, -1)
    for i, matrix in enumerate(matrices):
        rho = torch.tensordot(matrix, rho, dims=([1], [i])).movedim(0, i)
    return rho.reshape(grid.size, -1)


def _reading_tensors(generator: Generator) -> tuple[torch.Tensor, ...]:
    return tuple(torch.as_tensor(matrix.toarray()) for matrix in readings(generator))


def _fluxes(
    march: March, masses: torch.Tensor, exits: WaysOut, loads: dict[float, dict[Exit, torch.Tensor]]
) -> dict[Exit, torch.Tensor]:
    """Probability per time through every way out at all time nodes: masses times the loads of a sure reward of one."""
    plans: list[StepPlan] = march.plans[::-1]
    # at the end of a step the coefficients are those of the next one; at the horizon its own
    last = plans[-1].instants[-1] if march.generator.autonomous else plans[-1].start
    moments = [plan.instants[-1] for plan in plans] + [last]
    if last not in loads:
        like = torch.zeros((), dtype=torch.float64)
        loads = loads | {last: exits.loads(march.generator.at(last, like), last)}
    return {e: torch.stack([masses[k] @ loads[t][e] for k, t in enumerate(moments)]) for e in exits.names}
