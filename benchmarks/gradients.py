"""Gradient of an expected value with respect to the 82 parameters of a network in the drift, beside JAX and torch.

    python -m benchmarks.gradients [--json FILE]

J = mean of u(0, x_i) over 64 points, drift A x + W1ᵀ tanh(W0ᵀ x + b0) + b1, φ a Gaussian bump. kolmo's gradient is
judged against the converged gradient of the equation itself; those of the others against the converged gradient of the
method of lines that they share (64 × 64 nodes, second order, reflecting ghosts): their error in space is not held
against them.
CPU time of one thread, medians of warm calls; BENCHMARK_CLOCK=wall on an idle machine.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

import kolmo
from benchmarks.problems import PROBLEMS, Linear
from benchmarks.timing import CLOCK, Record, measure, shown
from kolmo import control
from kolmo.steppers.base import STEPPERS

BASE: Linear = PROBLEMS["B2"]  # type: ignore[assignment]
NODES, STEPS, WIDTH = 64, 40, 16
POINTS = np.random.default_rng(3).uniform(-1.5, 1.5, (64, 2))

Pair = tuple[Callable[[], Any], Callable[[], np.ndarray]]
"""Value alone, and gradient."""


def parameters() -> list[np.ndarray]:
    rng = np.random.default_rng(7)
    return [
        0.7 * rng.standard_normal((2, WIDTH)),
        0.3 * rng.standard_normal(WIDTH),
        0.3 * rng.standard_normal((WIDTH, 2)),
        0.1 * rng.standard_normal(2),
    ]


def pair_of(objective: Callable[[], torch.Tensor], theta: list[torch.Tensor]) -> Pair:
    """Value and gradient of a torch function."""

    def value() -> float:
        with torch.no_grad():
            return float(objective())

    def gradient() -> np.ndarray:
        return np.concatenate([g.numpy().ravel() for g in torch.autograd.grad(objective(), theta)])

    return value, gradient


# --- kolmo ------------------------------------------------------------------------------------------------------------


def with_kolmo(nodes: int, width: float | None = None) -> Pair:
    """On a given grid, graded around the origin if given a width: rk4 with as many steps as stability needs."""
    A, mean = torch.as_tensor(BASE.A), torch.as_tensor(BASE.mean)
    w0, b0, w1, b1 = theta = [torch.tensor(v, requires_grad=True) for v in parameters()]

    def drift(t: float, x: torch.Tensor) -> torch.Tensor:
        return x @ A.T + torch.tanh(x @ w0 + b0) @ w1 + b1

    def phi(x: torch.Tensor) -> torch.Tensor:
        return torch.exp(-0.5 * BASE.precision * ((x - mean) ** 2).sum(-1))

    sde = kolmo.SDE(drift, covariance=BASE.Sigma, dim=2, arrays="torch", autonomous=True)
    problem = kolmo.KolmogorovProblem(sde, phi, BASE.T, kolmo.Box([-BASE.half] * 2, [BASE.half] * 2))
    grid = BASE.grid(nodes, width)
    steps = int(np.ceil(BASE.T / STEPPERS["rk4"].largest_step(*kolmo.discretize(problem, grid).stiffness())))
    recipe = kolmo.solve(problem, grid=grid, steps=steps, stepper="rk4").discretization
    points, weights = torch.as_tensor(POINTS), torch.full((len(POINTS),), 1.0 / len(POINTS), dtype=torch.float64)

    def objective() -> torch.Tensor:
        return control.expected_value(problem, points, weights, discretization=recipe)

    return pair_of(objective, theta)


# --- the others -------------------------------------------------------------------------------------------------------


def lattice() -> tuple[np.ndarray, float, np.ndarray, np.ndarray]:
    """Nodes, spacing, φ and the weights of the nodes in J (bilinear interpolation)."""
    x = np.linspace(-BASE.half, BASE.half, NODES)
    X, h = np.stack(np.meshgrid(x, x, indexing="ij"), -1), x[1] - x[0]
    cell = np.floor((POINTS + BASE.half) / h).astype(int)
    part = (POINTS + BASE.half) / h - cell
    weight = np.zeros((NODES, NODES))
    for i in (0, 1):
        for j in (0, 1):
            share = np.where(i, part[:, 0], 1 - part[:, 0]) * np.where(j, part[:, 1], 1 - part[:, 1])
            np.add.at(weight, (cell[:, 0] + i, cell[:, 1] + j), share / len(POINTS))
    return X, h, BASE.phi(X), weight


def slope(u: Any, b: Any, h: float, pad: Callable[[Any], Any]) -> Any:
    """b·∇u + ½ Σ:∇²u by second-order central differences."""
    v, S = pad(u), BASE.Sigma
    c, n, s, e, w = v[1:-1, 1:-1], v[2:, 1:-1], v[:-2, 1:-1], v[1:-1, 2:], v[1:-1, :-2]
    corners = v[2:, 2:] - v[2:, :-2] - v[:-2, 2:] + v[:-2, :-2]
    first = b[..., 0] * (n - s) / (2 * h) + b[..., 1] * (e - w) / (2 * h)
    second = 0.5 * S[0, 0] * (n - 2 * c + s) + 0.5 * S[1, 1] * (e - 2 * c + w) + 0.25 * S[0, 1] * corners
    return first + second / h**2


def rk4(f: Callable[[Any], Any], u: Any, dt: float) -> Any:
    k1 = f(u)
    k2 = f(u + 0.5 * dt * k1)
    k3 = f(u + 0.5 * dt * k2)
    k4 = f(u + dt * k3)
    return u + dt / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


def with_jax(march: Callable[[Any, Any, Any], Any]) -> Pair:
    """``march(field(u, b), φ, b)`` gives u(0)."""
    import jax
    import jax.numpy as jnp

    jax.config.update("jax_enable_x64", True)
    X, h, phi, weight = lattice()

    def objective(theta: list[Any]) -> Any:
        b = jnp.asarray(X) @ BASE.A.T + jnp.tanh(jnp.asarray(X) @ theta[0] + theta[1]) @ theta[2] + theta[3]
        field = lambda u, b: slope(u, b, h, lambda v: jnp.pad(v, 1, mode="reflect"))  # noqa: E731
        return jnp.sum(weight * march(field, jnp.asarray(phi), b))

    theta = [jnp.asarray(v) for v in parameters()]
    value, gradient = jax.jit(objective), jax.jit(jax.grad(objective))
    return (
        lambda: value(theta).block_until_ready(),
        lambda: np.concatenate([np.ravel(v) for v in jax.block_until_ready(gradient(theta))]),
    )


def scan(steps: int) -> Callable[[Any, Any, Any], Any]:
    def march(field: Any, phi: Any, b: Any) -> Any:
        import jax

        def step(u: Any, _: Any) -> Any:
            return rk4(lambda v: field(v, b), u, BASE.T / steps), None

        return jax.lax.scan(step, phi, None, length=steps)[0]

    return march


def diffrax_march(field: Any, phi: Any, b: Any) -> Any:
    import diffrax

    done = diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, u, b: field(u, b)),
        diffrax.Tsit5(),
        0.0,
        BASE.T,
        1e-3,
        phi,
        args=b,
        stepsize_controller=diffrax.PIDController(rtol=1e-4, atol=1e-5),
        adjoint=diffrax.RecursiveCheckpointAdjoint(),
        max_steps=4096,
    )
    return done.ys[-1]


def with_torch(march: Callable[[Callable[[Any], Any], Any], Any]) -> Pair:
    X, h, phi, weight = lattice()
    points, start, weights, A = (torch.as_tensor(v) for v in (X, phi, weight, BASE.A))
    theta = [torch.tensor(v, requires_grad=True) for v in parameters()]

    def pad(v: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(v[None, None], (1, 1, 1, 1), mode="reflect")[0, 0]

    def objective() -> torch.Tensor:
        b = points @ A.T + torch.tanh(points @ theta[0] + theta[1]) @ theta[2] + theta[3]
        return (weights * march(lambda u: slope(u, b, h, pad), start)).sum()

    return pair_of(objective, theta)


def torch_loop(field: Callable[[Any], Any], u: Any) -> Any:
    for _ in range(STEPS):
        u = rk4(field, u, BASE.T / STEPS)
    return u


def torchdiffeq_march(field: Callable[[Any], Any], u: Any) -> Any:
    from torchdiffeq import odeint

    times, options = torch.tensor([0.0, BASE.T], dtype=torch.float64), {"step_size": BASE.T / STEPS}
    return odeint(lambda t, v: field(v), u, times, method="rk4", options=options)[-1]


# --- the table --------------------------------------------------------------------------------------------------------


def records() -> Iterator[Record]:
    def judged(solver: str, setting: str, pair: Pair, exact: np.ndarray) -> Record:
        value, gradient = pair
        _, forward, _ = measure(value)
        found, whole, first = measure(gradient)
        error = float(np.abs(found - exact).max() / np.abs(exact).max())
        return Record("B6", solver, setting, error, whole, first, forward)

    converged = with_kolmo(97)[1]()
    other = with_kolmo(65, 1.6)[1]()
    settled = np.abs(other - converged).max() / np.abs(converged).max()
    yield Record("B6", "kolmo", "graded 65² beside 97² (how far the reference is converged)", float(settled), 0.0, 0.0)
    for n in (33, 41, 49, 64):
        yield judged("kolmo", f"rk4 {n}²", with_kolmo(n), converged)
    for n in (33, 37, 41, 45):
        yield judged("kolmo", f"rk4 {n}², graded", with_kolmo(n, 1.6), converged)
    lines = with_jax(scan(4 * STEPS))[1]()
    peers: list[tuple[str, str, Callable[[], Pair]]] = [
        ("JAX", "scan, RK4", lambda: with_jax(scan(STEPS))),
        ("diffrax", "Tsit5, recursive checkpoints", lambda: with_jax(diffrax_march)),
        ("torch", "loop, RK4", lambda: with_torch(torch_loop)),
        ("torchdiffeq", "odeint, RK4", lambda: with_torch(torchdiffeq_march)),
    ]
    for solver, setting, build in peers:
        try:
            yield judged(solver, setting, build(), lines)
        except ImportError as missing:
            print(f"{solver}: not installed ({missing.name})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="file for the records")
    given = parser.parse_args()
    torch.set_num_threads(1)
    done = []
    print(f"{'':13}{'':32}{'gradient':>10} {'value':>10} {'ratio':>6} {'error':>8} {'first':>8}   ({CLOCK} time)")
    for r in records():
        done.append(r.as_dict())
        ratio = f"{r.whole / r.march:6.2f}" if r.march else ""
        times = f"{shown(r.whole):>10} {shown(r.march or 0.0):>10}" if r.march else f"{'':>21}"
        print(f"{r.solver:13}{r.setting:32}{times} {ratio:>6} {r.error:8.1e} {r.first:6.2f} s", flush=True)
    if given.json:
        given.json.write_text(json.dumps({"clock": CLOCK, "records": done}, indent=1))


if __name__ == "__main__":
    main()
