"""Kill runs, saves and reports at random moments, go on with them, and see that nothing was lost, torn or left behind.

python -m validation.kills --kills 500 --seed 0

What is killed: saves of a solution; an experiment made of units; a training that keeps checkpoints; `kolmo solve` and a
fit with `--out`; `kolmo report`; and sweeps on two Dask workers (one in fifty, they take long to start). Each is begun
in a process of its own, killed (SIGKILL) at a moment drawn between its start and its usual end, looked at, killed again
now and then, and gone on with to the end, which must be that of a run that nothing happened to. The counts are printed.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import kolmo
from kolmo import cli, experiments, files
from kolmo.runs import Run

EXPERIMENT = '''
"""Draw and train."""
import importlib
from dataclasses import dataclass

import numpy as np
import torch

nets = importlib.import_module("kolmo.experiments._nets")


@dataclass(frozen=True)
class Config:
    seed: int = 0
    units: int = 12
    train: bool = False


def run(config, run, progress):
    if config.train:
        torch.manual_seed(config.seed)
        model = torch.nn.Linear(8, 3)
        x, y = torch.randn(64, 8), torch.randint(0, 3, (64,))
        recipe = nets.Recipe(epochs=12, batch=16)
        loss = nets.train(model, x, y, recipe, config.seed, checkpoint=run.folder / "checkpoints" / "only.npz")
        return {"loss": loss, "weights": nets.weights(model)["weight"]}

    def work(i):
        run.record(i=i)
        return np.random.default_rng([config.seed, i]).normal(size=500)

    found = [run.unit(f"unit-{i}", lambda i=i: work(i)) for i in range(config.units)]
    run.save_arrays("all", found=np.stack(found))
    return {"sum": float(np.sum(found))}
'''
SOLVE = """
equation = { drift = "-x[0]", diffusion = 0.5, terminal = "x[0]**2", horizon = 1.0 }
solve = { at = [0.5, 1.0], rtol = 1e-3 }
"""
FIT = """
parameters = { kappa = 0.3 }
equation = { drift = "-kappa * x[0]", diffusion = 0.5, terminal = "x[0]**2", horizon = 1.0 }
solve = { at = [1.0], rtol = 1e-2 }
fit = { parameters = ["kappa"], targets = [0.3] }
"""


def quiet(arguments: list[str]) -> int:
    """The command line, silent."""
    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing), contextlib.redirect_stderr(nothing):  # noqa: PTH123
        return cli.main([*arguments, "--quiet"] if arguments[0] != "report" else arguments)


def save() -> None:
    """Save a solution again and again."""
    problem = kolmo.KolmogorovProblem(kolmo.SDE(0.0, 1.0, dim=1), lambda x: x[..., 0], 1.0, kolmo.Box([0], [1]))
    found = kolmo.solve(problem, grid=4001, steps=2, save=[0.5, 1.0])
    for _ in range(20):
        found.save("u.npz")


def command(*begin: str, go_on: tuple[str, ...] = ()) -> Callable[[], None]:
    """Begin a run in the folder `run`, or go on with it."""

    def act() -> None:
        there = Path("run").exists()
        assert quiet([*(go_on if there and go_on else begin)]) == 0

    return act


def toy(*settings: str) -> Callable[[], None]:
    return command("experiment", "toy", *settings, "--out", "run", go_on=("experiment", "toy", "--resume", "run"))


def rewrite() -> None:
    """Write the report of a run again and again."""
    for _ in range(10):
        assert quiet(["report", "kept"]) == 0


ACTS: dict[str, Callable[[], None]] = {
    "save": save,
    "experiment": toy(),
    "training": toy("--set", "train=true"),
    "solve": command("solve", "solve.toml", "--out", "run"),
    "fit": command("control", "fit.toml", "--out", "run"),
    "report": rewrite,
}
SWEEP = ["sweep", "lqg", "--set", "paths=500", "--vary", "sigma=0.3", "--vary", "sigma=0.6", "--seeds", "2"]


def answer() -> Any:
    """What the folder holds in the end, but for times and places."""
    if Path("u.npz").exists():
        return hashlib.sha256(np.ascontiguousarray(kolmo.load("u.npz").values).tobytes()).hexdigest()
    run = Run.open("run" if Path("run").exists() else "kept")
    assert run.status == "done", run.status
    metrics = sorted(str(line.get("i")) for line in run.metrics)
    arrays = {
        path.name: files.read_tree(path) if path.parent.name == "units" else 0 for path in run.folder.rglob("*.npz")
    }
    return json.dumps(files.plain([run.results, metrics, run.units, sorted(arrays)]))


def whole() -> None:
    """Everything that is there can be read."""
    if Path("u.npz").exists():
        kolmo.load("u.npz")
    for folder in ("run", "kept"):
        if Path(folder).exists():
            run = Run.open(folder)
            assert run.status in ("interrupted", "done"), run.status
            for key in run.units:
                run.load_unit(key)
            if Path(folder, "report.html").exists():
                assert Path(folder, "report.html").read_text().endswith("</html>\n")


def forked(act: Callable[[], None]) -> int:
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            act()
            os._exit(0)
        os._exit(1)
    return pid


def swept() -> None:
    """A sweep on Dask workers, in a process that can be killed with them or alone."""
    arguments = ["sweep", "lqg", "--resume", "run"] if Path("run").exists() else [*SWEEP, "--out", "run"]
    program = "import sys; from kolmo import cli; sys.exit(cli.main(sys.argv[1:]))"
    os.execv(sys.executable, [sys.executable, "-c", program, *arguments, "--workers", "2", "--quiet"])


def ended(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def children(pid: int) -> list[int]:
    told = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False)
    found = [int(word) for word in told.stdout.split()]
    return [*found, *(grandchild for child in found for grandchild in children(child))]


def tried(name: str, expected: Any, usual: float, rng: random.Random, counts: Counter[str]) -> None:
    """Kill one thing once or a few times, and go on with it to the end."""
    act = swept if name == "sweep" else ACTS[name]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        pid = forked(act)
        time.sleep(rng.uniform(0.0, usual))
        victim = pid
        if name == "sweep" and rng.random() < 0.5:  # a worker, not the run
            victim = rng.choice([pid, *children(pid)])
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)
        code = ended(pid)
        counts[
            f"{name} killed" if code == -signal.SIGKILL else f"{name} ended" if victim == pid else "worker killed"
        ] += 1
        whole()
    code = ended(forked(act)) if not _finished(name) else 0
    assert code == 0, f"goes on with {code}"
    assert answer() == expected, "another result"
    assert not list(Path().rglob("*.tmp")), "something was left"


def _finished(name: str) -> bool:
    return name not in ("save", "report") and Path("run").exists() and Run.open("run").status == "done"


def furnish(folder: Path) -> None:
    for name, text in (("solve.toml", SOLVE), ("fit.toml", FIT)):
        (folder / name).write_text(text)


def main() -> int:
    """Kill until the number is reached; 1 if anything was lost, torn or left."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sweeps", type=float, default=0.02, help="what part of the kills are of sweeps")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin nothing after so many minutes")
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rng, counts, failures = random.Random(chosen.seed), Counter[str](), 0
    nets = experiments.folder() / "_resnets.py"
    with tempfile.TemporaryDirectory() as root:
        made = Path(root) / "experiments"
        made.mkdir()
        (made / "toy.py").write_text(EXPERIMENT)
        shutil.copy(nets, made / "_nets.py")
        experiments.folder = lambda: made
        experiments.__path__ = [str(made)]
        usual, expected = {}, {}
        for name in [*ACTS, "sweep"] if chosen.sweeps > 0 else ACTS:
            with _place(root, name):
                begun = time.monotonic()
                if name == "sweep":
                    assert ended(forked(swept)) == 0
                else:
                    ACTS[name]()
                    begun = time.monotonic()
                    Path("run").exists() and shutil.rmtree("run")
                    assert ended(forked(ACTS[name])) == 0, name
                usual[name], expected[name] = time.monotonic() - begun, answer()
        told = {name: round(seconds, 2) for name, seconds in usual.items()}
        sys.stdout.write(f"usual seconds: {json.dumps(told)}\n")
        sys.stdout.flush()
        end = time.monotonic() + 60.0 * chosen.minutes
        while sum(counts.values()) < chosen.kills and time.monotonic() < end:
            name = "sweep" if rng.random() < chosen.sweeps else rng.choice(list(ACTS))
            with _place(root, name):
                try:
                    tried(name, expected[name], usual[name], rng, counts)
                except BaseException as error:
                    failures += 1
                    found = sorted(str(path) for path in Path().rglob("*"))
                    sys.stdout.write(f"--- {name}: {type(error).__name__}: {error}\n{found}\n")
                    if isinstance(error, KeyboardInterrupt):
                        raise
    sys.stdout.write(f"{sum(counts.values())} kills, {failures} failures: {json.dumps(dict(sorted(counts.items())))}\n")
    return 1 if failures else 0


@contextlib.contextmanager
def _place(root: str, name: str) -> Any:
    """A fresh folder with what the act needs."""
    folder = Path(tempfile.mkdtemp(dir=root))
    with contextlib.chdir(folder):
        furnish(folder)
        if name == "report":
            assert quiet(["experiment", "toy", "--out", "kept"]) == 0
        yield
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
