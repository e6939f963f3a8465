"""Equation files: the right problem comes out, mistakes are named with line and key, nothing is run as code."""

import importlib
import json
import math
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import ndtr

from kolmo.cli import main
from kolmo.equations import read
from kolmo.equations.expressions import FUNCTIONS, Expression
from kolmo.errors import InputError

# ------------------------------------------------------------------------------------------------------- formulas

ORDINARY = [
    ("x[0]**2 + sin(t) * x[1]", lambda t, k, x, y: x**2 + math.sin(t) * y),
    ("0 < x[0] < 1", lambda t, k, x, y: float(0 < x < 1)),
    ("maximum(x[0] - k, 0, x[1])", lambda t, k, x, y: max(x - k, 0, y)),
    ("where(x[0] > 0 and not x[1] > 0, 1, -x[0])", lambda t, k, x, y: 1.0 if x > 0 and not y > 0 else -x),
    ("x[0] if x[1] > 0 or x[0] < -1 else erf(x[1])", lambda t, k, x, y: x if y > 0 or x < -1 else math.erf(y)),
    ("exp(-k * abs(x[0])) % 0.3 / (1 + pi)", lambda t, k, x, y: math.exp(-k * abs(x)) % 0.3 / (1 + math.pi)),
    ("2 * k", lambda t, k, x, y: 2 * k),
]


@pytest.mark.parametrize(("text", "meaning"), ORDINARY)
def test_a_formula_means_what_it_says_in_numpy_and_in_torch(text, meaning, rng):
    x = rng.normal(size=(50, 2))
    f = Expression(text, scalars=["t", "k"], vectors={"x": 2})
    expected = [meaning(0.3, 0.7, *point) for point in x.tolist()]
    assert np.allclose(f({"t": 0.3, "k": 0.7, "x": x}), expected, rtol=1e-14)
    k = torch.tensor(0.7, dtype=torch.float64)
    assert np.allclose(f({"t": 0.3, "k": k, "x": torch.as_tensor(x)}), expected, rtol=1e-14)


def test_parameters_of_a_formula_have_gradients():
    k = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    f = Expression("exp(-k * x[0]) + maximum(k, 0.1)", scalars=["k"], vectors={"x": 1})
    f({"k": k, "x": torch.ones(1, 1, dtype=torch.float64)}).sum().backward()
    assert math.isclose(k.grad.item(), 1.0 - math.exp(-0.7))


HOSTILE = [
    "__import__('os').system('touch exploded')",
    "().__class__.__base__.__subclasses__()",
    "x.__class__",
    "(lambda: 1)()",
    "[y for y in (1,)]",
    "open('exploded', 'w')",
    "f'{x}'",
    "x[0:1]",
    "x[-1]",
    "x[2]",
    "x[True]",
    "x",
    "sin",
    "sin(1, 2)",
    "sin(*x)",
    "True",
    "1j",
    "'a' * 10",
    "x[0] ^ 2",
    "x[0] <",
    "9" * 3000,
    "1 + " * 3000 + "1",
    "-" * 3000 + "1",
    "(" * 300 + "1" + ")" * 300,
    "",
    "\0",
    "\ud800",
    "_ := 1",
    "yield 1",
    "1 is 1",
    "x[0] @ x[1]",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_anything_else_is_refused(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="drift: got"):
        Expression(text, scalars=["t"], vectors={"x": 2}, argument="drift")
    assert list(tmp_path.iterdir()) == []


def test_powers_of_numbers_are_quick_and_never_raise():
    values = {"x": np.ones((3, 1))}
    assert Expression("9**9**9**9", vectors={"x": 1})(values) == math.inf
    assert math.isnan(Expression("(-1)**0.5 + 1/0", vectors={"x": 1})(values))


WORDS = "+ - * / % ** ( ) [ ] , < > == and or not if else x[0] x[1] t k 2 .5 1e308 lambda . : ' ^ @ #"
PIECES = st.sampled_from([*FUNCTIONS, *WORDS.split(), "\n"])
TEXTS = st.lists(PIECES, max_size=12).map(" ".join) | st.text(max_size=30)


@settings(max_examples=400, deadline=None)
@given(TEXTS)
def test_every_text_is_a_formula_or_an_input_error(text):
    try:
        f = Expression(text, scalars=["t", "k"], vectors={"x": 2})
    except InputError:
        return
    value = f({"t": 0.1, "k": 2.0, "x": np.array([[0.5, -1.0], [2.0, 0.0]])})
    assert np.shape(value) in ((), (2,))


# ---------------------------------------------------------------------------------------------------------- files

CALL = """
[parameters]
K = 100.0
r = 0.05
s = 0.2

[equation]
drift = "r * x[0]"
diffusion = "s * x[0]"
terminal = "maximum(x[0] - K, 0)"
killing = "r"
horizon = 1.0

[box]
lower = [0.0]
upper = [inf]
boundary = [["natural", "open"]]

[solve]
at = [90.0, 100.0]
rtol = 1e-4
"""
EXIT = """
[equation]
diffusion = 1
source = 1
[box]
lower = -1
upper = 1
boundary = "absorbing"
[solve]
at = [0.0, 0.5]
rtol = 1e-6
"""
OSCILLATOR = """
[equation]
drift = ["x[1]", "-x[0]"]
diffusion = [[0.0], [0.7]]
terminal = ["x[0]", "x[0]**2 + x[1]**2"]
horizon = 0.5
[solve]
at = [[0.5, 0.1], [1, 1]]
rtol = 1e-5
"""
FACES = """
[equation]
drift = 0.1
covariance = 2.0
terminal = "x[0]"
horizon = 1
source = -0.1
[box]
lower = [-1]
upper = [1]
boundary = [[{ absorbing = -1 }, { kappa = 2.0, value = "1 + 2 * x[0]" }]]
[solve]
at = [0.25]
rtol = 1e-6
"""


def written(folder, text):
    path = folder / "equation.toml"
    path.write_text(text)
    return str(path)


def black_scholes(x, strike, r, s):
    d = (math.log(x / strike) + r + 0.5 * s * s) / s
    normal = lambda z: 0.5 * (1 + math.erf(z / math.sqrt(2)))  # noqa: E731
    return x * normal(d) - strike * math.exp(-r) * normal(d - s)


def rotated(x, y):
    """Mean of the first coordinate, and of |X|², of the undamped oscillator with noise 0.7 on its speed."""
    return [x * math.cos(0.5) + y * math.sin(0.5), x * x + y * y + 0.49 * 0.5]


BARRIER = """
[parameters]
h = 0.9
[equation]
drift = 0.0
diffusion = 1.0
terminal = "1"
horizon = 1.0
[box]
lower = [-inf]
upper = ["h - 0.6 * t"]
boundary = [["open", "absorbing"]]
[solve]
at = [0.0]
rtol = 1e-5
"""

DIVIDEND = CALL.replace(
    "[solve]",
    """
[events]
times = [0.3, 0.6]
pay = "K * exp(r * t) / 100"
move = "(1 - 0.1 * t) * x[0]"

[solve]
""",
)

EXACT = [
    (DIVIDEND, [black_scholes(0.97 * 0.94 * x, 100.0, 0.05, 0.2) + 2.0 for x in (90.0, 100.0)]),
    (BARRIER, [ndtr(0.3) - np.exp(1.08) * ndtr(-1.5)]),
    (CALL, [black_scholes(x, 100.0, 0.05, 0.2) for x in (90.0, 100.0)]),
    (EXIT, [1.0, 0.75]),
    (OSCILLATOR, [rotated(0.5, 0.1), rotated(1.0, 1.0)]),
    (FACES, [0.25]),
]


@pytest.mark.parametrize(("text", "exact"), EXACT, ids=["dividend", "barrier", "call", "exit", "oscillator", "faces"])
def test_solve_prints_the_answer_with_its_error(text, exact, tmp_path, capsys):
    assert main(["solve", written(tmp_path, text), "--json", "--quiet"]) == 0
    out, err = capsys.readouterr()
    answer = json.loads(out)
    tolerance = tomllib.loads(text)["solve"]["rtol"] * np.abs(exact).max() + 1e-6
    assert np.abs(np.array(answer["values"]) - exact).max() < tolerance
    assert np.shape(answer["error_estimate"]) == np.shape(exact)
    assert answer["status"] == "converged"
    assert err == ""


def test_values_go_to_stdout_and_the_rest_to_stderr(tmp_path, capsys):
    assert main(["solve", written(tmp_path, EXIT)]) == 0
    out, err = capsys.readouterr()
    first, second = out.splitlines()
    assert first.startswith("u(0, 0) = 1 ± ")
    assert second.startswith("u(0, 0.5) = 0.75 ± ")
    assert "converged" in err


def test_a_parameter_is_set_and_the_solution_saved(tmp_path, capsys):
    import kolmo

    path = written(tmp_path, CALL)
    saved = str(tmp_path / "u.npz")
    assert main(["solve", path, "--set", "K=80", "--set", "s=0.1", "--save", saved, "--json", "--quiet"]) == 0
    values = json.loads(capsys.readouterr().out)["values"]
    assert abs(values[1] - black_scholes(100.0, 80.0, 0.05, 0.1)) < 1e-2
    assert abs(kolmo.load(saved)(100.0) - values[1]) < 1e-12
    assert main(["solve", path, "--set", "L=80"]) == 2
    assert main(["solve", path, "--set", "K=many"]) == 2
    assert main(["solve", path, "--quiet", "--save", str(Path(path) / "u.npz")]) == 1
    assert "cannot write" in capsys.readouterr().err


def test_a_tolerance_that_is_not_met_is_said_and_exits_with_1(tmp_path, capsys, monkeypatch):
    module = importlib.import_module("kolmo.solve")
    real = module.search
    monkeypatch.setattr(module, "search", lambda *a, **k: real(*a, **k | {"max_cells": 60}))
    assert main(["solve", written(tmp_path, CALL.replace("1e-4", "1e-9")), "--quiet"]) == 1
    out, err = capsys.readouterr()
    assert out.startswith("u(0, 90) = 5.0")
    assert "tolerance_not_met" in err
    assert "Warning" not in err


STEERED = """
[parameters]
c = 0.5
[equation]
drift = "a[0]"
diffusion = 1.0
terminal = "x[0]**2"
running_cost = "c * a[0]**2"
horizon = 1.0
[controls]
unbounded = 1
[solve]
at = [0.5]
"""


def test_control_solves_a_quadratic_problem(tmp_path, capsys):
    assert main(["control", written(tmp_path, STEERED), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    # Riccati: V = x²/(1 + T/c) + c log(1 + T/c), a = −x/(c + T)
    assert abs(answer["values"][0] - (0.25 / 3 + 0.5 * math.log(3))) < 1e-3
    assert abs(answer["policy"][0][0] + 1 / 3) < 1e-3


def test_control_fits_the_parameters_that_made_the_values(tmp_path, capsys):
    targets = [2.0 + (x - 2.0) * math.exp(-0.8) for x in (0.0, 1.0)]
    text = f"""
    [parameters]
    kappa = 0.3
    mu = 1.0
    [equation]
    drift = "kappa * (mu - x[0])"
    diffusion = 0.5
    terminal = "x[0]"
    horizon = 1.0
    [solve]
    at = [0.0, 1.0]
    rtol = 1e-6
    [fit]
    parameters = ["kappa", "mu"]
    targets = {targets}
    bounds = {{ kappa = [0.0, inf] }}
    """
    assert main(["control", written(tmp_path, text), "--json", "--quiet"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert abs(answer["parameters"]["kappa"] - 0.8) < 1e-3
    assert abs(answer["parameters"]["mu"] - 2.0) < 1e-3
    assert answer["objective"] < 1e-6 < answer["objective_before"]
    np.testing.assert_allclose(answer["values"], targets, atol=1e-3)
    assert answer["history"][0] == answer["objective_before"]
    assert answer["message"] != answer["message"].upper()  # words, not SciPy's code


def test_a_terminal_payment_that_is_the_same_everywhere(tmp_path, capsys):
    text = """
    [equation]
    drift = "a[0]"
    diffusion = 1.0
    terminal = "2.0"
    running_cost = "0.5 * a[0]**2"
    horizon = 0.2
    [controls]
    unbounded = 1
    [solve]
    at = [0.5]
    """
    assert main(["control", written(tmp_path, text), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["values"] == pytest.approx([2.0])


def test_the_report_of_a_fit_shows_its_course_and_what_was_matched(tmp_path):
    text = """
    [parameters]
    pull = 0.5
    [equation]
    drift = "-pull * x[0]"
    diffusion = 0.5
    terminal = "x[0]"
    horizon = 1.0
    [solve]
    at = [1.0, 2.0]
    [fit]
    parameters = ["pull"]
    """
    for name, more in (("matched", "targets = [0.5, 1.0]"), ("least", "bounds = { pull = [0.0, 2.0] }")):
        out = tmp_path / name
        assert main(["control", written(tmp_path, text + more), "--out", str(out), "--quiet"]) == 0
        page = (out / "report.html").read_text()
        assert (out / "figures" / "fit.png").exists()
        assert "iteration by iteration" in page
        assert ("target" in page) == (name == "matched")


MISTAKES = [
    ('drift = "r * x[0]"', 'drift = "q * x[0]"', "line 8, equation.drift", "unknown name 'q'"),
    ('drift = "r * x[0]"', 'drift = "r * x[1]"', "line 8, equation.drift", "x[1]"),
    ('drift = "r * x[0]"', 'drift = ["x[0]", "1", "2", "3"]', "line 8, equation.drift", "4 entries"),
    ('drift = "r * x[0]"', "drift = true", "line 8, equation.drift", "True"),
    ('drift = "r * x[0]"', 'dirft = "r * x[0]"', "line 8, equation.dirft", "did you mean 'drift'"),
    ('diffusion = "s * x[0]"', "diffusion = [[0.1, 0.2], [0.3]]", "line 9, equation.diffusion", "list of 2"),
    ('diffusion = "s * x[0]"', 'diffusion = "log(-x[0])"', "line 9, equation.diffusion", "finite"),
    ("horizon = 1.0", "horizon = -1.0", "line 12, equation.horizon", "positive"),
    ("horizon = 1.0", "horizon = 2026-01-01", "line 12, equation.horizon", "number"),
    ("horizon = 1.0", "horizon = 1.0\nobstacle = 1", "line 13, equation.obstacle", "[controls]"),
    ("horizon = 1.0", "horizon = 1.0\nbreakpoints = [2.0]", "line 13, equation.breakpoints", "inside"),
    ("upper = [inf]", "upper = [-1]", "line 15, box.lower", "lower < upper"),
    ("upper = [inf]", "upper = ['K * z']", "line 16, box.upper", "unknown name 'z'"),
    ("upper = [inf]", "upper = ['K * t', 1]", "line 16, box.upper", "formulas of t"),
    ("upper = [inf]", "upper = ['K * t']", "line 17, box.boundary", "open at a place that moves"),
    ("upper = [inf]", "upper = [nan]", "line 16, box.upper", "numbers"),
    ('"natural"', '"naturel"', "line 17, box.boundary", "'naturel'"),
    ('"natural"', "{ absorbing = 'u' }", "line 17, box.boundary", "unknown name 'u'"),
    ('"natural"', "{ robin = 1 }", "line 17, box.boundary", "kappa"),
    ("at = [90.0, 100.0]", "at = [[90.0, 100.0]]", "line 20, solve.at", "shape (n, 1)"),
    ("at = [90.0, 100.0]", "at = ['a']", "line 20, solve.at", "numbers"),
    ("at = [90.0, 100.0]", "", "line 19, solve.at", "nothing"),
    ("rtol = 1e-4", "rtol = -1", "line 21, solve.rtol", "non-negative"),
    ("[solve]", "[events]\ntimes = [0.5]\n[solve]", "events.move", "pay or move"),
    ("[solve]", "[events]\nmove = 'x[0]'\n[solve]", "events.times", "times"),
    ("[solve]", "[events]\ntimes = [2.0]\npay = 1\n[solve]", "events", "inside (0, 1.0)"),
    ("[solve]", "[events]\ntimes = [0.5]\npay = 'y'\n[solve]", "events.pay", "unknown name 'y'"),
    ("K = 100.0", "K = 'a'", "line 3, parameters.K", "number"),
    ("K = 100.0", "exp = 1.0", "line 3, parameters.exp", "not taken"),
    ("K = 100.0", f"K = {10**400}", "line 3, parameters.K", "number"),
    ("[box]", "[bxo]", "line 14, [bxo]", "did you mean 'box'"),
    ("[box]", "[box", "no TOML", "line 14"),
]


@pytest.mark.parametrize(("old", "new", "place", "message"), MISTAKES)
def test_mistakes_are_named_with_line_and_key(old, new, place, message, tmp_path, capsys):
    assert CALL.count(old) == 1
    assert main(["solve", written(tmp_path, CALL.replace(old, new)), "--quiet"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert place in err
    assert message in err
    assert "Traceback" not in err


@pytest.mark.parametrize("content", [b"\xff\xfe", b"\0", b"a" * 40_000, b"[" * 5000, b"", b"[equation]", None])
def test_files_that_are_no_equations_are_refused(content, tmp_path, capsys):
    path = tmp_path / "equation.toml"
    if content is not None:
        path.write_bytes(content)
    for command in ("solve", "control"):
        assert main([command, str(path)]) == 2
        assert str(path) in capsys.readouterr().err


def test_a_control_problem_is_sent_to_the_right_command_and_back(tmp_path, capsys):
    assert main(["solve", written(tmp_path, STEERED)]) == 2
    assert "kolmo control" in capsys.readouterr().err
    assert main(["control", written(tmp_path, CALL)]) == 2
    assert "kolmo solve" in capsys.readouterr().err


VALUES = st.one_of(
    st.integers(-3, 3), st.floats(), st.booleans(), TEXTS, st.sampled_from(["open", "periodic", "x[0]", "a[0]"])
)
NESTED = st.recursive(VALUES, lambda inner: st.lists(inner, max_size=3), max_leaves=6)
KEYS = st.sampled_from(
    [
        (table, key)
        for table, keys in tomllib.loads(CALL + "[fit]\n[controls]").items()
        for key in (keys or ["parameters", "targets", "bounds", "lower", "upper", "values", "unbounded"])
    ]
)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(KEYS, NESTED, min_size=1, max_size=3))
def test_files_with_anything_in_them_are_read_or_refused(tmp_path_factory, changes):
    tables = tomllib.loads(CALL)
    for (table, key), value in changes.items():
        tables.setdefault(table, {})[key] = value
    path = tmp_path_factory.mktemp("fuzz") / "equation.toml"
    path.write_text(toml(tables))
    try:
        equation = read(path)
        equation.control_problem() if equation.controlled else equation.problem()
    except InputError as error:
        if str(path) not in str(error):
            raise


def toml(tables):
    """The tables as TOML."""

    def value(item):
        if isinstance(item, list):
            return "[" + ", ".join(map(value, item)) + "]"
        return json.dumps(item) if isinstance(item, str | bool) else repr(item)

    return "\n".join(
        f"[{table}]\n" + "\n".join(f"{key} = {value(item)}" for key, item in entries.items())
        for table, entries in tables.items()
    )
