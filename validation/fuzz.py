"""Feed random equations, damaged files and folders, and odd words to the command line and to `kolmo.load`.

python -m validation.fuzz --minutes 10 --seed 0
python -m validation.fuzz --calls 10000 --seed 0 --only mutated

Two in five calls solve equations that a grammar makes: most of them are valid, and solved; others have accidents
(swapped, repeated, dropped and replaced tokens; formulas that are long, deep or circular). As many report, resume or
compare what is in run folders of several kinds, or load what is in files, that were cut, flipped, emptied, replaced by
links and pipes, or given other values in any place of their trees. The others are commands with odd words for their
options and arguments. ``--only mutated`` makes damaged inputs alone, as many for each of load, report, solve and
resume. Every call is interrupted after some seconds of processor time, as by Ctrl-C. A failure is
anything but an exit code of 0, 1 or 2, or `kolmo.KolmoError`; a trace; the words "a mistake in kolmo"; ten seconds of
processor time; 1 GB of memory more than at the start; a file changed outside. It is printed with what caused it. What
was once found is kept in ``validation/corpus.py``, which the tests go through.
"""

import argparse
import contextlib
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import kolmo
from kolmo import cli, experiments, files
from kolmo.discretization import Discretization
from kolmo.kernels.first_use import clock
from kolmo.landscape import Curvature, Plane, Surface, curvature, random_plane, surface
from kolmo.runs import Run

SOLVE = """[parameters]
s = 0.2
[equation]
drift = "0.05 * x[0]"
diffusion = "s * x[0]"
terminal = "maximum(x[0] - 100, 0)"
killing = "0.05"
horizon = 1.0
[box]
lower = [0.0]
upper = [inf]
boundary = [["natural", "open"]]
[solve]
at = [90.0, 100.0]
rtol = 1e-2
"""
PLANE = """[equation]
drift = ["-x[0] + x[1]", "-x[1]"]
covariance = [["1.0", "0.2"], ["0.2", "0.5 + 0.1*sin(x[0])"]]
terminal = "exp(-x[0]**2 - x[1]**2)"
source = "0.1*t"
horizon = 0.5
[solve]
at = [[0.0, 0.0], [0.5, -0.5]]
rtol = 1e-1
"""
CONTROL = """[equation]
drift = "a[0]"
diffusion = 1.0
terminal = "x[0]**2"
running_cost = "0.5 * a[0]**2"
horizon = 0.2
[controls]
unbounded = 1
[solve]
at = [0.5]
rtol = 1e-1
"""
FILES = (("solve", SOLVE), ("solve", PLANE), ("control", CONTROL))
ODD = ("", "nan", "inf", "-1", "0", "1e308", "1e-320", "[]", "{}", '"', '"x[7]"', "'''", "true", "x[0]", "\x00", "é∂")
ODD += ('"__import__(1)"', '"x[0]**x[0]**9"', '"' + "(" * 300 + '"', "[[1.0]]", "2020-01-01", "a.b=1", "#", "\n[box]\n")
EXPERIMENT = '''
"""Draw a few numbers."""
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Config:
    seeds: int = 1
    seed: int = 0
    scale: float = 1.0
    depths: tuple[int, ...] = (1, 2)
    word: str = "x"


def run(config, run, progress):
    draw = lambda: {"sum": config.scale * float(np.random.default_rng(abs(config.seed)).normal())}
    run.record(step=1)
    run.save_arrays("x", x=np.arange(3.0))
    return run.unit("draw", draw)
'''
FACTORY = """
import torch


def made():
    model = torch.nn.Linear(2, 1)
    return model, lambda f: f.weight.square().sum()


def wrong():
    return 1
"""
# A run folder is always called run, and is damaged now and then.
GOOD = (
    ["experiment", "toy", "--set", "scale=2"],
    ["experiment", "toy", "--seeds", "2", "--out", "new"],
    ["experiment", "toy", "--resume", "run"],
    ["sweep", "toy", "--vary", "scale=1", "--vary", "scale=2", "--seeds", "2", "--workers", "0"],
    ["landscape", "fuzzed_factory:made", "--points", "5", "--draws", "1", "--seed", "1", "--span", "0.5"],
    ["compare", "run", "--examples", "3", "--order", "1", "--rtol", "1e-2"],
    ["report", "run"],
    ["solve", "good.toml", "--set", "s=0.3", "--out", "solved", "--save", "u.npz"],
    ["list"],
    ["info"],
    ["--version"],
)
WORDS = (
    "",
    "-1",
    "0",
    "x",
    "nan",
    "inf",
    "1e400",
    "9" * 400,
    "a=",
    "=1",
    "scale=nan",
    "depths=1,,2",
    "depths=x",
    "run",
)
WORDS += (
    "seed=é",
    "word=\n",
    "../..",
    "/dev/null",
    "/dev/full",
    "/proc/self/mem",
    ".",
    "bytes.toml",
    "large.toml",
    "--",
)
WORDS += ("--json", "--quiet", "--help", "--out", "--set", "--resume", "--seeds", "toy", "漢字", "\udcff", "a" * 5000)
WORDS += ("fuzzed_factory:wrong", "os:getcwd", "os:_exit", ":", "good.toml", "tcp://127.0.0.1:1", "state.pt", "--state")
SECONDS = 3
# An interrupt that comes while an object is finalised is shown by Python, and lost.
LOST = re.compile(r"Exception ignored (?:in|on):?.*?\nKeyboardInterrupt:? *\n", re.DOTALL)


def damaged(text: str, rng: random.Random) -> str:
    """The text after one to four accidents."""
    tokens = re.findall(r"\w+|\s|[^\w\s]", text)
    for _ in range(rng.randint(1, 4)):
        i, j = rng.randrange(len(tokens)), rng.randrange(len(tokens))
        accident = rng.randrange(5)
        if accident == 0:
            tokens[i], tokens[j] = tokens[j], tokens[i]
        elif accident == 1:
            tokens.insert(i, tokens[j])
        elif accident == 2:
            tokens[i] = ""
        else:
            tokens[i] = rng.choice(ODD)
    return "".join(tokens)


def formula(rng: random.Random) -> str:
    """A formula that is deep, long, or made of anything."""
    depth = rng.choice((5, 50, 99, 101, 1000, 50_000))
    kind = rng.randrange(6)
    if kind == 0:
        return "(" * depth + "x[0]" + ")" * depth
    if kind == 1:
        return "-" * depth + "x[0]"
    if kind == 2:
        return "+".join(["x[0]"] * depth)
    if kind == 3:
        return "sin(" * depth + "t" + ")" * depth
    if kind == 4:
        return "**".join(["9"] * min(depth, 900))
    pieces = (
        "x[0]",
        "t",
        "s",
        "(",
        ")",
        "+",
        "/",
        "**",
        "sin",
        ",",
        "if",
        "else",
        "lambda",
        ":",
        "[",
        "]",
        "1e999",
        ".",
        "é",
    )
    return "".join(rng.choices(pieces, k=rng.randint(1, 30)))


# ------------------------------------------------------------------------------------------------------ the grammar


def bounded(rng: random.Random, d: int, depth: int = 2) -> str:
    """A smooth formula between −1 and 1 or so."""
    if depth == 0 or rng.random() < 0.3:
        return rng.choice([f"x[{rng.randrange(d)}]", "s", "t", f"{rng.uniform(0.1, 2.0):.3g}"])
    inner = bounded(rng, d, depth - 1)
    kind = rng.randrange(6)
    if kind == 0:
        return f"{rng.choice(('sin', 'cos', 'tanh', 'arctan'))}({inner})"
    if kind == 1:
        return f"sin({inner} {rng.choice('+-*')} {bounded(rng, d, depth - 1)})"
    if kind == 2:
        return f"{rng.uniform(0.1, 1.0):.3g} * tanh({inner})"
    if kind == 3:
        return f"exp(-({inner})**2)"
    if kind == 4:
        return f"tanh({bounded(rng, d, depth - 1)} if x[0] > {rng.uniform(-1, 1):.2g} else {inner})"
    return f"cos({inner}) / (1 + x[{rng.randrange(d)}]**2)"


def terminal(rng: random.Random, d: int) -> str:
    """What is paid in the end: smooth, with a kink, or with a jump."""
    k = f"{rng.uniform(-1.0, 1.0):.3g}"
    kinds = [f"x[0]**{rng.randint(1, 3)}", f"maximum(x[0] - {k}, 0)", f"exp(-x[{d - 1}]**2)", bounded(rng, d)]
    return rng.choice([*kinds, f"x[0] > {k}" if d == 1 else "x[0] * x[1]"])


def equation(rng: random.Random) -> tuple[str, str]:
    """A command and a file that it can answer."""
    d = 1 if rng.random() < 0.8 else 2
    kind = "control" if d == 1 and rng.random() < 0.15 else "solve"
    pull = f"{rng.uniform(0.2, 2.0):.3g}"
    drift = [f"-{pull} * x[{i}] + {bounded(rng, d)}" for i in range(d)]
    noise = [f"{rng.uniform(0.4, 1.5):.3g}" + (f" + 0.2 * {bounded(rng, d, 1)}" if rng.random() < 0.3 else "")] * d
    lines = [f"horizon = {rng.uniform(0.1, 1.0):.3g}", f"terminal = {json.dumps(terminal(rng, d))}"]
    if kind == "control":
        drift = [drift[0] + " + a[0]"]
        lines += [
            'running_cost = "0.5 * a[0]**2"',
            f'sense = "{rng.choice(("min", "max"))}"' if rng.random() < 0.2 else "",
        ]
    else:
        lines += [f'killing = "{rng.uniform(0, 1):.2g}"' if rng.random() < 0.3 else ""]
        lines += [f"source = {json.dumps(bounded(rng, d))}" if rng.random() < 0.3 else ""]
    noisy = "diffusion" if rng.random() < 0.7 else "covariance"
    noise = [f"{c} + 0.5" if noisy == "covariance" else c for c in noise]
    shown = json.dumps(noise if noisy == "diffusion" else noise[0])
    lines += [f"drift = {json.dumps(drift)}", f"{noisy} = {shown}"]
    rng.shuffle(lines)
    if noisy == "covariance" and d == 2:
        lines = [line.replace(json.dumps(noise[0]), f'[["{noise[0]}", "0.1"], ["0.1", "1.5"]]') for line in lines]
    text = "[parameters]\ns = 0.2\n[equation]\n" + "\n".join(filter(None, lines)) + "\n"
    if rng.random() < 0.4 and d == 1:
        low, high = (rng.choice(("absorbing", "reflecting", "open")) for _ in range(2))
        text += f'[box]\nlower = [-3.0]\nupper = [3.0]\nboundary = [["{low}", "{high}"]]\n'
    points = [[round(rng.uniform(-1.0, 1.0), 2) for _ in range(d)] for _ in range(rng.randint(1, 3))]
    text += f"[solve]\nat = {points}\nrtol = {rng.choice(('1e-1', '1e-2'))}\n"
    if kind == "control":
        text += rng.choice(("[controls]\nunbounded = 1\n", "[controls]\nlower = [-1.0]\nupper = [1.0]\n"))
    return kind, text


def file(rng: random.Random, accidents: int = 24) -> tuple[str, str]:
    """A command, and the text of a file for it: three in four as the grammar makes them; of 6 accidents none."""
    command, text = equation(rng) if rng.random() < 0.9 else rng.choice(FILES)
    accident = rng.randrange(accidents)
    if accident == 0:
        key = rng.choice(("drift", "terminal", "diffusion", "killing", "source"))
        return command, re.sub(rf"(?m)^{key} = .*$", lambda _: f'{key} = "{formula(rng)}"', text)
    if accident == 1:  # parameters that are defined by each other
        return command, text.replace("s = 0.2", 's = "q"\nq = "s"')
    return command, damaged(text, rng) if accident < 6 else text


def words(rng: random.Random) -> list[str]:
    """A command with one to three words replaced, inserted or dropped."""
    chosen = list(rng.choice(GOOD))
    for _ in range(rng.randint(0, 3)):
        place = rng.randrange(len(chosen) + 1)
        chosen[place : place + rng.randint(0, 1)] = rng.choices(WORDS, k=rng.randint(0, 2))
    return chosen


def furnish(folder: Path) -> None:
    """Lay out what the commands are about."""
    (folder / "experiments").mkdir()
    (folder / "experiments" / "toy.py").write_text(EXPERIMENT)
    (folder / "fuzzed_factory.py").write_text(FACTORY)
    (folder / "good.toml").write_text(SOLVE)
    (folder / "bytes.toml").write_bytes(bytes(range(256)))
    (folder / "state.pt").write_bytes(b"PK\x03\x04 nothing")
    with (folder / "large.toml").open("wb") as large:
        large.truncate(2**40)  # a hole: no space is taken
    experiments.folder = lambda: folder / "experiments"
    experiments.__path__ = [str(folder / "experiments")]


# ------------------------------------------------------------------------------------------------- folders and files

VALUES = (
    None,
    True,
    -1,
    0,
    10**30,
    0.5,
    float("nan"),
    float("inf"),
    -1e308,
    "",
    "x",
    "../x",
    [],
    {},
    [[]],
    [1],
    {"a": 1},
)
ARRAYS = (np.zeros(0), np.zeros((2, 2, 2)), np.array([1j]), np.array(["x"]), np.full(3, np.nan), np.arange(4))
MADE = {
    "toy": ["experiment", "toy", "--seeds", "2"],
    "sweep": ["sweep", "toy", "--vary", "scale=1", "--vary", "scale=2", "--seeds", "2", "--workers", "0"],
    "landscape": ["landscape", "fuzzed_factory:made", "--points", "5"],
    "solved": ["solve", "good.toml"],
    "control": ["control", "control.toml"],
}
"""How the folders are made that are then damaged."""


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where a value can be changed in a tree."""
    inside = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [path, *(place for key, item in inside for place in places(item, (*path, key)))]


def changed(tree: Any, path: tuple[Any, ...], value: Any) -> Any:
    """The tree with another value in one place; left out if it is Ellipsis."""
    if not path:
        return value
    copy = dict(tree) if isinstance(tree, dict) else list(tree)
    if len(path) == 1 and value is ...:
        del copy[path[0]]
    else:
        copy[path[0]] = changed(copy[path[0]], path[1:], value)
    return copy


def harm(folder: Path, rng: random.Random) -> None:
    """Damage one file of a run folder."""
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    path = rng.choice(found)
    content = bytearray(path.read_bytes())
    accident = rng.randrange(10)
    if accident == 0:
        path.unlink()
    elif accident == 1:
        path.write_bytes(content[: rng.randrange(len(content) + 1)])
    elif accident == 2 and content:
        for _ in range(rng.choice((1, 1, 5))):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
    elif accident == 3:
        path.write_bytes(rng.choice((b"", b"[]", b"null", b'{"name": 1, "config": 2}', b"\xff\xfe", b"[" * 10**5)))
    elif accident == 4:
        path.unlink()
        kind = rng.choice(("pipe", "/dev/zero", "/dev/full", str(folder.parent / "outside" / "secret"), "nothing"))
        os.mkfifo(path) if kind == "pipe" else path.symlink_to(kind)
    elif accident == 5:
        path.write_bytes(rng.choice(found).read_bytes())
    elif path.suffix == ".json":
        tree = json.loads(content)
        value = rng.choice((*VALUES, ...))
        path.write_text(json.dumps(changed(tree, rng.choice(places(tree)[1:]), value)))
    elif path.suffix == ".npz":
        with contextlib.suppress(kolmo.KolmoError):
            tree = files.read_tree(path)
            files.write_tree(path, changed(tree, rng.choice(places(tree)[1:]), rng.choice((*VALUES, *ARRAYS, ...))))
    elif path.suffix in (".toml", ".jsonl", ".txt", ".html"):
        path.write_text(damaged(content.decode(errors="replace") or "x", rng), encoding="utf-8")


GOING_ON = {
    "toy": ["experiment", "toy", "--resume", "run", "--quiet"],
    "sweep": ["sweep", "toy", "--workers", "0", "--resume", "run", "--quiet"],
    "landscape": ["landscape", "--resume", "run", "--quiet"],
    "solved": ["solve", "good.toml", "--out", "run", "--quiet"],
    "control": ["control", "control.toml", "--out", "run", "--quiet"],
}
"""How they are gone on with."""


def on_folder(kind: str, rng: random.Random) -> list[str]:
    """What is done with a damaged folder."""
    arguments = [["report", "run"]] * 3 + [["compare", "run"], ["landscape", "run", "--points", "5"]]
    arguments += [GOING_ON[kind]] * (1 if kind in ("solved", "control") else 4)
    return rng.choice([*arguments, ["solve", "run/equation.toml", "--quiet"]])


LOADS: dict[str, Callable[[Path], Any]] = {
    "solution": kolmo.load,
    "recipe": Discretization.load,
    "plane": Plane.load,
    "surface": Surface.load,
    "curvature": Curvature.load,
    "arrays": files.read_npz,
    "tree": files.read_tree,
    "json": files.read_json,
    "run": lambda path: Run.open(path.parent),
}
"""What is read, each from a file of its own kind."""


def store(folder: Path) -> None:
    """Lay out one file of every kind."""
    import torch

    model = torch.nn.Linear(2, 1)
    plane = random_plane(model)
    problem = kolmo.KolmogorovProblem(kolmo.SDE(0.0, 1.0, dim=1), lambda x: abs(x[..., 0] - 0.1), 1.0)
    found = kolmo.solve(problem, at=[0.0], rtol=1e-2)
    things = {
        "solution": found,
        "recipe": found.discretization,
        "plane": plane,
        "surface": surface(lambda f: f.weight.square().sum(), model, plane, points=5),
        "curvature": curvature(lambda f: f.weight.square().sum(), model, top=1, probes=2),
    }
    for name, thing in things.items():
        (folder / name).mkdir(parents=True)
        thing.save(folder / name / "stored.npz")
    for name in ("arrays", "tree", "json", "run"):
        (folder / name).mkdir()
    files.write_npz(folder / "arrays" / "stored.npz", {"x": np.arange(9.0), "y": np.array(["a", "b"])})
    files.write_tree(folder / "tree" / "stored.npz", {"a": [1, {"b": np.ones((2, 3))}], "c": "x", "d": None})
    files.write_json(folder / "json" / "stored.json", {"a": [1, {"b": 0.5}], "c": "x", "d": None})
    files.write_json(folder / "run" / "config.json", {"name": "toy", "config": {"a": [1, {"b": 0.5}]}})


def on_file(rng: random.Random) -> tuple[str, Callable[[], Any]]:
    """Which file was damaged, and its load."""
    kind = rng.choice(list(LOADS))
    shutil.rmtree("stored", ignore_errors=True)
    shutil.copytree(Path("whole-stored") / kind, "stored")
    (path,) = Path("stored").absolute().iterdir()
    for _ in range(rng.choice((1, 1, 2))):
        with contextlib.suppress(ValueError, IndexError, OSError, RecursionError):
            harm(path.parent, rng)
    return kind, lambda: LOADS[kind](path)


def called(arguments: list[str]) -> tuple[Any, str]:
    """Exit code and everything that was shown."""
    shown = io.StringIO()
    signal.setitimer(signal.ITIMER_PROF, SECONDS, 1.0)  # again, where Python loses an interrupt
    try:
        with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown):
            return cli.main(arguments), LOST.sub("", shown.getvalue())
    except BaseException as error:
        return repr(error), LOST.sub("", shown.getvalue())
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0.0)


def loaded(load: Callable[[], Any]) -> tuple[Any, str]:
    """As `called`, for a function: 0, or 2 where it refuses by name."""
    try:
        found = load()
        return found if isinstance(found, tuple) else (0, repr(found))
    except kolmo.KolmoError as error:
        return 2, str(error)
    except BaseException as error:
        return repr(error), ""


def peak() -> float:
    """Largest memory so far, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def main() -> int:
    """Feed until time is up, or the calls are made; 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--calls", type=int, help="so many calls, whatever they take")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=KINDS, help="one kind of calls only")
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    rng, codes, failures, longest = random.Random(chosen.seed), Counter[Any](), 0, 0.0
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell started this in the background
    signal.signal(signal.SIGPROF, lambda *_: signal.raise_signal(signal.SIGINT))
    with tempfile.TemporaryDirectory() as root:
        outside, folder = Path(root) / "outside", Path(root) / "inside"
        outside.mkdir()
        folder.mkdir()
        (outside / "secret").write_text("precious")
        with contextlib.chdir(folder):
            furnish(folder)
            for command, text in FILES:  # kernels are compiled and torch is imported before calls are cut short
                Path("damaged.toml").write_text(text, encoding="utf-8")
                cli.main([command, "damaged.toml", "--quiet"])
            Path("control.toml").write_text(CONTROL)
            for kind, arguments in MADE.items():
                cli.main([*arguments, "--out", f"whole-{kind}", "--quiet"])
            store(folder / "whole-stored")
            begun, before = time.monotonic(), peak()
            while (
                sum(codes.values()) < chosen.calls if chosen.calls else time.monotonic() - begun < 60 * chosen.minutes
            ):
                label, what, call = drawn(rng, chosen.only)
                start, uncompiled = time.process_time(), clock()
                code, shown = loaded(call)
                seconds = min(time.process_time() - start, clock() - uncompiled)
                longest = max(longest, seconds)
                codes[f"{label}: {code}"] += 1
                kept = [path.name for path in outside.iterdir()] == ["secret"]
                kept = kept and (outside / "secret").read_text() == "precious" and len(os.listdir(root)) == 2  # noqa: PTH208
                raw = "Traceback" in shown or "mistake in kolmo" in shown or "precious" in shown
                large = peak() - before > 1.0
                if code not in (0, 1, 2) or raw or not kept or seconds > 10.0 or large:
                    failures += 1
                    told = f"--- {label} {what} -> {code} after {seconds:.1f} s\n{shown[-2000:]}\n"
                    sys.stdout.write(told.encode(errors="replace").decode())
                    sys.stdout.flush()
                for made in ("runs", "new", "solved"):
                    shutil.rmtree(made, ignore_errors=True)
    solved = codes["equations: 0"] / max(sum(n for key, n in codes.items() if key.startswith("equations")), 1)
    sys.stdout.write(
        f"{sum(codes.values())} calls, {failures} failures; {100 * solved:.0f} % of the equations solved; longest "
        f"{longest:.1f} s; {peak() - before:.2f} GB more than at the start; {json.dumps(dict(sorted(codes.items())))}\n"
    )
    return 1 if failures else 0


KINDS = ("equations", "folders", "files", "words", "mutated")
MUTATED = ("load", "report", "solve", "resume")


def drawn(rng: random.Random, only: str | None) -> tuple[str, str, Callable[[], Any]]:
    """Kind of a call, what it is about, and the call."""
    kind = only or rng.choice(("equations", "equations", "folders", "files", "words"))
    kind = rng.choice(MUTATED) if kind == "mutated" else kind
    if kind == "equations" or (kind == "solve" and rng.random() < 0.8):
        command, text = file(rng, 6 if kind == "solve" else 24)
        Path("damaged.toml").write_text(text, encoding="utf-8", errors="replace")
        return kind, f"{command}\n{text[:2000]}", lambda: called([command, "damaged.toml"])
    if kind in ("files", "load"):
        what, load = on_file(rng)
        return kind, what, load
    made = rng.choice(("solved", "control") if kind == "solve" else list(MADE))
    shutil.rmtree("run", ignore_errors=True)
    shutil.copytree(f"whole-{made}", "run")
    if kind == "resume" and made in ("solved", "control"):  # what is done is not done again
        status = files.read_json(Path("run/status.json"))
        files.write_json(Path("run/status.json"), {**status, "state": "interrupted"})
    if kind == "words":
        arguments = words(rng)
        if rng.random() < 0.3:
            harm(Path("run").absolute(), rng)
        return kind, str(arguments), lambda: called(arguments)
    for _ in range(rng.choice((1, 1, 2))):
        with contextlib.suppress(ValueError, IndexError, OSError, RecursionError):
            harm(Path("run").absolute(), rng)
    command = "control" if made == "control" else "solve"
    fixed = {"report": ["report", "run"], "resume": GOING_ON[made], "solve": [command, "run/equation.toml", "--quiet"]}
    arguments = fixed[kind] if kind in fixed else on_folder(made, rng)
    return kind, f"{made}: {arguments}", lambda: called(arguments)


if __name__ == "__main__":
    sys.exit(main())
