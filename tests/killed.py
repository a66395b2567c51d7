"""A harvest on several ranks that is killed at random moments, and gone on with until it is done."""

from __future__ import annotations

import multiprocessing as mp
import os
import random
import shutil
import signal
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import engines
import models
import numpy as np
import torch
from torch import Tensor
from worlds import run_world

from flex_model import FlexModel
from flex_model.store import ActivationStore

RANKS = 2


@dataclass
class Killed:
    """``after``: the last committed step at each kill, or -1; ``stores``: how many were done, and equal."""

    steps: int
    after: list[int] = field(default_factory=list)
    stores: int = 0
    rows: int = 0


def data(steps: int) -> list[dict[str, Tensor]]:
    """Batches of a few lengths, whose samples do not always divide over the ranks."""
    draw = torch.Generator().manual_seed(5)
    return [{"ids": torch.randint(0, 32, (3 + n % 3, 5 + n % 4), generator=draw)} for n in range(steps)]


def _rank(engine: str, steps: int, path: Path) -> float:
    fm, start = FlexModel(engines.place(engine, models.net()).model), time.perf_counter()
    names = [n for n in fm.wrapped_module_names if n not in ("", "layers")]
    fm.harvest(data(steps), names, path, exclude_tokens=(5, 6), commit_every=3)
    return time.perf_counter() - start


def _world(engine: str, steps: int, path: Path, folder: Path) -> None:
    """All ranks, in a process group of their own."""
    os.setsid()
    tempfile.tempdir = str(folder)
    run_world(RANKS, _rank, engine, steps, path)


def _attempt(engine: str, steps: int, path: Path, folder: Path, seconds: float) -> bool:
    """Whether it was done before it was killed."""
    process = mp.get_context("fork").Process(target=_world, args=(engine, steps, path, folder))
    process.start()
    pid = process.pid or 0
    process.join(seconds)
    if process.is_alive():
        while process.is_alive() and os.getpgid(pid) != pid:  # it has hardly begun
            time.sleep(0.001)
        os.killpg(pid, signal.SIGKILL)
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL), process.exitcode
    return process.exitcode == 0


def equal(want: ActivationStore, found: ActivationStore, rows: int | None = None) -> None:
    """All sites and columns, row by row, or the first ``rows`` of them."""
    names = [*want.sites, *want.columns]
    assert names == [*found.sites, *found.columns] and len(found) == (len(want) if rows is None else rows)
    for name in names:
        assert np.array_equal(found[name][:], want[name][: len(found)]), name
    found.verify()


def harvest_killed(engine: str, folder: Path, *, kills: int, steps: int, seed: int) -> Killed:
    """Raises AssertionError if a store is not readable after a kill, or in the end has not the rows of an undisturbed
    one. A harvest that is done before all kills were made is begun anew."""
    alone, path, draw = folder / "alone", folder / "acts", random.Random(seed)
    start = time.perf_counter()
    assert _attempt(engine, steps, alone, folder, 300)
    whole, want = time.perf_counter() - start, ActivationStore(alone)
    result, done = Killed(steps, rows=len(want)), False
    while len(result.after) < kills or not done:
        if done:
            shutil.rmtree(path)
        left = kills - len(result.after)
        done = _attempt(engine, steps, path, folder, draw.uniform(0.1, 0.9) * whole if left else 300)
        if done:
            equal(want, ActivationStore(path))
            result.stores += 1
        else:
            result.after.append(_reached(path, want))
    return result


def _reached(path: Path, want: ActivationStore) -> int:
    """The last committed step of a killed run, all of whose rows are there."""
    if not (path / "manifest.json").exists():
        return -1
    found = ActivationStore(path)
    equal(want, found, len(found))
    return found.last_step
