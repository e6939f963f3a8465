"""Marches in torch on a device beside NumPy's kernels on one core: the same answers, and the seconds of each.

    python -m benchmarks.gpu [--device cuda] [--json FILE]

On a GPU: a problem on 256³ nodes, explicit and split; 100 terminal functions on 512² nodes, split and along
characteristics; the gradient of control.value on 512² nodes. With ``--device cpu`` the same on small grids, to see that
the answers agree. Wall time of whole calls with the discretisation given: the device's is the median of warm ones, the
core's of one such call.
"""

import os

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
os.environ["BENCHMARK_CLOCK"] = "wall"

import argparse  # noqa: E402
import json  # noqa: E402
from collections.abc import Callable  # noqa: E402
from dataclasses import asdict, dataclass  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402

import kolmo  # noqa: E402
from benchmarks.timing import clock, measure, shown  # noqa: E402
from kolmo import control  # noqa: E402
from kolmo.arrays import as_like, as_numpy  # noqa: E402

# Answers of the two agree to this, relative to each.
AGREED = 1e-9
REPEATS = 3
HORIZON = 1e-4


@dataclass(frozen=True)
class Case:
    """What is solved, with nodes along each axis and terminal functions on a GPU, and where small grids have to do."""

    name: str
    dim: int
    stepper: str
    steps: int
    nodes: tuple[int, int]
    columns: tuple[int, int] = (1, 1)
    gradient: bool = False

    def size(self, place: torch.device) -> tuple[int, int]:
        """Nodes along each axis and terminal functions."""
        small = int(place.type == "cpu")
        return self.nodes[small], self.columns[small]


CASES = (
    Case("3-D, explicit", 3, "rk4", 3, (256, 14)),
    Case("3-D, split", 3, "mcs", 3, (256, 14)),
    Case("many terminal functions, split", 2, "mcs3", 3, (512, 24), (100, 5)),
    Case("many terminal functions, along characteristics", 2, "semi-lagrangian", 3, (512, 24), (100, 5)),
    Case("gradient, explicit", 2, "rk4", 10, (512, 24), gradient=True),
    Case("gradient, split", 2, "mcs3", 3, (512, 24), gradient=True),
)


@dataclass(frozen=True)
class Done:
    """Seconds of a case on one core and on the device, the bytes it took there, and how far the answers are apart."""

    case: str
    nodes: int
    dim: int
    columns: int
    steps: int
    core: float
    device: float
    bytes: int
    difference: float


def problem_of(case: Case, columns: int, rate: Any = 1.0) -> kolmo.KolmogorovProblem:
    """Rotation, decay and noise; so short a time that a few explicit steps are stable on every grid."""
    turn = np.array([[-0.5, 2.0, 0.0], [-2.0, -0.5, 0.5], [0.0, -0.5, -1.0]])[: case.dim, : case.dim]
    widths = np.linspace(0.5, 1.5, columns)
    sde = kolmo.SDE(lambda t, x: rate * (x @ as_like(turn.T, x)), covariance=0.3 * np.eye(case.dim), dim=case.dim)

    def terminal(x: Any) -> Any:
        return ((-0.2 * (x**2).sum(-1))[..., None] * as_like(widths, x)).exp()

    box = kolmo.Box([-4.0] * case.dim, [4.0] * case.dim)
    return kolmo.KolmogorovProblem(sde, terminal, HORIZON, box).handing("torch")


def work_of(case: Case, nodes: int, columns: int, place: torch.device, backend: str) -> Callable[[], np.ndarray]:
    """The whole call, to the end of what it started on the device."""
    at = torch.tensor([[0.3, -0.4, 0.2][: case.dim]], dtype=torch.float64, device=place)
    grid = kolmo.Grid.of(problem_of(case, columns).box, nodes)
    times = tuple(np.linspace(0.0, HORIZON, case.steps + 1).tolist())
    recipe = kolmo.Discretization(grid, times, "central6", case.stepper, None)

    def solve() -> np.ndarray:
        solution = kolmo.solve(problem_of(case, columns), at=at, discretization=recipe, backend=backend)
        return np.asarray(as_numpy(solution(at)))

    if not case.gradient:
        return solve
    rate = torch.tensor(1.0, dtype=torch.float64, device=place, requires_grad=True)

    def gradient() -> np.ndarray:
        u = control.value(problem_of(case, columns, rate), at, discretization=recipe).sum()
        return np.array([float(u.detach()), float(torch.autograd.grad(u, rate)[0])])

    return gradient


def on_device(case: Case, place: torch.device) -> tuple[np.ndarray, float, int]:
    """Answers, seconds of a warm call, and the most bytes that were taken on a GPU."""
    if place.type == "cuda":
        torch.cuda.reset_peak_memory_stats(place)
    found, seconds, _ = measure(work_of(case, *case.size(place), place, "torch"), REPEATS)
    return found, seconds, torch.cuda.max_memory_allocated(place) if place.type == "cuda" else 0


def on_core(case: Case, place: torch.device) -> tuple[np.ndarray, float]:
    """Answers and seconds of one call; a call on a small grid compiles the kernels before."""
    cpu = torch.device("cpu")
    work_of(case, *case.size(cpu), cpu, "numba")()
    started = clock()
    wanted = work_of(case, *case.size(place), cpu, "numba")()
    return wanted, clock() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, ... or cpu")
    parser.add_argument("--json", type=Path, help="file for the figures")
    chosen = parser.parse_args()
    place = torch.device(chosen.device)
    if place.type == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device; --device cpu runs small grids")
    name = torch.cuda.get_device_name(place) if place.type == "cuda" else "CPU, small grids"
    print(f"torch {torch.__version__} on {name}")
    # The device first, all cases: a core takes minutes.
    there = []
    for case in CASES:
        there.append(on_device(case, place))
        print(f"{case.name}: device {shown(there[-1][1])}", flush=True)
    done = []
    for case, (found, device, peak) in zip(CASES, there, strict=True):
        wanted, core = on_core(case, place)
        nodes, columns = case.size(place)
        difference = float(np.abs(found / wanted - 1.0).max())
        done.append(Done(case.name, nodes, case.dim, columns, case.steps, core, device, peak, difference))
        d = done[-1]
        what = f"{d.nodes}^{d.dim} nodes, {d.columns} columns, {d.steps} steps"
        room = f"{d.bytes / 1e9:.1f} GB there"
        print(f"{d.case} ({what}): one core {shown(d.core)}, device {shown(d.device)}, {room};", end=" ")
        print(f"difference {d.difference:.1e}", flush=True)
        if chosen.json:
            chosen.json.write_text(json.dumps({"device": name, "done": [asdict(d) for d in done]}, indent=1))
    if any(d.difference > AGREED for d in done):
        raise SystemExit("the answers differ")


if __name__ == "__main__":
    main()
