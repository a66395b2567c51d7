"""``start``: a command's processes on this machine, as torchrun starts them, but meeting in a file.

torchrun's store listens on a port of every address of the machine, and its launcher unpickles what it finds there. Here
nothing listens but the processes' own connections to one another, on the loopback address.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, start_processes
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

__all__ = ["start"]

_INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")  # over which processes of one job connect


def start(entry: Callable[[Any], Any], job: Any, count: int) -> dict[int, Any]:
    """``entry(job)`` in ``count`` processes that form a world; what they return, by rank. Both must be picklable.

    Raises ChildFailedError if one of them fails, after the others were stopped.
    """
    with TemporaryDirectory(prefix="flex-model-") as folder:  # nobody else can read it
        logs = Path(folder) / "logs"
        logs.mkdir()
        ranks = range(count)
        context = start_processes(
            "flex-model",
            _enter,
            {rank: (entry, job, str(Path(folder) / "store")) for rank in ranks},
            {rank: _environment(rank, count) for rank in ranks},
            DefaultLogsSpecs(log_dir=str(logs)),
        )
        try:
            result = context.wait()
        finally:
            context.close()
    assert result is not None  # it waits for ever
    if result.failures:
        raise ChildFailedError("flex-model", result.failures)
    return result.return_values


def _environment(rank: int, count: int) -> dict[str, str]:
    loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), "lo")
    interfaces = {name: os.environ.get(name, loopback) for name in _INTERFACES}
    sizes = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    return interfaces | {name: str(value) for name, value in sizes.items()}


def _enter(entry: Callable[[Any], Any], job: Any, store: str) -> Any:
    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cuda", rank) if torch.cuda.is_available() else None
    if device is not None:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "gloo" if device is None else "nccl",
        store=dist.FileStore(store, count),  # type: ignore[attr-defined]
        rank=rank,
        world_size=count,
        device_id=device,
        timeout=timedelta(hours=2),  # loading may take a while
    )
    try:
        return entry(job)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
