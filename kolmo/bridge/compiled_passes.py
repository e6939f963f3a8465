"""Compiled Monte Carlo for networks of `MLPBranch` layers in one to three dimensions."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kolmo.bridge.branch_laws import BranchDropout, CentredBernoulli, StochasticDepth
from kolmo.bridge.control_variate import ControlVariate
from kolmo.bridge.laws import Additive, Multiplicative, NoiseLaw
from kolmo.bridge.resnet import MLPBranch, NoisyResNet
from kolmo.bridge.variables import Discrete, Gaussian, Uniform
from kolmo.kernels import chains

_PATHS = 1 << 19  # states held at once
_CONTROLLED = 1 << 15  # with a control variate, layer by layer: in the second-level cache
_FOR_A_THREAD = 1 << 15  # fewer are done faster by one thread


class Passes(NamedTuple):
    """Final states ``(paths, n, d)`` and the value of the control variate along each path."""

    final: Tensor
    correction: Tensor | float


class CompiledPasses:
    """A network as arrays for `kolmo.kernels.chains`; `of` says whether it can be one.

    Draws of a path depend on the seed and the number of the path alone, not on blocks or threads.
    """

    def __init__(self, net: NoisyResNet, arrays: tuple[np.ndarray, ...], kind: int, law: int) -> None:
        self._net, self._arrays, self._kind, self._law = net, arrays, kind, law

    @classmethod
    def of(cls, net: NoisyResNet, x: Tensor) -> "CompiledPasses | None":
        """Return the network as arrays, or None where a branch or a law is not made for the kernel."""
        laws = [net.law(k) for k in range(net.depth)]
        kind, law = _kind(laws[0]), _variable(laws[0])
        if (
            kind is None
            or law is None
            or any(type(other) is not type(laws[0]) or _kind(other) != kind for other in laws)
            or any(_variable(other) != law for other in laws)
            or all(other.noiseless for other in laws)
            or not _plain(net, x)
        ):
            return None
        with torch.no_grad():
            return cls(net, _arrays(net, laws, kind, x), kind, law)

    def run(
        self, x: Tensor, paths: int, control: ControlVariate | None, generator: torch.Generator
    ) -> Iterator[Passes]:
        """Pass states x ``(n, d)`` through the network that many times, some paths at a time."""
        drawn = torch.randint(2**32, (2,), generator=generator, device=generator.device, dtype=torch.int64)
        words = drawn.cpu().numpy().astype(np.uint32)
        at_once = max(1, (_PATHS if control is None else _CONTROLLED) // len(x))
        start = np.asarray(x.detach(), dtype=self._arrays[0].dtype).T
        for first in range(0, paths, at_once):
            count = min(at_once, paths - first)
            states = np.ascontiguousarray(np.tile(start, (1, count)))
            number = first * len(x)
            key = words + np.array([0, number >> 32], np.uint32)
            correction: Tensor | float = 0.0
            if control is None:
                self._march(states, key, number % 2**32)
            else:
                correction = self._controlled(states, key, number % 2**32, control).reshape(count, len(x), -1)
            yield Passes(torch.as_tensor(states).T.reshape(count, *x.shape), correction)

    def _march(self, states: np.ndarray, key: np.ndarray, first: int) -> None:
        """All layers, on as many threads as torch uses where there is enough to do."""
        n = states.shape[1]
        threads = min(torch.get_num_threads(), max(1, n // _FOR_A_THREAD))
        ends = np.linspace(0, n, threads + 1).astype(int)
        nothing = np.empty((0, 0), states.dtype)

        def part(i: int) -> None:
            piece = np.ascontiguousarray(states[:, ends[i] : ends[i + 1]])
            begin = (first + int(ends[i])) % 2**32
            depth = self._net.depth
            chains.march(piece, self._arrays, self._kind, self._law, key, begin, 0, depth, nothing, nothing)
            states[:, ends[i] : ends[i + 1]] = piece

        if threads == 1:
            part(0)
            return
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(part, range(threads)))

    def _controlled(self, states: np.ndarray, key: np.ndarray, first: int, control: ControlVariate) -> Tensor:
        """All layers, one after the other, with the control variate."""
        mean, noise = np.empty_like(states), np.empty_like(states)
        total = np.zeros((states.shape[1], control.columns))
        additive, beta = self._arrays[4], self._arrays[5]
        for k in range(self._net.depth):
            chains.march(states, self._arrays, self._kind, self._law, key, first, k, k + 1, mean, noise)
            if self._kind == chains.ADDITIVE:
                C = (additive[k] @ additive[k].T)[None]
            else:
                m = mean.T.astype(float)
                C = float(beta[k]) ** 2 * m[:, :, None] * m[:, None, :]
                if self._kind == chains.COORDINATE:
                    C = C * np.eye(len(states))
            control.add(k, (states - noise).T, noise.T, C, total)
        return torch.as_tensor(total)


def _kind(law: NoiseLaw) -> int | None:
    """How the noise of a law enters, where the kernel knows it."""
    if type(law) is Additive:
        return chains.ADDITIVE
    if type(law) in (Multiplicative, StochasticDepth, BranchDropout, CentredBernoulli):
        return {"coordinate": chains.COORDINATE, "sample": chains.SAMPLE}.get(law.per)
    return None


def _variable(law: NoiseLaw) -> int | None:
    kinds = {Gaussian: chains.GAUSSIAN, Uniform: chains.UNIFORM, Discrete: chains.DISCRETE}
    return kinds.get(type(law.variable))


def _plain(net: NoisyResNet, x: Tensor) -> bool:
    """Whether all branches are MLPs of the same size in x's precision and dimension, without hooks."""
    if net.state_ndim != 1 or x.shape[-1] > 3 or x.device.type != "cpu":
        return False
    if x.dtype not in (torch.float32, torch.float64):
        return False
    return all(
        type(branch) is MLPBranch
        and branch.W1.shape == net.branches[0].W1.shape
        and branch.dim == x.shape[-1]
        and branch.W1.dtype == x.dtype
        and not (branch._forward_hooks or branch._forward_pre_hooks)
        for branch in net.branches
    )


def _arrays(net: NoisyResNet, laws: list[NoiseLaw], kind: int, x: Tensor) -> tuple[np.ndarray, ...]:
    """Arrays over the layers, as `chains.march` takes them."""
    dtype = x.numpy().dtype
    branches: Any = net.branches
    # the mean increment is h f, or h keep f: a number times the branch
    one = torch.ones(1, x.shape[-1], dtype=torch.float64)
    share = np.array([net.h * float(law.mean(one)[0, 0]) for law in laws])
    W = np.stack([branch.W1.numpy() for branch in branches])
    b = np.stack([branch.b1.numpy() for branch in branches])
    V = np.stack([branch.W2.numpy().T for branch in branches]) * share[:, None, None]
    c = np.zeros((net.depth, x.shape[-1]))
    for k, branch in enumerate(branches):
        if branch.b2 is not None:
            c[k] = share[k] * branch.b2.numpy()
    if kind == chains.ADDITIVE:
        additive = np.stack([law.factor(x[:1], net.h)[0].double().numpy() for law in laws])
        beta = np.zeros(net.depth)
    else:
        additive = np.zeros((net.depth, x.shape[-1], 1))
        beta = np.array([_beta(law, net.h) for law in laws])
    values, upper = _outcomes(laws)
    numbers = [np.ascontiguousarray(v, dtype=dtype) for v in (W, b, V, c, additive, beta, values)]
    return (*numbers, upper)


def _beta(law: NoiseLaw, h: float) -> float:
    """Noise ζ = 1 makes of a mean increment 1."""
    one = torch.ones(1, 1, dtype=torch.float64)
    return float(law.fluctuation(one, one, h) / law.mean(one))


def _outcomes(laws: list[NoiseLaw]) -> tuple[np.ndarray, np.ndarray]:
    """Values of discrete noise ``(L, q)`` and, in random words, the ends of their intervals ``(L, q − 1)``."""
    if not laws[0].variable.is_discrete:
        return np.zeros((len(laws), 1)), np.zeros((len(laws), 0), np.uint32)
    rules = [law.variable.nodes(0) for law in laws]
    q = max(len(z) for z, _ in rules)
    values, upper = np.zeros((len(laws), q)), np.full((len(laws), q - 1), 2**32 - 1, np.uint32)
    for k, (z, w) in enumerate(rules):
        values[k, : len(z)] = z
        upper[k, : len(z) - 1] = np.minimum(np.round(np.cumsum(w)[:-1] * 2.0**32), 2.0**32 - 1).astype(np.uint32)
    return values, upper
