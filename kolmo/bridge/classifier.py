"""A classifier whose features flow through a noisy residual network.

It is trained by sampling, through its PDE, or with the explicit regulariser of the small-noise expansion.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from kolmo.bridge.loss import LossEstimate, expected_loss
from kolmo.bridge.modified import modified_sde
from kolmo.bridge.regularisation import expansion, warn_of_kinks
from kolmo.bridge.resnet import NoisyResNet, Rng, as_generator
from kolmo.bridge.sampling import of_paths
from kolmo.errors import InputError
from kolmo.problem import KolmogorovProblem


class FlowClassifier(nn.Module):
    r"""Data → :math:`R^d` → noisy flow → class scores.

    The expected cross-entropy of label y is u_y(0, encoder(x)), where u_y solves the backward Kolmogorov equation of
    the flow with terminal data −log softmax(head(z))_y: one equation with as many columns as classes.

    Parameters
    ----------
    encoder : nn.Module
        Data ``(n, ...)`` -> features ``(n, d)``.
    net : NoisyResNet
        Flow of the features.
    head : nn.Module
        Features ``(..., d)`` -> class scores ``(..., k)``, vectorised over the leading axes.

    Raises
    ------
    InputError
        For a net that is no NoisyResNet of vector states.

    References
    ----------
    Sun, Tao & Du (2018), Stochastic training of residual networks: a differential equation viewpoint.

    Examples
    --------
    >>> from kolmo import bridge
    >>> net = bridge.NoisyResNet([bridge.MLPBranch.create(2, 8, rng=k) for k in range(4)], bridge.Additive(0.2))
    >>> model = bridge.FlowClassifier(torch.nn.Linear(64, 2), net, torch.nn.Linear(2, 10))
    >>> model(torch.zeros(5, 64)).shape
    torch.Size([5, 10])
    """

    def __init__(self, encoder: nn.Module, net: NoisyResNet, head: nn.Module) -> None:
        super().__init__()
        if not isinstance(net, NoisyResNet) or net.state_ndim != 1:
            raise InputError("net", type(net).__name__, "a NoisyResNet of vector states")
        self.encoder, self.net, self.head = encoder, net, head

    def forward(self, x: Tensor) -> Tensor:
        """Class scores ``(n, k)``: noisy in training mode, of the mean network in evaluation mode."""
        return self.head(self.net(self.encoder(x)))  # type: ignore[no-any-return]

    def class_losses(self, z: Tensor) -> Tensor:
        """Cross-entropy for every label at final features z ``(..., d)`` -> ``(..., k)``: −log softmax(head(z))."""
        dtype = next((p.dtype for p in self.head.parameters()), z.dtype)
        return -functional.log_softmax(self.head(z.to(dtype)), -1)

    def sampled_loss(self, x: Tensor, y: Tensor, *, draws: int = 1, rng: Rng = None, reduction: str = "mean") -> Tensor:
        """Cross-entropy over noisy passes: ordinary stochastic training, whatever the mode.

        Parameters
        ----------
        x, y : Tensor
            Data and labels ``(n,)``.
        draws : int
            Noisy passes for each example; their losses are averaged.
        rng : None, int or generator
            Source of the noise; None: torch's global generator.
        reduction : {"mean", "none"}
            Mean over the examples, or the loss of each.

        Returns
        -------
        Tensor
            ``()`` or ``(n,)``; differentiable with respect to all parameters.

        Raises
        ------
        InputError
            For a reduction that is not known.
        """
        z = self.encoder(x)
        generator = None if rng is None else as_generator(rng, z.device)
        final = self.net.path(z.expand(draws, *z.shape), of_paths(draws, generator))
        return _reduced(_of_label(self.class_losses(final).mean(0), y), reduction)

    def regularised_loss(self, x: Tensor, y: Tensor, *, reduction: str = "mean") -> Tensor:
        r"""Cross-entropy of the mean network plus the explicit regulariser of the noise; nothing is sampled or solved.

        .. math::
            v_0(x_0) + \tfrac12 \sum_k C_k(x_k) : \nabla^2 v_{k+1}(x_{k+1}),

        the expected cross-entropy to first order in the covariances of the layers (see `regularisation`, also for the
        warning where branches or head have kinks).

        Parameters
        ----------
        x, y : Tensor
            Data and labels ``(n,)``.
        reduction : {"mean", "none"}
            Mean over the examples, or the loss of each.

        Returns
        -------
        Tensor
            ``()`` or ``(n,)``; differentiable with respect to encoder, flow and head.

        Raises
        ------
        InputError
            For a reduction that is not known.
        """

        def of_label(z: Tensor) -> Tensor:
            return self.class_losses(z).gather(-1, y.reshape(-1, 1))

        start = self.encoder(x)
        warn_of_kinks(self.net, of_label, start)
        found = expansion(self.net, of_label, start)
        return _reduced((found.loss + sum(found.effects)).squeeze(-1), reduction)

    def problem(self, *, order: int = 1, box: Any = None, strict: bool = True) -> KolmogorovProblem:
        """Backward Kolmogorov problem of the flow with one terminal column for each class.

        Parameters
        ----------
        order : {1, 2, 3}
            Weak order of the modified SDE.
        box : kolmo.Box, optional
            Domain; None: all of R^d.
        strict : bool
            See `modified_sde`.
        """
        sde = modified_sde(self.net, order, strict=strict)
        return KolmogorovProblem(sde, self.class_losses, self.net.horizon, box)

    def pde_loss(
        self,
        x: Tensor,
        y: Tensor,
        *,
        order: int = 1,
        box: Any = None,
        rtol: float = 1e-3,
        atol: float = 1e-6,
        discretization: Any = None,
        strict: bool = True,
        reduction: str = "mean",
    ) -> Tensor:
        """Return the expected cross-entropy through the PDE: no sampling noise, and gradients through its adjoint.

        Parameters
        ----------
        x, y : Tensor
            Data and labels ``(n,)``.
        order : {1, 2, 3}
            Weak order of the modified SDE.
        box : kolmo.Box, optional
            Domain; None: all of R^d.
        rtol, atol : float
            Tolerance of the PDE solution at the features.
        discretization : kolmo.Discretization, optional
            A frozen plan, as an optimiser needs it (see `plan`).
        strict : bool
            See `modified_sde`.
        reduction : {"mean", "none"}
            Mean over the examples, or the loss of each.

        Returns
        -------
        Tensor
            ``()`` or ``(n,)``; differentiable with respect to encoder, flow and head.

        Raises
        ------
        InputError
            For a reduction that is not known.
        """
        from kolmo.control import value

        z = self.encoder(x).double()
        problem = self.problem(order=order, box=box, strict=strict)
        losses = value(problem, z, rtol=rtol, atol=atol, discretization=discretization)
        return _reduced(_of_label(losses, y), reduction)

    def plan(self, x: Tensor, *, order: int = 1, box: Any = None, **options: Any) -> Any:
        """Discretization for `pde_loss` at these data: `kolmo.plan` of `problem` at the features."""
        import kolmo

        with torch.no_grad():
            return kolmo.plan(self.problem(order=order, box=box), at=self.encoder(x).double(), **options)

    def expected_loss(self, x: Tensor, y: Tensor, **options: Any) -> LossEstimate:
        """Return the expected cross-entropy of each example ``(n,)``, by any method of `kolmo.bridge.expected_loss`."""
        with torch.no_grad():
            z = self.encoder(x)
        estimate = expected_loss(self.net, self.class_losses, z, **options)
        parts: dict[str, Any] = {name: getattr(estimate, name) for name in ("mean", "standard_error", "error_estimate")}
        parts = {name: None if v is None else _of_label(v, y) for name, v in parts.items()}
        return replace(estimate, **parts)


def _of_label(losses: Tensor, y: Tensor) -> Tensor:
    """Column y of each row."""
    return losses.gather(-1, y.reshape(-1, 1)).squeeze(-1)


def _reduced(losses: Tensor, reduction: str) -> Tensor:
    if reduction == "mean":
        return losses.mean()
    if reduction == "none":
        return losses
    raise InputError("reduction", repr(reduction), "'mean' or 'none'")
