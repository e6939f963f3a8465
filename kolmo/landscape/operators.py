r"""Matrices whose curvature can be asked for, by their products: Hessian, Gauss–Newton, Fisher, and those of others.

With o the outputs of the model, J their Jacobian and ℓ the loss as a function of them,

.. math:: G = J^T\,\nabla_o^2\ell\,J \quad\text{(Gauss–Newton)}, \qquad
    F = \frac1n\sum_i (J_i^Tg_i)(J_i^Tg_i)^T,\quad g_i = \nabla_{o_i}\ell_i \quad\text{(empirical Fisher)}.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from kolmo.bridge.selection import pattern
from kolmo.errors import InputError
from kolmo.landscape.state import Evaluation, normal


class Products:
    """What products with any matrix over the weights offer beside them: random vectors in its kind of numbers."""

    size: int
    _like: Tensor

    def normal(self, generator: torch.Generator) -> Tensor:
        """Standard normal vector, the same on every device."""
        return normal((self.size,), generator).to(self._like)

    def signs(self, generator: torch.Generator) -> Tensor:
        """Vector of independent signs."""
        drawn = torch.randint(0, 2, (self.size,), generator=generator, device=generator.device)
        return (drawn * 2 - 1).to(self._like)


class Hessian(Products):
    """Products with the Hessian of a loss that is averaged over fixed draws.

    Parameters
    ----------
    evaluation : Evaluation
        The loss and its draws.
    model : nn.Module
        Its parameters that require gradients are the variables.
    name : str or None
        Which of the losses; None: the first.
    random : bool
        Whether different draws give different losses.
    bar : tqdm
        Counts the products.
    where : str
        Pattern of the names of the parameters that are the variables.
    """

    def __init__(
        self, evaluation: Evaluation, model: nn.Module, name: str | None, random: bool, bar: Any, where: str = "**"
    ) -> None:
        self._evaluation, self._name, self._bar = evaluation, name, bar
        self.random, self.draws = random, evaluation.draws
        wanted = pattern(where)
        named = {key: p for key, p in model.named_parameters() if p.requires_grad and wanted.fullmatch(key)}
        if not named:
            given = f"no parameter that requires a gradient with a name like {where!r}"
            raise InputError("where", given, "a pattern of parameter names, in which * does not cross dots and ** does")
        self._names, self._parameters = list(named), list(named.values())
        self._like: Tensor = self._parameters[0]
        self.size = sum(p.numel() for p in self._parameters)
        self.products = 0
        self._kept: list[Tensor] | None = None
        self._start()

    def _start(self) -> None:
        """Loss and gradient; a single draw of a single batch keeps its graph, which every product uses."""
        gradient: Any = 0.0
        losses = []
        for j in range(self._evaluation.draws):
            losses.append(0.0)
            for count, (value, slopes) in enumerate(self._slopes(j)):
                losses[-1] += float(value.detach())
                gradient = gradient + flat([slope.detach() for slope in slopes]) / self._evaluation.draws
                self._kept = slopes if self._evaluation.draws == 1 and count == 0 else None
        self.loss = float(np.mean(losses))
        self.gradient_norm = float(gradient.norm())
        self.random |= len(set(losses)) > 1
        if not math.isfinite(self.loss) or not math.isfinite(self.gradient_norm):
            given = f"{self.loss:g} with a gradient of norm {self.gradient_norm:g} at the weights of the model"
            raise InputError("loss", given, "a finite loss and gradient")

    def _value(self, found: dict[str, Any]) -> Tensor:
        """Loss that is meant, of those of a draw."""
        name = next(iter(found)) if self._name is None else self._name
        if name not in found:
            raise InputError("name", repr(name), "one of " + ", ".join(map(repr, found)))
        value = found[name]
        if not isinstance(value, Tensor) or value.numel() != 1:
            given = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise InputError("loss", f"{given} for {name!r}", "a scalar tensor")
        return value.reshape(())

    def _slopes(self, j: int) -> Iterator[tuple[Tensor, list[Tensor]]]:
        """Loss and gradient of draw j, with a graph, batch by batch."""
        with sdpa_kernel(SDPBackend.MATH):  # of the kernels of attention this one has second derivatives
            for found in self._evaluation.parts(j):
                value = self._value(found)
                if not value.requires_grad:
                    fix = "return the loss as a tensor, not through .item() or no_grad()"
                    raise InputError(
                        "loss", "a value that does not depend on the weights", "a differentiable loss", fix
                    )
                slopes = torch.autograd.grad(value, self._parameters, create_graph=True, allow_unused=True)
                pairs = zip(slopes, self._parameters, strict=True)
                yield value, [torch.zeros_like(p) if s is None else s for s, p in pairs]

    def __call__(self, v: Tensor) -> tuple[Tensor, np.ndarray]:
        """Hv of the averaged loss, and vᵀH_j v for each draw."""
        total, forms = torch.zeros_like(v), []
        for j in range(self.draws):
            forms.append(0.0)
            for product in self._parts(j, v):
                forms[-1] += float(product.double() @ v.double())
                total += product / self.draws
        self.products += 1
        self._bar.update()
        return total, np.array(forms)

    def _parts(self, j: int, v: Tensor) -> Iterator[Tensor]:
        """Products with v of the matrix of draw j, batch by batch: their sum is the product."""
        for slopes in (s for _, s in self._slopes(j)) if self._kept is None else [self._kept]:
            yield self._product(slopes, v)

    def _product(self, slopes: list[Tensor], v: Tensor) -> Tensor:
        active = [s.requires_grad for s in slopes]
        parts = self._split(v)
        if not any(active):  # a loss that is linear in the weights
            return torch.zeros_like(v)
        found = torch.autograd.grad(
            [s for s, on in zip(slopes, active, strict=True) if on],
            self._parameters,
            [part for part, on in zip(parts, active, strict=True) if on],
            retain_graph=self._kept is not None,
            materialize_grads=True,
        )
        return flat(found)

    def _split(self, v: Tensor) -> list[Tensor]:
        parts = torch.split(v, [p.numel() for p in self._parameters])
        return [part.reshape(p.shape) for part, p in zip(parts, self._parameters, strict=True)]

    def named(self, v: Tensor) -> dict[str, Tensor]:
        """Flat vector -> tensors by parameter name, on the CPU."""
        return {name: part.cpu().clone() for name, part in zip(self._names, self._split(v), strict=True)}


def flat(parts: Sequence[Tensor]) -> Tensor:
    """One vector of many tensors."""
    return torch.cat([part.reshape(-1) for part in parts])


class Outer(Hessian):
    """Products with the Gauss–Newton matrix or the empirical Fisher matrix of a loss.

    The outputs are those of the model's passes within the loss: what the loss does with the weights beside them, such
    as weight decay, has no part in these matrices. For Fisher the loss is a mean over samples, each of which is a row
    (first axis) of the outputs.
    """

    kind = "ggn"
    model: nn.Module

    def _start(self) -> None:
        """Loss and gradient, and how many samples there are."""
        super()._start()
        self._kept = None
        self._samples = [sum(len(o) for _, outputs in self._passes(j) for o in outputs) for j in range(self.draws)]

    def _passes(self, j: int) -> Iterator[tuple[Tensor, list[Tensor]]]:
        """Loss of draw j and the outputs that it is made of, batch by batch."""
        seen: list[Tensor] = []

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            found = output[0] if isinstance(output, tuple) else output
            if isinstance(found, Tensor) and found.requires_grad:
                seen.append(found)

        handle = self._evaluation.model.register_forward_hook(keep)
        try:
            with sdpa_kernel(SDPBackend.MATH):
                for found in self._evaluation.parts(j):
                    if not seen:
                        fix = "a loss that calls the model as f(x), and f returns a tensor"
                        raise InputError("loss", f"no output of the model for {self.kind!r}", fix)
                    yield self._value(found), list(seen)
                    seen.clear()
        finally:
            handle.remove()

    def _parts(self, j: int, v: Tensor) -> Iterator[Tensor]:
        for value, outputs in self._passes(j):
            yield self._of(value, outputs, v, self._samples[j])

    def _of(self, value: Tensor, outputs: list[Tensor], v: Tensor, samples: int) -> Tensor:
        slopes = torch.autograd.grad(value, outputs, create_graph=self.kind == "ggn", retain_graph=True)
        pushed = self._pushed(outputs, v)
        if self.kind == "fisher":
            pairs = list(zip(slopes, pushed, strict=True))
            along = [(g * d).flatten(1).sum(1) if g.ndim > 1 else g * d for g, d in pairs]
            weights = [samples * g * a.reshape(-1, *[1] * (g.ndim - 1)) for (g, _), a in zip(pairs, along, strict=True)]
        elif not any(g.requires_grad for g in slopes):  # a loss that is linear in the outputs
            return torch.zeros_like(v)
        else:
            weights = list(torch.autograd.grad(slopes, outputs, pushed, retain_graph=True, materialize_grads=True))
        return flat(torch.autograd.grad(outputs, self._parameters, weights, materialize_grads=True))

    def _pushed(self, outputs: list[Tensor], v: Tensor) -> list[Tensor]:
        """J v, as the derivative of Jᵀw in w."""
        w = [torch.zeros_like(o, requires_grad=True) for o in outputs]
        back = torch.autograd.grad(outputs, self._parameters, w, create_graph=True, allow_unused=True)
        pairs = [(g, part) for g, part in zip(back, self._split(v), strict=True) if g is not None and g.requires_grad]
        if not pairs:
            return [torch.zeros_like(o) for o in outputs]
        slopes, parts = zip(*pairs, strict=True)
        return list(torch.autograd.grad(slopes, w, parts, retain_graph=True, materialize_grads=True))


class Fisher(Outer):
    """Products with the empirical Fisher matrix."""

    kind = "fisher"


def matrix_of(kind: str) -> type[Hessian]:
    """Class of the products with a kind of matrix."""
    kinds: dict[str, type[Hessian]] = {"hessian": Hessian, "ggn": Outer, "fisher": Fisher}
    if kind not in kinds:
        raise InputError("kind", repr(kind), "one of " + ", ".join(map(repr, kinds)))
    return kinds[kind]


class Given(Products):
    """Products with a symmetric operator of another library: anything with ``shape`` and ``@``.

    Parameters
    ----------
    operator : object
        Square; ``operator @ v`` takes a vector of its library, torch (as curvlinops' do) or NumPy (as SciPy's).
    bar : tqdm
        Counts the products.
    """

    def __init__(self, operator: Any, bar: Any) -> None:
        shape = tuple(int(n) for n in operator.shape)
        if len(shape) != 2 or shape[0] != shape[1] or shape[0] == 0:
            raise InputError("loss", f"an operator of shape {shape}", "a square matrix")
        self._operator, self._bar, self.size, self.products = operator, bar, shape[0], 0
        given = getattr(operator, "dtype", torch.float64)
        self._torch = isinstance(given, torch.dtype)
        device = getattr(operator, "device", "cpu") if self._torch else "cpu"
        self._like = torch.zeros((), dtype=given if self._torch else torch.float64, device=device)
        self.random, self.draws, self.loss, self.gradient_norm = False, 1, float("nan"), float("nan")

    def __call__(self, v: Tensor) -> tuple[Tensor, np.ndarray]:
        """Product with v, and its form with v."""
        product = self._operator @ v if self._torch else torch.from_numpy(np.array(self._operator @ v.numpy()))
        product = product.reshape(v.shape).to(v)
        self.products += 1
        self._bar.update()
        return product, np.array([float(product.double() @ v.double())])

    def named(self, v: Tensor) -> dict[str, Tensor]:
        """The vector, called "x"."""
        return {"x": v.cpu().clone()}
