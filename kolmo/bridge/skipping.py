"""Branches that a whole batch drops are not computed: what goes into them is cut to an empty batch.

The modules of the branch then work on nothing, and where it ends there are zeros of the right size. Nothing else about
a pass changes: gradients of the branch's weights are zeros, not missing, and normalisation keeps its statistics.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kolmo.bridge.branch_laws import StochasticDepth
from kolmo.bridge.noise import Entry, Noise
from kolmo.bridge.sites import Site, awake
from kolmo.bridge.watching import Output, tensors, undisturbed


def skip(model: nn.Module, rows: Sequence[Site], noises: Sequence[Noise], inputs: Sequence[Any]) -> None:
    """Find where the branches begin that the whole batch drops, and put the cut there.

    A module is the beginning where a pass with its input cut has the outputs of one whose branch is multiplied by zero;
    the earliest one is taken. A branch without such a module is computed, and multiplied by zero.
    """
    for site, noise in zip(rows, noises, strict=True) if inputs else ():
        law = noise.law
        whole = isinstance(law, StochasticDepth) and law.per == "batch" and not law.noiseless
        if not whole or site.calls != 1 or not isinstance(site.end, Output) or site.end.path:
            continue
        with undisturbed(model), awake(model), torch.no_grad():
            names = _inside(model, site, inputs)
            with _always_dropped(noise):
                wanted = tensors(model(*inputs))
            found = next((name for name in names if _same(model, noise, name, inputs, wanted)), None)
        if found is not None:
            enter_at(model.get_submodule(found), noise)


def enter_at(module: nn.Module, noise: Noise) -> Any:
    """Let a branch begin at a module."""
    noise.enters = True
    return module.register_forward_pre_hook(Entry(noise), with_kwargs=True)


def _inside(model: nn.Module, site: Site, inputs: Sequence[Any]) -> list[str]:
    """Modules called in the code of the owner, up to the end of the branch, in order."""
    called: list[str] = []
    state = {"inside": site.owner == "", "over": False}
    handles = []

    def before(name: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            if state["inside"] and not state["over"] and name not in called:
                called.append(name)
            state["inside"] |= name == site.owner

        return hook

    def after(module: nn.Module, args: Any, output: Any) -> None:
        state["over"] = True

    for name, module in model.named_modules():
        if name:
            handles.append(module.register_forward_pre_hook(before(name)))
    handles.append(model.get_submodule(site.module).register_forward_hook(after))
    try:
        model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return called


@contextmanager
def _always_dropped(noise: Noise) -> Iterator[None]:
    """The branch is multiplied by zero, in evaluation mode too."""
    noise.tried = True
    try:
        yield
    finally:
        noise.tried = False


def _same(model: nn.Module, noise: Noise, name: str, inputs: Sequence[Any], wanted: list[Tensor]) -> bool:
    """Whether a pass that is cut at a module has the same outputs."""
    handle = enter_at(model.get_submodule(name), noise)
    noise.skipped = 0
    try:
        with _always_dropped(noise):
            found = tensors(model(*inputs))
        same = len(found) == len(wanted) and all(map(torch.equal, found, wanted))
        return same and noise.skipped == 1
    except Exception:  # whatever a network does with an empty batch
        return False
    finally:
        handle.remove()
        noise.enters, noise.pending = False, None
