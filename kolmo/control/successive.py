"""Successive approximations: Pontryagin's principle for controls that are parameters, layer by layer."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from scipy import optimize

from kolmo.arrays import as_points, at_home
from kolmo.control.adjoint import Steps, Taken, apply, assembled, differentiable_march, numbers_of
from kolmo.control.descent import Minimum, bar, flattened
from kolmo.control.minimize import collect, minimize
from kolmo.control.plans import planned
from kolmo.control.value import expected_value
from kolmo.discretization import Discretization
from kolmo.errors import InputError
from kolmo.march import March
from kolmo.problem import KolmogorovProblem

# Inner iterations for the minimum of the Hamiltonian, growth and fall of the penalty, and where it gives up.
INNER, RISE, FALL, LARGEST = 50, 4.0, 0.5, 1e12
# Parts of the promised fall below which the penalty rises, and above which it falls.
POOR, GOOD = 0.25, 0.75
# A fall of the Hamiltonian this small, relative to 1 + |J|, is the end.
STILL = 1e-10


@at_home
def successive(
    problem: KolmogorovProblem,
    x: Any,
    parameters: Any,
    weights: Any = None,
    *,
    rtol: float = 1e-3,
    atol: float = 1e-6,
    discretization: Discretization | None = None,
    penalty: float = 1.0,
    bounds: Any = None,
    maxiter: int = 100,
    callback: Callable[[int, float], Any] | None = None,
    progress: bool = False,
) -> optimize.OptimizeResult:
    r"""Minimise an expected value by successive approximations (extended MSA).

    .. math::
        \theta' \in \arg\min_\vartheta \sum_k \Delta t_k\,\Big\langle p_k,\; Q(\vartheta)u_k + r(\vartheta)
        + \tfrac{\rho}{2}\big(|b(\vartheta) - b(\theta)|^2 + |\Sigma(\vartheta) - \Sigma(\theta)|^2\big)\Big\rangle

    One march back gives u, one forward the law p; then every layer's parameters minimise the Hamiltonian there, without
    another march (the sum over time falls apart into layers by itself), held near the coefficients they had by the
    penalty ρ. The penalty rises where the expected value falls by much less than the Hamiltonian promised, and falls
    where it keeps the promise; a step that does not lower the value is taken back. The derivative of this discrete
    Hamiltonian is the exact gradient of ``value``.

    Parameters
    ----------
    problem : KolmogorovProblem
        With a horizon; effort and regularisers are its ``source``.
    x : array_like, shape (n, d)
        Points.
    parameters : tensor, nn.Module, or iterable of these
        What is varied, as for ``minimize``; updated in place.
    weights : array_like, shape (n,) or (n, k), optional
        As for ``expected_value``; the result has to be a scalar.
    rtol, atol, discretization
        As for ``value``; planned once.
    penalty : float, default 1
        First ρ.
    bounds : pair or list, optional
        As for ``minimize``: the minimum of the Hamiltonian is sought within them.
    maxiter : int, default 100
        Largest number of accepted steps.
    callback : callable, optional
        ``callback(iteration, value)`` after each; a true result stops.
    progress : bool, default False
        Show a progress bar on stderr.

    Returns
    -------
    scipy.optimize.OptimizeResult
        ``x``, ``fun``, ``nit``, ``nfev`` (values marched), ``njev`` (values with their transpose), ``success``,
        ``status`` ("converged", "maxiter" or "stopped"), ``message`` and ``history`` ("objective", "penalty",
        "seconds").

    Raises
    ------
    InputError
        For bad input; the message names the argument.

    Notes
    -----
    Li, Chen, Tai and E 2018, J. Mach. Learn. Res. 18 (165), who penalise the change of the costate's equation too;
    here a rising penalty stands in for that. Their state equation is the law's here, as in the mean-field form of the
    principle (E, Han and Li 2019).

    Examples
    --------
    >>> import torch, kolmo
    >>> from kolmo import control
    >>> push = torch.zeros(2, dtype=torch.float64, requires_grad=True)  # one constant drift per half of the time
    >>> sde = kolmo.SDE(lambda t, x: push[int(t >= 0.5)] + 0 * x, 0.5, dim=1, breakpoints=[0.5], arrays="torch")
    >>> problem = kolmo.KolmogorovProblem(sde, lambda x: (x[..., 0] - 1) ** 2, 1.0,
    ...     source=lambda t, x: push[int(t >= 0.5)] ** 2 + 0 * x[..., 0])
    >>> fit = control.successive(problem, [0.0], push, rtol=1e-6)
    >>> fit.status, push.detach().round(decimals=4).tolist(), round(fit.fun, 4)  # ½ each: ¼ + ¼ + σ²
    ('converged', [0.5, 0.5], 0.75)
    """
    _check(problem, penalty, maxiter)
    _, tensors = collect(parameters)
    points = torch.as_tensor(as_points(x, problem.dim)).reshape(-1, problem.dim)
    recipe = discretization or planned(problem, points, rtol, atol)
    game = _Game(problem.handing("torch"), points, weights, recipe)
    started, rho, calls = time.perf_counter(), float(penalty), 1
    history: dict[str, list[float]] = {"objective": [], "penalty": [], "seconds": []}
    costate = game.costate()
    best, value = [p.detach().clone() for p in tensors], costate.value
    first = value
    status, message = "maxiter", f"stopped after maxiter = {maxiter} iterations"
    shown = bar(maxiter, "successive") if progress else None
    try:
        while len(history["objective"]) < maxiter:
            held = game.augmented(costate, rho)
            with torch.no_grad():
                before = float(held())
            found = minimize(held, tensors, bounds=bounds, maxiter=INNER)
            new, promised = game.value(), before - float(found.fun)
            calls += 1
            if value - new < POOR * promised:
                rho *= RISE
            elif value - new > GOOD * promised:
                rho *= FALL
            if new < value:
                history["objective"].append(new)
                history["penalty"].append(rho)
                history["seconds"].append(time.perf_counter() - started)
                best, value = [p.detach().clone() for p in tensors], new
                if shown is not None:
                    shown.update()
                if callback is not None and callback(len(history["objective"]), new):
                    status, message = "stopped", "stopped by the callback"
                    break
                costate = game.costate()
                calls += 1
            else:
                _put(tensors, best)
            if promised <= STILL * max(abs(first), abs(value)) or rho > LARGEST:
                status, message = "converged", "the Hamiltonian is at its minimum"
                break
    finally:
        _put(tensors, best)
        if shown is not None:
            shown.close()
    accepted = len(history["objective"])
    return Minimum(
        x=flattened(tensors),
        fun=value,
        nit=accepted,
        nfev=calls,
        njev=accepted + 1,
        success=status != "maxiter",
        status=status,
        message=message,
        history={name: np.array(values) for name, values in history.items()},
    )


def _put(tensors: list[torch.Tensor], values: list[torch.Tensor]) -> None:
    with torch.no_grad():
        for p, v in zip(tensors, values, strict=True):
            p.copy_(v)


@dataclass(frozen=True)
class _Costate:
    """Expected value, its derivatives with respect to terminal data and numbers, and the coefficients they belong to.

    ``slopes`` holds per instant the derivatives of numbers, load and boundary values; that of the load is the law
    times the time step.
    """

    value: float
    terminal: torch.Tensor
    slopes: dict[float, list[torch.Tensor]]
    coefficients: dict[float, tuple[torch.Tensor, torch.Tensor]]


def _check(problem: KolmogorovProblem, penalty: float, maxiter: int) -> None:
    """Raise an InputError for what cannot be."""
    if problem.stationary:
        raise InputError("problem", "a stationary problem", "a horizon")
    if not penalty > 0:
        raise InputError("penalty", penalty, "a positive number")
    if not isinstance(maxiter, (int, np.integer)) or maxiter < 1:
        raise InputError("maxiter", maxiter, "a positive whole number")


class _Game:
    """The expected value of a problem on one recipe, and its Hamiltonian."""

    def __init__(self, problem: KolmogorovProblem, points: torch.Tensor, weights: Any, recipe: Discretization) -> None:
        self.problem, self.points, self.weights, self.recipe = problem, points, weights, recipe
        self.march = differentiable_march(problem, recipe)
        self.like = torch.zeros((), dtype=torch.float64)
        self.start = March(self.march.generator, self.march.stepper, self.march.times, self.like)
        self.x = torch.as_tensor(recipe.grid.points)

    def value(self) -> float:
        """The expected value at the present parameters."""
        with torch.no_grad():
            return float(self._expected(None))

    def _expected(self, u: torch.Tensor | None) -> torch.Tensor:
        """Expected value, of the state u at the nodes if given."""
        if u is None:
            J = expected_value(self.problem, self.points, self.weights, discretization=self.recipe)
        else:
            values = self.recipe.grid.interpolate(u, self.points, self.recipe.width)
            w = 1.0 if self.weights is None else torch.as_tensor(self.weights, dtype=torch.float64)
            J = (values * (w if not isinstance(w, torch.Tensor) or w.ndim == 2 else w[:, None])).sum()
        if J.numel() != 1:
            raise InputError("weights", f"an expected value of shape {tuple(J.shape)}", "a scalar: weights (n, k)")
        scalar: torch.Tensor = J.reshape(())
        return scalar

    def costate(self) -> _Costate:
        """One march back and one forward at the present parameters."""
        generator = self.march.generator
        with torch.no_grad():
            # as leaves all numbers are wanted, whatever they came from
            semis = {t: replace(semi, active=None) for t, semi in assembled(self.march, self.march.plans).items()}
            terminal = self.recipe.initial(self.start)
            coefficients = {t: self._coefficients(t) for t in semis}
            edge = generator.boundary(0.0, self.x)
        leaves = [v.requires_grad_() for v in numbers_of(semis)]
        flow = Steps(Taken(self.march), self.march.plans, semis)
        J = self._expected(apply(flow, terminal.requires_grad_(), semis) + edge)
        found = torch.autograd.grad(J, [terminal, *leaves], allow_unused=True)
        parts = [torch.zeros_like(v) if g is None else g for g, v in zip(found, [terminal, *leaves], strict=True)]
        slopes = {t: list(parts[1 + 3 * j : 4 + 3 * j]) for j, t in enumerate(semis)}
        return _Costate(float(J.detach()), parts[0], slopes, coefficients)

    def _coefficients(self, t: float) -> tuple[torch.Tensor, torch.Tensor]:
        sde = self.problem.sde
        return sde.drift(t, self.x), torch.zeros(()) if sde.noiseless else sde.covariance(t, self.x)

    def augmented(self, costate: _Costate, rho: float) -> Callable[[], torch.Tensor]:
        """The Hamiltonian with its penalty as a function of the present parameters."""

        def held() -> torch.Tensor:
            total: torch.Tensor = (costate.terminal * self.recipe.initial(self.start)).sum()
            for t, slopes in costate.slopes.items():
                semi = self.march.generator.at(t, self.like)
                for slope, v in zip(slopes, (semi.a, semi.load, semi.boundary), strict=True):
                    total = total + (slope * v).sum()
                law = slopes[1].sum(1).abs()
                for now, then in zip(self._coefficients(t), costate.coefficients[t], strict=True):
                    if now.ndim:
                        total = total + 0.5 * rho * (law * (now - then).square().flatten(1).sum(1)).sum()
            return total

        return held
