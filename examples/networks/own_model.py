r"""
From my PyTorch model to its landscape
======================================

A model written the usual way, noise put into its residual blocks without touching its code, and its loss landscape
with and without noise, with error bars.

Step 1: a model
---------------

Any ``nn.Module`` will do. This one is a small residual network with group normalisation, laid out as in
torchvision: a stem, blocks with a ``downsample`` path, a head. (Batch normalisation in training mode mixes the
samples of a batch, so that no equation for one sample describes the noisy passes; kolmo refuses it unless it is
frozen.)
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

from kolmo import bridge, landscape

torch.manual_seed(0)


class BasicBlock(nn.Module):
    def __init__(self, inplanes, planes, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, padding=1, bias=False)
        self.gn1 = nn.GroupNorm(4, planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.gn2 = nn.GroupNorm(4, planes)
        same = stride == 1 and inplanes == planes
        self.downsample = nn.Identity() if same else nn.Conv2d(inplanes, planes, 1, stride, bias=False)

    def forward(self, x):
        out = functional.relu(self.gn1(self.conv1(x)))
        out = self.gn2(self.conv2(out))
        return functional.relu(out + self.downsample(x))


class SmallResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1, bias=False)
        self.layer1 = nn.Sequential(BasicBlock(8, 8), BasicBlock(8, 8))
        self.layer2 = nn.Sequential(BasicBlock(8, 16, stride=2), BasicBlock(16, 16))
        self.fc = nn.Linear(16, 10)

    def forward(self, x):
        return self.fc(self.layer2(self.layer1(self.stem(x))).mean((-1, -2)))


# %%
# Step 2: train it
# ----------------
#
# The handwritten digits that come with scikit-learn, a few hundred steps.

digits = load_digits()
images = torch.tensor(digits.images[:, None] / 16.0, dtype=torch.float32)
labels = torch.tensor(digits.target)
model = SmallResNet()
optimiser = torch.optim.AdamW(model.parameters(), lr=0.01)
for _ in range(150):
    batch = torch.randint(0, 1400, (64,))
    optimiser.zero_grad()
    functional.cross_entropy(model(images[batch]), labels[batch]).backward()
    optimiser.step()
model.eval()
with torch.no_grad():
    accuracy = (model(images[1400:]).argmax(-1) == labels[1400:]).float().mean()
print(f"accuracy on images it has not seen: {accuracy:.3f}")

# %%
# Step 3: put noise in
# --------------------
#
# ``inject`` finds the ends of the residual branches and hooks a noise law there; ``model.train()`` makes the passes
# noisy, ``model.eval()`` takes the mean. Stochastic depth multiplies every branch by 0 or 1/keep.

noise = bridge.inject(model, bridge.StochasticDepth(0.9))
print(noise.sites)

# %%
# Step 4: its landscape
# ---------------------
#
# The loss over a plane of weights through the trained ones, along filter-normalised random directions. Every point
# sees the same draws of the noise, so that differences over the plane are far more precise than the values.

x, y = images[:100], labels[:100]


def loss(f):
    return functional.cross_entropy(f(x), y)


plane = landscape.random_plane(model, seed=0)
options = {"span": 0.8, "points": 11}
plain = landscape.surface(loss, model, plane, noisy=False, **options)
noisy = landscape.surface(loss, model, plane, noisy=True, draws=5, **options)
print(
    f"at the trained weights: {plain.mean[plain.centre]:.4f} without, "
    f"{noisy.mean[noisy.centre]:.4f} ± {noisy.standard_error[noisy.centre]:.4f} with noise"
)

figure = plt.figure(figsize=(10, 3.4), layout="constrained")
axes = figure.subplots(1, 3)
levels = torch.logspace(-1, 1, 21).numpy()
for ax, (name, one) in zip(axes, {"without noise": plain, "keep 0.9": noisy}.items(), strict=False):
    one.plot(ax=ax, levels=levels, log=True)
    ax.set_title(name)
landscape.plots.cut({"without noise": plain, "keep 0.9": noisy}, axes[2])
axes[2].set(yscale="log", title="along direction 1")
axes[2].legend(frameon=False, loc="upper center")

# %%
# The band in the cut is two standard errors over the draws. The noise lifts the bottom of the basin much more than
# its walls: relative to the bottom, the valley is shallower.
#
# Step 5: take the noise out
# --------------------------

noise.remove()
with torch.no_grad():
    print(torch.equal(model.train()(x[:4]), model.eval()(x[:4])))
