"""The graph that automatic differentiation keeps of a pass: which tensor descends from which, and through what."""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

_INPUT = -1  # in place of a node: all inputs, or all outputs, together

# Operations of a projected shortcut: linear maps, normalisation, pooling, and what moves entries around.
_MOVES = (
    "Slice|View|UnsafeView|ReshapeAlias|Permute|Transpose|T|Clone|ToCopy|Cat|Index|Select|Expand|Squeeze|Unsqueeze|"
    "AsStrided|Alias"
)
_PLAIN = re.compile(
    f"{_MOVES}|Convolution|CudnnConvolution|MkldnnConvolution|Addmm|Mm|Linear|NativeBatchNorm|CudnnBatchNorm|"
    "NativeGroupNorm|NativeLayerNorm|FusedLayerNorm|(Adaptive)?AvgPool[123]D|Mean|MaxPool2DWithIndices|ConstantPadNd|"
    "Upsample(Nearest|Bilinear)2D"
)
# Operations that work on every entry alone, or only move entries.
_ENTRYWISE = re.compile(
    f"{_MOVES}|Add|Sub|Rsub|Mul|Div|Pow|Neg|Abs|Exp|Expm1|Log|Log1P|Sin|Cos|Tanh|Sigmoid|LogSigmoid|Softplus|Gelu|Relu|"
    "LeakyRelu|Elu|Silu|Mish|Hardtanh|Hardswish|Hardsigmoid|Reciprocal|Sqrt|Rsqrt|Clamp(Min|Max)?|Where|Minimum|Maximum|"
    "PreluKernel|Erf|Roll|Flip|Split|SplitWithSizes|Unbind|Stack|Chunk|AccumulateGrad"
)


# Operations whose graphs have kinks away from single points; their second derivatives are in the kinks alone.
_KINKED = re.compile(
    "Relu|LeakyRelu|RreluWithNoise|PreluKernel|Threshold|Abs|Clamp(Min|Max)?|Hardtanh|Hardswish|Hardsigmoid|Hardshrink|"
    "Softshrink|Minimum|Maximum|Max|Min|Amax|Amin|Sort|Kthvalue|Median|(Adaptive)?MaxPool[123]D(WithIndices)?"
)


class Found(NamedTuple):
    """A residual addition by its nodes: the addition, the tensor that it starts from, and the end of the branch."""

    node: int
    fork: int
    branch: int
    key: Any
    identity: bool


def key(tensor: Tensor) -> Any:
    """Name of the value that a tensor now holds: the node that made it and the number of its output."""
    return (id(tensor.grad_fn), tensor.output_nr) if tensor.grad_fn is not None else ("leaf", id(tensor))


class Graph:
    """Nodes of a pass in topological order, parameters left out.

    Parameters
    ----------
    outputs : sequence
        Nodes (``grad_fn``) of the outputs.
    model : nn.Module
        Its parameters are constants here.
    """

    def __init__(self, outputs: Sequence[Any], model: nn.Module) -> None:
        constants = {id(p) for p in model.parameters()}
        order = _topological(outputs)
        self._nodes: list[Any] = []
        self._parents: list[list[tuple[int, int]]] = []
        place: dict[int, int] = {}
        told = any(_is_input(node, constants) for node in order)
        for node in order:
            parents = [(place[id(p)], nr) for p, nr in node.next_functions if p is not None and id(p) in place]
            source = _is_input(node, constants) if told else False
            if parents or source or _looks_up(node, told):
                place[id(node)] = len(self._nodes)
                self._nodes.append(node)
                self._parents.append(parents)
        self._ends = {place[id(node)] for node in outputs if id(node) in place}
        self._ancestors = self._all_ancestors()
        self._dominators = _Dominators([[p for p, _ in found] or [_INPUT] for found in self._parents])
        children: list[list[int]] = [[_INPUT] if k in self._ends else [] for k in range(len(self._parents))]
        for k, found in enumerate(self._parents):
            for parent, _ in found:
                children[parent].append(k)
        last = len(self._parents) - 1
        # the same backwards: node k is last − k there
        self._followers = _Dominators(
            [[last - c if c != _INPUT else c for c in children[last - k]] for k in range(last + 1)]
        )

    def _all_ancestors(self) -> list[int]:
        """Set of the ancestors of every node, as the bits of an integer."""
        sets: list[int] = []
        for found in self._parents:
            bits = 0
            for parent, _ in found:
                bits |= sets[parent] | (1 << parent)
            sets.append(bits)
        return sets

    def key(self, node: int, number: int = 0) -> Any:
        """Name of the value that is a node's output of that number."""
        found = self._nodes[node]
        return ("leaf", id(found.variable)) if hasattr(found, "variable") else (id(found), number)

    def name(self, node: int) -> str:
        """Kind of operation, such as "Add"."""
        return _kind(self._nodes[node])

    @property
    def concatenates(self) -> bool:
        """Whether a tensor is concatenated with one that descends from it."""
        for k, found in enumerate(self._parents):
            if self.name(k) == "Cat":
                parts = [p for p, _ in found]
                if any(self._descends(a, b) or self._meet(a, b) for a in parts for b in parts if a != b):
                    return True
        return False

    def _descends(self, node: int, ancestor: int) -> bool:
        return bool(self._ancestors[node] >> ancestor & 1)

    def _meet(self, a: int, b: int) -> bool:
        return bool(self._ancestors[a] & self._ancestors[b])

    def passes_through(self, start: int, node: int) -> bool:
        """Whether every way from a node to the outputs leads through another."""
        last = len(self._nodes) - 1
        return start == node or self._followers.dominates(last - node, last - start)

    def inside(self, node: int, fork: int, branch: int) -> bool:
        """Whether a node lies on a way from the start of a branch to its end."""
        return (node == branch or self._descends(branch, node)) and self._descends(node, fork)

    def residual_additions(self) -> list[Found]:
        """All x + F(x) of the pass, in topological order."""
        found = (self._residual(k) for k in range(len(self._nodes)) if self.name(k) == "Add")
        return [step for step in found if step is not None]

    def _residual(self, node: int) -> Found | None:
        operands = self._parents[node]
        if len(operands) != 2:
            return None
        for (x, _), (branch, number) in (operands, operands[::-1]):
            if self._descends(branch, x):
                step = Found(node, x, branch, self.key(branch, number), True)
                return step if self._mixes(self._between(x, branch)) else None
        return self._projected(node, operands)

    def _projected(self, node: int, operands: list[tuple[int, int]]) -> Found | None:
        """An addition of two ways from one tensor of which one is plain and the other not."""
        (a, _), (b, _) = operands
        fork = self._dominators.of(node)
        if fork == _INPUT or fork in (a, b):
            return None
        ways = self._between(fork, a), self._between(fork, b)
        if set(ways[0]) & set(ways[1]):
            return None
        plain = [all(_PLAIN.fullmatch(self.name(k)) for k in way) for way in ways]
        if plain[0] == plain[1] or not self._mixes(ways[plain[0]]):
            return None
        branch, number = operands[plain[0]]
        return Found(node, fork, branch, self.key(branch, number), False)

    def _between(self, start: int, end: int) -> list[int]:
        """Nodes on the ways from a node, itself left out, to another."""
        return [k for k in range(start + 1, end + 1) if self.inside(k, start, end)]

    def _mixes(self, way: list[int]) -> bool:
        return any(not _ENTRYWISE.fullmatch(self.name(k)) for k in way)


class _Dominators:
    """Tree of immediate dominators of a graph in topological order (Cooper, Harvey & Kennedy, 2001).

    Parameters
    ----------
    parents : list of list of int
        Of every node; −1 is the root.
    """

    def __init__(self, parents: list[list[int]]) -> None:
        self._up: list[int] = []
        self._depth: list[int] = []
        for found in parents:
            common = found[0] if found else _INPUT
            for other in found[1:]:
                common = self._meet(common, other)
            self._up.append(common)
            self._depth.append(1 if common == _INPUT else self._depth[common] + 1)

    def _meet(self, a: int, b: int) -> int:
        while a != b:
            if a == _INPUT or b == _INPUT:
                return _INPUT
            if self._depth[a] >= self._depth[b]:
                a = self._up[a]
            else:
                b = self._up[b]
        return a

    def of(self, node: int) -> int:
        """The immediate dominator."""
        return self._up[node]

    def dominates(self, above: int, node: int) -> bool:
        """Whether every way from the root to a node leads through another."""
        while node not in (_INPUT, above):
            node = self._up[node]
        return node == above


def kinks(output: Tensor) -> list[str]:
    """Operations with kinks that a tensor was made by, such as "Relu", by name.

    Examples
    --------
    >>> import torch
    >>> kinks(torch.relu(torch.ones(2, requires_grad=True)).exp().sum())
    ['Relu']
    """
    nodes = _topological([output.grad_fn]) if output.grad_fn is not None else []
    return sorted({name for name in map(_kind, nodes) if _KINKED.fullmatch(name)})


def _kind(node: Any) -> str:
    """Kind of operation, such as "Add"."""
    return str(node.name()).rpartition("::")[2].partition("Backward")[0].rstrip("_")


def _topological(outputs: Sequence[Any]) -> list[Any]:
    """All nodes behind the outputs, parents first."""
    order: list[Any] = []
    seen: set[int] = set()
    stack = [(node, False) for node in outputs]
    while stack:
        node, done = stack.pop()
        if done:
            order.append(node)
        elif id(node) not in seen:
            seen.add(id(node))
            stack.append((node, True))
            stack += [(parent, False) for parent, _ in node.next_functions if parent is not None]
    return order


def _is_input(node: Any, constants: set[int]) -> bool:
    return hasattr(node, "variable") and id(node.variable) not in constants


def _looks_up(node: Any, told: bool) -> bool:
    """Whether a node takes rows of a table of weights: where tokens become vectors."""
    name = str(node.name())
    return name.startswith("Embedding") or (not told and name.startswith(("Index", "Gather")))
