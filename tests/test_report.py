"""Reports: self-contained, well-formed, escaped, with words for every picture."""

import html.parser
import json
import math
import re

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kolmo.errors import InputError, KolmoError
from kolmo.report import Code, Figure, Measured, Relief, Section, Table, agrees, compared, held, write_html

VOID = {"meta", "link", "img", "input", "wbr"}


class Reader(html.parser.HTMLParser):
    """Collect tags and text; fail on a tag that is closed out of order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text = [], [], ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture
def figure(tmp_path):
    from matplotlib.figure import Figure as Canvas

    paths = []
    for suffix in ("png", "svg"):
        canvas = Canvas()
        canvas.subplots().plot([0, 1])
        paths.append(tmp_path / f"line.{suffix}")
        canvas.savefig(paths[-1])
    return paths


def test_one_file_with_everything_in_it(tmp_path, figure):
    blocks = ["Text.", Figure(figure[0], "a <line>"), Figure(figure[1], 'a "curve"', "A caption."), Code("make demo")]
    path = write_html(tmp_path / "report.html", "Title", [Section("Part", blocks)])
    page = Reader(path.read_text(encoding="utf-8"))
    assert [image["alt"] for image in page.all("img")] == ["a <line>", 'a "curve"']
    resources = [attributes[key] for _, attributes in page.tags for key in ("src", "href") if key in attributes]
    assert all(resource.startswith("data:") for resource in resources)
    assert not page.all("script")
    assert "url(" not in path.read_text(encoding="utf-8")


@example("<b>bold &amp; brash</b>")
@given(st.text(st.characters(exclude_categories=["Cs", "Cc"])))
def test_any_text_is_shown_as_it_is(tmp_path_factory, text):
    folder = tmp_path_factory.mktemp("report")
    sections = [Section(text, [text, Table([text], [[text]], text), Code(text)])]
    page = Reader(write_html(folder / "report.html", text, sections).read_text(encoding="utf-8"))
    assert page.text.replace("`", "").count(text.replace("`", "")) >= 7 or not text.strip("`")


X, Y = np.linspace(-1, 1, 5), np.linspace(0, 2, 4)
BOWL = X[:, None] ** 2 + Y


def data_of(path):
    text = path.read_text(encoding="utf-8")
    return json.loads(text.partition('<script type="application/json">')[2].partition("</script>")[0])


def test_bytes_that_are_no_text_are_shown_as_a_question_mark(tmp_path):
    page = write_html(tmp_path / "r.html", "folder \udcff", []).read_text(encoding="utf-8")
    assert "folder ?" in page


def test_a_relief_carries_its_numbers_and_its_script(tmp_path):
    hole = np.where(BOWL > 2.5, np.nan, BOWL)
    block = Relief((X, Y), {"none": BOWL, "</script><b>": hole}, 'a "bowl"', "Turn it.")
    path = write_html(tmp_path / "report.html", "T", [Section("S", [block])])
    page, data = Reader(path.read_text(encoding="utf-8")), data_of(path)
    assert [script.get("type") for script in page.all("script")] == ["application/json", None]
    assert not page.all("b")
    assert data["levels"] == ["none", "</script><b>"]
    assert np.allclose(data["heights"][0], BOWL, rtol=1e-4)  # five digits are written
    assert data["heights"][1][0][3] is None
    assert not data["log"]  # the smallest value is 0
    assert page.all("canvas")[0]["aria-label"] == 'a "bowl"'
    assert page.all("input")[0]["max"] == "1"


def test_a_relief_with_one_level_has_no_slider_and_a_wide_one_is_logarithmic_and_thinned(tmp_path):
    axis = np.linspace(-1, 1, 301)
    field = np.exp(3 * axis[:, None] + 0 * Y)
    path = write_html(tmp_path / "report.html", "T", [Section("S", [Relief((axis, Y), {"": field}, "x")])])
    data = data_of(path)
    assert data["log"]
    assert len(data["axes"][0]) <= 61
    assert np.allclose(data["heights"][0], np.log10(field)[:: math.ceil(301 / 61)], rtol=1e-4, atol=1e-5)
    assert "<label hidden>" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("fields", "message"),
    [({}, "none"), ({"a": BOWL.T}, "a field over a plane"), ({"a": np.full((5, 4), np.nan)}, "finite")],
)
def test_reliefs_that_cannot_be_drawn_are_refused(tmp_path, fields, message):
    with pytest.raises(InputError, match=message):
        write_html(tmp_path / "r.html", "T", [Section("S", [Relief((X, Y), fields, "x")])])


def test_numbers_stand_at_the_right_and_words_at_the_left(tmp_path):
    table = Table(["name", "value"], [["a", 0.123456], ["b", Measured(1.0, 0.02)], ["c", None], ["d", 7]])
    text = write_html(tmp_path / "report.html", "T", [Section("S", [table])]).read_text(encoding="utf-8")
    for cell in (">a</td>", ">0.1235</td>", ">1.000 ± 0.020</td>", ">–</td>", ">7</td>"):
        assert cell in text
    assert len(re.findall(r'<td [^>]*class="number">', text)) == 4


def test_a_table_is_one_for_those_who_hear_it_and_cards_on_a_phone(tmp_path):
    wide, narrow = Table(["a", "b <i>", "c"], [[1, 2, 3]]), Table(["a", "b"], [[1, 2]])
    page = Reader(write_html(tmp_path / "r.html", "T", [Section("S", [wide, narrow])]).read_text(encoding="utf-8"))
    assert [table.get("class") for table in page.all("table")] == ["cards", None]
    assert all(table["role"] == "table" for table in page.all("table"))
    assert [cell["data-title"] for cell in page.all("td")][:3] == ["a", "b <i>", "c"]
    assert {cell["role"] for cell in page.all("th")} == {"columnheader"}


def test_a_report_ends_in_its_conclusions(tmp_path):
    from kolmo.report import write_report
    from kolmo.runs import Run

    run = Run.create("toy", {"n": 1}, out=tmp_path / "run")
    page = write_report(run, [Section("First", ["text"])], title="T", command="c", conclusions=["It falls by 2 ± 1."])
    titles = re.findall(r"<h2>([^<]+)</h2>", page.read_text(encoding="utf-8"))
    assert titles == ["First", "Conclusions", "How to reproduce"]
    assert "It falls by 2 ± 1." in page.read_text(encoding="utf-8")


def test_sentences_claim_no_more_than_the_numbers():
    names = "without", "with"
    assert "falls by 0.049 ± 0.011" in compared("Accuracy", 0.969, 0.920, 0.011, names)
    assert "rises" in compared("Loss", 0.1, 0.2, 0.01, names)
    for error in (0.025, math.nan):  # within two standard errors, and where nothing is known of them
        assert "no difference is seen" in compared("Accuracy", 0.969, 0.920, error, names)
    assert "knows no error" in compared("Accuracy", 0.969, 0.920, None, names)
    assert "agree:" in agrees("Two ways", 0.01, 0.01)
    assert "more than the uncertainty" in agrees("Two ways", 0.0101, 0.01)
    assert "not known" in agrees("Two ways", 0.01, math.inf)
    assert "in 1 of 2 cases; at worst it was off by 2 times" in held("It", [2.0, 0.5], [1.0, 1.0], "the bound")


def test_names_in_a_table_break_where_they_are_joined_and_numbers_do_not(tmp_path):
    table = Table(["quantity", "value"], [["by_tolerance.0.01.standard_error", 0.125]])
    text = write_html(tmp_path / "r.html", "R", [Section("S", [table])]).read_text()
    assert "by_<wbr>tolerance.<wbr>0.01.standard_<wbr>error" in text
    assert "0.125</td>" in text


def test_mistakes_are_named(tmp_path):
    with pytest.raises(InputError, match="a row of 1 cells"):
        write_html(tmp_path / "r.html", "T", [Section("S", [Table(["a", "b"], [[1]])])])
    with pytest.raises(InputError, match="a dict"):
        write_html(tmp_path / "r.html", "T", [Section("S", [{}])])
    with pytest.raises(KolmoError, match=r"missing\.png"):
        write_html(tmp_path / "r.html", "T", [Section("S", [Figure(tmp_path / "missing.png", "x")])])
    with pytest.raises(InputError, match=r"\.png or \.svg"):
        write_html(tmp_path / "r.html", "T", [Section("S", [Figure(tmp_path / "figure.pdf", "x")])])
    assert not (tmp_path / "r.html").exists()


@given(st.floats(-1e8, 1e8), st.floats(1e-9, 1e6))
def test_a_measured_number_keeps_two_digits_of_its_uncertainty(value, error):
    shown_value, shown_error = map(float, str(Measured(value, error)).split(" ± "))
    assert math.isclose(shown_error, error, rel_tol=0.051)
    assert abs(shown_value - value) <= max(0.051 * error, 1e-15 * abs(value))


@pytest.mark.parametrize(("value", "error"), [(1.0, 0.0), (math.nan, 0.1), (1.0, math.inf), (0.0, 1.0), (0.0, 4.3e-17)])
def test_degenerate_uncertainties_are_shown_too(value, error):
    assert "±" in str(Measured(value, error))
    assert len(str(Measured(value, error))) < 20
