"""Rows of finished units: read back as done, apart for other settings, and refused where they are no rows."""

import importlib

import pytest

from kolmo.errors import InputError
from kolmo.files import FileError
from kolmo.runs import Run

rows = importlib.import_module("kolmo.experiments._rows")
OPTIONS = {"size": 500, "rates": (0.1, 0.3), "seeds": 2, "workers": 1}


def _run(folder):
    return Run.create("generalisation", {}, out=folder)


def test_units_are_taken_from_the_file_and_added_to_it(tmp_path):
    path, run = str(tmp_path / "rows.jsonl"), _run(tmp_path / "run")
    first = rows.Rows(path, OPTIONS, keep=lambda unit: {"loss": unit["loss"]})
    first.add("a", {"loss": 1 / 3, "weights": [1.0]})
    first.add("a", {"loss": 0.7})  # there already
    rows.Rows(path, OPTIONS | {"size": 100}).add("a", {"loss": 5.0})
    # Which units are asked for, and how, is no matter.
    again = rows.Rows(path, OPTIONS | {"seeds": 9, "workers": 4})
    again.fill(run, ["a", "b"])
    assert run.load_unit("a") == {"loss": 0.333333}
    assert not run.finished("b")
    assert again.lacking(["a", "b"]) == ["b"]
    assert sum(again.machines().values()) == 1


def test_no_file_keeps_nothing(tmp_path):
    none = rows.Rows(None, OPTIONS)
    none.add("a", {"loss": 1.0})
    assert none.lacking(["a"]) == []
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_row_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"unit": "a"}\n')
    with pytest.raises(InputError, match="line 1"):
        rows.Rows(str(path), OPTIONS)
    path.write_text('{"unit": "a"')
    with pytest.raises(FileError, match="damaged in line 1"):
        rows.Rows(str(path), OPTIONS)
