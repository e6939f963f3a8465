"""What tells axes of samples, dropped branches and branches asleep apart: changed inputs, seen through a network."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kolmo.bridge.watching import FIRST, undisturbed


def changed(inputs: Sequence[Any], axis: int) -> tuple[list[Any], list[Any]]:
    """Inputs with at least two samples along an axis, and the same with another first sample."""
    size = next((v.shape[axis] for v in inputs if isinstance(v, Tensor) and v.ndim > axis), 0)
    same, other = [], []
    for value in inputs:
        if not isinstance(value, Tensor) or value.ndim <= axis or value.shape[axis] != size:
            same.append(value)
            other.append(value)
            continue
        base = value.detach()
        base = torch.cat([base, base], axis) if size == 1 else base
        moved = base.clone()
        first = moved.select(axis, 0)
        if base.is_floating_point():
            first.copy_(_other(first))
        elif base.dtype != torch.bool:
            first.copy_(base.max() + base.min() - first)
        same.append(base)
        other.append(moved)
    return same, other


def _other(sample: Tensor) -> Tensor:
    """Another sample with entries from the same range; not a multiple, whose normalisation could be the same."""
    low, high = (float(v) for v in (sample.min(), sample.max()))
    if low == high:
        low, high = low - 0.3 * abs(low) - 0.1, high + 0.3 * abs(high) + 0.1
    generator = torch.Generator().manual_seed(0)
    part = torch.rand(sample.shape, generator=generator, device="cpu", dtype=torch.float32)
    return (low + (high - low) * part).to(sample)


def probe(model: nn.Module) -> list[Any]:
    """Inputs that a model accepts, guessed from its first layer; empty where no guess fits."""
    first = next((m for m in model.modules() if isinstance(m, FIRST)), None)
    parameter = next(iter(model.parameters()), None)
    if first is None or parameter is None:
        return []
    dtype = parameter.dtype if parameter.is_floating_point() else torch.float32
    for shape, ids in _guesses(model, first):
        generator = torch.Generator().manual_seed(0)
        if ids:
            x = torch.randint(0, ids, shape, generator=generator, device="cpu").to(parameter.device)
        else:
            x = torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32).to(parameter.device, dtype)
        with contextlib.suppress(Exception), undisturbed(model), torch.no_grad():
            model(x)
            return [x]
    return []


def _guesses(model: nn.Module, first: nn.Module) -> Iterator[tuple[tuple[int, ...], int]]:
    """Shapes to try (batches of two), with the number of tokens where the input is made of them."""
    if isinstance(first, nn.Embedding):
        yield (2, 8), first.num_embeddings
        yield (2, 4), first.num_embeddings
        return
    dims = next((d for d, kind in ((1, nn.Conv1d), (2, nn.Conv2d), (3, nn.Conv3d)) if isinstance(first, kind)), 0)
    if dims:
        for side in (getattr(model, "image_size", 32), 32, 16, 8, 28, 64, 96, 128, 224):
            if isinstance(side, int):
                yield (2, first.in_channels, *([side] * dims)), 0  # type: ignore[arg-type]
    for name in ("in_features", "embed_dim", "normalized_shape"):
        width = getattr(first, name, None)
        width = width[-1] if isinstance(width, tuple) else width
        if isinstance(width, int):
            yield (2, 8, width), 0
            yield (2, width), 0
            return
