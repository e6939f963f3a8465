"""A reach set in three dimensions beside hj_reachability: error over time, against a distance to a convex set.

``python -m benchmarks.reach [--nodes 25,37,49] [--json FILE]``: with accelerations |a| <= 1 of a double integrator
(x, v) and a third coordinate with speed |w| <= 1, how near to the ball of radius 1/2 about 0 can one be at time 1? The
places reached at time 1 are a convex set, two parabolic arcs times an interval, so that the value is the distance of 0
from it less the radius, and the reach set is where that is negative. Errors are those of the value where its modulus is
below 0.2: its slope is one thereabouts, and they are distances by which the set's boundary is off.
"""

import argparse
import json
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from scipy.interpolate import RegularGridInterpolator

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")

import torch

import kolmo
from benchmarks.timing import Record, measure, shown
from kolmo import control
from kolmo.discretization import Discretization
from kolmo.grid import Grid

HORIZON, RADIUS, HALF, BAND = 1.0, 0.5, 3.0, 0.2
# Points at which answers are judged, and points of each arc of the exact set.
POINTS, ARC = 12_000, 4_001
# Noise per square root of the spacing, where kolmo is given some.
VISCOSITY = 0.2


def exact(x: np.ndarray) -> np.ndarray:
    """Value at points (n, 3): distance from 0 to what can be reached, less the radius."""
    centre = np.stack([x[:, 0] + HORIZON * x[:, 1], x[:, 1]], -1)
    s = np.linspace(0.0, HORIZON, ARC)  # the acceleration switches once, at s
    arc = np.stack([s * HORIZON - 0.5 * s**2 - 0.5 * (HORIZON - s) ** 2, 2.0 * s - HORIZON], -1)
    edge = np.concatenate([arc, -arc])
    away = np.concatenate([np.linalg.norm(c[:, None] + edge, axis=-1).min(1) for c in np.array_split(centre, 60)])
    up, down = (0.5 * (HORIZON + sign * -centre[:, 1]) for sign in (1.0, -1.0))
    top, bottom = (v * HORIZON - 0.5 * v**2 - 0.5 * (HORIZON - v) ** 2 for v in (up, down))
    inside = (np.abs(centre[:, 1]) <= HORIZON) & (-centre[:, 0] <= top) & (centre[:, 0] <= bottom)
    return np.asarray(np.hypot(np.where(inside, 0.0, away), np.maximum(np.abs(x[:, 2]) - HORIZON, 0.0)) - RADIUS)


def judged() -> tuple[np.ndarray, np.ndarray]:
    """Points near the boundary of the reach set, and the exact values there."""
    x = np.random.default_rng(0).uniform(-2.0, 2.0, (POINTS, 3))
    value = exact(x)
    near = np.abs(value) < BAND
    return x[near], value[near]


def with_kolmo(n: int, noise: float) -> Callable[[np.ndarray], np.ndarray]:
    """Central differences of order four with classical Runge–Kutta steps; as many of these as nodes per axis."""
    problem = control.ControlProblem(
        lambda t, x, a: torch.stack([x[..., 1], a[..., 0], a[..., 1]], -1),
        noise if noise else None,
        controls=control.BoxSet([-1.0, -1.0], [1.0, 1.0]),
        terminal=lambda x: x.norm(dim=-1) - RADIUS,
        horizon=HORIZON,
        box=kolmo.Box([-HALF] * 3, [HALF] * 3),
    )
    times = tuple(np.linspace(0.0, HORIZON, n + 1).tolist())
    recipe = Discretization(Grid.of(problem.box, [n] * 3), times, "central4", "rk4")
    return control.solve_hjb(problem, discretization=recipe)


def with_peer(n: int, accuracy: str) -> Callable[[np.ndarray], np.ndarray]:
    """hj_reachability: upwind (WENO) differences and TVD Runge–Kutta steps of the accuracy that it names."""
    import hj_reachability as hj
    import jax
    import jax.numpy as jnp

    jax.config.update("jax_enable_x64", True)

    class Chain(hj.ControlAndDisturbanceAffineDynamics):
        def __init__(self) -> None:
            sets = hj.sets.Box(-jnp.ones(2), jnp.ones(2)), hj.sets.Box(jnp.zeros(1), jnp.zeros(1))
            super().__init__("min", "max", *sets)

        def open_loop_dynamics(self, state: Any, time: Any) -> Any:
            return jnp.array([state[1], 0.0, 0.0])

        def control_jacobian(self, state: Any, time: Any) -> Any:
            return jnp.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])

        def disturbance_jacobian(self, state: Any, time: Any) -> Any:
            return jnp.zeros((3, 1))

    ends = hj.sets.Box(np.full(3, -HALF), np.full(3, HALF))
    grid = hj.Grid.from_lattice_parameters_and_boundary_conditions(ends, (n, n, n))
    settings, phi = hj.SolverSettings.with_accuracy(accuracy), jnp.linalg.norm(grid.states, axis=-1) - RADIUS
    value = np.asarray(hj.step(settings, Chain(), grid, 0.0, phi, -HORIZON, progress_bar=False))
    return RegularGridInterpolator((np.linspace(-HALF, HALF, n),) * 3, value, method="cubic")


def records(nodes: list[int]) -> Iterator[tuple[Record, float]]:
    """Records with the largest error, and the root of the mean square error."""
    points, value = judged()
    for n in nodes:
        noise = VISCOSITY * np.sqrt(2.0 * HALF / (n - 1))
        solvers: list[tuple[str, str, Callable[[], Any]]] = [
            ("kolmo", "no noise", lambda n=n: with_kolmo(n, 0.0)),
            ("kolmo", f"noise {noise:.3f}", lambda n=n, noise=noise: with_kolmo(n, noise)),
            *(("hj_reachability", name, lambda n=n, name=name: with_peer(n, name)) for name in ("low", "very_high")),
        ]
        for solver, setting, work in solvers:
            try:
                answer, whole, first = measure(work, repeats=1)
            except ImportError:
                print(f"{solver} is not installed: pip install 'kolmo[benchmarks]'")
                continue
            error = np.abs(np.asarray(answer(points)) - value)
            yield (
                Record("reach set", solver, f"{n}³, {setting}", float(error.max()), whole, first),
                float(np.sqrt(np.mean(error**2))),
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", default="25,37,49", help="nodes per axis")
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args()
    found = []
    print("| solver | nodes, setting | largest error | mean square | time | first call |\n|---|---|---|---|---|---|")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for record, mean in records([int(n) for n in options.nodes.split(",")]):
            found.append(record.as_dict() | {"mean_square": mean})
            times = f"{shown(record.whole)} | {shown(record.first)}"
            print(f"| {record.solver} | {record.setting} | {record.error:.1e} | {mean:.1e} | {times} |", flush=True)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
