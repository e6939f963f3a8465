"""What links, pipes, kills, other processes, damaged files and odd functions must not be able to do."""

import ast
import contextlib
import errno
import json
import os
import pickle
import re
import signal
import stat
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import warnings
import zipfile
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest

import kolmo
from kolmo import files, memory, sweep
from kolmo.cli import main
from kolmo.errors import InputError, KolmoError, KolmoWarning, MissingExtraError, NotConvergedError, ToleranceWarning
from kolmo.files import FileError, claims, locks
from kolmo.report import Figure, Section, write_html
from kolmo.runs import Run, RunError

pytestmark = pytest.mark.skipif(os.name != "posix", reason="links, pipes and signals as on POSIX")


@contextlib.contextmanager
def within(seconds):
    """Fail where something waits, for a pipe or for ever."""

    def late(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def leftovers(folder):
    return [name for name in names(folder) if name.endswith(".tmp")]


def solution():
    problem = kolmo.KolmogorovProblem(kolmo.SDE(0.0, 1.0, dim=1), lambda x: x[..., 0], 1.0, kolmo.Box([0], [1]))
    return kolmo.solve(problem, grid=9, steps=2)


WRITERS = {
    "bytes": lambda path: files.write_bytes(path, b"new"),
    "json": lambda path: files.write_json(path, {"x": 1}),
    "tree": lambda path: files.write_tree(path, {"x": np.arange(9.0)}),
    "page": lambda path: write_html(path, "T", [Section("S", ["text"])]),
}


# --------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("name", WRITERS)
def test_planted_temporaries_are_neither_followed_nor_replaced(tmp_path, monkeypatch, name):
    victim, path = tmp_path / "victim", tmp_path / "file"
    victim.write_text("precious")
    guessed = iter(["0" * 16, "1" * 16, "2" * 16])
    monkeypatch.setattr("secrets.token_hex", lambda _=None: next(guessed))  # as if the names were known
    with claims.claimed_file(tmp_path, "file") as (_, made):
        planted = [tmp_path / made.name.replace("0" * 16, "1" * 16), tmp_path / f".file.{os.getpid()}.tmp"]
    for link in planted:
        link.symlink_to(victim)
    WRITERS[name](path)
    assert victim.read_text() == "precious"
    assert path.is_file()
    assert not path.is_symlink()


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o644, 0o444])
def test_rewriting_keeps_the_permissions(tmp_path, mode):
    path = tmp_path / "file"
    path.write_text("old")
    path.chmod(mode)
    files.write_bytes(path, b"new")
    assert stat.S_IMODE(path.stat().st_mode) == mode
    assert path.read_bytes() == b"new"


def test_a_link_that_the_user_made_stays_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "u.npz").symlink_to(tmp_path / "disk" / "u.npz")
    solution().save(tmp_path / "u.npz")
    assert (tmp_path / "u.npz").is_symlink()
    assert kolmo.load(tmp_path / "disk" / "u.npz").status == "fixed"


def test_the_longest_name_can_be_written(tmp_path):
    path = tmp_path / ("a" * 250 + ".json")
    files.write_json(path, 1)
    assert files.read_json(path) == 1


def test_many_threads_may_write_one_file(tmp_path):
    path, together = tmp_path / "file", threading.Barrier(6)

    def write(i):
        together.wait()
        for _ in range(15):
            files.write_bytes(path, bytes([65 + i]) * 1000)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(write, range(6)))
    assert len(set(path.read_bytes())) == 1
    assert names(tmp_path) == ["file"]


def test_what_a_killed_save_left_is_swept_by_the_next_and_what_is_in_use_is_not(tmp_path):
    path = tmp_path / "u.json"
    with claims.claimed_file(tmp_path, path.name) as (_, used):
        pid = os.fork()
        if pid == 0:
            claims._made_file(tmp_path, path.name, 0o600)
            os._exit(0)
        os.waitpid(pid, 0)
        assert len(leftovers(tmp_path)) == 2
        files.write_json(path, 1)
        assert leftovers(tmp_path) == [used.name]
    assert names(tmp_path) == ["u.json"]


CALLS = ("open", "write", "fsync", "replace", "mkdir", "rename", "unlink", "close", "ftruncate", "fchmod", "scandir")


def counted(monkeypatch, act):
    """Let a function act at every call of the system; it is told how many came before."""
    calls = iter(range(10**6))

    def watched(call):
        def run(*args, **named):
            act(next(calls))
            return call(*args, **named)

        return run

    for name in CALLS:
        monkeypatch.setattr(os, name, watched(getattr(os, name)))


def begin(folder):
    """A run that does everything once: made or resumed, a unit, a metric, results."""
    run = Run.resume(folder) if (folder / "config.json").exists() else Run.create("toy", {"n": 1}, out=folder)
    with run:

        def work():
            run.record(step=1)
            return {"x": np.arange(4.0)}

        run.unit("first", work)
        run.save_arrays("field", u=np.ones(3))
        run.save_results({"sum": 6.0})


ACTS = {**WRITERS, "run": begin}


@pytest.mark.parametrize("name", ACTS)
def test_a_kill_at_any_call_of_the_system_leaves_things_whole(tmp_path, monkeypatch, name):
    for last in range(10**6):
        path = tmp_path / str(last) / "thing"
        path.parent.mkdir()
        if name != "run":
            ACTS[name](path)
            old = path.read_bytes()
        pid = os.fork()
        if pid == 0:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                counted(monkeypatch, lambda n, last=last: os._exit(9) if n == last else None)
                ACTS[name](path)
                os._exit(0)
        ended = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert ended in (0, 9)
        if name == "run":
            assert not path.exists() or Run.open(path).status in ("interrupted", "done")
            begin(path)
            run = Run.open(path)
            assert (run.status, run.results, run.units) == ("done", {"sum": 6.0}, ["first"])
            assert [line["step"] for line in run.metrics] == [1]
        else:
            assert path.read_bytes() == old
            ACTS[name](path)
        assert not leftovers(path.parent)
        if ended == 0:
            break
    assert last > 5


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("name", ACTS)
def test_an_error_at_any_call_of_the_system_is_said_and_leaves_things_whole(tmp_path, monkeypatch, name, number):
    for last in range(10**6):
        path = tmp_path / str(last) / "thing"
        path.parent.mkdir()
        if name != "run":
            ACTS[name](path)
            old = path.read_bytes()

        def fail(n, last=last):
            if n == last:
                raise OSError(number, os.strerror(number))

        with monkeypatch.context() as patch:
            counted(patch, fail)
            try:
                ACTS[name](path)
                done = True
            except KolmoError as error:
                done, said = False, str(error)
                assert "cannot" in said
        if name == "run":
            assert not path.exists() or Run.open(path).status in ("interrupted", "done", "failed")
            begin(path)
            assert Run.open(path).results == {"sum": 6.0}
        else:
            assert path.read_bytes() == old
            ACTS[name](path)
        assert not leftovers(path.parent)
        if done and last > 60:
            break


TOY = '''
"""Draw a few numbers."""
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Config:
    seed: int = 0
    scale: float = 1.0


def run(config, run, progress):
    run.record(seed=config.seed)
    return {"sum": config.scale * float(np.random.default_rng(config.seed).normal())}
'''


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """An experiment of its own, and a place to work in."""
    from kolmo import experiments

    folder = tmp_path / "experiments"
    folder.mkdir()
    (folder / "toy_killed.py").write_text(TOY)
    monkeypatch.setattr(experiments, "folder", lambda: folder)
    monkeypatch.setattr(experiments, "__path__", [str(folder)])
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("kolmo.experiments.toy_killed", None)


def commanded(name):
    """Do it with the command line, or go on with it; the exit code."""
    if name == "report":
        return main(["report", "kept"])
    words = ["--vary", "scale=1", "--vary", "scale=2"] if name == "sweep" else ["--set", "scale=2"]
    going_on = ["--resume", "run"] if Path("run").exists() else [*words, "--out", "run"]
    return main([name, "toy_killed", *going_on, "--quiet", *(["--workers", "0"] if name == "sweep" else [])])


def held(name):
    """What there is in the end."""
    if name == "report":
        return Path("kept/report.html").read_bytes()
    run = Run.open("run")
    assert run.status == "done"
    assert Path("run/report.html").read_text().endswith("</html>\n")
    return run.results, run.units, [line.get("seed") for line in run.metrics]


@pytest.mark.parametrize("ending", ["kill", errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("name", ["sweep", "experiment", "report"])
def test_commands_that_end_at_some_call_of_the_system_are_gone_on_with(toy, monkeypatch, rng, capfd, name, ending):
    assert main(["experiment", "toy_killed", "--out", "kept", "--quiet"]) == 0

    def fresh():
        import shutil

        shutil.rmtree("run", ignore_errors=True)

    commanded(name)
    expected, count = held(name), []
    fresh()
    with monkeypatch.context() as patch:
        counted(patch, count.append)
        commanded(name)
    for last in sorted(rng.choice(len(count), 4 if name == "sweep" else 8, replace=False).tolist()):
        fresh()
        if ending == "kill":
            pid = os.fork()
            if pid == 0:
                counted(monkeypatch, lambda n, last=last: os._exit(9) if n == last else None)
                commanded(name)
                os._exit(0)
            os.waitpid(pid, 0)
        else:

            def fail(n, last=last):
                if n == last:
                    raise OSError(ending, os.strerror(ending))

            with monkeypatch.context() as patch:
                counted(patch, fail)
                assert commanded(name) in (0, 1)
            shown = capfd.readouterr().err
            assert "Traceback" not in shown
            assert "mistake in kolmo" not in shown
        if Path("run").exists():
            for key in Run.open("run").units:
                Run.open("run").load_unit(key)
        if name == "report" or not Path("run").exists() or Run.open("run").status != "done":
            assert commanded(name) == 0
        assert held(name) == expected
        assert not leftovers(toy)


# ------------------------------------------------------------------------------------------------------ hostile inputs


@pytest.fixture
def finished(tmp_path):
    with Run.create("toy", {"n": 1}, out=tmp_path / "run", seeds=[3]) as run:
        run.unit("only", lambda: {"x": np.arange(100.0)})
        run.save_results({"answer": 42})
        run.save_arrays("field", u=np.ones(3))
    return run.folder


INSIDE = ("config.json", "results.json", "environment.json", "status.json", "log.txt", "metrics.jsonl", "lock")
INSIDE += ("units/only.npz", "arrays/field.npz", "report.html", "figures/x.png")
KINDS = {
    "link out": lambda path, secret: path.symlink_to(secret),
    "link to nothing": lambda path, secret: path.symlink_to(secret.with_name("nothing")),
    "link to a device": lambda path, secret: path.symlink_to("/dev/zero"),
    "pipe": lambda path, secret: os.mkfifo(path),
    "folder linked": lambda path, secret: path.symlink_to(secret.parent),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", INSIDE)
def test_a_run_folder_holds_files_of_its_own_only(tmp_path, finished, name, kind, capsys):
    secret = tmp_path / "home" / "secret"
    secret.parent.mkdir()
    secret.write_text("precious")
    path = finished / name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    KINDS[kind](path, secret)
    with within(5):
        for use in (Run.open, Run.resume):
            with pytest.raises(KolmoError):
                use(finished)
        assert main(["report", str(finished)]) in (1, 2)
        assert main(["landscape", "--resume", str(finished)]) in (1, 2)
    shown = capsys.readouterr()
    assert "precious" not in shown.out + shown.err
    assert "mistake in kolmo" not in shown.err
    assert names(secret.parent) == ["secret"]
    assert secret.read_text() == "precious"


def test_a_link_planted_while_a_run_is_open_is_not_followed(tmp_path, finished):
    secret = tmp_path / "secret"
    secret.write_text("precious")
    run = Run.open(finished)
    for name in ("report.html", "metrics.jsonl", "results.json"):
        (finished / name).unlink(missing_ok=True)
        (finished / name).symlink_to(secret)
    with pytest.raises(FileError, match="link"):
        run.save_results({})
    with pytest.raises(FileError, match="metrics"):
        run.record(x=1)
    with pytest.raises(FileError, match="link"):
        _ = run.results
    with pytest.raises(FileError, match="link"):
        _ = run.metrics
    assert secret.read_text() == "precious"


def test_figures_from_outside_are_not_put_into_the_report_of_a_run(tmp_path, finished):
    from kolmo.report import write_report

    outside = tmp_path / "secret.png"
    outside.write_bytes(b"\x89PNG precious")
    run = Run.open(finished)
    for path in (outside, finished / ".." / "secret.png"):
        with pytest.raises(FileError, match="outside"):
            write_report(run, [Section("S", [Figure(path, "alt")])], title="T", command="c")
    write_html(tmp_path / "page.html", "T", [Section("S", [Figure(outside, "alt")])])  # of one's own: anything


READERS = {
    "solution": kolmo.load,
    "json": files.read_json,
    "tree": files.read_tree,
    "text": files.read_text,
    "equation": lambda path: __import__("kolmo.equations").equations.read(path),
}


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "missing", "null", "socketed"])
@pytest.mark.parametrize("name", READERS)
def test_only_ordinary_files_are_read(tmp_path, name, kind):
    path = tmp_path / "file"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "null":
        path = Path("a\0b")
    elif kind == "socketed":
        import socket

        socket.socket(socket.AF_UNIX).bind(str(path))
    elif kind == "device":
        path.symlink_to("/dev/zero")
    with within(3), pytest.raises(KolmoError):
        READERS[name](path)


def npz(path, members, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in members.items():
            file.writestr(name, content)


def npy(shape, dtype, data=b""):
    header = f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape!r}, }}".encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + data


TREE = npy((2,), "|u1", b"{}")
BOMBS = {
    "compressed": lambda path: npz(path, {"tree.npy": b"\0" * 10**8}, zipfile.ZIP_DEFLATED),
    "shape": lambda path: npz(path, {"tree.npy": TREE, "a.npy": npy((10**12,), "<f8")}),
    "shapes": lambda path: npz(path, {"tree.npy": TREE, "a.npy": npy((10**6, 10**6, 10**6), "<f8", b"12345678")}),
    "huge": lambda path: npz(path, {"tree.npy": TREE, "a.npy": npy((10**400,), "<f8")}),
    "negative": lambda path: npz(path, {"tree.npy": TREE, "a.npy": npy((-1,), "<f8", b"12345678")}),
    "nothing": lambda path: npz(path, {"tree.npy": TREE, "a.npy": npy((10**15,), "<U0")}),
    "objects": lambda path: npz(path, {"tree.npy": TREE, "a.npy": npy((1,), "|O", b"12345678")}),
    "records": lambda path: npz(path, {"tree.npy": TREE, "a.npy": npy((1,), [("a", "<f8")], b"12345678")}),
    "code": lambda path: npz(path, {"tree.npy": b"\x93NUMPY\x01\x00\x10\x00__import__('os')"}),
    "deep header": lambda path: npz(path, {"tree.npy": b"\x93NUMPY\x01\x00\x00\x20" + b"(" * 8192}),
    "no array": lambda path: npz(path, {"tree.npy": b"text"}),
    "no tree": lambda path: npz(path, {"a.npy": npy((1,), "<f8", b"12345678")}),
    "twice": lambda path: npz(path, {"tree.npy": TREE, "tree": TREE}),
    "array that is not there": lambda path: npz(path, {"tree.npy": npy((20,), "|u1", b'{"__array__":"arr9"}')}),
    "deep": lambda path: npz(path, {"tree.npy": npy((2 * 10**6,), "|u1", b"[" * 10**6 + b"]" * 10**6)}),
    "rather deep": lambda path: npz(path, {"tree.npy": npy((400,), "|u1", b"[" * 200 + b"]" * 200)}),
    "long number": lambda path: npz(path, {"tree.npy": npy((10**5,), "|u1", b"9" * 10**5)}),
    "remark": lambda path: path.write_bytes(b"PK\x05\x06" + b"\0" * 16 + b"\x05\0hello"),
    "contents": lambda path: path.write_bytes(
        b"\0" * 10**7 + b"PK\x05\x06" + b"\0" * 8 + (9 * 10**6).to_bytes(4, "little") + b"\0" * 6
    ),
    "hole": lambda path: os.truncate(path, 2**42) if path.write_bytes(b"PK") else None,
}


@pytest.mark.parametrize("name", BOMBS)
def test_files_that_would_fill_the_memory_are_refused_by_name(tmp_path, name):
    import tracemalloc

    path = tmp_path / "u.npz"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        BOMBS[name](path)
    tracemalloc.start()
    try:
        with within(10), pytest.raises(KolmoError, match=r"u\.npz"):
            kolmo.load(path)
        assert tracemalloc.get_traced_memory()[1] < 3 * 10**7
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("text", ["[" * 10**6, "[" * 150 + "]" * 150, "9" * 10**5, "NaN", "[Infinity]", "{'a': 1}"])
def test_json_that_is_deep_long_or_loose_is_damage(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(FileError, match=r"a\.json is damaged"):
        files.read_json(tmp_path / "a.json")


def test_what_cannot_be_read_back_is_not_written(tmp_path):
    deep = [1.0]
    for _ in range(200):
        deep = [deep]
    for write in (files.write_json, files.write_tree):
        with pytest.raises(InputError, match="nested"):
            write(tmp_path / "a", deep)
        with pytest.raises(InputError, match="NumPy arrays"):
            write(tmp_path / "a", ["x" * 40_000_000])
    assert not names(tmp_path)


def stored():
    """Things that are saved and loaded, with what is in their files."""
    import torch

    from kolmo import landscape
    from kolmo.discretization import Discretization

    model = torch.nn.Linear(2, 1)

    def loss(f):
        return f.weight.square().sum()

    plane = landscape.random_plane(model)
    smoothed = kolmo.KolmogorovProblem(kolmo.SDE(0.0, 1.0, dim=1), lambda x: np.abs(x[..., 0] - 0.1), 1.0)
    found = kolmo.solve(smoothed, at=[0.0], rtol=1e-2)
    return [
        (solution(), kolmo.load),
        (found, kolmo.load),
        (found.discretization, Discretization.load),
        (plane, landscape.Plane.load),
        (landscape.surface(loss, model, plane, points=5), landscape.Surface.load),
        (landscape.curvature(loss, model, top=1, probes=2), landscape.Curvature.load),
    ]


ODD = (None, True, -1, 0, 10**30, 0.5, float("nan"), float("inf"), -1e308, "", "x", [], {}, [[]], [1], {"a": 1})
ODD_ARRAYS = (np.zeros(0), np.zeros((2, 2, 2, 2)), np.array([1j]), np.array(["x"]), np.full(3, np.nan), np.array(10**6))


def places(tree, path=()):
    if isinstance(tree, dict | list):
        for key, item in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield (*path, key)
            yield from places(item, (*path, key))


def changed(tree, path, value):
    if not path:
        return value
    copy = dict(tree) if isinstance(tree, dict) else list(tree)
    copy[path[0]] = changed(copy[path[0]], path[1:], value)
    return copy


def test_a_stored_thing_with_anything_in_any_place_is_refused_or_works(tmp_path, rng):
    path, refused, taken, unnamed = tmp_path / "thing.npz", 0, 0, 0
    for thing, load in stored():
        thing.save(path)
        whole = files.read_tree(path)
        repr(load(path))
        places_in = list(places(whole))
        chosen = rng.permutation(len(places_in))[:20]
        for i in chosen:
            options = [*ODD, *ODD_ARRAYS]
            for k in rng.permutation(len(options))[:3]:
                files.write_tree(path, changed(whole, places_in[i], options[k]))
                with within(10):
                    try:
                        repr(load(path))
                        taken += 1
                    except KolmoError as error:
                        refused += 1
                        unnamed += "thing.npz" not in str(error)
    assert refused > 3 * taken
    assert not unnamed


@pytest.mark.parametrize("dtype", [int, bool, complex, "<U3"])
def test_values_of_a_solution_are_floating_numbers(tmp_path, dtype):
    path = tmp_path / "u.npz"
    solution().save(path)
    tree = files.read_tree(path)
    tree["solution"]["values"] = tree["solution"]["values"].astype(dtype)
    files.write_tree(path, tree)
    with pytest.raises(FileError, match=r"solution\.values: got an array of"):
        kolmo.load(path)


@pytest.mark.parametrize(
    "text",
    [
        "# x\n" * 7900,
        "[equation]\n" + "# x\n" * 7900,
        "a." * 16000 + "a = 1",
        "[" + "a." * 16000 + "a]",
        "a = " + "[" * 9000,
        "[equation]\n" + "".join(f"a{i} = 1\n" for i in range(3000)),
        "a = '''\n" + "x\n" * 15000 + "'''",
        "[parameters]\n" + "".join(f"a{i} = 1\n" for i in range(2500)) + "b = '1'\n[equation]\ndrift = 1",
    ],
)
def test_an_equation_file_of_any_kind_is_read_at_once(tmp_path, text):
    from kolmo.equations import read

    (tmp_path / "e.toml").write_text(text)
    with within(5), pytest.raises(InputError, match=r"e\.toml"):
        read(tmp_path / "e.toml")


# ----------------------------------------------------------------------------------------------------------- lifecycle


def test_an_empty_folder_can_be_used(tmp_path):
    (tmp_path / "run").mkdir()
    with Run.create("toy", {}, out=tmp_path / "run") as run:
        pass
    assert run.status == "done"


def test_of_many_that_want_one_folder_one_gets_it(tmp_path):
    together = threading.Barrier(8)

    def make(_):
        together.wait()
        with contextlib.suppress(InputError):
            return Run.create("toy", {}, out=tmp_path / "run")

    with ThreadPoolExecutor(8) as pool:
        assert sum(made is not None for made in list(pool.map(make, range(8)))) == 1
    assert names(tmp_path)[0] == "run"
    assert not leftovers(tmp_path)


@pytest.fixture(params=[errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF])
def no_locks(request, monkeypatch):
    def refuse(*_):
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(locks, "flock", refuse)


def test_a_file_system_without_locks_is_told_and_used(tmp_path, no_locks):
    with pytest.warns(KolmoWarning, match="no locks"):
        run = Run.create("toy", {}, out=tmp_path / "run")
    with run:
        assert run.status == Run.open(run.folder).status == "running"
        with pytest.raises(RunError, match=f"process {os.getpid()}"):
            Run.resume(run.folder)
    assert run.status == "done"
    with pytest.warns(KolmoWarning, match="no locks"):
        Run.resume(run.folder)


def status(folder, **changes):
    """Write the status of a folder as another process would have left it."""
    found = json.loads((folder / "status.json").read_text())
    owner = locks.Owner.here(folder.stat().st_ino, (folder / "lock").stat().st_ino).record() | changes
    (folder / "status.json").write_text(json.dumps(found | {"state": "running", "owner": owner}))


def test_without_locks_the_record_tells_held_from_stale_and_what_cannot_be_told_takes_a_word(tmp_path, no_locks):
    warnings.simplefilter("ignore")
    with Run.create("toy", {}, out=tmp_path / "run") as run:
        pass
    status(run.folder, pid=os.getppid(), started="")  # alive
    assert Run.open(run.folder).status == "running"
    with pytest.raises(RunError, match="is being written"):
        Run.resume(run.folder)
    with pytest.raises(RunError, match="is being written"):
        Run.resume(run.folder, take_over=True)
    status(run.folder, pid=os.getppid(), started="1")  # the number was used again
    assert Run.open(run.folder).status == "interrupted"
    Run.resume(run.folder)
    status(run.folder, place="another machine", host="mars")
    with pytest.raises(RunError, match=r"on mars.*cannot be told.*--take-over"):
        Run.resume(run.folder)
    Run.resume(run.folder, take_over=True)


def test_a_deleted_lock_admits_no_second_writer_and_a_copy_is_free(tmp_path):
    import shutil

    with Run.create("toy", {}, out=tmp_path / "run") as run:
        (run.folder / "lock").unlink()
        assert Run.open(run.folder).status == "running"
        with pytest.raises(RunError, match="is being written"):
            Run.resume(run.folder)
        code = "import sys; from kolmo.runs import Run; Run.resume(sys.argv[1])"
        done = subprocess.run([sys.executable, "-c", code, run.folder], capture_output=True, text=True, check=False)
        assert "is being written by another process, process" in done.stderr
        shutil.copytree(run.folder, tmp_path / "copy")
        assert Run.open(tmp_path / "copy").status == "interrupted"
        Run.resume(tmp_path / "copy")
    assert run.status == "done"
    Run.resume(run.folder)


def test_a_forked_process_neither_keeps_the_lock_nor_ends_the_run(tmp_path):
    program = textwrap.dedent("""
        import os, sys, time
        from kolmo.runs import Run
        with Run.create("toy", {}, out=sys.argv[1]) as run:
            if os.fork() == 0:
                run.__exit__(None, None, None)
                print("forked", run.status, flush=True)
                time.sleep(60)
                os._exit(0)
            time.sleep(60)
    """)
    command = [sys.executable, "-c", program, str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdout.readline() == "forked running\n"
        process.kill()
        process.wait()
        try:
            assert Run.open(tmp_path / "run").status == "interrupted"
            with Run.resume(tmp_path / "run") as run:  # the forked process lives
                pass
        finally:
            os.killpg(process.pid, signal.SIGKILL)
    assert run.status == "done"


def test_a_lock_that_a_process_of_a_dead_one_still_has_takes_a_word(tmp_path):
    with Run.create("toy", {}, out=tmp_path / "run") as run:
        pass
    status(run.folder, pid=os.getppid(), started="1")
    with (run.folder / "lock").open("rb") as kept:
        assert locks.lock(kept.fileno())
        assert Run.open(run.folder).status == "interrupted"
        with pytest.raises(RunError, match=r"which is gone.*--take-over"):
            Run.resume(run.folder)
        with Run.resume(run.folder, take_over=True) as again, pytest.raises(RunError, match="is being written"):
            Run.resume(run.folder, take_over=True)
        assert again.status == "done"


SLOW = """
equation = { drift = "-sin(x[0] * (1 + t))", diffusion = 0.02, terminal = "tanh(50*x[0])", horizon = 10.0 }
solve = { at = [0.1], rtol = 1e-9, atol = 1e-14 }
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_solve_that_is_ended_says_so_in_its_status(tmp_path, number):
    (tmp_path / "e.toml").write_text(SLOW)
    # Python starts with Ctrl-C ignored where a shell started it in the background
    program = (
        "import signal, sys, kolmo.solve; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "signal.signal(signal.SIGHUP, signal.SIG_DFL);"  # and under nohup with that ignored
        "search = kolmo.solve.search if hasattr(kolmo.solve, 'search') else None\n"
        "import kolmo.march as march; back = march.March.backward\n"
        "def told(*a, **k):\n    print('solving', flush=True); return back(*a, **k)\n"
        "march.March.backward = told\n"
        "from kolmo.cli import main; sys.exit(main())"
    )
    command = [sys.executable, "-c", program, "solve", "e.toml", "--out", "run", "--quiet"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=tmp_path, **pipes) as process:
        assert process.stdout.readline() == "solving\n"
        time.sleep(0.3)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 1, err
    assert "Traceback" not in err
    assert Run.open(tmp_path / "run").status == "interrupted"


def test_an_unfinished_solve_is_done_again_in_its_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = SLOW.replace("1e-9", "1e-2").replace("10.0", "0.1")
    (tmp_path / "e.toml").write_text(text)
    (tmp_path / "other.toml").write_text(text.replace("0.1]", "0.2]"))
    assert main(["solve", "e.toml", "--out", "run", "--quiet"]) == 0
    assert main(["solve", "e.toml", "--out", "run", "--quiet"]) == 2  # it is done
    (tmp_path / "run" / "status.json").unlink()
    (tmp_path / "run" / "results.json").unlink()
    assert main(["solve", "other.toml", "--out", "run", "--quiet"]) == 2  # another equation
    assert main(["report", "run"]) == 2
    assert "--out run" in capsys.readouterr().err
    assert main(["solve", "run/equation.toml", "--out", "run", "--quiet"]) == 0
    assert Run.open("run").status == "done"


def test_a_resume_under_other_versions_is_told_kept_and_shown(tmp_path, finished):
    from kolmo.report import write_report

    path = finished / "environment.json"
    made = json.loads(path.read_text())
    made["packages"] |= {"numpy": "1.0", "fipy": None}
    made["python"] = "3.0"
    path.write_text(json.dumps(made))
    with pytest.warns(KolmoWarning, match=r"python 3\.0 -> .*numpy 1\.0 -> .*results mix both"):
        run = Run.resume(finished)
    with run:
        assert "numpy 1.0 ->" in (finished / "log.txt").read_text()
    assert run.environment["packages"]["numpy"] == "1.0"
    assert run.environment["resumed"][0]["changes"]["numpy"][1] == np.__version__
    page = write_report(run, [], title="T", command="c").read_text()
    assert f"numpy {np.__version__} (before: 1.0)" in page
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Run.resume(finished)  # the same as last time is no news


def apart(act):
    """Do something in a process of its own; what it says."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        said = "nothing"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                said = str(act())
            except BaseException as error:
                said = f"{type(error).__name__}: {error}"
        os.write(writing, said.encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read().decode()
    os.waitpid(pid, 0)
    return said


NOBODY = 65534


def as_nobody(act):
    """Do something as a user who owns nothing; what it says."""

    def other():
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        return act()

    return apart(other)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can become somebody else")
def test_another_user_can_look_but_not_write_and_is_told(capfd):
    import shutil
    import tempfile

    root = Path(tempfile.mkdtemp())  # pytest's folders are closed to others
    root.chmod(0o755)
    try:
        with Run.create("toy", {"n": 1}, out=root / "run", seeds=[3]) as run:
            run.save_results({"answer": 42})
            running = as_nobody(lambda: Run.open(run.folder).status)
        assert running == "running"
        assert (
            as_nobody(lambda: (Run.open(run.folder).status, Run.open(run.folder).results)) == "('done', {'answer': 42})"
        )
        for act, told in (
            (lambda: Run.resume(run.folder), "FileError: cannot write .*lock: Permission denied"),
            (
                lambda: Run.create("toy", {}, out=root / "new"),
                "FileError: cannot make a run folder .*Permission denied",
            ),
            (lambda: files.write_json(run.folder / "results.json", {}), "FileError: cannot write .*Permission denied"),
            (lambda: solution().save(root / "u.npz"), "FileError: cannot write .*Permission denied"),
        ):
            assert re.search(told, as_nobody(act))
        (run.folder / "results.json").chmod(0o600)
        assert "FileError: cannot read" in as_nobody(lambda: Run.open(run.folder).results)
        run.folder.chmod(0o700)
        assert as_nobody(lambda: main(["report", str(run.folder)])) in ("1", "2")
        shown = capfd.readouterr().err
        assert "mistake in kolmo" not in shown
        assert "Traceback" not in shown
        run.folder.chmod(0o777)  # anybody may leave something there
        as_nobody(lambda: claims._made_file(run.folder, "results.json", 0o666) and os._exit(0))
        (left,) = leftovers(run.folder)
        with Run.resume(run.folder):  # what belongs to another is left to them
            assert leftovers(run.folder) == [left]
    finally:
        shutil.rmtree(root)


@pytest.mark.skipif(
    not sys.platform.startswith("linux") or not hasattr(os, "geteuid") or os.geteuid() != 0,
    reason="only root can mount",
)
def test_a_mount_that_is_read_only_is_told_and_read(tmp_path, finished):
    solution().save(tmp_path / "u.npz")
    program = textwrap.dedent(f"""
        import sys, warnings
        sys.path[:] = {sys.path!r}
        from pathlib import Path
        import kolmo
        from kolmo import files
        from kolmo.cli import main
        from kolmo.runs import Run
        def told(act):
            try:
                print(act())
            except kolmo.KolmoError as error:
                print(error)
        told(lambda: Run.open("run").results)
        told(lambda: kolmo.load("u.npz").status)
        told(lambda: Run.resume("run"))
        told(lambda: Run.create("toy", {{}}, out="new"))
        told(lambda: files.write_json(Path("run/results.json"), {{}}))
        told(lambda: main(["report", "run"]))
    """)
    mount = f"mount --bind '{tmp_path}' '{tmp_path}' && mount -o remount,bind,ro '{tmp_path}' && cd '{tmp_path}' && "
    command = ["unshare", "--mount", "sh", "-c", mount + 'exec "$0" -B -c "$1"', sys.executable, program]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "unshare" in done.stderr or "mount" in done.stderr:
        pytest.skip("mounts are not allowed here")
    lines = done.stdout.splitlines()
    assert lines[:2] == ["{'answer': 42}", "fixed"]
    for line, start in zip(lines[2:5], ("cannot write", "cannot make a run folder", "cannot write"), strict=True):
        assert line.startswith(start)
        assert line.endswith("Read-only file system.")
    assert lines[5] in ("1", "2")
    assert "mistake in kolmo" not in done.stderr
    assert "Traceback" not in done.stderr


def test_a_metric_that_does_not_fit_on_the_disk_leaves_no_half_line(tmp_path, monkeypatch):
    with Run.create("toy", {}, out=tmp_path / "run") as run:
        run.record(a=1)
        write = os.write
        monkeypatch.setattr(os, "write", lambda fd, content: write(fd, content[:9]))
        with pytest.raises(FileError, match="No space"):
            run.record(b=2)
        monkeypatch.undo()
        run.record(c=3)
        assert [line.get("a", line.get("c")) for line in run.metrics] == [1, 3]


# ----------------------------------------------------------------------------------------------------------- processes


class Odd:
    def __str__(self):
        return "an odd thing"

    def __reduce__(self):
        raise TypeError("not to be sent")


ERRORS = [
    InputError("x", 1.0, "two", "write 2"),
    InputError("x", Odd(), "an even thing"),
    InputError("x", np.ones(2), "a number"),
    MissingExtraError("gmsh", "gmsh"),
    *(
        kind("a message")
        for kind in (KolmoError, NotConvergedError, FileError, RunError, KolmoWarning, ToleranceWarning)
    ),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_errors_and_warnings_go_from_process_to_process(error):
    error.add_note("a note")
    back = pickle.loads(pickle.dumps(error))
    assert (type(back), str(back), back.__notes__) == (type(error), str(error), ["a note"])
    if isinstance(error, InputError):
        assert (back.argument, back.needed, back.fix) == (error.argument, error.needed, error.fix)


class TwoWordsError(Exception):
    def __init__(self, one, two):
        super().__init__(f"{one} {two}")


def raising(kind):
    if kind == "input":
        raise InputError("x", Odd(), "an even thing")
    if kind == "two words":
        raise TwoWordsError("not", "rebuilt")
    raise ZeroDivisionError("plain")


@pytest.mark.parametrize("kind", ["input", "two words", "plain"])
def test_what_a_task_raises_reads_the_same_here_and_from_a_pool(kind):
    said = []
    with ProcessPoolExecutor(1, get_context("fork")) as pool:
        for result in (pool.submit(sweep.steadily, raising, kind).result, lambda: sweep.steadily(raising, kind)):
            with pytest.raises(Exception) as caught:  # noqa: PT011 -- which one is compared
                result()
            said.append((type(caught.value), sweep.told(caught.value)))
    assert said[0] == said[1]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["input", "two words"])
def test_a_crew_of_processes_says_what_one_process_says(tmp_path, kind):
    from kolmo.experiments._crew import Crew

    said = []
    for workers in (1, 2):
        run = Run.create("toy", {}, out=tmp_path / str(workers))
        with pytest.raises(Exception) as caught, Crew(run, workers, units=1, progress=False) as crew:  # noqa: PT011
            crew.do({"one": (raising, (kind,))})
        said.append((type(caught.value), sweep.told(caught.value)))
    assert said[0] == said[1]


KERNEL = """
import numpy as np
from kolmo.kernels import chains, differences, splitting
kinds = [np.ones((8, 1)), np.ones((8, 1), np.float32)]
for field in kinds if {kind} else kinds[::-1]:
    out = np.zeros((2, 1), field.dtype)
    differences.ends(3.0 * field, out[0], out[1])
    assert (out == 3.0).all(), out
"""


def test_kernels_work_where_nothing_can_be_kept(tmp_path):
    program = (
        "import numba.core.caching as caching\n"
        "def refuse(self):\n    raise OSError(30, 'Read-only file system')\n"
        "caching._CacheLocator.ensure_cache_path = refuse\n" + KERNEL.format(kind=0)
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("broken", ["full", "damaged"])
def test_a_cache_that_cannot_be_written_or_read_does_not_matter(tmp_path, broken):
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    program = KERNEL.format(kind=0)
    if broken == "full":
        program = (
            "import numba.core.caching as c\ndef f(*_):\n    raise OSError(28, 'x')\nc.IndexDataCacheFile.save = f\n"
            + program
        )
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        for path in tmp_path.rglob("*.nb?"):
            path.write_bytes(b"damaged")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_waits_until_a_kernel_is_compiled(number):
    import numba
    from numba.core import compiler

    seen, whole = [], compiler.compile_extra

    def interrupted(*args, **named):
        signal.raise_signal(number)
        seen.append("held back")
        found = whole(*args, **named)
        seen.append("compiled")
        return found

    handlers = {n: signal.signal(n, signal.default_int_handler) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(compiler, "compile_extra", interrupted)
            twice = numba.njit(lambda x: 2.0 * x)
            with pytest.raises(KeyboardInterrupt):
                twice(1.5)
        assert seen == ["held back", "compiled"]
        assert all(signal.getsignal(n) is signal.default_int_handler for n in handlers)
        assert numba.njit(lambda x: 3.0 * x)(1.5) == 4.5
    finally:
        for n, handler in handlers.items():
            signal.signal(n, handler)


@pytest.mark.slow
def test_sixteen_processes_may_compile_at_once_for_the_first_time(tmp_path):
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    for _ in range(2):  # cold, then from what was kept
        commands = [[sys.executable, "-c", KERNEL.format(kind=i % 2)] for i in range(16)]
        running = [subprocess.Popen(c, env=environment, stderr=subprocess.PIPE, text=True) for c in commands]
        for process in running:
            _, err = process.communicate()
            assert process.returncode == 0, err


# Numba keeps the list of the variants, and then the code: here the other process does both in between, unless it is
# kept out; then this one waits in vain for a while.
BETWEEN = """
import time
from pathlib import Path
import numba.core.caching as caching
import numpy as np
from together import total  # some kernels are compiled and kept by this already
own, other = "{own}", "{other}"
def reached(what):
    Path(own + what).touch()
def wait(what, seconds=2.0):
    end = time.monotonic() + seconds
    while not Path(other + what).exists() and time.monotonic() < end:
        time.sleep(0.02)
def save_index(self, *args, save=caching.IndexDataCacheFile._save_index):
    reached("read")
    wait("read" if own == "a" else "listed")
    save(self, *args)
    reached("listed")
def save_data(self, *args, save=caching.IndexDataCacheFile._save_data):
    if own == "a":
        wait("kept")
    save(self, *args)
    reached("kept")
caching.IndexDataCacheFile._save_index, caching.IndexDataCacheFile._save_data = save_index, save_data
reached("here")
wait("here", 60.0)
assert total(np.ones(8, {dtype!r})) == 8.0
"""


def test_two_processes_that_keep_variants_of_a_kernel_at_once_keep_both(tmp_path):
    kernel = "@compiled()\ndef total(a):\n    s = 0.0\n    for v in a:\n        s += v\n    return s\n"
    (tmp_path / "together.py").write_text(f"from kolmo.kernels.cache import compiled\n\n\n{kernel}")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path / "kept"), "PYTHONPATH": path}

    def begun(program):
        command = [sys.executable, "-c", program]
        return subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)

    running = [
        begun(BETWEEN.format(own=own, other=other, dtype=dtype))
        for own, other, dtype in (("a", "b", "float64"), ("b", "a", "float32"))
    ]
    results = [(process.communicate()[1], process.returncode) for process in running]
    found = "[total(np.ones(8, k)) for k in ('float32', 'float64')]"
    after = begun(f"import numpy as np; from together import total; assert {found} == [8.0, 8.0], {found}")
    results.append((after.communicate()[1], after.returncode))
    assert [code for _, code in results] == [0, 0, 0], results


# ----------------------------------------------------------------------------------------------------------- callables


def reusing(kind):
    """A drift −x(1 + t) that hands out its own memory."""
    buffers = {}

    def drift(t, x):
        if kind == "tensor":
            import torch

            buffer = buffers.setdefault(x.shape, torch.empty(x.shape, dtype=torch.float64))
            buffer.copy_(-x * (1.0 + t))
            return buffer.detach()
        buffer = buffers.setdefault(x.shape, np.empty(x.shape))
        np.multiply(-x, 1.0 + t, out=buffer)
        return {"array": buffer, "view": buffer[...], "reshaped": buffer.reshape(x.shape), "list": list(buffer)}[kind]

    return drift


@pytest.mark.parametrize("kind", ["array", "view", "reshaped", "list", "tensor"])
def test_a_function_may_fill_the_same_array_again_and_again(kind):
    arrays = "torch" if kind == "tensor" else None

    def answer(drift):
        sde = kolmo.SDE(drift, 1.0, dim=1, arrays=arrays)
        return float(kolmo.solve(kolmo.KolmogorovProblem(sde, lambda x: x[..., 0] ** 2, 1.0), at=[0.5], rtol=1e-4)(0.5))

    assert answer(reusing(kind)) == answer(lambda t, x: -x * (1.0 + t))


def again_and_again(function):
    """The function, with results of one shape always in one array."""
    buffers = {}

    def filled(*arguments):
        value = np.asarray(function(*arguments), dtype=float)
        buffer = buffers.setdefault(value.shape, np.empty(value.shape))
        buffer[...] = value
        return buffer

    return filled


@pytest.mark.parametrize("stepper", ["radau5", "implicit-euler", "mcs3"])
@pytest.mark.parametrize("d", [1, 2])
def test_so_may_all_functions_of_a_problem(d, stepper):
    def answer(form):
        sde = kolmo.SDE(
            form(lambda t, x: -x * (1.0 + t)),
            covariance=form(lambda t, x: (0.5 + 0.3 * t) * np.eye(d) + 0.0 * x[..., None]),
            dim=d,
        )
        problem = kolmo.KolmogorovProblem(
            sde,
            form(lambda x: x[..., 0] ** 2),
            1.0,
            kolmo.Box([-2.0] * d, [2.0] * d),
            killing=form(lambda t, x: 0.2 * (1.0 + t) + 0.0 * x[..., 0]),
            source=form(lambda t, x: np.cos(t + x[..., 0])),
        )
        return kolmo.solve(problem, grid=15, steps=30, stepper=stepper).values

    np.testing.assert_array_equal(answer(again_and_again), answer(lambda function: function))


def test_a_function_that_changes_its_points_is_refused_by_name():
    def drift(t, x):
        x *= -1.0
        return x

    problem = kolmo.KolmogorovProblem(kolmo.SDE(drift, 1.0, dim=1), lambda x: x[..., 0], 1.0)
    with pytest.raises(InputError, match="drift: got a function that changes the points"):
        kolmo.solve(problem, at=[0.5])


VALUES = {
    "text": "one",
    "texts": np.array(["1.0"]),
    "complex": 1j,
    "complexes": np.ones(3) * (1 + 0j),
    "nothing": None,
    "table": {"a": 1},
    "objects": [1.0, None],
    "ragged": [[1.0], [1.0, 2.0]],
    "dates": np.datetime64("2020-01-01"),
    "masked": np.ma.masked_array([1.0, 2.0], [True, False]),
}


@pytest.mark.parametrize("argument", ["drift", "diffusion", "covariance", "terminal", "killing", "source"])
@pytest.mark.parametrize("name", VALUES)
def test_what_is_no_real_number_is_refused_by_name(name, argument):
    functions = {"drift": lambda t, x: -x, "terminal": lambda x: x[..., 0], "killing": None, "source": None}
    functions[argument] = (lambda x: VALUES[name]) if argument == "terminal" else (lambda t, x: VALUES[name])
    noise = (
        {"covariance": functions["covariance"]}
        if argument == "covariance"
        else {"diffusion": functions.get("diffusion", 1.0)}
    )
    sde = kolmo.SDE(functions["drift"], **noise, dim=1)
    problem = kolmo.KolmogorovProblem(
        sde, functions["terminal"], 1.0, killing=functions["killing"], source=functions["source"]
    )
    with pytest.raises(InputError) as caught:
        kolmo.solve(problem, at=[0.5])
    assert caught.value.argument == argument


@pytest.mark.parametrize("value", ["one", 1j, object()])
def test_constants_too(value):
    problem = kolmo.KolmogorovProblem(kolmo.SDE(0.0, 1.0, dim=1), lambda x: x[..., 0], 1.0, killing=value)
    with pytest.raises(InputError, match="killing: got"):
        kolmo.solve(problem, at=[0.5])


def uses_of_torch():
    """Everything that may meet tensors, by name: functions that give numbers."""
    import torch

    from kolmo import bridge, control

    rate = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    inside = kolmo.Box(-4.0, 4.0, "absorbing")

    def problem(arrays=None, box=None, rate=1.0):
        sde = kolmo.SDE(lambda t, x: -rate * x, 1.0, dim=1, arrays=arrays)
        return kolmo.KolmogorovProblem(sde, lambda x: x[..., 0] ** 2, 1.0, box)

    def gradient():
        value = control.value(problem(rate=rate), [0.5], rtol=1e-2).sum()
        return [value.detach(), torch.autograd.grad(value, rate)[0]]

    steered = control.ControlProblem(
        lambda t, x, a: a,
        covariance=1.0,
        controls=control.Interval(-1.0, 1.0),
        terminal=lambda x: x[..., 0] ** 2,
        horizon=0.2,
        box=kolmo.Box(-8.0, 8.0),
    )

    def bellman():
        found = control.solve_hjb(steered, at=[0.5], rtol=1e-1)
        followed = kolmo.monte_carlo(found.closed_loop(), [0.5], paths=64, steps=4, rng=0)
        return [found(0.5), found.policy(0.0, [0.5]), followed.mean]

    def forward(arrays, **options):
        found = kolmo.solve_forward(problem(arrays, inside), [0.1], rtol=1e-2, **options)
        return [found.value, found.exited("low")]

    branches = [bridge.MLPBranch.create(1, 4, rng=i) for i in range(2)]
    dropped, noisy = (bridge.NoisyResNet(branches, law) for law in (bridge.StochasticDepth(0.5), bridge.Additive(0.3)))

    x = torch.ones(2, 1)

    def expansion():
        found = bridge.regularisation(noisy, lambda x: x[..., 0] ** 2, x)
        return [found.flow.double(), found.predicted.double()]

    def law():
        found = control.law(problem("torch", inside), [0.1], rtol=1e-2)
        return [part.detach() for part in (found.mass(), found([0.1]), found.expectation(lambda x: x[..., 0]))]

    def loss(method, net=dropped, **options):
        def run():
            found = bridge.expected_loss(net, lambda x: x[..., 0] ** 2, x, method=method, rng=0, **options)
            return found.mean.double()

        return run

    return {
        "solve": lambda: kolmo.solve(problem(), at=[0.5], rtol=1e-2)(0.5),
        "solve torch": lambda: kolmo.solve(problem("torch"), at=[0.5], rtol=1e-2)(0.5),
        "plan": lambda: kolmo.plan(problem("torch"), at=[0.5], rtol=1e-2).grid.size,
        "gradient": gradient,
        "monte_carlo": lambda: kolmo.monte_carlo(problem(), [0.5], paths=64, steps=4, rng=0).mean,
        "monte_carlo torch": lambda: kolmo.monte_carlo(problem("torch"), [0.5], paths=64, steps=4, rng=0).mean,
        "solve_hjb": bellman,
        "solve_forward": lambda: forward(None),
        "solve_forward torch": lambda: forward("torch"),
        "stationary_density": lambda: (
            kolmo.stationary_density(problem("torch", kolmo.Box(-4.0, 4.0, "reflecting"))).mass
        ),
        "law": law,
        "loss sampled": loss("monte_carlo", paths=64),
        "loss sobol": loss("monte_carlo", paths=64, sampling="sobol"),
        "loss enumerated": loss("enumerate"),
        "loss recursion": loss("recursion", rtol=1e-2),
        "loss pde": loss("pde", noisy, rtol=1e-2),
        "loss controlled": loss("monte_carlo", noisy, paths=64, control_variate="pde"),
        "regularisation": expansion,
        **uses_of_control(problem),
        **uses_of_noise(),
        **uses_of_landscapes(noisy),
    }


def uses_of_control(problem):
    """What else there is in the rooms of control, densities and certificates."""
    import torch

    from kolmo import control

    inside = kolmo.Box(-4.0, 4.0)
    steered = control.ControlProblem(
        lambda t, x, a: a,
        1.0,
        controls=control.Unbounded(1),
        horizon=0.2,
        terminal=lambda x: x[..., 0] ** 2,
        running_cost=lambda t, x, a: 0.5 * a[..., 0] ** 2,
        box=kolmo.Box(-6.0, 6.0),
    )
    y = torch.tensor([0.1, 0.5, 0.2], dtype=torch.float64)

    def at(place):
        return lambda x: torch.exp(-2.0 * (x[..., 0] - place) ** 2)

    def fitted():
        rate = torch.tensor(0.5, dtype=torch.float64, device="cpu", requires_grad=True)

        def misfit():
            u = control.value(problem(box=inside, rate=rate), [0.5], rtol=1e-1)
            return 0.5 * (u - 0.3).square().sum() + 0.1 * rate**2

        found = control.minimize(misfit, [rate])
        along = control.hessian_product(misfit, rate, [rate.detach()])[0]
        return [rate.detach(), found.fun, along, control.uncertainty(found).standard_errors]

    def certified():
        of = problem("torch", inside)
        return kolmo.certify(of, kolmo.solve(of, grid=41, steps=8), [0.5], paths=64, steps=8, rng=0).error

    def bridged():
        sde = kolmo.SDE(0.0, 1.0, dim=1)
        return control.schroedinger_bridge(sde, at(-0.5), at(0.5), 0.2, inside, rtol=1e-1).masses[-1]

    return {
        "hopf_cole": lambda: control.hopf_cole(steered, at=[0.5], rtol=1e-2).policy(0.0, [0.5]),
        "schroedinger_bridge": bridged,
        "transition_density": lambda: control.transition_density(
            problem("torch", inside), y[:2], y[1:], grid=41, steps=4
        ),
        "minimize": fitted,
        "certify": certified,
        "spectrum": lambda: (
            kolmo.spectrum(problem("torch", kolmo.Box(-4.0, 4.0, "reflecting")), 2, grid=41).eigenvalues
        ),
        "expected_value": lambda: control.expected_value(problem("torch", inside), y[:, None], rtol=1e-1).detach(),
    }


def residual(width=3, depth=2):
    """A network of somebody else's, and states for it."""
    import torch
    from torch import nn

    class Block(nn.Module):
        def __init__(self, k):
            super().__init__()
            self.fc = nn.Linear(width, width)
            with torch.no_grad():
                for p in self.parameters():
                    p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(k)))

        def forward(self, x):
            return x + 0.3 * torch.tanh(self.fc(x))

    model = nn.Sequential(*(Block(k) for k in range(depth)))
    return model, torch.randn(12, width, generator=torch.Generator().manual_seed(9))


def uses_of_noise():
    """What reads noise in the network of somebody else."""
    import copy

    import torch

    from kolmo import bridge

    model, x = residual()

    def laws():
        return [bridge.Additive(0.3), bridge.Multiplicative(0.2, per="coordinate"), bridge.StochasticDepth(0.8)]

    def loss(f):
        return f(x).square().sum(-1).mean()

    def pairs(estimates):
        return [[found.value, found.standard_error] for found in estimates]

    def injected():
        found = []
        for law in laws():
            noise = bridge.inject(copy.deepcopy(model).train(), law)  # inputs are guessed
            torch.manual_seed(0)
            found += [noise.model(x).detach(), noise.model.eval()(x).detach(), noise.mc(x, 4, rng=0).mean]
            bridge.eject(noise.model)
            found.append(noise.model(x).detach())
        return found

    def regularised():
        found = []
        for law in laws():
            torch.manual_seed(0)
            value = bridge.Regulariser(model, law)(loss)
            found += [value.detach(), torch.autograd.grad(value, model[0].fc.weight)[0]]
        return found

    def seeded(act):
        def run():
            torch.manual_seed(0)
            return [pair for law in laws() for pair in act(law)]

        return run

    def diagnosed(law):
        found = bridge.diagnose(model, loss, x, law, draws=8)
        return pairs([*found.viscosity, *found.jumps, found.diffusion, found.measured])

    def scheduled(law):
        found = bridge.schedule(model, loss, x, law, 0.05, draws=8)
        return pairs([*found.effects, found.measured])

    def effects(law):
        found = [bridge.regularisation(model, loss, x, law=law, reading=how) for how in ("diffusion", "jumps")]
        return pairs([part for one in found for part in one.effects])

    branches = [bridge.MLPBranch.create(1, 4, scale=1.0 + 0.1 * i, rng=0) for i in range(4)]
    deep = bridge.NoisyResNet(branches, bridge.Additive(0.3))

    return {
        "sites": lambda: str(bridge.sites(model, x)),
        "inject": injected,
        "Regulariser": regularised,
        "diagnose": seeded(diagnosed),
        "schedule": seeded(scheduled),
        "effects": seeded(effects),
        "modified_sde": lambda: bridge.modified_sde(deep, 2, depth="smooth").drift(0.1, np.array([[0.2]])),
    }


def uses_of_landscapes(net):
    """What reads a loss around the weights, or over the features."""
    import copy

    import torch
    from torch import nn

    from kolmo import bridge, landscape

    model, x = residual()
    flow, labels = bridge.FlowClassifier(nn.Linear(3, 1), net, nn.Linear(1, 2)), torch.arange(12) % 2
    other = copy.deepcopy(model)
    with torch.no_grad():
        for i, p in enumerate([*flow.parameters(), *other.parameters()]):
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    batches = landscape.BatchLoss(lambda f, batch: f(batch).square().sum(-1).mean(), x.split(5))

    def whole(f):
        return f(x).square().sum(-1).mean()

    def curved(loss):
        found = landscape.curvature(loss, model, top=1, probes=2, density_probes=1, density_steps=4)
        return [found.eigenvalues, found.trace, found.nodes, found.weights, found.loss]

    def directions():
        planes = [
            landscape.random_plane(model),
            landscape.pca_plane(model, [other.state_dict(), *(nn.Sequential(*other[:1], model[1]), model)]),
            landscape.hessian_plane(whole, model),
            landscape.line(model, other),
        ]
        return [v.double() for plane in planes for d in plane.directions for v in d.values()]

    def kept(folder):
        plane = landscape.random_plane(model)
        plane.save(folder / "plane.npz")
        landscape.curvature(whole, model, top=1, probes=0, density_probes=0).save(folder / "curvature.npz")
        plane = landscape.Plane.load(folder / "plane.npz")
        (vector,) = landscape.Curvature.load(folder / "curvature.npz").eigenvectors
        return [plane.project(other)[0], *plane.weights(0.1, 0.2).values(), *vector.values()]

    def of_features():
        found = landscape.feature_landscape(flow, {"a": bridge.Additive(0.2)}, data=(x, labels), points=3, rtol=1e-1)
        return [found.loss, found.probability, found.trajectories]

    def of_flow():
        torch.manual_seed(0)
        return list(landscape.FlowLoss(x, labels, paths=2, rtol=1e-1)(flow).values())

    def stored():
        with tempfile.TemporaryDirectory() as folder:
            return kept(Path(folder))

    return {
        "curvature": lambda: curved(whole),
        "curvature of batches": lambda: curved(batches),
        "planes": directions,
        "surface": lambda: landscape.surface(batches, model, landscape.random_plane(model), points=3).mean,
        "sharpness": lambda: str(landscape.sharpness(whole, model)),
        "stored": stored,
        "feature_landscape": of_features,
        "FlowLoss": of_flow,
    }


@pytest.fixture(scope="module")
def usual():
    """The uses, and what each gives where nothing is set."""
    uses = uses_of_torch()
    return uses, {name: numbers(use) for name, use in uses.items()}


def numbers(use):
    found = use()
    return [np.asarray(part).tolist() for part in (found if isinstance(found, list) else [found])]


def test_what_a_generator_draws_is_on_its_device():
    """Where the default device is another one, torch refuses the generator; only a GPU would show it."""
    missing = []
    for path in Path(kolmo.__file__).parent.rglob("*.py"):
        text = path.read_text()
        for node in ast.walk(ast.parse(text)) if "generator=" in text else ():
            named = {word.arg for word in node.keywords} if isinstance(node, ast.Call) else set()
            made = isinstance(node, ast.Call) and ast.unparse(node.func) in (
                "torch.rand",
                "torch.randn",
                "torch.randint",
            )
            if made and "generator" in named and "device" not in named:
                missing.append(f"{path.name}:{node.lineno}")
    assert missing == []


def test_a_default_device_that_was_taken_back_is_none(monkeypatch):
    """torch 2.6 has no answer then."""
    import torch

    from kolmo import bridge

    def unknown():
        raise AttributeError("'NoneType' object has no attribute 'device'")

    monkeypatch.setattr(torch, "get_default_device", unknown)
    problem = kolmo.KolmogorovProblem(kolmo.SDE(0.0, 1.0, dim=1), lambda x: x[..., 0], 1.0)
    assert kolmo.monte_carlo(problem, [0.0], paths=8, steps=2, rng=0).paths == 8
    assert bridge.MLPBranch.create(1, 4, rng=0).W1.device.type == "cpu"


def test_branches_are_made_where_the_default_device_is():
    import torch

    from kolmo import bridge

    with torch.device("meta"):
        assert bridge.MLPBranch.create(1, 4, rng=0).W1.is_meta


@pytest.mark.parametrize(("dtype", "device"), [("bfloat16", "meta"), ("float16", "cpu"), ("float64", "meta")])
def test_default_devices_and_precisions_of_torch_change_nothing(usual, device, dtype):
    import torch

    uses, expected = usual
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    torch.set_default_device(device)
    try:
        for name, use in uses.items():
            assert numbers(use) == expected[name], name
    finally:
        torch.set_default_dtype(before)
        torch.set_default_device(None)


def test_states_of_another_precision_or_device_than_the_weights_are_refused_by_name():
    import torch

    from kolmo import bridge

    net = bridge.NoisyResNet([bridge.MLPBranch.create(1, 4, rng=0)], bridge.StochasticDepth(0.5))
    for x in (torch.ones(2, 1, dtype=torch.float64), torch.ones(2, 1, device="meta")):
        for method in ("monte_carlo", "enumerate", "recursion"):
            with pytest.raises(InputError, match=r"x: got a tensor of .*as the weights are"):
                bridge.expected_loss(net, lambda x: x[..., 0], x, method=method)


@pytest.mark.parametrize("transform", ["grad", "vmap", "jacrev", "jvp"])
def test_transforms_of_torch_are_refused_by_name(transform):
    import torch

    from kolmo import control

    def loss(rate):
        sde = kolmo.SDE(lambda t, x: -rate * x, 1.0, dim=1)
        return control.value(kolmo.KolmogorovProblem(sde, lambda x: x[..., 0], 1.0), [0.5], rtol=1e-2).sum()

    one = torch.ones((2,) if transform == "vmap" else (), dtype=torch.float64)
    apply = getattr(torch.func, transform)
    with pytest.raises(InputError, match=r"transform of torch\.func"):
        apply(loss, (one,), (one,)) if transform == "jvp" else apply(loss)(one)


# ----------------------------------------------------------------------------------------------------------- resources


def test_columns_steps_and_saved_times_count_as_memory(monkeypatch):
    monkeypatch.setattr(memory, "available", lambda: 10**9)
    box = kolmo.Box([0.0], [1.0], "reflecting")

    def problem(k=None):
        return kolmo.KolmogorovProblem(
            kolmo.SDE(0.0, 1.0, dim=1), lambda x: x[..., 0] if k is None else x[..., :1] * np.ones(k), 1.0, box
        )

    calls = {
        "columns": lambda: kolmo.solve(problem(10**7), grid=21, steps=4),
        "columns by tolerance": lambda: kolmo.solve(problem(10**7), at=[0.5]),
        "steps": lambda: kolmo.solve(problem(), grid=21, steps=10**12),
        "saved": lambda: kolmo.solve(problem(1000), grid=1001, steps=4, save=np.linspace(0.0, 1.0, 1001)),
    }
    for call in calls.values():
        with within(10), pytest.raises(InputError, match=r"take at least [\d.]+ GB; needed at most the 1\.0 GB"):
            call()


def test_every_grid_that_is_given_is_asked_for_its_memory():
    from kolmo import control

    def problem(dim):
        box = kolmo.Box([-1.0] * dim, [1.0] * dim, "reflecting")
        return kolmo.KolmogorovProblem(kolmo.SDE(0.0, 1.0, dim=dim), lambda x: x[..., 0], 0.1, box)

    def stationary(dim):
        box = kolmo.Box([-1.0] * dim, [1.0] * dim, "absorbing")
        return kolmo.KolmogorovProblem(kolmo.SDE(0.0, 1.0, dim=dim), None, None, box, source=1.0)

    start = [0.0, 0.0, 0.0]
    calls = {
        "solve": lambda: kolmo.solve(problem(3), grid=5000, steps=4),
        "stationary": lambda: kolmo.solve(stationary(3), grid=5000),
        "solve_forward": lambda: kolmo.solve_forward(problem(3), start, grid=5000, steps=4),
        "steps": lambda: kolmo.solve_forward(problem(1), [0.0], grid=11, steps=10**12),
        "law": lambda: control.law(problem(3), start, grid=(5000, 4000, 6000), steps=4),
        "discretize": lambda: kolmo.discretize(problem(3), 5000),
        "spectrum": lambda: kolmo.spectrum(problem(3), 3, grid=2000),
        "stationary_density": lambda: kolmo.stationary_density(problem(3), grid=2000),
    }
    for call in calls.values():
        with within(10), pytest.raises(InputError, match=r"take at least [\d.]+ GB; needed at most the [\d.]+ GB"):
            call()


@pytest.mark.parametrize("value", [1, -5, 2.5, float("inf"), float("nan"), "7", None, True, [4, 5], 1j])
@pytest.mark.parametrize("argument", ["paths", "steps"])
def test_numbers_of_paths_and_steps_are_whole(argument, value):
    problem = kolmo.KolmogorovProblem(kolmo.SDE(0.0, 1.0, dim=1), lambda x: x[..., 0], 1.0)
    given = {"paths": 8, "steps": 8} | {argument: value}
    with pytest.raises(InputError, match="an integer of at least 2") as caught:
        kolmo.monte_carlo(problem, [0.0], **given)
    assert caught.value.argument == argument
    with pytest.raises(InputError, match="an integer of at least 2"):
        kolmo.certify(problem, solution(), [0.0], **given)


def test_paths_that_do_not_fit_or_never_end_are_refused_with_numbers(monkeypatch):
    box = kolmo.Box([0.0], [1.0], "reflecting")

    def problem(k=None):
        return kolmo.KolmogorovProblem(
            kolmo.SDE(0.0, 1.0, dim=1), lambda x: x[..., 0] if k is None else x[..., :1] * np.ones(k), 1.0, box
        )

    def sampled(of, **given):
        return kolmo.monte_carlo(of, [0.5], **given)

    def certified(**given):
        return kolmo.certify(problem(), solution(), [0.5], **given)

    long = r"paths: got \d+ paths of \d+ steps from 1 points, which take at least [\d.e+]+ days; needed at most 7 days"
    for paths, steps in ((10**15, 2), (2, 10**15), (10**40, 10**40), (1e30, 100)):
        with within(10), pytest.raises(InputError, match=long):
            sampled(problem(), paths=paths, steps=steps)
    for paths, steps in ((10**15, 2), (10**12, 10**6)):
        with within(10), pytest.raises(InputError, match=long):
            certified(paths=paths, steps=steps)
    monkeypatch.setattr(memory, "available", lambda: 10**8)
    large = r"paths: got .*, which take at least [\d.]+ GB; needed at most the 0\.1 GB of memory that are free"
    for call in (
        lambda: sampled(problem(10**4), paths=10**5, steps=4),
        lambda: kolmo.monte_carlo(problem(1000), np.full(10**5, 0.5), paths=2, steps=4),
        lambda: certified(paths=2, steps=10**9),
    ):
        with within(10), pytest.raises(InputError, match=large):
            call()
    assert sampled(problem(), paths=1e3, steps=4.0).paths == 1000


def test_lists_of_controls_are_short_and_fit_into_the_memory(monkeypatch):
    from kolmo import control

    with pytest.raises(InputError, match="1000000 controls; needed at most 10000"):
        control.Finite(np.linspace(-1.0, 1.0, 10**6))
    steered = control.ControlProblem(
        lambda t, x, a: a,
        covariance=1.0,
        controls=control.Finite(np.linspace(-1.0, 1.0, 1001)),
        terminal=lambda x: x[..., 0] ** 2,
        horizon=0.2,
        box=kolmo.Box(-8.0, 8.0),
    )
    monkeypatch.setattr(memory, "available", lambda: 10**6)
    with within(10), pytest.raises(InputError, match=r"controls: got 1001 controls at \d+ nodes, which take at least"):
        control.solve_hjb(steered, at=[0.5], rtol=1e-1)


def test_the_size_of_a_set_of_controls_is_bounded(tmp_path, capsys):
    from kolmo import control

    with within(2), pytest.raises(InputError, match="from 1 to 64"):
        control.Unbounded(10**9)


PROGRAM = "import sys; from kolmo.cli import main; sys.exit(main())"


@pytest.mark.parametrize(
    ("arguments", "redirection", "code"),
    [
        ("list --json", ">/dev/full", 1),
        ("list --json", ">&-", 0),
        ("list --json", "| head -c 1", 0),
        ("list --json", "2>/dev/full", 0),
        ("list --json", ">&- 2>&-", 0),
        ("solve missing.toml", ">&-", 2),
        ("solve missing.toml", "2>&-", 2),
        ("solve missing.toml", ">&- 2>&-", 2),
    ],
)
def test_output_that_cannot_be_written_is_no_mistake_of_kolmo(arguments, redirection, code):
    imports = ["bash", "-c", f"'{sys.executable}' -c 'import numpy.f2py' 2>&-"]
    if "2>&-" in redirection and subprocess.run(imports, check=False).returncode:
        pytest.skip("this NumPy cannot be imported then")
    command = f"'{sys.executable}' -c '{PROGRAM}' {arguments} {redirection}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == code, done
    assert "Traceback" not in done.stderr
    assert "mistake" not in done.stderr
    assert "Exception ignored" not in done.stderr
    if redirection == ">/dev/full":
        assert "No space left on device" in done.stderr


def test_a_working_directory_that_is_gone_is_no_mistake_of_kolmo(tmp_path):
    (tmp_path / "e.toml").write_text(SLOW.replace("1e-9", "1e-1").replace("10.0", "0.1"))
    for arguments in (
        ["experiment", "lqg"],
        ["list"],
        ["landscape", "a:b"],
        ["solve", str(tmp_path / "e.toml"), "--out", "run"],
    ):
        gone = tmp_path / "gone"
        gone.mkdir()
        program = f"import os, shutil; os.chdir({str(gone)!r}); shutil.rmtree({str(gone)!r}); {PROGRAM}"
        done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode in (0, 1, 2)
        assert "mistake" not in done.stderr, done.stderr
        assert "Traceback" not in done.stderr, done.stderr


# -------------------------------------------------------------------------------------------------------- dependencies


def test_versions_with_known_holes_are_not_admitted():
    import tomllib

    project = Path(__file__).parents[1] / "pyproject.toml"
    found = tomllib.loads(project.read_text())["project"]
    assert "torch>=2.6" in found["dependencies"]  # weights_only loading before could run code (CVE-2025-32434)
    assert "pytest-xdist>=3.6.1" in found["optional-dependencies"]["test"]  # 3.6.0 was withdrawn
