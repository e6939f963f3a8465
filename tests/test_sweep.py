"""Sweeps: the same results on any workers; a killed worker costs its task; an unfinished sweep goes on."""

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from kolmo import experiments, sweep
from kolmo.cli import main
from kolmo.errors import InputError, KolmoError
from kolmo.runs import Run

cloudpickle = pytest.importorskip("cloudpickle")
pytest.importorskip("distributed")


@pytest.fixture(autouse=True)
def by_value():
    """Send this module's functions to workers as they are: they cannot import a test."""
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def simulated(seed, folder, fatal):
    """Average of random numbers; the first worker that gets the fatal seed is killed on the spot."""
    with (Path(folder) / "calls").open("a") as file:
        file.write(f"{seed}\n")
    if seed == fatal and not (Path(folder) / "killed").exists():
        (Path(folder) / "killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return {"mean": float(np.random.default_rng(seed).normal(size=10_000).mean()), "seed": seed}


def failing(seed):
    if seed == 1:
        raise ZeroDivisionError("in a task")
    return seed


def test_a_killed_worker_costs_its_task_and_the_results_are_those_of_the_serial_run(tmp_path):
    tasks = {f"seed-{s}": (simulated, (s, str(tmp_path), 2)) for s in range(6)}
    with Run.create("toy", {}, out=tmp_path / "parallel") as run:
        assert sweep.store(run, tasks, 6, scheduler=None, workers=2, progress=False) == {}
    calls = (tmp_path / "calls").read_text().split()
    assert calls.count("2") == 2  # killed, and again
    assert len(calls) <= 6 + 2  # at most what was in flight beside it
    with Run.create("toy", {}, out=tmp_path / "serial") as serial:
        sweep.store(serial, tasks, 6, scheduler=None, workers=0, progress=False)
    assert run.units == serial.units
    assert all(run.load_unit(key) == serial.load_unit(key) for key in tasks)


def test_a_scheduler_of_ones_own_and_a_task_that_fails(tmp_path):
    from distributed import LocalCluster

    tasks = {f"seed-{s}": (failing, (s,)) for s in range(3)}
    with (
        LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=None, processes=False) as cluster,
        Run.create("toy", {}, out=tmp_path / "run") as run,
    ):
        failed = sweep.store(run, tasks, 3, scheduler=cluster.scheduler_address, workers=2, progress=False)
    assert failed == {"seed-1": "ZeroDivisionError: in a task"}
    assert run.units == ["seed-0", "seed-2"]


def lasting(seed):
    """A task that takes a while."""
    time.sleep(0.3)
    return {"x": seed}


CLUSTER = """
import sys
from distributed import LocalCluster
if __name__ == "__main__":
    options = {"threads_per_worker": 1, "dashboard_address": None, "silence_logs": "ERROR"}
    with LocalCluster(n_workers=2, **options) as cluster:
        print(cluster.scheduler_address, *(worker.pid for worker in cluster.workers.values()), flush=True)
        sys.stdin.read()
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="kills as on POSIX")
def test_a_scheduler_or_a_worker_of_others_that_is_killed_costs_what_was_in_flight(tmp_path):
    (tmp_path / "cluster.py").write_text(CLUSTER)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}

    def begin():
        process = subprocess.Popen([sys.executable, "cluster.py"], cwd=tmp_path, **pipes)
        address, *workers = process.stdout.readline().split()
        return process, address, [int(pid) for pid in workers]

    tasks = {f"seed-{s}": (lasting, (s,)) for s in range(8)}
    process, address, (worker, _) = begin()
    with Run.create("toy", {}, out=tmp_path / "run") as run:
        threading.Timer(0.5, os.kill, (worker, signal.SIGKILL)).start()
        few = dict(list(tasks.items())[:4])
        assert sweep.store(run, few, 4, scheduler=address, workers=2, progress=False) == {}
        killer = threading.Timer(0.5, process.kill)
        killer.start()
        waiting = {key: task for key, task in tasks.items() if not run.finished(key)}
        with pytest.raises(KolmoError, match=r"scheduler tcp.* is gone"):  # an end, not an endless wait
            sweep.store(run, waiting, 8, scheduler=address, workers=2, progress=False)
        process.wait()
        process, address, _ = begin()
        waiting = {key: task for key, task in tasks.items() if not run.finished(key)}
        assert 0 < len(waiting) < 5
        assert sweep.store(run, waiting, 8, scheduler=address, workers=2, progress=False) == {}
        process.communicate("")
        assert {key: run.load_unit(key)["x"] for key in tasks} == {f"seed-{s}": s for s in range(8)}


TOY = '''
"""Add up a few random numbers."""
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Config:
    seeds: int = 1
    seed: int = 0
    scale: float = 1.0
    fails: int = -1


def run(config, run, progress):
    if config.seed == config.fails:
        raise ZeroDivisionError("a bug")
    return {"sum": config.scale * float(np.random.default_rng(config.seed).normal()), "word": "x"}
'''


@pytest.fixture
def toy(tmp_path, monkeypatch):
    folder = tmp_path / "experiments"
    folder.mkdir()
    (folder / "toy_sweep.py").write_text(TOY)
    monkeypatch.setattr(experiments, "folder", lambda: folder)
    monkeypatch.setattr(experiments, "__path__", [str(folder)])
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("kolmo.experiments.toy_sweep", None)


def test_a_sweep_averages_over_its_seeds(toy, capsys):
    arguments = ["sweep", "toy_sweep", "--vary", "scale=1", "--vary", "scale=2", "--seeds", "3", "--workers", "0"]
    assert main([*arguments, "--out", "run", "--json", "--quiet"]) == 0
    found = json.loads(capsys.readouterr().out)["results"]
    draws = np.array([np.random.default_rng(seed).normal() for seed in range(3)])
    for scale in (1, 2):
        assert np.isclose(found[f"scale={scale}"]["sum"]["mean"], scale * draws.mean())
        assert np.isclose(found[f"scale={scale}"]["sum"]["standard_error"], scale * draws.std(ddof=1) / np.sqrt(3))
    assert Run.open(toy / "run").environment["seeds"] == [0, 1, 2]
    page = (toy / "run" / "report.html").read_text()
    assert "--vary scale=2" in page
    (toy / "run" / "report.html").unlink()
    assert main(["report", "run"]) == 0
    assert (toy / "run" / "report.html").read_text() == page


def test_a_sweep_prints_a_line_for_each_number(toy, capsys):
    arguments = ["sweep", "toy_sweep", "--vary", "scale=0", "--vary", "scale=2", "--workers", "0", "--quiet"]
    assert main([*arguments, "--seeds", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["scale=0", "  sum  0 ± 0"]
    assert re.fullmatch(r"  sum  -?\d\.\d+ ± \d\.\d+", lines[3])
    assert main([*arguments, "--seeds", "1"]) == 0
    assert "±" not in capsys.readouterr().out


def test_what_is_done_is_not_done_again(toy, capsys):
    arguments = ["sweep", "toy_sweep", "--set", "fails=1", "--seeds", "3", "--workers", "0", "--quiet"]
    assert main([*arguments, "--out", "run"]) == 1
    err = capsys.readouterr().err
    assert "seed=1: ZeroDivisionError: a bug" in err
    assert "--resume run" in err
    run = Run.open(toy / "run")
    assert run.units == ["seed=0", "seed=2"]
    assert run.status == "failed"
    (toy / "experiments" / "toy_sweep.py").write_text(TOY.replace("config.seed == config.fails", "config.seed == 0"))
    sys.modules.pop("kolmo.experiments.toy_sweep")
    assert main(["sweep", "toy_sweep", "--resume", "run", "--workers", "0", "--quiet"]) == 0  # seed 0 is not run again
    assert run.status == "done"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--vary", "scael=1"], "did you mean 'scale'"),
        (["--vary", "scale"], "KEY=VALUE"),
        (["--vary", "scale=big"], "a number"),
        (["--seeds", "2", "--vary", "seed=1"], "seeds"),
        (["--seeds", "2", "--set", "seed=x"], "a whole number"),
        (["--resume", "nowhere"], "run folder"),
        (["--seeds", "1", "--scheduler", "tcp://127.0.0.1:9", "--out", "new"], "dask scheduler"),
    ],
)
def test_mistakes_are_explained(toy, capsys, arguments, message, monkeypatch):
    assert main(["sweep", "toy_sweep", "--quiet", *arguments]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err


def test_settings_are_checked_before_anything_runs(toy):
    with pytest.raises(InputError, match="scale"):
        sweep.settings("toy_sweep", {}, {"seed": ["0"], "scale": ["1", "x"]})


@pytest.mark.parametrize("name", ["landscape_laws", "landscape_noise", "landscape_pde", "images"])
def test_sweeps_go_over_planes(name):
    assert len(sweep.settings(name, {}, {"plane": ["1", "2"]})) == 2
    lab = importlib.import_module("kolmo.experiments._landscapes")
    config = importlib.import_module(f"kolmo.experiments.{name}").Config
    assert [lab.plane_seed(config(plane=plane), 7) for plane in (None, 0, 3)] == [7, 0, 3]


@pytest.mark.parametrize("name", ["landscape_laws", "landscape_trained"])
def test_comparisons_over_seeds_refuse_one_seed_before_they_start(name, tmp_path, capsys):
    assert main(["experiment", name, "--seeds", "1", "--quiet", "--out", str(tmp_path / "run")]) == 2
    assert "at least two" in capsys.readouterr().err
