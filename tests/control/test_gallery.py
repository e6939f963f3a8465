"""The gallery in small: its references on cases with exact answers, its results against them, policies by paths."""

import numpy as np
import pytest
import torch

from kolmo import experiments
from kolmo.cli.text import readable
from kolmo.runs import Run

bang_bang, uncertain, put, moons, spirals = (
    experiments.load(name)
    for name in ("bang_bang", "uncertain_volatility", "american_put", "two_moons_bridge", "spirals")
)


def small(experiment, tmp_path, **options):
    config = experiment.Config(**options)
    with Run.create("small", {}, root=tmp_path) as run:
        results = experiment.run(config, run, False)
        assert list((run.folder / "figures").glob("*.png"))
        run.save_results(results)
    finished = Run.open(run.folder)
    assert experiment.report(finished)
    assert readable(finished.results)  # what the terminal shows
    return results


def agrees(rolled, value, estimate):
    allowed = 4 * np.asarray(rolled["standard_error"]) + np.asarray(rolled["bias_estimate"]) + estimate
    return bool(np.all(np.abs(np.asarray(rolled["mean"]) - value) <= allowed))


def test_bang_bang_meets_the_closed_form(tmp_path):
    results = small(bang_bang, tmp_path, points=(0.0, 0.5), rtols=(1e-3,), width=0.2, maxiter=10, paths=500, steps=64)
    for sense, by_rtol in results["by_tolerance"].items():
        exact = np.asarray(results["exact"][sense])
        assert by_rtol["0.001"]["error"] < 1e-3 * exact.max()
        assert agrees(results["roll_outs"][sense], exact, 1e-3 * exact.max())
        assert abs(results["switch"][sense]) < 0.02
    assert 0 < results["fitted"]["below_optimum_relative"] < 0.1
    assert abs(results["fitted"]["switch"]) < 0.05


def test_exit_times_solve_their_equation():
    config, h = bang_bang.Config(sigma=0.8, bound=1.3), 1e-3
    for sense, sign in (("max", -1.0), ("min", 1.0)):
        low, middle, high = (bang_bang.mean_exit_time(config, sense, np.array([0.4 + k * h])) for k in (-1, 0, 1))
        slope, curvature = (high - low) / (2 * h), (high - 2 * middle + low) / h**2
        assert sign * 1.3 * slope + 0.5 * 0.8**2 * curvature + 1.0 == pytest.approx(0.0, abs=1e-4)
        assert bang_bang.mean_exit_time(config, sense, np.array([1.0])) == pytest.approx(0.0)


def test_the_lattice_of_a_convex_payoff_is_black_scholes():
    # seen from 110 a strike of 60 counts for nothing: what is left is convex, and the low volatility is worst
    config = uncertain.Config(strikes=(60.0, 60.0, 110.0), spots=(110.0,), lattice=(300, 900))
    found = uncertain._lattices(config, "min")
    assert found["value"] == pytest.approx(uncertain.constant(config, (0.15,) * 3, np.array([110.0])), abs=2e-4)


def test_butterfly_meets_the_lattice(tmp_path):
    results = small(uncertain, tmp_path, spots=(95.0,), rtols=(1e-3,), lattice=(300, 900), paths=1000, steps=32)
    for sense, side in (("max", 1.0), ("min", -1.0)):
        value, rolled = results["lattice"][sense]["value"], results["roll_outs"][sense]
        assert np.all(results["by_tolerance"][sense]["0.001"]["error"] < 2e-3 * np.asarray(value))
        assert agrees(rolled, value, 2e-3 * np.asarray(value))
        assert side * (results["bound"][sense][0] - value[0]) > 0
        for constant in results["constant"].values():
            assert side * (value[0] - constant[0]) > 0


def test_put_meets_the_trees(tmp_path):
    results = small(put, tmp_path, spots=(100.0,), rtols=(1e-3,), tree=500, paths=2000, steps=100)
    assert results["tree"][0] == pytest.approx(6.0904, abs=2e-4)
    assert results["by_tolerance"]["0.001"]["error"][0] < 1e-3 * results["tree"][0]
    assert agrees(results["roll_out"], results["tree"], 1e-3 * results["tree"][0])
    assert results["european"][0] == pytest.approx(5.5735, abs=1e-4)


@pytest.mark.slow
def test_moons_meet_the_exact_kernel(tmp_path):
    results = small(moons, tmp_path, rtols=(1e-3,), nodes=61, paths=1000, steps=32)
    found = results["by_tolerance"]["0.001"]
    assert found["error"] < found["error_estimate"] + results["exact_uncertainty"] < 2e-3 * results["exact"]
    assert results["middle_total_variation"] < 2e-3
    assert agrees(results["roll_out"], results["exact"], found["error_estimate"])
    assert agrees(results["end"], results["end"]["exact"], 0.02)
    still = results["small"]
    assert still["status"] == "converged"
    assert agrees(still["roll_out"], still["cost"], still["errors"]["cost"])
    assert agrees(still["end"], still["end"]["exact"], 0.02)


@pytest.mark.slow
def test_spirals_learn_through_the_equation_as_through_paths(tmp_path):
    options = {"iterations": 30, "nodes": 33, "steps": 8, "train": 200, "test": 200, "judged": 10, "judged_steps": 16}
    results = small(spirals, tmp_path, **options)
    for route in spirals.ROUTES:
        assert results["bound"] < results[route]["expected"] < 0.45
        assert results[route]["accuracy"] > 0.75
    assert abs(results["equation_above_paths"]) < 0.1


def test_no_label_seeing_controller_is_dearer_than_doing_nothing():
    config = spirals.Config()
    flow, (x, y) = spirals.Flow(config), spirals.examples(config, config.test, config.seed + 1)
    rng = torch.Generator().manual_seed(0)
    idle = flow.losses(x + config.sigma * torch.randn(200, *x.shape, generator=rng))[:, torch.arange(len(y)), y].mean()
    assert 0 < spirals._bound(config, flow) < float(idle)
