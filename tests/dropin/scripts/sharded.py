"""Ways to shard a drop-in by FSDP, in one process; prints how each ended as JSON."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

import dni_fx

WAYS = ("layers", "one layer", "whole", "layers and whole", "FSDP", "FSDP, own parameters", "inner")
X, Y = torch.randn(12, 8, generator=torch.Generator().manual_seed(1)), torch.arange(12) % 5
CPU = torch.device("cpu")


def make_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 5)
    )


def shard(m: Any, way: str, mesh: Any) -> Any:
    """The module to train."""
    if "layers" in way or way == "one layer":
        for layer in (m[2],) if way == "one layer" else (m[0], m[2], m[4]):
            fully_shard(layer, mesh=mesh)
    if "whole" in way:
        return fully_shard(m, mesh=mesh)
    if way.startswith("FSDP"):
        return FullyShardedDataParallel(m, device_id=CPU, use_orig_params="own" in way)
    if way == "inner":
        m[2] = FullyShardedDataParallel(m[2], device_id=CPU, use_orig_params=True)
    return m


def train(gradients: str, way: str, mesh: Any) -> Any:
    """How far each layer has moved, or the error."""
    net = make_net()
    m = dni_fx.decouple(net, ["1", "3"], example_inputs=(X,), gradients=gradients).as_module()
    module = shard(m, way, mesh)
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    try:
        for _ in range(3):
            loss = F.cross_entropy(module(X), Y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    except dni_fx.DecouplingError as error:
        return str(error)
    moved = []
    for old, new in zip(make_net().parameters(), module.parameters(), strict=False):
        weight = new.full_tensor() if hasattr(new, "full_tensor") else new
        moved.append(0.0 if weight.shape != old.shape else float((weight - old).norm()))
    return moved


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = dist.FileStore(str(Path(folder) / "store"), 1)
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        mesh = init_device_mesh("cpu", (1,))
        kinds = ("linear", "exact")
        found = {f"{g}: {way}": train(g, way, mesh) for g in kinds for way in ("none", *WAYS)}
        try:
            fully_shard((part := make_net())[2], mesh=mesh)
            dni_fx.decouple(part, ["1"], example_inputs=(X,))
        except dni_fx.DecouplingError as error:
            found["decouple"] = str(error)
        print(json.dumps(found))
        dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "0")
    main()
