"""A report in a real browser: no errors on the console, nothing wider than a phone, every picture there; on paper."""

import html
import importlib.util
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure as Canvas

from kolmo.report import Code, Figure, Measured, Relief, Section, Table, write_html

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs Chromium or Chrome on the path")
FLAGS = "--headless --disable-gpu --disable-quic --no-first-run --disable-background-networking"
FLAGS += " --disable-component-update --disable-sync --enable-logging=stderr --virtual-time-budget=8000"

# The report is looked at in frames of the width of a phone and of a desk; what is seen there is written into the page.
PROBE = """<!DOCTYPE html><meta charset="utf-8"><link rel="icon" href="data:,">
<iframe srcdoc="{page}" width="360" height="800"></iframe><iframe srcdoc="{page}" width="1280" height="800"></iframe>
<script>
function inked(canvas) {{
  const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
  return data.filter((value, i) => i % 4 === 3 && value > 0).length / (data.length / 4);
}}
function seen(frame) {{
  const page = frame.contentDocument, root = page.documentElement;
  const [canvas, slider, output] = ["canvas", "input", "output"].map((name) => page.querySelector(name));
  const before = [output.textContent, canvas.toDataURL()];
  slider.value = slider.max;
  slider.dispatchEvent(new Event("input"));
  const after = [output.textContent, canvas.toDataURL()];
  canvas.dispatchEvent(new KeyboardEvent("keydown", {{ key: "ArrowLeft" }}));
  return {{
    overflow: root.scrollWidth - root.clientWidth,
    pictures: [...page.images].map((image) => image.complete && image.naturalWidth),
    inked: inked(canvas),
    words: [before[0], after[0]],
    slid: before[1] !== after[1],
    turned: after[1] !== canvas.toDataURL(),
  }};
}}
window.addEventListener("load", () => setTimeout(() => {{
  const found = document.createElement("pre");
  found.textContent = "FOUND" + JSON.stringify([...document.querySelectorAll("iframe")].map(seen)) + "FOUND";
  document.body.append(found);
}}, 1000));
</script>"""


@pytest.fixture
def report(tmp_path):
    canvas = Canvas()
    canvas.subplots().plot([0, 1])
    for suffix in ("png", "svg"):
        canvas.savefig(tmp_path / f"line.{suffix}")
    x = np.linspace(-1, 1, 21)
    field = 0.1 + x[:, None] ** 2 + x**2
    sections = [
        Section("Pictures", [Figure(tmp_path / f"line.{suffix}", "a line") for suffix in ("png", "svg")]),
        Section("Relief", [Relief((x, x), {"none": field, "strong": field / 2 + 0.3}, "a bowl", "Turn it.")]),
        Section("Wide", [Table([f"column {i}" for i in range(20)], [[i / 7 for i in range(20)]]), Code("word " * 60)]),
        Section("Long words", ["unbreakable" * 30]),
    ]
    return write_html(tmp_path / "report.html", "A report", sections)


def browse(path, *arguments):
    flags = [*FLAGS.split(), f"--user-data-dir={path.parent / 'profile'}"]
    flags += ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []  # root has no sandbox
    command = [BROWSER, *flags, *arguments, path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert not re.findall(r".*CONSOLE.*", done.stderr)
    return done.stdout


def test_a_report_is_well_on_a_phone_and_on_a_desk(report, tmp_path):
    page = html.escape(report.read_text(encoding="utf-8"))
    (tmp_path / "probe.html").write_text(PROBE.format(page=page), encoding="utf-8")
    dom = browse(tmp_path / "probe.html", "--dump-dom", "--window-size=1800,1000")
    for seen in json.loads(html.unescape(dom.split("FOUND")[-2])):
        assert seen["overflow"] <= 0
        assert len(seen["pictures"]) == 2
        assert all(seen["pictures"])
        assert seen["inked"] > 0.1
        assert seen["words"] == ["none: loss from 0.1 to 2.1", "strong: loss from 0.35 to 1.35"]
        assert seen["slid"]
        assert seen["turned"]


def test_a_report_prints(report, tmp_path):
    browse(report, f"--print-to-pdf={tmp_path / 'report.pdf'}")
    pdf = (tmp_path / "report.pdf").read_bytes()
    assert pdf.startswith(b"%PDF")
    assert len(pdf) > 10_000


AXE = importlib.util.find_spec("axe_core_python")
CHECK = """<script>{axe}</script><script>
window.addEventListener("load", () => axe.run({{ resultTypes: ["violations"] }}).then((found) => {{
  const told = document.createElement("pre");
  told.textContent = "FOUND" + JSON.stringify(found.violations.map((one) => [one.id, one.nodes[0].html])) + "FOUND";
  document.body.append(told);
}}));</script></body>"""


def violations(path, width):
    """What axe-core finds: contrast, words for pictures, landmarks, regions that keys do not reach, roles."""
    script = (Path(AXE.submodule_search_locations[0]) / "axe.min.js").read_text(encoding="utf-8")
    checked = path.with_name("checked.html")
    check = CHECK.format(axe=script.replace("</script", "<\\/script"))
    checked.write_text(path.read_text(encoding="utf-8").replace("</body>", check), encoding="utf-8")
    dom = browse(checked, "--dump-dom", f"--window-size={width},1600")
    return json.loads(html.unescape(dom.split("FOUND")[-2]))


@pytest.mark.skipif(AXE is None, reason="needs axe-core-python")
@pytest.mark.parametrize(
    "width", [1400, 500]
)  # narrower windows Chromium does not make; frames of 360 are looked at above
def test_a_report_is_there_for_those_who_do_not_see_it_or_have_no_mouse(report, width):
    assert violations(report, width) == []


@pytest.mark.skipif(AXE is None, reason="needs axe-core-python")
def test_the_check_sees_what_is_wrong(tmp_path):
    page = tmp_path / "bad.html"
    page.write_text('<!DOCTYPE html><html><body><img src="data:,"><p style="color:#eee">pale</p></body></html>')
    found = {name for name, _ in violations(page, 1400)}
    assert {"image-alt", "color-contrast", "html-has-lang"} <= found


def test_tables_are_cards_on_a_phone_and_tables_on_a_desk(tmp_path):
    rows = [["none", 0.953, Measured(0.29, 0.01), Measured(0.2901, 0.0004)]] * 3
    table = Table(["noise", "accuracy", "loss of the network", "loss of its equation"], rows)
    path = write_html(tmp_path / "report.html", "T", [Section("S", [table])])
    look = """<!DOCTYPE html><meta charset="utf-8"><link rel="icon" href="data:,">
    <iframe srcdoc="{page}" width="390" height="800"></iframe>
    <iframe srcdoc="{page}" width="1400" height="800"></iframe>
    <script>window.addEventListener("load", () => setTimeout(() => {{
      const told = document.createElement("pre");
      told.textContent = "FOUND" + JSON.stringify([...document.querySelectorAll("iframe")].map((frame) => {{
        const box = frame.contentDocument.querySelector(".scroll"), row = box.querySelector("tbody tr");
        return [getComputedStyle(row).display, box.scrollWidth - box.clientWidth];
      }})) + "FOUND";
      document.body.append(told);
    }}, 500));</script>"""
    page = html.escape(path.read_text(encoding="utf-8"))
    (tmp_path / "look.html").write_text(look.format(page=page), encoding="utf-8")
    dom = browse(tmp_path / "look.html", "--dump-dom", "--window-size=1900,1000")
    assert json.loads(html.unescape(dom.split("FOUND")[-2])) == [["block", 0], ["table-row", 0]]
