"""Minimisation of an objective over torch parameters, with the exact gradient that ``control.value`` gives."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from scipy import optimize

from kolmo.arrays import at_home
from kolmo.control.descent import METHODS, Callback, Fitted, Loop, Objective, checked_bounds, flattened
from kolmo.control.plans import keeping_plans
from kolmo.errors import InputError


@at_home
def minimize(
    objective: Objective,
    parameters: Any,
    *,
    method: str = "L-BFGS-B",
    bounds: Any = None,
    maxiter: int = 200,
    callback: Callback | None = None,
    progress: bool = False,
    starts: int = 1,
    rng: Any = None,
) -> optimize.OptimizeResult:
    r"""Minimise an objective over torch parameters.

    .. math:: \theta^* \in \arg\min_{l \le \theta \le u} J(\theta)

    The parameters are updated in place to the best found. While it runs, ``control.value`` under a tolerance plans
    once per problem object and keeps that plan, so that the objective is a smooth function; the plan is checked at the
    parameters found, and where it no longer meets its tolerance, it is renewed and the minimisation goes on.

    Parameters
    ----------
    objective : callable
        ``objective()`` -> torch scalar, computed from the parameters. Build problems outside it.
    parameters : tensor, nn.Module, or iterable of these
        What is varied: leaf tensors with ``requires_grad=True``; of modules, those that require gradients.
    method : {"L-BFGS-B", "trust-ncg", "adam", "adamw"}
        The first two are SciPy's; trust-region Newton–CG takes exact Hessian products (``hessian_product``).
        The last two are torch's, with learning rate 0.05 that falls to zero along a cosine.
    bounds : pair or list, optional
        ``(low, high)`` for all, or one pair (or None) per tensor; ends are numbers, arrays of the tensor's shape, or
        None. Not with "trust-ncg".
    maxiter : int, default 200
        Largest number of iterations.
    callback : callable, optional
        ``callback(iteration, value)`` after each iteration; a true result stops.
    progress : bool, default False
        Show a progress bar on stderr.
    starts : int, default 1
        Minimisations from so many places, of which the best is kept: the present parameters, and others drawn evenly
        within the (finite) bounds. A start whose objective fails or is not finite is passed over.
    rng : int or numpy.random.Generator, optional
        Where the draws come from.

    Returns
    -------
    scipy.optimize.OptimizeResult
        ``x`` (all parameters, flat), ``fun``, ``jac``, ``nit``, ``nfev``, ``success``, ``status`` ("converged",
        "maxiter", "stopped", "diverged", "interrupted" or "failed"), ``message``, and ``history``: a dictionary of
        arrays with one entry per iteration, "objective", "gradient" (largest component) and "seconds". With several
        starts also ``minima``, the objective that each of them reached. ``control.uncertainty`` takes the result.

    Raises
    ------
    InputError
        For crossed bounds, parameters that cannot be varied or that the objective does not depend on, and an objective
        that is not a finite scalar at the start. Later, a NaN or a diverging objective ends the run with the last
        good parameters and status "diverged".

    Notes
    -----
    L-BFGS-B: Byrd, Lu, Nocedal and Zhu, 1995. Trust-region Newton–CG: Steihaug, 1983. Adam: Kingma and Ba, 2015; AdamW:
    Loshchilov and Hutter, 2019.

    Examples
    --------
    >>> import torch, kolmo
    >>> from kolmo import control
    >>> theta = torch.tensor(0.0, dtype=torch.float64, requires_grad=True)
    >>> sde = kolmo.SDE(lambda t, x: theta + 0 * x, diffusion=0.5, dim=1, arrays="torch")
    >>> problem = kolmo.KolmogorovProblem(sde, lambda x: (x[..., 0] - 1) ** 2, 1.0)
    >>> fit = control.minimize(lambda: control.value(problem, [-0.5], rtol=1e-6).sum(), [theta])
    >>> round(theta.item(), 5), round(fit.fun, 5), fit.status
    (1.5, 0.25, 'converged')
    """
    if method not in METHODS:
        raise InputError("method", repr(method), "one of " + ", ".join(METHODS))
    if not isinstance(maxiter, (int, np.integer)) or maxiter < 1:
        raise InputError("maxiter", maxiter, "a positive whole number")
    names, tensors = collect(parameters)
    low, high = checked_bounds(bounds, tensors)
    if method == "trust-ncg" and (np.isfinite(low).any() or np.isfinite(high).any()):
        raise InputError("bounds", "bounds with method 'trust-ncg'", "none", "use method='L-BFGS-B', or 'adam'")
    if not isinstance(starts, (int, np.integer)) or starts < 1:
        raise InputError("starts", starts, "a positive whole number")
    if starts > 1 and not (np.isfinite(low) & np.isfinite(high)).all():
        raise InputError("starts", f"{starts} without bounds", "finite bounds of all parameters", "bounds=(low, high)")
    fitted = Fitted(objective, names, tensors, low, high)
    begin, draws = flattened(tensors), np.random.default_rng(rng)
    places = [begin, *(draws.uniform(low, high) for _ in range(starts - 1))]
    best: optimize.OptimizeResult | None = None
    minima = []
    for k, place in enumerate(places):
        with keeping_plans() as plans:
            loop = Loop(fitted, plans, int(maxiter), callback)
            loop.put(place)
            try:
                found = loop.run(method, progress)
            except InputError:
                # what is wrong with the first start is wrong with the call
                if k == 0:
                    raise
                minima.append(math.inf)
                continue
            finally:
                loop.restore()
        minima.append(float(found.fun))
        best = found if best is None or found.fun < best.fun else best
        if found.status in ("stopped", "interrupted"):
            break
    assert best is not None
    fitted.put(best.x)
    best.fitted = fitted
    if starts > 1:
        best.minima = np.array(minima)
    return best


@at_home
def hessian_product(objective: Objective, parameters: Any, direction: Sequence[Any]) -> list[torch.Tensor]:
    r"""Hessian of an objective times a direction, :math:`\nabla^2 J(\theta)\,v`.

    Exact: the gradient differentiated along v, which for values of ``kolmo`` is the tangent of the discrete march and
    then the transpose of that (the second-order adjoint). Costs about as much as four gradients whatever the number of
    parameters. Not with stepper "semi-lagrangian".

    Parameters
    ----------
    objective : callable
        ``objective()`` -> torch scalar.
    parameters : tensor, nn.Module, or iterable of these
        As for ``minimize``.
    direction : sequence of tensors
        One per parameter tensor, of its shape.

    Returns
    -------
    list of tensor
        One per parameter tensor.

    Raises
    ------
    InputError
        For directions that do not fit the parameters, and parameters without gradients.

    References
    ----------
    B. A. Pearlmutter (1994), Fast exact multiplication by the Hessian, Neural Computation 6.

    Examples
    --------
    >>> import torch
    >>> from kolmo import control
    >>> theta = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    >>> control.hessian_product(lambda: (theta**4).sum(), theta, [torch.tensor([1.0, 0.0])])[0]
    tensor([12.,  0.], dtype=torch.float64)
    """
    names, tensors = collect(parameters)
    parts = [torch.as_tensor(v) for v in direction]
    if [tuple(v.shape) for v in parts] != [tuple(p.shape) for p in tensors]:
        raise InputError("direction", f"shapes {[tuple(v.shape) for v in parts]}", "one tensor per parameter")
    v = flattened(parts)
    free = np.full(len(v), np.inf)
    with keeping_plans() as plans:
        loop = Loop(Fitted(objective, names, tensors, -free, free), plans)
        product = loop.hessian_product(loop.get(), v)
    return [torch.as_tensor(h).reshape(p.shape) for h, p in zip(loop.fitted.pieces(product), tensors, strict=True)]


def collect(parameters: Any) -> tuple[list[str], list[torch.Tensor]]:
    """Names and tensors of all parameters."""
    single = isinstance(parameters, (torch.Tensor, torch.nn.Module))
    items: Iterable[Any] = [parameters] if single else parameters
    names: list[str] = []
    tensors: list[torch.Tensor] = []
    for i, item in enumerate(items):
        prefix = "parameters" if single else f"parameters[{i}]"
        if isinstance(item, torch.nn.Module):
            named: list[tuple[str, torch.Tensor]] = [
                (f"{prefix}.{n}", p) for n, p in item.named_parameters() if p.requires_grad
            ]
        elif isinstance(item, torch.Tensor):
            named = [(prefix, item)]
        else:
            raise InputError(prefix, f"a {type(item).__name__}", "a torch tensor or nn.Module")
        for name, p in named:
            if not (p.is_leaf and p.requires_grad and p.is_floating_point()):
                raise InputError(
                    name, f"a {p.dtype} tensor with is_leaf={p.is_leaf}, requires_grad={p.requires_grad}",
                    "a leaf tensor of floats with requires_grad=True",
                    "torch.tensor(..., dtype=torch.float64, requires_grad=True)",
                )  # fmt: skip
            if not any(p is q for q in tensors):
                names.append(name)
                tensors.append(p)
    if not tensors:
        raise InputError("parameters", "no tensor that requires gradients", "at least one")
    return names, tensors
