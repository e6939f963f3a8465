r"""
A noisy network and its equation
================================

The expected loss of a residual network with noise in its layers, computed by the network's own layers and by the
backward Kolmogorov equation of its modified stochastic differential equation.

A layer adds :math:`h f_k(X) + \sqrt h\,s\zeta` with Gaussian :math:`\zeta`. To weak order 1 that is the process
:math:`dX = f\,dt + s\,dW`; to order 2 drift and noise have corrections of order h. The layers here have one unit of
state and weights that depend smoothly on depth, so that networks of all depths are discretisations of one flow.
"""

import matplotlib.pyplot as plt
import torch

from kolmo import bridge

DOUBLE = {"dtype": torch.float64}


def make(depth, noise=0.4):
    """The flow with that many layers, horizon 1."""
    layers = []
    for k in range(depth):
        t = (k + 0.5) / depth
        W1, b1 = torch.tensor([[1.5], [2.0]], **DOUBLE), torch.tensor([-t, 2.0 * t], **DOUBLE)
        layers.append(bridge.MLPBranch(W1, b1, torch.tensor([[1.2, t - 1.0]], **DOUBLE)))
    return bridge.NoisyResNet(layers, bridge.Additive(noise))


def loss(z):
    return 1 - torch.exp(-8 * (z[..., 0] - 0.5) ** 2)


# %%
# Growing noise smooths the loss as a function of the input: it is a viscosity. Dots are the network of eight
# layers, whose expected loss is found without sampling (each layer's transition is applied backwards on splines);
# lines are the equation.

x = torch.linspace(-1.5, 1.5, 151, **DOUBLE)[:, None]
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
for noise, colour in ((0.05, "#0072b2"), (0.2, "#009e73"), (0.4, "#e69f00"), (0.8, "#d55e00")):
    equation = bridge.expected_loss(make(8, noise), loss, x, method="pde", order=2, rtol=1e-3)
    network = bridge.expected_loss(make(8, noise), loss, x[::6], method="recursion", rtol=1e-4)
    print(f"noise {noise}: largest difference {(network.mean - equation.mean[::6]).abs().max():.1e}")
    left.plot(x, equation.mean, color=colour, label=f"s = {noise}")
    left.plot(x[::6], network.mean, "o", color=colour, ms=3)
left.set(xlabel="input x", ylabel="expected loss")
left.legend(frameon=False)

# %%
# With depth the two approach each other at the order that was asked for.

points = torch.tensor([[-1.0], [-0.2], [0.3], [1.0]], **DOUBLE)
for order, colour in ((1, "#0072b2"), (2, "#d55e00")):
    table = bridge.weak_error(make, [4, 8, 16], loss, points, order=order, rtol=1e-4)
    print(f"equation of order {order}\n{table}\n")
    table.plot(right, label=f"equation of order {order}", color=colour)
right.set(ylabel="largest |network − equation|", ylim=(2e-4, 6e-2))
right.legend(frameon=False, loc="lower left")
