"""Documentation: every block of Python in the pages runs, every public name has an example, files agree.

The blocks of a page run one after the other in one name space. A block that cannot run here is marked in the page, on
the line before it, with the reason: ``<!-- not run: needs your model -->``.
"""

import ast
import importlib
import inspect
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
        for line, code in blocks(PAGES[name]):
            exec(compile("\n" * line + code, str(PAGES[name]), "exec"), names)


def test_the_reader_of_pages_sees_blocks_and_markers(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("a\n\n```python\nx = 1\n```\n\n<!-- not run: a reason -->\n```python\ny\n```\n\n```text\nz\n```\n")
    assert blocks(page) == [(3, "x = 1\n")]
    assert len(PAGES) >= 10


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
