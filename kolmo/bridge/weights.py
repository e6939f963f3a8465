"""Noise in the weights of layers, of any network: W + s r ξ in every noisy pass."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kolmo.bridge.noise import NoisyWeight, Turns
from kolmo.bridge.selection import pattern
from kolmo.bridge.sites import Site, Sites
from kolmo.bridge.variables import variable
from kolmo.bridge.watching import Output
from kolmo.errors import InputError

GRANULARITY = ("layer", "filter", "weight")


class WeightNoise:
    r"""Gaussian noise in weights: :math:`W + s\,r\,\xi`, one independent ξ for each weight, drawn in every noisy pass.

    To second order it adds :math:`\tfrac12 s^2\sum r^2\,\partial^2 v/\partial W^2` to the loss v: a curvature in the
    weights, where noise in the branches adds one in the states. The sum is over all weights that have noise, or, with
    one layer in each pass, its mean over the L layers: :math:`\tfrac1L\sum_k \tfrac12 s^2 r_k^2\operatorname{tr} H_k`
    for one r in each layer. (A layer that is called several times in a pass, or shares its weights with another, has
    new noise in each call.)

    Parameters
    ----------
    s : float
        Strength, relative to r.
    per : {"layer", "filter", "weight"}
        r: root mean square of the weights of the layer, of the weights of an output channel or unit (a filter), or the
        modulus of the weight itself.
    relative : bool, default True
        False: r = 1, so that s is the standard deviation of the noise.
    layers : {"all", "one"}
        Whether all layers have noise in every pass, or one of them, each as often as any other: noise of all layers
        together has a variance that grows with the width of the network, that of one layer has not.

    Raises
    ------
    InputError
        For a negative strength, and words that are not known.

    References
    ----------
    Orvieto, Raj, Kersting & Bach (2022), Explicit regularization in overparametrized models via noise injection:
    perturbations of one layer at a time.

    Examples
    --------
    >>> from kolmo import bridge
    >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> with bridge.inject(model, bridge.WeightNoise(0.1, per="filter"), where="2") as noise:
    ...     average = noise.mc(torch.ones(1, 3), 10, rng=0)
    >>> noise.sites, bool((average.standard_error > 0).all())
    (['2'], True)
    """

    def __init__(self, s: float, per: str = "layer", relative: bool = True, layers: str = "all") -> None:
        if not (isinstance(s, (int, float)) and math.isfinite(s) and s >= 0):
            raise InputError("s", s, "a number, zero or positive")
        if per not in GRANULARITY:
            raise InputError("per", repr(per), "'layer', 'filter' or 'weight'")
        if layers not in ("all", "one"):
            raise InputError("layers", repr(layers), "'all' or 'one'")
        self.s, self.per, self.relative, self.layers = float(s), per, bool(relative), layers

    def scale(self, weight: Tensor) -> Tensor:
        """Standard deviation of the noise of every weight; no gradient goes through it."""
        w = weight.detach()
        if not self.relative:
            return self.s * torch.ones_like(w)
        if self.per == "weight":
            return self.s * w.abs()
        axes = tuple(range(w.ndim)) if self.per == "layer" else tuple(range(1, w.ndim))
        return (self.s * w.square().mean(axes, keepdim=True).sqrt()).expand(w.shape)

    def sample(self, weight: Tensor) -> Tensor:
        """Draw noise for a weight."""
        return self.scale(weight) * variable("gaussian").sample(weight.shape, weight.dtype, weight.device)

    def __repr__(self) -> str:
        return f"WeightNoise(s={self.s}, per={self.per!r}, relative={self.relative}, layers={self.layers!r})"


def weighed(law: Any) -> bool:
    """Whether a law, or each of several, is one of noise in weights."""
    laws = law if isinstance(law, (list, tuple)) else [law]
    return len(laws) > 0 and all(isinstance(one, WeightNoise) for one in laws)


def place_in_weights(model: nn.Module, law: Any, where: Any) -> tuple[Sites, list[NoisyWeight]]:
    """Put noise into the weights of the modules asked for; rows and noises in the order of the modules."""
    names = _named(model, where)
    laws: Sequence[WeightNoise] = list(law) if isinstance(law, (list, tuple)) else [law] * len(names)
    if len(laws) != len(names):
        raise InputError("law", f"{len(laws)} laws", f"one law, or one for each of the {len(names)} modules")
    rows, noises = Sites(), []
    for k, (name, one) in enumerate(zip(names, laws, strict=True)):
        module = model.get_submodule(name)
        noise = NoisyWeight(module, one)
        module.__dict__["forward"] = noise
        weight: Tensor = module._parameters["weight"]  # type: ignore[assignment]
        shape = tuple(weight.shape)
        rows.append(Site(name, 1, (k,), float("nan"), shape, None, "weights", (), name, name, Output()))
        noises.append(noise)
    taking_turns = [noise for noise in noises if noise.law.layers == "one"]
    if taking_turns:
        model.register_forward_pre_hook(Turns(taking_turns))
    return rows, noises


def _named(model: nn.Module, where: Any) -> list[str]:
    """Modules with weights of their own that are matrices or filters; those inside attention are read by it."""
    read = [f"{name}." if name else "" for name, m in model.named_modules() if isinstance(m, nn.MultiheadAttention)]
    known = {name: module for name, module in model.named_modules() if _has_weight(module)}
    known = {name: module for name, module in known.items() if not any(name.startswith(p) for p in read)}
    if where is None:
        chosen = list(known)
    elif callable(where):
        chosen = [name for name, module in known.items() if where(name, module)]
    else:
        patterns = [where] if isinstance(where, str) else list(where)
        if not all(isinstance(p, str) for p in patterns):
            raise InputError("where", "rows of bridge.sites for noise in weights", "names or patterns of modules")
        chosen = [name for name in known if any(pattern(p).fullmatch(name) for p in patterns)]
    if not chosen:
        shown = ", ".join(list(known)[:20]) or "none"
        raise InputError("where", repr(where), f"modules whose weights are matrices or filters; there are {shown}")
    return chosen


def _has_weight(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return weight is not None and weight.ndim > 1
