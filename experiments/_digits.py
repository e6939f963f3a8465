"""Scikit-learn's handwritten digits, and the flow classifiers that the experiments train on them."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional

from kolmo import SDE, bridge
from kolmo.errors import InputError

CLASSES, COUNT = 10, 1797
REACH = 2.0  # the encoder's features lie in (-REACH, REACH)²


@dataclass(frozen=True)
class Digits:
    """Images as rows of 64 pixels in [0, 1], with their labels."""

    x: Tensor
    y: Tensor


def split(seed: int, held_out: int) -> tuple[Digits, Digits]:
    """Training and held-out digits, every class in its proportion."""
    if not CLASSES <= held_out <= COUNT - CLASSES:  # one of every class, on either side
        raise InputError("held_out", held_out, f"from {CLASSES} to {COUNT - CLASSES} of the {COUNT} digits")
    x, y = load_digits(return_X_y=True)
    parts = train_test_split(x.astype(np.float32) / 16, y, test_size=held_out, random_state=seed, stratify=y)
    train_x, test_x, train_y, test_y = map(torch.as_tensor, parts)
    return Digits(train_x, train_y.long()), Digits(test_x, test_y.long())


class Encoder(nn.Module):
    """MLP 64–width–2 with bounded output 2 tanh(z/2), so that the size of the noise means something."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 2))

    def forward(self, x: Tensor) -> Tensor:
        return REACH * torch.tanh(self.layers(x) / REACH)


def flow(branch: nn.Module, law: bridge.NoiseLaw, depth: int) -> bridge.NoisyResNet:
    """Network of the given depth whose layers share one branch: the same vector field at every depth."""
    return bridge.NoisyResNet([branch] * depth, law)


def classifier(law: bridge.NoiseLaw, depth: int, seed: int, *, encoder_width: int, width: int) -> bridge.FlowClassifier:
    """Untrained flow classifier; the head starts large, so that classes can be told apart within the plane."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        encoder, head = Encoder(encoder_width), nn.Linear(2, CLASSES)
        branch = bridge.MLPBranch.create(2, width, rng=seed)
    with torch.no_grad():
        branch.W2.mul_(0.5)
        for parameter in head.parameters():
            parameter.mul_(6.0)
    return bridge.FlowClassifier(encoder, flow(branch, law, depth), head)


def augmented(x: Tensor, generator: torch.Generator) -> Tensor:
    """Half of the images shifted by up to a pixel, all with a little pixel noise."""
    n = len(x)
    shift = torch.randint(-1, 2, (n, 2), generator=generator) * (torch.rand(n, 1, generator=generator) < 0.5)
    rows, columns = (torch.arange(1, 9) - shift[:, axis : axis + 1] for axis in (0, 1))
    padded = functional.pad(x.reshape(n, 8, 8), (1, 1, 1, 1))
    moved = padded[torch.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]]
    return moved.reshape(n, 64) + 0.05 * torch.randn(n, 64, generator=generator)


def train(
    model: bridge.FlowClassifier,
    digits: Digits,
    seed: int,
    *,
    epochs: int,
    batch: int,
    rate: float,
    kinetic: float,
    after_epoch: Callable[[int], object] = lambda epoch: None,
) -> list[float]:
    """Minimise the sampled loss plus kinetic energy ``kinetic · E ∫ |f|² dt``; return the mean loss of each epoch."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    steps = epochs * -(-len(digits.x) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    speeds: list[Tensor] = []
    hook = model.net.branches[0].register_forward_hook(lambda module, given, f: speeds.append(f))
    history = []
    for epoch in range(epochs):
        total = 0.0
        for chosen in torch.randperm(len(digits.x), generator=generator).split(batch):
            speeds.clear()
            x, y = augmented(digits.x[chosen], generator), digits.y[chosen]
            loss = model.sampled_loss(x, y, rng=generator)
            energy = torch.stack(speeds).square().sum(-1).mean()
            optimizer.zero_grad()
            (loss + kinetic * energy).backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(y)
        history.append(total / len(digits.x))
        after_epoch(epoch)
    hook.remove()
    return history


class Transported:
    """Solution of the equation without noise, u(0, x) = terminal(X_T): along characteristics, by Runge–Kutta steps.

    Offers what a `kolmo.Solution` does. Derivatives are those of the numerical flow; the error estimate at the points
    is the change from half as many steps.
    """

    status = "converged"

    def __init__(
        self, sde: SDE, terminal: Callable[[Tensor], Tensor], horizon: float, points: np.ndarray, steps: int = 16
    ) -> None:
        self._sde, self._terminal, self._horizon, self._steps = sde, terminal, horizon, steps
        with torch.no_grad():
            fine, coarse = (self._value(torch.as_tensor(points), n) for n in (steps, steps // 2))
        self.error_estimate = (fine - coarse).abs().numpy()

    def _value(self, x: Tensor, steps: int) -> Tensor:
        dt = self._horizon / steps
        for n in range(steps):
            t = n * dt
            k1 = self._sde.drift(t, x)
            k2 = self._sde.drift(t + dt / 2, x + dt / 2 * k1)
            k3 = self._sde.drift(t + dt / 2, x + dt / 2 * k2)
            k4 = self._sde.drift(t + dt, x + dt * k3)
            x = x + dt / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return self._terminal(x)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Values at points ``(n, 2)``, shape ``(n, k)``."""
        with torch.no_grad():
            return self._value(torch.as_tensor(x), self._steps).numpy()

    def gradient(self, x: np.ndarray) -> np.ndarray:
        """Gradients, shape ``(n, 2, k)``."""
        points = torch.as_tensor(x).requires_grad_()
        return torch.stack(self._gradients(points, create_graph=False), -1).detach().numpy()

    def hessian(self, x: np.ndarray) -> np.ndarray:
        """Second derivatives, shape ``(n, 2, 2, k)``."""
        points = torch.as_tensor(x).requires_grad_()
        rows = [
            torch.stack([_derivative(slope[:, i], points, create_graph=False) for i in range(2)], 1)
            for slope in self._gradients(points, create_graph=True)
        ]
        return torch.stack(rows, -1).detach().numpy()

    def _gradients(self, x: Tensor, *, create_graph: bool) -> list[Tensor]:
        value = self._value(x, self._steps)
        return [_derivative(column, x, create_graph=create_graph) for column in value.unbind(-1)]


def _derivative(column: Tensor, x: Tensor, *, create_graph: bool) -> Tensor:
    return torch.autograd.grad(column.sum(), x, create_graph=create_graph, retain_graph=True)[0]
