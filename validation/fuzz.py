"""Feed damaged files and arguments to the command line: no trace, and an exit code of 0, 1 or 2, come what may.

python -m validation.fuzz --minutes 10 --seed 0

Half of the calls solve equation files: valid ones, damaged by swapped, repeated, dropped and replaced tokens, or
by formulas that are long, deep or circular. The others are commands with odd words for their options and arguments:
folders, damaged runs, bytes that are no text, a large file, names in other scripts. Every call is interrupted after
some seconds of processor time, as by Ctrl-C. Failures are printed with what caused them.
"""

import argparse
import contextlib
import io
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

from kolmo import cli, experiments

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
LOST = re.compile(r"Exception ignored in:?.*?\nKeyboardInterrupt:? *\n", re.DOTALL)


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


def file(rng: random.Random) -> tuple[str, str]:
    """A command, and the text of a file for it."""
    command, text = rng.choice(FILES)
    accident = rng.randrange(8)
    if accident == 0:
        key = rng.choice(("drift", "terminal", "diffusion", "killing", "source"))
        return command, re.sub(rf"(?m)^{key} = .*$", lambda _: f'{key} = "{formula(rng)}"', text)
    if accident == 1:  # parameters that are defined by each other
        return command, text.replace("s = 0.2", 's = "q"\nq = "s"')
    return command, damaged(text, rng)


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


def harm(folder: Path, rng: random.Random) -> None:
    """A run folder, whole or with one file damaged."""
    shutil.rmtree(folder, ignore_errors=True)
    called(["experiment", "toy", "--out", str(folder), "--quiet"])
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    if not files or rng.random() < 0.3:
        return
    path = rng.choice(files)
    content = bytearray(path.read_bytes())
    accident = rng.randrange(4)
    if accident == 0:
        path.unlink()
    elif accident == 1:
        path.write_bytes(content[: len(content) // 2])
    elif accident == 2 and content:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
    else:
        path.write_bytes(rng.choice((b"", b"[]", b"null", b'{"name": 1, "config": 2}', b"\xff\xfe")))


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


def main() -> int:
    """Feed until time is up; 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    rng, codes, failures = random.Random(chosen.seed), Counter[Any](), 0
    signal.signal(signal.SIGPROF, signal.default_int_handler)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        furnish(Path(folder))
        for command, text in FILES:  # kernels are compiled and torch is imported before calls are cut short
            Path("damaged.toml").write_text(text, encoding="utf-8")
            cli.main([command, "damaged.toml", "--quiet"])
        cli.main(["landscape", "fuzzed_factory:made", "--points", "5", "--quiet"])
        cli.main(["experiment", "toy", "--quiet"])
        end = time.monotonic() + 60.0 * chosen.minutes
        while time.monotonic() < end:
            if rng.random() < 0.5:
                command, text = file(rng)
                Path("damaged.toml").write_text(text, encoding="utf-8")
                arguments = [command, "damaged.toml"]
            else:
                text, arguments = "", words(rng)
                if rng.random() < 0.3:
                    harm(Path("run"), rng)
            code, shown = called(arguments)
            codes[code] += 1
            if code not in (0, 1, 2) or "Traceback" in shown or "mistake in kolmo" in shown:
                failures += 1
                sys.stdout.write(
                    f"--- {arguments} -> {code}\n{text[:2000]}\n{shown}\n".encode(errors="replace").decode()
                )
                sys.stdout.flush()
            for made in ("runs", "new", "solved"):
                shutil.rmtree(made, ignore_errors=True)
    sys.stdout.write(f"{sum(codes.values())} calls, exit codes {dict(codes)}, {failures} failures\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
