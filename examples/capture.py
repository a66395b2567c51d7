"""Read whole activations and gradients, and edit one, on any number of processes; the numbers are the same.

    python examples/capture.py
    torchrun --nproc-per-node 2 examples/capture.py --engine tp
    torchrun --nproc-per-node 2 examples/capture.py --engine fsdp2
"""

import argparse
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from flex_model import FlexModel, edits


def spread(model: nn.Module, engine: str, world: int) -> int:
    """Put the engine on the model; the number of parts that the batch has under it."""
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=(engine,))
    if engine == "fsdp2":
        fully_shard(model, mesh=mesh)
        return world
    parallelize_module(model, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engine", choices=["tp", "fsdp2"], default="tp")
    engine = parser.parse_args().engine
    torch.manual_seed(0)
    layers = {"up": nn.Linear(8, 16), "act": nn.GELU(), "down": nn.Linear(16, 8)}
    model, batch = nn.Sequential(), torch.randn(4, 8)
    for name, layer in layers.items():
        model.add_module(name, layer)

    world, rank, parts = int(os.environ.get("WORLD_SIZE", 1)), 0, 1
    if world > 1:
        dist.init_process_group("gloo")
        rank, parts = dist.get_rank(), spread(model, engine, world)
    mine = batch.chunk(parts)[rank % parts]

    fm = FlexModel(model)
    with fm.capture("*", grad=True) as acts:  # the whole tensors, on every rank
        fm(mine).pow(2).mean().backward()
    with fm.edit("act", edits.zero([3, 11])), fm.capture("down") as edited, torch.no_grad():
        fm(mine)
    if rank == 0:
        for name in acts:
            value, grad = acts[name], acts.grad(name)
            print(f"{name:5} {tuple(value.shape)!s:8} norm {value.norm():.5f}  gradient's norm {grad.norm():.5f}")
        print(f"down without units 3 and 11 of act: norm {edited['down'].norm():.5f}")
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
