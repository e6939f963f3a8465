"""Where the residual additions of a network are: found by following one pass, not by names.

A residual addition is one of a tensor x and a tensor F(x) that descends from it: :math:`x_{k+1} = x_k + F_k(x_k)`. The
graph that automatic differentiation keeps of a pass says which tensor descends from which; hooks say which module
returned it.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kolmo.arrays import at_home
from kolmo.bridge.foreign import drops_samples
from kolmo.bridge.graph import Found, Graph
from kolmo.bridge.probing import changed
from kolmo.bridge.watching import (
    LAYERS,
    SAME,
    WHOLE,
    Addition,
    Operand,
    Output,
    Watch,
    devices,
    marks,
    tensors,
    undisturbed,
)
from kolmo.errors import InputError


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
        :math:`\|F\|/\|x\|`, root mean square over the calls: a branch "h f" has a small one.
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
    end: Output | Operand = WHOLE


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
    the first site that drops samples in the code of a model in training mode; why sites are not found again there.
    """

    sites: Sites
    alone: dict[str, str]
    pairs: dict[tuple[str, str], str]
    concatenates: bool
    called: frozenset[str]
    dropping: str | None
    unlike: dict[str, str]


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
    watch = Watch(model)
    with undisturbed(model), watch.watching():
        output = model(*_differentiable(inputs))
        graph = Graph([t.grad_fn for t in tensors(output) if t.grad_fn is not None], model)
    steps = _steps(graph, watch)
    axes = _batch_axes(model, inputs, steps, batch_axis)
    alone, pairs = _breaks(graph, steps)
    trained, unlike = _in_training(model, inputs, steps, watch)
    dropping = _dropping(model, inputs, steps, trained, axes)
    steps = [_with_ordinal(step, other) for step, other in zip(steps, trained, strict=True)]
    return Followed(_gathered(steps, axes), alone, pairs, graph.concatenates, frozenset(watch.calls), dropping, unlike)


class _Step(NamedTuple):
    """A residual addition: its nodes, what was seen of it and which operand is the branch, and where that ends."""

    found: Found
    seen: Addition
    operand: int
    shortcut: str
    name: str
    module: str
    end: Output | Operand
    aliases: tuple[str, ...]

    @property
    def ratio(self) -> float:
        """Size of the branch against that of the state."""
        size = self.seen.norms[1 - self.operand]
        return self.seen.norms[self.operand] / size if size else math.inf


def _differentiable(inputs: Sequence[Any]) -> list[Any]:
    """Copies of the inputs with gradients where there can be any."""
    return [
        value.detach().clone().requires_grad_() if isinstance(value, Tensor) and value.is_floating_point() else value
        for value in inputs
    ]


def _steps(graph: Graph, watch: Watch) -> list[_Step]:
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
        shortcut = "identity" if found.identity else across[-1][0] if across else "projection"
        aliases = tuple(dict.fromkeys(other for other, _ in ends if other != name)) if straight else ()
        steps.append(_Step(found, seen, operand, shortcut, label, module, end, aliases))
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
        if not graph.passes_through(step.found.fork, step.found.node):
            alone[step.name] = f"{step.name!r}, whose state x is also used past the addition x + F(x)"
    for k, outer in enumerate(steps):
        for inner in steps[:k]:
            if inner.name != outer.name and graph.inside(inner.found.node, outer.found.fork, outer.found.branch):
                pairs[inner.name, outer.name] = f"{inner.name!r} inside the branch of {outer.name!r}"
    for before, after in pairwise(steps):
        pair = before.name, after.name
        if pair not in pairs and not graph.passes_through(before.found.node, after.found.node):
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
                first.seen.shapes[first.operand],
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
            with awake(model):
                passes = [_operands(model, values, steps) for values in changed(inputs, axis)]
            found = [_axis(a, b) for a, b in zip(*passes, strict=True)]
            best = min(best, found, key=lambda axes: axes.count(None))
            if None not in best:
                break
    return best


def _in_training(
    model: nn.Module, inputs: Sequence[Any], steps: list[_Step], seen: Watch
) -> tuple[list[_Step], dict[str, str]]:
    """The same steps in a pass in training mode, and why some sites cannot be told there.

    Code that adds something in training mode alone, such as noise of its own, moves the numbers of its additions, or
    adds branches elsewhere. Fewer additions are branches that were skipped. Where nothing can be seen, because
    training mode wants other inputs, the steps are taken to be the same.
    """
    with contextlib.suppress(Exception):
        watch = Watch(model)
        with undisturbed(model):
            _train_own_code(model)
            with watch.watching():
                output = model(*_differentiable(inputs))
                graph = Graph([t.grad_fn for t in tensors(output) if t.grad_fn is not None], model)
        found, unlike = _steps(graph, watch), dict[str, str]()
        same = list(steps)
        for owner in {step.seen.owner for step in steps}:
            here = [k for k, step in enumerate(steps) if step.seen.owner == owner]
            there = [step for step in found if step.seen.owner == owner]
            if len(here) == len(there):
                for k, step in zip(here, there, strict=True):
                    same[k] = step
            elif watch.number_in(owner) > seen.number_in(owner) or len(found) >= len(steps):
                why = f"in training mode {owner or 'the model'!r} adds more, and not what it adds in evaluation mode"
                unlike |= {steps[k].name: why for k in here if isinstance(steps[k].end, Operand)}
        return same, unlike
    return steps, {}


def _with_ordinal(step: _Step, trained: _Step) -> _Step:
    """The step, with the number of its addition in training mode."""
    if not isinstance(step.end, Operand) or trained.seen.ordinal == step.seen.ordinal:
        return step
    return step._replace(end=step.end._replace(trained=trained.seen.ordinal))


def _train_own_code(model: nn.Module) -> None:
    """Training mode for the model's own code, not for layers of torch."""
    for module in model.modules():
        module.training = _own(module) and not drops_samples(module)


def _operands(model: nn.Module, inputs: Sequence[Any], steps: list[_Step], *, training: bool = False) -> list[Tensor]:
    """Branch of every step in another pass; "training" is for the model's own code."""
    watch = Watch(model, {(step.seen.number, step.operand) for step in steps})
    with undisturbed(model), torch.no_grad():
        if training:
            _train_own_code(model)
        with watch.watching():
            model(*inputs)
    return [watch.seen[step.seen.number, step.operand] for step in steps]


def _own(module: nn.Module) -> bool:
    """Whether the code of a module is the model's own: no layer of torch, nor normalisation or dropout made of one."""
    return not type(module).__module__.startswith("torch.") and not isinstance(module, LAYERS)


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


def _dropping(
    model: nn.Module, inputs: Sequence[Any], steps: list[_Step], trained: list[_Step], axes: list[int | None]
) -> str | None:
    """First site whose branch is multiplied by one number for each sample in training mode, by code and not a module.

    Where that number is 1, nothing was seen; rescaled stochastic depth multiplies by 1/keep, which is never 1.
    """
    with contextlib.suppress(Exception):  # training mode may want other inputs
        quiet, noisy = _operands(model, inputs, steps), _operands(model, inputs, trained, training=True)
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
    changes, sizes = marks(after - before), marks(torch.maximum(before.abs(), after.abs()))
    for limit in (SAME, 0.0):  # none at all elsewhere: a branch on which its input hardly has an influence
        for axis, (change, size) in enumerate(zip(changes, sizes, strict=True)):
            other = (change > limit * size).tolist()
            if len(other) > 1 and other[0] and not any(other[1:]):
                return axis
    return None
