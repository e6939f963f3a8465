"""What a run was made with: versions, revision, machine and threads."""

import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_PACKAGES = ("kolmo", "numpy", "scipy", "numba", "torch", "fipy", "matplotlib", "scikit-learn", "tqdm", "click")
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")


def environment(seeds: Sequence[int] = ()) -> dict[str, Any]:
    """Describe what a result depends on beside its configuration.

    Parameters
    ----------
    seeds : sequence of int, optional
        The seeds used.

    Returns
    -------
    dict
        ``python``, ``platform``, ``cores``, ``packages`` (name to version), ``git`` (revision of kolmo's source tree,
        with ``+changes`` when it has uncommitted ones; None outside one), ``threads`` and ``seeds``.

    Examples
    --------
    >>> environment(seeds=[1])["seeds"]
    [1]
    """
    torch = sys.modules.get("torch")
    threads: dict[str, Any] = {name: os.environ[name] for name in _THREAD_VARIABLES if name in os.environ}
    if torch is not None:
        threads["torch"] = torch.get_num_threads()
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "git": _git_revision(),
        "threads": threads,
        "seeds": [int(seed) for seed in seeds],
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_revision() -> str | None:
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():  # an installed copy; a repository further up would be somebody else's
        return None

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None
