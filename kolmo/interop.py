"""kolmo's processes for other packages: torchsde.

The other way round is ``SDE.from_torchsde``; ``Solution.to_xarray`` gives labelled arrays.
"""

import torch

from kolmo.errors import InputError
from kolmo.problem.sde import SDE, refuse_jumps

__all__ = ["TorchSDE"]


class TorchSDE(torch.nn.Module):
    """A process as ``torchsde.sdeint`` takes it: Itô, general noise.

    Parameters
    ----------
    sde : SDE
        The process. Modules among its coefficients are registered, so that ``parameters()`` finds them and
        ``sdeint_adjoint`` differentiates with respect to them.

    Attributes
    ----------
    noise_type, sde_type : str
        "general" and "ito": what torchsde asks for.

    Raises
    ------
    InputError
        For a process without noise.

    Examples
    --------
    >>> ou = SDE(lambda t, x: -x, diffusion=0.5, dim=2)
    >>> module = TorchSDE(ou)  # torchsde.sdeint(module, y0, ts, method="euler")
    >>> y = torch.ones(3, 2)
    >>> module.f(torch.tensor(0.0), y).shape, module.g(torch.tensor(0.0), y).shape
    (torch.Size([3, 2]), torch.Size([3, 2, 2]))
    """

    noise_type = "general"
    sde_type = "ito"

    def __init__(self, sde: SDE) -> None:
        super().__init__()
        refuse_jumps(sde, "torchsde", "kolmo.monte_carlo draws the paths of processes with jumps")
        if sde.noiseless:
            raise InputError("sde", "a process without noise", "one with noise", "torchdiffeq solves what has none")
        self.sde = sde
        self.coefficients = torch.nn.ModuleList(sde.modules)

    def f(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Drift at y of shape (batch, d)."""
        drift: torch.Tensor = self.sde.drift(float(t), y)
        return drift.to(y.dtype)

    def g(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Noise matrix at y, shape (batch, d, m)."""
        noise: torch.Tensor = self.sde.diffusion(float(t), y)
        return noise.to(y.dtype)
