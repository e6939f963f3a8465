"""Noise that belongs to the modules of a network: copied, saved, moved and switched with them."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from kolmo.bridge.foreign import drops_samples
from kolmo.bridge.laws import NoiseLaw
from kolmo.bridge.sites import Site
from kolmo.bridge.variables import uniform
from kolmo.bridge.watching import Output, is_addition
from kolmo.errors import InputError

_BATCHNORM = nn.modules.batchnorm._BatchNorm
_IN_PLACE = (Tensor.add_, Tensor.__iadd__)


class Noise:
    """Noise of one site: replaces a branch output m by m + noise, or by its mean in evaluation mode.

    A forward hook without a closure: mode and strengths are those of the module that adds the branch, which is copied
    and saved together with it.

    Attributes
    ----------
    owner : nn.Module
        The module in whose code the addition is: the noise follows its mode. (That of the branch's last layer may be
        another one, such as a frozen batch normalisation.)
    always : bool
        Noise in evaluation mode too.
    change : callable or None
        ``change(m, law, h, axis)`` instead of the law's sample: what the readings of the noise are made with.
    enters : bool
        Whether the branch is cut where it begins when the whole batch drops it; see `kolmo.bridge.skipping`.
    pending : (Tensor, int) or None
        What was drawn where the branch began, and the number of samples, until the branch ends.
    tried, skipped : bool, int
        Whether the branch is to be dropped for a trial; how often it was cut.
    """

    def __init__(self, site: Site, owner: nn.Module, law: NoiseLaw, h: float) -> None:
        self.owner, self.law, self.h = owner, law, h
        self.axis = site.batch_axis or 0
        self.path = site.end.path if isinstance(site.end, Output) else ()
        self.learnt: dict[str, str] = {}
        self.always = False
        self.change: Any = None
        self.enters = self.tried = False
        self.pending: tuple[Tensor, int] | None = None
        self.skipped = 0

    def __getstate__(self) -> dict[str, Any]:
        """Copies are quiet in evaluation mode, also those made within `Injection.noisy`."""
        return {**self.__dict__, "always": False, "change": None, "pending": None}

    def enter(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Draw for the whole batch where the branch begins; where it is dropped, cut what goes in to an empty batch.

        In compiled passes and transforms of torch.func nothing can depend on the draw: there branches are computed.
        """
        x = next((v for v in args if isinstance(v, Tensor)), None)
        if torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None:
            return None
        self.pending = None
        if x is None or self.change is not None:
            return None
        if not (self.always or self.owner.training or self.tried):
            return None
        like = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        zeta = like.new_full((), -1.0) if self.tried else self.law.draw((1,) * x.ndim, like)
        self.pending = zeta, x.shape[self.axis]
        if bool(zeta >= 0):
            return None

        def cut(value: Any) -> Any:
            whole = isinstance(value, Tensor) and value.shape == x.shape
            return value.narrow(self.axis, 0, 0) if whole else value

        return tuple(map(cut, args)), {name: cut(value) for name, value in kwargs.items()}

    def _ended(self, m: Tensor) -> Tensor:
        """Increment of a branch for which was drawn where it began."""
        (zeta, size), self.pending = self.pending or (m, 0), None
        if bool(zeta >= 0):
            return self.law.increment(m, zeta.reshape(()).to(m.dtype), self.h)
        shape = list(m.shape)
        if shape[self.axis] == 0:
            self.skipped += 1
        shape[self.axis] = size
        # the sum of nothing: the weights of the branch get zeros for a gradient
        return m.new_zeros(shape) + m.narrow(self.axis, 0, 0).sum()

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Replace the output of the module."""
        if not self.path and isinstance(output, tuple):
            return (self.noisy(output[0]), *output[1:])
        return _replaced(output, self.path, self.noisy)

    def noisy(self, m: Tensor) -> Tensor:
        """Increment of the site for a branch output m."""
        law = self.law
        if self.learnt:
            law = law.replaced(**{name: getattr(self.owner, key) for name, key in self.learnt.items()})
        with torch._C.DisableTorchFunction():  # the additions of the law are none of the network's
            if self.change is not None:
                return self.change(m, law, self.h, self.axis)  # type: ignore[no-any-return]
            if self.pending is not None:
                return self._ended(m)
            if self.tried:
                return m * 0.0
            if not (self.always or self.owner.training):
                return law.mean(m)
            if self.enters and not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
                raise InputError(
                    "checkpoint",
                    "one that begins inside a branch which a whole batch drops",
                    "checkpoints around whole branches or blocks: what was drawn where the branch began is forgotten",
                )
            return sample(law, m, self.h, self.axis)


class Entry:
    """Forward pre-hook of the module where a branch begins: draws, and cuts the input where the branch is dropped."""

    def __init__(self, noise: Noise) -> None:
        self.noise = noise

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the arguments, cut or as they are."""
        return self.noise.enter(args, kwargs)


def moved(m: Tensor, axis: int, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Change a branch with its samples in front."""
    return change(m) if axis == 0 else change(m.movedim(axis, 0)).movedim(0, axis)


def sample(law: NoiseLaw, m: Tensor, h: float, axis: int) -> Tensor:
    """Draw the increment of a branch output whose samples are along an axis."""
    return moved(m, axis, lambda front: law.sample(front, h, state_ndim=m.ndim - 1))


class Instead:
    """What takes the place of ``module.forward``; what stood there before is kept."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.before = module, module.__dict__.get("forward")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the pass that was there."""
        if self.before is not None:
            return self.before(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)


class Quiet(Instead):
    """Forward pass of a module that dropped samples, without that: its input."""

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the input."""
        return x


class NoisyForward(Instead):
    """A module's forward pass with noise in operands of additions in its code."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.noises: dict[int, tuple[int, Noise]] = {}
        self.trained: dict[int, tuple[int, Noise]] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the pass."""
        with _Additions(self.trained if self.module.training else self.noises):
            return self.forward(*args, **kwargs)


class NoisyWeight(Instead):
    """A module's forward pass with noise in its weight; in place of ``module.forward``.

    Attributes
    ----------
    module : nn.Module
        The module, whose mode the noise follows.
    law : WeightNoise
        Its law.
    always : bool
        Noise in evaluation mode too.
    turns : Turns or None
        Says in which passes it is this layer that has noise; None: in all.
    """

    def __init__(self, module: nn.Module, law: Any) -> None:
        super().__init__(module)
        self.law = law
        self.always = False
        self.turns: Turns | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Copies are quiet in evaluation mode, also those made within `Injection.noisy`."""
        return {**self.__dict__, "always": False}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the pass."""
        if not self.on:
            return self.forward(*args, **kwargs)
        weight = self.module.weight
        with torch._C.DisableTorchFunction():
            noise = self.law.sample(weight)
            noisy = weight + (noise if self.turns is None else noise * self.turns.has(self))
        with _Exchanged(weight, noisy):
            return self.forward(*args, **kwargs)

    @property
    def on(self) -> bool:
        """Whether passes are noisy."""
        return self.always or self.module.training


class Turns:
    """One of several layers has noise in its weights in each pass. A forward pre-hook of the model: draws which.

    Parameters
    ----------
    noises : sequence of NoisyWeight
        Noise of the layers.
    """

    def __init__(self, noises: Sequence[NoisyWeight]) -> None:
        self._noises = list(noises)
        self._chosen: Tensor | None = None
        self._task = -1
        for noise in self._noises:
            noise.turns = self

    def __getstate__(self) -> dict[str, Any]:
        """Copies draw for themselves."""
        return {**self.__dict__, "_chosen": None, "_task": -1}

    def __call__(self, model: nn.Module, args: Any) -> None:
        """Draw for a pass that is noisy."""
        if any(noise.on for noise in self._noises):
            self._task = _backward_task()
            like = self._noises[0].module.weight
            drawn = uniform((), like.dtype, like.device)  # type: ignore[arg-type]
            self._chosen = (drawn * len(self._noises)).long()

    def has(self, noise: NoisyWeight) -> Tensor:
        """1 where it is the turn of a layer, else 0."""
        if self._chosen is None:
            given = "a part of the model that was called before the model itself"
            raise InputError("layers", given, "passes of the whole model, which draw the layer that has noise")
        if _backward_task() not in (-1, self._task):
            raise InputError(
                "checkpoint",
                "one inside a model of which one layer has noise in each pass",
                "a checkpoint around the whole model: which layer was drawn is forgotten when a part is repeated",
            )
        return self._chosen == self._noises.index(noise)


def _backward_task() -> int:
    """Number of the backward pass that this happens in, or −1."""
    return -1 if torch.compiler.is_compiling() else int(torch._C._current_graph_task_id())


class _Exchanged(TorchFunctionMode):
    """Functions that are handed one tensor get another one."""

    def __init__(self, one: Any, other: Tensor) -> None:
        super().__init__()
        self._one, self._other = one, other

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        def chosen(value: Any) -> Any:
            return self._other if value is self._one else value

        return function(*map(chosen, args), **{name: chosen(value) for name, value in (kwargs or {}).items()})


class _Additions(TorchFunctionMode):
    """Counts the additions of two tensors and puts noise into the operands that are branches."""

    def __init__(self, noises: dict[int, tuple[int, Noise]]) -> None:
        super().__init__()
        self._noises, self._count = noises, 0

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if is_addition(function, args):
            if self._count in self._noises:
                operand, noise = self._noises[self._count]
                args = _with_noise(function, args, operand, noise)
            self._count += 1
        return function(*args, **(kwargs or {}))


def _with_noise(function: Any, args: tuple[Any, ...], operand: int, noise: Noise) -> tuple[Any, ...]:
    """Operands with noise in one of them, written into it where the addition writes there too."""
    if operand == 0 and function in _IN_PLACE:
        return (args[0].copy_(noise.noisy(args[0].clone())), *args[1:])
    both = list(args)
    both[operand] = noise.noisy(args[operand])
    return tuple(both)


def _replaced(value: Any, path: tuple[Any, ...], change: Any) -> Any:
    """A nested output with one tensor of it changed."""
    if not path:
        return change(value)
    first, rest = path[0], path[1:]
    if isinstance(value, tuple):
        parts = [_replaced(part, rest, change) if i == first else part for i, part in enumerate(value)]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    other = copy.copy(value)
    if isinstance(value, (dict, list)):
        other[first] = _replaced(value[first], rest, change)
    else:
        setattr(other, first, _replaced(getattr(value, first), rest, change))
    return other


def place(model: nn.Module, site: Site, law: NoiseLaw, h: float) -> Noise:
    """Put the noise of a site into the module that the branch ends in, and return it."""
    module, owner = model.get_submodule(site.module), model.get_submodule(site.owner)
    noise = Noise(site, owner, law, h)
    for name in law.numbers:
        value = getattr(law, name)
        if isinstance(value, nn.Parameter):
            noise.learnt[name] = _registered(owner, name, value)
    if isinstance(site.end, Output):
        if drops_samples(module):
            module.__dict__["forward"] = Quiet(module)
        module.register_forward_hook(noise)
        return noise
    forward = module.__dict__.get("forward")
    if not isinstance(forward, NoisyForward):
        forward = NoisyForward(module)
        module.__dict__["forward"] = forward
    where = site.end.addition if site.end.trained is None else site.end.trained
    forward.noises[site.end.addition] = forward.trained[where] = (site.end.operand, noise)
    return noise


def _registered(module: nn.Module, name: str, value: nn.Parameter) -> str:
    """Register a strength as a parameter of the module; returns its name there."""
    key, k = f"noise_{name}", 1
    while hasattr(module, key):
        k += 1
        key = f"noise{k}_{name}"
    module.register_parameter(key, value)
    return key


def carriers(model: nn.Module) -> list[tuple[str, Any]]:
    """Every injected noise of a model, with the name of its module, in no particular order."""
    found: list[tuple[str, Any]] = []
    for name, module in model.named_modules():
        found += [(name, hook) for hook in module._forward_hooks.values() if isinstance(hook, Noise)]
        forward = module.__dict__.get("forward")
        if isinstance(forward, NoisyForward):
            found += [(name, noise) for _, noise in forward.noises.values()]
        if isinstance(forward, NoisyWeight):
            found.append((name, forward))
    return found


def eject(model: nn.Module) -> None:
    """Take injected noise out of a model, or out of a copy of one, and give back the batch normalisation it froze.

    Parameters
    ----------
    model : nn.Module
        Any model; one without injected noise stays as it is.

    Examples
    --------
    >>> import copy
    >>> from kolmo import bridge
    >>> class Block(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.fc = nn.Linear(2, 2)
    ...     def forward(self, x):
    ...         return x + self.fc(x)
    >>> model = Block()
    >>> noise = bridge.inject(model, bridge.StochasticDepth(0.5))
    >>> twin = copy.deepcopy(model)
    >>> eject(twin)
    >>> x = torch.ones(1, 2)
    >>> torch.equal(twin.train()(x), model.eval()(x))
    True
    """
    for _, noise in carriers(model):
        for name in noise.learnt.values() if isinstance(noise, Noise) else ():
            del noise.owner._parameters[name]
    for module in model.modules():
        for key in [key for key, hook in module._forward_hooks.items() if isinstance(hook, Noise)]:
            del module._forward_hooks[key]
        forward = module.__dict__.get("forward")
        if isinstance(forward, Instead):
            del module.__dict__["forward"]
            if forward.before is not None:
                module.__dict__["forward"] = forward.before
        for key in [key for key, hook in module._forward_pre_hooks.items() if isinstance(hook, Entry)]:
            del module._forward_pre_hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)
    for rule_key, rule in list(model._forward_pre_hooks.items()):
        if isinstance(rule, BatchNormRule):
            rule.thaw(model)
        if isinstance(rule, (BatchNormRule, Turns)):
            del model._forward_pre_hooks[rule_key]


class BatchNormRule:
    """What a training pass does with batch normalisation: refuse it, or freeze it. A forward pre-hook of the model."""

    def __init__(self, rule: str) -> None:
        self.rule = rule
        self.frozen: list[nn.Module] = []

    def __call__(self, model: nn.Module, args: Any) -> None:
        """Look at every batch normalisation."""
        if not model.training:
            return
        for name, module in batchnorms(model):
            if not module.training:
                continue
            if self.rule == "refuse":
                raise InputError(
                    "model",
                    f"{type(module).__name__} {name!r} in training mode",
                    "normalisation that does not mix the samples of a batch: with it a noisy pass of one sample "
                    "depends on the noise of the others, and no equation for one sample describes it",
                    "inject(..., batchnorm='train') to train and measure over batches, batchnorm='freeze' to keep "
                    "the statistics, or use GroupNorm or LayerNorm",
                )
            module.eval()
            if module not in self.frozen:
                self.frozen.append(module)

    def thaw(self, model: nn.Module) -> None:
        """Give the frozen layers the mode of the model again."""
        for module in self.frozen:
            module.train(model.training)


def batchnorms(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """All batch normalisations of a model, by name."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, _BATCHNORM)]


def untouched(module: nn.Module) -> bool:
    """Whether the running statistics of a batch normalisation are missing or those that it began with."""
    mean, variance = (module._buffers.get(name) for name in ("running_mean", "running_var"))
    if mean is None or variance is None:
        return True
    return not bool(mean.any()) and bool((variance == 1).all())
