r"""
What noise does to a trained network
====================================

The expected loss over the plane of features, at fixed weights and growing noise: from the equation, and along a
line from the network itself.

A residual network of 16 layers is trained to push two moons apart, with noise 0.3 in every layer. Then the weights
stay, and only the noise changes.
"""

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import make_moons

import kolmo
from kolmo import bridge

torch.manual_seed(0)
x, y = (torch.as_tensor(v) for v in make_moons(300, noise=0.1, random_state=0))
x = (x - x.mean(0)).double()
layers = [bridge.MLPBranch.create(2, 16, rng=k, dtype=torch.float64) for k in range(16)]
head = torch.nn.Linear(2, 2, dtype=torch.float64)
model = bridge.FlowClassifier(torch.nn.Identity(), bridge.NoisyResNet(layers, bridge.Additive(0.3)), head)
optimiser = torch.optim.Adam(model.parameters(), lr=0.02)
for _ in range(150):
    optimiser.zero_grad()
    model.sampled_loss(x, y, draws=2).backward()
    optimiser.step()


def with_noise(s):
    """The trained classifier with another noise in its layers."""
    return bridge.FlowClassifier(model.encoder, bridge.NoisyResNet(layers, bridge.Additive(s)), model.head)


# %%
# The loss of label 1 where the features start, :math:`u(0, x) = \mathbb E[-\log p_1(X_T) \mid X_0 = x]`, is one column
# of the classifier's backward equation. The grid is given here, so there is no error estimate; instead the network
# itself is sampled along a line.

noises = {0.25: "#0072b2", 0.5: "#e69f00", 1.0: "#d55e00"}
axis, t = np.linspace(-2.0, 2.0, 61), np.linspace(-2.0, 2.0, 81)
plane, line = np.stack(np.meshgrid(axis, axis, indexing="ij"), -1), np.stack([0.4 * t, t], -1)
dots = torch.as_tensor(line[::8])
box = kolmo.Box([-5.0, -5.0], [5.0, 5.0])

figure, axes = plt.subplots(1, 4, figsize=(12, 3.0), layout="constrained", width_ratios=[1, 1, 1, 1.5])
for ax, (s, colour) in zip(axes, noises.items(), strict=False):
    noisy = with_noise(s)
    equation = kolmo.solve(noisy.problem(box=box), grid=(101, 101), steps=64)
    profile = np.asarray(equation(line))[:, 1]
    network = noisy.expected_loss(dots, torch.ones(len(dots), dtype=torch.long), paths=4000, rng=0)
    error = np.abs(network.mean.numpy() - profile[::8]).max()
    print(f"noise {s}: differ by {error:.3f} at most, standard errors up to {network.standard_error.max():.3f}")
    field = np.asarray(equation(plane))[..., 1]
    shown = ax.contourf(axis, axis, field.T, levels=np.linspace(0, 6, 25), cmap="cividis", extend="both")
    ax.scatter(*x.T, c=["white" if label else "black" for label in y], s=2, alpha=0.6)
    ax.plot(*line.T, color=colour, lw=1.5, ls="--")
    ax.set(title=f"noise {s}", xlabel="feature 1", aspect="equal", xlim=(-2, 2), ylim=(-2, 2))
    axes[3].plot(t, profile, color=colour, label=f"noise {s}")
    axes[3].errorbar(t[::8], network.mean, 2 * network.standard_error, fmt="o", ms=4, color=colour)
axes[0].set_ylabel("feature 2")
figure.colorbar(shown, ax=axes[:3], label="expected loss of label 1", ticks=range(7))
axes[3].set(title="lines: equation, dots: network", xlabel="feature 2 along the dashed line", ylabel="expected loss")
axes[3].legend(frameon=False)

# %%
# Noise is a viscosity: it rounds the steep front between the classes and carries loss to where there was none.
# Network and equation differ by the weak error of order 1 in 1/16, on top of the sampling error that the bars show
# (two standard errors).
