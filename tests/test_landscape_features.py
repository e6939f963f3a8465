"""The landscape in feature space against closed forms, figures that can be drawn, pages that open offline."""

import builtins
import dataclasses
import html
import json
import re
import shutil
import subprocess

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from torch import nn

from kolmo import bridge, landscape
from kolmo.errors import InputError, MissingExtraError


class Linear(nn.Module):
    """Branch f(x) = −x/2."""

    dim = 1

    def forward(self, x):
        return -0.5 * x


def flow(dim=1):
    torch.manual_seed(0)
    branch = Linear() if dim == 1 else bridge.MLPBranch.create(2, 6, rng=0)
    return bridge.FlowClassifier(
        nn.Linear(3, dim), bridge.NoisyResNet([branch] * 8, bridge.Additive(0.3)), nn.Linear(dim, 2)
    ).double()


@pytest.fixture(scope="module")
def plane():
    model = flow(2)
    data = torch.randn(12, 3, dtype=torch.float64), torch.arange(12) % 2
    laws = {"s = 0.2": bridge.Additive(0.2), "s = 0.6": bridge.Additive(0.6)}
    return landscape.feature_landscape(model, laws, data=data, points=15, times=(0.0, 0.5), rtol=1e-3)


@pytest.fixture(scope="module")
def surfaces():
    model = nn.Linear(3, 2)
    where = landscape.random_plane(model)
    x = torch.randn(16, 3)

    def loss(f):
        return (f(x) + 0.1 * torch.randn(16, 2)).square().mean()

    return {f"{k}": landscape.surface(loss, model, where, points=9, draws=3, seed=k) for k in (0, 5)}


def test_feature_landscape_is_a_gaussian_expectation():
    model = flow()
    found = landscape.feature_landscape(model, window=[(-2.0, 2.0)], points=9, times=(0.0,), rtol=1e-5, atol=1e-7)
    # dX = −X/2 dt + 0.3 dW over [0, 1]: Gaussian with mean x e^{−1/2} and variance 0.09 (1 − e^{−1}).
    x = found.axes[0]
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    final = x[:, None] * np.exp(-0.5) + np.sqrt(0.09 * (1 - np.exp(-1))) * nodes
    with torch.no_grad():
        losses = model.class_losses(torch.as_tensor(final)[..., None]).numpy()
    weights = weights / weights.sum()
    np.testing.assert_allclose(found.loss[0, 0], np.einsum("nqk,q->nk", losses, weights), atol=3e-5)
    np.testing.assert_allclose(found.probability[0, 0], np.einsum("nqk,q->nk", np.exp(-losses), weights), atol=3e-5)
    np.testing.assert_allclose(found.probability.sum(-1), 1.0, atol=1e-5)
    numeric = np.gradient(found.loss[0, 0, :, 0], x, edge_order=2)
    np.testing.assert_allclose(found.gradient[0, :, 0, 0], numeric, atol=0.03)


def test_noise_smooths_the_probability(plane):
    slope = plane.slope[..., 2:].max((1, 2, 3))
    assert slope[1] < slope[0]
    assert plane.loss.shape == (2, 2, 15, 15, 2)
    assert plane.hessian.shape == (2, 15, 15, 2, 2, 4)
    assert plane.trajectories.shape == (2, 9, 12, 2)


def test_feature_landscape_is_read_back(tmp_path, plane):
    plane.save(tmp_path / "f.npz")
    again = landscape.FeatureLandscape.load(tmp_path / "f.npz")
    np.testing.assert_array_equal(again.loss, plane.loss)
    assert again.levels == plane.levels


def test_plots_draw_into_the_axes_given(surfaces, plane, tmp_path):
    one = surfaces["0"]
    for kind in ("contour", "surface"):
        ax = plt.figure().add_subplot(projection="3d" if kind == "surface" else None)
        assert one.plot(kind, ax=ax) is ax
    ax = landscape.plots.cut(surfaces)
    assert len(ax.lines) == 2
    band = ax.collections[0].get_paths()[0].vertices[:, 1]
    assert np.isclose(band.max(), (one.mean + 2 * one.standard_error)[:, 4].max(), atol=1e-6)
    model = nn.Linear(6, 1)
    ax = landscape.curvature(lambda f: f.weight.pow(4).sum() + f.bias.square().sum(), model, top=2).plot()
    assert ax.get_yscale() == "log"
    for kind in ("loss", "probability", "slope", "laplacian"):
        ax = plane.plot(kind=kind, level=1, paths=5)
    marks = {(line.get_color(), line.get_marker()) for line in ax.lines}
    assert len(marks) == len({mark for _, mark in marks}) == len(set(plane.labels[:5].tolist())) > 1
    landscape.plots.animate(plane, tmp_path / "noise.gif", over="noise")
    landscape.plots.animate(plane, tmp_path / "time.gif", over="time")
    assert (tmp_path / "noise.gif").read_bytes()[:3] == b"GIF"
    plt.close("all")
    with pytest.raises(InputError, match="kind"):
        one.plot("heat")


def test_panels_share_one_scale(surfaces):
    low, high = (one(surface.mean.ravel().tolist()[0] for surface in surfaces.values()) for one in (min, max))
    assert low < high  # so that a scale of its own would show
    panels = landscape.plots.panels(surfaces, plt.figure(), label="averaged")
    assert [ax.get_title() for ax in panels] == list(surfaces)
    limits = {ax.collections[0].get_clim() for ax in panels}
    everything = np.concatenate([one.mean.ravel() for one in surfaces.values()])
    assert len(limits) == 1
    np.testing.assert_allclose(limits.pop(), (everything.min(), everything.max()))
    bars = [ax for ax in panels[0].figure.axes if ax not in panels]
    assert [bar.get_ylabel() for bar in bars] == ["averaged"]
    solid = landscape.plots.panels(surfaces, plt.figure(), kind="surface", columns=1)
    assert len({ax.get_zlim() for ax in solid}) == 1
    assert {ax.collections[0].get_clim() for ax in solid} == {solid[0].get_zlim()}
    plt.close("all")
    one = next(iter(surfaces.values()))
    for bad, options, name in (
        ({}, {}, "surfaces"),
        (surfaces, {"kind": "heat"}, "kind"),
        (surfaces, {"columns": 0}, "columns"),
        ({"below": one.rise()}, {"log": True}, "log"),
        ({"one": one, "difference": one.difference(one)}, {}, "surfaces"),
    ):
        with pytest.raises(InputError, match=name):
            landscape.plots.panels(bad, **options)


def test_the_page_is_self_contained(surfaces, plane, tmp_path):
    pytest.importorskip("plotly")
    landscape.write_html(surfaces, tmp_path / "s.html")
    landscape.write_html(plane, tmp_path / "f.html", kind="probability")
    page = (tmp_path / "s.html").read_text()
    assert "<script src=" not in page
    assert '"sliders"' in page
    assert len(page) > 1e6  # the library is inside


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# A profile of its own, software WebGL, no network; virtual time waits for what the page does.
HEADLESS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--use-gl=angle",
    "--use-angle=swiftshader",
    "--enable-unsafe-swiftshader",
    "--run-all-compositor-stages-before-draw",
    "--virtual-time-budget=30000",
    "--dump-dom",
]
WATCH = """<script>
const errors = [];
addEventListener("error", event => errors.push(String(event.message)));
console.error = (...words) => errors.push(words.join(" "));
</script>"""
# Press the right end of the slider; what was seen before and after becomes the title.
MOVE = """<script>
addEventListener("load", async () => {
  const chart = document.getElementById("landscape");
  const seen = async () => ({
    visible: chart.data.map(trace => trace.visible),
    scene: (await Plotly.toImage({data: chart.data, layout: {scene: chart.layout.scene}}, {format: "png"})).length});
  const before = await seen();
  const rail = chart.querySelector(".slider-rail-touch-rect"), box = rail.getBoundingClientRect();
  const at = {clientX: box.right - 2, clientY: box.top + box.height / 2, bubbles: true};
  for (const kind of ["mousedown", "mouseup"]) rail.dispatchEvent(new MouseEvent(kind, at));
  for (let frame = 0; frame < 2; frame++) await new Promise(requestAnimationFrame);
  const fetched = performance.getEntriesByType("resource").map(entry => entry.name);
  document.title = JSON.stringify({before, after: await seen(), fetched, errors});
});
</script>"""


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
@pytest.mark.parametrize("content", ["surfaces", "plane"])
def test_the_page_opens_in_a_browser_and_its_slider_changes_the_surface(content, tmp_path, request):
    pytest.importorskip("plotly")
    path = tmp_path / "page.html"
    landscape.write_html(request.getfixturevalue(content), path)
    page = path.read_text().replace("<head>", "<head>" + WATCH, 1).replace("</body>", MOVE + "</body>", 1)
    path.write_text(page)
    command = [BROWSER, *HEADLESS, f"--user-data-dir={tmp_path / 'profile'}", path.as_uri()]
    for _ in range(3):  # where a machine is busy, virtual time may end before the surface is drawn
        opened = subprocess.run(command, capture_output=True, text=True, timeout=180, check=True).stdout
        title = html.unescape(re.search("<title>(.*?)</title>", opened, re.DOTALL)[1])
        if title.startswith("{"):
            break
    found = json.loads(title)
    assert found["errors"] == []
    assert found["fetched"] == []
    assert found["before"]["visible"][0] is found["after"]["visible"][-1] is True
    assert sum(found["before"]["visible"]) == sum(found["after"]["visible"]) == 1
    assert found["before"]["scene"] != found["after"]["scene"]


def test_a_missing_plotly_is_named(surfaces, tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *rest, **named):
        if name.startswith("plotly"):
            raise ImportError(name)
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtraError, match=r"kolmo\[plotly\]"):
        landscape.write_html(surfaces, tmp_path / "s.html")


def test_differences_are_white_at_zero():
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 1, bias=False)
    plane, there = landscape.random_plane(model, seed=0), float(model.weight.detach().sum())
    one, other = (
        landscape.surface(loss, model, plane, points=9)
        for loss in (lambda f: f.weight.square().sum() + f.weight.sum() - there, lambda f: f.weight.square().sum())
    )
    difference = one.difference(other)
    assert difference.mean.min() < 0 < difference.mean.max()
    filled = difference.plot().collections[0]
    assert filled.norm(0.0) == 0.5
    assert filled.get_cmap().name == landscape.canvas.DIFFERENCES
    assert other.plot().collections[0].get_cmap().name == landscape.canvas.MAP
    above = dataclasses.replace(difference, values={difference.name: np.abs(difference.values[difference.name]) + 0.1})
    for filled in (above.plot().collections[0], landscape.plots.panels({"both": above})[0].collections[0]):
        assert filled.norm(0.0) == 0.5  # of one sign too
        assert filled.norm(above.mean.max()) == pytest.approx(1.0, abs=0.05)
