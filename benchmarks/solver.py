"""Time to accuracy on B1–B5: kolmo with the discretisation given and by tolerance alone, beside other packages.

    python -m benchmarks.solver [--only B1,B2] [--variant SEED] [--json FILE] [--plot FILE]

``--variant`` gives the problems other parameters, at random. The price is what kolmo by tolerance takes for a level of
accuracy over its cheapest given discretisation with an error as small as that answer's.

Every problem is solved by every package in one run, one thread, in many settings; the error of each is checked against
the exact solution, and the table gives the cheapest setting that reaches a level. Nobody knows that error in earnest:
what a peer takes to find it out, on two coarser grids and a wider box, is given beside it. Times are medians of warm
calls of the whole solve: assembly, factors and march. CPU time; on an idle machine use BENCHMARK_CLOCK=wall.
"""

import os

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

import argparse  # noqa: E402
import json  # noqa: E402
import warnings  # noqa: E402
from collections.abc import Iterator  # noqa: E402
from itertools import product  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import numpy as np  # noqa: E402

import kolmo  # noqa: E402
from benchmarks import peers  # noqa: E402
from benchmarks.problems import LEVELS, Heston, Linear, variant  # noqa: E402
from benchmarks.timing import CLOCK, Record, clock, measure, shown  # noqa: E402
from kolmo.steppers.base import STEPPERS  # noqa: E402

# Discretisations tried: nodes along each axis, steps (None: as many as the explicit method needs) and stepper. Grids of
# B2 and B4 are graded around the origin with the width below.
WIDTHS = {"B2": 2.5, "B4": 3.0}
GIVEN: dict[str, list[tuple[int, int | None, str]]] = {
    "B1": [(n, m, "radau5") for n, m in ((41, 3), (61, 4), (81, 5), (97, 6), (121, 8))],
    "B1s": [(n, m, "radau5") for n, m in ((31, 4), (41, 4), (61, 5), (81, 6), (97, 8), (121, 8))],
    "B2": [(n, None, "rk4") for n in (21, 25, 29, 33, 35, 37, 41, 43, 45)],
    "B4": [(n, None, "rk4") for n in (13, 17, 19, 21, 23, 25, 27, 29)],
    "B5": [(n, None, "rk4") for n in (51, 61, 71, 81, 91)]
    + [(n, m, "semi-lagrangian") for n, m in product((27, 31, 35, 39, 43, 51), (2, 3, 4))],
}
# B3: nodes along both axes and steps.
HESTON = (
    ((44, 12), 6),
    ((52, 14), 6),
    ((60, 14), 10),
    ((56, 16), 14),
    ((60, 18), 16),
    ((60, 18), 20),
    ((68, 22), 20),
    ((64, 22), 24),
)
TOLERANCES = (1e-2, 1e-3, 1e-4, 1e-5)
TOLERANCE = "kolmo, tolerance"
LIMIT = 5.0
"""Seconds after which a solver tries nothing finer on a problem."""


def march_of(problem: kolmo.KolmogorovProblem, recipe: kolmo.Discretization) -> float:
    """Seconds of the time loop alone: coefficients, factors and characteristics are there."""
    march = recipe.march(problem)
    u = recipe.initial(march)
    march.prepared(march.plans[0])
    return measure(lambda: march.backward(u), repeats=3)[1]


def given(p: Linear) -> Iterator[Record]:
    """kolmo with grid, steps and methods given."""
    problem = p.problem()
    for n, m, stepper in GIVEN[p.name]:
        grid = p.grid(n, WIDTHS.get(p.name))
        if m is None:
            generator = kolmo.discretize(problem, grid)
            m = int(np.ceil(p.T / STEPPERS[stepper].largest_step(*generator.stiffness())))
        start = clock()
        recipe = kolmo.solve(problem, grid=grid, steps=m, stepper=stepper).discretization
        first = clock() - start
        solution, whole, _ = measure(lambda recipe=recipe: kolmo.solve(problem, discretization=recipe))
        error = p.error(solution.grid.nodes, np.asarray(solution.values[0]))
        yield Record(p.name, "kolmo, given", f"{stepper} {n}, {m}", error, whole, first, march_of(problem, recipe))
        if whole > LIMIT:
            return


def by_tolerance(p: Linear) -> Iterator[Record]:
    """kolmo told the tolerance, on the whole space: box, grid, methods and steps are its own; errors at points."""
    problem, at = p.problem(boxed=False), p.points()
    exact = p.exact(at)
    for tolerance in TOLERANCES:
        run = lambda t=tolerance: kolmo.solve(problem, at=at, rtol=0.0, atol=t)  # noqa: E731
        solution, whole, first = measure(run, repeats=3)
        error = float(np.abs(solution(at).reshape(-1) - exact).max())
        yield Record(p.name, TOLERANCE, f"atol = {tolerance:g}", error, whole, first, note=solution.status)
        if whole > LIMIT:
            return


def heston(p: Heston) -> Iterator[Record]:
    """One price at the middle strike is timed; the error is the largest relative one over all strikes."""
    at, exact = p.points(), {k: p.exact(k) for k in p.strikes}
    middle = p.strikes[len(p.strikes) // 2]
    problems = {k: p.problem(k) for k in p.strikes}

    def worst(solutions: dict[float, Any]) -> float:
        return max(abs(float(s(at)[0]) / exact[k] - 1) for k, s in solutions.items())

    for n, m in HESTON:
        start = clock()
        solutions = {k: kolmo.solve(q, grid=p.grid(k, n), steps=m, stepper="mcs3") for k, q in problems.items()}
        first = (clock() - start) / len(problems)
        recipe = solutions[middle].discretization
        _, whole, _ = measure(lambda r=recipe: kolmo.solve(problems[middle], discretization=r))
        march = march_of(problems[middle], recipe)
        yield Record(p.name, "kolmo, given", f"mcs3 {n[0]}x{n[1]}, {m}", worst(solutions), whole, first, march)
    for rtol in (1e-2, 1e-3, 1e-4):
        run = lambda r=rtol: kolmo.solve(problems[middle], at=at, rtol=r, atol=0.0)  # noqa: E731
        _, whole, first = measure(run, repeats=3)
        solutions = {k: kolmo.solve(q, at=at, rtol=rtol, atol=0.0) for k, q in problems.items()}
        yield Record(p.name, TOLERANCE, f"rtol = {rtol:g}", worst(solutions), whole, first)


def records(only: set[str], seed: int | None = None) -> Iterator[Record]:
    for name, p in variant(seed).items():
        if only and name not in only:
            continue
        if isinstance(p, Heston):
            yield from heston(p)
        else:
            yield from given(p)
            yield from by_tolerance(p)
        for solver, settings in peers.PEERS.items():
            try:
                done = []
                for record in settings(p, LIMIT):
                    done.append(record)
                    yield record
                for record in best(done).values():
                    if record.finding_out is not None and record.found is None:
                        record.found = record.whole + record.finding_out()
            except ImportError as missing:
                print(f"{solver}: not installed ({missing.name})")


def best(done: list[Record]) -> dict[float, Record]:
    """The cheapest record that reaches each level, of one solver on one problem."""
    found = {}
    for level in LEVELS:
        good = [r for r in done if np.isfinite(r.error) and r.error <= level]
        if good:
            found[level] = min(good, key=lambda r: r.whole)
    return found


def table(done: list[Record]) -> str:
    """Per problem and solver, the cheapest setting that reaches each level."""
    lines = []
    for problem in dict.fromkeys(r.problem for r in done):
        lines += ["", f"{problem}: whole warm solve [setting; march alone] to an error of"]
        for solver in dict.fromkeys(r.solver for r in done if r.problem == problem):
            mine = [r for r in done if r.problem == problem and r.solver == solver and np.isfinite(r.error)]
            cells, cheapest = [], best(mine)
            for level in LEVELS:
                r = cheapest.get(level)
                if r is None:
                    cells.append(f"{level:.0e}: – (least {min((r.error for r in mine), default=np.inf):.1e})")
                    continue
                march = "" if r.march is None else f"; {shown(r.march)}"
                known = "" if r.found is None else f", to know it {shown(r.found)}"
                cells.append(f"{level:.0e}: {shown(r.whole)}{known} [{r.setting}{march}]")
            extra = max((r.first - r.whole for r in mine), default=0.0)
            lines.append(f"  {solver:17}" + " | ".join(cells) + f" | first call +{shown(max(extra, 0.0))}")
    return "\n".join(lines)


def prices(done: list[Record]) -> str:
    """Per problem and tolerance, by tolerance over the cheapest given discretisation of the same error."""
    lines = []
    for problem in dict.fromkeys(r.problem for r in done):
        given_, asked = (
            [r for r in done if (r.problem, r.solver) == (problem, s)] for s in ("kolmo, given", TOLERANCE)
        )
        told = []
        for r in asked:
            level = max(r.error, min((g.error for g in given_), default=np.inf))
            best = min((g.whole for g in given_ if g.error <= level), default=np.nan)
            told.append(
                f"{r.setting}: {r.whole / best:.1f}" + ("" if level == r.error else " (given is less accurate)")
            )
        lines.append(f"  {problem:4} " + " | ".join(told))
    return "\nprice of a tolerance, in solves with the discretisation given\n" + "\n".join(lines)


def plot(done: list[Record], path: Path) -> None:
    """Error over time, one panel a problem; of each solver the settings that no other of its own beats."""
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(r.problem for r in done))
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3.6 * columns, 3.0 * rows), layout="constrained", squeeze=False)
    solvers = list(dict.fromkeys(r.solver for r in done))
    colours = dict(zip(solvers, plt.get_cmap("tab10").colors, strict=False))  # type: ignore[attr-defined]
    for ax, name in zip(axes.flat, names, strict=False):
        for solver in solvers:
            mine = sorted((r for r in done if r.problem == name and r.solver == solver), key=lambda r: r.whole)
            front = [r for i, r in enumerate(mine) if all(r.error < q.error for q in mine[:i])]
            if front:
                own = solver.startswith("kolmo")
                style: dict[str, Any] = {"marker": "o" if own else ".", "lw": 2.0 if own else 1.0, "label": solver}
                ax.loglog([1e3 * r.whole for r in front], [r.error for r in front], color=colours[solver], **style)
        ax.set(title=name, xlabel="ms", ylabel="error")
        ax.grid(alpha=0.3)
    for ax in axes.flat[len(names) :]:
        ax.axis("off")
    handles = {h: s for ax in axes.flat for h, s in zip(*ax.get_legend_handles_labels(), strict=True)}
    unique = {s: h for h, s in handles.items()}
    figure.legend(list(unique.values()), list(unique), loc="outside lower center", ncols=len(unique), fontsize=8)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", help="names of problems, with commas")
    parser.add_argument("--variant", type=int, metavar="SEED", help="other parameters, at random")
    parser.add_argument("--json", type=Path, help="file for the records")
    parser.add_argument("--plot", type=Path, help="file for the work–precision plot")
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    done = []
    for r in records(set(filter(None, chosen.only.split(","))), chosen.variant):
        done.append(r)
        print(f"{r.problem:4} {r.solver:17} {r.setting:28} error {r.error:.1e} in {shown(r.whole)}", flush=True)
    print(table(done) + prices(done) + f"\n({CLOCK} time, one thread)")
    if chosen.json:
        chosen.json.write_text(json.dumps({"clock": CLOCK, "records": [r.as_dict() for r in done]}, indent=1))
    if chosen.plot:
        plot(done, chosen.plot)


if __name__ == "__main__":
    main()
