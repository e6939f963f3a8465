"""Put a noise law into the residual branches of a network that someone else wrote, without subclassing it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from kolmo.arrays import at_home
from kolmo.bridge.branch_laws import HiddenDropout, ShakeShake
from kolmo.bridge.foreign import drops_samples
from kolmo.bridge.laws import NoiseLaw
from kolmo.bridge.noise import BatchNormRule, batchnorms, carriers, eject, place, untouched
from kolmo.bridge.probing import probe
from kolmo.bridge.resnet import Averaged, NoisyResNet, Rng, as_generator, average
from kolmo.bridge.selection import Where, select
from kolmo.bridge.sites import Sites
from kolmo.bridge.skipping import skip
from kolmo.bridge.watching import Operand, devices
from kolmo.bridge.weights import WeightNoise, place_in_weights, weighed
from kolmo.errors import InputError
from kolmo.shown import Shown

BATCHNORM = ("refuse", "train", "freeze")


@at_home
def inject(
    model: nn.Module,
    law: NoiseLaw | WeightNoise | Sequence[NoiseLaw] | Sequence[WeightNoise],
    where: Where = None,
    *,
    inputs: Tensor | Sequence[Any] | None = None,
    horizon: float = 1.0,
    batchnorm: str = "refuse",
) -> "Injection":
    r"""Add a noise law to the residual branches of any model.

    .. math:: x \mapsto x + \Delta X, \qquad E\,\Delta X = F(x) = hf(x), \qquad h = T/\#\text{additions}

    A residual addition x + F(x) becomes x + ΔX with E ΔX = F(x): the branch F is read as h f with h = horizon / (number
    of additions in a pass). In training mode the passes are noisy, in evaluation mode they take the mean increment.

    Parameters
    ----------
    model : nn.Module
        The model; changed in place until `Injection.remove`. Its copies carry the noise too and follow their own mode;
        `eject` takes it out of them.
    law : NoiseLaw or sequence of NoiseLaw
        Any law that acts on the branch output (not `HiddenDropout` or `ShakeShake`), or one for each site. Sequences in
        a law, such as a linear decay of ``keep``, have one value for each site or for each addition of the pass, in the
        order of the pass. A strength that is an ``nn.Parameter`` becomes a parameter of the model, ``…noise_s``; one
        of shape (1,) where the model is going to be sharded (FSDP).
        `WeightNoise` is put into the weights of layers instead, of networks of any form.
    where : None, Sites, Site, str, sequence of these, or callable, optional
        Which residual additions: rows of `sites`; names of modules whose output is that of a branch, or patterns of
        them, in which ``*`` does not cross dots and ``**`` does; ``where(name, module) -> bool``. None: all. For
        `WeightNoise`: the modules, by names, patterns or a function; None: all whose weights are matrices or filters,
        but for those inside ``nn.MultiheadAttention``, which does not call them.
    inputs : Tensor or sequence, shapes (n, ...), optional
        Inputs of the pass that `sites` follows, ``model(*inputs)``; one tensor is one input. By default they are
        guessed from the first layer; where no guess fits, names are taken as they are, on trust: the whole output (the
        first tensor of it) is a branch, samples are along axis 0, and each module is called once in a pass.
    horizon : float
        T, so that diffusive laws know h.
    batchnorm : {"refuse", "train", "freeze"}
        Batch normalisation in training mode couples the samples of a batch, so that no equation for one sample
        describes the noisy passes. "refuse": raise then. "train": normalise by the batch, as is usual in training;
        expectations are then over batches (`Injection.couples_samples`). "freeze": keep it in evaluation mode, on
        statistics that data have touched, until `Injection.remove`.

    Returns
    -------
    Injection
        Handle with the sites, averaging, and removal; a context manager that removes the noise at its end.

    Raises
    ------
    InputError
        No residual addition found, or none that can be followed; names that are not ends of branches; additions that
        are no chain; a law that needs the inside of the branch; a model that has noise in its branches already;
        "freeze" on fresh statistics.

    Examples
    --------
    >>> class Block(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.conv = nn.Conv2d(3, 3, 3, padding=1)
    ...     def forward(self, x):
    ...         return x + self.conv(x)
    >>> from kolmo import bridge
    >>> model = nn.Sequential(Block(), Block())
    >>> with inject(model, bridge.StochasticDepth(0.8)) as noise:
    ...     print(noise.sites)
    ['0.conv', '1.conv']
    """
    if batchnorm not in BATCHNORM:
        raise InputError("batchnorm", repr(batchnorm), "'refuse', 'train' or 'freeze'")
    for name, module in model.named_modules():
        if isinstance(module, NoisyResNet) and not all(one.noiseless for one in module.noise):
            fix = "NoisyResNet(branches, law) has it already; bridge.Additive(0.0) has none"
            raise InputError("model", f"{name!r}, a NoisyResNet with noise", "a network without noise of its own", fix)
    if weighed(law):
        return _into_weights(model, law, where, batchnorm)
    return injected(model, law, where, inputs, horizon, batchnorm)  # type: ignore[arg-type]


def _into_weights(model: nn.Module, law: Any, where: Any, batchnorm: str) -> "Injection":
    """Inject noise into weights."""
    _refuse_second(model)
    if batchnorm == "freeze":
        _check_statistics(model)
    rows, noises = place_in_weights(model, law, where)
    # the samples of a pass share its weights: normalising by the batch is no other matter than without noise
    if batchnorms(model) and batchnorm == "freeze":
        model.register_forward_pre_hook(BatchNormRule(batchnorm))
    return Injection(model, rows, noises, 1.0, batchnorm)


def injected(
    model: nn.Module,
    law: NoiseLaw | Sequence[NoiseLaw],
    where: Where,
    inputs: Tensor | Sequence[Any] | None,
    horizon: float,
    batchnorm: str,
) -> "Injection":
    """Inject noise, also into a network with noise of its own in training mode: what reads it in evaluation mode."""
    for one in law if isinstance(law, (list, tuple)) else [law]:
        _check_law(one)
    if not horizon > 0:
        raise InputError("horizon", horizon, "a positive number")
    _refuse_second(model)
    inputs = [inputs] if isinstance(inputs, Tensor) else inputs
    rows, called = select(model, where, inputs)
    _check_own_noise(model, rows, called if where is None else None)
    if batchnorm == "freeze":
        _check_statistics(model)
    laws = _laws(law, rows)
    _check_wrapping(model, laws)
    h = horizon / rows.depth
    noises = [place(model, site, one, h) for site, one in zip(rows, laws, strict=True)]
    if any(one.per == "batch" for one in laws):
        skip(model, rows, noises, probe(model) if inputs is None else inputs)
    if batchnorms(model) and batchnorm != "train":
        model.register_forward_pre_hook(BatchNormRule(batchnorm))
    return Injection(model, rows, noises, h, batchnorm)


def _check_wrapping(model: nn.Module, laws: Sequence[NoiseLaw]) -> None:
    """Refuse strengths to learn in a model that was wrapped before: each process would learn its own."""
    learnt = any(isinstance(getattr(law, name), nn.Parameter) for law in laws for name in law.numbers)
    if not learnt or not torch.distributed.is_available():
        return
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    wrappers = (nn.parallel.DistributedDataParallel, FSDPModule, FullyShardedDataParallel)
    wrapped = [type(module).__name__ for module in model.modules() if isinstance(module, wrappers)]
    if wrapped:
        fix = "inject first, then wrap; sharded models take vectors only: nn.Parameter(torch.tensor([0.1]))"
        raise InputError("law", f"strengths to learn in a {wrapped[0]}", "a model that is not wrapped yet", fix)


def _refuse_second(model: nn.Module) -> None:
    """Refuse a model that has injected noise already."""
    if carriers(model):
        given = f"a model with noise in {carriers(model)[0][0] or 'it'!r}"
        raise InputError("model", given, "a model without injected noise", "remove() the first noise, or eject(model)")


class Injection(Shown):
    """Noise in the residual branches of a model; made by `inject`.

    Attributes
    ----------
    model : nn.Module
        The model.
    rows : Sites
        The sites.
    noises : list of Noise or NoisyWeight
        The noise of each.
    h : float
        Step: horizon / number of residual additions.
    batchnorm : str
        What was asked for.

    Examples
    --------
    >>> from kolmo import bridge
    >>> class Block(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.fc = nn.Linear(2, 2)
    ...     def forward(self, x):
    ...         return x + self.fc(x)
    >>> model, x = nn.Sequential(Block(), Block()), torch.ones(1, 2)
    >>> before = model(x)
    >>> with inject(model, bridge.Multiplicative(0.5)) as noise:
    ...     average = noise.mc(x, 100, rng=0)
    >>> bool((average.standard_error > 0).all()), torch.equal(model(x), before)
    (True, True)
    """

    def __init__(self, model: nn.Module, rows: Sites, noises: Sequence[Any], h: float, batchnorm: str) -> None:
        self.model, self.rows, self.noises, self.h = model, rows, noises, h
        self._batchnorm = batchnorm
        self._generator: torch.Generator | None = None
        self._seeding: list[Any] = []

    @property
    def sites(self) -> list[str]:
        """Names of the sites."""
        return self.rows.names

    @property
    def couples_samples(self) -> bool:
        """Whether training passes couple the samples of a batch: then no equation for one sample describes them."""
        return self._batchnorm == "train" and bool(batchnorms(self.model))

    @property
    def generator(self) -> torch.Generator | None:
        """Source of all randomness in training passes of this model (not of its copies); None: torch's global one.

        Every pass through the model draws a seed from it, with which torch's global generator then runs until the end
        of the pass, so that checkpointing of blocks repeats the same noise.
        """
        return self._generator

    @generator.setter
    def generator(self, generator: torch.Generator | None) -> None:
        for handle in self._seeding:
            handle.remove()
        self._generator, self._seeding = generator, []
        if generator is not None:
            rule = _Seeding(generator)
            self._seeding = [
                self.model.register_forward_pre_hook(rule.before, prepend=True),
                self.model.register_forward_hook(rule.after, always_call=True),
            ]

    @contextmanager
    def noisy(self, rng: Rng = None) -> Iterator[nn.Module]:
        """Noise on in evaluation mode too, so that dropout and statistics of the model itself stay off.

        Parameters
        ----------
        rng : None, int or generator
            Source of the noise. Torch's global generator runs with a seed from it inside, and is put back afterwards.
        """
        before = [noise.always for noise in self.noises]
        modes = [(module, module.training) for module in self.model.modules()]
        generator = as_generator(rng)
        seed = int(torch.randint(1 << 62, (), generator=generator, device=generator.device))
        with torch.random.fork_rng(devices=devices(self.model)):
            torch.manual_seed(seed)
            self.model.eval()
            try:
                for noise in self.noises:
                    noise.always = True
                yield self.model
            finally:
                for noise, always in zip(self.noises, before, strict=True):
                    noise.always = always
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

            def sample() -> Tensor:
                output = model(x)
                return output if loss is None else loss(output)

            return average(sample, n)

    def remove(self) -> None:
        """Take the noise out of the model again, and give back what was frozen; copies keep theirs (see `eject`)."""
        self.generator = None
        eject(self.model)

    def __enter__(self) -> "Injection":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def __str__(self) -> str:
        """Return the sites as a table, and what becomes of batch normalisation."""
        coupled = "\nbatch statistics: no equation for one sample; expectations are over batches"
        return str(self.rows) + (coupled if self.couples_samples else "")


class _Seeding:
    """Every training pass runs with a seed from a generator of its own."""

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator
        self._states: list[Any] = []

    def __getstate__(self) -> dict[str, Any]:
        """Copies draw from torch's global generator."""
        return {"_generator": None, "_states": []}

    def before(self, model: nn.Module, args: Any) -> None:
        """Seed torch's global generators."""
        if self._generator is None or not model.training:
            return
        if torch._C._current_graph_task_id() != -1:  # the pass is repeated in a backward pass
            raise InputError(
                "generator",
                "a model that is checkpointed as a whole",
                "checkpointed blocks inside the model: the repeated pass would draw another seed",
                "checkpoint the blocks, or use torch.manual_seed instead of a generator",
            )
        fork = torch.random.fork_rng(devices=devices(model))
        fork.__enter__()
        self._states.append(fork)
        torch.manual_seed(int(torch.randint(1 << 62, (), generator=self._generator, device=self._generator.device)))

    def after(self, model: nn.Module, args: Any, output: Any) -> None:
        """Put the generators back."""
        if self._states:
            self._states.pop().__exit__(None, None, None)


def _check_law(law: Any) -> None:
    if isinstance(law, (HiddenDropout, ShakeShake)) or not isinstance(law, NoiseLaw):
        raise InputError("law", type(law).__name__, "a law that acts on the output of a branch", "use NoisyResNet")
    for name, value in ((name, getattr(law, name)) for name in law.numbers):
        if isinstance(value, Tensor) and value.requires_grad and not isinstance(value, nn.Parameter):
            given = f"a tensor {name} that requires a gradient"
            raise InputError("law", given, "an nn.Parameter, which becomes one of the model", f"nn.Parameter({name})")


def _laws(law: NoiseLaw | Sequence[NoiseLaw], rows: Sites) -> list[NoiseLaw]:
    """Law of every site."""
    if not isinstance(law, NoiseLaw):
        if len(law) != len(rows):
            raise InputError("law", f"{len(law)} laws", f"one law, or one for each of the {len(rows)} sites")
        return list(law)
    scheduled = [getattr(law, name) for name in law.numbers if isinstance(getattr(law, name), tuple)]
    if all(len(values) == len(rows) for values in scheduled):
        return [law.layer(k, len(rows)) for k in range(len(rows))]
    laws = []
    for site in rows:
        of_calls = [law.layer(k, rows.depth) for k in site.order]
        numbers = [[getattr(one, name) for name in law.numbers] for one in of_calls]
        if any(other != numbers[0] for other in numbers):
            raise InputError(
                "law",
                f"different numbers for the {site.calls} calls of {site.name!r} in a pass",
                f"one value for each of the {len(rows)} sites",
            )
        laws.append(of_calls[0])
    return laws


def _check_own_noise(model: nn.Module, rows: Sites, called: frozenset[str] | None) -> None:
    """Refuse noise of the model itself that would be added to ours; at the end of a branch it is replaced."""
    ends = {site.module for site in rows if not isinstance(site.end, Operand)}
    for name, module in model.named_modules():
        used = _beside(name, rows) if called is None else name in called
        if name not in ends and used and drops_samples(module):
            raise InputError(
                "model",
                f"{name!r}, a {type(module).__name__} that drops samples and is not the end of a branch",
                "no noise of the model's own in the branches",
                f"set its rate to zero, or put nn.Identity() in place of {name!r}",
            )


def _beside(name: str, rows: Sites) -> bool:
    """Whether a module belongs to the block of a chosen site."""
    return any(name.startswith(site.module.rpartition(".")[0] + ".") for site in rows)


def _check_statistics(model: nn.Module) -> None:
    """Refuse to freeze statistics that no data have touched."""
    for name, module in batchnorms(model):
        if untouched(module):
            raise InputError(
                "batchnorm",
                f"'freeze' with fresh statistics (mean 0, variance 1) in {name!r}",
                "running statistics of data",
                "pass data through the model in training mode first, or use batchnorm='train'",
            )
