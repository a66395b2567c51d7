"""Part ``disk``: a model that costs nothing, harvested, beside one file of the same bytes in the same folder."""

from __future__ import annotations

import mmap
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cells import cell, measured, spread, table

ROWS = 1024  # a step


class Passing(nn.Module):
    """Layers that hand on what they are given."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Identity() for _ in range(layers))
        self.here = nn.Parameter(torch.empty(0))  # says on which device the model is

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Steps:
    """A few ready tensors, over and over."""

    def __init__(self, ready: list[Tensor], count: int) -> None:
        self.ready, self.count = ready, count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Tensor]:
        return (self.ready[number % len(self.ready)] for number in range(self.count))


def rounds(
    *, folder: str, gib: float, sites: int, width: int, dtype: str, device: str, turns: int, threads: int
) -> Any:
    """``[{way: {"wall": s, "cpu": s}}, ...]`` and the bytes of each."""
    from flex_model import FlexModel

    torch.set_num_threads(threads)
    there = [torch.randn(ROWS, width).to(getattr(torch, dtype)) for _ in range(4)]
    steps = max(4, round(gib * 2**30 / (sites * there[0].nbytes)))
    host, data = Steps(there, steps), Steps([t.to(device) for t in there], steps)
    fm, path = FlexModel(Passing(sites).to(device)), Path(folder) / "acts"
    _check(fm, Steps(data.ready, 6), path, there)
    found = []
    for turn in range(turns + 1):  # the first one warms up
        one: dict[str, Any] = {}
        for way in (_plain, _harvest) if turn % 2 else (_harvest, _plain):
            os.sync()
            _warm(3 * steps * sites * there[0].nbytes)
            with measured() as one[way.__name__.strip("_")]:
                way(fm, host if way is _plain else data, path, sites)
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        found.append(one)
    return {"rounds": found[1:], "bytes": steps * sites * there[0].nbytes}


def _warm(size: int) -> None:
    """A virtual machine gives memory back to its host soon after it is free, and to get it again takes longer than to
    write it to the disk; so it is made to have this much at hand."""
    memory = bytearray(size)
    memory[:: mmap.PAGESIZE] = bytes(len(memory[:: mmap.PAGESIZE]))


def _check(fm: Any, data: Steps, path: Path, ready: list[Tensor]) -> None:
    store = fm.harvest(data, "layers.*", path, rows="samples").store
    want = torch.cat(list(Steps(ready, len(data))))
    assert all(torch.equal(store[name].torch(), want) for name in store.sites) and store.verify()
    shutil.rmtree(path)


def _harvest(fm: Any, data: Steps, path: Path, sites: int) -> None:
    fm.harvest(data, "layers.*", path, rows="samples")


def _plain(fm: Any, data: Steps, path: Path, sites: int) -> None:
    """One file, sequentially, without anything beside it."""
    with path.open("wb", buffering=0) as file:
        for step in data:
            for _ in range(sites):
                file.write(step.view(torch.uint8).numpy().data)
        os.fsync(file.fileno())


def report(options: Any) -> list[str]:
    rows = [["rows in", "plain file, MiB/s", "harvest, MiB/s", "of the plain file", "CPU s a GiB: plain, harvest"]]
    for dtype in ("bfloat16", "float32"):
        (found,) = cell(
            "harvests.disk",
            "rounds",
            folder=options.folder,
            gib=options.gib,
            sites=4,
            width=8192,
            dtype=dtype,
            device=options.device,
            turns=options.rounds,
            threads=1,
        )
        mib, ways = found["bytes"] / 2**20, ("plain", "harvest")
        rates = {way: [mib / one[way]["wall"] for one in found["rounds"]] for way in ways}
        ratios = [b / a for a, b in zip(rates["plain"], rates["harvest"], strict=True)]
        cpu = [min(one[way]["cpu"] for one in found["rounds"]) / mib * 1024 for way in ways]
        shown = [spread(rates[way], ",.0f") for way in ways]
        rows.append([dtype, *shown, spread(ratios, ".0%"), f"{cpu[0]:.2f}, {cpu[1]:.2f}"])
    return [
        "Against the disk",
        f"A model of 4 layers that hand on {ROWS} ready rows of 8,192 numbers a step, {options.gib:g} GiB on "
        f"{options.device}, and a plain file of the same bytes in the same folder, by turns, both with fsync. "
        f"Before each the machine is made to have memory at hand. Rows are read back and compared first.",
        "",
        *table(rows),
    ]
