"""How a sweep scales: the same tasks one after the other, and on Dask workers of this machine.

python -m benchmarks.scaling --tasks 8 --seconds 45 --workers 1 2

Each task is the experiment `lqg` with a seed of its own and as many simulated paths as take so many seconds of one
core, measured first. Every way of running them must give the same results to the last digit. Run it on an idle
machine: what else runs is measured too.
"""

import argparse
import os
import platform
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from kolmo import sweep
from kolmo.runs import Run

NAME = "lqg"
PATHS = (20_000, 100_000)


def main() -> int:
    """Print the table; 1 if any result differs from the serial run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=45.0, help="of one core, for each task")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    chosen = parser.parse_args()
    paths = calibrated(chosen.seconds)
    tasks = sweep.settings(NAME, {"paths": str(paths)}, {"seed": [str(seed) for seed in range(chosen.tasks)]})
    print(f"{chosen.tasks} tasks of {NAME} with {paths} paths; {os.cpu_count()} cores, {platform.platform()}")
    print("| run | wall clock, s | processor, s | speed-up | efficiency | same results |")
    print("|---|---|---|---|---|---|")
    serial: dict[str, Any] = {}
    first, same = 0.0, True
    for workers in (0, *chosen.workers):
        results, wall, processor = timed(tasks, workers)
        serial, first = (serial, first) if serial else (results, wall)
        same &= results == serial
        label = f"{workers} Dask worker{'s' if workers > 1 else ''}" if workers else "serial, no Dask"
        speed = first / wall
        shares = f"{speed:.2f} | {speed / max(workers, 1):.0%} | {'yes' if results == serial else 'NO'}"
        print(f"| {label} | {wall:.0f} | {processor:.0f} | {shares} |", flush=True)
    return 0 if same else 1


def timed(tasks: dict[str, dict[str, str]], workers: int) -> tuple[dict[str, Any], float, float]:
    """Results of a sweep, its wall clock and its processor time, both in seconds."""
    with tempfile.TemporaryDirectory() as folder, Run.create("scaling", {}, out=Path(folder) / "run") as run:
        wall, processor = time.perf_counter(), spent()
        failed = sweep.perform(run, NAME, tasks, workers=workers)
        wall, processor = time.perf_counter() - wall, spent() - processor
        if failed:
            sys.exit(f"failed: {failed}")
        return {key: run.load_unit(key) for key in tasks}, wall, processor


def spent() -> float:
    """Processor time of this process and of those that have ended under it."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def calibrated(seconds: float) -> int:
    """Number of paths with which a task takes so long, from two shorter ones."""
    timed({"compile": {"paths": str(PATHS[0])}}, 0)  # kernels are compiled once and kept on the disk
    short, long = (timed({"task": {"paths": str(paths)}}, 0)[2] for paths in PATHS)
    return max(PATHS[0], round(PATHS[0] + (seconds - short) * (PATHS[1] - PATHS[0]) / max(long - short, 1e-3)))


if __name__ == "__main__":
    sys.exit(main())
