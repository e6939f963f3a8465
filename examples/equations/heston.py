r"""
A Heston call with its Greeks
=============================

A call option when the variance is itself a process: a value to a stated tolerance, and its sensitivities to the state
and to the parameters.

.. math::
    dS = rS\,dt + \sqrt v\,S\,dW_1, \qquad dv = \kappa(\theta - v)\,dt + \xi\sqrt v\,dW_2,
    \qquad d\langle W_1, W_2\rangle = \rho\,dt

Both :math:`S = 0` and :math:`v = 0` are degenerate ends of the state space, which is what the face ``"natural"`` is
for; the other ends are at infinity. Discounting is killing at the rate r.
"""

import matplotlib.pyplot as plt
import numpy as np
import torch

import kolmo
from kolmo import control

names = ("kappa", "theta", "xi", "rho")
parameters = dict(zip(names, torch.tensor([1.5, 0.04, 0.3, -0.9], dtype=torch.float64), strict=True))
for p in parameters.values():
    p.requires_grad_()
rate, strike = 0.025, 100.0


def drift(t, x):
    S, v = x[..., 0], x[..., 1]
    return torch.stack([rate * S, parameters["kappa"] * (parameters["theta"] - v)], -1)


def covariance(t, x):
    S, v = x[..., 0], x[..., 1]
    xi, rho = parameters["xi"], parameters["rho"]
    mixed = rho * xi * S * v
    return torch.stack([torch.stack([v * S**2, mixed], -1), torch.stack([mixed, xi**2 * v], -1)], -2)


problem = kolmo.KolmogorovProblem(
    kolmo.SDE(drift, covariance=covariance, dim=2, arrays="torch"),
    lambda x: (x[..., 0] - strike).clamp(min=0.0),
    1.0,
    kolmo.Box([0.0, 0.0], [np.inf, np.inf], boundary=[("natural", "open")] * 2),
    killing=rate,
)
here = [[100.0, 0.04]]
call = kolmo.solve(problem, at=here, rtol=5e-4)
print(call.discretization)

# %%
# Delta, gamma and vega are derivatives of the interpolated solution. The estimate is that of the value. (Lewis's
# Fourier integral gives 8.894869 for these parameters.)

value, gradient, hessian = call(here).item(), call.gradient(here)[0], call.hessian(here)[0]
print(f"value    {value:.5f} ± {call.error_estimate.item():.1e}")
print(f"delta    {gradient[0]:.4f}")
print(f"gamma    {hessian[0, 0]:.5f}")
print(f"∂/∂v     {gradient[1]:.3f}")

# %%
# Sensitivities to the parameters come from one backward sweep through the transposed steps, all at once. They are
# exact derivatives of the number that :func:`kolmo.control.value` returns.

u = control.value(problem, here, discretization=call.discretization)
u.sum().backward()
for name, p in parameters.items():
    print(f"∂/∂{name:<6} {p.grad.item():9.4f}")

# %%
# Value and Greeks over the state, from the one solution:

S, v = np.linspace(60.0, 150.0, 91), np.linspace(0.005, 0.16, 61)
states = np.stack(np.meshgrid(S, v, indexing="ij"), -1)
fields = {
    "value": call(states),
    "delta": call.gradient(states)[..., 0],
    "gamma": call.hessian(states)[..., 0, 0],
}
figure, axes = plt.subplots(1, 3, figsize=(10, 3.1), layout="constrained", sharey=True)
for ax, (name, field) in zip(axes, fields.items(), strict=True):
    shown = ax.contourf(S, v, np.asarray(field).T, levels=20, cmap="cividis")
    ax.plot(*here[0], "w+", ms=9)
    ax.set(title=name, xlabel="S")
    figure.colorbar(shown, ax=ax)
axes[0].set_ylabel("v")
