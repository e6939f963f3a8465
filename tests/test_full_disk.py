"""A disk that is full, a folder that may not be written: a clear error, and nothing half-written anywhere."""

import errno
import os

import numpy as np
import pytest
import torch

import kolmo
from kolmo import files, landscape
from kolmo.cli import main
from kolmo.errors import KolmoError
from kolmo.report import Section, write_html
from kolmo.runs import Run

EQUATION = """
equation = { drift = "-x[0]", diffusion = 0.5, terminal = "x[0]", horizon = 1.0 }
solve = { at = [1.0], rtol = 1e-2 }
"""


@pytest.fixture(params=[errno.ENOSPC, errno.EROFS, errno.EDQUOT], ids=["full", "read-only", "quota"])
def full(request, monkeypatch):
    """A function that fills the disk: what was written cannot be kept."""

    def refuse(_):
        raise OSError(request.param, os.strerror(request.param))

    def fill():
        monkeypatch.setattr(os, "fsync", refuse)
        return os.strerror(request.param)

    return fill


def solution():
    problem = kolmo.KolmogorovProblem(kolmo.SDE(0.0, 1.0, dim=1), lambda x: x[..., 0], 1.0, kolmo.Box([0], [1]))
    return kolmo.solve(problem, grid=9, steps=2)


def surface(path):
    model = torch.nn.Linear(2, 1)
    plane = landscape.random_plane(model)
    landscape.surface(lambda f: f.weight.square().sum(), model, plane, points=5, path=path)


WRITERS = {
    "json": lambda path: files.write_json(path, {"x": 1}),
    "arrays": lambda path: files.write_npz(path, {"x": np.arange(1000.0)}),
    "solution": lambda path: solution().save(path),
    "surface": surface,
    "report": lambda path: write_html(path, "T", [Section("S", ["text"])]),
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("there", [False, True], ids=["new", "replaced"])
def test_what_cannot_be_written_is_named_and_what_was_there_stays(tmp_path, full, name, there):
    path = tmp_path / "file"
    if there and name != "surface":  # a surface refuses a file of something else before it begins
        path.write_bytes(b"precious")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    reason = full()
    with pytest.raises(KolmoError, match=f"cannot write .*file.*: {reason}"):
        WRITERS[name](path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_run_that_cannot_begin_leaves_no_folder(tmp_path, full):
    reason = full()
    with pytest.raises(KolmoError, match=reason):
        Run.create("toy", {}, out=tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_a_run_whose_disk_fills_keeps_what_it_had_and_goes_on_later(tmp_path, full, monkeypatch):
    run = Run.create("toy", {}, out=tmp_path / "run")

    def work():
        with run:
            run.unit("first", lambda: 1)
            full()
            run.unit("second", lambda: 2)

    with pytest.raises(KolmoError, match="cannot write"):
        work()
    assert run.units == ["first"]
    assert not list(run.folder.rglob("*.tmp"))
    assert run.status == "interrupted"
    monkeypatch.undo()
    with Run.resume(run.folder) as again:
        assert again.unit("first", lambda: pytest.fail("done before")) == 1
        assert again.unit("second", lambda: 2) == 2
    assert again.status == "done"


@pytest.mark.parametrize("options", [["--out", "run"], ["--save", "u.npz"]])
def test_the_command_line_says_so_without_a_trace(tmp_path, full, monkeypatch, capsys, options):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "equation.toml").write_text(EQUATION)
    reason = full()
    assert main(["solve", "equation.toml", "--quiet", *options]) == 1
    err = capsys.readouterr().err
    assert f"cannot write {options[1]}" in err
    assert reason in err
    assert "Traceback" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["equation.toml"]


def test_a_log_that_cannot_be_written_ends_nothing(tmp_path, capsys, monkeypatch):
    if not os.path.exists("/dev/full"):  # noqa: PTH110
        pytest.skip("needs /dev/full")
    run = Run.create("toy", {}, out=tmp_path / "run")
    monkeypatch.setattr("kolmo.runs.log.appending", lambda _: os.open("/dev/full", os.O_WRONLY))
    with run:
        run.log("lost")
    assert run.status == "done"
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "equation.toml").write_text(EQUATION)
    with Run.create("toy", {}, out=tmp_path / "run") as run:
        run.save_results({"x": 1})
    for folder in (run.folder, tmp_path):
        folder.chmod(0o500)
    try:
        for arguments in (["--save", "u.npz"], ["--out", "new"], ["--out", "new/new"]):
            assert main(["solve", "equation.toml", "--quiet", *arguments]) == 1
            assert "Permission denied" in capsys.readouterr().err
        with pytest.raises(KolmoError, match=r"cannot write .*lock"):
            Run.resume(run.folder)
        with pytest.raises(KolmoError, match="cannot make a run folder"):
            Run.create("toy", {})
        assert run.results == {"x": 1}
    finally:
        for folder in (tmp_path, run.folder):
            folder.chmod(0o700)
