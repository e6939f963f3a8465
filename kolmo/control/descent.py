"""Descent on an objective: SciPy's methods and Adam, with what stops them."""

import math
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import optimize

from kolmo.control.plans import Plans
from kolmo.errors import InputError, KolmoError, KolmoWarning, ToleranceWarning
from kolmo.shown import Shown

Objective = Callable[[], torch.Tensor]
Callback = Callable[[int, float], Any]
# First learning rate of Adam; it falls to zero along a cosine.
LEARNING_RATE = 0.05
# An objective this many times larger than at the start has diverged (also downwards: it is then unbounded).
DIVERGED = 1e10
# A line search that cannot go on has arrived, where the gradient is below this (relative to 1 + |objective|).
FLAT = 1e-6
# What SciPy says of L-BFGS-B (before 1.15 with underscores), in words.
_SAID = {
    "CONVERGENCE: REL REDUCTION OF F <= FACTR*EPSMCH": "the objective falls no more",
    "CONVERGENCE: RELATIVE REDUCTION OF F <= FACTR*EPSMCH": "the objective falls no more",
    "CONVERGENCE: NORM OF PROJECTED GRADIENT <= PGTOL": "the gradient vanishes",
}
# How often the plan may be renewed at the parameters found.
ROUNDS = 3
METHODS = ("L-BFGS-B", "trust-ncg", "adam", "adamw")


class Stopped(Exception):  # noqa: N818 - no error, a way out of SciPy's loops
    """Ends a minimisation from inside the objective."""

    def __init__(self, status: str, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message


@dataclass(frozen=True, eq=False)
class Fitted:
    """What was minimised, for whoever looks at the minimum afterwards."""

    objective: Objective
    names: list[str]
    tensors: list[torch.Tensor]
    low: np.ndarray
    high: np.ndarray

    def pieces(self, v: np.ndarray) -> list[np.ndarray]:
        """A flat vector cut into one piece per parameter tensor."""
        return np.split(v, np.cumsum([p.numel() for p in self.tensors])[:-1])

    def put(self, x: np.ndarray) -> None:
        """Write a flat vector into the parameters, in place; graphs through them are no good afterwards."""
        with torch.no_grad():
            for p, part in zip(self.tensors, self.pieces(x), strict=True):
                p.copy_(torch.as_tensor(part).reshape(p.shape).to(p.dtype))

    def components(self, chosen: np.ndarray | None = None) -> list[str]:
        """A name for every component of the flat vector, or for the chosen ones."""
        names = []
        for name, p in zip(self.names, self.tensors, strict=True):
            places = [""] if p.ndim == 0 else [str(list(index)) for index in np.ndindex(*p.shape)]
            names += [name + place for place in places]
        return names if chosen is None else [name for name, keep in zip(names, chosen, strict=True) if keep]

    def __repr__(self) -> str:
        return f"Fitted({', '.join(self.names)})"


class Minimum(Shown, optimize.OptimizeResult):  # type: ignore[misc]
    """SciPy's result, that shows in a line what was found; ``history``, ``jac`` and the rest are in it."""

    _told = ("status", "message", "fun", "x", "nit", "nfev")


class Loop:
    """One minimisation: the objective as a function of a flat vector, the best point and the history."""

    def __init__(self, fitted: Fitted, plans: Plans, maxiter: int = 1, callback: Callback | None = None) -> None:
        self.fitted, self.tensors = fitted, fitted.tensors
        self.low, self.high, self.plans = fitted.low, fitted.high, plans
        self.maxiter, self.callback = maxiter, callback
        self.best: tuple[float, np.ndarray, np.ndarray] = (math.inf, self.get(), np.zeros(0))
        self.latest: tuple[np.ndarray, float, np.ndarray] | None = None
        self.curved: tuple[np.ndarray, list[torch.Tensor]] | None = None
        self.first: float | None = None
        self.evaluations = 0
        self.history: dict[str, list[float]] = {"objective": [], "gradient": [], "seconds": []}
        self.started = time.perf_counter()
        self.bar: Any = None

    def get(self) -> np.ndarray:
        """All parameters as one float64 vector."""
        return flattened(self.tensors)

    def put(self, x: np.ndarray) -> None:
        """Write a vector into the parameters."""
        self.curved = None
        self.fitted.put(x)

    def restore(self) -> None:
        """Leave the best parameters found in place."""
        self.put(self.best[1])

    def evaluate(self, x: np.ndarray) -> tuple[float, np.ndarray]:
        """Objective and gradient; the last point is remembered."""
        if self.latest is not None and np.array_equal(x, self.latest[0]):
            return self.latest[1:]
        self.put(x)
        self.plans.begin()
        if self.first is None:
            value, gradient = self._measure()
            if not (math.isfinite(value) and np.isfinite(gradient).all()):
                raise InputError("objective", value, "a finite value with a finite gradient at the first parameters")
            self.first = value
        else:
            try:
                value, gradient = self._measure()
            except KolmoError as error:
                raise Stopped("diverged", f"the objective failed: {error}") from error
        self.evaluations += 1
        if not (math.isfinite(value) and np.isfinite(gradient).all()):
            raise Stopped("diverged", f"the objective or its gradient is not finite (objective {value})")
        if abs(value) > DIVERGED * (1.0 + abs(self.first)):
            raise Stopped("diverged", f"the objective diverges: {value:.3g}, at the start {self.first:.3g}")
        if value < self.best[0]:
            self.best = (value, x.copy(), gradient)
        self.latest = (x.copy(), value, gradient)
        return value, gradient

    def _measure(self) -> tuple[float, np.ndarray]:
        J, parts = self._differentiated(graph=False)
        return float(J.detach()), flattened(parts)

    def _differentiated(self, *, graph: bool) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Objective and its derivatives, on request differentiable themselves."""
        J = self.fitted.objective()
        if not isinstance(J, torch.Tensor) or J.numel() != 1:
            given = f"shape {tuple(J.shape)}" if isinstance(J, torch.Tensor) else f"a {type(J).__name__}"
            raise InputError("objective", given, "a torch scalar", "sum or average what objective() returns")
        if not J.requires_grad:
            raise InputError(
                "objective", "a value that depends on no parameter", "a value computed from the parameters in torch"
            )
        parts = torch.autograd.grad(J.reshape(()), self.tensors, allow_unused=True, create_graph=graph)
        unused = [name for name, g in zip(self.fitted.names, parts, strict=True) if g is None]
        if unused:
            raise InputError(
                "parameters",
                f"{', '.join(unused)}, on which the objective does not depend",
                "parameters that enter the objective",
                "leave them out, or check for .detach(), .item() or a copy between them and the objective",
            )
        return J, [g for g in parts if g is not None]

    def hessian_product(self, x: np.ndarray, v: np.ndarray) -> np.ndarray:
        """Hessian times v: the gradient, kept as a graph for all products at a point, differentiated along v."""
        if self.curved is None or not np.array_equal(x, self.curved[0]):
            self.put(x)
            self.curved = (x.copy(), self._differentiated(graph=True)[1])
        assert self.curved is not None
        parts = [g.reshape(-1) for g in self.curved[1]]
        slope = sum((g * torch.as_tensor(w).to(g)).sum() for g, w in zip(parts, self.fitted.pieces(v), strict=True))
        if not (isinstance(slope, torch.Tensor) and slope.requires_grad):
            return np.zeros_like(v)
        found = torch.autograd.grad(slope, self.tensors, retain_graph=True, allow_unused=True)
        return flattened([torch.zeros_like(p) if h is None else h for h, p in zip(found, self.tensors, strict=True)])

    def iteration(self, x: np.ndarray) -> None:
        """Record an iteration and ask the callback."""
        value, gradient = self.evaluate(np.asarray(x))
        self.history["objective"].append(value)
        self.history["gradient"].append(float(np.abs(gradient).max(initial=0.0)))
        self.history["seconds"].append(time.perf_counter() - self.started)
        if self.bar is not None:
            self.bar.update()
            self.bar.set_postfix(objective=f"{value:.6g}")
        if self.callback is not None and self.callback(len(self.history["objective"]), value):
            raise Stopped("stopped", "stopped by the callback")
        if len(self.history["objective"]) >= self.maxiter:
            raise Stopped("maxiter", f"stopped after maxiter = {self.maxiter} iterations")

    def run(self, method: str, progress: bool) -> optimize.OptimizeResult:
        """Minimise, check the plans at the end, and renew them if need be."""
        x = np.clip(self.get(), self.low, self.high)
        status, message = "failed", ""
        self.bar = bar(self.maxiter, "minimize") if progress else None
        try:
            for last in [False] * (ROUNDS - 1) + [True]:
                status, message = self._go(method, x)
                if status in ("diverged", "interrupted", "stopped"):
                    break
                self.restore()
                if self.plans.hold():
                    break
                if last:
                    warnings.warn(self.plans.message, ToleranceWarning, stacklevel=4)
                    break
                self.plans.renew()
                x, self.best, self.latest = self.best[1], (math.inf, self.best[1], self.best[2]), None
                if status == "maxiter":
                    self.evaluate(x)
                    break
        finally:
            if self.bar is not None:
                self.bar.close()
        if self.plans.rebuilt:
            warnings.warn(
                "the objective builds its problem anew at every evaluation, so that each time it is planned anew and "
                "the objective jumps: build the problem once, outside the objective",
                KolmoWarning,
                stacklevel=4,
            )
        return self._result(status, message)

    def _go(self, method: str, x: np.ndarray) -> tuple[str, str]:
        try:
            self.evaluate(x)
            return self._torch(method, x) if method.startswith("adam") else self._scipy(method, x)
        except Stopped as stop:
            return stop.status, stop.message
        except KeyboardInterrupt:
            return "interrupted", "interrupted; the best parameters so far are in place"

    def _scipy(self, method: str, x: np.ndarray) -> tuple[str, str]:
        scale = 1.0 + abs(self.best[0])
        left = self.maxiter - len(self.history["objective"])
        if method == "L-BFGS-B":
            options: dict[str, Any] = {"ftol": 1e-14, "gtol": 1e-9 * scale, "maxcor": 20, "maxiter": left + 1}
            extra: dict[str, Any] = {"bounds": list(zip(self.low, self.high, strict=True))}
        else:
            options = {"gtol": 1e-8 * scale, "maxiter": left + 1}
            extra = {"hessp": self.hessian_product}
        found = optimize.minimize(
            self.evaluate, x, jac=True, method=method, callback=self.iteration, options=options, **extra
        )
        message = _SAID.get(str(found.message).replace("_", " "), str(found.message))
        return ("converged" if found.success or self._arrived() else "failed"), message

    def _arrived(self) -> bool:
        """Whether the projected gradient at the best point is at rounding level."""
        value, x, gradient = self.best
        blocked = ((x <= self.low) & (gradient > 0)) | ((x >= self.high) & (gradient < 0))
        return bool(np.abs(np.where(blocked, 0.0, gradient)).max(initial=0.0) <= FLAT * (1.0 + abs(value)))

    def _torch(self, method: str, x: np.ndarray) -> tuple[str, str]:
        """Adam or AdamW on the flat vector, projected onto the bounds."""
        y = torch.tensor(x, dtype=torch.float64, requires_grad=True)
        make = torch.optim.Adam if method == "adam" else torch.optim.AdamW
        optimizer = make([y], lr=LEARNING_RATE)
        left = self.maxiter - len(self.history["objective"])
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, left)
        low, high = torch.as_tensor(self.low), torch.as_tensor(self.high)
        while True:
            value, gradient = self.evaluate(y.detach().numpy().copy())
            if np.abs(gradient).max(initial=0.0) <= 1e-9 * (1.0 + abs(value)):
                return "converged", "the gradient vanishes"
            y.grad = torch.as_tensor(gradient)
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                y.clamp_(low, high)
            self.iteration(y.detach().numpy().copy())

    def _result(self, status: str, message: str) -> "Minimum":
        value, x, gradient = self.best
        return Minimum(
            x=x.copy(),
            fun=value,
            jac=gradient,
            nit=len(self.history["objective"]),
            nfev=self.evaluations,
            success=status in ("converged", "stopped"),
            status=status,
            message=message,
            history={name: np.array(values) for name, values in self.history.items()},
        )


def bar(total: int, what: str) -> Any:
    """Progress bar of iterations on stderr."""
    from tqdm.auto import tqdm

    return tqdm(total=total, desc=what, unit="it", file=sys.stderr, leave=False)


def flattened(parts: Sequence[torch.Tensor]) -> np.ndarray:
    """Tensors as one float64 vector."""
    return np.concatenate([part.detach().cpu().double().numpy().reshape(-1) for part in parts])


def checked_bounds(bounds: Any, tensors: list[torch.Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper ends as flat vectors."""
    pairs = bounds
    if bounds is None or _is_pair(bounds):
        pairs = [bounds] * len(tensors)
    if len(pairs) != len(tensors):
        raise InputError("bounds", f"{len(pairs)} entries", f"a (low, high) pair, or one per tensor ({len(tensors)})")
    lows: list[np.ndarray] = []
    highs: list[np.ndarray] = []
    for i, (pair, p) in enumerate(zip(pairs, tensors, strict=True)):
        if pair is not None and not _is_pair(pair):
            raise InputError(f"bounds[{i}]", repr(pair), "a (low, high) pair or None")
        ends = (None, None) if pair is None else pair
        for end, infinite, out in zip(ends, (-np.inf, np.inf), (lows, highs), strict=True):
            value = np.asarray(infinite if end is None else torch.as_tensor(end).detach().numpy(), dtype=float)
            with suppress(ValueError):
                value = np.broadcast_to(value, tuple(p.shape))
            if value.shape != tuple(p.shape):
                raise InputError(
                    f"bounds[{i}]", f"an end of shape {value.shape}", f"a number or shape {tuple(p.shape)}"
                )
            out.append(value.reshape(-1))
    low, high = np.concatenate(lows), np.concatenate(highs)
    crossed = np.flatnonzero(~(low <= high))
    if len(crossed):
        first = crossed[0]
        raise InputError("bounds", f"low {low[first]} and high {high[first]}", "low <= high everywhere", "swap them")
    return low, high


def _is_pair(pair: Any) -> bool:
    """Whether this is one (low, high) pair: two ends that are numbers, arrays or None."""
    return (
        isinstance(pair, (tuple, list))
        and len(pair) == 2
        and all(end is None or isinstance(end, (int, float, np.ndarray, np.number, torch.Tensor)) for end in pair)
        and not all(end is None for end in pair)
    )
