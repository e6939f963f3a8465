"""u(0, x) of many problems with the exact gradients of the numbers returned: one plan, one march and its transpose."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from kolmo.arrays import Array, as_like, as_points, at_home
from kolmo.control.value import value
from kolmo.many import Solutions, solve_many
from kolmo.many.front import Members, listed
from kolmo.many.lines import Coefficients, Lines, Marched
from kolmo.problem import KolmogorovProblem
from kolmo.problem.faces import Absorbing


@at_home
def values(
    problems: Sequence[KolmogorovProblem],
    x: Any,
    *,
    rtol: float = 1e-3,
    atol: float = 1e-6,
    plan: Solutions | None = None,
) -> torch.Tensor:
    r"""u(0, x) of many problems, as one tensor that carries the exact gradients of the numbers returned.

    .. math:: v_{pj} = u^p(0, x_j), \qquad \partial_\theta v_{pj} \text{ that of the discrete march}

    As :func:`kolmo.control.value` for each of them, at the price of :func:`kolmo.solve_many`: a calibration builds one
    problem for each row of its parameters, and the sum of squares over all of them is one number to minimise.

    Parameters
    ----------
    problems : sequence of KolmogorovProblem
        Their functions are handed torch tensors (float64). What they have in common is theirs to say: parameters may be
        rows of one tensor, shared, or none.
    x : array_like or tensor, shape (..., d)
        Points, the same for all.
    rtol, atol : float
        Relative and absolute tolerance, for each problem.
    plan : Solutions, optional
        Of ``kolmo.solve_many`` with such problems and these points: its plans are tried first.

    Returns
    -------
    torch.Tensor, shape (P, ...)
        With gradients with respect to x and every parameter in drift, diffusion or covariance, killing, source,
        terminal and absorbing values. Those of problems that are marched together can be taken once: for second
        derivatives there is ``control.value``.

    Raises
    ------
    InputError
        For bad input; the message names the argument.

    References
    ----------
    M. B. Giles and N. A. Pierce (2000), An introduction to the adjoint approach to design, Flow, Turbulence and
    Combustion 65.

    Examples
    --------
    >>> import torch, kolmo
    >>> from kolmo import control
    >>> rates = torch.linspace(0.5, 1.5, 6, dtype=torch.float64, requires_grad=True)
    >>> def problem(rate):
    ...     sde = kolmo.SDE(lambda t, x: -rate * x, diffusion=1.0, dim=1)
    ...     return kolmo.KolmogorovProblem(sde, lambda x: torch.sin(x[..., 0]), 1.0)
    >>> u = control.values([problem(rate) for rate in rates], [0.5], rtol=1e-5)
    >>> u.sum().backward()
    >>> tuple(u.shape), bool((rates.grad < 0).all())
    ((6,), True)
    """
    problems = listed(problems)
    points = torch.as_tensor(as_points(x, problems[0].dim))
    handed = [problem.handing("torch", points.device) for problem in problems]
    found = solve_many(handed, at=points.detach(), rtol=rtol, atol=atol, plan=plan)
    answers: dict[int, torch.Tensor] = {}
    for members in found.members:
        together = _together([handed[i] for i in members.which], members, points)
        answers.update(zip(members.which.tolist(), together, strict=True))
    for i, solution in found.alone.items():
        answers[i] = value(handed[i], points, discretization=solution.discretization)
    return torch.stack([answers[i] for i in range(len(problems))])


def _together(problems: list[KolmogorovProblem], members: Members, points: torch.Tensor) -> torch.Tensor:
    """Answers (P, ...) of problems that one ensemble serves."""
    lines = members.ensemble.levels[-1]
    horizons = np.array([problem.horizon or 0.0 for problem in problems])
    given = _coefficients(problems, lines)
    numbers = lines.numbers(given)
    march = Marched(lines, numbers, horizons)
    u: Any = _Together.apply(march, *numbers, lines.begun(given))  # type: ignore[no-untyped-call]
    read = lines.recipe.grid.interpolate(lines.ended(u, given).T, points, lines.recipe.width)
    return torch.movedim(torch.as_tensor(read), -1, 0)


def _coefficients(problems: list[KolmogorovProblem], lines: Lines) -> Coefficients:
    """Coefficients at the nodes, with gradients."""
    x = torch.as_tensor(lines.places)
    nothing = torch.zeros(len(x), dtype=torch.float64)

    def all_of(f: Any) -> torch.Tensor:
        return torch.stack([f(problem, 0.5 * (problem.horizon or 0.0)) for problem in problems])

    return Coefficients(
        all_of(lambda p, t: p.sde.drift(t, x)[:, 0]),
        all_of(lambda p, t: p.sde.covariance(t, x)[:, 0, 0]),
        all_of(lambda p, t: nothing if p.killing is None else p.rate(t, x)),
        all_of(lambda p, t: nothing if p.source is None else p.running(t, x)),
        all_of(lambda p, t: p.final(x)),
        torch.stack([torch.stack([_paid(face, x) for face in problem.box.faces[0]]) for problem in problems]),
    )


def _paid(face: Any, like: torch.Tensor) -> torch.Tensor:
    """What an absorbing face pays; nothing at others."""
    paid: torch.Tensor = as_like(face.value if isinstance(face, Absorbing) else 0.0, like)
    return paid.reshape(())


class _Together(torch.autograd.Function):
    """All steps of a march of many problems; backwards, the transposed steps."""

    @staticmethod
    def forward(ctx: Any, march: Marched, *given: torch.Tensor) -> torch.Tensor:
        """States at time 0."""
        ctx.march = march
        return torch.as_tensor(march.run(np.ascontiguousarray(given[-1].detach().numpy()), keep=True))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, weights: torch.Tensor) -> tuple[Array | None, ...]:
        """Derivatives with respect to numbers, load and terminal data."""
        numbers, load, begun = ctx.march.pullback(np.ascontiguousarray(weights.numpy()))
        return None, *(torch.as_tensor(v) for v in (*numbers, load, begun))
