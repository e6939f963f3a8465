"""Put a noise law into the residual blocks of a network that someone else wrote, without subclassing it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from kolmo.bridge.laws import HiddenDropout, NoiseLaw, ShakeShake
from kolmo.bridge.resnet import Averaged, Rng, as_generator, average
from kolmo.errors import InputError

Where = None | str | Sequence[str] | Callable[[str, nn.Module], bool]
_SKIPS = ("shortcut", "downsample", "skip")  # names of the identity path in residual blocks
_ENDS = (nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm, nn.Linear)


def inject(
    model: nn.Module, law: NoiseLaw, where: Where = None, *, horizon: float = 1.0, batchnorm: str = "refuse"
) -> "Injection":
    r"""Add a noise law to the outputs of the residual branches of any model.

    A block x + F(x) becomes x + ΔX with E ΔX = F(x): the branch output F is read as h f with h = horizon / (number of
    blocks). In training mode the passes are noisy, in evaluation mode they take the mean increment.

    Parameters
    ----------
    model : nn.Module
        The model; changed in place by forward hooks until `Injection.remove`.
    law : NoiseLaw
        Any law that acts on the branch output (not `HiddenDropout` or `ShakeShake`). Sequences such as a linear decay
        of ``keep`` follow the order of the blocks in ``model.named_modules()``.
    where : None, str, sequence of str or callable, optional
        The modules whose output is the output of a residual branch: name patterns such as ``"layer*.bn2"``, or
        ``where(name, module) -> bool``. None: modules called ``DropPath`` or named ``drop_path*``, whose own noise is
        replaced; without these, the last convolution, linear or normalisation layer of every block that has a
        ``shortcut``, ``downsample`` or ``skip``.
    horizon : float
        T, so that diffusive laws know h.
    batchnorm : {"refuse", "freeze"}
        Batch normalisation in training mode couples the samples of a batch, so that no equation for one sample
        describes the noisy passes. "refuse": raise then. "freeze": keep it in evaluation mode.

    Returns
    -------
    Injection
        Handle with the sites, averaging, and removal; a context manager that removes the noise at its end.

    Raises
    ------
    InputError
        No residual branch found, or a law that needs the inside of the branch.

    Examples
    --------
    >>> class Block(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.conv, self.shortcut = nn.Conv2d(3, 3, 3, padding=1), nn.Identity()
    ...     def forward(self, x):
    ...         return self.shortcut(x) + self.conv(x)
    >>> from kolmo import bridge
    >>> model = nn.Sequential(Block(), Block())
    >>> with inject(model, bridge.StochasticDepth(0.8)) as noise:
    ...     print(noise.sites)
    ['0.conv', '1.conv']
    """
    if isinstance(law, (HiddenDropout, ShakeShake)) or not isinstance(law, NoiseLaw):
        raise InputError("law", type(law).__name__, "a law that acts on the output of a branch", "use NoisyResNet")
    if batchnorm not in ("refuse", "freeze"):
        raise InputError("batchnorm", repr(batchnorm), "'refuse' or 'freeze'")
    if not horizon > 0:
        raise InputError("horizon", horizon, "a positive number")
    names = _sites(model, where)
    if not names:
        raise InputError(
            "where",
            where,
            "at least one module whose output is that of a residual branch",
            "name them, as in where='layer*.bn2'; names are those of model.named_modules()",
        )
    return Injection(model, law, names, horizon, batchnorm)


class Injection:
    """Noise in the residual branches of a model; made by `inject`.

    Attributes
    ----------
    model : nn.Module
        The model.
    sites : list of str
        Names of the modules whose outputs carry the noise.
    h : float
        Step: horizon / number of sites.
    generator : torch.Generator or None
        Source of the noise in training passes; None: torch's global one.

    Examples
    --------
    >>> from kolmo import bridge
    >>> class Block(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.fc, self.shortcut = nn.Linear(2, 2), nn.Identity()
    ...     def forward(self, x):
    ...         return self.shortcut(x) + self.fc(x)
    >>> model, x = nn.Sequential(Block(), Block()), torch.ones(1, 2)
    >>> before = model(x)
    >>> with inject(model, bridge.Multiplicative(0.5)) as noise:
    ...     average = noise.mc(x, 100, rng=0)
    >>> bool((average.standard_error > 0).all()), torch.equal(model(x), before)
    (True, True)
    """

    def __init__(self, model: nn.Module, law: NoiseLaw, sites: list[str], horizon: float, batchnorm: str) -> None:
        self.model, self.sites, self.h = model, sites, horizon / len(sites)
        self.generator: torch.Generator | None = None
        self._batchnorm, self._always = batchnorm, False
        modules = dict(model.named_modules())
        self._hooks = [model.register_forward_pre_hook(self._check_batchnorm)]
        for k, name in enumerate(sites):
            self._hooks.append(modules[name].register_forward_hook(self._hook(law.layer(k, len(sites)))))

    def _hook(self, law: NoiseLaw) -> Callable[[nn.Module, Any, Any], Tensor]:
        """Return the forward hook that replaces a branch output m by m + noise, or by its mean."""

        def hook(module: nn.Module, inputs: Any, output: Any) -> Tensor:
            m: Tensor = inputs[0] if _is_drop_path(module) else output
            if not (self._always or self.model.training):
                return law.mean(m)
            return law.sample(m, self.h, state_ndim=m.ndim - 1, generator=self.generator)

        return hook

    def _check_batchnorm(self, model: nn.Module, inputs: Any) -> None:
        """Freeze or refuse batch normalisation in training mode."""
        if not model.training:
            return
        for name, module in model.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
                if self._batchnorm == "refuse":
                    raise InputError(
                        "model",
                        f"{type(module).__name__} {name!r} in training mode",
                        "normalisation that does not mix the samples of a batch: with it a noisy pass of one sample "
                        "depends on the noise of the others, and no equation for one sample describes it",
                        "inject(..., batchnorm='freeze'), or use GroupNorm or LayerNorm",
                    )
                module.eval()

    @contextmanager
    def noisy(self, rng: Rng = None) -> Iterator[nn.Module]:
        """Noise on in evaluation mode too, so that dropout and statistics of the model itself stay off.

        Parameters
        ----------
        rng : None, int or generator
            Source of the noise.
        """
        before = self.generator, self._always, self.model.training
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        self.generator, self._always = as_generator(rng, device), True
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        try:
            yield self.model
        finally:
            self.generator, self._always = before[:2]
            for module, training in modes:
                module.training = training

    @torch.no_grad()
    def mc(self, x: Any, n: int, rng: Rng = None, loss: Callable[[Tensor], Tensor] | None = None) -> Averaged:
        """Average the model's output (or a loss of it) over n noisy passes, with its standard error.

        Parameters
        ----------
        x : Tensor
            Input of the model.
        n : int
            Number of passes, at least 2.
        rng : None, int or generator
            Source of the noise.
        loss : callable, optional
            Function of the output whose mean is wanted.
        """
        with self.noisy(rng) as model:

            def sample(generator: torch.Generator) -> Tensor:
                output = model(x)
                return output if loss is None else loss(output)

            assert self.generator is not None
            return average(sample, n, self.generator)

    def remove(self) -> None:
        """Take the noise out of the model again."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def __enter__(self) -> "Injection":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def _is_drop_path(module: nn.Module) -> bool:
    return type(module).__name__ == "DropPath"


def _sites(model: nn.Module, where: Where) -> list[str]:
    """Names of the modules whose outputs are residual branch outputs."""
    modules = [(name, module) for name, module in model.named_modules() if name]
    if callable(where):
        return [name for name, module in modules if where(name, module)]
    if where is not None:
        patterns = [where] if isinstance(where, str) else list(where)
        unmatched = [p for p in patterns if not any(fnmatch(name, p) for name, _ in modules)]
        if unmatched:
            known = ", ".join(name for name, _ in modules[:20])
            raise InputError("where", unmatched[0], f"the pattern of a module's name; the first are {known}")
        return [name for name, _ in modules if any(fnmatch(name, p) for p in patterns)]
    paths = [name for name, module in modules if _is_drop_path(module) or name.split(".")[-1].startswith("drop_path")]
    if paths:
        return paths
    found = []
    for name, block in modules:
        if any(hasattr(block, skip) for skip in _SKIPS):
            ends = [child for child, part in block.named_children() if child not in _SKIPS and isinstance(part, _ENDS)]
            found += [f"{name}.{ends[-1]}"] if ends else []
    return found
