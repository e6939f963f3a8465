"""One step of a path between faces: methods by name, with their weak orders."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from kolmo.montecarlo.model import Model, uniform
from kolmo.registry import Registry


@dataclass(frozen=True)
class Increment:
    """A time step [t, t + dt] with its Brownian increment.

    Attributes
    ----------
    t, end, dt : float
        Start; end as coefficients see it (just before a breakpoint); length.
    dW : ndarray, shape (N, m)
        Increment.
    signs : ndarray, shape (N, m, m)
        Random signs, antisymmetric, for the double integrals.
    """

    t: float
    end: float
    dt: float
    dW: np.ndarray
    signs: np.ndarray


Step = Callable[[Model, np.ndarray, Increment], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Method:
    """A one-step method: name, weak order, and ``step(model, x, increment)`` -> (new x, σ(t, x))."""

    name: str
    order: float
    step: Step


METHODS: Registry[Method] = Registry("method")


def applied(sigma: np.ndarray, dW: np.ndarray) -> np.ndarray:
    """σ dW, shape (N, d); of one matrix for all points one product."""
    if uniform(sigma):
        return np.asarray(dW @ sigma[0].T)
    return np.asarray(np.einsum("nij,nj->ni", sigma, dW))


def squared(sigma: np.ndarray) -> np.ndarray:
    """σσᵀ, shape (N, d, d); of one matrix for all points one product."""
    one = sigma[:1] if uniform(sigma) else sigma
    return np.broadcast_to(one @ np.swapaxes(one, -1, -2), (*sigma.shape[:-1], sigma.shape[-2]))


def euler(model: Model, x: np.ndarray, inc: Increment) -> tuple[np.ndarray, np.ndarray]:
    """Euler–Maruyama step, weak order 1."""
    sigma = model.diffusion(inc.t, x)
    return x + model.drift(inc.t, x) * inc.dt + applied(sigma, inc.dW), sigma


def platen(model: Model, x: np.ndarray, inc: Increment) -> tuple[np.ndarray, np.ndarray]:
    """Platen's explicit step of weak order 2 for general noise (Kloeden and Platen 1992, equation 15.1.3)."""
    dt, dW, root = inc.dt, inc.dW, math.sqrt(inc.dt)
    a, b = model.drift(inc.t, x), model.diffusion(inc.t, x)
    ahead = x + a * dt
    y = x + 0.5 * dt * (a + model.drift(inc.end, model.readable(inc.end, ahead + applied(b, dW), dt))) + applied(b, dW)
    if uniform(b) and uniform(after := model.diffusion(inc.end, model.readable(inc.end, ahead, dt))):
        return y + 0.5 * applied(after - b, dW), b  # what is left of the corrections for noise without x
    for j in range(b.shape[-1]):
        shift = b[..., j] * root
        # the noise ahead, moved along column j: all columns of the row "U", column j of the row "R"
        up, down = (
            model.diffusion(inc.end, model.readable(inc.end, ahead + s * shift, dt))[..., j] for s in (1.0, -1.0)
        )
        w = dW[:, j, None]
        y += 0.25 * (up + down - 2.0 * b[..., j]) * w + 0.25 / root * (up - down) * (w**2 - dt)
        if b.shape[-1] > 1:
            up_all, down_all = (model.diffusion(inc.t, model.readable(inc.t, x + s * shift, dt)) for s in (1.0, -1.0))
            mixed = dW[:, j, None] * dW + dt * inc.signs[:, j, :]
            first, second = (up_all - down_all) / root, up_all + down_all - 2.0 * b
            first[..., j], second[..., j] = 0.0, 0.0
            y += 0.25 * (applied(second, dW) + applied(first, mixed))
    return y, b


METHODS.add("euler", Method("euler", 1.0, euler))
METHODS.add("platen", Method("platen", 2.0, platen))
