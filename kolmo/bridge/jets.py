"""Fields of a layer with their derivatives at points."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import jvp

from kolmo.bridge.laws import NoiseLaw
from kolmo.bridge.resnet import NoisyResNet

Field = Callable[[Any, Tensor], Tensor]


def layer_point(net: NoisyResNet, k: int, x: Tensor, branch: nn.Module | None = None) -> "Point":
    """Mean increment, noise matrix and their derivatives of layer k at x; in closed form where the branch has them."""
    law, branch = net.law(k), net.branches[k] if branch is None else branch
    jet: Any = getattr(branch, "jet", None)
    if jet is not None and law.linear and type(law).evaluate is NoiseLaw.evaluate:
        return _JetPoint(jet(x), net.h, law)

    def output(y: Tensor) -> Any:
        return law.evaluate(branch, y, net.h)

    n = torch.zeros((), dtype=x.dtype, device=x.device)
    return Point(lambda s, y: law.mean(output(y)), lambda s, y: law.factor(output(y), net.h), n, x, law)


class Point:
    """m and G at one (n, x), with directional derivatives by forward-mode differentiation."""

    def __init__(self, m: Field, G: Field, n: Tensor, x: Tensor, law: NoiseLaw) -> None:
        self._m, self._G, self._n, self._x, self.law = m, G, n, x, law

    def mean(self) -> Tensor:
        """Mean increment m."""
        return self._m(self._n, self._x)

    def factor(self) -> Tensor:
        """Noise matrix G."""
        return self._G(self._n, self._x)

    def along(self, v: Tensor, rate: float) -> Tensor:
        """Derivative of m along (rate, v) in (n, x)."""
        return _along(self._m, self._n, self._x, v, rate)

    def second(self, v: Tensor, rate: float) -> Tensor:
        """Second derivative of m along (rate, v), v held fixed."""
        return _along(lambda s, y: _along(self._m, s, y, v, rate), self._n, self._x, v, rate)

    def jacobian(self) -> Tensor:
        """J of m, ``(n, d, d)``."""
        return torch.stack([self.along(v, 0.0) for v in units(self._x)], -1)

    def hessian(self) -> Tensor:
        """m'' at points ``(n, d)``: ``(n, d, d, d)``, component first; mixed derivatives by polarisation."""
        ways = units(self._x)
        own = [self.second(v, 0.0) for v in ways]

        def entry(i: int, j: int) -> Tensor:
            if i == j:
                return own[i]
            return 0.5 * (self.second(ways[i] + ways[j], 0.0) - own[i] - own[j])

        return symmetric(entry, len(ways))

    def factor_along(self, v: Tensor, rate: float) -> Tensor:
        """Derivative of G along (rate, v)."""
        if self.law.constant and rate == 0.0:
            return torch.zeros_like(self.factor())
        return _along(self._G, self._n, self._x, v, rate)


class _JetPoint(Point):
    """The same from a branch's closed-form derivatives, for laws that are linear in the branch output."""

    def __init__(self, jet: Any, h: float, law: NoiseLaw) -> None:
        self._jet, self._h, self.law = jet, h, law

    def mean(self) -> Tensor:
        return self.law.mean(self._h * self._jet.value)

    def factor(self) -> Tensor:
        return self.law.factor(self._h * self._jet.value, self._h)

    def along(self, v: Tensor, rate: float) -> Tensor:
        return self.law.mean(self._h * self._jet.along(v))

    def second(self, v: Tensor, rate: float) -> Tensor:
        return self.law.mean(self._h * self._jet.second(v, v))

    def jacobian(self) -> Tensor:
        return self._mean_of(self._jet.jacobian())

    def hessian(self) -> Tensor:
        return self._mean_of(self._jet.hessian())

    def _mean_of(self, derivative: Tensor) -> Tensor:
        """Law's mean of a derivative ``(n, component, ...)`` of the branch."""
        return self.law.mean(self._h * derivative.movedim(1, -1)).movedim(-1, 1)

    def factor_along(self, v: Tensor, rate: float) -> Tensor:
        G = self.law.factor(self._h * self._jet.along(v), self._h)
        return torch.zeros_like(G) if self.law.constant else G


def units(x: Tensor) -> list[Tensor]:
    """Unit vectors, one for each coordinate, shaped like x."""
    eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    return [unit.expand_as(x) for unit in eye]


def symmetric(entry: Callable[[int, int], Tensor], d: int) -> Tensor:
    """Symmetric matrices from their upper triangle: two last axes of length d."""
    upper = {(i, j): entry(i, j) for i in range(d) for j in range(i, d)}
    rows = [torch.stack([upper[min(i, j), max(i, j)] for j in range(d)], -1) for i in range(d)]
    return torch.stack(rows, -2)


def _along(f: Field, n: Tensor, x: Tensor, v: Tensor, rate: float) -> Tensor:
    """Differentiate f along (rate, v) in (n, x)."""
    if rate == 0.0:
        return jvp(lambda y: f(n, y), (x,), (v,))[1]  # type: ignore[no-any-return]
    return jvp(f, (n, x), (torch.full_like(n, rate), v))[1]  # type: ignore[no-any-return]
