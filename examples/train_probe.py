"""Train a module inside a hook: a probe that predicts the label from one layer's activations, the model frozen.

    python examples/train_probe.py
    torchrun --nproc-per-node 2 examples/train_probe.py
"""

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import binary_cross_entropy_with_logits

from flex_model import FlexModel, HookFunction


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))
    probe = nn.Linear(16, 1)
    batch = torch.randn(64, 8)
    labels = (batch[:, :1] * batch[:, 1:2] > 0).float()

    world, rank = int(os.environ.get("WORLD_SIZE", 1)), 0
    if world > 1:
        dist.init_process_group("gloo")
        rank = dist.get_rank()
        fully_shard(model)
    mine = batch.chunk(world)[rank]

    def read(module: nn.Module, x: Tensor, save_ctx: Any, modules: nn.ModuleDict) -> None:
        # x is the whole batch, so the loss is that of the whole batch on every rank
        save_ctx.loss = binary_cross_entropy_with_logits(modules["probe"](x.detach()), labels)

    fm = FlexModel(model)
    fm.requires_grad_(False)
    fm.register_trainable_module("probe", probe)
    fm.register_forward_hook(HookFunction("1", editing_function=read, capture=False))
    optimizer = torch.optim.AdamW(fm.trainable_modules.parameters(), lr=0.05)
    for step in range(6):
        fm(mine)
        loss = fm.save_ctx.loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if rank == 0:
            print(f"step {step}: loss {loss.item():.5f}")
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
