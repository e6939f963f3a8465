"""The demo, small: it runs end to end, its two sides meet at the right rate, and a resumed run gives the same bytes."""

import json
import operator
import re
import shutil

import numpy as np
import pytest
import torch
from kolmo.experiments._crew import Crew

import kolmo
from kolmo import bridge, experiments
from kolmo.cli import main
from kolmo.runs import Run

demo = experiments.load("demo")

SMALL = {
    "noise": "0.3",
    "held_out": "40",
    "epochs": "3",
    "encoder_width": "8",
    "width": "6",
    "depth": "4",
    "depths": "4,8",
    "paths": "20",
    "rtol": "1e-2",
    "depth_atol": "2e-6",
    "workers": "1",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Give the folder of a small run."""
    out = tmp_path_factory.mktemp("demo") / "run"
    settings = [part for key, value in SMALL.items() for part in ("--set", f"{key}={value}")]
    assert main(["demo", "--quiet", "--out", str(out), *settings]) == 0
    return out


def test_network_and_equation_meet_at_their_weak_order(folder):
    depth = Run.open(folder).results["depth"]
    assert list(depth) == ["no noise", "Gaussian 0.3", "Bernoulli 0.8"]
    for name, (numbers,) in depth.items():
        for order, tolerance in ((1, 0.15), (2, 0.3)):
            if order == 2 and name.startswith("Bernoulli"):
                assert "order 2" not in numbers  # noise that depends on the state has no equation of order 2
                continue
            found = numbers[f"order {order}"]
            assert found["difference"][1] < found["difference"][0]
            assert found["slope"] == pytest.approx(order, abs=tolerance)


def test_a_run_is_compared_network_by_network(folder, capsys):
    arguments = ["compare", str(folder), "--examples", "5", "--rtol", "1e-2", "--quiet"]
    assert main([*arguments, "--network", "Gaussian 0.3, seed 0", "--json"]) == 0
    (losses,) = json.loads(capsys.readouterr().out).values()
    model, x, y = experiments.networks(Run.open(folder))["Gaussian 0.3, seed 0"]
    sampled = model.expected_loss(x[:5], y[:5], paths=4000, rng=0)
    error = float(sampled.standard_error.square().sum().sqrt()) / 5
    assert losses["network"][0] == pytest.approx(float(sampled.mean.mean()), abs=4 * error + losses["network"][1])
    difference, uncertain = losses["difference"]
    assert difference == pytest.approx(losses["network"][0] - losses["PDE"][0])
    assert uncertain < abs(difference) < 0.1  # four layers are far from the limit, and that is seen
    assert main([*arguments, "--network", "Gauss"]) == 2
    assert "one of no noise, seed 0, Gaussian 0.3, seed 0" in capsys.readouterr().err


def test_the_landscape_of_a_network_of_a_run(folder, tmp_path, capsys):
    arguments = ["landscape", str(folder), "--points", "5", "--plain", "--quiet", "--json", "--out"]
    assert main([*arguments, str(tmp_path / "one"), "--network", "no noise, seed 0"]) == 0
    assert json.loads(capsys.readouterr().out)["results"]
    assert main([*arguments, str(tmp_path / "two")]) == 2
    assert "one of the networks of this run: no noise, seed 0" in capsys.readouterr().err


def test_characteristics_solve_the_transport_equation():
    # dx/dt = -x from x for time 1 ends at x/e, and φ = (x₁², x₁ x₂).
    decay = kolmo.SDE(lambda t, x: -x, dim=2, arrays="torch")
    x = np.array([[1.0, 2.0], [-0.5, 0.3]])
    solution = demo.digits.Transported(decay, lambda z: torch.stack([z[:, 0] ** 2, z.prod(-1)], -1), 1.0, x)
    factor = np.exp(-2.0)
    assert np.abs(solution(x) - factor * np.stack([x[:, 0] ** 2, x.prod(-1)], -1)).max() < 1e-7
    assert solution.error_estimate.max() < 1e-5
    gradient = factor * np.stack([np.stack([2 * x[:, 0], 0 * x[:, 0]], -1), x[:, ::-1]], -1)
    assert solution.gradient(x) == pytest.approx(gradient, abs=1e-7)
    hessian = factor * np.stack([np.diag([2.0, 0.0]), [[0.0, 1.0], [1.0, 0.0]]], -1)
    assert solution.hessian(x) == pytest.approx(np.stack([hessian, hessian]), abs=1e-7)


def test_characteristics_agree_with_the_grid():
    pull = kolmo.SDE(lambda t, x: torch.tanh(x.flip(-1)) - x, dim=2, arrays="torch")
    x = np.array([[1.0, 0.5], [-0.5, 0.3]])

    def phi(z):
        return torch.stack([torch.sin(z[..., 0]), torch.cos(z[..., 0] - z[..., 1])], -1)

    grid = kolmo.solve(kolmo.KolmogorovProblem(pull, phi, 1.0), at=x, rtol=1e-4)
    transported = demo.digits.Transported(pull, phi, 1.0, x)
    assert np.all(abs(grid(x) - transported(x)) <= grid.error_estimate + transported.error_estimate)


def test_sampling_agrees_with_the_recursion(folder):
    run = Run.open(folder)
    sampled, study = run.load_unit("evaluate-0-Gaussian-0.3"), run.load_unit("depth-0-Gaussian-0.3")
    error = sampled["network_error"]
    assert abs(sampled["network"].mean() - study["network"][0]) <= 4 * error + study["network_error"][0]


def test_raising_the_noise_changes_the_surface_and_no_noise_does_not(folder):
    fixed = Run.open(folder).results["smoothing"]["fixed"]
    assert fixed["no noise"]["largest_change"]["mean"] == 0.0
    assert fixed["Gaussian 0.3"]["largest_change"]["mean"] > 0.01
    # Averaging over noise cannot make a probability steeper than it was without.
    steepest = [fixed[name]["largest_probability_slope"]["mean"] for name in ("Gaussian 0.3", "no noise")]
    assert steepest[0] < steepest[1]


def test_a_resumed_run_gives_the_same_bytes(folder, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(folder, again)
    for unit in ("train-0-Gaussian-0.3", "evaluate-0-no-noise", "depth-0-no-noise"):
        (again / "units" / f"{unit}.npz").unlink()
    (again / "results.json").unlink()
    assert main(["demo", "--quiet", "--resume", str(again)]) == 0
    assert (again / "results.json").read_bytes() == (folder / "results.json").read_bytes()


def test_two_processes_do_what_one_does_and_keep_what_is_done(tmp_path):
    tasks = {f"unit-{k}": (operator.truediv, (1.0, k)) for k in (4, 3, 0)}
    run = Run.create("toy", {}, out=tmp_path / "run")
    with pytest.raises(ZeroDivisionError), Crew(run, 2, units=3, progress=False) as crew:
        crew.do(tasks)
    del tasks["unit-0"]
    with Crew(run, 1, units=2, progress=False) as crew:
        assert crew.do(tasks) == {"unit-4": 0.25, "unit-3": 1.0 / 3.0}


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *[("held_out", n) for n in (4, 0, -1, 100_000)],
        *[(name, 0) for name in ("seeds", "epochs", "batch", "width", "depth", "depths", "paths", "rtol")],
        ("noise", "0.1"),
        ("noise", "nan"),
        ("digit", 10),
    ],
)
def test_options_out_of_range_are_named_before_anything_is_trained(tmp_path, monkeypatch, capsys, option, value):
    monkeypatch.setattr(demo, "Crew", None)  # which would start the work
    arguments = ["demo", "--quiet", "--out", str(tmp_path / "run"), "--set", f"{option}={value}"]
    assert main(arguments) == 2
    shown = capsys.readouterr().err
    assert f"{option}" in shown
    assert "needed" in shown
    assert "Error" not in shown


def test_the_report_stands_alone(folder):
    page = (folder / "report.html").read_text()
    assert len(re.findall(r'<img src="data:image/png;base64,', page)) == 4
    assert not re.search(r'(src|href)="(?!data:)', page)
    for name in ("flow", "surfaces", "depth", "smoothing"):
        assert (folder / "figures" / f"{name}.pdf").read_bytes().startswith(b"%PDF")
    json.loads((folder / "results.json").read_text())


def test_the_slope_is_that_of_the_deepest_resolved_pair():
    depths = (8, 16, 32, 64)
    difference = 3.0 * np.array(depths, dtype=float) ** -2
    difference[3] *= 5.0
    error = np.array([1e-9, 1e-9, 1e-9, difference[3] / 5])
    found = demo.slope(depths, difference, error)
    assert found["slope"] == pytest.approx(2.0, abs=1e-12)
    assert found["pair"] == [16, 32]
    assert demo.slope(depths, difference, difference) == {"slope": None, "pair": None}


@pytest.mark.slow
def test_the_noise_of_the_demo_is_a_diffusion():
    """Trained as in the demo, for fewer epochs: Gaussian steps of the same covariance have the effect measured."""
    config = demo.Config(epochs=60)
    net = demo.restored(config, "no noise", demo.train(config, "no noise", 0)["state"])
    test = demo.digits.split(0, config.held_out)[1]
    x, y = test.x.double(), test.y

    def loss(f):
        return torch.nn.functional.cross_entropy(f(x), y)

    for law in (bridge.Additive(config.moderate), bridge.CentredBernoulli(config.bernoulli)):
        found = bridge.diagnose(net, loss, x[:2], law, rtol=0.02)
        assert max(site.ratio for site in found.rows) < 0.2
        assert found.verdict == "diffusion"
        part = found.explains(found.diffusion)
        assert abs(part.value - 1) < 0.05 + 2 * part.standard_error, (law, part)
        assert part.standard_error < 0.05
