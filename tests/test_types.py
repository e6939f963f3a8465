"""The types that users see: a file of theirs that uses the main names is clean under mypy in strict mode."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mypy")

USER = """
from pathlib import Path

import numpy as np
import torch

import kolmo
from kolmo import bridge, control, landscape
from kolmo.equations import read
from kolmo.report import Figure, Measured, Relief, Section, Table, write_html
from kolmo.runs import Run


def drift(t: float, x: np.ndarray) -> np.ndarray:
    return -x


sde = kolmo.SDE(drift, diffusion=0.5, dim=1)
box = kolmo.Box([0.0], [1.0], boundary="reflecting")
problem = kolmo.KolmogorovProblem(sde, lambda x: x[..., 0], horizon=1.0, box=box, killing=0.1)
solution: kolmo.Solution = kolmo.solve(problem, at=[0.5], rtol=1e-3, progress=False)
slope = solution.gradient(0.5)
solution.save(Path("u.npz"))
loaded: kolmo.Solution = kolmo.load("u.npz")
check = kolmo.monte_carlo(problem, [0.5], paths=100, steps=4, rng=0)
mean: float = float(check.mean)
density = kolmo.stationary_density(problem, rtol=1e-3)
try:
    kolmo.solve(problem, rtol=-1.0)
except kolmo.InputError as error:
    argument: str = error.argument

parameter = torch.tensor(0.5, requires_grad=True)
best = control.minimize(lambda: control.value(problem, [0.5]).sum(), [parameter])
iterations: int = best.nit
game = control.ControlProblem(
    lambda t, x, a: a, 1.0, controls=control.Interval(-1.0, 1.0), terminal=lambda x: x[..., 0], horizon=1.0
)

net = bridge.NoisyResNet([bridge.MLPBranch.create(2, 8)] * 4, bridge.Additive(0.1))
classifier = bridge.FlowClassifier(torch.nn.Linear(4, 2), net, torch.nn.Linear(2, 3))
estimate = classifier.expected_loss(torch.zeros(5, 4), torch.zeros(5, dtype=torch.long), method="pde")

model = torch.nn.Linear(2, 1)
plane = landscape.random_plane(model, seed=0)
surface: landscape.Surface = landscape.surface(lambda f: f(torch.ones(3, 2)).square().mean(), model, plane, points=5)
numbers = {name: quantity.value for name, quantity in landscape.summary(surface).quantities.items()}

equation = read("file.toml", {"k": 1.0})
with Run.create("mine", {"n": 3}, seeds=[0]) as run:
    found = run.unit("one", lambda: np.ones(3))
    run.save_results({"sum": float(found.sum())})
relief = Relief(surface.axes, {"none": surface.mean}, "a bowl")
table = Table(["x"], [[Measured(1.0, 0.1)], [None]])
write_html("r.html", "T", [Section("S", ["text", relief, table, Figure("f.png", "a figure")])])
"""


@pytest.mark.slow  # mypy reads the stubs of torch and NumPy
def test_a_users_file_is_clean_in_strict_mode(tmp_path):
    (tmp_path / "user.py").write_text(USER)
    root = Path(__file__).resolve().parents[1]
    flags = ["--strict", "--config-file=", f"--cache-dir={root / '.mypy_cache' / 'user'}"]
    command = [sys.executable, "-m", "mypy", *flags, "user.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    mine = [line for line in done.stdout.splitlines() if line.startswith("user.py")]
    assert not mine, "\n".join(mine)
    assert "Success" in done.stdout or all("site-packages" in line for line in done.stdout.splitlines()[:-1]), (
        done.stdout
    )
