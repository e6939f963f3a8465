"""Data-parallel training: processes with one seed draw different noise, and their gradients are averaged."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = r"""
import json, sys
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from kolmo import bridge

rank, folder, wrapping = int(sys.argv[1]), sys.argv[2], sys.argv[3]
distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        return x + self.second(torch.tanh(self.first(x)))


torch.manual_seed(0)
model, x = nn.Sequential(Block(), Block(), Block()), torch.randn(64, 6)
per = "batch" if wrapping == "batch" else "sample"
noise = bridge.inject(model, bridge.StochasticDepth(0.5, per=per), inputs=(x,))
wrapped = DistributedDataParallel(model)
kept = []
model[0].second.register_forward_hook(lambda m, a, out: kept.append(out.detach().abs().sum(1).gt(0).tolist()))
optimiser = torch.optim.SGD(wrapped.parameters(), lr=0.1)
torch.manual_seed(1)
for _ in range(12):
    optimiser.zero_grad()
    wrapped.train()(x).square().mean().backward()
    optimiser.step()
weights = torch.cat([p.detach().flatten() for p in model.parameters()])
quiet = wrapped.eval()(x)
found = {"kept": kept, "weights": weights.tolist(), "quiet": float(quiet.detach().sum())}
print(json.dumps({**found, "finite": bool(weights.isfinite().all())}))
distributed.destroy_process_group()
"""


def trained(folder: Path, wrapping: str) -> list[dict]:
    script = folder / "train.py"
    script.write_text(SCRIPT, encoding="utf-8")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, str(script)]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(folder), wrapping], env=environment, stdout=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert all(process.returncode == 0 for process in processes)
    return [json.loads(output.strip().splitlines()[-1]) for output in outputs]


@pytest.mark.slow
@pytest.mark.parametrize("wrapping", ["sample", "batch"])
def test_two_processes_with_one_seed(tmp_path, wrapping):
    one, other = trained(tmp_path, wrapping)
    assert one["kept"] != other["kept"]
    assert one["weights"] == other["weights"]  # gradients are averaged, also where a process drops the whole branch
    assert one["finite"]
    assert one["quiet"] == other["quiet"]
    if wrapping == "sample":
        share = sum(map(sum, one["kept"][:-1])) / (12 * 64)  # the last pass is in evaluation mode
        assert abs(share - 0.5) < 4 * (0.25 / (12 * 64)) ** 0.5
