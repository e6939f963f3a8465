"""The state of a model, and of the random generators: kept, changed, and brought back bit for bit."""

import contextlib
import math
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kolmo.errors import InputError
from kolmo.landscape.batches import BatchLoss
from kolmo.landscape.draws import Draws

Loss = Callable[[nn.Module], Any]
"""The loss of a model: a scalar, or a dictionary of scalars by name."""

# Relative difference that a repeated draw may have: sums on a GPU come in any order.
_REPEATED = 1e-4
# Draws that the first is compared with, to find out whether a loss is random: rare events are missed by one.
_OTHERS = 3


class _Slot:
    """One parameter or buffer of one module: the tensor itself, and a copy of what it held."""

    def __init__(self, table: dict[str, Any], name: str) -> None:
        self._table, self._name, self._tensor = table, name, table[name]
        self._content = None if self._tensor is None else self._tensor.detach().clone()

    def restore(self) -> None:
        """Put the same tensor back, with what it held."""
        self._table[self._name] = self._tensor
        if self._tensor is not None:
            self._tensor.detach().copy_(self._content)


class Snapshot:
    """Parameters, buffers, gradients, which of them are wanted, and modes of a model.

    Parameters
    ----------
    model : nn.Module
        The model.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        self._modes = [(module, module.training) for module in modules]
        self._buffers = [_Slot(module._buffers, name) for module in modules for name in module._buffers]
        self._parameters = [_Slot(module._parameters, name) for module in modules for name in module._parameters]
        self._gradients = [
            (p, p.requires_grad, p.grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()
        ]
        self._names = [(table, set(table)) for m in modules for table in (m._parameters, m._buffers, m._modules)]
        self._transient = [(m, set(m._non_persistent_buffers_set)) for m in modules]

    def restore_buffers(self) -> None:
        """Put the buffers back."""
        for slot in self._buffers:
            slot.restore()

    def restore(self) -> None:
        """Put everything back."""
        for module, training in self._modes:
            module.training = training
        for table, names in self._names:
            for added in set(table) - names:
                del table[added]
        for module, transient in self._transient:
            module._non_persistent_buffers_set = transient
        for slot in [*self._buffers, *self._parameters]:
            slot.restore()
        for parameter, wanted, gradient, content in self._gradients:
            parameter.requires_grad_(wanted)
            parameter.grad = gradient
            if gradient is not None and content is not None:
                gradient.copy_(content)


class _Randomness:
    """States of the global generators of torch (all devices), NumPy and Python."""

    def __init__(self) -> None:
        self._torch = torch.get_rng_state()
        started = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        self._cuda = torch.cuda.get_rng_state_all() if started else []
        self._numpy = np.random.get_state()  # noqa: NPY002 -- a loss may draw from NumPy's global generator
        self._python = random.getstate()

    def restore(self) -> None:
        torch.set_rng_state(self._torch)
        if self._cuda:
            torch.cuda.set_rng_state_all(self._cuda)
        np.random.set_state(self._numpy)  # noqa: NPY002
        random.setstate(self._python)


@contextlib.contextmanager
def kept(model: nn.Module) -> Iterator[Snapshot]:
    """Keep the state of a model and of the global random generators over a block, however it ends.

    Examples
    --------
    >>> model = nn.Linear(2, 1)
    >>> before = model.weight.clone()
    >>> with contextlib.suppress(RuntimeError), kept(model):
    ...     model.weight.data = torch.zeros(1, 2)
    ...     raise RuntimeError
    >>> torch.equal(model.weight, before)
    True
    """
    with torch.no_grad():
        snapshot, randomness = Snapshot(model), _Randomness()

    def restore() -> None:
        with torch.no_grad():
            snapshot.restore()
        randomness.restore()

    try:
        yield snapshot
    finally:
        try:
            restore()
        except KeyboardInterrupt:  # Ctrl-C again, while restoring: that is finished first
            restore()
            raise


class Evaluation:
    """A loss of a model at weights that are moved, under fixed noise draws: common random numbers.

    Parameters
    ----------
    loss : callable
        ``loss(model)`` -> a scalar or a dictionary of scalars.
    model : nn.Module
        The model; the caller keeps its state with `kept`.
    snapshot : Snapshot
        Its state, as `kept` gives it.
    draws : Draws
        The noise, and the policy for batch normalisation.
    """

    def __init__(self, loss: Loss, model: nn.Module, snapshot: Snapshot, draws: Draws) -> None:
        self._loss, self.model, self._snapshot, self._draws = loss, model, snapshot, draws
        if draws.noisy is not None:
            model.train(draws.noisy)
        self._layers = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        for layer in self._layers:
            layer.train(draws.batchnorm == "batch")
        # torch.manual_seed prepares devices that were never used too, which takes longer than drawing
        other = any(p.device.type != "cpu" for p in model.parameters())
        other |= torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        self._manual_seed = torch.manual_seed if other else torch.default_generator.manual_seed

    @property
    def draws(self) -> int:
        """Number of draws."""
        return self._draws.count

    def settle(self) -> None:
        """Make the buffers what the policy says at the weights that the model now has."""
        with torch.no_grad():
            self._snapshot.restore_buffers()
            if self._draws.batchnorm == "recalibrate":
                self._recalibrate()

    def draw(self, j: int) -> dict[str, Tensor]:
        """Losses by name of draw j, at the weights that the model now has."""
        self._manual_seed(self._draws.seed + j)
        found = self._loss(self.model)
        if isinstance(found, dict) and not found:
            raise InputError("loss", "an empty dictionary", "a scalar, or a dictionary of scalars")
        return dict(found) if isinstance(found, dict) else {"loss": found}

    def parts(self, j: int) -> Iterator[dict[str, Any]]:
        """Losses by name of draw j, batch by batch where there are batches: their sum is the loss."""
        if not isinstance(self._loss, BatchLoss):
            yield self.draw(j)
            return
        self._manual_seed(self._draws.seed + j)
        yield from self._loss.parts(self.model)

    def probe(self, name: str | None = None, *, gradients: bool = False) -> tuple[dict[str, float], dict[str, bool]]:
        """Losses of the first draw at the weights that the model now has, and which of them other draws change.

        Parameters
        ----------
        name : str, optional
            The loss that must be the same when a draw is repeated; None: the first.
        gradients : bool
            Whether the loss may use gradients within.

        Raises
        ------
        InputError
            If the same draw gives another loss when it is repeated.
        """
        with torch.set_grad_enabled(gradients):
            first, again, *others = (self._once(j) for j in (0, 0, *range(1, 1 + _OTHERS)))
        if any(one.keys() != first.keys() for one in (again, *others)):
            raise InputError("loss", "other names from draw to draw", "the same names always")
        chosen = next(iter(first)) if name not in first else name
        if not _close(first[chosen], again[chosen], _REPEATED * abs(first[chosen])):
            raise InputError(
                "loss",
                f"{first[chosen]:.6g}, and then {again[chosen]:.6g}, for {chosen!r} with the same seed",
                "a loss that is fixed once torch.manual_seed has been called",
                "draw the noise from torch's global generator, not from NumPy or a generator of your own",
            )
        random = {}
        for key, value in first.items():
            rounding = 4.0 * abs(value - again[key]) if np.isfinite([value, again[key]]).all() else 0.0
            random[key] = not all(_close(value, other[key], rounding) for other in others)
        return first, random

    def _once(self, j: int) -> dict[str, float]:
        self.settle()
        sums: dict[str, float] = {}
        for part in self.parts(j):  # as numbers at once: no graph outlives its batch
            for name, value in part.items():
                sums[name] = sums.get(name, 0.0) + as_float(name, value)
        return sums

    @torch.no_grad()
    def values(self) -> dict[str, np.ndarray]:
        """Losses by name for all draws, each of shape (draws,)."""
        self.settle()
        found = [{name: as_float(name, value) for name, value in self.draw(j).items()} for j in range(self.draws)]
        if any(one.keys() != found[0].keys() for one in found):
            raise InputError("loss", "other names from draw to draw", "the same names always")
        return {name: np.array([one[name] for one in found]) for name in found[0]}

    def _recalibrate(self) -> None:
        """Running statistics as plain averages over the calibration data."""
        assert self._draws.calibrate is not None
        momenta = [layer.momentum for layer in self._layers]
        try:
            for layer in self._layers:
                layer.reset_running_stats()
                layer.momentum = None
                layer.train()
            self._manual_seed(self._draws.seed)
            self._draws.calibrate(self.model)
        finally:
            for layer, momentum in zip(self._layers, momenta, strict=True):
                layer.momentum = momentum
                layer.eval()


def normal(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Standard normal numbers in double precision: the same for every default device and precision of torch."""
    return torch.randn(tuple(shape), generator=generator, device=generator.device, dtype=torch.float64)


def _close(one: float, other: float, tolerance: float) -> bool:
    """Whether two numbers are the same within a tolerance, NaN being equal to itself."""
    return one == other or (math.isnan(one) and math.isnan(other)) or abs(one - other) <= tolerance


def as_float(name: str, value: Any) -> float:
    """A scalar loss as a float."""
    try:
        return float(value.detach() if isinstance(value, Tensor) else value)
    except (TypeError, ValueError, RuntimeError) as error:
        shape = f"shape {tuple(value.shape)}" if hasattr(value, "shape") else type(value).__name__
        fix = "take the mean over the samples"
        raise InputError("loss", f"{shape} for {name!r}", "a scalar, or a dictionary of scalars", fix) from error
