r"""Where the residual additions of a network are: found by following one pass, not by names.

A residual addition is one of a tensor x and a tensor F(x) that descends from it: :math:`x_{k+1} = x_k + F_k(x_k)`. The
graph that automatic differentiation keeps of a pass says which tensor descends from which; hooks say which module
returned it.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from kolmo.arrays import at_home
from kolmo.bridge.foreign import drops_samples
from kolmo.bridge.graph import Graph, key
from kolmo.errors import InputError

ADDITIONS = frozenset((torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__))
# Layers that say what they take.
_FIRST = (nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, nn.LayerNorm, nn.MultiheadAttention)
# Layers that would use statistics, update them, or drop coordinates in training mode, whoever derives from them.
_LAYERS = (nn.modules.batchnorm._NormBase, nn.modules.dropout._DropoutNd)
# Change at one index, relative to what is there, that counts as none: batched products may round differently.
_SAME = 1e-5


class Output(NamedTuple):
    """A branch that ends in the output of a module: where in that output it is (a path of indices and keys)."""

    path: tuple[Any, ...] = ()


class Operand(NamedTuple):
    """A branch that ends in the code of a module: which addition of its forward pass, and which operand of it."""

    addition: int
    operand: int


_WHOLE = Output()


@dataclass(frozen=True)
class Site:
    r"""One residual addition, or several that share the end of their branch.

    Attributes
    ----------
    name : str
        Module whose output is the branch; ``"module:n"`` where the branch ends in the code of a module, in addition n
        of its forward pass.
    calls : int
        Number of these additions in a pass.
    order : tuple of int
        Their places among all residual additions of the pass.
    ratio : float
        ‖F‖/‖x‖, root mean square over the calls: a branch "h f" has a small one.
    shape : tuple of int
        Shape of the branch in the pass that was followed.
    batch_axis : int or None
        Axis of the samples in the branch; None where no axis of the input keeps samples apart.
    shortcut : str
        "identity", or the module (or "projection") that changes x on its way to the addition.
    aliases : tuple of str
        Other modules that return the same tensor.
    module, owner : str
        Module in which the branch ends, and module in whose code the addition is.
    end : Output or Operand
        Where in the module it ends: a tensor of its output, or an operand of an addition in its code.

    Examples
    --------
    >>> class Block(nn.Module):
    ...     def forward(self, x):
    ...         return x + 0.5 * x.flip(0).cumsum(0)
    >>> found = sites(Block(), torch.ones(1, 4))[0]
    >>> found.name, found.shortcut, round(found.ratio, 6)
    (':0', 'identity', 0.5)
    """

    name: str
    calls: int
    order: tuple[int, ...]
    ratio: float
    shape: tuple[int, ...]
    batch_axis: int | None
    shortcut: str
    aliases: tuple[str, ...] = ()
    module: str = ""
    owner: str = ""
    end: Output | Operand = _WHOLE


class Sites(list[Site]):
    """The residual additions of a network, in the order of the pass; printed as a table.

    Examples
    --------
    >>> class Block(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.fc = nn.Linear(2, 2)
    ...     def forward(self, x):
    ...         return torch.relu(x + self.fc(x))
    >>> found = sites(nn.Sequential(Block(), Block()), torch.ones(3, 2))
    >>> found.names, found.depth, found.h
    (['0.fc', '1.fc'], 2, 0.5)
    """

    @property
    def names(self) -> list[str]:
        """Names of the sites."""
        return [site.name for site in self]

    @property
    def depth(self) -> int:
        """Number of residual additions in a pass."""
        return sum(site.calls for site in self)

    @property
    def h(self) -> float:
        """Step 1/depth."""
        return 1.0 / self.depth

    def __str__(self) -> str:
        """Return the table."""
        rows = [("site", "calls", "order", "‖F‖/‖x‖", "branch", "batch axis", "shortcut")]
        for site in self:
            order = ", ".join(map(str, site.order)) if site.calls < 4 else f"{site.order[0]} … {site.order[-1]}"
            axis = "none" if site.batch_axis is None else str(site.batch_axis)
            shape = "×".join(map(str, site.shape))
            rows.append((site.name, str(site.calls), order, f"{site.ratio:.3f}", shape, axis, site.shortcut))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([*lines, f"depth {self.depth}, h = T/{self.depth}"])


@at_home
def sites(model: nn.Module, *inputs: Any, batch_axis: int | None = None) -> Sites:
    r"""Find the residual additions of a model by following one pass.

    An addition counts where one operand x is an ancestor of the other, F(x), or where both descend from one tensor, one
    of them without a nonlinearity (the projection of a shortcut); where F does more than scale coordinates; and where
    everything that x does goes through the addition. The additions have to be a chain

    .. math:: x_{k+1} = x_k + F_k(x_k), \qquad k = 0, …, L - 1, \qquad h = T/L,

    that is, the output depends on x_k through x_{k+1} alone. U-shaped networks, where early states are used again
    later, are none.

    Parameters
    ----------
    model : nn.Module
        The model; unchanged. It is passed through in evaluation mode.
    *inputs : Any
        Inputs of one pass, ``model(*inputs)``; a small batch will do.
    batch_axis : int, optional
        Axis of the samples in the inputs. By default 0 or 1: the one along which a changed sample changes only itself,
        at every site. The axis in the branches is found in the same way.

    Returns
    -------
    Sites
        List of `Site`, with ``depth`` and ``h``; print it.

    Raises
    ------
    InputError
        No residual addition, or additions that are no chain (U-shaped and nested networks), with the names.

    Examples
    --------
    >>> print(sites(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), torch.randn(2, 5, 8)))  # doctest: +SKIP
    site      calls  order  ‖F‖/‖x‖  branch  batch axis  shortcut
    dropout1  1      0      0.192    2×5×8   0           identity
    dropout2  1      1      0.323    2×5×8   0           identity
    depth 2, h = T/2
    """
    found = follow(model, inputs, batch_axis)
    refuse_broken(found, found.sites)
    return found.sites


class Followed(NamedTuple):
    """What one pass tells.

    Sites; why some cannot be chosen alone, or in pairs; whether tensors are concatenated; which modules were called;
    the first site that drops samples in the code of a model in training mode.
    """

    sites: Sites
    alone: dict[str, str]
    pairs: dict[tuple[str, str], str]
    concatenates: bool
    called: frozenset[str]
    dropping: str | None


def refuse_broken(found: Followed, chosen: Sequence[Site]) -> None:
    """Refuse sites that are no chain."""
    names = {site.name for site in chosen}
    reasons = [why for pair, why in found.pairs.items() if names.issuperset(pair)]
    reasons += [why for name, why in found.alone.items() if name in names]
    if reasons:
        more = f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else ""
        raise InputError(
            "model",
            reasons[0] + more,
            "residual additions one after the other, each carrying all of the state",
            "inject(..., where=[names]) takes those that are such a chain; all that were found: "
            + ", ".join(found.sites.names),
        )
    if not chosen:
        joined = ": it concatenates early tensors with later ones, as U-shaped and dense networks do"
        raise InputError(
            "model",
            "a pass without residual additions" + (joined if found.concatenates else ""),
            "at least one addition x + F(x) of a residual branch",
        )


def follow(model: nn.Module, inputs: Sequence[Any], batch_axis: int | None = None) -> Followed:
    """Follow a pass and sort what was seen."""
    watch = _Watch(model)
    with undisturbed(model), watch.watching():
        output = model(*_differentiable(inputs))
        graph = Graph([t.grad_fn for t in tensors(output) if t.grad_fn is not None], model)
    steps = _steps(graph, watch)
    axes = _batch_axes(model, inputs, steps, batch_axis)
    alone, pairs = _breaks(graph, steps)
    dropping = _dropping(model, inputs, steps, axes)
    return Followed(_gathered(steps, axes), alone, pairs, graph.concatenates, frozenset(watch.calls), dropping)


class _Addition(NamedTuple):
    """An addition of two tensors that was seen in a pass."""

    number: int
    owner: str
    ordinal: int
    operands: tuple[Any, Any]
    norms: tuple[float, float]
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    ends: tuple[list[tuple[str, tuple[Any, ...]]], list[tuple[str, tuple[Any, ...]]]]


class _Step(NamedTuple):
    """A residual addition: its node, those of fork, shortcut and branch, and what was seen of it."""

    node: int
    fork: int
    shortcut: str
    branch: int
    name: str
    module: str
    end: Output | Operand
    aliases: tuple[str, ...]
    ratio: float
    shape: tuple[int, ...]
    seen: _Addition
    operand: int


class _Watch(TorchFunctionMode):
    """Sees the additions of a pass, and which modules return which tensors."""

    def __init__(self, model: nn.Module, wanted: set[tuple[int, int]] | None = None) -> None:
        super().__init__()
        self._model, self._wanted = model, wanted
        self._stack: list[tuple[str, list[int]]] = [("", [0])]
        self._ends: dict[Any, list[tuple[str, tuple[Any, ...]]]] = {}
        self.calls: dict[str, int] = {}
        self.additions: dict[Any, _Addition] = {}
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
        self.additions[key(result)] = _Addition(self._count, owner, counter[0], before, norms, shapes, ends)
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


def _marks(tensor: Tensor) -> list[Tensor]:
    """For every axis the sums of moduli over the other axes."""
    size = tensor.abs().double()
    return [size.sum([other for other in range(tensor.ndim) if other != axis]) for axis in range(tensor.ndim)]


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


def devices(model: nn.Module) -> list[torch.device]:
    """CUDA devices of a model, whose random state is to be kept."""
    return list({p.device for p in model.parameters() if p.device.type == "cuda"})


def _differentiable(inputs: Sequence[Any]) -> list[Any]:
    """Copies of the inputs with gradients where there can be any."""
    return [
        value.detach().clone().requires_grad_() if isinstance(value, Tensor) and value.is_floating_point() else value
        for value in inputs
    ]


def _steps(graph: Graph, watch: _Watch) -> list[_Step]:
    """The residual additions of a pass in their order, with the ends of their branches."""
    steps = []
    for found in graph.residual_additions():
        seen = watch.additions.get(graph.key(found.node))
        if seen is None:  # an addition inside compiled code
            continue
        operand = seen.operands.index(found.key)
        ends = seen.ends[operand]
        straight = bool(ends) and graph.passes_through(found.branch, found.node)
        name, path = ends[-1] if straight else ("", ())
        module, end = (name, Output(path)) if straight else (seen.owner, Operand(seen.ordinal, operand))
        label = name if straight else f"{seen.owner}:{seen.ordinal}"
        across = seen.ends[1 - operand]
        projection = across[-1][0] if across else "projection"
        ratio = seen.norms[operand] / seen.norms[1 - operand] if seen.norms[1 - operand] else math.inf
        steps.append(
            _Step(
                found.node,
                found.fork,
                "identity" if found.identity else projection,
                found.branch,
                label,
                module,
                end,
                tuple(dict.fromkeys(other for other, _ in ends if other != name)) if straight else (),
                ratio,
                seen.shapes[operand],
                seen,
                operand,
            )
        )
    steps.sort(key=lambda step: step.seen.number)
    shared = {s.module for s in steps if isinstance(s.end, Output)}
    uses = {name: sum(s.module == name and isinstance(s.end, Output) for s in steps) for name in shared}
    # a module that is also called elsewhere would carry the noise there too
    return [
        step._replace(
            name=f"{step.seen.owner}:{step.seen.ordinal}",
            module=step.seen.owner,
            end=Operand(step.seen.ordinal, step.operand),
        )
        if isinstance(step.end, Output) and watch.calls[step.module] != uses[step.module]
        else step
        for step in steps
    ]


def _breaks(graph: Graph, steps: list[_Step]) -> tuple[dict[str, str], dict[tuple[str, str], str]]:
    """Why a site cannot be chosen, and why two cannot be chosen together."""
    alone, pairs = {}, {}
    for step in steps:
        if not graph.passes_through(step.fork, step.node):
            alone[step.name] = f"{step.name!r}, whose state x is also used past the addition x + F(x)"
    for k, outer in enumerate(steps):
        for inner in steps[:k]:
            if inner.name != outer.name and graph.inside(inner.node, outer.fork, outer.branch):
                pairs[inner.name, outer.name] = f"{inner.name!r} inside the branch of {outer.name!r}"
    for before, after in pairwise(steps):
        pair = before.name, after.name
        if pair not in pairs and not graph.passes_through(before.node, after.node):
            pairs[pair] = (
                f"a state that is used again later: what {before.name!r} makes reaches the output past {after.name!r}, "
                "as in U-shaped networks and in decoders with a memory"
            )
    return alone, pairs


def _gathered(steps: list[_Step], axes: list[int | None]) -> Sites:
    """One row for every end of a branch."""
    rows: dict[str, list[int]] = {}
    for k, step in enumerate(steps):
        rows.setdefault(step.name, []).append(k)
    found = Sites()
    for name, order in rows.items():
        calls = [steps[k] for k in order]
        first = calls[0]
        ratio = math.sqrt(sum(call.ratio**2 for call in calls) / len(calls))
        axis = axes[order[0]] if len({axes[k] for k in order}) == 1 else None
        found.append(
            Site(
                name,
                len(order),
                tuple(order),
                ratio,
                first.shape,
                axis,
                first.shortcut,
                first.aliases,
                first.module,
                first.seen.owner,
                first.end,
            )
        )
    return found


def _batch_axes(
    model: nn.Module, inputs: Sequence[Any], steps: list[_Step], batch_axis: int | None
) -> list[int | None]:
    """Axis of the samples in every branch: the one along which a changed sample changes only itself."""
    best: list[int | None] = [None] * len(steps)
    for axis in (0, 1) if batch_axis is None else (batch_axis,):
        with contextlib.suppress(Exception):  # a model may refuse a doubled axis; then the next one is tried
            found = _separating(model, *_changed(inputs, axis), steps)
            best = min(best, found, key=lambda axes: axes.count(None))
            if None not in best:
                break
    return best


def _operands(model: nn.Module, inputs: Sequence[Any], steps: list[_Step], *, training: bool = False) -> list[Tensor]:
    """Branch of every step in another pass; "training" is for the model's own code, not for layers of torch."""
    watch = _Watch(model, {(step.seen.number, step.operand) for step in steps})
    with undisturbed(model), torch.no_grad(), watch.watching():
        for module in model.modules():
            module.training = training and _own(module) and not drops_samples(module)
        model(*inputs)
    return [watch.seen[step.seen.number, step.operand] for step in steps]


def _own(module: nn.Module) -> bool:
    """Whether the code of a module is the model's own: no layer of torch, nor normalisation or dropout made of one."""
    return not type(module).__module__.startswith("torch.") and not isinstance(module, _LAYERS)


def _separating(model: nn.Module, inputs: list[Any], changed: list[Any], steps: list[_Step]) -> list[int | None]:
    with awake(model):
        before, after = (_operands(model, values, steps) for values in (inputs, changed))
    return [_axis(a, b) for a, b in zip(before, after, strict=True)]


@contextlib.contextmanager
def awake(model: nn.Module) -> Iterator[None]:
    """No parameter is zero: blocks that begin as identities, and mix nothing yet, show what they are going to mix."""
    asleep = [p.data for p in model.parameters() if p.is_floating_point() and not bool(p.any())]
    try:
        with torch.random.fork_rng(devices=devices(model)):
            torch.manual_seed(0)
            for zeros in asleep:
                zeros.normal_(std=0.1)
        yield
    finally:
        for zeros in asleep:
            zeros.zero_()


def _dropping(model: nn.Module, inputs: Sequence[Any], steps: list[_Step], axes: list[int | None]) -> str | None:
    """First site whose branch is multiplied by one number for each sample in training mode, by code and not a module.

    Where that number is 1, nothing was seen; rescaled stochastic depth multiplies by 1/keep, which is never 1.
    """
    with contextlib.suppress(Exception):  # training mode may want other inputs
        quiet, noisy = (_operands(model, inputs, steps, training=training) for training in (False, True))
        for step, axis, a, b in zip(steps, axes, quiet, noisy, strict=True):
            if torch.equal(a, b):
                continue
            front = [v.movedim(axis or 0, 0).flatten(1).double() for v in (a, b)]
            if front[0].shape[1] == 1:  # any change of one number is a multiple of it
                return None
            factor = (front[0] * front[1]).sum(1) / front[0].square().sum(1).clamp_min(1e-30)
            alike = torch.allclose(front[1], factor[:, None] * front[0], rtol=1e-4, atol=1e-5 * float(a.abs().max()))
            return step.name if alike else None
    return None


def _axis(before: Tensor, after: Tensor) -> int | None:
    """First axis along which the first place alone has changed."""
    changes, sizes = _marks(after - before), _marks(torch.maximum(before.abs(), after.abs()))
    for limit in (_SAME, 0.0):  # none at all elsewhere: a branch on which its input hardly has an influence
        for axis, (change, size) in enumerate(zip(changes, sizes, strict=True)):
            other = (change > limit * size).tolist()
            if len(other) > 1 and other[0] and not any(other[1:]):
                return axis
    return None


def _changed(inputs: Sequence[Any], axis: int) -> tuple[list[Any], list[Any]]:
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
    first = next((m for m in model.modules() if isinstance(m, _FIRST)), None)
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
