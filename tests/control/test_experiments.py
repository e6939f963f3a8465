"""The control experiments in small: what they report agrees with what they compare with."""

import pytest

from kolmo import experiments
from kolmo.cli.experiment import report
from kolmo.cli.text import readable
from kolmo.runs import Run


def small(name, tmp_path, **options):
    experiment = experiments.load(name)
    config = experiment.Config(**options)
    with Run.create(name, {}, root=tmp_path) as run:
        results = experiment.run(config, run, False)
        figures = sorted(path.stem for path in (run.folder / "figures").glob("*.png"))
        run.save_results(results)
    finished = Run.open(run.folder)
    assert report(finished).exists()
    assert readable(finished.results)  # what the terminal shows
    return results, figures


def agrees(rolled, value, estimate):
    return abs(rolled["mean"] - value) <= 4 * rolled["standard_error"] + abs(rolled["bias_estimate"]) + estimate


@pytest.mark.slow
def test_lqg_meets_riccati(tmp_path):
    results, figures = small("lqg", tmp_path, rtols=(1e-3,), intervals=4, paths=2000, steps=32)
    assert figures == ["gains"]
    assert results["by_tolerance"]["0.001"]["error"] < 1e-3 * results["exact"]
    assert 0 <= results["fitted_gains"]["above_optimum"] < 0.01
    assert agrees(results["roll_out"], results["exact"], 1e-3)


@pytest.mark.slow
def test_double_well_routes_agree_and_the_fit_is_no_better_than_the_optimum(tmp_path):
    results, figures = small("double_well", tmp_path, rtol=1e-3, maxiter=15, paths=2000, steps=60)
    assert figures == ["costs", "policies"]
    best = results["values"]["dynamic programming"]
    assert results["routes_differ_by"] < 2e-3 * best["value"]
    assert -2e-3 * best["value"] < results["fitted_above_optimum"] < 0.5 * best["value"]
    assert agrees(results["roll_outs"]["dynamic programming"], best["value"], best["error_estimate"])


@pytest.mark.slow
def test_fitting_finds_the_closed_form_and_the_true_flow(tmp_path):
    results, figures = small("fitting", tmp_path, observations=120, nodes=101, nodes_flow=33, rtol=1e-4)
    assert figures == ["flow", "path"]
    assert results["path"]["distance"] < 1e-3
    assert results["flow"]["distance"] < 1e-2
