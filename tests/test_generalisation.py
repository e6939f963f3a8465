"""The sweep over laws and strengths in the overfitting regime, in small, and the statistics that it is told with."""

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from kolmo.cli import main
from kolmo.images import Images

sweep = importlib.import_module("kolmo.experiments.generalisation")
pairs = importlib.import_module("kolmo.experiments._pairs")


@pytest.fixture
def small(monkeypatch, rng):
    """Images of ten kinds that can be learnt, in place of files."""
    labels = [rng.integers(0, 10, n) for n in (200, 60)]
    x, test_x = (
        (25 * y[:, None, None, None] + rng.integers(0, 20, (len(y), 1, 12, 12))).astype(np.uint8) for y in labels
    )
    found = Images(x, labels[0], test_x, labels[1], "fashion-mnist")
    monkeypatch.setattr(sweep.images, "load", lambda *_: found)
    sweep.standardised.cache_clear()
    yield found
    sweep.standardised.cache_clear()


SMALL = {"train_images": 40, "held_out": 50, "epochs": 2, "batch": 20, "width": 4, "blocks": 1, "path_images": 30}
SMALL |= {"workers": 1, "seeds": 2, "rates": "0.01,0.1"}


def _sets(options):
    return [word for key, value in options.items() for word in ("--set", f"{key}={value}")]


def test_the_sweep_runs_small_and_reports_before_it_is_done(small, tmp_path, capsys, monkeypatch):
    out, names = tmp_path / "run", "none,weight-decay-0.01,dropout-0.8,dropout-0.5"
    network = sweep.network

    def until(config, law, seed, rate):
        if law == "dropout-0.5":
            raise KeyboardInterrupt
        return network(config, law, seed, rate)

    monkeypatch.setattr(sweep, "network", until)
    start = ["experiment", "generalisation", "--quiet", "--out", str(out), *_sets(SMALL | {"laws": names})]
    assert main(start) == 1
    assert main(["report", str(out)]) == 0
    assert "weight-decay-0.01" in (out / "report.html").read_text()
    monkeypatch.setattr(sweep, "network", network)
    assert main(["experiment", "generalisation", "--quiet", "--resume", str(out)]) == 0, capsys.readouterr().err
    results = json.loads((out / "results.json").read_text())
    assert set(results["differences"]) == set(names.split(",")) - {"none"}
    assert set(results["chosen"]) == {"weight-decay", "dropout"}
    drawn = {path.stem for path in (out / "figures").glob("*.png")}
    assert drawn == {"strengths", "chosen", "paths"}


def test_a_sweep_goes_on_from_the_rows_of_another(small, tmp_path, capsys, monkeypatch):
    path = tmp_path / "rows.jsonl"
    options = SMALL | {"laws": "none,dropout-0.8", "rows": path}
    one, other = tmp_path / "one", tmp_path / "other"
    start = ["experiment", "generalisation", "--quiet"]
    assert main([*start, "--out", str(one), *_sets(options)]) == 0, capsys.readouterr().err
    assert len(path.read_text().splitlines()) == 2 * 2 + 2 * 2
    assert "state" not in path.read_text()

    def trained(*_):
        raise AssertionError("trained again")

    monkeypatch.setattr(sweep, "trained", trained)
    assert main([*start, "--out", str(other), *_sets(options)]) == 0, capsys.readouterr().err
    first, second = (json.loads((out / "results.json").read_text())["differences"] for out in (one, other))
    assert second["dropout-0.8"]["loss"] == pytest.approx(first["dropout-0.8"]["loss"], rel=1e-3)


def test_images_of_a_seed_are_its_own_and_held_out_images_are_others(small):
    config = sweep.Config(train_images=40, held_out=50, seeds=2)
    x = sweep.standardised(config.dataset, config.data)[0]
    rows = {row.numpy().tobytes(): k for k, row in enumerate(x)}
    one, other = (sweep.split(config, seed) for seed in (0, 1))

    def ids(part):
        return {rows[row.numpy().tobytes()] for row in part[0]}

    assert len(ids(one.train)) == 40
    assert not ids(one.train) & ids(one.held_out)
    assert ids(one.train) != ids(other.train)


def test_the_first_wave_has_every_law_and_all_waves_have_every_pair_once():
    config = sweep.Config()
    waves = list(sweep.waves(config))
    assert (
        waves[0][0]
        == waves[1][0]
        == [
            "none",
            "weight-decay-0.006",
            "dropout-0.8",
            "stochastic-depth-0.6",
            "gaussian-0.3",
            "bernoulli-0.5",
        ]
    )
    done = [(law, seed) for names, seeds in waves for seed in seeds for law in names]
    assert len(done) == len(set(done)) == len(config.laws) * config.seeds
    assert waves[1][1] == list(range(5, 10))  # ten seeds of the middle strengths, before any other


def test_error_at_a_training_loss_is_read_on_the_way_down():
    path = [{"train": {"loss": a}, "test": {"error": b}} for a, b in ((1.0, 0.5), (0.1, 0.3), (0.4, 0.9), (0.01, 0.2))]
    assert sweep.error_at(path, 2.0) == 0.5
    assert sweep.error_at(path, 0.1) == pytest.approx(0.3)
    assert sweep.error_at(path, 10**-1.5) == pytest.approx(0.25)
    assert sweep.error_at(path, 1e-9) == pytest.approx(0.2)


def test_regulariser_is_of_the_noise_of_the_same_name(small):
    """First order of what the noise adds to the loss, where the noise is small."""
    config = sweep.Config(width=4)
    x, y, _, _ = sweep.standardised(config.dataset, config.data)
    x, y = x[:10].repeat(100, 1, 1, 1), y[:10].repeat(100)  # a hundred draws in one pass
    torch.manual_seed(0)
    quiet, noisy = (sweep.built(config, law).train() for law in ("regulariser-0.03", "gaussian-0.03"))
    noisy.load_state_dict(quiet.state_dict())
    term = sweep.objective(config, "regulariser-0.03", quiet, x)
    with torch.no_grad():
        base = float(sweep.nets.cross_entropy(quiet, x, y))
        added = [float(sweep.nets.cross_entropy(noisy, x, y)) - base for _ in range(16)]
        terms = [float(term(quiet, x, y)) - base for _ in range(16)]
    spread = np.hypot(stats.sem(added), stats.sem(terms))
    assert abs(np.mean(added) - np.mean(terms)) < 3 * spread + 0.1 * abs(np.mean(added))
    assert abs(np.mean(terms)) > 6 * spread  # so that a factor of two would be seen


def test_paired_differences_and_corrections(rng):
    a, b = rng.normal(size=8), rng.normal(size=8)
    gap = pairs.paired(a, b)
    known = stats.ttest_rel(a, b)
    low, high = known.confidence_interval(0.95)
    assert (gap.p, gap.mean - gap.half, gap.mean + gap.half) == pytest.approx((known.pvalue, low, high))
    p = dict(zip("abcd", (0.01, 0.04, 0.03, 0.005), strict=True))
    assert pairs.holm(p) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02})  # Holm's procedure by hand


def test_rank_correlation_has_an_interval_that_holds(rng):
    """Over draws of correlated groups: the interval has the known correlation in it about as often as it says."""
    rho, hits = 0.5, 0
    truth = 6 / np.pi * np.arcsin(rho / 2)  # Spearman's of a Gaussian pair
    for k in range(40):
        a = rng.normal(size=120)
        b = rho * a + np.sqrt(1 - rho**2) * rng.normal(size=120)
        found = pairs.rank_correlation(a, b, list(range(120)), draws=100, seed=k)
        assert found.value == pytest.approx(stats.spearmanr(a, b).statistic)
        hits += found.low <= truth <= found.high
    assert hits >= 32


def test_committed_rows_are_those_of_the_default_options():
    """What docs/findings.md is written from: no network of it would be trained again."""
    path = Path(__file__).parents[1] / "docs" / "data" / "generalisation.jsonl"
    config = sweep.Config(rows=str(path))
    names = next(sweep.waves(config))[0]
    networks = [sweep._key(name, seed) for name in names for seed in range(8)]
    assert sweep.rows(config).lacking([*networks, *(sweep._tuning(*one) for one in sweep.trials(config, names))]) == []
    assert sweep.rows(sweep.Config(rows=str(path), epochs=7)).lacking(networks) == networks
