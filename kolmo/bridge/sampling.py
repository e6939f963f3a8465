"""Draws of Monte Carlo over noisy passes: independent, antithetic and quasi-random."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kolmo.bridge.resnet import Draw, NoisyResNet
from kolmo.bridge.variables import Variable
from kolmo.errors import InputError

SAMPLINGS = ("independent", "antithetic", "sobol")
REPLICATES = 16  # independent scramblings of the Sobol points, for the standard error
_STATES = 2_000_000  # numbers held at once, of quasi-random points
_CACHED = 1 << 16  # numbers held at once otherwise: with the branches' own, they stay near the processor


class Block(NamedTuple):
    """Some paths: how their noise is drawn, how many, and how their losses become independent values."""

    draw: Draw
    paths: int
    independent: Callable[[Tensor], Tensor]


def blocks(
    net: NoisyResNet, x: Tensor, paths: int, sampling: str, common: bool, generator: torch.Generator
) -> Iterator[Block]:
    """Blocks of paths for states x ``(n, ...)``; noise has the paths as its first axis.

    With `common`, all states share the noise of a path, as they always do with Sobol points.
    """
    if sampling not in SAMPLINGS:
        raise InputError("sampling", repr(sampling), "one of " + ", ".join(map(repr, SAMPLINGS)))
    if sampling == "sobol":
        chunk = max(2, _STATES // max(x.numel(), 1) // 2 * 2)
        yield from _sobol_blocks(net, x, paths, chunk, generator)
        return
    chunk = max(2, _CACHED // max(x.numel(), 1) // 2 * 2)
    for start in range(0, paths, chunk):
        count = min(chunk, paths - start)

        mirrored = sampling == "antithetic"
        draw = of_paths(count, generator, common=common, mirrored=mirrored)
        yield Block(draw, count, _pairs if mirrored else lambda values: values)


def of_paths(count: int, generator: torch.Generator | None, *, common: bool = False, mirrored: bool = False) -> Draw:
    """Noise for states ``(count, n, ...)``, the paths first; noise per batch is shared within a path only."""

    def draw(k: int, variable: Variable, shape: Sequence[int], like: Tensor) -> Tensor:
        sample = variable.mirrored if mirrored else variable.sample
        return sample(_shape(shape, count, common), like.dtype, like.device, generator)

    return draw


def _pairs(values: Tensor) -> Tensor:
    half = len(values) // 2
    return 0.5 * (values[:half] + values[half:])


def _shape(shape: Sequence[int], count: int, common: bool) -> tuple[int, ...]:
    """Shape of the noise of `count` paths: one for each state, or shared by them (noise per batch always is)."""
    return (count, 1 if common else shape[1] if shape[0] != 1 else 1, *shape[2:])


def _sobol_blocks(net: NoisyResNet, x: Tensor, paths: int, chunk: int, generator: torch.Generator) -> Iterator[Block]:
    """Scrambled Sobol points in as many dimensions as a path has random numbers, `REPLICATES` times."""
    sizes: list[int] = []

    def probe(k: int, variable: Variable, shape: Sequence[int], like: Tensor) -> Tensor:
        sizes.append(int(np.prod(shape[2:])))
        return variable.sample(shape, like.dtype, like.device, generator)

    net.path(x[:1][None], probe)
    dimension, most = sum(sizes), torch.quasirandom.SobolEngine.MAXDIM
    if dimension > most:
        raise InputError("sampling", f"'sobol' with {dimension} random numbers in a path", f"at most {most}")
    points = 2 ** max(int(np.log2(max(paths // REPLICATES, 1))), 0)
    if points > chunk:
        raise InputError("paths", paths, f"at most {REPLICATES * chunk} with Sobol points for {len(x)} states")
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    for _ in range(REPLICATES):
        seed = int(torch.randint(2**31, (), generator=generator, device=generator.device))
        engine = torch.quasirandom.SobolEngine(dimension, scramble=True, seed=seed)  # type: ignore[no-untyped-call]
        first = engine.quasi.double() / 2.0**engine.MAXBIT  # which the engine has in the default precision only
        uniform = engine.draw(points, dtype=torch.float64)
        uniform[0] = first

        def draw(k: int, variable: Variable, shape: Sequence[int], like: Tensor, u: Tensor = uniform) -> Tensor:
            part = u[:, offsets[k] : offsets[k + 1]].reshape(len(u), 1, *shape[2:])
            return variable.from_uniform(part).to(like)

        yield Block(draw, points, lambda values: values.mean(0, keepdim=True))
