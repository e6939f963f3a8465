"""The map of readings in small: its control variates keep the mean, and its terms are those of theory."""

import dataclasses
import importlib
import itertools
import json
import math

import pytest
import torch

from kolmo.cli import main

study = importlib.import_module("kolmo.experiments.diffusion_map")
SMALL = study.Config(
    depths=(2,), keeps=(0.9, 0.5), seeds=2, paths=400, inputs=8, steps=30, train=60, width=6, workers=1
)


def _exact(layers, law):
    """Effect of the noise by all outcomes of all layers."""
    noise = study.Noise(layers, law)
    values, chances = law.variable.nodes(2)
    total = 0.0
    for outcome in itertools.product((0, 1), repeat=layers.depth * noise.columns):
        zeta = torch.tensor([values[k] for k in outcome]).reshape(layers.depth, noise.columns)
        moved = noise.loss(zeta.expand(len(layers.x), -1, -1)) - layers.noise_free
        total = total + math.prod(chances[k] for k in outcome) * moved
    return total


@pytest.mark.parametrize("name", list(study.LAWS))
def test_sampled_effect_is_that_of_all_outcomes(name):
    layers, law = study.Layers(study.trained(SMALL, "1", 3, 0)), study.LAWS[name](0.8)
    found, error = study.effect(layers, law, study.own(law), 4000, torch.Generator().manual_seed(0))
    z = (found - _exact(layers, law)) / error
    assert float(z.square().mean()) < 3.0
    assert float(error.max()) < 0.1 * float(found.abs().max())


@pytest.mark.parametrize("name", list(study.LAWS))
def test_leading_terms_are_the_limit_of_small_branches(name):
    """Errors of both readings over the theory's: their ratio tends to one as the noise gets small."""
    config = dataclasses.replace(SMALL, scale=0.4)
    network = study.trained(config, "1/L", 3, 1)
    for branch in network.net.branches:
        branch.W2.mul_(0.1)
        branch.b2.mul_(0.1)
    layers, law = study.Layers(network), study.LAWS[name](0.8)
    terms = study.cumulants(layers, law)
    exact, second = _exact(layers, law), terms.second / 2
    third = law.variable.skewness * terms.third / 6
    assert float((exact - second).norm()) < 0.1 * float(exact.norm())
    # What is left of two orders is of the next: pairs of layers, and fourth moments.
    single = study.Singles(layers, law).mean.sum(0)
    fourth = law.variable.excess_kurtosis * terms.fourth / 24 + 3 * terms.squared / 24
    assert float((single - second - third).norm()) < 0.2 * float((single - second).norm())
    assert float((single - second - third - fourth).norm()) < 0.2 * float((single - second - third).norm())


def test_jumps_have_the_moments_of_a_poisson_number_of_steps():
    law = study.LAWS["stochastic-depth"](0.8)
    steps = study.poisson(law)((200_000, 1, 1), torch.Generator().manual_seed(0))
    zeta = sum(taken * step for taken, step in steps).flatten()
    assert float(zeta.mean()) == pytest.approx(0.0, abs=0.01)
    assert float(zeta.square().mean()) == pytest.approx(1.0, abs=0.02)
    assert float((zeta**3).mean()) == pytest.approx(law.variable.skewness, abs=0.1)


def test_the_map_runs_small(tmp_path, capsys):
    out = tmp_path / "run"
    options = {k: v for k, v in dataclasses.asdict(SMALL).items() if v != getattr(study.Config(), k)}
    options = {k: ",".join(map(str, v)) if isinstance(v, tuple) else v for k, v in options.items()}
    sets = [word for k, v in (options | {"steps": 3, "paths": 20}).items() for word in ("--set", f"{k}={v}")]
    assert main(["experiment", "diffusion_map", "--quiet", "--out", str(out), *sets]) == 0, capsys.readouterr().err
    results = json.loads((out / "results.json").read_text())
    assert list(results) == list(study.SCALINGS)
    assert len(results["1"]["2"]["keeps"]["0.9"]["error"]["diffusion"]) == 2
    assert {path.stem for path in (out / "figures").glob("*.png")} == {"map", "theory"}
