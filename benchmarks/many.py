"""Price of an answer among many: problems like B1 with other parameters, solved together and one by one.

    python -m benchmarks.many [--count 1000] [--tolerance 1e-4]

Milliseconds of processor time for each problem, on one thread: together; together with gradients with respect to four
parameters of each; one by one by tolerance, and with a recipe that is known to be good (both for some of them). What
peers take for one of them tells ``python -m benchmarks.solver``. Errors are those against the exact answers.
"""

import os

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

import argparse  # noqa: E402
import math  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable  # noqa: E402
from typing import Any  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402

import kolmo  # noqa: E402
from benchmarks.problems import variant  # noqa: E402
from kolmo import control  # noqa: E402

# Problems that are solved one by one.
SOME = 20


def least(f: Callable[[], Any], times: int = 3) -> tuple[float, Any]:
    """Least processor time of some calls, and what the last one gave."""
    best, result = math.inf, f()
    for _ in range(times):
        begun = time.process_time()
        result = f()
        best = min(best, time.process_time() - begun)
    return best, result


def with_parameters(problem: Any, theta: torch.Tensor) -> kolmo.KolmogorovProblem:
    """The same problem in torch: rate, noise, place and precision of the bump are parameters."""
    rate, noise, mean, precision = theta
    sde = kolmo.SDE(lambda t, x: -rate * x, covariance=noise, dim=1)
    return kolmo.KolmogorovProblem(
        sde, lambda x: torch.exp(-0.5 * precision * (x[..., 0] - mean) ** 2), float(problem.T)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--tolerance", type=float, default=1e-4)
    parser.add_argument("--variant", type=int, default=1)
    given = parser.parse_args()
    base, rng, tol = variant(given.variant)["B1"], np.random.default_rng(given.variant), given.tolerance
    drawn, at = [base.varied(rng) for _ in range(given.count)], base.points()
    problems = [p.problem(boxed=False) for p in drawn]
    torch.set_num_threads(1)

    seconds, found = least(lambda: kolmo.solve_many(problems, at=at, rtol=0.0, atol=tol))
    errors = np.abs(found.values - [p.exact(at) for p in drawn])
    print(f"{found}; worst error {errors.max():.1e}, over its estimate {(errors / found.error_estimate).max():.2f}")
    rows = [("together", seconds / given.count)]

    rows_of = [[-p.A[0, 0], p.Sigma[0, 0], p.mean[0], p.precision] for p in drawn]
    theta = torch.tensor(rows_of, dtype=torch.float64, requires_grad=True)

    def gradient() -> torch.Tensor:
        parametrised = [with_parameters(p, row) for p, row in zip(drawn, theta.unbind(), strict=True)]
        u = control.values(parametrised, at, rtol=0.0, atol=tol)
        return torch.autograd.grad(u.square().sum(), theta)[0]

    rows.append(("together, problems made and gradients", least(gradient, 2)[0] / given.count))
    some = list(range(0, given.count, max(1, given.count // SOME)))[:SOME]

    def alone() -> list[kolmo.Solution]:
        return [kolmo.solve(problems[i], at=at, rtol=0.0, atol=tol) for i in some]

    seconds, solutions = least(alone, 2)
    rows.append(("one by one, by tolerance", seconds / len(some)))
    recipes = [solution.discretization for solution in solutions]

    def as_given() -> list[kolmo.Solution]:
        return [kolmo.solve(problems[i], discretization=r) for i, r in zip(some, recipes, strict=True)]

    rows.append(("one by one, recipe given", least(as_given, 3)[0] / len(some)))
    for name, each in rows:
        print(f"{name:40s} {1e3 * each:8.3f} ms each   {each / rows[0][1]:6.1f}")


if __name__ == "__main__":
    main()
