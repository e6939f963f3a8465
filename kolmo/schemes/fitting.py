"""Exponentially fitted rates: off-diagonal entries that are never negative, whatever the drift."""

from typing import Any

from kolmo.arrays import Array, namespace


def fitted_rates(alpha: Array, A: Array) -> tuple[Array, Array]:
    r"""Rates up and down one axis: :math:`\tfrac12\alpha B(\mp 2A/\alpha)` with :math:`B(z) = z/(e^z - 1)`.

    Without noise (α = 0) they are upwind.
    Their difference is the drift A, their mean the diffusion α/2 with the least numerical diffusion that keeps both
    rates positive.

    Examples
    --------
    >>> import numpy as np
    >>> up, down = fitted_rates(np.array([0.0, 1.0]), np.array([-2.0, 0.0]))
    >>> up.tolist(), down.tolist()
    ([0.0, 0.5], [2.0, 0.5])
    """
    xp = namespace(alpha, A)
    noisy = alpha > 1e-3 * abs(A)
    noisy = noisy & (alpha > 0)
    safe = xp.where(noisy, alpha, abs(A) + 1.0)
    z = xp.where(noisy, 2.0 * A / safe, 0.0 * A)
    up = xp.where(noisy, 0.5 * safe * _bernoulli(-z, xp), xp.clip(A, 0.0, None))
    down = xp.where(noisy, 0.5 * safe * _bernoulli(z, xp), xp.clip(-A, 0.0, None))
    return up, down


def _bernoulli(z: Array, xp: Any) -> Array:
    """z / (e^z − 1) without cancellation or overflow."""
    small = abs(z) < 1e-3
    far = xp.where(small, 1.0 + 0.0 * z, z)
    # only the exponential would overflow: held back itself, z would lose drift where there is little noise
    return xp.where(small, 1.0 - z / 2.0 + z**2 / 12.0, far / xp.expm1(xp.clip(far, -700.0, 700.0)))
