"""Losses over a loader: the mean over many samples, batch by batch, in the memory of one batch."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from kolmo.errors import InputError


class BatchLoss:
    r"""Mean of a loss over batches, for `surface`, `curvature` and `sharpness`.

    .. math:: L = \sum_b n_b\,\ell_b \Big/ \sum_b n_b, \qquad n_b \text{ samples in batch } b

    Curvature goes through the batches one at a time: a product with the Hessian takes the memory of one batch, and two
    passes over the data.

    Parameters
    ----------
    loss : callable
        ``loss(f, batch)`` -> a scalar or a dictionary of scalars, means over the samples of the batch.
    batches : iterable
        Batches, in the same order whenever they are gone through: a list, or a DataLoader without shuffling. Each
        counts as often as it has samples (the length of its first tensor).

    Raises
    ------
    InputError
        No batches, or an iterator that can be gone through once only.

    Examples
    --------
    >>> import torch
    >>> from kolmo import landscape
    >>> x = torch.arange(10.0, dtype=torch.float64)[:, None]
    >>> loss = BatchLoss(lambda f, batch: f(batch).square().mean(), x.split(4))
    >>> model = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    >>> with torch.no_grad():
    ...     _ = model.weight.fill_(1.0)
    >>> float(loss(model).detach()), round(landscape.curvature(loss, model, top=1).loss, 6)
    (28.5, 28.5)
    """

    def __init__(self, loss: Callable[[nn.Module, Any], Any], batches: Iterable[Any]) -> None:
        if isinstance(batches, Iterator):
            fix = "a list of the batches, or the DataLoader itself"
            raise InputError(
                "batches", "an iterator that is used up after one pass", "batches to go through often", fix
            )
        self._loss, self._batches = loss, batches
        self._sizes = [_size(batch) for batch in batches]
        if not self._sizes:
            raise InputError("batches", "none", "at least one batch")

    def parts(self, model: nn.Module) -> Iterator[dict[str, Any]]:
        """Losses of every batch, weighted so that their sum is the mean over all samples."""
        total = sum(self._sizes)
        for batch, size in zip(self._batches, self._sizes, strict=True):
            found = self._loss(model, batch)
            named = found if isinstance(found, dict) else {"loss": found}
            yield {name: value * (size / total) for name, value in named.items()}

    def __call__(self, model: nn.Module) -> Any:
        """Return the mean over all samples."""
        sums: dict[str, Any] = {}
        for part in self.parts(model):
            for name, value in part.items():
                sums[name] = sums.get(name, 0.0) + value
        return sums["loss"] if list(sums) == ["loss"] else sums


def _size(batch: Any) -> int:
    """Number of samples of a batch."""
    first = (
        next((part for part in batch if isinstance(part, Tensor)), None) if isinstance(batch, (tuple, list)) else batch
    )
    if isinstance(first, dict):
        first = next((part for part in first.values() if isinstance(part, Tensor)), None)
    if not isinstance(first, Tensor) or first.ndim == 0:
        raise InputError(
            "batches", type(batch).__name__, "tensors, or tuples or dictionaries of them, samples in front"
        )
    return len(first)
