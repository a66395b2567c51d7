"""Read whole activations and gradients, and edit one, on any number of processes; the numbers are the same.

Run: python examples/capture.py
Run: torchrun --nproc-per-node 2 examples/capture.py            (tensor parallel)
Run: torchrun --nproc-per-node 2 examples/capture.py --fsdp2
"""

import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from flex_model import FlexModel, edits


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
    batch = torch.randn(4, 8)

    world, rank, parts = int(os.environ.get("WORLD_SIZE", 1)), 0, 1
    if world > 1:
        dist.init_process_group("gloo")
        rank, mesh = dist.get_rank(), dist.init_device_mesh("cpu", (world,))
        if "--fsdp2" in sys.argv:
            parts = world
            fully_shard(model, mesh=mesh)
        else:
            parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    mine = batch.chunk(parts)[rank % parts]

    fm = FlexModel(model)
    with fm.capture("*", grad=True) as acts:  # the whole tensors, on every rank
        fm(mine).pow(2).mean().backward()
    with fm.edit("1", edits.zero([3, 11])), fm.capture("2") as edited, torch.no_grad():
        fm(mine)
    if rank == 0:
        for name, value in acts.items():
            print(f"{name} {tuple(value.shape)} norm {value.norm():.5f}, gradient {acts.grad(name).norm():.5f}")
        print(f"2 without units 3 and 11 of 1: norm {edited['2'].norm():.5f}")
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
