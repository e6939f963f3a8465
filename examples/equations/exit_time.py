r"""
Exit times of a double well
===========================

How long does a particle stay in its well? The mean time to reach another place is a backward Kolmogorov equation
without a horizon: source 1, absorbing face.

The process is :math:`dX = (X - X^3)\,dt + \sigma\,dW`, a walk in the potential :math:`V = x^4/4 - x^2/2`. The mean
time :math:`u(x)` to pass 1 solves

.. math:: b\,u' + \tfrac12\sigma^2 u'' + 1 = 0, \qquad u(1) = 0 .

A problem without ``terminal`` and ``horizon`` is stationary. The left end of the box is a cut, ``"open"``: the
particle has no business there, and the solver measures what the cut does to the answer.
"""

import matplotlib.pyplot as plt
import numpy as np

import kolmo


def passage(sigma):
    sde = kolmo.SDE(lambda t, x: x - x**3, diffusion=sigma, dim=1)
    box = kolmo.Box(-4.0, 1.0, [("open", "absorbing")])
    return kolmo.KolmogorovProblem(sde, None, None, box, source=1.0)


for sigma in (0.7, 0.5, 0.4):
    solution = kolmo.solve(passage(sigma), at=[-1.0], rtol=1e-6)
    print(f"σ = {sigma}: mean time {solution(-1.0):.5f} ± {solution.error_estimate.item():.1e}")

# %%
# The time grows like :math:`e^{2\Delta V/\sigma^2}` (Kramers). The exact answer is a double integral; the validation
# page compares with it.
#
# A mean says little about a waiting time. Its whole density is the flux of probability through the face: the forward
# equation from the starting point, which uses the transpose of the backward steps.

sigma, horizon = 0.7, 40.0
sde = kolmo.SDE(lambda t, x: x - x**3, diffusion=sigma, dim=1)
within = kolmo.KolmogorovProblem(sde, lambda x: 0 * x[..., 0], horizon, kolmo.Box(-4.0, 1.0, [("open", "absorbing")]))
density = kolmo.solve_forward(within, [-1.0], grid=161, steps=800, save=[0.5, 2.0, 8.0])
print(f"still waiting at t = {horizon:g}: {density.mass[-1]:.4f}")

# %%
# After a short time the law has forgotten its start and only its mass decays: the waiting time becomes exponential.

figure, (left, middle, right) = plt.subplots(1, 3, figsize=(10, 3.2), layout="constrained")
x = np.linspace(-2.5, 1.0, 300)
for noise, colour in ((0.7, "#0072b2"), (0.6, "#009e73"), (0.5, "#d55e00")):
    solution = kolmo.solve(passage(noise), at=[-1.0], rtol=1e-6)
    left.semilogy(x[:-1], solution(x[:-1]), color=colour, label=f"σ = {noise}")
left.set(xlabel="start x", ylabel="mean time to pass 1", ylim=(1, 100))
left.legend(frameon=False)

for t, colour in ((0.5, "0.7"), (2.0, "0.45"), (8.0, "0.0")):
    middle.plot(x, density(x, t), color=colour, label=f"t = {t:g}")
middle.set(xlabel="x", ylabel="density of paths still inside")
middle.legend(frameon=False)

flux = density.exit_flux("high")
right.plot(density.clock, flux, color="#0072b2", label="first-passage density")
rate = flux[-1] / density.mass[-1]
right.plot(density.clock, rate * density.mass[-1] * np.exp(rate * (horizon - density.clock)), "k:", label="exponential")
right.set(xlabel="time", ylabel="probability per time", ylim=(0, None))
right.legend(frameon=False)
