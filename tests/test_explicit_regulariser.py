"""Noise against its expansions over initialisations, in small."""

import importlib
import json

import numpy as np
import pytest
import torch

from kolmo.cli import main
from kolmo.images import Images

study = importlib.import_module("kolmo.experiments.explicit_regulariser")


@pytest.fixture
def small(monkeypatch, rng):
    x = rng.integers(0, 256, (40, 1, 12, 12), dtype=np.uint8)
    y = rng.integers(0, 10, 40)
    monkeypatch.setattr(study.images, "load", lambda *_: Images(x, y, x[:5], y[:5], "fashion-mnist"))


def test_both_terms_are_those_of_the_linear_model_they_come_from(monkeypatch):
    """For scores that are linear in the noise of one layer both are ½ tr(C Hess) of the loss of the scores."""

    class Linear:
        def __init__(self, config, strength, seed):
            self.strength = strength
            self.mean = torch.randn(20, 10, generator=torch.Generator().manual_seed(seed)).double()

        def plain(self, x):
            return self.mean

        def scores(self, x, draw):
            zeta = torch.randn(20, 10, generator=torch.Generator().manual_seed(draw)).double()
            return [self.mean + self.strength * zeta, self.mean - self.strength * zeta]

    monkeypatch.setattr(study, "Pair", Linear)
    y = torch.arange(20) % 10
    config = study.Config(strengths=(0.01,), draws=300, images=20)
    found = study.one(config, torch.zeros(20, 1), y, 0)
    p = Linear(config, 1.0, 0).mean.softmax(-1)
    exact = float(0.5 * (p - p**2).sum(-1).mean())  # ½ tr(diag p − ppᵀ)
    assert found["gauss_newton"] == pytest.approx(exact, rel=0.05)
    assert found["whole"] == pytest.approx(found["gauss_newton"], rel=1e-3)
    assert found["effect"]["0.01"] == pytest.approx(1e-4 * found["whole"], rel=1e-2)


def test_mirrored_networks_differ_in_the_sign_of_the_noise_alone():
    config, x = study.Config(width=4, blocks=1), torch.randn(6, 1, 12, 12).double()
    pair = study.Pair(config, 1e-4, 3)
    with torch.no_grad():
        (plus, minus), plain = pair.scores(x, 7), pair.plain(x)
    assert float((plus - plain).norm()) > 0
    assert float((plus + minus - 2 * plain).norm()) < 0.05 * float((plus - plain).norm())


def test_the_study_runs_small(small, tmp_path, capsys):
    out = tmp_path / "run"
    options = {"networks": 4, "images": 20, "draws": 2, "width": 4, "blocks": 1, "strengths": "0.05,0.2", "workers": 1}
    sets = [word for k, v in options.items() for word in ("--set", f"{k}={v}")]
    command = ["experiment", "explicit_regulariser", "--quiet", "--out", str(out), *sets]
    assert main(command) == 0, capsys.readouterr().err
    results = json.loads((out / "results.json").read_text())
    assert set(results) == {"0.05", "0.2"}
    assert (out / "figures" / "scatter.png").exists()
