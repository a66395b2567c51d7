"""FlexModel 0.1.0 over gloo, on CPUs: the patch, which changes what it asks torch for and nothing of its own code."""

from __future__ import annotations

import os
import tempfile

import torch
import torch.distributed as dist

__all__ = ["FlexModel", "HookFunction"]


def _patch() -> None:
    new_group = dist.new_group

    def over_gloo(*args, **keywords):
        return new_group(*args, **{**keywords, "backend": "gloo"})

    dist.new_group = over_gloo
    torch.cuda.current_device = lambda: "cpu"
    torch.cuda.synchronize = lambda *_: None
    if not dist.is_initialized():  # it would start NCCL
        store = dist.FileStore(f"{tempfile.mkdtemp()}/store", 1)
        dist.init_process_group("gloo", store=store, rank=0, world_size=int(os.environ.get("WORLD_SIZE", 1)))


_patch()

from flex_model.core import FlexModel, HookFunction  # noqa: E402
