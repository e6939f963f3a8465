r"""Linear processes with gradients: X_t given X_0 = x is Gaussian, exactly.

.. math:: dX = (AX + \beta)\,dt + \sigma\,dW, \qquad X_h \sim N\Big(e^{Ah}x + \int_0^h e^{As}\beta\,ds,\
    \int_0^h e^{As}\Sigma e^{A^{\mathsf T}s}ds\Big)

by the exponential of one matrix (Van Loan 1978) over a short time, doubled.
"""

import math
from typing import NamedTuple

import numpy as np
import torch

from kolmo.control.linear import LinearProcess
from kolmo.problem.sde import SDE

# Largest exponent of the exponential; longer times are made of shorter ones.
SHORT = 0.5


class Moves(NamedTuple):
    """Gaussian transitions: mean ``matrix @ x + shift``, and covariance; shapes (U, d, d), (U, d), (U, d, d)."""

    matrix: torch.Tensor
    shift: torch.Tensor
    covariance: torch.Tensor

    def twice(self) -> "Moves":
        """Of two of them, one after the other."""
        M = self.matrix
        shift = (M @ self.shift[..., None])[..., 0] + self.shift
        return Moves(M @ M, shift, M @ self.covariance @ M.mT + self.covariance)


def is_linear(sde: SDE, points: np.ndarray, horizon: float) -> bool:
    """Whether drift is affine and noise the same everywhere, at points (n, d) and in time."""
    return LinearProcess.found(sde, horizon, points) is not None


def moves(sde: SDE, centre: torch.Tensor, size: torch.Tensor, spacing: torch.Tensor) -> Moves:
    """Transitions over times (U,) of a linear process; slopes are differences over sizes (d,) about a centre (d,).

    Examples
    --------
    >>> ou = SDE(lambda t, x: -2.0 * x, 1.0, dim=1, arrays="torch")
    >>> found = moves(ou, torch.zeros(1).double(), torch.ones(1).double(), torch.tensor([0.5]).double())
    >>> bool((found.covariance - 0.25 * (1 - torch.exp(torch.tensor(-2.0).double()))).abs().max() < 1e-14)
    True
    """
    d = len(centre)
    steps = torch.diag(size)
    b = sde.drift(0.0, torch.cat([centre[None], centre + steps, centre - steps]))
    A = (0.5 * (b[1 : d + 1] - b[d + 1 :]) / size[:, None]).T
    beta, S = b[0] - A @ centre, sde.covariance(0.0, centre[None])[0]
    C = torch.cat(
        [
            torch.cat([A, S, beta[:, None]], 1),
            torch.cat([torch.zeros_like(A), -A.T, torch.zeros(d, 1, dtype=torch.float64)], 1),
            torch.zeros(1, 2 * d + 1, dtype=torch.float64),
        ]
    )
    longest = float(A.detach().abs().sum(1).max() * spacing.max())
    halvings = max(0, math.ceil(math.log2(longest / SHORT))) if longest > 0 else 0
    E = torch.linalg.matrix_exp(C * (spacing * 0.5**halvings)[:, None, None])
    M = E[:, :d, :d]
    found = Moves(M, E[:, :d, 2 * d], E[:, :d, d : 2 * d] @ M.mT)
    for _ in range(halvings):
        found = found.twice()
    return found._replace(covariance=0.5 * (found.covariance + found.covariance.mT))


def moved(sde: SDE, places: torch.Tensor, times: torch.Tensor) -> Moves:
    """Transitions over times (n,), some of them equal, of a linear process about places (p, d): shapes (n, d, d), .."""
    low, high = places.amin(0), places.amax(0)
    size = torch.maximum(high - low, torch.full_like(low, 1e-300))
    spacing, which = torch.unique(times, return_inverse=True)
    return Moves(*(v[which] for v in moves(sde, 0.5 * (low + high), size, spacing)))


def log_normal(y: torch.Tensor, mean: torch.Tensor, covariance: torch.Tensor) -> torch.Tensor:
    """Logarithm of the Gaussian density, shapes (M, d), (M, d), (M, d, d) -> (M,)."""
    L = torch.linalg.cholesky(covariance)
    z = torch.linalg.solve_triangular(L, (y - mean)[..., None], upper=False)[..., 0]
    size = torch.log(torch.diagonal(L, dim1=-2, dim2=-1)).sum(-1) + 0.5 * y.shape[-1] * math.log(2.0 * math.pi)
    logs: torch.Tensor = -0.5 * (z**2).sum(-1) - size
    return logs
