"""Image files and the networks trained on them: checksums, formats, and training that resumes to the same bytes."""

import contextlib
import functools
import gzip
import hashlib
import importlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from kolmo import images
from kolmo.errors import InputError
from kolmo.files import FileError

nets = importlib.import_module("kolmo.experiments._resnets")
experiment = importlib.import_module("kolmo.experiments.images")
steadily = importlib.import_module("kolmo.experiments._crew").steadily

no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, no_gpu])]


def idx(array):
    return gzip.compress(struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes())


@pytest.fixture
def folder(tmp_path, monkeypatch, rng):
    """Files in the official format, small, with the sums that are then expected of them."""
    arrays = {
        "train-images-idx3-ubyte.gz": rng.integers(0, 256, (64, 28, 28), dtype=np.uint8),
        "train-labels-idx1-ubyte.gz": rng.integers(0, 10, 64, dtype=np.uint8),
        "t10k-images-idx3-ubyte.gz": rng.integers(0, 256, (32, 28, 28), dtype=np.uint8),
        "t10k-labels-idx1-ubyte.gz": rng.integers(0, 10, 32, dtype=np.uint8),
    }
    sums = {}
    for name, array in arrays.items():
        (tmp_path / name).write_bytes(idx(array))
        sums[name] = hashlib.md5((tmp_path / name).read_bytes()).hexdigest()
    monkeypatch.setitem(images._MD5, "fashion-mnist", sums)
    return tmp_path, arrays


def test_idx_files_are_read_and_checked(folder):
    path, arrays = folder
    found = images.load("fashion-mnist", path)
    np.testing.assert_array_equal(found.train_x[:, 0], arrays["train-images-idx3-ubyte.gz"])
    np.testing.assert_array_equal(found.test_y, arrays["t10k-labels-idx1-ubyte.gz"])
    file = path / "t10k-labels-idx1-ubyte.gz"
    file.write_bytes(idx(np.zeros(32, np.uint8)))
    with pytest.raises(FileError, match="t10k-labels"):
        images.load("fashion-mnist", path)
    file.unlink()
    with pytest.raises(InputError, match="t10k-labels"):
        images.load("fashion-mnist", path)
    with pytest.raises(InputError, match="cifar-10-binary"):
        images.load("cifar10", path)


def test_cifar_rows():
    rows = np.zeros((2, 3073), np.uint8)
    rows[1, 0], rows[1, 1 + 1024 + 32] = 7, 200  # label; green, second row, first column
    x, y = images.read_cifar(rows.tobytes())
    assert y.tolist() == [0, 7]
    assert x[1, 1, 1, 0] == 200
    assert x.sum() == 200
    with pytest.raises(FileError, match="3073"):
        images.read_cifar(rows.tobytes()[:-1])


@pytest.mark.parametrize(
    ("law", "mixed"), [("gaussian-0.3", False), ("shake-shake", False), ("stochastic-depth-0.8", True)]
)
@pytest.mark.parametrize("device", DEVICES)
def test_interrupted_training_resumes_to_the_same_bytes(tmp_path, law, mixed, device):
    x, y = torch.randn(48, 1, 12, 12), torch.randint(0, 10, (48,))
    config = experiment.Config(width=4, blocks=1)
    recipe = nets.Recipe(epochs=3, batch=16, augment=True, mixed=mixed, device=device)

    def train(path, after_epoch=None):
        torch.manual_seed(5)
        model = experiment.built(config, law, 1)
        torch.manual_seed(np.random.default_rng().integers(1000))  # what happened before must not matter
        return steadily(functools.partial(nets.train, checkpoint=path, after_epoch=after_epoch), model, x, y, recipe, 1)

    def stop(epoch):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "broken.npz", stop)
    train(tmp_path / "broken.npz")
    history = train(tmp_path / "whole.npz")
    assert np.isfinite(history).all()
    assert (tmp_path / "broken.npz").read_bytes() == (tmp_path / "whole.npz").read_bytes()


def test_laws_start_from_equal_weights_and_equal_budgets():
    sizes, first = {}, None
    for law in experiment.Config().laws:
        torch.manual_seed(0)
        model = experiment.built(experiment.Config(), law, 2)
        sizes[law] = sum(p.numel() for p in model.parameters())
        assert model.train()(torch.randn(2, 1, 28, 28)).shape == (2, 10)
        weights = list(model.parameters())
        first = first or weights
        if law != "shake-shake":  # its branches are halves of those of the others
            assert all(torch.equal(one, other) for one, other in zip(weights, first, strict=True))
    assert max(sizes.values()) < 100_000
    assert max(sizes.values()) < 1.02 * min(sizes.values())


def test_effects_against_depth_are_paired_with_no_noise_of_the_same_depth_and_seed():
    config = experiment.Config(laws=("none", "bernoulli-0.5"), depths=(4, 8), seeds=3)
    offset = {"none": 0.0, "bernoulli-0.5": 0.01}

    def one(law, blocks, seed):
        error = 0.1 * blocks + 0.03 * seed + offset[law]  # what depth and seed add is common to a pair
        summary = {"trace": {"value": 1000 * error}}
        return {
            "test": {"error": error, "loss": 1.0, "calibration_error": 0.0},
            "train": {"error": 0.0},
            "summary": summary,
            "noise_effect": 1 / blocks,
            "seconds": 1.0,
            "parameters": 1,
        }

    sweep = experiment._results(config, {job: one(*job) for job in experiment.jobs(config)})["depth"]
    effects = experiment._effects(sweep)
    assert all(list(rows) == ["bernoulli-0.5"] for rows in effects.values())
    noise, errors, traces = (np.array(rows["bernoulli-0.5"]) for rows in effects.values())
    np.testing.assert_allclose(noise, np.tile([[1 / 2], [1 / 4], [1 / 8]], 3))
    np.testing.assert_allclose(errors, 1.0)
    np.testing.assert_allclose(traces, 10.0)
    drawn = [ax.get_ylabel() for ax in experiment._deepening(sweep).axes]
    assert drawn == ["loss with the noise on − mean network", "trace of the Hessian − none"]


def test_numbers_that_only_some_surfaces_tell_are_left_out():
    config = experiment.Config(laws=("none",), seeds=2)

    def one(*names):
        return {
            "test": dict.fromkeys(("error", "loss", "calibration_error"), 0.1),
            "train": {"error": 0.0},
            "summary": {name: {"value": 1.0} for name in ("trace", *names)},
            "noise_effect": 0.0,
            "seconds": 1.0,
            "parameters": 1,
        }

    found = {job: one(*names) for job, names in zip(experiment.jobs(config), [("excess variation",), ()], strict=True)}
    laws = experiment._results(config, found)["laws"]
    assert laws["none"]["trace"] == [1.0, 1.0]
    assert "excess variation" not in laws["none"]


@pytest.mark.parametrize("device", DEVICES)
def test_the_experiment_runs_small(folder, device):
    from kolmo.cli import main

    path, _ = folder
    options = {
        "data": str(path),
        "laws": "none,dropout-0.8",
        "epochs": "1",
        "batch": "16",
        "width": "4",
        "blocks": "1",
        "depths": "2",
        "measured_images": "16",
        "points": "5",
        "draws": "2",
        "device": device,
        "mixed": str(device != "cpu"),
        "workers": "1",  # files of this test, which the processes of others would not accept
    }
    sets = [word for key, value in options.items() for word in ("--set", f"{key}={value}")]
    out = path / "run"
    assert main(["experiment", "images", "--seeds", "1", *sets, "--out", str(out), "--quiet"]) == 0
    assert (out / "report.html").stat().st_size > 10_000
    drawn = {file.stem for file in (out / "figures").glob("*.png")}
    assert drawn == {"errors", "curvature", "planes", "spectra", "history", "depth"}
    assert not list((out / "checkpoints").glob("*.npz"))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"laws": "none,foo-0.3"}, "laws"),
        ({"laws": "none,gaussian"}, "laws"),
        ({"laws": "none,dropout-x"}, "laws"),
        ({"train_images": 10}, "batch"),
        ({"batch": 0}, "batch"),
        ({"measured_images": 0}, "measured_images"),
        ({"epochs": 0}, "epochs"),
        ({"train_images": 65}, "train_images"),
        ({"device": "xpu"}, "device"),
        ({"device": "nonsense"}, "device"),
    ],
)
def test_mistakes_are_named_before_anything_is_trained(folder, options, named, monkeypatch):
    path, _ = folder
    monkeypatch.setattr(experiment, "Crew", None)  # which would start the work
    config = experiment.Config(**{"data": str(path), "batch": 16, "measured_images": 16, **options})
    if isinstance(config.laws, str):
        config = experiment.dataclasses.replace(config, laws=tuple(config.laws.split(",")))
    with pytest.raises(InputError, match=named):
        experiment.run(config, None, False)


# --------------------------------------------------------------------------------------------- several processes

# The experiment as torchrun starts it, with the sums of the small files.
MODULE = """
import json, runpy, sys
from kolmo import images
images._MD5["fashion-mnist"] = json.loads(sys.argv.pop(1))
runpy.run_module("kolmo.experiments.images", run_name="__main__")
"""


def torchrun(path, run, options, processes=2):
    """Start the training of a run on several processes, which talk over the loopback."""
    script = path / "module.py"
    script.write_text(MODULE)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    launch += ["--master-addr", "127.0.0.1", "--master-port", port, str(script)]
    sums = json.dumps(images._MD5["fashion-mnist"])
    words = [f"{key}={value}" for key, value in options.items()]
    return subprocess.Popen(
        [*launch, sums, str(run), *words],
        env=os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )


def small(path, **changes):
    fixed = {"data": str(path), "seeds": 1, "batch": 16, "width": 4, "blocks": 1, "measured_images": 16}
    return {**fixed, "laws": "gaussian-0.3", **changes}


def serial(path, options, parts):
    """Checkpoints of the networks that this process trains alone."""
    config = experiment.experiments.configure(experiment.Config, {**options, "parts": parts})
    x, y, _, _ = experiment._data.__wrapped__(config.dataset, config.data)
    for job in experiment.jobs(config):
        experiment.steadily(experiment._trained, config, path / "serial", job, x, y)
    return checkpoints(path / "serial")


def checkpoints(run):
    return {file.name: file.read_bytes() for file in sorted((run / "checkpoints").glob("*.npz"))}


def test_processes_of_torchrun_train_the_network_of_one_process(folder):
    path, _ = folder
    options = small(path, epochs=2, augment=True, batch=24)
    found = torchrun(path, path / "run", options, processes=3)
    assert found.wait(600) == 0, found.stderr.read()
    assert checkpoints(path / "run") == serial(path, options, parts=3)
    assert len(checkpoints(path / "run")) == 1


@pytest.mark.slow
def test_a_killed_torchrun_goes_on_to_the_same_networks_and_results(folder):
    from kolmo.cli import main

    path, _ = folder
    options = small(path, epochs=40, laws="gaussian-0.3,shake-shake", measured_images=16, points=3, draws=2, workers=1)
    run = path / "run"
    first = torchrun(path, run, options)
    workers = []
    until(lambda: workers.extend(w for w in children(first.pid) if w not in workers) or checkpoints(run))
    os.kill(first.pid, signal.SIGKILL)  # torchrun alone: its processes end by themselves, wherever they are
    until(lambda: not any(map(alive, workers)))
    first.wait()
    assert len(workers) == 2
    done = {name: len(nets.files.read_tree(run / "checkpoints" / name)["history"]) for name in checkpoints(run)}
    assert 0 < sum(done.values()) < 2 * 40

    second = torchrun(path, run, options)
    assert second.wait(600) == 0, second.stderr.read()
    assert checkpoints(run) == serial(path, options, parts=2)

    sets = [word for key, value in {**options, "parts": 2}.items() for word in ("--set", f"{key}={value}")]
    assert main(["experiment", "images", "--resume", str(run), "--quiet"]) == 0
    assert main(["experiment", "images", *sets, "--out", str(path / "alone"), "--quiet"]) == 0
    measured = [json.loads((path / name / "results.json").read_text()) for name in ("run", "alone")]
    for result in measured:
        for law in result["laws"].values():
            del law["seconds"]
    assert measured[0] == measured[1]


@pytest.mark.slow
def test_processes_whose_torchrun_is_killed_before_they_begin_end_too(folder):
    path, _ = folder
    found = torchrun(path, path / "run", small(path, epochs=2))
    until(lambda: len(children(found.pid)) == 2)
    workers = children(found.pid)
    os.kill(found.pid, signal.SIGKILL)
    found.wait()
    until(lambda: not any(map(alive, workers)))


def until(condition):
    limit = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.01)


def children(pid):
    with contextlib.suppress(OSError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def alive(pid):
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def test_parts_that_do_not_fit_are_refused():
    x, y = torch.randn(16, 1, 12, 12), torch.randint(0, 10, (16,))
    model = experiment.built(experiment.Config(width=4, blocks=1), "none", 1)
    with pytest.raises(InputError, match="parts"):
        nets.train(model, x, y, nets.Recipe(epochs=1, batch=16, parts=3), 0)
