"""Feed damaged files and arguments to the command line: no trace, and an exit code of 0, 1 or 2, come what may.

python -m validation.fuzz --minutes 10 --seed 0

Files are valid ones, damaged by swapped, repeated, dropped and replaced tokens; every call is interrupted after some
seconds, as by Ctrl-C. Failures are printed with what caused them.
"""

import argparse
import contextlib
import io
import random
import re
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

from kolmo import cli

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
WORDS = ("solve", "control", "list", "info", "report", "compare", "landscape", "experiment", "sweep", "demo", "--help")
WORDS += ("--json", "--out", "--set", "noise=0.1", "--seeds", "-1", "x", "", "--resume", "/dev/null", "é", "--rtol")
SECONDS = 3


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


def called(arguments: list[str]) -> tuple[Any, str]:
    """Exit code and everything that was shown."""
    shown = io.StringIO()
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown):
            return cli.main(arguments), shown.getvalue()
    except BaseException as error:
        return repr(error), shown.getvalue()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)


def main() -> int:
    """Feed until time is up; 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    rng, codes, failures = random.Random(chosen.seed), Counter[Any](), 0
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    end = time.monotonic() + 60.0 * chosen.minutes
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        path = Path("damaged.toml")
        while time.monotonic() < end:
            command, text = rng.choice(FILES)
            text = damaged(text, rng)
            path.write_text(text, encoding="utf-8")
            # nothing that trains or draws for long: words alone make no run but of the demo, which is interrupted
            words = [command, str(path)] if rng.random() < 0.8 else rng.choices(WORDS, k=rng.randint(0, 4))
            code, shown = called(words)
            codes[code] += 1
            if code not in (0, 1, 2) or "Traceback" in shown or "mistake in kolmo" in shown:
                failures += 1
                sys.stdout.write(f"--- {words} -> {code}\n{text if words[1:] == [str(path)] else ''}\n{shown}\n")
    sys.stdout.write(f"{sum(codes.values())} calls, exit codes {dict(codes)}, {failures} failures\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
