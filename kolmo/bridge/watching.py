"""One pass of somebody else's network, watched: what is added to what, where, and how large it is."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from kolmo.bridge.graph import key

ADDITIONS = frozenset((torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__))
# Layers that say what they take.
FIRST = (nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, nn.LayerNorm, nn.MultiheadAttention)
# Layers that would use statistics, update them, or drop coordinates in training mode, whoever derives from them.
LAYERS = (nn.modules.batchnorm._NormBase, nn.modules.dropout._DropoutNd)
# Change at one index, relative to what is there, that counts as none: batched products may round differently.
SAME = 1e-5


class Output(NamedTuple):
    """A branch that ends in the output of a module: where in that output it is (a path of indices and keys)."""

    path: tuple[Any, ...] = ()


class Operand(NamedTuple):
    """A branch that ends in the code of a module: which addition of its forward pass, and which operand of it.

    ``trained``: which addition in training mode, where that code may add other things too; None: the same.
    """

    addition: int
    operand: int
    trained: int | None = None


WHOLE = Output()


class Addition(NamedTuple):
    """An addition of two tensors that was seen in a pass."""

    number: int
    owner: str
    ordinal: int
    operands: tuple[Any, Any]
    norms: tuple[float, float]
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    ends: tuple[list[tuple[str, tuple[Any, ...]]], list[tuple[str, tuple[Any, ...]]]]


class Watch(TorchFunctionMode):
    """Sees the additions of a pass, and which modules return which tensors."""

    def __init__(self, model: nn.Module, wanted: set[tuple[int, int]] | None = None) -> None:
        super().__init__()
        self._model, self._wanted = model, wanted
        self._stack: list[tuple[str, list[int]]] = [("", [0])]
        self._ends: dict[Any, list[tuple[str, tuple[Any, ...]]]] = {}
        self.calls: dict[str, int] = {}
        self.additions: dict[Any, Addition] = {}
        self.seen: dict[tuple[int, int], Tensor] = {}
        self._count = 0
        self._nodes: list[Any] = []  # nodes stay alive, so that their identities stay theirs

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watch the passes of the block."""
        handles = []
        for name, module in self._model.named_modules():
            if name:
                handles.append(module.register_forward_pre_hook(lambda m, a, name=name: self._enter(name)))
                handles.append(module.register_forward_hook(lambda m, a, out, name=name: self._leave(name, out)))
        try:
            with self:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def number_in(self, owner: str) -> int:
        """Number of additions seen in the code of a module."""
        return sum(addition.owner == owner for addition in self.additions.values())

    def _enter(self, name: str) -> None:
        self._stack.append((name, [0]))

    def _leave(self, name: str, output: Any) -> None:
        self._stack.pop()
        self.calls[name] = self.calls.get(name, 0) + 1
        for path, tensor in leaves(output):
            if tensor.grad_fn is not None:
                self._nodes.append(tensor.grad_fn)
                self._ends.setdefault(key(tensor), []).append((name, path))

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Pass every call on, and take a note of additions."""
        if not is_addition(function, args):
            return function(*args, **(kwargs or {}))
        a, b = args[:2]
        self._nodes += [a.grad_fn, b.grad_fn]  # kept first: the key is the address of what Python holds
        before = key(a), key(b)
        for side, operand in enumerate((a, b)):
            if self._wanted is not None and (self._count, side) in self._wanted:
                self.seen[self._count, side] = operand.detach().clone()
        norms = (float(a.detach().norm()), float(b.detach().norm())) if self._wanted is None else (0.0, 0.0)
        shapes = tuple(a.shape), tuple(b.shape)
        ends = list(self._ends.get(before[0], [])), list(self._ends.get(before[1], []))
        result = function(*args, **(kwargs or {}))
        owner, counter = self._stack[-1]
        self._nodes.append(result.grad_fn)
        self.additions[key(result)] = Addition(self._count, owner, counter[0], before, norms, shapes, ends)
        self._count += 1
        for _, below in self._stack:
            below[0] += 1
        return result


def is_addition(function: Any, args: tuple[Any, ...]) -> bool:
    """Whether a call adds two tensors of floating-point numbers."""
    return (
        function in ADDITIONS
        and len(args) > 1
        and isinstance(args[0], Tensor)
        and isinstance(args[1], Tensor)
        and args[0].is_floating_point()
        and args[1].is_floating_point()
    )


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Tensor]]:
    """All tensors of a nested output with the indices and keys that lead to them."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for name in value:
            yield from leaves(value[name], (*path, name))
    elif isinstance(value, (list, tuple)):
        for i, part in enumerate(value):
            yield from leaves(part, (*path, i))
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from leaves(getattr(value, field.name), (*path, field.name))


def tensors(value: Any) -> list[Tensor]:
    """All tensors of a nested output."""
    return [tensor for _, tensor in leaves(value)]


def marks(tensor: Tensor) -> list[Tensor]:
    """For every axis the sums of moduli over the other axes."""
    size = tensor.abs().double()
    return [size.sum([other for other in range(tensor.ndim) if other != axis]) for axis in range(tensor.ndim)]


def devices(model: nn.Module) -> list[torch.device]:
    """CUDA devices of a model, whose random state is to be kept."""
    return list({p.device for p in model.parameters() if p.device.type == "cuda"})


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode with gradients and without fused layers; modes, flags, buffers and random state come back."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(p, p.requires_grad) for p in model.parameters()]
    buffers = [(module._buffers, name, b, b.clone()) for module, name, b in _buffers(model)]
    fused = torch.backends.mha.get_fastpath_enabled()
    try:
        with torch.random.fork_rng(devices=devices(model)), torch.enable_grad():
            model.eval()
            for parameter, _ in flags:
                if parameter.is_floating_point():
                    parameter.requires_grad_(True)
            torch.backends.mha.set_fastpath_enabled(False)
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for module, training in modes:
            module.training = training
        for held, name, buffer, before in buffers:
            held[name] = buffer if torch.equal(buffer, before) else buffer.copy_(before)


def _buffers(model: nn.Module) -> list[tuple[nn.Module, str, Tensor]]:
    return [(module, name, b) for module in model.modules() for name, b in module._buffers.items() if b is not None]
