"""Parameters from a table on the command line: estimates, the run that is kept, going on, and what is refused."""

import json

import numpy as np
import pytest

from kolmo.cli import main
from kolmo.equations import Observed
from kolmo.runs import Run

PATH = """
[parameters]
kappa = 0.5
mean = 0.0
sigma = 1.0

[equation]
model = "ou"

[data]
times = "t"
states = ["x"]

[fit]
bounds = { kappa = [0.05, 10.0], mean = [-3.0, 3.0], sigma = [0.1, 3.0] }
starts = 2
"""
CHOICES = """
[parameters]
bound = 0.8
delay = 0.1
speed = 1.0

[equation]
model = "ddm"
drift = "speed * strength"

[data]
times = "rt"
choices = "choice"
covariates = ["strength"]

[fit]
parameters = ["bound", "speed"]
bounds = { bound = [0.2, 3.0], speed = [-5.0, 5.0] }
"""
TRIALS = "rt,choice,strength\n0.5,upper,1\n\n0.7,1,1\n0.9,lower,0\n1.1,,0\n0.6,0,0\n0.8,true,1\n"


@pytest.fixture
def files(tmp_path):
    """A path of an Ornstein–Uhlenbeck process, some trials, and the files that speak of them."""
    rng, k, m, s = np.random.default_rng(0), 1.0, 0.5, 0.6
    t, x = np.cumsum(rng.exponential(0.5, 200)), [m]
    for h in np.diff(t):
        decay = np.exp(-k * h)
        x.append(m + decay * (x[-1] - m) + s * np.sqrt((1 - decay**2) / (2 * k)) * rng.standard_normal())
    rows = "".join(f"{a!r},{b!r}\n" for a, b in zip(t.tolist(), np.array(x).tolist(), strict=True))
    contents = {"path.toml": PATH, "path.csv": f"t,x\n{rows}", "choices.toml": CHOICES, "trials.csv": TRIALS}
    for name, text in contents.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


def command(files, *arguments):
    return [str(files / a) if "." in a and not a.startswith("-") else a for a in ("fit", *arguments)]


def test_a_path_is_fitted_and_kept(files, capsys):
    out = files / "run"
    assert main([*command(files, "path.toml", "path.csv"), "--out", str(out), "--json", "--quiet"]) == 0
    answer = json.loads(capsys.readouterr().out)["results"]
    found = answer["parameters"]
    for name, truth in (("kappa", 1.0), ("mean", 0.5), ("sigma", 0.6)):
        v = found[name]
        assert v["low"] < v["estimate"] < v["high"]
        assert abs(v["estimate"] - truth) < 4 * v["standard_error"]
    assert answer["observations"] == 199
    assert answer["residuals"]["coordinate 1"]["p"] > 0.01
    assert answer["aic"] == pytest.approx(6 - 2 * answer["log_likelihood"])
    # the model is that of the file's numbers: the likelihood at the estimates is what was said
    at = {name: v["estimate"] for name, v in found.items()}
    again = Observed(out / "equation.toml", out / "data.csv", at).likelihood()()
    assert float(again) == pytest.approx(answer["log_likelihood"], abs=1e-6)
    assert main(["report", str(out)]) == 0
    text = (out / "report.html").read_text(encoding="utf-8")
    assert "Parameters from data" in text
    assert "kappa" in text


def test_an_interrupted_fit_goes_on(files, capsys, monkeypatch):
    from kolmo.cli import fit as of_fit

    def stop(*_):
        raise KeyboardInterrupt

    out = files / "run"
    with monkeypatch.context() as patched:
        patched.setattr(of_fit._Work, "_intervals", stop)
        assert main([*command(files, "path.toml", "path.csv"), "--out", str(out)]) == 1
    assert f"kolmo fit --resume {out}" in capsys.readouterr().err
    assert Run.open(out).status == "interrupted"
    (files / "path.csv").unlink()  # the run has its own
    with monkeypatch.context() as patched:
        patched.setattr(of_fit._Work, "_from", stop)  # both starts are kept
        assert main(["fit", "--resume", str(out), "--quiet"]) == 0
    assert Run.open(out).status == "done"
    assert main(["fit", "path.toml", "--resume", str(out)]) == 2


def test_choices_are_fitted(files, capsys):
    out = files / "run"
    assert main([*command(files, "choices.toml", "trials.csv"), "--out", str(out), "--set", "delay=0.2"]) == 0
    shown = capsys.readouterr().out
    assert "bound" in shown
    assert "p of choice" in shown
    assert "delay" not in Run.open(out).results["parameters"]
    assert Run.open(out).config["parameters"]["delay"] == 0.2
    assert {"data.png", "residuals.png"} <= {p.name for p in (out / "figures").iterdir()}


RACE = """
[parameters]
v0 = 1.0
v1 = 1.5
leak = 0.3
inhibition = 0.8
bound = 1.0
delay = 0.1

[equation]
model = "lca"

[data]
times = "rt"
choices = "choice"

[fit]
parameters = ["v1", "bound"]
bounds = { bound = [0.5, 2.0], v1 = [0.0, 4.0] }
tol = 0.05
maxiter = 3
"""


def test_two_accumulators_are_fitted(files, capsys):
    import torch

    from kolmo.likelihood import Race, Trials

    rows = [(0.5, 1), (0.7, 1), (0.9, 0), (1.1, 1)]
    (files / "race.toml").write_text(RACE)
    (files / "race.csv").write_text("rt,choice\n" + "".join(f"{t},{c}\n" for t, c in rows))
    speeds = torch.tensor([1.0, 1.5], dtype=torch.float64)
    model = Race(lambda t, x, c: speeds - 0.3 * x - 0.8 * x.flip(-1), upper=[1.0, 1.0], lower=0.0, delay=0.1)
    trials = Trials([t for t, _ in rows], [c for _, c in rows])
    observed = Observed(files / "race.toml", files / "race.csv")
    assert observed.likelihood()().item() == pytest.approx(model.likelihood(trials, tol=0.05)().item(), abs=1e-12)
    out = files / "raced"
    assert main(["fit", str(files / "race.toml"), str(files / "race.csv"), "--out", str(out), "--json"]) in (0, 3)
    found = json.loads(capsys.readouterr().out)["results"]
    assert set(found["parameters"]) == {"v1", "bound"}
    assert found["log_likelihood"] > observed.likelihood()().item()
    assert Run.open(out).results["observations"] == 4


def test_formulas_noise_and_several_paths(files):
    text = PATH.replace("bounds =", "tol = 0.001\nbounds =").replace("starts = 2", "")
    (files / "noisy.toml").write_text(
        text.replace('states = ["x"]', 'states = ["x"]\nnoise = "0.1 * sigma"\nmean = [0.5]\nvariance = [0.2]')
    )
    noisy = Observed(files / "noisy.toml", files / "path.csv").likelihood()
    assert noisy.count == 200
    assert np.isfinite(float(noisy()))
    (files / "many.toml").write_text(text.replace('states = ["x"]', 'states = ["x"]\npath = "who"'))
    (files / "many.csv").write_text("t,x,who\n0,0,a\n0,1,b\n1,0.5,a\n2,0.25,b\n")
    many = Observed(files / "many.toml", files / "many.csv").likelihood()
    assert many.count == 2
    assert many.steps.h.tolist() == [1.0, 2.0]
    both = PATH.replace('model = "ou"', 'drift = ["-kappa * x[0]", "x[0] - x[1]"]\ndiffusion = ["sigma", "sigma"]')
    (files / "plane.toml").write_text(both.replace('states = ["x"]', 'states = ["x", "y"]'))
    (files / "plane.csv").write_text("t,x,y\n0,0,1\n1,0.5,0.2\n")
    assert Observed(files / "plane.toml", files / "plane.csv").likelihood().dim == 2


@pytest.mark.parametrize(
    ("model", "change", "data", "told"),
    [
        ("choices.toml", ("", ""), TRIALS.replace("0.9", "soon"), "row 5, column rt: got 'soon'"),
        ("choices.toml", ("", ""), TRIALS.replace("0.9", "-0.9"), "row 5, column rt: got -0.9"),
        ("choices.toml", ("", ""), TRIALS.replace("lower", "2"), "row 5, column choice: got 2"),
        ("choices.toml", ("", ""), TRIALS.replace("0.6,0,0", "0.6,0"), "row 7: got 2 cells"),
        ("choices.toml", ("", ""), TRIALS.replace("strength", "strenght"), "no column 'strength'"),
        ("choices.toml", ("", ""), TRIALS.replace("lower,0", "lower,"), "row 5, column strength: got nothing"),
        ("choices.toml", ("speed * strength", "speed * dose"), TRIALS, "line 9, equation.drift"),
        ("choices.toml", ("bound = [0.2", "bond = [0.2"), TRIALS, "fit.bounds"),
        ("choices.toml", ("[0.2, 3.0]", "[1.2, 3.0]"), TRIALS, "bound = 0.8; needed a start in [1.2, 3]"),
        ("choices.toml", ('model = "ddm"', 'model = "dddm"'), TRIALS, "equation.model"),
        ("choices.toml", ('choices = "choice"\n', ""), TRIALS, "[data]"),
        ("path.toml", ("", ""), "t,x\n0,0\n1,1\n1,2\n", "row 4, column t: got 1 after 1"),
        ("path.toml", ("", ""), "t,x\n0,0\n1,\n", "row 3, column x: got nothing"),
        ("path.toml", ('["x"]', '["x", "t"]'), "t,x\n0,0\n1,1\n", "data.states"),
        ("path.toml", ("starts = 2", "targets = [1.0]"), "t,x\n0,0\n1,1\n", "fit.targets"),
        ("path.toml", ("starts = 2", "profile = 1"), "t,x\n0,0\n1,1\n", "fit.profile"),
        ("path.toml", ("", ""), "t,x\n", "1 rows"),
    ],
)
def test_what_is_refused_is_named(files, capsys, model, change, data, told):
    text = (files / model).read_text(encoding="utf-8")
    assert change[0] in text
    (files / model).write_text(text.replace(*change) if change[0] else text, encoding="utf-8")
    (files / "bad.csv").write_text(data, encoding="utf-8")
    out = files / "run"
    assert main([*command(files, model, "bad.csv"), "--out", str(out)]) == 2
    assert told in capsys.readouterr().err
    assert not out.exists()


def test_a_model_by_name_is_solved_too(files, capsys):
    (files / "call.toml").write_text(
        "parameters = { mu = 0.05, sigma = 0.2 }\nsolve = { at = [1.0], rtol = 1e-5 }\n"
        'equation = { model = "gbm", terminal = "x[0]", horizon = 1.0 }\n'
    )
    assert main(["solve", str(files / "call.toml"), "--json", "--quiet"]) == 0
    assert json.loads(capsys.readouterr().out)["values"][0] == pytest.approx(np.exp(0.05), rel=1e-5)
