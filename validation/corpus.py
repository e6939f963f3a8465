"""Equation files that kolmo once failed on, by what went wrong; every one must be answered or refused, at once."""

BASE = '[equation]\ndrift = "-x[0]"\ndiffusion = 1.0\nterminal = "x[0]"\nhorizon = 1.0\n'
AT = "[solve]\nat = [0.5]\nrtol = 1e-1\n"
CONTROL = '[equation]\ndrift = "a[0]"\ndiffusion = 1.0\nterminal = "x[0]**2"\nhorizon = 0.2\n'

CORPUS: dict[str, tuple[str, str]] = {
    "the line of a mistake behind many comments took 39 s": ("solve", "# x\n" * 7900 + "[equation]\nfoo = 1\n"),
    "a dotted key of 16,000 parts took 10 s to read": ("solve", "a." * 16_000 + "a = 1\n"),
    "a table of 16,000 parts": ("solve", "[" + "a." * 16_000 + "a]\n"),
    "a billion controls took 7.45 GiB": ("control", CONTROL + "[controls]\nunbounded = 1000000000\n" + AT),
    "a number of controls with 400 digits": ("control", CONTROL + "[controls]\nunbounded = " + "9" * 400 + "\n" + AT),
    "deep lists": ("solve", BASE + "[solve]\nat = " + "[" * 900 + "1" + "]" * 900 + "\n"),
    "lists deeper than NumPy's arrays": ("solve", BASE + "[solve]\nat = " + "[" * 70 + "1" + "]" * 70 + "\n"),
    "a number of 30,000 digits": ("solve", "[parameters]\na = " + "9" * 30_000 + "\n" + BASE + AT),
    "a power tower": ("solve", BASE.replace("-x[0]", "**".join(["9"] * 900)) + AT),
    "a formula nested 300 deep": ("solve", BASE.replace("-x[0]", "(" * 300 + "x[0]" + ")" * 300) + AT),
    "parameters that are each other": ("solve", '[parameters]\ns = "q"\nq = "s"\n' + BASE + AT),
    "keys that hide in texts": ("solve", BASE + "[solve]\nat = [0.5]\n'rtol = 1 # [fit]' = '''\n[equation]\n'''\n"),
    "a quoted key with everything in it": ("solve", BASE + '[solve]\nat = [0.5]\n"a]=[\\"#{." = 1\n'),
    "tables in one line": (
        "solve",
        'equation = { drift = 0, terminal = "x[0]", horizon = 1.0, foo = { a = [1, {b = 2}] } }\n',
    ),
    "an infinite horizon": ("solve", BASE.replace("horizon = 1.0", "horizon = inf") + AT),
    "a tiny horizon": ("solve", BASE.replace("horizon = 1.0", "horizon = 1e-320") + AT),
    "dates": ("solve", BASE.replace("1.0", "2020-01-01") + AT),
    "bytes that are no text": ("solve", BASE + "# \udcff\n" + AT),
}
"""Command and text of each."""
