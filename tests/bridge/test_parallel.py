"""Training in several processes: with one seed they draw different noise, and their gradients are averaged."""

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
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from kolmo import bridge
from kolmo.errors import InputError

rank, folder, wrapping = int(sys.argv[1]), *sys.argv[2:]
distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        return x + self.second(torch.tanh(self.first(x)))


def wrap(model):
    if wrapping == "DDP":
        return DistributedDataParallel(model)
    if wrapping == "FSDP":
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)
    mesh = init_device_mesh("cpu", (2,))
    for block in model:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh) or model  # which returns nothing before torch 2.7


def train(law):
    torch.manual_seed(0)
    model, x = nn.Sequential(Block(), Block(), Block()), torch.randn(64, 6)
    mean = model(x).detach()
    noise = bridge.inject(model, law, inputs=(x,))
    keys = sorted(model.state_dict())
    wrapped = wrap(model)
    silent = bool(torch.allclose(wrapped.eval()(x), mean))
    kept = []
    seen = lambda m, a, out: kept.append(out.detach().abs().sum(1).gt(0).tolist())
    handle = model[0].second.register_forward_hook(seen)
    optimiser = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    torch.manual_seed(1)
    for _ in range(12):
        optimiser.zero_grad()
        wrapped.train()(x).square().mean().backward()
        optimiser.step()
    handle.remove()
    state = wrapped.state_dict()
    whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in state.values()]
    weights = torch.cat([p.detach().flatten() for p in whole])
    return {
        "kept": kept,
        "weights": weights.tolist(),
        "finite": bool(weights.isfinite().all()),
        "quiet": float(wrapped.eval()(x).detach().sum()),
        "silent": silent,
        "same_keys": sorted(key.removeprefix("module.") for key in state) == keys,
    }


def refused():
    model, x = wrap(nn.Sequential(Block(), Block())), torch.randn(4, 6)
    try:
        bridge.inject(model, bridge.Multiplicative(nn.Parameter(torch.tensor([0.3]))), inputs=(x,))
    except InputError as error:
        return str(error)


found = {
    "sample": train(bridge.StochasticDepth(0.5)),
    "batch": train(bridge.StochasticDepth(0.5, per="batch")),
    "learnt": train([bridge.Multiplicative(nn.Parameter(torch.tensor([0.3]))) for _ in range(3)]),
    "weights": train(bridge.WeightNoise(0.1)),
}
print(json.dumps({"laws": found, "refused": refused()}))
distributed.destroy_process_group()
"""


def trained(folder: Path, wrapping: str) -> tuple[dict, dict]:
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
    one, other = (json.loads(output.strip().splitlines()[-1]) for output in outputs)
    return one, other


@pytest.mark.slow
@pytest.mark.parametrize("wrapping", ["DDP", "fully_shard", "FSDP"])
def test_two_processes_with_one_seed(tmp_path, wrapping):
    first, second = trained(tmp_path, wrapping)
    assert "inject first, then wrap" in first["refused"]
    for law, one in first["laws"].items():
        other = second["laws"][law]
        if law in ("sample", "batch"):
            assert one["kept"] != other["kept"]
        assert one["weights"] == other["weights"]  # gradients are averaged, also where a process drops the whole branch
        assert one["finite"]
        assert one["quiet"] == other["quiet"]
        assert one["silent"]
        assert one["same_keys"]
    share = sum(map(sum, first["laws"]["sample"]["kept"])) / (12 * 64)
    assert abs(share - 0.5) < 4 * (0.25 / (12 * 64)) ** 0.5
