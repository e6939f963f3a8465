"""Time and memory of one solve over two decades of cells × steps, in two and three dimensions.

    python -m benchmarks.scale [--json FILE] [--plot FILE]

Every grid is solved in a process of its own: a small solve first, so that kernels are there, and then the one that
counts, with the number of steps given. Memory is the growth of the resident peak. CPU time; one thread.
"""

import os

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

import argparse  # noqa: E402
import json  # noqa: E402
import multiprocessing  # noqa: E402
import resource  # noqa: E402
import time  # noqa: E402
from dataclasses import asdict, dataclass  # noqa: E402
from pathlib import Path  # noqa: E402

import numpy as np  # noqa: E402

STEPS = 10
SIZES = {2: (100, 141, 200, 283, 400, 566, 800, 1000), 3: (20, 27, 35, 46, 60, 79, 100)}
STEPPERS = {2: ("rk4", "mcs3"), 3: ("rk4", "mcs3")}
# Drift, covariance, killing and load of a node, and its coordinates, as the user's functions give them.
GIVEN = {d: 8 * (2 * d + d * d + 2) for d in SIZES}


@dataclass(frozen=True)
class Size:
    """One solve: nodes along each axis, seconds, bytes."""

    dim: int
    stepper: str
    n: int
    steps: int
    seconds: float
    peak: int

    @property
    def cells(self) -> int:
        return self.n**self.dim

    @property
    def beyond(self) -> float:
        """Bytes a cell beyond those of the coefficients as they are given."""
        return self.peak / self.cells - GIVEN[self.dim]


def solved(dim: int, stepper: str, n: int, steps: int) -> Size:
    """Solve on one grid, in this process."""
    import kolmo

    turn = np.array([[-0.5, 2.0, 0.0], [-2.0, -0.5, 0.5], [0.0, -0.5, -1.0]])[:dim, :dim]
    sde = kolmo.SDE(lambda t, x: x @ turn.T, covariance=0.3 * np.eye(dim), dim=dim)
    box = kolmo.Box([-4.0] * dim, [4.0] * dim)

    def run(n: int) -> float:
        # so short a time that ten explicit steps are stable on every grid
        problem = kolmo.KolmogorovProblem(sde, lambda x: np.exp(-(x**2).sum(-1)), 1e-4, box)
        begin = time.process_time()
        kolmo.solve(problem, grid=n, steps=steps, stepper=stepper)
        return time.process_time() - begin

    run(12)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = run(n)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return Size(dim, stepper, n, steps, seconds, 1024 * peak)


def plot(done: list[Size], path: Path) -> None:
    """Seconds over cells × steps with a line of slope one, and bytes a cell."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(8.0, 3.2), layout="constrained")
    for (dim, stepper), marker in zip(dict.fromkeys((s.dim, s.stepper) for s in done), "os^v", strict=False):
        mine = [s for s in done if (s.dim, s.stepper) == (dim, stepper)]
        work = np.array([s.cells * s.steps for s in mine], dtype=float)
        seconds = np.array([s.seconds for s in mine])
        (line,) = left.loglog(work, seconds, marker, label=f"{dim}-D, {stepper}", ms=4)
        left.loglog(work, seconds[-1] * work / work[-1], color=line.get_color(), lw=0.8)
        right.semilogx(
            [s.cells for s in mine], [s.beyond for s in mine], f"{marker}-", ms=4, lw=0.8, color=line.get_color()
        )
    left.set(xlabel="cells × steps", ylabel="CPU seconds, whole solve", title="lines: slope 1")
    right.set(xlabel="cells", ylabel="bytes a cell", title="peak beyond the coefficients")
    right.set_ylim(bottom=0)
    left.legend(fontsize=8)
    for ax in (left, right):
        ax.grid(alpha=0.3)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--plot", type=Path, help="file for the plot")
    chosen = parser.parse_args()
    tasks = [(dim, stepper, n, STEPS) for dim in SIZES for stepper in STEPPERS[dim] for n in SIZES[dim]]
    done = []
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for size in pool.starmap(solved, tasks, chunksize=1):
            done.append(size)
            speed = f"{size.seconds:.3f} s, {1e9 * size.seconds / (size.cells * size.steps):.0f} ns a cell and step"
            room = f"{size.peak / size.cells:.0f} bytes a cell, {size.beyond:.0f} beyond the coefficients"
            print(f"{size.dim}-D {size.stepper:5} {size.n:5}^{size.dim} {size.steps} steps: {speed}; {room}")
    if chosen.json:
        chosen.json.write_text(json.dumps([asdict(s) for s in done], indent=1))
    if chosen.plot:
        plot(done, chosen.plot)


if __name__ == "__main__":
    main()
