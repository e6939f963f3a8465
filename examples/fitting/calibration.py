r"""
Fit a drift to observed expectations
====================================

A potential is recovered from a few averages: an inverse problem, solved with exact gradients.

Particles move in an unknown force field, :math:`dX = b_\theta(X)\,dt + 0.7\,dW`. What is known are averages
:math:`\mathbb E[\varphi_k(X_1) \mid X_0 = x_i]` of three observables from a number of starts. Several observables are
several columns of the terminal data, solved together.
"""

import matplotlib.pyplot as plt
import torch

import kolmo
from kolmo import control

starts = torch.linspace(-1.8, 1.8, 13, dtype=torch.float64)[:, None]


def observables(x):
    return torch.cat([x, x**2, torch.tanh(3 * x)], -1)


def truth(t, x):
    return x - x**3 + 0.3


exact = kolmo.SDE(truth, diffusion=0.7, dim=1, arrays="torch")
data = kolmo.solve(kolmo.KolmogorovProblem(exact, observables, 1.0), at=starts, rtol=1e-6)(starts)
noisy = torch.as_tensor(data) + 0.01 * torch.randn(data.shape, generator=torch.Generator().manual_seed(0)).double()

# %%
# The model of the force is a sum of seven Gaussian bumps. The problem is built once, outside the objective, so that
# :func:`kolmo.control.minimize` can plan its grid once and check that plan again at the end.

centres = torch.linspace(-2.4, 2.4, 7, dtype=torch.float64)
weights = torch.zeros(7, dtype=torch.float64, requires_grad=True)


def force(t, x):
    return (weights * torch.exp(-0.5 * ((x - centres) / 0.8) ** 2)).sum(-1, keepdim=True)


model = kolmo.SDE(force, diffusion=0.7, dim=1, arrays="torch")
problem = kolmo.KolmogorovProblem(model, observables, 1.0)


def misfit():
    residual = control.value(problem, starts, rtol=1e-4) - noisy
    return (residual / 0.01).square().mean() + 1e-2 * weights.square().mean()


fit = control.minimize(misfit, weights, maxiter=60)
print(f"misfit {fit.history['objective'][0]:.0f} → {fit.fun:.2f} in {fit.nit} iterations")

# %%
# A misfit near 1 says that the data are met as well as their noise allows. Where no particle goes, the force is not
# determined by the data: the fit is good between the outer starts and arbitrary beyond.

x = torch.linspace(-2.4, 2.4, 200, dtype=torch.float64)[:, None]
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
left.plot(x, truth(0.0, x), color="0.6", lw=3, label="truth")
left.plot(x, force(0.0, x).detach(), color="#0072b2", label="fitted")
left.axvspan(-1.8, 1.8, color="#0072b2", alpha=0.07)
left.set(xlabel="x", ylabel="force", ylim=(-6, 6))
left.legend(frameon=False)
fitted = control.value(problem, x[20:-20], rtol=1e-4).detach()
for k, (name, colour) in enumerate(zip(("x", "x²", "tanh 3x"), ("#0072b2", "#d55e00", "#009e73"), strict=True)):
    right.plot(x[20:-20, 0], fitted[:, k], color=colour)
    right.plot(starts[:, 0], noisy[:, k], "o", color=colour, ms=4, label=f"E {name}")
right.set(xlabel="start x", ylabel="observed (dots) and fitted (lines)")
right.legend(frameon=False)
