"""Worlds that stay: forked ranks that take cases over pipes, so that an example costs what it computes and no more.

A case that hangs, or that kills a rank, ends its world; the next one gets a fresh world.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import wait
from typing import Any

import torch
import torch.distributed as dist


def _rank(rank: int, size: int, store: str, fn: Callable[[Any], Any], pipe: Any) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(size))
    try:
        if size > 1:
            files = dist.FileStore(store, size)
            dist.init_process_group("gloo", store=files, rank=rank, world_size=size, timeout=timedelta(seconds=600))
        while True:
            case = pipe.recv()
            try:
                answer = (True, fn(case))
            except BaseException:
                answer = (False, traceback.format_exc())
            pipe.send(answer)
    except (EOFError, KeyboardInterrupt):
        pass
    finally:
        os._exit(0)


class World:
    """``ask(case)`` runs ``fn(case)`` on every rank and gives the ranks' answers; one alone has no process group."""

    def __init__(self, size: int, fn: Callable[[Any], Any], patience: float = 20.0) -> None:
        self.size, self.fn, self.patience = size, fn, patience
        self._pipes: list[Any] = []
        self._processes: list[Any] = []
        self.started = 0

    def _start(self) -> None:
        context = mp.get_context("fork")
        with tempfile.NamedTemporaryFile(delete=False) as file:
            self._store = file.name
        os.unlink(self._store)
        for rank in range(self.size):
            here, there = context.Pipe()
            process = context.Process(target=_rank, args=(rank, self.size, self._store, self.fn, there), daemon=True)
            process.start()
            there.close()
            self._pipes.append(here)
            self._processes.append(process)
        self.started += 1

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join(5)
        for pipe in self._pipes:
            pipe.close()
        if self._processes and os.path.exists(self._store):
            os.unlink(self._store)
        self._pipes, self._processes = [], []

    def ask(self, case: Any) -> list[Any]:
        """The ranks' answers; raises AssertionError, and ends the world, where a rank raises, dies or hangs."""
        fresh = not self._processes
        if fresh:
            self._start()
        for pipe in self._pipes:
            pipe.send(case)
        deadline = time.monotonic() + self.patience + (20 if fresh else 0)
        answers: dict[int, tuple[bool, Any]] = {}
        while len(answers) < self.size and time.monotonic() < deadline:
            waiting = [self._pipes[r] for r in range(self.size) if r not in answers]
            for pipe in wait(waiting, max(0.0, deadline - time.monotonic())):
                rank = self._pipes.index(pipe)
                try:
                    answers[rank] = self._pipes[rank].recv()
                except EOFError:
                    answers[rank] = (False, "the process died")
                if not answers[rank][0]:
                    deadline = min(deadline, time.monotonic() + 2)  # the others may be stuck without it
        failed = {r: a for r, (ok, a) in answers.items() if not ok}
        hanging = sorted(set(range(self.size)) - set(answers))
        if failed or hanging:
            self.close()
            told = [f"--- rank {r}\n{a}" for r, a in sorted(failed.items())]
            told += [f"ranks {hanging} hung; the others answered {[a for _, a in answers.values()]}"] if hanging else []
            raise AssertionError("\n".join(told))
        return [answers[r][1] for r in range(self.size)]
