"""Worlds of several ranks on one machine: forked processes over gloo, up in well under a second."""

from __future__ import annotations

import faulthandler
import multiprocessing as mp
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch._dynamo  # DDP and optimizers load it: a second, here once instead of once a rank
import torch.distributed as dist

import flex_model  # noqa: F401  # loaded before the fork for the same reason

torch.set_num_threads(1)


def _share_device() -> None:
    """All groups of this process on one gloo device. Each device has a thread that wakes a hundred times a second,
    and a world that runs many cases makes hundreds of groups."""
    gloo = dist.ProcessGroupGloo
    init, device = gloo.__init__, gloo.create_device(hostname="127.0.0.1")

    def on_device(self: Any, store: Any, rank: int, size: int, timeout: timedelta) -> None:
        options = gloo._Options()
        options._devices, options._timeout = [device], timeout
        init(self, store, rank, size, options)

    gloo.__init__ = on_device


def _child(rank: int, size: int, store: str, fn: Callable[..., Any], args: tuple[Any, ...], pipe: Any) -> None:
    faulthandler.register(signal.SIGUSR1)
    try:
        torch.set_num_threads(1)  # before any thread of this process could start a pool
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(size))
        os.environ["OMP_NUM_THREADS"] = "1"  # what accelerate sets: a pool of the parent's is dead here
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "29400")
        _share_device()
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(store, size),
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=90),
        )
        torch.manual_seed(0)
        result = fn(*args)
        if dist.is_initialized():
            dist.barrier()
        pipe.send((True, result))
    except BaseException:
        pipe.send((False, traceback.format_exc()))
    finally:
        pipe.close()
        os._exit(0)


def run_world(size: int, fn: Callable[..., Any], *args: Any, timeout: float = 150) -> list[Any]:
    """``fn(*args)`` on every rank of a fresh world; the ranks' results in order. Any rank's failure fails all."""
    context = mp.get_context("fork")
    with tempfile.NamedTemporaryFile(delete=False) as file:
        store = file.name
    os.unlink(store)
    pipes, processes = [], []
    for rank in range(size):
        here, there = context.Pipe()
        process = context.Process(target=_child, args=(rank, size, store, fn, args, there), daemon=True)
        process.start()
        there.close()
        pipes.append(here)
        processes.append(process)
    results: list[Any] = [None] * size
    failures = {}
    deadline = time.time() + timeout
    waiting = set(range(size))
    while waiting and time.time() < deadline:
        for rank in sorted(waiting):
            if pipes[rank].poll(0.02):
                waiting.discard(rank)
                try:
                    ok, value = pipes[rank].recv()
                except EOFError:
                    ok, value = False, "the process died"
                if ok:
                    results[rank] = value
                else:
                    failures[rank] = value
                    deadline = min(deadline, time.time() + 10)  # the others may be stuck without it
    for process in processes:
        if process.is_alive() and waiting:
            os.kill(process.pid or 0, signal.SIGUSR1)  # where it is, on its stderr
            time.sleep(0.5)
            process.kill()
        process.join(5)
    if os.path.exists(store):
        os.unlink(store)
    if failures:
        raise AssertionError("\n".join(f"--- rank {r}\n{t}" for r, t in sorted(failures.items())))
    if waiting:
        raise AssertionError(f"ranks {sorted(waiting)} did not finish within {timeout} s")
    return results
