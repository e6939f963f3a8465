"""Monte Carlo, control variate and recursion on a noisy residual network, beside NumPy, torch, torchsde and JAX.

    python -m benchmarks.networks [--repeats 5] [--only kolmo,jax] [--json FILE]

The network: X_{k+1} = X_k + h (W2 tanh(W1 X_k + b1) + b2) + √h s N(0, I) in the plane, width 16, 50 layers, single
precision; the loss exp(−2 |X|²) at 64 inputs. Every figure is checked: losses against the layer recursion, in standard
errors. A time is the median of warm calls, in CPU seconds of one thread (set OMP_NUM_THREADS=1), which other work on
the machine hardly disturbs. Then what noise in other people's networks costs (`benchmarks.injection`). Needs the
extra: pip install --constraint constraints.txt 'kolmo[benchmarks]'.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torchsde

from benchmarks import injection
from kolmo import bridge

DEPTH, WIDTH, INPUTS, PATHS, NOISE = 50, 16, 64, 1600, 0.4
H, SPREAD = 1.0 / DEPTH, (1.0 / DEPTH) ** 0.5 * NOISE
TARGET = 1e-3  # standard error of every input's loss
GOALS = {
    "arbitrary modules: time / hand-written torch loop": ("<=", 1.0),
    "MLP branches: path-steps a second / JAX's": (">=", 3.0),
    "control variate to 1e-3: JAX's time / time": (">=", 50.0),
    "recursion to 1e-8: JAX's time to 1e-3 / time": (">=", 1.0),
}


def weights() -> tuple[list[np.ndarray], np.ndarray]:
    g = np.random.default_rng(11)
    shapes = (((DEPTH, 2, WIDTH), 0.7), ((DEPTH, WIDTH), 0.3), ((DEPTH, WIDTH, 2), 0.3), ((DEPTH, 2), 0.1))
    theta = [(g.standard_normal(shape) * size).astype(np.float32) for shape, size in shapes]
    return theta, g.uniform(-1, 1, (INPUTS, 2)).astype(np.float32)


THETA, X = weights()
START = np.repeat(X, PATHS, axis=0)
TENSORS = [torch.as_tensor(v) for v in THETA]


def loss(z: torch.Tensor) -> torch.Tensor:
    return torch.exp(-2 * z.square().sum(-1))


class Branch(torch.nn.Module):
    """An arbitrary module: the same branch, of which kolmo knows nothing."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.W1, self.b1, self.W2, self.b2 = (torch.nn.Parameter(v[k]) for v in TENSORS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x @ self.W1 + self.b1) @ self.W2 + self.b2


def mlp_network() -> bridge.NoisyResNet:
    W1, b1, W2, b2 = TENSORS
    branches = [bridge.MLPBranch(W1[k].T, b1[k], W2[k].T, b2[k]) for k in range(DEPTH)]
    return bridge.NoisyResNet(branches, bridge.Additive(NOISE))


def numpy_loop() -> Callable[[], np.ndarray]:
    g = np.random.default_rng(0)

    def run() -> np.ndarray:
        z = START
        for W1, b1, W2, b2 in zip(*THETA, strict=True):
            noise = g.standard_normal(z.shape, dtype=np.float32)
            z = z + H * (np.tanh(z @ W1 + b1) @ W2 + b2) + np.float32(SPREAD) * noise
        return z

    return run


def torch_loop() -> Callable[[], np.ndarray]:
    start = torch.as_tensor(START)
    layers = torch.nn.ModuleList(Branch(k) for k in range(DEPTH))

    @torch.no_grad()
    def run() -> np.ndarray:
        z = start
        for branch in layers:
            z = z + H * branch(z) + SPREAD * torch.randn_like(z)
        return z.numpy()

    return run


def torchsde_euler() -> Callable[[], np.ndarray]:
    class Equation(torch.nn.Module):
        noise_type, sde_type = "diagonal", "ito"

        def f(self, t: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
            W1, b1, W2, b2 = (v[min(int(float(t) / H + 0.5), DEPTH - 1)] for v in TENSORS)
            return torch.tanh(z @ W1 + b1) @ W2 + b2

        def g(self, t: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
            return torch.full_like(z, NOISE)

    start, equation, times = torch.as_tensor(START), Equation(), torch.tensor([0.0, 1.0])

    @torch.no_grad()
    def run() -> np.ndarray:
        return torchsde.sdeint(equation, start, times, dt=H, method="euler")[-1].numpy()

    return run


def jax_scan() -> Callable[[], np.ndarray]:
    theta, start = [jnp.asarray(v) for v in THETA], jnp.asarray(START)

    @jax.jit
    def march(key: Any) -> Any:
        def step(z: Any, layer: Any) -> Any:
            W1, b1, W2, b2, k = layer
            noise = jax.random.normal(k, z.shape, dtype=z.dtype)
            return z + H * (jnp.tanh(z @ W1 + b1) @ W2 + b2) + SPREAD * noise, None

        return jax.lax.scan(step, start, (*theta, jax.random.split(key, DEPTH)))[0]

    return lambda: np.asarray(march(jax.random.PRNGKey(0)))


def kolmo_modules() -> Callable[[], np.ndarray]:
    """Forward pass of a NoisyResNet of arbitrary modules."""
    start = torch.as_tensor(START)
    net = bridge.NoisyResNet([Branch(k) for k in range(DEPTH)], bridge.Additive(NOISE)).train()

    @torch.no_grad()
    def run() -> np.ndarray:
        return net(start).numpy()

    return run


def kolmo_modules_expected() -> Callable[[], bridge.LossEstimate]:
    """expected_loss of the same network: paths in blocks that stay in the cache."""
    net = bridge.NoisyResNet([Branch(k) for k in range(DEPTH)], bridge.Additive(NOISE))
    return lambda: bridge.expected_loss(net, loss, torch.as_tensor(X), paths=PATHS, rng=0)


def kolmo_fused() -> Callable[[], bridge.LossEstimate]:
    """expected_loss with MLPBranch: the compiled kernel."""
    net = mlp_network()
    return lambda: bridge.expected_loss(net, loss, torch.as_tensor(X), paths=PATHS, rng=0)


def kolmo_controlled() -> Callable[[], bridge.LossEstimate]:
    """The PDE as control variate, its solve counted, with as many paths as TARGET takes."""
    net, x = mlp_network(), torch.as_tensor(X)
    pilot = bridge.expected_loss(net, loss, x, paths=200, rng=1, control_variate="pde")
    paths = int(np.ceil(200 * (1.05 * float(pilot.standard_error.max()) / TARGET) ** 2))
    return lambda: bridge.expected_loss(net, loss, x, paths=paths, rng=0, control_variate="pde")


def kolmo_recursion() -> Callable[[], bridge.LossEstimate]:
    net, x = mlp_network().double(), torch.as_tensor(X).double()
    return lambda: bridge.expected_loss(net, loss, x, method="recursion", rtol=0.0, atol=1e-8)


SAMPLERS = {
    "numpy": numpy_loop,
    "torch loop": torch_loop,
    "torchsde euler": torchsde_euler,
    "jax jit scan": jax_scan,
    "kolmo, arbitrary modules": kolmo_modules,
    "kolmo, arbitrary modules, expected_loss": kolmo_modules_expected,
    "kolmo, MLPBranch": kolmo_fused,
}
OTHERS = {"kolmo, control variate": kolmo_controlled, "kolmo, recursion": kolmo_recursion}


def estimate(result: Any) -> tuple[np.ndarray, np.ndarray]:
    """Mean loss of every input, and its standard error (zero for the recursion)."""
    if isinstance(result, bridge.LossEstimate):
        error = result.standard_error
        return result.mean.double().numpy(), np.zeros(INPUTS) if error is None else error.double().numpy()
    values = np.exp(-2 * np.sum(result.astype(float) ** 2, axis=1)).reshape(INPUTS, PATHS)
    return values.mean(1), values.std(1, ddof=1) / PATHS**0.5


def measured(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, dict[str, Any]]:
    """Median CPU seconds of each, in turn, so that what disturbs one disturbs all."""
    firsts, results, seconds = {}, {}, {name: [] for name in runs}
    for name, run in runs.items():
        begin = time.process_time()
        results[name] = run()
        firsts[name] = time.process_time() - begin
    for _ in range(repeats):
        for name, run in runs.items():
            begin = time.process_time()
            run()
            seconds[name].append(time.process_time() - begin)
    return {
        name: {
            "seconds": statistics.median(seconds[name]),
            "spread": max(seconds[name]) - min(seconds[name]),
            "first": firsts[name],
            "result": results[name],
        }
        for name in runs
    }


def compare(repeats: int, only: list[str]) -> dict[str, Any]:
    double = mlp_network().double()
    exact = bridge.expected_loss(double, loss, torch.as_tensor(X).double(), method="recursion", rtol=0.0, atol=1e-9)
    chosen = {n: f for n, f in {**SAMPLERS, **OTHERS}.items() if not only or any(word in n for word in only)}
    found = measured({name: build() for name, build in chosen.items()}, repeats)
    table = {}
    for name, record in found.items():
        mean, error = estimate(record.pop("result"))
        off = mean - exact.mean.numpy()
        record["standard_error"] = float(error.max())
        record["off"] = float(np.abs(off).max() if name == "kolmo, recursion" else (off / error).std())
        if name in SAMPLERS:
            record["million_path_steps_a_second"] = INPUTS * PATHS * DEPTH / record["seconds"] / 1e6
            record["seconds_to_target"] = record["seconds"] * (record["standard_error"] / TARGET) ** 2
        else:
            record["seconds_to_target"] = record["seconds"]
        table[name] = record
    return {"table": table, "ratios": ratios(table), "machine": machine()}


def ratios(table: dict[str, Any]) -> dict[str, float]:
    def of(name: str, key: str) -> float:
        return table[name][key] if name in table else float("nan")

    jax_time, torch_time = of("jax jit scan", "seconds_to_target"), of("torch loop", "seconds")
    values = (
        of("kolmo, arbitrary modules", "seconds") / torch_time,
        of("jax jit scan", "seconds") / of("kolmo, MLPBranch", "seconds"),
        jax_time / of("kolmo, control variate", "seconds_to_target"),
        jax_time / of("kolmo, recursion", "seconds_to_target"),
    )
    return dict(zip(GOALS, values, strict=True))


def machine() -> dict[str, Any]:
    packages = ("numpy", "torch", "torchsde", "jax", "numba", "kolmo")
    return {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        **{package: version(package) for package in packages},
    }


def show(found: dict[str, Any]) -> None:
    print(f"{'':<40} {'CPU s':>8} {'± ':>7} {'first':>7} {'M steps/s':>10} {'s.e.':>9} {'s to 1e-3':>10}  check")
    for name, r in found["table"].items():
        rate = f"{r['million_path_steps_a_second']:10.1f}" if "million_path_steps_a_second" in r else " " * 10
        check = f"off by {r['off']:.1e}" if name == "kolmo, recursion" else f"{r['off']:.2f} s.e. (rms of 64)"
        print(
            f"{name:<40} {r['seconds']:8.3f} {r['spread']:7.3f} {r['first']:7.2f} {rate} {r['standard_error']:9.1e} "
            f"{r['seconds_to_target']:10.2f}  {check}"
        )
    print()
    for (text, (sign, goal)), value in zip(GOALS.items(), found["ratios"].values(), strict=True):
        print(f"{text:<55} {value:8.2f}   (goal {sign} {goal:g})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", type=lambda text: text.split(","), default=[], help="words of the names to run")
    parser.add_argument("--json", type=Path, help="file for the records")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    found = compare(options.repeats, options.only)
    show(found)
    if not options.only:
        print()
        injection.report(3 * options.repeats, images=2000)
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
