"""Monte Carlo over noisy passes: independent, antithetic and quasi-random draws, and the PDE as control variate."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kolmo.bridge.resnet import Draw, NoisyResNet
from kolmo.bridge.variables import Variable
from kolmo.errors import InputError
from kolmo.kernels import bspline

SAMPLINGS = ("independent", "antithetic", "sobol")
REPLICATES = 16  # independent scramblings of the Sobol points, for the standard error
_STATES = 2_000_000  # numbers held at once
_DEGREE, _CELLS = 3, {1: 200, 2: 60, 3: 24}  # of the splines that hold the control's gradient


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
    chunk = max(2, _STATES // max(x.numel(), 1) // 2 * 2)
    if sampling == "sobol":
        yield from _sobol_blocks(net, x, paths, chunk, generator)
        return
    for start in range(0, paths, chunk):
        count = min(chunk, paths - start)

        mirrored = sampling == "antithetic"
        draw = of_paths(count, generator, common=common, mirrored=mirrored)
        yield Block(draw, count, _pairs if mirrored else _each)


def of_paths(count: int, generator: torch.Generator | None, *, common: bool = False, mirrored: bool = False) -> Draw:
    """Noise for states ``(count, n, ...)``, the paths first; noise per batch is shared within a path only."""

    def draw(k: int, variable: Variable, shape: Sequence[int], like: Tensor) -> Tensor:
        sample = variable.mirrored if mirrored else variable.sample
        return sample(_shape(shape, count, common), like.dtype, like.device, generator)

    return draw


def _each(values: Tensor) -> Tensor:
    return values


def _pairs(values: Tensor) -> Tensor:
    half = len(values) // 2
    return 0.5 * (values[:half] + values[half:])


def _mean(values: Tensor) -> Tensor:
    return values.mean(0, keepdim=True)


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
        seed = int(torch.randint(2**31, (), generator=generator))
        engine = torch.quasirandom.SobolEngine(dimension, scramble=True, seed=seed)  # type: ignore[no-untyped-call]
        uniform = engine.draw(points, dtype=torch.float64)

        def draw(k: int, variable: Variable, shape: Sequence[int], like: Tensor, u: Tensor = uniform) -> Tensor:
            part = u[:, offsets[k] : offsets[k + 1]].reshape(len(u), 1, *shape[2:])
            return variable.from_uniform(part).to(like)

        yield Block(draw, points, _mean)


class Control:
    r"""Unbiased control variate :math:`\sum_k \nabla u(t_{k+1}, X_k + m_k)\cdot(\Delta X_k - m_k)`.

    Its mean is zero whatever u is; with u close to the expected loss it removes most of the variance. Gradients are
    held as cubic splines on a uniform grid over the box of the solution.

    Parameters
    ----------
    net : NoisyResNet
        The network.
    solution : kolmo.Solution
        Solution of its backward equation, saved at the layer times.
    """

    def __init__(self, net: NoisyResNet, solution: Any) -> None:
        lines = solution.grid.nodes
        d = len(lines)
        self._lower, upper = (np.array([end(line) for line in lines]) for end in (np.min, np.max))
        n = _CELLS[d] + 1
        nodes = np.stack(
            np.meshgrid(*[np.linspace(a, b, n) for a, b in zip(self._lower, upper, strict=True)], indexing="ij"), -1
        )
        self._missing, self._inverse = 3 - d, (n - 1) / (upper - self._lower)
        self._splines = [self._spline(solution, nodes, (k + 1) * net.h) for k in range(net.depth)]

    def _spline(self, solution: Any, nodes: np.ndarray, t: float) -> np.ndarray:
        d = nodes.shape[-1]
        time = float(solution.times[np.argmin(np.abs(np.asarray(solution.times) - t))])
        if abs(time - t) > 1e-9 * max(t, 1.0):
            raise InputError(
                "control_variate",
                f"a solution without the layer time {t:g}",
                "a solution saved at all layer times",
                "solve(..., save=[k * net.h for k in range(net.depth + 1)])",
            )
        gradient = np.asarray(solution.gradient(nodes.reshape(-1, d), t=time))
        values = gradient.reshape(*nodes.shape[:-1], -1)
        for axis in range(d):
            values = np.moveaxis(bspline.interpolation(np.moveaxis(values, axis, 0), _DEGREE), 0, axis)
        return np.ascontiguousarray(values[(None,) * self._missing])

    def __call__(self, k: int, x: Tensor, noise: Tensor) -> Tensor:
        """∇u(t_{k+1}, x) · noise for points ``(..., d)``: columns ``(..., k)``."""
        lead, d = x.shape[:-1], x.shape[-1]
        points = np.zeros((1, int(np.prod(lead)), 3))
        points[0, :, self._missing :] = x.double().reshape(-1, d).numpy()
        coefficients = self._splines[k]
        out = np.empty((points.shape[1], coefficients.shape[-1]))
        bspline.average(
            coefficients,
            np.concatenate([np.zeros(self._missing), self._lower]),
            np.concatenate([np.ones(self._missing), self._inverse]),
            np.array([0] * self._missing + [_DEGREE] * d),
            points,
            np.ones(1),
            out,
        )
        gradient = torch.as_tensor(out).reshape(*lead, d, -1)
        return torch.einsum("...dk,...d->...k", gradient, noise.double())


def final_state(net: NoisyResNet, x: Tensor, draw: Draw, control: Control | None) -> tuple[Tensor, Tensor | float]:
    """Final states of noisy passes, and the value of the control variate along them."""
    if control is None:
        return net.path(x, draw), 0.0
    total: Tensor | float = 0.0
    for k in range(net.depth):
        law, output = net.law(k), net.output(k, x)
        mean = law.mean(output)
        zeta = draw(k, law.variable, law.noise_shape(output, net.state_ndim), mean)
        increment = law.increment(output, zeta, net.h)
        total = total + control(k, x + mean, increment - mean)
        x = x + increment
    return x, total
