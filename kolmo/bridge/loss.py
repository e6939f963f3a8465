"""Expected loss of a noisy network: by sampling, by enumeration, by layer recursion, and by its Kolmogorov equation."""

import inspect
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kolmo.arrays import at_home
from kolmo.bridge.compiled_passes import CompiledPasses
from kolmo.bridge.control_variate import ControlVariate, final_state, solved_variate
from kolmo.bridge.resnet import NoisyResNet, Rng, as_generator
from kolmo.bridge.sampling import REPLICATES, blocks
from kolmo.errors import InputError, KolmoWarning
from kolmo.shown import Shown, with_error

# What each method uses of the options of `expected_loss`. Enumeration is exact, so that it meets every tolerance; a
# seed is welcome everywhere.
METHODS = {
    "monte_carlo": ("paths", "sampling", "common_noise", "control_variate"),
    "enumerate": ("max_outcomes", "rtol", "atol"),
    "recursion": ("rtol", "atol"),
    "pde": ("order", "rtol", "atol"),
}
_STATES = 2_000_000  # numbers held at once while enumerating


@dataclass(frozen=True, repr=False)
class LossEstimate(Shown):
    r"""Expected loss :math:`E\,\ell(X_L)` with its uncertainty.

    Attributes
    ----------
    mean : Tensor
        Expected loss, detached; the shape of ``loss(x)``: ``(...)`` or ``(..., k)``.
    standard_error : Tensor or None
        Standard error of a sampled mean, of its shape.
    error_estimate : Tensor or None
        Error estimate of a deterministic method, of the same shape; for ``"pde"`` of the solution of the modified
        equation, not of that equation's distance to the network.
    method : str
        How it was computed.
    stats : dict
        Paths, levels, outcomes, seed and the like.

    Examples
    --------
    >>> import torch
    >>> from kolmo import bridge
    >>> net = bridge.NoisyResNet([bridge.MLPBranch.create(1, 4, rng=0)] * 2, bridge.StochasticDepth(0.5))
    >>> exact = bridge.expected_loss(net, lambda z: z[..., 0] ** 2, torch.ones(3, 1), method="enumerate")
    >>> exact.mean.shape, exact.stats["outcomes"], exact.standard_error
    (torch.Size([3]), 4, None)
    """

    mean: Tensor
    standard_error: Tensor | None
    error_estimate: Tensor | None
    method: str
    stats: dict[str, Any] = field(default_factory=dict, repr=False)

    def _facts(self) -> dict[str, Any]:
        error = self.standard_error if self.standard_error is not None else self.error_estimate
        kind = "mean ± standard error" if self.standard_error is not None else "mean ± error estimate"
        return {kind: with_error(self.mean, error), "method": self.method, **self.stats}


class Columns:
    """A loss ``(..., state)`` -> ``(...)`` or ``(..., k)``, read as columns ``(n, k)``; remembers which it was."""

    def __init__(self, loss: Callable[[Tensor], Tensor], state_ndim: int, lead: torch.Size) -> None:
        self._loss, self._state_ndim, self._lead = loss, state_ndim, lead
        self.scalar: bool | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """Columns of the loss at states x."""
        lead = x.shape[: x.ndim - self._state_ndim]
        value = self._loss(x)
        if not isinstance(value, Tensor) or value.shape[: len(lead)] != lead or value.ndim > len(lead) + 1:
            given = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise InputError(
                "loss",
                f"{given} for states of shape {tuple(x.shape)}",
                f"a tensor of shape {tuple(lead)} or {(*lead, 'k')}",
                "the loss of every sample on its own, not their mean",
            )
        self.scalar = value.ndim == len(lead)
        return value[..., None] if self.scalar else value

    def shaped(self, values: Tensor) -> Tensor:
        """Columns ``(n, k)`` in the shape that the loss would have had of all states."""
        return values.reshape(self._lead) if self.scalar else values.reshape(*self._lead, values.shape[-1])


@at_home
def expected_loss(
    net: NoisyResNet,
    loss: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    method: str = "monte_carlo",
    order: int = 1,
    rtol: float = 1e-3,
    atol: float = 1e-9,
    paths: int = 1000,
    rng: Rng = None,
    sampling: str = "independent",
    common_noise: bool = False,
    control_variate: Any = None,
    max_outcomes: int = 2**22,
    **solve_options: Any,
) -> LossEstimate:
    r"""Estimate the expected loss :math:`E\,\varphi(X_L)` of a noisy network started at x.

    Parameters
    ----------
    net : NoisyResNet
        The network; its mode does not matter, the noise is always on.
    loss : callable
        φ: final states -> ``(...)`` or ``(..., k)``: k losses at once.
    x : Tensor, shape (..., d)
        Initial states; those of images have more axes than one.
    method : {"monte_carlo", "enumerate", "recursion", "pde"}
        Sampling; all outcomes of discrete noise; the exact one-layer transition applied backwards on grids (d ≤ 3); the
        backward Kolmogorov equation of the modified SDE (d ≤ 3).
    order : {1, 2, 3}
        Weak order of the modified SDE, for ``"pde"`` and ``control_variate="pde"``.
    rtol, atol : float
        Tolerance of ``"recursion"`` and ``"pde"``, per column: error ≤ atol + rtol · max|u|.
    paths : int
        Paths for each state, for ``"monte_carlo"``.
    rng : None, int or generator
        Source of randomness; methods that draw nothing leave it alone.
    sampling : {"independent", "antithetic", "sobol"}
        Draws of ``"monte_carlo"``: independent paths; pairs with mirrored noise; scrambled Sobol points, 16 times, with
        the largest power of two of points that gives at most `paths` paths, shared by all states.
    common_noise : bool
        Whether all states share the noise of a path (common random numbers): differences between states get precise.
    control_variate : {None, "pde"} or kolmo.Solution
        Subtract Σ ∇u·v + ½ vᵀ∇²u v − ½ C:∇²u along the path, with v = ΔX − E ΔX of covariance C and u from the backward
        equation, solved on a coarse grid (or given, saved at the layer times). Its mean is zero whatever u is.
    max_outcomes : int
        Largest number of outcomes to enumerate.
    **solve_options
        Further options for ``"pde"``: of `kolmo.solve`; ``box``; ``strict``, ``depth`` and ``jumps`` of `modified_sde`.

    Returns
    -------
    LossEstimate
        With ``standard_error`` (sampling) or ``error_estimate``.

    Raises
    ------
    InputError
        Unknown method, an option that the method does not use, too many outcomes (with their number), more than three
        dimensions for recursion or PDE, BatchNorm in training mode, a loss of the wrong shape.

    Examples
    --------
    >>> from kolmo import bridge
    >>> net = bridge.NoisyResNet([torch.nn.Identity()] * 3, bridge.StochasticDepth(0.5, rescale=False))
    >>> x = torch.tensor([[1.0]], dtype=torch.float64)
    >>> est = bridge.expected_loss(net, lambda x: x[..., 0], x, method="enumerate")
    >>> round(est.mean.item(), 12) == round((1 + 0.5 / 3) ** 3, 12)
    True
    """
    if method not in METHODS:
        raise InputError("method", repr(method), "one of " + ", ".join(map(repr, METHODS)))
    if solve_options and method != "pde":
        raise InputError(", ".join(solve_options), f"given with method={method!r}", "method='pde'")
    given = {"order": order, "rtol": rtol, "atol": atol, "paths": paths, "sampling": sampling}
    given |= {"common_noise": common_noise, "control_variate": control_variate, "max_outcomes": max_outcomes}
    _refuse_unused(method, given)
    refuse_batchnorm(net)
    x = x.detach()
    if x.ndim < net.state_ndim:
        raise InputError("x", f"shape {tuple(x.shape)}", f"at least {net.state_ndim} axes (one state)")
    lead = x.shape[: x.ndim - net.state_ndim]
    if method != "pde":  # whose functions take points of their own precision
        _fitting(net, x)
    flat = x.reshape(-1, *x.shape[x.ndim - net.state_ndim :])
    columns = Columns(loss, net.state_ndim, lead)
    if method == "monte_carlo":
        options = _Sampling(sampling, common_noise, control_variate, order)
        return _monte_carlo(net, columns, flat, paths, rng, options)
    if method == "enumerate":
        return _enumerate(net, columns, flat, max_outcomes)
    if method == "recursion":
        return _recursion(net, columns, flat, rtol, atol)
    return _pde(net, columns, flat, order, rtol, atol, solve_options)


def _refuse_unused(method: str, given: dict[str, Any]) -> None:
    """Refuse options that were given and that the method does not use."""
    used = METHODS[method]
    if "control_variate" in used and isinstance(given["control_variate"], str):
        used = (*used, "order")  # of the equation that it is a solution of
    defaults = inspect.signature(expected_loss).parameters
    for name, value in given.items():
        default = defaults[name].default
        if name not in used and value is not default and value != default:
            others = " or ".join(f"method={other!r}" for other, names in METHODS.items() if name in names)
            needed = f"an option that it uses ({', '.join(used)})"
            raise InputError(name, f"{value!r} with method={method!r}", needed, f"leave it out, or use {others}")


def _fitting(net: nn.Module, x: Tensor) -> None:
    """Refuse states of another precision or device than the weights, which torch refuses later without a name."""
    kinds = {(p.dtype, p.device) for p in net.parameters() if p.is_floating_point()}
    if kinds and (x.dtype, x.device) not in kinds:
        needed = " or ".join(sorted(f"{dtype} on {device}, as the weights are" for dtype, device in kinds))
        raise InputError("x", f"a tensor of {x.dtype} on {x.device}", needed, "x.to(next(net.parameters()))")


def refuse_batchnorm(module: nn.Module) -> None:
    """Refuse batch normalisation in training mode: it couples the samples, so no equation for one sample exists."""
    for name, part in module.named_modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.training:
            raise InputError(
                "net",
                f"{type(part).__name__} {name!r} in training mode",
                "normalisation that does not mix the samples of a batch",
                "put it in evaluation mode, or use GroupNorm or LayerNorm",
            )


@torch.no_grad()
def _monte_carlo(
    net: NoisyResNet, columns: Columns, x: Tensor, paths: int, rng: Rng, options: "_Sampling"
) -> LossEstimate:
    """Mean and standard error over independent values: paths, antithetic pairs, or scrambled replicates."""
    least = {"antithetic": 4, "sobol": 2 * REPLICATES}.get(options.sampling, 2)
    if paths < least or (options.sampling == "antithetic" and paths % 2):
        raise InputError(
            "paths", paths, f"an {'even ' * (least == 4)}number, at least {least}, to have a standard error"
        )
    generator = as_generator(rng, x.device)
    control = _control(net, columns, x, options, generator)
    shift = total = squares = torch.zeros(())
    independent_values = used = 0
    for values, count in _sampled(net, columns, x, paths, options, control, generator):
        if used == 0:
            shift = values.mean(0)
            total = squares = torch.zeros_like(shift)
        total = total + (values - shift).sum(0)
        squares = squares + ((values - shift) ** 2).sum(0)
        independent_values += len(values)
        used += count
    mean = total / independent_values
    variance = (squares / independent_values - mean**2).clamp(min=0) / (independent_values - 1)
    return LossEstimate(
        columns.shaped(shift + mean),
        columns.shaped(variance.sqrt()),
        None,
        "monte_carlo",
        {"paths": used, "sampling": options.sampling, "seed": generator.initial_seed()},
    )


def _sampled(
    net: NoisyResNet,
    columns: Columns,
    x: Tensor,
    paths: int,
    options: "_Sampling",
    control: ControlVariate | None,
    generator: torch.Generator,
) -> Iterator[tuple[Tensor, int]]:
    """Independent values ``(·, n, k)``, and how many paths they took: compiled where that can be."""
    compiled = CompiledPasses.of(net, x) if options.sampling == "independent" and not options.common_noise else None
    if compiled is not None:
        for final, correction in compiled.run(x, paths, control, generator):
            yield columns(final).double() - correction, len(final)
        return
    for block in blocks(net, x, paths, options.sampling, options.common_noise, generator):
        final, correction = final_state(net, x.expand(block.paths, *x.shape), block.draw, control)
        yield block.independent(columns(final).double() - correction), block.paths


@dataclass(frozen=True)
class _Sampling:
    """How paths are drawn."""

    sampling: str
    common_noise: bool
    control_variate: Any
    order: int


def _control(
    net: NoisyResNet, columns: Columns, x: Tensor, options: _Sampling, generator: torch.Generator
) -> ControlVariate | None:
    """Control variate from a solution of the backward equation, given or solved for."""
    if options.control_variate is None:
        return None
    if options.control_variate != "pde":
        return ControlVariate(net, options.control_variate)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KolmoWarning)  # an equation that misses its order is as good a control
        problem = _problem(net, columns, x, options.order, {"strict": False})
    assert problem.terminal is not None
    return solved_variate(net, problem.sde, problem.terminal, x, generator)


def _problem(net: NoisyResNet, columns: Columns, x: Tensor, order: int, options: dict[str, Any]) -> Any:
    """Backward Kolmogorov problem of the modified SDE with the loss as terminal data."""
    from kolmo.bridge.modified import modified_sde
    from kolmo.problem import KolmogorovProblem

    if net.state_ndim != 1 or x.shape[-1] > 3:
        raise InputError(
            "net", f"states of shape {tuple(x.shape[1:])}", "vector states of dimension 1, 2 or 3 for a PDE"
        )
    of_equation = {name: options.pop(name) for name in ("strict", "depth", "jumps") if name in options}
    sde = modified_sde(net, order, dim=x.shape[-1], **of_equation)
    columns(x[:1])  # finds out whether the loss has columns

    def terminal(z: Tensor) -> Tensor:
        values = columns(z.to(x.dtype))
        return values[..., 0] if columns.scalar else values

    return KolmogorovProblem(sde, terminal, net.horizon, options.pop("box", None))


@torch.no_grad()
def _enumerate(net: NoisyResNet, columns: Columns, x: Tensor, max_outcomes: int) -> LossEstimate:
    """Sum over all outcomes of discrete noise."""
    outcomes = 1
    for k in range(net.depth):
        law = net.law(k)
        if law.noiseless:
            continue
        if not law.variable.is_discrete:
            given = f"'enumerate' with {law.variable.name} noise"
            raise InputError("method", given, "discrete noise", "use 'recursion' or 'pde'")
        count = math.prod(law.noise_shape(net.output(k, x[:1]), net.state_ndim)[1:])
        outcomes *= len(law.variable.nodes(0)[0]) ** count
    if outcomes > max_outcomes:
        raise InputError(
            "method",
            f"'enumerate' with {outcomes:.4g} outcomes",
            f"at most max_outcomes = {max_outcomes}",
            "use method='recursion' (d <= 3) or 'monte_carlo'",
        )
    chunk = max(1, _STATES // (outcomes * max(x[0].numel(), 1)))
    mean = torch.cat([_enumerate_chunk(net, columns, x[i : i + chunk]) for i in range(0, len(x), chunk)])
    error = torch.full_like(mean, torch.finfo(x.dtype).eps) * (net.depth + 10) * mean.abs().amax(0)
    return LossEstimate(columns.shaped(mean), None, columns.shaped(error), "enumerate", {"outcomes": outcomes})


def _enumerate_chunk(net: NoisyResNet, columns: Columns, x: Tensor) -> Tensor:
    """All paths of some states: the set of states is multiplied by the outcomes of every layer."""
    n = len(x)
    states, weights = x[None], torch.ones(1, dtype=torch.float64, device=x.device)
    for k in range(net.depth):
        law, output = net.law(k), net.output(k, states)
        if law.noiseless:
            states = net.step(k, states)
            continue
        shape = law.noise_shape(output, net.state_ndim)[2:]
        zeta, probability = _outcomes(law.variable.nodes(0), shape)
        parts = [states + law.increment(output, z.to(states).expand(*states.shape[:2], *shape), net.h) for z in zeta]
        states = torch.cat(parts)
        weights = (probability.to(weights)[:, None] * weights).reshape(-1)
    values = columns(states).double()
    return torch.einsum("m,mnk->nk", weights, values.reshape(len(weights), n, -1))


def _outcomes(rule: tuple[np.ndarray, np.ndarray], shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """All values of ζ of that shape, with their probabilities."""
    size = int(np.prod(shape))
    index = np.stack(np.meshgrid(*[np.arange(len(rule[0]))] * size, indexing="ij"), -1).reshape(-1, size)
    return torch.as_tensor(rule[0][index]).reshape(-1, *shape), torch.as_tensor(rule[1][index].prod(1))


def _recursion(net: NoisyResNet, columns: Columns, x: Tensor, rtol: float, atol: float) -> LossEstimate:
    """Backward recursion on the CPU in double precision."""
    from kolmo.bridge.recursion import recursion

    result = recursion(net, columns, x.double().cpu().numpy(), rtol=rtol, atol=atol, dtype=x.dtype)
    mean = torch.as_tensor(result.values)
    error = torch.as_tensor(result.error_estimate).expand(mean.shape)
    stats = {**result.stats, "converged": result.converged}
    return LossEstimate(columns.shaped(mean), None, columns.shaped(error), "recursion", stats)


def _pde(
    net: NoisyResNet, columns: Columns, x: Tensor, order: int, rtol: float, atol: float, options: dict[str, Any]
) -> LossEstimate:
    """Backward Kolmogorov equation of the modified SDE."""
    import kolmo

    problem = _problem(net, columns, x, order, options)
    points = x.double()
    solution = kolmo.solve(problem, at=points, rtol=rtol, atol=atol, **options)
    values, error = (torch.as_tensor(np.asarray(v)) for v in (solution(points), solution.error_estimate))
    mean, known = (columns.shaped(v.reshape(len(x), -1)) for v in (values, error.expand(values.shape)))
    stats = {"order": order, "status": solution.status, "solution": solution}
    return LossEstimate(mean, None, known, "pde", stats)
