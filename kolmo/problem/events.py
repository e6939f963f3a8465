r"""Events: at given times the state is moved, or something is paid.

With :math:`X_t = m(X_{t-})` and a payment h at t, :math:`u(t-, x) = u(t, m(x)) + h(x)`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from kolmo.arrays import Array, namespace
from kolmo.errors import InputError
from kolmo.problem.sde import evaluate

__all__ = ["Event", "Payment", "happening"]


@dataclass(frozen=True, eq=False)
class Payment:
    """An amount that is paid at an event: :math:`u(t-, x) = u(t, x) + h(x)`.

    Parameters
    ----------
    amount : float or callable
        h: a number, a tensor, or ``amount(x)`` -> ``(...)`` (``(..., k)`` for k columns).

    Examples
    --------
    >>> import kolmo
    >>> bm = kolmo.SDE(0.0, 1.0, dim=1)
    >>> coupons = {0.5: kolmo.Payment(0.05), 0.8: kolmo.Payment(lambda x: x[..., 0] ** 2)}
    >>> bond = kolmo.KolmogorovProblem(bm, lambda x: 1.0 + 0.0 * x[..., 0], 1.0, events=coupons)
    >>> round(float(kolmo.solve(bond, at=[0.0], rtol=1e-6)(0.0)), 5)  # 1 + 0.05 + E W(0.8)²
    1.85
    """

    amount: float | Callable[[Array], Array] | Any


@dataclass(frozen=True, eq=False)
class Event:
    """What happens at a time.

    Attributes
    ----------
    time : float
        When.
    parts : tuple
        Maps and payments, in the order in which they come.
    """

    time: float
    parts: tuple[Any, ...]

    @property
    def pays(self) -> bool:
        """Whether anything is paid."""
        return any(isinstance(part, Payment) for part in self.parts)

    def run(self, x: Array, arrays: str | None = None, device: Any = None) -> tuple[Array, Array | None]:
        """Where points (..., d) are moved to, and what is paid: (...) or (..., k), None where nothing is.

        Raises
        ------
        InputError
            For maps and payments whose values do not have the shape of the points.
        """
        paid: Array | None = None
        lead, d = tuple(x.shape[:-1]), x.shape[-1]
        for part in self.parts:
            given = part.amount if isinstance(part, Payment) else part
            f = (lambda t, y, f=given: f(y)) if callable(given) else given
            value = evaluate(f, self.time, x, "events", arrays, device)
            shape = tuple(value.shape)
            if isinstance(part, Payment):
                fits = shape in ((), lead) or (len(shape) == len(lead) + 1 and shape[:-1] == lead)
                value = value + 0.0 * x[..., 0] if shape == () else value
                value = value[..., 0] if d == 1 and shape == (*lead, 1) else value
                needed, paid = f"{lead} or (..., k)", value if paid is None or not fits else _added(paid, value, lead)
            else:
                value = value[..., None] if d == 1 and shape == lead else value
                fits, needed = tuple(value.shape) == tuple(x.shape), f"{tuple(x.shape)}, the points moved"
                x = value
            if not fits:
                raise InputError(
                    "events",
                    f"a result of shape {shape} at t = {self.time:g}",
                    f"shape {needed}, for points of shape {(*lead, d)}",
                    "it must be vectorised over the leading axes of x and keep them",
                )
            if not bool(namespace(value).isfinite(value).all()):
                raise InputError("events", f"infinite values at t = {self.time:g}", "finite ones everywhere in the box")
        return x, paid


def _added(a: Array, b: Array, lead: tuple[int, ...]) -> Array:
    """The sum of two payments, one of which may have columns."""
    if a.ndim == b.ndim:
        return a + b
    return (a if a.ndim > len(lead) else a[..., None]) + (b if b.ndim > len(lead) else b[..., None])


def happening(events: Mapping[float, Any] | None, horizon: float | None) -> tuple[Event, ...]:
    """Events as they were given, in order.

    Raises
    ------
    InputError
        For times outside (0, T), a stationary problem, and what is neither a map nor a payment.

    Examples
    --------
    >>> [event.time for event in happening({0.7: lambda x: 0.9 * x, 0.2: Payment(1.0)}, 1.0)]
    [0.2, 0.7]
    """
    found = []
    for t, given in (events or {}).items():
        try:
            inside = horizon is not None and 0.0 < float(t) < horizon
        except (TypeError, ValueError):
            inside = False
        if not inside:
            needed = "a horizon" if horizon is None else f"times inside (0, {horizon})"
            raise InputError("events", f"an event at {t!r}", needed, "what happens at T is part of the terminal data")
        parts = tuple(given) if isinstance(given, list | tuple) else (given,)
        wrong = [part for part in parts if not callable(part) and not isinstance(part, Payment)]
        if wrong or not parts:
            raise InputError(
                "events", repr(wrong[0] if wrong else given), "a map x -> x, a kolmo.Payment, or a list of them"
            )
        found.append(Event(float(t), parts))
    return tuple(sorted(found, key=lambda event: event.time))
