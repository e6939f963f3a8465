"""Kill runs, saves and reports at random moments, go on with them, and see that nothing was lost, torn or left behind.

python -m validation.kills --kills 500 --seed 0

What is killed: saves of a solution; an experiment made of units; a training that keeps checkpoints; `kolmo solve` and a
fit with `--out`; `kolmo report`; and, one kill in ten, what takes longer: the demo, small; a sweep on two Dask workers
of its own, and one on the two workers of a scheduler that was there before; and a training on two ranks of torchrun.
Each is begun in a process of its own, which is killed (SIGKILL) at a
moment drawn between its start and its usual end; where there are several, as often it is one of the others: a worker,
the scheduler, a rank. Then the folder is looked at, killed again now and then, and gone on with to the end, which must
be that of a run that nothing happened to; no process and no temporary may be left. The counts are printed.
"""

import argparse
import contextlib
import gzip
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
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
import time
from dataclasses import dataclass

import numpy as np
import torch

nets = importlib.import_module("kolmo.experiments._resnets")


@dataclass(frozen=True)
class Config:
    seed: int = 0
    units: int = 12
    train: bool = False
    pause: float = 0.0


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
        time.sleep(config.pause)
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


# The demo at the size of a test.
DEMO = {"noise": "0.3", "held_out": "40", "epochs": "3", "encoder_width": "8", "width": "6", "depth": "4"}
DEMO |= {"depths": "4,8", "paths": "20", "rtol": "1e-2", "depth_atol": "2e-6", "workers": "1"}


def demo() -> Callable[[], None]:
    sets = [word for key, value in DEMO.items() for word in ("--set", f"{key}={value}")]
    return command("demo", *sets, "--out", "run", go_on=("demo", "--resume", "run"))


ACTS: dict[str, Callable[[], None]] = {
    "save": save,
    "experiment": toy(),
    "training": toy("--set", "train=true"),
    "solve": command("solve", "solve.toml", "--out", "run"),
    "fit": command("control", "fit.toml", "--out", "run"),
    "report": rewrite,
}
"""What one process does, forked from this one."""

LONG: dict[str, Callable[[], None]] = {"demo": demo()}
"""The same, of what takes longer."""

# ------------------------------------------------------------------------------------------------ several processes

SWEEP = ["toy", "--set", "pause=0.03", "--vary", "units=8", "--vary", "units=9", "--seeds", "3"]
PROGRAM = "import sys; from kolmo import cli; sys.exit(cli.main(sys.argv[1:]))"
# What Python does when it starts: every process of a sweep must find the experiment.
SITE = """
import kolmo.experiments
kolmo.experiments.folder = lambda: __import__("pathlib").Path({folder!r})
kolmo.experiments.__path__ = [{folder!r}]
"""
# Two workers whose scheduler belongs to nobody who sweeps; they end with who started them.
CLUSTER = """
import sys
from distributed import LocalCluster
if __name__ == "__main__":
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None, silence_logs="ERROR") as cluster:
        print(cluster.scheduler_address, flush=True)
        sys.stdin.read()
"""
# The experiment as torchrun starts it, with the sums of small files.
RANK = """
import json, runpy, sys
from kolmo import images
images._MD5["fashion-mnist"] = json.loads(open("sums.json").read())
runpy.run_module("kolmo.experiments.images", run_name="__main__")
"""
TRAINED = {"data": ".", "seeds": 1, "batch": 16, "width": 4, "blocks": 1, "measured_images": 16, "epochs": 30}
TRAINED |= {"laws": "gaussian-0.3,shake-shake"}


class Cluster:
    """A scheduler and its workers outside of what is killed; begun again when they were."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._address = ""

    def address(self) -> str:
        """Where the scheduler listens."""
        if self._process is None or self._process.poll() is not None:
            with Path("cluster.py").open("w") as file:
                file.write(CLUSTER)
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
            self._process = subprocess.Popen([sys.executable, "cluster.py"], text=True, **pipes)  # type: ignore[call-overload]
            self._address = self._process.stdout.readline().strip()  # type: ignore[union-attr]
        return self._address

    def processes(self) -> list[int]:
        """The scheduler and its workers."""
        return [] if self._process is None else [self._process.pid, *children(self._process.pid)]

    def close(self) -> None:
        """End them."""
        if self._process is not None:
            self._process.communicate("")


def swept(*where: str) -> list[str]:
    begin = ["--resume", "run"] if Path("run").exists() else [*SWEEP[1:], "--out", "run"]
    return [sys.executable, "-c", PROGRAM, "sweep", SWEEP[0], *begin, *where, "--quiet"]


def ranks() -> list[str]:
    """Training on two ranks that talk over the loopback, of small files that look like the official ones."""
    rng, sums = np.random.default_rng(0), {}
    for name, shape in SHAPES.items():
        array = rng.integers(0, 10 if len(shape) == 1 else 256, shape, dtype=np.uint8)
        header = struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
        Path(name).write_bytes(gzip.compress(header + array.tobytes(), mtime=0))
        sums[name] = hashlib.md5(Path(name).read_bytes()).hexdigest()
    Path("sums.json").write_text(json.dumps(sums))
    Path("rank.py").write_text(RANK)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1"]
    return [*launch, "--master-port", port, "rank.py", "run", *(f"{key}={value}" for key, value in TRAINED.items())]


SHAPES = {
    "train-images-idx3-ubyte.gz": (64, 28, 28),
    "train-labels-idx1-ubyte.gz": (64,),
    "t10k-images-idx3-ubyte.gz": (32, 28, 28),
    "t10k-labels-idx1-ubyte.gz": (32,),
}
CLUSTERS = Cluster()
TOGETHER: dict[str, Callable[[], list[str]]] = {
    "sweep": lambda: swept("--workers", "2"),
    "scheduler": lambda: swept("--scheduler", CLUSTERS.address()),
    "torchrun": ranks,
}
"""The command that starts several processes."""


def begun(name: str) -> int:
    """Start something; the number of its first process."""
    if name not in TOGETHER:
        return forked((ACTS | LONG)[name])
    variables = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    arguments, nothing = TOGETHER[name](), os.open(os.devnull, os.O_RDWR)
    actions = [(os.POSIX_SPAWN_DUP2, nothing, i) for i in range(3)]
    try:
        return os.posix_spawn(arguments[0], arguments, variables, file_actions=actions)
    finally:
        os.close(nothing)


# ---------------------------------------------------------------------------------------------------------- looking


def answer(name: str) -> Any:
    """What the folder holds in the end, but for times and places."""
    if name == "save":
        return hashlib.sha256(np.ascontiguousarray(kolmo.load("u.npz").values).tobytes()).hexdigest()
    run = Run.open("kept" if name == "report" else "run")
    if name == "torchrun":
        return [path.read_bytes() for path in sorted(run.folder.glob("checkpoints/*.npz"))]
    assert run.status == "done", run.status
    metrics = sorted(str(line.get("i")) for line in run.metrics)
    arrays = sorted(path.name for path in run.folder.rglob("*.npz"))
    return json.dumps(timeless(files.plain([run.results, metrics, arrays, [run.load_unit(key) for key in run.units]])))


def timeless(tree: Any) -> Any:
    """Without what a clock said."""
    if isinstance(tree, dict):
        return {key: timeless(item) for key, item in tree.items() if "seconds" not in key}
    return [timeless(item) for item in tree] if isinstance(tree, list) else tree


def whole(*endings: str) -> None:
    """Everything that is there can be read; runs may have ended in these ways too."""
    if Path("u.npz").exists():
        kolmo.load("u.npz")
    for folder in ("run", "kept"):
        if Path(folder).exists():
            run = Run.open(folder)
            assert run.status in ("interrupted", "done", *endings), run.status
            for key in run.units:
                run.load_unit(key)
            if Path(folder, "report.html").exists():
                assert Path(folder, "report.html").read_text().endswith("</html>\n")


# Seconds after which something hangs, and after which the processes of one that was killed should have ended.
HANGING, LINGERING = 600.0, 30.0


def forked(act: Callable[[], None]) -> int:
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            act()
            os._exit(0)
        os._exit(1)
    return pid


def ended(pid: int) -> int:
    """How a process ends, in time."""
    limit = time.monotonic() + HANGING
    while (found := os.waitpid(pid, os.WNOHANG)) == (0, 0):
        if time.monotonic() > limit:
            for process in (pid, *children(pid)):
                os.kill(process, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise TimeoutError(f"no end after {HANGING:.0f} s")
        time.sleep(0.002)
    return os.waitstatus_to_exitcode(found[1])


def children(pid: int) -> list[int]:
    """Processes that a process started, and those that they started."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(path.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(path.parent.name))
    return [*found, *(grandchild for child in found for grandchild in children(child))]


def alone(processes: list[int]) -> None:
    """See processes end that were started by one that was killed."""
    limit = time.monotonic() + LINGERING
    while left := [pid for pid in processes if _alive(pid)]:
        assert time.monotonic() < limit, f"processes {left} go on"
        time.sleep(0.05)


def _alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def tried(name: str, expected: Any, usual: float, rng: random.Random, counts: Counter[str]) -> None:
    """Kill one thing once or a few times, and go on with it to the end."""
    endings: set[str] = set()
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        pid = begun(name)
        time.sleep(rng.uniform(0.0, usual))
        started = children(pid) if name in TOGETHER else []
        others = CLUSTERS.processes() if name == "scheduler" else started
        victim = rng.choice(others) if others and rng.random() < 0.5 else pid
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)
        code = ended(pid)
        counts[
            f"{name}, {'another of its processes' if victim != pid else 'killed' if code < 0 else 'at its end'}"
        ] += 1
        alone(started)
        endings |= {"failed"} if victim != pid else set()  # the run lives, and says what it lost
        whole(*endings)
    code = ended(begun(name)) if not _finished(name) else 0
    assert code == 0, f"goes on with {code}"
    assert answer(name) == expected, "another result"
    assert not list(Path().rglob("*.tmp")), "something was left"


def _finished(name: str) -> bool:
    return name not in ("save", "report", "torchrun") and Path("run").exists() and Run.open("run").status == "done"


def furnish(folder: Path) -> None:
    for name, text in (("solve.toml", SOLVE), ("fit.toml", FIT)):
        (folder / name).write_text(text)


def main() -> int:
    """Kill until the number is reached; 1 if anything was lost, torn or left."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--long", type=float, default=0.1, help="what part is of what takes longer")
    parser.add_argument("--only", choices=[*ACTS, *LONG, *TOGETHER], help="one kind only")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin nothing after so many minutes")
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rng, counts, failures = random.Random(chosen.seed), Counter[str](), 0
    with tempfile.TemporaryDirectory() as root:
        made = Path(root) / "experiments"
        (Path(root) / "sitecustomize.py").write_text(SITE.format(folder=str(made)))
        os.environ["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        shutil.copytree(experiments.folder(), made)
        (made / "toy.py").write_text(EXPERIMENT)
        experiments.folder = lambda: made
        experiments.__path__ = [str(made)]
        usual, expected = {}, {}
        for name in [chosen.only] if chosen.only else [*ACTS, *(LONG | TOGETHER if chosen.long > 0 else ())]:
            with _place(root, name):
                if name in ACTS:  # what is compiled and imported once
                    ACTS[name]()
                    shutil.rmtree("run", ignore_errors=True)
                elif name == "scheduler":
                    CLUSTERS.address()
                start = time.monotonic()
                assert ended(begun(name)) == 0, name
                usual[name], expected[name] = time.monotonic() - start, answer(name)
            sys.stdout.write(f"{name} usually takes {usual[name]:.2f} s\n")
            sys.stdout.flush()
        end = time.monotonic() + 60.0 * chosen.minutes
        while sum(counts.values()) < chosen.kills and time.monotonic() < end:
            takes_long = rng.random() < chosen.long
            kinds = [name for name in usual if (name not in ACTS) == takes_long]
            name = rng.choice(kinds or list(usual))
            with _place(root, name):
                try:
                    tried(name, expected[name], usual[name], rng, counts)
                except KeyboardInterrupt:  # what was found until then is told
                    break
                except BaseException as error:
                    failures += 1
                    found = sorted(str(path) for path in Path().rglob("*"))
                    sys.stdout.write(f"--- {name}: {type(error).__name__}: {error}\n{found}\n")
                    sys.stdout.flush()
        CLUSTERS.close()
    sys.stdout.write(f"{sum(counts.values())} kills, {failures} failures: {json.dumps(dict(sorted(counts.items())))}\n")
    return 1 if failures else 0


@contextlib.contextmanager
def _place(root: str, name: str) -> Iterator[None]:
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
