"""Small convolutional residual networks with a noise law in every block, and their training on images.

Training is data-parallel where it was started by ``torchrun``, with the numbers of one process that goes through the
parts of every batch in turn; it resumes from its checkpoint to the same weights, and works in mixed precision on a GPU.
"""

import contextlib
import functools
import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from kolmo import bridge, files
from kolmo.bridge.variables import seeded_apart
from kolmo.errors import InputError
from kolmo.images import Images

CLASSES = 10


class Branch(nn.Module):
    """Two convolutions with group normalisation: batches stay out of it, so that every image has its own equation."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            _norm(width),
            nn.ReLU(),
            nn.Conv2d(width, hidden, 3, padding=1, bias=False),
            _norm(hidden),
            nn.ReLU(),
            nn.Conv2d(hidden, width, 3, padding=1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def _norm(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(width, 4), width)


class ResNet(nn.Module):
    """Stages of noisy residual blocks at halving resolution; each stage is a `NoisyResNet` over time `horizon`.

    Parameters
    ----------
    law : callable
        ``law(depth)`` -> noise law of a stage of that depth.
    channels : int
        Of the images.
    width, blocks, stages : int
        Width of the first stage (doubling), blocks in each stage, and number of stages.
    stride : int
        Of the stem.
    horizon : float
        Time of a stage: h = horizon / blocks, the same flow at every depth.
    """

    def __init__(
        self,
        law: Callable[[int], bridge.NoiseLaw],
        *,
        channels: int = 1,
        width: int = 16,
        blocks: int = 2,
        stages: int = 2,
        stride: int = 2,
        horizon: float = 2.0,
    ) -> None:
        super().__init__()
        parts: list[nn.Module] = [nn.Conv2d(channels, width, 3, stride=stride, padding=1, bias=False)]
        for stage in range(stages):
            wide = width * 2**stage
            if stage:
                parts += [_norm(wide // 2), nn.ReLU(), nn.Conv2d(wide // 2, wide, 3, 2, padding=1, bias=False)]
            chosen = law(blocks)
            pairs = isinstance(chosen, bridge.ShakeShake)
            # The two branches of shake-shake share the budget of one.
            branches = [_pair(wide) if pairs else Branch(wide, wide) for _ in range(blocks)]
            parts.append(bridge.NoisyResNet(branches, chosen, horizon=horizon, state_ndim=3))
        self.body = nn.Sequential(*parts, _norm(wide), nn.ReLU())
        self.head = nn.Linear(wide, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


def _pair(width: int) -> tuple[Branch, Branch]:
    return Branch(width, width // 2), Branch(width, width // 2)


# ---------------------------------------------------------------------------------------------------------- training


@dataclass(frozen=True)
class Recipe:
    """How a network is trained."""

    epochs: int
    batch: int = 128
    rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    device: str = "cpu"
    mixed: bool = False  # bfloat16 where it is safe
    augment: bool = False  # shifts by up to two pixels and, for CIFAR-10 or if asked, reflections
    reflect: bool = False
    parts: int = 1  # of a batch, each with noise of its own: one for each process, or one after the other


def pixels(x: np.ndarray, mean: float, deviation: float) -> Tensor:
    """Standardised images."""
    return (torch.tensor(x).float() / 255 - mean) / deviation


def standardised(images: Images) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and test images with the mean and deviation of the training pixels, and their labels."""
    mean, deviation = float(images.train_x.mean() / 255), float(images.train_x.std() / 255)
    train_x, test_x = (pixels(x, mean, deviation) for x in (images.train_x, images.test_x))
    return train_x, torch.as_tensor(images.train_y), test_x, torch.as_tensor(images.test_y)


def cross_entropy(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Mean loss of a batch."""
    return functional.cross_entropy(model(x).float(), y)


def train(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    recipe: Recipe,
    seed: int,
    *,
    objective: Callable[[nn.Module, Tensor, Tensor], Tensor] = cross_entropy,
    checkpoint: Path | None = None,
    after_epoch: Callable[[int], Any] | None = None,
) -> list[float]:
    """Train with SGD under a cosine schedule; return the mean loss of each epoch.

    What is random in a step (order, noise, shifts) depends on seed, epoch and part of the batch alone, gradients of the
    parts are added in their order, and a checkpoint is written after every epoch: one process, as many as there are
    parts, and a run that goes on from a checkpoint all end with the same weights.
    """
    rank, world = _rank()
    if world not in (1, recipe.parts):
        raise InputError("parts", recipe.parts, f"as many as there are processes, {world}", f"parts={world}")
    if recipe.batch % recipe.parts:
        raise InputError("parts", recipe.parts, f"a divisor of the batch, {recipe.batch}")
    parts = range(recipe.parts) if world == 1 else range(rank, rank + 1)
    device = torch.device(recipe.device)
    model.to(device).train()
    x, y = x.to(device), y.to(device)
    optimizer = torch.optim.SGD(
        _groups(model, recipe.weight_decay), lr=recipe.rate, momentum=recipe.momentum, nesterov=True
    )
    history = _restored(model, optimizer, checkpoint)
    parallel = _distributed(model) if world > 1 else model
    share = recipe.batch // recipe.parts
    steps = len(x) // recipe.batch
    for epoch in range(len(history), recipe.epochs):
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)).to(device)
        streams = {part: _Stream((seed * 1_000_003 + epoch) * 997 + part, device) for part in parts}
        totals = torch.zeros(recipe.parts, device=device)
        for step in range(steps):
            _set_rate(optimizer, recipe, (epoch + step / steps) / recipe.epochs)
            optimizer.zero_grad(set_to_none=True)
            for part, stream in streams.items():
                chosen = order[step * recipe.batch + part * share :][:share]
                inputs, labels = x[chosen], y[chosen]
                with stream, seeded_apart(), torch.autocast(device.type, torch.bfloat16, enabled=recipe.mixed):
                    if recipe.augment:
                        inputs = shifted(inputs, reflect=recipe.reflect or inputs.shape[1] == 3)
                    loss = objective(parallel, inputs, labels) / recipe.parts
                loss.backward()
                totals[part] += loss.detach()
            optimizer.step()
        if world > 1:
            torch.distributed.all_reduce(totals)  # the other parts of each are zero
        history.append(float(totals.sum()) / steps)
        if checkpoint is not None and rank == 0:
            files.write_tree(checkpoint, _state(model, optimizer, history), in_run=True)
        if after_epoch is not None:
            after_epoch(epoch)
    return history


class _Stream:
    """Random numbers of one part of the batches, whatever is drawn between them."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self._cuda = [device] if device.type == "cuda" else []
        torch.manual_seed(seed)
        self._keep()

    def _keep(self) -> None:
        self._states = torch.get_rng_state(), [torch.cuda.get_rng_state(device) for device in self._cuda]

    def __enter__(self) -> Self:
        torch.set_rng_state(self._states[0])
        for device, state in zip(self._cuda, self._states[1], strict=True):
            torch.cuda.set_rng_state(state, device)
        return self

    def __exit__(self, *_: object) -> None:
        self._keep()


def _distributed(model: nn.Module) -> nn.Module:
    parallel = nn.parallel.DistributedDataParallel(model)
    parallel.register_comm_hook(None, _added_in_order)
    return parallel


def _added_in_order(_: None, bucket: torch.distributed.GradBucket) -> torch.futures.Future[Tensor]:
    """Sum of the gradients of all processes, rank after rank, as one process adds those of its parts."""
    gathered = [torch.empty_like(bucket.buffer()) for _ in range(torch.distributed.get_world_size())]
    future = torch.distributed.all_gather(gathered, bucket.buffer(), async_op=True).get_future()
    return future.then(lambda _: functools.reduce(torch.add, gathered))


def _groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay on weights, not on biases and normalisation."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def _set_rate(optimizer: torch.optim.Optimizer, recipe: Recipe, done: float) -> None:
    """Linear warm-up over the first twentieth, then a cosine to zero."""
    factor = min(done / 0.05, 1.0) * 0.5 * (1 + math.cos(math.pi * done))
    for group in optimizer.param_groups:
        group["lr"] = recipe.rate * max(factor, 1e-3)


def shifted(x: Tensor, *, reflect: bool) -> Tensor:
    """Images shifted by up to two pixels, half of them reflected if asked."""
    n, _, height, width = x.shape
    padded = functional.pad(x, (2, 2, 2, 2))
    offsets = torch.randint(0, 5, (2, n), device=x.device)
    rows = offsets[0][:, None] + torch.arange(height, device=x.device)
    columns = offsets[1][:, None] + torch.arange(width, device=x.device)
    moved = padded[torch.arange(n, device=x.device)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    moved = moved.permute(0, 3, 1, 2)
    if not reflect:
        return moved
    return torch.where((torch.rand(n, device=x.device) < 0.5)[:, None, None, None], moved.flip(-1), moved)


def _state(model: nn.Module, optimizer: torch.optim.Optimizer, history: list[float]) -> dict[str, Any]:
    momenta = [
        optimizer.state[p].get("momentum_buffer") if p in optimizer.state else None
        for group in optimizer.param_groups
        for p in group["params"]
    ]
    return {
        "weights": weights(model),
        "momenta": [None if m is None else m.cpu().numpy() for m in momenta],
        "history": history,
    }


def _restored(model: nn.Module, optimizer: torch.optim.Optimizer, checkpoint: Path | None) -> list[float]:
    """Losses of the epochs that a checkpoint holds; its weights and momenta are taken over."""
    if checkpoint is None or not checkpoint.exists():
        return []
    state = files.read_tree(checkpoint, in_run=True)
    with files.damage(checkpoint):
        load_weights(model, state["weights"])
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for parameter, momentum in zip(parameters, state["momenta"], strict=True):
            if momentum is not None:
                kept = torch.as_tensor(momentum).reshape(parameter.shape)
                optimizer.state[parameter]["momentum_buffer"] = kept.to(parameter)
        return [float(loss) for loss in state["history"]]


def weights(model: nn.Module) -> dict[str, np.ndarray]:
    """State dictionary as arrays."""
    return {name: value.detach().cpu().numpy().copy() for name, value in model.state_dict().items()}


def load_weights(model: nn.Module, arrays: dict[str, np.ndarray]) -> None:
    """Take over what `weights` returned."""
    model.load_state_dict({name: torch.as_tensor(value) for name, value in arrays.items()})


def _rank() -> tuple[int, int]:
    """Rank and number of processes; 0 and 1 without torchrun."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


@contextlib.contextmanager
def processes(device: str) -> Iterator[tuple[int, int]]:
    """The group of processes that torchrun started, which end when it does; (0, 1) without it."""
    if "WORLD_SIZE" not in os.environ or int(os.environ["WORLD_SIZE"]) == 1:
        yield 0, 1
        return
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("nccl" if device == "cuda" else "gloo")
    try:
        yield _rank()
        torch.distributed.barrier()  # none leaves while another still waits for it
    finally:
        torch.distributed.destroy_process_group()


def _end_with(parent: int) -> None:
    """End this process when torchrun was killed: no one else would, and the run could not be resumed."""
    while os.getppid() == parent and not _adopted(parent):
        time.sleep(0.1)
    os._exit(1)


def _adopted(parent: int) -> bool:
    """Whether torchrun was killed before its process could ask who it is: the first process has its children then."""
    if parent != 1 or "TORCHELASTIC_RUN_ID" not in os.environ:
        return False
    try:
        return b"torch" not in Path("/proc/1/cmdline").read_bytes()  # torchrun is the first one in some containers
    except OSError:
        return False


# --------------------------------------------------------------------------------------------------------- measuring


@torch.no_grad()
def probabilities(model: nn.Module, x: Tensor, device: str, batch: int = 1000) -> Tensor:
    """Class probabilities of the mean network."""
    model.eval()
    return torch.cat([model(part.to(device)).softmax(-1).cpu() for part in x.split(batch)])


def scores(p: Tensor, y: Tensor) -> dict[str, float]:
    """Error rate, loss, Brier score, and expected calibration error over 15 equal bins (Guo et al., 2017)."""
    confidence, chosen = p.max(-1)
    hit = (chosen == y).double()
    bins = (confidence * 15).long().clamp(max=14)
    gaps = [
        (bins == b).double().mean() * (hit[bins == b].mean() - confidence[bins == b].double().mean()).abs()
        for b in bins.unique()
    ]
    return {
        "error": float(1 - hit.mean()),
        "loss": float(functional.nll_loss(p.clamp_min(1e-12).log(), y)),
        "calibration_error": float(sum(gaps)),
        "brier": float((p - functional.one_hot(y, p.shape[-1])).double().square().sum(-1).mean()),
    }
