"""Terminal data on the grid: point values where they are smooth, a smoothing kernel where they have kinks or jumps.

`roughness` says in which cells, `kinks` where in them; `kernel` is what smooths, `cells` integrates across breaks, and
`rule` is the frozen linear map from values of φ to the data at the nodes. None of them is a scheme.
"""

from kolmo.schemes.terminal.roughness import common_break, rough_places
from kolmo.schemes.terminal.rule import TerminalRule, plan_averages, plan_terminal

__all__ = ["TerminalRule", "common_break", "plan_averages", "plan_terminal", "rough_places"]
