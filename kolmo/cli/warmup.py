"""Compile what a session will need, once: small problems of every kind, so that the next ones start at once."""

import warnings
from collections.abc import Callable
from time import perf_counter
from typing import Any

import click
import numpy as np

from kolmo.errors import KolmoWarning
from kolmo.kernels.first_use import clock
from kolmo.problem import SDE, Box, KolmogorovProblem

__all__ = ["TASKS", "warm_up"]


def warm_up(quiet: bool) -> dict[str, Any]:
    """Solve a small problem of every kind; return seconds by kind, and how many of them were compilation."""
    seconds, began, compiling = {}, perf_counter(), clock()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KolmoWarning)
        for name, task in TASKS.items():
            started = perf_counter()
            task()
            seconds[name] = round(perf_counter() - started, 2)
            if not quiet:
                click.echo(f"{name}: {seconds[name]:.1f} s", err=True)
    total = perf_counter() - began
    compiled = max(0.0, total - (clock() - compiling))
    return {"seconds": seconds, "total": round(total, 1), "compiled": round(compiled, 1)}


def _bump(x: Any) -> Any:
    return (-(x[..., 0] ** 2)).exp() if hasattr(x, "exp") else np.exp(-(x[..., 0] ** 2))


def _step(x: Any) -> Any:
    return 1.0 * (x[..., 0] > 0.2)


def _turning(t: float, x: Any) -> Any:
    return -x + 0.5 * (x[..., [1, 0]] if x.shape[-1] == 2 else x[..., [1, 2, 0]])


def _backward() -> None:
    from kolmo.solve import solve

    line, plane = SDE(lambda t, x: -x, 1.0, dim=1), SDE(_turning, np.array([[1.0, 0.0], [0.3, 0.8]]), dim=2)
    for data in (_bump, _step):
        solve(KolmogorovProblem(line, data, 0.5), at=[0.1], rtol=1e-3)
    solve(KolmogorovProblem(line, None, None, Box(-1.0, 1.0, "absorbing"), source=1.0), at=[0.1], rtol=1e-3)
    solve(KolmogorovProblem(line, _bump, 0.5, Box(-1.0, 1.0, "absorbing")), at=[0.1], rtol=1e-3)
    solve(KolmogorovProblem(plane, _bump, 0.5), at=[[0.1, 0.0]], rtol=1e-2)
    solve(KolmogorovProblem(SDE(_turning, 1.0, dim=3), _bump, 0.5), at=[[0.1, 0.0, 0.0]], rtol=3e-2)


def _forward() -> None:
    from kolmo.forward import solve_forward
    from kolmo.montecarlo import monte_carlo

    problem = KolmogorovProblem(SDE(lambda t, x: -x, 1.0, dim=1), _bump, 0.5, Box(-2.0, 1.0, "absorbing"))
    solve_forward(problem, [0.1], rtol=1e-2)
    monte_carlo(problem, [0.1], paths=64, steps=8, rng=0)


def _many() -> None:
    from kolmo.many import solve_many

    processes = [SDE(lambda t, x: -x, sigma, dim=1) for sigma in (0.8, 1.0, 1.2)]
    problems = [KolmogorovProblem(process, _bump, 0.5) for process in processes]
    solve_many(problems, at=[0.1], rtol=1e-3)


def _gradients() -> None:
    import torch

    from kolmo.control import Interval, solve_hjb, value
    from kolmo.control.problem import ControlProblem

    rate = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    for dim in (1, 2):
        sde = SDE(lambda t, x: -rate * x, 1.0, dim=dim, arrays="torch")
        value(KolmogorovProblem(sde, _bump, 0.5), [[0.1] * dim], rtol=1e-2).sum().backward()  # type: ignore[no-untyped-call]
    box = Box(-1.0, 1.0, "absorbing")
    controls = Interval(-1.0, 1.0)
    problem = ControlProblem(lambda t, x, a: a, 1.0, controls=controls, horizon=0.5, terminal=_bump, box=box)
    solve_hjb(problem, at=[0.1], rtol=1e-2)


def _likelihoods() -> None:
    import torch

    from kolmo import likelihood

    drift = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    trials = likelihood.Trials(np.array([0.4, 0.7, 1.1]), np.array([1, 0, 1]))
    likelihood.FirstPassage(lambda t, x, c: drift, 1.0, lower=-1.0, upper=1.0).likelihood(trials)().backward()  # type: ignore[no-untyped-call]
    sde = SDE(lambda t, x: x - x**3 + drift, 0.7, dim=1, arrays="torch")
    likelihood.paths(sde, np.array([0.0, 0.3, 0.6]), np.array([0.1, 0.2, 0.4]))().backward()  # type: ignore[no-untyped-call]


def _networks() -> None:
    import torch

    from kolmo import bridge

    branch = bridge.MLPBranch.create(2, 8, rng=0, dtype=torch.float64)
    net, x = bridge.NoisyResNet([branch] * 4, bridge.Additive(0.2)), torch.zeros(3, 2, dtype=torch.float64)
    for method in ("monte_carlo", "recursion"):
        with torch.no_grad():
            bridge.expected_loss(net, lambda z: z.square().sum(-1), x, method=method)


TASKS: dict[str, Callable[[], None]] = {
    "backward equations in one to three dimensions": _backward,
    "densities and paths": _forward,
    "many equations at once": _many,
    "gradients and control": _gradients,
    "likelihoods": _likelihoods,
    "noisy networks": _networks,
}
