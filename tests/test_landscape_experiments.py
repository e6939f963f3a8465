"""The landscape experiments in small, from the command line to the report."""

import json

import numpy as np
import pytest

from kolmo.cli import main

SMALL = ["images=40", "epochs=8", "depth=4", "workers=1"]


@pytest.fixture
def small(tmp_path, capsys):
    """Run an experiment in small; return its results, the names of its figures and its page."""

    def run(name, *settings):
        options = [word for setting in (*SMALL, *settings) for word in ("--set", setting)]
        folder = tmp_path / name
        assert main(["experiment", name, "--quiet", "--out", str(folder), *options]) == 0, capsys.readouterr().err
        figures = {path.name for path in (folder / "figures").iterdir() if path.suffix != ".pdf"}
        return json.loads((folder / "results.json").read_text()), figures, (folder / "report.html").read_text()

    return run


@pytest.mark.slow
def test_growing_noise_fills_the_surface_up(small):
    results, figures, page = small("landscape_noise", "points=5", "noise=0.3,1.0", "draws=2", "frames=3")
    loss = [one["loss"] for one in results["levels"].values()]
    assert loss == sorted(loss)
    assert list(results["levels"]) == ["none", "gaussian-0.3", "gaussian-1"]
    slopes = [one["probability"] for one in results["feature_slope"].values()]
    assert slopes == sorted(slopes, reverse=True)
    drawn = "planes reliefs accuracy trajectory eigenvectors difference cuts spectra features"
    assert figures >= {f"{name}.png" for name in drawn.split()} | {"noise.gif", "time.gif"}
    assert "gaussian-1" in page


def test_noise_that_does_not_grow_is_refused_before_anything_is_trained(tmp_path, capsys):
    for noise in ("0,0.3", "-0.1"):
        arguments = [
            "experiment",
            "landscape_noise",
            "--quiet",
            "--out",
            str(tmp_path / noise),
            "--set",
            f"noise={noise}",
        ]
        assert main(arguments) == 2
        assert "positive strengths" in capsys.readouterr().err


@pytest.mark.slow
def test_trained_with_noise_is_compared_in_pairs(small):
    results, figures, page = small("landscape_trained", "points=5", "seeds=2", "draws=2")
    assert figures == {"lines.png"}
    assert len(results["barrier"]) == 2
    for mode in ("mean", "noisy", "switched_on"):
        trace = results["compared"][mode]["trace"]
        assert trace["pairs"] == 2
        assert trace["difference"] == pytest.approx(trace["first"] - trace["second"])
    assert "With the noise on" in page
    # The first is the second of the comparison of networks with the noise on: the same networks.
    assert results["compared"]["switched_on"]["trace"]["first"] == results["compared"]["noisy"]["trace"]["second"]


@pytest.mark.slow
def test_laws_side_by_side(small):
    results, figures, page = small("landscape_laws", "points=5", "seeds=2", "laws=gaussian-0.3,bernoulli-0.8")
    assert figures == {"planes.png", "spectra.png"}
    assert set(results["compared"]) == {"gaussian-0.3", "bernoulli-0.8"}
    assert {len(scores) for scores in results["scores"].values()} == {2}
    assert "bernoulli-0.8" in page


@pytest.mark.slow
def test_network_and_equation_agree_up_to_the_weak_error(small):
    results, figures, _ = small("landscape_pde", "points=3", "paths=8", "draws=3")
    assert figures == {"planes.png", "cuts.png"}
    assert results["network"] == pytest.approx(results["pde"], rel=0.05)
    assert results["network"] - results["pde"] == pytest.approx(results["difference"], abs=1e-9)
    assert results["largest_difference"] < 0.2 * results["range"][1]


@pytest.mark.slow
def test_stochastic_depth_vanishes_with_depth_and_gaussian_noise_does_not(small):
    laws = "laws=stochastic-depth-0.5,gaussian-1"
    results, figures, _ = small("landscape_depth", "seeds=2", "draws=16", "depths=4,32", laws)
    assert figures == {"depth.png"}
    left = {law: np.divide(*one["loss"]["mean"][::-1]) for law, one in results["laws"].items()}
    assert left["stochastic-depth-0.5"] < 0.4
    assert left["gaussian-1"] > 0.7
