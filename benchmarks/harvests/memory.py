"""Part ``memory``: the most that the ranks of a harvest take, by how long it is."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from cells import cell, table
from harvests.smollm2 import WORLDS


def report(options: Any) -> list[str]:
    if options.model is None:
        return ["Memory", "Left out: there are no weights of SmolLM2 here."]
    lengths = (options.tokens // 6, options.tokens, 2 * options.tokens)
    given = {"model": options.model, "samples": options.samples, "length": options.length}
    rows = [["rank", "before", *(f"most, {n:,} tokens" for n in lengths), f"after {lengths[-1]:,} tokens"]]
    ranks, axis = WORLDS["tp"], "tp"
    found = []
    for n in lengths:
        path = Path(options.folder) / f"memory-{n}"
        found.append(cell("harvests.smollm2", "harvested", ranks=ranks, axis=axis, path=str(path), tokens=n, **given))
        shutil.rmtree(path)
    for rank, runs in enumerate(zip(*found, strict=True)):
        rows.append([f"TP {rank}", f"{runs[0]['before']:,.0f}", *(f"{run['peak']:,.0f}" for run in runs)])
        rows[-1].append(f"{runs[-1]['after']:,.0f}")
    return [
        "Memory",
        f"{options.model_name} over {ranks} ranks of tensor parallelism, all residual sites in float32, each length in "
        f"processes of its own; MiB. The queue of rows that wait for the disk holds up to 256 MiB a rank, so that a "
        f"short harvest may end before it is as full as it gets.",
        "",
        *table(rows),
    ]
