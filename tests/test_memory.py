"""Memory and disk: refused with numbers before anything is built; nothing half-written is left."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import kolmo
from kolmo import memory
from kolmo.errors import InputError
from kolmo.files import FileError, replacing, write_bytes


def problem(dim):
    box = kolmo.Box([-1.0] * dim, [1.0] * dim, "reflecting")
    return kolmo.KolmogorovProblem(kolmo.SDE(0.0, diffusion=1.0, dim=dim), lambda x: x[..., 0], 0.1, box)


@pytest.mark.parametrize(("dim", "grid"), [(3, 5000), (3, (4000, 5000, 6000)), (2, 400_000), (1, 3_000_000_000)])
def test_a_grid_beyond_the_memory_is_refused_with_numbers(dim, grid):
    with pytest.raises(
        InputError, match=r"grid: got .* nodes, 4 steps, which take at least [\d.]+ GB; needed at most the [\d.]+"
    ):
        kolmo.solve(problem(dim), grid=grid, steps=4)


def test_the_limit_is_what_is_free(monkeypatch):
    monkeypatch.setattr(memory, "available", lambda: memory.predicted((201, 201), steps=4) - 1)
    with pytest.raises(InputError, match="201 × 201 nodes"):
        kolmo.solve(problem(2), grid=201, steps=4)
    monkeypatch.setattr(memory, "available", lambda: memory.predicted((201, 201), steps=4))
    kolmo.solve(problem(2), grid=201, steps=4)
    monkeypatch.setattr(memory, "available", lambda: None)
    kolmo.solve(problem(2), grid=201, steps=4)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_the_prediction_is_a_lower_bound_of_the_right_size():
    program = (
        "import kolmo, re, sys; sys.path.insert(0, sys.argv[1]);"
        "from test_memory import problem;"
        # ru_maxrss would hold the size of the parent that this process was forked from
        "peak = lambda: 1024 * int(re.search('VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1]);"
        "kolmo.solve(problem(2), grid=12, steps=4, stepper='mcs'); before = peak();"
        "kolmo.solve(problem(2), grid=600, steps=4, stepper='mcs'); print(peak() - before)"
    )
    command = [sys.executable, "-c", program, os.path.dirname(__file__)]  # noqa: PTH120
    used = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert 0.6 * used < memory.predicted((600, 600)) < 1.1 * used


def test_a_full_disk_is_said_and_leaves_nothing_half_written(tmp_path):
    path = tmp_path / "value.npz"
    write_bytes(path, b"old")

    def fill():
        with replacing(path) as file:
            file.write(b"ne")
            raise OSError(28, "No space left on device")

    with pytest.raises(FileError, match=r"cannot write .*value\.npz: No space left on device"):
        fill()
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["value.npz"]


def test_a_long_axis_takes_memory_in_proportion():
    # three dense matrices of difference weights would take 60 GB
    fine, coarse = (kolmo.solve(problem(1), grid=n, steps=8, stepper="radau5")(0.5) for n in (50_001, 201))
    assert abs(float(fine) - float(coarse)) < 1e-5


@pytest.mark.parametrize("stepper", ["rk4", "mcs3", "semi-lagrangian"])
@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_coefficients_are_evaluated_on_the_grid_once(stepper, backend):
    calls = []

    def drift(t, x):
        calls.append(len(x))
        return -x

    sde = kolmo.SDE(drift, covariance=0.1 * np.eye(2), dim=2)
    start = kolmo.KolmogorovProblem(sde, lambda x: x[..., 0] ** 2, 0.01, kolmo.Box([-1.0, -1.0], [1.0, 1.0]))
    recipe = kolmo.solve(start, grid=41, steps=8, stepper=stepper).discretization
    calls.clear()
    kolmo.solve(start, discretization=recipe, backend=backend)
    assert calls.count(41 * 41) == 1


PEAK = """
import re, numpy as np, kolmo
dim, n = {dim}, {n}
sde = kolmo.SDE(lambda t, x: -x, covariance=0.1 * np.eye(dim), dim=dim)
box = kolmo.Box([-1.0] * dim, [1.0] * dim)
problem = kolmo.KolmogorovProblem(sde, lambda x: np.exp(-(x**2).sum(-1)), 1e-4, box)
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1])
kolmo.solve(problem, grid=12, steps=10, stepper="rk4")
before = peak()
kolmo.solve(problem, grid=n, steps=10, stepper="rk4")
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize(("dim", "n"), [(2, 600), (3, 100)])
def test_a_node_takes_no_more_than_200_bytes_beyond_its_coefficients(dim, n):
    command = [sys.executable, "-c", PEAK.format(dim=dim, n=n)]
    used = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert used / n**dim - 8 * (2 * dim + dim * dim + 2) <= 200
