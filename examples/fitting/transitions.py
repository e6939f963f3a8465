r"""
Where do transitions pass, and how often?
=========================================

A particle in a potential with several wells spends its time in one of them and passes to another now and then. From
where will it reach the well B before it falls back to A? That probability is the committor q; its level set 1/2 is the
watershed, and its current shows the way that transitions take.

The potential is that of Müller and Brown (1979) at the temperature 20, A and B are discs about its two deepest minima:

.. math:: dX = -\nabla V(X)\,dt + \sqrt{2 \cdot 20}\,dW, \qquad
    -\nabla V\cdot\nabla q + 20\,\Delta q = 0, \quad q = 0 \text{ on } A,\; q = 1 \text{ on } B .
"""

import matplotlib.pyplot as plt
import numpy as np
import torch

import kolmo
from kolmo import control

HILLS = np.array(
    [
        # height, xx, xy, yy, place
        [-200.0, -1.0, 0.0, -10.0, 1.0, 0.0],
        [-100.0, -1.0, 0.0, -10.0, 0.0, 0.5],
        [-170.0, -6.5, 11.0, -6.5, -0.5, 1.5],
        [15.0, 0.7, 0.6, 0.7, -1.0, 1.0],
    ]
)
temperature, radius = 20.0, 0.15
A, B = torch.tensor([-0.558, 1.442], dtype=torch.float64), torch.tensor([0.623, 0.028], dtype=torch.float64)


def hills(x):
    """The terms of V and their gradients."""
    for height, xx, xy, yy, p, q in HILLS:
        u, v = x[..., 0] - p, x[..., 1] - q
        e = height * torch.exp(xx * u * u + xy * u * v + yy * v * v)
        yield e, torch.stack([e * (2 * xx * u + xy * v), e * (xy * u + 2 * yy * v)], -1)


q = control.committor(
    kolmo.SDE(lambda t, x: -sum(g for _, g in hills(x)), (2 * temperature) ** 0.5, dim=2, arrays="torch"),
    lambda x: (x - A).norm(dim=-1) - radius,
    lambda x: (x - B).norm(dim=-1) - radius,
    kolmo.Box([-1.6, -0.6], [1.3, 2.1], "reflecting"),
    density=lambda x: torch.exp(-sum(e for e, _ in hills(x)) / temperature),
    at=[[-0.3, 0.5], [-0.8, 0.6]],
    rtol=1e-3,
)
print(f"q(−0.3, 0.5) = {q([-0.3, 0.5]):.4f} ± {q.error_estimate.max():.0e}")
print(
    f"{q.rate:.4f} ± {q.rate_error:.0e} transitions in a unit of time; mean time from A to B {1 / q.rate_constant:.3f}"
)

# %%
# The sets are given by level functions; nothing of the grid follows them. The current is strongest in the channel over
# the two saddles; the watershed crosses it where the potential is highest.

x, y = np.linspace(-1.6, 1.3, 145), np.linspace(-0.6, 2.1, 135)
points = np.stack(np.meshgrid(x, y, indexing="ij"), -1)
V = sum(e for e, _ in hills(torch.as_tensor(points))).numpy()
flux = q.flux(points)

figure, axes = plt.subplots(1, 2, figsize=(10, 4.4), layout="constrained")
filled = axes[0].contourf(x, y, q(points).T, levels=np.linspace(0, 1, 11), cmap="cividis")
figure.colorbar(filled, ax=axes[0], label="probability of B before A")
axes[0].contour(x, y, V.T, levels=np.arange(-150, 60, 20), colors="white", linewidths=0.6, linestyles="solid")
axes[0].contour(x, y, q(points).T, levels=[0.5], colors="#d55e00", linewidths=2)
axes[0].set_title("From where is B reached first?")
strength = np.linalg.norm(flux, axis=-1)
filled = axes[1].contourf(x, y, strength.T, levels=20, cmap="magma")
figure.colorbar(filled, ax=axes[1], label="current of transitions")
axes[1].streamplot(x, y, flux[..., 0].T, flux[..., 1].T, color="white", linewidth=0.8, density=0.9)
axes[1].set_title("Which way do transitions take?")
for ax in axes:
    for centre, name in ((A, "A"), (B, "B")):
        ax.add_patch(plt.Circle(tuple(centre.tolist()), radius, color="0.85"))
        ax.text(*centre.tolist(), name, ha="center", va="center")
    ax.set(xlabel="$x_1$", ylabel="$x_2$", aspect="equal", xlim=(-1.6, 1.3), ylim=(-0.6, 2.1))
