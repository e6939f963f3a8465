"""The experiments on networks, small: what they measure is what theory says."""

import dataclasses

import numpy as np
import pytest

from kolmo import experiments
from kolmo.cli.text import readable
from kolmo.runs import Run

weak_orders, depth_consistency, trainings = map(experiments.load, ("weak_orders", "depth_consistency", "trainings"))


@pytest.mark.parametrize(("law", "order"), [("stochastic depth ½", 2), ("additive Gaussian", 1)])
def test_weak_orders_are_those_predicted(law, order):
    found = weak_orders.compare(weak_orders.Config(depths=(8, 16)), law, 1, order)
    assert found["order"] == pytest.approx(weak_orders.predicted(law, order), abs=0.15)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("law", "order"), [("centred Bernoulli 0.9, jumps", 1), ("stochastic depth 0.8, jumps", 2), ("dropout ½, jumps", 2)]
)
def test_weak_orders_of_jumps_are_those_predicted(law, order):
    assert weak_orders.predicted(law, order) == order
    found = weak_orders.compare(weak_orders.Config(depths=(8, 16)), law, 1, order)
    assert found["order"] == pytest.approx(order, abs=0.15)


def test_depth_consistency(tmp_path):
    config = depth_consistency.Config(seeds=1, seed=1, depths=(8, 16), width=4, rtol=0.05, workers=1)
    with Run.create("depth_consistency", dataclasses.asdict(config), out=tmp_path / "run") as run:
        found = depth_consistency.run(config, run, progress=False)
        run.save_results(found)
    finished = Run.open(run.folder)
    assert depth_consistency.report(finished)
    assert readable(finished.results)  # what the terminal shows
    slopes = [r["slope"] for r in found.values()]
    np.testing.assert_allclose(slopes, [-1, -1, 0], atol=0.1)


def test_trainings_start_alike_and_learn():
    config = trainings.Config(steps=6, train=60, test=60, nodes=(17, 25), depth=3, width=4, paths=20)
    found = {name: trainings.trained(config, "moons", name, 0, 0.05) for name in trainings.TRAININGS}
    first = [one["history"][0] for one in found.values()]
    assert np.ptp(first) < 0.15 * max(first)  # one loss in three ways
    assert all(one["history"][-1] < one["history"][0] for one in found.values())
    assert all(one["regions"].shape == (81, 81) for one in found.values())


def test_trainings_at_equal_cost_take_steps_by_their_prices():
    config = trainings.Config(steps=6, equal_cost=True)
    steps = {name: trainings.steps_of(config, name) for name in trainings.TRAININGS}
    assert steps == {"sampled": 480, "PDE": 6, "regularised": 48}
    assert trainings.steps_of(trainings.Config(steps=6), "sampled") == 6
