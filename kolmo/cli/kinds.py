"""The kinds of runs that commands make, told by their names, and how each goes on."""

import shlex

from kolmo.runs import Run

__all__ = ["SWEEP", "going_on"]

SWEEP = "sweep-"
"""How the names of sweeps begin."""


def going_on(run: Run) -> str:
    """The command that goes on with an unfinished run, or does it again where it is one piece."""
    folder = shlex.quote(str(run.folder))
    if run.name.startswith(SWEEP):
        return f"kolmo sweep {run.name.removeprefix(SWEEP)} --resume {folder}"
    if run.name == "landscape":
        return f"kolmo landscape --resume {folder}"
    if run.name in ("solve", "control"):
        set_to = [
            f" --set {shlex.quote(f'{key}={value!r}')}" for key, value in run.config.get("parameters", {}).items()
        ]
        return f"kolmo {run.name} {shlex.quote(str(run.folder / 'equation.toml'))}{''.join(set_to)} --out {folder}"
    return f"kolmo experiment {run.name} --resume {folder}"
