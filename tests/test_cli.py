"""The command line: exit codes, where output goes, options by type, resuming; no traceback for a user's mistake."""

import dataclasses
import importlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kolmo import experiments
from kolmo.cli import main
from kolmo.runs import Run

TOY = '''
"""Add up a few numbers.

Only for tests.
"""
import time
from dataclasses import dataclass
from typing import Literal

from kolmo.errors import InputError
from kolmo.report import Measured, Section, Table


@dataclass(frozen=True)
class Config:
    seeds: int = 1
    seed: int = 0
    scale: float = 1.0
    depths: tuple[int, ...] = (1, 2)
    mode: Literal["good", "bug", "input", "stop", "slow"] = "good"
    limit: float | None = None
    fast: bool = False


def run(config, run, progress):
    first = run.unit("first", lambda: config.scale * sum(config.depths))
    if config.mode == "bug":
        raise ZeroDivisionError("a bug")
    if config.mode == "input":
        raise InputError("scale", config.scale, "something else")
    if config.mode == "stop" and not (run.folder / "go").exists():
        raise KeyboardInterrupt
    if config.mode == "slow":
        print("in flight", flush=True)
        time.sleep(60)
    return {"sum": first, "nested": {"fast": config.fast, "limit": config.limit}}


def report(run):
    table = Table(["sum"], [[Measured(run.results["sum"], 0.1)]])
    return [Section("Answer", [f"The sum is `{run.results['sum']}`.", table])]
'''

BARE = '''
"""Say nothing of its own."""
from dataclasses import dataclass


@dataclass(frozen=True)
class Config:
    pass


def run(config, run, progress):
    return {"one": 1}
'''


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """Give a folder in which `toy` and `bare` are the only experiments, and work there."""
    folder = tmp_path / "experiments"
    folder.mkdir()
    (folder / "toy.py").write_text(TOY)
    (folder / "bare.py").write_text(BARE)
    (folder / "_shared.py").write_text('"""No experiment."""\n')
    monkeypatch.setattr(experiments, "folder", lambda: folder)
    monkeypatch.setattr(experiments, "__path__", [str(folder)])
    for name in ("toy", "bare"):
        monkeypatch.delitem(sys.modules, f"kolmo.experiments.{name}", raising=False)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in ("toy", "bare"):
        sys.modules.pop(f"kolmo.experiments.{name}", None)


def test_an_experiment_makes_a_run_with_results_and_report(toy, capsys):
    assert main(["experiment", "toy", "--set", "scale=2.5", "--set", "depths=1,2,3"]) == 0
    out, err = capsys.readouterr()
    (folder,) = (toy / "runs").iterdir()
    assert "sum" in out
    assert "15" in out
    assert str(folder.relative_to(toy)) in err
    run = Run.open(folder)
    assert run.status == "done"
    assert run.results == {"sum": 15.0, "nested": {"fast": False, "limit": None}}
    assert run.config["depths"] == [1, 2, 3]
    page = (folder / "report.html").read_text()
    assert "<code>15.0</code>" in page
    assert "15.00 ± 0.10" in page
    assert "kolmo experiment toy --set scale=2.5 --set depths=1,2,3" in page


def test_json_on_stdout_is_json_alone(toy, capsys):
    assert main(["experiment", "toy", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["results"]["sum"] == 3.0
    assert (toy / answer["report"]).exists()


def test_a_terminal_shows_ten_lines_and_conclusions_where_there_are_any(toy, capsys, monkeypatch):
    from kolmo.cli.kinds import kind_of
    from kolmo.cli.perform import LINES, summary

    assert main(["experiment", "toy", "--quiet", "--out", "here"]) == 0
    run = Run.open("here")
    many = dataclasses.replace(kind_of(run), shown=lambda _: {f"quantity {k}": k for k in range(40)})
    lines = summary(many, run).splitlines()
    assert len(lines) == LINES
    assert lines[-1].startswith("… 31 more in ")
    capsys.readouterr()
    monkeypatch.setattr(experiments.load("toy"), "conclusions", lambda run: ["It adds up."], raising=False)
    assert main(["report", "here"]) == 0
    assert "It adds up." in Path("here/report.html").read_text(encoding="utf-8")
    assert summary(kind_of(run), run) == "It adds up."


def test_conclusions_of_equations_say_whether_the_tolerance_is_met():
    from kolmo.cli.equation_run import _concluded

    answer = {"status": "converged", "message": "m", "values": [1.0, 2.0], "error_estimate": [0.01, 0.1]}
    assert _concluded(answer) == ["The least certain of 2 values is 2.00 ± 0.10; the tolerance is met."]
    late = _concluded(answer | {"status": "tolerance_not_met"})
    assert late == ["The least certain of 2 values is 2.00 ± 0.10; the tolerance is not met: m."]
    assert _concluded(answer | {"values": [1.0, None]}) == ["Not every value is known: see the table."]
    fit = {"status": "maxiter", "message": "m", "objective": 2.0, "objective_before": 2.0, "iterations": 3}
    assert _concluded(fit) == ["The objective did not fall in 3 iterations; the fit has not arrived: m."]


def test_seeds_are_options_and_go_on_record(toy, capsys):
    assert main(["experiment", "toy", "--seeds", "3", "--seed", "5", "--out", "here"]) == 0
    run = Run.open(toy / "here")
    assert run.environment["seeds"] == [5, 6, 7]
    assert (run.config["seeds"], run.config["seed"]) == (3, 5)
    assert main(["experiment", "bare", "--seeds", "3"]) == 2
    assert "No such option '--seeds'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["experiment", "tyo"], "needed one of bare, toy. Fix: did you mean 'toy'"),
        (["experiment", "toy", "--set", "scael=1"], "did you mean 'scale'"),
        (["experiment", "toy", "--set", "nothing=1"], "seeds, seed, scale, depths, mode, limit, fast"),
        (["experiment", "toy", "--set", "scale"], "KEY=VALUE"),
        (["experiment", "toy", "--set", "scale=big"], "scale: got 'big'; needed a number"),
        (["experiment", "toy", "--set", "depths=1,x"], "depths: got 'x'; needed a whole number"),
        (["experiment", "toy", "--set", "mode=bad"], "one of good, bug"),
        (["experiment", "toy", "--set", "fast=perhaps"], "true or false"),
        (["experiment", "toy", "--out", "experiments"], "a folder that does not exist yet"),
        (["experiment", "toy", "--resume", "nowhere"], "a run folder"),
        (["experiment", "toy", "--set", "mode=input"], "scale: got 1.0; needed something else"),
        (["report", "experiments"], "a run folder"),
        (["nonsense"], "No such command"),
        (["experiment", "toy", "--nonsense"], "No such option"),
    ],
)
def test_bad_input_is_explained_and_exits_with_2(toy, capsys, arguments, expected):
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert expected in err
    assert "Traceback" not in err
    assert out == ""


def test_a_bug_is_kept_in_the_log_and_exits_with_1(toy, capsys):
    assert main(["experiment", "toy", "--set", "mode=bug", "--out", "run"]) == 1
    err = capsys.readouterr().err
    assert "ZeroDivisionError: a bug" in err
    assert "Traceback" not in err
    assert "Traceback" in (toy / "run" / "log.txt").read_text()
    assert Run.open(toy / "run").status == "failed"


def test_an_interrupted_run_says_how_to_go_on_and_does(toy, capsys):
    assert main(["experiment", "toy", "--set", "mode=stop", "--set", "scale=2", "--out", "run"]) == 1
    assert "kolmo experiment toy --resume run" in capsys.readouterr().err
    assert main(["report", "run"]) == 2
    assert "interrupted" in capsys.readouterr().err
    (toy / "run" / "go").touch()
    assert main(["experiment", "toy", "--resume", "run", "--seeds", "2"]) == 2
    assert main(["experiment", "bare", "--resume", "run"]) == 2
    assert main(["experiment", "toy", "--resume", "run"]) == 0
    assert Run.open(toy / "run").results["sum"] == 6.0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_politely(toy, number):
    # a shell lets what it starts in the background ignore Ctrl-C
    program = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "from kolmo import experiments; folder = sys.argv.pop(1);"
        "from pathlib import Path; experiments.folder = lambda: Path(folder); experiments.__path__ = [folder];"
        "from kolmo.cli import main; sys.exit(main())"
    )
    command = [sys.executable, "-c", program, str(toy / "experiments")]
    arguments = ["experiment", "toy", "--set", "mode=slow", "--out", str(toy / "run")]
    with subprocess.Popen([*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "in flight\n"
        process.send_signal(number)
        _, err = process.communicate(timeout=20)
    assert process.returncode == 1
    assert "--resume" in err
    assert "Traceback" not in err
    assert Run.open(toy / "run").status == "interrupted"


def test_a_report_is_written_again_from_the_folder_alone(toy, capsys):
    main(["experiment", "toy", "--out", "run"])
    first = (toy / "run" / "report.html").read_text()
    (toy / "run" / "report.html").unlink()
    capsys.readouterr()
    assert main(["report", "run"]) == 0
    assert capsys.readouterr().out.strip().endswith("report.html")
    assert (toy / "run" / "report.html").read_text() == first


def test_results_that_an_experiment_cannot_report_are_not_called_damaged(toy, capsys):
    assert main(["experiment", "toy", "--out", "run"]) == 0
    (toy / "run" / "results.json").write_text('{"sum": "many"}')
    assert main(["report", "run"]) == 1
    err = capsys.readouterr().err
    assert "the report of the experiment toy fails" in err
    assert "or it has a mistake" in err


def test_every_run_goes_on_with_the_command_of_its_kind(toy):
    from kolmo.cli.kinds import going_on

    kinds = {
        "toy": "kolmo experiment toy --resume",
        "sweep-toy": "kolmo sweep toy --resume",
        "landscape": "kolmo landscape --resume",
        "control": "kolmo control run-control/equation.toml --set s=0.5 --out",
        "sweeping": "kolmo experiment sweeping --resume",
    }
    for name, command in kinds.items():
        run = Run.create(name, {"parameters": {"s": 0.5}}, out=f"run-{name}")
        assert going_on(run) == f"{command} run-{name}"


def test_an_experiment_without_a_report_gets_a_plain_one(toy):
    assert main(["experiment", "bare", "--out", "run"]) == 0
    assert "one" in (toy / "run" / "report.html").read_text()


def test_list_and_help_say_what_there_is(toy, capsys):
    assert main(["list"]) == 0
    assert capsys.readouterr().out.splitlines() == ["bare  Say nothing of its own.", "toy   Add up a few numbers."]
    assert main(["list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["toy"] == "Add up a few numbers."
    assert main(["experiment", "toy", "--help"]) == 0
    out = capsys.readouterr().out
    assert "Add up a few numbers." in out
    assert "depths=1,2" in out
    assert "float | None" in out


def test_info_says_what_a_bug_report_needs(capsys):
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["packages"]["numpy"]
    assert facts["devices"]


def commands():
    from kolmo.cli.commands import kolmo as group

    return [name for name in group.commands if name != "experiment"]


@pytest.mark.parametrize("name", [*commands(), "experiment"])
def test_the_help_of_every_command_has_an_example_that_is_one(name, capsys):
    assert main([name, "--help"]) == 0
    assert re.search(rf"kolmo\s+{name}\b", capsys.readouterr().out.partition("xample")[2])


PROGRAM = "import sys; from kolmo.cli import main; sys.exit(main())"


def test_the_shell_completes_commands_and_options():
    def completed(*words):
        environment = {**os.environ, "_KOLMO_COMPLETE": "bash_complete", "COMP_WORDS": " ".join(words)}
        environment["COMP_CWORD"] = str(len(words) - 1)
        program = "import sys; sys.argv[0] = 'kolmo'; from kolmo.cli import main; sys.exit(main())"
        command = [sys.executable, "-c", program]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False).stdout

    assert "plain,solve" in completed("kolmo", "so")
    assert "--scheduler" in completed("kolmo", "sweep", "--sch")
    assert "plain,lqg" in completed("kolmo", "experiment", "lq")


def test_a_reader_that_leaves_early_is_no_mistake():
    command = f"'{sys.executable}' -c '{PROGRAM}' list --json | head -c 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout == "{"
    assert done.stderr == ""


def test_a_terminal_that_lacks_a_sign_is_served(tmp_path):
    (tmp_path / "e.toml").write_text(
        'equation = { drift = 0.0, diffusion = 1.0, terminal = "x[0]", horizon = 1.0 }\nsolve = { at = [1.0] }'
    )
    environment = {**os.environ, "PYTHONIOENCODING": "iso8859-2"}
    command = [sys.executable, "-c", PROGRAM, "solve", str(tmp_path / "e.toml"), "--quiet"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert re.match(r"u\(0, 1\) = \S+ \? ", done.stdout), done


def test_an_equation_can_be_kept_as_a_run(tmp_path, monkeypatch, capsys):
    import kolmo

    monkeypatch.chdir(tmp_path)
    text = """
        parameters = { s = 0.5 }
        equation = { drift = "-x[0]", diffusion = "s", terminal = "x[0]**2", horizon = 1.0 }
        solve = { at = [1.0, 2.0], rtol = 1e-3 }
    """
    (tmp_path / "ou.toml").write_text(text)
    assert main(["solve", "ou.toml", "--set", "s=0.7", "--out", "run", "--quiet", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)["values"]
    run = Run.open("run")
    assert run.results["values"] == values
    assert np.allclose(kolmo.load("run/solution.npz")([1.0, 2.0]), values)
    page = (tmp_path / "run" / "report.html").read_text()
    assert "kolmo solve equation.toml --set s=0.7" in page
    assert "data:image/png" in page
    assert main(["solve", "run/equation.toml", "--set", "s=0.7", "--quiet", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["values"] == values
    (tmp_path / "run" / "report.html").unlink()
    assert main(["report", "run"]) == 0
    assert (tmp_path / "run" / "report.html").read_text() == page
    assert main(["solve", "ou.toml", "--out", "run", "--quiet"]) == 2
    (tmp_path / "bad.toml").write_text(text.replace('"-x[0]"', '"-y[0]"'))
    assert main(["solve", "bad.toml", "--out", "bad", "--quiet"]) == 2
    assert not (tmp_path / "bad").exists()


def test_the_report_of_an_equation_says_which_result_is_damaged_and_which_mistake_is_its_own(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ou.toml").write_text("""
        equation = { drift = "-x[0]", diffusion = 1.0, terminal = "x[0]**2", horizon = 0.1 }
        solve = { at = [1.0, 2.0], rtol = 1e-1 }
    """)
    assert main(["solve", "ou.toml", "--out", "run", "--quiet"]) == 0
    whole = json.loads((tmp_path / "run" / "results.json").read_text())
    for change, told in [
        ({"values": ["x", 1.0]}, r"results.values\[0\]: got 'x'"),
        ({"values": [1.0]}, "results.values: .*needed 2 rows"),
        ({"status": 3}, "results.status: got 3"),
        ({"error_estimate": [[0.1], [0.1, 0.2]]}, "results.error_estimate: .*of one length"),
        ({"extra": 1}, "results: got an unknown entry 'extra'"),
    ]:
        (tmp_path / "run" / "results.json").write_text(json.dumps(whole | change))
        assert main(["report", "run"]) == 1
        assert re.search(f"results.json is damaged: {told}", capsys.readouterr().err)
    (tmp_path / "run" / "results.json").write_text(json.dumps(whole))
    monkeypatch.setattr("kolmo.cli.equation_run.write_report", lambda *_, **named: named["title"] + 1)
    assert main(["report", "run"]) == 1
    err = capsys.readouterr().err
    assert "mistake in kolmo" in err
    assert "damaged" not in err


@pytest.mark.parametrize("kind", ["[controls]\nunbounded = 1", '[fit]\nparameters = ["k"]'])
def test_controls_and_fits_can_be_kept_too(tmp_path, monkeypatch, capsys, kind):
    monkeypatch.chdir(tmp_path)
    drift, cost = ("a[0]", 'running_cost = "a[0]**2"') if "controls" in kind else ("k", "")
    bounds = "" if "controls" in kind else "\nbounds = { k = [-1.0, 1.0] }"
    (tmp_path / "c.toml").write_text(f"""
parameters = {{ k = 0.1 }}
[equation]
drift = "{drift}"
diffusion = 1.0
terminal = "x[0]**2"
horizon = 0.2
{cost}
[solve]
at = [0.5]
rtol = 1e-1
{kind}{bounds}
""")
    assert main(["control", "c.toml", "--out", "run", "--quiet"]) == 0
    page = (tmp_path / "run" / "report.html").read_text()
    assert (">control</th>" in page) == ("controls" in kind)
    assert main(["report", "run", "--json"]) == 0


def test_every_shipped_experiment_follows_the_protocol():
    for name in experiments.names():
        chosen = experiments.load(name)
        assert experiments.describe(name).endswith(".")
        config = chosen.Config()
        assert experiments.configure(chosen.Config, json.loads(json.dumps(vars(config)))) == config


FACTORY = """
import torch


def made():
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 1, dtype=torch.float64)
    return model, lambda f: sum((p**2).sum() for p in f.parameters())


def wrong():
    return 1


def broken():
    raise OSError("no data")
"""


def test_the_landscape_of_a_network_of_ones_own(tmp_path, monkeypatch, capsys):
    import numpy as np
    import torch

    from kolmo.landscape import Surface

    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine_for_kolmo.py").write_text(FACTORY)
    weights = {"weight": torch.tensor([[3.0, 4.0]], dtype=torch.float64), "bias": torch.zeros(1, dtype=torch.float64)}
    torch.save(weights, "weights.pt")
    arguments = ["landscape", "mine_for_kolmo:made", "--state", "weights.pt", "--points", "9", "--out", "run"]
    assert main([*arguments, "--json", "--quiet"]) == 0
    answer = json.loads(capsys.readouterr().out)
    surface = Surface.load(tmp_path / "run" / "surface.npz")
    assert surface.mean.reshape(9, 9)[4, 4] == pytest.approx(25.0)  # the loss is |weights|²
    assert np.isfinite(answer["results"]["mean slope"]["value"])
    assert "--state weights.pt" in (tmp_path / "run" / "report.html").read_text()
    (tmp_path / "damaged.pt").write_bytes(b"nothing")
    torch.save({"weight": torch.ones(3)}, "other.pt")
    torch.save(Run, "code.pt")
    for model, state, message in [
        ("mine_for_kolmo", None, "package.module:factory"),
        ("mine_for_kolmo:absent", None, "AttributeError"),
        ("nowhere_at_all:made", None, "ModuleNotFoundError"),
        ("mine_for_kolmo:wrong", None, "a pair (model, loss)"),
        ("mine_for_kolmo:broken", None, "no data"),
        *[("mine_for_kolmo:made", f"{name}.pt", f"{name}.pt") for name in ("damaged", "other", "code", "absent")],
    ]:
        assert main(["landscape", model, *(["--state", state] if state else [])]) == 2
        err = capsys.readouterr().err
        assert message in err
        assert "Traceback" not in err
    assert sorted(path.name for path in tmp_path.glob("run*")) == ["run"]


def test_a_landscape_that_was_interrupted_goes_on_and_its_report_is_written_again(tmp_path, monkeypatch, capsys):
    module = importlib.import_module("kolmo.landscape.surface")  # the package has a function of this name
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine_again_for_kolmo.py").write_text(FACTORY)
    put, counted = module.Store._put, []

    def interrupting(self, index, found):
        put(self, index, found)
        counted.append(index)
        if len(counted) == 10:
            raise KeyboardInterrupt

    monkeypatch.setattr(module.Store, "_put", interrupting)
    arguments = ["landscape", "mine_again_for_kolmo:made", "--points", "5", "--quiet"]
    assert main([*arguments, "--out", "run"]) == 1
    assert "kolmo landscape --resume run" in capsys.readouterr().err
    assert Run.open("run").status == "interrupted"
    assert main(["report", "run"]) == 2
    assert "kolmo landscape --resume run" in capsys.readouterr().err
    assert main(["landscape", "--resume", "run", "--points", "7"]) == 2
    assert main(["landscape"]) == 2
    assert main(["landscape", "--resume", "run", "--quiet"]) == 0
    assert len(counted) == 25  # every point once
    page = (tmp_path / "run" / "report.html").read_text()
    assert '<figure class="relief">' in page
    (tmp_path / "run" / "report.html").unlink()
    assert main(["report", "run"]) == 0
    assert (tmp_path / "run" / "report.html").read_text() == page
    assert main([*arguments, "--out", "other"]) == 0
    assert (tmp_path / "run" / "surface.npz").read_bytes() == (tmp_path / "other" / "surface.npz").read_bytes()
