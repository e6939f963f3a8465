"""Documentation: every block of Python in the pages runs, every public name has an example, files agree.

The blocks of a page run one after the other in one name space. A block that cannot run here is marked in the page, on
the line before it, with the reason: ``<!-- not run: needs your model -->``. A block of text under the line
``<!-- output, to 1 % -->`` is what the block of Python before it prints: words as they are, numbers to that accuracy,
what stands behind ± to a factor of three.
"""

import ast
import contextlib
import importlib
import inspect
import io
import math
import re
import warnings
from pathlib import Path

import pytest
import torch

import kolmo
from kolmo.bridge.variables import VARIABLES
from kolmo.problem.faces import WORDS
from kolmo.schemes.base import SCHEMES
from kolmo.steppers.base import STEPPERS

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"(?P<marker><!-- not run: [^>]+ -->\n)?^```python\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(page: Path) -> list[tuple[int, str]]:
    """Line number and code of every block that is to run."""
    text = page.read_text(encoding="utf-8")
    return [
        (text.count("\n", 0, found.start("code")), found["code"])
        for found in BLOCK.finditer(text)
        if found["marker"] is None
    ]


OUTPUT = re.compile(
    r"^```python\n(?P<code>.*?)^```\n\n<!-- output, to (?P<percent>[\d.]+) % -->\n```text\n(?P<text>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)
NUMBER = re.compile(r"(?P<error>± )?(?P<number>[-+]?\d+\.?\d*(?:e[-+]?\d+)?)(?![\w.])")


def outputs(page: Path) -> dict[int, tuple[float, str]]:
    """For the line of a block whose output stands in the page: its accuracy, and the text."""
    text = page.read_text(encoding="utf-8")
    return {
        text.count("\n", 0, text.rfind("```python\n", 0, found.start("percent")) + 1) + 1: (
            float(found["percent"]) / 100,
            found["text"],
        )
        for found in OUTPUT.finditer(text)
    }


def differences(told: str, printed: str, rtol: float) -> list[str]:
    """What a page tells otherwise than what was printed."""
    words = [" ".join(NUMBER.sub(" # ", text).split()) for text in (told, printed)]
    if words[0] != words[1]:
        return words
    found = []
    for a, b in zip(NUMBER.finditer(told), NUMBER.finditer(printed), strict=True):
        x, y = float(a["number"]), float(b["number"])
        last = 10.0 ** -len(a["number"].partition("e")[0].partition(".")[2]) if "e" not in a["number"] else 0.0
        near = abs(x - y) <= 1.01 * last + rtol * abs(y)
        if not near and not (a["error"] and min(x, y) > 0 and abs(math.log(x / y)) <= math.log(3.0)):
            found.append(f"{a[0]} is {b[0]}")
    return found


PAGES = {page.stem: page for page in sorted([ROOT / "README.md", *ROOT.glob("docs/*.md")]) if blocks(page)}


@pytest.fixture
def _as_before(monkeypatch, tmp_path):
    """What a page registers or sets is gone afterwards; files that it writes go to a folder of its own."""
    for registry in (SCHEMES, STEPPERS):
        monkeypatch.setattr(registry, "_known", dict(registry._known))
    tables = [(table, dict(table)) for table in (VARIABLES, WORDS)]
    monkeypatch.chdir(tmp_path)
    dtype, state = torch.get_default_dtype(), torch.get_rng_state()
    yield
    for table, before in tables:
        table.clear()
        table.update(before)
    torch.set_default_dtype(dtype)
    torch.set_rng_state(state)


@pytest.mark.usefixtures("_as_before")
@pytest.mark.parametrize("name", PAGES)
def test_the_examples_of_a_page_run(name):
    names: dict[str, object] = {"__name__": name}
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        told = outputs(PAGES[name])
        for line, code in blocks(PAGES[name]):
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compile("\n" * line + code, str(PAGES[name]), "exec"), names)
            if line in told:
                rtol, text = told[line]
                assert not differences(text, printed.getvalue(), rtol), f"line {line}:\n{printed.getvalue()}"


CELL = re.compile(r"^```\{code-cell\} python\n(?::[^\n]*\n)*(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE)
NOTEBOOKS = {page.stem: page for page in sorted(ROOT.glob("docs/notebooks/*.md"))}


@pytest.mark.usefixtures("_as_before")
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_cells_of_a_notebook_run_and_its_exercise_has_an_answer(name):
    import matplotlib.pyplot as plt

    text = NOTEBOOKS[name].read_text(encoding="utf-8")
    assert re.search(r"^## Exercise$.*^:tags: \[hide-cell\]$", text, re.DOTALL | re.MULTILINE)
    names: dict[str, object] = {"__name__": name}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for found in CELL.finditer(text):
            with contextlib.redirect_stdout(io.StringIO()):
                exec(compile(found["code"], str(NOTEBOOKS[name]), "exec"), names)
    assert plt.get_fignums()
    plt.close("all")


def test_the_reader_of_pages_sees_blocks_and_markers(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("a\n\n```python\nx = 1\n```\n\n<!-- not run: a reason -->\n```python\ny\n```\n\n```text\nz\n```\n")
    assert blocks(page) == [(3, "x = 1\n")]
    assert len(PAGES) >= 10


def test_outputs_in_pages_are_compared(tmp_path):
    page = tmp_path / "page.md"
    body = "```python\nprint(1)\n```\n\n<!-- output, to 1 % -->\n```text\nu = 1.00 ± 3e-04\n```\n"
    page.write_text(f"a\n\n```python\nx = 1\n```\n\n{body}")
    assert outputs(page) == {7: (0.01, "u = 1.00 ± 3e-04\n")}
    assert [line for line, _ in blocks(page)] == [3, 7]
    for printed, same in (
        ("u = 1.015 ± 2e-04\n", True),
        ("u = 1.04 ± 3e-04\n", False),
        ("u = 1.00 ± 3e-05\n", False),
        ("v = 1.00 ± 3e-04\n", False),
    ):
        assert (differences("u = 1.00 ± 3e-04\n", printed, 0.01) == []) == same


def test_the_first_screen_shows_what_its_blocks_print():
    assert len(outputs(ROOT / "README.md")) == 4


PUBLIC = [
    (room, name)
    for room in ("kolmo", "kolmo.control", "kolmo.likelihood", "kolmo.bridge", "kolmo.landscape")
    for name in importlib.import_module(room).__all__
]


@pytest.mark.parametrize(("room", "name"), PUBLIC)
def test_every_public_name_has_an_example(room, name):
    found = getattr(importlib.import_module(room), name)
    if inspect.ismodule(found):
        assert found.__doc__
        return
    doc = inspect.getdoc(found) or ""
    assert re.search(r"^Examples\n-{8}\n(.*\n)*?\s*>>> ", doc, re.MULTILINE), f"{room}.{name} has no example"


def test_the_citation_is_that_of_this_version():
    for page in ("CITATION.cff", "docs/cite.md"):
        assert kolmo.__version__ in (ROOT / page).read_text(encoding="utf-8")


def test_every_page_is_in_the_contents():
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^(\w+)$", index, re.MULTILINE))
    assert {page.stem for page in ROOT.glob("docs/*.md")} - {"index"} <= listed
    assert all(f"notebooks/{name}" in index for name in NOTEBOOKS)


POLICY = {name.rsplit(".", 1)[-1]: name for name in ("kolmo.problem.reach", "kolmo.problem.instants")} | {
    path.stem: f"kolmo.refine.{path.stem}"
    for path in (ROOT / "kolmo" / "refine").glob("*.py")
    if path.stem not in ("__init__", "residual", "smooth", "stored")
}


def constants(module):
    """Numbers, tuples and tables of numbers that a module sets; what only keeps from dividing by zero is left out."""
    tree = ast.parse(inspect.getsource(module))
    targets = [target for node in tree.body if isinstance(node, ast.Assign) for target in node.targets]
    names = [name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]
    found = {name: getattr(module, name) for name in names if name.isupper() and name != "TINY"}
    return {name: value for name, value in found.items() if isinstance(value, int | float | tuple | dict)}


@pytest.mark.parametrize("name", POLICY)
def test_the_page_on_the_policy_has_the_constants_of_the_code(name):
    page = (ROOT / "docs" / "adaptive.md").read_text(encoding="utf-8")
    rows = re.findall(rf"^\| `{name}\.([A-Z_]+)` \| `([^`]+)` \|", page, re.MULTILINE)
    told = {constant: ast.literal_eval(value) for constant, value in rows}
    assert len(told) == len(rows)
    assert told == constants(importlib.import_module(POLICY[name]))
