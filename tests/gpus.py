"""Worlds on GPUs, over NCCL. Where there are fewer GPUs than ranks, ranks share them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from typing import Any

import engines
import pytest
import torch
import torch.distributed as dist
from faults import End, run_faulty
from worlds import run_world

# Asked of the driver: CUDA, once it was used in this process, is not there in forked ones.
needs_gpu = pytest.mark.skipif(torch.cuda.device_count() < 1, reason="no CUDA device")


def run_gpus(size: int, fn: Callable[..., Any], *args: Any, timeout: float = 150) -> list[Any]:
    return run_world(size, on_gpu, fn, *args, timeout=timeout)


def run_faulty_gpus(size: int, fn: Callable[..., Any], *args: Any, timeout: float = 60) -> list[End]:
    return run_faulty(size, on_gpu, fn, *args, timeout=timeout)


def on_gpu(fn: Callable[..., Any], *args: Any) -> Any:
    rank, size = dist.get_rank(), dist.get_world_size()
    store = [tempfile.mktemp(prefix="flex_model_gpus_")]
    dist.broadcast_object_list(store)
    dist.destroy_process_group()
    if size > torch.cuda.device_count():
        # NCCL refuses two ranks of one host on a GPU, and takes these for ranks of several hosts.
        os.environ.update(NCCL_HOSTID=f"rank {rank}", NCCL_SOCKET_IFNAME="lo", NCCL_IB_DISABLE="1")
    torch.cuda.set_device(rank % torch.cuda.device_count())
    engines.device = "cuda"
    dist.init_process_group("nccl", store=dist.FileStore(store[0], size), rank=rank, world_size=size)
    return fn(*args)
