"""Common models by name: the tables of a file that they stand for."""

from typing import Any

__all__ = ["MODELS"]

_HALF_LINE = {"lower": [0.0], "upper": [float("inf")], "boundary": [["natural", "open"]]}
MODELS: dict[str, dict[str, dict[str, Any]]] = {
    # Uhlenbeck and Ornstein 1930; Vasicek 1977
    "ou": {"equation": {"drift": "kappa * (mean - x[0])", "diffusion": "sigma"}},
    # Feller 1951; Cox, Ingersoll and Ross 1985
    "cir": {
        "equation": {"drift": "kappa * (mean - x[0])", "diffusion": "sigma * sqrt(maximum(x[0], 0))"},
        "box": _HALF_LINE,
    },
    # Samuelson 1965
    "gbm": {"equation": {"drift": "mu * x[0]", "diffusion": "sigma * x[0]"}, "box": _HALF_LINE},
    # Ratcliff 1978, with starts in the middle
    "ddm": {
        "equation": {"drift": "v", "diffusion": 1.0},
        "decision": {"lower": "-bound", "upper": "bound", "delay": "delay"},
    },
    # Usher and McClelland 2001: leaky competing accumulators
    "lca": {
        "equation": {
            "drift": ["v0 - leak * x[0] - inhibition * x[1]", "v1 - leak * x[1] - inhibition * x[0]"],
            "diffusion": 1.0,
        },
        "decision": {"lower": 0.0, "upper": ["bound", "bound"], "delay": "delay"},
    },
}
"""What a file with ``model = "name"`` in ``[equation]`` need not say; what it does say goes before."""
