r"""
With torchsde and xarray
========================

A process written for torchsde, solved here; one written here, sampled there; and a solution as a labelled array.
"""

import matplotlib.pyplot as plt
import numpy as np
import torch
import torchsde

import kolmo
from kolmo.interop import TorchSDE


class Pendulum(torch.nn.Module):
    """A noisy pendulum with friction, as torchsde takes it: angle and speed."""

    noise_type, sde_type = "diagonal", "ito"

    def f(self, t, y):
        angle, speed = y.unbind(-1)
        return torch.stack([speed, -torch.sin(angle) - 0.5 * speed], -1)

    def g(self, t, y):
        return torch.tensor([0.0, 0.6], dtype=y.dtype).expand_as(y)


# %%
# How far round does it go? The expectation of the cosine of the angle at time 2, from every state. The angle is
# periodic.

sde = kolmo.SDE.from_torchsde(Pendulum(), dim=2)
box = kolmo.Box([-np.pi, -5.0], [np.pi, 5.0], boundary=["periodic", "open"])
problem = kolmo.KolmogorovProblem(sde, lambda x: torch.cos(x[..., 0]), 2.0, box)
start = [2.0, 0.0]
solution = kolmo.solve(problem, at=[start], rtol=1e-4, save=[1.0])
print(f"solved:  {solution([start]).item():.5f} ± {solution.error_estimate.item():.1e}")

# %%
# The other way: the process that kolmo holds goes to ``torchsde.sdeint``.

torch.manual_seed(0)
y0 = torch.tensor(start, dtype=torch.float64).expand(5000, 2)
end = torchsde.sdeint(TorchSDE(sde), y0, torch.tensor([0.0, 2.0]), dt=0.02, method="euler")[-1]
cosine = torch.cos(end[:, 0])
print(f"sampled: {cosine.mean():.3f} ± {cosine.std() / len(cosine) ** 0.5:.3f}")

# %%
# ``to_xarray`` gives the values names for their axes and keeps status and error estimate as attributes.

u = solution.to_xarray().rename(x1="angle", x2="speed")
print(dict(u.sizes), u.attrs["status"])
figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained", sharey=True)
for ax, t in zip(axes, (0.0, 1.0), strict=True):
    field = u.sel(t=t, method="nearest")
    shown = ax.contourf(u.angle, u.speed, field.T, levels=np.linspace(-1, 1, 21), cmap="cividis")
    ax.set(title=f"E cos(angle at 2) from a state at t = {t:g}", xlabel="angle")
axes[0].set_ylabel("speed")
figure.colorbar(shown, ax=axes)
