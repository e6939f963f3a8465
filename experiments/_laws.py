"""Noise laws by name, as options give them: ``none``, ``gaussian-0.3``, ``stochastic-depth-0.8``, ``shake-shake``."""

import math
from collections.abc import Callable, Sequence

from kolmo import bridge
from kolmo.errors import InputError

_BY_STRENGTH: dict[str, Callable[[float], bridge.NoiseLaw]] = {
    "gaussian": bridge.Additive,
    "dropout": bridge.BranchDropout,
    "stochastic-depth": bridge.StochasticDepth,
    "bernoulli": bridge.CentredBernoulli,
}
_PLAIN: dict[str, Callable[[], bridge.NoiseLaw]] = {
    "none": lambda: bridge.Additive(0.0),
    "shake-shake": bridge.ShakeShake,
}


def of_flow(name: str) -> bridge.NoiseLaw:
    """Law of a flow whose layers are all alike; shake-shake needs pairs of branches and is none."""
    return _named(name, ["none"])


def of_stage(name: str) -> Callable[[int], bridge.NoiseLaw]:
    """Law of a stage, as a function of its depth: stochastic depth keeps less and less from layer to layer."""
    kind, _, strength = name.rpartition("-")
    _named(name, list(_PLAIN))
    if kind == "stochastic-depth":
        return lambda depth: bridge.StochasticDepth(bridge.linear_decay(float(strength), depth))
    return lambda depth: _named(name, list(_PLAIN))


def _named(name: str, plain: Sequence[str]) -> bridge.NoiseLaw:
    if name in plain:
        return _PLAIN[name]()
    kind, _, strength = name.rpartition("-")
    try:
        number = float(strength)
    except ValueError:
        number = math.nan
    if kind not in _BY_STRENGTH or math.isnan(number):
        known = ", ".join([*plain, *(f"{kind}-0.5" for kind in _BY_STRENGTH)])
        raise InputError("laws", repr(name), f"names such as {known}")
    return _BY_STRENGTH[kind](number)
