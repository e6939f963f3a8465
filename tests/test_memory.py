"""Memory and disk: refused with numbers before anything is built; nothing half-written is left."""

import os
import subprocess
import sys
from pathlib import Path

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
        InputError, match=r"grid: got .* nodes, which take at least [\d.]+ GB; needed at most the [\d.]+"
    ):
        kolmo.solve(problem(dim), grid=grid, steps=4)


def test_the_limit_is_what_is_free(monkeypatch):
    monkeypatch.setattr(memory, "available", lambda: memory.predicted((21, 21)) - 1)
    with pytest.raises(InputError, match="21 × 21 nodes"):
        kolmo.solve(problem(2), grid=21, steps=4)
    monkeypatch.setattr(memory, "available", lambda: memory.predicted((21, 21)))
    kolmo.solve(problem(2), grid=21, steps=4)
    monkeypatch.setattr(memory, "available", lambda: None)
    kolmo.solve(problem(2), grid=21, steps=4)


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
        with replacing(path) as temporary:
            temporary.write_bytes(b"ne")
            raise OSError(28, "No space left on device")

    with pytest.raises(FileError, match=r"cannot write .*value\.npz: No space left on device"):
        fill()
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["value.npz"]


def test_a_long_axis_takes_memory_in_proportion():
    # three dense matrices of difference weights would take 60 GB
    fine, coarse = (kolmo.solve(problem(1), grid=n, steps=8, stepper="radau5")(0.5) for n in (50_001, 201))
    assert abs(float(fine) - float(coarse)) < 1e-5
