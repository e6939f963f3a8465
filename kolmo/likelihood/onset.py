r"""First passages so early that next to nothing has arrived: what eigenfunctions cannot resolve.

With :math:`z = \int dx/\sigma` the process has unit noise and drift :math:`\mu = b/\sigma - \tfrac12\sigma'`. The
density of the time s of the first passage over a distance d in z is

.. math::
    q(s) = \frac{d}{\sqrt{2\pi s^3}}\exp\Big(-\frac{d^2}{2s} + \int\mu\,dz - \frac{s}{d}\int
        \big(\tfrac12(\mu^2 + \mu') + c\big)|dz|\Big)\,(1 + O(s^2)),

by Girsanov's change of measure and the straight line, which is where a path goes that is this early; exact for constant
μ and c. What another bound at a distance e behind the start takes away is that of the image of the start in it, at the
distance d + 2e.
"""

import math
from dataclasses import dataclass, replace

import torch

from kolmo.likelihood.strip import places

# Points of the quadrature from a start to a bound.
POINTS = 16


@dataclass(frozen=True)
class Onset:
    """What the formula needs of the ways from starting points (C, S) to one bound.

    Attributes
    ----------
    distance : tensor, shape (C, S)
        d.
    pull : tensor, shape (C, S)
        ∫ μ dz.
    rate : tensor, shape (C, S)
        Mean of ½(μ² + μ') + c on the way.
    behind : tensor or None, shape (C, S)
        e; None: there is no other bound.
    """

    distance: torch.Tensor
    pull: torch.Tensor
    rate: torch.Tensor
    behind: torch.Tensor | None = None

    def log_density(self, s: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
        """Log q at times (N, J) of conditions (N,), per starting point: shape (N, J, S)."""
        d, pull, rate = (v[group][:, None, :] for v in (self.distance, self.pull, self.rate))
        s = s[..., None]
        free = torch.log(d) - 0.5 * math.log(2.0 * math.pi) - 1.5 * torch.log(s) - d**2 / (2.0 * s) + pull - s * rate
        if self.behind is None:
            return free
        e = self.behind[group][:, None, :]
        lost = (1.0 + 2.0 * e / d) * torch.exp(-2.0 * e * (d + e) / s)
        # where the image takes all, the formula does not hold, and is not used
        return free + torch.log1p(-lost.clamp(max=0.99))

    def beside(self, other: "Onset | None") -> "Onset":
        """The same with another bound behind the starting points."""
        return replace(self, behind=None if other is None else other.distance)


class Way:
    """Gauss points on the ways from starting points (C, S) to bounds (C,).

    Attributes
    ----------
    points : tensor, shape (C, S, POINTS)
        Where coefficients are needed.
    """

    def __init__(self, start: torch.Tensor, bound: torch.Tensor) -> None:
        self._way = bound[:, None] - start
        self.points = start[..., None] + places(POINTS).points * self._way[..., None]

    def onset(self, b: torch.Tensor, S: torch.Tensor, c: torch.Tensor | None) -> Onset:
        """The formula, from drift, covariance and killing rate at the points."""
        gauss, way = places(POINTS), self._way[..., None]  # dx / dξ
        sigma = torch.sqrt(S)
        mu = b / sigma - 0.5 * (sigma @ gauss.slopes.T) / way
        w = gauss.weights * way
        distance = (w / sigma).sum(-1).abs()
        ends, edge = mu @ gauss.ends.T, torch.log(sigma @ gauss.ends.T)
        pull = (w * b / S).sum(-1) - 0.5 * (edge[..., 1] - edge[..., 0])
        bend = torch.sign(self._way) * (ends[..., 1] - ends[..., 0])
        rate = 0.5 * ((w * mu**2 / sigma).sum(-1).abs() + bend) / distance
        if c is not None:
            rate = rate + (w * c / sigma).sum(-1).abs() / distance
        return Onset(distance, pull, rate)
