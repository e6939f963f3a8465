"""Schedules of one mean: what they are, and that batches of networks are networks."""

import importlib
import json

import pytest
import torch

from kolmo.cli import main

study = importlib.import_module("kolmo.experiments.survival_schedules")
SMALL = study.Config(seeds=2, depths=(3,), budgets=(0.7,), train=20, test=40, width=4, steps=5)


@pytest.mark.parametrize("name", study.SCHEDULES)
@pytest.mark.parametrize("budget", [0.8, 0.6])
def test_every_schedule_has_the_mean(name, budget):
    shares = torch.tensor([[0.01, 0.2, 0.03, 0.6, 0.05, 0.1], [0.3, 0.3, 0.3, 0.3, 0.3, 0.3]])
    keep = study.keep_probabilities(name, budget, 6, shares)
    assert keep.mean(1) == pytest.approx([budget, budget], abs=1e-5)
    assert float(keep.min()) >= 0.1 - 1e-6
    if name == "budgeted":
        drop = 1 - keep[0]
        assert float(drop[0] / drop[2]) == pytest.approx(1 / 3, rel=1e-4)  # in proportion below the largest
        assert keep[1] == pytest.approx([budget] * 6, abs=1e-5)


def test_networks_of_a_batch_are_each_alone():
    flows = study.Flows([3, 4], 5, 8)
    x = torch.randn(2, 7, 2, generator=torch.Generator().manual_seed(0))
    together = flows(x)
    for k in range(2):
        assert torch.allclose(together[k], flows.alone(k)(x[k]), atol=1e-6)
    scales = torch.ones(2, 7, 5)
    scales[0, 0, 2] = 0.0
    moved = flows(x, scales)
    assert not torch.allclose(moved[0, 0], together[0, 0])
    assert torch.allclose(moved[0, 1:], together[0, 1:])
    assert torch.allclose(moved[1], together[1])


def test_training_in_a_batch_is_training_alone():
    both = study.fitted(SMALL, [0, 1], 3, None)
    alone = study.fitted(SMALL, [1], 3, None)
    assert torch.allclose(both.W1[1], alone.W1[0], atol=1e-5)


def test_the_study_runs_small(tmp_path, capsys):
    out = tmp_path / "run"
    options = {"seeds": 2, "depths": "3", "budgets": "0.7", "train": 20, "test": 40, "width": 4, "steps": 5}
    sets = [word for k, v in options.items() for word in ("--set", f"{k}={v}")]
    command = ["experiment", "survival_schedules", "--quiet", "--out", str(out), *sets]
    assert main(command) == 0, capsys.readouterr().err
    results = json.loads((out / "results.json").read_text())
    assert set(results["3"]) == {"none", "uniform-0.7", "linear-0.7", "budgeted-0.7"}
    assert results["3"]["linear-0.7"]["to_uniform"]["loss"]["pairs"] == 2
    assert (out / "figures" / "schedules.png").exists()
