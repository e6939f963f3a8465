"""Run folders: long work that is recorded, interrupted, resumed and swept."""

from kolmo.runs.run import Run, RunError, environment

__all__ = ["Run", "RunError", "environment"]
