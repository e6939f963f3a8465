r"""
A kolmo loss inside Lightning
=============================

An expected loss without sampling noise, minimised by an ordinary PyTorch Lightning training loop.

The losses of :class:`kolmo.bridge.FlowClassifier` are differentiable tensors like any other, so they go where a
loss goes: into ``training_step``. Here the classifier flows two moons apart in the plane, with noise 0.3 in its
eight layers. ``pde_loss`` is its expected cross-entropy through the backward Kolmogorov equation; the noise is in
the equation, not in the gradient.

(Needs ``pip install 'kolmo[lightning]'``.)
"""

import logging
import warnings

import matplotlib.pyplot as plt
import numpy as np
import pytorch_lightning as lightning
import torch
from sklearn.datasets import make_moons

import kolmo
from kolmo import bridge

logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module="pytorch_lightning|torch")
x, y = (torch.as_tensor(v) for v in make_moons(200, noise=0.12, random_state=0))
x = x - x.mean(0)


class NoisyFlow(lightning.LightningModule):
    """A flow classifier that is trained through its equation."""

    def __init__(self):
        super().__init__()
        layers = [bridge.MLPBranch.create(2, 16, rng=k) for k in range(8)]
        head = torch.nn.Linear(2, 2)
        torch.nn.init.eye_(head.weight)
        self.classifier = bridge.FlowClassifier(
            torch.nn.Identity(), bridge.NoisyResNet(layers, bridge.Additive(0.3)), head
        ).double()
        # One discretisation for the whole training: a new plan in every step would make the objective jump.
        box = kolmo.Box([-5.0, -5.0], [5.0, 5.0])
        self.recipe = kolmo.solve(self.classifier.problem(box=box), grid=(35, 35), steps=16).discretization
        self.box, self.history = box, []

    def training_step(self, batch):
        loss = self.classifier.pde_loss(*batch, box=self.box, discretization=self.recipe)
        self.history.append(loss.item())
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.05)


# %%
# Full batches: one backward equation serves all points and both classes at once, so that more points cost next to
# nothing.

torch.manual_seed(0)
module = NoisyFlow()
trainer = lightning.Trainer(
    max_epochs=25,
    accelerator="cpu",
    devices=1,
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
batches = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=200)
trainer.fit(module, batches)
print(f"expected cross-entropy: {module.history[0]:.3f} → {module.history[-1]:.3f}")

# %%
# An optimiser finds what a grid does not resolve, so the answer is checked by something else: sampled passes of the
# network itself (of which the equation is the weak limit, to order 1 in 1/8), and the equation to a tolerance.

classifier = module.classifier.eval()
axis = torch.linspace(-2.2, 2.2, 45, dtype=torch.float64)
states = torch.cat([x, torch.cartesian_prod(axis, axis)])
classes = torch.cat([y, torch.ones(45 * 45, dtype=torch.long)])
finer = classifier.expected_loss(states, classes, method="pde", rtol=2e-3, max_seconds=300).mean
paths = classifier.expected_loss(x, y, paths=400, rng=0).mean
print(f"sampled layers {paths.mean():.3f}, equation to a tolerance {finer[:200].mean():.3f}")

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
left.plot(module.history, color="#0072b2")
left.set(xlabel="step", ylabel="expected cross-entropy", ylim=(0, None))
chance = torch.exp(-finer[200:]).reshape(45, 45)
shown = right.contourf(axis, axis, chance.T, levels=np.linspace(0, 1, 21), cmap="cividis")
right.scatter(*x.T, c=["#56b4e9" if label else "#d55e00" for label in y], s=9, edgecolors="k", linewidths=0.3)
right.set(xlabel="$x_1$", ylabel="$x_2$", aspect="equal", xlim=(-2.2, 2.2), ylim=(-1.6, 1.6))
figure.colorbar(shown, ax=right, label="exp(−expected loss of the blue class)")
