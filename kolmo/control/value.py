"""The differentiable primitive: u(0, x) with the exact gradient of the number returned."""

from typing import Any

import torch

from kolmo.arrays import as_like, as_points, at_home
from kolmo.control.adjoint import (
    Still,
    Sweep,
    Taken,
    apply,
    assembled,
    differentiable_march,
    instants,
    numbers_of,
    tensor_like,
)
from kolmo.control.checkpoints import GradientMemory
from kolmo.control.plans import Asked, on_plan
from kolmo.control.switches import warn_of_jumps
from kolmo.discretization import Discretization
from kolmo.errors import InputError
from kolmo.limits import part_of
from kolmo.march import March
from kolmo.problem import KolmogorovProblem
from kolmo.problem.rest import at_rest
from kolmo.schemes.base import SCHEMES


@at_home
def value(
    problem: KolmogorovProblem,
    x: Any,
    *,
    rtol: float = 1e-3,
    atol: float = 1e-6,
    discretization: Discretization | None = None,
    checkpoints: int | None = None,
    memory: float | None = None,
    max_seconds: float | None = None,
    max_cells: int | None = None,
) -> torch.Tensor:
    r"""u(0, x) as a tensor that carries the exact gradient of the number returned.

    .. math::
        u(0, x) = E\Big[e^{-\int_0^T c}\varphi(X_T) + \int_0^T e^{-\int_0^t c} g\,dt \,\Big|\, X_0 = x\Big]

    The gradient is with respect to x and every torch parameter in drift, diffusion or covariance, killing, source,
    terminal, boundary values and the places of faces. It is that of the discretisation (transposed steps, no continuous
    adjoint equation): with a tolerance, of the plan frozen at the present parameters.

    Parameters
    ----------
    problem : KolmogorovProblem
        Its functions are handed torch tensors (float64).
    x : array_like or tensor, shape (..., d)
        Points. On a device other than the CPU, everything is computed there (coefficients are handed tensors on it).
    rtol, atol : float
        Tolerance by which a discretisation is planned, unless one is given. The plan is kept for calls with problems
        of the same structure (the same functions, with other parameters), while the levels that it was found by agree
        within the tolerance; inside ``control.minimize`` for all of it.
    discretization : Discretization, optional
        A frozen recipe from ``kolmo.plan``: the value is that on it, whatever its error.
    checkpoints : int, optional
        States kept for the gradient, at least 2; the others are computed again. None: all. The gradient is the same to
        rounding; ``gradient_memory`` states the peak beforehand.
    memory : float, optional
        Bytes that the gradient may keep, instead of ``checkpoints``.
    max_seconds, max_cells : optional
        Time for all, and largest grid, when planning by tolerance; defaults as in ``kolmo.plan``.

    Returns
    -------
    torch.Tensor, shape (...[, k])

    Raises
    ------
    InputError
        For bad input; the message names the argument.

    Warns
    -----
    KolmoWarning
        Where terminal data, a coefficient or the value of a face jump at a place or time that a parameter moves, as
        1{x > K} does: autograd has no derivative for it.

    References
    ----------
    M. B. Giles and N. A. Pierce (2000), An introduction to the adjoint approach to design, Flow, Turbulence and
    Combustion 65.

    Examples
    --------
    >>> import torch, kolmo
    >>> from kolmo import control
    >>> kappa = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    >>> ou = kolmo.SDE(lambda t, x: -kappa * x, diffusion=1.0, dim=1)
    >>> problem = kolmo.KolmogorovProblem(ou, lambda x: x[..., 0], 1.0)
    >>> u = control.value(problem, torch.tensor([1.0]), rtol=1e-6)
    >>> u.sum().backward()
    >>> round(float(kappa.grad), 4)  # d/dκ exp(−κ)
    -0.3679
    """
    points = torch.as_tensor(as_points(x, problem.dim))

    def evaluate(recipe: Discretization) -> tuple[torch.Tensor, torch.Tensor]:
        return _on(problem, points, recipe, checkpoints, memory)

    if discretization is not None:
        return evaluate(discretization)[0]
    asked = Asked(rtol, atol, part_of(max_seconds), max_cells)
    return on_plan(problem, points.detach(), asked, evaluate)


def _on(
    problem: KolmogorovProblem,
    points: torch.Tensor,
    recipe: Discretization,
    checkpoints: int | None,
    memory: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Values at the points (...[, k]) and the state on the grid (size, k), by a recipe."""
    if recipe.grid.dim != problem.dim:
        raise InputError("discretization", f"{recipe.grid.dim} dimensions", f"{problem.dim} dimensions")
    problem = at_rest(problem.handing("torch", points.device), recipe.grid.box)
    points = points if problem.motion is None else problem.motion.inwards(0.0, points)
    if memory is not None and not problem.stationary:
        checkpoints = gradient_memory(problem, recipe, checkpoints=checkpoints, memory=memory).checkpoints
    u = grid_value(problem, recipe, checkpoints)
    columns = u if recipe.march(problem).generator.columns is not None else u[:, 0]
    values: torch.Tensor = recipe.grid.interpolate(columns, points, recipe.width)
    return values, u


def grid_value(
    problem: KolmogorovProblem, discretization: Discretization, checkpoints: int | None = None
) -> torch.Tensor:
    """u(0, ·) at the nodes, shape (size, k), with gradients; of all states at most ``checkpoints`` are kept."""
    problem = at_rest(problem, discretization.grid.box)
    march = differentiable_march(problem, discretization)
    generator, like = march.generator, tensor_like(problem)
    if not SCHEMES[discretization.scheme].smooth:
        raise InputError("discretization", discretization.scheme, "a scheme that is smooth in the coefficients")
    warn_of_jumps(problem, generator, like)
    if problem.stationary:
        semi = generator.at(0.0, like)
        state = apply(Still(Taken(march), {0.0: semi}), torch.zeros_like(semi.load), {0.0: semi})
    else:
        terminal = discretization.initial(March(generator, march.stepper, march.times, like))
        state = Sweep(march, checkpoints)(terminal)
    if march.fixed is not None:
        state = state + generator.boundary(0.0, generator.nodes(like))
    return state


@at_home
def gradient_memory(
    problem: KolmogorovProblem,
    discretization: Discretization,
    *,
    checkpoints: int | None = None,
    memory: float | None = None,
) -> GradientMemory:
    r"""What the gradient of ``value`` will keep, and what it will cost, stated before it runs.

    With c states kept at once and no step taken more than r times again, the binomial schedule reverses
    :math:`\binom{c + r}{r + 1}` steps (Griewank & Walther 2000): memory falls like the logarithm of the number of
    steps where the time rises like it.

    Parameters
    ----------
    problem : KolmogorovProblem
        With a horizon.
    discretization : Discretization
        The recipe that will be marched.
    checkpoints : int, optional
        States kept at once, enough for the steps (2 for 20, 4 for 2000). None: all, or what ``memory`` allows.
    memory : float, optional
        Largest number of bytes to keep; the schedule within it that repeats the fewest steps is chosen.

    Returns
    -------
    GradientMemory

    Raises
    ------
    InputError
        For too few checkpoints, both limits at once, or a budget that no schedule meets.

    Examples
    --------
    >>> import kolmo
    >>> from kolmo import control
    >>> bm = kolmo.SDE(0.0, diffusion=1.0, dim=1)
    >>> problem = kolmo.KolmogorovProblem(bm, lambda x: x[..., 0] ** 2, 1.0, kolmo.Box(-5.0, 5.0))
    >>> recipe = kolmo.solve(problem, grid=101, steps=64).discretization
    >>> control.gradient_memory(problem, recipe, checkpoints=8).repeated  # steps taken again
    98
    """
    if problem.stationary:
        raise InputError("problem", "a stationary problem", "a horizon", "a stationary gradient keeps one state")
    if checkpoints is not None and memory is not None:
        raise InputError("checkpoints, memory", "both", "one of them")
    problem = at_rest(problem.handing("torch"), discretization.grid.box)
    march = differentiable_march(problem, discretization)
    constant = len(instants(march.plans)) == 1
    state = 8 * discretization.grid.size * (march.generator.columns or 1)
    kept = _bytes_of_step(march)
    if memory is not None:
        return GradientMemory.within(memory, len(march.plans), march.stepper, state, kept, constant)
    return GradientMemory.of(len(march.plans), checkpoints, march.stepper, state, kept, constant)


def _bytes_of_step(march: March) -> int:
    """Bytes of the coefficients of a step, with what torch saves to differentiate them."""
    saved: dict[int, torch.UntypedStorage] = {}  # kept, or another could come to lie at the same address

    def note(v: torch.Tensor) -> torch.Tensor:
        saved[v.untyped_storage().data_ptr()] = v.untyped_storage()
        return v

    with torch.autograd.graph.saved_tensors_hooks(note, lambda v: v):
        for v in numbers_of(assembled(march, march.plans[:1])):
            note(v)
    return sum(storage.nbytes() for storage in saved.values())


@at_home
def expected_value(
    problem: KolmogorovProblem,
    x: Any,
    weights: Any = None,
    *,
    rtol: float = 1e-3,
    atol: float = 1e-6,
    discretization: Discretization | None = None,
    checkpoints: int | None = None,
    memory: float | None = None,
    max_seconds: float | None = None,
    max_cells: int | None = None,
) -> torch.Tensor:
    r"""Weighted sum of values, :math:`J = \sum_i w_i\,u(0, x_i)`, with its exact gradient.

    Parameters
    ----------
    problem, rtol, atol, discretization, checkpoints, memory, max_seconds, max_cells
        As for ``value``.
    x : array_like or tensor, shape (n, d)
        Points.
    weights : array_like or tensor, optional
        None: 1 each. Shape (n,): the result has shape () or (k,). Shape (n, k): the result is a scalar.

    Returns
    -------
    torch.Tensor

    Raises
    ------
    InputError
        If the weights do not fit the points and columns.

    References
    ----------
    M. B. Giles and N. A. Pierce (2000), An introduction to the adjoint approach to design, Flow, Turbulence and
    Combustion 65.

    Examples
    --------
    >>> import kolmo
    >>> from kolmo import control
    >>> bm = kolmo.SDE(0.0, diffusion=1.0, dim=1)
    >>> problem = kolmo.KolmogorovProblem(bm, lambda x: x[..., 0] ** 2, 1.0)
    >>> round(float(control.expected_value(problem, [0.0, 1.0], [0.5, 0.5], rtol=1e-6)), 4)
    1.5
    """
    u = value(
        problem, x, rtol=rtol, atol=atol, discretization=discretization, checkpoints=checkpoints, memory=memory,
        max_seconds=max_seconds, max_cells=max_cells,
    )  # fmt: skip
    points = as_points(x, problem.dim)
    lead = points.ndim - 1
    if weights is None:
        return u.sum(dim=tuple(range(lead))) if lead else u
    w: torch.Tensor = as_like(weights, u)
    if w.shape == u.shape and u.ndim > lead:
        return (w * u).sum()
    if tuple(w.shape) != tuple(points.shape[:-1]):
        raise InputError(
            "weights",
            f"shape {tuple(w.shape)}",
            f"shape {tuple(points.shape[:-1])} or {tuple(u.shape)} (as the values)",
        )
    return (w[..., None] * u if u.ndim > lead else w * u).sum(dim=tuple(range(lead)))
