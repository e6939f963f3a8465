"""Readings of the noise in networks for images, in small."""

import importlib
import json

import numpy as np
import pytest

from kolmo.cli import main
from kolmo.images import Images

study = importlib.import_module("kolmo.experiments.diffusion_images")


@pytest.fixture
def small(monkeypatch, rng):
    x, y = rng.integers(0, 256, (60, 1, 12, 12), dtype=np.uint8), rng.integers(0, 10, 60)
    monkeypatch.setattr(study.images, "load", lambda *_: Images(x, y, x[:20], y[:20], "fashion-mnist"))


def test_the_study_runs_small_and_the_diffusion_is_right_for_small_branches(small, tmp_path, capsys):
    out = tmp_path / "run"
    options = {"seeds": 1, "blocks": "1,3", "keeps": "0.9", "train_images": 40, "images": 10, "epochs": 1, "batch": 20}
    options |= {"width": 4, "draws": 16}
    sets = [word for k, v in options.items() for word in ("--set", f"{k}={v}")]
    command = ["experiment", "diffusion_images", "--quiet", "--out", str(out), *sets]
    assert main(command) == 0, capsys.readouterr().err
    results = json.loads((out / "results.json").read_text())
    assert set(results) == set(study.SCALINGS)
    ratios = [results[scaling]["3"]["ratio"][0] for scaling in study.SCALINGS]
    assert ratios[0] > 1.5 * ratios[1] > 1.5 * ratios[2]  # branches of 1, 1/√3 and 1/3
    errors = [results[scaling]["3"]["keeps"]["0.9"] for scaling in study.SCALINGS]
    assert errors[2]["total_viscosity"][0] < errors[0]["total_viscosity"][0]
    assert (out / "figures" / "images.png").exists()
