"""Many problems that differ in parameters: one plan and one march for all, each with its own estimate."""

from kolmo.many.front import Solutions, solve_many

__all__ = ["Solutions", "solve_many"]
