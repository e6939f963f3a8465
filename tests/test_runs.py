"""Run folders: fresh, atomic, resumable, never unpickled; damage is found and named."""

import itertools
import json
import signal
import struct
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kolmo.errors import InputError, KolmoError
from kolmo.files import FileError, read_json, read_tree, replacing, write_bytes, write_json, write_tree
from kolmo.runs import Run, RunError, environment

# ------------------------------------------------------------------------------------------------------- folders


def test_two_runs_made_at_once_get_folders_of_their_own(tmp_path):
    folders = [Run.create("toy", {}, root=tmp_path).folder for _ in range(5)]
    assert len(set(folders)) == 5
    assert all(folder.parent == tmp_path and folder.name.startswith("toy-") for folder in folders)


def test_runs_made_at_one_moment_by_many_threads_get_folders_of_their_own(tmp_path):
    together = threading.Barrier(8)

    def make(_):
        together.wait()
        return Run.create("toy", {}, root=tmp_path).folder

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(make, range(16)))) == 16


def test_an_existing_output_folder_is_refused_and_left_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(InputError, match=r"out: got .*mine; needed a folder that does not exist yet.*--resume"):
        Run.create("toy", {}, out=tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_a_configuration_that_is_no_json_makes_no_folder(tmp_path):
    with pytest.raises(InputError, match="a set"):
        Run.create("toy", {"depths": {1, 2}}, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_place_that_cannot_be_written_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(KolmoError, match="file"):
        Run.create("toy", {}, out=tmp_path / "file" / "run")
    with pytest.raises(KolmoError, match="cannot make a run folder"):
        Run.create("toy", {}, root=tmp_path / "file")


def test_a_folder_without_a_run_is_refused_and_the_runs_in_it_are_named(tmp_path):
    Run.create("toy", {}, out=tmp_path / "first")
    with pytest.raises(InputError, match=r"needed a run folder .*first"):
        Run.open(tmp_path)


def test_one_process_writes_at_a_time(tmp_path):
    with Run.create("toy", {}, out=tmp_path / "run") as run, pytest.raises(RunError, match="another process"):
        Run.resume(run.folder)
    Run.resume(tmp_path / "run")


@pytest.mark.parametrize("key", ["", "a/b", "../a", ".hidden", "a b"])
def test_names_cannot_leave_the_folder(tmp_path, key):
    with Run.create("toy", {}, out=tmp_path / "run") as run, pytest.raises(InputError, match="key"):
        run.unit(key, lambda: 1)


# -------------------------------------------------------------------------------------------------------- status


def test_status_follows_the_work(tmp_path):
    run = Run.create("toy", {}, out=tmp_path / "run")
    with run:
        assert run.status == "running"
        assert Run.open(run.folder).status == "running"
    assert run.status == "done"


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt, "interrupted"), (ZeroDivisionError, "failed")])
def test_status_after_an_exception(tmp_path, error, status):
    run = Run.create("toy", {}, out=tmp_path / "run")
    with pytest.raises(error), run:
        raise error
    assert run.status == status
    assert (error is KeyboardInterrupt) or "ZeroDivisionError" in (run.folder / "log.txt").read_text()


# --------------------------------------------------------------------------------------------------------- units

LEAVES = st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False) | st.text(max_size=5)
TREES = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner))


@settings(max_examples=50, deadline=None)
@given(TREES)
def test_what_is_stored_comes_back(tmp_path_factory, value):
    path = tmp_path_factory.mktemp("tree") / "value.npz"
    write_tree(path, value)
    assert read_tree(path) == value


def test_arrays_come_back_exactly(tmp_path, rng):
    value = {"x": rng.normal(size=(3, 2)), "nested": [np.arange(3, dtype=np.int32), (np.float64(0.1), np.nan)]}
    write_tree(tmp_path / "value.npz", value)
    back = read_tree(tmp_path / "value.npz")
    assert back["x"].dtype == np.float64
    assert np.array_equal(back["x"], value["x"])
    assert back["nested"][0].dtype == np.int32
    assert back["nested"][1][0] == 0.1
    assert np.isnan(back["nested"][1][1])


def test_a_fresh_unit_and_a_stored_one_give_the_same_thing(tmp_path):
    with Run.create("toy", {}, out=tmp_path / "run") as run:
        fresh = run.unit("pair", lambda: (1, {"a": (2, 3)}))
    with Run.resume(run.folder) as run:
        assert run.unit("pair", lambda: pytest.fail("done before")) == fresh == [1, {"a": [2, 3]}]


def test_a_unit_that_fails_leaves_nothing_behind(tmp_path):
    with Run.create("toy", {}, out=tmp_path / "run") as run:
        with pytest.raises(ZeroDivisionError):
            run.unit("bad", lambda: 1 / 0)
        with pytest.raises(InputError, match="detach"):
            run.unit("tensor", lambda: __import__("torch").zeros(2))
        assert run.units == []
        assert run.unit("bad", lambda: "better now") == "better now"


def test_resumed_metrics_are_those_of_an_unbroken_run(tmp_path):
    def work(run, fail):
        run.record(stage="start")

        def second():
            run.record(loss=2)
            if fail:
                raise KeyboardInterrupt
            return 2

        run.unit("first", lambda: run.record(loss=1))
        run.unit("second", second)

    run = Run.create("toy", {}, out=tmp_path / "run")
    with pytest.raises(KeyboardInterrupt), run:
        work(run, fail=True)
    with (run.folder / "metrics.jsonl").open("a") as file:
        file.write('{"unit": "second", "lo')  # a line cut short by a kill
    with Run.resume(run.folder) as run:
        work(run, fail=False)
    shown = sorted((line["unit"] or "", line.get("loss", 0)) for line in run.metrics)
    assert shown == [("", 0), ("first", 1), ("second", 2)]


def test_a_killed_run_resumes_and_loses_only_the_unit_in_flight(tmp_path):
    program = textwrap.dedent("""
        import sys, time
        from pathlib import Path
        from kolmo.runs import Run
        folder, last = Path(sys.argv[1]), sys.argv[2] == "slow"
        run = Run.resume(folder) if folder.exists() else Run.create("toy", {}, out=folder)
        def work(i):
            with (folder / "calls").open("a") as file:
                file.write(f"{i}\\n")
            if i == 2 and last:
                print("in flight", flush=True)
                time.sleep(60)
            return i
        with run:
            run.save_results({"sum": sum(run.unit(f"unit-{i}", lambda i=i: work(i)) for i in range(4))})
    """)
    command = [sys.executable, "-c", program, str(tmp_path / "run")]
    with subprocess.Popen([*command, "slow"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "in flight\n"
        process.send_signal(signal.SIGKILL)
    run = Run.open(tmp_path / "run")
    assert run.status == "interrupted"
    assert run.units == ["unit-0", "unit-1"]
    subprocess.run([*command, "quick"], check=True)
    assert run.status == "done"
    assert run.results == {"sum": 6}
    assert (tmp_path / "run" / "calls").read_text().split() == ["0", "1", "2", "2", "3"]


def test_a_run_killed_again_and_again_ends_as_if_nothing_had_happened(tmp_path, rng):
    program = textwrap.dedent("""
        import sys, time
        from pathlib import Path
        import numpy as np
        from kolmo.runs import Run
        folder = Path(sys.argv[1])
        run = Run.resume(folder) if (folder / "config.json").exists() else Run.create("toy", {}, out=folder)
        print("begun", flush=True)
        def work(i):
            with (folder / "calls").open("a") as file:
                file.write(f"{i}\\n")
            for step in range(4):
                run.record(i=i, step=step)
                time.sleep(0.005)
            return {"x": np.full(2000, float(i))}
        with run:
            found = [run.unit(f"unit-{i}", lambda i=i: work(i))["x"].mean() for i in range(20)]
            run.save_results({"sum": sum(found)})
    """)
    folder, kills = tmp_path / "run", 0
    for delay in rng.uniform(0.0, 0.25, 5):
        with subprocess.Popen([sys.executable, "-c", program, str(folder)], stdout=subprocess.PIPE) as process:
            process.stdout.readline()
            time.sleep(delay)
            process.send_signal(signal.SIGKILL)
        kills += process.returncode == -signal.SIGKILL
        run = Run.open(folder)
        assert run.status in ("interrupted", "done")
        assert all(run.load_unit(key)["x"].shape == (2000,) for key in run.units)
    subprocess.run([sys.executable, "-c", program, str(folder)], check=True)
    assert run.status == "done"
    assert run.results == {"sum": 190.0}
    assert sorted((line["i"], line["step"]) for line in run.metrics) == [(i, s) for i in range(20) for s in range(4)]
    assert len((folder / "calls").read_text().split()) <= 20 + kills


# --------------------------------------------------------------------------------------------------------- files


def test_a_file_is_whole_or_absent(tmp_path):
    path = tmp_path / "value.json"
    write_json(path, {"old": 1})

    def break_down():
        with replacing(path) as file:
            file.write(b'{"new"')
            raise RuntimeError("half-way")

    with pytest.raises(RuntimeError, match="half-way"):
        break_down()
    assert read_json(path) == {"old": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["value.json"]


@pytest.mark.skipif(not Path("/dev/null").is_char_device(), reason="needs a device")
def test_a_device_and_a_folder_are_not_replaced(tmp_path):
    (tmp_path / "device").symlink_to("/dev/null")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "device", tmp_path / "folder"):
        with pytest.raises(FileError, match="a folder or a device"):
            write_bytes(path, b"x")
    assert (tmp_path / "device").is_char_device()


def test_json_is_strict(tmp_path):
    write_json(tmp_path / "a.json", {"nan": np.nan, "inf": [np.inf], "n": np.int64(3), "x": np.ones(2), 8: 1})
    text = (tmp_path / "a.json").read_text()
    strict = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert strict == {"nan": None, "inf": [None], "n": 3, "x": [1.0, 1.0], "8": 1}


def test_a_place_that_takes_no_file_is_named(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(FileError, match=r"cannot write .*x\.txt"):
        write_bytes(tmp_path / "file" / "x.txt", b"")


@pytest.fixture
def finished(tmp_path) -> Run:
    with Run.create("toy", {"n": 1}, out=tmp_path / "run", seeds=[3]) as run:
        run.unit("only", lambda: {"x": np.arange(100.0)})
        run.save_arrays("field", u=np.linspace(0, 1, 50))
        run.save_results({"answer": 42})
    return run


def read_everything(folder):
    run = Run.open(folder)
    return run.results, run.environment, run.load_unit("only"), run.load_arrays("field")


# A changed digit is still JSON, so only arrays and units, which carry checksums, are tried with a flipped byte.
DAMAGED = [
    *itertools.product(["config.json", "results.json", "environment.json"], ["cut", "empty", "gone"]),
    *itertools.product(["units/only.npz", "arrays/field.npz"], ["cut", "flip", "empty", "gone"]),
]


@pytest.mark.parametrize(("name", "damage"), DAMAGED)
def test_damage_is_found_and_named(finished, name, damage):
    path = finished.folder / name
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle] ^= 0xFF
    new = {"cut": content[:middle], "flip": content, "empty": b"", "gone": None}[damage]
    path.unlink() if new is None else path.write_bytes(new)
    with pytest.raises(KolmoError, match=path.stem):
        read_everything(finished.folder)


def test_pickles_are_never_loaded(finished):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (finished.folder / "exploded",))

    path = finished.folder / "arrays" / "field.npz"
    with path.open("wb") as file:
        np.savez(file, u=np.array([Bomb()], dtype=object))
    with pytest.raises(FileError, match="damaged"):
        finished.load_arrays("field")
    assert not (finished.folder / "exploded").exists()


@pytest.mark.parametrize("line", [b'{"unit', b"null", b"[1]", b'{"unit": 3}', b"\xff\xfe", b'{"unit": "\xff"}', b"\0"])
def test_damaged_metrics_name_the_line(finished, line):
    (finished.folder / "metrics.jsonl").write_bytes(b'{"unit": null}\n' + line + b'\n{"unit": null}\n')
    with pytest.raises(FileError, match="line 2"):
        _ = finished.metrics


@pytest.mark.parametrize("name", ["results", "environment", "status"])
def test_json_that_is_no_table_is_damage(finished, name):
    (finished.folder / f"{name}.json").write_text("[1, 2]")
    with pytest.raises(FileError, match=f"{name}.json is damaged"):
        getattr(finished, name)


# --------------------------------------------------------------------------------------------------- environment


def test_the_environment_says_what_a_result_depends_on(finished):
    made = finished.environment
    assert made["seeds"] == [3]
    assert made["packages"]["numpy"] == np.__version__
    assert made["python"] == ".".join(map(str, sys.version_info[:3]))
    assert json.dumps(environment())


def test_figures_are_saved_for_screen_and_print_with_the_same_bytes_each_time(tmp_path):
    from matplotlib.figure import Figure

    contents = []
    for name in ("a", "b"):
        with Run.create("toy", {}, out=tmp_path / name) as run:
            figure = Figure()
            figure.subplots().plot([0, 1])
            path = run.save_figure("line", figure)
        assert path == run.figure("line")
        contents.append((path.read_bytes(), path.with_suffix(".pdf").read_bytes()))
        time.sleep(1.1)
    assert contents[0] == contents[1]
    assert contents[0][0].startswith(b"\x89PNG")
    assert contents[0][1].startswith(b"%PDF")


def test_json_that_is_too_large_is_neither_written_nor_read(tmp_path, monkeypatch):
    """As Python objects it takes 25 times its size: whoever wrote it, it is told before."""
    from kolmo.files import records

    value, path = {"numbers": list(range(500))}, tmp_path / "value.npz"
    write_tree(path, value)
    monkeypatch.setattr(records, "MAX_JSON", 1000)
    with pytest.raises(FileError, match="it is larger than"):
        read_tree(path)
    for write in (write_tree, write_json):
        with pytest.raises(InputError, match="give long lists as NumPy arrays"):
            write(tmp_path / "other", value)
    assert [file.name for file in tmp_path.iterdir()] == ["value.npz"]
    write_tree(path, {"numbers": np.arange(500)})  # which bounds itself
    assert read_tree(path)["numbers"].tolist() == value["numbers"]


@pytest.mark.parametrize("factor", [2, 50, 2000])
def test_arrays_larger_than_their_file_are_not_made_room_for(tmp_path, factor):
    """A small file may claim anything of what is in it: refused before there is an array of that size."""
    path, count = tmp_path / "value.npz", 1000
    write_tree(path, {"numbers": np.arange(float(count))})
    content = bytearray(path.read_bytes())
    content = content.replace(b"(1000,), }     ", f"({factor * count},), }}     ".encode()[:15])
    name = content.rindex(b"array0.npy") - 46  # its entry in the list of contents
    claimed = 128 + 8 * factor * count
    content[name + 20 : name + 28] = struct.pack("<LL", claimed, claimed)
    path.write_bytes(content)
    with pytest.raises(FileError, match="its arrays are larger than the file"):
        read_tree(path)
