"""Run folders: long work that is recorded, interrupted, resumed and swept."""

from kolmo.runs.environment import environment
from kolmo.runs.folders import RunError
from kolmo.runs.run import Run

__all__ = ["Run", "RunError", "environment"]
