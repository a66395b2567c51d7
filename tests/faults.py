"""Worlds in which ranks fail, die or sleep: each rank reports its own end, and nobody is killed for another's."""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist


@dataclass
class End:
    """How a rank ended: what it returned or raised, and after how many seconds."""

    kind: str  # "returned" | an exception's class | "died" | "hung"
    message: str = ""
    seconds: float = 0.0
    value: Any = None


def end_of(fn: Callable[..., Any], *args: Any) -> End:
    start = time.monotonic()
    try:
        end = End("returned", value=fn(*args))
    except BaseException as error:
        end = End(type(error).__name__, str(error) + "".join(__import__("traceback").format_exception(error))[-3000:])
    end.seconds = time.monotonic() - start
    return end


def _child(rank: int, size: int, store: str, fn: Callable[..., Any], args: tuple[Any, ...], pipe: Any) -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what a command has put there is forked along
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(size))
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, size), rank=rank, world_size=size, timeout=timedelta(seconds=60)
    )
    torch.manual_seed(0)
    end = end_of(fn, *args)
    pipe.send(end)
    pipe.close()
    time.sleep(0.3)
    os._exit(0)


def run_faulty(size: int, fn: Callable[..., Any], *args: Any, timeout: float = 60) -> list[End]:
    """``fn(*args)`` on every rank; how each ended."""
    context = mp.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(size):
            here, there = context.Pipe()
            process = context.Process(target=_child, args=(rank, size, f"{folder}/store", fn, args, there), daemon=True)
            process.start()
            there.close()
            pipes.append(here)
            processes.append(process)
        deadline = time.monotonic() + timeout
        ends = []
        for pipe in pipes:
            try:
                ends.append(pipe.recv() if pipe.poll(max(0.1, deadline - time.monotonic())) else End("hung"))
            except EOFError:
                ends.append(End("died"))
        for process in processes:
            process.join(1)
            process.kill()
            process.join(5)
    return ends
