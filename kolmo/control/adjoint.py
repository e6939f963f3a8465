"""The discrete adjoint as torch functions: marches and stationary solves, differentiable twice, kept or repeated."""

from collections.abc import Sequence
from itertools import combinations
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint

from kolmo.arrays import Array, as_like, as_numpy, contiguous
from kolmo.control.checkpoints import check, keeps_stages, split
from kolmo.discretization import Discretization
from kolmo.march import March, StepPlan
from kolmo.problem import KolmogorovProblem
from kolmo.problem.rest import at_rest
from kolmo.schemes.generator import Semi
from kolmo.stationary import solve_stationary
from kolmo.steppers.base import Operator
from kolmo.steppers.dual import DualOperator, DualStencil, halves

Pulled = tuple[Array, dict[float, Any], dict[float, Any], dict[float, Any]]
"""Derivatives with respect to the first state, and per instant to stencil numbers, load and boundary values."""


def own(x: torch.Tensor, march: March) -> Array:
    """A tensor's values as the march takes them, contiguous: NumPy, or a tensor on its device."""
    return contiguous(as_like(x.detach(), march.like))


def on_host(x: torch.Tensor) -> np.ndarray:
    """A tensor's values in NumPy, contiguous."""
    return np.asarray(contiguous(as_numpy(x)))


def tensor_like(problem: KolmogorovProblem) -> torch.Tensor:
    """A number on the device where the coefficients of a problem are assembled."""
    return torch.zeros((), dtype=torch.float64, device=problem.device)


def march_like(problem: KolmogorovProblem) -> torch.Tensor | None:
    """A tensor where a march stays on a device; None on the CPU, where NumPy's kernels are the faster ones."""
    like = tensor_like(problem)
    return None if like.device.type == "cpu" or problem.stationary else like


def differentiable_march(problem: KolmogorovProblem, recipe: Discretization) -> March:
    """The march of a problem on a recipe, its stencils laid out for what the covariance may become.

    Stencils leave out mixed derivatives where there is no correlation. A correlation that is zero only at the present
    parameters is not left out: its derivative would be zero too, silently.
    """
    couples = problem.dim > 1 and not problem.sde.noiseless
    return recipe.march(problem, march_like(problem), _coupled(problem, recipe) if couples else None)


def _coupled(problem: KolmogorovProblem, recipe: Discretization) -> np.ndarray:
    """Which entries of the covariance off the diagonal depend on a parameter, shape (d, d)."""
    problem = at_rest(problem, recipe.grid.box)
    d, points = problem.dim, recipe.grid.points
    depends = np.zeros((d, d), dtype=bool)
    # in the middle of the last interval
    t = 0.5 * ((problem.horizon or 0.0) + max(problem.sde.breakpoints, default=0.0))
    with torch.enable_grad():
        S = problem.sde.covariance(t, as_like(points[:: max(1, len(points) // 64)], tensor_like(problem)))
        leaves = _leaves(S)
        for i, j in combinations(range(d), 2) if leaves else ():
            entry = S[:, i, j]
            weights = torch.linspace(1.0, 2.0, len(entry), dtype=torch.float64, device=entry.device)
            found = torch.autograd.grad((weights * entry).sum(), leaves, retain_graph=True, allow_unused=True)
            depends[i, j] = depends[j, i] = any(g is not None and bool((g != 0).any()) for g in found)
    return depends


def _leaves(v: torch.Tensor) -> list[torch.Tensor]:
    """The leaf tensors that a tensor depends on."""
    seen, open_, leaves = set(), [v.grad_fn], []
    while open_:
        node: Any = open_.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.append(node.variable)
        open_ += [after for after, _ in node.next_functions]
    return leaves


class Taken:
    """A march with the numbers of the flow that was run last: on the way back are the factors of the way there.

    Flows of one sweep share one: between their turns they keep nothing.

    Parameters
    ----------
    march : March
        The steps.
    """

    def __init__(self, march: March) -> None:
        self.march = march
        self._latest: tuple[Flow, March] | None = None

    def by(self, flow: "Flow", tensors: Sequence[torch.Tensor]) -> March:
        """The march with the numbers, loads and boundary values of a flow, assembled in torch."""
        if self._latest is None or self._latest[0] is not flow:
            self._latest = None  # before the next is made: one at a time
            self._latest = flow, self.march.holding(self._semis(flow, tensors))
        return self._latest[1]

    def _semis(self, flow: "Flow", tensors: Sequence[torch.Tensor]) -> dict[float, tuple[Semi, Operator]]:
        march, parts = self.march, [own(v, self.march) for v in tensors]
        found = {}
        for j, (t, stencil) in enumerate(flow.stencils.items()):
            a, load, boundary = parts[3 * j : 3 * j + 3]
            operator = Operator(stencil, a, march.fixed, flow.active.get(t), march.mask)
            found[t] = (Semi(stencil, a, load, boundary), operator)
        return found


class Flow(Protocol):
    """A map (first state, stencil numbers, loads, boundary values) → last state, with its transposes.

    The numbers are in the march that it is run on.
    """

    taken: Taken
    stencils: dict[float, Any]
    """Per instant, in order, the stencil of the numbers there."""
    active: dict[float, np.ndarray | None]
    """Per instant, which numbers' derivatives are wanted; where nothing is said, all."""

    def run(self, march: March, u: Array) -> tuple[Array, list[Array]]:
        """Last state, and what ``pull`` needs."""
        ...

    def pull(self, march: March, kept: list[Array], p: Array) -> Pulled:
        """Derivatives of ⟨p, last state⟩."""
        ...


class Steps:
    """Some consecutive steps of a march, from the free part of a state to the next.

    Parameters
    ----------
    taken : Taken
        The march.
    plans : sequence of StepPlan
        The steps.
    semis : dict
        Per instant of the steps, the semi-discrete equation.
    stages : bool
        Keep the states of stages too.
    """

    def __init__(self, taken: Taken, plans: Sequence[StepPlan], semis: dict[float, Semi], stages: bool = False) -> None:
        self.taken, self.plans, self.stages = taken, plans, stages
        self.stencils = {t: semi.stencil for t, semi in semis.items()}
        self.active = {t: semi.active for t, semi in semis.items()}

    def run(self, march: March, u: Array) -> tuple[Array, list[Array]]:
        """March, keeping the states that the transpose needs."""
        last, kept = march.descend(march.without_boundary(u), self.plans, self.stages)
        return contiguous(last), kept

    def pull(self, march: March, kept: list[Array], p: Array) -> Pulled:
        """March transposed; every stage gives its share of the derivatives."""
        return march.gradient(kept, p, self.plans)


class Still:
    """Free part of the stationary solution, Q u + r = 0; its first state is not used.

    Parameters
    ----------
    taken : Taken
        Holds the operator.
    semis : dict
        The semi-discrete equation, at instant 0.
    """

    def __init__(self, taken: Taken, semis: dict[float, Semi]) -> None:
        self.taken = taken
        self.stencils = {t: semi.stencil for t, semi in semis.items()}
        self.active: dict[float, np.ndarray | None] = {}

    def run(self, march: March, u: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
        """Solve Q u + r = 0."""
        solution = np.ascontiguousarray(march.without_boundary(solve_stationary(march)))
        return solution, [solution]

    def pull(self, march: March, kept: list[np.ndarray], p: np.ndarray) -> Pulled:
        """Solve Qᵀ q = −p."""
        semi, _, _ = march.ingredients(0.0)
        q = march.without_boundary(solve_stationary(march, weights=march.without_boundary(p)))
        numbers = semi.stencil.pullback(q, kept[0] + semi.boundary)
        values = semi.stencil.apply_transposed(semi.a, q)
        return np.zeros_like(p), {0.0: numbers}, {0.0: q}, {0.0: values}


def _dual(flow: Flow, tensors: Sequence[torch.Tensor], tangents: Sequence[torch.Tensor | None]) -> March:
    """The march of a flow on states stacked with their tangents, for tangents of numbers, loads and boundary values.

    In NumPy: the dual numbers of the march are made of sparse matrices.
    """
    march = flow.taken.march
    fixed = None if march.fixed is None else np.concatenate([march.fixed, march.fixed])
    pairs = []
    for v, w in zip(tensors, tangents, strict=True):
        value = on_host(v)
        pairs.append((value, np.zeros_like(value) if w is None else on_host(w)))
    semis: dict[float, tuple[Semi, Operator]] = {}
    for j, (t, plain) in enumerate(flow.stencils.items()):
        stencil, a = DualStencil(plain), np.stack(pairs[3 * j])
        load, boundary = (np.concatenate(pair) for pair in pairs[3 * j + 1 : 3 * j + 3])
        semis[t] = (Semi(stencil, a, load, boundary), DualOperator(stencil, a, fixed))
    return march.holding(semis, doubled=True)


def _tensors(
    flow: Flow, pulled: Pulled, like: torch.Tensor, first: Any = lambda v: v, half: Any = lambda v: v
) -> list[Any]:
    """Derivatives in the order of the inputs: first state, then numbers, load and boundary values per instant."""
    p, numbers, loads, values = pulled
    result: list[Any] = [as_like(contiguous(half(p)), like)]
    for t in flow.stencils:
        for part, pick in ((numbers, first), (loads, half), (values, half)):
            result.append(as_like(contiguous(pick(part[t])), like) if t in part else None)
    return result


class _Map(torch.autograd.Function):
    """A flow as a torch function of its first state and everything it is made of."""

    @staticmethod
    def forward(ctx: Any, flow: Flow, start: torch.Tensor, *tensors: torch.Tensor) -> Any:
        """Run, keeping what the transpose needs."""
        march = flow.taken.by(flow, tensors)
        last, kept = flow.run(march, own(start, march))
        ctx.flow, ctx.count = flow, len(tensors)
        # saved as tensors, so that torch's checkpoints can drop them
        ctx.save_for_backward(start, *tensors, *(torch.as_tensor(u) for u in kept))
        return as_like(last, start)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        """The transposed flow, itself differentiable."""
        start, *rest = ctx.saved_tensors
        tensors, kept = rest[: ctx.count], [own(u, ctx.flow.taken.march) for u in rest[ctx.count :]]
        pulled = _Transpose.apply(ctx.flow, kept, gradients[0], start, *tensors)  # type: ignore[no-untyped-call]
        return (None, *pulled)


class _Transpose(torch.autograd.Function):
    """The transposed flow as a torch function; its derivative is the adjoint of the tangent flow."""

    @staticmethod
    def forward(
        ctx: Any, flow: Flow, kept: list[Array], p: torch.Tensor, start: torch.Tensor, *tensors: torch.Tensor
    ) -> Any:
        """Derivatives of ⟨p, last state⟩ with respect to the first state, numbers, loads and boundary values."""
        march = flow.taken.by(flow, tensors)
        ctx.flow = flow
        ctx.save_for_backward(p, start, *tensors)
        return tuple(_tensors(flow, flow.pull(march, kept, own(p, march)), p))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *directions: torch.Tensor) -> Any:
        """Tangent of the flow along the directions, then the transpose of that."""
        p, start, *tensors = ctx.saved_tensors
        flow, march = ctx.flow, _dual(ctx.flow, tensors, directions[1:])
        last, kept = flow.run(march, np.concatenate([on_host(v) for v in (start, directions[0])]))
        weights = on_host(p)
        pulled = flow.pull(march, kept, np.concatenate([np.zeros_like(weights), weights]))
        tangent = as_like(contiguous(halves(last)[1]), p)
        return (None, None, tangent, *_tensors(flow, pulled, p, lambda v: v[0], lambda v: halves(v)[0]))


def pieces(march: March) -> list[list[StepPlan]]:
    """The steps of a march from one event to the next."""
    found: list[list[StepPlan]] = [[]]
    for plan in march.plans:
        found[-1].append(plan)
        if plan.end in march.events and plan is not march.plans[-1]:
            found.append([])
    return found


def instants(plans: Sequence[StepPlan]) -> list[float]:
    """Times at which some steps need coefficients, in order."""
    return sorted({t for plan in plans for t in plan.instants})


def assembled(march: March, plans: Sequence[StepPlan]) -> dict[float, Semi]:
    """Semi-discrete equations in torch at the instants of some steps."""
    like = tensor_like(march.generator.problem)
    return {t: march.generator.at(t, like) for t in instants(plans)}


def numbers_of(semis: dict[float, Semi]) -> list[torch.Tensor]:
    """Stencil numbers, load and boundary values of every instant, in the order in which a flow takes them."""
    return [v for semi in semis.values() for v in (semi.a, semi.load, semi.boundary)]


def with_faces(march: March, u: torch.Tensor, t: float) -> torch.Tensor:
    """A state in torch with the absorbing values of a time put in; with gradients."""
    if march.fixed is None:
        return u
    free = torch.as_tensor(~march.fixed, dtype=u.dtype, device=u.device)[:, None]
    whole: torch.Tensor = u * free + march.generator.boundary(t, march.generator.nodes(u))
    return whole


class Sweep:
    """u(0) from terminal data through all steps of a march, keeping at most so many states for the gradient.

    Coefficients constant in time are assembled once; those of other steps when they are needed, so that what torch
    keeps of them is dropped and made again together with the states.

    Parameters
    ----------
    march : March
        The march.
    checkpoints : int or None
        States kept at once; None: all.
    """

    def __init__(self, march: March, checkpoints: int | None) -> None:
        self.march, self.taken = march, Taken(march)
        self.checkpoints = None if checkpoints is None else check(checkpoints, len(march.plans))
        constant = len(instants(march.plans)) == 1
        self._shared = assembled(march, march.plans) if constant or checkpoints is None else None

    def __call__(self, terminal: torch.Tensor) -> torch.Tensor:
        """Free part of the state at time 0."""
        u, like = terminal, tensor_like(self.march.generator.problem)
        for plans in pieces(self.march):
            u = self._reverse(u, plans, self.checkpoints)
            crossing = self.march.crossing(plans[-1].end, like)
            if crossing is not None:
                u = crossing.apply(with_faces(self.march, u, plans[-1].end))
        return u

    def _leaf(self, u: torch.Tensor, plans: Sequence[StepPlan]) -> torch.Tensor:
        semis = self._shared or assembled(self.march, plans)
        stages = keeps_stages(len(plans), self.checkpoints, self.march.stepper, 8 * u.numel())
        return apply(Steps(self.taken, plans, semis, stages), u, semis)

    def _reverse(self, u: torch.Tensor, plans: Sequence[StepPlan], kept: int | None) -> torch.Tensor:
        """Revolve as nested checkpoints: what comes before the split is made again, from its first state."""
        if kept is None or len(plans) <= kept:
            return self._leaf(u, plans)
        left = split(len(plans), kept)
        middle: torch.Tensor = checkpoint(
            self._reverse, u, plans[:left], kept, use_reentrant=False, preserve_rng_state=False
        )
        return self._reverse(middle, plans[left:], kept - 1)


def apply(flow: Flow, start: torch.Tensor, semis: dict[float, Semi]) -> torch.Tensor:
    """The last state of a flow, with gradients."""
    result: torch.Tensor = _Map.apply(flow, start, *numbers_of(semis))  # type: ignore[no-untyped-call]
    return result
