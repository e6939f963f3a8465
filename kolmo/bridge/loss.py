"""Expected loss of a noisy network: by sampling, by enumeration, by layer recursion, and by its Kolmogorov equation."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kolmo.bridge.resnet import NoisyResNet, Rng, as_generator, independent
from kolmo.errors import InputError

METHODS = ("monte_carlo", "enumerate", "recursion", "pde")
_STATES = 2_000_000  # numbers held at once while sampling or enumerating


@dataclass(frozen=True)
class LossEstimate:
    """Expected loss with its uncertainty.

    Attributes
    ----------
    mean : Tensor
        Expected loss, detached; the shape of ``loss(x)``: ``(...)`` or ``(..., k)``.
    standard_error : Tensor or None
        Standard error of a sampled mean.
    error_estimate : Tensor or None
        Error estimate of a deterministic method; for ``"pde"`` of the solution of the modified equation, not of that
        equation's distance to the network.
    method : str
        How it was computed.
    stats : dict
        Paths, levels, outcomes, seed and the like.
    """

    mean: Tensor
    standard_error: Tensor | None
    error_estimate: Tensor | None
    method: str
    stats: dict[str, Any] = field(default_factory=dict, repr=False)


class Columns:
    """A loss ``(..., state)`` -> ``(...)`` or ``(..., k)``, read as columns ``(n, k)``; remembers which it was."""

    def __init__(self, loss: Callable[[Tensor], Tensor], state_ndim: int) -> None:
        self._loss, self._state_ndim = loss, state_ndim
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

    def shaped(self, values: Tensor, lead: torch.Size) -> Tensor:
        """Columns ``(n, k)`` in the shape that the loss would have had."""
        return values.reshape(lead) if self.scalar else values.reshape(*lead, values.shape[-1])


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
    x : Tensor
        Initial states.
    method : {"monte_carlo", "enumerate", "recursion", "pde"}
        Sampling; all outcomes of discrete noise; the exact one-layer transition applied backwards on grids (d ≤ 3); the
        backward Kolmogorov equation of the modified SDE (d ≤ 3).
    order : {1, 2, 3}
        Weak order of the modified SDE, for ``"pde"``.
    rtol, atol : float
        Tolerance of ``"recursion"`` and ``"pde"``, per column: error ≤ atol + rtol · max|u|.
    paths : int
        Paths for each state, for ``"monte_carlo"``.
    rng : None, int or generator
        Source of randomness.
    max_outcomes : int
        Largest number of outcomes to enumerate.
    **solve_options
        Further options of `kolmo.solve` for ``"pde"`` (and ``box``, ``strict``, ``depth``).

    Returns
    -------
    LossEstimate
        With ``standard_error`` (sampling) or ``error_estimate``.

    Raises
    ------
    InputError
        Unknown method, too many outcomes (with their number), more than three dimensions for recursion or PDE,
        BatchNorm in training mode, a loss of the wrong shape.

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
    refuse_batchnorm(net)
    x = x.detach()
    if x.ndim < net.state_ndim:
        raise InputError("x", f"shape {tuple(x.shape)}", f"at least {net.state_ndim} axes (one state)")
    lead = x.shape[: x.ndim - net.state_ndim]
    flat = x.reshape(-1, *x.shape[x.ndim - net.state_ndim :])
    columns = Columns(loss, net.state_ndim)
    if method == "monte_carlo":
        return _monte_carlo(net, columns, flat, lead, paths, rng)
    if method == "enumerate":
        return _enumerate(net, columns, flat, lead, max_outcomes)
    if method == "recursion":
        return _recursion(net, columns, flat, lead, rtol, atol)
    return _pde(net, columns, flat, lead, order, rtol, atol, solve_options)


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
def _monte_carlo(net: NoisyResNet, columns: Columns, x: Tensor, lead: torch.Size, paths: int, rng: Rng) -> LossEstimate:
    """Sample means over independent paths, in chunks; sums of squares about the first chunk's mean."""
    if paths < 2:
        raise InputError("paths", paths, "at least 2, to have a standard error")
    generator = as_generator(rng, x.device)
    draw = independent(generator)
    chunk = max(1, min(paths, _STATES // max(x.numel(), 1)))
    shift = total = squares = torch.zeros(())
    for start in range(0, paths, chunk):
        count = min(chunk, paths - start)
        final = net.path(x.expand(count, *x.shape), draw)
        values = columns(final).double()
        if start == 0:
            shift = values.mean(0)
            total = squares = torch.zeros_like(shift)
        total = total + (values - shift).sum(0)
        squares = squares + ((values - shift) ** 2).sum(0)
    mean = total / paths
    error = ((squares / paths - mean**2).clamp(min=0) / (paths - 1)).sqrt()
    return LossEstimate(
        columns.shaped(shift + mean, lead),
        columns.shaped(error, lead),
        None,
        "monte_carlo",
        {"paths": paths, "seed": generator.initial_seed()},
    )


@torch.no_grad()
def _enumerate(net: NoisyResNet, columns: Columns, x: Tensor, lead: torch.Size, max_outcomes: int) -> LossEstimate:
    """Sum over all outcomes of discrete noise."""
    rules, outcomes = [], 1
    for k in range(net.depth):
        law = net.law(k)
        count = 1
        if not law.noiseless:
            if not law.variable.is_discrete:
                raise InputError(
                    "method",
                    f"'enumerate' with {law.variable.name} noise",
                    "discrete noise",
                    "use 'recursion' or 'pde'",
                )
            output = net.output(k, x[:1])
            count = 1
            for n in law.noise_shape(output, net.state_ndim)[1:]:
                count *= n
        values, weights = law.variable.nodes(0)
        outcomes *= 1 if law.noiseless else len(values) ** count
        rules.append((values, weights))
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
    return LossEstimate(
        columns.shaped(mean, lead), None, columns.shaped(error, lead), "enumerate", {"outcomes": outcomes}
    )


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


def _recursion(
    net: NoisyResNet, columns: Columns, x: Tensor, lead: torch.Size, rtol: float, atol: float
) -> LossEstimate:
    """Backward recursion on the CPU in double precision."""
    from kolmo.bridge.recursion import recursion

    result = recursion(net, columns, x.double().cpu().numpy(), rtol=rtol, atol=atol, dtype=x.dtype)
    mean = torch.as_tensor(result.values)
    error = torch.as_tensor(result.error_estimate).expand(mean.shape)
    return LossEstimate(
        columns.shaped(mean, lead),
        None,
        columns.shaped(error, lead),
        "recursion",
        {**result.stats, "converged": result.converged},
    )


def _pde(
    net: NoisyResNet,
    columns: Columns,
    x: Tensor,
    lead: torch.Size,
    order: int,
    rtol: float,
    atol: float,
    options: dict[str, Any],
) -> LossEstimate:
    """Backward Kolmogorov equation of the modified SDE."""
    import kolmo
    from kolmo.bridge.modified import modified_sde
    from kolmo.problem import KolmogorovProblem

    if net.state_ndim != 1 or x.shape[-1] > 3:
        raise InputError(
            "method", f"'pde' for states of shape {tuple(x.shape[1:])}", "vector states of dimension 1, 2 or 3"
        )
    of_equation = {name: options.pop(name) for name in ("strict", "depth") if name in options}
    sde = modified_sde(net, order, dim=x.shape[-1], **of_equation)
    problem = KolmogorovProblem(sde, lambda z: columns(z.to(x.dtype)), net.horizon, options.pop("box", None))
    points = x.double()
    solution = kolmo.solve(problem, at=points, rtol=rtol, atol=atol, **options)
    values, error = (torch.as_tensor(np.asarray(v)) for v in (solution(points), solution.error_estimate))
    shape = (len(x), -1)
    return LossEstimate(
        columns.shaped(values.reshape(shape), lead),
        None,
        columns.shaped(error.expand(values.shape).reshape(shape), lead),
        "pde",
        {"order": order, "status": solution.status, "solution": solution},
    )
