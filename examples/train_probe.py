"""Train a module inside a hook: it corrects one layer of a frozen model, by the gradient that comes back through it.

Run: python examples/train_probe.py
Run: torchrun --nproc-per-node 2 examples/train_probe.py            (tensor parallel)
Run: torchrun --nproc-per-node 2 examples/train_probe.py --fsdp2
"""

import os
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.functional import mse_loss

from flex_model import FlexModel, HookFunction


def correct(module: nn.Module, x: Tensor, save_ctx: Any, modules: nn.ModuleDict) -> Tensor:
    return x + modules["probe"](x)  # x is whole: all rows and all units, on every rank


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
    probe, batch, target = nn.Linear(16, 16), torch.randn(16, 8), torch.randn(16, 8)

    world, rank, parts = int(os.environ.get("WORLD_SIZE", 1)), 0, 1
    if world > 1:
        dist.init_process_group("gloo")
        rank, mesh = dist.get_rank(), dist.init_device_mesh("cpu", (world,))
        if "--fsdp2" in sys.argv:
            parts = world
            fully_shard(model, mesh=mesh)
        else:
            parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    mine, wanted = (t.chunk(parts)[rank % parts] for t in (batch, target))

    fm = FlexModel(model).requires_grad_(False)
    fm.register_trainable_module("probe", probe)
    fm.register_forward_hook(HookFunction("1", editing_function=correct, capture=False))
    optimizer = torch.optim.AdamW(fm.trainable_modules.parameters(), lr=0.01)
    for step in range(5):
        loss = mse_loss(fm(mine), wanted)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        whole = fm.full_batch(loss.detach()[None]).mean()
        if rank == 0:
            print(f"step {step}: loss {whole:.6f}")
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
